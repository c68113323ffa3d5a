"""Measuring what each block of a chain costs.

Each block runs alone, so that measuring needs memory for one block and the inputs of all. Head and
tail are measured in the step itself, where one Function stands for each block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from autograd_lib.checkpointing.ends import Ends
from autograd_lib.checkpointing.intercept import Blocks, untouched
from autograd_lib.checkpointing.kinds import traits
from autograd_lib.checkpointing.probe import Probe, nbytes, nodes_of
from autograd_lib.checkpointing.solver import Block, Chain
from autograd_lib.checkpointing.trees import place
from autograd_lib.checkpointing.visit import Visit, visit_blocks


def measure(
    blocks: Blocks, step: Callable[[], Tensor], accumulate: bool, show: Callable[[str], None]
) -> tuple[Chain, dict[int, str]]:
    """Measure every kind of block, head and tail of `step`, which runs forward to the loss.

    Blocks that are alike are measured once.

    Returns:
        The costs, and why some blocks cannot be recomputed, by index.
    """
    with untouched(blocks) as keep, torch.enable_grad():
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
            own = traits(probe, index)
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


def _numbered(block: Block, visit: Visit) -> Block:
    """Replace the names of shared tensors, which differ from block to block, by numbers."""

    def numbered(way: Any) -> Any:
        return way and replace(way, shared=frozenset(visit.shared[name] for name in way.shared))

    ways = {"save": block.save, "selective": block.selective, "recompute": block.recompute}
    return replace(block, **{name: numbered(way) for name, way in ways.items()})


def leaves_of(loss: Tensor) -> list[Tensor]:
    """List the tensors whose `.grad` a backward of `loss` sets."""
    return [node.variable for node in nodes_of(loss) if hasattr(node, "variable")]
