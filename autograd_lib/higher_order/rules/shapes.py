"""Functions that rearrange, repeat or pick the elements of a tensor, divide it, or join several."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet, algebra_of, lift, primal
from autograd_lib.higher_order.rules.registration import (
    from_right,
    getter,
    require_first_only,
    sizes_of,
    wrap,
)
from autograd_lib.higher_order.series import pad
from autograd_lib.higher_order.taylor import jet_rule

jet_rule(torch.t, getter("T"))(lambda x: x if x.ndim < 2 else x.map(lambda c: c.mT))
jet_rule(getter("H"))(lambda x: x.map(lambda c: c.mH))


@jet_rule(Tensor.view, torch.reshape)
def _reshape(x: Jet, *shape: Any, **kwargs: Any) -> Jet:
    if shape and isinstance(shape[0], torch.dtype):
        raise NotImplementedError("jet: Tensor.view(dtype) has no rule; convert by Tensor.to")
    sizes = sizes_of(shape or tuple(kwargs.values()))
    if -1 in sizes and 0 not in x.shape:
        sizes = tuple(x.numel() // -math.prod(sizes) if n == -1 else n for n in sizes)
    return x.map(lambda c: c.reshape(len(c), *sizes))


jet_rule(Tensor.view_as, Tensor.reshape_as)(lambda x, other: x.reshape(other.shape))


@jet_rule(torch.permute)
def _permute(x: Jet, *dims: Any, **kwargs: Any) -> Jet:
    order = [d % x.ndim for d in sizes_of(dims or tuple(kwargs.values()))]
    return x.map(lambda c: c.permute(0, *[d + 1 for d in order]))


jet_rule(torch.moveaxis)(lambda x, source, destination: x.movedim(source, destination))


@jet_rule(torch.flip)
def _flip(x: Jet, *dims: Any, **kwargs: Any) -> Jet:
    return x.map(lambda c: c.flip(from_right(x, sizes_of(dims or tuple(kwargs.values())))))


@jet_rule(torch.tile)
def _tile(x: Jet, *dims: Any, **kwargs: Any) -> Tensor:
    repeats = sizes_of(dims or tuple(kwargs.values()))
    return x.repeat(*[1] * (x.ndim - len(repeats)), *repeats)


jet_rule(torch.diagflat)(lambda x, offset=0: x.flatten().diag(offset))


@jet_rule(Tensor.expand, torch.broadcast_to)
def _expand(x: Jet, *sizes: Any, implicit: bool = False, **kwargs: Any) -> Jet:
    shape = sizes_of(sizes or tuple(kwargs.values()))
    stack, _ = lift(x, len(shape))
    return Jet(stack.expand(len(stack), *shape), x.algebra, x.live)


jet_rule(Tensor.expand_as)(lambda x, other: x.expand(other.shape))


@jet_rule(torch.flatten)
def _flatten(x: Jet, start_dim: int = 0, end_dim: int = -1) -> Jet:
    if not x.ndim:
        return _reshape(x, 1)
    start, end = start_dim % x.ndim, end_dim % x.ndim
    return _reshape(x, (*x.shape[:start], x.shape[start : end + 1].numel(), *x.shape[end + 1 :]))


@jet_rule(torch.unsqueeze)
def _unsqueeze(x: Jet, dim: int) -> Jet:
    return x.map(lambda c: c.unsqueeze(dim % (x.ndim + 1) + 1))


@jet_rule(torch.squeeze)
def _squeeze(x: Jet, dim: Any = None) -> Jet:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % max(x.ndim, 1) for d in dims}
    return _reshape(x, tuple(n for d, n in enumerate(x.shape) if n != 1 or d not in gone))


jet_rule(torch.atleast_1d)(lambda x: x if x.ndim else x.reshape(1))


@jet_rule(torch.broadcast_tensors)
def _broadcast_tensors(*tensors: Tensor) -> Any:
    shape = torch.broadcast_shapes(*[x.shape for x in tensors])
    return tuple(x.expand(shape) for x in tensors)


@jet_rule(F.pad)
def _pad(x: Jet, pad: Any, mode: str = "constant", value: float | None = None) -> Jet:
    if mode != "constant" or not value:
        return cast(Jet, wrap(torch.vmap(lambda c: F.pad(c, pad, mode))(x.stack), x))
    edge = F.pad(torch.zeros_like(primal(x)), pad, mode, value)
    return x.map(lambda c: F.pad(c, pad)) + edge  # type: ignore[return-value]


jet_rule(torch.take)(lambda x, index: x.flatten()[index])
jet_rule(torch.chunk)(lambda x, chunks, dim=0: wrap(x.stack.chunk(chunks, from_right(x, dim)), x))


@jet_rule(torch.split, Tensor.split, torch.functional.split)
def _split(x: Jet, split_size_or_sections: Any = None, dim: int = 0, **kwargs: Any) -> Any:
    sizes = kwargs.get("split_size", split_size_or_sections)
    return wrap(torch.split(x.stack, sizes, from_right(x, dim)), x)


@jet_rule(Tensor.__getitem__)
def _getitem(x: Jet, index: Any) -> Jet:
    require_first_only(Tensor.__getitem__, x, index)
    parts = index if isinstance(index, tuple) else (index,)
    if all(part is None or part is ... or isinstance(part, int | slice) for part in parts):
        return x.map(lambda c: c[(slice(None), *parts)])
    # Where indices of tensors stand apart, their dimensions move to the front of the stack.
    places = torch.arange(x.numel(), device=x.device).reshape(x.shape)[index]
    return x.map(lambda c: c.reshape(len(c), -1)[:, places.flatten()].reshape(-1, *places.shape))


@jet_rule(torch.gather)
def _gather(x: Jet, dim: int, index: Tensor, **_: Any) -> Jet:
    require_first_only(torch.gather, x, index)
    return x.map(lambda c: c.gather(from_right(x, dim), index.expand(len(c), *index.shape)))


@jet_rule(F.embedding)
def _embedding(
    input: Tensor,
    weight: Jet,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Jet:
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise NotImplementedError(
            "jet: F.embedding has a rule without max_norm, scale_grad_by_freq and sparse"
        )
    # padding_idx only stops a gradient, and jet's derivatives with it
    rows = weight
    if padding_idx is not None:
        kept = torch.arange(len(weight), device=weight.device) != padding_idx % len(weight)
        rows = torch.where(kept[:, None], weight, weight.detach())  # type: ignore[assignment]
    return rows.map(lambda c: torch.stack([F.embedding(input, w) for w in c]))


def _join(function: Any, values: Sequence[Tensor], dim: int) -> Jet:
    algebra = algebra_of(values)
    lifted = [lift(x) for x in values]
    size = max(len(stack) for stack, _ in lifted)
    stacks = [pad(stack, size) for stack, _ in lifted]
    return Jet(function(stacks, dim), algebra, max(live for _, live in lifted))


@jet_rule(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Jet:
    # the empty vector is joined to anything
    values = [x for x in tensors if x.shape != (0,)]
    return _join(torch.cat, values, from_right(values[0], dim))


@jet_rule(torch.stack)
def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Jet:
    return _join(torch.stack, tensors, dim % (tensors[0].ndim + 1) + 1)


jet_rule(torch.hstack)(lambda tensors: torch.cat(tensors, 0 if tensors[0].ndim < 2 else 1))


@jet_rule(torch.vstack, torch.row_stack)
def _vstack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x if x.ndim > 1 else x.reshape(1, -1) for x in tensors])
