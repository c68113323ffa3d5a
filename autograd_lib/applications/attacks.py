"""Adversarial examples: the worst inputs within a distance, the nearest wrong ones, and masking."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autograd_lib.core.snapshot import ModuleState, own_generators, torch_generators
from autograd_lib.functions.forward_mode import check_floating
from autograd_lib.report.tables import Table

__all__ = ["Attack", "MaskingReport", "attack", "masking_report", "minimal_perturbation"]

_FAR = 1000  # a distance at which every classifier can be fooled, in units of inputs and of eps


@dataclass(frozen=True, repr=False)
class Attack:
    """Inputs that an attack found, one for each input that it was given.

    Attributes:
        inputs: the best of all iterates: those that fool the model, or come nearest to it.
        success: where the model is wrong, or has reached the target.
        margin: the logit of the true class minus the largest other one; below 0 is wrong.
        distance: from the input in the norm of the attack; 0 where the model was wrong before.
        zero_gradients: where the gradient was exactly zero at an iterate without success.
    """

    inputs: Tensor
    success: Tensor
    margin: Tensor
    distance: Tensor
    zero_gradients: Tensor

    def __repr__(self) -> str:
        found = int(self.success.sum())
        zero = int(self.zero_gradients.sum())
        return f"Attack({found} of {len(self.success)} succeed, {zero} with zero gradients)"


@dataclass(frozen=True, repr=False)
class MaskingReport(Table):
    """Whether gradients tell the truth about a model: rates of success of several attacks.

    Attributes:
        fgsm: of one step of the whole size (Goodfellow, Shlens & Szegedy 2015).
        pgd: of 20 steps along the gradient of the margin.
        random: of the best of 20 random corners of the same distance, without any gradient.
        unbounded: of an attack at a very large distance, which must be 1.
        zero_gradients: the share of inputs at which cross-entropy has a gradient of exactly zero.
        scale_sensitive: whether attacks on cross-entropy find less than those on the margin.
        masked: whether any of these contradicts the gradient.
        notes: a sentence for each of those that do.
    """

    fgsm: float
    pgd: float
    random: float
    unbounded: float
    zero_gradients: float
    scale_sensitive: bool
    masked: bool
    notes: list[str]

    def _table(self) -> tuple[str, list[str], list[list[str]]]:
        rates = ("fgsm", "pgd", "random", "unbounded", "zero_gradients")
        verdict = "gradients are masked" if self.masked else "no sign of masked gradients"
        return verdict, ["rate", "value"], [[n, f"{getattr(self, n):.3f}"] for n in rates]


def attack(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    norm: float = math.inf,
    steps: int = 20,
    step_size: float | None = None,
    restarts: int = 1,
    loss: str = "margin",
    bounds: tuple[float, float] | None = None,
    targets: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Attack:
    r"""Find inputs within `eps` of x that a classifier gets wrong, by projected gradient descent.

    $x_{k+1} = \Pi(x_k + \alpha s(\nabla_x \ell))$ with $s$ the sign or, for the 2-norm, the unit
    vector, and $\Pi$ the projection onto the ball and the bounds (Madry et al. 2018, "Towards deep
    learning models resistant to adversarial attacks"). The loss is by default the margin of the
    logits, whose gradient does not vanish where a model is sure of itself (Carlini & Wagner 2017);
    it is smoothed over the other classes in the first half of the steps. The best of all iterates
    is returned, that of the last step too.

    Args:
        model: maps inputs to logits (N, C). It is attacked in eval mode; its mode, buffers,
            gradients and the random state are left as they were.
        x: inputs of any shape, the first dimension N.
        y: the true classes, int64 (N,).
        eps: the largest distance, in units of x.
        norm: `math.inf` or 2.
        steps: how many, at least 1.
        step_size: $\alpha$ in units of x; `2.5 * eps / steps` if None.
        restarts: how many starts, the first of them at x, the others at random in the ball.
        loss: "margin" or "cross_entropy".
        bounds: the least and the largest value that an input may have.
        targets: classes to reach, int64 (N,). Success then means that the target is the largest.
        generator: for the random starts; None is a private one with seed 0.

    Returns:
        An `Attack`. No input is farther away than `eps` or outside the bounds.

    Raises:
        TypeError: if x is not floating point.
        ValueError: if x is outside the bounds, an option is unknown or too small, or the model
            returns no logits (N, C).

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> x, y = torch.tensor([[1.0, 0.0], [3.0, 0.0]]), torch.tensor([0, 0])
        >>> found = attack(model, x, y, eps=0.75)  # the margin is x[0] - x[1]
        >>> found.success.tolist(), found.margin.tolist()
        ([True, False], [-0.5, 1.5])
    """
    _check(x, y, eps, bounds, norm=norm in (2, math.inf), steps=steps >= 1, restarts=restarts >= 1)
    if loss not in ("margin", "cross_entropy"):
        raise ValueError(f"attack: expected loss to be 'margin' or 'cross_entropy', got {loss!r}")
    length = 2.5 * eps / steps if step_size is None else step_size
    generator = generator or torch.Generator(x.device).manual_seed(0)
    x = x.detach()
    with _attacked(model):
        best, ball = _Best(x, y, targets, norm), _Ball(x, eps, norm, bounds)
        for restart in range(restarts):
            point = ball.inside(x + _random(x, eps, norm, generator)) if restart else x
            for k in range(steps):
                point = point.detach().requires_grad_()
                logits = _logits(model, point, y)
                gap = _margin(logits, y, targets)
                value = -gap
                if loss == "cross_entropy":
                    value = F.softplus(-_margin(logits, y, targets, smooth=True))
                elif 2 * k < steps:  # all other classes first, then the largest one alone
                    value = -_margin(logits, y, targets, smooth=True)
                (gradient,) = torch.autograd.grad(value.sum(), point)
                best.see(point.detach(), logits.detach(), gap.detach(), gradient)
                point = ball.inside(point.detach() + length * _direction(gradient, norm))
            with torch.no_grad():
                logits = _logits(model, point, y)
                best.see(point, logits, _margin(logits, y, targets))
    return best.attack()


def minimal_perturbation(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    steps: int = 100,
    bounds: tuple[float, float] | None = None,
) -> Attack:
    r"""Find wrongly classified inputs that are as near to x as possible in the 2-norm.

    Direction and distance are decoupled: each step follows the gradient of the margin on a sphere
    around x, whose radius shrinks by 5 % after a success and grows by 5 % after a failure (Rony et
    al. 2019, "Decoupling direction and norm for efficient gradient-based L2 adversarial attacks").
    The first radius is the distance to the boundary by linearization, and the last ones are halved
    between the nearest wrong point and x.

    Args:
        model: see `attack`.
        x: inputs of any shape, the first dimension N.
        y: the true classes, int64 (N,).
        steps: how many, at least 1.
        bounds: the least and the largest value that an input may have.

    Returns:
        An `Attack`; `distance` is the one that was found, an upper bound of the smallest, and NaN
        where none was.

    Raises:
        TypeError: if x is not floating point.
        ValueError: see `attack`.

    Example:
        >>> model = nn.Linear(2, 2, bias=False)
        >>> _ = model.weight.data.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        >>> found = minimal_perturbation(model, torch.tensor([[1.0, 0.0]]), torch.tensor([0]))
        >>> round(found.distance.item(), 3)  # margin / |w_0 - w_1| = 1 / sqrt(2)
        0.707
    """
    _check(x, y, 0.0, bounds, steps=steps >= 1)
    x, sizes = x.detach(), (-1, *[1] * (x.dim() - 1))
    with _attacked(model):
        best, ball = _Best(x, y, None, 2.0, nearest=True), _Ball(x, math.inf, 2, bounds)
        delta, radius = torch.zeros_like(x), None
        for k in range(steps):
            point = ball.inside(x + delta).requires_grad_()
            logits = _logits(model, point, y)
            margin = _margin(logits, y, None)
            (gradient,) = torch.autograd.grad(-margin.sum(), point)
            point, margin = point.detach(), margin.detach()
            best.see(point, logits.detach(), margin, gradient)
            if radius is None:
                first = (margin.abs() / gradient.flatten(1).norm(dim=1).clamp(min=1e-30)).clamp(
                    min=1e-12
                )
                radius = first
            else:
                radius = radius * torch.where(margin < 0, 0.95, 1 / 0.95)
            length = first * (0.01 + 0.99 * (1 + math.cos(math.pi * k / steps)) / 2)
            delta = point - x + length.reshape(sizes) * _direction(gradient, 2)
            delta = _direction(delta, 2) * radius.reshape(sizes)
        with torch.no_grad():
            wrong, right = best.inputs - x, torch.zeros_like(x)
            for _ in range(12):
                middle = (wrong + right) / 2
                logits = _logits(model, x + middle, y)
                gap = _margin(logits, y, None)
                fooled = (gap < 0).reshape(sizes)
                wrong, right = (
                    torch.where(fooled, middle, wrong),
                    torch.where(fooled, right, middle),
                )
                best.see(x + middle, logits, gap)
    return best.attack()


def masking_report(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    eps: float,
    *,
    norm: float = math.inf,
    bounds: tuple[float, float] | None = None,
) -> MaskingReport:
    """Say whether a model only hides its gradients, so that attacks on it mean little.

    The signs are those of Athalye, Carlini & Wagner 2018 ("Obfuscated gradients give a false sense
    of security") and Carlini et al. 2019 ("On evaluating adversarial robustness"): one step, or no
    gradient at all, does better than many steps; no distance is large enough; the loss has no
    gradient, or another scale of it finds more.

    Args:
        model: see `attack`.
        x: inputs of any shape, the first dimension N.
        y: the true classes, int64 (N,).
        eps: the distance that is asked about, in units of x.
        norm: `math.inf` or 2.
        bounds: the least and the largest value that an input may have.

    Returns:
        A `MaskingReport`, which prints as a table.

    Raises:
        TypeError: if x is not floating point.
        ValueError: see `attack`.

    Example:
        >>> class Stairs(nn.Module):
        ...     def forward(self, x):
        ...         return x.round()  # its gradient is zero everywhere
        >>> report = masking_report(Stairs(), torch.tensor([[1.0, 0.0]]), torch.tensor([0]), 0.6)
        >>> report.pgd, report.random, report.masked
        (0.0, 1.0, True)
    """
    options: dict[str, Any] = {"norm": norm, "bounds": bounds}
    pgd = attack(model, x, y, eps, **options)
    entropy = attack(model, x, y, eps, loss="cross_entropy", **options)
    far = _FAR * max(eps, x.abs().max().item())
    generator = torch.Generator(x.device).manual_seed(0)
    with _attacked(model), torch.no_grad():
        best, ball = _Best(x, y, None, norm), _Ball(x, eps, norm, bounds)
        for _ in range(20):
            noise = torch.randn(x.shape, generator=generator, dtype=x.dtype, device=x.device)
            point = ball.inside(x + eps * _direction(noise, norm))
            logits = _logits(model, point, y)
            best.see(point, logits, _margin(logits, y, None))
    rates = {
        "fgsm": attack(model, x, y, eps, steps=1, step_size=eps, **options).success,
        "pgd": pgd.success,
        "random": best.attack().success,
        "unbounded": attack(model, x, y, far, **options).success,
        "zero_gradients": entropy.zero_gradients,
    }
    found = {name: rate.float().mean().item() for name, rate in rates.items()}
    less = entropy.success.float().mean().item()
    slack = max(0.02, 1 / len(x))  # two attacks on an honest model differ by less
    scale_sensitive = less < found["pgd"] - slack
    signs = {
        "one step does better than many": found["fgsm"] > found["pgd"] + slack,
        "random corners do better than the gradient": found["random"] > found["pgd"] + slack,
        f"even at a distance of {far:g} some inputs resist": found["unbounded"] < 1,
        "cross-entropy has gradients of exactly zero; attack the margin": (
            found["zero_gradients"] > 0
        ),
        f"cross-entropy finds {less:.3f} only, so the scale of the logits hides some; attack the "
        "margin": scale_sensitive,
    }
    notes = [sign for sign, seen in signs.items() if seen]
    return MaskingReport(**found, scale_sensitive=scale_sensitive, masked=bool(notes), notes=notes)


class _Best:
    """The best iterate of each input: that of the lowest margin, or the nearest wrong one.

    An attack shows it x itself first, which is best wherever the model is wrong about it.
    """

    def __init__(
        self, x: Tensor, y: Tensor, targets: Tensor | None, norm: float, nearest: bool = False
    ) -> None:
        self.x, self.y, self.targets, self.norm, self.nearest = x, y, targets, norm, nearest
        self.inputs = x.clone()
        self.zero = torch.zeros_like(y, dtype=torch.bool)
        self.score: Tensor | None = None

    def see(
        self, point: Tensor, logits: Tensor, gap: Tensor, gradient: Tensor | None = None
    ) -> None:
        margin, score = gap if self.targets is None else _margin(logits, self.y, None), gap
        if self.nearest:  # what is right has a score above 0
            wrong = -1 / (1 + _size(point - self.x, self.norm))
            score = torch.where(gap < 0, wrong, gap)
        if self.score is None:
            self.score = torch.where(gap < 0, -torch.inf, score)
            self.gap, self.margin = gap, margin
        better = score < self.score
        chosen = better.reshape(-1, *[1] * (point.dim() - 1))
        self.inputs = torch.where(chosen, point, self.inputs)
        self.score = torch.where(better, score, self.score)
        self.gap, self.margin = (
            torch.where(better, new, old) for new, old in ((gap, self.gap), (margin, self.margin))
        )
        if gradient is not None:
            self.zero |= (gradient.flatten(1) == 0).all(1) & (gap >= 0)

    def attack(self) -> Attack:
        distance = _size(self.inputs - self.x, self.norm)
        if self.nearest:
            distance = torch.where(self.gap < 0, distance, torch.nan)
        return Attack(self.inputs, self.gap < 0, self.margin, distance, self.zero)


def _margin(logits: Tensor, y: Tensor, targets: Tensor | None, smooth: bool = False) -> Tensor:
    """The logit of y minus the largest other one, or the largest other one minus the target's.

    `smooth` takes the logarithm of the sum of their exponentials for the largest one, and has the
    gradient of cross-entropy, up to a positive factor that does not vanish.
    """
    label = (y if targets is None else targets)[:, None]
    others = logits.scatter(1, label, -torch.inf)
    gap = logits.gather(1, label)[:, 0] - (others.logsumexp(1) if smooth else others.amax(1))
    return gap if targets is None else -gap


def _logits(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    logits = model(x)
    if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(y):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"attack: expected the model to return logits of the shape ({len(y)}, classes), got "
            f"{got}; wrap it in a module that does"
        )
    return logits


def _size(delta: Tensor, norm: float) -> Tensor:
    return torch.linalg.vector_norm(delta.flatten(1), norm, dim=1)


def _direction(gradient: Tensor, norm: float) -> Tensor:
    """The step of length 1 in the norm that raises the loss most, 0 where there is none."""
    if norm == math.inf:
        return gradient.sign()
    flat = gradient.flatten(1)
    flat = flat / flat.abs().amax(1, keepdim=True).clamp(min=torch.finfo(flat.dtype).tiny)
    return F.normalize(flat, dim=1).reshape(gradient.shape)


class _Ball:
    """The inputs within eps of x and within the bounds."""

    def __init__(
        self, x: Tensor, eps: float, norm: float, bounds: tuple[float, float] | None
    ) -> None:
        self.x, self.eps, self.norm = x, eps, norm
        self.bounds: Any = bounds
        if norm == math.inf:
            low, high = x - eps, x + eps
            # What rounding puts beyond eps comes back.
            low = torch.where(x - low > eps, low.nextafter(x), low)
            high = torch.where(high - x > eps, high.nextafter(x), high)
            self.bounds = [edge.clamp(*bounds) if bounds else edge for edge in (low, high)]

    def inside(self, point: Tensor) -> Tensor:
        """Project onto the ball."""
        if self.norm == 2 and self.eps < math.inf:
            sizes = (-1, *[1] * (point.dim() - 1))
            size = _size(point - self.x, 2).clamp(min=self.eps or 1.0).reshape(sizes)
            point = self.x + (point - self.x) * (self.eps / size)
            while (far := _size(point - self.x, 2) > self.eps).any():
                point = torch.where(far.reshape(sizes), point.nextafter(self.x), point)
        return point if self.bounds is None else torch.clamp(point, *self.bounds)


def _random(x: Tensor, eps: float, norm: float, generator: torch.Generator) -> Tensor:
    """A point of the ball, uniformly."""
    options: dict[str, Any] = {"generator": generator, "dtype": x.dtype, "device": x.device}
    if norm == math.inf:
        return eps * (2 * torch.rand(x.shape, **options) - 1)
    share = torch.rand(len(x), *[1] * (x.dim() - 1), **options) ** (1 / max(x[0].numel(), 1))
    return eps * share * _direction(torch.randn(x.shape, **options), norm)


def _check(x: Any, y: Any, eps: float, bounds: tuple[float, float] | None, **known: bool) -> None:
    check_floating("attack", x)
    if not isinstance(y, Tensor) or y.dtype != torch.int64 or y.shape != x.shape[:1]:
        got = f"{y.dtype} {tuple(y.shape)}" if isinstance(y, Tensor) else type(y).__name__
        raise ValueError(f"attack: expected y to be int64 of the shape ({len(x)},), got {got}")
    if bounds is not None and not (bounds[0] <= x.min() and x.max() <= bounds[1]):
        raise ValueError(
            f"attack: expected x within the bounds {bounds}, got {x.min():g} to {x.max():g}; give "
            "the bounds in the units of x, as after a normalization, or none"
        )
    for name, fits in (("eps", eps >= 0), *known.items()):
        if not fits:
            expected = {"norm": "math.inf or 2", "eps": "0 or more"}.get(name, "1 or more")
            raise ValueError(f"attack: expected {name} to be {expected}")


@contextlib.contextmanager
def _attacked(model: nn.Module) -> Iterator[None]:
    """Put the model into eval mode; afterwards its modes, buffers and random states come back."""
    modules = list(model.modules())
    modes = [(module, module.training) for module in modules]
    own = [generator for module in modules for generator in own_generators(module)]
    state = ModuleState(modules, generators=[*torch_generators(), *own])
    needed = [(p, p.requires_grad) for p in model.parameters()]
    model.eval()
    try:
        for p, _ in needed:  # backward then passes the parameters by
            p.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for p, requires_grad in needed:
            p.requires_grad_(requires_grad)
        for module, training in modes:
            module.training = training
        state.restore()
