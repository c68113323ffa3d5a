"""Which tensors a forward saves for backward, counted by storage, module and dtype."""

from __future__ import annotations

import contextlib
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from traceback import walk_stack
from typing import Any
from weakref import WeakKeyDictionary, WeakMethod

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointFunction,
    _CachingTorchDispatchMode,
    _checkpoint_hook,
    _recomputation_hook,
)

from autograd_lib.gradients import check_module
from autograd_lib.report.tables import Row, Table, readable_bytes

__all__ = ["SavedTensors", "saved_tensors"]

_MODULE_CALL = nn.Module.__call__.__code__
# What `save_for_backward` and similar methods set on `ctx`: saved-tensor hooks see these tensors.
_HANDED_OVER = {"to_save", "saved_for_forward", "dirty_tensors", "non_differentiable"}


@dataclass(frozen=True)
class _Storage:
    """One storage by its metadata, under the first module that saved it."""

    nbytes: int
    dtype: torch.dtype
    source: str


class SavedTensors(Table):
    """What one `saved_tensors` block saved for backward: sizes only, never the tensors.

    Inside the block, numbers are those so far. Prints as a table, in a notebook as HTML.

    Attributes:
        total_bytes: Bytes of activations; parameters, buffers and arguments are counted in
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
        # A weak reference prevents reuse of a storage's address, so that the address identifies
        # it; its bytes are freed all the same.
        self._references: dict[int, StorageWeakRef] = {}
        self._names = WeakKeyDictionary({m: name for name, m in model.named_modules()})
        self._thread = threading.get_ident()
        self._mark_parameters(model)

    @property
    def total_bytes(self) -> int:
        """Bytes of the distinct activation storages saved during the block."""
        return sum(self.by_module().values())

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
        return self._count(self._saved, "source")

    def by_dtype(self) -> dict[torch.dtype, int]:
        """Activation bytes by the dtype of the tensor through which a storage was saved first."""
        return self._count(self._saved, "dtype")

    @property
    def blind_spots(self) -> list[str]:
        """One sentence for each kind of memory kept for backward where no hook sees it."""
        unseen = {key: storage for key, storage in self._aside.items() if key not in self._saved}
        hidden = self._count(unseen, "source")
        spots = [f"{source} keeps {readable_bytes(n)} unseen" for source, n in hidden.items() if n]
        return spots + [
            f"{name} took the place of the counting hooks, and what it keeps is not seen"
            for name in sorted(self._other_hooks)
        ]

    def _count(self, storages: dict[int, _Storage], of: str) -> dict[Any, int]:
        """Sum bytes by an attribute, without those of parameters and inputs."""
        counts = Counter[Any]()
        for key, storage in storages.items():
            if key not in self._parameters and key not in self._inputs:
                counts[getattr(storage, of)] += storage.nbytes
        return dict(counts)

    def _parts(self, values: Any) -> Iterator[tuple[int, Tensor]]:
        """Yield what holds the data of the tensors in `values`, with an identity of its storage."""
        for part in storage_parts(values):
            reference = StorageWeakRef(part.untyped_storage())
            yield self._references.setdefault(reference.cdata, reference).cdata, part

    def _mark_parameters(self, model: nn.Module) -> None:
        own = self._parts([*model.parameters(), *model.buffers()])
        self._parameters.update(key for key, _ in own)

    def _record(self, tensor: Tensor) -> None:
        # Parameters may be unknown until now: FSDP gathers its own, lazy modules make theirs in
        # the first forward, and a loss may have some.
        is_parameter = isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
        for key, part in self._parts(tensor):
            if key not in self._saved:
                nbytes = part.untyped_storage().nbytes()
                self._saved[key] = _Storage(nbytes, part.dtype, self._module())
            if is_parameter:
                self._parameters.add(key)

    def _record_aside(self, source: str, values: Any) -> None:
        for key, part in self._parts(values):
            kept = _Storage(part.untyped_storage().nbytes(), part.dtype, source)
            self._aside.setdefault(key, kept)

    def _module(self) -> str:
        # Read the stack rather than hook every module: Dynamo would trace the hooks into compiled
        # code, and keep them.
        for frame, _ in walk_stack(sys._getframe(1)):
            if frame.f_code is _MODULE_CALL and frame.f_locals["self"] in self._names:
                return self._names[frame.f_locals["self"]]
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
    check_module("saved_tensors", model)
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
    """The counting hooks, a class of their own to distinguish them from other code's hooks."""


def _hooks(saved: SavedTensors) -> _CountingHooks:
    """Count, then call the hooks that were set around the block (PyTorch calls only the top)."""
    around = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if around is not None and around[1] is not _unpack:
        saved._other_hooks.add(f"{around[0].__qualname__} (around the block)")

    record = WeakMethod(saved._record)  # the graph keeps `pack`

    def pack(tensor: Tensor) -> Any:
        if (count := record()) is not None:
            count(tensor)
        if around is not None:
            return around[0](tensor)
        # An output saved by its own node would form a reference cycle; its detached alias does not.
        return tensor.detach(), tensor._version

    if "torch._dynamo" in sys.modules:  # else Dynamo may compile `pack` within an eager frame
        pack = torch.compiler.disable(pack)
    return _CountingHooks(pack, _unpack if around is None else around[1])


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    # Autograd does not compare versions under hooks; detach() shares the version counter.
    tensor, version = packed
    if tensor._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an "
            f"inplace operation: [{tensor.type()} {list(tensor.shape)}] is at version "
            f"{tensor._version}; expected version {version} instead"
        )
    return tensor


@contextlib.contextmanager
def _note_arguments(model: nn.Module, saved: SavedTensors) -> Iterator[None]:
    """Mark the arguments of every call of `model` as inputs."""

    def mark(_: nn.Module, args: Any, kwargs: Any) -> None:
        if not torch.compiler.is_compiling():  # else Dynamo would keep the hook in its graph
            # Under torch.func.functional_call the parameters are not those of the block's start.
            saved._mark_parameters(model)
            saved._inputs.update(key for key, _ in saved._parts((args, kwargs)))

    compiled = model._compiled_call_impl
    with contextlib.ExitStack() as stack:
        if compiled is None:
            handle = model.register_forward_pre_hook(mark, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        else:  # module hooks are ignored after model.compile()

            def call(*args: Any, **kwargs: Any) -> Any:
                mark(model, args, kwargs)
                return compiled(*args, **kwargs)

            model._compiled_call_impl = call
            stack.callback(setattr, model, "_compiled_call_impl", compiled)
        yield


_watching: list[SavedTensors] = []
_unwatch = contextlib.ExitStack()
_lock = threading.Lock()


@contextlib.contextmanager
def _watch(saved: SavedTensors) -> Iterator[None]:
    """Watch for memory kept where no hook sees it; the last block to end removes the watchers."""
    with _lock:
        if not _watching:
            _replace(BackwardCFunction, "__setattr__", _setattr_on_ctx)
            _replace(_CachingTorchDispatchMode, "__exit__", _exit_selective_checkpoint)
            _replace(saved_tensors_hooks, "__enter__", _enter_hooks)
        _watching.append(saved)
    try:
        yield
    finally:
        with _lock:
            _watching.remove(saved)
            if not _watching:
                _unwatch.close()


def _replace(owner: type, name: str, watcher: Callable[..., Any]) -> None:
    """Call `watcher` after a method, for the record of each block that runs on the thread."""
    original = getattr(owner, name)

    def method(self: Any, *args: Any) -> Any:
        result = original(self, *args)
        for saved in list(_watching):
            if saved._thread == threading.get_ident():
                watcher(saved, self, *args)
        return result

    if name in vars(owner):
        _unwatch.callback(setattr, owner, name, original)
    else:
        _unwatch.callback(delattr, owner, name)
    setattr(owner, name, method)


def _setattr_on_ctx(saved: SavedTensors, ctx: Any, name: str, value: Any) -> None:
    # Reentrant checkpointing keeps the state of the random number generator, not an activation.
    if name not in _HANDED_OVER and ctx._forward_cls is not CheckpointFunction:
        saved._record_aside(f"{ctx._forward_cls.__qualname__} on its ctx", value)


def _exit_selective_checkpoint(saved: SavedTensors, mode: Any, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        kept = [getattr(entry, "val", None) for entry in tree_leaves(list(mode.storage.values()))]
        saved._record_aside("the cache of selective checkpointing", kept)


def _enter_hooks(saved: SavedTensors, hooks: saved_tensors_hooks) -> None:
    # Through its hooks checkpointing keeps only the inputs of its region, which are counted.
    if not isinstance(hooks, (_CountingHooks, _checkpoint_hook, _recomputation_hook)):
        saved._other_hooks.add(type(hooks).__qualname__)


def storage_parts(values: Any) -> Iterator[Tensor]:
    """Yield what holds the data of the tensors in `values`: themselves, or the parts of a tensor.

    Sparse tensors and wrapper subclasses have parts.
    """
    for tensor in tree_leaves(values):
        if not isinstance(tensor, Tensor) or nn.parameter.is_lazy(tensor) or tensor.is_mkldnn:
            continue
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # under vmap
            yield from storage_parts(torch._C._functorch.get_unwrapped(tensor))
        elif is_traceable_wrapper_subclass(tensor):
            yield from storage_parts([getattr(tensor, n) for n in tensor.__tensor_flatten__()[0]])
        elif tensor.layout is torch.sparse_coo:
            yield from (tensor._indices(), tensor._values())
        elif tensor.layout is torch.strided:
            yield tensor
        else:
            by_row = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
            names = ("crow_indices", "col_indices") if by_row else ("ccol_indices", "row_indices")
            yield from (getattr(tensor, name)() for name in (*names, "values"))


def storages(values: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storages of the tensors in `values`; one may come several times."""
    return (part.untyped_storage() for part in storage_parts(values))


def graph_of(tensor: Tensor) -> dict[Any, list[Any]]:
    """List the nodes of the graph behind a tensor, each with those it hands its gradients to."""
    found: dict[Any, list[Any]] = {}  # holds the nodes, so that each stays one Python object
    pending = [tensor.grad_fn]
    while pending:
        node = pending.pop()
        if node is not None and node not in found:
            found[node] = [following for following, _ in node.next_functions if following]
            pending += found[node]
    return found
