"""Figures with controls that work in a notebook and on a static page.

An `Explorer` is drawn in advance, every state a small SVG picture. In a notebook ipywidgets
switches between the pictures; on a static page a few lines of script do, which the page carries
itself: no kernel, no network, no widget manager.
"""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from html import escape
from numbers import Real
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Explorer", "explore"]

_MOST_FRAMES = 400  # some 4 KiB each: more would make a page that is slow to load

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


class Interactive(ABC):
    """A figure with a live form for notebooks and a form for pages without a kernel."""

    @abstractmethod
    def to_html(self) -> str:
        """Return the figure as HTML that stands alone."""

    @abstractmethod
    def to_widget(self) -> Any:
        """Return the figure as an ipywidgets object, for a notebook with a kernel.

        Raises:
            ImportError: if ipywidgets is not installed.
        """

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": self.to_html()}
        try:
            live = self.to_widget()
        except ImportError:
            return bundle  # the page's form needs no package
        return {**live._repr_mimebundle_(), **bundle}


class Explorer(Interactive):
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

    def _controls(self) -> Iterable[tuple[str, Sequence[Any], list[str], int]]:
        return zip(self.names, self.values, self._labels, self._start, strict=True)

    def _picture(self, positions: Iterable[int]) -> str:
        index = 0
        for position, values in zip(positions, self.values, strict=True):
            index = index * len(values) + position
        url = "data:image/svg+xml," + quote(self.frames[index])
        return f'<img alt="{escape(self.alts[index])}" src="{url}">'

    def to_html(self) -> str:
        """Return the figure as HTML that stands alone: pictures, controls and script."""
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
        controls = "".join(_html_control(*control) for control in self._controls())
        return (
            '<figure class="frames"><!-- frames -->'
            f"{self._picture(self._start)}"
            f'<div class="frames-controls">{controls}</div>'
            f'<script type="application/json">{script_json(state)}</script>'
            f"<script>{_SCRIPT}</script><!-- /frames --></figure>"
        )

    def to_widget(self) -> Any:
        """Return the figure as an ipywidgets box, for a notebook with a kernel.

        Raises:
            ImportError: if ipywidgets is not installed.
        """
        ipywidgets = import_ipywidgets("explore")
        picture = ipywidgets.HTML()
        controls = [
            (ipywidgets.Dropdown if isinstance(values[0], str) else ipywidgets.SelectionSlider)(
                options=[(label, i) for i, label in enumerate(labels)],
                value=start,
                description=name,
            )
            for name, values, labels, start in self._controls()
        ]

        def show(_: Any = None) -> None:
            picture.value = self._picture(control.value for control in controls)

        for control in controls:
            control.observe(show, "value")
        show()
        return ipywidgets.VBox([picture, *controls])


def script_json(state: dict[str, Any]) -> str:
    """Write data for a script element, so that nothing in it ends the element."""
    return json.dumps(state, separators=(",", ":")).replace("<", "\\u003c")


def import_ipywidgets(operation: str) -> Any:
    try:
        import ipywidgets  # noqa: PLC0415
    except ImportError as error:
        raise ImportError(
            f"{operation}: the live form needs ipywidgets: pip install ipywidgets"
        ) from error
    return ipywidgets


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
    values = _check_values(values)
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


def _words(alt: object) -> str:
    if not isinstance(alt, str):
        raise TypeError(
            f"explore: expected alt to return a string, got {type(alt).__name__}; say in words "
            "what one sees"
        )
    return alt


def _check_values(values: dict[str, Any]) -> dict[str, Sequence[Any]]:
    if not values:
        raise ValueError("explore: expected at least one control, as in explore(draw, x=[0, 1])")
    for name, choices in values.items():
        if not isinstance(choices, Iterable):
            raise TypeError(f"explore: expected {name!r} to be a list of values, got {choices!r}")
    lists: dict[str, Sequence[Any]] = {name: list(choices) for name, choices in values.items()}
    for name, choices in lists.items():
        if not choices:
            raise ValueError(f"explore: {name!r} has no values; give it at least one")
        if not any(all(isinstance(c, kind) for c in choices) for kind in (str, Real)):
            raise TypeError(
                f"explore: {name!r} must be all numbers or all strings, got {choices!r}"
            )
    count = math.prod(map(len, lists.values()))
    if count > _MOST_FRAMES:
        raise ValueError(
            f"explore: {count} combinations of values are more than the {_MOST_FRAMES} pictures "
            "that a page can carry; give fewer values"
        )
    return lists


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
        # Text stays text: a tenth of the size of outlines. The salt makes ids reproducible.
        with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "autograd_lib"}):
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    finally:
        if figure.canvas.manager is not None:  # pyplot keeps its figures open until told
            import matplotlib.pyplot as plt  # noqa: PLC0415

            plt.close(figure)
    return text.getvalue()
