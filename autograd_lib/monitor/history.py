"""Records that stay on their device until they are read, and the issues found in them.

A `Ring` takes a record with one small copy on the device. On CUDA finished rows travel to pinned
memory in the background, so that reading them later waits for nothing but the newest ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PRESENT, MISSING, FROZEN = range(3)  # a gradient that is there, not there, not wanted
KINDS = ("nan", "inf", "exploding", "vanishing", "missing")


class Issue(NamedTuple):
    """A problem with the gradient of one parameter, and the step at which it began.

    Attributes:
        kind: "nan" (some element is), "inf" (some element is, and none NaN), "exploding" (the norm
            is above `explode_above`), "vanishing" (below `vanish_below`) or "missing" (the
            parameter requires a gradient and has none).
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


_MOST_EPISODES = 20  # of one kind in one parameter: more would tell nothing new


class Ring:
    """The last `capacity` records of one shape, each with the step it belongs to.

    `append` never waits for the device; `read` does.
    """

    def __init__(
        self, capacity: int, shape: Sequence[int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.count = 0  # of all records that were ever appended
        self.steps = np.zeros(capacity, dtype=np.int64)
        self.device = device
        self._records = torch.zeros(capacity, *shape, dtype=dtype, device=device)
        self._sent = self._arrived = 0
        self._sending: torch.Event | None = None
        self._host = self._records
        if device.type != "cpu":
            pinned = torch.accelerator.is_available() and device.type != "mps"
            self._host = torch.zeros_like(self._records, device="cpu", pin_memory=pinned)
        self.values = self._host.numpy()

    @property
    def capacity(self) -> int:
        """The most records that are kept."""
        return len(self.steps)

    def append(self, step: int, record: Tensor) -> None:
        """Keep a record in the place of the oldest one."""
        place = self.count % self.capacity
        self._records[place].copy_(record, non_blocking=True)
        self.steps[place] = step
        self.count += 1

    def send(self) -> None:
        """Start copying new records to the host, and note which copies have finished."""
        if self.device.type == "cpu":
            self._sent = self._arrived = self.count
            return
        if self._sending is not None and self._sending.query():
            self._arrived = self._sent
        for start, stop in self._spans(max(self._sent, self.count - self.capacity), self.count):
            self._host[start:stop].copy_(self._records[start:stop], non_blocking=True)
        self._sent = self.count
        self._sending = torch.Event(self.device)
        self._sending.record()

    def read(self) -> None:
        """Wait until every record is on the host."""
        self.send()
        if self._sending is not None:
            self._sending.synchronize()
        self._arrived = self._sent

    @property
    def arrived(self) -> int:
        """How many of all records that were ever appended are on the host."""
        return self._arrived

    def places(self, since: int = 0) -> np.ndarray:
        """Where the arrived records from number `since` on stand in `steps` and `values`."""
        oldest = max(since, self.count - self.capacity)
        return np.arange(oldest, max(oldest, self._arrived)) % self.capacity

    def at(self, steps: np.ndarray) -> np.ndarray:
        """The arrived records of some steps as float64, NaN for a step that has none."""
        places = self.places()
        found = np.full((len(steps), *self.values.shape[1:]), np.nan)
        _, here, there = np.intersect1d(steps, self.steps[places], return_indices=True)
        found[here] = self.values[places[there]]
        return found

    def _spans(self, first: int, stop: int) -> list[tuple[int, int]]:
        """The places of records `first` to `stop`, in one piece or in two."""
        if first >= stop:
            return []
        begin, end = first % self.capacity, (stop - 1) % self.capacity + 1
        return [(begin, end)] if begin < end else [(begin, self.capacity), (0, end)]

    def state_dict(self) -> dict[str, Any]:
        """The records as tensors, oldest first."""
        self.read()
        places = self.places()
        steps, values = (torch.from_numpy(array[places]) for array in (self.steps, self.values))
        return {"steps": steps, "values": values}

    @classmethod
    def from_state(cls, state: dict[str, Any], capacity: int, device: torch.device) -> Ring:
        """A ring with the newest records of another one."""
        values = state["values"]
        ring = cls(capacity, values.shape[1:], values.dtype, device)
        for step, value in zip(state["steps"].tolist(), values, strict=True):
            ring.append(step, value)
        return ring


class Episodes:
    """Finds the issues in rows of statistics, one for each stretch of steps in which it lasts."""

    def __init__(
        self, names: Sequence[str], watched: np.ndarray, explode_above: float, vanish_below: float
    ) -> None:
        self._names, self._watched = names, watched
        self._above, self._below = explode_above, vanish_below
        self.lasting = np.zeros((len(KINDS), len(names)), dtype=bool)
        self.issues: list[Issue] = []

    def feed(self, steps: np.ndarray, statistics: dict[str, np.ndarray], absent: np.ndarray) -> int:
        """Take rows [steps, parameters] in their order; return how many new issues need details."""
        norm, abs_max = statistics["norm"], statistics["abs_max"]
        present = (absent == PRESENT) & self._watched
        with np.errstate(invalid="ignore"):
            finite = present & (abs_max < np.inf)
            found = {
                "nan": present & np.isnan(abs_max),
                "inf": present & (abs_max == np.inf),
                "exploding": finite & (norm > self._above),
                "vanishing": finite & (norm < self._below),
                "missing": absent == MISSING,
            }
        lasting = np.stack([self.lasting, *np.stack([found[kind] for kind in KINDS], 1)])
        begun = np.argwhere(lasting[1:] & ~lasting[:-1])
        self.lasting = lasting[-1]
        before = Counter((issue.kind, issue.parameter) for issue in self.issues if len(begun))
        wrong = 0
        for row, number, i in begun.tolist():
            kind, name = KINDS[number], self._names[i]
            if before[kind, name] == _MOST_EPISODES:
                continue
            before[kind, name] += 1
            wrong += kind != "missing"
            value = None if kind == "missing" else float(norm[row, i])
            self.issues.append(Issue(kind, name, int(steps[row]), value))
        return wrong
