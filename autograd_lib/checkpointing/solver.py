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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
    """

    seconds: float
    forward_peak: int
    kept: int
    keeps_output: bool
    keeps_input: bool
    backward_peak: int
    backward_peak_freed: int


@dataclass(frozen=True)
class Recomputation:
    """The costs of a block under a checkpoint.

    Attributes:
        forward_seconds: The first forward, which saves nothing.
        forward_peak: High-water mark of the first forward, its output included.
        left: What the first forward leaves until backward, without input and output.
        seconds: The repeated forward and the backward.
        alone_peak: High-water mark of these two for a checkpoint around this block alone.
        again_peak: High-water mark of the repeated forward.
    """

    forward_seconds: float
    forward_peak: int
    left: int
    seconds: float
    alone_peak: int
    again_peak: int


@dataclass(frozen=True)
class Block:
    """The measured properties of one block.

    Attributes:
        name: For reports.
        output: Bytes of its output's storage.
        aliases: Whether the output is the input's storage, as of a view.
        overwrites: Whether the input is modified in place.
        output_gradient: Bytes of the gradient with respect to the output.
        parameters: Bytes of the gradients of its parameters that no later block has made.
        save: Its costs unchanged.
        selective: Its costs under a selective checkpoint; None if it cannot run so.
        recompute: Its costs under a checkpoint; None if that fails or changes gradients.
    """

    name: str
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
    gradients_before: int = 0

    @cached_property
    def gradients(self) -> tuple[int, ...]:
        """Bytes of parameter gradients made by the tail and by the blocks from each index on."""
        later = accumulate([self.tail_parameters, *(b.parameters for b in reversed(self.blocks))])
        return tuple(later)[::-1]

    def size(self, index: int) -> int:
        """Bytes of the input of block `index`; after the last block, of the input of the tail."""
        return self.blocks[index - 1].output if index else self.input


def recomputable(blocks: Sequence[Block]) -> bool:
    """Whether these blocks can stand under one checkpoint.

    A block that overwrites the input that the checkpoint keeps would compute on another input the
    second time.
    """
    aliased = True  # the output so far is the kept input
    for block in blocks:
        if block.recompute is None or (aliased and block.overwrites):
            return False
        aliased = aliased and block.aliases
    return True


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
    found = _Solver(chain, runs).solve()
    points = _prune([(*_with_head(chain, need, t), steps) for need, t, steps in found])
    return [(need, t, _steps(linked)) for need, t, linked in points]


def evaluate(chain: Chain, steps: Steps) -> tuple[int, float]:
    """Peak bytes and seconds of one schedule: the program, with no other step to choose from.

    Its runs must be `recomputable`.
    """
    given = dict(_choices(steps, 0, len(chain.blocks)))
    ((need, seconds, _),) = _Solver(chain, True, given).solve()
    return _with_head(chain, need, seconds)


def _choices(steps: Steps, start: int, end: int) -> Iterator[tuple[tuple[int, int], Step]]:
    """Each step by the block it starts at and the end of the run around it (or of the chain)."""
    for step in steps:
        yield (start, end), step
        after = start + length(step)
        if not isinstance(step, str):
            yield from _choices(step, start, after - 1)
        start = after


def _with_head(chain: Chain, need: int, seconds: float) -> tuple[int, float]:
    """Add the costs of the head to those of blocks and tail."""
    last = chain.head_kept + chain.input_gradient + chain.gradients[0] + chain.head_backward_peak
    peak = max(chain.head_forward_peak, chain.head_kept + need, last)
    return chain.gradients_before + peak, chain.seconds + seconds


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


def _before(head: int, kept: int, seconds: float, step: str, rest: _Frontier) -> _Frontier:
    """Put one block before `rest`: it needs `head` itself and keeps `kept` while `rest` runs."""
    return [(max(head, kept + need), seconds + t, (step, after)) for need, t, after in rest]


def _run_before(
    head: int, kept: int, seconds: float, inner: _Frontier, rest: _Frontier
) -> _Frontier:
    """Put a run before `rest`, pairing schedules of its repetition and of `rest` by need."""
    points: _Frontier = []
    if not inner or not rest:
        return points
    i = j = 0
    level = max(inner[0][0], rest[0][0])
    while True:
        while i + 1 < len(inner) and inner[i + 1][0] <= level:
            i += 1
        while j + 1 < len(rest) and rest[j + 1][0] <= level:
            j += 1
        steps = inner[i][2], rest[j][2]
        points.append((max(head, kept + level), seconds + inner[i][1] + rest[j][1], steps))
        higher = [f[at + 1][0] for f, at in ((inner, i), (rest, j)) if at + 1 < len(f)]
        if not higher:
            return points
        level = min(higher)


class _Solver:
    """The dynamic program. All bytes are counted from what stands before an interval begins.

    `held` says whether something else holds the input of the interval until backward.

    Args:
        chain: The costs.
        runs: Whether several blocks may stand under one checkpoint.
        given: The steps to take, as `_choices` lists them; None to choose.
    """

    def __init__(
        self, chain: Chain, runs: bool, given: dict[tuple[int, int], Step] | None = None
    ) -> None:
        self.chain, self.blocks, self.grouped, self.given = chain, chain.blocks, runs, given
        self.first = cache(self.first)  # type: ignore[method-assign]
        self.again = cache(self.again)  # type: ignore[method-assign]

    def solve(self) -> _Frontier:
        # Small intervals before large ones, so that the recursion stays shallow.
        count = len(self.blocks)
        for k in range(count if self.grouped and self.given is None else 0):
            for j in range(k, -1, -1):
                self.again(j, k, True)
        for s in range(count, -1, -1):
            if self.given is None or s == count or (s, count) in self.given:
                self.first(s, True)
        return self.first(0, self.chain.input_held)

    def open(self, start: int, end: int, step: Step, blocks: int = 1) -> bool:
        """Whether this step may be chosen; of a run only the number of its blocks matters."""
        if self.given is None:
            return True
        given = self.given[start, end]
        if step in ("save", "selective") or given in ("save", "selective"):
            return bool(step == given)
        return length(given) == blocks

    def first(self, s: int, held: bool) -> _Frontier:
        """Blocks from `s` to the tail: forward and backward."""
        chain = self.chain
        waiting = 0 if held else chain.size(s)
        if s == len(self.blocks):
            need, _, _ = self.cost(chain.tail, chain.head_frames, 0, waiting)
            return [(need, 0.0, None)]
        block, points = self.blocks[s], []
        for step, mode in (("save", block.save), ("selective", block.selective)):
            if mode is not None and self.open(s, len(self.blocks), step):
                back = block.output_gradient + chain.gradients[s + 1]
                need, kept, own = self.cost(mode, chain.head_frames, back, waiting)
                stays = held or mode.keeps_input if block.aliases else own
                points += _before(need, kept, mode.seconds, step, self.first(s + 1, stays))
        for k, need, kept, seconds, aliased in self.runs(s, len(self.blocks) - 1, waiting):
            if not self.open(s, len(self.blocks), "recompute", k - s + 1):
                continue
            rest = self.first(k + 1, aliased)
            head = chain.head_frames + need
            points += _run_before(head, kept, seconds, self.repeat(s, k), rest)
        return _prune(points)

    def repeat(self, s: int, k: int) -> _Frontier:
        """The run from `s` to `k` in backward: forward again, and backward."""
        block = self.blocks[k]
        if s < k:
            return self.again(s, k, True)
        assert block.recompute is not None
        base = block.output_gradient + self.chain.gradients[k + 1]
        return [(base + block.recompute.alone_peak, block.recompute.seconds, ("save", None))]

    def again(self, j: int, k: int, held: bool) -> _Frontier:
        """Blocks `j` to `k`, the end of a run, while the gradient of its output waits."""
        chain, block = self.chain, self.blocks[j]
        base = self.blocks[k].output_gradient + chain.gradients[k + 1]
        waiting = 0 if held else chain.size(j)
        back = block.output_gradient + chain.gradients[j + 1]
        if block.recompute is None:
            return []
        if j == k:  # the repetition stops as soon as backward has what it needs
            peak = max(
                base + waiting + block.recompute.again_peak, self.back(block.save, back, waiting)
            )
            return [(peak, block.recompute.seconds, ("save", None))]
        points: _Frontier = []
        if self.open(j, k, "save"):
            need, kept, own = self.cost(block.save, base, back, waiting)
            stays = held or block.save.keeps_input if block.aliases else own
            points += _before(need, kept, block.save.seconds, "save", self.again(j + 1, k, stays))
        for m, need, kept, seconds, aliased in self.runs(j, k - 1, waiting):
            if not self.open(j, k, "recompute", m - j + 1):
                continue
            rest = self.again(m + 1, k, aliased)
            points += _run_before(base + need, kept, seconds, self.repeat(j, m), rest)
        return _prune(points)

    def cost(self, mode: Mode, base: int, back: int, waiting: int) -> tuple[int, int, bool]:
        """Need of one block, what it keeps, and whether that includes its output."""
        need = max(base + waiting + mode.forward_peak, self.back(mode, back, waiting))
        return need, mode.kept + (waiting if mode.keeps_input else 0), mode.keeps_output

    def back(self, mode: Mode, back: int, waiting: int) -> int:
        if waiting and mode.keeps_input:
            return mode.kept + waiting + back + mode.backward_peak_freed
        return mode.kept + back + mode.backward_peak

    def runs(self, s: int, last: int, waiting: int) -> Iterator[tuple[int, int, int, float, bool]]:
        """Runs from `s`: end, need of the forward, bytes kept, seconds, whether output is input."""
        need, left, seconds, current, aliased = 0, 0, 0.0, 0, True
        for k in range(s, last + 1 if self.grouped else min(s, last) + 1):
            block = self.blocks[k]
            if block.recompute is None or (aliased and block.overwrites):
                return  # as `recomputable` says
            need = max(need, waiting + current + left + block.recompute.forward_peak)
            left += block.recompute.left
            seconds += block.recompute.forward_seconds
            aliased = aliased and block.aliases
            current = 0 if aliased else block.output
            yield k, need, waiting + left + self.chain.checkpoint_bytes, seconds, aliased


def length(step: Step) -> int:
    """How many blocks a step, or the steps of a run, stand for."""
    return 1 if isinstance(step, str) else sum(length(inner) for inner in step)
