"""The two algebras of coefficients, Taylor and Laplace, and elementwise functions on them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from autograd_lib.higher_order.dispatch import Jet, aligned, lift
from autograd_lib.higher_order.series import (
    MULTIPLICATION,
    Accumulator,
    Contraction,
    LogSumExp,
    Operation,
    add_product,
    apply,
    correlate,
    orders_of,
    pad,
    sum_products,
)


class Elementary:
    """An elementwise function of one variable: its value and its derivative.

    The derivative is a function of the argument, or of the value if `from_value`. It is integrated,
    unless `series` maps a stack and a length to the stack of the value.
    """

    def __init__(
        self,
        value: Callable[[Tensor], Tensor],
        derivative: Callable[[Tensor], Tensor],
        series: Callable[[Tensor, int], Tensor] | None = None,
        from_value: bool = False,
    ) -> None:
        self.value = value
        self.derivative = derivative
        self.series = series or self.integrate
        self.from_value = from_value

    def integrate(self, stack: Tensor, length: int) -> Tensor:
        """From `k y_k = sum_j j x_j d_(k-j)`, with d the coefficients of the derivative."""
        d, speed = self.slope(stack[: length - 1], length - 1), stack[1:] * orders_of(stack[1:])
        rest = MULTIPLICATION.forward(d, speed, length - 1)
        return torch.cat([self.value(stack[0])[None], rest / orders_of(rest)])

    def slope(self, stack: Tensor, length: int) -> Tensor:
        """Return the live coefficients of the derivative."""
        d, live = lift(self.derivative(Jet(stack, Taylor(length))))
        return d[:live]

    def second_order(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The value, the derivative and the second derivative."""
        along = Jet(torch.stack([x, torch.ones_like(x)]), Taylor(3))
        y, slope, half = along.algebra.elementary(self, along).stack.unbind()
        return y, slope, 2 * half


ELEMENTARY: dict[Any, Elementary] = {}  # by the function of PyTorch


class Recurrence(Elementary):
    """The first of up to three functions of x whose derivatives are polynomials in them and in x.

    The functions are called y, z and w. A derivative gives the factor of each of its terms, which
    are products of at most two letters: the tangent has `y' = 1 + y^2`, `{"": 1, "yy": 1}`.
    """

    def __init__(self, *functions: tuple[Callable[[Tensor], Tensor], Mapping[str, float]]) -> None:
        value, derivative = functions[0]
        super().__init__(value, value, self.recur, from_value=len(functions) == 1)
        self.functions = functions
        self.terms = derivative
        # The factor of z's or w's only term joins the weights in the sum, which saves a product.
        self.systems = [(derivative, 1.0)]
        for _, terms in functions[1:]:
            scale = next(iter(terms.values())) if len(terms) == 1 else 1.0
            self.systems.append(({term: c / scale for term, c in terms.items()}, scale))

    def recur(self, stack: Tensor, length: int) -> Tensor:
        return self._solve(stack, length, length - 1)[0].stack()

    def slope(self, stack: Tensor, length: int) -> Tensor:
        if self.from_value:
            rows = {"y": stack.unbind()}
            return torch.stack([_coefficient(self.terms, rows, k) for k in range(length)])
        _, slopes, known = self._solve(stack, length, length)
        return torch.stack([*slopes, _coefficient(self.terms, known, length - 1)])

    def second_order(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if not self.from_value:
            return super().second_order(x)
        y = self.value(x)
        slope = _coefficient(self.terms, {"y": [y]}, 0)
        linear, square = (self.terms.get(term, 0.0) for term in ("y", "yy"))
        return y, slope, slope * (linear + 2 * square * y)

    def _solve(
        self, stack: Tensor, length: int, end: int
    ) -> tuple[Accumulator, list[Tensor], dict[str, Sequence[Tensor]]]:
        """Return the first function, its derivative up to the last coefficient, and all letters.

        The other functions are computed only up to the order `end - 1`.
        """
        x = stack.unbind()
        sums = [Accumulator(stack, length) for _ in self.functions]
        known = dict(zip("xyzw", [x, *[y.rows for y in sums]], strict=False))
        slopes: list[list[Tensor]] = [[] for _ in self.functions]
        for y, (value, _) in zip(sums, self.functions, strict=True):
            y.rows[0].copy_(value(x[0]))
        systems = list(zip(sums, slopes, self.systems, strict=True))
        for k in range(1, length):
            for y, slope, (terms, scale) in systems if k < end else systems[:1]:
                slope.append(_coefficient(terms, known, k - 1))
                for j in range(1, min(k + 1, len(x))):
                    add_product(y.rows[k], x[j], slope[k - j], value=scale * j / k)
        return sums[0], slopes[0], known


def _coefficient(
    terms: Mapping[str, float], known: Mapping[str, Sequence[Tensor]], k: int
) -> Tensor:
    """Return the coefficient of order k of a sum of terms."""
    products: list[tuple[Tensor, Tensor, float]] = []
    rest: list[Any] = []
    for letters, factor in terms.items():
        if len(letters) == 2:
            a, b = known[letters[0]], known[letters[1]]
            if a is b:
                products += [(a[i], a[k - i], 2 * factor) for i in range((k + 1) // 2)]
                products += [(a[k // 2], a[k // 2], factor)] if k % 2 == 0 else []
            else:
                products += [(a[i], b[k - i], factor) for i in range(min(k + 1, len(a)))]
        elif letters:
            rest.append(known[letters][k] if factor == 1 else known[letters][k] * factor)
        elif k == 0:
            rest.append(factor)
    first, *others = [sum_products(products), *rest] if products else rest
    return sum(others, first) if others else first


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
        x, ctx.function, ctx.length, live = inputs
        ctx.size = len(x)
        ctx.live = ctx.length if ctx.function.from_value else live
        ctx.save_for_backward(output if ctx.function.from_value else x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (saved,) = ctx.saved_tensors
        d = ctx.function.slope(saved[: ctx.live], ctx.length)
        return correlate(grad, d, ctx.size), None, None, None


class _Algebra:
    def __init__(self) -> None:
        self.recording = torch.is_grad_enabled()
        self.level = torch._C._functorch.maybe_current_level()
        self.forward_mode = torch._C._is_fwd_grad_enabled()  # off inside a Function's forward


class Taylor(_Algebra):
    """Powers of t below `length`."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def product(self, a: Tensor, b: Tensor) -> Jet:
        """Multiply two values, at least one of them followed, elementwise."""
        return self._contract(MULTIPLICATION, *sorted(aligned(a, b), key=lambda lifted: -lifted[1]))

    def contract(self, operation: Operation, a: Tensor, b: Tensor) -> Jet:
        """Combine two values by a bilinear function; at least one of them is followed."""
        return self._contract(operation, lift(a), lift(b))

    def _contract(self, operation: Operation, a: tuple[Tensor, int], b: tuple[Tensor, int]) -> Jet:
        (x, live_x), (y, live_y) = a, b
        z = apply(Contraction, x, y, operation, self.length, live_x, live_y)
        return Jet(z, self, live_x + live_y - 1)

    def elementary(self, function: Elementary, x: Jet) -> Jet:
        return Jet(apply(_ElementaryFunction, x.stack, function, self.length, x.live), self)

    def logsumexp(self, x: Jet, dim: int) -> tuple[Jet, Jet]:
        """The log-sum-exp over one dimension, which is kept, and the softmax."""
        total, softmax = apply(LogSumExp, x.stack, dim, self.length, x.live)
        return Jet(total, self), Jet(softmax, self)


class Laplace(_Algebra):
    """A value, its d first derivatives along directions, and the sum of its second ones."""

    length = 3  # orders, not coefficients

    def product(self, a: Tensor, b: Tensor) -> Jet:
        return self._bilinear(torch.mul, *[stack for stack, _ in aligned(a, b)])

    def contract(self, operation: Operation, a: Tensor, b: Tensor) -> Jet:
        return self._bilinear(operation.apply, lift(a)[0], lift(b)[0])

    def _bilinear(self, f: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Jet:
        def each(a: Tensor, b: Tensor) -> Tensor:
            return f(a[None], b)[0]

        if len(b) == 1:
            return Jet(f(a, b[0]), self)
        by_b = torch.vmap(each, (None, 0))
        if len(a) == 1:
            return Jet(by_b(a[0], b), self)
        z = f(a, b[0])
        rest = z[1:] + by_b(a[0], b[1:])
        last = rest[-1:] + 2 * torch.vmap(each)(a[1:-1], b[1:-1]).sum(0, keepdim=True)
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


Algebra = Taylor | Laplace
