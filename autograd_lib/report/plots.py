"""What pictures share: reading a gradient history, rows of parameters, axes and legends."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

from autograd_lib.core.statistics import ALWAYS, STATISTICS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[Any]
Style = dict[str, Any]  # keywords of Matplotlib

# Okabe and Ito's colors, and a grey for the background.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#767676"
_LONGEST_NAME = 30
# What records a key of a history that `collect` does not name.
_OPTIONS = {
    "update_ratio": "optimizer=optimizer, update_every=10",
    "histogram": "histogram_every=10",
}


class Rows(NamedTuple):
    """What is drawn of a history: R steps, P parameters."""

    step: Array  # [R]
    names: list[str]  # P
    values: Array  # [R, P]
    present: Array  # [R, P]: there was a gradient
    nonfinite: Array  # [R, P]: there was one, and no finite number to show for it
    skipped: Array  # [R]


def check_history(operation: str, monitor: Any, key: str) -> Mapping[str, Any]:
    """Return the history of a monitor, or the history that was given, if it has `key`."""
    history = getattr(monitor, "history", monitor)
    if not isinstance(history, Mapping) or "names" not in history:
        raise TypeError(
            f"{operation}: expected a GradientMonitor or its history, got {type(monitor).__name__}"
        )
    if not len(history["step"]):
        raise ValueError(
            f"{operation}: no step was recorded; take at least one step while the monitor is "
            "attached"
        )
    if key not in history:
        option = _OPTIONS.get(key, f'collect=["{key}"]')
        raise ValueError(
            f"{operation}: the history has no {key!r}; record it with "
            f"GradientMonitor(..., {option})"
        )
    return history


def read_history(operation: str, monitor: Any, statistic: str, among: Sequence[str]) -> Rows:
    """Return what is drawn of one of the statistics that a picture can show."""
    if statistic not in among:
        raise ValueError(f"{operation}: expected a statistic among {[*among]}, got {statistic!r}")
    history = check_history(operation, monitor, statistic)
    norm, present, values = (np.asarray(history[key]) for key in ("norm", "present", statistic))
    values = np.real(values).astype(np.float64)  # the mean of a complex gradient is complex
    # Some statistics are computed at some of the steps only: leave out the other steps.
    computed = ~np.isnan(values).all(axis=1)
    if statistic in ALWAYS or not computed.any():
        computed[:] = True
    return Rows(
        step=np.asarray(history["step"])[computed],
        names=list(history["names"]),
        values=values[computed],
        present=present[computed],
        nonfinite=(present & ~np.isfinite(norm) | np.isinf(values))[computed],
        skipped=np.asarray(history["skipped"])[computed],
    )


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


def decades(statistic: str, values: Array) -> tuple[float, float]:
    """Return the limits of a logarithmic axis."""
    # Matplotlib places ticks so far beyond its limits that a float overflows.
    low, high = np.clip(value_range(statistic, values)[:2], (-150, -149), (149, 150))
    return float(10.0**low), float(10.0**high)


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


def row_pitch(ax: Axes, rows: int) -> float:
    """Return the height of one of so many rows, in points, before the layout is settled."""
    return float(ax.get_window_extent().height * 72 / ax.figure.dpi / max(rows, 1))


def name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Name the rows from top to bottom, as many as stay legible."""
    size = 9 if len(names) <= 24 else 7.5
    every = max(1, int(np.ceil(1.25 * size / row_pitch(ax, len(names)))))
    shown = range(0, len(names), every)
    common = common_prefix(names)
    ax.set_yticks(shown, [short_name(names[at].removeprefix(common)) for at in shown], size=size)
    ax.set_ylim(max(len(names), 1) - 0.5, -0.5)
    label = f"parameter of {short_name(common[:-1])}" if common else "parameter"
    ax.set_ylabel(label if every == 1 else f"{label} (one in {every} named)")


def common_prefix(names: Sequence[str]) -> str:
    """Return the modules that all names begin with, which need not be written in each row."""
    if len(names) < 2:
        return ""
    first, last = min(names).split("."), max(names).split(".")
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(f"{part}." for part, _ in shared)


def short_name(name: str, longest: int = _LONGEST_NAME) -> str:
    """Return a name as it is drawn: without the middle if it is long, and never as a formula.

    The two ends of a parameter's name, its block and its kind, matter more than the middle.
    """
    if len(name) > longest:
        head = longest // 2 - 1
        name = f"{name[:head]}…{name[len(name) - (longest - head - 1) :]}"
    return name.replace("$", r"\$")  # else Matplotlib reads text between two of them as a formula


def add_legend(ax: Axes, handles: Sequence[Any] | None = None, above: float = 1.01) -> None:
    """Add a legend above the axes, where it hides nothing."""
    handles = ax.get_legend_handles_labels()[0] if handles is None else handles
    if handles:
        width = ax.get_window_extent().width * 72 / ax.figure.dpi  # in points; 180 hold a label
        place: Style = {"loc": "lower left", "bbox_to_anchor": (0.0, above), "borderaxespad": 0.2}
        look: Style = {"frameon": False, "fontsize": 9, "handlelength": 1.4, "columnspacing": 1.4}
        ax.legend(handles=handles, ncols=max(1, int(width / 180)), **place, **look)
