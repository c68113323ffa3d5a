"""One candidate after the other: its gradient error, its peak and its time, and how it fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from autograd_lib.config.records import Settings
from autograd_lib.report.tables import readable_bytes
from autograd_lib.tuning.trials import Trial
from autograd_lib.tuning.workbench import Workbench, is_out_of_memory

_T = TypeVar("_T")

ALLOWED = 30  # plain steps that a search may take for each candidate
_LOOKS = 3


class Candidates:
    """What was measured so far, with a verdict for each candidate that is out.

    Attributes:
        trials: By settings.
        notes: Sentences for the report.
        starved: Whether the last failure was for want of memory.
        expected: How many candidates there will be, as far as can be told.
    """

    def __init__(
        self, bench: Workbench, budget: int, tolerance: float, show: Callable[[str], None]
    ) -> None:
        self.bench, self.budget, self.tolerance, self.show = bench, budget, tolerance, show
        self.trials: dict[Settings, Trial] = {}
        self.notes: list[str] = []
        self.starved, self.expected = False, 0

    def record(self, settings: Settings, **found: Any) -> None:
        self.trials[settings] = replace(self.trials.get(settings, Trial(settings)), **found)

    def has_failed(self, settings: Settings) -> bool:
        return settings in self.trials and self.trials[settings].verdict.startswith("failed")

    def attempt(self, settings: Settings, measure: Callable[[Settings], _T]) -> _T | None:
        """Measure, unless it fails: then say how in the verdict, and clear up."""
        try:
            return measure(settings)
        except Exception as error:
            # Whatever it is, the search goes on; memory that ran out leads to smaller steps.
            self.starved = is_out_of_memory(error)
            lines = str(error).strip().splitlines() or [""]
            verdict = f"failed: {type(error).__name__}: {lines[0]:.60}".removesuffix(": ")
        # Leave `except` first, so that the traceback frees its tensors.
        self.record(settings, verdict=verdict)
        self.bench.forget()
        torch.cuda.empty_cache()
        return None

    def measured(self, settings: Settings, measure: Callable[[Settings], _T]) -> _T | None:
        self.announce(str(settings), len(self.trials | {settings: None}))
        return self.attempt(settings, measure)

    def announce(self, what: str, number: int | None = None) -> None:
        """Show what is tried, how many candidates are left, and what the search takes at most."""
        number = number or len(self.trials)
        plain, total = self.trials.get(Settings(), Trial(Settings())).time, self.expected
        text = f"candidate {number} of {max(number, total)}"
        if plain is not None:
            text += f", {ALLOWED * plain * max(number, total):.0f} s at most without compiling"
        self.show(f"{text}: {what}")

    def is_accurate(self, settings: Settings) -> bool:
        error = self.trials.get(settings, Trial(settings)).gradient_error
        if error is None and (error := self.measured(settings, self.bench.error)) is not None:
            self.record(settings, gradient_error=error)
            if not error <= self.tolerance:  # NaN is not
                self.record(settings, verdict=f"error {error:.1e} over {self.tolerance:.1e}")
        return error is not None and error <= self.tolerance

    def fits(self, settings: Settings) -> bool:
        peak = self.measured(settings, self.bench.peak)
        if peak is not None:
            self.record(settings, peak_bytes=peak)
            if peak > self.budget:
                excess = readable_bytes(peak - self.budget)
                self.record(settings, verdict=f"peak {excess} over budget")
        return peak is not None and peak <= self.budget

    def fast(self, candidates: Sequence[Settings], times: float) -> list[Settings]:
        """Those that take at most so many times what the fastest does, the fastest first.

        Each runs one step. One that takes longer runs again, each time right after the fastest, as
        what slows the machine lasts for several steps; the best of three counts.
        """
        look, seconds = self.bench.seconds, dict[Settings, float]()
        fastest, least, slow = Settings(), 0.0, list[Settings]()
        for again in range(_LOOKS):
            for s in slow if again else candidates:
                beside = self.attempt(fastest, look) if again else None
                if (took := self.measured(s, look)) is not None:
                    scaled = took * least / beside if beside else took
                    seconds[s] = min(scaled, seconds.get(s, math.inf))
            seconds = {s: took for s, took in seconds.items() if not self.has_failed(s)}
            fastest = min(seconds, key=seconds.__getitem__, default=Settings())
            least = seconds.get(fastest, 0.0)
            slow = [s for s, took in seconds.items() if took > times * least]
        for s, took in seconds.items():
            self.record(s, time=took)
            if s in slow:
                verdict = f"slower: {took / least:.1f} times the fastest in a first look"
                self.record(s, verdict=verdict)
        return sorted((s for s in seconds if s not in slow), key=seconds.__getitem__)

    def note(self, sentence: str) -> None:
        if sentence not in self.notes:
            self.notes.append(sentence)
