"""Compiling a block in place, and compiling it so that it saves less for backward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import fx, nn
from torch._functorch import config as functorch_config
from torch._ops import OpOverload
from torch.nn.modules.dropout import _DropoutNd

from autograd_lib.core.snapshot import torch_generators

_KEPT = 0.7  # share of the bytes saved for backward without a budget; the rest is recomputed
_RANDOM_MODULES = (nn.RReLU, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)


def compile_module(module: nn.Module) -> None:
    """Compile a module in place, whatever its class.

    `module.compile()` silently leaves modules of `torch.nn` itself (`nn.Sequential`,
    `nn.TransformerEncoder`) uncompiled: it starts Dynamo in a frame of PyTorch's own files, which
    Dynamo skips. Here it starts in a function of this file.
    """
    call = module._call_impl

    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    module._compiled_call_impl = torch.compile(run)


def is_random(block: nn.Module) -> bool:
    """Whether the forward of `block` draws random numbers, now or once it is in training mode.

    Judged by its modules: dropout of PyTorch, and any positive number called `dropout`,
    `drop_prob`, …, as attention layers have. Random functions in a forward show when it runs.
    """
    return any(
        isinstance(module, _RANDOM_MODULES)
        or (isinstance(module, _DropoutNd) and module.p > 0)
        or any("drop" in key and isinstance(v, float) and v > 0 for key, v in vars(module).items())
        for module in block.modules()
    )


class Budgeted:
    """A module compiled under an `activation_memory_budget`, to save less for backward.

    With that option PyTorch 2.13 draws random numbers anew in backward (pytorch#190758), and the
    gradient is silently wrong. A graph that draws random numbers is compiled without it.

    Attributes:
        random: Whether the module draws random numbers, as far as is known.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.random = is_random(module)
        self._compiled: Callable[..., Any] | None = None
        self._watched: set[tuple[bool, ...]] = set()

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_compiled": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.module._call_impl
        if torch.compiler.is_compiling():
            return call(*args, **kwargs)
        if self._compiled is None:

            def run_budgeted(*args: Any, **kwargs: Any) -> Any:
                return call(*args, **kwargs)

            options = {"custom_partitioner_fn": _partitioner()}
            self._compiled = torch.compile(run_budgeted, options=options)
        mode = tuple(module.training for module in self.module.modules())
        if self.random or mode in self._watched:
            return self._compiled(*args, **kwargs)
        before = [(generator, generator.get_state()) for generator in torch_generators()]
        result = self._compiled(*args, **kwargs)
        self._watched.add(mode)
        self.random = not all(torch.equal(g.get_state(), state) for g, state in before)
        return result


@cache
def _partitioner() -> Any:
    # Imported here, as Inductor takes a second to import and few programs compile.
    from torch._functorch.partitioners import (  # noqa: PLC0415
        min_cut_rematerialization_partition,
    )
    from torch._inductor.custom_graph_pass import CustomPartitionerFn  # noqa: PLC0415

    class Partitioner(CustomPartitionerFn):
        """Divide a joint graph into forward and backward, with the budget if nothing is random."""

        def __call__(self, gm: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> Any:
            graphs = [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]
            random = any(_draws(node) for graph in graphs for node in graph.nodes)
            with functorch_config.patch(activation_memory_budget=1.0 if random else _KEPT):
                return min_cut_rematerialization_partition(gm, joint_inputs, **kwargs)

        def uuid(self) -> Any:  # identifies this partitioner in the compiler's caches
            return f"{__name__} {_KEPT}"

    return Partitioner()


def _draws(node: fx.Node) -> bool:
    operator = node.target
    seeded = torch.Tag.nondeterministic_seeded
    if not isinstance(operator, OpOverload) or seeded not in operator.tags:
        return False
    names = [argument.name for argument in operator._schema.arguments]
    given = dict(zip(names, node.args, strict=False)) | node.kwargs
    # Attention has the tag even without dropout.
    return "dropout_p" not in names or bool(given.get("dropout_p", 0.0))
