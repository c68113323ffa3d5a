"""Pictures of a gradient history: through depth, over time, as distributions, against the weights.

Every function takes the history of a `GradientMonitor`, draws into a Matplotlib `Axes` and returns
it. Parameters are rows in the order of the model, the first on top, so that a gradient flows from
the bottom of a picture to its top. Values that are not finite, gradients that are missing or
exactly zero, and skipped steps have marks of their own, which the legend above the axes explains.
Colors differ in grey and for the color-blind; no global style is set.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from autograd_lib.core.statistics import STATISTICS
from autograd_lib.report.plots import (
    BLUE,
    GREEN,
    GREY,
    HUGE,
    ORANGE,
    PURPLE,
    TINY,
    Array,
    Rows,
    Style,
    add_legend,
    check_history,
    check_statistic,
    decades,
    make_axes,
    mark_edge,
    name_rows,
    read_history,
    row_pitch,
    short_name,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_gradient_flow",
    "plot_gradient_heatmap",
    "plot_gradient_histograms",
    "plot_issues",
    "plot_update_ratios",
]

_Issue = tuple[str, str, int, float | None]  # kind, parameter, step, value

# The marks of the kinds of issues: shape and color, so that either alone tells them apart.
_KINDS = {
    "nan": ("X", ORANGE),
    "inf": ("P", "#000000"),
    "exploding": ("^", PURPLE),
    "vanishing": ("v", BLUE),
    "missing": ("o", GREEN),
}
_MOST_COLUMNS = 400  # of a heat map: fewer than the pixels that they are drawn on
_MOST_RIDGES = 14


def plot_gradient_flow(
    history: Mapping[str, Any],
    ax: Axes | None = None,
    *,
    biases: bool = False,
    steps: slice | None = None,
) -> Axes:
    """Draw the norm of every parameter's gradient through the depth of the model.

    A dot is the median over the steps, the thick bar runs from the lower to the upper quartile, the
    thin line from the least to the largest norm; only finite norms count. A median of exactly zero,
    a norm that was not finite (unless the step was skipped) and a parameter that never had a
    gradient are marked at the edges.

    Args:
        history: The `history` of a `GradientMonitor`.
        ax: Where to draw; a new figure if None.
        biases: Whether to draw biases too, as hollow squares. A model of nothing but biases is
            drawn in any case.
        steps: Which rows of the history to take: `slice(-100, None)` is the last hundred.

    Returns:
        The axes.

    Raises:
        TypeError: If `history` is not a mapping, `steps` not a slice or `ax` not an Axes.
        ValueError: If the history, or what `steps` takes of it, is empty.
        ImportError: If Matplotlib is not installed.

    Example:
        >>> norms = np.array([[1.0, 0.1], [3.0, 0.2], [2.0, 0.3]])
        >>> history = {"step": np.array([1, 2, 3]), "names": ["0.weight", "2.weight"],
        ...            "norm": norms, "missing": np.isnan(norms), "skipped": np.zeros(3, bool),
        ...            "total_norm": np.ones(3)}
        >>> ax = plot_gradient_flow(history)
        >>> ax.get_xscale(), [label.get_text() for label in ax.get_yticklabels()]
        ('log', ['0.weight', '2.weight'])
    """
    rows = read_history("plot_gradient_flow", history, "norm", steps=steps, biases=biases)
    spread = np.full((5, len(rows.names)), np.nan)
    for column, values in enumerate(rows.values.T):
        if (finite := values[np.isfinite(values)]).size:
            spread[:, column] = np.quantile(finite, [0, 0.25, 0.5, 0.75, 1])
    ax = make_axes("plot_gradient_flow", ax, len(rows.names))
    low, high = decades(spread)
    ax.set_xscale("log")
    ax.set_xlim(low, high)
    ax.xaxis.set_minor_formatter("")  # or labels overlap on a short axis
    name_rows(ax, rows.names)
    drawn = np.clip(spread, low, high)
    median, depth = drawn[2], np.arange(len(rows.names))
    ax.plot(median, depth, color=GREY, linewidth=0.8, linestyle="-", alpha=0.6)
    for of_bias in (False, True):
        at = depth[(rows.is_bias == of_bias) & np.isfinite(median)]
        if at.size:
            _draw_spread(ax, at, drawn[:, at], row_pitch(ax, len(depth)), of_bias)
    never = depth[rows.missing.all(axis=0)]
    mark_edge(ax, 0, never, ("o", GREEN), "no gradient at any step")
    mark_edge(ax, 0, depth[spread[2] == 0], ("<", "black"), "median exactly 0")
    broken = rows.nonfinite[~rows.skipped].any(axis=0)  # the gradients of a skipped step never are
    mark_edge(ax, 1, depth[broken], ("X", ORANGE), "not finite at some step")
    first, last = rows.step[[0, -1]]
    ax.set_xlabel(f"norm of the gradient, steps {first} to {last}")
    ax.grid(axis="y", visible=False)
    add_legend(ax)
    return ax


def plot_gradient_heatmap(
    history: Mapping[str, Any],
    ax: Axes | None = None,
    *,
    statistic: str = "norm",
    biases: bool = True,
    steps: slice | None = None,
) -> Axes:
    """Draw one statistic of every parameter at every step as a map of colors.

    The scale is logarithmic for magnitudes, symmetric about zero and logarithmic beyond a small
    threshold for `mean`, `min` and `max`, linear for the others. Where there are more than 400
    steps, a column stands for several and shows the value that is largest in magnitude, so that no
    spike is lost. A hatched cell has no gradient; an orange one is not finite, with a cross where
    that began; a black one is exactly zero on a logarithmic scale; a triangle above the map is a
    step that the `GradScaler` skipped.

    Args:
        history: The `history` of a `GradientMonitor`.
        ax: Where to draw; a new figure if None.
        statistic: A key of the history with one value for each step and parameter.
        biases: Whether to draw biases too.
        steps: Which rows of the history to take: `slice(-100, None)` is the last hundred.

    Returns:
        The axes.

    Raises:
        TypeError: If `history` is not a mapping, `steps` not a slice or `ax` not an Axes.
        ValueError: If the history is empty, or `statistic` is unknown or was not recorded.
        ImportError: If Matplotlib is not installed.

    Example:
        >>> norms = np.array([[1.0, 0.1], [3.0, np.nan], [2.0, 0.3]])
        >>> history = {"step": np.array([1, 2, 3]), "names": ["0.weight", "2.weight"],
        ...            "norm": norms, "missing": np.isnan(norms), "skipped": np.zeros(3, bool),
        ...            "total_norm": np.ones(3)}
        >>> ax = plot_gradient_heatmap(history)
        >>> ax.get_xlabel(), [text.get_text() for text in ax.get_legend().get_texts()]
        ('step', ['no gradient'])
    """
    rows = read_history("plot_gradient_heatmap", history, statistic, steps=steps, biases=biases)
    ax = make_axes("plot_gradient_heatmap", ax, len(rows.names))
    edges, values, nonfinite, missing = _columns(rows)
    import matplotlib as mpl  # noqa: PLC0415

    norm, colors = _color_scale(mpl, statistic, values)
    logarithmic = isinstance(norm, mpl.colors.LogNorm)
    # On a logarithmic scale zero is drawn in the color of what lies below it.
    drawn = np.where(values == 0, norm.vmin / 2, values) if logarithmic else values
    mesh = ax.pcolormesh(
        edges,
        np.arange(len(rows.names) + 1) - 0.5,
        np.ma.masked_invalid(drawn).T,
        norm=norm,
        cmap=colors,
        rasterized=True,
    )
    bar = ax.figure.colorbar(mesh, ax=ax, label=STATISTICS[statistic].label, pad=0.02)
    if STATISTICS[statistic].scale == "signed":
        bar.set_ticks(_signed_ticks(norm.linthresh, norm.vmax))
    handles = _mark_cells(mpl, ax, edges, nonfinite, missing)
    if logarithmic and (values == 0).any():
        handles.append(mpl.patches.Patch(facecolor="black", label="exactly 0"))
    if rows.skipped.any():
        at = rows.step[rows.skipped]
        style: Style = {"transform": ax.get_xaxis_transform(), "clip_on": False}
        style |= {"linestyle": "none", "markersize": 6, "label": "skipped step"}
        handles += ax.plot(at, np.full(at.size, 1.025), "v", color="black", **style)
    ax.set_xlim(edges[0], edges[-1])
    name_rows(ax, rows.names)
    ax.set_xlabel("step")
    ax.grid(visible=False)
    add_legend(ax, handles, above=1.045 if rows.skipped.any() else 1.01)
    return ax


def plot_gradient_histograms(
    history: Mapping[str, Any],
    parameter: str,
    ax: Axes | None = None,
    *,
    dtype: torch.dtype | None = None,
    loss_scale: float = 1.0,
) -> Axes:
    """Draw how the magnitudes of one parameter's gradient are spread, and how that changes.

    Each ridge is one recorded histogram over powers of two, the first step at the back and the
    last in front, all to one scale. At most 14 are drawn, evenly spaced. The share of elements that
    are zero, or too small for the histogram, stands at the right of its ridge.

    Args:
        history: The `history` of a `GradientMonitor` made with `histogram_every=`.
        parameter: The name of a parameter.
        ax: Where to draw; a new figure if None.
        dtype: A floating type whose limits to mark, as `torch.float16`: magnitudes below the
            smallest normal number lose digits, those below half of the smallest subnormal one
            become zero.
        loss_scale: What a `GradScaler` multiplies the loss with. The history holds unscaled
            gradients, so that the limits move down by it.

    Returns:
        The axes.

    Raises:
        TypeError: If `history` is not a mapping, `ax` not an Axes or `dtype` not a floating type.
        ValueError: If there is no histogram or no such parameter, or `loss_scale` is not positive.
        ImportError: If Matplotlib is not installed.

    Example:
        >>> counts = np.zeros((1, 1, 64), dtype=np.int64)
        >>> counts[0, 0, 30:40] = 5
        >>> history = {"step": np.array([1]), "names": ["weight"], "histogram": counts,
        ...            "histogram_step": np.array([1]),
        ...            "histogram_edges": 2.0 ** np.arange(-48, 17)}
        >>> ax = plot_gradient_histograms(history, "weight", dtype=torch.float16)
        >>> [text.get_text() for text in ax.texts]
        ['float16: 0', 'subnormal']
    """
    operation = "plot_gradient_histograms"
    counts, taken = _read_histograms(operation, history, parameter, dtype, loss_scale)
    exponents = np.log2(np.asarray(history["histogram_edges"], dtype=np.float64))
    total = np.maximum(counts.sum(axis=1), 1)
    density = counts[:, 1:] / total[:, None]
    filled = np.flatnonzero(density.any(axis=0))
    first, last = (filled[0], filled[-1]) if filled.size else (20, 40)
    ax = make_axes(operation, ax, 1.6 * len(taken))
    for i, share in enumerate(density):
        age = 1 - i / max(len(taken) - 1, 1)
        _draw_ridge(ax, i, exponents[1:], 2.2 * share / (density.max() or 1), age)
        if zeros := counts[i, 0] / total[i]:
            text = f"{zeros:.0%} zero" if zeros >= 0.005 else "<1% zero"
            ax.text(1.01, i, text, transform=ax.get_yaxis_transform(), va="center", size=8.5)
    left, right = exponents[first + 1] - 1, exponents[last + 2] + 1
    if dtype is not None:
        left = _mark_limits(ax, dtype, loss_scale, left, exponents[0])
    ax.set_xlim(left, right)
    ax.set_ylim(len(taken) - 0.6, -2.6)
    ax.set_yticks(range(len(taken)), [str(step) for step in taken])
    ax.xaxis.set_major_formatter(lambda power, _: f"$2^{{{power:.0f}}}$")
    ax.set_xlabel(f"magnitude of the elements of {short_name(parameter, 44)}")
    ax.set_ylabel("step")
    ax.grid(axis="y", visible=False)
    return ax


def plot_update_ratios(
    history: Mapping[str, Any],
    ax: Axes | None = None,
    *,
    biases: bool = False,
    steps: slice | None = None,
) -> Axes:
    """Draw how far each step moves each weight, relative to the weight, over time.

    The ratio is norm(update) / norm(weight). As a rough heuristic it should be somewhere around
    1e-3 (Karpathy, CS231n notes, "Neural Networks Part 3", section "Ratio of weights:updates",
    https://cs231n.github.io/neural-networks-3/#ratio): lower, and the learning rate might be too
    low; higher, and it is likely too high. The notes call 1e-2 still healthy for a small network;
    the band drawn here is one decade to either side of the rule of thumb. Biases start at zero
    or small and move far at first, hence they are left out.

    Each grey line is a parameter. Those with the largest and the smallest median are named.

    Args:
        history: The `history` of a `GradientMonitor` made with `update_every=`.
        ax: Where to draw; a new figure if None.
        biases: Whether to draw biases too. A model of nothing but biases is drawn in any case.
        steps: Which rows of the history to take: `slice(-100, None)` is the last hundred.

    Returns:
        The axes.

    Raises:
        TypeError: If `history` is not a mapping, `steps` not a slice or `ax` not an Axes.
        ValueError: If the history is empty, or was recorded without `update_every=`.
        ImportError: If Matplotlib is not installed.

    Example:
        >>> ratio = np.array([[1e-2, 1e-3], [3e-3, 1e-3], [2e-3, 1e-3]])
        >>> history = {"step": np.array([1, 2, 3]), "names": ["0.weight", "2.weight"],
        ...            "norm": ratio, "update_ratio": ratio, "missing": np.isnan(ratio),
        ...            "skipped": np.zeros(3, bool), "total_norm": np.ones(3)}
        >>> ax = plot_update_ratios(history)
        >>> [line.get_label() for line in ax.lines[-2:]]
        ['largest: 0.weight', 'smallest: 2.weight']
    """
    rows = read_history("plot_update_ratios", history, "update_ratio", steps=steps, biases=biases)
    ax = make_axes("plot_update_ratios", ax, 14)
    ratios = np.where(np.isfinite(rows.values) & (rows.values > 0), rows.values, np.nan)
    ax.set_yscale("log")
    ax.set_ylim(*decades(np.append(ratios, [5e-5, 2e-2]), margin=1.3))
    ax.axhspan(1e-4, 1e-2, color=GREEN, alpha=0.15, linewidth=0, label="healthy: 0.0001 to 0.01")
    ax.axhline(1e-3, color=GREEN, linewidth=1.2, linestyle="--")
    known = np.isfinite(ratios)
    drawn = np.flatnonzero(known.any(axis=0))
    order = sorted(drawn, key=lambda column: float(np.median(ratios[known[:, column], column])))
    ends = (
        {order[-1]: (ORANGE, "-", "largest"), order[0]: (BLUE, "-.", "smallest")} if order else {}
    )
    style: Style = {"marker": "o" if len(rows.step) == 1 else None, "markersize": 4}
    faint = {"color": GREY, "linewidth": 0.8, "alpha": min(0.5, max(0.1, 8 / (len(order) or 1)))}
    for column in [*order[1:-1], *ends]:  # those that are named lie on top
        look: Style = {**faint, "linestyle": "-"}
        if column in ends:
            color, line, which = ends[column]
            # The name comes last: of labels that begin with "_" a legend shows nothing.
            label = f"{which}: {short_name(rows.names[column])}"
            look = {"color": color, "linewidth": 1.8, "linestyle": line, "label": label}
        at = known[:, column]
        ax.plot(rows.step[at], ratios[at, column], **style, **look)
    ax.set_xlabel("step")
    ax.set_ylabel("norm(update) / norm(weight)")
    add_legend(ax)
    return ax


def plot_issues(
    issues: Iterable[_Issue], history: Mapping[str, Any], ax: Axes | None = None
) -> Axes:
    """Draw when which issue began in which parameter.

    One row for each parameter that had an issue, in the order of the model; a mark for each
    episode, at its first step, whose shape and color tell the kind. Vertical lines are steps that
    the `GradScaler` skipped.

    Args:
        issues: The `issues` of a `GradientMonitor`: tuples of kind, parameter, step and value.
        history: Its `history`, which gives the order of the parameters and the range of the steps.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        TypeError: If `history` is not a mapping or `ax` not an Axes.
        ValueError: If the history is empty, or an issue names a parameter or kind that it has not.
        ImportError: If Matplotlib is not installed.

    Example:
        >>> norms = np.array([[1.0, 0.1], [3.0, np.nan], [2.0, 0.3]])
        >>> history = {"step": np.array([1, 2, 3]), "names": ["0.weight", "2.weight"],
        ...            "norm": norms, "missing": np.isnan(norms), "skipped": np.zeros(3, bool),
        ...            "total_norm": np.ones(3)}
        >>> ax = plot_issues([("missing", "2.weight", 2, None)], history)
        >>> [label.get_text() for label in ax.get_yticklabels()]
        ['2.weight']
    """
    rows = read_history("plot_issues", history, None)
    issues = list(issues)
    for kind, parameter, *_ in issues:
        if kind not in _KINDS or parameter not in rows.names:
            raise ValueError(
                f"plot_issues: expected issues of kinds {list(_KINDS)} in parameters of the "
                f"history, got {kind!r} in {parameter!r}; pass the issues and the history of one "
                "monitor"
            )
    affected = {parameter for _, parameter, *_ in issues}
    names = [name for name in rows.names if name in affected]
    ax = make_axes("plot_issues", ax, max(len(names), 3))
    steps = [*rows.step[[0, -1]], *(step for _, _, step, _ in issues)]
    first, last = min(steps), max(steps)
    for i, step in enumerate(rows.step[rows.skipped]):
        label = None if i else "skipped step"
        ax.axvline(step, color=GREY, linewidth=1, linestyle=":", label=label)
    size = min(9.0, max(4.0, 0.8 * row_pitch(ax, len(names))))
    for kind, (marker, color) in _KINDS.items():
        found = [(step, names.index(name)) for which, name, step, _ in issues if which == kind]
        if found:
            x, y = zip(*found, strict=True)
            style: Style = {"markersize": size, "linestyle": "none", "markeredgewidth": size / 12}
            ax.plot(x, y, marker, color=color, markeredgecolor="white", label=kind, **style)
    margin = max(0.02 * (last - first), 0.5)
    ax.set_xlim(first - margin, last + margin)
    name_rows(ax, names)
    if not issues:
        ax.text(
            0.5, 0.5, f"no issue in steps {first} to {last}", transform=ax.transAxes, ha="center"
        )
    ax.set_xlabel("step")
    add_legend(ax)
    return ax


def _read_histograms(
    operation: str,
    history: Mapping[str, Any],
    parameter: str,
    dtype: torch.dtype | None,
    loss_scale: float,
) -> tuple[Array, Array]:
    """Return the counts of the histograms that are to be drawn, and their steps."""
    check_history(operation, history, ("step", "names"))
    check_statistic(operation, history, "histogram", ["histogram"])
    if parameter not in history["names"]:
        raise ValueError(
            f"{operation}: expected a parameter among {list(history['names'])!r:.300}, "
            f"got {parameter!r}"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(
            f"{operation}: expected dtype to be floating, as torch.float16, got {dtype!r}"
        )
    if not loss_scale > 0:
        raise ValueError(f"{operation}: expected loss_scale > 0, got {loss_scale!r}")
    steps = np.asarray(history["histogram_step"])
    if not steps.size:
        raise ValueError(
            f"{operation}: no histogram was due yet; take more steps, or lower histogram_every="
        )
    shown = np.unique(np.linspace(0, len(steps) - 1, min(len(steps), _MOST_RIDGES)).round())
    column = list(history["names"]).index(parameter)
    taken = shown.astype(int)
    return np.asarray(history["histogram"])[taken, column], steps[taken]


def _mark_limits(ax: Axes, dtype: torch.dtype, loss_scale: float, left: float, end: float) -> float:
    """Shade what `dtype` cannot hold, or not with all digits; return where the axis begins."""
    info = torch.finfo(dtype)
    name = str(dtype).removeprefix("torch.")
    normal = np.log2(info.smallest_normal / loss_scale)
    zero = normal + np.log2(info.eps) - 1  # half of the smallest subnormal rounds to zero
    top = ax.get_xaxis_transform()
    text: Style = {"transform": top, "va": "top", "size": 8.5, "zorder": 40}
    if normal <= end:
        note = f"{name} keeps all digits down to $2^{{{normal:.0f}}}$,\nleft of this axis"
        ax.text(0.01, 0.98, note, **{**text, "transform": ax.transAxes})
        return left
    left = max(min(left, zero - 6), end)
    if zero > left:
        ax.axvspan(left, zero, color=GREY, alpha=0.3, linewidth=0, zorder=0)
        ax.axvline(zero, color="black", linewidth=1, zorder=30)
        ax.text(zero - 0.2, 0.98, f"{name}: 0", ha="right", **text)
    ax.axvspan(max(zero, left), normal, color=GREY, alpha=0.13, linewidth=0, zorder=0)
    ax.axvline(normal, color="black", linewidth=1, linestyle="--", zorder=30)
    ax.text(normal - 0.2, 0.98, "subnormal", ha="right", **text)
    return left


def _draw_spread(ax: Axes, rows: Array, spread: Array, pitch: float, biases: bool) -> None:
    """Draw the extremes, quartiles and median of some rows, each row `pitch` points high."""
    least, lower, median, upper, most = spread
    color, marker, label = (ORANGE, "s", "biases") if biases else (BLUE, "o", "weights")
    ax.hlines(rows, least, most, color=color, linewidth=min(1.2, pitch / 2), alpha=0.6)
    ax.hlines(rows, lower, upper, color=color, linewidth=min(5.0, 0.6 * pitch))
    style: Style = {"markerfacecolor": "white" if biases else color, "linestyle": "none"}
    style |= {"markersize": min(6.0, 0.85 * pitch), "zorder": 3, "label": label}
    ax.plot(median, rows, marker, color=color, **style)


def _mark_cells(mpl: Any, ax: Axes, edges: Array, nonfinite: Array, missing: Array) -> list[Any]:
    """Hatch what is missing or not finite; return what the legend says of them."""
    handles = []
    empty: Style = {"hatch": "/////", "facecolor": "none", "edgecolor": GREY, "linewidth": 0}
    broken: Style = {"hatch": "xxxx", "facecolor": ORANGE, "edgecolor": "black", "linewidth": 0}
    least = 0.006 * (edges[-1] - edges[0])  # wide enough to be seen
    for flags, style, label in (
        (missing, empty, "no gradient"),
        (nonfinite, broken, "not finite (× where it began)"),
    ):
        if flags.any():
            cells = [
                mpl.patches.Rectangle((start, row - 0.5), max(stop - start, least), 1)
                for row, start, stop in _runs(flags, edges)
            ]
            ax.add_collection(mpl.collections.PatchCollection(cells, **style))
            handles.append(mpl.patches.Patch(**style, label=label))
    if nonfinite.any():
        rows, starts, _ = np.array(_runs(nonfinite, edges)).T
        pitch = row_pitch(ax, missing.shape[1])
        cross: Style = {"markersize": min(6.0, max(1.8, pitch)), "linestyle": "none", "zorder": 4}
        ax.plot(starts, rows, "x", color="black", markeredgewidth=min(1.2, pitch / 4), **cross)
    return handles


def _signed_ticks(threshold: float, most: float) -> list[float]:
    """Return a few powers of ten to both sides of zero, none so near to it that labels touch."""
    powers = np.arange(np.ceil(np.log10(5 * threshold)), np.floor(np.log10(most)) + 1)
    sizes = [10.0**power for power in powers[:: -(-len(powers) // 4) or 1]]
    return [*(-size for size in reversed(sizes)), 0.0, *sizes]


def _draw_ridge(ax: Axes, base: float, edges: Array, heights: Array, age: float) -> None:
    """Draw one histogram upon the line y = base; the older, the lighter, which grey shows too."""
    x, outline = np.repeat(edges, 2)[1:-1], base - np.repeat(heights, 2)
    shade = 0.25 + 0.55 * age
    color = (0.55 * shade, 0.85 * shade, shade**0.5)
    ax.fill_between(x, base, outline, facecolor=color, edgecolor="none", zorder=2 + base)
    outline[outline == base] = np.nan  # no line where there is nothing
    ax.plot(x, outline, color="white", linewidth=0.9, linestyle="-", zorder=2 + base)


def _columns(rows: Rows) -> tuple[Array, Array, Array, Array]:
    """Return the edges of the columns of a heat map, and what each cell shows, [columns, P]."""
    group = -(-len(rows.step) // _MOST_COLUMNS)
    starts = np.arange(0, len(rows.step), group)
    gap = rows.step[-1] - rows.step[-2] if len(rows.step) > 1 else 1
    edges = np.append(rows.step[starts], rows.step[-1] + max(gap, 1)) - 0.5
    finite = np.isfinite(rows.values)
    size = np.where(finite, np.abs(rows.values), -1.0)
    values = np.full((len(starts), len(rows.names)), np.nan)
    for column, start in enumerate(starts):
        most = start + size[start : start + group].argmax(axis=0)
        values[column] = np.take_along_axis(rows.values, most[None], axis=0)[0]
    values[~np.isfinite(values)] = np.nan
    nonfinite = np.logical_or.reduceat(rows.nonfinite, starts, axis=0)
    missing = np.logical_and.reduceat(rows.missing, starts, axis=0)
    return edges, values, nonfinite, missing


def _runs(flags: Array, edges: Array) -> list[tuple[int, float, float]]:
    """Return row, start and end of every unbroken run of True along the columns."""
    padded = np.pad(flags.astype(np.int8), ((1, 1), (0, 0)))
    change = np.diff(padded, axis=0).T
    row, start = np.nonzero(change == 1)
    _, stop = np.nonzero(change == -1)
    return list(zip(row.tolist(), edges[start].tolist(), edges[stop].tolist(), strict=True))


def _color_scale(mpl: Any, statistic: str, values: Array) -> tuple[Any, Any]:
    """Return the norm and the color map of a statistic."""
    finite = values[np.isfinite(values)]
    size = np.abs(finite[finite != 0])
    most = size.max() if size.size else 1.0
    sequence = mpl.colormaps["viridis"].with_extremes(under="black", bad=(0, 0, 0, 0))
    diverging = mpl.colormaps["PuOr_r"].with_extremes(bad=(0, 0, 0, 0))
    scale, limits = STATISTICS[statistic].scale, STATISTICS[statistic].limits
    if scale == "signed":
        threshold = np.quantile(size, 0.1) if size.size else 0.1
        threshold = min(max(threshold, 1e-6 * most, TINY), most / 2)
        return mpl.colors.SymLogNorm(threshold, vmin=-most, vmax=most, base=10), diverging
    if scale == "linear":
        low, high = limits[0], most if limits[1] is None else limits[1]
        return mpl.colors.Normalize(low, high), diverging if low < 0 else sequence
    low, high = (size.min(), most) if size.size else (1e-3, 1.0)
    low, high = np.clip([low, high], TINY, HUGE).tolist()
    return mpl.colors.LogNorm(low / 1.1 if low == high else low, max(high, low * 1.1)), sequence
