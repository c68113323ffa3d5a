"""What autograd makes possible: equations solved, learning to learn, attacks, uncertainty."""

from autograd_lib.applications.attacks import (
    Attack,
    MaskingReport,
    attack,
    masking_report,
    minimal_perturbation,
)
from autograd_lib.applications.meta import adapt, implicit_adapt
from autograd_lib.applications.ode import Solution, solve_ode
from autograd_lib.applications.posterior import Posterior, Prediction, laplace_posterior

__all__ = [
    "Attack",
    "MaskingReport",
    "Posterior",
    "Prediction",
    "Solution",
    "adapt",
    "attack",
    "implicit_adapt",
    "laplace_posterior",
    "masking_report",
    "minimal_perturbation",
    "solve_ode",
]
