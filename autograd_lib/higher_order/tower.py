"""The derivatives of a loss along one direction, for a model and its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils.stateless import _reparametrize_module

from autograd_lib.core.batches import call, own_loss, read_batch
from autograd_lib.higher_order.algebra import Taylor
from autograd_lib.higher_order.dispatch import Jet, following, lift
from autograd_lib.higher_order.inputs import (
    check_scalar,
    check_uncompiled,
    follow,
    map_tensors,
    sum_dtype,
    trainable,
)
from autograd_lib.higher_order.series import derivative, pad
from autograd_lib.report.tables import Row, Table

__all__ = ["DerivativeTower", "derivative_tower"]


@dataclass(frozen=True, repr=False, eq=False)
class DerivativeTower(Table, Sequence[dict[str, Tensor]]):
    r"""The derivatives of a loss along one direction: a sequence of dicts by parameter name.

    Entry k - 1 is the derivative of order k contracted k - 1 times with the direction,
    $D^k L(\theta)[v, \dots, v, \cdot]$, each tensor like its parameter: the gradient, the
    Hessian-vector product, and so on.

    Attributes:
        values: $D^k L(\theta)[v, \dots, v]$ for k from 0, the loss, up to the order; a tensor.
        direction: the v that was used, by parameter name.
    """

    _vectors: list[dict[str, Tensor]]
    values: Tensor
    direction: dict[str, Tensor]

    def __len__(self) -> int:
        return len(self._vectors)

    def __getitem__(self, index: Any) -> Any:
        return self._vectors[index]

    def _table(self) -> tuple[str, Row, list[Row]]:
        sizes = sum(v.numel() for v in self.direction.values())
        title = f"derivatives of the loss along one direction, {sizes:,} parameters"
        rows: list[Row] = [["0", f"{self.values[0].item():.4g}", ""]]
        for k, vector in enumerate(self, start=1):
            norm = _norm(list(vector.values())).item()
            rows.append([str(k), f"{self.values[k].item():.4g}", f"{norm:.4g}"])
        return title, ["order", "value", "norm of the vector"], rows


def derivative_tower(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor] | None,
    input: Any,
    target: Any = None,
    order: int = 2,
    direction: Mapping[str, Tensor] | None = None,
) -> DerivativeTower:
    r"""Return the gradient and the derivatives beyond it, contracted with one direction.

    $D^k L(\theta)[v, \dots, v, \cdot]$ for k from 1 to K, shaped like the parameters, from one
    Taylor pass and one backward: with $\varphi_j$ the Taylor coefficients of $L$ along
    $\theta(t) = \sum_j \theta_j t^j$, the derivative of $\varphi_{K-1}$ with respect to
    $\theta_j$ is $\frac{1}{(K-1-j)!} D^{K-j} L(\theta)[v, \dots, v, \cdot]$ at $\theta_1 = v$ and
    $\theta_{j>1} = 0$.

    Args:
        model: a module; its parameters that require a gradient are differentiated, shared ones
            once. Its parameters, gradients, buffers and mode are the same afterwards; during the
            call its parameters are replaced, so no other thread may use it.
        loss_fn: `loss_fn(model(input), target)` is the loss, a scalar; None for the loss that the
            model computes itself, as `output.loss`.
        input: what `model` is called with; without `loss_fn` a mapping of keyword arguments or a
            tuple of positional ones is taken apart.
        target: the second argument of `loss_fn`.
        order: the highest derivative K, at least 1.
        direction: a tensor for each of those parameters, by name. Without one, the gradient divided
            by its norm, at the price of one more gradient.

    Returns:
        A `DerivativeTower` of `order` dicts, detached.

    Raises:
        NotImplementedError: if an operation has no rule (`jet_rule` adds one), or a batch norm is
            in training mode with running statistics.
        ValueError: if `direction` has other names or shapes than the parameters, the loss is not a
            scalar, `order` is below 1, no parameter requires a gradient, or `direction` is None
            where the gradient is zero or not finite.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 2.0)
        >>> cube = lambda y, _: (y**3).sum()
        >>> derivative_tower(model, cube, torch.ones(1, 1), None, order=4).values
        tensor([ 8., 12., 12.,  6.,  0.])
    """
    check_uncompiled("derivative_tower")
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"derivative_tower: expected an order of 1 or more, got {order!r}")
    parameters = trainable("derivative_tower", model)
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.modules.batchnorm._NormBase)
            and module.training
            and module.running_mean is not None
        ):
            raise NotImplementedError(
                f"derivative_tower: {name or type(module).__name__} is in training mode, where a "
                "forward changes its running statistics; call model.eval(), or give it "
                "track_running_stats=False"
            )

    def loss() -> Tensor:
        if loss_fn is not None:
            return loss_fn(model(input), target)
        batch = read_batch("derivative_tower", (input, target))
        return own_loss("derivative_tower", call(model, batch), batch)

    def inside(values: Mapping[str, Tensor], action: Callable[[Tensor], Any]) -> Any:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
        # The backward of the action runs inside, too: it computes a checkpointed block again.
        replaced = _reparametrize_module(model, {**buffers, **values}, tie_weights=True)
        with following(), replaced:
            return action(check_scalar("derivative_tower", loss()))

    with torch.enable_grad():
        v = _direction(inside, parameters) if direction is None else direction
        algebra = Taylor(order)

        def seed(x: Tensor, v: Tensor) -> Jet:
            zeros = x.new_zeros(max(order - 2, 0), *x.shape)
            stack = torch.cat([torch.stack([x, v.detach()])[:order], zeros])
            return Jet(stack.requires_grad_(), algebra, live=2)

        seeds = follow("derivative_tower, direction", parameters, v, seed)
        stacks = [seed.stack for seed in seeds.values()]

        def differentiate(loss: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
            stack, _ = lift(loss)
            if len(stack) < order or not stack.requires_grad:
                return stack, [torch.zeros_like(s) for s in stacks]
            return stack, torch.autograd.grad(stack[-1], stacks, materialize_grads=True)

        stack, slopes = inside(seeds, differentiate)
    vectors = [
        {
            name: derivative(slope[order - k], k - 1).contiguous()
            for name, slope in zip(parameters, slopes, strict=True)
        }
        for k in range(1, order + 1)
    ]
    with torch.no_grad():
        last = sum(torch.vdot(vectors[-1][k].flatten(), v[k].flatten()) for k in parameters)
        known = [derivative(c, k) for k, c in enumerate(pad(stack.detach(), order))]
        values = torch.stack([*known, cast(Tensor, last).to(stack.dtype)])
    return DerivativeTower(vectors, values, {k: v[k].detach().clone() for k in parameters})


def _direction(inside: Callable[..., Any], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the gradient divided by its norm, with the dropout masks of the next forward."""
    devices = {p.device for p in parameters.values() if p.device.type != "cpu"}
    leaves = {k: p.requires_grad_() for k, p in map_tensors(Tensor.detach, parameters).items()}

    def gradient(loss: Tensor) -> Sequence[Tensor]:
        if not loss.requires_grad:
            return [torch.zeros_like(p) for p in leaves.values()]
        return torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)

    with torch.random.fork_rng(devices, device_type=next(iter(devices)).type if devices else "cpu"):
        slopes = inside(leaves, gradient)
    norm = _norm(slopes)
    size = norm.item()
    if not 0 < size < math.inf:
        raise ValueError(
            f"derivative_tower: expected a gradient that is finite and not zero to take as the "
            f"direction, got one of norm {size:g}; pass direction="
        )
    return {k: (s.to(norm.dtype) / norm).to(s.dtype) for k, s in zip(leaves, slopes, strict=True)}


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(t, dtype=sum_dtype(t)) for t in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))
