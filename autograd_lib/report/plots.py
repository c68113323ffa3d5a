"""What pictures share: the scale of a statistic, axes, and what names have in common."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from autograd_lib.core.optional import optional
from autograd_lib.core.statistics import STATISTICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[Any]


def value_range(statistic: str, values: Array) -> tuple[float, float, float]:
    """Return the ends of the scale of a statistic, and the threshold of a signed one.

    Of a logarithmic scale the ends are whole powers of ten; what is returned are the exponents.
    """
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    least, most = (float(size.min()), float(size.max())) if size.size else (0.1, 1.0)
    scale, (low, high) = STATISTICS[statistic].scale, STATISTICS[statistic].limits
    if scale == "log":
        top = float(np.ceil(np.log10(most)))
        return min(float(np.floor(np.log10(least))), top - 1), top, 0.0
    if scale == "linear":
        return low, most if high is None else high, 0.0
    threshold = float(np.quantile(size, 0.1)) if size.size else most
    return -most, most, min(max(threshold, 1e-6 * most), most / 2)


def sized_axes(operation: str, ax: Any, inches: tuple[float, float]) -> Axes:
    """Return `ax`, or the axes of a new figure of this width and height."""
    plt = optional(operation, "matplotlib.pyplot")
    if isinstance(ax, plt.Axes):
        return ax
    if ax is not None:
        raise TypeError(
            f"{operation}: expected ax to be a matplotlib Axes, got {type(ax).__name__}; pass one "
            "Axes, as axes[0] of `figure, axes = plt.subplots(2)`"
        )
    return plt.subplots(figsize=inches, layout="constrained")[1]


def common_prefix(names: Sequence[str]) -> str:
    """Return the modules that all names begin with, which need not be written in each row."""
    if len(names) < 2:
        return ""
    shared = commonprefix([name.split(".") for name in names])  # noqa: RUF071 - of lists, by parts
    return "".join(f"{part}." for part in shared)
