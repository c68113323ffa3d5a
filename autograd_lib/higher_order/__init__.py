"""Derivatives beyond the first: Taylor mode, towers, products with the Hessian, its spectrum."""

import autograd_lib.higher_order.rules  # noqa: F401 - fills the table of rules
from autograd_lib.higher_order.ggn import fisher_product, ggn_product
from autograd_lib.higher_order.operators import (
    Estimate,
    biharmonic,
    hessian_diagonal,
    hessian_trace,
    hvp,
    laplacian,
    linearize_hvp,
)
from autograd_lib.higher_order.solution import taylor_solution
from autograd_lib.higher_order.spectra import top_eigenvalues
from autograd_lib.higher_order.taylor import jet, jet_rule
from autograd_lib.higher_order.tower import DerivativeTower, derivative_tower
from autograd_lib.higher_order.verify import DerivativeReport, verify_derivatives

__all__ = [
    "DerivativeReport",
    "DerivativeTower",
    "Estimate",
    "biharmonic",
    "derivative_tower",
    "fisher_product",
    "ggn_product",
    "hessian_diagonal",
    "hessian_trace",
    "hvp",
    "jet",
    "jet_rule",
    "laplacian",
    "linearize_hvp",
    "taylor_solution",
    "top_eigenvalues",
    "verify_derivatives",
]
