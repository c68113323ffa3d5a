"""The history of a monitor: what it remembers of the last steps, and how that is read.

A step leaves a row in each ring that was written to: of statistics always, of counts, cosines,
ratios, histograms and activations where they were asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autograd_lib.core.rows import BINS, LOWEST, root_sum_squares
from autograd_lib.core.statistics import (
    ALWAYS,
    STATISTICS,
    derive,
    derive_counts,
    describe,
)
from autograd_lib.gradients import GradientStatistics
from autograd_lib.monitor.history import KINDS, MISSING, PRESENT, Episodes, Issue, Ring

_SEND_EVERY = 64  # rows go to the host in the background; issues are found in those that arrived
_DETAILED_STEPS = 10  # for so long are counts and histograms taken once an issue has been read
_MICRO_BATCHES = 16  # in a step, for whose norms there is room
_UNASKED_HISTOGRAMS = 50  # that are remembered, of steps after an alarm
_EXCUSED_SKIPS = 20  # in a row: by then a scaler has lowered its scale by a factor of a million


class Record:
    """The last `capacity` recorded steps of some parameters."""

    def __init__(
        self,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        capacity: int,
        histogram_every: int,
        thresholds: tuple[float, float],
    ) -> None:
        self.names, self.capacity, self.histogram_every = list(names), capacity, histogram_every
        self.numel = np.array([parameter.numel() for parameter in parameters])
        self.is_complex = np.array([parameter.is_complex() for parameter in parameters])
        self.step = 0
        self.rings: dict[str, Ring] = {}
        self.absent = np.zeros((capacity, len(names)), dtype=np.uint8)
        self.skipped = np.zeros(capacity, dtype=bool)
        self.episodes = Episodes(self.names, self.numel > 0, *thresholds)
        self.fed = 0  # rows in which issues were looked for
        self.skips = 0  # in a row
        self.detailed_until = 0

    @property
    def count(self) -> int:
        """Recorded steps, those included that are no longer remembered."""
        return self.rings["fields"].count if "fields" in self.rings else 0

    def keep(self, name: str, record: Tensor) -> None:
        """Keep a record of the current step in the ring of that name."""
        ring = self.rings.get(name)
        if ring is None:
            ring = Ring(self._room(name), record.shape, record.dtype, record.device)
        elif ring.device != record.device:  # the model has moved
            ring = Ring.from_state(ring.state_dict(), self._room(name), record.device)
        self.rings[name] = ring
        ring.append(self.step, record)

    def _room(self, name: str) -> int:
        """How many records to keep; histograms are large, and seldom unless they are asked for."""
        if name == "noise":
            return _MICRO_BATCHES * self.capacity
        if name != "histogram" or self.histogram_every == 1:
            return self.capacity
        asked = self.capacity // self.histogram_every if self.histogram_every else 0
        return min(self.capacity, asked + _UNASKED_HISTOGRAMS)

    def note(self, absent: np.ndarray | int, skipped: bool) -> None:
        """Begin the row of a step: which gradients are absent, and whether it is skipped."""
        place = self.count % self.capacity
        self.absent[place], self.skipped[place] = absent, skipped

    def send(self) -> None:
        """Every so many rows, start their copy to the host and look through those that arrived."""
        if self.count % min(_SEND_EVERY, self.capacity) == 0:
            for ring in self.rings.values():
                ring.send()
            self._find_issues()

    def read(self) -> None:
        """Wait until every record is on the host, and look for issues in it."""
        for ring in self.rings.values():
            ring.read()
        self._find_issues()

    def _find_issues(self) -> None:
        """Look for issues in the rows that have come to the host since the last time."""
        if "fields" not in self.rings:
            return
        ring = self.rings["fields"]
        places = ring.places(self.fed)
        self.fed = max(self.fed, ring.arrived)
        skipped = self._were_skipped(places)
        for i, was_skipped in enumerate(skipped.tolist()):
            self.skips = self.skips + 1 if was_skipped else 0
            skipped[i] = 0 < self.skips < _EXCUSED_SKIPS
        places = places[~skipped]  # a scaler skips a step now and then to find its scale
        absent = self.absent[places]
        statistics = derive(ring.values[places], absent == PRESENT)
        if self.episodes.feed(ring.steps[places], statistics, absent):
            self.detailed_until = self.step + _DETAILED_STEPS

    def _were_skipped(self, places: np.ndarray) -> np.ndarray:
        """Which of the rows are those of steps that the scaler skipped."""
        skipped = self.skipped[places]
        if "skipped" in self.rings:
            skipped = skipped | (self.rings["skipped"].at(self.rings["fields"].steps[places]) == 1)
        return skipped

    def arrays(self) -> dict[str, Any]:
        """The history as NumPy arrays; `GradientMonitor.history` says which."""
        self.read()
        found: dict[str, Any] = {"names": list(self.names), "numel": self.numel.copy()}
        ring = self.rings.get("fields")
        if ring is None:
            nothing = np.zeros((0, len(self.names)))
            found |= {"step": np.zeros(0, dtype=np.int64), "total_norm": np.zeros(0)}
            found |= {"skipped": np.zeros(0, dtype=bool), "missing": nothing.astype(bool)}
            return found | dict.fromkeys(ALWAYS, nothing)
        places = ring.places()
        steps, absent = ring.steps[places], self.absent[places]
        statistics = derive(ring.values[places], absent == PRESENT)
        for name in ("min", "max"):
            statistics[name][:, self.is_complex] = np.nan
        if self.is_complex.any():
            statistics["mean"] = statistics["mean"].astype(np.complex128)
        norms_there = np.where(absent == PRESENT, statistics["norm"], 0.0)
        total = root_sum_squares(torch.from_numpy(norms_there)).numpy()
        found |= {"step": steps, "total_norm": total, **statistics}
        found["skipped"], found["missing"] = self._were_skipped(places), absent == MISSING
        if "counts" in self.rings:
            counts = np.moveaxis(self.rings["counts"].at(steps), 1, 0)
            counts[:, absent != PRESENT] = np.nan
            found |= derive_counts(counts, self.numel)
        for name in ("cosine", "update_ratio"):
            if name in self.rings:
                found[name] = self.rings[name].at(steps)
        if "cosine" in found:
            found["cosine"][absent != PRESENT] = np.nan
        if "histogram" in self.rings:
            ring = self.rings["histogram"]
            places = ring.places()
            found["histogram_step"], found["histogram"] = ring.steps[places], ring.values[places]
            found["histogram_edges"] = np.exp2(np.arange(LOWEST, LOWEST + BINS + 1.0))
        return found

    def arrays_of_activations(self, names: Sequence[str]) -> dict[str, Any]:
        """The statistics of the outputs of modules, as in `arrays`."""
        self.read()
        if "activations" not in self.rings:
            return {"names": list(names), "step": np.zeros(0, dtype=np.int64)}
        ring = self.rings["activations"]
        values = ring.values[ring.places()]
        numel, steps = values[:, 0], ring.steps[ring.places()]
        counts = derive_counts(np.moveaxis(values[:, 7:], 1, 0), numel)
        return {"names": list(names), "step": steps, **derive(values, ~np.isnan(numel)), **counts}

    def summary(self) -> GradientStatistics:
        """The statistics of the last recorded step, and the issues that last."""
        history = self.arrays()
        if not len(history["step"]):
            return GradientStatistics(0.0, {}, step=0, issues=[])
        last = self.absent[(self.count - 1) % self.capacity]
        keys = [name for name in STATISTICS if name in history]
        parameters: dict[str, dict[str, Any]] = {}
        for i in np.flatnonzero(last == PRESENT).tolist():
            values = {key: history[key][-1, i].item() for key in keys}
            kept = {k: v for k, v in values.items() if k in ALWAYS or v == v}  # noqa: PLR0124
            numel, is_complex = self.numel[i].item(), bool(self.is_complex[i])
            parameters[self.names[i]] = describe(kept, numel, is_complex)
        return GradientStatistics(
            history["total_norm"][-1].item(),
            parameters,
            step=history["step"][-1].item(),
            issues=self._lasting(),
        )

    def _lasting(self) -> list[Issue]:
        """The issues that have not ended."""
        newest = {(issue.kind, issue.parameter): issue for issue in self.episodes.issues}
        lasting = np.argwhere(self.episodes.lasting).tolist()
        return [newest[KINDS[kind], self.names[i]] for kind, i in lasting]

    def noise(self) -> np.ndarray:
        """What `estimate` needs, [micro-batches, 4]."""
        self.read()
        if (ring := self.rings.get("noise")) is None:
            return np.zeros((0, 4))
        places = ring.places()
        return np.column_stack([ring.steps[places], ring.values[places]])

    def present(self) -> np.ndarray:
        """Which parameters had a gradient in which remembered step, [steps, parameters]."""
        ring = self.rings.get("fields")
        return self.absent[[] if ring is None else ring.places()] == PRESENT

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, as tensors and plain values."""
        self.read()
        ring = self.rings.get("fields")
        places = np.zeros(0, dtype=np.int64) if ring is None else ring.places()
        return {
            "names": list(self.names),
            "step": self.step,
            "rings": {name: ring.state_dict() for name, ring in self.rings.items()},
            "absent": torch.from_numpy(self.absent[places]),
            "skipped": torch.from_numpy(self.skipped[places]),
            "issues": [tuple(issue) for issue in self.episodes.issues],
            "lasting": torch.from_numpy(self.episodes.lasting.copy()),
            "detailed_until": self.detailed_until,
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        """Continue from what the record of another monitor remembered."""
        names = state.get("names", []) if isinstance(state, dict) else []
        if list(names) != self.names:
            raise ValueError(
                f"load_state_dict: expected the history of {len(self.names)} parameters "
                f"{self.names[:3]}…, got that of {len(names)} {names[:3]}…; "
                "load what state_dict() of a monitor of the same model gave"
            )
        self.rings = {
            name: Ring.from_state(ring, self._room(name), device)
            for name, ring in state["rings"].items()
        }
        absent, skipped = state["absent"].numpy(), state["skipped"].numpy()
        places = np.arange(len(absent)) % self.capacity
        self.absent[places], self.skipped[places] = absent, skipped
        self.fed = len(absent)
        self.step, self.detailed_until = state["step"], state["detailed_until"]
        self.episodes.issues = [Issue(*issue) for issue in state["issues"]]
        self.episodes.lasting = state["lasting"].numpy().copy()
