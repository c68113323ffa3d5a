"""The history of a monitor: what it remembers of the last steps, and how that is read.

A step leaves a row in each ring that was written to: always of statistics and of which gradients
were absent; of counts, cosines, ratios, histograms and activations where they were asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autograd_lib.core.rows import BINS, LOWEST, PLAIN, root_sum_squares
from autograd_lib.core.statistics import (
    ALWAYS,
    STATISTICS,
    derive,
    derive_counts,
    describe,
)
from autograd_lib.gradients import GradientStatistics
from autograd_lib.monitor.history import MISSING, PRESENT, Episodes, Issue, Ring

_LOOK_EVERY = 64  # so many steps issues are looked for, in the rows that have come to the host
_MICRO_BATCHES = 16  # in a step, for whose norms there is room
_EXCUSED_SKIPS = 20  # in a row: by then a scaler has lowered its scale by a factor of a million
_CPU = torch.device("cpu")


class Record:
    """The last `capacity` recorded steps of some parameters."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        capacity: int,
        histogram_every: int,
        thresholds: tuple[float, float],
    ) -> None:
        self.names, self.capacity = list(parameters), capacity
        self._histograms = -(-capacity // max(histogram_every, 1))  # they are large
        self.numel = np.array([parameter.numel() for parameter in parameters.values()])
        self.is_complex = np.array([parameter.is_complex() for parameter in parameters.values()])
        self.step = 0
        self.rings = {
            "fields": Ring(capacity, (PLAIN, len(self.names)), torch.float64, _CPU),
            "absent": Ring(capacity, (len(self.names),), torch.uint8, _CPU),
        }
        self.episodes = Episodes(self.names, self.numel > 0, *thresholds)
        self._fed = 0  # rows in which issues were looked for
        self._skips = 0  # in a row
        self._mark: tuple[int, torch.Event] | None = None  # rows that will have come by the event

    def keep(self, name: str, record: Tensor) -> None:
        """Keep a record of the current step in the ring of that name."""
        ring = self.rings.get(name)
        if ring is None or ring.device.type == "cpu" != record.device.type:
            new = Ring(self._room(name), record.shape, record.dtype, record.device)
            if ring is not None:  # the model has moved, or the history was loaded
                new.extend(ring.state_dict())
            self.rings[name] = ring = new
        ring.append(self.step, record)

    def _room(self, name: str) -> int:
        """How many records to keep."""
        rooms = {"noise": _MICRO_BATCHES * self.capacity, "histogram": self._histograms}
        return rooms.get(name, self.capacity)

    def look(self) -> None:
        """Every so many rows look for issues in those that have arrived, without waiting."""
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
        places = ring.places(self._fed, until)
        self._fed = max(self._fed, until)
        excused = self._were_skipped(ring.steps[places])
        for i, was_skipped in enumerate(excused.tolist()):
            self._skips = self._skips + 1 if was_skipped else 0
            excused[i] = 0 < self._skips < _EXCUSED_SKIPS
        places = places[~excused]  # a scaler skips a step now and then to find its scale
        absent = self.rings["absent"].values[places]
        statistics = derive(ring.values[places], absent == PRESENT)
        self.episodes.feed(ring.steps[places], statistics, absent)

    def _were_skipped(self, steps: np.ndarray) -> np.ndarray:
        """Which of the steps the scaler skipped."""
        ring = self.rings.get("skipped")
        return np.zeros(len(steps), dtype=bool) if ring is None else ring.at(steps) == 1

    def arrays(self) -> dict[str, Any]:
        """The history as NumPy arrays; `GradientMonitor.history` says which."""
        self.read()
        ring = self.rings["fields"]
        places = ring.places()
        steps, absent = ring.steps[places], self.rings["absent"].values[places]
        present = absent == PRESENT
        statistics = derive(ring.values[places], present)
        for name in ("min", "max"):
            statistics[name][:, self.is_complex] = np.nan
        if self.is_complex.any():
            statistics["mean"] = statistics["mean"].astype(np.complex128)
        total = root_sum_squares(torch.from_numpy(np.where(present, statistics["norm"], 0.0)))
        found: dict[str, Any] = {
            "names": list(self.names),
            "numel": self.numel.copy(),
            "step": steps,
            "total_norm": total.numpy(),
            **statistics,
            "skipped": self._were_skipped(steps),
            "present": present,
            "missing": absent == MISSING,
        }
        if "counts" in self.rings:
            counts = np.moveaxis(self.rings["counts"].at(steps), 1, 0)
            counts[:, ~present] = np.nan
            found |= derive_counts(counts, self.numel)
        for name in ("cosine", "update_ratio"):
            if name in self.rings:
                found[name] = self.rings[name].at(steps)
        if "cosine" in found:
            found["cosine"][~present] = np.nan
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
        values, steps = ring.values[ring.places()], ring.steps[ring.places()]
        numel = values[:, 0]
        counts = derive_counts(np.moveaxis(values[:, PLAIN:], 1, 0), numel)
        return {"names": list(names), "step": steps, **derive(values, ~np.isnan(numel)), **counts}

    def summary(self) -> GradientStatistics:
        """The statistics of the last recorded step, and the issues that last."""
        history = self.arrays()
        if not len(history["step"]):
            return GradientStatistics(0.0, {}, step=0, issues=[])
        keys = [name for name in STATISTICS if name in history]
        parameters: dict[str, dict[str, Any]] = {}
        for i in np.flatnonzero(history["present"][-1]).tolist():
            values = {key: history[key][-1, i].item() for key in keys}
            kept = {k: v for k, v in values.items() if k in ALWAYS or v == v}  # noqa: PLR0124
            numel, is_complex = self.numel[i].item(), bool(self.is_complex[i])
            parameters[self.names[i]] = describe(kept, numel, is_complex)
        return GradientStatistics(
            history["total_norm"][-1].item(),
            parameters,
            step=history["step"][-1].item(),
            issues=self.episodes.now(),
        )

    def noise(self) -> np.ndarray:
        """What `estimate` needs, [micro-batches, 4]."""
        self.read()
        if (ring := self.rings.get("noise")) is None:
            return np.zeros((0, 4))
        places = ring.places()
        return np.column_stack([ring.steps[places], ring.values[places]])

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, as tensors and plain values."""
        self.read()
        return {
            "names": list(self.names),
            "step": self.step,
            "rings": {name: ring.state_dict() for name, ring in self.rings.items()},
            "issues": [tuple(issue) for issue in self.episodes.issues],
            "lasting": torch.from_numpy(self.episodes.lasting.copy()),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what the record of another monitor remembered."""
        names = state.get("names", []) if isinstance(state, dict) else []
        if list(names) != self.names:
            raise ValueError(
                f"load_state_dict: expected the history of {len(self.names)} parameters "
                f"{self.names[:3]}…, got that of {len(names)} {names[:3]}…; "
                "load what state_dict() of a monitor of the same model gave"
            )
        self.rings = {}
        for name, kept in state["rings"].items():
            values = kept["values"]
            self.rings[name] = Ring(self._room(name), values.shape[1:], values.dtype, _CPU)
            self.rings[name].extend(kept)
        self.step, self._fed, self._mark = state["step"], self.rings["fields"].count, None
        self.episodes.issues = [Issue(*issue) for issue in state["issues"]]
        self.episodes.lasting = state["lasting"].numpy().copy()
