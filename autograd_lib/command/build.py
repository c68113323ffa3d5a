"""From a configuration to what runs: data, model, optimizer, schedule, loaders, system."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, DistributedSampler, Subset

from autograd_lib.command.data import Task, load_data
from autograd_lib.command.named import called, imported, takes_any_name
from autograd_lib.config.records import OPTIMIZERS, AutogradConfig, OptimizerConfig
from autograd_lib.models import CustomCNNModel, CustomRNNModel, CustomTransformerModel
from autograd_lib.training.distributed import Peers
from autograd_lib.training.system import AutogradTrainingSystem

_MODELS: dict[str, Callable[..., Any]] = {
    "cnn": CustomCNNModel,
    "transformer": CustomTransformerModel,
    "rnn": CustomRNNModel,
}


@dataclass(frozen=True)
class Run:
    """A run, ready to train.

    Attributes:
        system: The training system, on its device, with the configuration.
        train: Batches of this process to learn from, on the CPU.
        test: Batches of this process to judge by.
        task: The data.
    """

    system: AutogradTrainingSystem
    train: DataLoader[Any]
    test: DataLoader[Any]
    task: Task


def build(config: AutogradConfig) -> Run:
    """Build a run from a configuration, in every process alike.

    Under an initialized process group of N processes, each takes an N-th of every batch: which
    samples a batch holds does not depend on N.

    Args:
        config: The configuration.

    Returns:
        The run.

    Raises:
        ValueError: Model and data do not fit together, a name or an option is unknown or out of
            its range, a function of one's own fails, or the batch does not divide by the number of
            processes.
        TypeError: A function of one's own returns something else than a `Task` or a module.
        ImportError: The data need a package that is not installed.

    Example:
        >>> from autograd_lib.config import load_config
        >>> run = build(load_config({"training": {"device": "cpu"}, "data": {"batch_size": 32}}))
        >>> images, labels = next(iter(run.train))
        >>> images.shape
        torch.Size([32, 1, 8, 8])
    """
    peers, seed = Peers(), config.training.seed
    torch.manual_seed(seed)
    device = pick_device(config.training.device)
    task = load_data(config.data.name, **config.data.options)
    model = _make_model(config, task).to(device)
    # Weights are the same everywhere, dropout is not.
    torch.manual_seed((seed + peers.rank) % 2**63)
    train, test = make_loaders(config, task, peers.rank, peers.world)
    chosen = config.optimizer
    kind = OPTIMIZERS[chosen.name]
    given = {"params": model.parameters(), "lr": chosen.lr}
    has_decay = "weight_decay" in inspect.signature(kind).parameters
    if has_decay or chosen.weight_decay != OptimizerConfig.weight_decay:  # else it is not asked for
        given["weight_decay"] = chosen.weight_decay
    optimizer = called("optimizer", chosen.name, kind, chosen.options, given)
    scheduler = make_schedule(chosen, optimizer, config.training.epochs * len(train))
    system = AutogradTrainingSystem(
        model, optimizer, task.loss_fn.to(device), config, scheduler=scheduler, metrics=task.metrics
    )
    return Run(system, train, test, task)


def pick_device(name: str) -> torch.device:
    """The device of a configuration; of "auto" the accelerator, if there is one."""
    if name == "auto":
        return torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    try:
        return torch.empty(1, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"training.device: expected a device that works here, got {name!r} ({reason}); 'auto' "
            "takes what there is, `python -m autograd_lib doctor` lists it"
        ) from error


def _make_model(config: AutogradConfig, task: Task) -> nn.Module:
    name, given = config.model.name, dict(task.sizes)
    kind = _MODELS.get(name) or imported("model", name)
    signature = inspect.signature(kind)
    if not (given.keys() <= signature.parameters.keys() or takes_any_name(signature)):
        raise ValueError(
            f"model.name: {name!r} does not fit data.name {config.data.name!r}; what fits is cnn "
            "on digits, rnn on rows, transformer on source, and on these data a function that "
            f"takes {', '.join(given)}"
        )
    if "custom_gradients" in signature.parameters:
        given["custom_gradients"] = config.autograd_system.advanced_features.custom_gradients
    model = called("model", name, kind, config.model.options, given)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model.name: expected {name} to return an nn.Module, got {type(model).__name__}"
        )
    return model


def make_schedule(
    config: OptimizerConfig, optimizer: torch.optim.Optimizer, steps: int
) -> LRScheduler | None:
    r"""The schedule of the learning rate, advanced at each of so many steps of the optimizer.

    With $w$ the steps of warmup of $n$ in all, step $s = 0, 1, \dots$ has the learning rate times
    $(s + 1) / w$ while $s < w$; then, with $t = (s - w) / (n - w)$, times $1 - t$ if it is linear
    and $(1 + \cos \pi t) / 2$ if it is cosine.

    Args:
        config: What schedule.
        optimizer: Whose learning rate.
        steps: All of them.

    Returns:
        The schedule; None if the learning rate is constant.
    """
    warm = round(config.warmup * steps)
    if config.schedule == "constant" and not warm:
        return None

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / warm
        share = min((step - warm) / max(steps - warm, 1), 1.0)
        if config.schedule == "linear":
            return 1 - share
        return (1 + math.cos(math.pi * share)) / 2 if config.schedule == "cosine" else 1.0

    return LambdaLR(optimizer, factor)


def make_loaders(
    config: AutogradConfig, task: Task, rank: int, processes: int
) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """The batches of one process: to learn from, shuffled by epoch, and to judge by.

    Together, the processes see each batch that one process would see, and each test sample once.

    Args:
        config: Batch size, seed and workers.
        task: The data.
        rank: Of this process.
        processes: How many there are.

    Returns:
        The two loaders.

    Raises:
        ValueError: The batch does not divide by the number of processes, or there are fewer
            samples than it has.
    """
    batch = config.data.batch_size
    if batch % processes:
        raise ValueError(
            f"data.batch_size: expected a multiple of the number of processes, {processes}, got "
            f"{batch}; for instance --set data.batch_size={batch + -batch % processes}"
        )
    if batch > len(task.train):
        raise ValueError(
            f"data.batch_size: expected at most {len(task.train)}, as many as there are training "
            f"samples, got {batch}; an incomplete batch is left out"
        )
    # Also with one process, whose order it deals out to several. Its order depends on the seed
    # and the epoch, not on numbers drawn before.
    sampler: DistributedSampler[Any] = DistributedSampler(
        task.train, processes, rank, seed=config.training.seed, drop_last=True
    )
    # Not a sampler, which would repeat samples until all processes have equally many.
    part = Subset(task.test, range(rank, len(task.test), processes))
    workers = config.data.workers
    # The loaders have generators of their own, or each pass would draw from that of dropout.
    # Pinned memory would turn the tuple of arguments of the model into a list.
    make = partial(
        DataLoader,
        batch_size=batch // processes,
        num_workers=workers,
        persistent_workers=workers > 0,
    )
    return (
        make(task.train, sampler=sampler, drop_last=True, generator=torch.Generator()),
        make(part, generator=torch.Generator()),
    )
