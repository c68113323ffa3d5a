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
from matplotlib.collections import LineCollection, QuadMesh
from torch import nn

from autograd_lib import GradientMonitor, compute_gradient_statistics
from autograd_lib.monitor.figures import (
    plot_gradient_flow,
    plot_gradient_heatmap,
    plot_gradient_histograms,
)

STATISTICS = ("norm", "mean", "std", "min", "max", "abs_max")
EDGES = 2.0 ** np.arange(-48, 17)


def make_history(norm: Any, names: list[str] | None = None, **more: Any) -> dict[str, Any]:
    """A history with these norms, [rows, parameters]; NaN stands for a missing gradient."""
    norm = np.asarray(norm, dtype=np.float64)
    rows, parameters = norm.shape
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
            "skipped": np.zeros(rows, dtype=bool),
            "present": ~np.isnan(norm),
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
    "all NaN": make_history(np.full((5, 3), NAN), present=np.ones((5, 3), dtype=bool)),
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
    "flow of updates": lambda history, ax: plot_gradient_flow(
        history, ax, statistic="update_ratio"
    ),
    **{
        f"heat map of {statistic}": lambda history, ax, statistic=statistic: plot_gradient_heatmap(
            history, ax, statistic=statistic
        )
        for statistic in ("norm", "mean", "update_ratio")
    },
    "histograms": lambda history, ax: plot_gradient_histograms(history, history["names"][0], ax),
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
    return next(c for c in ax.collections if isinstance(c, QuadMesh))


def broken(ax: Axes) -> list[list[int]]:
    """The cells [row, column] that are drawn as not finite."""
    _, found = [c for c in ax.collections if isinstance(c, QuadMesh)]
    return np.argwhere(~found.get_array().mask).tolist()


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


@every_figure
def test_a_monitor_is_taken_like_its_history(draw: Callable[..., Axes]) -> None:
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with GradientMonitor(model, optimizer, update_every=1, histogram_every=1) as monitor:
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
    of_monitor, of_history = (
        plot_gradient_histograms(source, "weight")
        if draw is DRAW["histograms"]
        else draw(source, None)
        for source in (monitor, monitor.history)
    )
    assert of_monitor.get_xlim() == of_history.get_xlim()
    assert of_monitor.get_ylim() == of_history.get_ylim()


@pytest.mark.parametrize("history", [{}, {"step": [1]}, [], None], ids=str)
@pytest.mark.parametrize(
    "draw",
    [
        plot_gradient_flow,
        plot_gradient_heatmap,
        lambda history: plot_gradient_histograms(history, "0.weight"),
    ],
)
def test_what_is_no_history_is_said(draw: Callable[..., Axes], history: Any) -> None:
    message = f"expected a GradientMonitor or its history, got {type(history).__name__}"
    with pytest.raises(TypeError, match=message):
        draw(history)


@every_figure
def test_axes_must_be_one(draw: Callable[..., Axes]) -> None:
    axes = plt.subplots(2)[1]
    with pytest.raises(TypeError, match=r"ax to be a matplotlib Axes, got ndarray.*axes\[0\]"):
        draw(make_history([[1.0]]), axes)


@pytest.mark.parametrize("statistic", ["total_norm", "present", "numel", "histogram", "x"])
def test_figures_know_their_statistics(statistic: str) -> None:
    history = make_history(random_norms())
    message = rf"a statistic among \['norm', 'mean', .*'inf_count'\], got '{statistic}'"
    with pytest.raises(ValueError, match=message):
        plot_gradient_heatmap(history, statistic=statistic)
    message = r"a statistic among \['norm', 'std', 'abs_max', 'update_ratio'\], got"
    for other in (statistic, "mean", "zero_fraction"):  # which no logarithmic axis can show
        with pytest.raises(ValueError, match=message):
            plot_gradient_flow(history, statistic=other)


@pytest.mark.parametrize(
    "statistic", ["update_ratio", "histogram", "zero_fraction", "nan_count", "inf_count", "cosine"]
)
def test_a_statistic_that_was_not_recorded_is_asked_for(statistic: str) -> None:
    history = make_history(random_norms())
    history.pop(statistic, None)
    draw: Callable[..., Axes] = plot_gradient_heatmap
    arguments = {"statistic": statistic}
    if statistic == "histogram":
        draw, arguments = plot_gradient_histograms, {"parameter": "0.weight"}
    message = f"no '{statistic}'; ask for it by collect=, update_every= or histogram_every="
    with pytest.raises(ValueError, match=message):
        draw(history, **arguments)


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
    assert as_drawn(ax.yaxis.label) == rf"magnitude of the elements of {names[0]}"


@pytest.mark.parametrize(("parameters", "named"), [(1, 1), (12, 12), (13, 7), (37, 10), (200, 12)])
def test_a_dozen_rows_are_named_and_all_are_drawn(parameters: int, named: int) -> None:
    names = [f"{i}.weight" for i in range(parameters)]
    history = make_history(random_norms(parameters=parameters), names)
    for draw in (plot_gradient_flow, plot_gradient_heatmap):
        ax = draw(history)
        labels = ax.get_yticklabels()
        assert len(labels) == named
        assert [label.get_text() for label in labels] == names[:: -(-parameters // 12)]
        assert all(label.get_size() == 10 for label in labels)
        assert ax.get_ylim() == (parameters - 0.5, -0.5)
    assert len(line(plot_gradient_flow(history), "median").get_xdata()) == parameters


def test_a_parameter_of_a_compiled_model_is_named() -> None:
    names = ["_orig_mod.0.weight"]
    ax = plot_gradient_flow(make_history([[1.0]], names))
    assert [label.get_text() for label in ax.get_yticklabels()] == names


@every_figure
def test_without_matplotlib(draw: Callable[..., Axes], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"plot_\w+ needs matplotlib: pip install matplotlib$"):
        draw(make_history([[1.0]]), None)


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (
            lambda h: plot_gradient_flow(h, statistic="update_ratio"),
            ValueError,
            "'update_ratio'.*update_every=",
        ),
        (lambda h: plot_gradient_histograms(h, "0.weight"), ValueError, "histogram_every="),
        (
            lambda h: plot_gradient_heatmap(h, statistic="zero_fraction"),
            ValueError,
            "no 'zero_fraction'; ask for it by collect=",
        ),
        (
            lambda h: plot_gradient_heatmap(h, statistic="median"),
            ValueError,
            r"a statistic among \['norm', 'mean'.*got 'median'",
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
    dots = line(ax, "median")
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


def test_flow_takes_weights_alone_where_there_are_some() -> None:
    names = ["0.weight", "0.bias", "attn.in_proj_weight", "attn.in_proj_bias", "bias_net.weight"]
    norm = random_norms(parameters=5)
    ax = plot_gradient_flow(make_history(norm, names))
    shown = [t.get_text() for t in ax.get_yticklabels()]
    assert shown == ["0.weight", "attn.in_proj_weight", "bias_net.weight"]
    assert np.allclose(line(ax, "median").get_xdata(), np.median(norm[:, [0, 2, 4]], axis=0))
    ax = plot_gradient_flow(make_history(norm[:, :2], ["0.bias", "1.bias"]))
    assert [t.get_text() for t in ax.get_yticklabels()] == ["0.bias", "1.bias"]


def test_flow_of_updates_is_of_the_steps_that_measured_them() -> None:
    norm = random_norms(30, 2)
    ratio = np.where(np.arange(30)[:, None] % 10 == 0, norm, NAN)
    ax = plot_gradient_flow(make_history(norm, update_ratio=ratio), statistic="update_ratio")
    assert np.allclose(line(ax, "median").get_xdata(), np.median(ratio[::10], axis=0))
    assert ax.get_xlabel() == "norm of the update / norm of the weight, steps 1 to 21"


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
    present = np.tile([False, True, True], (4, 1))
    ax = plot_gradient_flow(make_history(norm, present=present))
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
    assert legend(ax) == ["no value", "not finite (× where it began)"]
    assert broken(ax) == [[2, 3]]
    assert ax.patch.get_hatch(), "what is left is seen through: a gradient that is missing"
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
    present = np.ones_like(norm, dtype=bool)
    mean = np.full_like(norm, 0.1)
    mean[3456, 0] = -9
    ax = plot_gradient_heatmap(make_history(norm, present=present, mean=mean))
    cells = mesh(ax).get_array()
    assert cells.shape[1] <= 400
    assert cells[1].max() == 77
    starts = mesh(ax).get_coordinates()[0, :, 0]
    column = int(cells[1].argmax())
    assert starts[column] < 1235 < starts[column + 1]
    assert broken(ax) == [[2, 2345 // 13]]
    signed = mesh(
        plot_gradient_heatmap(make_history(norm, present=present, mean=mean), statistic="mean")
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


def test_the_mean_of_a_complex_gradient_is_drawn_by_its_real_part() -> None:
    history = make_history([[1.0, 2.0]], mean=np.array([[1 + 5j, -2 + 7j]]))
    ax = plot_gradient_heatmap(history, statistic="mean")
    assert mesh(ax).get_array().ravel().tolist() == [1, -2]


# --- histograms -----------------------------------------------------------------------------------


def test_columns_follow_the_counts() -> None:
    counts = np.zeros((3, 2, 64), dtype=np.int64)
    counts[0, 1, 30], counts[1, 1, 40], counts[2, 1, [0, 30, 41]] = 8, 8, [2, 2, 4]
    steps = np.array([1, 51, 91])
    history = make_history([[1.0, 1.0]], histogram=counts, histogram_step=steps)
    ax = plot_gradient_histograms(history, "1.weight")
    drawn = mesh(ax)
    shares = np.zeros((64, 3))
    shares[30, 0], shares[40, 1], shares[[0, 30, 41], 2] = 1, 1, [0.25, 0.25, 0.5]
    assert np.array_equal(drawn.get_array(), shares)
    corners = drawn.get_coordinates()
    assert corners[0, :, 0].tolist() == [0.5, 50.5, 90.5, 130.5]
    assert corners[:, 0, 1].tolist() == list(range(-48, 17)), "powers of two"
    assert ax.get_ylim() == (-48 + 30, -48 + 42), (
        "the bins that hold something, without that of the zeros"
    )


def test_histograms_are_of_a_parameter_of_the_history() -> None:
    with pytest.raises(ValueError, match=r"a parameter among \['0.weight'\], got 'x'"):
        plot_gradient_histograms(make_history([[1.0]]), "x")


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
    medians = line(plot_gradient_flow(history), "median").get_xdata()
    assert (np.diff(medians) > 0).all()
    for draw in DRAW.values():
        draw(history, None).figure.canvas.draw()
