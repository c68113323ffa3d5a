"""The training system and both callbacks on what people train: the numbers of a loop by hand.

Each model of `ARCHITECTURES` and each net of `NETS` takes three clipped steps in a system, in
Lightning and in the `Trainer` of transformers, with the monitor and the guard and without.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from handwritten import NETS
from loops import configured
from torch import Tensor, nn

from autograd_lib import (
    AutogradTrainingSystem,
    GradientMonitor,
    lightning_callback,
    transformers_callback,
)

pytestmark = [
    # Lightning asks torch for a class of pytree that torch has since renamed.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"),
    # peft asks transformers for a name that is on its way out.
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    # A data loader without workers is enough for three batches.
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
]

HAS_TRANSFORMERS = importlib.util.find_spec("transformers") is not None
MODELS = dict(NETS)
if HAS_TRANSFORMERS:
    from architectures import ARCHITECTURES

    MODELS |= ARCHITECTURES
if HAS_TRANSFORMERS and importlib.util.find_spec("peft") is not None:

    def adapted() -> tuple[nn.Module, dict[str, Any]]:
        """Adapters in a model whose own weights are frozen."""
        peft = importlib.import_module("peft")
        model, batch = ARCHITECTURES["llama"]()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            config = peft.LoraConfig(r=2, target_modules=["q_proj"], lora_dropout=0.1)
            return peft.get_peft_model(model, config).train(), batch

    MODELS["adapted by peft"] = adapted

STEPS, CLIP = 3, 0.1
# Losses of DETR are sums, and one attention of its decoder sees queries that are all zero.
LIMITS: dict[str, Any] = {"explode_above": 1e6, "vanish_below": 1e-20}


class Trained:
    """A model with its batch and optimizer, from one seed."""

    def __init__(self, name: str) -> None:
        self.model, self.batch = MODELS[name]()
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05, momentum=0.9)
        self.started = False
        self.model.register_forward_pre_hook(self._seed)

    def _seed(self, *_: Any) -> None:
        """Frameworks draw random numbers, too, before the first forward."""
        if not self.started:
            torch.manual_seed(1)
        self.started = True

    def parameters(self) -> list[Tensor]:
        return [p.detach() for p in self.model.parameters()]


def clip(parameters: Any) -> float:
    """As PyTorch does, which has no norm of sparse gradients: those as if densified."""
    grads = [p.grad for p in parameters if p.grad is not None]
    if not any(g.is_sparse for g in grads):
        return nn.utils.clip_grad_norm_(parameters, CLIP).item()
    norm = torch.stack([g.to_dense().norm() for g in grads]).norm()
    for g in grads:
        g.mul_((CLIP / (norm + 1e-6)).clamp(max=1.0))
    return norm.item()


def by_hand(name: str, clipped: bool = True) -> tuple[Trained, list[float]]:
    run, norms = Trained(name), []
    for _ in range(STEPS):
        run.optimizer.zero_grad()
        run.model(**run.batch)["loss"].backward()
        grads = [p.grad for p in run.model.parameters() if p.grad is not None]
        norms.append(torch.stack([g.to_dense().norm() for g in grads]).norm().item())
        if clipped:
            clip(list(run.model.parameters()))
        run.optimizer.step()
    return run, norms


def assert_trained(run: Trained, expected: Trained, exact: bool = True) -> None:
    for found, value in zip(run.parameters(), expected.parameters(), strict=True):
        if exact:
            assert torch.equal(found, value)
        else:
            torch.testing.assert_close(found, value)


def assert_watched(monitor: GradientMonitor | None, norms: list[float]) -> None:
    assert monitor is not None
    np.testing.assert_allclose(monitor.history["total_norm"], norms, rtol=1e-4)
    assert {issue.kind for issue in monitor.issues} <= {"missing"}


@pytest.mark.parametrize("name", MODELS)
def test_in_a_training_system(name: str) -> None:
    expected, norms = by_hand(name)
    sparse = name == "recommender"  # PyTorch clips none
    for watched in (True, False):
        run = Trained(name)
        config = configured(
            monitoring={"enabled": watched, **LIMITS},
            training={"clip_norm": CLIP, "max_nonfinite": 3 * watched},
        )
        system = AutogradTrainingSystem(run.model, run.optimizer, config=config)
        system.fit([run.batch], STEPS)
        assert_trained(run, expected, exact=not sparse)
        if watched:
            assert_watched(system.monitor, norms)
        loss = system.evaluate([run.batch, run.batch])["loss"]
        expected.model.eval()
        with torch.no_grad():
            assert loss == pytest.approx(expected.model(**expected.batch)["loss"].item(), rel=1e-5)
        expected.model.train()


@pytest.fixture(scope="module")
def lightning() -> ModuleType:
    return pytest.importorskip("lightning.pytorch")


def in_lightning(lightning: ModuleType, run: Trained, callbacks: list[Any], limit: float) -> None:
    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = run.model

        def training_step(self, batch: Any) -> Tensor:
            return self.net(**batch)["loss"]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return run.optimizer

    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=callbacks,
        gradient_clip_val=limit or None,
        enable_model_summary=False,
        **quiet,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader([run.batch] * STEPS, batch_size=None))


@pytest.mark.parametrize("name", MODELS)
def test_in_lightning(lightning: ModuleType, name: str) -> None:
    limit = 0.0 if name == "recommender" else CLIP  # PyTorch does not clip sparse gradients
    expected, norms = by_hand(name, clipped=bool(limit))
    callback, watched, bare = lightning_callback(**LIMITS), Trained(name), Trained(name)
    in_lightning(lightning, watched, [callback], limit)
    in_lightning(lightning, bare, [], limit)
    assert_trained(watched, bare)
    assert_trained(watched, expected)
    assert_watched(callback.monitor, norms)
    assert callback.reports == []


@pytest.fixture(scope="module")
def transformers() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "HF_HUB_OFFLINE", "1")
        yield pytest.importorskip("transformers")


def in_transformers(
    transformers: ModuleType, run: Trained, callbacks: list[Any], directory: Path
) -> Any:
    quiet = {"report_to": "none", "save_strategy": "no", "logging_strategy": "no"}
    arguments = transformers.TrainingArguments(
        str(directory),
        use_cpu=True,
        per_device_train_batch_size=1,
        num_train_epochs=1,
        max_grad_norm=CLIP,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        **quiet,
    )
    trainer = transformers.Trainer(
        run.model,
        arguments,
        train_dataset=[run.batch] * STEPS,
        data_collator=lambda samples: dict(samples[0]),
        callbacks=callbacks,
        optimizers=(run.optimizer, torch.optim.lr_scheduler.ConstantLR(run.optimizer, 1.0)),
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", MODELS)
def test_in_the_trainer_of_transformers(
    transformers: ModuleType, name: str, tmp_path: Path
) -> None:
    callback, watched, bare = transformers_callback(**LIMITS), Trained(name), Trained(name)
    if name == "recommender":  # it takes the norm in any case
        with pytest.raises(NotImplementedError, match="aten::linalg_vector_norm"):
            in_transformers(transformers, bare, [], tmp_path)
        return
    trainer = in_transformers(transformers, watched, [callback], tmp_path)
    in_transformers(transformers, bare, [], tmp_path)
    assert_trained(watched, bare)
    assert len(callback.monitor.history["step"]) == STEPS
    assert {issue.kind for issue in callback.monitor.issues} <= {"missing"}
    assert callback.reports == []
    if not trainer.model_accepts_loss_kwargs:  # else it divides by the labels before the shift too
        expected, norms = by_hand(name)
        assert_trained(watched, expected)
        assert_watched(callback.monitor, norms)
