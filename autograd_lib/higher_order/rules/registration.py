"""Ways to register rules for many PyTorch functions at once, and helpers that rules share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from autograd_lib.higher_order.dispatch import (
    Jet,
    algebra_of,
    by_coefficient,
    by_stack,
    jets,
    lift,
    primal,
    together,
)
from autograd_lib.higher_order.lookup import LINEAR, unchecked
from autograd_lib.higher_order.series import Operation
from autograd_lib.higher_order.taylor import jet_rule


def getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


def named(names: str, *homes: Any) -> list[Any]:
    """The functions of these names, each from the first home that has it."""
    return [
        next(
            getattr(home, name)
            for home in (homes if not name.startswith("__") else (Tensor,))
            if callable(getattr(home, name, None))
        )
        for name in names.split()
    ]


def family(register: Callable[..., None]) -> Callable[..., None]:
    """Make what registers the rule of one function register those of several."""

    @functools.wraps(register)
    def register_all(*functions: Any, **options: Any) -> None:
        for function in functions:
            register(function, **options)

    return register_all


@family
def in_python(function: Any) -> None:
    """Methods that PyTorch writes in Python, each with PyTorch's own source as its rule."""
    jet_rule(function)(unchecked(inspect.unwrap(function)))


@family
def decomposed(name: str) -> None:
    """ATen operations with PyTorch's own decomposition as their rule."""
    packet = getattr(torch.ops.aten, name)
    overloads = [getattr(packet, overload) for overload in packet.overloads()]
    rule = next(decomposition_table[each] for each in overloads if each in decomposition_table)
    jet_rule(packet)(inspect.unwrap(rule))  # without conversions of the dtype


def require_first_only(function: Any, x: Any, *others: Any) -> None:
    if not isinstance(x, Jet) or jets(others):
        raise NotImplementedError(
            f"jet: {function.__name__} has a rule only where its first argument, and no other, "
            "is followed"
        )


@family
def linear(function: Any) -> None:
    """Functions linear in their first argument, applied to each coefficient."""
    name = function.__name__
    LINEAR.add(name)
    # The method takes sizes one by one, too.
    called: Any = (
        getattr(Tensor, name, function) if function is getattr(torch, name, 0) else function
    )

    @jet_rule(function)
    def rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        require_first_only(function, x, *args, *kwargs.values())
        return by_coefficient(called, x, *args, **kwargs)


@family
def linear_together(function: Any) -> None:
    """Functions linear in all their floating-point tensors together."""
    LINEAR.add(function.__name__)
    jet_rule(function)(functools.partial(together, function))


@family
def linear_elementwise(function: Any) -> None:
    """Linear functions of the whole stack, since they count no dimension from the left."""
    LINEAR.add(function.__name__)

    @jet_rule(function)
    def rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Jet):  # as in constant.to(x)
            return function(x, *primal(args), **primal(kwargs))
        stack = function(x.stack, *primal(args), **primal(kwargs))
        if stack is x.stack and function is not Tensor.contiguous:
            return x  # nothing to convert
        return by_stack(stack, x)


def contract(operation: Operation, x: Tensor, y: Tensor) -> Tensor:
    """Combine two values by a bilinear function; with neither followed, as plain tensors."""
    if jets((x, y)):
        return cast(Tensor, algebra_of(x, y).contract(operation, x, y))
    return operation.apply(x[None], y)[0]


def plus(product: Tensor, addend: Tensor) -> Tensor:
    """Add to a matrix product that nothing else holds: in place where that is possible."""
    stack, live = lift(addend, product.ndim)
    sizes = zip(stack.shape[1:], product.shape, strict=False)
    wider = addend.ndim > product.ndim or any(n not in (1, size) for n, size in sizes)
    shared = torch._C._are_functorch_transforms_active() or stack.dtype != product.dtype
    if wider or shared or not isinstance(product, Jet) or len(stack) > len(product.stack):
        return product + addend
    algebra_of(product, addend)
    product.stack[: len(stack)].add_(stack)
    product.live = max(product.live, live)
    return product


def from_right(x: Tensor, dim: int) -> int:
    return dim % max(x.ndim, 1) - max(x.ndim, 1)


def widened(x: Tensor, dtype: Any) -> Tensor:
    return x if dtype is None else x.to(dtype)
