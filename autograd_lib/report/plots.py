"""What pictures share: reading a gradient history, rows of parameters, axes and legends."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Array = npt.NDArray[Any]
Style = dict[str, Any]  # keywords of Matplotlib

# Okabe and Ito's colors, and a grey for the background.
BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#767676"
# Statistic to the option of the monitor that records it.
OPTIONS = {
    "update_ratio": "optimizer=optimizer, update_every=10",
    "histogram": "histogram_every=10",
    "zero_fraction": 'collect=["zero_fraction"]',
    "nan_count": 'collect=["nan_count"]',
    "inf_count": 'collect=["inf_count"]',
    "cosine": 'collect=["cosine"]',
}
LABELS = {
    "norm": "norm of the gradient",
    "std": "standard deviation of the gradient",
    "abs_max": "largest magnitude in the gradient",
    "zero_fraction": "share of zeros in the gradient",
    "nan_count": "NaN elements of the gradient",
    "inf_count": "infinite elements of the gradient",
    "update_ratio": "norm of the update / norm of the weight",
    "cosine": "cosine with the previous gradient",
    "mean": "mean of the gradient",
    "min": "least element of the gradient",
    "max": "largest element of the gradient",
}
_NEEDED = ("step", "names", "norm", "missing", "total_norm", "skipped")  # of a history
_LONGEST_NAME = 30
# A logarithmic axis ends here: Matplotlib places ticks so far beyond it that a float overflows.
TINY, HUGE = 1e-150, 1e150


class Rows(NamedTuple):
    """What is drawn of a history: R steps, P parameters."""

    step: Array  # [R]
    names: list[str]  # P
    is_bias: Array  # [P]
    values: Array  # [R, P]
    nonfinite: Array  # [R, P]: there was a gradient, and no finite number to show for it
    missing: Array  # [R, P]: there was none
    skipped: Array  # [R]


def read_history(
    operation: str,
    history: Mapping[str, Any],
    statistic: str | None,
    *,
    steps: Any = None,
    biases: bool = True,
) -> Rows:
    """Check a history and select the rows and parameters to draw."""
    check_history(operation, history, _NEEDED)
    if statistic is not None:
        check_statistic(operation, history, statistic)
    if not isinstance(steps, slice | None):
        raise TypeError(
            f"{operation}: expected steps to be a slice, got {steps!r}; for the last ten rows pass "
            "steps=slice(-10, None)"
        )
    names = list(history["names"])
    is_bias = np.array(["bias" in name.rpartition(".")[2] for name in names])
    kept = np.ones(len(names), bool) if biases or is_bias.all() else ~is_bias
    taken = slice(None) if steps is None else steps
    step, skipped = (np.asarray(history[key])[taken] for key in ("step", "skipped"))
    if not step.size:
        raise ValueError(
            f"{operation}: steps={steps!r} takes none of the {len(history['step'])} rows of the "
            "history; it counts rows from the oldest, as a slice of a list does"
        )
    norm, missing = (np.asarray(history[key])[taken][:, kept] for key in ("norm", "missing"))
    values = norm
    if statistic is not None:
        values = np.asarray(history[statistic])[taken][:, kept]
    values = np.real(values).astype(np.float64)  # the mean of a complex gradient is complex
    # Some statistics are computed at some of the steps only: leave out the other steps.
    computed = np.isfinite(values).any(axis=1) | np.isinf(values).any(axis=1)
    if statistic not in OPTIONS or not computed.any():
        computed = np.ones(step.size, bool)
    nonfinite, missing = classify(norm, missing, np.asarray(history["total_norm"])[taken])
    nonfinite |= np.isinf(values)
    return Rows(
        step=step[computed],
        names=[name for name, keep in zip(names, kept, strict=True) if keep],
        is_bias=is_bias[kept],
        values=values[computed],
        nonfinite=nonfinite[computed],
        missing=missing[computed],
        skipped=skipped[computed],
    )


def classify(norm: Array, missing: Array, total_norm: Array) -> tuple[Array, Array]:
    """Distinguish gradients that are not finite from those that do not exist.

    Both have a norm of NaN. A frozen parameter has no gradient, though none is missing: the total
    norm stays finite, which a NaN in a gradient would make NaN.
    """
    sound = np.isfinite(total_norm)[:, None]
    frozen = (sound & np.isnan(norm)).any(axis=0) & ~(sound & ~np.isnan(norm)).any(axis=0)
    absent = missing | (np.isnan(norm) & (sound | frozen))
    return ~np.isfinite(norm) & ~absent, absent


def check_history(operation: str, history: Any, needed: Sequence[str]) -> None:
    if not isinstance(history, Mapping):
        raise TypeError(
            f"{operation}: expected the history of a GradientMonitor, got "
            f"{type(history).__name__}; pass monitor.history"
        )
    if absent := [key for key in needed if key not in history]:
        raise ValueError(
            f"{operation}: expected the history of a GradientMonitor, got a mapping without "
            f"{absent}; pass monitor.history"
        )
    if not len(history["step"]) or not len(history["names"]):
        what = "step" if len(history["names"]) else "parameter"
        raise ValueError(
            f"{operation}: no {what} was recorded; take at least one step while the monitor is "
            "attached to a model with parameters"
        )


def check_statistic(
    operation: str, history: Mapping[str, Any], statistic: str, among: Sequence[str] = (*LABELS,)
) -> None:
    """Check that a history has one of the statistics that can be drawn."""
    if statistic in among and statistic in history:
        return
    if statistic in among and statistic in OPTIONS:
        raise ValueError(
            f"{operation}: the history has no {statistic!r}; record it with "
            f"GradientMonitor(..., {OPTIONS[statistic]})"
        )
    known = [key for key in among if key in history]
    raise ValueError(f"{operation}: expected a statistic among {known}, got {statistic!r}")


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
    ax.set_ylabel(label if every == 1 else f"{label} (every {_ordinal(every)} named)")


def common_prefix(names: Sequence[str]) -> str:
    """Return the modules that all names begin with, which need not be written in each row."""
    if len(names) < 2:
        return ""
    first, last = min(names).split("."), max(names).split(".")
    shared = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return "".join(f"{part}." for part, _ in shared)


def _ordinal(number: int) -> str:
    last = 0 if number % 100 in (11, 12, 13) else number % 10
    return str(number) + {1: "st", 2: "nd", 3: "rd"}.get(last, "th")


def short_name(name: str, longest: int = _LONGEST_NAME) -> str:
    """Return a name as it is drawn: without the middle if it is long, and never as a formula.

    The two ends of a parameter's name, its block and its kind, matter more than the middle.
    """
    if len(name) > longest:
        head = longest // 2 - 1
        name = f"{name[:head]}…{name[len(name) - (longest - head - 1) :]}"
    return name.replace("$", r"\$")  # else Matplotlib reads text between two of them as a formula


def decades(values: Array, margin: float = 2.0) -> tuple[float, float]:
    """Return the limits of a logarithmic axis."""
    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return 1e-3, 1.0
    positive = positive.clip(TINY, HUGE)
    low, high = float(positive.min()) / margin, float(positive.max()) * margin
    if high < 100 * low:  # at least two powers of ten, so that the axis has two labels
        low, high = 10.0 ** np.floor(np.log10(low)), 10.0 ** np.ceil(np.log10(high))
    return low, high


def mark_edge(ax: Axes, side: float, rows: Array, style: tuple[str, str], label: str) -> None:
    """Mark rows on the left edge of the axes (side 0) or the right one (1), above everything."""
    marker, color = style
    size = min(6.5, max(3.5, 0.9 * row_pitch(ax, len(ax.get_yticks()))))
    if len(rows):
        place: Style = {"transform": ax.get_yaxis_transform(), "clip_on": False, "zorder": 5}
        look: Style = {"markersize": size, "linestyle": "none", "label": label}
        face = "white" if marker == "o" else color
        x = np.full(len(rows), side)
        ax.plot(x, rows, marker, color=color, markerfacecolor=face, **place, **look)


def add_legend(ax: Axes, handles: Sequence[Any] | None = None, above: float = 1.01) -> None:
    """Add a legend above the axes, where it hides nothing."""
    handles = ax.get_legend_handles_labels()[0] if handles is None else handles
    if handles:
        place: Style = {"loc": "lower left", "bbox_to_anchor": (0.0, above), "borderaxespad": 0.2}
        look: Style = {"frameon": False, "fontsize": 9, "handlelength": 1.4, "columnspacing": 1.4}
        ax.legend(handles=handles, ncols=_fitting(ax, handles), **place, **look)


def _fitting(ax: Axes, handles: Sequence[Any]) -> int:
    """Return how many columns of a legend fit the width of the axes, about."""
    room = ax.get_window_extent().width * 72 / ax.figure.dpi / 9  # in ems
    widths = [0.55 * len(handle.get_label()) + 3.5 for handle in handles]
    for columns in range(len(widths), 1, -1):
        deep = -(-len(widths) // columns)
        if sum(max(widths[i : i + deep]) for i in range(0, len(widths), deep)) <= room:
            return columns
    return 1
