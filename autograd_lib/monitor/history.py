"""The history of a monitor: what it remembers of the last steps, and how that is read.

A step leaves a row in each ring that was written to: always of statistics and of which gradients
were absent; of counts, cosines, ratios and histograms where they were asked for.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from autograd_lib.core.rows import BINS, LOWEST, PLAIN, root_sum_squares
from autograd_lib.core.statistics import ALWAYS, STATISTICS, derive, derive_counts, describe
from autograd_lib.gradients import GradientStatistics
from autograd_lib.monitor.watched import Watched

# A gradient that is there, not there, not wanted, and there although it is not wanted.
PRESENT, MISSING, FROZEN, IDLE = range(4)
KINDS = ("nan", "inf", "exploding", "vanishing", "missing")

UNWATCHED = (
    "nothing was watched: the monitor was never attached; use `with monitor:` or "
    "monitor.register_hooks() before training"
)

_LOOK_EVERY = 64  # so many steps issues are looked for, in the rows that have come to the host
_MICRO_BATCHES = 16  # in a step, for whose norms there is room
_SETTLED = 3  # the step from which on zero initialization explains no gradient of zero
_NOISE = 1e-4  # a norm smaller than this, relative to its module's largest, may be all rounding
_EXCUSED_SKIPS = 20  # in a row: by then a scaler has lowered its scale by a factor of a million
_MOST_EPISODES = 20  # of one kind in one parameter: more would tell nothing new
_CPU = torch.device("cpu")

# What is known of a parameter at a step at which it was not watched, by the name of the ring.
_UNKNOWN: dict[str, float] = {
    "fields": 0.0,
    "absent": FROZEN,
    "counts": np.nan,
    "cosine": np.nan,
    "update_ratio": np.nan,
    "histogram": 0,
    "lasting": False,
    "grown": False,
}


def is_present(absent: np.ndarray) -> np.ndarray:
    """Where there is a gradient."""
    return np.isin(absent, (PRESENT, IDLE))


class Issue(NamedTuple):
    """A problem with the gradient of one parameter, and the step at which it began.

    Attributes:
        kind: "nan" (some element is), "inf" (some element is, and none NaN), "exploding" (the norm
            is above `explode_above`), "vanishing" (the norm fell below `vanish_below`; or, from the
            third step on, the norms of all parameters of its module are below it; never of a
            frozen parameter) or "missing" (the parameter requires a gradient and has none).
        parameter: The parameter's name.
        step: The step at which it began. While it lasts there is no second issue; a problem that
            comes and goes is reported twenty times at most.
        value: The norm at that step, NaN or infinity for the first two kinds; None where missing.
    """

    kind: str
    parameter: str
    step: int
    value: float | None

    def __str__(self) -> str:
        value = "" if self.value is None else f" (norm {self.value:.3g})"
        return f"{self.kind} in {self.parameter} since step {self.step}{value}"


class Unwatched(list[Issue]):
    """The issues of a monitor that nobody attached: none, which says nothing."""

    def __repr__(self) -> str:
        return f"[] ({UNWATCHED})"


class Ring:
    """The last `capacity` records of one shape, each with the step it belongs to.

    `append` copies a record to the host without waiting, on CUDA to pinned memory. Before `values`
    are read, the reader waits for the device.
    """

    def __init__(
        self, capacity: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.count = 0  # of all records that were ever appended
        self.steps = np.zeros(capacity, dtype=np.int64)
        self.device = device
        pinned = device.type not in {"cpu", "mps"}
        host = torch.zeros(capacity, *shape, dtype=dtype, device="cpu", pin_memory=pinned)
        self._host, self.values = host, host.numpy()

    def append(self, step: int, record: Tensor, *, replace: bool = False) -> None:
        """Keep a record in the place of the oldest, or of the last one if it is of this step."""
        if replace and self.count and self.steps[(self.count - 1) % len(self.steps)] == step:
            self.count -= 1
        place = self.count % len(self.steps)
        self._host[place].copy_(record, non_blocking=True)
        self.steps[place] = step
        self.count += 1

    def places(self, since: int = 0, until: int | None = None) -> np.ndarray:
        """Where the kept ones of records `since` to `until` stand in `steps` and `values`."""
        oldest = max(since, self.count - len(self.steps))
        newest = self.count if until is None else until
        return np.arange(oldest, max(oldest, newest)) % len(self.steps)

    def at(self, steps: np.ndarray) -> np.ndarray:
        """The records of some steps as float64, NaN for a step that has none."""
        places = self.places()
        found = np.full((len(steps), *self.values.shape[1:]), np.nan)
        _, here, there = np.intersect1d(steps, self.steps[places], return_indices=True)
        found[here] = self.values[places[there]]
        return found

    def kept(self) -> tuple[np.ndarray, np.ndarray]:
        """Steps and records, oldest first."""
        places = self.places()
        return self.steps[places], self.values[places]

    def state_dict(self) -> dict[str, Any]:
        """The records as tensors, oldest first."""
        steps, values = map(torch.from_numpy, self.kept())
        return {"steps": steps, "values": values}

    def extend(self, state: dict[str, Any]) -> None:
        """Append the records of another ring's `state_dict`."""
        for step, value in zip(state["steps"].tolist(), state["values"], strict=True):
            self.append(step, value)


class Record:
    """The last `capacity` recorded steps of some parameters."""

    def __init__(
        self, capacity: int, histogram_every: int, thresholds: tuple[float, float]
    ) -> None:
        self.capacity = capacity
        # Other records than those of a step: histograms are large.
        histograms = -(-capacity // max(histogram_every, 1))
        self._rooms = {"noise": _MICRO_BATCHES * capacity, "histogram": histograms}
        self.names: list[str] = []
        self.numel = self.is_complex = np.zeros(0)
        self.step = 0
        self.is_undecided = False  # whether the last step may still be skipped by a scaler
        self.rings = {
            "fields": Ring(capacity, (PLAIN, 0), torch.float64, _CPU),
            "absent": Ring(capacity, (0,), torch.uint8, _CPU),
        }
        self._above, self._below = thresholds
        self.issues: list[Issue] = []
        self.lasting = np.zeros((len(KINDS), 0), dtype=bool)
        self.grown = np.zeros(0, dtype=bool)  # whose norm was not below `vanish_below` once
        self._owners: list[str | None] = []
        self._fed = 0  # rows in which issues were looked for
        self._skips = 0  # in a row
        self._mark: tuple[int, torch.Event] | None = None  # after the event so many rows have come

    def follow(self, watched: Watched, parameters: Sequence[nn.Parameter]) -> None:
        """Record these parameters from now on; what is remembered is kept, by name."""
        if self.step:
            self.read()
        state = self._state()
        self.names, self._owners = list(watched.names), watched.owners
        self.numel = np.array([parameter.numel() for parameter in parameters])
        self.is_complex = np.array([parameter.is_complex() for parameter in parameters])
        self._load(state)

    def reopen(self) -> None:
        """Have the last row judged again, as other gradients take its place."""
        self._fed = min(self._fed, max(self.rings["fields"].count - 1, 0))

    def keep(self, name: str, record: Tensor) -> None:
        """Keep a record of the current step, in place of an earlier one, in the ring of that name.

        Of the micro-batches in a step each has a record of its own.
        """
        ring = self.rings.get(name)
        if ring is None or ring.device.type == "cpu" != record.device.type:
            new = Ring(
                self._rooms.get(name, self.capacity), record.shape, record.dtype, record.device
            )
            if ring is not None:  # the model has moved, or the history was loaded
                new.extend(ring.state_dict())
            self.rings[name] = ring = new
        ring.append(self.step, record, replace=name != "noise")

    def look(self) -> None:
        """Every so many rows, look for issues in the rows that have arrived, without waiting."""
        ring = self.rings["fields"]
        if ring.count % min(_LOOK_EVERY, max(self.capacity // 2, 1)):
            return
        if ring.device.type == "cpu":
            self._find_issues(ring.count)
            return
        if self._mark is not None and self._mark[1].query():
            self._find_issues(self._mark[0])
        self._mark = ring.count, torch.Event(ring.device)
        self._mark[1].record()

    def read(self) -> None:
        """Wait until every record is on the host, and look for issues in it."""
        for device in {ring.device for ring in self.rings.values()} - {_CPU}:
            torch.accelerator.synchronize(device)
        self._find_issues(self.rings["fields"].count)

    def _find_issues(self, until: int) -> None:
        """Look for issues in the rows up to `until` in which nobody has looked yet."""
        ring = self.rings["fields"]
        until = max(min(until, ring.count - self.is_undecided), 0)
        places = ring.places(self._fed, until)
        self._fed = max(self._fed, until)
        excused = self._were_skipped(ring.steps[places])
        for i, was_skipped in enumerate(excused.tolist()):
            self._skips = self._skips + 1 if was_skipped else 0
            excused[i] = 0 < self._skips < _EXCUSED_SKIPS
        places = places[~excused]  # a scaler skips a step now and then to find its scale
        absent = self.rings["absent"].values[places]
        statistics = derive(ring.values[places], is_present(absent))
        self._judge(ring.steps[places], statistics, absent)

    def _judge(
        self, steps: np.ndarray, statistics: dict[str, np.ndarray], absent: np.ndarray
    ) -> None:
        """Find the issues in rows [steps, parameters]: one for each stretch in which it lasts."""
        if not len(steps):
            return
        norm, abs_max = statistics["norm"], statistics["abs_max"]
        present = is_present(absent) & (self.numel > 0)
        finite = present & (abs_max < np.inf)
        found = {
            "nan": present & np.isnan(abs_max),
            "inf": present & (abs_max == np.inf),
            "exploding": finite & (norm > self._above),
            "vanishing": self._vanishing(steps, norm, finite & (absent != IDLE)),
            "missing": absent == MISSING,
        }
        lasting = np.stack([self.lasting, *np.stack([found[kind] for kind in KINDS], axis=1)])
        begun = np.argwhere(lasting[1:] & ~lasting[:-1])
        self.lasting = lasting[-1]
        before = Counter((issue.kind, issue.parameter) for issue in self.issues if len(begun))
        for row, number, i in begun.tolist():
            kind, name = KINDS[number], self.names[i]
            before[kind, name] += 1
            if before[kind, name] <= _MOST_EPISODES:
                value = None if kind == "missing" else float(norm[row, i])
                self.issues.append(Issue(kind, name, int(steps[row]), value))

    def _vanishing(self, steps: np.ndarray, norm: np.ndarray, finite: np.ndarray) -> np.ndarray:
        """Where a norm has fallen below the threshold, or those of a whole module are below it.

        A gradient may be zero by construction, as that of the bias of attention's keys: softmax
        does not change with it. What is there then is the rounding of the module's other gradients.
        """
        owners = self._owners
        begins = [i for i, owner in enumerate(owners) if i == 0 or owner != owners[i - 1]]
        lengths = np.diff([*begins, len(owners)])
        largest = np.maximum.reduceat(np.where(finite, norm, 0.0), begins, axis=1)
        below = finite & (norm < self._below)
        some = finite & ~below & (norm > _NOISE * np.repeat(largest, lengths, axis=1))
        grown = np.logical_or.accumulate(np.vstack([self.grown, some]))
        self.grown = grown[-1]
        whole = np.logical_and.reduceat(below | (self.numel == 0), begins, axis=1)
        whole = np.repeat(whole, lengths, axis=1)
        whole &= [owner is not None for owner in owners]
        whole[steps < _SETTLED] = False
        return below & (grown[:-1] | whole)

    def _were_skipped(self, steps: np.ndarray) -> np.ndarray:
        """Which of the steps the scaler skipped."""
        ring = self.rings.get("skipped")
        return np.zeros(len(steps), dtype=bool) if ring is None else ring.at(steps) == 1

    @property
    def last(self) -> int:
        """The last step of which there is a row, 0 before the first."""
        return int(self.rings["fields"].steps.max())

    def arrays(self, since: int = 0) -> dict[str, Any]:
        """The history after a step as NumPy arrays; `GradientMonitor.history` says which."""
        self.read()
        ring = self.rings["fields"]
        places = ring.places()
        places = places[ring.steps[places] > since]
        steps, absent = ring.steps[places], self.rings["absent"].values[places]
        present = is_present(absent)
        statistics = derive(ring.values[places], present)
        for name in ("min", "max"):
            statistics[name][:, self.is_complex] = np.nan
        if self.is_complex.any():
            statistics["mean"] = statistics["mean"].astype(np.complex128)
        total = root_sum_squares(torch.from_numpy(np.where(present, statistics["norm"], 0.0)))
        skipped = self._were_skipped(steps)
        total[torch.from_numpy(skipped & ~present.any(axis=1))] = math.nan  # already dropped
        found: dict[str, Any] = {
            "names": list(self.names),
            "numel": self.numel.copy(),
            "step": steps,
            "total_norm": total.numpy(),
            **statistics,
            "skipped": skipped,
            "present": present,
            "missing": absent == MISSING,
            "clipped_norm": np.full(len(steps), np.nan),
        }
        if "counts" in self.rings:
            counts = np.moveaxis(self.rings["counts"].at(steps), 1, 0)
            counts[:, ~present] = np.nan
            found |= derive_counts(counts, self.numel)
        for name in ("clipped_norm", "cosine", "update_ratio"):
            if name in self.rings:
                found[name] = self.rings[name].at(steps)
        if "cosine" in found:
            found["cosine"][~present] = np.nan
        if "histogram" in self.rings:
            found["histogram_step"], found["histogram"] = self.rings["histogram"].kept()
            found["histogram_edges"] = np.exp2(np.arange(LOWEST, LOWEST + BINS + 1.0))
        return found

    def summary(self) -> GradientStatistics:
        """The statistics of the last recorded step, and the issues that last."""
        history = self.arrays(self.last - 1)
        if not len(history["step"]):
            return GradientStatistics(total_norm=0.0, parameters={}, step=0, issues=[])
        keys = [name for name in STATISTICS if name in history]
        parameters: dict[str, dict[str, Any]] = {}
        for i in np.flatnonzero(history["present"][-1]).tolist():
            values = {key: history[key][-1, i].item() for key in keys}
            kept = {k: v for k, v in values.items() if k in ALWAYS or v == v}  # noqa: PLR0124
            numel, is_complex = self.numel[i].item(), bool(self.is_complex[i])
            parameters[self.names[i]] = describe(kept, numel, is_complex)
        newest = {(issue.kind, issue.parameter): issue for issue in self.issues}
        lasting = np.argwhere(self.lasting).tolist()
        return GradientStatistics(
            total_norm=history["total_norm"][-1].item(),
            parameters=parameters,
            step=history["step"][-1].item(),
            issues=[newest[KINDS[kind], self.names[i]] for kind, i in lasting],
        )

    def noise(self) -> np.ndarray:
        """What `estimate` needs, [micro-batches, 4]."""
        self.read()
        ring = self.rings.get("noise")
        return np.zeros((0, 4)) if ring is None else np.column_stack(ring.kept())

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, as tensors and plain values."""
        self.read()
        return self._state()

    def _state(self) -> dict[str, Any]:
        return {
            "names": list(self.names),
            "step": self.step,
            "rings": {name: ring.state_dict() for name, ring in self.rings.items()},
            "issues": [tuple(issue) for issue in self.issues],
            "lasting": torch.from_numpy(self.lasting.copy()),
            "grown": torch.from_numpy(self.grown.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what the record of another monitor remembered."""
        names = state.get("names", []) if isinstance(state, dict) else []
        if not {*names}.intersection(self.names):
            raise ValueError(
                f"load_state_dict: expected the history of {len(self.names)} parameters "
                f"{self.names[:3]}…, got that of {len(names)} {names[:3]}…; "
                "load what state_dict() of a monitor of the same model gave"
            )
        self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        rings = {}
        for name, kept in state["rings"].items():
            values = self._by_name(name, kept["values"], state["names"])
            ring = Ring(self._rooms.get(name, self.capacity), values.shape[1:], values.dtype, _CPU)
            ring.extend({"steps": kept["steps"], "values": values})
            rings[name] = ring
        self.rings = rings
        self.step, self._fed, self._mark = state["step"], self.rings["fields"].count, None
        self.issues = [Issue(*issue) for issue in state["issues"]]
        for name in ("lasting", "grown"):
            kept = state.get(name, torch.zeros(len(state["names"]), dtype=torch.bool))
            setattr(self, name, self._by_name(name, kept, state["names"]).numpy())

    def _by_name(self, ring: str, values: Tensor, names: Sequence[str]) -> Tensor:
        """Records of the parameters `names` as records of those that are watched now."""
        if ring not in _UNKNOWN or list(names) == self.names:
            return values.clone()
        axis = 1 if ring == "histogram" else -1
        shape = [*values.shape]
        shape[axis] = 1
        unknown = values.new_full(shape, _UNKNOWN[ring])
        place = {name: i for i, name in enumerate(names)}
        places = torch.tensor([place.get(name, len(names)) for name in self.names], device="cpu")
        return torch.cat([values, unknown], axis).index_select(axis, places)
