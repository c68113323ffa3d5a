"""`autotune` on models of `transformers`, with the batches that their users have."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

from architectures import ARCHITECTURES

from autograd_lib import autotune, verify_gradients
from autograd_lib.config import Settings
from autograd_lib.tuning.workbench import Workbench

NAMES = ["gpt2", "llama", "bert", "t5", "vit", "mixtral"]
INDIVISIBLE = {"mixtral"}  # its loss balances experts over the whole batch


def doubled(batch: dict[str, Any]) -> dict[str, Any]:
    """Four samples: the two, and again in the other order."""
    return {key: torch.cat([value, value.flip(0)]) for key, value in batch.items()}


def exact(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """The gradient of the whole batch, by PyTorch alone in float64."""
    twin = copy.deepcopy(model).double().eval()  # without dropout, as the tuner's gradients are
    wide = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    twin(**wide).loss.backward()
    return torch.cat([p.grad.flatten() for p in twin.parameters() if p.grad is not None])


@pytest.fixture
def quick(monkeypatch):
    """Leave out what takes time: peaks and seconds are told, halves are the fastest."""
    monkeypatch.setattr(Workbench, "peak", lambda bench, settings: 1000)

    def seconds(bench: Workbench, settings: Settings) -> float:
        return 0.5 if settings.micro_batch == 2 and settings.precision == "fp32" else 1.0

    monkeypatch.setattr(Workbench, "seconds", seconds)


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("name", NAMES)
def test_micro_batches_give_the_gradient_of_the_whole_batch(name):
    model, batch = ARCHITECTURES[name]()
    if name == "mixtral":
        model.set_experts_implementation("eager")  # else it does not run in float64
    batch = doubled(batch)
    bench = Workbench(model, batch, None)
    error = bench.measure_reference()
    divides = name not in INDIVISIBLE
    assert (error < 1e-6) is divides
    whole = exact(model, batch)
    found = torch.cat([g.flatten() for g in bench.reference if g.any()])
    reference = whole[whole != 0].norm()
    assert (found.norm() - reference).abs() < 1e-6 * reference
    for size in (1, 2) if divides else ():
        assert bench.error(Settings(micro_batch=size)) < 1e-5
    assert bench.error(Settings()) < 1e-5
    # A loss of all samples alike: micro-batches would be wrong by more than that.
    if divides and name != "vit":  # whose samples have one label each
        assert Workbench(model, batch, None, count=_of_samples).measure_reference() > 1e-5


def _of_samples(batch: dict[str, Any]) -> int:
    return len(batch["labels"])


@pytest.mark.usefixtures("quick", "short_samples")
@pytest.mark.parametrize("name", ["gpt2", "t5", "mixtral"])
def test_settings_fit_the_model_they_were_found_for(name):
    model, batch = ARCHITECTURES[name]()
    batch = doubled(batch)
    report = autotune(model, batch, tolerance=1e-4, compile=False)
    assert all(t.gradient_error < 1e-4 for t in report.trials if t.verdict.startswith("best"))
    if name != "mixtral":
        assert Settings(micro_batch=2) in {trial.settings for trial in report.trials}
    assert any("in float32" in note for note in report.notes) is (name == "mixtral")
    assert report.best.apply(model) is model
    assert model(**batch).loss.isfinite()


@pytest.mark.parametrize("name", [*NAMES, "wav2vec2"])
def test_a_model_agrees_with_itself(name):
    model, batch = ARCHITECTURES[name]()
    report = verify_gradients(model, copy.deepcopy(model), batch)
    assert report.wrong == (), report
    assert not any(found.verdict for found in report.parameters.values())


def test_a_leaf_that_each_forward_makes_is_no_parameter_out_of_reach():
    model, batch = ARCHITECTURES["wav2vec2"]()  # its input requires a gradient, in training
    bench = Workbench(model, doubled(batch), None)
    bench.measure_reference()
    assert bench.error(Settings()) < 1e-4


def test_planned_blocks_are_named_and_planned(monkeypatch):
    model, batch = ARCHITECTURES["gpt2"]()
    batch = doubled(batch)
    before = exact(model, batch)
    told = {True: 1.0, False: 3.0}
    monkeypatch.setattr(Workbench, "seconds", lambda bench, s: told[s.micro_batch is None])
    plain = Workbench(model, batch, None).peak(Settings())
    report = autotune(model, batch, None, int(0.97 * plain), 1e-4, compile=False)
    assert report.trials[0].peak_bytes <= 0.97 * plain
    planned = [t.settings for t in report.trials if t.settings.checkpoint]
    assert planned, report
    assert {name.partition(".h")[0] for settings in planned for name in settings.checkpoint} == {
        "transformer"
    }
    planned[0].apply(model)
    assert torch.equal(exact(model, batch), before)
