"""Measuring what each block of a chain costs.

Each block runs alone, so that measuring needs memory for one block and the inputs of all. Head and
tail are measured in the step itself, where one Function stands for the blocks.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autograd_lib.checkpointing.probe import (
    ROUNDS,
    Probe,
    Visit,
    checkpoint_bytes,
    nbytes,
    no_collection,
)
from autograd_lib.checkpointing.recompute import kept_forwards, runs_its_children, slot, undone
from autograd_lib.checkpointing.solver import Block, Chain, Mode
from autograd_lib.checkpointing.trace import Layout, Marks, StandIn, Trace
from autograd_lib.core.snapshot import ModuleState, preserved_random_state, without_gradients

Blocks = nn.Sequential | nn.ModuleList | list[nn.Module] | tuple[nn.Module, ...]
Call = Callable[[Tensor], Tensor]


@contextlib.contextmanager
def intercept(blocks: Blocks, handler: Callable[..., Tensor]) -> Iterator[None]:
    """Call `handler(index, call, x, *args, **kwargs)` in place of each block."""
    position = 0

    def forward(block: nn.Module, plain: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        nonlocal position
        if position == len(blocks) or blocks[position] is not block:
            raise ValueError(
                f"plan_checkpoints: expected the blocks to run once each, in their order, but "
                f"{_name(blocks, block)} ran as number {position}; pass them in the order in "
                "which the model calls them"
            )
        position += 1
        return handler(position - 1, plain, *args, **kwargs)

    def sequence(x: Any) -> Any:
        nonlocal position
        for child in blocks:
            position += 1
            x = handler(position - 1, child, x)
        return x

    overridden: dict[nn.Module, Callable[..., Any]] = {}
    if isinstance(blocks, nn.Sequential) and runs_its_children(blocks):
        overridden[blocks] = sequence
    else:
        for block in blocks:
            overridden[block] = partial(forward, block, getattr(block, slot(block)))
    with kept_forwards(overridden):
        for module, function in overridden.items():
            setattr(module, slot(module), function)
        yield
    if position != len(blocks):
        raise ValueError(
            f"plan_checkpoints: the step ran {position} of {len(blocks)} blocks; expected all of "
            "them, once each"
        )


def _name(blocks: Blocks, block: nn.Module) -> str:
    index = next(i for i, candidate in enumerate(blocks) if candidate is block)
    return f"block {index} ({type(block).__name__})"


@contextlib.contextmanager
def untouched(blocks: Blocks) -> Iterator[None]:
    """Restore random states, and buffers and generators of every module that runs in the block."""
    states: dict[nn.Module, ModuleState] = {}

    def note(module: nn.Module, _: Any = None) -> None:
        if module not in states:
            states[module] = ModuleState([module])

    for block in blocks:
        for module in block.modules():
            note(module)
    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        with preserved_random_state():
            yield
    finally:
        handle.remove()
        for state in states.values():
            state.restore()


@dataclass
class _Seen:
    """What one run of the step recorded: calls of the blocks, last output, leaves of the graph."""

    visits: list[Visit]
    output: Tensor
    leaves: list[Tensor]


@dataclass
class Measured:
    """The costs of a chain, and why some blocks cannot be recomputed."""

    chain: Chain
    refused: dict[int, str]


def measure(
    blocks: Blocks, step: Callable[[], Tensor], accumulate: bool, show: Callable[[str], None]
) -> Measured:
    """Measure every block, head and tail of `step`, which runs forward and returns the loss."""
    planned = [blocks, *blocks] if isinstance(blocks, nn.Sequential) else list(blocks)
    with undone(planned), untouched(blocks), torch.enable_grad():
        show("running the step")
        seen = _visit(blocks, step)
        parameters = [p for block in blocks for p in block.parameters()]
        with without_gradients(list(dict.fromkeys([*seen.leaves, *parameters]))):
            ends = _Ends(blocks, step, seen, accumulate)
            gradient, found, refused = ends.gradient, [], {}
            made = set(ends.made)  # parameters with gradients from the tail or later blocks
            for index in reversed(range(len(blocks))):
                show(f"measuring block {len(blocks) - index} of {len(blocks)}")
                probe = Probe(blocks[index], seen.visits[index], gradient, made)
                block, why = probe.measure(f"{index} {type(blocks[index]).__name__}")
                found.append(block)
                if why:
                    refused[index] = why
                made.update(probe.parameters)
                gradient = probe.input_gradient
            return Measured(ends.chain(tuple(reversed(found)), gradient), refused)


def _visit(blocks: Blocks, step: Callable[[], Tensor]) -> _Seen:
    """Run the step once, with all blocks under checkpoints, and record the arguments of each."""
    visits: list[Visit] = []
    outputs: list[Tensor] = []

    def handler(index: int, call: Call, x: Any, /, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(x, Tensor) or (outputs and not _is_same(x, outputs[-1])):
            raise ValueError(
                f"plan_checkpoints: expected block {index} to take the output of the block before "
                "it as its first argument; what happens between two blocks must be in one of them"
            )
        autocast = _autocast(x.device.type)
        visits.append(Visit(x.detach(), x.requires_grad, args, kwargs, autocast))
        y = checkpoint(call, x, *args, use_reentrant=False, **kwargs)
        if not isinstance(y, Tensor):
            raise ValueError(
                f"plan_checkpoints: expected block {index} to return one tensor, got "
                f"{type(y).__name__}; wrap the block in a module that does"
            )
        outputs.append(y)
        return y

    with intercept(blocks, handler):
        loss = step()
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        raise ValueError(
            "plan_checkpoints: expected a step that returns a scalar loss which requires a "
            f"gradient, got {_describe(loss)}; there is nothing to plan without a backward"
        )
    return _Seen(visits, outputs[-1].detach(), leaves_of(loss))


def _is_same(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors are the same memory; hooks on modules may have wrapped one of them."""
    return x.data_ptr() == y.data_ptr() and x.shape == y.shape and x.stride() == y.stride()


def _describe(value: Any) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"a tensor of shape {list(value.shape)}, requires_grad={value.requires_grad}"


def _autocast(device: str) -> dict[str, Any]:
    if not torch.is_autocast_enabled(device):
        return {}
    return {"device_type": device, "dtype": torch.get_autocast_dtype(device)}


def leaves_of(loss: Tensor) -> list[Tensor]:
    """List the tensors whose `.grad` a backward of `loss` sets."""
    found, pending, seen = [], [loss.grad_fn], set()
    while pending:
        node = pending.pop()
        if node is not None and node not in seen:
            seen.add(node)
            if hasattr(node, "variable"):
                found.append(node.variable)
            pending.extend(parent for parent, _ in node.next_functions)
    return found


class _Ends:
    """Head and tail, measured in the step with a stand-in for the blocks."""

    def __init__(
        self, blocks: Blocks, step: Callable[[], Tensor], seen: _Seen, accumulate: bool
    ) -> None:
        self.blocks, self.step, self.accumulate = blocks, step, accumulate
        self.leaves, self.value = seen.leaves, seen.output
        self.first = seen.visits[0]
        self.gradient: Layout | None = None
        self.made: list[Tensor] = []
        self.addresses = [0, 0, 0]  # of the blocks' input and output, and of its gradient
        run = self._run
        self._forget()
        run(Marks())  # warm
        self._forget()
        self.trace = Trace(run, seen.output.device)
        self.source, self.target, self.arrived = self.addresses
        self._forget()
        times = []
        for _ in range(ROUNDS):
            marks = Marks()
            with no_collection():
                run(marks)
            times.append(marks.seconds("start", "blocks") + marks.seconds("tail", "end"))
            self._forget()
        self.seconds = statistics.median(times)

    def _forget(self) -> None:
        for leaf in self.leaves:
            leaf.grad = torch.zeros_like(leaf) if self.accumulate else None

    def _run(self, marks: Marks) -> None:
        def back(gradient: Tensor) -> Tensor | None:
            marks("arrived")
            self.gradient = Layout.of(gradient)
            self.addresses[2] = gradient.untyped_storage().data_ptr()
            self.made = [leaf for leaf in self.leaves if leaf.grad is not None]
            given = torch.ones_like(self.first.input) if self.first.needs_gradient else None
            marks("back")
            return given

        def handler(index: int, _: Call, x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
            if index == 0:
                marks("blocks")
                self.addresses[0] = x.untyped_storage().data_ptr()
                anchor = torch.ones((), device=x.device, requires_grad=True)
                x = StandIn.apply(anchor, x, self.value, back)
                self.addresses[1] = x.untyped_storage().data_ptr()
                marks("tail")
            return x

        torch.clear_autocast_cache()
        marks("start")
        with intercept(self.blocks, handler):
            loss = self.step()
        marks("loss")
        loss.backward()
        marks("end")

    def chain(self, blocks: tuple[Block, ...], input_gradient: Layout | None) -> Chain:
        trace = self.trace
        source, target = trace.number(self.source, "blocks"), trace.number(self.target, "tail")
        head = trace.standing("start", "blocks", "blocks")
        kept = trace.standing("start", "blocks", "loss")
        tail = trace.standing("blocks", "loss", "loss")
        held = source in kept or source not in head
        size = head.get(source, 0)
        frames = sum(head.values()) - sum(kept.values()) - (0 if held else size)
        keeps_input = tail.pop(target, 0) > 0
        made = trace.standing("loss", "arrived", "arrived")
        made.pop(trace.number(self.arrived, "arrived"), None)
        return Chain(
            blocks,
            input=size,
            input_held=held,
            input_gradient=0 if input_gradient is None else input_gradient.nbytes,
            head_kept=sum(kept.values()),
            head_frames=frames,
            head_forward_peak=trace.peak("start", "blocks"),
            head_backward_peak=trace.peak("back", "end"),
            tail=Mode(
                seconds=0.0,
                forward_peak=trace.peak("tail", "loss"),
                kept=sum(tail.values()),
                keeps_output=False,
                keeps_input=keeps_input,
                backward_peak=trace.peak("loss", "arrived", stays=target),
                backward_peak_freed=trace.peak("loss", "arrived"),
            ),
            # Not only what is in `.grad` by then: where head and tail share a weight, the tail's
            # part of its gradient waits for that of the head.
            tail_parameters=sum(made.values()),
            checkpoint_bytes=checkpoint_bytes(self.value.device),
            seconds=self.seconds,
            gradients_before=nbytes(self.leaves) if self.accumulate else 0,
        )
