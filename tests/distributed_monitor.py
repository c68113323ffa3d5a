"""What two processes must see of a monitor: the values of one process, on every rank.

`test_distributed.py` runs each scenario in both processes, in a process group of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from autograd_lib import GradientMonitor

SCENARIOS: dict[str, Callable[[int, Path], None]] = {}
PLAIN = ("norm", "mean", "std", "min", "max", "abs_max")
EVERYTHING = {
    "collect": ("zero_fraction", "nan_count", "inf_count", "cosine"),
    "update_every": 1,
    "histogram_every": 1,
}


def scenario(run: Callable[[int], None]) -> Callable[[int], None]:
    SCENARIOS[run.__name__] = lambda rank, _: run(rank)
    return run


def model() -> nn.Module:
    """Layers that two ranks share unevenly: of the last one the second rank has nothing."""
    torch.manual_seed(0)
    return nn.Sequential(
        *[nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 2501), nn.Tanh(), nn.Linear(2501, 1)]
    )


def batches(steps: int = 3, micro_batches: int = 1) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(steps, micro_batches, 2, 6, 8)  # [..., rank, sample, feature]


def adam(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(module.parameters(), lr=0.01)


def train(
    module: nn.Module,
    optimizer: torch.optim.Optimizer,
    inputs: Iterator[Tensor] | Tensor,
    no_sync: Callable[[], Any] = nullcontext,
) -> None:
    """A step for each of `inputs` [steps, micro-batches, samples, features]."""
    for micro_batches in inputs:
        for i, x in enumerate(micro_batches):
            with no_sync() if i + 1 < len(micro_batches) else nullcontext():
                module(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def one_process(inputs: Tensor, **options: Any) -> dict[str, Any]:
    """The history of one process that has the samples of both ranks."""
    whole = model()
    optimizer = adam(whole)
    with GradientMonitor(whole, optimizer, **options) as monitor:
        train(whole, optimizer, inputs.flatten(2, 3))
    return monitor.history


def same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    """Compare histories; sums come in another order, and small gradients of Adam amplify it."""
    names = [name.removeprefix("module.") for name in got["names"]]
    assert names == expected["names"], names
    assert got.keys() == expected.keys()
    for key in got.keys() - {"names", "histogram"}:
        atol = 2e-5 * expected["abs_max"].max() if key in PLAIN else 1e-4
        np.testing.assert_allclose(got[key], expected[key], rtol=1e-3, atol=atol, err_msg=key)
    if "histogram" in got:
        assert got["histogram"].sum(-1).tolist() == expected["histogram"].sum(-1).tolist()
        moved = np.abs(got["histogram"] - expected["histogram"]).sum(-1)
        assert (moved <= 2 + 0.02 * expected["numel"]).all(), moved


def on_all_ranks(history: dict[str, Any]) -> None:
    """Every rank has seen the very same numbers."""
    for key, value in history.items():
        seen: list[Any] = [None, None]
        dist.all_gather_object(seen, value)
        np.testing.assert_array_equal(seen[0], seen[1], err_msg=key)


class Collectives(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace in {"c10d", "_c10d_functional"}:
            self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@contextmanager
def bit_equal(make: Callable[[], nn.Module], run: Callable[[nn.Module], Any]) -> Iterator[Any]:
    """Give what a run under a monitor returned; without one it trains the same parameters."""
    watched, alone = make(), make()
    yield run(watched, True)
    run(alone, False)
    for one, other in zip(watched.parameters(), alone.parameters(), strict=True):
        assert torch.equal(local(one), local(other))


def local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def watch(on: bool, *args: Any, **options: Any) -> Any:
    return GradientMonitor(*args, **options) if on else nullcontext()


# --- DistributedDataParallel


@scenario
def ddp(rank: int) -> None:
    inputs = batches(micro_batches=2)

    def run(module: nn.Module, on: bool) -> Any:
        optimizer = adam(module)
        with watch(on, module, optimizer, **EVERYTHING) as monitor:
            train(module, optimizer, inputs[:, :, rank], module.no_sync)
        return monitor

    with bit_equal(lambda: DistributedDataParallel(model()), run) as monitor:
        same(monitor.history, one_process(inputs, **EVERYTHING))
        on_all_ranks(monitor.history)


@scenario
def ddp_without_optimizer(rank: int) -> None:
    """A backward ends when its gradients have been averaged."""
    inputs = batches()
    expected = one_process(inputs[:1])
    for bucket_view in (False, True):
        module = DistributedDataParallel(model(), gradient_as_bucket_view=bucket_view)
        with GradientMonitor(module) as monitor:
            module(inputs[0, 0, rank]).square().mean().backward()
        same(monitor.history, expected)
        on_all_ranks(monitor.history)


@scenario
def ddp_noise(rank: int) -> None:
    """What was averaged over the processes has half the variance, what is still local has not."""
    torch.manual_seed(0)
    module = DistributedDataParallel(nn.Linear(3, 1, bias=False))
    optimizer = torch.optim.SGD(module.parameters(), lr=0.0)
    schedules = [[False, True], [True, True], [False, True, False]]
    with GradientMonitor(module, optimizer, noise=True) as monitor:
        for synced in schedules:
            for sync in synced:
                with nullcontext() if sync else module.no_sync():
                    module(torch.randn(4, 3)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    records = monitor._record.rings["noise"].values[:7]
    expected = [(1, 1), (2, 1), (1, 0.5), (2, 1), (1, 1), (2, 1), (3, 2)]
    assert [tuple(record[:2].tolist()) for record in records] == expected


# --- fully_shard


@scenario
def fsdp(rank: int) -> None:
    inputs = batches()
    for options in ({}, EVERYTHING):

        def run(module: nn.Module, on: bool, options: dict[str, Any] = options) -> Any:
            fully_shard(module)
            optimizer = adam(module)
            with watch(on, module, optimizer, **options) as monitor:
                train(module, optimizer, inputs[:, :, rank])
            return monitor

        with bit_equal(model, run) as monitor:
            same(monitor.history, one_process(inputs, **options))
            on_all_ranks(monitor.history)


@scenario
def fsdp_accumulates(rank: int) -> None:
    """Of micro-batches whose gradients are not reduced there is no `.grad` until the last."""
    inputs = batches(micro_batches=2)
    for reduce_all in (True, False):
        sharded = fully_shard(model())
        optimizer = adam(sharded)
        with GradientMonitor(sharded, optimizer, noise=True) as monitor:
            for micro_batches in inputs[:, :, rank]:
                for i, x in enumerate(micro_batches):
                    sharded.set_requires_gradient_sync(reduce_all or i == 1)
                    sharded(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        same(monitor.history, one_process(inputs))
        on_all_ranks(monitor.history)
        if reduce_all:
            records = monitor._record.rings["noise"].values[:6]
            assert records[:, :2].tolist() == [[1, 0.5], [2, 1]] * 3, records
            totals = monitor.history["total_norm"]
            np.testing.assert_allclose(records[1::2, 2], totals**2, rtol=1e-5)
            assert monitor.noise_scale(6).steps == 3
        else:
            with pytest.raises(ValueError, match="got 0 such steps"):
                monitor.noise_scale(6)


@scenario
def fsdp_without_optimizer(rank: int) -> None:
    inputs = batches()
    module = model()
    for layer in module:
        fully_shard(layer)
    sharded = fully_shard(module)
    with GradientMonitor(sharded) as monitor:
        sharded(inputs[0, 0, rank]).square().mean().backward()
    same(monitor.history, one_process(inputs[:1]))
    on_all_ranks(monitor.history)


@scenario
def fsdp_costs_one_collective(rank: int) -> None:
    inputs = batches()
    sharded = fully_shard(model())
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.01)
    counts = []
    for on in (False, True, True):
        with watch(on, sharded, optimizer):
            sharded(inputs[0, 0, rank]).square().mean().backward()
            with Collectives() as found:
                optimizer.step()
            counts.append(len(found.names))
    assert counts == [0, 1, 1], counts


@scenario
def fsdp_after_the_monitor_was_made(rank: int) -> None:
    inputs = batches()
    module = model()
    monitor = GradientMonitor(module, history=5)
    with torch.no_grad():
        fully_shard(module)
    with monitor:
        module(inputs[0, 0, rank]).square().mean().backward()
    same(monitor.history, one_process(inputs[:1]))


@scenario
def fsdp_scaler(rank: int) -> None:
    inputs = batches()
    sharded = fully_shard(model())
    optimizer = torch.optim.SGD(sharded.parameters(), lr=0.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    with GradientMonitor(sharded, optimizer, scaler) as monitor:
        for step in range(3):
            loss = sharded(inputs[0, 0, rank]).square().mean()
            scaler.scale(loss * (math.inf if step == 1 else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
    history = monitor.history
    assert history["skipped"].tolist() == [False, True, False]
    expected = one_process(inputs[:1])
    for row in (0, 2):
        np.testing.assert_allclose(history["norm"][row], expected["norm"][0], rtol=1e-4)
        np.testing.assert_allclose(history["std"][row], expected["std"][0], rtol=1e-4)


@scenario
def fsdp_parts_without_gradient(rank: int) -> None:
    inputs = batches()
    module = model()
    module.unused = nn.Linear(3, 3)
    module[0].requires_grad_(False)
    for layer in module.children():
        fully_shard(layer)
    fully_shard(module)
    optimizer = torch.optim.SGD(list(module.parameters()), lr=0.0)
    with GradientMonitor(module, optimizer, **EVERYTHING) as monitor:
        for _ in range(2):
            x = inputs[0, 0, rank]
            for layer in list(module)[:5]:
                x = layer(x)
            x.square().mean().backward()
            optimizer.step()
    history = monitor.history
    names = history["names"]
    missing = [name for name, m in zip(names, history["missing"][0], strict=True) if m]
    assert missing == ["unused.weight", "unused.bias"]
    kept = [names.index(name) for name in ("2.weight", "2.bias", "4.weight", "4.bias")]
    expected = one_process(inputs[:1])
    for key in PLAIN:
        got = history[key][0, kept]
        np.testing.assert_allclose(got, expected[key][0, 2:], rtol=1e-4, atol=1e-6, err_msg=key)
    assert np.isnan(np.delete(history["norm"][0], kept)).all()
    on_all_ranks(history)


@scenario
def fsdp_looked_at_before_clipping(rank: int) -> None:
    def run(module: nn.Module, inputs: Tensor) -> dict[str, Any]:
        optimizer = adam(module)
        with GradientMonitor(module, optimizer) as monitor:
            for x in inputs:
                module(x).square().mean().backward()
                monitor.look()
                nn.utils.clip_grad_norm_(module.parameters(), 0.01)
                optimizer.step()
                optimizer.zero_grad()
        return monitor.history

    inputs = batches()[:, 0]
    expected, sharded = (
        run(model(), inputs.flatten(1, 2)),
        run(fully_shard(model()), inputs[:, rank]),
    )
    np.testing.assert_allclose(sharded["total_norm"], expected["total_norm"], rtol=1e-4)
    np.testing.assert_allclose(expected["clipped_norm"], 0.01, rtol=1e-3)
    np.testing.assert_allclose(sharded["clipped_norm"], expected["clipped_norm"], rtol=1e-4)
    on_all_ranks(sharded)


@scenario
def hsdp(rank: int) -> None:
    """Replicated along one dimension of the mesh, sharded along the other."""
    inputs = batches()
    for shape in ((2, 1), (1, 2)):
        mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
        sharded = fully_shard(model(), mesh=mesh)
        optimizer = adam(sharded)
        with GradientMonitor(sharded, optimizer, **EVERYTHING) as monitor:
            train(sharded, optimizer, inputs[:, :, rank])
        same(monitor.history, one_process(inputs, **EVERYTHING))
        on_all_ranks(monitor.history)


@scenario
def tensor_parallel(rank: int) -> None:
    """Sharded, replicated and partial gradients on one mesh, beside a plain one."""
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2,))
    whole = {name: torch.randn(7, 3) for name in ("rows", "columns", "replica", "partial", "plain")}
    pieces = {
        "rows": (Shard(0), whole["rows"].chunk(2)[rank]),
        "columns": (Shard(1), whole["columns"].chunk(2, 1)[rank].contiguous()),
        "replica": (Replicate(), whole["replica"]),
        "partial": (Partial(), whole["partial"] * (0.25 if rank else 0.75)),
    }
    module, plain = nn.Module(), nn.Module()
    for name, grad in whole.items():
        setattr(plain, name, nn.Parameter(torch.ones(7, 3)))
        getattr(plain, name).grad = grad.clone()
        if name not in pieces:
            setattr(module, name, copy.deepcopy(getattr(plain, name)))
            getattr(module, name).grad = grad.clone()
            continue
        placement, piece = pieces[name]
        laid_out = lambda values, placement: DTensor.from_local(  # noqa: E731
            values, mesh, [placement], shape=(7, 3), stride=(3, 1)
        )
        kept = Replicate() if placement.is_partial() else placement
        parameter = nn.Parameter(laid_out(torch.ones_like(piece), kept))
        parameter.grad = laid_out(piece, placement)
        setattr(module, name, parameter)
    histories = []
    for watched in (module, plain):
        optimizer = torch.optim.SGD(watched.parameters(), lr=0.0, foreach=False)
        with GradientMonitor(watched, optimizer, **{**EVERYTHING, "update_every": 0}) as monitor:
            optimizer.step()
            optimizer.step()
        histories.append(monitor.history)
    same(*histories)
    on_all_ranks(histories[0])
