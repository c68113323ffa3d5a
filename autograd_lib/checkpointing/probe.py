"""One block of a chain, run alone: its seconds, its bytes, and whether it may be run again."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from autograd_lib.checkpointing.recompute import Checkpoint
from autograd_lib.checkpointing.solver import Block, Mode, Recomputation
from autograd_lib.checkpointing.trees import Place, copies, flatten, place
from autograd_lib.checkpointing.visit import Visit
from autograd_lib.core.snapshot import ModuleState, drop_gradients, torch_generators
from autograd_lib.memory.peak import Marks, Trace, no_collection
from autograd_lib.memory.saved import graph_of, storages

_ROUNDS = 3  # timings of each way to run a block, interleaved
_ROUNDING = 1e-3  # a gradient that is off by more was not computed from the same numbers


class _StandIn(torch.autograd.Function):
    """Stand for what comes before, between or after: return `values`, in backward `back(...)`.

    Some input must require a gradient for that, and one does: `anchor`.
    """

    @staticmethod
    def forward(ctx: Any, back: Any, values: Sequence[Tensor], *inputs: Tensor) -> Any:
        ctx.back = back
        ctx.set_materialize_grads(False)
        return tuple(values)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        return None, None, None, *ctx.back(gradients)


def stand_in(back: Any, values: list[Any], which: list[int], *inputs: Tensor) -> list[Any]:
    """Make some of `values` results of one node, in place.

    Args:
        back: Called in backward with their gradients; returns those of `inputs`.
        values: Returned.
        which: Indices in them.
        *inputs: Tensors that the node depends on.
    """
    if which:
        anchor = torch.ones((), device=values[which[0]].device, requires_grad=True)
        made = _StandIn.apply(back, [values[i] for i in which], anchor, *inputs)
        for i, x in zip(which, made, strict=True):
            values[i] = x
    return values


class Outcome(NamedTuple):
    """What one run of a block gave."""

    values: dict[str, Tensor]  # results and all gradients
    arrived: dict[int, Tensor]  # gradients of the arguments, by leaf
    overwrites: bool


class Probe:
    """One block, run alone in several ways.

    Args:
        block: The block.
        visit: Its call in the step.
        gradients: Those that stand, or come to its results, when backward reaches it, by the
            place of the tensor; only their layout is read.
        made: Parameters whose gradients stand by then.
    """

    def __init__(
        self,
        block: nn.Module,
        visit: Visit,
        gradients: Mapping[Place, Tensor],
        made: set[Tensor],
    ) -> None:
        self.module, self.visit = block, visit
        self.parameters = [p for p in block.parameters() if p.requires_grad]
        self.made = [p for p in self.parameters if p in made]
        results, given = visit.made.leaves, visit.given.leaves
        found = {i: gradients.get(place(results[i])) for i in visit.own if i in visit.growing}
        self.gradients = {i: g for i, g in found.items() if g is not None}
        self.others = [i for i in visit.others if place(given[i]) in gradients]
        devices = {visit.input.device} - {torch.device("cpu")}
        self.state = ModuleState(block.modules(), generators=torch_generators(devices))
        self.checkpoint = Checkpoint([block])
        self.times: dict[str, list[dict[str, float]]] = {}  # of each run in a way

    def measure(self) -> tuple[Block, str, dict[int, Tensor]]:
        """Measure the block.

        Returns:
            Its costs; why it cannot be recomputed, empty if it can; gradients of its arguments.

        Raises:
            ValueError: The block uses a graph from before it that is not in its arguments.
        """
        plain = self._run("save")
        ways, why = ["save"], ""
        if self.parameters or self.visit.needing:
            # A block that overwrites its input can be recomputed, but not as the first under its
            # checkpoint; the copy stands for the block before it.
            why = self._refusal("copied" if plain.overwrites else "recompute", plain)
            if not why and not plain.overwrites:
                ways.append("recompute")
                is_random = self.checkpoint.is_random_and_compiled  # it may show as it runs
                if not (is_random() or self._refusal("selective", plain) or is_random()):
                    ways.append("selective")
        for _ in range(_ROUNDS - 2):
            for way in ways:
                self._run(way)
        kind = self.visit.input.device.type
        traces = {way: Trace(partial(self._run, way), kind) for way in ways}
        first = {way: self._seconds(way, "forward", "forwarded") for way in ways}
        later = {way: self._seconds(way, "gradient", "arrived") for way in ways}
        modes = {w: mode(t, first[w] + later[w], self._shared(t)) for w, t in traces.items()}
        again = None
        if "recompute" in ways:
            again = self._recomputation(traces["recompute"], first["recompute"], later["recompute"])
        elif plain.overwrites and not why:
            seconds, peak = modes["save"].seconds, modes["save"].forward_peak
            again = Recomputation(first["save"], peak, 0, seconds, peak)
        new = [g for i, g in plain.arrived.items() if i not in (self.visit.chain, *self.others)]
        new += [p.grad for p in self.parameters if p not in set(self.made) and p.grad is not None]
        block = Block(
            output=nbytes([self.visit.made.leaves[self.visit.output]]),
            aliases=traces["save"].number["forward"] == traces["save"].number["forwarded"],
            overwrites=plain.overwrites,
            output_gradient=nbytes([self.gradients.get(self.visit.output)]),
            parameters=nbytes(new),
            save=modes["save"],
            selective=modes.get("selective"),
            recompute=again,
        )
        drop_gradients(self.parameters)
        return block, why, plain.arrived

    def _call(self, way: str, marks: Marks) -> Callable[..., Any]:
        if way == "save":
            return self.module
        if way == "selective":
            return partial(self.checkpoint.run, True, self.module)

        def run(*args: Any, **kwargs: Any) -> Any:
            if way == "copied":
                given = flatten((args, kwargs))
                given.leaves[self.visit.chain] = given.leaves[self.visit.chain].clone()
                args, kwargs = given.build(given.leaves)
            try:
                return self.module(*args, **kwargs)
            finally:  # the repetition ends in an exception, once it has what it needs
                marks("again")

        return partial(self.checkpoint.run, False, run)

    @no_collection()
    def _run(self, way: str, marks: Marks | None = None) -> Outcome:
        """Run forward and backward in one way; parameters keep their gradients."""
        marks = marks or Marks()
        visit, values, found = self.visit, dict[str, Tensor](), dict[int, Tensor]()
        self.state.restore()
        torch.clear_autocast_cache()
        drop_gradients(self.parameters)
        for parameter in self.made:
            parameter.grad = torch.zeros_like(parameter)

        def arrived(gradients: Sequence[Tensor | None]) -> list[None]:
            marks("arrived")
            pairs = zip(visit.needing, gradients, strict=True)
            found.update((i, gradient) for i, gradient in pairs if gradient is not None)
            return []

        def start(_: Any) -> list[Tensor]:
            layouts = [*self.gradients.values(), *(visit.given.leaves[i] for i in self.others)]
            gradients = [ones_like(layout) for layout in layouts]
            marks("gradient")
            return gradients

        marks("begin")
        before = torch._C._autograd._get_sequence_nr()
        leaves = stand_in(arrived, copies(visit.given.leaves), visit.needing)
        for i in visit.given.tensors():
            marks(f"argument {i}", leaves[i])
        others = [leaves[i] for i in self.others]
        args, kwargs = visit.given.build(leaves)
        x = leaves[visit.chain]
        del leaves
        version = x._version
        marks("forward", x)
        with torch.autocast(**visit.autocast):
            result = self._call(way, marks)(*args, **kwargs)
        results = visit.results(result)
        marks("forwarded", results[visit.output])
        for i in visit.own:
            marks(f"result {i}", results[i])
        overwrites = x._version != version
        floats = [i for i in visit.own if results[i].is_floating_point() or results[i].is_complex()]
        values |= {f"result {i}": results[i].detach().clone() for i in floats}
        ends = [*(results[i] for i in self.gradients), *others]
        loss = stand_in(start, [x.new_zeros((), dtype=torch.float32)], [0], *ends)[0]
        if way == "save":
            self._check_graph(loss, before)
        del x, result, results, args, kwargs, ends, others
        marks("dropped")
        loss.backward()
        if "arrived" not in marks.times:  # backward did not reach the arguments
            marks("arrived")
        named = self.module.named_parameters()
        values |= {name: p.grad for name, p in named if p.grad is not None}
        values |= {f"the gradient of argument {i}": gradient for i, gradient in found.items()}
        self.times.setdefault(way, []).append(marks.times)
        return Outcome(values, found, overwrites)

    def _seconds(self, way: str, start: str, end: str) -> float:
        return statistics.median(times[end] - times[start] for times in self.times[way])

    def _check_graph(self, loss: Tensor, before: int) -> None:
        """Refuse what would run backward into the step's own graph, through a closure say."""
        old = [node for node in graph_of(loss) if node._sequence_nr() < before]
        if old:
            raise ValueError(
                f"plan_checkpoints: block {self.visit.label} uses a tensor that requires a "
                f"gradient (of {old[0].name()}) and is in none of its arguments, but in a closure "
                "or an attribute; pass it as an argument"
            )

    def _refusal(self, way: str, plain: Outcome) -> str:
        if self.visit.draws:
            return f"draws from {self.visit.draws}, which a checkpoint does not put back"
        try:
            error = _error(self._run(way), plain)
        except Exception as err:
            return f"fails under a checkpoint ({str(err).strip().splitlines()[0]})"
        if 0 < error <= _ROUNDING:
            # Kernels compiled anew round otherwise; some add in any order without a checkpoint too.
            compiled = self.module._compiled_call_impl is not None
            if (way == "selective" and compiled) or _error(self._run("save"), plain) > 0:
                return ""
        if error:
            return f"has another gradient when its forward runs again (relative error {error:.2g})"
        return ""

    def _shared(self, trace: Trace) -> dict[int, str]:
        """The allocations of what blocks share."""
        return {trace.number[name]: name for name in self.visit.shared}

    def _recomputation(self, trace: Trace, forward: float, backward: float) -> Recomputation:
        stay = {trace.number["forward"], *self._shared(trace)}
        left = sum(trace.standing("forward", "forwarded", "dropped").values())
        return Recomputation(
            forward,
            forward_peak=trace.peak("forward", "forwarded"),
            left=max(0, left - checkpoint_bytes(self.visit.input.device)),
            seconds=backward,
            again_peak=trace.peak("gradient", "again", stay=stay),  # 0 if nothing ran again
            shared=frozenset(name for name in self.visit.shared if name.startswith("argument")),
        )


def mode(trace: Trace, seconds: float, shared: Mapping[int, str] | None = None) -> Mode:
    """The costs of a block, or of the tail, from the phases of a run with these marks."""
    source, known = trace.number["forward"], shared or {}
    kept = trace.standing("forward", "forwarded", "dropped")
    standing = trace.standing("begin", "forwarded", "dropped")
    return Mode(
        seconds,
        forward_peak=trace.peak("forward", "forwarded"),
        kept=sum(nbytes for number, nbytes in kept.items() if number not in known),
        keeps_output=trace.number["forwarded"] in kept,
        keeps_input=source in standing,
        backward_peak=trace.peak("gradient", "arrived", stay=(source, *known)),
        backward_peak_freed=trace.peak("gradient", "arrived", stay=known),
        shared=frozenset(known[number] for number in standing.keys() & known.keys()),
    )


def ones_like(x: Tensor) -> Tensor:
    """Ones in the same layout; an expanded tensor takes less than its shape suggests."""
    elements = x.untyped_storage().nbytes() // x.element_size()
    flat = torch.ones(elements, dtype=x.dtype, device=x.device)
    return flat.as_strided(x.shape, x.stride(), x.storage_offset())


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
    return sum(storage.nbytes() for storage in storages(list(tensors)))


def checkpoint_bytes(device: torch.device) -> int:
    return torch.get_rng_state().nbytes if device.type == "cpu" else 0
