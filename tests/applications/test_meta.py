"""Adapted weights against closed forms, torch.optim, torch.func, and finite differences."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES, MODELS, TiedLanguageModel, mlp
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, jvp, vmap

from autograd_lib import adapt, implicit_adapt

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": torch.optim.SGD,
    "momentum": lambda parameters, lr: torch.optim.SGD(parameters, lr=lr, momentum=0.9),
    "adam": torch.optim.Adam,
}
double = torch.float64


def scalar(value: float) -> Tensor:
    return torch.tensor(value, dtype=double, requires_grad=True)


def one_weight(value: float = 0.7) -> nn.Linear:
    """A model that multiplies by w; with input 1 and the loss below, the loss is a (w - c)² / 2."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.constant_(model.weight, value)
    return model


def quadratic(a: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda output, target: a * (output - target).square().sum() / 2


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def data(*shape: int, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn(*shape, n, generator=generator, dtype=double) for n in (3, 2)
    )  # inputs and targets of `network`


def meta_gradient(
    model: nn.Module, fast: dict[str, Tensor], query: tuple[Any, Tensor], *more: Tensor
) -> list[Tensor]:
    loss = F.mse_loss(functional_call(model, fast, (query[0],)), query[1])
    return list(torch.autograd.grad(loss, [*model.parameters(), *more]))


def assert_same(got: Any, expected: Any) -> None:
    """Bit by bit."""
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


# -------------------------------------------------------------------------------- closed forms


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("checkpoint", [0, 2, "sqrt"])
def test_steps_on_a_quadratic(device: str, checkpoint: Any) -> None:
    """w_k = c + (1 - a lr)^k (w0 - c)."""
    a, k, c, lr = 3.0, 5, scalar(0.2).to(device), scalar(0.1).to(device)
    model = one_weight(0.7).to(device)
    x = torch.ones(1, 1, dtype=double, device=device)
    w = adapt(model, quadratic(a), (x, c), k, lr, checkpoint=checkpoint)["weight"].squeeze()
    shrink = 1 - a * lr.item()
    expected = {
        "w": 0.2 + shrink**k * 0.5,
        "w0": shrink**k,
        "c": 1 - shrink**k,
        "lr": -a * k * shrink ** (k - 1) * 0.5,
    }
    slopes = torch.autograd.grad(w, [model.weight, c, lr])
    got = [w.item(), *(slope.item() for slope in slopes)]
    assert got == pytest.approx(list(expected.values()), rel=1e-13)
    assert model.weight.item() == 0.7
    assert model.weight.grad is None


def test_momentum_on_a_quadratic() -> None:
    """(w - c, velocity) is multiplied by a matrix in each step."""
    lr, a, k = 0.1, 3.0, 6
    once = torch.tensor([[1 - lr * a, -lr * 0.9], [a, 0.9]], dtype=double)
    factor = torch.linalg.matrix_power(once, k)[0, 0]
    model, support = one_weight(), (torch.ones(1, 1, dtype=double), scalar(0.0))
    w = adapt(model, quadratic(a), support, k, lr, "momentum")["weight"]
    (slope,) = torch.autograd.grad(w.sum(), model.weight)
    torch.testing.assert_close(w, factor * model.weight)
    torch.testing.assert_close(slope.squeeze(), factor)


def test_implicit_on_a_quadratic() -> None:
    """W = (s w0 + a c) / (s + a)."""
    a, c, s = 3.0, scalar(0.2), scalar(2.0)
    model = one_weight()
    support = torch.ones(1, 1, dtype=double), c
    w = implicit_adapt(model, quadratic(a), support, s, tol=1e-12)["weight"].squeeze()
    slopes = torch.autograd.grad(w, [model.weight, c, s])
    expected = [(2 * 0.7 + 3 * 0.2) / 5, 2 / 5, 3 / 5, 3 * (0.7 - 0.2) / 25]
    assert [w.item(), *(slope.item() for slope in slopes)] == pytest.approx(expected, rel=1e-10)


def test_implicit_on_ridge_regression() -> None:
    """The minimum solves (X^T X + s) w = X^T y + s w0, ill-conditioned here."""
    torch.manual_seed(0)
    x = torch.randn(30, 6, dtype=double) * torch.logspace(-1, 1, 6, dtype=double)
    y, s = torch.randn(30, 1, dtype=double), 0.5
    model = nn.Linear(6, 1, bias=False).double()
    w = implicit_adapt(model, quadratic(1.0), (x, y), s, tol=1e-12)["weight"].T
    matrix = x.T @ x + s * torch.eye(6, dtype=double)
    torch.testing.assert_close(w, torch.linalg.solve(matrix, x.T @ y + s * model.weight.T))
    v = torch.randn(6, 1, dtype=double)
    (got,) = torch.autograd.grad(w, model.weight, v)
    torch.testing.assert_close(got.T, s * torch.linalg.solve(matrix, v), rtol=1e-6, atol=1e-8)


# ------------------------------------------------------------------------ against torch.optim


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", MODELS)
def test_weights_of_torch_optim_step_for_step(name: str, kind: str) -> None:
    torch.manual_seed(0)
    make, draw = MODELS[kind]
    model, x = make().double(), draw()
    x = x.double() if x.is_floating_point() else x
    loss_fn = lambda output, _: output.square().mean()  # noqa: E731
    trained = copy.deepcopy(model)
    optimizer = OPTIMIZERS[name](trained.parameters(), lr=0.01)
    before = copy.deepcopy(model.state_dict())
    for steps in range(4):
        fast = adapt(model, loss_fn, (x, None), steps, optimizer=name)
        expected = dict(trained.named_parameters())
        # Adam divides the rounding error of a gradient that should be 0 by its eps of 1e-8.
        atol = 1e-9 if name == "adam" and kind in ("encoder", "cnn") else 1e-12
        torch.testing.assert_close(fast, expected, rtol=1e-12, atol=atol)
        optimizer.zero_grad()
        loss_fn(trained(x), None).backward()
        optimizer.step()
    assert_same(model.state_dict(), before)  # the cnn has BatchNorm in training mode


def test_learning_rates_by_name() -> None:
    model, (x, y) = network(), data(5)
    rates = {k: scalar(0.1 * (i + 1)) for i, k in enumerate(dict(model.named_parameters()))}
    trained = copy.deepcopy(model)
    groups = [{"params": [p], "lr": rates[k].item()} for k, p in trained.named_parameters()]
    optimizer = torch.optim.SGD(groups)
    for _ in range(3):
        optimizer.zero_grad()
        F.mse_loss(trained(x), y).backward()
        optimizer.step()
    torch.testing.assert_close(
        adapt(model, F.mse_loss, (x, y), 3, rates), dict(trained.named_parameters())
    )
    elementwise = {k: torch.full_like(p, rates[k].item()) for k, p in model.named_parameters()}
    torch.testing.assert_close(
        adapt(model, F.mse_loss, (x, y), 3, elementwise), dict(trained.named_parameters())
    )


# ------------------------------------------------------------------------------- derivatives


def maml(model: nn.Module, support: Any, query: Any, steps: int, lr: float) -> dict[str, Tensor]:
    """The meta-gradient by torch.func alone."""

    def loss(weights: dict[str, Tensor], batch: Any) -> Tensor:
        return F.mse_loss(functional_call(model, weights, (batch[0],)), batch[1])

    def outer(weights: dict[str, Tensor]) -> Tensor:
        for _ in range(steps):
            slopes = grad(loss)(weights, support)
            weights = {k: w - lr * slopes[k] for k, w in weights.items()}
        return loss(weights, query)

    return grad(outer)({k: p.detach() for k, p in model.named_parameters()})


def test_meta_gradient_of_torch_func() -> None:
    model, support, query = network(), data(5), data(5, seed=2)
    fast = adapt(model, F.mse_loss, support, 4, 0.1)
    expected = maml(model, support, query, 4, 0.1)
    torch.testing.assert_close(meta_gradient(model, fast, query), list(expected.values()))


def of_parameters(
    model: nn.Module, adapted: Callable[[nn.Module], dict[str, Tensor]]
) -> Callable[..., Tensor]:
    """The adapted weights in one vector, as a function of the parameters."""
    names = list(dict(model.named_parameters()))

    class Swapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self) -> Tensor:
            return torch.cat([w.reshape(-1) for w in adapted(self.model).values()])

    def f(*parameters: Tensor) -> Tensor:
        given = {f"model.{name}": p for name, p in zip(names, parameters, strict=True)}
        return functional_call(Swapped(), given, ())

    return f


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("checkpoint", [0, 2])
def test_derivatives_by_finite_differences(optimizer: str, checkpoint: int) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    x, y = torch.randn(3, 2, dtype=double), torch.randn(3, 1, dtype=double)

    def f(lr: Tensor, x: Tensor, y: Tensor, *parameters: Tensor) -> Tensor:
        options = {"optimizer": optimizer, "checkpoint": checkpoint}
        return of_parameters(model, lambda m: adapt(m, F.mse_loss, (x, y), 3, lr, **options))(
            *parameters
        )

    given = [scalar(0.1), x.requires_grad_(), y.requires_grad_()]
    given += [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert gradcheck(f, given)
    assert gradgradcheck(lambda *args: f(*args)[:3], given)


def test_derivatives_of_the_implicit_ones_by_finite_differences() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    x, y = torch.randn(3, 2, dtype=double), torch.randn(3, 1, dtype=double)

    def f(strength: Tensor, y: Tensor, *parameters: Tensor) -> Tensor:
        fast = lambda m: implicit_adapt(m, F.mse_loss, (x, y), strength, tol=1e-13)  # noqa: E731
        return of_parameters(model, fast)(*parameters)

    given = [scalar(0.8), y.requires_grad_()]
    given += [p.detach().clone().requires_grad_() for p in model.parameters()]
    assert gradcheck(f, given)
    assert gradgradcheck(lambda *args: f(*args)[:2], given)


def test_first_order_takes_gradients_for_constants() -> None:
    model, support, query = network(), data(5), data(5, seed=2)
    lr = scalar(0.1)
    fast = adapt(model, F.mse_loss, support, 4, lr, order=1)
    assert_same(fast, adapt(model, F.mse_loss, support, 4, lr))
    got = meta_gradient(model, fast, query, lr)
    there = {k: w.detach().requires_grad_() for k, w in fast.items()}
    loss = F.mse_loss(functional_call(model, there, (query[0],)), query[1])
    slopes = torch.autograd.grad(loss, list(there.values()))
    assert_same(got[:-1], list(slopes))
    moved = zip(fast.values(), model.parameters(), slopes, strict=True)
    expected = sum((g * (w - p)).sum() for w, p, g in moved) / lr  # w = w0 - lr sum of gradients
    torch.testing.assert_close(got[-1], expected.detach())


class Kept:
    """A tensor that a graph keeps, for as long as it does."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor.detach()


def saved_bytes(model: nn.Module, steps: int, **options: Any) -> int:
    """Bytes that the graph of adapted weights keeps, without parameters and data."""
    x, y = data(200)
    alive: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Kept:
        alive.add(kept := Kept(tensor))
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        fast = adapt(model, F.mse_loss, (x, y), steps, 0.1, **options)
    storages = {s.data_ptr(): s.nbytes() for s in (k.tensor.untyped_storage() for k in alive)}
    for known in (x, y, *model.parameters(), *fast.values()):
        storages.pop(known.data_ptr(), None)
    return sum(storages.values())


def test_first_order_keeps_no_graph() -> None:
    assert saved_bytes(network(), 8, order=1) == 0
    assert saved_bytes(network(), 8) > 8 * 200 * 4 * 8  # an activation per step at least


# -------------------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("checkpoint", [1, 3, 100, "sqrt"])
def test_checkpoints_change_no_bit(optimizer: str, checkpoint: Any) -> None:
    model, (x, y), query = network(), data(5), data(5, seed=2)
    model.insert(1, nn.Dropout(0.3))
    model.insert(1, nn.BatchNorm1d(4).double())

    def found(checkpoint: Any) -> Any:
        torch.manual_seed(3)
        fast = adapt(model, F.mse_loss, (x, y), 7, 0.1, optimizer, checkpoint=checkpoint)
        torch.rand(5)
        before = torch.get_rng_state()
        loss = F.mse_loss(functional_call(model, fast, (query[0],)), query[1])
        after = torch.get_rng_state()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert_same(torch.get_rng_state(), after)  # backward draws nothing
        return fast, before, gradients

    assert_same(found(checkpoint), found(0))


def test_checkpoints_keep_the_weights_between_segments() -> None:
    model = network()
    size = sum(p.numel() for p in model.parameters()) * 8
    assert saved_bytes(model, 16, checkpoint=4) == 3 * size  # the first are the parameters
    assert saved_bytes(model, 16, checkpoint="sqrt") == 3 * size
    assert saved_bytes(model, 16, checkpoint=1) == 15 * size
    assert saved_bytes(model, 16, checkpoint=100) == 0
    assert saved_bytes(model, 16) > 40 * size


def test_backward_repeats_the_forward_whatever_changed_since() -> None:
    model, (x, y) = network(), data(5)
    model.insert(1, nn.Dropout(0.3))
    model.insert(1, nn.BatchNorm1d(4))
    model[1].eval()

    def meta(checkpoint: int) -> Any:
        torch.manual_seed(3)
        model[2].train()
        nn.init.ones_(model[1].running_var)
        with torch.autocast("cpu", torch.bfloat16):
            fast = adapt(
                model.float(), F.mse_loss, (x.float(), y.float()), 4, checkpoint=checkpoint
            )
        model[2].eval()
        model[1].running_var.fill_(2)
        loss = sum(w.square().sum() for w in fast.values())
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        assert not model[2].training
        return gradients

    assert_same(meta(2), meta(0))


def test_a_tensor_from_elsewhere_is_refused_with_checkpoints() -> None:
    model, support, factor = network(), data(5), scalar(2.0)
    loss_fn = lambda output, target: factor * F.mse_loss(output, target)  # noqa: E731
    (slope,) = torch.autograd.grad(
        sum(w.sum() for w in adapt(model, loss_fn, support, 3).values()), factor
    )
    assert slope != 0
    message = r"adapt: with checkpoint, expected the loss .* got one of shape \(\); put it into"
    with pytest.raises(ValueError, match=message):
        adapt(model, loss_fn, support, 3, checkpoint=1)
    inside = lambda output, target: target[1] * F.mse_loss(output, target[0])  # noqa: E731
    fast = adapt(model, inside, (support[0], (support[1], factor)), 3, checkpoint=1)
    (again,) = torch.autograd.grad(sum(w.sum() for w in fast.values()), factor)
    torch.testing.assert_close(again, slope)


# ---------------------------------------------------------------------------- models and data


@pytest.mark.parametrize("checkpoint", [0, 2])
def test_adam_is_finite_beside_dead_units(checkpoint: int) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).double()
    nn.init.constant_(model[0].bias, 0.1)
    with torch.no_grad():
        model[0].bias[1] = -100
    support, query = data(5), data(5, seed=2)
    fast = adapt(model, F.mse_loss, support, 5, 0.01, "adam", checkpoint=checkpoint)
    gradients = meta_gradient(model, fast, query)
    assert all(g.isfinite().all() for g in gradients)
    assert gradients[0][1].eq(0).all()
    alive = [g for g in gradients if g.any()]
    assert len(alive) == 4
    # Where no unit is dead the derivative is Adam's own, see the finite differences above.


def test_frozen_parameters_stay() -> None:
    model, support, query = network(), data(5), data(5, seed=2)
    model[0].requires_grad_(False)
    fast = adapt(model, F.mse_loss, support, 3, 0.1, checkpoint=2)
    assert list(fast) == ["2.weight", "2.bias"]
    loss = F.mse_loss(functional_call(model, fast, (query[0],)), query[1])
    loss.backward()
    assert model[0].weight.grad is None
    assert model[2].weight.grad is not None
    fast = adapt(model, F.mse_loss, support, 3, 0.1, checkpoint=2)
    with torch.no_grad():
        model[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        fast["2.bias"].sum().backward()


@pytest.mark.parametrize("checkpoint", [0, 2])
def test_shared_parameters_count_once(checkpoint: int) -> None:
    torch.manual_seed(0)
    model, tokens = TiedLanguageModel().double(), torch.randint(0, 11, (5, 3))
    loss_fn = lambda output, t: F.cross_entropy(output.mT, t)  # noqa: E731
    fast = adapt(model, loss_fn, (tokens, tokens), 3, 0.1, checkpoint=checkpoint)
    assert list(fast) == ["embedding.weight"]
    loss = loss_fn(functional_call(model, fast, (tokens,)), tokens)
    (got,) = torch.autograd.grad(loss, model.embedding.weight)
    lr, w0 = 0.1, model.embedding.weight.detach()

    def outer(w: Tensor) -> Tensor:
        inner = lambda w: loss_fn(F.embedding(tokens, w) @ w.T, tokens)  # noqa: E731
        for _ in range(3):
            w = w - lr * grad(inner)(w)
        return inner(w)

    torch.testing.assert_close(got, grad(outer)(w0))


def test_an_unused_parameter_stays() -> None:
    model, support = network(), data(5)
    model.unused = nn.Parameter(torch.ones(2))
    model.forward = lambda x: nn.Sequential.forward(model[:3], x)
    for optimizer in OPTIMIZERS:
        fast = adapt(model, F.mse_loss, support, 2, optimizer=optimizer, checkpoint=1)
        assert_same(fast["unused"], model.unused.expand(2))


def test_batches_and_losses_of_a_model() -> None:
    model = network()
    x, y = data(5)
    expected = adapt(model, F.mse_loss, (x, y), 2)
    by_name = {"input": x, "labels": y}

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, input: Tensor, labels: Tensor) -> dict[str, Tensor]:
            return {"loss": F.mse_loss(self.model(input), labels)}

    own = {f"model.{k}": w for k, w in expected.items()}
    assert_same(adapt(Own(), None, by_name, 2), own)
    assert_same(adapt(Own(), lambda output, batch: output["loss"], by_name, 2), own)
    assert_same(adapt(model, F.mse_loss, [(x,), y], 2), expected)


@pytest.mark.parametrize("checkpoint", [0, "sqrt"])
def test_attention_has_a_second_derivative(checkpoint: Any) -> None:
    make, draw = MODELS["encoder"]
    model, x = make(), draw()
    loss_fn = lambda output, _: output.square().sum()  # noqa: E731
    fast = adapt(model, loss_fn, (x, None), 2, checkpoint=checkpoint)
    loss_fn(functional_call(model, fast, (x,)), None).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_without_a_graph() -> None:
    model, support = network(), data(5)
    expected = adapt(model, F.mse_loss, support, 3)
    with torch.no_grad():
        fast = adapt(model, F.mse_loss, support, 3, checkpoint=1)
        implicit = implicit_adapt(model, F.mse_loss, support, 1.0)
    assert_same(fast, {k: w.detach() for k, w in expected.items()})
    assert not any(w.requires_grad for w in [*fast.values(), *implicit.values()])


def test_no_steps_return_the_parameters() -> None:
    model = network()
    fast = adapt(model, F.mse_loss, data(5), 0, checkpoint="sqrt")
    assert_same(fast, dict(model.named_parameters()))
    assert fast["0.weight"] is not model[0].weight
    fast["0.weight"].sum().backward()
    assert model[0].weight.grad.eq(1).all()


@pytest.mark.parametrize("options", [{}, {"checkpoint": 2}, {"order": 1}, {"tasks": True}])
def test_nothing_is_kept(options: dict[str, Any]) -> None:
    model, (x, y) = network(), data(4, 5) if "tasks" in options else data(5)
    x = x * 1
    gc.disable()
    try:
        fast = adapt(model, F.mse_loss, (x, y), 4, optimizer="adam", **options)
        sum(w.sum() for w in fast.values()).backward()
        references = [weakref.ref(x), *(weakref.ref(w) for w in fast.values())]
        del fast, x
        assert [r() for r in references] == [None] * len(references)
    finally:
        gc.enable()


# -------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("checkpoint", [0, 2])
@pytest.mark.parametrize("order", [1, 2])
def test_tasks_equal_a_loop(optimizer: str, checkpoint: int, order: Any) -> None:
    model, (x, y), (query, aims) = network(), data(4, 5), data(4, 5, seed=2)
    model.insert(1, nn.BatchNorm1d(4).double())
    model[0].register_parameter("bias", None)  # its gradient would be 0, but for rounding
    before = copy.deepcopy(model.state_dict())
    rates = {k: torch.full_like(p, 0.1, requires_grad=True) for k, p in model.named_parameters()}
    options = {"optimizer": optimizer, "order": order, "checkpoint": checkpoint}
    wanted = [*model.parameters(), *rates.values()]

    def outer(fast: dict[str, Tensor], query: Tensor, aim: Tensor) -> Tensor:
        model.eval()
        loss = F.mse_loss(functional_call(model, fast, (query,)), aim)
        model.train()
        return loss

    stacked = adapt(model, F.mse_loss, (x, y), 5, rates, tasks=True, **options)
    got = torch.autograd.grad(vmap(outer)(stacked, query, aims).sum(), wanted)
    each = [adapt(model, F.mse_loss, (x[i], y[i]), 5, rates, **options) for i in range(4)]
    for name, weights in stacked.items():
        torch.testing.assert_close(weights, torch.stack([fast[name] for fast in each]))
    losses = [outer(fast, query[i], aims[i]) for i, fast in enumerate(each)]
    torch.testing.assert_close(got, torch.autograd.grad(sum(losses), wanted), rtol=1e-9, atol=1e-9)
    assert_same(model.state_dict(), before)


def test_each_task_draws_its_own_numbers() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(50, 1)).double()
    x = torch.ones(2, 1, 50, dtype=double)
    y = torch.zeros(2, 1, 1, dtype=double)

    def slopes(checkpoint: int) -> Any:
        torch.manual_seed(0)
        fast = adapt(model, F.mse_loss, (x, y), 3, tasks=True, checkpoint=checkpoint)
        weights = fast["1.weight"]
        return weights, *torch.autograd.grad(weights.sum(), list(model.parameters()))

    weights, *_ = slopes(0)
    assert not torch.equal(weights[0], weights[1])
    assert_same(slopes(2), slopes(0))


def test_tasks_take_what_is_no_tensor() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()

        def forward(self, x: Tensor, factor: float, none: None) -> Tensor:
            return factor * self.inner(x)

    model, (x, y) = Scaled(), data(4, 5)
    fast = adapt(model, F.mse_loss, ((x, 2.0, None), y), 2, tasks=True)
    alone = adapt(model, F.mse_loss, ((x[1], 2.0, None), y[1]), 2)
    torch.testing.assert_close({k: w[1] for k, w in fast.items()}, alone)


# ----------------------------------------------------------------------------- transformations


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_under_transforms(optimizer: str) -> None:
    model, support, query = network(), data(5), data(5, seed=2)

    # In PyTorch 2.13 F.mse_loss has no jvp of its gradient.
    loss_fn = lambda output, target: (output - target).square().mean()  # noqa: E731

    def outer(lr: Tensor) -> Tensor:
        fast = adapt(model, loss_fn, support, 3, lr, optimizer)
        return loss_fn(functional_call(model, fast, (query[0],)), query[1])

    lr = scalar(0.1)
    (expected,) = torch.autograd.grad(outer(lr), lr)
    plain = lr.detach()
    torch.testing.assert_close(grad(outer)(plain), expected)
    torch.testing.assert_close(jvp(outer, (plain,), (torch.ones_like(plain),))[1], expected)
    torch.testing.assert_close(vmap(grad(outer))(plain[None]), expected[None])
    tasks = data(4, 5)
    one = lambda x, y: adapt(model, F.mse_loss, (x, y), 3, 0.1, optimizer)  # noqa: E731
    torch.testing.assert_close(
        vmap(one)(*tasks), adapt(model, F.mse_loss, tasks, 3, 0.1, optimizer, tasks=True)
    )


def test_the_implicit_ones_are_one_function_of_the_weights() -> None:
    """All evaluations draw one mask, and the next call draws another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 2)).double()
    model.insert(1, nn.BatchNorm1d(8).double())
    before = copy.deepcopy(model.state_dict())
    first, second = (implicit_adapt(model, F.mse_loss, data(5), 1.0, tol=1e-9) for _ in range(2))
    assert not torch.equal(first["0.weight"], second["0.weight"])
    state = torch.get_rng_state()
    first["0.weight"].sum().backward()
    assert_same(torch.get_rng_state(), state)
    assert_same(model.state_dict(), before)


def test_implicit_ones_minimize() -> None:
    model, support = mlp().double(), (torch.randn(20, 8).double(), torch.randn(20, 8).double())
    w0 = dict(model.named_parameters())
    w = implicit_adapt(model, F.mse_loss, support, 0.05, tol=1e-10)
    at = {k: t.detach().requires_grad_() for k, t in w.items()}
    distance = sum((at[k] - w0[k].detach()).square().sum() for k in at)
    loss = F.mse_loss(functional_call(model, at, (support[0],)), support[1]) + 0.025 * distance
    slopes = torch.autograd.grad(loss, list(at.values()))
    assert max(g.abs().max().item() for g in slopes) < 1e-8


# ------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": -1}, ValueError, r"adapt: expected steps to be an integer .* 0, got -1"),
        ({"steps": 2.0}, ValueError, r"expected steps to be an integer of at least 0, got 2\.0"),
        ({"optimizer": "rmsprop"}, ValueError, r"expected optimizer to be .*, got 'rmsprop'"),
        ({"order": 3}, ValueError, r"expected order to be 2, or 1 .*, got 3"),
        ({"checkpoint": "log"}, ValueError, r"expected checkpoint to be 'sqrt' or .*, got 'log'"),
        ({"checkpoint": -2}, ValueError, r"expected checkpoint to be 'sqrt' or .*, got -2"),
        ({"lr": "0.1"}, ValueError, r"expected lr to be a number or a .* tensor .* got '0.1'"),
        ({"lr": torch.tensor(1)}, ValueError, r"expected lr to be a number or .* got torch.int64"),
        ({"lr": torch.ones(2)}, ValueError, r"of shape \(\), got torch.float32 shape \(2,\)"),
        ({"lr": {"weight": 0.1}}, ValueError, r"exactly the names .* \['weight'\] for \['0.bias'"),
        ({"support": torch.ones(2)}, ValueError, r"adapt: expected a batch to be a mapping"),
        ({"loss_fn": lambda y, t: y}, ValueError, r"loss_fn to return a scalar .* shape \(5, 2\);"),
        ({"loss_fn": lambda y, t: 1.0}, ValueError, r"to return a scalar tensor, got float"),
        (
            {"loss_fn": lambda y, t: F.mse_loss(y.detach(), t)},
            ValueError,
            "adapt: expected a loss that depends on the parameters, got one without a graph",
        ),
        (
            {"tasks": True, "support": (torch.ones(2, 3), torch.ones(3))},
            ValueError,
            r"with tasks=True, expected .* got shapes \[\(2, 3\), \(3,\)\]; stack",
        ),
        ({"tasks": True, "support": (torch.tensor(1.0), None)}, ValueError, r"got shapes \[\(\)\]"),
    ],
)  # fmt: skip
def test_errors(options: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {"model": network(), "loss_fn": F.mse_loss, "support": data(5), "steps": 2} | options
    with pytest.raises(error, match=message):
        adapt(**given)


def test_wrong_shape_of_a_learning_rate_by_name() -> None:
    model = network()
    rates = {k: torch.ones(7, dtype=double) for k, _ in model.named_parameters()}
    message = r"expected lr\['0.weight'\] to be .* of shape \(\) or \(4, 3\), got .* shape \(7,\)"
    with pytest.raises(ValueError, match=message):
        adapt(model, F.mse_loss, data(5), 1, rates)


def test_refused_where_nothing_can_be_recorded() -> None:
    model, support = network(), data(5)
    for adapted in (
        lambda: adapt(model, F.mse_loss, support, 1),
        lambda: implicit_adapt(model, F.mse_loss, support, 1.0),
    ):
        with torch.inference_mode(), pytest.raises(RuntimeError, match=r"adapt: .*inference_mode"):
            adapted()
    for p in model.parameters():
        p.requires_grad_(False)
    with pytest.raises(ValueError, match="adapt: no parameter of the model requires a gradient"):
        adapt(model, F.mse_loss, support, 1)


def test_refused_under_transforms() -> None:
    model, support = network(), data(5)
    lr = torch.tensor(0.1, dtype=double)
    message = r"adapt: expected checkpoint=0 inside torch.func transforms .* got 'sqrt'"
    with pytest.raises(NotImplementedError, match=message):
        grad(
            lambda lr: adapt(model, F.mse_loss, support, 4, lr, checkpoint="sqrt")["2.bias"].sum()
        )(lr)
    with pytest.raises(NotImplementedError, match="implicit_adapt: expected to be called outside"):
        vmap(lambda x: implicit_adapt(model, F.mse_loss, (x, support[1]), 1.0))(support[0][None])


def test_no_implicit_minimum() -> None:
    model, support = one_weight(), (torch.ones(1, 1, dtype=double), None)
    downhill = lambda output, _: -10 * output.square().sum()  # noqa: E731
    message = r"implicit_adapt: expected a minimum near .* strength 1; raise strength, or tol"
    steeper = lambda output, _: -output.exp().sum()  # noqa: E731
    for loss_fn in (downhill, steeper):
        with pytest.raises(RuntimeError, match=message):
            implicit_adapt(model, loss_fn, support, 1.0)
    for strength in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="expected strength to be positive, got"):
            implicit_adapt(model, downhill, support, strength)
