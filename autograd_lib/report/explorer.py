"""Interactive figures that work twice: with a kernel in a notebook, and in a page without one.

An `Explorer` is drawn in advance, every state a small SVG picture. In a notebook ipywidgets
switches between the pictures; in static HTML a few lines of script do, which the page carries
itself: no kernel, no network, no widget manager. A `GradientDashboard` holds more states than can
be drawn: it carries the numbers, and one script draws them, live and in static HTML alike.
"""

from __future__ import annotations

import base64
import importlib.resources
import importlib.util
import io
import itertools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from numbers import Real
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import quote

import numpy as np
import numpy.typing as npt

from autograd_lib.report.plots import classify, common_prefix

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Explorer", "GradientDashboard", "explore"]

Array = npt.NDArray[Any]

_MOST_FRAMES = 400  # some 4 KiB each: more would make a page that is slow to load

# Statistics that a dashboard shows, in the order of its menu, with the scale of each.
_SCALES = {
    "norm": "log",
    "std": "log",
    "abs_max": "log",
    "update_ratio": "log",
    "mean": "signed",
    "min": "signed",
    "max": "signed",
    "zero_fraction": "linear",
    "cosine": "linear",
    "nan_count": "linear",
    "inf_count": "linear",
}
_RANGES = {"zero_fraction": (0.0, 1.0), "cosine": (-1.0, 1.0)}
_MOST_NUMBERS = 45_000  # of one dashboard: 240 KB of a page
_MOST_PARAMETERS = 200
_MOST_DECADES = 14
_SHORTEST_WAIT = 0.5  # seconds between two redraws
_LARGEST_SHARE = 0.05  # of the time that redraws may take
_keys = itertools.count(1)

# Runs once for each figure, on the element before the script itself.
_SCRIPT = """(() => {
  const figure = document.currentScript.closest("figure");
  const {shape, labels, lines, frames, alts} =
    JSON.parse(figure.querySelector("script").textContent);
  const picture = figure.querySelector("img");
  const controls = [...figure.querySelectorAll("input, select")];
  const show = () => {
    const at = controls.reduce((index, control, i) => index * shape[i] + Number(control.value), 0);
    const svg = frames[at].map(line => lines[line]).join("\\n");
    picture.src = "data:image/svg+xml," + encodeURIComponent(svg);
    picture.alt = alts[at];
    controls.forEach((control, i) => {
      const label = labels[i][control.value];
      if (control.type !== "range") return;
      control.setAttribute("aria-valuetext", label);
      control.nextElementSibling.value = label;
    });
  };
  controls.forEach(control => control.addEventListener("input", show));
  show();
})();"""


class Explorer:
    """A figure with controls, as `explore` makes it; a notebook displays it by itself.

    Attributes:
        names: the names of the controls.
        values: for each control the values that it can take.
        frames: the pictures as SVG text, in the order of `itertools.product(*values)`.
        alts: what one sees in each picture, in words, in the same order.
    """

    def __init__(
        self,
        names: Sequence[str],
        values: Sequence[Sequence[Any]],
        frames: Sequence[str],
        alts: Sequence[str],
        start: Sequence[int],
    ) -> None:
        self.names, self.values = tuple(names), tuple(tuple(v) for v in values)
        self.frames, self.alts, self._start = tuple(frames), tuple(alts), tuple(start)

    def __repr__(self) -> str:
        controls = ", ".join(
            f"{name}: {len(v)} values" for name, v in zip(self.names, self.values, strict=True)
        )
        return f"Explorer({controls})"

    @property
    def _labels(self) -> list[list[str]]:
        return [[v if isinstance(v, str) else f"{v:.10g}" for v in vs] for vs in self.values]

    def _index(self, positions: Iterable[int]) -> int:
        index = 0
        for position, values in zip(positions, self.values, strict=True):
            index = index * len(values) + position
        return index

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return _both_forms(self)

    def to_html(self) -> str:
        """Return the figure as HTML that stands alone: pictures, controls and script."""
        first = self._index(self._start)
        # Most lines of the pictures are the same in all of them: each is written once.
        lines: dict[str, int] = {}
        frames = [
            [lines.setdefault(line, len(lines)) for line in frame.splitlines()]
            for frame in self.frames
        ]
        state = {
            "shape": [len(v) for v in self.values],
            "labels": self._labels,
            "lines": list(lines),
            "frames": frames,
            "alts": self.alts,
        }
        controls = "".join(
            _html_control(name, values, labels, start)
            for name, values, labels, start in zip(
                self.names, self.values, self._labels, self._start, strict=True
            )
        )
        data = json.dumps(state).replace(
            "<", "\\u003c"
        )  # so that nothing closes the script element
        return (
            '<figure class="frames"><!-- frames -->'
            f'<img alt="{escape(self.alts[first])}" '
            f'src="{_data_url(self.frames[first])}">'
            f'<div class="frames-controls">{controls}</div>'
            f'<script type="application/json">{data}</script>'
            f"<script>{_SCRIPT}</script><!-- /frames --></figure>"
        )

    def to_widget(self) -> Any:
        """Return the figure as an ipywidgets box, for a notebook with a kernel.

        Raises:
            ImportError: if ipywidgets is not installed.
        """
        ipywidgets = _ipywidgets("explore")
        picture = ipywidgets.HTML()
        controls = [
            (ipywidgets.Dropdown if isinstance(values[0], str) else ipywidgets.SelectionSlider)(
                options=[(label, i) for i, label in enumerate(labels)],
                value=start,
                description=name,
            )
            for name, values, labels, start in zip(
                self.names, self.values, self._labels, self._start, strict=True
            )
        ]

        def show(_: Any = None) -> None:
            at = self._index(control.value for control in controls)
            picture.value = (
                f'<img alt="{escape(self.alts[at])}" src="{_data_url(self.frames[at])}">'
            )

        for control in controls:
            control.observe(show, "value")
        show()
        return ipywidgets.VBox([picture, *controls])


def _both_forms(figure: Explorer | GradientDashboard) -> dict[str, Any]:
    """What a notebook takes of a figure, the live form, and what a page without a kernel takes."""
    bundle: dict[str, Any] = {"text/plain": repr(figure), "text/html": figure.to_html()}
    try:
        live = figure.to_widget()
    except ImportError:
        return bundle  # the page's own form needs no package
    return {**live._repr_mimebundle_(), **bundle}


def _ipywidgets(operation: str) -> Any:
    try:
        import ipywidgets  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            f"{operation}: the live form needs ipywidgets: pip install ipywidgets"
        ) from error
    return ipywidgets


def _data_url(svg: str) -> str:
    return "data:image/svg+xml," + quote(svg)


def _html_control(name: str, values: Sequence[Any], labels: Sequence[str], start: int) -> str:
    if isinstance(values[0], str):
        options = "".join(
            f'<option value="{i}"{" selected" if i == start else ""}>{escape(label)}</option>'
            for i, label in enumerate(labels)
        )
        return f"<label>{escape(name)} <select>{options}</select></label>"
    return (
        f'<label>{escape(name)} <input type="range" min="0" max="{len(values) - 1}" '
        f'value="{start}" aria-valuetext="{escape(labels[start])}">'
        f"<output>{escape(labels[start])}</output></label>"
    )


def explore(
    draw: Callable[..., Figure],
    *,
    alt: Callable[..., str],
    **values: Sequence[Any],
) -> Explorer:
    """Make a figure with a control for each keyword: a slider for numbers, a menu for strings.

    Every combination of values is drawn once, now, and its figure closed.

    Args:
        draw: called as `draw(name=value, ...)`; returns a Matplotlib figure.
        alt: called likewise; says in words what one sees, for readers who do not see it.
        **values: for each control the values that it can take, all numbers or all strings. A
            slider starts in the middle, a menu at its first entry.

    Returns:
        An `Explorer`, which a notebook and a built page display by themselves.

    Raises:
        TypeError: if `draw` returns something other than a figure, or values of one control are
            neither all numbers nor all strings.
        ValueError: if there is no control, one has no value, or there are more than 400
            combinations.
        ImportError: if Matplotlib is not installed.

    Example:
        >>> from matplotlib.figure import Figure
        >>> def draw(power):
        ...     figure = Figure()
        ...     _ = figure.subplots().plot([0, 1, 2], [0, 1, 2**power])
        ...     return figure
        >>> explore(draw, alt=lambda power: f"A curve of power {power} through 0.", power=[1, 2])
        Explorer(power: 2 values)
    """
    values = {name: _as_list(name, choices) for name, choices in values.items()}
    _check_values(values)
    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("explore: drawing needs Matplotlib: pip install matplotlib")
    combinations = [
        dict(zip(values, combination, strict=True))
        for combination in itertools.product(*values.values())
    ]
    frames = [_svg(draw(**combination)) for combination in combinations]
    alts = [_words(alt(**combination)) for combination in combinations]
    start = [0 if isinstance(v[0], str) else len(v) // 2 for v in values.values()]
    return Explorer(list(values), list(values.values()), frames, alts, start)


def _as_list(name: str, choices: Any) -> list[Any]:
    if not isinstance(choices, Iterable):
        raise TypeError(f"explore: expected {name!r} to be a list of values, got {choices!r}")
    return list(choices)


def _words(alt: object) -> str:
    if not isinstance(alt, str):
        raise TypeError(
            f"explore: expected alt to return a string, got {type(alt).__name__}; say in words "
            "what one sees"
        )
    return alt


def _check_values(values: dict[str, Sequence[Any]]) -> None:
    if not values:
        raise ValueError("explore: expected at least one control, as in explore(draw, x=[0, 1])")
    count = 1
    for name, choices in values.items():
        count *= len(choices)
        if not len(choices):
            raise ValueError(f"explore: {name!r} has no values; give it at least one")
        strings = sum(isinstance(choice, str) for choice in choices)
        numbers = sum(isinstance(choice, Real) for choice in choices)
        if len(choices) not in (strings, numbers):
            raise TypeError(
                f"explore: {name!r} must be all numbers or all strings, got {choices!r}"
            )
    if count > _MOST_FRAMES:
        raise ValueError(
            f"explore: {count} combinations of values are more than the {_MOST_FRAMES} pictures "
            "that a page can carry; give fewer values"
        )


def _svg(figure: Figure) -> str:
    """Draw a figure as SVG without a background, so that it suits a light page and a dark one."""
    import matplotlib as mpl  # noqa: PLC0415
    from matplotlib.figure import Figure as FigureClass  # noqa: PLC0415

    if not isinstance(figure, FigureClass):
        raise TypeError(
            f"explore: draw must return a matplotlib Figure, got {type(figure).__name__}; "
            "end it with `return figure`"
        )
    text = io.StringIO()
    try:
        # Text stays text: a tenth of the size of outlines. The salt keeps ids as they were.
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "autograd_lib"}):
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    finally:
        if figure.canvas.manager is not None:  # one of pyplot's, which keeps it open otherwise
            import matplotlib.pyplot as plt  # noqa: PLC0415

            plt.close(figure)
    return text.getvalue()


class Monitor(Protocol):
    """What a dashboard reads of a `GradientMonitor`."""

    @property
    def history(self) -> Mapping[str, Any]:
        """The statistics of the steps so far."""

    @property
    def issues(self) -> Sequence[tuple[str, str, int, float | None]]:
        """Kind, parameter, first step and value of every issue."""


class GradientDashboard:
    """A view of a monitor's history: live during training, and the same on a page without a kernel.

    Above stands the total norm over the steps, below it a heat map of parameters by steps for the
    statistic that is chosen, beside it the values at the step that is chosen, as bars over the
    range that each parameter had. Hovering names the parameter and gives the value, a click
    chooses it; menus and a slider do the same from the keyboard. Issues are marked where they
    began, and steps that the `GradScaler` skipped above the heat map.

    Display it in a cell of its own and call `update` in the training loop. It redraws at most twice
    a second, and no more often than costs a twentieth of the time; each redraw reads the history,
    which synchronizes with the device. The controls belong to the page, and answer while the
    kernel is busy. Nothing runs in the background. What a saved notebook or a built page shows is
    the view at the moment of display: display it once more after training.

    Of a long history `frames` steps are shown, evenly spaced but for those where an issue began; of
    more than 200 parameters those with issues, and others evenly spaced. Fewer steps are shown
    where the page would become heavy otherwise, and the view says what it leaves out. A statistic
    that is recorded every few steps shows its latest value.

    Args:
        monitor: A `GradientMonitor`, or any object with its `history` and `issues`.
        statistic: What is shown first, a key of the history.
        frames: How many steps to show at most.

    Raises:
        TypeError: If `monitor` has no history or no issues.
        ValueError: If `frames` is not positive or the history has no such statistic.

    Example:
        >>> from types import SimpleNamespace
        >>> norms = np.array([[1.0, 0.1], [3.0, np.nan], [2.0, 0.3]])
        >>> history = {"step": np.array([1, 2, 3]), "names": ["0.weight", "2.weight"],
        ...            "norm": norms, "missing": np.isnan(norms), "skipped": np.zeros(3, bool),
        ...            "total_norm": np.array([1.0, 3.0, 2.0])}
        >>> monitor = SimpleNamespace(history=history, issues=[("missing", "2.weight", 2, None)])
        >>> GradientDashboard(monitor)
        GradientDashboard(2 parameters, steps 1 to 3)
    """

    def __init__(self, monitor: Monitor, *, statistic: str = "norm", frames: int = 60) -> None:
        missing = [name for name in ("history", "issues") if not hasattr(monitor, name)]
        if missing:
            raise TypeError(
                f"GradientDashboard: expected a GradientMonitor, got {type(monitor).__name__} "
                f"without {' and '.join(missing)}; pass the monitor itself, not its history"
            )
        if not isinstance(frames, int) or frames < 1:
            raise ValueError(f"GradientDashboard: expected frames >= 1, got {frames!r}")
        known = [name for name in _SCALES if name in monitor.history]
        if statistic not in known:
            raise ValueError(
                f"GradientDashboard: expected a statistic among {known}, got {statistic!r}; the "
                "monitor records others where its options ask for them"
            )
        self._monitor, self._statistic, self._frames = monitor, statistic, frames
        self._output: Any = None
        self._key = ""
        self._due = 0.0

    def __repr__(self) -> str:
        history = self._monitor.history
        if not len(history["step"]):
            return "GradientDashboard(no step yet)"
        first, last = (int(history["step"][at]) for at in (0, -1))
        return f"GradientDashboard({len(history['names'])} parameters, steps {first} to {last})"

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        return _both_forms(self)

    def update(self, *, force: bool = False) -> None:
        """Redraw the live form, if there is one on display and a redraw is due.

        Args:
            force: Whether to redraw in any case, as after the last step.
        """
        start = time.monotonic()
        if self._output is None or (start < self._due and not force):
            return
        self._redraw()
        end = time.monotonic()
        self._due = end + max(_SHORTEST_WAIT, (end - start) / _LARGEST_SHARE)

    def to_html(self) -> str:
        """Return the view of the history so far as HTML that stands alone."""
        return self._html("")

    def to_widget(self) -> Any:
        """Return the live form, an ipywidgets output that `update` redraws.

        Raises:
            ImportError: If ipywidgets is not installed.
        """
        ipywidgets = _ipywidgets("GradientDashboard")
        if self._output is None:
            self._output = ipywidgets.Output()
            self._key = f"dashboard-{next(_keys)}"  # under which the page remembers what is chosen
        self._redraw()
        return self._output

    def _redraw(self) -> None:
        data = {"text/html": self._html(self._key), "text/plain": repr(self)}
        self._output.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)

    def _html(self, key: str) -> str:
        history = self._monitor.history
        body = "<p>No step was recorded yet.</p>"
        if len(history["step"]):
            state = _dashboard_state(history, self._monitor.issues, self._frames)
            state |= {"statistic": self._statistic, "key": key}
            text = json.dumps(state, separators=(",", ":")).replace("<", "\\u003c")
            template = importlib.resources.files("autograd_lib.report").joinpath("dashboard.html")
            body = template.read_text(encoding="utf-8").replace("DATA", text, 1)
        return f'<figure class="dashboard"><!-- frames -->{body}<!-- /frames --></figure>'


def _dashboard_state(
    history: Mapping[str, Any], issues: Sequence[Any], frames: int
) -> dict[str, Any]:
    """Everything that the script of a dashboard draws, ready for JSON."""
    statistics = [name for name in _SCALES if name in history]
    steps, names = np.asarray(history["step"]), list(history["names"])
    row_of = {int(step): row for row, step in enumerate(steps)}
    column_of = {name: column for column, name in enumerate(names)}
    begun = [(i[0], column_of[i[1]], row_of[i[2]]) for i in issues if i[2] in row_of]
    columns = _choose(len(names), _MOST_PARAMETERS, {column for _, column, _ in begun})
    most = max(1, min(frames, _MOST_NUMBERS // (len(statistics) * len(columns))))
    rows = _choose(len(steps), most, {row for *_, row in begun})
    norm, missing = (np.asarray(history[key])[rows][:, columns] for key in ("norm", "missing"))
    nonfinite, absent = classify(norm, missing, np.asarray(history["total_norm"])[rows])
    shown = {column: at for at, column in enumerate(columns.tolist())}
    return {
        "names": [names[column] for column in columns],
        "common": common_prefix(names),
        "steps": steps[rows].tolist(),
        "skipped": np.asarray(history["skipped"])[rows].astype(int).tolist(),
        "cells": _base64(np.where(absent, 1, np.where(nonfinite, 2, 0)), "u1"),
        "total": _base64(np.asarray(history["total_norm"])[rows], "<f4"),
        "statistics": [
            _scaled(name, np.asarray(history[name]), rows, columns) for name in statistics
        ],
        "issues": [
            (kind, shown[column], int(np.abs(rows - row).argmin()))
            for kind, column, row in begun
            if column in shown
        ],
        "note": _left_out(
            ("steps", len(rows), len(steps)), ("parameters", len(columns), len(names))
        ),
    }


def _choose(count: int, most: int, wanted: set[int]) -> Array:
    """Choose `most` of `count` places, evenly spaced, but moved to those wanted near them."""
    if count <= most:
        return np.arange(count)
    chosen = np.unique(np.linspace(0, count - 1, most).round().astype(int))
    free = set(range(len(chosen) - 1)) - set(np.flatnonzero(np.isin(chosen, list(wanted))).tolist())
    for place in sorted(wanted - set(chosen.tolist())):
        if free:
            nearest = min(free, key=lambda at: abs(int(chosen[at]) - place))
            chosen[nearest] = place
            free.remove(nearest)
    return np.sort(chosen)


def _scaled(name: str, values: Array, rows: Array, columns: Array) -> dict[str, Any]:
    """One statistic at the steps and parameters that are shown, and the ends of its scale."""
    values = np.real(values[:, columns]).astype(np.float64)  # a complex gradient's mean is complex
    # What is recorded at some steps only stands until it is recorded again.
    known = ~np.isnan(values).all(axis=1)
    latest = np.maximum.accumulate(np.where(known, np.arange(len(values)), 0))
    values = values[latest[rows]]
    size = np.abs(values[np.isfinite(values) & (values != 0)])
    least, most = (size.min(), size.max()) if size.size else (0.1, 1.0)
    scale, threshold = _SCALES[name], 0.0
    if scale == "log":
        high = float(np.ceil(np.log10(most)))
        low = min(max(float(np.floor(np.log10(least))), high - _MOST_DECADES), high - 1)
    elif scale == "linear":
        low, high = _RANGES.get(name, (0.0, float(most)))
    else:
        low, high = -float(most), float(most)
        threshold = float(np.quantile(size, 0.1)) if size.size else high
    return {
        "key": name,
        "label": name.replace("_", " "),
        "scale": scale,
        "low": low,
        "high": high,
        "threshold": threshold,
        "values": _base64(values, "<f4"),
    }


def _base64(numbers: Array, dtype: str) -> str:
    with np.errstate(over="ignore"):  # beyond float32 a number is drawn as infinite
        return base64.b64encode(numbers.astype(dtype).tobytes()).decode()


def _left_out(*counts: tuple[str, int, int]) -> str:
    parts = [f"{shown} of {count} {what}" for what, shown, count in counts if shown < count]
    return f"{' and '.join(parts)} shown" if parts else ""
