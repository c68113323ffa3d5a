"""Measurements that scripts of `benchmarks/` took, shipped with the library.

Chapters draw times from these records: a page built on a busy machine shows the same figures.
"""

from __future__ import annotations

import contextlib
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from autograd_lib.core.names import nearest

RECORDS = Path(__file__).parent / "records"


def this_environment() -> dict[str, str | int]:
    """Name what this process measures with: torch, Python, device, CPU, threads, and the date."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration):  # Linux keeps the model's name here alone
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        cpu = next(line for line in lines if line.startswith("model name")).partition(": ")[2]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    device = cpu if accelerator is None else accelerator.type
    return {
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if device == "cuda" else device,
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def described(environment: dict[str, Any]) -> str:
    """Threads, version of torch, device and day, in one line.

    >>> described({"threads": 2, "torch": "2.13.0", "device": "AMD EPYC", "date": "2026-11-25T15"})
    '2 threads, torch 2.13.0, AMD EPYC, 2026-11-25'
    """
    threads = f"{environment['threads']} thread" + "s" * (environment["threads"] != 1)
    day = environment["date"][:10]
    return f"{threads}, torch {environment['torch']}, {environment['device']}, {day}"


class Record(dict[str, Any]):
    """What one script measured, with where and when.

    A `dict` as it stands in the file. Its `repr` is the line that a figure's caption needs.

    Attributes:
        name: The name that `record` was called with.
    """

    def __init__(self, name: str, content: dict[str, Any]) -> None:
        super().__init__(content)
        self.name = name

    @property
    def environment(self) -> dict[str, Any]:
        """Device, CPU, threads, versions and date of the first measurement in the record."""
        parts = [self, *(part for part in self.values() if isinstance(part, dict))]
        return next(part["environment"] for part in parts if "environment" in part)

    @property
    def source(self) -> str:
        """Machine and day, in one line."""
        return described(self.environment)

    def __repr__(self) -> str:
        return f"Record({self.name!r}: {self.source})"


def record(name: str) -> Record:
    """Read a stored measurement.

    Times in it are seconds, ratios have an interval (`low`, `high`), and samples are kept.

    Args:
        name: A file of `RECORDS`, without its suffix, such as ``"training"``.

    Returns:
        Its content. A comparison is made of it by `Comparison.from_json(record(name))`.

    Raises:
        ValueError: There is no such record; the message names the nearest one.

    >>> record("tuning")
    Record('tuning': 1 thread, torch 2..., 20...)
    """
    path = RECORDS / f"{name}.json"
    known = sorted(path.stem for path in RECORDS.glob("*.json"))
    if name not in known:
        raise ValueError(
            f"record: expected one of the {len(known)} measurements stored in `RECORDS`, got "
            f"{name!r}{nearest(name, known)}"
        )
    return Record(name, json.loads(path.read_text(encoding="utf-8")))
