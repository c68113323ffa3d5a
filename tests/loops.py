"""A training system's configuration and state in tests, and the loop that it must agree with."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

from autograd_lib.config import AutogradConfig, load_config
from autograd_lib.training.system import AutogradTrainingSystem


def configured(**sections: dict[str, Any]) -> AutogradConfig:
    """A configuration; `performance`, `monitoring` and `features` are short for their paths."""
    system: dict[str, Any] = {}
    for name, path in {
        "performance": "performance",
        "monitoring": "gradient_monitoring",
        "features": "advanced_features",
    }.items():
        if name in sections:
            system[path] = sections.pop(name)
    if "enable_gradients" in sections:
        system["enable_gradients"] = sections.pop("enable_gradients")
    return load_config({"autograd_system": system, **sections})


def bytes_of(tensor: Tensor) -> bytes:
    tensor = tensor.detach().cpu()
    if tensor.is_sparse:
        tensor = tensor.coalesce()
        return bytes_of(tensor.indices()) + bytes_of(tensor.values())
    if not tensor.numel():  # whose strides may be anything
        return b""
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found: Any, expected: Any, where: str = "state") -> None:
    """Equal bit by bit, NaN too, in all that trees of plain values and tensors hold."""
    assert type(found) is type(expected), where
    if isinstance(expected, dict):
        assert list(found) == list(expected), where
        for key in expected:
            assert_same(found[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), where
        for i, pair in enumerate(zip(found, expected, strict=True)):
            assert_same(*pair, f"{where}[{i}]")
    elif isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, where
        assert found.shape == expected.shape, where
        assert bytes_of(found) == bytes_of(expected), where
    else:
        assert found == expected or (found != found and expected != expected), where


def plain_loop(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loss_fn: Callable[..., Tensor],
    batches: Iterable[tuple[Any, Any]],
    *,
    dtype: torch.dtype | None = None,
    scaler: torch.amp.GradScaler | None = None,
    clip: float | None = None,
    size: int | None = None,
    scheduler: lr_scheduler.LRScheduler | None = None,
) -> list[Tensor]:
    """The loop of PyTorch's own tutorials on mixed precision and accumulation."""
    found = []
    for inputs, targets in batches:
        optimizer.zero_grad()
        total = torch.zeros(())
        whole = len(targets)
        parts = [slice(i, i + (size or whole)) for i in range(0, whole, size or whole)]
        for part in parts:
            arguments = inputs if isinstance(inputs, tuple) else (inputs,)
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = loss_fn(model(*(x[part] for x in arguments)), targets[part])
            loss = loss * (len(targets[part]) / whole)
            (loss if scaler is None else scaler.scale(loss)).backward()
            total = total + loss.detach()
        scale = None if scaler is None else scaler.get_scale()
        if clip is not None:
            if scaler is not None:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], clip)
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
        if scheduler is not None and (scaler is None or scaler.get_scale() >= scale):
            scheduler.step()
        found.append(total)
    return found


def twins(make: Callable[[], nn.Module], *optimizer_of: Any, **options: Any) -> list[Any]:
    """Two equal models, each with its optimizer."""
    found = []
    for _ in range(2):
        torch.manual_seed(0)
        model = make()
        kind, *_ = optimizer_of or (torch.optim.AdamW,)
        found += [model, kind(model.parameters(), **{"lr": 1e-2, **options})]
    return found


def batches_of(shape: tuple[int, ...], classes: int, number: int = 6, size: int = 7) -> list[Any]:
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(size, *shape, generator=generator),
            torch.randint(classes, (size,), generator=generator),
        )
        for _ in range(number)
    ]


def everything(system: AutogradTrainingSystem) -> dict[str, Any]:
    """All that a step may change."""
    loss = system.loss_fn
    return copy.deepcopy(
        {
            "model": dict(system.module.state_dict()),
            "modes": [module.training for module in system.module.modules()],
            "optimizer": system.optimizer.state_dict(),
            "loss": dict(loss.state_dict()) if isinstance(loss, nn.Module) else {},
            "scheduler": system.scheduler and system.scheduler.state_dict(),
            "scaler": system.scaler.state_dict(),
            "monitor": system.monitor and system.monitor.state_dict(),
            "random": (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()),
            "gradients": [p.grad for p in system.module.parameters()],
            "progress": (system.step, system.epoch, system.history),
        }
    )
