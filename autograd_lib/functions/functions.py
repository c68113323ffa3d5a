"""Functions with their own backward: a model Function, modified gradients, finite derivatives.

Each supports `vmap`, forward mode where it has a meaning, higher derivatives in every combination
of modes, and `torch.compile` without a graph break. What PyTorch 2.13 needs for that is in
`forward_mode`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled
from torch.autograd.function import Function

from autograd_lib.functions.forward_mode import applier, check_floating, primals


class CustomAutogradFunction(Function):
    r"""The product $y = x W^\top$ of `F.linear`, as the model of a complete Function.

    With $g$ the gradient of $y$: $\partial x = g W$, $\partial W = g^\top x$ summed over the
    leading dimensions, and forward mode $\dot y = \dot x W^\top + x \dot W^\top$. Called as
    `CustomAutogradFunction.apply(input, weight)` for `input` of shape `(*, in)` and `weight` of
    shape `(out, in)`, it returns `(*, out)`. It saves `input` only where `weight` requires a
    gradient, and `weight` only where `input` does. Derivatives of any order are right, in reverse
    and in forward mode, nested too.

    Example:
        >>> input = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> CustomAutogradFunction.apply(input, torch.tensor([[3.0, 4.0]])).backward()
        >>> input.grad
        tensor([[3., 4.]])
    """

    @staticmethod
    def forward(input: Tensor, weight: Tensor) -> Tensor:
        """Compute the output; no graph is recorded here."""
        return input @ weight.T

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        """Save what the derivatives need: tensors through `ctx.save_for_...`, never on `ctx`."""
        input, weight = inputs
        input_needs, weight_needs = ctx.needs_input_grad
        ctx.save_for_backward(input if weight_needs else None, weight if input_needs else None)
        ctx.save_for_forward(input, weight)  # kept only while a jvp is computed

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Return one gradient for each input, by operations that are differentiable in turn."""
        input, weight = ctx.saved_tensors  # under autocast, wider than `grad`
        rows = grad.shape[:-1].numel()  # not -1, which is ambiguous where a dimension is 0
        grad_input = grad_weight = None
        if weight is not None:
            grad_input = grad @ weight.to(grad.dtype)
        if input is not None:
            flat = input.to(grad.dtype).reshape(rows, input.shape[-1])
            grad_weight = grad.reshape(rows, grad.shape[-1]).mT @ flat
        return grad_input, grad_weight

    @staticmethod
    def jvp(ctx: Any, input_tangent: Tensor | None, weight_tangent: Tensor | None) -> Tensor:
        """Return the tangent of the output; a tangent is None where an input has none."""
        with _set_fwd_grad_enabled(True):
            input, weight = primals(ctx)
            from_input = 0 if input_tangent is None else input_tangent @ weight.T
            from_weight = 0 if weight_tangent is None else input @ weight_tangent.T
            return cast(Tensor, from_input + from_weight)

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, Any], input: Tensor, weight: Tensor) -> Any:
        """Return the output of a batch and where its batch dimension is.

        `generate_vmap_rule = True` would do where both kinds of save keep the same tensors.
        """
        return torch.vmap(CustomAutogradFunction.forward, in_dims)(input, weight), 0


# ------------------------------------------------------------------ modified gradients


class _StraightThrough(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
        with torch.no_grad():  # torch.func switches the recording of graphs back on
            output = f(x)
        if output.shape != x.shape or not output.is_floating_point():
            raise ValueError(
                f"straight_through: expected f to return a floating-point tensor of the shape "
                f"{tuple(x.shape)} of x, got {output.dtype}, {tuple(output.shape)}; convert it "
                "inside f, as in (x > 0).to(x.dtype)"
            )
        return output

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        with _set_fwd_grad_enabled(True):
            return tangent.clone()  # otherwise two tensors would share one tangent


_straight_through = applier(_StraightThrough)


def straight_through(x: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    r"""Return $f(x)$, with the gradient of the identity.

    The straight-through estimator (Bengio, Léonard & Courville 2013, arXiv:1308.3432) for
    rounding, signs and thresholds, whose own derivative is zero. Forward mode passes tangents on,
    too. `x + (f(x) - x).detach()` means the same, but loses digits where `x` is large beside
    `f(x)`, is NaN where `x` is infinite, and costs two more tensors.

    Args:
        x: a floating-point tensor of any shape.
        f: a function of one tensor. It runs without a graph: tensors that it closes over get no
            gradient.

    Returns:
        `f(x)`. Nothing is saved for backward.

    Raises:
        TypeError: if `x` is not floating point.
        ValueError: if `f(x)` is not floating point or has another shape than `x`.

    Example:
        >>> x = torch.tensor([0.2, 1.7], requires_grad=True)
        >>> y = straight_through(x, torch.round)
        >>> y.sum().backward()
        >>> y.tolist(), x.grad.tolist()
        ([0.0, 2.0], [1.0, 1.0])
    """
    check_floating("straight_through", x)
    return _straight_through(x, f)


class _BentGradient(Function):
    """The identity, with a function of its gradient in place of the gradient."""

    # Without a jvp: a tangent is not a gradient. Also, the output is a view, so a jvp would have to
    # return a view of the tangent, and a multiple of it is none.
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bend: Callable[[Tensor], Tensor]) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.bend = inputs[1]  # a function may be kept on ctx, a tensor may not

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.bend(grad), None


_bent_gradient = applier(_BentGradient)


def scale_gradient(x: Tensor, scale: float) -> Tensor:
    r"""Return `x`, with its gradient multiplied by `scale`.

    `x * s + (x * (1 - s)).detach()` means the same, but rounds `x` and costs four tensors;
    `x.register_hook` cannot follow `torch.func` and `vmap`.

    Args:
        x: a floating-point tensor of any shape.
        scale: any number; 0 stops the gradient, negative numbers reverse it.

    Returns:
        A view of `x`, which must not be modified in place. Nothing is saved for backward.

    Raises:
        TypeError: if `x` is not floating point.
        NotImplementedError: in forward mode, by PyTorch: a tangent is not a gradient.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> scale_gradient(x, 0.5).square().sum().backward()
        >>> x.grad
        tensor([1., 2.])
    """
    check_floating("scale_gradient", x)
    return _bent_gradient(x, lambda grad: grad * scale)


def reverse_gradient(x: Tensor, scale: float = 1.0) -> Tensor:
    r"""Return `x`, with its gradient reversed: multiplied by `-scale`.

    The gradient reversal layer of domain-adversarial training (Ganin & Lempitsky 2015,
    arXiv:1409.7495): what follows learns to tell the domains apart, what precedes learns to
    prevent it.

    Args:
        x: a floating-point tensor of any shape.
        scale: the strength of the reversal.

    Returns:
        A view of `x`, which must not be modified in place. Nothing is saved for backward.

    Raises:
        TypeError: if `x` is not floating point.
        NotImplementedError: in forward mode, by PyTorch: a tangent is not a gradient.

    Example:
        >>> x = torch.tensor([1.0, 2.0], requires_grad=True)
        >>> reverse_gradient(x).sum().backward()
        >>> x.grad
        tensor([-1., -1.])
    """
    check_floating("reverse_gradient", x)
    return _bent_gradient(x, lambda grad: grad * -scale)


def clip_gradient(
    x: Tensor, *, max_norm: float | None = None, max_value: float | None = None
) -> Tensor:
    r"""Return `x`, with its gradient clipped.

    First every element is clipped to $[-v, v]$, then the whole to a norm of $m$:
    $g \min(1, m / \|g\|_2)$. Under `vmap` the norm is that of each sample. Clipping hides no
    fault: where an element is NaN, `max_norm` makes all of them NaN; where one is infinite, it
    becomes NaN and the others 0. `max_value` makes an infinite element finite.

    Args:
        x: a floating-point tensor of any shape.
        max_norm: the largest L2 norm of the gradient, positive.
        max_value: the largest modulus of its elements, positive.

    Returns:
        A view of `x`, which must not be modified in place. Nothing is saved for backward.

    Raises:
        TypeError: if `x` is not floating point.
        ValueError: if neither bound is given, or one is not positive.
        NotImplementedError: in forward mode, by PyTorch: a tangent is not a gradient.

    Example:
        >>> x = torch.tensor([1.0, 1.0], requires_grad=True)
        >>> (clip_gradient(x, max_norm=1.0) * torch.tensor([3.0, 4.0])).sum().backward()
        >>> x.grad
        tensor([0.6000, 0.8000])
    """
    check_floating("clip_gradient", x)
    bounds = [bound for bound in (max_norm, max_value) if bound is not None]
    if not bounds or not all(bound > 0 for bound in bounds):
        raise ValueError(
            "clip_gradient: expected a positive max_norm, max_value or both, got "
            f"max_norm={max_norm}, max_value={max_value}; scale_gradient(x, 0) stops a gradient"
        )

    def clip(grad: Tensor) -> Tensor:
        # In half precision neither the norm nor a bound need be finite.
        wide = grad.to(torch.promote_types(grad.dtype, torch.float32))
        if max_value is not None:
            wide = wide.clamp(-max_value, max_value)
        if max_norm is not None:
            wide = wide * (max_norm / safe_norm(wide).clamp(min=max_norm))
        return wide.to(grad.dtype)

    return _bent_gradient(x, clip)


# ------------------------------------------------------------------ derivatives that stay finite


class _Log1mExp(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        near, far = torch.log(-torch.expm1(wide)), torch.log1p(-torch.exp(wide))
        return torch.where(wide > -math.log(2), near, far).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.save_for_forward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * _log1mexp_slope(x)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        with _set_fwd_grad_enabled(True):
            return tangent * _log1mexp_slope(primals(ctx)[0])


_log1mexp = applier(_Log1mExp)


def _log1mexp_slope(x: Tensor) -> Tensor:
    # 1 / -expm1(-x) is shorter, but its derivative is 0 * inf where exp(-x) overflows. With
    # `0 -`, and not a minus sign, the denominator at 0 is 0.0, and the slope -inf, not +inf.
    return -torch.exp(x) / (0 - torch.expm1(x))


def log1mexp(x: Tensor) -> Tensor:
    r"""Return $\log(1 - e^x)$ for $x \le 0$, to full precision.

    $\log(-\mathrm{expm1}(x))$ for $x > -\log 2$, $\mathrm{log1p}(-e^x)$ below (Mächler 2012,
    "Accurately computing `log(1 - exp(-abs(a)))`", whose argument is $a = -x$). The derivative is
    $-e^x / (1 - e^x)$. Autograd's gradient of that `torch.where` is NaN near 0, where the other
    branch gives 0 · inf; two more `where` around the arguments avoid it, but save six tensors.

    Args:
        x: log-probabilities, at most 0, floating point, of any shape.

    Returns:
        A tensor like `x`: -inf at 0, where the slope is -inf, and NaN above 0. Saved for
        backward: `x`.

    Raises:
        TypeError: if `x` is not floating point.

    Example:
        >>> x = torch.tensor([0.25]).log().requires_grad_()
        >>> y = log1mexp(x)
        >>> y.sum().backward()
        >>> y.exp().item(), x.grad.item()  # 1 - p and -p / (1 - p)
        (0.75, -0.3333...)
    """
    check_floating("log1mexp", x)
    return _log1mexp(x)


class _SafeNorm(Function):
    """The norm over the last dimension, which is kept."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        if x.shape[-1] == 0:
            return x.sum(-1, keepdim=True)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        # Divided by its largest modulus, no square over- or underflows.
        scale = wide.abs().amax(-1, keepdim=True)
        scale = torch.where((scale > 0) & scale.isfinite(), scale, 1)
        return (torch.linalg.vector_norm(wide / scale, dim=-1, keepdim=True) * scale).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0], output)
        ctx.save_for_forward(inputs[0], output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * _direction(*ctx.saved_tensors)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        with _set_fwd_grad_enabled(True):
            return (tangent * _direction(*primals(ctx))).sum(-1, keepdim=True)


_safe_norm = applier(_SafeNorm)


def _direction(x: Tensor, norm: Tensor) -> Tensor:
    # Both the quotient and its argument: the derivative of a single where would contain 0 / 0.
    zero = norm == 0
    return torch.where(zero, 0, x / torch.where(zero, 1, norm))


def safe_norm(x: Tensor, dim: int | Sequence[int] | None = None, keepdim: bool = False) -> Tensor:
    r"""Return the L2 norm, with derivatives of every order 0 where it is 0.

    $\|x\|_2$, with gradient $x / \|x\|$ and 0 at 0. Autograd's gradient of
    `x.square().sum().sqrt()` is NaN there; that of `torch.linalg.vector_norm` is 0, but its
    second derivative is NaN, and its value overflows where squares do. This does neither.

    Args:
        x: a floating-point tensor of any shape.
        dim: the dimension or dimensions to reduce; all of them if None.
        keepdim: whether to keep those dimensions, of size 1.

    Returns:
        The norm, in the dtype of `x`. Saved for backward: `x` and the norm.

    Raises:
        TypeError: if `x` is not floating point.

    Example:
        >>> x = torch.tensor([[0.0, 0.0], [3.0, 4.0]], requires_grad=True)
        >>> safe_norm(x, dim=1).sum().backward()
        >>> x.grad
        tensor([[0.0000, 0.0000],
                [0.6000, 0.8000]])
    """
    check_floating("safe_norm", x)
    dims = range(x.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    reduced = sorted(d % max(x.ndim, 1) for d in dims)
    kept = [d for d in range(x.ndim) if d not in reduced]
    # Under vmap with forward mode, PyTorch 2.13 cannot take a tuple among a Function's arguments.
    sizes = [x.shape[d] for d in kept]
    rows = x.permute([*kept, *reduced]).reshape([*sizes, math.prod([x.shape[d] for d in reduced])])
    norm = _safe_norm(rows).squeeze(-1)
    return (
        norm.reshape([1 if d in reduced else n for d, n in enumerate(x.shape)]) if keepdim else norm
    )


class _SafeSqrt(Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sqrt()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (root,) = ctx.saved_tensors
        return grad * _sqrt_slope(root)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        with _set_fwd_grad_enabled(True):
            return tangent * _sqrt_slope(primals(ctx)[0])


_safe_sqrt = applier(_SafeSqrt)


def _sqrt_slope(root: Tensor) -> Tensor:
    zero = root == 0
    return torch.where(zero, 0, 0.5 / torch.where(zero, 1, root))


def safe_sqrt(x: Tensor) -> Tensor:
    r"""Return $\sqrt x$, with derivatives of every order 0 at 0.

    The gradient of `x.sqrt()` at 0 is inf, and inf · 0 is NaN one step further back; a
    `torch.where` around it does not help, as it multiplies that inf by 0 too. Below 0 value and
    gradient are NaN, as for `x.sqrt()`.

    Args:
        x: a floating-point tensor of any shape.

    Returns:
        A tensor like `x`. Saved for backward: itself.

    Raises:
        TypeError: if `x` is not floating point.

    Example:
        >>> x = torch.tensor([0.0, 4.0], requires_grad=True)
        >>> safe_sqrt(x).sum().backward()
        >>> x.grad
        tensor([0.0000, 0.2500])
    """
    check_floating("safe_sqrt", x)
    return _safe_sqrt(x)
