"""The command `autograd-lib`, called as a function and as a process."""

from __future__ import annotations

import csv
import importlib
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from environments import PROJECT, run_with

import autograd_lib
from autograd_lib.command import doctor as _doctor
from autograd_lib.command.main import main
from autograd_lib.config import AutogradConfig, load_config

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))
# A model that takes a moment, where what is trained is beside the point.
TINY = """\
model: {options: {channels: [8, 8]}}
data: {batch_size: 128}
training: {epochs: 2, device: cpu}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    return path


def weights(path: Path) -> list[torch.Tensor]:
    """The tensors of a checkpoint's model, however it is laid out."""
    state = torch.load(path, weights_only=True)
    return [value for value in state["model"].values() if isinstance(value, torch.Tensor)]


def environment() -> dict[str, str]:
    """Sums over as many threads as in this process, as their order decides the last digits."""
    threads = str(torch.get_num_threads())
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": threads}


def as_process(
    *arguments: str | Path, launcher: Sequence[str] = ("-m",), **options: object
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *launcher, "autograd_lib", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=300,
        **options,
    )


def rows_of(output: str) -> list[list[float]]:
    """The lines that hold numbers only, one for each epoch."""
    found = []
    for line in output.splitlines():
        try:
            found.append([float(word) for word in line.split()])
        except ValueError:
            continue
    return [row for row in found if len(row) > 3]


# train


def test_training_prints_what_it_does_and_writes_what_it_says(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--set", "training.epochs=3"]) == 0
    output = capsys.readouterr().out
    parameters = 8 * 9 + 4 * 8 + 2 * 8 * 8 * 9 + 2 * 8 + 10 * 8 + 10
    assert f"CustomCNNModel, {parameters:,} parameters" in output
    assert "1,437 samples to learn from and 360 to judge by" in output
    assert "3 epochs of 11 steps, batches of 128" in output
    rows = rows_of(output)
    assert [row[:2] for row in rows] == [[1, 11], [2, 22], [3, 33]]
    assert rows[-1][2] < rows[0][2]  # the loss
    assert re.search(r"Test, 360 samples, after epoch 3, step 33\nmetric +value", output)
    header = next(line for line in output.splitlines() if line.lstrip().startswith("epoch"))
    names = re.split(r"  +", header.strip())
    assert names[:3] == ["epoch", "step", "loss"]
    accuracy = float(re.search(r"accuracy +(0\.\d+)$", output, re.M)[1])
    assert dict(zip(names, rows[-1], strict=True))["test accuracy"] == pytest.approx(accuracy, 1e-3)
    directory = Path("runs/tiny")
    names = {"config.yaml", "last.pt", "best.pt", "gradients.csv", "gradients.png"}
    assert {path.name for path in directory.iterdir()} == names
    assert f"written to {directory}: {', '.join(sorted(names))}\n" in output
    assert (directory / "gradients.png").read_bytes().startswith(b"\x89PNG")
    with (directory / "gradients.csv").open() as file:
        assert {row["step"] for row in csv.DictReader(file)} == {str(n) for n in range(1, 34)}
    kept = load_config(directory / "config.yaml")
    assert (kept.training.epochs, kept.training.directory) == (3, str(directory))


def test_the_directory_is_that_of_the_option_before_that_of_the_file(config: Path) -> None:
    config.write_text(TINY.replace("epochs: 2", "epochs: 1, directory: named"))
    assert main(["train", str(config)]) == 0
    assert main(["train", str(config), "--directory", "given"]) == 0
    assert Path("named/last.pt").exists()
    assert Path("given/last.pt").exists()
    assert not Path("runs").exists()


def test_a_run_is_not_overwritten_unasked(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config)]) == 0
    before = {path: path.read_bytes() for path in Path("runs/tiny").iterdir()}
    capsys.readouterr()
    assert main(["train", str(config)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: runs/tiny holds a run already; add --resume")
    assert "--directory" in captured.err
    assert {path: path.read_bytes() for path in Path("runs/tiny").iterdir()} == before


def test_resuming_gives_what_training_at_once_gives(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", str(config), "--directory", "once"]) == 0
    short = ["train", str(config), "--directory", "twice", "--resume"]
    assert main([*short, "--set", "training.epochs=1"]) == 0  # there is nothing to go on from yet
    capsys.readouterr()
    assert main(short) == 0
    output = capsys.readouterr().out
    assert re.search(r"going on from epoch 1, step 11\n", output)
    assert [row[:2] for row in rows_of(output)] == [[2, 22]]
    for one, two in zip(weights(Path("once/last.pt")), weights(Path("twice/last.pt")), strict=True):
        assert torch.equal(one, two)
    assert main([*short, "--set", "training.epochs=3"]) == 0
    assert [row[0] for row in rows_of(capsys.readouterr().out)] == [3]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lr=1e-6", r"error: optimizer\.lr: .* keeps what it began with, .* got 1e-06"),
        ("training.seed=7", r"error: training\.seed: .* keeps what it began with, 0, got 7"),
        ("data.batch_size=32", r"error: data\.batch_size: .* keeps what it began with"),
    ],
)
def test_what_a_run_that_goes_on_would_not_heed(
    config: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    assert main(["train", str(config), "--directory", "run"]) == 0
    before = {path: path.read_bytes() for path in Path("run").iterdir()}
    assert main(["train", str(config), "--directory", "run", "--resume", "--set", override]) == 2
    assert re.match(message, capsys.readouterr().err)
    assert {path: path.read_bytes() for path in Path("run").iterdir()} == before


def test_evaluation_only_trains_nothing(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(config)]) == 0
    before = Path("runs/tiny/last.pt").read_bytes()
    accuracy = re.findall(r"accuracy +(\d\S+)$", capsys.readouterr().out, re.M)
    off = ["--set", "autograd_system.enable_gradients=false"]
    assert main(["train", str(config), "--resume", *off]) == 0
    output = capsys.readouterr().out
    assert "evaluation only" in output
    assert re.findall(r"accuracy +(\d\S+)$", output, re.M) == accuracy
    assert Path("runs/tiny/last.pt").read_bytes() == before


def test_without_a_monitor_there_is_no_picture(config: Path) -> None:
    off = ["--set", "autograd_system.gradient_monitoring.enabled=false"]
    assert main(["train", str(config), *off]) == 0
    names = {"config.yaml", "last.pt", "best.pt"}
    assert {path.name for path in Path("runs/tiny").iterdir()} == names


def test_too_many_nonfinite_steps_end_the_run_with_the_report(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    explode = ["--set", "optimizer.name=sgd", "--set", "optimizer.lr=1e30"]
    with pytest.warns(UserWarning, match="skipped"):
        assert main(["train", str(config), *explode]) == 1
    assert capsys.readouterr().err.startswith("stopped: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.yaml"], r"error: .*missing\.yaml.*"),
        (["xyz"], r"error: CONFIG: .* digits_cnn, rows_rnn, .* got 'xyz', which is neither$"),
        (["digit_cnn"], r"error: CONFIG: .* got 'digit_cnn', .* did you mean 'digits_cnn'\?$"),
        (["configs/source_transformer.yml"], r"error: CONFIG: .* mean 'source_transformer'\?$"),
        (["."], r"error: CONFIG: .* got '\.', which is neither$"),
        (["tiny.yaml", "--set", "training.epoch=3"], r"error: .*did you mean 'epochs'\?"),
        (["tiny.yaml", "--set", "training.epochs"], r"error: .*training\.epochs.*"),
        (["tiny.yaml", "--set", "data.name=source"], r"error: model\.name: 'cnn' does not fit"),
        (["tiny.yaml", "--set", "data.options.x=1"], r"error: data\.options\.x: .* are none"),
        (["tiny.yaml", "--set", "model.options.chanels=[8]"], r"error: .*mean 'channels'\?"),
        (["tiny.yaml", "--directory", "tiny.yaml/x"], r"error: .*irectory: 'tiny\.yaml/x'"),
    ],
)  # fmt: skip
def test_what_is_the_user_s_to_mend_is_one_message(
    config: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(["train", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.match(message, error)
    assert "Traceback" not in error


@pytest.mark.parametrize("arguments", [[], ["trian"], ["train"], ["train", "a", "b"]])
def test_a_wrong_command_line_exits_with_2(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(arguments)
    assert exit_info.value.code == 2
    assert "usage: autograd-lib" in capsys.readouterr().err


@pytest.mark.parametrize("command", [[], ["train"], ["config"], ["doctor"]])
def test_help_explains_every_argument(
    command: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main([*command, "--help"])
    assert exit_info.value.code == 0
    output = capsys.readouterr().out
    expected = {"train": ("--set", "--resume", "--directory", "last.pt"), "config": ("--set",)}
    expected["doctor"] = ("--compile",)
    for word in expected.get("".join(command), ()):
        assert word in output
    if command in (["train"], ["config"]):
        assert all(path.stem in output for path in CONFIGS)
    if not command:
        assert all(word in output for word in ("train", "config", "doctor", "torchrun"))


@pytest.mark.skipif(os.name != "posix", reason="sends SIGINT")
def test_ctrl_c_says_how_to_go_on_and_going_on_gives_the_same(config: Path) -> None:
    many = ["-m", "autograd_lib", "train", str(config), "--directory", "twice"]
    with subprocess.Popen(
        [sys.executable, *many, "--set", "training.epochs=10000"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as process:
        while not (line := process.stdout.readline()).lstrip().startswith("1 "):
            assert line, process.stderr.read()
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        error = process.communicate(timeout=100)[1]
    assert process.returncode == 130
    assert "Traceback" not in error
    found = re.search(r"Interrupted after step (\d+); --resume goes on\.$", error, re.M)
    assert found, error
    epochs = ["--set", f"training.epochs={-(-int(found[1]) // 11) + 1}"]
    # The schedule is constant, so that the number of epochs changes nothing before their end.
    assert main([*many[2:], "--resume", *epochs]) == 0
    assert main(["train", str(config), "--directory", "once", *epochs]) == 0
    for one, two in zip(weights(Path("once/last.pt")), weights(Path("twice/last.pt")), strict=True):
        assert torch.equal(one, two)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="needs torch.distributed")
def test_two_processes_write_once_and_get_what_one_gets(config: Path) -> None:
    assert main(["train", str(config), "--directory", "one"]) == 0
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    run = as_process("train", config, "--directory", "two", launcher=torchrun)
    assert run.returncode == 0, run.stderr
    assert "2 processes (ddp)" in run.stdout
    assert [row[:2] for row in rows_of(run.stdout)] == [[1, 11], [2, 22]]  # of one process
    for one, two in zip(weights(Path("one/last.pt")), weights(Path("two/last.pt")), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-4)


# config


def test_the_default_file_loads_as_the_defaults(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config"]) == 0
    output = capsys.readouterr().out
    path = tmp_path / "default.yaml"
    path.write_text(output)
    assert load_config(path) == AutogradConfig()
    assert sum("#" in line for line in output.splitlines()) > 30  # each key is explained


def test_a_given_file_is_completed(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", str(config), "--set", "optimizer.lr=0.5"]) == 0
    path = tmp_path / "completed.yaml"
    path.write_text(capsys.readouterr().out)
    assert "max_nonfinite" in path.read_text()
    assert load_config(path) == load_config(config, ["optimizer.lr=0.5"])
    assert main(["config", "--set", "optimizer.lr=fast"]) == 2
    assert "optimizer.lr" in capsys.readouterr().err


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_each_configuration_trains(path: Path, config: Path) -> None:
    """For a few steps; what it reaches is said in it, and measured by running it."""
    few = ["training.epochs=1", "training.device=cpu", "data.batch_size=4"]
    if load_config(path).data.name == "source":
        few += [f"data.options.{o}" for o in ("windows=12", "test_windows=4", "length=16")]
    else:
        few[-1] = "data.batch_size=700"
    overrides = [word for override in few for word in ("--set", override)]
    assert main(["train", str(path), *overrides]) == 0
    assert Path(f"runs/{path.stem}/best.pt").exists()


def test_a_configuration_of_the_library_trains_by_name(
    config: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    little = ["--set", "training.epochs=1", "--set", "data.batch_size=700"]
    assert main(["train", "digits_cnn", "--set", "training.device=cpu", *little]) == 0
    assert Path("runs/digits_cnn/best.pt").exists()
    capsys.readouterr()
    assert main(["config", "digits_cnn"]) == 0
    assert "channels: [32, 32, 64, 64]" in capsys.readouterr().out
    # A file of that name comes first.
    Path("digits_cnn").write_text(TINY)
    assert main(["config", "digits_cnn"]) == 0
    assert "channels: [8, 8]" in capsys.readouterr().out


def test_there_is_a_configuration_for_each_data_set() -> None:
    assert {load_config(path).data.name for path in CONFIGS} == {"digits", "rows", "source"}


# doctor, demo


def test_the_doctor_tries_everything(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def compiled(function: object) -> None:
        raise RuntimeError("no compiler\nand more")

    monkeypatch.setattr(torch, "compile", compiled)  # the true one takes long
    assert main(["doctor"]) == 0
    assert "torch.compile" not in capsys.readouterr().out
    assert main(["doctor", "--compile"]) == 0  # a compiler is not essential
    output = capsys.readouterr().out
    for package in (
        "os",
        "accelerators",
        "python",
        "cpu",
        "device",
        "torch",
        "numpy",
        "matplotlib",
        "pydantic",
        "jax",
    ):
        assert re.search(rf"^{package} +\S", output, re.M)
    assert re.search(rf"^torch +{re.escape(torch.__version__)}$", output, re.M)
    for name in ("autograd", "gloo, one process"):
        assert re.search(rf"^{name} +works +\d+\.\d s$", output, re.M)
    assert "fails: RuntimeError: no compiler" in output
    assert "and more" not in output
    assert not torch.distributed.is_initialized()


def test_the_doctor_fails_where_something_essential_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_doctor, "_cube", torch.square)
    assert main(["doctor"]) == 1
    output = capsys.readouterr().out
    assert re.search(r"^autograd +fails: AssertionError: Scalars are not close", output, re.M)


def test_the_doctor_says_how_to_install_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_doctor, "_OPTIONAL", ("no-such-package",))
    rows = dict(_doctor._versions())
    assert rows["no-such-package"] == "missing; pip install no-such-package"


def test_the_command_is_installed() -> None:
    module, _, name = PROJECT["scripts"]["autograd-lib"].partition(":")
    assert getattr(importlib.import_module(module), name) is main


def test_the_versions(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    library, python = autograd_lib.__version__, platform.python_version()
    expected = f"autograd-lib {library} (torch {torch.__version__}, Python {python})\n"
    assert capsys.readouterr().out == expected


@pytest.mark.parametrize(
    "arguments", [["config"], ["config", "digits_cnn"], ["train", "digits_cnn"]]
)
def test_without_the_extra_there_is_one_line(arguments: list[str], tmp_path: Path) -> None:
    call = "import sys; from autograd_lib.command.main import main; sys.exit(main())"
    run = run_with((None, call), arguments=arguments, cwd=tmp_path)
    assert (run.returncode, run.stdout) == (2, "")
    said = "error: load_config needs pydantic and ruamel.yaml: pip install pydantic ruamel.yaml\n"
    assert run.stderr == said


def test_the_command_runs_as_a_module(config: Path) -> None:
    run = as_process("config")
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout.startswith("#")
