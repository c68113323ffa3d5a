"""Loss functions, as `torch.nn.functional` calls them: by positional arguments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.higher_order.dispatch import primal
from autograd_lib.higher_order.taylor import jet_rule

_nn: Any = torch._C._nn
_NONE, _MEAN, _SUM = range(3)


def _reduce(loss: Tensor, reduction: int) -> Tensor:
    return loss if reduction == _NONE else loss.mean() if reduction == _MEAN else loss.sum()


def _loss(function: Any, loss: Callable[..., Tensor]) -> None:
    """A loss of each element, reduced."""

    @jet_rule(function)
    def rule(input: Tensor, target: Tensor, reduction: int, *options: Any, **named: Any) -> Tensor:
        return _reduce(loss(input, target, *options, **named), reduction)


def _huber(input: Tensor, target: Tensor, delta: float) -> Tensor:
    error = input - target
    size = error.abs()
    return torch.where(primal(size) > delta, delta * (size - 0.5 * delta), 0.5 * error.square())


def _kl_div(input: Tensor, target: Tensor, log_target: bool = False) -> Tensor:
    if log_target:
        return target.exp() * (target - input)
    return torch.xlogy(target, target) - target * input


_loss(_nn.mse_loss, lambda input, target: (input - target).square())
_loss(_nn.l1_loss, lambda input, target: (input - target).abs())
_loss(_nn.huber_loss, _huber)
_loss(_nn.smooth_l1_loss, lambda input, target, beta: _huber(input, target, beta) / beta)
_loss(torch.kl_div, _kl_div)


def _target_weights(
    target: Tensor, weight: Tensor | None, ignore_index: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The class of each target, 0 where it is ignored, and its weight, 0 there too."""
    kept = target != ignore_index
    classes = torch.where(kept, target, 0)
    return classes, kept.to(dtype) if weight is None else weight[classes] * kept


@jet_rule(_nn.nll_loss_nd)
def _nll_loss(
    input: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int
) -> Tensor:
    dim = 0 if input.ndim == 1 else 1
    classes, weights = _target_weights(target, weight, ignore_index, input.dtype)
    picked = input.gather(dim, classes.unsqueeze(dim)).squeeze(dim)
    loss = -torch.where(target != ignore_index, picked, 0.0) * weights
    return loss.sum() / weights.sum() if reduction == _MEAN else _reduce(loss, reduction)


@jet_rule(_nn.cross_entropy_loss)
def _cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    label_smoothing: float,
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
    if not label_smoothing:
        return _nn.nll_loss_nd(logs, target, weight, reduction, ignore_index)
    picked = _nn.nll_loss_nd(logs, target, weight, _NONE, ignore_index)
    spread = torch.where(target != ignore_index, -weighted.sum(dim), 0.0)
    loss = (1 - label_smoothing) * picked + share * spread
    if reduction != _MEAN:
        return _reduce(loss, reduction)
    return loss.sum() / _target_weights(target, weight, ignore_index, loss.dtype)[1].sum()


@jet_rule(torch.binary_cross_entropy_with_logits)
def _bce_with_logits(
    input: Tensor, target: Tensor, weight: Any, pos_weight: Any, reduction: int
) -> Tensor:
    scale = 1.0 if pos_weight is None else pos_weight
    loss = -(scale * target * F.logsigmoid(input) + (1 - target) * F.logsigmoid(-input))
    return _reduce(loss if weight is None else loss * weight, reduction)


@jet_rule(_nn.binary_cross_entropy)
def _bce(input: Tensor, target: Tensor, weight: Any, reduction: int) -> Tensor:
    # PyTorch bounds the logarithms by -100, too.
    logs, complements = (x.log().clamp_min(-100) for x in (input, 1 - input))
    loss = -(target * logs + (1 - target) * complements)
    return _reduce(loss if weight is None else loss * weight, reduction)


@jet_rule(_nn.multilabel_margin_loss)
def _multilabel_margin(input: Tensor, target: Tensor, reduction: int = _MEAN) -> Tensor:
    listed = (target >= 0).cumprod(-1).bool()  # up to the first that is negative
    wanted = torch.zeros_like(listed).scatter_add(-1, torch.where(listed, target, 0), listed)
    margins = 1 - input.unsqueeze(-1) + input.unsqueeze(-2)
    counted = wanted.unsqueeze(-1) & ~wanted.unsqueeze(-2)
    loss = torch.where(counted, margins, 0.0).clamp_min(0).sum((-2, -1)) / input.shape[-1]
    return _reduce(loss, reduction)
