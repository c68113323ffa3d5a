"""Taylor mode: all derivatives along a direction in one pass, at a cost polynomial in the order.

A value that depends on $t$ is followed as a `Jet`, the stack of its Taylor coefficients in $t$.
Every PyTorch function that meets one is looked up in a table of rules (`taylor_rules`, and
`taylor_layers` for layers); a function without a rule raises, whichever way it is reached. Two
rings of coefficients share the rules: the powers of one direction up to an order, and, for the
Laplacian, the first orders of many directions with the sum of their second orders.

The rules work on whole stacks: a linear function costs one call for all coefficients. What is not
linear comes down to a product, a contraction and an elementary function (`_series`).
"""

from __future__ import annotations

import functools
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.overrides import resolve_name

from autograd_lib.higher_order.series import (
    Contraction,
    LogSumExp,
    Operation,
    Room,
    add_product,
    apply,
    correlate,
    orders_of,
    pad,
    product,
    speed_of,
    sum_products,
)

__all__ = ["jet", "jet_rule"]

Rule = TypeVar("Rule", bound=Callable[..., Any])
Inputs = Tensor | Mapping[str, Tensor]

RULES: dict[Any, Callable[..., Any]] = {}


def jet_rule(*functions: Callable[..., Any], derivative: bool = False) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule by which `jet` follows PyTorch functions.

    The rule is called in their place, with the same arguments, whenever one of these is a value
    that `jet` follows. It is ordinary PyTorch code over functions that have rules.

    Args:
        functions: functions of PyTorch, such as `torch.erfc` (the method `Tensor.erfc` of the same
            name goes with it), or subclasses of `torch.autograd.Function`.
        derivative: whether the rule returns the derivative of an elementwise function of one
            variable, which `jet` integrates, and not its value. It may call that function again.

    Returns:
        A decorator that leaves the rule as it is.

    Raises:
        TypeError: if one of `functions` cannot be called, or there is none.

    Example:
        >>> @jet_rule(torch.special.entr)
        ... def entropy(x):
        ...     return x * torch.log(1 / x)
        >>> jet(torch.special.entr, torch.tensor(1.0), torch.tensor(1.0), 2)
        (tensor(0.), tensor(-1.), tensor(-1.))
    """
    for function in functions or (None,):
        if not callable(function):
            raise TypeError(
                f"jet_rule: expected functions, as in @jet_rule(torch.erfc), got {function!r}"
            )

    def register(rule: Rule) -> Rule:
        for function in functions:
            whole = _integral(function, rule) if derivative else rule
            if isinstance(function, type) and issubclass(function, Function):
                _divert(function, whole)
                continue
            RULES[function] = whole
            name = getattr(function, "__name__", "")
            if function is getattr(torch, name, None):  # and the same function elsewhere
                for home in (Tensor, torch.special):
                    if hasattr(home, name):
                        RULES[getattr(home, name)] = whole
        return rule

    return register


def _integral(function: Any, slope: Callable[[Tensor], Tensor]) -> Callable[[Jet], Jet]:
    elementary = Elementary(getattr(function, "apply", function), slope)
    return lambda x: x.ring.elementary(elementary, x)


def _divert(function: type[Function], rule: Callable[..., Any]) -> None:
    """Let `function.apply` take the rule where an argument is followed."""
    inherited = function.apply.__func__  # type: ignore[attr-defined]

    @functools.wraps(inherited)
    def diverted(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if cls is function and any(isinstance(arg, Jet) for arg in args):
            return rule(*args, **kwargs)
        return inherited(cls, *args, **kwargs)

    function.apply = classmethod(diverted)  # type: ignore[assignment, method-assign]


def _no_rule(name: str, in_place: bool = False) -> NotImplementedError:
    name = name.removesuffix(".__get__")
    last = name.rpartition(".")[2]
    if in_place or last == "__setitem__" or (last.endswith("_") and not last.endswith("__")):
        return NotImplementedError(
            f"jet: {name} modifies a value that jet follows in place, which has no rule; use the "
            "function that returns a new tensor"
        )
    if last in ("grad", "backward"):
        return NotImplementedError(
            f"jet: {name} within f has no rule; take a higher order, or put the gradient around jet"
        )
    return NotImplementedError(
        f"jet: {name} has no rule; register one with @jet_rule, or rewrite it by other functions"
    )


class Jet(Tensor):
    """A tensor that depends on the direction: the stack of its coefficients, shown as their first.

    `stack` has the shape `(n, *shape)`; coefficients beyond the n-th are zero. Those from `live` on
    are zero too, and there because a gradient with respect to them is wanted.
    """

    stack: Tensor
    ring: Ring
    live: int

    @staticmethod
    def __new__(cls, stack: Tensor, ring: Ring, live: int | None = None) -> Jet:
        self = Tensor._make_wrapper_subclass(
            cls, stack.shape[1:], dtype=stack.dtype, device=stack.device
        )
        self.stack = stack
        self.ring = ring
        self.live = len(stack) if live is None else min(live, len(stack))
        return self

    # Asked for all the time, so not by way of __torch_function__.
    shape = property(lambda self: self.stack.shape[1:])
    ndim = property(lambda self: self.stack.ndim - 1)
    dtype = property(lambda self: self.stack.dtype)
    device = property(lambda self: self.stack.device)
    # The graph is that of the stack, for who hooks it.
    requires_grad = property(lambda self: self.stack.requires_grad)
    grad_fn = property(lambda self: self.stack.grad_fn)

    def dim(self) -> int:
        return self.stack.ndim - 1

    def map(self, f: Callable[[Tensor], Tensor]) -> Jet:
        """Apply a linear function to the stack; it must keep the first dimension."""
        return Jet(f(self.stack), self.ring, self.live)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        rule = RULES.get(func)
        in_place = kwargs.get("out") is not None or kwargs.get("inplace")
        if rule is None or in_place:
            name = resolve_name(func) or getattr(func, "__name__", str(func))
            raise _no_rule(name, bool(in_place))
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        ring = ring_of(args, kwargs)
        if ring.level != torch._C._functorch.maybe_current_level():
            raise NotImplementedError(
                f"jet: {resolve_name(func)} met a value that jet follows inside a transform of "
                "torch.func, which would take it for a constant; put the transform around jet"
            )
        if ring.forward_mode and not torch._C._is_fwd_grad_enabled():
            raise NotImplementedError(
                f"jet: the forward of the torch.autograd.Function {_running_function()} met a "
                "value that jet follows; give it a rule with @jet_rule, or remove the hook it is of"
            )
        if ring.recording and not torch.is_grad_enabled():
            args, kwargs = primal(args), primal(kwargs)  # what no_grad computes is constant
            return func(*args, **kwargs)
        return rule(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        # Reached past the rules only: inside torch.func, a compiled or a scripted function.
        raise _no_rule(f"{func}, reached inside a transform or a compiled function,")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Jet({self.stack!r})"


def _running_function() -> str:
    """The Function whose forward called."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        cls = frame.f_locals.get("cls")
        if isinstance(cls, type) and issubclass(cls, Function):
            return cls.__name__
    return "at work"


def jets(values: Any) -> list[Jet]:
    """The followed values among arguments."""
    found: list[Jet] = []
    for value in values.values() if isinstance(values, dict) else values:
        if type(value) is Jet:
            found.append(value)
        elif isinstance(value, tuple | list | dict):
            found += jets(value)
    return found


def primal(values: Any) -> Any:
    """The arguments with every followed value replaced by its value at t = 0."""
    if isinstance(values, Jet):
        return values.stack[0]
    if isinstance(values, dict):
        return {key: primal(value) for key, value in values.items()}
    if isinstance(values, tuple | list):
        return [primal(value) for value in values] if jets(values) else values
    return values


def ring_of(*values: Any) -> Ring:
    """The ring of the followed values among arguments, which all must share."""
    first, *others = jets(values)
    if any(other.ring is not first.ring for other in others):
        raise NotImplementedError(
            "jet: values of two calls of jet or laplacian met; they cannot be nested: take a "
            "higher order, or torch.func.grad around jet"
        )
    return first.ring


# ------------------------------------------------------------------ rings of coefficients


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
        speed = speed_of(stack)
        rest = product(speed, d, length - 1, len(speed), len(d))
        return torch.cat([self.value(stack[0])[None], rest / orders_of(rest)])

    def slope(self, stack: Tensor, live: int, length: int) -> tuple[Tensor, int]:
        """The coefficients of the derivative, and how many of them live."""
        assert self.derivative is not None, "where there is none, this method is another"
        return lift(self.derivative(Jet(stack, Taylor(length), live)))

    def second_order(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The value, the derivative and the second derivative."""
        along = Jet(torch.stack([x, torch.ones_like(x)]), Taylor(3))
        y, slope, half = along.ring.elementary(self, along).stack.unbind()
        return y, slope, 2 * half


class Riccati(Elementary):
    """A function y of x with `y' = (constant + linear y + square y^2) x'`."""

    def __init__(
        self, value: Callable[[Tensor], Tensor], constant: float, linear: float, square: float
    ) -> None:
        super().__init__(value, None, self.recurrence, from_value=True)
        self.constant, self.linear, self.square = constant, linear, square

    def _coefficient(self, y: Sequence[Tensor], k: int) -> Tensor:
        """That of order k of the derivative."""
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
        room = Room(stack, length)
        y = room.rows
        y[0].copy_(self.value(x[0]))
        slopes = []
        for k in range(1, length):
            slopes.append(self._coefficient(y, k - 1))
            for j in range(1, min(k + 1, len(x))):
                add_product(y[k], x[j], slopes[k - j], value=j / k)
        return room.stack()

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
    """The series forward; backward the product with the derivative, as for a single number."""

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


class Ring(ABC):
    """How coefficients multiply: everything else follows from it."""

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


class Taylor(Ring):
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


class Laplace(Ring):
    """A value, its derivatives along d directions, and the sum of its second ones along each."""

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


def lift(x: Tensor, ndim: int | None = None) -> tuple[Tensor, int]:
    """The stack of a value, constants too, with as many dimensions as asked for; what is live."""
    stack, live = (x.stack, x.live) if isinstance(x, Jet) else (x[None], 1)
    if ndim is not None and ndim > x.ndim:
        stack = stack.reshape(len(stack), *[1] * (ndim - x.ndim), *x.shape)
    return stack, live


# ------------------------------------------------------------------ the way in


def check_uncompiled(operation: str) -> None:
    """Refuse to run under torch.compile, which does not see how a value is followed."""
    # Dynamo leaves code that raises while it is traced to Python, where its callback still stands
    # and would compile the functions that are called.
    if torch.compiler.is_compiling() or torch._C._dynamo.eval_frame.get_eval_frame_callback():
        raise NotImplementedError(
            f"{operation}: expected to be called outside of torch.compile, which in PyTorch 2.13 "
            "would return wrong numbers; trace the function first: "
            "torch.compile(make_fx(function)(x)), with make_fx of "
            "torch.fx.experimental.proxy_tensor"
        )


def follow(operation: str, x: Inputs, v: Inputs, make: Callable[[Tensor, Tensor], Any]) -> Any:
    """Pair every tensor of `x` with that of `v`, once both are checked."""
    if isinstance(x, Mapping) or isinstance(v, Mapping):
        if not (isinstance(x, Mapping) and isinstance(v, Mapping)) or x.keys() != v.keys():
            names = [sorted(side) if isinstance(side, Mapping) else "a tensor" for side in (x, v)]
            raise ValueError(
                f"{operation}: expected v to have exactly the names of x, got {names[1]} "
                f"for {names[0]}"
            )
        return {name: follow(f"{operation}, {name!r}", x[name], v[name], make) for name in x}
    for name, side in (("x", x), ("v", v)):
        if not isinstance(side, Tensor) or not (side.is_floating_point() or side.is_complex()):
            got = side.dtype if isinstance(side, Tensor) else type(side).__name__
            raise TypeError(
                f"{operation}: expected {name} to be a floating-point or complex tensor, or a "
                f"dict of them, got {got}; convert it first, as in {name}.float()"
            )
        if isinstance(side, Jet):
            raise NotImplementedError(
                f"{operation}: {name} is followed by another call already; calls cannot be nested: "
                "take a higher order, or torch.func.grad around jet"
            )
    if (x.shape, x.dtype, x.device) != (v.shape, v.dtype, v.device):
        raise ValueError(
            f"{operation}: expected v like x, {tuple(x.shape)} {x.dtype} on {x.device}, "
            f"got {tuple(v.shape)} {v.dtype} on {v.device}"
        )
    return make(x, v)


def derivative(coefficient: Tensor, k: int) -> Tensor:
    """The derivative of order k, by which the k-th coefficient falls short by k!."""
    if k < 2:
        return coefficient
    dtype = coefficient.dtype
    whole = math.factorial(k)
    wide = coefficient
    if whole > torch.finfo(dtype).max:
        wide = coefficient.to(torch.promote_types(dtype, torch.float64))
    for j in range(171, k + 1):  # 170! is the last in float64
        wide, whole = wide * j, whole // j
    return (wide * float(whole)).to(dtype)


def check_tensor(operation: str, y: object) -> Tensor:
    if not isinstance(y, Tensor):
        raise TypeError(f"{operation}: expected f to return one tensor, got {type(y).__name__}")
    return y


def jet(f: Callable[..., Tensor], x: Inputs, v: Inputs, order: int) -> tuple[Tensor, ...]:
    r"""Return $f(x)$ and its derivatives along $v$ up to an order, in one pass.

    $\big(f(x),\ Df(x)[v],\ \dots,\ D^{K} f(x)[v, \dots, v]\big)$ by Taylor mode (Griewank &
    Walther 2008, "Evaluating Derivatives", chapter 13): the coefficients of $f(x + tv)$ in $t$ are
    pushed through the operations of `f`, each by its own recurrence. The cost grows as $K$ through
    linear functions with constant weights and at most as $K^2$ through others; nesting
    `torch.func.jvp` or `grad` doubles it, at least, with each order. To compile it, trace it first
    by `make_fx` of `torch.fx.experimental.proxy_tensor`:
    `torch.compile(make_fx(lambda x, v: jet(f, x, v, order))(x, v))`.

    Args:
        f: a function of one tensor, or of one dict of tensors, that returns a tensor of any shape.
            Ordinary PyTorch code; modules through `torch.func.functional_call`. It may close over
            tensors. What it computes under `torch.no_grad` or detaches is constant, as is the
            padding row of an embedding. A compiled module is passed uncompiled (`_orig_mod`).
        x: where to differentiate: a floating-point or complex tensor or a dict of them.
        v: the direction, like `x`.
        order: the highest derivative K, at least 0.

    Returns:
        K + 1 tensors, each like `f(x)`: derivatives, not Taylor coefficients. They are
        differentiable by `backward()` with respect to `x`, `v` and what `f` closes over, and
        `torch.func.vmap` may be taken over `x` and `v`.

    Raises:
        NotImplementedError: if `f` uses an operation that has no rule (`jet_rule` adds one),
            modifies a value in place, or calls `jet` in turn; if `jet` is called under
            `torch.compile`.
        TypeError: if `x` or `v` is not floating point or complex, or `f` returns no tensor.
        ValueError: if `v` is not like `x`, or `order` is negative.

    Example:
        >>> x, v = torch.tensor(1.0), torch.tensor(2.0)
        >>> jet(lambda x: x**3, x, v, 4)  # (2d/dx)^k of x^3
        (tensor(1.), tensor(6.), tensor(24.), tensor(48.), tensor(0.))
    """
    check_uncompiled("jet")
    if not isinstance(order, int) or order < 0:
        raise ValueError(f"jet: expected an order of 0 or more, got {order!r}")
    ring = Taylor(order + 1)
    inputs = follow("jet", x, v, lambda x, v: Jet(torch.stack([x, v])[: order + 1], ring))
    stack, _ = lift(check_tensor("jet", f(inputs)))
    derivatives = [derivative(c, k) for k, c in enumerate(stack)]
    zeros = [torch.zeros_like(stack[0])] * (order + 1 - len(stack))
    return (*derivatives, *zeros)
