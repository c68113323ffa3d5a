"""A loss that learns how to weigh a squared and an absolute error, by maximum likelihood.

The normalizer of the density that the weighted sum stands for is what keeps the weights from
running away.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import FunctionCtx

from autograd_lib.functions.forward_mode import applier, primals

__all__ = ["CustomLossFunction"]

_BOUND = 30.0  # of a log-weight: e^±30 is about 1e±13
_FAR = 10.0  # from here on _SERIES has all digits of float64
_SERIES = [math.prod(range(1, 2 * n, 2)) / (-2.0) ** n for n in range(14)]  # (2n-1)!! / (-2)^n


class CustomLossFunction(nn.Module):
    r"""Weigh the mean squared and the mean absolute error, with weights learned by likelihood.

    $$\alpha \cdot \mathrm{MSE} + \beta \cdot \mathrm{L1} + \log Z(\alpha, \beta) - \log Z(\alpha_0,
    \beta_0), \qquad \log Z = \tfrac12 \log\tfrac{\pi}{\alpha} +
    \log \mathrm{erfcx}\tfrac{\beta}{2 \sqrt\alpha}$$

    This is the mean negative log-likelihood of residuals r with density proportional to
    $\exp(-\alpha r^2 - \beta |r|)$, shifted by a constant so that it starts at exactly
    $\alpha_0 \mathrm{MSE} + \beta_0 \mathrm{L1}$. Minimizing it over the weights is maximum
    likelihood: it recovers the weights of such a density, from any start, and where residuals are
    s times as large it finds $\alpha / s^2$ and $\beta / s$. Being a log-density it may be
    negative.

    Each log-weight is bounded to [-30, 30], so that the weights stay positive and finite where
    residuals go to zero. At a bound only the part of the gradient that points outward is cut: a
    weight can always come back.

    The learned parameter is `log_ratio`, the logarithms of the weights over their start, so weight
    decay pulls them to their start. The buffer `start` keeps float64 through `.half()` and the
    like, and travels with the `state_dict`.

    Args:
        alpha: Weight of the squared error at the start, in [e^-30, e^30]; any finite number not
            below 0 with `learnable=False`.
        beta: The same for the absolute error.
        learnable: False for the plain weighted sum, without parameters and normalizer.

    Raises:
        ValueError: A weight is out of its range.

    Example:
        >>> loss_fn = CustomLossFunction(alpha=2.0, beta=0.5)
        >>> loss_fn(torch.tensor([3.0, 0.0]), torch.zeros(2)).item()  # 2 * 9/2 + 0.5 * 3/2
        9.75
        >>> loss_fn
        CustomLossFunction(alpha=2, beta=0.5, learnable=True)
    """

    start: Tensor

    def __init__(self, alpha: float = 1.0, beta: float = 0.1, learnable: bool = True) -> None:
        super().__init__()
        least, most = (math.exp(-_BOUND), math.exp(_BOUND)) if learnable else (0.0, math.inf)
        for name, value in (("alpha", alpha), ("beta", beta)):
            if not (least <= value <= most and math.isfinite(value)):
                raise ValueError(
                    f"CustomLossFunction: expected {name} to be a finite number in "
                    f"[{least:.3g}, {most:.3g}] with learnable={learnable}, got {value}; "
                    "rescale the residuals, or drop the term with learnable=False and weight 0"
                )
        self.learnable = learnable
        start = torch.tensor([alpha, beta], dtype=torch.float64, device="cpu")
        self.register_buffer("start", _widest(start, torch.get_default_device()))
        if learnable:
            self.log_ratio = nn.Parameter(torch.zeros(2))

    @property
    def alpha(self) -> Tensor:
        """The effective weight of the squared error now: no dimensions, detached."""
        return self._weights()[0].detach()[0]

    @property
    def beta(self) -> Tensor:
        """The effective weight of the absolute error now: no dimensions, detached."""
        return self._weights()[0].detach()[1]

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        """Compute the loss.

        Args:
            input: Predictions of any shape, real.
            target: What they should be: the same shape, real.

        Returns:
            The loss, without dimensions, in the wider dtype of the two and at least float32.

        Raises:
            TypeError: A tensor is complex, or neither is of floating point.
            ValueError: The shapes differ.
        """
        dtype = torch.promote_types(input.dtype, target.dtype)
        if not dtype.is_floating_point:
            raise TypeError(
                "CustomLossFunction: expected real floating-point tensors, got input of "
                f"{input.dtype} and target of {target.dtype}; pass the real and the imaginary part "
                "of complex ones by torch.view_as_real, call .float() on integers"
            )
        if input.shape != target.shape:
            raise ValueError(
                "CustomLossFunction: expected input and target of one shape, got "
                f"{tuple(input.shape)} and {tuple(target.shape)}; nothing is broadcast here, "
                "reshape or expand one of them"
            )
        dtype = torch.promote_types(dtype, torch.float32)  # the square of 300 overflows fp16
        input, target = input.to(dtype), target.to(dtype)
        weights, shift = self._weights()
        alpha, beta = weights.to(dtype).unbind()
        loss = alpha * F.mse_loss(input, target) + beta * F.l1_loss(input, target)
        return loss if shift is None else loss + shift.to(dtype)

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        """The effective weights [alpha, beta] and how far the normalizer is from its start."""
        if not self.learnable:
            return self.start, None
        origin = self.start.log()
        ratio = _bound(self.log_ratio.to(origin.dtype), -_BOUND - origin, _BOUND - origin)
        shift = _log_normalizer(origin + ratio) - _log_normalizer(origin)
        return self.start * ratio.exp(), shift

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The start must not be rounded with the parameters: the loss would start elsewhere.
        start, self.start = self.start, self.start.float()  # float64 cannot move to MPS
        super()._apply(fn, recurse)
        if not (start.is_meta or self.start.is_meta):
            self.start = _widest(start, self.start.device)
        return self

    def extra_repr(self) -> str:
        """The current weights."""
        if self.start.is_meta:
            return f"learnable={self.learnable}"
        return f"alpha={self.alpha:.4g}, beta={self.beta:.4g}, learnable={self.learnable}"


def _widest(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.to(device, torch.float32 if device.type == "mps" else torch.float64)


def _log_normalizer(log_weights: Tensor) -> Tensor:
    r"""Logarithm of $\int \exp(-\alpha r^2 - \beta |r|) dr$ for [log alpha, log beta].

    Its derivative needs that of log erfcx, $2z - 2 / (\sqrt\pi \, \mathrm{erfcx}(z))$ at
    $z = \beta / 2 \sqrt\alpha$: a difference of numbers that agree to $1 / 2z^2$ of themselves,
    so that nothing is left of it for Laplace-like data. For large z it is therefore that of the
    asymptotic series $\sqrt\pi z \, \mathrm{erfcx}(z) \sim \sum_n (2n-1)!! / (-2z^2)^n$
    (Abramowitz & Stegun 7.1.23): there alpha appears in powers of $1 / z^2$ alone and nothing
    cancels.
    """
    a, b = log_weights.unbind()
    z = (b - a / 2).exp() / 2
    # Each branch is kept from the arguments of the other, whose derivatives would be inf times 0.
    near, u = z.clamp(max=_FAR), z.clamp(min=_FAR) ** -2
    series = torch.zeros_like(u)
    for coefficient in reversed(_SERIES):
        series = series * u + coefficient
    exact = (math.log(math.pi) - a) / 2 + torch.special.erfcx(near).log()
    return torch.where(z < _FAR, exact, math.log(2) - b + series.log())


class _Bound(Function):
    """Clamp, but at a bound let a gradient pass whose descent leads back inside."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return x.clamp(low, high)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, low, high = ctx.saved_tensors
        outward = ((x >= high) & (grad < 0)) | ((x <= low) & (grad > 0))
        return grad.masked_fill(outward, 0), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        with _set_fwd_grad_enabled(True):
            x, low, high = primals(ctx)
            return tangent.masked_fill((x > high) | (x < low), 0)


_bound = applier(_Bound)
