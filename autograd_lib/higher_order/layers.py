"""Rules by which `jet` and `laplacian` follow layers: contractions, norms, attention, losses."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.functions.activations import _CodedActivation, _LowMemoryReLU
from autograd_lib.functions.functions import (
    CustomAutogradFunction,
    _ClipGradient,
    _Log1mExp,
    _log1mexp_slope,
    _SafeNorm,
    _SafeSqrt,
    _ScaleGradient,
    _StraightThrough,
    safe_norm,
)
from autograd_lib.functions.losses import _BoundWithForwardMode
from autograd_lib.higher_order.series import Operation
from autograd_lib.higher_order.taylor import (
    Jet,
    jet_rule,
    jets,
    primal,
    ring_of,
)

__all__: list[str] = []


# ------------------------------------------------------------------ contractions


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
    return _product_of_matrices(x, other)


def _product_of_matrices(x: Tensor, y: Tensor, addend: Tensor | None = None) -> Tensor:
    if not jets((x, y)):
        product = x @ y
    elif x.ndim == 1:
        product = torch.matmul(x.unsqueeze(0), y).squeeze(-2 if y.ndim > 1 else -1)
    elif y.ndim == 1:
        product = torch.matmul(x, y.unsqueeze(-1)).squeeze(-1)
    elif _live(y) > max(_live(x), 2):  # the second is walked through, the first taken whole
        product = torch.matmul(y.mT, x.mT).mT
    else:
        if x.ndim < y.ndim and y.ndim > 2:
            x = x.expand(*[1] * (y.ndim - x.ndim), *x.shape)
        return ring_of(x, y, addend).contract(_MATMUL, x, y, addend)
    return product if addend is None else product + addend


def _live(x: Tensor) -> int:
    return x.live if isinstance(x, Jet) else 1


@jet_rule(torch.inner)
def _inner(x: Tensor, other: Tensor) -> Tensor:
    if not (x.ndim and other.ndim):
        return x * other
    return torch.tensordot(x, other, ([-1], [-1]))


@jet_rule(Tensor.__rmatmul__)
def _rmatmul(x: Tensor, other: Tensor) -> Tensor:
    return torch.matmul(other, x)


@jet_rule(F.linear)
def _linear_layer(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    if input.ndim < 2 or weight.ndim < 2:
        product = torch.matmul(input, weight.mT if weight.ndim > 1 else weight)
        return product if bias is None else product + bias
    return _product_of_matrices(input, weight.mT, bias)


@jet_rule(torch.addmm, torch.baddbmm, torch.addmv)
def _addmm(input: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * input + alpha * torch.matmul(a, b)


@jet_rule(torch.outer, torch.ger)
def _outer(x: Tensor, other: Tensor) -> Tensor:
    return x.unsqueeze(-1) * other


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


@jet_rule(torch.einsum)
def _einsum(equation: str, *operands: Any) -> Tensor:
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    equation = equation.replace(" ", "")
    left, arrow, out = equation.partition("->")
    terms = left.split(",")
    if "." in equation or "Z" in equation:
        raise NotImplementedError(
            f"jet: torch.einsum has a rule for equations of the letters a to Y, got {equation!r}"
        )
    if not arrow:
        letters = sorted(set(left) - {","})
        out = "".join(letter for letter in letters if left.count(letter) == 1)
    values = list(operands)
    while len(values) > 1:
        rest = "".join(terms[2:]) + out
        a, x = _reduced(terms[0], values[0], terms[1] + rest)
        b, y = _reduced(terms[1], values[1], terms[0] + rest)
        if len(values) > 2:
            target = "".join(dict.fromkeys(letter for letter in a + b if letter in rest))
        else:
            target = out
        if jets((x, y)):
            if _live(y) > _live(x):
                a, b, x, y = b, a, y, x
            product: Tensor = ring_of(x, y).contract(_Einsum(a, b, target), x, y)
        else:
            product = torch.einsum(f"{a},{b}->{target}", x, y)
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


@jet_rule(torch.tensordot)
def _tensordot(x: Tensor, y: Tensor, dims: Any = 2, out: None = None) -> Tensor:
    if isinstance(dims, int):
        dims = (list(range(-dims, 0)), list(range(dims)))
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


class _Convolution(Operation):
    """`torch.convolution` with its options; the coefficients join the batch."""

    def __init__(self, *options: Any) -> None:
        self.options = options  # stride, padding, dilation, transposed, output_padding, groups

    def apply(self, a: Tensor, b: Tensor) -> Tensor:
        z = torch.convolution(a.flatten(0, 1), b, None, *self.options)
        return z.unflatten(0, a.shape[:2])

    def _backward(self, grad: Tensor, a: Tensor, b: Tensor, *mask: bool) -> Any:
        return torch.ops.aten.convolution_backward(grad, a, b, None, *self.options, [*mask, False])

    def apply_left(self, grad: Tensor, b: Tensor, a: Tensor) -> Tensor:
        like = a[:1].expand(len(grad), *a.shape[1:]).flatten(0, 1)  # of which the shape counts
        result = self._backward(grad.flatten(0, 1), like, b, True, False)[0]
        return cast(Tensor, result.unflatten(0, grad.shape[:2]))

    def apply_right(self, grad: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return cast(Tensor, self._backward(grad.flatten(0, 1), a.flatten(0, 1), b, False, True)[1])


def _convolution(n: int, transposed: bool) -> None:
    def several(value: Any) -> list[int]:
        return [value] * n if isinstance(value, int) else list(value)

    def convolve(
        input: Tensor, weight: Tensor, bias: Tensor | None, padding: Any, *options: Any
    ) -> Tensor:
        stride, dilation, output_padding, groups = options
        if input.ndim == n + 1:
            batch = input.unsqueeze(0)
            return convolve(batch, weight, bias, padding, *options).squeeze(0)
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(several(dilation), weight.shape[2:], strict=True)]
            ends = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
            input, padding = F.pad(input, ends), 0
        whole = (
            several(stride),
            several(0 if padding == "valid" else padding),
            several(dilation),
            transposed,
            several(output_padding),
            groups,
        )
        if jets((input, weight)):
            product: Tensor = ring_of(input, weight).contract(_Convolution(*whole), input, weight)
        else:
            product = torch.convolution(input, weight, None, *whole)
        return product if bias is None else product + bias.reshape(-1, *[1] * n)

    if transposed:

        @jet_rule(getattr(torch, f"conv_transpose{n}d"))
        def upward(
            input: Tensor,
            weight: Tensor,
            bias: Tensor | None = None,
            stride: Any = 1,
            padding: Any = 0,
            output_padding: Any = 0,
            groups: int = 1,
            dilation: Any = 1,
        ) -> Tensor:
            return convolve(input, weight, bias, padding, stride, dilation, output_padding, groups)
    else:

        @jet_rule(getattr(torch, f"conv{n}d"))
        def onward(
            input: Tensor,
            weight: Tensor,
            bias: Tensor | None = None,
            stride: Any = 1,
            padding: Any = 0,
            dilation: Any = 1,
            groups: int = 1,
        ) -> Tensor:
            return convolve(input, weight, bias, padding, stride, dilation, 0, groups)


for _n in (1, 2, 3):
    _convolution(_n, transposed=False)
    _convolution(_n, transposed=True)


# ------------------------------------------------------------------ normalization


def _standardized(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    dims = tuple(d if d < 0 else d - x.ndim for d in dims)  # which they are in a stack too
    if isinstance(x, Jet):
        centered: Tensor = x.map(lambda c: c - c.mean(dims, keepdim=True))
    else:
        centered = x - x.mean(dims, keepdim=True)
    return centered * torch.rsqrt(centered.square().mean(dims, keepdim=True) + eps)


def _affine(x: Tensor, weight: Tensor | None, bias: Tensor | None, after: int = 0) -> Tensor:
    """Scale and shift; the dimensions of `weight` are followed by `after` others."""
    if weight is not None:
        x = x * weight.reshape(*weight.shape, *[1] * after)
    return x if bias is None else x + bias.reshape(*bias.shape, *[1] * after)


@jet_rule(F.layer_norm)
def _layer_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    return _affine(_standardized(input, dims, eps), weight, bias)


@jet_rule(F.rms_norm)
def _rms_norm(
    input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
) -> Tensor:
    dims = tuple(range(-len(normalized_shape), 0))
    eps = torch.finfo(input.dtype).eps if eps is None else eps
    return _affine(input * torch.rsqrt(input.square().mean(dims, keepdim=True) + eps), weight, None)


@jet_rule(F.group_norm)
def _group_norm(
    input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    groups = input.reshape(len(input), num_groups, -1)
    return _affine(
        _standardized(groups, (-1,), eps).reshape(input.shape), weight, bias, input.ndim - 2
    )


@jet_rule(F.batch_norm)
def _batch_norm(
    input: Tensor,
    running_mean: Any,
    running_var: Any,
    weight: Any = None,
    bias: Any = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    after = input.ndim - 2
    if training and running_mean is None:
        dims = (0, *range(2, input.ndim))
        return _affine(_standardized(input, dims, eps), weight, bias, after)
    if training:
        raise NotImplementedError(
            "jet: F.batch_norm has no rule in training mode, where the step that it takes in its "
            "running statistics would be taken along the direction too; call model.eval(), or use "
            "a norm without them (nn.GroupNorm, nn.LayerNorm)"
        )
    mean = running_mean.reshape(-1, *[1] * after)
    scale = torch.rsqrt(running_var + eps)
    return _affine((input - mean) * scale.reshape(-1, *[1] * after), weight, bias, after)


@jet_rule(F.instance_norm)
def _instance_norm(
    input: Tensor,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    if not use_input_stats or running_mean is not None:
        raise NotImplementedError("jet: F.instance_norm has a rule without running statistics only")
    dims = tuple(range(2 - input.ndim, 0))
    return _affine(_standardized(input, dims, eps), weight, bias, input.ndim - 2)


# ------------------------------------------------------------------ attention


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
    weights = _product_of_matrices(query, key.mT, mask).softmax(-1)
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


# ------------------------------------------------------------------ losses


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


# ------------------------------------------------------------------ the library's own Functions


@jet_rule(CustomAutogradFunction)
def _custom_linear(input: Tensor, weight: Tensor) -> Tensor:
    return F.linear(input, weight)


@jet_rule(_StraightThrough)
def _straight_through(x: Jet, f: Callable[[Tensor], Tensor]) -> Tensor:
    return x + (f(primal(x)) - primal(x)).detach()


@jet_rule(_ScaleGradient, _ClipGradient)
def _bent(*args: Any) -> Tensor:
    raise NotImplementedError(
        "jet: scale_gradient, reverse_gradient and clip_gradient have no rule: they bend gradients "
        "on their way back, and a derivative along a direction is none"
    )


jet_rule(_Log1mExp, derivative=True)(_log1mexp_slope)


@jet_rule(_SafeSqrt)
def _safe_sqrt(x: Jet) -> Tensor:
    zero = primal(x) == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


@jet_rule(_SafeNorm)
def _safe_norm(x: Jet) -> Tensor:
    norm = safe_norm(primal(x), -1, keepdim=True)
    zero = norm == 0
    squares = torch.where(zero, 1.0, x).square().sum(-1, keepdim=True)
    return torch.where(zero, 0.0, torch.sqrt(squares))


@jet_rule(_LowMemoryReLU)
def _low_memory_relu(x: Jet) -> Tensor:
    return F.relu(x)


@jet_rule(_CodedActivation)
def _coded_activation(x: Jet, kind: Any) -> tuple[Tensor]:
    return (kind.forward(x),)


@jet_rule(_BoundWithForwardMode)
def _bound(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.clamp(x, low, high)
