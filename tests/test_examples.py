"""The demonstrations: what they return is right by other means, and what they print is that.

No test looks at a wall time.
"""

from __future__ import annotations

import contextlib
import io
import math
import random
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from torch import Tensor, nn

from autograd_lib.config import Settings
from autograd_lib.examples import AdvancedAutogradExamples, AutogradExamples
from autograd_lib.report.tables import readable_bytes

# What Dynamo and Inductor say of themselves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning"),
]
ADVANCED = ("gradient_flow", "performance", "custom_models")


def states() -> list[Any]:
    numpy = np.random.get_state()
    modes = torch.is_grad_enabled(), torch.get_default_dtype(), torch.is_anomaly_enabled()
    return [torch.get_rng_state().tolist(), random.getstate(), numpy[1].tolist(), *numpy[2:], modes]


def shown(demonstration: Callable[[], dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """What a demonstration returns and prints; the caller's states are none of its business."""
    before = states()
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        results = demonstration()
    assert states() == before
    return results, printed.getvalue()


@pytest.fixture(scope="module")
def basic() -> tuple[dict[str, Any], str]:
    return shown(AutogradExamples.demonstrate_autograd_system)


@pytest.fixture(scope="module")
def advanced(short_samples: None) -> tuple[dict[str, Any], str]:
    """Compiled without Inductor, which has tests of its own; Dynamo and AOTAutograd take part."""
    with mock.patch("torch.compile", partial(torch.compile, backend="aot_eager")):
        results = shown(lambda: AdvancedAutogradExamples.run_all_advanced_examples(compile=True))
    torch._dynamo.reset()
    return results


# The basic demonstration.


def test_basic_parts(basic) -> None:
    assert list(basic[0]) == ["gradients", "loss", "function", "training"]


def test_gradients_are_those_of_the_closed_form(basic) -> None:
    found = basic[0]["gradients"]
    model, x, y = found["model"].double(), found["inputs"].double(), found["targets"].double()
    residual = x @ model.weight.T + model.bias - y
    weight = (2 / 32 * residual.T @ x).norm().item()
    bias = (2 / 32 * residual.sum(0)).norm().item()
    assert found["complete"] is True
    assert found["norms"] == pytest.approx({"weight": weight, "bias": bias}, rel=1e-5)
    assert found["statistics"]["total_norm"] == pytest.approx(math.hypot(weight, bias), rel=1e-5)


def test_learned_weights_are_those_of_maximum_likelihood(basic) -> None:
    """An exponential family: the moments of the density are those of the residuals."""
    found = basic[0]["loss"]
    r, (alpha, beta) = found["residuals"].double(), found["learned"]

    def moment(f: Callable[[float], float]) -> float:
        return quad(lambda r: f(r) * math.exp(-alpha * r * r - beta * r), 0, math.inf)[0]

    total = moment(lambda r: 1.0)
    assert moment(lambda r: r) / total == pytest.approx(r.abs().mean().item(), rel=1e-3)
    assert moment(lambda r: r * r) / total == pytest.approx(r.square().mean().item(), rel=1e-3)
    assert found["start"] == pytest.approx((1, 0.1))
    before, after = found["values"]
    assert before == pytest.approx((r.square().mean() + 0.1 * r.abs().mean()).item(), rel=1e-5)
    # With the weights of the start the normalizer is that of the start, by quadrature too.
    start = 2 * quad(lambda r: math.exp(-r * r - 0.1 * r), 0, math.inf)[0]
    learned = alpha * r.square().mean() + beta * r.abs().mean() + math.log(2 * total / start)
    assert after == pytest.approx(learned.item(), rel=1e-4)
    assert after < before


def test_function_is_a_product_with_its_gradients(basic) -> None:
    found = basic[0]["function"]
    x, w, ones = found["input"], found["weight"], torch.ones(4, 2, dtype=torch.float64)
    torch.testing.assert_close(found["output"], torch.einsum("ni,oi->no", x, w))
    torch.testing.assert_close(found["gradients"], (ones @ w, ones.T @ x))
    assert found["checked"] is True


def flat_loss(model: nn.Module, theta: Tensor) -> Tensor:
    """The loss of the demonstration at these parameters, in float64."""
    x = torch.linspace(-2, 2, 64, dtype=torch.float64)[:, None]
    sizes = [p.numel() for p in model.parameters()]
    w0, b0, w1, b1 = theta.split(sizes)
    hidden = torch.tanh(x * w0 + b0)
    return (hidden @ w1[:, None] + b1 - torch.sin(2 * x)).square().mean()


def test_training_descends_as_plain_gradient_descent_does(basic) -> None:
    found = basic[0]["training"]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        start = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    theta = nn.utils.parameters_to_vector(start.parameters()).double().detach().requires_grad_()
    losses, norms = [], []
    for _ in range(50):
        loss = flat_loss(start, theta)
        (grad,) = torch.autograd.grad(loss, theta)
        theta = (theta - 0.1 * grad).detach().requires_grad_()
        losses.append(loss.item())
        norms.append([part.norm().item() for part in grad.split([16, 16, 16, 1])])
    assert found["losses"] == pytest.approx(losses, rel=1e-4)
    assert found["system"].step == 50
    monitor = found["system"].monitor
    assert monitor.history["names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    np.testing.assert_allclose(monitor.history["norm"], norms, rtol=1e-3)
    assert found["summary"]["step"] == 50
    assert found["summary"]["total_norm"] == pytest.approx(math.hypot(*norms[-1]), rel=1e-3)
    assert monitor.issues == []


def test_tower_is_that_of_nested_derivatives(basic) -> None:
    found = basic[0]["training"]
    model = found["system"].model
    theta = nn.utils.parameters_to_vector(model.parameters()).double().detach()
    along = torch.cat([found["tower"].direction[name].flatten().double() for name in names(model)])

    def line(t: Tensor) -> Tensor:
        return flat_loss(model, theta + t * along)

    t, values = torch.zeros((), dtype=torch.float64, requires_grad=True), []
    value = line(t)
    for _ in range(4):
        values.append(value.item())
        (value,) = torch.autograd.grad(value, t, create_graph=True)
    assert found["tower"].values.tolist() == pytest.approx(values, rel=1e-3)
    step = found["step"]
    terms = [v * (-step) ** k / math.factorial(k) for k, v in enumerate(values)]
    assert found["predicted"] == pytest.approx(np.cumsum(terms).tolist(), rel=1e-3)
    assert found["found"] == pytest.approx(line(torch.tensor(-step)).item(), rel=1e-3)
    errors = [abs(value - found["found"]) for value in found["predicted"]]
    assert errors == sorted(errors, reverse=True)
    assert errors[3] < errors[0] / 50


def names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def test_basic_prints_what_it_returns(basic) -> None:
    results, text = basic
    assert repr(results["gradients"]["statistics"]) in text
    assert repr(results["training"]["summary"]) in text
    alpha, beta = results["loss"]["learned"]
    assert f"learned  {alpha:.3g}  {beta:.3g}  {results['loss']['values'][1]:.3g}" in text
    for order, value in enumerate(results["training"]["predicted"]):
        assert f"order {order}  {value:.3g}\n" in text
    assert f"found    {results['training']['found']:.3g}\n" in text
    assert len(text.splitlines()) < 40


# The advanced ones.


def test_all_advanced_ones(advanced) -> None:
    assert tuple(advanced[0]) == ADVANCED


def test_gradients_flow_as_theory_says(advanced) -> None:
    """The factor of a layer: the gain of its weights times the slope of its activation."""
    flow = advanced[0]["gradient_flow"]
    # Weights uniform within 1 / sqrt(n) have the variance 1 / (3 n); a sigmoid's slope is 1/4.
    assert flow["vanishing"]["factor"] == pytest.approx(math.sqrt(1 / 3) / 4, rel=0.1)
    assert flow["exploding"]["factor"] == pytest.approx(2, rel=0.1)
    assert flow["residual"]["factor"] == pytest.approx(math.sqrt(1 + 1 / 16), rel=0.1)
    kinds = {name: {issue.kind for issue in found["issues"]} for name, found in flow.items()}
    assert kinds == {"vanishing": {"vanishing"}, "exploding": {"exploding"}, "residual": set()}
    for found in flow.values():
        history = found["history"]
        assert history["norm"].shape == (10, 34)
        bias = history["norm"][:, [history["names"].index(f"{i}.0.bias") for i in range(16)]]
        steps = np.median(bias[:, :-1] / bias[:, 1:], axis=0)
        assert found["factor"] == pytest.approx(np.exp(np.log(steps).mean()), rel=0.1)


def test_saved_bytes_are_those_of_the_formula(advanced) -> None:
    """Six blocks of Linear and GELU, each of which keeps its input; the loss keeps two tensors."""
    saved, tensor = advanced[0]["performance"]["saved"], 512 * 32 * 4
    assert saved["plain"] == saved["compiled"] == (6 + 5 + 2) * tensor  # the first input is given
    assert saved["micro-batches"] == saved["plain"] / 4
    assert saved["recomputed"] == (5 + 2) * tensor
    # Inputs of all, half as wide; the weights through which gradients go, rounded.
    assert saved["bf16"] == 6 * tensor + 2 * tensor + 5 * 32 * 32 * 2


def test_comparison_covers_the_variants(advanced) -> None:
    found = advanced[0]["performance"]
    comparison, saved = found["comparison"], found["saved"]
    assert comparison.names == ("plain", "bf16", "micro-batches", "recomputed", "compiled")
    assert comparison.baseline == "plain"
    gradients = 6 * (32 * 32 + 32) * 4
    for name in ("plain", "recomputed"):
        assert comparison.peak_bytes[name] > saved[name]
    peaks = {name: comparison.peak_bytes[name] for name in ("recomputed", "bf16", "micro-batches")}
    assert max(peaks.values()) < comparison.peak_bytes["plain"]
    assert min(peaks.values()) > saved["micro-batches"] / 2 + gradients


def test_plan_and_settings_keep_to_the_budget(advanced) -> None:
    found = advanced[0]["performance"]
    budget, tuning = found["budget"], found["tuning"]
    assert budget == found["comparison"].peak_bytes["plain"] // 2
    assert found["plan_peak"] == pytest.approx(found["plan"].predicted_bytes, rel=0.03)
    assert found["plan_peak"] <= budget < found["plan"].plain_bytes
    assert (tuning.memory_budget, tuning.tolerance) == (budget, 1e-4)
    trials = {trial.settings: trial for trial in tuning.trials}
    assert trials[tuning.best].peak_bytes <= budget
    assert trials[tuning.best].gradient_error <= 1e-4
    assert trials[Settings()].peak_bytes == pytest.approx(2 * budget, rel=0.01)
    assert trials[Settings("bf16")].verdict.startswith("error")
    assert any(settings.compile for settings in trials)


@pytest.fixture(scope="module")
def models(advanced) -> dict[str, Any]:
    return advanced[0]["custom_models"]


def test_every_parameter_has_its_gradient(models) -> None:
    assert list(models) == ["transformer", "cnn", "rnn"]
    for found in models.values():
        assert found["complete"] is True
        assert all(p.grad is not None for p in found["model"].parameters())
        assert [row["epoch"] for row in found["rows"]] == list(range(1, 16))
        assert found["rows"][-1]["loss"] < found["rows"][0]["loss"] / 20


@torch.no_grad()
def test_transformer_continues_new_repetitions(models) -> None:
    tokens = torch.randint(16, (64, 3), generator=torch.Generator().manual_seed(1)).repeat(1, 4)
    guess = models["transformer"]["model"](tokens[:, :-1]).argmax(-1)
    assert (guess[:, 2:] == tokens[:, 3:]).float().mean() > 0.98


def test_transformer_looks_at_the_same_token_a_period_ago(models) -> None:
    influence = models["transformer"]["influence"]
    assert influence.shape == (11, 11)
    assert torch.equal(influence, influence.tril())  # causal, exactly
    i, j = torch.meshgrid(torch.arange(11), torch.arange(11), indexing="ij")
    same = (i >= 2) & ((i - j) % 3 == 2)
    share = (influence * same)[2:].sum(1) / influence[2:].sum(1)
    assert share.min() > 0.7


@torch.no_grad()
def test_rnn_echoes_new_sequences(models) -> None:
    x = torch.randn(64, 10, 1, generator=torch.Generator().manual_seed(1))
    output = models["rnn"]["model"](x)
    assert (output[:, 2:] - x[:, :-2]).square().mean() < 0.05


def test_rnn_looks_two_steps_back(models) -> None:
    influence = models["rnn"]["influence"]
    torch.testing.assert_close(influence.diagonal(-2), torch.ones(8), rtol=0, atol=0.1)
    rest = influence - influence.diagonal(-2).diag(-2)
    assert rest.max() < 0.2
    assert torch.equal(influence, influence.tril())


def test_influence_is_the_jacobian(models) -> None:
    model = models["rnn"]["model"].double()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(256, 10, 1)[:4].double()
    jacobian = torch.autograd.functional.jacobian(lambda x: model(x).sum(0), x)[:, 0, :, :, 0]
    found = models["rnn"]["influence"]
    # Four of the samples that the mean is over: alike, as the task is linear.
    torch.testing.assert_close(jacobian.abs().mean(1).float(), found, rtol=0.2, atol=0.05)


@torch.no_grad()
def test_cnn_tells_new_shapes(models) -> None:
    generator = torch.Generator().manual_seed(1)
    images = 0.5 * torch.randn(72, 1, 8, 8, generator=generator)
    labels = torch.arange(72) % 2
    pixels = {0: [(0, 1), (1, 0), (1, 1), (1, 2), (2, 1)]}
    pixels[1] = [(0, 0), (0, 2), (1, 1), (2, 0), (2, 2)]
    for n, (image, label) in enumerate(zip(images, labels.tolist(), strict=True)):
        for row, column in pixels[label]:
            image[0, n // 12 + row, n // 2 % 6 + column] += 2
    guess = models["cnn"]["model"](images).argmax(-1)
    assert (guess == labels).float().mean() > 0.9


def test_cnn_looks_at_the_rows_of_the_shape(models) -> None:
    influence = models["cnn"]["influence"]
    assert influence.shape == (6, 8)
    i, j = torch.meshgrid(torch.arange(6), torch.arange(8), indexing="ij")
    within = (j >= i) & (j < i + 3)
    inside, outside = (influence * within).sum(1) / 3, (influence * ~within).sum(1) / 5
    assert (inside > outside).all()
    assert (inside / outside).mean() > 1.2


def test_advanced_ones_print_what_they_return(advanced) -> None:
    results, text = advanced
    performance = results["performance"]
    assert repr(performance["plan"]) in text
    assert f"measured {readable_bytes(performance['plan_peak'])}\n" in text
    assert f": {performance['tuning'].best}\n" in text
    for name, ratio in performance["comparison"].ratios.items():
        peak = readable_bytes(performance["comparison"].peak_bytes[name])
        line = next(line for line in text.splitlines() if line.startswith(f"{name} "))
        assert line.endswith(f" {ratio}")
        assert peak in line
    lines = [line.split() for line in text.splitlines() if line]
    for name, found in results["gradient_flow"].items():
        issues = sorted({issue.kind for issue in found["issues"]})
        assert [name, f"{found['factor']:.3g}", *issues] in lines
    for name, found in results["custom_models"].items():
        losses = [f"{found['rows'][epoch]['loss']:.3g}" for epoch in (0, -1)]
        assert [name, *losses, "True"] in lines
