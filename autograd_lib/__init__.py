"""What PyTorch's autograd leaves out.

Gradients read, saved memory counted, training steps compared side by side; every public name is
importable from here. Importing loads torch, NumPy and the standard library only.
"""

from autograd_lib.gradients import (
    AutogradUtils,
    GradientStatistics,
    check_gradients_exist,
    compute_gradient_statistics,
    enable_gradients,
    get_gradient_norms,
    missing_gradients,
)
from autograd_lib.widgets import Explorer, explore

__version__ = "0.1.0"

__all__ = [
    "AutogradUtils",
    "Explorer",
    "GradientStatistics",
    "check_gradients_exist",
    "compute_gradient_statistics",
    "enable_gradients",
    "explore",
    "get_gradient_norms",
    "missing_gradients",
]
