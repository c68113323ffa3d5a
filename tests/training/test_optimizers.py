"""Optimizers as they are found: with modes, sparse gradients, closures, wrappers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loops import assert_same, batches_of, configured, everything, plain_loop, twins
from torch import Tensor, nn
from torch.optim import lr_scheduler

from autograd_lib import AutogradTrainingSystem
from autograd_lib.config import load_config

# --- sparse gradients


class Words(nn.Module):
    """An embedding, the same word several times in a row, and a dense layer."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4, sparse=sparse)
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.embedding(tokens).mean(1))


@pytest.mark.parametrize("limit", [0.05, 1e9])
@pytest.mark.parametrize("performance", [{}, {"micro_batch": 2}, {"precision": "fp16"}])
def test_sparse_gradients_are_clipped_like_dense_ones(limit: float, performance: dict[str, Any]):
    found = []
    for sparse in (True, False):
        torch.manual_seed(0)
        model = Words(sparse)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        config = configured(training={"clip_norm": limit}, performance=performance)
        system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss(), config)
        norms = []
        for step in range(3):
            tokens = torch.tensor([[1, 1, 2], [2, 2, 5], [step, 7, 7], [7, 1, 0]])
            system.train_step(tokens, torch.tensor([0, 1, 2, 0]))
            norms.append(system.gradient_norm)
        grads = [p.grad.to_dense() if p.grad.is_sparse else p.grad for p in model.parameters()]
        assert model.embedding.weight.grad.is_sparse == sparse
        found.append([*norms, *grads, *model.parameters()])
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)
    if limit < 1:
        # After the last step, whose gradients were larger.
        assert found[0][2] > 2 * limit
        clipped = torch.stack([grad.norm() for grad in found[0][3:6]]).norm().item()
        assert clipped == pytest.approx(limit, rel=1e-3)


def test_the_monitor_sees_norms_before_clipping_and_the_rows_what_the_optimizer_saw():
    """The optimizer holds the head alone, and other parameters have gradients too."""
    found = {}
    for limit in (None, 0.05):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        optimizer = torch.optim.SGD(model[1].parameters(), lr=0.0)
        config = configured(training={"clip_norm": limit}, monitoring={"explode_above": 0.1})
        system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss(), config)
        batches = batches_of((8,), 8)
        (row,) = system.fit(batches, 1)
        found[limit] = row["gradient_norm"], system.monitor
    expected = []
    for x, y in batches:
        loss = nn.functional.cross_entropy(model(x), y)
        grads = torch.autograd.grad(loss, list(model[1].parameters()))
        expected.append(torch.stack([grad.norm() for grad in grads]).norm().item())
    for limit, (seen, monitor) in found.items():
        assert monitor.history["total_norm"] == pytest.approx(np.array(expected), rel=1e-5)
        assert {issue.kind for issue in monitor.issues} == {"exploding"}
        assert seen == pytest.approx(np.median(expected) if limit is None else limit, rel=1e-3)


def test_nothing_to_clip():
    model = nn.Linear(3, 1)
    unused = nn.Parameter(torch.ones(2))
    model.register_parameter("unused", unused)
    config = configured(training={"clip_norm": 1.0})
    optimizer = torch.optim.SGD([unused], lr=0.1)
    system = AutogradTrainingSystem(model, optimizer, nn.MSELoss(), config)
    system.train_step(torch.ones(2, 3), torch.ones(2, 1))
    assert system.gradient_norm == 0
    assert_same(unused.detach(), torch.ones(2))


# --- optimizers with modes


class Averaging(torch.optim.SGD):
    """Evaluates at half the weights, as far as rounding lets it get back; knows its mode."""

    def __init__(self, params: Any, **options: Any) -> None:
        super().__init__(params, **options)
        for group in self.param_groups:
            group["training"] = True

    @torch.no_grad()
    def _change(self, training: bool) -> None:
        for group in self.param_groups:
            if group["training"] != training:
                group["training"] = training
                for parameter in group["params"]:
                    parameter.mul_(3 if training else 1 / 3)  # rounds

    def train(self) -> None:
        self._change(True)

    def eval(self) -> None:
        self._change(False)

    def step(self, closure: Any = None) -> None:
        assert all(group["training"] for group in self.param_groups)
        super().step(closure)


def averaging(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.data.mul_(1 / 3)
    return model


def averaging_system(**training: Any) -> AutogradTrainingSystem:
    model, optimizer, _, _ = twins(lambda: nn.Linear(8, 8), Averaging, momentum=0.9)
    return AutogradTrainingSystem(
        model, optimizer, nn.CrossEntropyLoss(), configured(training=training)
    )


def test_evaluation_and_checkpoints_are_those_of_the_averaged_weights(tmp_path: Path):
    system = averaging_system(directory=str(tmp_path))
    batches, test = batches_of((8,), 8), batches_of((8,), 8, number=1)
    rows = system.fit(batches, 2, test)
    expected = averaging(system.module)
    with torch.no_grad():
        loss = nn.functional.cross_entropy(expected(test[0][0]), test[0][1]).item()
    assert rows[-1]["validation_loss"] == pytest.approx(loss, rel=1e-6)
    saved = torch.load(tmp_path / "last.pt", weights_only=True)["model"]
    assert_same(dict(saved), dict(expected.state_dict()))
    # Training itself knows nothing of it.
    _, _, twin, other = twins(lambda: nn.Linear(8, 8), torch.optim.SGD, momentum=0.9)
    plain_loop(twin, other, nn.CrossEntropyLoss(), [*batches, *batches])
    assert_same(system.module.state_dict(), twin.state_dict())


def test_training_resumes_at_the_weights_that_train(tmp_path: Path):
    batches = batches_of((8,), 8)
    whole = averaging_system()
    whole.fit(batches, 3)
    part = averaging_system(directory=str(tmp_path), save_every=4)
    part.fit(batches, 2, batches)
    part.save(tmp_path / "two.pt")
    again = averaging_system()
    again.load(tmp_path / "two.pt")
    again.fit(batches, 3, batches)
    assert_same(again.module.state_dict(), whole.module.state_dict())
    assert_same(again.optimizer.state_dict(), whole.optimizer.state_dict())


def test_an_optimizer_comes_back_to_training_after_an_exception():
    system = averaging_system()
    batches = batches_of((8,), 8)
    system.train_step(*batches[0])
    before = everything(system)
    with pytest.raises(ValueError, match="expected a batch to be a mapping"):
        system.evaluate([batches[0], (1, 2, 3)])
    assert_same(everything(system), before)
    system.train_step(*batches[1])


def test_an_optimizer_in_evaluation_mode_is_left_there_until_training_goes_on():
    system = averaging_system()
    batches = batches_of((8,), 8)
    system.train_step(*batches[0])
    system.optimizer.eval()
    before = everything(system)
    found = system.evaluate(batches)
    system.state_dict()
    assert_same(everything(system), before)
    system.optimizer.train()
    assert system.evaluate(batches) == found
    system.optimizer.eval()
    system.train_step(*batches[1])


@pytest.mark.parametrize("kind", ["sparse", "modes", "accelerate"])
def test_with_and_without_monitor_and_guard_training_is_the_same(kind: str):
    found = []
    for watched in (True, False):
        torch.manual_seed(0)
        model = Words(kind == "sparse")
        make = Averaging if kind == "modes" else torch.optim.SGD
        optimizer = make(model.parameters(), lr=0.1, momentum=0.9)
        if kind == "accelerate":
            accelerate = pytest.importorskip("accelerate")
            optimizer = accelerate.Accelerator(cpu=True).prepare(optimizer)
        training = {"clip_norm": 0.1, "max_nonfinite": 3 * watched}
        config = configured(training=training, monitoring={"enabled": watched})
        system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss(), config)
        draw = torch.Generator().manual_seed(1)
        batches = [
            (torch.randint(9, (6, 3), generator=draw), torch.randint(3, (6,), generator=draw))
            for _ in range(5)
        ]
        losses = [row["loss"] for row in system.fit(batches, 2, batches)]
        found.append([model.state_dict(), optimizer.state_dict(), losses])
    assert_same(*found)


# --- optimizers that a step cannot use


class Sharpness(torch.optim.SGD):
    """As SAM is published: the step calls a closure."""

    def step(self, closure: Callable[[], Any]) -> None:
        closure()
        super().step()


class Wrapped(torch.optim.Optimizer):
    """As Lookahead is found in many repositories: `Optimizer.__init__` is not called."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner, self.param_groups = inner, inner.param_groups
        self.defaults, self.state = inner.defaults, {}

    def step(self, closure: Any = None) -> None:
        self.inner.step(closure)


def test_optimizers_that_a_step_cannot_use_are_refused():
    model = nn.Linear(4, 1)
    weights = list(model.parameters())
    for optimizer in (torch.optim.LBFGS(weights), Sharpness(weights, lr=0.1)):
        name = type(optimizer).__name__
        with pytest.raises(
            TypeError, match=f"{name} calls the step itself, by a closure; expected"
        ):
            AutogradTrainingSystem(model, optimizer, nn.MSELoss())
    with pytest.raises(TypeError, match=r"Wrapped did not call .* or pass the optimizer inside"):
        AutogradTrainingSystem(model, Wrapped(torch.optim.SGD(weights, lr=0.1)), nn.MSELoss())
    # A scheduler wraps the method, whose signature then begins with `self`.
    scheduler = lr_scheduler.StepLR(optimizer := torch.optim.SGD(weights, lr=0.1), 1)
    AutogradTrainingSystem(model, optimizer, nn.MSELoss(), scheduler=scheduler)


def test_the_wrapper_of_accelerate_trains_and_resumes_as_the_optimizer_inside(tmp_path: Path):
    accelerate = pytest.importorskip("accelerate")
    found = []
    batches = batches_of((8,), 8)
    for wraps in (True, False):
        model, optimizer, _, _ = twins(lambda: nn.Linear(8, 8))
        if wraps:
            optimizer = accelerate.Accelerator(cpu=True).prepare(optimizer)
            assert not hasattr(optimizer, "_optimizer_step_pre_hooks")  # of `Optimizer.__init__`
        config = configured(training={"clip_norm": 0.1, "directory": str(tmp_path / str(wraps))})
        scheduler = lr_scheduler.StepLR(optimizer, 3)
        system = AutogradTrainingSystem(
            *(model, optimizer, nn.CrossEntropyLoss(), config), scheduler=scheduler
        )
        system.fit(batches, 1, batches)
        system.load(tmp_path / str(wraps) / "best.pt")
        system.fit(batches, 2, batches)
        monitored = system.monitor.history["total_norm"]
        found.append([model.state_dict(), optimizer.state_dict(), torch.tensor(monitored)])
        assert len(monitored) == 12
    assert_same(*found)


@pytest.mark.parametrize("several", [list, tuple, lambda pair: dict(enumerate(pair))])
def test_two_optimizers_are_two_systems(several: Callable[[Any], Any]):
    model = nn.Linear(4, 1)
    pair = several([torch.optim.SGD([weight], lr=0.1) for weight in model.parameters()])
    with pytest.raises(TypeError, match=r"With several, make a system of each and write the loop"):
        AutogradTrainingSystem(model, pair, nn.MSELoss())


def test_a_gan_of_two_systems_is_that_of_a_loop_by_hand():
    """Each monitor has the gradients of its optimizer, and no other."""

    def networks() -> list[Any]:
        torch.manual_seed(0)
        pair = [nn.Linear(4, 6), nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))]
        return [*pair, *(torch.optim.Adam(net.parameters(), lr=1e-2) for net in pair)]

    def norm(net: nn.Module) -> float:
        return nn.utils.get_total_norm([p.grad for p in net.parameters()]).item()

    loss_fn, ones = nn.BCEWithLogitsLoss(), torch.ones(8, 1)
    labels = torch.cat([ones, 1 - ones])
    draws = [(torch.randn(8, 6), torch.randn(8, 4)) for _ in range(5)]
    forge, judge, *optimizers = networks()
    expected = []
    for real, noise in draws:
        optimizers[1].zero_grad()
        loss_fn(judge(torch.cat([real, forge(noise).detach()])), labels).backward()
        expected.append(norm(judge))
        optimizers[1].step()
        optimizers[0].zero_grad()
        loss_fn(judge(forge(noise)), ones).backward()
        expected.append(norm(forge))
        optimizers[0].step()
    other_forge, other_judge, *optimizers = networks()
    both = nn.Sequential(other_forge, other_judge)
    forging = AutogradTrainingSystem(both, optimizers[0], loss_fn)
    judging = AutogradTrainingSystem(other_judge, optimizers[1], loss_fn)
    for real, noise in draws:
        judging.train_step(torch.cat([real, other_forge(noise).detach()]), labels)
        forging.train_step(noise, ones)
    assert_same(both.state_dict(), nn.Sequential(forge, judge).state_dict())
    for system, seen in ((judging, expected[::2]), (forging, expected[1::2])):
        assert system.monitor.history["total_norm"] == pytest.approx(np.array(seen), rel=1e-5)
        assert not system.monitor.issues


@pytest.mark.parametrize(
    ("described", "differs"),
    [
        ({"lr": 0.1}, "lr 0.01"),
        ({"name": "sgd", "lr": 0.01}, "name 'adamw'"),
        ({"lr": 0.01, "weight_decay": 0.3}, r"weight_decay 0.01"),
        ({"lr": 0.01, "options": {"betas": [0.5, 0.9]}}, r"betas \(0.9, 0.999\)"),
        ({"lr": 0.01, "schedule": "cosine"}, "no scheduler"),
        ({"lr": 0.01, "warmup": 0.1}, "no scheduler"),
        ({"lr": 0.1, "options": {"momentum": 0.9}}, "lr 0.01, momentum None"),
    ],
)
def test_a_described_optimizer_is_not_ignored(described: dict[str, Any], differs: str):
    model = nn.Linear(4, 1)
    config = load_config({"optimizer": described})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=f"than the one given, which has {differs}; make that"):
        AutogradTrainingSystem(model, optimizer, nn.MSELoss(), config)


def test_the_optimizer_that_is_described_is_taken():
    model = nn.Linear(4, 1)
    options = {"betas": [0.5, 0.9], "fused": True}
    described = {"name": "adamw", "lr": 0.02, "options": options, "warmup": 0.1}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02, betas=(0.5, 0.9), fused=True)
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    AutogradTrainingSystem(
        *(model, optimizer, nn.MSELoss(), load_config({"optimizer": described})),
        scheduler=scheduler,
    )
