"""The training system against loops written by hand, through interruptions, on damaged files.

Where equality is promised it is that of bits: `assert_same` looks at the bytes of every tensor.
"""

from __future__ import annotations

import contextlib
import copy
import gc
import io
import itertools
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import weakref
import zipfile
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES, TiedLanguageModel, cnn, mlp
from loops import (
    assert_same,
    batches_of,
    configured,
    everything,
    plain_loop,
    twins,
)
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from autograd_lib.config import load_config
from autograd_lib.functions.losses import CustomLossFunction
from autograd_lib.report import progress as _progress
from autograd_lib.training import saving as _saving
from autograd_lib.training.system import AutogradTrainingSystem

NAN = math.nan


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 8))


# --- one step

PERFORMANCE: dict[str, dict[str, Any]] = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "micro-batches that do not divide the batch": {"micro_batch": 3},
    "micro-batches in bf16": {"precision": "bf16", "micro_batch": 2},
    "a micro-batch larger than the batch": {"micro_batch": 100},
}


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("performance", PERFORMANCE.values(), ids=PERFORMANCE.keys())
@pytest.mark.parametrize(("make", "shape"), [(dropping, (8,)), (cnn, (1, 6, 6))])
def test_steps_are_those_of_a_loop_by_hand(
    make: Callable[[], nn.Module],
    shape: tuple[int, ...],
    performance: dict[str, Any],
    clip: float | None,
):
    model, optimizer, twin, other = twins(make, fused=True)
    loss_fn, batches = nn.CrossEntropyLoss(), batches_of(shape, 8)
    config = configured(performance=performance, training={"clip_norm": clip})
    scheduler, other_scheduler = (lr_scheduler.StepLR(o, 2, 0.5) for o in (optimizer, other))
    system = AutogradTrainingSystem(model, optimizer, loss_fn, config, scheduler=scheduler)
    torch.manual_seed(1)  # of dropout
    losses = [system.train_step(*batch) for batch in batches]
    precision = performance.get("precision", "fp32")
    torch.manual_seed(1)
    expected = plain_loop(
        *(twin, other, loss_fn, batches),
        dtype={"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision],
        scaler=torch.amp.GradScaler("cpu") if precision == "fp16" else None,
        clip=clip,
        size=performance.get("micro_batch"),
        scheduler=other_scheduler,
    )
    assert_same(losses, expected)
    assert_same(model.state_dict(), twin.state_dict())
    assert_same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    assert_same(optimizer.state_dict(), other.state_dict())
    assert_same(scheduler.state_dict(), other_scheduler.state_dict())
    assert system.step == len(batches)
    assert not any(loss.requires_grad or loss.dim() for loss in losses)


def test_an_overflow_in_fp16_is_skipped_by_the_scaler_and_the_scheduler_waits():
    model, optimizer, twin, other = twins(mlp)
    batches = batches_of((8,), 8)
    factor = 1e2  # times the scale of 2^16 the gradients are beyond the range of fp16
    scalers = [torch.amp.GradScaler("cpu") for _ in range(2)]

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        return factor * F.cross_entropy(output, targets)

    config = configured(performance={"precision": "fp16"})
    scheduler, other_scheduler = (lr_scheduler.StepLR(o, 2, 0.5) for o in (optimizer, other))
    system = AutogradTrainingSystem(model, optimizer, loss_fn, config, scheduler=scheduler)
    plain_loop(
        *(twin, other, loss_fn, batches),
        dtype=torch.float16,
        scaler=scalers[1],
        scheduler=other_scheduler,
    )
    for batch in batches:
        system.train_step(*batch)
    assert_same(system.scaler.state_dict(), scalers[1].state_dict())
    skipped = int(math.log2(2**16 / system.scaler.get_scale()))
    assert 1 <= skipped < len(batches)
    assert scheduler.last_epoch == len(batches) - skipped
    assert_same(scheduler.state_dict(), other_scheduler.state_dict())
    assert_same(model.state_dict(), twin.state_dict())
    assert_same(optimizer.state_dict(), other.state_dict())
    assert system.reports == []  # it is no fault
    assert system.monitor.history["skipped"].sum() == skipped


@pytest.mark.parametrize("size", [None, 1, 3, 4])
@pytest.mark.parametrize(
    "loss_fn",
    [
        nn.CrossEntropyLoss(),
        nn.CrossEntropyLoss(ignore_index=2),
        nn.CrossEntropyLoss(weight=torch.tensor([0.1, 3.0, 0.5, 1.7]).double()),
        nn.CrossEntropyLoss(
            weight=torch.tensor([0.1, 3.0, 0.5, 1.7]).double(), ignore_index=3, label_smoothing=0.0
        ),
        nn.CrossEntropyLoss(ignore_index=2, label_smoothing=0.2),
    ],
    ids=["plain", "ignored", "weights", "weights and ignored", "smoothed"],
)
def test_gradients_of_micro_batches_are_those_of_the_whole_batch(
    loss_fn: nn.Module, size: int | None
):
    torch.manual_seed(0)
    model = nn.Linear(5, 4).double()
    inputs = torch.randn(10, 5).double()
    targets = torch.tensor([2, 2, 2, 0, 1, 3, 3, 1, 0, 2])
    expected = torch.autograd.grad(loss_fn(model(inputs), targets), list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = configured(performance={"micro_batch": size})
    system = AutogradTrainingSystem(model, optimizer, loss_fn, config)
    loss = system.train_step(inputs, targets)
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(loss, loss_fn(model(inputs), targets).detach(), rtol=1e-13, atol=0)


def test_probabilities_of_pixels_as_targets():
    torch.manual_seed(0)
    model = nn.Conv2d(1, 3, 1).double()
    inputs, targets = torch.randn(5, 1, 2, 3).double(), torch.rand(5, 3, 2, 3).double()
    loss_fn = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0]).double())
    expected = torch.autograd.grad(loss_fn(model(inputs), targets), list(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    config = configured(performance={"micro_batch": 2})
    AutogradTrainingSystem(model, optimizer, loss_fn, config).train_step(inputs, targets)
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-13, atol=1e-15)


def test_count_says_what_the_mean_of_another_loss_is_over():
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    inputs, targets = torch.randn(6, 3).double(), torch.randn(6, 1).double()
    targets[[0, 1, 4]] = -100.0

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        kept = targets != -100
        return (output[kept] - targets[kept]).square().mean()

    expected = torch.autograd.grad(loss_fn(model(inputs), targets), list(model.parameters()))
    config = configured(performance={"micro_batch": 2})  # the first one counts nothing
    system = AutogradTrainingSystem(
        *(model, torch.optim.SGD(model.parameters(), lr=0.0), loss_fn, config),
        count=lambda targets: (targets != -100).sum(),
    )
    loss = system.train_step(inputs, targets)
    for parameter, grad in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-13, atol=1e-15)
    torch.testing.assert_close(loss, loss_fn(model(inputs), targets).detach(), rtol=1e-13, atol=0)
    with pytest.raises(ValueError, match=r"every label is -100 .* count that was given gives 0;"):
        system.train_step(inputs, torch.full((6, 1), -100.0).double())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"the batch is empty, its tensors have shapes \[\(0, 3\)"):
        system.train_step(inputs[:0], targets[:0])
    with pytest.raises(ValueError, match=r"first dimension is the\s+batch, got shapes \[\(6, 3\)"):
        system.train_step(inputs, targets[:2])
    assert_same(model.state_dict(), before)
    assert system.step == 1


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(4, 3), nn.Linear(2, 3)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return self.left(a) * self.right(b)


class Embedded(nn.Module):
    """Sparse gradients, of an embedding that is used beside a dense layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(11, 4, sparse=True), nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).mean(1))


class PartlyUsed(nn.Module):
    """One parameter is frozen, one gets no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle, self.frozen = nn.Linear(4, 3), nn.Linear(4, 3), nn.Linear(4, 4)
        self.frozen.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(self.frozen(x))


def special(kind: str) -> tuple[Callable[[], nn.Module], Any, list[tuple[Any, Tensor]]]:
    generator = torch.Generator().manual_seed(5)
    targets = torch.randint(3, (4, 6), generator=generator)
    draw = [torch.randn(6, 4, generator=generator) for _ in range(4)]
    tokens = [torch.randint(11, (6, 5), generator=generator) for _ in range(4)]
    if kind == "tuple of inputs":
        pairs = [(x, torch.randn(6, 2, generator=generator)) for x in draw]
        return TwoInputs, nn.CrossEntropyLoss(), list(zip(pairs, targets, strict=True))
    if kind == "sparse gradients":
        return Embedded, nn.CrossEntropyLoss(), list(zip(tokens, targets, strict=True))
    if kind == "shared parameters":

        def of_tokens(output: Tensor, targets: Tensor) -> Tensor:
            return F.cross_entropy(output.flatten(0, 1), targets.flatten())

        return TiedLanguageModel, of_tokens, list(zip(tokens, tokens[1:] + tokens[:1], strict=True))
    return PartlyUsed, nn.CrossEntropyLoss(), list(zip(draw, targets, strict=True))


@pytest.mark.parametrize("size", [None, 4])
@pytest.mark.parametrize(
    "kind",
    [
        *["tuple of inputs", "sparse gradients", "shared parameters"],
        "parameters frozen and without gradient",
    ],
)
def test_special_models_train_as_by_hand(kind: str, size: int | None):
    make, loss_fn, batches = special(kind)
    sgd = torch.optim.SGD
    model, optimizer, twin, other = twins(make, sgd, lr=0.1, momentum=0.9)
    config = configured(performance={"micro_batch": size})
    system = AutogradTrainingSystem(model, optimizer, loss_fn, config)
    losses = [system.train_step(*batch) for batch in batches]
    assert_same(losses, plain_loop(twin, other, loss_fn, batches, size=size))
    assert_same(model.state_dict(), twin.state_dict())
    grads = [[p.grad for p in m.parameters()] for m in (model, twin)]
    assert_same(*grads)
    assert (None in grads[0]) == (kind == "parameters frozen and without gradient")
    assert any(g is not None and g.is_sparse for g in grads[0]) == (kind == "sparse gradients")


def test_a_loss_with_parameters_in_the_optimizer():
    def run(by_hand: bool) -> tuple[dict[str, Any], dict[str, Any], float]:
        torch.manual_seed(0)
        model, loss_fn = mlp(), CustomLossFunction()
        everything = [*model.parameters(), *loss_fn.parameters()]
        optimizer = torch.optim.Adam(everything, lr=1e-2)
        batches = [(torch.randn(6, 8), torch.randn(6, 8)) for _ in range(5)]
        if by_hand:
            plain_loop(model, optimizer, loss_fn, batches, clip=0.5)
        else:
            config = configured(training={"clip_norm": 0.5})
            system = AutogradTrainingSystem(model, optimizer, loss_fn, config)
            for batch in batches:
                system.train_step(*batch)
        return model.state_dict(), loss_fn.state_dict(), loss_fn.log_ratio.abs().min().item()

    found, expected = run(by_hand=False), run(by_hand=True)
    assert_same(found, expected)
    assert found[2] > 0


def test_parameters_that_are_not_optimized_keep_no_gradients_of_earlier_steps():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    loss_fn = CustomLossFunction()
    optimizer = torch.optim.SGD(model[1].parameters(), lr=0.0)
    system = AutogradTrainingSystem(model, optimizer, loss_fn)
    x, y = torch.randn(5, 4), torch.randn(5, 3)
    everything = [*model.parameters(), *loss_fn.parameters()]
    expected = torch.autograd.grad(loss_fn(model(x), y), everything)
    for _ in range(3):
        system.train_step(x, y)
    assert_same([p.grad for p in everything], list(expected))


def test_a_group_added_later_is_clipped_and_forgotten_too():
    model, optimizer, twin, other = twins(mlp)
    for m, o in ((model, optimizer), (twin, other)):
        o.param_groups.clear()
        o.add_param_group({"params": list(m[4].parameters())})
    system = AutogradTrainingSystem(
        model, optimizer, nn.CrossEntropyLoss(), configured(training={"clip_norm": 1e-3})
    )
    for m, o in ((model, optimizer), (twin, other)):
        o.add_param_group({"params": list(m[0].parameters())})
    batches = batches_of((8,), 8)
    for batch in batches:
        system.train_step(*batch)
    plain_loop(twin, other, nn.CrossEntropyLoss(), batches, clip=1e-3)
    assert_same(model.state_dict(), twin.state_dict())


@pytest.mark.parametrize("device", DEVICES)
def test_batches_are_moved_to_the_device(device: str):
    model, optimizer, _, _ = twins(lambda: mlp().to(device))
    system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss())
    assert system.train_step(*batches_of((8,), 8)[0]).device.type == device
    assert system.evaluate(batches_of((8,), 8)).keys() == {"loss"}
    assert repr(system).startswith(f"AutogradTrainingSystem(Sequential on {device}")


# --- settings


def saved_bytes(system: AutogradTrainingSystem, batch: Any) -> int:
    """What the forward of a step saves for its backward, parameters left out."""
    seen: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in system.model.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen.setdefault(storage.data_ptr(), storage.nbytes())
        return tensor

    found = []
    loss_fn = system.loss_fn

    def watched(output: Tensor, targets: Tensor) -> Tensor:
        found.append(sum(seen.values()))
        return loss_fn(output, targets)

    with (
        mock.patch.object(system, "loss_fn", watched),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        system.train_step(*batch)
    return found[0]


class Blocks(nn.Module):
    def __init__(self, kind: type[nn.Module] = nn.Sequential) -> None:
        super().__init__()
        made = [nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 8)) for _ in range(4)]
        self.blocks = nn.Sequential(*made) if kind is nn.Sequential else nn.ModuleList(made)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


@pytest.mark.parametrize("kind", [nn.Sequential, nn.ModuleList])
def test_gradient_checkpointing_saves_less_and_changes_no_gradient(kind: type[nn.Module]):
    model, optimizer, twin, other = twins(lambda: Blocks(kind))
    plain = AutogradTrainingSystem(twin, other, nn.CrossEntropyLoss())
    config = configured(features={"gradient_checkpointing": True})
    system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss(), config)
    assert str(system.settings) == "fp32, 4 of 4 blocks recomputed"
    batch = batches_of((8,), 8)[0]
    assert saved_bytes(system, batch) < saved_bytes(plain, batch) / 4
    assert_same([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])
    assert_same(model.state_dict(), twin.state_dict())


def test_a_checkpoint_plan():
    model, optimizer, twin, other = twins(dropping)
    plain = AutogradTrainingSystem(twin, other, nn.CrossEntropyLoss())
    plan = {"checkpoint": {"": ["save", ["recompute", "recompute", "recompute"]]}}
    config = configured(performance=plan)
    system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss(), config)
    batch = batches_of((8,), 8)[0]
    torch.manual_seed(1)
    few = saved_bytes(system, batch)
    torch.manual_seed(1)
    assert few < saved_bytes(plain, batch)
    assert_same(model.state_dict(), twin.state_dict())


def test_gradient_checkpointing_needs_blocks():
    model = mlp()
    config = configured(features={"gradient_checkpointing": True})
    message = (
        "AutogradTrainingSystem: gradient_checkpointing runs each block of model.blocks under a "
        "checkpoint, and Sequential has none; name the modules to recompute in "
        "autograd_system.performance.checkpoint, or make them an nn.ModuleList named blocks"
    )
    with pytest.raises(ValueError, match=message):
        AutogradTrainingSystem(model, torch.optim.SGD(model.parameters()), nn.MSELoss(), config)


def test_channels_last():
    model, optimizer, twin, other = twins(cnn)
    config = configured(performance={"memory_format": "channels_last"})
    system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss(), config)
    batches = batches_of((1, 6, 6), 10)
    losses = [system.train_step(*batch) for batch in batches]
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    expected = plain_loop(twin, other, nn.CrossEntropyLoss(), batches)
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


def test_compile():
    model, optimizer, twin, other = twins(lambda: mlp(2), torch.optim.SGD)
    config = configured(performance={"compile": True})
    compiled = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        compiled.append(graph)  # what inductor would turn into C++, which takes half a minute
        return graph.forward

    with mock.patch("torch.compile", partial(torch.compile, backend=backend)):
        system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss(), config)
    batches = batches_of((8,), 8, number=3)
    losses = [system.train_step(*batch) for batch in batches]
    assert len(compiled) == 1
    assert list(model.state_dict()) == list(twin.state_dict())
    expected = plain_loop(twin, other, nn.CrossEntropyLoss(), batches)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(dict(model.state_dict()), dict(twin.state_dict()))


def test_without_gradients_there_is_evaluation_only():
    model, optimizer, _, _ = twins(mlp)
    batches = batches_of((8,), 8)
    config = configured(enable_gradients=False)
    system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss(), config)
    text = "the configuration says autograd_system.enable_gradients: false, which is for evaluation"
    with pytest.raises(RuntimeError, match=f"train_step: {text}"):
        system.train_step(*batches[0])
    with pytest.raises(RuntimeError, match=f"fit: {text}"):
        system.fit(batches, 1)
    assert system.monitor is None
    assert system.evaluate(batches)["loss"] > 0
    assert all(p.grad is None for p in model.parameters())


def test_monitoring_can_be_left_out_or_thinned():
    batches = batches_of((8,), 8)
    rows = {}
    for name, options in {"off": {"enabled": False}, "thin": {"every": 4, "history": 2}}.items():
        model, optimizer, _, _ = twins(mlp)
        config = configured(monitoring=options)
        system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss(), config)
        rows[name] = system.fit(batches, 2)
        if name == "thin":
            assert system.monitor.history["step"].tolist() == [5, 9]
        else:
            assert system.monitor is None
    assert "gradient_norm" not in rows["off"][0]
    assert [row["loss"] for row in rows["off"]] == [row["loss"] for row in rows["thin"]]


def test_derivatives_of_higher_order():
    torch.manual_seed(0)
    model = mlp(2).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(4, 8).double(), torch.randn(4, 8).double()
    loss_fn = nn.MSELoss()
    system = AutogradTrainingSystem(model, optimizer, loss_fn)
    parameters = dict(model.named_parameters())
    direction = {name: torch.randn_like(p) for name, p in parameters.items()}
    tower = system.compute_higher_order_gradients(x, y, order=2, direction=direction)
    values = list(parameters.values())
    grads = torch.autograd.grad(loss_fn(model(x), y), values, create_graph=True)
    products = torch.autograd.grad(grads, values, list(direction.values()))
    for found, expected in zip(tower[0].values(), grads, strict=True):
        torch.testing.assert_close(found, expected.detach())
    for found, expected in zip(tower[1].values(), products, strict=True):
        torch.testing.assert_close(found, expected)
    config = configured(features={"higher_order_gradients": False})
    system = AutogradTrainingSystem(model, optimizer, loss_fn, config)
    with pytest.raises(RuntimeError, match=r"advanced_features.higher_order_gradients: false; set"):
        system.compute_higher_order_gradients(x, y)


def test_what_does_not_fit_is_refused():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make = AutogradTrainingSystem
    with pytest.raises(TypeError, match=r"expected Module, got function"):
        make(mlp, optimizer, nn.MSELoss())
    with pytest.raises(TypeError, match=r"expected Optimizer, got generator"):
        make(model, model.parameters(), nn.MSELoss())
    with pytest.raises(TypeError, match="expected AutogradConfig, got dict; load_config makes"):
        make(model, optimizer, nn.MSELoss(), {})
    with pytest.raises(TypeError, match=r"System: expected Callable, got AutogradConfig"):
        make(model, optimizer, configured())
    with pytest.raises(
        ValueError, match=r"a loss that is a mean, got reduction='sum'; micro-batch"
    ):
        make(model, optimizer, nn.MSELoss(reduction="sum"))
    for other in (mlp(), nn.Tanh()):
        with pytest.raises(ValueError, match="the optimizer holds no parameter of the model; make"):
            make(other, optimizer, nn.MSELoss())
    system = make(model, optimizer, nn.MSELoss(reduction="mean"))
    system.loss_fn = nn.L1Loss(reduction="none")
    with pytest.raises(ValueError, match=r"loss_fn to return a scalar, got shape \(2, 8\); return"):
        system.train_step(torch.ones(2, 8), torch.ones(2, 8))


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a device: reading a number, or a tensor to the host."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default):
            self.names.append(str(func))
        return func(*args, **(kwargs or {}))

    @contextlib.contextmanager
    def counting(self) -> Any:
        with contextlib.ExitStack() as stack:
            for name in ("tolist", "numpy", "cpu"):
                method = getattr(Tensor, name)

                def counted(tensor: Tensor, *args: Any, _method: Any = method, **kw: Any) -> Any:
                    self.names.append(_method.__name__)
                    return _method(tensor, *args, **kw)

                stack.enter_context(mock.patch.object(Tensor, name, counted))
            yield stack.enter_context(self)


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"training": {"clip_norm": 1.0}}, 1),
        ({"training": {"clip_norm": 1.0}, "performance": {"micro_batch": 2}}, 1),
        ({"training": {"clip_norm": 1.0}, "performance": {"precision": "bf16"}}, 1),
        ({"training": {"clip_norm": 1.0, "max_nonfinite": 0}}, 0),
    ],
)
def test_a_step_waits_for_the_device_once(sections: dict[str, Any], expected: int):
    model, optimizer, _, _ = twins(mlp, torch.optim.SGD, momentum=0.9)
    scheduler = lr_scheduler.StepLR(optimizer, 2)
    config = configured(**sections)
    system = AutogradTrainingSystem(model, optimizer, nn.MSELoss(), config, scheduler=scheduler)
    batch = torch.randn(5, 8), torch.randn(5, 8)
    for _ in range(3):
        system.train_step(*batch)
        reads = HostReads()
        with reads.counting():
            system.train_step(*batch)
        assert reads.names == ["aten._local_scalar_dense.default"] * expected
    assert system.monitor.history["step"].tolist() == [1, 2, 3, 4, 5, 6]


# --- steps that are not finite


def poisoned(batches: list[Any], *places: int) -> list[Any]:
    found = [(x.clone(), y) for x, y in batches]
    for place in places:
        found[place][0][0, 0] = NAN
    return found


def test_a_batch_with_a_nan_changes_nothing_and_is_named():
    model, optimizer, _, _ = twins(
        lambda: nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5))
    )
    scheduler = lr_scheduler.StepLR(optimizer, 1, 0.5)
    loss_fn = nn.CrossEntropyLoss()
    system = AutogradTrainingSystem(model, optimizer, loss_fn, scheduler=scheduler)
    first, second = poisoned(batches_of((8,), 8, number=2), 1)
    system.train_step(*first)
    before = everything(system)
    message = r"^train_step: step 2 is skipped: NaN in input 'input', module '0'$"
    with pytest.warns(UserWarning, match=message):
        loss = system.train_step(*second)
    assert loss.isnan()
    after = everything(system)
    assert all(grad is None for grad in after.pop("gradients"))
    assert after.pop("progress")[0] == 2
    after.pop("monitor")  # it has the step, as skipped: below
    for key, value in after.items():
        assert_same(value, before[key], key)
    (report,) = system.reports
    assert (report.phase, report.kind, report.name) == ("input", "nan", "input")
    assert "1 skipped" in repr(system)
    history = system.monitor.history
    assert history["step"].tolist() == [1, 2]
    assert history["skipped"].tolist() == [False, True]
    assert np.isnan(history["total_norm"]).tolist() == [False, True]


class Pole(nn.Module):
    """A loss whose value is finite where the gradient of its parameter is not."""

    def __init__(self) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.ones(()))

    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return (output - targets).square().mean() + (self.offset * targets.max()).sqrt()


def test_a_nan_in_the_gradient_of_the_loss_alone():
    model, loss_fn = mlp(), Pole()
    optimizer = torch.optim.SGD([*model.parameters(), *loss_fn.parameters()], lr=0.1)
    system = AutogradTrainingSystem(model, optimizer, loss_fn)
    before = everything(system)
    with pytest.warns(UserWarning, match="step 1 is skipped: "):
        assert system.train_step(torch.ones(3, 8), torch.zeros(3, 8)).isfinite()
    assert_same(everything(system)["loss"], before["loss"])
    assert_same(everything(system)["model"], before["model"])
    system.train_step(torch.ones(3, 8), torch.ones(3, 8))
    assert loss_fn.offset.isfinite()
    assert loss_fn.offset != 1


@pytest.mark.parametrize("most", [1, 2, 3])
def test_training_stops_after_so_many_in_a_row(most: int):
    model, optimizer, _, _ = twins(mlp)
    config = configured(training={"max_nonfinite": most})
    system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss(), config)
    places = [*range(most - 1), *range(most, 2 * most - 1), *range(2 * most, 3 * most)]
    batches = poisoned(batches_of((8,), 8, number=3 * most), *places)
    before = copy.deepcopy(model.state_dict())
    message = rf"^train_step: {most} steps in a row were not finite, as many as training.max_nonf"

    def train() -> None:
        for batch in batches:
            system.train_step(*batch)

    with (
        pytest.warns(UserWarning, match=r"step \d+ is skipped: NaN") as warned,
        pytest.raises(FloatingPointError, match=message) as raised,
    ):
        train()
    assert system.step == 3 * most
    assert warned[0].filename == __file__  # it points at the user's own line
    assert "NaN in input 'input'" in str(raised.value)
    assert len(system.reports) == len(places) == 3 * most - 2
    _, _, twin, other = twins(mlp)
    plain_loop(
        twin, other, nn.CrossEntropyLoss(), [b for i, b in enumerate(batches) if i not in places]
    )
    assert_same(model.state_dict(), twin.state_dict())
    assert not all(
        torch.equal(*pair)
        for pair in zip(model.state_dict().values(), before.values(), strict=True)
    )


def test_without_a_guard_nothing_is_skipped():
    model, optimizer, twin, other = twins(mlp)
    config = configured(training={"max_nonfinite": 0})
    system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss(), config)
    batches = poisoned(batches_of((8,), 8, number=2), 1)
    for batch in batches:
        system.train_step(*batch)
    plain_loop(twin, other, nn.CrossEntropyLoss(), batches)
    assert_same(model.state_dict(), twin.state_dict())
    assert model[0].weight.isnan().all()
    assert (system.guard, system.reports) == (None, [])


def test_a_loss_of_inf_is_left_out_of_the_mean_of_the_epoch():
    model, optimizer, _, _ = twins(mlp)
    batches = batches_of((8,), 8, number=3)
    losses = []

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        broken = targets is batches[1][1]
        losses.append(F.cross_entropy(output, targets) * (math.inf if broken else 1))
        return losses[-1]

    system = AutogradTrainingSystem(model, optimizer, loss_fn)
    with pytest.warns(UserWarning, match="step 2 is skipped"):
        (row,) = system.fit(batches, 1)
    expected = torch.stack([losses[0], losses[-1]]).mean().item()
    assert row["loss"] == pytest.approx(expected, rel=1e-6)


# --- epochs


def test_rows_of_epochs():
    model, optimizer, twin, other = twins(dropping)
    scheduler = lr_scheduler.StepLR(optimizer, 4, 0.5)
    config = configured(training={"clip_norm": 0.3})
    train, test = batches_of((8,), 8), batches_of((8,), 8, number=2)

    def accuracy(output: Tensor, targets: Tensor) -> Tensor:
        return (output.argmax(1) == targets).float().mean()

    system = AutogradTrainingSystem(
        *(model, optimizer, nn.CrossEntropyLoss(), config),
        scheduler=scheduler,
        metrics={"accuracy": accuracy},
    )
    seen = []
    torch.manual_seed(1)
    rows = system.fit(train, 3, test, on_epoch=lambda row: seen.append(dict(row)))
    torch.manual_seed(1)
    other_scheduler = lr_scheduler.StepLR(other, 4, 0.5)
    for number, row in enumerate(rows, 1):
        losses = plain_loop(
            *(twin.train(), other, nn.CrossEntropyLoss(), train),
            clip=0.3,
            scheduler=other_scheduler,
        )
        assert list(row) == [
            *("epoch", "step", "loss", "learning_rate", "gradient_norm"),
            *("validation_loss", "validation_accuracy", "seconds"),
        ]
        assert (row["epoch"], row["step"]) == (number, 6 * number)
        assert row["loss"] == pytest.approx(torch.stack(losses).double().mean().item(), rel=1e-6)
        assert row["learning_rate"] == other.param_groups[0]["lr"]
        assert row["gradient_norm"] == pytest.approx(0.3, rel=1e-4)  # most are clipped
        with torch.no_grad():
            outputs = [twin.eval()(x) for x, _ in test]
        output, targets = torch.cat(outputs), torch.cat([y for _, y in test])
        expected = F.cross_entropy(output, targets).item()
        assert row["validation_loss"] == pytest.approx(expected, rel=1e-6)
        expected = (output.argmax(1) == targets).double().mean().item()
        assert row["validation_accuracy"] == pytest.approx(expected, rel=1e-6)
        assert all(type(value) in (int, float) for value in row.values())
    assert seen == rows == system.history
    assert (system.epoch, system.step) == (3, 18)
    assert system.fit(train, 3) == seen  # there is nothing left to do
    assert len(system.fit(train, 4)) == 4


def test_averages_are_over_what_counts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
    model[1].eval()  # one module is kept in another mode, as a frozen BatchNorm is
    loss_fn = nn.CrossEntropyLoss(ignore_index=0)
    system = AutogradTrainingSystem(model, torch.optim.SGD(model.parameters()), loss_fn)
    inputs, targets = torch.randn(11, 4), torch.randint(3, (11,))
    targets[:4] = 0  # the first batch counts nothing
    batches = [(x, y) for x, y in zip(inputs.split(4), targets.split(4), strict=True)]
    before = everything(system)
    found = system.evaluate(batches)
    assert_same(everything(system), before)
    assert not model[1].training
    assert model[2].training
    with torch.no_grad():
        expected = loss_fn(copy.deepcopy(model).eval()(inputs), targets).item()
    assert found == {"loss": pytest.approx(expected, rel=1e-6)}

    def failing(*_: Tensor) -> Tensor:
        raise ArithmeticError("no metric")

    system.metrics["failing"] = failing
    with pytest.raises(ArithmeticError, match="no metric"):
        system.evaluate(batches)
    assert_same(everything(system), before)


def test_metrics_and_losses_of_other_types():
    model = mlp(1).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metrics = {"number": lambda *_: 2.5, "whole": lambda output, _: torch.tensor(len(output))}
    system = AutogradTrainingSystem(model, optimizer, nn.MSELoss(), metrics=metrics)
    batches = [(torch.ones(n, 8).double(), torch.ones(n, 8).double()) for n in (1, 3)]
    found = system.evaluate(batches)
    assert found["number"] == 2.5
    assert found["whole"] == (1 * 1 + 3 * 3) / 4


def test_loaders_without_batches_and_with_wrong_ones():
    model, optimizer, _, _ = twins(mlp)
    system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss())
    good = batches_of((8,), 8)
    with pytest.raises(
        ValueError, match=r"^the loader of rank 0 gives no batch; expected one that can"
    ):
        system.fit([], 1)
    with pytest.raises(ValueError, match=r"^the validation loader of rank 0 gives no batch"):
        system.evaluate(iter(()))
    ignored = [(x, torch.full_like(y, -100)) for x, y in good]
    with pytest.raises(ValueError, match=r"^evaluate: .* every label is -100 \(ignored\)"):
        system.evaluate(ignored)
    with pytest.raises(ValueError, match=r"^train_step: .* every label is -100 \(ignored\)"):
        system.train_step(*ignored[0])
    with pytest.raises(ValueError, match=r"^train_step: the batch is empty, .* \[\(0, 8\), \(0,\)"):
        system.train_step(*(each[:0] for each in good[0]))
    for nothing in (None, {}):
        with pytest.raises(ValueError, match=f"^train_step: expected inputs .*, got {nothing}$"):
            system.train_step(nothing)
    with pytest.raises(ValueError, match=r"^train_step: expected a batch to be .*got dict of 0;"):
        system.fit([{}], 1)
    with pytest.raises(TypeError, match=r"^fit: expected an integer for epochs, got 1\.5$"):
        system.fit(good, 1.5)
    for wrong in (2, None):
        came = type(wrong).__name__
        with pytest.raises(TypeError, match=f"^fit: expected a loader, .* got {came}$"):
            system.fit(wrong, good)
        with pytest.raises(TypeError, match=f"^evaluate: expected a loader, .* got {came}$"):
            system.evaluate(wrong)
    with pytest.raises(TypeError, match=r"^fit: expected a loader, .* got int$"):
        system.fit(good, 1, 2)
    with pytest.raises(ValueError, match=r"^train_step: expected a batch to be .*got Tensor"):
        system.fit([torch.ones(2, 8)], 1)
    with pytest.raises(ValueError, match=r"a pair \(inputs, targets\), got tuple of 3; set"):
        system.evaluate([(*good[0], 1)])
    assert (system.step, system.epoch, system.history) == (0, 0, [])
    spent = iter(good)
    assert len(system.fit(spent, 1)) == 1
    with pytest.raises(ValueError, match="the loader of rank 0 gives no batch"):
        system.fit(spent, 2)
    assert system.epoch == 1


class Told:
    """Validation losses as they are told, in place of a loader."""

    def __init__(self, system: AutogradTrainingSystem, losses: list[float]) -> None:
        self.losses = iter(losses)
        system.evaluate = lambda _: {"loss": next(self.losses)}


def test_the_best_checkpoint(tmp_path: Path):
    model, optimizer, _, _ = twins(mlp)
    config = configured(training={"directory": str(tmp_path / "run" / "a")})
    system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss(), config)
    batches = batches_of((8,), 8)
    Told(system, [NAN, 3.0, 2.0, 2.0, 2.5])
    models = []
    rows = system.fit(
        *(batches, 5, batches),
        on_epoch=lambda row: models.append(copy.deepcopy(dict(model.state_dict()))),
    )
    assert [row["validation_loss"] for row in rows[2:]] == [2.0, 2.0, 2.5]
    files = sorted(path.name for path in system.directory.iterdir())
    assert files == ["best.pt", "gradients.csv", "last.pt"]
    for name, epoch in {"best.pt": 3, "last.pt": 5}.items():
        twin, other, _, _ = twins(mlp)
        again = AutogradTrainingSystem(twin, other, nn.CrossEntropyLoss())
        again.load(system.directory / name)
        assert again.epoch == epoch
        assert_same(dict(twin.state_dict()), models[epoch - 1])
    lines = (system.directory / "gradients.csv").read_text().splitlines()
    assert len(lines) == 1 + 30 * len(list(model.parameters()))


def test_no_history_of_gradients_where_none_is_wanted(tmp_path: Path):
    for name, options in {"a": {"save_gradient_history": False}, "b": {"enabled": False}}.items():
        model, optimizer, _, _ = twins(mlp)
        config = configured(monitoring=options, training={"directory": str(tmp_path / name)})
        system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss(), config)
        system.fit(batches_of((8,), 8), 1)
        assert [path.name for path in (tmp_path / name).iterdir()] == ["last.pt"]


# --- interruptions


class Augmented(Dataset):
    """Samples that draw from all global generators; `trap` is called at each."""

    def __init__(self, trap: Callable[[int], None]) -> None:
        generator = torch.Generator().manual_seed(7)
        self.inputs = torch.randn(23, 8, generator=generator)
        self.targets = torch.randint(8, (23,), generator=generator)
        self.trap, self.calls = trap, 0

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.calls += 1
        self.trap(self.calls)
        noise = 0.1 * torch.randn(8) + 0.1 * random.random() + 0.1 * np.random.rand()
        return self.inputs[index] + noise.float(), self.targets[index]


LOADERS: dict[str, dict[str, Any]] = {
    "shuffled": {"shuffle": True},
    "own generator": {"shuffle": True, "generator": True},
    "workers": {"shuffle": True, "num_workers": 2},
    "drawn with replacement": {"sampler": True},
}
TRAPS = {"exception": 0, "Ctrl-C": signal.SIGINT, "SIGTERM": signal.SIGTERM}


def seeded(number: int) -> None:
    torch.manual_seed(number)
    random.seed(number)
    np.random.seed(number)


class Trapped(nn.Module):
    """Calls `trap` in each forward of training."""

    def __init__(self, trap: Callable[[int], None]) -> None:
        super().__init__()
        self.inner = nn.Sequential(
            *[nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.3), nn.Tanh(), nn.Linear(16, 8)]
        )
        self.trap, self.calls = trap, 0

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.trap(self.calls)
        return self.inner(x)


def nothing(calls: int) -> None:
    pass


def run_of(
    loader: dict[str, Any],
    directory: Path | None,
    *,
    data_trap: Callable[[int], None] = nothing,
    model_trap: Callable[[int], None] = nothing,
    **training: Any,
) -> tuple[AutogradTrainingSystem, Any, Any]:
    """A system with dropout, fp16, schedule and clipping; its loader, and validation data."""
    seeded(0)
    model = Trapped(model_trap)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = lr_scheduler.SequentialLR(
        optimizer,
        [
            lr_scheduler.LinearLR(optimizer, 0.1, total_iters=3),
            lr_scheduler.CosineAnnealingLR(optimizer, 20),
        ],
        milestones=[3],
    )
    config = configured(
        performance={"precision": "fp16", "micro_batch": 3},
        training={"clip_norm": 0.4, "directory": directory and str(directory), **training},
    )
    options = dict(loader)
    data = Augmented(data_trap)
    if options.get("generator"):
        options["generator"] = torch.Generator().manual_seed(11)
    if options.get("sampler"):
        options["sampler"] = torch.utils.data.WeightedRandomSampler(torch.ones(23), 23)
    loss_fn = nn.CrossEntropyLoss()
    system = AutogradTrainingSystem(model, optimizer, loss_fn, config, scheduler=scheduler)
    return system, DataLoader(data, batch_size=5, **options), batches_of((8,), 8, number=2)


def final(system: AutogradTrainingSystem) -> dict[str, Any]:
    state = everything(system)
    rows = [{k: v for k, v in row.items() if k != "seconds"} for row in system.history]
    state["progress"] = (system.step, system.epoch, rows)
    return state


def at(place: int, kind: str) -> Callable[[int], None]:
    """A trap that goes off at one call."""

    def trap(calls: int) -> None:
        if calls == place:
            if not TRAPS[kind]:
                raise ArithmeticError("trapped")
            os.kill(os.getpid(), TRAPS[kind])

    return trap


def interrupted(run: Callable[[], object], kind: str) -> BaseException:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    expected = {"exception": ArithmeticError, "Ctrl-C": KeyboardInterrupt, "SIGTERM": SystemExit}
    with pytest.raises(expected[kind]) as raised:
        run()
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    return raised.value


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
@pytest.mark.parametrize("kind", TRAPS)
@pytest.mark.parametrize("name", LOADERS)
def test_what_was_interrupted_goes_on_as_if_it_had_not_been(tmp_path: Path, name: str, kind: str):
    system, loader, validation = run_of(LOADERS[name], None)
    system.fit(loader, 3, validation)
    expected = final(system)
    # In the eighth of 15 steps, in the middle of the second epoch.
    traps = {"data_trap": at(37, kind)} if name != "workers" else {"model_trap": at(15, kind)}
    every = 1 if kind == "exception" else 0
    system, loader, validation = run_of(LOADERS[name], tmp_path, save_every=every, **traps)
    error = interrupted(lambda: system.fit(loader, 3, validation), kind)
    assert system.step == 7 if kind == "exception" else system.step in (7, 8)
    assert (system.epoch, len(system.history)) == (1, 1)
    if kind == "Ctrl-C":
        assert f"; load {tmp_path / 'last.pt'} to go on" in str(error)
    if kind == "SIGTERM":
        assert error.code == 128 + 15
    system, loader, validation = run_of(LOADERS[name], tmp_path)
    system.load(tmp_path / "last.pt")
    rows = system.fit(loader, 3, validation)
    assert len(rows) == 3
    assert_same(final(system), expected)
    # The finished run, taken up once more, has all that it had.
    again, _, _ = run_of(LOADERS[name], None)
    again.load(tmp_path / "last.pt")
    assert_same(everything(again)["progress"], everything(system)["progress"])
    assert_same(everything(again)["monitor"], expected["monitor"])


class Wrapper:
    """A loader around another one, which draws nothing itself."""

    def __init__(self, inner: DataLoader) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[Any]:
        return iter(self.inner)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
@pytest.mark.parametrize("wrap", [lambda loader: loader, Wrapper], ids=["plain", "wrapped"])
@pytest.mark.parametrize("name", [*LOADERS, "generator of the sampler", "generator of the data"])
def test_what_ended_with_an_epoch_goes_on_as_if_it_had_not(
    tmp_path: Path, name: str, wrap: Callable[[DataLoader], Any]
):
    def run(directory: Path | None) -> tuple[AutogradTrainingSystem, Any]:
        options = dict(LOADERS.get(name, {}))
        own = torch.Generator().manual_seed(11)
        if name == "generator of the sampler":
            options["sampler"] = True
        system, loader, _ = run_of(options, directory)
        if name == "generator of the sampler":
            loader.sampler.generator = own
        if name == "generator of the data":
            data: Any = loader.dataset
            data.generator = own
            data.trap = lambda _: data.inputs.copy_(torch.randn(23, 8, generator=own))
        return system, wrap(loader)

    system, loader = run(None)
    system.fit(loader, 3)
    expected = final(system)
    system, loader = run(tmp_path)
    system.fit(loader, 2)
    for epochs in (2, 3):  # the first of them does nothing, and keeps the states
        system, loader = run(tmp_path)
        system.load(tmp_path / "last.pt")
        system.fit(loader, epochs)
        system.save(tmp_path / "last.pt")
    assert_same(final(system), expected)


def test_another_loader_after_an_epoch_is_taken_with_a_warning(tmp_path: Path):
    system, loader, _ = run_of(LOADERS["own generator"], tmp_path)
    system.fit(loader, 1)
    system, loader, _ = run_of(LOADERS["shuffled"], tmp_path)
    system.load(tmp_path / "last.pt")
    with pytest.warns(UserWarning, match=r"expected a loader with 1 generators .* got 0") as found:
        system.fit(loader, 2)
    assert found[0].filename == __file__
    system.fit(loader, 3)  # says nothing more


def test_interrupted_in_the_last_step_of_an_epoch_or_in_validation(tmp_path: Path):
    system, loader, validation = run_of({"shuffle": True}, None)
    system.fit(loader, 2, validation)
    expected = final(system)
    for place in ("last step", "validation", "on_epoch"):
        directory = tmp_path / place
        trap = at(23, "Ctrl-C") if place == "last step" else nothing
        system, loader, validation = run_of({"shuffle": True}, directory, data_trap=trap)
        told: list[int] = []

        def interrupt(*_: Any) -> Tensor:
            os.kill(os.getpid(), signal.SIGINT)
            return torch.zeros(())

        if place == "validation":
            system.metrics["interrupt"] = interrupt

        def on_epoch(row: dict[str, float], told: Any = told, place: str = place) -> None:
            told.append(row["epoch"])
            if place == "on_epoch":
                interrupt()

        # Each epoch has two batches of validation; a second Ctrl-C would interrupt at once.
        last = validation[:1]
        interrupted(partial(system.fit, loader, 2, last, on_epoch=on_epoch), "Ctrl-C")
        assert told == ([] if place == "last step" else [1])
        again, loader, validation = run_of({"shuffle": True}, directory)
        again.load(directory / "last.pt")
        assert again.epoch == len(told)
        again.fit(loader, 2, validation)
        assert again.step == 10
        found = final(again)
        if place == "last step":
            assert_same(found, expected)
        assert_same(found["model"], expected["model"])


def test_a_second_interrupt_does_not_wait():
    system, loader, validation = run_of({"shuffle": True}, None)
    reached = []

    def twice(*_: Any) -> Tensor:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        reached.append(1)
        return torch.zeros(())

    system.metrics["twice"] = twice
    interrupted(lambda: system.fit(loader, 1, validation), "Ctrl-C")
    assert not reached


def test_without_a_directory_an_interrupt_says_so():
    system, loader, _ = run_of({}, None, data_trap=at(8, "Ctrl-C"))
    error = interrupted(lambda: system.fit(loader, 1), "Ctrl-C")
    assert str(error) == "fit: interrupted after step 2"
    assert len(system.fit(loader, 1)) == 1  # the same system goes on with the third batch
    assert system.step == 5


def test_outside_of_the_main_thread():
    system, loader, _ = run_of({}, None)
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    thread = threading.Thread(target=system.fit, args=(loader, 1))
    thread.start()
    thread.join()
    assert system.epoch == 1
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_another_loader_than_the_one_that_was_interrupted():
    system, loader, _ = run_of({}, None, data_trap=at(18, "Ctrl-C"))
    interrupted(lambda: system.fit(loader, 1), "Ctrl-C")
    assert system.step == 4
    message = "expected a loader of more than 4 batches, as the interrupted epoch had, got 2; give"
    with pytest.raises(ValueError, match=message):
        system.fit(batches_of((8,), 8, number=2), 1)
    _, own, _ = run_of(LOADERS["own generator"], None)
    message = "expected a loader with 0 generators of its own, as in the interrupted run, got 1"
    with pytest.raises(ValueError, match=message):
        system.fit(own, 1)
    assert len(system.fit(loader, 1)) == 1


@pytest.mark.parametrize("part", ["loss_fn", "model", "dataset"])
def test_after_an_error_in_the_middle_of_a_step_training_goes_on(tmp_path: Path, part: str):
    place = {"dataset": 2, "model": 3, "loss_fn": 3}[part]  # the first batch already
    data_trap = at(place, "exception") if part == "dataset" else nothing
    model_trap = at(place, "exception") if part == "model" else nothing
    system, loader, validation = run_of({}, tmp_path, data_trap=data_trap, model_trap=model_trap)
    loss_fn = system.loss_fn
    calls = itertools.count(1)

    def broken(*args: Tensor) -> Tensor:
        at(place, "exception")(next(calls))
        return loss_fn(*args)

    if part == "loss_fn":
        system.loss_fn = broken
    before = [len(hooks_of(thing)) for thing in (system.model, system.optimizer)]
    error = interrupted(lambda: system.fit(loader, 2, validation), "exception")
    assert str(error) == "trapped"
    after = [len(hooks_of(thing)) for thing in (system.model, system.optimizer)]
    assert after == before == [0, 2]  # those of the monitor
    assert torch.is_grad_enabled()
    assert not torch.is_autocast_enabled("cpu")
    rows = system.fit(loader, 2, validation)
    assert [row["step"] - rows[0]["step"] for row in rows] == [0, 5]
    assert system.model.training


def hooks_of(thing: nn.Module | torch.optim.Optimizer) -> list[Any]:
    if isinstance(thing, torch.optim.Optimizer):
        return [*thing._optimizer_step_pre_hooks, *thing._optimizer_step_post_hooks]
    found: list[Any] = []
    for module in thing.modules():
        for name, value in vars(module).items():
            if name.endswith("_hooks") and value:
                found += value
    for parameter in thing.parameters():
        found += [
            *(parameter._backward_hooks or ()),
            *(parameter._post_accumulate_grad_hooks or ()),
        ]
    return found


def test_the_system_leaves_no_hook_and_holds_nothing():
    model, optimizer, _, _ = twins(mlp)
    config = configured(performance={"precision": "fp16"}, training={"clip_norm": 1.0})
    gc.collect()
    system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss(), config)
    system.fit(batches_of((8,), 8), 1, batches_of((8,), 8))
    assert len(hooks_of(optimizer)) == 2
    scaler = system.scaler
    references = [weakref.ref(system), weakref.ref(system.monitor)]
    gc.disable()
    try:
        del system
        assert [reference() for reference in references] == [None, None]  # there is no cycle
    finally:
        gc.enable()
    assert hooks_of(optimizer) == hooks_of(model) == []
    assert "step" not in vars(scaler)
    reference = weakref.ref(model)
    del model, optimizer, _
    gc.collect()
    assert reference() is None


# --- files


def test_who_is_killed_while_writing_loses_no_earlier_checkpoint(tmp_path: Path):
    path = tmp_path / "last.pt"
    system, loader, _ = run_of({}, None)
    system.fit(loader, 1)
    system.save(path)
    before = path.read_bytes()
    program = f"""
import io, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import torch
from autograd_lib.training import saving as _saving

state = _saving.read(Path({str(path)!r}))
del state["format"]
save = torch.save

def slowly(state, target):
    whole = io.BytesIO()
    save(state, whole)
    half = whole.getvalue()[: len(whole.getvalue()) // 2]
    with open(target, "wb", closefd=True) if isinstance(target, Path) else target as file:
        file.write(half)
        file.flush()
        print("written", flush=True)
        time.sleep(600)

torch.save = slowly
_saving.write(state, Path({str(path)!r}))
"""
    child = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "written\n"
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
    assert path.read_bytes() == before
    (half,) = (other for other in tmp_path.iterdir() if other != path)
    assert 0 < half.stat().st_size < len(before)
    again, _, _ = run_of({}, None)
    again.load(path)
    assert_same(everything(again), everything(system) | {"gradients": [None] * 6})
    with pytest.raises(
        ValueError, match=r"is not a whole file that save\(\) wrote: File is not a zip"
    ):
        again.load(half)
    again.save(path)  # what the killed one left is no obstacle
    assert list(tmp_path.iterdir()) == [path]


def test_a_failed_write_leaves_nothing_behind(tmp_path: Path):
    system, _, _ = run_of({}, None)
    path = tmp_path / "a.pt"
    system.save(path)
    before = path.read_bytes()

    def full(state: Any, file: Any) -> None:
        file.write(b"half")
        raise OSError(28, "No space left on device")

    with mock.patch("torch.save", full), pytest.raises(OSError, match="No space left"):
        system.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="missing"):
        system.save(tmp_path / "missing" / "a.pt")
    assert list(tmp_path.iterdir()) == [path]


class Marker:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_what_is_no_checkpoint_is_refused_and_changes_nothing(tmp_path: Path):
    system, loader, _ = run_of({}, None)
    system.fit(loader, 1)
    good = tmp_path / "good.pt"
    system.save(good)
    data = good.read_bytes()
    flipped = bytearray(data)
    with zipfile.ZipFile(good) as archive:
        largest = max(archive.infolist(), key=lambda info: info.file_size)
    flipped[largest.header_offset + 200 + largest.file_size // 2] ^= 4
    state = _saving.read(good)
    marker = tmp_path / "executed"

    def saved(value: Any) -> bytes:
        file = io.BytesIO()
        torch.save(value, file)
        return file.getvalue()

    foreign = io.BytesIO()
    with zipfile.ZipFile(foreign, "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps({"format": state["format"]}))
        archive.writestr("letter.txt", "Dear reader")
    whole = "is not a whole file that save\\(\\) wrote: "
    only_part = f"{whole}File is not a zip file"
    not_ours = f"{whole}(Weights only load failed|Expected hasRecord)"
    cases = {
        "truncated": (data[: len(data) // 2], only_part),
        "without its end": (data[:-1], only_part),
        "flipped bit": (bytes(flipped), f"{whole}its entry '.*' is damaged"),
        "empty": (b"", only_part),
        "text": (b"Dear reader\n", only_part),
        "plain pickle": (pickle.dumps({"model": 1}), only_part),
        "foreign zip": (foreign.getvalue(), not_ours),
        "code": (saved({**state, "more": Marker(marker)}), not_ours),
        "a state_dict": (
            saved(system.model.state_dict()),
            f"{whole}expected .*, got None; weights alone go into the model by",
        ),
        "a tensor": (saved(torch.ones(3)), f"{whole}.*got 'Tensor'; weights alone"),
        "another version": (
            saved({**state, "format": "autograd_lib 7"}),
            f"{whole}.*got 'autograd_lib 7'",
        ),
    }
    before = everything(system)
    for name, (content, message) in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"^load: {path} {message}"):
            system.load(path)
        assert_same(everything(system), before, name)
    with pytest.raises(IsADirectoryError):
        system.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        system.load(tmp_path / "nothing")
    assert_same(everything(system), before)
    assert not marker.exists()
    torch.load(tmp_path / "code", weights_only=False)
    assert marker.exists()  # it would have been executed


def test_flipped_bits_anywhere_are_refused_or_harmless(tmp_path: Path):
    system, loader, _ = run_of({}, None)
    system.fit(loader, 1)
    path = tmp_path / "a.pt"
    system.save(path)
    data = path.read_bytes()
    before = everything(system)
    system.load(path)
    before["gradients"] = [None] * len(before["gradients"])
    assert_same(everything(system), before)
    chance = random.Random(0)
    with zipfile.ZipFile(path) as archive:
        headers = [info.header_offset + i for info in archive.infolist()[:3] for i in range(30)]
    ends = range(len(data) - 400, len(data))
    attribute = data.rfind(b"PK\x01\x02") + 38
    assert data[attribute] == 0
    path.write_bytes(data[:attribute] + b"\x10" + data[attribute + 1 :])  # a directory
    with pytest.raises(ValueError, match=r"its entry 'archive/.*' is damaged"):
        system.load(path)
    places = [*headers, *chance.sample(ends, 80), *chance.sample(range(len(data)), 80)]
    refused = 0
    for place in places:
        changed = bytearray(data)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(changed)
        message = None
        try:
            system.load(path)
        except ValueError as error:
            message = str(error)
        if message is not None:
            refused += 1
            assert message.startswith("load: ")
        assert_same(everything(system), before, f"byte {place}")
    assert refused > len(places) / 4


def other_system(
    model: nn.Module,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
    scheduler: Callable[..., Any] | None = None,
    loss_fn: nn.Module | None = None,
) -> AutogradTrainingSystem:
    made = optimizer(model.parameters())
    return AutogradTrainingSystem(
        model, made, loss_fn or nn.CrossEntropyLoss(), scheduler=scheduler and scheduler(made)
    )


def chained(*kinds: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda optimizer: lr_scheduler.SequentialLR(
        optimizer, [kind(optimizer) for kind in kinds], list(range(1, len(kinds)))
    )


def linear(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.LinearLR(optimizer)


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.CosineAnnealingLR(optimizer, 10)


def reversed_groups(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(list(parameters)[::-1])


def two_groups(parameters: Iterable[Tensor]) -> torch.optim.Optimizer:
    first, *others = parameters
    return torch.optim.AdamW([{"params": [first]}, {"params": others}])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"model": nn.Sequential(nn.Linear(8, 9))},
            r"model 0.weight to be \(9, 8\), got \(8, 8\), and 11 more",
        ),
        ({"model": mlp(4)}, r"model 6.weight to be \(8, 8\), got None, and 3 more"),
        ({"optimizer": torch.optim.Adam}, "expected optimizer to be Adam, got AdamW; nothing"),
        (
            {"optimizer": two_groups},
            r"parameter 0 in group 1 of the optimizer to be \(8,\), got None, and 9 more",
        ),
        (
            {"optimizer": reversed_groups},
            r"parameter 0 in group 0 of the optimizer to be \(8,\), got \(8, 8\)",
        ),
        ({"scheduler": None}, r"to be NoneType, got SequentialLR\(LinearLR, CosineAnnealingLR\)"),
        ({"scheduler": linear}, r"to be LinearLR, got SequentialLR\(LinearLR, CosineAnnealingLR\)"),
        ({"scheduler": chained(linear, linear)}, r"SequentialLR\(LinearLR, LinearLR\)"),
        ({"scheduler": chained(linear)}, r"SequentialLR\(LinearLR\)"),
        ({"loss_fn": CustomLossFunction()}, r"loss (start|log_ratio) to be \(.*\), got None"),
    ],
)
def test_a_checkpoint_of_something_else(tmp_path: Path, options: dict[str, Any], message: str):
    path = tmp_path / "a.pt"
    system = other_system(mlp(), scheduler=chained(linear, cosine))
    for batch in batches_of((8,), 8):
        system.train_step(*batch)
    system.save(path)
    other = other_system(**{"model": mlp(), "scheduler": chained(linear, cosine), **options})
    if "loss_fn" not in options and other.model[0].out_features == 8:
        other.train_step(*batches_of((8,), 8)[0])
    before = everything(other)
    with pytest.raises(
        ValueError, match=f"^load: the checkpoint is of another system: .*{message}"
    ):
        other.load(path)
    assert_same(everything(other), before)


def test_a_state_of_a_loss_is_not_dropped(tmp_path: Path):
    system = other_system(mlp(), loss_fn=CustomLossFunction())
    system.save(tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"loss \w+ to be None, got \("):
        other_system(mlp()).load(tmp_path / "a.pt")


@pytest.mark.parametrize(
    ("poison", "where"),
    [
        (
            lambda o: o.param_groups[0].update(lr=np.float64(0.1)),
            r"got numpy.*scalar",
        ),
        (lambda o: o.param_groups[0].update(note=Fraction(1, 2)), r"got fractions.Fraction in"),
        (
            lambda o: o.state[o.param_groups[0]["params"][0]].update({np.int64(1): 2}),
            r"got numpy.*scalar",
        ),
    ],
)
def test_what_could_not_be_loaded_is_not_saved(
    tmp_path: Path, poison: Callable[[Any], object], where: str
):
    system = other_system(mlp())
    path = tmp_path / "a.pt"
    system.save(path)
    before = path.read_bytes()
    poison(system.optimizer)
    with pytest.raises(TypeError, match=f"save: expected tensors and plain .*{where}"):
        system.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "multi-step": lambda o: lr_scheduler.MultiStepLR(o, [2, 4]),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, cycle_momentum=False),
    "chained": lambda o: lr_scheduler.ChainedScheduler([linear(o), cosine(o)]),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_every_scheduler_comes_back(tmp_path: Path, scheduler: Callable[[Any], Any]):
    found = []
    batches = batches_of((8,), 8)
    for cut in (None, 3):
        torch.manual_seed(0)
        system = other_system(mlp(), torch.optim.SGD, scheduler)
        for i, batch in enumerate(batches):
            if i == cut:
                system.save(tmp_path / "a.pt")
                system = other_system(mlp(), torch.optim.SGD, scheduler)
                system.load(tmp_path / "a.pt")
            system.train_step(*batch)
        found.append(everything(system))
    for key in ("model", "optimizer", "monitor"):
        assert_same(found[1][key], found[0][key])
    assert found[1]["optimizer"]["param_groups"] == found[0]["optimizer"]["param_groups"]


def test_files_of_another_run_are_not_overwritten(tmp_path: Path):
    first, loader, _ = run_of({}, tmp_path)
    first.fit(loader, 1)
    kept = (tmp_path / "last.pt").read_bytes()
    first.save(tmp_path.parent / "elsewhere.pt")
    message = r"last.pt' is from another run, and would be overwritten; load\(\) it to go on, or"
    for prepare in (
        lambda system: None,
        lambda system: system.train_step(*batches_of((8,), 8, size=6)[0]),
        lambda system: system.load(tmp_path.parent / "elsewhere.pt"),
    ):
        system, loader, _ = run_of({}, tmp_path)
        prepare(system)
        with pytest.raises(ValueError, match=message):
            system.fit(loader, 2)
        assert (tmp_path / "last.pt").read_bytes() == kept
    system.load(tmp_path / "last.pt")
    assert len(system.fit(loader, 2)) == 2
    assert len(first.fit(loader, 2)) == 2  # it owns them too


def test_killed_before_the_first_checkpoint(tmp_path: Path):
    system, loader, _ = run_of({}, tmp_path, data_trap=at(1, "exception"))
    interrupted(lambda: system.fit(loader, 1), "exception")
    again, loader, _ = run_of({}, tmp_path)
    again.load(tmp_path / "last.pt")
    assert (again.step, again.epoch) == (0, 0)
    assert len(again.fit(loader, 1)) == 1


def test_checkpoints_every_few_steps(tmp_path: Path):
    system, loader, _ = run_of({}, tmp_path, save_every=4)
    steps = []
    write = _saving.write

    def noting(state: dict[str, Any], path: Path) -> None:
        steps.append(state["progress"]["step"])
        write(state, path)

    with mock.patch("autograd_lib.training.saving.write", noting):
        system.fit(loader, 2)
    assert steps == [0, 4, 5, 8, 10]


# --- what is shown


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(TensorDataset(torch.ones(6, 8), torch.zeros(6, dtype=torch.int64)))


def test_the_line_of_progress(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_progress, "_QUIET_SECONDS", -1.0)
    monkeypatch.setattr(_progress, "_PAUSE_SECONDS", -1.0)
    model, optimizer, twin, other = twins(mlp)
    system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss())
    batches = batches_of((8,), 8, number=2)
    with mock.patch("sys.stderr", Terminal()) as stream:
        system.fit(batches, 1)
    texts = [text.strip() for text in stream.getvalue().split("\r")]
    losses = plain_loop(twin, other, nn.CrossEntropyLoss(), batches)
    assert [text for text in texts if text] == [
        f"fit: epoch 1, batch {number}, loss {loss.item():.4g}"
        for number, loss in enumerate(losses, 1)
    ]
    assert stream.getvalue().endswith("\r")  # it is wiped
    with mock.patch("sys.stderr", Terminal()) as stream:
        system.fit(DataLoader(Stream(), batch_size=3), 2)
    assert "fit: epoch 2, batch 2, loss " in stream.getvalue()
    with mock.patch("sys.stderr", io.StringIO()) as stream:
        system.fit(batches, 3)
    assert stream.getvalue() == ""


# Tried as a new user would


def classifier(weight: Tensor | None = None, **options: Any) -> AutogradTrainingSystem:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss(weight), **options)


def test_an_evaluation_that_fails_loses_no_epoch() -> None:
    batches = [(torch.randn(4, 3), torch.tensor([0, 1, 0, 1])) for _ in range(3)]
    fails = [True]

    def metric(output: Tensor, targets: Tensor) -> Tensor:
        if fails.pop() if fails else False:
            raise OSError("out of luck")
        return output.mean()

    plain, system = classifier(), classifier(metrics={"mean": metric})
    expected = plain.fit(batches, 2, batches)
    with pytest.raises(OSError, match="out of luck"):
        system.fit(batches, 2, batches)
    rows = system.fit(batches, 2, batches)
    assert [(row["epoch"], row["step"]) for row in rows] == [(1, 3), (2, 6)]
    assert [row["loss"] for row in rows] == [row["loss"] for row in expected]
    assert all(map(torch.equal, system.model.parameters(), plain.model.parameters()))


@pytest.mark.parametrize("size", [1, 2, 4])
def test_metrics_know_no_weights_of_classes(size: int) -> None:
    def right(output: Tensor, targets: Tensor) -> Tensor:
        return (output.argmax(1) == targets).float().mean()

    system = classifier(torch.tensor([1.0, 0.0]), metrics={"right": right})
    nn.init.zeros_(system.model.weight)
    system.model.bias.data = torch.tensor([1.0, 0.0])  # always the first class
    x, y = torch.zeros(4, 3), torch.tensor([0, 0, 1, 1])
    found = system.evaluate(list(zip(x.split(size), y.split(size), strict=True)))
    assert found["right"] == 0.5
    assert found["loss"] == pytest.approx(math.log1p(math.exp(-1)))


def test_the_mean_of_the_functional_cross_entropy() -> None:
    targets = torch.tensor([0, -100, 1, -100, -100, 1])
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    config = load_config({"autograd_system": {"performance": {"micro_batch": 2}}})
    system = AutogradTrainingSystem(model, optimizer, F.cross_entropy, config)
    x = torch.randn(6, 3)
    expected = F.cross_entropy(model(x), targets)
    torch.testing.assert_close(system.train_step(x, targets), expected.detach())


def test_options_that_would_do_nothing() -> None:
    other = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    message = "expected a scheduler of the optimizer that is given here, got "
    with pytest.raises(ValueError, match=f"{message}<.*StepLR"):
        classifier(scheduler=torch.optim.lr_scheduler.StepLR(other, 1))
    with pytest.raises(ValueError, match=f"{message}'cosine'"):
        classifier(scheduler="cosine")
    with pytest.raises(ValueError, match="a metric named 'loss' would take the place"):
        classifier(metrics={"loss": torch.dist})


def test_steps_that_the_scaler_skips_have_no_norm() -> None:
    config = load_config({"autograd_system": {"performance": {"precision": "fp16"}}})
    system = classifier(config=config)
    nn.init.zeros_(system.model.weight)
    x, y = torch.full((4, 3), 8.0), torch.zeros(4, dtype=torch.long)
    (row,) = system.fit([(x, y)] * 6, 1)
    skipped = system.monitor.history["skipped"]
    assert 0 < skipped.sum() < 6
    assert row["gradient_norm"] == np.median(system.monitor.history["total_norm"][~skipped])
