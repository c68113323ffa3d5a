"""The three models against PyTorch's layers, plain formulas, and what each of them promises."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES, FLOAT_DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from autograd_lib.config import Settings
from autograd_lib.gradients import missing_gradients
from autograd_lib.higher_order import derivative_tower
from autograd_lib.memory import saved_tensors
from autograd_lib.models import CustomCNNModel, CustomRNNModel, CustomTransformerModel

VOCABULARY = 11
FALLBACK = "ignore:There is a performance drop because we have not yet implemented:UserWarning"
# Dynamo of PyTorch 2.13 instantiates Functions, and reads .grad after a break of the graph.
DYNAMO = (
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning"),
)

transformer = partial(CustomTransformerModel, VOCABULARY, 8, num_layers=2, max_length=16)
cnn = partial(CustomCNNModel, 2, 3, channels=(4, 4, 8, 16))
rnn = partial(CustomRNNModel, 3, 4, 5, num_layers=2)


def tokens(*shape: int) -> Tensor:
    return torch.randint(0, VOCABULARY, shape)


Case = tuple[Callable[..., nn.Module], Callable[[], Tensor]]
# name -> (make the model, make an input for it)
CASES: dict[str, Case] = {
    "transformer": (transformer, lambda: tokens(3, 7)),
    "cnn": (cnn, lambda: torch.randn(3, 2, 9, 6)),
    "lstm": (rnn, lambda: torch.randn(3, 7, 3)),
}
CUSTOM: dict[str, Case] = {
    f"low-memory {name}": (partial(CASES[name][0], custom_gradients=True), CASES[name][1])
    for name in ("transformer", "cnn")
}
every_case = pytest.mark.parametrize(
    ("make", "draw"), (CASES | CUSTOM).values(), ids=(CASES | CUSTOM).keys()
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def gradients(model: nn.Module, *inputs: object) -> list[Tensor]:
    """The output, and the gradients of a loss to which every output adds something of its own."""
    model.zero_grad()
    output = model(*inputs)
    weight = torch.linspace(-1, 1, output.numel()).to(output)
    (output.flatten() * weight).square().sum().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters())]


def assert_all_close(ours: list[Tensor], theirs: list[Tensor], **tolerance: float) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


def distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Of gradients over all parameters together, relative."""
    a, b = (torch.cat([g.flatten() for g in gs[1:]]) for gs in (ours, theirs))
    return ((a - b).norm() / b.norm()).item()


def compiles(test: Callable[..., None]) -> Callable[..., None]:
    for mark in DYNAMO:
        test = mark(test)
    return test


@torch.no_grad()
def shaken(model: nn.Module, scale: float) -> nn.Module:
    """Away from the start, where weights are small and attention is uniform."""
    for parameter in model.parameters():
        parameter.add_(scale * torch.randn_like(parameter))
    return model


def floating(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


# --- the specification's examples


def test_the_specification_s_models_give_every_parameter_a_gradient():
    model = CustomTransformerModel(vocab_size=100, d_model=64)
    output = model(torch.randint(0, 100, (8, 16)))
    assert output.shape == (8, 16, 100)
    output.sum().backward()
    for param in model.parameters():
        assert param.grad is not None

    images = CustomCNNModel(input_channels=3, num_classes=10)(torch.randn(4, 3, 32, 32))
    assert images.shape == (4, 10)

    output = CustomRNNModel(input_size=100, hidden_size=128)(torch.randn(2, 9, 100))
    assert output.shape == (2, 9, 128)


@pytest.mark.parametrize("device", DEVICES)
@every_case
def test_every_parameter_gets_a_gradient_that_is_not_zero(make, draw, device):
    model = make().to(device)
    found = gradients(model, draw().to(device))
    assert missing_gradients(model) == []
    names = ["output", *(name for name, _ in model.named_parameters())]
    sizes = [g.abs().max().item() for g in found]
    # Of the order of the others: a parameter that only rounding moves, such as the bias of the
    # keys of an attention, would be smaller by seven digits.
    least = min(sizes[1:])
    assert least > 1e-5 * max(sizes[1:]), names[sizes.index(least)]


def test_tokens_may_be_int32():
    model, x = transformer(), tokens(2, 5)
    assert torch.equal(model(x.int()), model(x))


@pytest.mark.parametrize(("width", "heads"), [(64, 8), (24, 8), (12, 4), (6, 2), (7, 1)])
def test_heads_are_the_largest_power_of_two_up_to_8_that_divides_the_width(width, heads):
    model = CustomTransformerModel(5, width, num_layers=1)
    assert model.blocks[0].heads == heads


# --- against other implementations


def encoder_like(model: CustomTransformerModel) -> nn.TransformerEncoder:
    """PyTorch's own layers with the weights of these blocks."""
    width, heads = model.head.in_features, model.blocks[0].heads
    layer = nn.TransformerEncoderLayer(
        width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
    )
    encoder = nn.TransformerEncoder(layer, len(model.blocks), enable_nested_tensor=False)
    encoder.to(model.head.weight)
    for theirs, ours in zip(encoder.layers, model.blocks, strict=True):
        state = {k: v for k, v in ours.state_dict().items() if k[:4] in ("norm", "line")}
        zeros = torch.zeros(3 * width)
        state |= {"self_attn.in_proj_weight": ours.qkv.weight, "self_attn.in_proj_bias": zeros}
        state |= {"self_attn.out_proj.weight": ours.out_proj.weight}
        state |= {"self_attn.out_proj.bias": zeros[:width]}
        theirs.load_state_dict(state)
    return encoder


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("custom", [True, False], ids=["low-memory", "plain"])
def test_the_transformer_is_that_of_pytorch(custom, device):
    model = transformer(custom_gradients=custom).double().to(device)
    shaken(model, 0.3)
    encoder = encoder_like(model)
    x = tokens(4, 9).to(device)
    mask = torch.ones(9, 9, dtype=torch.bool, device=device).triu(1)
    embedded = model.embedding(x) + model.positions.weight[:9]
    theirs = model.head(model.norm(encoder(embedded, mask=mask)))
    ours = model(x)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    grads = torch.autograd.grad(
        (ours * weight).sum(), [*model.blocks[0].parameters(), model.embedding.weight]
    )
    names = [name for name, _ in model.blocks[0].named_parameters()]
    found = dict(zip([*names, "embedding"], grads, strict=True))
    (theirs * weight).sum().backward()
    expected = dict(encoder.layers[0].named_parameters())
    renamed = {
        "qkv.weight": "self_attn.in_proj_weight",
        "out_proj.weight": "self_attn.out_proj.weight",
    }
    for name in names:
        torch.testing.assert_close(found[name], expected[renamed.get(name, name)].grad)
    torch.testing.assert_close(found["embedding"], model.embedding.weight.grad)


def normalized(x: Tensor, state: dict[str, Tensor], name: str) -> Tensor:
    groups = max(1, x.shape[1] // 16) if x.shape[1] % 16 == 0 else 1
    grouped = x.reshape(len(x), groups, -1)
    variance, mean = torch.var_mean(grouped, 2, correction=0, keepdim=True)
    x = ((grouped - mean) / (variance + 1e-5).sqrt()).reshape(x.shape)
    return x * state[f"{name}.weight"][:, None, None] + state[f"{name}.bias"][:, None, None]


def plain_cnn(state: dict[str, Tensor], images: Tensor) -> Tensor:
    """The formulas of the docstring, each in its most elementary form."""

    def activated(x: Tensor, name: str) -> Tensor:
        x = normalized(x, state, name)
        return x / (1 + (-x).exp())

    x = F.conv2d(images, state["stem.weight"], padding=1)
    i = 0
    while (block := f"blocks.{i}") + ".conv1.weight" in state:
        first, second = state[f"{block}.conv1.weight"], state[f"{block}.conv2.weight"]
        shortcut = state.get(f"{block}.shortcut.weight")
        stride = 1 if shortcut is None else 2
        branch = F.conv2d(activated(x, f"{block}.norm1"), first, padding=1, stride=stride)
        branch = F.conv2d(activated(branch, f"{block}.norm2"), second, padding=1)
        x = (x if shortcut is None else F.conv2d(x, shortcut, stride=stride)) + branch
        i += 1
    pooled = activated(x, "norm").flatten(2).mean(2)
    return pooled @ state["head.weight"].T + state["head.bias"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("custom", [True, False], ids=["low-memory", "plain"])
def test_the_cnn_is_its_formulas(custom, device):
    model = CustomCNNModel(2, 3, channels=(4, 4, 32), custom_gradients=custom)
    model = model.double().to(device)
    shaken(model, 0.1)
    images = torch.randn(3, 2, 7, 5, dtype=torch.float64, device=device)
    state = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    output = plain_cnn(state, images)
    ours = gradients(model, images)
    weight = torch.linspace(-1, 1, output.numel()).to(output)
    theirs = torch.autograd.grad((output.flatten() * weight).square().sum(), [*state.values()])
    assert_all_close(ours, [output.detach(), *theirs])


def rnn_like(model: CustomRNNModel) -> nn.LSTM:
    """PyTorch's layers of several levels with the weights of these blocks."""
    first = model.blocks[0].rnn
    sizes = first.input_size, first.hidden_size, len(model.blocks)
    whole = nn.LSTM(*sizes, batch_first=True).to(first.weight_hh_l0)
    state = {
        name.replace("_l0", f"_l{level}"): value
        for level, block in enumerate(model.blocks)
        for name, value in block.rnn.state_dict().items()
    }
    whole.load_state_dict(state)
    return whole


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_rnn_is_that_of_pytorch(dtype, device):
    model = CustomRNNModel(3, 4, 5, num_layers=3)
    model = model.eval().to(device, dtype)
    whole, head = rnn_like(model).eval(), copy.deepcopy(model.head)
    x = torch.randn(4, 8, 3, dtype=dtype, device=device, requires_grad=True)
    ours, theirs = model(x), head(whole(x)[0])
    assert ours.shape == (4, 8, 5)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    found = torch.autograd.grad(
        (ours * weight).sum(), [x, *model.blocks.parameters(), *model.head.parameters()]
    )
    expected = torch.autograd.grad(
        (theirs * weight).sum(), [x, *whole.parameters(), *head.parameters()]
    )
    assert_all_close(found, expected)


def test_without_output_size_the_rnn_returns_its_states():
    model = CustomRNNModel(3, 6, num_layers=2)
    x = torch.randn(2, 5, 3)
    torch.testing.assert_close(model(x), rnn_like(model)(x)[0])
    assert isinstance(model.head, nn.Identity)


TINY: dict[str, Case] = {
    "transformer": (
        partial(CustomTransformerModel, 3, 4, num_layers=1, max_length=3),
        lambda: torch.tensor([[0, 2, 1], [1, 1, 2]]),
    ),
    "cnn": (
        partial(CustomCNNModel, 1, 2, channels=(2, 3)),
        lambda: torch.randn(2, 1, 3, 2, dtype=torch.float64),
    ),
}


@pytest.mark.parametrize("custom", [True, False], ids=["low-memory", "plain"])
@pytest.mark.parametrize(("make", "draw"), TINY.values(), ids=TINY.keys())
def test_gradcheck(make, draw, custom):
    model, x = make(custom_gradients=custom).double(), draw()
    names = [name for name, _ in model.named_parameters()]
    values = [torch.randn_like(p).requires_grad_() for p in model.parameters()]
    assert torch.autograd.gradcheck(
        lambda *values: functional_call(model, dict(zip(names, values, strict=True)), (x,)), values
    )


@pytest.mark.parametrize("custom", [True, False], ids=["low-memory", "plain"])
@pytest.mark.parametrize("name", ["transformer", "cnn"])
def test_derivatives_of_order_three_are_those_of_a_polynomial_fit(name, custom):
    make, draw = CASES[name]
    model, x = make(custom_gradients=custom).double(), floating(draw(), torch.float64)
    shaken(model, 0.3)
    target = torch.randn_like(model(x))
    tower = derivative_tower(model, F.mse_loss, x, target, order=3)
    at = np.polynomial.chebyshev.chebpts1(20)
    start = {name: p.detach() for name, p in model.named_parameters()}

    def loss(t: float) -> float:
        moved = {name: p + t * tower.direction[name] for name, p in start.items()}
        return F.mse_loss(functional_call(model, moved, (x,)), target).item()

    scale = 0.03
    fit = np.polynomial.Chebyshev.fit(scale * at, [loss(scale * t) for t in at], 15)
    for order, value in enumerate(tower.values.tolist()):
        assert value == pytest.approx(fit.deriv(order)(0.0) if order else fit(0.0), rel=1e-5)


def test_the_fast_attention_has_no_second_derivative_and_the_plain_one_has():
    """As the docstring says; mended upstream where the first part fails."""
    model, x = transformer(), tokens(2, 5)
    weight = model.embedding.weight

    def twice() -> Tensor:
        (g,) = torch.autograd.grad(model(x).square().sum(), weight, create_graph=True)
        return torch.autograd.grad(g.square().sum(), weight)[0]

    with pytest.raises(RuntimeError, match=r"attention.*backward is not implemented"):
        twice()
    with sdpa_kernel(SDPBackend.MATH):
        assert twice().isfinite().all()


# --- causality


def test_an_output_depends_on_no_later_token():
    model, seq = transformer().double(), 6
    embedded: list[Tensor] = []

    def keep(module: nn.Module, inputs: object, output: Tensor) -> Tensor:
        embedded.append(output.detach().requires_grad_())
        return embedded[-1]

    model.embedding.register_forward_hook(keep)
    logits = model(tokens(1, seq))
    for t in range(seq):
        (g,) = torch.autograd.grad(logits[0, t].square().sum(), embedded, retain_graph=True)
        reached = g[0].abs().sum(1) > 0
        assert reached.tolist() == [s <= t for s in range(seq)]


def test_no_layer_of_the_rnn_looks_ahead():
    x = torch.randn(1, 6, 3, requires_grad=True)
    (g,) = torch.autograd.grad(rnn()(x)[0, 2].sum(), x)
    assert (g[0].abs().sum(1) > 0).tolist() == [True] * 3 + [False] * 3


# --- layouts and sizes of images


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("custom", [True, False], ids=["low-memory", "plain"])
def test_channels_last_gives_the_same_and_stays(custom, device):
    if device == "cuda":
        pytest.skip("GroupNorm of CUDA returns contiguous tensors")
    model = cnn(custom_gradients=custom).double().to(device)
    images = torch.randn(3, 2, 9, 6, dtype=torch.float64, device=device)
    expected = gradients(copy.deepcopy(model), images)
    images.requires_grad_()
    Settings(memory_format="channels_last").apply(model)
    kept: list[bool] = []

    def look(*args: object) -> None:
        kept.append(args[-1].is_contiguous(memory_format=torch.channels_last))

    def look_back(module: nn.Module, grads: object, outer: tuple[Tensor]) -> None:
        look(outer[0])

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.SiLU, nn.GroupNorm)):
            module.register_forward_hook(look)
            # The gradient of the mean is a number per channel, expanded to a contiguous tensor.
            if module not in (model.norm, model.activation):
                module.register_full_backward_hook(look_back)
    assert_all_close(gradients(model, images), expected)
    assert len(kept) > 20
    assert all(kept)


@given(height=st.integers(1, 9), width=st.integers(1, 9))
@settings(max_examples=25, deadline=None)
def test_images_of_any_size_will_do(height, width):
    sizes: list[tuple[int, ...]] = []
    model = cnn()
    for block in model.blocks:
        block.register_forward_hook(lambda *args: sizes.append(tuple(args[-1].shape[1:])))
    images = torch.randn(2, 2, height, width)
    assert all(g.isfinite().all() for g in gradients(model, images))
    half = [-(-height // 2), -(-width // 2)]
    quarter = [-(-half[0] // 2), -(-half[1] // 2)]
    assert sizes == [(4, height, width), (8, *half), (16, *quarter)]


# --- memory


@pytest.mark.parametrize("name", ["transformer", "cnn"])
def test_custom_gradients_save_a_byte_for_each_four(name):
    make, draw = CASES[name]
    plain = make()
    custom = make(custom_gradients=True)
    custom.load_state_dict(plain.state_dict())
    x, elements = draw(), []
    for module in plain.modules():
        if isinstance(module, (nn.GELU, nn.SiLU)):
            module.register_forward_hook(lambda *args: elements.append(args[-1].numel()))
    with saved_tensors(plain) as before:
        plain(x)
    with saved_tensors(custom) as after:
        custom(x)
    assert len(elements) == (2 if name == "transformer" else 7)
    one_number = 4  # what stands for the input in the graph of the backward
    assert before.total_bytes - after.total_bytes == 3 * sum(elements) - one_number * len(elements)
    assert torch.equal(custom(x), plain(x))
    # Each step of backward through an activation is right to half a percent, or better.
    assert 1e-6 < distance(gradients(custom, x), gradients(plain, x)) < 1e-2


@pytest.mark.parametrize("name", ["transformer", "cnn"])
def test_custom_gradients_are_exact_in_float64(name):
    make, draw = CASES[name]
    plain, custom = make().double(), make(custom_gradients=True).double()
    custom.load_state_dict(plain.state_dict())
    x = floating(draw(), torch.float64)
    assert_all_close(gradients(custom, x), gradients(plain, x), rtol=1e-12, atol=1e-12)


@every_case
def test_blocks_under_checkpoints_give_the_same_bits(make, draw):
    """Dropout included, where there is one."""
    model, x = make(**({} if make is rnn else {"dropout": 0.5})), draw()
    other = copy.deepcopy(model)
    steps = ["recompute"] * (len(model.blocks) - 1)
    Settings(checkpoint={"blocks": [*steps, "save"]}).apply(other)
    found = []
    for each in (model, other):
        torch.manual_seed(5)
        found.append(gradients(each, x))
    assert_all_close(*found, rtol=0, atol=0)
    with saved_tensors(model) as plain:
        model(x)
    with saved_tensors(other) as recomputed:
        other(x)
    assert recomputed.total_bytes < 0.8 * plain.total_bytes


# --- what any module must bear


@every_case
def test_copies_pickles_and_state_dicts_are_the_same_model(make, draw):
    model, x = make(), draw()
    loaded = make()
    loaded.load_state_dict(model.state_dict())
    expected = gradients(copy.deepcopy(model), x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert not {*map(id, model.parameters())} & {*map(id, other.parameters())}
        assert_all_close(gradients(other, x), expected, rtol=0, atol=0)


@compiles
@pytest.mark.parametrize("name", [name for name in CASES | CUSTOM if "cnn" in name])
def test_a_compiled_cnn_is_one_graph(name):
    make, draw = (CASES | CUSTOM)[name]
    model, x = make(), draw()
    expected = gradients(copy.deepcopy(model), x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    weight = torch.linspace(-1, 1, 9)
    (compiled(x).flatten() * weight).square().sum().backward()
    assert_all_close([p.grad for p in model.parameters()], expected[1:])


@compiles
@pytest.mark.parametrize("custom", [True, False], ids=["low-memory", "plain"])
def test_a_compiled_transformer_is_one_graph(custom):
    model, x = transformer(custom_gradients=custom), tokens(2, 5)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    (ours,) = torch.autograd.grad(compiled(x).square().sum(), model.blocks[0].qkv.weight)
    (theirs,) = torch.autograd.grad(model(x).square().sum(), model.blocks[0].qkv.weight)
    torch.testing.assert_close(ours, theirs)


@compiles
def test_a_compiled_rnn_is_right_with_its_graph_breaks():
    model, x = rnn(), torch.randn(2, 6, 3)
    torch.compiler.reset()  # it remembers where the graph broke, and asks no more
    with pytest.raises(torch._dynamo.exc.Unsupported, match="does not support RNN"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert missing_gradients(model) == []


@pytest.mark.parametrize("device", DEVICES)
@every_case
def test_bf16_autocast_stays_near_float32(make, draw, device):
    model, x = make().to(device), draw().to(device)
    expected = gradients(model, x)
    with torch.autocast(device, torch.bfloat16):
        found = gradients(model, x)
    assert found[0].dtype == torch.bfloat16
    # Seven bits of mantissa.
    assert distance(found, expected) < 0.15


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@every_case
def test_models_run_in_every_dtype(make, draw, dtype):
    model = make().to(dtype)
    if dtype == torch.float16 and isinstance(model, CustomRNNModel):
        pytest.skip("oneDNN has no LSTM in fp16 on some CPUs")
    found = gradients(model, floating(draw(), dtype))
    assert {g.dtype for g in found} == {dtype}
    assert all(g.isfinite().all() for g in found)


@pytest.mark.filterwarnings(FALLBACK)
@pytest.mark.parametrize(
    "name", ["transformer", "low-memory transformer", "cnn", "low-memory cnn", "lstm"]
)
def test_gradients_of_each_sample(name):
    make, draw = (CASES | CUSTOM)[name]
    model, x = make(), draw()
    parameters = dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor], sample: Tensor) -> Tensor:
        return functional_call(model, parameters, (sample[None],)).square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, x)
    for i, sample in enumerate(x):
        model.zero_grad()
        model(sample[None]).square().sum().backward()
        alone = [p.grad for p in model.parameters()]
        # A code of 8 bits is the same in either; nothing else differs but the order of sums.
        assert_all_close([found[key][i] for key in parameters], alone, rtol=1e-4, atol=1e-5)


@every_case
def test_a_batch_is_its_micro_batches(make, draw):
    model, x = make(), draw()
    parts = torch.cat([model(x[:1]), model(x[1:])])
    torch.testing.assert_close(parts, model(x), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("make", "draw"), [case for name, case in (CASES | CUSTOM).items() if name != "lstm"]
)
def test_every_dropout_is_a_module_s(make, draw):
    """So that `autotune`, which sets their probabilities to 0, finds them all."""
    model, x = make(dropout=0.5), draw()
    dropouts = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    assert {dropout.p for dropout in dropouts} == {0.5}
    for dropout in dropouts:
        dropout.p = 0.0
    assert torch.equal(model(x), model(x))
    for dropout in dropouts:  # each of them does something
        dropout.p = 0.5
        assert not torch.equal(model(x), model(x))
        dropout.p = 0.0
    torch.manual_seed(0)
    fresh = make(dropout=0.5).eval()
    assert torch.equal(fresh(x), fresh(x))


def test_dropout_reaches_embedding_attention_and_branches():
    """With one of them alone switched on, outputs are random."""
    x = tokens(3, 7)
    model = transformer(num_layers=1)
    model.dropout.p = 0.5
    assert not torch.equal(model(x), model(x))
    model = transformer(num_layers=1)
    dropout = model.blocks[0].dropout = nn.Identity()  # for the two branches
    dropout.p = 0.0
    assert torch.equal(model(x), model(x))
    dropout.p = 0.5  # for attention, which reads it
    assert not torch.equal(model(x), model(x))
    called: list[object] = []
    dropout.register_forward_hook(lambda *args: called.append(args))
    model(x)
    assert len(called) == 2


@every_case
def test_models_are_made_on_the_meta_device_too(make, draw):
    with torch.device("meta"):
        model = make()
    assert all(p.is_meta for p in model.parameters())
    shape = model(draw().to("meta")).shape if not isinstance(model, CustomRNNModel) else None
    assert shape in (None, make()(draw()).shape)


@every_case
def test_an_empty_batch_gives_an_empty_batch(make, draw):
    model = make().eval()
    x = draw()
    assert model(x[:0]).shape == (0, *model(x).shape[1:])


# --- the start


def test_the_transformer_starts_near_the_uniform_distribution():
    model, x = CustomTransformerModel(50, 64, num_layers=8), torch.randint(0, 50, (8, 33))
    loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(50), rel=0.02)
    deviations = {
        name: p.std().item()
        for name, p in model.named_parameters()
        if name.endswith("weight") and "norm" not in name
    }
    for name, deviation in deviations.items():
        joined = name.endswith(("out_proj.weight", "linear2.weight"))
        assert deviation == pytest.approx(0.02 / math.sqrt(16) if joined else 0.02, rel=0.1), name
    assert not any(p.any() for n, p in model.named_parameters() if n.endswith("bias"))


def test_the_sum_of_the_cnn_does_not_grow_with_its_depth():
    images = torch.randn(8, 3, 8, 8)
    for depth in (1, 16):
        model = CustomCNNModel(3, 10, channels=[32] * (depth + 1))
        start = model.stem(images)
        end = model.blocks(start)
        assert 1.0 < end.std() / start.std() < 1.6
        he = math.sqrt(2 / (32 * 3 * 3))
        assert model.blocks[0].conv1.weight.std().item() == pytest.approx(he, rel=0.05)


def test_the_rnn_starts_orthogonal_and_remembers():
    model = CustomRNNModel(3, 4, num_layers=2)
    for name, parameter in model.named_parameters():
        gates = parameter.detach().split(4)
        if "weight_hh" in name:
            for gate in gates:
                torch.testing.assert_close(gate @ gate.T, torch.eye(4), atol=1e-5, rtol=0)
        if "bias" in name:
            forget = 1.0 if "bias_ih" in name else 0.0
            assert [gate.unique().tolist() for gate in gates] == [[0.0], [forget], [0.0], [0.0]]


def test_each_learns():
    """To tell the token before the last, the quadrant of a spot, the first step of a sequence."""

    def train(model: nn.Module, draw: Callable[[], tuple[Tensor, Tensor]], steps: int) -> float:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        for _ in range(steps):
            x, y = draw()
            F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        x, y = draw()
        return (model(x).argmax(-1) == y)[..., 2:].float().mean().item()

    def copying() -> tuple[Tensor, Tensor]:
        x = tokens(16, 10)
        return x, x.roll(1, 1)

    def spots() -> tuple[Tensor, Tensor]:
        y = torch.randint(0, 4, (32, 1))
        images = 0.3 * torch.randn(32, 1, 8, 8)
        for image, quadrant in zip(images, y[:, 0].tolist(), strict=True):
            image[0, 4 * (quadrant // 2) + 1, 4 * (quadrant % 2) + 1] += 5
        return images, y.expand(32, 1)

    def remembering() -> tuple[Tensor, Tensor]:
        x = torch.randint(0, 3, (16, 12))
        return F.one_hot(x, 3).float(), x[:, :1].expand(16, 12)

    assert train(CustomTransformerModel(VOCABULARY, 32, num_layers=2), copying, 150) > 0.95
    assert train(CustomRNNModel(3, 32, 3), remembering, 150) > 0.95
    corner = CustomCNNModel(1, 4, channels=(8, 16, 32))
    optimizer = torch.optim.AdamW(corner.parameters(), lr=1e-2)
    for _ in range(100):
        images, y = spots()
        F.cross_entropy(corner(images), y[:, 0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    images, y = spots()
    assert (corner(images).argmax(1) == y[:, 0]).float().mean() > 0.9


# --- errors

INPUTS = [
    (
        lambda: transformer()(tokens(5)),
        ValueError,
        r"shape \(batch, seq\), got \(5,\); tokens\[Non",
    ),
    (lambda: transformer()(tokens(2, 17)), ValueError, "at most max_length=16 positions, got 17"),
    (
        lambda: transformer()(tokens(2, 5) + 9),
        IndexError,
        r"in \[0, 11\), got \d+ to 1\d; make the",
    ),
    (lambda: transformer()(-1 - tokens(2, 5)), IndexError, r"tokens in \[0, 11\), got -\d+ to -\d"),
    (
        lambda: cnn()(torch.randn(2, 4, 4)),
        *(ValueError, r"\(batch, 2, height, width\), got \(2, 4, 4\); images\[None\] is a batch"),
    ),
    (
        lambda: cnn()(torch.randn(2, 4, 4, 2)),
        ValueError,
        r"got \(2, 4, 4, 2\);.*permute\(0, 3, 1, 2",
    ),
    (lambda: cnn()(torch.randn(2, 2, 0, 4)), ValueError, r"expected images .* got \(2, 2, 0, 4\)"),
    (lambda: rnn()(torch.randn(2, 7, 4)), RuntimeError, "Expected 3, got 4"),  # as PyTorch says it
]


@pytest.mark.parametrize(("call", "error", "message"), INPUTS)
def test_a_wrong_input_is_named(call, error, message):
    with pytest.raises(error, match=message):
        call()
