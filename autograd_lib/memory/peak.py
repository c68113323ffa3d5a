"""The allocations and releases of one run, cut at its marks, and the high-water mark of a step."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.autograd.profiler import profile
from torch.multiprocessing.reductions import StorageWeakRef
from torch.profiler._utils import traverse_dfs

from autograd_lib.memory.saved import storages
from autograd_lib.report.tables import readable_bytes

__all__ = ["peak_bytes"]

_Event = tuple[torch.device, int, int]  # device, address, bytes: negative when freed

# PyTorch's profiler and the process's stderr exist once, so threads take turns. The lock is
# reentrant: a trace within a trace must reach the error about nested profilers.
_one_profiler = threading.RLock()


def peak_bytes(step: Callable[[], object]) -> int:
    r"""Measure the high-water mark of one call of `step()`, above what stood before it.

    With $a_t$ the bytes (negative when freed) of the $t$-th event of the allocator during the
    call this is $\max(0, \max_t \sum_{s \le t} a_s)$. `step` is called twice: once to warm up
    (optimizer states, `.grad` buffers, caches, compilation), once measured.

    - On the CPU the events are those of PyTorch's profiler: they see the scratch memory of
      kernels and compiled code as well. Memory that libraries, NumPy or other Python threads
      allocate is not seen, nor is the release of what was allocated before `peak_bytes`.
    - If the measured call allocates on CUDA devices, the result is the sum over these devices of
      `torch.cuda.max_memory_allocated` above `torch.cuda.memory_allocated`, and the CPU is left
      out. Their peak statistics are reset, and blocks are multiples of 512 bytes.

    Garbage collection is off during the measured call, so that reference cycles do not make the
    result a matter of chance.

    Args:
        step: Called without arguments; its side effects happen twice.

    Returns:
        Bytes, at least 0.

    Raises:
        TypeError: `step` cannot be called.
        RuntimeError: A profiler is running, or `step` runs one.

    Warns:
        UserWarning: `step` freed memory that was allocated before it, such as the `.grad` of the
            step before. Above what stood before then is less than what `step` itself needs.

    Example:
        >>> x = torch.ones(1024)
        >>> peak_bytes(lambda: x.exp().sqrt().sin())  # two results at once: 2 * 4096
        8192
    """
    check_step("peak_bytes", step)
    before: dict[int, int] = {}
    held: list[tuple[StorageWeakRef, int]] = []

    def run(marks: Marks) -> None:
        step()
        gc.collect()
        for device in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
            if torch.cuda.memory_reserved(device):  # do not create a context on an unused device
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                before[device] = torch.cuda.memory_allocated(device)
        held.extend(_held_by_python())
        marks("start")
        step()
        marks("end")

    trace = Trace(run)
    first = sum(nbytes > 0 for _, nbytes in trace.events[: trace.at["start"]])
    freed = -sum(n for number, n in trace.cut("start", "end") if n < 0 and number < first)
    # The CPU's allocator reports no release of memory that was allocated before any profiling.
    freed = max(freed, sum(size for reference, size in held if reference.expired()))
    if freed:
        warnings.warn(
            f"peak_bytes: step freed {readable_bytes(freed)} that stood before it, so the result "
            "is not what step needs by itself; free that memory before the call or at the end of "
            "step (zero_grad after the optimizer's step, not before the forward)",
            UserWarning,
            stacklevel=2,
        )
    if used := {device.index for device in trace.devices[first:] if device.type == "cuda"}:
        return sum(torch.cuda.max_memory_allocated(i) - before.get(i, 0) for i in used)
    return trace.peak("start", "end")


def _held_by_python() -> list[tuple[StorageWeakRef, int]]:
    found: dict[int, tuple[StorageWeakRef, int]] = {}
    for storage in storages([o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]):
        if storage.device.type != "meta":
            reference = StorageWeakRef(storage)
            found[reference.cdata] = reference, storage.nbytes()
    return list(found.values())


class Marks:
    """Named moments of a run; each allocates one byte, to be found again among the events."""

    def __init__(self) -> None:
        self.times: dict[str, float] = {}
        self.marked: list[tuple[str, Tensor, int]] = []  # name, the byte, address of a tensor

    def __call__(self, name: str, tensor: Tensor | None = None) -> None:
        """Set a mark; `tensor` is one whose allocation the trace will know by the same name."""
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.times[name] = time.perf_counter()
        address = next((storage.data_ptr() for storage in storages(tensor)), 0)
        self.marked.append((name, torch.empty(1, dtype=torch.uint8), address))


class Trace:
    """The allocations and releases of one run, numbered; of memory from before it, none.

    Attributes:
        events: Number of the allocation and bytes, negative when freed.
        devices: By number of the allocation.
        at: By the name of a mark the index of the event after it; the last of that name counts.
        times: By the name of a mark its time.
        number: By the name of a mark the allocation of its tensor; -1 if it is older than the run.
    """

    def __init__(self, run: Callable[[Marks], object], device: str | None = None) -> None:
        """Run, and keep the events of one type of device; None for all."""
        self.events: list[tuple[int, int]] = []
        self.devices: list[torch.device] = []
        self.at: dict[str, int] = {}
        self.number: dict[str, int] = {}
        marks = Marks()
        self.times = marks.times
        with _one_profiler:  # until the bytes of the marks are freed: other threads would see it
            events = _allocations(partial(run, marks))
            marked = {byte.data_ptr(): (name, address) for name, byte, address in marks.marked}
            marks.marked.clear()
        standing: dict[int, tuple[int, int]] = {}  # by address, which later allocations reuse
        for where, address, size in events:
            if where.type == "cpu" and size == 1 and address in marked:
                name, of = marked[address]
                self.at[name] = len(self.events)
                self.number[name], _ = standing.get(of, (-1, 0))
            elif device in (None, where.type):
                if size > 0:
                    standing[address] = len(self.devices), size
                    self.events.append(standing[address])
                    self.devices.append(where)
                elif address in standing:
                    number, allocated = standing.pop(address)
                    self.events.append((number, -allocated))

    def cut(self, start: str, end: str) -> list[tuple[int, int]]:
        return self.events[self.at[start] : self.at[end]]

    def peak(self, start: str, end: str, *, stay: Iterable[int] = ()) -> int:
        """Return the high-water mark of a phase above its start, as if `stay` were not freed."""
        kept = set(stay)
        changes = (0 if n < 0 and number in kept else n for number, n in self.cut(start, end))
        return max(accumulate(changes, initial=0))

    def standing(self, start: str, end: str, at: str) -> dict[int, int]:
        """Return number and bytes of what a phase allocated and was not freed by a later mark."""
        freed = {number for number, nbytes in self.cut(start, at) if nbytes < 0}
        return {i: n for i, n in self.cut(start, end) if n > 0 and i not in freed}


def check_step(operation: str, step: object) -> None:
    """Raise an error that names `operation` unless `step` can be called."""
    if not callable(step):
        raise TypeError(
            f"{operation}: expected a function without arguments, got {type(step).__name__}; pass "
            "`lambda: model(x).sum().backward()`, not its result"
        )


def _allocations(run: Callable[[], object]) -> list[_Event]:
    """List device, address and signed size of each allocation and release during run()."""
    if torch._C._autograd._profiler_enabled():
        raise RuntimeError(
            "measuring memory: a profiler is running already, and PyTorch allows only one at "
            "a time; measure outside of it"
        )
    profiler = profile(use_cpu=True, profile_memory=True)
    with _silent_stderr():
        unknown = torch.empty(1)
        profiler.__enter__()
        del unknown  # makes the allocator warn of unrecorded memory now, with stderr silent
    try:
        torch._C._autograd._enable_record_function(False)  # no operators, only allocations
        with no_collection():
            run()
    finally:
        torch._C._autograd._enable_record_function(True)
        running = torch._C._autograd._profiler_enabled()
        if running:
            with _silent_stderr():
                profiler.__exit__(None, None, None)
    if not running:
        raise RuntimeError(
            "measuring memory: the step runs a profiler of its own, and PyTorch allows only one "
            "at a time; pass a step without it"
        )
    assert profiler.kineto_results is not None
    tree = traverse_dfs(profiler.kineto_results.experimental_event_tree())
    found = [event for event in tree if event.tag == _EventType.Allocation]
    found.sort(key=lambda event: event.start_time_ns)  # stable: within a tick the tree's order
    fields = [event.extra_fields for event in found]
    return [(each.device, each.ptr, each.alloc_size) for each in fields]


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Collect no garbage during the block: neither time nor memory depends on when it happens."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    # The profiler of 2.13 announces its start and stop on the process's stderr, with times that
    # would end up in the stored output of a notebook; KINETO_LOG_LEVEL is read only once.
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
