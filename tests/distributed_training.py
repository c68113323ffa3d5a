"""What two processes must do with a training system: what one process does with all samples.

`test_distributed.py` runs each scenario in both processes, in a process group of its own. The one
process is a bare loop of PyTorch, where it is not said otherwise.
"""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from autograd_lib import (
    AutogradConfig,
    AutogradTrainingSystem,
    CustomLossFunction,
    CustomTransformerModel,
    Settings,
)
from autograd_lib.config import (
    DistributedConfig,
    FeaturesConfig,
    MonitoringConfig,
    SystemConfig,
    TrainingConfig,
)

SCENARIOS: dict[str, Callable[[int, Path], None]] = {}
STRATEGIES = ("ddp", "fsdp2")
Batch = tuple[Tensor, Tensor]
Named = dict[str, Tensor]


def scenario(run: Callable[[int, str, Path], None]) -> Callable[[int, str, Path], None]:
    """Run it with both strategies, and with a directory that all scenarios share."""
    for strategy in STRATEGIES:
        SCENARIOS[f"{run.__name__}[{strategy}]"] = partial(_with_strategy, run, strategy)
    return run


def _with_strategy(run: Callable[..., None], strategy: str, rank: int, shared: Path) -> None:
    run(rank, strategy, shared)


# --- what is trained


class Net(nn.Module):
    """Layers that two ranks share unevenly: of the last one the second rank has nothing."""

    def __init__(self, dropout: float = 0.0, norm: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(6, 7)
        self.blocks = nn.Sequential(*(Block(7) for _ in range(2)))
        self.dropout = nn.Dropout(dropout)
        self.norm = Centered(7) if norm else nn.Identity()
        self.head = nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.dropout(self.blocks(self.stem(x)))))


class Centered(nn.Module):
    """Subtracts a running mean, in training too."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.linear(x).tanh()


def samples(count: int, seed: int = 1) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return x, (x[:, :1] * x[:, 1:2] + torch.randn(count, 1, generator=generator))


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9)


def adamw(parameters: Any) -> torch.optim.Optimizer:
    # With the usual eps Adam magnifies the rounding of gradients that are nearly zero.
    return torch.optim.AdamW(parameters, lr=0.01, eps=1e-3, weight_decay=0.1)


def configured(
    strategy: str = "ddp",
    *,
    performance: Settings | None = None,
    checkpointing: bool = False,
    monitored: bool = False,
    **training: Any,
) -> AutogradConfig:
    return AutogradConfig(
        autograd_system=SystemConfig(
            gradient_monitoring=MonitoringConfig(enabled=monitored),
            advanced_features=FeaturesConfig(gradient_checkpointing=checkpointing),
            performance=performance or Settings(),
        ),
        training=TrainingConfig(**training),
        distributed=DistributedConfig(strategy=strategy),
    )


def system(
    strategy: str,
    model: nn.Module | None = None,
    loss_fn: nn.Module | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
    metrics: dict[str, Callable[..., Any]] | None = None,
    scheduler: Callable[..., Any] | None = None,
    **options: Any,
) -> AutogradTrainingSystem:
    model = Net() if model is None else model
    loss_fn = nn.MSELoss() if loss_fn is None else loss_fn
    made = optimizer([*model.parameters(), *loss_fn.parameters()])
    schedule = None if scheduler is None else scheduler(made)
    trained = AutogradTrainingSystem(
        model, made, loss_fn, configured(strategy, **options), scheduler=schedule, metrics=metrics
    )
    if dist.is_initialized():
        kind = DistributedDataParallel if strategy == "ddp" else FSDPModule
        assert isinstance(trained.model, kind)
    return trained


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def weights(trained: AutogradTrainingSystem) -> Named:
    return {name: whole(p) for name, p in trained.module.named_parameters()}


def gradients(trained: AutogradTrainingSystem) -> Named:
    return {name: whole(p.grad) for name, p in trained.module.named_parameters()}


def bare(
    batches: Sequence[Batch],
    model: nn.Module | None = None,
    loss_fn: nn.Module | None = None,
    optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
    clip_norm: float | None = None,
) -> tuple[Named, list[float], Named]:
    """Weights, losses and last gradients of one process that has all samples."""
    model = Net() if model is None else model
    loss_fn = nn.MSELoss() if loss_fn is None else loss_fn
    parameters = [*model.parameters(), *loss_fn.parameters()]
    made, losses = optimizer(parameters), []
    for x, y in batches:
        made.zero_grad()
        loss = loss_fn(model(x), y)
        loss.backward()
        if clip_norm is not None:
            nn.utils.clip_grad_norm_(parameters, clip_norm)
        made.step()
        losses.append(loss.item())
    named = [*model.named_parameters(), *loss_fn.named_parameters(prefix="loss")]
    return (
        {name: p.detach().clone() for name, p in named},
        losses,
        {name: p.grad.clone() for name, p in named},
    )


def apart(one: Named, other: Named) -> float:
    """The relative distance of two sets of tensors."""
    assert one.keys() == other.keys(), (one.keys(), other.keys())
    squares = sum((one[name] - other[name]).double().square().sum() for name in one)
    return float((squares / sum(t.double().square().sum() for t in other.values())).sqrt())


def equal_on_ranks(value: Any) -> None:
    seen: list[Any] = [None, None]
    dist.all_gather_object(seen, value)
    assert seen[0] == seen[1], seen


def of_rank(batch: Batch, rank: int, cut: int) -> Batch:
    """The first `cut` samples, or those after them."""
    part = slice(None, cut) if rank == 0 else slice(cut, None)
    return batch[0][part], batch[1][part]


def raised_by(error: type[BaseException], call: Callable[[], Any]) -> BaseException:
    with pytest.raises(error) as caught:
        call()
    return caught.value


# --- steps


def follow(
    rank: int,
    strategy: str,
    batches: Sequence[Batch],
    cut: int,
    optimizer: Callable[[Any], torch.optim.Optimizer] = sgd,
    **options: Any,
) -> AutogradTrainingSystem:
    """Train by both ranks and by one process, and compare losses and weights."""
    trained = system(strategy, optimizer=optimizer, **options)
    losses = [trained.train_step(*of_rank(batch, rank, cut)).item() for batch in batches]
    expected, expected_losses, _ = bare(
        batches, optimizer=optimizer, clip_norm=options.get("clip_norm")
    )
    assert losses == pytest.approx(expected_losses, rel=1e-5)
    assert apart(weights(trained), expected) < 1e-6
    equal_on_ranks(losses)
    return trained


@scenario
def steps(rank: int, strategy: str, _: Path) -> None:
    batches = [samples(10, seed) for seed in range(5)]
    follow(rank, strategy, batches, 5)
    follow(rank, strategy, batches, 5, adamw)


@scenario
def micro_batches(rank: int, strategy: str, _: Path) -> None:
    """Of equal and unequal numbers of samples, and unequal numbers of micro-batches."""
    batches = [samples(10, seed) for seed in range(2)]
    for size, cut in ((2, 5), (3, 8), (1, 1)):
        follow(rank, strategy, batches, cut, performance=Settings(micro_batch=size))


@scenario
def one_exchange_a_step(rank: int, strategy: str, _: Path) -> None:
    """Of the backwards of micro-batches, the last one alone sends gradients."""
    if strategy == "fsdp2":
        return
    calls: list[int] = []

    def count(calls, bucket):  # DDP takes no annotations that are strings
        calls.append(bucket.index())
        return allreduce_hook(None, bucket)

    trained = system(strategy, performance=Settings(micro_batch=2))
    trained.model.register_comm_hook(calls, count)
    trained.train_step(*of_rank(samples(10), rank, 7))
    assert calls == [0]


@scenario
def clipping(rank: int, strategy: str, _: Path) -> None:
    batches = [samples(10, seed) for seed in range(5)]
    trained = follow(rank, strategy, batches, 7, clip_norm=0.05)
    norm = trained.gradient_norm
    assert norm is not None
    before = bare(batches[:4], clip_norm=0.05)[0]
    model = Net()
    model.load_state_dict(before)
    nn.MSELoss()(model(batches[4][0]), batches[4][1]).backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    torch.testing.assert_close(norm, expected, rtol=1e-4, atol=0)


@scenario
def weights_of_the_first_rank(rank: int, strategy: str, _: Path) -> None:
    model = Net()
    if rank == 1:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    trained = system(strategy, model)
    assert apart(weights(trained), Net().state_dict()) == 0


@scenario
def checkpointing(rank: int, strategy: str, _: Path) -> None:
    batches = [samples(10, seed) for seed in range(3)]
    trained = follow(rank, strategy, batches, 5, checkpointing=True)
    calls = {block.calls for block in trained.module.modules() if isinstance(block, Block)}
    assert calls == {6}, calls


@scenario
def bf16(rank: int, strategy: str, _: Path) -> None:
    """The products are those of bf16; weights and gradients stay in fp32."""
    batch = samples(64)
    trained = system(strategy, performance=Settings("bf16"))
    seen = []
    block = next(b for b in trained.module.modules() if isinstance(b, Block))
    block.linear.register_forward_hook(lambda *args: seen.append(args[2].dtype))
    trained.train_step(*of_rank(batch, rank, 32))
    assert seen == [torch.bfloat16]
    found, (_, _, expected) = gradients(trained), bare([batch])
    assert {g.dtype for g in found.values()} == {torch.float32}
    model = Net()
    with torch.autocast("cpu", torch.bfloat16):
        nn.MSELoss()(model(batch[0]), batch[1]).backward()
    of_bf16 = {name: p.grad for name, p in model.named_parameters()}
    error = apart(of_bf16, expected)
    assert 1e-4 < error < 0.02, error
    assert apart(found, of_bf16) < 2 * error
    assert apart(found, expected) < 2 * error


# --- what a mean is over


def tokens() -> Batch:
    """Four sequences; of the first two nearly all targets count, of the others nearly none."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randint(0, 11, (4, 12), generator=generator)
    y = torch.randint(0, 11, (4, 12), generator=generator)
    y[2:, 2:] = -100
    return x, y


def language_model() -> nn.Module:
    torch.manual_seed(0)
    return CustomTransformerModel(11, 16, num_layers=2, dropout=0.0)


class TokenLoss(nn.CrossEntropyLoss):
    def forward(self, output: Tensor, targets: Tensor) -> Tensor:
        return super().forward(output.transpose(1, 2), targets)


@scenario
def unequal_counts(rank: int, strategy: str, _: Path) -> None:
    """The mean of the means of ranks is far from the mean; what the system does is not."""
    batch = tokens()
    part = of_rank(batch, rank, 2)
    _, losses, expected = bare([batch], language_model(), TokenLoss())
    for size in (None, 1):
        trained = system(
            strategy, language_model(), TokenLoss(), performance=Settings(micro_batch=size)
        )
        loss = trained.train_step(*part)
        assert loss.item() == pytest.approx(losses[0], rel=1e-6)
        error = apart(gradients(trained), expected)
        assert error < 1e-6, error
    naive = DistributedDataParallel(language_model())
    TokenLoss()(naive(part[0]), part[1]).backward()
    error = apart({name: p.grad for name, p in naive.module.named_parameters()}, expected)
    assert error > 0.2, error


@scenario
def nothing_counts_on_a_rank(rank: int, strategy: str, _: Path) -> None:
    x, y = tokens()
    y[2:] = -100
    _, losses, expected = bare([(x, y)], language_model(), TokenLoss())
    for size in (None, 1):
        trained = system(
            strategy, language_model(), TokenLoss(), performance=Settings(micro_batch=size)
        )
        loss = trained.train_step(*of_rank((x, y), rank, 2))
        assert loss.item() == pytest.approx(losses[0], rel=1e-6)
        error = apart(gradients(trained), expected)
        assert error < 1e-6, error
    y[:] = -100
    with pytest.raises(ValueError, match="every label is -100"):
        trained.train_step(*of_rank((x, y), rank, 2))


class Labelled(nn.Module):
    """Computes its own loss, as models of `transformers` do."""

    def __init__(self, balance: float = 0.0) -> None:
        super().__init__()
        self.inner, self.balance = language_model(), balance
        self.blocks = self.inner.blocks

    def forward(self, tokens: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.inner(tokens)
        loss = TokenLoss()(logits, labels)
        if self.balance:
            loss = loss + self.balance * logits.square().mean()
        return {"loss": loss, "logits": logits}


@scenario
def own_loss(rank: int, strategy: str, _: Path) -> None:
    """The model's own loss in a batch that is a mapping, weighted by labels over all ranks."""
    for counted in (0, 2):  # by the second rank: no labels, or few
        x, y = tokens()
        y[2:, counted:] = -100
        _, losses, expected = bare([(x, y)], language_model(), TokenLoss())
        expected = {f"inner.{name}": gradient for name, gradient in expected.items()}
        part = dict(zip(("tokens", "labels"), of_rank((x, y), rank, 2), strict=True))
        for size in (None, 1):
            for unused in (False, True):  # when it looks for them, DDP wraps outputs
                config = configured(strategy, performance=Settings(micro_batch=size))
                config = replace(
                    config, distributed=replace(config.distributed, find_unused_parameters=unused)
                )
                model = Labelled()
                made = sgd(model.parameters())
                trained = AutogradTrainingSystem(model, made, config=config)
                loss = trained.train_step(part)
                assert loss.item() == pytest.approx(losses[0], rel=1e-6)
                error = apart(gradients(trained), expected)
                assert error < 1e-6, error
    model = Labelled(balance=0.1)
    trained = AutogradTrainingSystem(model, sgd(model.parameters()), config=configured(strategy))
    with pytest.raises(ValueError, match=r"own loss of .* cannot be divided .*: it ends in Add"):
        trained.train_step(part)


@scenario
def unequal_numbers_of_batches(rank: int, strategy: str, _: Path) -> None:
    """Who has no batch left takes part with nothing."""
    own = [samples(4 + r, 10 * r + i) for r in range(2) for i in range(3 - r)]
    first, second = own[:3], own[3:]
    together = [
        (torch.cat([a[0], b[0]]), torch.cat([a[1], b[1]]))
        for a, b in zip(first, second, strict=False)
    ]
    batches = [*together, first[2]] * 2
    trained = system(strategy)
    rows = trained.fit(second if rank else first, 2)
    expected, losses, _ = bare(batches)
    assert [row["loss"] for row in rows] == pytest.approx(
        [sum(losses[:3]) / 3, sum(losses[3:]) / 3], rel=1e-5
    )
    assert trained.step == 6
    assert apart(weights(trained), expected) < 1e-6


@scenario
def no_batch_on_a_rank(rank: int, strategy: str, _: Path) -> None:
    trained = system(strategy)
    with pytest.raises(ValueError, match="the loader of rank 1 gives no batch"):
        trained.fit([] if rank else [samples(4)], 1)


@scenario
def learnable_loss(rank: int, strategy: str, _: Path) -> None:
    batches = [samples(10, seed) for seed in range(5)]
    for options in ({}, {"clip_norm": 0.1}, {"performance": Settings(micro_batch=3)}):
        loss_fn = CustomLossFunction()
        trained = system(strategy, loss_fn=loss_fn, **options)
        for batch in batches:
            trained.train_step(*of_rank(batch, rank, 7))
        found = weights(trained) | {
            f"loss.{name}": whole(p) for name, p in loss_fn.named_parameters()
        }
        expected, _, _ = bare(
            batches, loss_fn=CustomLossFunction(), clip_norm=options.get("clip_norm")
        )
        error = apart(found, expected)
        assert error < 1e-6, (options, error)
        moved = CustomLossFunction().state_dict()["log_ratio"] - loss_fn.state_dict()["log_ratio"]
        assert moved.abs().min() > 1e-4, moved


# --- what is not finite


@scenario
def overflow_on_a_rank(rank: int, strategy: str, _: Path) -> None:
    """What overflows in fp16 on one rank is skipped by both, and the scale is halved."""
    halved = partial(torch.optim.lr_scheduler.StepLR, step_size=1, gamma=0.5)
    learnable = CustomLossFunction()
    if strategy == "fsdp2":
        mixed = system(strategy, None, learnable, performance=Settings("fp16"))
        with pytest.raises(RuntimeError, match=r"mixed torch\.Tensor and DTensor"):
            mixed.train_step(*of_rank(samples(10), rank, 5))
    for loss_fn in (nn.MSELoss(), *([learnable] if strategy == "ddp" else [])):
        for clip_norm in (None, 1.0):
            trained = system(
                *(strategy, None, loss_fn),
                performance=Settings("fp16"),
                scheduler=halved,
                clip_norm=clip_norm,
                monitored=True,
            )
            begin, scale = weights(trained), trained.scaler.get_scale()
            x, y = of_rank(samples(10), rank, 5)
            y /= 10  # so that the half of the scale is small enough
            trained.train_step(x, y + 2e3 * rank)
            assert apart(weights(trained), begin) == 0
            assert trained.scaler.get_scale() == scale / 2
            assert trained.optimizer.param_groups[0]["lr"] == 0.05
            assert trained.monitor.history["skipped"].tolist() == [True]
            trained.train_step(x, y)
            assert apart(weights(trained), begin) > 1e-3
            assert trained.scaler.get_scale() == scale / 2
            assert trained.reports == []
            equal_on_ranks([t.tolist() for t in weights(trained).values()])


@scenario
def fp16(rank: int, strategy: str, _: Path) -> None:
    batch = samples(64)
    trained = system(strategy, performance=Settings("fp16", micro_batch=9), clip_norm=100.0)
    trained.train_step(*of_rank(batch, rank, 32))
    _, _, expected = bare([batch])
    assert 1e-5 < apart(gradients(trained), expected) < 5e-3


@scenario
def not_finite_on_a_rank(rank: int, strategy: str, _: Path) -> None:
    batch = samples(10)
    x, y = of_rank(batch, rank, 5)
    trained = system(strategy, monitored=True, max_nonfinite=2)
    begin = weights(trained)
    wrong = x.clone()
    if rank == 1:
        wrong[2, 3] = torch.nan
    with pytest.warns(UserWarning, match="step 1 is skipped: NaN in input 'x'"):
        trained.train_step(wrong, y)
    assert apart(weights(trained), begin) == 0
    (report,) = trained.reports
    assert (report.phase, report.kind) == ("input", "nan")
    assert "on rank 1" in report.detail
    equal_on_ranks(repr(report))
    trained.train_step(x, y)
    expected, _, _ = bare([batch])
    assert apart(weights(trained), expected) < 1e-6
    with pytest.warns(UserWarning, match="step 3 is skipped"):
        trained.train_step(wrong, y)
    with (
        pytest.warns(UserWarning, match="step 4 is skipped"),
        pytest.raises(FloatingPointError, match="2 steps in a row"),
    ):
        trained.train_step(wrong, y)


# --- what is told


@scenario
def monitored(rank: int, strategy: str, _: Path) -> None:
    batches = [samples(10, seed) for seed in range(3)]
    trained = follow(rank, strategy, batches, 7, monitored=True)
    history = trained.monitor.history
    for value in history.values():
        equal_on_ranks(repr(value.tolist() if hasattr(value, "tolist") else list(value)))  # NaN too
    assert list(history["names"]) == [name for name, _ in Net().named_parameters()]
    for i in range(3):
        expected = bare(batches[: i + 1])[2]
        norms = torch.stack([g.norm() for g in expected.values()])
        torch.testing.assert_close(
            torch.as_tensor(history["norm"][i]).float(), norms, rtol=1e-4, atol=1e-5
        )
        assert history["total_norm"][i] == pytest.approx(norms.norm().item(), rel=1e-4)


@scenario
def evaluated(rank: int, strategy: str, _: Path) -> None:
    """Splits that are uneven, and unequal numbers of batches."""
    x, y = samples(9)
    close = lambda output, targets: ((output - targets).abs() < 1).float().mean()  # noqa: E731
    trained = system(strategy, metrics={"close": close})
    part = of_rank((x, y), rank, 7)
    found = trained.evaluate(DataLoader(TensorDataset(*part), batch_size=3))
    output = Net()(x)
    assert found["loss"] == pytest.approx(nn.MSELoss()(output, y).item(), rel=1e-6)
    assert found["close"] == pytest.approx(close(output, y).item(), rel=1e-6)
    equal_on_ranks(found)
    with pytest.raises(ValueError, match="the validation loader of rank 1 gives no batch"):
        trained.evaluate([] if rank else [part])


class Halving(torch.optim.SGD):
    """Evaluates at half of the weights that it trains."""

    @torch.no_grad()
    def change(self, training: bool) -> None:
        for group in self.param_groups:
            if group.setdefault("training", True) != training:
                group["training"] = training
                for parameter in group["params"]:
                    parameter.mul_(2 if training else 0.5)

    def train(self) -> None:
        self.change(True)

    def eval(self) -> None:
        self.change(False)


@scenario
def modes(rank: int, strategy: str, shared: Path) -> None:
    """Evaluated and saved at the weights of evaluation, trained and resumed at the others."""
    batches = [samples(10, seed) for seed in range(4)]
    halving = partial(Halving, lr=0.05, momentum=0.9)
    trained = follow(rank, strategy, batches[:2], 7, halving)
    expected, _, _ = bare(batches[:2])
    x, y = samples(4, seed=9)
    model = Net()
    model.load_state_dict({name: weight / 2 for name, weight in expected.items()})
    loss = nn.MSELoss()(model(x), y).item()
    assert trained.evaluate([(x, y)])["loss"] == pytest.approx(loss, rel=1e-5)
    path = shared / f"modes_{strategy}.pt"
    trained.save(path)
    saved = torch.load(path, weights_only=True)["model"]
    assert apart(saved, model.state_dict()) < 1e-6
    assert apart(weights(trained), expected) < 1e-6
    again = system(strategy, optimizer=halving)
    again.load(path)
    for each in (trained, again):
        for batch in batches[2:]:
            each.train_step(*of_rank(batch, rank, 7))
    for one, other in zip(weights(trained).values(), weights(again).values(), strict=True):
        assert torch.equal(one, other)
    assert apart(weights(trained), bare(batches)[0]) < 1e-6


@scenario
def batches_of_any_form(rank: int, strategy: str, _: Path) -> None:
    """Without one batch dimension the targets weigh, or `count`; what nothing weighs is refused."""

    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Net()
            self.blocks = self.net.blocks

        def forward(self, x: Tensor, bag: Tensor) -> Tensor:
            x = self.net(x)
            return x.new_zeros(int(bag.max()) + 1, 1).index_add(0, bag, x)

    x, _ = samples(9)
    bags = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 2])
    y = torch.randn(3, 1, generator=torch.Generator().manual_seed(0))
    model = Bags()
    nn.MSELoss()(model(x, bags), y).backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    trained = system(strategy, Bags())
    if rank == 0:
        trained.train_step((x[:4], bags[:4]), y[:2])
    else:
        trained.train_step((x[4:], bags[4:] - 2), y[2:])
    assert apart(gradients(trained), expected) < 1e-5
    with pytest.raises(ValueError, match="how much a batch weighs beside others is not known"):
        trained.train_step((x, bags), torch.tensor(1.0))


@scenario
def buffers(rank: int, strategy: str, shared: Path) -> None:
    """Running means are those of the first rank, for all that judge, and in the file."""
    trained = system(strategy, Net(norm=True))
    part = of_rank(samples(16), rank, 8)
    for _ in range(3):
        trained.train_step(*part)
    trained.save(shared / f"buffers_{strategy}.pt")
    trained.train_step(*part)
    same = samples(4, seed=9)
    found = trained.evaluate([same])
    model = Net(norm=True)
    model.load_state_dict({n: whole(t) for n, t in trained.module.state_dict().items()})
    seen: list[Any] = [None, None]
    dist.all_gather_object(seen, model.norm.mean.tolist())
    assert seen[0] == seen[1]
    model.eval()
    assert found["loss"] == pytest.approx(nn.MSELoss()(model(same[0]), same[1]).item(), rel=1e-6)
    again = system(strategy, Net(norm=True))
    again.load(shared / f"buffers_{strategy}.pt")
    again.train_step(*part)
    assert apart(weights(again), weights(trained)) == 0
    assert again.evaluate([same]) == found


# --- files


def data(world: int, rank: int) -> DataLoader[Any]:
    """Batches of six samples in all, shuffled: four to an epoch."""
    dataset = TensorDataset(*samples(24))
    sampler: DistributedSampler[Any] = DistributedSampler(dataset, world, rank, seed=5)
    return DataLoader(dataset, 6 // world, sampler=sampler)


class Failing:
    """A loader that fails in one of its epochs, before its batch number `at`."""

    def __init__(self, loader: Any, at: int, epoch: int = 1) -> None:
        self.loader, self.at, self.epoch = loader, at, epoch
        self.sampler = getattr(loader, "sampler", None)

    def __iter__(self) -> Iterator[Any]:
        self.epoch -= 1
        for i, batch in enumerate(self.loader):
            if self.epoch == 0 and i == self.at:
                raise OSError("the disk is gone")
            yield batch


def resumable(strategy: str, directory: Path | None = None) -> AutogradTrainingSystem:
    return system(
        strategy,
        loss_fn=CustomLossFunction(),
        optimizer=adamw,
        scheduler=partial(torch.optim.lr_scheduler.StepLR, step_size=5, gamma=0.5),
        monitored=True,
        clip_norm=0.5,
        save_every=3,
        directory=None if directory is None else str(directory),
    )


def outcome(trained: AutogradTrainingSystem) -> Named:
    loss = {f"loss.{name}": whole(p) for name, p in trained.loss_fn.named_parameters()}
    return weights(trained) | loss


def interrupt(strategy: str, name: str, shared: Path, world: int = 1, rank: int = 0) -> None:
    """Leave the checkpoint of step 6 of 12, in mid-epoch, and the outcome without interruption."""
    trained = resumable(strategy, shared / name)
    loader = Failing(data(world, rank), at=3, epoch=2)
    with pytest.raises(OSError, match="the disk is gone"):
        trained.fit(loader, 3)
    undisturbed = resumable(strategy)
    undisturbed.fit(data(world, rank), 3)
    found = outcome(undisturbed), undisturbed.history, undisturbed.monitor.history["total_norm"]
    if rank == 0:
        (shared / f"{name}.result").write_bytes(pickle.dumps(found))


def go_on(strategy: str, name: str, shared: Path, world: int = 1, rank: int = 0) -> Any:
    """Go on from the checkpoint `name`; the outcome, and the one without interruption."""
    trained = resumable(strategy)
    trained.load(shared / name / "last.pt")
    assert (trained.step, trained.epoch) == (6, 1)
    trained.fit(data(world, rank), 3)
    assert trained.step == 12
    undisturbed = pickle.loads((shared / f"{name}.result").read_bytes())
    found = outcome(trained), trained.history, trained.monitor.history["total_norm"]
    return found, undisturbed


def agree(found: Any, expected: Any) -> None:
    """Compare weights, losses and norms, within rounding."""
    (ours, rows, norms), (theirs, other_rows, other_norms) = found, expected
    assert apart(ours, theirs) < 1e-6, apart(ours, theirs)
    for key in ("loss", "learning_rate", "gradient_norm"):
        got = [row[key] for row in rows]
        assert got == pytest.approx([row[key] for row in other_rows], rel=1e-4), key
    assert norms.tolist() == pytest.approx(other_norms.tolist(), rel=1e-4)


def one_process(shared: Path) -> None:
    """What one process leaves for two to go on from."""
    interrupt("ddp", "one", shared)
    trained = system("ddp", Net(dropout=0.5))
    trained.train_step(*samples(4))
    trained.save(shared / "dropout.pt")


@scenario
def interrupted(rank: int, strategy: str, shared: Path) -> None:
    interrupt(strategy, strategy, shared, 2, rank)
    dist.barrier()
    alone, ours = (
        pickle.loads((shared / f"{name}.result").read_bytes()) for name in ("one", strategy)
    )
    agree(ours, alone)


@scenario
def resumed(rank: int, strategy: str, shared: Path) -> None:
    """From files of one process, of both with DDP, and of both with shards."""
    for name in ("one", *STRATEGIES):
        found, expected = go_on(strategy, name, shared, 2, rank)
        if name != strategy:
            agree(found, expected)
            continue
        assert apart(found[0], expected[0]) == 0
        for row, other in zip(found[1], expected[1], strict=True):
            assert {**row, "seconds": 0} == {**other, "seconds": 0}
        assert found[2].tolist() == expected[2].tolist()


@scenario
def resumed_where_a_rank_has_no_more(rank: int, strategy: str, shared: Path) -> None:
    own = [samples(4, 10 * rank + i) for i in range(4 if rank == 0 else 2)]
    undisturbed = system(strategy)
    undisturbed.fit(own, 1)
    path = shared / f"unequal_{strategy}"
    trained = system(strategy, directory=str(path), save_every=3)
    error, text = (
        (OSError, "disk") if rank == 0 else (RuntimeError, "loader of rank 0 raised an error")
    )
    with pytest.raises(error, match=text):
        trained.fit(Failing(own, at=3) if rank == 0 else own, 1)
    again = system(strategy)
    again.load(path / "last.pt")
    assert again.step == 3
    again.fit(own, 1)
    assert again.step == 4
    assert apart(weights(again), weights(undisturbed)) == 0
    short = system(strategy)
    short.load(path / "last.pt")
    with pytest.raises(ValueError, match="expected a loader of more than 3 batches"):
        short.fit(own[:2], 1)


@scenario
def dropout_after_one_process(rank: int, strategy: str, shared: Path) -> None:
    """Two processes do not draw the same masks for ever after."""
    trained = system(strategy, Net(dropout=0.5))
    trained.load(shared / "dropout.pt")
    seen: list[Any] = [None, None]
    dist.all_gather_object(seen, torch.rand(4).tolist())
    assert seen[0] != seen[1]


@scenario
def one_writer(rank: int, strategy: str, shared: Path) -> None:
    directory = shared / f"writer_{strategy}_{rank}"
    trained = system(strategy, directory=str(directory), save_every=1, monitored=True)
    trained.fit([samples(4)] * 2, 1, [samples(4)])
    if rank == 1:
        assert not directory.exists()
    else:
        found = sorted(path.name for path in directory.iterdir())
        assert found == ["best.pt", "gradients.csv", "last.pt"]


@scenario
def errors_of_files(rank: int, strategy: str, shared: Path) -> None:
    """What goes wrong with a file on one rank is raised by both, and training can go on."""
    trained = system(strategy)
    missing = shared / "missing" / "last.pt"
    error = raised_by(FileNotFoundError, lambda: trained.save(missing))
    assert "missing" in str(error)
    with pytest.raises(FileNotFoundError, match=r"none\.pt"):
        trained.load(shared / "none.pt")
    path = shared / f"ours_{strategy}.pt"
    trained.save(path)
    other = shared / f"theirs_{strategy}_{rank}.pt"
    if rank == 0:
        shutil.copy(path, other)
    begin = weights(trained)
    trained.train_step(*of_rank(samples(10), rank, 5))
    there = weights(trained)
    raised_by(FileNotFoundError, lambda: trained.load(other))
    assert apart(weights(trained), there) == 0
    trained.load(path)
    assert apart(weights(trained), begin) == 0

    (shared / f"file_{strategy}").touch()
    blocked = shared / f"file_{strategy}" / "run"
    trained = system(strategy, directory=str(blocked))
    raised_by(NotADirectoryError, lambda: trained.fit([samples(4)], 1))
    trained.train_step(*samples(4))

    taken = shared / f"taken_{strategy}_{rank}"
    taken.mkdir()
    if rank == 0:
        (taken / "last.pt").touch()
    trained = system(strategy, directory=str(taken))
    error = raised_by(ValueError, lambda: trained.fit([samples(4)], 1))
    assert "is from another run" in str(error)


@scenario
def unsavable(rank: int, strategy: str, shared: Path) -> None:
    trained = system(strategy)
    trained.history.append({"loss": tempfile})
    error = raised_by(TypeError, lambda: trained.save(shared / f"unsavable_{strategy}.pt"))
    assert "cannot pickle 'module'" in str(error)
    assert not (shared / f"unsavable_{strategy}.pt").exists()


# --- signals


@scenario
def signals(rank: int, strategy: str, shared: Path) -> None:
    """A signal to one rank stops both after the same step."""
    kinds = {signal.SIGTERM: SystemExit, signal.SIGINT: KeyboardInterrupt}
    for sender, (number, error) in enumerate(kinds.items()):
        directory = shared / f"signal_{strategy}_{sender}"
        trained = system(strategy, directory=str(directory))

        def batches(sender: int = sender, number: int = number) -> Iterator[Batch]:
            for i in range(4):
                if i == 1 and rank == sender:
                    os.kill(os.getpid(), number)
                yield samples(4, i)

        stopped = raised_by(error, lambda: trained.fit(_Iterable(batches), 1))  # noqa: B023
        if error is SystemExit:
            assert stopped.code == 128 + signal.SIGTERM
        assert trained.step == 2
        again = system(strategy)
        again.load(directory / "last.pt")
        assert again.step == 2
        assert apart(weights(again), weights(trained)) == 0


class _Iterable:
    def __init__(self, batches: Callable[[], Iterator[Batch]]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Batch]:
        return self.batches()


# --- derivatives of higher order


@scenario
def higher_order(rank: int, strategy: str, _: Path) -> None:
    """Each rank asks about its own batch, of the model in one piece."""
    trained = system(strategy)
    x, y = samples(4)
    if strategy == "fsdp2":
        with pytest.raises(NotImplementedError, match="sharded"):
            trained.compute_higher_order_gradients(x, y)
        return
    tower = trained.compute_higher_order_gradients(x, y, order=1)
    _, _, expected = bare([(x, y)])
    assert apart(dict(tower[0]), expected) < 1e-6
