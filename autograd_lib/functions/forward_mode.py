"""What every Function of the library needs beside its formulas.

Four limits of PyTorch 2.13, each pinned
by a test that fails once it is mended, shape how they are written:

- Forward mode is switched off inside a Function's `jvp`, so that the jvp of a jvp is 0 without a
  word. Every `jvp` here switches it on again, and reads what it saved through `primals`.
- A Function with a `jvp` compiles only with a graph break: while compiling, `apply` takes a twin
  without it.
- A compiled `torch.func.grad` or `torch.func.jvp` differentiates the forward and ignores the rules
  of a Function: `apply` refuses, which leaves that part uncompiled, and right.
- An operator of `torch.library.custom_op` has a jvp of 0, and no `torch.func.grad`: it is used
  while compiling only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.forward_ad import unpack_dual
from torch.autograd.function import Function


def without_jvp(function: type[Function]) -> type[Function]:
    """The twin of a Function that compiles without a graph break."""
    return type(function.__name__, (function,), {"jvp": Function.jvp})


def transforming() -> bool:
    """Tell whether torch.func or forward mode is at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def apply(function: type[Function], whole: type[Function], *args: Any) -> Any:
    """Apply a Function, or in a graph that is being compiled its twin without a jvp."""
    if not torch.compiler.is_compiling():
        return function.apply(*args)
    if transforming():
        raise NotImplementedError(
            f"{function.__name__}: expected no torch.func transform or forward mode in a graph "
            "that is compiled, because PyTorch 2.13 would differentiate the forward and ignore the "
            "backward; without fullgraph=True this part runs uncompiled, and right"
        )
    return whole.apply(*args)


def primals(ctx: Any) -> list[Any]:
    """The tensors saved for `jvp`, without the tangents that they carry at its own level."""
    return [None if t is None else unpack_dual(t).primal for t in ctx.saved_tensors]


def is_floating(x: object) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def check_floating(operation: str, x: object) -> None:
    if not is_floating(x):
        got = f"{x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(
            f"{operation}: expected a floating-point tensor, got {got}; convert it first, as in "
            "x.float()"
        )
