"""Functions that write into parts of a tensor, and their forms in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autograd_lib.higher_order.dispatch import primal, together, write
from autograd_lib.higher_order.taylor import jet_rule


def _as_tensor(value: Any, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(like.dtype)
    return torch.tensor(value, dtype=like.dtype, device=like.device)


jet_rule(Tensor.copy_)(lambda x, source, non_blocking=False: write(x, source))
jet_rule(Tensor.fill_, torch.fill_)(lambda x, value: write(x, _as_tensor(value, x)))
jet_rule(Tensor.zero_, torch.zero_)(lambda x: write(x, torch.zeros_like(primal(x))))


@jet_rule(Tensor.__setitem__)
def _setitem(x: Tensor, index: Any, value: Any) -> None:
    def put(x: Tensor, value: Tensor) -> Tensor:
        x = x.clone()
        x[primal(index)] = value
        return x

    write(x, together(put, x, _as_tensor(value, x)))


@jet_rule(torch.index_fill)
def _index_fill(x: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    chosen = torch.zeros(x.shape[dim], dtype=torch.bool, device=x.device)
    chosen[index] = True
    shape = [1] * x.ndim
    shape[dim] = -1
    return torch.where(chosen.reshape(shape), value, x)


@jet_rule(torch.scatter)
def _scatter(x: Tensor, dim: int, index: Tensor, src: Any, *, reduce: str | None = None) -> Tensor:
    if not isinstance(src, Tensor):
        src = torch.full(index.shape, src, dtype=x.dtype, device=x.device)
    if reduce == "multiply":
        raise NotImplementedError("jet: torch.scatter has no rule for reduce='multiply'")
    return together(torch.scatter_add if reduce else torch.scatter, x, dim, index, src)


@jet_rule(torch.scatter_reduce)
def _scatter_reduce(
    x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    if reduce == "prod":
        raise NotImplementedError("jet: torch.scatter_reduce has no rule for reduce='prod'")
    ones = torch.ones(index.shape, dtype=x.dtype, device=x.device)
    src = torch.where(ones > 0, src[tuple(slice(size) for size in index.shape)], 0.0)
    if not include_self:
        touched = torch.zeros(x.shape, dtype=x.dtype, device=x.device).scatter(dim, index, ones) > 0
        own = (~touched).to(x.dtype)
    else:
        own = torch.ones(x.shape, dtype=x.dtype, device=x.device)
    if reduce in ("amax", "amin"):  # shared among equal ones
        best = torch.scatter_reduce(
            primal(x), dim, index, primal(src), reduce, include_self=include_self
        )
        ones = (primal(src) == best.gather(dim, index)).to(x.dtype)
        own = own * (primal(x) == best)
    total = torch.where(own > 0, x, 0.0).scatter_add(dim, index, torch.where(ones > 0, src, 0.0))
    return total if reduce == "sum" else total / own.scatter_add(dim, index, ones)


@jet_rule(torch.index_reduce)
def _index_reduce(
    x: Tensor, dim: int, index: Tensor, source: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    shape = [1] * x.ndim
    shape[dim] = -1
    places = index.reshape(shape).expand(source.shape)
    reduce = {"mean": "mean", "amax": "amax", "amin": "amin"}.get(reduce, "prod")
    return torch.scatter_reduce(x, dim, places, source, reduce, include_self=include_self)
