"""Backward by taking a computation again, which then need not keep what lies inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def pulled_back(
    run: Callable[..., Sequence[Tensor]], tensors: Sequence[Tensor], grads: Sequence[Tensor]
) -> list[Tensor | None]:
    """Return the gradients of what `run(*tensors)` returns, for the backward of a Function.

    It runs on aliases, so that the gradients are those of this computation alone; they have a graph
    where backward is to be differentiated. `torch.utils.checkpoint` cannot stand around an inner
    gradient, which would unpack at once what it holds.
    """
    with torch.enable_grad():
        inputs = [x.view_as(x) if x.requires_grad else x for x in tensors]
        outputs = run(*inputs)
    pairs = [(y, g) for y, g in zip(outputs, grads, strict=True) if y.requires_grad]
    found = torch.autograd.grad(
        [y for y, _ in pairs],
        [x for x in inputs if x.requires_grad],
        [g for _, g in pairs],
        create_graph=torch.is_grad_enabled(),
        allow_unused=True,
    )
    rest = iter(found)
    return [next(rest) if x.requires_grad else None for x in inputs]
