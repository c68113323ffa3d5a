"""Running a step with something else in place of the blocks, and leaving no trace of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

from torch import Tensor, nn

from autograd_lib.checkpointing.recompute import (
    kept_forwards,
    put_back,
    runs_its_children,
    slot,
    tensor_attributes,
    undo,
)
from autograd_lib.core.snapshot import ModuleState, preserved_random_state

Blocks = nn.Sequential | nn.ModuleList | list[nn.Module] | tuple[nn.Module, ...]
_SKIPPED = "Where blocks are skipped at random (layer drop), set the rate to 0 first"


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
            f"them, once each. {_SKIPPED}"
        )


@contextlib.contextmanager
def untouched(blocks: Blocks) -> Iterator[Callable[[Iterable[Tensor]], None]]:
    """Run without the steps of `apply_checkpoints`, and restore what running changes.

    That is random states, and of every module that runs buffers, generators, tensors that are
    attributes, and gradients, which are None in the block. Yields a function that keeps the
    gradients of other tensors too.
    """
    states: dict[nn.Module, ModuleState] = {}
    attributes: dict[tuple[nn.Module, str], Tensor] = {}
    gradients: dict[Tensor, Tensor | None] = {}

    def keep(tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor not in gradients:
                gradients[tensor], tensor.grad = tensor.grad, None

    def note(module: nn.Module, _: Any = None) -> None:
        if module not in states:
            states[module] = ModuleState([module])
            attributes.update(tensor_attributes([module]))
            keep(p for p in module._parameters.values() if p is not None)

    planned = [blocks, *blocks] if isinstance(blocks, nn.Sequential) else blocks
    handle = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        for block in blocks:
            for module in block.modules():
                note(module)
        with kept_forwards(planned), preserved_random_state():
            for module in planned:
                undo(module)
            yield keep
    finally:
        handle.remove()
        for state in states.values():
            state.restore()
        put_back(states, attributes)
        for tensor, gradient in gradients.items():
            tensor.grad = gradient
