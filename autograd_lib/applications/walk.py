"""The steps of a solution from its first time to its last, each of which can be taken again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function
from torch.utils.checkpoint import checkpoint

from autograd_lib.applications.again import pulled_back
from autograd_lib.applications.steps import Dopri5, Taylor, horner, spread

Event = Callable[[Tensor, Tensor], Tensor]
_PROBES = 8  # places in a step at which the sign of an event is looked at


@dataclass(frozen=True)
class _Step:
    """The times of a step, of all samples at once; the size is 0 for a sample that waits."""

    start: Tensor
    end: Tensor
    size: Tensor
    first: Tensor  # which samples leave t[0]
    hit: Tensor  # which end at an event


class Walk:
    """Chooses the steps of a solution, and takes any of them again.

    It holds no tensor with a graph: the nodes of the graph hold it.
    """

    def __init__(
        self, steps: Taylor | Dopri5, times: Tensor, event: Event | None, max_steps: int
    ) -> None:
        self.steps, self.times, self.event, self.max_steps = steps, times, event, max_steps
        self.direction = torch.sign(times[-1] - times[0])
        self.taken: list[_Step] = []
        self.attempts = 0

    def march(
        self, gradient: str, t: Tensor, y: Tensor, *leaves: Tensor
    ) -> tuple[list[Tensor], list[Tensor], Tensor]:
        """Choose the steps; return the states at t, those between steps, and when an event was."""
        steps, dims, own = self.steps, self.steps.dims, [x.detach() for x in leaves]
        now, last = (x.expand(y.shape[:dims]) for x in (self.times[0], self.times[-1]))
        rows, states, event_time = [y] * len(t), [y], torch.full_like(now, torch.nan)
        with torch.no_grad():
            slope = steps.slope(now, y, *own)
            trial = steps.first(now, y, slope, last - now, *own)
            sign = self._sign(now, y)
        done = torch.zeros_like(now, dtype=torch.bool)
        while not done.all():
            with torch.no_grad():
                left = torch.where(done, 0, last - now)
                most = torch.copysign(torch.minimum(trial.abs(), left.abs()), left)
                polynomial, h, end, error, there = steps.attempt(now, y, most, slope, *own)
                self.attempts += 1
                accepted, final = (error <= 1) & ~done, h == left
                self._check(now, y, h, done | (accepted & final), own)
                trial = torch.where(done, trial, steps.following(h, error))
                if not accepted.any():
                    continue
                h, hit = torch.where(accepted, h, 0), torch.zeros_like(done)
                if self.event is not None:
                    h, hit, sign = self._located(now, h, polynomial, sign)
                    if hit.any():
                        end, final = horner(polynomial, spread(h, y, dims)), final & ~hit
                if not accepted.all():
                    chosen = spread(accepted, y, dims) != 0
                    end, there = torch.where(chosen, end, y), torch.where(chosen, there, slope)
                first, after = now == self.times[0], torch.where(accepted & final, last, now + h)
                step = _Step(now, after, h, accepted & first, hit)
                places, inside = self._window(step, self.times)
                values = self._read(polynomial, self.times[places], now)
                now, slope, done = after, there, done | hit | (after == last)
            if not torch.is_grad_enabled():
                y, when = end, after
            elif gradient == "recompute":
                given = (values, end, after.clone())  # which become outputs
                values, y, when = _Again.apply(self, step, places, given, t, y, *leaves)
            else:  # the gradients of a step add up at aliases before they join those of others
                state, *aliases = (x.view_as(x) for x in (y, *leaves))
                values, y, when = self.take(step, t[0], t[places], state, aliases)
            self.taken.append(step)
            states.append(y)
            event_time = torch.where(hit, when, event_time) if hit.any() else event_time
            self._place(rows, places, inside, values)
        return rows, states, event_time

    def _check(
        self, now: Tensor, y: Tensor, h: Tensor, fine: Tensor, leaves: Sequence[Tensor]
    ) -> None:
        """Refuse steps that are too many, too small, or not numbers."""
        bad = ~(h.abs() > 8 * torch.finfo(now.dtype).eps * now.abs()) & ~fine
        if bad.any():
            i = bad.flatten().long().argmax()
            slope = self.steps.slope(now, y, *leaves)
            size, rise = (
                x.flatten(self.steps.dims).abs().amax(-1).flatten()[i] for x in (y, slope)
            )
            pole = now.flatten()[i] + torch.copysign(size / rise, h.flatten()[i])
            cause = "f is not finite there; see that it stays defined"
            if pole.isfinite():
                cause = f"the solution seems to have a pole near t = {pole:.6g}; end before it"
            raise RuntimeError(
                f"solve_ode: the step at t = {now.flatten()[i]:.9g} became {h.flatten()[i]:.1e}, "
                f"with |y| = {size:.3g}: {cause}"
            )
        if self.attempts > self.max_steps:
            raise RuntimeError(
                f"solve_ode: {self.max_steps} steps from t = {self.times[0]:.6g} reached "
                f"{(now * self.direction).min() * self.direction:.6g} of {self.times[-1]:.6g}; "
                "allow more max_steps or a larger rtol, or take an implicit solver if the equation "
                "is stiff, such as scipy.integrate.solve_ivp(..., method='Radau')"
            )

    def _sign(self, now: Tensor, y: Tensor) -> Tensor:
        if self.event is None:
            return now
        return torch.sign(self.event(now.to(y.real.dtype), y)).to(now)

    def _located(
        self, now: Tensor, h: Tensor, polynomial: Tensor, sign: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Shorten steps to the last time before the event's sign changes; say which, and the sign.

        The sign is the last one that is not zero, as the event may be at the start.
        """

        def sign_at(s: Tensor) -> Tensor:
            return self._sign(now + s, horner(polynomial, spread(s, polynomial[0], now.dim())))

        for power in (40, 30, 20, 10):  # it may come back before the first probe
            if (sign == 0).any():
                sign = torch.where((sign == 0) & (h != 0), sign_at(h * 2.0**-power), sign)
        low, high = torch.zeros_like(h), h
        hit = torch.zeros_like(h, dtype=torch.bool)
        for probe in range(1, _PROBES + 1):
            s = h * (probe / _PROBES)
            found = sign_at(s)
            crossed = ~hit & (h != 0) & (sign != 0) & (found != sign)
            high, hit = torch.where(crossed, s, high), hit | crossed
            low = torch.where(hit, low, s)
            sign = torch.where((sign == 0) & (h != 0), found, sign)
        middle = low + (high - low) / 2
        while (hit & (middle != low) & (middle != high)).any():
            before = sign_at(middle) == sign
            low, high = torch.where(before, middle, low), torch.where(before, high, middle)
            middle = low + (high - low) / 2
        return torch.where(hit, low, h), hit, sign

    def _read(self, polynomial: Tensor, times: Tensor, start: Tensor) -> Tensor:
        """The values of a polynomial at times of the shape (n,) or, by sample, (n, batch)."""
        if not len(times):  # most steps hold no output
            return polynomial[:0]
        if times.dim() == start.dim():
            times = times.reshape(-1, *[1] * start.dim())
        return horner(polynomial, spread(times - start, polynomial[0], start.dim()))

    def _window(self, step: _Step, times: Tensor) -> tuple[slice, Tensor]:
        """Which of the times lie in a step, and which of those for each sample."""
        bounds = torch.stack([step.start, step.end]) * self.direction
        before, until = torch.searchsorted(times * self.direction, bounds, right=True)
        places = slice(int(before.min()), int(until.max()))
        i = torch.arange(places.start, places.stop, device=times.device)
        i = i.reshape(-1, *[1] * self.steps.dims)
        return places, (i >= before) & (i < until)

    def _place(self, rows: list[Tensor], places: slice, inside: Tensor, values: Tensor) -> None:
        for i, mine, value in zip(range(len(rows))[places], inside, values, strict=True):
            own = spread(mine, value, mine.dim()) != 0
            rows[i] = torch.where(own, value, rows[i]) if self.steps.dims else value

    def take(
        self, step: _Step, start: Tensor, times: Tensor, y: Tensor, leaves: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Take a step again: the states at times in it, the state at its end, and that time.

        `start` is the time t[0], on which the first step depends.
        """
        now, h = step.start, step.size
        if step.first.any():  # it starts later, and ends where it did
            moved = torch.where(step.first, start - start.detach(), 0)
            now, h = now + moved, h - moved
        polynomial, end = self.steps.replay(now, y, h, *leaves)
        if step.hit.any():
            if torch.is_grad_enabled():
                h = torch.where(step.hit, self._refined(now, h, polynomial), h)
            end = horner(polynomial, spread(h, y, self.steps.dims))
        after = step.end + (now - now.detach()) + (h - h.detach())
        return self._read(polynomial, times, now), end, after

    def _refined(self, now: Tensor, h: Tensor, polynomial: Tensor) -> Tensor:
        """The same size with the derivatives of the event's time, by two steps of Newton."""
        assert self.event is not None
        s = h.detach()
        for _ in range(2):
            s = s if s.requires_grad else s.requires_grad_()
            y = horner(polynomial, spread(s, polynomial[0], self.steps.dims))
            value = self.event((now + s).to(y.real.dtype), y)
            (rate,) = torch.autograd.grad(value.sum(), s, create_graph=True)
            s = s - value / rate
        return h.detach() + (s - s.detach())

    def stacked(self, rows: list[Tensor], times: Tensor, y: Tensor) -> Tensor:
        """The states at times, the last one y for those beyond an event."""
        beyond = times.reshape(-1, *[1] * self.steps.dims) * self.direction
        beyond = beyond > self.taken[-1].end * self.direction
        if beyond.any():
            rows = [
                torch.where(spread(mine, y, self.steps.dims) != 0, y, row)
                for mine, row in zip(beyond, rows, strict=True)
            ]
        return torch.stack(rows)

    def at(self, states: list[Tensor], gradient: str, t: Tensor, _: Tensor, *rest: Any) -> Tensor:
        *leaves, times = rest
        follow = torch.is_grad_enabled()
        if gradient == "adjoint" and follow and any(x.requires_grad for x in (t, _, *leaves)):
            raise NotImplementedError(
                "Solution.at: has no gradient by gradient='adjoint', expected torch.no_grad or a "
                "solution by gradient='recompute'"
            )
        ordered, order = times.flatten().sort(descending=bool(self.direction < 0))
        known, low, high = ordered.detach(), self.times.min(), self.times.max()
        outside = known[(known < low) | (known > high)].tolist()
        if outside:
            raise ValueError(
                f"Solution.at: expected times between {low:g} and {high:g}, got {outside[0]:g}"
            )
        take: Callable[..., Any] = self.take
        if follow and gradient == "recompute":
            take = partial(checkpoint, take, use_reentrant=False, preserve_rng_state=False)
        rows = [states[0]] * len(known)
        for step, y in zip(self.taken, states, strict=False):
            places, inside = self._window(step, known)
            if places.start < places.stop:
                values, *_ = take(step, t[0], ordered[places], y, leaves)
                self._place(rows, places, inside, values)
        stacked = self.stacked(rows, known, states[-1])[order.argsort()]
        return stacked.reshape((*times.shape, *states[0].shape))


class _Again(Function):
    """A step whose values are given; backward takes it again, from the state where it starts."""

    @staticmethod
    def forward(
        ctx: Any, walk: Walk, step: _Step, places: slice, given: Any, *inputs: Tensor
    ) -> Any:
        ctx.walk, ctx.step, ctx.places = walk, step, places
        ctx.save_for_backward(*inputs)
        return given

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        def run(t: Tensor, y: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
            return ctx.walk.take(ctx.step, t[0], t[ctx.places], y, leaves)

        return None, None, None, None, *pulled_back(run, ctx.saved_tensors, grads)
