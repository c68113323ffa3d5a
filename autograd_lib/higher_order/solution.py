"""Taylor coefficients of the solution of an ordinary differential equation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

from autograd_lib.higher_order.inputs import check_floating, check_tensor, check_uncompiled
from autograd_lib.higher_order.recording import FunctionMode, MutationError, Recorder, tensors_in
from autograd_lib.higher_order.recurrences import rule_of

__all__ = ["RightHandSide", "taylor_solution"]


def taylor_solution(
    f: Callable[..., Tensor],
    y0: Tensor,
    order: int,
    *args: Any,
    t: Tensor | float | None = None,
) -> Tensor:
    r"""Return the Taylor coefficients of the solution of $y' = f(t, y)$ through `y0`.

    With $f_k$ the coefficients of $f$ along the solution, $y_{k+1} = f_k / (k + 1)$ (Jorba & Zou
    2005, "A software package for the numerical integration of ODEs by means of high-order Taylor
    methods"). `f` is called once and its operations are recorded; the record is extended order by
    order, at a cost that grows at most as the square of the order.

    Args:
        f: called as `f(t, y, *args)`, returns a tensor like `y`. Ordinary PyTorch code, a module
            too. It may not branch on the values of its arguments. `detach` and `torch.no_grad`
            stop no gradient inside it.
        y0: the value of the solution at `t`: a floating-point or complex tensor of any shape.
        order: the highest power K, at least 0.
        args: further arguments of `f`: tensors, nested in lists and dicts too, and other values.
        t: the time of `y0`, a number or a tensor; 0 if None.

    Returns:
        A tensor of shape `(order + 1, *y0.shape)`: coefficients, not derivatives; the solution at
        t + h is the sum of `result[k] * h**k`. It is differentiable with respect to `y0`, `args`,
        `t` and the tensors that `f` closes over. `torch.func` transforms may be taken over `y0`,
        `args` and `t`.

    Raises:
        NotImplementedError: if `f` uses an operation without a rule, or converts a value to a
            Python number, as in `if y.sum() > 0`; if it is called under `torch.compile`.
        TypeError: if `y0` is not floating point or complex, or `f` returns no tensor.
        ValueError: if `f` returns another shape or dtype than that of `y0`, `order` is negative, or
            `f` closes over a tensor that a `torch.func` transform follows.

    Example:
        >>> taylor_solution(lambda t, y: y, torch.tensor(1.0), 4)  # exp
        tensor([1.0000, 1.0000, 0.5000, 0.1667, 0.0417])
    """
    check_uncompiled("taylor_solution")
    if not isinstance(order, int) or order < 0:
        raise ValueError(f"taylor_solution: expected an order of 0 or more, got {order!r}")
    check_floating("taylor_solution", y0, "y0")
    if not isinstance(t, Tensor):
        t = torch.tensor(t or 0.0, dtype=y0.real.dtype, device=y0.device)
    return torch.stack(RightHandSide(f, t, y0, *args).coefficients(order, t, y0, *args))


class RightHandSide:
    """The record of `f(t, y, *args)`, which can be extended at any values of the same shapes.

    Attributes:
        closed_over: the tensors that `f` reads besides its arguments.
    """

    def __init__(self, f: Callable[..., Tensor], t: Tensor, y: Tensor, *args: Any) -> None:
        try:
            self._record(f, t, y, args)
        except MutationError:
            self._record(torch.func.functionalize(f), t, y, args)

    def _record(self, f: Callable[..., Tensor], t: Tensor, y: Tensor, args: Any) -> None:
        recorder = Recorder(rule_of)
        # Outside of the transforms of torch.func, inside which the record is extended.
        with temporarily_clear_interpreter_stack(), torch.enable_grad():
            t, y, *args = recorder.enter_samples((t, y, *args))
            with torch.compiler.set_stance("force_eager"), FunctionMode(recorder), recorder:
                result = check_tensor("taylor_solution", f(t, y, *args))
        if (result.shape, result.dtype) != (y.shape, y.dtype):
            raise ValueError(
                f"taylor_solution: expected f to return {tuple(y.shape)} {y.dtype} like y0, got "
                f"{tuple(result.shape)} {result.dtype}"
            )
        self._result, self._size = recorder.slot(result), recorder.size
        self._program, self._later = recorder.program, recorder.later
        self._outside = recorder.outside
        self.closed_over = list(recorder.outside.values())

    def coefficients(self, order: int, t: Tensor, y: Tensor, *args: Any) -> list[Tensor]:
        """Return the coefficients of the solution through `y` at `t`, from 0 to the order."""
        values: list[list[Tensor]] = [[] for _ in range(self._size)]
        for slot, x in [*enumerate(tensors_in((t, y, *args))), *self._outside.items()]:
            values[slot].append(x)
        one, zero = torch.ones_like(t), torch.zeros_like(t)
        solution, slopes = values[1], values[self._result]
        for k in range(order):
            if k:
                values[0].append(one if k == 1 else zero)
            for compute, writes in self._later if k else self._program:
                found = compute(values, k)
                if isinstance(writes, int):
                    values[writes].append(found)
                else:
                    for slot, x in zip(writes, found, strict=True):
                        values[slot].append(x)
            slope = slopes[k] if k < len(slopes) else torch.zeros_like(y)
            solution.append(slope / (k + 1) if k else slope)
        return solution
