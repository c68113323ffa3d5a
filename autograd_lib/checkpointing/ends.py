"""Head and tail of a step, measured with stand-ins for the blocks."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from autograd_lib.checkpointing.probe import checkpoint_bytes, mode, nbytes, ones_like, stand_in
from autograd_lib.checkpointing.solver import Chain
from autograd_lib.checkpointing.trees import Place, flatten, place
from autograd_lib.checkpointing.visit import Blocks, Visit, intercept
from autograd_lib.core.snapshot import drop_gradients
from autograd_lib.memory.peak import Marks, Trace


@dataclass
class Ends:
    """The step with stand-ins, which return what the blocks returned when they were visited.

    The graphs of the stand-ins make a chain, as those of the blocks.

    Attributes:
        blocks: The blocks.
        step: Runs forward and returns the loss.
        visits: Their calls; `shared` is noted in them.
        leaves: Tensors whose `.grad` the step sets.
        accumulate: Whether those stand from the start.
        gradients: Those that the tail sends to the results of blocks, by place.
        made: The leaves that have gradients when backward reaches the blocks.
    """

    blocks: Blocks
    step: Callable[[], Tensor]
    visits: list[Visit]
    leaves: list[Tensor]
    accumulate: bool
    gradients: dict[Place, Tensor] = field(default_factory=dict)
    made: set[Tensor] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.device = self.visits[0].input.device
        # What later blocks take gets gradients from stand-ins, which are not the tail's.
        self.between = {place(v.given.leaves[i]) for v in self.visits[1:] for i in v.needing}

    def measure(self) -> Chain:
        """Return a chain that lacks its blocks and the gradient of its input."""
        self._run(Marks())  # warm
        trace = Trace(self._run, self.device.type)
        drop_gradients(self.leaves)
        source, times = trace.number["begin"], trace.times
        head = trace.standing("start", "begin", "begin")
        kept = trace.standing("start", "begin", "dropped")
        shared, taken = self._share(trace, kept)
        if taken and source in head:
            kept[source] = head[source]
        # What the graph between the blocks keeps, or the tail of their results, counts for long.
        between = trace.standing("begin", "forward", "dropped")
        between.pop(trace.number["forward"], None)
        held, size = source in kept or source not in head, head.get(source, 0)
        framed = {**head, **shared}
        counted = kept.keys() if held else {*kept, source}
        waiting = trace.standing("gradient", "arrived", "arrived")
        waiting.pop(trace.number["arrived"], None)
        return Chain(
            blocks=(),
            input=size,
            input_held=held,
            input_gradient=0,
            head_kept=sum(kept.values()) + sum(between.values()),
            # Tensors that blocks share count from the start on, as if the head had made them all.
            head_frames=sum(n for number, n in framed.items() if number not in counted),
            head_forward_peak=trace.peak("start", "begin"),
            head_backward_peak=trace.peak("back", "end"),
            tail=mode(trace, seconds=0.0),
            # Not only what is in `.grad` by then: where head and tail share a weight, the tail's
            # part of its gradient waits for that of the head.
            tail_parameters=sum(waiting.values()),
            checkpoint_bytes=checkpoint_bytes(self.device),
            seconds=times["begin"] - times["start"] + times["end"] - times["forward"],
            shared=shared,
            gradients_before=nbytes(self.leaves) if self.accumulate else 0,
        )

    def _run(self, marks: Marks) -> None:
        self.gradients.clear()
        for leaf in self.leaves:
            leaf.grad = torch.zeros_like(leaf) if self.accumulate else None
        torch.clear_autocast_cache()
        marks("start")
        with intercept(self.blocks, partial(self._forward, marks)):
            loss = self.step()
        for name in ("forwarded", "dropped", "gradient"):  # of the tail, as of a block
            marks(name)
        loss.backward()
        marks("end")

    def _forward(
        self, marks: Marks, index: int, call: Callable[..., Any], /, *args: Any, **kwargs: Any
    ) -> Any:
        visit, last = self.visits[index], index == len(self.visits) - 1
        given, results = flatten((args, kwargs)).leaves, list(visit.made.leaves)
        x = given[visit.chain]
        if index == 0:
            marks("begin", x)
        for i in visit.given.tensors():
            marks(f"{index} argument {i}", given[i])
        for i, argument in visit.passed.items():
            results[i] = given[argument]
        for i in visit.own:  # the chain's own tensors are the blocks', not head's or tail's
            through = i == visit.output and not last
            results[i] = _placeholder(results[i]) if through else results[i].clone()
        ends = [i for i in visit.own if i in visit.growing or i == visit.output]
        back = partial(self._backward, marks, index, ends)
        stand_in(back, results, ends, x, *(given[i] for i in visit.others))
        for i in visit.own:
            marks(f"{index} result {i}", results[i])
        block = self.blocks[index]
        if any(module._forward_hooks for module in block.modules() if module is not block):
            with torch.no_grad():  # they may collect what the tail takes, as router logits
                call(*args, **kwargs)
        result, attributes = visit.made.build(results)
        for (module, name), value in zip(visit.attributes, attributes, strict=True):
            vars(module)[name] = value
        if last:
            marks("forward", results[visit.output])
        return result

    def _backward(
        self, marks: Marks, index: int, ends: list[int], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        visit, x = self.visits[index], self.visits[index].input
        arrived = dict(zip(ends, gradients, strict=True))
        if index == len(self.visits) - 1:
            marks("arrived", arrived.get(visit.output))
            self.made.update(leaf for leaf in self.leaves if leaf.grad is not None)
        for i, gradient in arrived.items():
            where = place(visit.made.leaves[i])
            if gradient is not None and where not in self.between:
                self.gradients[where] = gradient
        others = [ones_like(visit.given.leaves[i]) for i in visit.others]
        if index > 0:
            return [_placeholder(x), *others]
        of_input = ones_like(x) if visit.chain in visit.needing else None
        marks("back")
        return [of_input, *others]

    def _share(self, trace: Trace, kept: Collection[int]) -> tuple[dict[int, int], bool]:
        """Note in the visits which tensors stand until backward only where blocks keep them.

        Also the results that the tail keeps: they stand in any case, so that they count nothing.

        Args:
            trace: Of the step with stand-ins.
            kept: Allocations that the head keeps itself.

        Returns:
            Their bytes by number, and whether a later block takes the first one's input too.
        """
        source, outer = trace.number["begin"], trace.standing("begin", "forward", "dropped")
        sizes = {number: n for number, n in trace.cut("start", "forward") if n > 0}
        alone, shared, taken = sizes.keys() - {*kept, *outer, source}, dict[int, int](), False
        for k, visit in enumerate(self.visits):
            for i in visit.given.tensors():
                if i == visit.chain:
                    continue
                number = trace.number[f"{k} argument {i}"]
                taken = taken or (k > 0 and number == source)
                if number in alone:
                    visit.shared[f"argument {i}"] = number
                    shared[number] = sizes[number]
        for k, visit in enumerate(self.visits):
            for i in visit.own:
                number = trace.number[f"{k} result {i}"]
                if i != visit.output and (number in shared or number in outer):
                    visit.shared[f"result {i}"] = number
                    shared.setdefault(number, 0)
        return shared, taken


def _placeholder(x: Tensor) -> Tensor:
    return torch.zeros((), dtype=x.dtype, device=x.device).expand_as(x)
