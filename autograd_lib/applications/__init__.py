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

__all__ = [
    "Attack",
    "MaskingReport",
    "Solution",
    "adapt",
    "attack",
    "implicit_adapt",
    "masking_report",
    "minimal_perturbation",
    "solve_ode",
]
