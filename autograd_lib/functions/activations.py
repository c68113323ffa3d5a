"""Activations that save less for backward: a bit for each element, or a byte."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import Function

from autograd_lib.functions.forward_mode import applier, check_floating, primals

__all__ = ["low_memory_gelu", "low_memory_relu", "low_memory_silu"]

# Times the eight bytes of eight booleans, read as one integer, this leaves the booleans in the
# top byte; times a byte, it copies bit 7 - j of it to the top of byte j.
_PACK = 0x8040201008040201 - 2**64
_TOP_BITS = 0x8080808080808080 - 2**64


def _pack(mask: Tensor) -> Tensor:
    """Eight booleans in each byte of a flat uint8 tensor, the last one filled up with False."""
    flat = mask.reshape(-1)
    eights = F.pad(flat, (0, -flat.shape[0] % 8)).view(torch.int64)
    return ((eights * _PACK) >> 56).to(torch.uint8)


def _unpack(packed: Tensor, shape: torch.Size) -> Tensor:
    eights = (((packed.to(torch.int64) * _PACK) & _TOP_BITS) >> 7) & 0x0101010101010101
    return eights.view(torch.bool)[: shape.numel()].reshape(shape)


def _passes(output: Tensor) -> Tensor:
    return ~(output <= 0)  # where F.relu passes the gradient on: also where it met a NaN


class _LowMemoryReLU(Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return F.relu(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        # In the order of memory, so that the gradient has it too: it may be channels_last.
        ctx.order = sorted(range(output.dim()), key=output.stride, reverse=True)
        # An intermediate may be saved where, as here, no derivative goes through it.
        passes = _pack(_passes(output.permute(ctx.order))) if ctx.needs_input_grad[0] else None
        ctx.save_for_backward(passes)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        grad = grad.permute(ctx.order)
        passed = torch.where(_unpack(ctx.saved_tensors[0], grad.shape), grad, 0)
        return passed.permute(sorted(range(passed.dim()), key=ctx.order.__getitem__))

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        with _set_fwd_grad_enabled(True):
            return torch.where(_passes(primals(ctx)[0]), tangent, 0)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int], x: Tensor) -> tuple[Tensor, int]:
        return _LowMemoryReLU.apply(x), in_dims[0]  # elementwise: a batch is a larger tensor


_low_memory_relu = applier(_LowMemoryReLU)


def _elementwise(operation: str, f: Callable[[Tensor], Tensor], x: Any) -> Tensor:
    """Apply `f`, to a jagged tensor by its values."""
    check_floating(operation, x)
    if not x.is_nested:
        return f(x)
    if x.layout is not torch.jagged:
        raise NotImplementedError(
            f"{operation}: expected a dense or jagged tensor, got a nested one of {x.layout}; make "
            "it with torch.nested.nested_tensor(..., layout=torch.jagged)"
        )
    lengths = x._maybe_min_seqlen, x._maybe_max_seqlen  # read again they would cost a wait
    return torch.nested.nested_tensor_from_jagged(
        f(x.values()), x.offsets(), x.lengths(), x._ragged_idx, *lengths
    )


def low_memory_relu(x: Tensor) -> Tensor:
    r"""Apply ReLU and save one bit per element.

    $\max(x, 0)$, with gradient $g \cdot [x > 0]$; a NaN passes both ways, as in `F.relu`. `F.relu`
    saves its output: nothing more where the next operation saves it too (a linear layer), its
    whole size where not (dropout, a sum, a pooling, a frozen layer). There this saves a 32nd of
    it in float32, and the bits alone in either case.

    Args:
        x: a floating-point tensor of any shape, dense or jagged (`torch.nested`).

    Returns:
        A tensor like `x`. Saved for backward: `ceil(x.numel() / 8)` bytes.

    Raises:
        TypeError: if `x` is not floating point.
        NotImplementedError: if `x` is a nested tensor that is not jagged.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
        >>> low_memory_relu(x).sum().backward()
        >>> x.grad
        tensor([0., 0., 1.])
    """
    return _elementwise("low_memory_relu", _low_memory_relu, x)


@dataclass(frozen=True)
class _Activation:
    """An activation, the product of a gradient with its derivative, the spacing of its codes."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]  # (g, x) -> g f'(x), differentiable in turn
    steepness: float


# Codes -127 ... 127 stand for steps of tanh(steepness * x), and this one for NaN, which atanh makes
# of it.
_NAN_CODE = -128.0


def _encode(x: Tensor, steepness: float) -> Tensor:
    level = (x.detach().float() * steepness).tanh() * 127.5
    return level.round().clamp(-127, 127).nan_to_num(nan=_NAN_CODE).to(torch.int8)


def _decode(code: Tensor, edge: Tensor, steepness: float) -> Tensor:
    """The value of a code, with the derivative of what was encoded: that of `edge`, a zero."""
    level = code.to(torch.promote_types(edge.dtype, torch.float32)) / 127.5
    return torch.add(edge, level.atanh(), alpha=1 / steepness).to(edge.dtype)


class _CodedActivation(Function):
    """An activation that saves one byte for each element of its input.

    The code is an integer, through which no derivative flows. So that the backward can itself be
    differentiated, the forward has a second output: it stands for `x` in the graph, and its
    storage is a single zero.
    """

    @staticmethod
    def forward(x: Tensor, kind: _Activation) -> tuple[Tensor, Tensor]:
        # A tangent must have the strides of its primal, so forward mode needs a whole tensor.
        forward_mode = forward_ad._current_level >= 0
        edge = torch.zeros_like(x) if forward_mode else x.new_zeros(()).expand(x.shape)
        return kind.forward(x), edge

    @staticmethod
    def setup_context(
        ctx: Any, inputs: tuple[Tensor, _Activation], output: tuple[Tensor, Tensor]
    ) -> None:
        x, ctx.kind = inputs
        ctx.set_materialize_grads(False)
        if ctx.needs_input_grad[0]:
            kept = x if x.dtype == torch.float64 else _encode(x, ctx.kind.steepness)
            ctx.save_for_backward(kept, output[1])
        ctx.save_for_forward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, edge_grad: Tensor | None) -> Any:
        kept, edge = ctx.saved_tensors
        if grad is None:
            return edge_grad, None
        coded = not kept.is_floating_point()
        x = _decode(kept, edge, ctx.kind.steepness) if coded else kept
        own = ctx.kind.backward(grad, x)
        return (own if edge_grad is None else own + edge_grad), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> tuple[Tensor, Tensor]:
        with _set_fwd_grad_enabled(True):
            (x,) = primals(ctx)
            return ctx.kind.backward(tangent, x), tangent

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int, None], x: Tensor, kind: _Activation) -> Any:
        return _CodedActivation.apply(x, kind), (in_dims[0], in_dims[0])


_coded_activation = applier(_CodedActivation)


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(x)  # aten.silu_backward has no derivative
    return grad * (s * (1 + x * (1 - s)))


_GELU = {
    name: _Activation(
        partial(F.gelu, approximate=name),
        partial(torch.ops.aten.gelu_backward, approximate=name),
        0.74,
    )
    for name in ("none", "tanh")
}
_SILU = _Activation(F.silu, _silu_backward, 0.42)


def low_memory_gelu(x: Tensor, approximate: str = "none") -> Tensor:
    r"""Apply GELU and save one byte per element.

    $x \Phi(x)$, or its approximation by tanh. `F.gelu` saves `x`, which in a network nothing else
    keeps: 4 bytes in float32. This saves a code of 8 bits, one of 255 steps of $\tanh(0.74 x)$,
    that tells $x$ so closely that each element of the gradient is right to $0.005 |g|$, and to
    the rounding of its dtype besides. In float64, the dtype of checks, `x` itself is saved and
    the gradient is exact. Higher derivatives are those of GELU at the coded $x$; forward mode is
    exact, and saves a whole tensor where it is combined with reverse mode.

    Where $x$ is infinite the gradient is the limit, 0 or $g$ (NaN in `F.gelu`), within the bound.

    Args:
        x: a floating-point tensor of any shape, dense or jagged (`torch.nested`).
        approximate: "none" or "tanh", as in `F.gelu`.

    Returns:
        A tensor like `x`. Saved for backward: `x.numel()` bytes (and one number), but
        `8 * x.numel()` in float64.

    Raises:
        TypeError: if `x` is not floating point.
        NotImplementedError: if `x` is a nested tensor that is not jagged.
        ValueError: if `approximate` is neither "none" nor "tanh".

    Example:
        >>> x = torch.tensor([0.0, 8.0], requires_grad=True)
        >>> low_memory_gelu(x).sum().backward()
        >>> x.grad.round(decimals=2)
        tensor([0.5000, 1.0000])
    """
    if approximate not in _GELU:
        raise ValueError(
            f"low_memory_gelu: expected approximate='none' or 'tanh', got {approximate!r}"
        )
    kind = _GELU[approximate]
    return _elementwise("low_memory_gelu", lambda x: _coded_activation(x, kind)[0], x)


def low_memory_silu(x: Tensor) -> Tensor:
    r"""Apply SiLU, $x \sigma(x)$, and save one byte per element.

    As `low_memory_gelu` in all else: steps of $\tanh(0.42 x)$, and each element of the gradient
    right to $0.005 |g|$.

    Args:
        x: a floating-point tensor of any shape, dense or jagged (`torch.nested`).

    Returns:
        A tensor like `x`. Saved for backward: `x.numel()` bytes (and one number), but
        `8 * x.numel()` in float64.

    Raises:
        TypeError: if `x` is not floating point.
        NotImplementedError: if `x` is a nested tensor that is not jagged.

    Example:
        >>> x = torch.tensor([0.0, 20.0], requires_grad=True)
        >>> low_memory_silu(x).sum().backward()
        >>> x.grad.round(decimals=2)
        tensor([0.5000, 1.0000])
    """
    return _elementwise("low_memory_silu", lambda x: _coded_activation(x, _SILU)[0], x)
