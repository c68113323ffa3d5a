"""From a configuration to what runs: data, model, optimizer, schedule, loaders, system."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader, DistributedSampler, Subset

from autograd_lib.command.data import Task, check_options, load_data
from autograd_lib.config.records import AutogradConfig, OptimizerConfig
from autograd_lib.models import CustomCNNModel, CustomRNNModel, CustomTransformerModel
from autograd_lib.training.system import AutogradTrainingSystem

_MODELS: dict[str, type[nn.Module]] = {
    "cnn": CustomCNNModel,
    "transformer": CustomTransformerModel,
    "rnn": CustomRNNModel,
}
_FITTING = {"digits": "cnn", "rows": "rnn", "source": "transformer"}
_OPTIMIZERS: dict[str, type[torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adam": torch.optim.Adam,
    "sgd": torch.optim.SGD,
}


@dataclass(frozen=True)
class Run:
    """A run, ready to train.

    Attributes:
        config: What it was built from.
        system: The training system, on its device.
        train: Batches of this process to learn from, on the CPU.
        test: Batches of this process to judge by.
        task: The data.
        device: Where the model is.
    """

    config: AutogradConfig
    system: AutogradTrainingSystem
    train: DataLoader[Any]
    test: DataLoader[Any]
    task: Task
    device: torch.device


def build(config: AutogradConfig) -> Run:
    """Build a run from a configuration, in every process alike.

    Under an initialized process group of N processes, each takes an N-th of every batch: which
    samples a batch holds does not depend on N.

    Args:
        config: The configuration.

    Returns:
        The run.

    Raises:
        ValueError: Model and data do not fit together, an option is unknown or out of its range,
            or the batch does not divide by the number of processes.
        ImportError: The data need a package that is not installed.

    Example:
        >>> from autograd_lib.config import load_config
        >>> run = build(load_config({"training": {"device": "cpu"}, "data": {"batch_size": 32}}))
        >>> images, labels = next(iter(run.train))
        >>> images.shape
        torch.Size([32, 1, 8, 8])
    """
    _check_fit(config)
    rank, processes = position()
    seed = config.training.seed
    torch.manual_seed(seed)
    device = pick_device(config.training.device)
    task = load_data(config.data.name, **config.data.options)
    model = _make_model(config, task).to(device)
    # Weights are the same everywhere, dropout is not.
    torch.manual_seed((seed + rank) % 2**63)
    train, test = make_loaders(config, task, rank, processes)
    optimizer = _make_optimizer(config.optimizer, model.parameters())
    scheduler = make_schedule(config.optimizer, optimizer, config.training.epochs * len(train))
    system = AutogradTrainingSystem(
        model, optimizer, task.loss_fn.to(device), config, scheduler=scheduler, metrics=task.metrics
    )
    return Run(config, system, train, test, task, device)


def position() -> tuple[int, int]:
    """The rank of this process and the number of processes."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def pick_device(name: str) -> torch.device:
    """The device of a configuration; of "auto" the accelerator, if there is one."""
    if name == "auto":
        there = torch.accelerator.is_available()
        return (torch.accelerator.current_accelerator() if there else None) or torch.device("cpu")
    device = torch.device(name)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"training.device: expected a device that works here, got {name!r} ({reason}); 'auto' "
            "takes what there is, `python -m autograd_lib doctor` lists it"
        ) from error
    return device


def _check_fit(config: AutogradConfig) -> None:
    data, model = config.data.name, config.model.name
    if _FITTING[data] != model:
        pairs = "; ".join(f"{m} on {d}" for d, m in _FITTING.items())
        raise ValueError(
            f"model.name: {model!r} does not fit data.name {data!r}; what fits is {pairs}"
        )


def _make_model(config: AutogradConfig, task: Task) -> nn.Module:
    kind = _MODELS[config.model.name]
    options = dict(config.model.options)
    parameters = inspect.signature(kind).parameters
    set_elsewhere = {size: f"the data decide it ({value})" for size, value in task.sizes.items()}
    feature = "autograd_system.advanced_features.custom_gradients"
    set_elsewhere["custom_gradients"] = f"it is set by {feature}"
    _check_arguments("model", kind, options, set_elsewhere)
    for name, parameter in parameters.items():
        if parameter.default is parameter.empty and name not in {**options, **task.sizes}:
            raise ValueError(
                f"model.options.{name}: {kind.__name__} needs it, got none; for instance "
                f"--set model.options.{name}=128"
            )
    if config.autograd_system.advanced_features.custom_gradients and (
        "custom_gradients" in parameters
    ):
        options["custom_gradients"] = True
    return _construct("model.options", partial(kind, **task.sizes, **options))


def _make_optimizer(
    config: OptimizerConfig, parameters: Iterable[nn.Parameter]
) -> torch.optim.Optimizer:
    kind = _OPTIMIZERS[config.name]
    named = {name: f"it is set by optimizer.{name}" for name in ("lr", "weight_decay")}
    _check_arguments("optimizer", kind, config.options, {**named, "params": "the model decides it"})
    given = {"lr": config.lr, "weight_decay": config.weight_decay, **config.options}
    return _construct("optimizer.options", partial(kind, parameters, **given))


def _check_arguments(
    section: str, kind: type, options: Iterable[str], set_elsewhere: Mapping[str, str]
) -> None:
    for name in options:
        if name in set_elsewhere:
            raise ValueError(
                f"{section}.options.{name}: expected none, as {set_elsewhere[name]}; leave it out"
            )
    known = (name for name in inspect.signature(kind).parameters if name not in set_elsewhere)
    check_options(section, kind.__name__, options, known)


def _construct(path: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def make_schedule(
    config: OptimizerConfig, optimizer: torch.optim.Optimizer, steps: int
) -> LRScheduler | None:
    r"""The schedule of the learning rate, advanced at each of so many steps of the optimizer.

    With $w$ the steps of warmup of $n$ in all, step $s = 0, 1, \dots$ has the learning rate times
    $(s + 1) / w$ while $s < w$; then, with $t = (s - w) / (n - w)$, times $1 - t$ if it is linear
    and $(1 + \cos \pi t) / 2$ if it is cosine. A plateau halves it instead, whenever the validation
    loss has not fallen for three epochs.

    Args:
        config: What schedule.
        optimizer: Whose learning rate.
        steps: All of them.

    Returns:
        The schedule; None if the learning rate is constant.

    Raises:
        ValueError: Warmup with a plateau, which knows no steps.
    """
    if config.schedule == "plateau":
        if config.warmup:
            raise ValueError(
                f"optimizer.warmup: expected 0 with schedule 'plateau', got {config.warmup}; "
                "'plateau' goes by epochs, the other schedules by steps"
            )
        return ReduceLROnPlateau(optimizer, factor=0.5, patience=2)
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
        fitting = [n for n in (batch - batch % processes, batch + -batch % processes) if n]
        raise ValueError(
            f"data.batch_size: expected a multiple of the number of processes, {processes}, got "
            f"{batch}; for instance --set data.batch_size={fitting[0]}"
        )
    if batch > len(task.train):  # type: ignore[arg-type]
        raise ValueError(
            f"data.batch_size: expected at most {len(task.train)}, as many as there are training "  # type: ignore[arg-type]
            f"samples, got {batch}; an incomplete batch is left out"
        )
    # With one process too: what it deals out to many in turn is the order that one sees. Its
    # sequence is that of the seed and the epoch, whatever was drawn before.
    sampler: DistributedSampler[Any] = DistributedSampler(
        task.train, processes, rank, seed=config.training.seed, drop_last=True
    )
    # Not by a sampler, which would repeat samples until all processes have the same number.
    part = Subset(task.test, range(rank, len(task.test), processes))  # type: ignore[arg-type]
    workers = config.data.workers
    # A generator of their own, or each pass over a loader would draw from that of dropout. No
    # pinned memory: it turns the tuple of arguments of the model into a list.
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
