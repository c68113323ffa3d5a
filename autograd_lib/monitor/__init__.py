"""Every gradient at every step of a training run, its history, and pictures of it."""

from autograd_lib.monitor.figures import (
    plot_gradient_flow,
    plot_gradient_heatmap,
    plot_gradient_histograms,
)
from autograd_lib.monitor.monitor import GradientMonitor, Issue, NoiseScale

__all__ = [
    "GradientMonitor",
    "Issue",
    "NoiseScale",
    "plot_gradient_flow",
    "plot_gradient_heatmap",
    "plot_gradient_histograms",
]
