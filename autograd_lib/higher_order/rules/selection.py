"""Functions defined by cases: conditions, bounds, extrema, sorting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet, algebra_of, aligned, jets, primal
from autograd_lib.higher_order.rules.registration import family
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
    if x.is_complex():
        raise NotImplementedError("jet: torch.abs has no rule for complex values, not analytic")
    return x * torch.sign(primal(x))


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


@jet_rule(torch.sort)
def _sort(x: Jet, dim: int = -1, descending: bool = False, **kwargs: Any) -> Any:
    found = torch.sort(primal(x), dim=dim, descending=descending, **kwargs)
    return type(found)((x.gather(dim, found.indices), found.indices))


@jet_rule(torch.topk)
def _topk(x: Jet, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> Any:
    found = torch.topk(primal(x), k, dim, *args, **kwargs)
    return type(found)((x.gather(dim, found.indices), found.indices))
