"""One block of a chain, run alone: its seconds, its bytes, and whether it may be run again."""

from __future__ import annotations

import math
import pickle
import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from autograd_lib.checkpointing.recompute import Checkpoint
from autograd_lib.checkpointing.solver import Block, Mode, Recomputation
from autograd_lib.core.snapshot import (
    GLOBAL_GENERATORS,
    ModuleState,
    drop_gradients,
    own_generators,
    torch_generators,
)
from autograd_lib.memory.saved import storage_parts
from autograd_lib.memory.trace import Marks, Trace, no_collection

_ROUNDS = 3  # timings of each way to run a block, interleaved
_ROUNDING = 1e-3  # a gradient that is off by more was not computed from the same numbers
_SPANS = ("forward", "forwarded"), ("gradient", "arrived")
_INPUT_GRADIENT = "the gradient of the input"


class Visit(NamedTuple):
    """One call of a block in the step."""

    input: Tensor
    needs_gradient: bool
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    autocast: dict[str, Any]


class StandIn(torch.autograd.Function):
    """Stand for what comes before, between or after: return `value`, in backward `back(gradient)`.

    Some input must require a gradient for that: `x`, or an `anchor` that gets none.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor | None, x: Tensor | None, value: Tensor, back: Any
    ) -> Tensor:
        ctx.back = back
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return None, ctx.back(gradient), None, None


class Outcome(NamedTuple):
    """What one run of a block gave."""

    values: dict[str, Tensor]  # the output and all gradients
    output_bytes: int
    overwrites: bool


class Probe:
    """One block, run alone in several ways.

    Args:
        block: The block.
        visit: Its call in the step.
        gradient: With respect to its output; only its layout is read.
        made: Parameters whose gradients stand when backward reaches the block.
    """

    def __init__(
        self, block: nn.Module, visit: Visit, gradient: Tensor | None, made: set[Tensor]
    ) -> None:
        self.module, self.visit, self.gradient = block, visit, gradient
        self.parameters = [p for p in block.parameters() if p.requires_grad]
        self.made = [p for p in self.parameters if p in made]
        devices = {visit.input.device} - {torch.device("cpu")}
        self.state = ModuleState(block.modules(), generators=torch_generators(devices))
        self.checkpoint = Checkpoint([block])

    def measure(self) -> tuple[Block, str, Tensor | None]:
        """Measure the block.

        Returns:
            Its costs; why it cannot be recomputed, empty if it can; the gradient of its input.
        """
        plain = self._run("save")
        ways, why = ["save"], ""
        if self.parameters or self.visit.needs_gradient:
            # A block that overwrites its input can be recomputed, but not as the first under its
            # checkpoint; the copy stands for the block before it.
            why = self._refusal("copied" if plain.overwrites else "recompute", plain)
            if not why and not plain.overwrites:
                ways.append("recompute")
                if self._may_be_selective(plain):
                    ways.append("selective")
        seconds = median_seconds({way: partial(self._run, way) for way in ways}, *_SPANS)
        kind = self.visit.input.device.type
        traces = {way: Trace(partial(self._run, way), kind) for way in ways}
        modes = {w: mode(traces[w], sum(seconds[w])) for w in ways if w != "recompute"}
        again = None
        if "recompute" in ways:
            again = self._recomputation(traces["recompute"], *seconds["recompute"])
        elif plain.overwrites and not why:
            (forward, backward), peak = seconds["save"], modes["save"].forward_peak
            again = Recomputation(forward, peak, 0, forward + backward, peak)
        block = Block(
            output=plain.output_bytes,
            aliases=traces["save"].number["forward"] == traces["save"].number["forwarded"],
            overwrites=plain.overwrites,
            output_gradient=nbytes([self.gradient]),
            parameters=nbytes(p.grad for p in self.parameters if p not in set(self.made)),
            save=modes["save"],
            selective=modes.get("selective"),
            recompute=again,
        )
        drop_gradients(self.parameters)
        return block, why, plain.values.get(_INPUT_GRADIENT)

    def _call(self, way: str, marks: Marks) -> Callable[..., Tensor]:
        if way == "save":
            return self.module
        if way == "selective":
            return partial(self.checkpoint.run, True, self.module)

        def run(x: Tensor, /, *args: Any, **kwargs: Any) -> Tensor:
            try:
                return self.module(x.clone() if way == "copied" else x, *args, **kwargs)
            finally:  # the repetition ends in an exception, once it has what it needs
                marks("again")

        return partial(self.checkpoint.run, False, run)

    def _run(self, way: str, marks: Marks | None = None) -> Outcome:
        """Run forward and backward in one way; parameters keep their gradients."""
        marks = marks or Marks()
        visit, values = self.visit, dict[str, Tensor]()
        args, kwargs = tree_map_only(Tensor, _separate, (visit.args, visit.kwargs))
        anchor = torch.ones((), device=visit.input.device, requires_grad=True)
        self.state.restore()
        torch.clear_autocast_cache()
        drop_gradients(self.parameters)
        for parameter in self.made:
            parameter.grad = torch.zeros_like(parameter)

        def arrived(gradient: Tensor) -> None:
            marks("arrived")
            values[_INPUT_GRADIENT] = gradient

        def start(_: Tensor) -> Tensor:
            assert self.gradient is not None
            gradient = _ones_like(self.gradient)
            marks("gradient")
            return gradient

        marks("begin")
        needed = visit.needs_gradient
        x = StandIn.apply(anchor, None, visit.input, arrived) if needed else visit.input.clone()
        version = x._version
        marks("forward", x)
        with torch.autocast(**visit.autocast):
            y = self._call(way, marks)(x, *args, **kwargs)
        marks("forwarded", y)
        size, overwrites = y.untyped_storage().nbytes(), x._version != version
        values["the output"] = y.detach().clone()
        loss = StandIn.apply(None, y, y.new_zeros(()), start)
        del x, y
        marks("dropped")
        if loss.requires_grad:
            loss.backward()
        for name in ("gradient", "arrived"):  # those that backward did not reach
            if name not in marks.times:
                marks(name)
        named = self.module.named_parameters()
        values |= {name: p.grad for name, p in named if p.grad is not None}
        return Outcome(values, size, overwrites)

    def _refusal(self, way: str, plain: Outcome) -> str:
        own = [g for module in self.module.modules() for g in own_generators(module)]
        generators = [*GLOBAL_GENERATORS, *own]
        before = [generator.get_state() for generator in generators]
        try:
            error = _error(self._run(way), plain)
        except Exception as err:
            return f"fails under a checkpoint ({str(err).strip().splitlines()[0]})"
        for generator, state in zip(generators, before, strict=True):
            if not _same(state, generator.get_state()):
                return f"draws from {generator.name}, which a checkpoint does not put back"
        if 0 < error <= _ROUNDING:
            # Kernels compiled anew round otherwise; some add in any order without a checkpoint too.
            compiled = self.module._compiled_call_impl is not None
            if (way == "selective" and compiled) or _error(self._run("save"), plain) > 0:
                return ""
        if error:
            return f"has another gradient when its forward runs again (relative error {error:.2g})"
        return ""

    def _may_be_selective(self, plain: Outcome) -> bool:
        """Whether it may, and would save memory; that a block is random may show as it runs."""
        is_random = self.checkpoint.is_random_and_compiled
        return not is_random() and not self._refusal("selective", plain) and not is_random()

    def _recomputation(self, trace: Trace, forward: float, backward: float) -> Recomputation:
        source = trace.number["forward"]
        left = sum(trace.standing("forward", "forwarded", "dropped").values())
        repeated = trace.at["again"] > trace.at["gradient"]
        return Recomputation(
            forward,
            forward_peak=trace.peak("forward", "forwarded"),
            left=max(0, left - checkpoint_bytes(self.visit.input.device)),
            seconds=backward,
            again_peak=trace.peak("gradient", "again", stays=source) if repeated else 0,
        )


def mode(trace: Trace, seconds: float) -> Mode:
    """The costs of a block, or of the tail, from the phases of a run with these marks."""
    source = trace.number["forward"]
    kept = trace.standing("forward", "forwarded", "dropped")
    return Mode(
        seconds,
        forward_peak=trace.peak("forward", "forwarded"),
        kept=sum(kept.values()),
        keeps_output=trace.number["forwarded"] in kept,
        keeps_input=source in trace.standing("begin", "forward", "dropped"),
        backward_peak=trace.peak("gradient", "arrived", stays=source),
        backward_peak_freed=trace.peak("gradient", "arrived"),
    )


def median_seconds(
    runs: dict[str, Callable[[Marks], object]], *spans: tuple[str, str]
) -> dict[str, list[float]]:
    """Median seconds of each span between two marks, with the runs interleaved."""
    samples: dict[str, list[list[float]]] = {name: [] for name in runs}
    for _ in range(_ROUNDS):
        for name, run in runs.items():
            marks = Marks()
            with no_collection():
                run(marks)
            samples[name].append([marks.times[end] - marks.times[start] for start, end in spans])
    return {
        name: [statistics.median(times) for times in zip(*rows, strict=True)]
        for name, rows in samples.items()
    }


def _separate(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)


def _ones_like(x: Tensor) -> Tensor:
    """Ones in the same layout; an expanded tensor takes less than its shape suggests."""
    elements = x.untyped_storage().nbytes() // x.element_size()
    flat = torch.ones(elements, dtype=x.dtype, device=x.device)
    return flat.as_strided(x.shape, x.stride(), x.storage_offset())


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else pickle.dumps(a) == pickle.dumps(b)


def _error(found: Outcome, expected: Outcome) -> float:
    """Relative L2 error over all values; NaN where both are NaN is no error."""
    if found.values.keys() != expected.values.keys():
        return math.inf
    difference = scale = 0.0
    for name, value in expected.values.items():
        reference, other = (x.to_dense().nan_to_num() for x in (value, found.values[name]))
        wide = torch.complex128 if reference.is_complex() else torch.float64
        difference += float((other - reference).norm(dtype=wide)) ** 2
        scale += float(reference.norm(dtype=wide)) ** 2
    return math.sqrt(difference / scale) if scale else float(difference > 0)


def nbytes(tensors: Iterable[Tensor | None]) -> int:
    parts = (part for tensor in tensors if tensor is not None for part in storage_parts(tensor))
    return sum(part.untyped_storage().nbytes() for part in parts)


def checkpoint_bytes(device: torch.device) -> int:
    return torch.get_rng_state().nbytes if device.type == "cpu" else 0
