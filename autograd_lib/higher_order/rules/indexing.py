"""Functions that pick elements of a tensor, divide it, or join several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet, algebra_of, lift
from autograd_lib.higher_order.rules.registration import from_right, require_first_only, wrap
from autograd_lib.higher_order.series import pad
from autograd_lib.higher_order.taylor import jet_rule

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
