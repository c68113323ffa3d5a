"""A monitor's history written as CSV, as Parquet and to TensorBoard."""

from __future__ import annotations

import csv
from os import PathLike
from typing import Any

import numpy as np

from autograd_lib.core.statistics import STATISTICS

Columns = dict[str, np.ndarray]


def columns(history: dict[str, Any], present: np.ndarray) -> Columns:
    """The history in long form: a row for each step and each parameter `present` in it."""
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
    """Write norms as scalars and histograms as such."""
    names = history["names"]
    for row, step in enumerate(history["step"].tolist()):
        writer.add_scalar("gradients/total_norm", history["total_norm"][row], step)
        for i in np.flatnonzero(~np.isnan(history["norm"][row])).tolist():
            writer.add_scalar(f"gradients/norm/{names[i]}", history["norm"][row, i], step)
    for row, step in enumerate(history.get("histogram_step", np.zeros(0)).tolist()):
        for name, counts in zip(names, history["histogram"][row], strict=True):
            if counts.any():
                described = _described(counts, history["histogram_edges"])
                writer.add_histogram_raw(f"gradients/{name}", **described, global_step=step)


def _described(counts: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    """What TensorBoard wants to know of a histogram of magnitudes."""
    first, *_, last = np.flatnonzero(counts)[[0, -1]].tolist()
    middles = np.sqrt(edges[:-1] * edges[1:])
    return {
        "min": edges[first].item(),
        "max": edges[last + 1].item(),
        "num": counts.sum().item(),
        "sum": (counts @ middles).item(),
        "sum_squares": (counts @ middles**2).item(),
        "bucket_limits": edges[first + 1 : last + 2].tolist(),
        "bucket_counts": counts[first : last + 1].tolist(),
    }
