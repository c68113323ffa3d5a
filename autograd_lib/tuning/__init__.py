"""The fastest settings that fit a budget of bytes and keep the gradient."""

from autograd_lib.tuning.tuner import Trial, TuningReport, autotune

__all__ = ["Trial", "TuningReport", "autotune"]
