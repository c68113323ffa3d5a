"""The high-water mark of a step, from the allocations and releases during it."""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.autograd.profiler import profile
from torch.multiprocessing.reductions import StorageWeakRef

from autograd_lib.memory.saved import storage_parts
from autograd_lib.report.tables import readable_bytes

__all__ = ["peak_bytes"]

_Event = tuple[torch.device, int, int]  # device, address, bytes: negative when freed


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
    if not callable(step):
        raise TypeError(
            f"peak_bytes: expected a function without arguments, got {type(step).__name__}; "
            "pass `lambda: model(x).sum().backward()`, not its result"
        )
    with _one_profiler:
        return _peak_bytes(step)


# PyTorch's profiler and the process's stderr exist once, so threads take turns. The lock is
# reentrant: a call from within `step` must reach the error about nested profilers.
_one_profiler = threading.RLock()


def _peak_bytes(step: Callable[[], object]) -> int:
    if torch._C._autograd._profiler_enabled():
        raise RuntimeError(
            "peak_bytes: a profiler is running already, and PyTorch allows only one at a time; "
            "call peak_bytes outside of it"
        )

    def warm_up() -> None:
        step()
        gc.collect()

    stood: dict[tuple[torch.device, int], int] = {}
    _follow(allocations(warm_up), stood)
    before: dict[int, int] = {}
    for device in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        if torch.cuda.memory_reserved(device):  # do not create a context on an unused device
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before[device] = torch.cuda.memory_allocated(device)
    held = _held_by_python()
    events = allocations(step)
    peak, freed = _follow(events, stood)
    # The CPU's allocator reports no release of memory that was allocated before any profiling.
    freed = max(freed, sum(size for reference, size in held if reference.expired()))
    if freed:
        warnings.warn(
            f"peak_bytes: step freed {readable_bytes(freed)} that stood before it, so the result "
            "is not what step needs by itself; free that memory before the call or at the end of "
            "step (zero_grad after the optimizer's step, not before the forward)",
            UserWarning,
            stacklevel=3,
        )
    if used := {device.index for device, _, _ in events if device.type == "cuda"}:
        return sum(torch.cuda.max_memory_allocated(i) - before.get(i, 0) for i in used)
    return peak


def allocations(step: Callable[[], object]) -> list[_Event]:
    """List device, address and signed size of each allocation and release during step()."""
    profiler = profile(use_cpu=True, profile_memory=True)
    collecting, running = gc.isenabled(), False
    with _silent_stderr():
        unknown = torch.empty(1)
        profiler.__enter__()
        del unknown  # makes the allocator warn of unrecorded memory now, while stderr is silent
    try:
        gc.disable()
        torch._C._autograd._enable_record_function(False)  # record allocations, not operators
        step()
    finally:
        torch._C._autograd._enable_record_function(True)
        if collecting:
            gc.enable()
        running = torch._C._autograd._profiler_enabled()
        if running:
            with _silent_stderr():
                profiler.__exit__(None, None, None)
    if not running:
        raise RuntimeError(
            "peak_bytes: step runs a profiler of its own, and PyTorch allows only one at a time; "
            "pass a step without it"
        )
    return _events(profiler)


def _events(profiler: profile) -> list[_Event]:
    assert profiler.kineto_results is not None
    pending = list(reversed(profiler.kineto_results.experimental_event_tree()))
    found = []
    while pending:
        event = pending.pop()
        if event.tag == _EventType.Allocation:
            fields: Any = event.extra_fields
            found.append((event.start_time_ns, fields.device, fields.ptr, fields.alloc_size))
        pending.extend(reversed(event.children))
    found.sort(key=lambda entry: entry[0])  # stable: within one clock tick the tree has the order
    return [entry[1:] for entry in found]


def _follow(events: list[_Event], stood: dict[tuple[torch.device, int], int]) -> tuple[int, int]:
    """Return the peak of the running sum and the bytes freed of `stood`, which is updated."""
    own: dict[tuple[torch.device, int], int] = {}
    standing = peak = freed = 0
    for device, address, nbytes in events:
        key = device, address
        if nbytes > 0:
            own[key] = nbytes
            standing += nbytes
        elif key in own:
            standing -= own.pop(key)
        else:  # unknown to both records: the reported size may be that of an earlier allocation
            freed += stood.get(key, 0)
            standing -= stood.pop(key, 0)
        peak = max(peak, standing)
    stood.update(own)
    return peak, freed


def _held_by_python() -> list[tuple[StorageWeakRef, int]]:
    found: dict[int, tuple[StorageWeakRef, int]] = {}
    for tensor in [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]:
        for part in storage_parts(tensor):
            if part.device.type != "meta":
                reference = StorageWeakRef(part.untyped_storage())
                found[reference.cdata] = reference, part.untyped_storage().nbytes()
    return list(found.values())


@contextlib.contextmanager
def _silent_stderr() -> Iterator[None]:
    # The profiler of 2.13 announces its start and stop on the process's stderr, with times that
    # would end up in the stored output of a notebook; KINETO_LOG_LEVEL is read only once.
    if sys.stderr is not None:
        sys.stderr.flush()
    try:
        kept = os.dup(2)
    except OSError:  # a process without stderr
        yield
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
