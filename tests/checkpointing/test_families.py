"""Plans on families of `transformers`: the peak as predicted, equal gradients, or a refusal."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autograd_lib import peak_bytes, plan_checkpoints

pytest.importorskip("transformers")

from families import FAMILIES, REFUSED

PLENTY = 10**12


@pytest.fixture(scope="module", autouse=True)
def _few_objects() -> Iterator[None]:
    """Collections during `peak_bytes` need not look at what `transformers` holds."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def gradients(model: nn.Module, batch: dict[str, Any]) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model(**batch).loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", FAMILIES)
def test_least_budget(name: str, training: bool) -> None:
    """The least budget and a padded batch; in eval mode also the peak without a plan."""
    model, blocks, batch = FAMILIES[name].make()
    model.train(training)
    expected = gradients(model, batch)
    plan = plan_checkpoints(blocks, lambda: model(**batch).loss, PLENTY)
    least = plan.within(plan.curve[0][0])
    if not training:
        plain = peak_bytes(lambda: gradients(model, batch))
        assert plan.plain_bytes == pytest.approx(plain, rel=0.01)
    least.apply(model)
    assert least.budget < 0.75 * plan.plain_bytes
    assert least.budget == pytest.approx(peak_bytes(lambda: gradients(model, batch)), rel=0.01)
    got = gradients(model, batch)
    assert plan.refused == {}
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[n], gradient) for n, gradient in expected.items())


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_come_before_any_change(name: str) -> None:
    family, message = REFUSED[name]
    model, blocks, batch = family.make()
    before = {n: p.clone() for n, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        plan_checkpoints(blocks, lambda: model(**batch).loss, PLENTY)
    assert all(p.grad is None for p in model.parameters())
    assert not any("forward" in vars(block) for block in blocks)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
