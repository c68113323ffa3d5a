"""What is installed and what of PyTorch works on this machine, each tried once."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

import autograd_lib
from autograd_lib.report.tables import Row, readable_bytes, text_table

# Each by the name that pip installs it under.
_OPTIONAL = (
    *("matplotlib", "ipywidgets", "scipy", "pyarrow"),
    *("pydantic", "ruamel.yaml", "scikit-learn", "jax", "tensorflow"),
)
_LONGEST = 60  # of a reason in the table


def diagnose() -> tuple[str, bool]:
    """Try what training may use.

    Returns:
        The report, and whether all that is essential works.
    """
    results = {name: _tried(probe) for name, probe in _PROBES.items()}
    rows = [(name, outcome, f"{seconds:.1f} s") for name, (outcome, seconds) in results.items()]
    tables = [
        text_table("Versions", ("package", "version"), _versions()),
        text_table("Devices", ("device", "what it is"), _devices()),
        text_table("What works here", ("feature", "result", "time"), rows),
    ]
    broken = [name for name in _ESSENTIAL if results[name][0] != "works"]
    verdict = (
        f"Broken, and nothing works without: {', '.join(broken)}."
        if broken
        else ("All that is essential works.")
    )
    return "\n\n".join([*tables, verdict]), not broken


def _versions() -> list[Row]:
    rows: list[Row] = [
        ("python", platform.python_version()),
        ("autograd_lib", autograd_lib.__version__),
        ("torch", torch.__version__),  # which says of what build it is
    ]
    for package in ("numpy", *_OPTIONAL):
        try:
            rows.append((package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((package, f"missing; pip install {package.lower()}"))
    return rows


def _devices() -> list[Row]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows: list[Row] = [("cpu", f"threads: {torch.get_num_threads()}, cores: {cores}")]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        for i in range(torch.accelerator.device_count()):
            name = f"{kind}:{i}"
            what = str(kind)
            if torch.cuda.is_available():
                found = torch.cuda.get_device_properties(i)
                what = f"{found.name}, {readable_bytes(found.total_memory)}"
            rows.append((name, what))
    else:
        rows.append(("accelerator", "none"))
    return rows


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


def _bf16() -> None:
    layer = torch.nn.Linear(8, 8, bias=False).to(_device())
    torch.nn.init.ones_(layer.weight)
    with torch.autocast(_device().type, torch.bfloat16):
        output = layer(torch.ones(1, 8, device=_device()))
    if output.dtype is not torch.bfloat16:
        raise TypeError(f"expected torch.bfloat16, got {output.dtype}")
    output.float().sum().backward()
    _expect(layer.weight.grad.sum() if layer.weight.grad is not None else 0.0, 64.0)


def _fp16() -> None:
    layer = torch.nn.Linear(8, 8, bias=False).to(_device())
    torch.nn.init.ones_(layer.weight)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    scaler = torch.amp.GradScaler(_device().type)
    with torch.autocast(_device().type, torch.float16):
        loss = layer(torch.ones(1, 8, device=_device())).float().mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
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


def _fsdp2() -> None:
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415 - it may be what fails

    if not callable(fully_shard):
        raise TypeError("fully_shard is no function")


_PROBES: dict[str, Callable[[], None]] = {
    "autograd, second order": _autograd,
    "tensors to NumPy and back": _numpy,
    "forward-mode derivatives": _forward,
    "bf16 autocast": _bf16,
    "fp16 with GradScaler": _fp16,
    "gloo, one process": _gloo,
    "FSDP2, its import": _fsdp2,
    "torch.compile, of one function": _compiled,
}
_ESSENTIAL = ("autograd, second order", "tensors to NumPy and back")
