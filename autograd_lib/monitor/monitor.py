"""Every gradient at every step, seen without slowing training down.

`GradientMonitor` reduces all gradients to a row of statistics within the step; nothing waits for
the device until somebody reads. `core.reduction` says how gradients are reduced, `history` what is
remembered and how issues are found.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Sequence
from itertools import repeat
from operator import attrgetter, is_, is_not
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import OptState
from torch.compiler import disable
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from autograd_lib.core.names import parameters_by_name
from autograd_lib.core.optimizers import innermost_optimizer
from autograd_lib.core.reduction import Reduction
from autograd_lib.core.rows import PLAIN, norms, root_sum_squares
from autograd_lib.core.shards import is_distributed
from autograd_lib.core.snapshot import is_replay
from autograd_lib.core.statistics import COUNTS
from autograd_lib.gradients import check_not_meta
from autograd_lib.monitor.exports import Readings
from autograd_lib.monitor.history import FROZEN, IDLE, MISSING, PRESENT, UNWATCHED, Issue, Record
from autograd_lib.monitor.hooks import (
    EndOfBackward,
    Handle,
    ScalerHook,
    calling,
    has_closure,
    hooked,
    remove_all,
    weak,
)
from autograd_lib.monitor.noise_scale import NoiseScale
from autograd_lib.monitor.options import check_options
from autograd_lib.monitor.watched import Watched

__all__ = ["GradientMonitor", "Issue", "NoiseScale"]

_THOROUGH_EVERY = 16  # steps, and where a gradient is absent, replaced parameters are looked for
_REQUIRES = attrgetter("requires_grad")
_MOST_PLANS = 8  # of patterns of absent gradients; then zeros stand in for those that are absent


class GradientMonitor(Readings):
    r"""Watch the gradient of every parameter at every step, without waiting for the device.

    A step is one `optimizer.step()` where an optimizer is given. The monitor records the gradients
    that the optimizer receives: accumulated, averaged over processes, clipped, unscaled. Call
    `look()` to record them before they are clipped. The parameters watched are those of the model
    that this optimizer holds at the moment. Without an optimizer all are, and a step is one
    completed `backward()` that reaches a parameter, with `.grad` as it stands. Parameters that
    join, leave or are replaced are followed: the history has a column for each name.

    Shared parameters count once, under their first name; sparse gradients as if densified, complex
    ones by modulus; half-precision ones are reduced in float32, where their norm is finite. For
    `DTensor` parameters (FSDP2, tensor parallelism) each rank reports global values. This takes one
    collective per step and sharded mesh dimension, so attach a monitor on every rank.

    What it hooks: `optimizer.register_step_pre_hook` and `register_step_post_hook`; `scaler.step`,
    to see the steps that it skips; without an optimizer or with `noise=True`,
    `register_post_accumulate_grad_hook` of every parameter. The hooks run after those that were
    registered before, hold neither the monitor nor the model, and read only: training is bit-equal.
    They go with `remove()` of their handles, with the end of a `with` block, with the monitor.

    A step costs some three passes over the gradients; `collect`, `update_every`, `histogram_every`
    and `noise` add to that. Reading (`history`, `issues`, the summary, the exports) is all that
    waits for the device.

    Args:
        model: The module whose parameters are watched.
        optimizer: Its `step()` is a step. Of a wrapper (Accelerate's, Opacus's, a Lookahead) the
            optimizer inside is taken. Optimizers that step within backward and release gradients
            need a monitor each: without `optimizer` that is an error at the first step.
        scaler: The `GradScaler` in use. The monitor then unscales values, with fused optimizers
            too, and records which steps the scaler skips; that is an issue only from the twentieth
            skip in a row on. Without `scaler` a skipped step looks like accumulation.
        history: How many recorded steps to remember, at 57 bytes for each step and parameter, on
            the host (of a model on CUDA in pinned memory).
        every: Record the first step and each `every`-th step after it. `update_every` and
            `histogram_every` apply to recorded steps alone.
        collect: What to add to norm, mean, std, min, max and abs_max, which are always there:
            "zero_fraction", "nan_count", "inf_count", "cosine" (with the gradient seen before, of
            which a copy is kept).
        update_every: Measure the norm of the update relative to that of the weight every so many
            steps; each time costs a copy of the parameters, and it needs `optimizer`. 0 for never.
        histogram_every: Count magnitudes by powers of two every so many steps; 0 for never.
        noise: Keep what `noise_scale` needs, at each backward.
        explode_above: A larger norm is an issue.
        vanish_below: A smaller norm is an issue.

    Raises:
        TypeError: `model` is not a module, `optimizer` neither a `torch.optim.Optimizer` nor a
            wrapper of one, or `scaler` not a `torch.amp.GradScaler`.
        ValueError: An option is unknown or out of range, the model has no parameters, or the
            optimizer holds none of them.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> with GradientMonitor(model, optimizer) as monitor:
        ...     for _ in range(2):
        ...         model(torch.tensor([[3.0, 4.0]])).sum().backward()
        ...         optimizer.step()
        ...         optimizer.zero_grad()
        >>> monitor.history["norm"]
        array([[5., 1.],
               [5., 1.]])
        >>> monitor
        GradientMonitor(2 parameters, 2 steps, no issues)
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | None = None,
        scaler: torch.amp.GradScaler | None = None,
        *,
        history: int = 1000,
        every: int = 1,
        collect: Sequence[str] = ("norm", "mean", "std", "min", "max"),
        update_every: int = 0,
        histogram_every: int = 0,
        noise: bool = False,
        explode_above: float = 1e3,
        vanish_below: float = 1e-8,
    ) -> None:
        check_options(
            model,
            optimizer,
            scaler,
            collect=collect,
            noise=noise,
            thresholds=(explode_above, vanish_below),
            history=history,
            every=every,
            update_every=update_every,
            histogram_every=histogram_every,
        )
        named = parameters_by_name(model)
        if not named:
            raise ValueError("GradientMonitor: the model has no parameters to watch")
        if lazy := [name for name, parameter in named.items() if is_lazy(parameter)]:
            raise ValueError(
                f"GradientMonitor: the parameters {lazy} are lazy and have no shape yet; call the "
                "model once on an input, then make the monitor"
            )
        self._written, self._writers = {}, {}
        self._model = weakref.ref(model)
        self._wrapper = weak(optimizer)
        if optimizer is not None:
            optimizer = innermost_optimizer("GradientMonitor", optimizer)
        self._watched = Watched(model, optimizer)
        self._optimizer = weak(optimizer)
        self._scaler = weak(scaler)
        self._every, self._update_every = every, update_every
        self._histogram_every = histogram_every
        self._collect = frozenset(collect)
        self._noise = noise

        self._plans: dict[tuple[str, bytes], Reduction] = {}
        thresholds = explode_above, vanish_below
        self._record = Record(history, histogram_every // every, thresholds)
        self._follow(self._watched.parameters()[0])
        self._is_open = False  # whether the last look may be replaced, its step not being taken
        self._taken = 0  # steps of the optimizer, for the hook of the scaler
        self._was_attached = self._has_warned = False
        self._changes = _changes(self._live_parameters())  # to tell training by
        self._previous: list[Tensor | None] | None = None  # gradients, for the cosine
        self._weights: list[Tensor] | None = None  # before the step, for the size of the update
        self._end = EndOfBackward(calling(self, "_after_backward"))
        self._micro_batches = (0, 0.0)  # in the step, and the variance of their sum in units of one
        self._handles: list[Handle] = []
        self._handles_of_parameters: list[Handle] = []  # which are among these
        self._finalizer: weakref.finalize[..., Any] | None = None

    def __repr__(self) -> str:
        issues = len(self._record.issues)
        found = f"{issues} issue{'s' * (issues > 1)}" if issues else "no issues"
        if not (self._was_attached or self._record.step):
            found = "never attached: nothing is watched"
        parameters, steps = len(self._record.names), self._record.step
        return f"GradientMonitor({parameters} parameters, {steps} steps, {found})"

    # Hooks: when a step is.

    def register_hooks(self) -> list[Handle]:
        """Start watching; a `with` block does so by itself.

        Returns:
            The handles of the hooks, each with `.remove()`. A second call starts anew, and the
            handles of the first one are removed.

        Raises:
            RuntimeError: If the model is gone.
        """
        self.remove_hooks()
        self._was_attached = True
        model, optimizer, scaler = self._model(), self._optimizer(), self._scaler()
        if model is None:
            raise RuntimeError(
                "register_hooks: the model no longer exists (a monitor keeps only a weak reference)"
            )
        if optimizer is not None:
            self._handles += [
                # A compiled `optimizer.step` would trace them and what they call.
                optimizer.register_step_pre_hook(disable(calling(self, "_before_step"))),
                optimizer.register_step_post_hook(disable(calling(self, "_after_step"))),
            ]
            if scaler is not None:
                self._handles.append(ScalerHook(scaler, self))
        self._hook_parameters(self._live_parameters())
        self._finalizer = weakref.finalize(self, remove_all, self._handles)
        return self._handles  # the list itself, as parameters may join

    def _hook_parameters(self, parameters: Sequence[nn.Parameter]) -> None:
        """Learn of the end of a backward from its gradients; from no others if called again."""
        remove_all(self._handles_of_parameters)
        self._handles[:] = [h for h in self._handles if h not in self._handles_of_parameters]
        if self._optimizer() is None or self._noise:
            gradient_is_there = calling(self._end, "gradient_is_there")
            self._handles_of_parameters = [
                hooked(parameter, gradient_is_there)
                for parameter in parameters
                if parameter.is_floating_point() or parameter.is_complex()
            ]
            self._handles += self._handles_of_parameters

    def remove_hooks(self) -> None:
        """Stop watching; the history stays readable."""
        if self._finalizer is not None:
            self._finalizer()
        self._handles, self._handles_of_parameters = [], []
        self._is_open = self._record.is_undecided = False

    def __enter__(self) -> GradientMonitor:
        self.register_hooks()
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "GradientMonitor: it hooks into a running program and cannot be pickled or copied; "
            "save its state_dict() and load that into a new monitor"
        )

    def __exit__(self, *_: object) -> None:
        self.remove_hooks()

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        step = self._record.step + (not self._is_open)  # `look` has opened it, perhaps
        self._weights = None
        self._taken += 1
        if not has_closure(args, kwargs):  # else the gradients are yet to come
            scale = getattr(optimizer, "grad_scale", None)  # set for the duration of a fused step
            self._end_step(scale, getattr(optimizer, "found_inf", None))
        if _is_due(step, self._every) and _is_due(step, self._update_every):
            with torch.no_grad():
                self._weights = [parameter.clone() for parameter in self._live_parameters()]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if has_closure(args, kwargs):
            self._end_step()
        if self._weights is not None:
            self._measure_update(self._weights)
            self._weights = None

    def _after_backward(self) -> None:
        if is_replay.get():  # of a guard, which undoes it
            return
        reached, parameters = self._end.reached, self._live_parameters()
        pairs = zip(self._record.names, parameters, strict=bool(parameters))
        if released := [n for n, p in pairs if p.grad is None and id(p) in reached]:
            raise RuntimeError(
                "GradientMonitor: expected gradients to be there at the end of backward, got those "
                f"of {released} released within it, as by optimizers that step in hooks; step "
                "after backward, or give each such optimizer a monitor of its own by optimizer="
            )
        scale = _scale_of(self._scaler())
        if self._noise:
            self._record_noise(scale)
        if self._optimizer() is None:
            self._is_open = False
            self._record_step(scale)
            self._is_open = True

    # Looking: what is recorded of a step.

    def look(self, *, skipped: bool = False) -> None:
        """Record the gradients as they stand now, before they are clipped, as those of this step.

        Call it once the gradients of a step are all there. All its statistics are then those
        before clipping; at the optimizer's step only `history["clipped_norm"]` is recorded, the
        total norm that is left. In a closure, too, call it before clipping.

        A second `look()` before the optimizer's step overwrites the first. If no step follows, as
        after an exception, the next `look()` overwrites it too. Without an optimizer it overwrites
        what was recorded at the end of the last backward. Where the hooks are not registered, each
        call is a step. With `scaler` it does not matter whether `scaler.unscale_(optimizer)` was
        called before.

        Args:
            skipped: The step is not going to be taken: what was looked at, or else what is there
                now, is recorded as skipped.

        Example:
            >>> model = torch.nn.Linear(2, 1, bias=False)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> with GradientMonitor(model, optimizer) as monitor:
            ...     model(torch.tensor([[3.0, 4.0]])).sum().backward()
            ...     monitor.look()
            ...     _ = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            ...     optimizer.step()
            >>> monitor.history["total_norm"], monitor.history["clipped_norm"].round(4)
            (array([5.]), array([1.]))
        """
        self._record.is_undecided = False
        if skipped and self._is_open:
            self._keep_skipped(True)
        else:
            scaler = self._scaler()
            scale = _scale_of(scaler)
            if scaler is not None and scale is not None:
                states = scaler._per_optimizer_states
                mine = [states.get(id(o), {}) for o in (self._optimizer(), self._wrapper())]
                if any(state.get("stage", OptState.READY) is not OptState.READY for state in mine):
                    scale = None
                self._record.is_undecided = bool(self._handles) and not skipped
            self._record_step(scale, skipped or None)
        self._is_open = bool(self._handles) and not skipped

    def _has(self, optimizer: object) -> bool:
        return optimizer in (self._optimizer(), self._wrapper())

    def _end_step(self, scale: Tensor | None = None, skipped: Tensor | None = None) -> None:
        """Record what the optimizer sees: all of it, or where somebody has looked its norm."""
        self._record.is_undecided = False
        if not self._is_open:
            self._record_step(scale, skipped)
            return
        self._is_open = False
        self._keep_skipped(skipped)
        _, grads = self._gradients()
        if grads and _is_due(self._record.step, self._every):
            norm = root_sum_squares(norms(self._reduce("gradients", grads)[1]))
            if scale is not None:
                norm = norm / scale.to(norm.device, norm.dtype)
            self._record.keep("clipped_norm", norm)

    def _keep_skipped(self, skipped: Tensor | bool | None) -> None:
        if skipped is not None and _is_due(self._record.step, self._every):
            skipped = torch.as_tensor(skipped, dtype=torch.float32).reshape(())
            self._record.keep("skipped", skipped)

    def _record_step(
        self, scale: Tensor | None = None, skipped: Tensor | bool | None = None
    ) -> None:
        """Record the gradients as they stand, as those of one more step or of the open one."""
        parameters, grads = self._gradients()
        if not grads:
            return
        record = self._record
        if self._is_open:
            record.reopen()
        else:
            record.step += 1
        self._micro_batches = (0, 0.0)
        if not _is_due(record.step, self._every):
            return
        counts = not self._collect.isdisjoint(COUNTS)
        plan, fields = self._reduce("gradients", grads, counts=counts)
        if scale is not None:
            unscale = scale.to(fields.device, fields.dtype).reciprocal()
            fields[1:PLAIN] *= unscale
        record.keep("absent", self._absent(parameters, grads))
        record.keep("fields", fields[:PLAIN])
        self._keep_skipped(skipped)
        if counts:
            record.keep("counts", fields[PLAIN:])
        wants_histogram = _is_due(record.step, self._histogram_every)
        if scale is not None and (wants_histogram or "cosine" in self._collect):
            grads = [None if grad is None else grad * unscale for grad in grads]
        if wants_histogram:
            record.keep("histogram", plan.histograms(grads))
        if "cosine" in self._collect:
            record.keep("cosine", self._cosine(grads, norms(fields)))
        record.look()

    def _live_parameters(self, *, thorough: bool = False) -> Sequence[nn.Parameter]:
        """The watched parameters; none if the model is gone."""
        parameters, changed = self._watched.parameters(thorough=thorough)
        if changed:
            self._follow(parameters)
            if self._handles:
                self._hook_parameters(parameters)
        return parameters

    def _follow(self, parameters: Sequence[nn.Parameter]) -> None:
        """Watch other parameters from now on."""
        self._record.follow(self._watched, parameters)
        self._plans.clear()
        self._previous = self._weights = None
        present = torch.full((len(parameters),), PRESENT, dtype=torch.uint8, device="cpu")
        self._all_present = present

    def _gradients(self) -> tuple[Sequence[nn.Parameter], list[Tensor | None]]:
        """The watched parameters and their gradients as they stand; none if the model is gone."""
        parameters = self._live_parameters()
        grads = [parameter.grad for parameter in parameters]
        if all(map(is_not, grads, repeat(None))) and self._record.step % _THOROUGH_EVERY:
            return parameters, grads
        parameters = self._live_parameters(thorough=True)
        return parameters, [parameter.grad for parameter in parameters]

    def _absent(self, parameters: Sequence[nn.Parameter], grads: Sequence[Tensor | None]) -> Tensor:
        """Which gradients are absent, and whether they are wanted."""
        if all(map(is_not, grads, repeat(None))) and all(map(_REQUIRES, parameters)):
            return self._all_present
        wanted, unwanted = (PRESENT, MISSING), (IDLE, FROZEN)
        kinds = [
            (wanted if p.requires_grad else unwanted)[g is None]
            for p, g in zip(parameters, grads, strict=True)
        ]
        return torch.tensor(kinds, dtype=torch.uint8, device="cpu")

    def _reduce(
        self, what: str, tensors: Sequence[Tensor | None], *, counts: bool = False
    ) -> tuple[Reduction, Tensor]:
        """The plan for tensors that look like these, and what it reduces them to."""
        key = what, bytes(map(is_, tensors, repeat(None)))
        if key not in self._plans and len(self._plans) >= _MOST_PLANS:
            # With other experts in each step a new plan would cost more than reading some zeros.
            key = what, b"filled"
            pairs = zip(tensors, self._live_parameters(), strict=True)
            tensors = [_zeros_like(p) if t is None else t for t, p in pairs]
        if key in self._plans:
            try:
                return self._plans[key], self._plans[key](tensors, counts=counts)
            except RuntimeError:  # it no longer fits: the model has moved to another device, say
                pass
        check_not_meta("GradientMonitor", self._record.names, tensors)
        parameters = self._live_parameters()
        self._record.numel[:] = [parameter.numel() for parameter in parameters]
        plan = self._plans[key] = Reduction(tensors, parameters)
        return plan, plan(tensors, counts=counts)

    def _cosine(self, grads: Sequence[Tensor | None], norm: Tensor) -> Tensor:
        """Cosine of each gradient with the one recorded before it, NaN where one is absent or 0."""
        with torch.no_grad():
            units = [
                None if g is None else g.to(torch.promote_types(g.dtype, torch.float32)) / n
                for g, n in zip(grads, norm, strict=True)
            ]
            before, self._previous = self._previous, units
            if before is None:
                return torch.full_like(norm, torch.nan)
            pairs = zip(units, before, strict=True)
            products = [
                None if a is None or b is None else a * b.to(a.device).conj() for a, b in pairs
            ]
            numel, mean = self._reduce("products", products)[1][:2]
            return torch.where(numel > 0, (mean * numel).clamp(-1, 1), torch.nan)

    def _measure_update(self, before: Sequence[Tensor]) -> None:
        """Record |update| / |weight| of the step that was looked at last."""
        with torch.no_grad():
            updates = [p - b for p, b in zip(self._live_parameters(), before, strict=False)]
            if updates:
                plan, fields = self._reduce("updates", updates)
                self._record.keep("update_ratio", norms(fields) / norms(plan(before)))

    def _record_noise(self, scale: Tensor | None) -> None:
        """Record the squared norm of the gradient that has accumulated so far in this step."""
        parameters, model = self._live_parameters(), self._model()
        if not parameters:
            return
        count, variance = self._micro_batches[0] + 1, self._micro_batches[1] + 1
        world = max(_mesh_size(parameter) for parameter in parameters)
        if isinstance(model, DistributedDataParallel):
            world = torch.distributed.get_world_size(model.process_group)
            world = world if model.require_backward_grad_sync else 0
        if world > 1:
            variance = count / world  # what was local so far has been averaged over processes
        self._micro_batches = (count, variance)
        _, fields = self._reduce("gradients", self._gradients()[1])
        square = norms(fields).square().sum()
        if scale is not None:
            square = square / scale.to(square.device, square.dtype).square()
        known = [square.new_full((), number) for number in self._micro_batches]
        self._record.keep("noise", torch.stack([*known, square]))

    def _is_unwatched(self) -> bool:
        """Tell whether the model was trained and nobody attached the monitor; warn of it once."""
        if self._was_attached or self._record.step:
            return False
        parameters = self._live_parameters()
        has_changed = bool(parameters) and _changes(parameters) != self._changes
        if not has_changed and all(p.grad is None for p in parameters):
            return False
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(f"GradientMonitor: {UNWATCHED}", stacklevel=3)
        return True

    # State.

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, as tensors and plain values, which `torch.load` takes as safe."""
        return self._record.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the history of another monitor of the same model, compiled or not.

        The gradients themselves are not saved: the first "cosine" after loading is NaN.

        Raises:
            ValueError: The parameters have other names; nothing is changed then.
        """
        self._record.load_state_dict(state)


def _changes(parameters: Sequence[nn.Parameter]) -> int:
    return sum(p._version for p in parameters if not p.is_inference())


def _is_due(step: int, every: int) -> bool:
    return every > 0 and (step - 1) % every == 0


def _scale_of(scaler: torch.amp.GradScaler | None) -> Tensor | None:
    return scaler._scale if scaler is not None and scaler.is_enabled() else None


def _zeros_like(parameter: Tensor) -> Tensor:
    if is_distributed(parameter):
        return torch.zeros_like(parameter)
    return parameter.new_zeros(()).expand(parameter.shape)


def _mesh_size(parameter: Tensor) -> int:
    return parameter.device_mesh.size() if is_distributed(parameter) else 1
