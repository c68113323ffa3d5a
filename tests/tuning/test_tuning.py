"""The tuner: what it measures by references of its own, what it chooses by clocks that are told.

No test looks at a wall time: where times decide, they come from a function of the settings.
"""

from __future__ import annotations

import contextlib
import copy
import math
import random
import re
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES, TiedLanguageModel, cnn, encoder, mlp
from torch import Tensor, nn

from autograd_lib import benchmark
from autograd_lib.benchmark import Comparison, Ratio
from autograd_lib.config import Settings
from autograd_lib.core.batches import batch_size
from autograd_lib.functions.losses import CustomLossFunction
from autograd_lib.memory import peak_bytes
from autograd_lib.training.step import ForwardBackward
from autograd_lib.tuning import plans as _plans
from autograd_lib.tuning import race as _race
from autograd_lib.tuning.candidates import Candidates
from autograd_lib.tuning.race import Race
from autograd_lib.tuning.tuner import Trial, TuningReport, autotune
from autograd_lib.tuning.workbench import Copy, Workbench

BF16 = Settings("bf16")
FP32 = Settings()


def flat(model: nn.Module) -> list[Tensor | None]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def mean_of_tokens(output: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(output.flatten(0, 1), targets.flatten())


def problem(name: str, device: str = "cpu") -> tuple[nn.Module, tuple, Callable]:
    torch.manual_seed(0)
    make, inputs, targets, loss_fn = {
        "mlp": (mlp, torch.randn(8, 8), torch.randn(8, 8), nn.MSELoss()),
        "tied": (
            TiedLanguageModel,
            torch.randint(0, 11, (8, 3)),
            torch.randint(0, 11, (8, 3)),
            mean_of_tokens,
        ),
        "encoder": (encoder, torch.randn(8, 5, 16), torch.randn(8, 5, 16), nn.MSELoss()),
        "cnn": (cnn, torch.randn(8, 1, 6, 6), torch.randint(0, 10, (8,)), nn.CrossEntropyLoss()),
    }[name]
    return make().to(device), (inputs.to(device), targets.to(device)), loss_fn


def trial_of(report: TuningReport, settings: Settings) -> Trial:
    return next(trial for trial in report.trials if trial.settings == settings)


def by_size(bench: Workbench, settings: Settings) -> int:
    """Bytes, in proportion to the micro-batch; half of them for lower precision."""
    bench.step(settings)()
    size = settings.micro_batch or bench.size
    return 1000 * size // (1 if settings.precision == "fp32" else 2) // (1 + settings.compile)


@pytest.fixture
def told(monkeypatch):
    """Let a function of `str(settings)` say the seconds of a step; list the races that were run.

    Peaks are told too, as measuring them takes most of the time, unless they are to be `real`.
    """

    def install(
        seconds: Callable[[str], float], noise: float = 1.0, real: bool = False
    ) -> list[list[str]]:
        if not real:
            monkeypatch.setattr(Workbench, "peak", by_size)
        races: list[list[str]] = []

        def compare(thunks, *, rounds, memory):
            assert not memory
            for thunk in thunks.values():
                thunk()
            texts = [name.rpartition(" (")[0] for name in thunks]
            races.append(texts)
            samples = np.array([[seconds(text) for text in texts]] * rounds)
            repeat = noise * samples[:, 0]
            environment = dict.fromkeys(("torch", "python", "device", "cpu", "threads", "date"), 1)
            return Comparison(tuple(thunks), next(iter(thunks)), samples, repeat, {}, environment)

        def look(bench, settings):
            bench.step(settings)()
            return seconds(str(settings))

        monkeypatch.setattr(_race, "compare", compare)
        monkeypatch.setattr(Workbench, "seconds", look)
        return races

    return install


def by_precision(text: str) -> float:
    """Seconds: bf16 is fast, fp16 slow, micro-batches cost a little each."""
    base = {"fp32": 1.0, "bf16": 0.6, "fp16": 1.3}[text[:4]]
    size = re.search(r"micro-batch (\d+)", text)
    recomputed = re.search(r"(\d+) of (\d+) blocks", text)
    again = int(recomputed[1]) / int(recomputed[2]) / 3 if recomputed else 0.0
    return base * (1 + 0.1 * (8 / int(size[1]) if size else 0) + again)


# What is measured


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", ["mlp", "tied", "encoder", "cnn"])
def test_gradient_error_is_that_of_an_independent_float64_gradient(told, name, device):
    told(by_precision)
    model, (x, y), loss_fn = problem(name, device)
    report = autotune(model, (x, y), loss_fn, tolerance=1.0, compile=False)

    def gradient(precision: torch.dtype) -> Tensor:
        wide = precision is torch.float64
        twin = copy.deepcopy(model).to(precision if wide else torch.float32)
        u, v = (t.double() if wide and t.is_floating_point() else t for t in (x, y))
        with torch.autocast(device, torch.bfloat16, enabled=precision is torch.bfloat16):
            loss = loss_fn(twin(u), v)
        loss.backward()
        return torch.cat([p.grad.flatten().double() for p in twin.parameters()])

    exact = gradient(torch.float64)
    for settings, precision in ((FP32, torch.float32), (BF16, torch.bfloat16)):
        expected = float((gradient(precision) - exact).norm() / exact.norm())
        assert trial_of(report, settings).gradient_error == pytest.approx(expected, rel=1e-6)


def test_peak_is_that_of_the_step(told):
    told(by_precision, real=True)
    model, (x, y), loss_fn = problem("encoder")
    report = autotune(model, (x, y), loss_fn, tolerance=1e-5, compile=False)

    def step(size: int) -> None:
        for u, v in zip(x.split(size), y.split(size), strict=True):
            loss = loss_fn(model(u), v)
            (loss * size / 8).backward()
        model.zero_grad()

    for size in (8, 4, 2):
        settings = Settings(micro_batch=None if size == 8 else size)
        expected = peak_bytes(partial(step, size))
        # beside the loss that is summed up, a few bytes of numbers
        assert trial_of(report, settings).peak_bytes == pytest.approx(expected, abs=64)


def test_fp32_as_it_is_is_always_a_trial(told):
    told(by_precision)
    model, batch, loss_fn = problem("mlp")
    for options in ({}, {"memory_budget": 10**9}, {"tolerance": 0.5}):
        report = autotune(model, batch, loss_fn, compile=False, **options)
        assert trial_of(report, FP32).time == 1.0
        assert trial_of(report, FP32).peak_bytes > 0
        assert trial_of(report, FP32).gradient_error < 1e-6


def test_buffers_that_every_forward_moves_start_anew(told):
    """Power iteration: a second step has another gradient, but a training run does not repeat."""
    told(by_precision)
    torch.manual_seed(0)
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Tanh())
    batch = torch.randn(4, 8), torch.randn(4, 8)
    report = autotune(model, batch, nn.MSELoss(), tolerance=0.1, compile=False)
    assert trial_of(report, FP32).gradient_error < 1e-5
    assert report.notes  # of two micro-batches the second one finds other buffers


@pytest.mark.parametrize("module", [nn.Dropout(0.5), nn.AlphaDropout(0.3), nn.Dropout1d(0.4)])
def test_dropout_is_off_for_the_error_and_on_for_the_step(told, monkeypatch, module):
    told(by_precision)
    model = nn.Sequential(nn.Linear(8, 8), module, nn.Linear(8, 8))
    seen = []
    kind = type(module)
    forward = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: seen.append(self.p) or forward(self, x))
    batch = torch.randn(4, 8), torch.randn(4, 8)
    report = autotune(model, batch, nn.MSELoss(), compile=False)
    assert trial_of(report, FP32).gradient_error < 1e-5
    assert set(seen) == {0.0, module.p}
    assert module.p > 0


def test_dropout_of_attention_and_of_recurrent_layers_is_off_for_the_error(told):
    told(by_precision)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True)
            self.recurrent = nn.LSTM(8, 8, 2, dropout=0.5, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.recurrent(self.attention(x, x, x)[0])[0]

    model = Both()
    batch = torch.randn(4, 5, 8), torch.randn(4, 5, 8)
    report = autotune(model, batch, nn.MSELoss(), compile=False)
    assert trial_of(report, FP32).gradient_error < 1e-5
    assert (model.attention.dropout, model.recurrent.dropout) == (0.5, 0.5)


def test_dropout_that_a_layer_calls_itself_is_off_for_the_error(told):
    told(by_precision)

    class Calls(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.dropout_rate = nn.Linear(8, 8), 0.5

        def forward(self, x: Tensor) -> Tensor:
            return F.dropout(self.linear(x), self.dropout_rate, self.training)

    model, batch = Calls(), (torch.randn(4, 8), torch.randn(4, 8))
    report = autotune(model, batch, nn.MSELoss(), compile=False)
    assert trial_of(report, FP32).gradient_error < 1e-5
    assert model.dropout_rate == 0.5


class Noisy(nn.Module):
    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.noise = nn.Linear(8, 8), noise

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.noise(x)


def test_randomness_that_is_left_is_refused():
    batch = torch.randn(4, 8), torch.randn(4, 8)
    model = nn.Sequential(nn.Linear(8, 8), Noisy(torch.ones_like))
    for noise in (
        lambda x: F.dropout(x, 0.5),
        lambda x: np.random.rand(),
        lambda x: random.random(),
    ):
        model[1].noise = noise
        with pytest.raises(ValueError, match=r"two runs of one batch .*; look for F\.dropout"):
            autotune(model, batch, nn.MSELoss())


def test_frozen_and_unused_parameters(told):
    told(by_precision)
    model = mlp()
    model[0].requires_grad_(False)
    model.unused = nn.Linear(3, 3)
    model.forward = None  # deep copies carry it; a plain attribute must not matter
    del model.forward
    wrapped = nn.ModuleDict({"used": mlp(), "unused": nn.Linear(3, 3)})

    class Partly(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = wrapped
            self.parts["used"][0].requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            return self.parts["used"](x)

    report = autotune(Partly(), (torch.randn(4, 8), torch.randn(4, 8)), nn.MSELoss(), compile=False)
    assert trial_of(report, FP32).gradient_error < 1e-6


def test_complex_weights(told):
    told(lambda text: 1.0)

    class Spectral(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 5, dtype=torch.complex64) / 4)
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(torch.fft.irfft(torch.fft.rfft(x) @ self.weight, n=8))

    torch.manual_seed(0)
    model, batch = Spectral(), (torch.randn(8, 8), torch.randn(8, 8))
    report = autotune(model, batch, nn.MSELoss(), compile=False)
    twin = copy.deepcopy(model)
    twin.linear.double()
    twin.weight.data = twin.weight.data.to(torch.complex128)
    exact = torch.autograd.grad(
        F.mse_loss(twin(batch[0].double()), batch[1].double()), [*twin.parameters()]
    )
    found = torch.autograd.grad(F.mse_loss(model(batch[0]), batch[1]), [*model.parameters()])
    difference = sum((a - b).abs().square().sum() for a, b in zip(found, exact, strict=True))
    expected = float((difference / sum(b.abs().square().sum() for b in exact)).sqrt())
    assert trial_of(report, FP32).gradient_error == pytest.approx(expected, rel=1e-3)
    assert trial_of(report, Settings(micro_batch=2)).gradient_error < 1e-6


@pytest.mark.parametrize("give", ["tuple", "mapping", "own loss"])
def test_batches_as_people_have_them(told, give):
    told(lambda text: 1.0)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.layer = nn.Bilinear(4, 5, 6)

        def forward(self, a: Tensor, b: Tensor, labels: Tensor | None = None) -> object:
            output = self.layer(a, b)
            return output if labels is None else {"loss": F.mse_loss(output, labels)}

    torch.manual_seed(0)
    inputs, labels = {"a": torch.randn(8, 4), "b": torch.randn(8, 5)}, torch.randn(8, 6)
    batch, loss_fn = {
        "tuple": ((tuple(inputs.values()), labels), nn.MSELoss()),
        "mapping": ((inputs, labels), nn.MSELoss()),
        "own loss": ({**inputs, "labels": labels}, None),
    }[give]
    report = autotune(Two(), batch, loss_fn, tolerance=1e-5, compile=False)
    for size in (None, 4, 2, 1):
        assert trial_of(report, Settings(micro_batch=size)).gradient_error < 1e-6


# The reference


def test_the_reference_takes_less_than_the_batch_in_float64():
    """In float64 by eighths, where the batch may be divided."""
    model = chain(blocks=20)
    bench = Workbench(model, WIDE, nn.MSELoss())
    wide = tuple(t.double() for t in WIDE)
    whole = measured(copy.deepcopy(model).double(), FP32, wide)
    needed = peak_bytes(lambda: Workbench(model, WIDE, nn.MSELoss()).measure_reference())
    assert needed < min(0.5 * whole, measured(model, FP32, WIDE))
    bench.measure_reference()
    exact = torch.cat([p.grad.flatten() for p in _double_gradient(model, WIDE)])
    torch.testing.assert_close(bench.reference, exact, rtol=1e-9, atol=1e-15)


def _double_gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[nn.Parameter]:
    twin = copy.deepcopy(model).double()
    F.mse_loss(twin(batch[0].double()), batch[1].double()).backward()
    return list(twin.parameters())


def test_the_reference_runs_an_eighth_of_the_batch_at_a_time(told):
    told(by_precision)

    class Little(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 4 and x.dtype is torch.float64 and torch.is_grad_enabled():
                raise torch.OutOfMemoryError("too large")
            return self.linear(x)

    model, batch = Little(), (torch.randn(32, 8), torch.randn(32, 8))
    report = autotune(model, batch, nn.MSELoss(), compile=False)
    assert trial_of(report, FP32).gradient_error < 1e-6


def test_losses_all_alike_do_not_hide_what_micro_batches_weigh(told):
    """With a head of zeros the loss of every token is log 11: equal means, unequal gradients."""
    told(by_precision)
    model, (x, y), loss_fn = problem("tied")
    model = nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 11))
    nn.init.zeros_(model[1].weight), nn.init.zeros_(model[1].bias)
    y[4:, 1:] = -100  # the same number of tokens within the first four samples
    report = autotune(model, (x, y), loss_fn, compile=False)
    assert report.notes[0].startswith("Micro-batches left out")
    report = autotune(model, (x, y), loss_fn, count=lambda t: (t != -100).sum(), compile=False)
    assert not report.notes


def test_a_loss_divided_by_its_own_value_rules_micro_batches_out(told):
    """Its value is 1 whatever the batch."""
    told(by_precision)
    model, batch, _ = problem("mlp")

    def loss_fn(output: Tensor, targets: Tensor) -> Tensor:
        loss = F.mse_loss(output, targets)
        return loss / loss.detach()

    report = autotune(model, batch, loss_fn, compile=False)
    assert report.notes[0].startswith("Micro-batches left out")


# The optimizer


@pytest.mark.parametrize("given", ["class", "instance", "function"])
def test_step_and_state_of_the_optimizer_belong_to_the_peak(told, given):
    told(by_precision, real=True)
    model, batch, loss_fn = problem("mlp")
    twin = copy.deepcopy(model)
    adam = torch.optim.AdamW(twin.parameters())

    def step() -> None:
        loss_fn(twin(batch[0]), batch[1]).backward()
        adam.step()
        adam.zero_grad()

    during = peak_bytes(step)
    state = sum(t.nbytes for s in adam.state.values() for t in s.values())
    make = {
        "class": torch.optim.AdamW,
        "instance": torch.optim.AdamW(model.parameters()),
        "function": partial(torch.optim.AdamW, lr=1e-4),
    }[given]
    run = partial(autotune, model, batch, loss_fn, None, 1e-5, compile=False)
    before = copy.deepcopy(model.state_dict())
    report = run(optimizer=make)
    trial = trial_of(report, FP32)
    assert trial.peak_bytes == pytest.approx(during + state, abs=64)
    assert trial_of(run(), FP32).peak_bytes <= trial.peak_bytes - state
    assert trial.gradient_error < 1e-6  # of the model as it was, whatever steps came before
    assert trial_of(report, Settings(micro_batch=1)).gradient_error is None or (
        trial_of(report, Settings(micro_batch=1)).gradient_error < 1e-6
    )
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    if given == "instance":
        assert not make.state


def test_a_budget_counts_the_state_of_the_optimizer(told):
    told(by_precision, real=True)
    model = chain(norm=True)
    plain = measured(model, FP32, WIDE)
    run = partial(autotune, model, WIDE, nn.MSELoss(), tolerance=1e-4, compile=False)
    assert run(memory_budget=plain + 64).best == FP32
    report = run(memory_budget=plain + 64, optimizer=torch.optim.Adam)
    assert report.best.checkpoint  # two moments of each parameter beside it
    assert report.trials[0].peak_bytes <= plain + 64


def test_fp16_steps_through_a_scaler(told):
    """An overflow of the first scale leaves the parameters alone, as in training."""
    told(by_precision)
    torch.manual_seed(0)
    model, batch = nn.Linear(16, 4), (torch.randn(4, 16), torch.randn(4, 4))
    bench = Workbench(
        model,
        batch,
        lambda out, y: 1e3 * (out - y).square().mean(),
        optimizer=torch.optim.SGD(model.parameters(), lr=1e-3),
    )
    bench.step(Settings("fp16"))()
    made = bench.copy_for(Settings("fp16"))
    assert torch.equal(made.model.weight, model.weight)
    bench.step(FP32)()
    assert not torch.equal(made.model.weight, model.weight)
    bench.measure_reference()
    assert bench.error(FP32) < 1e-6


# fp16 and its scale


def test_fp16_finds_a_scale_where_the_first_one_overflows(told):
    told(by_precision)
    torch.manual_seed(0)
    model = nn.Linear(16, 4)
    batch = torch.randn(4, 16), torch.randn(4, 4)
    report = autotune(
        model, batch, lambda out, y: 1e3 * (out - y).square().mean(), tolerance=1, compile=False
    )
    assert trial_of(report, Settings("fp16")).gradient_error < 1e-2
    # 2**16 times a gradient of some hundreds is beyond 65504
    scaled = nn.Linear(16, 4)
    scaled.load_state_dict(model.state_dict())
    with torch.autocast("cpu", torch.float16):
        loss = 1e3 * (scaled(batch[0]) - batch[1]).square().mean()
    (loss * 2.0**16).backward()
    assert not scaled.weight.grad.isfinite().all()


def test_fp16_whose_forward_overflows_is_over_any_tolerance(told):
    told(by_precision)
    model, (x, y), loss_fn = problem("mlp")
    report = autotune(model, (1e5 * x, y), loss_fn, tolerance=10.0, compile=False)
    trial = trial_of(report, Settings("fp16"))
    assert not math.isfinite(trial.gradient_error)
    assert trial.verdict.startswith("error nan over")


# What is ruled out


def test_batch_norm_rules_micro_batches_out(told):
    told(by_precision)
    model, batch, loss_fn = problem("cnn")
    report = autotune(model, batch, loss_fn, tolerance=1.0, compile=False)
    assert all(trial.settings.micro_batch is None for trial in report.trials)
    (note,) = report.notes
    assert re.match(
        r"Micro-batches left out: .* differs by \d\.\de-\d+ .*'1' is a BatchNorm2d", note
    )
    assert note in report.table()
    report = autotune(model.eval(), batch, loss_fn, tolerance=1.0, compile=False)
    assert {trial.settings.micro_batch for trial in report.trials} == {None, 4, 2, 1}
    assert not report.notes


def test_a_sum_is_no_mean_and_rules_micro_batches_out(told):
    told(by_precision)
    model, batch, _ = problem("mlp")
    report = autotune(model, batch, nn.MSELoss(reduction="sum"), compile=False)
    assert all(trial.settings.micro_batch is None for trial in report.trials)
    assert "no mean over samples, or needs count" in report.notes[0]


def test_count_weights_micro_batches_by_their_tokens(told):
    told(by_precision)
    model, (x, y), loss_fn = problem("tied")
    y[:2] = -100  # a micro-batch of 2 without a token, of whose mean nothing is left but NaN
    y[3, 1:] = -100
    report = autotune(model, (x, y), loss_fn, tolerance=1e-6, compile=False)
    assert all(trial.settings.micro_batch is None for trial in report.trials)
    report = autotune(
        model, (x, y), loss_fn, tolerance=1e-6, count=lambda t: (t != -100).sum(), compile=False
    )
    errors = {t.settings.micro_batch: t.gradient_error for t in report.trials}
    assert errors[4] < 1e-6
    assert errors[2] < 1e-6
    assert not report.notes


def test_micro_batches_that_do_not_divide_the_batch(told):
    told(lambda text: 0.5 if "micro-batch 4" in text else 1.0)
    model, (x, y), loss_fn = problem("mlp")
    report = autotune(model, (x[:7], y[:7]), loss_fn, tolerance=1e-6, compile=False)
    assert {trial.settings.micro_batch for trial in report.trials} == {None, 4, 2, 1}
    assert report.best == Settings(micro_batch=4)
    assert trial_of(report, report.best).gradient_error < 1e-6


def test_a_batch_of_one_is_not_divided(told):
    told(by_precision)
    model, (x, y), loss_fn = problem("mlp")
    report = autotune(model, (x[:1], y[:1]), loss_fn, compile=False)
    assert all(trial.settings.micro_batch is None for trial in report.trials)
    assert not report.notes


def test_tolerance_rules_out_low_precision_before_peak_and_race(told):
    races = told(by_precision)
    model, batch, loss_fn = problem("encoder")
    report = autotune(model, batch, loss_fn, tolerance=1e-5, compile=False)
    assert report.best.precision == "fp32"
    for precision in ("bf16", "fp16"):
        trial = trial_of(report, Settings(precision))
        assert trial.verdict == f"error {trial.gradient_error:.1e} over 1.0e-05"
        assert (trial.time, trial.peak_bytes) == (None, None)
    assert not any("16" in text for race in races for text in race)
    assert autotune(model, batch, loss_fn, tolerance=0.1, compile=False).best == BF16


def test_memory_format_is_tried_with_convolutions_of_images_only(told):
    told(lambda text: 0.5 if "channels last" in text else 1.0)
    model, batch, loss_fn = problem("cnn")
    report = autotune(model, batch, loss_fn, tolerance=1e-5, compile=False)
    assert report.best == Settings(memory_format="channels_last")
    assert trial_of(report, report.best).gradient_error < 1e-5
    model, batch, loss_fn = problem("encoder")
    report = autotune(model, batch, loss_fn, tolerance=0.1, compile=False)
    assert all(t.settings.memory_format == "contiguous_format" for t in report.trials)


def test_hopelessly_slow_precision_is_given_one_look(told):
    races = told(lambda text: 20.0 if "fp16" in text else by_precision(text))
    model, batch, loss_fn = problem("mlp")
    report = autotune(model, batch, loss_fn, tolerance=0.1, compile=False)
    (trial,) = (t for t in report.trials if t.settings.precision == "fp16")
    assert trial.verdict == "slower: 33.3 times the fastest in a first look"
    assert trial.peak_bytes is None
    assert not any("fp16" in text for race in races for text in race)


# Budgets


def chain(norm: bool = False, blocks: int = 6) -> nn.Sequential:
    """Wide blocks of few parameters; BatchNorm keeps them from being divided by samples."""
    torch.manual_seed(0)
    layers = [
        nn.Sequential(nn.Linear(32, 32), *[nn.BatchNorm1d(16)] * norm, nn.GELU(), nn.Tanh())
        for _ in range(blocks)
    ]
    return nn.Sequential(*layers)


WIDE = torch.randn(16, 16, 32), torch.randn(16, 16, 32)


def measured(model: nn.Module, settings: Settings, batch: tuple[Tensor, Tensor]) -> int:
    model = settings.apply(copy.deepcopy(model))
    size = settings.micro_batch or len(batch[0])

    def step() -> None:
        for x, y in zip(*(t.split(size) for t in batch), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
                loss = F.mse_loss(model(x), y)
            (loss * len(x) / len(batch[0])).backward()
        model.zero_grad()

    return peak_bytes(step)


def test_budget_forces_micro_batches(told):
    told(by_precision, real=True)
    model = nn.Linear(16, 256)
    batch = torch.randn(64, 16), torch.randn(64, 256)
    budget = measured(model, Settings(micro_batch=32), batch) + 64
    report = autotune(model, batch, nn.MSELoss(), budget, 1e-5, compile=False)
    assert report.best == Settings(micro_batch=32)
    assert trial_of(report, report.best).peak_bytes <= budget
    assert measured(model, report.best, batch) <= budget + 64
    baseline = trial_of(report, FP32)
    assert baseline.peak_bytes > budget
    assert re.fullmatch(r"peak \d+\.\d KiB over budget", baseline.verdict)
    assert baseline.time == 1.0


def test_less_than_an_eighth_is_tried_where_nothing_else_fits(told):
    told(by_precision, real=True)
    model = nn.Linear(16, 256)
    batch = torch.randn(64, 16), torch.randn(64, 256)
    budget = measured(model, Settings(micro_batch=2), batch) + 64
    report = autotune(model, batch, nn.MSELoss(), budget, 1e-5, compile=False)
    assert report.best == Settings(micro_batch=2)
    report = autotune(model, batch, nn.MSELoss(), None, 1e-5, compile=False)
    assert {t.settings.micro_batch for t in report.trials if t.peak_bytes} == {None, 32, 16, 8}


def test_budget_forces_a_plan_where_the_batch_cannot_be_divided(told):
    told(by_precision, real=True)
    model = chain(norm=True)
    budget = int(0.7 * measured(model, FP32, WIDE))
    report = autotune(model, WIDE, nn.MSELoss(), budget, 1e-4, compile=False)
    assert list(report.best.checkpoint) == [""]
    assert trial_of(report, report.best).peak_bytes <= budget
    assert measured(model, report.best, WIDE) <= budget + 64
    assert trial_of(report, report.best).gradient_error < 1e-4


def test_a_plan_competes_with_micro_batches(told):
    # Halves of the batch cost a half more, a plan less.
    told(lambda text: 1.5 if "micro-batch" in text else by_precision(text), real=True)
    model = chain()
    budget = int(0.7 * measured(model, FP32, WIDE))
    report = autotune(model, WIDE, nn.MSELoss(), budget, 1e-5, compile=False)
    assert report.best.checkpoint
    assert report.best.micro_batch is None
    # and where they cost nothing no plan can be faster
    told(lambda text: 2.0 if "recomputed" in text else 1.0, real=True)
    report = autotune(model, WIDE, nn.MSELoss(), budget, 1e-5, compile=False)
    assert not any(t.settings.checkpoint for t in report.trials)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_plan_can_go_with_micro_batches(told, monkeypatch, foreseen):
    if not foreseen:  # that gradients of the micro-batches before stand beside each: revise
        plan = _plans.plan_checkpoints

        def short(*args, accumulate):
            return plan(*args)

        monkeypatch.setattr(_plans, "plan_checkpoints", short)
    told(lambda text: 1.0 if "micro-batch 64" in text else 3.0, real=True)
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(5)))
    batch = torch.randn(256, 64), torch.randn(256, 64)
    budget = measured(model, Settings(micro_batch=64), batch) - 20_000
    report = autotune(model, batch, nn.MSELoss(), budget, 1e-5, compile=False)
    assert report.best.micro_batch == 64
    assert "recomputed" in str(report.best)
    assert measured(model, report.best, batch) <= budget + 64
    texts = [str(t.settings) for t in report.trials]
    assert len(set(texts)) == len(texts)  # a plan that saves everything is no other candidate


def test_blocks_say_what_is_planned(told):
    told(lambda text: 1.5 if "micro-batch" in text else by_precision(text), real=True)

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = chain(blocks=3), chain(blocks=4)
            self.narrow = nn.Sequential(nn.Linear(32, 1), nn.Linear(1, 32))

        def forward(self, x: Tensor) -> Tensor:
            return self.narrow(self.second(self.first(x)))

    model = Model()
    budget = int(0.93 * measured(model, FP32, WIDE))
    run = partial(autotune, model, WIDE, nn.MSELoss(), budget, 1e-5, compile=False)
    assert list(run().best.checkpoint) == ["second"]  # saves more than the others
    assert list(run(blocks=model.first).best.checkpoint) == ["first"]
    chosen = run(blocks=[model.second[0], model.second[1]]).best
    assert sorted(chosen.checkpoint) == ["second.0", "second.1"]
    with pytest.raises(ValueError, match=r"expected blocks within the model, got \[Linear"):
        run(blocks=[nn.Linear(2, 2)])


@pytest.mark.parametrize("norm", [False, True], ids=["divisible", "BatchNorm"])
def test_least_attainable_peak_is_named_and_attainable(told, norm):
    told(by_precision, real=True)
    model = chain(norm)
    with pytest.raises(ValueError, match=r"nothing fits memory_budget=1\.0 KiB") as caught:
        autotune(model, WIDE, nn.MSELoss(), 1024, 1.0, compile=False)
    least = int(re.search(r"the least attainable peak is (\d+) bytes", str(caught.value))[1])
    report = autotune(model, WIDE, nn.MSELoss(), least, 1.0, compile=False)
    assert trial_of(report, report.best).peak_bytes <= least
    assert ("micro-batch" in str(caught.value)) is not norm


def test_least_attainable_peak_keeps_to_the_tolerance(told):
    told(by_precision, real=True)
    with pytest.raises(ValueError, match=r"peak is \d+ bytes .* with fp32"):
        autotune(chain(), WIDE, nn.MSELoss(), 1024, 1e-5, compile=False)


def test_least_attainable_error_is_named(told):
    told(by_precision, real=True)
    model, batch, loss_fn = problem("encoder")
    with pytest.raises(ValueError, match="no gradient is within tolerance=1e-12") as caught:
        autotune(model, batch, loss_fn, tolerance=1e-12, compile=False)
    least = float(re.search(r"least attainable error is (\S+), with fp32", str(caught.value))[1])
    assert autotune(model, batch, loss_fn, tolerance=1.1 * least, compile=False).best


def test_a_share_of_what_is_free(told, monkeypatch):
    told(by_precision)
    monkeypatch.setattr(
        "pathlib.Path.read_text", lambda path, **_: "MemFree: 7 kB\nMemAvailable:   2000 kB\n"
    )
    report = autotune(*problem("mlp"), "80%", compile=False)
    assert report.memory_budget == 0.8 * 2000 * 1024
    texts = {" 80 % ": 0.8 * 2000 * 1024, "2GB": 2 * 10**9, "1.5 GiB": 3 * 2**29}
    for text, expected in texts.items():
        assert autotune(*problem("mlp"), text, compile=False).memory_budget == expected
    assert "budget 1.6 MiB" in repr(report)

    def absent(path, **_):
        raise FileNotFoundError

    monkeypatch.setattr("pathlib.Path.read_text", absent)
    with pytest.raises(ValueError, match=r"expected memory_budget in bytes, got '80%', and this"):
        autotune(*problem("mlp"), "80%", compile=False)


def test_why_plans_failed_is_in_the_error_and_in_the_report(told, monkeypatch):
    told(by_precision, real=True)
    with pytest.raises(ValueError, match="nothing fits") as caught:
        autotune(chain(norm=True), WIDE, nn.MSELoss(), 1024, 1e-4, compile=False)
    text = str(caught.value)
    assert re.search(r"\nfp32, \d of 6 blocks recomputed.*: peak .* over budget\.", text)
    least = int(re.search(r"the least attainable peak is (\d+) bytes", text)[1])
    assert least < 0.7 * measured(chain(norm=True), FP32, WIDE)

    def refused(*args, **kwargs):
        raise ValueError("block 2 fills a cache")

    monkeypatch.setattr(_plans, "plan_checkpoints", refused)
    with pytest.raises(ValueError, match=r"\nPlan for fp32 failed: block 2 fills a cache; pass"):
        autotune(chain(norm=True), WIDE, nn.MSELoss(), 1024, 1e-4, compile=False)
    budget = int(0.9 * measured(chain(), FP32, WIDE))
    told(lambda text: 3.0 if "micro-batch" in text else by_precision(text), real=True)
    report = autotune(chain(), WIDE, nn.MSELoss(), budget, 1e-5, compile=False)
    failed = "Plan for fp32 failed: block 2 fills a cache; pass other blocks= than model."
    assert failed in report.notes


def test_a_container_that_is_no_chain_gives_way_to_the_next(told):
    told(lambda text: 3.0 if "micro-batch" in text else by_precision(text), real=True)

    class Branch(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).tanh()

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.branches = nn.ModuleList(Branch(32, 32) for _ in range(12))
            self.blocks = chain(blocks=3)

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks(sum(branch(x) for branch in self.branches))

    model = Model()
    budget = int(0.97 * measured(model, FP32, WIDE))
    run = partial(autotune, loss_fn=nn.MSELoss(), tolerance=1e-5, compile=False)
    report = run(model, WIDE, memory_budget=budget)
    planned = [trial.settings for trial in report.trials if trial.settings.checkpoint]
    assert {name for settings in planned for name in settings.checkpoint} == {"blocks"}
    failed = r"Plan for fp32.* failed: .* block 1 .*; pass other blocks= than model\.branches"
    assert any(re.match(failed, note) for note in report.notes)
    model.blocks = nn.Identity()
    with pytest.raises(ValueError, match=rf"nothing fits [\s\S]*\n{failed}"):
        run(model, WIDE, memory_budget=1024)


def test_model_without_blocks_is_told_so(told):
    told(by_precision, real=True)
    model = nn.Linear(16, 256)
    batch = torch.randn(64, 16), torch.randn(64, 256)
    budget = int(0.6 * measured(model, FP32, batch))
    report = autotune(model, batch, nn.MSELoss(), budget, 1e-5, compile=False)
    assert re.search("fp32.* failed: the model has no nn.Sequential or nn.Mod", report.notes[0])


# Failures of candidates


class Limited(nn.Module):
    """Runs out of memory above a batch size, and not in float64."""

    def __init__(self, most: int, error: Exception) -> None:
        super().__init__()
        self.linear, self.most, self.error = nn.Linear(8, 8), most, error

    def forward(self, x: Tensor) -> Tensor:
        if len(x) > self.most and x.dtype is torch.float32:
            raise self.error
        return self.linear(x)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("out of memory"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"),
    ],
)
def test_out_of_memory_leads_to_smaller_micro_batches(told, error):
    told(by_precision)
    batch = torch.randn(8, 8), torch.randn(8, 8)
    report = autotune(Limited(2, error), batch, nn.MSELoss(), tolerance=1e-5, compile=False)
    assert report.best == Settings(micro_batch=2)
    for size in (None, 4):
        trial = trial_of(report, Settings(micro_batch=size))
        assert trial.verdict == f"failed: {type(error).__name__}: {error}".removesuffix(": ")
        assert (trial.time, trial.peak_bytes, trial.gradient_error) == (None, None, None)
    assert "failed: " in report.table()


def test_every_candidate_fails(told):
    told(by_precision)
    batch = torch.randn(8, 8), torch.randn(8, 8)
    model = Limited(0, RuntimeError("no kernel\nfor this"))
    with pytest.raises(ValueError, match="every candidate fails; fp32 failed: RuntimeError: no ke"):
        autotune(model, batch, nn.MSELoss(), compile=False)


def test_a_precision_that_fails_is_a_trial(told):
    told(by_precision)

    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.linear(x)
            if y.dtype is torch.bfloat16:
                raise NotImplementedError
            return y

    model, batch = Picky(), (torch.randn(8, 8), torch.randn(8, 8))
    report = autotune(model, batch, nn.MSELoss(), compile=False)
    assert trial_of(report, BF16) == Trial(BF16, verdict="failed: NotImplementedError")


def test_a_candidate_that_fails_in_the_race_is_dropped(told, monkeypatch):
    races = told(lambda text: 0.5 if text == "bf16" else 1.0)
    model, batch, loss_fn = problem("mlp")
    step = Workbench.step
    compare = _race.compare
    racing = []

    def racy(*args, **kwargs):
        racing.append(True)
        return compare(*args, **kwargs)

    def broken(bench: Workbench, settings: Settings) -> Callable[[], None]:
        run = step(bench, settings)

        def maybe() -> None:
            run()
            if racing and settings == BF16:
                raise torch.OutOfMemoryError("fragmented")

        return maybe

    monkeypatch.setattr(_race, "compare", racy)
    monkeypatch.setattr(Workbench, "step", broken)
    report = autotune(model, batch, loss_fn, tolerance=0.1, compile=False)
    assert report.best != BF16
    assert trial_of(report, BF16).verdict == "failed: OutOfMemoryError: fragmented"
    assert "bf16" in races[0]
    assert not any("bf16" in race for race in races[1:])


def test_a_plan_that_fails_in_the_race_is_not_tried_again(told, monkeypatch):
    told(by_precision, real=True)
    model = chain(norm=True)
    budget = int(0.7 * measured(model, FP32, WIDE))
    step, racing = Workbench.step, []
    compare = _race.compare

    def racy(*args, **kwargs):
        racing.append(True)
        return compare(*args, **kwargs)

    def broken(bench: Workbench, settings: Settings) -> Callable[[], None]:
        run = step(bench, settings)

        def maybe() -> None:
            run()
            if racing and settings.checkpoint:
                raise torch.OutOfMemoryError("fragmented")

        return maybe

    monkeypatch.setattr(_race, "compare", racy)
    monkeypatch.setattr(Workbench, "step", broken)
    with pytest.raises(ValueError, match="nothing fits"):
        autotune(model, WIDE, nn.MSELoss(), budget, 1e-4, compile=False)


def test_error_outside_the_candidates_is_raised(told, monkeypatch):
    told(by_precision)

    def broken(*args, **kwargs):
        raise ArithmeticError("of compare itself")

    monkeypatch.setattr(_race, "compare", broken)
    with pytest.raises(ArithmeticError, match="of compare itself"):
        autotune(*problem("mlp"), compile=False)


# Races


def test_smallest_peak_of_those_that_noise_does_not_tell_apart(told):
    # 2 % from the whole batch to halves, within a noise of 10 %; quarters are slower.
    times = {"bf16": 1.0, "bf16, micro-batch 4": 1.02, "bf16, micro-batch 2": 1.3}
    told(lambda text: times.get(text, 2.0), noise=1.1)
    model, batch, loss_fn = problem("encoder")
    report = autotune(model, batch, loss_fn, tolerance=0.1, compile=False)
    assert report.best == Settings("bf16", 4)
    first, second, third = report.trials[:3]
    assert first.verdict == "best: a tie of 2, at the smallest peak"
    assert second.settings == BF16
    assert second.verdict == "tie: as fast as the best, at no smaller peak"
    assert second.peak_bytes > first.peak_bytes
    assert third.verdict == "slower: 1.30 [1.30, 1.30] times the fastest"
    assert report.noise.median == pytest.approx(1.1)
    told(lambda text: times.get(text, 2.0), noise=1.001)
    assert autotune(model, batch, loss_fn, tolerance=0.1, compile=False).best == BF16


def test_clear_losers_see_the_first_rounds_only(told):
    times = {"bf16": 1.0, "bf16, micro-batch 4": 1.02, "bf16, micro-batch 2": 1.3}
    races = told(lambda text: times.get(text, 1.4), noise=1.1)
    model, batch, loss_fn = problem("encoder")
    autotune(model, batch, loss_fn, tolerance=0.1, compile=False)
    assert set(races[0]) > {*times, "fp32"}
    assert sorted(races[1]) == ["bf16", "bf16, micro-batch 4"]
    assert len(races) == 2


def test_a_tie_of_very_different_times_gets_more_rounds(told):
    times = {"bf16": 1.0, "bf16, micro-batch 4": 1.2}
    races = told(lambda text: times.get(text, 1.4), noise=1.3)
    model, batch, loss_fn = problem("encoder")
    report = autotune(model, batch, loss_fn, tolerance=0.1, compile=False)
    assert [len(race) for race in races][1:] == [2, 2]
    assert report.best == BF16  # a fifth of the time is not given away for want of certainty
    doubtful = trial_of(report, Settings("bf16", 4)).verdict
    assert doubtful == "tie: 1.20 [1.20, 1.20] times the fastest, within the noise"


def test_a_disturbed_look_does_not_drop_the_fastest(told, monkeypatch):
    told(by_precision)
    calls: dict[str, int] = {}
    steady = Workbench.seconds

    def disturbed(bench: Workbench, settings: Settings) -> float:
        text = str(settings)
        calls[text] = calls.get(text, 0) + 1
        return steady(bench, settings) * (10 if calls[text] == 1 and text == "bf16" else 1)

    monkeypatch.setattr(Workbench, "seconds", disturbed)
    model, batch, loss_fn = problem("encoder")
    assert autotune(model, batch, loss_fn, tolerance=0.1, compile=False).best == BF16
    assert calls["bf16"] > 1


def test_progress_says_what_is_tried_how_many_are_left_and_what_it_takes(told, monkeypatch):
    told(by_precision)
    shown: list[str] = []

    @contextlib.contextmanager
    def progress(operation):
        yield shown.append

    monkeypatch.setattr("autograd_lib.tuning.tuner.progress", progress)
    autotune(*problem("mlp"), tolerance=0.1, compile=False)
    assert shown[0] == "gradient in float64, by which the others are judged"
    assert shown[1] == "candidate 1 of 12: fp32"
    # 30 plain steps of a second each for 12 candidates: 3 precisions, 4 sizes
    assert shown[2] == "candidate 1 of 12, 360 s at most without compiling: fp32"
    assert any(text.endswith("compiling: bf16, micro-batch 4") for text in shown)
    assert any("rounds of bf16" in text for text in shown)


def test_a_search_runs_a_bounded_number_of_steps(monkeypatch):
    """Of 6 blocks of width 128, counted: at most 30 whole-batch steps for each candidate."""
    torch.manual_seed(0)
    layer = partial(nn.TransformerEncoderLayer, 128, 4, 256, dropout=0.0, batch_first=True)
    model = nn.Sequential(*(layer() for _ in range(6)))
    batch = torch.randn(8, 4, 128), torch.randn(8, 4, 128)
    samples, run = [0.0], ForwardBackward.__call__

    def counted(self, pieces, *args):
        samples[0] += sum(len(piece.batch[1]) for piece in pieces) / 8
        return run(self, pieces, *args)

    monkeypatch.setattr(ForwardBackward, "__call__", counted)
    monkeypatch.setattr(benchmark, "_SAMPLE_SECONDS", 0.0)  # a sample is one step
    report = autotune(model, batch, nn.MSELoss(), compile=False)
    assert samples[0] <= 30 * len(report.trials)


@pytest.mark.usefixtures("short_samples")
def test_report_of_a_real_race():
    model, batch, loss_fn = problem("encoder")
    report = autotune(model, batch, loss_fn, tolerance=0.1, compile=False)
    raced = [t for t in report.trials if re.match("best|tie|slower: .*\\[", t.verdict)]
    assert raced[0].settings == report.best
    assert all(t.time > 0 and t.peak_bytes > 0 and t.gradient_error < 0.1 for t in raced)
    assert report.noise.low <= report.noise.median <= report.noise.high
    assert report.seconds > 0


# Compilation


@pytest.fixture
def compiler(monkeypatch):
    """Replace Inductor by a backend that costs nothing."""

    def install(backend="eager") -> None:
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))

    yield install
    torch.compiler.reset()


def test_compiling_is_tried_on_the_best(told, compiler):
    compiler()
    looks = iter([7.0])  # of the first step, which compiles
    told(lambda text: next(looks, 0.3) if "compiled" in text else by_precision(text))
    model, batch, loss_fn = problem("mlp")
    report = autotune(model, batch, loss_fn, tolerance=0.1)
    (compiled,) = [t for t in report.trials if t.settings.compile]
    assert str(compiled.settings) == "bf16, compiled"
    assert compiled.gradient_error < 1e-2
    assert compiled.peak_bytes > 0


def test_compiling_that_pays_is_chosen_with_what_it_took(told, monkeypatch, compiler):
    compiler()
    told(lambda text: by_precision(text) / (2 if "compiled" in text else 1))
    slow_first = Workbench.seconds
    monkeypatch.setattr(
        Workbench,
        "seconds",
        lambda bench, s: slow_first(bench, s) + (30.0 if s.compile else 0.0),
    )
    model, batch, loss_fn = problem("mlp")
    report = autotune(model, batch, loss_fn, tolerance=0.1)
    assert report.best == Settings("bf16", compile=True)
    assert report.trials[0].time == pytest.approx(0.3)
    assert "bf16, compiled: compiling took 30.0 s." in report.notes
    assert trial_of(report, BF16).verdict.startswith("slower: 2.00")


def test_compiling_that_does_not_pay_is_not_chosen(told, compiler):
    compiler()
    told(lambda text: by_precision(text) * (1.5 if "compiled" in text else 1))
    report = autotune(*problem("mlp"), tolerance=0.1)
    assert report.best == BF16
    assert trial_of(report, Settings("bf16", compile=True)).verdict.startswith("slower: 1.50")


def test_ties_with_what_is_beaten_by_compiling_are_no_ties_with_the_best(told, compiler):
    compiler()
    times = {"bf16": 1.0, "bf16, micro-batch 4": 1.02, "bf16, micro-batch 4, compiled": 0.5}
    told(lambda text: times.get(text, 2.0), noise=1.1)
    model, batch, loss_fn = problem("encoder")
    report = autotune(model, batch, loss_fn, tolerance=0.1)
    assert report.best == Settings("bf16", 4, compile=True)
    assert not any(t.verdict.startswith("tie") for t in report.trials)


def test_a_failing_compiler_is_a_verdict(told, compiler):
    def broken(graph, inputs):
        raise OSError("no compiler here")

    compiler(broken)
    told(by_precision)
    report = autotune(*problem("mlp"), tolerance=0.1)
    assert report.best == BF16
    trial = trial_of(report, Settings("bf16", compile=True))
    assert trial.verdict.startswith("failed: BackendCompilerFailed: ")
    assert trial.time is None


def test_a_compiler_that_spoils_the_gradient_is_found_out(told, compiler):
    def wrong(graph, inputs):
        return lambda *args: tuple(1.5 * out for out in graph(*args))

    compiler(wrong)
    told(lambda text: 0.1 if "compiled" in text else by_precision(text))
    report = autotune(*problem("mlp"), tolerance=0.1)
    assert report.best == BF16
    trial = trial_of(report, Settings("bf16", compile=True))
    assert trial.gradient_error > 0.1
    assert trial.verdict.startswith("error ")


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_compiling_with_inductor():
    model, (x, y), loss_fn = problem("mlp")
    report = autotune(model, (x[:1], y[:1]), loss_fn, tolerance=1e-5)
    trial = trial_of(report, Settings(compile=True))
    assert trial.verdict.startswith(("best", "tie", "slower", "failed"))
    assert trial.verdict.startswith("failed") or trial.gradient_error < 1e-5


# What is left behind


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_touched(told, fails):
    told(by_precision)
    model, (x, y), loss_fn = problem("cnn")
    model.register_forward_hook(lambda *_: None)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    x.requires_grad_()
    twin = copy.deepcopy(model)
    hooks = list(model._forward_hooks)
    grad, version = model[0].weight.grad, model[0].weight.grad._version
    training = [module.training for module in model.modules()]
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    expected = torch.rand(()), np.random.rand(), random.random()
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    if fails:
        with pytest.raises(ValueError, match="nothing fits"):
            autotune(model, (x, y), loss_fn, memory_budget=10, compile=False)
    else:
        assert autotune(model, (x, y), loss_fn, tolerance=1.0, compile=False).best
    assert (torch.rand(()), np.random.rand(), random.random()) == expected
    for name, value in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], value)
    assert model[0].weight.grad is grad
    assert grad._version == version
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert x.grad is None
    assert list(model._forward_hooks) == hooks
    assert [module.training for module in model.modules()] == training
    assert model[0].weight.stride() == twin[0].weight.stride()
    assert all(m._compiled_call_impl is None for m in model.modules())


def test_best_trains_as_the_trial_said(told):
    told(by_precision, real=True)
    model = chain(norm=True)
    budget = int(0.7 * measured(model, FP32, WIDE))
    best = autotune(model, WIDE, nn.MSELoss(), budget, 1e-5, compile=False).best
    plain, planned = copy.deepcopy(model), best.apply(copy.deepcopy(model))
    for trained in (plain, planned):
        nn.MSELoss()(trained(WIDE[0]), WIDE[1]).backward()
    assert all(torch.equal(a, b) for a, b in zip(flat(plain), flat(planned), strict=True))
    for a, b in zip(plain.buffers(), planned.buffers(), strict=True):
        assert torch.equal(a, b)


def test_loss_with_parameters_is_copied_with_the_model(told):
    told(by_precision)
    model, batch, _ = problem("mlp")
    loss_fn = CustomLossFunction()
    report = autotune(model, batch, loss_fn, tolerance=1e-5, compile=False)
    assert trial_of(report, FP32).gradient_error < 1e-6
    assert all(p.grad is None for p in [*model.parameters(), *loss_fn.parameters()])


def test_loss_that_shares_a_parameter_with_the_model(told):
    told(by_precision)

    class Tied(nn.Module):
        def __init__(self, weight: nn.Parameter) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, out: Tensor, y: Tensor) -> Tensor:
            return F.mse_loss(out @ self.weight, y)

    model, (x, y), _ = problem("mlp")
    loss_fn = Tied(model[0].weight)
    report = autotune(model, (x, y), loss_fn, compile=False)
    assert trial_of(report, FP32).gradient_error < 1e-6
    made = Copy((model, loss_fn, None, None), FP32)
    assert made.loss_fn.weight is made.model[0].weight
    assert len(made.parameters) == len(list(model.parameters()))


def test_several_inputs_and_their_micro_batches(told):
    told(by_precision)

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Bilinear(4, 5, 6)

        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return self.layer(a, b)

    batch = (torch.randn(8, 4), torch.randn(8, 5)), torch.randn(8, 6)
    report = autotune(Two(), batch, nn.MSELoss(), compile=False, tolerance=1e-5)
    assert trial_of(report, Settings(micro_batch=4)).gradient_error < 1e-6


# What is refused


def test_arguments_are_checked():
    model, batch, loss_fn = problem("mlp")
    for changes, error, message in [
        ({"model": "mlp"}, TypeError, "expected a torch.nn.Module, got str"),
        (
            {"model": torch.compile(model, backend="eager")},
            TypeError,
            "got OptimizedModule; pass the model itself",
        ),
        ({"batch": batch[0]}, ValueError, r"a pair \(inputs, targets\), got Tensor"),
        ({"memory_budget": 0}, ValueError, "to be numbers above 0, .* got 0 and 0.05"),
        ({"memory_budget": "0.8"}, ValueError, "a share such as '80%', got '0.8' and 0.05"),
        ({"memory_budget": "0%"}, ValueError, "a share such as '80%', got '0%' and 0.05"),
        ({"memory_budget": True}, ValueError, "of bytes and of a relative .* got True and 0.05"),
        ({"memory_budget": 0.5}, ValueError, "such as '80%', got 0.5 and 0.05"),
        ({"memory_budget": "150%"}, ValueError, "up to '100%', a share .* got '150%' and 0.05"),
        ({"memory_budget": b"2GB"}, ValueError, "a size such as '2GB' .* got b'2GB' and 0.05"),
        ({"tolerance": "5%"}, ValueError, "a relative error such as 0.05, .* got None and '5%'"),
        ({"tolerance": True}, ValueError, "a relative error such as 0.05, .* got None and True"),
        ({"tolerance": math.nan}, ValueError, "to be numbers above 0, .* got None and nan"),
        ({"optimizer": "adamw"}, TypeError, "expected optimizer to be a torch.optim.Optimizer"),
        (
            {"optimizer": torch.optim.SGD(mlp().parameters())},
            ValueError,
            r"of the model's parameters, got one of others \(SGD\)",
        ),
        ({"batch": (batch[0], batch[1][:3])}, ValueError, r"got shapes \[\(8, 8\), \(3, 8\)\]"),
        ({"batch": (batch[0][:0], batch[1][:0])}, ValueError, "the batch is empty"),
        ({"batch": (batch[0], torch.tensor(1.0))}, ValueError, "first dimension is the batch"),
        ({"count": lambda t: 0}, ValueError, "count that was given gives 0;"),
        ({"loss_fn": lambda out, y: out}, ValueError, r"return a scalar, got shape \(8, 8\)"),
        ({"loss_fn": lambda out, y: out.mean().item()}, ValueError, "got float"),
        ({"loss_fn": lambda out, y: 0 * out.mean()}, ValueError, r"has norm 0\.0"),
        ({"loss_fn": lambda out, y: out.mean() / 0}, ValueError, "has norm (nan|inf)"),
        (
            {"model": copy.deepcopy(model).double()},
            TypeError,
            "in float32 or complex64, got .*'0.weight': torch.float64",
        ),
        ({"model": copy.deepcopy(model).requires_grad_(False)}, ValueError, "requires a gradient"),
    ]:
        options = {"model": model, "batch": batch, "loss_fn": loss_fn} | changes
        with pytest.raises(error, match=f"autotune: .*{message}"):
            autotune(**options)


def test_loss_that_holds_a_parameter_out_of_reach_is_refused():
    model, batch, loss_fn = problem("mlp")
    scale = nn.Parameter(torch.ones(8, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"depends on a tensor of shape \(8,\) that is no"):
        autotune(model, batch, lambda out, y: loss_fn(scale * out, y))
    assert scale.grad is None


def test_step_that_writes_into_its_batch_is_refused():
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x.mul_(2))

    x, y = torch.randn(4, 8), torch.randn(4, 8)
    before = x.clone()
    with pytest.raises(ValueError, match="leaves behind in the model or in its input"):
        autotune(Writes(), (x, y), nn.MSELoss())
    assert torch.equal(x, before)


def test_a_model_that_float64_does_not_run_is_judged_by_float32(told):
    told(lambda text: 1.0)

    class Single(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return F.linear(x.float(), self.weight)

    model, batch = Single(8, 8), (torch.randn(4, 8), torch.randn(4, 8))
    report = autotune(model, batch, nn.MSELoss(), compile=False)
    assert report.notes[0].startswith("The reference is in float32, as float64 raises RuntimeError")
    assert trial_of(report, FP32).gradient_error == 0
    assert trial_of(report, Settings(micro_batch=2)).gradient_error < 1e-6
    assert 1e-4 < trial_of(report, BF16).gradient_error < 5e-2
    assert not any("Micro-batches left out" in note for note in report.notes)
    model.forward = lambda x: 1 / 0
    with pytest.raises(ZeroDivisionError):
        autotune(model, batch, nn.MSELoss())
    model.forward = lambda x: F.linear(x, model.weight[:, :3])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        autotune(model, batch, nn.MSELoss())


def test_why_micro_batches_are_left_out_is_not_the_error_of_float64(told):
    told(lambda text: 1.0)

    class Centered(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            output = F.linear(x.float(), self.weight)
            return output - output.mean(0)

    batch = torch.randn(8, 8), torch.randn(8, 8)
    report = autotune(Centered(8, 8), batch, nn.MSELoss(), compile=False)
    assert report.notes[1].startswith("Micro-batches left out: what they give differs by ")


def test_a_gradient_that_is_nan_in_float64_alone_is_judged_by_float32(told):
    told(lambda text: 1.0)

    class Masked(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            hidden = super().forward(x)
            mask = torch.full_like(hidden, torch.finfo(hidden.dtype).min)
            return hidden * mask.float().softmax(-1)

    batch = torch.randn(4, 8), torch.randn(4, 8)
    report = autotune(Masked(8, 8), batch, nn.MSELoss(), compile=False)
    assert report.notes[0].endswith("raises FloatingPointError: the gradient has norm nan")
    assert trial_of(report, FP32).gradient_error == 0
    assert trial_of(report, Settings(micro_batch=2)).gradient_error < 1e-6


def test_nobody_is_told_to_leave_out_what_nobody_has_set(told):
    told(lambda text: 1.0)
    model, (x, y), loss_fn = problem("mlp")

    class Named(nn.Linear):
        def forward(self, x: Tensor, names: list[str] | None = None) -> Tensor:
            return super().forward(x).square().mean()

    listed = {"x": x, "names": [f"sample {i}" for i in range(len(x))]}
    notes = autotune(Named(8, 8), listed, count=lambda b: len(b["x"]), compile=False).notes
    assert notes[0].startswith("Micro-batches left out: to divide a batch of 8 samples, ")
    assert notes[0].endswith("; make a tensor of it.")
    with pytest.raises(ValueError, match=r"is the batch, got .*; put what has no batch dimension"):
        autotune(model, (x, y[:3]), loss_fn, compile=False)
    with pytest.raises(ValueError, match=r"^fit: .*; leave micro_batch out and let the loader"):
        batch_size("fit", (x, y[:3]))
    notes = autotune(Named(8, 8), {"x": x}, compile=False).notes
    assert "; give count=, the terms of" in notes[0]
    assert "system" not in notes[0]
    assert "micro_batch" not in notes[0]


# The report


class Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])

    def handle_data(self, data):
        if self.rows:
            self.rows[-1].append(data)


@pytest.fixture
def report(told) -> TuningReport:
    told(by_precision, real=True)
    model = chain()
    budget = int(0.7 * measured(model, FP32, WIDE))
    return autotune(model, WIDE, nn.MSELoss(), budget, 0.004, compile=False)


def test_the_interval_of_the_first_candidate_is_that_of_the_fastest():
    candidates = Candidates(Workbench(*problem("mlp")), 10**9, 1.0, print)
    for settings in (FP32, BF16):
        candidates.record(settings)
    Race(candidates).settle({FP32: Ratio(1.0, 1.0, 1.0), BF16: Ratio(0.5, 0.4, 0.8)}, 1.1)
    assert candidates.trials[FP32].verdict == "slower: 2.00 [1.25, 2.50] times the fastest"
    assert candidates.trials[BF16].verdict == "best"


def test_a_first_look_has_no_ratio_to_times_of_a_race():
    best, race = Trial(FP32, 2.0, verdict="best"), Trial(BF16, 3.0, verdict="slower: 1.5 times")
    looks = ["slower: 5.3 times the fastest in a first look", "peak 58.8 KiB over budget"]
    trials = (best, race, *(Trial(Settings("fp16"), 1.26, verdict=look) for look in looks))
    lines = repr(TuningReport(FP32, trials, Ratio(1, 1, 1), (), 1.0, None, 0.1)).splitlines()
    assert lines[2].split()[:5] == ["fp32", "2000", "ms", "1.00", "best"]
    assert lines[3].split()[:5] == ["bf16", "3000", "ms", "1.50", "slower:"]
    assert lines[4].split()[:4] == ["fp16", "1260", "ms", "slower:"]
    assert lines[5].split()[:4] == ["fp16", "1260", "ms", "peak"]


def test_table(report):
    lines = report.table().splitlines()
    assert lines[0].startswith(f"{len(report.trials)} candidates in ")
    assert "gradient error up to 0.004" in lines[0]
    assert lines[1].split() == ["settings", "time", "ratio", "peak", "error", "verdict"]
    assert lines[2].startswith(str(report.best))
    assert " 1.00 " in lines[2]
    assert repr(report) == report.table()
    cells = Cells()
    cells.feed(report._repr_html_())
    assert [row[0] for row in cells.rows[1:]][: len(report.trials)] == [
        str(trial.settings) for trial in report.trials
    ]
