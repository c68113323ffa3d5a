"""Checkpoint plans: bytes as predicted, models untouched, traps found, errors with a remedy."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import re
import warnings
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from autograd_lib import CheckpointPlan, Settings, peak_bytes, plan_checkpoints
from autograd_lib.checkpointing.solver import length

PLENTY = 10**12
ROWS = 2048


# Models, each with its chain and its sample


@dataclass
class Case:
    """A model, its chain, and a sample: the input of the chain or a function for the loss."""

    model: nn.Module
    blocks: Any
    sample: Any

    def step(self) -> Tensor:
        return self.blocks(self.sample).sum() if isinstance(self.sample, Tensor) else self.sample()

    def run(self) -> None:
        """One whole step, which leaves nothing."""
        self.step().backward()
        self.model.zero_grad()
        if isinstance(self.sample, Tensor):
            self.sample.grad = None

    def plan(self, budget: int = PLENTY, **options: Any) -> CheckpointPlan:
        return plan_checkpoints(self.blocks, self.sample, budget, **options)


def layer(width: int = 32, out: int | None = None) -> nn.Sequential:
    return nn.Sequential(nn.Linear(width, out or width), nn.Tanh())


def mlp(depth: int = 6, width: int = 32, rows: int = ROWS) -> Case:
    model = nn.Sequential(*[layer(width) for _ in range(depth)])
    return Case(model, model, torch.randn(rows, width))


def flat() -> Case:
    """Layers as they come, which differ in what they keep."""
    model = nn.Sequential(
        *[m for _ in range(3) for m in (nn.Linear(64, 64), nn.ReLU(), nn.Dropout(0.2))]
    )
    return Case(model, model, torch.randn(2 * ROWS, 64))


def cnn() -> Case:
    """BatchNorm, changes in place, pooling, views."""
    model = nn.Sequential(
        *[nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.MaxPool2d(2)],
        *[nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(inplace=True)],
        *[nn.Identity(), nn.Flatten(), nn.Linear(16 * 64, 10)],
    )
    return Case(model, model, torch.randn(32, 3, 16, 16))


def views() -> Case:
    model = nn.Sequential(
        *[nn.Linear(32, 64), nn.Unflatten(1, (8, 8)), nn.Tanh(), nn.Identity(), nn.Flatten()],
        *[nn.Linear(64, 64), nn.ReLU(inplace=True), nn.Linear(64, 64), nn.Dropout(0.3, True)],
        *[nn.Linear(64, 8), nn.LogSoftmax(-1)],
    )
    return Case(model, model, torch.randn(ROWS, 32))


class Attention(nn.Module):
    """A block of a transformer that takes a mask and, for cross-attention, a memory."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, dropout=0.1, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.rest = nn.Sequential(
            *[nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU()],
            *[nn.Linear(4 * width, width), nn.Dropout(0.1)],
        )

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, memory: Tensor | None = None
    ) -> Tensor:
        y = self.norm(x)
        seen = y if memory is None else memory
        y, _ = self.attention(y, seen, seen, attn_mask=mask, need_weights=False)
        x = x + y
        return x + self.rest(x)


class LanguageModel(nn.Module):
    """An embedding that is the output projection too."""

    def __init__(self, width: int = 32, depth: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(64, width)
        self.encoder = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Attention(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, 64, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor, memory: Tensor | None = None) -> Tensor:
        x = self.embedding(tokens)
        mask = torch.full((tokens.shape[1],) * 2, -torch.inf).triu(1)
        for block in self.blocks:
            x = block(x, mask, memory=memory)
        return self.head(self.norm(x))


def language_model(dtype: torch.dtype | None = None, depth: int = 3) -> Case:
    model = LanguageModel(depth=depth)
    tokens = torch.randint(0, 64, (8, 48))

    def loss() -> Tensor:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            logits = model(tokens)
        return F.cross_entropy(logits.float().flatten(0, 1), tokens.flatten())

    return Case(model, model.blocks, loss)


def encoded(learned: bool) -> Case:
    """Cross-attention to a memory, constant or with a gradient from every block."""
    model = LanguageModel()
    tokens, source = torch.randint(0, 64, (8, 48)), torch.randn(8, 48, 32)

    def loss() -> Tensor:
        memory = model.encoder(source) if learned else source
        return F.cross_entropy(model(tokens, memory).flatten(0, 1), tokens.flatten())

    return Case(model, model.blocks, loss)


def frozen(*indices: int) -> Case:
    case = mlp()
    for index in indices:
        case.model[index].requires_grad_(False)
    return case


def shared(width: int = 32, rows: int = ROWS) -> Case:
    case = mlp(5, width, rows)
    case.model[3][0].weight = case.model[1][0].weight
    return case


def needing_gradient() -> Case:
    case = mlp()
    case.sample.requires_grad_()
    return case


def embedding(sparse: bool) -> Case:
    model = nn.Sequential(nn.Embedding(100, 32, sparse=sparse), *[layer() for _ in range(4)])
    return Case(model, model, torch.randint(0, 100, (64, 64)))


class DoubledExp(torch.autograd.Function):
    """Keeps an intermediate result."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.exp()
        ctx.save_for_backward(y)
        return y * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return gradient * y * 2


class WithFunction(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        return DoubledExp.apply(-torch.tanh(self.linear(x)))


def custom_function() -> Case:
    model = nn.Sequential(*[WithFunction() for _ in range(4)])
    return Case(model, model, torch.randn(ROWS, 32))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(16, 16, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def recurrent() -> Case:
    model = nn.Sequential(*[Recurrent() for _ in range(3)])
    return Case(model, model, torch.randn(64, 12, 16))


def single() -> Case:
    model = nn.Sequential(
        nn.Sequential(nn.Linear(32, 256), nn.Tanh(), nn.Linear(256, 32), nn.Tanh())
    )
    return Case(model, model, torch.randn(ROWS, 32))


def between_head_and_tail(skip: bool = False) -> Case:
    """The chain in the middle of a model, also with a path around it."""
    blocks = nn.Sequential(*[layer() for _ in range(4)])
    model = nn.ModuleDict(
        {"stem": nn.Linear(16, 32), "blocks": blocks, "head": nn.Linear(32, 4 if skip else 200)}
    )
    x, classes = torch.randn(ROWS, 16), torch.randint(0, 4, (ROWS,))

    def loss() -> Tensor:
        y = torch.tanh(model["stem"](x))
        y = y + blocks(y) if skip else blocks(y)
        return F.cross_entropy(model["head"](y), classes)

    return Case(model, blocks, loss)


def reparametrized(how: Callable[[nn.Module], nn.Module]) -> Case:
    model = nn.Sequential(*[nn.Sequential(how(nn.Linear(32, 32)), nn.Tanh()) for _ in range(4)])
    return Case(model, model, torch.randn(ROWS, 32))


def repeated() -> Case:
    """One activation that stands in the chain several times."""
    relu = nn.ReLU()
    model = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(32, 32), relu)])
    return Case(model, model, torch.randn(ROWS, 32))


def autocast_mlp(case: Case) -> Case:
    """Without a gradient of the input only the cache of casts keeps the first block's weight."""
    x = case.sample

    def loss() -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return case.model(x).float().sum()

    return Case(case.model, case.model, loss)


CASES: dict[str, Callable[[], Case]] = {
    "mlp": mlp,
    "flat": flat,
    "cnn": cnn,
    "views": views,
    "language model": language_model,
    "bf16": lambda: language_model(torch.bfloat16),
    "fp16": lambda: language_model(torch.float16, depth=2),
    "bf16 mlp": lambda: autocast_mlp(mlp(4, 64, ROWS)),
    "constant memory": lambda: encoded(learned=False),
    "frozen": lambda: frozen(2, 3),
    "frozen first": lambda: frozen(0, 1),
    "shared": shared,
    "sample with gradient": needing_gradient,
    "embedding": lambda: embedding(sparse=False),
    "sparse gradient": lambda: embedding(sparse=True),
    "custom function": custom_function,
    "recurrent": recurrent,
    "single": single,
    "head and tail": between_head_and_tail,
    "spectral norm": lambda: reparametrized(parametrizations.spectral_norm),
    "weight norm": lambda: reparametrized(parametrizations.weight_norm),
    "repeated": repeated,
}


def make(name: str) -> Case:
    torch.manual_seed(0)
    return CASES[name]()


def some(points: list[Any]) -> list[Any]:
    """The one that needs least, and one in the middle."""
    return [points[i] for i in sorted({0, len(points) // 2})]


def without(plan: CheckpointPlan) -> CheckpointPlan:
    """The plan that saves all; the fastest one need not, for some blocks are faster done twice."""
    return replace(plan, steps=("save",) * len(plan._blocks))


@pytest.fixture(scope="module")
def planned() -> Callable[[str], tuple[Case, CheckpointPlan]]:
    """One measurement of each case, for many tests; models come back without a plan applied."""
    found: dict[str, tuple[Case, CheckpointPlan]] = {}

    def get(name: str) -> tuple[Case, CheckpointPlan]:
        if name not in found:
            case = make(name)
            found[name] = case, case.plan()
        case, plan = found[name]
        without(plan).apply(case.model)
        return case, plan

    return get


Planned = Callable[[str], tuple[Case, CheckpointPlan]]


def assert_predicted(case: Case, plan: CheckpointPlan, points: list[Any]) -> None:
    assert plan.plain_bytes == pytest.approx(peak_bytes(case.run), rel=0.01)
    for budget, _ in points:
        chosen = plan.within(budget)
        chosen.apply(case.model)
        assert chosen.predicted_bytes == pytest.approx(peak_bytes(case.run), rel=0.01), chosen.steps


# Bytes


@pytest.mark.parametrize("name", CASES)
def test_predicted_bytes(name: str, planned: Planned) -> None:
    """The goal is one percent; nearly all predictions are exact."""
    case, plan = planned(name)
    assert_predicted(case, plan, some(plan.curve))
    assert not plan.refused


def test_predictions_of_the_whole_curve(planned: Planned) -> None:
    case, plan = planned("mlp")
    assert len(plan.curve) > 3
    assert_predicted(case, plan, plan.curve)


def test_predicted_bytes_where_the_backward_of_the_head_is_the_peak() -> None:
    """The gradient of a large table; by then that of the blocks' output has been freed."""
    blocks = nn.Sequential(*[layer() for _ in range(4)])
    model = nn.ModuleDict({"embedding": nn.Embedding(40_000, 32), "blocks": blocks})
    tokens = torch.randint(0, 40_000, (ROWS,))
    case = Case(model, blocks, lambda: blocks(model["embedding"](tokens)).square().mean())
    plan = case.plan()
    assert_predicted(case, plan, plan.curve[:1])


@pytest.mark.xfail(
    strict=True,
    reason="random states of inner checkpoints stand from the first forward on: 5 KB each",
)
def test_predicted_bytes_of_small_tensors() -> None:
    """Here what a checkpoint itself keeps is as large as an activation."""
    model = nn.Sequential(
        *[m for _ in range(4) for m in (nn.Linear(32, 32), nn.ReLU(), nn.Dropout(0.2))]
    )
    case = Case(model, model, torch.randn(256, 32))
    plan = case.plan()
    assert_predicted(case, plan, plan.curve[:1])


@pytest.mark.xfail(strict=True, reason="the gradient that waits for the path around the chain")
def test_predicted_bytes_with_a_path_around_the_chain() -> None:
    case = between_head_and_tail(skip=True)
    plan = case.plan()
    assert_predicted(case, plan, some(plan.curve))


def test_predicted_bytes_with_the_gradient_of_a_memory() -> None:
    case = encoded(learned=True)
    plan = case.plan()
    assert_predicted(case, plan, some(plan.curve))


@pytest.mark.xfail(
    strict=True, reason="the parts of a shared weight's gradient add up outside of its .grad"
)
def test_predicted_bytes_with_a_large_shared_weight() -> None:
    case = shared(128, 64)
    plan = case.plan()
    assert_predicted(case, plan, some(plan.curve))


@pytest.mark.xfail(strict=True, reason="autocast casts a shared weight once, here counted twice")
def test_predicted_bytes_with_a_shared_weight_under_autocast() -> None:
    case = autocast_mlp(shared(256, 64))
    plan = case.plan()
    assert_predicted(case, plan, some(plan.curve))


def test_predicted_bytes_of_large_weights_under_autocast() -> None:
    """The weights' casts stand where the input did: at one address, two allocations."""
    case = mlp(2, 256, 64)
    x = case.sample.requires_grad_()
    inner = autocast_mlp(case)

    def run() -> None:
        inner.run()
        x.grad = None

    assert inner.plan().plain_bytes == pytest.approx(peak_bytes(run), rel=0.01)


@pytest.mark.parametrize("name", ["mlp", "language model"])
def test_predicted_bytes_of_accumulation(name: str) -> None:
    """From the second micro-batch on the gradients stand; they count, as they stand in the step."""
    case = make(name)
    plan = case.plan(accumulate=True)
    assert plan.plain_bytes > case.plan().plain_bytes

    def two() -> None:
        case.step().backward()
        case.run()

    for budget, _ in some(plan.curve):
        chosen = plan.within(budget)
        chosen.apply(case.model)
        assert chosen.predicted_bytes == pytest.approx(peak_bytes(two), rel=0.01)


def test_predicted_bytes_of_accumulation_into_a_large_head() -> None:
    """Its gradient stands from the start, and is not made a second time."""
    blocks = nn.Sequential(*[layer() for _ in range(4)])
    model = nn.ModuleDict({"blocks": blocks, "head": nn.Linear(32, 2000)})
    x = torch.randn(256, 32)
    case = Case(model, blocks, lambda: model["head"](blocks(x).mean(0)).square().mean())
    plan = case.plan(accumulate=True)

    def two() -> None:
        case.step().backward()
        case.run()

    assert plan.plain_bytes == pytest.approx(peak_bytes(two), rel=0.01)


@pytest.mark.parametrize("device", DEVICES)
def test_known_bytes(device: str) -> None:
    """Eight tanh layers: their outputs and one gradient, for that of the sum is a number."""
    model = nn.Sequential(*[nn.Tanh() for _ in range(8)])
    unit = 2**20
    x = torch.randn(unit // 4, device=device, requires_grad=True)
    plan = plan_checkpoints(model, x, PLENTY)
    assert plan.plain_bytes == pytest.approx(9 * unit, rel=0.01)
    least = plan.within(plan.curve[0][0])
    assert least.predicted_bytes < 7 * unit


# The choice


def test_curve_is_a_trade_off(planned: Planned) -> None:
    for name in ("mlp", "flat", "language model"):
        _, plan = planned(name)
        assert plan.curve == sorted(plan.curve)
        assert all(a[1] > b[1] for a, b in zip(plan.curve, plan.curve[1:], strict=False))
        assert plan.predicted_time <= plan.plain_time
        limits = plan.plain_bytes, plan.plain_time * (1 + 1e-9)
        assert any(b <= limits[0] and t <= limits[1] for b, t in plan.curve)


@pytest.mark.parametrize("name", ["mlp", "language model"])
def test_budgets(name: str, planned: Planned) -> None:
    """The fastest that fits; the least possible is named, and is a budget that can be met."""
    case, plan = planned(name)
    for (budget, seconds), (more, _) in zip(plan.curve, plan.curve[1:], strict=False):
        for between in (budget, more - 1):
            chosen = plan.within(between)
            assert (chosen.predicted_bytes, chosen.predicted_time) == (budget, seconds)
            assert chosen.budget == between
    with pytest.raises(ValueError, match=r"no schedule fits .*; the least possible is") as error:
        plan.within(plan.curve[0][0] - 1)
    least = int(re.search(r"least possible is (\d+) bytes", str(error.value))[1])
    assert plan.within(least).predicted_bytes == least == plan.curve[0][0]
    for budget in (0, -1, 1):
        with pytest.raises(ValueError, match=f"the least possible is {least} bytes"):
            plan.within(budget)
    with pytest.raises(ValueError, match=r"plan_checkpoints: no schedule fits 1 B.*smaller batch"):
        case.plan(1)


def test_deterministic_bytes() -> None:
    """Two measurements agree on bytes; seconds decide only between schedules of equal bytes."""
    first, second = make("mlp").plan(), make("mlp").plan()
    assert first.plain_bytes == second.plain_bytes
    assert first.curve[0][0] == second.curve[0][0]


def test_lists_have_no_runs(planned: Planned) -> None:
    _, plan = planned("language model")
    assert all(isinstance(step, str) for _, _, steps in plan._frontier for step in steps)
    _, plan = planned("mlp")
    assert any(not isinstance(step, str) for _, _, steps in plan._frontier for step in steps)
    assert {length(steps) for _, _, steps in plan._frontier} == {6}


# Results


def gradients(case: Case, seed: int = 1, passes: int = 1) -> dict[str, Tensor]:
    case.model.zero_grad()
    torch.manual_seed(seed)
    for _ in range(passes):
        case.step().backward()
    found = {n: p.grad for n, p in case.model.named_parameters() if p.grad is not None}
    found |= {f"buffer {n}": b.clone() for n, b in case.model.named_buffers()}
    return {n: g.to_dense() if g.is_sparse else g for n, g in found.items()}


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_bit_equal(name: str, planned: Planned) -> None:
    case, plan = planned(name)
    start = copy.deepcopy(case.model.state_dict())
    expected = gradients(case, passes=2)
    for budget, _ in some(plan.curve):
        case.model.load_state_dict(start)
        plan.within(budget).apply(case.model)
        got = gradients(case, passes=2)
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[n], g) for n, g in expected.items())
    case.model.load_state_dict(start)


# Traps of random numbers


class Noise(nn.Module):
    """Dropout by random numbers of another source."""

    def __init__(self, draw: Callable[[Noise, int], Any], **generators: Any) -> None:
        super().__init__()
        self.linear, self.draw = nn.Linear(16, 16), draw
        vars(self).update(generators)

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.as_tensor(np.asarray(self.draw(self, x.numel())), dtype=torch.float32)
        return torch.tanh(self.linear(x)) * (mask.view_as(x) < 0.8)


TRAPS: dict[str, tuple[Callable[[], Noise], str]] = {
    "python": (
        lambda: Noise(lambda _, n: [random.random() for _ in range(n)]),
        "draws from Python's random module",
    ),
    "numpy": (
        lambda: Noise(lambda _, n: np.random.rand(n)),
        "draws from NumPy's global generator",
    ),
    "torch.Generator": (
        lambda: Noise(lambda m, n: torch.rand(n, generator=m.own), own=torch.Generator()),
        "draws from the generator `own` of a Noise",
    ),
    "np.random.Generator": (
        lambda: Noise(lambda m, n: m.own.random(n), own=np.random.default_rng(0)),
        "draws from the generator `own` of a Noise",
    ),
    "np.random.RandomState": (
        lambda: Noise(lambda m, n: m.own.rand(n), own=np.random.RandomState(0)),
        "draws from the generator `own` of a Noise",
    ),
    "random.Random": (
        lambda: Noise(lambda m, n: [m.own.random() for _ in range(n)], own=random.Random(0)),
        "draws from the generator `own` of a Noise",
    ),
    "hidden generator": (
        lambda: Noise(lambda m, n: torch.rand(n, generator=m.own[0]), own=[torch.Generator()]),
        "has another gradient when its forward runs again (relative error 0.",
    ),
}


@pytest.mark.parametrize("trap", TRAPS)
def test_other_random_numbers(trap: str) -> None:
    """A block that a checkpoint would give wrong gradients is saved, whatever the budget."""
    make_noise, reason = TRAPS[trap]
    model = nn.Sequential(layer(16), make_noise(), layer(16), layer(16))
    random.seed(0)
    np.random.seed(0)
    with pytest.warns(UserWarning, match=r"block 1 Noise .*; every plan saves it") as caught:
        plan = plan_checkpoints(model, torch.randn(1024, 16), PLENTY)
    assert len(caught) == 1
    assert reason in str(caught[0].message)
    assert caught[0].filename == __file__
    assert list(plan.refused) == [1]
    assert plan.refused[1].startswith(reason)
    for _, _, steps in plan._frontier:
        position = 0
        for step in steps:
            if position <= 1 < position + length(step):
                assert step == "save"
            position += length(step)


class StochasticDepth(nn.Module):
    """Skips its layer at random, by Python's numbers, seldom."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = layer(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layer(x) if random.random() < 0.999 else x


def test_random_numbers_that_change_nothing_this_time() -> None:
    """It is the state of the generator that tells, not luck."""
    model = nn.Sequential(layer(16), StochasticDepth(), layer(16))
    with pytest.warns(UserWarning, match="StochasticDepth draws from Python's random module"):
        plan = plan_checkpoints(model, torch.randn(64, 16), PLENTY)
    assert list(plan.refused) == [1]


def test_dropout_of_torch_is_no_trap(planned: Planned) -> None:
    for name in ("flat", "language model"):
        _, plan = planned(name)
        assert plan.refused == {}


class Added(nn.Module):
    """Noise without an influence on the gradients of its own block."""

    def __init__(self) -> None:
        super().__init__()
        self.own = [torch.Generator()]

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randn(x.shape, generator=self.own[0])


def test_hidden_noise_that_is_added() -> None:
    model = nn.Sequential(*[m for _ in range(3) for m in (nn.Linear(16, 16), nn.Tanh(), Added())])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = plan_checkpoints(model, torch.randn(1024, 16), PLENTY)
    assert sorted(plan.refused) == [2, 5, 8]
    assert len(caught) == 3
    assert "block 2 Added has another gradient" in str(caught[0].message) + str(caught[2].message)


class Counts(nn.Module):
    """Depends on how often it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.calls = nn.Linear(16, 16), 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.tanh(self.linear(x)) * self.calls


def test_blocks_that_depend_on_calls() -> None:
    model = nn.Sequential(layer(16), Counts())
    with pytest.warns(UserWarning, match="block 1 Counts has another gradient when"):
        plan_checkpoints(model, torch.randn(64, 16), PLENTY)


class Rounds(nn.Module):
    """Computes a little otherwise, in every run or only where it runs again in backward."""

    def __init__(self, always: bool) -> None:
        super().__init__()
        self.linear, self.always, self.calls = nn.Linear(16, 16), always, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        again = torch._C._current_graph_task_id() >= 0
        return torch.tanh(self.linear(x) * (1 + 1e-5 * (self.calls if self.always else again)))


def test_rounding_that_a_plain_step_has_too() -> None:
    """Kernels that add in any order are no reason to refuse; one that differs only here is."""
    plan = plan_checkpoints(nn.Sequential(layer(16), Rounds(True)), torch.randn(64, 16), PLENTY)
    assert plan.refused == {}
    with pytest.warns(UserWarning, match="block 1 Rounds has another gradient when"):
        plan_checkpoints(nn.Sequential(layer(16), Rounds(False)), torch.randn(64, 16), PLENTY)


class Grows(nn.Module):
    """Depends on a buffer that every forward changes; one run is compared to another like it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(16, 16)
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.scale.mul_(1.5)
        return torch.tanh(self.linear(x)) * self.scale


def test_buffers_are_no_trap() -> None:
    model = nn.Sequential(layer(16), Grows(), Grows())
    assert plan_checkpoints(model, torch.randn(64, 16), PLENTY).refused == {}
    assert float(model[1].scale) == 1


class OnlyOnce(nn.Module):
    """Cannot run in backward."""

    def forward(self, x: Tensor) -> Tensor:
        if torch._C._current_graph_task_id() >= 0:
            raise RuntimeError("no\nsecond time")
        return x.sin()


def test_blocks_that_fail_under_a_checkpoint() -> None:
    model = nn.Sequential(layer(16), OnlyOnce())
    reason = re.escape("block 1 OnlyOnce fails under a checkpoint (no); every plan saves it")
    with pytest.warns(UserWarning, match=reason):
        plan_checkpoints(model, torch.randn(64, 16), PLENTY)


# The model is left as it was


class Everything(nn.Module):
    """A block with all that planning could change."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = parametrizations.spectral_norm(nn.Linear(16, 16))
        self.norm, self.dropout = nn.BatchNorm1d(16), nn.Dropout(0.2)
        self.unused = nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.torch, self.numpy, self.python = (
            torch.Generator(),
            np.random.default_rng(),
            random.Random(0),
        )
        self.fails, self.runs = False, 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        self.calls = self.calls + 1
        torch.rand(1, generator=self.torch)
        self.numpy.random()
        self.python.random()
        random.random()
        np.random.rand()
        if self.fails and self.runs > 3:
            raise ArithmeticError("in the middle")
        return self.dropout(self.norm(self.linear(x)))


def snapshot(model: nn.Module, *leaves: Tensor) -> dict[str, Any]:
    """All that can be told of a model and of the generators; tensors by identity and by value."""
    hooks = {
        f"{name} {key}": dict(table)
        for name, module in model.named_modules()
        for key, table in vars(module).items()
        if key.endswith("_hooks")
    }
    numpy_state = np.random.get_state()
    found: dict[str, Any] = {
        "order": [n for n, _ in model.named_parameters()],
        "keys": list(model.state_dict()),
        "hooks": hooks,
        "global hooks": dict(nn.modules.module._global_forward_pre_hooks),
        "modes": [m.training for m in model.modules()],
        "needed": [p.requires_grad for p in model.parameters()],
        "forwards": [(vars(m).get("forward"), m._compiled_call_impl) for m in model.modules()],
        "random": (random.getstate(), str(numpy_state), torch.get_rng_state().tolist()),
        "grad mode": torch.is_grad_enabled(),
        "autocast": torch.is_autocast_enabled("cpu"),
    }
    for name, module in model.named_modules():
        if isinstance(module, Everything):
            own = module.torch.get_state().tolist(), module.numpy.bit_generator.state
            found[f"generators {name}"] = (*own, module.python.getstate())
    tensors = [*model.parameters(), *model.buffers(), *leaves]
    for i, tensor in enumerate(tensors):
        found[f"tensor {i}"] = id(tensor), tensor.tolist()
        gradient = tensor.grad if tensor.is_leaf else None
        found[f"gradient {i}"] = gradient if gradient is None else (id(gradient), gradient.tolist())
    return found


def everything(kind: str) -> Case:
    model = nn.Sequential(nn.Linear(16, 16), *[Everything() for _ in range(3)], nn.Linear(16, 2))
    model.register_forward_hook(lambda *_: None)
    model[2].register_forward_pre_hook(lambda *_: None)
    model[3].norm.eval()
    x = torch.randn(8, 16, requires_grad=True)
    if kind == "sequential":
        return Case(model, model, x)
    blocks = list(model)[1:4]
    return Case(model, blocks, lambda: model(x).square().sum())


@pytest.mark.filterwarnings("ignore:plan_checkpoints. block:UserWarning")
@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("kind", ["sequential", "list"])
def test_planning_leaves_all_as_it_was(kind: str, graded: bool) -> None:
    case = everything(kind)
    leaves = [case.sample] if isinstance(case.sample, Tensor) else []
    if graded:
        case.step().backward()
    before = snapshot(case.model, *leaves)
    case.plan()
    assert snapshot(case.model, *leaves) == before


@pytest.mark.parametrize("kind", ["sequential", "list"])
def test_a_failure_in_the_middle_leaves_all_as_it_was(kind: str) -> None:
    case = everything(kind)
    case.step().backward()
    case.model[2].fails = True
    before = snapshot(case.model)
    with pytest.raises(ArithmeticError, match="in the middle"):
        case.plan()
    assert snapshot(case.model) == before


def test_blocks_with_backward_hooks() -> None:
    blocks, x = two_layers()
    blocks[1].register_full_backward_hook(lambda *_: None)
    plan_checkpoints(blocks, lambda: blocks[1](blocks[0](x)).sum(), PLENTY)


def test_gradients_of_unused_parameters_stay() -> None:
    case = mlp(2, rows=8)
    case.model[1].spare = nn.Parameter(torch.ones(3))
    case.model[1].spare.grad = torch.ones(3)
    case.plan()
    assert case.model[1].spare.grad is not None


def test_generators_of_the_head_stay() -> None:
    head, blocks = Added(), nn.Sequential(layer(16), layer(16))
    head.generator = head.own[0]
    before = head.generator.get_state()
    x = torch.randn(8, 16)
    plan_checkpoints(blocks, lambda: blocks(head(x)).sum(), PLENTY)
    assert torch.equal(head.generator.get_state(), before)


def test_planning_without_gradients_enabled() -> None:
    case = mlp(2, rows=8)
    with torch.no_grad():
        plan = case.plan()
        assert not torch.is_grad_enabled()
    assert plan.plain_bytes == case.plan().plain_bytes


def test_models_are_released() -> None:
    case = mlp(3, rows=8)
    plan = case.plan()
    plan.apply(case.model)
    case.run()
    references = [weakref.ref(p) for p in case.model.parameters()]
    del case, plan
    gc.collect()
    assert not any(reference() is not None for reference in references)


# Where the plan goes


def steps_applied(model: nn.Module, plan: CheckpointPlan) -> bool:
    return vars(model)["forward"].steps == plan.steps


def test_apply_to_others(planned: Planned) -> None:
    """A copy, a model that holds the blocks, a model that holds blocks like them."""
    case, plan = planned("mlp")
    least = plan.within(plan.curve[0][0])
    other = copy.deepcopy(case.model)
    assert least.apply(other) is other
    assert steps_applied(other, least)
    assert "forward" not in vars(case.model)
    for blocks in (case.model, copy.deepcopy(case.model)):
        larger = nn.ModuleDict({"stem": layer(), "body": nn.ModuleList([blocks]), "head": layer()})
        assert least.locate(larger) == {"body.0": least.steps}
        least.apply(larger)
        assert steps_applied(blocks, least)
    assert Settings(checkpoint=least.locate(other)).checkpoint == {"": least.steps}


def test_apply_replaces(planned: Planned) -> None:
    case, plan = planned("mlp")
    for budget, _ in plan.curve[:2]:
        chosen = plan.within(budget)
        chosen.apply(case.model)
        assert steps_applied(case.model, chosen)
        assert vars(case.model)["forward"].replaced is None


def test_a_planned_model_is_planned_as_if_it_were_not() -> None:
    case = mlp(4)
    plan = case.plan()
    least = plan.within(plan.curve[0][0])
    least.apply(case.model)
    again = case.plan()
    assert again.plain_bytes == plan.plain_bytes
    assert again.curve[0][0] == plan.curve[0][0]
    assert steps_applied(case.model, least)


@pytest.mark.xfail(strict=True, reason="the plan of the sequence stays in force around its blocks")
def test_a_plan_for_a_list_of_the_blocks_of_a_planned_sequence() -> None:
    case = mlp(4)
    plan = case.plan()
    plan.within(plan.curve[0][0]).apply(case.model)
    again = plan_checkpoints(list(case.model), lambda: case.model(case.sample).sum(), PLENTY)
    assert again.plain_bytes == plan.plain_bytes


def test_a_planned_list_is_planned_as_if_it_were_not() -> None:
    blocks, x = nn.ModuleList([layer() for _ in range(4)]), torch.randn(ROWS, 32)
    plan = plan_checkpoints(blocks, x, PLENTY)
    replace(plan, steps=("recompute",) * 4).apply(blocks)
    assert plan_checkpoints(blocks, x, PLENTY).plain_bytes == plan.plain_bytes
    assert all("forward" in vars(block) for block in blocks)


def test_copies_of_planned_models_and_of_plans(planned: Planned) -> None:
    case, plan = planned("language model")
    least = plan.within(plan.curve[0][0])
    least.apply(case.model)
    for duplicate in (copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))):
        other = duplicate(case.model)
        assert other.blocks[0].forward.block is other.blocks[0]
        copied = duplicate(least)
        assert copied.steps == least.steps
        assert repr(copied) == repr(least)
        assert copied.apply(other) is other


def test_blocks_without_a_container(planned: Planned) -> None:
    """Each is found by itself, under its name."""
    model = nn.ModuleDict({"a": layer(), "b": layer(), "c": layer()})
    x = torch.randn(ROWS, 32)
    plan = plan_checkpoints(
        [model["c"], model["a"]], lambda: model["a"](model["c"](x)).sum(), PLENTY
    )
    least = plan.within(plan.curve[0][0])
    assert least.locate(model) == dict(zip("ca", least.steps, strict=True))
    least.apply(model)
    with pytest.raises(ValueError, match=r"CheckpointPlan.apply: expected a model that holds"):
        least.apply(copy.deepcopy(model))


def test_models_without_the_blocks(planned: Planned) -> None:
    case, plan = planned("mlp")
    two = nn.ModuleList([copy.deepcopy(case.model), copy.deepcopy(case.model)])
    for model, count in ((layer(), 0), (two, 2)):
        message = f"one container of 6 blocks like them, found {count}; apply the plan to the model"
        with pytest.raises(ValueError, match=message):
            plan.apply(model)


def test_runs_need_their_sequence(planned: Planned) -> None:
    """The blocks are there, but no longer by themselves in one container."""
    case, plan = planned("mlp")
    model = nn.Sequential(*case.model, nn.Linear(32, 1))
    with pytest.raises(ValueError, match=r"CheckpointPlan\.apply"):
        plan.within(plan.curve[0][0]).apply(model)


class Scaled(nn.Sequential):
    """A sequence with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 3 * super().forward(x)


def test_sequences_with_a_forward_of_their_own() -> None:
    """Either an error, or a model that computes what it did."""
    model = Scaled(*[layer() for _ in range(6)])
    x = torch.randn(ROWS, 32)
    expected = model(x)
    try:
        plan = plan_checkpoints(model, x, PLENTY)
    except (TypeError, ValueError):
        return
    plan.within(plan.curve[0][0]).apply(model)
    assert torch.equal(model(x), expected)


# Errors


def two_layers() -> tuple[nn.ModuleList, Tensor]:
    return nn.ModuleList([layer(), layer()]), torch.randn(8, 32)


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return x * 2, 1


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        (layer()[0], "expected blocks as an nn.Sequential, an nn.ModuleList or a list of modules"),
        ([layer(), torch.relu], "a list of modules, got list"),
        ("blocks", "got str; for a whole model pass its list of blocks"),
        (nn.ModuleDict({"a": layer()}), "got ModuleDict"),
    ],
)
def test_blocks_of_another_kind(blocks: Any, message: str) -> None:
    with pytest.raises(TypeError, match=rf"plan_checkpoints: .*{message}"):
        plan_checkpoints(blocks, torch.randn(8, 32), PLENTY)


@pytest.mark.parametrize("budget", [1e6, True, "1 MB", None, torch.tensor(3)])
def test_budgets_of_another_kind(budget: Any) -> None:
    message = "plan_checkpoints: expected a budget in bytes, an int, got .*; a share of the plain"
    with pytest.raises(TypeError, match=message):
        plan_checkpoints(layer(), torch.randn(8, 32), budget)


@pytest.mark.parametrize("sample", [3, None, "x", [torch.zeros(3)]])
def test_samples_of_another_kind(sample: Any) -> None:
    message = f"plan_checkpoints: expected sample to be .* got {type(sample).__name__}"
    with pytest.raises(TypeError, match=message):
        plan_checkpoints(layer(), sample, PLENTY)


@pytest.mark.parametrize("blocks", [[], nn.Sequential(), nn.ModuleList(), ()])
def test_no_blocks(blocks: Any) -> None:
    with pytest.raises(ValueError, match="plan_checkpoints: expected at least one block, got none"):
        plan_checkpoints(blocks, torch.randn(8, 32), PLENTY)


CHAINS: dict[str, tuple[Callable[[nn.ModuleList, Tensor], Any], str]] = {
    "out of order": (lambda b, x: b[0](b[1](x)).sum(), "block 1 (Sequential) ran as number 0"),
    "twice": (lambda b, x: b[1](b[0](b[1](b[0](x)))).sum(), "block 0 (Sequential) ran as number 2"),
    "too few": (lambda b, x: b[0](x).sum(), "the step ran 1 of 2 blocks; expected all of them"),
    "none": (
        lambda _, x: x.sum(),
        "the step ran 0 of 2 blocks; expected all of them, once each. These modules are not in the "
        "model that it runs, or skipped. Where",
    ),
    "between": (lambda b, x: b[1](b[0](x) + 1).sum(), "expected block 1 (Sequential) to take the"),
    "no scalar": (lambda b, x: b[1](b[0](x)), "got a tensor of shape [8, 32], requires_grad=True"),
    "no graph": (lambda b, x: b[1](b[0](x)).sum().detach(), "of shape [], requires_grad=False"),
    "no tensor": (
        lambda b, x: b[1](b[0](x)).sum().item(),
        "returns a scalar loss which requires a",
    ),
    "no input": (
        lambda b, _: b[1](b[0]([3])).sum(),
        "expected block 0 (Sequential) to take the output",
    ),
}


@pytest.mark.parametrize("kind", CHAINS)
def test_steps_that_are_no_chain(kind: str) -> None:
    blocks, x = two_layers()
    step, message = CHAINS[kind]
    with pytest.raises(ValueError, match=re.escape(message)):
        plan_checkpoints(blocks, lambda: step(blocks, x), PLENTY)
    assert not any("forward" in vars(block) for block in blocks)


def test_a_sample_that_gives_no_tensor() -> None:
    message = "expected the last block to return a tensor where sample is one, got tuple; pass a"
    with pytest.raises(ValueError, match=message):
        plan_checkpoints([layer(), Pair()], torch.randn(8, 32), PLENTY)


def test_a_sequence_that_runs_twice() -> None:
    blocks, x = nn.Sequential(*two_layers()[0]), torch.randn(8, 32)
    message = re.escape("once each, in their order, but block 0 (Sequential) ran as number 2")
    with pytest.raises(ValueError, match=message):
        plan_checkpoints(blocks, lambda: blocks(blocks(x)).sum(), PLENTY)


def test_one_module_twice_in_a_list() -> None:
    block = layer()
    with pytest.raises(ValueError, match=r"plan_checkpoints: .* twice"):
        plan_checkpoints([block, block], torch.randn(8, 32), PLENTY)


@pytest.mark.parametrize("name", ["index", "call", "block", "plain"])
def test_names_of_arguments_are_free(name: str) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer()

        def forward(self, x: Tensor, **kwargs: float) -> Tensor:
            return self.layer(x) * kwargs[name]

    blocks = nn.ModuleList([Named(), Named()])
    x = torch.randn(8, 32)
    plan_checkpoints(
        blocks, lambda: blocks[1](blocks[0](x, **{name: 2.0}), **{name: 2.0}).sum(), PLENTY
    )


# How it shows itself


def test_repr(planned: Planned) -> None:
    _, plan = planned("mlp")
    least = plan.within(plan.curve[0][0])
    lines = repr(least).splitlines()
    assert re.fullmatch(r"Checkpoint plan within \d+\.\d MiB", lines[0])
    assert re.split(r"\s{2,}", lines[1]) == ["schedule", "peak", "time / plain"]
    assert [re.split(r"\s{2,}", line)[0] for line in lines[2:4]] == ["save everything", "this plan"]
    assert lines[2].endswith("1.00")
    assert len([line for line in lines[4:] if re.match(r" +\d Sequential: ", line)]) == 6
    assert any(re.match(r" +0 to \d: recompute together, then by", line) for line in lines)
    html = least._repr_html_()
    assert "<table" in html
    assert "save everything" in html


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("inner", [nn.Dropout(0.1), nn.Identity()], ids=["dropout", "nothing"])
def test_compiled_blocks_with_dropout_are_never_selective(inner: nn.Module) -> None:
    """Planned in eval mode, where nothing is dropped."""
    torch._dynamo.reset()
    block = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), inner).eval()
    block.compile()
    plan = plan_checkpoints(nn.Sequential(block), torch.randn(512, 32), PLENTY)
    offered = {step for _, _, steps in plan._frontier for step in steps}
    assert ("selective" in offered) == isinstance(inner, nn.Identity)
    if "selective" in offered:  # by bytes, not by the seconds of this run
        assert plan.curve[0][0] < 0.8 * plan.plain_bytes
