"""Bytes against closed forms; results, checks and classes of PyTorch as they were without."""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES, FLOAT_DTYPES, MODELS, mlp
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd.forward_ad import dual_level, make_dual, unpack_dual
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import (
    _CachingTorchDispatchMode,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from autograd_lib import memory
from autograd_lib.memory import peak_bytes, saved_tensors

MIB = 2**20
LIBRARY = os.path.dirname(os.path.dirname(memory.__file__))
WATCHED = [
    (BackwardCFunction, "__setattr__"),
    (_CachingTorchDispatchMode, "__exit__"),
    (saved_tensors_hooks, "__enter__"),
]
ENTER_HOOKS = saved_tensors_hooks.__enter__


def hooks_left(model: nn.Module) -> list[object]:
    """Whatever a `saved_tensors` block could have forgotten."""
    found: list[object] = [
        hook
        for module in model.modules()
        for name, table in vars(module).items()
        if name.endswith("_hooks")
        for hook in table.values()
    ]
    around = torch._C._autograd._top_saved_tensors_default_hooks(False)
    found += [around] if around is not None else []
    found += [name for owner, name in WATCHED[:2] if name in vars(owner)]
    found += ["__enter__"] if saved_tensors_hooks.__enter__ is not ENTER_HOOKS else []
    return found


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
    )


def gradients(model: nn.Module, x: Tensor, watch: bool) -> list[Tensor]:
    model.zero_grad()
    torch.manual_seed(0)
    if watch:
        with saved_tensors(model):
            loss = model(x).square().mean()
    else:
        loss = model(x).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


class KeepsOnCtx(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.kept = {"exp": [x.exp()]}
        return ctx.kept["exp"][0] * 1

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.kept["exp"][0]


class Saves(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = x.exp()
        ctx.save_for_backward(y)
        ctx.shape = x.shape
        largest = y.max()
        ctx.mark_non_differentiable(largest)
        return y * 1, largest

    @staticmethod
    def backward(ctx, grad, _):
        return grad * ctx.saved_tensors[0]


keeps_on_ctx = KeepsOnCtx.apply  # the usual idiom: bound before any block begins


# --- saved bytes: closed cases


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize(
    ("layers", "expected"),  # in units of the bytes of x
    [
        ([nn.Tanh()] * 3, 3.0),  # tanh, sigmoid, relu save what they return
        ([nn.Sigmoid()] * 2, 2.0),
        ([nn.ReLU()] * 2, 2.0),
        ([nn.GELU(), nn.GELU()], 1.0),  # gelu saves what it is given: the first, the input
        ([nn.Identity()], 0.0),
        ([nn.Flatten(), nn.Tanh()], 1.0),
    ],
    ids=["tanh", "sigmoid", "relu", "gelu", "identity", "view"],
)
def test_activation_bytes_are_the_closed_form(layers, expected, dtype, device):
    model = nn.Sequential(*layers)
    x = torch.randn(6, 5, dtype=dtype, device=device, requires_grad=True)
    with saved_tensors(model) as saved:
        model(x)
    bytes_of_x = 30 * dtype.itemsize
    assert saved.total_bytes == expected * bytes_of_x
    assert sum(saved.by_module().values()) == saved.total_bytes
    assert saved.by_dtype() == ({dtype: saved.total_bytes} if expected else {})


@pytest.mark.parametrize("device", DEVICES)
@given(batch=st.integers(1, 7), width=st.integers(1, 9), depth=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
def test_a_linear_chain_saves_what_its_layers_are_given(device, batch, width, depth):
    model = mlp(depth, width).to(device)
    x = torch.randn(batch, width, device=device)
    with saved_tensors(model) as saved:
        model(x)
    # tanh's output is the next layer's input: one storage, under the tanh that saved it first
    assert saved.total_bytes == (depth - 1) * batch * width * 4
    assert saved.by_module() == {str(2 * i + 1): batch * width * 4 for i in range(depth - 1)}
    assert saved.input_bytes == batch * width * 4
    # the first layer's input asks for no gradient, so only later weights are kept
    assert saved.parameter_bytes == (depth - 1) * width * width * 4


def test_dropout_keeps_a_mask():
    model = nn.Dropout(0.5)
    x = torch.randn(6, 5, requires_grad=True)
    with saved_tensors(model) as saved:
        model(x)
    assert saved.total_bytes == 6 * 5 * 4  # on the CPU the mask is a float, already scaled


def test_what_is_saved_by_the_loss_stands_under_no_module():
    model = nn.Sequential(nn.Linear(4, 3))
    x, target = torch.randn(5, 4), torch.randn(5, 3)
    with saved_tensors(model) as saved:
        F.mse_loss(model(x), target)
    assert saved.by_module() == {"": 2 * 5 * 3 * 4}  # prediction and target
    assert (saved.input_bytes, saved.parameter_bytes) == (5 * 4 * 4, 0)


class Nested(nn.Module):
    def forward(self, pair, *, options):
        return pair[0] * options["scale"][0] + options["more"]["shift"] * pair[1]


def test_arguments_nested_in_containers_are_inputs():
    a, b, c, d = (torch.randn(n, requires_grad=True) for n in (1, 1, 8, 8))
    inner = c.exp()  # saved before it becomes an argument
    model = Nested()
    with saved_tensors(model) as saved:
        passed = inner.sin()
        model((a, [b][0]), options={"scale": [passed], "more": {"shift": d}})
    assert saved.by_module() == {"": 8 * 4}  # `inner`, for the derivative of sin
    assert saved.input_bytes == (1 + 1 + 8 + 8) * 4


def test_an_argument_used_only_by_the_loss_is_an_input():
    model = nn.Linear(4, 4).requires_grad_(False)  # saves nothing at all
    x, weight = torch.randn(3, 4), torch.randn(4, requires_grad=True)
    with saved_tensors(model) as saved:
        (model(x) - weight * x).sum()
    assert (saved.total_bytes, saved.input_bytes, saved.parameter_bytes) == (0, 48, 0)


def test_a_storage_counts_once_and_in_full_however_it_is_viewed():
    x = torch.randn(10, 10, requires_grad=True)
    with saved_tensors(nn.Identity()) as saved:
        y = x * 1.0
        (y[0].sin().sum() + y[:, 1:3].sin().sum() + y.t().exp().sum() * 0).backward()
    assert saved.total_bytes == 2 * 400  # y by two of its views, and what exp returned


def test_shared_parameters_and_buffers_are_left_out_once():
    make, sample = MODELS["tied"]
    model, tokens = make(), sample()
    with saved_tensors(model) as saved:
        model(tokens)
    assert saved.parameter_bytes == 11 * 8 * 4
    assert saved.input_bytes == 5 * 3 * 8
    assert saved.total_bytes == 5 * 3 * 8 * 4
    norm = nn.BatchNorm1d(8)
    with saved_tensors(norm) as saved:
        norm(torch.randn(5, 8))
    assert saved.parameter_bytes == (8 + 8 + 8) * 4  # weight, running mean and variance
    assert saved.total_bytes == 2 * 8 * 4  # the batch's mean and inverse deviation


def test_lazy_parameters_count_as_parameters():
    model = nn.LazyLinear(4)
    x = torch.randn(5, 8, requires_grad=True)
    with saved_tensors(model) as saved:
        model(x)
    assert (saved.total_bytes, saved.parameter_bytes) == (0, 4 * 8 * 4)


def test_a_recycled_address_is_another_storage():
    x = torch.randn(64, requires_grad=True)
    assert len({x.exp().untyped_storage()._cdata for _ in range(20)}) < 20, "nothing recycled"
    with saved_tensors(nn.Identity()) as saved:
        for _ in range(20):
            x.exp()
    assert saved.total_bytes == 20 * 64 * 4


def test_the_count_stands_after_backward_has_freed_the_graph():
    model = mlp(3)
    x = torch.randn(5, 8)
    with saved_tensors(model) as saved:
        model(x).sum().backward()
        inside = saved.total_bytes
    gc.collect()
    assert inside == saved.total_bytes == 2 * 5 * 8 * 4


def test_checkpointing_saves_the_inputs_of_its_regions():
    model = mlp(4)

    def run():
        h = model[0](torch.ones(5, 8))
        return checkpoint(model[1:], h, use_reentrant=False).sum()

    with saved_tensors(model) as plain:
        model(torch.ones(5, 8))
    with saved_tensors(model) as saved:
        loss = run()
    assert plain.total_bytes == 3 * 160
    assert saved.total_bytes == 160 + 160  # h, and the ones given to model[0], not to model
    assert saved.blind_spots == []
    with saved_tensors(model) as saved:
        run().backward()  # what backward recomputes is not counted
    assert saved.total_bytes == 320
    loss.backward()


def test_autocast_copies_of_weights_are_activations_counted_once():
    layer = nn.Linear(8, 8)
    with saved_tensors(layer) as saved, torch.autocast("cpu", torch.bfloat16):
        h = layer(layer(torch.ones(5, 8)))
    # the weight in bf16, cast once for both calls, and the input in bf16; the hidden layer was an
    # argument of `layer` in the second call
    assert saved.by_dtype() == {torch.bfloat16: (8 * 8 + 5 * 8) * 2}
    assert (saved.input_bytes, saved.parameter_bytes) == (5 * 8 * 2, 0)
    assert h.dtype is torch.bfloat16


def test_sparse_arguments_count_indices_and_values():
    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(5, 3))

        def forward(self, matrix):
            return torch.sparse.mm(matrix, self.weight)

    model = Product()
    with saved_tensors(model) as saved:
        model(torch.eye(5).to_sparse())
    assert (saved.total_bytes, saved.input_bytes) == (0, 2 * 5 * 8 + 5 * 4)


# --- results are those without it


@pytest.mark.parametrize("name", MODELS)
def test_losses_and_gradients_are_bit_equal(name):
    torch.manual_seed(0)
    make, sample = MODELS[name]
    model, x = make(), sample()
    without = gradients(model, x, watch=False)
    for a, b in zip(without, gradients(model, x, watch=True), strict=True):
        assert torch.equal(a, b)
    assert hooks_left(model) == []


def test_double_backward_is_bit_equal_and_counted():
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def second() -> Tensor:
        (first,) = torch.autograd.grad(x.tanh().square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.sum(), x)[0]

    expected = second()
    with saved_tensors(nn.Identity()) as saved:
        assert torch.equal(second(), expected)
    assert saved.total_bytes > 7 * 8
    model = nn.Identity()
    with saved_tensors(model):
        y = x.tanh().square().sum()
    (first,) = torch.autograd.grad(y, x, create_graph=True)  # after the block, through its graph
    assert torch.equal(torch.autograd.grad(first.sum(), x)[0], expected)
    with saved_tensors(model):
        assert torch.autograd.gradgradcheck(torch.tanh, (x,))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
def test_forward_over_reverse_and_vmap_pass_through():
    x = torch.randn(4, dtype=torch.float64)
    with saved_tensors(nn.Identity()) as saved, dual_level():
        dual = make_dual(x.clone().requires_grad_(), torch.ones_like(x))
        (grad,) = torch.autograd.grad(dual.exp().sum(), dual)
        assert torch.allclose(unpack_dual(grad).tangent, x.exp())
    assert saved.total_bytes >= 4 * 8
    model = nn.Linear(3, 2)
    batch = torch.randn(5, 3)
    with saved_tensors(model) as saved:
        torch.func.vmap(lambda row: model(row).tanh().sum())(batch)
    assert saved.total_bytes == 5 * 2 * 4


def test_a_saved_tensor_modified_in_place_is_still_an_error():
    """PyTorch's own check is off under saved-tensor hooks: see that it is made nevertheless."""
    x = torch.randn(4, requires_grad=True)

    def broken() -> Tensor:
        y = x.exp()
        total = y.sum()
        y.add_(1)
        return total + y.sum()

    with saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
        broken().backward()  # no error: wrong gradients, silently
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        broken().backward()
    message = r"modified by an inplace operation: \[torch.FloatTensor \[4\]\] is at version 1; e"
    with saved_tensors(nn.Identity()):
        loss = broken()
        with pytest.raises(RuntimeError, match=message):
            loss.backward()
    with saved_tensors(nn.Identity()):
        loss = broken()
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


def test_an_optimizer_step_between_forward_and_backward_is_still_an_error():
    model = mlp(2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with saved_tensors(model):
        loss = model(torch.ones(5, 8)).sum()
    loss.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_legal_in_place_operations_stay_legal():
    layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))
    x = torch.randn(5, 8)
    expected = gradients(layers, x, watch=False)
    for a, b in zip(expected, gradients(layers, x, watch=True), strict=True):
        assert torch.equal(a, b)


def test_freed_buffers_are_still_an_error():
    x = torch.randn(4, requires_grad=True)
    with saved_tensors(nn.Identity()):
        loss = x.exp().sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_torch_func_grad_raises_its_own_error():
    with (
        saved_tensors(nn.Identity()),
        pytest.raises(RuntimeError, match="don't yet support saved tensor hooks"),
    ):
        torch.func.grad(lambda t: t.sin().sum())(torch.ones(3))
    torch.func.grad(lambda t: t.sin().sum())(torch.ones(3))


# --- nothing stays behind


def test_nothing_is_kept_alive():
    model = mlp(3)
    with saved_tensors(model) as saved:
        h = model[:2](torch.randn(5, 8))
        loss = model[2:](h).sum()
        storage = StorageWeakRef(h.untyped_storage())
        del h
        assert not storage.expired()  # the graph keeps it
        del loss
        assert storage.expired()  # inside the block as well
    held = weakref.ref(model)
    del model
    gc.collect()
    assert held() is None
    assert saved.total_bytes == 3 * 160  # `model` itself was not called: its input counts too


def test_the_record_is_not_kept_by_the_graph():
    model = mlp(2)
    with saved_tensors(model) as saved:
        loss = model(torch.ones(5, 8)).sum()
    gone = weakref.ref(saved)
    del saved
    gc.collect()
    assert gone() is None
    loss.backward()


def test_no_cycle_keeps_a_graph_whose_loss_was_dropped():
    gc.collect()
    gc.disable()
    try:
        with saved_tensors(nn.Identity()):
            y = torch.randn(4, requires_grad=True).exp()  # exp saves its own output
        storage = StorageWeakRef(y.untyped_storage())
        del y
        assert storage.expired()
    finally:
        gc.enable()


@pytest.mark.parametrize("how", ["normal", "exception", "keyboard"])
def test_no_hook_is_left(how):
    model = mlp(2)
    error = {"normal": None, "exception": ValueError, "keyboard": KeyboardInterrupt}[how]

    def block():
        with saved_tensors(model) as outer, saved_tensors(model) as inner:
            assert len(hooks_left(model)) == 6  # two pre-hooks, saved-tensor hooks, watchers
            model(torch.ones(5, 8))
            if error is not None:
                raise error
        return outer, inner

    if error is None:
        outer, inner = block()
        assert outer.total_bytes == inner.total_bytes == 160
    else:
        with pytest.raises(error):
            block()
    assert hooks_left(model) == []


def test_nested_blocks_each_count_their_own():
    model = mlp(3)
    x = torch.randn(5, 8)
    with saved_tensors(model) as outer:
        h = model[:2](x)
        tail = model[2:]
        with saved_tensors(tail) as inner:
            tail(h).sum().backward()
    assert outer.total_bytes == 160 + 160 + 160  # x was no argument of `model` itself
    assert (inner.total_bytes, inner.input_bytes) == (160, 160)
    assert outer.blind_spots == inner.blind_spots == []


# --- blind spots


def test_tensors_on_ctx_are_named():
    x = torch.randn(6, 5, requires_grad=True)
    with (
        pytest.warns(UserWarning, match="KeepsOnCtx on its ctx keeps 120 B unseen") as caught,
        saved_tensors(nn.Identity()) as saved,
    ):
        keeps_on_ctx(x).sum().backward()
    assert caught[0].filename == __file__
    assert saved.total_bytes == 0
    assert saved.blind_spots == ["KeepsOnCtx on its ctx keeps 120 B unseen"]
    assert "KeepsOnCtx" in repr(saved)
    assert "KeepsOnCtx" in saved._repr_html_()


def test_save_for_backward_is_no_blind_spot():
    x = torch.randn(6, 5, requires_grad=True)
    with saved_tensors(nn.Identity()) as saved:
        Saves.apply(x)
    assert saved.total_bytes == 120
    assert saved.blind_spots == []


def save_some():
    save = [torch.ops.aten.tanh.default, torch.ops.aten.addmm.default]
    return create_selective_checkpoint_contexts(save)


def selective(model: nn.Module, x: Tensor) -> Tensor:
    return checkpoint(model, x, use_reentrant=False, context_fn=save_some)


def test_the_cache_of_selective_checkpointing_is_named():
    model = mlp(2)
    x = torch.randn(5, 8, requires_grad=True)
    with (
        pytest.warns(UserWarning, match="cache of selective checkpointing keeps 480 B unseen"),
        saved_tensors(model) as saved,
    ):
        loss = selective(model, x).sum()
    loss.backward()
    assert (saved.total_bytes, saved.input_bytes) == (0, 160)
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    selective(model, x).sum().backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))


def test_other_hooks_are_named_inside_and_called_when_around():
    x = torch.randn(4, requires_grad=True)

    def offload() -> Tensor:
        with save_on_cpu():
            return x.exp()

    with (
        pytest.warns(UserWarning, match="save_on_cpu took the place of the counting hooks"),
        saved_tensors(nn.Identity()) as saved,
    ):
        x.exp() + offload()
    assert saved.total_bytes == 16
    packed = []
    with (
        pytest.warns(UserWarning, match="around the block"),
        saved_tensors_hooks(lambda t: packed.append(t.shape) or t.detach(), lambda t: t),
        saved_tensors(nn.Identity()) as saved,
    ):
        x.exp().sum().backward()
    assert saved.total_bytes == 16
    assert packed == [x.shape]


def test_a_block_inside_a_checkpointed_region_leaves_it_checkpointed():
    x = torch.randn(4, requires_grad=True)
    totals = []

    def region(t):
        with pytest.warns(UserWarning, match="around the block"), saved_tensors(nn.Identity()) as s:
            out = t.exp() * 2
        totals.append(s.total_bytes)
        return out

    out = checkpoint(region, x, use_reentrant=False, early_stop=False)
    assert saved_by_graph(out) == 0
    out.sum().backward()
    assert torch.allclose(x.grad, 2 * x.exp())
    assert totals == [16, 16]


def saved_by_graph(out: Tensor) -> int:
    """Storages of `exp`'s output that are alive besides `out`: none where it is recomputed."""
    alive = [
        t
        for t in gc.get_objects()
        if type(t) is Tensor
        and (t.shape, t.dtype, t.layout, t.device) == (out.shape, out.dtype, out.layout, out.device)
        and not torch._C._functorch.is_functorch_wrapped_tensor(t)  # left over from a transform
    ]
    return sum(torch.equal(t, out.detach() / 2) for t in alive)


def test_other_threads_leave_no_false_alarm():
    def other():
        x = torch.randn(3, requires_grad=True)
        with save_on_cpu():
            keeps_on_ctx(x)

    with saved_tensors(nn.Identity()) as saved:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert saved.blind_spots == []


# --- compiled models


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return self.second(self.first(x).tanh())


@pytest.fixture
def backend():
    """A compiling backend that is quick, and the list of the graphs it was given."""
    torch._dynamo.reset()
    graphs = []

    def compile_graph(graph, sample):
        graphs.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, sample)

    yield compile_graph, graphs
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["wrapped", "in place", "around"])
def test_compiled_models_are_counted_and_not_recompiled(how, backend):
    compile_graph, graphs = backend
    net, x = Net(), torch.randn(5, 8)
    model = step = net
    if how == "wrapped":
        model = step = torch.compile(net, backend=compile_graph)
    elif how == "in place":
        net.compile(backend=compile_graph)
    else:  # nothing calls `net` as a module: its argument is not known as such
        step = torch.compile(lambda x: net(x) * 1, backend=compile_graph)
    for _ in range(2):  # compiled inside the block, then outside of it
        with saved_tensors(model) as saved:
            step(x).sum().backward()
        assert (saved.total_bytes, saved.input_bytes) == ((160, 160), (320, 0))[how == "around"]
        assert hooks_left(net) == []
        step(x).sum().backward()
    # a graph that was compiled with the pre-hook of `net` in place is guarded on it, and is
    # compiled once more without; no block after that compiles anything
    assert len(graphs) == (2 if how == "around" else 1)
    gone = weakref.ref(saved)
    del saved
    gc.collect()
    assert gone() is None


def test_a_model_that_dynamo_leaves_uncompiled_is_counted(backend):
    compile_graph, graphs = backend
    model = mlp(3)
    model.compile(backend=compile_graph)  # 2.13 compiles no nn.Sequential in place
    with saved_tensors(model) as saved:
        model(torch.ones(5, 8))
    assert (saved.total_bytes, saved.input_bytes) == (320, 160)
    assert all("_getframe" not in graph.code for graph in graphs)


def test_selective_checkpointing_has_no_cache_in_compiled_code(backend):
    net = mlp(2)
    step = torch.compile(lambda x: selective(net, x), backend=backend[0])
    x = torch.randn(5, 8, requires_grad=True)
    with saved_tensors(net) as saved:
        step(x).sum().backward()
    assert saved.blind_spots == []
    assert saved.total_bytes >= 160


# --- reading and misuse


def test_it_prints_as_a_table_and_as_html():
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    with saved_tensors(model) as saved:
        F.mse_loss(model(torch.ones(64, 16)), torch.zeros(64, 16))
    text = repr(saved)
    assert re.search(r"^1 +4.0 KiB$", text, re.M)
    assert re.search(r"^\(no submodule\) +4.0 KiB$", text, re.M)
    assert re.search(r"^total +8.0 KiB$", text, re.M)
    assert re.search(r"^left out: inputs +4.0 KiB$", text, re.M)
    assert "4.0 KiB</td>" in saved._repr_html_()


def test_not_a_module_is_a_type_error():
    with (
        pytest.raises(TypeError, match=r"saved_tensors: expected a torch.nn.Module, got function"),
        saved_tensors(lambda x: x),
    ):
        pass


def test_the_import_loads_only_torch_numpy_and_the_standard_library():
    code = (
        "import sys, torch, types; before = set(sys.modules);"
        "package = sys.modules['autograd_lib'] = types.ModuleType('autograd_lib');"
        f"package.__path__ = [{LIBRARY!r}]; import autograd_lib.memory;"
        "roots = {m.split('.')[0] for m in set(sys.modules) - before};"
        "print(sorted(roots - set(sys.stdlib_module_names) - {'autograd_lib', 'torch', 'numpy'}))"
    )
    assert run_python(code).stdout == "[]\n"


# --- peaks


@pytest.mark.parametrize("device", DEVICES)
def test_the_known_case_of_a_tanh_chain(device):
    """`layers` outputs and two gradients in flight, of which the last output outlives its node."""
    x = torch.randn(MIB // 4, device=device, requires_grad=True)
    ones = torch.ones_like(x)

    def step():
        h = x
        for _ in range(8):
            h = h.tanh()
        h.backward(ones)
        x.grad = None

    assert peak_bytes(step) == (8 + 2) * MIB
    with saved_tensors(nn.Identity()) as saved:
        step()
    assert saved.total_bytes == 8 * MIB


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@given(a=st.integers(1, 40), b=st.integers(1, 40), c=st.integers(1, 40))
@settings(max_examples=5, deadline=None)
def test_allocations_and_releases_add_up(device, dtype, a, b, c):
    unit = 512 // dtype.itemsize  # CUDA hands out multiples of 512 bytes

    def step():
        first = torch.empty(a * unit, dtype=dtype, device=device)
        second = torch.empty(b * unit, dtype=dtype, device=device)
        del first, second
        return torch.empty(c * unit, dtype=dtype, device=device)

    assert peak_bytes(step) == max(a + b, c) * 512


def test_peaks_see_inside_a_kernel_what_saved_tensors_do_not():
    conv = nn.Conv2d(4, 4, 3, dtype=torch.float64)  # float64: unfolds its input, in the kernel
    x = torch.randn(1, 4, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        assert peak_bytes(lambda: conv(x)) > conv(x).numel() * 8


def test_an_empty_step_needs_nothing_and_runs_twice(capfd):
    calls = []
    assert peak_bytes(lambda: calls.append(None)) == 0
    assert len(calls) == 2
    assert capfd.readouterr() == ("", "")  # the profiler's announcements stay out of notebooks


@pytest.mark.parametrize("device", DEVICES)
def test_what_the_first_call_leaves_behind_is_warm_up(device):
    model = nn.Linear(64, 64, bias=False).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    x = torch.ones(64, 64, device=device)

    def step():
        model(x).sum().backward()
        optimizer.step()
        optimizer.zero_grad()

    first = peak_bytes(step)
    assert first == peak_bytes(step)  # no state of the optimizer in the one and not in the other


@pytest.mark.parametrize("device", DEVICES)
def test_freeing_what_the_call_before_allocated_warns_and_is_subtracted(device):
    held = {}

    def step():
        held.clear()
        held["buffer"] = torch.empty(4096, dtype=torch.uint8, device=device)

    with pytest.warns(UserWarning, match=r"freed 4.0 KiB that stood before it") as caught:
        assert peak_bytes(step) == 0
    assert caught[0].filename == __file__


@pytest.mark.parametrize("device", DEVICES)
def test_freeing_what_stood_before_any_call_warns(device):
    held = [torch.empty(4096, dtype=torch.uint8, device=device) for _ in range(3)]
    with pytest.warns(UserWarning, match=r"freed 4.0 KiB that stood before it"):
        peak_bytes(held.pop)


def test_zero_grad_before_the_forward_warns_and_after_it_does_not():
    model = nn.Linear(64, 64)
    x = torch.ones(8, 64)

    def before():
        model.zero_grad()
        model(x).sum().backward()

    def after():
        model(x).sum().backward()
        model.zero_grad()

    with pytest.warns(UserWarning, match=r"freed 16.2 KiB"):
        lower = peak_bytes(before)
    after()
    assert peak_bytes(after) == lower + (64 * 64 + 64) * 4


def test_a_size_left_over_from_an_earlier_measurement_is_not_believed():
    held = []
    big = peak_bytes(lambda: held.append(torch.empty(2**16, dtype=torch.uint8)))
    assert big == 2**16
    held.clear()
    held += [torch.empty(2**16, dtype=torch.uint8) for _ in range(8)]  # some at old addresses

    def step():
        held.pop()
        return torch.empty(1024, dtype=torch.uint8)

    with pytest.warns(UserWarning, match=r"freed 64.0 KiB"):
        assert peak_bytes(step) == 1024


def test_the_first_measurement_of_a_process_is_silent():
    code = (
        "import torch; from autograd_lib.memory import peak_bytes;"
        "held = [torch.empty(64)] * 1;"
        "print(peak_bytes(lambda: held.clear() or torch.empty(16)))"
    )
    found = run_python(code)
    assert (found.stdout, found.stderr) == ("64\n", "")


def test_garbage_in_cycles_neither_changes_the_peak_nor_warns():
    def step():
        for _ in range(3):
            cycle = [torch.empty(1024, dtype=torch.uint8)]
            cycle.append(cycle)
            del cycle
            [[] for _ in range(5000)]  # enough to make a running collector collect

    assert peak_bytes(step) == 3 * 1024
    assert gc.isenabled()


@pytest.mark.parametrize("call", [1, 2])
def test_an_exception_in_step_leaves_no_profiler(call):
    calls = []

    def step():
        calls.append(None)
        if len(calls) == call:
            raise ValueError("from step")

    with pytest.raises(ValueError, match="from step"):
        peak_bytes(step)
    assert not torch._C._autograd._profiler_enabled()
    assert gc.isenabled()
    assert peak_bytes(lambda: torch.empty(64, dtype=torch.uint8)) == 64


def test_profilers_do_not_nest():
    with (
        torch.autograd.profiler.profile(),
        pytest.raises(RuntimeError, match="profiler is running already"),
    ):
        peak_bytes(lambda: None)

    def profiled():
        with torch.autograd.profiler.profile():
            torch.ones(3)

    with pytest.raises(RuntimeError, match="step runs a profiler of its own"):
        peak_bytes(profiled)
    assert not torch._C._autograd._profiler_enabled()
    assert peak_bytes(lambda: torch.empty(64, dtype=torch.uint8)) == 64


def test_not_a_function_is_a_type_error():
    with pytest.raises(TypeError, match=r"peak_bytes: expected a function .* got Tensor; pass"):
        peak_bytes(torch.ones(3))


def test_checkpointing_lowers_the_peak_and_recomputation_is_in_it():
    blocks = nn.Sequential(*[nn.Sequential(*[nn.Tanh()] * 4) for _ in range(4)])
    x = torch.randn(MIB // 4, requires_grad=True)
    ones = torch.ones_like(x)

    def plain():
        blocks(x).backward(ones)
        x.grad = None

    def checkpointed():
        h = x
        for block in blocks:
            h = checkpoint(block, h, use_reentrant=False)
        h.backward(ones)
        x.grad = None

    with saved_tensors(blocks) as saved:
        checkpointed()
    assert peak_bytes(plain) == 18 * MIB  # 16 outputs and two gradients in flight
    recomputed = peak_bytes(checkpointed)
    assert saved.total_bytes < recomputed < 12 * MIB


def test_parameters_that_stand_in_are_parameters() -> None:
    """torch.func.functional_call computes with tensors that the block did not begin with."""
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    parameters = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    with saved_tensors(model) as saved:
        torch.func.functional_call(model, parameters, torch.ones(3, 4)).sum()
    assert saved.total_bytes == 3 * 8 * 4  # the output of tanh
    assert saved.parameter_bytes == 2 * 8 * 4  # the second weight
    assert saved.input_bytes == 3 * 4 * 4


def test_distributed_tensors() -> None:
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
        for name, parameter in list(model.named_parameters()):
            module, _, leaf = name.rpartition(".")
            shared = distribute_tensor(parameter.detach(), mesh, [Replicate()])
            setattr(model.get_submodule(module), leaf, nn.Parameter(shared))
        with saved_tensors(model) as saved:
            model(distribute_tensor(torch.ones(3, 4), mesh, [Replicate()])).sum()
        assert saved.total_bytes == 3 * 8 * 4
        assert saved.input_bytes == 3 * 4 * 4
    finally:
        torch.distributed.destroy_process_group()


def test_peaks_in_two_threads() -> None:
    """The profiler exists once in a process: the threads must take turns."""
    with ThreadPoolExecutor(2) as pool:
        peaks = list(pool.map(lambda _: peak_bytes(lambda: torch.ones(1024).exp()), range(4)))
    assert peaks == [8192] * 4
