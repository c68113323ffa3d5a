"""What is installed and what of PyTorch works on this machine, each tried once."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed

import autograd_lib
from autograd_lib.report.stored import this_environment
from autograd_lib.report.tables import Row, text_table

# Each by the name that pip installs it under.
_OPTIONAL = (
    *("matplotlib", "ipywidgets", "scipy", "pyarrow"),
    *("pydantic", "ruamel.yaml", "scikit-learn", "jax", "tensorflow"),
)


def diagnose(*, compile: bool = False) -> tuple[str, bool]:
    """Try what training may use.

    Args:
        compile: Whether `torch.compile` is tried too, which takes a while.

    Returns:
        The report, and whether autograd works, without which nothing does.
    """
    probes: dict[str, Callable[[], object]] = {"autograd": _autograd, "gloo, one process": _gloo}
    if compile:
        probes["torch.compile"] = lambda: _autograd(torch.compile)
    rows = [(name, *_tried(probe)) for name, probe in probes.items()]
    versions = text_table("Versions", ("package", "version"), _versions())
    here = {"os": platform.platform(), "accelerators": torch.accelerator.device_count()}
    parts = [(part, str(found)) for part, found in (here | this_environment()).items()]
    machine = text_table("Machine", ("part", "what it is"), parts)
    works = text_table("What works here", ("feature", "result", "time"), rows)
    return f"{versions}\n\n{machine}\n\n{works}", rows[0][1] == "works"


def _versions() -> list[Row]:
    rows: list[Row] = [("autograd_lib", autograd_lib.__version__)]
    for package in ("numpy", *_OPTIONAL):
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, f"missing; pip install {package}"))
    return rows


def _tried(probe: Callable[[], object]) -> tuple[str, str]:
    """The outcome of a probe, and the time it took."""
    start, outcome = time.perf_counter(), "works"
    try:
        probe()
    except Exception as error:  # whatever it is, the table is to say so
        outcome = f"fails: {type(error).__name__}: {error}".partition("\n")[0]
    return outcome, f"{time.perf_counter() - start:.1f} s"


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _cube(x: Tensor) -> Tensor:
    return x**3


def _autograd(wrap: Callable[..., Any] = lambda function: function) -> None:
    x = torch.tensor(3.0, device=_device(), requires_grad=True)
    (slope,) = torch.autograd.grad(wrap(_cube)(x), x)
    torch.testing.assert_close(slope.item(), 27.0)


def _gloo() -> None:
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        distributed.all_reduce(torch.ones(()))
    finally:
        distributed.destroy_process_group()
