"""Products with the Hessian, its sums, and estimates of its diagonal and its trace.

Each function takes a scalar function of one tensor or of a dict of tensors; none builds a Hessian.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from autograd_lib.higher_order.algebra import Laplace
from autograd_lib.higher_order.dispatch import Jet, following
from autograd_lib.higher_order.inputs import (
    Inputs,
    Scalar,
    check_floating,
    check_recording,
    check_scalar,
    check_tensor,
    check_uncompiled,
    dense,
    follow,
    map_tensors,
    structured_like,
    sum_dtype,
    tensors_of,
)
from autograd_lib.higher_order.taylor import jet

__all__ = [
    "Estimate",
    "biharmonic",
    "hessian_diagonal",
    "hessian_trace",
    "hvp",
    "laplacian",
    "linearize_hvp",
]


def hvp(f: Scalar, x: Inputs, v: Inputs) -> Any:
    r"""Return the product $\nabla^2 f(x)\, v$ of the Hessian with a vector.

    The gradient of $\langle \nabla f(x), v \rangle$ (Pearlmutter 1994, "Fast exact multiplication
    by the Hessian"), as a second backward through the graph of the first: of the ways that PyTorch
    offers the cheapest (`benchmarks/higher_order.py`). Inside a `torch.func` transform it is
    `torch.func.jvp` of `torch.func.grad`, which transforms further.

    Args:
        f: a scalar function of one tensor, or of one dict of tensors.
        x: where to differentiate: a floating-point tensor or a dict of them.
        v: the vector, like `x`.

    Returns:
        A tensor or a dict like `x`, detached.

    Raises:
        TypeError: if `x` or `v` is not floating point, or `f` returns no tensor.
        ValueError: if `v` is not like `x`, or `f` returns more than one number.
        RuntimeError: by PyTorch, where an operation has no second derivative.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> hvp(lambda x: x[0] ** 2 * x[1], x, torch.tensor([1.0, 0.0]))
        tensor([4., 2.])
    """
    if torch._C._are_functorch_transforms_active():
        with sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(torch.func.grad(f), (x,), (follow("hvp", x, v),))[1]
    return linearized_hvp("hvp", f, x)(v)


def linearize_hvp(f: Scalar, x: Inputs) -> Callable[[Inputs], Any]:
    r"""Return the function $v \mapsto \nabla^2 f(x)\, v$, for many vectors at one point.

    The graph of the gradient is built once and kept, with its memory, for as long as the function
    exists; each product is one backward through it. `torch.func.vmap` over the
    function takes several vectors at a time.

    Args:
        f: a scalar function of one tensor, or of one dict of tensors.
        x: where to differentiate: a floating-point tensor or a dict of them.

    Returns:
        A function of one vector like `x`, with results like those of `hvp`.

    Raises:
        TypeError: if `x` is not floating point, or `f` returns no tensor.
        ValueError: if `f` returns more than one number, or, when called, `v` is not like `x`.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> product = linearize_hvp(lambda x: x[0] ** 2 * x[1], x)
        >>> torch.vmap(product)(torch.eye(2))
        tensor([[4., 2.],
                [2., 0.]])
    """
    return linearized_hvp("linearize_hvp", f, x)


def linearized_hvp(operation: str, f: Scalar, x: Inputs) -> Callable[[Inputs], Any]:
    check_floating(operation, x)
    check_recording(operation)
    leaves = map_tensors(lambda t: t.detach().requires_grad_(), x)
    inputs = tensors_of(leaves)
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the others have no second derivative
        y = check_scalar(operation, f(leaves))
        slopes: Sequence[Tensor] = []
        if y.requires_grad:
            slopes = torch.autograd.grad(y, inputs, create_graph=True, materialize_grads=True)
    pull = pulled_back(slopes, inputs)
    return lambda v: structured_like(x, pull(tensors_of(follow(operation, x, v))))


def pulled_back(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    r"""Return $v \mapsto J^\top v$ for outputs of a graph, which is kept."""
    at = [i for i, y in enumerate(outputs) if y.requires_grad]

    def product(v: Sequence[Tensor]) -> list[Tensor]:
        if not at:
            return [torch.zeros_like(x) for x in inputs]
        columns = torch.autograd.grad(
            [outputs[i] for i in at],
            inputs,
            [v[i] for i in at],
            retain_graph=True,
            materialize_grads=True,
        )
        return [dense(column) for column in columns]

    return product


def laplacian(f: Callable[[Tensor], Tensor], x: Tensor, weight: Tensor | None = None) -> Tensor:
    r"""Return $\Delta f(x) = \sum_i \partial_i^2 f(x)$ in one pass, or a weighted sum.

    Collapsed Taylor mode, the forward Laplacian (Li et al. 2024, "A computational framework for
    neural network-based variational Monte Carlo with forward Laplacian"): beside the value every
    operation carries the derivatives along the d coordinates and the sum of the second ones, so
    that no Hessian is built. It uses the rules of `jet` and is differentiable, too.

    Args:
        f: a function of one tensor that returns a tensor, usually a scalar.
        x: a floating-point tensor, usually of shape `(d,)`. Take `torch.func.vmap` over batches.
        weight: `(r, *x.shape)`, the r directions whose second derivatives are summed instead of
            those of the coordinates: for $W$ it is $\operatorname{tr}(W^\top W\, \nabla^2 f)$, as
            with $W = \sigma^\top$ in the generator of a diffusion. The cost grows with r.

    Returns:
        A tensor like `f(x)`, differentiable with respect to `weight`, too.

    Raises:
        NotImplementedError: as `jet`.
        TypeError: if `x` is not floating point, or `f` returns no tensor.
        ValueError: if `weight` has another shape or dtype.

    Example:
        >>> laplacian(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
        tensor(18.)
        >>> torch.vmap(lambda x: laplacian(lambda x: x.norm(), x))(torch.eye(3))  # 2 / r
        tensor([2., 2., 2.])
    """

    def seed(x: Tensor, _: Tensor) -> Jet:
        along = _units(x) if weight is None else weight
        return Jet(torch.cat([x[None], along, torch.zeros_like(x)[None]]), Laplace())

    check_uncompiled("laplacian")
    if isinstance(x, Mapping):
        raise TypeError("laplacian: expected x to be a tensor, got a dict")
    if weight is not None and (weight.shape[1:], weight.dtype) != (x.shape, x.dtype):
        raise ValueError(
            f"laplacian: expected weight of shape (r, *{tuple(x.shape)}) and {x.dtype}, a "
            f"direction in each row, got {tuple(weight.shape)} {weight.dtype}"
        )
    with following():
        y = check_tensor("laplacian", f(follow("laplacian", x, x, seed)))
        return y.stack[-1] if isinstance(y, Jet) else torch.zeros_like(y)


def _units(x: Tensor) -> Tensor:
    """One direction for each number of x."""
    n = x.numel()
    return torch.eye(n, dtype=x.dtype, device=x.device).reshape(n, *x.shape)


def biharmonic(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    r"""Return $\Delta^2 f(x) = \sum_{ij} \partial_i^2 \partial_j^2 f(x)$.

    From the fourth derivatives along the $d^2$ directions $e_i$ and $e_i \pm e_j$, each by `jet`
    (Griewank, Utke & Walther 2000, "Evaluating higher derivative tensors by forward propagation of
    univariate Taylor series"); it is differentiable, too.

    Args:
        f: a function of one tensor that returns a tensor, usually a scalar.
        x: a floating-point tensor of d numbers. Take `torch.func.vmap` over batches.

    Returns:
        A tensor like `f(x)`.

    Raises:
        NotImplementedError: as `jet`.
        TypeError: if `x` is not floating point, or `f` returns no tensor.

    Example:
        >>> biharmonic(lambda x: x.square().sum() ** 2, torch.ones(3))  # 8 d (d + 2)
        tensor(120.)
    """
    check_floating("biharmonic", x)
    d, units = x.numel(), _units(x)
    i, j = torch.triu_indices(d, d, 1, device=x.device)
    directions = torch.cat([units, units[i] + units[j], units[i] - units[j]])
    fourth = torch.vmap(lambda v: jet(f, x, v, 4)[4])(directions)
    return (4 - d) / 3 * fourth[:d].sum(0) + fourth[d:].sum(0) / 6


class Estimate(NamedTuple):
    """A mean over random samples with its standard error, each a tensor or a dict of them."""

    value: Any
    standard_error: Any

    def __repr__(self) -> str:
        if isinstance(self.value, Tensor) and self.value.numel() == 1:
            return f"{self.value.item():.4g} ± {self.standard_error.item():.2g}"
        return f"Estimate(value={self.value}, standard_error={self.standard_error})"


def hessian_diagonal(
    f: Scalar, x: Inputs, samples: int, *, generator: torch.Generator | None = None
) -> Estimate:
    r"""Estimate the diagonal of the Hessian.

    The mean of $v \odot \nabla^2 f(x)\, v$ over random signs $v$ (Bekas, Kokiopoulou & Saad 2007,
    "An estimator for the diagonal of a matrix"). The noise comes from the entries off the
    diagonal: a diagonal Hessian is exact after two samples.

    Args:
        f: a scalar function of one tensor, or of one dict of tensors.
        x: where to differentiate: a real floating-point tensor or a dict of them.
        samples: the number of vectors, at least 2; one Hessian-vector product each.
        generator: the source of the signs; the default one of the device if None.

    Returns:
        An `Estimate`, value and standard error like `x`. The error falls as `samples**-0.5`.

    Raises:
        TypeError: if `x` is not real floating point.
        ValueError: if `samples` is below 2, or `f` returns more than one number.

    Example:
        >>> hessian_diagonal(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), 2).value
        tensor([ 6., 12.])
    """
    means: list[Any] = [0.0] * len(tensors_of(x))
    squares: list[Any] = means  # of the deviations, summed (Welford 1962)
    for n, found in enumerate(_signed("hessian_diagonal", f, x, samples, generator), start=1):
        steps = [value - mean for value, mean in zip(found, means, strict=True)]
        means = [mean + step / n for mean, step in zip(means, steps, strict=True)]
        squares = [
            square + step * (value - mean)
            for square, step, value, mean in zip(squares, steps, found, means, strict=True)
        ]
    errors = [(square / (samples - 1) / samples).sqrt() for square in squares]
    return Estimate(structured_like(x, means), structured_like(x, errors))


def hessian_trace(
    f: Scalar, x: Inputs, samples: int, *, generator: torch.Generator | None = None
) -> Estimate:
    r"""Estimate the trace of the Hessian.

    The mean of $v^\top \nabla^2 f(x)\, v$ over random signs $v$ (Hutchinson 1990). `laplacian`
    computes it without noise, at a cost that grows with the dimension.

    Args:
        f: a scalar function of one tensor, or of one dict of tensors.
        x: where to differentiate: a real floating-point tensor or a dict of them.
        samples: the number of vectors, at least 2; one Hessian-vector product each.
        generator: the source of the signs; the default one of the device if None.

    Returns:
        An `Estimate` of two scalars, which prints as value ± standard error. The error falls as
        `samples**-0.5`.

    Raises:
        TypeError: if `x` is not real floating point.
        ValueError: if `samples` is below 2, or `f` returns more than one number.

    Example:
        >>> hessian_trace(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), 2)
        18 ± 0
    """
    sums = [
        cast(Tensor, sum(value.sum() for value in found))
        for found in _signed("hessian_trace", f, x, samples, generator)
    ]
    totals = torch.stack(sums)
    return Estimate(totals.mean(), (totals.var() / samples).sqrt())


def _signed(
    operation: str, f: Scalar, x: Inputs, samples: int, generator: torch.Generator | None
) -> Iterator[list[Tensor]]:
    """Yield the products of random signs v and of Hv, entry by entry."""
    if not isinstance(samples, int) or samples < 2:
        raise ValueError(
            f"{operation}: expected 2 samples or more, for there is an error to state, "
            f"got {samples!r}"
        )
    check_floating(operation, x, real=True)
    product = linearized_hvp(operation, f, x)
    for _ in range(samples):
        v = map_tensors(lambda t: random_signs(t, generator), x)
        pairs = zip(tensors_of(v), tensors_of(product(v)), strict=True)
        yield [(signs * column).to(sum_dtype(column)) for signs, column in pairs]


def random_signs(t: Tensor, generator: torch.Generator | None) -> Tensor:
    return (torch.randint(0, 2, t.shape, device=t.device, generator=generator) * 2 - 1).to(t.dtype)
