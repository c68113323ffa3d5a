"""Pictures of a gradient history: through depth, over time, as distributions.

Every function takes a `GradientMonitor` or its history, draws into a Matplotlib `Axes` and returns
it. Parameters are rows in the order of the model, the first on top, so that a gradient flows from
the bottom of a picture to its top. Values that are not finite, gradients that are missing or
exactly zero, and skipped steps have marks of their own, which the legend above the axes explains.
Colors differ in grey and for the color-blind; no global style is set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from autograd_lib.core.statistics import ALWAYS, STATISTICS
from autograd_lib.report.plots import Array, common_prefix, sized_axes, value_range

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from autograd_lib.monitor.monitor import GradientMonitor

    Source = GradientMonitor | Mapping[str, Any]

__all__ = ["plot_gradient_flow", "plot_gradient_heatmap", "plot_gradient_histograms"]

Style = dict[str, Any]  # keywords of Matplotlib

# Okabe and Ito's colors, and a grey for the background.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#767676"
_LONGEST_NAME = 30
_MOST_COLUMNS = 400  # of a heat map: fewer than the pixels that they are drawn on


def plot_gradient_flow(monitor: Source, ax: Axes | None = None, *, statistic: str = "norm") -> Axes:
    """Draw the norm of every weight's gradient through the depth of the model.

    A dot is the median over the steps, the thick bar runs from the lower to the upper quartile, the
    thin line from the least to the largest norm; only finite norms count. A median of exactly zero,
    a norm that was not finite (unless the step was skipped) and a parameter that never had a
    gradient are marked at the edges. Biases are left out, unless the model has nothing else.

    With `statistic="update_ratio"` it shows how far a step moves each weight, relative to the
    weight. A rule of thumb says about 1e-3 (Karpathy, CS231n notes, "Neural Networks Part 3",
    section "Ratio of weights:updates").

    Args:
        monitor: A `GradientMonitor`, or its `history`.
        ax: Where to draw; a new figure if None.
        statistic: "norm", "std", "abs_max" or "update_ratio".

    Returns:
        The axes.

    Raises:
        TypeError: If `monitor` is no monitor and no history, or `ax` not an Axes.
        ValueError: If the history is empty, or `statistic` is unknown or was not recorded.
        ImportError: If Matplotlib is not installed.

    Example:
        >>> import torch
        >>> from autograd_lib import GradientMonitor
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        >>> with GradientMonitor(model) as monitor:
        ...     model(torch.ones(1, 3)).sum().backward()
        >>> ax = plot_gradient_flow(monitor)
        >>> ax.get_xscale(), [label.get_text() for label in ax.get_yticklabels()]
        ('log', ['0.weight', '1.weight'])
    """
    logarithmic = [name for name, about in STATISTICS.items() if about.scale == "log"]
    rows = _read_history("plot_gradient_flow", monitor, statistic, logarithmic)
    is_bias = np.array(["bias" in name.rpartition(".")[2] for name in rows.names])
    kept = np.flatnonzero(~is_bias | is_bias.all())
    depth = np.arange(len(kept))
    spread = np.full((5, len(kept)), np.nan)
    for row, values in zip(depth, rows.values.T[kept], strict=True):
        if (finite := values[np.isfinite(values)]).size:
            spread[:, row] = np.quantile(finite, [0, 0.25, 0.5, 0.75, 1])
    ax = _make_axes("plot_gradient_flow", ax, len(kept))
    low, high = _decades(statistic, spread)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.xaxis.set_minor_formatter("")  # or labels overlap on a short axis
    _name_rows(ax, [rows.names[at] for at in kept])
    pitch = _row_pitch(ax, len(kept))
    least, lower, median, upper, most = np.clip(spread, low, high)
    ax.plot(median, depth, color=GREY, linewidth=0.8, linestyle="-", alpha=0.6)
    ax.hlines(depth, least, most, color=BLUE, linewidth=min(1.2, pitch / 2), alpha=0.6)
    ax.hlines(depth, lower, upper, color=BLUE, linewidth=min(5.0, 0.6 * pitch))
    dot: Style = {"markersize": min(5.0, max(2.0, 0.9 * pitch)), "markeredgecolor": "white"}
    ax.plot(median, depth, "o", color=BLUE, label="median", **dot)
    never = ~rows.present[:, kept].any(axis=0)
    broken = rows.nonfinite[~rows.skipped][:, kept].any(axis=0)  # of a skipped step all are
    for side, flags, marker, color, label in (
        (0, never, "s", GREEN, "no gradient at any step"),
        (0, spread[2] == 0, "<", "black", "median exactly 0"),
        (1, broken, "X", ORANGE, "not finite at some step"),
    ):
        if flags.any():
            edge: Style = {"transform": ax.get_yaxis_transform(), "clip_on": False, "zorder": 5}
            look: Style = {"color": color, "markersize": min(6.5, max(3.5, 0.9 * pitch))}
            ax.plot(np.full(flags.sum(), side), depth[flags], marker, label=label, **look, **edge)
    ax.set_xlabel(f"{STATISTICS[statistic].label}, steps {rows.step[0]} to {rows.step[-1]}")
    ax.grid(axis="y", visible=False)
    _add_legend(ax)
    return ax


def plot_gradient_heatmap(
    monitor: Source, ax: Axes | None = None, *, statistic: str = "norm"
) -> Axes:
    """Draw one statistic of every parameter at every step as a map of colors.

    The scale is logarithmic for magnitudes, symmetric about zero and logarithmic beyond a small
    threshold for `mean`, `min` and `max`, linear for the others. Where there are more than 400
    steps, a column stands for several and shows the value that is largest in magnitude, so that no
    spike is lost. A hatched cell has no value, mostly because there was no gradient; an orange one
    is not finite, with a cross where that began; a black one is exactly zero on a logarithmic
    scale; a triangle above the map is a step that the `GradScaler` skipped.

    Args:
        monitor: A `GradientMonitor`, or its `history`.
        ax: Where to draw; a new figure if None.
        statistic: A key of the history with one value for each step and parameter.

    Returns:
        The axes.

    Raises:
        TypeError: If `monitor` is no monitor and no history, or `ax` not an Axes.
        ValueError: If the history is empty, or `statistic` is unknown or was not recorded.
        ImportError: If Matplotlib is not installed.

    Example:
        >>> import torch
        >>> from autograd_lib import GradientMonitor
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
        >>> with GradientMonitor(model) as monitor:
        ...     model[0](torch.ones(1, 3)).sum().backward()
        >>> ax = plot_gradient_heatmap(monitor)
        >>> ax.get_xlabel(), [text.get_text() for text in ax.get_legend().get_texts()]
        ('step', ['no value'])
    """
    rows = _read_history("plot_gradient_heatmap", monitor, statistic, [*STATISTICS])
    ax = _make_axes("plot_gradient_heatmap", ax, len(rows.names))
    from matplotlib import colors, patches  # noqa: PLC0415

    edges, values, nonfinite = _columns(rows)
    nothing = np.isnan(values) & ~nonfinite
    cells: tuple[Array, Array] = (edges, np.arange(len(rows.names) + 1) - 0.5)
    norm, colormap = _color_scale(statistic, values)
    zero = (values == 0) & (STATISTICS[statistic].scale == "log")
    # On a logarithmic scale zero is drawn in the color of what lies below it.
    drawn = np.where(zero, norm.vmin / 2, np.clip(values, norm.vmin, norm.vmax)).T
    mesh = ax.pcolormesh(*cells, drawn, norm=norm, cmap=colormap, rasterized=True)
    bar = ax.figure.colorbar(mesh, ax=ax, label=STATISTICS[statistic].label, pad=0.02)
    if STATISTICS[statistic].scale == "signed":
        ticks = [norm.vmin, -norm.linthresh, 0.0, norm.linthresh, norm.vmax]
        bar.set_ticks(ticks, labels=[f"{tick:.1g}" for tick in ticks])
    ax.patch.set(hatch="/////", edgecolor=GREY, linewidth=0)  # seen where nothing is drawn
    if nonfinite.any():
        broken = np.ma.masked_equal(nonfinite.T, 0)
        ax.pcolormesh(*cells, broken, cmap=colors.ListedColormap([ORANGE]), rasterized=True)
        column, row = np.nonzero(np.diff(nonfinite, axis=0, prepend=False) & nonfinite)
        size = min(6.0, max(1.8, _row_pitch(ax, len(rows.names))))
        ax.plot(edges[column], row, "x", color="black", markersize=size)
    looks: list[tuple[Array, str, Style]] = [
        (nothing, "no value", {"hatch": "/////", "facecolor": "none", "edgecolor": GREY}),
        (nonfinite, "not finite (× where it began)", {"facecolor": ORANGE}),
        (zero, "exactly 0", {"facecolor": "black"}),
    ]
    handles: list[Any] = [
        patches.Patch(label=text, **look) for flags, text, look in looks if flags.any()
    ]
    if rows.skipped.any():
        at = rows.step[rows.skipped]
        style: Style = {"transform": ax.get_xaxis_transform(), "clip_on": False}
        handles += ax.plot(at, np.full(at.size, 1.025), "kv", label="skipped step", **style)
    ax.set_xlim(edges[0], edges[-1])
    _name_rows(ax, rows.names)
    ax.set_xlabel("step")
    ax.grid(visible=False)
    _add_legend(ax, handles, above=1.045 if rows.skipped.any() else 1.01)
    return ax


def _columns(rows: _Rows) -> tuple[Array, Array, Array]:
    """Return the edges of the columns of a map, and what each cell shows, [columns, P]."""
    starts = np.arange(0, len(rows.step), -(-len(rows.step) // _MOST_COLUMNS))
    finite = np.where(np.isfinite(rows.values), rows.values, np.nan)
    least, most = np.fmin.reduceat(finite, starts), np.fmax.reduceat(finite, starts)
    values = np.where(np.abs(least) > np.abs(most), least, most)
    return _edges(rows.step, starts), values, np.logical_or.reduceat(rows.nonfinite, starts)


def _color_scale(statistic: str, values: Array) -> tuple[Any, Any]:
    """Return the norm and the color map of a statistic."""
    from matplotlib import colormaps, colors  # noqa: PLC0415

    low, high, threshold = value_range(statistic, values)
    scale = STATISTICS[statistic].scale
    if scale == "log":
        norm: Any = colors.LogNorm(*_decades(statistic, values))
    elif scale == "signed":
        norm = colors.SymLogNorm(threshold, vmin=low, vmax=high, base=10)
    else:
        norm = colors.Normalize(low, high)
    sequential = scale == "log" or low == 0
    return norm, colormaps["viridis" if sequential else "PRGn"].with_extremes(under="black")


def plot_gradient_histograms(monitor: Source, parameter: str, ax: Axes | None = None) -> Axes:
    """Draw how the magnitudes of one parameter's gradient are spread, and how that changes.

    Each column is one recorded histogram over powers of two; its colors are the shares of all
    elements. The lowest bin of a histogram, which holds zeros too, is left out.

    Args:
        monitor: A `GradientMonitor` made with `histogram_every=`, or its `history`.
        parameter: The name of a parameter.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        TypeError: If `monitor` is no monitor and no history, or `ax` not an Axes.
        ValueError: If there is no histogram or no such parameter.
        ImportError: If Matplotlib is not installed.

    Example:
        >>> import torch
        >>> from autograd_lib import GradientMonitor
        >>> model = torch.nn.Linear(3, 1)
        >>> with GradientMonitor(model, histogram_every=1) as monitor:
        ...     model(torch.tensor([[1.0, 2.0, 2.0]])).sum().backward()
        >>> ax = plot_gradient_histograms(monitor, "weight")
        >>> [float(end) for end in ax.get_ylim()]
        [0.0, 2.0]
    """
    operation = "plot_gradient_histograms"
    history = _check_history(operation, monitor, "histogram")
    names = list(history["names"])
    if parameter not in names:
        raise ValueError(
            f"{operation}: expected a parameter among {names!r:.300}, got {parameter!r}"
        )
    counts = np.asarray(history["histogram"])[:, names.index(parameter)].T
    exponents = np.log2(np.asarray(history["histogram_edges"], dtype=np.float64))
    filled = 1 + np.flatnonzero(counts[1:].any(axis=1))
    first, last = (filled[0], filled[-1]) if filled.size else (1, len(counts) - 1)
    ax = _make_axes(operation, ax, 14)
    step = np.asarray(history["histogram_step"])
    shares = counts / np.maximum(counts.sum(axis=0), 1)
    edges = _edges(step, np.arange(len(step)))
    mesh = ax.pcolormesh(edges, exponents, shares, cmap="viridis", rasterized=True)
    ax.figure.colorbar(mesh, ax=ax, label="share of the elements", pad=0.02)
    ax.set_ylim(exponents[first], exponents[last + 1])
    ax.yaxis.set_major_formatter(lambda power, _: f"$2^{{{power:.0f}}}$")
    ax.set_xlabel("step")
    ax.set_ylabel(f"magnitude of the elements of {_short_name(parameter)}")
    ax.grid(visible=False)
    return ax


def _edges(step: Array, starts: Array) -> Array:
    """Return the edges of the columns of a map, each of which begins at one of the steps."""
    gap = np.diff(step[-2:]).sum() or 1  # how wide the last one is
    return np.append(step[starts], step[-1] + gap) - 0.5


class _Rows(NamedTuple):
    """What is drawn of a history: R steps, P parameters."""

    step: Array  # [R]
    names: list[str]  # P
    values: Array  # [R, P]
    present: Array  # [R, P]: there was a gradient
    nonfinite: Array  # [R, P]: there was one, and no finite number to show for it
    skipped: Array  # [R]


def _check_history(operation: str, monitor: Any, key: str) -> Mapping[str, Any]:
    """Return the history of a monitor, or the history that was given, if it has `key`."""
    history = getattr(monitor, "history", monitor)
    if not isinstance(history, Mapping) or "names" not in history:
        raise TypeError(
            f"{operation}: expected a GradientMonitor or its history, got {type(monitor).__name__}"
        )
    if not len(history["step"]):
        raise ValueError(f"{operation}: no step was recorded; take at least one step first")
    if key not in history:
        raise ValueError(
            f"{operation}: the history has no {key!r}; ask for it by collect=, update_every= or "
            "histogram_every= of the GradientMonitor"
        )
    return history


def _read_history(operation: str, monitor: Any, statistic: str, among: Sequence[str]) -> _Rows:
    """Return what is drawn of one of the statistics that a picture can show."""
    if statistic not in among:
        raise ValueError(f"{operation}: expected a statistic among {[*among]}, got {statistic!r}")
    history = _check_history(operation, monitor, statistic)
    norm, present, values = (np.asarray(history[key]) for key in ("norm", "present", statistic))
    values = np.real(values).astype(np.float64)  # the mean of a complex gradient is complex
    # Some statistics are computed at some of the steps only: leave out the other steps.
    computed = ~np.isnan(values).all(axis=1)
    if statistic in ALWAYS or not computed.any():
        computed[:] = True
    return _Rows(
        step=np.asarray(history["step"])[computed],
        names=list(history["names"]),
        values=values[computed],
        present=present[computed],
        nonfinite=(present & ~np.isfinite(norm) | np.isinf(values))[computed],
        skipped=np.asarray(history["skipped"])[computed],
    )


def _row_pitch(ax: Axes, rows: int) -> float:
    """Return the height of one of so many rows, in points, before the layout is settled."""
    return float(ax.get_window_extent().height * 72 / ax.figure.dpi / max(rows, 1))


def _name_rows(ax: Axes, names: Sequence[str]) -> None:
    """Name the rows from top to bottom, evenly, as many as stay legible."""
    size, most = 10, 12  # smaller or more names cannot be read on a phone
    every = int(np.ceil(max(1.25 * size / _row_pitch(ax, len(names)), len(names) / most)))
    shown = range(0, len(names), every)
    common = common_prefix(names)
    ax.set_yticks(shown, [_short_name(names[at].removeprefix(common)) for at in shown], size=size)
    ax.set_ylim(max(len(names), 1) - 0.5, -0.5)
    label = f"parameter of {_short_name(common[:-1])}" if common else "parameter"
    ax.set_ylabel(label if every == 1 else f"{label} (one in {every} named)")


def _short_name(name: str) -> str:
    """Return a name as it is drawn: without the middle if it is long, and never as a formula.

    The two ends of a parameter's name, its block and its kind, matter more than the middle.
    """
    if len(name) > _LONGEST_NAME:
        half = (_LONGEST_NAME - 1) // 2
        name = f"{name[:half]}…{name[-half:]}"
    return name.replace("$", r"\$")  # else Matplotlib reads text between two of them as a formula


def _decades(statistic: str, values: Array) -> tuple[float, float]:
    """Return the limits of a logarithmic axis."""
    # Matplotlib places ticks so far beyond its limits that a float overflows.
    low, high = np.clip(value_range(statistic, values)[:2], (-150, -149), (149, 150))
    return float(10.0**low), float(10.0**high)


def _make_axes(operation: str, ax: Any, rows: float) -> Axes:
    """Return `ax`, or the axes of a new figure that is high enough for so many rows."""
    return sized_axes(operation, ax, (6.8, min(max(1.5 + 0.22 * rows, 2.6), 6.5)))


def _add_legend(ax: Axes, handles: Sequence[Any] | None = None, above: float = 1.01) -> None:
    """Add a legend above the axes, where it hides nothing."""
    handles = ax.get_legend_handles_labels()[0] if handles is None else handles
    if handles:
        width = ax.get_window_extent().width * 72 / ax.figure.dpi  # in points; 180 hold a label
        place: Style = {"loc": "lower left", "bbox_to_anchor": (0.0, above), "borderaxespad": 0.2}
        look: Style = {"frameon": False, "fontsize": 9, "handlelength": 1.4, "columnspacing": 1.4}
        ax.legend(handles=handles, ncols=max(1, int(width / 180)), **place, **look)
