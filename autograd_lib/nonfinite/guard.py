"""Which operation of which module first made a NaN or an Inf, forward or backward.

A NaN in a gradient does not tell what broke: one NaN in the loss makes every gradient NaN. So a
guard computes one sum per step, and observes the step operation by operation only where that sum
is not finite. `find_nonfinite` observes at once.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils._pytree import tree_leaves, tree_map_only

from autograd_lib.core.names import parameters_by_name
from autograd_lib.core.snapshot import ModuleState, without_gradients
from autograd_lib.gradients import check_module
from autograd_lib.nonfinite.parts import GRAD, Parts, gather, norm_of
from autograd_lib.nonfinite.replay import observe, outcome
from autograd_lib.nonfinite.report import UNLINKED, NonFinite
from autograd_lib.nonfinite.spikes import Spikes

__all__ = ["NonFinite", "NonFiniteGuard", "find_nonfinite"]

Step = Callable[[], object]  # runs forward and backward

_RENEWED_EVERY = 50  # steps after which a guard notices that parameters were moved or cast


def find_nonfinite(model: nn.Module, step: Step) -> NonFinite | None:
    """Run `step` once under observation and name the operation that first made a NaN.

    The culprit is the first operation that makes a NaN, or an Inf that later becomes one, and
    whose NaN is still there in the loss or a gradient; failing that, one whose NaN is not. An
    infinity that the code writes down, such as a mask filled with -inf, is no culprit: what turns
    it into a NaN is. An Inf that leaves no NaN behind is reported only if it reaches the loss or
    a gradient. If that NaN comes from a NaN or an Inf that was in a parameter, buffer, target or
    argument of `model` before, this tensor is the culprit, not the operation in which it first
    shows. A tensor whose NaN the code masks out is reported only if nothing else is wrong.

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
    parts = Parts(model)
    parameters = parts.parameters() or []
    before = GuardedStep(parts, parameters, True, more=parameters)
    try:
        compiled = None
        if _is_compiled(model):
            with before.explained(step):
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
    and only the sum overflows, the step stands and nothing is reported.

    If `step` raises, the guard restores all that and replays the step once. If a NaN was made or
    given before the same exception came again, the report is a note on the exception, which passes
    on. Other processes know nothing of it, so the replay ends before its first collective
    operation; the replay bypasses a `DistributedDataParallel` wrapper.

    With a `GradScaler`, call `scaler.step(optimizer)` and `scaler.update()` only after a step that
    the guard let pass. A `GradientMonitor` counts a refused step if the loop then calls its
    `look(skipped=True)`.

    With `spike_above` the guard reads, instead of a sum, the norm of what this step added to the
    gradients, unscaled and over all processes. A step whose norm is more than so many times the
    median of the last 100 finite norms is refused too: it is restored, not replayed, and reported
    with kind "spike". Nothing is refused before the median has seen 20 steps. The norms of spikes
    count, so that the median follows when larger gradients are there to stay.

    Not restored: the gradients of other models (of a GAN guard a module that holds both),
    parameters that the step itself changes (`nn.Embedding` with `max_norm`, an optimizer inside
    `step`; the report says so), the generators of Python and NumPy.

    With a `GradScaler`, gradients that overflow are the scaler's business: it skips the step and
    lowers the scale. Given the scaler, the guard leaves such a step alone, and takes a closer
    look only when the loss is not finite (let `step` return the loss unscaled) or when the scale
    is down to 1 or less and cannot be what is wrong. `step` may call `unscale_`.

    The guard keeps no hook, and of the model only weak references to modules; parameters may join,
    leave or be swapped. A step that draws from generators other than PyTorch's global ones, or
    draws its batch, is not replayed bit by bit. With a distributed model (DDP, FSDP2, `DTensor`
    parameters) each call is a collective of one number, and every rank returns the same report.

    Args:
        model: The module whose gradients are watched, with its wrapper if it has one.
        spike_above: Refuse a step whose gradient is more than so many times as large as usual.
        scaler: The `GradScaler` that scales the loss in `step`.

    Attributes:
        result: What the last `step` returned, with its tensors detached; None if it raised.

    Raises:
        TypeError: If `model` is not a module.
        ValueError: If `spike_above` is not a number above 1.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> guard = NonFiniteGuard(model)
        >>> def step():
        ...     loss = model(batch).square().mean()
        ...     loss.backward()
        ...     return loss
        >>> batch = torch.ones(3, 2)
        >>> guard(step), model.weight.grad is None, guard.result.isfinite().item()
        (None, False, True)
        >>> model.zero_grad()
        >>> batch[1, 1] = torch.nan
        >>> found = guard(step)
        >>> found.phase, found.name, model.weight.grad
        ('input', 'input', None)
    """

    def __init__(
        self,
        model: nn.Module,
        spike_above: float | None = None,
        *,
        scaler: GradScaler | None = None,
    ) -> None:
        check_module("NonFiniteGuard", model)
        self._spikes = None if spike_above is None else Spikes(spike_above)
        self._parts, self._steps = Parts(model, scaler), itertools.count(1)
        self.result: Any = None

    def __call__(self, step: Step) -> NonFinite | None:
        """Run `step` (forward and backward, not the optimizer); explain it if it went wrong.

        Raises:
            RuntimeError: If the model no longer exists.
            TypeError: If `step` is not a function without arguments.
        """
        guarded, self.result = self.begin(), None
        try:
            with guarded.explained(step):
                self.result = _detached(step())
        except TypeError:
            _check_step("NonFiniteGuard", step)  # if that is what is wrong, it says the remedy
            raise
        return guarded.end(self.result, step)

    def begin(self, *, keep_gradients: bool = True) -> GuardedStep:
        """Keep what a step changes. For those whose step runs elsewhere, as in a framework's loop.

        Without `keep_gradients` those of earlier micro-batches are not copied, and not restored.
        """
        model, parameters = self._parts.model(), self._parts.parameters()
        if model is None:
            raise RuntimeError(
                "NonFiniteGuard: expected the model to exist, but it was deleted; make a new guard"
            )
        if next(self._steps) % _RENEWED_EVERY == 0 or parameters is None:
            self._parts = Parts(model, self._parts.scaler)
            parameters = self._parts.parameters() or []
        return GuardedStep(self._parts, parameters, keep_gradients, spikes=self._spikes)


class GuardedStep(ModuleState):
    """What a step changes, as it was before the step, and the judgement of the step after it."""

    def __init__(
        self,
        parts: Parts,
        parameters: Sequence[Tensor],
        keep: bool,
        more: Sequence[Tensor] = (),
        spikes: Spikes | None = None,
    ) -> None:
        self._model, self._parts, self.parameters = parts.model(), parts, parameters
        self._spikes = spikes
        self._kept = [*map(GRAD, parameters)] if keep else []
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

    @contextlib.contextmanager
    def explained(self, replay: Step | None) -> Iterator[None]:
        """Put everything back if the block raises; note a NaN that `replay` comes upon."""
        try:
            yield
        except BaseException as error:
            with without_gradients([] if self._kept else self.parameters):
                self.restore()
                if replay is not None and isinstance(error, Exception):
                    try:
                        observe(self._model, replay, error)
                    finally:
                        self.restore()
            raise

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
        grads = [*map(GRAD, self.parameters)]
        if owned is not None:
            own = {*map(id, owned)}
            grads = [p.grad if id(p) in own else None for p in self.parameters]
        if self._spikes is None:
            number, spike = parts.total(grads, losses).item(), ""
        else:
            number = parts.norm(self._added(grads), losses).item()
            spike = self._spikes.judge(number)
        if math.isfinite(number) and not spike:
            return None
        wrong = outcome(self._model, losses)
        everywhere = [w for w in gather(groups, wrong) if w is not None]
        if spike and not everywhere:
            refused = self._spike(spike)
            self.restore()
            return refused
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

    @torch.no_grad()
    def _added(self, grads: Sequence[Tensor | None]) -> list[Tensor | None]:
        """What the step added to the gradients that were there."""
        before = {id(tensor): value for tensor, value in self._values}
        kept = self._kept or [None] * len(grads)
        pairs = zip(grads, kept, strict=True)
        return [g if g is None or k is None else g - before[id(k)] for g, k in pairs]

    def _spike(self, detail: str) -> NonFinite:
        """The report of a spike, with the parameter whose gradient is the largest."""
        named = [(p.grad, name) for name, p in parameters_by_name(self._model).items()]
        largest = max((norm_of(g).item(), name) for g, name in named if g is not None)
        _, name = max(gather(self._parts.groups, largest))
        detail += f"; the largest part of it is that of {name!r}"
        return NonFinite("backward", "spike", name.rpartition(".")[0], name=name, detail=detail)

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


def _detached(result: Any) -> Any:
    """The same without a graph, which would live on with the guard, and parameters with it."""
    if isinstance(result, Tensor):
        return result.detach()
    return None if result is None else tree_map_only(Tensor, Tensor.detach, result)


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
    everywhere = [report for report in gather(groups, found) if report is not None]
    # A rank on which no operation made the value received it from another rank.
    return min(everywhere, key=_doubt, default=None)


def _doubt(report: NonFinite) -> int:
    if report._is_unmade():
        return 3
    if UNLINKED not in report.detail:
        return 0
    return 1 if report.phase == "parameter" else 2  # a target may be masked out
