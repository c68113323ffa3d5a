"""Sharded gradients in two processes: their statistics are those of the whole model in one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cases import reference
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from autograd_lib import compute_gradient_statistics, get_gradient_norms


def sharded_gradients_have_their_global_values(rank: int, _: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    # Widths that two ranks share unevenly, one parameter that the second rank has nothing of.
    model = nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 1))
    x = torch.randn(2, 6, 8)
    for part in x:
        model(part).square().mean().backward()
    for p in model.parameters():
        p.grad /= 2
    expected = compute_gradient_statistics(model)

    model.zero_grad()
    fully_shard(model, mesh=mesh)
    model(x[rank]).square().mean().backward()
    assert isinstance(next(model.parameters()).grad, DTensor)
    got = compute_gradient_statistics(model)
    assert got["total_norm"] == pytest.approx(expected["total_norm"], rel=1e-5)
    for name, entry in expected["parameters"].items():
        assert got["parameters"][name] == pytest.approx(entry, rel=1e-5, abs=1e-7), name
    assert get_gradient_norms(model) == pytest.approx(
        {n: e["norm"] for n, e in expected["parameters"].items()}, rel=1e-5
    )

    whole = torch.arange(6.0).reshape(3, 2)
    half = whole / 2
    for placement, local in {
        Shard(0): whole[:2] if rank == 0 else whole[2:],
        Replicate(): whole,
        Partial(): half,
    }.items():
        grad = DTensor.from_local(
            local, mesh, [placement], shape=whole.shape, stride=whole.stride()
        )
        layer = nn.Module()
        layer.w = nn.Parameter(
            DTensor.from_local(
                torch.zeros_like(local), mesh, [placement], shape=whole.shape, stride=whole.stride()
            )
        )
        layer.w.grad = grad
        entry = compute_gradient_statistics(layer)["parameters"]["w"]
        assert entry == pytest.approx(reference(whole)), placement


SCENARIOS = {"global values": sharded_gradients_have_their_global_values}
