"""The high-water mark of a step, from the allocations and releases during it."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from autograd_lib.memory.saved import storages
from autograd_lib.memory.trace import Marks, Trace, check_step
from autograd_lib.report.tables import readable_bytes

__all__ = ["peak_bytes"]


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
