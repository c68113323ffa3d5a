"""The statistics of a tensor that reports know: how they are named, written, drawn and derived."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np


class Statistic(NamedTuple):
    """How a statistic of a parameter is written and drawn, and who asks for it."""

    header: str  # of its column in a table
    label: str  # of its axis in a figure
    write: Callable[[Any], str] = "{:.3g}".format
    scale: str = "log"  # "log", "signed" (logarithmic on both sides of zero) or "linear"
    limits: tuple[float, float | None] = (0.0, None)  # of a linear scale
    always: bool = False  # a monitor collects it without being asked


def _share(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.1%}"


# The columns of a table, in their order; `numel` stands behind them.
STATISTICS = {
    "norm": Statistic("norm", "norm of the gradient", always=True),
    "mean": Statistic("mean", "mean of the gradient", scale="signed", always=True),
    "std": Statistic("std", "standard deviation of the gradient", always=True),
    "min": Statistic("min", "least element of the gradient", scale="signed", always=True),
    "max": Statistic("max", "largest element of the gradient", scale="signed", always=True),
    "abs_max": Statistic("abs_max", "largest magnitude in the gradient", always=True),
    "cosine": Statistic(
        "cosine", "cosine with the previous gradient", scale="linear", limits=(-1.0, 1.0)
    ),
    "update_ratio": Statistic("update_ratio", "norm of the update / norm of the weight"),
    "zero_fraction": Statistic(
        "zeros", "share of zeros in the gradient", _share, "linear", (0.0, 1.0)
    ),
    "nan_count": Statistic("nan", "NaN elements of the gradient", "{:,}".format, "linear"),
    "inf_count": Statistic("inf", "infinite elements of the gradient", "{:,}".format, "linear"),
}
ALWAYS = tuple(name for name, statistic in STATISTICS.items() if statistic.always)
COUNTS = ("zero_fraction", "nan_count", "inf_count")  # from the fields of the same order


def derive(fields: np.ndarray, present: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics [steps, parameters] from fields [steps, fields, parameters].

    NaN where a parameter is not `present` [steps, parameters].
    """
    numel, real, imag, real_spread, imag_spread, low, high = np.moveaxis(fields[:, :7], 1, 0)
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        abs_max = np.where(numel > 0, np.maximum(-low, high), 0.0)
        spread = np.hypot(real_spread, imag_spread)
        norm = np.hypot(spread, np.hypot(real, imag) * np.sqrt(numel))
        norm = np.where(np.isfinite(abs_max), norm, abs_max)  # hypot(nan, inf) is inf
        some = np.where(numel > 0, 1.0, np.nan)
        mean = real * some
        if imag.any():  # in parts: an infinite number times another one is NaN in both
            mean = np.stack([mean, imag * some], axis=-1).view(np.complex128)[..., 0]
        found = {
            "norm": norm,
            "mean": mean,
            "std": spread / np.sqrt(numel) * some,
            "min": low * some,
            "max": high * some,
            "abs_max": abs_max,
        }
    for values in found.values():
        values[~present] = np.nan
    return found


def derive_counts(counts: np.ndarray, numel: np.ndarray) -> dict[str, np.ndarray]:
    """Statistics from counts [3, ...] of the elements that are zero, NaN and infinite."""
    zeros, *others = counts
    return dict(zip(COUNTS, (zeros / np.where(numel, numel, np.nan), *others), strict=True))


def describe(values: Mapping[str, Any], numel: int, is_complex: bool) -> dict[str, Any]:
    """The statistics of one parameter as plain numbers; complex ones have no order."""
    entry = {**values, "numel": numel}
    if is_complex:
        del entry["min"], entry["max"]
    else:
        entry["mean"] = entry["mean"].real
    for key in ("nan_count", "inf_count"):
        if key in entry:
            entry[key] = int(entry[key])
    return entry
