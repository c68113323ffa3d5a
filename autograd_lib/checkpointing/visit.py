"""Running the step with something in place of its blocks; the first run sees how they are called.

It runs them under checkpoints, and finds what no plan can serve.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autograd_lib.checkpointing.recompute import (
    kept_forwards,
    refuses_hooks,
    runs_its_children,
    slot,
    tensor_attributes,
)
from autograd_lib.checkpointing.trees import Tree, flatten, place
from autograd_lib.core.snapshot import GLOBAL_GENERATORS, own_generators
from autograd_lib.memory.peak import Marks, Trace

Blocks = nn.Sequential | nn.ModuleList | list[nn.Module] | tuple[nn.Module, ...]
_SKIPPED = "Where blocks are skipped at random (layer drop), set the rate to 0 first"
_BACKWARD = (
    "plan_checkpoints: expected a step that runs no backward through the blocks before it returns "
    "the loss, but this one does (for forces, a gradient penalty, or as a whole training step); "
    "return the loss without its backward, and use checkpoints by hand for a second derivative"
)


def label(blocks: Blocks, index: int) -> str:
    """What messages call a block."""
    return f"{index} ({type(blocks[index]).__name__})"


@contextlib.contextmanager
def intercept(blocks: Blocks, handler: Callable[..., Any]) -> Iterator[None]:
    """Call `handler(index, call, *args, **kwargs)` in place of each block."""
    position = 0

    def forward(block: nn.Module, plain: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        nonlocal position
        if position == len(blocks) or blocks[position] is not block:
            index = next(i for i, candidate in enumerate(blocks) if candidate is block)
            raise ValueError(
                "plan_checkpoints: expected the blocks to run once each, in their order, but "
                f"block {label(blocks, index)} ran as number {position}; pass them in "
                f"the order in which the model calls them. {_SKIPPED}"
            )
        position += 1
        return handler(position - 1, plain, *args, **kwargs)

    def sequence(x: Any) -> Any:
        for child in blocks:
            x = forward(child, child, x)
        return x

    overridden: dict[nn.Module, Callable[..., Any]]
    overridden = {block: partial(forward, block, getattr(block, slot(block))) for block in blocks}
    if isinstance(blocks, nn.Sequential) and runs_its_children(blocks):
        overridden = {blocks: sequence}
    with kept_forwards(overridden):
        for module, function in overridden.items():
            setattr(module, slot(module), function)
        yield
    if position != len(blocks):
        absent = "" if position else "These modules are not in the model that it runs, or skipped. "
        raise ValueError(
            f"plan_checkpoints: the step ran {position} of {len(blocks)} blocks; expected all of "
            f"them, once each. {absent}{_SKIPPED}"
        )


@dataclass
class Visit:
    """One call of a block in the step; tensors are detached.

    Attributes:
        label: What messages call the block.
        given: Arguments and keyword arguments.
        needing: Leaves of `given` that require a gradient.
        chain: The leaf of `given` that comes from the block before.
        made: The result, and the tensors that the block left as attributes.
        attributes: Where it left them.
        growing: Leaves of `made` that require a gradient.
        output: The leaf of `made` that the next block takes.
        autocast: Its state.
        draws: The generator that the forward drew from, other than PyTorch's own.
        sizes: Bytes of the allocations in its forward.
        shared: Which tensors, such as "argument 2" or "result 1", stand until backward only where
            blocks keep them, with numbers that identify them.
    """

    label: str
    given: Tree
    needing: list[int]
    chain: int
    made: Tree
    attributes: list[tuple[nn.Module, str]]
    growing: list[int]
    output: int
    autocast: dict[str, Any]
    draws: str
    sizes: list[int] = field(default_factory=list)
    shared: dict[str, int] = field(default_factory=dict)

    @property
    def input(self) -> Tensor:
        """What the block takes from the one before."""
        return self.given.leaves[self.chain]

    @property
    def others(self) -> list[int]:
        """Leaves of `given` that require a gradient, besides the input."""
        return [i for i in self.needing if i != self.chain]

    @property
    def passed(self) -> dict[int, int]:
        """Leaves of `made` that are arguments unchanged, besides the input and the output."""
        known = {place(self.given.leaves[i]): i for i in self.given.tensors() if i != self.chain}
        leaves = {i: place(self.made.leaves[i]) for i in self.made.tensors() if i != self.output}
        return {i: known[where] for i, where in leaves.items() if where in known}

    @property
    def own(self) -> list[int]:
        """Tensors among the leaves of `made` that are not passed through."""
        return [i for i in self.made.tensors() if i not in self.passed]

    def results(self, result: Any) -> list[Any]:
        """Take a result apart, with the attributes."""
        return flatten((result, [vars(module)[name] for module, name in self.attributes])).leaves


def visit_blocks(blocks: Blocks, step: Callable[[], Tensor]) -> tuple[list[Visit], Tensor]:
    """Run the step once, with all blocks under checkpoints; return the calls and the loss.

    Raises:
        ValueError: No plan can serve the step.
    """
    visits: list[Visit] = []
    running, loss = True, None

    def early(_: Tensor) -> None:
        if running:
            raise ValueError(_BACKWARD)

    def handler(
        marks: Marks, index: int, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        if refuses_hooks():
            raise ValueError(_BACKWARD)
        name, modules = label(blocks, index), list(blocks[index].modules())
        given = flatten((args, kwargs))
        chain = _follows(name, given, visits)
        needing = given.tensors(lambda x: x.requires_grad)
        kind = given.leaves[chain].device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        autocast = {"device_type": kind, "dtype": dtype, "enabled": enabled}
        arguments: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
        before = {key: _state(value, given.leaves[chain]) for key, value in arguments.items()}
        attributes, generators = tensor_attributes(modules), _generators(modules)
        marks(f"in {index}")
        result = checkpoint(call, *args, use_reentrant=False, **kwargs)
        marks(f"out {index}")
        for key, value in arguments.items():
            if _state(value, given.leaves[chain]) != before[key]:
                raise ValueError(
                    f"plan_checkpoints: block {name} writes into its argument {key!r} (a "
                    f"{type(value).__name__}), which running it again would do twice; call the "
                    "model without it (use_cache=False)"
                )
        left = {k: v for k, v in tensor_attributes(modules).items() if attributes.get(k) is not v}
        made = flatten((result, list(left.values())))
        tensors = made.tensors()
        if not tensors:
            raise ValueError(
                f"plan_checkpoints: expected block {name} to return a tensor, or tensors in a "
                f"tuple, mapping or object, got {type(result).__name__}"
            )
        growing = made.tensors(lambda x: x.requires_grad)
        for i in growing:
            made.leaves[i].register_hook(early)
        output = visits[-1].output if visits and visits[-1].output in tensors else tensors[0]
        draws = [g for g, state in _generators(modules).items() if generators[g] != state]
        call_of = name, given.detached(), needing, chain
        made_of = made.detached(), list(left), growing, output
        visits.append(Visit(*call_of, *made_of, autocast, "".join(draws[:1])))
        return result

    def run(marks: Marks) -> None:
        nonlocal loss
        with intercept(blocks, partial(handler, marks)):
            loss = step()

    trace = Trace(run)
    running = False
    for index, visit in enumerate(visits):
        visit.sizes += [n for _, n in trace.cut(f"in {index}", f"out {index}") if n > 0]
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return visits, loss
    got = type(loss).__name__
    if isinstance(loss, Tensor):
        got = f"a tensor of shape {list(loss.shape)}, requires_grad={loss.requires_grad}"
    raise ValueError(
        "plan_checkpoints: expected a step that returns a scalar loss which requires a "
        f"gradient, got {got}; there is nothing to plan without a backward"
    )


def _follows(name: str, given: Tree, visits: list[Visit]) -> int:
    """Find the leaf of the arguments that comes from the block before, and note it there."""
    made = visits[-1].made if visits else given
    places = {place(made.leaves[i]): i for i in reversed(made.tensors())}  # the first counts
    for i in given.tensors():
        if place(given.leaves[i]) in places:
            if visits:
                visits[-1].output = places[place(given.leaves[i])]
            return i
    raise ValueError(
        f"plan_checkpoints: expected block {name} to take the output of the block before it as an "
        "argument; what happens between two blocks must be in one of them"
    )


def _state(value: Any, chain: Tensor) -> Any:
    """What changes when something is written into an argument, but for the chain's tensor."""
    tree = flatten(value)
    tensors = [x for x in tree.leaves if isinstance(x, Tensor) and x is not chain]
    versions = [None if x.is_inference() else x._version for x in tensors]
    return tree.skeleton, [id(leaf) for leaf in tree.leaves], versions


def _generators(modules: list[nn.Module]) -> dict[str, Any]:
    """States, to be compared, of the generators that a checkpoint does not restore."""
    found = [*GLOBAL_GENERATORS, *(g for module in modules for g in own_generators(module))]
    states = [(g.name, g.get_state()) for g in found]
    return {n: s.tolist() if isinstance(s, Tensor) else pickle.dumps(s) for n, s in states}
