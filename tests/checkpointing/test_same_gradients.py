"""No plan changes a gradient: every mode, plan and stored setting, with everything that draws."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autograd_lib import CheckpointPlan, Settings, plan_checkpoints

with warnings.catch_warnings():  # compiling imports it, and it is deprecated itself
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch.utils.mkldnn

WIDTH = 8


class Dropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(F.gelu(x)).sin()


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, dropout=0.3, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0].sin()


class Fused(nn.Module):
    """The attention of today's models, whose dropout is a number."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_dropout = 0.3

    def forward(self, x: Tensor) -> Tensor:
        p = self.attention_dropout if self.training else 0.0
        return F.scaled_dot_product_attention(x, x.sin(), x, dropout_p=p).sin()


class Path(nn.Module):
    """Drops whole samples, by functions only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x.sin()
        return x.sin() * (torch.rand(len(x), 1, 1, dtype=x.dtype) < 0.7)


KINDS: dict[str, type[nn.Module]] = {
    "dropout": Dropped,
    "attention": Attention,
    "fused attention": Fused,
    "RReLU": nn.RReLU,
    "drop path": Path,
}


class Block(nn.Module):
    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm, self.layer = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH)
        self.inner = KINDS[kind]()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.layer(self.norm(x)))


class Loop(nn.Module):
    def __init__(self, blocks: nn.ModuleList) -> None:
        super().__init__()
        self.blocks = blocks

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def make(kinds: list[str], looped: bool = False) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    blocks = [Block(kind) for kind in kinds]
    sequence = nn.Sequential(*blocks)
    model = Loop(nn.ModuleList(blocks)) if looped else nn.ModuleDict({"blocks": sequence})
    x = torch.randn(6, 5, WIDTH, dtype=torch.float64)
    return model.double(), model.blocks if looped else sequence, x


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    run = model if isinstance(model, Loop) else model["blocks"]
    return run(x).square().sum()


def gradient(model: nn.Module, x: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss_of(model, x), list(model.parameters()))
    return [g.clone() for g in found]


def by_differences(model: nn.Module, x: Tensor, found: list[Tensor]) -> float:
    """Relative error of the derivative along one direction, at one seed."""
    parameters = list(model.parameters())
    torch.manual_seed(5)
    directions = [torch.randn_like(p) for p in parameters]
    start, values = [p.detach().clone() for p in parameters], []
    for move in (1e-6, -1e-6, 0):  # there, to the other side, and back
        with torch.no_grad():
            for p, value, v in zip(parameters, start, directions, strict=True):
                p.copy_(value + move * v)
            values.append(loss_of(model, x).item())
    expected = (values[0] - values[1]) / 2e-6
    product = sum((g * v).sum() for g, v in zip(found, directions, strict=True))
    return abs(float(product) - expected) / abs(expected)


def every_way(plan: CheckpointPlan, model: nn.Module) -> Iterator[str]:
    """Apply each plan in turn, itself and from stored settings; also steps that no plan chose."""
    count = len(plan.steps)
    schedules = {steps for _, _, steps in plan._frontier}
    schedules |= {(name,) * count for name in ("recompute", "selective")}
    for steps in schedules:
        chosen = replace(plan, steps=steps)
        chosen.apply(model)
        yield f"plan {steps}"
        stored = Settings(checkpoint=chosen.locate(model))
        Settings(checkpoint={"blocks": "save"}).apply(model)
        stored.apply(model)
        yield f"settings {steps}"


@pytest.mark.parametrize("looped", [False, True], ids=["sequence", "list"])
@pytest.mark.parametrize("planned", ["train", "eval"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_plan(kind: str, planned: str, looped: bool) -> None:
    """Equal to the plain gradient to the bit, in both modes, whatever the mode of planning."""
    model, blocks, x = make([kind] * 3, looped)
    expected = {}
    for mode in (True, False):
        expected[mode] = gradient(model.train(mode), x)
        assert by_differences(model, x, expected[mode]) < 1e-6
    assert not all(map(torch.equal, expected[True], expected[False]))
    model.train(planned == "train")
    plan = plan_checkpoints(blocks, lambda: loss_of(model, x), 10**9)
    for way in every_way(plan, model):
        for mode in (True, False):
            found = gradient(model.train(mode), x)
            assert all(map(torch.equal, found, expected[mode])), (way, mode)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("planned", ["train", "eval"])
@pytest.mark.parametrize("kind", ["fused attention", "drop path"])
def test_every_plan_of_compiled_blocks(kind: str, planned: str) -> None:
    """Compiled code draws other numbers; finite differences at one seed are the referee."""
    torch._dynamo.reset()
    model, blocks, x = make([kind] * 2)
    for block in blocks:
        block.compile()
    model.train(planned == "train")
    plan = plan_checkpoints(blocks, lambda: loss_of(model, x), 10**9)
    model.train()
    for steps in {plan._frontier[0][2], ("selective", "selective")}:
        chosen = replace(plan, steps=steps)
        for apply in (chosen.apply, Settings(checkpoint=chosen.locate(model)).apply):
            apply(model)
            for _ in range(2):  # what only functions draw is seen at the first step
                assert by_differences(model, x, gradient(model, x)) < 1e-6, steps
    assert by_differences(model.eval(), x, gradient(model, x)) < 1e-6
