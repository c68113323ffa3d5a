"""What a training system is made of: its arguments checked, its settings, scaler and monitor."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from autograd_lib.config.records import AutogradConfig, OptimizerConfig, Settings
from autograd_lib.core.shards import is_distributed
from autograd_lib.monitor.monitor import GradientMonitor
from autograd_lib.training.distributed import optimized

_REMEDIES: dict[Any, str] = {
    Optimizer: "; of a wrapper pass the optimizer inside. With several, make a system of each and "
    "write the loop: for inputs, targets in loader: first.train_step(inputs, targets); "
    "second.train_step(...)",
    AutogradConfig: "; load_config makes one of a dict or of the path of a YAML file",
}


def check_arguments(
    model: nn.Module,
    optimizer: Optimizer,
    loss_fn: object,
    config: AutogradConfig,
    *,
    scheduler: LRScheduler | None,
    metrics: Iterable[str],
) -> None:
    """Raise for what cannot be trained, would fail in the middle, or would change nothing."""
    given: dict[Any, object] = {nn.Module: model, Optimizer: optimizer, AutogradConfig: config}
    if loss_fn is not None:
        given[Callable] = loss_fn
    for kind, value in given.items():
        if not isinstance(value, kind):
            raise TypeError(
                f"AutogradTrainingSystem: expected {kind.__name__}, got {type(value).__name__}"
                + _REMEDIES.get(kind, "")
            )
    if (reduction := getattr(loss_fn, "reduction", "mean")) != "mean":
        raise ValueError(
            f"AutogradTrainingSystem: expected a loss that is a mean, got reduction={reduction!r}; "
            "micro-batches and processes are weighted by what its mean counts"
        )
    _check_optimizer(optimizer, scheduler, config.optimizer)
    if set(model.parameters()).isdisjoint(optimized(optimizer)):
        raise ValueError(
            "AutogradTrainingSystem: the optimizer holds no parameter of the model; make it from "
            "model.parameters(), after the model is on its device"
        )
    if scheduler is not None and getattr(scheduler, "optimizer", None) is not optimizer:
        raise ValueError(
            "AutogradTrainingSystem: expected a scheduler of the optimizer that is given here, "
            f"got {scheduler!r}"
        )
    if "loss" in metrics:
        raise ValueError(
            "AutogradTrainingSystem: a metric named 'loss' would take the place of the loss, by "
            "which training stops and keeps the best; give it another name"
        )


def _check_optimizer(
    optimizer: Optimizer, scheduler: LRScheduler | None, described: OptimizerConfig
) -> None:
    """Raise for an optimizer that a step cannot use, or that is not the one described."""
    name = type(optimizer).__name__
    # Of the class: a scheduler puts a function around the method.
    _, *arguments = inspect.signature(type(optimizer).step).parameters.values()
    if any(a.default is a.empty and a.kind is a.POSITIONAL_OR_KEYWORD for a in arguments):
        raise TypeError(
            f"AutogradTrainingSystem: {name} calls the step itself, by a closure; expected an "
            "optimizer whose step needs none. Write the loop yourself and call "
            "optimizer.step(closure), with a GradientMonitor beside it"
        )
    try:
        optimizer.state_dict()
    except AttributeError as error:
        raise TypeError(
            f"AutogradTrainingSystem: {name} did not call Optimizer.__init__, and its state could "
            f"not be saved ({error}); call it there, or pass the optimizer inside"
        ) from error
    if described == OptimizerConfig():
        return
    given = {"weight_decay": OptimizerConfig.weight_decay, **optimizer.defaults}
    given["name"] = name.lower()
    asked = {key: getattr(described, key) for key in ("name", "lr", "weight_decay")}
    asked |= described.options
    other = [f"{key} {given.get(key)!r}" for key in asked if given.get(key) != asked[key]]
    if scheduler is None and (described.schedule != "constant" or described.warmup):
        other.append("no scheduler")
    if other:
        raise ValueError(
            "AutogradTrainingSystem: config.optimizer describes another optimizer than the one "
            f"given, which has {', '.join(other)}; make that one, or leave the section out"
        )


def check_trains(operation: str, config: AutogradConfig) -> None:
    """Raise if the configuration is for evaluation only."""
    if not config.autograd_system.enable_gradients:
        raise RuntimeError(
            f"{operation}: the configuration says autograd_system.enable_gradients: false, which "
            "is for evaluation only; set it to true to train"
        )


def check_loader(operation: str, loader: object) -> None:
    """Raise for what gives no batches."""
    if not hasattr(loader, "__iter__") and not hasattr(loader, "__getitem__"):
        raise TypeError(
            f"{operation}: expected a loader, which gives batches, got {type(loader).__name__}"
        )


def check_fit(config: AutogradConfig, new_directory: Path | None) -> None:
    """Raise if the configuration is for evaluation only, or a new directory holds another run."""
    check_trains("fit", config)
    if new_directory is not None and (last := new_directory / "last.pt").exists():
        raise ValueError(
            f"fit: {str(last)!r} is from another run, and would be overwritten; load() it to go "
            "on, or set another training.directory"
        )


def check_higher_order(config: AutogradConfig, model: nn.Module) -> None:
    """Raise if the configuration forbids higher derivatives, or no process has all parameters."""
    if not config.autograd_system.advanced_features.higher_order_gradients:
        raise RuntimeError(
            "compute_higher_order_gradients: the configuration says "
            "autograd_system.advanced_features.higher_order_gradients: false; set it to true"
        )
    if any(map(is_distributed, model.parameters())):
        raise NotImplementedError(
            "compute_higher_order_gradients: the parameters are sharded, and no process has "
            "them all; load the checkpoint with distributed.strategy 'ddp', or in one process"
        )


def settings_of(config: AutogradConfig, model: nn.Module) -> Settings:
    """The settings, with a checkpoint around each block where the configuration asks for them."""
    settings = config.autograd_system.performance
    if not config.autograd_system.advanced_features.gradient_checkpointing:
        return settings
    blocks = getattr(model, "blocks", None)
    if not isinstance(blocks, (nn.Sequential, nn.ModuleList)):
        raise ValueError(
            "AutogradTrainingSystem: gradient_checkpointing runs each block of model.blocks under "
            f"a checkpoint, and {type(model).__name__} has none; name the modules to recompute in "
            "autograd_system.performance.checkpoint, or make them an nn.ModuleList named blocks"
        )
    # Each by its own name, not as steps of an nn.Sequential: the model may loop over them itself.
    names = [f"blocks.{name}" for name, _ in blocks.named_children()]
    return replace(settings, checkpoint=dict.fromkeys(names, "recompute"))


def monitor_of(
    config: AutogradConfig, model: nn.Module, optimizer: Optimizer, scaler: torch.amp.GradScaler
) -> GradientMonitor | None:
    """The monitor that a configuration asks for, watching."""
    watched = config.autograd_system.gradient_monitoring
    if not watched.enabled or not config.autograd_system.enable_gradients:
        return None
    names = ("history", "every", "explode_above", "vanish_below")
    options = {name: getattr(watched, name) for name in names}
    monitor = GradientMonitor(model, optimizer, scaler, **options)
    monitor.register_hooks()
    return monitor
