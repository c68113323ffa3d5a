"""Two forms of one model held against each other: gradients, and finite differences as referee."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autograd_lib.core.batches import read_batch
from autograd_lib.core.snapshot import (
    ModuleState,
    drop_gradients,
    preserved_random_state,
    seed_all,
    without_gradients,
)
from autograd_lib.report.tables import Row, Table
from autograd_lib.training.step import ForwardBackward, micro_batches

__all__ = ["GradientReport", "verify_gradients"]

Gradient = list[Tensor]  # in double precision, one for each parameter; zeros where there is none

_DIRECTIONS = 2  # random ones, over all parameters
_JUDGED = 8  # parameters that differ the most have a direction of their own
_STEPS = [10.0**-k for k in range(2, 8)]  # of finite differences, relative to the parameters
_FORMS = ("reference", "candidate")
_SMALL = 1e-3  # of the whole gradient: what is smaller may differ by as much as that may


def widened(tensor: Tensor, copy: bool = True) -> Tensor:
    """A copy in double precision; of integers a copy."""
    wide = {torch.complex64: torch.complex128, torch.complex32: torch.complex128}
    dtype = torch.float64 if tensor.is_floating_point() else wide.get(tensor.dtype, tensor.dtype)
    return tensor.detach().to(dtype, copy=copy)


def gradient_of(parameters: Sequence[Tensor]) -> Gradient:
    """What `.grad` holds, in double precision."""
    zero = torch.zeros(())  # expanded, it takes no memory
    return [
        widened(zero.to(p)).expand_as(p)
        if p.grad is None
        else widened(p.grad.to_dense(), copy=False)
        for p in parameters
    ]


def norm_of(gradient: Sequence[Tensor]) -> float:
    """L2 norm over all parameters."""
    return float(sum(float(g.abs().square().sum()) for g in gradient) ** 0.5)


def relative_error(found: Gradient, reference: Gradient) -> float:
    """The L2 norm of the difference over that of the reference; NaN where that is 0."""
    difference = norm_of([a - b for a, b in zip(found, reference, strict=True)])
    norm = norm_of(reference)
    return difference / norm if norm else float("nan")


class Difference(NamedTuple):
    """A parameter in two forms of a model.

    Attributes:
        norm: L2 norm of its gradient in the reference.
        error: Norm of the difference, relative to `norm`, or to a thousandth of the norm of the
            whole gradient where that is larger.
        verdict: "" where the gradients agree; otherwise which form is wrong, as far as is known.
    """

    norm: float
    error: float
    verdict: str


@dataclass(frozen=True, eq=False, repr=False)
class GradientReport(Table):
    """What `verify_gradients` found; prints as a table, in a notebook as HTML.

    Attributes:
        wrong: Which forms finite differences refute: "reference", "candidate", both or none.
        parameters: By name, the largest error first.
        losses: Of reference and candidate.
        referee: Errors of reference and candidate against finite differences of their own loss,
            relative to the gradient: the largest over random directions.
        as_it_runs: Error of the candidate's gradient, over all parameters, in the precision in
            which it was given.
        precision: In which the rest was compared: "float64", or "the given precision".
        notes: What else there is to know, one sentence each.
    """

    wrong: tuple[str, ...]
    parameters: Mapping[str, Difference]
    losses: tuple[float, float]
    referee: tuple[float, float]
    as_it_runs: float
    precision: str
    notes: tuple[str, ...]

    @property
    def ok(self) -> bool:
        """Whether the gradients agree with each other and with finite differences."""
        return not self.wrong and not any(found.verdict for found in self.parameters.values())

    def _notes(self) -> tuple[str, ...]:
        return self.notes

    def _table(self) -> tuple[str, Row, list[Row]]:
        differing = sum(bool(found.verdict) for found in self.parameters.values())
        what = f"{differing} of {len(self.parameters)} gradients differ" if differing else "agree"
        if self.wrong:
            what = f"wrong: {' and '.join(self.wrong)}; {what}"
        title = (
            f"{what} (compared in {self.precision}, as the candidate runs {self.as_it_runs:.1e}; "
            "against finite differences: reference {:.1e}, candidate {:.1e})".format(*self.referee)
        )
        rows: list[Row] = [
            [name, f"{found.norm:.3g}", f"{found.error:.1e}", found.verdict]
            for name, found in self.parameters.items()
        ]
        return title, ("parameter", "norm", "error", "verdict"), rows


class _Form:
    """One form of the model, with its parameters in the order in which the reference has them."""

    def __init__(self, model: nn.Module, loss_fn: Any, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        roots = [m for m in (model, loss_fn) if isinstance(m, nn.Module)]
        self.modules = list(dict.fromkeys(m for root in roots for m in root.modules()))
        self.run = ForwardBackward("verify_gradients", model, loss_fn, "fp32", parameters[0].device)

    def gradient(self, batch: Any, seed: int) -> tuple[float, Gradient, list[bool]]:
        """Loss, gradient, and of which parameters `.grad` is None."""
        state = ModuleState(self.modules)
        seed_all(seed)
        try:
            loss = float(self.run(micro_batches("verify_gradients", batch, None, None)))
            return loss, gradient_of(self.parameters), [p.grad is None for p in self.parameters]
        finally:
            drop_gradients(self.parameters)
            state.restore()

    def slope(self, batch: Any, seed: int, direction: Gradient) -> tuple[float, float]:
        """Derivative of the loss along a direction by finite differences, and its doubt.

        Of several steps those two count that agree best: the loss may be rounded, or have kinks.
        What rounding makes of it shows at the smallest steps, where the loss is a straight line.
        """
        (piece,) = micro_batches("verify_gradients", batch, None, None)
        state = ModuleState(self.modules, self.parameters)
        unit = norm_of([p.detach() for p in self.parameters]) / norm_of(direction)

        def loss(t: float) -> float:
            for p, v in zip(self.parameters, direction, strict=True):
                p.data.add_(v.to(p), alpha=t)
            seed_all(seed)
            try:
                # With a graph, as without one compiled code may draw other random numbers.
                return float(self.run.forward(piece)[1].detach())
            finally:
                state.restore()

        ends, middle = [(loss(h * unit), loss(-h * unit)) for h in _STEPS], loss(0.0)
        noise = max(abs(a + b - 2 * middle) for a, b in ends[-3:]) + 1e-16 * abs(middle)
        slopes = [(a - b) / (2 * h * unit) for h, (a, b) in zip(_STEPS, ends, strict=True)]
        pairs = zip(itertools.pairwise(slopes), _STEPS[1:], strict=True)
        doubts = [(b, abs(a - b) + noise / (h * unit)) for (a, b), h in pairs]
        return min(doubts, key=lambda found: found[1])


def verify_gradients(
    reference: nn.Module,
    candidate: nn.Module,
    batch: Any,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    seed: int = 0,
) -> GradientReport:
    r"""Compare the gradients of two forms of one model, and say which of the two is wrong.

    The forms have the same parameters by name and by value, or the very same ones: a model and
    itself compiled, with a checkpoint plan, under autocast, or with a custom Function in it. Both
    run one batch, in float64 where they can, from one seed. Along random directions $v$ central
    differences of each form's own loss, $(L(\theta + hv) - L(\theta - hv)) / 2h$, are compared with
    $g^T v$; where the gradients of a parameter differ, so they are along a direction within it.
    This finds a backward that does not belong to its forward even where the two forms draw
    different random numbers, as eager and compiled code do, and so have other losses.

    Autocast leaves float64 alone, and what it does shows in `as_it_runs`. Parameters, gradients,
    buffers and random states are as before at the end.

    Args:
        reference: The form that is believed; its names are those of the report.
        candidate: The form in question. Its parameters are matched by identity, or by name, of
            which `torch.compile` adds a part that is left out.
        batch: As for `autotune`.
        loss_fn: Called as `loss_fn(output, targets)`; None for the loss that the model computes.
        seed: Of the global generators, before each forward.

    Returns:
        The report; `report.ok` where all agree, `report.wrong` names the forms that are wrong.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: Parameters of the two have other names or values, or none requires a gradient.
        Exception: Whatever a form raises as it is given.

    Example:
        >>> class Wrong(torch.autograd.Function):
        ...     @staticmethod
        ...     def forward(ctx, x):
        ...         return x.sin()
        ...     @staticmethod
        ...     def backward(ctx, grad):
        ...         return grad
        >>> class Sine(nn.Module):
        ...     def forward(self, x):
        ...         return Wrong.apply(x)
        >>> linear, batch = nn.Linear(3, 3), (torch.ones(2, 3), torch.zeros(2, 3))
        >>> plain = nn.Sequential(linear, nn.Tanh())
        >>> verify_gradients(plain, torch.compile(plain, backend="eager"), batch, nn.MSELoss()).ok
        True
        >>> sine = nn.Sequential(linear, Sine())
        >>> verify_gradients(sine, sine, batch, nn.MSELoss()).wrong
        ('reference', 'candidate')
    """
    named = _paired(reference, candidate, loss_fn)
    batch = tree_map_only(Tensor, Tensor.detach, read_batch("verify_gradients", batch))
    own, other = (list(column) for column in zip(*named.values(), strict=True))
    forms = _Form(reference, loss_fn, own), _Form(candidate, loss_fn, other)
    modules = [*forms[0].modules, *forms[1].modules]
    with preserved_random_state(), torch.enable_grad(), without_gradients([*own, *other]):
        given = forms[1].gradient(batch, seed)[1]
        try:
            with _in_double(modules):
                wide = tree_map_only(Tensor, widened, batch)
                return _compare(list(named), forms, wide, seed, given=given)
        except Exception as error:
            why = f"Not in float64: {type(error).__name__}: {str(error).strip():.200}"
        return _compare(list(named), forms, batch, seed, given=given, narrow=why)


def _paired(
    reference: nn.Module, candidate: nn.Module, loss_fn: Any
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """The trained parameters of both, by the names of the reference."""
    for form in (reference, candidate):
        if not isinstance(form, nn.Module):
            raise TypeError(
                "verify_gradients: expected two modules, reference and candidate, got "
                f"{type(form).__name__}; put a function of a model into the forward of a module"
            )
    own, other = _trained(reference), _trained(candidate)
    names = {p: name for name, p in own.items()}
    other = {names.get(p, name): p for name, p in other.items()}
    if not own or (strange := own.keys() ^ other.keys()):
        raise ValueError(
            "verify_gradients: expected two forms of one model, with parameters of the same names "
            f"that require gradients, got {', '.join(sorted(strange)) if own else 'none'} "
            "in one of them only; rename them, or let the candidate hold the reference's own"
        )
    if changed := [n for n, p in own.items() if not _equal(p, other[n])]:
        raise ValueError(
            f"verify_gradients: the values of {', '.join(changed)} differ between the two; "
            "candidate.load_state_dict(reference.state_dict())"
        )
    if isinstance(loss_fn, nn.Module):
        own |= {f"loss_fn.{n}": p for n, p in _trained(loss_fn).items() if p not in names}
    return {name: (p, other.get(name, p)) for name, p in own.items()}


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    named = module.named_parameters()
    return {name.replace("_orig_mod.", ""): p for name, p in named if p.requires_grad}


def _equal(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(widened(a), widened(b)))


@contextlib.contextmanager
def _in_double(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Parameters and buffers in double precision, in place: a copy would lose what is compiled."""
    held = [t for m in modules for t in (*m._parameters.values(), *m._buffers.values())]
    before = [(t, t.data) for t in dict.fromkeys(held) if t is not None]
    try:
        for tensor, value in before:
            tensor.data = widened(value)
        yield
    finally:
        for tensor, value in before:
            tensor.data = value


def _compare(
    names: list[str],
    forms: tuple[_Form, _Form],
    batch: Any,
    seed: int,
    *,
    given: Gradient,
    narrow: str = "",
) -> GradientReport:
    """Both forms as they are now: where their gradients differ, and which of them is wrong.

    `given` is the candidate's gradient as it runs, `narrow` says why they are not in float64.
    """
    rtol, precision, notes = 1e-5, "float64", list[str]()
    if narrow:
        rtol, precision, notes = 1e-2, "the given precision", [narrow]
    runs = [form.gradient(batch, seed) for form in forms]
    losses, gradients = (runs[0][0], runs[1][0]), (runs[0][1], runs[1][1])
    same = abs(losses[0] - losses[1]) <= rtol * abs(losses[0])
    if not same:
        notes.append(
            f"The losses differ, {losses[0]:.6g} and {losses[1]:.6g}: the two compute different "
            "functions, or draw different random numbers. Each was judged by its own loss."
        )
    small = _SMALL * max(map(norm_of, gradients)) or 1.0
    generator, wrong, referee = torch.Generator().manual_seed(seed), set[str](), [0.0, 0.0]

    def refuted(only: int | None = None) -> str:
        """Which forms have another slope than their loss, along a direction in a parameter or all.

        How far off they are is kept.
        """
        direction = [torch.zeros_like(g) for g in gradients[0]]
        for i in range(len(names)) if only is None else [only]:
            v = torch.randn(direction[i].shape, dtype=direction[i].dtype, generator=generator)
            direction[i] = v.to(direction[i].device)
        where = slice(None) if only is None else slice(only, only + 1)
        size, found = sum(v.numel() for v in direction[where]) ** 0.5, list[str]()
        for i, (form, gradient) in enumerate(zip(forms, gradients, strict=True)):
            slope, doubt = form.slope(batch, seed, direction)
            pairs = zip(gradient, direction, strict=True)
            dot = sum(float((g.conj() * v).sum().real) for g, v in pairs)
            scale = max(norm_of(gradient[where]) * norm_of(direction) / size, small)
            referee[i] = max(referee[i], abs(dot - slope) / scale)
            if not abs(dot - slope) <= rtol * scale + 10 * doubt:
                found.append(_FORMS[i])
        wrong.update(found)
        undecided = "undecided" if same else "each right for its own loss"
        return f"{' and '.join(found)} wrong" if found else f"differs, {undecided}"

    for _ in range(_DIRECTIONS):
        refuted()
    parameters = dict[str, Difference]()
    norms = [(norm_of([a]), norm_of([a - b])) for a, b in zip(*gradients, strict=True)]
    errors = [difference / max(norm, small) for norm, difference in norms]
    for rank, i in enumerate(sorted(range(len(names)), key=lambda i: -errors[i])):
        verdict = ""
        if not errors[i] <= rtol:
            verdict = refuted(i) if rank < _JUDGED else "differs"
            absent = [form for form, run in zip(_FORMS, runs, strict=True) if run[2][i]]
            verdict += f", no gradient in the {absent[0]}" if absent else ""
        parameters[names[i]] = Difference(norms[i][0], errors[i], verdict)
    return GradientReport(
        tuple(form for form in _FORMS if form in wrong),
        parameters,
        losses,
        (referee[0], referee[1]),
        relative_error(given, gradients[0]),
        precision,
        tuple(notes),
    )
