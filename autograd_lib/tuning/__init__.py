"""The fastest settings that fit a budget of bytes and keep the gradient, and a check of that."""

from autograd_lib.tuning.tuner import Trial, TuningReport, autotune
from autograd_lib.tuning.verify import GradientReport, verify_gradients

__all__ = ["GradientReport", "Trial", "TuningReport", "autotune", "verify_gradients"]
