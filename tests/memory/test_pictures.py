"""Pictures of the graph and of memory: what they show is what autograd and the allocator hold."""

from __future__ import annotations

import gc
import io
import weakref

import matplotlib.pyplot as plt
import pytest
import torch
from torch import nn

from autograd_lib import CustomTransformerModel, peak_bytes, plot_graph, plot_memory, saved_tensors


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def labels(ax):
    return [text.get_text() for text in ax.texts if text.get_text()]


def arrows(ax):
    return sum(not text.get_text() for text in ax.texts)


def test_a_graph_shows_nodes_with_saved_bytes_and_named_leaves():
    layer = nn.Linear(3, 2)
    ax = plot_graph(layer(torch.ones(4, 3)).tanh(), layer)
    assert sorted(labels(ax)) == sorted(["Tanh\n32 B", "Addmm\n48 B", "T", "weight", "bias"])
    assert arrows(ax) == 4


def test_without_a_model_leaves_show_their_shape():
    x = torch.ones(3, requires_grad=True)
    assert labels(plot_graph(x.exp())) == ["Exp\n12 B", "leaf [3]"]


def test_bytes_in_a_graph_are_those_that_saved_tensors_counts():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 2))
    x = torch.randn(4, 8, requires_grad=True)
    with saved_tensors(model) as saved:
        loss = model(x).square().sum()
    plain = model(x).square().sum()  # under the hooks of saved_tensors, nodes hold no tensors
    shown = [label.split("\n")[1] for label in labels(plot_graph(plain, model)) if "\n" in label]
    units = {"B": 1, "KiB": 1024}
    total = sum(float(n) * units[unit] for n, unit in map(str.split, shown))
    assert total == saved.total_bytes
    assert loss.item() == plain.item()


def test_a_storage_that_two_nodes_save_counts_once():
    x = torch.ones(4, requires_grad=True)
    y = x.exp()  # saved by exp, by sin and by cos
    assert sum("\n" in label for label in labels(plot_graph(y.sin() + y.cos()))) == 1


def test_a_custom_function_shows_what_it_saves():
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x + 1)
            return 2 * x

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    y = Double.apply(torch.ones(5, requires_grad=True))
    assert labels(plot_graph(y)) == ["Double\n20 B", "leaf [5]"]


def test_a_graph_can_still_run_backward_and_is_drawn_after_it_too():
    x = torch.ones(3, requires_grad=True)
    y = x.exp().sum()
    plot_graph(y)
    y.backward()
    assert torch.equal(x.grad, torch.ones(3).exp())
    assert labels(plot_graph(y)) == ["Sum", "Exp", "leaf [3]"]


def test_a_picture_of_a_graph_keeps_none_of_it_alive():
    x = torch.ones(3, requires_grad=True)
    y = x.exp()
    ax = plot_graph(y)
    ref = weakref.ref(y)
    del y
    gc.collect()
    assert ref() is None
    assert ax.texts


def test_a_transformer_of_six_blocks_can_be_drawn():
    model = CustomTransformerModel(11, 8, num_layers=6)
    ax = plot_graph(model(torch.ones(1, 2, dtype=torch.long)).sum(), model)
    places = [text.get_position() for text in ax.texts if text.get_text()]
    assert len(set(places)) == len(places) > 158  # a GPT-2 of two layers has so many
    assert {name for name, _ in model.named_parameters()} <= set(labels(ax))
    ax.figure.canvas.draw()


@pytest.mark.parametrize("dpi", [72, 160])
def test_an_arrow_reaches_from_box_to_box(dpi):
    x = torch.ones(3, requires_grad=True)
    ax = plot_graph(x.exp().sin())  # a column: two boxes of two lines, and one of one
    ax.figure.savefig(io.BytesIO(), dpi=dpi, bbox_inches="tight")
    ax.figure.set_dpi(dpi)
    ax.figure.canvas.draw()
    two_points = dpi / 36  # a head keeps room for its miter
    boxes = [text.get_bbox_patch().get_window_extent() for text in ax.texts if text.get_text()]
    drawn = [text.arrow_patch.get_window_extent() for text in ax.texts if not text.get_text()]
    for arrow, above, below in zip(drawn, boxes, boxes[1:], strict=False):
        assert arrow.y1 == pytest.approx(above.y0, abs=two_points)
        assert arrow.y0 == pytest.approx(below.y1, abs=two_points)
        assert arrow.height > 0.1 * dpi
    assert len(drawn) == 2


def test_a_small_graph_is_a_narrow_picture():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    ax = plot_graph(model(torch.ones(5, 3)).square().sum(), model)
    width = ax.figure.get_size_inches()[0]
    (size,) = {text.get_size() for text in ax.texts if text.get_text()}
    assert size / 72 * 358 / width > 11  # pixels high, on a page of 390 pixels


def test_shared_weights_are_one_leaf():
    layer = nn.Linear(4, 4, bias=False)
    assert labels(plot_graph(layer(layer(torch.ones(1, 4))), layer)).count("weight") == 1


@pytest.mark.parametrize(
    ("tensor", "error", "message"),
    [
        (3.0, TypeError, "expected a tensor, got float"),
        (torch.ones(2), ValueError, "has no graph"),
        (torch.ones(2, requires_grad=True), ValueError, "has no graph"),
    ],
)
def test_what_has_no_graph_is_refused(tensor, error, message):
    with pytest.raises(error, match=f"plot_graph: .*{message}"):
        plot_graph(tensor)


def test_a_graph_too_large_to_read_is_refused_with_its_size():
    x = y = torch.ones(1, requires_grad=True)
    for _ in range(400):
        y = y.exp()
    with pytest.raises(ValueError, match="the graph has 401 nodes, and at most 400"):
        plot_graph(y)
    assert x.grad is None


def areas(ax):
    """Bytes alive by module, from the polygons of the picture."""
    unit = 2**20 if "MiB" in ax.get_ylabel() else 2**10
    tops = [band.get_paths()[0].vertices[:, 1].max() * unit for band in ax.collections]
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    return dict(zip(names, tops, strict=True))


def test_the_peak_of_the_picture_is_the_measured_one():
    torch.manual_seed(0)
    model = CustomTransformerModel(200, 64, num_layers=2)
    tokens = torch.randint(0, 200, (8, 32))

    def step():
        loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
        loss.backward()
        return loss

    top = max(areas(plot_memory(model, step)).values())
    model.zero_grad()

    def measured():
        step()
        model.zero_grad()

    assert top == pytest.approx(peak_bytes(measured), rel=0.02)


def test_memory_is_told_apart_by_module_in_backward_too():
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 8))
    x = torch.ones(64, 256)
    ax = plot_memory(model, lambda: model(x).sum().backward())
    assert list(areas(ax)) == ["0", "1", "2", "outside of modules"]
    # Alive at the end: the gradients of the parameters, which each layer's backward made.
    ends = [band.get_paths()[0].vertices for band in ax.collections]
    unit = 2**20 if "MiB" in ax.get_ylabel() else 2**10
    last = ends[0][ends[0][:, 0] == ends[0][:, 0].max(), 1].max() * unit
    assert last == 4 * (256 * 512 + 512)


def test_small_modules_share_a_color():
    model = nn.Sequential(*(nn.Linear(4, 4 * 2**i) for i in range(10)))

    def step():
        sum(layer(torch.ones(8, 4)).sum() for layer in model).backward()

    assert list(areas(plot_memory(model, step))) == [
        *map(str, range(2, 10)),
        *("other modules", "outside of modules"),
    ]


def test_what_stood_before_the_step_does_not_count():
    model = nn.Linear(4, 4)
    before = torch.ones(1000, 1000)
    ax = plot_memory(model, lambda: (before * 1)[:4, :4].matmul(model.weight).sum().backward())
    assert max(areas(ax).values()) < 5e6


def test_nothing_remains_after_an_exception():
    model = nn.Linear(2, 2)

    def step():
        model(torch.ones(1, 2))
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        plot_memory(model, step)
    assert not torch.nn.modules.module._global_forward_hooks
    assert not torch.nn.modules.module._global_forward_pre_hooks
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((len, lambda: None), TypeError, "expected a torch.nn.Module"),
        ((nn.Linear(1, 1), torch.ones(1)), TypeError, "expected a function without arguments"),
        ((nn.Linear(1, 1), lambda: None), ValueError, "allocated nothing"),
    ],
)
def test_bad_arguments_of_plot_memory(arguments, error, message):
    with pytest.raises(error, match=f"plot_memory: .*{message}"):
        plot_memory(*arguments)
