"""Ways to register the rules of many PyTorch functions at once, and what the rules share."""

from __future__ import annotations

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


def wrap(result: Any, like: Jet) -> Any:
    if isinstance(result, Tensor):
        if not (result.is_floating_point() or result.is_complex()):
            return result[0]  # converted to integers, where there are no derivatives
        return Jet(result, like.ring, like.live)
    return tuple(wrap(part, like) for part in result)


def only_first(function: Any, x: Any, *others: Any) -> None:
    if not isinstance(x, Jet) or jets(others):
        raise NotImplementedError(
            f"jet: {function.__name__} has a rule only where its first argument, and no other, "
            "is followed"
        )


def linear(function: Any) -> None:
    """A function linear in its first argument, coefficient by coefficient."""

    @jet_rule(function)
    def rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        only_first(function, x, args, kwargs)
        return wrap(torch.vmap(lambda c: function(c, *args, **kwargs))(x.stack), x)


def numberwise(function: Any) -> None:
    """A linear function that takes the stack as it is, for it counts no dimension from the left."""

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


def along(function: Any, *names: str) -> None:
    """A linear function that takes dimensions by these names, in this order, before others."""

    @jet_rule(function)
    def rule(x: Jet, *args: Any, **kwargs: Any) -> Any:
        only_first(function, x, args, kwargs)
        dims = {
            **dict(zip(names, args, strict=False)),
            **{n: kwargs.pop(n) for n in names if n in kwargs},
        }
        moved = [from_right(x, dims[n]) for n in names if n in dims]
        return wrap(function(x.stack, *moved, *args[len(names) :], **kwargs), x)


def sizes_of(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """Sizes that were given one by one or as one sequence."""
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes


def widened(x: Tensor, dtype: Any) -> Tensor:
    return x if dtype is None else x.to(dtype)
