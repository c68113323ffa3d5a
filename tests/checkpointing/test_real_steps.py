"""Steps as people write them: arguments and results of any form, and what no plan can serve."""

from __future__ import annotations

import copy
import pickle
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autograd_lib import CheckpointPlan, Settings, peak_bytes, plan_checkpoints
from autograd_lib.checkpointing.trees import copies, flatten

PLENTY = 10**12
WIDTH = 32


@dataclass
class Condition:
    shift: Tensor
    scale: Tensor


class Bag(dict):  # type: ignore[type-arg]
    """A mapping that PyTorch's trees do not know."""


class Named(NamedTuple):
    shift: Tensor
    scale: Tensor


@dataclass
class Output:
    hidden: Tensor
    extra: Any = None


class Block(nn.Module):
    """Takes two tensors in some container; returns its output in some form."""

    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.layer, self.form = nn.Linear(WIDTH, WIDTH), form

    def forward(self, x: Tensor, condition: Any) -> Any:
        shift, scale = condition.values() if isinstance(condition, dict) else parts(condition)
        y = x + torch.tanh(self.layer(x) * scale) + shift
        return self.form(y, y.mean(-1).sigmoid())


def parts(condition: Any) -> tuple[Tensor, Tensor]:
    if isinstance(condition, tuple | list):
        return condition[0], condition[1]
    return condition.shift, condition.scale


CONTAINERS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"shift": a, "scale": b},
    "dict subclass": lambda a, b: Bag(shift=a, scale=b),
    "named tuple": Named,
    "dataclass": Condition,
}
RESULTS: dict[str, tuple[Callable[[Tensor, Tensor], Any], Callable[[Any], tuple[Tensor, Any]]]] = {
    "tensor": (lambda y, _: y, lambda r: (r, 0.0)),
    "tuple": (lambda y, e: (y, e), lambda r: (r[0], r[1].sum())),
    "list with more": (lambda y, e: [None, y, {"e": e}], lambda r: (r[1], r[2]["e"].sum())),
    "mapping": (lambda y, e: {"extra": e, "hidden": y}, lambda r: (r["hidden"], r["extra"].sum())),
    "dataclass": (Output, lambda r: (r.hidden, r.extra.sum())),
}


class Model(nn.Module):
    """The head makes the tensors that all blocks take; the tail takes a result of each block."""

    def __init__(self, container: str, result: str) -> None:
        super().__init__()
        form, self.take = RESULTS[result]
        self.wrap = CONTAINERS[container]
        self.shift, self.scale = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.blocks = nn.ModuleList(Block(form) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        condition = self.wrap(self.shift(x), self.scale(x).exp())
        extra: Any = 0.0
        for block in self.blocks:
            x, more = self.take(block(x, condition))
            extra = extra + more
        return x.square().mean() + 0.01 * extra


def data(rows: int = 512) -> Tensor:
    torch.manual_seed(1)
    return torch.randn(rows, WIDTH)


def gradients(model: nn.Module, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    loss().backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_planned(
    model: nn.Module, blocks: Any, loss: Callable[[], Tensor], rel: float = 0.01
) -> CheckpointPlan:
    """Predictions without a plan and at the least budget; gradients to the bit."""
    expected = gradients(model, loss)
    plain = peak_bytes(lambda: gradients(model, loss))
    plan = plan_checkpoints(blocks, loss, PLENTY)
    assert plan.plain_bytes == pytest.approx(plain, rel=rel)
    least = plan.within(plan.curve[0][0])
    assert least.budget < plain
    least.apply(model)
    assert least.budget == pytest.approx(peak_bytes(lambda: gradients(model, loss)), rel=rel)
    got = gradients(model, loss)
    assert all(torch.equal(got[n], gradient) for n, gradient in expected.items())
    return plan


@pytest.mark.parametrize("result", RESULTS)
@pytest.mark.parametrize("container", ["tuple", "dict"])
def test_results_of_any_form(container: str, result: str) -> None:
    torch.manual_seed(0)
    model, x = Model(container, result), data()
    assert_planned(model, model.blocks, lambda: model(x))


@pytest.mark.parametrize("container", CONTAINERS)
def test_arguments_of_any_form(container: str) -> None:
    """Their gradients come from every block and stand until the head's backward."""
    torch.manual_seed(0)
    model, x = Model(container, "tensor"), data()
    assert_planned(model, model.blocks, lambda: model(x))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor, table: Tensor) -> Tensor:
        scores = self.layer(x) @ x.transpose(1, 2) + mask
        return x + (scores.softmax(-1) @ x) * table


def test_masks_and_tables_made_in_the_head() -> None:
    """A mask that only checkpoints keep, a table that plain blocks keep too: each counts once."""
    blocks = nn.ModuleList(Masked() for _ in range(5))
    x = torch.randn(4, 96, WIDTH)

    def loss() -> Tensor:
        mask = torch.full((4, 96, 96), -1e4).triu(1)
        table, y = torch.arange(96.0)[:, None].expand(96, WIDTH).sin(), x
        for block in blocks:
            y = block(y, mask, table)
        return y.square().mean()

    assert_planned(blocks, blocks, loss, rel=1e-3)


class Graph(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, neighbors: Tensor) -> Tensor:
        return x + torch.tanh(torch.sparse.mm(neighbors, self.layer(x)))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
def test_sparse_arguments(layout: torch.layout) -> None:
    torch.manual_seed(0)
    blocks, x = nn.ModuleList(Graph() for _ in range(4)), data()
    dense = (torch.rand(512, 512) < 0.02).float()
    neighbors = dense.to_sparse() if layout is torch.sparse_coo else dense.to_sparse_csr()

    def loss() -> Tensor:
        y = x
        for block in blocks:
            y = block(y, neighbors)
        return y.square().mean()

    assert_planned(blocks, blocks, loss)


class Balanced(nn.Module):
    """Leaves the balance loss of its gate as an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        share = self.gate(x).softmax(-1)
        self.balance = share.mean(0).square().sum()
        return torch.tanh(self.layer(x)) * share[:, :1]


def test_results_left_as_attributes() -> None:
    """Planned, and after backward the attribute is still that of the forward."""
    torch.manual_seed(0)
    blocks, x = nn.ModuleList(Balanced() for _ in range(4)), data()

    def loss() -> Tensor:
        y = x
        for block in blocks:
            y = block(y)
        return y.square().mean() + 0.1 * sum(block.balance for block in blocks)

    plan = plan_checkpoints(blocks, loss, PLENTY)
    assert not any("balance" in vars(block) for block in blocks)
    plan.within(plan.curve[0][0]).apply(blocks)
    value = loss()
    left = [block.balance for block in blocks]
    value.backward()
    assert all(block.balance is tensor for block, tensor in zip(blocks, left, strict=True))
    for block in blocks:
        del block.balance


def test_results_left_as_attributes_and_taken_away() -> None:
    torch.manual_seed(0)
    blocks, x = nn.ModuleList(Balanced() for _ in range(4)), data()

    def loss() -> Tensor:
        y = x
        for block in blocks:
            y = block(y)
        return y.square().mean() + 0.1 * sum(vars(block).pop("balance") for block in blocks)

    assert_planned(blocks, blocks, loss)
    assert not any("balance" in vars(block) for block in blocks)


class Gated(nn.Module):
    """Takes a second tensor, if there is one, and returns what may be the second of others."""

    def __init__(self, both: bool) -> None:
        super().__init__()
        self.layer, self.both = nn.Linear(WIDTH, WIDTH), both

    def forward(self, x: Tensor, gate: Tensor | None = None) -> Any:
        v = torch.tanh(self.layer(x))
        y = x + (v if gate is None else v * gate)
        return (y, v) if self.both else y


class Wired(nn.Module):
    """Blocks with a second tensor on some way, which the name says."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way
        self.first = nn.Linear(WIDTH, WIDTH)
        self.gates = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.blocks = nn.ModuleList(Gated("from a" in way or "from the" in way) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = head = self.first(x)
        if self.way == "made between":
            for gate, block in zip(self.gates, self.blocks, strict=True):
                x = block(x, gate(head).exp())
        elif self.way == "the input of the first":
            for block in self.blocks:
                x = block(x, head)
        else:
            second: Tensor | None = None
            for block in self.blocks:
                x, made = block(x, second)
                second = made if second is None or self.way == "from the one before" else second
        return x.square().mean()


WAYS = ["made between", "the input of the first", "from the one before", "from a first block"]


@pytest.mark.parametrize("way", WAYS)
def test_second_tensors_on_any_way(way: str) -> None:
    torch.manual_seed(0)
    model, x = Wired(way), data(1024)
    assert_planned(model, model.blocks, lambda: model(x))


class Tupled(nn.Module):
    """A block of a sequence through which a tuple goes."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, pair: Any) -> tuple[Tensor, Tensor]:
        x, gate = pair if isinstance(pair, tuple) else (pair, torch.zeros(()))
        y = torch.tanh(self.layer(x) + gate)
        return y, gate + torch.sigmoid(self.gate(y))


def test_a_sequence_of_tuples_keeps_its_budget() -> None:
    """Without runs of several blocks; here the prediction may be above what is measured."""
    torch.manual_seed(0)
    blocks, x = nn.Sequential(*[Tupled() for _ in range(5)]), data(1024)

    def loss() -> Tensor:
        y, gate = blocks(x)
        return y.square().mean() + gate.square().mean()

    expected = gradients(blocks, loss)
    plan = plan_checkpoints(blocks, loss, PLENTY)
    assert plan.curve[0][0] < 0.9 * plan.plain_bytes
    for budget, _ in plan.curve:
        plan.within(budget).apply(blocks)
        assert 0.9 * budget < peak_bytes(lambda: gradients(blocks, loss)) < 1.01 * budget
        got = gradients(blocks, loss)
        assert all(torch.equal(got[n], gradient) for n, gradient in expected.items())


# What no plan can serve


class Step(NamedTuple):
    model: nn.Module
    loss: Callable[[], Tensor]
    message: str


def chain() -> tuple[nn.Sequential, Tensor]:
    blocks = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(3)])
    return blocks, torch.randn(16, 8, requires_grad=True)


def forces() -> Step:
    blocks, x = chain()

    def loss() -> Tensor:
        energy = blocks(x).sum()
        (force,) = torch.autograd.grad(energy, x, create_graph=True)
        return force.square().mean() + energy

    return Step(blocks, loss, "runs no backward through the blocks before it returns the loss")


def whole_step() -> Step:
    blocks, x = chain()

    def loss() -> Tensor:
        value = blocks(x).square().mean()
        value.backward()
        return value

    return Step(blocks, loss, "or as a whole training step")


def functional() -> Step:
    blocks, x = chain()

    def loss() -> Tensor:
        return torch.func.grad(lambda v: blocks(v).sum())(x).square().sum()

    return Step(blocks, loss, "runs no backward through the blocks")


class Appends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, cache: Any) -> Tensor:
        if isinstance(cache, Tensor):
            cache.add_(1)
        else:
            cache.append(x)
        return torch.tanh(self.layer(x))


def writing(cache: Callable[[], Any], kind: str) -> Step:
    blocks, x = nn.ModuleList([Appends(), Appends()]), torch.randn(4, 8)

    def loss() -> Tensor:
        return blocks[1](blocks[0](x, cache=cache()), cache()).sum()

    message = f"block 0 (Appends) writes into its argument 'cache' (a {kind}), which running"
    return Step(blocks, loss, message)


class Calls(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor, condition: Callable[[], Tensor]) -> Tensor:
        return torch.tanh(self.layer(x)) + condition()


def closure() -> Step:
    model, x = nn.ModuleList([Calls(), Calls(), nn.Linear(8, 8)]), torch.randn(4, 8)

    def loss() -> Tensor:
        condition = model[2](x).exp()
        return model[1](model[0](x, lambda: condition), lambda: condition).sum()

    message = "block 1 (Calls) uses a tensor that requires a gradient (of ExpBackward0) and is in"
    return Step(model, loss, message)


def iterator() -> Step:
    blocks, x = nn.ModuleList([Calls(), Calls()]), torch.randn(4, 8)
    numbers = (n for n in range(3))

    def loss() -> Tensor:
        return blocks[1](blocks[0](x, numbers), numbers).sum()

    return Step(blocks, loss, "what cannot be taken apart (cannot pickle 'generator' object)")


REFUSED: dict[str, Callable[[], Step]] = {
    "forces": forces,
    "a whole step": whole_step,
    "torch.func": functional,
    "a list": lambda: writing(list, "list"),
    "a tensor": lambda: writing(lambda: torch.zeros(3), "Tensor"),
    "an object": lambda: writing(lambda: Bag.__new__(Cache), "Cache"),
    "a closure": closure,
    "an iterator": iterator,
}


class Cache(dict):  # type: ignore[type-arg]
    """Holds its tensors where only attributes tell."""

    def append(self, x: Tensor) -> None:
        self.last = x


@pytest.mark.parametrize("name", REFUSED)
def test_steps_that_no_plan_can_serve(name: str) -> None:
    """The sentence says why, and nothing is changed."""
    model, loss, message = REFUSED[name]()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = copy.deepcopy(model.state_dict())
    blocks = model if isinstance(model, nn.Sequential) else list(model)[:2]
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        plan_checkpoints(blocks, loss, PLENTY)
    assert str(error.value).startswith("plan_checkpoints: ")
    assert all(torch.equal(p.grad, torch.ones_like(p)) for p in model.parameters())
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not any("forward" in vars(module) for module in model.modules())


# Planned models elsewhere


def planned(kind: type[nn.Sequential | nn.ModuleList]) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model = Looped(kind(*layers()) if kind is nn.Sequential else kind(layers()))
    x = data(64)
    plan = plan_checkpoints(model.layers, lambda: model(x).sum(), PLENTY)
    plan.within(plan.curve[0][0]).apply(model)
    assert any("forward" in vars(module) for module in model.modules())
    return model, x


def layers() -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(WIDTH, 64), nn.GELU(), nn.Linear(64, WIDTH)) for _ in range(3)]


class Looped(nn.Module):
    def __init__(self, layers: nn.Sequential | nn.ModuleList) -> None:
        super().__init__()
        self.layers = layers

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layers, nn.Sequential):
            return self.layers(x)
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.parametrize("kind", [nn.Sequential, nn.ModuleList])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("strict", [True, False])
def test_export_of_a_planned_model(kind: Any, training: bool, strict: bool) -> None:
    model, x = planned(kind)
    model.train(training)
    exported = torch.export.export(model, (x,), strict=strict)
    assert torch.equal(exported.module()(x), model(x))
    assert not [n for n in exported.graph.nodes if "checkpoint" in str(n.target)]


def test_export_of_a_planned_sequence() -> None:
    model, x = planned(nn.Sequential)
    sequence = model.layers
    assert torch.equal(torch.export.export(sequence, (x,)).module()(x), sequence(x))


@pytest.mark.parametrize("kind", [nn.Sequential, nn.ModuleList])
@pytest.mark.parametrize("again", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_planned_model(kind: Any, again: Callable[[nn.Module], nn.Module]) -> None:
    model, x = planned(kind)
    other = again(model)
    expected = gradients(model, lambda: model(x).square().sum())
    got = gradients(other, lambda: other(x).square().sum())
    assert all(torch.equal(got[n], gradient) for n, gradient in expected.items())


TRANSFORMS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "grad": lambda m, x: torch.func.grad(lambda v: m(v).sum())(x),
    "jacrev": lambda m, x: torch.func.jacrev(m)(x[0]),
    "per-sample gradients": lambda m, x: torch.func.vmap(
        torch.func.grad(lambda p, v: torch.func.functional_call(m, p, (v[None],)).sum()), (None, 0)
    )({n: p.detach() for n, p in m.named_parameters()}, x),
}


@pytest.mark.parametrize("kind", [nn.Sequential, nn.ModuleList])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_name_the_plan_and_its_remedy(kind: Any, name: str) -> None:
    """The remedy that the message names works."""
    model, x = planned(kind)
    message = (
        r"checkpoint plan: a block .* has a plan.*undo the plan first, by Settings\(checkpoint"
    )
    with pytest.raises(RuntimeError, match=message):
        TRANSFORMS[name](model, x)
    Settings(checkpoint={"layers": "save"}).apply(model)
    TRANSFORMS[name](model, x)


# How much planning runs


class Wide(nn.Module):
    """One of several that are alike but for a number that counts them."""

    runs: ClassVar[Counter[int]] = Counter()

    def __init__(self, layer_idx: int, p: float = 0.1) -> None:
        super().__init__()
        self.layer_idx, self.layer, self.dropout = layer_idx, nn.Linear(8, 8), nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        self.runs[self.layer_idx] += 1
        return x + self.dropout(torch.tanh(self.layer(x)))


def counted(blocks: nn.ModuleList) -> tuple[CheckpointPlan, int, Counter[int]]:
    Wide.runs.clear()
    steps, x = 0, torch.randn(16, 8, requires_grad=True)

    def loss() -> Tensor:
        nonlocal steps
        steps += 1
        y = x
        for block in blocks:
            y = block(y)
        return y.square().sum()

    plan = plan_checkpoints(blocks, loss, PLENTY)
    return plan, steps, Counter(Wide.runs)


def test_alike_blocks_are_measured_once() -> None:
    """The step runs three times; of six alike blocks five run only in the first of these."""
    plan, steps, runs = counted(nn.ModuleList(Wide(i) for i in range(6)))
    assert steps == 3
    assert sorted(runs.values())[:5] == [1] * 5
    assert max(runs.values()) <= 16
    assert plan.refused == {}


@pytest.mark.parametrize(
    "change",
    [
        lambda block: setattr(block.dropout, "p", 0.2),
        lambda block: block.layer.bias.requires_grad_(False),
        lambda block: block.layer.register_parameter("bias", None),
        lambda block: block.dropout.eval(),
        lambda block: setattr(block, "layer_idx", 17),
        lambda block: block.register_buffer("more", torch.zeros(3)),
        lambda block: block.layer.register_forward_hook(lambda *_: None),
    ],
    ids=["number", "frozen", "no bias", "mode", "index", "buffer", "hook"],
)
def test_blocks_that_differ_are_measured_each(change: Callable[[Wide], None]) -> None:
    blocks = nn.ModuleList(Wide(i) for i in range(4))
    change(blocks[1])
    _, _, runs = counted(blocks)
    assert sum(count > 2 for count in runs.values()) == 2
    assert runs[blocks[1].layer_idx] > 2


class Routed(nn.Module):
    """Does more work for some inputs, which no attribute tells."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.layer(x))
        if float(self.layer.bias[0].detach()) > 1:
            y = y + torch.tanh(y * 2).exp().sin()
        return y


def test_blocks_whose_work_depends_on_values() -> None:
    blocks, x = nn.Sequential(*[Routed() for _ in range(4)]), data(256)
    with torch.no_grad():
        blocks[2].layer.bias[0] = 2.0
    assert_planned(blocks, blocks, lambda: blocks(x).sum())


class Hidden(nn.Module):
    """Has noise of its own that no generator of the module tells of."""

    def __init__(self, noisy: bool) -> None:
        super().__init__()
        self.layer, self.noisy = nn.Linear(8, 8), noisy

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.rand(x.shape, generator=NOISE) if self.noisy else 1.0
        return torch.tanh(self.layer(x)) * noise


NOISE = torch.Generator()


def test_each_kind_of_block_is_tried_for_its_randomness() -> None:
    model = nn.Sequential(*[Hidden(noisy) for noisy in (False, True, False, True, False)])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        plan = plan_checkpoints(model, torch.randn(64, 8), PLENTY)
    assert sorted(plan.refused) == [1, 3]
    assert len(caught) == 2


# Trees


def test_trees_reach_into_objects() -> None:
    """What comes out has the same structure, one object where there was one, and other leaves."""
    x, linear = torch.ones(3), nn.Linear(2, 2)
    value = {"a": [Condition(x, x * 2), Bag(k=x)], "b": (linear, F.relu, 3.5), "c": Output(x)}
    tree = flatten(value)
    assert tree.build(tree.leaves)["b"] == (linear, F.relu, 3.5)
    made = tree.build([-v if isinstance(v, Tensor) else v for v in tree.leaves])
    assert torch.equal(made["a"][0].scale, x * -2)
    assert made["a"][0].shift is made["a"][1]["k"] is made["c"].hidden
    assert isinstance(made["a"][1], Bag)


def test_copies_keep_layouts_and_sharing() -> None:
    base = torch.arange(12.0).view(3, 4)
    leaves = [base, base.t(), base[1:, ::2], torch.ones(1, 4).expand(5, 4), "text"]
    found = copies(leaves)
    for old, new in zip(leaves[:4], found[:4], strict=True):
        assert torch.equal(old, new)
        assert (old.stride(), old.storage_offset()) == (new.stride(), new.storage_offset())
    assert len({x.untyped_storage().data_ptr() for x in found[:3]}) == 1
    assert found[0].data_ptr() != base.data_ptr()
    assert found[3].untyped_storage().nbytes() == 16
