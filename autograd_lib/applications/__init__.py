"""What autograd makes possible: equations solved, learning to learn, attacks, uncertainty."""

from autograd_lib.applications.ode import Solution, solve_ode

__all__ = ["Solution", "solve_ode"]
