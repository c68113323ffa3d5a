"""Derivatives beyond the first: Taylor mode, towers, products with the Hessian, its spectrum."""

from autograd_lib.higher_order.operators import (
    DerivativeReport,
    DerivativeTower,
    Estimate,
    derivative_tower,
    hessian_diagonal,
    hessian_trace,
    hvp,
    laplacian,
    linearize_hvp,
    top_eigenvalues,
    verify_derivatives,
)
from autograd_lib.higher_order.taylor import jet, jet_rule

__all__ = [
    "DerivativeReport",
    "DerivativeTower",
    "Estimate",
    "derivative_tower",
    "hessian_diagonal",
    "hessian_trace",
    "hvp",
    "jet",
    "jet_rule",
    "laplacian",
    "linearize_hvp",
    "top_eigenvalues",
    "verify_derivatives",
]
