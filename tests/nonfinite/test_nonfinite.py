"""Planted faults named by phase, module, operation and line; steps that stay what they were."""

from __future__ import annotations

import gc
import inspect
import math
import pickle
import re
import sys
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES, FLOAT_DTYPES, MODELS, cnn, encoder, mlp
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _get_current_dispatch_mode_stack
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from autograd_lib.nonfinite.guard import NonFiniteGuard, find_nonfinite

INF, NAN = math.inf, math.nan


class Code(nn.Module):
    """A layer whose forward is the function that it is given."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def chain(function: Callable[[Tensor], Tensor], width: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, width), Code(function), nn.Linear(width, width))


def run(model: nn.Module, *inputs: Tensor, **more: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        loss = model(*inputs, **more).float().square().mean()  # the call
        loss.backward()
        return loss

    return step


X = torch.linspace(-1, 1, 12).view(3, 4)
FAULTS: dict[str, tuple[Callable[..., Any], tuple[str, str, str, str, str]]] = {}


def fault(
    phase: str, kind: str, module: str, op: str, backward_op: str = ""
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register a planted fault: a function that returns a model and a step.

    The line that is to be named ends in the comment `# here`; where there is none it is that of
    the call in `run`.
    """

    def register(case: Callable[..., Any]) -> Callable[..., Any]:
        name = case.__name__
        full = f"aten.{op}" if op and "." in op else op
        FAULTS[name] = case, (phase, kind, module, full, backward_op and f"aten.{backward_op}")
        return case

    return register


def line_of(function: Callable[..., Any], comment: str = "# here") -> int:
    lines, first = inspect.getsourcelines(function)
    (offset,) = [i for i, line in enumerate(lines) if line.rstrip().endswith(comment)]
    return first + offset


# --- multilayer perceptrons


@fault("forward", "nan", "1", "log.default")
def log_of_a_negative_number():
    model = chain(lambda x: (-x.abs()).log())  # here
    return model, run(model, X)


@fault("forward", "inf", "1", "log.default")
def log_of_zero():
    def entropy(x):
        p = x.relu()
        return -p * p.log()  # here

    model = chain(entropy)
    return model, run(model, X)


@fault("backward", "inf", "1", "sqrt.default", "div.Tensor")
def sqrt_at_zero():
    model = chain(lambda x: (x * 0).sqrt())  # here
    return model, run(model, X)


@fault("backward", "inf", "1", "sqrt.default", "div.Tensor")
def sqrt_of_a_square():
    def absolute(x):
        square = (x * 0) ** 2
        return square.sqrt()  # here

    model = chain(absolute)
    return model, run(model, X)


@fault("backward", "nan", "1", "sqrt.default", "div.Tensor")
def where_hides_only_the_forward():
    def safe(x):
        positive = x.relu()
        root = positive.sqrt()  # here
        return torch.where(positive > 0, root, 0)

    model = chain(safe)
    return model, run(model, X)


@fault("forward", "nan", "", "div.Tensor")
def zero_over_zero_in_the_loss():
    model = mlp(2, 4)

    def step():
        weights = torch.zeros(3)
        loss = (model(X).sum(-1) * weights).sum() / weights.sum()  # here
        loss.backward()

    return model, step


@fault("forward", "nan", "1", "sub.Tensor")
def infinity_less_infinity():
    model = chain(lambda x: x.masked_fill(x > 0, INF) - x.masked_fill(x > 0, INF))  # here
    return model, run(model, X)


@fault("forward", "inf", "1", "exp.default")
def exp_overflows_and_only_backward_suffers():
    model = chain(lambda x: 1 / (1000 * x.abs() + 100).exp())  # here
    return model, run(model, X)


@fault("forward", "nan", "1", "log_.default")
def in_place_on_a_view():
    def transform(x):
        y = x * 1
        y[0].sub_(9).log_()  # here
        return y

    model = chain(transform)
    return model, run(model, X)


@fault("backward", "inf", "1", "pow_.Scalar", "pow.Tensor_Scalar")
def in_place_on_a_view_backward():
    def transform(x):
        y = x * 0
        y[0].pow_(0.5)  # here
        return y

    model = chain(transform)
    return model, run(model, X)


@fault("forward", "nan", "1", "lift_fresh.default")
def a_nan_written_down():
    def transform(x):
        y = x * 1
        y[0] = NAN  # here
        return y

    model = chain(transform)
    return model, run(model, X)


@fault("forward", "nan", "1", "_foreach_log.default")
def a_foreach_operation():
    def transform(x):
        return sum(torch._foreach_log([x.abs(), -x.abs()]))  # here

    model = chain(transform)
    return model, run(model, X)


@fault("forward", "nan", "1", "log.out")
def an_operation_with_out():
    def transform(x):
        out = torch.empty_like(x)
        torch.log(-x.detach().abs(), out=out)  # here
        return x * out

    model = chain(transform)
    return model, run(model, X)


@fault("forward", "nan", "1", "div.Tensor")
def complex_numbers():
    def transform(x):
        z = torch.complex(x, x) * 0
        return (z / z).real  # here

    model = chain(transform)
    return model, run(model, X)


@fault("forward", "inf", "1", "reciprocal.default")
def integers_divide():
    model = chain(lambda x: 0 * x * (x * 0).long().reciprocal())  # here
    return model, run(model, X)


@fault("forward", "inf", "1", "_to_copy.default")
def half_precision_overflows():
    def transform(x):
        scores = (x.abs() * 1e6).half()  # here
        return (scores - scores.amax()).float()

    model = chain(transform)
    return model, run(model, X)


@fault("forward", "inf", "0", "addmm.default")
def half_precision_overflows_under_autocast():
    model = chain(lambda x: x - x.amax())
    with torch.no_grad():
        model[0].weight.fill_(300)

    def step():
        with torch.autocast("cpu", torch.float16):
            loss = model(300 * torch.ones(3, 4)).float().sum()  # here
        loss.backward()

    return model, step


@fault("backward", "nan", "1", "sqrt.default", "div.Tensor")
def autograd_grad_instead_of_backward():
    model = chain(lambda x: (x * 0).sqrt())  # here

    def step():
        loss = (model[:2](X) * 0).sum()
        torch.autograd.grad(loss, [*model[0].parameters()])

    return model, step


@fault("backward", "inf", "1", "pow.Tensor_Scalar", "pow.Tensor_Scalar")
def the_second_of_two_backwards():
    model = chain(lambda x: (x * 0) ** 0.5)  # here

    def step():
        model[0](X).sum().backward()
        model(X).sum().backward()

    return model, step


@fault("forward", "nan", "1", "log.default")
def inside_vmap_of_grad():
    model = chain(lambda x: x.abs().neg().log())  # here
    return model, lambda: torch.func.vmap(torch.func.grad(lambda row: model(row).sum()))(X)


@fault("backward", "inf", "1", "sqrt.default", "div.Tensor")
def inside_jacrev():
    model = chain(lambda x: (x * 0).sqrt())  # here
    return model, lambda: torch.func.jacrev(lambda x: model(x).sum())(X)


@fault("backward", "inf", "1", "pow.Tensor_Scalar", "pow.Tensor_Scalar")
def the_second_derivative():
    """At 0 there is a slope, and no curvature; autograd passes zeros that have no memory."""
    model = chain(lambda x: (x * 0).abs() ** 1.5)  # here

    def step():
        h = model[0](X)
        (slope,) = torch.autograd.grad(model[1](h).sum(), h, create_graph=True)
        slope.sum().backward()

    return model, step


@fault("backward", "inf", "", "sqrt.default", "div.Tensor")
def a_sparse_gradient():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True))
    return model, lambda: (model(torch.tensor([1, 2, 2])) * 0).sqrt().sum().backward()  # here


@fault("forward", "inf", "", "_ctc_loss.Tensor")
def more_labels_than_frames():
    model = chain(lambda x: x)

    def step():
        scores = model(X)[:, None].log_softmax(-1)
        lengths = torch.tensor([3])
        loss = F.ctc_loss(scores, torch.tensor([[1, 1, 1]]), lengths, lengths)  # here
        loss.backward()

    return model, step


# --- gradients that overflow, and sums of them


@fault("backward", "inf", "0", "mul.Tensor", "mul.Tensor")
def an_infinite_gradient_without_nan():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(4))

        def forward(self, x):
            return 1e30 * (1e30 * (1e-30 * (1e-30 * x * self.scale)))

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.full((4,), 1e-30))

        def forward(self, x):
            return self.weight * x  # here

    model = nn.Sequential(Product())

    def step():
        (model(torch.full((4,), 1e25)) * 1e25).sum().backward()

    return model, step


# --- parameters, buffers, inputs


@fault("parameter", "nan", "0", "addmm.default")
def nan_in_a_parameter():
    model = mlp(2, 4)
    with torch.no_grad():
        model[0].weight[1, 1] = NAN
    return model, run(model, X)


@fault("parameter", "inf", "2", "sub.Tensor")
def inf_in_a_parameter():
    model = mlp(2, 4)
    with torch.no_grad():
        model[2].bias[1] = INF

    def step():
        y = model(X)
        loss = (y - y.amax()).sum()  # here
        loss.backward()
        return loss

    return model, step


@fault("parameter", "nan", "1", "native_batch_norm.default")
def nan_in_a_buffer():
    model = cnn().eval()
    model[1].running_mean[2] = NAN
    return model, run(model, torch.randn(3, 1, 6, 6))


@fault("input", "nan", "0", "addmm.default")
def nan_in_the_input():
    model = mlp(2, 4)
    return model, run(model, torch.where(X > 0.9, NAN, X))


@fault("input", "inf", "", "sub.Tensor")
def inf_in_the_input():
    model = Code(lambda x: x - x.mean())  # here
    return model, run(model, torch.where(X > 0.9, INF, X).requires_grad_())


@fault("input", "nan", "", "mse_loss.default")
def nan_in_the_target():
    model = mlp(2, 4)
    target = torch.full((3, 4), NAN)

    def step():
        F.mse_loss(model(X), target).backward()  # here

    return model, step


# --- convolutional networks


@fault("backward", "nan", "2", "std.correction", "div.Tensor")
def a_constant_channel_has_no_deviation():
    def standardize(x):
        spread = x.std(dim=(2, 3), keepdim=True)  # here
        return (x - x.mean(dim=(2, 3), keepdim=True)) / (spread + 1e-5)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), Code(standardize))
    with torch.no_grad():
        model[0].bias.fill_(-100.0)
    return model, run(model, torch.randn(4, 1, 8, 8))


@fault("forward", "inf", "0", "convolution.default")
def a_convolution_overflows():
    model = cnn()
    with torch.no_grad():
        model[0].weight.fill_(1e20)
    return model, run(model, torch.full((3, 1, 6, 6), 1e20))


# --- recurrent networks


@fault("forward", "inf", "cell", "addmm.default")
def a_recurrent_net_explodes():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell = nn.Linear(4, 4)
            nn.init.constant_(self.cell.weight, 50.0)

        def forward(self, x):
            h = x
            for _ in range(40):
                h = self.cell(h)  # here
            return h - h.mean()

    model = Net()
    return model, run(model, X)


@fault("parameter", "nan", "0", "mkldnn_rnn_layer.default")
def an_lstm_with_a_broken_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.LSTM(4, 5, batch_first=True))
    with torch.no_grad():
        model[0].weight_hh_l0[0, 0] = NAN

    def step():
        model(X[None])[0].sum().backward()  # here

    return model, step


@fault("backward", "nan", "norm", "sqrt.default", "div.Tensor")
def a_gru_whose_states_are_normalized():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(4, 5, batch_first=True)
            self.norm = Code(lambda h: h / ((h * h).sum(-1, keepdim=True).sqrt() + 1e-8))  # here

        def forward(self, x):
            return self.norm(self.rnn(x)[0] * 0)

    model = Net()
    return model, run(model, X[None])


# --- transformers


@fault("forward", "nan", "layers.1", "_softmax.default")
def a_row_that_is_masked_entirely():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.query, self.key = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            scores = self.query(x) @ self.key(x).mT
            mask = torch.ones(3, 3, dtype=torch.bool).tril(-1)  # forgets the diagonal
            weights = scores.masked_fill(~mask, -INF).softmax(-1)  # here
            return weights @ x

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4, 4), Attention()])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    model = Model()
    return model, run(model, X[None])


@fault("input", "inf", "", "_softmax.default")
def a_mask_of_nothing_but_infinities():
    class Attention(nn.Module):
        def forward(self, x, mask):
            return (x @ x.mT + mask).softmax(-1) @ x  # here

    model = Attention()
    return model, run(model, X.clone().requires_grad_(), mask=torch.full((3, 3), -INF))


@fault("parameter", "nan", "layers.0.norm1", "native_layer_norm.default")
def an_encoder_with_a_broken_norm():
    model = encoder()
    with torch.no_grad():
        model.layers[0].norm1.weight[3] = NAN
    return model, run(model, torch.randn(2, 5, 16))


@fault("backward", "nan", "", "logsumexp.default", "sub.Tensor")
def log_partition_of_no_candidates():
    model = encoder()

    def step():
        scores = model(torch.randn(2, 5, 16)).masked_fill(torch.tensor(True), -INF)
        total = scores.logsumexp(-1)  # here
        total.masked_fill(total.isinf(), 0).sum().backward()

    return model, step


# --- custom Functions


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 3 * grad * x**3 / x  # in the backward of Cube


class LogOfNegative(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (-x.abs()).log()  # in the forward of LogOfNegative

    @staticmethod
    def backward(ctx, grad):
        return grad


@fault("backward", "nan", "1", "Cube", "div.Tensor")
def a_function_s_backward():
    model = chain(lambda x: Cube.apply(x.relu()))
    return model, run(model, X)


@fault("forward", "nan", "1", "log.default")
def a_function_s_forward():
    model = chain(LogOfNegative.apply)
    return model, run(model, X)


@fault("backward", "nan", "1", "mul.Tensor", "log.default")
def a_hook_on_a_tensor():
    def transform(x):
        y = x * 2
        y.register_hook(lambda grad: (-grad.abs() - 1).log())  # here
        return y

    model = chain(transform)
    return model, run(model, X)


# --- checkpointed


class Checkpointed(nn.Module):
    def __init__(self, inner: nn.Module, reentrant: bool) -> None:
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)


@fault("backward", "inf", "1.inner.1", "sqrt.default", "div.Tensor")
def checkpointed_backward():
    inner = chain(lambda x: (x * 0).sqrt())  # here
    model = nn.Sequential(nn.Linear(4, 4), Checkpointed(inner, False))
    return model, run(model, X)


@fault("backward", "inf", "1.inner.1", "sqrt.default", "div.Tensor")
def checkpointed_backward_reentrant():
    inner = chain(lambda x: (x * 0).sqrt())  # here
    model = nn.Sequential(nn.Linear(4, 4), Checkpointed(inner, True))
    return model, run(model, X)


@fault("forward", "inf", "1.inner.1", "exp.default")
def checkpointed_forward_that_only_backward_suffers():
    inner = chain(lambda x: 1 / (1000 * x.abs() + 100).exp())  # here
    model = nn.Sequential(nn.Linear(4, 4), Checkpointed(inner, False))
    return model, run(model, X)


# --- compiled


@fault("backward", "inf", "1", "sqrt.default", "div.Tensor")
def compiled_backward():
    inner = chain(lambda x: (x * 0).sqrt())  # here
    model = torch.compile(inner, backend="aot_eager")
    return model, run(model, X)


@fault("forward", "nan", "1", "log.default")
def compiled_in_place():
    model = chain(lambda x: (-x.abs()).log())  # here
    model.compile(backend="eager")
    return model, run(model, X)


@fault("forward", "inf", "0.1", "log.default")
def compiled_inside_an_eager_model():
    inner = chain(lambda x: -x.relu() * x.relu().log())  # here
    model = nn.Sequential(torch.compile(inner, backend="eager"), nn.Linear(4, 4))
    return model, run(model, X)


COMPILED = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"  # Dynamo's own
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()


@COMPILED
@pytest.mark.parametrize("name", FAULTS)
def test_the_planted_fault_is_named(name):
    case, expected = FAULTS[name]
    torch.manual_seed(0)
    model, step = case()
    found = find_nonfinite(model, step)
    assert found is not None
    assert (found.phase, found.kind, found.module, found.op, found.backward_op) == expected
    comment = "# here" if "# here" in inspect.getsource(case) else None
    line = line_of(case) if comment else line_of(run, "# the call")
    for function, name_of in [
        (Cube, "a_function_s_backward"),
        (LogOfNegative, "a_function_s_forward"),
    ]:
        if name == name_of:
            line = line_of(function, f"ward of {function.__name__}")
    assert found.location == f"{__file__}:{line}"
    assert any(text.startswith(f"> {line:>4}") for text in found.source)
    assert repr(find_nonfinite(model, step)) == repr(found)  # the first run left no trace


def test_the_table_is_long_enough():
    assert len(FAULTS) >= 40
    phases = [expected[0] for _, expected in FAULTS.values()]
    assert all(phases.count(phase) >= 3 for phase in ("parameter", "input", "forward", "backward"))


@pytest.mark.parametrize(
    ("name", "parameter"),
    [
        ("nan_in_a_parameter", "0.weight"),
        ("inf_in_a_parameter", "2.bias"),
        ("nan_in_a_buffer", "1.running_mean"),
        ("nan_in_the_input", "input"),
        ("inf_in_the_input", "x"),
        ("nan_in_the_target", "target"),
        ("a_mask_of_nothing_but_infinities", "mask"),
    ],
)
def test_what_was_given_has_a_name(name, parameter):
    model, step = FAULTS[name][0]()
    assert find_nonfinite(model, step).name == parameter


def test_arguments_nested_in_containers_have_a_path():
    class Nested(nn.Module):
        def forward(self, pair, *more, options):
            return pair[0] + pair[1] + options["scale"][0] + more[0]

    def name(broken):
        tensors = [torch.zeros(2, requires_grad=True) for _ in range(4)]
        tensors[broken] = torch.tensor([NAN, 0], requires_grad=True)
        a, b, c, d = tensors
        model = Nested()
        found = find_nonfinite(model, lambda: model((a, b), d, options={"scale": [c]}).sum())
        return found.phase, found.name

    assert [name(i) for i in range(4)] == [
        ("input", "pair[0]"),
        ("input", "pair[1]"),
        ("input", "options['scale'][0]"),
        ("input", "more[0]"),
    ]


def test_something_given_and_never_used_is_still_named():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("spare", torch.tensor([NAN]))

        def forward(self, x, mask):
            return self.linear(x)

    model = Unused()
    found = find_nonfinite(model, run(model, X, torch.zeros(3)))
    assert (found.phase, found.name, found.op, found.location) == ("parameter", "spare", "", "")
    del model.spare
    found = find_nonfinite(model, run(model, X, torch.tensor([NAN])))
    assert (found.phase, found.name) == ("input", "mask")


def test_an_input_that_the_step_computed_is_the_step_s_fault():
    model = mlp(2, 4)

    def step():
        x = (X - 2).log()
        model(x).sum().backward()

    found = find_nonfinite(model, step)
    assert (found.phase, found.module, found.op) == ("forward", "", "aten.log.default")

    def infinite():
        model((0 * X).log()).sum().backward()

    found = find_nonfinite(model, infinite)
    assert (found.phase, found.kind, found.op) == ("forward", "inf", "aten.log.default")


def hidden_by_where(model, y):
    return torch.where(y.isnan(), 0.0, model(X) - y).square().mean()


def hidden_by_nan_to_num(model, y):
    return (model(X) - y).nan_to_num().square().mean()


def hidden_after_a_look(model, y):
    """The target is seen before the model runs, so its NaN is the earlier one."""
    y = y * 1
    return torch.where(y.isnan(), 0.0, model(X) - y).square().mean()


class Sentinel(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp(2, 4)
        self.register_buffer("last", torch.full((3, 4), NAN))

    def forward(self, x, unused=None):
        y = self.net(x)
        return torch.where(self.last.isnan(), y, self.last)


@pytest.mark.parametrize("hidden", [hidden_by_where, hidden_by_nan_to_num, hidden_after_a_look])
@pytest.mark.parametrize("look", [find_nonfinite, lambda m, s: NonFiniteGuard(m)(s)])
def test_a_given_nan_that_is_masked_out_hides_no_real_fault(hidden, look):
    model = mlp(2, 4)
    y = torch.zeros(3, 4)
    y[2] = NAN

    def backward_fails():
        square = (model(X) - model(X.clone())).square().sum(1)
        loss = hidden(model, y) + square.sqrt().mean()  # here
        loss.backward()
        return loss

    found = look(model, backward_fails)
    assert (found.phase, found.kind, found.op) == ("backward", "inf", "aten.sqrt.default")
    line = line_of(test_a_given_nan_that_is_masked_out_hides_no_real_fault)
    assert found.location == f"{__file__}:{line}"

    def forward_fails():
        loss = hidden(lambda x: (model(x).abs() * -1 - 1).log(), y)
        loss.backward()
        return loss

    if hidden is not hidden_by_nan_to_num:  # which hides this one too
        found = look(model, forward_fails)
        assert (found.phase, found.op) == ("forward", "aten.log.default")

    def healthy():
        loss = hidden(model, y)
        loss.backward()
        return loss

    assert NonFiniteGuard(model)(healthy) is None
    found = find_nonfinite(model, healthy)
    assert found.phase == "input"
    assert found.detail.endswith("it reaches neither the loss nor a gradient")


def test_a_sentinel_and_an_unused_argument_hide_no_real_fault():
    model = Sentinel()

    argument = torch.full((2,), NAN)
    found = find_nonfinite(model, lambda: (model(X, argument) * 0).square().sum().sqrt().backward())
    assert (found.phase, found.op) == ("backward", "aten.sqrt.default")


def test_a_given_nan_that_reaches_the_loss_is_the_culprit_before_what_it_caused():
    model = mlp(2, 4)
    y = torch.zeros(3, 4)
    y[2] = NAN
    found = find_nonfinite(model, lambda: (model(X) - y).square().mean().sqrt().backward())
    assert (found.phase, found.name, found.op) == ("input", "other", "aten.sub.Tensor")
    with torch.no_grad():
        model[2].bias[0] = NAN
    found = find_nonfinite(model, lambda: (model(X) * 0).square().sum(0).sqrt().sum().backward())
    assert (found.phase, found.name) == ("parameter", "2.bias")


def test_a_row_written_later_does_not_take_the_blame():
    def transform(x):
        out = torch.zeros_like(x)
        out[0] = (-x[0].detach().abs()).log()  # here
        out[1] = torch.zeros(4) / torch.zeros(4)
        return x + out

    model = chain(transform)
    found = find_nonfinite(model, run(model, X))
    assert found.op == "aten.log.default"


def test_gradients_left_from_a_faulty_step_do_not_take_the_blame():
    model = chain(lambda x: (x * 0).sqrt())
    step = run(model, X)
    step()
    assert model[0].weight.grad.isnan().any()
    model.unused = nn.Linear(2, 2, bias=False)  # what the step does not reach keeps its own
    model.unused.weight.grad = torch.full((2, 2), NAN)
    model.forward = lambda x: model[2](model[1](model[0](x)))
    assert find_nonfinite(model, step).op == "aten.sqrt.default"


def test_an_argument_of_an_operation_is_titled_as_such():
    model = mlp(2, 4)
    y = torch.full((3, 4), NAN)

    def step():
        y.isnan().any()  # sees it first, under another name
        (model(X) - y).sum().backward()

    found = find_nonfinite(model, step)
    assert repr(found).startswith("NaN in argument 'other' of aten.sub.Tensor\n")
    assert (found.phase, found.name, found.inputs[0].name) == ("input", "other", "other")
    model, step = FAULTS["nan_in_the_input"][0]()
    assert repr(find_nonfinite(model, step)).startswith("NaN in input 'input'\n")


def test_the_finding_is_noted_on_an_exception_that_the_nan_causes():
    model = chain(lambda x: (-x.abs()).log())

    def step():
        torch.distributions.Normal(model(X), 1.0, validate_args=True)

    with pytest.raises(ValueError, match="Expected parameter loc") as raised:
        find_nonfinite(model, step)
    (note,) = raised.value.__notes__
    assert note.startswith("NaN made in forward by aten.log.default")


def test_torch_func_within_the_step():
    model = mlp(2, 4)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, x):
        return torch.func.functional_call(model, parameters, (x,)).square().mean()

    def passed(x):
        return lambda: torch.func.grad(loss)(parameters, x)

    def captured(x):
        return lambda: torch.func.grad(lambda parameters: loss(parameters, x))(parameters)

    def batched(x):
        rows = x[:, None]

        def losses(parameters):
            return torch.vmap(lambda row: loss(parameters, row))(rows)

        return lambda: torch.func.jacrev(losses)(parameters)

    for step in (passed, captured, batched):
        assert find_nonfinite(model, step(X)) is None
        for value, kind in [(NAN, "nan"), (INF, "inf")]:
            found = find_nonfinite(model, step(torch.where(X > 0.9, value, X)))
            assert (found.phase, found.kind, found.name) == ("input", kind, "input")
            assert found.op == "aten.addmm.default" or step is batched


def test_a_gradient_that_was_broken_before_is_told_apart():
    model = mlp(2, 4)
    model[0].weight.grad = torch.full((4, 4), NAN)
    found = find_nonfinite(model, run(model, X))
    assert (found.phase, found.name) == ("backward", "0.weight")
    assert "before the step" in found.detail


def test_inputs_are_those_before_the_operation_ran():
    model = chain(lambda x: (x * 0 - 2).add_(1).log_().add_(5))
    found = find_nonfinite(model, run(model, X))
    assert found.op == "aten.log_.default"
    (operand,) = found.inputs
    assert operand == ("self", (3, 4), torch.float32, -1.0, -1.0)


def test_inputs_of_several_dtypes():
    weight = nn.Embedding(5, 4).weight
    model = Code(lambda x: torch.where(x > 0, x, weight[:3]) / torch.tensor([[0], [1], [2]]))
    found = find_nonfinite(model, lambda: (model(0 * X) * 0).sum().backward())
    assert found.kind == "inf"
    assert [operand.dtype for operand in found.inputs] == [torch.float32, torch.int64]
    assert found.inputs[1][3:] == (0.0, 2.0)
    z = torch.tensor([3 + 4j, 1j], requires_grad=True)
    found = find_nonfinite(nn.Identity(), lambda: (z / torch.zeros(2)).abs().sum())
    assert found.inputs[0] == ("self", (2,), torch.complex64, 1.0, 5.0)


def test_the_report():
    model, step = FAULTS["log_of_a_negative_number"][0]()
    found = find_nonfinite(model, step)
    line = line_of(FAULTS["log_of_a_negative_number"][0])
    text = repr(found).splitlines()
    assert text[0] == "NaN made in forward by aten.log.default"
    assert text[1].split() == ["module", "1"]
    assert text[2].split() == ["location", f"{__file__}:{line}"]
    assert text[4].split(maxsplit=2)[:2] == [">", str(line)]
    assert "(-x.abs()).log()" in text[4]
    assert text[-2].split() == ["inputs", "shape", "dtype", "min", "max"]
    assert text[-1].split()[:4] == ["self", "(3,", "4)", "float32"]
    assert pickle.loads(pickle.dumps(found)) == found


def test_the_report_says_what_followed():
    def titles(name):
        model, step = FAULTS[name][0]()
        found = find_nonfinite(model, step)
        return repr(found).splitlines()[0], found.detail

    assert titles("log_of_zero") == (
        "Inf made in forward by aten.log.default",
        "its Inf becomes a NaN in aten.mul.Tensor",
    )
    assert titles("sqrt_at_zero") == (
        "Inf made in backward by aten.div.Tensor, for aten.sqrt.default",
        "its Inf becomes a NaN in aten.mul.Tensor",
    )
    assert titles("nan_in_a_parameter") == ("NaN in parameter '0.weight'", "")
    title, detail = titles("an_infinite_gradient_without_nan")
    assert title == "Inf made in backward by aten.mul.Tensor, for aten.mul.Tensor"
    assert detail == "it reaches the gradient of '0.weight'"


def test_a_cell_of_a_notebook_is_named_by_its_number():
    from IPython.core.interactiveshell import InteractiveShell  # noqa: PLC0415

    shell = InteractiveShell.instance()
    try:
        shell.run_cell(
            "import torch\nfrom autograd_lib.nonfinite.guard import find_nonfinite\n"
            "x = torch.zeros(2, requires_grad=True)\n"
            "found = find_nonfinite(torch.nn.Identity(), lambda: (x / x).sum())",
            store_history=True,
        ).raise_error()
        found = shell.user_ns["found"]
        assert found.location == f"Cell In[{shell.execution_count - 1}]:4"
        assert "(x / x).sum()" in found.source[-1]
    finally:
        InteractiveShell.clear_instance()


# --- what is legal


def causal(x):
    mask = torch.full((3, 3), -INF).triu(1)
    return ((x @ x.mT) + mask).softmax(-1) @ x


def masked(x):
    return (x @ x.mT).masked_fill(torch.ones(3, 3).triu(1).bool(), -INF).softmax(-1) @ x


def masked_by_a_constant(x):
    mask = torch.tensor([[0, -INF, -INF], [0, 0, -INF], [0, 0, 0]])
    return torch.log_softmax(x @ x.mT + mask, -1).exp() @ x


def log_of_a_mask(x):
    return (x @ x.mT + torch.ones(3, 3).tril().log()).softmax(-1) @ x


def fully_masked_but_safe(x):
    mask = torch.tensor([[False] * 3, [True] * 3, [True] * 3])
    return F.scaled_dot_product_attention(x[None, None], x[None, None], x[None, None], mask)


def masked_and_checkpointed(x):
    def scores(x):
        return (x @ x.mT).masked_fill(torch.ones(3, 3).triu(1).bool(), -INF)

    return checkpoint(scores, x, use_reentrant=True).softmax(-1) @ x


def running_maximum(x):
    best = torch.full((3,), -INF)
    for column in x.unbind(1):
        best = torch.maximum(best, column)
    return x - best[:, None]


def buffer_filled_row_by_row(x):
    out = torch.empty_like(x)
    for i, row in enumerate(x):
        out[i] = row * 2
    return out + x.new_empty(3, 4).copy_(x)


def sentinel_filled_later(x):
    out = torch.full_like(x, NAN)
    out[:] = x
    return out + torch.nan_to_num(torch.full_like(x, NAN))


def infinity_thrown_away(x):
    return x + (1 / (x.detach() * 0).abs()).clamp(max=1.0)


def sum_that_overflows(x):
    return (x * 0 + 3e38).clamp(max=1.0)


def only_in_eval(x):
    return x


class OnlyInEval(nn.Module):
    def forward(self, x):
        return x if self.training else x.log() / 0


LEGAL = {
    **{f.__name__: f for f in (causal, masked, masked_by_a_constant, log_of_a_mask)},
    **{f.__name__: f for f in (fully_masked_but_safe, running_maximum, infinity_thrown_away)},
    "masked_and_checkpointed": masked_and_checkpointed,
    **{f.__name__: f for f in (buffer_filled_row_by_row, sentinel_filled_later)},
    "a sum that overflows": sum_that_overflows,
    "dropout": nn.Dropout(0.9),
    "inf in eval only": OnlyInEval(),
}


@pytest.mark.parametrize("name", LEGAL)
def test_what_is_legal_is_not_reported(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), Code(LEGAL[name]))
    step = run(model, X)
    with_nan_in_new_memory = name in ("buffer_filled_row_by_row", "dropout", "causal")
    torch.use_deterministic_algorithms(with_nan_in_new_memory)  # fills it with NaN
    try:
        assert find_nonfinite(model, step) is None
        assert NonFiniteGuard(model)(step) is None
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_healthy_models_have_nothing_to_report(name, device):
    make, sample = MODELS[name]
    model, x = make().to(device), sample().to(device)
    assert find_nonfinite(model, run(model, x)) is None
    assert find_nonfinite(model.eval(), run(model, x)) is None
    with torch.no_grad():  # the fast path of nn.TransformerEncoder, with nested tensors
        assert find_nonfinite(model, lambda: model(x)) is None


def test_the_fast_path_with_padding():
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    x = torch.randn(2, 5, 16)

    @torch.no_grad()
    def look():
        return find_nonfinite(model, lambda: model(x, src_key_padding_mask=padding))

    with pytest.warns(UserWarning, match="nested tensors"):
        assert look() is None
    x[1, 0, 0] = NAN
    found = look()
    assert (found.phase, found.name) == ("input", "src")


def test_an_infinite_loss_is_reported_and_memory_never_filled():
    model = nn.Linear(4, 4)
    found = find_nonfinite(model, lambda: model(X).masked_fill(X > 0, INF).sum().backward())
    assert (found.kind, found.op) == ("inf", "aten.masked_fill.Scalar")
    assert found.detail == "it reaches the loss"
    torch.use_deterministic_algorithms(True)
    try:
        found = find_nonfinite(model, lambda: (model(X) + torch.empty(3, 4)).sum().backward())
    finally:
        torch.use_deterministic_algorithms(False)
    assert (found.kind, found.op) == ("nan", "aten.empty.memory_format")


def test_an_operator_that_takes_a_function():
    from torch.nn.attention.flex_attention import flex_attention  # noqa: PLC0415

    model = nn.Linear(16, 16)
    q = torch.randn(1, 1, 16, 16)

    @torch.no_grad()
    def step(score_mod=None):
        return flex_attention(q, model(q), q, score_mod=score_mod).sum()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is slow uncompiled
        assert find_nonfinite(model, step) is None
        found = find_nonfinite(model, lambda: step(lambda score, *_: score * NAN))
    assert (found.phase, found.kind, found.op) == ("forward", "nan", "flex_attention")


def test_a_value_that_no_operation_made_is_admitted():
    model = nn.Linear(4, 4)

    def step():
        h = model(X)
        h.detach().numpy()[0] = np.nan
        (h * 2).sum().backward()

    found = find_nonfinite(model, step)
    assert found.op == ""
    assert "by no operation of PyTorch" in found.detail


# --- everything is put back, and nothing stays behind


class Drawing(nn.Module):
    """Dropout, running statistics; buffers replaced, changed through `.data`, not writable."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("scale", torch.tensor([[0.5], [2.0]]).expand(2, 4))
        with torch.inference_mode():
            self.register_buffer("seen", torch.zeros(2))

    def forward(self, x):
        y = self.net(x) * self.scale[0].clone()
        self.scale[:, 0].mul_(1.5)
        with torch.inference_mode():
            self.seen.add_(1)
        self.calls = self.calls + 1
        self.average.data.mul_(0.9).add_(y.detach().mean(0))
        return y


def snapshot(model: nn.Module) -> list[Any]:
    state = [tensor.clone() for tensor in model.state_dict().values()]
    grads = [None if p.grad is None else p.grad.to_dense().clone() for p in model.parameters()]
    return [*state, *grads, torch.get_rng_state()]


def same(a: list[Any], b: list[Any]) -> bool:
    """Bit by bit, NaN included."""
    return len(a) == len(b) and all(
        x is y if x is None or y is None else x.dtype == y.dtype and torch.equal(bits(x), bits(y))
        for x, y in zip(a, b, strict=True)
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def hooks_left(model: nn.Module) -> list[Any]:
    found: list[Any] = [
        hook
        for module in model.modules()
        for name, table in vars(module).items()
        if name.endswith("_hooks")
        for hook in table.values()
    ]
    found += [p._backward_hooks for p in model.parameters() if p._backward_hooks]
    found += [p for p in model.parameters() if p._post_accumulate_grad_hooks]
    found += _get_current_dispatch_mode_stack()
    if not torch.autograd.is_multithreading_enabled():
        found.append("multithreading off")
    return found


def broken(model: nn.Module, how: str) -> Callable[[], Tensor]:
    def step() -> Tensor:
        loss = model(X).square().mean()
        with torch.no_grad():
            next(model.parameters()).mul_(2)
        if how == "raises in forward":
            raise LookupError("planted")
        if how == "raises in backward":
            loss.register_hook(lambda grad: {}[grad])
        if how == "nan":
            loss = loss * (loss - loss) / (loss - loss)
        loss.backward()
        return loss

    return step


@pytest.mark.parametrize("grads", ["none", "there"])
@pytest.mark.parametrize("how", ["fine", "nan", "raises in forward", "raises in backward"])
def test_find_nonfinite_leaves_no_trace(how, grads):
    torch.manual_seed(3)
    model = Drawing()
    if grads == "there":
        model(X).sum().backward()
    objects = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    before = snapshot(model)
    step = broken(model, how)
    if how.startswith("raises"):
        with pytest.raises((LookupError, KeyError)):
            find_nonfinite(model, step)
    else:
        assert (find_nonfinite(model, step) is None) == (how == "fine")
    assert same(snapshot(model), before)
    after = [*model.parameters(), *model.buffers(), *(p.grad for p in model.parameters())]
    assert all(a is b for a, b in zip(after, objects, strict=True))
    assert hooks_left(model) == []


def test_a_graph_from_before_the_step_stays_valid():
    model = mlp(2, 4)
    earlier = model(X).sum()
    assert find_nonfinite(model, run(model, X)) is None
    earlier.backward()  # raises if the restored parameters counted as modified


def test_nothing_keeps_the_model_alive():
    model = mlp(2, 4)
    guard = NonFiniteGuard(model)
    step = run(model, torch.full((3, 4), NAN))
    assert guard(step) is not None
    assert find_nonfinite(model, step) is not None
    alive = weakref.ref(model), weakref.ref(model[0].weight)
    del model, step
    gc.collect()
    assert [reference() for reference in alive] == [None, None]
    with pytest.raises(RuntimeError, match=r"NonFiniteGuard: expected the model .* deleted"):
        guard(lambda: None)


@pytest.mark.parametrize("nan", [False, True])
def test_gradients_that_cannot_be_written_in_place_are_put_back(nan):
    model = nn.Linear(4, 4)
    model.weight.grad = torch.tensor(2.0).expand(4, 4)
    with torch.inference_mode():
        model.bias.grad = torch.ones(4)

    def step():
        with torch.no_grad():
            model.weight.grad = model.weight.grad + (NAN if nan else 1)
        with torch.inference_mode():
            model.bias.grad += 1

    guard, kept = NonFiniteGuard(model), (model.weight.grad, model.bias.grad)
    assert (guard(step) is not None) == nan
    assert find_nonfinite(model, step) is None or nan
    result = [*model.weight.grad.flatten().tolist(), *model.bias.grad.tolist()]
    assert result == ([2] * 16 + [1] * 4 if nan else [3] * 16 + [2] * 4)
    if nan:
        assert model.weight.grad is kept[0]
        assert model.bias.grad is kept[1]


class Packed(Tensor):
    """A wrapper of another tensor, as quantized weights are."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, tensors, *_):
        return cls(tensors["inner"])

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = tree_map_only(Packed, lambda p: p.inner, (args, kwargs or {}))
        out = func(*plain[0], **plain[1])
        return cls(out) if func.__name__.split(".")[0] in ("detach", "_to_copy", "clone") else out


def test_parameters_are_swapped_beside_a_guard():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight = nn.Parameter(Packed(model[0].weight.detach()), requires_grad=False)
    guard = NonFiniteGuard(model)
    model.to(torch.float64)  # by swapping, as tensors of a subclass are
    assert model[0].weight.dtype is torch.float64
    assert guard(run(model, X.double())) is None
    average = nn.Linear(4, 4).double()
    expected = average.weight.detach().clone()
    torch.utils.swap_tensors(model[1].weight, average.weight)
    assert torch.equal(model[1].weight, expected)
    model.zero_grad()
    assert guard(run(model, X.double() * NAN)).name == "input"
    assert model[1].weight.grad is None


def test_arguments_that_are_no_arguments():
    with pytest.raises(TypeError, match=r"find_nonfinite: expected a torch.nn.Module, got Tensor"):
        find_nonfinite(X, lambda: None)
    with pytest.raises(
        TypeError, match=r"find_nonfinite: expected step to be a function .* Tensor"
    ):
        find_nonfinite(nn.Identity(), X)
    with pytest.raises(TypeError, match=r"NonFiniteGuard: expected a torch.nn.Module, got list"):
        NonFiniteGuard([])
    model = nn.Identity()
    with pytest.raises(TypeError, match="NonFiniteGuard: expected step to be a function"):
        NonFiniteGuard(model)(X)
    for look in (NonFiniteGuard(model), lambda step: find_nonfinite(model, step)):
        with pytest.raises(TypeError, match=r"step to be a function without .*'batch'.* lambda"):
            look(lambda batch: batch)
    with pytest.raises(TypeError, match=r"^planted$"):  # one of the step's own
        NonFiniteGuard(model)(lambda: (_ for _ in ()).throw(TypeError("planted")))


# --- the guard: training is what it was


class Embedded(nn.Module):
    """A sparse gradient, a dense one of the same shape, a tied weight, a frozen and an unused."""

    def __init__(self) -> None:
        super().__init__()
        self.sparse = nn.Embedding(6, 4, sparse=True)
        self.dense = nn.Embedding(6, 4)
        self.tied = nn.Linear(4, 6, bias=False)
        self.tied.weight = self.dense.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.unused = nn.Linear(4, 4)

    def forward(self, x):
        tokens = (x[:, 0] * 2).long().abs()
        return self.tied(self.frozen(self.sparse(tokens) + self.dense(tokens)))


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4, dtype=torch.complex64))

    def forward(self, x):
        return (x.to(torch.complex64) @ self.weight).abs()


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(4))

    def forward(self, x):
        return self.net(x)


def batch_norm_and_dropout():
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5))


def checkpointed(reentrant):
    inner = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    return nn.Sequential(nn.Linear(4, 4), Checkpointed(inner, reentrant))


SETTINGS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "dropout and batch norm": (batch_norm_and_dropout, {}),
    "buffers of all kinds": (Drawing, {}),
    "accumulation": (batch_norm_and_dropout, {"micro": 3}),
    "zeroed, not None": (batch_norm_and_dropout, {"set_to_none": False}),
    "shared, sparse, frozen, unused": (Embedded, {"optimizer": torch.optim.SGD}),
    "sparse accumulation": (Embedded, {"optimizer": torch.optim.SGD, "micro": 2}),
    "complex": (Complex, {}),
    "lazy": (Lazy, {}),
    "bfloat16": (lambda: mlp(2, 4).bfloat16(), {"dtype": torch.bfloat16}),
    "float16": (
        lambda: mlp(2, 4).half(),
        {"dtype": torch.float16, "optimizer": torch.optim.SGD},
    ),
    "float64 beside float32": (lambda: nn.Sequential(mlp(1, 4), Widen(), mlp(1, 4).double()), {}),
    "channels last": (
        lambda: nn.Sequential(Image(), nn.Conv2d(3, 4, 2)).to(memory_format=torch.channels_last),
        {},
    ),
    "large gradients": (lambda: nn.Sequential(nn.Linear(4, 4096), nn.Linear(4096, 4)), {}),
    "scaler": (lambda: mlp(2, 4), {"scaler": True}),
    "checkpointing": (lambda: checkpointed(False), {}),
    "reentrant checkpointing": (lambda: checkpointed(True), {}),
    "compiled": (lambda: torch.compile(batch_norm_and_dropout(), backend="aot_eager"), {}),
}


class Widen(nn.Module):
    def forward(self, x):
        return x.double()


class Image(nn.Module):
    def forward(self, x):
        return x.reshape(1, 1, 3, 4).expand(2, 3, 3, 4)


def train(
    name: str, guarded: bool, returns: bool = True, spike_above: float | None = None
) -> list[Any]:
    make, options = SETTINGS[name]
    torch.manual_seed(1)
    model = make()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if "scaler" in options else None
    guard: Any = lambda step: (step(), None)[1]  # noqa: E731
    if guarded:
        guard = NonFiniteGuard(model, spike_above, scaler=scaler)
    model(X.to(options.get("dtype", torch.float32)))
    optimizer = options.get("optimizer", torch.optim.AdamW)(model.parameters(), lr=0.1)
    for i in range(4):
        optimizer.zero_grad(set_to_none=options.get("set_to_none", True))
        for _ in range(options.get("micro", 1)):
            x = (X + 0.1 * i + 0.01 * torch.rand(3, 4)).to(options.get("dtype", torch.float32))

            def step(x=x):
                loss = model(x).square().mean()
                (loss if scaler is None else scaler.scale(loss)).backward()
                return loss if returns else None

            assert guard(step) is None
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()
    momenta = [value for state in optimizer.state.values() for value in state.values()]
    return [*snapshot(model), *(v for v in momenta if isinstance(v, Tensor)), torch.rand(2)]


@COMPILED
@pytest.mark.parametrize("returns", [True, False], ids=["loss", "nothing"])
@pytest.mark.parametrize("name", SETTINGS)
def test_training_is_bit_equal_under_the_guard(name, returns):
    expected = train(name, guarded=False)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    assert same(train(name, True, returns, spike_above=None if returns else 1e9), expected)


@pytest.mark.parametrize("micro", [1, 3])
def test_a_faulty_step_leaves_no_trace_and_training_goes_on(micro):
    """A run in which one batch is broken and skipped equals the run that never saw it."""

    def losses(with_the_fault):
        torch.manual_seed(1)
        model = Drawing()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        guard = NonFiniteGuard(model)
        found = []
        for i in range(4):
            optimizer.zero_grad()
            for j in range(micro):
                if with_the_fault and (i, j) == (2, micro - 1):
                    found.append(guard(run(model, torch.where(X > 0.9, NAN, X))))
                assert guard(run(model, X + i + j)) is None
            optimizer.step()
        return snapshot(model), found

    expected, nothing = losses(with_the_fault=False)
    result, (found,) = losses(with_the_fault=True)
    assert not nothing
    assert (found.phase, found.kind, found.name) == ("input", "nan", "x")
    assert same(result, expected)


@COMPILED
@pytest.mark.parametrize("name", FAULTS)
def test_the_guard_names_what_find_nonfinite_names(name):
    case, expected = FAULTS[name]
    torch.manual_seed(0)
    model, step = case()
    torch.manual_seed(0)
    before = snapshot(model)
    found = NonFiniteGuard(model)(step)
    if found is None:  # nothing of it in a loss that is returned, or in a gradient
        unseen = name == "inside_vmap_of_grad"  # its loss
        assert unseen or "reaches neither" in find_nonfinite(model, step).detail
        return
    assert (found.phase, found.kind, found.module, found.op, found.backward_op) == expected
    assert same(snapshot(model), before)
    assert hooks_left(model) == []


def test_the_very_draw_that_failed_is_replayed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), Code(lambda x: x / x.abs().amin()))
    guard = NonFiniteGuard(model)
    draws = []

    def step():
        h = model[1](torch.ones(4, requires_grad=True))
        draws.append(h.detach().clone())
        loss = (model[0](h) / h.prod()).sum()
        loss.backward()

    torch.manual_seed(0)
    found = [guard(step) for _ in range(20)]
    kept = [draws[i + 1] for i in range(len(draws) - 1) if torch.equal(draws[i], draws[i + 1])]
    assert len(kept) >= sum(f is not None for f in found) > 0
    assert all(f.op == "aten.div.Tensor" for f in found if f is not None)


def test_a_step_that_runs_elsewhere_has_a_beginning_and_an_end():
    model = chain(lambda x: (-x.abs()).log())
    guard, step = NonFiniteGuard(model), run(model, X)
    guarded = guard.begin(keep_gradients=False)
    loss = step()
    first, last = [*model[0].parameters()], [*model[2].parameters()]
    bad = [p.grad for p in first + last]
    assert guarded.end(loss, step).op == "aten.log.default"
    assert all(p.grad is g for p, g in zip(first + last, bad, strict=True))  # for the caller
    found = guarded.end(loss.detach(), None)
    assert (found.kind, found.op) == ("nan", "")
    assert "does not allow to run the step again" in found.detail
    for parameter in last:
        parameter.grad.zero_()
    assert guarded.end(None, step, owned=last) is None
    assert guarded.end(None, step, owned=first) is not None
    assert hooks_left(model) == []


def planted(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """`function`, and a matcher or a distribution that refuses a NaN."""

    def code(x):
        y = function(x)
        calls.append(1)
        if y.isnan().any():
            raise ValueError("planted")
        return y

    calls: list[int] = []
    vars(code)["calls"] = calls
    return code


@pytest.mark.parametrize("grads", ["none", "there"])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("look", [lambda m, s: NonFiniteGuard(m)(s), find_nonfinite])
@COMPILED
def test_a_nan_that_raises_is_noted_once_and_everything_is_put_back(look, compiled, grads):
    code = planted(lambda x: (-x.abs()).log())  # here
    model = nn.Sequential(Drawing(), Code(code))
    if grads == "there":
        model[0](X).sum().backward()
    watched = torch.compile(model, backend="eager") if compiled else model
    before = snapshot(model)
    with pytest.raises(ValueError, match="planted") as raised:
        look(watched, run(watched, X))
    (note,) = raised.value.__notes__
    assert note.startswith("NaN made in forward by aten.log.default\nmodule      1\n")
    comment = test_a_nan_that_raises_is_noted_once_and_everything_is_put_back
    assert f"{__file__}:{line_of(comment)}" in note
    assert len(code.calls) == (1 if look is find_nonfinite and not compiled else 2)
    assert same(snapshot(model), before)
    assert hooks_left(model) == []


@pytest.mark.parametrize("kind", [LookupError, KeyboardInterrupt, StopIteration])
@pytest.mark.parametrize("grads", ["none", "there"])
def test_another_exception_has_no_note_and_everything_is_put_back(kind, grads):
    model, calls = Drawing(), []
    if grads == "there":
        model(X).sum().backward()
    guard = NonFiniteGuard(model)
    before = snapshot(model)

    def step():
        calls.append(1)
        loss = model(X).sum()
        loss.backward()
        raise kind("planted")

    with pytest.raises(kind, match="planted") as raised:
        guard(step)
    assert not hasattr(raised.value, "__notes__")
    assert len(calls) == (1 if kind is KeyboardInterrupt else 2)
    assert guard.result is None
    assert same(snapshot(model), before)
    assert hooks_left(model) == []


def test_an_exception_that_does_not_come_again_passes_without_a_note():
    model, errors = chain(lambda x: (-x.abs()).log()), [OSError("planted"), ValueError()]

    def step():
        model(X)
        raise errors.pop(0)

    with pytest.raises(OSError, match="planted") as raised:
        NonFiniteGuard(model)(step)
    assert not hasattr(raised.value, "__notes__")


def test_what_the_step_returned_is_kept_without_its_graph():
    model = mlp(2, 4)
    guard = NonFiniteGuard(model)
    assert guard.result is None

    def step(x):
        def returns():
            y = model(x)
            loss = y.square().mean()
            loss.backward()
            return {"loss": loss, "outputs": [y], "name": "run"}

        return returns

    expected = model(X)
    assert guard(step(X)) is None
    assert torch.equal(guard.result["outputs"][0], expected)
    assert guard.result["loss"] == expected.square().mean()
    assert guard.result["name"] == "run"
    assert not guard.result["loss"].requires_grad
    assert guard(step(X * NAN)) is not None
    assert guard.result["loss"].isnan()
    guard(lambda: None)
    assert guard.result is None


# --- the guard: gradients that are finite, and far too large


def spiking(model: nn.Module, factor: float, scaler: Any = None) -> Callable[[], Tensor]:
    """A step whose gradient is `factor` times that of factor 1."""

    def step() -> Tensor:
        loss = (model(X) * factor).sum()
        (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    return step


class Weight(nn.Module):
    """A gradient that does not depend on the weight: its norm is known."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.small = nn.Parameter(torch.zeros(4, dtype=dtype))
        self.large = nn.Parameter(torch.zeros(20000, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.small.sum() + 0.01 * self.large.sum() + x.sum() * 0


def norm_by_hand(grads: list[Tensor]) -> float:
    return float(np.sqrt(sum(np.square(g.double().numpy()).sum() for g in grads)))


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_a_spike_is_refused_after_the_warm_up(dtype, scaled):
    model = Weight(dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
    guard = NonFiniteGuard(model, spike_above=5.0, scaler=scaler)
    steps = [(1.0, False)] * 19 + [(50.0, False), (4.9, False), (5.1, True), (1.0, False)]
    for i, (factor, refused) in enumerate(steps):
        if scaler is not None and i:
            scaler._scale.fill_(2.0 ** (i % 5))  # no part of the gradient's size
        before = snapshot(model)
        found = guard(spiking(model, factor, scaler))
        assert (found is not None) == refused, (i, factor)
        if found is None:
            model.zero_grad()
        else:
            assert same(snapshot(model), before)
    model.zero_grad()
    found = guard(spiking(model, 100.0, scaler))
    assert (found.phase, found.kind, found.name, found.op) == ("backward", "spike", "small", "")
    small, large = torch.full((4,), 300.0), torch.full((20000,), 1.0)
    norm = norm_by_hand([small, large])
    said = re.fullmatch(
        r"the norm (\S+) of the gradient is (\S+) times the median (\S+) of the last 23 steps; .*",
        found.detail,
    )
    assert [*map(float, said.groups())] == pytest.approx([norm, 100, norm / 100], rel=1e-2)
    assert repr(found).startswith("Spike in backward\n")
    assert guard(lambda: model.small * NAN).kind == "nan"  # of the loss


def test_the_norm_is_that_of_what_a_micro_batch_adds():
    model = Weight()
    guard = NonFiniteGuard(model, spike_above=1.4)
    for i in range(90):  # in an accumulated gradient each third would be three times the first
        if i % 3 == 0:
            model.zero_grad(set_to_none=i % 2 == 0)
        assert guard(spiking(model, 1.0)) is None
    before = snapshot(model)
    assert guard(spiking(model, 1.6)).kind == "spike"
    assert same(snapshot(model), before)


def test_rows_of_a_sparse_gradient_that_add_up_are_one():
    model = nn.Embedding(3, 4, sparse=True)
    guard = NonFiniteGuard(model, spike_above=1.5)

    def step(*rows):
        return lambda: model(torch.tensor(rows)).sum().backward()

    for _ in range(20):
        model.zero_grad()
        assert guard(step(0, 1, 2, 2)) is None  # a norm of sqrt(4 + 4 + 16)
    model.zero_grad()
    assert guard(step(1, 1, 1, 1)).kind == "spike"  # 8; the rows by themselves have 4


@pytest.mark.parametrize("spike_above", [None, 1.5])
def test_a_sparse_gradient_is_what_it_was_before_a_refused_step(spike_above):
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Linear(3, 2))

    def step(scale, *rows):
        return lambda: (model(torch.tensor(rows)) * scale).sum().backward()

    guard = NonFiniteGuard(model, spike_above)
    for _ in range(20):
        model.zero_grad()
        assert guard(step(1.0, 0, 1, 1)) is None
    before = [parameter.grad.to_dense().clone() for parameter in model.parameters()]
    looks = [(guard, NAN), (lambda s: find_nonfinite(model, s), 1.0)]
    for look, scale in looks + ([(guard, 1e3)] if spike_above else []):
        assert (look(step(scale, 2, 1, 4)) is None) == (scale == 1.0)
        after = [parameter.grad.to_dense() for parameter in model.parameters()]
        assert all(map(torch.equal, after, before))


def test_what_an_operation_never_writes_is_no_nan():
    """The table of `ctc_loss` has such elements; deterministic mode fills them with NaN."""
    x, lengths = torch.randn(12, 2, 5), torch.tensor([12, 7])
    model = nn.Linear(5, 6)
    targets = torch.tensor([[1, 2, 3, 4], [5, 1, 0, 0]])

    def step():
        logs = model(x).log_softmax(-1)
        F.ctc_loss(logs, targets, lengths, torch.tensor([4, 2])).backward()

    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        assert find_nonfinite(model, step) is None
        with torch.no_grad():
            model.weight[0, 0] = NAN
        assert find_nonfinite(model, step).name == "weight"
    finally:
        torch.use_deterministic_algorithms(before)


def test_larger_gradients_that_stay_are_let_through():
    model = Weight()
    guard = NonFiniteGuard(model, spike_above=3.0)
    refused = []
    for i in range(200):
        model.zero_grad()
        refused.append(guard(spiking(model, 1.0 if i < 100 else 10.0)) is not None)
    first, last = refused.index(True), len(refused) - refused[::-1].index(True)
    assert first == 100
    assert 140 <= last <= 155


def test_gradients_whose_squares_overflow_are_a_spike_and_zeros_are_no_measure():
    model = Weight()
    guard = NonFiniteGuard(model, spike_above=3.0)
    for _ in range(30):
        model.zero_grad()
        assert guard(spiking(model, 1.0)) is None
    model.zero_grad()
    found = guard(spiking(model, 1e25))
    assert (found.kind, found.name) == ("spike", "small")
    assert guard(lambda: [torch.tensor(3e38)] * 2) is None  # a loss whose sum overflows
    guard = NonFiniteGuard(model, spike_above=3.0)
    for i in range(31):
        model.zero_grad()
        assert guard(spiking(model, float(i == 30))) is None


def test_unscaled_gradients_of_a_step_are_not_unscaled_again():
    model = Weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    guard = NonFiniteGuard(model, spike_above=5.0, scaler=scaler)
    for i in range(30):
        optimizer.zero_grad()

        def step(i=i):
            loss = spiking(model, 1.0, scaler)()
            if i % 2:
                scaler.unscale_(optimizer)
            return loss

        assert guard(step) is None
        scaler.step(optimizer)
        scaler.update()


@pytest.mark.parametrize("value", [1, 0.5, -3, NAN, "5", True])
def test_a_threshold_that_is_none_is_refused(value):
    text = r"NonFiniteGuard: expected spike_above to be a number above 1, got .*; a step whose norm"
    with pytest.raises(ValueError, match=text):
        NonFiniteGuard(nn.Identity(), spike_above=value)


class Reads(TorchDispatchMode):
    """Counts what reads a tensor on the host."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
        )
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("spike_above", [None, 10.0])
@pytest.mark.parametrize("name", [n for n in SETTINGS if n not in ("compiled", "scaler")])
def test_one_host_read_a_step(name, spike_above, monkeypatch):
    make, options = SETTINGS[name]
    model = make()
    guard = NonFiniteGuard(model, spike_above)
    x = X.to(options.get("dtype", torch.float32))
    others = []
    for reader in ("numpy", "tolist", "cpu", "__array__"):
        original = getattr(Tensor, reader)

        def counted(self, *args, original=original, reader=reader, **kwargs):
            others.append(reader)
            return original(self, *args, **kwargs)

        monkeypatch.setattr(Tensor, reader, counted)
    with Reads() as alone:
        run(model, x)()
    model.zero_grad()
    others.clear()
    with Reads() as reads:
        assert guard(run(model, x)) is None
    assert reads.count - alone.count == 1
    assert others == []


def test_a_sum_that_overflows_is_no_alarm():
    """Every element is finite, their sum is not; the step stands and is not run again."""
    model = nn.Linear(4, 4, bias=False)
    calls = []

    def step():
        calls.append(1)
        (model(torch.full((1, 4), 3e38)) * 1).sum().backward()

    assert NonFiniteGuard(model)(step) is None
    assert calls == [1]
    assert torch.equal(model.weight.grad, torch.full((4, 4), 3e38))


@pytest.mark.parametrize("size", [(4, 4), (64, 256)], ids=["small", "large"])
@pytest.mark.parametrize("value", [NAN, INF, -INF])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_the_sum_sees_one_element_of_any_tensor(size, value, dtype):
    parameters = nn.ParameterList([nn.Parameter(torch.zeros(size, dtype=dtype)) for _ in range(5)])
    guard = NonFiniteGuard(parameters)

    def step(broken):
        def run():
            for i, p in enumerate(parameters):
                p.grad = torch.full(size, 3.0, dtype=dtype)
                if i == broken:
                    p.grad[-1, -1] = value

        return run

    for i in range(5):
        found = guard(step(i))
        assert (found.phase, found.kind) == ("forward", "nan" if value != value else "inf")
        assert parameters[i].grad is None
    assert guard(step(None)) is None


def test_both_signs_of_infinity_do_not_cancel():
    model = nn.Linear(2, 1, bias=False)

    def step():
        model.weight.grad = torch.tensor([[INF, -INF]])

    assert NonFiniteGuard(model)(step) is not None


def replaced_module(model):
    model[0] = nn.Linear(4, 4)


def replaced_module_that_lives_on(model):
    vars(model)["old"] = model[0]
    model[0] = nn.Linear(4, 4)


def appended_module(model):
    model.append(nn.Linear(4, 4))


def added_bias(model):
    model[1].bias = nn.Parameter(torch.zeros(4))


def larger_weight(model):
    model[1].weight = nn.Parameter(torch.zeros(9, 9))


def untied(model):
    model[2].weight = nn.Parameter(torch.zeros(4, 4))


CHANGES = [
    *[replaced_module, replaced_module_that_lives_on, appended_module],
    *[added_bias, larger_weight, untied],
]


@pytest.mark.parametrize("spike_above", [None, 10.0])
@pytest.mark.parametrize("change", CHANGES)
def test_parameters_that_come_later_are_watched_at_once(change, spike_above):
    layers = nn.Linear(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
    model = nn.Sequential(*layers)
    model[2].weight = model[1].weight
    guard = NonFiniteGuard(model, spike_above)
    assert guard(run(model, X)) is None
    model.zero_grad()
    before = {*model.parameters()}
    change(model)
    for parameter in {*model.parameters()} - before:

        def step(parameter=parameter):
            parameter.grad = torch.full(parameter.shape, NAN)

        assert guard(step) is not None
        assert parameter.grad is None


def test_an_overflow_under_a_scaler_is_left_to_the_scaler():
    model = mlp(2, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=10**6)
    guard = NonFiniteGuard(model, scaler=scaler)
    skipped = 0
    for _ in range(140):
        optimizer.zero_grad()

        def step():
            loss = 1e3 * model(X).square().mean()
            scaler.scale(loss).backward()
            return loss

        assert guard(step) is None
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        skipped += same(before, [*model.parameters()])
    assert 1 <= skipped < 130


def test_a_scaler_does_not_hide_what_it_cannot_mend():
    model = chain(lambda x: (x * 0).sqrt())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    guard = NonFiniteGuard(model, scaler=scaler)
    found = []
    for _ in range(5):
        optimizer.zero_grad()

        def step():
            loss = model(X).square().mean()
            scaler.scale(loss).backward()
            return loss

        found.append(guard(step))
        if found[-1] is None:
            scaler.step(optimizer)
            scaler.update()
    assert [f is None for f in found] == [True, True, True, False, False]  # scales 8, 4, 2, 1
    assert found[-1].op == "aten.sqrt.default"
    scaler = torch.amp.GradScaler("cpu")
    nan_loss = NonFiniteGuard(model, scaler=scaler)(lambda: model(X).sum() * NAN)
    assert nan_loss.kind == "nan"  # a loss that is not finite is nobody's business but ours
    disabled = torch.amp.GradScaler("cpu", enabled=False)
    assert NonFiniteGuard(model, scaler=disabled)(run(model, X)) is not None


@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_a_loss_may_be_returned_as_a_float(value):
    model = nn.Linear(2, 2)
    for result in (value, {"loss": 1.0, "parts": [2.0, value]}):
        found = NonFiniteGuard(model)(lambda result=result: result)
        assert (found.phase, found.kind) == ("forward", "nan" if value != value else "inf")
    assert NonFiniteGuard(model)(lambda: {"loss": 3e300, "steps": 5, "name": "run"}) is None
    broken = chain(lambda x: (-x.abs()).log())

    def step():
        return {"loss": broken(X).mean().item()}

    assert NonFiniteGuard(broken)(step).op == "aten.log.default"


def test_unscaling_within_the_step_is_put_back():
    model = chain(lambda x: (x * scale[0]).sqrt())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000)
    guard = NonFiniteGuard(model, scaler=scaler)

    def step():
        loss = model(X).square().mean()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        return loss

    scale = [0.0]
    assert guard(step).op == "aten.sqrt.default"
    assert not scaler._per_optimizer_states
    model[1].function = lambda x: x
    assert guard(step) is None  # not "has already been called"
    scaler.step(optimizer)
    scaler.update()


def test_an_optimizer_within_the_step_is_told():
    model = chain(lambda x: (x * 0).sqrt())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step():
        model(X).square().mean().backward()
        optimizer.step()

    guard = NonFiniteGuard(model)
    assert "keep the optimizer out" in guard(step).detail
    model = chain(lambda x: (x * 0).sqrt())
    assert "optimizer" not in NonFiniteGuard(model)(run(model, X)).detail


def test_a_step_that_does_not_repeat_itself_is_told():
    model = mlp(2, 4)
    batches = iter([X * NAN, X])

    def step():
        return run(model, next(batches))()

    found = NonFiniteGuard(model)(step)
    assert "the step, replayed eagerly, is finite; it does not repeat itself" in found.detail


# --- compiled


@COMPILED
def test_a_compiled_step_that_differs_from_the_eager_one_is_told():
    def backend_that(wrong):
        def backend(graph, inputs):
            return lambda *args: [wrong(out) for out in graph(*args)]

        return backend

    healthy = chain(lambda x: x)
    compiled = torch.compile(healthy, backend=backend_that(lambda y: y * NAN))
    before = snapshot(compiled)
    for found in (
        find_nonfinite(compiled, run(compiled, X)),
        NonFiniteGuard(compiled)(run(compiled, X)),
    ):
        assert (found.phase, found.kind, found.op) == ("forward", "nan", "")
        assert "replayed eagerly, is finite" in found.detail
        assert same(snapshot(compiled), before)
    torch._dynamo.reset()
    broken = chain(lambda x: (-x.abs()).log())
    compiled = torch.compile(
        broken, backend=backend_that(lambda y: torch.ones_like(y).requires_grad_())
    )
    step = run(compiled, X)
    found = find_nonfinite(compiled, step)
    assert (found.module, found.op) == ("1", "aten.log.default")
    assert found.detail == "the compiled step is finite"
    assert NonFiniteGuard(compiled)(step) is None


@COMPILED
def test_observing_does_not_recompile():
    from torch._dynamo.testing import CompileCounter  # noqa: PLC0415

    counter = CompileCounter()
    model = torch.compile(mlp(2, 4), backend=counter)
    step = run(model, X)
    step()
    compiled = counter.frame_count
    assert find_nonfinite(model, step) is None
    assert NonFiniteGuard(model)(run(model, X * NAN)) is not None
    step()
    assert counter.frame_count == compiled
