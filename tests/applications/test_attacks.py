"""Attacks against the closed forms of linear models, and what they leave as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES
from sklearn.datasets import load_digits
from torch import Tensor, nn

from autograd_lib import attack, masking_report, minimal_perturbation


class Scaled(nn.Module):
    """A linear model of two classes, its logits times a number."""

    def __init__(self, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.linear = nn.Linear(20, 2).to(dtype)
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


def points(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    x = torch.randn(200, 20, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return x, Scaled(dtype=dtype)(x).argmax(1)


def distances(x: Tensor, norm: float) -> Tensor:
    """The exact distance of each point from the boundary: |f| divided by the dual norm of w."""
    model = Scaled(dtype=x.dtype)
    w = model.linear.weight[0] - model.linear.weight[1]
    logits = model(x)
    dual = 1 if norm == math.inf else 2
    return ((logits[:, 0] - logits[:, 1]).abs() / torch.linalg.vector_norm(w, dual)).detach()


def unlike(distance: Tensor, eps: float) -> Tensor:
    """Leave out what stands on the border to a relative 1e-5."""
    return (distance - eps).abs() > 1e-5 * eps


@pytest.mark.parametrize("norm", [math.inf, 2])
@pytest.mark.parametrize("scale", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("share", [0.3, 1.0, 2.0])
def test_linear_models_are_fooled_exactly_where_they_can_be(
    norm: float, scale: float, share: float
) -> None:
    x, y = points()
    distance = distances(x, norm)
    eps = share * distance.median().item()
    found = attack(Scaled(scale), x, y, eps, norm=norm)
    sure = unlike(distance, eps)
    assert torch.equal(found.success[sure], (distance < eps)[sure])
    assert 0 < found.success.sum() < len(x)
    assert (found.distance <= eps).all()
    assert torch.linalg.vector_norm(found.inputs - x, norm, dim=1).max() <= eps
    assert torch.equal((Scaled(scale)(found.inputs).argmax(1) != y)[sure], found.success[sure])
    assert not found.zero_gradients.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_smallest_perturbation_is_the_distance_to_the_boundary(dtype: torch.dtype) -> None:
    x, y = points(dtype)
    found = minimal_perturbation(Scaled(dtype=dtype), x, y)
    ratio = found.distance / distances(x, 2)
    assert found.success.all()
    assert ratio.max() < 1.002
    assert ratio.min() > 1 - 1e-4
    for factor in (1e-3, 1e3):  # of the units of x
        scaled = nn.Sequential(Times(1 / factor), Scaled(dtype=dtype))
        again = minimal_perturbation(scaled, x * factor, y)
        torch.testing.assert_close(again.distance / factor, found.distance, rtol=2e-3, atol=1e-6)


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def test_cross_entropy_stops_where_its_gradient_is_zero() -> None:
    x, y = points()
    distance = distances(x, math.inf)
    eps = distance.median().item()
    found = attack(Scaled(1e4), x, y, eps, loss="cross_entropy")
    exact = (distance < eps).float().mean()
    assert found.success.float().mean() < exact - 0.2
    assert found.zero_gradients.float().mean() > 0.5
    report = masking_report(Scaled(1e4), x, y, eps)
    assert report.masked
    assert report.scale_sensitive
    assert abs(report.pgd - exact) <= 1 / len(x)
    assert "attack the margin" in str(report)
    honest = masking_report(Scaled(), x, y, eps)
    assert not honest.masked
    assert honest.unbounded == 1
    assert honest.random < honest.pgd
    assert str(honest).startswith("no sign of masked gradients")
    assert "<table" in honest._repr_html_()


class Steps(nn.Module):
    """A linear model behind a staircase, whose gradient is zero nearly everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.model = Scaled()

    def forward(self, x: Tensor) -> Tensor:
        return self.model(torch.round(x * 4) / 4)


def test_a_staircase_is_seen_as_masking() -> None:
    x, y = points()
    y = Steps()(x).argmax(1)
    report = masking_report(Steps(), x, y, 0.5)
    assert report.masked
    assert report.pgd == 0
    assert report.random > 0
    assert report.zero_gradients == 1
    assert report.unbounded == 0


class Moody(nn.Module):
    """Has what an attack must leave alone: dropout, running statistics, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout()
        )
        self.head = nn.Linear(4 * 36, 10)
        self.calls: Tensor
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        torch.rand(3)
        return self.head(self.layers(x))


@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was(fail: bool) -> None:
    torch.manual_seed(0)
    model, x = Moody(), torch.rand(6, 1, 8, 8)
    y = torch.arange(6)
    model.layers[1].eval()  # one module in another mode
    model.head.bias.requires_grad_(False)
    model(x).sum().backward()
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    modes, random = [m.training for m in model.modules()], torch.get_rng_state()
    if fail:
        model.head.register_forward_hook(lambda *_: torch.zeros(2))
        with pytest.raises(ValueError, match=r"logits of the shape \(6, classes\), got \(2,\)"):
            attack(model, x, y, 0.1)
    else:
        first = attack(model, x, y, 0.1, restarts=3, bounds=(0, 1))
        again = attack(model, x, y, 0.1, restarts=3, bounds=(0, 1))
        assert torch.equal(first.inputs, again.inputs)
        minimal_perturbation(model, x, y, steps=5)
        masking_report(model, x, y, 0.1)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert [p.requires_grad for p in model.parameters()].count(False) == 1
    for p, grad in zip(model.parameters(), grads, strict=True):
        assert grad is None if p.grad is None else torch.equal(p.grad, grad)  # type: ignore[arg-type]


def digits() -> tuple[nn.Module, Tensor, Tensor]:
    data = load_digits()
    x, y = torch.tensor(data.data / 16, dtype=torch.float32), torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(100):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:1000]), y[:1000]).backward()
        optimizer.step()
    return model, x[1000:1300], y[1000:1300]


@pytest.mark.parametrize("norm", [math.inf, 2])
def test_more_steps_restarts_and_room_never_find_less(norm: float) -> None:
    model, x, y = digits()
    options: dict[str, Any] = {"norm": norm, "bounds": (0.0, 1.0)}
    wrong = model(x).argmax(1) != y
    rates = []
    for eps in (0.0, 0.05, 0.1, 0.3) if norm == math.inf else (0.0, 0.3, 0.6, 2.0):
        found = attack(model, x, y, eps, **options)
        assert (found.inputs >= 0).all()
        assert (found.inputs <= 1).all()
        assert (found.distance <= eps).all()
        assert torch.equal(found.distance[wrong], torch.zeros(int(wrong.sum())))
        assert found.success[wrong].all()
        assert torch.equal(found.success, model(found.inputs).argmax(1) != y)
        torch.testing.assert_close(found.margin < 0, found.success)
        more = attack(model, x, y, eps, restarts=3, **options)
        assert (more.success | ~found.success).all()
        rates.append(found.success.float().mean().item())
    assert rates == sorted(rates)
    assert rates[0] < 0.2
    assert rates[-1] == 1
    nearest = minimal_perturbation(model, x, y, bounds=(0.0, 1.0))
    assert nearest.success.all()
    within = attack(model, x, y, 0.6, norm=2, **{"bounds": (0.0, 1.0)}).success
    assert (within & (nearest.distance > 0.6 * 1.02)).sum() <= 3  # DDN rarely loses to PGD


def test_targets_are_reached() -> None:
    model, x, y = digits()
    targets = (y + 1) % 10
    found = attack(model, x, y, 0.5, targets=targets, bounds=(0.0, 1.0))
    reached = model(found.inputs).argmax(1) == targets
    assert torch.equal(found.success, reached)
    assert found.success.float().mean() > 0.9
    entropy = attack(model, x, y, 0.5, targets=targets, loss="cross_entropy", bounds=(0.0, 1.0))
    assert entropy.success.float().mean() > 0.9


@pytest.mark.parametrize("device", DEVICES)
def test_the_device_is_that_of_the_inputs(device: str) -> None:
    x, y = (t.to(device) for t in points())
    model = Scaled().to(device)
    for norm in (math.inf, 2):
        found = attack(model, x, y, 0.1, norm=norm, restarts=2)
        assert found.inputs.device.type == device
        assert torch.equal(
            found.success.cpu(), attack(Scaled(), x.cpu(), y.cpu(), 0.1, norm=norm).success
        )
    assert minimal_perturbation(model, x, y).success.all()
    assert not masking_report(model, x, y, 0.1).masked


def test_inputs_of_any_shape_and_the_repr() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    x, y = torch.randn(5, 2, 3, 2), torch.zeros(5, dtype=torch.int64)
    for norm in (math.inf, 2):
        found = attack(model, x, y, 0.1, norm=norm, restarts=2)
        assert found.inputs.shape == x.shape
    assert repr(found) == f"Attack({int(found.success.sum())} of 5 succeed, 0 with zero gradients)"


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(4, 20, dtype=torch.int64)}, TypeError, "attack: expected a floating"),
        ({"y": torch.zeros(3, dtype=torch.int64)}, ValueError, r"int64 of the shape \(4,\)"),
        ({"y": torch.zeros(4)}, ValueError, "got torch.float32"),
        ({"bounds": (0.1, 1.0)}, ValueError, r"x within the bounds \(0.1, 1.0\), got 0 to 0"),
        ({"norm": 1}, ValueError, "norm to be math.inf or 2"),
        ({"steps": 0}, ValueError, "steps to be 1 or more"),
        ({"restarts": 0}, ValueError, "restarts to be 1 or more"),
        ({"eps": -1.0}, ValueError, "eps to be 0 or more"),
        ({"loss": "mse"}, ValueError, "'margin' or 'cross_entropy', got 'mse'"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], text: str) -> None:
    call: dict[str, Any] = {"x": torch.zeros(4, 20), "y": torch.zeros(4, dtype=torch.int64)}
    with pytest.raises(error, match=text):
        attack(Scaled(), **{"eps": 0.1, **call, **change})
