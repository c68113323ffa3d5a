"""The Laplace approximation: how sure a trained network is, from the curvature of its loss."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from autograd_lib.functions.forward_mode import check_floating

__all__ = ["Posterior", "Prediction", "laplace_posterior"]

_MOST = 20_000  # parameters of a full curvature, of which the eigenvectors take 3.2 GB


class Prediction(NamedTuple):
    """What a posterior says of inputs.

    Attributes:
        mean: the outputs of the model, (N, outputs).
        covariance: of the outputs as functions of the weights, (N, outputs, outputs); the noise of
            the data is not in it.
        probabilities: of the classes, (N, outputs); None for regression.
    """

    mean: Tensor
    covariance: Tensor
    probabilities: Tensor | None


class _Block(NamedTuple):
    """The curvature of some parameters: its eigenvalues, and how a Jacobian is turned to them.

    A full block has `vectors`, one of Kronecker form has those of both `factors`, that of the
    outputs first; without both it is diagonal.
    """

    names: list[str]
    values: Tensor
    vectors: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None

    def turned(self, jacobian: Tensor) -> Tensor:
        """Turn (..., parameters) to the eigenvectors."""
        if self.vectors is not None:
            return jacobian @ self.vectors
        if self.factors is None:
            return jacobian
        outputs, inputs = self.factors
        # The bias is one more column of the weight, and its input is 1.
        parts = jacobian.tensor_split(
            [jacobian.shape[-1] - len(outputs) * (len(self.names) - 1)], -1
        )
        columns = [part.unflatten(-1, (len(outputs), -1)) for part in parts if part.shape[-1]]
        return (outputs.T @ torch.cat(columns, -1) @ inputs).flatten(-2)

    def back(self, turned: Tensor) -> Tensor:
        if self.vectors is not None:
            return self.vectors @ turned
        if self.factors is None:
            return turned
        outputs, inputs = self.factors
        both = outputs @ turned.reshape(len(outputs), len(inputs)) @ inputs.T
        width = len(inputs) - (len(self.names) - 1)
        return torch.cat([both[:, :width].flatten(), both[:, width:].flatten()])


@dataclass(frozen=True, repr=False)
class Posterior:
    """A normal distribution of the weights around those that were trained.

    Attributes:
        prior_precision: of each weight, the inverse of its variance before any data.
        noise: the standard deviation of the data around the outputs; 1 for classification.
    """

    model: nn.Module
    likelihood: str
    prior_precision: Tensor
    noise: Tensor
    _blocks: list[_Block]
    _fit: tuple[Tensor, int]  # the sum of squares or of log-probabilities, and of how many values

    def __repr__(self) -> str:
        count = sum(len(block.values) for block in self._blocks)
        return (
            f"Posterior({count} weights, prior_precision {self.prior_precision:.3g}, "
            f"noise {self.noise:.3g})"
        )

    def predict(self, x: Tensor) -> Prediction:
        r"""Return the outputs with their covariance, by the model linearized in its weights.

        Classes get $\mathrm{softmax}(\mu / \sqrt{1 + \pi v / 8})$ with v the variances (MacKay
        1992, "The evidence framework applied to classification networks").

        Args:
            x: inputs, the first dimension N; everything returned is differentiable in it.
        """
        mean, jacobians = (
            self.model(x),
            _jacobians(self.model, [block.names for block in self._blocks], x),
        )
        covariance = mean.new_zeros(()).expand(*mean.shape, mean.shape[1])
        for block, jacobian in zip(self._blocks, jacobians, strict=True):
            turned = block.turned(jacobian)
            precision = block.values / self.noise**2 + self.prior_precision
            covariance = covariance + (turned / precision) @ turned.mT
        probabilities = None
        if self.likelihood == "classification":
            variances = covariance.diagonal(dim1=1, dim2=2)
            probabilities = torch.softmax(mean / torch.sqrt(1 + math.pi / 8 * variances), 1)
        return Prediction(mean, covariance, probabilities)

    def log_evidence(
        self, prior_precision: float | Tensor | None = None, noise: float | Tensor | None = None
    ) -> Tensor:
        """Return the logarithm of the probability of the data, differentiable in both arguments."""
        delta = torch.as_tensor(
            self.prior_precision if prior_precision is None else prior_precision
        )
        sigma = torch.as_tensor(self.noise if noise is None else noise)
        fit, count = self._fit
        if self.likelihood == "regression":
            fit = -fit / (2 * sigma**2) - count * torch.log(sigma * math.sqrt(2 * math.pi))
        weights = dict(self.model.named_parameters())
        for block in self._blocks:
            squares = sum(weights[name].detach().square().sum() for name in block.names)
            ratios = block.values / (sigma**2 * delta)
            fit = fit - delta * squares / 2 - torch.log1p(ratios.clamp(min=0)).sum() / 2
        return fit

    def fit_prior(self) -> Posterior:
        """Return the posterior whose prior, and for regression noise, make the data most likely."""
        own = [self.prior_precision, self.noise][: 2 if self.likelihood == "regression" else 1]
        logs = torch.stack(own).log().requires_grad_()
        optimizer = torch.optim.LBFGS([logs], max_iter=100, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = -self.log_evidence(*logs.exp())
            loss.backward()
            return loss

        optimizer.step(closure)
        names = ("prior_precision", "noise")
        return replace(self, **dict(zip(names, logs.detach().exp(), strict=False)))

    def sample(self, n: int, generator: torch.Generator | None = None) -> dict[str, Tensor]:
        """Draw weights by name, with a leading dimension n, for `torch.func.functional_call`."""
        weights, drawn = dict(self.model.named_parameters()), {}
        for block in self._blocks:
            at = torch.cat([weights[name].detach().flatten() for name in block.names])
            deviation = (block.values / self.noise**2 + self.prior_precision).rsqrt()
            noise = torch.randn(n, len(at), generator=generator, dtype=at.dtype, device=at.device)
            flat = at + torch.stack([block.back(z) for z in noise * deviation])
            sizes = [weights[name].numel() for name in block.names]
            for name, part in zip(block.names, flat.split(sizes, 1), strict=True):
                drawn[name] = part.reshape(n, *weights[name].shape)
        return drawn


def laplace_posterior(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    likelihood: str = "regression",
    *,
    structure: str = "full",
    weights: str = "all",
    prior_precision: float | Tensor = 1.0,
    noise: float | Tensor = 1.0,
) -> Posterior:
    r"""Return the normal distribution of the weights that has the curvature of the loss.

    It is $\mathcal{N}(\hat\theta, (G / \sigma^2 + \delta I)^{-1})$, where $\hat\theta$ is what was
    trained, and $G = \sum_n J_n^\top \Lambda_n J_n$ the generalized Gauss-Newton matrix over the
    data, with $\Lambda_n$ the Hessian of the loss in the outputs, $\delta$ the precision of the
    prior and $\sigma$ the noise (MacKay 1992, "A practical Bayesian framework for backpropagation
    networks"; Daxberger et al. 2021, "Laplace redux").
    The outputs are taken as linear in the weights, for which it is exact in linear regression.

    Args:
        model: trained, in eval mode where it has dropout or batch normalization; maps a batch of
            inputs to outputs (N, outputs), each from its own input alone.
        loader: batches (inputs, targets): targets like the outputs for regression, int64 (N,) for
            classification. It is gone through once.
        likelihood: "regression" with normal noise, or "classification" with the softmax.
        structure: "full"; "kron", for each linear layer a Kronecker product over weight and bias
            together (Martens & Grosse 2015), which is exact for a single one, and the exact
            diagonal for all other parameters; "diag", the diagonal.
        weights: "all" that require a gradient, or those of the "last" linear layer.
        prior_precision: $\delta$, the inverse of the prior's variance, of weights and biases.
        noise: $\sigma$, a standard deviation in units of the targets; regression alone has it.

    Returns:
        A `Posterior`. The model is left as it was.

    Raises:
        ValueError: if the model is in training mode with dropout or batch normalization, an option
            is unknown, the outputs are not (N, outputs), or "full" has more than 20,000 parameters.
        NotImplementedError: for "kron" where a linear layer is called twice or shares its weight.
        TypeError: if the inputs are not floating point.

    Example:
        >>> model = nn.Linear(1, 1, bias=False).double()
        >>> x = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
        >>> posterior = laplace_posterior(model, [(x, x)])
        >>> posterior.predict(x[1:]).covariance.item()  # x (X^T X + 1)^-1 x = 4 / 6
        0.6666666666666666
    """
    for name, value, known in (
        ("likelihood", likelihood, ("regression", "classification")),
        ("structure", structure, ("full", "kron", "diag")),
        ("weights", weights, ("all", "last")),
    ):
        if value not in known:
            raise ValueError(
                f"laplace_posterior: expected {name} to be one of {', '.join(known)}, got {value!r}"
            )
    for name, module in model.named_modules():
        if module.training and isinstance(module, (_BatchNorm, _DropoutNd)):
            raise ValueError(
                f"laplace_posterior: expected eval mode, got {name or 'the model'}, a "
                f"{type(module).__name__}, in training mode; call model.eval()"
            )
    batches = iter(loader)
    first = next(batches, None)
    if first is None:
        raise ValueError("laplace_posterior: expected at least one batch, got an empty loader")
    check_floating("laplace_posterior", first[0])
    blocks = _planned(model, structure, _last_layer(model, first[0]) if weights == "last" else None)
    sums = [torch.zeros(()) for _ in blocks]
    fit, count = torch.zeros(()), 0
    factors = _Factors([block for block in blocks if block.module is not None])
    for x, y in itertools.chain([first], batches):
        outputs = factors.run(model, x, likelihood)
        if likelihood == "regression":
            fit, count = fit + (outputs - y).square().sum(), count + y.numel()
        else:
            fit = fit - F.cross_entropy(outputs, y, reduction="sum")
        jacobians = _jacobians(model, [b.names if b.module is None else [] for b in blocks], x)
        for i, (block, jacobian) in enumerate(zip(blocks, jacobians, strict=True)):
            if block.module is None:
                rows = (_root(outputs, likelihood).mT @ jacobian).flatten(0, 1).detach()
                sums[i] = sums[i] + (rows.T @ rows if block.full else rows.square().sum(0))
    options: dict[str, Any] = {"dtype": fit.dtype, "device": fit.device}
    return Posterior(
        model,
        likelihood,
        torch.as_tensor(prior_precision, **options),
        torch.as_tensor(noise if likelihood == "regression" else 1.0, **options),
        [
            _decomposed(block, factors.of(block) if block.module is not None else curvature)
            for block, curvature in zip(blocks, sums, strict=True)
        ],
        (fit, count),
    )


class _Planned(NamedTuple):
    """Parameters whose curvature is to be summed: of a layer in Kronecker form, full, or not."""

    names: list[str]
    full: bool = False
    module: nn.Linear | None = None


@contextlib.contextmanager
def _hooked(layers: Iterable[nn.Module], hook: Callable[..., None]) -> Iterator[None]:
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _last_layer(model: nn.Module, x: Tensor) -> nn.Linear:
    """The linear layer that is called last."""
    called: list[nn.Linear] = []
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    with _hooked(layers, lambda module, *_: called.append(module)), torch.no_grad():
        model(x)
    if not called:
        raise ValueError("laplace_posterior: expected a linear layer for weights='last', got none")
    return called[-1]


def _planned(model: nn.Module, structure: str, last: nn.Linear | None) -> list[_Planned]:
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if last is not None:
        own = {id(p) for p in last.parameters()}
        parameters = {name: p for name, p in parameters.items() if id(p) in own}
    count = sum(p.numel() for p in parameters.values())
    if structure == "full" and count > _MOST:
        raise ValueError(
            f"laplace_posterior: expected at most {_MOST} parameters for structure='full', got "
            f"{count}; use structure='kron', or weights='last'"
        )
    if structure != "kron":
        return [_Planned(list(parameters), structure == "full")]
    uses = [id(p) for _, p in model.named_parameters(remove_duplicate=False)]
    blocks, rest = [], dict(parameters)
    for name, layer in layers.items():
        names = [f"{name}.{part}".lstrip(".") for part in ("weight", "bias")]
        names = [n for n in names if n in rest]
        if names and uses.count(id(layer.weight)) > 1:
            raise _shared(name)
        if names and rest[names[0]] is layer.weight:
            blocks.append(_Planned(names, module=layer))
            rest = {n: p for n, p in rest.items() if n not in names}
    return blocks + [_Planned(list(rest))] * bool(rest)


def _shared(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"laplace_posterior: structure='kron' has no form for {name or 'a layer'}, whose weight is "
        "used more than once; use structure='full' or 'diag'"
    )


class _Factors:
    """Sums the two factors of each linear layer."""

    def __init__(self, blocks: list[_Planned]) -> None:
        self.layers: dict[Any, str] = {block.module: block.names[0] for block in blocks}
        self.sums: dict[Any, list[Tensor]] = {}
        self.rows = 0

    def _see(self, module: nn.Module, inputs: Any, output: Tensor) -> None:
        if module in self.seen:
            raise _shared(self.layers[module].rpartition(".")[0])
        self.seen[module] = inputs[0].detach().flatten(0, -2), output

    def run(self, model: nn.Module, x: Tensor, likelihood: str) -> Tensor:
        """Return the outputs, after adding what they say of the factors."""
        self.seen: dict[Any, tuple[Tensor, Tensor]] = {}
        with _hooked(self.layers, self._see), torch.enable_grad():
            outputs = model(x)
        if outputs.dim() != 2 or len(outputs) != len(x):
            raise ValueError(
                f"laplace_posterior: expected outputs of the shape ({len(x)}, outputs), got "
                f"{tuple(outputs.shape)}"
            )
        root = _root(outputs.detach(), likelihood)
        self.rows += len(x)
        for column in root.unbind(-1) if self.seen else ():
            places = [output for _, output in self.seen.values()]
            found = torch.autograd.grad(
                (outputs * column).sum(), places, retain_graph=True, materialize_grads=True
            )
            for module, g in zip(self.seen, found, strict=True):
                self._add(module, 0, g.flatten(0, -2))
        for module, (a, _) in self.seen.items():
            ones = a.new_ones(len(a), 0 if module.bias is None else 1)
            self._add(module, 1, torch.cat([a, ones], 1))
        return outputs.detach()

    def _add(self, module: Any, place: int, rows: Tensor) -> None:
        sums = self.sums.setdefault(module, [torch.zeros(()), torch.zeros(())])
        sums[place] = sums[place] + rows.T @ rows

    def of(self, block: _Planned) -> tuple[Tensor, Tensor]:
        if block.module not in self.sums:
            raise ValueError(
                f"laplace_posterior: expected the data to pass {block.names[0]}, which was not "
                "used; freeze it by requires_grad_(False)"
            )
        outputs, inputs = self.sums[block.module]
        return outputs / self.rows, inputs


def _decomposed(block: _Planned, curvature: Any) -> _Block:
    if block.module is not None:
        (b, outputs), (a, inputs) = (torch.linalg.eigh(factor) for factor in curvature)
        return _Block(block.names, torch.outer(b, a).flatten(), factors=(outputs, inputs))
    if not block.full:
        return _Block(block.names, curvature)
    values, vectors = torch.linalg.eigh(curvature)
    return _Block(block.names, values, vectors)


def _root(outputs: Tensor, likelihood: str) -> Tensor:
    """A root of the Hessian of the loss in the outputs, (N, outputs, outputs), for noise 1."""
    if likelihood == "regression":
        return (
            torch.eye(outputs.shape[1], dtype=outputs.dtype)
            .to(outputs)
            .expand(len(outputs), -1, -1)
        )
    p = outputs.softmax(1)
    return torch.diag_embed(p.sqrt()) - p[:, :, None] * p.sqrt()[:, None, :]


def _jacobians(model: nn.Module, names: list[list[str]], x: Tensor) -> list[Tensor]:
    """For each list of parameters the Jacobian of the outputs, (N, outputs, parameters).

    Each sample has weights of its own in one graph. `torch.func.jacrev` under `vmap` would do it,
    but its result has a wrong derivative in x for `layer_norm` (torch 2.13).
    """
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    follow = torch.is_grad_enabled() and x.requires_grad
    wanted = {
        name: parameters[name].expand(len(x), *parameters[name].shape).clone().requires_grad_()
        for group in names
        for name in group
    }

    def output(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(model, {**parameters, **weights}, (x[None],))[0]

    rows: list[Any] = []
    with torch.enable_grad():
        for column in vmap(output)(wanted, x).unbind(1) if wanted else ():
            rows.append(
                torch.autograd.grad(
                    column.sum(),
                    list(wanted.values()),
                    create_graph=follow,
                    retain_graph=True,
                    materialize_grads=True,
                )
            )
    stacked = (torch.stack(column, 1).flatten(2) for column in zip(*rows, strict=True))
    found = dict(zip(wanted, stacked, strict=True))
    empty = x.new_zeros(len(x), 1, 0)
    return [torch.cat([found[name] for name in group], 2) if group else empty for group in names]
