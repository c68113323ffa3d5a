"""Solutions of ordinary differential equations, and their gradients."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.func import functional_call
from torch.utils._pytree import tree_flatten, tree_unflatten

from autograd_lib.applications.steps import Dopri5, Field, Taylor, compile_steps, spread
from autograd_lib.applications.walk import Event, Walk
from autograd_lib.functions.forward_mode import transforming
from autograd_lib.higher_order.inputs import check_floating
from autograd_lib.higher_order.recording import differentiable
from autograd_lib.higher_order.solution import RightHandSide

__all__ = ["Solution", "solve_ode"]

_GRADIENTS = ("recompute", "backprop", "adjoint")


def solve_ode(
    f: Callable[..., Tensor],
    y0: Tensor,
    t: Tensor | Sequence[float],
    *args: Any,
    method: str = "taylor",
    rtol: float = 1e-7,
    atol: float = 1e-9,
    order: int | None = None,
    gradient: str = "recompute",
    event: Event | None = None,
    per_sample: bool = False,
    max_steps: int = 10_000,
    compile: bool = False,
) -> Solution:
    r"""Solve $y' = f(t, y, \mathit{args})$ from $y(t_0) = y_0$, and return y at the times t.

    "taylor" sums the Taylor series of the solution, whose coefficients `taylor_solution` computes
    (Jorba & Zou 2005, "A software package for the numerical integration of ODEs by means of
    high-order Taylor methods"). It takes few and large steps at small tolerances. "dopri5" is the
    Runge-Kutta method of Dormand & Prince (1980), for what has kinks, such as ReLU, or an operation
    without a rule. Both read outputs and events from a polynomial of each step.

    Gradients reach `y0`, `t`, tensors in `args`, and the parameters of `f` if it is a module. The
    size of a step counts as a constant.

    Args:
        f: called as `f(t, y, *args)`, returns a tensor like y. Pass a module itself, not a lambda
            around it. Under "taylor" it is run once and recorded, see `taylor_solution`.
        y0: the state at `t[0]`: a floating-point or complex tensor of any shape.
        t: at least two times, increasing or decreasing strictly.
        args: further arguments of `f`: tensors, nested in lists and dicts too, and other values.
        method: "taylor" or "dopri5".
        rtol: the error of a step that is allowed, relative to the state. The root mean square over
            a state of `error / (atol + rtol * |y|)` is held below 1.
        atol: the error that is allowed beside it, in units of the state.
        order: of the Taylor series, at least 2. If None, $\lceil -0.7 \ln(rtol) \rceil + 1$, which
            is above the optimum of Jorba & Zou, since here calls cost more than arithmetic.
        gradient: "recompute" saves the state at each step and takes the step again in backward.
            "backprop" saves what each step saves; the gradient is the same bit for bit. "adjoint"
            solves a second equation backward in time, by dopri5 (Chen et al. 2018, "Neural Ordinary
            Differential Equations"); its gradient can be wrong where the equation loses memory.
        event: a function `event(t, y)` that returns a floating-point scalar. The solution ends
            where it first changes its sign, which is looked at in eight places of each step. If it
            is zero at the start it counts once it has left zero.
        per_sample: the first dimension of y0 is a batch of independent systems, each with steps of
            its own. f is given t of shape (batch,), the event returns (batch,).
        max_steps: the most steps.
        compile: compile a step; once for each f, order and shape. What f reads besides its
            arguments is then a constant: pass what changes through args, and the same f each time.

    Returns:
        A `Solution`, with `ys` of the shape `(len(t), *y0.shape)`.

    Raises:
        ValueError: if `t` is not strictly monotone, a tolerance is too small for the dtype, an
            option is unknown, or `f` or `event` closes over a tensor that requires a gradient,
            which would get none.
        RuntimeError: if the steps become smaller than the spacing of floating-point times, as
            before a pole, or `max_steps` do not suffice.
        NotImplementedError: if f uses an operation without a Taylor rule, or under `torch.func`.

    Warns:
        RuntimeWarning: in backward under "adjoint", if the state that is solved backward has parted
            from the forward one by more than 1000 tolerances.

    Example:
        >>> y0 = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
        >>> solution = solve_ode(lambda t, y: -y, y0, [0.0, 1.0])
        >>> solution.ys[-1].backward()
        >>> round(y0.grad.item(), 6)  # exp(-1)
        0.367879
    """
    times = _checked_times(y0, t)
    order = _checked_options(y0, method, rtol, atol, order, gradient, event, per_sample)
    leaves, slope = _flat(f, args)
    own, dims = [leaf.detach() for leaf in leaves], int(per_sample)
    now, y = times[0].detach().expand(y0.shape[:dims]), y0.detach()
    steps: Taylor | Dopri5
    try:
        if method == "taylor":
            record = RightHandSide(slope, now.to(y.real.dtype), y, *own)
            steps, hidden = Taylor(slope, rtol, atol, dims, order, record), record.closed_over
        else:
            steps = Dopri5(slope, rtol, atol, dims)
            hidden = [_shaped("f", steps.slope(now, y, *own), y)]
    except (NotImplementedError, TypeError, ValueError) as error:
        message = str(error).replace("taylor_solution", "solve_ode")
        if isinstance(error, NotImplementedError):
            message += "; or use method='dopri5'"
        raise type(error)(message) from error
    if event is not None:
        value = _shaped("event", event(now.to(y.real.dtype), y), y.real, dims)
        if gradient != "backprop" and value.requires_grad:
            raise ValueError(
                "solve_ode: event closes over a tensor that requires a gradient, which would get "
                "none; make it a component of the state with the slope 0, or use "
                "gradient='backprop'"
            )
        hidden = [*hidden, value]
    if gradient != "backprop" and any(x.requires_grad for x in hidden):
        raise ValueError(
            "solve_ode: f closes over a tensor that requires a gradient, which would get none; "
            "pass it through args, or pass the module itself as f, or use gradient='backprop'"
        )
    if compile:
        compile_steps(f, steps, now, (y, *tree_flatten(args)[0]), own)
    inputs = (times, y0, *leaves)
    follow = torch.is_grad_enabled() and any(x.requires_grad for x in (*inputs, *hidden))
    walk = Walk(steps, times.detach(), event, max_steps)
    with torch.set_grad_enabled(follow and gradient != "adjoint"):
        rows, states, event_time = walk.march(gradient, *inputs)
    if follow and gradient == "adjoint":
        rows = [*_Adjoint.apply((slope, rtol, atol, max_steps), torch.stack(rows), *inputs)]
    happened: dict[str, Tensor] = {}
    if event is not None:
        missing = spread(event_time.isnan(), states[-1], dims) != 0
        state = torch.where(missing, torch.nan, states[-1])
        happened = {"event_time": event_time, "event_state": state}
    return Solution(
        walk.stacked(rows, times.detach(), states[-1]),
        len(walk.taken),
        walk.attempts * steps.evaluations,
        **happened,
        _at=partial(walk.at, states, gradient, *inputs),
    )


@dataclass(frozen=True, repr=False)
class Solution:
    """The states of a solution, with what finds those between.

    Attributes:
        ys: the states at the times t, of the shape `(len(t), *y0.shape)`; after an event its state.
        steps: how many steps were taken, of all samples together.
        evaluations: how often f was evaluated; for a Taylor series how often its record was
            extended, each time with one evaluation more that checks the step.
        event_time: the time of the event, NaN where it did not occur; None without an event.
        event_state: the state at that time, NaN where it did not occur.
    """

    ys: Tensor
    steps: int
    evaluations: int
    event_time: Tensor | None = None
    event_state: Tensor | None = None
    _at: Callable[[Tensor], Tensor] = field(kw_only=True)

    def at(self, times: Tensor | Sequence[float] | float) -> Tensor:
        """Return the states at any times between the first and the last, by taking steps again.

        Args:
            times: of any shape, in any order; differentiable.

        Returns:
            A tensor of the shape `(*times.shape, *y0.shape)`, after an event its state.

        Raises:
            ValueError: if a time lies outside.
            NotImplementedError: if a gradient is required under gradient="adjoint".
        """
        return self._at(torch.as_tensor(times, dtype=torch.float64, device=self.ys.device))

    def __repr__(self) -> str:
        shape = " x ".join(str(n) for n in self.ys.shape)
        return f"Solution(ys {shape}, {self.steps} steps, {self.evaluations} evaluations)"


def _checked_times(y0: Any, t: Any) -> Tensor:
    """Return the times in float64."""
    if transforming():
        raise NotImplementedError(
            "solve_ode: expected to be called outside torch.func transforms and forward mode, for "
            "the steps depend on values; use backward(), and per_sample=True for a batch of systems"
        )
    if isinstance(y0, Mapping):
        raise TypeError("solve_ode: expected y0 to be one tensor, got a dict; torch.cat its values")
    check_floating("solve_ode", y0, "y0")
    times = t if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
    times = times.to(y0.device, torch.float64)
    lengths = times.detach().diff() if times.dim() == 1 else times.new_empty(0)
    ordered = (lengths > 0).all() or (lengths < 0).all()
    if not len(lengths) or not ordered or not lengths.isfinite().all():
        raise ValueError(
            "solve_ode: expected t to be at least two finite times, strictly increasing or "
            f"strictly decreasing, got {times.tolist()}"
        )
    return times


def _checked_options(
    y0: Tensor,
    method: str,
    rtol: float,
    atol: float,
    order: int | None,
    gradient: str,
    event: Any,
    per_sample: bool,
) -> int:
    """Return the order."""
    least = 10 * torch.finfo(y0.dtype).eps
    if order is None and rtol >= least:
        order = max(math.ceil(-0.7 * math.log(rtol)) + 1, 2)
    for name, value, fits, expected in (
        ("method", method, method in ("taylor", "dopri5"), "'taylor' or 'dopri5'"),
        ("gradient", gradient, gradient in _GRADIENTS, " or ".join(map(repr, _GRADIENTS))),
        (
            "rtol",
            rtol,
            rtol >= least,
            f"at least {least:.1e}, ten times the spacing of {y0.dtype} "
            "(give a larger one, or y0.double())",
        ),
        ("atol", atol, atol >= 0, "0 or more"),
        ("order", order, isinstance(order, int) and order >= 2, "an integer of 2 or more"),
        ("per_sample", per_sample, not per_sample or y0.dim(), "False, as y0 has no dimension"),
    ):
        if not fits:
            raise ValueError(f"solve_ode: expected {name} to be {expected}, got {value!r}")
    if gradient == "adjoint" and (event is not None or per_sample):
        raise ValueError(
            "solve_ode: gradient='adjoint' takes neither event nor per_sample; use 'recompute'"
        )
    assert order is not None
    return order


def _flat(f: Callable[..., Tensor], args: Any) -> tuple[list[Tensor], Field]:
    """The tensors that f is given, a module's parameters first, and f as a function of them."""
    parameters = dict(f.named_parameters()) if isinstance(f, nn.Module) else {}
    values, spec = tree_flatten(args)
    places = [i for i, x in enumerate(values) if isinstance(x, Tensor)]

    def slope(t: Tensor, y: Tensor, *leaves: Tensor) -> Tensor:
        given = list(values)
        for place, x in zip(places, leaves[len(parameters) :], strict=True):
            given[place] = x
        inputs = (t, y, *tree_unflatten(given, spec))
        if not isinstance(f, nn.Module):
            return f(*inputs)
        return functional_call(f, dict(zip(parameters, leaves, strict=False)), inputs)

    return [*parameters.values(), *(values[i] for i in places)], slope


def _shaped(name: str, value: Any, y: Tensor, dims: int | None = None) -> Tensor:
    """Check a result of f, which is like y, or of an event, which has its first dimensions."""
    shape = y.shape[:dims]
    if not isinstance(value, Tensor) or value.shape != shape or not differentiable(value):
        tensor = isinstance(value, Tensor)
        got = f"{value.dtype} {tuple(value.shape)}" if tensor else type(value).__name__
        raise ValueError(
            f"solve_ode: expected {name} to return a floating-point tensor of the shape "
            f"{tuple(shape)}, got {got}"
        )
    return value


def _distance(x: Tensor, y: Tensor, rtol: float, atol: float) -> float:
    return ((x - y).abs() / (atol + rtol * y.abs())).max().item()


class _Adjoint(Function):
    """The states at the times; backward solves for the gradient backward in time."""

    @staticmethod
    def forward(ctx: Any, options: Any, ys: Tensor, *inputs: Tensor) -> Tensor:
        ctx.options = options
        ctx.save_for_backward(ys, *inputs)
        return ys

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "solve_ode: gradient='adjoint' has no second derivative; use 'recompute'"
            )
        f, rtol, atol, max_steps = ctx.options
        ys, t, y0, *leaves = ctx.saved_tensors
        wanted = [i for i, x in enumerate(leaves) if x.requires_grad]
        sizes = [y0.numel(), y0.numel(), *(leaves[i].numel() for i in wanted)]

        def backward_field(now: Tensor, z: Tensor, *leaves: Tensor) -> Tensor:
            """The slopes of the state, of its gradient, and of those of the leaves."""
            y, a, *_ = z.split(sizes)
            own = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(leaves)]
            with torch.enable_grad():
                y = y.reshape(y0.shape).detach().requires_grad_()
                slope = f(now, y, *own)
                products = torch.autograd.grad(
                    slope,
                    [y, *(own[i] for i in wanted)],
                    -a.reshape(y0.shape),
                    materialize_grads=True,
                )
            return torch.cat([x.flatten() for x in (slope.detach(), *products)])

        own = [x.detach() for x in leaves]
        real = y0.real.dtype
        slopes = [f(now.to(real), y, *own) for now, y in zip(t.detach(), ys, strict=True)]
        rates = [(slope * g).sum().to(t.dtype) for slope, g in zip(slopes, grad, strict=True)]
        parted = 0.0
        z = torch.cat([ys[-1].flatten(), grad[-1].flatten(), *(ys.new_zeros(n) for n in sizes[2:])])
        for i in range(len(t) - 1, 0, -1):
            solution = solve_ode(
                backward_field,
                z,
                t.detach()[[i, i - 1]],
                *own,
                method="dopri5",
                rtol=rtol,
                atol=atol,
                max_steps=max_steps,
            )
            before, *parts = solution.ys[-1].split(sizes)
            parted = max(parted, _distance(before, ys[i - 1].flatten(), rtol, atol))
            if i == 1:
                rates[0] = -(parts[0] * slopes[0].flatten()).sum().to(t.dtype)
            z = torch.cat([ys[i - 1].flatten(), parts[0] + grad[i - 1].flatten(), *parts[1:]])
        if parted > 1000:
            warnings.warn(
                f"solve_ode: the state that gradient='adjoint' solved backward parted from the "
                f"forward one by {parted:.0f} tolerances, so the gradient is not that of the "
                "solution; use gradient='recompute'",
                RuntimeWarning,
                stacklevel=2,
            )
        _, of_y0, *of_leaves = z.split(sizes)
        found = [None] * len(leaves)
        for i, g in zip(wanted, of_leaves, strict=True):
            found[i] = g.reshape(leaves[i].shape)
        return None, None, torch.stack(rates), of_y0.reshape(y0.shape), *found
