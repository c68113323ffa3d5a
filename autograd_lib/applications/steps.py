"""One step of an ordinary differential equation: by a Taylor series, or by Runge-Kutta stages.

Both methods describe a step from `now` to `now + h` by the coefficients of a polynomial in the time
since `now`, from which outputs and events inside the step are read. Times and sizes are float64
tensors of the shape `()`, or `(batch,)` where each sample has steps of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.fx.experimental.proxy_tensor import make_fx

from autograd_lib.higher_order.recording import differentiable
from autograd_lib.higher_order.solution import RightHandSide

Field = Callable[..., Tensor]  # f(t, y, *leaves)
Attempt = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # polynomial, size, end, error, slope there

# The pair of Dormand & Prince 1980 as in Hairer, Norsett & Wanner 1993, II.5, with the dense output
# of order 4 of Shampine 1986 ("Some practical Runge-Kutta formulas").
_NODES = (0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1, 1)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_ERRORS = (-71 / 57600, 0, 71 / 16695, -71 / 1920, 17253 / 339200, -22 / 525, 1 / 40)
_DENSE = (
    (1, 0, 0, 0, 0, 0, 0),
    (
        *(-8048581381 / 2820520608, 0, 131558114200 / 32700410799, -1754552775 / 470086768),
        *(127303824393 / 49829197408, -282668133 / 205662961, 40617522 / 29380423),
    ),
    (
        *(8663915743 / 2820520608, 0, -68118460800 / 10900136933, 14199869525 / 1410260304),
        *(-318862633887 / 49829197408, 2019193451 / 616988883, -110615467 / 29380423),
    ),
    (
        *(-12715105075 / 11282082432, 0, 87487479700 / 32700410799, -10690763975 / 1880347072),
        *(701980252875 / 199316789632, -1453857185 / 822651844, 69997945 / 29380423),
    ),
)


def spread(s: Tensor, y: Tensor, dims: int) -> Tensor:
    """Give times the dtype and the dimensions of y, of which their last `dims` are the first."""
    return s.to(y.dtype).reshape((*s.shape, *[1] * (y.dim() - dims)))


def horner(polynomial: Tensor, s: Tensor) -> Tensor:
    value = polynomial[-1]
    for c in reversed(polynomial[:-1].unbind()):
        value = torch.addcmul(c, value, s)
    return value


class _Method:
    """What the methods share: the tolerances, and the norm in which an error of 1 is allowed.

    Attributes:
        field: the right-hand side f(t, y, *leaves).
        dims: 1 where the first dimension of y is a batch with steps of its own, else 0.
        evaluations: how many times f, or its record, is evaluated in an attempt.
    """

    evaluations: int

    def __init__(self, field: Field, rtol: float, atol: float, dims: int) -> None:
        self.field, self.rtol, self.atol, self.dims = field, rtol, atol, dims

    def norm(self, x: Tensor, *ys: Tensor) -> Tensor:
        """The root mean square of x over a sample, in units of `atol + rtol * |y|`."""
        size = torch.stack([y.detach().abs() for y in ys]).amax(0)
        ratio = x.abs() / (self.atol + self.rtol * size)
        inner = tuple(range(x.dim() - size.dim() + self.dims, x.dim()))
        return (ratio.square().mean(inner).sqrt() if inner else ratio).double()

    def slope(self, now: Tensor, y: Tensor, *leaves: Tensor) -> Tensor:
        return self.field(now.to(y.real.dtype), y, *leaves)


class Taylor(_Method):
    """Steps by the Taylor series of the solution (Jorba & Zou 2005).

    The size is what makes the last two terms as large as the tolerance. A step is then accepted by
    its defect, the difference between the slope of the polynomial at its end and f there: the
    coefficients do not know of a kink that lies ahead, and may all vanish by symmetry.
    """

    evaluations = 1

    def __init__(
        self, field: Field, rtol: float, atol: float, dims: int, order: int, record: RightHandSide
    ) -> None:
        super().__init__(field, rtol, atol, dims)
        self.order, self.record = order, record

    def slope(self, now: Tensor, y: Tensor, *leaves: Tensor) -> Tensor:
        return self.record.coefficients(1, now.to(y.real.dtype), y, *leaves)[1]

    def replay(self, now: Tensor, y: Tensor, h: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        """The polynomial of a step, and the state at its end."""
        terms = self.record.coefficients(self.order, now.to(y.real.dtype), y, *leaves)
        polynomial = torch.stack(terms)
        return polynomial, horner(polynomial, spread(h, y, self.dims))

    def attempt(
        self, now: Tensor, y: Tensor, most: Tensor, slope: Tensor, *leaves: Tensor
    ) -> Attempt:
        terms = self.record.coefficients(self.order, now.to(y.real.dtype), y, *leaves)
        polynomial = torch.stack(terms)
        before, last = self.norm(polynomial[-2:], y).unbind()
        size = 0.9 * torch.minimum(before ** (-1 / (self.order - 1)), last ** (-1 / self.order))
        h = torch.copysign(torch.minimum(size, most.abs()), most)
        step = spread(h, y, self.dims)
        end = horner(polynomial, step)
        slope = self.slope(now + h, end, *leaves)
        along = horner(torch.stack([k * c for k, c in enumerate(terms)][1:]), step)
        return polynomial, h, end, self.norm((slope - along) * step, y, end) / self.order, slope

    def first(self, now: Tensor, y: Tensor, slope: Tensor, most: Tensor, *_: Tensor) -> Tensor:
        return most

    def following(self, h: Tensor, error: Tensor) -> Tensor:
        return torch.where(error <= 1, torch.copysign(torch.full_like(h, torch.inf), h), h / 2)


class Dopri5(_Method):
    """Steps by the Runge-Kutta pair of order 5 and 4 of Dormand & Prince."""

    evaluations = 6

    def replay(self, now: Tensor, y: Tensor, h: Tensor, *leaves: Tensor) -> tuple[Tensor, Tensor]:
        return self._stages(now, y, h, None, *leaves)[:2]

    def _stages(
        self, now: Tensor, y: Tensor, h: Tensor, slope: Tensor | None, *leaves: Tensor
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The polynomial, the end, and the slopes at the stages, the last of them at the end."""
        step, end = spread(h, y, self.dims), y
        slopes = [self.slope(now, y, *leaves) if slope is None else slope]
        for node, weights in list(zip(_NODES, _STAGES, strict=True))[1:]:
            total = slopes[0] * weights[0]
            for weight, k in list(zip(weights, slopes, strict=True))[1:]:
                total = torch.add(total, k, alpha=weight) if weight else total
            end = torch.addcmul(y, step, total)
            slopes.append(self.slope(now + node * h, end, *leaves))
        dense = torch.tensor(_DENSE, dtype=y.dtype, device=y.device)
        terms = torch.tensordot(dense, torch.stack(slopes), 1)
        shorter = torch.where(step == 0, 1, step)  # a sample that waits
        scaled = [c / shorter**power for power, c in enumerate(terms.unbind())]
        return torch.stack([y, *scaled]), end, slopes

    def attempt(
        self, now: Tensor, y: Tensor, most: Tensor, slope: Tensor, *leaves: Tensor
    ) -> Attempt:
        polynomial, end, slopes = self._stages(now, y, most, slope, *leaves)
        weights = torch.tensor(_ERRORS, dtype=y.dtype, device=y.device)
        error = torch.tensordot(weights, torch.stack(slopes), 1) * spread(most, y, self.dims)
        return polynomial, most, end, self.norm(error, y, end), slopes[-1]

    def first(self, now: Tensor, y: Tensor, slope: Tensor, most: Tensor, *leaves: Tensor) -> Tensor:
        """The size of the first step (Hairer, Norsett & Wanner 1993, II.4)."""
        state, rise = self.norm(y, y), self.norm(slope, y)
        small = (state < 1e-5) | (rise < 1e-5)
        h = torch.copysign(torch.where(small, 1e-6, 0.01 * state / rise), most)
        there = self.slope(now + h, y + spread(h, y, self.dims) * slope, *leaves)
        bend = self.norm(there - slope, y) / h.abs()
        size = (0.01 / torch.maximum(rise, bend).clamp(min=1e-15)) ** 0.2
        return torch.copysign(torch.minimum(100 * h.abs(), size), most)

    def following(self, h: Tensor, error: Tensor) -> Tensor:
        factor = (0.9 * error.nan_to_num(torch.inf) ** -0.2).clamp(0.2, 10)
        return h * torch.where(error <= 1, factor, factor.clamp(max=1))


_COMPILED: WeakKeyDictionary[Any, dict[Any, Any]] = WeakKeyDictionary()


class _Compiled(Function):
    """The polynomial and the end of a step, with a backward that is compiled too.

    The graph that `torch.compile` makes for autograd itself keeps each intermediate value.
    """

    @staticmethod
    def forward(ctx: Any, replay: Any, pull: Any, *inputs: Tensor) -> Any:
        ctx.pull = pull
        ctx.save_for_backward(*inputs)
        return replay(*(x.detach() for x in inputs))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise NotImplementedError("solve_ode: compile=True has no second derivative; leave it")
        return None, None, *ctx.pull(*grads, *(x.detach() for x in ctx.saved_tensors))


def compile_steps(
    f: Any, steps: Taylor | Dopri5, now: Tensor, inputs: Sequence[Any], leaves: list[Tensor]
) -> None:
    """Compile a step, once for each f and what the program of a step depends on.

    `inputs` are y and the arguments of f as they were given, `leaves` the tensors among them.
    """

    def pull(of_polynomial: Tensor, of_end: Tensor, *inputs: Tensor) -> list[Tensor | None]:
        """The gradients of the inputs of a step."""
        with torch.enable_grad():
            own = [x.detach().requires_grad_(differentiable(x)) for x in inputs]
            found = torch.autograd.grad(
                steps.replay(*own),
                [x for x in own if x.requires_grad],
                (of_polynomial, of_end),
                materialize_grads=True,
            )
        rest = iter(found)
        return [next(rest) if x.requires_grad else None for x in own]

    y = inputs[0]
    shapes = [(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in inputs]
    key = repr(
        (type(steps), getattr(steps, "order", 0), steps.rtol, steps.atol, steps.dims, shapes)
    )
    known = _COMPILED.setdefault(f, {})
    if key not in known:
        # No tensor twice, which make_fx would take for one.
        example, own = (now, y, torch.ones_like(now)), [x.clone() for x in leaves]
        with torch.no_grad():
            grads = steps.replay(*example, *own)
            known[key] = [
                torch.compile(make_fx(function)(*inputs), fullgraph=True)
                for function, inputs in (
                    (steps.attempt, (*example, y.clone(), *own)),
                    (steps.replay, (*example, *own)),
                    (pull, (*grads, *example, *own)),
                )
            ]
    attempt, replay, pulled = known[key]
    steps.attempt = attempt  # type: ignore[method-assign]
    steps.replay = partial(_Compiled.apply, replay, pulled)  # type: ignore[method-assign]
