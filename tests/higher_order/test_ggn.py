"""Gauss-Newton and Fisher products against closed forms and explicit Jacobians."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import TiedLanguageModel
from torch import Tensor, nn
from torch.func import functional_call, hessian, jacrev, vmap
from torch.utils.flop_counter import FlopCounterMode

from autograd_lib import fisher_product, ggn_product, hvp

Named = dict[str, Tensor]


def net(*widths: int, **options: Any) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers: list[nn.Module] = []
        for width, wider in itertools.pairwise(widths):
            layers += [nn.Linear(width, wider, **options), nn.Tanh()]
        return nn.Sequential(*layers[:-1]).double()


def points(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).double()


def trainable(model: nn.Module) -> Named:
    return {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}


def direction(model: nn.Module, seed: int = 1) -> Named:
    return {k: points(*p.shape, seed=seed).to(p) for k, p in trainable(model).items()}


def flat(values: Named) -> Tensor:
    return torch.cat([t.flatten() for t in values.values()])


def explicit(
    f: Callable[[Named], Tensor], loss: Callable[[Tensor], Tensor], parameters: Named, v: Named
) -> Tensor:
    """J^T H J v with the whole Jacobian of the outputs and the whole Hessian of the loss."""
    z = f(parameters)
    rows = [j.reshape(z.numel(), -1) for j in jacrev(f)(parameters).values()]
    jacobian = torch.cat(rows, 1)
    inner = hessian(loss)(z).reshape(z.numel(), z.numel())
    return jacobian.T @ (inner @ (jacobian @ flat(v)))


CLASSES = torch.tensor([2, 0, 1, 1])
LOSSES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
    "cross_entropy": (F.cross_entropy, CLASSES),
    "sum": (nn.CrossEntropyLoss(reduction="sum"), CLASSES),
    "weighted": (
        nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 0.5]).double(), label_smoothing=0.1),
        CLASSES,
    ),
    "mse": (nn.MSELoss(), points(4, 3, seed=5)),
    "mse_sum": (nn.MSELoss(reduction="sum"), points(4, 3, seed=5)),
    "bce": (F.binary_cross_entropy_with_logits, points(4, 3, seed=5).sigmoid()),
    "fourth_power": (lambda z, t: ((z - t) ** 4).sum(), points(4, 3, seed=5)),
}


@pytest.mark.parametrize("name", LOSSES)
def test_the_product_of_explicit_matrices(name: str) -> None:
    (loss_fn, target), model, x = LOSSES[name], net(2, 5, 3), points(4, 2)
    v = direction(model)
    got = ggn_product(model, loss_fn, (x, target))(v)
    expected = explicit(
        lambda p: functional_call(model, p, (x,)), lambda z: loss_fn(z, target), trainable(model), v
    )
    assert list(got) == list(v)
    assert all(got[k].shape == v[k].shape and not got[k].requires_grad for k in v)
    torch.testing.assert_close(flat(got), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_linear_regression_in_closed_form(reduction: str) -> None:
    model, x = nn.Linear(3, 2, bias=False).double(), points(5, 3)
    product = ggn_product(model, nn.MSELoss(reduction=reduction), (x, points(5, 2, seed=1)))
    scale = 2 / 10 if reduction == "mean" else 2
    v = points(2, 3, seed=2)
    torch.testing.assert_close(product({"weight": v})["weight"], scale * v @ x.T @ x)


def test_a_linear_model_has_the_hessian() -> None:
    model, x = nn.Linear(3, 3).double(), points(4, 3)
    v = direction(model)
    got = ggn_product(model, F.cross_entropy, (x, CLASSES))(v)
    expected = hvp(
        lambda p: F.cross_entropy(functional_call(model, p, (x,)), CLASSES), trainable(model), v
    )
    torch.testing.assert_close(flat(got), flat(expected))
    deep = net(3, 4, 3)
    v = direction(deep)
    got = ggn_product(deep, F.cross_entropy, (x, CLASSES))(v)
    expected = hvp(
        lambda p: F.cross_entropy(functional_call(deep, p, (x,)), CLASSES), trainable(deep), v
    )
    assert (flat(got) - flat(expected)).norm() > 0.01 * flat(expected).norm()
    assert flat(v) @ flat(got) > 0


class Shared(nn.Module):
    """One layer twice, one parameter frozen, one unused."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.head = nn.Linear(3, 3), nn.Linear(3, 3)
        self.again = self.layer
        self.head.bias.requires_grad_(False)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, x: Tensor, scale: float = 1.0) -> dict[str, Any]:
        x = self.again(torch.tanh(self.layer(x))) * scale
        return {"scores": (self.head(torch.relu(x)), None), "hidden": x.detach()}


def test_shared_frozen_and_unused_parameters_in_nested_outputs() -> None:
    torch.manual_seed(3)
    model, x = Shared().double(), points(4, 3)
    v = direction(model)
    assert sorted(v) == ["head.weight", "layer.bias", "layer.weight", "unused"]
    batch = ({"x": x, "scale": 0.5}, CLASSES)
    got = ggn_product(model, lambda out, t: F.cross_entropy(out["scores"][0], t), batch)(v)
    expected = explicit(
        lambda p: functional_call(model, p, (x, 0.5))["scores"][0],
        lambda z: F.cross_entropy(z, CLASSES),
        trainable(model),
        v,
    )
    torch.testing.assert_close(flat(got), expected, rtol=1e-11, atol=1e-12)
    assert got["unused"].eq(0).all()


def test_tied_embeddings_and_sparse_ones() -> None:
    tokens = torch.tensor([[0, 3, 1], [2, 2, 0]])
    for model in (TiedLanguageModel().double(), Tokens().double()):
        classes = model(tokens).shape[-1]
        target = torch.arange(6) % classes
        v = direction(model)
        got = ggn_product(
            model, lambda z, t: F.cross_entropy(z.reshape(len(t), -1), t), (tokens, target)
        )(v)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                module.sparse = False
        expected = explicit(
            lambda p, model=model: functional_call(model, p, (tokens,)).reshape(6, -1),  # type: ignore[misc]
            lambda z, target=target: F.cross_entropy(z, target),  # type: ignore[misc]
            trainable(model),
            v,
        )
        torch.testing.assert_close(flat(got), expected, rtol=1e-10, atol=1e-11)
        assert not any(t.is_sparse for t in got.values())


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(5, 3, sparse=True), nn.Linear(3, 4)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embedding(tokens)))


def test_the_model_stays_as_it_is() -> None:
    layer = nn.Linear(3, 4)
    model = nn.Sequential(layer, nn.BatchNorm1d(4), nn.ReLU(inplace=True)).double()
    before = {k: t.clone() for k, t in model.state_dict().items()}
    seen: list[Tensor] = []
    layer.weight.register_hook(seen.append)
    layer.weight.grad = torch.ones_like(layer.weight)
    product = ggn_product(model, lambda z, _: z.square().sum(), (points(6, 3), None))
    with torch.no_grad():
        product(direction(model))
    assert model.training
    assert not seen
    assert layer.weight.grad.eq(1).all()
    assert layer.bias.grad is None
    for k, t in model.state_dict().items():
        torch.testing.assert_close(t, before[k], rtol=0, atol=0)


def test_several_vectors_at_a_time() -> None:
    model, x = net(2, 4, 3), points(4, 2)
    product = ggn_product(model, F.cross_entropy, (x, CLASSES))
    vectors = [direction(model, seed) for seed in range(3)]
    stacked = {k: torch.stack([v[k] for v in vectors]) for k in vectors[0]}
    got = vmap(product)(stacked)
    for i, v in enumerate(vectors):
        for k, expected in product(v).items():
            torch.testing.assert_close(got[k][i], expected)


def test_a_product_costs_two_backward_passes() -> None:
    model, x = net(8, 16, 16, 3), points(4, 8)

    def flops(run: Callable[[], Any]) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    product, v = ggn_product(model, F.cross_entropy, (x, CLASSES)), direction(model)
    forward = flops(lambda: model(x))
    assert flops(lambda: product(v)) <= 4 * forward  # a gradient is 3


# ------------------------------------------------------------------ the Fisher matrix

losses = functools.partial(F.cross_entropy, reduction="none")


def test_the_empirical_fisher_is_the_mean_of_outer_products() -> None:
    model, x = net(2, 4, 3), points(4, 2)
    v = direction(model)
    got = fisher_product(model, losses, (x, CLASSES))(v)
    rows = []
    for i in range(4):
        loss = F.cross_entropy(model(x[i : i + 1]), CLASSES[i : i + 1])
        slopes = torch.autograd.grad(loss, list(model.parameters()))
        rows.append(torch.cat([s.flatten() for s in slopes]))
    gradients = torch.stack(rows)
    torch.testing.assert_close(flat(got), gradients.T @ (gradients @ flat(v)) / 4)


def test_the_expectation_over_the_models_own_predictions_is_gauss_newton() -> None:
    model, x = net(2, 4, 3), points(1, 2)
    v, chances = direction(model), torch.softmax(model(x), 1)[0].detach()
    expected = flat(ggn_product(model, F.cross_entropy, (x, CLASSES[:1]))(v))
    by_class = [
        chance * flat(fisher_product(model, losses, (x, torch.tensor([c])))(v))
        for c, chance in enumerate(chances)
    ]
    torch.testing.assert_close(sum(by_class), expected)


# ------------------------------------------------------------------ what is refused


def test_bad_input_is_refused() -> None:
    model, x = net(2, 3), points(4, 2)
    batch = (x, CLASSES)
    with pytest.raises(TypeError, match="ggn_product: expected loss_fn to compute the loss"):
        ggn_product(model, None, batch)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ggn_product: expected f to return a scalar"):
        ggn_product(model, losses, batch)
    with pytest.raises(ValueError, match=r"fisher_product: expected loss_fn .*reduction='none'"):
        fisher_product(model, F.cross_entropy, batch)
    with pytest.raises(ValueError, match="ggn_product: expected a batch to be a mapping"):
        ggn_product(model, F.cross_entropy, x)
    with pytest.raises(ValueError, match="returned an output of the model"):
        ggn_product(WithLoss(), lambda out, _: out["loss"], (x, CLASSES))
    product = ggn_product(model, F.cross_entropy, batch)
    with pytest.raises(ValueError, match="expected v to have exactly the names"):
        product({"0.weight": torch.zeros(3, 2)})
    with pytest.raises(RuntimeError, match="inference_mode"), torch.inference_mode():
        ggn_product(model, F.cross_entropy, batch)
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        ggn_product(model.requires_grad_(False), F.cross_entropy, batch)


class WithLoss(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 3).double()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"loss": self.layer(x).square().mean()}
