"""The table of rules, and how the rule of a call is found."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RULES: dict[Any, Callable[..., Any]] = {}
LINEAR: set[str] = set()  # names of functions that act on each coefficient alone
# Functions whose results share the memory of their first argument: always, or (False) perhaps.
VIEWS: dict[Any, bool] = {}
_HOMES = (torch, Tensor, F, torch._C._nn, torch._VF)
_SPECIAL_HOMES = {"linalg_": torch.linalg, "special_": torch.special, "fft_": torch.fft}


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


def namesakes(name: str) -> list[Any]:
    """The functions of PyTorch that an ATen operation's name may stand for."""
    for prefix, home in _SPECIAL_HOMES.items():
        if name.startswith(prefix):
            return [getattr(home, name.removeprefix(prefix), None)]
    packet = getattr(torch.ops.aten, name, None)
    return [packet, *[getattr(home, name, None) for home in _HOMES]]


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
def _positions(name: str, count: int, given: frozenset[str]) -> tuple[str, ...]:
    """The names, in order, of the given arguments that follow the first `count` ones."""
    for schema in torch._C._jit_get_schemas_for_operator(f"aten::{name}"):
        if given <= {argument.name for argument in schema.arguments}:
            order = [a.name for a in schema.arguments if not a.kwarg_only][count:]
            last = next((i for i, each in enumerate(order) if each not in given), len(order))
            return tuple(order[:last])
    return ()


def arranged(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Give arguments that are named by position, where PyTorch's signature has one for them."""
    named = {("self" if key == "input" else key): value for key, value in kwargs.items()}
    name = getattr(function, "__name__", "")
    source = isinstance(function, FunctionType)
    order = () if source else _positions(name, len(args), frozenset(named))
    if "self" in named and "self" not in order:
        order = ("self", *order)
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
