"""Measuring what each block of a chain costs.

Each block runs alone, so that measuring needs memory for one block and the inputs of all. Head and
tail are measured in the step itself, where one Function stands for each block.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from autograd_lib.checkpointing.ends import Ends
from autograd_lib.checkpointing.probe import Probe, nbytes
from autograd_lib.checkpointing.recompute import (
    kept_forwards,
    put_back,
    tensor_attributes,
    undo,
)
from autograd_lib.checkpointing.solver import Block, Chain
from autograd_lib.checkpointing.trees import place
from autograd_lib.checkpointing.visit import Blocks, Visit, visit_blocks
from autograd_lib.core.snapshot import ModuleState, preserved_random_state
from autograd_lib.memory.saved import graph_of

_PLAIN = (bool, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_CONTAINERS = (list, tuple, dict, set, frozenset)


def measure(
    blocks: Blocks, step: Callable[[], Tensor], accumulate: bool, show: Callable[[str], None]
) -> tuple[Chain, dict[int, str]]:
    """Measure every kind of block, head and tail of `step`, which runs forward to the loss.

    Blocks that are alike are measured once.

    Returns:
        The costs, and why some blocks cannot be recomputed, by index.
    """
    with _untouched(blocks) as keep, torch.enable_grad():
        show("running the step")
        visits, loss = visit_blocks(blocks, step)
        leaves = leaves_of(loss)
        keep(leaves)
        del loss
        ends = Ends(blocks, step, visits, leaves, accumulate)
        chain, gradients, made = ends.measure(), ends.gradients, ends.made
        costs, refused = list[Block](), dict[int, str]()
        known: list[tuple[Any, tuple[Block, str, dict[int, Tensor]]]] = []
        for index in reversed(range(len(blocks))):
            show(f"measuring block {len(blocks) - index} of {len(blocks)}")
            visit = visits[index]
            probe = Probe(blocks[index], visit, gradients, made)
            own = _traits(probe, index)
            found = next((found for other, found in known if own == other), None)
            if found is None:
                found = probe.measure()
                known.append((own, found))
            block, why, arrived = found
            costs.insert(0, _numbered(block, visit))
            if why:
                refused[index] = why
            gradients.pop(place(visit.made.leaves[visit.output]), None)
            gradients |= {place(visit.given.leaves[i]): g for i, g in arrived.items()}
            made.update(probe.parameters)
        first = arrived.get(visits[0].chain)
    return replace(chain, blocks=tuple(costs), input_gradient=nbytes([first])), refused


@contextlib.contextmanager
def _untouched(blocks: Blocks) -> Iterator[Callable[[Iterable[Tensor]], None]]:
    """Run without the steps of `apply_checkpoints`, and restore what running changes.

    That is random states, and of every module that runs buffers, generators, tensors that are
    attributes, and gradients, which are None in the block. Yields a function that keeps the
    gradients of other tensors too.
    """
    known = set[Tensor]()
    states: dict[nn.Module, ModuleState] = {}  # Dynamo traces `note`, and knows such a dict
    with contextlib.ExitStack() as restore:

        def keep(tensors: Iterable[Tensor]) -> None:
            for tensor in set(tensors) - known:
                known.add(tensor)
                restore.callback(setattr, tensor, "grad", tensor.grad)
                tensor.grad = None

        def note(module: nn.Module, _: Any = None) -> None:
            if module not in states:
                states[module] = ModuleState([module])
                restore.callback(put_back, [module], tensor_attributes([module]))
                restore.callback(states[module].restore)
                keep(p for p in module._parameters.values() if p is not None)

        for block in blocks:
            for module in block.modules():
                note(module)
        hook = nn.modules.module.register_module_forward_pre_hook(note)
        restore.callback(hook.remove)
        planned = [blocks, *blocks] if isinstance(blocks, nn.Sequential) else blocks
        with kept_forwards(planned), preserved_random_state():
            for module in planned:
                undo(module)
            yield keep


def _numbered(block: Block, visit: Visit) -> Block:
    """Replace the names of shared tensors, which differ from block to block, by numbers."""

    def numbered(way: Any) -> Any:
        return way and replace(way, shared=frozenset(visit.shared[name] for name in way.shared))

    ways = {"save": block.save, "selective": block.selective, "recompute": block.recompute}
    return replace(block, **{name: numbered(way) for name, way in ways.items()})


def leaves_of(loss: Tensor) -> list[Tensor]:
    """List the tensors whose `.grad` a backward of `loss` sets."""
    return [node.variable for node in graph_of(loss) if hasattr(node, "variable")]


# Which blocks are alike, so that one measurement serves them all


@dataclass(frozen=True, eq=False)
class _Number:
    """A number that may count the blocks, as `layer_idx` does: equal if it differs as they do."""

    value: int
    block: int

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Number):
            return False
        return self.value - other.value in (0, self.block - other.block)

    __hash__ = None  # type: ignore[assignment]


def _traits(probe: Probe, index: int) -> list[Any]:
    """What decides over costs and gradients of a block and its call, to be compared.

    That is every attribute of its modules, shapes instead of tensors; what it is called with; and
    the sizes of what its forward allocated, which differ where work depends on values, as in a
    mixture of experts. What cannot be compared by value counts as equal only if it is identical.
    """
    made, visit = set(probe.made), probe.visit
    found: list[Any] = []
    for name, module in probe.module.named_modules():
        found += [name, type(module), module._compiled_call_impl is None]
        for key, value in vars(module).items():
            if key in ("_parameters", "_buffers"):
                found += [(n, x in made, _trait(x, index)) for n, x in value.items()]
            elif key not in ("_modules", "_compiled_call_impl"):
                found += [key, _trait(value, index)]
    found += [visit.needing, visit.chain, visit.growing, visit.output, visit.draws, visit.sizes]
    found += [visit.autocast, visit.passed, list(visit.shared), probe.others]
    found += [len(visit.attributes), list(probe.gradients)]
    found += [_trait(gradient, index) for gradient in probe.gradients.values()]
    for tree in (visit.given, visit.made):
        found += [tree.skeleton, [_trait(leaf, index) for leaf in tree.leaves]]
    return found


def _trait(value: Any, index: int) -> Any:
    if isinstance(value, Tensor):
        strides = value.stride() if value.layout is torch.strided else None
        return value.shape, strides, nbytes([value]), value.dtype, value.device, value.requires_grad
    if type(value) is int:
        return _Number(value, index)
    if isinstance(value, _PLAIN):
        return value
    return repr(value) if isinstance(value, _CONTAINERS) else id(value)
