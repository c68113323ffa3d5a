"""What two processes must be told of a NaN: on which rank it began, and all else as it was."""

from __future__ import annotations

from functools import partial
from pathlib import Path

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


SCENARIOS = {kind: partial(the_rank_where_it_began_is_found, kind) for kind in ("ddp", "fsdp")}
