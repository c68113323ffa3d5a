"""The gradient monitor and a guard against NaN and Inf, inside training loops of others.

PyTorch Lightning and `transformers` run forward, backward and the optimizer by themselves, so a
`NonFiniteGuard`, which runs the step, does not fit as it is. Here it is cut in two: what the step
will change is kept before it, and what it left is looked at after backward. Neither framework is
imported before a callback for it is made.
"""

from __future__ import annotations

import copy
import functools
import importlib
import inspect
import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer

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

__all__ = ["lightning_callback", "transformers_callback"]

_LIGHTNING = ("lightning.pytorch", "pytorch_lightning")
_FILE = "gradient_monitor.pt"  # in a checkpoint directory of transformers
_TOTAL_NORM = "gradients/total_norm"


class _Watch:
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
        try:
            _drop(parameters)
            self._before.restore()
            return _explain(self.model, replay, wrong, parts.groups)
        finally:
            self._before.restore()
            for parameter, grad in zip(parameters, grads, strict=True):
                parameter.grad = grad


class _Callback:
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
        self._watch: _Watch | None = None

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

    def _watching(self, model: nn.Module) -> _Watch | None:
        """The watch over the model, if this micro-batch is to be looked at."""
        if not self._guarded or (self._spoiled and self._scaler is not None):
            return None
        if self._watch is None or self._watch.model is not model:
            self._watch = _Watch(model, self._scaler)
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
            _drop(parameters)
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


# PyTorch Lightning.


class _LightningHooks(_Callback):
    _operation = "lightning_callback"
    _loss: Tensor | None = None
    _batch: tuple[Any, ...] = (None, 0)
    _stepped = False  # with this batch

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._attach(pl_module, trainer.optimizers, scaler)

    def on_train_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch, self._stepped = (_shallow(batch), batch_idx), False
        watch = self._watching(trainer.strategy.model)
        if watch is not None and pl_module.automatic_optimization:
            watch.begin()

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        self._loss = loss.detach()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        loss, self._loss = self._loss, None
        watch = self._watching(trainer.strategy.model)
        if watch is None or not pl_module.automatic_optimization:
            return  # each of several optimizers looks at its own gradients
        found = watch.end(loss, self._replay(trainer, pl_module))
        if found is not None:
            parameters = [*pl_module.parameters()]
            self._alarm(found, trainer.global_step + 1, self.monitors[0], parameters)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._stepped = True
        owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not pl_module.automatic_optimization:
            watch = self._watching(trainer.strategy.model)
            found = None if watch is None else watch.end(None, None, owned)
            if found is not None:
                place = next(i for i, o in enumerate(trainer.optimizers) if o is optimizer)
                self._alarm(found, trainer.global_step + 1, self.monitors[place], owned)
        elif self._spoiled and self._scaler is None:
            _drop(owned)  # what the micro-batches after the one in question have left

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = (None, 0)
        if not self._stepped:
            return
        self._end_of_step()
        # As Lightning's own LearningRateMonitor asks; in between nothing is read from the device.
        if trainer._logger_connector.should_update_logs:
            for key, norm in self._total_norms().items():
                pl_module.log(key, norm, on_step=True, on_epoch=False, batch_size=1)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._detach()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._detach()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._detach()
        self._loaded = {}  # as from a checkpoint that was loaded only to test it

    def _replay(self, trainer: Any, pl_module: Any) -> Callable[[], object] | None:
        """Forward and backward of the batch once more; None if it came from an iterator."""
        signature = inspect.signature(pl_module.training_step)
        if "dataloader_iter" in signature.parameters:
            return None
        kept, *index = self._batch
        try:
            signature.bind(kept, *index)
        except TypeError:
            index = []  # it takes the batch alone

        def replay() -> object:
            with _in_place_of(pl_module, "log", lambda *args, **kwargs: None):
                output = trainer.strategy.training_step(_shallow(kept), *index)
            loss = output["loss"] if isinstance(output, Mapping) else output
            loss = loss / trainer.accumulate_grad_batches
            pl_module.backward(loss if self._scaler is None else self._scaler.scale(loss))
            return loss.detach()

        return replay


@functools.cache
def _lightning_class(modules: tuple[str, ...]) -> type[_LightningHooks]:
    bases = [importlib.import_module(name).Callback for name in modules]
    return type("GradientCallback", (_LightningHooks, *bases), {"__module__": __name__})


def lightning_callback(*, guard: bool = True, max_nonfinite: int = 3, **options: Any) -> Any:
    """Make a PyTorch Lightning callback that monitors gradients and stops NaN and Inf.

    From the start of training on it watches the module with a `GradientMonitor` for each optimizer,
    and takes its hooks away at the end or upon an exception. At each step that Lightning logs,
    "gradients/total_norm" is logged too (of further optimizers "gradients/total_norm/1" and so on);
    in between nothing waits for the device. Histories are kept in Lightning's checkpoints.

    With `guard`, the loss and the gradients of each batch are summed after its backward and that
    number is read: one host synchronization. If it is not finite, the batch is run again as
    `find_nonfinite` does, from the same state of buffers and random number generators, which are
    put back again; the report is warned of and kept. All gradients are then set to None, which
    optimizers of PyTorch take as nothing to do: parameters, momentum and weight decay stay as they
    are, bit by bit. With accumulation the whole step is skipped, in a distributed run on every
    process. Lightning counts such a step, and so do learning rate schedulers. It is in the
    monitor's history, as skipped.

    With a `GradScaler`, gradients that overflow are its business, as with `NonFiniteGuard`; a step
    whose loss is not finite is reported here, and skipped by the scaler.

    What it cannot do:

    - With manual optimization the gradients of an optimizer are looked at before its step, and the
      report names one that is not finite, but not what made it: `training_step` steps the
      optimizers itself and cannot be run again. Buffers are not put back. A `training_step` that
      takes `dataloader_iter` draws its batches itself: it cannot be run again either.
    - In the second run `self.log` does nothing; whatever else `training_step` changes (a metric,
      a counter, the generators of Python and NumPy) it changes twice.
    - L-BFGS, which asks for the gradients several times in a step, and optimizers of others that
      take None for zero may change parameters in a step that is not finite.

    Args:
        guard: Whether to look for NaN and Inf at each backward.
        max_nonfinite: Stop at so many steps in a row that are not finite.
        **options: Those of `GradientMonitor`: `history`, `every`, `collect`, `update_every` and so
            on.

    Returns:
        A `Callback` of `lightning.pytorch`, or of `pytorch_lightning` if that is what is imported
        or installed, with `monitor`, the `GradientMonitor` (of the first optimizer; `monitors` has
        all of them; None before training), and `reports`, a list of `NonFinite`. In training it
        raises `FloatingPointError` after `max_nonfinite` steps.

    Raises:
        ImportError: Lightning is not installed.
        TypeError: An option is none of `GradientMonitor`'s.
        ValueError: `max_nonfinite` is not positive.

    Example:
        >>> callback = lightning_callback(every=10)  # doctest: +SKIP
        >>> lightning.Trainer(callbacks=[callback]).fit(model, batches)  # doctest: +SKIP
        >>> callback.monitor.get_gradient_summary()  # doctest: +SKIP
    """
    loaded = tuple(name for name in _LIGHTNING if sys.modules.get(name) is not None)
    for name in () if loaded else _LIGHTNING:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        loaded = (name,)
        break
    if not loaded:
        raise ImportError("lightning_callback: PyTorch Lightning is needed; pip install lightning")
    return _lightning_class(loaded)(guard, max_nonfinite, options)


# Hugging Face transformers.


class _TransformersHooks(_Callback):
    _operation = "transformers_callback"
    _undo: tuple[Callable[[], None], ...] = ()

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        trainer, checkpoint = _calling_trainer(self._operation)
        if checkpoint is not None and (path := Path(checkpoint, _FILE)).is_file():
            self.load_state_dict(torch.load(path, weights_only=True))
        optimizer, scaler = more["optimizer"], None
        while hasattr(optimizer, "accelerator_state"):  # Accelerate's wrapper
            scaler, optimizer = optimizer.scaler, optimizer.optimizer
        self._attach(more["model"], [optimizer], scaler)
        around = {"training_step": self._guarding(trainer), "log": self._logging(trainer.log)}
        if hasattr(trainer, "_run_epoch"):  # since transformers 5
            around["_run_epoch"] = trainer._run_epoch
        self._undo = tuple(
            _put(trainer, name, self._until_it_raises(function))
            for name, function in around.items()
        )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._spoiled and self._scaler is None:
            _drop(more["model"].parameters())  # what later micro-batches have left

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._end_of_step()

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        directory = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and directory.is_dir():
            torch.save(self.state_dict(), directory / _FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._detach()

    def _detach(self) -> None:
        super()._detach()
        for undo in self._undo:
            undo()
        self._undo = ()

    def _guarding(self, trainer: Any) -> Callable[..., Tensor]:
        """The trainer's `training_step`, looked at."""
        original = trainer.training_step

        @functools.wraps(original)
        def training_step(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            watch = self._watching(model)
            if watch is None:
                return original(model, inputs, *args, **kwargs)
            kept = _shallow(inputs)  # the labels may be taken out of it
            watch.begin()
            loss = original(model, inputs, *args, **kwargs)
            found = watch.end(loss, lambda: original(model, _shallow(kept), *args, **kwargs))
            if found is not None:
                step, parameters = trainer.state.global_step + 1, [*model.parameters()]
                self._alarm(found, step, self.monitors[0], parameters)
            return loss

        return training_step

    def _logging(self, original: Callable[..., None]) -> Callable[..., None]:
        """The trainer's `log`, given the norm: at `on_log` loggers have logged already."""

        @functools.wraps(original)
        def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:  # of training, not of an evaluation
                logs.update(self._total_norms())
            original(logs, *args, **kwargs)

        return log

    def _until_it_raises(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function; no event tells a callback of an exception."""

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                return function(*args, **kwargs)
            except BaseException:
                self._detach()
                raise

        return call


@functools.cache
def _transformers_class(base: type) -> type[_TransformersHooks]:
    return type("GradientCallback", (_TransformersHooks, base), {"__module__": __name__})


def transformers_callback(*, guard: bool = True, max_nonfinite: int = 3, **options: Any) -> Any:
    """Make a callback for the `Trainer` of `transformers` that monitors gradients and stops NaN.

    From the start of training on a `GradientMonitor` watches the model and the optimizer inside
    Accelerate's wrapper; "gradients/total_norm" is logged wherever the loss of training is, and in
    between the monitor does not wait for the device. The history is kept in each checkpoint
    directory as `gradient_monitor.pt`, and taken up by `train(resume_from_checkpoint=...)`.

    With `guard`, the loss and the gradients of each batch are summed after its backward and that
    number is read: one host synchronization. If it is not finite, the `training_step` is run again
    as `find_nonfinite` does, from the same state of buffers and random number generators, which are
    put back again; the report is warned of and kept. All gradients are then set to None, which
    optimizers of PyTorch take as nothing to do: parameters, momentum and weight decay stay as they
    are, bit by bit. With accumulation the whole step is skipped, in a distributed run on every
    process. The trainer counts such a step, and so do learning rate schedulers. It is in the
    monitor's history, as skipped.

    With a `GradScaler` (`fp16=True`), gradients that overflow are its business, as with
    `NonFiniteGuard`; a step whose loss is not finite is reported here, and skipped by the scaler.

    How it gets there: the `Trainer` tells its callbacks neither batches nor exceptions, nor itself.
    So it is looked up on the stack when training begins, and its methods `training_step`, `log` and
    `_run_epoch` are replaced on the instance until training ends or one of them raises. (Before
    transformers 5 there is no `_run_epoch`: what is raised between two steps leaves the hooks where
    they are until the next training.) Whatever `training_step` changes beside the model, the second
    run changes again. DeepSpeed, whose engine steps the optimizer, is not supported.

    Args:
        guard: Whether to look for NaN and Inf at each backward.
        max_nonfinite: Stop at so many steps in a row that are not finite.
        **options: Those of `GradientMonitor`: `history`, `every`, `collect`, `update_every` and so
            on.

    Returns:
        A `TrainerCallback` with `monitor`, the `GradientMonitor` (None before training), and
        `reports`, a list of `NonFinite`. In training it raises `FloatingPointError` after
        `max_nonfinite` steps.

    Raises:
        ImportError: `transformers` is not installed.
        TypeError: An option is none of `GradientMonitor`'s.
        ValueError: `max_nonfinite` is not positive.

    Example:
        >>> callback = transformers_callback(every=10)  # doctest: +SKIP
        >>> Trainer(model, arguments, callbacks=[callback], ...).train()  # doctest: +SKIP
        >>> callback.monitor.get_gradient_summary()  # doctest: +SKIP
    """
    try:
        base = importlib.import_module("transformers").TrainerCallback
    except ImportError as error:
        raise ImportError(
            "transformers_callback: transformers is needed; pip install 'transformers[torch]'"
        ) from error
    return _transformers_class(base)(guard, max_nonfinite, options)


def _calling_trainer(operation: str) -> tuple[Any, str | None]:
    """The `Trainer` on the stack, and the checkpoint that it goes on from."""
    kind = importlib.import_module("transformers").Trainer
    frame = sys._getframe(1)
    while frame is not None:
        if isinstance(trainer := frame.f_locals.get("self"), kind):
            return trainer, frame.f_locals.get("resume_from_checkpoint")
        frame = frame.f_back  # type: ignore[assignment]
    raise RuntimeError(
        f"{operation}: expected to be called by a transformers.Trainer that trains, found none on "
        "the stack; give the callback to a Trainer, and use GradientMonitor in loops of your own"
    )


# Small things.


def _drop(parameters: Iterable[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


def _shallow(batch: Any) -> Any:
    """A copy from which entries may be taken."""
    return copy.copy(batch) if isinstance(batch, (MutableMapping, list)) else batch


def _put(owner: Any, name: str, function: Callable[..., Any]) -> Callable[[], None]:
    """Set an attribute of an instance; what is returned undoes that."""
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
def _in_place_of(owner: Any, name: str, function: Callable[..., Any]) -> Iterator[None]:
    undo = _put(owner, name, function)
    try:
        yield
    finally:
        undo()
