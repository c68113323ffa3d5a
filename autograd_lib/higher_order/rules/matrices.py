"""Functions of matrices that solve an equation: inverses, factorizations, eigenvalues.

Each starts from PyTorch's solution at t = 0 and repeats a step that gains at least one order.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet, by_coefficient, primal
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
        return cast(Tensor, by_coefficient(lambda b: torch.linalg.solve(A, b, left=left), B))
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


@jet_rule(torch.triangular_solve)
def _triangular_solve(
    B: Tensor, A: Tensor, upper: bool = True, transpose: bool = False, unitriangular: bool = False
) -> Any:
    triangle = A.triu() if upper else A.tril()
    solution = torch.linalg.solve_triangular(
        triangle.mT if transpose else triangle,
        B,
        upper=upper != transpose,
        unitriangular=unitriangular,
    )
    return torch.return_types.triangular_solve((solution, A))


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


def _hermitian(A: Tensor, upper: bool) -> Tensor:
    """PyTorch reads one triangle only."""
    return A.triu() + A.triu(1).mH if upper else A.tril() + A.tril(-1).mH


@jet_rule(torch.linalg.cholesky, torch.cholesky)
def _cholesky(A: Tensor, upper: bool = False) -> Tensor:
    start = torch.linalg.cholesky(primal(A), upper=upper)
    start = start.mH if upper else start
    inverse = torch.linalg.inv(start)
    E = inverse @ (_hermitian(A, upper) - _hermitian(primal(A), upper)) @ inverse.mH

    def half(x: Tensor) -> Tensor:
        return x.tril(-1) + torch.diag_embed(x.diagonal(dim1=-2, dim2=-1)) / 2

    root = half(E)  # of (1 + root) (1 + root)^H = 1 + E
    for _ in range(_orders(A) - 1):
        root = half(E - root @ root.mH)
    factor = start + start @ root
    return factor.mH if upper else factor


@jet_rule(torch.linalg.qr, torch.qr)
def _qr(A: Tensor, mode: str = "reduced") -> Any:
    if mode != "reduced" or A.shape[-2] < A.shape[-1]:
        raise NotImplementedError("jet: torch.linalg.qr has a rule for reduced tall matrices only")
    found = torch.linalg.qr(primal(A))
    near = A @ torch.linalg.inv(found.R)
    factor = torch.linalg.cholesky(near.mH @ near).mH
    return type(found)((near @ torch.linalg.inv(factor), factor @ found.R))


def _perturbed(E: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of `diag(values) + E`, with E zero at t = 0, and the eigenvectors less 1."""
    gaps = values.unsqueeze(-2) - values.unsqueeze(-1)
    factors = 1 / (gaps + _identity(gaps))
    factors = factors.tril(-1) + factors.triu(1)
    shift, turn = torch.zeros_like(values), torch.zeros_like(gaps)
    for _ in range(_orders(E)):
        moved = E + E @ turn
        shift = moved.diagonal(dim1=-2, dim2=-1)
        turn = factors * (moved - turn * shift.unsqueeze(-2))
    return values + shift, turn


def _turned(vectors: Tensor, turn: Tensor) -> Tensor:
    """Turn orthonormal vectors, and give them their length again."""
    lengths = (1 + (turn * turn.conj()).sum(-2, keepdim=True)).sqrt()
    return (vectors + vectors @ turn) / lengths


@jet_rule(torch.linalg.eigh)
def _eigh(A: Tensor, UPLO: str = "L") -> Any:
    found = torch.linalg.eigh(primal(A), UPLO)
    upper, V = UPLO.upper() == "U", found.eigenvectors
    E = V.mH @ (_hermitian(A, upper) - _hermitian(primal(A), upper)) @ V
    values, turn = _perturbed(E, found.eigenvalues.to(A.dtype))
    return type(found)((values.real, _turned(V, turn)))


jet_rule(torch.linalg.eigvalsh)(lambda A, UPLO="L": torch.linalg.eigh(A, UPLO)[0])


@jet_rule(torch.linalg.eigvals)
def _eigvals(A: Tensor) -> Tensor:
    values, V = torch.linalg.eig(primal(A))
    change = (A - primal(A)).to(V.dtype)
    return _perturbed(torch.linalg.inv(V) @ change @ V, values)[0]


@jet_rule(torch.linalg.svd)
def _svd(A: Tensor, full_matrices: bool = True, *, driver: Any = None) -> Any:
    if A.shape[-2] < A.shape[-1]:
        U, S, Vh = torch.linalg.svd(A.mH, full_matrices)
        return torch.return_types.linalg_svd((Vh.mH, S, U.mH))
    if full_matrices and A.shape[-2] > A.shape[-1]:
        raise NotImplementedError("jet: torch.linalg.svd has a rule for full_matrices=False only")
    found = torch.linalg.svd(primal(A), full_matrices=False)
    V, change = found.Vh.mH, A - primal(A)
    cross = primal(A).mH @ change
    E = V.mH @ (cross + cross.mH + change.mH @ change) @ V
    squares, turn = _perturbed(E, found.S.square().to(A.dtype))
    V, S = _turned(V, turn), squares.real.sqrt()
    return type(found)((A @ V / S.unsqueeze(-2), S, V.mH))


jet_rule(torch.linalg.svdvals)(lambda A, **_: torch.linalg.svd(A, full_matrices=False)[1])


@jet_rule(torch.linalg.pinv)
def _pinv(A: Tensor, *_: Any, **__: Any) -> Tensor:
    if A.shape[-2] < A.shape[-1]:
        return torch.linalg.pinv(A.mH).mH
    return torch.linalg.inv(A.mH @ A) @ A.mH


@jet_rule(torch.linalg.lstsq)
def _lstsq(A: Tensor, B: Tensor, rcond: Any = None, *, driver: Any = None) -> Any:
    found = torch.linalg.lstsq(primal(A), primal(B), rcond, driver=driver)
    return type(found)((torch.linalg.pinv(A) @ B, *found[1:]))


@jet_rule(torch.matrix_exp, torch.linalg.matrix_exp)
def _matrix_exp(A: Tensor) -> Tensor:
    largest = torch.linalg.matrix_norm(primal(A).detach(), 1).max().item()
    halvings = max(0, math.ceil(math.log2(largest * 2))) if largest else 0
    X, one = A / 2**halvings, _identity(A)
    power = one
    for n in range(18 + _orders(A), 0, -1):
        power = one + X @ power / n
    for _ in range(halvings):
        power = power @ power
    return power
