"""What two processes must be told of a NaN or a spike, and all else as it was."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from autograd_lib.nonfinite.guard import NonFiniteGuard, find_nonfinite


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4))
    if kind == "ddp":
        return DistributedDataParallel(model)
    fully_shard(model[0])
    return fully_shard(model)


def local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def the_rank_where_it_began_is_found(kind: str, rank: int, _: Path) -> None:
    model = make(kind)
    guard = NonFiniteGuard(model)

    def step(value: float = 0.0, on: int = 1) -> Tensor:
        x = torch.ones(3, 4) * (rank + 1)
        y = model(x)
        if rank == on:
            y = y + (torch.zeros(()) + value).log() * 0
        loss = y.square().mean()
        loss.backward()
        return loss

    def result() -> list[Tensor]:
        grads = [local(p.grad).clone() for p in model.parameters()]
        model.zero_grad()
        return grads

    step(1.0)
    expected = result()
    assert guard(lambda: step(1.0)) is None
    assert all(torch.equal(a, b) for a, b in zip(result(), expected, strict=True))
    for look in (guard, partial(find_nonfinite, model)):
        found = look(lambda: step(-1.0))
        assert (found.phase, found.kind, found.op) == ("forward", "nan", "aten.log.default"), found
        assert found.detail.endswith("on rank 1"), found
        assert all(p.grad is None for p in model.parameters())
    assert guard(lambda: step(1.0)) is None
    assert all(torch.equal(a, b) for a, b in zip(result(), expected, strict=True))

    def only_the_loss() -> Tensor:  # of one rank, and no gradient
        loss = step(1.0).detach()
        return (loss - 1e9).log() if rank == 1 else loss

    found = guard(only_the_loss)
    assert (found.phase, found.op) == ("forward", "aten.log.default"), found
    if kind == "fsdp":  # the shard of one rank is broken
        with torch.no_grad():
            if rank == 1:
                local(model[2].weight).fill_(torch.nan)
        found = guard(lambda: step(1.0))
        assert (found.phase, found.name) == ("parameter", "2.weight"), found


def a_nan_that_raises_is_noted_and_no_rank_waits(kind: str, rank: int, _: Path) -> None:
    """Each rank explains its own exception: another one may wait elsewhere, or be gone."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
    model = DistributedDataParallel(inner) if kind == "ddp" else fully_shard(inner)
    guard = NonFiniteGuard(model)
    x = torch.arange(12.0).view(3, 4)

    def step(bad: bool, where: str = "forward") -> Tensor:
        y = model(x)
        loss = (y.abs() * (-1 if bad else 1)).log().mean()
        if where == "backward":
            loss.backward()
        if loss.isnan():
            raise ValueError("planted")
        loss.backward()
        return loss

    def raises(*args: object) -> str:
        before = [b.clone() for b in model.buffers()]
        with pytest.raises(ValueError, match="planted") as raised:
            guard(lambda: step(*args))
        assert all(p.grad is None for p in model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(model.buffers(), before, strict=True))
        return "".join(getattr(raised.value, "__notes__", ["none"]))

    for _ in range(2):  # after its first backward DDP arranges its buckets anew
        assert guard(lambda: step(False)) is None
        model.zero_grad()
    for where in ("forward", "backward"):
        # After backward FSDP2 would have to gather the parameters again.
        alone = kind == "ddp" or where == "forward"
        expected = "NaN made in forward by aten.log.default" if alone else "none"
        assert raises(True, where).startswith(expected), where
        assert guard(lambda: step(False)) is None
        model.zero_grad()
    with torch.no_grad():
        local(inner[2].bias).fill_(torch.nan)
    assert raises(False).startswith("NaN in parameter")


def a_spike_is_refused_on_all_ranks(kind: str, rank: int, _: Path) -> None:
    model = make(kind)
    guard, named = NonFiniteGuard(model, spike_above=5.0), [*model.named_parameters()]

    def step(factor: float) -> Tensor:
        loss = (model(torch.ones(3, 4)) * (factor if rank == 1 else 1.0)).sum()
        loss.backward()
        return loss

    for _ in range(20):
        assert guard(lambda: step(1.0)) is None
        grads = {n: getattr(p.grad, "full_tensor", lambda p=p: p.grad)() for n, p in named}
        norm = torch.nn.utils.get_total_norm(grads.values()).item()
        model.zero_grad()
    found = guard(lambda: step(100.0))
    assert (found.phase, found.kind) == ("backward", "spike"), found
    assert f"is 50.5 times the median {norm:.3g} of the last 20 steps" in found.detail, found
    assert found.name == max(grads, key=lambda name: grads[name].norm())
    everywhere = [None, None]
    torch.distributed.all_gather_object(everywhere, repr(found))
    assert everywhere[0] == everywhere[1]
    assert all(p.grad is None for p in model.parameters())
    assert guard(lambda: step(1.0)) is None


SCENARIOS = {
    f"{kind}, {run.__name__}": partial(run, kind)
    for kind in ("ddp", "fsdp")
    for run in (
        the_rank_where_it_began_is_found,
        a_nan_that_raises_is_noted_and_no_rank_waits,
        a_spike_is_refused_on_all_ranks,
    )
}
