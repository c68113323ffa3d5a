"""Normalization layers."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
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


@jet_rule(F.layer_norm)
def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    return _affine(_standardized(input, dims, eps), weight, bias)


@jet_rule(F.rms_norm)
def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(input * torch.rsqrt(input.square().mean(dims, keepdim=True) + eps), weight, None)


@jet_rule(F.group_norm)
def _group_norm(
    input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    groups = input.reshape(len(input), num_groups, -1)
    return _affine(
        _standardized(groups, (-1,), eps).reshape(input.shape), weight, bias, input.ndim - 2
    )


@jet_rule(F.batch_norm)
def _batch_norm(
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    after = input.ndim - 2
    if training and running_mean is None:
        dims = (0, *range(2, input.ndim))
        return _affine(_standardized(input, dims, eps), weight, bias, after)
    if training:
        raise NotImplementedError(
            "jet: F.batch_norm has no rule in training mode, where the step that it takes in its "
            "running statistics would be taken along the direction too; call model.eval(), or use "
            "a norm without them (nn.GroupNorm, nn.LayerNorm)"
        )
    mean = running_mean.reshape(-1, *[1] * after)
    scale = torch.rsqrt(running_var + eps)
    return _affine((input - mean) * scale.reshape(-1, *[1] * after), weight, bias, after)


@jet_rule(F.instance_norm)
def _instance_norm(
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats or running_mean is not None:
        raise NotImplementedError("jet: F.instance_norm has a rule without running statistics only")
    dims = tuple(range(2 - input.ndim, 0))
    return _affine(_standardized(input, dims, eps), weight, bias, input.ndim - 2)
