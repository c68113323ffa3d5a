"""The loss of a language model's head, row by row: the logits are never held.

The logits are by far the largest tensor of a training step, and exist only to be reduced to one
number. `linear_cross_entropy` has a few rows of them at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.autograd import Function
from torch.autograd.forward_ad import unpack_dual
from torch.func import vjp

__all__ = ["linear_cross_entropy"]

_Requirement = tuple[bool, type[Exception], str, object]  # holds, error if not, expected, got


def linear_cross_entropy(  # noqa: PLR0913 - those of F.cross_entropy
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    *,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
    softcap: float | None = None,
    z_loss: float = 0.0,
    shift: int = 0,
    return_token_accuracy: bool = False,
    chunk_size: int = 256,
) -> Any:
    """Compute `F.cross_entropy(F.linear(input, weight, bias), target, ...)` without the logits.

    The rows are worked through in chunks: logits, softmax, and from them at once the gradients,
    which are all that is kept. Peak memory is the gradients and one chunk of logits (two with
    `softcap`), where the pair of calls holds several copies of all logits; time is that of three
    matrix products. The gradients are computed in the forward and scaled in the backward; where a
    chunk's own gradient is not yet known, as with `reduction="none"`, backward computes the logits
    a second time. Without gradients to compute (`torch.no_grad()`) there is only the first product.

    Half-precision operands are multiplied as they are, softmax, loss and the sums over chunks are
    in float32, and gradients are cast after the upstream gradient has scaled them, so that those
    of fp16 do not vanish before a `GradScaler` sees them. The loss is then float32 too. Autocast
    applies as to `F.linear`.

    Derivatives of any order by reverse mode are right, second ones in chunks too. Forward mode on
    the arguments (`torch.func.jvp`, `jacfwd`) and `jet` are right, but if a backward follows them,
    hold the logits; forward over reverse (`torch.func.hessian`) raises. `vmap` runs a loop.
    `torch.compile` breaks the graph here. `target` is checked, which costs one synchronization
    of a GPU.

    Args:
        input: Shape (..., in), floating point.
        weight: Shape (classes, in), the dtype of `input` (any under autocast).
        target: Class indices of shape (...), int64, each in [0, classes) or `ignore_index`.
        bias: Shape (classes,).
        class_weight: A constant factor for each class, shape (classes,), as in `F.cross_entropy`.
        ignore_index: A target that adds neither loss nor gradient.
        reduction: "mean" over the targets that are not ignored, weighted by `class_weight`; NaN
            if there is none. "sum", or "none" for the loss of each row.
        label_smoothing: Share of a target spread evenly over all classes, in [0, 1].
        softcap: Replace each logit z by `softcap * tanh(z / softcap)`, as Gemma 2 does.
        z_loss: Add to each row's loss `z_loss` times the square of the logarithm of the sum of the
            exponentials of its logits (PaLM, section 5). A mean of it is over the targets that are
            not ignored, without `class_weight`.
        shift: Predict the target that stands so many places further on in the last dimension of
            `target`: the loss of `input[..., :-shift, :]` and `target[..., shift:]`, without a copy
            of `input`.
        return_token_accuracy: Return the share of right predictions too.
        chunk_size: Rows of logits that exist at once. On a CPU fewer make slower matrix products
            (16, the default of `F.linear_cross_entropy`, takes three times as long); more take
            memory and no less time.

    Returns:
        The loss, of shape (...) with `reduction="none"` (the last dimension shorter by `shift`) and
        else without dimensions. With `return_token_accuracy` a pair: the loss, and in float32,
        without a gradient, the share of targets not ignored that have the largest logit; with
        `reduction="none"` 1 or 0 for each target.

    Raises:
        TypeError: What is no tensor, or a dtype that does not fit.
        ValueError: A shape, a device or an option does not fit.
        IndexError: A target is out of range.
        NotImplementedError: Forward over reverse mode, see above.

    Example:
        >>> input, weight = torch.zeros(5, 3), torch.zeros(8, 3)  # all classes equally likely
        >>> round(linear_cross_entropy(input, weight, torch.arange(5)).exp().item(), 4)
        8.0
        >>> loss, accuracy = linear_cross_entropy(
        ...     torch.eye(3), 9 * torch.eye(3), torch.tensor([0, 1, 1]), return_token_accuracy=True
        ... )
        >>> round(accuracy.item(), 4)
        0.6667
    """
    operands = (input, weight) if bias is None else (input, weight, bias)
    numbers = (softcap, z_loss, shift)
    for holds, error, expected, got in _requirements(operands, target, class_weight, numbers):
        if not holds:
            raise error(f"linear_cross_entropy: expected {expected}, got {got}")
    if reduction not in ("mean", "sum", "none") or not 0 <= label_smoothing <= 1 or chunk_size < 1:
        raise ValueError(
            "linear_cross_entropy: expected reduction 'mean', 'sum' or 'none', label_smoothing in "
            f"[0, 1] and chunk_size >= 1, got {reduction!r}, {label_smoothing} and {chunk_size}"
        )
    if shift:
        ahead = target[..., shift:]
        target = F.pad(ahead, (0, target.shape[-1] - ahead.shape[-1]), value=ignore_index)
    wanted = tuple(
        p is not None and torch.is_grad_enabled() and p.requires_grad for p in (input, weight, bias)
    )
    options = _Options(
        ignore_index,
        reduction,
        label_smoothing,
        softcap or 0.0,
        z_loss,
        return_token_accuracy,
        chunk_size,
        torch.get_autocast_dtype(input.device.type) if _is_autocast(operands) else input.dtype,
        wanted,
    )
    forward_mode = any(unpack_dual(p).tangent is not None for p in operands)
    results: tuple[Tensor | None, ...] = (_composed if forward_mode else _chunked)(
        input.reshape(-1, input.shape[-1]), weight, bias, target.reshape(-1), class_weight, options
    )
    if reduction == "none":
        places = (..., slice(ahead.shape[-1])) if shift else ...
        results = tuple(r if r is None else r.reshape(target.shape)[places] for r in results)
    return results if return_token_accuracy else results[0]


def _requirements(
    operands: tuple[Tensor, ...],
    target: Tensor,
    class_weight: Tensor | None,
    numbers: tuple[object, object, object],
) -> Iterator[_Requirement]:
    """What tensors must be, the shapes of matrices before those of vectors."""
    input, weight, *vectors = operands if class_weight is None else (*operands, class_weight)
    given = (input, weight, target, *vectors)
    kinds = [type(p).__name__ for p in given]
    tensors = all(isinstance(p, Tensor) for p in given)
    yield tensors, TypeError, "tensors (of an nn.Linear its weight and bias)", kinds
    floats = [p.dtype for p in (input, weight, *vectors)]
    real = all(dtype.is_floating_point for dtype in floats)
    yield real, TypeError, "real floating-point tensors", floats
    same = len({p.dtype for p in operands}) == 1 or _is_autocast(operands)
    yield same, TypeError, "one dtype, or torch.autocast", floats
    indices = "class indices of torch.int64 (F.cross_entropy takes probabilities)"
    yield target.dtype == torch.int64, TypeError, indices, f"target of {target.dtype}"
    shapes = [(*p.shape,) for p in given]
    fit = weight.dim() == 2 and input.shape == (*target.shape, weight.shape[1])
    fit = fit and all(v.shape == weight.shape[:1] for v in vectors)
    layout = "input (..., in), weight (classes, in), target (...), bias and class_weight (classes,)"
    yield fit, ValueError, layout, shapes
    constant = class_weight is None or not class_weight.requires_grad
    yield constant, ValueError, "a class_weight without gradient", "one with; pass .detach()"
    softcap, z_loss, shift = numbers
    number = softcap is None or (isinstance(softcap, int | float) and 0 < softcap < math.inf)
    yield number, ValueError, "softcap to be None or a number above 0", repr(softcap)
    number = isinstance(z_loss, int | float) and 0 <= z_loss < math.inf
    yield number, ValueError, "z_loss to be a number of 0 or more", repr(z_loss)
    places = isinstance(shift, int) and shift >= 0 and (target.dim() > 0 or not shift)
    expected = "shift to be an integer of 0 or more, and a dimension of target to shift along"
    yield places, ValueError, expected, f"{shift!r} and a target of {target.dim()} dimensions"


def _is_autocast(operands: tuple[Tensor, ...]) -> bool:
    enabled = torch.is_autocast_enabled(operands[0].device.type)
    return enabled and all(p.dtype != torch.float64 for p in operands)


@dataclass(frozen=True)
class _Options:
    ignore_index: int
    reduction: str
    label_smoothing: float
    softcap: float  # 0 for none
    z_loss: float
    accuracy: bool  # whether it is asked for
    chunk_size: int
    dtype: torch.dtype  # of the matrix products
    wanted: tuple[bool, ...]  # which of input, weight and bias require a gradient


@dataclass(frozen=True)
class _Task:
    """What the losses depend on besides input, weight and bias."""

    target: Tensor
    class_weight: Tensor | None
    options: _Options

    @property
    def wide(self) -> torch.dtype:
        return torch.promote_types(self.options.dtype, torch.float32)

    def chunks(self) -> Iterator[slice]:
        rows, size = len(self.target), self.options.chunk_size
        return (slice(i, min(i + size, rows)) for i in range(0, max(rows, 1), size))

    def logits(self, *operands: Tensor) -> Tensor:
        logits = F.linear(*(p.to(self.options.dtype).to(self.wide) for p in operands))
        cap = self.options.softcap
        return cap * (logits / cap).tanh() if cap else logits

    def losses(self, rows: slice, logits: Tensor) -> Tensor:
        """Of some rows, by PyTorch's own operations, which know every derivative."""
        target = self.target[rows]
        losses = F.cross_entropy(
            logits,
            target,
            None if self.class_weight is None else self.class_weight.to(self.wide),
            ignore_index=self.options.ignore_index,
            reduction="none",
            label_smoothing=self.options.label_smoothing,
        )
        if not self.options.z_loss:
            return losses
        squares = logits.logsumexp(1).square() * self.z_factor()
        return losses + squares.masked_fill(target == self.options.ignore_index, 0)

    def losses_vjp(self, rows: slice, upstream: Tensor, *operands: Tensor) -> tuple[Tensor, ...]:
        losses = lambda *operands: self.losses(rows, self.logits(*operands))  # noqa: E731
        with torch.autocast(upstream.device.type, enabled=False):
            return vjp(losses, *operands)[1](upstream)

    def z_factor(self) -> Tensor | float:
        """Of the squares, whose mean is not weighted by class as the divisor is."""
        if self.class_weight is None or self.options.reduction != "mean":
            return self.options.z_loss
        kept = (self.target != self.options.ignore_index).sum()
        return self.options.z_loss * self.divisor() / kept.clamp(min=1)

    def accuracy(self, best: Tensor) -> Tensor:
        kept = self.target != self.options.ignore_index
        right = ((best == self.target) & kept).float()
        return right if self.options.reduction == "none" else right.sum() / kept.sum()

    def divisor(self) -> Tensor:
        kept = self.target != self.options.ignore_index
        if self.options.reduction != "mean":
            return kept.new_ones((), dtype=self.wide)
        if self.class_weight is None:
            return kept.sum(dtype=self.wide)
        return (self.class_weight[self.target.where(kept, 0)].to(self.wide) * kept).sum()

    def reduce(self, losses: Tensor) -> Tensor:
        return losses if self.options.reduction == "none" else losses.sum() / self.divisor()

    def upstream(self, grad: Tensor) -> Tensor:
        """The gradient of each row's loss, shape (rows,): zero, not NaN, where it is ignored."""
        rows = (grad / self.divisor()).expand(self.target.shape)
        return rows.masked_fill(self.target == self.options.ignore_index, 0)

    def check_range(self, classes: int) -> None:
        # On a GPU an index out of range would be a memory access out of bounds.
        t, ignored = self.target, self.options.ignore_index
        outside = t[((t < 0) | (t >= classes)) & (t != ignored)]
        if len(outside):
            raise IndexError(
                f"linear_cross_entropy: expected targets in [0, {classes}) or "
                f"ignore_index={ignored}, got {outside[0].item()}"
            )


def _work_through(
    task: _Task, upstream: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor, list[Tensor | None]]:
    r"""Losses and best classes of all rows, the wanted gradients of a sum weighted by `upstream`.

    With a share s of smoothing and class weights w, a row with target t loses
    $-(1 - s) w_t \log p_t - \frac{s}{C} \sum_c w_c \log p_c + \zeta l^2$, where l is the logarithm
    of the sum of the exponentials of its logits. Its derivative by the logits is
    $(m + 2 \zeta l) p - (1 - s) w_t e_t - \frac{s}{C} w$, where m is the sum of the factors of the
    logarithms, times the derivative of the cap. The sums over chunks are in float32 or wider.
    """
    options, wide, classes = task.options, task.wide, len(weight)
    x, weight = x.to(options.dtype), weight.to(options.dtype)
    shares = x.new_ones(classes) if task.class_weight is None else task.class_weight
    ignored = task.target == options.ignore_index
    index = task.target.masked_fill(ignored, 0)[:, None]
    hard = (1 - options.label_smoothing) * shares.to(wide)[index]
    soft = options.label_smoothing / classes * shares.to(wide) if options.label_smoothing else None
    # The factors 1 / rows of a mean would push fp16 products below its smallest number: half
    # precision is multiplied by factors of order 1, and scaled in float32 at the end.
    unit = None
    if options.dtype != wide and len(x):
        largest = upstream.abs().amax()
        unit = largest.where(largest > 0, 1.0)
        upstream = upstream / unit
    losses, best = x.new_empty(len(x), dtype=wide), index.new_empty(len(x))
    shapes = (x.shape, weight.shape, weight.shape[:1])
    grads = [
        upstream.new_zeros(shape) if want else None  # under vmap, upstream is what has a batch
        for shape, want in zip(shapes, options.wanted, strict=True)
    ]
    buffer = x.new_empty(min(len(x), options.chunk_size), classes, dtype=wide)
    product = buffer if options.dtype == wide else torch.empty_like(buffer, dtype=options.dtype)
    z_factor = task.z_factor()
    plain = task.class_weight is None and soft is None and not options.z_loss
    for rows in task.chunks():
        logits, p = (full[: rows.stop - rows.start] for full in (product, buffer))
        if bias is None:
            torch.mm(x[rows], weight.T, out=logits)
        else:
            torch.addmm(bias.to(options.dtype), x[rows], weight.T, out=logits)
        seen, slope = _cap(logits, p, options.softcap) if options.softcap else (logits, None)
        if options.z_loss or options.accuracy:
            top, best[rows] = seen.max(1)
        # In place where both are one buffer: a row is read to its end before it is written.
        torch.log_softmax(seen, 1, dtype=wide, out=p)
        losses[rows] = -(p.gather(1, index[rows]) * hard[rows])[:, 0]
        factors = hard[rows]
        if soft is not None:
            losses[rows] -= p @ soft
            factors = factors + soft.sum()
        if options.z_loss:
            level = top.to(wide) - p.amax(1)
            losses[rows] += z_factor * level.square()
            factors = factors + 2 * z_factor * level[:, None]
        if any(options.wanted):
            _derive(p, None if plain else factors, hard[rows], soft, index[rows])
            if slope is not None:
                p *= slope
            _accumulate(grads, (x, weight, upstream), rows, p, logits.copy_(p))
    if unit is not None:
        grads = [None if g is None else g.mul_(unit) for g in grads]
    return losses.masked_fill_(ignored, 0), best, grads


def _cap(logits: Tensor, out: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """Write the capped logits to `out`, which may be `logits`; and the derivative of the cap."""
    bent = logits.to(out.dtype, copy=True).div_(cap).tanh_()
    return torch.mul(bent, cap, out=out), bent.square_().neg_().add_(1)


def _derive(
    p: Tensor, factors: Tensor | None, hard: Tensor, soft: Tensor | None, index: Tensor
) -> None:
    """Replace logarithms of probabilities by the derivatives of the losses by the logits."""
    p.exp_()
    if factors is not None:
        p *= factors
    if soft is not None:
        p -= soft
    p.scatter_add_(1, index, -hard)


def _accumulate(
    grads: list[Tensor | None],
    operands: tuple[Tensor, ...],
    rows: slice,
    p: Tensor,
    rounded: Tensor,
) -> None:
    """Add the gradients of some rows, from the derivatives `p` by their logits."""
    (by_input, by_weight, by_bias), (x, weight, upstream) = grads, operands
    scale = upstream[rows, None]
    if by_input is not None:
        by_input[rows] = torch.mm(rounded, weight) * scale
    if by_weight is not None:
        scaled = (x[rows] * scale).to(x.dtype)
        if x.dtype == p.dtype:
            by_weight.addmm_(rounded.T, scaled)
        else:
            by_weight += torch.mm(rounded.T, scaled)
    if by_bias is not None:
        by_bias.addmv_(p.T, upstream[rows])


def _loop(function: type[Function], info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
    """A vmap rule: the one buffer of logits is used by one element of the batch after another."""
    pairs = list(zip(args, in_dims, strict=True))
    results = [
        function.apply(*(a if dim is None else a.select(dim, i) for a, dim in pairs))
        for i in range(info.batch_size)
    ]
    stacked = tuple(None if r[0] is None else torch.stack(r) for r in zip(*results, strict=True))
    return stacked, tuple(None if r is None else 0 for r in stacked)


class _WithoutForwardMode(Function):
    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise NotImplementedError(
            "linear_cross_entropy: forward mode through a gradient has no rule; use reverse over "
            "reverse (torch.func.jacrev of torch.func.grad, or torch.autograd.grad twice with "
            "create_graph=True), or F.cross_entropy(F.linear(input, weight), target)"
        )


class _LinearCrossEntropy(_WithoutForwardMode):
    """The loss, the accuracy and the gradients: only outputs can be saved under vmap."""

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        task = _Task(*rest)
        task.check_range(len(weight))
        if task.options.reduction == "none":  # the factor of a row is known in backward only
            task = replace(task, options=replace(task.options, wanted=(False,) * 3))
        with torch.autocast(x.device.type, enabled=False):
            upstream = task.upstream(x.new_ones((), dtype=task.wide))
            losses, best, grads = _work_through(task, upstream, x, weight, bias)
            return (
                task.reduce(losses),
                task.accuracy(best) if task.options.accuracy else None,
                *grads,
            )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        *tensors, ctx.options = inputs
        ctx.mark_non_differentiable(*(o for o in output[1:] if o is not None))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[2:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 6
        options = replace(ctx.options, wanted=tuple(ctx.needs_input_grad[:3]))
        x, weight, bias, target, class_weight, *grads = ctx.saved_tensors
        rest = (target, class_weight, options)
        return *_Gradients.apply(grad, x, weight, bias, *rest, *grads), None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _loop(_LinearCrossEntropy, info, in_dims, *args)


# Compiled, the chunks would be unrolled and their one buffer lost. torch.compiler.disable is the
# same, but imports the compiler at once.
@_disable_dynamo
def _chunked(*args: Any) -> tuple[Tensor, Tensor | None]:
    return _LinearCrossEntropy.apply(*args)[:2]


def _composed(
    x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor | None]:
    """The same by PyTorch's own operations, which forward mode and `jet` follow."""
    task, shared = _Task(*rest), (weight,) if bias is None else (weight, bias)
    losses, best = [], []
    for rows in task.chunks():
        with torch.autocast(x.device.type, enabled=False):
            logits = task.logits(x[rows], *shared)
            losses.append(task.losses(rows, logits))
        best += [logits.argmax(1)] if task.options.accuracy else []
    return task.reduce(torch.cat(losses)), task.accuracy(torch.cat(best)) if best else None


class _Gradients(_WithoutForwardMode):
    """The backward as a function of all that it depends on, so that it has a derivative itself.

    Scaling the saved gradients in a plain backward would make them constants: a second derivative
    would silently lack every term but one. `once_differentiable` would not say so where `grad`
    itself requires no gradient, as in `loss.backward(create_graph=True)`.
    """

    @staticmethod
    def forward(
        grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any
    ) -> tuple[Tensor | None, ...]:
        task, known = _Task(*rest[:3]), rest[3:]
        wanted = task.options.wanted
        if any(want and k is None for want, k in zip(wanted, known, strict=True)):
            with torch.autocast(x.device.type, enabled=False):
                known = tuple(_work_through(task, task.upstream(grad), x, weight, bias)[2])
                grad = grad.new_ones(())
        dtypes = (p if p is None else p.dtype for p in (x, weight, bias))
        return tuple(
            (k * grad).to(dtype) if want else None
            for want, k, dtype in zip(wanted, known, dtypes, strict=True)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        *tensors, ctx.options = inputs[:7]
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, *outer: Tensor | None) -> tuple[Tensor | None, ...]:
        grad, x, *shared, target, class_weight = ctx.saved_tensors
        task = _Task(target, class_weight, ctx.options)
        shared = [p for p in shared if p is not None]
        along = [
            torch.zeros_like(p) if o is None else o
            for p, o in zip((x, *shared), outer, strict=False)
        ]
        upstream, by_rows, sums = task.upstream(grad), [], [torch.zeros_like(p) for p in shared]
        for rows in task.chunks():
            pull = vjp(partial(task.losses_vjp, rows), upstream[rows], x[rows], *shared)[1]
            by_upstream, by_input, *by_shared = pull((along[0][rows], *along[1:]))
            by_rows.append((by_upstream, by_input))
            sums = [total + new for total, new in zip(sums, by_shared, strict=True)]
        by_upstream, by_input = (torch.cat(parts) for parts in zip(*by_rows, strict=True))
        by_grad = by_upstream * task.upstream(torch.ones_like(grad))
        by_grad = by_grad if grad.dim() else by_grad.sum()
        return by_grad, by_input, *sums, *(None,) * (8 - len(sums))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], *args: Any) -> Any:
        return _loop(_Gradients, info, in_dims, *args)
