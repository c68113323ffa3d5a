"""What derivatives along a direction are held against."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.polynomial import chebyshev
from torch import Tensor
from torch.func import jvp

ORDER = 4
# Values move by at most REACH times a direction whose entries lie between -1 and 1.
REACH = 0.2


class Points:
    """Where functions are looked at: float64 tensors from a generator of their own."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def real(self, *shape: int) -> Tensor:
        """Between -1 and 1."""
        return 2 * torch.rand(shape, generator=self.generator, dtype=torch.float64) - 1

    def positive(self, *shape: int) -> Tensor:
        """Between 0.6 and 1.6."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64) + 0.6

    def apart(self, *shape: int) -> Tensor:
        """A quarter above an integer each, so that no step reaches an integer or a tie."""
        n = math.prod(shape)
        places = torch.randperm(n, generator=self.generator).reshape(shape)
        return places.double() - n // 2 + 0.25


def fit_weights(order: int, points: int, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """Where to look along the direction, and what to weigh the values with for each derivative."""
    nodes = chebyshev.chebpts1(points)
    from_values = np.linalg.inv(chebyshev.chebvander(nodes, points - 1))
    rows = []
    for k in range(order + 1):
        at_zero = [
            chebyshev.chebval(0.0, chebyshev.chebder(unit, k))
            if k
            else chebyshev.chebval(0.0, unit)
            for unit in np.eye(points)
        ]
        rows.append(np.array(at_zero) @ from_values / reach**k)
    return nodes * reach, np.stack(rows)


FIT, SMALL_FIT = fit_weights(ORDER, 20, REACH), fit_weights(1, 8, 0.05)


def fitted(
    phi: Callable[[float], Tensor], order: int, fit: tuple[np.ndarray, np.ndarray] = FIT
) -> list[Tensor]:
    """The derivatives at 0 of a Chebyshev fit to the values of `phi`."""
    values = torch.stack([phi(t) for t in fit[0].tolist()])
    weights = torch.from_numpy(fit[1][: order + 1]).to(values.device)
    return list(torch.tensordot(weights.to(values.dtype), values, 1))


def nested(phi: Callable[[Tensor], Tensor], order: int, device: str) -> list[Tensor]:
    """The derivatives at 0 by forward mode in forward mode."""
    t = torch.zeros((), dtype=torch.float64, device=device)
    results = [phi(t)]
    for _ in range(order):
        phi = lambda t, f=phi: jvp(f, (t,), (torch.ones_like(t),))[1]  # noqa: E731
        results.append(phi(t))
    return results


def assert_near(
    got: Sequence[Tensor], expected: Sequence[Tensor], rtol: float, message: str = ""
) -> None:
    """Entry by entry, relative to the largest number of each order (or one)."""
    assert len(got) == len(expected)
    for k, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.shape == b.shape, f"order {k}: {tuple(a.shape)}, expected {tuple(b.shape)}"
        scale = max(1.0, b.abs().max().item() if b.numel() else 0.0)
        torch.testing.assert_close(
            a,
            b,
            rtol=rtol,
            atol=rtol * scale,
            check_dtype=False,
            msg=lambda text, k=k: f"order {k} {message}: {text}",
        )
