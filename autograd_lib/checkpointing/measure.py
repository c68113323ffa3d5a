"""Measuring what each block of a chain costs.

Each block runs alone, so that measuring needs memory for one block and the inputs of all. Head and
tail are measured in the step itself, where one Function stands for the blocks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from autograd_lib.checkpointing.probe import (
    Probe,
    StandIn,
    Visit,
    checkpoint_bytes,
    median_seconds,
    mode,
    nbytes,
)
from autograd_lib.checkpointing.recompute import kept_forwards, runs_its_children, slot, undo
from autograd_lib.checkpointing.solver import Chain
from autograd_lib.core.snapshot import (
    ModuleState,
    drop_gradients,
    preserved_random_state,
    without_gradients,
)
from autograd_lib.memory.trace import Marks, Trace

Blocks = nn.Sequential | nn.ModuleList | list[nn.Module] | tuple[nn.Module, ...]
Call = Callable[[Tensor], Tensor]
# Of one run of the step: calls of the blocks, output of the last, leaves of the graph.
_Seen = tuple[list[Visit], Tensor, list[Tensor]]


@contextlib.contextmanager
def intercept(blocks: Blocks, handler: Callable[..., Tensor]) -> Iterator[None]:
    """Call `handler(index, call, x, *args, **kwargs)` in place of each block."""
    position = 0

    def forward(block: nn.Module, plain: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Any:
        nonlocal position
        if position == len(blocks) or blocks[position] is not block:
            index = next(i for i, candidate in enumerate(blocks) if candidate is block)
            raise ValueError(
                "plan_checkpoints: expected the blocks to run once each, in their order, but "
                f"block {index} ({type(block).__name__}) ran as number {position}; pass them in "
                "the order in which the model calls them"
            )
        position += 1
        return handler(position - 1, plain, *args, **kwargs)

    def sequence(x: Any) -> Any:
        for child in blocks:
            x = forward(child, child, x)
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


@contextlib.contextmanager
def untouched(blocks: Blocks) -> Iterator[None]:
    """Run without the steps of `apply_checkpoints`, and restore what running changes.

    That is random states, and buffers and generators of every module that runs.
    """
    states = {m: ModuleState([m]) for block in blocks for m in block.modules()}

    def note(module: nn.Module, _: Any) -> None:
        if module not in states:
            states[module] = ModuleState([module])

    planned = [blocks, *blocks] if isinstance(blocks, nn.Sequential) else blocks
    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        with kept_forwards(planned), preserved_random_state():
            for module in planned:
                undo(module)
            yield
    finally:
        handle.remove()
        for state in states.values():
            state.restore()


def measure(
    blocks: Blocks, step: Callable[[], Tensor], accumulate: bool, show: Callable[[str], None]
) -> tuple[Chain, dict[int, str]]:
    """Measure every block, head and tail of `step`, which runs forward and returns the loss.

    Returns:
        The costs, and why some blocks cannot be recomputed, by index.
    """
    with untouched(blocks), torch.enable_grad():
        show("running the step")
        visits, _, leaves = seen = _visit(blocks, step)
        parameters = [p for block in blocks for p in block.parameters()]
        with without_gradients(list(dict.fromkeys([*leaves, *parameters]))):
            gradient: Tensor | None
            chain, gradient, made = _ends(blocks, step, seen, accumulate)
            found, refused = [], {}
            for index in reversed(range(len(blocks))):
                show(f"measuring block {len(blocks) - index} of {len(blocks)}")
                probe = Probe(blocks[index], visits[index], gradient, made)
                block, why, gradient = probe.measure()
                found.append(block)
                if why:
                    refused[index] = why
                made.update(probe.parameters)
    costs = tuple(reversed(found))
    return replace(chain, blocks=costs, input_gradient=nbytes([gradient])), refused


def _visit(blocks: Blocks, step: Callable[[], Tensor]) -> _Seen:
    """Run the step once, with all blocks under checkpoints."""
    visits: list[Visit] = []
    outputs: list[Tensor] = []

    def place(x: Tensor) -> tuple[Any, ...]:  # hooks on modules may have wrapped an output
        return x.data_ptr(), x.shape, x.stride()

    def handler(index: int, call: Call, x: Any, /, *args: Any, **kwargs: Any) -> Tensor:
        if not isinstance(x, Tensor) or (outputs and place(x) != place(outputs[-1])):
            raise ValueError(
                f"plan_checkpoints: expected block {index} to take the output of the block before "
                "it as its first argument; what happens between two blocks must be in one of them"
            )
        kind = x.device.type
        enabled, dtype = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        autocast = {"device_type": kind, "dtype": dtype, "enabled": enabled}
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
        got: str = type(loss).__name__
        if isinstance(loss, Tensor):
            got = f"a tensor of shape {list(loss.shape)}, requires_grad={loss.requires_grad}"
        raise ValueError(
            "plan_checkpoints: expected a step that returns a scalar loss which requires a "
            f"gradient, got {got}; there is nothing to plan without a backward"
        )
    return visits, outputs[-1].detach(), leaves_of(loss)


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


def _ends(
    blocks: Blocks, step: Callable[[], Tensor], seen: _Seen, accumulate: bool
) -> tuple[Chain, Tensor, set[Tensor]]:
    """Measure head and tail in the step, with a stand-in for the blocks.

    Returns:
        A chain that lacks its blocks, the gradient of their output, and the leaves that have
        gradients by then.
    """
    (first, *_), output, leaves = seen
    arrived: list[Tensor] = []
    made: set[Tensor] = set()

    def run(marks: Marks) -> None:
        arrived.clear()

        def back(gradient: Tensor) -> Tensor | None:
            marks("arrived", gradient)
            arrived.append(gradient)
            made.update(leaf for leaf in leaves if leaf.grad is not None)
            given = torch.ones_like(first.input) if first.needs_gradient else None
            marks("back")
            return given

        def handler(index: int, _: Call, x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
            if index == 0:
                marks("begin", x)
                anchor = torch.ones((), device=x.device, requires_grad=True)
                x = StandIn.apply(anchor, x, output, back)
                marks("forward", x)
            return x

        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf) if accumulate else None
        torch.clear_autocast_cache()
        marks("start")
        with intercept(blocks, handler):
            loss = step()
        for name in ("forwarded", "dropped", "gradient"):  # of the tail, as of a block
            marks(name)
        loss.backward()
        marks("end")

    run(Marks())  # warm
    trace = Trace(run, output.device.type)
    seconds = median_seconds({"ends": run}, ("start", "begin"), ("forward", "end"))["ends"]
    drop_gradients(leaves)
    source = trace.number["begin"]
    head = trace.standing("start", "begin", "begin")
    kept = trace.standing("start", "begin", "dropped")
    held = source in kept or source not in head
    size = head.get(source, 0)
    gradients = trace.standing("gradient", "arrived", "arrived")
    gradients.pop(trace.number["arrived"], None)
    chain = Chain(
        blocks=(),
        input=size,
        input_held=held,
        input_gradient=0,
        head_kept=sum(kept.values()),
        head_frames=sum(head.values()) - sum(kept.values()) - (0 if held else size),
        head_forward_peak=trace.peak("start", "begin"),
        head_backward_peak=trace.peak("back", "end"),
        tail=mode(trace, seconds=0.0),
        # Not only what is in `.grad` by then: where head and tail share a weight, the tail's part
        # of its gradient waits for that of the head.
        tail_parameters=sum(gradients.values()),
        checkpoint_bytes=checkpoint_bytes(output.device),
        seconds=sum(seconds),
        gradients_before=nbytes(leaves) if accumulate else 0,
    )
    return chain, arrived[0], made
