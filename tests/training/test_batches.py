"""Batches of other forms than tensors with one batch dimension, and what is said of near misses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loops import assert_same, batches_of, configured, everything, twins
from torch import Tensor, nn

from autograd_lib import AutogradTrainingSystem

# --- batches without one batch dimension


class Graphs(nn.Module):
    """Sums over neighbors, then over each graph."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, nodes: Tensor, edges: Tensor, graph: Tensor) -> Tensor:
        h = torch.tanh(self.inner(nodes))
        h = h + torch.zeros_like(h).index_add(0, edges[1], h[edges[0]])
        return self.outer(h.new_zeros(int(graph.max()) + 1, 4).index_add(0, graph, h))


class Speech(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 6)

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        return self.layer(x).log_softmax(-1).transpose(0, 1), lengths


def ctc(output: tuple[Tensor, Tensor], targets: tuple[Tensor, Tensor]) -> Tensor:
    return F.ctc_loss(output[0], targets[0], output[1], targets[1])


def graphs(seed: int, sizes: list[int]) -> tuple[Any, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    nodes = torch.randn(sum(sizes), 4, generator=draw)
    edges = torch.randint(sum(sizes), (2, 30), generator=draw)
    graph = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    return (nodes, edges, graph), torch.randint(2, (len(sizes),), generator=draw)


def speech(seed: int, lengths: list[int]) -> tuple[Any, Any]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(len(lengths), 20, 5, generator=draw)
    targets = torch.randint(1, 6, (sum(lengths),), generator=draw)
    return (x, torch.full((len(lengths),), 20)), (targets, torch.tensor(lengths))


FORMS: dict[str, Any] = {
    "graphs": (
        *(Graphs, nn.CrossEntropyLoss(), None),
        [graphs(0, [4, 3, 3]), graphs(1, [2, 5, 1, 4])],
    ),
    "concatenated targets": (
        *(Speech, ctc, lambda targets: len(targets[1])),
        [speech(0, [4, 3, 2, 5]), speech(1, [1, 6])],
    ),
}


@pytest.mark.parametrize("counted", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_divided_may_have_any_form(form: str, counted: bool):
    make, loss_fn, count, batches = FORMS[form]
    torch.manual_seed(0)
    model, twin = make(), make()
    twin.load_state_dict(model.state_dict())
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, twin))
    system = AutogradTrainingSystem(model, optimizer, loss_fn, count=count if counted else None)
    for inputs, targets in batches:
        other.zero_grad()
        expected = loss_fn(twin(*inputs), targets)
        expected.backward()
        other.step()
        assert_same(system.train_step(inputs, targets), expected.detach())
    assert_same(model.state_dict(), twin.state_dict())
    if not counted and form == "concatenated targets":
        message = r"^evaluate: how much a batch weighs .* is not known, .*; give the system count="
        with pytest.raises(ValueError, match=message):
            system.evaluate(batches)
        return
    numbers = [len(targets[1] if isinstance(targets, tuple) else targets) for _, targets in batches]
    with torch.no_grad():
        losses = [loss_fn(model(*inputs), targets).item() for inputs, targets in batches]
    mean = np.average(losses, weights=numbers)
    assert system.evaluate(batches)["loss"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_what_has_no_batch_dimension_is_not_divided(form: str):
    make, loss_fn, count, batches = FORMS[form]
    model = make()
    config = configured(performance={"micro_batch": 2})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    system = AutogradTrainingSystem(model, optimizer, loss_fn, config, count=count)
    before = everything(system)
    message = r"^train_step: to divide a batch, .* whose first dimension is the batch, got shapes "
    with pytest.raises(ValueError, match=message) as raised:
        system.train_step(*batches[0])
    assert "; leave micro_batch out and let the loader make the batches small" in str(raised.value)
    assert_same(everything(system), before)


def test_scalars_among_the_inputs_and_as_targets():
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 1)

        def forward(self, x: Tensor, factor: Tensor) -> Tensor:
            return self.layer(x) * factor

    def squares(output: Tensor, target: Tensor) -> Tensor:
        return (output - target).square().mean()

    model, x = Scaled(), torch.randn(5, 3)
    system = AutogradTrainingSystem(model, torch.optim.SGD(model.parameters(), lr=0.0), squares)
    for target in (torch.tensor(1.0), torch.ones(5, 1)):
        loss = system.train_step((x, torch.tensor(2.0)), target)
        assert_same(loss, squares(model(x, torch.tensor(2.0)), target).detach())


# --- NumPy, float64, frozen


def test_arrays_of_numpy_are_taken_as_tensors():
    found = []
    for convert in (np.asarray, torch.Tensor.clone):
        model, optimizer, _, _ = twins(lambda: nn.Linear(8, 8))
        config = configured(performance={"micro_batch": 3})
        system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss(), config)
        batches = [(convert(x), convert(y)) for x, y in batches_of((8,), 8)]
        if convert is np.asarray:
            batches[0][0].flags.writeable = False  # as of a file that is mapped
        rows = system.fit(batches, 2, batches)
        found.append((dict(model.state_dict()), [{**row, "seconds": 0.0} for row in rows]))
    assert_same(*found)


def test_tables_in_float64():
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    system = AutogradTrainingSystem(model, optimizer, nn.MSELoss())
    x, y = torch.randn(4, 3), torch.randn(4, 1)
    system.train_step(x, y.double())
    before = everything(system)
    with pytest.raises(RuntimeError) as raised:
        system.train_step(x.double(), y)
    note = (
        "train_step: the batch is in torch.float32, torch.float64, the model in torch.float32; "
        'convert the data once, as x.float() (of NumPy x.astype("float32")), or the model, as '
        "model.double()"
    )
    assert raised.value.__notes__ == [note]
    assert_same({**everything(system), "gradients": 0}, {**before, "gradients": 0})
    model.double()
    system.train_step(x.double(), y.double())
    with pytest.raises(RuntimeError) as raised:
        system.train_step(torch.randn(4, 2).double(), y.double())  # of another shape only
    assert not hasattr(raised.value, "__notes__")


def test_a_frozen_model_and_one_with_a_head_to_learn():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    x, y = torch.randn(5, 3), torch.randn(5, 1)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    system = AutogradTrainingSystem(model, optimizer, nn.MSELoss())
    before = everything(system)
    with pytest.raises(ValueError, match=r"^train_step: the loss depends on nothing that requires"):
        system.train_step(x, y)
    assert_same(everything(system), before)
    assert system.evaluate([(x, y)])["loss"] == pytest.approx(F.mse_loss(model(x), y).item())
    model[2].requires_grad_(True)
    kept = model[0].weight.clone()
    losses = [system.train_step(x, y).item() for _ in range(20)]
    assert losses[-1] < losses[0]
    assert_same(model[0].weight.detach(), kept)


# --- loaders


def test_a_generator_is_good_for_one_epoch():
    model, optimizer, _, _ = twins(lambda: nn.Linear(8, 8))
    system = AutogradTrainingSystem(model, optimizer, nn.CrossEntropyLoss())
    batches = batches_of((8,), 8)
    (row,) = system.fit((batch for batch in batches), 1, (batch for batch in batches))
    assert math.isfinite(row["validation_loss"])
    spent = (batch for batch in batches)
    system.fit(spent, 2)
    with pytest.raises(ValueError, match=r"gives no batch; .* each epoch, as a list or a DataLoa"):
        system.fit(spent, 3)
