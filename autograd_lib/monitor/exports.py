"""How a monitor is read: its history, a table, files, numbers for loggers."""

from __future__ import annotations

import csv
import weakref
from collections.abc import Sequence
from html import escape
from importlib import import_module
from os import PathLike, fspath
from typing import Any

import numpy as np

from autograd_lib.core.optional import optional
from autograd_lib.core.statistics import STATISTICS
from autograd_lib.gradients import GradientStatistics
from autograd_lib.monitor.history import UNWATCHED, Issue, Record, Unwatched
from autograd_lib.monitor.noise_scale import NoiseScale, estimate
from autograd_lib.monitor.options import check_integer

Columns = dict[str, np.ndarray]


class Readings:
    """How a monitor is read. Only these methods wait for the device."""

    _record: Record
    _written: dict[Any, int]  # up to which step, by directory or writer
    _writers: dict[Any, Any]  # by directory
    _noise: bool

    def _is_unwatched(self) -> bool:
        raise NotImplementedError

    @property
    def issues(self) -> list[Issue]:
        """The issues so far, in the order of steps; a problem that lasts is one `Issue`."""
        if self._is_unwatched():
            return Unwatched()
        self._record.read()
        return list(self._record.issues)

    @property
    def history(self) -> dict[str, Any]:
        """What was recorded of the last steps, as NumPy arrays of shape [steps, parameters].

        `["step"]` and `["names"]` say what the rows and columns are, `["numel"]` how many elements
        a parameter has. `["present"]` tells where there was a gradient, `["missing"]` where one was
        required and there was none. `["norm"]`, `["mean"]`, `["std"]`, `["min"]`, `["max"]`,
        `["abs_max"]` are NaN where there was none. `["total_norm"]` and `["skipped"]` have one
        entry a step, and so has `["clipped_norm"]`: the total norm after clipping where `look()`
        was called before, else NaN. If collected, the history also has `["zero_fraction"]`,
        `["nan_count"]`, `["inf_count"]`, `["cosine"]` and `["update_ratio"]`, NaN in the steps
        between; and `["histogram"]` of shape [recorded steps, parameters, 64], with
        `["histogram_step"]` and 65 `["histogram_edges"]`, powers of two: the first bin holds zeros
        too, the last one all that is larger.
        """
        self._is_unwatched()
        return self._record.arrays()

    def get_gradient_summary(self) -> GradientStatistics:
        """Summarize the last step that was looked at.

        Returns:
            Its statistics, which print as a table: `["parameters"]` holds norm, mean, std, min,
            max, abs_max and numel, and what else was collected at that step; `["step"]` is its
            number and `["issues"]` lists what still lasts. Before the first step `total_norm` and
            `step` are 0 and `parameters` is empty.
        """
        note = {"note": UNWATCHED} if self._is_unwatched() else {}
        return GradientStatistics(**self._record.summary(), **note)

    def noise_scale(self, micro_batch: int, last: int | None = None) -> NoiseScale:
        r"""Estimate the batch size beyond which larger batches help little.

        The gradient noise scale $\operatorname{tr}(\Sigma) / |G|^2$ (McCandlish et al. 2018,
        eq. 2.8) is the batch size at which the noise of a step is as large as its gradient. It is
        estimated from the norms of the gradient as it accumulates over the micro-batches of a step:
        at least two are needed, of equal size, with a loss that is a mean. Give the monitor the
        model that is called: of a `DistributedDataParallel` it knows which backwards were averaged.
        With `fully_shard` each micro-batch must be, else only the last one of a step is seen.
        The randomness of dropout counts as noise.

        Args:
            micro_batch: Samples in one micro-batch of one process.
            last: Use only the last so many steps, because the scale grows as the loss falls.

        Returns:
            The estimate from the remembered steps, with its interval.

        Raises:
            ValueError: The monitor was made without `noise=True`, `micro_batch` or `last` is not
                positive, or fewer than two steps have two micro-batches.
        """
        if not self._noise:
            raise ValueError("noise_scale: nothing was recorded; make the monitor with noise=True")
        check_integer("noise_scale", "micro_batch", micro_batch, 1)
        check_integer("noise_scale", "last", 1 if last is None else last, 1)
        records = self._record.noise()
        if last is not None and len(records):
            records = records[records[:, 0] > records[-1, 0] - last]
        return estimate(records, micro_batch)

    def to_csv(self, path: str | PathLike[str]) -> None:
        """Write the history as CSV: a line for each step and each parameter that had a gradient.

        Raises:
            OSError: The file cannot be written.
        """
        table = columns(self.history)
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(table)
            writer.writerows(zip(*(values.tolist() for values in table.values()), strict=True))

    def to_parquet(self, path: str | PathLike[str]) -> None:
        """Write the table of `to_csv` as Parquet.

        Raises:
            ImportError: pyarrow is not installed.
            OSError: The file cannot be written.
        """
        parquet = optional("to_parquet", "pyarrow.parquet")
        parquet.write_table(import_module("pyarrow").table(columns(self.history)), path)

    def to_dataframe(self) -> Any:
        """The table of `to_csv` as a `pandas.DataFrame`.

        Raises:
            ImportError: pandas is not installed.
        """
        return optional("to_dataframe", "pandas").DataFrame(columns(self.history))

    def to_tensorboard(self, writer: Any) -> None:
        """Write the total norm, that after clipping, and the norms, to TensorBoard.

        It may be called at every step or at the end: each step is written once to a writer or
        directory.

        Args:
            writer: A `torch.utils.tensorboard.SummaryWriter`, what has its `add_scalar`, or the
                directory of a writer to make.

        Raises:
            ImportError: A directory is given and tensorboard is not installed.
            TypeError: It is none of these.
        """
        is_directory = isinstance(writer, str | PathLike)
        if not is_directory and not hasattr(writer, "add_scalar"):
            raise TypeError(
                "to_tensorboard: expected a directory or a SummaryWriter, got "
                f"{type(writer).__name__}"
            )
        self._is_unwatched()
        key, target = fspath(writer) if is_directory else weakref.ref(writer), writer
        if is_directory:
            optional("to_tensorboard", "tensorboard")
            if key not in self._writers:  # kept, as each makes a file
                self._writers[key] = import_module("torch.utils.tensorboard").SummaryWriter(key)
            target = self._writers[key]
        history = self._record.arrays(self._written.get(key, 0))
        for row, step in enumerate(history["step"].tolist()):
            for name, value in scalars(history, row, ["norm"]).items():
                target.add_scalar(name, value, step)
        if is_directory:
            target.flush()
        self._written[key] = self._record.last

    def scalars(self, *statistics: str) -> dict[str, float]:
        """The last step as a flat dict, for `wandb.log`, `mlflow.log_metrics` and their like.

        Args:
            *statistics: Which to give of each parameter, as "norm" or "std"; by default the norm.

        Returns:
            `"gradients/total_norm"`; `"gradients/clipped_norm"` where `look()` was called before
            clipping; and `"gradients/norm/NAME"`, or what else was asked for, of each parameter
            that had a gradient. Of a complex mean it gives the real part. Empty before the first
            step.

        Raises:
            ValueError: A statistic is unknown or was not collected, once a step is recorded.

        Example:
            >>> import torch
            >>> from autograd_lib import GradientMonitor
            >>> model = torch.nn.Linear(2, 1)
            >>> with GradientMonitor(model) as monitor:
            ...     model(torch.tensor([[3.0, 4.0]])).sum().backward()
            >>> monitor.scalars("max")["gradients/max/weight"]
            4.0
        """
        self._is_unwatched()
        history = self._record.arrays(self._record.last - 1)
        return scalars(history, -1, statistics or ["norm"]) if len(history["step"]) else {}

    def _repr_html_(self) -> str:
        """A small table for notebooks: the last step, and the issues."""
        summary = self.get_gradient_summary()._repr_html_()  # reading finds issues
        return f"<p>{escape(repr(self))}</p>{summary}"


def columns(history: dict[str, Any]) -> Columns:
    """The history in long form: a row for each step and each parameter with a gradient in it."""
    present = history["present"]
    steps, parameters = present.shape
    found = {
        "step": np.repeat(history["step"], parameters),
        "parameter": np.tile(np.array(history["names"], dtype=object), steps),
        **{name: history[name].reshape(-1) for name in STATISTICS if name in history},
        "numel": np.tile(history["numel"], steps),
        "skipped": np.repeat(history["skipped"], parameters),
    }
    if np.iscomplexobj(found["mean"]):
        mean = found.pop("mean")
        found |= {"mean": mean.real, "mean_imag": mean.imag}
    return {name: values[present.reshape(-1)] for name, values in found.items()}


def scalars(history: dict[str, Any], row: int, statistics: Sequence[str]) -> dict[str, float]:
    """The norms of one recorded step, and statistics of each parameter with a gradient in it."""
    unknown = [s for s in statistics if s not in STATISTICS or s not in history]
    if unknown:
        known = [name for name in STATISTICS if name in history]
        raise ValueError(
            f"scalars: expected statistics among {known}, got {unknown}; collect others by "
            "GradientMonitor(collect=..., update_every=...)"
        )
    found = {f"gradients/{name}": history[name][row] for name in ("total_norm", "clipped_norm")}
    for statistic in statistics:
        for i in np.flatnonzero(history["present"][row]).tolist():
            value = history[statistic][row, i]
            found[f"gradients/{statistic}/{history['names'][i]}"] = value.real
    if np.isnan(found["gradients/clipped_norm"]):  # nobody looked before
        del found["gradients/clipped_norm"]
    return {name: float(value) for name, value in found.items()}
