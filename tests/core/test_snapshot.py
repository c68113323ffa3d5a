"""Random states, buffers and gradients, taken and restored; files that appear complete or not."""

from __future__ import annotations

import contextlib
import io
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from autograd_lib.checkpointing import plan_checkpoints
from autograd_lib.core.files import replaced_atomically
from autograd_lib.core.snapshot import (
    ModuleState,
    is_writable,
    own_generators,
    preserved_random_state,
    random_state,
    seed_all,
    set_random_state,
    torch_generators,
    without_gradients,
    writable_buffers,
)
from autograd_lib.training import AutogradTrainingSystem
from autograd_lib.tuning import autotune


def draws() -> list[float]:
    """A normal number too, of which generators keep the second one of a pair."""
    drawn = [torch.randn(3).tolist(), [random.gauss(0, 1)], [float(np.random.randn())]]
    return [value for values in drawn for value in values]


def test_random_state_survives_a_file_that_is_read_safely() -> None:
    draws()
    file = io.BytesIO()
    torch.save(random_state(), file)
    expected = draws()
    file.seek(0)
    set_random_state(torch.load(file, weights_only=True))
    assert draws() == expected != draws()


def test_random_state_is_preserved_through_an_error() -> None:
    state = random_state()
    expected = draws()
    set_random_state(state)
    with contextlib.suppress(ArithmeticError), preserved_random_state():
        seed_all(1)
        draws()
        raise ArithmeticError
    assert draws() == expected


def test_the_states_of_pytorch_s_generators_are_read_and_set() -> None:
    (generator,) = torch_generators([])
    state = generator.get_state()
    assert torch.equal(state, torch_generators()[0].get_state())
    expected = torch.rand(3)
    assert not torch.equal(state, generator.get_state())
    generator.set_state(state)
    assert torch.equal(torch.rand(3), expected)


def test_a_seed_is_that_of_every_generator() -> None:
    seed_all(2**40)  # NumPy takes 32 bits
    expected = draws()
    seed_all(2**40)
    assert draws() == expected


class Draws(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.torch, self.python = torch.Generator(), random.Random(0)
        self.legacy, self.numpy = np.random.RandomState(0), np.random.default_rng(0)
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self) -> list[Any]:
        self.mean += 1
        self.calls = self.calls + 1  # replaces the buffer
        drawn = torch.rand(1, generator=self.torch).item(), self.python.random()
        return [*drawn, self.legacy.rand(), self.numpy.random()]


def test_buffers_and_own_generators_are_restored() -> None:
    module = Draws()
    assert len(own_generators(module)) == 4
    state, mean, calls = ModuleState(module.modules()), module.mean, module.calls
    expected = module()
    second = module()
    state.restore_buffers()
    assert module.mean is mean
    assert module.calls is calls
    assert [*mean.tolist(), calls.item()] == [0, 0, 0]
    assert module() != second  # the generators went on
    state.restore()
    assert module() == expected


def test_given_tensors_generators_and_absent_buffers_are_restored() -> None:
    module, other = Draws(), torch.ones(2, requires_grad=True)
    module.register_buffer("absent", None)
    product = (other * other).sum()
    state = ModuleState([module], [other], torch_generators([]))
    expected = torch.rand(1)
    own = module.python.getstate()
    other.data.mul_(3)
    module.absent = torch.ones(())
    state.restore()
    assert other.tolist() == [1, 1]
    assert module.absent is None
    assert torch.equal(torch.rand(1), expected)
    assert module.python.getstate() == own
    product.backward()  # raises if the restored tensor counted as modified
    assert other.grad.tolist() == [2, 2]


class Unwritable(nn.Module):
    """Buffers of which several elements share memory, and of inference mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("base", torch.tensor([[1.0], [2.0]]))
        self.register_buffer("expanded", self.base.expand(2, 3))
        self.register_buffer("scalar", torch.ones(()).expand(3))
        with torch.inference_mode():
            self.register_buffer("inferred", torch.ones(2))
            self.register_buffer("both", torch.ones(1).expand(2))


@pytest.mark.parametrize("twice", [False, True])
def test_buffers_that_are_not_writable_are_restored(twice: bool) -> None:
    module = Unwritable()
    before = {name: (b, b.tolist()) for name, b in module.named_buffers()}
    assert [is_writable(b) for b in module.buffers()] == [True, False, False, False, False]
    state = ModuleState(module.modules())
    for _ in range(1 + twice):
        module.base.mul_(3)
        module.scalar = torch.zeros(3)
        with torch.inference_mode():
            module.inferred.add_(1)
            module.both[:1] += 1
        state.restore()
        assert {n: (id(b), b.tolist()) for n, b in module.named_buffers()} == {
            name: (id(b), value) for name, (b, value) in before.items()
        }


def test_a_state_is_loaded_into_buffers_that_are_not_writable() -> None:
    source, module = Unwritable(), Unwritable()
    source.base.mul_(3)
    state = source.state_dict()
    with pytest.raises(RuntimeError, match="expanded"):
        module.load_state_dict(state)
    buffers = [*module.buffers()]
    with writable_buffers(module.modules()):
        module.load_state_dict(state)
    assert module.expanded.tolist() == [[3.0] * 3, [6.0] * 3]
    assert all(a is b for a, b in zip(module.buffers(), buffers, strict=True))
    state["scalar"] = torch.arange(3.0)  # more than one number in memory can hold
    with writable_buffers(module.modules()):
        module.load_state_dict(state)
    assert module.scalar.tolist() == [0, 1, 2]


class Scaled(nn.Module):
    """A layer whose scale is stored once for all its elements, and is changed by each call."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.register_buffer("scale", torch.tensor(0.5).expand(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layer(x) * self.scale.clone()
        self.scale[:1] *= 0.9
        return y.tanh()


def test_tools_that_run_a_step_restore_buffers_that_are_not_writable(tmp_path: Path) -> None:
    x, model = torch.ones(2, 4), nn.Sequential(Scaled(), nn.Linear(4, 4))
    plan_checkpoints(model, x, 10**9)
    autotune(model, (x, x), nn.MSELoss(), compile=False)
    assert model[0].scale.tolist() == [0.5] * 4

    def trained(interrupted: bool) -> list[float]:
        made = []
        for _ in range(1 + interrupted):
            model = nn.Sequential(Scaled(), nn.Linear(4, 4))
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            made.append(AutogradTrainingSystem(model, optimizer, nn.MSELoss()))
        made[0].train_step(x, x)
        made[0].save(tmp_path / "a.pt")
        made[-1].load(tmp_path / "a.pt")
        made[-1].train_step(x, x)
        return [*model[0].scale.tolist(), *model[0].layer.weight.flatten().tolist()]

    resumed = trained(interrupted=True)
    assert resumed[:4] == pytest.approx([0.5 * 0.9**2] * 4)
    assert resumed[4:] == trained(interrupted=False)[4:]


def test_gradients_are_set_aside() -> None:
    with_one, without = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    with_one.grad = kept = torch.full((2,), 3.0)
    with contextlib.suppress(ArithmeticError), without_gradients([with_one, without]):
        assert with_one.grad is None
        (with_one * without).sum().backward()
        raise ArithmeticError
    assert with_one.grad is kept
    assert kept.tolist() == [3, 3]
    assert without.grad is None


def test_a_file_is_replaced_only_when_it_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("before")
    with contextlib.suppress(OSError), replaced_atomically(path) as unfinished:
        unfinished.write_text("half")
        raise OSError("disk full")
    assert path.read_text() == "before"
    with replaced_atomically(path) as unfinished:
        unfinished.write_text("after")
        assert path.read_text() == "before"
    assert path.read_text() == "after"
    assert [*tmp_path.iterdir()] == [path]
