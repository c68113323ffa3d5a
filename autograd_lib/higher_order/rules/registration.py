"""Ways to register rules for many PyTorch functions at once, and helpers that rules share."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet, jets, primal
from autograd_lib.higher_order.taylor import jet_rule


def getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


def named(names: str, *homes: Any) -> list[Any]:
    """The functions of these names, each from the first home that has it."""
    return [
        next(
            getattr(home, name)
            for home in (homes if not name.startswith("_") else (Tensor,))
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
def decomposed(function: Any) -> None:
    """Functions that PyTorch writes in Python, each with PyTorch's own source as its rule.

    The source runs without its first lines' check for overrides, which would call the rule again.
    """
    body = inspect.unwrap(function)
    unchecked = {
        f"has_torch_function{kind}": lambda *_: False for kind in ("", "_unary", "_variadic")
    }
    names = {**body.__globals__, **unchecked, "__name__": __name__}
    rule = FunctionType(body.__code__, names, None, body.__defaults__, body.__closure__)
    rule.__kwdefaults__ = body.__kwdefaults__
    jet_rule(function)(rule)


def wrap(result: Any, like: Jet) -> Any:
    """Follow the result of a linear function of the stack of `like`."""
    if isinstance(result, Tensor):
        if not (result.is_floating_point() or result.is_complex()):
            return result[0]  # converted to integers, where there are no derivatives
        return Jet(result, like.algebra, like.live)
    return tuple(wrap(part, like) for part in result)


def require_first_only(function: Any, x: Any, *others: Any) -> None:
    if not isinstance(x, Jet) or jets(others):
        raise NotImplementedError(
            f"jet: {function.__name__} has a rule only where its first argument, and no other, "
            "is followed"
        )


@family
def linear(function: Any) -> None:
    """Functions linear in their first argument, applied to each coefficient by `torch.vmap`."""

    @jet_rule(function)
    def rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        require_first_only(function, x, args, kwargs)
        return wrap(torch.vmap(lambda c: function(c, *args, **kwargs))(x.stack), x)


@family
def linear_elementwise(function: Any) -> None:
    """Linear functions of the whole stack, since they count no dimension from the left."""

    @jet_rule(function)
    def rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Jet):  # as in constant.to(x)
            return function(x, *primal(args), **primal(kwargs))
        return wrap(function(x.stack, *primal(args), **primal(kwargs)), x)


def from_right(x: Tensor, dim: Any) -> Any:
    """A dimension, several, or with None or () all of them, counted from the last."""
    if isinstance(dim, int):
        return dim if dim < 0 else dim - x.ndim
    return tuple(from_right(x, d) for d in (dim or range(x.ndim)))


@family
def linear_along(function: Any, **dimensions: int) -> None:
    """Linear functions whose next arguments are these dimensions, with their defaults."""

    @jet_rule(function)
    def rule(x: Jet, *args: Any, **kwargs: Any) -> Any:
        require_first_only(function, x, args, kwargs)
        given = dict(zip(dimensions, args, strict=False))
        dims = [
            from_right(x, given.get(name, kwargs.pop(name, default)))
            for name, default in dimensions.items()
        ]
        return wrap(function(x.stack, *dims, *args[len(dims) :], **kwargs), x)


def sizes_of(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """Sizes that were given one by one or as one sequence."""
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes


def widened(x: Tensor, dtype: Any) -> Tensor:
    return x if dtype is None else x.to(dtype)
