"""Matrix products, `einsum` and other sums of products of two tensors."""

from __future__ import annotations

import math
from string import ascii_letters
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet
from autograd_lib.higher_order.rules.registration import contract, named, plus
from autograd_lib.higher_order.series import Operation
from autograd_lib.higher_order.taylor import jet_rule


class _Matmul(Operation):
    """The matrix product over the last two dimensions.

    Where both stacks are long, the orders join the dimension that is summed: each coefficient is
    one product of `[a_0 ... a_k]` and `[b_k ... b_0]`.
    """

    def apply(self, a: Tensor, b: Tensor) -> Tensor:
        return a @ b

    def apply_left(self, grad: Tensor, b: Tensor, a: Tensor) -> Tensor:
        return (grad @ b.mH).sum_to_size(len(grad), *a.shape[1:])

    def apply_right(self, grad: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if b.ndim == 2:  # weights: one product over everything before
            return a.reshape(-1, a.shape[-1]).mH @ grad.reshape(-1, grad.shape[-1])
        return (a.mH @ grad).sum(0).sum_to_size(b.shape)

    def add_to(self, z: Tensor, a: Tensor, b: Tensor) -> None:
        watched = torch.is_grad_enabled() or torch._C._len_torch_dispatch_stack()
        plain = z.dtype == a.dtype == b.dtype and not torch._C._are_functorch_transforms_active()
        if watched or b.ndim > 2 or not (plain and z.is_contiguous()):
            z += a @ b
        else:  # without a pass over z; counters of FLOPs and autocast do not know addmm_
            z.view(-1, z.shape[-1]).addmm_(a.reshape(-1, a.shape[-1]), b)

    def left(self, grad: Tensor, b: Tensor, a: Tensor) -> Tensor:
        if len(b) >= 3 and a.shape[1:-2] == b.shape[1:-2]:
            wide, tall, n = _side_by_side(grad), _one_above_other(b.mH), b.shape[-1]
            counts = [min(len(b), len(grad) - i) for i in range(len(a))]
            return torch.stack(
                [
                    wide[..., i * n : (i + count) * n] @ tall[..., : count * n, :]
                    for i, count in enumerate(counts)
                ]
            )
        if b.ndim > 3:
            return super().left(grad, b, a)
        grad_a = grad[: len(a)] @ b[0].mH
        for j in range(1, min(len(b), len(grad))):
            n = min(len(a), len(grad) - j)
            self.add_to(grad_a[:n], grad[j : j + n], b[j].mH)
        return grad_a

    def forward(self, a: Tensor, b: Tensor, size: int) -> Tensor:
        if min(len(a), len(b)) < 3 or a.shape[1:-2] != b.shape[1:-2]:
            return super().forward(a, b, size)
        wide, tall, n = _side_by_side(a), _one_above_other(b.flip(0)), a.shape[-1]
        products = []
        for k in range(size):
            # the orders i of a, for which k - i is an order of b
            first, last = max(0, k + 1 - len(b)), min(k + 1, len(a))
            above = len(b) - 1 - k + first
            products.append(
                wide[..., first * n : last * n]
                @ tall[..., above * n : (above + last - first) * n, :]
            )
        return torch.stack(products)

    def right(self, grad: Tensor, a: Tensor, b: Tensor) -> Tensor:
        if len(a) < 3 or a.shape[1:-2] != b.shape[1:-2]:
            return super().right(grad, a, b)
        return self.left(grad.mT, a.mT, b.mT).mT


def _side_by_side(stack: Tensor) -> Tensor:
    """From `(n, *batch, i, j)` to `(*batch, i, n j)`."""
    return stack.movedim(0, -2).flatten(-2)


def _one_above_other(stack: Tensor) -> Tensor:
    """From `(n, *batch, i, j)` to `(*batch, n i, j)`."""
    return stack.movedim(0, -3).flatten(-3, -2)


_MATMUL = _Matmul()


@jet_rule(torch.matmul, Tensor.__matmul__, torch.bmm, torch.mm, torch.mv, torch.dot)
def _matmul(x: Tensor, other: Tensor) -> Tensor:
    if x.ndim == 1:
        return torch.matmul(x.unsqueeze(0), other).squeeze(-2 if other.ndim > 1 else -1)
    if other.ndim == 1:
        return torch.matmul(x, other.unsqueeze(-1)).squeeze(-1)
    if _live(other) > max(_live(x), 2):  # the loop is over the coefficients of the second
        return torch.matmul(other.mT, x.mT).mT
    if x.ndim < other.ndim and other.ndim > 2:
        x = x.expand(*[1] * (other.ndim - x.ndim), *x.shape)
    return contract(_MATMUL, x, other)


def _live(x: Tensor) -> int:
    return x.live if isinstance(x, Jet) else 1


@jet_rule(F.linear)
def _linear_layer(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = _matmul(input, weight.mT if weight.ndim > 1 else weight)
    return product if bias is None else plus(product, bias)


@jet_rule(torch.addmm, torch.baddbmm, torch.addmv)
def _addmm(input: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * input + alpha * torch.matmul(a, b)


class _Einsum(Operation):
    """Two operands without repeated letters; every letter of one is in the other or the result."""

    def __init__(self, a: str, b: str, out: str) -> None:
        self.a, self.b, self.out = a, b, out

    def apply(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum(f"Z{self.a},{self.b}->Z{self.out}", a, b)

    def apply_left(self, grad: Tensor, b: Tensor, a: Tensor) -> Tensor:
        return torch.einsum(f"Z{self.out},{self.b}->Z{self.a}", grad, b.conj())

    def apply_right(self, grad: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum(f"Z{self.out},Z{self.a}->{self.b}", grad, a.conj())


@jet_rule(*named("einsum", torch._VF))
def _einsum(equation: str, operands: Any, path: Any = None) -> Tensor:
    equation = equation.replace(" ", "")
    spare = [letter for letter in ascii_letters if letter not in equation and letter != "Z"]
    sizes = {
        x.ndim - len(term) + 3
        for term, x in zip(equation.partition("->")[0].split(","), operands, strict=True)
        if "..." in term
    }
    if len(sizes) > 1 or "Z" in equation:
        raise NotImplementedError(
            "jet: torch.einsum has a rule for equations of the letters a to Y, with as many "
            f"dimensions for each '...', got {equation!r}"
        )
    ellipsis = "".join(spare[: sizes.pop()]) if sizes else ""
    left, arrow, out = equation.replace("...", ellipsis).partition("->")
    terms = left.split(",")
    if not arrow:
        letters = sorted(set(left) - {",", *ellipsis})
        out = ellipsis + "".join(letter for letter in letters if left.count(letter) == 1)
    values = list(operands)
    while len(values) > 1:
        rest = "".join(terms[2:]) + out
        a, x = _reduced(terms[0], values[0], terms[1] + rest)
        b, y = _reduced(terms[1], values[1], terms[0] + rest)
        target = "".join(dict.fromkeys(letter for letter in a + b if letter in rest))
        target = target if len(values) > 2 else out
        if _live(y) > _live(x):
            a, b, x, y = b, a, y, x
        product = contract(_Einsum(a, b, target), x, y)
        terms, values = [target, *terms[2:]], [product, *values[2:]]
    return _reduce_to(terms[0], values[0], out)


def _reduced(term: str, x: Tensor, others: str) -> tuple[str, Tensor]:
    """Take the diagonals, and the sums over letters that nothing else has."""
    kept = "".join(dict.fromkeys(letter for letter in term if letter in others))
    return kept, _reduce_to(term, x, kept)


def _reduce_to(term: str, x: Tensor, kept: str) -> Tensor:
    if term == kept:
        return x
    if not isinstance(x, Jet):
        return torch.einsum(f"{term}->{kept}", x)
    return x.map(lambda c: torch.einsum(f"Z{term}->Z{kept}", c))


@jet_rule(*named("tensordot", torch._VF))
def _tensordot(x: Tensor, y: Tensor, *dims: Any) -> Tensor:
    a, b = ([d % t.ndim for d in ds] for t, ds in zip((x, y), dims, strict=True))
    kept_x, kept_y = ([d for d in range(t.ndim) if d not in ds] for t, ds in ((x, a), (y, b)))
    rows = x.permute(*kept_x, *a).reshape(-1, math.prod(x.shape[d] for d in a))
    columns = y.permute(*b, *kept_y).reshape(math.prod(y.shape[d] for d in b), -1)
    return (rows @ columns).reshape([x.shape[d] for d in kept_x] + [y.shape[d] for d in kept_y])


@jet_rule(F.bilinear)
def _bilinear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rows = torch.einsum("bi,oij,bj->bo", x.flatten(0, -2), weight, y.flatten(0, -2))
    product = rows.reshape(*x.shape[:-1], -1)
    return product if bias is None else product + bias
