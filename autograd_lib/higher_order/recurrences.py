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
    Recorder,
    Values,
    differentiable,
    no_rule,
    tensors_in,
)
from autograd_lib.higher_order.rules.arithmetic import _integer_power

Rule = Callable[[Recorder, Any, Any, Any], Any]

# Linear in all floating-point tensors together, and not in the first alone.
_JOINT = """
    add sub rsub where cat stack masked_fill fill copy index_put index_add scatter scatter_add
    select_scatter slice_scatter diagonal_scatter constant_pad_nd
"""
# Beside those of `jet`.
_LINEAR = """
    view _to_copy index select_backward slice_backward _conj _neg_view embedding im2col col2im
    _adaptive_avg_pool2d reflection_pad1d reflection_pad2d replication_pad1d replication_pad2d
"""
_PLAIN = """
    sign sgn floor ceil round trunc heaviside zeros_like ones_like full_like empty_like
    new_zeros new_ones new_full new_empty new_empty_strided
"""
# The rule of `jet` is written as for plain tensors.
_SHARED = """
    abs addmm addmv baddbmm clamp clamp_max clamp_min hypot logaddexp maximum minimum prod std var
    xlogy
"""


def rule_of(func: Any) -> Rule:
    """The rule of an operation; without one, PyTorch's own way to write it by others."""
    name = func._overloadpacket.__name__ if func.namespace == "aten" else ""
    home, local = (torch.special, name[8:]) if name.startswith("special_") else (torch, name)
    elementary = ELEMENTARY.get(getattr(home, local, None))
    if name in _RULES:
        return _RULES[name]
    if name in _SHARED.split():
        return _composed(RULES[getattr(torch, name)])
    if elementary is not None:
        return lambda record, *call: record.elementary(*call, _slope(elementary))
    if func in decomposition_table:
        return _composed(decomposition_table[func])
    # Rules run below autograd, where composite operations are not yet taken apart.
    if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
        return _composed(func.decompose)
    return _condition


def _composed(function: Callable[..., Any]) -> Rule:
    return lambda record, func, args, kwargs: record.composed(function, *args, **kwargs)


def _slope(elementary: Any) -> Callable[[Tensor, Tensor], Tensor]:
    """The derivative of a function in the table of `jet`, from its argument and its value."""

    def slope(x: Tensor, y: Tensor) -> Any:
        if not isinstance(elementary, Recurrence):
            return elementary.derivative(y if elementary.from_value else x)
        letters = {"x": x, "y": y}
        for letter, (value, _) in zip("zw", elementary.functions[1:], strict=False):
            letters[letter] = value(x)
        terms: list[Any] = []
        for names, factor in elementary.terms.items():
            factors: list[Any] = [letters[name] for name in names]
            factors += [factor] if factor != 1 or not factors else []
            terms.append(math.prod(factors[1:], start=factors[0]))
        return sum(terms[1:], start=terms[0])

    return slope


def _condition(record: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    if any(differentiable(x) for x in tensors_in([func(*args, **kwargs)])):
        raise no_rule(func._overloadpacket.__name__)
    return record.constant(func, args, kwargs)


def _linear(record: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    if any(record.follows(x) for x in tensors_in(args[1:])):
        raise no_rule(func._overloadpacket.__name__)
    return record.linear(func, args, kwargs, "value")


def _bilinear(record: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    a, b, *rest = args
    if not (record.follows(a) and record.follows(b)):
        return record.linear(func, args, kwargs, "value")
    i, j = record.slot(a), record.slot(b)

    def compute(values: Values, n: int) -> Tensor:
        a, b = values[i], values[j]
        products = [func(a[k], b[n - k], *rest) for k in range(n + 1)]
        return sum(products[1:], start=products[0])

    def elementwise(values: Values, n: int) -> Tensor:
        a, b = values[i], values[j]
        half = (n + 1) // 2 if i == j and n else n + 1  # of a square, each product stands twice
        z = a[0] * b[n]
        for k in range(1, half):
            z = torch.addcmul(z, a[k], b[n - k])
        if half > n:
            return z
        return z + z if n % 2 else torch.addcmul(z + z, a[half], a[half])

    return record.add(func(*args), elementwise if func is _MUL else compute, args)


_ALIAS, _MUL = torch.ops.aten.alias.default, torch.ops.aten.mul.Tensor


def _div(record: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    if kwargs.get("rounding_mode") is not None:
        return record.constant(func, args, kwargs)
    if not record.follows(args[1]):
        return record.linear(func, args, kwargs, "value")
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


def _extremum(record: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    x, dims, keep = [*args, (), False][:3] if len(args) == 1 else [*args, False][:3]
    largest = record.constant(func, (x, dims, True), {})

    def mean_of_largest() -> Tensor:
        places = (x == largest).to(x.dtype)
        return (x * (places / places.sum(dims, keepdim=True))).sum(dims, keepdim=keep)

    return record.composed(mean_of_largest)


def _sort(record: Recorder, func: Any, args: Any, kwargs: Any) -> Any:
    _, places = record.constant(func, args, kwargs)
    place = 2 if func is torch.ops.aten.topk.default else 1
    dim = kwargs.get("dim", args[place] if len(args) > place else -1)
    return record.composed(torch.gather, args[0], dim, places), places


def _var_mean(x: Tensor, dim: Any = None, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
    keep = args[1] if len(args) > 1 else options.get("keepdim", False)
    return torch.var(x, dim, *args, **options), x.mean(None if isinstance(dim, bool) else dim, keep)


_RULES: dict[str, Rule] = {
    **dict.fromkeys(_PLAIN.split(), Recorder.constant),
    **dict.fromkeys([*LINEAR, *_LINEAR.split()], _linear),
    **dict.fromkeys(_JOINT.split(), Recorder.linear),
    **dict.fromkeys(["mul", "mm", "bmm", "mv", "dot"], _bilinear),
    **dict.fromkeys(["amax", "amin"], _extremum),
    **dict.fromkeys(["sort", "topk"], _sort),
    "convolution": _convolution,
    # No gradient is stopped, since autograd detaches what it saves.
    "detach": lambda record, _, args, kwargs: record.linear(_ALIAS, args, kwargs),
    "div": _div,
    "pow": _pow,
    "relu": _composed(lambda x: x * (x > 0)),
    "softplus": _softplus,
    "var_mean": _composed(_var_mean),
}
