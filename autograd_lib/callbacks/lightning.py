"""The gradient monitor and a guard against NaN and Inf for PyTorch Lightning."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from torch import Tensor

from autograd_lib.callbacks.shared import FrameworkCallback, callback_class, shallow_copy
from autograd_lib.core.batches import loss_within
from autograd_lib.core.snapshot import drop_gradients

__all__ = ["lightning_callback"]

_LIGHTNING = ("lightning.pytorch", "pytorch_lightning")


class _LightningHooks(FrameworkCallback):
    _operation = "lightning_callback"
    _loss: Tensor | None = None
    _replay: Callable[[], object] | None = None
    _stepped = False  # with this batch
    _clips = False  # between this hook and the step

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._attach(pl_module, trainer.optimizers, scaler)
        self._replace(trainer.strategy, "training_step", self._beginning(trainer, pl_module))
        plugin = trainer.precision_plugin
        clip = self._clipping(plugin.clip_gradients, trainer, pl_module)
        self._replace(plugin, "clip_gradients", clip)
        # What clips by itself may do so without the plugin.
        clips = type(pl_module).configure_gradient_clipping.__module__
        self._clips = bool(trainer.gradient_clip_val) or not clips.endswith("core.module")

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        if pl_module.automatic_optimization:  # else each optimizer looks at its own gradients
            self._end(self._loss, self._replay, trainer.global_step + 1)

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        self._stepped = True
        owned = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if not pl_module.automatic_optimization:
            self._end(None, None, trainer.global_step + 1, _place(trainer, optimizer), owned)
        elif self._spoiled and self._scaler is None:
            drop_gradients(owned)  # what the micro-batches after the one in question have left
        elif self._clips:
            self._look(_place(trainer, optimizer))

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._loss = self._replay = self._step = None
        if not self._stepped:
            return
        self._stepped = False
        self._end_of_step()
        # As Lightning's own LearningRateMonitor asks; in between nothing is read from the device.
        if trainer._logger_connector.should_update_logs:
            for key, norm in self._total_norms().items():
                pl_module.log(key, norm, on_step=True, on_epoch=False, batch_size=1)

    def teardown(self, trainer: Any, pl_module: Any, stage: Any) -> None:
        self._detach()
        self._loaded = {}  # as from a checkpoint that was loaded only to test it

    on_exception = teardown

    def _beginning(self, trainer: Any, pl_module: Any) -> Callable[..., Any]:
        """The strategy's `training_step`, before which what it changes is kept."""
        original = trainer.strategy.training_step

        def training_step(*args: Any) -> Any:
            kept = [*map(shallow_copy, args)]

            def replay() -> object:
                with mock.patch.object(pl_module, "log"):
                    loss = loss_within(original(*map(shallow_copy, kept)))
                loss = loss / trainer.accumulate_grad_batches
                pl_module.backward(loss if self._scaler is None else self._scaler.scale(loss))
                return loss.detach()

            self._begin(trainer.strategy.model)
            self._replay = None if isinstance(kept[0], Iterator) else replay
            with self._explained(self._replay if pl_module.automatic_optimization else None):
                output = original(*args)
            loss = loss_within(output)
            self._loss = loss.detach() if isinstance(loss, Tensor) else None
            return output

        return training_step

    def _clipping(
        self, original: Callable[..., None], trainer: Any, pl_module: Any
    ) -> Callable[..., None]:
        """The plugin's `clip_gradients`, which manual optimization calls before the step."""

        def clip_gradients(optimizer: Any, *args: Any, **kwargs: Any) -> None:
            if not pl_module.automatic_optimization:
                self._look(_place(trainer, optimizer))
            original(optimizer, *args, **kwargs)

        return clip_gradients


def _place(trainer: Any, optimizer: Any) -> int:
    """The place of an optimizer, or of Lightning's wrapper around it, among all."""
    inner = getattr(optimizer, "optimizer", optimizer)
    return next(i for i, o in enumerate(trainer.optimizers) if o is inner)


def lightning_callback(*, guard: bool = True, max_nonfinite: int = 3, **options: Any) -> Any:
    """Make a PyTorch Lightning callback that monitors gradients and stops NaN and Inf.

    From the start of training on it watches the module with a `GradientMonitor` for each optimizer,
    and takes its hooks away at the end or upon an exception. At each step that Lightning logs,
    "gradients/total_norm", the norm before clipping, is logged too (of further optimizers
    "gradients/total_norm/1" and so on); in between nothing waits for the device. Histories are kept
    in Lightning's checkpoints.

    With `guard`, the loss and the gradients of each batch are summed after its backward and that
    number is read: one host synchronization. If it is not finite, the batch is run again as
    `find_nonfinite` does, from the same state of buffers and random number generators, which are
    put back again; the report is warned of and kept. All gradients are then set to None, which
    optimizers of PyTorch take as nothing to do: parameters, momentum and weight decay stay as they
    are, bit by bit. With accumulation the whole step is skipped, in a distributed run on every
    process. Lightning counts such a step, and so do learning rate schedulers. It is in the
    monitor's history, as skipped. If `training_step` raises because of a NaN, the report is a note
    on the exception.

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
    loaded = [name for name in _LIGHTNING if sys.modules.get(name)]
    installed = (name for name in _LIGHTNING if importlib.util.find_spec(name.partition(".")[0]))
    names = loaded or [*installed][:1]
    if not names:
        raise ImportError("lightning_callback: PyTorch Lightning is needed; pip install lightning")
    bases = [importlib.import_module(name).Callback for name in names]
    return callback_class(_LightningHooks, *bases)(guard, max_nonfinite, options)
