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
from dataclasses import dataclass
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import _engine_run_backward
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import checkpoint
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_leaves

from autograd_lib.nonfinite.values import (
    Extremes,
    Operand,
    Operator,
    extremes,
    kinds,
    named_tensors,
    operand,
    real_values,
)

_MODULE_CALL = nn.Module.__call__.__code__
_ENGINE = _engine_run_backward.__code__
_CHECKPOINT = checkpoint.__file__
_PACKAGE = os.path.dirname(os.path.dirname(__file__))
_INTERNAL = os.path.dirname(torch.__file__) + os.sep, _PACKAGE + os.sep
_NO_TASK = -1  # the number of the backward that runs, if none does
_UNINITIALIZED = re.compile(r"aten\.(new_)?(empty|resize)")  # memory that nobody has written yet
_BLANK = "no observed operation wrote to this memory"
OUTSIDE = "it came from outside the model"
UNLINKED = "no observed operation carries it there"
_MADE, _DATA, _BEFORE = range(3)  # which to report first where several NaN meet
_NEVER = math.inf


class Culprit(NamedTuple):
    """What `observe` finds; `NonFinite` says what the fields mean."""

    phase: str
    kind: str
    module: str = ""
    op: str = ""
    backward_op: str = ""
    place: tuple[str, int] = ("", 0)
    inputs: tuple[Operand, ...] = ()
    name: str = ""
    detail: str = ""

    def also(self, detail: str) -> Culprit:
        """The same with one more thing to tell."""
        return self._replace(detail="; ".join(filter(None, [self.detail, detail])))


class _Site(NamedTuple):
    """Where in the program an operation runs: the leading fields of a `Culprit`."""

    phase: str
    module: str
    op: str
    backward_op: str
    place: tuple[str, int]


class _Origin(NamedTuple):
    """An event that put a NaN or an Inf into a tensor."""

    order: int
    culprit: Culprit
    # Written down as such: a mask filled with -inf, memory that nobody has filled yet. What turns
    # it into a NaN is the culprit, not this.
    meant: bool
    # Code may look past a NaN in a target or a buffer, so what the step itself made goes before
    # it (`_DATA`), and last a gradient from before the step. A parameter counts as `_MADE`.
    source: int = _MADE
    surfaced: float = _NEVER  # the event in which a NaN came of it


@dataclass(slots=True)
class _Mark:
    """Which events first put a NaN and an Inf into a storage, if any did."""

    nan: _Origin | None = None
    inf: _Origin | None = None
    blank: bool = False  # memory that nobody has written yet


class _Input(NamedTuple):
    """A tensor given to an operation, as it was before the operation ran."""

    name: str  # empty where the tensor is only written to
    tensor: Tensor
    written: bool
    nan: _Origin | None
    inf: _Origin | None
    bounds: Extremes  # taken in advance where the operation may overwrite it


def observe(
    model: nn.Module, step: Callable[[], object], report: Callable[[Culprit], object]
) -> Culprit | None:
    """Run `step` once, uncompiled; name what first made a NaN, or an Inf with consequences.

    If `step` raises, what was seen until then is noted, as a `report`, on the exception.
    """
    observer = _Observer(model)
    hook = unwrap(model).register_forward_pre_hook(
        observer.note_arguments, with_kwargs=True, prepend=True
    )
    # Without torch._dynamo, which takes seconds to import, nothing can have been compiled.
    dynamo = "torch._dynamo" in sys.modules
    eager = torch.compiler.set_stance("force_eager") if dynamo else contextlib.nullcontext()
    try:
        # On one thread sequence numbers are unique, and the stack shows who called backward.
        with eager, torch.autograd.set_multithreading_enabled(False), observer:
            result = step()
    except Exception as error:
        if (guess := observer.guess) is not None:
            error.add_note(str(report(guess.culprit)))
        raise
    finally:
        hook.remove()
    return observer.conclude(result)


def unwrap(model: nn.Module) -> nn.Module:
    """The module that a wrapper (compiled, data parallel) was made of."""
    while True:
        if isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            return model


def readable(name: str) -> str:
    """A qualified name without what `torch.compile` puts into it."""
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def outcome(model: nn.Module, result: object) -> Culprit | None:
    """The first among the numbers in `result` and the gradients of `model` that is not finite."""
    losses = [
        (
            "",
            "forward",
            torch.tensor(leaf, dtype=torch.float64) if isinstance(leaf, float) else leaf,
        )
        for leaf in tree_leaves(result)
        if isinstance(leaf, (Tensor, float))
    ]
    grads = [
        (readable(name), "backward", parameter.grad)
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    ]
    for name, phase, tensor in losses + grads:
        nan, inf = kinds(tensor)
        if nan or inf:
            return Culprit(phase, "nan" if nan else "inf", name=name)
    return None


class _Observer(TorchDispatchMode):
    supports_higher_order_operators = True

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._names = {id(module): readable(name) for name, module in model.named_modules()}
        self.guess: _Origin | None = None  # where no loss and no gradient tells more
        self._order = itertools.count()
        self._marks: dict[int, _Mark] = {}
        # A weak reference keeps the address of a storage from being given to another one.
        self._references: dict[int, StorageWeakRef] = {}
        # By the sequence number of a node of the graph, then by the plain name of the operation.
        self._sites: dict[int, dict[str, _Site]] = {}
        self._roots: dict[int, list[Tensor]] = {}  # what each backward started from
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            self._note(tensor, "parameter", readable(name), readable(name).rpartition(".")[0])
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self._note(parameter.grad, "backward", readable(name), "")

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
                        self._note(leaf, "input", f"{name}{keystr(path)}", "")

    def _note(self, tensor: Tensor, phase: str, name: str, module: str) -> None:
        """Mark what `tensor` holds as given, unless an operation of the step has made it."""
        nan, inf = kinds(tensor)
        for values in real_values(tensor):
            mark = self._marks.setdefault(self._identify(values), _Mark())
            given = Culprit(phase, "", module, name=name)
            if phase == "backward":
                given = given._replace(detail="the gradient held it before the step")
            source = _MADE if isinstance(tensor, nn.Parameter) else _DATA
            source = _BEFORE if phase == "backward" else source
            if inf and (mark.inf is None or mark.inf.meant):
                mark.inf = self._brought(given, "inf", tensor, source)
            if nan and (mark.nan is None or mark.nan.meant):
                mark.nan = self._brought(given, "nan", tensor, source)
                if phase != "backward":
                    self._consider(mark.nan)

    def _consider(self, origin: _Origin) -> None:
        there = [origin] if self.guess is None else [self.guess, origin]
        self.guess = min(there, key=lambda o: (o.surfaced == _NEVER, o.source, o.order))

    def _brought(
        self, given: Culprit, kind: str, tensor: Tensor, source: int, meant: bool = False
    ) -> _Origin:
        operands = (operand(given.name, tensor, extremes(tensor)),)
        culprit = given._replace(kind=kind, inputs=operands)
        return _Origin(next(self._order), culprit, meant, source)

    def _first_sight(self, site: _Site, name: str, values: Tensor) -> _Mark:
        """The mark of a tensor that no observed operation has made: a target, a constant."""
        nan, inf = kinds(values)
        given = Culprit(site.phase, "", *site[1:])
        if site.phase == "backward":
            given = _unseen(given)
        elif not site.op.startswith("aten.lift_fresh"):  # torch.tensor(...), within the step
            given = Culprit("input", "", name=name, detail=OUTSIDE)
        return _Mark(
            self._brought(given, "nan", values, _DATA, given.phase != "input") if nan else None,
            self._brought(given, "inf", values, _DATA, meant=True) if inf else None,
        )

    # --- one operation

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        task = torch._C._current_graph_task_id()
        if task not in self._roots:
            self._roots[task] = _roots(sys._getframe(1)) if task != _NO_TASK else []
        site = self._site(func)
        inputs = [self._input(site, *named) for named in named_tensors(func, args, kwargs)]
        result = func(*args, **kwargs)
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if _UNINITIALIZED.match(str(func)):
            self._mark_blank(site, outputs)
        else:
            literal = any(
                isinstance(leaf, float) and not math.isfinite(leaf)
                for leaf in tree_leaves((args, kwargs))
            )
            self._mark_outputs(site, inputs, outputs, literal)
        return result

    def _input(self, site: _Site, name: str, tensor: Tensor, written: bool) -> _Input:
        if not name:
            return _Input(name, tensor, written, None, None, None)
        nan = inf = None
        blank = False
        for values in real_values(tensor):
            key = self._identify(values)
            mark = self._marks.get(key)
            if mark is None:
                mark = self._marks[key] = self._first_sight(site, name, values)
            if mark.nan or mark.inf:
                has_nan, has_inf = kinds(values)
                nan = nan or (mark.nan if has_nan else None)
                inf = inf or (mark.inf if has_inf else None)
            blank = blank or mark.blank
        bounds = extremes(tensor) if written else None
        return _Input("" if blank else name, tensor, written, nan, inf, bounds)

    def _mark_blank(self, site: _Site, outputs: Iterable[Tensor]) -> None:
        for values in itertools.chain(*map(real_values, outputs)):
            nan, inf = (
                _Origin(next(self._order), _culprit(site, kind, ()).also(_BLANK), meant=True)
                for kind in ("nan", "inf")
            )
            self._marks[self._identify(values)] = _Mark(nan, inf, blank=True)

    def _mark_outputs(
        self, site: _Site, inputs: Sequence[_Input], outputs: Sequence[Tensor], literal: bool
    ) -> None:
        written = [entry.tensor for entry in inputs if entry.written]
        overwritten = {self._identify(v) for tensor in written for v in real_values(tensor)}
        nan_origin = inf_origin = None
        for values in itertools.chain(*map(real_values, [*written, *outputs])):
            key = self._identify(values)
            mark = self._marks.get(key)
            if mark is not None and key not in overwritten:
                continue  # a view: nothing new was computed
            mark = self._marks.setdefault(key, _Mark())
            mark.blank = False
            nan, inf = kinds(values)
            if inf:
                inf_origin = inf_origin or self._origin_of_inf(site, inputs, literal)
                mark.inf = _after_writing(values, mark.inf, inf_origin)
            if nan:
                nan_origin = nan_origin or self._origin_of_nan(site, inputs, literal)
                mark.nan = _after_writing(values, mark.nan, nan_origin)

    def _origin_of_inf(self, site: _Site, inputs: Sequence[_Input], literal: bool) -> _Origin:
        return _earliest(i.inf for i in inputs) or self._made(site, "inf", inputs, literal)

    def _origin_of_nan(self, site: _Site, inputs: Sequence[_Input], literal: bool) -> _Origin:
        became = ""
        origin = _earliest(i.nan for i in inputs)
        if origin is None:
            origin = _earliest(i.inf for i in inputs if i.inf and not i.inf.meant)
            if origin is not None:
                became = f"its Inf becomes a NaN in {site.backward_op or site.op}"
        if origin is None:
            origin = self._made(site, "nan", inputs, literal)
        if not origin.meant and origin.surfaced == _NEVER:
            names = [i.name for i in inputs if i.nan is origin or i.inf is origin]
            culprit = _surfaced(origin.culprit, site, *names[:1])
            culprit = culprit._replace(detail=became or culprit.detail)
            origin = origin._replace(culprit=culprit, surfaced=next(self._order))
            self._consider(origin)
        return origin

    def _made(self, site: _Site, kind: str, inputs: Sequence[_Input], literal: bool) -> _Origin:
        culprit = _culprit(site, kind, inputs)
        which = ("nan", "inf").index(kind)
        if site.op.startswith(("c10d", "_c10d")) or any(
            kinds(entry.tensor)[which] for entry in inputs if not entry.written
        ):
            return _Origin(next(self._order), _unseen(culprit), meant=True)
        return _Origin(next(self._order), culprit, literal)

    # --- where it runs

    def _site(self, func: Operator) -> _Site:
        node = torch._C._current_autograd_node()
        backward = torch._C._current_graph_task_id() != _NO_TASK
        module, place, recomputed = self._walk(sys._getframe(2), backward)
        forward = None if node is None else self._forward_site(node)
        if not backward or recomputed:
            place = place or (forward.place if forward else ("", 0))
            site = _Site("forward", module, str(func), "", place)
        elif forward is None:
            name = "" if node is None else node.name().rpartition("::")[2]
            site = _Site("backward", module, name, str(func), place or ("", 0))
        else:
            site = forward._replace(
                phase="backward", backward_op=str(func), place=place or forward.place
            )
        if site.phase == "forward" or torch.is_grad_enabled():
            # Autograd numbers its nodes; an operation runs right after its node was numbered.
            number = torch._C._autograd._get_sequence_nr() - 1
            kin = _plain(func.__name__.partition(".")[0])
            self._sites.setdefault(number, {}).setdefault(kin, site)
        return site

    def _walk(
        self, frame: FrameType | None, backward: bool
    ) -> tuple[str, tuple[str, int] | None, bool]:
        """Module, place in the user's code, and whether checkpointing runs the forward again.

        In backward only what runs inside it counts: a checkpoint, a custom Function, a hook.
        """
        module: str | None = None
        place: tuple[str, int] | None = None
        recomputed = False
        while frame is not None and (backward or module is None or place is None):
            code = frame.f_code
            if code is _ENGINE and backward:
                break
            if code is _MODULE_CALL:
                if module is None:
                    module = self._names.get(id(frame.f_locals["self"]))
            elif code.co_filename == _CHECKPOINT:
                recomputed = backward
            elif place is None and not code.co_filename.startswith(_INTERNAL):
                place = (code.co_filename, frame.f_lineno)
            frame = frame.f_back
        return module or "", place, recomputed

    def _forward_site(self, node: Any) -> _Site | None:
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

    def conclude(self, result: object) -> Culprit | None:
        """The first event whose NaN, or else whose Inf, is in the loss or in a gradient."""
        losses = [*tree_leaves(result), *itertools.chain(*self._roots.values())]
        final = outcome(self._model, losses)
        guess = self.guess and self.guess.culprit
        if final is None:
            return guess and guess.also("it reaches neither the loss nor a gradient")
        carried = min(self._carried(losses), default=None, key=operator.itemgetter(0))
        if carried is not None and (guess is None or not carried[0][0]):
            _, culprit, reaches = carried
            return culprit.also(reaches)
        where = f"the gradient of {final.name!r}" if final.name else "the loss"
        if guess is not None:
            return guess.also(f"{where} is not finite, but {UNLINKED}")
        return final._replace(detail=f"{where} holds it, but no observed operation made it")

    def _carried(self, losses: Iterable[object]) -> Iterator[tuple[Any, Culprit, str]]:
        """The events whose NaN or Inf the loss and the gradients hold: rank, culprit and note."""
        named = [("the loss", loss) for loss in losses if isinstance(loss, Tensor)]
        for name, parameter in self._model.named_parameters():
            if parameter.grad is not None:
                named.append((f"the gradient of {readable(name)!r}", parameter.grad))
        for where, tensor in named:
            has_nan, has_inf = kinds(tensor)
            if not (has_nan or has_inf):
                continue
            for values in real_values(tensor):
                mark = self._marks.get(self._identify(values), _Mark())
                for is_inf, held, o in ((False, has_nan, mark.nan), (True, has_inf, mark.inf)):
                    if held and o is not None:
                        # Tensors with no observed writer rank last.
                        unseen = o.culprit.phase != "input" and not o.culprit.op
                        dark = o.meant and (unseen or _BLANK in o.culprit.detail)
                        key = (dark, o.source == _BEFORE, o.meant, is_inf, o.order, o.surfaced)
                        yield key, o.culprit, f"it reaches {where}" if is_inf or o.meant else ""


def _roots(frame: FrameType | None) -> list[Tensor]:
    """What the outermost backward started from: the loss."""
    roots: Iterable[object] = ()
    while frame is not None:
        if frame.f_code is _ENGINE:
            roots = frame.f_locals["t_outputs"]
        frame = frame.f_back
    return [root.detach() for root in roots if isinstance(root, Tensor)]


def _earliest(origins: Iterable[_Origin | None]) -> _Origin | None:
    """The first event; intended ones come last, and data after what the step made."""
    there = [origin for origin in origins if origin is not None]
    return min(there, key=lambda o: (o.meant, o.source, o.order, o.surfaced), default=None)


def _after_writing(values: Tensor, before: _Origin | None, origin: _Origin) -> _Origin | None:
    """The origin of what is in the memory of `values` after `origin` was written there."""
    whole = values.numel() * values.itemsize == values.untyped_storage().nbytes()
    return origin if whole else _earliest([before, origin])


def _plain(name: str) -> str:
    return name.replace("_", "").lower()


def _culprit(site: _Site, kind: str, inputs: Iterable[_Input]) -> Culprit:
    operands = tuple(
        operand(entry.name, entry.tensor, entry.bounds or extremes(entry.tensor))
        for entry in inputs
        if entry.name
    )
    return Culprit(site.phase, kind, *site[1:], operands)


def _unseen(culprit: Culprit) -> Culprit:
    op = culprit.backward_op or culprit.op
    detail = f"it came with {op} from another process, or by no operation of PyTorch"
    return culprit._replace(op="", detail=detail)


def _surfaced(culprit: Culprit, site: _Site, name: str = "") -> Culprit:
    """Name the operation in which a given value surfaced, and the value's name there."""
    if culprit.phase not in ("parameter", "input"):
        return culprit
    if culprit.detail == OUTSIDE and name:  # the operation that saw it first may be another
        operands = tuple(given._replace(name=name) for given in culprit.inputs)
        culprit = culprit._replace(name=name, inputs=operands)
    module = culprit.module if culprit.phase == "parameter" else site.module
    return culprit._replace(module=module, op=site.op, place=site.place)
