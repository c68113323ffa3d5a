"""Loss functions, as `torch.nn.functional` calls them: by positional arguments."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autograd_lib.higher_order.taylor import jet_rule

_nn: Any = torch._C._nn
_NONE, _MEAN, _SUM = range(3)


def _reduce(loss: Tensor, reduction: int) -> Tensor:
    return loss if reduction == _NONE else loss.mean() if reduction == _MEAN else loss.sum()


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
