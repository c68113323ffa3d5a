"""Sums, products, quotients and powers."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet, algebra_of, aligned, lift, primal
from autograd_lib.higher_order.rules.elementary import elementary
from autograd_lib.higher_order.rules.registration import family
from autograd_lib.higher_order.series import power
from autograd_lib.higher_order.taylor import jet_rule


def _add_stacks(x: Tensor, y: Tensor) -> Tensor:
    """The sum of two values, constants among them; the shorter stack ends first."""
    algebra = algebra_of(x, y)
    (a, live_a), (b, live_b) = aligned(x, y)
    if a.shape[0] < b.shape[0]:
        a, b = b, a
    n = b.shape[0]
    total = a[:n] + b
    if n < a.shape[0]:
        total = torch.cat([total, a[n:].expand(-1, *total.shape[1:])])
    return Jet(total, algebra, max(live_a, live_b))


@jet_rule(torch.add)
def _add(x: Any, other: Any, *, alpha: float = 1) -> Tensor:
    other = other if alpha == 1 else alpha * other
    if isinstance(x, Tensor) and isinstance(other, Tensor):
        return _add_stacks(x, other)
    x, other = (x, other) if isinstance(x, Tensor) else (other, x)
    return Jet(
        torch.cat([x.stack[:1] + other, x.stack[1:].to(torch.result_type(x, other))]),
        x.algebra,
        x.live,
    )


@jet_rule(torch.sub, torch.subtract)
def _sub(x: Any, other: Any, *, alpha: float = 1) -> Tensor:
    return _add(x, -alpha * other if alpha != 1 else -other)


jet_rule(torch.rsub, Tensor.__rsub__)(lambda x, other, alpha=1: _sub(other, x, alpha=alpha))


@jet_rule(torch.mul, torch.multiply)
def _mul(x: Any, other: Any) -> Tensor:
    if isinstance(x, Tensor) and isinstance(other, Tensor):
        # A constant without dimensions is a factor of the stack, and keeps its weak dtype.
        return cast(Tensor, algebra_of(x, other).product(x, other))
    x, other = (x, other) if isinstance(x, Tensor) else (other, x)
    return cast(Tensor, x.map(lambda c: c * other))


@jet_rule(torch.div, torch.divide, torch.true_divide, Tensor.__truediv__)
def _div(x: Any, other: Any, *, rounding_mode: str | None = None) -> Tensor:
    if rounding_mode is not None:
        return torch.div(primal(x), primal(other), rounding_mode=rounding_mode)
    if not isinstance(other, Jet):
        stack, _ = lift(x, getattr(other, "ndim", 0))
        # A stack has a dimension more than its value, and so another say in the dtype.
        dtype = torch.result_type(primal(x), other)
        divisor = other.to(dtype) if isinstance(other, Tensor) else other
        return Jet(stack.to(dtype) / divisor, x.algebra, x.live)
    return x * torch.reciprocal(other)


@family
def _modulus(function: Any) -> None:
    @jet_rule(function)
    def rule(x: Any, other: Any) -> Tensor:
        value = function(primal(x), primal(other))
        return x - other * ((primal(x) - value) / primal(other)).round()


_modulus(torch.remainder, Tensor.__mod__, torch.fmod)


jet_rule(torch.addcmul)(lambda x, a, b, *, value=1: x + value * (a * b))
jet_rule(torch.addcdiv)(lambda x, a, b, *, value=1: x + value * (a / b))
jet_rule(torch.lerp)(lambda x, end, weight: x + weight * (end - x))
jet_rule(torch.square)(lambda x: x * x)


@jet_rule(torch.pow, Tensor.__pow__)
def _pow(x: Any, exponent: Any) -> Tensor:
    dtype = torch.result_type(primal(x), primal(exponent))
    if isinstance(exponent, Jet):
        log = x.to(dtype).log() if isinstance(x, Tensor) else math.log(x)
        return torch.exp(exponent.to(dtype) * log)
    x = x.to(dtype)
    if isinstance(exponent, Tensor):
        if not (exponent.is_floating_point() or exponent.is_complex()):
            exponents = exponent.unique().tolist()
            result: Tensor = x ** exponents[0]
            for n in exponents[1:]:
                result = torch.where(exponent == n, x**n, result)
            return result
        if torch.is_grad_enabled() and (
            exponent.requires_grad or torch._C._are_functorch_transforms_active()
        ):
            return torch.exp(exponent * torch.log(x))
        x = x.expand(torch.broadcast_shapes(x.shape, exponent.shape))
        exponent = exponent.to(dtype)
    elif not isinstance(exponent, complex) and exponent == int(exponent):
        return _integer_power(x, int(exponent))
    return elementary(
        x, lambda t: t**exponent, lambda t: exponent * t ** (exponent - 1), power(exponent)
    )


def _integer_power(x: Tensor, n: int) -> Tensor:
    """By squaring, which is right at 0 too."""
    if n < 0:
        return torch.reciprocal(_integer_power(x, -n))
    if n < 2:
        return x * 1 if n else torch.ones_like(x)
    half = _integer_power(x, n // 2)
    return half * half * x if n % 2 else half * half
