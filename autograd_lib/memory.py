"""What backward keeps, counted by storage, and the high-water mark of a step.

Two questions about memory have two different instruments. *Which tensors does the forward keep
for backward, and which module asked for them?* `saved_tensors` watches every tensor that autograd
saves. *How much does one whole step need at its worst moment?* `peak_bytes` follows the
allocations themselves, so it also sees gradients, temporaries and what checkpointing recomputes.
"""

from __future__ import annotations

import contextlib
import gc
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.autograd.profiler import profile
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointFunction,
    _CachingTorchDispatchMode,
    _checkpoint_hook,
    _recomputation_hook,
)

from autograd_lib.report.tables import Row, Table, readable_bytes

__all__ = ["SavedTensors", "peak_bytes", "saved_tensors"]

_Event = tuple[torch.device, int, int]  # device, address, bytes: negative when freed
_MODULE_CALL = nn.Module.__call__.__code__
_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices", "values"),
    torch.sparse_bsr: ("crow_indices", "col_indices", "values"),
    torch.sparse_csc: ("ccol_indices", "row_indices", "values"),
    torch.sparse_bsc: ("ccol_indices", "row_indices", "values"),
}
# What `save_for_backward` and its kin set on `ctx`: autograd takes these over, hooks see them.
_HANDED_OVER = {"to_save", "saved_for_forward", "dirty_tensors", "non_differentiable"}


@dataclass(frozen=True)
class _Storage:
    """One storage by its metadata, under the first module that saved it."""

    nbytes: int
    dtype: torch.dtype
    source: str


class SavedTensors(Table):
    """What one `saved_tensors` block saved for backward: sizes only, never the tensors.

    A number read inside the block is the number so far. Prints as a table, in a notebook as HTML.

    Attributes:
        total_bytes: Bytes of activations; parameters, buffers and arguments stand in
            `parameter_bytes` and `input_bytes`.
        blind_spots: What was kept for backward where no hook sees it, one sentence each; empty
            if none was found.

    Example:
        >>> x = torch.ones(64, 16, requires_grad=True)
        >>> with saved_tensors(nn.Tanh()) as saved:
        ...     y = nn.Tanh()(x)
        >>> saved
        Saved for backward
        module                   bytes
        (no submodule)         4.0 KiB
        total                  4.0 KiB
        left out: parameters       0 B
        left out: inputs           0 B
    """

    def __init__(self, model: nn.Module) -> None:
        self._saved: dict[int, _Storage] = {}
        self._aside: dict[int, _Storage] = {}  # kept for backward where no hook sees it
        self._other_hooks: set[str] = set()
        self._parameters: set[int] = set()
        self._inputs: set[int] = set()
        # A weak reference keeps the address of a storage from being given to another one, so
        # that the address is its identity; the bytes behind it are freed all the same.
        self._references: dict[int, StorageWeakRef] = {}
        self._names: WeakKeyDictionary[nn.Module, str] = WeakKeyDictionary(
            {module: name for name, module in model.named_modules()}
        )
        self._thread = threading.get_ident()
        self._mark(self._parameters, [*model.parameters(), *model.buffers()])

    @property
    def total_bytes(self) -> int:
        """Bytes of the distinct activation storages saved during the block."""
        return sum(storage.nbytes for storage in self._activations())

    @property
    def parameter_bytes(self) -> int:
        """Bytes of the storages of parameters and buffers that were saved."""
        return sum(s.nbytes for key, s in self._saved.items() if key in self._parameters)

    @property
    def input_bytes(self) -> int:
        """Bytes of the storages of the model's arguments that were saved."""
        inputs = self._inputs - self._parameters
        return sum(s.nbytes for key, s in self._saved.items() if key in inputs)

    def by_module(self) -> dict[str, int]:
        """Activation bytes by the qualified name of the module whose code saved them first.

        The name "" stands for code in no submodule: the root's own forward, the loss.
        """
        counts: Counter[str] = Counter()
        for storage in self._activations():
            counts[storage.source] += storage.nbytes
        return dict(counts)

    def by_dtype(self) -> dict[torch.dtype, int]:
        """Activation bytes by the dtype of the tensor through which a storage was saved first."""
        counts: Counter[torch.dtype] = Counter()
        for storage in self._activations():
            counts[storage.dtype] += storage.nbytes
        return dict(counts)

    @property
    def blind_spots(self) -> list[str]:
        """One sentence for each way in which memory was kept out of sight during the block."""
        counted = self._saved.keys() | self._parameters | self._inputs
        hidden: Counter[str] = Counter()
        for key, storage in self._aside.items():
            if key not in counted:
                hidden[storage.source] += storage.nbytes
        spots = [f"{source} keeps {readable_bytes(n)} unseen" for source, n in hidden.items() if n]
        return spots + [
            f"{name} stood in for the counting hooks, and what it keeps is not seen"
            for name in sorted(self._other_hooks)
        ]

    def _activations(self) -> Iterable[_Storage]:
        left_out = self._parameters | self._inputs
        return [storage for key, storage in self._saved.items() if key not in left_out]

    def _identify(self, storage: torch.UntypedStorage) -> int:
        reference = StorageWeakRef(storage)
        return self._references.setdefault(reference.cdata, reference).cdata

    def _mark(self, keys: set[int], values: Any) -> None:
        for tensor in _tensors(values):
            keys.update(self._identify(part.untyped_storage()) for part in _parts(tensor))

    def _record(self, tensor: Tensor) -> None:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            key = self._identify(storage)
            if key not in self._saved:
                self._saved[key] = _Storage(storage.nbytes(), part.dtype, self._module())
        # Not only those of `model`: FSDP computes with gathered parameters of its own, lazy
        # modules get theirs in the first forward, and a loss may have some.
        if isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter):
            self._mark(self._parameters, tensor)

    def _record_aside(self, source: str, values: Any) -> None:
        if threading.get_ident() != self._thread:
            return
        for tensor in _tensors(values):
            for part in _parts(tensor):
                storage = part.untyped_storage()
                kept = _Storage(storage.nbytes(), part.dtype, source)
                self._aside.setdefault(self._identify(storage), kept)

    def _record_hooks(self, hooks: object) -> None:
        if threading.get_ident() == self._thread:
            self._other_hooks.add(type(hooks).__qualname__)

    def _module(self) -> str:
        # Reading the stack, where forward hooks on every module would do as well in eager mode,
        # leaves compiled code alone: Dynamo would trace such hooks in, and keep them.
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            if frame.f_code is _MODULE_CALL:
                name = self._names.get(frame.f_locals["self"])
                if name is not None:
                    return name
            frame = frame.f_back
        return ""

    def _table(self) -> tuple[str, Row, list[Row]]:
        rows: list[Row] = [
            (name or "(no submodule)", readable_bytes(n)) for name, n in self.by_module().items()
        ]
        rows += [
            ("total", readable_bytes(self.total_bytes)),
            ("left out: parameters", readable_bytes(self.parameter_bytes)),
            ("left out: inputs", readable_bytes(self.input_bytes)),
        ]
        rows += [(f"not seen: {spot}", "") for spot in self.blind_spots]
        return "Saved for backward", ("module", "bytes"), rows


@contextlib.contextmanager
def saved_tensors(model: nn.Module) -> Iterator[SavedTensors]:
    r"""Count the bytes that autograd saves for backward while the block runs.

    Each distinct storage counts once, in full, even if only a view of it was saved, even if it
    was freed again within the block. Storages of parameters, buffers and the arguments of
    `model` (nested in lists, tuples and dicts too) are saved but not activations: they stand in
    `parameter_bytes` and `input_bytes`.

    For a chain of $n$ layers $h_{i+1} = \tanh(h_i)$ the total is $n$ times the bytes of $h$:
    the derivative $1 - \tanh^2$ is computed from the output.

    How it hooks: `torch.autograd.graph.saved_tensors_hooks` on this thread (hooks that stand
    around the block are called too), one forward pre-hook on `model`, run first, and watchers on
    PyTorch's own classes for the blind spots; all are gone when the block ends, also by an
    exception. Only sizes are kept. Results are bit-equal, and the check that a saved tensor was
    not modified in place, which PyTorch gives up under such hooks, is made here instead.

    What it cannot see:

    - The cache of selective activation checkpointing, tensors that a custom Function sets on
      `ctx` as attributes, and what other saved-tensor hooks (`save_on_cpu`) put in place of the
      tensor. These are detected, listed in `blind_spots`, and warned of as the block ends.
    - Tensors in an object or closure that a custom Function or a tensor hook holds, or in a
      container filled after it was set on `ctx`; the `saved_data` of C++ Functions; other
      threads; the few bytes of Python numbers; tensors in oneDNN's own layout.
    - What checkpointing recomputes in backward: only the inputs of its regions are counted.
    - In compiled code, which module saved what: a graph counts under the module that called it.
      Pass what you call: the arguments of a `model` called inside a compiled function are not
      known as such, and count as activations (and compiling it inside the block costs one more
      compilation after it).

    `torch.func.grad` and its kin raise PyTorch's own error inside the block, as they do under
    any saved-tensor hooks. Read back in backward, a saved parameter is a plain tensor, without
    attributes that were set on it in Python.

    Args:
        model: The module whose parameters, buffers and arguments are not activations, and whose
            submodules give the names.

    Yields:
        A `SavedTensors`, which stays readable after the block and the model are gone.

    Raises:
        TypeError: `model` is not a module.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
        >>> with saved_tensors(model) as saved:
        ...     loss = model(torch.ones(5, 3)).sum()
        >>> saved.total_bytes  # the output of tanh: 5 * 4 * 4 bytes
        80
        >>> saved.by_module(), saved.input_bytes, saved.parameter_bytes
        ({'1': 80}, 60, 32)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"saved_tensors: expected a torch.nn.Module, got {type(model).__name__}; pass the "
            "model itself (its arguments and parameters are left out of the count) and call it "
            "inside the block"
        )
    saved = SavedTensors(model)
    try:
        with _watch(saved), _note_arguments(model, saved), _hooks(saved):
            yield saved
    finally:
        saved._references.clear()
    if spots := saved.blind_spots:
        warnings.warn(
            f"saved_tensors: total_bytes is less than what is kept: {'; '.join(spots)}. "
            "peak_bytes(step) counts all of it",
            UserWarning,
            stacklevel=3,
        )


class _CountingHooks(saved_tensors_hooks):
    """The hooks of this module, told apart from those of others."""


def _hooks(saved: SavedTensors) -> _CountingHooks:
    """Count, then pass on to the hooks that stand around the block (PyTorch calls only one)."""
    around = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if around is not None and around[1] is not _unpack:
        saved._other_hooks.add(f"{around[0].__qualname__} (around the block)")

    record = WeakMethod(saved._record)  # the graph keeps `pack`

    def pack(tensor: Tensor) -> Any:
        if (count := record()) is not None:
            count(tensor)
        if around is not None:
            return around[0](tensor)
        # The tensor itself would be a cycle where it is the output of the node that saves it.
        return tensor.detach(), tensor._version

    if "torch._dynamo" in sys.modules:  # else a frame that runs uncompiled has `pack` compiled
        pack = torch.compiler.disable(pack)
    return _CountingHooks(pack, _unpack if around is None else around[1])


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    # Autograd compares versions only where no hooks stand; detach() shares the version counter.
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an "
            f"inplace operation: [{tensor.type()} {list(tensor.shape)}] is at version "
            f"{tensor._version}; expected version {version} instead. Hint: enable anomaly "
            "detection to find the operation that failed to compute its gradient, with "
            "torch.autograd.set_detect_anomaly(True)."
        )
    return tensor


@contextlib.contextmanager
def _note_arguments(model: nn.Module, saved: SavedTensors) -> Iterator[None]:
    """Mark the arguments of every call of `model` as inputs."""
    compiled = model._compiled_call_impl
    if compiled is not None:  # after model.compile() module hooks are ignored

        def call(*args: Any, **kwargs: Any) -> Any:
            saved._mark(saved._parameters, [*model.parameters(), *model.buffers()])
            saved._mark(saved._inputs, (args, kwargs))
            return compiled(*args, **kwargs)

        model._compiled_call_impl = call
        try:
            yield
        finally:
            model._compiled_call_impl = compiled
        return

    def note(_: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():  # a graph compiled in the block keeps no trace of it
            # under torch.func.functional_call these are not those that the block began with
            saved._mark(saved._parameters, [*model.parameters(), *model.buffers()])
            saved._mark(saved._inputs, (args, kwargs))

    handle = model.register_forward_pre_hook(note, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


_watchers: list[SavedTensors] = []
_unwatch = contextlib.ExitStack()
_lock = threading.Lock()


@contextlib.contextmanager
def _watch(saved: SavedTensors) -> Iterator[None]:
    """Watch for memory kept where hooks are blind; the last block to end stops the watching."""
    with _lock:
        if not _watchers:
            _replace(BackwardCFunction, "__setattr__", _setattr_on_ctx)
            _replace(_CachingTorchDispatchMode, "__exit__", _exit_selective_checkpoint)
            _replace(saved_tensors_hooks, "__enter__", _enter_hooks)
        _watchers.append(saved)
    try:
        yield
    finally:
        with _lock:
            _watchers.remove(saved)
            if not _watchers:
                _unwatch.close()


def _replace(owner: type, name: str, watcher: Callable[..., Any]) -> None:
    original = getattr(owner, name)

    def method(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        watcher(self, *args)
        return result

    if name in vars(owner):
        _unwatch.callback(setattr, owner, name, original)
    else:
        _unwatch.callback(delattr, owner, name)
    setattr(owner, name, method)


def _setattr_on_ctx(ctx: Any, name: str, value: Any) -> None:
    # Reentrant checkpointing keeps the state of the random number generator, not an activation.
    if name not in _HANDED_OVER and ctx._forward_cls is not CheckpointFunction:
        for saved in list(_watchers):
            saved._record_aside(f"{ctx._forward_cls.__qualname__} on its ctx", value)


def _exit_selective_checkpoint(mode: Any, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    entries = tree_leaves([list(_values(cached)) for cached in mode.storage.values()])
    for saved in list(_watchers):
        saved._record_aside(
            "the cache of selective checkpointing", [getattr(e, "val", None) for e in entries]
        )


def _enter_hooks(hooks: saved_tensors_hooks) -> None:
    # Checkpointing keeps nothing through its hooks but the inputs of the region, which are seen.
    if not isinstance(hooks, (_CountingHooks, _checkpoint_hook, _recomputation_hook)):
        for saved in list(_watchers):
            saved._record_hooks(hooks)


def _values(cached: Any) -> Iterable[Any]:
    return cached.values() if isinstance(cached, dict) else cached


def _tensors(values: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor))


def _parts(tensor: Tensor) -> Iterator[Tensor]:
    """The tensors with a storage that `tensor` consists of: itself, unless sparse or a wrapper."""
    if nn.parameter.is_lazy(tensor) or tensor.is_mkldnn:
        return
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # under vmap
        yield from _parts(torch._C._functorch.get_unwrapped(tensor))
    elif is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            if isinstance(part := getattr(tensor, name), Tensor):  # a DTensor lists its mesh too
                yield from _parts(part)
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout in _COMPRESSED:
        yield from (getattr(tensor, name)() for name in _COMPRESSED[tensor.layout])
    else:
        yield tensor


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


# PyTorch's profiler and the process's stderr exist once: threads take turns. A call from within
# `step` gets past this, to the error that it deserves.
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
    _follow(_allocations(warm_up), stood)
    before: dict[int, int] = {}
    for device in range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0):
        if torch.cuda.memory_reserved(device):  # a device left alone gets no context from here
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            before[device] = torch.cuda.memory_allocated(device)
    held = _held_by_python()
    events = _allocations(step)
    peak, freed = _follow(events, stood)
    # The CPU's allocator does not report memory freed that it gave out before any profiling.
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


def _allocations(step: Callable[[], object]) -> list[_Event]:
    """Device, address and signed size of each allocation and release during step(), in order."""
    profiler = profile(use_cpu=True, profile_memory=True)
    collecting, running = gc.isenabled(), False
    with _silent_stderr():
        unknown = torch.empty(1)
        profiler.__enter__()
        del unknown  # draws the allocator's first remark on memory that it has no record of
    try:
        gc.disable()
        torch._C._autograd._enable_record_function(
            False
        )  # allocations only: operators are not needed
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
    """Peak of the running sum and bytes freed of what `stood`; `stood` is brought up to date."""
    own: dict[tuple[torch.device, int], int] = {}
    standing = peak = freed = 0
    for device, address, nbytes in events:
        key = device, address
        if nbytes > 0:
            own[key] = nbytes
            standing += nbytes
        elif key in own:
            standing -= own.pop(key)
        else:  # of what stood earlier still, the reported size may be that of a former tenant
            freed += stood.get(key, 0)
            standing -= stood.pop(key, 0)
        peak = max(peak, standing)
    stood.update(own)
    return peak, freed


def _held_by_python() -> list[tuple[StorageWeakRef, int]]:
    found: dict[int, tuple[StorageWeakRef, int]] = {}
    for tensor in [o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter)]:
        for part in _parts(tensor):
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
