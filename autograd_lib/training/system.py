"""A training step that reads on one screen, and the loop around it."""

from __future__ import annotations

import math
import signal
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_map_only

from autograd_lib.callbacks.shared import Refusals
from autograd_lib.config.records import AutogradConfig, Settings
from autograd_lib.core import batches
from autograd_lib.core.batches import Count, Piece
from autograd_lib.core.files import replaced_atomically
from autograd_lib.core.snapshot import drop_gradients, random_state, seed_all, set_random_state
from autograd_lib.higher_order import DerivativeTower, derivative_tower
from autograd_lib.nonfinite.guard import NonFiniteGuard
from autograd_lib.report.progress import progress
from autograd_lib.training import distributed, loop, saving, setup
from autograd_lib.training.step import ForwardBackward, micro_batches, move

__all__ = ["AutogradTrainingSystem"]

_Metric = Callable[[Any, Any], float | Tensor]
_Row = dict[str, float]


class AutogradTrainingSystem:
    r"""Train a model: one step, the loop over epochs, and all that must survive an interruption.

    A step runs forward and backward by micro-batches, under autocast, watched by a
    `NonFiniteGuard`. It then clips the gradients, steps the optimizer and the scheduler. Losses of
    micro-batches and of processes are weighted by what they count, so that the gradient is that of
    the mean over the whole batch,

    $$\nabla L = \sum_i \frac{n_i}{\sum_j n_j} \nabla \ell_i,$$

    however the batch is divided. (The mean of means, which `DistributedDataParallel` computes by
    itself, is another one as soon as the counts differ.) The gradients of a step stay in `.grad`
    until the next one begins.

    A batch is a pair ``(inputs, targets)``, whose inputs are a tensor, a tuple of positional or a
    mapping of keyword arguments of the model; or it is a mapping, with which the model is called as
    ``model(**batch)``, and which then stands for the targets too. So a model of `transformers` and
    what its tokenizer and collator make go in as they are, with the loss that the model computes
    itself. That loss is divided by its labels: the integers that are not -100, without the first
    of each sequence where the model shifts them. Where its graph shows anything else than a mean
    over them (a contrastive loss, a balance of experts beside it), dividing it is an error.

    In a process group of more than one process the model is wrapped, unless it is already: in
    `DistributedDataParallel`, or by `fully_shard` of its `blocks` and of itself, after which
    `optimizer` holds the new parameters. All methods are collectives then.

    Args:
        model: Called with the inputs of a batch; on its device, in training mode.
        optimizer: Of its parameters, and of those of `loss_fn` if it has some. A
            schedule-free one has modes: each step puts it into training mode, evaluation and
            checkpoints use its averaged weights. Call its `eval()` before you use the model.
        loss_fn: ``loss_fn(output, targets)`` is a mean. None for the model's own loss:
            ``output.loss``, ``output["loss"]``, the first of a tuple or the output itself.
        config: What `load_config` returns; by default a monitor and a guard, in fp32.
        scheduler: Steps after each step of the optimizer.
        count: ``count(targets)`` is how many terms that mean has. By default the number of
            samples; for `nn.CrossEntropyLoss` and `nn.NLLLoss` the targets that are not ignored,
            by their weights; for the model's own loss its labels. What is given here, and that
            `loss_fn` is such a mean, is not checked: a loss over pairs of samples (contrastive, as
            InfoNCE) is another one in micro-batches.
        metrics: Functions ``(output, targets)`` by name. `evaluate` averages them like the loss,
            but without weights of classes.

    Attributes:
        model: What is called; `module` is the model inside a wrapper.
        monitor: The `GradientMonitor`; None if the configuration has none.
        step: Steps done, skipped ones included.
        epoch: Epochs done.
        directory: Where `fit` writes; None for nowhere.
        history: A dict for each epoch, as `fit` returns it.
        gradient_norm: Of the last step before it was clipped; None if nothing clips.
        reports: Why steps were skipped, one `NonFinite` each.

    Raises:
        TypeError: An argument is of the wrong kind, or the optimizer's step needs a closure.
        ValueError: `loss_fn` is not a mean, the optimizer has no parameter of the model or is
            another than `config.optimizer` describes, or the configuration does not fit the model.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        >>> system = AutogradTrainingSystem(model, optimizer, nn.MSELoss())
        >>> x, y = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[1.0], [2.0]])
        >>> losses = [system.train_step(x, y).item() for _ in range(20)]
        >>> losses[-1] < losses[0], system.step
        (True, 20)

        A model that computes its loss itself, and a batch with its arguments by name:

        >>> class Squares(nn.Linear):
        ...     def forward(self, x, labels):
        ...         return {"loss": nn.functional.mse_loss(super().forward(x), labels)}
        >>> model = Squares(2, 1)
        >>> system = AutogradTrainingSystem(model, torch.optim.SGD(model.parameters(), lr=0.01))
        >>> rows = system.fit([{"x": x, "labels": y}], epochs=20)
        >>> rows[-1]["loss"] < rows[0]["loss"]
        True
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_fn: Callable[[Any, Any], Tensor] | None = None,
        config: AutogradConfig | None = None,
        *,
        scheduler: LRScheduler | None = None,
        count: Count | None = None,
        metrics: Mapping[str, _Metric] | None = None,
    ) -> None:
        self.config = AutogradConfig() if config is None else config
        self.metrics = dict(metrics or {})
        setup.check_arguments(
            *(model, optimizer, loss_fn, self.config), scheduler=scheduler, metrics=self.metrics
        )
        self.settings = setup.settings_of(self.config, distributed.module_of(model))
        self.peers = distributed.Peers()
        self._loss_module = loss_fn if isinstance(loss_fn, nn.Module) else nn.Module()
        self._loss_parameters = [p for p in self._loss_module.parameters() if p.requires_grad]
        self.device = next(model.parameters()).device
        if replace(self.settings, precision="fp32", micro_batch=None) != Settings():
            self.settings.apply(distributed.module_of(model))
        self.model = distributed.parallelize(model, optimizer, self.peers, self.config.distributed)
        self.peers.broadcast([*self._loss_module.parameters(), *self._loss_module.buffers()])
        # Parameters that are not optimized too: their gradients would add up until they overflow.
        everything = *distributed.optimized(optimizer), *self.model.parameters()
        self._parameters = list(dict.fromkeys((*everything, *self._loss_parameters)))
        self.optimizer, self.loss_fn, self.scheduler = optimizer, loss_fn, scheduler
        self.count = batches.terms_of(loss_fn, self.module) if count is None else count
        self._trusted = count is not None
        # What metrics average over: class weights apply to the loss only.
        weighted = count is None and getattr(loss_fn, "weight", None) is not None
        self._terms = batches.terms_of(loss_fn, weighted=False) if weighted else None
        fp16 = self.settings.precision == "fp16"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=fp16)
        most = self.config.training.max_nonfinite
        self.guard = NonFiniteGuard(self.model, scaler=self.scaler) if most else None
        self.monitor = setup.monitor_of(self.config, self.module, optimizer, self.scaler)
        self.step = self.epoch = 0
        self.history: list[_Row] = []
        self._refusals = Refusals("train_step", "training.max_nonfinite", most)
        self.reports = self._refusals.reports
        self.gradient_norm: Tensor | None = None
        self._loss = torch.zeros(())
        self._position = 0
        directory = self.config.training.directory
        self.directory = None if directory is None else Path(directory)
        self._owns_files = False  # whether the directory holds this run
        self._losses: list[Tensor] = []  # of the epoch
        self._epoch_start: dict[str, Any] | None = None  # random states when the epoch began
        self._generators: list[torch.Generator] = []  # of the loader
        self._generator_states: list[Tensor] | None = None  # loaded, until the loader has them

    @property
    def module(self) -> nn.Module:
        """The model without its `DistributedDataParallel`."""
        return distributed.module_of(self.model)

    def __repr__(self) -> str:
        return (
            f"AutogradTrainingSystem({type(self.module).__name__} on {self.device}, "
            f"{self.settings}; {self.epoch} epochs, {self.step} steps, "
            f"{len(self.reports)} skipped)"
        )

    # One step

    def train_step(self, inputs: Any, targets: Any = None) -> Tensor:
        """Run one step of the optimizer on a batch.

        A step whose loss or gradients are not finite is skipped, with a warning and an entry in
        `reports`; what overflows in fp16 is left to the `GradScaler`.

        Args:
            inputs: A tensor, or the model's arguments as a tuple or a mapping; moved to its device.
                The first dimension of all tensors is the batch, where micro-batches divide it; else
                they are of any form, as those of graphs. NumPy arrays become tensors.
            targets: What `loss_fn` takes; without them it takes `inputs`, if that is a mapping.

        Returns:
            The mean loss of the whole batch, over all processes; detached.

        Raises:
            RuntimeError: The configuration says `enable_gradients: false`.
            FloatingPointError: `training.max_nonfinite` steps in a row were not finite.
            ValueError: The batch is empty, it or the model's own loss cannot be divided, `count`
                gives zero for all of it, or nothing requires a gradient.
        """
        setup.check_trains("train_step", self.config)
        return self._train((inputs, targets))

    def _train(self, batch: Any, counts: bool = True) -> Tensor:
        size, count = self.settings.micro_batch, self.count
        if loop.has_modes(self.optimizer):
            cast(Any, self.optimizer).train()  # does nothing if it trains already
        pieces = micro_batches("train_step", batch, size, count, peers=self.peers, counts=counts)
        drop_gradients(self._parameters)
        report = None
        if self.guard is None:
            self._forward_backward(pieces)
        else:
            report = self.guard(lambda: self._forward_backward(pieces))
        self.step += 1
        if report is None:
            self._refusals.in_a_row = 0
            self._update()
        else:
            drop_gradients(self._parameters)
            if self.monitor is not None:
                self.monitor.look(skipped=True)  # it counts the step, as the system does
            self._refusals.add(report, self.step)
        return self.peers.sum(self._loss)

    def _forward_backward(self, pieces: list[Piece]) -> list[Tensor | None]:
        """Leave the gradients in `.grad`; return what the guard does not see there."""
        run = self._run("train_step", self.model)
        self._loss = run(pieces, self.scaler.scale, self.peers.world)
        self.peers.average_gradients(self._loss_parameters)
        if self.scaler.is_enabled():  # it looks at the gradients of the loss's parameters itself
            return [self._loss]
        return [self._loss, *(p.grad for p in self._loss_parameters)]

    def _run(self, operation: str, model: nn.Module) -> ForwardBackward:
        precision, trusted = self.settings.precision, self._trusted
        return ForwardBackward(operation, model, self.loss_fn, precision, self.device, trusted)

    def _update(self) -> None:
        """Clip, and step optimizer, scaler and scheduler."""
        limit, scale = self.config.training.clip_norm, self.scaler.get_scale()
        if limit is not None:
            if self.monitor is not None:
                self.monitor.look()
            self.scaler.unscale_(self.optimizer)
            self.gradient_norm = distributed.clip_gradients(
                distributed.optimized(self.optimizer), limit
            )
        self.scaler.step(self.optimizer)
        self.scaler.update()
        skipped = self.scaler.get_scale() < scale
        if self.scheduler is not None and not skipped:
            self.scheduler.step()

    # Many steps

    def fit(
        self,
        loader: Iterable[Any],
        epochs: int,
        validation: Iterable[Any] | None = None,
        *,
        on_epoch: Callable[[_Row], object] | None = None,
    ) -> list[_Row]:
        """Train until so many epochs are done, those before an interruption counted.

        With `training.directory` set it writes there, after each epoch and each
        `training.save_every` steps, `last.pt` (and the history of gradients as `gradients.csv`),
        and `best.pt` when the validation loss is the least so far. On Ctrl-C or SIGTERM the step
        is finished and `last.pt` written first. After `load` it goes on in the middle of the
        epoch: the batches before are drawn again, with the random state of that epoch, and dropped.
        (Persistent workers of a `DataLoader` draw other random numbers after it: PyTorch seeds such
        workers once.) The state of a `torch.Generator` is kept where it is the `generator` of the
        loader, of its data set or samplers, or of a `DataLoader` that is an attribute of the
        loader; other generators than these and the global ones are not resumed.

        Args:
            loader: Gives batches, the same number each time; a sampler with `set_epoch` is told
                the epoch. Processes may have numbers of batches that differ. A generator lasts for
                one epoch.
            epochs: Number of epochs, in all.
            validation: What `evaluate` takes, after each epoch.
            on_epoch: Called with the row of each epoch.

        Returns:
            `history`, a row for each epoch: "epoch", "step", "loss" (the mean of its steps, those
            left out whose loss was not finite), "learning_rate", "gradient_norm" (the median of
            what the optimizer saw, after clipping; if there is a monitor), "seconds", and
            "validation_loss" and the metrics likewise.

        Raises:
            RuntimeError: The configuration says `enable_gradients: false`.
            ValueError: The directory holds another run, or the loader is not the one that was
                interrupted.
            FloatingPointError: Too many steps in a row were not finite.
            KeyboardInterrupt: Ctrl-C; SIGTERM is a SystemExit.
        """
        with self.peers.raise_on_all():
            for given in (loader,) if validation is None else (loader, validation):
                setup.check_loader("fit", given)
            if not hasattr(epochs, "__index__"):  # which NumPy's integers have too
                raise TypeError(f"fit: expected an integer for epochs, got {epochs!r}")
            setup.check_fit(self.config, None if self._owns_files else self.directory)
            if self.directory is not None and self.peers.rank == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
        self._generators = loop.generators_of(loader)
        with loop.stop_requested() as stop, progress("fit") as show:
            if self.step == 0:
                self._write("last.pt")  # to resume from if the process is killed in this epoch
            while self.epoch < epochs:
                row = self._run_epoch(loader, validation, stop, show)
                if on_epoch is not None:
                    on_epoch(row)
                self._check_stop(stop)
        return self.history

    def _run_epoch(
        self, loader: Any, validation: Any, stop: loop.Stop, show: Callable[..., None]
    ) -> _Row:
        began = time.perf_counter()
        for batch, counts in self._batches(loader):
            self._losses.append(self._train(batch, counts))
            self._position += 1
            if self.peers.rank == 0:
                place = f"epoch {self.epoch + 1}, batch {self._position}"
                show(lambda place=place: f"{place}, loss {self._losses[-1].item():.4g}")
            self._check_stop(stop)
            if (every := self.config.training.save_every) and self.step % every == 0:
                self._write("last.pt")
        losses = torch.stack(self._losses)
        row: _Row = {
            "epoch": self.epoch + 1,
            "step": self.step,
            "loss": losses[losses.isfinite()].mean().item(),
            "learning_rate": float(self.optimizer.param_groups[0]["lr"]),
        }
        if self.monitor is not None:
            seen = self.monitor.history  # of which the last ones are remembered
            own = (seen["step"] > (self._epoch_start or {}).get("monitored", 0)) & ~seen["skipped"]
            before, after = seen["total_norm"][own], seen["clipped_norm"][own]
            norms = np.where(np.isnan(after), before, after).tolist()
            row["gradient_norm"] = statistics.median(norms) if norms else math.nan
        if validation is not None:
            found = self.evaluate(validation)
            row |= {f"validation_{name}": value for name, value in found.items()}
        row["seconds"] = time.perf_counter() - began
        # Not before the evaluation: if that raises, the next fit repeats it.
        self.epoch += 1
        self._position, self._losses, self._epoch_start = 0, [], None
        loss = row.get("validation_loss", math.inf)
        best = not any(past.get("validation_loss", math.inf) <= loss for past in self.history)
        self.history.append(row)
        # The best one first: a run killed in between resumes before it and writes it again.
        if loss < math.inf and best:
            self._write("best.pt")
        self._write("last.pt")
        return row

    def _batches(self, loader: Any) -> Iterable[tuple[Any, bool]]:
        """What is left of the epoch, and whether it counts."""
        if self._epoch_start is None:
            self._epoch_start = loop.begin_epoch(loader, self.epoch, self._generator_states)
            self._generator_states = None
            if self.monitor is not None:
                self._epoch_start["monitored"] = self.monitor.get_gradient_summary()["step"]
            return self.peers.even_batches(loader)
        position, self._generator_states = self._position, None
        left, last, skipped = loop.resume_epoch(loader, self.epoch, position, self._epoch_start)
        skipped = int(max(n for (n,) in self.peers.gather(skipped)))
        if skipped < position:
            raise ValueError(
                f"fit: expected a loader of more than {position} batches, as the interrupted epoch "
                f"had, got {skipped}; give the loader used before the interruption"
            )
        return self.peers.even_batches(left, last)

    def _check_stop(self, stop: loop.Stop) -> None:
        number = int(max(n for (n,) in self.peers.gather(stop())))
        if not number:
            return
        self._write("last.pt")
        if number != signal.SIGINT:
            raise SystemExit(128 + number)
        last = "" if self.directory is None else f"; load {self.directory / 'last.pt'} to go on"
        raise KeyboardInterrupt(f"fit: interrupted after step {self.step}{last}")

    def evaluate(self, loader: Iterable[Any]) -> dict[str, float]:
        """Average the loss and the metrics over all batches of a loader, without gradients.

        The model is in evaluation mode meanwhile, and so is an optimizer that has one. Processes
        may have different numbers of batches: the mean is over the samples of all. The model's own
        loss is averaged over labels, or over samples where a batch has none.

        Args:
            loader: Gives batches.

        Returns:
            "loss" and each metric, by name.

        Raises:
            ValueError: There is no batch, or nothing in them counts.
        """
        setup.check_loader("evaluate", loader)
        run = self._run("evaluate", self.module)
        sums = [torch.zeros(len(self.metrics) + 3, device=self.device)]
        self.peers.broadcast(self.module.buffers())
        with loop.evaluating(self.module, self.optimizer):
            for batch, counts in self.peers.even_batches(loader, name="validation loader"):
                (piece,) = batches.split("evaluate", batch, None, self.count)
                if self.loss_fn is None and math.isnan(piece.terms):
                    piece = piece._replace(share=batches.samples_of("evaluate", piece.batch))
                share = piece.share * counts
                targets = batches.targets_of(piece.batch)
                terms = share if self._terms is None else float(self._terms(targets)) * counts
                output, loss = run.forward(piece._replace(share=share))
                if terms:
                    targets = move(targets, self.device)
                    judged = [metric(output, targets) * terms for metric in self.metrics.values()]
                    values = [loss * share, *judged, share, terms]
                    on_device = [torch.as_tensor(v, device=self.device).float() for v in values]
                    sums.append(torch.stack(on_device))
        total = self.peers.sum(torch.stack(sums).cpu().double().sum(0))
        loss_sum, *metric_sums, share, terms = total.tolist()
        batches.check_counted("evaluate", share)
        averages = [value / terms for value in metric_sums]
        return {"loss": loss_sum / share, **dict(zip(self.metrics, averages, strict=True))}

    # Files

    def state_dict(self) -> dict[str, Any]:
        """Return all that training resumes from, as tensors and plain values; a collective.

        Sharded tensors are gathered in the first process; in the others they are empty.
        """
        first = self.peers.rank == 0
        self.peers.broadcast(self.module.buffers())  # one set is kept, that of the first process
        loader = self._generator_states or [g.get_state() for g in self._generators]
        random = {"now": random_state(), "loader": loader, "epoch_start": self._epoch_start}
        place = {"step": self.step, "epoch": self.epoch, "position": self._position}
        state = {
            "signature": self._signature(),
            "model": saving.full_tensors(self.module.state_dict(), first),
            "optimizer": saving.full_tensors(self.optimizer.state_dict(), first),
            "loss": self._loss_module.state_dict(),
            "scheduler": None if self.scheduler is None else self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "monitor": None if self.monitor is None else self.monitor.state_dict(),
            "random": self.peers.gather_objects(random),
            "losses": torch.stack(self._losses) if self._losses else torch.empty(0),
            "history": list(self.history),
            "progress": place | {"failed": self._refusals.in_a_row},
        }
        if loop.has_modes(self.optimizer):
            state["trained"] = state["model"]
            with loop.averaged(self.optimizer):
                averages = tree_map_only(Tensor, Tensor.clone, self.module.state_dict())
            state["model"] = saving.full_tensors(averages, first)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Resume from what `state_dict` returned; everything is checked before anything changes.

        Raises:
            ValueError: It is of another model, loss, optimizer or scheduler. Nothing is changed.
        """
        saving.check_signature(self._signature(), state["signature"])
        if self.monitor is not None and state["monitor"] is not None:
            self.monitor.load_state_dict(state["monitor"])  # or raises and changes nothing
        saving.load_module(self.module, state.get("trained", state["model"]))
        saving.load_module(self._loss_module, state["loss"])
        saving.load_optimizer(self.optimizer, state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        if self.scaler.is_enabled() and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.history = list(state["history"])
        progress = state["progress"]
        self.step, self.epoch = progress["step"], progress["epoch"]
        self._position, self._refusals.in_a_row = progress["position"], progress["failed"]
        self._losses = list(state["losses"].to(self.device))
        saved, rank = state["random"], self.peers.rank
        own = saved[rank % len(saved)]
        self._epoch_start, self._generator_states = own["epoch_start"], own.get("loader") or None
        set_random_state(own["now"])
        if rank >= len(saved):  # else two processes would draw the same numbers
            seed_all(int(torch.randint(2**62, ())) + rank)
        drop_gradients(self._parameters)

    def _signature(self) -> dict[str, Any]:
        return saving.signature(self.module, self._loss_module, self.optimizer, self.scheduler)

    def save(self, path: str | PathLike[str]) -> None:
        """Write all that training resumes from to one file.

        That is the model, the optimizer, the parameters of the loss, scaler, scheduler, the
        random states of all processes and of the loader's generators, the place in the epoch, the
        history and that of the monitor. The file appears only when it is complete, in place of the
        one before. The first process writes it, parameters that are sharded gathered one by one.

        Raises:
            OSError: The file cannot be written.
            TypeError: A state holds what could not be loaded safely.
        """
        state = self.state_dict()
        with self.peers.raise_on_all():
            if self.peers.rank == 0:
                saving.write(state, Path(path))

    def load(self, path: str | PathLike[str]) -> None:
        """Resume from a file that `save` wrote, also in the middle of an epoch.

        Optimizer and scheduler go on with the values that were saved, the learning rate included,
        whatever they were made with. Files are read with ``weights_only=True`` after a look at
        their checksums, and all that can be wrong is found before anything is changed. The number
        of processes may differ: the batches are those of an uninterrupted run if `data.batch_size`
        is divided among them. Resuming is equal to the last bit only with the same number of
        processes, and with DDP only for up to two: with more, DDP sums the first step after `load`
        in another order, as it orders its buckets anew.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is damaged, was not written by `save`, or is of another model, optimizer,
                or scheduler. Nothing is changed.
        """
        with self.peers.raise_on_all():
            state = saving.read(Path(path))
        self.load_state_dict(state)
        if self.directory is not None and Path(path).resolve().parent == self.directory.resolve():
            self._owns_files = True

    def _write(self, name: str) -> None:
        if self.directory is None:
            return
        self._owns_files = True
        self.save(self.directory / name)
        kept = self.config.autograd_system.gradient_monitoring.save_gradient_history
        with self.peers.raise_on_all():
            if self.monitor is not None and kept and self.peers.rank == 0:
                with replaced_atomically(self.directory / "gradients.csv") as new:
                    self.monitor.to_csv(new)

    # Derivatives of higher order

    def compute_higher_order_gradients(
        self,
        input: Any,
        target: Any = None,
        order: int = 2,
        direction: Mapping[str, Tensor] | None = None,
    ) -> DerivativeTower:
        """Derivatives of the loss along a direction; see `derivative_tower`.

        Args:
            input: Given to the model; without `loss_fn` a mapping of its arguments.
            target: Given to `loss_fn`.
            order: Of the highest derivative.
            direction: A tensor for each trainable parameter, by name; None for that of the
                gradient.

        Returns:
            Entry k - 1 is the derivative of order k, contracted with the direction k - 1 times.

        Raises:
            RuntimeError: The configuration says `higher_order_gradients: false`.
            ValueError: `order` or `direction` do not fit.
            NotImplementedError: An operation has no rule.
        """
        setup.check_higher_order(self.config, self.module)
        input, target = move(batches.plain((input, target)), self.device)
        return derivative_tower(self.module, self.loss_fn, input, target, order, direction)
