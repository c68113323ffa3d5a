"""linear_cross_entropy against PyTorch's own pair of calls."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES, FLOAT_DTYPES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.testing import assert_close

from autograd_lib.functions.cross_entropy import linear_cross_entropy
from autograd_lib.higher_order import jet
from autograd_lib.memory import peak_bytes, saved_tensors


def problem(
    shape: tuple[int, ...] = (7,),
    width: int = 4,
    classes: int = 6,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    seed: int = 0,
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    floats = {
        "input": torch.randn(*shape, width, generator=g, dtype=torch.float64),
        "weight": torch.randn(classes, width, generator=g, dtype=torch.float64) / width**0.5,
        "bias": torch.randn(classes, generator=g, dtype=torch.float64),
    }
    tensors = {k: v.to(device, dtype).requires_grad_() for k, v in floats.items()}
    return tensors | {"target": torch.randint(classes, shape, generator=g).to(device)}


def pair(
    input: Tensor, weight: Tensor, target: Tensor, bias: Tensor | None = None, **options
) -> Tensor:
    """What a user writes."""
    options.pop("chunk_size", None)
    class_weight = options.pop("class_weight", None)
    softcap, z_loss = options.pop("softcap", None), options.pop("z_loss", 0.0)
    if shift := options.pop("shift", 0):
        input, target = input[..., :-shift, :], target[..., shift:]
    logits = F.linear(input, weight, bias).reshape(-1, len(weight))
    if softcap or z_loss:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        class_weight = None if class_weight is None else class_weight.to(logits.dtype)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, target.flatten(), class_weight, **options)
    if z_loss:
        kept = target.flatten() != options.get("ignore_index", -100)
        squares = torch.where(kept, z_loss * logits.logsumexp(-1).square(), 0)
        added = {"none": squares, "sum": squares.sum(), "mean": squares.sum() / kept.sum()}
        loss = loss + added[options.get("reduction", "mean")]
    return loss.reshape(target.shape) if options.get("reduction") == "none" else loss


def agree(tensors: dict[str, Tensor], **options) -> None:
    ours, theirs = linear_cross_entropy(**tensors, **options), pair(**tensors, **options)
    assert_close(ours, theirs, equal_nan=True)
    inputs = [t for t in tensors.values() if t is not None and t.requires_grad]
    upstream = torch.randn_like(theirs)
    assert_close(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(theirs, inputs, upstream),
        equal_nan=True,
    )
    with torch.no_grad():
        assert_close(linear_cross_entropy(**tensors, **options), theirs, equal_nan=True)


@settings(deadline=None, max_examples=150)
@given(
    shape=st.lists(st.integers(1, 5), max_size=3).map(tuple),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 9)),
    chunk_size=st.just(256) | st.integers(1, 7),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    label_smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    has_bias=st.booleans(),
    class_weights=st.booleans(),
    ignored=st.sampled_from([-100, 0, 3]),
    softcap=st.sampled_from([None, None, 0.01, 1, 30.0]),
    z_loss=st.sampled_from([0, 0.0, 1e-4, 0.5]),
    shift=st.sampled_from([0, 0, 1, True, 2]),
    seed=st.integers(0, 2**31),
)
def test_equals_the_pair(
    shape,
    sizes,
    chunk_size,
    reduction,
    label_smoothing,
    has_bias,
    class_weights,
    ignored,
    softcap,
    z_loss,
    shift,
    seed,
) -> None:
    torch.manual_seed(seed)
    tensors = problem((*shape,), *sizes, seed=seed)
    tensors["target"] = tensors["target"].where(torch.rand(shape) < 0.7, ignored)
    valid = (tensors["target"] < sizes[1]) | (tensors["target"] == ignored)
    tensors["target"] = tensors["target"].where(valid, ignored)
    if not has_bias:
        tensors["bias"] = None
    agree(
        tensors,
        class_weight=torch.rand(sizes[1], dtype=torch.float64) + 0.1 if class_weights else None,
        ignore_index=ignored,
        reduction=reduction,
        label_smoothing=label_smoothing,
        softcap=softcap,
        z_loss=z_loss,
        shift=shift if shape else 0,
        chunk_size=chunk_size,
    )


OPTIONS = [
    {"reduction": reduction, "label_smoothing": smoothing, "class_weight": class_weight}
    for reduction in ("mean", "sum", "none")
    for smoothing in (0.0, 0.2)
    for class_weight in (None, torch.tensor([0.5, 2.0, 1.0, 0.0, 1.0, 3.0], dtype=torch.float64))
]
# What heads of today add to it, alone and all together.
EXTRAS = [
    {"softcap": 2.0},
    {"z_loss": 0.1},
    {"shift": 2},
    *({"softcap": 2.0, "z_loss": 0.1, "shift": 1} | options for options in OPTIONS[::3]),
]


@pytest.mark.parametrize("options", OPTIONS + EXTRAS)
@pytest.mark.parametrize("has_bias", [True, False])
def test_first_and_second_derivatives(options: dict, has_bias: bool) -> None:
    tensors = problem()
    tensors["target"][2] = -100
    operands = [
        tensors[k] for k in (["input", "weight", "bias"] if has_bias else ["input", "weight"])
    ]

    def loss(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return linear_cross_entropy(x, weight, tensors["target"], bias, chunk_size=3, **options)

    assert gradcheck(loss, operands, check_batched_grad=True)
    assert gradcheck(loss, operands, check_forward_ad=True, check_batched_forward_grad=True)
    assert gradgradcheck(loss, operands, check_batched_grad=True)


def nested(loss_fn, tensors: dict[str, Tensor], **options) -> tuple[Tensor, ...]:
    """Three derivatives, each of a function of the one before and of the operands."""
    operands = [tensors[k] for k in ("input", "weight", "bias")]
    value = loss_fn(**tensors, **options) * operands[0].square().sum()
    for _ in range(2):
        grads = torch.autograd.grad(value, operands, create_graph=True)
        value = sum(g.pow(3).sum() for g in grads)
    return torch.autograd.grad(value, operands)


@pytest.mark.parametrize("options", [{}, EXTRAS[4]])
def test_third_derivatives(options: dict) -> None:
    assert_close(
        nested(linear_cross_entropy, problem(), chunk_size=3, **options),
        nested(pair, problem(), **options),
        rtol=1e-9,
        atol=0,
    )


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3], *EXTRAS])
def test_jet_follows(options: dict) -> None:
    """Against Taylor mode on the pair, to order three along input and weight together."""
    tensors = {k: v.detach() for k, v in problem((2, 5)).items()}
    target = tensors.pop("target")
    target[0, 3] = -100
    along = {k: v.cos() for k, v in tensors.items()}

    def bound(loss_fn, **more):
        return lambda p: loss_fn(**p, target=target, **options, **more).sin().sum()

    ours = jet(bound(linear_cross_entropy, chunk_size=3), tensors, along, 3)
    assert_close(ours, jet(bound(pair), tensors, along, 3))


def accuracy(target: Tensor, input: Tensor, weight: Tensor, **tensors: Tensor) -> Tensor:
    """Right or not, by the class whose logit is the largest."""
    return F.linear(input, weight, tensors["bias"]).argmax(-1) == target


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[3] | {"ignore_index": 4}, EXTRAS[0]])
def test_token_accuracy(options: dict, device: str) -> None:
    """Beside a loss and gradients that are those without it; of the targets that are kept."""
    tensors = problem((3, 7), device=device)
    best = F.linear(*(tensors[k] for k in ("input", "weight", "bias"))).argmax(-1)
    tensors["target"][:, ::2] = best[:, ::2]  # as learned
    ignored = options.get("ignore_index", -100)
    tensors["target"][1, 2:5] = ignored
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    operands = [tensors[k] for k in ("input", "weight", "bias")]
    kept = tensors["target"] != ignored
    right = (accuracy(**tensors) & kept).float()
    assert 0.3 < right.sum() / kept.sum() < 0.9
    assert ignored < 0 or (accuracy(**tensors) & ~kept).any()
    for reduction in ("mean", "sum", "none"):
        options = options | {"reduction": reduction, "chunk_size": 4}
        plain = linear_cross_entropy(**tensors, **options)
        loss, share = linear_cross_entropy(**tensors, **options, return_token_accuracy=True)
        assert torch.equal(loss, plain)
        assert_close(
            torch.autograd.grad(loss.sum(), operands), torch.autograd.grad(plain.sum(), operands)
        )
        assert not share.requires_grad
        assert_close(share, right if reduction == "none" else right.sum() / kept.sum())


def test_token_accuracy_shifted_transformed_and_of_nothing() -> None:
    tensors = {k: v.detach() for k, v in problem((3, 7)).items()}
    x, weight, bias, target = tensors.values()
    ask = lambda x, **more: linear_cross_entropy(  # noqa: E731
        x, weight, target, bias, return_token_accuracy=True, chunk_size=4, **more
    )
    right = accuracy(target[:, 2:], x[:, :-2], weight, bias=bias).float()
    assert_close(ask(x, shift=2)[1], right.mean())
    assert_close(ask(x, shift=2, reduction="none")[1], right)
    (_, dual), (_, tangent) = jvp(lambda x: ask(x, shift=2), (x,), (x.cos(),))
    assert_close(dual, right.mean())
    assert tangent == 0
    by_sample = vmap(
        lambda x, t: linear_cross_entropy(x, weight, t, bias, return_token_accuracy=True)
    )
    assert_close(by_sample(x, target)[1], accuracy(target, x, weight, bias=bias).float().mean(1))
    losses, shares = ask(x, shift=9, reduction="none")
    assert losses.shape == shares.shape == (3, 0)
    assert all(value.isnan() for value in ask(x, shift=9))
    in_halves = linear_cross_entropy(
        *(t.bfloat16() for t in (x, weight)), target, return_token_accuracy=True
    )
    assert [value.dtype for value in in_halves] == [torch.float32] * 2


def test_second_derivative_where_upstream_is_a_constant() -> None:
    """The case in which `once_differentiable` would say nothing: create_graph, gradient of one."""
    tensors = problem()
    results = []
    for loss_fn in (linear_cross_entropy, pair):
        x = tensors["input"]
        (g,) = torch.autograd.grad(loss_fn(**tensors), x, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum() + x.square().sum(), x)[0])
    assert_close(*results)


@pytest.mark.skipif(not hasattr(nn, "LinearCrossEntropyOptions"), reason="since PyTorch 2.13")
@pytest.mark.xfail(strict=True, reason="upstream's chunks are constants to a second derivative")
def test_upstreams_second_derivative_is_silently_wrong() -> None:
    """Pinned: when it is mended (or refuses), the docstrings and the chapter have to say so."""
    tensors = {k: v.detach().float() for k, v in problem((32,)).items()}
    results = []
    for options in (
        None,
        nn.LinearCrossEntropyOptions(batch_chunk_size=8, allow_retain_graph=True),
    ):
        x = tensors["input"].clone().requires_grad_()
        a = torch.tensor(2.0, requires_grad=True)
        loss = F.linear_cross_entropy(
            x, tensors["weight"], tensors["target"].long(), options=options
        )
        (g,) = torch.autograd.grad(loss * x.square().sum() * a, x, create_graph=True)
        results.append(torch.autograd.grad(g.square().sum(), x)[0])
    assert_close(*results)


class TestTransforms:
    """torch.func on the function against torch.func on the pair."""

    x, weight, _, target = (t.detach() for t in problem().values())
    along = torch.ones_like(weight)

    @pytest.mark.parametrize(
        "transform",
        [
            lambda f, x, w, v: grad(f, (0, 1))(x, w),
            lambda f, x, w, v: jacrev(grad(f))(x, w),
            lambda f, x, w, v: grad(lambda a: grad(f, 1)(a, w).pow(3).sum())(x),
            lambda f, x, w, v: jvp(lambda w: f(x, w), (w,), (v,)),
            lambda f, x, w, v: jacfwd(f)(x, w),
            lambda f, x, w, v: jvp(
                lambda a: jvp(lambda b: f(a, b), (w,), (v,))[1], (x,), (x.cos(),)
            ),
            lambda f, x, w, v: jvp(lambda a: jvp(lambda b: f(x, b), (a,), (v,))[1], (w,), (v,)),
            lambda f, x, w, v: grad(lambda a: jvp(lambda b: f(a, b), (w,), (v,))[1])(x),
            lambda f, x, w, v: vmap(f, (0, None))(torch.stack([x, x.cos()]), w),
            lambda f, x, w, v: vmap(grad(f, (0, 1)), (1, None))(torch.stack([x, x.cos()], 1), w),
            lambda f, x, w, v: vmap(jacrev(grad(f)), (0, 0))(
                torch.stack([x] * 2), torch.stack([w, v])
            ),
            lambda f, x, w, v: vmap(lambda a: jvp(lambda b: f(a, b), (w,), (v,)))(
                torch.stack([x, v[:1] + x])
            ),
        ],
    )
    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_right(self, transform, reduction: str) -> None:
        def bound(loss_fn, **options):
            # a weighted sum, so that grad has a scalar to start from
            factors = torch.arange(1.0, 8.0, dtype=torch.float64)
            return lambda x, w: (
                factors * loss_fn(x, w, self.target, reduction=reduction, **options)
            ).sum()

        arguments = (self.x, self.weight, self.along)
        ours = transform(bound(linear_cross_entropy, chunk_size=3), *arguments)
        assert_close(ours, transform(bound(pair), *arguments))

    def test_batched_targets(self) -> None:
        xs, targets = (
            torch.stack([self.x, self.x.cos()]),
            torch.stack([self.target, self.target.flip(0)]),
        )
        for loss_fn in (linear_cross_entropy, pair):
            rows = [loss_fn(x, self.weight, t) for x, t in zip(xs, targets, strict=True)]
            got = vmap(lambda x, t: linear_cross_entropy(x, self.weight, t))(xs, targets)
            assert_close(got, torch.stack(rows))

    @pytest.mark.parametrize(
        "transform",
        [
            lambda f, x, w, v: hessian(f)(x, w),
            lambda f, x, w, v: jvp(lambda w: grad(f)(x, w), (w,), (v,)),
            # a tangent in another argument only: nothing to see from inside the call
            lambda f, x, w, v: jvp(
                lambda a: jvp(lambda b: f(a, w) * b, (x.sum(),), (x.sum(),))[1], (x,), (x,)
            ),
        ],
    )
    def test_forward_over_reverse_is_refused(self, transform) -> None:
        def loss(x: Tensor, w: Tensor) -> Tensor:
            return linear_cross_entropy(x, w, self.target)

        with pytest.raises(
            NotImplementedError, match=r"linear_cross_entropy: forward mode .*reverse"
        ):
            transform(loss, self.x, self.weight, self.along)

    def test_dual_numbers(self) -> None:
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(self.weight, self.along)
            tangents = [
                forward_ad.unpack_dual(loss_fn(self.x, dual, self.target)).tangent
                for loss_fn in (linear_cross_entropy, pair)
            ]
        assert_close(*tangents)
        assert tangents[0] != 0


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("options", OPTIONS[:2] + OPTIONS[-1:] + EXTRAS)
def test_dtypes(dtype: torch.dtype, options: dict, device: str) -> None:
    """Against float64, with the error of the pair in the same dtype as the measure."""
    tensors = problem((300,), 32, 6, dtype, device)
    exact = {k: v.detach().double() if v.is_floating_point() else v for k, v in tensors.items()}
    class_weight = options.get("class_weight")
    options = options | {"chunk_size": 64}

    def run(loss_fn, tensors: dict[str, Tensor], wide: torch.dtype) -> list[Tensor]:
        tensors = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in tensors.items()}
        weights = None if class_weight is None else class_weight.to(device, wide)
        loss = loss_fn(**tensors, **options | {"class_weight": weights})
        operands = [tensors[k] for k in ("input", "weight", "bias")]
        return [loss, *torch.autograd.grad(loss.sum(), operands)]

    reference, theirs = run(pair, exact, torch.float64), run(pair, tensors, dtype)
    ours = run(linear_cross_entropy, tensors, dtype)
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)
    assert [g.dtype for g in ours[1:]] == [dtype] * 3

    def error(value: Tensor, right: Tensor) -> float:
        return ((value.double() - right).norm() / right.norm()).item()

    bound = 4 * torch.finfo(dtype).eps
    for value, other, right in zip(ours, theirs, reference, strict=True):
        assert error(value, right) <= max(bound, 1.2 * error(other, right))


@pytest.mark.parametrize("device", DEVICES)
def test_small_gradients_of_fp16_survive_until_they_are_scaled(device: str) -> None:
    """Under a GradScaler the backward multiplies by 2^16 what must be there to multiply."""
    tensors = problem((4096,), 2, 500, torch.float16, device)
    tensors["input"].data *= 0.01  # a 4096th of it has hardly a digit in fp16
    loss = linear_cross_entropy(**tensors)
    operands = [tensors[k] for k in ("input", "weight", "bias")]
    grads = torch.autograd.grad(loss * 65536.0, operands)
    exact = {
        k: v.detach().double().requires_grad_() if v.is_floating_point() else v
        for k, v in tensors.items()
    }
    expected = torch.autograd.grad(
        pair(**exact) * 65536.0, [exact[k] for k in ("input", "weight", "bias")]
    )
    for got, right in zip(grads, expected, strict=True):
        assert ((got.double() - right).norm() / right.norm()).item() < 4e-3


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_of_the_head(dtype: torch.dtype, device: str) -> None:
    tensors = problem((50,), 8, 20, dtype, device)
    operands = [tensors[k] for k in ("input", "weight", "bias")]
    options = {"label_smoothing": 0.3, "softcap": 5.0, "z_loss": 0.01}
    with torch.autocast(device, torch.bfloat16):
        ours, theirs = linear_cross_entropy(**tensors, **options), pair(**tensors, **options)
        inside = torch.autograd.grad(ours, operands, retain_graph=True)
    outside = torch.autograd.grad(ours, operands)
    assert ours.dtype == torch.promote_types(dtype, torch.float32)
    assert_close(inside, outside)
    # Both round the logits to bf16; all that follows is in float32.
    assert_close(
        ours, theirs.to(ours.dtype), rtol=1e-12 if dtype == torch.float64 else 1e-5, atol=0
    )
    tolerance = 1e-12 if dtype == torch.float64 else 2e-2
    for got, right in zip(outside, torch.autograd.grad(theirs, operands), strict=True):
        assert got.dtype == dtype
        assert_close(got, right, rtol=tolerance, atol=tolerance * right.abs().max().item())


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("needed", [*itertools.product([True, False], repeat=3)])
def test_only_what_is_required_is_computed_and_saved(needed: tuple[bool, ...], device: str) -> None:
    tensors = problem((64,), 4, 6, torch.float32, device)
    names = ("input", "weight", "bias")
    for name, need in zip(names, needed, strict=True):
        tensors[name].requires_grad_(need)
    head = nn.Module()  # whose parameters are left out of the count
    head.weight, head.bias = (
        nn.Parameter(tensors[k], need) for k, need in zip(names[1:], needed[1:], strict=True)
    )
    tensors |= {"weight": head.weight, "bias": head.bias}
    with saved_tensors(head) as saved:
        loss = linear_cross_entropy(**tensors)
    assert loss.requires_grad == any(needed)
    operands = [tensors[k] for k, need in zip(names, needed, strict=True) if need]
    kept = [tensors["input"], tensors["target"], *operands] if operands else []
    expected = sum(t.numel() * t.element_size() for t in kept)
    assert saved.total_bytes == expected
    assert saved.blind_spots == []
    more = {"softcap": 3.0, "z_loss": 0.1, "shift": 1, "return_token_accuracy": True}
    with saved_tensors(head) as saved:
        linear_cross_entropy(**tensors, **more)
    assert saved.total_bytes == expected  # the shifted targets in place of the targets
    if operands:
        grads = torch.autograd.grad(loss, operands)
        assert_close(grads, torch.autograd.grad(pair(**tensors), operands))


def test_the_logits_are_never_held() -> None:
    """Peak bytes of a step: the gradients, one chunk of logits, and next to nothing else."""
    rows, width, classes, chunk = 512, 16, 1000, 32
    tensors = problem((rows,), width, classes, torch.float32)

    def step(loss_fn, **options):
        def run() -> None:
            loss_fn(**tensors, **options).backward()
            for tensor in tensors.values():
                tensor.grad = None

        return peak_bytes(run)

    logits, one_chunk = 4 * rows * classes, 4 * chunk * classes
    grads = sum(4 * tensors[k].numel() for k in ("input", "weight", "bias"))
    assert step(pair) >= 3 * logits
    assert step(linear_cross_entropy, chunk_size=chunk) < 2 * grads + one_chunk + logits // 20
    for options in (
        {"label_smoothing": 0.1},
        {"class_weight": torch.ones(classes)},
        {"reduction": "sum"},
        {"z_loss": 0.1},
        {"shift": 1},
    ):
        assert step(linear_cross_entropy, chunk_size=chunk, **options) < step(pair, **options) / 8
    capped = step(linear_cross_entropy, chunk_size=chunk, softcap=3.0)
    assert capped < 2 * grads + 2 * one_chunk + logits // 20  # the derivative of the cap is another

    def rows_apart(**tensors: Tensor) -> Tensor:
        return linear_cross_entropy(**tensors, chunk_size=chunk, reduction="none").sum()

    assert step(rows_apart) < step(pair) / 8
    with torch.no_grad():
        assert (
            peak_bytes(lambda: linear_cross_entropy(**tensors, chunk_size=chunk)) < 1.2 * one_chunk
        )


def test_second_derivatives_hold_no_logits_either() -> None:
    tensors = problem((512,), 16, 1000, torch.float32)
    operands = [tensors[k] for k in ("input", "weight", "bias")]

    def step(loss_fn, **options) -> int:
        def run() -> None:
            grads = torch.autograd.grad(loss_fn(**tensors, **options), operands, create_graph=True)
            torch.autograd.grad(sum(g.square().sum() for g in grads), operands)

        return peak_bytes(run)

    assert step(linear_cross_entropy, chunk_size=32) < step(pair) / 4


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("rows", [0, 3])
@pytest.mark.parametrize("options", [{}, {"z_loss": 0.1}, {"z_loss": 0.1, **OPTIONS[1]}])
def test_nothing_to_learn_from(options: dict, reduction: str, rows: int, device: str) -> None:
    """An empty batch, or all of it ignored: the pair's NaN for a mean, and gradients of zero."""
    tensors = problem((rows,), device=device)
    tensors["target"].fill_(-100)
    options = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in options.items()}
    options |= {"reduction": reduction}
    ours = linear_cross_entropy(**tensors, **options)
    assert_close(ours, pair(**tensors, **options), equal_nan=True)
    assert ours.isnan().any() == (reduction == "mean")
    operands = [tensors[k] for k in ("input", "weight", "bias")]
    for g, operand in zip(torch.autograd.grad(ours.sum(), operands), operands, strict=True):
        assert_close(g, torch.zeros_like(operand))


def test_an_ignored_row_may_hold_anything_in_the_loss() -> None:
    tensors = problem()
    tensors["input"].data[1] = math.inf
    tensors["target"][1] = -100
    assert_close(linear_cross_entropy(**tensors), pair(**tensors))
    assert linear_cross_entropy(**tensors).isfinite()


@pytest.mark.parametrize("device", DEVICES)
def test_extreme_logits(device: str) -> None:
    for scale in (1e4, 1e30):
        tensors = problem(dtype=torch.float32, device=device)
        tensors["weight"].data *= scale
        agree(tensors)


def test_layouts() -> None:
    tensors = problem((3, 5))
    tensors["input"] = tensors["input"].detach().transpose(0, 1).requires_grad_()
    tensors["target"] = tensors["target"].T
    tensors["weight"] = tensors["weight"].detach().T.contiguous().T.requires_grad_()
    agree(tensors, chunk_size=4)
    tensors["bias"] = torch.zeros(1, dtype=torch.float64).expand(6).requires_grad_()
    agree(tensors, chunk_size=4)


def test_backward_twice_and_a_tied_weight() -> None:
    tensors = problem()
    loss = linear_cross_entropy(**tensors)
    first = torch.autograd.grad(loss, tensors["weight"], retain_graph=True)
    assert_close(torch.autograd.grad(loss, tensors["weight"]), first)
    embedding = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([1, 5, 2])
    grads = [
        torch.autograd.grad(f(embedding[tokens], embedding, tokens), embedding)[0]
        for f in (linear_cross_entropy, pair)
    ]
    assert_close(*grads)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # read by Dynamo
def test_compiled_code_breaks_the_graph_and_keeps_the_memory() -> None:
    tensors = problem((512,), 16, 1000, torch.float32)

    compiled_operations = set()

    def record(module: torch.fx.GraphModule, _):
        compiled_operations.update(node.name.rstrip("_0123456789") for node in module.graph.nodes)
        return module.forward

    @torch.compile(backend=record)
    def compiled(**tensors: Tensor) -> Tensor:
        return linear_cross_entropy(**tensors, chunk_size=32).exp()

    def run() -> None:
        compiled(**tensors).backward()
        for tensor in tensors.values():
            tensor.grad = None

    assert_close(compiled(**tensors), pair(**tensors).exp())
    assert "exp" in compiled_operations
    assert not compiled_operations & {"mm", "addmm", "log_softmax"}  # the chunks are left alone
    assert peak_bytes(run) < 4 * 512 * 1000 / 4
    tensors["target"][3] = 1000
    with pytest.raises(IndexError, match="got 1000"):
        compiled(**tensors)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("bad", [-1, 6, 2**40])
def test_targets_out_of_range(bad: int, dtype: torch.dtype, device: str) -> None:
    tensors = problem(dtype=dtype, device=device)
    tensors["target"][4] = bad
    for reduction in ("mean", "none"):
        with pytest.raises(IndexError, match=rf"in \[0, 6\) or ignore_index=-100, got {bad}"):
            linear_cross_entropy(**tensors, reduction=reduction)
    linear_cross_entropy(**tensors, ignore_index=bad)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"weight": torch.ones(6, 5)}, ValueError, r"\[\(7, 4\), \(6, 5\), \(7,\), \(6,\)\]"),
        ({"weight": torch.ones(4)}, ValueError, r"weight \(classes, in\)"),
        ({"input": torch.ones(())}, ValueError, r"input \(\.\.\., in\)"),
        ({"target": torch.ones(6, dtype=torch.int64)}, ValueError, r"target.*\(6, 4\), \(6,\), "),
        ({"target": torch.ones(7)}, TypeError, r"torch.int64.*got target of torch.float32"),
        ({"bias": torch.ones(4)}, ValueError, r"bias.* \(classes,\), got .*\(4,\)\]"),
        ({"class_weight": torch.ones(4)}, ValueError, r"class_weight.*, got .*\(4,\)\]"),
        ({"class_weight": torch.ones(6).requires_grad_()}, ValueError, "detach"),
        ({"input": None}, TypeError, r"tensors .* got \['NoneType', 'Tensor', 'Tensor'"),
        ({"weight": nn.Linear(4, 6)}, TypeError, r"of an nn.Linear its weight and bias.*'Linear'"),
        ({"input": torch.ones(7, 4, dtype=torch.complex64)}, TypeError, "real floating-point"),
        ({"weight": torch.ones(6, 4, dtype=torch.float64)}, TypeError, "one dtype.*autocast"),
        ({"reduction": "max"}, ValueError, "'mean', 'sum' or 'none', .* got 'max', 0.0 and 256"),
        ({"label_smoothing": 1.5}, ValueError, r"in \[0, 1\] .* got 'mean', 1.5"),
        ({"chunk_size": 0}, ValueError, "chunk_size >= 1, got .* and 0"),
        ({"chunk_size": -3}, ValueError, "chunk_size >= 1, got .* and -3"),
        ({"softcap": 0.0}, ValueError, "softcap to be None or a number above 0, got 0.0"),
        ({"softcap": math.inf}, ValueError, "softcap .*, got inf"),
        ({"softcap": torch.tensor(3.0)}, ValueError, r"softcap .*, got tensor\(3.\)"),
        ({"z_loss": -1e-4}, ValueError, "z_loss to be a number of 0 or more, got -0.0001"),
        ({"z_loss": None}, ValueError, "z_loss .* got None"),
        ({"shift": -1}, ValueError, "shift to be an integer of 0 or more.*, got -1 and a target"),
        ({"shift": 1.0}, ValueError, "shift .* got 1.0"),
        (
            {"shift": 1, "input": torch.ones(4), "target": torch.tensor(1)},
            ValueError,
            "a dimension of target to shift along, got 1 and a target of 0 dimensions",
        ),
    ],
)
def test_refuses(change: dict, error: type[Exception], message: str) -> None:
    tensors = problem(dtype=torch.float32)
    with pytest.raises(error, match=rf"^linear_cross_entropy: expected .*{message}"):
        linear_cross_entropy(**tensors | change)
