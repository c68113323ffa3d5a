"""Attention."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.higher_order.rules.contractions import matrix_product
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
    if is_causal:
        size = (query.shape[-2], key.shape[-2])
        allowed = torch.ones(size, dtype=torch.bool, device=query.device).tril()
        mask = mask.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        mask = mask.masked_fill(~attn_mask, -math.inf) if boolean else mask + attn_mask
    return _attention_weights(query * scale, key, mask, dropout_p) @ value


def _attention_weights(query: Tensor, key: Tensor, mask: Tensor, dropout_p: float) -> Tensor:
    weights = matrix_product(query, key.mT, mask).softmax(-1)
    return F.dropout(weights, dropout_p) if dropout_p else weights


@jet_rule(F.multi_head_attention_forward)
def _multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Any,
    in_proj_bias: Any,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Any,
    out_proj_bias: Any,
    training: bool = True,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    rare = (bias_k, bias_v, static_k, static_v)
    if add_zero_attn or any(x is not None for x in rare):
        raise NotImplementedError(
            "jet: F.multi_head_attention_forward has a rule without bias_k, bias_v, "
            "add_zero_attn, static_k and static_v"
        )
    unbatched = query.ndim == 2
    if unbatched:
        query, key, value = (x.unsqueeze(1) for x in (query, key, value))
    if use_separate_proj_weight:
        weights = [q_proj_weight, k_proj_weight, v_proj_weight]
    else:
        weights = in_proj_weight.chunk(3)
    biases = [None] * 3 if in_proj_bias is None else in_proj_bias.chunk(3)
    # from (length, batch, width) to (batch, head, length, width of a head)
    q, k, v = (
        F.linear(x, w, b).unflatten(-1, (num_heads, -1)).permute(1, 2, 0, 3)
        for x, w, b in zip((query, key, value), weights, biases, strict=True)
    )
    mask = _attention_mask(attn_mask, q, num_heads)
    if key_padding_mask is not None:
        mask = mask + _attention_mask(key_padding_mask[:, None, None, :], q, num_heads)
    attention = _attention_weights(q * q.shape[-1] ** -0.5, k, mask, dropout_p if training else 0.0)
    merged = (attention @ v).permute(2, 0, 1, 3).flatten(-2)
    output = F.linear(merged, out_proj_weight, out_proj_bias)
    shown = attention.mean(1) if average_attn_weights else attention
    if unbatched:
        output, shown = output.squeeze(1), shown.squeeze(0)
    return output, shown if need_weights else None


def _attention_mask(mask: Tensor | None, like: Tensor, heads: int) -> Tensor:
    """A mask to be added: in those of this function, true means left out."""
    if mask is None:
        return torch.zeros((), dtype=like.dtype, device=like.device)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)
    return mask.unflatten(0, (-1, heads)) if mask.ndim == 3 else mask
