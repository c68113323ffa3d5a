"""The two algebras of coefficients, Taylor and Laplace, and elementwise functions on them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import Function

from autograd_lib.higher_order.dispatch import Jet, lift, primal
from autograd_lib.higher_order.series import (
    Accumulator,
    Contraction,
    LogSumExp,
    Operation,
    add_product,
    apply,
    correlate,
    orders_of,
    pad,
    product,
    sum_products,
    time_derivative,
)


class Elementary:
    """An elementwise function of one variable: value, derivative, and its series if it has one.

    The derivative is a function of the argument, or of the value if `from_value`. A series maps a
    stack and a length to the stack of the value; without one, the derivative is integrated.
    """

    def __init__(
        self,
        value: Callable[[Tensor], Tensor],
        derivative: Callable[[Tensor], Tensor] | None,
        series: Callable[[Tensor, int], Tensor] | None = None,
        from_value: bool = False,
    ) -> None:
        self.value = value
        self.derivative = derivative
        self.series = series or self.integrate
        self.from_value = from_value

    def integrate(self, stack: Tensor, length: int) -> Tensor:
        """From `k y_k = sum_j j x_j d_(k-j)`, with d the coefficients of the derivative."""
        d, _ = self.slope(stack[: length - 1], len(stack), length - 1)
        speed = time_derivative(stack)
        rest = product(speed, d, length - 1, len(speed), len(d))
        return torch.cat([self.value(stack[0])[None], rest / orders_of(rest)])

    def slope(self, stack: Tensor, live: int, length: int) -> tuple[Tensor, int]:
        """Return the coefficients of the derivative, and how many of them are live."""
        assert self.derivative is not None, "a subclass without a derivative overrides this method"
        return lift(self.derivative(Jet(stack, Taylor(length), live)))

    def second_order(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The value, the derivative and the second derivative."""
        along = Jet(torch.stack([x, torch.ones_like(x)]), Taylor(3))
        y, slope, half = along.algebra.elementary(self, along).stack.unbind()
        return y, slope, 2 * half


class Riccati(Elementary):
    """A function y of x with `y' = (constant + linear y + square y^2) x'`."""

    def __init__(
        self, value: Callable[[Tensor], Tensor], constant: float, linear: float, square: float
    ) -> None:
        super().__init__(value, None, self.recurrence, from_value=True)
        self.constant, self.linear, self.square = constant, linear, square

    def _coefficient(self, y: Sequence[Tensor], k: int) -> Tensor:
        """Return the coefficient of order k of the derivative."""
        if not self.square:
            slope = y[k] if self.linear == 1 else y[k] * self.linear
        else:
            halves = range((k + 1) // 2)
            terms = [(y[i], y[k - i], 2 * self.square) for i in halves]
            terms += [(y[k // 2], y[k // 2], self.square)] if k % 2 == 0 else []
            slope = sum_products(terms)
            if self.linear:
                slope.add_(y[k], alpha=self.linear)
        return slope + self.constant if self.constant and k == 0 else slope

    def recurrence(self, stack: Tensor, length: int) -> Tensor:
        x = stack.unbind()
        sums = Accumulator(stack, length)
        y = sums.rows
        y[0].copy_(self.value(x[0]))
        slopes = []
        for k in range(1, length):
            slopes.append(self._coefficient(y, k - 1))
            for j in range(1, min(k + 1, len(x))):
                add_product(y[k], x[j], slopes[k - j], value=j / k)
        return sums.stack()

    def slope(self, stack: Tensor, live: int, length: int) -> tuple[Tensor, int]:
        if not (self.square or self.constant):
            return (stack if self.linear == 1 else stack * self.linear), live
        rows = stack.unbind()
        return torch.stack([self._coefficient(rows, k) for k in range(len(rows))]), len(rows)

    def second_order(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.value(x)
        slope = self._coefficient([y], 0)
        return y, slope, slope * (self.linear + 2 * self.square * y)


class _ElementaryFunction(Function):
    """Forward: the series of the value. Backward: the product with the series of the derivative."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, function: Elementary, length: int, live: int) -> Tensor:
        if length == 1 or live == 1:
            return pad(function.value(x[0])[None], length)
        return function.series(x[:live], length)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, ctx.function, ctx.length, ctx.live = inputs
        ctx.size = len(x)
        ctx.save_for_backward(output if ctx.function.from_value else x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (saved,) = ctx.saved_tensors
        live = len(saved) if ctx.function.from_value else ctx.live
        d, live = ctx.function.slope(saved, live, ctx.length)
        return correlate(grad, d, live, ctx.size), None, None, None


class Algebra(ABC):
    """How coefficients multiply; every other operation is built on this."""

    def __init__(self) -> None:
        self.recording = torch.is_grad_enabled()
        self.level = torch._C._functorch.maybe_current_level()
        self.forward_mode = torch._C._is_fwd_grad_enabled()  # off inside a Function's forward

    @abstractmethod
    def product(self, a: Tensor, b: Tensor) -> Jet:
        """Multiply two values, at least one of them followed, elementwise."""

    @abstractmethod
    def contract(
        self, operation: Operation, a: Tensor, b: Tensor, addend: Tensor | None = None
    ) -> Jet:
        """Combine two values by a bilinear function and add a third; one of them is followed."""

    @abstractmethod
    def elementary(self, function: Elementary, x: Jet) -> Jet:
        """Apply an elementwise function."""

    @abstractmethod
    def logsumexp(self, x: Jet, dim: int) -> tuple[Jet, Jet]:
        """The log-sum-exp over one dimension, which is kept, and the softmax."""


class Taylor(Algebra):
    """Powers of t below `length`."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def product(self, a: Tensor, b: Tensor) -> Jet:
        ndim = max(a.ndim, b.ndim)
        dtype = torch.result_type(primal(a), primal(b))
        (x, live_x), (y, live_y) = lift(a, ndim), lift(b, ndim)
        z = product(x.to(dtype), y.to(dtype), self.length, live_x, live_y)
        return Jet(z, self, live_x + live_y - 1)

    def contract(
        self, operation: Operation, a: Tensor, b: Tensor, addend: Tensor | None = None
    ) -> Jet:
        (x, live_x), (y, live_y) = lift(a), lift(b)
        c, live_c = (None, 0) if addend is None else lift(addend)
        lives = (live_x, live_y, live_c)
        z = apply(Contraction, x, y, c, operation, self.length, *lives)
        return Jet(z, self, max(live_x + live_y - 1, live_c))

    def elementary(self, function: Elementary, x: Jet) -> Jet:
        return Jet(apply(_ElementaryFunction, x.stack, function, self.length, x.live), self)

    def logsumexp(self, x: Jet, dim: int) -> tuple[Jet, Jet]:
        total, softmax = apply(LogSumExp, x.stack, dim, self.length, x.live)
        return Jet(total, self), Jet(softmax, self)


class Laplace(Algebra):
    """A value, its d first derivatives along directions, and the sum of its second ones."""

    def product(self, a: Tensor, b: Tensor) -> Jet:
        ndim = max(a.ndim, b.ndim)
        return self._bilinear(torch.mul, lift(a, ndim)[0], lift(b, ndim)[0])

    def contract(
        self, operation: Operation, a: Tensor, b: Tensor, addend: Tensor | None = None
    ) -> Jet:
        z = self._bilinear(operation.apply, lift(a)[0], lift(b)[0])
        if addend is None or isinstance(addend, Jet):
            return z if addend is None else cast(Jet, z + addend)
        z.stack[0] += addend
        return z

    def _bilinear(self, f: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Jet:
        if len(b) == 1:
            return Jet(f(a, b[0]), self)

        def by_b(b: Tensor) -> Tensor:
            return f(a[:1], b)[0]

        def both(a: Tensor, b: Tensor) -> Tensor:
            return f(a[None], b)[0]

        if len(a) == 1:
            return Jet(torch.vmap(by_b)(b), self)
        z = f(a, b[0])
        rest = z[1:] + torch.vmap(by_b)(b[1:])
        last = rest[-1:] + 2 * torch.vmap(both)(a[1:-1], b[1:-1]).sum(0, keepdim=True)
        return Jet(torch.cat([z[:1], rest[:-1], last]), self)

    def elementary(self, function: Elementary, x: Jet) -> Jet:
        y, slope, curvature = function.second_order(x.stack[0])
        z = x.stack * slope
        z[0] = y
        z[-1] += curvature * x.stack[1:-1].square().sum(0)
        return Jet(z, self)

    def logsumexp(self, x: Jet, dim: int) -> tuple[Jet, Jet]:
        largest = x.stack[0].detach().amax(dim, keepdim=True)
        powers = torch.exp(x - torch.where(largest.isfinite(), largest, 0))
        total = powers.sum(dim, keepdim=True)
        return torch.log(total) + largest, powers / total  # type: ignore[return-value]
