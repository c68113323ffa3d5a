"""Side-by-side timing and memory whose ratios come with the noise they were measured in.

The clock, its CUDA synchronization and the inner loop are those of `torch.utils.benchmark.Timer`;
what is added is the comparison: interleaved rounds, pairwise ratios, an A/A run and peak bytes.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from autograd_lib.core.files import replaced_atomically
from autograd_lib.memory import peak_bytes
from autograd_lib.report.plots import sized_axes
from autograd_lib.report.progress import progress
from autograd_lib.report.stored import described, this_environment
from autograd_lib.report.tables import Table, readable_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Comparison", "Ratio", "compare"]

Thunk = Callable[[], object]
Verdict = Literal["baseline", "tie", "faster", "slower"]
Array = npt.NDArray[np.float64]

_FORMAT = {"format": "autograd_lib.Comparison", "version": 1}
_LEAST_ROUNDS = 5  # below this the bootstrap interval of a median means nothing
_RESAMPLES = 2000
_SAMPLE_SECONDS = 0.01  # a thousand times what reading the clock and synchronizing take
_MOST_WARMUP_SAMPLES = 50
_UNITS = {"s": 1.0, "ms": 1e-3, "µs": 1e-6, "ns": 1e-9}


class Ratio(NamedTuple):
    """A median ratio of times with its 95 % bootstrap interval; below 1 is faster."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return "{} [{}, {}]".format(*map(_digits, self))


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(Table):
    """What `compare` measured; prints as a table, in a notebook as HTML, and draws itself.

    Attributes:
        names: The candidates, in the order in which they were given.
        baseline: The candidate that the ratios refer to.
        samples: Seconds per call, array of shape [rounds, candidates], float64.
        repeat: Seconds per call of the baseline's second entry (the A/A run), shape [rounds].
        peak_bytes: Bytes above what stood before one call, by name; empty with `memory=False`.
        environment: `torch`, `python`, `device`, `cpu`, `threads` and `date` (ISO 8601, UTC).
    """

    names: tuple[str, ...]
    baseline: str
    samples: Array
    repeat: Array
    peak_bytes: dict[str, int]
    environment: dict[str, str | int]

    @cached_property
    def medians(self) -> dict[str, float]:
        """Median seconds per call, by name."""
        return dict(zip(self.names, np.median(self.samples, axis=0).tolist(), strict=True))

    @cached_property
    def ratios(self) -> dict[str, Ratio]:
        """Time relative to the baseline, by name: the median over rounds of the round's ratio."""
        base = self.samples[:, self.names.index(self.baseline)]
        columns = zip(self.names, self.samples.T, strict=True)
        return {name: _median_ratio(column / base) for name, column in columns}

    @cached_property
    def noise(self) -> Ratio:
        """The ratio of the baseline to itself, which differs from 1 by noise only."""
        return _median_ratio(self.repeat / self.samples[:, self.names.index(self.baseline)])

    @property
    def noise_band(self) -> tuple[float, float]:
        """The A/A interval widened to be symmetric about 1 (in the logarithm)."""
        # The raw interval may miss 1 by chance, and would then call equal times different.
        width = max(abs(math.log(self.noise.low)), abs(math.log(self.noise.high)))
        return math.exp(-width), math.exp(width)

    def verdict(self, name: str) -> Verdict:
        """Say whether `name` is faster or slower than the baseline, if that can be said.

        Args:
            name: One of `names`.

        Returns:
            "baseline"; "faster" or "slower" where the whole interval of the ratio lies outside
            `noise_band`; otherwise "tie": not distinguished by this measurement.

        Raises:
            KeyError: If there is no such candidate.
        """
        low, high = self.noise_band
        ratio = self.ratios[name]
        if name == self.baseline:
            return "baseline"
        return "faster" if ratio.high < low else "slower" if ratio.low > high else "tie"

    def _table(self) -> tuple[str, list[str], list[list[str]]]:
        """Title, header, and a row for each candidate and for the A/A run."""
        title = f"{len(self.samples)} rounds, {described(self.environment)}"
        header = ["candidate", "median", "ratio [95 %]", "verdict"]
        rows = []
        for name in self.names:
            verdict = self.verdict(name)
            ratio = "1" if verdict == "baseline" else str(self.ratios[name])
            rows.append([name, _seconds(self.medians[name]), ratio, verdict])
        again = _seconds(float(np.median(self.repeat)))
        rows.append([f"{self.baseline} again (A/A)", again, str(self.noise), "noise"])
        if self.peak_bytes:
            peaks = [*(readable_bytes(self.peak_bytes[name]) for name in self.names), ""]
            rows = [[*row, peak] for row, peak in zip(rows, peaks, strict=True)]
            header.append("peak")
        return title, header, rows

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw each ratio with its interval over the noise band; ties are hollow, claims filled.

        Args:
            ax: Where to draw; a new figure if None.

        Returns:
            The axes.

        Raises:
            ImportError: If matplotlib is not installed.
        """
        ax = sized_axes("Comparison.plot", ax, (6, 1.2 + 0.4 * len(self.names)))
        band = self.noise_band
        ax.axvspan(*band, color="0.5", alpha=0.3, linewidth=0, label="A/A noise")
        ax.axvline(1, color="0.5", linewidth=1)
        for row, name in enumerate(self.names):
            ratio = self.ratios[name]
            filled = self.verdict(name) in ("faster", "slower")
            reach = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
            face = "C0" if filled else "none"
            ax.errorbar([ratio.median], [row], xerr=reach, fmt="oC0", mfc=face, capsize=3)
        ends = [end for ratio in self.ratios.values() for end in ratio]
        if max(ends) > 10 * min(ends):
            ax.set_xscale("log")
        ax.set_yticks(range(len(self.names)), self.names)
        ax.set_ylim(len(self.names) - 0.5, -0.5)  # the first candidate on top, as in the table
        ax.set_ylabel("candidate")
        ax.set_xlabel(f"time per call / time per call of {self.baseline} (ratio)")
        ax.legend(loc="best")
        return ax

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything measured to `path`, whole or not at all.

        Args:
            path: A file in an existing directory; replaced if it exists.
        """
        record = _FORMAT | {field.name: getattr(self, field.name) for field in fields(self)}
        record |= {"samples": self.samples.tolist(), "repeat": self.repeat.tolist()}
        with replaced_atomically(Path(path)) as unfinished:
            unfinished.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> Comparison:
        """Read what `to_json` wrote.

        Args:
            source: The file, or its content, such as `autograd_lib.report.record(name)`.

        Returns:
            A comparison with the same samples, peaks and environment, and so the same verdicts.

        Raises:
            ValueError: If the file holds something else.
        """
        record: Any = source
        if not isinstance(source, Mapping):
            record = json.loads(Path(source).read_text(encoding="utf-8"))
        if not isinstance(record, Mapping) or not _FORMAT.items() <= record.items():
            raise ValueError(
                f"from_json: expected {_FORMAT} in {source!r:.200}; read files that "
                "Comparison.to_json of this version wrote"
            )
        found = {field.name: record[field.name] for field in fields(cls)}
        found |= {key: np.array(found[key], dtype=np.float64) for key in ("samples", "repeat")}
        return cls(**found | {"names": tuple(found["names"])})


def compare(
    candidates: Mapping[str, Thunk],
    *,
    baseline: str | None = None,
    rounds: int = 24,
    memory: bool = True,
) -> Comparison:
    """Time the candidates against one another and measure the peak memory of each.

    Every candidate is called until it gets no faster, then timed once in each round among all
    others, in an order balanced for position and predecessor. Ratios are formed within a round, so
    that a slowdown of the whole machine cancels; their intervals are the 95 % percentile bootstrap
    of the median over rounds (Efron & Tibshirani, 1993, chapter 13). The baseline is measured
    twice: the ratio of its two entries, the A/A run, is the noise, and no ratio inside it is called
    faster or slower. Once `baseline` is named, the order of `candidates` changes nothing.

    Within a sample the garbage collector is off, as in `timeit`; young garbage is collected between
    samples, so that no candidate pays for another's. Only the current accelerator is synchronized.
    The schedule and the bootstrap have their own seeded generator, so the global random states
    change by the candidates alone. In a terminal, a comparison of more than two seconds shows its
    progress on standard error.

    Args:
        candidates: Name to function of no arguments, called many times; what it returns is dropped.
        baseline: The name the ratios refer to; the first one if None.
        rounds: How many samples of each candidate, at least 5. A sample is one call, or as many as
            fill 10 ms. With n candidates the order is balanced exactly after every n + 1 rounds
            if n is odd, every 2 (n + 1) if it is even.
        memory: Whether to measure `peak_bytes` too, which calls each candidate twice more.

    Returns:
        The `Comparison`.

    Raises:
        TypeError: If `candidates` is not a mapping to callables, or empty.
        ValueError: If `baseline` is no candidate, or `rounds` below 5.
        Exception: Whatever a candidate raises, with a note that names the candidate.

    Warns:
        RuntimeWarning: If a candidate still got faster when its warm-up ended.
        UserWarning: As `peak_bytes` does, if a candidate frees memory that stood before it.

    Example:
        >>> x = torch.ones(100)
        >>> result = compare({"sum": lambda: x.sum(), "dot": lambda: x @ x}, rounds=6)
        >>> result.names, result.samples.shape, result.verdict("sum")
        (('sum', 'dot'), (6, 2), 'baseline')
    """
    _check(candidates, baseline, rounds)
    baseline = next(iter(candidates)) if baseline is None else baseline
    names = sorted(candidates)  # whatever order the caller wrote, the schedule is the same
    entries = [*names, baseline]
    samples, numbers, peaks, name = np.empty((rounds, len(entries))), {}, {}, ""
    with progress("compare") as show:
        try:
            for name in names:
                show(f"warming up {name}")
                numbers[name] = _warm_up(candidates[name], name)
            for index, order in enumerate(_schedule(len(entries), rounds)):
                show(f"round {index + 1} of {rounds}")
                for entry in order:
                    name = entries[entry]
                    samples[index, entry] = _sample(candidates[name], numbers[name])
            for name in names if memory else ():
                show(f"peak memory of {name}")
                peaks[name] = peak_bytes(candidates[name])
        except Exception as error:
            error.add_note(f"compare: raised by candidate {name!r}; nothing was recorded")
            raise
        environment = this_environment()
    columns = [names.index(name) for name in candidates]
    return Comparison(
        tuple(candidates), baseline, samples[:, columns], samples[:, -1], peaks, environment
    )


def _check(candidates: object, baseline: str | None, rounds: int) -> None:
    if not isinstance(candidates, Mapping) or not candidates:
        raise TypeError(
            "compare: expected a mapping from names to functions of no arguments, "
            f"got {candidates!r:.80}; write compare({{'name': function}})"
        )
    for name, thunk in candidates.items():
        if not callable(thunk):
            raise TypeError(
                f"compare: expected candidate {name!r} to be a function of no arguments, "
                f"got {type(thunk).__name__}; wrap the expression in a lambda"
            )
    if baseline is not None and baseline not in candidates:
        raise ValueError(f"compare: expected baseline in {list(candidates)}, got {baseline!r}")
    if rounds < _LEAST_ROUNDS:
        raise ValueError(
            f"compare: expected rounds >= {_LEAST_ROUNDS}, got {rounds!r}; "
            "fewer give no meaningful interval"
        )


def seconds_per_call(thunk: Thunk, number: int) -> float:
    """Seconds per call over `number` calls."""
    # Imported late: it imports setuptools and takes half as long as importing torch. In a CUDA
    # build on a machine without a GPU, one of its imports logs that there is none.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    from torch.utils.benchmark import Timer  # noqa: PLC0415

    # All public methods of Timer sample with `_timeit`. The public `timeit` makes two more calls
    # before each sample, which triples the time of a slow step; `_sample` does so for short calls.
    timer = Timer("thunk()", globals={"thunk": thunk}, num_threads=torch.get_num_threads())
    return timer._timeit(number) / number


def _sample(thunk: Thunk, number: int) -> float:
    """Take one sample, after collecting young garbage and, for a short call, warming the caches."""
    gc.collect(1)
    if number > 1:
        thunk()
    return seconds_per_call(thunk, number)


def _warm_up(thunk: Thunk, name: str) -> int:
    """Call until two samples in a row are no faster; return how many calls make a sample."""
    number, best, settled = 1, math.inf, 0
    for _ in range(_MOST_WARMUP_SAMPLES):
        seconds = seconds_per_call(thunk, number)
        if number * seconds < _SAMPLE_SECONDS / 2:  # too short a sample
            number = min(10 * number, math.ceil(_SAMPLE_SECONDS / seconds))
            continue
        settled = settled + 1 if seconds > 0.95 * best else 0
        best = min(best, seconds)
        if settled == 2:
            break
    else:
        warnings.warn(
            f"compare: candidate {name!r} still got faster after {_MOST_WARMUP_SAMPLES} warm-up "
            "samples; its times do not show a steady state",
            RuntimeWarning,
            stacklevel=3,
        )
    return max(1, math.ceil(_SAMPLE_SECONDS / best)) if best < math.inf else number


def _schedule(entries: int, rounds: int) -> npt.NDArray[np.int64]:
    """Orders of shape [rounds, entries], balanced for position and for the entry just before.

    Williams (1949): within a square each entry stands once at each place and follows each other
    entry once; an odd number of entries needs the mirrored square as well.
    """
    steps = np.arange(entries)
    zigzag = np.where(steps % 2, (steps + 1) // 2, -(steps // 2))  # 0, 1, -1, 2, -2, ...
    square = (zigzag + steps[:, None]) % entries
    if entries % 2:
        square = np.concatenate([square, square[:, ::-1]])
    rng = np.random.default_rng(0)
    blocks = [
        rng.permutation(entries)[rng.permutation(square)]
        for _ in range(math.ceil(rounds / len(square)))
    ]
    return np.concatenate(blocks)[:rounds]


def _median_ratio(ratios: Array) -> Ratio:
    """The median of ratios of shape [rounds], with its percentile bootstrap interval."""
    draws = np.random.default_rng(0).integers(len(ratios), size=(_RESAMPLES, len(ratios)))
    low, high = np.quantile(np.median(ratios[draws], axis=1), [0.025, 0.975])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def _digits(value: float) -> str:
    """Three significant digits, never in scientific notation."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _seconds(value: float) -> str:
    unit, size = next(pair for pair in _UNITS.items() if value >= pair[1] or pair[0] == "ns")
    return f"{_digits(value / size)} {unit}"
