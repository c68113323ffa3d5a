"""report.explorer: the pictures, the controls, the page's own form and the live one."""

from __future__ import annotations

import base64
import io
import itertools
import json
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from axe_playwright_python import sync_playwright as axe
from browser import chromium
from matplotlib.figure import Figure

from autograd_lib import Explorer, explore
from autograd_lib.report import dashboard as module
from autograd_lib.report.dashboard import GradientDashboard


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
    assert [len(labels) for labels in state["labels"]] == [3, 2]
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


def test_the_live_form_is_that_of_the_page() -> None:
    explorer = make()
    assert explorer.to_widget().outputs[0]["data"]["text/html"] == explorer.to_html()
    bundle = explorer._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"}


def test_controls_of_an_explorer_answer_to_the_keyboard(tab: Any) -> None:
    show(tab, make().to_html())
    picture, slider = tab.locator("img"), tab.get_by_role("slider", name="x")
    assert "that ends at 1.0" in picture.get_attribute("alt")
    slider.focus()
    tab.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "2"
    tab.get_by_role("combobox", name="curve").select_option("</script>")
    assert picture.get_attribute("alt") == 'A line "</script>" that ends at 2.0, <rising>.'
    assert unquote(picture.get_attribute("src")).endswith(make().frames[5].rstrip("\n"))


def test_without_ipywidgets_the_page_form_remains(monkeypatch: pytest.MonkeyPatch) -> None:
    explorer = make()
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert set(explorer._repr_mimebundle_()) == {"text/plain", "text/html"}
    with pytest.raises(ImportError, match=r"pip install ipywidgets$"):
        explorer.to_widget()


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
        ({"x": []}, TypeError, r"'x' to be numbers or strings, at least one, got \[\]"),
        ({"x": [1, "a"]}, TypeError, r"'x' to be numbers or strings.*got \[1, 'a'\]"),
        ({"x": range(21), "y": range(20)}, ValueError, "at most 400 .* got 420 combinations"),
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


def test_figures_are_closed_where_drawing_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Figure, "savefig", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        explore(lambda x: plt.subplots()[0], alt=lambda x: "", x=[1.0])
    assert plt.get_fignums() == []


def test_labels_tell_values_apart() -> None:
    explorer = explore(
        lambda n: draw(n, "line"), alt=lambda n: "", n=(n for n in [1234567, 1234568])
    )
    assert explorer.controls[0].labels == ["1234567", "1234568"]
    explorer = explore(lambda n: draw(n, "line"), alt=lambda n: "", n=[-0.5, 1e-9])
    assert explorer.controls[0].labels == ["−0.5", "1e−09"], "the minus sign of an axis"


def test_spaces_of_a_title_stay(tab: Any) -> None:
    frames = [
        explore(lambda x, t=t: draw(x, t), alt=lambda x: "", x=[1]).frames[0]
        for t in ("a b", "a   b")
    ]
    widths = []
    for frame in frames:
        tab.set_content(frame[frame.index("<svg") :])
        widths.append(tab.locator("text").last.evaluate("text => text.getComputedTextLength()"))
    assert widths[1] > widths[0] + 3


# --- dashboard: what it sends ---------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


def make_monitor(norm: Any, issues: list[Any] | None = None, **more: Any) -> SimpleNamespace:
    """What a dashboard reads of a monitor with these norms, [rows, parameters]."""
    norm = np.asarray(norm, dtype=np.float64)
    history = {
        "step": np.arange(1, len(norm) + 1),
        "names": [f"{i}.weight" for i in range(norm.shape[1])],
        "norm": norm,
        "total_norm": np.where(more.get("present", ~np.isnan(norm)), norm, 0).max(
            axis=1, initial=0
        ),
        "skipped": np.zeros(len(norm), dtype=bool),
        "present": ~np.isnan(norm),
    }
    return SimpleNamespace(history=history | more, issues=issues or [])


def norms(rows: int = 8, parameters: int = 3) -> np.ndarray:
    return 10 ** np.random.default_rng(0).normal(-2, 0.5, (rows, parameters))


def state(dashboard: GradientDashboard) -> dict[str, Any]:
    """The data of a dashboard, arrays decoded."""
    data = json.loads(Tags(dashboard.to_html()).data)
    shape = (len(data["steps"]), len(data["names"]))
    data["cells"] = np.frombuffer(base64.b64decode(data["cells"]), "u1").reshape(shape)
    data["total"] = np.frombuffer(base64.b64decode(data["total"]), "<f4")
    for statistic in data["statistics"]:
        values = np.frombuffer(base64.b64decode(statistic["values"]), "<f4")
        statistic["values"] = values.reshape(shape)
    return data


def test_a_dashboard_carries_the_numbers_of_the_history() -> None:
    norm = norms()
    norm[2, 1], norm[3, 2], norm[4, 0] = NAN, INF, NAN
    present = np.ones(norm.shape, dtype=bool)
    present[2, 1] = False
    issues = [("missing", "1.weight", 3, None), ("inf", "2.weight", 4, INF)]
    monitor = make_monitor(norm, issues, present=present, mean=-norm / 10)
    data = state(GradientDashboard(monitor))
    assert data["names"] == monitor.history["names"]
    assert data["steps"] == list(range(1, 9))
    first, second = data["statistics"]
    assert (first["key"], first["scale"], second["key"], second["scale"]) == (
        *("norm", "log"),
        *("mean", "signed"),
    )
    assert np.array_equal(first["values"], norm.astype(np.float32), equal_nan=True)
    assert np.array_equal(np.argwhere(data["cells"] == 1), [[2, 1]])
    assert np.array_equal(np.argwhere(data["cells"] == 2), [[3, 2], [4, 0]])
    finite = norm[np.isfinite(norm)]
    assert 10 ** first["low"] <= finite.min() < 10 ** (first["low"] + 1)
    assert 10 ** (first["high"] - 1) < finite.max() <= 10 ** first["high"]
    assert second["high"] == -second["low"] == pytest.approx(finite.max() / 10)
    assert data["issues"] == [["missing", 1, 2], ["inf", 2, 3]]
    assert data["note"] == ""


def test_a_frozen_parameter_has_no_gradient_rather_than_a_nan() -> None:
    monitor = make_monitor([[NAN, 1], [NAN, NAN]], present=np.array([[False, True]] * 2))
    assert state(GradientDashboard(monitor))["cells"].tolist() == [[1, 0], [1, 2]]


def test_a_long_history_is_thinned_and_keeps_the_steps_of_issues(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "_MOST_STEPS", 20)
    issues = [("nan", "1.weight", 457, NAN), ("exploding", "0.weight", 458, 1e9)]
    data = state(GradientDashboard(make_monitor(norms(1000), issues)))
    assert len(data["steps"]) == 20
    assert data["steps"] == sorted(set(data["steps"]))
    assert (data["steps"][0], data["steps"][-1]) == (1, 1000)
    assert {457, 458} <= set(data["steps"])
    assert [data["steps"][frame] for _, _, frame in data["issues"]] == [457, 458]
    assert max(np.diff(data["steps"])) < 2.1 * 1000 / 19, "the others stay spread"
    assert data["note"] == "20 of 1000 steps shown"


def test_of_many_parameters_those_with_issues_stay() -> None:
    names = [f"layers.{i}.weight" for i in range(1000)]
    monitor = make_monitor(norms(5, 1000), [("nan", names[777], 2, NAN)], names=names)
    data = state(GradientDashboard(monitor))
    assert len(data["names"]) == 200
    assert data["issues"] == [["nan", data["names"].index(names[777]), 1]]
    assert data["common"] == "layers."
    assert data["note"] == "200 of 1000 parameters shown"
    column = data["names"].index(names[777])
    assert data["statistics"][0]["values"][3, column] == np.float32(monitor.history["norm"][3, 777])


@pytest.mark.parametrize("parameters", [100, 1000])
def test_a_dashboard_is_light(parameters: int) -> None:
    norm = norms(1000, parameters)
    more = dict.fromkeys(("mean", "std", "min", "max", "abs_max", "cosine", "zero_fraction"), norm)
    html = GradientDashboard(make_monitor(norm, **more)).to_html()
    assert len(html) < 300_000


def test_what_is_recorded_at_some_steps_stands_until_the_next() -> None:
    ratio = np.full((10, 1), NAN)
    ratio[[0, 4, 8], 0] = 1, 2, 3
    data = state(GradientDashboard(make_monitor(norms(10, 1), update_ratio=ratio)))
    assert data["statistics"][1]["values"].ravel().tolist() == [1] * 4 + [2] * 4 + [3] * 2


@pytest.mark.parametrize(
    "norm", [[[0.0]], [[NAN]], [[INF, INF]], [[1e300, 1e-300]], [[1.0]]], ids=str
)
def test_odd_numbers_make_a_scale(norm: list[list[float]]) -> None:
    monitor = make_monitor(norm, total_norm=np.ones(1), mean=-np.array(norm))
    for statistic in state(GradientDashboard(monitor))["statistics"]:
        assert statistic["low"] < statistic["high"] < INF


def test_nothing_in_a_dashboard_is_taken_for_html() -> None:
    names = ["</script><img src=x>", "b", "c"]
    html = GradientDashboard(make_monitor(norms(), names=names)).to_html()
    assert html.count("</script>") == 2
    assert "img" not in {tag for tag, _ in Tags(html).elements}
    assert not re.search(r"""(?:src|href|url)[=(]["']?https?:|@import""", html)


def test_a_stored_notebook_keeps_nothing_of_the_numbers() -> None:
    html = GradientDashboard(make_monitor(norms())).to_html()
    frames = re.compile(r"<!-- frames -->.*?<!-- /frames -->", re.DOTALL)
    assert frames.sub("", html) == '<figure class="dashboard"></figure>'


def test_before_the_first_step() -> None:
    dashboard = GradientDashboard(make_monitor(np.ones((0, 2))))
    assert repr(dashboard) == "GradientDashboard(2 parameters, 0 steps)"
    assert "No step was recorded yet." in dashboard.to_html()


def test_a_dashboard_takes_the_monitor_itself() -> None:
    with pytest.raises(TypeError, match="got dict; pass the monitor itself"):
        GradientDashboard(make_monitor(norms()).history)


# --- dashboard: the live form ---------------------------------------------------------------------


class Counting:
    """A monitor that counts how often its history is read."""

    def __init__(self) -> None:
        self.reads, self.issues = 0, []
        self.monitor = make_monitor(norms())

    @property
    def history(self) -> dict[str, Any]:
        self.reads += 1
        return self.monitor.history


def test_updates_are_few_and_none_before_it_is_displayed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monitor = Counting()
    dashboard = GradientDashboard(monitor)
    before = monitor.reads
    for _ in range(100):
        dashboard.update()
    assert monitor.reads == before
    output = dashboard.to_widget()
    drawn = []
    for _ in range(1000):  # ten seconds of steps
        now[0] += 0.01
        seen = monitor.reads
        dashboard.update()
        drawn.append(monitor.reads > seen)
    assert 15 <= sum(drawn) <= 21
    monitor.monitor = make_monitor(norms(9))
    now[0] += 1
    dashboard.update()
    assert '"steps":[1,2,3,4,5,6,7,8,9]' in output.outputs[0]["data"]["text/html"]


def test_a_slow_redraw_is_followed_by_a_long_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monitor = Counting()
    dashboard = GradientDashboard(monitor)
    dashboard.to_widget()
    redraw = dashboard._redraw

    def slow() -> None:
        now[0] += 1.0
        redraw()

    monkeypatch.setattr(dashboard, "_redraw", slow)
    dashboard.update()
    start = monitor.reads
    for _ in range(19):
        now[0] += 0.99
        dashboard.update()
    assert monitor.reads == start
    now[0] += 5
    dashboard.update()
    assert monitor.reads > start


def test_a_dashboard_offers_both_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    dashboard = GradientDashboard(make_monitor(norms()))
    bundle = dashboard._repr_mimebundle_()
    assert set(bundle) == {"text/plain", "text/html", "application/vnd.jupyter.widget-view+json"}
    assert bundle["text/plain"] == "GradientDashboard(3 parameters, 8 steps)"
    live = dashboard.to_widget().outputs[0]["data"]["text/html"]
    assert live == bundle["text/html"] == dashboard.to_html()
    monkeypatch.setitem(sys.modules, "ipywidgets", None)
    assert set(dashboard._repr_mimebundle_()) == {"text/plain", "text/html"}
    with pytest.raises(ImportError, match=r"pip install ipywidgets$"):
        dashboard.to_widget()


# --- dashboard: in a browser ----------------------------------------------------------------------

STYLE = Path(__file__).parents[2] / "book" / "_static" / "book.css"


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    context = browser.new_context(offline=True, viewport={"width": 1000, "height": 900})
    page = context.new_page()
    trouble: list[str] = []
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.on(
        "console", lambda m: trouble.append(m.text) if "willReadFrequently" not in m.text else 0
    )
    yield page
    context.close()
    assert not trouble


def planted() -> SimpleNamespace:
    """Three parameters by four steps, each cell of its own kind where it matters."""
    norm = np.array([[1e-4, 1, 1e4], [1e-2, NAN, 1e4], [1e-3, 0, INF], [1e-1, 10, 1e2]])
    issues = [("missing", "b", 2, None), ("inf", "c", 3, INF)]
    names, skipped = ["a", "b", "c"], np.array([False, False, True, False])
    return make_monitor(
        norm, issues, names=names, skipped=skipped, mean=norm * [[1], [-1], [1], [-1]]
    )


def show(tab: Any, html: str, theme: str = "light") -> None:
    tab.set_content(
        f'<!doctype html><html lang="en" data-theme="{theme}"><head><title>Page</title><style>'
        f"{STYLE.read_text(encoding='utf-8')}</style></head><body><main><h1>Page</h1>{html}</main>"
        "</body></html>"
    )


def read(tab: Any) -> str:
    return tab.locator(".d-read").inner_text()


def test_controls_answer_to_the_keyboard(tab: Any) -> None:
    show(tab, GradientDashboard(planted()).to_html())
    assert read(tab) == "a at step 4: norm 0.1"
    slider = tab.get_by_role("slider", name="Step")
    slider.focus()
    tab.keyboard.press("ArrowLeft")
    assert read(tab) == "a at step 3: norm 0.001, step skipped"
    assert slider.get_attribute("aria-valuetext") == "step 3"
    tab.get_by_role("combobox", name="Parameter").select_option("c")
    assert read(tab) == "c at step 3: norm not finite, inf begins, step skipped"
    slider.focus()
    tab.keyboard.press("Home")
    tab.get_by_role("combobox", name="Statistic").select_option("mean")
    assert read(tab) == "c at step 1: mean 10000"
    assert tab.locator(".d-title").inner_text() == "mean at step 1"


def test_hovering_names_the_parameter_and_a_click_chooses_it(tab: Any) -> None:
    show(tab, GradientDashboard(planted()).to_html())
    area, tip = tab.locator(".d-map"), tab.locator(".d-tip")
    box = area.bounding_box()

    def over(frame: int, row: int) -> dict[str, float]:
        return {"x": (frame + 0.5) / 4 * box["width"], "y": (row + 0.5) / 3 * box["height"]}

    assert not tip.is_visible()
    area.hover(position=over(1, 1))
    assert tip.inner_text() == "b\nstep 2: norm no gradient, missing begins"
    area.hover(position=over(0, 2))
    assert tip.inner_text() == "c\nstep 1: norm 10000"
    area.click(position=over(0, 2))
    assert read(tab) == "c at step 1: norm 10000"
    tab.locator(".d-bars").hover(position={"x": 5, "y": 5})
    assert tip.inner_text() == "a\nstep 1: norm 1.00e-4"
    tab.mouse.move(0, 0)
    assert not tip.is_visible()


def pixels(tab: Any) -> np.ndarray:
    flat = tab.evaluate(
        """() => {
          const canvas = document.querySelector(".d-map canvas");
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          return [canvas.height, canvas.width, ...data];
        }"""
    )
    return np.array(flat[2:]).reshape(flat[0], flat[1], 4)


def test_the_map_shows_each_number_in_its_color(tab: Any) -> None:
    show(tab, GradientDashboard(planted()).to_html())
    image = pixels(tab)
    assert image.shape == (3, 4, 4)
    assert image[0, 0].tolist() == [0x44, 0x01, 0x54, 255], "the least"
    assert image[2, 0].tolist() == [0xFD, 0xE7, 0x25, 255], "the largest"
    assert image[1, 1, 3] == 0, "missing: the hatching shows through"
    assert image[2, 2].tolist() == [213, 94, 0, 255], "not finite"
    assert image[1, 2].tolist() == [0, 0, 0, 255], "exactly zero"
    reference = plt.get_cmap("viridis")
    for row, frame, exponent in [(0, 1, -2), (0, 2, -3), (1, 3, 1)]:
        color = 255 * np.array(reference((exponent + 4) / 8)[:3])
        assert np.abs(image[row, frame, :3] - color).max() < 16
    tab.get_by_role("combobox", name="Statistic").select_option("mean")
    image = pixels(tab).astype(int)
    assert image[2, 0, 0] > 150 > 100 > image[2, 0, 2], "positive is orange"
    assert image[2, 1, 2] > image[2, 1, 0], "negative is purple"


def test_bars_are_as_long_as_the_numbers_say(tab: Any) -> None:
    show(tab, GradientDashboard(planted()).to_html())

    def bars(name: str) -> list[tuple[float, ...]]:
        path = tab.locator(f".d-{name}").get_attribute("d") or ""
        return [tuple(map(float, found)) for found in re.findall(r"M(\S+) (\S+)H(\S+)v", path)]

    # logarithmic, from 1e-4 to 1e4
    assert [(start, end) for start, _, end in bars("now")] == [(0, 3 / 8), (0, 5 / 8), (0, 6 / 8)]
    assert [int(3 * top) for _, top, _ in bars("now")] == [0, 1, 2]
    assert [(start, end) for start, _, end in bars("range")] == [(0, 3 / 8), (0, 5 / 8), (6 / 8, 1)]
    assert "largest 100 in c, smallest 0.1 in a" in (
        tab.locator(".d-bars svg").get_attribute("aria-label")
    )
    tab.get_by_role("slider", name="Step").focus()
    tab.keyboard.press("ArrowLeft")
    assert [int(3 * top) for _, top, _ in bars("broken")] == [2]
    tab.get_by_role("combobox", name="Statistic").select_option("mean")
    tab.keyboard.press("End")
    starts = {start for start, _, _ in bars("now")}
    assert starts == {0.5}, "signed numbers start in the middle"


def test_every_total_norm_is_drawn(tab: Any) -> None:
    """A line between neighbors, a dot where there is none, nothing where it is not finite."""
    total = np.array([1, NAN, 10, INF, 100, 100, NAN, NAN, 1])
    monitor = make_monitor(norms(9, 2), total_norm=total)
    show(tab, GradientDashboard(monitor).to_html())
    dots, line = (tab.locator(f".d-{name}").get_attribute("d") for name in ("dots", "line"))
    places = re.findall(r"M(\S+) (\S+)h0", dots)
    assert [float(x) for x, _ in places] == pytest.approx([0.5 / 9, 2.5 / 9, 8.5 / 9], abs=1e-4)
    assert [float(y) for _, y in places] == pytest.approx([0.92, 0.5, 0.92])
    assert re.fullmatch(r"M(\S+) (\S+)L(\S+) (\S+)", line)
    box = tab.locator(".d-total").bounding_box()
    at = {"x": box["x"] + 2.5 / 9 * box["width"], "y": box["y"] + box["height"] / 2}
    around = {"x": at["x"] - 2, "y": at["y"] - 2, "width": 4, "height": 4}
    image = plt.imread(io.BytesIO(tab.screenshot(clip=around)))[..., :3]
    assert image[1:3, 1:3].mean() < 0.8, "a dot is seen"


def test_one_step_is_drawn_where_it_belongs(tab: Any) -> None:
    show(tab, GradientDashboard(make_monitor([[1.0, 2.0]])).to_html())
    assert tab.locator(".d-dots").get_attribute("d") == "M0.5000 0.5000h0"
    assert tab.locator(".d-line").get_attribute("d") == ""
    label, area = tab.locator(".d-when span"), tab.locator(".d-map").bounding_box()
    assert label.inner_text() == "step 1"
    assert label.bounding_box()["x"] >= area["x"]


def test_skipped_steps_are_marked_above_the_map(tab: Any) -> None:
    show(tab, GradientDashboard(planted()).to_html())
    area, mark = tab.locator(".d-map").bounding_box(), tab.locator(".d-total i")
    assert mark.count() == 1
    box = mark.bounding_box()
    center = box["x"] + box["width"] / 2
    assert center == pytest.approx(area["x"] + 2.5 / 4 * area["width"], abs=2)
    assert area["y"] - 16 < box["y"] + box["height"] / 2 < area["y"]
    (entry,) = tab.locator(".d-key li", has_text="skipped step").all()
    assert entry.locator("i").inner_text() == mark.inner_text()
    assert "skipped steps: 1" in tab.locator("canvas").get_attribute("aria-label")
    show(tab, GradientDashboard(make_monitor(norms())).to_html())
    assert tab.locator(".d-total i").count() == 0
    assert "skipped" not in tab.locator(".d-key").inner_text()


def test_a_live_dashboard_keeps_what_was_chosen(tab: Any) -> None:
    dashboard = GradientDashboard(planted())
    output = dashboard.to_widget()
    show(tab, "<div id='place'></div>")

    def place() -> None:  # as a notebook's front end does: parse, then run the scripts
        tab.evaluate(
            """html => {
              const place = document.getElementById("place");
              place.innerHTML = html;
              for (const old of place.querySelectorAll("script:not([type])")) {
                const script = document.createElement("script");
                script.textContent = old.textContent;
                old.replaceWith(script);
              }
            }""",
            output.outputs[0]["data"]["text/html"],
        )

    place()
    tab.get_by_role("combobox", name="Parameter").select_option("b")
    assert read(tab) == "b at step 4: norm 10"
    monitor = dashboard._monitor
    more = make_monitor(np.vstack([monitor.history["norm"], [[5, 5, 5]]])).history
    monitor.history = more | {"names": ["a", "b", "c"]}
    dashboard._due = 0.0  # the wait is over
    dashboard.update()
    place()
    assert read(tab) == "b at step 5: norm 5", "at the end it follows"
    tab.get_by_role("slider", name="Step").focus()
    tab.keyboard.press("Home")
    dashboard._due = 0.0  # the wait is over
    dashboard.update()
    place()
    assert read(tab) == "b at step 1: norm 1", "elsewhere it stays"
    assert tab.evaluate("document.activeElement.className") == "d-step"
    tab.evaluate("document.activeElement.blur()")
    tab.wait_for_timeout(50)
    place()
    assert tab.evaluate("document.activeElement === document.body"), "it takes no focus it had lost"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_dashboard_is_accessible_and_fits_a_phone(tab: Any, theme: str) -> None:
    names = [f"encoder.layers.{i}.self_attn.in_proj_weight" for i in range(90)]
    issues = [
        (kind, names[3], 2, None) for kind in ("nan", "inf", "exploding", "vanishing", "missing")
    ]
    monitor = make_monitor(norms(30, 90), issues, names=names, mean=norms(30, 90) - 0.01)
    show(tab, GradientDashboard(monitor).to_html(), theme)
    for width in (360, 768, 1200):
        tab.set_viewport_size({"width": width, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        violations = axe.Axe().run(tab, options={"preload": False}).response["violations"]
        assert not [(found["id"], found["nodes"][0]["html"][:200]) for found in violations]
    boxes = [label.bounding_box() for label in tab.locator(".d-names span").all()]
    assert len(boxes) > 20
    for above, below in itertools.pairwise(boxes):
        assert above["y"] + 12 <= below["y"] + 1, "names do not overlap"
