"""What derivatives beyond the first are asked for in training: products, towers, sums, spectra.

All of them are functions of a scalar `f` of one tensor or of a dict of tensors, or of a model and
its loss; none builds a Hessian.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast, overload

import numpy as np
import torch
from numpy.polynomial import Chebyshev
from torch import Tensor, nn

import autograd_lib.higher_order.layers
import autograd_lib.higher_order.rules  # noqa: F401
from autograd_lib.higher_order.taylor import (
    Inputs,
    Jet,
    Laplace,
    Taylor,
    check_tensor,
    check_uncompiled,
    derivative,
    follow,
    jet,
    lift,
)
from autograd_lib.report.tables import Row, Table

__all__ = [
    "DerivativeReport",
    "DerivativeTower",
    "Estimate",
    "derivative_tower",
    "hessian_diagonal",
    "hessian_trace",
    "hvp",
    "laplacian",
    "linearize_hvp",
    "top_eigenvalues",
    "verify_derivatives",
]

Scalar = Callable[..., Tensor]


# ------------------------------------------------------------------ Hessian-vector products


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
        RuntimeError: by PyTorch, where an operation has no second derivative; a note tells what to
            do about attention.

    Example:
        >>> x = torch.tensor([1.0, 2.0])
        >>> hvp(lambda x: x[0] ** 2 * x[1], x, torch.tensor([1.0, 0.0]))
        tensor([4., 2.])
    """
    if torch._C._are_functorch_transforms_active():
        return torch.func.jvp(torch.func.grad(f), (x,), (_like(x, v),))[1]
    return _linearized("hvp", f, x)(v)


def linearize_hvp(f: Scalar, x: Inputs) -> Callable[[Inputs], Any]:
    r"""Return the function $v \mapsto \nabla^2 f(x)\, v$, for many vectors at one point.

    The graph of the gradient is built once and kept for as long as the function is, as is the
    memory that it holds; each product is one backward through it. `torch.func.vmap` over the
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
    return _linearized("linearize_hvp", f, x)


def _linearized(operation: str, f: Scalar, x: Inputs) -> Callable[[Inputs], Any]:
    _check(operation, x)
    _check_recording(operation)
    leaves = _map(lambda t: t.detach().requires_grad_(), x)
    inputs = _list(leaves)
    with torch.enable_grad(), _advice():
        y = _scalar(operation, f(leaves))
        slopes: Sequence[Tensor] = []
        if y.requires_grad:
            slopes = torch.autograd.grad(y, inputs, create_graph=True, materialize_grads=True)
    curved = {i: slope for i, slope in enumerate(slopes) if slope.requires_grad}

    def product(v: Inputs) -> Any:
        follow(operation, x, v, lambda x, v: v)
        if not curved:
            return _map(torch.zeros_like, x)
        vectors = _list(_like(x, v))
        weights = [vectors[i] for i in curved]
        with _advice():
            columns = torch.autograd.grad(
                list(curved.values()), inputs, weights, retain_graph=True, materialize_grads=True
            )
        return _unlist(x, columns)

    return product


def _check(operation: str, x: object, real: bool = False) -> None:
    """Refuse what is neither a tensor of the right kind nor a dict of them."""
    for t in x.values() if isinstance(x, Mapping) else [x]:
        if not isinstance(t, Tensor) or not (
            t.is_floating_point() or (t.is_complex() and not real)
        ):
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(
                f"{operation}: expected x to be a {'real ' if real else ''}floating-point tensor, "
                f"or a dict of them, got {got}"
            )


def _check_recording(operation: str) -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{operation}: expected to be called outside of torch.inference_mode, which records no "
            "graph, got inside; use torch.no_grad, which does not matter here"
        )


def _map(g: Callable[[Tensor], Any], x: Inputs) -> Any:
    return {k: g(t) for k, t in x.items()} if isinstance(x, Mapping) else g(x)


def _list(x: Inputs) -> list[Tensor]:
    return list(x.values()) if isinstance(x, Mapping) else [x]


def _like(x: Inputs, v: Inputs) -> Inputs:
    """The same dict in the order of `x`."""
    return {k: v[k] for k in x} if isinstance(x, Mapping) and isinstance(v, Mapping) else v


def _unlist(x: Inputs, values: Sequence[Any]) -> Any:
    return dict(zip(x, values, strict=True)) if isinstance(x, Mapping) else values[0]


def _scalar(operation: str, y: object) -> Tensor:
    tensor = check_tensor(operation, y)
    if tensor.ndim:
        raise ValueError(
            f"{operation}: expected f to return a scalar, got the shape {tuple(tensor.shape)}; "
            "reduce it, as in .sum()"
        )
    return tensor


@contextlib.contextmanager
def _advice() -> Iterator[None]:
    """Add to PyTorch's error what to do about it."""
    try:
        yield
    except RuntimeError as error:
        if "attention" in str(error) and "not implemented" in str(error):
            error.add_note(
                "The fused kernels of attention have no second derivative; call f under "
                "torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)"
            )
        raise


# ------------------------------------------------------------------ towers


class DerivativeTower(Table, Sequence[dict[str, Tensor]]):
    r"""The derivatives of a loss along one direction: a sequence of dicts by parameter name.

    Entry k - 1 is the derivative of order k contracted k - 1 times with the direction,
    $D^k L(\theta)[v, \dots, v, \cdot]$, each tensor like its parameter: the gradient, the
    Hessian-vector product, and so on.

    Attributes:
        values: $D^k L(\theta)[v, \dots, v]$ for k from 0, the loss, up to the order; a tensor.
        direction: the v that was used, by parameter name.
    """

    def __init__(
        self, vectors: list[dict[str, Tensor]], values: Tensor, direction: dict[str, Tensor]
    ) -> None:
        self._vectors = vectors
        self.values = values
        self.direction = direction

    def __len__(self) -> int:
        return len(self._vectors)

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...

    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Tensor]]: ...

    def __getitem__(self, index: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        return self._vectors[index]

    def _table(self) -> tuple[str, Row, list[Row]]:
        sizes = sum(v.numel() for v in self.direction.values())
        title = f"derivatives of the loss along one direction, {sizes:,} parameters"
        rows: list[Row] = [["0", f"{self.values[0].item():.4g}", ""]]
        for k, vector in enumerate(self, start=1):
            norm = _norm(list(vector.values())).item()
            rows.append([str(k), f"{self.values[k].item():.4g}", f"{norm:.4g}"])
        return title, ["order", "value", "norm of the vector"], rows


def derivative_tower(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    input: Any,
    target: Any,
    order: int = 2,
    direction: Mapping[str, Tensor] | None = None,
) -> DerivativeTower:
    r"""Return the gradient and the derivatives beyond it, contracted with one direction.

    $D^k L(\theta)[v, \dots, v, \cdot]$ for k from 1 to K, shaped like the parameters, from one
    Taylor pass and one backward: with $\varphi_j$ the Taylor coefficients of $L$ along
    $\theta(t) = \sum_j \theta_j t^j$, the derivative of $\varphi_{K-1}$ with respect to
    $\theta_j$ is $\frac{1}{(K-1-j)!} D^{K-j} L(\theta)[v, \dots, v, \cdot]$ at $\theta_1 = v$ and
    $\theta_{j>1} = 0$.

    Args:
        model: a module; its parameters that require a gradient are differentiated, shared ones
            once. It is left as it is: parameters, gradients, buffers, mode; but while this runs,
            its parameters are others, so no other thread may use it.
        loss_fn: `loss_fn(model(input), target)` is the loss, a scalar.
        input: what `model` is called with.
        target: the second argument of `loss_fn`.
        order: the highest derivative K, at least 1.
        direction: a tensor for each of those parameters, by name. Without one, the gradient divided
            by its norm, at the price of one more gradient.

    Returns:
        A `DerivativeTower` of `order` dicts, detached.

    Raises:
        NotImplementedError: if an operation has no rule (`jet_rule` adds one), or a batch norm is
            in training mode with running statistics.
        ValueError: if `direction` has other names or shapes than the parameters, the loss is not a
            scalar, `order` is below 1, no parameter requires a gradient, or `direction` is None
            where the gradient is zero or not finite.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> _ = nn.init.constant_(model.weight, 2.0)
        >>> cube = lambda y, _: (y**3).sum()
        >>> derivative_tower(model, cube, torch.ones(1, 1), None, order=4).values
        tensor([ 8., 12., 12.,  6.,  0.])
    """
    check_uncompiled("derivative_tower")
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"derivative_tower: expected an order of 1 or more, got {order!r}")
    _check_recording("derivative_tower")
    for name, module in model.named_modules():
        if (
            isinstance(module, nn.modules.batchnorm._NormBase)
            and module.training
            and module.running_mean is not None
        ):
            raise NotImplementedError(
                f"derivative_tower: {name or type(module).__name__} is in training mode, where a "
                "forward changes its running statistics; call model.eval(), or give it "
                "track_running_stats=False"
            )
    parameters = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError("derivative_tower: no parameter of the model requires a gradient")

    def inside(values: Mapping[str, Tensor], action: Callable[[Tensor], Any]) -> Any:
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

        def run(model: nn.Module) -> Any:
            return action(_scalar("derivative_tower", loss_fn(model(input), target)))

        swapped = {f"model.{name}": tensor for name, tensor in {**buffers, **values}.items()}
        return torch.func.functional_call(_Inside(model, run), swapped, ())

    with torch.enable_grad():
        v = _direction(inside, parameters) if direction is None else direction
        ring = Taylor(order)

        def seed(x: Tensor, v: Tensor) -> Jet:
            zeros = x.new_zeros(max(order - 2, 0), *x.shape)
            stack = torch.cat([torch.stack([x, v.detach()])[:order], zeros])
            return Jet(stack.requires_grad_(), ring, live=2)

        seeds = follow("derivative_tower, direction", parameters, v, seed)
        stacks = [seed.stack for seed in seeds.values()]

        def differentiate(loss: Tensor) -> tuple[Tensor, Sequence[Tensor]]:
            stack, _ = lift(loss)
            if len(stack) < order or not stack.requires_grad:
                return stack, [torch.zeros_like(s) for s in stacks]
            return stack, torch.autograd.grad(stack[-1], stacks, materialize_grads=True)

        stack, slopes = inside(seeds, differentiate)
    vectors = [
        {
            name: derivative(slope[order - k], k - 1).contiguous()
            for name, slope in zip(parameters, slopes, strict=True)
        }
        for k in range(1, order + 1)
    ]
    with torch.no_grad():
        last = sum(torch.vdot(vectors[-1][k].flatten(), v[k].flatten()) for k in parameters)
        known = [derivative(c, k) for k, c in enumerate(stack.detach())]
        known += [torch.zeros_like(stack[0])] * (order - len(stack))
        values = torch.stack([*known, cast(Tensor, last).to(stack.dtype)])
    return DerivativeTower(vectors, values, {k: v[k].detach().clone() for k in parameters})


class _Inside(nn.Module):
    """A model and what is done with it while its parameters are others.

    Its backward is done there too: a checkpointed block runs again in it.
    """

    def __init__(self, model: nn.Module, action: Callable[[nn.Module], Any]) -> None:
        super().__init__()
        self.model = model
        self.action = action

    def forward(self) -> Any:
        return self.action(self.model)


def _direction(inside: Callable[..., Any], parameters: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient by its norm, for the dropout masks that the next forward will draw."""
    devices = {p.device for p in parameters.values() if p.device.type != "cpu"}
    leaves = {k: p.requires_grad_() for k, p in _map(Tensor.detach, parameters).items()}

    def gradient(loss: Tensor) -> Sequence[Tensor]:
        if not loss.requires_grad:
            return [torch.zeros_like(p) for p in leaves.values()]
        return torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)

    with torch.random.fork_rng(devices, device_type=next(iter(devices)).type if devices else "cpu"):
        slopes = inside(leaves, gradient)
    norm = _norm(slopes)
    size = norm.item()
    if not 0 < size < math.inf:
        raise ValueError(
            f"derivative_tower: expected a gradient that is finite and not zero to take as the "
            f"direction, got one of norm {size:g}; pass direction="
        )
    return {k: (s.to(norm.dtype) / norm).to(s.dtype) for k, s in zip(leaves, slopes, strict=True)}


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    norms = [torch.linalg.vector_norm(t, dtype=_wide(t)) for t in tensors]
    return torch.linalg.vector_norm(torch.stack(norms))


def _wide(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


# ------------------------------------------------------------------ sums of the Hessian


def laplacian(f: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    r"""Return $\Delta f(x) = \sum_i \partial_i^2 f(x)$ in one pass.

    Collapsed Taylor mode, the forward Laplacian (Li et al. 2024, "A computational framework for
    neural network-based variational Monte Carlo with forward Laplacian"): beside the value every
    operation carries the derivatives along the d coordinates and the sum of the second ones, so
    that no Hessian is built. By the rules of `jet`, and differentiable as it is.

    Args:
        f: a function of one tensor that returns a tensor, of a scalar as a rule.
        x: a floating-point tensor, of shape `(d,)` as a rule. Take `torch.func.vmap` over batches.

    Returns:
        A tensor like `f(x)`.

    Raises:
        NotImplementedError: as `jet`.
        TypeError: if `x` is not floating point, or `f` returns no tensor.

    Example:
        >>> laplacian(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]))
        tensor(18.)
        >>> torch.vmap(lambda x: laplacian(lambda x: x.norm(), x))(torch.eye(3))  # 2 / r
        tensor([2., 2., 2.])
    """

    def seed(x: Tensor, _: Tensor) -> Jet:
        n = x.numel()
        ones = torch.eye(n, dtype=x.dtype, device=x.device).reshape(n, *x.shape)
        return Jet(torch.cat([x[None], ones, torch.zeros_like(x)[None]]), Laplace())

    check_uncompiled("laplacian")
    if isinstance(x, Mapping):
        raise TypeError("laplacian: expected x to be a tensor, got a dict")
    y = check_tensor("laplacian", f(follow("laplacian", x, x, seed)))
    return y.stack[-1] if isinstance(y, Jet) else torch.zeros_like(y)


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
    "An estimator for the diagonal of a matrix"). What is off the diagonal is the noise: a
    diagonal Hessian is exact after two samples.

    Args:
        f: a scalar function of one tensor, or of one dict of tensors.
        x: where to differentiate: a real floating-point tensor or a dict of them.
        samples: the number of vectors, at least 2; one Hessian-vector product each.
        generator: where the signs come from; the default one of the device if None.

    Returns:
        An `Estimate`, value and standard error like `x`. The error falls as `samples**-0.5`.

    Raises:
        TypeError: if `x` is not real floating point.
        ValueError: if `samples` is below 2, or `f` returns more than one number.

    Example:
        >>> hessian_diagonal(lambda x: (x**3).sum(), torch.tensor([1.0, 2.0]), 2).value
        tensor([ 6., 12.])
    """
    return _mean(
        "hessian_diagonal",
        f,
        x,
        samples,
        generator,
        lambda vs, hs: [(v * h).to(_wide(h)) for v, h in zip(vs, hs, strict=True)],
        lambda means: _unlist(x, means),
    )


def hessian_trace(
    f: Scalar, x: Inputs, samples: int, *, generator: torch.Generator | None = None
) -> Estimate:
    r"""Estimate the trace of the Hessian.

    The mean of $v^\top \nabla^2 f(x)\, v$ over random signs $v$ (Hutchinson 1990). `laplacian` has
    it without noise, at a cost that grows with the dimension.

    Args:
        f: a scalar function of one tensor, or of one dict of tensors.
        x: where to differentiate: a real floating-point tensor or a dict of them.
        samples: the number of vectors, at least 2; one Hessian-vector product each.
        generator: where the signs come from; the default one of the device if None.

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
    return _mean(
        "hessian_trace",
        f,
        x,
        samples,
        generator,
        lambda vs, hs: [
            cast(Tensor, sum((v * h).sum(dtype=_wide(h)) for v, h in zip(vs, hs, strict=True)))
        ],
        lambda means: means[0],
    )


def _mean(
    operation: str,
    f: Scalar,
    x: Inputs,
    samples: int,
    generator: torch.Generator | None,
    statistic: Callable[[list[Tensor], list[Tensor]], list[Tensor]],
    shape: Callable[[list[Tensor]], Any],
) -> Estimate:
    """Mean and standard error of a statistic of signs v and Hv, by Welford's recurrence."""
    if not isinstance(samples, int) or samples < 2:
        raise ValueError(
            f"{operation}: expected 2 samples or more, for there is an error to state, "
            f"got {samples!r}"
        )
    _check(operation, x, real=True)
    product = _linearized(operation, f, x)
    means: list[Tensor] = []
    squares: list[Tensor] = []
    for n in range(1, samples + 1):
        signs = _map(
            lambda t: (
                torch.randint(0, 2, t.shape, dtype=t.dtype, device=t.device, generator=generator)
                * 2
                - 1
            ),
            x,
        )
        found = statistic(_list(signs), _list(product(signs)))
        if n == 1:
            means, squares = found, [torch.zeros_like(t) for t in found]
            continue
        steps = [value - mean for value, mean in zip(found, means, strict=True)]
        means = [mean + step / n for mean, step in zip(means, steps, strict=True)]
        squares = [
            square + step * (value - mean)
            for square, step, value, mean in zip(squares, steps, found, means, strict=True)
        ]
    errors = [(square / (samples - 1) / samples).sqrt() for square in squares]
    return Estimate(shape(means), shape(errors))


# ------------------------------------------------------------------ spectra


def top_eigenvalues(f: Scalar, x: Inputs, k: int) -> Tensor:
    r"""Return the k eigenvalues of the Hessian that are largest in magnitude.

    The Lanczos method by SciPy (`scipy.sparse.linalg.eigsh`, implicitly restarted), on
    Hessian-vector products at the precision of `x`. The first is the sharpness: gradient descent
    with a step above $2 / \lambda$ diverges along its eigenvector.

    Args:
        f: a scalar function of one tensor, or of one dict of tensors.
        x: where to differentiate: a real floating-point tensor or a dict of them, n numbers in all.
        k: how many, between 1 and n.

    Returns:
        k eigenvalues, float64, largest in magnitude first.

    Raises:
        ImportError: if SciPy is not installed.
        RuntimeError: if Lanczos does not converge.
        TypeError: if `x` is not real floating point.
        ValueError: if `k` is not between 1 and n, `f` returns more than one number, or the Hessian
            is not finite.

    Example:
        >>> top_eigenvalues(lambda x: (x**3).sum(), torch.tensor([1.0, -3.0, 2.0]), 2)
        tensor([-18.,  12.], dtype=torch.float64)
    """
    try:
        from scipy.sparse.linalg import (  # noqa: PLC0415 - an optional dependency
            ArpackError,
            LinearOperator,
            eigsh,
        )
    except ImportError as error:
        raise ImportError("top_eigenvalues: SciPy is needed: pip install scipy") from error
    _check("top_eigenvalues", x, real=True)
    tensors = _list(x)
    n = sum(t.numel() for t in tensors)
    if not isinstance(k, int) or not 1 <= k <= n:
        raise ValueError(f"top_eigenvalues: expected k between 1 and {n}, got {k!r}")
    product = _linearized("top_eigenvalues", f, x)

    def column(vector: Any) -> Any:
        parts = torch.from_numpy(np.asarray(vector, dtype=np.float64).ravel()).split(
            [t.numel() for t in tensors]
        )
        v = [part.to(t).reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]
        columns = _list(product(_unlist(x, v)))
        return torch.cat([c.flatten().double().cpu() for c in columns]).numpy()

    start = np.random.default_rng(0).standard_normal(n)
    image = column(start)
    if not np.isfinite(image).all():
        raise ValueError("top_eigenvalues: expected a finite Hessian, got NaN or Inf at x")
    if not image.any():  # with probability one the Hessian is zero
        return torch.zeros(k, dtype=torch.float64)
    if k >= n - 1:  # too small for Lanczos
        dense = np.stack([column(row) for row in np.eye(n)])
        found = np.linalg.eigvalsh((dense + dense.T) / 2)
    else:
        precision = max(torch.finfo(t.dtype).eps for t in tensors)
        operator = LinearOperator((n, n), matvec=column, dtype=np.float64)
        try:
            found = eigsh(
                operator, k, which="LM", v0=start, tol=precision**0.75, return_eigenvectors=False
            )
        except ArpackError as error:
            raise RuntimeError(
                f"top_eigenvalues: Lanczos did not find {k} eigenvalues ({error}); convert x and f "
                "to float64, or ask for another k"
            ) from error
    order = np.argsort(-np.abs(found))[:k]
    return torch.from_numpy(np.ascontiguousarray(found[order]))


# ------------------------------------------------------------------ verification


class DerivativeReport(Table):
    """Derivatives along a direction, computed in several ways, beside an independent fit.

    Attributes:
        fit: the derivatives of a Chebyshev fit, by order from 0.
        uncertainty: how far two fits differ, by order.
        values: for each way, the derivatives as far as it came.
        errors: for each way that raised, what.
        first_wrong: for each way, the first order at which it disagrees with the fit, or which it
            does not reach; None where all orders agree.
    """

    def __init__(
        self,
        fit: list[float],
        uncertainty: list[float],
        values: dict[str, list[float]],
        errors: dict[str, str],
        rtol: float,
    ) -> None:
        self.fit = fit
        self.uncertainty = uncertainty
        self.values = values
        self.errors = errors
        self._rtol = rtol
        self.first_wrong = {name: self._first_wrong(name) for name in values}

    def _first_wrong(self, name: str) -> int | None:
        found = self.values[name]
        wrong = (k for k in range(len(found)) if self._verdict(found, k) == "wrong")
        return next(wrong, len(found) if len(found) < len(self.fit) else None)

    @property
    def ok(self) -> bool:
        """Whether every way got through and agrees with a fit that resolves f."""
        return self._resolved(1) and all(wrong is None for wrong in self.first_wrong.values())

    def _resolved(self, k: int, found: float = 0.0) -> bool:
        """Whether the fit knows the order well enough to vouch for a number."""
        scale, largest = max(abs(self.fit[k]), abs(found)), np.nanmax(np.abs(self.fit))
        return 10 * self.uncertainty[k] <= max(1e-2 * scale, 1e-6 * largest)

    def _verdict(self, found: list[float], k: int) -> str:
        if math.isinf(self.uncertainty[k]):
            return "?"
        allowed = self._rtol * max(abs(self.fit[k]), abs(found[k])) + 10 * self.uncertainty[k]
        if not abs(found[k] - self.fit[k]) <= allowed:
            return "wrong"
        return "" if self._resolved(k, found[k]) else "?"

    def _table(self) -> tuple[str, Row, list[Row]]:
        wrong = [
            f"{name} from order {k} on"
            for name, k in self.first_wrong.items()
            if k is not None and k < len(self.values[name])
        ]
        agreement = "what came agrees with the fit" if self.errors else "all agree with the fit"
        title = f"wrong: {', '.join(wrong)}" if wrong else agreement
        unknown = [k for k in range(len(self.fit)) if not self._resolved(k)]
        if unknown:
            title += f"; the fit does not resolve f from order {unknown[0]} on, scale v"
        rows: list[Row] = []
        for k, value in enumerate(self.fit):
            row = [str(k), f"{value:.6g} ± {self.uncertainty[k]:.0e}"]
            for name, found in self.values.items():
                absent = "raises" if name in self.errors else "missing"
                cell = f"{found[k]:.6g} {self._verdict(found, k)}" if k < len(found) else absent
                row.append(cell.strip())
            rows.append(row)
        return title, ["order", "fit", *self.values], rows

    def _notes(self) -> list[str]:
        return [f"{name} raises {error}" for name, error in self.errors.items()]


def verify_derivatives(
    f: Callable[..., Tensor],
    x: Inputs,
    v: Inputs,
    order: int,
    *,
    rtol: float = 1e-6,
    ways: Mapping[str, Callable[..., Any]] | None = None,
) -> DerivativeReport:
    r"""Check derivatives along a direction against a fit that uses values of `f` alone.

    $f(x + tv)$ is sampled in float64 at Chebyshev points and interpolated (Trefethen 2019,
    "Approximation Theory and Approximation Practice"); the fit's own derivatives at 0 are compared
    with those that automatic differentiation returns. By default: `jet`; `reverse`, nested
    `torch.autograd.grad`; `forward`, nested `torch.func.jvp`. Of several widths the one whose fits
    of two degrees agree best is taken, and their difference stated.

    Args:
        f: a function as for `jet`. It must take float64: convert a copy of a model by
            `copy.deepcopy(model).double()`, and its data.
            Where it returns several numbers, a fixed random combination of them is checked.
        x: where to differentiate; converted to float64.
        v: the direction, like `x`; f must be smooth along it.
        order: the highest derivative, at least 1.
        rtol: the relative error that passes.
        ways: other ways to check, by name: each is called with `(f, x, v, order)` and returns the
            derivatives from order 0 on.

    Returns:
        A `DerivativeReport` that prints as a table. `first_wrong` names, for each way, the first
        order that disagrees.

    Raises:
        TypeError: as `jet`.
        ValueError: as `jet`, or if `f` is not finite near `x`.

    Example:
        >>> x, v = torch.tensor([1.0, 2.0]), torch.tensor([1.0, -1.0])
        >>> verify_derivatives(lambda x: x.prod().exp(), x, v, 4).first_wrong
        {'jet': None, 'reverse': None, 'forward': None}
    """
    if not isinstance(order, int) or order < 1:
        raise ValueError(f"verify_derivatives: expected an order of 1 or more, got {order!r}")
    _check("verify_derivatives", x)
    follow("verify_derivatives", x, v, lambda x, v: x)

    def wide(t: Tensor) -> Tensor:
        return t.detach().to(torch.complex128 if t.is_complex() else torch.float64)

    x, v = _map(wide, x), _map(wide, _like(x, v))
    weights: list[Tensor] = []

    def one(x: Inputs) -> Tensor:
        y = check_tensor("verify_derivatives", f(x))
        y = torch.view_as_real(y) if y.is_complex() else y
        if not y.ndim:
            return y
        if not weights:
            generator = torch.Generator().manual_seed(0)
            weights.append(
                torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device)
            )
        return (y * weights[0]).sum()

    fit, uncertainty = _fit(lambda t: one(_step(x, v, t)).item(), order)
    values: dict[str, list[float]] = {}
    errors: dict[str, str] = {}
    for name, way in (_WAYS if ways is None else ways).items():
        values[name] = []
        try:
            for found in itertools.islice(way(one, x, v, order), order + 1):
                values[name].append(found.item())
        except (RuntimeError, NotImplementedError) as error:
            errors[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return DerivativeReport(fit, uncertainty, values, errors, rtol)


def _step(x: Inputs, v: Inputs, t: Any) -> Inputs:
    if isinstance(x, Mapping) and isinstance(v, Mapping):
        return {k: x[k] + t * v[k] for k in x}
    return cast(Tensor, x) + t * cast(Tensor, v)


def _reverse(f: Scalar, x: Inputs, v: Inputs, order: int) -> Iterator[Tensor]:
    with torch.enable_grad():
        t = torch.zeros((), dtype=torch.float64, device=_list(x)[0].device, requires_grad=True)
        y = f(_step(x, v, t))
        yield y.detach()
        for _ in range(order):
            if y.requires_grad:
                (y,) = torch.autograd.grad(y, t, create_graph=True, materialize_grads=True)
            else:
                y = torch.zeros_like(y)
            yield y.detach()


def _forward(f: Scalar, x: Inputs, v: Inputs, order: int) -> Iterator[Tensor]:
    t = torch.zeros((), dtype=torch.float64, device=_list(x)[0].device)

    def along(t: Tensor) -> Tensor:
        return f(_step(x, v, t))

    g: Callable[[Tensor], Tensor] = along
    for _ in range(order + 1):
        yield g(t).detach()
        g = _slope(g)


def _slope(g: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda t: torch.func.jvp(g, (t,), (torch.ones_like(t),))[1]


_WAYS: dict[str, Callable[..., Any]] = {"jet": jet, "reverse": _reverse, "forward": _forward}

_WIDTHS = (2.0, 1.0, 0.5, 0.25, 0.12, 0.06)


def _fit(g: Callable[[float], float], order: int) -> tuple[list[float], list[float]]:
    """Derivatives at 0 by Chebyshev interpolation, and by how much two degrees differ."""
    at_zero, finite = g(0.0), False
    # The last coefficients over a short interval are noise: of float64, or of what f computes in.
    noise = np.abs(_interpolate(g, _WIDTHS[-1], order + 16).coef[-3:]).max()
    best: list[tuple[float, float]] = []
    for width, (low, high) in itertools.product(_WIDTHS, ((4, 6), (12, 16))):
        fits = [_interpolate(g, width, degree) for degree in (order + low, order + high)]
        largest = np.abs(fits[1].coef).sum()
        if not all(np.isfinite(series.coef).all() for series in fits):
            continue
        finite = True
        between = 0.37 * width  # no point of the fit
        if abs(float(fits[1](between)) - g(between)) > 1e-5 * largest:
            continue  # too wide to resolve f
        error = np.finfo(np.float64).eps * largest + (noise if math.isfinite(noise) else 0.0)
        for k in range(order + 1):
            rough, fine = (float((series.deriv(k) if k else series)(0.0)) for series in fits)
            doubt = abs(fine - rough) + error * _amplification(order + high, k) / width**k
            if k == len(best):
                best.append((doubt, fine))
            best[k] = min(best[k], (doubt, fine))
    if not finite:
        raise ValueError(
            "verify_derivatives: expected f to be finite along v, got none of the widths from "
            f"{_WIDTHS[0]} to {_WIDTHS[-1]}; scale v down"
        )
    if not best:  # nothing is known beyond the value
        return [at_zero] + [math.nan] * order, [0.0] + [math.inf] * order
    return [value for _, value in best], [doubt for doubt, _ in best]


def _interpolate(g: Callable[[float], float], width: float, degree: int) -> Chebyshev:
    points = width * np.cos(np.pi * (np.arange(degree + 1) + 0.5) / (degree + 1))
    return Chebyshev.fit(points, [g(t) for t in points], degree, domain=[-width, width])


@functools.cache
def _amplification(degree: int, k: int) -> float:
    """By how much a k-th derivative at 0 enlarges an error of the samples: sum |T_n^(k)(0)|."""
    basis = (Chebyshev.basis(n).deriv(k) if k else Chebyshev.basis(n) for n in range(degree + 1))
    return sum(abs(float(series(0.0))) for series in basis)
