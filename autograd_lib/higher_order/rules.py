"""The table of rules by which `jet` and `laplacian` follow PyTorch functions, family by family.

Most are a line: a linear function acts on the whole stack of coefficients, an elementary one has a
value and a derivative, and what is composed of others is written as it would be for plain tensors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.higher_order.series import (
    Room,
    add_product,
    oscillation,
    pad,
    power,
    sum_products,
)
from autograd_lib.higher_order.taylor import (
    Elementary,
    Jet,
    Riccati,
    Taylor,
    jet_rule,
    jets,
    lift,
    primal,
    ring_of,
)

__all__: list[str] = []


def _getter(name: str) -> Any:
    return getattr(Tensor, name).__get__


def _named(names: str, *homes: Any) -> list[Any]:
    """The functions of these names, each from the first home that has it."""
    return [
        next(
            getattr(home, name)
            for home in (homes if not name.startswith("_") else (Tensor,))
            if callable(getattr(home, name, None))
        )
        for name in names.split()
    ]


# ------------------------------------------------------------------ what has no derivative

_PLAIN = """
    size dim ndimension numel nelement element_size __len__ stride is_contiguous is_floating_point
    is_complex get_device is_same_size
    new_zeros new_ones new_full new_empty new_tensor
    zeros_like ones_like full_like empty_like rand_like randn_like randint_like bernoulli
    eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ isnan isinf isfinite isposinf
    isneginf isclose allclose equal sign signbit floor ceil round trunc fix argmax argmin
    argsort count_nonzero nonzero any all logical_not logical_and logical_or logical_xor
    heaviside result_type can_cast searchsorted bucketize floor_divide __floordiv__
    detach item tolist __bool__ __float__ __int__ __index__ __contains__ bool int long
"""
_PLAIN_GETTERS = """
    shape dtype device layout ndim is_cuda is_cpu is_meta is_sparse is_mkldnn is_nested is_quantized
    is_leaf requires_grad itemsize nbytes is_mps is_xla is_xpu
"""


def _plain(function: Any) -> None:
    """A function that sees the values alone: constants, conditions, steps, places."""

    @jet_rule(function)
    def rule(*args: Any, **kwargs: Any) -> Any:
        return function(*primal(args), **primal(kwargs))


for _function in _named(_PLAIN, torch, Tensor):
    _plain(_function)
for _name in _PLAIN_GETTERS.split():
    _plain(_getter(_name))


@jet_rule(torch.sgn)
def _sgn(x: Jet) -> Any:
    if x.is_complex():
        raise NotImplementedError("jet: torch.sgn has no rule for complex values, not analytic")
    return torch.sgn(primal(x))


@jet_rule(Tensor.type)
def _type(x: Jet, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    if dtype is None:
        return primal(x).type()
    return _wrap(x.stack.type(dtype, *args, **kwargs), x)


@jet_rule(_getter("data"))
def _data(x: Jet) -> Tensor:
    return cast(Tensor, primal(x).detach())


@jet_rule(Tensor.register_hook)
def _register_hook(x: Jet, hook: Callable[[Tensor], Any]) -> Any:
    def of_stack(grad: Tensor) -> None:
        if hook(grad[0]) is not None:
            raise NotImplementedError("jet: a hook that changes the gradient has no rule")

    return x.stack.register_hook(of_stack)


@jet_rule(Tensor.__repr__, Tensor.__format__)
def _text(x: Jet, *args: Any, **kwargs: Any) -> str:
    return f"Jet({primal(x)!r})"


# ------------------------------------------------------------------ linear functions


def _wrap(result: Any, like: Jet) -> Any:
    if isinstance(result, Tensor):
        if not (result.is_floating_point() or result.is_complex()):
            return result[0]  # converted to integers, where there are no derivatives
        return Jet(result, like.ring, like.live)
    return tuple(_wrap(part, like) for part in result)


def _only_first(function: Any, x: Any, *others: Any) -> None:
    if not isinstance(x, Jet) or jets(others):
        raise NotImplementedError(
            f"jet: {function.__name__} has a rule only where its first argument, and no other, "
            "is followed"
        )


def _linear(function: Any) -> None:
    """A function linear in its first argument, coefficient by coefficient."""

    @jet_rule(function)
    def rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        _only_first(function, x, args, kwargs)
        return _wrap(torch.vmap(lambda c: function(c, *args, **kwargs))(x.stack), x)


def _numberwise(function: Any) -> None:
    """A linear function that takes the stack as it is, for it counts no dimension from the left."""

    @jet_rule(function)
    def rule(x: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(x, Jet):  # as in constant.to(x)
            return function(x, *primal(args), **primal(kwargs))
        return _wrap(function(x.stack, *primal(args), **primal(kwargs)), x)


def _from_right(x: Tensor, dim: Any) -> Any:
    """A dimension, several, or with None or () all of them, counted from the last."""
    if isinstance(dim, int):
        return dim if dim < 0 else dim - x.ndim
    return tuple(_from_right(x, d) for d in (dim or range(x.ndim)))


def _along(function: Any, *names: str) -> None:
    """A linear function that takes dimensions by these names, in this order, before others."""

    @jet_rule(function)
    def rule(x: Jet, *args: Any, **kwargs: Any) -> Any:
        _only_first(function, x, args, kwargs)
        dims = {
            **dict(zip(names, args, strict=False)),
            **{n: kwargs.pop(n) for n in names if n in kwargs},
        }
        moved = [_from_right(x, dims[n]) for n in names if n in dims]
        return _wrap(function(x.stack, *moved, *args[len(names) :], **kwargs), x)


for _function in _named(
    """
    diag diagonal diag_embed diff trace repeat_interleave roll rot90 fliplr flipud repeat
    movedim masked_select ravel hsplit vsplit dsplit tensor_split index_select
    take_along_dim unflatten unfold
    """,
    torch,
    Tensor,
):
    _linear(_function)
for _function in _named(
    """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    interpolate unfold fold
    """,
    F,
):
    _linear(_function)
for _function in _named(
    "fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn fftshift", torch.fft
):
    _linear(_function)
for _function in _named(
    """
    clone conj real imag neg negative positive tril triu resolve_conj resolve_neg conj_physical
    to float double half bfloat16 cpu cuda contiguous type_as __neg__ __pos__ adjoint view_as_real
    view_as_complex
    """,
    torch,
    Tensor,
):
    _numberwise(_function)
for _name in ("mT", "mH", "real", "imag"):
    _numberwise(_getter(_name))
for _function in (F.pixel_shuffle, F.pixel_unshuffle):
    _numberwise(_function)
for _function in (torch.transpose, torch.swapaxes, torch.swapdims):
    _along(_function, "dim0", "dim1")
for _function in (torch.cumsum, torch.select, torch.narrow):
    _along(_function, "dim")


@jet_rule(torch.t, _getter("T"))
def _t(x: Jet) -> Jet:
    return x if x.ndim < 2 else x.map(lambda c: c.mT)


@jet_rule(_getter("H"))
def _h(x: Jet) -> Jet:
    return x.map(lambda c: c.mH)


@jet_rule(torch.sum)
def _sum(x: Jet, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if not x.ndim:
        return x if dtype is None else x.to(dtype)
    return _wrap(x.stack.sum(_from_right(x, dim), keepdim, dtype=dtype), x)


@jet_rule(torch.mean)
def _mean(x: Jet, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    if not x.ndim:
        return x if dtype is None else x.to(dtype)
    return _wrap(x.stack.mean(_from_right(x, dim), keepdim, dtype=dtype), x)


def _sizes(sizes: tuple[Any, ...]) -> tuple[int, ...]:
    """Sizes that were given one by one or as one sequence."""
    return tuple(sizes[0]) if len(sizes) == 1 and not isinstance(sizes[0], int) else sizes


@jet_rule(Tensor.view, torch.reshape)
def _reshape(x: Jet, *shape: Any, **kwargs: Any) -> Jet:
    if shape and isinstance(shape[0], torch.dtype):
        raise NotImplementedError("jet: Tensor.view(dtype) has no rule; convert by Tensor.to")
    sizes = _sizes(shape or tuple(kwargs.values()))
    if -1 in sizes and 0 not in x.shape:
        sizes = tuple(x.numel() // -math.prod(sizes) if n == -1 else n for n in sizes)
    return x.map(lambda c: c.reshape(len(c), *sizes))


@jet_rule(Tensor.view_as, Tensor.reshape_as)
def _reshape_as(x: Tensor, other: Tensor) -> Tensor:
    return x.reshape(other.shape)


@jet_rule(torch.permute)
def _permute(x: Jet, *dims: Any, **kwargs: Any) -> Jet:
    order = [d % x.ndim for d in _sizes(dims or tuple(kwargs.values()))]
    return x.map(lambda c: c.permute(0, *[d + 1 for d in order]))


@jet_rule(torch.moveaxis)
def _moveaxis(x: Jet, source: Any, destination: Any) -> Tensor:
    return torch.movedim(x, source, destination)


@jet_rule(torch.flip)
def _flip(x: Jet, *dims: Any, **kwargs: Any) -> Jet:
    return x.map(lambda c: c.flip(_from_right(x, _sizes(dims or tuple(kwargs.values())))))


@jet_rule(torch.tile)
def _tile(x: Jet, *dims: Any, **kwargs: Any) -> Tensor:
    repeats = _sizes(dims or tuple(kwargs.values()))
    return x.repeat(*[1] * (x.ndim - len(repeats)), *repeats)


@jet_rule(torch.take)
def _take(x: Jet, index: Tensor) -> Tensor:
    return x.flatten()[index]


@jet_rule(torch.diagflat)
def _diagflat(x: Jet, offset: int = 0) -> Tensor:
    return x.flatten().diag(offset)


@jet_rule(torch.unbind)
def _unbind(x: Jet, dim: int = 0) -> Any:
    return _wrap(x.stack.unbind(_from_right(x, dim)), x)


@jet_rule(torch.broadcast_to)
def _broadcast_to(x: Jet, *size: Any, **kwargs: Any) -> Jet:
    return _expand(x, *(size or tuple(kwargs.values())))


@jet_rule(Tensor.expand)
def _expand(x: Jet, *sizes: Any, implicit: bool = False) -> Jet:
    shape = _sizes(sizes)
    stack, _ = lift(x, len(shape))
    return Jet(stack.expand(len(stack), *shape), x.ring, x.live)


@jet_rule(Tensor.expand_as)
def _expand_as(x: Tensor, other: Tensor) -> Tensor:
    return x.expand(other.shape)


@jet_rule(torch.flatten)
def _flatten(x: Jet, start_dim: int = 0, end_dim: int = -1) -> Jet:
    if not x.ndim:
        return _reshape(x, 1)
    start, end = start_dim % x.ndim, end_dim % x.ndim
    return _reshape(x, (*x.shape[:start], x.shape[start : end + 1].numel(), *x.shape[end + 1 :]))


@jet_rule(torch.unsqueeze)
def _unsqueeze(x: Jet, dim: int) -> Jet:
    return x.map(lambda c: c.unsqueeze(dim % (x.ndim + 1) + 1))


@jet_rule(torch.squeeze)
def _squeeze(x: Jet, dim: Any = None) -> Jet:
    dims = range(x.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    gone = {d % max(x.ndim, 1) for d in dims}
    return _reshape(x, tuple(n for d, n in enumerate(x.shape) if n != 1 or d not in gone))


@jet_rule(torch.chunk)
def _chunk(x: Jet, chunks: int, dim: int = 0) -> Any:
    return _wrap(x.stack.chunk(chunks, _from_right(x, dim)), x)


@jet_rule(torch.split, Tensor.split, torch.functional.split)
def _split(x: Jet, split_size_or_sections: Any = None, dim: int = 0, **kwargs: Any) -> Any:
    sizes = kwargs.get("split_size", split_size_or_sections)
    return _wrap(torch.split(x.stack, sizes, _from_right(x, dim)), x)


@jet_rule(Tensor.__iter__)
def _iter(x: Jet) -> Any:
    return iter(_wrap(x.stack.unbind(1), x))


@jet_rule(Tensor.__getitem__)
def _getitem(x: Jet, index: Any) -> Jet:
    _only_first(Tensor.__getitem__, x, index)
    parts = index if isinstance(index, tuple) else (index,)
    if all(part is None or part is ... or isinstance(part, int | slice) for part in parts):
        return x.map(lambda c: c[(slice(None), *parts)])
    # Where indices of tensors stand apart, their dimensions move to the front of the stack.
    places = torch.arange(x.numel(), device=x.device).reshape(x.shape)[index]
    return x.map(lambda c: c.reshape(len(c), -1)[:, places.flatten()].reshape(-1, *places.shape))


@jet_rule(torch.gather)
def _gather(x: Jet, dim: int, index: Tensor, **_: Any) -> Jet:
    _only_first(torch.gather, x, index)
    return x.map(lambda c: c.gather(_from_right(x, dim), index.expand(len(c), *index.shape)))


@jet_rule(F.embedding)
def _embedding(
    input: Tensor,
    weight: Jet,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Jet:
    if max_norm is not None or scale_grad_by_freq or sparse:
        raise NotImplementedError(
            "jet: F.embedding has a rule without max_norm, scale_grad_by_freq and sparse"
        )
    # padding_idx only stops a gradient, and jet's derivatives with it
    rows = weight
    if padding_idx is not None:
        kept = torch.arange(len(weight), device=weight.device) != padding_idx % len(weight)
        rows = torch.where(kept[:, None], weight, weight.detach())  # type: ignore[assignment]
    return rows.map(lambda c: torch.stack([F.embedding(input, w) for w in c]))


def _join(function: Any, values: Sequence[Tensor], dim: int) -> Jet:
    ring = ring_of(values)
    lifted = [lift(x) for x in values]
    size = max(len(stack) for stack, _ in lifted)
    stacks = [pad(stack, size) for stack, _ in lifted]
    return Jet(function(stacks, dim), ring, max(live for _, live in lifted))


@jet_rule(torch.cat, torch.concat, torch.concatenate)
def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Jet:
    # the empty vector is joined to anything
    values = [x for x in tensors if x.shape != (0,)]
    return _join(torch.cat, values, _from_right(values[0], dim))


@jet_rule(torch.stack)
def _stack(tensors: Sequence[Tensor], dim: int = 0) -> Jet:
    return _join(torch.stack, tensors, dim % (tensors[0].ndim + 1) + 1)


@jet_rule(torch.hstack)
def _hstack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat(tensors, 0 if tensors[0].ndim < 2 else 1)  # type: ignore[arg-type]


@jet_rule(torch.vstack, torch.row_stack)
def _vstack(tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([x if x.ndim > 1 else x.reshape(1, -1) for x in tensors])


@jet_rule(torch.atleast_1d)
def _atleast_1d(x: Tensor) -> Tensor:
    return x if x.ndim else x.reshape(1)


@jet_rule(torch.broadcast_tensors)
def _broadcast_tensors(*tensors: Tensor) -> Any:
    shape = torch.broadcast_shapes(*[x.shape for x in tensors])
    return tuple(x.expand(shape) for x in tensors)


@jet_rule(F.pad)
def _pad(x: Jet, pad: Any, mode: str = "constant", value: float | None = None) -> Jet:
    if mode != "constant" or not value:
        return cast(Jet, _wrap(torch.vmap(lambda c: F.pad(c, pad, mode))(x.stack), x))
    edge = F.pad(torch.zeros_like(primal(x)), pad, mode, value)
    return x.map(lambda c: F.pad(c, pad)) + edge  # type: ignore[return-value]


def _dropout(function: Any) -> None:
    @jet_rule(function)
    def rule(input: Jet, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return input * function(torch.ones_like(input), p, training) if training else input


for _function in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d):
    _dropout(_function)


# ------------------------------------------------------------------ arithmetic


def _add_stacks(x: Tensor, y: Tensor) -> Tensor:
    """The sum of two values, constants among them; the shorter stack ends first."""
    ring = ring_of(x, y)
    ndim, dtype = max(x.ndim, y.ndim), torch.result_type(primal(x), primal(y))
    (a, live_a), (b, live_b) = lift(x, ndim), lift(y, ndim)
    a, b = a.to(dtype), b.to(dtype)
    if len(a) < len(b):
        a, b = b, a
    n = len(b)
    total = a[:n] + b
    if n < len(a):
        total = torch.cat([total, a[n:].expand(-1, *total.shape[1:])])
    return Jet(total, ring, max(live_a, live_b))


@jet_rule(torch.add)
def _add(x: Any, other: Any, *, alpha: float = 1) -> Tensor:
    other = other if alpha == 1 else alpha * other
    if isinstance(x, Tensor) and isinstance(other, Tensor):
        return _add_stacks(x, other)
    x, other = (x, other) if isinstance(x, Tensor) else (other, x)
    return Jet(
        torch.cat([x.stack[:1] + other, x.stack[1:].to(torch.result_type(x, other))]),
        x.ring,
        x.live,
    )


@jet_rule(torch.sub, torch.subtract)
def _sub(x: Any, other: Any, *, alpha: float = 1) -> Tensor:
    return torch.add(x, -alpha * other if alpha != 1 else -other)


@jet_rule(torch.rsub, Tensor.__rsub__)
def _rsub(x: Any, other: Any, alpha: float = 1) -> Tensor:
    return torch.add(-x if alpha == 1 else -alpha * x, other)


@jet_rule(torch.mul, torch.multiply)
def _mul(x: Any, other: Any) -> Tensor:
    if isinstance(x, Tensor) and isinstance(other, Tensor):
        # A constant without dimensions is a factor of the stack, and keeps its weak dtype.
        return cast(Tensor, ring_of(x, other).product(x, other))
    x, other = (x, other) if isinstance(x, Tensor) else (other, x)
    return cast(Tensor, x.map(lambda c: c * other))


@jet_rule(torch.div, torch.divide, torch.true_divide, Tensor.__truediv__)
def _div(x: Any, other: Any, *, rounding_mode: str | None = None) -> Tensor:
    if rounding_mode is not None:
        return torch.div(primal(x), primal(other), rounding_mode=rounding_mode)
    if not isinstance(other, Jet):
        stack, _ = lift(x, getattr(other, "ndim", 0))
        # A stack has a dimension more than its value, and so another say in the dtype.
        dtype = torch.result_type(primal(x), other)
        divisor = other.to(dtype) if isinstance(other, Tensor) else other
        return Jet(stack.to(dtype) / divisor, x.ring, x.live)
    return x * torch.reciprocal(other)


@jet_rule(Tensor.__rdiv__, Tensor.__rtruediv__)
def _rdiv(x: Jet, y: Any) -> Tensor:
    return torch.reciprocal(x) * y


def _modulus(function: Any, *others: Any) -> None:
    @jet_rule(function, *others)
    def rule(x: Jet, other: Any) -> Tensor:
        _only_first(function, x, (other,))
        return x + (function(primal(x), other) - primal(x))


_modulus(torch.remainder, Tensor.__mod__)
_modulus(torch.fmod)


@jet_rule(torch.addcmul)
def _addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return x + value * (a * b)


@jet_rule(torch.addcdiv)
def _addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: float = 1) -> Tensor:
    return x + value * (a / b)


@jet_rule(torch.lerp)
def _lerp(x: Tensor, end: Tensor, weight: Any) -> Tensor:
    return x + weight * (end - x)


# ------------------------------------------------------------------ elementary functions


def _elementary(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return cast(Tensor, ring_of((x,)).elementary(Elementary(*args, **kwargs), cast(Jet, x)))


def _elementwise(elementary: Elementary, *functions: Any) -> None:
    @jet_rule(*functions)
    def rule(x: Jet) -> Tensor:
        return x.ring.elementary(elementary, x)


def _smooth(
    *functions: Any,
    slope: Callable[[Tensor], Tensor],
    series: Any = None,
    from_value: bool = False,
) -> None:
    """An elementwise function without options, by its derivative."""
    _elementwise(Elementary(functions[0], slope, series, from_value), *functions)


def _gauss(x: Tensor) -> Tensor:
    return torch.exp(-x.square()) * (2 / math.sqrt(math.pi))


def _riccati(*functions: Any, constant: float = 0, linear: float = 0, square: float = 0) -> None:
    _elementwise(Riccati(functions[0], constant, linear, square), *functions)


_riccati(torch.exp, linear=1)
_riccati(torch.expm1, constant=1, linear=1)
_riccati(torch.tanh, F.tanh, constant=1, square=-1)
_riccati(torch.sigmoid, F.sigmoid, torch.special.expit, linear=1, square=-1)
_riccati(torch.tan, constant=1, square=1)
_riccati(torch.reciprocal, square=-1)
_smooth(torch.sqrt, slope=lambda y: 0.5 * torch.reciprocal(y), series=power(0.5), from_value=True)
_smooth(torch.rsqrt, slope=lambda y: -0.5 * y**3, series=power(-0.5), from_value=True)
_smooth(torch.sin, slope=torch.cos, series=oscillation(torch.sin, torch.cos, -1))
_smooth(
    torch.cos, slope=lambda x: -torch.sin(x), series=oscillation(torch.cos, lambda x: -x.sin(), -1)
)
_smooth(torch.sinh, slope=torch.cosh, series=oscillation(torch.sinh, torch.cosh, 1))
_smooth(torch.cosh, slope=torch.sinh, series=oscillation(torch.cosh, torch.sinh, 1))
_smooth(torch.log, slope=torch.reciprocal)
_smooth(torch.log2, slope=lambda x: torch.reciprocal(x * math.log(2)))
_smooth(torch.log10, slope=lambda x: torch.reciprocal(x * math.log(10)))
_smooth(torch.log1p, slope=lambda x: torch.reciprocal(x + 1))
_smooth(torch.atan, torch.arctan, slope=lambda x: torch.reciprocal(x.square() + 1))
_smooth(torch.asin, torch.arcsin, slope=lambda x: torch.rsqrt(1 - x.square()))
_smooth(torch.acos, torch.arccos, slope=lambda x: -torch.rsqrt(1 - x.square()))
_smooth(torch.asinh, torch.arcsinh, slope=lambda x: torch.rsqrt(x.square() + 1))
_smooth(torch.acosh, torch.arccosh, slope=lambda x: torch.rsqrt(x - 1) * torch.rsqrt(x + 1))
_smooth(torch.atanh, torch.arctanh, slope=lambda x: torch.reciprocal(1 - x.square()))
_smooth(torch.erf, torch.special.erf, slope=_gauss)
_smooth(torch.erfc, torch.special.erfc, slope=lambda x: -_gauss(x))
_smooth(
    torch.special.erfcx,
    slope=lambda x: 2 * x * torch.special.erfcx(x) - 2 / math.sqrt(math.pi),
)
_smooth(
    torch.erfinv,
    torch.special.erfinv,
    slope=lambda x: (0.5 * math.sqrt(math.pi)) * torch.exp(torch.erfinv(x).square()),
)
_smooth(torch.lgamma, torch.special.gammaln, slope=torch.digamma)
_smooth(torch.digamma, torch.special.digamma, slope=lambda x: torch.polygamma(1, x))
_smooth(F.logsigmoid, slope=lambda x: torch.sigmoid(-x))


@jet_rule(torch.polygamma, torch.special.polygamma)
def _polygamma(n: Any, x: Any) -> Tensor:
    n, x = (n, x) if isinstance(n, int) else (x, n)  # the method has it the other way round
    return _elementary(x, lambda t: torch.polygamma(n, t), lambda t: torch.polygamma(n + 1, t))


@jet_rule(torch.exp2)
def _exp2(x: Jet) -> Tensor:
    return torch.exp(x * math.log(2))


@jet_rule(F.silu)
def _silu(input: Jet, inplace: bool = False) -> Tensor:
    def slope(x: Tensor) -> Tensor:
        s = torch.sigmoid(x)
        return s * (1 + x * (1 - s))

    return _elementary(input, F.silu, slope, _composed(lambda x: x * torch.sigmoid(x)))


def _composed(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """The series of what other rules compose."""

    def series(stack: Tensor, length: int) -> Tensor:
        return lift(f(Jet(stack, Taylor(length))))[0]

    return series


@jet_rule(F.gelu)
def _gelu(input: Jet, approximate: str = "none") -> Tensor:
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (input + 0.044715 * input**3)
        return 0.5 * input * (1 + torch.tanh(inner))
    return input.ring.elementary(_GELU, input)


class _Gelu(Elementary):
    """`y = x P`, with the normal distribution `P' = p x'` and its density `p' = -x x' p`."""

    def __init__(self) -> None:
        super().__init__(F.gelu, None, self.recurrence)

    def recurrence(self, stack: Tensor, length: int) -> Tensor:
        x, (below, _) = stack.unbind(), _normal(stack, length)
        room = Room(stack, length)
        room.rows[0].copy_(F.gelu(x[0]))
        for k, y in enumerate(room.rows[1:], start=1):
            for j in range(min(k + 1, len(x))):
                add_product(y, x[j], below[k - j])
        return room.stack()

    def slope(self, stack: Tensor, live: int, length: int) -> tuple[Tensor, int]:
        """`P + x p`."""
        x, (slopes, density) = stack[:live].unbind(), _normal(stack[:live], length)
        for k, slope in enumerate(slopes):
            for j in range(min(k + 1, len(x))):
                add_product(slope, x[j], density[k - j])
        return torch.stack(slopes), length


def _normal(stack: Tensor, length: int) -> tuple[list[Tensor], list[Tensor]]:
    """The coefficients of the normal distribution of a series and of its density."""
    x = stack.unbind()
    below = [0.5 * (1 + torch.erf(x[0] * math.sqrt(0.5)))]
    density = [torch.exp(-0.5 * x[0].square()) * (1 / math.sqrt(2 * math.pi))]
    speed = [torch.zeros_like(x[0])]  # -x x'
    for k in range(1, length):
        places = range(max(0, k + 1 - len(x)), k // 2 + 1)
        pairs = [(x[i], x[k - i], -k / 2 if 2 * i == k else -k) for i in places]
        speed.append(sum_products(pairs) if pairs else speed[0])
        orders = range(1, min(k + 1, len(x)))
        below.append(sum_products([(x[j], density[k - j], j / k) for j in orders]))
        density.append(sum_products([(speed[j], density[k - j], 1 / k) for j in range(1, k + 1)]))
    return below, density


_GELU = _Gelu()


@jet_rule(F.mish)
def _mish(input: Jet, inplace: bool = False) -> Tensor:
    return input * torch.tanh(F.softplus(input))


@jet_rule(F.glu)
def _glu(input: Jet, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * torch.sigmoid(gate)


@jet_rule(F.softplus)
def _softplus(input: Jet, beta: float = 1.0, threshold: float = 20.0) -> Tensor:
    smooth = _elementary(
        input, lambda x: F.softplus(x, beta, threshold), lambda x: torch.sigmoid(beta * x)
    )
    return torch.where(primal(input) * beta > threshold, input, smooth)


@jet_rule(F.softsign)
def _softsign(input: Jet) -> Tensor:
    return input / (1 + input.abs())


@jet_rule(torch.square)
def _square(x: Jet) -> Tensor:
    return x * x


@jet_rule(torch.float_power)
def _float_power(x: Any, exponent: Any) -> Tensor:
    return _pow(x.double() if isinstance(x, Tensor) else x, exponent)


@jet_rule(torch.pow, Tensor.__pow__)
def _pow(x: Any, exponent: Any) -> Tensor:
    dtype = torch.result_type(primal(x), primal(exponent))
    if isinstance(exponent, Jet):
        log = x.to(dtype).log() if isinstance(x, Tensor) else math.log(x)
        return torch.exp(exponent.to(dtype) * log)
    x = x.to(dtype)
    if isinstance(exponent, Tensor):
        if not (exponent.is_floating_point() or exponent.is_complex()):
            exponents = exponent.unique().tolist()
            result: Tensor = x ** exponents[0]
            for n in exponents[1:]:
                result = torch.where(exponent == n, x**n, result)
            return result
        if torch.is_grad_enabled() and (
            exponent.requires_grad or torch._C._are_functorch_transforms_active()
        ):
            return torch.exp(exponent * torch.log(x))
        x = x.expand(torch.broadcast_shapes(x.shape, exponent.shape))
        exponent = exponent.to(dtype)
    elif not isinstance(exponent, complex) and exponent == int(exponent):
        return _integer_power(x, int(exponent))
    return _elementary(
        x, lambda t: t**exponent, lambda t: exponent * t ** (exponent - 1), power(exponent)
    )


def _integer_power(x: Tensor, n: int) -> Tensor:
    """By squaring, which is right at 0 too."""
    if n < 0:
        return torch.reciprocal(_integer_power(x, -n))
    if n < 2:
        return x if n else torch.ones_like(x)
    half = _integer_power(x, n // 2)
    return half * half * x if n % 2 else half * half


@jet_rule(Tensor.__rpow__)
def _rpow(x: Jet, base: Any) -> Tensor:
    return torch.exp(x * (base.log() if isinstance(base, Tensor) else math.log(base)))


@jet_rule(torch.logit)
def _logit(x: Tensor, eps: float | None = None) -> Tensor:
    x = x if eps is None else x.clamp(eps, 1 - eps)
    return torch.log(x) - torch.log1p(-x)


@jet_rule(torch.xlogy, torch.special.xlogy)
def _xlogy(x: Any, other: Any) -> Tensor:
    log = other.log() if isinstance(other, Tensor) else math.log(other)
    zero = torch.as_tensor(primal(x) == 0, device=jets((x, other))[0].device)
    return torch.where(zero, 0.0, x * log)


@jet_rule(torch.logaddexp)
def _logaddexp(x: Tensor, other: Tensor) -> Tensor:
    return torch.logsumexp(torch.stack(list(torch.broadcast_tensors(x, other))), 0)


# ------------------------------------------------------------------ by pieces


@jet_rule(torch.where)
def _where(condition: Tensor, x: Any, other: Any) -> Any:
    condition = primal(condition)
    ring, like = ring_of(x, other), jets((x, other))[0]
    x, y = (
        t if isinstance(t, Tensor) else torch.tensor(t, dtype=like.dtype, device=like.device)
        for t in (x, other)
    )
    ndim, dtype = max(condition.ndim, x.ndim, y.ndim), torch.result_type(primal(x), primal(y))
    (a, live_a), (b, live_b) = lift(x, ndim), lift(y, ndim)
    size = max(len(a), len(b))
    a, b = (pad(c.to(dtype), size) for c in (a, b))
    return Jet(torch.where(condition, a, b), ring, max(live_a, live_b))


# after that of torch.where, whose rule goes to the method too
@jet_rule(Tensor.where)
def _where_method(x: Any, condition: Tensor, other: Any) -> Any:
    return _where(condition, x, other)


@jet_rule(torch.masked_fill)
def _masked_fill(x: Tensor, mask: Tensor, value: Any) -> Tensor:
    return torch.where(mask, value, x)


@jet_rule(torch.abs, torch.absolute)
def _abs(x: Jet) -> Tensor:
    if x.is_complex():
        raise NotImplementedError("jet: torch.abs has no rule for complex values, not analytic")
    return x * torch.sign(primal(x))


@jet_rule(F.relu, torch.relu)
def _relu(input: Jet, inplace: bool = False) -> Tensor:
    return input.map(lambda c: c * (c[0] > 0))


@jet_rule(F.leaky_relu)
def _leaky_relu(input: Jet, negative_slope: float = 0.01, inplace: bool = False) -> Tensor:
    return torch.where(primal(input) > 0, input, input * negative_slope)


@jet_rule(F.prelu, torch.prelu)
def _prelu(input: Tensor, weight: Tensor) -> Tensor:
    shape = (-1, *[1] * (input.ndim - 2)) if input.ndim > 1 and weight.numel() > 1 else (-1,)
    return torch.where(primal(input) > 0, input, input * weight.reshape(shape))


@jet_rule(F.elu)
def _elu(input: Jet, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    below = torch.expm1(torch.where(primal(input) > 0, 0.0, input))
    return torch.where(primal(input) > 0, input, alpha * below)


@jet_rule(F.celu, torch.celu)
def _celu(input: Jet, alpha: float = 1.0, inplace: bool = False) -> Tensor:
    return alpha * F.elu(input / alpha)


@jet_rule(F.selu, torch.selu)
def _selu(input: Jet, inplace: bool = False) -> Tensor:
    return 1.0507009873554804934193349852946 * F.elu(input, 1.6732632423543772848170429916717)


@jet_rule(F.relu6)
def _relu6(input: Jet, inplace: bool = False) -> Tensor:
    return F.hardtanh(input, 0.0, 6.0)


@jet_rule(F.hardtanh)
def _hardtanh(
    input: Jet, min_val: float = -1.0, max_val: float = 1.0, inplace: bool = False
) -> Tensor:
    inside = (primal(input) > min_val) & (primal(input) < max_val)
    return torch.where(inside, input, primal(input).clamp(min_val, max_val))


@jet_rule(F.hardsigmoid)
def _hardsigmoid(input: Jet, inplace: bool = False) -> Tensor:
    return F.hardtanh(input + 3, 0.0, 6.0) / 6


@jet_rule(F.hardswish)
def _hardswish(input: Jet, inplace: bool = False) -> Tensor:
    return input * F.hardsigmoid(input)


@jet_rule(torch.clamp, torch.clip)
def _clamp(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    if min is not None:
        x = torch.where(primal(x) < primal(min), min, x)
    return x if max is None else torch.where(primal(x) > primal(max), max, x)


@jet_rule(torch.clamp_min)
def _clamp_min(x: Tensor, min: Any) -> Tensor:
    return torch.clamp(x, min)


@jet_rule(torch.clamp_max)
def _clamp_max(x: Tensor, max: Any) -> Tensor:
    return torch.clamp(x, max=max)


@jet_rule(torch.maximum)
def _maximum(x: Tensor, other: Tensor) -> Tensor:
    a, b = primal(x), primal(other)
    return torch.where(a > b, x, torch.where(a < b, other, (x + other) / 2))


@jet_rule(torch.minimum)
def _minimum(x: Tensor, other: Tensor) -> Tensor:
    return -torch.maximum(-x, -other)


def _extreme(name: str) -> None:
    function = getattr(torch, name)

    @jet_rule(function)
    def rule(x: Jet, dim: Any = None, keepdim: bool = False) -> Any:
        if isinstance(dim, Tensor):
            return (torch.maximum if name == "max" else torch.minimum)(x, dim)
        if dim is None:
            return getattr(torch, f"a{name}")(x)
        found = function(primal(x), dim, True)
        values = x.gather(dim, found.indices)
        if keepdim:
            return type(found)((values, found.indices))
        return type(found)((values.squeeze(dim), found.indices.squeeze(dim)))

    @jet_rule(getattr(torch, f"a{name}"))
    def all_of(x: Jet, dim: Any = (), keepdim: bool = False) -> Tensor:
        dims = tuple(range(x.ndim)) if dim == () else dim
        first = (primal(x) == getattr(torch, f"a{name}")(primal(x), dims, True)).to(x.dtype)
        return (x * (first / first.sum(dims, keepdim=True))).sum(dims, keepdim)


_extreme("max")
_extreme("min")


@jet_rule(torch.sort)
def _sort(x: Jet, dim: int = -1, descending: bool = False, **kwargs: Any) -> Any:
    found = torch.sort(primal(x), dim=dim, descending=descending, **kwargs)
    return type(found)((x.gather(dim, found.indices), found.indices))


@jet_rule(torch.topk)
def _topk(x: Jet, k: int, dim: int = -1, *args: Any, **kwargs: Any) -> Any:
    found = torch.topk(primal(x), k, dim, *args, **kwargs)
    return type(found)((x.gather(dim, found.indices), found.indices))


def _max_pooling(n: int) -> None:
    with_indices = getattr(F, f"max_pool{n}d_with_indices")

    @jet_rule(with_indices)
    def both(input: Jet, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        _, places = with_indices(primal(input), *args, **kwargs)
        values = input.flatten(-n).gather(-1, places.flatten(-n)).reshape(places.shape)
        return values, places

    @jet_rule(getattr(F, f"max_pool{n}d"), getattr(torch, f"max_pool{n}d"))
    def rule(input: Jet, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("return_indices", None)
        return both(input, *args[:5], **kwargs)[0]


for _n in (1, 2, 3):
    _max_pooling(_n)


# ------------------------------------------------------------------ reductions


@jet_rule(torch.logsumexp, torch.special.logsumexp)
def _logsumexp(x: Jet, dim: Any, keepdim: bool = False) -> Tensor:
    dims = [dim] if isinstance(dim, int) else list(dim)
    if len(dims) > 1:
        kept = [d for d in range(x.ndim) if d not in [d % x.ndim for d in dims]]
        rows = x.permute(*kept, *dims).flatten(len(kept))
        total = torch.logsumexp(rows, -1)
        shape = [1 if d not in kept else n for d, n in enumerate(x.shape)]
        return total.reshape(shape) if keepdim else total
    total = x.ring.logsumexp(x, _from_right(x, dims[0]))[0]
    return total if keepdim else total.squeeze(dims[0])


def _widened(x: Tensor, dtype: Any) -> Tensor:
    return x if dtype is None else x.to(dtype)


def _implied(x: Tensor, dim: int | None) -> int:
    """The dimension that PyTorch takes, with a warning of its deprecation, where none is given."""
    if dim is not None:
        return dim
    return 0 if x.ndim in (0, 1, 3) else 1


@jet_rule(F.softmax)
def _softmax(input: Jet, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
    return torch.softmax(input, _implied(input, dim), dtype)


@jet_rule(F.log_softmax)
def _log_softmax(
    input: Jet, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None
) -> Tensor:
    return torch.log_softmax(input, _implied(input, dim), dtype)


@jet_rule(torch.softmax, torch.special.softmax)
def _softmax_of(x: Jet, dim: int, dtype: Any = None) -> Tensor:
    x = cast(Jet, _widened(x, dtype))
    return cast(Tensor, x.ring.logsumexp(x, _from_right(x, dim))[1])


@jet_rule(torch.log_softmax, torch.special.log_softmax)
def _log_softmax_of(x: Jet, dim: int, dtype: Any = None) -> Tensor:
    x = cast(Jet, _widened(x, dtype))
    return x - x.ring.logsumexp(x, _from_right(x, dim))[0]


@jet_rule(F.softmin)
def _softmin(input: Jet, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor:
    return F.softmax(-input, dim, dtype=dtype)


@jet_rule(torch.var)
def _var(
    x: Jet, dim: Any = None, unbiased: Any = None, keepdim: bool = False, *, correction: Any = None
) -> Tensor:
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    dims = _from_right(x, [dim] if isinstance(dim, int) else dim)
    if correction is None:
        correction = 0 if unbiased is False else 1
    n = math.prod(x.shape[d] for d in dims)
    centered = x - x.mean(dims, keepdim=True)
    return centered.square().sum(dims, keepdim) / (n - correction)


@jet_rule(torch.std)
def _std(*args: Any, **kwargs: Any) -> Tensor:
    return torch.var(*args, **kwargs).sqrt()


@jet_rule(torch.var_mean)
def _var_mean(x: Jet, dim: Any = None, *args: Any, **kwargs: Any) -> Any:
    dims = None if isinstance(dim, bool) else dim
    return torch.var(x, dim, *args, **kwargs), x.mean(dims, keepdim=kwargs.get("keepdim", False))


@jet_rule(torch.prod)
def _prod(x: Jet, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    x = cast(Jet, _widened(x, dtype))
    if dim is None:
        return torch.prod(x.flatten(), 0)
    rows = x.movedim(dim, 0)
    if not len(rows):
        return torch.prod(primal(x), dim, keepdim)
    while len(rows) > 1:  # halves of it, so that the depth is logarithmic
        half = len(rows) // 2
        rows = torch.cat([rows[:half] * rows[half : 2 * half], rows[2 * half :]])
    return rows[0].unsqueeze(dim) if keepdim else rows[0]


@jet_rule(torch.linalg.vector_norm)
def _vector_norm(
    x: Jet, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    x = cast(Jet, _widened(x, dtype))
    dims = _from_right(x, [dim] if isinstance(dim, int) else dim)
    if ord == 2:
        return x.square().sum(dims, keepdim).sqrt()
    if ord == 1:
        return x.abs().sum(dims, keepdim)
    if ord == math.inf:
        return x.abs().amax(dims, keepdim)
    if ord == -math.inf:
        return x.abs().amin(dims, keepdim)
    if ord == 0:
        return torch.linalg.vector_norm(primal(x), 0, dims, keepdim)
    return (x.abs() ** ord).sum(dims, keepdim) ** (1 / ord)


@jet_rule(torch.norm, Tensor.norm)
def _norm(
    input: Jet,
    p: Any = "fro",
    dim: Any = None,
    keepdim: bool = False,
    out: None = None,
    dtype: Any = None,
) -> Tensor:
    if p not in (None, "fro") and not isinstance(p, int | float):
        raise NotImplementedError(f"jet: torch.norm has no rule for p={p!r}")
    return torch.linalg.vector_norm(
        input, 2 if p in (None, "fro") else p, dim, keepdim, dtype=dtype
    )


@jet_rule(torch.linalg.norm)
def _linalg_norm(
    x: Jet, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    matrix = x.ndim == 2 if dim is None else not isinstance(dim, int) and len(dim) == 2
    if ord == "fro" or ord is None:
        ord, matrix = 2, False
    if (matrix and ord is not None) or isinstance(ord, str):
        raise NotImplementedError(f"jet: torch.linalg.norm has no rule for matrices, ord={ord!r}")
    return torch.linalg.vector_norm(x, ord, dim, keepdim, dtype=dtype)


@jet_rule(F.normalize)
def _normalize(
    input: Jet, p: float = 2.0, dim: int = 1, eps: float = 1e-12, out: None = None
) -> Tensor:
    return input / torch.linalg.vector_norm(input, p, dim, True).clamp_min(eps)


@jet_rule(F.cosine_similarity)
def _cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    def unit(x: Tensor) -> Tensor:
        return x / torch.linalg.vector_norm(x, 2, dim, True).clamp_min(eps)

    return (unit(x1) * unit(x2)).sum(dim)
