"""Data, models and optimizers that a configuration names: functions of one's own."""

from __future__ import annotations

import itertools
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from autograd_lib.command.build import Run, build
from autograd_lib.command.main import main
from autograd_lib.config import AutogradConfig, load_config

MODULE = """\
import json
import torch
from autograd_lib import Task

def squares(number, scale=1.0):
    x = scale * torch.randn(number, 1)
    samples = list(zip(x, x.square()))
    return Task(samples[4:], samples[:4], {"width": 5}, torch.nn.MSELoss(), {})

def net(width, depth=1, **more):
    net.more = more
    return torch.nn.Sequential(torch.nn.Linear(1, width), torch.nn.Linear(width, depth))

class Inner:
    class Net(torch.nn.Linear):
        def __init__(self, width):
            super().__init__(1, 1)

def fixed():
    return torch.nn.Linear(1, 1)

def nothing(number):
    return 3

def empty(width):
    return {}

def broken(number):
    return json.loads("x")
"""
COUNTER = itertools.count()


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module in the current directory, of a name that was not imported before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    name = f"mine_{next(COUNTER)}"
    Path(f"{name}.py").write_text(MODULE)
    return name


def config_of(module: str, data: Any = None, model: Any = None, **sections: Any) -> AutogradConfig:
    data = {"name": f"{module}:squares", "options": {"number": 20}, "batch_size": 4, **(data or {})}
    model = {"name": f"{module}:net", **(model or {})}
    training = {"device": "cpu", "epochs": 1}
    return load_config({"data": data, "model": model, "training": training, **sections})


def test_functions_of_the_current_directory(module: str):
    model = {"options": {"depth": 1, "extra": [1, 2]}}
    runs = [build(config_of(module, model=model)) for _ in range(2)]
    run = runs[0]
    assert run.system.module[0].weight.shape == (5, 1)
    assert sys.modules[module].net.more == {"extra": (1, 2)}
    assert (len(run.task.train), len(run.task.test)) == (16, 4)
    for (x, y), (same, _) in zip(*(run.task.train for run in runs), strict=True):
        assert torch.equal(x, same)  # drawn by the seed
        assert torch.equal(y, x.square())
    (row,) = run.system.fit(run.train, 1, run.test)
    assert row["validation_loss"] > 0
    assert isinstance(run.system.loss_fn, torch.nn.MSELoss)


def test_a_class_within_a_class_of_a_package(module: str, tmp_path: Path):
    package = tmp_path / f"{module}_package"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "inner.py").write_text(MODULE)
    name = f"{package.name}.inner:Inner.Net"
    assert type(build(config_of(module, model={"name": name})).system.module).__name__ == "Net"


@pytest.mark.parametrize(
    ("data", "model", "error", "message"),
    [
        ({"name": "no_such:f"}, {}, ValueError, r"^data\.name: no module 'no_such' in .*; for a "
         r"function in .*FILE\.py write `name: FILE:function`$"),
        ({"name": "{m}.deeper:f"}, {}, ValueError, r"^data\.name: no module '.*\.deeper' in "),
        ({"name": "{m}:square"}, {}, ValueError, r"^data\.name: <.*\.py'> has no 'square'; did you "
         r"mean 'squares'\?$"),
        ({"options": {"numbr": 3}}, {}, ValueError, r"^data\.options\.numbr: .* number, scale; did "
         r"you mean 'number'\?$"),
        ({"options": {}}, {}, ValueError, r"^data\.options: missing a required argument: 'number'"),
        ({"name": "{m}:nothing"}, {}, TypeError, r"^data\.name: expected .*:nothing to return a "
         r"Task, got int; write `return autograd_lib\.Task\(train, test\)`$"),
        ({"name": "{m}:broken"}, {}, ValueError, r"^data: .*:broken failed: "
         r"JSONDecodeError: Expecting value.* \(.*mine_\d+\.py, line 29\)$"),
        ({}, {"name": "{m}:fixed"}, ValueError, r"^model\.name: '.*:fixed' does not fit data\.name "
         r"'.*:squares'; what fits .* and on these data a function that takes width$"),
        ({}, {"name": "cnn"}, ValueError, r"^model\.name: 'cnn' does not fit data\.name "),
        ({}, {"name": "{m}:net", "options": {"width": 3}}, ValueError, "width"),
        ({}, {"name": "{m}:empty"}, TypeError, r"^model\.name: expected .*:empty to return an "
         r"nn\.Module, got dict$"),
        ({}, {"name": "math:pi"}, TypeError, r"^model\.name: expected math:pi to be a function, "
         r"got 3\.14"),
    ],
)  # fmt: skip
def test_what_is_wrong_says_what_to_write(
    module: str, data: dict[str, Any], model: dict[str, Any], error: type[Exception], message: str
):
    data, model = (
        {**part, **({"name": part["name"].format(m=module)} if "name" in part else {})}
        for part in (data, model)
    )
    with pytest.raises(error, match=message):
        build(config_of(module, data, model))


def test_an_error_of_ones_own_function_keeps_its_cause(module: str):
    with pytest.raises(ValueError, match="failed") as raised:
        build(config_of(module, {"name": f"{module}:broken"}))
    assert isinstance(raised.value.__cause__, json.JSONDecodeError)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_package", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("\nprint(undefined)", "NameError: name 'undefined' is not defined"),
        ("def f(:", "SyntaxError: "),
    ],
)
def test_a_module_that_cannot_be_imported_is_named(module: str, text: str, said: str):
    name = f"{module}_{next(COUNTER)}"
    Path(f"{name}.py").write_text(text)
    with pytest.raises(ValueError, match=rf"^data\.name: importing {name} failed: {said}"):
        build(config_of(module, {"name": f"{name}:load"}))


def test_the_command_says_in_a_sentence_what_failed(
    module: str, capsys: pytest.CaptureFixture[str]
):
    Path("run.yaml").write_text(f"data: {{name: {module}:broken, options: {{number: 20}}}}\n")
    assert main(["train", "run.yaml"]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: data: {module}:broken failed: JSONDecodeError: Expecting")
    assert error.count("\n") == 1


def trained(config: AutogradConfig) -> Run:
    run = build(config)
    run.system.fit(run.train, 1)
    return run


@pytest.mark.parametrize(
    "name",
    sorted(
        name
        for name, kind in vars(torch.optim).items()
        if isinstance(kind, type)
        and issubclass(kind, torch.optim.Optimizer)
        and name != "Optimizer"
    ),
)
def test_every_optimizer_of_pytorch_has_a_name(module: str, name: str):
    """Those that a step cannot use say so: a closure, matrices only, sparse gradients only."""
    refusals = {
        "LBFGS": "LBFGS calls the step itself",
        "Muon": "only supports 2D",
        "SparseAdam": "SparseAdam does not support dense gradients",
    }
    config = config_of(module, optimizer={"name": name, "lr": 1e-3})
    assert config == config_of(module, optimizer={"name": name.lower(), "lr": 1e-3})
    if name in refusals:
        with pytest.raises((TypeError, ValueError, RuntimeError), match=refusals[name]):
            trained(config)
        return
    assert type(trained(config).system.optimizer) is getattr(torch.optim, name)


def test_weight_decay_where_there_is_none(module: str):
    with pytest.raises(ValueError, match=r"^optimizer\.options: .*argument 'weight_decay'"):
        build(config_of(module, optimizer={"name": "rprop", "weight_decay": 0.1}))


def test_the_command_trains_it_and_goes_on(module: str, capsys: pytest.CaptureFixture[str]):
    Path("run.yaml").write_text(
        f"data:\n  name: {module}:squares\n  batch_size: 4\n  options: {{number: 20}}\n"
        f"model: {{name: {module}:net}}\noptimizer: {{name: RMSprop}}\n"
        "training: {epochs: 1, device: cpu}\n"
    )
    assert main(["train", "run.yaml"]) == 0
    assert main(["train", "run.yaml", "--resume", "--set", "training.epochs=2"]) == 0
    output = capsys.readouterr().out
    assert re.search(rf"^data: {module}:squares, 16 samples to learn from", output, re.M)
    assert "going on from epoch 1, step 4" in output
    written = load_config("runs/run/config.yaml")
    assert (written.data.name, written.optimizer.name) == (f"{module}:squares", "rmsprop")
    assert main(["train", "run.yaml", "--set", "data.name=digit", "--directory", "b"]) == 2
    assert "`name: package.module:function`, got 'digit'" in capsys.readouterr().err


# --- the files that README shows

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
FILES = dict(
    re.findall(
        r"```(?:python|yaml)\n# ((?:make_)?(?:table|arrays|text)\.\w+)[^\n]*\n(.*?)```",
        README,
        re.S,
    )
)


def test_the_readme_shows_a_table_a_folder_and_a_text() -> None:
    kinds = itertools.product(("", "make_"), ("table", "arrays", "text"), (".py", ".yaml"))
    wanted = {"".join(kind) for kind in kinds if kind[::2] != ("make_", ".yaml")}
    assert set(FILES) == wanted


@pytest.mark.parametrize(
    ("name", "metric", "wanted"),
    [("table", "loss", 0.1), ("arrays", "accuracy", 0.95), ("text", "accuracy", 0.9)],
)
def test_the_files_of_the_readme_train(
    name: str,
    metric: str,
    wanted: float,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """On data of which much can be learned: a line, two brightnesses, a repeated sentence."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    for suffix in ("py", "yaml"):
        Path(f"{name}.{suffix}").write_text(FILES[f"{name}.{suffix}"], encoding="utf-8")
    exec(FILES[f"make_{name}.py"], {})
    assert main(["train", f"{name}.yaml", "--set", "training.device=cpu"]) == 0
    found = re.search(rf"^{metric} +([\d.]+)$", capsys.readouterr().out, re.M)
    assert (float(found[1]) < wanted) == (metric == "loss"), found
    sys.modules.pop(name)
