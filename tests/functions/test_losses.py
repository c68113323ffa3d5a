"""The loss that learns its weights, against quadrature and an independent optimizer."""

from __future__ import annotations

import copy
import io
import itertools
import math

import mpmath
import numpy as np
import pytest
import scipy.integrate
import scipy.optimize
import scipy.special
import torch
import torch.nn.functional as F
from cases import DEVICES, FLOAT_DTYPES
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacrev, jvp, stack_module_state, vmap
from torch.testing import assert_close

from autograd_lib.functions import losses
from autograd_lib.functions.losses import CustomLossFunction


def draw(alpha: float, beta: float, count: int, seed: int = 0) -> Tensor:
    """Residuals of density proportional to exp(-alpha r² - beta |r|), float64.

    |r| is a normal variable of mean -beta / (2 alpha) kept above 0, drawn by its tail function.
    """
    uniform = np.random.default_rng(seed).uniform(size=(2, count))
    sigma = 1 / math.sqrt(2 * alpha)
    tail = scipy.special.ndtr(-beta * sigma) * uniform[0]
    size = sigma * (-scipy.special.ndtri(tail) - beta * sigma)
    return torch.from_numpy(np.where(uniform[1] < 0.5, size, -size))


def maximum_likelihood(residuals: Tensor) -> list[float]:
    """(alpha, beta) by SciPy alone, without derivatives, from the moments and quadrature."""
    r = residuals.abs().numpy()
    square, absolute = (r**2).mean(), r.mean()

    def negative_log_likelihood(logs: np.ndarray) -> float:
        alpha, beta = np.exp(logs)
        half = scipy.integrate.quad(
            lambda x: math.exp(-alpha * x * x - beta * x), 0, math.inf, epsabs=0, epsrel=1e-12
        )[0]
        return alpha * square + beta * absolute + math.log(2 * half)

    found = scipy.optimize.minimize(
        negative_log_likelihood,
        [math.log(0.5 / square), math.log(0.5 / absolute)],
        method="Nelder-Mead",
        options={"xatol": 1e-7, "fatol": 1e-14, "maxiter": 2000},
    )
    assert found.success
    return np.exp(found.x).tolist()


def learn(loss_fn: nn.Module, residuals: Tensor, steps: int = 30) -> list[float]:
    optimizer = torch.optim.LBFGS(
        loss_fn.parameters(),
        max_iter=100,
        tolerance_grad=1e-12,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_fn(residuals, torch.zeros_like(residuals))
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return [loss_fn.alpha.item(), loss_fn.beta.item()]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("learnable", [True, False])
@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.1), (0.37, 2.9)])
def test_value_at_the_start_is_exactly_the_weighted_sum(
    alpha: float, beta: float, learnable: bool, dtype: torch.dtype, device: str
) -> None:
    torch.manual_seed(0)
    x, y = (100 * torch.randn(2, 50, 7, device=device)).to(dtype)
    loss_fn = CustomLossFunction(alpha, beta, learnable).to(device)
    wide = torch.promote_types(dtype, torch.float32)
    expected = alpha * F.mse_loss(x.to(wide), y.to(wide)) + beta * F.l1_loss(x.to(wide), y.to(wide))
    loss = loss_fn(x, y)
    assert loss.dtype == wide
    assert loss.requires_grad == learnable
    assert loss.item() == expected.item()
    loss_fn.to(torch.bfloat16)  # the weights' start is not rounded with the parameters
    assert loss_fn(x, y).item() == expected.item()
    loss_fn.double()
    assert loss_fn.alpha.item() == pytest.approx(alpha, rel=1e-7)


@pytest.mark.parametrize("device", DEVICES)
def test_autocast(device: str) -> None:
    x, y = torch.randn(2, 40, device=device)
    loss_fn = CustomLossFunction().to(device)
    with torch.autocast(device, torch.bfloat16):
        assert loss_fn(x, y).item() == loss_fn.cpu()(x.cpu(), y.cpu()).item()


@pytest.mark.parametrize("z", [1e-8, 1e-4, 0.1, 1.0, 3.0, 9.9, 10.0, 10.1, 30.0, 1e3, 1e6])
def test_normalizer_and_its_derivatives(z: float) -> None:
    """Against 60-digit quadrature of the density: value, gradient, Hessian by log-weights."""
    log_alpha = 0.3
    log_beta = math.log(2 * z) + log_alpha / 2
    point = torch.tensor([log_alpha, log_beta], dtype=torch.float64)
    value = losses._log_normalizer(point).item()
    gradient = torch.func.grad(losses._log_normalizer)(point)
    curvature = torch.func.hessian(losses._log_normalizer)(point)
    with mpmath.workdps(60):
        alpha, beta = (mpmath.exp(mpmath.mpf(p)) for p in point.tolist())
        scale = 1 / (beta + mpmath.sqrt(alpha))  # of the density's width

        def moment(power: int) -> mpmath.mpf:
            def density(u: mpmath.mpf) -> mpmath.mpf:
                r = u * scale
                return scale * r**power * mpmath.exp(-alpha * r * r - beta * r)

            return 2 * mpmath.quad(density, [0, 1, 3, 10, 30, 150])

        total, m1, m2, m3, m4 = (moment(k) for k in range(5))
        m1, m2, m3, m4 = (m / total for m in (m1, m2, m3, m4))
        # log Z is a cumulant generating function: its derivatives are moments.
        expected_gradient = [-alpha * m2, -beta * m1]
        mixed = alpha * beta * (m3 - m1 * m2)
        expected_curvature = [
            [alpha**2 * (m4 - m2**2) - alpha * m2, mixed],
            [mixed, beta**2 * (m2 - m1**2) - beta * m1],
        ]
        expected_value = mpmath.log(total)
    assert value == pytest.approx(float(expected_value), rel=1e-13, abs=1e-14)
    np.testing.assert_allclose(gradient, np.array(expected_gradient, dtype=float), rtol=1e-11)
    np.testing.assert_allclose(
        curvature, np.array(expected_curvature, dtype=float), rtol=1e-7, atol=1e-14
    )


def test_autograd_through_erfcx_would_lose_the_digits() -> None:
    """Why the normalizer has a branch of its own for large z: the naive derivative is wrong."""

    def naive(logs: Tensor) -> Tensor:
        a, b = logs.unbind()
        z = (b - a / 2).exp() / 2
        return (math.log(math.pi) - a) / 2 + torch.special.erfcx(z).log()

    logs = torch.tensor([0.0, 18.0], dtype=torch.float64)
    expected = -2 * math.exp(-36.0)  # -alpha m2 of a Laplace density
    assert abs(grad(naive)(logs)[0].item() / expected - 1) > 0.1
    assert grad(losses._log_normalizer)(logs)[0].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("bounds", [(-50.0, 50.0), (-1e-3, 1e-3)])
def test_far_weights_have_finite_values_and_gradients(bounds: tuple[float, float]) -> None:
    for logs in itertools.product(bounds, repeat=2):
        loss_fn = CustomLossFunction()
        with torch.no_grad():
            loss_fn.log_ratio.copy_(torch.tensor(logs))
        loss = loss_fn(torch.ones(3), torch.zeros(3))
        loss.backward()
        assert math.isfinite(loss.item())
        assert loss_fn.log_ratio.grad.isfinite().all()
        assert 0 < loss_fn.alpha.item() < math.inf
        assert 0 < loss_fn.beta.item() < math.inf


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 2.0), (0.2, 1.0), (1.0, 0.5), (2.0, 1.0)])
def test_learning_recovers_the_weights(alpha: float, beta: float) -> None:
    residuals = draw(alpha, beta, 200_000)
    best = maximum_likelihood(residuals)
    assert best == pytest.approx([alpha, beta], rel=0.1)  # the estimate is consistent
    for start in [(1.0, 0.1), (0.01, 10.0), (50.0, 50.0)]:
        found = learn(CustomLossFunction(*start).double(), residuals)
        assert found == pytest.approx(best, rel=1e-4), start


def test_estimates_scatter_around_the_truth() -> None:
    draws = [learn(CustomLossFunction().double(), draw(1.0, 2.0, 5000, seed)) for seed in range(40)]
    mean, error = np.mean(draws, 0), np.std(draws, 0) / math.sqrt(len(draws))
    assert (np.abs(mean - [1.0, 2.0]) < 4 * error).all()


@pytest.mark.parametrize("scale", [1e-4, 0.1, 1e3])
def test_weights_scale_with_the_residuals(scale: float) -> None:
    residuals = draw(1.0, 2.0, 20_000)
    alpha, beta = learn(CustomLossFunction().double(), residuals)
    found = learn(CustomLossFunction().double(), scale * residuals)
    assert found == pytest.approx([alpha / scale**2, beta / scale], rel=1e-4)


def test_without_normalizer_the_weights_run_away() -> None:
    """What the normalizer is for: the same learning on weighted sums as one might write them."""
    square, absolute = (
        m.item() for m in (draw(1, 2, 1000).square().mean(), draw(1, 2, 1000).abs().mean())
    )
    plain = torch.tensor([1.0, 0.1], requires_grad=True)
    positive = torch.zeros(2, requires_grad=True)
    optimizer = torch.optim.SGD([plain, positive], lr=0.5)
    for _ in range(2000):
        optimizer.zero_grad()
        moments = torch.tensor([square, absolute])
        ((plain * moments).sum() + (positive.exp() * moments).sum()).backward()
        optimizer.step()
    assert (plain < -100).all()  # a loss of -inf, reached by negative weights
    assert (positive.exp() < 0.01).all()  # positive ones vanish, and the loss with them
    alpha, beta = learn(CustomLossFunction().double(), draw(1, 2, 1000))
    assert alpha > 0.3
    assert beta > 0.3


def test_residuals_of_zero_leave_the_weights_finite() -> None:
    loss_fn = CustomLossFunction()
    optimizer = torch.optim.SGD(loss_fn.parameters(), lr=1.0)
    for _ in range(300):
        optimizer.zero_grad()
        loss = loss_fn(torch.zeros(4), torch.zeros(4))
        loss.backward()
        optimizer.step()
    most = math.exp(30)
    assert loss.isfinite()
    assert loss_fn.log_ratio.isfinite().all()
    # One of the two reaches its bound and stays; the density needs no more of the other.
    assert max(loss_fn.alpha.item(), loss_fn.beta.item()) == pytest.approx(most, rel=1e-5)
    assert min(loss_fn.alpha.item(), loss_fn.beta.item()) > 0.1
    before = loss_fn.log_ratio.detach().clone()
    for _ in range(300):  # ordinary residuals again: the gradient inward was never cut
        optimizer.zero_grad()
        loss_fn(torch.ones(4), torch.zeros(4)).backward()
        torch.nn.utils.clip_grad_norm_(loss_fn.parameters(), 1.0)
        optimizer.step()
    assert loss_fn.log_ratio.max() < before.max() - 20


@pytest.mark.parametrize("side", [-1, 1])
def test_at_a_bound_only_the_outward_gradient_is_cut(side: int) -> None:
    low, high = torch.tensor(-30.0), torch.tensor(30.0)
    for beyond in (30.0, 31.0):
        x = torch.tensor(side * beyond)
        outward, inward = (
            grad(lambda x, sign=sign: sign * losses._bound(x, low, high))(x)
            for sign in (-side, side)  # descent moves against the gradient
        )
        assert (outward.item(), inward.item()) == (0, side)
        assert losses._bound(x, low, high).item() == 30 * side
    assert grad(losses._bound)(torch.tensor(29.0 * side), low, high) == 1


def test_the_bound_has_second_derivatives_in_forward_mode() -> None:
    low, high = torch.tensor(-30.0), torch.tensor(30.0)

    def slope(t: Tensor) -> Tensor:
        return jvp(lambda t: losses._bound(t**3, low, high), (t,), (torch.ones(()),))[1]

    t, one = torch.tensor(2.0), torch.ones(())
    assert [r.item() for r in jvp(slope, (t,), (one,))] == [12.0, 12.0]


def call(loss_fn: nn.Module, x: Tensor, y: Tensor, log_ratio: Tensor) -> Tensor:
    return functional_call(loss_fn, {"log_ratio": log_ratio}, (x, y))


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.1), (1e-4, 50.0)])
def test_derivatives(alpha: float, beta: float) -> None:
    torch.manual_seed(0)
    loss_fn = CustomLossFunction(alpha, beta).double()
    x, y = torch.randn(2, 5, 3, dtype=torch.float64).requires_grad_().unbind()
    ratio = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    arguments = (x, y, ratio)
    assert gradcheck(
        lambda *a: call(loss_fn, *a), arguments, check_batched_grad=True, check_forward_ad=True
    )
    assert gradgradcheck(lambda *a: call(loss_fn, *a), arguments, check_batched_grad=True)
    curvature = hessian(lambda r: call(loss_fn, x, y, r))(ratio)
    assert_close(curvature, jacrev(jacrev(lambda r: call(loss_fn, x, y, r)))(ratio))


def test_ensembles_under_vmap() -> None:
    """Members keep their own starts, which a stacked state has to carry."""
    members = [CustomLossFunction(a, b) for a, b in [(1.0, 0.1), (3.0, 0.5)]]
    parameters, buffers = stack_module_state(members)
    x, y = torch.randn(2, 4, 3)

    def loss(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
        return functional_call(members[0], (p, b), (x, y))

    assert_close(vmap(loss)(parameters, buffers), torch.stack([m(x, y) for m in members]))
    grads = vmap(grad(loss))(parameters, buffers)["log_ratio"]
    for member, row in zip(members, grads, strict=True):
        assert_close(torch.autograd.grad(member(x, y), member.log_ratio)[0], row)


def test_the_shift_survives_saving_and_copying() -> None:
    x, y = torch.randn(2, 30)
    loss_fn = CustomLossFunction(2.0, 0.3)
    learn(loss_fn, torch.randn(500), steps=1)
    file = io.BytesIO()
    torch.save(loss_fn.state_dict(), file)
    file.seek(0)
    restored = CustomLossFunction()
    restored.load_state_dict(torch.load(file, weights_only=True))
    for other in (restored, copy.deepcopy(loss_fn)):
        assert other(x, y).item() == loss_fn(x, y).item()
        assert (other.alpha.item(), other.beta.item()) == (
            loss_fn.alpha.item(),
            loss_fn.beta.item(),
        )


@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be instantiated"
)  # by Dynamo
@pytest.mark.parametrize("learnable", [True, False])
def test_compiles_without_a_graph_break(learnable: bool) -> None:
    loss_fn = CustomLossFunction(2.0, 0.3, learnable)
    compiled = torch.compile(loss_fn, fullgraph=True, backend="aot_eager")
    x, y = torch.randn(2, 30)
    x.requires_grad_()
    inputs = [x, *loss_fn.parameters()]
    expected = torch.autograd.grad(loss_fn(x, y), inputs)
    assert_close(torch.autograd.grad(compiled(x, y), inputs), expected)


def test_plain_sum_has_no_parameters_and_takes_zero_weights() -> None:
    loss_fn = CustomLossFunction(1.0, 0.0, learnable=False)
    assert [*loss_fn.parameters()] == []
    assert loss_fn(torch.tensor([3.0]), torch.tensor([1.0])).item() == 4
    assert (loss_fn.alpha.item(), loss_fn.beta.item()) == (1, 0)


def test_prints_the_current_weights() -> None:
    loss_fn = CustomLossFunction(2.0, 0.25)
    with torch.no_grad():
        loss_fn.log_ratio[0] = math.log(2)
    assert repr(loss_fn) == "CustomLossFunction(alpha=4, beta=0.25, learnable=True)"
    assert repr(loss_fn.to("meta")) == "CustomLossFunction(learnable=True)"
    assert not loss_fn.alpha.requires_grad


def test_loss_function_refuses() -> None:
    for bad in (0.0, -1.0, math.nan, math.inf, 1e14):
        with pytest.raises(ValueError, match=r"CustomLossFunction: expected alpha .* got"):
            CustomLossFunction(alpha=bad)
        with pytest.raises(ValueError, match=r"CustomLossFunction: expected beta .* got"):
            CustomLossFunction(beta=bad)
    with pytest.raises(ValueError, match="expected alpha"):
        CustomLossFunction(alpha=-1.0, learnable=False)
    loss_fn = CustomLossFunction()
    with pytest.raises(TypeError, match=r"real floating-point .*complex64"):
        loss_fn(torch.ones(3, dtype=torch.complex64), torch.ones(3))
    with pytest.raises(TypeError, match=r"real floating-point .*int64"):
        loss_fn(torch.ones(3, dtype=torch.int64), torch.ones(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"got \(3, 1\) and \(3,\); nothing is broadcast"):
        loss_fn(torch.ones(3, 1), torch.ones(3))
