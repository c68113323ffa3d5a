"""Attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.higher_order.dispatch import primal
from autograd_lib.higher_order.rules.registration import plus
from autograd_lib.higher_order.taylor import jet_rule


@jet_rule(F.scaled_dot_product_attention)
def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key = torch.stack([key] * repeats, -3).flatten(-4, -3)
        value = torch.stack([value] * repeats, -3).flatten(-4, -3)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    mask = torch.zeros((), dtype=query.dtype, device=query.device)
    nothing: Any = None  # rows that attend to nothing, which PyTorch makes 0
    if is_causal:
        size = (query.shape[-2], key.shape[-2])
        allowed = torch.ones(size, dtype=torch.bool, device=query.device).tril()
        mask = mask.masked_fill(~allowed, -math.inf)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        nothing = ~attn_mask.any(-1, keepdim=True)
        mask = mask.masked_fill(~(attn_mask | nothing), -math.inf)
    elif attn_mask is not None:
        nothing = (primal(attn_mask) == -math.inf).all(-1, keepdim=True)
        mask = mask + attn_mask.masked_fill(nothing, 0.0)
    weights = torch.softmax(plus(query * scale @ key.mT, mask), -1)
    result: Any = (F.dropout(weights, dropout_p) if dropout_p else weights) @ value
    return result if nothing is None else result.map(lambda c: c.masked_fill(nothing, 0.0))
