"""Taylor mode: all derivatives along a direction in one pass, at a cost polynomial in the order.

A value that depends on $t$ is followed as a `Jet`, the stack of its Taylor coefficients in $t$.
Every PyTorch function that meets one is looked up in a table of rules (`taylor_rules`); a function
without a rule raises, whichever way it is reached. Two rings of coefficients share the rules: the
powers of one direction up to an order, and, for the Laplacian, the first orders of many directions
with the sum of their second orders.

The rules work on whole stacks: a linear function costs one call for all coefficients. What is not
linear consists of the three functions at the heart of this module, each with a backward of its own
that is again arithmetic on stacks: a product, a contraction, an elementary function.
"""

from __future__ import annotations

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.overrides import resolve_name

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
        TypeError: if one of `functions` cannot be called.

    Example:
        >>> @jet_rule(torch.logit)
        ... def logit(x, eps=None):
        ...     x = x if eps is None else x.clamp(eps, 1 - eps)
        ...     return torch.log(x) - torch.log1p(-x)
        >>> jet(torch.logit, torch.tensor(0.5), torch.tensor(1.0), 3)
        (tensor(0.), tensor(4.), tensor(0.), tensor(32.))
    """
    for function in functions:
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
    apply = function.apply

    @functools.wraps(apply)
    def diverted(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(arg, Jet) for arg in args):
            return rule(*args, **kwargs)
        return apply(*args, **kwargs)

    function.apply = staticmethod(diverted)  # type: ignore[method-assign]


def _no_rule(name: str, in_place: bool = False) -> NotImplementedError:
    name = name.removesuffix(".__get__")
    last = name.rpartition(".")[2]
    if in_place or last == "__setitem__" or (last.endswith("_") and not last.endswith("__")):
        return NotImplementedError(
            f"jet: {name} modifies a value that jet follows in place, which has no rule; use the "
            "function that returns a new tensor"
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
    # The graph is that of the stack: hooks of modules find nothing to hook here.
    requires_grad = property(lambda self: False)
    grad_fn = property(lambda self: None)

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
                "jet: the forward of a torch.autograd.Function met a value that jet follows; "
                "give that Function a rule with @jet_rule(TheFunction)"
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
            "higher order, or torch.func.jvp or grad around jet"
        )
    return first.ring


# ------------------------------------------------------------------ rings of coefficients


class Operation(ABC):
    """A bilinear function of two stacks, and its adjoints in both: sums over pairs of orders.

    What is given is the function of a stack and of one coefficient, and both its adjoints.
    """

    @abstractmethod
    def apply(self, a: Tensor, b: Tensor) -> Tensor:
        """Map `(n, *a)` and `(*b)` to `(n, *z)`."""

    @abstractmethod
    def apply_left(self, grad: Tensor, b: Tensor, a: Tensor) -> Tensor:
        """Map `(n, *z)` and `(*b)` to the gradient `(n, *a)`; `a` has its shape but for n."""

    @abstractmethod
    def apply_right(self, grad: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Map `(n, *z)` and `(n, *a)` to the gradient `(*b)`, summed over n."""

    def add_to(self, z: Tensor, a: Tensor, b: Tensor) -> None:
        """Add `apply(a, b)` to `z` in place."""
        z += self.apply(a, b)

    def forward(self, a: Tensor, b: Tensor, size: int) -> Tensor:
        """`z_k = sum_j apply(a_(k-j), b_j)` for k below size."""
        z = _pad(self.apply(a[:size], b[0]), size)
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


class Elementary:
    """An elementwise function of one variable: value, derivative, and its series if it has one.

    The derivative is a function of the argument, or of the value if `from_value`. A series maps a
    stack and a length to the stack of the value; without one, the derivative is integrated.
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
        d, _ = lift(self.derivative(Jet(stack[: length - 1], Taylor(length - 1))))
        speed = _speed(stack)
        rest = _product(speed, d, length - 1, len(speed), len(d))
        return torch.cat([self.value(stack[0])[None], rest / _orders(rest)])


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
        z = _product(x.to(dtype), y.to(dtype), self.length, live_x, live_y)
        return Jet(z, self, live_x + live_y - 1)

    def contract(
        self, operation: Operation, a: Tensor, b: Tensor, addend: Tensor | None = None
    ) -> Jet:
        (x, live_x), (y, live_y) = lift(a), lift(b)
        c, live_c = (None, 0) if addend is None else lift(addend)
        lives = (live_x, live_y, live_c)
        z = _apply(_Contraction, x, y, c, operation, self.length, *lives)
        return Jet(z, self, max(live_x + live_y - 1, live_c))

    def elementary(self, function: Elementary, x: Jet) -> Jet:
        return Jet(_apply(_ElementaryFunction, x.stack, function, self.length, x.live), self)

    def logsumexp(self, x: Jet, dim: int) -> tuple[Jet, Jet]:
        total, softmax = _apply(_LogSumExp, x.stack, dim, self.length, x.live)
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
        # The first three coefficients of the function itself at the value.
        value = x.stack[0]
        along = Jet(torch.stack([value, torch.ones_like(value)]), Taylor(3))
        y = along.ring.elementary(function, along).stack
        z = x.stack * y[1]
        z[0] = y[0]
        z[-1] += 2 * y[2] * x.stack[1:-1].square().sum(0)
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


def _apply(function: type[Function], *args: Any) -> Any:
    """Apply a Function of this module, by the shortest way that is open.

    Without a gradient to record there is no need of one; without torch.func, none of the binding
    of arguments to its signature, which takes longer than the function where tensors are small.
    """
    if torch.is_grad_enabled():
        if torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        if any(isinstance(x, Tensor) and x.requires_grad for x in args):
            return super(Function, function).apply(*args)  # type: ignore[misc]
    with torch.no_grad():
        return function.forward(*args)


def _orders(stack: Tensor) -> Tensor:
    """The numbers 1, 2, ... along the first dimension."""
    orders = torch.arange(1, len(stack) + 1, dtype=stack.real.dtype, device=stack.device)
    return orders.reshape(-1, *[1] * (stack.ndim - 1))


def _speed(stack: Tensor) -> Tensor:
    """The coefficients of the derivative in t."""
    return stack[1:] * _orders(stack[1:])


class Room:
    """Zeros to sum coefficients up in: in eager mode rows of one stack, which needs no copy then.

    A compiler that follows every operation would write the whole stack anew for each row, and
    autograd refuses rows that are written: there the rows are tensors of their own.
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


def _pad(stack: Tensor, length: int) -> Tensor:
    if len(stack) == length:
        return stack
    return torch.cat([stack, stack.new_zeros(length - len(stack), *stack.shape[1:])])


# ------------------------------------------------------------------ product


def _product(a: Tensor, b: Tensor, length: int, live_a: int, live_b: int) -> Tensor:
    return cast(Tensor, _apply(_Product, a, b, min(len(a) + len(b) - 1, length), live_a, live_b))


class _Product(Function):
    """`z_k = sum_j a_(k-j) b_j`, with as many operations as the shorter factor has coefficients."""

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, size: int, live_a: int, live_b: int) -> Tensor:
        if live_a == 1 or live_b == 1:
            return _pad(a[:live_a] * b[:live_b], size)
        room = Room(a[:1] * b[:1], size)  # which is batched under vmap if one of them is
        left, right = a[:live_a].unbind(), b[:live_b].unbind()
        for k, z in enumerate(room.rows):
            for j in range(max(0, k + 1 - live_a), min(k + 1, live_b)):
                add_product(z, left[k - j], right[j])
        return room.stack()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, _, ctx.live_a, ctx.live_b = inputs
        ctx.save_for_backward(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            grad_a = _correlate(grad, b, ctx.live_b, len(a)).sum_to_size(a.shape)
        if ctx.needs_input_grad[1]:
            grad_b = _correlate(grad, a, ctx.live_a, len(b)).sum_to_size(b.shape)
        return grad_a, grad_b, None, None, None


def _correlate(grad: Tensor, d: Tensor, live: int, length: int) -> Tensor:
    """The adjoint of the product with d: `x_i = sum_j grad_(i+j) conj(d_j)` for i below length."""
    d = d[:live].conj()
    if live == 1:
        return grad[:length] * d
    room = Room(grad[:1] * d[:1], length)
    slopes, rows = d.unbind(), grad.unbind()
    for i, x in enumerate(room.rows):
        for j in range(min(live, len(grad) - i)):
            add_product(x, rows[i + j], slopes[j])
    return room.stack()


# ------------------------------------------------------------------ contraction


class _Contraction(Function):
    """`z_k = c_k + sum_j operation(a_(k-j), b_j)`: one call for all k, none for a dead b_j."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        a: Tensor,
        b: Tensor,
        c: Tensor | None,
        operation: Operation,
        length: int,
        live_a: int,
        live_b: int,
        live_c: int,
    ) -> Tensor:
        size = min(max(len(a) + len(b) - 1, 0 if c is None else len(c)), length)
        z = operation.forward(a[:live_a], b[:live_b], size)
        if c is not None:
            z[:live_c] += c[:live_c].reshape(live_c, *[1] * (z.ndim - c.ndim), *c.shape[1:])
        return z

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, c, ctx.operation, _, *ctx.lives = inputs
        ctx.addend = None if c is None else c.shape
        ctx.save_for_backward(a, b)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        a, b = ctx.saved_tensors
        live_a, live_b, _ = ctx.lives
        grad_a = grad_b = grad_c = None
        if ctx.needs_input_grad[0]:
            grad_a = ctx.operation.left(grad, b[:live_b], a)
        if ctx.needs_input_grad[1]:
            grad_b = ctx.operation.right(grad, a[:live_a], b)
        if ctx.needs_input_grad[2]:
            n, *shape = ctx.addend
            aligned = (n, *[1] * (grad.ndim - len(ctx.addend)), *shape)
            grad_c = grad[:n].sum_to_size(aligned).reshape(ctx.addend)
        return grad_a, grad_b, grad_c, None, None, None, None, None


# ------------------------------------------------------------------ elementary functions


class _ElementaryFunction(Function):
    """The series forward; backward the product with the derivative, as for a single number."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, function: Elementary, length: int, live: int) -> Tensor:
        if length == 1 or live == 1:
            return _pad(function.value(x[0])[None], length)
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
        slope = ctx.function.derivative(Jet(saved, Taylor(ctx.length), live))
        d, live = lift(slope)
        return _correlate(grad, d, live, ctx.size), None, None, None


class _LogSumExp(Function):
    """With s the softmax and l the result: `l' = <s, x'>` and `s' = s (x' - l')`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, dim: int, length: int, live: int) -> tuple[Tensor, Tensor]:
        room = Room(x, length)
        s = room.rows
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
        return torch.stack(totals), room.stack()

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
            mean = _correlate(grad_s, s, len(s), len(s)).sum(ctx.dim, keepdim=True)
            grad = grad_s - mean if grad is None else grad_s - mean + grad
        if grad is None:
            return None, None, None, None
        return _correlate(grad, s, len(s), ctx.size), None, None, None


# ------------------------------------------------------------------ recurrences


def riccati(
    value: Callable[[Tensor], Tensor], constant: float, linear: float, square: float
) -> Callable[[Tensor, int], Tensor]:
    """The series of `y = value(x)` where `y' = (constant + linear y + square y^2) x'`."""

    def series(stack: Tensor, length: int) -> Tensor:
        x = stack.unbind()
        room = Room(stack, length)
        y = room.rows
        y[0].copy_(value(x[0]))
        slopes = [constant + linear * y[0] + square * y[0].square() if square or constant else y[0]]
        for k in range(1, length):
            for j in range(1, min(k + 1, len(x))):
                add_product(y[k], x[j], slopes[k - j], value=j / k)
            if k + 1 == length:
                break
            slopes.append(y[k] * linear if square or linear != 1 else y[k])
            for i in range((k + 1) // 2 if square else 0):
                add_product(slopes[k], y[i], y[k - i], value=2 * square)
            if square and k % 2 == 0:
                add_product(slopes[k], y[k // 2], y[k // 2], value=square)
        return room.stack()

    return series


def power(exponent: Any) -> Callable[[Tensor, int], Tensor]:
    """The series of `y = x^a`, from `x y' = a y x'`."""

    def series(stack: Tensor, length: int) -> Tensor:
        x = (stack / stack[0]).unbind()
        room = Room(stack, length)
        y = room.rows
        y[0].copy_(stack[0] ** exponent)
        for k in range(1, length):
            for j in range(1, min(k + 1, len(x))):
                weight = (exponent + 1) * (j / k) - 1
                if isinstance(weight, Tensor):
                    add_product(y[k], x[j] * weight, y[k - j])
                else:
                    add_product(y[k], x[j], y[k - j], value=weight)
        return room.stack()

    return series


def oscillation(
    value: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor], sign: int
) -> Callable[[Tensor, int], Tensor]:
    """The series of `y = value(x)` where `y' = slope(x) x'` and `slope' = sign value`."""

    def series(stack: Tensor, length: int) -> Tensor:
        x = stack.unbind()
        room = Room(stack, length)
        y, slopes = room.rows, Room(stack, length).rows
        y[0].copy_(value(x[0]))
        slopes[0].copy_(slope(x[0]))
        for k in range(1, length):
            for j in range(1, min(k + 1, len(x))):
                add_product(y[k], x[j], slopes[k - j], value=j / k)
                add_product(slopes[k], x[j], y[k - j], value=sign * j / k)
        return room.stack()

    return series


# ------------------------------------------------------------------ the way in


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
                "take a higher order, or torch.func.jvp or grad around jet"
            )
    if (x.shape, x.dtype, x.device) != (v.shape, v.dtype, v.device):
        raise ValueError(
            f"{operation}: expected v like x, {tuple(x.shape)} {x.dtype} on {x.device}, "
            f"got {tuple(v.shape)} {v.dtype} on {v.device}"
        )
    return make(x, v)


def factorial(k: int) -> float:
    """As a float, for beyond 20 it is no integer of 64 bits."""
    return float(math.factorial(k)) if k <= 170 else math.inf


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
    `torch.func.jvp` or `grad` doubles it, at least, with each order.

    Args:
        f: a function of one tensor, or of one dict of tensors, that returns a tensor of any shape.
            Ordinary PyTorch code; modules through `torch.func.functional_call`. It may close over
            tensors. What it computes under `torch.no_grad` or detaches is constant.
        x: where to differentiate: a floating-point or complex tensor or a dict of them.
        v: the direction, like `x`.
        order: the highest derivative K, at least 0.

    Returns:
        K + 1 tensors, each like `f(x)`: derivatives, not Taylor coefficients. They are
        differentiable by `backward()` with respect to `x`, `v` and what `f` closes over, and
        `torch.func.vmap` may be taken over `x` and `v`.

    Raises:
        NotImplementedError: if `f` uses an operation that has no rule (`jet_rule` adds one),
            modifies a value in place, or calls `jet` in turn.
        TypeError: if `x` or `v` is not floating point or complex, or `f` returns no tensor.
        ValueError: if `v` is not like `x`, or `order` is negative.

    Example:
        >>> x, v = torch.tensor(1.0), torch.tensor(2.0)
        >>> jet(lambda x: x**3, x, v, 4)  # (2d/dx)^k of x^3
        (tensor(1.), tensor(6.), tensor(24.), tensor(48.), tensor(0.))
    """
    if not isinstance(order, int) or order < 0:
        raise ValueError(f"jet: expected an order of 0 or more, got {order!r}")
    ring = Taylor(order + 1)
    inputs = follow("jet", x, v, lambda x, v: Jet(torch.stack([x, v])[: order + 1], ring))
    stack, _ = lift(check_tensor("jet", f(inputs)))
    derivatives = [c * factorial(k) if k > 1 else c for k, c in enumerate(stack)]
    zeros = [torch.zeros_like(stack[0])] * (order + 1 - len(stack))
    return (*derivatives, *zeros)
