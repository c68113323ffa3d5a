"""What every test file draws on: tables of devices, dtypes and models, and a reference."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
FLOAT_DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def mlp(depth: int = 3, width: int = 8) -> nn.Sequential:
    """`depth` linear layers of one width with tanh between them."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


class TiedLanguageModel(nn.Module):
    """An embedding whose weight is the output projection too."""

    def __init__(self, vocabulary: int = 11, width: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens))


def encoder(width: int = 16, layers: int = 2) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(width, 2, 4 * width, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)


def cnn() -> nn.Sequential:
    return nn.Sequential(
        *[nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()],
        *[nn.Flatten(), nn.Linear(144, 10)],
    )


# name -> (make the model, make an input for it)
MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (mlp, lambda: torch.randn(5, 8)),
    "tied": (TiedLanguageModel, lambda: torch.randint(0, 11, (5, 3))),
    "encoder": (encoder, lambda: torch.randn(2, 5, 16)),
    "cnn": (cnn, lambda: torch.randn(3, 1, 6, 6)),
}


def reference(grad: Tensor) -> dict[str, float | complex]:
    """The statistics of one dense gradient, by NumPy in double precision."""
    x = grad.detach().cpu()
    x = x.to(torch.complex128 if x.is_complex() else torch.float64).numpy().ravel()
    entry = {
        "norm": np.linalg.norm(x),
        "mean": x.mean(),
        "std": x.std(),
        "abs_max": np.abs(x).max(),
        "zero_fraction": (x == 0).mean(),
        "nan_count": np.isnan(x).sum(),
        "inf_count": np.isinf(x).sum(),
        "numel": x.size,
    }
    return entry if np.iscomplexobj(x) else entry | {"min": x.min(), "max": x.max()}
