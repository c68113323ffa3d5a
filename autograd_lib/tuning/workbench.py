"""Training steps on copies of a model, each run as its settings say: gradient, error, peak.

The model itself never runs here. Its copies share nothing with it. Settings that differ in
precision and micro-batch alone run on the same copy.
"""

from __future__ import annotations

import contextlib
import copy
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autograd_lib.benchmark import seconds_per_call
from autograd_lib.checkpointing.measure import leaves_of
from autograd_lib.config.records import Settings
from autograd_lib.core.batches import Piece, batch_size
from autograd_lib.core.snapshot import ModuleState, drop_gradients, seed_all
from autograd_lib.memory import peak_bytes, saved_tensors
from autograd_lib.training.step import ForwardBackward, micro_batches

Gradient = list[Tensor]  # float64, one for each parameter; zeros where there is none

_SMALLEST_SCALE = 2.0**-24  # of the loss in fp16; below it even a gradient of 1 is rounded away
_ROUNDING = 1e-10  # relative, of a float64 gradient that atomic additions sum in any order


class Copy:
    """A copy of model and loss function, set up by settings; in float64 where these are None."""

    def __init__(
        self, model: nn.Module, loss_fn: Callable[..., Tensor], settings: Settings | None
    ) -> None:
        # Together, for a loss that holds a parameter of the model.
        self.model, self.loss_fn = copy.deepcopy((model, loss_fn))
        roots = [m for m in (self.model, self.loss_fn) if isinstance(m, nn.Module)]
        if settings is not None:
            settings.apply(self.model)
        else:
            roots = [m.double() for m in roots]
        self.modules = list(dict.fromkeys(m for root in roots for m in root.modules()))
        self.parameters = list(dict.fromkeys(p for root in roots for p in root.parameters()))
        self.state = ModuleState(self.modules)

    def run(self, precision: str) -> ForwardBackward:
        """The training step, without its optimizer."""
        device = self.parameters[0].device
        return ForwardBackward("autotune", self.model, self.loss_fn, precision, device)

    def gradient(
        self,
        precision: str,
        pieces: Sequence[Piece],
        scale: Callable[[Tensor], Tensor] | None = None,
    ) -> tuple[Tensor, Gradient]:
        """Mean loss and gradient, without dropout, from the same buffers in every call."""
        self.state.restore_buffers()
        with _without_dropout(self.modules):
            loss = self.run(precision)(pieces, scale)
        found = [_dense_gradient(p) for p in self.parameters]
        drop_gradients(self.parameters)
        return loss, found


class Workbench:
    """A model, a loss function and a batch, and the copies on which settings are tried."""

    def __init__(
        self,
        model: nn.Module,
        batch: tuple[Any, Any],
        loss_fn: Callable[..., Tensor],
        count: Callable[[Any], float | Tensor] | None,
        blocks: str | list[str] | None,
    ) -> None:
        self.model, self.loss_fn, self.count, self.blocks = model, loss_fn, count, blocks
        # Detached, or backward would leave gradients on inputs that require them.
        self.batch = tree_map_only(Tensor, Tensor.detach, batch)
        self.size = batch_size("autotune", self.batch)
        self.scale = 2.0**16  # of the loss in fp16, where GradScaler begins
        self.copies: dict[Settings, Copy] = {}
        self.reference: Gradient = []

    def copy_for(self, settings: Settings) -> Copy:
        """The copy on which `settings` run."""
        key = _without_pieces(settings)
        if key not in self.copies:
            self.copies[key] = Copy(self.model, self.loss_fn, key)
        return self.copies[key]

    def keep(self, settings: Sequence[Settings]) -> None:
        """Give up the copies that none of `settings` runs on."""
        wanted = set(map(_without_pieces, settings))
        self.copies = {key: made for key, made in self.copies.items() if key in wanted}

    def forget(self) -> None:
        """Drop the gradients that a step left behind by failing."""
        for made in self.copies.values():
            drop_gradients(made.parameters)

    def step(self, settings: Settings) -> Callable[[], None]:
        """One forward and backward of the whole batch, which begins and ends without gradients."""
        made, pieces, scaled = self.copy_for(settings), self.pieces(settings), self.scaled(settings)
        run = made.run(settings.precision)

        def step() -> None:
            run(pieces, scaled)
            drop_gradients(made.parameters)

        return step

    def loss(self, settings: Settings) -> Callable[[], Tensor]:
        """The forward of the first micro-batch, to plan checkpoints by."""
        run, piece = self.copy_for(settings).run(settings.precision), self.pieces(settings)[0]
        return lambda: run.forward(piece)[1]

    def pieces(self, settings: Settings) -> list[Piece]:
        return micro_batches("autotune", self.batch, settings.micro_batch, self.count)

    def scaled(self, settings: Settings) -> Callable[[Tensor], Tensor] | None:
        """Scales a loss in fp16 alone, as a `GradScaler` does."""
        scale = self.scale
        return (lambda loss: loss * scale) if settings.precision == "fp16" else None

    def error(self, settings: Settings) -> float:
        """Relative error of the gradient; in fp16 of the one that a `GradScaler` arrives at."""
        made, pieces = self.copy_for(settings), self.pieces(settings)
        loss, found = made.gradient(settings.precision, pieces, self.scaled(settings))
        if settings.precision == "fp16":
            while loss.isfinite() and not _is_finite(found) and self.scale > _SMALLEST_SCALE:
                self.scale /= 2
                loss, found = made.gradient("fp16", pieces, self.scaled(settings))
            found = [g / self.scale for g in found]
        return relative_error(found, self.reference)

    def peak(self, settings: Settings) -> int:
        """Peak bytes of a step, above what stood before it."""
        with warnings.catch_warnings():
            # Caches that the model itself renews are freed by one step and made by the next.
            warnings.simplefilter("ignore", UserWarning)
            return peak_bytes(self.step(settings))

    def seconds(self, settings: Settings) -> float:
        """Seconds of one step."""
        return seconds_per_call(self.step(settings), 1)

    def measure_reference(self) -> float:
        """Set the float64 gradient; return how far that of two micro-batches is from it."""
        made = Copy(self.model, self.loss_fn, None)
        batch = tree_map_only(Tensor, _doubled, self.batch)
        whole = micro_batches("autotune", batch, None, self.count)
        try:
            _check_leaves(made.run("fp32").forward(whole[0])[1], made.parameters)
            seed_all(0)
            _, self.reference = made.gradient("fp32", whole)
        except RuntimeError as err:
            err.add_note("autotune: raised by the reference, where model and batch are float64")
            raise
        norm = sum(float(g.square().sum()) for g in self.reference) ** 0.5
        if not 0 < norm < math.inf:
            raise ValueError(
                f"autotune: the gradient in float64 has norm {norm}, so no error can be relative "
                "to it; find_nonfinite(model, step) says where a NaN comes from, and a zero needs "
                "a batch and a model that learn from each other"
            )
        seed_all(1)
        if relative_error(made.gradient("fp32", whole)[1], self.reference) > _ROUNDING:
            raise ValueError(
                "autotune: two runs of one batch have different gradients even with the "
                "probability of every dropout module at 0, so the error of a candidate cannot be "
                "measured; look for F.dropout, random numbers of PyTorch, Python or NumPy, and "
                "what a forward leaves behind in the model or in its input, or tune the model in "
                "eval mode"
            )
        seed_all(0)
        halves = micro_batches("autotune", batch, -(-self.size // 2), self.count)
        return relative_error(made.gradient("fp32", halves)[1], self.reference)

    def blocks_for(self, settings: Settings) -> Any:
        """The modules to plan for, on the copy where these settings run."""
        model = self.copy_for(settings).model
        if self.blocks is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of what it cannot see
                with saved_tensors(model) as saved:
                    self.loss(settings)()
            self.blocks = _widest_container(model, saved.by_module())
        if isinstance(self.blocks, str):
            return model.get_submodule(self.blocks)
        return [model.get_submodule(name) for name in self.blocks]


def relative_error(found: Gradient, reference: Gradient) -> float:
    """The L2 norm of the difference over that of the reference."""
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, reference, strict=True))
    return float((difference / sum(float(b.square().sum()) for b in reference)) ** 0.5)


def _without_pieces(settings: Settings) -> Settings:
    return replace(settings, precision="fp32", micro_batch=None)


def _dense_gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:  # zeros that take no memory
        return parameter.new_zeros((), dtype=torch.float64).expand_as(parameter)
    return parameter.grad.to_dense().double()


def _is_finite(gradient: Gradient) -> bool:
    return all(bool(g.isfinite().all()) for g in gradient)


def _doubled(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64 if tensor.is_floating_point() else tensor.dtype, copy=True)


def _check_leaves(loss: Tensor, parameters: Sequence[Tensor]) -> None:
    own = set(parameters)
    if strange := [leaf for leaf in leaves_of(loss) if leaf not in own]:
        raise ValueError(
            f"autotune: the loss depends on a tensor of shape {tuple(strange[0].shape)} that is no "
            "parameter of the copies that are tried; loss_fn, or a hook, holds it: make loss_fn an "
            "nn.Module that has it as its attribute"
        )


@contextlib.contextmanager
def _without_dropout(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Set the probability of dropout to zero, where modules have one."""
    kinds = {
        nn.modules.dropout._DropoutNd: "p",
        nn.MultiheadAttention: "dropout",
        nn.RNNBase: "dropout",
    }
    found = [(m, name) for m in modules for kind, name in kinds.items() if isinstance(m, kind)]
    before = [getattr(module, name) for module, name in found]
    try:
        for module, name in found:
            setattr(module, name, 0.0)
        yield
    finally:
        for (module, name), value in zip(found, before, strict=True):
            setattr(module, name, value)


def _widest_container(model: nn.Module, saved: dict[str, int]) -> str:
    """The container whose children are many and save much: of two nested ones the finer."""
    weights = {
        name: len(module) * sum(n for source, n in saved.items() if _is_within(source, name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(module) > 1
    }
    if not weights:
        raise ValueError(
            "no checkpoint plan, as the model has no nn.Sequential or nn.ModuleList of two modules "
            "or more; pass blocks"
        )
    return max(weights, key=weights.__getitem__)


def _is_within(name: str, parent: str) -> bool:
    return not parent or f"{name}.".startswith(f"{parent}.")
