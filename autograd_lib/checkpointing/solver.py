"""Which blocks of a chain to save and which to recompute: all optimal schedules at once.

The step is a chain of blocks between a head (what the model does before them) and a tail (what it
does after, and the loss). Each block is run in one way, its *step* of the schedule:

- ``"save"``: unchanged; autograd saves what backward needs;
- ``"selective"``: checkpointed, but results of matrix products are saved; in a compiled block the
  compiler decides what is cheap to recompute (not offered where the block draws random numbers);
- ``"recompute"``: checkpointed; its forward runs again in backward;
- a tuple of steps: a run of blocks under one checkpoint, which saves its input only. In backward
  the run is repeated with the steps of the tuple, which may contain runs themselves.

With runs within runs these are the persistent schedules of Beaumont et al. (2019); those of
Griewank and Walther (2000) are the homogeneous case. Bytes and seconds of a schedule follow from
those of its parts, so one dynamic program finds the whole trade-off: for each interval of the chain
a *frontier*, the list of (bytes, seconds) that no other schedule of the interval beats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from itertools import accumulate
from typing import Any

NAMES = ("save", "selective", "recompute")
Step = Any  # one of `NAMES`, or a tuple of steps: a type that contains itself
Steps = tuple[Step, ...]

_POINTS = 256  # of a frontier: longer ones are thinned


@dataclass(frozen=True)
class Mode:
    """The costs of one way to run a block; bytes are above what stands when the phase begins.

    Attributes:
        seconds: Forward and backward.
        forward_peak: High-water mark of the forward, its output included.
        kept: What it saves for backward, without its input; with its output if `keeps_output`.
        keeps_output: Whether backward of this block needs its output.
        keeps_input: Whether it needs its input.
        backward_peak: High-water mark of the backward, where the input stays.
        backward_peak_freed: The same where the block is the last to need its input.
        shared: What it keeps of the arguments that `Chain.shared` lists.
    """

    seconds: float
    forward_peak: int
    kept: int
    keeps_output: bool
    keeps_input: bool
    backward_peak: int
    backward_peak_freed: int
    shared: frozenset[Any] = frozenset()


@dataclass(frozen=True)
class Recomputation:
    """The costs of a block under a checkpoint.

    Attributes:
        forward_seconds: The first forward, which saves nothing.
        forward_peak: High-water mark of the first forward, its output included.
        left: What the first forward leaves until backward, without input and output.
        seconds: The repeated forward and the backward.
        again_peak: High-water mark of the repeated forward.
        shared: The arguments among `Chain.shared`.
    """

    forward_seconds: float
    forward_peak: int
    left: int
    seconds: float
    again_peak: int
    shared: frozenset[Any] = frozenset()


@dataclass(frozen=True)
class Block:
    """The measured properties of one block.

    Attributes:
        output: Bytes of its output's storage.
        aliases: Whether the output is the input's storage, as of a view.
        overwrites: Whether the input is modified in place.
        output_gradient: Bytes of the gradient with respect to the output.
        parameters: Bytes of the gradients, of its parameters and of arguments other than the
            input, that no later block has made.
        save: Its costs unchanged.
        selective: Its costs under a selective checkpoint; None if it cannot run so.
        recompute: Its costs under a checkpoint; None if that fails or changes gradients.
    """

    output: int
    aliases: bool
    overwrites: bool
    output_gradient: int
    parameters: int
    save: Mode
    selective: Mode | None
    recompute: Recomputation | None


@dataclass(frozen=True)
class Chain:
    """The blocks and what stands around them.

    Attributes:
        blocks: In the order in which they run.
        input: Bytes of the first block's input.
        input_held: Whether the input stands until backward whatever the first block does.
        input_gradient: Bytes of the gradient with respect to it.
        head_kept: What the head saves until its backward, with the input if that is held.
        head_frames: What the head keeps in addition while the forward lasts.
        head_forward_peak: High-water mark of the head's forward.
        head_backward_peak: High-water mark of the head's backward.
        tail: The tail, loss included, as one more block that is saved.
        tail_parameters: Bytes of the gradients of its parameters.
        checkpoint_bytes: What a checkpoint itself keeps (the state of the random numbers).
        seconds: Head and tail together.
        shared: Bytes of tensors, such as masks, that blocks take as arguments besides their input
            and that stand until backward only where some block keeps them; by number. In the
            forward `head_frames` contains them.
        gradients_before: Bytes of gradients that stand before the step, where they accumulate.
    """

    blocks: tuple[Block, ...]
    input: int
    input_held: bool
    input_gradient: int
    head_kept: int
    head_frames: int
    head_forward_peak: int
    head_backward_peak: int
    tail: Mode
    tail_parameters: int
    checkpoint_bytes: int
    seconds: float
    shared: Mapping[int, int] = field(default_factory=dict)
    gradients_before: int = 0

    @cached_property
    def gradients(self) -> tuple[int, ...]:
        """Bytes of parameter gradients made by the tail and by the blocks from each index on."""
        later = accumulate([self.tail_parameters, *(b.parameters for b in reversed(self.blocks))])
        return tuple(later)[::-1]

    def size(self, index: int) -> int:
        """Bytes of the input of block `index`; after the last block, of the input of the tail."""
        return self.blocks[index - 1].output if index else self.input


# Frontiers

_Linked = Any  # (step, the steps after it) or None: schedules share their ends
_Point = tuple[int, float, _Linked]
_Frontier = list[_Point]  # bytes ascending, seconds descending


def frontier(chain: Chain, runs: bool) -> list[tuple[int, float, Steps]]:
    """Every optimal schedule of a step as (peak bytes, seconds, steps), bytes ascending.

    Args:
        chain: The costs.
        runs: Whether several blocks may stand under one checkpoint.
    """
    # What stands and is allocated when the head goes backward.
    last = chain.head_kept + chain.input_gradient + chain.gradients[0] + chain.head_backward_peak
    points: _Frontier = []
    for need, seconds, linked in _Solver(chain, runs).solve():
        peak = max(chain.head_forward_peak, chain.head_kept + need, last)
        points.append((chain.gradients_before + peak, chain.seconds + seconds, linked))
    return [(peak, seconds, _steps(linked)) for peak, seconds, linked in _prune(points)]


def plain(chain: Chain) -> tuple[int, float]:
    """Peak bytes and seconds of the schedule that saves everything."""
    blocks = tuple(replace(block, selective=None, recompute=None) for block in chain.blocks)
    ((need, seconds, _),) = frontier(replace(chain, blocks=blocks), False)
    return need, seconds


def _steps(linked: _Linked) -> Steps:
    found = []
    while linked is not None:
        step, linked = linked
        run = step if isinstance(step, str) else _steps(step)
        found.append("recompute" if run == ("save",) else run)
    return tuple(found)


def _prune(points: _Frontier) -> _Frontier:
    best: _Frontier = []
    for point in sorted(points, key=lambda p: p[:2]):
        if not best or point[1] < best[-1][1]:
            best.append(point)
    if len(best) > _POINTS:  # keep both ends: the least bytes and the least seconds
        best = [best[i * (len(best) - 1) // (_POINTS - 1)] for i in range(_POINTS)]
    return best


def _run_before(
    head: int, kept: int, seconds: float, inner: _Frontier, rest: _Frontier
) -> _Frontier:
    """Put a run before `rest`, pairing schedules of its repetition and of `rest` by need."""
    points: _Frontier = []
    i, j = len(inner) - 1, len(rest) - 1
    while i >= 0 and j >= 0:
        (need, again, repetition), (other, after, steps) = inner[i], rest[j]
        level = max(need, other)
        points.append((max(head, kept + level), seconds + again + after, (repetition, steps)))
        i -= need == level
        j -= other == level
    return points


class _Solver:
    """The dynamic program. All bytes are counted from what stands before an interval begins."""

    def __init__(self, chain: Chain, runs: bool) -> None:
        self.chain, self.blocks, self.grouped = chain, chain.blocks, runs
        self.interval = cache(self.interval)  # type: ignore[method-assign]

    def solve(self) -> _Frontier:
        # Small intervals before large ones, so that the recursion stays shallow.
        count = len(self.blocks)
        for end in range(0 if self.grouped else count, count + 1):
            for start in range(end, -1, -1):
                self.interval(start, end, True)
        return self.interval(0, count, self.chain.input_held)

    def interval(
        self, start: int, end: int, held: bool, shared: frozenset[Any] = frozenset()
    ) -> _Frontier:
        """Schedules of the blocks from `start` on: forward and backward.

        They end with the tail, where `end` is its index, or with the last block of a run that is
        repeated, while the gradient of the run's output waits. `held` says whether something else
        holds the input of the interval until backward, and `shared` what earlier blocks keep.
        """
        chain, to_tail = self.chain, end == len(self.blocks)
        waiting = 0 if held else chain.size(start)
        base = chain.head_frames - self.bytes(shared) if to_tail else self.gradients(end)
        if to_tail and start == end:
            return [(self.need(chain.tail, base, 0, waiting), 0.0, None)]
        block, back = self.blocks[start], self.gradients(start)
        if not to_tail and block.recompute is None:
            return []
        if start == end:  # the repetition stops as soon as backward has what it needs
            assert block.recompute is not None
            again = base + waiting + block.recompute.again_peak
            peak = max(again, self.backward(block.save, back, waiting))
            return [(peak, block.recompute.seconds, ("save", None))]
        points: _Frontier = []
        modes = [("save", block.save), ("selective", block.selective if to_tail else None)]
        for step, mode in modes:
            if mode is None:
                continue
            new = self.bytes(mode.shared - shared)
            need = self.need(mode, base, back, waiting, new)
            kept = new + mode.kept + (waiting if mode.keeps_input else 0)
            stays = held or mode.keeps_input if block.aliases else mode.keeps_output
            points += [
                (max(need, kept + later), mode.seconds + seconds, (step, after))
                for later, seconds, after in self.interval(
                    start + 1, end, stays, shared | mode.shared
                )
            ]
        for last, need, kept, seconds, aliased in self.runs(start, end - 1, waiting):
            taken = block.recompute.shared if block.recompute and to_tail else frozenset[Any]()
            more = kept + self.bytes(taken - shared)
            inner = self.interval(start, last, True)
            rest = self.interval(last + 1, end, aliased, shared | taken)
            points += _run_before(base + need, more, seconds, inner, rest)
        return _prune(points)

    def bytes(self, shared: frozenset[Any]) -> int:
        return sum(self.chain.shared[number] for number in shared)

    def gradients(self, index: int) -> int:
        """Bytes of the gradients that stand as backward reaches a block, that of its output too."""
        return self.blocks[index].output_gradient + self.chain.gradients[index + 1]

    def need(self, mode: Mode, base: int, back: int, waiting: int, new: int = 0) -> int:
        return max(base + waiting + mode.forward_peak, new + self.backward(mode, back, waiting))

    def backward(self, mode: Mode, back: int, waiting: int) -> int:
        if waiting and mode.keeps_input:
            return mode.kept + waiting + back + mode.backward_peak_freed
        return mode.kept + back + mode.backward_peak

    def runs(self, s: int, last: int, waiting: int) -> Iterator[tuple[int, int, int, float, bool]]:
        """Runs from `s`: end, need of the forward, bytes kept, seconds, whether output is input."""
        need, left, seconds, current, aliased = 0, 0, 0.0, 0, True
        for k in range(s, last + 1 if self.grouped else min(s, last) + 1):
            block = self.blocks[k]
            if block.recompute is None or (aliased and block.overwrites):
                return  # it would compute on another input the second time
            need = max(need, waiting + current + left + block.recompute.forward_peak)
            left += block.recompute.left
            seconds += block.recompute.forward_seconds
            aliased = aliased and block.aliases
            current = 0 if aliased else block.output
            yield k, need, waiting + left + self.chain.checkpoint_bytes, seconds, aliased


def length(step: Step) -> int:
    """How many blocks a step, or the steps of a run, stand for."""
    return 1 if isinstance(step, str) else sum(length(inner) for inner in step)
