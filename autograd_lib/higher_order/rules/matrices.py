"""Functions of matrices that solve an equation: inverses, factorizations, eigenvalues.

Each starts from PyTorch's solution at t = 0 and repeats a step that gains at least one order.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet, primal, together
from autograd_lib.higher_order.taylor import jet_rule


def _identity(like: Tensor) -> Tensor:
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def _orders(x: Tensor) -> int:
    return cast(Jet, x).algebra.length - 1


@jet_rule(torch.linalg.inv, torch.inverse)
def _inv(A: Tensor) -> Tensor:
    inverse = torch.linalg.inv(primal(A))
    for _ in range(_orders(A).bit_length()):  # Newton's step doubles the order
        inverse = 2 * inverse - inverse @ A @ inverse
    return inverse


@jet_rule(torch.linalg.solve)
def _solve(A: Tensor, B: Tensor, *, left: bool = True) -> Tensor:
    if not isinstance(A, Jet):
        return cast(Tensor, together(lambda b: torch.linalg.solve(A, b, left=left), B))
    if B.ndim == 1 or (B.ndim == A.ndim - 1 and B.shape == A.shape[:-1]):
        return (torch.linalg.inv(A) @ B.unsqueeze(-1)).squeeze(-1)
    return torch.linalg.inv(A) @ B if left else B @ torch.linalg.inv(A)


@jet_rule(torch.linalg.solve_triangular)
def _solve_triangular(
    A: Tensor, B: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False
) -> Tensor:
    A = A.triu() if upper else A.tril()
    if unitriangular:
        A = A - torch.diag_embed(A.diagonal(dim1=-2, dim2=-1)) + _identity(A)
    return torch.linalg.solve(A, B, left=left)


@jet_rule(torch.cholesky_solve)
def _cholesky_solve(B: Tensor, L: Tensor, upper: bool = False) -> Tensor:
    return torch.cholesky_inverse(L, upper) @ B


@jet_rule(torch.cholesky_inverse)
def _cholesky_inverse(L: Tensor, upper: bool = False) -> Tensor:
    inverse = torch.linalg.inv(L.triu().mH if upper else L.tril())
    return inverse.mH @ inverse


def _relative(A: Tensor) -> Tensor:
    """The E without a term at t = 0 in `A = A_0 (1 + E)`."""
    return torch.linalg.inv(primal(A)) @ (A - primal(A))


@jet_rule(torch.linalg.slogdet, torch.slogdet)
def _slogdet(A: Tensor) -> Any:
    found = torch.linalg.slogdet(primal(A))
    E = power = _relative(A)
    total = found.logabsdet
    for m in range(1, _orders(A) + 1):  # log det (1 + E)
        trace = power.diagonal(dim1=-2, dim2=-1).sum(-1)
        total = total - trace * ((-1) ** m / m)
        power = power @ E
    if A.is_complex():
        raise NotImplementedError("jet: torch.linalg.slogdet has no rule for complex matrices")
    return type(found)((found.sign, total))


@jet_rule(torch.linalg.det, torch.det)
def _det(A: Tensor) -> Tensor:
    log = torch.linalg.slogdet(A)[1]
    return torch.linalg.det(primal(A)) * torch.exp(log - primal(log))


@jet_rule(torch.logdet)
def _logdet(A: Tensor) -> Tensor:
    sign, log = torch.linalg.slogdet(A)
    return log.masked_fill(sign < 0, math.nan)


@jet_rule(torch.linalg.cholesky)
def _cholesky(A: Tensor, upper: bool = False) -> Tensor:
    A = A.triu() + A.triu(1).mH if upper else A.tril() + A.tril(-1).mH  # PyTorch reads one half
    start = torch.linalg.cholesky(primal(A))
    inverse = torch.linalg.inv(start)
    E = inverse @ (A - primal(A)) @ inverse.mH

    def half(x: Tensor) -> Tensor:
        return x.tril(-1) + torch.diag_embed(x.diagonal(dim1=-2, dim2=-1)) / 2

    root = half(E)  # of (1 + root) (1 + root)^H = 1 + E
    for _ in range(_orders(A) - 1):
        root = half(E - root @ root.mH)
    factor = start + start @ root
    return factor.mH if upper else factor
