"""Functions against closed forms, autograd's own composition, mpmath and unrolling."""

from __future__ import annotations

import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES, FLOAT_DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import Function, forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap

from autograd_lib.functions.activations import (
    _pack,
    _unpack,
    low_memory_gelu,
    low_memory_relu,
    low_memory_silu,
)
from autograd_lib.functions.functions import (
    CustomAutogradFunction,
    clip_gradient,
    log1mexp,
    reverse_gradient,
    safe_norm,
    safe_sqrt,
    scale_gradient,
    straight_through,
)
from autograd_lib.functions.implicit import fixed_point
from autograd_lib.memory import saved_tensors

# Dynamo itself instantiates a Function that it traces, and looks at `.grad` between two graphs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning"),
]


def linear(x: Tensor) -> Tensor:
    weight = torch.linspace(-1, 1, 2 * x.shape[-1], dtype=x.dtype, device=x.device)
    return CustomAutogradFunction.apply(x, weight.view(2, -1))


def gelu_tanh(x: Tensor) -> Tensor:
    return low_memory_gelu(x, "tanh")


# name -> (the function, the same by autograd's composition away from singular points)
SMOOTH: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "linear": (
        linear,
        lambda x: x @ torch.linspace(-1, 1, 2 * x.shape[-1], dtype=x.dtype).view(2, -1).T,
    ),
    # Both tangents at once: in each input alone the product is linear.
    "bilinear": (lambda x: CustomAutogradFunction.apply(x, x.sin()), lambda x: x @ x.sin().T),
    "relu": (low_memory_relu, F.relu),
    "gelu": (low_memory_gelu, F.gelu),
    "gelu_tanh": (gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    "silu": (low_memory_silu, F.silu),
    "straight_through": (lambda x: straight_through(x, torch.clone), lambda x: x),
    "log1mexp": (
        lambda x: log1mexp(-x.square() - 0.1),
        lambda x: (1 - (-x.square() - 0.1).exp()).log(),
    ),
    "safe_norm": (safe_norm, lambda x: x.square().sum().sqrt()),
    "safe_norm_dim": (lambda x: safe_norm(x, -1, True), lambda x: x.square().sum(-1, True).sqrt()),
    "safe_sqrt": (lambda x: safe_sqrt(x.square() + 0.1), lambda x: (x.square() + 0.1).sqrt()),
}
# Those that bend a gradient have no forward mode; at these arguments they are the identity.
BENT = {
    "scale": lambda x: scale_gradient(x, 1.0),
    "reverse": lambda x: reverse_gradient(reverse_gradient(x)),
    "clip": lambda x: clip_gradient(x, max_norm=1e6, max_value=1e6),
}
PLAIN = {name: f for name, (f, _) in SMOOTH.items()} | BENT


def points(*shape: int, device: str = "cpu", dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(
        device, dtype
    )


def gradient(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    x = x.detach().clone().requires_grad_()
    (result,) = torch.autograd.grad(f(x).sum(), x)
    return result


# ------------------------------------------------------------------------------ every function


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", SMOOTH)
def test_gradcheck(name: str, device: str) -> None:
    x, (f, _) = points(2, 3, device=device).requires_grad_(), SMOOTH[name]
    assert gradcheck(
        f, x, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(f, x, check_fwd_over_rev=True, check_batched_grad=True)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", BENT)
def test_gradcheck_of_bent_gradients(name: str, device: str) -> None:
    x = points(2, 3, device=device).requires_grad_()
    f = lambda x: BENT[name](x).square()  # noqa: E731
    assert gradcheck(f, x, check_batched_grad=True)
    assert gradgradcheck(f, x, check_batched_grad=True)


@pytest.mark.parametrize("name", SMOOTH)
def test_every_mode_agrees_with_the_composition_to_order_four(name: str) -> None:
    """Forward over forward too, where a Function of PyTorch 2.13 returns 0 without a word."""
    x, v = points(2, 3), points(2, 3).flip(0)
    got, expected = ((lambda x, f=f: f(x).pow(3).sum()) for f in SMOOTH[name])

    def nested(f: Callable[[Tensor], Tensor], modes: str) -> Callable[[Tensor], Tensor]:
        for mode in modes:
            if mode == "f":
                f = lambda x, f=f: jvp(f, (x,), (v,))[1]  # noqa: E731
            else:
                f = lambda x, f=f: (grad(f)(x) * v).sum()  # noqa: E731
        return f

    for modes in ("f", "r", "ff", "fr", "rf", "rr", "fff", "rff", "frr", "ffff"):
        torch.testing.assert_close(
            nested(got, modes)(x), nested(expected, modes)(x), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PLAIN)
def test_vmap_is_a_loop(name: str, device: str) -> None:
    f, x = PLAIN[name], points(3, 2, 5, device=device)
    for dim in (0, 1, -1):
        samples = x.unbind(dim)
        expected = torch.stack([f(s) for s in samples])
        torch.testing.assert_close(vmap(f, dim)(x), expected)
        expected = torch.stack([gradient(lambda s: f(s).square(), s) for s in samples])
        per_sample = vmap(grad(lambda s: f(s).square().sum()), dim)
        torch.testing.assert_close(per_sample(x), expected)
    inside = grad(lambda x: vmap(f)(x).square().sum())
    torch.testing.assert_close(inside(x), vmap(grad(lambda s: f(s).square().sum()))(x))
    if name in SMOOTH:
        tangents = vmap(lambda s: jvp(f, (s,), (s,))[1])(x)
        torch.testing.assert_close(tangents, torch.stack([jvp(f, (s,), (s,))[1] for s in x]))


@pytest.mark.parametrize("name", sorted(set(PLAIN) - {"linear", "bilinear"}))
def test_compiles_whole(name: str) -> None:
    """Values and gradients of one graph; only the model of a Function breaks it (see below)."""
    f, x = PLAIN[name], points(2, 5, dtype=torch.float32)
    compiled = torch.compile(f, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), f(x))
    torch.testing.assert_close(gradient(compiled, x), gradient(f, x))


@pytest.mark.parametrize("name", ["scale", "clip", "straight_through", "safe_sqrt", "relu"])
def test_compiled_transforms_are_right_or_refused(name: str) -> None:
    """PyTorch 2.13 compiles the gradient of the forward instead (pinned below)."""
    f = {
        "scale": lambda x: scale_gradient(x, 2.0),
        "clip": lambda x: clip_gradient(x, max_value=0.5),
        "straight_through": lambda x: straight_through(x, torch.round),
        "safe_sqrt": lambda x: safe_sqrt(x.relu()),
        "relu": low_memory_relu,
    }[name]
    x, transformed = points(5), grad(lambda x: f(x).sum())
    compiled = torch.compile(transformed, backend="aot_eager")
    torch.testing.assert_close(compiled(x), transformed(x))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"ignore the backward|Observed"):
        torch.compile(transformed, backend="aot_eager", fullgraph=True)(x)


@pytest.mark.parametrize("name", PLAIN)
def test_nothing_keeps_the_output_alive(name: str) -> None:
    gc.disable()
    try:
        output = PLAIN[name](points(2, 3).requires_grad_())
        output.sum().backward(retain_graph=True)
        reference = weakref.ref(output)
        del output
        assert reference() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("name", PLAIN)
def test_dtypes(name: str, dtype: torch.dtype, device: str) -> None:
    """Output and gradient in the dtype of the input, and as near to float64 as that allows."""
    f, x = PLAIN[name], points(3, 4, device=device, dtype=dtype)
    y, g = f(x), gradient(f, x)
    assert (y.dtype, g.dtype, g.shape) == (dtype, dtype, x.shape)
    eps, coded = torch.finfo(dtype).eps, 0.0 if "lu" not in name or name == "relu" else 0.005
    torch.testing.assert_close(y.double(), f(x.double()), rtol=8 * eps, atol=8 * eps)
    expected = gradient(f, x.double())
    torch.testing.assert_close(g.double(), expected, rtol=16 * eps, atol=16 * eps + coded)


@pytest.mark.parametrize("name", sorted(set(PLAIN) - {"linear", "bilinear"}))
@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (1, 1)])
def test_empty_and_scalar(name: str, shape: tuple[int, ...]) -> None:
    x = torch.full(shape, 0.5)
    if name == "safe_norm_dim" and shape == ():
        x = torch.full((1,), 0.5)
    assert gradient(PLAIN[name], x).shape == x.shape


@pytest.mark.parametrize("name", sorted(set(PLAIN) - {"linear", "bilinear"}))
def test_integers_are_refused(name: str) -> None:
    public = {"scale": "scale_gradient", "reverse": "reverse_gradient", "clip": "clip_gradient"}
    f = {"log1mexp": log1mexp, "safe_sqrt": safe_sqrt}.get(name, PLAIN[name])
    with pytest.raises(TypeError, match=r"expected a floating-point tensor, got torch.int64"):
        f(torch.arange(3))
    with pytest.raises(TypeError, match=rf"^{public.get(name, '')}.*got list; convert"):
        f([1.0])


# ----------------------------------------------------------------- the model of a Function


@settings(deadline=None, max_examples=40)
@given(
    leading=st.lists(st.integers(0, 3), max_size=3),
    n_in=st.integers(0, 4),
    n_out=st.integers(0, 4),
    frozen=st.sampled_from(["none", "input", "weight"]),
)
def test_linear_of_any_shape(leading: list[int], n_in: int, n_out: int, frozen: str) -> None:
    x = points(*leading, n_in).requires_grad_(frozen != "input")
    w = points(n_out, n_in).requires_grad_(frozen != "weight")
    wanted = [t for t in (x, w) if t.requires_grad]
    y, expected = CustomAutogradFunction.apply(x, w), F.linear(x, w)
    torch.testing.assert_close(y, expected)
    g = points(*y.shape)
    got = torch.autograd.grad(y, wanted, g)
    torch.testing.assert_close(got, torch.autograd.grad(expected, wanted, g))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 2, 3)])
def test_linear_gradcheck(shape: tuple[int, ...], device: str) -> None:
    tensors = [points(*s, device=device).requires_grad_() for s in (shape, (4, 3))]
    f = CustomAutogradFunction.apply
    assert gradcheck(
        f, tensors, check_forward_ad=True, check_batched_grad=True, check_batched_forward_grad=True
    )
    assert gradgradcheck(f, tensors, check_fwd_over_rev=True, check_batched_grad=True)


def test_linear_saves_what_the_inputs_call_for() -> None:
    for input_needs, weight_needs, kept in [(1, 1, 2), (1, 0, 1), (0, 1, 1), (0, 0, 0)]:
        x = torch.ones(5, 3).requires_grad_(bool(input_needs))
        w = torch.ones(2, 3).requires_grad_(bool(weight_needs))
        with saved_tensors(nn.Module()) as saved:
            y = CustomAutogradFunction.apply(x, w)
        assert saved.total_bytes == 4 * (15 * weight_needs + 6 * input_needs)
        if kept:
            assert sum(t is not None for t in y.grad_fn.saved_tensors) == kept
    with forward_ad.dual_level():  # what a jvp needs is gone with it
        x = forward_ad.make_dual(torch.ones(5, 3), torch.ones(5, 3))
        reference = weakref.ref(x)
        y = CustomAutogradFunction.apply(x, torch.ones(2, 3, requires_grad=False))
        del x
        assert reference() is None


@pytest.mark.parametrize("device", DEVICES)
def test_linear_under_autocast_is_f_linear(device: str) -> None:
    x, w = (points(*s, device=device, dtype=torch.float32) for s in ((4, 8), (5, 8)))
    results = []
    for f in (CustomAutogradFunction.apply, F.linear):
        tensors = [t.clone().requires_grad_() for t in (x, w)]
        with torch.autocast(device, torch.bfloat16):
            y = f(*tensors)
        y.float().square().sum().backward()
        results.append([y, *(t.grad for t in tensors)])
    for got, expected in zip(*results, strict=True):
        assert got.dtype == expected.dtype
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dims", [(0, None), (None, 0), (0, 0), (1, 2)])
def test_linear_vmap(dims: tuple[int | None, int | None]) -> None:
    x, w = points(2, 2, 2), points(2, 2, 2)
    pairs = [
        (
            x if dims[0] is None else x.select(dims[0], i),
            w[0] if dims[1] is None else w.select(dims[1], i),
        )
        for i in range(2)
    ]
    got = vmap(CustomAutogradFunction.apply, dims)(x, w[0] if dims[1] is None else w)
    torch.testing.assert_close(got, torch.stack([F.linear(a, b) for a, b in pairs]))


def test_linear_hessians() -> None:
    w, x = points(2, 3), points(4, 3)
    f = lambda w: CustomAutogradFunction.apply(x, w).sin().sum()  # noqa: E731
    expected = hessian(lambda w: (x @ w.T).sin().sum())(w)
    for h in (
        hessian,
        lambda f: jacfwd(jacfwd(f)),
        lambda f: jacrev(jacrev(f)),
        lambda f: jacrev(jacfwd(f)),
    ):
        torch.testing.assert_close(h(f)(w), expected)


# ------------------------------------------------------------------ limits of PyTorch, pinned


class Naive(Function):
    """A Function as the tutorials write it: its derivative is twice that of its forward."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.square()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 4 * grad * ctx.saved_tensors[0]

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return 4 * tangent * ctx.saved_tensors[0]


class NaiveWithoutJvp(Naive):
    jvp = Function.jvp


def test_upstream_jvp_of_jvp_is_still_zero() -> None:
    """Once this fails, `primals` and `_set_fwd_grad_enabled` may go."""
    second = jvp(
        lambda x: jvp(Naive.apply, (x,), (x.new_ones(()),))[1],
        (torch.tensor(3.0),),
        (torch.tensor(1.0),),
    )[1]
    assert second == 0  # 4 is right


def test_upstream_jvp_still_breaks_the_graph() -> None:
    """Once this fails, the twins may go."""
    x = torch.ones(3, requires_grad=True)  # without it, Dynamo does not look at the jvp
    with pytest.raises(torch._dynamo.exc.Unsupported, match="Unsupported custom jvp"):
        torch.compile(linear, fullgraph=True, backend="aot_eager")(x)


def test_linear_compiles_with_a_graph_break() -> None:
    x = points(2, 3)
    compiled = torch.compile(lambda x: linear(x.sin()).sin(), backend="aot_eager")
    torch.testing.assert_close(gradient(compiled, x), gradient(lambda x: linear(x.sin()).sin(), x))


def test_upstream_compiled_transforms_still_ignore_the_backward() -> None:
    """Once this fails, `_apply` need not refuse them."""
    x = torch.tensor([3.0])
    eager = grad(lambda x: NaiveWithoutJvp.apply(x).sum())
    assert eager(x) == 12
    assert torch.compile(eager, fullgraph=True, backend="aot_eager")(x) == 6


# ------------------------------------------------------------------ activations that save less

EDGES = [0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-45, -1e-45, 3e38, -3e38]


@settings(deadline=None, max_examples=60)
@given(values=st.lists(st.sampled_from(EDGES) | st.floats(width=32), max_size=40), data=st.data())
def test_relu_is_f_relu_to_the_bit(values: list[float], data: st.DataObject) -> None:
    g = data.draw(
        st.lists(st.sampled_from(EDGES), min_size=len(values), max_size=len(values)), label="g"
    )
    x, results = torch.tensor(values), []
    for f in (low_memory_relu, F.relu):
        leaf = x.clone().requires_grad_()
        y = f(leaf)
        y.backward(torch.tensor(g))
        results.append((y.detach(), leaf.grad))
    for got, expected in zip(*results, strict=True):
        assert got.view(torch.int32).tolist() == expected.view(torch.int32).tolist() or (
            torch.equal(got.nan_to_num(7), expected.nan_to_num(7))
        )


@settings(deadline=None, max_examples=50)
@given(st.lists(st.booleans(), max_size=40))
def test_bits_come_back(bits: list[bool]) -> None:
    mask = torch.tensor(bits, dtype=torch.bool)
    packed = _pack(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == math.ceil(len(bits) / 8)
    assert _unpack(packed, mask.shape).tolist() == bits


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("f", [low_memory_relu, low_memory_gelu, low_memory_silu])
def test_layouts(f: Callable[[Tensor], Tensor], device: str) -> None:
    """Transposed, strided, expanded, channels last: the gradient of the dense copy."""
    base = points(2, 3, 4, 6, device=device, dtype=torch.float32)
    for x in (
        base.mT,
        base[..., ::2],
        base[:1].expand(2, 3, 4, 6),
        base.to(memory_format=torch.channels_last),
    ):
        torch.testing.assert_close(f(x), f(x.contiguous()))
        g = torch.autograd.grad(f(leaf := x.detach().requires_grad_()).square().sum(), leaf)[0]
        expected = gradient(lambda x: f(x).square(), x.contiguous())
        torch.testing.assert_close(g, expected)
    kept = {"memory_format": torch.channels_last}
    assert f(x).is_contiguous(**kept)
    for reduced in (lambda y: y.sum(), lambda y: y.square().sum()):
        (g,) = torch.autograd.grad(reduced(f(leaf)), leaf)
        assert g.is_contiguous(**kept)


RAGGED = {
    "as made": torch.nested.nested_tensor_from_jagged,
    "transposed": lambda values, offsets: torch.nested.nested_tensor_from_jagged(
        values, offsets
    ).transpose(1, 2),
    "with holes": lambda values, offsets: torch.nested.nested_tensor_from_jagged(
        values, offsets, lengths=torch.tensor([2, 0, 4], device=values.device)
    ),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("make", RAGGED.values(), ids=RAGGED)
@pytest.mark.parametrize(
    ("f", "theirs"),
    [(low_memory_relu, F.relu), (low_memory_gelu, F.gelu), (low_memory_silu, F.silu)],
)
def test_jagged_tensors(f, theirs, make, device: str) -> None:
    """Sample by sample PyTorch's function of that sample; the sample lengths stay the same."""
    values, offsets = points(9, 4, device=device).requires_grad_(), torch.tensor([0, 3, 4, 9])
    nested = make(values, offsets.to(device))
    result = f(nested)
    assert result.shape == nested.shape  # the same ragged dimension, not one of equal lengths
    samples = nested.unbind()
    expected = [theirs(sample) for sample in samples]
    for got, right in zip(result.unbind(), expected, strict=True):
        torch.testing.assert_close(got, right)
    theirs_grad = torch.autograd.grad(sum(y.square().sum() for y in expected), values)
    ours = torch.autograd.grad(sum(y.square().sum() for y in result.unbind()), values)
    torch.testing.assert_close(ours, theirs_grad)
    largest = torch.nested.nested_tensor_from_jagged(values, offsets.to(device), max_seqlen=5)
    assert f(largest)._maybe_max_seqlen == 5  # attention asks for it, and would wait for the device


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("f", [low_memory_relu, low_memory_gelu, low_memory_silu])
def test_other_nested_tensors_are_refused(f: Callable[[Tensor], Tensor]) -> None:
    nested = torch.nested.nested_tensor([torch.ones(1, 2), torch.ones(3, 2)])
    expected = (
        rf"{f.__name__}: expected a dense or jagged tensor, got a nested one of torch.strided"
    )
    with pytest.raises(
        NotImplementedError, match=expected + r"; make it with .*layout=torch.jagged"
    ):
        f(nested)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_saved_bytes(dtype: torch.dtype, device: str) -> None:
    """Beside what F.relu and F.gelu save there, before an operation that saves nothing."""
    n, size = 1001, dtype.itemsize

    def saved_by(f: Callable[[Tensor], Tensor]) -> int:
        x = points(n, device=device, dtype=dtype).requires_grad_()
        with saved_tensors(nn.Module()) as saved:
            f(x * 2).sum()
        return saved.total_bytes

    assert saved_by(lambda x: x) == 0
    assert (saved_by(F.relu), saved_by(low_memory_relu)) == (n * size, 126)
    for theirs, ours in [(F.gelu, low_memory_gelu), (F.silu, low_memory_silu)]:
        kept = 8 * n if dtype == torch.float64 else n
        assert saved_by(theirs) == n * size
        assert saved_by(ours) == kept + size  # and the zero that stands for x in the graph
    assert saved_by(lambda x: straight_through(x, torch.round)) == 0
    assert saved_by(lambda x: scale_gradient(x, 2.0)) == 0
    assert saved_by(lambda x: clip_gradient(x, max_norm=1.0)) == 0
    assert saved_by(lambda x: safe_sqrt(x.abs())) == saved_by(lambda x: x.abs().sqrt())
    assert saved_by(log1mexp) == n * size
    assert saved_by(safe_norm) == (n + 1) * size


@pytest.mark.parametrize("f", [low_memory_relu, low_memory_gelu, low_memory_silu])
def test_nothing_is_saved_without_a_gradient(f: Callable[[Tensor], Tensor]) -> None:
    with saved_tensors(nn.Module()) as saved:
        f(torch.ones(5))
    assert saved.total_bytes == 0


def test_a_block_of_a_transformer_under_autocast() -> None:
    """Up, activation, down, in bf16: a byte where F.gelu keeps two, beside the linear layers'."""
    bytes_of = {}
    for name, f in {"theirs": F.gelu, "ours": low_memory_gelu}.items():
        model = nn.Sequential(nn.Linear(8, 32), nn.Identity(), nn.Linear(32, 8))
        x = torch.randn(16, 8)
        with saved_tensors(model) as saved, torch.autocast("cpu", torch.bfloat16):
            y = model[2](f(model[0](x)))
        y.float().sum().backward()
        assert all(p.grad is not None for p in model.parameters())
        bytes_of[name] = saved.total_bytes
    assert bytes_of["theirs"] - bytes_of["ours"] == 16 * 32 - 2


CODED = ["gelu", "gelu_tanh", "silu"]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CODED)
def test_the_stated_bound_holds_everywhere(name: str, device: str) -> None:
    ours, theirs = SMOOTH[name]
    x = torch.cat([torch.linspace(-20, 20, 400_001), torch.logspace(-30, 30, 999)]).to(device)
    x = torch.cat([x, -x])
    error = gradient(ours, x).double() - gradient(theirs, x.double())
    assert 0.004 < error.abs().max() < 0.005
    assert error.mean().abs() < 1e-4  # and the errors cancel in a sum


@pytest.mark.parametrize("name", CODED)
def test_second_derivatives_at_the_coded_input(name: str) -> None:
    """Double backward goes through integers; it is as near as |f'''| times the step allows."""
    ours, theirs = SMOOTH[name]
    x = torch.linspace(-3, 3, 2001)
    for second in (
        lambda f: grad(lambda x: grad(lambda x: f(x).sum())(x).sum()),
        lambda f: lambda x: jvp(grad(lambda x: f(x).sum()), (x,), (torch.ones_like(x),))[1],
        lambda f: (
            lambda x: torch.autograd.functional.vhp(lambda x: f(x).sum(), x, torch.ones_like(x))[1]
        ),
    ):
        error = (second(ours)(x) - second(theirs)(x)).abs().max()
        assert error < 0.02
        # Where the activation is used twice, its backward gets both gradients at once.
        squares = [second(lambda x, f=f: f(x).square())(x) for f in (ours, theirs)]
        torch.testing.assert_close(*squares, atol=0.1, rtol=0)
    exact = jvp(lambda x: jvp(ours, (x,), (x,))[1], (x,), (x,))[1]
    torch.testing.assert_close(exact, jvp(lambda x: jvp(theirs, (x,), (x,))[1], (x,), (x,))[1])


@pytest.mark.parametrize("name", CODED)
def test_coded_activations_at_the_edges(name: str) -> None:
    ours, theirs = SMOOTH[name]
    x = torch.tensor([math.nan, math.inf, -math.inf, 3e38, -3e38, 0.0])
    torch.testing.assert_close(ours(x), theirs(x), equal_nan=True)
    g = gradient(ours, x)
    assert g[0].isnan()
    torch.testing.assert_close(g[1:], torch.tensor([1.0, 0, 1, 0, 0.5]), atol=0.005, rtol=0)


def test_gelu_refuses_an_unknown_approximation() -> None:
    with pytest.raises(ValueError, match=r"low_memory_gelu: expected approximate='none' or 'tanh'"):
        low_memory_gelu(torch.ones(1), "erf")


# ------------------------------------------------------------------ gradients bent on their way


@settings(deadline=None, max_examples=40)
@given(
    values=st.lists(st.floats(width=32), min_size=1, max_size=9),
    f=st.sampled_from([torch.round, torch.sign, torch.zeros_like, lambda x: x, lambda x: x * 2]),
)
def test_straight_through(values: list[float], f: Callable[[Tensor], Tensor]) -> None:
    """Every digit of f(x), where x + (f(x) - x).detach() has lost them or is NaN."""
    x = torch.tensor(values, requires_grad=True)
    y = straight_through(x, f)
    torch.testing.assert_close(y.detach(), f(x.detach()), rtol=0, atol=0, equal_nan=True)
    y.sum().backward()
    assert x.grad.tolist() == [1.0] * len(values)


def test_why_straight_through_is_a_function() -> None:
    x = torch.tensor([1e8, math.inf])
    y = x + (x.sign() - x).detach()
    assert y[0] == 0
    assert y[1].isnan()
    assert straight_through(x, torch.sign).tolist() == [1, 1]


def test_straight_through_forward_mode_and_closures() -> None:
    scale = torch.ones(3, requires_grad=True)
    f = lambda x: straight_through(x, lambda x: (x * scale).round())  # noqa: E731
    assert jvp(f, (torch.rand(3),), (torch.full((3,), 2.0),))[1].tolist() == [2, 2, 2]
    assert grad(lambda x: f(x).sum())(torch.rand(3)).tolist() == [1, 1, 1]
    assert not f(torch.rand(3)).requires_grad


def test_straight_through_refuses_what_has_no_gradient() -> None:
    with pytest.raises(ValueError, match=r"straight_through: .*shape \(3,\) of x, got torch.bool"):
        straight_through(torch.rand(3), lambda x: x > 0)
    with pytest.raises(ValueError, match=r"got torch.float32, \(\); convert"):
        straight_through(torch.rand(3), torch.sum)


@settings(deadline=None, max_examples=30)
@given(x=st.floats(-1e3, 1e3), scale=st.floats(-10, 10))
def test_scale_and_reverse(x: float, scale: float) -> None:
    leaf = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    for f, factor in [(scale_gradient, scale), (reverse_gradient, -scale)]:
        y = f(leaf, scale)
        assert y.item() == x
        assert y.data_ptr() == leaf.data_ptr()
        (g,) = torch.autograd.grad(y**3, leaf, create_graph=True)
        torch.testing.assert_close(g.item(), factor * 3 * x**2)
        if factor:
            (h,) = torch.autograd.grad(g, leaf)
            torch.testing.assert_close(h.item(), factor**2 * 6 * x)


@pytest.mark.parametrize("f", BENT.values())
def test_bent_gradients_have_no_forward_mode(f: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotImplementedError, match="must implement the jvp"):
        jvp(f, (torch.ones(2),), (torch.ones(2),))


def test_a_view_is_not_modified_in_place() -> None:
    y = scale_gradient(torch.ones(2, requires_grad=True) * 1, 2.0)
    with pytest.raises(RuntimeError, match="is a view and is being modified inplace"):
        y += 1


def clipped(g: list[float], dtype: torch.dtype = torch.float32, **bounds: float) -> list[float]:
    x = torch.ones(len(g), dtype=dtype, requires_grad=True)
    clip_gradient(x, **bounds).backward(torch.tensor(g, dtype=dtype))
    return x.grad.tolist()


@settings(deadline=None, max_examples=60)
@given(
    g=st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=8),
    bound=st.floats(2.0**-10, 2.0**10, width=32),
)
def test_clip_against_the_definition(g: list[float], bound: float) -> None:
    norm = math.hypot(*g)
    expected = [v * min(1.0, bound / norm) if norm else v for v in g]
    assert clipped(g, max_norm=bound) == pytest.approx(expected, rel=1e-5, abs=1e-37)
    assert clipped(g, max_value=bound) == [min(max(v, -bound), bound) for v in g]


def test_clip_hides_no_fault() -> None:
    nan, inf = math.nan, math.inf
    same = lambda got, expected: pytest.approx(expected, nan_ok=True) == got  # noqa: E731
    assert same(clipped([1.0, nan], max_value=0.5), [0.5, nan])
    assert same(clipped([1.0, nan], max_norm=0.5), [nan, nan])
    assert same(clipped([1.0, inf], max_norm=0.5), [0.0, nan])
    assert same(clipped([0.0, -inf], max_norm=0.5, max_value=3.0), [0.0, -0.5])
    assert clipped([6e4] * 4, torch.float16, max_norm=2.0) == [1.0] * 4  # the norm overflows fp16
    x = torch.ones(2, 2)
    per_sample = vmap(grad(lambda x: (clip_gradient(x, max_norm=1.0) * 9).sum()))(x)
    torch.testing.assert_close(per_sample, torch.full((2, 2), math.sqrt(0.5)))


@pytest.mark.parametrize("bounds", [{}, {"max_norm": 0.0}, {"max_norm": 1.0, "max_value": -1.0}])
def test_clip_refuses_senseless_bounds(bounds: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="clip_gradient: expected a positive max_norm"):
        clip_gradient(torch.ones(1), **bounds)


# ------------------------------------------------------------------ implicit differentiation


def layer(z: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return torch.tanh(z @ w + b)


def unrolled(z: Tensor, *args: Tensor) -> Tensor:
    for _ in range(200):
        z = layer(z, *args)
    return z


def system(device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    w = 0.25 * points(3, 3, device=device)
    return torch.zeros(2, 3).to(w), w.requires_grad_(), points(2, 3, device=device).requires_grad_()


@pytest.mark.parametrize("device", DEVICES)
def test_fixed_point_gradcheck(device: str) -> None:
    z0, w, b = system(device)
    f = lambda w, b: fixed_point(layer, z0, w, b, tol=1e-13)  # noqa: E731
    assert gradcheck(f, (w, b))
    assert gradgradcheck(f, (w, b))


def test_fixed_point_is_the_limit_of_unrolling_to_order_three() -> None:
    z0, w, b = system()

    def derivatives(z: Tensor) -> list[Tensor]:
        found = [z]
        for t in (w, b, w):
            found += torch.autograd.grad(found[-1].square().sum(), t, create_graph=True)
        return found

    ours = derivatives(fixed_point(layer, z0, w, b, tol=1e-14))
    for got, expected in zip(ours, derivatives(unrolled(z0, w, b)), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


def test_memory_does_not_depend_on_the_iterations() -> None:
    saved_bytes = {}
    for slope in (0.1, 0.999):
        calls = 0

        def f(z: Tensor, a: Tensor, slope: float = slope) -> Tensor:
            nonlocal calls
            calls += 1
            return a + slope * z.sin()

        a = points(50).requires_grad_()
        with saved_tensors(nn.Module()) as saved:
            fixed_point(f, torch.zeros_like(a), a, tol=1e-12).sum()
        saved_bytes[calls] = saved.total_bytes
    few, many = sorted(saved_bytes)
    assert many > 2 * few
    assert set(saved_bytes.values()) == {2 * 50 * 8}  # the solution and a


def test_fixed_point_of_a_module() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.3 * self.linear(z) + x)

    cell, x = Cell().double(), points(4, 3).requires_grad_()
    z0 = torch.zeros(4, 3, dtype=torch.float64)
    wanted = [*cell.parameters(), x]
    got = torch.autograd.grad(fixed_point(cell, z0, x, tol=1e-13).square().sum(), wanted)
    z = z0
    for _ in range(100):
        z = cell(z, x)
    torch.testing.assert_close(got, torch.autograd.grad(z.square().sum(), wanted))
    with pytest.raises(ValueError, match="closes over a tensor that requires a gradient"):
        fixed_point(lambda z: cell(z, x), z0)


def test_fixed_point_of_a_step_of_descent() -> None:
    """The minimum of (z² - a)², found by gradients inside f, is the root of a."""
    a, z0 = torch.tensor(4.0, dtype=torch.float64, requires_grad=True), torch.tensor(1.5).double()
    value = lambda z, a: (z * z - a).square() / 64  # noqa: E731
    root = fixed_point(lambda z, a: z - torch.func.grad(value)(z, a), z0, a, tol=1e-13)
    assert (root.item(), torch.autograd.grad(root, a)[0].item()) == pytest.approx((2, 0.25))

    @torch.enable_grad()
    def step(z: Tensor, a: Tensor) -> Tensor:
        z.requires_grad_()
        return z - torch.autograd.grad(value(z, a), z, create_graph=True)[0]

    with pytest.raises(ValueError, match=r"differentiates by torch.autograd.grad; use torch.func"):
        fixed_point(step, z0, a)


def test_acceleration_solves_what_does_not_contract() -> None:
    """By itself z = b - 3 z diverges; its solution is b / 4."""
    b = points(5).requires_grad_()
    z = fixed_point(lambda z, b: b - 3 * z, torch.zeros(5, dtype=torch.float64), b, tol=1e-10)
    torch.testing.assert_close(z, b / 4)
    torch.testing.assert_close(torch.autograd.grad(z.sum(), b)[0], torch.full_like(b, 0.25))


@pytest.mark.parametrize("factor", [1e-12, 1e12])
def test_the_size_of_the_loss_does_not_matter(factor: float) -> None:
    z0, w, b = system()
    (got,) = torch.autograd.grad(fixed_point(layer, z0, w, b, tol=1e-12).sum() * factor, w)
    (expected,) = torch.autograd.grad(unrolled(z0, w, b).sum() * factor, w)
    torch.testing.assert_close(got, expected, rtol=1e-8, atol=0)


def test_no_convergence_is_an_error() -> None:
    a = torch.tensor(1.0, requires_grad=True)
    message = (
        r"fixed_point: no convergence after 7 of at most 7 iterations: residual .*e.*, tolerance"
    )
    with pytest.raises(RuntimeError, match=message):
        fixed_point(lambda z, a: z + a, torch.tensor(0.0), a, max_iter=7)
    with pytest.raises(RuntimeError, match=r"no convergence after 1 of at most 200.*residual nan"):
        fixed_point(lambda z, a: z * math.nan, torch.tensor(0.0), a)
    z = fixed_point(lambda z, a: a + 0 * z + (z - z.detach()), torch.tensor(1.0), a)
    with pytest.raises(RuntimeError, match="no convergence"):  # I - J is singular
        z.backward()


def test_fixed_point_edges() -> None:
    a = torch.tensor([4.0], requires_grad=True)
    constant = fixed_point(lambda z, a: a * 2, torch.tensor([0.0]), a)
    constant.backward()
    assert (constant.item(), a.grad.item()) == (8, 2)
    assert not fixed_point(lambda z: 0 * z + 1, torch.zeros(2)).requires_grad
    assert fixed_point(lambda z, a: a * z, torch.zeros(0), torch.zeros(0)).shape == (0,)
    z = fixed_point(lambda z, a, i: a[i] / 2 + z / 2, torch.tensor(0.0), a, torch.tensor(0))
    assert torch.autograd.grad(z, a)[0].item() == pytest.approx(1)
    (zero,) = torch.autograd.grad(fixed_point(lambda z, a: a, a.detach(), a), a, torch.zeros(1))
    assert zero.item() == 0
    with pytest.raises(
        ValueError, match=r"expected f to return the shape \(1,\) of z0, got \(2,\)"
    ):
        fixed_point(lambda z: z.expand(2), torch.zeros(1))
    with pytest.raises(TypeError, match="fixed_point: expected a floating-point tensor"):
        fixed_point(lambda z: z, torch.zeros(1, dtype=torch.int64))


def test_fixed_point_refuses_transforms() -> None:
    f = lambda a: fixed_point(lambda z, a: z / 2 + a, torch.tensor(0.0), a)  # noqa: E731
    three = torch.ones(3)
    for transformed in (vmap(f), vmap(grad(f)), lambda a: jvp(f, (a,), (a,))):
        with pytest.raises(NotImplementedError, match=r"outside torch.func transforms"):
            transformed(three)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward mode"):
        f(forward_ad.make_dual(three[0], three[0]))


def test_fixed_point_notices_modified_arguments() -> None:
    a = torch.tensor(1.0, requires_grad=True)
    z = fixed_point(lambda z, a: z / 2 + a, torch.tensor(0.0), a)
    with torch.no_grad():
        a += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()


def test_fixed_point_under_autocast() -> None:
    w, b = 0.1 * torch.ones(3, 3), torch.ones(2, 3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        z = fixed_point(lambda z, w, b: torch.tanh(z @ w + b), torch.zeros(2, 3), w, b, tol=1e-2)
    z.sum().backward()
    assert z.dtype == torch.float32
    assert b.grad.isfinite().all()


def test_fixed_point_leaks_nothing() -> None:
    z0, w, b = system()
    gc.disable()
    try:
        z = fixed_point(layer, z0, w, b)
        torch.autograd.grad(z.sum(), w, create_graph=True)
        reference = weakref.ref(z)
        del z
        assert reference() is None
    finally:
        gc.enable()


def test_fixed_point_compiles_with_a_graph_break() -> None:
    z0, w, b = system()
    compiled = torch.compile(lambda w, b: fixed_point(layer, z0, w, b).sin(), backend="aot_eager")
    torch.testing.assert_close(compiled(w, b), fixed_point(layer, z0, w, b).sin())


# ------------------------------------------------------------------ derivatives that stay finite


@settings(deadline=None, max_examples=100)
@given(
    st.floats(-700, -1e-300, exclude_max=True)
    | st.floats(-300, 0).map(lambda e: -(10.0**e))
    | st.sampled_from([-math.log(2), -5e-324, -1e-16, -37.0, -745.0])
)
def test_log1mexp_against_mpmath(x: float) -> None:
    with mpmath.workdps(700):
        e = mpmath.exp(mpmath.mpf(x))
        value, slope = mpmath.log1p(-e), -e / (1 - e)
        curve = -e / (1 - e) ** 2
        value, slope, curve = (float(v) for v in (value, slope, curve))
    t = torch.tensor(x, dtype=torch.float64, requires_grad=True)
    y = log1mexp(t)
    (g,) = torch.autograd.grad(y, t, create_graph=True)
    assert y.item() == pytest.approx(value, rel=1e-14, abs=1e-320)
    assert g.item() == pytest.approx(slope, rel=1e-14, abs=1e-320)
    tangent = jvp(log1mexp, (t.detach(),), (torch.ones((), dtype=torch.float64),))[1]
    assert tangent.item() == g.item()
    if math.isfinite(curve):
        (h,) = torch.autograd.grad(g, t)
        assert h.item() == pytest.approx(curve, rel=1e-13, abs=1e-320)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_log1mexp_where_the_composition_is_nan(dtype: torch.dtype) -> None:
    def composed(x: Tensor) -> Tensor:
        near, far = torch.log(-torch.expm1(x)), torch.log1p(-torch.exp(x))
        return torch.where(x > -math.log(2), near, far)

    x = torch.tensor([-torch.finfo(dtype).smallest_normal, -1.0], dtype=dtype)
    assert gradient(composed, x)[0].isnan()
    assert not gradient(log1mexp, x).isnan().any()
    ends = torch.tensor([0.0, -math.inf, 1.0, math.nan], dtype=dtype)
    value, slope = log1mexp(ends), gradient(log1mexp, ends)
    assert value[:2].tolist() == [-math.inf, 0]
    assert slope[:2].tolist() == [-math.inf, 0]
    assert value[2:].isnan().all()


@pytest.mark.parametrize("f", [safe_norm, safe_sqrt, lambda x: safe_norm(x, 0, True).squeeze()])
def test_every_derivative_is_zero_at_zero(f: Callable[[Tensor], Tensor]) -> None:
    zero, v = torch.zeros(3), torch.ones(3)
    g = lambda x: f(x).sum()  # noqa: E731
    assert gradient(f, zero).tolist() == [0, 0, 0]
    assert jvp(g, (zero,), (v,))[1] == 0
    for second in (hessian, lambda g: jacrev(jacrev(g)), lambda g: jacfwd(jacfwd(g))):
        assert not second(g)(zero).any()
    h = torch.autograd.functional.hessian(g, zero)
    assert not h.any()


def test_why_they_are_functions() -> None:
    """What autograd makes of the compositions that one would write; once mended, drop ours."""
    zero = torch.zeros(3)
    assert gradient(lambda x: x.square().sum().sqrt(), zero).isnan().all()
    assert gradient(lambda x: x.square().sqrt(), zero).isnan().all()
    assert gradient(lambda x: torch.where(x > 0, x.square().sqrt(), 0), zero).isnan().all()
    assert torch.autograd.functional.hessian(torch.linalg.vector_norm, zero).isnan().all()
    assert torch.linalg.vector_norm(torch.full((2,), 1e30)).isinf()


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    exponent=st.sampled_from([-30, -20, 0, 20, 30]),
    keepdim=st.booleans(),
    data=st.data(),
)
def test_safe_norm_against_float64(
    shape: list[int], exponent: int, keepdim: bool, data: st.DataObject
) -> None:
    dims = st.integers(-len(shape), len(shape) - 1)
    dim = data.draw(
        st.none() | dims | st.lists(st.integers(0, len(shape) - 1), min_size=1, unique=True)
    )
    x = (points(*shape) * 10.0**exponent).float()
    x[x.abs() < 0.2 * 10.0**exponent] = 0
    norm = safe_norm(x, dim, keepdim)
    expected = torch.linalg.vector_norm(x.double(), dim=dim, keepdim=keepdim)
    torch.testing.assert_close(norm.double(), expected, rtol=1e-6, atol=0)
    f = lambda x: torch.linalg.vector_norm(x, dim=dim, keepdim=keepdim)  # noqa: E731
    g = gradient(lambda x: safe_norm(x, dim, keepdim), x)
    torch.testing.assert_close(g.double(), gradient(f, x.double()), rtol=1e-5, atol=0)


def test_safe_norm_and_sqrt_do_not_hide_faults() -> None:
    assert safe_norm(torch.tensor([1.0, math.nan])).isnan()
    assert safe_norm(torch.tensor([1.0, -math.inf])).isinf()
    assert gradient(safe_sqrt, torch.tensor([-1.0, math.nan])).isnan().all()
    assert safe_norm(torch.zeros(2, 0), dim=1).tolist() == [0, 0]
