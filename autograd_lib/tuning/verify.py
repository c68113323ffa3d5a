"""Two forms of one model held against each other: gradients, and finite differences as referee."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autograd_lib.core import snapshot
from autograd_lib.core.batches import Piece
from autograd_lib.core.names import parameters_by_name
from autograd_lib.report.tables import Row, Table
from autograd_lib.training.step import ForwardBackward, micro_batches

__all__ = ["GradientReport", "verify_gradients"]

_DIRECTIONS = 2  # random ones, over all parameters
_JUDGED = 8  # parameters that differ the most have a direction of their own
_STEPS = [10.0**-k for k in range(2, 8)]  # of finite differences, relative to the parameters
_SMALL = 1e-3  # of the whole gradient: what is smaller may differ by as much as that may


def widened(tensor: Tensor) -> Tensor:
    """A copy in double precision; of integers a copy."""
    dtype = torch.float64 if tensor.is_floating_point() else tensor.dtype
    wide = torch.complex128 if tensor.is_complex() else dtype
    return tensor.detach().to(wide, copy=True)


def together(*modules: object) -> nn.ModuleList:
    """One module of those that are modules: a loss function may be none."""
    return nn.ModuleList(module for module in modules if isinstance(module, nn.Module))


def real(tensor: Tensor) -> Tensor:
    """The same memory as real numbers, two for a complex one."""
    return torch.view_as_real(tensor.data) if tensor.is_complex() else tensor.data


def gradient_of(parameters: Sequence[Tensor]) -> Tensor:
    """Take `.grad` away: a vector in double precision, with zeros where there is none."""
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.to_dense() for p in parameters]
    snapshot.drop_gradients(parameters)
    wide = partial(torch.Tensor.to, device=grads[0].device, dtype=torch.float64)
    return torch.cat([wide(real(grad.resolve_conj()).flatten()) for grad in grads])


def relative_error(found: Tensor, reference: Tensor) -> float:
    """The L2 norm of the difference over that of the reference."""
    return float((found - reference).norm() / reference.norm())


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
            relative to the gradient: the largest over random directions; NaN if none decides.
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
        """Whether the gradients agree, and finite differences refute neither."""
        return not self.wrong and not any(found.verdict for found in self.parameters.values())

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

    def __init__(
        self, name: str, model: nn.Module, loss_fn: Any, parameters: list[nn.Parameter], seed: int
    ) -> None:
        self.name, self.parameters, self.seed = name, parameters, seed
        self.modules = list(together(model, loss_fn).modules())
        self.run = ForwardBackward("verify_gradients", model, loss_fn, "fp32", parameters[0].device)
        ends = itertools.accumulate((real(p).numel() for p in parameters), initial=0)
        self.places = [slice(*pair) for pair in itertools.pairwise(ends)]  # in the gradient
        self.wrong, self.referee = False, math.nan

    @contextlib.contextmanager
    def undone(self) -> Iterator[None]:
        """Run a block from the seed; put back what it changes."""
        state = snapshot.ModuleState(self.modules, self.parameters)
        snapshot.seed_all(self.seed)
        try:
            yield
        finally:
            snapshot.drop_gradients(self.parameters)
            state.restore()

    def measure(self, pieces: list[Piece]) -> None:
        """Set loss, gradient, and of which parameters `.grad` is None."""
        self.pieces = pieces
        with self.undone():
            loss = self.run(pieces)
            self.loss, self.rounding = float(loss), float(torch.finfo(loss.dtype).eps * loss.abs())
            self.absent = [p.grad is None for p in self.parameters]
            self.gradient = gradient_of(self.parameters)

    def moved(self, way: Tensor) -> float:
        """The loss at other parameters, `way` from the present ones."""
        with self.undone():
            for p, place in zip(map(real, self.parameters), self.places, strict=True):
                p.add_(way[place].view_as(p).to(p.device))
            # With a graph, as without one compiled code may draw other random numbers.
            return float(self.run.forward(self.pieces[0])[1].detach())

    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and bool(self.gradient.isfinite().all())

    def slope(self, direction: Tensor, scale: float) -> tuple[float, float]:
        """Derivative of the loss along a unit vector by finite differences, and its doubt.

        Of several steps, multiples of `scale`, those two count that agree best, in slope and
        curvature: the loss may be rounded, or have kinks and jumps. What rounding makes of it shows
        at the smallest steps, where the loss is a straight line.
        """
        unit = scale * float(nn.utils.get_total_norm([p.detach() for p in self.parameters]))
        steps = [unit * step for step in _STEPS]
        ends = [[self.moved(h * direction) for h in (step, -step)] for step in steps]
        bends = [a + b - 2 * self.loss for a, b in ends]
        noise = max(map(abs, bends[-3:])) + self.rounding
        slopes = [(a - b) / (2 * h) for h, (a, b) in zip(steps, ends, strict=True)]
        pairs = zip(itertools.pairwise(slopes), itertools.pairwise(bends), steps[1:], strict=True)
        found = [(b, abs(a - b) + (abs(d - c / 100) + noise) / h) for (a, b), (c, d), h in pairs]
        return min(found, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])

    def draws(self) -> bool:
        """Whether another seed gives another gradient."""
        before, self.seed = self.gradient, self.seed + 1
        self.measure(self.pieces)
        return not torch.allclose(self.gradient, before, rtol=1e-6)

    def agrees(self, direction: Tensor, norm: float, rtol: float) -> bool | None:
        """Whether the gradient is the slope of the loss along a unit vector; None if undecided."""
        for scale in (1.0, 3.0):  # beside a jump slopes agree by chance, but hardly twice
            slope, doubt = self.slope(direction, scale)
            off = abs(float(self.gradient @ direction) - slope)
            if not 10 * doubt <= max(norm, abs(slope)):  # NaN is not
                return None
            if right := off <= rtol * norm + 10 * doubt:
                break
        self.referee = max(off / norm, self.referee)  # in this order, as it begins as NaN
        self.wrong |= not right
        return right


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
    pieces = micro_batches("verify_gradients", batch, None, None)
    pieces = tree_map_only(Tensor, Tensor.detach, pieces)
    own, other = (list(column) for column in zip(*named.values(), strict=True))
    forms = (
        _Form("reference", reference, loss_fn, own, seed),
        _Form("candidate", candidate, loss_fn, other, seed),
    )
    kept = snapshot.without_gradients([*own, *other])
    with snapshot.preserved_random_state(), torch.enable_grad(), kept:
        forms[1].measure(pieces)
        given = forms[1].gradient
        try:
            with _in_double(together(reference, candidate, loss_fn)):
                return _compare(list(named), forms, tree_map_only(Tensor, widened, pieces), given)
        except Exception as error:
            why = f"Not in float64: {type(error).__name__}: {str(error).strip():.200}"
        return _compare(list(named), forms, pieces, given, why)


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
    shared = [(n, p, other[n]) for n, p in own.items() if p is not other[n]]
    if changed := [n for n, a, b in shared if not torch.equal(widened(a), widened(b))]:
        raise ValueError(
            f"verify_gradients: the values of {', '.join(changed)} differ between the two; "
            "candidate.load_state_dict(reference.state_dict())"
        )
    if isinstance(loss_fn, nn.Module):
        own |= {f"loss_fn.{n}": p for n, p in _trained(loss_fn).items() if p not in names}
    return {name: (p, other.get(name, p)) for name, p in own.items()}


def _trained(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in parameters_by_name(module).items() if p.requires_grad}


@contextlib.contextmanager
def _in_double(module: nn.Module) -> Iterator[None]:
    """Parameters and buffers in double precision, in place: a copy would lose what is compiled."""
    before = [(t, t.data) for t in (*module.parameters(), *module.buffers())]
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
    pieces: list[Piece],
    given: Tensor,
    narrow: str = "",
) -> GradientReport:
    """Both forms as they are now: where their gradients differ, and which of them is wrong.

    `given` is the candidate's gradient as it runs, `narrow` says why they are not in float64.
    """
    rtol, notes = (1e-2, [narrow]) if narrow else (1e-5, [])
    for form in forms:
        form.measure(pieces)
    if broken := " and ".join(form.name for form in forms if not form.is_finite()):
        broken = f"loss or gradient of {broken} is not finite"
        if not narrow:
            raise FloatingPointError(broken)
        notes.append(f"As given, {broken}; find_nonfinite(model, step) says where that begins.")
    (exact, found), losses = (form.gradient for form in forms), (forms[0].loss, forms[1].loss)
    precision = "the given precision" if narrow else "float64"
    same = abs(losses[0] - losses[1]) <= rtol * abs(losses[0])
    if not same and not broken:
        notes.append(
            f"The losses differ, {losses[0]:.6g} and {losses[1]:.6g}: the two compute different "
            "functions, or draw different random numbers. Each was judged by its own loss."
        )
    small = _SMALL * max(float(exact.norm()), float(found.norm())) or 1.0
    generator, undecided = torch.Generator().manual_seed(forms[0].seed), list[bool]()

    def judged(place: slice) -> str:
        """What gradients are by the slope of their loss along a direction within a parameter."""
        direction, answers = torch.zeros_like(exact), list[bool | None]()
        numel = direction[place].numel()
        direction[place].copy_(torch.randn(numel, dtype=torch.float64, generator=generator))
        direction /= direction.norm()
        for form in forms:
            norm = max(float(form.gradient[place].norm()), small) / numel**0.5
            answers.append(form.agrees(direction, norm, rtol))
        undecided.append(None in answers)
        if False in answers:
            wrong = (f.name for f, right in zip(forms, answers, strict=True) if right is False)
            return f"{' and '.join(wrong)} wrong"
        unclear = same or None in answers
        return f"differs, {'undecided' if unclear else 'each right for its own loss'}"

    for _ in range(_DIRECTIONS):
        judged(slice(None))
    places, parameters = forms[0].places, dict[str, Difference]()
    norms = [float(exact[place].norm()) for place in places]
    apart = [float((exact[place] - found[place]).norm()) for place in places]
    errors = [difference / max(norm, small) for difference, norm in zip(apart, norms, strict=True)]
    for rank, i in enumerate(sorted(range(len(names)), key=lambda i: -errors[i])):
        verdict = ""
        if not errors[i] <= rtol:
            verdict = "differs"
            if rank < _JUDGED:
                verdict = judged(places[i])
            absent = [form.name for form in forms if form.absent[i]]
            verdict += f", no gradient in the {absent[0]}" if absent else ""
        parameters[names[i]] = Difference(norms[i], errors[i], verdict)
    refuted_forms = tuple(form.name for form in forms if form.wrong)
    referee, as_it_runs = (forms[0].referee, forms[1].referee), relative_error(given, exact)
    if as_it_runs > rtol and not narrow and forms[1].draws():
        notes.append("as_it_runs may be due to other random numbers in float32 than in float64.")
    if any(undecided):
        why = "finite differences see the loss rounded, or jump, as where experts are chosen"
        notes.append(f"Not decided along {sum(undecided)} of {len(undecided)} directions: {why}.")
    return GradientReport(
        refuted_forms, parameters, losses, referee, as_it_runs, precision, tuple(notes)
    )
