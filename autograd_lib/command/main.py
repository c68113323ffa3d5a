"""The command `autograd-lib`, or `python -m autograd_lib`: train, config, doctor, demo."""

from __future__ import annotations

import argparse
import os
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.errors import record

import autograd_lib
from autograd_lib.command.build import Run, build, pick_device, position
from autograd_lib.command.doctor import diagnose
from autograd_lib.command.picture import draw_training
from autograd_lib.config.reading import config_yaml, default_yaml, load_config
from autograd_lib.config.records import AutogradConfig
from autograd_lib.core.names import nearest
from autograd_lib.examples import AdvancedAutogradExamples, AutogradExamples
from autograd_lib.report.tables import text_table

_DESCRIPTION = "Train models by a configuration, and find out what works on this machine."
_EPILOG = """\
examples:
  {command} train digits_cnn
  {command} train digits_cnn --set optimizer.lr=3e-3 --directory runs/b
  torchrun --nproc-per-node 2 -m autograd_lib train digits_cnn
  {command} config > my.yaml

exit status: 0 all went well; 1 the run failed, or doctor found something essential broken; 2 the
request is wrong, and the message says what to change; 130 interrupted by Ctrl-C.
"""
_TRAIN = """\
Train a model as CONFIG says, on data that need no download. The run's directory gets:

  config.yaml     the whole configuration, defaults included
  last.pt         the state to go on from, after each epoch and when interrupted
  best.pt         the state with the least loss on the test data
  gradients.csv   what was recorded of the gradients
  training.png    loss and gradient norm

Ctrl-C ends the step, writes last.pt, and leaves; --resume goes on from there, with the same
result as without the interruption. Under torchrun, each process takes its share of each batch.
"""
_WRITTEN = ("config.yaml", "last.pt", "best.pt", "gradients.csv", "training.png")
# Key of a row of `fit` to its heading and its format; the metrics follow the test loss.
_COLUMNS = {
    "epoch": ("epoch", ".0f"),
    "step": ("  step", ".0f"),
    "loss": ("  loss", ".4f"),
    "validation_loss": ("test loss", ".4f"),
}
_MORE_COLUMNS = {
    "learning_rate": ("learning rate", ".2e"),
    "gradient_norm": ("gradient norm", ".3g"),
    "seconds": ("seconds", ".1f"),
}


class _RefusedError(Exception):
    """The request is wrong: its message is all there is to say."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those of the command line; None for those of the process.

    Returns:
        The exit status.
    """
    parsed = _parser().parse_args(arguments)
    run: Callable[[argparse.Namespace], int | None] = parsed.run
    if "TORCHELASTIC_RUN_ID" in os.environ:
        run = record(run)  # so that torchrun tells which process failed first, and of what
    try:
        return run(parsed) or 0
    except _RefusedError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return 2
    except FloatingPointError as error:  # its message is the report of the guard
        print(f"stopped: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # as of `... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _command() -> str:
    """How this process was started, for messages that say what to type."""
    installed = Path(sys.argv[0]).stem == "autograd-lib"
    return "autograd-lib" if installed else "python -m autograd_lib"


def _parser() -> argparse.ArgumentParser:
    raw, command = argparse.RawDescriptionHelpFormatter, _command()
    parser = argparse.ArgumentParser(
        prog=command,
        description=_DESCRIPTION,
        epilog=_EPILOG.format(command=command),
        formatter_class=raw,
    )
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    parser.add_argument(
        "--version",
        action="version",
        help="print the versions of the library, torch and Python",
        version=f"autograd-lib {autograd_lib.__version__} ({versions})",
    )
    names = ", ".join(_shipped())
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    text = "train a model as a configuration says"
    train = commands.add_parser("train", help=text, description=_TRAIN, formatter_class=raw)
    train.add_argument("config", metavar="CONFIG", help=f"a YAML file, or one of {names}")
    _add_overrides(train)
    train.add_argument(
        "--resume",
        nargs="?",
        const="",
        metavar="PATH",
        help="go on from a checkpoint; without PATH from last.pt in the directory of the run, "
        "or from the start if there is none yet. Stands after CONFIG",
    )
    train.add_argument(
        "--directory",
        metavar="DIR",
        help="where the run is kept (default: training.directory, or runs/NAME for NAME.yaml)",
    )
    train.set_defaults(run=_train)

    text = "print the default configuration with comments, or a given one completed"
    config = commands.add_parser("config", help=text, description=text.capitalize() + ".")
    config.add_argument(
        "config", metavar="CONFIG", nargs="?", help=f"a YAML file to complete, or one of {names}"
    )
    _add_overrides(config)
    config.set_defaults(run=_config)

    text = "say what is installed, and try what training may use"
    doctor = commands.add_parser("doctor", help=text, description=text.capitalize() + ".")
    doctor.add_argument("--compile", action="store_true", help="try torch.compile too, for a while")
    doctor.set_defaults(run=_doctor)

    text = "run the demonstrations, which take about a minute"
    demo = commands.add_parser("demo", help=text, description=text.capitalize() + ".")
    demo.set_defaults(run=_demo)
    return parser


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        metavar="a.b=VALUE",
        help="set one value, in YAML, as training.epochs=3; may be given several times",
    )


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn errors that are the user's to mend into a message."""
    try:
        yield
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        raise _RefusedError(
            f"{error.filename}: {error.strerror}" if named else str(error)
        ) from error
    except (ValueError, TypeError, ImportError) as error:
        raise _RefusedError(str(error)) from error


def _shipped() -> dict[str, Path]:
    """The configurations that come with the library, by name."""
    package = Path(__file__).parents[1]
    folder = package / "configs"  # where the wheel has them; a checkout has them beside the package
    if not folder.is_dir():
        folder = package.with_name("configs")
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def _found(given: str) -> Path:
    """The file that CONFIG stands for: a file before one that comes with the library."""
    path, shipped = Path(given), _shipped()
    if path.exists() and not path.is_dir():
        return path
    if given not in shipped:
        raise ValueError(
            f"CONFIG: expected a YAML file or one of {', '.join(shipped)}, got {given!r}, which "
            f"is neither{nearest(path.stem, shipped)}"
        )
    return shipped[given]


# config, doctor, demo


def _config(arguments: argparse.Namespace) -> None:
    with _refusing():
        if arguments.config is None and not arguments.overrides:
            text = default_yaml()
        else:
            source = _found(arguments.config) if arguments.config else dict[str, object]()
            text = config_yaml(load_config(source, arguments.overrides))
    print(text, end="")


def _doctor(arguments: argparse.Namespace) -> int:
    report, sound = diagnose(compile=arguments.compile)
    print(report)
    return 0 if sound else 1


def _demo(_: argparse.Namespace) -> None:
    AutogradExamples.demonstrate_autograd_system()
    AdvancedAutogradExamples.run_all_advanced_examples()


# train


def _train(arguments: argparse.Namespace) -> None:
    with _refusing():
        config, checkpoint = _plan(arguments)
    directory = Path(str(config.training.directory))
    with _process_group(config.training.device):
        with _refusing():
            run = build(config)
            if checkpoint is not None:
                run.system.load(checkpoint)
        rank, processes = position()
        if rank == 0:
            _begin(run, processes, checkpoint)
        try:
            _fit(run, rank)
        except (KeyboardInterrupt, SystemExit):
            if rank == 0:
                _tell_how_to_resume(arguments, run, directory)
            raise
        results = run.system.evaluate(run.test)
        if rank == 0:
            _finish(run, directory, results)


def _plan(arguments: argparse.Namespace) -> tuple[AutogradConfig, Path | None]:
    """The configuration, with the directory in it, and the checkpoint to go on from."""
    config = load_config(_found(arguments.config), arguments.overrides)
    stem = Path(arguments.config).stem
    directory = Path(arguments.directory or config.training.directory or Path("runs") / stem)
    config = replace(config, training=replace(config.training, directory=str(directory)))
    last = directory / "last.pt"
    if arguments.resume:
        checkpoint = Path(arguments.resume)
        if not checkpoint.exists():
            raise ValueError(
                f"--resume: expected a checkpoint, {checkpoint} does not exist; without a path it "
                f"is {last}"
            )
        if last.exists() and checkpoint.resolve().parent != directory.resolve():
            raise ValueError(
                f"{directory} holds another run than {checkpoint}; add --directory DIR for a new "
                "place to go on in"
            )
        _check_same(config, checkpoint.with_name("config.yaml"))
        return config, checkpoint
    if last.exists() and arguments.resume is None:
        raise ValueError(
            f"{directory} holds a run already; add --resume to go on with it, or --directory DIR "
            "to begin another elsewhere"
        )
    if not last.exists():
        return config, None
    _check_same(config, last.with_name("config.yaml"))
    return config, last


def _check_same(config: AutogradConfig, recorded: Path) -> None:
    """Refuse what a run that goes on would not heed: it has its optimizer and its data already."""
    if not recorded.exists():
        return
    before = load_config(recorded)
    fixed = {"training.seed": (before.training.seed, config.training.seed)}
    for section in ("data", "model", "optimizer"):
        old, new = (asdict(getattr(c, section)) for c in (before, config))
        fixed |= {f"{section}.{key}": (old[key], new[key]) for key in old}
    del fixed["data.workers"]
    for key, (was, now) in fixed.items():
        if was != now:
            raise ValueError(
                f"{key}: a run that goes on keeps what it began with, {was!r}, got {now!r}; leave "
                "it as it was, or begin another run with --directory DIR"
            )


@contextmanager
def _process_group(device_name: str) -> Iterator[None]:
    """Join the other processes, if torchrun started this one."""
    if "RANK" not in os.environ:
        yield
        return
    with _refusing():
        if ":" in device_name and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) > 1:
            raise ValueError(
                f"training.device: expected a kind of device for several processes, got "
                f"{device_name!r}, one for all; each takes its own of 'auto' or "
                f"{device_name.partition(':')[0]!r}"
            )
        device = pick_device(device_name)
    distributed = torch.distributed
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group(distributed.get_default_backend_for_device(device.type))
    try:
        yield
        # Without it one may be gone while another still talks to it, which aborts now and then.
        distributed.barrier()
    except (_RefusedError, KeyboardInterrupt, SystemExit):
        distributed.destroy_process_group()
        raise
    # After any other error the peers may wait for this process: it leaves, and torchrun ends them.
    distributed.destroy_process_group()


def _begin(run: Run, processes: int, checkpoint: Path | None) -> None:
    """Say what will be trained, and keep the whole configuration with it."""
    config, system = run.config, run.system
    parameters = list(system.module.parameters())
    steps, batch = len(run.train), config.data.batch_size
    said = {
        "model": f"{type(system.module).__name__}, {sum(p.numel() for p in parameters):,} "
        f"parameters in {len(parameters)} tensors",
        "data": f"{config.data.name}, {len(run.task.train):,} samples to learn from and "  # type: ignore[arg-type]
        f"{len(run.task.test):,} to judge by",  # type: ignore[arg-type]
        "training": f"{_counted(config.training.epochs, 'epoch')} of {_counted(steps, 'step')}, "
        f"batches of {batch}",
        "optimizer": f"{config.optimizer.name}, learning rate {config.optimizer.lr:g} "
        f"({config.optimizer.schedule})",
        "settings": str(system.settings),
        "device": _where(run.device, processes, config.distributed.strategy),
        "directory": str(config.training.directory),
    }
    if checkpoint is not None:
        said["going on from"] = f"{checkpoint}, epoch {system.epoch}, step {system.step}"
    for name, text in said.items():
        print(f"{name + ':':<15}{text}")
    print(flush=True)
    directory = Path(str(config.training.directory))
    with _refusing():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(config_yaml(config), encoding="utf-8")


def _where(device: torch.device, processes: int, strategy: str) -> str:
    threads = f", {_counted(torch.get_num_threads(), 'thread')}" if device.type == "cpu" else ""
    if processes == 1:
        return f"{device}{threads}"
    return f"{device.type}, {processes} processes ({strategy}){threads and threads + ' each'}"


def _counted(number: int, thing: str) -> str:
    return f"{number} {thing}{'s' * (number != 1)}"


def _fit(run: Run, rank: int) -> None:
    if not run.config.autograd_system.enable_gradients:
        if rank == 0:
            print("autograd_system.enable_gradients is false: evaluation only.")
        return
    metrics = {f"validation_{name}": (name, ".4f") for name in run.task.metrics}
    columns = {**_COLUMNS, **metrics, **_MORE_COLUMNS}

    def show(row: dict[str, float]) -> None:
        cells = [
            (format(row[key], form) if key in row else "-").rjust(len(heading))
            for key, (heading, form) in columns.items()
        ]
        if sys.stderr.isatty():  # where the progress within the epoch stands
            blank = " " * (shutil.get_terminal_size().columns - 1)
            print(f"\r{blank}\r", end="", file=sys.stderr, flush=True)
        print("  ".join(cells), flush=True)

    if rank == 0:
        print("  ".join(heading for heading, _ in columns.values()), flush=True)
    run.system.fit(
        run.train, run.config.training.epochs, run.test, on_epoch=show if rank == 0 else None
    )


def _finish(run: Run, directory: Path, results: dict[str, float]) -> None:
    """Print the results and what was written, and draw the picture."""
    system = run.system
    test = len(run.task.test)  # type: ignore[arg-type]
    title = f"Test, {test:,} samples, after epoch {system.epoch}, step {system.step}"
    rows = [(name, f"{value:.4f}") for name, value in results.items()]
    print(f"\n{text_table(title, ('metric', 'value'), rows)}")
    if system.reports:
        print(f"{len(system.reports)} steps were skipped, the last one for:\n{system.reports[-1]}")
    try:
        if system.history:
            draw_training(system, directory / "training.png")
    except ImportError as error:
        print(f"No picture: {error}")
    print("\nwritten:")
    for path in (directory / name for name in _WRITTEN):
        if path.exists():
            print(f"  {path}")


def _tell_how_to_resume(arguments: argparse.Namespace, run: Run, directory: Path) -> None:
    if not (directory / "last.pt").exists():
        print("\nInterrupted before there was a checkpoint.", file=sys.stderr)
        return
    words = ["train", arguments.config]
    words += [word for override in arguments.overrides for word in ("--set", override)]
    words += ["--directory", str(directory), "--resume"]
    again = f"{_command()} {shlex.join(words)}"
    print(f"\nInterrupted after step {run.system.step}. To go on:\n  {again}", file=sys.stderr)
