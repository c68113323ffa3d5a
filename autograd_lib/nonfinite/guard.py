"""Which operation of which module first made a NaN or an Inf, forward or backward.

A NaN in a gradient does not tell what broke: one NaN in the loss makes every gradient NaN. So a
guard computes one sum per step, and observes the step operation by operation only where that sum
is not finite. `find_nonfinite` observes at once.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_leaves

from autograd_lib.core.rows import CPU_SIZES, divide
from autograd_lib.core.shards import find_meshes
from autograd_lib.core.snapshot import ModuleState, torch_generators, without_gradients
from autograd_lib.gradients import check_module
from autograd_lib.nonfinite.observer import observe, outcome
from autograd_lib.nonfinite.report import UNLINKED, NonFinite
from autograd_lib.nonfinite.values import real_values

__all__ = ["NonFinite", "NonFiniteGuard", "find_nonfinite"]

Step = Callable[[], object]  # runs forward and backward

_GRAD = operator.attrgetter("grad")
_RENEWED_EVERY = 50  # steps after which a guard notices a parameter that was added


def find_nonfinite(model: nn.Module, step: Step) -> NonFinite | None:
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
    before = GuardedStep(parts, parts.parameters(), True, more=parts.parameters())
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
        TypeError: If `model` is not a module.

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
        self._parts, self._steps = _Parts(model, scaler), itertools.count(1)

    def __call__(self, step: Step) -> NonFinite | None:
        """Run `step` (forward and backward, not the optimizer); explain it if it went wrong.

        Raises:
            RuntimeError: If the model no longer exists.
            TypeError: If `step` is not a function without arguments.
        """
        guarded = self.begin()
        try:
            return guarded.end(step(), step)
        except TypeError:
            _check_step("NonFiniteGuard", step)  # if that is what is wrong, it says the remedy
            raise

    def begin(self, *, keep_gradients: bool = True) -> GuardedStep:
        """Keep what a step changes. For those whose step runs elsewhere, as in a framework's loop.

        Without `keep_gradients` those of earlier micro-batches are not copied, and not restored.
        """
        model, parameters = self._parts.model(), self._parts.parameters()
        if model is None:
            raise RuntimeError(
                "NonFiniteGuard: expected the model to exist, but it was deleted; make a new guard"
            )
        if next(self._steps) % _RENEWED_EVERY == 0 or NoneType in {*map(type, parameters)}:
            self._parts = _Parts(model, self._parts.scaler)
            parameters = self._parts.parameters()
        return GuardedStep(self._parts, parameters, keep_gradients)


class GuardedStep(ModuleState):
    """What a step changes, as it was before the step, and the judgement of the step after it."""

    def __init__(
        self, parts: _Parts, parameters: Sequence[Tensor], keep: bool, more: Sequence[Tensor] = ()
    ) -> None:
        self._model, self._parts, self.parameters = parts.model(), parts, parameters
        self._kept = [*map(_GRAD, parameters)] if keep else []
        gradients = [grad for grad in self._kept if grad is not None]
        super().__init__(parts.modules(), [*gradients, *more], parts.generators)
        # Which optimizers were unscaled; a disabled scaler has no such table.
        self._unscaled = getattr(parts.scaler, "_per_optimizer_states", {})
        self._stages = {key: {**state} for key, state in self._unscaled.items()}

    def restore(self) -> None:
        """Put everything back, so that the step can run again."""
        super().restore()
        for parameter, grad in zip(self.parameters, self._kept, strict=False):
            parameter.grad = grad
        self._unscaled.clear()
        self._unscaled.update((key, {**state}) for key, state in self._stages.items())

    def end(
        self, result: object, replay: Step | None, owned: Iterable[Tensor] | None = None
    ) -> NonFinite | None:
        """Read one number; if it is not finite, run `replay` as `find_nonfinite` does.

        Gradients that were not kept are then still those that are not finite. Without a `replay`
        nothing is restored.

        Args:
            result: What the step returned, the loss.
            replay: Runs the step again; None if it cannot.
            owned: The parameters whose gradients are looked at; by default all.
        """
        parts, groups = self._parts, self._parts.groups
        losses = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor | float)]
        grads = [*map(_GRAD, self.parameters)]
        if owned is not None:
            own = {*map(id, owned)}
            grads = [p.grad if id(p) in own else None for p in self.parameters]
        total = parts.total(grads, losses)
        for group in groups:
            torch.distributed.all_reduce(total, group=group)
        if math.isfinite(total.item()):
            return None
        wrong = outcome(self._model, losses)
        everywhere = [w for w in _gather(groups, wrong) if w is not None]
        scale = 1.0 if parts.scaler is None else parts.scaler.get_scale()  # 1 if it is disabled
        if not everywhere or (scale > 1 and all(w.phase == "backward" for w in everywhere)):
            return None
        if replay is None:
            return everywhere[0]._also("the loop does not allow to run the step again")
        del result, losses, grads  # free the memory of the graph
        with without_gradients([] if self._kept else self.parameters):
            try:
                self.restore()
                versions = self._versions()
                found = _explain(self._model, replay, wrong, groups)
                if found is None or versions == self._versions():
                    return found
                more = "the step changed parameters, not put back: keep the optimizer out of it"
                return found._also(more)
            finally:
                self.restore()

    def _versions(self) -> list[int]:
        """Numbers that grow when a parameter is changed in place."""
        lazy = nn.parameter.is_lazy
        return [p._version for p in self.parameters if not (lazy(p) or p.is_inference())]


def _check_step(operation: str, step: Step) -> None:
    try:
        inspect.signature(step).bind()
    except TypeError as error:
        got = f"one for which: {error}" if callable(step) else type(step).__name__
        raise TypeError(
            f"{operation}: expected step to be a function without arguments, got {got}; pass the "
            "function itself, with its arguments bound: lambda: step(batch)"
        ) from None


def _is_compiled(model: nn.Module) -> bool:
    return any(m._compiled_call_impl or "_orig_mod" in m._modules for m in model.modules())


def _explain(
    model: nn.Module, step: Step, before: NonFinite | None, groups: Sequence[Any]
) -> NonFinite | None:
    """Observe `step`; `before` is the outcome of a run without observation, if there was one."""
    culprit = observe(model, step)
    if culprit is None and before is not None:
        culprit = before._also("only without observation: the step, replayed eagerly, is finite")
        if not _is_compiled(model):
            culprit = culprit._also(
                "it does not repeat itself: it may draw its batch, or numbers from Python or NumPy"
            )
    elif culprit is not None and _is_compiled(model):
        finite = "is finite" if before is None else "is not finite either"
        culprit = culprit._also(f"the compiled step {finite}")
    if culprit is not None and groups:
        culprit = culprit._also(f"on rank {torch.distributed.get_rank()}")
    found = None if culprit is None else culprit._located()
    everywhere = [report for report in _gather(groups, found) if report is not None]
    # A rank on which no operation made the value received it from another rank.
    return min(everywhere, key=_doubt, default=None)


def _doubt(report: NonFinite) -> int:
    if report._is_unmade():
        return 3
    if UNLINKED not in report.detail:
        return 0
    return 1 if report.phase == "parameter" else 2  # a target may be masked out


class _Parts:
    """What a model consists of, by weak reference, and how its gradients are summed.

    Walking a model costs as much as summing its gradients, so the guard does it rarely.
    """

    def __init__(self, model: nn.Module, scaler: GradScaler | None = None) -> None:
        self.model: Callable[[], Any] = weakref.ref(model)
        self.scaler = scaler
        parameters = [*model.parameters()]
        self._buffered = [weakref.ref(module) for module in model.modules() if module._buffers]
        wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        self.groups = [wrapper.process_group for wrapper in wrappers]
        for mesh in find_meshes(parameters):
            self.groups += [mesh.get_group(dim) for dim in range(mesh.ndim)]
        devices = {p.device for p in parameters if p.device.type not in ("cpu", "meta")}
        self.device = min(devices, key=str, default=torch.device("cpu"))
        self.generators = torch_generators(devices)

        # Small gradients of one shape are copied into one tensor: less work than a sum of each.
        # The memory for it is always the same one: no fresh pages.
        small = [p if type(p) is nn.Parameter and p.is_cpu else None for p in parameters]
        _, piles = divide(small)
        alike: dict[Any, list[int]] = {}
        for i in {*range(len(parameters))}.difference(*piles):
            alike.setdefault((parameters[i].device, parameters[i].dtype), []).append(i)
        self._references: list[weakref.ref[nn.Parameter]] = []  # in the order of the piles
        self._piles: list[tuple[slice, Tensor | None]] = []
        rooms: dict[torch.dtype, Tensor] = {}
        for number, index in enumerate([*piles, *alike.values()]):
            first, start, room = parameters[index[0]], len(self._references), None
            if number < len(piles):
                shape = len(index), *first.shape
                memory = rooms.setdefault(first.dtype, first.new_empty(CPU_SIZES[1]))
                room = memory[: math.prod(shape)].view(shape)
            self._references += [weakref.ref(parameters[i]) for i in index]
            self._piles.append((slice(start, start + len(index)), room))

    def parameters(self) -> list[nn.Parameter]:
        return [*map(operator.call, self._references)]  # type: ignore[list-item]

    def modules(self) -> list[nn.Module]:
        """Those that have buffers."""
        return [module for reference in self._buffered if (module := reference()) is not None]

    @torch.no_grad()
    def total(self, grads: Sequence[Tensor | None], losses: Iterable[Tensor | float]) -> Tensor:
        """A number that is finite only if every element is: a sum carries NaN and Inf.

        It may overflow all the same.
        """
        sums = [_sum(loss) if isinstance(loss, Tensor) else torch.tensor(loss) for loss in losses]
        for pile, room in self._piles:
            sums += _sums([grad for grad in grads[pile] if grad is not None], room)
        sums = [s.to(self.device, torch.float32) for s in sums]
        return torch.stack(sums).sum() if sums else torch.zeros((), device=self.device)


def _sums(grads: list[Tensor], room: Tensor | None) -> Iterable[Tensor]:
    """Numbers of which one is not finite if an element of `grads` is not."""
    try:
        if grads and room is not None:
            return [_sum(torch.stack(grads, out=room[: len(grads)]))]
        if {*map(type, grads)} == {Tensor} and not grads[0].is_cpu:  # one kernel for many
            wide = torch.promote_types(grads[0].dtype, torch.float32)
            return torch._foreach_norm(grads, dtype=wide)
    except RuntimeError:
        pass  # a sparse gradient among dense ones, complex ones, what was lazy before
    return map(_sum, grads)


def _sum(tensor: Tensor) -> Tensor:
    if type(tensor) is Tensor and tensor.dtype in (torch.float32, torch.bfloat16):
        return tensor.sum()
    sums = [v.sum(dtype=torch.promote_types(v.dtype, torch.float32)) for v in real_values(tensor)]
    return torch.stack(sums).sum() if sums else torch.zeros((), device=tensor.device)


def _gather(groups: Sequence[Any], value: Any) -> list[Any]:
    """What every process of `groups` has, in the order of ranks."""
    values = [value]
    for group in groups:
        gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(gathered, values, group=group)
        values = [entry for entries in gathered for entry in entries]
    return values
