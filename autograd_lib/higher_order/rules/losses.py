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


def _elementwise_loss(function: Any, loss: Callable[..., Tensor]) -> None:
    """A loss of each element, reduced with a weight for each."""

    @_loss(function)
    def rule(
        *pair: Tensor, reduction: str = "mean", weight: Tensor | None = None, **options: Any
    ) -> Tensor:
        return _weighted(loss(*pair, **options), weight, reduction)


def _huber(input: Tensor, target: Tensor, delta: float = 1.0) -> Tensor:
    error = input - target
    size = error.abs()
    return torch.where(primal(size) > delta, delta * (size - 0.5 * delta), 0.5 * error.square())


def _smooth_l1(input: Tensor, target: Tensor, beta: float = 1.0) -> Tensor:
    return _huber(input, target, beta) / beta if beta else (input - target).abs()


_elementwise_loss(F.mse_loss, lambda input, target: (input - target).square())
_elementwise_loss(F.l1_loss, lambda input, target: (input - target).abs())
_elementwise_loss(F.huber_loss, _huber)
_elementwise_loss(F.smooth_l1_loss, _smooth_l1)


def _target_weights(
    target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The class of each target, 0 where it is ignored, and its weight, 0 there too."""
    kept = target != ignore_index
    classes = torch.where(kept, target, 0)
    return classes, kept.to(dtype) if weight is None else weight[classes] * kept


@_loss(F.nll_loss)
def _nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    dim = 0 if input.ndim == 1 else 1
    classes, weights = _target_weights(target, weight, ignore_index, input.dtype)
    picked = input.gather(dim, classes.unsqueeze(dim)).squeeze(dim)
    loss = -torch.where(target != ignore_index, picked, 0.0) * weights
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
    share = label_smoothing / input.shape[dim]
    weighted = logs
    if weight is not None:
        weighted = logs * weight.reshape(-1, *[1] * (input.ndim - 1 - dim))
    if target.shape == input.shape:  # probabilities
        loss = -(weighted * (target * (1 - label_smoothing) + share)).sum(dim)
        return _reduce(loss, reduction)
    options: Any = {"weight": weight, "ignore_index": ignore_index}
    if not label_smoothing:
        return F.nll_loss(logs, target, **options, reduction=reduction)
    picked = F.nll_loss(logs, target, **options, reduction="none")
    spread = torch.where(target != ignore_index, -weighted.sum(dim), 0.0)
    loss = (1 - label_smoothing) * picked + share * spread
    if reduction != "mean":
        return _reduce(loss, reduction)
    return loss.sum() / _target_weights(target, weight, ignore_index, loss.dtype)[1].sum()


@_loss(F.binary_cross_entropy_with_logits)
def _bce_with_logits(
    input: Tensor,
    target: Tensor,
    weight: Any = None,
    reduction: str = "mean",
    pos_weight: Any = None,
) -> Tensor:
    scale = 1.0 if pos_weight is None else pos_weight
    loss = -(scale * target * F.logsigmoid(input) + (1 - target) * F.logsigmoid(-input))
    return _reduce(loss if weight is None else loss * weight, reduction)


@_loss(F.binary_cross_entropy)
def _bce(input: Tensor, target: Tensor, weight: Any = None, reduction: str = "mean") -> Tensor:
    # PyTorch bounds the logarithms by -100, too.
    logs, complements = (x.log().clamp_min(-100) for x in (input, 1 - input))
    loss = -(target * logs + (1 - target) * complements)
    return _reduce(loss if weight is None else loss * weight, reduction)


@_loss(F.kl_div)
def _kl_div(
    input: Tensor, target: Tensor, reduction: str = "mean", log_target: bool = False
) -> Tensor:
    if log_target:
        loss = target.exp() * (target - input)
    else:
        loss = torch.xlogy(target, target) - target * input
    return loss.sum() / len(input) if reduction == "batchmean" else _reduce(loss, reduction)
