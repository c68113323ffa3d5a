"""What a search found: a trial for each candidate, and the report of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from autograd_lib.benchmark import Ratio
from autograd_lib.config.records import Settings
from autograd_lib.report.plots import BLUE, GREEN, GREY, ORANGE, PURPLE, add_legend, make_axes
from autograd_lib.report.tables import Row, Table, readable_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Marker, color, size and label of a trial in a figure, by the first word of its verdict.
_LOOKS = {
    "best": ("*", GREEN, 13, "best"),
    "tie": ("D", BLUE, 7, "tie"),
    "slower": ("o", GREY, 6, "slower"),
    "peak": ("s", ORANGE, 6, "over budget"),
    "error": ("X", PURPLE, 7, "error over tolerance"),
}


@dataclass(frozen=True)
class Trial:
    """What was found out about one candidate; what was not measured is None.

    Attributes:
        settings: The candidate.
        time: Seconds of one step, forward and backward of the whole batch.
        peak_bytes: Peak of the step above what stood before it, as `peak_bytes` measures it.
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
    """What `autotune` tried and chose; prints as a table, in a notebook as HTML, and draws itself.

    Attributes:
        best: The settings chosen.
        trials: All candidates, the best first, then by time.
        noise: Time of a candidate relative to itself in the race that decided.
        notes: What was left out of the search, and why; one sentence each.
        seconds: What the search took.
        break_even: After how many steps the time spent on compiling is gained back, if `best` is
            compiled; None if it is not.
        memory_budget: Bytes, as given.
        tolerance: Largest gradient error, as given.
    """

    best: Settings
    trials: tuple[Trial, ...]
    noise: Ratio
    notes: tuple[str, ...]
    seconds: float
    break_even: float | None
    memory_budget: float | None
    tolerance: float

    def table(self) -> str:
        """The trials as text, one a line, and the notes."""
        return repr(self)

    def _notes(self) -> tuple[str, ...]:
        return self.notes

    def _table(self) -> tuple[str, Row, list[Row]]:
        budget = "no budget"
        if self.memory_budget is not None:
            budget = f"budget {readable_bytes(int(self.memory_budget))}"
        title = (
            f"{len(self.trials)} candidates in {self.seconds:.0f} s; {budget}, gradient error up "
            f"to {self.tolerance:.2g}, A/A noise {self.noise}"
        )
        least = self.trials[0].time or 0.0
        rows: list[Row] = []
        for trial in self.trials:
            time, ratio, peak, error = "", "", "", ""
            if trial.time is not None:
                time, ratio = f"{1e3 * trial.time:.4g} ms", f"{trial.time / least:.2f}"
            if trial.peak_bytes is not None:
                peak = readable_bytes(trial.peak_bytes)
            if trial.gradient_error is not None:
                error = f"{trial.gradient_error:.1e}"
            rows.append([str(trial.settings), time, ratio, peak, error, trial.verdict])
        return title, ("settings", "time", "ratio", "peak", "error", "verdict"), rows

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw time against peak of every trial that has both, by what became of it.

        Args:
            ax: Where to draw; a new figure if None.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        ax = make_axes("TuningReport.plot", ax, 10)
        for kind, (marker, color, size, label) in _LOOKS.items():
            points = [
                (trial.peak_bytes / 2**20, 1e3 * trial.time)
                for trial in self.trials
                if trial.verdict.startswith(kind) and trial.peak_bytes and trial.time
            ]
            if points:
                ax.plot(*zip(*points, strict=True), marker, color=color, ms=size, label=label)
        if self.memory_budget is not None:
            ax.axvline(self.memory_budget / 2**20, color="0.5", linestyle=":", label="budget")
        ax.set_xlabel("peak of one step (MiB)")
        ax.set_ylabel("time of one step (ms)")
        add_legend(ax)
        return ax
