"""Following NaN and Inf through one step: where each was made, and what became of it.

A `TorchDispatchMode` sees every ATen operation, forward and backward, with its real inputs and
outputs. Each storage carries a mark: which event first put a NaN or an Inf there. A mark is a
hint, so that a finite tensor costs one sum; whether a tensor really holds the value is then read
from the tensor itself.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
import operator
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from traceback import walk_stack
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from autograd_lib.core.names import parameters_by_name, readable
from autograd_lib.core.snapshot import is_replay
from autograd_lib.nonfinite.report import BLANK, OUTSIDE, UNLINKED, NonFinite
from autograd_lib.nonfinite.values import Operand, kinds, named_tensors, real_values

_MODULE_CALL = nn.Module.__call__.__code__
_ENGINE = _engine_run_backward.__code__
_CHECKPOINT = checkpoint.__file__
_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_INTERNAL = os.path.dirname(torch.__file__) + os.sep, _PACKAGE + os.sep
_COLLECTIVES = "c10d", "_c10d"  # what their names begin with
_NO_TASK = -1  # the number of the backward that runs, if none does
_UNINITIALIZED = re.compile(r"aten\.(new_)?(empty|resize)")  # memory that nobody has written yet
_MADE, _DATA, _BEFORE = range(3)  # which to report first where several NaN meet
_NEVER = math.inf


class _Origin(NamedTuple):
    """An event that put a NaN or an Inf into a tensor."""

    order: int
    culprit: NonFinite
    # Written down as such: a mask filled with -inf, memory that nobody has filled yet. What turns
    # it into a NaN is the culprit, not this.
    meant: bool
    # Code may look past a NaN in a target or a buffer, so what the step itself made goes before
    # it (`_DATA`), and last a gradient from before the step. A parameter counts as `_MADE`.
    source: int = _MADE
    surfaced: float = _NEVER  # the event in which a NaN came of it


# The events that first put a NaN and an Inf into a storage, by kind.
_Origins = dict[str, _Origin]


class _Input(NamedTuple):
    """A tensor given to an operation, as it was before the operation ran."""

    name: str  # empty where the tensor is only written to
    tensor: Tensor
    written: bool
    origins: _Origins
    before: Operand | None  # taken in advance where the operation may overwrite it


class _CollectiveError(Exception):
    """A step that this process runs alone asked others to take part."""


def observe(
    model: nn.Module, step: Callable[[], object], raised: Exception | None = None
) -> NonFinite | None:
    """Run `step` once, uncompiled; name what first made a NaN, or an Inf with consequences.

    If `step` raises, what was seen until then is noted on the exception, which passes. Given the
    exception of an earlier run, that one gets the note if it comes again, and nothing passes; the
    step then runs on this process alone, as far as it gets without another one.
    """
    observer = _Observer(model, raised is not None)
    inner, wrappers = model, (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while isinstance(inner, wrappers) or "_orig_mod" in inner._modules:
        inner = next(inner.children())
    hook = inner.register_forward_pre_hook(observer.note_arguments, with_kwargs=True, prepend=True)
    # Without torch._dynamo, which takes seconds to import, nothing can have been compiled.
    dynamo = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if dynamo else contextlib.nullcontext()
    token = is_replay.set(True)
    try:
        # On one thread sequence numbers are unique, and the stack shows who called backward.
        alone = contextlib.nullcontext() if raised is None else _alone(model)
        with eager, torch.autograd.set_multithreading_enabled(False), alone, observer:
            result = step()
    except Exception as error:
        again = raised is None or isinstance(error, type(raised) | _CollectiveError)
        if again and (guess := observer.guess) is not None:
            (error if raised is None else raised).add_note(str(guess.culprit._located()))
        if raised is not None:
            return None
        raise
    finally:
        is_replay.reset(token)
        hook.remove()
    return observer.conclude(result)


@contextlib.contextmanager
def _alone(model: nn.Module) -> Iterator[None]:
    """Pass by the forward of `DistributedDataParallel`, which needs the other processes."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if isinstance(module, nn.parallel.DistributedDataParallel):
                stack.enter_context(mock.patch.object(module, "forward", partial(module.module)))
        yield


def outcome(model: nn.Module, result: object) -> NonFinite | None:
    """The first among the numbers in `result` and the gradients of `model` that is not finite."""
    for name, tensor in _results(model, result):
        for kind in kinds(tensor):
            return NonFinite("backward" if name else "forward", kind, name=name)
    return None


def _results(model: nn.Module, result: object) -> Iterator[tuple[str, Tensor]]:
    """Every loss, without a name, and every gradient, with the name of its parameter."""
    for leaf in tree_leaves(result):
        if isinstance(leaf, Tensor | float):
            yield "", leaf if isinstance(leaf, Tensor) else torch.tensor(leaf, dtype=torch.float64)
    for name, parameter in parameters_by_name(model).items():
        if parameter.grad is not None:
            yield name, parameter.grad


class _Observer(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, alone: bool) -> None:
        super().__init__()
        self._model, self._alone = model, alone
        self._names = {id(module): readable(name) for name, module in model.named_modules()}
        self.guess: _Origin | None = None  # where no loss and no gradient tells more
        self._order = itertools.count()
        self._marks: dict[int, _Origins] = {}
        # A weak reference keeps the address of a storage from being given to another one.
        self._references: dict[int, StorageWeakRef] = {}
        # By the sequence number of a node of the graph, then by the plain name of the operation.
        self._sites: dict[int, dict[str, NonFinite]] = {}
        self._roots: dict[int, list[Tensor]] = {}  # what each backward started from
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            module, _, _ = readable(name).rpartition(".")
            given = NonFinite("parameter", module=module, name=readable(name))
            trained = isinstance(tensor, nn.Parameter)
            self._note(tensor, given, _MADE if trained else _DATA)
            if trained and tensor.grad is not None:
                before = "the gradient held it before the step"
                given = NonFinite("backward", name=given.name, detail=before)
                self._note(tensor.grad, given, _BEFORE)

    # --- what comes from outside

    def note_arguments(self, root: nn.Module, args: Any, kwargs: Any) -> None:
        try:
            bound = inspect.signature(root.forward).bind(*args, **kwargs).arguments
        except TypeError:
            return  # the call is about to raise this itself
        # Within torch.func even reading a plain tensor would wrap it.
        with _disable_current_modes(), torch._C._DisableFuncTorch():
            for name, argument in bound.items():
                for path, leaf in tree_flatten_with_path(argument)[0]:
                    if isinstance(leaf, Tensor):
                        self._note(leaf, NonFinite("input", name=f"{name}{keystr(path)}"), _DATA)

    def _note(self, tensor: Tensor, given: NonFinite, source: int) -> None:
        """Mark what `tensor` holds as given, unless an operation of the step has made it."""
        found = self._given(tensor, given, source)
        for values in real_values(tensor):
            mark = self._marks.setdefault(self._identify(values), {})
            for kind, origin in found.items():
                if kind not in mark or mark[kind].meant:
                    mark[kind] = origin
                    if kind == "nan" and source != _BEFORE:
                        self._consider(origin)

    def _given(
        self, tensor: Tensor, given: NonFinite, source: int, meant: Sequence[str] = ()
    ) -> _Origins:
        """The origins of what no observed operation has made; those of kinds in `meant` are."""
        if held := kinds(tensor):
            given = given._replace(inputs=(Operand.of(given.name, tensor),))
        return {
            kind: _Origin(next(self._order), given._replace(kind=kind), kind in meant, source)
            for kind in held
        }

    def _first_sight(self, site: NonFinite, name: str, values: Tensor) -> _Origins:
        """The origins of a tensor that no observed operation has made: a target, a constant."""
        if site.phase == "backward":
            return self._given(values, _unseen(site), _DATA, ["nan", "inf"])
        if site.op.startswith("aten.lift_fresh"):  # torch.tensor(...), within the step
            return self._given(values, site, _DATA, ["nan", "inf"])
        return self._given(values, NonFinite("input", name=name, detail=OUTSIDE), _DATA, ["inf"])

    def _consider(self, origin: _Origin) -> None:
        there = filter(None, [self.guess, origin])
        self.guess = min(there, key=lambda o: (o.surfaced == _NEVER, o.source, o.order))

    # --- one operation

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._alone and str(func).startswith(_COLLECTIVES):
            raise _CollectiveError
        task = torch._C._current_graph_task_id()
        if task not in self._roots:
            self._roots[task] = _roots()
        site, blank = self._site(func), _UNINITIALIZED.match(str(func))
        given = () if blank else named_tensors(func, args, kwargs)
        inputs = [self._input(site, *entry) for entry in given]
        result = func(*args, **kwargs)
        numbers = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, float)]
        literal = not all(map(math.isfinite, numbers))
        results = tree_leaves(result)
        if str(func).startswith("aten._ctc_loss."):  # its last result is partly never written
            self._marks.update((self._identify(v), {}) for v in real_values(results.pop()))
        self._mark_outputs(site, inputs, results, literal)
        return result

    def _input(self, site: NonFinite, name: str, tensor: Tensor, written: bool) -> _Input:
        origins: _Origins = {}
        for values in real_values(tensor) if name else ():
            key = self._identify(values)
            if key not in self._marks:
                self._marks[key] = self._first_sight(site, name, values)
            mark = self._marks[key]
            for kind in kinds(values) if mark else ():
                if kind in mark:
                    origins.setdefault(kind, mark[kind])
        before = Operand.of(name, tensor) if name and written else None
        return _Input(name, tensor, written, origins, before)

    def _mark_outputs(
        self, site: NonFinite, inputs: Sequence[_Input], results: Iterable[object], literal: bool
    ) -> None:
        written = [entry.tensor for entry in inputs if entry.written]
        overwritten = {self._identify(v) for tensor in written for v in real_values(tensor)}
        outputs = [*written, *(leaf for leaf in results if isinstance(leaf, Tensor))]
        made: _Origins = {}
        for values in itertools.chain(*map(real_values, outputs)):
            key = self._identify(values)
            if key in self._marks and key not in overwritten:
                continue  # a view: nothing new was computed
            mark = self._marks.setdefault(key, {})
            for kind in kinds(values):
                if kind not in made:
                    made[kind] = self._origin(kind, site, inputs, literal)
                whole = values.numel() * values.itemsize == values.untyped_storage().nbytes()
                origin = None if whole else _earliest(made[kind], mark.get(kind))
                mark[kind] = origin or made[kind]

    def _origin(
        self, kind: str, site: NonFinite, inputs: Sequence[_Input], literal: bool
    ) -> _Origin:
        """The event to which a NaN or an Inf in the result of an operation goes back."""
        became = ""
        origin = _earliest(*(entry.origins.get(kind) for entry in inputs))
        if origin is None and kind == "nan":
            infinite = [entry.origins.get("inf") for entry in inputs]
            origin = _earliest(*(o for o in infinite if o and not o.meant))
            became = f"its Inf becomes a NaN in {_by(site)}" if origin else ""
        origin = origin or self._made(kind, site, inputs, literal)
        if kind == "nan" and not origin.meant and origin.surfaced == _NEVER:
            culprit = origin.culprit
            if culprit.phase in ("parameter", "input"):  # it surfaced here, under this name
                names = [i.name for i in inputs if any(o is origin for o in i.origins.values())]
                if culprit.detail == OUTSIDE and names:
                    operands = tuple(given._replace(name=names[0]) for given in culprit.inputs)
                    culprit = culprit._replace(name=names[0], inputs=operands)
                module = culprit.module if culprit.phase == "parameter" else site.module
                culprit = culprit._replace(module=module, op=site.op, place=site.place)
            culprit = culprit._replace(detail=became or culprit.detail)
            origin = origin._replace(culprit=culprit, surfaced=next(self._order))
            self._consider(origin)
        return origin

    def _made(self, kind: str, site: NonFinite, inputs: Sequence[_Input], literal: bool) -> _Origin:
        operands = tuple(i.before or Operand.of(i.name, i.tensor) for i in inputs if i.name)
        culprit = site._replace(kind=kind, inputs=operands)
        if _UNINITIALIZED.match(_by(site)):
            culprit, literal = culprit._also(BLANK), True
        elif site.op.startswith(_COLLECTIVES) or any(
            kind in kinds(entry.tensor) for entry in inputs if not entry.written
        ):
            culprit, literal = _unseen(culprit), True
        return _Origin(next(self._order), culprit, literal)

    # --- where it runs

    def _site(self, func: Any) -> NonFinite:
        """Where in the program an operation runs: module, line, and forward or backward.

        In backward only what runs inside it counts: a checkpoint, a custom Function, a hook.
        """
        node = torch._C._current_autograd_node()
        backward = torch._C._current_graph_task_id() != _NO_TASK
        forward = None if node is None else self._forward_site(node)
        module, place, recomputed = "", None, False
        for frame, line in walk_stack(sys._getframe(1)):
            code = frame.f_code
            if (code is _ENGINE) if backward else (module and place):
                break
            if code is _MODULE_CALL:
                module = module or self._names.get(id(frame.f_locals["self"]), "")
            elif code.co_filename == _CHECKPOINT:
                recomputed = backward
            elif place is None and not code.co_filename.startswith(_INTERNAL):
                place = code.co_filename, line
        place = place or (forward.place if forward else ("", 0))
        if not backward or recomputed:
            site = NonFinite("forward", "", module, str(func), "", place)
        elif forward:
            site = forward._replace(phase="backward", backward_op=str(func), place=place)
        else:
            name = "" if node is None else node.name().rpartition("::")[2]
            site = NonFinite("backward", "", module, name, str(func), place)
        if site.phase == "forward" or torch.is_grad_enabled():
            # Autograd numbers its nodes; an operation runs right after its node was numbered.
            number = torch._C._autograd._get_sequence_nr() - 1
            kin = _plain(func.__name__.partition(".")[0])
            self._sites.setdefault(number, {}).setdefault(kin, site)
        return site

    def _forward_site(self, node: Any) -> NonFinite | None:
        """Where the forward operation of a node of the graph ran."""
        number = node._sequence_nr()
        if node.name().endswith("CopySlices"):
            # An operation in place on a view: this node stands around the one of the operation,
            # which may have cloned what it overwrites first.
            return next(reversed(self._sites.get(number - 1, {}).values()), None)
        kin = _plain(re.sub(r"Backwards?\d*$", "", node.name()))
        # Under torch.func an operation has a node for each level, and ran after the last of them.
        levels = [self._sites.get(number + level, {}) for level in range(4)]
        named = (sites[kin] for sites in levels if kin in sites)
        site = next(named, None) or next(iter(levels[0].values()), None)
        function = getattr(node, "_forward_cls", None)  # of a custom Function
        return site._replace(op=function.__name__) if site and function else site

    def _identify(self, values: Tensor) -> int:
        reference = StorageWeakRef(values.untyped_storage())
        return self._references.setdefault(reference.cdata, reference).cdata

    # --- after the step

    def conclude(self, result: object) -> NonFinite | None:
        """The first event whose NaN, or else whose Inf, is in the loss or in a gradient."""
        losses = [*tree_leaves(result), *itertools.chain(*self._roots.values())]
        final, guess = outcome(self._model, losses), self.guess and self.guess.culprit
        if final is None:
            return guess and guess._also("it reaches neither the loss nor a gradient")
        carried = min(self._carried(losses), default=None, key=operator.itemgetter(0))
        if carried is not None and (guess is None or not carried[0][0]):
            return carried[1]._also(carried[2])
        where = _where(final.name)
        if guess is not None:
            return guess._also(f"{where} is not finite, but {UNLINKED}")
        return final._replace(detail=f"{where} holds it, but no observed operation made it")

    def _carried(self, losses: Iterable[object]) -> Iterator[tuple[Any, NonFinite, str]]:
        """The events whose NaN or Inf the loss and the gradients hold: rank, culprit and note."""
        for name, tensor in _results(self._model, losses):
            for kind, values in itertools.product(kinds(tensor), real_values(tensor)):
                o = self._marks.get(self._identify(values), {}).get(kind)
                if o is not None:
                    # Tensors with no observed writer rank last.
                    dark = o.meant and o.culprit._is_unmade()
                    is_inf = kind == "inf"
                    key = (dark, o.source == _BEFORE, o.meant, is_inf, o.order, o.surfaced)
                    note = f"it reaches {_where(name)}" if is_inf or o.meant else ""
                    yield key, o.culprit, note


def _where(name: str) -> str:
    return f"the gradient of {name!r}" if name else "the loss"


def _roots() -> list[Tensor]:
    """What the outermost backward that runs started from: the loss."""
    engines = [frame for frame, _ in walk_stack(sys._getframe()) if frame.f_code is _ENGINE]
    roots = engines[-1].f_locals["t_outputs"] if engines else ()
    return [root.detach() for root in roots if isinstance(root, Tensor)]


def _earliest(*origins: _Origin | None) -> _Origin | None:
    """The first event; intended ones come last, and data after what the step made."""
    rank = operator.attrgetter("meant", "source", "order", "surfaced")
    return min(filter(None, origins), key=rank, default=None)


def _by(site: NonFinite) -> str:
    """The operation that ran."""
    return site.backward_op or site.op


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _unseen(culprit: NonFinite) -> NonFinite:
    detail = f"it came with {_by(culprit)} from another process, or by no operation of PyTorch"
    return culprit._replace(op="", detail=detail)
