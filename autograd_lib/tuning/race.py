"""Races between candidates: rounds of `compare` that the clear losers do not see the end of."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from autograd_lib.benchmark import Ratio, compare
from autograd_lib.config.records import Settings
from autograd_lib.tuning.candidates import ALLOWED, Candidates

_Ratios = dict[Settings, Ratio]
_ROUNDS = (5, 10, 20)  # the later ones for those that are still in question
_LEAST_ROUNDS, _WARM_UP = 5, 4  # steps of each that a comparison takes
_SHARE = 0.5 * ALLOWED  # plain steps that a race may take for each that enters it
_CLOSE = 1.03  # times of so little difference are a tie without more rounds


class Race:
    """The races of one search.

    Attributes:
        noise: Time of a candidate relative to itself, in the last race.
    """

    def __init__(self, candidates: Candidates) -> None:
        self.candidates, self.trials = candidates, candidates.trials
        self.times: dict[Settings, float] = {}
        self.noise = Ratio(1.0, 1.0, 1.0)

    def run(self, contenders: list[Settings], others: Sequence[Settings] = ()) -> Settings | None:
        """Time contenders and others; return the best contender, None if all of them fail."""
        left, best, plain = [*contenders, *others], None, self.trials.get(Settings())
        self.candidates.bench.keep(left)
        unit = (plain and plain.time) or min(self.trials[s].time or math.inf for s in left)
        allowed = _SHARE * unit * len(left)
        for most in _ROUNDS:
            turn = sum(self.trials[s].time or 0.0 for s in [*left, left[0]]) or unit
            rounds = min(most, int(allowed / turn) - _WARM_UP)
            if best is not None and rounds < _LEAST_ROUNDS:
                break
            rounds = max(rounds, _LEAST_ROUNDS)
            allowed -= (rounds + _WARM_UP) * turn
            ratios, band = self.timed(left, rounds)
            ratios = {s: ratio for s, ratio in ratios.items() if s in contenders}
            if not ratios:
                return None
            best, left, ties = self.settle(ratios, band)
            if len(left) == 1 or (rounds > _LEAST_ROUNDS and len(ties) == len(left)):
                break
        return best

    def timed(self, entered: Sequence[Settings], rounds: int) -> tuple[_Ratios, float]:
        """Ratios to the first of those that do not fail, and how far noise alone takes a ratio."""
        names = {f"{s} ({number})": s for number, s in enumerate(entered)}
        self.candidates.announce(f"{rounds} rounds of {', '.join(map(str, entered))}")
        step = self.candidates.bench.step
        steps = {name: partial(self.guarded, s, step(s)) for name, s in names.items()}
        result = compare(steps, rounds=rounds, memory=False)
        left = [s for s in entered if not self.candidates.has_failed(s)]
        if left and left[0] != entered[0]:
            return self.timed(left, rounds)
        ratios = {names[name]: r for name, r in result.ratios.items() if names[name] in left}
        # Times of later races refer to those of the first: the machine may have slowed since.
        unit = self.times.get(entered[0], result.medians[result.baseline])
        for s, ratio in ratios.items():
            self.times[s] = unit * ratio.median
            self.candidates.record(s, time=self.times[s])
        self.noise = result.noise
        return ratios, result.noise_band[1]

    def guarded(self, settings: Settings, step: Callable[[], None]) -> None:
        """One step, or nothing once it has failed."""
        if not self.candidates.has_failed(settings):
            self.candidates.attempt(settings, lambda _: step())

    def settle(
        self, ratios: _Ratios, band: float
    ) -> tuple[Settings, list[Settings], list[Settings]]:
        """Choose the smallest peak among the ties.

        Returns:
            The best; those that noise does not tell from the fastest, the fastest first; and the
            ties, those of them that are close to it as well.
        """
        order = sorted(ratios, key=lambda s: ratios[s].median)
        level = ratios[order[0]].median
        left = [s for s in order if ratios[s].low <= level * band]
        # On a noisy machine that may be half the field; the choice is among the close ones.
        ties = [s for s in left if ratios[s].median <= _CLOSE * level]
        best = min(ties, key=lambda s: self.trials[s].peak_bytes or 0)
        for s, ratio in ratios.items():
            scaled = Ratio(*(value / level for value in ratio))
            if ratio == (1.0, 1.0, 1.0):  # the baseline: the interval is that of the fastest
                low, high = ratios[order[0]][1:]
                scaled = Ratio(1 / level, 1 / high, 1 / low)
            verdict = f"slower: {scaled} times the fastest"
            if s == best:
                among = f": a tie of {len(ties)}, at the smallest peak" if len(ties) > 1 else ""
                verdict = f"best{among}"
            elif s in ties:
                verdict = "tie: as fast as the best, at no smaller peak"
            elif s in left:
                verdict = f"tie: {scaled} times the fastest, within the noise"
            self.candidates.record(s, verdict=verdict)
        return best, left, ties

    def compiled(self, eager: Settings) -> Settings:
        """Compile the winner; return what is best then."""
        candidates, compiled = self.candidates, replace(eager, compile=True)
        raced = [s for s in self.times if self.trials[s].verdict.startswith(("tie", "slower"))]
        candidates.bench.keep([eager, compiled])
        torch.compiler.reset()
        with warnings.catch_warnings():  # of Dynamo, of the inputs of the blocks it traces
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a")
            first = candidates.measured(compiled, candidates.bench.seconds)
            sound = first is not None and candidates.fits(compiled)
            sound = sound and candidates.is_accurate(compiled)
        best = self.run([eager, compiled]) if sound else None
        torch.compiler.reset()
        if first is None or best is None or candidates.has_failed(compiled):
            return eager
        cost = max(0.0, first - self.times[compiled])
        candidates.note(f"{compiled}: compiling took {cost:.1f} s.")
        for s in raced if best == compiled else ():
            times = self.times[s] / self.times[best]
            candidates.record(s, verdict=f"slower: {times:.2f} times the best")
        return best
