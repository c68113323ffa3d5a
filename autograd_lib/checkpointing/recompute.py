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
from torch.utils._python_dispatch import _disable_current_modes, is_traceable_wrapper_subclass
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import flop_registry

from autograd_lib.checkpointing.compiled import Budgeted, compile_module
from autograd_lib.checkpointing.solver import Step, length

_Tensors = dict[tuple[nn.Module, str], Tensor]  # by module and name
_SLOTS = ("forward", "_compiled_call_impl")  # what a call of a module runs
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
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, step in steps.items():
        if name not in modules:
            raise ValueError(
                f"checkpoint: the model has no module {name!r}; expected qualified names as in "
                "named_modules()"
            )
        _check(name, modules[name], step)
        found[modules[name]] = step
    # Also undo steps given before to their parents and children.
    parents = [m for m in model.modules() if not found.keys().isdisjoint(m.children())]
    for module in [*found, *parents, *(child for m in found for child in m.children())]:
        undo(module)
    for module, step in found.items():
        blocks: list[Any] = [module] if isinstance(step, str) else list(module.children())
        for block in blocks if compile else ():
            compile_module(block)
        if not isinstance(step, str) and runs_its_children(module):
            if any(inner != "save" for inner in step):
                setattr(module, slot(module), _ChainForward(module, tuple(step)))
            continue
        for block, inner in zip(blocks, [step] if isinstance(step, str) else step, strict=True):
            if inner != "save":
                setattr(block, slot(block), _BlockForward(block, inner))


def runs_its_children(module: object) -> bool:
    """Whether a call of `module` is nothing but calls of its children, one after the other."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def _check(name: str, module: nn.Module, step: Step | Sequence[Step]) -> None:
    if isinstance(step, str):
        return
    kind = type(module).__name__
    if not isinstance(module, (nn.Sequential, nn.ModuleList)):
        raise ValueError(
            f"checkpoint: {name!r} is a {kind}, which takes one step; only an nn.Sequential or an "
            "nn.ModuleList takes one for each of its children"
        )
    if length(step) != len(module):
        raise ValueError(
            f"checkpoint: {name!r} has {len(module)} blocks, but the steps are for "
            f"{length(step)}; make the plan with this model"
        )
    if runs_its_children(module):
        return
    if len(set(module)) < len(module) or any(not isinstance(inner, str) for inner in step):
        raise ValueError(
            f"checkpoint: {name!r} is a {kind} whose blocks are called by code of the model: each "
            "takes one step of its own, so that none can be there twice or run together with "
            "others; that needs an nn.Sequential with the forward of that class"
        )


def slot(module: nn.Module) -> str:
    """Name the attribute that a call of `module` runs; an instance's hides that of its class."""
    return "forward" if module._compiled_call_impl is None else "_compiled_call_impl"


@contextlib.contextmanager
def kept_forwards(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Restore, at the end of the block, the functions that calls of these modules ran before it."""
    before = [(module, name, vars(module).get(name)) for module in modules for name in _SLOTS]
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
    for name in _SLOTS:
        function = vars(module).get(name)
        if isinstance(function, _BlockForward | _ChainForward):
            _restore(module, name, function.replaced)


def tensor_attributes(modules: Iterable[nn.Module]) -> _Tensors:
    """Tensors that are plain attributes, such as a balance loss that a forward leaves."""
    return {
        (module, name): value
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }


def put_back(modules: Iterable[nn.Module], attributes: _Tensors) -> None:
    """Set what `tensor_attributes` found before, and delete others."""
    for module, name in tensor_attributes(modules).keys() - attributes.keys():
        del vars(module)[name]
    for (module, name), value in attributes.items():
        vars(module)[name] = value


def refuses_hooks() -> bool:
    """Whether PyTorch refuses saved-tensor hooks now, as under `torch.func.grad`."""
    return torch._C._autograd._saved_tensors_hooks_get_disabled_error_message() is not None


class _BlockForward:
    """The forward of one block by its step; not a closure, so that models can be copied."""

    def __init__(self, block: nn.Module, step: str) -> None:
        self.replaced = vars(block).get(slot(block))  # compiled, or replaced by other code
        self.block, self.selective = block, step == "selective"
        self.checkpoint = Checkpoint([block])

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        forward = self.replaced or type(self.block).forward.__get__(self.block)
        return self.checkpoint.run(self.selective, forward, *args, **kwargs)


class _ChainForward:
    """The forward of an `nn.Sequential`, or of a run of its children from `start` on, by steps."""

    def __init__(self, sequence: Any, steps: tuple[Step, ...], start: int = 0) -> None:
        self.replaced = vars(sequence).get(slot(sequence))
        self.sequence, self.steps = sequence, steps
        self.parts: list[tuple[int, bool, Checkpoint | None, _ChainForward | None]] = []
        for step in steps:
            end = start + length(step)
            around = None if step == "save" else Checkpoint(list(sequence)[start:end])
            inner = None if isinstance(step, str) else _ChainForward(sequence, step, start)
            self.parts.append((start, step == "selective", around, inner))
            start = end

    def __call__(self, x: Any) -> Any:
        for index, selective, around, inner in self.parts:
            run = inner or self.sequence[index]
            x = around.run(selective, run, x) if around else run(x)
        return x

    __code__ = __call__.__code__  # torch.export asks the forward of the whole model for it


class Checkpoint:
    """The checkpoint of some blocks, and which of their buffers a forward changes.

    Selective checkpoints refuse compiled code: a compiled block runs as `Budgeted` instead. That
    saves no memory where the block draws random numbers; such a block is recomputed.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self.block, self.budgeted = blocks[0], Budgeted(blocks[0])
        self.modules = list(dict.fromkeys(m for block in blocks for m in block.modules()))
        # RReLU saves its noise before it is drawn, and a repetition that stops as soon as all is
        # saved leaves it empty: in PyTorch 2.13 the gradient is silently wrong.
        self.early_stop = not any(isinstance(module, nn.RReLU) for module in self.modules)
        # Which buffers a forward changes, by the training mode of each module. The first forward
        # in a mode copies all buffers to find out.
        self.changing: dict[tuple[bool, ...], list[tuple[nn.Module, str]]] = {}

    def is_random_and_compiled(self) -> bool:
        """Whether a selective step would save nothing, as far as is known."""
        return self.block._compiled_call_impl is not None and self.budgeted.random

    def run(
        self, selective: bool, function: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        """Call a function that runs the blocks, under the checkpoint.

        Raises:
            RuntimeError: A transform of `torch.func` is at work that allows no checkpoint.
        """
        if torch.compiler.is_exporting():
            return function(*args, **kwargs)
        selective = selective and not self.is_random_and_compiled()
        if selective and self.block._compiled_call_impl is not None:
            return self.budgeted(*args, **kwargs)
        if torch.compiler.is_compiling():  # Dynamo traces checkpoints with dispatch modes only
            return checkpoint(function, *args, use_reentrant=False, **kwargs)
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        if refuses_hooks():
            raise RuntimeError(
                f"checkpoint plan: a block ({type(self.block).__name__}) has a plan, and "
                "torch.func's grad, vjp, jacrev and hessian allow no checkpoints; undo the plan "
                'first, by Settings(checkpoint={name: "save"}).apply(model) for the name of the '
                "blocks or of their container"
            )
        mode = tuple(module.training for module in self.modules)
        known = self.changing.get(mode)
        names = known if known is not None else [(m, n) for m in self.modules for n in m._buffers]
        before = {(m, n): b for m, n in names if (b := m._buffers[n]) is not None}
        buffers = {key: buffer.detach().clone() for key, buffer in before.items()}
        parameters = {
            (m, n): p for m in self.modules for n, p in m._parameters.items() if p is not None
        }
        contexts = [contextlib.nullcontext()]  # of the first run

        def call(*args: Any, **kwargs: Any) -> Any:
            context = contexts.pop() if contexts else self._again(buffers, parameters)
            with _no_cast_cache(self.modules), context:
                return function(*args, **kwargs)

        run: Any = partial(checkpoint, call, use_reentrant=False, early_stop=self.early_stop)
        if selective:
            run = partial(run, context_fn=partial(create_selective_checkpoint_contexts, _policy))
        result = run(*args, **kwargs)
        if known is None:
            # Compare values: batch_norm of PyTorch 2.13 does not raise the version of its
            # statistics. Those are kept in any case, as a batch of zeros may leave them unchanged.
            for (m, n), buffer in before.items():
                unchanged = m._buffers[n] is buffer and torch.equal(buffer, buffers[m, n])
                if unchanged and not isinstance(m, _NormBase):
                    del buffers[m, n]
            self.changing[mode] = list(buffers)
        return result

    @contextlib.contextmanager
    def _again(self, buffers: _Tensors, parameters: Mapping[Any, Tensor]) -> Iterator[None]:
        """Recompute on copies of the recorded buffers, with the recorded parameters."""
        # After a `torch.func.functional_call` the module holds other parameters. Leave those of
        # FSDP alone: it sets views of a flat parameter, or unshards what it had sharded.
        tables: list[tuple[dict[str, Any], str, Tensor]] = [
            (module._parameters, name, used)
            for (module, name), used in parameters.items()
            if (now := module._parameters[name]) is not used
            and isinstance(now, nn.Parameter)
            and not any(map(is_traceable_wrapper_subclass, (now, used)))
        ]
        with _disable_current_modes():  # a selective checkpoint knows the block's operations only
            tables += [(module._buffers, name, b.clone()) for (module, name), b in buffers.items()]
        # An attribute that the forward leaves stays the one of the first run, with its graph.
        attributes = tensor_attributes(self.modules)
        before = [(table, name, table[name]) for table, name, _ in tables]
        for table, name, tensor in tables:
            table[name] = tensor
        try:
            yield
        finally:
            put_back(self.modules, attributes)
            for table, name, tensor in before:
                table[name] = tensor


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
