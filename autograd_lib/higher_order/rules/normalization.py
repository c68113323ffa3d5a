"""Normalization layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet
from autograd_lib.higher_order.taylor import jet_rule


def _standardized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    dims = tuple(d if d < 0 else d - x.ndim for d in dims)  # which they are in a stack too
    if isinstance(x, Jet):
        centered: Tensor = x.map(lambda c: c - c.mean(dims, keepdim=True))
    else:
        centered = x - x.mean(dims, keepdim=True)
    return centered * torch.rsqrt(centered.square().mean(dims, keepdim=True) + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, after: int = 0) -> Tensor:
    """Scale and shift; the dimensions of `weight` are followed by `after` others."""
    if weight is not None:
        x = x * weight.reshape(*weight.shape, *[1] * after)
    return x if bias is None else x + bias.reshape(*bias.shape, *[1] * after)


@jet_rule(torch.layer_norm)
def _layer_norm(
    input: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, _: Any = 0
) -> Tensor:
    return _affine(_standardized(input, tuple(range(-len(shape), 0)), eps), weight, bias)


@jet_rule(torch.rms_norm)
def _rms_norm(input: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    dims = tuple(range(-len(shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(input * torch.rsqrt(input.square().mean(dims, keepdim=True) + eps), weight, None)


@jet_rule(torch.group_norm)
def _group_norm(
    input: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, _: Any = 0
) -> Tensor:
    parts = _standardized(input.reshape(len(input), groups, -1), (-1,), eps)
    return _affine(parts.reshape(input.shape), weight, bias, input.ndim - 2)


@jet_rule(torch.batch_norm)
def _batch_norm(
    input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *options: Any
) -> Tensor:
    _, eps, _ = options
    after = input.ndim - 2
    if training and mean is None:
        dims = (0, *range(2, input.ndim))
        return _affine(_standardized(input, dims, eps), weight, bias, after)
    if training:
        raise NotImplementedError(
            "jet: F.batch_norm has no rule in training mode, where the step that it takes in its "
            "running statistics would be taken along the direction too; call model.eval(), or use "
            "a norm without them (nn.GroupNorm, nn.LayerNorm)"
        )
    standardized = _affine(_affine(input, None, -mean, after), torch.rsqrt(var + eps), None, after)
    return _affine(standardized, weight, bias, after)


@jet_rule(torch.instance_norm)
def _instance_norm(
    input: Tensor, weight: Any, bias: Any, mean: Any, var: Any, own: bool, *options: Any
) -> Tensor:
    _, eps, _ = options
    if not own or mean is not None:
        raise NotImplementedError("jet: F.instance_norm has a rule without running statistics only")
    dims = tuple(range(2 - input.ndim, 0))
    return _affine(_standardized(input, dims, eps), weight, bias, input.ndim - 2)
