"""Loss functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.higher_order.dispatch import primal
from autograd_lib.higher_order.taylor import jet_rule


def _reduce(loss: Tensor, reduction: str) -> Tensor:
    return loss if reduction == "none" else loss.sum() if reduction == "sum" else loss.mean()


def _loss(function: Any) -> Callable[[Callable[..., Tensor]], None]:
    """Register the rule of a loss, which need not know the deprecated size_average and reduce."""

    def register(rule: Callable[..., Tensor]) -> None:
        @jet_rule(function)
        def checked(
            *args: Any, size_average: Any = None, reduce: Any = None, **options: Any
        ) -> Tensor:
            if size_average is not None or reduce is not None:
                raise NotImplementedError(
                    f"jet: F.{function.__name__} has no rule for the deprecated size_average and "
                    "reduce; use reduction"
                )
            return rule(*args, **options)

    return register


def _weighted(loss: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Reduce a loss that takes a weight for each element; their mean is by the weights."""
    if weight is None:
        return _reduce(loss, reduction)
    if reduction == "mean":
        return (loss * weight).sum() / weight.expand_as(loss).sum()
    return _reduce(loss * weight, reduction)


@_loss(F.mse_loss)
def _mse_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    return _weighted((input - target).square(), weight, reduction)


@_loss(F.l1_loss)
def _l1_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    weight: Tensor | None = None,
) -> Tensor:
    return _weighted((input - target).abs(), weight, reduction)


@jet_rule(F.huber_loss)
def _huber_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    delta: float = 1.0,
    weight: Tensor | None = None,
) -> Tensor:
    error = input - target
    size = error.abs()
    far = primal(size) > delta
    loss = torch.where(far, delta * (size - 0.5 * delta), 0.5 * error.square())
    return _weighted(loss, weight, reduction)


@_loss(F.smooth_l1_loss)
def _smooth_l1_loss(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:
    if beta == 0:
        return F.l1_loss(input, target, reduction=reduction)
    return F.huber_loss(input, target, reduction=reduction, delta=beta) / beta


@_loss(F.nll_loss)
def _nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    dim = 0 if input.ndim == 1 else 1
    kept = target != ignore_index
    places = torch.where(kept, target, 0)
    picked = input.gather(dim, places.unsqueeze(dim)).squeeze(dim)
    weights = kept.to(input.dtype) if weight is None else weight[places] * kept
    loss = -torch.where(kept, picked, 0.0) * weights
    return loss.sum() / weights.sum() if reduction == "mean" else _reduce(loss, reduction)


@_loss(F.cross_entropy)
def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    dim = 0 if input.ndim == 1 else 1
    logs = input.log_softmax(dim)
    classes = input.shape[dim]
    by_class = None
    if weight is not None:
        by_class = weight.reshape(-1, *[1] * (input.ndim - 1 - dim))
    if target.shape == input.shape:  # probabilities
        target = target * (1 - label_smoothing) + label_smoothing / classes
        loss = -(logs * (target if by_class is None else target * by_class)).sum(dim)
        return loss.sum() / (loss.numel()) if reduction == "mean" else _reduce(loss, reduction)
    if not label_smoothing:
        return F.nll_loss(logs, target, weight, ignore_index=ignore_index, reduction=reduction)
    kept = target != ignore_index
    places = torch.where(kept, target, 0)
    picked = F.nll_loss(logs, target, weight, ignore_index=ignore_index, reduction="none")
    spread = -(logs if by_class is None else logs * by_class).sum(dim)
    loss = (1 - label_smoothing) * picked + label_smoothing / classes * torch.where(
        kept, spread, 0.0
    )
    if reduction != "mean":
        return _reduce(loss, reduction)
    total = kept.sum() if weight is None else (weight[places] * kept).sum()
    return loss.sum() / total


@_loss(F.binary_cross_entropy_with_logits)
def _bce_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
    pos_weight: Tensor | None = None,
) -> Tensor:
    scale = 1.0 if pos_weight is None else pos_weight
    loss = -(scale * target * F.logsigmoid(input) + (1 - target) * F.logsigmoid(-input))
    return _reduce(loss if weight is None else loss * weight, reduction)


@_loss(F.binary_cross_entropy)
def _bce(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    # as PyTorch, which bounds the logarithms by -100
    loss = -(
        target * input.log().clamp_min(-100) + (1 - target) * (1 - input).log().clamp_min(-100)
    )
    return _reduce(loss if weight is None else loss * weight, reduction)


@_loss(F.kl_div)
def _kl_div(
    input: Tensor,
    target: Tensor,
    reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:
    if log_target:
        loss = target.exp() * (target - input)
    else:
        loss = torch.xlogy(target, target) - target * input
    return loss.sum() / len(input) if reduction == "batchmean" else _reduce(loss, reduction)
