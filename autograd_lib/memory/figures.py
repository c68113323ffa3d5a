"""Pictures of what autograd keeps: the graph behind a tensor, and the bytes alive over a step."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable
from graphlib import TopologicalSorter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.module_tracker import ModuleTracker

from autograd_lib.gradients import check_module
from autograd_lib.memory.peak import check_step
from autograd_lib.memory.saved import graph_of, storages
from autograd_lib.report.plots import sized_axes
from autograd_lib.report.tables import readable_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_graph", "plot_memory"]

_MOST_NODES = 400  # a Transformer of six blocks; the picture of more would have too many pixels
_ROW = 0.56  # inches: two lines of text, and an arrow to the next row
_MOST_MODULES = 8  # with a color of their own
_OUTSIDE = "outside of modules"
_COLORS = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9"),
    *("#E69F00", "#F0E442", "#332288", "#BBBBBB", "#767676"),
)
_GREY = _COLORS[-1]


def plot_graph(tensor: Tensor, model: nn.Module | None = None, ax: Axes | None = None) -> Axes:
    r"""Draw the autograd graph behind a tensor: its nodes, what they save, and the leaves.

    Backward runs from the top, where the tensor stands, to the bottom. A box is a node of the
    graph (`grad_fn` and what `next_functions` reach), with the bytes of the tensors that it saves
    for backward; a storage that several nodes save counts at the first of them, from the top.
    Parameters and other leaves are green. The graph is only read: it can still run backward.

    Args:
        tensor: What `backward()` would be called on.
        model: Gives the leaves their names; without it they show their shape.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes.

    Raises:
        TypeError: If `tensor` is not a tensor, or `ax` not an Axes.
        ValueError: If the tensor has no graph, or its graph more than 400 nodes.
        ImportError: If Matplotlib is not installed.

    Example:
        >>> layer = nn.Linear(3, 2)
        >>> ax = plot_graph(layer(torch.ones(4, 3)).tanh(), layer)
        >>> [text.get_text().replace("\n", " ") for text in ax.texts if text.get_text()]
        ['Tanh 32 B', 'Addmm 48 B', 'T', 'weight', 'bias']
    """
    if not isinstance(tensor, Tensor):
        raise TypeError(
            f"plot_graph: expected a tensor, got {type(tensor).__name__}; pass the loss or "
            "an output of the model"
        )
    if tensor.grad_fn is None:
        raise ValueError(
            "plot_graph: the tensor has no graph (no grad_fn); compute it from tensors that "
            "require a gradient, outside of no_grad and before detach()"
        )
    inputs = graph_of(tensor)
    if len(inputs) > _MOST_NODES:
        raise ValueError(
            f"plot_graph: the graph has {len(inputs)} nodes, and at most {_MOST_NODES} can be read "
            "in a picture; draw the output of a submodule or of a smaller model"
        )
    names = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    inputs = {node: inputs[node] for node in [*TopologicalSorter(inputs).static_order()][::-1]}
    counted = {s._cdata for s in storages([getattr(node, "variable", None) for node in inputs])}
    labels = {node: _label(node, names, counted) for node in inputs}
    places = _places(inputs)
    widths = np.zeros(1 + max(column for column, _ in places.values()))  # of columns, in inches
    for node, (column, _) in places.items():
        longest = max(map(len, labels[node].split("\n")))
        widths[column] = max(widths[column], 0.3 + 0.07 * longest)
    height = _ROW * (1 + max(row for _, row in places.values()))
    ax = sized_axes("plot_graph", ax, (widths.sum(), height))
    ax.set(xlim=(0, widths.sum()), ylim=(height, 0))
    from matplotlib.text import OffsetFrom  # noqa: PLC0415

    text: dict[str, Any] = {"ha": "center", "va": "center", "size": 8, "color": "black"}
    middles, boxes = widths.cumsum() - widths / 2, {}
    for node, (column, row) in places.items():
        is_leaf = hasattr(node, "variable")
        face, edge = ("#E5F5F0", _COLORS[2]) if is_leaf else ("#E5F1F8", _COLORS[0])
        box = {"boxstyle": "round,pad=0.3", "facecolor": face, "edgecolor": edge}
        boxes[node] = ax.text(middles[column], _ROW * (row + 0.5), labels[node], bbox=box, **text)
    to_edge = 0.3 * 8 + 0.5  # points from a text to the edge of its box
    style = {"arrowstyle": "->", "color": _GREY, "shrinkA": 0, "shrinkB": 0}
    for node, reached in inputs.items():
        for below in reached:
            across, down = np.subtract(places[below], places[node])
            # A long arrow goes around the boxes that it passes, or behind them.
            arrow = {**style, "connectionstyle": f"arc3,rad={-0.35 * (across == 0 < down - 1)}"}
            start, end = OffsetFrom(boxes[node], (0.5, 0)), OffsetFrom(boxes[below], (0.5, 1))
            ax.annotate("", (0, to_edge), (0, -to_edge), end, start, arrow, zorder=4 / down)
    ax.axis("off")
    return ax


def plot_memory(model: nn.Module, step: Callable[[], object], ax: Axes | None = None) -> Axes:
    """Draw the bytes alive over one step, by the child of the model that allocated them.

    The horizontal axis counts the operations of the step, forward and backward. A storage counts
    from the operation that made it until it is freed, under the child whose forward or backward
    ran at that time; what stood before the step does not count. Compiled code shows none of its
    operations, and the scratch memory of kernels is not seen: `peak_bytes` counts that, too.

    Args:
        model: Gives the names.
        step: Runs forward and backward; it is called once.
        ax: Where to draw; a new figure if None.

    Returns:
        The axes; the peak stands in the title.

    Raises:
        TypeError: If `model` is not a module, `step` cannot be called, or `ax` is not an Axes.
        ValueError: If `step` allocated nothing that can be seen.
        ImportError: If Matplotlib is not installed.

    Example:
        >>> model = nn.Sequential(nn.Linear(256, 256), nn.Tanh())
        >>> ax = plot_memory(model, lambda: model(torch.ones(64, 256)).sum().backward())
        >>> [label.get_text() for label in ax.get_legend().get_texts()]
        ['0', '1', 'outside of modules']
    """
    check_module("plot_memory", model)
    check_step("plot_memory", step)
    ax = sized_axes("plot_memory", ax, (6.8, 3.4))
    seen = _Allocations(model)
    with seen.tracker, seen:
        step()
    alive = [*seen.alive, seen.now]
    names = list(dict.fromkeys(name for row in alive for name in row))
    if not names:
        raise ValueError(
            "plot_memory: step allocated nothing that can be seen; pass a step that runs the model "
            "eagerly, not in compiled code"
        )
    curves = {name: np.array([row[name] for row in alive]) for name in names}
    outside = {_OUTSIDE: curves.pop(_OUTSIDE)} if _OUTSIDE in curves else {}
    small = sorted(curves, key=lambda name: -curves[name].max())[_MOST_MODULES:]
    if small:
        curves["other modules"] = np.sum([curves.pop(name) for name in small], axis=0)
    curves |= outside
    total = np.sum(list(curves.values()), axis=0)
    peak, peak_at = int(total.max()), int(total.argmax())
    unit, divisor = ("MiB", 2**20) if peak >= 2**20 else ("KiB", 2**10)
    ax.stackplot(
        np.arange(len(total)),
        *(curve / divisor for curve in curves.values()),
        labels=list(curves),
        colors=_COLORS,
        step="post",
    )
    if seen.backward_at is not None:
        ax.axvline(seen.backward_at, color=_GREY, linestyle="--", linewidth=1)
        ax.text(seen.backward_at, 0.97, " backward", transform=ax.get_xaxis_transform(), va="top")
    ax.set_title(f"peak: {readable_bytes(peak)}, at operation {peak_at}", size=10)
    ax.set_xlabel("operation of the step")
    ax.set_ylabel(f"bytes alive, in {unit}")
    ax.margins(x=0)
    ax.set_ylim(top=1.15 * peak / divisor)  # room for the word above
    ax.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    return ax


class _Allocations(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, by module, until they are freed."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.now: Counter[str] = Counter()  # bytes alive by module
        self.alive: list[Counter[str]] = []  # the same after each operation
        self.backward_at: int | None = None
        self.tracker = ModuleTracker()
        self._known = weakref.WeakSet[torch.UntypedStorage]()
        for name, module in model.named_modules():  # else it names modules by their type
            self.tracker._known_modules[module] = name
            self.tracker._seen_modules.add(module)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), is_new=False)
        result = func(*args, **(kwargs or {}))
        if self.backward_at is None and self.tracker.is_bw:
            self.backward_at = len(self.alive)
        self._note(result, is_new=True)
        self.alive.append(self.now.copy())
        return result

    def _note(self, values: Any, *, is_new: bool) -> None:
        running = max(self.tracker.parents - {"Global"}, key=len, default="")
        name = running.partition(".")[0] or _OUTSIDE
        for storage in storages(values):
            nbytes = storage.nbytes() if is_new and storage not in self._known else 0
            self._known.add(storage)
            if nbytes:
                self.now[name] += nbytes
                weakref.finalize(storage, self.now.subtract, {name: nbytes})


def _places(inputs: dict[Any, list[Any]]) -> dict[Any, tuple[int, int]]:
    """Column and row of each node: below all that leads to it, the longest path on the left."""
    rows, heights = dict.fromkeys(inputs, 0), dict.fromkeys(inputs, 0)
    for node, below in inputs.items():
        for following in below:
            rows[following] = max(rows[following], rows[node] + 1)
    for node in reversed(inputs):
        heights[node] = max((heights[following] + 1 for following in inputs[node]), default=0)
    taken: Counter[int] = Counter()
    places = dict.fromkeys(inputs, (0, 0))  # keeps the order of the nodes
    for node in sorted(inputs, key=lambda node: -heights[node]):
        places[node] = taken[rows[node]], rows[node]
        taken[rows[node]] += 1
    return places


def _label(node: Any, names: dict[int, str], counted: set[int]) -> str:
    """Return what the box of a node says: a leaf's name or shape, or an operation and its bytes."""
    if hasattr(node, "variable"):
        return names.get(id(node.variable)) or f"leaf {list(node.variable.shape)}"
    nbytes = _saved_bytes(node, counted)
    name = node.name().removesuffix("0").removesuffix("Backward").rpartition("::")[2]
    return f"{name}\n{readable_bytes(nbytes)}" if nbytes else name


def _saved_bytes(node: Any, counted: set[int]) -> int:
    """Bytes of the storages that a node saves and that nobody counted; 0 once it has run."""
    names = [name for name in dir(node) if name.startswith("_saved_")]
    try:
        saved = [getattr(node, name, None) for name in [*names, "saved_tensors"]]
    except RuntimeError:  # backward has run and freed what was saved
        return 0
    new = {s._cdata: s.nbytes() for s in storages(saved) if s._cdata not in counted}
    counted.update(new)
    return sum(new.values())
