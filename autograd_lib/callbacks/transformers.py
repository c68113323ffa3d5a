"""The gradient monitor and a guard against NaN and Inf for the `Trainer` of `transformers`."""

from __future__ import annotations

import contextlib
import importlib
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from traceback import walk_stack
from typing import Any

import torch
from torch import Tensor, nn

from autograd_lib.callbacks.shared import FrameworkCallback, callback_class, shallow_copy
from autograd_lib.core.snapshot import drop_gradients

__all__ = ["transformers_callback"]

_FILE = "gradient_monitor.pt"  # in a checkpoint directory


class _TransformersHooks(FrameworkCallback):
    _operation = "transformers_callback"

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        trainer, checkpoint = _calling_trainer(self._operation)
        if checkpoint is not None and (path := Path(checkpoint, _FILE)).is_file():
            self.load_state_dict(torch.load(path, weights_only=True))
        optimizer, scaler = more["optimizer"], None
        while hasattr(optimizer, "accelerator_state"):  # Accelerate's wrapper
            scaler, optimizer = optimizer.scaler, optimizer.optimizer
        self._attach(more["model"], [optimizer], scaler)
        self._replace(trainer, "training_step", self._guarding(trainer))
        self._replace(trainer, "log", self._logging(trainer.log))
        clip = trainer.accelerator.clip_grad_norm_
        self._replace(trainer.accelerator, "clip_grad_norm_", self._clipping(clip))
        # What is raised shows in the outermost method that there is to replace.
        outer = "_run_epoch" if hasattr(trainer, "_run_epoch") else "training_step"
        self._replace(trainer, outer, self._until_it_raises()(getattr(trainer, outer)))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if self._spoiled and self._scaler is None:
            drop_gradients(more["model"].parameters())  # what later micro-batches have left

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._end_of_step()

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        directory = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if state.is_world_process_zero and directory.is_dir():
            torch.save(self.state_dict(), directory / _FILE)

    def on_train_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        self._detach()

    def _guarding(self, trainer: Any) -> Callable[..., Tensor]:
        """The trainer's `training_step`, looked at."""
        original = trainer.training_step

        def training_step(model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            if not self._begin(model):
                return original(model, inputs, *args, **kwargs)
            kept = shallow_copy(inputs)  # the labels may be taken out of it
            replay = lambda: original(model, shallow_copy(kept), *args, **kwargs)  # noqa: E731
            with self._explained(replay):
                loss = original(model, inputs, *args, **kwargs)
            self._end(loss, replay, trainer.state.global_step + 1)
            return loss

        return training_step

    def _clipping(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Accelerate's `clip_grad_norm_`, which runs before `on_pre_optimizer_step`."""

        def clip_grad_norm_(parameters: Any, max_norm: float, *args: Any, **kwargs: Any) -> Any:
            if max_norm < math.inf:  # else the trainer only asks for the norm
                self._look()
            return original(parameters, max_norm, *args, **kwargs)

        return clip_grad_norm_

    def _logging(self, original: Callable[..., None]) -> Callable[..., None]:
        """The trainer's `log`, given the norm: at `on_log` loggers have logged already."""

        def log(logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if "loss" in logs:  # of training, not of an evaluation
                logs.update(self._total_norms())
            original(logs, *args, **kwargs)

        return log

    @contextlib.contextmanager
    def _until_it_raises(self) -> Iterator[None]:
        """Remove the hooks upon an exception, of which no event tells a callback."""
        try:
            yield
        except BaseException:
            self._detach()
            raise


def transformers_callback(*, guard: bool = True, max_nonfinite: int = 3, **options: Any) -> Any:
    """Make a callback for the `Trainer` of `transformers` that monitors gradients and stops NaN.

    From the start of training on a `GradientMonitor` watches the model and the optimizer inside
    Accelerate's wrapper; "gradients/total_norm", the norm before clipping, is logged wherever the
    loss of training is, and in between the monitor does not wait for the device. The history is
    kept in each checkpoint directory as `gradient_monitor.pt`, and loaded by
    `train(resume_from_checkpoint=...)`.

    With `guard`, the loss and the gradients of each batch are summed after its backward and that
    number is read: one host synchronization. If it is not finite, the `training_step` is run again
    as `find_nonfinite` does, from the same state of buffers and random number generators, which are
    put back again; the report is warned of and kept. All gradients are then set to None, which
    optimizers of PyTorch take as nothing to do: parameters, momentum and weight decay stay as they
    are, bit by bit. With accumulation the whole step is skipped, in a distributed run on every
    process. The trainer counts such a step, and so do learning rate schedulers. It is in the
    monitor's history, as skipped. If a step raises because of a NaN, the report is a note on the
    exception.

    With a `GradScaler` (`fp16=True`), gradients that overflow are its business, as with
    `NonFiniteGuard`; a step whose loss is not finite is reported here, and skipped by the scaler.

    How it gets there: the `Trainer` tells its callbacks neither batches nor exceptions, nor itself.
    So it is looked up on the stack when training begins, and its methods `training_step`, `log` and
    `_run_epoch`, and `clip_grad_norm_` of its accelerator, are replaced on the instance until
    training ends or one of them raises. (Before
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
    return callback_class(_TransformersHooks, base)(guard, max_nonfinite, options)


def _calling_trainer(operation: str) -> tuple[Any, str | None]:
    """The `Trainer` on the stack, and the checkpoint that it goes on from."""
    kind = importlib.import_module("transformers").Trainer
    for frame, _ in walk_stack(sys._getframe(1)):
        if isinstance(trainer := frame.f_locals.get("self"), kind):
            return trainer, frame.f_locals.get("resume_from_checkpoint")
    raise RuntimeError(
        f"{operation}: expected to be called by a transformers.Trainer that trains, found none on "
        "the stack; give the callback to a Trainer"
    )
