"""What PyTorch's autograd leaves out.

Gradients read, saved memory counted, training steps compared side by side; every public name is
importable from here. Importing loads torch, NumPy and the standard library only.
"""

from autograd_lib.benchmark import Comparison, Ratio, compare
from autograd_lib.gradients import (
    AutogradUtils,
    GradientStatistics,
    check_gradients_exist,
    compute_gradient_statistics,
    enable_gradients,
    get_gradient_norms,
    missing_gradients,
)
from autograd_lib.memory import SavedTensors, peak_bytes, saved_tensors
from autograd_lib.widgets import Explorer, explore

__version__ = "0.1.0"

__all__ = [
    "AutogradUtils",
    "Comparison",
    "Explorer",
    "GradientStatistics",
    "Ratio",
    "SavedTensors",
    "check_gradients_exist",
    "compare",
    "compute_gradient_statistics",
    "enable_gradients",
    "explore",
    "get_gradient_norms",
    "missing_gradients",
    "peak_bytes",
    "saved_tensors",
]
