"""How each operation of PyTorch's dispatcher is extended to higher orders, by its name there."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._decomp import decomposition_table

from autograd_lib.higher_order.algebra import ELEMENTARY, Recurrence
from autograd_lib.higher_order.lookup import LINEAR, RULES
from autograd_lib.higher_order.recording import (
    Compute,
    Recorder,
    Values,
    differentiable,
    no_rule,
    sum_of_products,
    tensors_in,
)
from autograd_lib.higher_order.rules.arithmetic import _integer_power

Rule = Callable[[Recorder, Any, Any, Any], Any]

# Linear in all floating-point tensors together, and not in the first alone.
_JOINT = """
    add sub rsub where cat stack masked_fill fill copy index_put index_add scatter scatter_add
    select_scatter slice_scatter diagonal_scatter constant_pad_nd
"""
# The places of numbers that are added, and so have no part in higher orders.
_ADDENDS = {
    **dict.fromkeys(["add", "sub", "rsub"], (0, 1)),
    **dict.fromkeys(["masked_fill", "constant_pad_nd"], (2,)),
    **{"fill": (1,), "scatter": (3,), "where": (1, 2)},
}
# Beside those of `jet`.
_LINEAR = """
    view _to_copy index select_backward slice_backward _conj _neg_view embedding im2col col2im
    _adaptive_avg_pool2d reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
"""
_PLAIN = """
    sign sgn floor ceil round trunc heaviside zeros_like ones_like full_like empty_like
    new_zeros new_ones new_full new_empty new_empty_strided
"""
# The rule of `jet` is written as for plain tensors; in it the operation itself is of values.
_SHARED = """
    abs addmm addmv amax amin baddbmm clamp clamp_max clamp_min cummax cummin fmod hypot kthvalue
    logaddexp max maximum median min minimum mode nanmedian prod remainder sort std topk var
    var_mean xlogy
"""


def rule_of(func: Any) -> Rule:
    """The rule of an operation; without one, PyTorch's own way to write it by others."""
    name = func._overloadpacket.__name__ if func.namespace == "aten" else ""
    if name in _RULES:
        return _RULES[name]
    home, local = (torch.special, name[8:]) if name.startswith("special_") else (torch, name)
    elementary = ELEMENTARY.get(getattr(home, local, None))
    if elementary is not None:
        return lambda record, *call: record.elementary(*call, _slope(elementary))
    if func in decomposition_table:
        return _composed(decomposition_table[func])
    # Rules run below autograd, where composite operations are not yet taken apart.
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return _composed(func.decompose)
    return _condition


def _shared(record: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    record.plain.add(func)
    result = record.composed(RULES[func._overloadpacket.__name__], *args, **kwargs)
    record.plain.discard(func)
    return result


def _composed(function: Callable[..., Any]) -> Rule:
    return lambda record, func, args, kwargs: record.composed(function, *args, **kwargs)


def _slope(elementary: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The derivative of a function in the table of `jet`, from its argument and its value."""

    def slope(x: Tensor, y: Tensor) -> Any:
        if not isinstance(elementary, Recurrence):
            return elementary.derivative(y if elementary.from_value else x)
        values = [x, y, *[value(x) for value, _ in elementary.functions[1:]]]
        letters = dict(zip("xyzw", values, strict=False))
        terms: list[Any] = []
        for names, factor in elementary.terms.items():
            factors: list[Any] = [letters[name] for name in names]
            factors += [factor] if factor != 1 or not factors else []
            terms.append(math.prod(factors[1:], start=factors[0]))
        return sum(terms[1:], start=terms[0])

    return slope


def _condition(record: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    result = record.record(func, args, kwargs)
    if any(differentiable(x) for x in tensors_in([result])):
        raise no_rule(func._overloadpacket.__name__)
    return result


def _linear(record: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    if any(record.follows(x) for x in tensors_in(args[1:])):
        raise no_rule(func._overloadpacket.__name__)
    return record.linear(func, args, kwargs)


def _identity(record: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    """An operation whose result is its first argument, except perhaps in another dtype."""
    result = func(*args, **kwargs)
    if result.dtype != args[0].dtype:
        return record.linear(func, args, kwargs)
    record.enter(result, record.slot(args[0]))
    return result


def _joint(record: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    name = func._overloadpacket.__name__
    if "reduce" in kwargs:
        raise no_rule(name)

    def later() -> Compute:
        places = _ADDENDS.get(name, ())
        rest = [0 if i in places and not isinstance(x, Tensor) else x for i, x in enumerate(args)]
        return record.call(func, rest, kwargs, zero)

    def zero(x: Tensor) -> Tensor:
        """Zeros in the place of a constant addend."""
        constant = differentiable(x) and not record.follows(x)
        return record.record(_ZEROS, (x,), {}) if constant else x

    plus = name == "add" or (name == "sub" and record.follows(args[0]))
    return record.linear(func, args, kwargs, later, plus and not kwargs)


def _bilinear(record: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    a, b, *rest = args
    if not (record.follows(a) and record.follows(b)):
        one = not isinstance(b, Tensor) and b == 1
        return _identity(record, func, args, kwargs) if one else record.linear(func, args, kwargs)
    i, j, elementwise = record.slot(a), record.slot(b), func is _MUL
    square = elementwise and i == j  # of which each product stands twice

    def higher(values: Values, n: int) -> Tensor:
        a, b = values[i], values[j]
        half = (n + 1) // 2 if square else n + 1
        if elementwise:
            z = sum_of_products(a[:half], b[n : n - half : -1] if half <= n else b[::-1])
        else:
            z = func(a[0], b[n], *rest)
            for k in range(1, half):
                z = z + func(a[k], b[n - k], *rest)
        if not square:
            return z
        return z + z if n % 2 else torch.addcmul(z + z, a[half], a[half])

    return record.extend(record.record(func, args, kwargs), higher)


_MUL, _ZEROS = torch.ops.aten.mul.Tensor, torch.ops.aten.zeros_like.default


def _div(record: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs.get("rounding_mode") is not None:
        return record.record(func, args, kwargs)
    if not record.follows(args[1]):
        return record.linear(func, args, kwargs)
    return record.composed(lambda: args[0] * torch.reciprocal(args[1]))


def _pow(record: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    x, exponent = args
    if record.follows(exponent):
        log = record.composed(torch.log, x) if isinstance(x, Tensor) else math.log(x)
        return record.composed(lambda: torch.exp(exponent * log))
    if not isinstance(exponent, Tensor | complex) and exponent == int(exponent):
        return record.composed(_integer_power, x, int(exponent))
    return record.elementary(func, args, kwargs, lambda x, y: exponent * (y / x))


def _convolution(record: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    x, weight, bias, *rest = args
    if bias is None:
        return _bilinear(record, func, args, kwargs)
    sizes = (-1, *[1] * (weight.ndim - 2))
    return record.composed(lambda: func(x, weight, None, *rest) + bias.reshape(sizes))


def _softplus(record: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    beta = args[1] if len(args) > 1 else 1
    return record.elementary(func, args, kwargs, lambda x, _: torch.sigmoid(beta * x))


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_SHARED.split(), _shared),
    **dict.fromkeys(_PLAIN.split(), Recorder.record),
    **dict.fromkeys([*LINEAR, *_LINEAR.split()], _linear),
    **dict.fromkeys(_JOINT.split(), _joint),
    **dict.fromkeys(["mul", "mm", "bmm", "mv", "dot"], _bilinear),
    # By `detach` no gradient is stopped, since autograd detaches what it saves.
    **dict.fromkeys(["alias", "clone", "detach"], _identity),
    "convolution": _convolution,
    "div": _div,
    "pow": _pow,
    "softplus": _softplus,
}
