"""Higher derivatives against nested differentiation of composite operations, and closed forms."""

from __future__ import annotations

import copy
import functools
import gc
import math
import sys
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
import torch.nn.functional as F
from cases import DEVICES, MODELS, TiedLanguageModel
from numpy.polynomial import Chebyshev
from torch import Tensor, nn
from torch.autograd import Function
from torch.func import functional_call, grad, hessian, jacrev, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from autograd_lib import (
    DerivativeReport,
    DerivativeTower,
    Estimate,
    biharmonic,
    derivative_tower,
    hessian_diagonal,
    hessian_trace,
    hvp,
    jet,
    laplacian,
    linearize_hvp,
    top_eigenvalues,
    verify_derivatives,
)

Named = Mapping[str, Tensor]

# ------------------------------------------------------------------------------ the oracle
#
# Nested reverse differentiation is the oracle, and the fused layer and batch norm of torch 2.13 are
# wrong in it from order 3 on, so the oracle has them written out; so has it the attention, whose
# fused kernel has no second derivative, and every loss.


class WrittenOut(nn.Module):
    """A norm with the parameters and the buffers of another, in elementary operations."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = [norm]  # in a list, so that its parameters keep their names
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        (norm,) = self.norm
        if isinstance(norm, nn.LayerNorm):
            mean, variance = self.moments(x, -1)
            return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias
        weight, bias = self.weight[:, None, None], self.bias[:, None, None]
        if isinstance(norm, nn.GroupNorm):
            groups = x.reshape(len(x), norm.num_groups, -1)
            mean, variance = self.moments(groups, -1)
            groups = (groups - mean) / (variance + self.eps).sqrt()
            return groups.reshape(x.shape) * weight + bias
        if norm.running_mean is None:
            mean, variance = self.moments(x, (0, 2, 3))
        else:
            mean, variance = norm.running_mean[:, None, None], norm.running_var[:, None, None]
        return (x - mean) / (variance + self.eps).sqrt() * weight + bias

    @staticmethod
    def moments(x: Tensor, dims: Any) -> tuple[Tensor, Tensor]:
        mean = x.mean(dims, keepdim=True)
        return mean, ((x - mean) ** 2).mean(dims, keepdim=True)


def written_out_attention(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    if is_causal:
        scores = scores + torch.full_like(scores[0, 0], -math.inf).triu(1)
    weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, keepdim=True) @ v


def written_out(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.LayerNorm | nn.GroupNorm | nn.BatchNorm2d):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, WrittenOut(module))
        if isinstance(module, Decoder):
            module.attend = written_out_attention
    return model


def loss_of(
    model: nn.Module, loss_fn: Callable[[Tensor, Any], Tensor], x: Any, target: Any
) -> Callable[[Named], Tensor]:
    return lambda values: loss_fn(functional_call(model, dict(values), (x,)), target)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}


class Nested(NamedTuple):
    vectors: list[dict[str, Tensor]]
    values: list[Tensor]


def nested(loss: Callable[[Named], Tensor], parameters: Named, v: Named, order: int) -> Nested:
    """Gradients of gradients along v, each from the graph of the last."""
    leaves = {k: p.detach().clone().requires_grad_() for k, p in parameters.items()}
    y = loss(leaves)
    found = Nested([], [y.detach()])
    for _ in range(order):
        slopes = torch.autograd.grad(
            y, list(leaves.values()), create_graph=True, materialize_grads=True
        )
        y = sum((slope * v[k]).sum() for k, slope in zip(leaves, slopes, strict=True))
        found.vectors.append({k: s.detach() for k, s in zip(leaves, slopes, strict=True)})
        found.values.append(y.detach())
    return found


def dot(a: Named, b: Named) -> Tensor:
    return sum((a[k] * b[k]).sum() for k in a)


def length(a: Named) -> Tensor:
    return dot(a, a).sqrt()


def direction_for(parameters: Named, seed: int = 1) -> dict[str, Tensor]:
    """A random direction of length 1."""
    generator = torch.Generator().manual_seed(seed)
    v = {
        k: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p)
        for k, p in parameters.items()
    }
    size = length(v)
    return {k: t / size for k, t in v.items()}


def points(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def assert_same(got: Named, expected: Named, rtol: float = 1e-8) -> None:
    """Close, by the scale of the whole vector where a tensor of it is small."""
    assert list(got) == list(expected)
    scale = max(t.abs().max().item() for t in expected.values())
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=rtol, atol=rtol * scale)


# ------------------------------------------------------------------------------ the models


class Decoder(nn.Module):
    """One block of a decoder with causal attention; the mean over tokens comes out."""

    def __init__(self, width: int = 4, heads: int = 2) -> None:
        super().__init__()
        self.attend: Callable[..., Tensor] = F.scaled_dot_product_attention
        self.heads = heads
        self.tokens, self.places = nn.Embedding(7, width), nn.Parameter(torch.randn(4, width))
        self.before, self.between, self.after = (nn.LayerNorm(width) for _ in range(3))
        self.project, self.merge = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 6), nn.Linear(6, width)
        self.head = nn.Linear(width, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places[: tokens.shape[1]]
        q, k, v = self.project(self.before(x)).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        x = x + self.merge(self.attend(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))
        x = x + self.down(F.gelu(self.up(self.between(x)), approximate="tanh"))
        return self.head(self.after(x)).mean(1)


class Encoder(nn.Module):
    """PyTorch's own encoder layer under a causal mask."""

    def __init__(self, norm_first: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 4)
        self.layer = nn.TransformerEncoderLayer(
            4, 2, 6, dropout=0.0, activation="gelu", batch_first=True, norm_first=norm_first
        )
        self.head = nn.Linear(4, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        size = tokens.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(size, dtype=self.head.weight.dtype)
        x = self.layer(self.tokens(tokens), src_mask=mask, is_causal=True)
        return self.head(x).mean(1)


def convolutional() -> nn.Module:
    torch.manual_seed(1107)  # no kink of the ReLU and the pooling lies within the fit's width
    model = nn.Sequential(
        *[nn.Conv2d(1, 4, 3), nn.GroupNorm(2, 4), nn.GELU(), nn.AvgPool2d(2)],
        *[nn.Conv2d(4, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), nn.MaxPool2d(2)],
        *[nn.Flatten(), nn.Linear(3, 3)],
    )
    model[5].running_mean.copy_(torch.tensor([0.1, -0.2, 0.3]))
    model[5].running_var.copy_(torch.tensor([0.5, 1.5, 0.7]))
    return model


def tokens() -> Tensor:
    return torch.tensor([[0, 3, 5, 1], [2, 2, 6, 4], [1, 0, 4, 3]])


# name -> (make the model, make its input)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "mlp": (
        lambda: nn.Sequential(
            nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 5), nn.SiLU(), nn.Linear(5, 3)
        ),
        lambda: points(3, 4),
    ),
    "cnn": (convolutional, lambda: points(3, 1, 6, 6)),
    "decoder": (Decoder, tokens),
    "encoder": (Encoder, tokens),
    "encoder_norm_first": (lambda: Encoder(norm_first=True), tokens),
}


def logs(y: Tensor) -> Tensor:
    shifted = y - y.detach().amax(1, keepdim=True)
    return shifted - shifted.exp().sum(1, keepdim=True).log()


def smoothed(y: Tensor, t: Tensor) -> Tensor:
    target = 0.9 * F.one_hot(t, y.shape[1]).to(y) + 0.1 / y.shape[1]
    return -(logs(y) * target).sum(1).mean()


def binary(y: Tensor, t: Tensor) -> Tensor:
    return ((1 + (-y).exp()).log() + (1 - t) * y).mean()


def huber(y: Tensor, t: Tensor) -> Tensor:
    error = y - t
    far = error.abs() > 1.5
    return torch.where(far, 1.5 * (error.abs() - 0.75), error**2 / 2).mean()


CLASSES = torch.tensor([2, 0, 1])
REALS = points(3, 3, seed=7)
OUTLIERS = torch.tensor([[3.0, 0.1, -0.2], [0.0, -3.0, 3.0], [0.2, 0.3, 0.0]]).double()


def picked(y: Tensor, t: Tensor) -> Tensor:
    return -logs(y)[torch.arange(len(t)), t].mean()


class Loss(NamedTuple):
    fused: Callable[[Tensor, Tensor], Tensor]
    written_out: Callable[[Tensor, Tensor], Tensor]
    target: Tensor


LOSSES = {
    "mse": Loss(F.mse_loss, lambda y, t: ((y - t) ** 2).mean(), REALS),
    "cross_entropy": Loss(F.cross_entropy, picked, CLASSES),
    "smoothed": Loss(functools.partial(F.cross_entropy, label_smoothing=0.1), smoothed, CLASSES),
    "nll": Loss(lambda y, t: F.nll_loss(F.log_softmax(y, 1), t), picked, CLASSES),
    "bce": Loss(F.binary_cross_entropy_with_logits, binary, REALS.sigmoid()),
    "huber": Loss(functools.partial(F.huber_loss, delta=1.5), huber, OUTLIERS),
}
ORDER = 5


@functools.cache
def network(name: str) -> tuple[nn.Module, Tensor, dict[str, Tensor]]:
    """A model in float64, its input, and a direction."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        make, make_input = NETWORKS[name]
        model = make().double().eval()
    return model, make_input(), direction_for(trainable(model))


@functools.cache
def expected(name: str, loss: str) -> Nested:
    model, x, v = network(name)
    case = LOSSES[loss]
    with sdpa_kernel(SDPBackend.MATH):
        f = loss_of(written_out(model), case.written_out, x, case.target)
        return nested(f, trainable(model), v, ORDER)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_jet_agrees_with_nested_reverse_to_order_five(name: str, loss: str) -> None:
    (model, x, v), case = network(name), LOSSES[loss]
    got = jet(loss_of(model, case.fused, x, case.target), trainable(model), v, ORDER)
    for k, value in enumerate(expected(name, loss).values):
        torch.testing.assert_close(got[k], value, rtol=1e-8, atol=0, msg=lambda m, k=k: f"{k}: {m}")


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_tower_agrees_with_nested_reverse_to_order_five(name: str, loss: str) -> None:
    (model, x, v), case = network(name), LOSSES[loss]
    tower = derivative_tower(model, case.fused, x, case.target, ORDER, v)
    want = expected(name, loss)
    torch.testing.assert_close(tower.values, torch.stack(want.values), rtol=1e-8, atol=0)
    assert len(tower) == ORDER
    for vector, other in zip(tower, want.vectors, strict=True):
        assert_same(vector, other)


# By order, what rounding leaves of derivatives of a polynomial fitted to values.
FITTED = [1e-13, 1e-10, 1e-7, 1e-6, 1e-4, 1e-3]


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_fit_of_values_alone_agrees_with_the_oracle_and_with_jet(name: str, loss: str) -> None:
    (model, x, v), case = network(name), LOSSES[loss]
    width = 1.0 if name == "mlp" else 0.3
    f, start = loss_of(model, case.fused, x, case.target), trainable(model)

    def values(ts: Sequence[float]) -> list[float]:
        return [f({k: p + t * v[k] for k, p in start.items()}).item() for t in ts]

    with torch.no_grad():
        fit = Chebyshev.interpolate(values, 24, [-width, width])
    followed = jet(f, start, v, ORDER)
    for k, rtol in enumerate(FITTED):
        fitted = torch.tensor(fit.deriv(k)(0.0) if k else fit(0.0))
        for other in (expected(name, loss).values[k], followed[k]):
            torch.testing.assert_close(fitted, other, rtol=rtol, atol=0)


# ------------------------------------------------------------------------------ the tower


class Curve(nn.Module):
    """Three parameters in two tensors, few enough for every tensor of derivatives to be written."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(points(2, seed=2))
        self.b = nn.Parameter(points(1, seed=3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.w + self.b)


def net(dtype: torch.dtype = torch.float64, device: str = "cpu") -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(device, dtype)


def batch(dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, Tensor]:
    return points(6, 4, dtype=dtype).to(device), points(6, 3, seed=5, dtype=dtype).to(device)


def mse(y: Tensor, t: Tensor) -> Tensor:
    """Composite, and so right at every order in the oracle too."""
    return ((y - t) ** 2).mean()


def test_entries_are_the_full_derivative_tensors_contracted_but_once() -> None:
    model, x, t = Curve(), points(4, 2), points(4, seed=1)

    def loss(flat: Tensor) -> Tensor:
        return ((torch.tanh(x @ flat[:2] + flat[2]) - t) ** 2).mean()

    theta, v = torch.cat([model.w, model.b]).detach(), torch.tensor([0.3, -1.1, 0.7]).double()
    tower = derivative_tower(model, mse, x, t, 4, {"b": v[2:], "w": v[:2]})
    derivative, values = loss, [loss(theta)]
    for vector in tower:
        derivative = jacrev(derivative)
        tensor = derivative(theta)
        while tensor.ndim > 1:
            tensor = tensor @ v
        assert list(vector) == ["w", "b"]
        torch.testing.assert_close(torch.cat([vector["w"], vector["b"]]), tensor)
        values.append(tensor @ v)
    torch.testing.assert_close(tower.values, torch.stack(values))


def test_order_two_is_the_default_and_order_one_the_gradient() -> None:
    model, (x, t) = net(), batch()
    v = direction_for(trainable(model))
    gradient = torch.autograd.grad(mse(model(x), t), list(model.parameters()))
    (only,) = derivative_tower(model, mse, x, t, 1, v)
    assert_same(only, dict(zip(v, gradient, strict=True)), rtol=1e-13)
    two = derivative_tower(model, mse, x, t, direction=v)
    assert len(two) == 2
    assert two.values.shape == (3,)
    product = hvp(loss_of(model, mse, x, t), trainable(model), v)
    assert_same(two[1], product, rtol=1e-12)


def test_values_are_the_vectors_times_the_direction() -> None:
    model, (x, t) = net(), batch()
    tower = derivative_tower(model, mse, x, t, 5)
    torch.testing.assert_close(tower.values[0], mse(model(x), t).detach())
    for k, vector in enumerate(tower):
        torch.testing.assert_close(tower.values[k + 1], dot(vector, tower.direction))


def test_a_direction_of_another_length_scales_order_by_order() -> None:
    model, (x, t) = net(), batch()
    v, s = direction_for(trainable(model)), -1.7
    tower = derivative_tower(model, mse, x, t, 5, v)
    scaled = derivative_tower(model, mse, x, t, 5, {k: s * u for k, u in v.items()})
    for k, (vector, other) in enumerate(zip(tower, scaled, strict=True)):
        assert_same(other, {n: s**k * u for n, u in vector.items()}, rtol=1e-12)
    powers = s ** torch.arange(6.0).double()
    torch.testing.assert_close(scaled.values, powers * tower.values, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("device", DEVICES)
def test_without_a_direction_it_is_the_gradient_by_its_norm(device: str) -> None:
    model, (x, t) = net(device=device), batch(device=device)
    tower = derivative_tower(model, mse, x, t, 4)
    names = [k for k, _ in model.named_parameters()]
    gradient = dict(
        zip(names, torch.autograd.grad(mse(model(x), t), list(model.parameters())), strict=True)
    )
    assert_same(tower.direction, {k: g / length(gradient) for k, g in gradient.items()}, 1e-13)
    torch.testing.assert_close(length(tower.direction).item(), 1.0, rtol=1e-13, atol=0)
    torch.testing.assert_close(tower.values[1], length(gradient), rtol=1e-13, atol=0)
    given = derivative_tower(model, mse, x, t, 4, tower.direction)
    torch.testing.assert_close(given.values, tower.values, rtol=1e-13, atol=0)
    want = nested(loss_of(model, mse, x, t), trainable(model), tower.direction, 4)
    for vector, other in zip(tower, want.vectors, strict=True):
        assert_same(vector, other)
        assert all(u.device == x.device for u in vector.values())


def test_the_direction_is_returned_as_it_was_given() -> None:
    model, (x, t) = net(), batch()
    v = {k: u.requires_grad_() for k, u in direction_for(trainable(model)).items()}
    shuffled = dict(reversed(v.items()))
    tower = derivative_tower(model, mse, x, t, 2, shuffled)
    assert list(tower.direction) == list(v)
    assert all(torch.equal(tower.direction[k], v[k]) for k in v)
    for u in (*tower, tower.direction, {"values": tower.values}):
        assert not any(t.requires_grad for t in u.values())
    assert all(u.requires_grad and u.grad is None for u in v.values())


def test_the_cases_of_the_huber_loss_have_both_of_its_branches() -> None:
    for name in NETWORKS:
        model, x, _ = network(name)
        far = (model(x) - OUTLIERS).abs() > 1.5
        assert 0 < far.sum() < 9


def test_one_pass_of_the_model_and_one_more_for_a_direction() -> None:
    model, (x, t) = net(), batch()
    passes: list[nn.Module] = []
    with model.register_forward_hook(lambda module, *_: passes.append(module)):
        derivative_tower(model, mse, x, t, 6, direction_for(trainable(model)))
        assert len(passes) == 1
        derivative_tower(model, mse, x, t, 6)
        assert len(passes) == 3


def test_beyond_the_degree_of_a_polynomial_there_are_zeros() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[2.0, -1.0]]))
    x, v = torch.tensor([[1.0, 3.0]]).double(), {"weight": torch.tensor([[1.0, 1.0]]).double()}
    # L(w) = (w x)^3 where w x = -1 and v x = 4
    tower = derivative_tower(model, lambda y, _: (y**3).sum(), x, None, 6, v)
    assert tower.values.tolist() == [-1.0, 12.0, -96.0, 384.0, 0.0, 0.0, 0.0]
    factors = [3.0, -24.0, 96.0, 0.0, 0.0, 0.0]
    assert [u["weight"].tolist() for u in tower] == [[[f, 3 * f]] for f in factors]


def test_orders_whose_factorial_is_beyond_an_int64() -> None:
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    v, x = {"weight": torch.ones(1, 1).double()}, torch.ones(1, 1).double()
    tower = derivative_tower(model, lambda y, _: y.exp().sum(), x, None, 24, v)
    ones = torch.ones(25).double()
    torch.testing.assert_close(tower.values, ones, rtol=1e-13, atol=0)
    torch.testing.assert_close(torch.cat([u["weight"][0] for u in tower]), ones[1:])


@pytest.mark.parametrize("order", [1, 2, 4])
def test_a_loss_without_curvature_or_without_parameters_has_zeros(order: int) -> None:
    model, x = nn.Linear(2, 1).double(), points(3, 2)
    v = direction_for(trainable(model))
    linear = derivative_tower(model, lambda y, _: y.sum(), x, None, order, v)
    assert torch.equal(linear[0]["weight"], x.sum(0, keepdim=True))
    assert linear.values[2:].tolist() == [0.0] * (order - 1)
    constant = derivative_tower(model, lambda y, t: t.sum(), x, x, order, v)
    assert torch.equal(constant.values[0], x.sum())
    assert constant.values[1:].tolist() == [0.0] * order
    for tower in (linear, constant):
        assert tower.values.shape == (order + 1,)
        for u in tower[1:] if tower is linear else tower:
            assert all((t == 0).all() and t.shape == v[k].shape for k, t in u.items())


def test_frozen_parameters_are_left_out() -> None:
    model, (x, t) = net(), batch()
    model[0].requires_grad_(False)
    tower = derivative_tower(model, mse, x, t, 3)
    assert [list(u) for u in (*tower, tower.direction)] == [["2.weight", "2.bias"]] * 4
    want = nested(loss_of(model, mse, x, t), trainable(model), tower.direction, 3)
    for vector, other in zip(tower, want.vectors, strict=True):
        assert_same(vector, other)
    full = {k: torch.ones_like(p) for k, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"0\.weight"):
        derivative_tower(model, mse, x, t, 3, full)


def test_a_shared_parameter_counts_once_under_its_first_name() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = TiedLanguageModel(5, 3).double()
    x, t = torch.tensor([[0, 4], [2, 2]]), points(2, 2, 5)
    tower = derivative_tower(model, mse, x, t, 4)
    weight = model.embedding.weight.detach()

    def loss(values: Named) -> Tensor:
        return mse(values["embedding.weight"][x] @ values["embedding.weight"].T, t)

    want = nested(loss, {"embedding.weight": weight}, tower.direction, 4)
    torch.testing.assert_close(tower.values, torch.stack(want.values), rtol=1e-8, atol=0)
    for vector, other in zip(tower, want.vectors, strict=True):
        assert_same(vector, other)
    with pytest.raises(ValueError, match=r"head\.weight"):
        derivative_tower(model, mse, x, t, 2, {"embedding.weight": weight, "head.weight": weight})


def test_an_unused_parameter_gets_zeros() -> None:
    model, (x, t) = net(), batch()
    model.register_parameter("unused", nn.Parameter(points(2, 3)))
    for v in (None, direction_for(trainable(model))):
        tower = derivative_tower(model, mse, x, t, 3, v)
        for u in tower:
            assert torch.equal(u["unused"], torch.zeros(2, 3).double())
    without = derivative_tower(net(), mse, x, t, 3)
    whole = derivative_tower(model, mse, x, t, 3)
    assert torch.equal(without.values, whole.values)


# ---------------------------------------------------------------------------- its errors


def test_a_zero_or_infinite_gradient_is_no_direction() -> None:
    model, (x, t) = net(), batch()
    with pytest.raises(ValueError, match=r"derivative_tower: expected a gradient .*direction="):
        derivative_tower(model, lambda y, t: (0 * y).sum(), x, t)
    with pytest.raises(ValueError, match="norm 0"):
        derivative_tower(model, mse, x, model(x).detach())
    with pytest.raises(ValueError, match="norm 0"):
        derivative_tower(model, lambda y, t: t.sum(), x, t)
    with pytest.raises(ValueError, match=r"norm (nan|inf)"):
        derivative_tower(model, lambda y, t: (y * math.inf).sum(), x, t)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda v: v.pop("0.bias"), r"names of x, got .* for .*0\.bias"),
        (lambda v: v.update(more=torch.ones(1)), "names of x, got .*more"),
        (lambda v: v.update({"module.0.bias": v.pop("0.bias")}), r"module\.0\.bias"),
        (
            lambda v: v.update({"0.bias": torch.ones(1, 5).double()}),
            r"'0\.bias': expected v like x, \(5,\) .* got \(1, 5\)",
        ),
        (lambda v: v.update({"2.bias": torch.ones(3)}), r"'2\.bias': .*float64 .*float32"),
        (lambda v: v.clear(), "names of x"),
    ],
    ids=["missing", "extra", "other", "shape", "dtype", "empty"],
)
def test_a_direction_unlike_the_parameters_is_refused(
    change: Callable[[dict[str, Tensor]], Any], text: str
) -> None:
    model, (x, t) = net(), batch()
    v = direction_for(trainable(model))
    change(v)
    with pytest.raises(ValueError, match=text) as caught:
        derivative_tower(model, mse, x, t, 2, v)
    assert str(caught.value).startswith("derivative_tower, direction")


def test_wrong_arguments_are_refused() -> None:
    model, (x, t) = net(), batch()
    for order in (0, -1, 2.0, "2"):
        with pytest.raises(ValueError, match=f"order of 1 or more, got {order!r}"):
            derivative_tower(model, mse, x, t, order)
    for loss_fn in (lambda y, t: y - t, lambda y, t: (y - t).sum(0), lambda y, t: y.sum()[None]):
        for v in (None, direction_for(trainable(model))):
            with pytest.raises(ValueError, match="expected f to return a scalar, got the shape"):
                derivative_tower(model, loss_fn, x, t, 2, v)
    with pytest.raises(TypeError, match="derivative_tower: expected f to return one tensor"):
        derivative_tower(model, lambda y, t: 1.0, x, t)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        derivative_tower(model.requires_grad_(False), mse, x, t)


def test_an_operation_without_a_rule_is_named() -> None:
    model, (x, t) = net(), batch()
    with pytest.raises(NotImplementedError, match="igamma"):
        derivative_tower(model, lambda y, t: torch.igamma(y.exp(), t.exp()).sum(), x, t)


# ---------------------------------------------------------------------------- what it leaves


class State(NamedTuple):
    tensors: dict[str, Tensor]
    identities: list[int]
    modes: list[bool]
    flags: list[bool]
    gradients: list[Tensor | None]


def state(model: nn.Module) -> State:
    tensors = list(model.parameters()) + list(model.buffers())
    return State(
        {k: t.clone() for k, t in model.state_dict().items()},
        [id(t) for t in tensors] + [t.data_ptr() for t in tensors],
        [module.training for module in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [None if p.grad is None else p.grad.clone() for p in model.parameters()],
    )


def assert_untouched(model: nn.Module, before: State) -> None:
    after = state(model)
    assert after.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(after.tensors[k], t) for k, t in before.tensors.items())
    assert after[1:4] == before[1:4]
    for now, then in zip(after.gradients, before.gradients, strict=True):
        assert (now is None) == (then is None)
        assert now is None or torch.equal(now, then)
    assert all(p.is_leaf for p in model.parameters())
    assert not any(p._backward_hooks for p in model.parameters())


def lived_in() -> nn.Sequential:
    """A model with a frozen layer, a buffer, a gradient, modules in both modes."""
    model = net().append(nn.BatchNorm1d(3)).append(nn.Dropout(0.5)).double()
    model[3].eval()
    model[0].weight.requires_grad_(False)
    model[0].bias.grad = points(5)
    return model


def test_the_model_is_left_as_it_was() -> None:
    model, (x, t) = lived_in(), batch()
    before = state(model)
    derivative_tower(model, mse, x, t, 3)
    derivative_tower(model, mse, x, t, 3, direction_for(trainable(model)))
    assert_untouched(model, before)
    mse(model(x), t).backward()  # and it still trains
    assert model[2].weight.grad is not None


@pytest.mark.parametrize("at", [1, 2], ids=["gradient", "tower"])
def test_the_model_is_left_as_it_was_after_an_exception_too(at: int) -> None:
    model, (x, t) = lived_in(), batch()
    before, calls = state(model), 0

    def fails(y: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == at:
            raise ZeroDivisionError
        return mse(y, t)

    with pytest.raises(ZeroDivisionError):
        derivative_tower(model, fails, x, t, 3)
    assert calls == at
    assert_untouched(model, before)


class Counting(nn.Module):
    """Counts its calls in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.linear(x)


def test_a_buffer_that_a_forward_changes_is_left_as_it_was() -> None:
    model, (x, t) = Counting().double(), batch()
    before = state(model)
    derivative_tower(model, mse, x, t, 3)
    assert_untouched(model, before)


def test_results_are_detached_and_share_nothing_with_the_model() -> None:
    model, (x, t) = net(), batch()
    tower = derivative_tower(model, mse, x, t, 3)
    for vector in (*tower, tower.direction, {"values": tower.values}):
        for u in vector.values():
            assert type(u) is Tensor
            assert not u.requires_grad
            assert u.grad_fn is None
    with torch.no_grad():
        for u in (*tower[0].values(), *tower.direction.values()):
            u.zero_()
    assert all((p != 0).any() for p in model.parameters())


def test_what_else_requires_a_gradient_is_left_alone() -> None:
    model, (x, t) = net(), batch()
    x.requires_grad_()
    t.requires_grad_()
    for loss in (mse, lambda y, t: t.sum()):
        tower = derivative_tower(model, loss, x, t, 3, direction_for(trainable(model)))
        for u in (*tower, {"values": tower.values}):
            assert not any(tensor.requires_grad for tensor in u.values())
    assert x.grad is None
    assert t.grad is None


def test_nothing_of_a_pass_is_kept() -> None:
    model, (x, t) = net(), batch()
    outputs: list[weakref.ref[Tensor]] = []

    def loss(y: Tensor, t: Tensor) -> Tensor:
        outputs.append(weakref.ref(y))
        return mse(y, t)

    tower = derivative_tower(model, loss, x, t, 3)
    gc.collect()
    assert len(outputs) == 2
    assert all(output() is None for output in outputs)
    assert len(tower) == 3


# ------------------------------------------------------------------------ randomness, norms


def random_state(device: str) -> Tensor:
    return torch.cuda.get_rng_state() if device == "cuda" else torch.get_rng_state()


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_draws_one_mask_for_the_direction_and_the_tower(device: str) -> None:
    model = net(device=device).insert(2, nn.Dropout(0.4)).train()
    x, t = batch(device=device)

    def loss(values: Named) -> Tensor:
        torch.manual_seed(3)  # the same mask at each call
        return loss_of(model, mse, x, t)(values)

    leaves = {k: p.clone().requires_grad_() for k, p in trainable(model).items()}
    slopes = torch.autograd.grad(loss(leaves), list(leaves.values()))
    after = random_state(device)
    gradient = dict(zip(leaves, slopes, strict=True))
    v = {k: g / length(gradient) for k, g in gradient.items()}
    want = nested(loss, trainable(model), v, 4)
    for direction in (None, v):
        torch.manual_seed(3)
        tower = derivative_tower(model, mse, x, t, 4, direction)
        assert torch.equal(random_state(device), after)
        assert_same(tower.direction, v, rtol=1e-13)
        torch.testing.assert_close(tower.values, torch.stack(want.values))
        for vector, other in zip(tower, want.vectors, strict=True):
            assert_same(vector, other)
    other = derivative_tower(model, mse, x, t, 4)  # another mask, or the test says nothing
    assert (other.values[0] - tower.values[0]).abs() > 1e-4


@pytest.mark.parametrize("device", DEVICES)
def test_dropout_inside_attention_draws_one_mask_too(device: str) -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 6, dropout=0.3, batch_first=True)
    layer = layer.to(device, torch.float64).train()
    x, t = points(2, 3, 4).to(device), points(2, 3, 4, seed=8).to(device)
    torch.manual_seed(3)
    mse(layer(x), t)
    after = random_state(device)
    torch.manual_seed(3)
    tower = derivative_tower(layer, mse, x, t, 3)
    assert torch.equal(random_state(device), after)
    assert_same({k: g / length(tower[0]) for k, g in tower[0].items()}, tower.direction, 1e-11)


def test_batch_norm_in_training_mode_is_refused_before_anything_happens() -> None:
    model = nn.Sequential(OrderedDict(linear=nn.Linear(4, 3), norm=nn.BatchNorm1d(3))).double()
    (x, t), before, generator = batch(), state(model), torch.get_rng_state()
    for v in (None, direction_for(trainable(model))):
        with pytest.raises(NotImplementedError, match=r"derivative_tower: norm .*model\.eval"):
            derivative_tower(model, mse, x, t, 2, v)
    with pytest.raises(NotImplementedError, match="BatchNorm1d"):
        derivative_tower(model[1], mse, t, t, 2)
    tracked = nn.Sequential(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)).double()
    with pytest.raises(NotImplementedError, match="0 is in training mode"):
        derivative_tower(tracked, mse, points(2, 4, 3), points(2, 4, 3, seed=1))
    assert_untouched(model, before)
    assert torch.equal(torch.get_rng_state(), generator)
    assert len(derivative_tower(model.eval(), mse, x, t, 2)) == 2


@pytest.mark.parametrize("training", [True, False])
def test_batch_norm_without_running_statistics_works_in_both_modes(training: bool) -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 2), nn.BatchNorm2d(2, track_running_stats=False)).double()
    model.train(training)
    x, t, before = points(3, 1, 3, 3), points(3, 2, 2, 2, seed=1), state(model)
    tower = derivative_tower(model, mse, x, t, 5)
    f = loss_of(written_out(model), mse, x, t)
    want = nested(f, trainable(model), tower.direction, 5)
    scale = want.values[0].item()  # the bias of the convolution does not count
    torch.testing.assert_close(tower.values, torch.stack(want.values), rtol=1e-8, atol=1e-8 * scale)
    for vector, other in zip(tower, want.vectors, strict=True):
        assert_same(vector, other)
    assert_untouched(model, before)


# -------------------------------------------------------------------------- ways to call it


def test_under_no_grad_it_is_the_same() -> None:
    model, (x, t) = net(), batch()
    tower = derivative_tower(model, mse, x, t, 3)
    with torch.no_grad():
        same = derivative_tower(model, mse, x, t, 3)
        assert not torch.is_grad_enabled()
    assert torch.equal(tower.values, same.values)
    assert all(torch.equal(tower[2][k], same[2][k]) for k in tower[2])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_the_models_of_the_table_in_float32(name: str, device: str) -> None:
    """Against themselves in float64, where the tests above have been."""
    make, make_input = MODELS[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = make().eval().to(device), make_input().to(device)
    wide = copy.deepcopy(model).double()
    wide_x = x.double() if x.is_floating_point() else x
    v = direction_for(trainable(model))

    def loss(y: Tensor, _: None) -> Tensor:
        return (torch.tanh(y) ** 2).mean()

    tower = derivative_tower(model, loss, x, None, 3, v)
    same = derivative_tower(wide, loss, wide_x, None, 3, {k: u.double() for k, u in v.items()})
    assert tower.values.dtype == torch.float32
    assert tower.values.device == x.device
    torch.testing.assert_close(tower.values.double(), same.values, rtol=1e-3, atol=1e-6)
    for vector, other in zip(tower, same, strict=True):
        assert all(u.dtype == torch.float32 and u.device == x.device for u in vector.values())
        assert_same({k: u.double() for k, u in vector.items()}, other, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_tower_in_low_precision(dtype: torch.dtype) -> None:
    model, (x, t) = net(dtype), batch(dtype)
    tower, exact = derivative_tower(model, mse, x, t, 3), derivative_tower(net(), mse, *batch(), 3)
    for vector in (*tower, tower.direction, {"values": tower.values}):
        assert all(u.dtype == dtype for u in vector.values())
    torch.testing.assert_close(tower.values.double(), exact.values, rtol=0.05, atol=0.01)


def test_a_direction_is_normalized_where_the_norm_overflows_float16() -> None:
    model = nn.Linear(4, 3).half()
    for p in model.parameters():
        nn.init.zeros_(p)
    # All 15 entries of the gradient are 30 000, its norm is 116 190, the largest number 65 504.
    x = torch.ones(30, 4).half()
    tower = derivative_tower(model, lambda y, _: 1000 * y.sum(), x, None, 2)
    for u in tower.direction.values():
        torch.testing.assert_close(u, torch.full_like(u, 15**-0.5))


class Takes(nn.Module):
    """What it is called with: a pair or a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, inputs: Any) -> dict[str, Tensor]:
        x, scale = inputs.values() if isinstance(inputs, dict) else inputs
        return {"output": torch.tanh(self.linear(x)) * scale}


def test_input_target_and_output_are_whatever_the_model_and_the_loss_take() -> None:
    model, (x, t) = Takes().double(), batch()

    def loss(y: dict[str, Tensor], target: tuple[Tensor, float]) -> Tensor:
        return target[1] * mse(y["output"], target[0])

    want = nested(
        lambda values: (
            2.0 * mse(torch.tanh(x @ values["linear.weight"].T + values["linear.bias"]) * 3, t)
        ),
        trainable(model),
        v := direction_for(trainable(model)),
        3,
    )
    for inputs in ((x, 3.0), [x, 3.0], {"x": x, "scale": 3.0}):
        tower = derivative_tower(model, loss, inputs, (t, 2.0), 3, v)
        torch.testing.assert_close(tower.values, torch.stack(want.values), rtol=1e-10, atol=0)


def test_a_tower_is_a_sequence() -> None:
    model, (x, t) = net(), batch()
    tower = derivative_tower(model, mse, x, t, 4)
    assert isinstance(tower, DerivativeTower)
    assert isinstance(tower, Sequence)
    assert len(tower) == 4
    assert [u is tower[k] for k, u in enumerate(tower)] == [True] * 4
    assert tower[-1] is tower[3]
    assert [u is w for u, w in zip(tower[1:3], [tower[1], tower[2]], strict=True)] == [True] * 2
    assert tower[::-1][0] is tower[3]
    gradient, product, *_ = tower
    assert gradient is tower[0]
    assert product is tower[1]
    with pytest.raises(IndexError):
        tower[4]


def test_a_tower_prints_as_a_table() -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, 2.0)
    v = {"weight": torch.tensor([[0.5]])}
    tower = derivative_tower(model, lambda y, _: (y**3).sum(), torch.ones(1, 1), None, 3, v)
    assert repr(tower) == "\n".join(
        [
            "derivatives of the loss along one direction, 1 parameters",
            "order  value  norm of the vector",
            "0          8",
            "1          6                  12",
            "2          3                   6",
            "3       0.75                 1.5",
        ]
    )
    html = tower._repr_html_()
    assert html.count("<tr>") == 5
    for cell in (
        "<td>0.75</td>",
        "<td>1.5</td>",
        "norm of the vector</th>",
        "<caption>derivatives",
    ):
        assert cell in html


# ------------------------------------------------------------------------------ hvp


def bumpy(x: Tensor) -> Tensor:
    return (x.sin().cumsum(-1) * x.exp()).sum() + (x.square().sum() + 1).log()


def pair(p: Named) -> Tensor:
    return ((p["a"] @ p["b"]).sin() * p["a"]).sum() + p["b"].pow(4).sum()


def both(x: Named) -> tuple[Callable[[Named], Tensor], Named]:
    return pair, x


PAIR = {"a": points(2, seed=3), "b": points(2, 2, seed=4)}
PAIR_V = {"b": points(2, 2, seed=6), "a": points(2, seed=5)}  # in another order


def flat_pair(flat: Tensor) -> Tensor:
    return pair({"a": flat[:2], "b": flat[2:].reshape(2, 2)})


def flat(p: Named) -> Tensor:
    return torch.cat([p["a"].flatten(), p["b"].flatten()])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)])
def test_hvp_of_a_tensor(shape: tuple[int, ...], device: str) -> None:
    f = bumpy if shape else lambda x: x.exp() * x.sin()
    x, v = points(*shape).to(device), points(*shape, seed=1).to(device)
    explicit = hessian(f)(x).reshape(x.numel(), x.numel()) @ v.flatten()
    got = hvp(f, x, v)
    torch.testing.assert_close(got, explicit.reshape(shape), rtol=1e-12, atol=1e-12)
    _, other = torch.autograd.functional.hvp(f, x, v)
    torch.testing.assert_close(got, other, rtol=1e-12, atol=1e-12)
    narrow = hvp(f, x.float(), v.float())
    assert narrow.dtype == torch.float32
    torch.testing.assert_close(narrow.double(), got, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("product", [hvp, lambda f, x, v: linearize_hvp(f, x)(v)])
def test_hvp_of_a_dict(product: Callable[..., dict[str, Tensor]]) -> None:
    got = product(pair, PAIR, PAIR_V)
    assert list(got) == ["a", "b"]
    assert [t.shape for t in got.values()] == [(2,), (2, 2)]
    explicit = hessian(flat_pair)(flat(PAIR)) @ flat(PAIR_V)
    torch.testing.assert_close(flat(got), explicit, rtol=1e-12, atol=1e-12)


def test_hvp_leaves_its_inputs_and_is_detached() -> None:
    x, v = points(3).requires_grad_(), points(3, seed=1).requires_grad_()
    with torch.no_grad():
        got = hvp(bumpy, 1 * x, v)
    assert torch.equal(got, hvp(bumpy, x, v))
    assert not got.requires_grad
    assert x.grad is None
    assert v.grad is None
    weight = points(3).requires_grad_()  # what f closes over is left alone
    hvp(lambda x: bumpy(x * weight), x, v)
    assert weight.grad is None


def test_hvp_of_what_has_no_curvature_is_zero() -> None:
    x, v = points(3), points(3, seed=1)
    zeros = torch.zeros(3).double()
    for f in (
        lambda x: x.sum(),
        lambda x: torch.tensor(1.0),
        lambda x: x.detach().sum(),
        lambda x: (x * points(3)).sum() + 1,
        lambda x: torch.ones(2, requires_grad=True).sum(),
    ):
        product = linearize_hvp(f, x)
        assert torch.equal(product(v), zeros)
        assert torch.equal(product(v), zeros)
        assert torch.equal(hvp(f, x, v), zeros)


@pytest.mark.parametrize(
    ("f", "expected"),
    [
        (lambda p: p["a"].pow(3).sum(), ("a",)),
        (lambda p: p["b"].pow(3).sum(), ("b",)),
        (lambda p: p["a"].pow(3).sum() + p["b"].sum(), ("a",)),  # linear in b
        (lambda p: p["a"].sum() * p["b"].sum(), ("a", "b")),
        (lambda p: p["a"].sum() + p["b"].sum(), ()),
    ],
)
def test_unused_and_linear_entries_are_zero(
    f: Callable[[Named], Tensor], expected: tuple[str, ...]
) -> None:
    def flattened(x: Tensor) -> Tensor:
        return f({"a": x[:2], "b": x[2:].reshape(2, 2)})

    got = hvp(f, PAIR, PAIR_V)
    torch.testing.assert_close(flat(got), hessian(flattened)(flat(PAIR)) @ flat(PAIR_V))
    assert tuple(k for k, t in got.items() if (t != 0).any()) == expected


def test_many_products_at_one_point() -> None:
    x = points(4)
    product, explicit = linearize_hvp(bumpy, x), hessian(bumpy)(x)
    rows = [product(e) for e in torch.eye(4).double()]
    torch.testing.assert_close(torch.stack(rows), explicit, rtol=1e-12, atol=1e-12)
    for e, row in zip(torch.eye(4).double(), rows, strict=True):
        assert torch.equal(product(e), row)  # no call changes the next
    torch.testing.assert_close(vmap(product)(torch.eye(4).double()), explicit)
    several = {k: torch.stack([t, 2 * t]) for k, t in PAIR_V.items()}
    for k, t in vmap(linearize_hvp(pair, PAIR))(several).items():
        once = hvp(pair, PAIR, PAIR_V)[k]
        torch.testing.assert_close(t, torch.stack([once, 2 * once]))


def test_the_graph_is_built_once() -> None:
    calls: list[Tensor] = []

    def counted(x: Tensor) -> Tensor:
        calls.append(x)
        return bumpy(x)

    product = linearize_hvp(counted, points(3))
    for seed in range(3):
        product(points(3, seed=seed))
    assert len(calls) == 1


class Kept:
    """Stands for a tensor that a graph saves."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_what_the_graph_holds_is_released_with_the_function() -> None:
    kept: weakref.WeakSet[Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> Kept:
        kept.add(box := Kept(tensor))
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        # No operation that saves its result: PyTorch itself never frees those under these hooks.
        product = linearize_hvp(lambda x: (x.sin() * x).sum(), points(3))
    product(points(3))
    assert len(kept) > 0
    gc.disable()  # released at once, by no cycle
    try:
        del product
        assert len(kept) == 0
    finally:
        gc.enable()


def test_hvp_inside_transforms() -> None:
    xs, vs = points(5, 3), points(5, 3, seed=1)
    rows = torch.stack([hessian(bumpy)(x) @ v for x, v in zip(xs, vs, strict=True)])
    torch.testing.assert_close(vmap(lambda x, v: hvp(bumpy, x, v))(xs, vs), rows)

    def curvature(product: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: product(bumpy, x, vs[0]) @ vs[1]

    explicit = curvature(lambda f, x, v: hessian(f)(x) @ v)
    torch.testing.assert_close(grad(curvature(hvp))(xs[0]), grad(explicit)(xs[0]))
    for got, want in zip(
        *(jvp(curve, (xs[0],), (vs[2],)) for curve in (curvature(hvp), explicit)), strict=True
    ):
        torch.testing.assert_close(got, want)
    third = jacrev(lambda x: hvp(bumpy, x, vs[0]))(xs[0])
    torch.testing.assert_close(third, jacrev(lambda x: hessian(bumpy)(x) @ vs[0])(xs[0]))
    got = grad(lambda p: hvp(pair, p, PAIR_V)["a"].sum())(PAIR)
    want = grad(lambda x: (hessian(flat_pair)(x) @ flat(PAIR_V))[:2].sum())(flat(PAIR))
    torch.testing.assert_close(flat(got), want)


@pytest.mark.parametrize("product", [hvp, lambda f, x, v: linearize_hvp(f, x)(v)])
def test_hvp_refuses_a_vector_unlike_the_point(product: Callable[..., Any]) -> None:
    for v, text in (
        (points(4), r"hvp: expected v like x, \(3,\) .* got \(4,\)"),
        (points(1), "expected v like x"),
        (points(3).float(), "got .* torch.float32"),
        ({"a": points(3)}, "a tensor"),
    ):
        with pytest.raises(ValueError, match=text):
            product(bumpy, points(3), v)
    with pytest.raises(TypeError, match="expected v to be a floating-point"):
        product(bumpy, points(3), torch.ones(3, dtype=torch.long))
    with pytest.raises(TypeError, match="expected x to be a floating-point"):
        product(bumpy, torch.ones(3, dtype=torch.long), points(3))
    with pytest.raises(TypeError, match="got list"):
        product(bumpy, [1.0], [1.0])
    for v in ({"a": PAIR["a"]}, PAIR | {"c": points(1)}, points(2)):
        with pytest.raises(ValueError, match="names of x"):
            product(pair, PAIR, v)
    with pytest.raises(ValueError, match=r"'b': expected v like x, \(2, 2\)"):
        product(pair, PAIR, PAIR | {"b": points(2)})
    with pytest.raises(ValueError, match=r"return a scalar, got the shape \(3,\); .*\.sum\(\)"):
        product(torch.sin, points(3), points(3))
    with pytest.raises(ValueError, match="return a scalar"):
        product(lambda x: x.sum()[None], points(3), points(3))
    with pytest.raises(TypeError, match="hvp: expected f to return one tensor, got float"):
        product(lambda x: 1.0, points(3), points(3))


def attended(x: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(x, x.sin(), x.cos()).square().sum()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fused_attention_needs_no_set_up(dtype: torch.dtype) -> None:
    x, v = points(1, 2, 3, 4, dtype=dtype), points(1, 2, 3, 4, seed=1, dtype=dtype)
    got = hvp(attended, x, v)
    torch.testing.assert_close(torch.vmap(lambda v: hvp(attended, x, v))(v[None])[0], got)
    assert torch.backends.cuda.flash_sdp_enabled()  # as before

    def composite(x: Tensor) -> Tensor:
        return written_out_attention(x, x.sin(), x.cos(), is_causal=False).square().sum()

    explicit = hessian(composite)(x).reshape(24, 24) @ v.flatten()
    tolerance = 1e-11 if dtype == torch.float64 else 1e-4
    torch.testing.assert_close(got.flatten(), explicit, rtol=tolerance, atol=tolerance)


def test_other_errors_of_pytorch_get_no_advice() -> None:
    def broken(x: Tensor) -> Tensor:
        raise RuntimeError("attention is all you need")

    with pytest.raises(RuntimeError) as caught:
        hvp(broken, points(2), points(2))
    assert not hasattr(caught.value, "__notes__")


# ------------------------------------------------------------------------------ laplacian


def trace(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The trace of the Hessian, built; nested forward and reverse over composite operations."""
    second = hessian(lambda flat: f(flat.reshape(x.shape)))(x.flatten())
    return second.diagonal(dim1=-2, dim2=-1).sum(-1)


A = points(5, seed=9)
# name -> (f, its Laplacian by hand)
CLOSED: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "re_cube": (lambda x: x[0] ** 3 - 3 * x[0] * x[1] ** 2, lambda x: 0 * x[0]),
    "harmonic_exp": (lambda x: x[0].exp() * x[1].sin(), lambda x: 0 * x[0]),
    "log_radius_in_two": (lambda x: x[:2].square().sum().log(), lambda x: 0 * x[0]),
    "newton_in_three": (lambda x: 1 / x[:3].norm(), lambda x: 0 * x[0]),
    "square": (lambda x: x @ x, lambda x: 2.0 * len(x) + 0 * x[0]),
    "plane_wave": (lambda x: (A.to(x) @ x).exp(), lambda x: A @ A * (A.to(x) @ x).exp()),
    "oscillation": (lambda x: (A.to(x) @ x).sin(), lambda x: -(A @ A) * (A.to(x) @ x).sin()),
    "norm": (lambda x: x.norm(), lambda x: (len(x) - 1) / x.norm()),
    "gauss": (
        lambda x: (-(x @ x) / 2).exp(),
        lambda x: (x @ x - len(x)) * (-(x @ x) / 2).exp(),
    ),
    "radial_power": (lambda x: x.norm() ** 3, lambda x: 3 * (len(x) + 1) * x.norm()),
    "linear": (lambda x: A.to(x) @ x, lambda x: 0 * x[0]),
    "constant": (lambda x: torch.ones((), dtype=x.dtype, device=x.device), lambda x: 0 * x[0]),
    "detached": (lambda x: x.detach().square().sum(), lambda x: 0 * x[0]),
}


@pytest.mark.parametrize("name", CLOSED)
def test_laplacian_in_closed_form(name: str) -> None:
    f, by_hand = CLOSED[name]
    for seed in range(3):
        x = points(5, seed=20 + seed)
        got = laplacian(f, x)
        torch.testing.assert_close(got, by_hand(x), rtol=1e-11, atol=1e-12)
        narrow = laplacian(f, x.float())
        assert narrow.dtype == torch.float32
        torch.testing.assert_close(narrow.double(), by_hand(x), rtol=1e-3, atol=1e-3)


def layers(act: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    w, u, b = points(6, 4, seed=31), points(6, 6, seed=32), points(6, seed=33)
    return lambda x: act(F.linear(act(F.linear(x, w, b)), u)).square().sum(-1)


def written_out_norm(x: Tensor) -> Tensor:
    mean, variance = WrittenOut.moments(x, -1)
    return (x - mean) / (variance + 1e-5).sqrt()


def attention_over_rows(attend: Callable[..., Tensor]) -> Callable[[Tensor], Tensor]:
    w = points(3, 3, 3, seed=34)
    return lambda x: attend(*(x[None, None] @ w)[0][:, None, None], is_causal=True).pow(3).sum()


# name -> (f, the same by composite operations, where the fused one is wrong, a point)
NETS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]] = {
    **{
        name: (layers(act), layers(act), points(4, seed=35))
        for name, act in {
            "tanh": torch.tanh,
            "gelu": F.gelu,
            "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
            "silu": F.silu,
            "softmax": functools.partial(F.softmax, dim=-1),
        }.items()
    },
    "layer_norm": (
        layers(lambda x: F.layer_norm(x, (6,)).tanh()),
        layers(lambda x: written_out_norm(x).tanh()),
        points(4, seed=35),
    ),
    "attention": (
        attention_over_rows(F.scaled_dot_product_attention),
        attention_over_rows(written_out_attention),
        points(4, 3, seed=36),
    ),
    "matrix": (
        lambda x: (x @ x.T).sin().sum() + x.prod(),
        lambda x: (x @ x.T).sin().sum() + x.prod(),
        points(3, 2, seed=37),
    ),
    "one_number": (lambda x: x.sin().exp(), lambda x: x.sin().exp(), points(seed=38)),
}


@pytest.mark.parametrize("name", NETS)
def test_laplacian_of_networks(name: str) -> None:
    """Of a matrix over all its entries; of a single number too."""
    f, composite, x = NETS[name]
    torch.testing.assert_close(laplacian(f, x), trace(composite, x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("device", DEVICES)
def test_laplacian_on_a_device(device: str) -> None:
    x = points(4, 3)
    f = lambda x: (F.softmax(x @ x.T, -1) @ x).tanh().norm()  # noqa: E731
    got = laplacian(f, x.to(device))
    assert got.device.type == device
    torch.testing.assert_close(got.cpu(), trace(f, x), rtol=1e-9, atol=1e-9)


def test_laplacian_of_several_numbers_is_taken_of_each() -> None:
    x = points(3)
    f = lambda x: torch.stack([x.square().sum(), x.prod(), x.sum(), x[0].exp()])  # noqa: E731
    expected = torch.stack([torch.tensor(6.0).double(), 0 * x[0], 0 * x[0], x[0].exp()])
    torch.testing.assert_close(laplacian(f, x), expected)
    torch.testing.assert_close(laplacian(lambda x: x**3, x), 6 * x)
    assert torch.equal(laplacian(lambda x: torch.ones(2, 2), x), torch.zeros(2, 2))


@pytest.mark.parametrize("name", ["tanh", "layer_norm", "softmax", "attention"])
def test_laplacian_over_a_batch(name: str) -> None:
    f, composite, x = NETS[name]
    xs = torch.stack([x, x.flip(0), x * 0.5])
    got = vmap(lambda x: laplacian(f, x))(xs)
    expected = torch.stack([trace(composite, row) for row in xs])
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-10)


def test_reverse_over_the_laplacian() -> None:
    """As a physics-informed network is trained: the residual's gradient in parameters and in x."""
    model, xs = net(), points(3, 4, seed=40)

    def residual(second: Callable[..., Tensor], p: Named, xs: Tensor, many: bool = False) -> Tensor:
        def u(x: Tensor) -> Tensor:
            return functional_call(model, dict(p), (x,)).square().sum()

        rows = vmap(lambda x: second(u, x))(xs) if many else [second(u, x) for x in xs]
        return sum(row.square() for row in rows)

    results = []
    for second, many in ((laplacian, True), (laplacian, False), (trace, False)):
        leaves = {k: t.clone().requires_grad_() for k, t in trainable(model).items()}
        leaves["xs"] = xs.clone().requires_grad_()
        p = {k: t for k, t in leaves.items() if k != "xs"}
        y = residual(second, p, leaves["xs"], many)
        slopes = torch.autograd.grad(y, list(leaves.values()))
        results.append(dict(zip(leaves, slopes, strict=True)))
    assert_same(results[0], results[2], rtol=1e-10)
    assert_same(results[1], results[2], rtol=1e-10)
    transformed = grad(lambda p: residual(laplacian, p, xs))(trainable(model))
    assert_same(transformed, {k: results[2][k] for k in transformed}, rtol=1e-10)


def test_laplacian_leaves_its_input() -> None:
    x = points(3).requires_grad_()
    with torch.no_grad():
        got = laplacian(bumpy, x)
    torch.testing.assert_close(got, trace(bumpy, x.detach()))
    assert not got.requires_grad
    assert laplacian(bumpy, x).requires_grad


@pytest.mark.parametrize("d", [3, 8])
def test_laplacian_costs_d_and_two_forwards_of_constant_weights(d: int) -> None:
    """The value, d first derivatives and the sum of the second ones, one row of a matmul each."""
    model = nn.Sequential(nn.Linear(d, 7), nn.Tanh(), nn.Linear(7, 5), nn.GELU(), nn.Linear(5, 1))
    model.requires_grad_(False)
    x = points(d, dtype=torch.float32)
    in_place = {torch.ops.aten.addmm_: addmm_flop}  # which it would leave out
    with FlopCounterMode(display=False) as forward:
        model(x[None])
    with FlopCounterMode(display=False, custom_mapping=in_place) as pass_:
        laplacian(lambda x: model(x)[0], x)
    assert forward.get_total_flops() == 2 * (7 * d + 35 + 5)
    assert pass_.get_total_flops() == (d + 2) * forward.get_total_flops()


def test_laplacian_refuses_what_it_cannot_follow() -> None:
    x = points(3)
    with pytest.raises(NotImplementedError, match="igamma has no rule"):
        laplacian(lambda x: torch.igamma(x.exp(), x.exp() + 1).sum(), x)
    with pytest.raises(NotImplementedError, match="in place"):
        laplacian(lambda x: torch.exp(x, out=torch.empty_like(x)).sum(), x)
    with pytest.raises(TypeError, match="expected x to be a floating-point"):
        laplacian(lambda x: x.sum(), torch.arange(3))
    with pytest.raises(TypeError, match="laplacian: expected x to be a tensor, got a dict"):
        laplacian(lambda p: p["x"].sum(), {"x": x})
    with pytest.raises(TypeError, match="got list"):
        laplacian(lambda x: x, [1.0])
    with pytest.raises(TypeError, match="laplacian: expected f to return one tensor, got tuple"):
        laplacian(lambda x: (x, x), x)
    with pytest.raises(TypeError, match="got float"):
        laplacian(lambda x: 0.0, x)


# ------------------------------------------------------------------------------ estimates

N = 5


def symmetric(n: int, seed: int) -> Tensor:
    m = points(n, n, seed=seed)
    return m + m.T


SYMMETRIC = symmetric(N, seed=50)


def quadratic(x: Tensor) -> Tensor:
    return 0.5 * x @ SYMMETRIC.to(x) @ x


def quartic(p: Named) -> Tensor:
    return quadratic(torch.cat([p["a"], p["b"].flatten()])) + p["b"].pow(4).sum()


SPLIT = {"a": points(3, seed=51), "b": points(2, 1, seed=52)}


def split_hessian() -> Tensor:
    return SYMMETRIC + torch.diag(torch.cat([torch.zeros(3), 12 * SPLIT["b"].flatten() ** 2]))


OFF = SYMMETRIC - torch.diag(SYMMETRIC.diagonal())
# What one sample of random signs deviates by: the variance of v' H v, and of v * (H v).
TRACE_DEVIATION = (2 * OFF.square().sum()).sqrt()
DIAGONAL_DEVIATION = OFF.square().sum(1).sqrt()


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ESTIMATORS = {
    "trace": (hessian_trace, SYMMETRIC.trace(), TRACE_DEVIATION),
    "diagonal": (hessian_diagonal, SYMMETRIC.diagonal(), DIAGONAL_DEVIATION),
}


@pytest.mark.parametrize("name", ESTIMATORS)
def test_estimates_converge_with_the_error_that_theory_has(name: str) -> None:
    estimate, exact, deviation = ESTIMATORS[name]
    x, samples = points(N), 4096
    value, error = estimate(quadratic, x, samples, generator=generator(0))
    torch.testing.assert_close(error, deviation / samples**0.5, rtol=0.1, atol=0)
    assert ((value - exact).abs() <= 4 * error).all()


@pytest.mark.parametrize("name", ESTIMATORS)
def test_the_stated_error_is_calibrated(name: str) -> None:
    """Over 200 draws: the truth is within four errors, which are as large as the spread."""
    estimate, exact, _ = ESTIMATORS[name]
    x = points(N)
    draws = [estimate(quadratic, x, 16, generator=generator(seed)) for seed in range(200)]
    values = torch.stack([value for value, _ in draws])
    errors = torch.stack([error for _, error in draws])
    within = ((values - exact).abs() <= 4 * errors).double().mean(0)
    assert (within >= 0.98).all()
    ratio = errors.square().mean(0).sqrt() / values.std(0)
    assert ((ratio > 0.85) & (ratio < 1.18)).all()
    bias = (values.mean(0) - exact).abs() / (values.std(0) / 200**0.5)
    assert (bias < 4).all()


@pytest.mark.parametrize("samples", [2, 3, 8])
def test_the_stated_error_is_the_unbiased_one(samples: int) -> None:
    """Each sample is 2 or -2 here, so that their mean tells their variance."""
    x = points(2)
    for seed in range(5):
        value, error = hessian_trace(lambda x: x.prod(), x, samples, generator=generator(seed))
        torch.testing.assert_close(error**2, (4 - value**2) / (samples - 1))
        value, error = hessian_diagonal(lambda x: x.prod(), x, samples, generator=generator(seed))
        torch.testing.assert_close(error**2, (1 - value**2) / (samples - 1))


def test_estimates_of_a_diagonal_hessian_are_exact() -> None:
    x = points(4)
    for samples in (2, 5):
        value, error = hessian_diagonal(lambda x: x.pow(4).sum(), x, samples)
        torch.testing.assert_close(value, 12 * x**2, rtol=1e-14, atol=0)
        assert error.max() <= 1e-14
        value, error = hessian_trace(lambda x: x.pow(4).sum(), x, samples)
        torch.testing.assert_close(value, (12 * x**2).sum(), rtol=1e-14, atol=0)
        assert value.shape == error.shape == ()
        assert error <= 1e-14 * value


def test_estimates_of_a_dict() -> None:
    exact = split_hessian()
    value, error = hessian_diagonal(quartic, SPLIT, 2000, generator=generator(1))
    for part in (value, error):
        assert [(k, t.shape) for k, t in part.items()] == [("a", (3,)), ("b", (2, 1))]
    flat_value = torch.cat([value["a"], value["b"].flatten()])
    flat_error = torch.cat([error["a"], error["b"].flatten()])
    assert ((flat_value - exact.diagonal()).abs() <= 4 * flat_error).all()
    torch.testing.assert_close(flat_error, DIAGONAL_DEVIATION / 2000**0.5, rtol=0.1, atol=0)
    value, error = hessian_trace(quartic, SPLIT, 2000, generator=generator(1))
    assert (value - exact.trace()).abs() <= 4 * error
    torch.testing.assert_close(error, TRACE_DEVIATION / 2000**0.5, rtol=0.1, atol=0)


@pytest.mark.parametrize("estimate", [hessian_trace, hessian_diagonal])
def test_a_generator_makes_an_estimate_reproducible(estimate: Callable[..., Estimate]) -> None:
    x, before = points(N), torch.get_rng_state()
    one = estimate(quadratic, x, 8, generator=generator(3))
    same = estimate(quadratic, x, 8, generator=generator(3))
    other = estimate(quadratic, x, 8, generator=generator(4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.value, same.value)
    assert torch.equal(one.standard_error, same.standard_error)
    assert not torch.equal(one.value, other.value)
    with torch.random.fork_rng():
        torch.manual_seed(5)
        first = estimate(quadratic, x, 8)
        second = estimate(quadratic, x, 8)
        torch.manual_seed(5)
        assert torch.equal(estimate(quadratic, x, 8).value, first.value)
    assert not torch.equal(first.value, second.value)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_estimates_in_low_precision_are_summed_in_float32(dtype: torch.dtype, device: str) -> None:
    x = torch.full((4,), 0.5, dtype=dtype, device=device)
    value, error = hessian_diagonal(lambda x: x.pow(3).sum(), x, 3)
    assert value.dtype == error.dtype == torch.float32
    assert value.device == x.device
    assert value.tolist() == [3.0] * 4
    value, _ = hessian_trace(lambda x: x.pow(3).sum(), x, 3)
    assert (value.dtype, value.item()) == (torch.float32, 12.0)


@pytest.mark.parametrize("estimate", [hessian_trace, hessian_diagonal])
def test_estimators_refuse(estimate: Callable[..., Estimate]) -> None:
    x, name = points(N), estimate.__name__
    for samples in (1, 0, -3, 4.0):
        with pytest.raises(ValueError, match=f"{name}: expected 2 samples or more.*got {samples}"):
            estimate(quadratic, x, samples)
    with pytest.raises(TypeError, match=f"{name}: expected x to be a real"):
        estimate(lambda x: x.abs().sum(), x.to(torch.complex128), 4)
    with pytest.raises(TypeError, match="floating-point"):
        estimate(lambda x: x.sum(), torch.arange(3), 4)
    with pytest.raises(ValueError, match="scalar"):
        estimate(torch.sin, x, 4)


def test_an_estimate_prints_with_its_error() -> None:
    assert repr(Estimate(torch.tensor(12.3456), torch.tensor(0.4567))) == "12.35 ± 0.46"
    several = Estimate(torch.ones(2), torch.zeros(2))
    assert repr(several) == ("Estimate(value=tensor([1., 1.]), standard_error=tensor([0., 0.]))")
    value, error = several
    assert value is several.value
    assert error is several.standard_error


# ------------------------------------------------------------------------------ spectra


def by_magnitude(matrix: Tensor) -> Tensor:
    found = torch.linalg.eigvalsh(matrix)
    return found[found.abs().argsort(descending=True)]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])
def test_top_eigenvalues_for_every_k(n: int) -> None:
    matrix = symmetric(n, seed=60 + n)
    exact = torch.from_numpy(np.linalg.eigvalsh(matrix.numpy()))
    exact = exact[exact.abs().argsort(descending=True)]
    for k in range(1, n + 1):
        got = top_eigenvalues(lambda x: 0.5 * x @ matrix @ x, points(n), k)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, exact[:k], rtol=1e-9, atol=1e-9)
        again = top_eigenvalues(lambda x: 0.5 * x @ matrix @ x, points(n), k)
        assert torch.equal(got, again)


def test_lanczos_is_as_precise_as_the_point() -> None:
    """In dimensions enough for it to restart, where a loose tolerance would show."""
    x = torch.linspace(-1.0, 0.98, 100, dtype=torch.float64)
    got = top_eigenvalues(lambda x: (x**3).sum(), x, 3)
    exact = torch.tensor([-6.0, -5.88, 5.88], dtype=torch.float64)
    torch.testing.assert_close(got.sort().values, exact.sort().values, rtol=1e-10, atol=0)
    narrow = top_eigenvalues(lambda x: (x**3).sum(), x.float(), 3)
    torch.testing.assert_close(narrow.sort().values, exact.sort().values, rtol=1e-5, atol=0)


def test_top_eigenvalues_keep_their_signs_and_come_by_magnitude() -> None:
    x = torch.tensor([1.0, -7.0, 2.0, 5.0, -4.0, 0.0, 3.0]).double()
    got = top_eigenvalues(lambda x: (x**3).sum(), x, 4)
    torch.testing.assert_close(got, torch.tensor([-42.0, 30.0, -24.0, 18.0]).double())


def test_top_eigenvalues_of_a_dict_and_of_a_model() -> None:
    exact = by_magnitude(split_hessian())
    for k in (1, 2, 5):
        torch.testing.assert_close(top_eigenvalues(quartic, SPLIT, k), exact[:k])
    model, (x, t) = net(), batch()
    start = trainable(model)
    names, sizes = list(start), [p.numel() for p in start.values()]

    def flattened(flat: Tensor) -> Tensor:
        parts = zip(names, flat.split(sizes), strict=True)
        return loss_of(model, mse, x, t)({k: part.reshape(start[k].shape) for k, part in parts})

    whole = torch.cat([p.flatten() for p in start.values()])
    exact = by_magnitude(hessian(flattened)(whole))
    got = top_eigenvalues(loss_of(model, mse, x, t), start, 5)
    torch.testing.assert_close(got, exact[:5], rtol=1e-8, atol=1e-10)
    # a single-precision model to what single precision gives
    narrow = {k: p.float() for k, p in start.items()}
    got = top_eigenvalues(loss_of(net(torch.float32), mse, x.float(), t.float()), narrow, 3)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, exact[:3], rtol=1e-4, atol=0)


@pytest.mark.parametrize("device", DEVICES)
def test_top_eigenvalues_on_a_device(device: str) -> None:
    x = points(6).to(device)
    got = top_eigenvalues(lambda x: (x**3).sum(), x, 2)
    assert got.device.type == "cpu"
    torch.testing.assert_close(got, by_magnitude(torch.diag(6 * x.cpu()))[:2])


@pytest.mark.parametrize("n", [1, 3, 8])
def test_a_zero_hessian_has_zero_eigenvalues(n: int) -> None:
    for f in (lambda x: x.sum(), lambda x: torch.ones(()), lambda x: (0 * x**2).sum()):
        for k in range(1, n + 1):
            assert top_eigenvalues(f, points(n), k).tolist() == [0.0] * k


def test_repeated_eigenvalues_are_all_found() -> None:
    for k in (1, 3, 6):
        got = top_eigenvalues(lambda x: x @ x, points(8), k)
        torch.testing.assert_close(got, torch.full((k,), 2.0).double())


def test_top_eigenvalues_refuses() -> None:
    for k in (0, -1, N + 1, 2.0):
        with pytest.raises(ValueError, match=f"expected k between 1 and {N}, got {k}"):
            top_eigenvalues(quadratic, points(N), k)
    with pytest.raises(TypeError, match="top_eigenvalues: expected x to be a real"):
        top_eigenvalues(quadratic, points(N).to(torch.complex128), 1)
    with pytest.raises(TypeError, match="floating-point"):
        top_eigenvalues(quadratic, torch.arange(N), 1)
    with pytest.raises(ValueError, match="scalar"):
        top_eigenvalues(torch.sin, points(N), 1)


def test_without_scipy_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.sparse.linalg", None)
    with pytest.raises(ImportError, match=r"pip install scipy$"):
        top_eigenvalues(quadratic, points(N), 1)


def test_lanczos_that_does_not_converge_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        scipy.sparse.linalg,
        "eigsh",
        functools.partial(scipy.sparse.linalg.eigsh, maxiter=1, ncv=4),
    )
    x = torch.linspace(1, 1.01, 60).double()
    with pytest.raises(RuntimeError, match=r"Lanczos did not find 3 eigenvalues \(.*0/3") as caught:
        top_eigenvalues(lambda x: (x**3).sum(), x, 3)
    assert isinstance(caught.value.__cause__, scipy.sparse.linalg.ArpackNoConvergence)


@pytest.mark.parametrize("n", [2, 8])
def test_a_hessian_that_is_not_finite_has_no_spectrum(n: int) -> None:
    with pytest.raises(ValueError, match="top_eigenvalues: expected a finite Hessian"):
        top_eigenvalues(lambda x: x.sqrt().sum(), torch.zeros(n), 1)


# ------------------------------------------------------------------------------ verification


class NaiveSine(Function):
    """A Function whose jvp computes with what its forward put aside, as many do."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, v: Tensor) -> Tensor:
        return v * ctx.saved_tensors[0].cos()


SQUARE = torch.eye(3) * 2 + torch.tensor([[0.1, 0.5, 0.2], [0.0, 0.3, 0.4], [0.6, 0.1, 0.2]])
TURN = torch.tensor([[0.4, 0.3, 0.1], [0.2, 0.5, 0.3], [0.3, 0.1, 0.6]])
ROW, ROW_V = torch.tensor([0.1, 0.5, -0.3, 1.0]), torch.tensor([1.0, 0.2, 0.4, -0.5])

# name -> (f, x, v, the first wrong order of each way, which ways raise)
SILENT: dict[str, tuple[Any, Tensor, Tensor, dict[str, int | None], set[str]]] = {
    "layer_norm": (
        lambda x: F.layer_norm(x, (4,)),
        ROW,
        ROW_V,
        {"jet": None, "reverse": 3, "forward": 2},
        set(),
    ),
    "solve": (
        lambda a: torch.linalg.solve(a, torch.ones(3, dtype=a.dtype)),
        SQUARE,
        TURN,
        {"jet": None, "reverse": None, "forward": 2},
        set(),
    ),
    "det": (
        torch.linalg.det,
        SQUARE,
        TURN,
        {"jet": None, "reverse": None, "forward": 2},
        set(),
    ),
    "logdet": (
        torch.logdet,
        SQUARE,
        TURN,
        {"jet": None, "reverse": None, "forward": 2},
        set(),
    ),
    "naive_function": (
        NaiveSine.apply,
        ROW,
        ROW_V,
        {"jet": None, "reverse": None, "forward": 2},
        {"jet"},
    ),
}


@pytest.mark.parametrize("name", SILENT)
def test_each_silently_wrong_case_of_torch_2_13_is_caught(name: str) -> None:
    """Once PyTorch mends one, this fails, and the chapter that shows it is to be changed."""
    f, x, v, first_wrong, raising = SILENT[name]
    report = verify_derivatives(f, x, v, 4)
    assert isinstance(report, DerivativeReport)
    assert report.first_wrong == {**first_wrong, **dict.fromkeys(raising, 0)}
    assert set(report.errors) == raising
    assert not report.ok
    assert all(
        "has no rule" in report.errors[way] or "@jet_rule" in report.errors[way] for way in raising
    )
    title = repr(report).splitlines()[0]
    for way, order in first_wrong.items():
        assert (f"{way} from order {order} on" in title) == (order is not None)
    assert title.startswith("wrong: ")


def test_a_smooth_network_is_right_every_way() -> None:
    model, (x, t) = net(), batch()
    start = trainable(model)
    v = direction_for(start)
    report = verify_derivatives(loss_of(model, mse, x, t), start, dict(reversed(v.items())), 4)
    assert report.ok
    assert report.first_wrong == {"jet": None, "reverse": None, "forward": None}
    assert report.errors == {}
    want = nested(loss_of(model, mse, x, t), start, v, 4)
    for k, value in enumerate(want.values):
        for found in report.values.values():
            torch.testing.assert_close(found[k], value.item(), rtol=1e-9, atol=1e-12)
        assert abs(report.fit[k] - value.item()) <= 10 * report.uncertainty[k] + 1e-13
    assert [len(found) for found in report.values.values()] == [5, 5, 5]


def exponential(x: float, k: int) -> float:
    return math.exp(x)


def geometric(x: float, k: int) -> float:
    return math.factorial(k) / (2 - x) ** (k + 1)


def sine(x: float, k: int) -> float:
    return math.sin(x + k * math.pi / 2)


@pytest.mark.parametrize(
    ("f", "derivative"),
    [(torch.exp, exponential), (lambda x: 1 / (2 - x), geometric), (torch.sin, sine)],
    ids=["exp", "geometric", "sin"],
)
def test_the_fit_states_an_error_that_is_honest_and_useful(
    f: Callable[[Tensor], Tensor], derivative: Callable[[float, int], float]
) -> None:
    for x in np.linspace(-1.5, 1.2, 10):
        for s in (0.3, 1.0, -2.0):
            point, v = torch.tensor([x, s], dtype=torch.float64).unbind()
            report = verify_derivatives(f, point, v, 8, ways={"jet": jet})
            for k in range(9):
                true = derivative(x, k) * s**k
                error, stated = abs(report.fit[k] - true), report.uncertainty[k]
                scale = max(abs(true), abs(derivative(x, k + 1) * s ** (k + 1)))
                assert error <= 10 * stated + 1e-12 * scale
                # Small enough to see a wrong derivative by.
                assert 10 * stated <= (1e-6 if k < 5 else 1e-2) * scale
            assert report.ok


def test_where_the_fit_is_too_vague_the_table_says_so() -> None:
    """And neither accuses nor acquits: at this order rounding has taken the digits of the fit."""
    x, v = torch.tensor(0.3), torch.tensor(1.0)
    report = verify_derivatives(torch.sin, x, v, 14, ways={"jet": jet})
    assert report.ok
    rows = [line.split() for line in repr(report).splitlines()[2:]]
    assert [row[-1] == "?" for row in rows[:10]] == [False] * 10
    assert rows[14][-1] == "?"
    assert abs(report.values["jet"][14] - sine(0.3, 14)) < 1e-6
    # A derivative of zero is no vagueness, whatever is left of it in the fit.
    zeros = verify_derivatives(lambda x: x**2, x, v, 6, ways={"jet": jet})
    assert zeros.values["jet"][3:] == [0.0] * 4
    assert "?" not in repr(zeros)


def test_f_of_several_numbers_is_checked_in_every_one() -> None:
    def half_wrong(x: Tensor) -> Tensor:
        return torch.cat([x.sin(), NaiveSine.apply(x[:1])])

    report = verify_derivatives(half_wrong, ROW, ROW_V, 3)
    assert report.first_wrong["forward"] == 2
    assert report.first_wrong["reverse"] is None
    right = verify_derivatives(lambda x: torch.outer(x.sin(), x.exp()), ROW, ROW_V, 3)
    assert right.ok
    again = verify_derivatives(lambda x: torch.outer(x.sin(), x.exp()), ROW, ROW_V, 3)
    assert right.fit == again.fit  # the combination is the same one each time


def test_float32_is_converted_and_left_alone() -> None:
    x, v = ROW.clone().requires_grad_(), ROW_V.clone()
    seen: set[torch.dtype] = set()

    def f(x: Tensor) -> Tensor:
        seen.add(x.dtype)
        return x.exp().prod()

    report = verify_derivatives(f, x, v, 5)
    assert report.ok
    assert seen == {torch.float64}
    exact = (v.double().sum() ** 5 * x.detach().double().sum().exp()).item()
    assert abs(report.values["jet"][5] / exact - 1) < 1e-12
    assert x.dtype == torch.float32
    assert x.grad is None


def test_a_domain_that_ends_nearby_narrows_the_fit() -> None:
    one = torch.tensor(1.0)
    for near in (0.5, 0.1):
        report = verify_derivatives(torch.log, torch.tensor(near), one, 4)
        assert report.ok
        assert abs(report.fit[4] / (-6 / torch.tensor(near).double().item() ** 4) - 1) < 1e-2
    with pytest.raises(ValueError, match=r"finite along v, got none of the widths .*scale v down"):
        verify_derivatives(torch.log, torch.tensor(0.01), one, 4)
    assert verify_derivatives(torch.log, torch.tensor(0.01), 0.02 * one, 4).ok
    with pytest.raises(ValueError, match="finite along v"):
        verify_derivatives(lambda x: x * math.nan, one, one, 2)


def test_ways_of_ones_own() -> None:
    def right(f: Any, x: Tensor, v: Tensor, order: int) -> list[Tensor]:
        assert (x.dtype, v.dtype, order) == (torch.float64, torch.float64, 3)
        return [x.exp() * v**k for k in range(order + 1)]

    def wrong(f: Any, x: Tensor, v: Tensor, order: int) -> list[Tensor]:
        first, *rest = right(f, x, v, order)
        return [first, *(1.001 * t for t in rest)]

    def lost(f: Any, x: Tensor, v: Tensor, order: int) -> Iterator[Tensor]:
        yield f(x)
        yield x * math.nan

    def raising(f: Any, x: Tensor, v: Tensor, order: int) -> Iterator[Tensor]:
        yield f(x)
        raise RuntimeError("no further\nthan this")

    def speechless(f: Any, x: Tensor, v: Tensor, order: int) -> Iterator[Tensor]:
        raise NotImplementedError

    ways = {"right": right, "wrong": wrong, "lost": lost, "raising": raising}
    x, v = torch.tensor(0.3), torch.tensor(0.5)
    report = verify_derivatives(torch.exp, x, v, 3, ways=ways)
    assert report.first_wrong == {"right": None, "wrong": 1, "lost": 1, "raising": 1}
    assert report.errors == {"raising": "RuntimeError: no further"}
    assert len(report.values["raising"]) == 1
    assert not report.ok
    loose = verify_derivatives(torch.exp, x, v, 3, ways={"wrong": wrong}, rtol=1e-2)
    assert loose.ok
    assert verify_derivatives(torch.exp, x, v, 3, ways={"right": right}).ok
    report = verify_derivatives(torch.exp, x, v, 3, ways={"speechless": speechless})
    assert report.errors["speechless"].startswith("NotImplementedError")
    assert not report.ok


def test_a_report_prints_as_a_table() -> None:
    def wrong(f: Any, x: Tensor, v: Tensor, order: int) -> list[Tensor]:
        return [x**2, 2 * x, 3 * x]

    def raising(f: Any, x: Tensor, v: Tensor, order: int) -> list[Tensor]:
        raise RuntimeError("not today")

    x, v = torch.tensor(3.0), torch.tensor(1.0)
    report = verify_derivatives(
        lambda x: x**2, x, v, 2, ways={"jet": jet, "mine": wrong, "other": raising}
    )
    lines = repr(report).splitlines()
    assert lines[0] == "wrong: mine from order 2 on"
    assert lines[1].split() == ["order", "fit", "jet", "mine", "other"]
    assert [line.split()[0] for line in lines[2:5]] == ["0", "1", "2"]
    assert [line.split()[4:6] for line in lines[2:5]] == [["9", "9"], ["6", "6"], ["2", "9"]]
    assert "9 wrong" in lines[4]
    assert all(line.endswith("raises") for line in lines[2:5])
    assert lines[5] == "other raises RuntimeError: not today"
    html = report._repr_html_()
    assert "<td>9 wrong</td>" in html
    assert "<caption>wrong: mine from order 2 on</caption>" in html
    agreed = verify_derivatives(lambda x: x**2, x, v, 2)
    assert repr(agreed).splitlines()[0] == "all agree with the fit"
    assert "raises" not in repr(agreed)


def test_verify_derivatives_refuses() -> None:
    x = torch.tensor(1.0)
    for order in (0, -1, 2.0):
        with pytest.raises(ValueError, match="verify_derivatives: expected an order of 1 or more"):
            verify_derivatives(torch.exp, x, x, order)
    with pytest.raises(ValueError, match="verify_derivatives: expected v like x"):
        verify_derivatives(torch.exp, x, torch.ones(2), 2)
    with pytest.raises(ValueError, match="verify_derivatives: expected v to have exactly"):
        verify_derivatives(pair, PAIR, {"a": PAIR["a"]}, 2)
    with pytest.raises(TypeError, match="floating-point"):
        verify_derivatives(torch.exp, torch.tensor(1), torch.tensor(1), 2)
    with pytest.raises(TypeError, match="expected f to return one tensor, got tuple"):
        verify_derivatives(lambda x: (x, x), x, x, 2)


# ------------------------------------------------------------------------------ what readers met


class Checkpointed(nn.Module):
    def __init__(self, on: bool) -> None:
        super().__init__()
        self.on = on
        self.block = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 2)).double()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False) if self.on else self.block(x)


def test_a_checkpointed_block_runs_again_with_the_followed_parameters() -> None:
    plain, kept = Checkpointed(False), Checkpointed(True)
    kept.load_state_dict(plain.state_dict())
    x, t = torch.randn(4, 3).double(), torch.randn(4, 2).double()
    towers = [derivative_tower(model, F.mse_loss, x, t, 4) for model in (plain, kept)]
    for one, other in zip(*towers, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], rtol=1e-12, atol=1e-12)


def test_inference_mode_is_refused_and_never_zero() -> None:
    x, f = torch.ones(2), lambda x: (x**3).sum()
    model, batch = nn.Linear(2, 1), torch.ones(3, 2)
    calls: list[Callable[[], Any]] = [
        lambda: hvp(f, x, x),
        lambda: linearize_hvp(f, x),
        lambda: hessian_trace(f, x, 2),
        lambda: hessian_diagonal(f, x, 2),
        lambda: top_eigenvalues(f, x, 1),
        lambda: derivative_tower(model, F.mse_loss, batch, torch.ones(3, 1)),
    ]
    for call in calls:
        with (
            torch.inference_mode(),
            pytest.raises(RuntimeError, match=r"outside of torch\.inference_mode"),
        ):
            call()


def test_the_direction_is_a_copy() -> None:
    model, x, t = nn.Linear(2, 1), torch.ones(3, 2), torch.ones(3, 1)
    direction = {name: torch.ones_like(p) for name, p in model.named_parameters()}
    tower = derivative_tower(model, F.mse_loss, x, t, direction=direction)
    direction["weight"].mul_(0)
    assert tower.direction["weight"].eq(1).all()


def test_autocast_reaches_the_tower() -> None:
    model, x, t = nn.Linear(3, 2), torch.randn(4, 3), torch.randn(4, 2)
    exact = derivative_tower(model, F.mse_loss, x, t, 2).values
    with torch.autocast("cpu", torch.bfloat16):
        rounded = derivative_tower(model, F.mse_loss, x, t, 2).values
    torch.testing.assert_close(rounded, exact, rtol=0.05, atol=0.05)


def test_a_fit_that_resolves_nothing_vouches_for_nothing() -> None:
    x, v = torch.tensor(0.3), torch.tensor(1.0)
    report = verify_derivatives(lambda x: torch.sin(1e4 * x), x, v, 2)
    assert report.first_wrong == {"jet": None, "reverse": None, "forward": None}
    assert not report.ok
    assert repr(report).startswith("undecided; the fit does not resolve f from order 1 on")


def test_a_function_that_rounds_to_float32_is_not_called_wrong() -> None:
    for seed in range(5):
        torch.manual_seed(seed)
        w, x, v = torch.randn(3, 4, 3).double()
        report = verify_derivatives(lambda x: (x.float().double() ** 2 * w).sum().sin(), x, v, 3)  # noqa: B023
        assert report.ok, report


class RoundsInside(nn.Module):
    """Blocks in float64 whose norms and softmax compute in float32, as in many language models."""

    def __init__(self, depth: int = 4, width: int = 12) -> None:
        super().__init__()
        self.mix = nn.ModuleList(nn.Linear(width, width).double() for _ in range(2 * depth))

    def norm(self, x: Tensor) -> Tensor:
        x = x.float()
        return (x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt()).double()

    def forward(self, x: Tensor) -> Tensor:
        for first, second in zip(self.mix[::2], self.mix[1::2], strict=True):
            weights = torch.softmax((first(self.norm(x)) @ self.norm(x).mT).float(), -1)
            x = x + weights.double() @ F.silu(second(self.norm(x)))
        return self.norm(x).square().mean() + x.float().logsumexp(-1).double().mean()


def test_a_deep_model_that_rounds_inside_is_not_called_wrong() -> None:
    for seed in range(6):
        torch.manual_seed(seed)
        model, x = RoundsInside(), torch.randn(2, 5, 12).double()
        parameters = {k: p.detach() for k, p in model.named_parameters()}
        v = {k: 0.3 * torch.randn_like(p) for k, p in parameters.items()}
        report = verify_derivatives(
            lambda p: functional_call(model, p, (x,)),  # noqa: B023
            parameters,
            v,
            3,
            ways={"jet": jet},
        )
        assert report.first_wrong == {"jet": None}, (seed, report)


def test_further_directions_tell_which_of_two_ways_is_wrong() -> None:
    """Along v the third derivative is lost in the rounding; along (1, -1) it is large."""

    def f(x: Tensor) -> Tensor:
        return (20 * (x[0] - x[1]) ** 3 + 0.02 * x[0] ** 3 + 1e4).float().double()

    def right(f: Any, x: Tensor, v: Tensor, order: int) -> list[Tensor]:
        return list(jet(lambda x: 20 * (x[0] - x[1]) ** 3 + 0.02 * x[0] ** 3 + 1e4, x, v, order))

    def wrong(f: Any, x: Tensor, v: Tensor, order: int) -> list[Tensor]:
        found = right(f, x, v, order)
        return [*found[:3], 1.5 * found[3]]

    x, v = torch.tensor([0.3, 0.2]), torch.tensor([1.0, 1.0])
    report = verify_derivatives(f, x, v, 3, ways={"right": right, "wrong": wrong})
    assert report.first_wrong == {"right": None, "wrong": 3}
    assert report.others
    assert "wrong: wrong from order 3 on" in repr(report)
    assert f"decided along {len(report.others)} further directions" in repr(report)
    assert not report.ok
    alone = verify_derivatives(f, x, v, 3, ways={"wrong": wrong})
    assert not alone.others  # nobody to disagree with
    assert alone.first_wrong == {"wrong": None}


def test_complex_values_are_checked_in_both_parts() -> None:
    x = torch.tensor([1 + 1j, 2 - 1j])
    assert verify_derivatives(lambda x: (x**3).sum(), x, torch.ones(2) + 0j, 3).ok


def test_the_laplacian_of_nothing() -> None:
    assert laplacian(lambda x: x.square().sum(), torch.empty(0)) == 0


# ------------------------------------------------------------------------------ other operators


MIX = points(3, 5, seed=9)


def smooth_net(x: Tensor) -> Tensor:
    h = torch.softmax(torch.tanh(x @ MIX) @ MIX.mT, -1)
    return (F.gelu(h * x) @ MIX).exp().sum() / (1 + x.square().sum())


def test_a_weighted_laplacian_is_the_trace_of_a_product() -> None:
    x, weight = points(3), points(2, 3, seed=1)
    matrix = hessian(smooth_net)(x)
    expected = torch.trace(weight.mT @ weight @ matrix)
    torch.testing.assert_close(laplacian(smooth_net, x, weight), expected)
    factors = torch.tensor([0.5, 0.0, 2.0]).double()
    torch.testing.assert_close(
        laplacian(smooth_net, x, factors.sqrt().diag()), factors @ matrix.diagonal()
    )
    assert torch.autograd.gradcheck(
        lambda x, w: laplacian(smooth_net, x, w), (x.requires_grad_(), weight.requires_grad_())
    )


def test_the_generator_of_a_diffusion_in_a_batch() -> None:
    """Of exp(a x) under noise sigma(x) = diag(x): half the sum of (a_i x_i)^2 times it."""
    a, xs = points(3), points(4, 3, seed=1)

    def f(x: Tensor) -> Tensor:
        return (a @ x).exp()

    got = vmap(lambda x: laplacian(f, x, x.diag()) / 2)(xs)
    torch.testing.assert_close(got, ((a * xs) ** 2).sum(1) / 2 * (xs @ a).exp())


def test_weights_of_other_shapes_are_refused() -> None:
    for weight in (torch.eye(2).double(), torch.eye(3), torch.ones(3).double()):
        with pytest.raises(
            ValueError, match=r"laplacian: expected weight of shape \(r, \*\(3,\)\)"
        ):
            laplacian(smooth_net, points(3), weight)


@pytest.mark.parametrize("d", [1, 2, 3, 5])
def test_the_biharmonic_operator_in_closed_form(d: int) -> None:
    a, x = points(d), points(d, seed=1)
    got = biharmonic(lambda x: torch.sin(a @ x), x)
    torch.testing.assert_close(got, (a @ a) ** 2 * torch.sin(a @ x))
    got = biharmonic(lambda x: x.square().sum() ** 2, x)
    torch.testing.assert_close(got, torch.tensor(8.0 * d * (d + 2)).double())
    flat = biharmonic(lambda x: x[:1].exp().sum() * 0 + x.square().sum(), x.reshape(d, 1))
    torch.testing.assert_close(flat, torch.zeros(()).double())


def test_the_biharmonic_operator_against_nested_hessians() -> None:
    def trace(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: hessian(f)(x).diagonal().sum()

    def f(x: Tensor) -> Tensor:
        return (torch.tanh(x @ MIX).square() @ MIX.mT).exp().sum()

    xs = points(2, 3)
    expected = torch.stack([trace(trace(f))(x) for x in xs])
    torch.testing.assert_close(vmap(lambda x: biharmonic(f, x))(xs), expected)
    x = points(2).requires_grad_()
    plate = biharmonic(lambda x: x.square().sum() * x.square().sum().log(), x)  # of a thin plate
    torch.testing.assert_close(plate, torch.zeros(()).double(), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(lambda x: biharmonic(lambda x: (x**3).prod(), x), (x,))
    with pytest.raises(TypeError, match="biharmonic: expected x to be a floating-point"):
        biharmonic(f, torch.ones(3, dtype=torch.int64))
