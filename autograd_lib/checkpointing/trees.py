"""Arguments and results of a block taken apart into tensors, and put together with others."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autograd_lib.memory.saved import storage_parts

# What stays whole. A tensor within one of them (in a closure, say) is not found.
_WHOLE = (Tensor, nn.Module, type, FunctionType, BuiltinFunctionType, ModuleType, torch.Generator)


class Tree(NamedTuple):
    """A value taken apart.

    Unlike PyTorch's trees these reach into every object that can be pickled, such as dataclasses
    and subclasses of `dict`, and an object that is there twice stays one.

    Attributes:
        skeleton: The pickled value without its leaves.
        leaves: Tensors, and what else is not taken apart.
    """

    skeleton: bytes
    leaves: list[Any]

    def build(self, leaves: Sequence[Any]) -> Any:
        """Make the value anew with other leaves."""
        unpickler = _Unpickler(io.BytesIO(self.skeleton))
        unpickler.leaves = leaves
        return unpickler.load()

    def tensors(self, where: Callable[[Tensor], bool] = lambda _: True) -> list[int]:
        """Which leaves are tensors of some kind."""
        return [i for i, x in enumerate(self.leaves) if isinstance(x, Tensor) and where(x)]

    def detached(self) -> Tree:
        """The same with its tensors detached."""
        leaves = [x.detach() if isinstance(x, Tensor) else x for x in self.leaves]
        return Tree(self.skeleton, leaves)


Place = tuple[Any, ...]


def place(x: Tensor) -> Place:
    """Identify a tensor, by more than the object: hooks on modules may have wrapped it."""
    strides = x.stride() if x.layout is torch.strided else ()
    return *(part.data_ptr() for part in storage_parts(x)), x.shape, strides


class _Pickler(pickle.Pickler):
    leaves: list[Any]
    numbers: dict[int, int]  # of the leaves, by identity

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, _WHOLE):
            return None
        number = self.numbers.setdefault(id(value), len(self.leaves))
        if number == len(self.leaves):
            self.leaves.append(value)
        return number


class _Unpickler(pickle.Unpickler):
    leaves: Sequence[Any]

    def persistent_load(self, number: Any) -> Any:
        return self.leaves[number]


def flatten(value: Any) -> Tree:
    """Take a value apart.

    Raises:
        ValueError: `pickle` cannot (a lock, an iterator).
    """
    file = io.BytesIO()
    pickler = _Pickler(file, protocol=5)
    pickler.leaves, pickler.numbers = [], {}
    try:
        pickler.dump(value)
    except Exception as err:
        raise ValueError(
            f"plan_checkpoints: blocks take or return what cannot be taken apart ({err}); pass "
            "tensors, or containers and dataclasses of them"
        ) from err
    return Tree(file.getvalue(), pickler.leaves)


def copies(leaves: Sequence[Any]) -> list[Any]:
    """Copy the tensors with their storages: views of one storage stay so, expanded ones too."""
    known: dict[int, Any] = {}

    def copied(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return copy.deepcopy(x, known) if x.layout is torch.strided else x.clone()

    return [copied(leaf) for leaf in leaves]
