"""Arithmetic on stacks of Taylor coefficients, `(n, *shape)`: products, contractions, recurrences.

Everything that is not linear is built from these few functions. Each has its own backward: the
adjoint of a product of series is a product with the orders reversed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function


def apply(function: type[Function], *args: Any) -> Any:
    """Apply a Function of this module with little overhead.

    Where no gradient is recorded, only its forward runs. Outside of torch.func the method of C++
    is called, without the binding of arguments that `Function.apply` does before it, and that
    takes longer than the function itself on small tensors.
    """
    recording = torch.is_grad_enabled()
    if recording:
        if torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        if any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return super(Function, function).apply(*args)  # type: ignore[misc]
    torch._C._set_grad_enabled(False)  # torch.no_grad takes longer than a small product
    try:
        return function.forward(*args)
    finally:
        torch._C._set_grad_enabled(recording)


def orders_of(stack: Tensor) -> Tensor:
    """The numbers 1, 2, ... along the first dimension."""
    orders = torch.arange(1, len(stack) + 1, dtype=stack.real.dtype, device=stack.device)
    return orders.reshape(-1, *[1] * (stack.ndim - 1))


class Accumulator:
    """Zeros in which coefficients are summed.

    In eager mode they are the rows of one stack, so that no copy is needed at the end. A compiler
    that records every operation would copy the whole stack for each written row, and autograd
    refuses rows that are written to: there each row is a tensor of its own.
    """

    def __init__(self, like: Tensor, length: int) -> None:
        shape = like.shape[1:]
        self._stack: Tensor | None = None
        if torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack():
            self.rows = [like.new_zeros(shape) for _ in range(length)]
        else:
            self._stack = like.new_zeros(length, *shape)
            self.rows = list(self._stack.unbind())

    def stack(self) -> Tensor:
        return torch.stack(self.rows) if self._stack is None else self._stack


def add_product(z: Tensor, a: Tensor, b: Tensor, value: float = 1) -> None:
    """Add `value a b` to `z` in place."""
    if torch._C._are_functorch_transforms_active():  # vmap has no rule for addcmul_
        z.add_(a * b, alpha=value)
    else:
        z.addcmul_(a, b, value=value)


def sum_products(terms: Sequence[tuple[Tensor, Tensor, float]]) -> Tensor:
    """The sum of `value a b` over terms (a, b, value)."""
    (a, b, value), *rest = terms
    z = a * b if value == 1 else (a * b).mul_(value)
    for a, b, value in rest:
        add_product(z, a, b, value)
    return z


def pad(stack: Tensor, length: int) -> Tensor:
    missing = length - stack.shape[0]  # len is slower
    return torch.cat([stack, stack.new_zeros(missing, *stack.shape[1:])]) if missing else stack


# ------------------------------------------------------------------ contraction


class Operation:
    """A bilinear function of two stacks of coefficients, and its adjoint in each.

    A subclass defines the function of one stack and one coefficient, and both its adjoints.
    """

    def apply(self, a: Tensor, b: Tensor) -> Tensor:
        """Map `(n, *a)` and `(*b)` to `(n, *z)`."""
        raise NotImplementedError

    def apply_left(self, grad: Tensor, b: Tensor, a: Tensor) -> Tensor:
        """Map `(n, *z)` and `(*b)` to the gradient `(n, *a)`; of `a` the shape is used."""
        raise NotImplementedError

    def apply_right(self, grad: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Map `(n, *z)` and `(n, *a)` to the gradient `(*b)`, summed over n."""
        raise NotImplementedError

    def add_to(self, z: Tensor, a: Tensor, b: Tensor) -> None:
        """Add `apply(a, b)` to `z` in place."""
        z += self.apply(a, b)

    def forward(self, a: Tensor, b: Tensor, size: int) -> Tensor:
        """`z_k = sum_j apply(a_(k-j), b_j)` for k below size, which is at least `len(a)`."""
        z = pad(self.apply(a, b[0]), size)
        for j in range(1, min(len(b), size)):
            n = min(len(a), size - j)
            self.add_to(z[j : j + n], a[:n], b[j])
        return z

    def left(self, grad: Tensor, b: Tensor, a: Tensor) -> Tensor:
        """`a_i = sum_j apply_left(grad_(i+j), b_j)`, for every coefficient of `a`."""
        grad_a = self.apply_left(grad[: len(a)], b[0], a)
        for j in range(1, min(len(b), len(grad))):
            n = min(len(a), len(grad) - j)
            grad_a[:n] += self.apply_left(grad[j : j + n], b[j], a)
        return grad_a

    def right(self, grad: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """`b_j = sum_i apply_right(grad_(i+j), a_i)`, for every coefficient of `b`."""
        lengths = [min(len(a), len(grad) - j) for j in range(len(b))]
        return torch.stack(
            [self.apply_right(grad[j : j + n], a[:n], b[j]) for j, n in enumerate(lengths)]
        )


def correlate(grad: Tensor, d: Tensor, length: int) -> Tensor:
    """The adjoint of the product with d: `x_i = sum_j grad_(i+j) conj(d_j)` for i below length."""
    d = d.conj()
    x = grad[:length] * d[0]
    for j in range(1, min(len(d), len(grad))):
        n = min(length, len(grad) - j)
        add_product(x[:n], grad[j : j + n], d[j])
    return x


class _Multiplication(Operation):
    """The elementwise product of two stacks with the same number of dimensions."""

    def apply(self, a: Tensor, b: Tensor) -> Tensor:
        return a * b

    def add_to(self, z: Tensor, a: Tensor, b: Tensor) -> None:
        add_product(z, a, b)

    def left(self, grad: Tensor, b: Tensor, a: Tensor) -> Tensor:
        return correlate(grad, b, len(a)).sum_to_size(a.shape)

    def right(self, grad: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return self.left(grad, a, b)


MULTIPLICATION = _Multiplication()


class Contraction(Function):
    """`z_k = sum_j operation(a_(k-j), b_j)`: one call for all k and each live b_j."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, operation: Operation, length: int, live_a: int, live_b: int
    ) -> Tensor:
        size = min(a.shape[0] + b.shape[0] - 1, length)
        return operation.forward(a[:live_a], b[:live_b], size)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, ctx.operation, _, ctx.live_a, ctx.live_b = inputs
        ctx.save_for_backward(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = ctx.operation.left(grad, b[: ctx.live_b], a)
        if ctx.needs_input_grad[1]:
            grad_b = ctx.operation.right(grad, a[: ctx.live_a], b)
        return grad_a, grad_b, None, None, None, None


# ------------------------------------------------------------------ recurrences


class LogSumExp(Function):
    """With s the softmax and l the result: `l' = <s, x'>` and `s' = s (x' - l')`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int, length: int, live: int) -> tuple[Tensor, Tensor]:
        sums = Accumulator(x, length)
        s = sums.rows
        s[0].copy_(torch.softmax(x[0], dim))
        totals = [torch.logsumexp(x[0], dim, keepdim=True)]
        c = [s[0]]  # the coefficients of x - l, from the first order on
        for k in range(1, length):
            for j in range(1, k):
                add_product(s[k], s[k - j], c[j], value=j / k)
            speed = s[k] if k >= live else torch.addcmul(s[k], s[0], x[k])
            totals.append(speed.sum(dim, keepdim=True))
            c.append(-totals[k] if k >= live else x[k] - totals[k])
            add_product(s[k], s[0], c[k])
        return torch.stack(totals), sums.stack()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, ctx.dim, _, _ = inputs
        ctx.size = len(x)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(output[1])

    @staticmethod
    def backward(
        ctx: Any, grad_total: Tensor | None, grad_s: Tensor | None
    ) -> tuple[Tensor | None, None, None, None]:
        (s,) = ctx.saved_tensors
        grad = grad_total
        if grad_s is not None:
            mean = correlate(grad_s, s, len(s)).sum(ctx.dim, keepdim=True)
            grad = grad_s - mean if grad is None else grad_s - mean + grad
        if grad is None:
            return None, None, None, None
        return correlate(grad, s, ctx.size), None, None, None


def power(exponent: Any) -> Callable[[Tensor, int], Tensor]:
    """The series of `y = x^a`, from `x y' = a y x'`."""

    def series(stack: Tensor, length: int) -> Tensor:
        x = (stack / stack[0]).unbind()
        sums = Accumulator(stack, length)
        y = sums.rows
        y[0].copy_(stack[0] ** exponent)
        for k in range(1, length):
            for j in range(1, min(k + 1, len(x))):
                weight = (exponent + 1) * (j / k) - 1
                if isinstance(weight, Tensor):
                    add_product(y[k], x[j] * weight, y[k - j])
                else:
                    add_product(y[k], x[j], y[k - j], value=weight)
        return sums.stack()

    return series


def derivative(coefficient: Tensor, k: int) -> Tensor:
    """Return the derivative of order k, which is k! times the k-th coefficient."""
    if k < 2:
        return coefficient
    dtype = coefficient.dtype
    whole = math.factorial(k)
    if whole <= torch.finfo(dtype).max:
        return coefficient * float(whole)
    wide = coefficient.to(torch.promote_types(dtype, torch.float64))
    for j in range(171, k + 1):  # 170! is the last in float64
        wide, whole = wide * j, whole // j
    return (wide * float(whole)).to(dtype)
