"""What pictures share: colors, scales, axes, names and legends."""

from __future__ import annotations

from collections.abc import Sequence
from os.path import commonprefix
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from autograd_lib.core.statistics import STATISTICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[Any]
Style = dict[str, Any]  # keywords of Matplotlib

# Okabe and Ito's colors, and a grey for the background.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#767676"


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


def make_axes(operation: str, ax: Any, rows: float) -> Axes:
    """Return `ax`, or the axes of a new figure that is high enough for so many rows."""
    return sized_axes(operation, ax, (6.8, min(max(1.5 + 0.22 * rows, 2.6), 6.5)))


def sized_axes(operation: str, ax: Any, inches: tuple[float, float]) -> Axes:
    """Return `ax`, or the axes of a new figure of this width and height."""
    try:
        from matplotlib import axes  # noqa: PLC0415 - an optional dependency
        from matplotlib import pyplot as plt  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(f"{operation} needs Matplotlib: pip install matplotlib") from error
    if isinstance(ax, axes.Axes):
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


def add_legend(ax: Axes, handles: Sequence[Any] | None = None, above: float = 1.01) -> None:
    """Add a legend above the axes, where it hides nothing."""
    handles = ax.get_legend_handles_labels()[0] if handles is None else handles
    if handles:
        width = ax.get_window_extent().width * 72 / ax.figure.dpi  # in points; 180 hold a label
        place: Style = {"loc": "lower left", "bbox_to_anchor": (0.0, above), "borderaxespad": 0.2}
        look: Style = {"frameon": False, "fontsize": 9, "handlelength": 1.4, "columnspacing": 1.4}
        ax.legend(handles=handles, ncols=max(1, int(width / 180)), **place, **look)
