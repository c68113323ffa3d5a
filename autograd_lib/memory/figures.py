"""Pictures of what autograd keeps: the graph behind a tensor, and the bytes alive over a step."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from autograd_lib.memory.saved import storage_parts
from autograd_lib.report.plots import sized_axes
from autograd_lib.report.tables import readable_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_graph", "plot_memory"]

_Node = torch.autograd.graph.Node

_MOST_NODES = 120  # beyond that the boxes are too small to read
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
        ValueError: If the tensor has no graph, or its graph more than 120 nodes.
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
    nodes, edges = _graph(tensor.grad_fn)
    if len(nodes) > _MOST_NODES:
        raise ValueError(
            f"plot_graph: the graph has {len(nodes)} nodes, and at most {_MOST_NODES} can be read "
            "in a picture; draw the output of a submodule or of a smaller model"
        )
    names = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    places = _places(nodes, edges)
    width = max(column for column, _ in places) + 1
    depth = max(row for _, row in places) + 1
    ax = sized_axes("plot_graph", ax, (max(4.0, 1.7 * width), max(2.5, 0.62 * depth)))
    for start, end in edges:
        (left, top), (right, bottom) = places[start], places[end]
        bend = -0.35 if left == right and bottom > top + 1 else 0.0  # around the boxes between
        style: dict[str, Any] = {"arrowstyle": "->", "color": _GREY, "shrinkA": 13, "shrinkB": 13}
        style["connectionstyle"] = f"arc3,rad={bend}"
        ax.annotate("", xy=places[end], xytext=places[start], arrowprops=style)
    counted: set[int] = {part.untyped_storage()._cdata for part in _leaf_parts(nodes)}
    for node, place in zip(nodes, places, strict=True):
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            label = names.get(id(leaf)) or f"leaf {list(leaf.shape)}"
        else:
            nbytes = _saved_bytes(node, counted)
            label = node.name().removesuffix("0").removesuffix("Backward").rpartition("::")[2]
            label += f"\n{readable_bytes(nbytes)}" if nbytes else ""
        face = "#E5F5F0" if leaf is not None else "#E5F1F8"
        edge = _COLORS[2] if leaf is not None else _COLORS[0]
        box = {"boxstyle": "round,pad=0.3", "facecolor": face, "edgecolor": edge}
        ax.text(*place, label, ha="center", va="center", size=8, color="black", bbox=box)
    ax.set_xlim(-0.7, width - 0.3)
    ax.set_ylim(depth - 0.4, -0.6)
    ax.axis("off")
    return ax


def plot_memory(
    model: nn.Module, step: Callable[[], object], ax: Axes | None = None, *, depth: int = 1
) -> Axes:
    """Draw the bytes alive over one step, by the module that allocated them.

    The horizontal axis counts the operations of the step, forward and backward. A storage counts
    from the operation that made it until it is freed, under the module whose forward or backward
    ran at that time; what stood before the step does not count. Compiled code shows none of its
    operations, and the scratch memory of kernels is not seen: `peak_bytes` counts that, too.

    Args:
        model: Gives the names.
        step: Runs forward and backward; it is called once.
        ax: Where to draw; a new figure if None.
        depth: How many parts of a qualified name tell modules apart: 1 for the model's children.

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
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"plot_memory: expected a torch.nn.Module, got {type(model).__name__}; pass the model "
            "whose modules are to be told apart"
        )
    if not callable(step):
        raise TypeError(
            f"plot_memory: expected a function without arguments, got {type(step).__name__}; pass "
            "`lambda: model(x).sum().backward()`, not its result"
        )
    ax = sized_axes("plot_memory", ax, (6.8, 3.4))
    with _Allocations(model, depth) as seen:
        step()
    curves = seen.curves()
    if not curves:
        raise ValueError(
            "plot_memory: step allocated nothing that can be seen; pass a step that runs the model "
            "eagerly, not in compiled code"
        )
    outside = curves.pop(_OUTSIDE, None)
    largest = sorted(curves, key=lambda name: -curves[name].max())
    names = [name for name in curves if name in largest[:_MOST_MODULES]]
    rows = [curves[name] for name in names]
    if rest := [curves[name] for name in largest[_MOST_MODULES:]]:
        names, rows = [*names, "other modules"], [*rows, np.sum(rest, axis=0)]
    if outside is not None:
        names, rows = [*names, _OUTSIDE], [*rows, outside]
    total = np.sum(rows, axis=0)
    peak, peak_at = int(total.max()), int(total.argmax())
    unit, divisor = ("MiB", 2**20) if peak >= 2**20 else ("KiB", 2**10)
    ax.stackplot(
        np.arange(len(total)),
        *(row / divisor for row in rows),
        labels=names,
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
    """Notes each storage that an operation makes, with the module that ran, until it is freed."""

    def __init__(self, model: nn.Module, depth: int) -> None:
        super().__init__()
        self.backward_at: int | None = None
        self._depth = depth
        self._operations = 0
        self._events: list[tuple[int, str, int]] = []  # operation, module, bytes or minus bytes
        self._known: set[int] = set()  # addresses of the storages that live
        self._is_open = True
        self._tracker = ModuleTracker()
        for name, module in model.named_modules():  # else it names modules by their type
            self._tracker._known_modules[module] = name
            self._tracker._seen_modules.add(module)

    def __enter__(self) -> _Allocations:
        self._tracker.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._tracker.__exit__(*exception)
        self._is_open = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note((args, kwargs), is_new=False)
        result = func(*args, **(kwargs or {}))
        if self.backward_at is None and self._tracker.is_bw:
            self.backward_at = self._operations
        self._note(result, is_new=True)
        self._operations += 1
        return result

    def _note(self, values: Any, *, is_new: bool) -> None:
        for tensor in tree_leaves(values):
            for part in storage_parts(tensor) if isinstance(tensor, Tensor) else ():
                storage = part.untyped_storage()
                if storage._cdata in self._known:
                    continue
                self._known.add(storage._cdata)
                name, nbytes = self._module(), storage.nbytes() if is_new else 0
                self._events.append((self._operations, name, nbytes))
                weakref.finalize(storage, self._freed, storage._cdata, name, nbytes)

    def _freed(self, address: int, name: str, nbytes: int) -> None:
        if self._is_open:
            self._known.discard(address)
            self._events.append((self._operations, name, -nbytes))

    def _module(self) -> str:
        running = max(self._tracker.parents - {"Global"}, key=len, default="")
        return ".".join(running.split(".")[: self._depth]) or _OUTSIDE

    def curves(self) -> dict[str, Any]:
        """Bytes alive after each operation, by module; modules that made nothing are left out."""
        changes: dict[str, Any] = {}
        for operation, name, nbytes in self._events:
            if nbytes:
                change = changes.setdefault(name, np.zeros(self._operations + 1, np.int64))
                change[operation] += nbytes
        return {name: change.cumsum() for name, change in changes.items()}


def _graph(root: _Node) -> tuple[list[_Node], list[tuple[int, int]]]:
    """Nodes in topological order from the root, and edges between their places."""
    inputs: dict[_Node, list[_Node]] = {}  # holds the nodes, so that each stays one Python object
    order, pending = [], [(root, False)]
    while pending:
        node, is_done = pending.pop()
        if is_done:
            order.append(node)
        elif node not in inputs:
            inputs[node] = [following for following, _ in node.next_functions if following]
            pending.append((node, True))
            pending.extend((following, False) for following in reversed(inputs[node]))
    order.reverse()
    place = {node: at for at, node in enumerate(order)}
    return order, [(place[node], place[following]) for node in order for following in inputs[node]]


def _places(nodes: list[_Node], edges: list[tuple[int, int]]) -> list[tuple[float, float]]:
    """Column and row of each node: below all that leads to it, the longest path on the left."""
    rows, heights = [0] * len(nodes), [0] * len(nodes)
    for start, end in sorted(edges):  # the order is topological
        rows[end] = max(rows[end], rows[start] + 1)
    for start, end in sorted(edges, reverse=True):
        heights[start] = max(heights[start], heights[end] + 1)
    taken: Counter[int] = Counter()
    places = [(0.0, 0.0)] * len(nodes)
    for at in sorted(range(len(nodes)), key=lambda at: -heights[at]):
        places[at] = float(taken[rows[at]]), float(rows[at])
        taken[rows[at]] += 1
    return places


def _leaf_parts(nodes: list[_Node]) -> Iterator[Tensor]:
    for node in nodes:
        if (leaf := getattr(node, "variable", None)) is not None:
            yield from storage_parts(leaf)


def _saved_bytes(node: _Node, counted: set[int]) -> int:
    """Bytes of the storages that a node saves and that nobody counted; 0 once it has run."""
    total = 0
    names = [name for name in dir(node) if name.startswith("_saved_")]
    for name in [*names, "saved_tensors"]:
        try:
            saved = getattr(node, name, None)
        except RuntimeError:  # backward has run and freed what was saved
            return 0
        for tensor in tree_leaves(saved):
            if isinstance(tensor, Tensor):
                for part in storage_parts(tensor):
                    storage = part.untyped_storage()
                    total += 0 if storage._cdata in counted else storage.nbytes()
                    counted.add(storage._cdata)
    return total
