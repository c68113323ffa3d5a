"""One block of a chain, run alone: its seconds, its bytes, and whether it may be run again."""

from __future__ import annotations

import contextlib
import gc
import math
import pickle
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autograd_lib.checkpointing.compiled import Budgeted
from autograd_lib.checkpointing.recompute import Contexts
from autograd_lib.checkpointing.solver import Block, Mode, Recomputation
from autograd_lib.checkpointing.trace import Input, Layout, Marks, Output, Trace
from autograd_lib.core.snapshot import (
    GLOBAL_GENERATORS,
    ModuleState,
    drop_gradients,
    own_generators,
)
from autograd_lib.memory.saved import storage_parts

ROUNDS = 3  # timings of each way to run a block, interleaved
_ROUNDING = 1e-3  # a gradient that is off by more was not computed from the same numbers


@dataclass
class Visit:
    """One call of a block in the step."""

    input: Tensor
    needs_gradient: bool
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    autocast: dict[str, Any] = field(default_factory=dict)


class Probe:
    """One block, run alone: as it is, under a checkpoint, and under a selective one."""

    def __init__(
        self, block: nn.Module, visit: Visit, gradient: Layout | None, made: set[Tensor]
    ) -> None:
        self.module, self.visit, self.gradient = block, visit, gradient
        self.parameters = [p for p in block.parameters() if p.requires_grad]
        self.made = [p for p in self.parameters if p in made]
        self.state = ModuleState(block.modules())
        own = [generator for module in block.modules() for generator in own_generators(module)]
        self.generators = [*GLOBAL_GENERATORS, *own]
        self.random = torch.get_rng_state()
        self.contexts = Contexts([block])
        self.budgeted = None if block._compiled_call_impl is None else Budgeted(block)
        # set by each run
        self.input_gradient: Layout | None = None
        self.source = self.target = self.output = 0
        self.overwrites = False

    def measure(self, name: str) -> tuple[Block, str]:
        """Measure; the text says why the block cannot be recomputed, and is empty if it can."""
        ways: dict[str, Callable[..., Tensor]] = {"save": self._plain}
        why = ""
        plain = self._gradients(self._plain)
        overwrites = self.overwrites  # a run on a copy has nothing to overwrite
        if self.parameters or self.visit.needs_gradient:
            why = self._refusal(self._copied if overwrites else self._checkpointed, plain)
            if not why and not overwrites:
                ways["recompute"] = self._checkpointed
                if self._may_be_selective(plain):
                    ways["selective"] = self._selective
        seconds = self._times(ways)
        modes, again = {}, None
        for way, call in ways.items():
            # Outside of the trace, which knows nothing of what stood before it.
            drop_gradients(self.parameters)
            trace = Trace(partial(self._run, call), self.visit.input.device)
            if way == "recompute":
                again = self._recomputation(trace, *seconds[way])
            else:
                modes[way] = self._mode(trace, sum(seconds[way]))
        if overwrites and not why:
            again = _within_a_run(modes["save"], *seconds["save"])
        block = Block(
            name,
            output=self.output,
            aliases=self.source == self.target,
            overwrites=overwrites,
            output_gradient=0 if self.gradient is None else self.gradient.nbytes,
            parameters=nbytes([p.grad for p in self.parameters if p not in set(self.made)]),
            save=modes["save"],
            selective=modes.get("selective"),
            recompute=again,
        )
        drop_gradients(self.parameters)
        return block, why

    def _may_be_selective(self, plain: dict[str, Tensor]) -> bool:
        if self._keeps_everything():
            return False
        return not self._refusal(self._selective, plain) and not self._keeps_everything()

    def _keeps_everything(self) -> bool:
        """Whether the block is compiled and draws random numbers, as far as was seen until now."""
        return self.budgeted is not None and self.budgeted.random

    # One run, in three ways

    def _plain(self, _: Marks, x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        return self.module(x, *args, **kwargs)

    def _checkpointed(self, marks: Marks, x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        def run(x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
            try:
                return self.module(x, *args, **kwargs)
            finally:  # the repetition ends in an exception, once it has what it needs
                marks("again")

        return self.contexts.checkpoint(False, run, x, *args, **kwargs)

    def _copied(self, _: Marks, x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        # A block that overwrites its input can be recomputed, but not as the first under its
        # checkpoint; the copy stands for the block before it.
        def run(x: Tensor) -> Tensor:
            return self.module(x.clone(), *args, **kwargs)

        return self.contexts.checkpoint(False, run, x)

    def _selective(self, _: Marks, x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
        if self.budgeted is not None:
            return self.budgeted(x, *args, **kwargs)
        return self.contexts.checkpoint(True, self.module, x, *args, **kwargs)

    def _run(
        self, call: Callable[..., Tensor], marks: Marks, keep: dict[str, Tensor] | None = None
    ) -> None:
        visit, value = self.visit, self.visit.input
        anchor = torch.ones((), device=value.device, requires_grad=True)
        args, kwargs = tree_map_only(Tensor, _separate, (visit.args, visit.kwargs))
        self._prepare()

        def arrived(gradient: Tensor) -> None:
            marks("arrived")
            self.input_gradient = Layout.of(gradient)
            if keep is not None:
                keep["the gradient of the input"] = gradient

        def make() -> Tensor:
            assert self.gradient is not None
            gradient = self.gradient.ones()
            marks("gradient")
            return gradient

        marks("begin")
        x = Input.apply(anchor, value, arrived) if visit.needs_gradient else value.clone()
        self.source, version = x.untyped_storage().data_ptr(), x._version
        marks("forward")
        with torch.autocast(**visit.autocast) if visit.autocast else contextlib.nullcontext():
            y = call(marks, x, *args, **kwargs)
        marks("forwarded")
        self.target, self.output = y.untyped_storage().data_ptr(), y.untyped_storage().nbytes()
        self.overwrites = x._version != version
        if keep is not None:
            keep["the output"] = y.detach()
        loss = Output.apply(y, make)
        del x, y
        marks("dropped")
        if loss.requires_grad:
            loss.backward()
        else:
            marks("gradient")
        if "arrived" not in marks.times:  # an input that needs no gradient, or gets none
            marks("arrived")

    def _prepare(self) -> None:
        torch.clear_autocast_cache()
        torch.set_rng_state(self.random)
        self.state.restore_buffers()
        drop_gradients(self.parameters)
        for parameter in self.made:
            parameter.grad = torch.zeros_like(parameter)

    # May the block be recomputed?

    def _gradients(self, call: Callable[..., Tensor]) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        self._run(call, Marks(), found)
        named = self.module.named_parameters()
        found |= {name: p.grad for name, p in named if p.grad is not None}
        drop_gradients(self.parameters)
        return {name: g.to_dense() if g.is_sparse else g for name, g in found.items()}

    def _refusal(self, call: Callable[..., Tensor], plain: dict[str, Tensor]) -> str:
        before = [generator.get_state() for generator in self.generators]
        try:
            other = self._gradients(call)
        except Exception as err:
            return f"fails under a checkpoint ({str(err).strip().splitlines()[0]})"
        for generator, state in zip(self.generators, before, strict=True):
            if not _same(state, generator.get_state()):
                return f"draws from {generator.name}, which a checkpoint does not put back"
        error = _error(other, plain)
        if error > _ROUNDING or (error and not self._rounds_otherwise(call, plain)):
            return f"has another gradient when its forward runs again (relative error {error:.2g})"
        return ""

    def _rounds_otherwise(self, call: Callable[..., Tensor], plain: dict[str, Tensor]) -> bool:
        """Whether kernels are compiled anew, or add in any order without a checkpoint too."""
        compiled = call == self._selective and self.budgeted is not None
        return compiled or _error(self._gradients(self._plain), plain) > 0

    # What the runs tell

    def _times(self, ways: dict[str, Callable[..., Tensor]]) -> dict[str, tuple[float, float]]:
        """Median seconds of forward and backward."""
        samples: dict[str, list[tuple[float, float]]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, call in ways.items():
                marks = Marks()
                with no_collection():
                    self._run(call, marks)
                forward = marks.seconds("forward", "forwarded")
                samples[way].append((forward, marks.seconds("gradient", "arrived")))
        return {
            way: (statistics.median(f for f, _ in pairs), statistics.median(b for _, b in pairs))
            for way, pairs in samples.items()
        }

    def _mode(self, trace: Trace, seconds: float) -> Mode:
        source = trace.number(self.source, "forward")
        kept = trace.standing("forward", "forwarded", "dropped")
        return Mode(
            seconds,
            forward_peak=trace.peak("forward", "forwarded"),
            kept=sum(kept.values()),
            keeps_output=trace.number(self.target, "forwarded") in kept,
            keeps_input=source in trace.standing("begin", "forward", "dropped"),
            backward_peak=trace.peak("gradient", "arrived", stays=source),
            backward_peak_freed=trace.peak("gradient", "arrived"),
        )

    def _recomputation(self, trace: Trace, forward: float, backward: float) -> Recomputation:
        source = trace.number(self.source, "forward")
        left = sum(trace.standing("forward", "forwarded", "dropped").values())
        repeated = trace.at["again"] > trace.at["gradient"]
        return Recomputation(
            forward,
            forward_peak=trace.peak("forward", "forwarded"),
            left=max(0, left - checkpoint_bytes(self.visit.input.device)),
            seconds=backward,
            alone_peak=trace.peak("gradient", "arrived", stays=source),
            again_peak=trace.peak("gradient", "again", stays=source) if repeated else 0,
        )


def _within_a_run(mode: Mode, forward: float, backward: float) -> Recomputation:
    """The costs of a block that is never the first under a checkpoint, from those as it is."""
    peak = mode.forward_peak
    return Recomputation(forward, peak, 0, forward + backward, mode.backward_peak, peak)


def _separate(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else pickle.dumps(a) == pickle.dumps(b)


def _error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative L2 error over all of them; NaN where both are NaN is no error."""
    if found.keys() != expected.keys():
        return math.inf
    difference = scale = 0.0
    for name, gradient in expected.items():
        reference = gradient.nan_to_num()
        wide = torch.complex128 if reference.is_complex() else torch.float64
        difference += float((found[name].nan_to_num() - reference).norm(dtype=wide)) ** 2
        scale += float(reference.norm(dtype=wide)) ** 2
    return math.sqrt(difference / scale) if scale else float(difference > 0)


def nbytes(tensors: Sequence[Tensor | None]) -> int:
    parts = (part for tensor in tensors if tensor is not None for part in storage_parts(tensor))
    return sum(part.untyped_storage().nbytes() for part in parts)


def checkpoint_bytes(device: torch.device) -> int:
    return torch.get_rng_state().nbytes if device.type == "cpu" else 0


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()
