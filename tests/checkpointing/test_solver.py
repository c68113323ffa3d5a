"""The program of checkpoint plans against every schedule there is, by a simulator of its own."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import pytest

from autograd_lib.checkpointing import solver
from autograd_lib.checkpointing.solver import (
    Block,
    Chain,
    Mode,
    Recomputation,
    frontier,
    length,
    plain,
)

# Every schedule


@cache
def runs(count: int) -> tuple[Any, ...]:
    """All ways to repeat a run: its last block is saved, what comes before may hold runs."""
    return tuple((*steps, "save") for steps in sequences(count - 1, ("save",)))


@cache
def sequences(count: int, single: tuple[str, ...]) -> tuple[Any, ...]:
    """All schedules of `count` blocks: each by one of `single`, or under runs within runs."""
    if count == 0:
        return ((),)
    found = [(step, *rest) for rest in sequences(count - 1, single) for step in single]
    for size in range(1, count + 1):
        for run in runs(size):
            step = "recompute" if size == 1 else run
            found += [(step, *rest) for rest in sequences(count - size, single)]
    return tuple(found)


def flat(count: int, single: tuple[str, ...]) -> list[Any]:
    """All schedules with runs that hold no runs."""
    if count == 0:
        return [()]
    found = [(step, *rest) for rest in flat(count - 1, single) for step in single]
    for size in range(1, count + 1):
        step = "recompute" if size == 1 else ("save",) * size
        found += [(step, *rest) for rest in flat(count - size, single)]
    return found


def allowed(chain: Chain, steps: Any, start: int = 0) -> bool:
    """Whether all blocks can be run by their steps."""
    for step in steps:
        block, end = chain.blocks[start], start + length(step)
        if step == "selective" and block.selective is None:
            return False
        if step not in ("save", "selective"):
            inside = chain.blocks[start:end]
            views = next((i for i, b in enumerate(inside) if not b.aliases), len(inside))
            if any(b.recompute is None for b in inside):
                return False
            if any(b.overwrites for b in inside[: views + 1]):  # of the input that is kept
                return False
            if not isinstance(step, str) and not allowed(chain, step, start):
                return False
        start = end
    return True


# What is allocated, by who holds it


class Storage:
    def __init__(self, nbytes: int, *holders: object) -> None:
        self.nbytes, self.holders = nbytes, list(holders)


class Simulator:
    """Run a step: storages stand as long as somebody holds them."""

    def __init__(self, chain: Chain) -> None:
        self.chain, self.storages = chain, []
        self.peak, self.seconds = 0, chain.seconds

    def new(self, nbytes: int, *holders: object) -> Storage:
        storage = Storage(nbytes, *holders)
        self.storages.append(storage)
        return storage

    def release(self, holder: object) -> None:
        for storage in self.storages:
            if holder in storage.holders:
                storage.holders.remove(holder)
        self.storages = [storage for storage in self.storages if storage.holders]

    def moment(self, more: int) -> None:
        self.peak = max(self.peak, sum(s.nbytes for s in self.storages) + more)

    def step(self, steps: Any) -> tuple[int, float]:
        chain = self.chain
        self.new(chain.gradients_before, "always")
        self.moment(chain.head_forward_peak)
        self.new(chain.head_kept, "head")
        self.new(chain.head_frames - sum(chain.shared.values()), "frames")
        self.shared = {k: self.new(nbytes, "frames") for k, nbytes in chain.shared.items()}
        x = self.new(0 if chain.input_held else chain.input, "current")
        if chain.input_held:
            x.holders.append("head")
        x, back = self.forward(steps, 0, x)
        tail = object()
        self.moment(chain.tail.forward_peak)
        self.keep(chain.tail, tail, x, None)
        self.release("current")
        self.release("frames")
        self.backward(chain.tail, tail, x, 0, chain.tail_parameters)
        self.go_back(back)
        self.moment(chain.input_gradient + chain.head_backward_peak)
        return self.peak, self.seconds

    def keep(self, mode: Mode, owner: object, x: Storage, y: Storage | None) -> None:
        for number in mode.shared:
            self.shared[number].holders.append(owner)
        if mode.keeps_input:
            x.holders.append(owner)
        if mode.keeps_output and y is not None:
            y.holders.append(owner)
            self.new(mode.kept - y.nbytes, owner)
        else:
            self.new(mode.kept, owner)

    def output(self, last: Block, x: Storage, aliases: bool) -> Storage:
        if aliases:
            return x
        self.release("current")
        return self.new(last.output, "current")

    def forward(self, steps: Any, start: int, x: Storage) -> tuple[Storage, list[Any]]:
        back = []
        for step in steps:
            owner, end = object(), start + length(step)
            blocks = self.chain.blocks[start:end]
            if step in ("save", "selective"):
                mode = blocks[0].save if step == "save" else blocks[0].selective
                self.moment(mode.forward_peak)
                self.seconds += mode.seconds
                y = self.output(blocks[0], x, blocks[0].aliases)
                self.keep(mode, owner, x, y)
                if mode.keeps_input and x not in self.storages:  # it was released by the frame
                    self.storages.append(x)
                back.append((mode, owner, x, blocks[0]))
            else:
                x.holders.append(owner)
                for number in blocks[0].recompute.shared if len(blocks) == 1 else ():
                    self.shared[number].holders.append(owner)
                y = x
                for block in blocks:
                    self.moment(block.recompute.forward_peak + (0 if y is x else y.nbytes))
                    self.new(block.recompute.left, owner)
                    self.seconds += block.recompute.forward_seconds
                    y = y if block.aliases else Storage(block.output)
                # afterwards, for the peaks of the forward under a checkpoint have it in them
                self.new(self.chain.checkpoint_bytes, owner)
                y = self.output(blocks[-1], x, y is x)
                back.append((("save",) if step == "recompute" else step, owner, x, start))
            x, start = y, end
        return x, back

    def backward(
        self, mode: Mode, owner: object, x: Storage, gradient: int, parameters: int
    ) -> None:
        alone = mode.keeps_input and x.holders == [owner]
        self.moment(gradient + (mode.backward_peak_freed if alone else mode.backward_peak))
        self.release(owner)
        self.new(parameters, "gradients")

    def go_back(self, back: list[Any]) -> None:
        for how, owner, x, what in reversed(back):
            if isinstance(how, Mode):
                self.backward(how, owner, x, what.output_gradient, what.parameters)
            else:
                self.again(how, what, x)
                self.release(owner)

    def again(self, steps: Any, start: int, x: Storage) -> None:
        block = self.chain.blocks[start + length(steps) - 1]
        gradient = self.new(block.output_gradient, "gradient")
        x.holders.append("current")
        x, back = self.forward(steps[:-1], start, x)
        self.moment(block.recompute.again_peak)
        last = object()
        self.keep(block.save, last, x, None)
        self.release("current")
        self.storages.remove(gradient)
        self.backward(block.save, last, x, gradient.nbytes, block.parameters)
        self.seconds += block.recompute.seconds
        self.go_back(back)


def simulate(chain: Chain, steps: Any) -> tuple[int, float]:
    return Simulator(chain).step(steps)


# Chains


def random_chain(draw: random.Random, count: int, *, easy: bool = False) -> Chain:
    """Any chain: sizes and seconds are whole numbers, so that all sums are exact."""

    def nbytes(most: int = 20) -> int:
        return draw.randint(0, most)

    def mode(output: int, aliases: bool) -> Mode:
        keeps_output = not aliases and draw.random() < 0.5
        return Mode(
            seconds=float(draw.randint(1, 30)),
            forward_peak=nbytes(30),
            kept=nbytes() + (output if keeps_output else 0),
            keeps_output=keeps_output,
            keeps_input=draw.random() < 0.5,
            backward_peak=(peak := nbytes()),
            backward_peak_freed=draw.randint(0, peak),
        )

    size = first = draw.randint(1, 20)
    blocks = []
    for _ in range(count):
        aliases = not easy and draw.random() < 0.2
        size = size if aliases else draw.randint(1, 20)
        recompute = Recomputation(
            float(draw.randint(1, 9)),
            nbytes(60),
            nbytes(2),
            float(draw.randint(1, 30)),
            nbytes(60),
        )
        blocks.append(
            Block(
                output=size,
                aliases=aliases,
                overwrites=aliases and draw.random() < 0.5,
                output_gradient=nbytes(),
                parameters=nbytes(5),
                save=mode(size, aliases),
                selective=None if easy or draw.random() < 0.3 else mode(size, aliases),
                recompute=recompute if easy or draw.random() < 0.9 else None,
            )
        )
    tail = mode(0, True)
    return Chain(
        tuple(blocks),
        input=first,
        input_held=draw.random() < 0.3,
        input_gradient=nbytes(),
        head_kept=nbytes(),
        head_frames=nbytes(),
        head_forward_peak=nbytes(60),
        head_backward_peak=nbytes(60),
        tail=tail,
        tail_parameters=nbytes(),
        checkpoint_bytes=nbytes(3),
        seconds=float(nbytes()),
        gradients_before=draw.choice([0, 7]),
    )


def best(points: Iterator[tuple[int, float]] | set[tuple[int, float]]) -> list[tuple[int, float]]:
    """The points that no other beats."""
    found: list[tuple[int, float]] = []
    for point in sorted(points):
        if not found or point[1] < found[-1][1]:
            found.append(point)
    return found


def check(chain: Chain, schedules: Any, runs: bool) -> None:
    expected = {}
    for steps in schedules:
        if allowed(chain, steps):
            expected[steps] = simulate(chain, steps)
    found = frontier(chain, runs)
    assert [point[:2] for point in found] == best(set(expected.values()))
    for nbytes, seconds, steps in found:
        assert expected[steps] == (nbytes, seconds)


# Few chains of the lengths whose schedules are counted in thousands
@pytest.mark.parametrize(("count", "chains"), [(1, 40), (2, 40), (3, 40), (4, 40), (5, 20), (6, 4)])
def test_against_all_schedules(count: int, chains: int) -> None:
    for seed in range(chains):
        chain = random_chain(random.Random(100 * count + seed), count)
        check(chain, sequences(count, ("save", "selective")), runs=True)


def test_number_of_schedules() -> None:
    """The runs within runs are the bracketings that Schröder counted."""
    assert [len(runs(n)) for n in range(1, 8)] == [1, 2, 6, 22, 90, 394, 1806]


@pytest.mark.parametrize(("count", "seed"), [(7, 0), (7, 1), (8, 0)])
def test_against_all_schedules_of_long_chains(count: int, seed: int) -> None:
    """Without selective steps, of which there would be 103049 schedules for eight blocks."""
    chain = random_chain(random.Random(seed), count, easy=True)
    check(chain, sequences(count, ("save",)), runs=True)


@pytest.mark.parametrize("count", [1, 2, 4, 6, 8])
def test_against_all_schedules_without_runs(count: int) -> None:
    for seed in range(6 if count < 8 else 1):
        chain = random_chain(random.Random(seed), count)
        singles = {s for s in flat(count, ("save", "selective")) if len(s) == count}
        assert len(singles) == 3**count
        check(chain, singles, runs=False)


@pytest.mark.parametrize("count", [1, 2, 4, 6])
def test_shared_arguments_against_all_schedules(count: int) -> None:
    """Masks and tables that stand in the forward, and after it as long as some block keeps them."""
    for seed in range(10):
        draw = random.Random(seed)
        chain = random_chain(draw, count)
        shared = {number: draw.randint(0, 20) for number in range(3)}

        def taking(way: Any, draw: random.Random = draw) -> Any:
            return way and replace(way, shared=frozenset(draw.sample(range(3), draw.randint(0, 3))))

        blocks = tuple(
            replace(
                block,
                save=taking(block.save),
                selective=taking(block.selective),
                recompute=taking(block.recompute),
            )
            for block in chain.blocks
        )
        frames = chain.head_frames + sum(shared.values())
        chain = replace(chain, blocks=blocks, shared=shared, head_frames=frames)
        singles = {s for s in flat(count, ("save", "selective")) if len(s) == count}
        check(chain, singles, runs=False)


@pytest.mark.parametrize("count", [1, 2, 5, 20])
def test_the_plain_schedule(count: int) -> None:
    for seed in range(20):
        chain = random_chain(random.Random(seed), count)
        assert plain(chain) == simulate(chain, ("save",) * count)


def test_schedules_of_long_chains_cost_what_the_frontier_says() -> None:
    """For chains that are too long to list their schedules."""
    for seed in range(5):
        chain = random_chain(random.Random(seed), 20)
        for nbytes, seconds, steps in frontier(chain, True)[::10]:
            assert simulate(chain, steps) == (nbytes, seconds)


# The homogeneous case


def homogeneous(count: int, tape: int) -> Chain:
    """A state of one byte; what one block saves fills the memory; only forwards cost time."""
    save = Mode(0.0, tape, tape, False, True, 0, 0)
    again = Recomputation(1.0, 1, 0, 0.0, tape)
    block = Block(1, False, False, 0, 0, save, None, again)
    last = Block(0, False, False, 0, 0, save, None, again)
    tail = Mode(0.0, 0, 0, False, False, 0, 0)
    return Chain((*[block] * (count - 1), last), 1, False, 0, 0, 0, 0, 0, tail, 0, 0, 0.0)


def binomial(count: int, checkpoints: int) -> int:
    """Fewest forward steps to reverse `count` of them (Griewank and Walther, 2000)."""
    repeats = 0
    while math.comb(checkpoints + repeats, checkpoints) < count:
        repeats += 1
    if not repeats:
        return 0
    return repeats * count - math.comb(checkpoints + repeats, repeats - 1)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 10, 16, 21])
def test_binomial_schedules(count: int) -> None:
    tape = 1000
    found = frontier(homogeneous(count, tape), True)
    for checkpoints in range(1, count + 1):
        fitting = [t for nbytes, t, _ in found if nbytes <= tape + checkpoints + 1]
        assert min(fitting) == binomial(count, checkpoints)


def test_binomial_numbers() -> None:
    """The formula against the recurrence behind it, and the figures of the paper's example."""

    @cache
    def fewest(count: int, checkpoints: int) -> int:
        if count == 1:
            return 0
        if checkpoints == 1:
            return count * (count - 1) // 2
        return min(
            m + fewest(count - m, checkpoints - 1) + fewest(m, checkpoints) for m in range(1, count)
        )

    for count in range(1, 25):
        for checkpoints in range(1, count + 1):
            assert binomial(count, checkpoints) == fewest(count, checkpoints)


def test_memory_and_repetition_grow_with_the_logarithm() -> None:
    """35 blocks fit four states where each runs at most three times forward: C(7, 3) = 35."""
    found = frontier(homogeneous(35, 10_000), True)
    seconds = min(t for nbytes, t, _ in found if nbytes <= 10_000 + 4 + 1)
    assert seconds == binomial(35, 4) <= 3 * 35


# The list of trade-offs


def test_frontier_is_monotone() -> None:
    for seed in range(10):
        points = frontier(random_chain(random.Random(seed), 12), True)
        assert all(a[0] < b[0] and a[1] > b[1] for a, b in pairwise(points))


def test_thinning_keeps_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    chain = random_chain(random.Random(3), 14)
    whole = frontier(chain, True)
    assert len(whole) > 20
    monkeypatch.setattr(solver, "_POINTS", 6)
    few = frontier(chain, True)
    assert 2 < len(few) <= 6
    assert few[0][:2] == whole[0][:2]
    assert few[-1][:2] == whole[-1][:2]
    assert all(simulate(chain, steps) == (nbytes, seconds) for nbytes, seconds, steps in few)


def test_no_more_points_than_are_useful() -> None:
    """A chain of 40 blocks of real sizes has thousands of trade-offs; lists of them are thinned."""
    draw = random.Random(0)

    def block() -> Block:
        save = Mode(1.0, 0, draw.randrange(10**7), False, False, 0, 0)
        selective = Mode(1 + draw.random(), 0, draw.randrange(10**6), False, False, 0, 0)
        return Block(1, False, False, 0, 0, save, selective, None)

    tail = Mode(0.0, 0, 0, False, False, 0, 0)
    blocks = tuple(block() for _ in range(40))
    chain = Chain(blocks, 1, False, 0, 0, 0, 0, 0, tail, 0, 0, 0.0)
    points = frontier(chain, True)
    assert len(points) == 256
    least = sum(b.selective.kept if b.selective.kept < b.save.kept else b.save.kept for b in blocks)
    assert points[0][0] == pytest.approx(least, abs=2)
    assert points[-1][1] == 40


def test_refused_blocks_are_in_no_run() -> None:
    for seed in range(10):
        chain = random_chain(random.Random(seed), 8)
        for _, _, steps in frontier(chain, True):
            assert allowed(chain, steps)


def test_long_chains() -> None:
    """Longer than a plain recursion over the blocks could be."""
    points = frontier(homogeneous(600, 10_000), False)
    assert length(points[0][2]) == 600
    chain = homogeneous(1200, 10_000)
    assert plain(chain) == simulate(chain, ("save",) * 1200)


def test_length() -> None:
    assert length("save") == 1
    assert length((("save", "recompute"), "save", ("save", ("save", "save")))) == 6
