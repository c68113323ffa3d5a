"""Training with several processes: two of them do what one does, and so does the command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_training import STRATEGIES, agree, apart, go_on
from processes import SCENARIOS, Outcomes, run_all

from autograd_lib.command.main import main

ROOT = Path(__file__).parent.parent
# Four steps to an epoch; of SGD, for Adam magnifies the rounding of gradients that are nearly zero.
OPTIONS = {
    "data.batch_size": "300",
    "model.options.channels": "[7, 8]",
    "optimizer.name": "sgd",
    "optimizer.lr": "0.05",
    "optimizer.options": "{momentum: 0.9}",
    "training.epochs": "2",
    "training.device": "cpu",
}
# Calls the command with something broken on the second rank, in the second epoch.
BROKEN = """
import dataclasses
import os
import sys
from autograd_lib.command import main as command
from autograd_lib.command import build as _build

kind, *arguments = sys.argv[1:]
broken = os.environ["RANK"] == "1"

class Failing:
    def __init__(self, samples):
        self.samples, self.given = samples, 0
    def __len__(self):
        return len(self.samples)
    def __getitem__(self, i):
        self.given += 1
        if self.given > 900:
            raise OSError("the disk is gone")
        return self.samples[i]

def load_data(*args, load=_build.load_data, **options):
    task = load(*args, **options)
    if broken and kind == "loader":
        task = dataclasses.replace(task, train=Failing(task.train))
    return task

def make_model(*args, make=_build._make_model):
    model, calls = make(*args), []
    def look(*_):
        calls.append(1)
        if model.training and len(calls) > 6:
            raise ArithmeticError("the model is broken")
    if broken and kind == "model":
        model.blocks[0].register_forward_hook(look)
    return model

_build.load_data, _build._make_model = load_data, make_model
sys.exit(command.main(arguments))
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module")
def outcomes(shared: Path) -> Outcomes:
    commands = {
        strategy: arguments(shared / f"run_{strategy}", distributed__strategy=strategy)
        for strategy in STRATEGIES
    }
    commands["refused"] = arguments(shared / "refused", data__batch_size="127")
    return run_all(shared, commands)


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes(name: str, outcomes: Outcomes) -> None:
    errors = {rank: error for rank, error in enumerate(outcomes.errors[name]) if error}
    assert not errors, "\n".join(f"rank {rank}:\n{error}" for rank, error in errors.items())


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.usefixtures("outcomes")
def test_a_checkpoint_of_two_processes_loads_in_one(name: str, shared: Path) -> None:
    agree(*go_on("ddp", name, shared / "files"))


# --- the command


def arguments(directory: Path, *more: str, **options: str) -> list[str]:
    given = {**OPTIONS, **{name.replace("__", "."): value for name, value in options.items()}}
    overrides = [word for name, value in given.items() for word in ("--set", f"{name}={value}")]
    config = str(ROOT / "configs" / "digits_cnn.yaml")
    return ["train", config, *overrides, "--directory", str(directory), *more]


def torchrun(*command: str) -> subprocess.CompletedProcess[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *command],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def written(directory: Path) -> dict[str, Any]:
    return torch.load(directory / "last.pt", weights_only=True)


@pytest.fixture(scope="module")
def by_one(shared: Path) -> dict[str, Any]:
    """The last state of the command in one process, which is this one."""
    assert main(arguments(shared / "by_one")) == 0
    return written(shared / "by_one")


def check_same(directory: Path, by_one: dict[str, Any]) -> None:
    state = written(directory)
    assert apart(state["model"], by_one["model"]) < 1e-5
    assert state["progress"]["step"] == by_one["progress"]["step"] == 8
    ours, theirs = ([{**row, "seconds": 0} for row in each["history"]] for each in (state, by_one))
    assert len(ours) == 2
    for row, other in zip(ours, theirs, strict=True):
        assert row == pytest.approx(other, rel=1e-3)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_command_in_two_processes(
    strategy: str, shared: Path, outcomes: Outcomes, by_one: dict[str, Any]
) -> None:
    """`test_command.py` and the runs below are started by torchrun itself."""
    directory, ended = shared / f"run_{strategy}", outcomes.commands[strategy]
    assert [each.status for each in ended] == [0, 0], [each.err for each in ended]
    printed = "".join(each.out for each in ended)
    assert f"cpu, 2 processes ({strategy})" in printed
    assert printed.count("test loss") == printed.count("\nwritten to ") == 1
    files = sorted(path.name for path in directory.iterdir())
    assert files == ["best.pt", "config.yaml", "gradients.csv", "gradients.png", "last.pt"]
    check_same(directory, by_one)


def test_a_refusal_of_two_processes_is_said_once(shared: Path, outcomes: Outcomes) -> None:
    ended = outcomes.commands["refused"]
    assert [each.status for each in ended] == [2, 2]
    said = "error: data.batch_size: expected a multiple of the number of processes, 2, got 127"
    assert "".join(each.err for each in ended).count(said) == 1
    assert not (shared / "refused").exists()


@pytest.mark.parametrize(
    ("kind", "error"),
    [("loader", "OSError: the disk is gone"), ("model", "ArithmeticError: the model is broken")],
)
def test_a_rank_that_fails_ends_the_run(
    kind: str, error: str, shared: Path, by_one: dict[str, Any]
) -> None:
    directory, script = shared / f"broken_{kind}", shared / "broken.py"
    script.write_text(BROKEN)
    strategy = "ddp" if kind == "model" else "fsdp2"
    done = torchrun(str(script), kind, *arguments(directory, distributed__strategy=strategy))
    assert done.returncode == 1
    assert error in done.stderr
    assert "rank      : 1 (local_rank: 1)" in done.stderr  # named as the first that failed
    assert written(directory)["progress"]["step"] == 4
    assert main(arguments(directory, "--resume")) == 0
    check_same(directory, by_one)
