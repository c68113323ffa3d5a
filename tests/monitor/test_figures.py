"""monitor.figures: what is drawn is what the history holds, however odd, and it is legible."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection, QuadMesh
from torch import nn

from autograd_lib import GradientMonitor, compute_gradient_statistics
from autograd_lib.monitor.figures import (
    plot_gradient_flow,
    plot_gradient_heatmap,
    plot_gradient_histograms,
    plot_issues,
    plot_update_ratios,
)

STATISTICS = ("norm", "mean", "std", "min", "max", "abs_max")
EDGES = 2.0 ** np.arange(-48, 17)


def make_history(norm: Any, names: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """A history with these norms, [rows, parameters]; NaN stands for a missing gradient."""
    norm = np.asarray(norm, dtype=np.float64)
    rows, parameters = norm.shape
    missing = more.get("missing", np.isnan(norm))
    with np.errstate(all="ignore"):
        history: dict[str, Any] = {
            "step": np.arange(1, rows + 1),
            "names": names or [f"{i}.weight" for i in range(parameters)],
            "numel": np.full(parameters, 10),
            "norm": norm,
            "mean": norm * np.where(np.arange(rows) % 2, -0.01, 0.01)[:, None],
            "std": norm / 3,
            "min": -norm / 2,
            "max": norm / 2,
            "abs_max": norm / 2,
            "total_norm": np.sqrt((np.where(missing, 0, norm) ** 2).sum(axis=1)),
            "skipped": np.zeros(rows, dtype=bool),
            "missing": np.isnan(norm),
            "update_ratio": norm / 100,
            "histogram": np.ones((2, parameters, 64), dtype=np.int64),
            "histogram_step": np.array([1, 11]),
            "histogram_edges": EDGES,
        }
    return history | more


def random_norms(rows: int = 50, parameters: int = 6, seed: int = 0) -> np.ndarray:
    return 10 ** np.random.default_rng(seed).normal(-2, 0.5, (rows, parameters))


NAN, INF = float("nan"), float("inf")
ODD = {
    "one parameter": make_history(random_norms(parameters=1)),
    "one row": make_history(random_norms(rows=1)),
    "one number": make_history([[0.5]]),
    "equal numbers": make_history(np.ones((5, 3))),
    "zeros": make_history(np.zeros((5, 3))),
    "all missing": make_history(np.full((5, 3), NAN)),
    "a row missing": make_history([[1, NAN, 2], [1, NAN, 3], [2, NAN, 1]]),
    "all infinite": make_history(np.full((5, 3), INF)),
    "all NaN": make_history(np.full((5, 3), NAN), missing=np.zeros((5, 3), dtype=bool)),
    "some infinite": make_history([[1, INF], [-0.0, 1], [1, 2]]),
    "skipped": make_history([[1, 2], [INF, INF], [1, 2]], skipped=np.array([False, True, False])),
    "all skipped": make_history(np.full((3, 2), INF), skipped=np.ones(3, dtype=bool)),
    "tiny and huge": make_history([[5e-324, 1e308], [1e-310, 1e-10]]),
    "names with dollars": make_history(
        random_norms(parameters=5), names=[r"a.$\frac$", "a.a_$b$", "a.$x", r"a.b\$", r"a.$\$$"]
    ),
    "one module with dollars": make_history([[1.0, 2.0]], names=[r"$\frac$.a", r"$\frac$.b"]),
    "biases only": make_history(random_norms(parameters=2), names=["a.bias", "b.bias"]),
    "no histogram counts": make_history([[1.0]], histogram=np.zeros((2, 1, 64), dtype=np.int64)),
    "zeros in the histogram": make_history(
        [[1.0]], histogram=np.eye(1, 64, dtype=int)[None][[0, 0]]
    ),
    "two hundred": make_history(
        random_norms(1000, 200), names=[f"encoder.layers.{i}.linear.weight" for i in range(200)]
    ),
}

DRAW: dict[str, Callable[[dict[str, Any], Axes | None], Axes]] = {
    "flow": plot_gradient_flow,
    "flow with biases": lambda history, ax: plot_gradient_flow(history, ax, biases=True),
    **{
        f"heat map of {statistic}": lambda history, ax, statistic=statistic: plot_gradient_heatmap(
            history, ax, statistic=statistic
        )
        for statistic in ("norm", "mean", "update_ratio")
    },
    "histograms": lambda history, ax: plot_gradient_histograms(
        history, history["names"][0], ax, dtype=torch.float16
    ),
    "update ratios": plot_update_ratios,
    "issues": lambda history, ax: plot_issues(
        [("nan", history["names"][-1], 1, NAN), ("missing", history["names"][0], 3, None)],
        history,
        ax,
    ),
    "no issues": lambda history, ax: plot_issues([], history, ax),
}

every_figure = pytest.mark.parametrize("draw", DRAW.values(), ids=DRAW)


@pytest.fixture(autouse=True)
def close_figures() -> Iterator[None]:
    yield
    plt.close("all")


def line(ax: Axes, label: str) -> Any:
    (found,) = [line for line in ax.lines if line.get_label() == label]
    return found


def segments(ax: Axes) -> list[np.ndarray]:
    return [np.array(c.get_segments()) for c in ax.collections if isinstance(c, LineCollection)]


def mesh(ax: Axes) -> QuadMesh:
    (found,) = [c for c in ax.collections if isinstance(c, QuadMesh)]
    return found


def legend(ax: Axes) -> list[str]:
    found = ax.get_legend()
    return [text.get_text() for text in found.get_texts()] if found else []


# --- every figure -------------------------------------------------------------------------------


@every_figure
@pytest.mark.parametrize("history", ODD.values(), ids=ODD)
def test_whatever_happened_is_drawn_without_a_warning(
    draw: Callable[..., Axes], history: dict[str, Any]
) -> None:
    ax = draw(history, None)
    ax.figure.canvas.draw()
    assert ax.get_xlabel()
    assert ax.get_ylabel()


@every_figure
def test_the_axes_given_are_the_axes_drawn_into(draw: Callable[..., Axes]) -> None:
    before = dict(mpl.rcParams)
    ours = plt.figure().subplots(1, 2)[1]
    assert draw(make_history(random_norms()), ours) is ours
    assert len(plt.get_fignums()) == 1
    assert dict(mpl.rcParams) == before


@every_figure
def test_names_and_legend_keep_clear_of_one_another(draw: Callable[..., Axes]) -> None:
    skipped = np.arange(1000) == 500
    names = [f"encoder.layers.{i}.a_rather_long_name.linear.weight" for i in range(200)]
    history = make_history(random_norms(1000, 200), names, skipped=skipped)
    for some in (history, make_history(random_norms(), skipped=skipped[475:525])):
        ax = draw(some, None)
        ax.figure.canvas.draw()
        labels = [label for label in ax.get_yticklabels() if label.get_text()]
        boxes = sorted((label.get_window_extent() for label in labels), key=lambda box: box.y0)
        assert all(above.y0 >= below.y1 - 1 for below, above in pairwise(boxes))
        page = ax.figure.bbox
        for box in [*boxes, ax.xaxis.label.get_window_extent()]:
            assert page.x0 <= box.x0
            assert box.x1 <= page.x1
        assert ax.get_window_extent().width > 0.35 * page.width
        if ax.get_legend():
            box = ax.get_legend().get_window_extent()
            assert box.y0 >= ax.get_window_extent().y1
            assert box.x1 <= page.x1 + 1
            assert box.y1 <= page.y1 + 1


@every_figure
def test_an_empty_history_says_what_to_do(draw: Callable[..., Axes]) -> None:
    history = make_history(np.ones((0, 2)))
    with pytest.raises(ValueError, match=r"plot_\w+: no step was recorded; take at least one step"):
        draw(history, None)


@pytest.mark.parametrize("history", [{}, {"step": [1]}], ids=str)
@pytest.mark.parametrize(
    "draw",
    [
        plot_gradient_flow,
        plot_gradient_heatmap,
        plot_update_ratios,
        lambda history: plot_gradient_histograms(history, "0.weight"),
        lambda history: plot_issues([], history),
    ],
)
def test_what_is_no_history_is_said(draw: Callable[..., Axes], history: dict[str, Any]) -> None:
    message = r"history of a GradientMonitor, got a mapping without \[.*'names'.*monitor.history"
    with pytest.raises(ValueError, match=message):
        draw(history)


@every_figure
def test_axes_must_be_one(draw: Callable[..., Axes]) -> None:
    axes = plt.subplots(2)[1]
    with pytest.raises(TypeError, match=r"ax to be a matplotlib Axes, got ndarray.*axes\[0\]"):
        draw(make_history([[1.0]]), axes)


@pytest.mark.parametrize("draw", [plot_gradient_flow, plot_gradient_heatmap, plot_update_ratios])
@pytest.mark.parametrize("steps", [10, (0, 2)], ids=str)
def test_steps_must_be_a_slice(draw: Callable[..., Axes], steps: Any) -> None:
    with pytest.raises(TypeError, match=r"steps to be a slice, got .*steps=slice\(-10, None\)"):
        draw(make_history(random_norms()), steps=steps)


@pytest.mark.parametrize("statistic", ["total_norm", "missing", "numel", "histogram", "x"])
@pytest.mark.parametrize("recorded", [True, False])
def test_heat_map_knows_its_statistics(statistic: str, recorded: bool) -> None:
    history = make_history(random_norms())
    if not recorded:
        del history["histogram"]
    message = rf"a statistic among \['norm', 'std', .*'max'\], got '{statistic}'"
    with pytest.raises(ValueError, match=message):
        plot_gradient_heatmap(history, statistic=statistic)


@pytest.mark.parametrize(
    "statistic", ["update_ratio", "histogram", "zero_fraction", "nan_count", "inf_count", "cosine"]
)
def test_the_advice_for_a_missing_statistic_can_be_followed(statistic: str) -> None:
    history = make_history(random_norms())
    history.pop(statistic, None)
    draw: Callable[..., Axes] = plot_gradient_heatmap
    arguments = {"statistic": statistic}
    if statistic == "histogram":
        draw, arguments = plot_gradient_histograms, {"parameter": "0.weight"}
    with pytest.raises(ValueError, match="record it with") as caught:
        draw(history, **arguments)
    advice = str(caught.value).partition("record it with ")[2].replace("...", "model")
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    place = {"GradientMonitor": GradientMonitor, "model": model, "optimizer": optimizer}
    with eval(advice, place) as monitor:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        assert statistic in monitor.history


def as_drawn(text: mpl.text.Text) -> str:
    """What a reader sees of a text that holds no formula."""
    shown, is_math = text._preprocess_math(text.get_text())
    assert not is_math
    return shown


def test_names_are_drawn_as_they_are_and_not_as_formulas() -> None:
    names = [r"$\frac$.a_$b$", r"$\frac$.$\alpha$", r"$\frac$.x\$"]
    history = make_history(np.ones((3, 3)) * [1, 2, 3], names)
    for ax in (plot_gradient_flow(history), plot_gradient_heatmap(history)):
        assert as_drawn(ax.yaxis.label) == r"parameter of $\frac$"
        labels = [as_drawn(label) for label in ax.get_yticklabels()]
        assert labels == ["a_$b$", r"$\alpha$", r"x\$"]
    ax = plot_gradient_histograms(history, names[0])
    assert as_drawn(ax.xaxis.label) == rf"magnitude of the elements of {names[0]}"
    shown = [as_drawn(text) for text in plot_update_ratios(history).get_legend().get_texts()]
    assert shown[1:] == [f"largest: {names[2]}", f"smallest: {names[0]}"]
    ax = plot_issues([("nan", names[1], 1, NAN)], history)
    assert [as_drawn(label) for label in ax.get_yticklabels()] == [names[1]]


def test_the_legend_names_parameters_of_a_compiled_model() -> None:
    names = ["_orig_mod.0.weight", "_orig_mod.2.weight"]
    ax = plot_update_ratios(make_history([[1.0, 2.0]], names))
    assert legend(ax)[1:] == ["largest: _orig_mod.2.weight", "smallest: _orig_mod.0.weight"]
    ax = plot_gradient_flow(make_history([[1.0]], names[:1]))
    assert [label.get_text() for label in ax.get_yticklabels()] == names[:1]


@every_figure
def test_without_matplotlib(draw: Callable[..., Axes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plot_\w+ needs Matplotlib.*pip install matplotlib$"):
        draw(make_history([[1.0]]), None)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda h: plot_gradient_flow([]), TypeError, "got list; pass monitor.history"),
        (plot_update_ratios, ValueError, "'update_ratio'.*update_every="),
        (lambda h: plot_gradient_histograms(h, "0.weight"), ValueError, "histogram_every="),
        (
            lambda h: plot_gradient_heatmap(h, statistic="zero_fraction"),
            ValueError,
            r'GradientMonitor\(\.\.\., collect=\["zero_fraction"\]\)',
        ),
        (
            lambda h: plot_gradient_heatmap(h, statistic="median"),
            ValueError,
            r"a statistic among \['norm', 'std'.*got 'median'",
        ),
        (
            lambda h: plot_gradient_flow(h, steps=slice(100, None)),
            ValueError,
            r"takes none of the 3 rows",
        ),
        (
            lambda h: plot_issues([("nan", "other", 1, NAN)], h),
            ValueError,
            "got 'nan' in 'other'; pass the issues and the history of one monitor",
        ),
    ],
)
def test_bad_arguments(draw: Callable[..., Axes], error: type[Exception], message: str) -> None:
    history = make_history([[1.0], [2.0], [3.0]])
    del history["update_ratio"], history["histogram"]
    with pytest.raises(error, match=message):
        draw(history)
    assert not plt.get_fignums(), "nothing is left open"


# --- flow ---------------------------------------------------------------------------------------


def test_flow_draws_the_quartiles_of_the_finite_norms() -> None:
    norm = random_norms(41, 5)
    norm[3, 1], norm[4, 2], norm[5, 2] = NAN, INF, INF
    ax = plot_gradient_flow(make_history(norm))
    dots = line(ax, "weights")
    by_hand = [
        np.percentile(column[np.isfinite(column)], [0, 25, 50, 75, 100]) for column in norm.T
    ]
    assert np.allclose(dots.get_xdata(), [q[2] for q in by_hand])
    assert list(dots.get_ydata()) == [0, 1, 2, 3, 4]
    extremes, quartiles = segments(ax)
    assert np.allclose(extremes[:, :, 0], [[q[0], q[4]] for q in by_hand])
    assert np.allclose(quartiles[:, :, 0], [[q[1], q[3]] for q in by_hand])
    assert ax.yaxis_inverted(), "the first layer is on top"


@pytest.mark.parametrize("spread", [1, 3, 60, 1e6])
def test_flow_has_labels_that_do_not_overlap(spread: float) -> None:
    ax = plot_gradient_flow(make_history([[0.02, 0.02 * spread]]))
    ax.figure.canvas.draw()
    low, high = ax.get_xlim()
    ticks = [*ax.xaxis.get_major_ticks(), *ax.xaxis.get_minor_ticks()]
    shown = [t for t in ticks if low <= t.get_loc() <= high and t.label1.get_text()]
    boxes = sorted((t.label1.get_window_extent() for t in shown), key=lambda box: box.x0)
    assert len(boxes) >= 2
    assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


def test_flow_takes_weights_unless_asked_for_biases() -> None:
    names = ["0.weight", "0.bias", "attn.in_proj_weight", "attn.in_proj_bias", "bias_net.weight"]
    history = make_history(random_norms(parameters=5), names)
    shown = [t.get_text() for t in plot_gradient_flow(history).get_yticklabels()]
    assert shown == ["0.weight", "attn.in_proj_weight", "bias_net.weight"]
    ax = plot_gradient_flow(history, biases=True)
    assert [t.get_text() for t in ax.get_yticklabels()] == names
    assert list(line(ax, "biases").get_ydata()) == [1, 3]


def test_flow_takes_the_rows_asked_for() -> None:
    norm = random_norms(20, 1)
    ax = plot_gradient_flow(make_history(norm), steps=slice(-5, None))
    assert line(ax, "weights").get_xdata() == pytest.approx([np.median(norm[-5:])])
    assert ax.get_xlabel().endswith("steps 16 to 20")


def test_flow_marks_what_has_no_place_on_its_axis() -> None:
    norm = np.ones((4, 5))
    norm[:, 1], norm[:3, 2], norm[2, 3], norm[3] = NAN, 0, INF, INF
    norm[3, 1], norm[0, 0] = NAN, NAN  # of the first, one gradient is missing and no more
    history = make_history(norm, skipped=np.array([False, False, False, True]))
    ax = plot_gradient_flow(history)
    assert list(line(ax, "no gradient at any step").get_ydata()) == [1]
    assert list(line(ax, "median exactly 0").get_ydata()) == [2]
    assert list(line(ax, "not finite at some step").get_ydata()) == [3]  # the skipped step is none


def test_a_frozen_parameter_has_no_gradient_rather_than_a_nan() -> None:
    norm = np.ones((4, 3))
    norm[:, 0], norm[2] = NAN, NAN  # the first is frozen, at the third step all others are NaN
    history = make_history(norm, missing=np.zeros((4, 3), dtype=bool))
    history["total_norm"] = np.array([1, 1, NAN, 1])
    ax = plot_gradient_flow(history)
    assert list(line(ax, "no gradient at any step").get_ydata()) == [0]
    assert list(line(ax, "not finite at some step").get_ydata()) == [1, 2]


# --- heat map -----------------------------------------------------------------------------------


def test_heat_map_shows_each_value_in_its_place() -> None:
    norm = random_norms(7, 4)
    norm[2, 1], norm[3, 2] = NAN, INF
    ax = plot_gradient_heatmap(make_history(norm))
    cells = mesh(ax).get_array()
    assert cells.shape == (4, 7)
    assert np.array_equal(cells.mask, ~np.isfinite(norm.T))
    assert np.array_equal(cells.compressed(), norm.T[np.isfinite(norm.T)])
    assert mesh(ax).get_coordinates()[0, :, 0].tolist() == [s - 0.5 for s in range(1, 9)]
    assert legend(ax) == ["no gradient", "not finite (× where it began)"]
    hatched, orange = [c for c in ax.collections if isinstance(c, PatchCollection)]
    for cells_of_a_kind, (step, row) in ((hatched, (3, 1)), (orange, (4, 2))):
        (path,) = cells_of_a_kind.get_paths()
        assert path.get_extents().extents.tolist() == [step - 0.5, row - 0.5, step + 0.5, row + 0.5]
    assert hatched.get_hatch() != orange.get_hatch()
    (crosses,) = [found for found in ax.lines if found.get_marker() == "x"]
    assert (crosses.get_xdata().tolist(), crosses.get_ydata().tolist()) == ([3.5], [2])


def test_heat_map_tells_zero_from_small() -> None:
    ax = plot_gradient_heatmap(make_history([[0.0, 1e-8], [1.0, 1.0]]))
    colors = mesh(ax).to_rgba(mesh(ax).get_array())
    assert colors[0, 0].tolist() == [0, 0, 0, 1]
    assert colors[1, 0].tolist() != [0, 0, 0, 1]
    assert legend(ax) == ["exactly 0"]


def test_no_spike_is_lost_among_many_steps() -> None:
    norm = np.full((5003, 3), 0.1)
    norm[1234, 1], norm[2345, 2] = 77, NAN
    missing = np.zeros_like(norm, dtype=bool)
    mean = np.full_like(norm, 0.1)
    mean[3456, 0] = -9
    ax = plot_gradient_heatmap(make_history(norm, missing=missing, mean=mean))
    cells = mesh(ax).get_array()
    assert cells.shape[1] <= 400
    assert cells[1].max() == 77
    starts = mesh(ax).get_coordinates()[0, :, 0]
    column = int(cells[1].argmax())
    assert starts[column] < 1235 < starts[column + 1]
    assert "not finite (× where it began)" in legend(ax)
    signed = mesh(
        plot_gradient_heatmap(make_history(norm, missing=missing, mean=mean), statistic="mean")
    )
    assert signed.get_array()[0].min() == -9


def test_heat_map_of_a_signed_statistic_is_centered_at_zero() -> None:
    history = make_history(random_norms())
    scale = mesh(plot_gradient_heatmap(history, statistic="min")).norm
    assert scale.vmin == -scale.vmax == history["min"].min()
    assert scale(0) == pytest.approx(0.5)


def test_heat_map_marks_skipped_steps() -> None:
    history = make_history(random_norms(5, 2), skipped=np.array([0, 1, 0, 0, 1], dtype=bool))
    assert line(plot_gradient_heatmap(history), "skipped step").get_xdata().tolist() == [2, 5]


def test_steps_at_which_nothing_was_computed_are_left_out() -> None:
    norm = random_norms(30, 2)
    ratio = np.where(np.arange(30)[:, None] % 10 == 0, norm, NAN)
    history = make_history(norm, update_ratio=ratio)
    ax = plot_gradient_heatmap(history, statistic="update_ratio")
    assert np.array_equal(mesh(ax).get_array(), norm[::10].T)
    assert line(plot_update_ratios(history), line_labels(history)[0]).get_xdata().tolist() == [
        1,
        11,
        21,
    ]


def line_labels(history: dict[str, Any]) -> list[str]:
    return [found.get_label() for found in plot_update_ratios(history).lines[1:]]


def test_the_mean_of_a_complex_gradient_is_drawn_by_its_real_part() -> None:
    history = make_history([[1.0, 2.0]], mean=np.array([[1 + 5j, -2 + 7j]]))
    ax = plot_gradient_heatmap(history, statistic="mean")
    assert mesh(ax).get_array().ravel().tolist() == [1, -2]


# --- histograms -----------------------------------------------------------------------------------


def test_ridges_follow_the_counts() -> None:
    counts = np.zeros((3, 1, 64), dtype=np.int64)
    counts[0, 0, 30], counts[1, 0, 40], counts[2, 0, [0, 40]] = 8, 8, [2, 6]
    history = make_history([[1.0]], histogram=counts, histogram_step=np.array([1, 51, 101]))
    ax = plot_gradient_histograms(history, "0.weight")
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "51", "101"]
    tops = [(ridge.get_xdata(), i - ridge.get_ydata()) for i, ridge in enumerate(ax.lines)]
    for (x, height), start in zip(tops, [30, 40, 40], strict=True):
        assert np.unique(x[height > 0]).tolist() == [start - 48, start - 47]
    heights = [np.nanmax(height) for _, height in tops]
    assert heights[2] / heights[0] == pytest.approx(6 / 8)
    assert [text.get_text() for text in ax.texts] == ["25% zero"]


def test_many_histograms_are_thinned_but_the_ends_remain() -> None:
    history = make_history(
        [[1.0]], histogram=np.ones((99, 1, 64), dtype=int), histogram_step=np.arange(99) + 1
    )
    labels = [t.get_text() for t in plot_gradient_histograms(history, "0.weight").get_yticklabels()]
    assert len(labels) == 14
    assert (labels[0], labels[-1]) == ("1", "99")


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e5m2], ids=str)
def test_limits_are_where_a_cast_says(dtype: torch.dtype, scale: float) -> None:
    """Below the left line a number becomes zero, below the right one it loses digits."""
    ax = plot_gradient_histograms(make_history([[1.0]]), "0.weight", dtype=dtype, loss_scale=scale)
    zero, normal = sorted(2.0 ** found.get_xdata()[0] for found in ax.lines[-2:])

    def cast(value: float) -> float:
        return torch.tensor(value * scale, dtype=torch.float64).to(dtype).item() / scale

    assert cast(0.99 * zero) == 0 < cast(1.01 * zero)
    digits = 1 + torch.finfo(dtype).eps
    assert cast(normal * digits) == normal * digits
    assert cast(normal / 2 * digits) != normal / 2 * digits


def test_limits_beyond_the_axis_are_said_in_words() -> None:
    ax = plot_gradient_histograms(make_history([[1.0]]), "0.weight", dtype=torch.bfloat16)
    assert ax.texts[-1].get_text().startswith("bfloat16 keeps all digits down to $2^{-126}$")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"parameter": "x"}, ValueError, r"a parameter among \['0.weight'\], got 'x'"),
        ({"dtype": torch.int8}, TypeError, "dtype to be floating"),
        ({"loss_scale": 0}, ValueError, "loss_scale > 0, got 0"),
    ],
)
def test_bad_arguments_of_histograms(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        plot_gradient_histograms(make_history([[1.0]]), **{"parameter": "0.weight", **arguments})


def test_histograms_that_are_not_due_yet() -> None:
    history = make_history([[1.0]], histogram=np.zeros((0, 1, 64)), histogram_step=np.zeros(0))
    with pytest.raises(ValueError, match="no histogram was due yet"):
        plot_gradient_histograms(history, "0.weight")


# --- ratios and issues ----------------------------------------------------------------------------


def test_ratios_name_the_extremes_over_the_band() -> None:
    ratio = np.array([1e-3, 1e-1, 1e-5, 1e-2]) * np.ones((6, 4))
    ax = plot_update_ratios(make_history(ratio, update_ratio=ratio))
    assert legend(ax) == ["healthy: 0.0001 to 0.01", "largest: 1.weight", "smallest: 2.weight"]
    assert np.allclose(line(ax, "largest: 1.weight").get_ydata(), 1e-1)
    (band,) = ax.patches
    assert (band.get_y(), band.get_y() + band.get_height()) == pytest.approx((1e-4, 1e-2))
    assert len(ax.lines) == 1 + 4


def test_issues_stand_at_their_step_and_parameter() -> None:
    history = make_history(random_norms(50, 4), skipped=np.arange(50) == 20)
    issues = [
        ("nan", "2.weight", 7, NAN),
        ("missing", "0.weight", 9, None),
        ("nan", "0.weight", 8, NAN),
    ]
    ax = plot_issues(issues, history)
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0.weight", "2.weight"]
    nan = line(ax, "nan")
    assert set(zip(nan.get_xdata(), nan.get_ydata(), strict=True)) == {(7, 1), (8, 0)}
    assert line(ax, "skipped step").get_xdata() == [21, 21]
    assert ax.get_xlim()[0] <= 1
    assert ax.get_xlim()[1] >= 50


def test_each_kind_of_issue_has_a_shape_and_a_color_of_its_own() -> None:
    kinds = ["nan", "inf", "exploding", "vanishing", "missing"]
    history = make_history(random_norms())
    ax = plot_issues([(kind, "0.weight", 1, None) for kind in kinds], history)
    assert len({line(ax, kind).get_marker() for kind in kinds}) == 5
    assert len({line(ax, kind).get_color() for kind in kinds}) == 5
    assert ax.get_title() == ""


# --- a real run -----------------------------------------------------------------------------------


def test_a_real_run_is_drawn() -> None:
    """Sigmoids in a deep network: the norms fall toward the input, and the picture says so."""
    torch.manual_seed(0)
    model = nn.Sequential(*[m for _ in range(6) for m in (nn.Linear(16, 16), nn.Sigmoid())])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    recorded: list[Any] = []
    ratios: list[list[float]] = []
    for _ in range(12):
        optimizer.zero_grad()
        model(torch.randn(32, 16)).square().mean().backward()
        recorded.append(compute_gradient_statistics(model)["parameters"])
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.step()
        pairs = zip(model.parameters(), before, strict=True)
        ratios.append([((p - b).norm() / b.norm()).item() for p, b in pairs])
    names = list(recorded[0])
    values = {
        key: np.array([[row[n][key] for n in names] for row in recorded]) for key in STATISTICS
    }
    history = make_history(values.pop("norm"), names, **values, update_ratio=np.array(ratios))
    medians = line(plot_gradient_flow(history), "weights").get_xdata()
    assert (np.diff(medians) > 0).all()
    for draw in DRAW.values():
        draw(history, None).figure.canvas.draw()
