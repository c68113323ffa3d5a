"""Which operation of which module first made a NaN or an Inf, forward or backward.

A NaN in a gradient does not tell what broke: one NaN in the loss makes every gradient NaN. So a
guard computes one sum per step, and observes the step operation by operation only where that sum
is not finite. `find_nonfinite` observes at once.
"""

from __future__ import annotations

import inspect
import itertools
import linecache
import math
import operator
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import groupby
from types import NoneType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from autograd_lib.core.shards import is_distributed
from autograd_lib.gradients import check_module
from autograd_lib.nonfinite.observer import (
    OUTSIDE,
    UNLINKED,
    Culprit,
    observe,
    outcome,
)
from autograd_lib.nonfinite.values import Operand, real_values
from autograd_lib.report.tables import html_table, text_table

__all__ = ["NonFinite", "NonFiniteGuard", "find_nonfinite"]

_SMALL = 2**13  # tensors of fewer elements are summed together, those of one shape at once
_AT_ONCE = 2**19  # elements that are copied together, so that they stay in the cache
_RENEWED_EVERY = 50  # steps after which a guard notices a parameter that was added
_COLUMNS = ["inputs", "shape", "dtype", "min", "max"]
_GRAD, _VERSION = operator.attrgetter("grad"), operator.attrgetter("_version")
_Buffer = tuple[dict[str, Tensor | None], str, Tensor | None]


@dataclass(frozen=True, repr=False)
class NonFinite:
    """Where the first NaN of a step came from, or the Inf that became one.

    Prints as a short report, in a notebook as HTML. What does not apply is empty.

    Attributes:
        phase: "parameter" (buffers too), "input", "forward" or "backward".
        kind: "nan" or "inf": what the culprit made or held.
        module: Qualified name of the module in whose code it happened, "" outside any.
        op: ATen name of the forward operation, such as "aten.log.default"; the class's name if
            the backward of a custom Function failed; for a parameter or an input the operation
            in which it surfaced.
        backward_op: ATen name of the backward operation, in phase "backward" only.
        location: "file:line" of the innermost frame outside PyTorch, in a notebook
            "Cell In[n]:line". In phase "backward" that of the forward operation, or the line
            inside a custom Function's backward.
        inputs: What the culprit was given, or the culprit itself if it is a parameter or an
            input: `name`, `shape`, `dtype`, `min`, `max` of each tensor.
        name: Of the parameter, the buffer, the argument: one of `model`'s, or of `op`'s for what
            came from outside the model, such as a target.
        detail: What followed, or what the report cannot know.
        source: The lines of code around `location`.
    """

    phase: str
    kind: str
    module: str = ""
    op: str = ""
    backward_op: str = ""
    location: str = ""
    inputs: tuple[Operand, ...] = ()
    name: str = ""
    detail: str = ""
    source: tuple[str, ...] = ()

    def _title(self) -> str:
        kind = {"nan": "NaN", "inf": "Inf"}[self.kind]
        if self.op and OUTSIDE in self.detail:
            return f"{kind} in argument {self.name!r} of {self.op}"
        if self.phase in ("parameter", "input"):
            return f"{kind} in {self.phase} {self.name!r}"
        if not self.op:
            return f"{kind} in {self.phase}"
        if self.phase == "backward":
            return f"{kind} made in backward by {self.backward_op}, for {self.op}"
        return f"{kind} made in forward by {self.op}"

    def _facts(self) -> list[tuple[str, str]]:
        given = self.phase in ("parameter", "input")
        facts = {
            "module": self.module,
            "surfaced in": self.op if given else "",
            "parameter": "" if given else self.name,
            "location": self.location,
            "note": self.detail,
        }
        return [(key, value) for key, value in facts.items() if value]

    def _rows(self) -> list[list[str]]:
        return [
            [name, str(shape), str(dtype).removeprefix("torch."), f"{low:.4g}", f"{high:.4g}"]
            for name, shape, dtype, low, high in self.inputs
        ]

    def __repr__(self) -> str:
        facts = [f"{key:<12}{value}" for key, value in self._facts()]
        lines = [self._title(), *facts, *(f"    {line}" for line in self.source)]
        if self.inputs:
            lines.append(text_table("", _COLUMNS, self._rows()).lstrip("\n"))
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        facts = "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in self._facts())
        html = f"<p><b>{escape(self._title())}</b></p><dl>{facts}</dl>"
        if self.source:
            html += f"<pre>{escape(chr(10).join(self.source))}</pre>"
        if self.inputs:
            html += html_table("inputs", ["name", *_COLUMNS[1:]], self._rows())
        return html


def find_nonfinite(model: nn.Module, step: Callable[[], object]) -> NonFinite | None:
    """Run `step` once under observation and name the operation that first made a NaN.

    The culprit is the first operation that makes a NaN, or an Inf that later becomes one, and
    whose NaN is still there in the loss or a gradient; failing that, one whose NaN is not. An
    infinity that the code writes down, such as a mask filled with -inf, is no culprit: what turns
    it into a NaN is. An Inf that leaves no NaN behind is reported only if it reaches the loss or
    a gradient. A parameter, buffer, target or argument of `model` that holds a NaN from which
    theirs descends is the culprit whatever operation it surfaces in; so is one that holds an Inf
    from which a NaN descends. One that the code masks out is reported only if nothing else is
    wrong.

    How it observes: a `TorchDispatchMode` around `step` sees each ATen operation, one
    forward pre-hook on `model` its arguments; `torch.compile`d code runs eagerly, backward on
    the calling thread. Afterward parameters, buffers, gradients and the state of PyTorch's
    random number generators (the CPU's and those of the model's devices) are what they were,
    also if `step` raises; the exception passes, with what was found until then as a note on it.
    Whatever else `step` changes stays changed: the gradients of other models (of a GAN pass a
    module that holds both), the generators of Python and NumPy, a `GradScaler` that is told to
    `unscale_` inside. Draw the batch outside.

    A compiled model runs twice, as it is and eagerly, since one may be finite where the other is
    not; the report says so. A distributed model (DDP, FSDP2, `DTensor` parameters) makes the
    call a collective: every rank calls, and all get the report of the rank where it began.

    What it cannot see: values that no PyTorch operation wrote, and forward code on threads of
    your own.

    Args:
        model: The module whose parameters, arguments and submodules are named.
        step: Runs forward and backward, not the optimizer. What it returns (tensors and floats,
            also in lists, tuples and dicts) counts as loss, and so does what `backward()` is
            called on.

    Returns:
        The report, or None if the step leaves nothing to report.

    Raises:
        TypeError: If `model` is not a module or `step` not a function without arguments.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> def step():
        ...     p = model(torch.zeros(3, 2)).relu()
        ...     (-p * p.log()).sum().backward()
        >>> found = find_nonfinite(model, step)
        >>> found.phase, found.kind, found.op, found.detail
        ('forward', 'inf', 'aten.log.default', 'its Inf becomes a NaN in aten.mul.Tensor')
    """
    check_module("find_nonfinite", model)
    _check_step("find_nonfinite", step)
    parts = _Parts(model)
    parameters = parts.parameters()
    before = _State(parts, parameters, *parameters)
    try:
        compiled = None
        if _is_compiled(model):
            compiled = outcome(model, step())
            before.restore()
        return _explain(model, step, compiled, parts.groups)
    finally:
        before.restore()


class NonFiniteGuard:
    """Watch every step of a model for a NaN or an Inf, at the price of one sum.

    Calling the guard runs `step`. Before it the guard keeps the state of the random number
    generators, the buffers, and each `.grad` that there already is (accumulation,
    `set_to_none=False`), which costs a copy of all these gradients; after it, it sums the loss
    and all gradients and reads that number: one host synchronization. If the number is finite,
    what the step did stands, bit by bit as without the guard. The guard sees the loss only if
    `step` returns it; otherwise it sees the gradients alone.

    If it is not, the guard restores all that, replays the step as `find_nonfinite` does, restores
    it again and returns the report; the caller then skips the optimizer. If every element is finite
    and only the sum overflows, the step stands and nothing is reported. If `step` raises, nothing
    is restored or explained.

    Not restored: the gradients of other models (of a GAN guard a module that holds both),
    parameters that the step itself changes (`nn.Embedding` with `max_norm`, an optimizer inside
    `step`; the report says so), the generators of Python and NumPy.

    With a `GradScaler`, gradients that overflow are the scaler's business: it skips the step and
    lowers the scale. Given the scaler, the guard leaves such a step alone, and takes a closer
    look only when the loss is not finite (let `step` return the loss unscaled) or when the scale
    is down to 1 or less and cannot be what is wrong. `step` may call `unscale_`.

    The guard keeps no hook and only weak references. A parameter that is added later is watched
    at most 50 steps late. A step that draws from generators other than PyTorch's global ones, or
    draws its batch, is not replayed bit by bit. With a distributed model (DDP, FSDP2, `DTensor`
    parameters) each call is a collective of one number, and every rank returns the same report.

    Args:
        model: The module whose gradients are watched, with its wrapper if it has one.
        scaler: The `GradScaler` that scales the loss in `step`.

    Raises:
        TypeError: If `model` is not a module or `scaler` not a `GradScaler`.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> guard = NonFiniteGuard(model)
        >>> def step():
        ...     loss = model(batch).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> batch = torch.ones(3, 2)
        >>> guard(step), model.weight.grad is None
        (None, False)
        >>> model.zero_grad()
        >>> batch[1, 1] = torch.nan
        >>> found = guard(step)
        >>> found.phase, found.name, model.weight.grad
        ('input', 'input', None)
    """

    def __init__(self, model: nn.Module, *, scaler: GradScaler | None = None) -> None:
        check_module("NonFiniteGuard", model)
        if not isinstance(scaler, GradScaler | None):
            raise TypeError(
                "NonFiniteGuard: expected scaler to be a torch.amp.GradScaler or None, got "
                f"{type(scaler).__name__}; pass the one that scales the loss"
            )
        self._model = weakref.ref(model)
        self._scaler = scaler
        self._parts = _Parts(model)

    def __call__(self, step: Callable[[], object]) -> NonFinite | None:
        """Run `step` (forward and backward, not the optimizer); explain it if it went wrong.

        Raises:
            RuntimeError: If the model no longer exists.
            TypeError: If `step` is not a function without arguments.
        """
        _check_callable("NonFiniteGuard", step)
        model = self._model()
        if model is None:
            raise RuntimeError(
                "NonFiniteGuard: expected the model that the guard was made for, but it was "
                "deleted (the guard keeps only a weak reference); make a new guard"
            )
        parts, parameters = self._look(model)
        before = _State(parts, parameters, scaler=self._scaler)
        try:
            result = step()
        except TypeError:
            _check_step("NonFiniteGuard", step)  # if that is what is wrong, it says the remedy
            raise
        leaves = [] if result is None else tree_leaves(result)
        losses = [leaf for leaf in leaves if isinstance(leaf, (Tensor, float))]
        total = _total([*map(_GRAD, parameters)], parts, losses)
        for group in parts.groups:
            torch.distributed.all_reduce(total, group=group)
        if math.isfinite(total.item()):
            return None
        wrong = outcome(model, losses)
        everywhere = [w for w in _gather(parts.groups, wrong) if w is not None]
        if not everywhere or self._is_for_the_scaler(everywhere):
            return None
        del result, leaves, losses  # free the memory of the graph
        try:
            before.restore()
            versions = _versions(parameters)
            found = _explain(model, step, wrong, parts.groups)
            if found is not None and versions != _versions(parameters):
                more = "the step changed parameters, not put back: keep the optimizer out of it"
                found = replace(found, detail="; ".join(filter(None, [found.detail, more])))
            return found
        finally:
            before.restore()

    def _look(self, model: nn.Module) -> tuple[_Parts, list[nn.Parameter]]:
        """The parts of the model, looked up again every so often and where a parameter is gone."""
        self._parts.renew_in -= 1
        parameters = self._parts.parameters()
        if self._parts.renew_in < 0 or NoneType in {*map(type, parameters)}:
            self._parts = _Parts(model)
            parameters = self._parts.parameters()
        return self._parts, parameters

    def _is_for_the_scaler(self, wrong: Sequence[Culprit]) -> bool:
        scaler = self._scaler
        if scaler is None or any(culprit.phase != "backward" for culprit in wrong):
            return False
        return scaler.get_scale() > 1  # that of a disabled one is 1


def _check_callable(operation: str, step: object) -> None:
    if not callable(step):
        raise TypeError(
            f"{operation}: expected step to be a function without arguments that runs forward "
            f"and backward, got {type(step).__name__}; pass the function, not its result"
        )


def _check_step(operation: str, step: Callable[[], object]) -> None:
    _check_callable(operation, step)
    try:
        signature = inspect.signature(step)
    except ValueError:
        return  # one written in C, which does not tell
    try:
        signature.bind()
    except TypeError as error:
        raise TypeError(
            f"{operation}: expected step to be a function without arguments, got one with "
            f"{signature} ({error}); bind them: lambda: step(batch)"
        ) from None


def _versions(parameters: Sequence[Tensor]) -> list[int]:
    """Numbers that grow when a parameter is changed in place."""
    lazy = nn.parameter.is_lazy
    return [_VERSION(p) for p in parameters if not (lazy(p) or p.is_inference())]


def _is_compiled(model: nn.Module) -> bool:
    return any(
        module._compiled_call_impl is not None or "_orig_mod" in module._modules
        for module in model.modules()
    )


def _explain(
    model: nn.Module, step: Callable[[], object], before: Culprit | None, groups: Sequence[Any]
) -> NonFinite | None:
    """Observe `step`; `before` is the outcome of a run without observation, if there was one."""
    culprit = observe(model, step, _report)
    if culprit is None and before is not None:
        culprit = before.also("only without observation: the step, replayed eagerly, is finite")
        if not _is_compiled(model):
            culprit = culprit.also(
                "it does not repeat itself: it may draw its batch, or numbers from Python or NumPy"
            )
    elif culprit is not None and _is_compiled(model):
        finite = "is finite" if before is None else "is not finite either"
        culprit = culprit.also(f"the compiled step {finite}")
    if culprit is not None and groups:
        culprit = culprit.also(f"on rank {torch.distributed.get_rank()}")
    found = None if culprit is None else _report(culprit)
    everywhere = [report for report in _gather(groups, found) if report is not None]
    # A rank on which no operation made the value received it from another rank.
    return min(everywhere, key=_doubt, default=None)


def _doubt(report: NonFinite) -> int:
    by = report.backward_op or report.op
    made = report.op and not by.startswith(("aten.empty", "aten.new_empty"))
    if not made and report.phase in ("forward", "backward"):
        return 3
    if UNLINKED not in report.detail:
        return 0
    return 1 if report.phase == "parameter" else 2  # a target may be masked out


def _report(culprit: Culprit) -> NonFinite:
    file, line = culprit.place
    around = [(n, linecache.getline(file, n).rstrip()) for n in range(line - 1, line + 2)]
    source = [f"{'>' if n == line else ' '} {n:>4}  {text}" for n, text in around if text and file]
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    # IPython 7 cannot tell a cell's number from the file that stands for it.
    name_of = getattr(getattr(shell, "compile", None), "format_code_name", lambda _: None)
    location = f"{' '.join(name_of(file) or [file])}:{line}" if file else ""
    fields = culprit._asdict()
    del fields["place"]
    return NonFinite(**fields, location=location, source=tuple(source))


class _Parts:
    """What a model consists of, by weak reference.

    Walking a model costs as much as summing its gradients, so the guard does it rarely.
    """

    def __init__(self, model: nn.Module) -> None:
        # Parameters of one shape stand together, so that their gradients are summed together.
        parameters = sorted(model.parameters(), key=_kind)
        ends = itertools.accumulate(len([*same]) for _, same in groupby(parameters, _kind))
        self.piles: list[slice] = []
        for start, end in itertools.pairwise([0, *ends]):
            most = max(1, _AT_ONCE // max(1, math.prod(_kind(parameters[start])[2])))
            self.piles += [slice(i, min(i + most, end)) for i in range(start, end, most)]
        self._room: dict[torch.dtype, Tensor] = {}
        self._stacks: dict[tuple[int, torch.Size, torch.dtype], Tensor] = {}
        self.groups = _groups(model, parameters)
        devices = {p.device for p in parameters if p.device.type not in ("cpu", "meta")}
        self.device = min(devices, key=str, default=torch.device("cpu"))
        self.generators = [
            (torch.get_device_module(device), () if device.type == "mps" else (device,))
            for device in devices
        ]
        self.renew_in = _RENEWED_EVERY
        self._parameters = [weakref.ref(parameter) for parameter in parameters]
        self._buffered = [weakref.ref(module) for module in model.modules() if module._buffers]

    def stack(self, tensors: list[Tensor]) -> Tensor:
        """Small tensors of one shape, copied where those before them were: no fresh pages."""
        key = len(tensors), tensors[0].shape, tensors[0].dtype
        if key not in self._stacks:
            room = self._room.setdefault(key[2], torch.empty(_AT_ONCE, dtype=key[2], device="cpu"))
            shape = key[0], *key[1]
            self._stacks[key] = room[: math.prod(shape)].view(shape)
        return torch.stack(tensors, out=self._stacks[key])

    def parameters(self) -> list[nn.Parameter]:
        return [*map(operator.call, self._parameters)]  # type: ignore[list-item]

    def buffers(self) -> list[_Buffer]:
        modules = [module for ref in self._buffered if (module := ref()) is not None]
        return [(m._buffers, name, b) for m in modules for name, b in m._buffers.items()]


def _kind(parameter: Tensor) -> tuple[Any, ...]:
    if nn.parameter.is_lazy(parameter):
        return ("", "", ())  # its shape is not known yet
    return (str(parameter.device), str(parameter.dtype), tuple(parameter.shape))


class _State:
    """What a step changes, with a copy of each value from before the step."""

    @torch.no_grad()
    def __init__(
        self,
        parts: _Parts,
        parameters: Sequence[Tensor],
        *more: Tensor,
        scaler: GradScaler | None = None,
    ) -> None:
        self._parameters = parameters
        self._grads = [*map(_GRAD, parameters)]
        self._buffers = parts.buffers()
        tensors = [grad for grad in self._grads if grad is not None]
        tensors += [buffer for _, _, buffer in self._buffers if buffer is not None]
        tensors += more
        self._kept = [(t, t.detach().clone()) for t in tensors if not nn.parameter.is_lazy(t)]
        self._random = torch.get_rng_state()
        self._on_devices = [
            (module, args, module.get_rng_state(*args)) for module, args in parts.generators
        ]
        # Which optimizers were unscaled; a disabled scaler has no such table.
        self._unscaled: dict[int, dict[str, Any]] = getattr(scaler, "_per_optimizer_states", {})
        self._stages = {key: {**state} for key, state in self._unscaled.items()}

    @torch.no_grad()
    def restore(self) -> None:
        for table, name, buffer in self._buffers:
            table[name] = buffer
        for tensor, kept in self._kept:
            # Through .data, so that a graph from before the step does not take it for a change.
            tensor.data.copy_(kept)
        for parameter, grad in zip(self._parameters, self._grads, strict=True):
            parameter.grad = grad
        torch.set_rng_state(self._random)
        for module, args, state in self._on_devices:
            module.set_rng_state(state, *args)
        self._unscaled.clear()
        self._unscaled.update((key, {**state}) for key, state in self._stages.items())


@torch.no_grad()
def _total(grads: list[Tensor | None], parts: _Parts, losses: Sequence[Tensor | float]) -> Tensor:
    """A number that is finite only if every element is: a sum carries NaN and Inf.

    It may overflow all the same. Small gradients of one shape are stacked, which costs less than
    a call for each; large ones are not copied. Off the CPU, where each kernel counts, a norm of
    many tensors is one kernel.
    """
    sums = [_sum(loss) if isinstance(loss, Tensor) else torch.tensor(loss) for loss in losses]
    types = {*map(type, grads)}
    if types <= {Tensor, NoneType}:
        for pile in parts.piles:
            some = grads[pile]
            there = [grad for grad in some if grad is not None] if NoneType in types else some
            sums += _sums_of_pile(cast(list[Tensor], there), parts)
    else:
        sums += [_sum(grad) for grad in grads if grad is not None]
    if not sums:
        return torch.zeros((), device=parts.device)
    return torch.stack([s.to(parts.device, torch.float32) for s in sums]).sum()


def _sums_of_pile(grads: list[Tensor], parts: _Parts) -> Iterable[Tensor]:
    if not grads:
        return ()
    first = grads[0]
    try:
        if first.is_cpu and first.numel() < _SMALL:
            return (_sum(parts.stack(grads)),)
        if not first.is_cpu and not first.is_complex():
            return torch._foreach_norm(grads, dtype=torch.promote_types(first.dtype, torch.float32))
    except (RuntimeError, NotImplementedError):
        pass  # a sparse gradient among dense ones, or what was lazy when it was sorted
    return map(_sum, grads)


def _sum(tensor: Tensor) -> Tensor:
    if type(tensor) is Tensor and tensor.dtype in (torch.float32, torch.bfloat16):
        return tensor.sum()
    sums = [
        part.sum(dtype=torch.promote_types(part.dtype, torch.float32))
        for part in real_values(tensor)
    ]
    return torch.stack(sums).sum() if sums else torch.zeros((), device=tensor.device)


def _groups(model: nn.Module, parameters: Sequence[Tensor]) -> list[Any]:
    """The process groups over which the model is distributed."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return []
    groups = [
        wrapper.process_group
        for wrapper in (model, getattr(model, "_orig_mod", None))
        if isinstance(wrapper, DistributedDataParallel)
    ]
    for mesh in {p.device_mesh for p in parameters if is_distributed(p)}:
        groups += [mesh.get_group(dim) for dim in range(mesh.ndim)]
    return groups


def _gather(groups: Sequence[Any], value: Any) -> list[Any]:
    """What every process of `groups` has, in the order of ranks."""
    values = [value]
    for group in groups:
        gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(gathered, values, group=group)
        values = [entry for entries in gathered for entry in entries]
    return values
