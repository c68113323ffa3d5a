"""Nets as people write them by hand, each with a batch of which it computes its loss.

`NETS` has the form of `ARCHITECTURES`: a function that makes a model and a batch, which is called
as `model(**batch)["loss"]`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batch = dict[str, Any]
NETS: dict[str, Callable[[], tuple[nn.Module, Batch]]] = {}


def net(make: Callable[[], tuple[nn.Module, Batch]]) -> Callable[[], tuple[nn.Module, Batch]]:
    """Enter into the table a function that makes a net and a batch; its seed is fixed."""

    def seeded() -> tuple[nn.Module, Batch]:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            return make()

    NETS[make.__name__] = seeded
    return seeded


class Tagger(nn.Module):
    """A recurrent net over packed sequences, with targets that nobody aligned."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(5, 6, bidirectional=True, batch_first=True)
        self.head = nn.Linear(12, 7)

    def forward(
        self, frames: Tensor, lengths: Tensor, labels: Tensor, label_lengths: Tensor
    ) -> dict[str, Tensor]:
        packed = nn.utils.rnn.pack_padded_sequence(frames, lengths, batch_first=True)
        hidden, _ = nn.utils.rnn.pad_packed_sequence(self.lstm(packed)[0], batch_first=True)
        scores = self.head(hidden).log_softmax(-1)
        loss = F.ctc_loss(scores.transpose(0, 1), labels, lengths, label_lengths)
        return {"loss": loss, "scores": scores}


@net
def tagger() -> tuple[nn.Module, Batch]:
    return Tagger(), {
        "frames": torch.randn(3, 12, 5),
        "lengths": torch.tensor([12, 9, 8]),
        "labels": torch.randint(1, 7, (3, 4)),
        "label_lengths": torch.tensor([4, 2, 3]),
    }


class MessagePassing(nn.Module):
    """Sums over neighbors, twice with the same weights, then a mean over each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.message, self.out = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(
        self, nodes: Tensor, edges: Tensor, graph: Tensor, labels: Tensor
    ) -> dict[str, Tensor]:
        h = self.embed(nodes)
        for _ in range(2):
            h = h + torch.zeros_like(h).index_add(0, edges[1], self.message(h)[edges[0]]).tanh()
        sums = h.new_zeros(len(labels), 6).index_add(0, graph, h)
        logits = self.out(sums / graph.bincount()[:, None])
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@net
def message_passing() -> tuple[nn.Module, Batch]:
    return MessagePassing(), {
        "nodes": torch.randn(10, 4),
        "edges": torch.randint(0, 10, (2, 24)),
        "graph": torch.tensor([0] * 4 + [1] * 3 + [2] * 3),
        "labels": torch.tensor([0, 1, 0]),
    }


class Recommender(nn.Module):
    """Bags of sparse embeddings beside dense features, and the products of all pairs."""

    def __init__(self) -> None:
        super().__init__()
        bags = (nn.EmbeddingBag(20, 4, mode="sum", sparse=True) for _ in range(2))
        self.bags = nn.ModuleList(bags)
        self.bottom, self.top = nn.Linear(3, 4), nn.Linear(7, 1)

    def forward(self, dense: Tensor, sparse: list[Tensor], clicked: Tensor) -> dict[str, Tensor]:
        parts = [self.bottom(dense).relu()]
        parts += [bag(tokens) for bag, tokens in zip(self.bags, sparse, strict=True)]
        vectors = torch.stack(parts, 1)
        rows, columns = torch.tril_indices(3, 3, -1)
        pairs = (vectors @ vectors.mT)[:, rows, columns]
        logits = self.top(torch.cat([parts[0], pairs], 1)).squeeze(1)
        return {"loss": F.binary_cross_entropy_with_logits(logits, clicked), "logits": logits}


@net
def recommender() -> tuple[nn.Module, Batch]:
    return Recommender(), {
        "dense": torch.randn(6, 3),
        "sparse": [torch.randint(0, 20, (6, n)) for n in (2, 3)],
        "clicked": torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0]),
    }


def _twice(inner: int, outer: int) -> nn.Sequential:
    return nn.Sequential(
        *[nn.Conv2d(inner, outer, 3, padding=1, bias=False), nn.BatchNorm2d(outer)],
        *[nn.ReLU(inplace=True), nn.Conv2d(outer, outer, 3, padding=1), nn.SiLU(inplace=True)],
    )


class UNet(nn.Module):
    """Down and up again, with what was there before beside it; activations in place."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.deep, self.up = _twice(1, 4), _twice(4, 8), _twice(12, 4)
        self.pool, self.grow = nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear")
        self.head = nn.Conv2d(4, 2, 1)

    def forward(self, pixels: Tensor, labels: Tensor) -> dict[str, Tensor]:
        skipped = self.down(pixels)
        deep = self.grow(self.deep(self.pool(skipped)))
        logits = self.head(self.up(torch.cat([skipped, deep], 1)))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


@net
def unet() -> tuple[nn.Module, Batch]:
    return UNet(), {"pixels": torch.randn(2, 1, 8, 8), "labels": torch.randint(0, 2, (2, 8, 8))}


class Experts(nn.Module):
    """Two of three experts for each sample; how unevenly is left as an attribute."""

    balance: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(6, 3)
        self.experts = nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        gates = self.router(x).softmax(-1)
        weights, chosen = gates.topk(2, -1)
        self.balance = 3 * (gates.mean(0) * F.one_hot(chosen, 3).float().mean((0, 1))).sum()
        out = torch.zeros_like(x)
        for i, expert in enumerate(self.experts):
            rows, places = (chosen == i).nonzero(as_tuple=True)
            out = out.index_add(0, rows, weights[rows, places, None] * expert(x[rows]))
        return x + out


class MixtureOfExperts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Experts() for _ in range(2))
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        for layer in self.layers:
            x = layer(x)
        logits = self.head(F.dropout(x, 0.1, self.training))
        balance = torch.stack([layer.balance for layer in self.layers]).mean()
        return {"loss": F.cross_entropy(logits, labels) + 0.01 * balance, "logits": logits}


@net
def mixture_of_experts() -> tuple[nn.Module, Batch]:
    return MixtureOfExperts(), {"x": torch.randn(8, 6), "labels": torch.randint(0, 4, (8,))}
