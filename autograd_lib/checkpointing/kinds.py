"""Which blocks are alike, so that one measurement serves them all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autograd_lib.checkpointing.probe import Probe

_PLAIN = (bool, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_CONTAINERS = (list, tuple, dict, set, frozenset)


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


def traits(probe: Probe, index: int) -> list[Any]:
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
        size = value.untyped_storage().nbytes() if value.layout is torch.strided else 0
        strides = value.stride() if value.layout is torch.strided else None
        return value.shape, strides, size, value.dtype, value.device, value.requires_grad
    if type(value) is int:
        return _Number(value, index)
    if isinstance(value, _PLAIN):
        return value
    return repr(value) if isinstance(value, _CONTAINERS) else id(value)
