"""Every gradient at every step, seen without slowing training down.

`GradientMonitor` reduces all gradients to a row of statistics within the step and leaves the row on
the device; nothing waits until somebody reads. How gradients are reduced stands in `_reductions`,
what is remembered and what was amiss in `_history`.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from itertools import repeat
from numbers import Real
from operator import is_not
from os import PathLike
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.compiler import disable
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from autograd_lib.core.reduction import Reduction, home
from autograd_lib.core.rows import BINS, LOWEST, norms, root_sum_squares
from autograd_lib.core.shards import is_distributed
from autograd_lib.core.statistics import (
    ALWAYS,
    COUNTS,
    STATISTICS,
    derive,
    derive_counts,
    describe,
)
from autograd_lib.gradients import GradientStatistics, check_module
from autograd_lib.monitor.activations import ActivationHook, Activations
from autograd_lib.monitor.exports import (
    columns,
    write_csv,
    write_parquet,
    write_tensorboard,
)
from autograd_lib.monitor.history import (
    FROZEN,
    KINDS,
    MISSING,
    PRESENT,
    Episodes,
    Issue,
    Ring,
)
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
from autograd_lib.monitor.noise_scale import NoiseScale, estimate

__all__ = ["GradientMonitor", "Issue", "NoiseScale"]

_SEND_EVERY = 64  # rows go to the host in the background; issues are found in those that arrived
_DETAILED_STEPS = 10  # for so long are counts and histograms taken once an issue has been read
_MICRO_BATCHES = 16  # in a step, for whose norms there is room
_UNASKED_HISTOGRAMS = 50  # that are remembered, of steps after an alarm
_EXCUSED_SKIPS = 20  # in a row: by then a scaler has lowered its scale by a factor of a million
_MOST_PLANS = 8  # of patterns of absent gradients; then zeros stand in for those that are absent


class GradientMonitor:
    r"""Watch the gradient of every parameter at every step, without waiting for the device.

    A step is one `optimizer.step()` where an optimizer is given: what is seen are the gradients as
    the optimizer sees them, accumulated, reduced over processes, clipped, and unscaled. Without
    one, a step is one completed `backward()` that reaches a parameter, with `.grad` as it stands.

    Shared parameters count once, under their first name; sparse gradients as if densified, complex
    ones by modulus; half-precision ones are reduced in float32, where their norm is finite. Of
    `DTensor` parameters (FSDP2, tensor parallelism) every rank sees the global values, after one
    collective per step and sharded mesh dimension: every rank must then have a monitor.

    What it hooks: `optimizer.register_step_pre_hook` and `register_step_post_hook`; `scaler.step`,
    to see the steps that it skips; without an optimizer or with `noise=True`,
    `register_post_accumulate_grad_hook` of every parameter; with `activations`, a forward hook of
    each module. The hooks run after those that were registered before, hold neither the monitor nor
    the model, and read only: training is bit-equal. They go with `remove()` of their handles, with
    the end of a `with` block, with the monitor.

    A step costs some three passes over the gradients; `collect`, `update_every`, `histogram_every`,
    `activations` and `noise` add to that. Reading (`history`, `issues`, `activations`, the summary,
    the exports) is all that waits for the device.

    Args:
        model: The module whose parameters are watched.
        optimizer: Its `step()` is a step. (An optimizer that runs within backward cannot be seen.)
        scaler: The `GradScaler` in use. Values are then unscaled, with fused optimizers too, and a
            step that it skips is recorded as skipped, and is no issue before the twentieth in a
            row. Without it, a backward that no optimizer step
            follows counts as accumulation.
        history: How many of the last looked-at steps are remembered: 56 bytes for each and for
            each parameter, on the device (on CUDA also in pinned memory).
        every: Look at the first step and at every so many after it. What `update_every` and
            `histogram_every` ask for is done in those of their steps that are looked at.
        collect: What to add to norm, mean, std, min, max and abs_max, which are always there:
            "zero_fraction", "nan_count", "inf_count", "cosine" (with the gradient seen before, of
            which a copy is kept).
        update_every: Measure the norm of the update relative to that of the weight every so many
            steps; each time costs a copy of the parameters, and it needs `optimizer`. 0 for never.
        histogram_every: Count magnitudes by powers of two every so many steps; 0 for never. Once an
            issue has been read, ten steps have counts and histograms without being asked for.
        activations: Statistics of the outputs of modules in training mode: True for all modules
            without submodules, or qualified names. Compiled code is not watched.
        noise: Keep what `noise_scale` needs, at each backward.
        explode_above: A larger norm is an issue.
        vanish_below: A smaller norm is an issue.

    Raises:
        TypeError: `model` is not a module, `optimizer` not a `torch.optim.Optimizer`, or `scaler`
            not a `torch.amp.GradScaler`.
        ValueError: An option is unknown or out of range, or the model has no parameters.

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
        activations: bool | Sequence[str] = False,
        noise: bool = False,
        explode_above: float = 1e3,
        vanish_below: float = 1e-8,
    ) -> None:
        _check(model, optimizer, scaler)
        _check_options(
            optimizer,
            collect,
            {"history": history, "every": every},
            {"update_every": update_every, "histogram_every": histogram_every},
            noise,
        )
        _check_thresholds(vanish_below, explode_above)
        named = dict(model.named_parameters())
        if not named:
            raise ValueError("GradientMonitor: the model has no parameters to watch")
        if lazy := [name for name, parameter in named.items() if is_lazy(parameter)]:
            raise ValueError(
                f"GradientMonitor: the parameters {lazy} are lazy and have no shape yet; call the "
                "model once on an input, then make the monitor"
            )
        self._names = list(named)
        self._numel = np.array([parameter.numel() for parameter in named.values()])
        self._complex = np.array([parameter.is_complex() for parameter in named.values()])
        self._model = weakref.ref(model)
        self._parameters = [weakref.ref(parameter) for parameter in named.values()]
        self._optimizer = weak(optimizer)
        self._scaler = weak(scaler)
        self._capacity, self._every = history, every
        self._update_every, self._histogram_every = update_every, histogram_every
        self._collect = frozenset(collect)
        self._noise = noise
        self._activations = Activations(model, activations) if activations else None

        self._step = 0
        self._plans: dict[bytes, Reduction] = {}
        self._rings: dict[str, Ring] = {}
        self._absent = np.zeros((history, len(named)), dtype=np.uint8)
        self._skipped = np.zeros(history, dtype=bool)
        self._episodes = Episodes(self._names, self._numel > 0, explode_above, vanish_below)
        self._fed = 0  # rows in which issues were looked for
        self._skips = 0  # in a row
        self._detailed_until = 0
        self._previous: list[Tensor | None] | None = None  # gradients, for the cosine
        self._weights: list[Tensor] | None = None  # before the step, for the size of the update
        self._end = EndOfBackward(calling(self, "_after_backward"))
        self._micro_batches = (0, 0.0)  # in the step, and the variance of their sum in units of one
        self._handles: list[Handle] = []
        self._finalizer: weakref.finalize[..., Any] | None = None

    def __repr__(self) -> str:
        issues = len(self._episodes.issues)
        found = f"{issues} issue{'s' * (issues > 1)}" if issues else "no issues"
        return f"GradientMonitor({len(self._names)} parameters, {self._step} steps, {found})"

    # Hooks: when a step is.

    def register_hooks(self) -> list[Handle]:
        """Start to watch; a `with` block does so by itself.

        Returns:
            The handles of the hooks, each with `.remove()`. A second call starts anew, and the
            handles of the first one are removed.

        Raises:
            RuntimeError: If the model is gone.
        """
        self.remove_hooks()
        model, optimizer, scaler = self._model(), self._optimizer(), self._scaler()
        if model is None:
            raise RuntimeError("register_hooks: the model that was to be watched is gone")
        if optimizer is not None:
            self._handles += [
                # A compiled `optimizer.step` would trace them and what they call.
                optimizer.register_step_pre_hook(disable(calling(self, "_before_step"))),
                optimizer.register_step_post_hook(disable(calling(self, "_after_step"))),
            ]
            if scaler is not None:
                self._handles.append(ScalerHook(scaler, self))
        if optimizer is None or self._noise:
            gradient_is_there = calling(self._end, "gradient_is_there")
            self._handles += [
                hooked(parameter, gradient_is_there)
                for parameter in self._live_parameters()
                if parameter.is_floating_point() or parameter.is_complex()
            ]
        if self._activations is not None:
            modules = dict(model.named_modules())
            self._handles += [
                modules[name].register_forward_hook(ActivationHook(self._activations, place))
                for place, name in enumerate(self._activations.names)
            ]
        self._finalizer = weakref.finalize(self, remove_all, self._handles)
        return list(self._handles)

    def remove_hooks(self) -> None:
        """Stop to watch; what was seen stays readable."""
        if self._finalizer is not None:
            self._finalizer()
        self._handles = []

    def __enter__(self) -> GradientMonitor:
        if self._finalizer is not None and self._finalizer.alive:
            raise RuntimeError(
                "GradientMonitor: it watches already, and the end of this block would stop it; "
                "leave the other block, or call remove_hooks() first"
            )
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
        step = self._step + 1
        self._weights = None
        if not has_closure(args, kwargs):  # else the gradients are yet to come
            scale = getattr(optimizer, "grad_scale", None)  # set for the duration of a fused step
            self._look(scale=scale, skipped=getattr(optimizer, "found_inf", None))
        if _is_due(step, self._every) and _is_due(step, self._update_every):
            with torch.no_grad():
                self._weights = [parameter.clone() for parameter in self._live_parameters()]

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if has_closure(args, kwargs):
            self._look()
        if self._weights is not None:
            self._measure_update(self._weights)
            self._weights = None

    def _after_backward(self) -> None:
        scaler = self._scaler()
        scale = scaler._scale if scaler is not None and scaler.is_enabled() else None
        if self._noise:
            self._record_noise(scale)
        if self._optimizer() is None:
            self._look(scale=scale)

    # Looking: what is recorded of a step.

    def _look(self, *, scale: Tensor | None = None, skipped: Tensor | bool | None = False) -> None:
        """Record the gradients as they stand, as those of one more step."""
        grads = self._gradients()
        if not grads:
            return
        self._step += 1
        self._micro_batches = (0, 0.0)
        if not _is_due(self._step, self._every):
            if self._activations is not None:
                self._activations.take()
            return
        detailed = self._step <= self._detailed_until
        counts = detailed or not self._collect.isdisjoint(COUNTS)
        absent, plan, fields = self._reduce(grads, counts=counts)
        unscale = None if scale is None else scale.to(fields.device, fields.dtype).reciprocal()
        if unscale is not None:
            fields[1:7] *= unscale
        place = self._count % self._capacity
        self._absent[place], self._skipped[place] = absent, skipped is True
        self._keep("fields", fields[:7])
        if isinstance(skipped, Tensor):
            self._keep("skipped", skipped.reshape(()).to(fields.device, fields.dtype))
        if counts:
            self._keep("counts", fields[7:])
        if detailed or _is_due(self._step, self._histogram_every):
            self._keep("histogram", plan.histograms(_times(grads, unscale)))
        if "cosine" in self._collect:
            norm = norms(fields)
            self._keep("cosine", self._cosine(_times(grads, unscale), norm))
        if self._activations is not None and (found := self._activations.take()) is not None:
            self._keep("activations", found)
        if self._count % min(_SEND_EVERY, self._capacity) == 0:
            for ring in self._rings.values():
                ring.send()
            self._find_issues()

    @property
    def _count(self) -> int:
        return self._rings["fields"].count if "fields" in self._rings else 0

    def _keep(self, name: str, record: Tensor) -> None:
        ring = self._rings.get(name)
        if ring is None:
            ring = Ring(self._room(name), record.shape, record.dtype, record.device)
        elif ring.device != record.device:  # the model has moved
            ring = Ring.from_state(ring.state_dict(), self._room(name), record.device)
        self._rings[name] = ring
        ring.append(self._step, record)

    def _room(self, name: str) -> int:
        """How many records to keep; histograms are large, and seldom unless they are asked for."""
        if name == "noise":
            return _MICRO_BATCHES * self._capacity
        if name != "histogram" or self._histogram_every == 1:
            return self._capacity
        asked = self._capacity // self._histogram_every if self._histogram_every else 0
        return min(self._capacity, asked + _UNASKED_HISTOGRAMS)

    def _live_parameters(self) -> Sequence[nn.Parameter]:
        """The watched parameters; none if the model is gone."""
        model = self._model()
        if model is None:
            return []
        parameters: list[Any] = [ref() for ref in self._parameters]
        if not all(map(is_not, parameters, repeat(None))):  # replaced, as `fully_shard` does
            named = dict(model.named_parameters())
            if list(named) != self._names:
                raise RuntimeError(
                    f"GradientMonitor: the model has other parameters than when it was given; "
                    f"expected {self._names}, got {list(named)}; make a new monitor"
                )
            parameters = [*named.values()]
            self._parameters = [weakref.ref(parameter) for parameter in parameters]
        return parameters

    def _gradients(self) -> list[Tensor | None]:
        """The gradients of the watched parameters as they stand; none if the model is gone."""
        if self._model() is None:
            return []
        try:
            return [ref().grad for ref in self._parameters]  # type: ignore[union-attr]
        except AttributeError:  # one of them is gone
            return [parameter.grad for parameter in self._live_parameters()]

    def _plan(self, tensors: Sequence[Tensor | None], key: bytes) -> Reduction:
        if key not in self._plans:
            for name, tensor in zip(self._names, tensors, strict=True):
                if tensor is not None and tensor.is_meta:
                    raise ValueError(
                        f"GradientMonitor: the gradient of {name!r} with shape "
                        f"{tuple(tensor.shape)} is on the meta device, which holds no values; call "
                        "model.to_empty(device=...) and load the weights before training"
                    )
            parameters = self._live_parameters()
            self._numel[:] = [parameter.numel() for parameter in parameters]
            self._plans[key] = Reduction(tensors, parameters)
        return self._plans[key]

    def _planned(
        self,
        tensors: Sequence[Tensor | None],
        key: bytes,
        *,
        counts: bool = False,
    ) -> tuple[Reduction, Tensor]:
        """The plan for tensors that look like these, and what it reduces them to."""
        if key not in self._plans and len(self._plans) >= _MOST_PLANS:
            # Other experts in each step: to plan each time would cost more than to read some zeros.
            key = key[:1] + b"filled"
            pairs = zip(tensors, self._live_parameters(), strict=True)
            tensors = [_zeros_like(p) if t is None else t for t, p in pairs]
        plan = self._plan(tensors, key)
        try:
            return plan, plan(tensors, counts=counts)
        except RuntimeError:  # they look otherwise than when it was made: on another device, say
            del self._plans[key]
            plan = self._plan(tensors, key)
            return plan, plan(tensors, counts=counts)

    def _reduce(
        self, grads: Sequence[Tensor | None], *, counts: bool = False
    ) -> tuple[np.ndarray | int, Reduction, Tensor]:
        """Which gradients are absent and why, the plan for them, and what it reduces them to."""
        absent: np.ndarray | int = PRESENT
        key = b""
        if not all(map(is_not, grads, repeat(None))):
            pairs = zip(grads, self._live_parameters(), strict=True)
            kinds = [
                PRESENT if g is not None else MISSING if p.requires_grad else FROZEN
                for g, p in pairs
            ]
            absent = np.array(kinds, dtype=np.uint8)
            key = absent.tobytes()
        return absent, *self._planned(grads, key, counts=counts)

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
            key = b"cosine" + bytes(product is None for product in products)
            numel, mean = self._planned(products, key)[1][:2]
            return torch.where(numel > 0, (mean * numel).clamp(-1, 1), torch.nan)

    def _measure_update(self, before: Sequence[Tensor]) -> None:
        """Record |update| / |weight| of the step that was looked at last."""
        with torch.no_grad():
            updates = [p - b for p, b in zip(self._live_parameters(), before, strict=False)]
            if updates:
                plan, fields = self._planned(updates, b"update")
                self._keep("update_ratio", norms(fields) / norms(plan(before)))

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
        grads = self._gradients()
        if all(grad is None for grad in grads):  # taken within backward
            return
        *_, fields = self._reduce(grads)
        square = norms(fields).square().sum()
        if scale is not None:
            square = square / scale.to(square.device, square.dtype).square()
        known = [square.new_full((), number) for number in self._micro_batches]
        self._keep("noise", torch.stack([*known, square]))

    # Reading: what waits for the device.

    def _read(self) -> None:
        for ring in self._rings.values():
            ring.read()
        self._find_issues()

    def _find_issues(self) -> None:
        """Look for issues in the rows that have come to the host since the last time."""
        if "fields" not in self._rings:
            return
        ring = self._rings["fields"]
        places = ring.places(self._fed)
        self._fed = max(self._fed, ring.arrived)
        skipped = self._were_skipped(places)
        for i, was_skipped in enumerate(skipped.tolist()):
            self._skips = self._skips + 1 if was_skipped else 0
            skipped[i] = 0 < self._skips < _EXCUSED_SKIPS
        places = places[~skipped]  # to skip a step now and then is how a scaler finds its scale
        absent = self._absent[places]
        statistics = derive(ring.values[places], absent == PRESENT)
        if self._episodes.feed(ring.steps[places], statistics, absent):
            self._detailed_until = self._step + _DETAILED_STEPS

    def _were_skipped(self, places: np.ndarray) -> np.ndarray:
        """Which of the rows are those of steps that the scaler skipped."""
        skipped = self._skipped[places]
        if "skipped" in self._rings:
            skipped = skipped | (
                self._rings["skipped"].at(self._rings["fields"].steps[places]) == 1
            )
        return skipped

    @property
    def issues(self) -> list[Issue]:
        """What was amiss, in the order of steps; what lasts for many steps is one `Issue`."""
        self._read()
        return list(self._episodes.issues)

    @property
    def history(self) -> dict[str, Any]:
        """What was recorded of the last steps, as NumPy arrays of shape [steps, parameters].

        `["step"]` and `["names"]` say what the rows and columns are, `["numel"]` how many elements
        a parameter has. `["norm"]`, `["mean"]`, `["std"]`, `["min"]`, `["max"]`, `["abs_max"]` are
        NaN where there was no gradient; `["missing"]` tells where one was required.
        `["total_norm"]` and `["skipped"]` have one entry a step. There, if collected, are
        `["zero_fraction"]`, `["nan_count"]`, `["inf_count"]`, `["cosine"]`, `["update_ratio"]`, NaN
        in the steps between; and `["histogram"]` of shape [recorded steps, parameters, 64], with
        `["histogram_step"]` and 65 `["histogram_edges"]`, powers of two: the first bin holds zeros
        too, the last one all that is larger.
        """
        self._read()
        found: dict[str, Any] = {"names": list(self._names), "numel": self._numel.copy()}
        ring = self._rings.get("fields")
        if ring is None:
            nothing = np.zeros((0, len(self._names)))
            found |= {"step": np.zeros(0, dtype=np.int64), "total_norm": np.zeros(0)}
            found |= {"skipped": np.zeros(0, dtype=bool), "missing": nothing.astype(bool)}
            return found | dict.fromkeys(ALWAYS, nothing)
        places = ring.places()
        steps, absent = ring.steps[places], self._absent[places]
        statistics = derive(ring.values[places], absent == PRESENT)
        for name in ("min", "max"):
            statistics[name][:, self._complex] = np.nan
        if self._complex.any():
            statistics["mean"] = statistics["mean"].astype(np.complex128)
        norms_there = np.where(absent == PRESENT, statistics["norm"], 0.0)
        total = root_sum_squares(torch.from_numpy(norms_there)).numpy()
        found |= {"step": steps, "total_norm": total, **statistics}
        found["skipped"], found["missing"] = self._were_skipped(places), absent == MISSING
        if "counts" in self._rings:
            counts = np.moveaxis(self._rings["counts"].at(steps), 1, 0)
            counts[:, absent != PRESENT] = np.nan
            found |= derive_counts(counts, self._numel)
        for name in ("cosine", "update_ratio"):
            if name in self._rings:
                found[name] = self._rings[name].at(steps)
        if "cosine" in found:
            found["cosine"][absent != PRESENT] = np.nan
        if "histogram" in self._rings:
            ring = self._rings["histogram"]
            places = ring.places()
            found["histogram_step"], found["histogram"] = ring.steps[places], ring.values[places]
            found["histogram_edges"] = np.exp2(np.arange(LOWEST, LOWEST + BINS + 1.0))
        return found

    @property
    def activations(self) -> dict[str, Any]:
        """Statistics of the outputs of the modules that `activations=` names, as in `history`.

        A row covers all calls of a module within a step; of several outputs the first counts.
        """
        self._read()
        if self._activations is None:
            raise ValueError(
                "activations: none were watched; make the monitor with activations=True"
            )
        names = self._activations.names
        if "activations" not in self._rings:
            return {"names": list(names), "step": np.zeros(0, dtype=np.int64)}
        ring = self._rings["activations"]
        values = ring.values[ring.places()]
        numel, steps = values[:, 0], ring.steps[ring.places()]
        counts = derive_counts(np.moveaxis(values[:, 7:], 1, 0), numel)
        return {"names": list(names), "step": steps, **derive(values, numel == numel), **counts}  # noqa: PLR0124

    def get_gradient_summary(self) -> GradientStatistics:
        """Summarize the last step that was looked at.

        Returns:
            Its statistics, which print as a table: `["parameters"]` holds norm, mean, std, min,
            max, abs_max and numel, and what else was collected at that step; `["step"]` is its
            number and `["issues"]` lists what still lasts. Before the first step `total_norm` and
            `step` are 0 and `parameters` is empty.
        """
        history = self.history
        if not len(history["step"]):
            return GradientStatistics(0.0, {}, step=0, issues=[])
        last = self._absent[(self._count - 1) % self._capacity]
        keys = [name for name in STATISTICS if name in history]
        parameters: dict[str, dict[str, Any]] = {}
        for i in np.flatnonzero(last == PRESENT).tolist():
            values = {key: history[key][-1, i].item() for key in keys}
            kept = {k: v for k, v in values.items() if k in ALWAYS or v == v}  # noqa: PLR0124
            numel, is_complex = self._numel[i].item(), bool(self._complex[i])
            parameters[self._names[i]] = describe(kept, numel, is_complex)
        return GradientStatistics(
            history["total_norm"][-1].item(),
            parameters,
            step=history["step"][-1].item(),
            issues=self._lasting(),
        )

    def _lasting(self) -> list[Issue]:
        """The issues that have not ended."""
        newest = {(issue.kind, issue.parameter): issue for issue in self._episodes.issues}
        lasting = np.argwhere(self._episodes.lasting).tolist()
        return [newest[KINDS[kind], self._names[i]] for kind, i in lasting]

    def noise_scale(self, micro_batch: int, last: int | None = None) -> NoiseScale:
        r"""Estimate the batch size beyond which larger batches help little.

        The gradient noise scale $\operatorname{tr}(\Sigma) / |G|^2$ (McCandlish et al. 2018,
        eq. 2.8) is the batch size at which the noise of a step is as large as its gradient. It is
        estimated from the norms of the gradient as it accumulates over the micro-batches of a step:
        at least two are needed, of equal size, with a loss that is a mean. Give the monitor the
        model that is called: of a `DistributedDataParallel` it knows which backwards were averaged.
        With `fully_shard` each micro-batch must be, else only the last one of a step is seen.
        The randomness of dropout counts as noise.

        Args:
            micro_batch: Samples in one micro-batch of one process.
            last: Estimate from so many of the last steps only: as the loss falls the scale grows.

        Returns:
            The estimate from the remembered steps, with its interval.

        Raises:
            ValueError: The monitor was made without `noise=True`, `micro_batch` or `last` is not
                positive, or fewer than two steps have two micro-batches.
        """
        if not self._noise:
            raise ValueError("noise_scale: nothing was recorded; make the monitor with noise=True")
        for name, value in {"micro_batch": micro_batch, "last": last}.items():
            if name == "micro_batch" or value is not None:
                _check_integer("noise_scale", name, value, 1)
        self._read()
        ring = self._rings.get("noise")
        if ring is None:
            return estimate(np.zeros((0, 4)), micro_batch)
        places = ring.places()
        records = np.column_stack([ring.steps[places], ring.values[places]])
        if last is not None:
            records = records[records[:, 0] > records[-1, 0] - last]
        return estimate(records, micro_batch)

    # Taking it elsewhere.

    def scalars(self, *statistics: str) -> dict[str, float]:
        """The last step as a flat dict of numbers, which Weights & Biases and MLflow take as it is.

        Args:
            *statistics: Which ones to give for each parameter; by default the norm.

        Returns:
            `"gradients/total_norm"`, and `"gradients/norm/NAME"` for each parameter that had a
            gradient.

        Raises:
            ValueError: A statistic is unknown or was not collected.
        """
        summary, history = self.get_gradient_summary(), self.history
        found = {"gradients/total_norm": summary["total_norm"]}
        known = [name for name in STATISTICS if name in history or not self._step]
        for statistic in statistics or ("norm",):
            if statistic not in known:
                raise ValueError(f"scalars: expected statistics among {known}, got {statistic!r}")
            for name, entry in summary["parameters"].items():
                if isinstance(value := entry.get(statistic), (int, float)):
                    found[f"gradients/{statistic}/{name}"] = value
        return found

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the history as CSV: a line for each step and each parameter that had a gradient.

        Raises:
            OSError: The file cannot be written.
        """
        write_csv(columns(self.history, self._present()), path)

    def to_parquet(self, path: str | PathLike[str]) -> None:
        """Write the table of `to_csv` as Parquet.

        Raises:
            ImportError: pyarrow is not installed.
            OSError: The file cannot be written.
        """
        write_parquet(columns(self.history, self._present()), path)

    def to_tensorboard(self, writer: Any) -> None:
        """Write the norms, and the histograms where there are some, to TensorBoard.

        Args:
            writer: A `torch.utils.tensorboard.SummaryWriter`, or what has its `add_scalar` and
                `add_histogram_raw`.
        """
        write_tensorboard(self.history, writer)

    def _present(self) -> np.ndarray:
        """Which parameters had a gradient in which remembered step, [steps, parameters]."""
        ring = self._rings.get("fields")
        return self._absent[[] if ring is None else ring.places()] == PRESENT

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, as tensors and plain values, which `torch.load` takes as safe."""
        self._read()
        ring = self._rings.get("fields")
        places = np.zeros(0, dtype=np.int64) if ring is None else ring.places()
        return {
            "names": list(self._names),
            "step": self._step,
            "rings": {name: ring.state_dict() for name, ring in self._rings.items()},
            "absent": torch.from_numpy(self._absent[places]),
            "skipped": torch.from_numpy(self._skipped[places]),
            "issues": [tuple(issue) for issue in self._episodes.issues],
            "lasting": torch.from_numpy(self._episodes.lasting.copy()),
            "detailed_until": self._detailed_until,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what another monitor of the same model remembered.

        Raises:
            ValueError: The parameters have other names; nothing is changed then.
        """
        names = state.get("names", []) if isinstance(state, dict) else []
        if list(names) != self._names:
            raise ValueError(
                f"load_state_dict: expected the history of {len(self._names)} parameters "
                f"{self._names[:3]}…, got that of {len(names)} {names[:3]}…; "
                "load what state_dict() of a monitor of the same model gave"
            )
        device = home(self._live_parameters() or [torch.empty(0)])
        self._rings = {
            name: Ring.from_state(ring, self._room(name), device)
            for name, ring in state["rings"].items()
        }
        absent, skipped = state["absent"].numpy(), state["skipped"].numpy()
        places = np.arange(len(absent)) % self._capacity
        self._absent[places], self._skipped[places] = absent, skipped
        self._fed = len(absent)
        self._step, self._detailed_until = state["step"], state["detailed_until"]
        self._episodes.issues = [Issue(*issue) for issue in state["issues"]]
        self._episodes.lasting = state["lasting"].numpy().copy()


def _is_due(step: int, every: int) -> bool:
    return every > 0 and (step - 1) % every == 0


def _zeros_like(parameter: Tensor) -> Tensor:
    if is_distributed(parameter):
        return torch.zeros_like(parameter)
    return parameter.new_zeros(()).expand(parameter.shape)


def _times(grads: Sequence[Tensor | None], factor: Tensor | None) -> Sequence[Tensor | None]:
    return grads if factor is None else [None if g is None else g * factor for g in grads]


def _mesh_size(parameter: Tensor) -> int:
    return parameter.device_mesh.size() if is_distributed(parameter) else 1


def _check(model: object, optimizer: object, scaler: object) -> None:
    check_module("GradientMonitor", model)
    if optimizer is not None and not isinstance(optimizer, Optimizer):
        raise TypeError(
            f"GradientMonitor: expected optimizer to be a torch.optim.Optimizer, got "
            f"{type(optimizer).__name__}; of a wrapper pass the optimizer inside"
        )
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(
            f"GradientMonitor: expected scaler to be a torch.amp.GradScaler, got "
            f"{type(scaler).__name__}"
        )


def _check_integer(operation: str, name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(
            f"{operation}: expected {name} to be an integer of {least} or more, got {value!r}"
        )


def _check_thresholds(vanish_below: float, explode_above: float) -> None:
    numbers = isinstance(vanish_below, Real) and isinstance(explode_above, Real)
    if not numbers or not 0 <= vanish_below < explode_above:
        raise ValueError(
            "GradientMonitor: expected numbers 0 <= vanish_below < explode_above, got "
            f"vanish_below={vanish_below!r}, explode_above={explode_above!r}"
        )


def _check_options(
    optimizer: Optimizer | None,
    collect: Sequence[str],
    least_one: dict[str, int],
    least_zero: dict[str, int],
    noise: bool,
) -> None:
    for least, options in ((1, least_one), (0, least_zero)):
        for name, value in options.items():
            _check_integer("GradientMonitor", name, value, least)
    known = (*ALWAYS, *COUNTS, "cosine")
    if not isinstance(collect, Collection) or isinstance(collect, str) or {*collect} - {*known}:
        raise ValueError(f"GradientMonitor: expected collect among {known}, got {collect!r}")
    if optimizer is None and (least_zero["update_every"] or noise):
        option = "noise=True" if noise else "update_every"
        raise ValueError(
            f"GradientMonitor: {option} looks at the steps of an optimizer; pass optimizer="
        )
