"""A monitor's history as a table, a file and for loggers."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from os import PathLike, fspath
from typing import Any

import numpy as np

from autograd_lib.core.statistics import STATISTICS

Columns = dict[str, np.ndarray]


def columns(history: dict[str, Any]) -> Columns:
    """The history in long form: a row for each step and each parameter with a gradient in it."""
    present = history["present"]
    steps, parameters = present.shape
    found = {
        "step": np.repeat(history["step"], parameters),
        "parameter": np.tile(np.array(history["names"], dtype=object), steps),
        **{name: history[name].reshape(-1) for name in STATISTICS if name in history},
        "numel": np.tile(history["numel"], steps),
        "skipped": np.repeat(history["skipped"], parameters),
    }
    if np.iscomplexobj(found["mean"]):
        mean = found.pop("mean")
        found |= {"mean": mean.real, "mean_imag": mean.imag}
    return {name: values[present.reshape(-1)] for name, values in found.items()}


def write_csv(table: Columns, path: str | PathLike[str]) -> None:
    """Write columns as CSV with a header."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(table)
        writer.writerows(zip(*(values.tolist() for values in table.values()), strict=True))


def write_parquet(table: Columns, path: str | PathLike[str]) -> None:
    """Write columns as Parquet; needs pyarrow."""
    try:
        import pyarrow  # noqa: PLC0415
        from pyarrow import parquet  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "to_parquet: writing Parquet needs pyarrow: pip install pyarrow"
        ) from error
    parquet.write_table(pyarrow.table(table), path)


def data_frame(table: Columns) -> Any:
    """Columns as a `pandas.DataFrame`; needs pandas."""
    try:
        import pandas  # noqa: PLC0415
    except ImportError as error:
        raise ImportError("to_dataframe: pandas is needed: pip install pandas") from error
    return pandas.DataFrame(table)


def scalars(history: dict[str, Any], row: int, statistics: Sequence[str]) -> dict[str, float]:
    """The norms of one recorded step, and statistics of each parameter with a gradient in it."""
    unknown = [s for s in statistics if s not in STATISTICS or s not in history]
    if unknown:
        known = [name for name in STATISTICS if name in history]
        raise ValueError(
            f"scalars: expected statistics among {known}, got {unknown}; collect others by "
            "GradientMonitor(collect=..., update_every=...)"
        )
    found = {f"gradients/{name}": history[name][row] for name in ("total_norm", "clipped_norm")}
    for statistic in statistics:
        for i in np.flatnonzero(history["present"][row]).tolist():
            value = history[statistic][row, i]
            found[f"gradients/{statistic}/{history['names'][i]}"] = value.real
    if np.isnan(found["gradients/clipped_norm"]):  # nobody looked before
        del found["gradients/clipped_norm"]
    return {name: float(value) for name, value in found.items()}


def write_tensorboard(history: dict[str, Any], writer: Any) -> None:
    """Write the norms as scalars."""
    for row, step in enumerate(history["step"].tolist()):
        for name, value in scalars(history, row, ["norm"]).items():
            writer.add_scalar(name, value, step)


def summary_writer(directory: str | PathLike[str]) -> Any:
    """A writer of event files; needs tensorboard."""
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            "to_tensorboard: writing event files needs tensorboard: pip install tensorboard"
        ) from error
    return SummaryWriter(fspath(directory))
