"""The values that `jet` follows, and the table of rules in which each function looks them up."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.overrides import resolve_name

if TYPE_CHECKING:
    from autograd_lib.higher_order.algebra import Algebra


RULES: dict[Any, Callable[..., Any]] = {}
LINEAR: set[str] = set()  # names of functions that act on each coefficient alone
# Each Python function of these modules has its own source as its rule.
_IN_PYTHON = ("torch.functional", "torch.nn.functional")


def rule_of(function: Any) -> Callable[..., Any] | None:
    """The rule of a function of PyTorch; without one of the table, its own source in Python."""
    if function not in RULES and getattr(function, "__module__", None) in _IN_PYTHON:
        body = inspect.unwrap(function)
        if any(name.startswith("has_torch_function") for name in body.__code__.co_names):
            RULES[function] = unchecked(body)
    return RULES.get(function)


def unchecked(body: FunctionType) -> FunctionType:
    """A function without its first lines' check for overrides, which would call its rule again."""
    checks = [name for name in body.__code__.co_names if name.startswith("has_torch_function")]
    names = {**body.__globals__, **dict.fromkeys(checks, lambda *_: False)}
    copy = FunctionType(body.__code__, names, None, body.__defaults__, body.__closure__)
    copy.__kwdefaults__ = body.__kwdefaults__
    return copy


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
    are zero too; they are stored where a gradient with respect to them is needed.
    """

    stack: Tensor
    algebra: Algebra
    live: int

    @staticmethod
    def __new__(cls, stack: Tensor, algebra: Algebra, live: int | None = None) -> Jet:
        n, *shape = stack.shape
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=stack.dtype, device=stack.device)
        self.stack = stack
        self.algebra = algebra
        self.live = n if live is None or live > n else live
        return self

    # Read often, so without the detour through __torch_function__.
    shape = property(lambda self: self.stack.shape[1:])
    ndim = property(lambda self: self.stack.ndim - 1)
    dtype = property(lambda self: self.stack.dtype)
    device = property(lambda self: self.stack.device)
    # The autograd graph is that of the stack; tools that hook tensors read these.
    requires_grad = property(lambda self: self.stack.requires_grad)
    grad_fn = property(lambda self: self.stack.grad_fn)

    def dim(self) -> int:
        return self.stack.ndim - 1

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def map(self, f: Callable[[Tensor], Tensor]) -> Jet:
        """Apply a linear function to the stack; it must keep the first dimension."""
        return Jet(f(self.stack), self.algebra, self.live)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        rule = RULES.get(func) or rule_of(func)
        in_place = kwargs.pop("out", None) is not None or kwargs.pop("inplace", False)
        if rule is None or in_place:
            name = resolve_name(func) or getattr(func, "__name__", str(func))
            raise _no_rule(name, bool(in_place))
        if "input" in kwargs:
            args = (kwargs.pop("input"), *args)
        algebra = algebra_of(*args, *kwargs.values())
        if algebra.level != torch._C._functorch.maybe_current_level():
            raise NotImplementedError(
                f"jet: {resolve_name(func)} met a value that jet follows inside a transform of "
                "torch.func, which would take it for a constant; put the transform around jet"
            )
        if algebra.forward_mode and not torch._C._is_fwd_grad_enabled():
            raise NotImplementedError(
                f"jet: the forward of the torch.autograd.Function {_running_function()} met a "
                "value that jet follows; give it a rule with @jet_rule, or remove the hook that "
                "calls it"
            )
        if algebra.recording and not torch.is_grad_enabled():
            args, kwargs = primal(args), primal(kwargs)  # what no_grad computes is constant
            return func(*args, **kwargs)
        return rule(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, *_: Any) -> Any:
        # Only calls that bypass __torch_function__ arrive here: inside torch.func, and in compiled
        # or scripted functions.
        raise _no_rule(f"{func}, reached inside a transform or a compiled function,")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Jet({self.stack!r})"


def _running_function() -> str:
    """Return the name of the Function whose forward is running."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        cls = frame.f_locals.get("cls")
        if isinstance(cls, type) and issubclass(cls, Function):
            return cls.__name__
    return "that is running"


def jets(values: Any) -> list[Jet]:
    """Return the followed values among arguments, nested ones too."""
    found: list[Jet] = []
    for value in values.values() if isinstance(values, dict) else values:
        if type(value) is Jet:
            found.append(value)
        elif isinstance(value, (tuple, list, dict)):
            found += jets(value)
    return found


def primal(values: Any) -> Any:
    """Return the arguments with every followed value replaced by its value at t = 0."""
    if isinstance(values, Jet):
        return values.stack[0]
    if isinstance(values, dict):
        return {key: primal(value) for key, value in values.items()}
    if isinstance(values, tuple | list):
        return [primal(value) for value in values] if jets(values) else values
    return values


def algebra_of(*values: Any) -> Algebra:
    """Return the algebra of the followed values among arguments, which they must share."""
    first, *others = jets(values)
    if others and any(other.algebra is not first.algebra for other in others):
        raise NotImplementedError(
            "jet: values of two calls of jet or laplacian met; they cannot be nested: take a "
            "higher order, or torch.func.grad around jet"
        )
    return first.algebra


def lift(x: Tensor, ndim: int | None = None) -> tuple[Tensor, int]:
    """Return the stack of a value or a constant, with `ndim` dimensions, and how many are live."""
    stack, live = (x.stack, x.live) if isinstance(x, Jet) else (x[None], 1)
    if ndim is not None and ndim > x.ndim:
        stack = stack.reshape(len(stack), *[1] * (ndim - x.ndim), *x.shape)
    return stack, live


def aligned(x: Tensor, y: Tensor, ndim: int = 0) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
    """Lift two values to stacks of one dtype with as many dimensions as broadcasting needs."""
    ndim = max(ndim, x.ndim, y.ndim)
    (a, live_a), (b, live_b) = lift(x, ndim), lift(y, ndim)
    if a.dtype != b.dtype:
        dtype = torch.result_type(primal(x), primal(y))
        a, b = a.to(dtype), b.to(dtype)
    return (a, live_a), (b, live_b)
