"""Functions that write into parts of a tensor, and their forms in place."""

from __future__ import annotations

import functools
from typing import Any, cast

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
jet_rule(Tensor.bernoulli_)(
    lambda x, p=0.5, **options: write(x, torch.bernoulli(primal(x), p, **options))
)
jet_rule(Tensor.zero_, torch.zero_)(lambda x: write(x, torch.zeros_like(primal(x))))


@jet_rule(Tensor.__setitem__)
def _setitem(x: Tensor, index: Any, value: Any) -> None:
    def put(x: Tensor, value: Tensor) -> Tensor:
        x = x.clone()
        x[primal(index)] = value
        return x

    write(x, together(put, x, _as_tensor(value, x)))


def _select_scatter(x: Tensor, src: Tensor, dim: int, index: int) -> Tensor:
    x = x.clone()
    x.select(dim, index).copy_(src)
    return x


# PyTorch's own has a wrong gradient under torch.vmap.
jet_rule(torch.select_scatter)(functools.partial(together, _select_scatter))


@jet_rule(torch.index_fill)
def _index_fill(x: Tensor, dim: int, index: Tensor, value: Any) -> Tensor:
    return cast(Tensor, together(torch.index_fill, x, dim, index, _as_tensor(value, x)))


@jet_rule(torch.scatter)
def _scatter(x: Tensor, dim: int, index: Tensor, src: Any, *, reduce: str | None = None) -> Tensor:
    if not isinstance(src, Tensor):
        src = torch.full(index.shape, src, dtype=x.dtype, device=x.device)
    if reduce is not None:
        raise NotImplementedError("jet: torch.scatter has no rule for reduce; use scatter_reduce")
    return cast(Tensor, together(torch.scatter, x, dim, index, src))


@jet_rule(torch.scatter_reduce)
def _scatter_reduce(
    x: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    if reduce == "prod":
        raise NotImplementedError("jet: torch.scatter_reduce has no rule for reduce='prod'")
    src = src[tuple(map(slice, index.shape))]
    own, given = torch.ones_like(primal(x)), torch.ones_like(primal(src))
    if not include_self:
        own = own.scatter(dim, index, 0.0)
    if reduce in ("amax", "amin"):  # shared among equal ones
        best = primal(x).scatter_reduce(dim, index, primal(src), reduce, include_self=include_self)
        given = (primal(src) == best.gather(dim, index)).to(x.dtype)
        own = own * (primal(x) == best)
    kept = torch.where(own > 0, x, 0.0)
    total = kept.scatter_add(dim, index, torch.where(given > 0, src, 0.0))
    return total if reduce == "sum" else total / own.scatter_add(dim, index, given)
