"""Two processes, started once for all that is tested with two: importing torch takes seconds."""

from __future__ import annotations

import contextlib
import datetime
import io
import os
import pickle
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import distributed_gradients
import distributed_monitor
import distributed_nonfinite
import distributed_training
import torch
from torch import distributed as dist

from autograd_lib.command.main import main

# By file and name: called with the rank and a directory that all scenarios of both ranks share.
SCENARIOS: dict[str, Callable[[int, Path], Any]] = {
    f"{kind}: {name}": run
    for kind, runs in {
        "training": distributed_training.SCENARIOS,
        "monitor": distributed_monitor.SCENARIOS,
        "gradients": distributed_gradients.SCENARIOS,
        "nonfinite": distributed_nonfinite.SCENARIOS,
    }.items()
    for name, run in runs.items()
}


class Ended(NamedTuple):
    """How a command ended, and what it printed."""

    status: int
    out: str
    err: str


class Outcomes(NamedTuple):
    errors: dict[str, list[str]]  # by scenario and rank, empty where there was none
    commands: dict[str, list[Ended]]  # by command and rank


def run_all(directory: Path, commands: dict[str, list[str]]) -> Outcomes:
    """Run each scenario, and the commands with these arguments, in two processes."""
    (directory / "files").mkdir()
    distributed_training.one_process(directory / "files")
    torch.multiprocessing.spawn(_rank, (directory, commands), nprocs=2)
    ranks = [pickle.loads((directory / f"rank{rank}").read_bytes()) for rank in range(2)]
    return Outcomes(
        {name: [errors[name] for errors, _ in ranks] for name in SCENARIOS},
        {name: [ended[name] for _, ended in ranks] for name in commands},
    )


def _rank(rank: int, directory: Path, commands: dict[str, list[str]]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    errors = {}
    for i, (name, run) in enumerate(SCENARIOS.items()):
        dist.init_process_group("gloo", **_meeting(directory / f"group{i}", rank))
        try:
            run(rank, directory / "files")
            errors[name] = ""
            dist.barrier()
        except BaseException:  # a KeyboardInterrupt, too, is an outcome
            errors[name] = traceback.format_exc()
        dist.destroy_process_group()
    ended = {
        name: _command(rank, directory / f"command{i}", arguments)
        for i, (name, arguments) in enumerate(commands.items())
    }
    (directory / f"rank{rank}").write_bytes(pickle.dumps((errors, ended)))


def _meeting(file: Path, rank: int) -> dict[str, Any]:
    # A file, as a port that is free now may be taken the next moment.
    timeout = datetime.timedelta(seconds=60)
    return {"init_method": f"file://{file}", "rank": rank, "world_size": 2, "timeout": timeout}


def _command(rank: int, file: Path, arguments: list[str]) -> Ended:
    """The command as torchrun calls it, but for where the processes meet."""
    meet = partial(dist.init_process_group, **_meeting(file, rank))
    told = {"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": "2"}
    with (
        mock.patch.dict(os.environ, told, TORCHELASTIC_RUN_ID="tests"),
        mock.patch.object(dist, "init_process_group", meet),
        contextlib.redirect_stdout(io.StringIO()) as out,
        file.with_suffix(f".{rank}").open("w+") as err,  # which the handler of faults asks for
        contextlib.redirect_stderr(err),
    ):
        try:
            status = main(arguments)
        except BaseException:
            status = 1
            traceback.print_exc()
        err.seek(0)
        return Ended(status, out.getvalue(), err.read())
