"""Laplace approximations against Bayesian linear regression, Hessians and finite differences."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES
from torch import Tensor, nn
from torch.distributions import MultivariateNormal
from torch.func import functional_call, hessian

from autograd_lib import laplace_posterior

STRUCTURES = ["full", "kron", "diag"]
Batches = list[tuple[Tensor, Tensor]]


def wide(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def regression(outputs: int = 1, rows: int = 30) -> tuple[Tensor, Tensor]:
    x = wide(rows, 4)
    return x, x @ wide(4, outputs, seed=1) + 0.3 * wide(rows, outputs, seed=2)


def extended(x: Tensor) -> Tensor:
    return torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)


def fitted(x: Tensor, y: Tensor, delta: float, sigma: float) -> nn.Linear:
    """The posterior mean of Bayesian linear regression, by its closed form."""
    model, design = nn.Linear(x.shape[1], y.shape[1]).double(), extended(x)
    precision = design.T @ design / sigma**2 + delta * torch.eye(design.shape[1]).double()
    w = torch.linalg.solve(precision, design.T @ y / sigma**2)
    model.weight.data, model.bias.data = w[:-1].T.contiguous(), w[-1]
    return model


@pytest.mark.parametrize("structure", ["full", "kron"])
@pytest.mark.parametrize("outputs", [1, 3])
def test_linear_regression_is_exact(structure: str, outputs: int) -> None:
    (x, y), delta, sigma = regression(outputs), 0.7, 0.4
    model = fitted(x, y, delta, sigma)
    batches = [(x[:11], y[:11]), (x[11:], y[11:])]
    options: dict[str, Any] = {"prior_precision": delta, "noise": sigma, "structure": structure}
    posterior = laplace_posterior(model, batches, **options)
    new, design = wide(7, 4, seed=5), extended(x)
    precision = design.T @ design / sigma**2 + delta * torch.eye(5).double()
    variance = (extended(new) @ torch.linalg.inv(precision) * extended(new)).sum(1)
    found = posterior.predict(new)
    expected = variance[:, None, None] * torch.eye(outputs).double()
    torch.testing.assert_close(found.covariance, expected, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(found.mean, model(new))
    assert found.probabilities is None
    # The targets are normal with the covariance of all weights and the noise.
    joint = design @ design.T / delta + sigma**2 * torch.eye(len(x)).double()
    evidence = sum(MultivariateNormal(torch.zeros(len(x)).double(), joint).log_prob(c) for c in y.T)
    torch.testing.assert_close(posterior.log_evidence(), evidence, rtol=1e-12, atol=0)


def classifier() -> tuple[nn.Module, Batches]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Linear(4, 3).double()
    return model, [(wide(20, 4), torch.arange(20) % 3)]


def test_softmax_regression_has_the_hessian() -> None:
    model, batches = classifier()
    (x, y), delta = batches[0], 0.5
    parameters = {k: p.detach() for k, p in model.named_parameters()}

    def loss(flat: Tensor) -> Tensor:
        own = {"weight": flat[:12].reshape(3, 4), "bias": flat[12:]}
        return F.cross_entropy(functional_call(model, own, (x,)), y, reduction="sum")

    flat = torch.cat([p.flatten() for p in parameters.values()])
    precision = hessian(loss)(flat) + delta * torch.eye(15).double()
    posterior = laplace_posterior(model, batches, "classification", prior_precision=delta)
    new = wide(5, 4, seed=5)
    jacobian = torch.func.jacrev(
        lambda f: functional_call(model, {"weight": f[:12].reshape(3, 4), "bias": f[12:]}, (new,))
    )(flat)
    expected = jacobian @ torch.linalg.inv(precision) @ jacobian.mT
    found = posterior.predict(new)
    torch.testing.assert_close(found.covariance, expected, rtol=1e-11, atol=1e-12)
    assert found.probabilities is not None
    torch.testing.assert_close(found.probabilities.sum(1), torch.ones(5).double())
    flatter = model(new).softmax(1).amax(1)
    assert (found.probabilities.amax(1) < flatter).all()
    evidence = -loss(flat) - delta / 2 * flat.square().sum() + 15 / 2 * math.log(delta)
    evidence = evidence - torch.logdet(precision) / 2
    torch.testing.assert_close(posterior.log_evidence(), evidence, rtol=1e-11, atol=0)


class Mixed(nn.Module):
    """Linear layers, a normalization, a convolution and, if asked for, a shared weight."""

    def __init__(self, shared: bool = False) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(1, 2, 3, padding=1), nn.LayerNorm(8)
        self.first, self.middle, self.last = nn.Linear(8, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        self.after = nn.Linear(5, 5)
        if shared:
            self.after.weight = self.middle.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(self.conv(x[:, None]).flatten(1))
        h = torch.tanh(self.middle(torch.tanh(self.first(h))))
        return self.last(torch.tanh(self.after(h)))


def mixed(shared: bool = False) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Mixed(shared).double().eval()


def summed_curvature(model: nn.Module, x: Tensor) -> Tensor:
    """The sum of J^T J by one backward at a time."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = []
    for output in model(x).flatten():
        found = torch.autograd.grad(output, parameters, retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in found]))
    jacobian = torch.stack(rows)
    return jacobian.T @ jacobian


@pytest.mark.parametrize("shared", [False, True])
def test_full_and_diag_are_those_of_the_curvature(shared: bool) -> None:
    model, x, y = mixed(shared), wide(12, 4), wide(12, 2, seed=1)
    curvature = summed_curvature(model, x)
    full = laplace_posterior(model, [(x[:5], y[:5]), (x[5:], y[5:])])
    (block,) = full._blocks
    assert block.vectors is not None
    again = block.vectors @ torch.diag(block.values) @ block.vectors.T
    torch.testing.assert_close(again, curvature, rtol=1e-9, atol=1e-10)
    diag = laplace_posterior(model, [(x, y)], structure="diag")
    torch.testing.assert_close(diag._blocks[0].values, curvature.diagonal(), rtol=1e-10, atol=0)


def test_kron_takes_normalizations_and_names_what_is_shared() -> None:
    x, y = wide(12, 4), wide(12, 2, seed=1)
    model = mixed()
    kron = laplace_posterior(model, [(x, y)], structure="kron")
    exact = summed_curvature(model, x).diagonal()
    rest = kron._blocks[-1]
    assert rest.names == ["conv.weight", "conv.bias", "norm.weight", "norm.bias"]
    torch.testing.assert_close(rest.values, exact[: len(rest.values)], rtol=1e-10, atol=0)
    new = wide(6, 4, seed=9)
    full = laplace_posterior(model, [(x, y)]).predict(new).covariance
    near = kron.predict(new).covariance
    assert 0.05 < (near - full).norm() / full.norm() < 1  # an approximation
    with pytest.raises(NotImplementedError, match="no form for middle, whose weight is used more"):
        laplace_posterior(mixed(shared=True), [(x, y)], structure="kron")

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.head = nn.Linear(4, 4).double(), nn.Linear(4, 2).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer(torch.tanh(self.layer(x))))

    twice = Twice()
    with pytest.raises(NotImplementedError, match="no form for layer"):
        laplace_posterior(twice, [(x, y)], structure="kron")
    assert not twice.layer._forward_hooks


@pytest.mark.parametrize("structure", STRUCTURES)
@pytest.mark.parametrize("likelihood", ["regression", "classification"])
def test_predictions_are_differentiable_in_the_inputs(structure: str, likelihood: str) -> None:
    model, x = mixed(), wide(12, 4)
    y = wide(12, 2, seed=1) if likelihood == "regression" else torch.arange(12) % 2
    posterior = laplace_posterior(model, [(x, y)], likelihood, structure=structure)
    new = wide(2, 4, seed=3).requires_grad_()

    def uncertain(x: Tensor) -> Tensor:
        found = posterior.predict(x)
        return found.covariance if found.probabilities is None else found.probabilities

    assert torch.autograd.gradcheck(uncertain, (new,))


def test_torch_differentiates_mapped_gradients_of_layer_norm_wrongly() -> None:
    """Why `_jacobians` is not `vmap(jacrev(...))`; once this fails, it can be."""
    weight, x = wide(8), wide(2, 8, seed=1).requires_grad_()

    def output(weight: Tensor, x: Tensor) -> Tensor:
        return F.layer_norm(x, (8,), weight).sin().sum()

    slope = torch.func.grad(output)
    mapped = torch.vmap(slope, (None, 0))(weight, x).square().sum()
    looped = torch.stack([slope(weight, row) for row in x]).square().sum()
    torch.testing.assert_close(mapped, looped)
    wrong, right = (torch.autograd.grad(loss, x)[0] for loss in (mapped, looped))
    assert not torch.allclose(wrong, right, rtol=0.01)


@pytest.mark.parametrize("structure", STRUCTURES)
def test_samples_have_the_covariance(structure: str) -> None:
    x, y = regression(2)
    model = fitted(x, y, 1.0, 0.5)
    posterior = laplace_posterior(model, [(x, y)], structure=structure, noise=0.5)
    drawn = posterior.sample(20_000, torch.Generator().manual_seed(0))
    new = wide(1, 4, seed=5)
    outputs = torch.vmap(lambda w: functional_call(model, w, (new,))[0])(drawn)
    found = posterior.predict(new)
    torch.testing.assert_close(outputs.mean(0), found.mean[0], rtol=0.01, atol=0.01)
    torch.testing.assert_close(outputs.T.cov(), found.covariance[0], rtol=0.05, atol=3e-4)
    again = posterior.sample(3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(
        again["bias"], posterior.sample(3, torch.Generator().manual_seed(0))["bias"]
    )


@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_prior_that_makes_the_data_most_likely(structure: str) -> None:
    x, y = regression(2, 200)
    posterior = laplace_posterior(fitted(x, y, 1.0, 0.3), [(x, y)], structure=structure)
    best = posterior.fit_prior()
    assert 0.2 < best.noise < 0.4  # 0.3 made the data
    for change in (0.9, 1.1):
        assert best.log_evidence() > best.log_evidence(best.prior_precision * change)
        assert best.log_evidence() > best.log_evidence(noise=best.noise * change)
    delta = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    sigma = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(posterior.log_evidence, (delta, sigma))
    model, batches = classifier()
    fit = laplace_posterior(model, batches, "classification", structure=structure).fit_prior()
    assert fit.noise == 1
    assert fit.log_evidence() > fit.log_evidence(fit.prior_precision * 1.5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("structure", STRUCTURES)
def test_the_device_is_that_of_the_model(device: str, structure: str) -> None:
    model, (x, y) = mixed().to(device), (wide(12, 4).to(device), wide(12, 2, seed=1).to(device))
    posterior = laplace_posterior(model, [(x, y)], structure=structure).fit_prior()
    assert posterior.predict(x).covariance.device.type == device
    assert posterior.sample(2)["last.bias"].device.type == device
    assert posterior.log_evidence().device.type == device


def test_the_last_layer_alone() -> None:
    model, x, y = mixed(), wide(12, 4), wide(12, 2, seed=1)
    for structure in STRUCTURES:
        last = laplace_posterior(model, [(x, y)], structure=structure, weights="last")
        assert [n for block in last._blocks for n in block.names] == ["last.weight", "last.bias"]
    full, kron = (
        laplace_posterior(model, [(x, y)], structure=s, weights="last").predict(x).covariance
        for s in ("full", "kron")
    )
    torch.testing.assert_close(full, kron, rtol=1e-10, atol=1e-12)
    assert repr(last) == "Posterior(12 weights, prior_precision 1, noise 1)"


def test_the_model_is_left_as_it_was() -> None:
    model, x, y = mixed(), wide(12, 4), wide(12, 2, seed=1)
    model(x).sum().backward()
    before = [
        (p.detach().clone(), p.grad.clone()) for p in model.parameters() if p.grad is not None
    ]
    for structure in STRUCTURES:
        laplace_posterior(model, [(x, y)], structure=structure).predict(x)
    after = [(p, p.grad) for p in model.parameters()]
    assert all(
        torch.equal(a, c) and torch.equal(b, d)
        for (a, b), (c, d) in zip(before, after, strict=True)
    )
    assert not any(m._forward_hooks for m in model.modules())


class Idle(nn.Module):
    """Has a layer that nothing uses, and one whose result is thrown away."""

    def __init__(self, calls: bool) -> None:
        super().__init__()
        self.layer, self.idle = nn.Linear(4, 2).double(), nn.Linear(4, 2).double()
        self.calls = calls

    def forward(self, x: Tensor) -> Tensor:
        if self.calls:
            self.idle(x)
        return self.layer(x)


def test_layers_without_effect_keep_their_prior() -> None:
    x, y = wide(12, 4), wide(12, 2, seed=1)
    kron, full = (
        laplace_posterior(Idle(True), [(x, y)], structure=s, prior_precision=4.0)
        for s in ("kron", "full")
    )
    torch.testing.assert_close(kron.predict(x).covariance, full.predict(x).covariance)
    torch.testing.assert_close(kron._blocks[1].values, torch.zeros(10).double())
    with pytest.raises(ValueError, match=r"the data to pass idle.weight, which was not used"):
        laplace_posterior(Idle(False), [(x, y)], structure="kron")
    laplace_posterior(Idle(False), [(x, y)], structure="diag")


MODEL, X, Y = nn.Linear(4, 2).double(), wide(6, 4), wide(6, 2)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: laplace_posterior(MODEL, [(X, Y)], "poisson"), ValueError, "likelihood to be one"),
        (lambda: laplace_posterior(MODEL, [(X, Y)], structure="block"), ValueError, "'block'"),
        (lambda: laplace_posterior(MODEL, [(X, Y)], weights="first"), ValueError, "'first'"),
        (lambda: laplace_posterior(MODEL, [(Y.long(), Y)]), TypeError, "laplace_posterior"),
        (
            lambda: laplace_posterior(nn.Sequential(MODEL, nn.Flatten(0)), [(X, Y)]),
            ValueError,
            r"outputs of the shape \(6, outputs\), got \(12,\)",
        ),
        (
            lambda: laplace_posterior(nn.Sequential(MODEL, nn.Dropout()), [(X, Y)]),
            ValueError,
            "got 1, a Dropout, in training mode",
        ),
        (
            lambda: laplace_posterior(nn.Linear(200, 200), [(X, Y)]),
            ValueError,
            r"got 40200; use structure='kron', or weights='last'",
        ),
        (
            lambda: laplace_posterior(nn.Identity(), [(X, Y)], weights="last"),
            ValueError,
            "a linear",
        ),
        (lambda: laplace_posterior(MODEL, []), ValueError, "at least one batch"),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()
