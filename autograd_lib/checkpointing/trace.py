"""The allocations of one run, divided into phases.

A run sets marks between the events of the allocator. Two Functions give a block its input and the
gradient of its output, and mark where its own forward and backward begin and end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autograd_lib.memory.peak import allocations


class Marks:
    """Named moments of a run; each allocates one byte, to be found again among the events."""

    def __init__(self) -> None:
        self.tensors: list[tuple[str, Tensor]] = []
        self.times: dict[str, float] = {}

    def __call__(self, name: str) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.times[name] = time.perf_counter()
        self.tensors.append((name, torch.empty(1, dtype=torch.uint8)))

    def seconds(self, start: str, end: str) -> float:
        return self.times[end] - self.times[start]


class Trace:
    """The allocations and releases of one run, numbered, cut at its marks."""

    def __init__(self, run: Callable[[Marks], None], device: torch.device) -> None:
        marks = Marks()
        events = allocations(lambda: run(marks))
        names = {tensor.data_ptr(): name for name, tensor in marks.tensors}
        self.at: dict[str, int] = {}  # index of the event after a mark, the last of its name
        self.events: list[tuple[int, int]] = []  # number of the allocation, bytes
        self.addresses: list[int] = []  # by number of the allocation; addresses are reused
        standing: dict[int, tuple[int, int]] = {}
        for where, address, size in events:
            if where.type == "cpu" and size == 1 and address in names:
                self.at[names[address]] = len(self.events)
            elif where.type == device.type:
                # A release of memory that was allocated before the run is left out.
                if size > 0:
                    standing[address] = (len(self.addresses), size)
                    self.events.append(standing[address])
                    self.addresses.append(address)
                elif address in standing:
                    number, allocated = standing.pop(address)
                    self.events.append((number, -allocated))

    def cut(self, start: str, end: str) -> list[tuple[int, int]]:
        return self.events[self.at[start] : self.at[end]]

    def number(self, address: int, at: str) -> int:
        """Return the allocation at an address at a mark; -1 if it is older than this run."""
        before = self.events[: self.at[at]]
        found = [n for n, nbytes in before if nbytes > 0 and self.addresses[n] == address]
        return found[-1] if found else -1

    def peak(self, start: str, end: str, *, stays: int = -1) -> int:
        """Return the high-water mark of a phase above its start, as if `stays` were not freed."""
        sums = [0]
        for number, nbytes in self.cut(start, end):
            sums.append(sums[-1] + (0 if number == stays and nbytes < 0 else nbytes))
        return max(sums)

    def standing(self, start: str, end: str, at: str) -> dict[int, int]:
        """Return number and bytes of what a phase allocated and was not freed by a later mark."""
        found: dict[int, int] = {}
        for index in range(self.at[start], self.at[at]):
            number, nbytes = self.events[index]
            if nbytes < 0:
                found.pop(number, None)
            elif index < self.at[end]:
                found[number] = nbytes
        return found


class Input(torch.autograd.Function):
    """Return a copy of a value; call `arrived` with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, value: Tensor, arrived: Callable[[Tensor], Any]
    ) -> Tensor:
        ctx.arrived = arrived
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        ctx.arrived(gradient)
        return None, None, None


class Output(torch.autograd.Function):
    """Take an output; start its backward with the gradient that `make` returns."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, make: Callable[[], Tensor]) -> Tensor:
        ctx.make = make
        return output.new_zeros(())

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Any:
        return ctx.make(), None


class StandIn(torch.autograd.Function):
    """Stand for all blocks: return `value`, and `back(gradient)` as its gradient."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, x: Tensor, value: Tensor, back: Any) -> Tensor:
        ctx.back = back
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, ctx.back(gradient), None, None


@dataclass(frozen=True)
class Layout:
    """The memory layout of a gradient; an expanded one takes less than its shape suggests."""

    shape: torch.Size
    stride: tuple[int, ...]
    offset: Any
    elements: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, x: Tensor) -> Layout:
        elements = x.untyped_storage().nbytes() // x.element_size()
        return cls(x.shape, x.stride(), x.storage_offset(), elements, x.dtype, x.device)

    @property
    def nbytes(self) -> int:
        return self.elements * self.dtype.itemsize

    def ones(self) -> Tensor:
        flat = torch.ones(self.elements, dtype=self.dtype, device=self.device)
        return flat.as_strided(self.shape, self.stride, self.offset)
