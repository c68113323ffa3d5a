"""A check of derivatives along a direction against a fit that uses values alone."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.polynomial import Chebyshev
from torch import Tensor

from autograd_lib.higher_order.inputs import (
    Inputs,
    Scalar,
    check_tensor,
    follow,
    map_tensors,
    tensors_of,
)
from autograd_lib.higher_order.operators import random_signs
from autograd_lib.higher_order.taylor import jet
from autograd_lib.report.tables import Row, Table

__all__ = ["DerivativeReport", "verify_derivatives"]


@dataclass(frozen=True, repr=False, eq=False)
class DerivativeReport(Table):
    """Derivatives along a direction, computed in several ways, beside an independent fit.

    Attributes:
        fit: the derivatives of a Chebyshev fit, by order from 0.
        uncertainty: how far two fits differ, by order.
        values: for each way, the derivatives up to the order that it reached.
        errors: for each way that raised, what it raised.
        rtol: the relative error that passes.
        others: reports along further directions, which were taken where the ways disagree and this
            fit cannot tell which is wrong.
        first_wrong: for each way, the first order at which it disagrees with the fit here or in
            `others`, or which it does not reach; None where all orders agree.
    """

    fit: list[float]
    uncertainty: list[float]
    values: dict[str, list[float]]
    errors: dict[str, str]
    rtol: float
    others: list[DerivativeReport] = field(default_factory=list)

    @property
    def first_wrong(self) -> dict[str, int | None]:
        reports, orders = [self, *self.others], range(len(self.fit))
        return {
            name: next(
                (k for k in orders if any(r._verdict(name, k) not in ("", "?") for r in reports)),
                None,
            )
            for name in self.values
        }

    def disputed(self) -> bool:
        """Whether the ways differ at an order at which the fit calls none of them wrong."""
        wrong = [k for k in self.first_wrong.values() if k is not None]
        for k in range(min(wrong, default=len(self.fit))):
            found = [values[k] for values in self.values.values() if k < len(values)]
            if len(found) > 1 and not np.ptp(found) <= 2 * self.rtol * np.abs(found).max():
                return True
        return False

    @property
    def ok(self) -> bool:
        """Whether the fit resolves f, and every way reached the last order and agrees with it."""
        return self._resolved(1) and all(wrong is None for wrong in self.first_wrong.values())

    def _resolved(self, k: int, found: float = 0.0) -> bool:
        """Whether the fit is accurate enough at this order to judge a number."""
        scale, largest = max(abs(self.fit[k]), abs(found)), np.nanmax(np.abs(self.fit))
        return 10 * self.uncertainty[k] <= max(1e-2 * scale, 1e-6 * largest)

    def _verdict(self, name: str, k: int) -> str:
        """What is said of a way at an order: nothing where it is right, "?" if nobody can tell."""
        if k >= len(self.values[name]):
            return "raises" if name in self.errors else "missing"
        found = self.values[name][k]
        if math.isinf(self.uncertainty[k]):
            return "?"
        allowed = self.rtol * max(abs(self.fit[k]), abs(found)) + 10 * self.uncertainty[k]
        if not abs(found - self.fit[k]) <= allowed:
            return "wrong"
        return "" if self._resolved(k, found) else "?"

    def _table(self) -> tuple[str, Row, list[Row]]:
        wrong = [
            f"{name} from order {k} on"
            for name, k in self.first_wrong.items()
            if k is not None and k < len(self.values[name])
        ]
        agreement = "what came agrees with the fit" if self.errors else "all agree with the fit"
        title = f"wrong: {', '.join(wrong)}" if wrong else agreement
        unknown = [k for k in range(len(self.fit)) if not self._resolved(k)]
        if unknown:
            if not wrong:
                title = "undecided" if unknown[0] <= 1 else f"to order {unknown[0] - 1} {agreement}"
            title += f"; the fit does not resolve f from order {unknown[0]} on, scale v"
        rows: list[Row] = []
        for k, value in enumerate(self.fit):
            row = [str(k), f"{value:.6g} ± {self.uncertainty[k]:.0e}"]
            for name, found in self.values.items():
                number = f"{found[k]:.6g} " if k < len(found) else ""
                row.append((number + self._verdict(name, k)).strip())
            rows.append(row)
        return title, ["order", "fit", *self.values], rows

    def _notes(self) -> list[str]:
        notes = [f"{name} raises {error}" for name, error in self.errors.items()]
        if self.others:
            notes.append(f"decided along {len(self.others)} further directions, by sign of v")
        return notes


def verify_derivatives(
    f: Callable[..., Tensor],
    x: Inputs,
    v: Inputs,
    order: int,
    *,
    rtol: float = 1e-6,
    ways: Mapping[str, Callable[..., Any]] | None = None,
) -> DerivativeReport:
    r"""Check derivatives along a direction against a fit that uses values of `f` alone.

    $f(x + tv)$ is sampled in float64 at Chebyshev points and interpolated (Trefethen 2019,
    "Approximation Theory and Approximation Practice"); the fit's own derivatives at 0 are compared
    with those that automatic differentiation returns. By default: `jet`; `reverse`, nested
    `torch.autograd.grad`; `forward`, nested `torch.func.jvp`. Several widths are tried; the one
    whose fits of two degrees agree best counts. The uncertainty is their difference, with what the
    rounding of f, to float32 inside perhaps, and the fit's misses between its points do to it.
    Where the ways disagree and the fit cannot tell which is wrong, further directions are tried,
    which differ from `v` in the signs of its entries.

    Args:
        f: a function as for `jet`. It must take float64: convert a copy of a model by
            `copy.deepcopy(model).double()`, and its data.
            Where it returns several numbers, a fixed random combination of them is checked.
        x: where to differentiate; converted to float64.
        v: the direction, like `x`; f must be smooth along it.
        order: the highest derivative, at least 1.
        rtol: the relative error that passes.
        ways: other ways to check, by name: each is called with `(f, x, v, order)` and returns the
            derivatives from order 0 on.

    Returns:
        A `DerivativeReport` that prints as a table. `first_wrong` names, for each way, the first
        order that disagrees.

    Raises:
        TypeError: as `jet`.
        ValueError: as `jet`, or if `f` is not finite near `x`.

    Example:
        >>> x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])
        >>> verify_derivatives(lambda x: x.prod().exp(), x, v, 4).first_wrong
        {'jet': None, 'reverse': None, 'forward': None}
    """
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"verify_derivatives: expected an order of 1 or more, got {order!r}")

    def wide(t: Tensor) -> Tensor:
        return t.detach().to(torch.complex128 if t.is_complex() else torch.float64)

    v = map_tensors(wide, follow("verify_derivatives", x, v))
    x = map_tensors(wide, x)

    def one(x: Inputs) -> Tensor:
        y = check_tensor("verify_derivatives", f(x))
        y = torch.view_as_real(y) if y.is_complex() else y
        same = torch.Generator().manual_seed(0)  # the combination is the same one each time
        weights = torch.randn(y.shape, generator=same, dtype=torch.float64).to(y.device)
        return (y * weights).sum() if y.ndim else y

    def along(v: Inputs) -> DerivativeReport:
        on_line, _ = _line(one, x, v)
        fit, uncertainty = _fit(lambda t: on_line(t).item(), order)
        values: dict[str, list[float]] = {}
        errors: dict[str, str] = {}
        for name, way in (_WAYS if ways is None else ways).items():
            values[name] = []
            try:
                for found in itertools.islice(way(one, x, v, order), order + 1):
                    values[name].append(found.item())
            except (RuntimeError, NotImplementedError) as error:
                errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        return DerivativeReport(fit, uncertainty, values, errors, rtol)

    report = along(v)
    generator = torch.Generator(tensors_of(x)[0].device).manual_seed(0)
    while report.disputed() and len(report.others) < _DIRECTIONS:
        report.others.append(along(map_tensors(lambda t: t * random_signs(t, generator), v)))
    return report


def _line(f: Scalar, x: Inputs, v: Inputs) -> tuple[Callable[[Any], Tensor], Tensor]:
    """Return f(x + t v) as a function of t, and t = 0."""
    zero = torch.zeros((), dtype=torch.float64, device=tensors_of(x)[0].device)
    return lambda t: f(follow("verify_derivatives", x, v, lambda x, v: x + t * v)), zero


def _reverse(f: Scalar, x: Inputs, v: Inputs, order: int) -> Iterator[Tensor]:
    g, t = _line(f, x, v)
    with torch.enable_grad():
        y = g(t.requires_grad_())
        while True:
            yield y.detach()
            (y,) = torch.autograd.grad(y + 0 * t, t, create_graph=True)


def _forward(f: Scalar, x: Inputs, v: Inputs, order: int) -> Iterator[Tensor]:
    g, t = _line(f, x, v)
    while True:
        yield g(t).detach()
        g = _slope(g)


def _slope(g: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.func.jvp(g, (t,), (torch.ones_like(t),))[1]


_WAYS: dict[str, Callable[..., Any]] = {"jet": jet, "reverse": _reverse, "forward": _forward}
_BETWEEN = (-0.83, -0.29, 0.37, 0.71)  # no points of a fit
_DIRECTIONS = 8  # at most, beyond the given one
_WIDTHS = (2.0, 1.0, 0.5, 0.25, 0.12, 0.06)


def _fit(g: Callable[[float], float], order: int) -> tuple[list[float], list[float]]:
    """Derivatives at 0 by Chebyshev interpolation, and by how much two degrees differ."""
    # The last coefficients over a short interval are noise: of float64, or of what f computes in.
    noise = np.abs(_interpolate(g, _WIDTHS[-1], order + 16).coef[-3:]).max()
    samples = np.array([g(share * _WIDTHS[-1]) for share in _BETWEEN])
    with np.errstate(over="ignore"):
        rounded = np.array_equal(samples, samples.astype(np.float32))
    if rounded:  # to steps, on which the samples may all be the same
        noise = np.nanmax([noise, np.finfo(np.float32).eps * np.abs(samples).max()])
    best, finite = [(math.inf, math.nan)] * (order + 1), False
    for width, (low, high) in itertools.product(_WIDTHS, ((4, 6), (12, 16))):
        fits = [_interpolate(g, width, degree) for degree in (order + low, order + high)]
        largest = np.abs(fits[1].coef).sum()
        if not all(np.isfinite(series.coef).all() for series in fits):
            continue
        finite = True
        miss = max(abs(float(fits[1](t)) - g(t)) for t in np.array(_BETWEEN) * width)
        if not miss <= 1e-5 * largest:
            continue  # too wide to resolve f
        error = np.finfo(np.float64).eps * largest + miss + (noise if math.isfinite(noise) else 0)
        for k in range(order + 1):
            rough, fine = (_at_zero(series, k) for series in fits)
            doubt = abs(fine - rough) + error * _amplification(order + high, k) / width**k
            best[k] = min(best[k], (doubt, fine))
    if not finite:
        raise ValueError(
            "verify_derivatives: expected f to be finite along v, got none of the widths from "
            f"{_WIDTHS[0]} to {_WIDTHS[-1]}; scale v down"
        )
    if math.isinf(best[0][0]):  # nothing is known beyond the value
        best[0] = (0.0, g(0.0))
    return [value for _, value in best], [doubt for doubt, _ in best]


def _at_zero(series: Chebyshev, k: int) -> float:
    return float((series.deriv(k) if k else series)(0.0))


def _interpolate(g: Callable[[float], float], width: float, degree: int) -> Chebyshev:
    points = width * np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    return Chebyshev.fit(points, [g(t) for t in points], degree, domain=[-width, width])


@functools.cache
def _amplification(degree: int, k: int) -> float:
    """By how much a k-th derivative at 0 enlarges an error of the samples: sum |T_n^(k)(0)|."""
    return sum(abs(_at_zero(Chebyshev.basis(n), k)) for n in range(degree + 1))
