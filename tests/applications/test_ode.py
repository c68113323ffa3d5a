"""Solutions of differential equations against closed forms, SciPy and backpropagation."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import DEVICES
from scipy.integrate import RK45, solve_ivp
from torch import Tensor, nn

from autograd_lib import solve_ode
from autograd_lib.applications import steps

METHODS = ["taylor", "dopri5"]
TIGHT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-10}


def wide(*values: Any) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def lotka_volterra(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    prey, predators = y.unbind(-1)
    return torch.stack(
        [prey * (p[..., 0] - p[..., 1] * predators), predators * (p[..., 2] * prey - p[..., 3])], -1
    )


RATES = wide(1.5, 1.0, 1.0, 3.0)


class Net(nn.Module):
    def __init__(self, act: Callable[[Tensor], Tensor] = torch.tanh) -> None:
        super().__init__()
        self.first, self.last, self.act = nn.Linear(2, 8), nn.Linear(8, 2), act
        self.frozen = nn.Parameter(torch.ones(()), requires_grad=False)

    def forward(self, t: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return self.last(self.act(self.first(y))) * scale * self.frozen + torch.cos(t)


def net(act: Callable[[Tensor], Tensor] = torch.tanh) -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net(act).double()


# Right-hand side, start, times, solution.
CLOSED: dict[str, tuple[Callable[..., Tensor], Tensor, list[float], Callable[..., Any]]] = {
    "decay": (lambda t, y: -y, wide(2.0), [0.0, 0.5, 3.0], lambda t: 2 * np.exp(-t)),
    "backward": (lambda t, y: -y, wide(2.0), [1.0, 0.5, -2.0], lambda t: 2 * np.exp(1 - t)),
    "time": (lambda t, y: -2 * t * y, wide([1.0]), [0.0, 2.0], lambda t: [np.exp(-t * t)]),
    "rotation": (
        lambda t, y: torch.stack([y[1], -y[0]]),
        wide(0.0, 1.0),
        [0.0, 1.0, 2.0, 20.0],
        lambda t: [np.sin(t), np.cos(t)],
    ),
    "logistic": (
        lambda t, y: y * (1 - y),
        wide(0.1),
        [0.0, 9.0],
        lambda t: 1 / (1 + 9 * np.exp(-t)),
    ),
    "complex": (
        lambda t, y: 1j * y,
        torch.tensor(1 + 0j, dtype=torch.complex128),
        [0.0, 4.0],
        lambda t: np.exp(1j * t),
    ),
    "constant": (lambda t, y: torch.full_like(y, 3), wide(1.0), [0.0, 7.0], lambda t: 1 + 3 * t),
    "rest": (lambda t, y: torch.zeros_like(y), wide(1.0), [0.0, 1e20], lambda t: 1.0),
    # No coefficient below order 31 sees what is to come.
    "late": (lambda t, y: 31 * t**30 + 0 * y, wide(0.0), [0.0, 1.2], lambda t: t**31),
    "kink": (
        lambda t, y: torch.relu(t - 1) + 0 * y,
        wide(0.0),
        [0.0, 3.0],
        lambda t: max(t - 1, 0) ** 2 / 2,
    ),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", CLOSED)
def test_closed_forms(name: str, method: str) -> None:
    f, y0, t, solution = CLOSED[name]
    found = solve_ode(f, y0, t, method=method, **TIGHT)
    expected = torch.tensor(np.array([solution(x) for x in t]), dtype=y0.dtype)
    assert torch.allclose(found.ys, expected, rtol=1e-8, atol=3e-8)
    between = torch.linspace(t[0], t[-1], 23, dtype=torch.float64).flip(0)
    expected = torch.tensor(np.array([solution(x) for x in between.tolist()]), dtype=y0.dtype)
    assert torch.allclose(found.at(between), expected, rtol=1e-7, atol=1e-7)
    assert found.at(t[0]).shape == y0.shape
    assert torch.equal(found.at(t), found.ys)
    assert found.event_time is None
    assert found.event_state is None


def test_the_tableau_is_that_of_scipy() -> None:
    for i, row in enumerate(steps._STAGES[1:6], 1):
        assert np.allclose(RK45.A[i, : len(row)], row, rtol=1e-15)
    assert np.allclose(RK45.B, steps._STAGES[6], rtol=1e-15)
    assert np.allclose(RK45.C, steps._NODES[:6], rtol=1e-15)
    assert np.allclose(RK45.E, steps._ERRORS, rtol=1e-15)
    assert np.allclose(RK45.P.T, steps._DENSE, rtol=1e-15)


@pytest.mark.parametrize("method", METHODS)
def test_the_error_follows_the_tolerance(method: str) -> None:
    exact = wide(1.0263447675750845, 0.9096910781360523)  # Taylor's order 30 at 1e-15
    errors = []
    for tol in (1e-5, 1e-7, 1e-9):
        found = solve_ode(
            lotka_volterra, wide(1.0, 1.0), [0, 10], RATES, method=method, rtol=tol, atol=tol
        )
        errors.append((found.ys[-1] - exact).abs().max().item() / tol)
    assert max(errors) < 100


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_recomputed_gradients_are_those_of_backpropagation(method: str, per_sample: bool) -> None:
    model = net()
    y0 = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(3, 2)
    t = wide(0.0, 0.3, 0.31, 1.0)
    found = []
    for gradient in ("recompute", "backprop"):
        inputs = [x.clone().requires_grad_() for x in (y0, t, wide(1.5))]
        if per_sample:
            solution = solve_ode(
                Batched(model),
                inputs[0],
                inputs[1],
                inputs[2],
                method=method,
                per_sample=True,
                gradient=gradient,
            )
        else:
            solution = solve_ode(model, *inputs, method=method, gradient=gradient)
        wanted = [*inputs, *(p for p in model.parameters() if p.requires_grad)]
        loss = solution.ys.square().sum()
        found.append([solution.ys.detach(), *torch.autograd.grad(loss, wanted, retain_graph=True)])
        between = solution.at(inputs[1][:2] + 0.1)
        found[-1] += [between.detach(), *torch.autograd.grad(between.sin().sum(), wanted)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(torch.isfinite(g).all() and g.abs().max() > 0 for g in found[0])


class Batched(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, t: Tensor, y: Tensor, scale: Tensor) -> Tensor:
        return self.model(t[:, None], y, scale)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradient", ["recompute", "backprop"])
def test_gradients_by_finite_differences(method: str, gradient: str) -> None:
    def f(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        return k * torch.sin(t) - y * y

    def solved(y0: Tensor, t: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        solution = solve_ode(f, y0, t, k, method=method, gradient=gradient, rtol=1e-13, atol=1e-13)
        return solution.ys, solution.at(t[1:] - 0.05)

    inputs = [x.requires_grad_() for x in (wide(0.5, 0.2), wide(0.1, 0.4, 0.9), wide(1.3))]
    assert torch.autograd.gradcheck(solved, inputs, eps=1e-5, atol=1e-7)
    assert torch.autograd.gradgradcheck(solved, inputs, eps=1e-5, atol=1e-5)


@pytest.mark.parametrize("gradient", ["recompute", "backprop", "adjoint"])
def test_gradients_of_the_end_are_the_closed_ones(gradient: str) -> None:
    y0, k, t = (x.requires_grad_() for x in (wide(2.0), wide(0.7), wide(0.5, 1.5, 2.0)))
    ys = solve_ode(lambda t, y, k: -k * y, y0, t, k, gradient=gradient, **TIGHT).ys
    of_y0, of_k, of_t = torch.autograd.grad(ys[-1], [y0, k, t])
    y = 2 * math.exp(-0.7 * 1.5)
    assert torch.allclose(of_y0, wide(y / 2), rtol=1e-8)
    assert torch.allclose(of_k, wide(-1.5 * y), rtol=1e-8)
    assert torch.allclose(of_t, wide(0.7 * y, 0.0, -0.7 * y), rtol=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_the_adjoint_agrees_where_it_may(method: str) -> None:
    model, y0 = net(), wide(0.3, -0.2).requires_grad_()
    wanted = [y0, *(p for p in model.parameters() if p.requires_grad)]
    found = [
        torch.autograd.grad(
            solve_ode(model, y0, [0, 1, 2], method=method, gradient=gradient, **TIGHT)
            .ys.sin()
            .sum(),
            wanted,
        )
        for gradient in ("adjoint", "recompute")
    ]
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(*found, strict=True))


def test_the_adjoint_says_when_it_lost_its_way() -> None:
    """The solution of y' = -k sin y has tan(y / 2) = tan(y0 / 2) exp(-k t)."""
    k, y0 = wide(1.0).requires_grad_(), wide(2.0).requires_grad_()

    def contracting(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        return -k * torch.sin(y)

    exact = math.exp(-60) / math.cos(1) ** 2
    ys = solve_ode(contracting, y0, [0.0, 60.0], k, gradient="adjoint").ys
    with pytest.warns(RuntimeWarning, match=r"parted from the forward one by .* tolerances"):
        (wrong,) = torch.autograd.grad(ys[-1], y0, retain_graph=True)
    assert abs(wrong - exact) > 1
    recomputed = solve_ode(contracting, y0, [0.0, 60.0], k).ys
    assert abs(torch.autograd.grad(recomputed[-1], y0)[0] - exact) < 1e-6
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(ys[-1], k, create_graph=True)
    solution = solve_ode(contracting, y0, [0.0, 1.0], k, gradient="adjoint")
    with pytest.raises(NotImplementedError, match="has no gradient by gradient='adjoint'"):
        solution.at(0.5)
    with torch.no_grad():
        assert solution.at(1.0) == solution.ys[-1]


class SavedStates:
    """Counts the bytes of distinct storages that a graph saves, without those of its inputs."""

    def __init__(self, *inputs: Tensor) -> None:
        self.inputs = {x.untyped_storage().data_ptr() for x in inputs}
        self.sizes: dict[int, int] = {}
        self.kept: list[Tensor] = []

    def pack(self, x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self.inputs:
            self.kept.append(x)
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return x


@pytest.mark.parametrize("method", METHODS)
def test_one_state_a_step_is_saved(method: str) -> None:
    y0, p = torch.ones(50, 2, dtype=torch.float64).requires_grad_(), RATES.clone().requires_grad_()
    t = wide(0.0, 10.0)
    counted = SavedStates(y0, p, t)
    with torch.autograd.graph.saved_tensors_hooks(counted.pack, lambda x: x):
        solution = solve_ode(lotka_volterra, y0, t, p, method=method)
    state = y0.numel() * 8
    assert sum(counted.sizes.values()) == (solution.steps - 1) * state
    everything = SavedStates(y0, p, t)
    with torch.autograd.graph.saved_tensors_hooks(everything.pack, lambda x: x):
        solve_ode(lotka_volterra, y0, t, p, method=method, gradient="backprop")
    assert sum(everything.sizes.values()) > 10 * sum(counted.sizes.values())


def test_nothing_outlives_a_solution() -> None:
    class State(nn.Module):
        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return -y

    gc.disable()
    try:
        model, y0 = State(), torch.ones(2, requires_grad=True)
        solution = solve_ode(model, y0, [0.0, 1.0], rtol=1e-5)
        solution.ys.sum().backward()
        gone = [weakref.ref(x) for x in (model, solution, solution.ys)]
        del model, solution
        assert [ref() for ref in gone] == [None, None, None]
    finally:
        gc.enable()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("tol", [1e-6, 1e-9, 1e-12])
def test_events_are_found_within_the_tolerance(method: str, tol: float) -> None:
    """The solution cos(k t) crosses zero at pi / 2k, and comes back."""
    k = wide(1.0).requires_grad_()

    def f(t: Tensor, y: Tensor, k: Tensor) -> Tensor:
        return k * torch.stack([y[1], -y[0]])

    found = solve_ode(
        f,
        wide(1.0, 0.0),
        [0.0, 1.0, 9.0],
        k,
        method=method,
        rtol=tol,
        atol=tol,
        event=lambda t, y: y[0],
    )
    assert found.event_time is not None
    assert found.event_state is not None
    assert abs(found.event_time - math.pi / 2) < tol
    assert (found.event_state - wide(0.0, -1.0)).abs().max() < 3 * tol
    assert torch.equal(found.ys[2], found.event_state)
    assert (found.ys[1] - wide(math.cos(1), -math.sin(1))).abs().max() < 3 * tol
    assert torch.equal(found.at(5.0), found.event_state)
    (of_k,) = torch.autograd.grad(found.event_time, k, retain_graph=True)
    assert abs(of_k + math.pi / 2) < 10 * tol
    (of_k,) = torch.autograd.grad(found.event_state.sum(), k)
    assert abs(of_k) < 10 * tol  # the state at the event does not depend on k


def test_gradients_of_events_by_finite_differences() -> None:
    """A ball thrown up lands; the second derivative of its time is known too."""

    def flight(y0: Tensor, start: Tensor, g: Tensor) -> Any:
        found = solve_ode(
            lambda t, y, g: torch.stack([y[1], -g - 0.1 * y[1]]),
            y0,
            torch.stack([start, start + 100]),
            g,
            event=lambda t, y: y[0],
            **TIGHT,
        )
        return found.event_time, found.event_state

    inputs = [x.requires_grad_() for x in (wide(0.2, 5.0), wide(0.3), wide(9.81))]
    time, state = flight(*inputs)
    assert time > 0.3
    assert state[0].abs() < 1e-9
    assert state[1] < 0
    assert torch.autograd.gradcheck(flight, inputs, eps=1e-5, atol=1e-6)
    assert torch.autograd.gradgradcheck(flight, inputs, eps=1e-5, atol=1e-4)


def test_an_event_that_is_zero_at_the_start_may_come_back_soon() -> None:
    """A throw is one exact step, in which the ball lands before the first place looked at."""
    start, v = wide(0.0, 5.0), 5.0
    throw = lambda t, y: torch.stack([y[1], torch.full_like(y[0], -9.81)])  # noqa: E731
    for end in (2.0, 10.0, 1000.0):
        for method in METHODS:
            found = solve_ode(throw, start, [0.0, end], method=method, event=lambda t, y: y[0])
            assert found.event_time is not None
            assert torch.allclose(found.event_time, wide(2 * v / 9.81), rtol=1e-6)
    # A ball that bounces: the state at an event is the start of what follows.
    again = solve_ode(throw, found.ys[-1] * wide(1.0, -0.5), [0.0, 9.0], event=lambda t, y: y[0])
    assert again.event_time is not None
    assert torch.allclose(again.event_time, wide(v / 9.81), rtol=1e-6)


def test_between_times_without_gradients() -> None:
    k, start = wide(1.0, 2.0).requires_grad_(), wide([[1.0, 0.0], [1.0, 0.0]])
    spin = lambda t, y, k: k[:, None] * torch.stack([y[:, 1], -y[:, 0]], 1)  # noqa: E731
    found = solve_ode(spin, start, [0, 3], k, event=lambda t, y: y[:, 0], per_sample=True)
    with torch.no_grad():
        assert not found.at(0.5).requires_grad
    torch.testing.assert_close(found.at(0.5)[:, 0], torch.cos(0.5 * k), rtol=1e-6, atol=1e-6)


def test_an_event_that_does_not_occur_is_nan() -> None:
    found = solve_ode(lambda t, y: -y, wide(1.0), [0.0, 5.0], event=lambda t, y: y + 1)
    assert found.event_time is not None
    assert found.event_state is not None
    assert found.event_time.isnan()
    assert found.event_state.isnan()
    assert torch.allclose(found.ys[-1], wide(math.exp(-5)))


def test_an_event_twice_inside_a_step_is_seen() -> None:
    """The solution 10 t (1 - t) is one step, and is above 2.4 for a fifth of it."""
    found = solve_ode(
        lambda t, y: 10 - 20 * t + 0 * y, wide(0.0), [0.0, 1.0], event=lambda t, y: y - 2.4
    )
    assert found.steps == 1
    assert found.event_time is not None
    assert torch.allclose(found.event_time, wide(0.4))


@pytest.mark.parametrize("method", METHODS)
def test_samples_have_their_own_steps_events_and_gradients(method: str) -> None:
    rates = torch.stack([RATES * s for s in (0.5, 1.0, 2.0)]).requires_grad_()
    y0 = wide([[1.0, 1.0], [2.0, 1.0], [1.0, 3.0]]).requires_grad_()
    t = wide(0.0, 1.0, 1.5, 2.0).requires_grad_()
    options: dict[str, Any] = {"method": method, **TIGHT}

    def event(t: Tensor, y: Tensor) -> Tensor:
        return y[..., 0] - 4.0  # the prey, which one of the three never reaches that high

    together = solve_ode(lotka_volterra, y0, t, rates, event=event, per_sample=True, **options)
    assert together.event_time is not None
    assert together.event_state is not None
    alone = [
        solve_ode(lotka_volterra, y, t, p, event=event, **options)
        for y, p in zip(y0, rates, strict=True)
    ]
    times = torch.stack([s.event_time for s in alone])  # type: ignore[misc]
    assert 0 < times.isnan().sum() < 3
    assert torch.allclose(together.event_time, times, rtol=1e-8, equal_nan=True)
    ys = torch.stack([s.ys for s in alone], 1)
    assert torch.allclose(together.ys, ys, atol=1e-7)
    where = wide(0.3, 1.8)
    between = torch.stack([s.at(where) for s in alone], 1)
    assert torch.allclose(together.at(where), between, atol=1e-7)
    losses = [
        ys.square().sum() + time.nan_to_num().sum() + at.sum()
        for ys, time, at in (
            (together.ys, together.event_time, together.at(where)),
            (ys, times, between),
        )
    ]
    found, expected = (torch.autograd.grad(loss, [y0, rates, t]) for loss in losses)
    assert all(
        torch.allclose(a, b, atol=1e-5, rtol=1e-6) for a, b in zip(found, expected, strict=True)
    )


def test_a_stiff_sample_does_not_slow_the_others_down() -> None:
    """The steps of all together are those of the fastest, and each keeps its tolerance."""
    k = wide(1.0, 30.0)
    found = solve_ode(
        lambda t, y, k: -k * y, wide(1.0, 1.0), [0.0, 2.0], k, per_sample=True, method="dopri5"
    )
    fast = solve_ode(lambda t, y: -30 * y, wide(1.0), [0.0, 2.0], method="dopri5")
    assert found.steps <= fast.steps + 1
    assert torch.allclose(found.ys[-1], torch.exp(-2 * k), atol=1e-7)


@pytest.mark.parametrize("method", METHODS)
def test_compiled_steps_give_the_same_values_and_gradients(method: str) -> None:
    model, y0 = net(), wide(0.3, -0.2).requires_grad_()
    wanted = [y0, *(p for p in model.parameters() if p.requires_grad)]
    found = []
    for compile in (False, True):
        ys = solve_ode(model, y0, [0, 1, 2], 1.5, method=method, order=6, compile=compile).ys
        found.append([ys.detach(), *torch.autograd.grad(ys.sin().sum(), wanted)])
    ys = solve_ode(
        model, y0, [0, 1, 2], 1.5, method=method, order=6, compile=True, gradient="backprop"
    ).ys
    found.append([ys.detach(), *torch.autograd.grad(ys.sin().sum(), wanted)])
    for same in found[1:]:
        assert all(torch.allclose(a, b, rtol=1e-10) for a, b in zip(found[0], same, strict=True))
    assert len(steps._COMPILED[model]) == 1
    before = solve_ode(model, y0, [0, 1, 2], 1.5, method=method, order=6, compile=True)
    assert len(steps._COMPILED[model]) == 1
    with torch.no_grad():
        model.first.weight.mul_(2)
    after = solve_ode(model, y0, [0, 1, 2], 1.5, method=method, order=6, compile=True)
    assert not torch.allclose(before.ys[1:], after.ys[1:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_device_is_that_of_the_state(device: str, method: str, per_sample: bool) -> None:
    y0 = torch.ones(3, 2, dtype=torch.float64, device=device).requires_grad_()
    p = RATES.to(device).requires_grad_()
    found = solve_ode(
        lotka_volterra,
        y0,
        [0.0, 1.0, 2.0],
        p,
        method=method,
        per_sample=per_sample,
        event=lambda t, y: y[..., 0].sum(-1) - 100.0 if not per_sample else y[:, 0] - 100.0,
    )
    assert found.event_time is not None
    assert found.event_time.isnan().all()
    values = [found.ys, found.at(0.5), *torch.autograd.grad(found.ys.sum(), [y0, p])]
    assert {x.device.type for x in values} == {device}
    on_cpu = solve_ode(lotka_volterra, y0.detach().cpu(), [0.0, 1.0, 2.0], RATES, method=method)
    torch.testing.assert_close(found.ys.detach().cpu(), on_cpu.ys, rtol=1e-6, atol=1e-7)


def test_float32_and_the_tolerance_that_it_allows() -> None:
    found = solve_ode(lambda t, y: -y, torch.ones(3), [0.0, 1.0], rtol=1e-5, atol=1e-6)
    assert found.ys.dtype == torch.float32
    assert torch.allclose(found.ys[-1], torch.full((3,), math.exp(-1)), atol=1e-5)
    with pytest.raises(
        ValueError, match=r"rtol to be at least 1.2e-06, ten times the spacing of torch.float32"
    ):
        solve_ode(lambda t, y: -y, torch.ones(3), [0.0, 1.0])


def test_against_scipy_on_a_network() -> None:
    model, y0 = net(torch.nn.functional.silu), wide(0.4, 0.1)
    with torch.no_grad():
        exact = solve_ivp(
            lambda t, y: model(wide(t), wide(y)).numpy(),
            (0, 3),
            y0.numpy(),
            "DOP853",
            rtol=1e-12,
            atol=1e-12,
        )
    assert np.allclose(
        solve_ode(model, y0, [0, 3], **TIGHT).ys[-1].detach(), exact.y[:, -1], atol=1e-8
    )


def decay(t: Tensor, y: Tensor) -> Tensor:
    return -y


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: solve_ode(decay, wide(1.0), [0.0]), ValueError, "at least two finite times"),
        (lambda: solve_ode(decay, wide(1.0), [0.0, 0.0]), ValueError, "strictly increasing"),
        (lambda: solve_ode(decay, wide(1.0), [0.0, 2.0, 1.0]), ValueError, "got .0.0, 2.0, 1.0."),
        (lambda: solve_ode(decay, wide(1.0), [0.0, math.nan]), ValueError, "finite"),
        (lambda: solve_ode(decay, wide(1.0), [0.0, math.inf]), ValueError, "finite"),
        (lambda: solve_ode(decay, torch.tensor(1), [0.0, 1.0]), TypeError, "y0 to be a floating"),
        (lambda: solve_ode(decay, wide(1.0), [0.0, 1.0], method="rk4"), ValueError, "'rk4'"),
        (lambda: solve_ode(decay, wide(1.0), [0.0, 1.0], gradient="none"), ValueError, "recompute"),
        (lambda: solve_ode(decay, wide(1.0), [0.0, 1.0], order=1), ValueError, "an integer of 2"),
        (lambda: solve_ode(decay, wide(1.0), [0.0, 1.0], rtol=-1.0), ValueError, "rtol to be at"),
        (lambda: solve_ode(decay, wide(1.0), [0.0, 1.0], rtol=0.0, atol=0.0), ValueError, "rtol"),
        (
            lambda: solve_ode(decay, wide(1.0), [0.0, 1.0]).at(2.0),
            ValueError,
            "between 0 and 1, got 2",
        ),
        (
            lambda: solve_ode(lambda t, y: y.sum(), wide([1.0, 2.0]), [0.0, 1.0]),
            ValueError,
            r"expected f to return .*\(2,\)",
        ),
        (
            lambda: solve_ode(lambda t, y: y.sum(), wide([1.0, 2.0]), [0, 1], method="dopri5"),
            ValueError,
            r"expected f to return .*\(2,\)",
        ),
        (
            lambda: solve_ode(decay, wide(1.0, 2.0), [0.0, 1.0], event=lambda t, y: y),
            ValueError,
            r"event to return a floating-point tensor of the shape \(\), got torch.float64 \(2,\)",
        ),
        (
            lambda: solve_ode(decay, wide(1.0), [0.0, 1.0], event=lambda t, y: y < 0.5),
            ValueError,
            r"event to return a floating-point tensor .* got torch.bool",
        ),
        (
            lambda: solve_ode(decay, wide(1.0), [0.0, 1.0], event=lambda t, y: float(y)),
            ValueError,
            "event to return .* got float",
        ),
        (lambda: solve_ode(decay, {"a": wide(1.0)}, [0, 1]), TypeError, "y0 to be one tensor"),
        (
            lambda: solve_ode(lambda t, y: y.sqrt(), wide(-1.0), [0.0, 1.0]),
            RuntimeError,
            "f is not finite there",
        ),
        (
            lambda: solve_ode(lambda t, y: y if y > 0 else -y, wide(1.0), [0.0, 1.0]),
            NotImplementedError,
            "^solve_ode: .* or use method='dopri5'",
        ),
        (
            lambda: solve_ode(lambda t, y: torch.special.zeta(y, 2.0), wide(1.5), [0.0, 1.0]),
            NotImplementedError,
            "^solve_ode: .*zeta.* or use method='dopri5'",
        ),
        (
            lambda: solve_ode(decay, wide(1.0, 2.0), [0, 1], gradient="adjoint", per_sample=True),
            ValueError,
            "takes neither event nor per_sample",
        ),
        (
            lambda: torch.func.vmap(lambda y: solve_ode(decay, y, [0.0, 1.0]).ys)(torch.ones(3)),
            NotImplementedError,
            "per_sample=True",
        ),
    ],
)
def test_errors(call: Callable[[], Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize("method", METHODS)
def test_poles_and_steps_without_end_are_refused(method: str) -> None:
    with pytest.raises(RuntimeError, match=r"the step at t = .* a pole near t = 1;") as raised:
        solve_ode(lambda t, y: y * y, wide(1.0), [0.0, 2.0], method=method)
    assert "|y| = " in str(raised.value)
    with pytest.raises(RuntimeError, match="f is not finite there"):
        solve_ode(lambda t, y: y * math.nan, wide(1.0), [0.0, 2.0], method=method)
    with pytest.raises(
        RuntimeError, match=r"20 steps from t = 0 reached .* of 1000; allow more max_steps"
    ):
        solve_ode(lotka_volterra, wide(1.0, 1.0), [0, 1000], RATES, max_steps=20, method=method)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("gradient", ["recompute", "adjoint"])
def test_what_would_get_no_gradient_is_refused(method: str, gradient: str) -> None:
    w, model = wide(1.0).requires_grad_(), net()
    options: dict[str, Any] = {"method": method, "gradient": gradient}
    for f in (lambda t, y: -w * y, lambda t, y: model(t, y) + 0):
        with pytest.raises(ValueError, match="pass the module itself as f"):
            solve_ode(f, wide(1.0, 2.0), [0.0, 1.0], **options)
    solution = solve_ode(
        lambda t, y: -w * y, wide(1.0), [0.0, 1.0], method=method, gradient="backprop"
    )
    (of_w,) = torch.autograd.grad(solution.ys[-1], w)
    assert torch.allclose(of_w, wide(-math.exp(-1)))
    with pytest.raises(ValueError, match=r"event closes over a tensor .* a component of the state"):
        solve_ode(decay, wide(1.0), [0.0, 1.0], method=method, event=lambda t, y: y - w / 2)


def test_arguments_may_be_nested_and_numbers() -> None:
    p: dict[str, Any] = {"rates": [wide(0.5).requires_grad_(), wide(0.25)], "name": "two"}
    found = solve_ode(
        lambda t, y, p, s: -(p["rates"][0] + p["rates"][1]) * s * y, wide(1.0), [0, 1], p, 2.0
    )
    assert torch.allclose(found.ys[-1], wide(math.exp(-1.5)))
    (gradient,) = torch.autograd.grad(found.ys[-1], p["rates"][0])
    assert torch.allclose(gradient, wide(-2 * math.exp(-1.5)))


def test_a_solution_says_what_it_took() -> None:
    found = solve_ode(decay, torch.ones(2, 3), [0.0, 1.0], rtol=1e-5)
    assert (
        repr(found)
        == f"Solution(ys 2 x 2 x 3, {found.steps} steps, {found.evaluations} evaluations)"
    )
