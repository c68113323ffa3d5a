"""What every Function of the library needs besides its formulas.

It works around three limits of PyTorch 2.13. For each there is a test that fails once PyTorch lifts
the limit:

- Forward mode is switched off inside a Function's `jvp`, so that the jvp of a jvp is silently 0.
  Every `jvp` here switches it on again, and reads what it saved through `primals`.
- A Function with a `jvp` compiles only with a graph break: while compiling, what `applier`
  returns uses a variant without one.
- A compiled `torch.func.grad` or `torch.func.jvp` differentiates the forward and ignores the rules
  of a Function: `applier` raises, so that this part runs uncompiled and is right.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import Function


def transforming() -> bool:
    """Whether a torch.func transform or forward mode is active."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def applier(function: type[Function]) -> Callable[..., Any]:
    """Return `function.apply`, which in a graph that is being compiled applies it without a jvp."""
    without_jvp: type[Function] = type(function.__name__, (function,), {"jvp": Function.jvp})

    def apply(*args: Any) -> Any:
        if not torch.compiler.is_compiling():
            return function.apply(*args)
        if transforming():
            raise NotImplementedError(
                f"{function.__name__}: expected no torch.func transform or forward mode in a graph "
                "that is compiled, because PyTorch 2.13 would differentiate the forward and ignore "
                "the backward; without fullgraph=True this part runs uncompiled and is right"
            )
        return without_jvp.apply(*args)

    return apply


def primals(ctx: Any) -> list[Any]:
    """Return the tensors saved for `jvp`, without their tangents of its own level."""
    return [None if t is None else unpack_dual(t).primal for t in ctx.saved_tensors]


def check_floating(operation: str, x: object) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = f"{x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{operation}: expected a floating-point tensor, got {got}; convert it first, as in "
            "x.float()"
        )
