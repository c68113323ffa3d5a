"""Records that come from a device without waiting for it, and the issues found in them."""

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

    `append` copies a record to the host without waiting: on CUDA to pinned memory, in the order of
    the device's work. Who reads `values` has waited for the device before.
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

    def append(self, step: int, record: Tensor) -> None:
        """Keep a record in the place of the oldest one."""
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

    def state_dict(self) -> dict[str, Any]:
        """The records as tensors, oldest first."""
        places = self.places()
        steps, values = (torch.from_numpy(array[places]) for array in (self.steps, self.values))
        return {"steps": steps, "values": values}

    def extend(self, state: dict[str, Any]) -> None:
        """Append the records of another ring's `state_dict`."""
        for step, value in zip(state["steps"].tolist(), state["values"], strict=True):
            self.append(step, value)


class Episodes:
    """Finds the issues in rows of statistics, one for each stretch of steps in which it lasts."""

    def __init__(
        self, names: Sequence[str], watched: np.ndarray, explode_above: float, vanish_below: float
    ) -> None:
        self._names, self._watched = names, watched
        self._above, self._below = explode_above, vanish_below
        self.lasting = np.zeros((len(KINDS), len(names)), dtype=bool)
        self.issues: list[Issue] = []

    def feed(
        self, steps: np.ndarray, statistics: dict[str, np.ndarray], absent: np.ndarray
    ) -> None:
        """Take rows [steps, parameters] in their order."""
        norm, abs_max = statistics["norm"], statistics["abs_max"]
        present = (absent == PRESENT) & self._watched
        finite = present & (abs_max < np.inf)
        found = {
            "nan": present & np.isnan(abs_max),
            "inf": present & (abs_max == np.inf),
            "exploding": finite & (norm > self._above),
            "vanishing": finite & (norm < self._below),
            "missing": absent == MISSING,
        }
        lasting = np.stack([self.lasting, *np.stack([found[kind] for kind in KINDS], axis=1)])
        begun = np.argwhere(lasting[1:] & ~lasting[:-1])
        self.lasting = lasting[-1]
        before = Counter((issue.kind, issue.parameter) for issue in self.issues if len(begun))
        for row, number, i in begun.tolist():
            kind, name = KINDS[number], self._names[i]
            before[kind, name] += 1
            if before[kind, name] <= _MOST_EPISODES:
                value = None if kind == "missing" else float(norm[row, i])
                self.issues.append(Issue(kind, name, int(steps[row]), value))

    def now(self) -> list[Issue]:
        """The issues that have not ended."""
        newest = {(issue.kind, issue.parameter): issue for issue in self.issues}
        lasting = np.argwhere(self.lasting).tolist()
        return [newest[KINDS[kind], self._names[i]] for kind, i in lasting]
