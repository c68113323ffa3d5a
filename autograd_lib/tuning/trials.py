"""What a search found: a trial for each candidate, and the report of all."""

from __future__ import annotations

from dataclasses import dataclass

from autograd_lib.benchmark import Ratio
from autograd_lib.config.records import Settings
from autograd_lib.report.tables import Row, Table, readable_bytes


@dataclass(frozen=True)
class Trial:
    """What was found out about one candidate; what was not measured is None.

    Attributes:
        settings: The candidate.
        time: Seconds of one step: forward and backward of the whole batch, and the optimizer's
            step where there is one.
        peak_bytes: Peak of the step above what stood before it, as `peak_bytes` measures it, and
            the optimizer's state.
        gradient_error: Relative L2 error of the gradient, over all parameters, against float64,
            with the probability of dropout at 0.
        verdict: Why it is the best, or what it fell short in.
    """

    settings: Settings
    time: float | None = None
    peak_bytes: int | None = None
    gradient_error: float | None = None
    verdict: str = ""


@dataclass(frozen=True, eq=False, repr=False)
class TuningReport(Table):
    """What `autotune` tried and chose; prints as a table, in a notebook as HTML.

    Attributes:
        best: The settings chosen.
        trials: All candidates, the best first, then by time.
        noise: Time of a candidate relative to itself in the race that decided.
        notes: What was left out of the search, and why; one sentence each.
        seconds: What the search took.
        memory_budget: Bytes; None for no limit.
        tolerance: Largest gradient error, as given.
    """

    best: Settings
    trials: tuple[Trial, ...]
    noise: Ratio
    notes: tuple[str, ...]
    seconds: float
    memory_budget: int | None
    tolerance: float

    def table(self) -> str:
        """The trials as text, one a line, and the notes."""
        return repr(self)

    def _table(self) -> tuple[str, Row, list[Row]]:
        budget = "no budget"
        if self.memory_budget is not None:
            budget = f"budget {readable_bytes(self.memory_budget)}"
        title = (
            f"{len(self.trials)} candidates in {self.seconds:.0f} s; {budget}, gradient error up "
            f"to {self.tolerance:.2g}, A/A noise {self.noise}"
        )
        least = self.trials[0].time or 0.0

        def row(t: Trial) -> list[str]:
            times = ["", ""]
            if t.time is not None:
                # A first look is one step, to be compared with other first looks alone.
                raced = t.verdict.startswith(("best", "tie", "slower")) and "look" not in t.verdict
                times = [f"{1e3 * t.time:.4g} ms", f"{t.time / least:.2f}" if raced else ""]
            peak = "" if t.peak_bytes is None else readable_bytes(t.peak_bytes)
            error = "" if t.gradient_error is None else f"{t.gradient_error:.1e}"
            return [str(t.settings), *times, peak, error, t.verdict]

        rows: list[Row] = [row(trial) for trial in self.trials]
        return title, ("settings", "time", "ratio", "peak", "error", "verdict"), rows
