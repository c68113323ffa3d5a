"""Figures with controls that work in a notebook and on a static page.

An `Explorer` is drawn in advance, every state a small SVG picture, and carries the script that
switches between the pictures: it needs no kernel and no network.
"""

from __future__ import annotations

import importlib.resources
import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from html import escape
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote

from autograd_lib.core.optional import optional

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Explorer", "explore"]

_MOST_FRAMES = 400  # some 4 KiB each: more would make a page that is slow to load


class Interactive:
    """A mixin for figures that carry their controls and a script: a subclass defines `to_html`."""

    _output: Any = None  # the live form, once it was asked for

    def to_html(self) -> str:
        raise NotImplementedError

    def to_widget(self) -> Any:
        """Return the live form, an ipywidgets output, for a notebook with a kernel.

        Raises:
            ImportError: if ipywidgets is not installed.
        """
        ipywidgets = optional(f"{type(self).__name__}.to_widget", "ipywidgets")
        self._output = self._output or ipywidgets.Output()
        self._redraw()
        return self._output

    def _redraw(self) -> None:
        data = {"text/html": self.to_html(), "text/plain": repr(self)}
        self._output.outputs = ({"output_type": "display_data", "data": data, "metadata": {}},)

    def _repr_mimebundle_(self, **_: Any) -> dict[str, Any]:
        bundle: dict[str, Any] = {"text/plain": repr(self), "text/html": self.to_html()}
        try:
            live = self.to_widget()
        except ImportError:
            return bundle  # the page's form needs no package
        return {**live._repr_mimebundle_(), **bundle}


class Control(NamedTuple):
    """A menu of strings, which starts at the first, or a slider, which starts in the middle."""

    name: str
    labels: list[str]
    is_menu: bool

    @property
    def start(self) -> int:
        return 0 if self.is_menu else len(self.labels) // 2


class Explorer(Interactive):
    """A figure with controls, as `explore` makes it; a notebook displays it by itself.

    Attributes:
        controls: name, labels and kind of each.
        frames: the pictures as SVG text, in the order of `itertools.product` over the controls.
        alts: what one sees in each picture, in words, in the same order.
    """

    def __init__(
        self, controls: Sequence[Control], frames: Sequence[str], alts: Sequence[str]
    ) -> None:
        self.controls, self.frames, self.alts = tuple(controls), tuple(frames), tuple(alts)

    def __repr__(self) -> str:
        controls = ", ".join(f"{c.name}: {len(c.labels)} values" for c in self.controls)
        return f"Explorer({controls})"

    def to_html(self) -> str:
        """Return the figure as HTML that stands alone: pictures, controls and script."""
        # Most lines of the pictures are the same in all of them: each is written once.
        lines: dict[str, int] = {}
        drawn = map(str.splitlines, self.frames)
        frames = [[lines.setdefault(line, len(lines)) for line in frame] for frame in drawn]
        labels = [control.labels for control in self.controls]
        state = {"labels": labels, "lines": list(lines), "frames": frames, "alts": self.alts}
        start = 0
        for control in self.controls:
            start = start * len(control.labels) + control.start
        url = "data:image/svg+xml," + quote(self.frames[start])
        script = importlib.resources.files("autograd_lib.report").joinpath("explorer.js")
        return (
            '<figure class="frames"><!-- frames -->'
            f'<img alt="{escape(self.alts[start])}" src="{url}">'
            f'<div class="frames-controls">{"".join(map(_html_control, self.controls))}</div>'
            f'<script type="application/json">{script_json(state)}</script>'
            f"<script>{script.read_text(encoding='utf-8')}</script><!-- /frames --></figure>"
        )


def script_json(state: dict[str, Any]) -> str:
    """Write data for a script element, so that nothing in it ends the element."""
    return json.dumps(state, separators=(",", ":")).replace("<", "\\u003c")


def _html_control(control: Control) -> str:
    name, labels = escape(control.name), [escape(label) for label in control.labels]
    if control.is_menu:
        options = "".join(f'<option value="{i}">{label}</option>' for i, label in enumerate(labels))
        return f"<label>{name} <select>{options}</select></label>"
    label = labels[control.start]
    return (
        f'<label>{name} <input type="range" min="0" max="{len(labels) - 1}" '
        f'value="{control.start}" aria-valuetext="{label}"><output>{label}</output></label>'
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
        TypeError: if `draw` returns something other than a figure, or a control has no values, or
            they are neither all numbers nor all strings.
        ValueError: if there is no control, or there are more than 400 combinations.

    Example:
        >>> from matplotlib.figure import Figure
        >>> def draw(power):
        ...     figure = Figure()
        ...     _ = figure.subplots().plot([0, 1, 2], [0, 1, 2**power])
        ...     return figure
        >>> explore(draw, alt=lambda power: f"A curve of power {power} through 0.", power=[1, 2])
        Explorer(power: 2 values)
    """
    choices = {name: list(chosen) for name, chosen in values.items()}
    controls = [_control(name, chosen) for name, chosen in choices.items()]
    count = math.prod(map(len, choices.values()))
    if not controls or count > _MOST_FRAMES:
        raise ValueError(
            f"explore: expected at least one control, as in explore(draw, x=[0, 1]), and at most "
            f"{_MOST_FRAMES} pictures, got {count} combinations of values for {len(controls)}"
        )
    each = itertools.product(*choices.values())
    states = [dict(zip(choices, chosen, strict=True)) for chosen in each]
    frames = [_svg(draw(**state)) for state in states]
    return Explorer(controls, frames, [alt(**state) for state in states])


def _control(name: str, values: list[Any]) -> Control:
    is_menu = all(isinstance(value, str) for value in values)
    if not values or not (is_menu or all(isinstance(value, Real) for value in values)):
        raise TypeError(
            f"explore: expected {name!r} to be numbers or strings, at least one, got {values!r}"
        )
    return Control(name, [v if is_menu else f"{v:.10g}".replace("-", "−") for v in values], is_menu)


def _svg(figure: Figure) -> str:
    """Draw a figure as SVG without a background, so that it suits a light page and a dark one."""
    plt = optional("explore", "matplotlib.pyplot")
    if not hasattr(figure, "savefig"):
        raise TypeError(
            f"explore: draw must return a matplotlib Figure, got {type(figure).__name__}; "
            "end it with `return figure`"
        )
    text = io.StringIO()
    try:
        # Text stays text: a tenth of the size of outlines. The salt makes ids reproducible.
        with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "autograd_lib"}):
            figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    finally:
        plt.close(figure)  # pyplot keeps its figures open until told
    # Else a browser would draw one space for several.
    return text.getvalue().replace("<text ", '<text xml:space="preserve" ')
