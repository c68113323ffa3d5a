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
from operator import itemgetter
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves, tree_map_only

from autograd_lib.benchmark import seconds_per_call
from autograd_lib.checkpointing.measure import leaves_of
from autograd_lib.config.records import Settings
from autograd_lib.core.batches import Batch, Count, Piece, batch_size, read_batch, terms_of
from autograd_lib.core.snapshot import ModuleState, drop_gradients
from autograd_lib.memory import peak_bytes, saved_tensors
from autograd_lib.training.step import ForwardBackward, micro_batches
from autograd_lib.tuning.verify import gradient_of, relative_error, together, widened

SEPARABLE = {None: 1e-6, Settings(): 2e-5}  # relative error, by the settings of the reference
_CHAINS = 3  # containers tried, as the children of a container need not be a chain
_SMALLEST_SCALE = 2.0**-24  # of the loss in fp16; below it even a gradient of 1 is rounded away
# Relative, of a gradient that atomic additions sum in any order, by the settings of the reference.
_ROUNDING = {None: 1e-10, Settings(): 1e-4}


_Scale = Callable[[Tensor], Tensor]


class Copy:
    """A copy of model, loss, optimizer and blocks; in float64 where there are no settings."""

    def __init__(self, given: tuple[Any, ...], settings: Settings | None) -> None:
        # Together, for a loss that holds a parameter of the model.
        self.model, self.loss_fn, self.optimizer, self.blocks = copy.deepcopy(given)
        self.whole = together(self.model, self.loss_fn)
        if settings is None:
            self.whole._apply(widened)
        else:
            settings.apply(self.model)
        self.parameters = list(self.whole.parameters())
        self.device = self.parameters[0].device
        self.state = ModuleState(self.whole.modules(), self.parameters if self.optimizer else ())

    def run(self, precision: str) -> ForwardBackward:
        """The training step, without its optimizer."""
        return ForwardBackward("autotune", self.model, self.loss_fn, precision, self.device)

    def gradient(
        self, pieces: Sequence[Piece], precision: str = "fp32", scale: _Scale | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean loss and gradient, without dropout, from the same buffers and parameters."""
        self.state.restore_buffers()
        with _without_dropout(self.whole):
            loss = self.run(precision)(pieces, scale)
        return loss, gradient_of(self.parameters)

    def loss(self, pieces: Sequence[Piece]) -> float:
        """Mean loss alone, which takes the memory of a forward only."""
        self.state.restore_buffers()
        with _without_dropout(self.whole), torch.no_grad():
            return sum(piece.share * float(self.run("fp32").forward(piece)[1]) for piece in pieces)

    def state_bytes(self) -> int:
        """What the optimizer keeps from step to step."""
        state = self.optimizer.state.values() if self.optimizer else ()
        return sum(leaf.nbytes for leaf in tree_leaves(list(state)) if isinstance(leaf, Tensor))


class Workbench:
    """A model, a loss function and a batch, and the copies on which settings are tried."""

    def __init__(
        self,
        model: nn.Module,
        batch: Any,
        loss_fn: Callable[..., Tensor] | None,
        *,
        count: Count | None = None,
        blocks: Any = None,
        optimizer: Optimizer | None = None,
    ) -> None:
        self.model, self.given = model, (model, loss_fn, optimizer, blocks)
        self.count = terms_of(loss_fn, model) if count is None else count
        # Detached, or backward would leave gradients on inputs that require them.
        self.batch = tree_map_only(Tensor, Tensor.detach, read_batch("autotune", batch))
        self.size = batch_size("autotune", self.batch)
        self.scale = 2.0**16  # of the loss in fp16, where GradScaler begins
        self.copies: dict[Settings, Copy] = {}
        self.reference = torch.empty(0)
        self.exact: Settings | None = None  # of the reference; None for float64
        self.narrow = self.indivisible = ""  # why it is not in float64, and micro-batches fail

    def copy_for(self, settings: Settings) -> Copy:
        """The copy on which `settings` run."""
        key = _without_pieces(settings)
        if key not in self.copies:
            self.copies[key] = Copy(self.given, key)
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
        """One training step of the whole batch, which begins and ends without gradients."""
        made, pieces, scaler = self.copy_for(settings), self.pieces(settings), self.scaler(settings)
        run = made.run(settings.precision)

        def step() -> None:
            run(pieces, scaler.scale)
            if made.optimizer is not None:
                scaler.step(made.optimizer)
                scaler.update()
            drop_gradients(made.parameters)

        return step

    def loss(self, settings: Settings) -> Callable[[], Tensor]:
        """The forward of the first micro-batch, to plan checkpoints by."""
        run, piece = self.copy_for(settings).run(settings.precision), self.pieces(settings)[0]
        return lambda: run.forward(piece)[1]

    def pieces(self, settings: Settings) -> list[Piece]:
        return micro_batches("autotune", self.batch, settings.micro_batch, self.count)

    def scaler(self, settings: Settings) -> torch.amp.GradScaler:
        """Scales the loss in fp16, and leaves it alone otherwise."""
        device, enabled = self.copy_for(settings).device.type, settings.precision == "fp16"
        return torch.amp.GradScaler(device, self.scale, enabled=enabled)

    def error(self, settings: Settings) -> float:
        """Relative error of the gradient; in fp16 of the one that a `GradScaler` arrives at."""
        made, pieces = self.copy_for(settings), self.pieces(settings)
        while True:
            scaler = self.scaler(settings)
            loss, found = made.gradient(pieces, settings.precision, scaler.scale)
            overflows = scaler.is_enabled() and loss.isfinite() and not found.isfinite().all()
            if not overflows or self.scale <= _SMALLEST_SCALE:
                return relative_error(found / scaler.get_scale(), self.reference)
            self.scale /= 2

    def peak(self, settings: Settings) -> int:
        """Peak bytes of a step above what stood before it, and the state of the optimizer."""
        with warnings.catch_warnings():
            # Caches that the model itself renews are freed by one step and made by the next.
            warnings.simplefilter("ignore", UserWarning)
            peak = peak_bytes(self.step(settings))
        return peak + self.copy_for(settings).state_bytes()

    def seconds(self, settings: Settings) -> float:
        """Seconds of one step."""
        return seconds_per_call(self.step(settings), 1)

    def measure_reference(self) -> float:
        """Set the reference, in float64 if that runs; return how far micro-batches are from it.

        Where they are the same to rounding, the reference is made of eighths: in float64 they take
        no more than a quarter of the batch in float32.
        """
        try:
            return self._measure_reference(tree_map_only(Tensor, widened, self.batch))
        except (RuntimeError, FloatingPointError) as err:
            if is_out_of_memory(err):
                raise
            why = str(err).strip().partition("\n")[0]
            kind = type(err).__name__
            self.narrow = f"The reference is in float32, as float64 raises {kind}: {why}"
        self.exact = Settings()
        return self._measure_reference(self.batch)

    def exact_copy(self) -> Copy:
        return Copy((*self.given[:2], None, None), self.exact)

    def _measure_reference(self, batch: Batch) -> float:
        error, made = self._division_error(batch), self.exact_copy()
        divided = self.exact is None and error <= SEPARABLE[None]
        size = -(-self.size // 8) if divided else None
        pieces = micro_batches("autotune", batch, size, self.count)
        self.reference = made.gradient(pieces)[1]
        norm = float(self.reference.norm())
        if self.exact is None and not math.isfinite(norm):  # a mask may overflow in float64 alone
            raise FloatingPointError(f"the gradient has norm {norm}")
        if self.exact is None and not math.isfinite(norm):  # a mask may overflow in float64 alone
            raise FloatingPointError(f"the gradient has norm {norm}")
        if self.exact is None and not math.isfinite(norm):  # a mask may overflow in float64 alone
            raise FloatingPointError(f"the gradient has norm {norm}")
        if not 0 < norm < math.inf:
            raise ValueError(
                f"autotune: the gradient has norm {norm}, and errors are relative to "
                "it; find_nonfinite(model, step) says where a NaN comes from, and a zero needs "
                "a batch and a model that learn from each other"
            )
        first, again = (made.gradient(pieces[:1])[1] for _ in range(2))
        if relative_error(again, first) > _ROUNDING[self.exact]:
            raise ValueError(
                "autotune: two runs of one batch have different gradients without dropout modules, "
                "so that errors cannot be measured; look for F.dropout, random numbers, and what a "
                "forward leaves behind in the model or in its input, or tune in eval mode"
            )
        return error

    def _division_error(self, batch: Batch) -> float:
        """How far micro-batches are from the batch in float64, in little memory; NaN if they fail.

        Two halves of four samples show whether samples depend on one another. Whether micro-batches
        weigh what they should shows in the loss of the whole batch, at other parameters than the
        model's, where losses of all samples might be the same.
        """
        made, strange, self.indivisible = self.exact_copy(), list[Tensor](), ""
        few = tree_map_only(Tensor, itemgetter(slice(4)), batch)

        def pieces(part: Batch, size: int | None) -> list[Piece]:
            return micro_batches("autotune", part, size, self.count)

        try:
            # What the model makes anew in each forward is no matter.
            run = made.run("fp32")
            a, b = (set(leaves_of(run.forward(Piece(few, 1.0, 1.0))[1])) for _ in range(2))
            strange = list((a & b).difference(made.parameters))
            del a, b
            if not strange and self.size > 1:
                whole = made.gradient(pieces(few, None))[1]
                halves = made.gradient(pieces(few, -(-min(self.size, 4) // 2)))[1]
                with torch.no_grad():
                    for parameter in made.parameters:
                        parameter.add_(torch.randn_like(parameter), alpha=1e-3)
                mean = made.loss(pieces(batch, None))
                apart = made.loss(pieces(batch, -(-self.size // 8)))
                # A sum, as the larger of a number and NaN may be either.
                difference = abs(apart - mean) / (abs(mean) or math.nan)
                return relative_error(halves, whole) + difference
        except (ValueError, RuntimeError) as err:  # what the whole batch raises too comes up there
            self.indivisible = str(err).removeprefix("autotune: ").strip().partition("\n")[0]
            return math.nan
        if strange:
            raise ValueError(
                f"autotune: the loss depends on a tensor of shape {tuple(strange[0].shape)} that "
                "is no parameter of the copies that are tried; loss_fn, or a hook, holds it: make "
                "loss_fn an nn.Module that has it as its attribute"
            )
        return 0.0

    def chains_for(self, settings: Settings) -> dict[str, Any]:
        """Modules to plan for, on the copy where these settings run, by their names in errors."""
        made = self.copy_for(settings)
        if made.blocks is None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # of what it cannot see
                with saved_tensors(made.model) as saved:
                    self.loss(settings)()
            return _containers(made.model, saved.by_module())
        return {"those given": made.blocks}


def _without_pieces(settings: Settings) -> Settings:
    return replace(settings, precision="fp32", micro_batch=None)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, as a device, Python or the CPU's allocator says it."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


@contextlib.contextmanager
def _without_dropout(whole: nn.Module) -> Iterator[None]:
    """Set the probability of dropout to zero, where modules have one, by a name with "drop" in it.

    So have attention, recurrent layers, drop-path, and layers that call `F.dropout` themselves.
    """
    with contextlib.ExitStack() as stack:
        for m in whole.modules():
            own = ["p"] if isinstance(m, nn.modules.dropout._DropoutNd) else []
            for name in [name for name in vars(m) if "drop" in name or name in own]:
                if isinstance(getattr(m, name), float):
                    stack.enter_context(mock.patch.object(m, name, 0.0))
        yield


def _containers(model: nn.Module, saved: dict[str, int]) -> dict[str, nn.Module]:
    """Containers whose children are many and save much: of two nested ones the finer first."""
    weights = dict[str, int]()
    for name, module in model.named_modules():
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(module) > 1:
            start = f"{name}." if name else ""
            within = sum(n for source, n in saved.items() if f"{source}.".startswith(start))
            weights[name] = len(module) * within
    widest = sorted(weights, key=weights.__getitem__, reverse=True)[:_CHAINS]
    return {f"model.{name}".strip("."): model.get_submodule(name) for name in widest}
