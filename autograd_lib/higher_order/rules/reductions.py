"""Reductions over dimensions: products, moments and norms."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet, primal
from autograd_lib.higher_order.rules.registration import widened
from autograd_lib.higher_order.taylor import jet_rule


@jet_rule(torch.var)
def _var(
    x: Jet, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> Tensor:
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    if correction is None:
        correction = 0 if unbiased is False else 1
    squares = (x - x.mean(dim, keepdim=True)).square()
    total = squares.sum(dim, keepdim)
    return total / (x.numel() / total.numel() - correction)


jet_rule(torch.std)(lambda *args, **kwargs: torch.var(*args, **kwargs).sqrt())


@jet_rule(torch.var_mean)
def _var_mean(x: Jet, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    dims = None if isinstance(dim, bool) else dim
    keepdim = args[1] if len(args) > 1 else kwargs.get("keepdim", False)
    return torch.var(x, dim, *args, **kwargs), x.mean(dims, keepdim=keepdim)


@jet_rule(torch.prod)
def _prod(x: Jet, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    x = cast(Jet, widened(x, dtype))
    if dim is None:
        return torch.prod(x.flatten(), 0)
    rows = x.movedim(dim, 0)
    if not len(rows):
        return torch.prod(primal(x), dim, keepdim)
    while len(rows) > 1:  # halves of it, so that the depth is logarithmic
        half = len(rows) // 2
        rows = torch.cat([rows[:half] * rows[half : 2 * half], rows[2 * half :]])
    return rows[0].unsqueeze(dim) if keepdim else rows[0]


@jet_rule(torch.linalg.vector_norm)
def _vector_norm(
    x: Jet, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    x = cast(Jet, widened(x, dtype))
    if abs(ord) == math.inf:
        extremum = torch.amax if ord > 0 else torch.amin
        return extremum(x.abs(), () if dim is None else dim, keepdim)
    if ord == 0:
        return torch.linalg.vector_norm(primal(x), 0, dim, keepdim)
    if ord == 2 and not x.is_complex():
        return x.square().sum(dim, keepdim).sqrt()
    return (x.abs() ** ord).sum(dim, keepdim) ** (1 / ord)


@jet_rule(F.cosine_similarity)
def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    def unit(x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, 2, dim, True).clamp_min(eps)

    return (unit(x1) * unit(x2)).sum(dim)
