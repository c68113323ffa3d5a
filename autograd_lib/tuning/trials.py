"""Training steps on copies of a model, each run as its settings say: gradient, error, peak.

The model itself never runs here. Its copies share nothing with it, and a copy is shared by the
settings that differ in precision and micro-batch alone.
"""

from __future__ import annotations

import contextlib
import copy
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.module_tracker import ModuleTracker

from autograd_lib.checkpointing.measure import leaves_of
from autograd_lib.config.records import Settings
from autograd_lib.core.batches import Piece, batch_size
from autograd_lib.core.snapshot import ModuleState, drop_gradients, seed_all
from autograd_lib.memory import peak_bytes, saved_tensors
from autograd_lib.training.step import ForwardBackward, micro_batches

Gradient = list[Tensor | None]  # one for each parameter

_SMALLEST_SCALE = 2.0**-24  # of the loss in fp16; below it even a gradient of 1 is rounded away
_ROUNDING = 1e-10  # relative, of a float64 gradient that atomic additions sum in any order


@dataclass(frozen=True)
class Trial:
    """What was found out about one candidate; what was not measured is None.

    Attributes:
        settings: The candidate.
        time: Seconds of one step, forward and backward of the whole batch.
        peak_bytes: Peak of the step above what stood before it, as `peak_bytes` measures it.
        gradient_error: Relative L2 error of the gradient, over all parameters, against float64,
            with the probability of dropout at 0.
        verdict: Why it is the best, or what it fell short in.
    """

    settings: Settings
    time: float | None = None
    peak_bytes: int | None = None
    gradient_error: float | None = None
    verdict: str = ""


class Copy:
    """A copy of model and loss function, and their parameters, shared ones once."""

    def __init__(self, model: nn.Module, loss_fn: Callable[..., Tensor]) -> None:
        try:
            # Together, for a loss that holds a parameter of the model.
            self.model, self.loss_fn = copy.deepcopy((model, loss_fn))
        except Exception as err:
            err.add_note("autotune: candidates run on copies, and copy.deepcopy of the model fails")
            raise
        self.modules = [m for m in (self.model, self.loss_fn) if isinstance(m, nn.Module)]
        self.parameters = list(dict.fromkeys(p for m in self.modules for p in m.parameters()))

    def keep_state(self) -> None:
        """Note the buffers with which each gradient begins."""
        self.state = ModuleState(m for root in self.modules for m in root.modules())

    def run(self, precision: str) -> ForwardBackward:
        """The training step, without its optimizer."""
        device = self.parameters[0].device
        return ForwardBackward("autotune", self.model, self.loss_fn, precision, device)

    def take_gradient(self) -> Gradient:
        """Return the gradients and leave None behind."""
        taken = [p.grad for p in self.parameters]
        drop_gradients(self.parameters)
        return taken


class Workbench:
    """A model, a loss function and a batch, and the copies on which settings are tried."""

    def __init__(
        self,
        model: nn.Module,
        batch: tuple[Any, Any],
        loss_fn: Callable[..., Tensor],
        count: Callable[[Any], float | Tensor] | None,
    ) -> None:
        self.model, self.loss_fn, self.count = model, loss_fn, count
        # Detached, or backward would leave gradients on inputs that require them.
        self.batch = tree_map_only(Tensor, Tensor.detach, batch)
        self.size = batch_size("autotune", self.batch)
        self.device = next(p.device for p in model.parameters() if p.requires_grad)
        self.scale = 2.0**16  # of the loss in fp16, where GradScaler begins
        self.copies: dict[Settings, Copy] = {}
        self.reference: Gradient = []

    # Steps

    def copy_for(self, settings: Settings) -> Copy:
        """The copy on which `settings` run."""
        key = replace(settings, precision="fp32", micro_batch=None)
        if key not in self.copies:
            made = Copy(self.model, self.loss_fn)
            key.apply(made.model)
            made.keep_state()
            self.copies[key] = made
        return self.copies[key]

    def keep(self, settings: Sequence[Settings]) -> None:
        """Give up the copies that none of `settings` runs on."""
        wanted = {replace(s, precision="fp32", micro_batch=None) for s in settings}
        self.copies = {key: made for key, made in self.copies.items() if key in wanted}

    def forget(self) -> None:
        """Drop the gradients that a step left behind by failing."""
        for made in self.copies.values():
            drop_gradients(made.parameters)

    def step(self, settings: Settings) -> Callable[[], None]:
        """One forward and backward of the whole batch, which begins and ends without gradients."""
        made, pieces = self.copy_for(settings), self.pieces(settings)
        run, scaled = made.run(settings.precision), self.scaled(settings)

        def step() -> None:
            run(pieces, scaled)
            drop_gradients(made.parameters)

        return step

    def loss(self, settings: Settings) -> Callable[[], Tensor]:
        """The forward of the first micro-batch, to plan checkpoints by."""
        run, piece = self.copy_for(settings).run(settings.precision), self.pieces(settings)[0]
        scaled = self.scaled(settings) or (lambda loss: loss)
        return lambda: scaled(run.forward(piece)[1] * piece.share)

    def pieces(self, settings: Settings) -> list[Piece]:
        return micro_batches("autotune", self.batch, settings.micro_batch, self.count)

    def scaled(self, settings: Settings) -> Callable[[Tensor], Tensor] | None:
        """Scales a loss in fp16 alone, as a `GradScaler` does."""
        scale = self.scale
        return (lambda loss: loss * scale) if settings.precision == "fp16" else None

    # Deterministic quantities

    def gradient(self, settings: Settings) -> Gradient:
        """The gradient of the batch, without dropout; in fp16 as a GradScaler arrives at it."""
        made, pieces = self.copy_for(settings), self.pieces(settings)
        run = made.run(settings.precision)
        with _without_dropout(made.modules):
            while True:
                made.state.restore_buffers()
                loss = run(pieces, self.scaled(settings))
                found = made.take_gradient()
                if settings.precision != "fp16":
                    return found
                if _is_finite(found) or not loss.isfinite() or self.scale <= _SMALLEST_SCALE:
                    return [None if g is None else g / self.scale for g in found]
                self.scale /= 2

    def error(self, settings: Settings) -> float:
        """Relative L2 error of the gradient, over all parameters, against float64."""
        return relative_error(self.gradient(settings), self.reference)

    def peak(self, settings: Settings) -> int:
        """Peak bytes of a step, above what stood before it."""
        with warnings.catch_warnings():
            # Caches that the model itself renews are freed by one step and made by the next.
            warnings.simplefilter("ignore", UserWarning)
            return peak_bytes(self.step(settings))

    def seconds(self, settings: Settings) -> float:
        """Seconds of one step, as the clock on the wall has it."""
        step = self.step(settings)
        self._synchronize()
        start = time.perf_counter()
        step()
        self._synchronize()
        return time.perf_counter() - start

    def _synchronize(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def measure_reference(self) -> float | None:
        """Set the float64 gradient; return how far that of two micro-batches is from it.

        None for a batch that cannot be divided.
        """
        made = Copy(self.model, self.loss_fn)
        for module in made.modules:
            module.double()
        made.keep_state()
        run = made.run("fp32")
        batch = tree_map_only(Tensor, _doubled, self.batch)
        versions = [t._version for t in tree_leaves(batch) if isinstance(t, Tensor)]

        def gradient(size: int | None, seed: int) -> Gradient:
            seed_all(seed)
            made.state.restore_buffers()
            run(micro_batches("autotune", batch, size, self.count))
            return made.take_gradient()

        with _without_dropout(made.modules):
            try:
                _check_loss(
                    made, run.forward(micro_batches("autotune", batch, None, self.count)[0])[1]
                )
                self.reference = gradient(None, 0)
            except RuntimeError as err:
                err.add_note("autotune: raised by the reference, where model and batch are float64")
                raise
            _check_gradient(self.reference)
            if versions != [t._version for t in tree_leaves(batch) if isinstance(t, Tensor)]:
                raise ValueError(
                    "autotune: the step writes into its batch, which then differs from one run to "
                    "the next; let the model work on a copy of its input"
                )
            if relative_error(gradient(None, 1), self.reference) > _ROUNDING:
                raise ValueError(_random(lambda: gradient(None, 2)))
            if self.size == 1:
                return None
            return relative_error(gradient(-(-self.size // 2), 0), self.reference)

    def saved_by_module(self) -> dict[str, int]:
        """Bytes that the forward saves, by the module that saves them."""
        made = self.copy_for(Settings())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of what it cannot see
            with saved_tensors(made.model) as saved:
                made.run("fp32").forward(self.pieces(Settings())[0])
        return saved.by_module()


def relative_error(found: Gradient, reference: Gradient) -> float:
    """The L2 norm of the difference over that of the reference; no gradient is a zero one."""
    difference = norm = 0.0
    for a, b in zip(found, reference, strict=True):
        if b is not None:
            norm += float(_dense(b).square().sum())
        if a is not None or b is not None:
            difference += float(_difference(a, b).square().sum())
    return float((difference / norm) ** 0.5)


def _dense(gradient: Tensor) -> Tensor:
    return (gradient.to_dense() if gradient.is_sparse else gradient).double()


def _difference(a: Tensor | None, b: Tensor | None) -> Tensor:
    present = [_dense(g) for g in (a, b) if g is not None]
    return present[0] if len(present) == 1 else present[0] - present[1]


def _is_finite(gradient: Gradient) -> bool:
    values = [g._values() if g.is_sparse else g for g in gradient if g is not None]
    return all(bool(v.isfinite().all()) for v in values)


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _check_loss(made: Copy, loss: Tensor) -> None:
    if not loss.requires_grad:
        raise ValueError(
            "autotune: expected loss_fn(output, targets) to return a loss that requires a "
            "gradient, got one that is detached; return what backward() can be called on"
        )
    own = set(made.parameters)
    if strange := [leaf for leaf in leaves_of(loss) if leaf not in own]:
        raise ValueError(
            f"autotune: the loss depends on a tensor of shape {tuple(strange[0].shape)} that is no "
            "parameter of the copies that are tried; loss_fn, or a hook, holds it: make loss_fn an "
            "nn.Module that has it as its attribute"
        )


def _check_gradient(reference: Gradient) -> None:
    if not _is_finite(reference):
        raise ValueError(
            "autotune: the gradient is not finite even in float64; find_nonfinite(model, step) "
            "says where it comes from"
        )
    if not any(g is not None and g.abs().sum() > 0 for g in reference):
        raise ValueError(
            "autotune: the gradient is zero for every parameter, so no error can be relative to "
            "it; pass a batch and a model that learn from each other"
        )


@contextlib.contextmanager
def _without_dropout(roots: Sequence[nn.Module]) -> Iterator[None]:
    """Set the probability of dropout to zero, where modules have one."""
    names = {nn.modules.dropout._DropoutNd: "p", nn.MultiheadAttention: "dropout"}
    names[nn.RNNBase] = "dropout"
    before = []
    for module in dict.fromkeys(m for root in roots for m in root.modules()):
        for kind, name in names.items():
            if isinstance(module, kind):
                before.append((module, name, getattr(module, name)))
                setattr(module, name, 0.0)
    try:
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


class _RandomOperations(TorchDispatchMode):
    """Notes which operations draw random numbers, and in which module."""

    def __init__(self, tracker: ModuleTracker) -> None:
        super().__init__()
        self.tracker, self.found = tracker, dict[str, None]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            inside = max(self.tracker.parents - {"Global"}, key=len, default="")
            name = inside.partition(".")[2]
            self.found[f"{func}" + (f" in module {name!r}" if name else "")] = None
        return func(*args, **kwargs or {})


def _random(step: Callable[[], object]) -> str:
    """Say what is still random in a step."""
    with ModuleTracker() as tracker, _RandomOperations(tracker) as operations:
        step()
    if operations.found:
        what = f"random numbers are drawn by {', '.join(list(operations.found)[:3])}"
    else:
        what = (
            "no operation of PyTorch draws random numbers, so look for Python's or NumPy's, "
            "generators of your own, or state that a forward leaves behind"
        )
    return (
        "autotune: two runs of one batch have different gradients even with the probability of "
        f"every dropout module at 0, so the error of a candidate cannot be measured; {what}. "
        "Tune a model built without it, or in eval mode"
    )
