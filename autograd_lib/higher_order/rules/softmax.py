"""Softmax, log-softmax and log-sum-exp."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet
from autograd_lib.higher_order.rules.registration import from_right, widened
from autograd_lib.higher_order.taylor import jet_rule


@jet_rule(torch.logsumexp, torch.special.logsumexp)
def _logsumexp(x: Jet, dim: Any, keepdim: bool = False) -> Tensor:
    dims = sorted(d % x.ndim for d in ([dim] if isinstance(dim, int) else dim))
    rows: Any = x
    if len(dims) > 1:
        rows = x.movedim(dims, list(range(len(dims)))).flatten(0, len(dims) - 1)
    at = (0 if len(dims) > 1 else dims[0]) - rows.ndim
    total: Tensor = x.algebra.logsumexp(rows, at)[0].squeeze(at)
    for d in dims if keepdim else ():
        total = total.unsqueeze(d)
    return total


@jet_rule(torch.softmax, torch.special.softmax)
def _softmax_of(x: Jet, dim: int, dtype: Any = None) -> Tensor:
    x = cast(Jet, widened(x, dtype))
    return cast(Tensor, x.algebra.logsumexp(x, from_right(x, dim))[1])


@jet_rule(torch.log_softmax, torch.special.log_softmax)
def _log_softmax_of(x: Jet, dim: int, dtype: Any = None) -> Tensor:
    x = cast(Jet, widened(x, dtype))
    return x - x.algebra.logsumexp(x, from_right(x, dim))[0]
