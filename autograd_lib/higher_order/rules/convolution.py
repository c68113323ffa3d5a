"""Convolutions and max pooling."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet, primal
from autograd_lib.higher_order.rules.registration import contract, family
from autograd_lib.higher_order.series import Operation
from autograd_lib.higher_order.taylor import jet_rule


@family
def _max_pooling(name: str) -> None:
    with_indices = getattr(F, f"{name}_with_indices")
    n = int(name[-2])

    @jet_rule(with_indices)
    def both(input: Jet, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        _, places = with_indices(primal(input), *args, **kwargs)
        values = input.flatten(-n).gather(-1, places.flatten(-n)).reshape(places.shape)
        return values, places

    @jet_rule(getattr(F, name), getattr(torch, name, getattr(F, name)))
    def rule(input: Jet, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.pop("return_indices", None)
        return both(input, *args[:5], **kwargs)[0]


_max_pooling(*[f"{kind}max_pool{n}d" for kind in ("", "adaptive_") for n in (1, 2, 3)])
_max_pooling("fractional_max_pool2d", "fractional_max_pool3d")


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


_OPTIONS = {"stride": 1, "padding": 0, "dilation": 1, "output_padding": 0, "groups": 1}
_ORDER = ("stride", "padding", "dilation", "groups")
_ORDER_TRANSPOSED = ("stride", "padding", "output_padding", "groups", "dilation")


def _convolution(n: int, function: Any, order: tuple[str, ...]) -> None:
    """A convolution over n dimensions that takes its options in this order."""

    @jet_rule(function)
    def rule(
        input: Tensor, weight: Tensor, bias: Tensor | None = None, *options: Any, **named: Any
    ) -> Tensor:
        if input.ndim == n + 1:
            return rule(input.unsqueeze(0), weight, bias, *options, **named).squeeze(0)
        given = {**_OPTIONS, **dict(zip(order, options, strict=False)), **named}
        groups, padding = given.pop("groups"), given["padding"]
        if isinstance(padding, str):
            given["padding"] = 0
        lists = {k: [v] * n if isinstance(v, int) else list(v) for k, v in given.items()}
        if padding == "same":
            total = [d * (k - 1) for d, k in zip(lists["dilation"], weight.shape[2:], strict=True)]
            ends = [side for t in reversed(total) for side in (t // 2, t - t // 2)]
            input = F.pad(input, ends)
        stride, padding, dilation, output_padding = lists.values()
        transposed = order is _ORDER_TRANSPOSED
        operation = _Convolution(stride, padding, dilation, transposed, output_padding, groups)
        product = contract(operation, input, weight)
        return product if bias is None else product + bias.reshape(-1, *[1] * n)


for _n in (1, 2, 3):
    _convolution(_n, getattr(torch, f"conv{_n}d"), _ORDER)
    _convolution(_n, getattr(torch, f"conv_transpose{_n}d"), _ORDER_TRANSPOSED)
