"""The guard and `find_nonfinite` on the architectures that people train."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autograd_lib.nonfinite.guard import NonFiniteGuard, find_nonfinite

pytest.importorskip("transformers")
from architectures import ARCHITECTURES
from handwritten import NETS

MODELS = ARCHITECTURES | NETS
NAMES = sorted(MODELS)


def stepping(model: nn.Module, batch: dict[str, Any]) -> Callable[[], Tensor]:
    def step() -> Tensor:
        loss = model(**batch)["loss"]
        loss.backward()
        return loss

    return step


def state(model: nn.Module) -> list[Tensor | None]:
    return [*model.state_dict().values(), *(p.grad for p in model.parameters())]


def copied(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [None if t is None else t.clone() for t in tensors]


def assert_same(a: list[Tensor | None], b: list[Tensor | None]) -> None:
    for x, y in zip(a, b, strict=True):
        assert (x is None) == (y is None)
        assert x is None or torch.equal(x.to_dense().nan_to_num(), y.to_dense().nan_to_num())


@pytest.mark.parametrize("spike_above", [None, 10.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_healthy_step_is_what_it_is_without_a_guard(name: str, spike_above: float | None) -> None:
    model, batch = MODELS[name]()
    torch.manual_seed(1)
    loss = stepping(model, batch)().detach()
    expected = [*copied(state(model)), torch.get_rng_state()]

    model, batch = MODELS[name]()
    guard = NonFiniteGuard(model, spike_above)
    torch.manual_seed(1)
    assert guard(stepping(model, batch)) is None
    assert_same([*state(model), torch.get_rng_state()], expected)
    assert torch.equal(guard.result, loss)

    assert find_nonfinite(model, stepping(model, batch)) is None
    assert_same([*state(model), torch.get_rng_state()], expected)


def breaks(model: nn.Module, batch: dict[str, Any]) -> bool:
    """Whether a NaN reaches the loss; the matcher of DETR raises instead."""
    try:
        with torch.random.fork_rng():
            return not math.isfinite(model(**batch)["loss"].item())
    except ValueError:
        return True


@pytest.mark.parametrize("name", NAMES)
def test_a_nan_in_one_weight_is_named(name: str) -> None:
    model, batch = MODELS[name]()
    model.eval()  # dropout may hide it
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    seen = 0
    for parameter_name, parameter in named[:: max(1, len(named) // 8)]:
        with torch.no_grad():
            element = parameter.view(-1)[-1:]
            good = element.clone()
            element.fill_(math.nan)
        if breaks(model, batch):  # not the vector of a word that the batch lacks
            seen += 1
            before = copied(state(model))
            for look in (lambda s: find_nonfinite(model, s), NonFiniteGuard(model)):
                try:
                    report = repr(look(stepping(model, batch)))
                except ValueError as error:
                    (report,) = error.__notes__
                assert report.startswith(f"NaN in parameter {parameter_name!r}\n")
                assert_same(state(model), before)
        with torch.no_grad():
            element.copy_(good)
    assert seen >= min(5, len(named) - 2)  # the bags of the recommender lack some words
    assert NonFiniteGuard(model)(stepping(model, batch)) is None
