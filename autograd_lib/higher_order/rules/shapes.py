"""Functions that join several tensors, pad, look up or reshape with a rule of their own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet, algebra_of, by_coefficient, lift, primal
from autograd_lib.higher_order.rules.registration import from_right
from autograd_lib.higher_order.series import pad
from autograd_lib.higher_order.taylor import jet_rule


@jet_rule(Tensor.view)
def _view(x: Jet, *size: Any, **kwargs: Any) -> Tensor:
    if size and isinstance(size[0], torch.dtype):
        raise NotImplementedError("jet: Tensor.view(dtype) has no rule; convert by Tensor.to")
    return x.reshape(*size, *kwargs.values())  # a stack may be contiguous where x is not


jet_rule(torch.take)(lambda x, index: x.flatten()[index])


@jet_rule(torch.broadcast_tensors)
def _broadcast_tensors(*tensors: Tensor) -> Any:
    shape = torch.broadcast_tensors(*primal(tensors))[0].shape
    return tuple(x if x.shape == shape else x.expand(shape) for x in tensors)


@jet_rule(F.pad)
def _pad(input: Jet, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
    padded = by_coefficient(F.pad, input, pad, mode)
    if mode != "constant" or not value:
        return padded
    return padded + F.pad(torch.zeros_like(primal(input)), pad, mode, value)


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
    if max_norm is not None or scale_grad_by_freq:  # sparse is a form in which gradients are kept
        raise NotImplementedError(
            "jet: F.embedding has a rule without max_norm and scale_grad_by_freq"
        )
    # padding_idx only stops a gradient, and jet's derivatives with it
    rows = weight
    if padding_idx is not None:
        kept = torch.arange(len(weight), device=weight.device) != padding_idx % len(weight)
        rows = torch.where(kept[:, None], weight, weight.detach())  # type: ignore[assignment]
    return rows.map(lambda c: torch.stack([F.embedding(input, w) for w in c]))


@jet_rule(torch.embedding_bag)
def _embedding_bag(weight: Tensor, indices: Tensor, offsets: Tensor, *options: Any) -> Any:
    _, mode, _, factors, include_last_offset, padding_idx = options
    starts = offsets[:-1] if include_last_offset else offsets
    places = torch.arange(len(indices), device=indices.device)
    bags = torch.searchsorted(starts, places, right=True) - 1
    rows = F.embedding(indices, weight, padding_idx)
    rows = rows if factors is None else rows * factors.unsqueeze(-1)
    kept = torch.ones_like(indices) if padding_idx is None else indices != padding_idx
    into = bags[kept > 0].unsqueeze(-1).expand(-1, rows.shape[1])
    zeros = torch.zeros(len(starts), rows.shape[1], dtype=rows.dtype, device=rows.device)
    reduce = ("sum", "mean", "amax")[mode]
    return (
        zeros.scatter_reduce(0, into, rows[kept > 0], reduce, include_self=False),
        bags,
        None,
        None,
    )


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
