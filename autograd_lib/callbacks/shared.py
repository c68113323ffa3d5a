"""What the callbacks share: monitors, and a guard for a step that a framework runs."""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any
from unittest import mock

from torch import nn
from torch.amp import GradScaler
from torch.optim import Optimizer

from autograd_lib.core.snapshot import drop_gradients
from autograd_lib.monitor.monitor import GradientMonitor
from autograd_lib.monitor.options import check_integer
from autograd_lib.nonfinite.guard import GuardedStep, NonFinite, NonFiniteGuard, Step

_TOTAL_NORM = "gradients/total_norm"


class Refusals:
    """Steps that were not finite: a report and a warning for each, an error for too many in a row.

    Args:
        operation: What messages begin with.
        option: What they call `most`.
        most: So many in a row are too many.
    """

    def __init__(self, operation: str, option: str, most: int) -> None:
        self._operation, self._option, self._most = operation, option, most
        self.reports: list[NonFinite] = []
        self.in_a_row = 0

    def add(self, found: NonFinite, step: int, *, again: bool = False) -> None:
        """Report a step; `again` if it is counted already."""
        self.reports.append(found)
        title = repr(found).partition("\n")[0]
        title += f", module {found.module!r}" if found.module else ""
        warnings.warn(f"{self._operation}: step {step} is skipped: {title}", stacklevel=4)
        self.in_a_row += not again
        if self.in_a_row >= self._most and not again:
            raise FloatingPointError(
                f"{self._operation}: {self.in_a_row} steps in a row were not finite, as many as "
                f"{self._option} allows; the last one:\n{found}"
            )


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
        self._refusals = Refusals(self._operation, "max_nonfinite", max_nonfinite)
        self.reports = self._refusals.reports
        self._guarded, self._options = guard, options
        self._loaded: dict[str, Any] = {}
        self._spoiled: list[GradientMonitor] = []  # those whose step, not over yet, is not finite
        self._scaler: GradScaler | None = None
        self._guard: NonFiniteGuard | None = None
        self._step: GuardedStep | None = None  # that has begun
        self._replaced = contextlib.ExitStack()

    @property
    def monitor(self) -> GradientMonitor | None:
        """The monitor, of the first optimizer if there are several; None before training."""
        return self.monitors[0] if self.monitors else None

    def state_dict(self) -> dict[str, Any]:
        """The histories, as tensors and plain values."""
        monitors = [monitor.state_dict() for monitor in self.monitors]
        in_a_row = self._refusals.in_a_row
        return {"monitors": monitors, "in_a_row": in_a_row} if monitors else self._loaded

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there when training begins."""
        self._loaded = state

    def _attach(
        self, model: nn.Module, optimizers: Sequence[Optimizer], scaler: GradScaler | None
    ) -> None:
        self._detach()
        self._scaler = scaler if scaler is not None and scaler.is_enabled() else None
        self.monitors = [
            GradientMonitor(model, o, self._scaler, **self._options) for o in optimizers
        ]
        loaded, self._loaded = self._loaded, {}
        for monitor, state in zip(self.monitors, loaded.get("monitors", ()), strict=False):
            monitor.load_state_dict(state)
        self._refusals.in_a_row = loaded.get("in_a_row", 0)
        for monitor in self.monitors:
            monitor.register_hooks()

    def _detach(self) -> None:
        """Remove every hook; the monitors stay readable."""
        for monitor in self.monitors:
            monitor.remove_hooks()
        self._replaced.close()
        self._guard = self._step = None
        self._spoiled = []

    def _replace(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        """Set a method of an instance until training ends."""
        self._replaced.enter_context(mock.patch.object(owner, name, function))

    def _begin(self, model: nn.Module) -> bool:
        """Keep what the step changes; tell whether this micro-batch is looked at."""
        self._step = None
        if self._guarded and (self._scaler is None or not self._spoiled):
            self._guard = self._guard or NonFiniteGuard(model, scaler=self._scaler)
            self._step = self._guard.begin(keep_gradients=False)
        return self._step is not None

    def _explained(self, replay: Step | None) -> contextlib.AbstractContextManager[None]:
        """Around the step: an exception that a NaN causes gets the report as a note."""
        return contextlib.nullcontext() if self._step is None else self._step.explained(replay)

    def _look(self, place: int = 0) -> None:
        """Show the monitor of an optimizer the gradients before they are clipped."""
        monitor = self.monitors[place]
        if self._scaler is not None or monitor not in self._spoiled:
            monitor.look()

    def _end(
        self, loss: object, replay: Step | None, number: int, place: int = 0, owned: Any = None
    ) -> None:
        """Judge the step; take the gradients away if it is not finite, so that nothing is done.

        Args:
            loss: What the step returned.
            replay: Runs the micro-batch again; None if it cannot.
            number: Of the step, for messages.
            place: Of the optimizer among all.
            owned: Its parameters; by default all of the model.
        """
        if self._step is None or (found := self._step.end(loss, replay, owned)) is None:
            return
        again, monitor = bool(self._spoiled), self.monitors[place]
        if self._scaler is None:  # else the scaler is left to find them, and skips the step
            if monitor not in self._spoiled:
                monitor.look(skipped=True)
                monitor.remove_hooks()  # until the step is over: it is recorded already
            drop_gradients(self._step.parameters if owned is None else owned)
        self._spoiled.append(monitor)
        self._refusals.add(found, number, again=again)

    def _end_of_step(self) -> None:
        if not self._spoiled:
            self._refusals.in_a_row = 0
        for monitor in self._spoiled if self._scaler is None else ():
            monitor.register_hooks()
        self._spoiled = []

    def _total_norms(self) -> dict[str, float]:
        """What to log; this waits for the device."""
        norms = [monitor.history["total_norm"][-1:] for monitor in self.monitors]
        keys = [_TOTAL_NORM, *(f"{_TOTAL_NORM}/{i}" for i in range(1, len(norms)))]
        return {key: norm.item() for key, norm in zip(keys, norms, strict=False) if len(norm)}


def shallow_copy(batch: Any) -> Any:
    """A copy from which entries may be taken."""
    return copy.copy(batch) if isinstance(batch, MutableMapping | list) else batch


def callback_class(hooks: type, *bases: type) -> type:
    """A class of callbacks with these hooks, which is one of the framework's callbacks."""
    return type("GradientCallback", (hooks, *bases), {"__module__": hooks.__module__})
