"""The callbacks inside the real Lightning and transformers: what they see, skip, and leave behind.

Both frameworks run the same small training; the oracle is the loop written out by hand.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import GradScaler

from autograd_lib.callbacks import lightning_callback, transformers_callback
from autograd_lib.monitor.history import Record
from autograd_lib.monitor.monitor import GradientMonitor

NAN = float("nan")
FRAMEWORKS = ["lightning", "transformers"]

pytestmark = [
    # Lightning asks torch for a class of pytree that torch has since renamed.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.`:FutureWarning"),
    # A data loader without workers is enough for eight batches.
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    # The second of two trainings goes on in the directory of the first.
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* is not empty:UserWarning"),
]


class Logarithm(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.log()  # here: NaN for what is negative


class Net(nn.Module):
    """A regression with its loss inside; `noisy` with buffers and random numbers."""

    def __init__(self, noisy: bool = True) -> None:
        super().__init__()
        self.logarithm = Logarithm()
        self.hidden = nn.Linear(3, 5)
        self.noise = nn.Sequential(nn.BatchNorm1d(5), nn.Dropout(0.2)) if noisy else nn.Identity()
        self.out = nn.Linear(5, 1)
        self.fresh = True

    def forward(self, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        if self.fresh:  # loaders of data have drawn random numbers until here
            torch.manual_seed(1)
        self.fresh = False
        if (x == 77).any():
            raise ValueError("planted")
        h = self.noise(self.hidden(self.logarithm(x)).tanh())
        if (x == 66).any() and h.isnan().any():
            raise ValueError("a matcher refuses")
        return {"loss": F.mse_loss(self.out(h).squeeze(-1), y)}


Batch = tuple[Tensor, Tensor]


def batches(number: int = 8, bad: Sequence[int] = ()) -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    found = []
    for i in range(number):
        x = torch.rand(4, 3, generator=generator) + 0.5
        x[0, 0] = -1.0 if i in bad else x[0, 0]
        found.append((x, torch.randn(4, generator=generator)))
    return found


def sgd(model: nn.Module) -> torch.optim.SGD:
    """Momentum and weight decay change parameters in a step whose gradient is zero."""
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.1)


def run_by_hand(
    data: Sequence[Batch], accumulate: int, clip: float = 0.0, **model: Any
) -> tuple[Net, np.ndarray]:
    """The loop of both frameworks, and the norms of all gradients before they are clipped."""
    torch.manual_seed(0)
    net = Net(**model)
    optimizer = sgd(net)
    norms = []
    for i, (x, y) in enumerate(data):
        (net(x, y)["loss"] / accumulate).backward()
        if (i + 1) % accumulate == 0:
            norms.append([p.grad.norm().item() for p in net.parameters() if p.grad is not None])
            if clip:
                nn.utils.clip_grad_norm_(net.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
    return net, np.array(norms)


class Run:
    """What a training left behind: `net`, `optimizer`, `trainer`."""

    def __init__(self, **model: Any) -> None:
        torch.manual_seed(0)
        self.net = Net(**model)
        self.optimizer = sgd(self.net)
        self.trainer: Any = None
        self.hooked: Any = self.net  # the module that the framework trains

    def state(self) -> dict[str, Tensor]:
        return self.net.state_dict()


class Broken(list):
    """Data that cannot be read to the end."""

    def __getitem__(self, index: Any) -> Any:
        if index >= 5 * 4:
            raise ValueError("planted")
        return super().__getitem__(index)


@pytest.fixture(scope="module")
def lightning() -> ModuleType:
    return pytest.importorskip("lightning.pytorch")


@pytest.fixture(scope="module")
def transformers() -> Iterator[ModuleType]:
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    before = {name: os.environ.get(name) for name in offline}
    os.environ.update(offline)
    yield pytest.importorskip("transformers")
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value


def train_lightning(
    pl: ModuleType,
    run: Run,
    data: Any,
    callbacks: list[Any],
    directory: Path,
    *,
    accumulate: int = 1,
    epochs: int = 1,
    resume: bool = False,
    log_every: int = 4,
    clip: float = 0.0,
    bf16: bool = False,
    scaler: GradScaler | None = None,
) -> None:
    class Module(pl.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = run.net

        def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
            loss = self.net(*batch)["loss"]
            self.log("loss", loss, batch_size=4)
            return loss

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return run.optimizer

    run.hooked = Module()
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=scaler) if scaler else None
    checkpoints = pl.callbacks.ModelCheckpoint(directory, filename="{epoch}", save_top_k=-1)
    run.trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=epochs,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, checkpoints],
        plugins=plugin,
        precision=None if plugin else "bf16-mixed" if bf16 else "32-true",
        accumulate_grad_batches=accumulate,
        gradient_clip_val=clip or None,
        log_every_n_steps=log_every,
    )
    loader = torch.utils.data.DataLoader(data, batch_size=4)
    path = directory / "epoch=0.ckpt" if resume else None
    run.trainer.fit(run.hooked, loader, ckpt_path=path)


def train_transformers(
    transformers: ModuleType,
    run: Run,
    data: Any,
    callbacks: list[Any],
    directory: Path,
    *,
    accumulate: int = 1,
    epochs: int = 1,
    resume: bool = False,
    log_every: int = 4,
    clip: float = 0.0,
    bf16: bool = False,
    scaler: GradScaler | None = None,
    **more: Any,
) -> None:
    class InOrder(transformers.Trainer):  # type: ignore[misc, name-defined]
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(data)

    def collate(samples: list[Batch]) -> dict[str, Tensor]:
        x, y = zip(*samples, strict=True)
        return {"x": torch.stack(x), "y": torch.stack(y)}

    arguments = transformers.TrainingArguments(
        str(directory),
        report_to="none",
        use_cpu=True,
        bf16=bf16,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        num_train_epochs=epochs,
        save_strategy="epoch",
        logging_steps=log_every,
        max_grad_norm=clip,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        remove_unused_columns=False,
        lr_scheduler_type="constant",
    )
    constant = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 1.0)
    run.trainer = InOrder(
        run.net,
        arguments,
        train_dataset=data,
        callbacks=callbacks,
        optimizers=(run.optimizer, constant),
        **{"data_collator": collate, **more},
    )
    if scaler is not None:
        run.trainer.accelerator.scaler = scaler
    steps = len(data) // (4 * accumulate)
    path = str(directory / f"checkpoint-{steps}") if resume else None
    run.trainer.train(resume_from_checkpoint=path)


def samples(data: Sequence[Batch]) -> list[tuple[Tensor, Tensor]]:
    return [(x[i], y[i]) for x, y in data for i in range(4)]


Train = Callable[..., Run]


@pytest.fixture(params=FRAMEWORKS)
def train(request: pytest.FixtureRequest, tmp_path: Path) -> Train:
    """Train a `Net` in a framework; give what options there are to it and to the model."""
    module = request.getfixturevalue(request.param)
    function = {"lightning": train_lightning, "transformers": train_transformers}[request.param]

    def run(
        data: Sequence[Batch],
        callback: Any = None,
        *,
        into: Run | None = None,
        noisy: bool = True,
        **options: Any,
    ) -> Run:
        into = into or Run(noisy=noisy)
        data = data if isinstance(data, Broken) else samples(data)
        callbacks = [] if callback is None else [callback]
        function(module, into, data, callbacks, tmp_path, **options)
        return into

    run.__name__ = request.param
    return run


def make(train: Train, **options: Any) -> Any:
    """A callback for the framework that `train` runs."""
    made = {"lightning": lightning_callback, "transformers": transformers_callback}
    return made[train.__name__](**options)  # type: ignore[attr-defined]


def assert_equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def assert_no_hooks(run: Run) -> None:
    assert not run.optimizer._optimizer_step_pre_hooks
    assert not run.optimizer._optimizer_step_post_hooks
    for module in run.hooked.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert not any(p._post_accumulate_grad_hooks for p in run.net.parameters())
    assert not {"training_step", "log", "_run_epoch"} & vars(run.trainer).keys()
    assert "log" not in vars(run.hooked)
    assert "training_step" not in vars(getattr(run.trainer, "strategy", run))
    assert "clip_gradients" not in vars(getattr(run.trainer, "precision_plugin", run))
    assert "clip_grad_norm_" not in vars(getattr(run.trainer, "accelerator", run))


# What is seen.


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_monitor_sees_what_a_loop_by_hand_sees(train: Train, accumulate: int) -> None:
    callback = make(train)
    run = train(batches(), callback, accumulate=accumulate)
    by_hand, norms = run_by_hand(batches(), accumulate)
    history = callback.monitor.history
    assert isinstance(callback.monitor, GradientMonitor)
    assert history["step"].tolist() == list(range(1, 8 // accumulate + 1))
    assert [n.removeprefix("net.") for n in history["names"]] == [*dict(by_hand.named_parameters())]
    np.testing.assert_allclose(history["norm"], norms, rtol=1e-5)
    assert_equal(run.state(), by_hand.state_dict())
    assert callback.reports == []


@pytest.mark.parametrize("accumulate", [1, 2])
def test_norms_are_those_before_clipping(train: Train, accumulate: int) -> None:
    callback = make(train, explode_above=2.5)
    run = train(batches(), callback, accumulate=accumulate, clip=2.2)
    by_hand, norms = run_by_hand(batches(), accumulate, clip=2.2)
    total = np.sqrt((norms**2).sum(1))
    assert norms.max() > 2.5 > 2.2 > total.min()  # one explodes, some are clipped, one is not
    history = callback.monitor.history
    np.testing.assert_allclose(history["norm"], norms, rtol=1e-5)
    np.testing.assert_allclose(history["total_norm"], total, rtol=1e-5)
    np.testing.assert_allclose(history["clipped_norm"], total.clip(max=2.2), rtol=1e-4)
    assert {issue.kind for issue in callback.monitor.issues} == {"exploding"}
    assert_equal(run.state(), by_hand.state_dict())
    assert_no_hooks(run)


def test_a_step_that_is_skipped_is_recorded_once_beside_clipping(train: Train) -> None:
    callback = make(train)
    with pytest.warns(UserWarning, match="step 4 is skipped"):
        run = train(batches(bad=[3]), callback, clip=0.3)
    good = batches()
    del good[3]
    by_hand, norms = run_by_hand(good, 1, clip=0.3)
    assert_equal(run.state(), by_hand.state_dict())
    history = callback.monitor.history
    assert history["skipped"].tolist() == [False] * 3 + [True] + [False] * 4
    np.testing.assert_allclose(np.delete(history["norm"], 3, 0), norms, rtol=1e-5)


def test_scaled_gradients_are_recorded_unscaled_before_clipping(train: Train) -> None:
    callback = make(train)
    train(batches(), callback, clip=0.3, scaler=GradScaler("cpu", init_scale=1024.0))
    history, (_, norms) = callback.monitor.history, run_by_hand(batches(1), 1)
    np.testing.assert_allclose(history["norm"][0], norms[0], rtol=0.02)  # in fp16
    assert 0 < history["clipped_norm"].max() <= 0.3001


def test_options_are_those_of_the_monitor(train: Train) -> None:
    callback = make(train, every=2, collect=("nan_count",), update_every=2, guard=False)
    train(batches(), callback)
    history = callback.monitor.history
    assert history["step"].tolist() == [1, 3, 5, 7]
    assert history["nan_count"].shape == history["update_ratio"].shape == (4, 6)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_training_is_bit_equal_with_and_without(train: Train, bf16: bool, accumulate: int) -> None:
    watched = make(train, noise=True, update_every=1, histogram_every=1)
    runs = [
        train(batches(), callback, bf16=bf16, accumulate=accumulate) for callback in (None, watched)
    ]
    assert_equal(runs[0].state(), runs[1].state())
    assert watched.monitor.history["norm"].shape == (8 // accumulate, 6)
    assert watched.reports == []


def test_the_total_norm_is_logged_where_the_loss_is(
    train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = make(train)
    reads = []
    monkeypatch.setattr(callback, "state_dict", lambda: {})  # a checkpoint reads too
    read = Record.read
    monkeypatch.setattr(Record, "read", lambda self: (reads.append(1), read(self)))
    run = train(batches(), callback, log_every=4)
    assert len(reads) == 2  # in eight steps
    _, norms = run_by_hand(batches(), 1)
    expected = np.sqrt((norms**2).sum(1))
    if train.__name__ == "lightning":  # type: ignore[attr-defined]
        logged = run.trainer.logged_metrics["gradients/total_norm"]
        assert logged.item() == pytest.approx(expected[7], rel=1e-5)
    else:
        logs = [log for log in run.trainer.state.log_history if "loss" in log]
        norm = {log["step"]: log["gradients/total_norm"] for log in logs}
        assert norm == pytest.approx({4: expected[3], 8: expected[7]}, rel=1e-5)


# What is left behind.


def test_no_hook_outlives_training(train: Train) -> None:
    callback = make(train, noise=True)
    run = train(batches(), callback)
    assert_no_hooks(run)
    assert callback.monitor.get_gradient_summary()["step"] == 8


@pytest.mark.parametrize("where", ["model", "data"])
def test_no_hook_outlives_an_exception(train: Train, where: str) -> None:
    data = batches()
    data[5][0][:] = 77
    run = Run()
    callback = make(train, noise=True)
    with pytest.raises(ValueError, match="planted"):
        train(Broken(samples(batches())) if where == "data" else data, callback, into=run)
    assert_no_hooks(run)
    assert callback.monitor.get_gradient_summary()["step"] in (4, 5)  # data are fetched ahead


def test_the_history_survives_a_checkpoint(train: Train) -> None:
    whole = make(train)
    uninterrupted = train(batches(), whole, epochs=2, noisy=False)
    resumed = make(train)
    run = train(batches(), resumed, epochs=2, resume=True, noisy=False)
    assert resumed.monitor.history["step"].tolist() == list(range(1, 17))
    np.testing.assert_array_equal(resumed.monitor.history["norm"], whole.monitor.history["norm"])
    assert_equal(run.state(), uninterrupted.state())


# What is skipped.


def test_a_batch_that_is_not_finite_is_named_and_leaves_no_trace(train: Train) -> None:
    callback = make(train)
    with pytest.warns(UserWarning, match="_callback: step 4 is skipped: NaN made in forward by "):
        run = train(batches(bad=[3]), callback)
    (found,) = callback.reports
    assert (found.phase, found.kind, found.op) == ("forward", "nan", "aten.log.default")
    assert found.module in ("logarithm", "net.logarithm")
    assert found.source[1].endswith("# here: NaN for what is negative")
    good = batches()
    del good[3]
    by_hand, norms = run_by_hand(good, 1)
    assert_equal(run.state(), by_hand.state_dict())  # with momentum, weight decay and buffers
    history = callback.monitor.history
    assert history["skipped"].tolist() == [False] * 3 + [True] + [False] * 4
    assert np.isnan(history["total_norm"][3])
    np.testing.assert_allclose(np.delete(history["norm"], 3, 0), norms, rtol=1e-5)
    assert_no_hooks(run)


@pytest.mark.parametrize("nan", [True, False])
def test_an_exception_that_a_nan_causes_has_the_report_as_a_note(train: Train, nan: bool) -> None:
    data = batches(bad=[5] if nan else [])
    data[5][0][1] = 66 if nan else 77
    with pytest.raises(ValueError, match=r"a matcher refuses|planted") as raised:
        train(data, make(train))
    notes = [note for note in getattr(raised.value, "__notes__", []) if "NaN" in note]
    assert [note.partition("\n")[0] for note in notes] == [
        "NaN made in forward by aten.log.default"
    ] * nan


@pytest.mark.parametrize("bad", [2, 3])
def test_a_bad_micro_batch_costs_its_whole_step(train: Train, bad: int) -> None:
    callback = make(train)
    with pytest.warns(UserWarning, match="step 2 is skipped"):
        run = train(batches(bad=[bad]), callback, accumulate=2, noisy=False)
    good = batches()
    del good[2:4]
    assert_equal(run.state(), run_by_hand(good, 2, noisy=False)[0].state_dict())
    assert callback.monitor.history["skipped"].tolist() == [False, True, False, False]
    assert [report.op for report in callback.reports] == ["aten.log.default"]


def test_training_stops_after_so_many_in_a_row(train: Train) -> None:
    callback = make(train, max_nonfinite=2)
    run = Run()
    text = (
        f"{train.__name__}_callback: 2 steps in a row were not finite, as many as max_nonfinite "
        r"allows; the last one:\nNaN made in forward by aten\.log\.default\n"
        r"module +(net\.)?logarithm\n"
    )
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(FloatingPointError, match=text),
    ):
        train(batches(bad=[1, 3, 4, 6]), callback, into=run)
    assert len(callback.reports) == 3
    assert_no_hooks(run)
    good = [batch for i, batch in enumerate(batches()) if i in (0, 2)]
    assert_equal(run.state(), run_by_hand(good, 1)[0].state_dict())


def test_two_bad_micro_batches_are_one_step(train: Train) -> None:
    callback = make(train, max_nonfinite=3)
    with pytest.warns(UserWarning, match="is skipped"):
        train(batches(bad=[2, 3, 4]), callback, accumulate=2)
    assert len(callback.reports) == 3
    assert callback.monitor.history["skipped"].tolist() == [False, True, True, False]


def test_without_guard_nothing_is_skipped(train: Train) -> None:
    callback = make(train, guard=False)
    run = train(batches(bad=[3]), callback)
    assert callback.reports == []
    assert run.net.hidden.weight.isnan().any()


def test_what_overflows_is_the_scaler_s_business_and_a_loss_is_not(train: Train) -> None:
    scaler = GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-60)
    callback = make(train)
    with pytest.warns(UserWarning, match=r"step .* is skipped: NaN made in forward") as warned:
        run = train(batches(bad=[5]), callback, scaler=scaler)
    assert sum("is skipped" in str(warning.message) for warning in warned) == 1
    assert [report.op for report in callback.reports] == ["aten.log.default"]
    skipped = callback.monitor.history["skipped"]
    assert skipped[0]
    assert skipped[5]
    assert not skipped[[3, 4, 6, 7]].any()
    assert all(value.isfinite().all() for value in run.net.parameters())
    assert "step" not in vars(scaler)


# What is peculiar to one of them.


def test_the_second_run_has_the_whole_batch_and_logs_nothing(
    lightning: ModuleType, tmp_path: Path
) -> None:
    class Popping(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(2, 1)

        def training_step(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
            loss = self.out(batch.pop("x")).sqrt().sum()
            self.log("loss", loss.detach(), batch_size=1)
            return {"loss": loss}

        def log(self, *args: Any, **kwargs: Any) -> None:
            logged.append(args[0])
            super().log(*args, **kwargs)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    logged: list[str] = []
    module = Popping()
    nn.init.constant_(module.out.weight, -1.0)
    callback = lightning_callback()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[callback],
    )
    loader = torch.utils.data.DataLoader([{"x": torch.ones(1, 2)}], batch_size=None)
    with pytest.warns(UserWarning, match=r"step 1 is skipped: NaN made in forward by aten\.sqrt"):
        trainer.fit(module, loader)
    assert logged == ["loss"]
    assert [report.op for report in callback.reports] == ["aten.sqrt.default"]


def test_manual_optimization_has_a_monitor_and_a_guard_for_each_optimizer(
    lightning: ModuleType, tmp_path: Path
) -> None:
    class Two(lightning.LightningModule):  # type: ignore[misc, name-defined]
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(2, 1, bias=False), nn.Linear(2, 1, bias=False)

        def training_step(self, batch: Tensor) -> dict[str, float]:
            for layer, optimizer in zip((self.a, self.b), self.optimizers(), strict=True):
                optimizer.zero_grad()
                self.manual_backward(layer(batch if layer is self.b else batch.abs()).sum())
                optimizer.step()
            seen.append(self.b.weight.detach().clone())
            return {"without": 0.0}  # a loss

        def configure_optimizers(self) -> list[torch.optim.Optimizer]:
            return [torch.optim.SGD(layer.parameters(), 0.1) for layer in (self.a, self.b)]

    seen: list[Tensor] = []
    data = [torch.tensor([[3.0, 4.0]]), torch.tensor([[NAN, 4.0]]), torch.tensor([[3.0, -4.0]])]
    callback = lightning_callback()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        callbacks=[callback],
    )
    with pytest.warns(UserWarning, match="NaN in backward"):
        trainer.fit(Two(), torch.utils.data.DataLoader(data, batch_size=None))
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[1], seen[2])
    assert callback.monitor is callback.monitors[0]
    a, b = (monitor.history for monitor in callback.monitors)
    assert a["norm"][[0, 2], 0] == pytest.approx([5.0, 5.0])
    assert b["names"] == ["b.weight"]  # each watches what its optimizer holds
    assert b["norm"][[0, 2], 0] == pytest.approx([5.0, 5.0])
    assert b["skipped"].tolist() == [False, True, False]
    assert "does not allow to run the step again" in callback.reports[-1].detail
    assert {"gradients/total_norm", "gradients/total_norm/1"} <= trainer.logged_metrics.keys()


@pytest.mark.parametrize("manual", [True, False])
def test_what_a_module_clips_itself_is_looked_at_before(
    lightning: ModuleType, manual: bool
) -> None:
    class Clipping(lightning.LightningModule):  # type: ignore[misc, name-defined]
        automatic_optimization = not manual

        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(2, 1, bias=False)

        def training_step(self, batch: Tensor) -> Tensor:
            loss = self.out(batch).sum()
            if manual:
                optimizer = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                self.clip_gradients(optimizer, 1.0, "norm")
                optimizer.step()
            return loss

        def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
            nn.utils.clip_grad_norm_(self.parameters(), 1.0)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.1)

    callback = lightning_callback()
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=[callback],
    )
    data = [torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 0.5]])]
    trainer.fit(Clipping(), torch.utils.data.DataLoader(data, batch_size=None))
    history = callback.monitor.history
    assert history["total_norm"].tolist() == pytest.approx([5.0, 0.5])
    assert history["clipped_norm"].tolist() == pytest.approx([1.0, 0.5], rel=1e-5)


def test_a_nan_of_a_loss_outside_the_model_is_named(
    transformers: ModuleType, tmp_path: Path
) -> None:
    class Regression(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"y": self.out(x).squeeze(-1)}

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return (outputs["y"].square() * 0 + labels).sqrt().mean()

    def collate(rows: list[Batch]) -> dict[str, Tensor]:
        x, y = zip(*rows, strict=True)
        return {"x": torch.stack(x), "labels": torch.stack(y).abs().neg() if len(x) else x}

    run = Run()
    run.net = run.hooked = Regression()
    run.optimizer = sgd(run.net)
    callback = transformers_callback(max_nonfinite=1)
    with (
        pytest.warns(UserWarning, match="step 1 is skipped: NaN made in forward by aten.sqrt"),
        pytest.raises(FloatingPointError, match=r"1 steps in a row.*\n.*aten\.sqrt\.default"),
    ):
        train_transformers(
            transformers,
            run,
            samples(batches(2)),
            [callback],
            tmp_path,
            data_collator=collate,
            compute_loss_func=loss,
        )
    assert callback.reports[0].module == ""
    assert_no_hooks(run)


def test_a_language_model_of_transformers(transformers: ModuleType, tmp_path: Path) -> None:
    config = transformers.GPT2Config(
        vocab_size=16, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0
    )
    tokens = torch.randint(16, (12, 6), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    states = []
    for callbacks in ([callback := transformers_callback()], []):
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
        arguments = transformers.TrainingArguments(
            str(tmp_path),
            report_to=[],
            use_cpu=True,
            per_device_train_batch_size=4,
            num_train_epochs=1,
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            logging_steps=1,
            max_grad_norm=1e-3,
        )
        trainer = transformers.Trainer(model, arguments, train_dataset=rows, callbacks=callbacks)
        trainer.train()
        states.append(model.state_dict())
    assert_equal(*states)
    summary = callback.monitor.get_gradient_summary()
    assert summary["step"] == 3
    assert summary["parameters"].keys() == dict(model.named_parameters()).keys()
    logs = [log["grad_norm"] for log in trainer.state.log_history if "grad_norm" in log]
    np.testing.assert_allclose(callback.monitor.history["total_norm"], logs, rtol=1e-5)
    np.testing.assert_allclose(callback.monitor.history["clipped_norm"], 1e-3, rtol=1e-2)


def test_a_callback_is_of_every_lightning_that_is_imported(
    lightning: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = ModuleType("pytorch_lightning")
    other.Callback = type("Callback", (), {})  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pytorch_lightning", other)
    assert isinstance(lightning_callback(), other.Callback)  # type: ignore[attr-defined]
    assert isinstance(lightning_callback(), lightning.Callback)
    monkeypatch.setitem(sys.modules, "lightning.pytorch", None)
    assert not isinstance(lightning_callback(), lightning.Callback)


# What is refused.


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lightning", "lightning.pytorch", "pytorch_lightning", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"lightning_callback: .* is needed; pip install lightn"):
        lightning_callback()
    with pytest.raises(ImportError, match=r"transformers_callback: .*'transformers\[torch\]'"):
        transformers_callback()


@pytest.mark.usefixtures("lightning", "transformers")
@pytest.mark.parametrize("function", [lightning_callback, transformers_callback])
def test_options_are_checked_at_once(function: Callable[..., Any]) -> None:
    name = function.__name__
    with pytest.raises(TypeError, match=rf"{name}: expected options among .*got \['evry'\]"):
        function(evry=2)
    with pytest.raises(TypeError, match=r"got \['optimizer'\]; model, optimizer and scaler are"):
        function(optimizer=None)
    with pytest.raises(ValueError, match=f"{name}: expected max_nonfinite to be an integer of 1"):
        function(max_nonfinite=0)
    assert function().monitor is None


@pytest.mark.usefixtures("transformers")
def test_a_loop_that_is_no_trainer_is_refused() -> None:
    state = SimpleNamespace(global_step=0)
    with pytest.raises(RuntimeError, match=r"expected to be called by a transformers\.Trainer"):
        transformers_callback().on_train_begin(None, state, None, model=nn.Linear(1, 1))
