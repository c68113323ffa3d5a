"""One training step, and the loop around it, in one process or many."""

from autograd_lib.training.system import AutogradTrainingSystem

__all__ = ["AutogradTrainingSystem"]
