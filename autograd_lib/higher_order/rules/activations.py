"""Activation functions."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.higher_order.algebra import Elementary, Taylor
from autograd_lib.higher_order.dispatch import Jet, lift, primal
from autograd_lib.higher_order.rules.elementary import elementary
from autograd_lib.higher_order.rules.registration import decomposed
from autograd_lib.higher_order.series import Accumulator, add_product, sum_products
from autograd_lib.higher_order.taylor import jet_rule


@jet_rule(F.silu)
def _silu(input: Jet) -> Tensor:
    def slope(x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))

    return elementary(input, F.silu, slope, _composed(lambda x: x * torch.sigmoid(x)))


def _composed(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """The series of what other rules compose."""

    def series(stack: Tensor, length: int) -> Tensor:
        return lift(f(Jet(stack, Taylor(length))))[0]

    return series


@jet_rule(F.gelu)
def _gelu(input: Jet, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (input + 0.044715 * input**3)
        return 0.5 * input * (1 + torch.tanh(inner))
    return input.algebra.elementary(_GELU, input)


class _Gelu(Elementary):
    """`y = x P`, with the normal distribution `P' = p x'` and its density `p' = -x x' p`."""

    def __init__(self) -> None:
        super().__init__(F.gelu, None, self.recurrence)

    def recurrence(self, stack: Tensor, length: int) -> Tensor:
        x, (below, _) = stack.unbind(), _normal(stack, length)
        sums = Accumulator(stack, length)
        sums.rows[0].copy_(F.gelu(x[0]))
        for k, y in enumerate(sums.rows[1:], start=1):
            for j in range(min(k + 1, len(x))):
                add_product(y, x[j], below[k - j])
        return sums.stack()

    def slope(self, stack: Tensor, live: int, length: int) -> tuple[Tensor, int]:
        """`P + x p`."""
        x, (slopes, density) = stack[:live].unbind(), _normal(stack[:live], length)
        for k, slope in enumerate(slopes):
            for j in range(min(k + 1, len(x))):
                add_product(slope, x[j], density[k - j])
        return torch.stack(slopes), length


def _normal(stack: Tensor, length: int) -> tuple[list[Tensor], list[Tensor]]:
    """The coefficients of the normal distribution of a series and of its density."""
    x = stack.unbind()
    below = [0.5 * (1 + torch.erf(x[0] * math.sqrt(0.5)))]
    density = [torch.exp(-0.5 * x[0].square()) * (1 / math.sqrt(2 * math.pi))]
    speed = [torch.zeros_like(x[0])]  # -x x'
    for k in range(1, length):
        places = range(max(0, k + 1 - len(x)), k // 2 + 1)
        pairs = [(x[i], x[k - i], -k / 2 if 2 * i == k else -k) for i in places]
        speed.append(sum_products(pairs) if pairs else speed[0])
        orders = range(1, min(k + 1, len(x)))
        below.append(sum_products([(x[j], density[k - j], j / k) for j in orders]))
        density.append(sum_products([(speed[j], density[k - j], 1 / k) for j in range(1, k + 1)]))
    return below, density


_GELU = _Gelu()
_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772848170429916717, 1.0507009873554804934193349852946


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
decomposed(F.softsign)
jet_rule(F.relu6)(lambda input: F.hardtanh(input, 0.0, 6.0))


@jet_rule(F.hardtanh)
def _hardtanh(input: Jet, min_val: float = -1.0, max_val: float = 1.0) -> Tensor:
    inside = (primal(input) > min_val) & (primal(input) < max_val)
    return torch.where(inside, input, primal(input).clamp(min_val, max_val))


jet_rule(F.hardsigmoid)(lambda input: F.hardtanh(input + 3, 0.0, 6.0) / 6)
jet_rule(F.hardswish)(lambda input: input * F.hardsigmoid(input))
