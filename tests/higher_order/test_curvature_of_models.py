"""Second-order products of today's models as they come, against differences of gradients."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from autograd_lib import (
    derivative_tower,
    ggn_product,
    hessian_trace,
    hvp,
    top_eigenvalues,
)

Named = dict[str, Tensor]


class Residual(nn.Module):
    """Two convolutions with in-place activations and an in-place sum, as in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.act, self.second = nn.ReLU(inplace=True), nn.Conv2d(3, 3, 3, padding=1)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.norm(self.first(x)))
        y = self.second(x)
        y += x
        return self.head(self.act(y).mean((2, 3)))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(7, 4), nn.LSTM(4, 5, batch_first=True)
        self.head = nn.Linear(5, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.lstm(self.embedding(tokens))[0][:, -1])


class MessagePassing(nn.Module):
    """Each node adds up what its neighbors send."""

    def __init__(self) -> None:
        super().__init__()
        self.message, self.head = nn.Linear(3, 4), nn.Linear(4, 2)
        self.edges = torch.tensor([[0, 1, 2, 3, 0], [1, 2, 3, 0, 2]])

    def forward(self, x: Tensor) -> Tensor:
        sent = torch.tanh(self.message(x))
        got = torch.zeros_like(sent).index_add_(0, self.edges[1], sent[self.edges[0]])
        return self.head(sent + got)


class SparseTokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 4, sparse=True), nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)).mean(1))


TOKENS = torch.tensor([[0, 3, 5, 1], [2, 2, 6, 4], [1, 0, 4, 3]])
OWN: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "resnet": lambda: (Residual(), torch.randn(3, 1, 6, 6)),
    "lstm": lambda: (Recurrent(), TOKENS),
    "message_passing": lambda: (MessagePassing(), torch.randn(3 + 1, 3)),
    "sparse": lambda: (SparseTokens(), TOKENS),
}
HUGGING_FACE = ["gpt2", "llama", "bert", "vit", "mixtral"]


class Case(NamedTuple):
    model: nn.Module  # as it comes
    batch: Any
    loss_fn: Callable[[Any, Any], Tensor] | None
    reference: Callable[[Named], Tensor]  # the loss in float64

    def loss(self, parameters: Named) -> Tensor:
        return loss_of(self.model, self.batch, self.loss_fn, parameters)


def loss_of(model: nn.Module, batch: Any, loss_fn: Any, parameters: Named) -> Tensor:
    if loss_fn is None:
        return functional_call(model, parameters, kwargs=batch).loss
    return loss_fn(functional_call(model, parameters, (batch[0],)), batch[1])


def widened(values: Any) -> Any:
    if isinstance(values, Tensor):
        return values.double() if values.is_floating_point() else values
    if isinstance(values, dict):
        return {k: widened(v) for k, v in values.items()}
    return tuple(widened(v) for v in values) if isinstance(values, tuple) else values


@functools.cache
def case(name: str) -> Case:
    loss_fn: Any = None
    if name in OWN:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model, x = OWN[name]()
        batch: Any = (x, torch.tensor([0, 1, 1, 0])[: len(x)])
        loss_fn = F.cross_entropy
    else:
        pytest.importorskip("transformers")
        from architectures import ARCHITECTURES  # noqa: PLC0415 - needs transformers

        model, batch = ARCHITECTURES[name]()
    model.eval()
    twin = functools.partial(loss_of, wide(model), widened(batch), loss_fn)
    return Case(model, batch, loss_fn, twin)


def wide(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model).double()
    if "Mixtral" in type(model).__name__:
        config: Any = model.config  # whose experts' fused product takes no float64 on a CPU
        config._experts_implementation = "eager"
    return model


def slopes(f: Callable[[Named], Tensor], at: Named) -> Named:
    leaves = {k: p.clone().requires_grad_() for k, p in at.items()}
    found = torch.autograd.grad(f(leaves), list(leaves.values()), materialize_grads=True)
    return {k: s.to_dense() for k, s in zip(leaves, found, strict=True)}


def difference(f: Callable[[float], Named], h: float) -> Named:
    """The derivative at 0, by four points: these models round to float32 in their loss or norms."""
    one, other, two, second = (f(s * h) for s in (1, -1, 2, -2))
    return {k: (8 * (one[k] - other[k]) - (two[k] - second[k])) / (12 * h) for k in one}


def width(name: str) -> float:
    """Those of `transformers` need steps above float32's rounding, the others none over a kink."""
    return 1e-6 if name in OWN else 3e-4


@functools.cache
def expected(name: str) -> tuple[Named, Named]:
    """A direction, and the Hessian times it by differences of gradients in float64."""
    model, f = case(name).model, case(name).reference
    generator = torch.Generator().manual_seed(1)
    v = {k: torch.randn(p.shape, generator=generator) for k, p in model.named_parameters()}
    start = {k: p.detach().double() for k, p in model.named_parameters()}
    return v, difference(lambda s: slopes(f, {k: start[k] + s * v[k] for k in v}), width(name))


def assert_same(got: Named, wanted: Named) -> None:
    scale = max(t.abs().max().item() for t in wanted.values())
    assert scale > 1e-3
    for k, t in wanted.items():
        assert not got[k].is_sparse
        torch.testing.assert_close(got[k].double(), t, rtol=1e-3, atol=2e-3 * scale)


@pytest.mark.parametrize("name", [*HUGGING_FACE, *OWN])
def test_products_and_towers_as_the_model_comes(name: str) -> None:
    """In float32 and with fused attention, experts, cells and in-place operations."""
    model, batch, loss_fn, _ = case(name)
    x, target = (batch, None) if loss_fn is None else batch
    v, wanted = expected(name)
    parameters = {k: p.detach() for k, p in model.named_parameters()}
    assert_same(hvp(case(name).loss, parameters, v), wanted)
    assert_same(derivative_tower(model, loss_fn, x, target, 2, v)[1], wanted)


@pytest.mark.parametrize("name", [*HUGGING_FACE, *OWN])
def test_spectra_and_traces_as_the_model_comes(name: str) -> None:
    """Of the smallest parameter before the head, for which the whole Hessian is at hand."""
    model = case(name).model
    sizes = {k: p.numel() for k, p in model.named_parameters() if p.numel() > 3}
    key = min(list(sizes)[:-1], key=lambda k: sizes[k])
    small = {key: model.get_parameter(key).detach()}
    f, start, rows = case(name).reference, small[key].double(), []
    for unit in torch.eye(start.numel(), dtype=torch.float64):
        step = unit.reshape(start.shape)
        along = functools.partial(lambda step, s: slopes(f, {key: start + s * step}), step)
        rows.append(difference(along, 100 * width(name))[key].flatten())
    values = torch.linalg.eigvalsh(torch.stack(rows))
    largest = values[values.abs().argmax()]
    got = top_eigenvalues(case(name).loss, small, 1)
    torch.testing.assert_close(got[0], largest, rtol=5e-3, atol=0)
    trace = hessian_trace(case(name).loss, small, 40, generator=torch.Generator().manual_seed(0))
    doubt = 5 * trace.standard_error.item() + 5e-3 * values.abs().sum().item()
    assert abs(trace.value.item() - values.sum().item()) < doubt


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_gauss_newton_is_the_curvature_of_the_outputs(name: str) -> None:
    """v^T G v is the second difference of the loss along the tangent of the logits."""
    model, batch, _, _ = case(name)
    v, _ = expected(name)
    labels = batch["labels"].flatten()

    def loss_fn(output: Any, _: Any) -> Tensor:
        return F.cross_entropy(output.logits.reshape(len(labels), -1), labels)

    got = ggn_product(model, loss_fn, batch)(v)
    curvature = sum((got[k].double() * v[k]).sum() for k in v)
    start = {k: p.detach().double() for k, p in model.named_parameters()}
    twin = wide(model)

    def logits(s: float) -> Tensor:
        at = {k: start[k] + s * v[k] for k in v}
        with torch.no_grad():
            found = functional_call(twin, at, kwargs=widened(batch)).logits
        return found.reshape(len(labels), -1)

    tangent, z = difference(lambda s: {"z": logits(s)}, 1e-3)["z"], logits(0.0)
    wanted = torch.func.jvp(
        lambda z: torch.func.jvp(lambda z: F.cross_entropy(z, labels), (z,), (tangent,))[1],
        (z,),
        (tangent,),
    )[1]
    torch.testing.assert_close(curvature, wanted, rtol=2e-3, atol=0)
