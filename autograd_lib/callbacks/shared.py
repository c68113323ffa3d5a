"""What the callbacks share: a guard against NaN and Inf for a step that a framework runs.

PyTorch Lightning and `transformers` run forward, backward and the optimizer by themselves, so a
`NonFiniteGuard`, which runs the step itself, does not fit. Here it is cut in two: the state is
kept before the step, and gradients are checked after backward.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from autograd_lib.core.snapshot import drop_gradients, without_gradients
from autograd_lib.monitor.monitor import GradientMonitor
from autograd_lib.monitor.options import check_integer
from autograd_lib.nonfinite.guard import (
    NonFinite,
    NonFiniteGuard,
    _explain,
    _gather,
    _report,
    _State,
    _total,
)
from autograd_lib.nonfinite.observer import outcome

_TOTAL_NORM = "gradients/total_norm"


class StepWatch:
    """A `NonFiniteGuard` in two halves, for a step that somebody else runs.

    It keeps no copy of the gradients that micro-batches before this one left: one that is not
    finite costs the whole step.
    """

    def __init__(self, model: nn.Module, scaler: GradScaler | None) -> None:
        self.model, self._scaler = model, scaler
        self._guard = NonFiniteGuard(model, scaler=scaler)
        self._before: _State | None = None

    def begin(self) -> None:
        """Keep the buffers and the state of the random number generators."""
        parts, _ = self._guard._look(self.model)
        self._before = _State(parts, (), scaler=self._scaler)

    def end(
        self,
        loss: Tensor | None,
        replay: Callable[[], object] | None,
        owned: Sequence[Tensor] | None = None,
    ) -> NonFinite | None:
        """Read one number; if it is not finite, run `replay` as `find_nonfinite` would.

        The gradients are then still those that are not finite, and buffers and generators what
        they were at `begin`, if there is a `replay`. Of `owned` alone gradients are looked at.
        """
        parts, parameters = self._guard._look(self.model)
        grads = [parameter.grad for parameter in parameters]
        losses = [] if loss is None else [loss]
        own = {id(parameter) for parameter in parameters if owned is None}
        own |= {id(parameter) for parameter in owned or ()}
        pairs = zip(parameters, grads, strict=True)
        total = _total([g if id(p) in own else None for p, g in pairs], parts, losses)
        for group in parts.groups:
            torch.distributed.all_reduce(total, group=group)
        if math.isfinite(total.item()):
            return None
        wrong = outcome(self.model, losses)
        everywhere = [w for w in _gather(parts.groups, wrong) if w is not None]
        if not everywhere or self._guard._is_for_the_scaler(everywhere):
            return None
        if replay is None or self._before is None:
            return _report(everywhere[0].also("the loop does not allow to run the step again"))
        with without_gradients(parameters):
            try:
                self._before.restore()
                return _explain(self.model, replay, wrong, parts.groups)
            finally:
                self._before.restore()


class FrameworkCallback:
    """What is the same in both frameworks."""

    _operation: str

    def __init__(self, guard: bool, max_nonfinite: int, options: dict[str, Any]) -> None:
        check_integer(self._operation, "max_nonfinite", max_nonfinite, 1)
        known = [*inspect.signature(GradientMonitor).parameters][3:]
        if unknown := [name for name in options if name not in known]:
            raise TypeError(
                f"{self._operation}: expected options among {['guard', 'max_nonfinite', *known]}, "
                f"got {unknown}; model, optimizer and scaler are the framework's"
            )
        self.monitors: list[GradientMonitor] = []
        self.reports: list[NonFinite] = []
        self._guarded, self._max_nonfinite, self._options = guard, max_nonfinite, options
        self._loaded: dict[str, Any] = {}
        self._in_a_row = 0
        self._spoiled = False  # the step that is being made is not finite
        self._paused: list[GradientMonitor] = []  # because of that
        self._scaler: GradScaler | None = None
        self._watch: StepWatch | None = None

    @property
    def monitor(self) -> GradientMonitor | None:
        """The monitor, of the first optimizer if there are several; None before training."""
        return self.monitors[0] if self.monitors else None

    def state_dict(self) -> dict[str, Any]:
        """The histories, as tensors and plain values."""
        monitors = [monitor.state_dict() for monitor in self.monitors]
        return {"monitors": monitors, "in_a_row": self._in_a_row} if monitors else self._loaded

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there when training begins."""
        self._loaded = state

    def _attach(
        self, model: nn.Module, optimizers: Sequence[Optimizer], scaler: GradScaler | None
    ) -> None:
        self._detach()
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.monitors = [
            GradientMonitor(model, optimizer, self._scaler, **self._options)
            for optimizer in optimizers
        ]
        loaded, self._loaded = self._loaded, {}
        for monitor, state in zip(self.monitors, loaded.get("monitors", ()), strict=False):
            monitor.load_state_dict(state)
        self._in_a_row = loaded.get("in_a_row", 0)
        for monitor in self.monitors:
            monitor.register_hooks()

    def _detach(self) -> None:
        """Remove every hook; the monitors stay readable."""
        for monitor in self.monitors:
            monitor.remove_hooks()
        self._watch, self._spoiled, self._paused = None, False, []

    def _watching(self, model: nn.Module) -> StepWatch | None:
        """The watch over the model, if this micro-batch is to be looked at."""
        if not self._guarded or (self._spoiled and self._scaler is not None):
            return None
        if self._watch is None or self._watch.model is not model:
            self._watch = StepWatch(model, self._scaler)
        return self._watch

    def _alarm(
        self, found: NonFinite, step: int, monitor: GradientMonitor, parameters: Sequence[Tensor]
    ) -> None:
        """Take the gradients away, so that the optimizer finds nothing to do."""
        self.reports.append(found)
        again, self._spoiled = self._spoiled, True
        if self._scaler is None:  # else the scaler is left to find them, and skips the step
            if monitor not in self._paused:
                monitor._look(skipped=True)
                monitor.remove_hooks()  # until the step is over: it is recorded already
                self._paused.append(monitor)
            drop_gradients(parameters)
        title = repr(found).partition("\n")[0]
        title += f", module {found.module!r}" if found.module else ""
        warnings.warn(f"{self._operation}: step {step} is skipped: {title}", stacklevel=2)
        if again:
            return
        self._in_a_row += 1
        if self._in_a_row >= self._max_nonfinite:
            self._detach()
            raise FloatingPointError(
                f"{self._operation}: expected finite gradients, got NaN or Inf in "
                f"{self._in_a_row} steps in a row, at last: {title}; the callback's `reports` say "
                "more, max_nonfinite allows for more"
            )

    def _end_of_step(self) -> None:
        if not self._spoiled:
            self._in_a_row = 0
        for monitor in self._paused:
            monitor.register_hooks()
        self._spoiled, self._paused = False, []

    def _total_norms(self) -> dict[str, float]:
        """What to log; this waits for the device."""
        norms = [monitor.history["total_norm"][-1:] for monitor in self.monitors]
        keys = [_TOTAL_NORM, *(f"{_TOTAL_NORM}/{i}" for i in range(1, len(norms)))]
        pairs = zip(keys, norms, strict=False)
        return {key: norm.item() for key, norm in pairs if len(norm)}


def shallow_copy(batch: Any) -> Any:
    """A copy from which entries may be taken."""
    return copy.copy(batch) if isinstance(batch, (MutableMapping, list)) else batch


def replace_attribute(owner: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Set an attribute of an instance; return a function that undoes it."""
    before = vars(owner).get(name)

    def undo() -> None:
        if vars(owner).get(name) is not function:
            return  # somebody else has replaced it since
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    setattr(owner, name, function)
    return undo


@contextmanager
def replaced_attribute(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    undo = replace_attribute(owner, name, function)
    try:
        yield
    finally:
        undo()
