"""Eigenvalues of the Hessian."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from autograd_lib.higher_order.inputs import (
    Inputs,
    Scalar,
    check_floating,
    structured_like,
    tensors_of,
)
from autograd_lib.higher_order.operators import linearized_hvp

__all__ = ["top_eigenvalues"]


def top_eigenvalues(f: Scalar, x: Inputs, k: int) -> Tensor:
    r"""Return the k eigenvalues of the Hessian that are largest in magnitude.

    The Lanczos method by SciPy (`scipy.sparse.linalg.eigsh`, implicitly restarted), on
    Hessian-vector products at the precision of `x`. The first is the sharpness: gradient descent
    with a step above $2 / \lambda$ diverges along its eigenvector.

    Args:
        f: a scalar function of one tensor, or of one dict of tensors.
        x: where to differentiate: a real floating-point tensor or a dict of them, n numbers in all.
        k: how many, between 1 and n.

    Returns:
        k eigenvalues, float64, largest in magnitude first.

    Raises:
        ImportError: if SciPy is not installed.
        RuntimeError: if Lanczos does not converge.
        TypeError: if `x` is not real floating point.
        ValueError: if `k` is not between 1 and n, `f` returns more than one number, or the Hessian
            is not finite.

    Example:
        >>> top_eigenvalues(lambda x: (x**3).sum(), torch.tensor([1.0, -3.0, 2.0]), 2)
        tensor([-18.,  12.], dtype=torch.float64)
    """
    try:
        from scipy.sparse.linalg import (  # noqa: PLC0415 - an optional dependency
            ArpackError,
            LinearOperator,
            eigsh,
        )
    except ImportError as error:
        raise ImportError("top_eigenvalues: SciPy is needed: pip install scipy") from error
    check_floating("top_eigenvalues", x, real=True)
    tensors = tensors_of(x)
    n = sum(t.numel() for t in tensors)
    if not isinstance(k, int) or not 1 <= k <= n:
        raise ValueError(f"top_eigenvalues: expected k between 1 and {n}, got {k!r}")
    product = linearized_hvp("top_eigenvalues", f, x)

    def column(vector: Any) -> Any:
        parts = torch.from_numpy(np.asarray(vector, dtype=np.float64).ravel()).split(
            [t.numel() for t in tensors]
        )
        v = [part.to(t).reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]
        columns = tensors_of(product(structured_like(x, v)))
        return torch.cat([c.flatten().double().cpu() for c in columns]).numpy()

    start = np.random.default_rng(0).standard_normal(n)
    image = column(start)
    if not np.isfinite(image).all():
        raise ValueError("top_eigenvalues: expected a finite Hessian, got NaN or Inf at x")
    if not image.any():  # with probability one the Hessian is zero
        return torch.zeros(k, dtype=torch.float64)
    if k >= n - 1:  # too small for Lanczos
        dense = np.stack([column(row) for row in np.eye(n)])
        found = np.linalg.eigvalsh((dense + dense.T) / 2)
    else:
        precision = max(torch.finfo(t.dtype).eps for t in tensors)
        operator = LinearOperator((n, n), matvec=column, dtype=np.float64)
        try:
            found = eigsh(
                operator, k, which="LM", v0=start, tol=precision**0.75, return_eigenvectors=False
            )
        except ArpackError as error:
            raise RuntimeError(
                f"top_eigenvalues: Lanczos did not find {k} eigenvalues ({error}); convert x and f "
                "to float64, or ask for another k"
            ) from error
    order = np.argsort(-np.abs(found))[:k]
    return torch.from_numpy(np.ascontiguousarray(found[order]))
