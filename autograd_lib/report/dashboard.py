"""A dashboard of a gradient monitor, in a notebook and on a static page.

It has more states than could be drawn in advance, so it carries the numbers, and one script
(`dashboard.html`) draws them.
"""

from __future__ import annotations

import base64
import importlib.resources
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from autograd_lib.core.statistics import STATISTICS
from autograd_lib.report.explorer import Interactive, script_json
from autograd_lib.report.plots import Array, common_prefix, value_range

__all__ = ["GradientDashboard"]

_MOST_NUMBERS = 45_000  # of one dashboard: 240 KB of a page
_MOST_STEPS = 60
_MOST_PARAMETERS = 200
_MOST_DECADES = 14
_SHORTEST_WAIT = 0.5  # seconds between two redraws
_LARGEST_SHARE = 0.05  # of the time that redraws may take
_keys = itertools.count(1)


class GradientDashboard(Interactive):
    """A view of a monitor's history: live during training, and the same on a page without a kernel.

    At the top is the total norm over the steps. Below it is a heat map of parameters by steps for
    the chosen statistic; beside that the values at the chosen step, as bars over the range that
    each parameter had. Hovering names the parameter and gives the value, a click chooses it; menus
    and a slider do the same from the keyboard. Issues are marked where they began. Steps that the
    `GradScaler` skipped are marked above the heat map.

    Display it in a cell of its own and call `update` in the training loop. It redraws at most twice
    a second and spends at most a twentieth of the time on it; each redraw reads the history, which
    synchronizes with the device. The controls are part of the page and answer while the kernel is
    busy. Nothing runs in the background. A saved notebook or a built page shows the view at the
    moment of display: display it once more after training.

    Of a long history 60 steps are shown: those where an issue began, the others evenly spaced. Of
    more than 200 parameters those with issues are shown, and others evenly spaced. Fewer steps are
    shown where the page would become heavy otherwise, and the view says what it leaves out. A
    statistic that is recorded every few steps shows its latest value.

    Args:
        monitor: A `GradientMonitor`, or any object with its `history` and `issues`.

    Raises:
        TypeError: If `monitor` has no history.

    Example:
        >>> import torch
        >>> from autograd_lib import GradientMonitor
        >>> model = torch.nn.Linear(2, 1)
        >>> with GradientMonitor(model) as monitor:
        ...     model(torch.ones(1, 2)).sum().backward()
        >>> GradientDashboard(monitor)
        GradientDashboard(2 parameters, 1 steps)
    """

    def __init__(self, monitor: Any) -> None:
        if not hasattr(monitor, "history"):
            raise TypeError(
                f"GradientDashboard: expected a GradientMonitor, got {type(monitor).__name__}; "
                "pass the monitor itself, not its history"
            )
        self._monitor = monitor
        self._key = f"dashboard-{next(_keys)}"  # the page stores the choices under this key
        self._due = 0.0

    def __repr__(self) -> str:
        history = self._monitor.history
        names, steps = len(history["names"]), len(history["step"])
        return f"GradientDashboard({names} parameters, {steps} steps)"

    def update(self) -> None:
        """Redraw the live form, if there is one on display and a redraw is due."""
        start = time.monotonic()
        if self._output is None or start < self._due:
            return
        self._redraw()
        end = time.monotonic()
        self._due = end + max(_SHORTEST_WAIT, (end - start) / _LARGEST_SHARE)

    def to_html(self) -> str:
        """Return the view of the history so far as HTML that stands alone."""
        history = self._monitor.history
        body = "<p>No step was recorded yet.</p>"
        if len(history["step"]):
            state = _state(history, self._monitor.issues) | {"key": self._key}
            template = importlib.resources.files("autograd_lib.report").joinpath("dashboard.html")
            body = template.read_text(encoding="utf-8").replace("DATA", script_json(state), 1)
        return f'<figure class="dashboard"><!-- frames -->{body}<!-- /frames --></figure>'


def _state(history: Mapping[str, Any], issues: Sequence[Any]) -> dict[str, Any]:
    """Return everything that the script of a dashboard draws, ready for JSON."""
    statistics = [name for name in STATISTICS if name in history]
    steps, names = np.asarray(history["step"]), list(history["names"])
    row_of = {int(step): row for row, step in enumerate(steps)}
    column_of = {name: column for column, name in enumerate(names)}
    begun = [(i[0], column_of[i[1]], row_of[i[2]]) for i in issues if i[2] in row_of]
    columns = _choose(len(names), _MOST_PARAMETERS, {column for _, column, _ in begun})
    most = max(2, min(_MOST_STEPS, _MOST_NUMBERS // (len(statistics) * len(columns))))
    rows = _choose(len(steps), most, {row for *_, row in begun})
    norm, present = (np.asarray(history[key])[rows][:, columns] for key in ("norm", "present"))
    shown = {column: at for at, column in enumerate(columns.tolist())}
    counts = (("steps", len(rows), len(steps)), ("parameters", len(columns), len(names)))
    left_out = [f"{kept} of {count} {what}" for what, kept, count in counts if kept < count]
    return {
        "names": [names[column] for column in columns],
        "common": common_prefix(names),
        "steps": steps[rows].tolist(),
        "skipped": np.asarray(history["skipped"])[rows].astype(int).tolist(),
        "cells": _base64(np.where(present, np.where(np.isfinite(norm), 0, 2), 1), "u1"),
        "total": _base64(np.asarray(history["total_norm"])[rows], "<f4"),
        "statistics": [
            _scaled(name, np.asarray(history[name]), rows, columns) for name in statistics
        ],
        "issues": [
            (kind, shown[column], int(np.abs(rows - row).argmin()))
            for kind, column, row in begun
            if column in shown
        ],
        "note": f"{' and '.join(left_out)} shown" if left_out else "",
    }


def _choose(count: int, most: int, wanted: set[int]) -> Array:
    """Choose `most` of `count` places: the wanted ones, half of all at most, others evenly."""
    if count <= most:
        return np.arange(count)
    first = np.array(sorted(wanted)[: most // 2], dtype=int)
    others = np.setdiff1d(np.arange(count), first)
    spread = np.linspace(0, len(others) - 1, most - len(first)).round().astype(int)
    return np.union1d(first, others[spread])


def _scaled(name: str, values: Array, rows: Array, columns: Array) -> dict[str, Any]:
    """Return one statistic at the shown steps and parameters, with the ends of its scale."""
    values = np.real(values[:, columns]).astype(np.float64)  # a complex gradient's mean is complex
    # A value that is recorded at some steps only holds until the next one is recorded.
    known = ~np.isnan(values).all(axis=1)
    latest = np.maximum.accumulate(np.where(known, np.arange(len(values)), 0))
    values = values[latest[rows]]
    low, high, threshold = value_range(name, values)
    scale = STATISTICS[name].scale
    return {
        "key": name,
        "label": name.replace("_", " "),
        "scale": scale,
        "low": max(low, high - _MOST_DECADES) if scale == "log" else low,
        "high": high,
        "threshold": threshold,
        "values": _base64(values, "<f4"),
    }


def _base64(numbers: Array, dtype: str) -> str:
    with np.errstate(over="ignore"):  # beyond float32 a number is drawn as infinite
        return base64.b64encode(numbers.astype(dtype).tobytes()).decode()
