"""A monitor's history written as CSV, as Parquet and to TensorBoard."""

from __future__ import annotations

import csv
from os import PathLike
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


def write_tensorboard(history: dict[str, Any], writer: Any) -> None:
    """Write the norms as scalars."""
    for row, step in enumerate(history["step"].tolist()):
        writer.add_scalar("gradients/total_norm", history["total_norm"][row], step)
        for i in np.flatnonzero(history["present"][row]).tolist():
            name = f"gradients/norm/{history['names'][i]}"
            writer.add_scalar(name, history["norm"][row, i], step)
