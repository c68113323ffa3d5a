"""autograd_lib.gradients against float64 references computed element by element."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from cases import DEVICES, FLOAT_DTYPES, MODELS, mlp, reference
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import autograd_lib
from autograd_lib import (
    AutogradUtils,
    check_gradients_exist,
    compute_gradient_statistics,
    enable_gradients,
    get_gradient_norms,
    missing_gradients,
)
from autograd_lib.core.rows import DEVICE_SIZES


def with_gradients(**grads: Tensor) -> nn.Module:
    """A module whose parameters have the given gradients."""
    model = nn.Module()
    for name, grad in grads.items():
        parameter = nn.Parameter(torch.zeros(grad.shape, dtype=grad.dtype, device=grad.device))
        parameter.grad = grad
        model.register_parameter(name, parameter)
    return model


def check(model: nn.Module, rtol: float = 1e-5) -> None:
    statistics = compute_gradient_statistics(model)
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert list(statistics["parameters"]) == list(grads)
    for name, grad in grads.items():
        expected = reference(grad)
        got = statistics["parameters"][name]
        assert set(got) == set(expected), name
        # The mean of a gradient may cancel: it is right to the scale of its elements.
        scale = expected["norm"] / math.sqrt(expected["numel"])
        for key, value in expected.items():
            atol = rtol * scale if key in ("mean", "std") else 0.0
            np.testing.assert_allclose(
                got[key], value, rtol=rtol, atol=atol, err_msg=f"{name} {key}"
            )
    norms = [reference(grad)["norm"] for grad in grads.values()]
    np.testing.assert_allclose(statistics["total_norm"], np.linalg.norm(norms), rtol=rtol)
    np.testing.assert_allclose(list(get_gradient_norms(model).values()), norms, rtol=rtol)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, device: str) -> None:
    make_model, make_input = MODELS[name]
    model = make_model().to(device)
    model(make_input().to(device)).square().mean().backward()
    check(model)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_dtypes(dtype: torch.dtype, device: str) -> None:
    torch.manual_seed(0)
    grad = torch.randn(300, 41, device=device).to(dtype)
    check(with_gradients(a=grad, b=grad[0].clone()), 1e-12 if dtype == torch.float64 else 5e-6)


@settings(deadline=None, max_examples=60)
@given(
    shapes=st.lists(st.lists(st.integers(1, 9), max_size=3), min_size=1, max_size=8),
    zeros=st.floats(0, 1),
    shift=st.sampled_from([0.0, 1.0, -1000.0]),
    seed=st.integers(0, 2**31),
)
def test_any_shapes(shapes: list[list[int]], zeros: float, shift: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    grads = {}
    for i, shape in enumerate(shapes):
        grad = torch.randn(shape, generator=generator, dtype=torch.float64) + shift
        grads[f"p{i}"] = grad * (torch.rand(shape, generator=generator) >= zeros)
    check(with_gradients(**grads), 1e-9)


@pytest.mark.parametrize("device", DEVICES)
def test_rows_and_blocks_are_merged(device: str) -> None:
    """A gradient longer than a row, one that fills rows exactly, many that fill several blocks."""
    torch.manual_seed(0)
    row = DEVICE_SIZES[0]
    grads = {"long": torch.randn(2 * row + 17), "exact": torch.randn(2, row), "one": torch.randn(1)}
    grads |= {f"many{i}": torch.randn(row // 64) for i in range(80)}
    grads["long"][0] = 1e6  # in one row only: the spread between the rows matters
    check(with_gradients(**{k: g.to(device) for k, g in grads.items()}))


@pytest.mark.parametrize("device", DEVICES)
def test_layouts(device: str) -> None:
    """Non-contiguous, channels-last, expanded, zero-dimensional."""
    torch.manual_seed(0)
    model = with_gradients(
        transposed=torch.randn(5, 7, device=device).T,
        channels_last=torch.randn(2, 3, 4, 5, device=device).to(memory_format=torch.channels_last),
        expanded=torch.full((1,), 2.0, device=device).expand(6),
        scalar=torch.tensor(-3.0, device=device),
    )
    check(model)


@pytest.mark.parametrize("device", DEVICES)
def test_constant_gradient_has_no_spread(device: str) -> None:
    entry = compute_gradient_statistics(with_gradients(a=torch.full((999,), 1.1, device=device)))
    assert entry["parameters"]["a"]["std"] < 1e-6


@pytest.mark.parametrize("device", DEVICES)
def test_extremes_of_the_dtype(device: str) -> None:
    """Norms that a sum of squares in the gradient's dtype would overflow or underflow."""
    model = with_gradients(
        fp16=torch.full((64,), 6e4, dtype=torch.float16, device=device),
        huge=torch.full((4,), 1e30, device=device),
        tiny=torch.full((4,), 1e-30, device=device),
        fp64=torch.full((4,), 1e200, dtype=torch.float64, device=device),
        bf16=torch.full((4,), 3e38, device=device).to(torch.bfloat16),
        many=torch.full((100_000,), 1e37, device=device),
    )
    norms = {
        "fp16": 60000.0 * 8,
        "huge": 2e30,
        "tiny": 2e-30,
        "fp64": 2e200,
        "many": 1e37 * 100_000**0.5,
    }
    norms["bf16"] = 2 * torch.tensor(3e38, dtype=torch.bfloat16).double().item()
    for name, norm in norms.items():
        # A running sum in float32 of a hundred thousand equal elements rounds one way.
        rel, spread = (3e-5, 1e-5) if name == "many" else (1e-6, 1e-6)
        assert get_gradient_norms(model)[name] == pytest.approx(norm, rel=rel)
        entry = compute_gradient_statistics(model)["parameters"][name]
        assert entry["norm"] == pytest.approx(norm, rel=rel)
        assert entry["mean"] == pytest.approx(entry["max"], rel=rel)
        assert entry["std"] <= spread * entry["abs_max"]
    assert compute_gradient_statistics(model)["total_norm"] == pytest.approx(2e200)


@pytest.mark.parametrize("device", DEVICES)
def test_nonfinite(device: str) -> None:
    nan, inf = math.nan, math.inf
    model = with_gradients(
        nan=torch.tensor([nan, 0.0, 2.0], device=device),
        inf=torch.tensor([inf, -inf, 0.0, 1.0], device=device),
        both=torch.tensor([nan, inf, 1.0], device=device),
        fine=torch.tensor([3.0, 4.0, 0.0], device=device),
    )
    statistics = compute_gradient_statistics(model)
    entries = statistics["parameters"]
    counts = {n: (e["nan_count"], e["inf_count"], e["zero_fraction"]) for n, e in entries.items()}
    assert counts == {
        "nan": (1, 0, 1 / 3),
        "inf": (0, 2, 0.25),
        "both": (1, 1, 0),
        "fine": (0, 0, 1 / 3),
    }
    assert math.isnan(entries["nan"]["norm"])
    assert math.isnan(entries["both"]["norm"])
    assert math.isnan(entries["nan"]["max"])
    assert entries["inf"]["norm"] == inf
    assert (entries["inf"]["min"], entries["inf"]["max"]) == (-inf, inf)
    assert entries["fine"]["norm"] == 5.0
    assert math.isnan(statistics["total_norm"])


def test_nan_and_inf_in_different_rows_make_a_nan_norm() -> None:
    grad = torch.ones(2 * DEVICE_SIZES[0])
    grad[0], grad[-1] = math.nan, math.inf
    model = with_gradients(a=grad)
    assert math.isnan(get_gradient_norms(model)["a"])
    assert math.isnan(compute_gradient_statistics(model)["total_norm"])


@pytest.mark.parametrize("device", DEVICES)
def test_complex(device: str) -> None:
    torch.manual_seed(0)
    grad = torch.randn(40, 3, dtype=torch.complex64, device=device) + (2 - 3j)
    grad[0] = 0
    model = with_gradients(c=grad, r=grad.real.contiguous())
    check(model)
    assert isinstance(compute_gradient_statistics(model)["parameters"]["c"]["mean"], complex)
    assert "c" in repr(compute_gradient_statistics(model))


@pytest.mark.parametrize("device", DEVICES)
def test_sparse_counts_as_densified(device: str) -> None:
    """An embedding with sparse=True, with a repeated index: uncoalesced until it is read."""
    torch.manual_seed(0)
    dense, sparse = (nn.Embedding(10, 3, sparse=s, device=device) for s in (False, True))
    with torch.no_grad():
        sparse.weight.copy_(dense.weight)
    for layer in (dense, sparse):
        layer(torch.tensor([1, 1, 4], device=device)).exp().sum().backward()
    assert sparse.weight.grad.layout is torch.sparse_coo
    expected = compute_gradient_statistics(dense)["parameters"]["weight"]
    got = compute_gradient_statistics(sparse)["parameters"]["weight"]
    assert got == pytest.approx(expected)
    assert get_gradient_norms(sparse) == pytest.approx(get_gradient_norms(dense))


def test_shared_parameters_count_once_under_the_first_name() -> None:
    make_model, make_input = MODELS["tied"]
    model = make_model()
    model(make_input()).sum().backward()
    assert list(get_gradient_norms(model)) == ["embedding.weight"]


def test_empty_parameters() -> None:
    model = with_gradients(none=torch.zeros(0, 3), some=torch.ones(4))
    entry = compute_gradient_statistics(model)["parameters"]["none"]
    assert (entry["norm"], entry["abs_max"], entry["numel"], entry["nan_count"]) == (0.0, 0.0, 0, 0)
    assert all(math.isnan(entry[key]) for key in ("mean", "std", "min", "max", "zero_fraction"))
    assert get_gradient_norms(model) == {"none": 0.0, "some": 2.0}


def test_before_backward() -> None:
    model = mlp()
    assert get_gradient_norms(model) == {}
    assert not check_gradients_exist(model)
    statistics = compute_gradient_statistics(model)
    assert (statistics["total_norm"], statistics["parameters"]) == (0.0, {})
    assert repr(statistics) == "no gradients yet"
    assert "no gradients yet" in statistics._repr_html_()


def test_frozen_and_unused_parameters() -> None:
    model = nn.ModuleDict(
        {"used": nn.Linear(2, 1), "frozen": nn.Linear(2, 1), "idle": nn.Linear(2, 1)}
    )
    enable_gradients(model["frozen"], False)
    (model["used"](torch.ones(1, 2)) + model["frozen"](torch.ones(1, 2))).sum().backward()
    assert missing_gradients(model) == ["idle.weight", "idle.bias"]
    assert not check_gradients_exist(model)
    assert list(get_gradient_norms(model)) == ["used.weight", "used.bias"]
    model.zero_grad(set_to_none=False)
    assert get_gradient_norms(model) == {"used.weight": 0.0, "used.bias": 0.0}
    model.zero_grad(set_to_none=True)
    assert get_gradient_norms(model) == {}


def test_enable_gradients_leaves_integers_alone() -> None:
    model = nn.Linear(2, 2)
    model.register_parameter(
        "codes", nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)
    )
    enable_gradients(model, False)
    assert not any(p.requires_grad for p in model.parameters())
    enable_gradients(model)
    assert [n for n, p in model.named_parameters() if p.requires_grad] == ["weight", "bias"]


def test_gradients_are_left_as_they_were() -> None:
    """Also those that belong to a graph, as after backward(create_graph=True)."""
    model = mlp()
    x = torch.randn(4, 8)
    grads = torch.autograd.grad(model(x).square().sum(), [*model.parameters()], create_graph=True)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.grad = grad
    before = [grad.detach().clone() for grad in grads]
    versions = [grad._version for grad in grads]
    check(model)
    assert all(torch.equal(a, b) for a, b in zip(before, grads, strict=True))
    assert versions == [grad._version for grad in grads]
    assert all(p.grad is grad for p, grad in zip(model.parameters(), grads, strict=True))


class Reads(TorchDispatchMode):
    """Count the operations that copy a device's values to the host."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        to_cpu = func is torch.ops.aten._to_copy.default and kwargs.get("device") == torch.device(
            "cpu"
        )
        self.count += to_cpu or func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="host synchronizations need a device")
@pytest.mark.parametrize("read", [compute_gradient_statistics, get_gradient_norms])
def test_one_host_synchronization(read) -> None:
    model = mlp(20, 32).cuda()
    model(torch.randn(4, 32, device="cuda")).sum().backward()
    next(model.parameters()).grad[0, 0] = math.nan
    read(model)
    torch.cuda.set_sync_debug_mode("error")
    try:
        with Reads() as reads, pytest.raises(RuntimeError, match="synchronizing"):
            read(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with Reads() as reads:
        read(model)
    assert reads.count == 1


def test_the_number_of_operations_does_not_grow_with_the_depth() -> None:
    """Fused passes: equal shapes cost the same operations however many there are."""

    class Count(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for depth in (10, 100):
        model = with_gradients(**{f"p{i}": torch.randn(8, 8) for i in range(depth)})
        with Count() as mode:
            compute_gradient_statistics(model)
        counts.append(mode.count)
    assert counts[0] == counts[1]
    assert counts[0] < 80


@pytest.mark.parametrize("operation", [get_gradient_norms, compute_gradient_statistics])
def test_meta_gradients_are_refused(operation) -> None:
    model = with_gradients(w=torch.empty(3, device="meta"))
    with pytest.raises(ValueError, match=rf"{operation.__name__}: the gradient of 'w'.*to_empty"):
        operation(model)


@pytest.mark.parametrize(
    "operation",
    [
        enable_gradients,
        get_gradient_norms,
        compute_gradient_statistics,
        check_gradients_exist,
        missing_gradients,
    ],
)
def test_not_a_module(operation) -> None:
    with pytest.raises(
        TypeError, match=rf"{operation.__name__}: expected a torch.nn.Module, got list"
    ):
        operation([torch.ones(2)])


def test_enable_must_be_a_bool() -> None:
    model = nn.Linear(1, 1)
    with pytest.raises(TypeError, match="expected enable=True or False, got 'no'"):
        enable_gradients(model, "no")
    assert all(p.requires_grad for p in model.parameters())


def test_autograd_utils_is_a_face() -> None:
    for name in (
        "enable_gradients",
        "get_gradient_norms",
        "compute_gradient_statistics",
        "check_gradients_exist",
    ):
        assert getattr(AutogradUtils, name) is getattr(autograd_lib, name)


def test_prints_as_a_table() -> None:
    model = mlp()
    model(torch.randn(4, 8)).sum().backward()
    statistics = compute_gradient_statistics(model)
    lines = f"{statistics}".splitlines()
    assert lines[0].startswith("gradients of 6 parameters, total norm ")
    assert lines[1].split()[:3] == ["parameter", "norm", "mean"]
    assert [line.split()[0] for line in lines[2:]] == [n for n, _ in model.named_parameters()]
    html = statistics._repr_html_()
    assert html.count("<tr>") == 7
    assert "<caption>gradients of 6 parameters" in html
    long = compute_gradient_statistics(
        with_gradients(**{f"p{i}": torch.ones(1) for i in range(100)})
    )
    assert "… 40 more …" in repr(long)
