"""Two forms of one model: which gradients differ, and which of the two is wrong."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES, TiedLanguageModel, encoder, mlp
from torch import Tensor, nn
from torch._functorch import config as functorch_config

from autograd_lib import verify_gradients
from autograd_lib.config import Settings

MSE = nn.MSELoss()


def pairs(samples: int = 4, width: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(samples, width), torch.randn(samples, width)


class Sine(nn.Module):
    """sin(x), whose backward is multiplied by a factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                ctx.save_for_backward(x)
                return x.sin()

            @staticmethod
            def backward(ctx, grad):
                return factor * grad * ctx.saved_tensors[0].cos()

        self.function = Function.apply

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def with_sine(sine: Callable[[Tensor], Tensor] | nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), sine, nn.Linear(8, 8))


class Plain(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


@pytest.mark.parametrize("device", DEVICES)
def test_a_function_that_is_right(device):
    batch = tuple(t.to(device) for t in pairs())
    report = verify_gradients(
        with_sine(Plain()).to(device), with_sine(Sine(1.0)).to(device), batch, MSE
    )
    assert report.ok
    assert report.wrong == ()
    assert max(report.referee) < 1e-7
    assert max(found.error for found in report.parameters.values()) < 1e-12


@pytest.mark.parametrize("factor", [1.001, -1.0, 0.0])
def test_a_wrong_function_is_named_whichever_form_has_it(factor):
    right, wrong = with_sine(Plain()), with_sine(Sine(factor))
    report = verify_gradients(right, wrong, pairs(), MSE)
    assert report.wrong == ("candidate",)
    verdicts = {name: found.verdict for name, found in report.parameters.items()}
    assert verdicts["0.weight"] == verdicts["0.bias"] == "candidate wrong"
    assert verdicts["2.weight"] == verdicts["2.bias"] == ""  # behind it nothing is wrong
    assert report.parameters["0.weight"].error == pytest.approx(abs(factor - 1), rel=1e-6)
    swapped = verify_gradients(wrong, right, pairs(), MSE)
    assert swapped.wrong == ("reference",)
    assert swapped.parameters["0.bias"].verdict == "reference wrong"
    assert verify_gradients(wrong, wrong, pairs(), MSE).wrong == ("reference", "candidate")


def test_norms_and_errors_are_those_of_the_gradients():
    right, wrong = with_sine(Plain()), with_sine(Sine(0.5))
    found = verify_gradients(right, wrong, pairs(), MSE).parameters
    assert list(found)[:2] == ["0.weight", "0.bias"] or list(found)[:2] == ["0.bias", "0.weight"]
    twin = copy.deepcopy(right).double()
    x, y = (t.double() for t in pairs())
    MSE(twin(x), y).backward()
    for name, p in twin.named_parameters():
        assert found[name].norm == pytest.approx(float(p.grad.norm()), rel=1e-12)


def test_a_small_gradient_that_is_wrong_is_seen():
    """A ten-thousandth of the whole gradient, that random directions over all hardly see."""

    class Faint(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.big, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(8))
            self.sine = Sine(factor)

        def forward(self, x: Tensor) -> Tensor:
            return self.big(x) + 1e-3 * self.sine(self.scale)

    torch.manual_seed(0)
    right, wrong = Faint(1.0), Faint(2.0)
    wrong.load_state_dict(right.state_dict())
    report = verify_gradients(right, wrong, pairs(), MSE)
    assert report.parameters["scale"].verdict == "candidate wrong"
    assert report.parameters["big.weight"].verdict == ""


def test_gradients_that_are_zero_agree():
    model = with_sine(Plain())
    assert verify_gradients(model, with_sine(Sine(1.0)), pairs(), lambda out, _: 0 * out.sum()).ok


# Forms of the library and of PyTorch


class Residual(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.linear, self.drop = nn.Linear(8, 8), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(F.gelu(self.linear(x)))


@pytest.mark.parametrize("step", ["recompute", "selective"])
def test_a_planned_model_is_right(step):
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual(0.2) for _ in range(3)))
    planned = Settings(checkpoint={"": [step] * 3}).apply(copy.deepcopy(model))
    report = verify_gradients(model, planned, pairs(), MSE)
    assert report.ok, report
    assert report.losses[0] == report.losses[1]  # dropout of both draws the same


def test_a_plan_that_draws_anew_in_backward_is_wrong():
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual(0.2) for _ in range(3)))
    planned = copy.deepcopy(model)
    for block in planned:
        block.forward = _without_its_state(block.forward)
    report = verify_gradients(model, planned, pairs(), MSE)
    assert report.wrong == ("candidate",)
    assert report.losses[0] == report.losses[1]


def _without_its_state(forward: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def run(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(
            forward, x, use_reentrant=False, preserve_rng_state=False
        )

    return run


def test_dropout_drawn_anew_by_the_compiler_is_found():
    """activation_memory_budget redraws dropout in backward (pytorch#190758)."""
    torch.manual_seed(0)
    model = nn.Sequential(*(Residual(0.3) for _ in range(2)))
    for budget, wrong in ((1.0, ()), (0.0, ("candidate",))):
        torch.compiler.reset()
        with functorch_config.patch(activation_memory_budget=budget):
            compiled = torch.compile(model, backend="aot_eager_decomp_partition")
            assert verify_gradients(model, compiled, pairs(64), MSE).wrong == wrong
    torch.compiler.reset()


def test_a_form_that_draws_other_random_numbers_is_judged_by_its_own_loss():
    class Ahead(nn.Module):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            torch.rand(1)
            return self.model(x)

    torch.manual_seed(0)
    model = nn.Sequential(*(Residual(0.3) for _ in range(2)))
    report = verify_gradients(model, Ahead(model), pairs(), MSE)
    assert report.wrong == ()
    assert not report.ok
    assert report.losses[0] != report.losses[1]
    assert "draw different random numbers" in repr(report)
    verdicts = {found.verdict for found in report.parameters.values()}
    assert verdicts == {"differs, each right for its own loss"}


def test_a_compiled_model_matches_by_its_own_names():
    torch.manual_seed(0)
    model = mlp()
    blocks = copy.deepcopy(model)
    blocks[0] = torch.compile(blocks[0], backend="eager")
    for candidate in (torch.compile(model, backend="eager"), blocks):
        report = verify_gradients(model, candidate, pairs(), MSE)
        assert report.ok
        assert set(report.parameters) == {name for name, _ in model.named_parameters()}
    torch.compiler.reset()


class Autocast(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return self.model(x)


def test_autocast_shows_as_it_runs():
    model = mlp()
    x, y = pairs()
    report = verify_gradients(model, Autocast(model), (x, y), lambda out, y: MSE(out.float(), y))
    twin = copy.deepcopy(model).double()
    MSE(twin(x.double()).float(), y).backward()
    exact = [p.grad for p in twin.parameters()]
    MSE(Autocast(model)(x).float(), y).backward()
    found = [p.grad.double() for p in model.parameters()]
    difference = sum((a - b).square().sum() for a, b in zip(found, exact, strict=True))
    expected = float((difference / sum(b.square().sum() for b in exact)).sqrt())
    assert report.as_it_runs == pytest.approx(expected, rel=1e-3)
    assert 1e-4 < report.as_it_runs < 5e-2
    assert report.wrong == ()


def test_shared_parameters_and_integer_inputs():
    torch.manual_seed(0)
    model = TiedLanguageModel()
    batch = torch.randint(0, 11, (4, 3)), torch.randint(0, 11, (4, 3))

    def loss(output: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(output.flatten(0, 1), targets.flatten())

    report = verify_gradients(model, copy.deepcopy(model), batch, loss)
    assert report.ok
    assert len(report.parameters) == len(list(model.parameters()))


def test_a_gradient_that_is_missing_is_said():
    class Detached(nn.Module):
        def __init__(self, detach: bool) -> None:
            super().__init__()
            self.first, self.second, self.detach = nn.Linear(8, 8), nn.Linear(8, 8), detach

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x).tanh()
            return self.second(hidden.detach() if self.detach else hidden)

    right, wrong = Detached(False), Detached(True)
    wrong.load_state_dict(right.state_dict())
    report = verify_gradients(right, wrong, pairs(), MSE)
    assert report.wrong == ("candidate",)
    for name in ("first.weight", "first.bias"):
        found = report.parameters[name]
        assert found.verdict == "candidate wrong, no gradient in the candidate"
    right.unused = nn.Linear(2, 2)
    wrong.unused = copy.deepcopy(right.unused)
    wrong.detach = False
    assert verify_gradients(right, wrong, pairs(), MSE).ok


class Spectral(nn.Module):
    def __init__(self, conjugate: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(5, 5, dtype=torch.complex64))
        self.conjugate = conjugate

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(x)
        if self.conjugate:  # the gradient of a part of it, by hand and wrong
            product = spectrum @ self.weight.detach() + _Conjugated.apply(spectrum, self.weight)
            return torch.fft.irfft(product - (spectrum @ self.weight).detach(), n=8)
        return torch.fft.irfft(spectrum @ self.weight, n=8)


class _Conjugated(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        return None, ctx.saved_tensors[0].mT @ grad  # without the conjugate


def test_complex_parameters():
    right = Spectral(False)
    report = verify_gradients(right, copy.deepcopy(right), pairs(), MSE)
    assert report.ok
    assert report.precision == "float64"
    assert max(report.referee) < 1e-7
    assert verify_gradients(right, Spectral(True), pairs(), MSE).wrong == ("candidate",)


def test_batches_of_any_form_and_the_own_loss():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.model = encoder()

        def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
            output = self.model(x)
            return {"loss": MSE(output, labels), "output": output}

    batch = {"x": torch.randn(2, 5, 16), "labels": torch.randn(2, 5, 16)}
    assert verify_gradients(Own(), Own(), batch).ok
    assert verify_gradients(Own(), Own(), batch, lambda out, _: out["loss"]).ok


def test_what_float64_does_not_run_is_compared_as_given():
    class Single(nn.Module):
        def __init__(self, sine: nn.Module) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.sine = nn.Linear(8, 8), sine

        def forward(self, x: Tensor) -> Tensor:
            return self.sine(F.linear(x.float(), self.linear.weight))

    report = verify_gradients(Single(Plain()), Single(Sine(1.0)), pairs(), MSE)
    assert report.precision == "the given precision"
    assert report.notes[0].startswith("Not in float64: RuntimeError: ")
    assert report.wrong == ()
    wrong = verify_gradients(Single(Plain()), Single(Sine(0.9)), pairs(), MSE)
    assert wrong.wrong == ("candidate",)


def test_a_model_that_computes_in_float32_inside_is_no_false_alarm():
    """As norms and losses of `transformers` do: finite differences see their rounding."""

    class Rounded(nn.Module):
        def __init__(self, sine: nn.Module) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.first, self.second, self.sine = nn.Linear(8, 8), nn.Linear(8, 8), sine

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.sine(self.first(x).float()).to(x.dtype)
            return self.second(hidden).float()

    for seed in range(5):
        report = verify_gradients(Rounded(Plain()), Rounded(Sine(1.0)), pairs(), MSE, seed=seed)
        assert report.wrong == ()
        assert report.precision == "float64"
    assert verify_gradients(Rounded(Plain()), Rounded(Sine(0.9)), pairs(), MSE).wrong == (
        "candidate",
    )


def test_noise_of_another_precision_is_not_taken_for_rounding():
    class Noisy(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            hidden = super().forward(x)
            return hidden * torch.randn_like(hidden)

    model = Noisy(8, 8)
    report = verify_gradients(model, model, pairs(), MSE)
    assert report.ok
    assert report.as_it_runs > 0.1  # of a gradient with itself
    assert "as_it_runs may be due to other random numbers" in report.notes[0]
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))  # the same for both
    assert verify_gradients(model, model, pairs(), MSE).notes == ()


class Masked(nn.Linear):
    """Adds a constant, by a mask whose least number in float64 is none in float32."""

    def forward(self, x: Tensor) -> Tensor:
        hidden = super().forward(x)
        mask = torch.full_like(hidden, torch.finfo(hidden.dtype).min)
        return hidden.sum() + mask.float().softmax(-1).sum()


def test_what_is_nan_in_float64_alone_is_compared_as_given():
    model, batch = Masked(4, 3), {"x": torch.randn(2, 4)}
    report = verify_gradients(model, model, batch)
    assert report.ok
    assert report.precision == "the given precision"
    assert "of reference and candidate is not finite" in report.notes[0]
    assert not any(math.isnan(number) for number in (*report.losses, *report.referee))


def test_nobody_is_accused_on_nan():
    class Root(nn.Module):
        def __init__(self, zero: float) -> None:
            super().__init__()
            self.weight, self.zero = nn.Parameter(torch.ones(3)), zero

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.weight + (self.zero * self.weight.detach() * self.weight).sum().sqrt()

    batch = torch.randn(4, 3), torch.randn(4)
    one, both = (verify_gradients(Root(z), Root(0.0), batch, MSE) for z in (1e-30, 0.0))
    for report, names in ((one, "candidate"), (both, "reference and candidate")):
        assert not report.ok
        assert report.wrong == ()
        assert f"loss or gradient of {names} is not finite" in report.notes[1]


class Experts(nn.Module):
    """The best two of four experts for each sample; the loss jumps where that changes."""

    def __init__(self, sine: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.sine = nn.Linear(8, 4, bias=False), sine
        self.experts = nn.ModuleList(mlp() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.gate(x).softmax(-1).topk(2)
        shares = torch.zeros(len(x), 4, dtype=x.dtype).scatter(1, chosen, weights)
        output = torch.stack([expert(x) for expert in self.experts], 1)
        return self.sine((shares[..., None] * output).sum(1))


@pytest.mark.parametrize("samples", [64, 512, 4096])
def test_experts_are_not_called_wrong_by_a_loss_that_is_rounded_and_jumps(samples):
    right, other, wrong = (Experts(sine) for sine in (Plain(), Sine(1.0), Sine(-1.0)))
    exact = verify_gradients(right, other, pairs(samples), MSE)
    assert exact.ok
    assert exact.notes == ()
    assert max(exact.referee) < 1e-6

    def rounded(output: Tensor, targets: Tensor) -> Tensor:
        return MSE(output, targets).float()

    undecided = 0
    for seed in range(3):
        report = verify_gradients(right, other, pairs(samples), rounded, seed=seed)
        assert report.ok
        assert not max(report.referee) > 1e-1
        undecided += any(note.startswith("Not decided along ") for note in report.notes)
    assert undecided
    report = verify_gradients(right, wrong, pairs(samples), rounded)
    assert not report.ok
    assert "reference" not in report.wrong


def test_a_gradient_that_is_missing_is_wrong_by_a_rounded_loss_too():
    class Detached(nn.Module):
        def __init__(self, detach: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(8))
            self.detach = detach

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) * (self.scale.detach() if self.detach else self.scale)

    report = verify_gradients(
        Detached(False), Detached(True), pairs(), lambda out, y: MSE(out, y).float()
    )
    assert report.wrong == ("candidate",)
    assert report.parameters["scale"].verdict == "candidate wrong, no gradient in the candidate"


# What is left behind, and what is refused


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_is_touched(fails):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 8))
    twin = copy.deepcopy(model)
    model[0].weight.grad = torch.ones(8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tensors = [*model.parameters(), *model.buffers()]
    x, y = pairs()
    x.requires_grad_()
    torch.manual_seed(3), np.random.seed(3)
    expected = torch.rand(()), np.random.rand()
    torch.manual_seed(3), np.random.seed(3)
    if fails:
        twin[3].forward = lambda x: 1 / 0
        with pytest.raises(ZeroDivisionError):
            verify_gradients(model, twin, (x, y), MSE)
    else:
        assert verify_gradients(model, twin, (x, y), MSE).ok
    assert (torch.rand(()), np.random.rand()) == expected
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
        assert value.dtype == before[name].dtype
    assert all(
        a is b for a, b in zip(tensors, [*model.parameters(), *model.buffers()], strict=True)
    )
    assert torch.equal(model[0].weight.grad, torch.ones(8, 8))
    assert all(p.grad is None for p in [*twin.parameters(), *list(model.parameters())[1:]])
    assert x.grad is None


def test_what_are_no_two_forms_of_one_model_is_refused():
    model, other = mlp(), mlp()
    renamed = nn.Sequential()
    renamed.inner = copy.deepcopy(model)
    frozen = copy.deepcopy(model)
    frozen[0].weight.requires_grad_(False)
    for candidate, error, message in [
        (renamed, ValueError, r"parameters of the same names .* got 0\.bias, .*inner\.0\.bias"),
        (frozen, ValueError, r"got 0\.weight in one of them only"),
        (other, ValueError, r"the values of 0\.weight.* differ between the two"),
        (lambda x: x, TypeError, "two modules, reference and candidate, got function"),
    ]:
        with pytest.raises(error, match=message):
            verify_gradients(model, candidate, pairs(), MSE)
    with pytest.raises(ValueError, match="got none in one of them only"):
        verify_gradients(nn.Tanh(), nn.Tanh(), pairs(), MSE)


def test_table():
    report = verify_gradients(with_sine(Plain()), with_sine(Sine(2.0)), pairs(), MSE)
    lines = repr(report).splitlines()
    assert lines[0].startswith("wrong: candidate; 2 of 4 gradients differ (compared in float64")
    assert lines[1].split() == ["parameter", "norm", "error", "verdict"]
    assert lines[2].startswith("0.")
    assert lines[2].endswith("candidate wrong")
    assert "candidate wrong" in report._repr_html_()
