"""Functions defined by cases: conditions, bounds, extrema, sorting."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet, algebra_of, aligned, jets, primal
from autograd_lib.higher_order.rules.registration import family, widened
from autograd_lib.higher_order.series import pad
from autograd_lib.higher_order.taylor import jet_rule


@jet_rule(torch.where)
def _where(condition: Tensor, x: Any, other: Any) -> Any:
    condition = primal(condition)
    algebra, like = algebra_of(x, other), jets((x, other))[0]
    x, y = (
        t if isinstance(t, Tensor) else torch.tensor(t, dtype=like.dtype, device=like.device)
        for t in (x, other)
    )
    (a, live_a), (b, live_b) = aligned(x, y, condition.ndim)
    size = max(len(a), len(b))
    a, b = pad(a, size), pad(b, size)
    return Jet(torch.where(condition, a, b), algebra, max(live_a, live_b))


# after that of torch.where, whose rule goes to the method too
@jet_rule(Tensor.where)
def _where_method(x: Any, condition: Tensor, other: Any) -> Any:
    return _where(condition, x, other)


jet_rule(torch.masked_fill)(lambda x, mask, value: torch.where(mask, value, x))


@jet_rule(torch.abs, torch.absolute)
def _abs(x: Jet) -> Tensor:
    return torch.hypot(x.real, x.imag) if x.is_complex() else x * torch.sign(primal(x))


@jet_rule(torch.clamp, torch.clip)
def _clamp(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    if min is not None:
        x = torch.where(primal(x) < primal(min), min, x)
    return x if max is None else torch.where(primal(x) > primal(max), max, x)


jet_rule(torch.clamp_min)(lambda x, min: torch.clamp(x, min=min))
jet_rule(torch.clamp_max)(lambda x, max: torch.clamp(x, max=max))


@jet_rule(torch.maximum)
def _maximum(x: Tensor, other: Tensor) -> Tensor:
    a, b = primal(x), primal(other)
    return torch.where(a > b, x, torch.where(a < b, other, (x + other) / 2))


jet_rule(torch.minimum)(lambda x, other: -torch.maximum(-x, -other))
jet_rule(torch.fmax)(
    lambda x, other: torch.where(primal(other).isnan() | (primal(x) >= primal(other)), x, other)
)
jet_rule(torch.fmin)(lambda x, other: -torch.fmax(-x, -other))


@family
def _picked(function: Any, place: int = 0) -> None:
    """Functions that return values along a dimension, and their places."""

    @jet_rule(function)
    def rule(x: Jet, *args: Any, **kwargs: Any) -> Any:
        if function is torch.median and not (args or kwargs):
            return x.flatten().median(0).values
        dim = kwargs.get("dim", args[place] if len(args) > place else -1)
        found = function(primal(x), *args, **kwargs)
        places = found.indices if found.indices.ndim == x.ndim else found.indices.unsqueeze(dim)
        values = x.gather(dim, places)
        values = values if places is found.indices else values.squeeze(dim)
        return type(found)((values, found.indices))


_picked(torch.sort, torch.cummax, torch.cummin, torch.median, torch.nanmedian, torch.mode)
_picked(torch.topk, torch.kthvalue, place=1)


@family
def _extremum(name: str) -> None:
    function = getattr(torch, name)

    @jet_rule(function)
    def rule(x: Jet, dim: Any = None, keepdim: bool = False) -> Any:
        if isinstance(dim, Tensor):
            return (torch.maximum if name == "max" else torch.minimum)(x, dim)
        if dim is None:
            return getattr(torch, f"a{name}")(x)
        found = function(primal(x), dim, True)
        parts = x.gather(dim, found.indices), found.indices
        return type(found)(parts if keepdim else [part.squeeze(dim) for part in parts])

    @jet_rule(getattr(torch, f"a{name}"))
    def all_of(x: Jet, dim: Any = (), keepdim: bool = False) -> Tensor:
        dims = tuple(range(x.ndim)) if dim == () else dim
        first = (primal(x) == getattr(torch, f"a{name}")(primal(x), dims, True)).to(x.dtype)
        return (x * (first / first.sum(dims, keepdim=True))).sum(dims, keepdim)


_extremum("max", "min")


@jet_rule(torch.cumprod)
def _cumprod(x: Tensor, dim: int, *, dtype: Any = None) -> Tensor:
    x = widened(x, dtype).movedim(dim, 0)
    step = 1
    while step < len(x):  # products of 2, 4, 8, ... neighbours
        x = torch.cat([x[:step], x[step:] * x[:-step]])
        step *= 2
    return x.movedim(0, dim)


@jet_rule(torch.logcumsumexp)
def _logcumsumexp(x: Tensor, dim: int) -> Tensor:
    x = x.movedim(dim, -1)
    later = torch.ones(x.shape[-1:] * 2, dtype=torch.bool, device=x.device).triu(1)
    rows = x.unsqueeze(-2).expand(*x.shape, x.shape[-1])
    return rows.masked_fill(later, -math.inf).logsumexp(-1).movedim(-1, dim)
