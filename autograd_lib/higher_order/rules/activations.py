"""Activation functions."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.higher_order.algebra import Recurrence
from autograd_lib.higher_order.dispatch import Jet, primal
from autograd_lib.higher_order.rules.elementary import elementary
from autograd_lib.higher_order.taylor import jet_rule


@jet_rule(F.gelu)
def _gelu(input: Jet, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (input + 0.044715 * input**3)
        return 0.5 * input * (1 + torch.tanh(inner))
    return input.algebra.elementary(_GELU, input)


# x times the normal distribution, which is z, with its density w
_GELU = Recurrence(
    (F.gelu, {"z": 1, "xw": 1}),
    (lambda x: 0.5 * (1 + torch.erf(x * math.sqrt(0.5))), {"w": 1}),
    (lambda x: torch.exp(-0.5 * x.square()) * (1 / math.sqrt(2 * math.pi)), {"xw": -1}),
)
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


jet_rule(F.silu)(lambda input: input * torch.sigmoid(input))
jet_rule(F.mish)(lambda input: input * torch.tanh(F.softplus(input)))


@jet_rule(F.glu)
def _glu(input: Jet, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * torch.sigmoid(gate)


@jet_rule(F.softplus)
def _softplus(input: Jet, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    smooth = elementary(
        input, lambda x: F.softplus(x, beta, threshold), lambda x: torch.sigmoid(beta * x)
    )
    return torch.where(primal(input) * beta > threshold, input, smooth)


jet_rule(F.relu, torch.relu)(lambda input: input.map(lambda c: c * (c[0] > 0)))


@jet_rule(F.leaky_relu)
def _leaky_relu(input: Jet, negative_slope: float = 0.01) -> Tensor:
    return torch.where(primal(input) > 0, input, input * negative_slope)


@jet_rule(F.prelu, torch.prelu)
def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    shape = (-1, *[1] * (input.ndim - 2)) if input.ndim > 1 and weight.numel() > 1 else (-1,)
    return torch.where(primal(input) > 0, input, input * weight.reshape(shape))


@jet_rule(F.elu)
def _elu(input: Jet, alpha: float = 1.0) -> Tensor:
    below = torch.expm1(torch.where(primal(input) > 0, 0.0, input))
    return torch.where(primal(input) > 0, input, alpha * below)


jet_rule(F.celu, torch.celu)(lambda input, alpha=1.0: alpha * F.elu(input / alpha))
jet_rule(F.selu, torch.selu)(lambda input: _SELU_SCALE * F.elu(input, _SELU_ALPHA))
jet_rule(F.relu6)(lambda input: F.hardtanh(input, 0.0, 6.0))


@jet_rule(F.hardtanh)
def _hardtanh(input: Jet, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    inside = (primal(input) > min_val) & (primal(input) < max_val)
    return torch.where(inside, input, primal(input).clamp(min_val, max_val))


jet_rule(F.hardsigmoid)(lambda input: F.hardtanh(input + 3, 0.0, 6.0) / 6)
jet_rule(F.hardswish)(lambda input: input * F.hardsigmoid(input))


@jet_rule(torch.rrelu)
def _rrelu(
    input: Jet, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, *_: Any
) -> Tensor:
    slope = (
        torch.empty_like(primal(input)).uniform_(lower, upper) if training else (lower + upper) / 2
    )
    return torch.where(primal(input) > 0, input, input * slope)
