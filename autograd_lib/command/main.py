"""The command `autograd-lib`, or `python -m autograd_lib`: train, config, doctor."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import distributed
from torch.distributed.elastic.multiprocessing.errors import record

import autograd_lib
from autograd_lib.command.build import Run, build, pick_device
from autograd_lib.command.doctor import diagnose
from autograd_lib.config.reading import config_yaml, load_config
from autograd_lib.config.records import AutogradConfig
from autograd_lib.core.names import nearest
from autograd_lib.monitor.figures import plot_gradient_heatmap
from autograd_lib.report.tables import text_table


class _RefusedError(Exception):
    """The request is wrong; the message says what to change."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: Those of the command line; None for those of the process.

    Returns:
        The exit status: 0 all went well; 1 the run failed, or autograd does not work here; 2 the
        request is wrong, and the message says what to change; 130 interrupted by Ctrl-C.
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


def _parser() -> argparse.ArgumentParser:
    names = ", ".join(_shipped())
    parser = argparse.ArgumentParser(
        prog="autograd-lib",
        description="Train models by a configuration, and find out what works on this machine.",
        epilog="examples:\n  autograd-lib train digits_cnn --set optimizer.lr=3e-3\n"
        "  torchrun --nproc-per-node 2 -m autograd_lib train digits_cnn",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--version",
        action="version",
        version=f"autograd-lib {autograd_lib.__version__} (torch {torch.__version__}, "
        f"Python {platform.python_version()})",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(run: Callable[..., int | None], text: str) -> Callable[..., object]:
        name = run.__name__.strip("_")
        sub = commands.add_parser(name, help=text, description=f"{text.capitalize()}.")
        sub.set_defaults(run=run)
        return sub.add_argument

    text = "set one value, in YAML, as training.epochs=3; may be given several times"
    override = {"dest": "overrides", "action": "append", "default": [], "help": text}
    argument = add(_train, "train a model as a configuration says, on data that need no download")
    argument("config", metavar="CONFIG", help=f"a YAML file, or one of {names}")
    argument("--set", metavar="a.b=VALUE", **override)
    argument(
        "--resume",
        action="store_true",
        help="go on from last.pt in the directory of the run, with the same result as without "
        "the interruption; from the start if there is none yet",
    )
    argument(
        "--directory",
        metavar="DIR",
        help="where the run is kept (default: training.directory, or runs/NAME for NAME.yaml)",
    )
    argument = add(
        _config, "print a configuration, by default of all defaults, with every key explained"
    )
    argument("config", metavar="CONFIG", nargs="?", help=f"a YAML file, or one of {names}")
    argument("--set", metavar="a.b=VALUE", **override)
    argument = add(_doctor, "say what is installed, and try what training may use")
    argument("--compile", action="store_true", help="try torch.compile too, for a while")
    return parser


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn errors that the user can fix into a message."""
    try:
        yield
    except (OSError, ValueError, TypeError, ImportError) as error:
        raise _RefusedError(str(error)) from error


def _shipped() -> dict[str, Path]:
    """The configurations that come with the library, by name."""
    package = Path(__file__).parents[1]
    # The wheel has them in the package, a checkout has them beside it.
    folders = package / "configs", package.with_name("configs")
    return {path.stem: path for folder in folders for path in sorted(folder.glob("*.yaml"))}


def _found(given: str) -> Path:
    """The file that CONFIG stands for: a file before one that comes with the library."""
    path, shipped = Path(given), _shipped()
    if path.is_file():
        return path
    if given not in shipped:
        raise ValueError(
            f"CONFIG: expected a YAML file or one of {', '.join(shipped)}, got {given!r}, which "
            f"is neither{nearest(path.stem, shipped)}"
        )
    return shipped[given]


# config, doctor


def _config(arguments: argparse.Namespace) -> None:
    with _refusing():
        source = _found(arguments.config) if arguments.config else dict[str, object]()
        text = config_yaml(load_config(source, arguments.overrides), comments=True)
    print(text, end="")


def _doctor(arguments: argparse.Namespace) -> int:
    report, sound = diagnose(compile=arguments.compile)
    print(report)
    return 0 if sound else 1


# train


def _train(arguments: argparse.Namespace) -> None:
    with _refusing():
        config, directory = _plan(arguments)
    last = directory / "last.pt"
    with _process_group(config.training.device):
        with _refusing():
            run = build(config)
            if last.exists():
                run.system.load(last)
        first = run.system.peers.rank == 0
        if first:
            _begin(run, directory)
        try:
            _fit(run)
        except (KeyboardInterrupt, SystemExit):
            if first:
                step = run.system.step
                print(f"\nInterrupted after step {step}; --resume goes on.", file=sys.stderr)
            raise
        results = run.system.evaluate(run.test)
        if first:
            _finish(run, directory, results)


def _plan(arguments: argparse.Namespace) -> tuple[AutogradConfig, Path]:
    """The configuration, and its directory, in which there may be a run to go on with."""
    config = load_config(_found(arguments.config), arguments.overrides)
    default = Path("runs", Path(arguments.config).stem)
    directory = Path(arguments.directory or config.training.directory or default)
    config = replace(config, training=replace(config.training, directory=str(directory)))
    if (directory / "last.pt").exists():
        if not arguments.resume:
            raise ValueError(
                f"{directory} holds a run already; add --resume to go on with it, or --directory "
                "DIR to begin another elsewhere"
            )
        _check_same(config, load_config(directory / "config.yaml"))
    return config, directory


def _check_same(config: AutogradConfig, recorded: AutogradConfig) -> None:
    """Refuse changes that a resumed run would ignore: its optimizer and its data are given."""
    before, now = asdict(recorded), asdict(config)
    keys = [(section, key) for section in ("data", "model", "optimizer") for key in now[section]]
    for section, key in [*keys, ("training", "seed")]:
        was, got = before[section][key], now[section][key]
        if was != got and key != "workers":
            raise ValueError(
                f"{section}.{key}: a run that goes on keeps what it began with, {was!r}, got "
                f"{got!r}; leave it as it was, or begin another run with --directory DIR"
            )


@contextmanager
def _process_group(device_name: str) -> Iterator[None]:
    """Join the other processes, if torchrun started this one."""
    if "RANK" not in os.environ:
        yield
        return
    with _refusing():
        device = pick_device(device_name)
    if device.type != "cpu":
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
    distributed.init_process_group(distributed.get_default_backend_for_device(device.type))
    try:
        yield
        # Otherwise one process may leave while another still talks to it, which sometimes aborts.
        distributed.barrier()
    except (_RefusedError, KeyboardInterrupt, SystemExit):
        distributed.destroy_process_group()
        raise
    # After any other error the process leaves its peers waiting, and torchrun ends them.
    distributed.destroy_process_group()


def _begin(run: Run, directory: Path) -> None:
    """Say what will be trained, and keep the whole configuration with it."""
    system, task = run.system, run.task
    config, processes = system.config, system.peers.world
    kind, size = type(system.module).__name__, sum(p.numel() for p in system.module.parameters())
    strategy = f", {processes} processes ({config.distributed.strategy})" if processes > 1 else ""
    batch, epochs = config.data.batch_size, config.training.epochs
    print(f"model: {kind}, {size:,} parameters")
    print(
        f"data: {config.data.name}, {len(task.train):,} samples to learn from and "
        f"{len(task.test):,} to judge by"
    )
    print(f"training: {epochs} epochs of {len(run.train)} steps, batches of {batch}")
    print(f"device: {system.device}{strategy}, {system.settings}")
    if system.step:
        print(f"going on from epoch {system.epoch}, step {system.step}")
    print(flush=True)
    with _refusing():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "config.yaml").write_text(config_yaml(config), encoding="utf-8")


def _fit(run: Run) -> None:
    system, shown = run.system, list[str]()

    def show(row: dict[str, float]) -> None:
        names = [name.replace("validation_", "test ").replace("_", " ") for name in row]
        cells = [f"{v:.4g}" if isinstance(v, float) else str(v) for v in row.values()]
        lines = [cells] if shown else [names, cells]
        for line in lines:
            shown.append(
                "  ".join(c.rjust(max(len(n), 6)) for c, n in zip(line, names, strict=True))
            )
            # On a terminal it takes the place of the progress within the epoch.
            print(f"\r{shown[-1]}" if sys.stdout.isatty() else shown[-1], flush=True)

    if system.config.autograd_system.enable_gradients:
        epochs = system.config.training.epochs
        on_epoch = show if system.peers.rank == 0 else None
        system.fit(run.train, epochs, run.test, on_epoch=on_epoch)
    elif system.peers.rank == 0:
        print("autograd_system.enable_gradients is false: evaluation only.")


def _finish(run: Run, directory: Path, results: dict[str, float]) -> None:
    """Print the results and what was written, and draw the picture."""
    system = run.system
    title = f"Test, {len(run.task.test):,} samples, after epoch {system.epoch}, step {system.step}"
    rows = [(name, f"{value:.4f}") for name, value in results.items()]
    print(f"\n{text_table(title, ('metric', 'value'), rows)}")
    if system.reports:
        print(f"{len(system.reports)} steps were skipped, the last one for:\n{system.reports[-1]}")
    if system.monitor is not None and system.history:
        with suppress(ImportError):  # then there is no picture
            from matplotlib.figure import Figure  # noqa: PLC0415 - an optional dependency

            figure = Figure(layout="constrained")
            plot_gradient_heatmap(system.monitor, figure.subplots())
            figure.savefig(directory / "gradients.png", dpi=150)
    print(f"\nwritten to {directory}: {', '.join(sorted(os.listdir(directory)))}")
