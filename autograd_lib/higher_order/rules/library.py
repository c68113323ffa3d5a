"""The `torch.autograd.Function`s of this library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.functions.activations import _CodedActivation, _LowMemoryReLU
from autograd_lib.functions.functions import (
    CustomAutogradFunction,
    _ClipGradient,
    _Log1mExp,
    _log1mexp_slope,
    _SafeNorm,
    _SafeSqrt,
    _ScaleGradient,
    _StraightThrough,
    safe_norm,
)
from autograd_lib.functions.losses import _BoundWithForwardMode
from autograd_lib.higher_order.dispatch import Jet, primal
from autograd_lib.higher_order.taylor import jet_rule


@jet_rule(CustomAutogradFunction)
def _custom_linear(input: Tensor, weight: Tensor) -> Tensor:
    return F.linear(input, weight)


@jet_rule(_StraightThrough)
def _straight_through(x: Jet, f: Callable[[Tensor], Tensor]) -> Tensor:
    return x + (f(primal(x)) - primal(x)).detach()


@jet_rule(_ScaleGradient, _ClipGradient)
def _bent(*args: Any) -> Tensor:
    raise NotImplementedError(
        "jet: scale_gradient, reverse_gradient and clip_gradient have no rule: they bend gradients "
        "on their way back, and a derivative along a direction is none"
    )


jet_rule(_Log1mExp, derivative=True)(_log1mexp_slope)


@jet_rule(_SafeSqrt)
def _safe_sqrt(x: Jet) -> Tensor:
    zero = primal(x) == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


@jet_rule(_SafeNorm)
def _safe_norm(x: Jet) -> Tensor:
    norm = safe_norm(primal(x), -1, keepdim=True)
    zero = norm == 0
    squares = torch.where(zero, 1.0, x).square().sum(-1, keepdim=True)
    return torch.where(zero, 0.0, torch.sqrt(squares))


@jet_rule(_LowMemoryReLU)
def _low_memory_relu(x: Jet) -> Tensor:
    return F.relu(x)


@jet_rule(_CodedActivation)
def _coded_activation(x: Jet, kind: Any) -> tuple[Tensor]:
    return (kind.forward(x),)


@jet_rule(_BoundWithForwardMode)
def _bound(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.clamp(x, low, high)
