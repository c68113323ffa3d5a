"""Elementwise functions of one variable, each by its derivative or its differential equation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.higher_order.algebra import ELEMENTARY, Elementary, Recurrence
from autograd_lib.higher_order.dispatch import Jet, algebra_of, jets, primal
from autograd_lib.higher_order.series import power
from autograd_lib.higher_order.taylor import jet_rule


def elementary(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return cast(Tensor, algebra_of((x,)).elementary(Elementary(*args, **kwargs), cast(Jet, x)))


def _elementwise(elementary: Elementary, *functions: Any) -> None:
    ELEMENTARY.update(dict.fromkeys(functions, elementary))

    @jet_rule(*functions)
    def rule(x: Jet) -> Tensor:
        return x.algebra.elementary(elementary, x)


def _smooth(
    *functions: Any,
    slope: Callable[[Tensor], Tensor],
    series: Any = None,
    from_value: bool = False,
) -> None:
    """An elementwise function without options, by its derivative."""
    _elementwise(Elementary(functions[0], slope, series, from_value), *functions)


def _gauss(x: Tensor) -> Tensor:
    return torch.exp(-x.square()) * (2 / math.sqrt(math.pi))


_elementwise(Recurrence((torch.exp, {"y": 1})), torch.exp)
_elementwise(Recurrence((torch.expm1, {"": 1, "y": 1})), torch.expm1)
_elementwise(Recurrence((torch.tanh, {"": 1, "yy": -1})), torch.tanh, F.tanh)
_elementwise(
    Recurrence((torch.sigmoid, {"y": 1, "yy": -1})), torch.sigmoid, F.sigmoid, torch.special.expit
)
_elementwise(Recurrence((torch.tan, {"": 1, "yy": 1})), torch.tan)
_elementwise(Recurrence((torch.reciprocal, {"yy": -1})), torch.reciprocal)
_elementwise(Recurrence((torch.sin, {"z": 1}), (torch.cos, {"y": -1})), torch.sin)
_elementwise(Recurrence((torch.cos, {"z": 1}), (lambda x: -x.sin(), {"y": -1})), torch.cos)
_elementwise(Recurrence((torch.sinh, {"z": 1}), (torch.cosh, {"y": 1})), torch.sinh)
_elementwise(Recurrence((torch.cosh, {"z": 1}), (torch.sinh, {"y": 1})), torch.cosh)
_smooth(torch.sqrt, slope=lambda y: 0.5 * torch.reciprocal(y), series=power(0.5), from_value=True)
_smooth(torch.rsqrt, slope=lambda y: -0.5 * y**3, series=power(-0.5), from_value=True)
_smooth(torch.log, slope=torch.reciprocal)
_smooth(torch.log2, slope=lambda x: torch.reciprocal(x * math.log(2)))
_smooth(torch.log10, slope=lambda x: torch.reciprocal(x * math.log(10)))
_smooth(torch.log1p, slope=lambda x: torch.reciprocal(x + 1))
_smooth(torch.atan, torch.arctan, slope=lambda x: torch.reciprocal(x.square() + 1))
_smooth(torch.asin, torch.arcsin, slope=lambda x: torch.rsqrt(1 - x.square()))
_smooth(torch.acos, torch.arccos, slope=lambda x: -torch.rsqrt(1 - x.square()))
_smooth(torch.asinh, torch.arcsinh, slope=lambda x: torch.rsqrt(x.square() + 1))
_smooth(torch.acosh, torch.arccosh, slope=lambda x: torch.rsqrt(x - 1) * torch.rsqrt(x + 1))
_smooth(torch.atanh, torch.arctanh, slope=lambda x: torch.reciprocal(1 - x.square()))
_smooth(torch.erf, torch.special.erf, slope=_gauss)
_smooth(torch.erfc, torch.special.erfc, slope=lambda x: -_gauss(x))
_smooth(
    torch.special.erfcx,
    slope=lambda x: 2 * x * torch.special.erfcx(x) - 2 / math.sqrt(math.pi),
)
_smooth(
    torch.erfinv,
    torch.special.erfinv,
    slope=lambda x: (0.5 * math.sqrt(math.pi)) * torch.exp(torch.erfinv(x).square()),
)
_smooth(torch.lgamma, torch.special.gammaln, slope=torch.digamma)
_smooth(torch.digamma, torch.special.digamma, slope=lambda x: torch.polygamma(1, x))
_smooth(F.logsigmoid, slope=lambda x: torch.sigmoid(-x))


@jet_rule(torch.polygamma, torch.special.polygamma)
def _polygamma(n: Any, x: Any) -> Tensor:
    n, x = (n, x) if isinstance(n, int) else (x, n)  # the method has it the other way round
    return elementary(x, lambda t: torch.polygamma(n, t), lambda t: torch.polygamma(n + 1, t))


jet_rule(torch.exp2)(lambda x: torch.exp(x * math.log(2)))


@jet_rule(torch.logit)
def _logit(x: Tensor, eps: float | None = None) -> Tensor:
    x = x if eps is None else x.clamp(eps, 1 - eps)
    return torch.log(x) - torch.log1p(-x)


@jet_rule(torch.xlogy, torch.special.xlogy)
def _xlogy(x: Any, other: Any) -> Tensor:
    log = other.log() if isinstance(other, Tensor) else math.log(other)
    zero = torch.as_tensor(primal(x) == 0, device=jets((x, other))[0].device)
    return torch.where(zero, 0.0, x * log)


@jet_rule(torch.logaddexp)
def _logaddexp(x: Tensor, other: Tensor) -> Tensor:
    return torch.logsumexp(torch.stack(list(torch.broadcast_tensors(x, other))), 0)


jet_rule(torch.logaddexp2)(
    lambda x, other: torch.logaddexp(x * math.log(2), other * math.log(2)) / math.log(2)
)
