"""The picture that a training run leaves behind."""

from __future__ import annotations

from pathlib import Path

from autograd_lib.report.plots import BLUE, ORANGE
from autograd_lib.training.system import AutogradTrainingSystem


def draw_training(system: AutogradTrainingSystem, path: Path) -> None:
    """Draw the losses of each epoch, and the gradient norm of each step that is remembered.

    Args:
        system: After `fit`.
        path: Of the PNG file.

    Raises:
        ImportError: Matplotlib is not installed.
    """
    from matplotlib.figure import Figure  # noqa: PLC0415 - an optional dependency

    # Not by pyplot: nothing is shown, so that no display is needed.
    figure = Figure(figsize=(6.8, 5.2), layout="constrained")
    above, below = figure.subplots(2)
    rows = system.history
    epochs = [row["epoch"] for row in rows]
    for key, color, label in (("loss", BLUE, "training"), ("validation_loss", ORANGE, "test")):
        if key in rows[0]:
            above.plot(epochs, [row[key] for row in rows], "o-", ms=3, color=color, label=label)
    above.set_xlabel("epoch")
    above.set_ylabel("mean loss")
    above.xaxis.get_major_locator().set_params(integer=True)
    above.legend(frameon=False)
    below.set_xlabel("step")
    below.set_ylabel("norm of the gradient")
    if system.monitor is not None:
        history = system.monitor.history
        below.plot(history["step"], history["total_norm"], color=BLUE, lw=0.8)
        below.set_yscale("log")  # a norm that is zero or not finite is not drawn
    figure.savefig(path, dpi=150)
