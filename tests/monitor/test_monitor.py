"""GradientMonitor: the values it sees, training as it was without, every hook gone."""

from __future__ import annotations

import contextlib
import copy
import csv
import gc
import importlib
import math
import pickle
import re
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES, FLOAT_DTYPES, MODELS, TiedLanguageModel, cnn, mlp, reference
from pyarrow import parquet
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from autograd_lib import (
    GradientMonitor,
    Issue,
    NoiseScale,
    NonFiniteGuard,
    compute_gradient_statistics,
    find_nonfinite,
    get_gradient_norms,
    missing_gradients,
)
from autograd_lib.core.reduction import Reduction
from autograd_lib.core.rows import CPU_SIZES, norms
from autograd_lib.monitor.history import Ring
from autograd_lib.monitor.noise_scale import estimate

with warnings.catch_warnings():  # compiling an optimizer imports it, and it is deprecated itself
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch.utils.mkldnn

EVERYTHING = {
    "collect": ("zero_fraction", "nan_count", "inf_count", "cosine"),
    "update_every": 2,
    "histogram_every": 1,
    "noise": True,
    "history": 2,  # so that rows are sent, and overwritten, within the few steps
}


def holding(**parameters: Tensor) -> nn.Module:
    """A module with these parameters and no forward."""
    model = nn.Module()
    for name, values in parameters.items():
        model.register_parameter(name, nn.Parameter(torch.zeros_like(values)))
    return model


def look(*steps: dict[str, Tensor | None], **options: Any) -> GradientMonitor:
    """A monitor that has seen one step for each dict of gradients."""
    first = {name: grad for step in steps for name, grad in step.items() if grad is not None}
    model = holding(**first)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GradientMonitor(model, optimizer, **options) as monitor:
        for step in steps:
            for name, grad in step.items():
                setattr(getattr(model, name), "grad", grad)  # noqa: B010
            optimizer.step()
    monitor.model, monitor.optimizer = model, optimizer
    return monitor


def agree(got: dict[str, Any], expected: dict[str, Any], rtol: float = 1e-5) -> None:
    """Compare the statistics of one parameter; sums may lose digits relative to the largest."""
    scale = expected["abs_max"] if math.isfinite(expected["abs_max"]) else 0.0
    for key in got.keys() & expected.keys():
        atol = rtol * scale if key in {"mean", "std"} else 0.0
        value, reference = got[key], expected[key]
        assert value == pytest.approx(reference, rel=rtol, abs=atol, nan_ok=True), key


def hooks_left(model: nn.Module, *optimizers: torch.optim.Optimizer) -> int:
    parameters = [p._post_accumulate_grad_hooks or {} for p in model.parameters()]
    modules = [m._forward_hooks for m in model.modules()]
    steps = [o._optimizer_step_pre_hooks for o in optimizers]
    steps += [o._optimizer_step_post_hooks for o in optimizers]
    return sum(map(len, [*parameters, *modules, *steps]))


def trained(model: nn.Module, x: Tensor, steps: int = 3, **options: Any) -> GradientMonitor:
    """Train a model for a few steps under a monitor."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    with GradientMonitor(model, optimizer, **options) as monitor:
        for _ in range(steps):
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    monitor.optimizer = optimizer
    return monitor


# --- training stays as it was, in every setting

Begin = Callable[..., None]
SETTINGS: dict[str, Callable[[str, Begin], nn.Module]] = {}


def setting(make: Callable[[str, Begin], nn.Module]) -> Callable[[str, Begin], nn.Module]:
    """A way to train: it makes a model, calls `begin` as a monitor is made, trains, returns it."""
    SETTINGS[make.__name__] = make
    return make


def sgd(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **options})


def epoch(
    model: Callable[[Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    make: Callable[[], Tensor],
    micro_batches: int = 1,
    set_to_none: bool = True,
) -> None:
    for _ in range(3):
        for _ in range(micro_batches):
            model(make()).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=set_to_none)


def inputs(device: str, *shape: int, **options: Any) -> Callable[[], Tensor]:
    return lambda: torch.randn(*(shape or (5, 8)), device=device, **options)


@setting
def accumulation(device, begin):
    model = mlp().to(device)
    begin(model, optimizer := sgd(model))
    epoch(model, optimizer, inputs(device), micro_batches=3)
    return model


@setting
def gradients_kept(device, begin):
    model = mlp().to(device)
    begin(model, optimizer := sgd(model))
    epoch(model, optimizer, inputs(device), micro_batches=2, set_to_none=False)
    return model


@setting
def several_backwards(device, begin):
    model = mlp().to(device)
    begin(model, optimizer := sgd(model))
    for _ in range(3):
        output = model(torch.randn(5, 8, device=device))
        output.square().mean().backward(retain_graph=True)
        output.abs().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@setting
def dropout(device, begin):
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8)).to(device)
    begin(model, optimizer := torch.optim.AdamW(model.parameters()))
    epoch(model, optimizer, inputs(device))
    return model


@setting
def shared(device, begin):
    model = TiedLanguageModel().to(device)
    begin(model, optimizer := torch.optim.Adam(model.parameters(), lr=0.1))
    epoch(model, optimizer, lambda: torch.randint(0, 11, (5, 3), device=device))
    return model


@setting
def sparse(device, begin):
    model = nn.Sequential(nn.Embedding(50, 8, sparse=True), nn.Linear(8, 3, bias=False)).to(device)
    begin(model, optimizer := sgd(model, momentum=0.0))
    epoch(model, optimizer, lambda: torch.randint(0, 50, (4,), device=device), micro_batches=2)
    return model


@setting
def frozen_and_unused(device, begin):
    model = nn.Sequential(*mlp(), nn.Linear(8, 8)).to(device)
    model[0].requires_grad_(False)
    begin(model, optimizer := sgd(model))
    epoch(model[:-1], optimizer, inputs(device), micro_batches=2)
    return model


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 8)
        self.weight = nn.Parameter(torch.randn(8, 8, dtype=torch.complex64))
        self.empty = nn.Parameter(torch.zeros(0, 3))

    def forward(self, x: Tensor) -> Tensor:
        return (self.first(x).to(torch.complex64) @ self.weight).abs() + self.empty.sum()


@setting
def complex_and_empty(device, begin):
    model = Complex().to(device)
    begin(model, optimizer := sgd(model))
    epoch(model, optimizer, inputs(device))
    return model


def with_dtype(dtype: torch.dtype) -> Callable[[str, Begin], nn.Module]:
    def run(device, begin):
        model = mlp().to(device, dtype)
        begin(model, optimizer := sgd(model))
        epoch(model, optimizer, inputs(device, dtype=dtype))
        return model

    return run


SETTINGS |= {str(dtype)[6:]: with_dtype(dtype) for dtype in FLOAT_DTYPES}


@setting
def autocast(device, begin):
    model = mlp().to(device)
    begin(model, optimizer := sgd(model))
    with torch.autocast(device, torch.bfloat16):
        epoch(model, optimizer, inputs(device))
    return model


@setting
def channels_last(device, begin):
    model = cnn().to(device, memory_format=torch.channels_last)
    model[0] = nn.Conv2d(1, 4, 3, padding=1, device=device).to(memory_format=torch.channels_last)
    begin(model, optimizer := sgd(model))
    epoch(model, optimizer, inputs(device, 3, 1, 6, 6))
    return model


def with_checkpoint(reentrant: bool) -> Callable[[str, Begin], nn.Module]:
    def run(device, begin):
        model = mlp(depth=4).to(device)
        begin(model, optimizer := sgd(model))

        def forward(x: Tensor) -> Tensor:
            inside = checkpoint(model[2:5], model[:2](x), use_reentrant=reentrant)
            return model[5:](inside)

        epoch(forward, optimizer, inputs(device), micro_batches=2)
        return model

    return run


SETTINGS |= {"checkpoint": with_checkpoint(False), "checkpoint_reentrant": with_checkpoint(True)}


@setting
def compiled_before(device, begin):
    model = mlp().to(device)
    compiled = torch.compile(model, backend="aot_eager")
    begin(compiled, optimizer := sgd(model))
    epoch(compiled, optimizer, inputs(device))
    return model


@setting
def compiled_after(device, begin):
    model = mlp().to(device)
    begin(model, optimizer := sgd(model))
    epoch(torch.compile(model, backend="aot_eager", fullgraph=True), optimizer, inputs(device))
    return model


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = mlp()

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


@setting
def compiled_in_place(device, begin):
    model = Network().to(device)
    begin(model, optimizer := sgd(model))
    model.compile(backend="aot_eager", fullgraph=True)
    epoch(model, optimizer, inputs(device))
    return model


@setting
def compiled_by_inductor(device, begin):
    model = mlp(2).to(device)
    begin(model, optimizer := sgd(model))
    epoch(torch.compile(model, fullgraph=True), optimizer, inputs(device))
    return model


@setting
def compiled_step(device, begin):
    model = mlp().to(device)
    begin(model, optimizer := sgd(model, lr=torch.tensor(0.05)))
    step = torch.compile(optimizer.step, backend="aot_eager")
    for _ in range(3):
        model(torch.randn(5, 8, device=device)).square().mean().backward()
        step()
        optimizer.zero_grad()
    return model


@setting
def lbfgs(device, begin):
    model = mlp().to(device)
    begin(model, optimizer := torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3))
    x = torch.randn(5, 8, device=device)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(closure)
    optimizer.step(closure=closure)
    return model


@setting
def clipped(device, begin):
    model = mlp().to(device)
    begin(model, optimizer := sgd(model))
    for _ in range(3):
        model(torch.randn(5, 8, device=device)).square().sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()
    return model


@setting
def gradient_penalty(device, begin):
    model = mlp().to(device)
    begin(model, optimizer := sgd(model))
    for _ in range(3):
        x = torch.randn(5, 8, device=device, requires_grad=True)
        loss = model(x).square().mean()
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (loss + grad.square().sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@setting
def differentiable_gradients(device, begin):
    model = mlp().to(device)
    begin(model, optimizer := sgd(model))
    for _ in range(3):
        loss = model(torch.randn(5, 8, device=device)).square().mean()
        with warnings.catch_warnings():  # that it makes a cycle, which zero_grad breaks
            warnings.simplefilter("ignore", UserWarning)
            loss.backward(create_graph=True)
        sum(p.grad.square().sum() for p in model.parameters()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@setting
def evaluation_between(device, begin):
    model = mlp().to(device)
    begin(model, optimizer := sgd(model))
    for context in (torch.no_grad, torch.inference_mode, torch.no_grad):
        epoch(model, optimizer, inputs(device))
        with context():
            model.eval()(torch.randn(5, 8, device=device))
        model.train()
    return model


@setting
def thawed(device, begin):
    model = mlp().to(device)
    model[0].requires_grad_(False)
    begin(model, optimizer := sgd(model))
    epoch(model, optimizer, inputs(device))
    model.requires_grad_(True)
    model[-1].requires_grad_(False)
    epoch(model, optimizer, inputs(device))
    return model


@setting
def moved_and_cast(device, begin):
    model = mlp()
    begin(model, optimizer := sgd(model, momentum=0.0))
    epoch(model, optimizer, inputs("cpu"))
    model.to(device)
    epoch(model, optimizer, inputs(device))
    model.double()
    epoch(model, optimizer, inputs(device, dtype=torch.float64))
    model.bfloat16()
    epoch(model, optimizer, inputs(device, dtype=torch.bfloat16))
    return model


@setting
def without_optimizer(device, begin):
    model = mlp().to(device)
    begin(model)
    for _ in range(3):
        model(torch.randn(5, 8, device=device)).square().mean().backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(0.1 * parameter.grad)
        model.zero_grad()
    return model


def with_scaler(fused: bool, clip: bool) -> Callable[[str, Begin], nn.Module]:
    def run(device, begin):
        model = mlp().to(device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler(device, init_scale=2.0**12)
        begin(model, optimizer, scaler)
        for overflow in (False, False, True, False):
            optimizer.zero_grad()
            for _ in range(2):
                loss = model(torch.randn(5, 8, device=device)).square().mean()
                scaler.scale(loss * (math.inf if overflow else 1)).backward()
            if clip:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            scaler.step(optimizer)
            scaler.update()
        return model

    return run


SETTINGS |= {
    "scaler": with_scaler(False, False),
    "scaler_clip": with_scaler(False, True),
    "scaler_fused": with_scaler(True, False),
    "scaler_fused_clip": with_scaler(True, True),
}


def run(
    name: str, device: str, options: dict[str, Any] | None
) -> tuple[list[Tensor], GradientMonitor | None, list[Any]]:
    """Train as a setting says; what results, the monitor, and what it ought to have seen."""
    torch.compiler.reset()
    torch.manual_seed(0)
    monitors: list[GradientMonitor] = []
    expected: list[Any] = []

    def begin(model: nn.Module, optimizer: Any = None, scaler: Any = None) -> None:
        if options is None:
            return
        chosen = {
            k: v for k, v in options.items() if optimizer or k not in {"noise", "update_every"}
        }
        monitors.append(GradientMonitor(model, optimizer, scaler, **chosen))
        monitors[0].register_hooks()
        if optimizer is not None:  # afterwards, since the gradients of a closure are made within
            note = torch.compiler.disable(
                lambda *_: expected.append(compute_gradient_statistics(model))
            )
            optimizer.register_step_post_hook(note)

    model = SETTINGS[name](device, begin)
    tensors = [*model.state_dict().values()]
    tensors += [p.grad for p in model.parameters() if p.grad is not None]
    return [t.detach().clone() for t in tensors], monitors[0] if monitors else None, expected


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SETTINGS)
def test_training_is_bit_equal_and_values_are_those_of_the_step(name, device) -> None:
    without, *_ = run(name, device, None)
    for options in ({}, EVERYTHING):
        got, monitor, expected = run(name, device, options)
        assert len(got) == len(without)
        assert all(map(torch.equal, got, without)), options
        if name.startswith("scaler"):
            continue  # the test of the scaler has closed forms
        history = monitor.history
        if expected:
            assert history["step"][-1] == len(expected)
        for row, step in enumerate(history["step"]):
            if not expected:
                continue
            summary = expected[step - 1]
            total = history["total_norm"][row]
            assert total == pytest.approx(summary["total_norm"], rel=1e-5)
            for i, parameter in enumerate(history["names"]):
                entry = summary["parameters"].get(parameter)
                if entry is None:
                    assert np.isnan(history["norm"][row, i])
                else:
                    agree(
                        {k: history[k][row, i] for k in entry if k in history and k != "numel"},
                        entry,
                    )
        last = monitor.get_gradient_summary()
        if expected:
            assert list(last["parameters"]) == list(expected[-1]["parameters"])


def test_a_step_without_an_optimizer_is_a_backward() -> None:
    model = mlp()
    with GradientMonitor(model) as monitor:
        for step in range(1, 4):  # accumulating
            model(torch.randn(5, 8)).square().mean().backward()
            summary, expected = monitor.get_gradient_summary(), compute_gradient_statistics(model)
            assert summary["step"] == step
            for name, entry in expected["parameters"].items():
                agree(summary["parameters"][name], entry)
        torch.autograd.grad(model(torch.randn(5, 8)).sum(), [*model.parameters()])
        model[1](torch.randn(2, requires_grad=True)).sum().backward()  # reaches no parameter
        with torch.no_grad():
            model(torch.randn(5, 8))
    assert len(monitor.history["step"]) == 3


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("inside", [(0, 1), (1, 1), (1, 2), (0, 3), (0, 2)])
def test_a_reentrant_checkpoint_is_part_of_its_backward(inside) -> None:
    layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(3)])
    begin, length = inside

    def forward(x: Tensor) -> Tensor:
        for layer in layers[:begin]:
            x = layer(x)

        def nested(x: Tensor) -> Tensor:
            for layer in layers[begin : begin + length]:
                x = checkpoint(layer, x, use_reentrant=True)
            return x

        x = checkpoint(nested, x, use_reentrant=True)
        for layer in layers[begin + length :]:
            x = layer(x)
        return x

    with GradientMonitor(layers) as monitor:
        for step in range(1, 4):
            layers.zero_grad()
            loss = forward(torch.randn(2, 3, requires_grad=True)).square().sum()
            loss.backward(retain_graph=True)
            summary = monitor.get_gradient_summary()
            assert summary["step"] == step
            assert summary["total_norm"] == pytest.approx(
                compute_gradient_statistics(layers)["total_norm"], rel=1e-5
            )
            assert len(summary["parameters"]) == 6
    assert not monitor._end._within
    assert not monitor._end._backwards


def test_frozen_parameters_that_thaw_are_seen_without_an_optimizer() -> None:
    model = mlp()
    model.requires_grad_(False)
    with GradientMonitor(model) as monitor:
        assert not any(parameter.requires_grad for parameter in model.parameters())
        model[0].requires_grad_(True)
        model(torch.randn(5, 8)).sum().backward()
        assert list(monitor.get_gradient_summary()["parameters"]) == ["0.weight", "0.bias"]
    assert hooks_left(model) == 0


def test_an_exception_in_the_middle_of_backward_spoils_no_later_step() -> None:
    for optimizer_given in (False, True):
        model = mlp()
        optimizer = sgd(model)
        with GradientMonitor(model, optimizer if optimizer_given else None) as monitor:
            failing = model[2].weight.register_hook(lambda _: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(torch.randn(5, 8)).sum().backward()
            assert len(monitor.history["step"]) == 0
            failing.remove()
            model.zero_grad()
            for _ in range(2):
                model(torch.randn(5, 8)).sum().backward()
                expected = compute_gradient_statistics(model)["total_norm"]
                optimizer.step()
                optimizer.zero_grad()
            assert monitor.history["total_norm"][1] == pytest.approx(expected, rel=1e-5)
            assert monitor.history["step"].tolist() == [1, 2]


def test_several_monitors_see_the_same() -> None:
    model = mlp()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    monitors = [GradientMonitor(model, optimizer, scaler) for _ in range(3)]
    handles = [monitor.register_hooks() for monitor in monitors]
    for overflow in (False, True, False):
        loss = model(torch.randn(5, 8)).sum() * (math.inf if overflow else 1)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    for monitor in monitors:
        assert monitor.history["skipped"].tolist() == [False, True, False]
        np.testing.assert_array_equal(monitor.history["norm"], monitors[0].history["norm"])
    for order in (1, 0, 2):
        for handle in handles[order]:
            handle.remove()
    assert "step" not in vars(scaler)
    assert hooks_left(model, optimizer) == 0


def test_the_block_of_the_specification() -> None:
    model = mlp()
    monitor = GradientMonitor(model)
    hooks = monitor.register_hooks()
    optimizer = sgd(model)
    for step in range(3):
        optimizer.zero_grad()
        loss = model(torch.randn(5, 8)).square().mean()
        loss.backward()
        stats = monitor.get_gradient_summary()
        assert stats["step"] == step + 1
        assert stats["total_norm"] > 0
        optimizer.step()
    for hook in hooks:
        hook.remove()
    assert hooks_left(model) == 0
    model(torch.randn(5, 8)).sum().backward()
    assert monitor.get_gradient_summary()["step"] == 3


# --- GradScaler


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("clip", [False, True])
def test_scaled_values_are_unscaled_and_skipped_steps_recorded(fused, clip, device) -> None:
    model = nn.Linear(2, 1, bias=False, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    options = {**EVERYTHING, "history": 100, "update_every": 1}
    with GradientMonitor(model, optimizer, scaler, **options) as monitor:
        for step in range(4):
            for _ in range(2):
                x = torch.tensor([[1.5, math.inf if step == 2 else 2.0]], device=device)
                scaler.scale(model(x).sum()).backward()
            if clip:
                scaler.unscale_(optimizer)
                model.weight.grad.clamp_(max=1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    history = monitor.history
    assert history["step"].tolist() == [1, 2, 3, 4]
    assert history["skipped"].tolist() == [False, False, True, False]
    finite = [0, 1, 3]
    expected = math.sqrt(2) if clip else 5.0
    np.testing.assert_allclose(history["norm"][finite, 0], expected, rtol=1e-6)
    np.testing.assert_allclose(history["max"][finite, 0], 1.0 if clip else 4.0, rtol=1e-6)
    np.testing.assert_allclose(history["total_norm"][finite], expected, rtol=1e-6)
    np.testing.assert_allclose(history["cosine"][1, 0], 1.0, rtol=1e-6)
    bins = np.log2(history["histogram_edges"][:-1])[history["histogram"][0, 0] > 0]
    assert bins.tolist() == ([0.0] if clip else [1.0, 2.0])  # of 3 and 4
    assert history["update_ratio"][0, 0] > 0
    noise = monitor._record.rings["noise"].values[:2]
    np.testing.assert_allclose(noise, [[1, 1, 1.5**2 + 2**2], [2, 2, 25.0]])


@pytest.mark.parametrize("fused", [False, True])
def test_without_an_optimizer_the_scaler_gives_the_scale(fused) -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with GradientMonitor(model, scaler=scaler) as monitor:
        scaler.scale(model(torch.tensor([[3.0, 4.0]])).sum()).backward()
        scaler.step(optimizer)
    assert monitor.history["norm"] == pytest.approx(5.0)


def test_a_disabled_scaler_and_other_optimizers_are_let_be() -> None:
    model, other = nn.Linear(2, 1), nn.Linear(2, 1)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, other)]
    for enabled in (True, False):
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=enabled)
        with GradientMonitor(model, optimizers[0], scaler) as monitor:
            factor = torch.tensor([1.0, math.inf])[int(enabled)]
            loss = model(torch.ones(1, 2)).sum() + other(torch.ones(1, 2)).sum() * factor
            scaler.scale(loss).backward()
            for optimizer in optimizers:  # the second one is skipped
                scaler.step(optimizer)
                optimizer.zero_grad()
        assert monitor.history["skipped"].tolist() == [False]
        assert monitor.history["norm"][0].tolist() == pytest.approx([math.sqrt(2), 1.0])


def test_a_hook_under_one_of_the_user_is_idle_once_removed() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with GradientMonitor(model, optimizer, scaler) as monitor:
        below = scaler.step

        def above(optimizer: torch.optim.Optimizer) -> None:
            below(optimizer)

        scaler.step = above
    scaler.scale(model(torch.full((1, 2), math.inf)).sum()).backward()
    scaler.step(optimizer)  # is skipped
    assert len(monitor.history["step"]) == 0


def test_scaler_optimizer_and_model_are_pickled_and_copied_while_monitored() -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    with (
        GradientMonitor(model, optimizer, scaler) as monitor,
        GradientMonitor(model, optimizer, scaler),
    ):
        for again in (copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))):
            twin = again(scaler)
            assert twin.state_dict() == scaler.state_dict()
            loss = twin.scale(model(torch.ones(1, 2)).sum())
            loss.backward()
            twin.step(optimizer)
            assert twin._per_optimizer_states
            assert not scaler._per_optimizer_states
            optimizer.zero_grad()
        before = len(monitor.history["step"])
        again_optimizer, again_model = copy.deepcopy((optimizer, model))
        again_model(torch.ones(1, 2)).sum().backward()
        again_optimizer.step()
        pickle.loads(pickle.dumps(optimizer.state_dict()))
        copy.deepcopy(model.state_dict())
        assert before == 2
    assert "step" not in vars(scaler)


@pytest.mark.parametrize("optimizer_given", [True, False])
def test_a_copy_of_the_model_is_not_watched(optimizer_given) -> None:
    model = mlp()
    optimizer = sgd(model)
    with GradientMonitor(model, optimizer if optimizer_given else None) as monitor:
        for again in (copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))):
            twin = again(model)
            twin(torch.full((5, 8), 1e6)).sum().backward()
            sgd(twin).step()
        model(torch.randn(5, 8)).sum().backward()
        optimizer.step()
    assert monitor.history["step"].tolist() == [1]
    expected = [parameter.grad.norm().item() for parameter in model.parameters()]
    np.testing.assert_allclose(monitor.history["norm"][0], expected, rtol=1e-5)


# --- hooks go, and the monitor keeps nothing alive


@pytest.mark.parametrize("how", ["block", "exception", "handles", "deletion", "again"])
def test_all_hooks_go(how) -> None:
    model = mlp()
    optimizer = sgd(model)
    scaler = torch.amp.GradScaler("cpu")
    make = lambda: GradientMonitor(model, optimizer, scaler, noise=True)  # noqa: E731
    monitor = make()
    assert hooks_left(model, optimizer) == 0
    if how == "block":
        with monitor:
            hooked = hooks_left(model, optimizer)
            assert "step" in vars(scaler)
    elif how == "exception":
        with contextlib.suppress(ZeroDivisionError), monitor:
            hooked = hooks_left(model, optimizer)
            raise ZeroDivisionError
    elif how == "handles":
        handles = monitor.register_hooks()
        hooked = hooks_left(model, optimizer)
        assert len(handles) == hooked + 1
        for handle in handles:
            handle.remove()
            handle.remove()
    elif how == "deletion":
        monitor.register_hooks()
        hooked = hooks_left(model, optimizer)
        gc.disable()  # counting references must do
        try:
            gone = weakref.ref(monitor)
            del monitor
            assert gone() is None
            assert hooks_left(model, optimizer) == 0
        finally:
            gc.enable()
    else:
        monitor.register_hooks()
        hooked = hooks_left(model, optimizer)
        monitor.register_hooks()
        assert hooks_left(model, optimizer) == hooked
        monitor.remove_hooks()
    assert hooked == 2 + 6
    assert hooks_left(model, optimizer) == 0
    assert "step" not in vars(scaler)


@pytest.mark.parametrize("optimizer_given", [True, False])
def test_a_monitor_keeps_no_model_alive(optimizer_given) -> None:
    model = mlp()
    optimizer = sgd(model) if optimizer_given else None
    options = EVERYTHING if optimizer_given else {"collect": ("cosine",)}
    monitor = GradientMonitor(model, optimizer, **options)
    monitor.register_hooks()
    for _ in range(2):
        model(torch.randn(5, 8)).sum().backward()
        if optimizer is not None:
            optimizer.step()
    seen = [weakref.ref(thing) for thing in (model, *model.parameters(), model[0])]
    loss = model(torch.randn(5, 8)).sum()
    del model
    loss.backward()  # the graph still holds what it needs
    if optimizer is not None:
        optimizer.step()
    del loss, optimizer
    gc.collect()
    assert [ref() for ref in seen] == [None] * len(seen)
    assert monitor.history["step"].tolist() == [1, 2]
    assert monitor.get_gradient_summary()["step"] == 2
    monitor.remove_hooks()
    with pytest.raises(RuntimeError, match="register_hooks: the model no longer exists"):
        monitor.register_hooks()


def test_a_model_is_freed_by_counting_references() -> None:
    model = mlp()
    optimizer = sgd(model)
    with GradientMonitor(model, optimizer, noise=True):
        model(torch.randn(5, 8)).sum().backward()
        optimizer.step()
        gone = weakref.ref(model[0].weight)
        gc.collect()
        gc.disable()
        try:
            del model, optimizer
            assert gone() is None
        finally:
            gc.enable()


def test_rows_take_no_memory_that_grows() -> None:
    monitor = trained(mlp(), torch.randn(5, 8), steps=10, **EVERYTHING)
    shapes = {name: ring.values.shape for name, ring in monitor._record.rings.items()}
    noise = shapes.pop("noise")
    assert {shape[0] for shape in shapes.values()} == {2}
    assert noise[0] == 16 * 2  # micro-batches
    assert len(monitor._plans) <= 3


# --- no waiting for the device


class Syncs(TorchDispatchMode):
    """Counts the operations that make the host wait, had the tensors been on a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "equal", "is_nonzero", "masked_select", "unique")

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.name.removeprefix("aten::") in self.WAITING:
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def counted_syncs(monkeypatch: pytest.MonkeyPatch, device: str) -> Iterator[list[str]]:
    mode = Syncs()
    with monkeypatch.context() as patch, mode:
        for name in ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__"):
            original = getattr(Tensor, name)

            def counted(self, *args, _name=name, _original=original, **kwargs):
                mode.found.append(_name)
                return _original(self, *args, **kwargs)

            patch.setattr(Tensor, name, counted)
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            yield mode.found
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [{}, {"history": 2}, EVERYTHING], ids=["plain", "sent", "all"])
@pytest.mark.parametrize("optimizer_given", [True, False])
def test_no_host_synchronization(options, optimizer_given, device, monkeypatch) -> None:
    model = nn.Sequential(*mlp(), nn.Linear(8, 40_000), nn.Linear(1, 1)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    if not optimizer_given:
        options = {k: v for k, v in options.items() if k not in {"noise", "update_every"}}
    x = torch.randn(5, 8, device=device)
    with GradientMonitor(model, optimizer if optimizer_given else None, **options) as monitor:

        def step() -> None:
            for _ in range(2):
                model[:-1](x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        for _ in range(3):  # plans are made, and more of them once something is amiss
            step()
        with counted_syncs(monkeypatch, device) as found:
            for _ in range(5):
                step()
        assert found == []
        with counted_syncs(monkeypatch, "cpu") as found:
            assert bool(torch.ones(()))  # that the counter counts
        assert found
    assert monitor.get_gradient_summary()["step"] == (8 if optimizer_given else 16)


def test_the_scaled_step_does_not_wait_either(monkeypatch) -> None:
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counts = []
    for watched in (False, True):
        context = GradientMonitor(model, optimizer, scaler, **EVERYTHING)
        with context if watched else contextlib.nullcontext():
            for _ in range(3):
                scaler.scale(model(torch.randn(5, 8)).sum()).backward()
                with counted_syncs(monkeypatch, "cpu") as found:
                    scaler.step(optimizer)
                scaler.update()
            counts.append(len(found))
    assert counts[0] == counts[1]


# --- values

SHAPES = [(1,), (7,), (13, 17), (2**14,), (2**14 + 1,), (3, 7, 11, 1301), (524_309,), (1_048_583,)]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_every_field_of_every_shape(dtype, device) -> None:
    torch.manual_seed(0)
    grads = {
        f"p{i}": (torch.randn(shape) * 3 + 0.1).to(device, dtype) for i, shape in enumerate(SHAPES)
    }
    for grad in grads.values():
        grad[grad.abs() < 0.5] = 0
    monitor = look(grads, grads, collect=("zero_fraction", "nan_count", "inf_count", "cosine"))
    summary = monitor.get_gradient_summary()
    rtol = 1e-10 if dtype == torch.float64 else 3e-6
    squares = 0.0
    for name, grad in grads.items():
        entry = summary["parameters"][name]
        agree(entry, reference(grad), rtol)
        assert entry["cosine"] == pytest.approx(1.0, abs=1e-5)
        assert entry.keys() == {*reference(grad), "cosine"}
        squares += reference(grad)["norm"] ** 2
    assert summary["total_norm"] == pytest.approx(math.sqrt(squares), rel=rtol)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_models_agree_with_numpy(name, device) -> None:
    torch.manual_seed(0)
    make, example = MODELS[name]
    model = make().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"collect": ("zero_fraction", "nan_count", "inf_count")}
    with GradientMonitor(model, optimizer, **options) as monitor:
        model(example().to(device)).square().mean().backward()
        optimizer.step()
    summary = monitor.get_gradient_summary()
    assert list(summary["parameters"]) == [name for name, _ in model.named_parameters()]
    for parameter, p in model.named_parameters():
        expected = reference(p.grad)
        assert summary["parameters"][parameter].keys() == expected.keys()
        agree(summary["parameters"][parameter], expected)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numel", [5, 50_001])
def test_complex_gradients(numel, device) -> None:
    grad = torch.randn(numel, dtype=torch.complex64, device=device)
    grad[1] = 0
    monitor = look({"c": grad, "r": torch.ones(2, device=device)}, collect=("zero_fraction",))
    entry = monitor.get_gradient_summary()["parameters"]["c"]
    agree(entry, reference(grad))
    assert isinstance(entry["mean"], complex)
    assert not {"min", "max"} & entry.keys()
    history = monitor.history
    assert history["mean"].dtype == np.complex128
    assert np.isnan(history["min"][0, 0])
    assert isinstance(monitor.get_gradient_summary()["parameters"]["r"]["mean"], float)
    constant = look({"c": torch.ones(numel, dtype=torch.complex64, device=device)})
    assert constant.history["mean"].dtype == np.complex128
    assert constant.history["mean"][0, 0] == pytest.approx(1 + 0j)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("value", [complex(1, math.inf), complex(-math.inf, 2)])
def test_an_infinite_part_of_a_complex_gradient_leaves_the_other_part(value, device) -> None:
    monitor = look({"c": torch.full((3,), value, dtype=torch.complex64, device=device)})
    entry = monitor.get_gradient_summary()["parameters"]["c"]
    assert entry["mean"] == value
    assert entry["norm"] == entry["abs_max"] == math.inf


@pytest.mark.parametrize("device", DEVICES)
def test_sparse_gradients_count_as_if_densified(device) -> None:
    index = torch.tensor([[1, 3, 1, 7]], device=device)
    make = lambda *args: torch.sparse_coo_tensor(*args, (50, 5), check_invariants=True)  # noqa: E731
    grad = make(index, torch.randn(4, 5, device=device))
    nothing = make(index[:, :0], torch.zeros(0, 5, device=device))
    full = torch.ones(4, 3, device=device).to_sparse()
    grads = {"some": grad, "none": nothing, "all": full}
    options = {"collect": ("zero_fraction", "nan_count", "inf_count", "cosine")}
    monitor = look(grads, grads, histogram_every=1, **options)
    for name, grad in grads.items():
        agree(monitor.get_gradient_summary()["parameters"][name], reference(grad.to_dense()))
    history = monitor.history
    assert history["histogram"][-1].sum(1).tolist() == [250, 250, 12]
    np.testing.assert_allclose(history["cosine"][1, [0, 2]], 1.0, rtol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_non_contiguous_and_expanded_gradients(device) -> None:
    torch.manual_seed(0)
    base = torch.randn(300, 200, device=device)
    parameters = {
        "transposed": base.t(),
        "strided": base[::3, ::7],
        "expanded": base[:, :1].expand(300, 200),
        "channels_last": torch.randn(8, 16, 13, 17, device=device).to(
            memory_format=torch.channels_last
        ),
    }
    model = holding(**{name: torch.zeros(grad.shape) for name, grad in parameters.items()})
    model.to(device)
    for name, grad in parameters.items():
        getattr(model, name).grad = grad
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GradientMonitor(model, optimizer) as monitor:
        optimizer.step()
        for p in model.parameters():  # the same plan, other strides
            p.grad = p.grad.clone(memory_format=torch.contiguous_format)
        optimizer.step()
    for row in range(2):
        for i, grad in enumerate(parameters.values()):
            keys = ("norm", "mean", "std", "min", "max", "abs_max")
            agree({key: monitor.history[key][row, i] for key in keys}, reference(grad))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numel", [4, 100_003])
@pytest.mark.parametrize("value", [1e25, 1e-25, 1e38, 1e-38, 1e-44, 3.0, 0.0])
@pytest.mark.parametrize("sign", [1, -1])
def test_extremes_of_float32(value, numel, sign, device) -> None:
    grad = torch.full((numel,), value, device=device)
    grad[::2] *= sign
    entry = look({"p": grad}).get_gradient_summary()["parameters"]["p"]
    agree(entry, reference(grad), 1e-4 if value == 1e-44 else 3e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numel", [4, 40_000])
def test_a_model_that_was_cast_keeps_the_range_of_its_new_dtype(numel, device) -> None:
    model = holding(p=torch.zeros(numel, device=device))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GradientMonitor(model, optimizer, update_every=1, collect=("cosine",)) as monitor:
        for dtype, value in ((torch.float32, 1.0), (torch.float64, 1e100), (torch.bfloat16, 2.0)):
            model.p.grad = None
            model.to(dtype).p.grad = torch.full((numel,), value, dtype=dtype, device=device)
            optimizer.step()
    np.testing.assert_allclose(monitor.history["max"].ravel(), [1, 1e100, 2])
    np.testing.assert_allclose(monitor.history["cosine"].ravel(), [math.nan, 1, 1], rtol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_the_cosine_of_scaled_gradients(device) -> None:
    model = nn.Linear(2, 1, bias=False, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    with GradientMonitor(model, optimizer, scaler, collect=("cosine",)) as monitor:
        for x in ([1.0, 0.0], [3.0, 4.0]):
            scaler.scale(model(torch.tensor([x], device=device)).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert monitor.history["cosine"][1, 0] == pytest.approx(0.6)


def test_extremes_of_other_dtypes() -> None:
    half = torch.full((100,), 6e4, dtype=torch.float16)  # a norm beyond 65504
    monitor = look({"p": half}, {"p": half}, collect=("cosine",))
    assert monitor.history["norm"][-1, 0] == pytest.approx(6e5)
    assert monitor.history["cosine"][-1, 0] == pytest.approx(1.0)
    double = torch.full((5,), 1e200, dtype=torch.float64)
    monitor = look({"p": double, "q": double})
    assert monitor.history["norm"][0].tolist() == pytest.approx([math.sqrt(5) * 1e200] * 2)
    assert monitor.history["total_norm"][0] == pytest.approx(math.sqrt(10) * 1e200)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numel", [1000, 300_007])
@pytest.mark.parametrize("level", [1.0, 1000.0, 1e20])
def test_a_nearly_constant_gradient_keeps_the_digits_of_its_deviation(level, numel, device) -> None:
    torch.manual_seed(0)
    grad = (level * (1 + 3e-6 * torch.randn(numel, dtype=torch.float64))).float().to(device)
    entry = look({"p": grad}).get_gradient_summary()["parameters"]["p"]
    assert entry["std"] == pytest.approx(reference(grad)["std"], rel=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("numel", [9, 60_001])
def test_nan_and_infinity(numel, device) -> None:
    inf, nan = math.inf, math.nan
    clean = torch.ones(numel, device=device)
    grads = {f"p{i}": clean.clone() for i in range(5)}
    for i, planted in enumerate([[nan], [inf], [-inf], [inf, -inf], [nan, inf, 0.0]]):
        grads[f"p{i}"][1 : 1 + len(planted)] = torch.tensor(planted)
    grads["clean"] = clean
    options = {"collect": ("zero_fraction", "nan_count", "inf_count"), "histogram_every": 1}
    monitor = look(grads, **options)
    history = monitor.history
    np.testing.assert_array_equal(history["norm"][0], [nan, inf, inf, inf, nan, numel**0.5])
    np.testing.assert_array_equal(history["abs_max"][0], [nan, inf, inf, inf, nan, 1])
    np.testing.assert_array_equal(history["min"][0], [nan, 1, -inf, -inf, nan, 1])
    np.testing.assert_array_equal(history["max"][0], [nan, inf, 1, inf, nan, 1])
    np.testing.assert_array_equal(history["std"][0], [nan] * 5 + [0])
    np.testing.assert_array_equal(history["mean"][0], [nan, inf, -inf, nan, nan, 1])
    np.testing.assert_array_equal(history["nan_count"][0], [1, 0, 0, 0, 1, 0])
    np.testing.assert_array_equal(history["inf_count"][0], [0, 1, 1, 2, 1, 0])
    np.testing.assert_allclose(history["zero_fraction"][0], [0, 0, 0, 0, 1 / numel, 0])
    assert math.isnan(history["total_norm"][0])
    kinds = [(issue.kind, issue.parameter) for issue in monitor.issues]
    assert kinds == [("nan", "p0"), ("nan", "p4"), ("inf", "p1"), ("inf", "p2"), ("inf", "p3")]
    bins = history["histogram"][0]
    assert bins.sum(1).tolist() == [numel - n for n in (1, 0, 0, 0, 1, 0)]
    assert bins[3, -1] == 2


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_histograms_count_by_powers_of_two(dtype, device) -> None:
    torch.manual_seed(0)
    powers = torch.tensor([2.0**k for k in range(-14, 16)], dtype=dtype)
    below = torch.nextafter(powers, torch.zeros_like(powers)) if dtype.itemsize > 2 else powers
    spread = torch.exp2(torch.randn(2000, dtype=torch.float64) * 8).to(dtype)
    tiny = torch.tensor([0.0, 1e-30, math.inf, math.nan], dtype=dtype)
    grad = torch.cat([powers, -below, spread, tiny])
    history = look({"p": grad.to(device)}, histogram_every=1).history
    edges = history["histogram_edges"]
    assert edges[0] == 2.0**-48
    assert edges[-1] == 2.0**16
    magnitude = grad.abs().double().numpy()
    magnitude = np.clip(magnitude[~np.isnan(magnitude)], edges[0], np.nextafter(edges[-1], 0))
    expected, _ = np.histogram(magnitude, edges)
    assert history["histogram"].dtype == np.int64
    assert history["histogram"][0, 0].tolist() == expected.tolist()


@pytest.mark.parametrize("device", DEVICES)
def test_norms_on_the_device_are_those_that_are_read(device) -> None:
    torch.manual_seed(0)
    rows = [torch.randn(5), torch.randn(50_000), torch.full((3,), 1e38), torch.zeros(0)]
    rows += [torch.tensor([1.0, x]) for x in (math.inf, -math.inf, math.nan)]
    rows += [torch.tensor([math.inf, -math.inf]), torch.randn(7, dtype=torch.complex64)]
    rows = [row.to(device) for row in rows]
    got = norms(Reduction(rows, rows)(rows)).tolist()
    expected = [np.linalg.norm(row.cpu().numpy().astype(complex)) for row in rows]
    assert got == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_histograms_are_of_their_steps() -> None:
    monitor = look(*[{"p": torch.full((4,), 2.0**k)} for k in range(7)], histogram_every=3)
    history = monitor.history
    assert history["histogram_step"].tolist() == [1, 4, 7]
    assert history["histogram"].shape == (3, 1, 64)
    assert history["histogram"].argmax(-1).ravel().tolist() == [48, 51, 54]


def test_cosine_is_with_the_gradient_before() -> None:
    torch.manual_seed(0)
    first, second = torch.randn(2, 40_000)
    third = torch.randn(40_000)
    complex_ones = torch.randn(3, 7, dtype=torch.complex64)
    monitor = look(
        {"p": first, "c": complex_ones[0], "gone": first},
        {"p": second, "c": complex_ones[1], "gone": None},
        {"p": -third, "c": complex_ones[2], "gone": first},
        {"p": torch.zeros_like(third), "c": -complex_ones[2], "gone": -first},
        collect=("cosine",),
    )
    between = lambda a, b: F.cosine_similarity(a.double(), b.double(), 0).item()  # noqa: E731
    views = [torch.view_as_real(c).flatten() for c in complex_ones]
    expected = [
        [math.nan] * 3,
        [between(first, second), between(views[0], views[1]), math.nan],
        [between(second, -third), between(views[1], views[2]), math.nan],
        [math.nan, -1.0, -1.0],
    ]
    np.testing.assert_allclose(monitor.history["cosine"], expected, atol=1e-5)


def test_cosine_keeps_a_copy_of_the_gradient_before() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientMonitor(model, optimizer, collect=("cosine",)) as monitor:
        for x in ([1.0, 0.0], [0.0, 1.0], [1.0, 1.0]):
            model(torch.tensor([x])).sum().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)  # the very memory is overwritten
    np.testing.assert_allclose(monitor.history["cosine"][1:, 0], [0.0, 0.5**0.5], atol=1e-6)


@pytest.mark.parametrize("with_closure", [False, True])
def test_update_ratio(with_closure) -> None:
    model = holding(p=torch.zeros(3), big=torch.zeros(40_000), frozen=torch.zeros(2))
    nn.init.constant_(model.p, 4.0)
    nn.init.constant_(model.big, -2.0)
    nn.init.ones_(model.frozen)
    model.frozen.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.25)

    def closure() -> Tensor:
        model.p.grad, model.big.grad = torch.ones(3), torch.ones(40_000)
        return torch.zeros(())

    with GradientMonitor(model, optimizer, update_every=2) as monitor:
        for _ in range(4):
            if with_closure:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
    expected = np.full((4, 3), math.nan)
    expected[0] = [0.25 / 4, 0.25 / 2, 0]
    expected[2] = [0.25 / 3.5, 0.25 / 2.5, 0]
    np.testing.assert_allclose(monitor.history["update_ratio"], expected, rtol=1e-6)


@pytest.mark.parametrize("options", [{}, EVERYTHING])
def test_the_gradients_are_those_that_the_optimizer_sees(options) -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    scale = lambda factor: lambda *_: [None, model.weight.grad.mul_(factor)][0]  # noqa: E731
    optimizer.register_step_pre_hook(scale(2))  # runs first
    with GradientMonitor(model, optimizer, **options) as monitor:
        optimizer.register_step_pre_hook(scale(100))
        model(torch.tensor([[3.0, 4.0]])).sum().backward()
        optimizer.step()
    assert monitor.history["norm"] == pytest.approx(10.0)


def test_absent_frozen_and_empty_parameters() -> None:
    model = holding(
        some=torch.ones(2), absent=torch.ones(2), frozen=torch.ones(2), empty=torch.ones(0)
    )
    model.frozen.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"collect": ("zero_fraction", "nan_count", "inf_count", "cosine")}
    with GradientMonitor(model, optimizer, **options) as monitor:
        for _ in range(2):
            model.some.grad, model.empty.grad = torch.ones(2), torch.ones(0)
            optimizer.step()
    history, nan = monitor.history, math.nan
    np.testing.assert_array_equal(history["norm"][1], [2**0.5, nan, nan, 0])
    np.testing.assert_array_equal(history["abs_max"][1], [1, nan, nan, 0])
    for key in ("mean", "min", "max"):
        np.testing.assert_array_equal(history[key][1], [1, nan, nan, nan], key)
    np.testing.assert_array_equal(history["std"][1], [0, nan, nan, nan])
    np.testing.assert_array_equal(history["zero_fraction"][1], [0, nan, nan, nan])
    np.testing.assert_array_equal(history["nan_count"][1], [0, nan, nan, 0])
    assert history["missing"].tolist() == [[False, True, False, False]] * 2
    assert history["present"].tolist() == [[True, False, False, True]] * 2
    assert history["numel"].tolist() == [2, 2, 2, 0]
    assert history["total_norm"].tolist() == [2**0.5] * 2
    assert monitor.issues == [Issue("missing", "absent", 1, None)]
    summary = monitor.get_gradient_summary()
    assert list(summary["parameters"]) == ["some", "empty"]
    assert summary["issues"] == monitor.issues


def test_gradients_come_and_go_by_step() -> None:
    """As of experts that no token chose: each pattern has a plan of its own."""
    torch.manual_seed(0)
    names = "abcdefg"
    steps = [
        {n: torch.randn(3) * 10 if (pattern >> i) & 1 else None for i, n in enumerate(names)}
        for pattern in [*range(1, 128), *range(1, 128, 7)]
    ]
    monitor = look(*steps)
    for row, grads in enumerate(steps):
        expected = [math.nan if grads[n] is None else grads[n].norm().item() for n in names]
        np.testing.assert_allclose(monitor.history["norm"][row], expected, rtol=1e-5)
    assert len(monitor._plans) <= 64


def test_a_parameter_that_was_replaced_is_followed() -> None:
    model = nn.Linear(2, 1, bias=False)
    monitor = GradientMonitor(model)
    model.weight = nn.Parameter(torch.zeros(1, 2))
    with monitor:
        model(torch.tensor([[3.0, 4.0]])).sum().backward()
    assert monitor.history["norm"] == pytest.approx(5.0)
    del model.weight
    model.other = nn.Parameter(torch.zeros(2))
    with monitor:
        (model.other * torch.tensor([6.0, 8.0])).sum().backward()
        assert hooks_left(model) == 1
    assert hooks_left(model) == 0
    assert monitor.history["names"] == ["other", "weight"]
    np.testing.assert_allclose(monitor.history["norm"], [[np.nan, 5.0], [10.0, np.nan]])
    assert not monitor.history["missing"].any()


# --- noise scale


def squares(rng: np.random.Generator, steps: int, k: int, world: int, d: int = 20) -> np.ndarray:
    """Records of accumulation over k micro-batches of 4 samples, with tr(Σ)/|G|² = 80."""
    mean = np.zeros(d)
    mean[0] = 0.5  # the covariance is the identity
    noise = rng.normal(size=(steps, k, world, d)) / 2
    sums = (mean + noise.mean(2)).cumsum(1)
    counts = np.arange(1, k + 1.0)
    return np.concatenate(
        [
            np.column_stack([np.full(k, step), counts, counts / world, (s**2).sum(1)])
            for step, s in enumerate(sums)
        ]
    )


@pytest.mark.parametrize(("k", "world"), [(2, 1), (4, 1), (4, 2)])
def test_the_noise_scale_converges_and_its_interval_covers(k, world) -> None:
    rng = np.random.default_rng(0)
    many = estimate(squares(rng, 5000, k, world), 4)
    assert many.samples == pytest.approx(80, rel=0.2)
    assert many.low < 80 < many.high
    assert many.high - many.low < 40
    assert many.steps == 5000
    trials = [estimate(squares(rng, 100, k, world), 4) for _ in range(200)]
    covered = np.mean([low <= 80 <= high for _, low, high, _ in trials])
    assert 0.9 <= covered <= 0.995


def test_the_noise_scale_of_a_pure_signal_and_of_pure_noise() -> None:
    signal = np.array([[s, k, k, (k * (1 + 0.01 * s)) ** 2] for s in range(3) for k in (1.0, 2.0)])
    assert estimate(signal, 4).samples == pytest.approx(0.0, abs=1e-9)
    noise = np.array([[s, k, k, k * (1 + 0.1 * s) - 0.01] for s in range(3) for k in (1.0, 2.0)])
    noise[:, 3] -= 0.02 * noise[:, 1] ** 2
    assert estimate(noise, 4).samples == math.inf


@pytest.mark.parametrize("device", DEVICES)
def test_the_monitor_records_what_the_noise_scale_needs(device) -> None:
    torch.manual_seed(0)
    model = nn.Linear(20, 1, bias=False, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    mean = torch.zeros(20, device=device)
    mean[0] = 0.5
    records = []
    with GradientMonitor(model, optimizer, noise=True) as monitor:
        for step in range(100):
            for k in (1, 2, 3, 4):
                model(mean + torch.randn(4, 20, device=device)).mean().backward()
                records.append([step, k, k, model.weight.grad.square().sum().item()])
            optimizer.step()
            optimizer.zero_grad()
    scale = monitor.noise_scale(micro_batch=4)
    assert isinstance(scale, NoiseScale)
    assert scale == pytest.approx(estimate(np.array(records), 4), rel=1e-4)
    assert scale.steps == 100
    assert str(scale).startswith(f"noise scale {scale.samples:.3g} samples [")


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("noise", [True, False])
def test_gradients_that_are_released_within_backward_are_an_error(noise, ours_first) -> None:
    model = mlp()
    optimizers = {p: torch.optim.SGD([p], lr=0.1) for p in model.parameters()}

    def take(parameter: nn.Parameter) -> None:
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    watched = sgd(model) if noise else None
    monitor, *each = [
        GradientMonitor(model, watched, noise=noise),
        *(GradientMonitor(model, optimizer) for optimizer in optimizers.values()),
    ]
    if ours_first:
        monitor.register_hooks()
    handles = [p.register_post_accumulate_grad_hook(take) for p in model.parameters()]
    if not ours_first:
        monitor.register_hooks()
    text = r"at the end of backward, got those of \['0.weight', .*'4.bias'\] released within it"
    with pytest.raises(RuntimeError, match=text):
        model(torch.randn(5, 8)).square().mean().backward()
    assert len(monitor.history["step"]) == 0
    monitor.remove_hooks()
    # Each by itself is seen.
    for one in each:
        one.register_hooks()
    x = torch.randn(5, 8)
    expected = torch.autograd.grad(model(x).square().mean(), [*model.parameters()])
    model(x).square().mean().backward()
    norms = [one.history["total_norm"].tolist() for one in each]
    np.testing.assert_allclose(norms, [[g.norm()] for g in expected], rtol=1e-5)
    # And once they are kept, so is the whole.
    for handle in handles:
        handle.remove()
    with GradientMonitor(model) as monitor:
        model(torch.randn(5, 8)).square().mean().backward()
    assert not monitor.issues


# --- rings


@pytest.mark.parametrize("device", DEVICES)
def test_a_ring_keeps_the_last_records(device) -> None:
    ring = Ring(5, (2,), torch.float64, torch.device(device))
    for step in range(1, 14):
        ring.append(step, torch.full((2,), float(step), device=device))
    if device != "cpu":
        torch.accelerator.synchronize(device)
    places = ring.places()
    assert ring.steps[places].tolist() == [9, 10, 11, 12, 13]
    assert ring.values[places].tolist() == [[float(s)] * 2 for s in range(9, 14)]
    assert ring.steps[ring.places(since=11)].tolist() == [12, 13]
    assert ring.steps[ring.places(since=3, until=11)].tolist() == [9, 10, 11]
    assert ring.places(since=3, until=8).tolist() == []
    at = ring.at(np.array([8, 13, 9]))
    np.testing.assert_array_equal(at, [[math.nan] * 2, [13] * 2, [9] * 2])
    again = Ring(3, (2,), torch.float64, torch.device(device))
    again.extend(ring.state_dict())
    if device != "cpu":
        torch.accelerator.synchronize(device)
    assert again.steps[again.places()].tolist() == [11, 12, 13]
    assert again.values[again.places()].tolist() == [[float(s)] * 2 for s in range(11, 14)]


def rows(monitor: GradientMonitor) -> dict[str, Any]:
    return {key: np.asarray(value) for key, value in monitor.history.items()}


def equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(value, other[key], err_msg=key)


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
def test_a_short_history_holds_the_last_rows_of_a_long_one(steps) -> None:
    torch.manual_seed(0)
    grads = [{"p": torch.randn(5) if i != 3 else None} for i in range(steps)]
    options = {"collect": ("zero_fraction", "cosine"), "histogram_every": 2}
    short, long = look(*grads, history=3, **options), look(*grads, history=100, **options)
    assert short.history["step"].tolist() == [*range(1, steps + 1)][-3:]
    for key, value in rows(long).items():
        if not key.startswith("histogram") and key not in {"names", "numel"}:
            np.testing.assert_array_equal(short.history[key], value[-3:], err_msg=key)
    assert short.issues == long.issues


def test_only_every_so_many_steps_are_looked_at() -> None:
    grads = [{"p": torch.full((1,), float(i))} for i in range(8)]
    history = look(*grads, every=3, history=2).history
    assert history["step"].tolist() == [4, 7]
    assert history["norm"].ravel().tolist() == [3.0, 6.0]


def test_reading_midway_changes_nothing() -> None:
    torch.manual_seed(0)
    model = holding(p=torch.zeros(4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = {"history": 3, "histogram_every": 2, "collect": ("cosine",)}
    with (
        GradientMonitor(model, optimizer, **options) as read,
        GradientMonitor(model, optimizer, **options) as unread,
    ):
        for step in range(1, 9):
            model.p.grad = torch.randn(4)
            optimizer.step()
            assert read.history["step"][-1] == step
            assert read.history["norm"][-1, 0] == pytest.approx(model.p.grad.norm().item())
            assert read.get_gradient_summary()["step"] == step
    equal(rows(read), rows(unread))


@pytest.mark.parametrize("capacity", [2, 5, 50])
@pytest.mark.parametrize("before", [0, 3, 12])
def test_the_history_survives_a_restart(before, capacity, tmp_path) -> None:
    torch.manual_seed(0)
    values = torch.randn(before + 6, 5)
    values[before // 2] = math.nan
    grads = [{"p": value} for value in values]
    options = {**EVERYTHING, "history": 5, "noise": False}
    whole = look(*grads, **{**options, "history": capacity})
    first = look(*grads[:before] or [{"p": None}, *grads[:1]][1:], **options)
    torch.save(first.state_dict(), tmp_path / "monitor.pt")
    state = torch.load(tmp_path / "monitor.pt", weights_only=True)
    second = GradientMonitor(first.model, first.optimizer, **{**options, "history": capacity})
    second.load_state_dict(state)
    kept = min(5, capacity)
    for key, value in rows(first).items():
        if key not in {"names", "numel", "histogram_edges"}:
            np.testing.assert_array_equal(rows(second)[key], value[-kept:], err_msg=key)
    assert str(second.issues) == str(first.issues)
    assert repr(second) == repr(first)
    if before:
        with second:
            for grad in grads[before:]:
                first.model.p.grad = grad["p"]
                first.optimizer.step()
        assert second.history["step"][-1] == before + 6
        n = min(capacity, 6)
        for key in ("step", "norm", "std", "zero_fraction", "skipped", "missing"):
            np.testing.assert_array_equal(second.history[key][-n:], whole.history[key][-n:], key)
        assert str(second.issues) == str(whole.issues)


def test_a_state_of_other_parameters_changes_nothing() -> None:
    monitor, other = look({"p": torch.ones(2)}), look({"q": torch.ones(2)}, {"q": torch.ones(2)})
    before = rows(monitor)
    with pytest.raises(ValueError, match=r"load_state_dict: expected the history of 1 parameters"):
        monitor.load_state_dict(other.state_dict())
    equal(rows(monitor), before)


# --- issues


def sequence(*values: float | None) -> list[dict[str, Tensor | None]]:
    return [{"p": None if v is None else torch.full((1,), v), "q": torch.ones(1)} for v in values]


VALUES = [
    1.0,
    math.nan,
    math.nan,
    1.0,
    math.nan,
    math.inf,
    1e4,
    2e4,
    0.0,
    1e-9,
    None,
    None,
    1.0,
    5e3,
]
ISSUES = [("nan", 2), ("nan", 5), ("inf", 6), ("exploding", 7), ("vanishing", 9), ("missing", 11)]
ISSUES += [("exploding", 14)]


@pytest.mark.parametrize("history", [1, 3, 1000])
def test_issues_once_per_episode_though_nobody_read(history) -> None:
    monitor = look(*sequence(*VALUES), history=history)
    assert [issue[:3:2] for issue in monitor.issues] == ISSUES
    assert {issue.parameter for issue in monitor.issues} == {"p"}
    values = [issue.value for issue in monitor.issues]
    expected = [math.nan, math.nan, math.inf, 1e4, 0.0, None, 5e3]
    assert [str(value) for value in values] == [str(value) for value in expected]
    assert monitor.get_gradient_summary()["issues"] == [monitor.issues[-1]]
    assert repr(monitor) == "GradientMonitor(2 parameters, 14 steps, 7 issues)"


def test_issues_are_the_same_when_read_at_every_step() -> None:
    model = holding(p=torch.zeros(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GradientMonitor(model, optimizer, history=4) as monitor:
        for value in VALUES:
            model.p.grad = None if value is None else torch.full((1,), value)
            optimizer.step()
            lasting = monitor.get_gradient_summary()["issues"]
            healthy = value is not None and 1e-8 < value < 1e3
            assert len(lasting) == (not healthy)
    assert [issue[:3:2] for issue in monitor.issues] == ISSUES


def test_thresholds_and_the_text_of_an_issue() -> None:
    options = {"explode_above": 2.0, "vanish_below": 0.5}
    issues = look(*sequence(2.0, 3.0, 0.5, 0.25), **options).issues
    assert issues == [Issue("exploding", "p", 2, 3.0), Issue("vanishing", "p", 4, 0.25)]
    assert str(issues[0]) == "exploding in p since step 2 (norm 3)"
    assert str(Issue("missing", "p", 4, None)) == "missing in p since step 4"


# --- exports


def exported() -> GradientMonitor:
    torch.manual_seed(0)
    grads = [{"p": torch.randn(3), "gone": torch.randn(2) if i == 1 else None} for i in range(3)]
    return look(*grads, histogram_every=2, **{"collect": ("nan_count", "cosine")})


def test_csv_and_parquet_hold_the_history(tmp_path) -> None:
    monitor = exported()
    history = monitor.history
    monitor.to_csv(tmp_path / "history.csv")
    monitor.to_parquet(tmp_path / "history.parquet")
    with open(tmp_path / "history.csv", newline="", encoding="utf-8") as file:
        lines = [*csv.DictReader(file)]
    table = parquet.read_table(tmp_path / "history.parquet").to_pylist()
    expected = [(1, "p"), (2, "p"), (2, "gone"), (3, "p")]
    assert [(int(line["step"]), line["parameter"]) for line in lines] == expected
    assert [(line["step"], line["parameter"]) for line in table] == expected
    for line, row in zip(lines, table, strict=True):
        i = history["names"].index(row["parameter"])
        for key in ("norm", "mean", "std", "min", "max", "abs_max", "nan_count", "cosine"):
            value = history[key][row["step"] - 1, i]
            np.testing.assert_equal(row[key], value)
            np.testing.assert_equal(float(line[key]), value)
        assert row["numel"] == history["numel"][i] == int(line["numel"])
        assert row["skipped"] is False
        assert line["skipped"] == "False"
    assert lines[0].keys() == table[0].keys()


def test_exports_of_complex_means_and_of_nothing(tmp_path) -> None:
    look({"p": torch.tensor([1 + 2j])}).to_parquet(tmp_path / "complex.parquet")
    (row,) = parquet.read_table(tmp_path / "complex.parquet").to_pylist()
    assert (row["mean"], row["mean_imag"]) == (1.0, 2.0)
    nothing = GradientMonitor(mlp())
    nothing.to_csv(tmp_path / "nothing.csv")
    assert len(Path(tmp_path / "nothing.csv").read_text().splitlines()) == 1
    nothing.to_parquet(tmp_path / "nothing.parquet")
    assert parquet.read_table(tmp_path / "nothing.parquet").num_rows == 0
    with pytest.raises(OSError, match="No such file"):
        nothing.to_csv(tmp_path / "absent" / "x.csv")


def test_a_data_frame_has_a_row_for_each_step_and_parameter(tmp_path) -> None:
    pandas = pytest.importorskip("pandas")
    monitor = exported()
    monitor.to_csv(tmp_path / "history.csv")
    frame = monitor.to_dataframe()
    pandas.testing.assert_frame_equal(frame, pandas.read_csv(tmp_path / "history.csv"))
    norms = frame.pivot_table(index="step", columns="parameter", values="norm")["p"]
    assert norms.tolist() == monitor.history["norm"][:, 0].tolist()


def test_a_data_frame_needs_pandas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match="to_dataframe needs pandas: pip install pandas"):
        exported().to_dataframe()


class Writer:
    """What `to_tensorboard` calls of a SummaryWriter."""

    def __init__(self) -> None:
        self.scalars: dict[tuple[str, int], float] = {}

    def add_scalar(self, tag: str, value: float, step: int) -> None:
        assert (tag, step) not in self.scalars, "written twice"
        self.scalars[tag, step] = value


def test_tensorboard_gets_norms() -> None:
    monitor, writer = exported(), Writer()
    monitor.to_tensorboard(writer)
    history = monitor.history
    assert writer.scalars.keys() == {
        *(("gradients/total_norm", step) for step in (1, 2, 3)),
        *(("gradients/norm/p", step) for step in (1, 2, 3)),
        ("gradients/norm/gone", 2),
    }
    assert writer.scalars["gradients/norm/p", 3] == history["norm"][2, 0]


def clipped_run() -> Iterator[GradientMonitor]:
    """A monitor after each of three steps, which clip to 1."""
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GradientMonitor(model, optimizer, history=2) as monitor:
        for step in range(1, 4):
            model(step * torch.tensor([[3.0, 4.0]])).sum().backward()
            monitor.look()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            yield monitor


def test_tensorboard_gets_each_step_once() -> None:
    writer, other = Writer(), Writer()
    for monitor in clipped_run():
        monitor.to_tensorboard(writer)
        monitor.to_tensorboard(writer)
    monitor.to_tensorboard(other)
    tags = ("gradients/total_norm", "gradients/clipped_norm", "gradients/norm/weight")
    assert writer.scalars.keys() == {(tag, step) for tag in tags for step in (1, 2, 3)}
    assert other.scalars.keys() == {(tag, step) for tag in tags for step in (2, 3)}
    assert writer.scalars["gradients/total_norm", 3] == pytest.approx(15.0)
    assert writer.scalars["gradients/clipped_norm", 3] == pytest.approx(1.0)
    with pytest.raises(TypeError, match="expected a directory or a SummaryWriter, got int"):
        monitor.to_tensorboard(3)


def test_scalars_are_flat() -> None:
    monitor = exported()
    history = monitor.history
    found = monitor.scalars()
    assert found == {
        "gradients/total_norm": history["total_norm"][-1],
        "gradients/norm/p": history["norm"][-1, 0],
    }
    assert {type(value) for value in found.values()} == {float}
    assert monitor.scalars("std", "cosine").keys() == {
        *("gradients/total_norm", "gradients/std/p", "gradients/cosine/p"),
    }
    with pytest.raises(
        ValueError, match=r"scalars: expected statistics among .*got \['update_ratio'\]"
    ):
        monitor.scalars("update_ratio")
    *_, monitor = clipped_run()
    assert monitor.scalars() == pytest.approx(
        {
            "gradients/total_norm": 15.0,
            "gradients/clipped_norm": 1.0,
            "gradients/norm/weight": 15.0,
        }
    )
    assert look({"p": torch.tensor([1 + 2j])}).scalars("mean")["gradients/mean/p"] == 1.0
    model = mlp()
    assert GradientMonitor(model).scalars() == {}


EXPECTED = {"gradients/total_norm": [5.0, 10.0, 15.0], "gradients/clipped_norm": [1.0] * 3}


def test_tensorboard_itself(tmp_path: Path) -> None:
    backend = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    tensorboard = importlib.import_module("torch.utils.tensorboard")
    with tensorboard.SummaryWriter(str(tmp_path / "writer")) as writer:
        for monitor in clipped_run():
            monitor.to_tensorboard(tmp_path / "directory")
            writer.add_scalars("all", monitor.scalars(), len(monitor.scalars()))
            monitor.to_tensorboard(writer)
    for place in ("writer", "directory"):
        events = backend.EventAccumulator(str(tmp_path / place))
        events.Reload()
        for tag, values in EXPECTED.items():
            scalars = events.Scalars(tag)
            assert [event.step for event in scalars] == [1, 2, 3]
            np.testing.assert_allclose([event.value for event in scalars], values, rtol=1e-5)


def test_tensorboard_is_named_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match="to_tensorboard needs tensorboard: pip install"):
        exported().to_tensorboard("directory")


def test_weights_and_biases_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    seen = []
    with wandb.init(mode="offline", dir=tmp_path) as run:
        for monitor in clipped_run():
            run.log(monitor.scalars())
            seen.append(dict(run.summary))
    for tag, values in EXPECTED.items():
        np.testing.assert_allclose([row[tag] for row in seen], values, rtol=1e-5)


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
def test_mlflow_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    mlflow.set_tracking_uri((tmp_path / "runs").as_uri())
    with mlflow.start_run() as run:
        for step, monitor in enumerate(clipped_run(), 1):
            mlflow.log_metrics(monitor.scalars(), step=step)
    client = mlflow.MlflowClient()
    for tag, values in EXPECTED.items():
        metrics = client.get_metric_history(run.info.run_id, tag)
        np.testing.assert_allclose([metric.value for metric in metrics], values, rtol=1e-5)


def test_a_monitor_in_a_notebook_is_a_table_with_issues() -> None:
    html = look(*sequence(1.0, 1e4))._repr_html_()
    assert html.startswith("<p>GradientMonitor(2 parameters, 2 steps, 1 issue)</p><table")
    assert "issue: exploding in p since step 2 (norm 1e+04)" in html
    assert '<th scope="row">p</th>' in html


# --- the summary and the state before the first step


def test_before_the_first_step() -> None:
    model = mlp()
    monitor = GradientMonitor(model)
    summary = monitor.get_gradient_summary()
    assert dict(summary) == {"total_norm": 0.0, "parameters": {}, "step": 0, "issues": []}
    assert repr(summary) == "no gradients yet"
    history = monitor.history
    assert history["norm"].shape == history["missing"].shape == (0, 6)
    assert history["step"].shape == history["total_norm"].shape == history["skipped"].shape == (0,)
    assert monitor.issues == []
    unattached = "GradientMonitor(6 parameters, 0 steps, never attached: nothing is watched)"
    assert repr(monitor) == unattached
    with monitor:
        assert repr(monitor) == "GradientMonitor(6 parameters, 0 steps, no issues)"
    again = GradientMonitor(mlp())
    again.load_state_dict(monitor.state_dict())
    assert len(again.history["step"]) == 0


def test_keys_are_there_only_if_collected() -> None:
    plain = {"names", "numel", "step", "total_norm", "skipped", "missing", "present"}
    plain |= {"norm", "mean", "std", "min", "max", "abs_max", "clipped_norm"}
    assert look({"p": torch.ones(2)}).history.keys() == plain
    more = look({"p": torch.ones(2)}, **{**EVERYTHING, "noise": False})
    extra = {"zero_fraction", "nan_count", "inf_count", "cosine", "update_ratio"}
    extra |= {"histogram", "histogram_step", "histogram_edges"}
    assert more.history.keys() == plain | extra
    dtypes = {key: more.history[key].dtype for key in plain | extra if key != "names"}
    assert {key for key, dtype in dtypes.items() if dtype != np.float64} == {
        *("numel", "step", "skipped", "missing", "present", "histogram", "histogram_step"),
    }


def test_the_summary_prints_as_a_table_with_what_lasts() -> None:
    summary = look(*sequence(1.0, 1e4)).get_gradient_summary()
    title, issue, header, *lines = repr(summary).splitlines()
    assert title.startswith("gradients of 2 parameters at step 2, total norm 1e+04")
    assert issue == "issue: exploding in p since step 2 (norm 1e+04)"
    assert header.split() == ["parameter", "norm", "mean", "std", "min", "max", "abs_max", "numel"]
    assert [line.split()[0] for line in lines] == ["p", "q"]


# --- errors

LINEAR = nn.Linear(2, 2)
OPTIMIZER = torch.optim.SGD(LINEAR.parameters(), lr=0.1)
ERRORS: list[tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = [
    ((3,), {}, TypeError, "GradientMonitor: expected a torch.nn.Module, got int"),
    (
        (LINEAR, LINEAR),
        {},
        TypeError,
        "expected optimizer to be a torch.optim.Optimizer, got Linear",
    ),
    ((LINEAR, None, 1), {}, TypeError, "expected scaler to be a torch.amp.GradScaler, got int"),
    (
        (LINEAR,),
        {"history": 0},
        ValueError,
        "expected history to be an integer of 1 or more, got 0",
    ),
    ((LINEAR,), {"every": 0}, ValueError, "expected every to be an integer of 1 or more, got 0"),
    (
        (LINEAR, OPTIMIZER),
        {"update_every": -1},
        ValueError,
        "expected update_every to be an integer of 0 or more, got -1",
    ),
    ((LINEAR,), {"histogram_every": 1.5}, ValueError, "integer of 0 or more, got 1.5"),
    ((LINEAR,), {"collect": ("median",)}, ValueError, "expected collect among ('norm', 'mean'"),
    ((LINEAR,), {"collect": "norm"}, ValueError, "got 'norm'; write collect=('norm',)"),
    ((LINEAR,), {"update_every": 2}, ValueError, "update_every looks at the steps of an optimizer"),
    ((LINEAR,), {"noise": True}, ValueError, "noise=True looks at the steps of an optimizer; pass"),
    ((nn.Tanh(),), {}, ValueError, "the model has no parameters to watch"),
    (
        (nn.LazyLinear(2),),
        {},
        ValueError,
        "['weight', 'bias'] are lazy and have no shape yet; call",
    ),
]


@pytest.mark.parametrize(("args", "options", "kind", "text"), ERRORS)
def test_errors_say_what_was_expected(args, options, kind, text) -> None:
    with pytest.raises(kind, match=re.escape(text)):
        GradientMonitor(*args, **options)


def test_reading_what_was_not_recorded() -> None:
    monitor = GradientMonitor(LINEAR)
    with pytest.raises(ValueError, match="noise_scale: nothing was recorded; make the monitor"):
        monitor.noise_scale(1)
    monitor = GradientMonitor(LINEAR, OPTIMIZER, noise=True)
    with pytest.raises(
        ValueError, match="noise_scale: expected micro_batch to be an integer of 1 or more, got 0"
    ):
        monitor.noise_scale(0)
    with pytest.raises(ValueError, match=r"two micro-batches or more each, got 0 such steps"):
        monitor.noise_scale(1)


def test_a_model_on_meta_may_be_given_but_not_trained() -> None:
    with torch.device("meta"):
        model = nn.Linear(2, 1, bias=False)
    monitor = GradientMonitor(model)
    text = r"GradientMonitor: the gradient of 'weight' with shape \(1, 2\) is on the meta device"
    with monitor, pytest.raises(ValueError, match=text):
        model(torch.ones(1, 2, device="meta")).sum().backward()
    model.to_empty(device="cpu").zero_grad()
    with monitor:
        model(torch.tensor([[3.0, 4.0]])).sum().backward()
    assert monitor.get_gradient_summary()["total_norm"] == pytest.approx(5.0)


def test_a_frozen_parameter_on_meta_hinders_nothing() -> None:
    model = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Linear(1, 1, device="meta"))
    model[1].requires_grad_(False)
    with GradientMonitor(model) as monitor:
        model[0](torch.tensor([[3.0, 4.0]])).sum().backward()
    assert monitor.get_gradient_summary()["total_norm"] == pytest.approx(5.0)
    assert not monitor.history["missing"].any()


# --- two processes


# --- what readers met


def test_other_experts_in_every_step_cost_no_new_plans() -> None:
    """Where the set of gradients changes at each step, the values are right all the same."""
    torch.manual_seed(0)
    experts = nn.ModuleList([nn.Linear(3, 2) for _ in range(12)])
    optimizer = torch.optim.SGD(experts.parameters(), lr=0.0)
    generator = np.random.default_rng(0)
    with GradientMonitor(experts, optimizer, collect=["cosine", "zero_fraction"]) as monitor:
        for _ in range(60):
            for i in generator.choice(12, 4, replace=False):
                experts[i](torch.randn(5, 3)).square().sum().backward()
            optimizer.step()
            expected = compute_gradient_statistics(experts)
            summary = monitor.get_gradient_summary()
            assert list(summary["parameters"]) == list(expected["parameters"])
            for name, entry in expected["parameters"].items():
                for key in ("norm", "std", "min", "max", "zero_fraction"):
                    assert summary["parameters"][name][key] == pytest.approx(entry[key], rel=1e-5)
            assert summary["total_norm"] == pytest.approx(expected["total_norm"], rel=1e-5)
            optimizer.zero_grad()
    assert len(monitor._plans) < 24
    absent = np.isnan(monitor.history["norm"])
    assert absent.any()
    assert np.isnan(monitor.history["cosine"][absent]).all()


def test_what_comes_and_goes_is_reported_twenty_times() -> None:
    monitor = look(*[{"p": torch.zeros(2) if i % 2 else torch.ones(2)} for i in range(100)])
    assert [issue.step for issue in monitor.issues] == [*range(2, 42, 2)]
    again = GradientMonitor(holding(p=torch.zeros(2)))
    again.load_state_dict(monitor.state_dict())
    row = {name: np.zeros((1, 1)) for name in ("norm", "abs_max")}
    again._record.lasting[:] = False
    again._record._judge(np.array([101]), row, np.zeros((1, 1)))
    assert len(again.issues) == 20


@pytest.mark.parametrize("fused", [False, True])
def test_to_skip_a_step_is_no_issue_until_it_does_not_end(fused: bool) -> None:
    layer, scaler = nn.Linear(2, 1), torch.amp.GradScaler("cpu", init_scale=2.0**8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0, fused=fused)
    with GradientMonitor(layer, optimizer, scaler) as monitor:
        for step in range(1, 40):
            factor = math.inf if step in (2, 3, 5) or step >= 10 else 1.0
            scaler.scale(layer(torch.ones(3, 2)).sum() * factor).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    assert monitor.history["skipped"].sum() == 3 + 30
    assert {(issue.kind, issue.step) for issue in monitor.issues} == {("inf", 10 + 19)}


def test_an_update_is_not_measured_across_a_step_that_failed() -> None:
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with GradientMonitor(layer, optimizer, update_every=2) as monitor:
        for step in range(1, 5):
            layer(torch.ones(1, 2)).sum().backward()
            if step == 3:
                handle = optimizer.register_step_pre_hook(lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    optimizer.step()
                handle.remove()
                layer.weight.data.mul_(100)
            else:
                optimizer.step()
    ratios = monitor.history["update_ratio"]
    assert np.isnan(ratios).all(1).tolist() == [False, True, True, True]


def test_a_parameter_that_was_resized_is_read_as_it_is() -> None:
    layer = nn.Linear(2, 2, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    with GradientMonitor(layer, optimizer) as monitor:
        for size in (2, 5):
            layer.weight.data = torch.ones(size, 2)
            layer.weight.grad = None
            layer(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    assert monitor.history["norm"][:, 0] == pytest.approx([2.0, 10**0.5])
    assert monitor.get_gradient_summary()["parameters"]["weight"]["numel"] == 10


def test_noise_of_all_remembered_steps() -> None:
    layer = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    with GradientMonitor(layer, optimizer, noise=True, history=10) as monitor:
        for _ in range(12):
            for _ in range(8):
                layer(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert monitor.noise_scale(4).steps >= 10


def test_a_monitor_is_not_pickled_but_its_state() -> None:
    with pytest.raises(TypeError, match=r"cannot be pickled or copied; save its state_dict\(\)"):
        pickle.dumps(GradientMonitor(nn.Linear(2, 1)))


@pytest.mark.parametrize(
    "options",
    [
        {"explode_above": None},
        {"explode_above": math.nan},
        {"vanish_below": -1.0},
        {"vanish_below": "x"},
        {"explode_above": 1e-9},
        {"history": True},
        {"collect": None},
    ],
)
def test_options_are_refused_when_they_are_given(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"GradientMonitor: expected .*got"):
        GradientMonitor(nn.Linear(2, 1), **options)
    GradientMonitor(nn.Linear(2, 1), history=np.int64(3))


@pytest.mark.parametrize("state", [{}, None, {"names": ["other"]}])
def test_a_foreign_state_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="load what state_dict"):
        GradientMonitor(nn.Linear(2, 1)).load_state_dict(state)


class Scaled(nn.Module):
    """Scalar parameters, as CLIP's temperature: two alike, and one of another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.tensor(v)) for v in (2.0, -3.0))
        self.wide = nn.Parameter(torch.tensor(5.0, dtype=torch.float64))

    def forward(self) -> Tensor:
        return 7 * self.first - self.second * self.second + 2 * self.wide


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"update_every": 1},
        {"collect": ("cosine", "zero_fraction", "nan_count", "inf_count")},
        {"histogram_every": 1},
        {"noise": True},
    ],
    ids=str,
)
def test_scalar_parameters(options: dict[str, Any], device: str) -> None:
    model = Scaled().to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GradientMonitor(model, optimizer, **options) as monitor:
        for _ in range(2):
            model().backward()
            optimizer.step()
            optimizer.zero_grad()
    history = monitor.history
    assert history["norm"].tolist() == [[7.0, 6.0, 2.0]] * 2
    assert history["mean"].tolist() == [[7.0, 6.0, 2.0]] * 2
    assert history["std"].tolist() == [[0.0, 0.0, 0.0]] * 2
    if "update_every" in options:
        assert history["update_ratio"].tolist() == [[0.0] * 3] * 2
    if "histogram_every" in options:
        assert history["histogram"].sum(-1).tolist() == [[1, 1, 1]] * 2
    if "collect" in options:
        assert history["cosine"][1].tolist() == [1.0, 1.0, 1.0]


def test_norms_of_many_rows_beyond_the_square_root_of_the_largest_number() -> None:
    """Where rows are merged, too, no square may overflow or underflow."""
    model = nn.Module()
    for name, size in (("huge", 2e200), ("tiny", 2e-200)):
        parameter = nn.Parameter(torch.zeros(3 * CPU_SIZES[0], dtype=torch.float64))
        parameter.grad = torch.full_like(parameter, size)
        parameter.grad[::2] *= -1  # the spread is the norm
        model.register_parameter(name, parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GradientMonitor(model, optimizer) as monitor:
        optimizer.step()
    expected = np.array([[2e200, 2e-200]]) * math.sqrt(3 * CPU_SIZES[0])
    np.testing.assert_allclose(monitor.history["norm"], expected)
    np.testing.assert_allclose(monitor.history["std"], expected / math.sqrt(3 * CPU_SIZES[0]))


# --- looking before clipping


def look_and_clip(
    model: nn.Module, monitor: GradientMonitor, x: Tensor, limit: float = 1.0
) -> float:
    """A backward, a look, and clipping; the norm before."""
    model(x).square().mean().backward()
    norm = compute_gradient_statistics(model)["total_norm"]
    monitor.look()
    nn.utils.clip_grad_norm_(model.parameters(), limit)
    return norm


def test_a_look_records_the_step_before_it_is_clipped() -> None:
    def trains(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = mlp()
        optimizer, norms = sgd(model), []
        monitor = GradientMonitor(model, optimizer, update_every=1, collect=["cosine"])
        with monitor if watched else contextlib.nullcontext():
            for step in range(3):
                x = 100 * torch.randn(5, 8)
                model(x).square().mean().backward()
                norms.append(compute_gradient_statistics(model)["total_norm"])
                if watched and step != 1:
                    monitor.look()
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
                optimizer.step()
                optimizer.zero_grad()
        if watched:
            history = monitor.history
            assert history["step"].tolist() == [1, 2, 3]
            norms[1] = 0.1  # nobody looked
            np.testing.assert_allclose(history["total_norm"], norms, rtol=1e-5)
            np.testing.assert_allclose(history["clipped_norm"], [0.1, np.nan, 0.1], rtol=1e-4)
            assert (history["update_ratio"] > 0).all()
            assert not history["skipped"].any()
            assert monitor.get_gradient_summary()["total_norm"] == history["total_norm"][2]
        return [p.detach() for p in model.parameters()]

    assert all(map(torch.equal, trains(True), trains(False)))


def test_an_explosion_is_seen_before_it_is_clipped() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = sgd(model)
    with GradientMonitor(model, optimizer) as monitor:
        for looks in (False, True):
            model(torch.tensor([[3e4, 4e4]])).sum().backward()
            if looks:
                monitor.look()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert [issue[:3] for issue in monitor.issues] == [("exploding", "weight", 2)]


def test_the_last_look_before_a_step_counts() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GradientMonitor(model, optimizer, every=1, histogram_every=1, history=4) as monitor:
        for micro_batches in (1, 2, 3):
            for _ in range(micro_batches):  # of an accumulation
                model(torch.tensor([[3.0, 4.0]])).sum().backward()
                monitor.look()
                assert monitor.history["total_norm"][-1] == pytest.approx(model.weight.grad.norm())
            model.weight.grad.clamp_(max=1.0)
            optimizer.step()
            optimizer.zero_grad()
        model(torch.tensor([[np.nan, 4.0]])).sum().backward()
        monitor.look()  # no step follows
        assert [issue.kind for issue in monitor.issues] == ["nan"]
        optimizer.zero_grad()
        model(torch.tensor([[3.0, 4.0]])).sum().backward()
        monitor.look()
        optimizer.step()
    history = monitor.history
    assert history["step"].tolist() == [1, 2, 3, 4]
    np.testing.assert_allclose(history["total_norm"], [5.0, 10.0, 15.0, 5.0])
    np.testing.assert_allclose(history["clipped_norm"], [2**0.5, 2**0.5, 2**0.5, 5.0], rtol=1e-6)
    assert history["histogram_step"].tolist() == [1, 2, 3, 4]


def test_a_step_that_is_not_taken_is_recorded_as_skipped() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GradientMonitor(model, optimizer) as monitor:
        for number, x in enumerate((3.0, math.inf, math.inf, 3.0)):
            model(torch.tensor([[x, 4.0]])).sum().backward()
            if number == 1:
                monitor.look(skipped=True)  # at once
            elif number == 2:
                monitor.look()
                model.weight.grad = None
                monitor.look(skipped=True)  # of what was looked at
            else:
                optimizer.step()
            optimizer.zero_grad()
    history = monitor.history
    assert history["skipped"].tolist() == [False, True, True, False]
    np.testing.assert_allclose(history["total_norm"], [5.0, math.inf, math.inf, 5.0])
    assert np.isnan(history["clipped_norm"]).all()
    assert monitor.issues == []


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("order", ["look, unscale", "unscale, look", "look"])
def test_a_look_is_unscaled_wherever_it_is_taken(order, fused, device) -> None:
    model = nn.Linear(2, 1, bias=False, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=fused)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10)
    with GradientMonitor(model, optimizer, scaler, explode_above=1e30) as monitor:
        for step in range(4):
            x = torch.tensor([[3.0, math.inf if step == 2 else 4.0]], device=device)
            scaler.scale(model(x).sum()).backward()
            for action in order.split(", "):
                if action == "look":
                    monitor.look()
                    assert not monitor.issues  # the scaler may skip the step
                else:
                    scaler.unscale_(optimizer)
            if order != "look":
                model.weight.grad.clamp_(max=1.0)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    history = monitor.history
    assert history["step"].tolist() == [1, 2, 3, 4]
    assert history["skipped"].tolist() == [False, False, True, False]
    finite = [0, 1, 3]
    np.testing.assert_allclose(history["total_norm"][finite], 5.0, rtol=1e-6)
    clipped = 5.0 if order == "look" else 2**0.5
    np.testing.assert_allclose(history["clipped_norm"][finite], clipped, rtol=1e-6)
    assert history["total_norm"][2] == math.inf
    assert monitor.issues == []


def test_a_look_within_a_closure() -> None:
    model = mlp()
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=3)
    x, norms = torch.randn(5, 8), []
    with GradientMonitor(model, optimizer) as monitor:

        def closure() -> Tensor:
            optimizer.zero_grad()
            norms.append(look_and_clip(model, monitor, x, 1e-3))
            return model(x).square().mean()

        for step in range(2):
            optimizer.step(closure)
            assert monitor.history["total_norm"][step] == pytest.approx(norms[-1], rel=1e-5)
    assert monitor.history["clipped_norm"] == pytest.approx(1e-3, rel=1e-2)
    assert len(norms) > 2


def test_a_look_without_an_optimizer_or_hooks() -> None:
    model = nn.Linear(2, 1, bias=False)
    monitor = GradientMonitor(model)
    model(torch.tensor([[3.0, 4.0]])).sum().backward()
    for _ in range(2):
        monitor.look()  # by hand
    with monitor:
        model(torch.tensor([[3.0, 4.0]])).sum().backward()
        assert monitor.history["step"].tolist() == [1, 2, 3]
        model.weight.grad /= 2  # as an average over processes by hand
        monitor.look()
        model(torch.tensor([[3.0, 4.0]])).sum().backward()
    np.testing.assert_allclose(monitor.history["total_norm"], [5.0, 5.0, 5.0, 10.0])
    assert np.isnan(monitor.history["clipped_norm"]).all()


def test_a_look_at_every_other_step() -> None:
    model = nn.Linear(2, 1, bias=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GradientMonitor(model, optimizer, every=2) as monitor:
        for step in range(1, 5):
            model(torch.tensor([[3.0, 4.0]]) * step).sum().backward()
            monitor.look()
            model.weight.grad.fill_(1.0)
            optimizer.step()
            optimizer.zero_grad()
    assert monitor.history["step"].tolist() == [1, 3]
    np.testing.assert_allclose(monitor.history["total_norm"], [5.0, 15.0])
    np.testing.assert_allclose(monitor.history["clipped_norm"], 2**0.5, rtol=1e-6)


@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("update_every", [1, 2])
def test_updates_are_measured_at_the_same_steps_with_a_look(every: int, update_every: int) -> None:
    ratios = []
    for looks in (False, True):
        torch.manual_seed(0)
        model = nn.Linear(2, 1, bias=False)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"every": every, "update_every": update_every}
        with GradientMonitor(model, optimizer, **options) as monitor:
            for _ in range(6):
                model(torch.ones(1, 2)).sum().backward()
                if looks:
                    monitor.look()
                optimizer.step()
                optimizer.zero_grad()
        ratios.append(monitor.history["update_ratio"])
    np.testing.assert_array_equal(*ratios)
    due = (monitor.history["step"] - 1) % update_every == 0
    np.testing.assert_array_equal(np.isfinite(ratios[1][:, 0]), due)


# --- parameters are found anew at each step


class Packed(Tensor):
    """A wrapper subclass, as quantized weights are."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Packed:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, device=inner.device, strides=inner.stride()
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner: dict[str, Tensor], *_: Any) -> Packed:
        return cls(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(cls, lambda x: x.inner, (args, kwargs or {}))
        result = func(*args, **kwargs)
        wrapping = (torch.ops.aten.detach, torch.ops.aten._to_copy, torch.ops.aten.clone)
        return cls(result) if func.overloadpacket in wrapping else result


@pytest.mark.parametrize("optimizer_given", [True, False])
def test_a_model_is_moved_and_swapped_beside_a_monitor(optimizer_given) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    model[0].weight = nn.Parameter(Packed(model[0].weight.detach()), requires_grad=False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)

    def step(dtype: torch.dtype) -> float:
        model(torch.randn(3, 4, dtype=dtype)).square().mean().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        norm = nn.utils.get_total_norm(grads).item()
        optimizer.step()
        optimizer.zero_grad()
        return norm

    average = [torch.full_like(p, 2.0) for p in model[1].parameters()]
    with GradientMonitor(model, optimizer if optimizer_given else None) as monitor:
        norms = [step(torch.float32)]
        for parameter, other in zip(model[1].parameters(), average, strict=True):
            torch.utils.swap_tensors(parameter, nn.Parameter(other))
        assert (model[1].weight == 2).all()
        norms += [step(torch.float32)]
        model.to(torch.float64)
        assert model[0].weight.dtype is torch.float64
        norms += [step(torch.float64)]
    np.testing.assert_allclose(monitor.history["total_norm"], norms, rtol=1e-5)


# --- the parameters of an optimizer, as they are at the moment


def test_each_of_two_optimizers_has_a_monitor_of_its_own() -> None:
    """A GAN: the generator's backward leaves gradients in the discriminator, too."""

    def trains(watched: bool) -> list[Tensor]:
        torch.manual_seed(0)
        gan = nn.ModuleDict({"G": nn.Linear(4, 4), "D": nn.Linear(4, 1)})
        optimizers = {name: torch.optim.Adam(gan[name].parameters(), lr=0.1) for name in "GD"}
        monitors = {n: GradientMonitor(gan, optimizer) for n, optimizer in optimizers.items()}
        expected: dict[str, list[float]] = {"G": [], "D": []}
        with contextlib.ExitStack() as stack:
            for monitor in monitors.values() if watched else ():
                stack.enter_context(monitor)
            for _ in range(4):
                for name in "DG":
                    optimizers[name].zero_grad()
                    fake = gan["D"](gan["G"](torch.randn(8, 4)))
                    F.softplus(fake if name == "D" else -fake).mean().backward()
                    grads = [p.grad for p in gan[name].parameters()]
                    expected[name].append(nn.utils.get_total_norm(grads).item())
                    optimizers[name].step()
        if watched:
            for name, monitor in monitors.items():
                history = monitor.history
                assert history["names"] == [f"{name}.weight", f"{name}.bias"]
                np.testing.assert_allclose(history["total_norm"], expected[name], rtol=1e-5)
                assert not monitor.issues
        return [p.detach() for p in gan.parameters()]

    assert all(map(torch.equal, trains(True), trains(False)))


def total(*parameters: Tensor) -> float:
    return nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]).item()


@pytest.mark.parametrize("options", [{}, {**EVERYTHING, "history": 100}], ids=["plain", "all"])
def test_parameters_that_join_or_leave_are_followed_by_name(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model[0].parameters(), lr=0.1)
    expected = []

    def step() -> None:
        model(torch.randn(2, 4)).square().sum().backward()
        held = [p for group in optimizer.param_groups for p in group["params"]]
        expected.append(total(*held))
        optimizer.step()
        model.zero_grad()

    with GradientMonitor(model, optimizer, **options) as monitor:
        step()
        optimizer.add_param_group({"params": [*model[1].parameters()]})  # unfrozen layer by layer
        step()
        model.append(nn.Linear(4, 2))  # grown
        optimizer.add_param_group({"params": [*model[2].parameters()]})
        step()
        model[0].requires_grad_(False)
        step()
        del optimizer.param_groups[0]  # the first layer is dropped
        model[0].requires_grad_(True)
        step()
        head = nn.Linear(4, 3)  # another head, in both
        optimizer.param_groups[-1]["params"] = [*head.parameters()]
        model[2] = head
        step()
    assert hooks_left(model, optimizer) == 0
    history = monitor.history
    layers = ["1.weight", "1.bias", "2.weight", "2.bias", "0.weight", "0.bias"]
    assert history["names"] == layers
    np.testing.assert_allclose(history["total_norm"], expected, rtol=1e-5)
    columns = {"0": [1, 1, 1, 0, 0, 0], "1": [0, 1, 1, 1, 1, 1], "2": [0, 0, 1, 1, 1, 1]}
    present = [columns[name[0]] for name in layers]
    assert history["present"].T.astype(int).tolist() == present
    assert (~np.isnan(history["norm"])).T.astype(int).tolist() == present
    assert not history["missing"].any()
    assert not monitor.issues
    assert history["numel"].tolist() == [16, 4, 12, 3, 0, 0]
    summary = monitor.get_gradient_summary()
    assert list(summary["parameters"]) == layers[:4]
    if options:
        assert history["update_ratio"][::2, 0].tolist()[1:] > [0, 0]
        assert history["histogram"].sum(-1)[:, 0].tolist() == [0, 16, 16, 16, 16, 16]


def test_a_parameter_that_the_optimizer_no_longer_trains_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 1))
    optimizer = sgd(model)
    text = re.escape("the model has replaced its parameters ['1.weight', '1.bias'], and the opt")
    with GradientMonitor(model, optimizer) as monitor:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        model[1] = nn.Linear(2, 1)
        before = copy.deepcopy(model.state_dict())
        for _ in range(2):
            model(torch.ones(1, 2)).sum().backward()
            with pytest.raises(ValueError, match=text):
                optimizer.step()
        assert all(
            torch.equal(a, b) for a, b in zip(before.values(), model.parameters(), strict=True)
        )
        optimizer.param_groups[0]["params"] = [*model.parameters()]
        expected = total(*model.parameters())
        optimizer.step()
    np.testing.assert_allclose(monitor.history["total_norm"][1:], expected, rtol=1e-5)
    with pytest.raises(ValueError, match="expected an optimizer of parameters of the model"):
        GradientMonitor(nn.Linear(2, 2), optimizer)


def test_a_history_is_loaded_by_name() -> None:
    a, b, c = torch.ones(2), torch.ones(3), torch.ones(4)
    before = look({"a": a, "b": b}, {"a": 2 * a, "b": None}, collect=["zero_fraction", "cosine"])
    model = holding(c=c, b=b)
    after = GradientMonitor(model, collect=["zero_fraction", "cosine"], histogram_every=1)
    after.load_state_dict(before.state_dict())
    with after:
        (2 * model.c.sum() + model.b.sum()).backward()
    history = after.history
    assert history["names"] == ["c", "b"]
    root = math.sqrt
    expected = [[np.nan, root(3)], [np.nan, np.nan], [4.0, root(3)]]
    np.testing.assert_allclose(history["norm"], expected)
    assert history["missing"].tolist() == [[False, False], [False, True], [False, False]]
    assert [issue.step for issue in after.issues] == [2]
    assert history["zero_fraction"][0, 1] == 0
    assert np.isnan(history["zero_fraction"][:2, 0]).all()


def compiled_inside(model: nn.Sequential) -> nn.Module:
    return nn.Sequential(*(torch.compile(layer, backend="eager") for layer in model))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by Dynamo
@pytest.mark.parametrize(
    "compiled", [lambda model: torch.compile(model, backend="eager"), compiled_inside]
)
def test_a_compiled_model_has_the_names_of_the_plain_one(compiled) -> None:
    """In every report, so that a history goes on after compiling and after loading uncompiled."""
    plain = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.Linear(2, 1))
    model, names = compiled(plain), [name for name, _ in plain.named_parameters()]
    assert missing_gradients(model) == names
    monitors = [GradientMonitor(model), GradientMonitor(plain), GradientMonitor(model)]
    for previous, monitor in zip([None, *monitors], monitors, strict=False):
        if previous is not None:
            monitor.load_state_dict(previous.state_dict())
        with monitor:
            model(torch.ones(1, 2)).sum().backward()
    assert monitors[-1].history["names"] == names
    assert monitors[-1].history["step"].tolist() == [1, 2, 3]
    assert monitors[-1].history["present"].all()
    assert [*get_gradient_norms(model)] == names
    assert [*compute_gradient_statistics(model)["parameters"]] == names
    with torch.no_grad():
        plain[1].weight[0, 0] = torch.nan
    report = NonFiniteGuard(model)(lambda: model(torch.ones(1, 2)).sum().backward())
    assert (report.phase, report.name) == ("parameter", "1.weight")


def test_the_first_cosine_after_loading_is_unknown() -> None:
    model = nn.Linear(2, 1)
    step = lambda: model(torch.tensor([[3.0, 4.0]])).sum().backward()  # noqa: E731
    before, after = (GradientMonitor(model, collect=["cosine"]) for _ in range(2))
    with before:
        step()
        step()
    after.load_state_dict(before.state_dict())
    with after:
        step()
        step()
    unknown = np.isnan(after.history["cosine"][:, 0])
    assert unknown.tolist() == [True, False, True, False]
    np.testing.assert_allclose(after.history["cosine"][~unknown], 1.0)


# --- optimizers in others


class Lookahead(torch.optim.Optimizer):
    """As in many repositories: it never calls `Optimizer.__init__`."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups = inner, inner.param_groups
        self.defaults, self.state = inner.defaults, inner.state
        self.zero_grad = inner.zero_grad

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


class Plain:
    """As Fabric's: no optimizer by class."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self._optimizer = inner

    def step(self) -> None:
        self._optimizer.step()

    def zero_grad(self) -> None:
        self._optimizer.zero_grad()


class SharpnessAware(torch.optim.Optimizer):
    """As published: two phases, and `step` itself is not called."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.inner, self.param_groups = inner, inner.param_groups

    def step(self, closure: Any = None) -> None:
        self.inner.step()

    @torch.no_grad()
    def first_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            self.state[p]["before"] = p.clone()
            p.add_(p.grad, alpha=0.1)
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for p in self.param_groups[0]["params"]:
            p.copy_(self.state[p]["before"])
        self.inner.step()


WRAPPERS = [Lookahead, Plain, SharpnessAware, lambda o: Lookahead(Lookahead(o))]


@pytest.mark.parametrize("wrap", WRAPPERS, ids=["lookahead", "plain", "two phases", "nested"])
def test_the_optimizer_inside_a_wrapper_is_watched(wrap: Any) -> None:
    model = mlp()
    inner = sgd(model)
    optimizer, expected = wrap(inner), []
    with GradientMonitor(model, optimizer) as monitor:
        for factor in (1.0, 1.0, math.nan):
            for phase in range(2):
                optimizer.zero_grad()
                (model(torch.randn(5, 8)).square().mean() * factor).backward()
                if phase == 0 and isinstance(optimizer, SharpnessAware):
                    optimizer.first_step()
            expected.append(total(*model.parameters()))
            optimizer.second_step() if hasattr(optimizer, "second_step") else optimizer.step()
    np.testing.assert_allclose(monitor.history["total_norm"], expected, rtol=1e-5)
    assert {issue.kind for issue in monitor.issues} == {"nan"}
    assert hooks_left(model, inner) == 0


def test_a_scaler_that_skips_a_wrapper_is_seen() -> None:
    model = nn.Linear(2, 1)
    optimizer, scaler = Lookahead(sgd(model)), torch.amp.GradScaler("cpu", init_scale=8.0)
    with GradientMonitor(model, optimizer, scaler) as monitor:
        for x in (1.0, math.inf):
            scaler.scale(model(torch.full((1, 2), x)).sum()).backward()
            scaler.unscale_(optimizer)
            monitor.look()
            scaler.step(optimizer)
            scaler.update()
            optimizer.inner.zero_grad()
    assert monitor.history["skipped"].tolist() == [False, True]
    assert monitor.history["total_norm"][0] == pytest.approx(3**0.5)


class Nothing(torch.optim.Optimizer):
    def __init__(self, *several: torch.optim.Optimizer) -> None:
        self.first, self.second = several


def test_a_wrapper_that_cannot_be_taken_apart_is_refused() -> None:
    model = nn.Linear(2, 1)
    text = (
        "got Nothing, which never called Optimizer.__init__; of a wrapper pass the optimizer inside"
    )
    with pytest.raises(TypeError, match=re.escape(text)):
        GradientMonitor(model, Nothing(sgd(model), sgd(model)))
    with pytest.raises(TypeError, match="got Plain; of a wrapper pass the optimizer inside"):
        GradientMonitor(model, Plain(3))


def test_an_optimizer_that_steps_a_part_of_its_parameters_by_another_is_watched_itself() -> None:
    model = mlp()
    optimizer = sgd(model)
    optimizer.part = torch.optim.SGD(model[0].parameters(), lr=0.1)
    with GradientMonitor(model, optimizer) as monitor:
        model(torch.randn(5, 8)).sum().backward()
        optimizer.step()
    assert len(monitor.history["names"]) == 6


# --- nobody attached it


@pytest.mark.parametrize("zero", [True, False])
def test_a_monitor_that_was_never_attached_says_so(zero: bool) -> None:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    monitor = GradientMonitor(model, optimizer)
    model(torch.full((2, 3), math.nan)).sum().backward()
    optimizer.step()
    if zero:
        optimizer.zero_grad()
    with pytest.warns(UserWarning, match="GradientMonitor: nothing was watched: the monitor was n"):
        issues = monitor.issues
    assert issues == []  # and warned of once
    assert "the monitor was never attached" in repr(monitor.issues)
    assert "the monitor was never attached" in repr(monitor.get_gradient_summary())
    assert "never attached" in repr(monitor)
    assert "no issues" not in repr(monitor)
    assert len(monitor.history["step"]) == 0
    with monitor:
        pass
    assert repr(monitor) == "GradientMonitor(2 parameters, 0 steps, no issues)"
    assert repr(monitor.issues) == "[]"
    assert repr(monitor.get_gradient_summary()) == "no gradients yet"


# --- vanishing


class Attention(nn.Module):
    """Softmax does not change with the bias of the keys, so that its gradient is zero."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.query(x), self.key(x), self.value(x))


@pytest.mark.parametrize("frozen", [False, True], ids=["all", "biases alone"])
def test_a_gradient_that_is_zero_by_construction_does_not_vanish(frozen: bool) -> None:
    torch.manual_seed(0)
    model = Attention().double()
    trained = [p for name, p in model.named_parameters() if name.endswith("bias") or not frozen]
    optimizer = torch.optim.Adam(trained, lr=1e-3)
    with GradientMonitor(model, optimizer) as monitor:
        for _ in range(6):
            model(torch.randn(4, 5, 8, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    key = monitor.history["names"].index("key.bias")
    assert (monitor.history["norm"][:, key] < 1e-10).all()
    assert monitor.issues == []


def vanishing(*rows: dict[str, float | None]) -> list[tuple[str, int]]:
    """The issues of a module `layer` with parameters of these gradients, step by step."""
    model = nn.ModuleDict({"layer": holding(**{name: torch.ones(1) for name in rows[0]})})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    with GradientMonitor(model, optimizer) as monitor:
        for row in rows:
            for name, value in row.items():
                grad = None if value is None else torch.full((1,), value)
                model["layer"].get_parameter(name).grad = grad
            optimizer.step()
    assert {issue.kind for issue in monitor.issues} <= {"vanishing", "missing"}
    return [
        (issue.parameter.removeprefix("layer."), issue.step)
        for issue in monitor.issues
        if issue.kind == "vanishing"
    ]


def test_what_vanishing_is() -> None:
    some, zero = {"w": 1.0, "b": 1.0}, {"w": 0.0, "b": 0.0}
    # All of a module: not before zero initialization may be over.
    assert vanishing(zero, zero) == []
    assert vanishing(zero, zero, zero, zero) == [("w", 3), ("b", 3)]
    assert vanishing(zero, zero, some, some) == []
    # One that has fallen, at any step, and once for as long as it lasts.
    assert vanishing(some, {"w": 0.0, "b": 1.0}, {"w": 0.0, "b": 1.0}) == [("w", 2)]
    # One that never was there, while others of its module are.
    assert vanishing(*[{"w": 1.0, "b": 0.0}] * 5) == []
    assert vanishing(*[{"w": None, "b": 0.0}] * 5) == []
    # Rounding of the module's other gradients is not one that was there.
    assert vanishing(*[{"w": 1.0, "b": noise} for noise in (5e-8, 5e-9, 5e-8, 5e-9)]) == []
    # The whole module, after one of them had been there.
    assert vanishing({"w": 1.0, "b": 0.0}, zero, zero) == [("w", 2), ("b", 3)]


@pytest.mark.parametrize("froze_at", [0, 3])
def test_a_frozen_parameter_with_zeros_does_not_vanish(froze_at: int) -> None:
    """The zeros that `zero_grad(set_to_none=False)` leaves; they are recorded all the same."""
    model = mlp()
    optimizer = sgd(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    with GradientMonitor(model, optimizer) as monitor:
        for step in range(6):
            if step == froze_at:
                model[0].requires_grad_(False)
            model(torch.randn(5, 8)).sum().backward()
            if step == 5:
                model[0].weight.grad[0, 0] = 2.0  # the optimizer would apply it
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
    assert monitor.issues == []
    history = monitor.history
    assert history["present"].all()
    assert not history["missing"].any()
    assert (history["norm"][froze_at:5, :2] == 0).all()
    np.testing.assert_allclose(history["norm"][5, :2], [2.0, 0.0], rtol=1e-6)


# --- beside a guard


def refused_at(step: int) -> tuple[nn.Module, NonFiniteGuard, Callable[[int], Callable[[], None]]]:
    torch.manual_seed(0)
    model = nn.Linear(2, 1)

    def make(i: int) -> Callable[[], None]:
        x = torch.full((1, 2), torch.nan if i == step else 1.0)
        return lambda: model(x).sum().backward()

    return model, NonFiniteGuard(model), make


def test_the_replay_of_a_guard_is_no_step() -> None:
    model, guard, make = refused_at(2)
    with GradientMonitor(model) as monitor:
        for i in (1, 2, 3):
            assert (guard(make(i)) is None) == (i != 2)
            model.zero_grad()
        assert find_nonfinite(model, make(1)) is None
    assert monitor.history["step"].tolist() == [1, 2, 3]
    assert np.isnan(monitor.history["total_norm"]).tolist() == [False, True, False]


def test_a_step_that_a_guard_refused_is_recorded_as_skipped_without_a_norm() -> None:
    model, guard, make = refused_at(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientMonitor(model, optimizer) as monitor:
        for i in (1, 2, 3):
            if guard(make(i)) is None:
                optimizer.step()
            else:
                monitor.look(skipped=True)
            optimizer.zero_grad()
    assert monitor.history["step"].tolist() == [1, 2, 3]
    assert monitor.history["skipped"].tolist() == [False, True, False]
    assert np.isnan(monitor.history["total_norm"]).tolist() == [False, True, False]
    assert not monitor.issues
