"""What is installed and what of PyTorch works on this machine, each tried once."""

from __future__ import annotations

import importlib.metadata
import time
import warnings
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils import collect_env

import autograd_lib
from autograd_lib.report.tables import Row, text_table

# Each by the name that pip installs it under.
_OPTIONAL = (
    *("matplotlib", "ipywidgets", "scipy", "pyarrow"),
    *("pydantic", "ruamel.yaml", "scikit-learn", "jax", "tensorflow"),
)
_LONGEST = 60  # of a reason in the table


def diagnose(*, compile: bool = False) -> tuple[str, bool]:
    """Try what training may use.

    Args:
        compile: Whether `torch.compile` is tried too, which takes a while.

    Returns:
        The report, and whether all that is essential works.
    """
    probes = _PROBES | ({"torch.compile, of one function": _compiled} if compile else {})
    results = {name: _tried(probe) for name, probe in probes.items()}
    rows = [(name, outcome, f"{seconds:.1f} s") for name, (outcome, seconds) in results.items()]
    tables = [
        text_table("Versions", ("package", "version"), _versions()),
        text_table("Machine", ("part", "what it is"), _machine()),
        text_table("What works here", ("feature", "result", "time"), rows),
    ]
    broken = [name for name in _ESSENTIAL if results[name][0] != "works"]
    verdict = (
        f"Broken, and nothing works without: {', '.join(broken)}."
        if broken
        else "All that is essential works."
    )
    return "\n\n".join([*tables, verdict]), not broken


def _versions() -> list[Row]:
    rows: list[Row] = [("autograd_lib", autograd_lib.__version__), ("torch", torch.__version__)]
    for package in ("numpy", *_OPTIONAL):
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, f"missing; pip install {package.lower()}"))
    return rows


def _machine() -> list[Row]:
    found = collect_env.get_env_info()._asdict()
    rows: list[Row] = [
        (name.replace("_", " "), " | ".join(str(found[name]).splitlines()))
        for name in ("python_version", "os", "nvidia_gpu_models", "nvidia_driver_version")
        if found.get(name)
    ]
    return [*rows, ("threads", str(torch.get_num_threads())), ("device", str(_device()))]


def _tried(probe: Callable[[], None]) -> tuple[str, float]:
    start = time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            probe()
        outcome = "works"
    except Exception as error:  # whatever it is, the table is to say so
        reason = (str(error).strip().splitlines() or [""])[0]
        outcome = f"fails: {type(error).__name__}: {reason}"
        outcome = outcome if len(outcome) <= _LONGEST else f"{outcome[: _LONGEST - 1]}…"
    return outcome, time.perf_counter() - start


def _expect(found: Tensor | float, expected: float) -> None:
    value = float(found)
    if not abs(value - expected) <= 1e-2 * abs(expected):
        raise ArithmeticError(f"expected {expected:g}, got {value:g}")


def _device() -> torch.device:
    return torch.accelerator.current_accelerator() or torch.device("cpu")


def _autograd() -> None:
    x = torch.tensor(3.0, requires_grad=True)
    (slope,) = torch.autograd.grad(x**3, x, create_graph=True)
    _expect(slope, 27.0)
    _expect(torch.autograd.grad(slope, x)[0], 18.0)


def _numpy() -> None:
    _expect(torch.from_numpy(torch.full((2,), 2.0).numpy()).sum(), 4.0)


def _forward() -> None:
    _expect(torch.func.jvp(torch.sin, (torch.zeros(()),), (torch.ones(()),))[1], 1.0)


def _compiled() -> None:
    def cube(x: Tensor) -> Tensor:
        return (x**3).sum()

    x = torch.tensor([3.0], device=_device(), requires_grad=True)
    torch.compile(cube)(x).backward()
    _expect(x.grad if x.grad is not None else 0.0, 27.0)


def _autocast(dtype: torch.dtype) -> None:
    kind = _device().type
    layer = torch.nn.Linear(8, 8, bias=False, device=kind)
    torch.nn.init.ones_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler(kind, enabled=dtype is torch.float16)
    with torch.autocast(kind, dtype):
        output = layer(torch.ones(1, 8, device=kind))
    if output.dtype is not dtype:
        raise TypeError(f"expected {dtype}, got {output.dtype}")
    scaler.scale(output.float().mean()).backward()
    scaler.step(optimizer)
    _expect(layer.weight.detach().mean(), 1 - 0.5 / 8)


def _gloo() -> None:
    distributed = torch.distributed
    if not distributed.is_available():
        raise RuntimeError("PyTorch was built without torch.distributed")
    if distributed.is_initialized():
        raise RuntimeError("there is a process group already")
    store = distributed.HashStore()  # type: ignore[attr-defined]
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        x = torch.full((), 5.0)
        distributed.all_reduce(x)
        _expect(x, 5.0)
    finally:
        distributed.destroy_process_group()


_PROBES: dict[str, Callable[[], None]] = {
    "autograd, second order": _autograd,
    "tensors to NumPy and back": _numpy,
    "forward-mode derivatives": _forward,
    "bf16 autocast": partial(_autocast, torch.bfloat16),
    "fp16 with GradScaler": partial(_autocast, torch.float16),
    "gloo, one process": _gloo,
}
_ESSENTIAL = ("autograd, second order", "tensors to NumPy and back")
