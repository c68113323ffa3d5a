"""The derivative of a solution: of the equation, not of the way it was found."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.func import functional_call

from autograd_lib.functions.forward_mode import check_floating, transforming

__all__ = ["fixed_point"]

_Step = Callable[..., Tensor]


def _partials(f: _Step, tensors: Sequence[Tensor]) -> Callable[..., tuple[Tensor, ...]]:
    """Evaluate f once; return the products of any u with its partial derivatives.

    The derivatives are those with respect to aliases of the tensors: a tensor that depends on
    another one counts as independent of it, and yet keeps its graph for the next derivative.
    """
    with torch.enable_grad():
        inputs = [t.view_as(t) if t.requires_grad else t.detach() for t in tensors]
        inputs[0].requires_grad_()
        y = f(*inputs)
    wanted = [t for t in inputs if t.requires_grad]

    def products(u: Tensor, first: bool = False) -> tuple[Tensor, ...]:
        of = wanted[:1] if first else wanted
        create = torch.is_grad_enabled()
        return torch.autograd.grad(
            y, of, u.to(y.dtype), retain_graph=True, create_graph=create, materialize_grads=True
        )

    return products


class _Implicit(Function):
    """The z for which z = f(z, *args); with u = g + u df/dz, backward returns u df/dargs."""

    @staticmethod
    def forward(ctx: Any, f: _Step, solve: _Step, z: Tensor, *args: Tensor) -> Tensor:
        output = solve(lambda z: f(z, *args), z)
        ctx.f, ctx.solve = f, solve
        ctx.save_for_backward(output, *args)  # no cycle, where `ctx.z = output` would be one
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, *args = ctx.saved_tensors
        f, solve = ctx.f, ctx.solve
        with torch.no_grad():
            given = [a.detach().requires_grad_(a.requires_grad) for a in args]
            products = _partials(f, [z.detach(), *given])
            # A tolerance has a meaning beside a gradient of norm 1, whatever the size of the loss.
            scale = torch.linalg.vector_norm(grad)
            scale = torch.where(scale > 0, scale, 1)
            u = solve(lambda u: grad / scale + products(u, first=True)[0], grad / scale) * scale
        if torch.is_grad_enabled():  # create_graph: u is itself a fixed point, of g, z and args

            def adjoint(u: Tensor, grad: Tensor, *tensors: Tensor) -> Tensor:
                return grad + _partials(f, tensors)(u, first=True)[0]

            u = _Implicit.apply(adjoint, solve, u, grad, z, *args)
            products = _partials(f, [z, *args])
        found = iter(products(u)[1:])
        return None, None, None, *(next(found) if a.requires_grad else None for a in args)


@torch.no_grad()
def _anderson(step: _Step, z: Tensor, tol: float, max_iter: int) -> Tensor:
    """Iterate z = step(z), each time from the best combination of the last six points."""
    outputs: list[Tensor] = []
    residuals: list[Tensor] = []
    for iteration in range(1, max_iter + 1):  # noqa: B007
        output = step(z).to(z.dtype)
        residual = (output - z).flatten()
        error, allowed = residual.norm().item(), tol * (1 + output.norm().item())
        if error <= allowed:
            return output
        if not math.isfinite(error):
            break
        outputs, residuals = [*outputs[-5:], output], [*residuals[-5:], residual]
        z = output
        if len(outputs) > 1:
            wide = torch.promote_types(z.dtype, torch.float32)
            steps = torch.stack([r - residual for r in residuals[:-1]]).to(wide)
            gram = steps @ steps.T
            ridge = gram.diagonal().amax() * torch.finfo(wide).eps + torch.finfo(wide).tiny
            gram.diagonal().add_(ridge)
            shares = -torch.linalg.solve(gram, steps @ residual.to(wide)).to(z.dtype)
            for share, earlier in zip(shares, outputs[:-1], strict=True):
                z = z + share * (earlier - output)
    raise RuntimeError(
        f"fixed_point: no convergence after {iteration} of at most {max_iter} iterations: residual "
        f"{error:.1e}, tolerance {allowed:.1e}, shape {tuple(z.shape)}; allow more iterations, "
        "choose a larger tol, start nearer, or contract more: z + 0.5 * (f(z) - z)"
    )


def fixed_point(
    f: Callable[..., Tensor], z0: Tensor, *args: Tensor, tol: float = 1e-6, max_iter: int = 200
) -> Tensor:
    r"""Solve $z = f(z, \mathit{args})$, with the gradient of the solution, not of the iteration.

    With $J = \partial f / \partial z$ at the solution, the implicit function theorem gives
    $dz = (I - J)^{-1} \, \partial_{args} f$. Backward solves $u = g + J^\top u$ by products with
    $J^\top$ and returns $u^\top \partial_{args} f$, so memory does not depend on the iterations
    (Bai, Kolter & Koltun 2019, arXiv:1909.01377). Both equations are solved by Anderson
    acceleration, and the derivative can be differentiated again, to any order.

    Args:
        f: maps a tensor like `z0` and `args` to a tensor like `z0`, deterministically: backward
            calls it again. If it is a module, its parameters get their gradients too.
        z0: where the iteration starts, floating point, of any shape; it gets no gradient. A batch
            is one system, which has converged when all of it has.
        *args: all tensors that `f` depends on and that require a gradient, and any others.
        tol: the residual $\|f(z) - z\|$ allowed, relative to $1 + \|f(z)\|$; in backward relative
            to the gradient's size.
        max_iter: the most evaluations of `f`, and of products in backward.

    Returns:
        The solution. Saved for backward: itself and `args`, whatever the number of iterations.

    Raises:
        TypeError: if `z0` is not floating point.
        ValueError: if `f` returns another shape than that of `z0`, or closes over a tensor that
            requires a gradient, which would silently get none, or differentiates inside by
            `torch.autograd.grad`, whose graph looks the same; `torch.func.grad` is what works.
        RuntimeError: if either iteration does not converge.
        NotImplementedError: under `torch.func` or in forward mode.

    Example:
        >>> a = torch.tensor(4.0, requires_grad=True)
        >>> root = fixed_point(lambda z, a: (z + a / z) / 2, torch.tensor(1.0), a)
        >>> root.backward()
        >>> round(root.item(), 4), round(a.grad.item(), 4)
        (2.0, 0.25)
    """
    check_floating("fixed_point", z0)
    if transforming():
        raise NotImplementedError(
            "fixed_point: expected to be called outside torch.func transforms and forward mode, "
            "which would batch or differentiate the iteration itself; use backward() or "
            "torch.autograd.grad, and a z0 that is itself a batch"
        )
    step, tensors = f, args
    if isinstance(f, nn.Module):
        parameters = dict(f.named_parameters())
        tensors = (*parameters.values(), *args)

        def step(z: Tensor, *tensors: Tensor) -> Tensor:
            own = dict(zip(parameters, tensors, strict=False))
            return functional_call(f, own, (z, *tensors[len(own) :]))

    first = step(z0.detach(), *(t.detach() for t in tensors))
    if first.shape != z0.shape:
        raise ValueError(
            f"fixed_point: expected f to return the shape {tuple(z0.shape)} of z0, got "
            f"{tuple(first.shape)}; start from a z0 of the shape of the solution"
        )
    if first.requires_grad:
        raise ValueError(
            "fixed_point: expected f to return no graph for arguments without one, got a tensor "
            "that requires a gradient: either f closes over a tensor that requires a gradient; "
            "pass it, as in fixed_point(lambda z, w: ..., z0, w), or pass the module itself as f; "
            "or f differentiates by torch.autograd.grad; use torch.func.grad inside f"
        )
    solve = partial(_anderson, tol=tol, max_iter=max_iter)
    return _Implicit.apply(step, solve, z0.detach(), *tensors)
