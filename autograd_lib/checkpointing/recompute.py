"""Run blocks of a model under checkpoints, in place.

The checkpoint is PyTorch's (``use_reentrant=False``). Two things are added. Buffers that a forward
changes, such as the running statistics of BatchNorm, change once per step, and the recomputation
sees them as the first forward did. Under autocast, low-precision copies of the weights are not kept
in autocast's cache until the end of the forward.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import flop_registry

from autograd_lib.checkpointing.compiled import Budgeted, compile_module
from autograd_lib.checkpointing.solver import NAMES, Step, length

_Tensors = dict[tuple[nn.Module, str], Tensor]  # by module and name
# Operations with FLOPs by PyTorch's count, and attention on the CPU, which that count leaves out.
_COSTLY = {*flop_registry, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu}


def apply_checkpoints(
    model: nn.Module, steps: Mapping[str, Step | Sequence[Step]], *, compile: bool = False
) -> None:
    """Make the named modules of `model` run by these steps, in place of any given before.

    Args:
        model: Changed in place; its parameters, buffers, and their names stay what they are.
        steps: The qualified name of a module to its step, or to one step for each of its children,
            of an `nn.Sequential` (where tuples are runs of several children) or `nn.ModuleList`.
        compile: Whether to compile each block, inside its checkpoint.

    Raises:
        ValueError: A name, or a number of steps, does not fit the model; nothing is changed.
    """
    found: dict[nn.Module, Step | Sequence[Step]] = {}
    for name, step in steps.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise ValueError(
                f"checkpoint: the model has no module {name!r}; expected qualified names as in "
                "named_modules()"
            ) from None
        found[module] = step
        _check(name, module, step)
    for module in model.modules():  # also undo steps given before to their parents and children
        if module in found or not found.keys().isdisjoint(module.children()):
            undo(module)
            for child in module.children() if module in found else ():
                undo(child)
    for module, step in found.items():
        if isinstance(step, str):
            _set_forward(module, step, compile)
        elif runs_its_children(module):
            _set_chain(module, tuple(step), compile)
        else:
            for child, inner in zip(module, step, strict=True):  # type: ignore[call-overload]
                _set_forward(child, inner, compile)


def runs_its_children(module: object) -> bool:
    """Whether a call of `module` is nothing but calls of its children, one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _check(name: str, module: nn.Module, step: Step | Sequence[Step]) -> None:
    for leaf in tree_leaves(step):
        if leaf not in NAMES:
            raise ValueError(
                f"checkpoint: expected 'save', 'selective' or 'recompute' for {name!r}, "
                f"got {leaf!r}"
            )
    if isinstance(step, str):
        return
    if not isinstance(module, (nn.Sequential, nn.ModuleList)):
        raise ValueError(
            f"checkpoint: {name!r} is a {type(module).__name__}, which takes one step; only an "
            "nn.Sequential or an nn.ModuleList takes one for each of its children"
        )
    if not runs_its_children(module) and len(set(module)) < len(module):
        raise ValueError(
            f"checkpoint: {name!r} holds a module twice, which cannot have two steps; give each of "
            "its places a module of its own, or use an nn.Sequential"
        )
    if length(step) != len(module):
        raise ValueError(
            f"checkpoint: {name!r} has {len(module)} blocks, but the steps are for "
            f"{length(step)}; make the plan with this model"
        )
    if not runs_its_children(module) and any(not isinstance(inner, str) for inner in step):
        raise ValueError(
            f"checkpoint: {name!r} is a {type(module).__name__} whose blocks are called by code of "
            "the model: each takes a step of its own; runs of blocks need an nn.Sequential with "
            "the forward of that class"
        )


def _set_forward(block: nn.Module, step: str, compile: bool) -> None:
    if compile:
        compile_module(block)
    if step != "save":
        setattr(block, slot(block), _BlockForward(block, step))


def _set_chain(sequence: Any, steps: tuple[Step, ...], compile: bool) -> None:
    for child in sequence if compile else ():
        compile_module(child)
    if any(step != "save" for step in steps):
        setattr(sequence, slot(sequence), _ChainForward(sequence, steps))


def slot(module: nn.Module) -> str:
    """Name the attribute that a call of `module` runs; an instance's hides that of its class."""
    return "forward" if module._compiled_call_impl is None else "_compiled_call_impl"


@contextlib.contextmanager
def kept_forwards(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore, at the end of the block, the functions that calls of these modules ran before it."""
    before = [(module, slot(module), vars(module).get(slot(module))) for module in modules]
    try:
        yield
    finally:
        for module, name, function in before:
            _restore(module, name, function)


def _restore(module: nn.Module, name: str, function: Callable[..., Any] | None) -> None:
    """Set the attribute, or delete it where the instance had none."""
    if function is None:
        vars(module).pop(name, None)
    else:
        setattr(module, name, function)


def undo(module: nn.Module) -> None:
    """Remove the steps that `apply_checkpoints` gave to this module."""
    for name in ("forward", "_compiled_call_impl"):
        function = vars(module).get(name)
        if isinstance(function, _BlockForward | _ChainForward):
            _restore(module, name, function.replaced)


@contextlib.contextmanager
def undone(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Run these modules without the steps of `apply_checkpoints` during the block."""
    with kept_forwards(modules):
        for module in modules:
            undo(module)
        yield


class _BlockForward:
    """The forward of one block by its step; not a closure, so that models can be copied.

    Selective checkpoints refuse compiled code: a compiled block runs as `Budgeted` instead. That
    saves no memory where the block draws random numbers; such a block is recomputed.
    """

    def __init__(self, block: nn.Module, step: str) -> None:
        self.replaced = vars(block).get(slot(block))  # compiled, or replaced by other code
        self.block, self.selective = block, step == "selective"
        compiled = block._compiled_call_impl is not None
        self.budgeted = Budgeted(block) if self.selective and compiled else None
        self.contexts = Contexts([block])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.budgeted is not None and not self.budgeted.random:
            return self.budgeted(*args, **kwargs)
        forward = self.replaced or type(self.block).forward.__get__(self.block)
        selective = self.selective and self.budgeted is None
        return self.contexts.checkpoint(selective, forward, *args, **kwargs)


class _ChainForward:
    """The forward of an `nn.Sequential` by steps."""

    def __init__(self, sequence: nn.Sequential, steps: tuple[Step, ...]) -> None:
        self.replaced = vars(sequence).get(slot(sequence))
        self.sequence, self.steps = sequence, steps
        self.contexts: dict[tuple[int, int], Contexts] = {}
        self.budgeted = {i: Budgeted(block) for i, block in enumerate(sequence)}

    def __call__(self, x: Any) -> Any:
        return self._run(self.steps, 0, x)

    def _run(self, steps: tuple[Step, ...], start: int, x: Any) -> Any:
        blocks = list(self.sequence)
        for step in steps:
            end = start + length(step)
            compiled = blocks[start]._compiled_call_impl is not None
            if step == "save":
                x = blocks[start](x)
            elif step == "selective" and compiled and not self.budgeted[start].random:
                x = self.budgeted[start](x)
            else:
                contexts = self.contexts.get((start, end))
                if contexts is None:
                    contexts = self.contexts[start, end] = Contexts(blocks[start:end])
                inner = ("save",) if isinstance(step, str) else step
                selective = step == "selective" and not compiled
                x = contexts.checkpoint(selective, self._run, inner, start, x)
            start = end
        return x


class Contexts:
    """The checkpoint of some blocks, and which of their buffers a forward changes."""

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.modules = list(dict.fromkeys(m for block in blocks for m in block.modules()))
        # Which buffers a forward changes, by the training mode of each module. The first forward
        # in a mode copies all buffers to find out.
        self.changing: dict[tuple[bool, ...], list[tuple[nn.Module, str]]] = {}

    def checkpoint(
        self, selective: bool, run: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        def context_fn() -> tuple[Any, Any]:
            first, used = _Tensors(), _Tensors()
            modes = create_selective_checkpoint_contexts(_policy) if selective else ()
            forward, again = partial(self._forward, first, used), partial(self._again, first, used)
            return _Stacked(forward, *modes[:1]), _Stacked(again, *modes[1:])

        if torch.compiler.is_compiling():  # Dynamo traces checkpoints with dispatch modes only
            return checkpoint(run, *args, use_reentrant=False, **kwargs)
        return checkpoint(run, *args, use_reentrant=False, context_fn=context_fn, **kwargs)

    @contextlib.contextmanager
    def _forward(self, first: _Tensors, used: _Tensors) -> Iterator[None]:
        """Record, around the first forward, its parameters and the buffers that it changes."""
        mode = tuple(module.training for module in self.modules)
        known = self.changing.get(mode)
        keys = known
        if keys is None:
            keys = [(m, n) for m in self.modules for n, b in m._buffers.items() if b is not None]
        before = {key: _buffer(*key) for key in keys}
        first.update({key: buffer.detach().clone() for key, buffer in before.items()})
        used.update(
            {(m, n): p for m in self.modules for n, p in m._parameters.items() if p is not None}
        )
        with _no_cast_cache(self.modules):
            yield
        if known is None:
            # Compare values: batch_norm of PyTorch 2.13 does not raise the version of its
            # statistics. Those are kept in any case, as a batch of zeros may leave them unchanged.
            for (module, name), buffer in before.items():
                same = _buffer(module, name) is buffer and torch.equal(buffer, first[module, name])
                if same and not isinstance(module, _NormBase):
                    del first[module, name]
            self.changing[mode] = list(first)

    @contextlib.contextmanager
    def _again(self, first: _Tensors, used: _Tensors) -> Iterator[None]:
        """Recompute on copies of the recorded buffers, with the recorded parameters."""
        now = {key: _buffer(*key) for key in first}
        for (module, name), buffer in first.items():
            module._buffers[name] = buffer.clone()
        # After a `torch.func.functional_call` the module holds other parameters. Leave those of
        # FSDP alone: it sets views of a flat parameter, or unshards what it had sharded.
        own = {key: key[0]._parameters[key[1]] for key in used}
        swapped = {
            key: parameter
            for key, parameter in own.items()
            if isinstance(parameter, nn.Parameter)
            and parameter is not used[key]
            and not any(map(is_traceable_wrapper_subclass, (parameter, used[key])))
        }
        for module, name in swapped:
            module._parameters[name] = used[module, name]  # type: ignore[assignment]
        try:
            with _no_cast_cache(self.modules):
                yield
        finally:
            for (module, name), buffer in now.items():
                module._buffers[name] = buffer
            for (module, name), parameter in swapped.items():
                module._parameters[name] = parameter


def _buffer(module: nn.Module, name: str) -> Tensor:
    buffer = module._buffers[name]
    assert buffer is not None
    return buffer


def _policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    packet = getattr(op, "overloadpacket", op)
    return CheckpointPolicy.MUST_SAVE if packet in _COSTLY else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def _no_cast_cache(modules: Sequence[nn.Module]) -> Iterator[None]:
    # The cache would keep the casts of a checkpoint until autocast ends, though no graph needs
    # them. Compiled code casts by itself but has a guard on this flag: PyTorch 2.13 recompiles, and
    # ran the second graph with the weights of the block that it was first compiled for.
    before = torch.is_autocast_cache_enabled()
    if not any(module._compiled_call_impl for module in modules):
        torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


class _Stacked:
    """Context managers entered together, once for each backward through the graph."""

    def __init__(self, generator: Callable[[], Any], *modes: Any) -> None:
        self.generator, self.modes = generator, modes

    def __enter__(self) -> None:
        self.stack = contextlib.ExitStack()
        for context in (self.generator(), *self.modes):
            self.stack.enter_context(context)

    def __exit__(self, *error: Any) -> Any:
        return self.stack.__exit__(*error)
