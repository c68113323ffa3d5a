"""Which operation made the first NaN or Inf, and a guard around each step."""

from autograd_lib.nonfinite.guard import NonFinite, NonFiniteGuard, find_nonfinite

__all__ = ["NonFinite", "NonFiniteGuard", "find_nonfinite"]
