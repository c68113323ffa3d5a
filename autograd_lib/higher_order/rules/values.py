"""Functions that use only the value: shapes, comparisons, rounding, conversion to Python."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet, by_coefficient, primal
from autograd_lib.higher_order.rules.registration import family, getter, named
from autograd_lib.higher_order.taylor import jet_rule

_PLAIN = """
    size dim ndimension numel nelement element_size __len__ stride is_contiguous is_floating_point
    is_complex get_device is_same_size
    new_zeros new_ones new_full new_empty new_tensor
    zeros_like ones_like full_like empty_like rand_like randn_like randint_like bernoulli
    eq ne lt le gt ge __eq__ __ne__ __lt__ __le__ __gt__ __ge__ isnan isinf isfinite isposinf
    isneginf isclose allclose equal sign signbit floor ceil round trunc fix argmax argmin
    argsort count_nonzero nonzero any all logical_not logical_and logical_or logical_xor
    heaviside result_type can_cast searchsorted bucketize floor_divide __floordiv__
    histc bincount item tolist __bool__ __float__ __int__ __index__ __contains__ bool int long
"""
_PLAIN_GETTERS = """
    shape dtype device layout ndim is_cuda is_cpu is_meta is_sparse is_mkldnn is_nested is_quantized
    is_leaf requires_grad itemsize nbytes is_mps is_xla is_xpu
"""


@family
def _plain(function: Any) -> None:
    """A function that sees the values alone: constants, conditions, steps, places."""

    @jet_rule(function)
    def rule(*args: Any, **kwargs: Any) -> Any:
        return function(*primal(args), **primal(kwargs))


_plain(*named(_PLAIN, torch, Tensor), *[getter(name) for name in _PLAIN_GETTERS.split()])


jet_rule(torch.sgn)(lambda x: x / x.abs() if x.is_complex() else torch.sgn(primal(x)))


@jet_rule(Tensor.type)
def _type(x: Jet, *dtype: Any, **kwargs: Any) -> Any:
    return by_coefficient(Tensor.type, x, *dtype, **kwargs) if dtype or kwargs else primal(x).type()


@jet_rule(torch.detach, getter("data"))
def _detach(x: Jet) -> Tensor:
    constant = primal(x).detach()
    x.constants = (*[each for each in x.constants if each() is not None], weakref.ref(constant))
    return cast(Tensor, constant)


@jet_rule(Tensor.register_hook)
def _register_hook(x: Jet, hook: Callable[[Tensor], Any]) -> Any:
    def of_stack(grad: Tensor) -> None:
        if hook(grad[0]) is not None:
            raise NotImplementedError("jet: a hook that changes the gradient has no rule")

    return x.stack.register_hook(of_stack)


@jet_rule(Tensor.__repr__, Tensor.__format__)
def _text(x: Jet, *args: Any, **kwargs: Any) -> str:
    return f"Jet({primal(x)!r})"
