"""Blocks under checkpoints: gradients and buffers as without, to the bit; counts of what runs."""

from __future__ import annotations

import copy
import gc
import pickle
import re
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.utils.flop_counter import FlopCounterMode

from autograd_lib.checkpointing.compiled import Budgeted, _draws, is_random
from autograd_lib.checkpointing.recompute import apply_checkpoints
from autograd_lib.memory import peak_bytes, saved_tensors

with warnings.catch_warnings():  # compiling imports it, and it is deprecated itself
    warnings.simplefilter("ignore", DeprecationWarning)
    import torch.utils.mkldnn


def dropout_mlp() -> nn.Sequential:
    return nn.Sequential(
        *[nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Dropout(0.3)) for _ in range(4)]
    )


def batch_norm() -> nn.Sequential:
    """The norm begins, ends, and stands inside of a block."""
    return nn.Sequential(
        nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8)),
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)),
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=None), nn.ReLU(inplace=True)),
        nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, track_running_stats=False)),
    )


def spectral() -> nn.Sequential:
    """Power iteration changes buffers, and the weight with them, at every forward."""
    return nn.Sequential(
        *[nn.Sequential(parametrizations.spectral_norm(nn.Linear(8, 8)), nn.Tanh()) for _ in "1234"]
    )


class Assigned(nn.Module):
    """Has a buffer that is replaced, not changed, and that the output depends on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.register_buffer("scale", torch.ones(8))

    def forward(self, x: Tensor) -> Tensor:
        self.scale = self.scale * 0.9 + 0.1 * x.detach().abs().mean(0)
        return torch.tanh(self.linear(x)) * self.scale


class Residual(nn.Module):
    """A block with more arguments than the input."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.dropout = nn.Linear(8, 8), nn.Dropout(0.2)

    def forward(self, x: Tensor, shift: Tensor | None = None, *, scale: float = 1.0) -> Tensor:
        y = self.dropout(torch.tanh(self.linear(x))) * scale
        return x + (y if shift is None else y * shift)


class Looped(nn.Module):
    """Calls its blocks as transformers do."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(0.5, 2, 8))
        self.blocks = nn.ModuleList(Residual() for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.shift * 2, scale=0.7)
        return x


CHAINS: dict[str, Callable[[], nn.Module]] = {
    "dropout": dropout_mlp,
    "batch norm": batch_norm,
    "spectral norm": spectral,
    "assigned buffer": lambda: nn.Sequential(*[Assigned() for _ in range(4)]),
}
STEPS: dict[str, tuple[Any, ...]] = {
    "recompute": ("recompute",) * 4,
    "selective": ("selective",) * 4,
    "mixed": ("recompute", "save", "selective", "recompute"),
    "run": (("save", "save", "save"), "save"),
    "runs": (("save", "save"), ("recompute", "save")),
    "nested": ((("recompute", "save"), "save", "save"),),
}
SINGLE = ["recompute", "selective", "mixed"]


def result(
    model: nn.Module, passes: int = 1, step: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """Gradients and buffers after some forwards and backwards that accumulate."""
    run = model if step is None else step
    for seed in range(passes):
        torch.manual_seed(seed)
        x = torch.randn(6, 8) + 1
        run(x).square().sum().backward()
    after = torch.rand(())  # the stream of random numbers goes on as it would
    return state(model) | {"after": after}


def state(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return found | {f"buffer {name}": b.clone() for name, b in model.named_buffers()}


def assert_equal(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name], value), name


def pair(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(3)
    model = make()
    return model, copy.deepcopy(model)


# Gradients and buffers


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("chain", CHAINS)
def test_bit_equal(chain: str, steps: str) -> None:
    model, plain = pair(CHAINS[chain])
    apply_checkpoints(model, {"": STEPS[steps]})
    assert_equal(result(model, 3), result(plain, 3))


@pytest.mark.parametrize("steps", SINGLE)
def test_bit_equal_with_more_arguments(steps: str) -> None:
    model, plain = pair(Looped)
    apply_checkpoints(model, {"blocks": STEPS[steps]})
    assert_equal(result(model, 2), result(plain, 2))


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_bit_equal_under_autocast(dtype: torch.dtype, steps: str) -> None:
    """Scaled, as fp16 needs; the cache of casts is as it was afterwards."""
    model, plain = pair(lambda: nn.Sequential(nn.Linear(8, 8), *dropout_mlp(), nn.Linear(8, 2)))
    apply_checkpoints(model, {"": ("save", *STEPS[steps], "save")})
    found = []
    for each in (model, plain):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
        for seed in range(2):
            torch.manual_seed(seed)
            with torch.autocast("cpu", dtype):
                loss = each(torch.randn(6, 8)).float().square().sum()
                assert torch.is_autocast_cache_enabled()
            scaler.scale(loss).backward()
            assert torch.is_autocast_cache_enabled()
            found.append(state(each))
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        found.append(dict(each.state_dict()))
    for got, expected in zip(found[:3], found[3:], strict=True):
        assert_equal(got, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_bit_equal_on_each_device(device: str) -> None:
    model, plain = pair(dropout_mlp)
    apply_checkpoints(model.to(device), {"": STEPS["nested"]})
    plain.to(device)
    for each in (model, plain):
        torch.manual_seed(0)
        each(torch.randn(6, 8, device=device)).sum().backward()
    assert_equal(state(model), state(plain))


@pytest.mark.parametrize("steps", [name for name in STEPS if name not in ("selective", "mixed")])
@pytest.mark.parametrize("chain", CHAINS)
def test_two_backwards_through_one_graph(chain: str, steps: str) -> None:
    model, plain = pair(CHAINS[chain])
    apply_checkpoints(model, {"": STEPS[steps]})
    for each in (model, plain):
        torch.manual_seed(0)
        loss = each(torch.randn(6, 8)).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_equal(state(model), state(plain))


@pytest.mark.parametrize("steps", STEPS)
def test_two_forwards_before_their_backwards(steps: str) -> None:
    """Each repetition sees the buffers of its own forward."""
    model, plain = pair(batch_norm)
    apply_checkpoints(model, {"": STEPS[steps]})
    for each in (model, plain):
        torch.manual_seed(0)
        first, second = each(torch.randn(6, 8)), each(torch.randn(6, 8) * 3)
        first.square().sum().backward()
        second.square().sum().backward()
    assert_equal(state(model), state(plain))


@pytest.mark.parametrize("chain", CHAINS)
def test_gradient_of_a_gradient(chain: str) -> None:
    model, plain = pair(CHAINS[chain])
    apply_checkpoints(model, {"": STEPS["runs"]})
    for each in (model, plain):
        torch.manual_seed(0)
        x = torch.randn(6, 8, requires_grad=True)
        (slope,) = torch.autograd.grad(each(x).square().sum(), x, create_graph=True)
        slope.square().sum().backward()
    assert_equal(state(model), state(plain))


@pytest.mark.parametrize("chain", ["batch norm", "spectral norm"])
def test_evaluation_first_and_between(chain: str) -> None:
    """What a forward changes depends on the mode, and is learned in each."""
    model, plain = pair(CHAINS[chain])
    apply_checkpoints(model, {"": STEPS["nested"]})
    for each in (model, plain):
        for training in (False, True, False, True):
            result(each.train(training))
        each[0].eval()  # a part of it frozen
        result(each)
    assert_equal(state(model), state(plain))


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context: Callable[[], Any]) -> None:
    model, plain = pair(batch_norm)
    apply_checkpoints(model, {"": STEPS["nested"]})
    outputs = []
    for each in (model, plain):
        torch.manual_seed(0)
        with context():
            outputs.append(each(torch.randn(6, 8)).clone())
    assert torch.equal(*outputs)
    assert_equal(state(model), state(plain))
    assert_equal(result(model), result(plain))


def test_statistics_of_a_layer_that_starts_at_zero() -> None:
    """Its output is zero in the first step, as is the running mean."""

    def make() -> nn.Sequential:
        model = nn.Sequential(
            nn.Sequential(nn.Linear(8, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh())
        )
        nn.init.zeros_(model[0][0].weight)
        return model

    model, plain = pair(make)
    apply_checkpoints(model, {"": ("recompute",)})
    for each in (model, plain):
        result(each)
        nn.init.eye_(each[0][0].weight)
        result(each)
    assert_equal(state(model), state(plain))


class Fails(nn.Module):
    """Fails on demand: in its forward, its repetition, or its backward."""

    where = ""

    def forward(self, x: Tensor) -> Tensor:
        if self.where == "backward" and x.requires_grad:
            x = x * 1
            x.register_hook(self.fail)
        if self.where == "forward" or (
            self.where == "again" and torch._C._current_graph_task_id() >= 0
        ):
            self.fail(x)
        return x.sin()

    def fail(self, _: Tensor) -> None:
        raise ArithmeticError(self.where)


@pytest.mark.parametrize("where", ["forward", "again", "backward"])
@pytest.mark.parametrize("steps", ["recompute", "nested"])
def test_a_good_step_after_a_failure(where: str, steps: str) -> None:
    def make() -> nn.Sequential:
        return nn.Sequential(
            *[nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 8), Fails()) for _ in "1234"]
        )

    model, plain = pair(make)
    apply_checkpoints(model, {"": STEPS[steps]})
    result(model)
    model.zero_grad()
    buffers = {id(b) for b in model.buffers()}
    model[1][2].where = where
    with pytest.raises(ArithmeticError, match=where):
        result(model)
    assert {id(b) for b in model.buffers()} == buffers
    assert torch.is_autocast_cache_enabled()
    model[1][2].where = ""
    model.load_state_dict(plain.state_dict())
    model.zero_grad()
    assert_equal(result(model), result(plain))


# What runs, and how often


def calls(steps: Any, times: int = 1) -> list[int]:
    """How often each block is called: a run does its blocks once more, and so do its own runs."""
    found = []
    for step in steps:
        if step == "save":
            found.append(times)
        elif isinstance(step, str):
            found.append(times + 1)
        else:
            found += calls(step, times + 1)
    return found


@pytest.mark.parametrize("steps", STEPS)
def test_calls_of_each_block(steps: str) -> None:
    model = dropout_mlp()
    apply_checkpoints(model, {"": STEPS[steps]})
    count: Counter[int] = Counter()
    for index, block in enumerate(model):
        block[0].register_forward_pre_hook(lambda *_, i=index: count.update([i]))
    result(model)
    assert [count[i] for i in range(4)] == calls(STEPS[steps])


@pytest.mark.parametrize(("steps", "share"), [("recompute", 4), ("selective", 3), ("run", 3.75)])
def test_flops(steps: str, share: float) -> None:
    """A product costs one forward and two backward, and one more where it runs again."""
    model = dropout_mlp()
    x = torch.randn(6, 8, requires_grad=True)
    with FlopCounterMode(display=False) as plain:
        model(x).sum().backward()
    apply_checkpoints(model, {"": STEPS[steps]})
    with FlopCounterMode(display=False) as again:
        model(x).sum().backward()
    assert plain.get_total_flops() == 3 * 4 * 2 * 6 * 8 * 8
    assert again.get_total_flops() / plain.get_total_flops() == pytest.approx(share / 3)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inside = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inside(x.mT).mT.contiguous().unsqueeze(1)  # as the fused kernel wants it
        return F.scaled_dot_product_attention(y, y, y).exp()


def test_selective_keeps_what_is_costly() -> None:
    """Products, convolutions and attention are not done again; the rest is."""
    model = nn.Sequential(Attention())
    x = torch.randn(2, 16, 8)

    def operations() -> Counter[str]:
        found: Counter[str] = Counter()

        class Count(torch.utils._python_dispatch.TorchDispatchMode):
            def __torch_dispatch__(
                self, f: Any, types: Any, args: Any = (), kwargs: Any = None
            ) -> Any:
                found[f.overloadpacket.__name__] += 1
                return f(*args, **(kwargs or {}))

        y = model(x)
        with Count():
            y.sum().backward()
        return found

    for step, costly in (("recompute", 1), ("selective", 0)):
        apply_checkpoints(model, {"": (step,)})
        again = operations()
        assert again["exp"] == 1
        assert again["convolution"] == costly
        assert sum(again[n] for n in again if "attention" in n and "backward" not in n) == costly


def test_only_the_input_of_a_run_is_saved() -> None:
    model = dropout_mlp()
    apply_checkpoints(model, {"": (("save",) * 4,)})
    with saved_tensors(model) as saved:
        model(torch.randn(6, 8))
    assert saved.total_bytes == 0
    assert saved.input_bytes == 6 * 8 * 4


def test_casts_of_weights_are_not_kept() -> None:
    """Autocast keeps them until it ends; a block that is recomputed drops its own at once."""
    width = 256
    model = nn.Sequential(*[nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(4)])
    x = torch.randn(2, width)

    def forward() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            model(x)

    cast = 2 * width * width
    assert peak_bytes(forward) > 4 * cast
    apply_checkpoints(model, {"": STEPS["recompute"]})
    assert cast < peak_bytes(forward) < 2 * cast


def test_hooks_of_a_block_in_a_list_run_once() -> None:
    """The checkpoint stands inside the call of the block."""
    model = Looped()
    apply_checkpoints(model, {"blocks": ("recompute",) * 4})
    seen = []
    model.blocks[1].register_forward_hook(lambda *_: seen.append("block"))
    model.blocks[1].linear.register_forward_hook(lambda *_: seen.append("linear"))
    result(model)
    assert seen == ["linear", "block", "linear"]


# The model stays what it is


def wrapped(model: nn.Module) -> list[str]:
    return [n for n, m in model.named_modules() if "forward" in vars(m) or m._compiled_call_impl]


def test_names_stay() -> None:
    model, plain = pair(batch_norm)
    apply_checkpoints(model, {"": STEPS["nested"]})
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in model.named_buffers()] == [n for n, _ in plain.named_buffers()]
    assert [n for n, _ in model.named_modules()] == [n for n, _ in plain.named_modules()]
    assert repr(model) == repr(plain)
    model.load_state_dict(plain.state_dict())


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
@pytest.mark.parametrize("steps", ["nested", "mixed"])
def test_copies_are_independent(duplicate: Callable[[nn.Module], nn.Module], steps: str) -> None:
    model, plain = pair(batch_norm)
    apply_checkpoints(model, {"": STEPS[steps]})
    result(model)  # the copy has learned which buffers change too
    result(plain)
    other = duplicate(model)
    before = state(model)
    assert wrapped(other) == wrapped(model)
    other.zero_grad()
    plain.zero_grad()
    assert_equal(result(other), result(plain))
    assert_equal(state(model), before)


def test_copies_of_blocks_are_independent() -> None:
    model, plain = pair(Looped)
    apply_checkpoints(model, {"blocks": STEPS["mixed"]})
    other = copy.deepcopy(model)
    del model
    assert_equal(result(other), result(plain))


@pytest.mark.parametrize("make", [dropout_mlp, Looped])
def test_the_model_is_released(make: Callable[[], nn.Module]) -> None:
    model = make()
    apply_checkpoints(model, {"" if make is dropout_mlp else "blocks": STEPS["mixed"]})
    result(model)
    references = [weakref.ref(p) for p in model.parameters()]
    del model
    gc.collect()
    assert not any(reference() is not None for reference in references)


def test_the_last_steps_count() -> None:
    model, plain = pair(dropout_mlp)
    for steps in ("recompute", "nested", "selective", "run"):
        apply_checkpoints(model, {"": STEPS[steps]})
    assert_equal(result(model), result(plain))
    count: Counter[int] = Counter()
    model[3][0].register_forward_pre_hook(lambda *_: count.update([3]))
    result(model)
    assert count[3] == 1
    apply_checkpoints(model, {"": ("save",) * 4})
    assert wrapped(model) == []


def test_steps_of_a_sequence_replace_those_of_its_children() -> None:
    model = dropout_mlp()
    apply_checkpoints(model, {"0": "recompute", "2": "selective"})
    apply_checkpoints(model, {"": ("save",) * 4})
    assert wrapped(model) == []


def test_steps_of_children_replace_those_of_the_sequence() -> None:
    model = dropout_mlp()
    apply_checkpoints(model, {"": STEPS["nested"]})
    apply_checkpoints(model, {str(i): "save" for i in range(4)})
    assert wrapped(model) == []


def test_a_forward_of_the_instance_is_kept() -> None:
    """As other libraries set it; it runs under the checkpoint, and is put back."""
    model = dropout_mlp()
    original = model[0].forward

    def doubled(x: Tensor) -> Tensor:
        return original(x) * 2

    model[0].forward = doubled
    plain = copy.deepcopy(model)
    plain[0].forward = lambda x, block=plain[0]: type(block).forward(block, x) * 2
    apply_checkpoints(model, {"0": "recompute"})
    assert_equal(result(model), result(plain))
    apply_checkpoints(model, {"0": "save"})
    assert model[0].forward is doubled


def test_one_module_twice_in_a_sequence() -> None:
    def make() -> nn.Sequential:
        tanh, linear = nn.Tanh(), nn.Linear(8, 8)
        return nn.Sequential(linear, tanh, linear, tanh)

    model, plain = pair(make)
    apply_checkpoints(model, {"": STEPS["nested"]})
    assert_equal(result(model), result(plain))


# Errors


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ({"0": "save", "nowhere": "save"}, "checkpoint: the model has no module 'nowhere'"),
        ({"0": "recompute", "list.0": ("save",)}, "'list.0' is a Linear, which takes one step"),
        ({"0": "recompute", "": ("save",)}, "'' has 3 blocks, but the steps are for 1"),
        ({"0": "recompute", "list": (("save", "save"),)}, "'list' is a ModuleList whose"),
    ],
)
def test_steps_that_do_not_fit_change_nothing(steps: dict[str, Any], message: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model.list = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])
    if "" in steps:
        model = nn.Sequential(*list(model)[:3])
    with pytest.raises(ValueError, match=re.escape(message)):
        apply_checkpoints(model, steps)
    assert wrapped(model) == []


def test_one_module_twice_in_a_list() -> None:
    block = Residual()
    model = nn.Module()
    model.blocks = nn.ModuleList([Residual(), block, block])
    with pytest.raises(ValueError, match="checkpoint: 'blocks'"):
        apply_checkpoints(model, {"blocks": ("recompute", "save", "save")})
    assert wrapped(model) == []


@pytest.mark.parametrize("name", ["index", "run", "selective"])
@pytest.mark.parametrize("step", ["recompute", "selective"])
def test_names_of_arguments_are_free(name: str, step: str) -> None:
    class Named(Residual):
        def forward(self, x: Tensor, **kwargs: Tensor) -> Tensor:
            return super().forward(x, **{"shift": kwargs[name]})

    block = Named()
    apply_checkpoints(block, {"": step})
    block(torch.randn(6, 8), **{name: torch.ones(8)}).sum().backward()


# Together with the rest of PyTorch


def test_functional_call() -> None:
    model, plain = pair(dropout_mlp)
    apply_checkpoints(model, {"": STEPS["runs"]})
    values = {n: (2 * p.detach()).requires_grad_() for n, p in plain.named_parameters()}
    found = []
    for each in (model, plain):
        torch.manual_seed(0)
        loss = torch.func.functional_call(each, values, torch.randn(6, 8)).square().sum()
        found.append(
            dict(zip(values, torch.autograd.grad(loss, list(values.values())), strict=True))
        )
    assert_equal(*found)


@pytest.fixture
def process_group() -> Iterator[None]:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("steps", ["recompute", "selective", "nested"])
def test_distributed_data_parallel(steps: str) -> None:
    model, plain = pair(batch_norm)
    apply_checkpoints(model, {"": STEPS[steps]})
    parallel = DistributedDataParallel(model)
    assert_equal(result(model, 2, parallel), result(plain, 2))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("first", ["plan", "shards"])
@pytest.mark.parametrize("steps", ["recompute", "nested"])
def test_fully_sharded(steps: str, first: str) -> None:
    model, plain = pair(dropout_mlp)
    if first == "plan":
        apply_checkpoints(model, {"": STEPS[steps]})
    for block in model:
        fully_shard(block)
    fully_shard(model)
    if first == "shards":
        apply_checkpoints(model, {"": STEPS[steps]})
    got = {k: v.full_tensor() if hasattr(v, "full_tensor") else v for k, v in result(model).items()}
    assert_equal(got, result(plain))


def compiled_case(make: Callable[[], nn.Module]) -> tuple[nn.Module, nn.Module]:
    torch._dynamo.reset()
    model, plain = pair(make)
    for module in [*model.modules(), *plain.modules()]:
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # compiled code draws other numbers
    return model, plain


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-5, msg=name)


def normed(momentum: float | None = 0.1) -> nn.Sequential:
    return nn.Sequential(
        *[
            nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8, momentum=momentum), nn.Tanh())
            for _ in range(4)
        ]
    )


@pytest.mark.parametrize("steps", ["recompute", "run", "runs"])
def test_the_whole_model_compiled(steps: str) -> None:
    """Traced only, for speed: the checkpoints are in the graph."""
    model, plain = compiled_case(normed)
    apply_checkpoints(model, {"": STEPS[steps]})
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_close(result(model, 2, compiled), result(plain, 2))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.xfail(
    strict=True, reason="where the graph breaks in a block, its buffers are changed twice per step"
)
def test_the_whole_model_compiled_with_a_graph_break() -> None:
    """The cumulative average makes a Python number of a counter."""
    model, plain = compiled_case(lambda: normed(momentum=None))
    apply_checkpoints(model, {"": STEPS["recompute"]})
    assert_close(result(model, 2, torch.compile(model, backend="aot_eager")), result(plain, 2))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList])
def test_compiled_blocks(container: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each by itself, inside its checkpoint; the gradient is the closed form of tanh of tanh."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    model, plain = compiled_case(lambda: nn.Sequential(*[nn.Sequential(nn.Tanh()) for _ in "12"]))
    blocks = model if container is nn.Sequential else nn.ModuleList(model)
    apply_checkpoints(blocks, {"": ("recompute", "save")}, compile=True)
    assert all(block._compiled_call_impl for block in model)
    for each in (model, plain):
        x = torch.linspace(-1, 1, 6, requires_grad=True)
        y = each(x)
        y.sum().backward()
        slope = 1 - torch.tanh(x) ** 2
        torch.testing.assert_close(x.grad, (slope * (1 - y**2)).detach())
    assert list(model.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize("make", [dropout_mlp, Looped])
def test_all_blocks_are_compiled(make: Callable[[], nn.Module]) -> None:
    model = make()
    name = "" if make is dropout_mlp else "blocks"
    apply_checkpoints(model, {name: STEPS["mixed"]}, compile=True)
    blocks = list(model if not name else model.blocks)
    assert all(block._compiled_call_impl is not None for block in blocks)


def branches() -> nn.Sequential:
    """What is cheap to compute again lies between what is not."""
    block = [nn.LayerNorm(32), nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 32)]
    return nn.Sequential(*[nn.Sequential(*copy.deepcopy(block)) for _ in "12"])


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("container", [nn.Sequential, nn.ModuleList])
def test_compiled_selective_blocks_keep_less(container: type[nn.Module]) -> None:
    """Counted, as the compiler decides what is kept; the gradients differ by rounding."""
    torch._dynamo.reset()
    x = torch.randn(512, 32)
    saved, gradients = {}, {}
    for step in ("save", "selective"):
        torch.manual_seed(0)
        model = branches()
        blocks = model if container is nn.Sequential else nn.ModuleList(model)
        apply_checkpoints(blocks, {"": (step, step)}, compile=True)
        again = copy.deepcopy(model)
        model(x).sum().backward()
        with saved_tensors(model) as found:
            model(x)
        saved[step] = found.total_bytes
        gradients[step] = [p.grad for p in model.parameters()]
        assert all(p.grad is None for p in again.parameters())
        again(x).sum().backward()  # by its own parameters
        torch.testing.assert_close([p.grad for p in again.parameters()], gradients[step])
    assert saved["selective"] < 0.9 * saved["save"]
    torch.testing.assert_close(gradients["selective"], gradients["save"])


def test_compiled_selective_blocks_are_undone() -> None:
    model = branches()
    apply_checkpoints(nn.ModuleList(model), {"": ("selective", "selective")}, compile=True)
    budgeted = [block._compiled_call_impl for block in model]
    apply_checkpoints(nn.ModuleList(model), {"": ("save", "save")})
    assert all(
        block._compiled_call_impl is t.replaced for block, t in zip(model, budgeted, strict=True)
    )


# --- compiled blocks that draw random numbers (pytorch#190758)


class ByFunction(nn.Module):
    """Drops by functions that no module tells of."""

    def forward(self, x: Tensor) -> Tensor:
        path = torch.rand(x.shape[:-1], dtype=x.dtype)[..., None] if self.training else 1.0
        return F.dropout(F.gelu(x), 0.3, self.training).sin() * path


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention_dropout = 0.2

    def forward(self, x: Tensor) -> Tensor:
        p = self.attention_dropout if self.training else 0.0
        return F.scaled_dot_product_attention(x, x, x.sin(), dropout_p=p)


RANDOM_KINDS = {
    "Dropout": lambda: nn.Sequential(nn.GELU(), nn.Dropout(0.1)),
    "RReLU": nn.RReLU,
    "attention": Attending,
    "functions": ByFunction,
}


class Drawing(nn.Module):
    """Has, behind what draws, what is cheap to compute again."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(16), RANDOM_KINDS[kind]()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x)).sin()


def directional_error(model: nn.Module, x: Tensor) -> float:
    """Of the derivative along one direction, against central differences at one seed."""
    parameters = [*model.parameters()]
    torch.manual_seed(5)
    directions = [torch.randn_like(p) for p in parameters]

    def loss() -> Tensor:
        torch.manual_seed(3)
        return model(x).square().sum()

    gradients = torch.autograd.grad(loss(), parameters)
    found = sum((g * v).sum() for g, v in zip(gradients, directions, strict=True))
    values = []
    for move in (1e-6, -2e-6, 1e-6):  # there, to the other side, and back
        with torch.no_grad():
            for p, v in zip(parameters, directions, strict=True):
                p.add_(v, alpha=move)
            values.append(loss().item())
    expected = (values[0] - values[1]) / 2e-6
    return abs(found.item() - expected) / abs(expected)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_random_blocks_have_no_selective_step() -> None:
    """Stored settings ask for one: each step's gradient is that of the mask which it drew."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(Drawing("Dropout"), Drawing("functions")).double()
    apply_checkpoints(model, {"": ("selective", "selective")}, compile=True)
    x = torch.randn(4, 8, 16, dtype=torch.float64)
    for _ in range(2):  # what only functions draw is seen at the first step, and recomputed then
        assert directional_error(model, x) < 1e-6


@pytest.mark.parametrize("kind", RANDOM_KINDS)
def test_random_blocks_are_known_by_their_modules(kind: str) -> None:
    assert is_random(Drawing(kind).eval()) == (kind != "functions")


@pytest.mark.parametrize("block", [nn.Linear(2, 2), nn.Dropout(0.0), nn.LSTM(2, 2)])
def test_blocks_that_draw_nothing_are_not_random(block: nn.Module) -> None:
    assert not is_random(block)


def test_what_only_functions_draw_is_seen_at_a_run() -> None:
    block = Drawing("functions")
    found = Budgeted(block)
    found._compiled = block  # in place of its compiled form, which draws as often
    x = torch.randn(4, 8, 16)
    for training, expected in ((False, False), (True, True)):
        block.train(training)
        found(x)
        assert found.random == expected


@pytest.mark.parametrize(("p", "expected"), [(0.0, False), (0.5, True)])
def test_attention_draws_where_it_drops(p: float, expected: bool) -> None:
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    graph = torch.fx.Graph()
    node = graph.call_function(attention, (*map(graph.placeholder, "qkv"), p))
    assert _draws(node) == expected
    assert _draws(graph.call_function(torch.ops.aten.rand.default, ([2],)))
    assert not _draws(graph.call_function(torch.ops.aten.sin.default, (node,)))
