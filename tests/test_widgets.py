"""autograd_lib.widgets: the pictures, the controls, the page's own form and the live one."""

from __future__ import annotations

import itertools
import json
import re
import sys
from html.parser import HTMLParser
from urllib.parse import unquote

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from autograd_lib import Explorer, explore


def draw(x: float, curve: str) -> Figure:
    figure = Figure(figsize=(3, 2))
    figure.subplots().plot([0, x], [0, 1], label=curve)
    figure.suptitle(f"{curve} at {x}")
    return figure


def make() -> Explorer:
    return explore(
        draw,
        alt=lambda x, curve: f'A line "{curve}" that ends at {x}, <rising>.',
        x=[0.5, 1.0, 2.0],
        curve=["tanh", "</script>"],
    )


class Tags(HTMLParser):
    """The elements of a page with their attributes, and the text of the JSON script."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.data = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.elements[-1] == ("script", {"type": "application/json"}):
            self.data += data


def test_one_picture_for_each_combination() -> None:
    explorer = make()
    assert repr(explorer) == "Explorer(x: 3 values, curve: 2 values)"
    combinations = list(itertools.product([0.5, 1.0, 2.0], ["tanh", "</script>"]))
    assert len(explorer.frames) == len(combinations)
    for frame, alt, (x, curve) in zip(explorer.frames, explorer.alts, combinations, strict=True):
        title = f"{curve} at {x}".replace("<", "&lt;").replace(">", "&gt;")
        assert title in frame
        assert f"ends at {x}," in alt


def test_html_stands_alone() -> None:
    html = make().to_html()
    tags = Tags(html)
    assert [tag for tag, _ in tags.elements] == [
        *("figure", "img", "div", "label", "input", "output"),
        *("label", "select", "option", "option", "script", "script"),
    ]
    state = json.loads(tags.data)
    assert state["shape"] == [3, 2]
    assert len(state["frames"]) == len(state["alts"]) == 6
    picture = tags.elements[1][1]
    assert picture["alt"] == 'A line "tanh" that ends at 1.0, <rising>.'
    pictures = ["\n".join(state["lines"][i] for i in frame) for frame in state["frames"]]
    assert unquote(picture["src"]) == "data:image/svg+xml," + make().frames[2]
    assert pictures == [frame.rstrip("\n") for frame in make().frames]
    assert not re.search(r"""(?:src|href|url)[=(]["']?https?:|@import""", html)


def test_what_pictures_share_is_written_once() -> None:
    explorer = explore(lambda x: draw(x, "line"), alt=lambda x: f"x={x}", x=np.linspace(1, 2, 60))
    assert len(explorer.to_html()) < 0.4 * sum(map(len, explorer.frames))


def test_live_form_shows_what_the_controls_say() -> None:
    explorer = make()
    picture, slider, menu = explorer.to_widget().children
    assert "that ends at 1.0" in picture.value
    slider.value, menu.value = 2, 1
    assert "&lt;/script&gt;" in picture.value
    assert "that ends at 2.0" in picture.value
    bundle = explorer._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"}


def test_without_ipywidgets_the_page_form_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = make()
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert set(explorer._repr_mimebundle_()) == {"text/plain", "text/html"}
    with pytest.raises(ImportError, match=r"autograd_lib\[widgets\]"):
        explorer.to_widget()


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"autograd_lib\[plot\]"):
        make()


def test_drawing_is_the_same_at_every_run() -> None:
    """Otherwise a rebuilt page would differ from the last for no reason."""
    assert make().frames == make().frames


def test_figures_are_closed_and_have_no_background() -> None:
    def pyplot(x: float) -> Figure:
        figure, axes = plt.subplots()
        axes.plot([0, x])
        return figure

    explorer = explore(pyplot, alt=lambda x: f"x={x}", x=np.linspace(0, 1, 3))
    assert plt.get_fignums() == []
    assert "fill: #ffffff" not in explorer.frames[0]


def test_values_may_be_numpy_integers() -> None:
    explorer = explore(lambda n: draw(n, "line"), alt=lambda n: f"line to {n}", n=np.arange(1, 4))
    assert explorer.alts == ("line to 1", "line to 2", "line to 3")


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({}, ValueError, "at least one control"),
        ({"x": []}, ValueError, "'x' has no values"),
        ({"x": 3}, TypeError, "'x' to be a list of values, got 3"),
        ({"x": [1, "a"]}, TypeError, "'x' must be all numbers or all strings"),
        ({"x": range(21), "y": range(20)}, ValueError, "420 combinations of values are more than"),
    ],
)
def test_bad_values(values: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        explore(draw, alt=lambda **_: "", **values)


def test_draw_must_return_a_figure() -> None:
    with pytest.raises(TypeError, match="draw must return a matplotlib Figure, got NoneType"):
        explore(lambda x: None, alt=lambda x: "", x=[1.0])


def test_random_state_is_left_alone() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    make()
    assert torch.equal(before, torch.get_rng_state())


def test_alt_must_be_words() -> None:
    with pytest.raises(TypeError, match="alt to return a string, got NoneType"):
        explore(lambda x: draw(x, "line"), alt=lambda x: None, x=[1.0])


def test_figures_are_closed_where_drawing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explore(lambda x: plt.subplots()[0], alt=lambda x: "", x=[1.0])
    assert plt.get_fignums() == []


def test_labels_tell_values_apart() -> None:
    explorer = explore(
        lambda n: draw(n, "line"), alt=lambda n: "", n=(n for n in [1234567, 1234568])
    )
    assert explorer._labels == [["1234567", "1234568"]]
