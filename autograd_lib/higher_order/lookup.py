"""The table of rules, and how the rule of a call is found."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch

RULES: dict[Any, Callable[..., Any]] = {}  # by the function, and by its name in ATen
LINEAR: set[str] = set()  # names of functions that act on each coefficient alone


class _ByName(dict[Any, Any]):
    """Looks up what it does not have by the name of the function."""

    def __missing__(self, function: Any) -> Any:
        self[function] = found = self.get(name_of(function))
        return found


# Whether the results of a function share the memory of its first argument: False for perhaps.
VIEWS = _ByName()


def from_source(function: Any) -> Callable[..., Any] | None:
    """The source of a function that PyTorch writes in Python, which is its rule."""
    if getattr(function, "__module__", None) not in ("torch.functional", "torch.nn.functional"):
        return None
    body = inspect.unwrap(function)
    checks = any(name.startswith("has_torch_function") for name in body.__code__.co_names)
    return unchecked(body) if checks else None


def unchecked(body: FunctionType) -> FunctionType:
    """A function without its first lines' check for overrides, which would call its rule again."""
    checks = [name for name in body.__code__.co_names if name.startswith("has_torch_function")]
    names = {**body.__globals__, **dict.fromkeys(checks, lambda *_: False)}
    copy = FunctionType(body.__code__, names, None, body.__defaults__, body.__closure__)
    copy.__kwdefaults__ = body.__kwdefaults__
    return copy


def name_of(function: Any) -> str:
    """The name of a function, which of an ATen operation is that without its overload."""
    return str(getattr(function, "_opname", None) or getattr(function, "__name__", ""))


@functools.cache
def composed(name: str) -> bool:
    """Whether PyTorch composes the ATen operation of this name of others."""
    packet = getattr(torch.ops.aten, name, None) if name and not writes(name) else None
    return isinstance(packet, torch._ops.OpOverloadPacket) and any(
        torch._C._dispatch_has_kernel_for_dispatch_key(schema, "CompositeImplicitAutograd")
        for schema in (getattr(packet, overload).name() for overload in packet.overloads())
        if torch._C._dispatch_has_kernel(schema)
    )


def writes(name: str) -> bool:
    """Whether the function of this name writes into its first argument, as `add_` does."""
    return name.endswith("_") and not name.endswith("__")


@functools.cache
def _order(function: Any, count: int, keys: tuple[str, ...]) -> tuple[str, ...]:
    """The named arguments that have a place after `count` ones in PyTorch's signature."""
    first = tuple(key for key in keys if key in ("self", "input") and not count)
    if not isinstance(function, FunctionType):
        for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name_of(function)}"):
            if {*keys} - {"input"} <= {argument.name for argument in schema.arguments}:
                places = [a.name for a in schema.arguments if not a.kwarg_only]
                rest = places[max(count, len(first)) :]
                return (*first, *itertools.takewhile(lambda place: place in keys, rest))
    return first


def arranged(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give named arguments by position, where PyTorch's signature has one for them."""
    named = dict(kwargs)
    order = _order(function, len(args), tuple(kwargs))
    return (*args, *[named.pop(key) for key in order]), named


def no_rule(name: str, in_place: bool = False) -> NotImplementedError:
    name = name.removesuffix(".__get__")
    last = name.rpartition(".")[2]
    if in_place or last == "__setitem__" or writes(last):
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
