"""Derivatives of higher order against nested differentiation and against the peers.

`directional_mlp`, `directional_transformer`: the derivatives of a loss along one direction of the
parameters up to order 1, 2, 4, 6, 8 in gradients: jet, jet compiled, nested reverse mode, nested
torch.func.jvp, jax.experimental.jet under jit, torch-jet. `tower_mlp`, `tower_transformer`: all
vectors up to order 2, 4, 6 (derivative_tower) against nested reverse mode, with the peak memory.
`hvp_mlp`, `hvp_transformer`: one Hessian-vector product, then 8 at one point, per vector.
`ggn_mlp`, `ggn_transformer`: one Gauss-Newton product. `solution`: the Taylor coefficients of an
ODE's solution to orders 8, 12, 16, against a loop over `jet`. `laplacian`: of a network of 50
variables, in forward passes.

All candidates of a comparison are checked to agree before they are timed. Peers that are not
installed are left out (benchmarks/requirements.txt); memory taken outside of PyTorch is not seen.
Writes a record of each comparison to autograd_lib/report/records/ and prints the goals at the end.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import itertools
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from autograd_lib import (
    Comparison,
    Ratio,
    compare,
    derivative_tower,
    ggn_product,
    hvp,
    jet,
    laplacian,
    linearize_hvp,
    taylor_solution,
)
from autograd_lib.higher_order.solution import RightHandSide
from autograd_lib.report import RECORDS

ORDERS = (1, 2, 4, 6, 8)
REVERSE_ORDERS = 4  # beyond, nested reverse mode costs hundreds of gradients
FORWARD_ORDERS = 3
VECTORS = 8
COMPOSITE = "composite gradient"  # by the operations that can be nested

Vector = dict[str, Tensor]
Thunk = Callable[[], Any]
Goal = tuple[str, float, Ratio]


# ------------------------------------------------------------------ what is differentiated


class Block(nn.Module):
    """A pre-norm transformer block, of the fused operations or of those that nest."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.composite_norm = False

    def norm(self, norm: nn.LayerNorm, x: Tensor) -> Tensor:
        if not self.composite_norm:
            return norm(x)
        # F.layer_norm has wrong derivatives without a word from the third order on in reverse
        # mode, and from the second on in forward mode (PyTorch 2.13).
        x = x - x.mean(-1, keepdim=True)
        return x * (x.square().mean(-1, keepdim=True) + norm.eps).rsqrt() * norm.weight + norm.bias

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(self.norm(self.norm1, x)).chunk(3, -1)
        q, k, v = (z.reshape(batch, tokens, self.heads, -1).transpose(1, 2) for z in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.down(F.gelu(self.up(self.norm(self.norm2, x))))


class Transformer(nn.Module):
    """A small causal language model; returns a row of logits per token."""

    def __init__(self, vocabulary: int = 100, width: int = 64, tokens: int = 32) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.02 * torch.randn(tokens, width))
        self.blocks = nn.ModuleList(Block(width, heads=4) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        self.math_attention = False  # the fused kernel has neither jvp nor double backward

    def forward(self, tokens: Tensor) -> Tensor:
        if self.math_attention:
            with sdpa_kernel(SDPBackend.MATH):
                return self.logits(tokens)
        return self.logits(tokens)

    def logits(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position
        for block in self.blocks:
            x = block(x)
        return self.head(self.blocks[0].norm(self.norm, x)).flatten(0, 1)


def mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@dataclass
class Problem:
    """A model with its batch, a direction, and the same model in operations that can be nested."""

    kind: str
    model: nn.Module
    twice: nn.Module  # may be differentiated twice in reverse mode
    nested: nn.Module  # may be differentiated any number of times
    inputs: Tensor
    targets: Tensor
    direction: Vector

    @classmethod
    def make(cls, kind: str, device: str, dtype: torch.dtype = torch.float32) -> Problem:
        """The same numbers whatever the precision."""
        torch.manual_seed(0)
        if kind == "mlp":
            model: nn.Module = mlp(64, 256, 256, 256, 10)
            inputs, targets = torch.randn(256, 64).to(dtype), torch.randint(10, (256,))
        else:
            model = Transformer()
            inputs, targets = torch.randint(100, (4, 32)), torch.randint(100, (4 * 32,))
        direction = {name: torch.randn_like(p) for name, p in model.named_parameters()}
        scale = norm(model.parameters()) / norm(direction.values())
        model = model.to(device, dtype)
        twice, nested = copy.deepcopy(model), copy.deepcopy(model)
        if kind != "mlp":
            twice.math_attention = nested.math_attention = True  # type: ignore[assignment]
            for module in nested.modules():
                if isinstance(module, Block):
                    module.composite_norm = True
        return cls(
            kind,
            model,
            twice,
            nested,
            inputs.to(device),
            targets.to(device),
            {name: (scale * v).to(device, dtype) for name, v in direction.items()},
        )

    @property
    def parameters(self) -> Vector:
        return {name: p.detach() for name, p in self.model.named_parameters()}

    def loss(self, parameters: Vector, model: nn.Module | None = None) -> Tensor:
        model = self.model if model is None else model
        outputs = torch.func.functional_call(model, parameters, (self.inputs,))
        return F.cross_entropy(outputs, self.targets)

    def nested_loss(self, parameters: Vector) -> Tensor:
        return self.loss(parameters, self.nested)

    def twice_loss(self, parameters: Vector) -> Tensor:
        return self.loss(parameters, self.twice)

    def gradients(self) -> dict[str, Thunk]:
        """What one step of training computes, the unit of all ratios; and by what can be nested."""

        def gradient(model: nn.Module) -> tuple[Tensor, ...]:
            loss = F.cross_entropy(model(self.inputs), self.targets)
            return torch.autograd.grad(loss, list(model.parameters()))

        units: dict[str, Thunk] = {"gradient": lambda: gradient(self.model)}
        if self.kind != "mlp":
            units[COMPOSITE] = lambda: gradient(self.nested)
        return units


def norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(t.detach().double().square().sum().item() for t in tensors))


def leaves(parameters: Vector) -> Vector:
    return {name: p.detach().requires_grad_() for name, p in parameters.items()}


# ------------------------------------------------------------------ the same models in JAX


@functools.cache
def say_once(text: str) -> None:
    print(text, flush=True)


def leave_out(name: str, error: Exception) -> None:
    say_once(f"{name} is left out: {type(error).__name__}: {str(error).splitlines()[0]}")


@functools.cache
def peer(name: str) -> Any:
    """A module that may not be installed."""
    try:
        return importlib.import_module(name)
    except (ImportError, SyntaxError) as error:  # torch-jet has the syntax of Python 3.12
        leave_out(name, error)
        return None


def jax_linear(p: Mapping[str, Any], name: str, x: Any) -> Any:
    return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]


def jax_norm(p: Mapping[str, Any], name: str, x: Any) -> Any:
    jax = peer("jax")
    x = x - x.mean(-1, keepdims=True)
    x = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)
    return x * p[f"{name}.weight"] + p[f"{name}.bias"]


def jax_mlp(p: Mapping[str, Any], x: Any) -> Any:
    layers = sorted(int(name.split(".")[0]) for name in p if name.endswith("weight"))
    for layer in layers[:-1]:
        x = peer("jax").numpy.tanh(jax_linear(p, str(layer), x))
    return jax_linear(p, str(layers[-1]), x)


def jax_transformer(p: Mapping[str, Any], tokens: Any) -> Any:
    jax = peer("jax")
    x = p["embedding.weight"][tokens] + p["position"]
    batch, length, width = x.shape
    causal = jax.numpy.tril(jax.numpy.ones((length, length), dtype=bool))
    for block in ("blocks.0", "blocks.1"):
        parts = jax_linear(p, f"{block}.qkv", jax_norm(p, f"{block}.norm1", x))
        parts = parts.reshape(batch, length, 3, 4, width // 4)
        q, k, v = (parts[:, :, i].transpose(0, 2, 1, 3) for i in range(3))
        scores = q @ k.transpose(0, 1, 3, 2) / math.sqrt(width // 4)
        weights = jax.nn.softmax(jax.numpy.where(causal, scores, -1e30), -1)
        mixed = (weights @ v).transpose(0, 2, 1, 3).reshape(batch, length, width)
        x = x + jax_linear(p, f"{block}.out", mixed)
        h = jax_linear(p, f"{block}.up", jax_norm(p, f"{block}.norm2", x))
        h = 0.5 * h * (1 + jax.lax.erf(h / math.sqrt(2)))
        x = x + jax_linear(p, f"{block}.down", h)
    return jax_linear(p, "head", jax_norm(p, "norm", x)).reshape(batch * length, -1)


def jax_arrays(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    return {name: peer("jax").numpy.asarray(t.detach().numpy()) for name, t in tensors.items()}


def jax_jet(problem: Problem, order: int) -> dict[str, Thunk]:
    """jax.experimental.jet of the loss in the parameters, and JAX's gradient; both compiled."""
    jax = peer("jax")
    taylor = peer("jax.experimental.jet")
    if jax is None or taylor is None or problem.inputs.device.type != "cpu":
        return {}
    model = jax_mlp if problem.kind == "mlp" else jax_transformer
    batch = jax_arrays({"x": problem.inputs, "y": problem.targets})
    parameters, direction = jax_arrays(problem.parameters), jax_arrays(problem.direction)
    names = list(parameters)

    def loss(*values: Any) -> Any:
        logits = model(dict(zip(names, values, strict=True)), batch["x"])
        rows = jax.nn.logsumexp(logits, axis=-1)
        return (rows - logits[jax.numpy.arange(len(rows)), batch["y"]]).mean()

    @jax.jit
    def derivatives(parameters: dict[str, Any], direction: dict[str, Any]) -> Any:
        series = [
            [direction[n], *[jax.numpy.zeros_like(direction[n])] * (order - 1)] for n in names
        ]
        first, rest = taylor.jet(loss, [parameters[n] for n in names], series)
        return [first, *rest]

    values = tuple(parameters.values())
    gradient = jax.jit(jax.grad(loss, argnums=tuple(range(len(values)))))
    return {
        "jax gradient, jit": lambda: jax.block_until_ready(gradient(*values)),
        "jax jet, jit": lambda: jax.block_until_ready(derivatives(parameters, direction)),
    }


# ------------------------------------------------------------------ derivatives along a direction


def nested_reverse(problem: Problem, order: int) -> list[Tensor]:
    """Each order is the derivative of the order before, by the gradient in the parameters."""
    at = leaves(problem.parameters)
    values = [problem.nested_loss(at)]
    for k in range(1, order + 1):
        slopes = torch.autograd.grad(values[-1], list(at.values()), create_graph=k < order)
        values.append(dot(slopes, problem.direction.values()))
    return [value.detach() for value in values]


def dot(xs: Iterable[Tensor], ys: Iterable[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(xs, ys, strict=True)]).sum()


def nested_jvp(problem: Problem, order: int) -> list[Tensor]:
    parameters, direction = problem.parameters, problem.direction

    def along(t: Tensor) -> list[Tensor]:
        return [problem.nested_loss({n: p + t * direction[n] for n, p in parameters.items()})]

    def lifted(f: Callable[[Tensor], list[Tensor]]) -> Callable[[Tensor], list[Tensor]]:
        def g(t: Tensor) -> list[Tensor]:
            values, slopes = torch.func.jvp(f, (t,), (torch.ones_like(t),))
            return [*values, slopes[-1]]

        return g

    f = along
    for _ in range(order):
        f = lifted(f)
    return f(next(iter(direction.values())).new_zeros(()))


def torch_jet(problem: Problem, order: int) -> Thunk | None:
    taylor = peer("jet")
    if taylor is None:
        return None
    parameters, direction = problem.parameters, problem.direction
    try:
        traced = taylor.jet(problem.nested_loss, (parameters,))
        seeds = {
            n: (p, direction[n], *[torch.zeros_like(p)] * (order - 1))
            for n, p in parameters.items()
        }
        run = torch.no_grad()(lambda: list(traced(seeds)))
        run()
    except Exception as error:
        leave_out("torch-jet", error)
        return None
    return run


def our_jet(problem: Problem, order: int) -> Thunk:
    parameters = problem.parameters
    return torch.no_grad()(lambda: jet(problem.loss, parameters, problem.direction, order))


def compiled_jet(problem: Problem, order: int) -> Thunk:
    """The operations that jet calls, recorded once as a graph, which torch.compile takes whole."""
    from torch._inductor import config, metrics  # noqa: PLC0415 - only where one is compiled
    from torch.fx.experimental.proxy_tensor import make_fx  # noqa: PLC0415

    def run(parameters: Vector, direction: Vector) -> tuple[Tensor, ...]:
        return jet(problem.loss, parameters, direction, order)

    arguments = (problem.parameters, problem.direction)
    metrics.reset()
    start = time.perf_counter()
    # Without its caches, for the time that it takes; of that it warns.
    with torch.no_grad(), config.patch(force_disable_caches=True), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "dynamo_pgo force disabled", UserWarning)
        graph = make_fx(run)(*arguments)
        traced = time.perf_counter()
        compiled = torch.compile(graph, fullgraph=True)
        compiled(*arguments)
    print(
        f"compiled jet of order {order}: {len(graph.graph.nodes)} nodes recorded in "
        f"{traced - start:.1f} s, {metrics.generated_kernel_count} kernels compiled in "
        f"{time.perf_counter() - traced:.1f} s, no graph break",
        flush=True,
    )
    return torch.no_grad()(lambda: compiled(*arguments))


def directional(options: argparse.Namespace, kind: str) -> list[Goal]:
    goals: list[Goal] = []
    problem = Problem.make(kind, options.device)
    wide = Problem.make(kind, options.device, torch.float64)
    for order in options.orders:
        expected = our_jet(wide, order)()
        candidates: dict[str, Thunk] = {"jet": our_jet(problem, order)}
        for name, way, most in (
            ("nested reverse", nested_reverse, REVERSE_ORDERS),
            ("nested jvp", nested_jvp, FORWARD_ORDERS),
        ):
            if order <= most:
                check(f"{name} of order {order}", way(wide, order), expected)
                candidates[name] = functools.partial(way, problem, order)
        if (run := torch_jet(wide, order) if kind == "mlp" else None) is not None:
            check(f"torch-jet of order {order}", run(), expected)
            candidates["torch-jet"] = torch_jet(problem, order)
        candidates |= jax_jet(problem, order)
        if order in options.compile:
            candidates["jet, compiled"] = compiled_jet(problem, order)
        for name in ("jet", "jax jet, jit", "jet, compiled"):
            if name in candidates:
                check(f"{name} of order {order}", candidates[name](), expected, rtol=1e-3)
        what = f"derivatives along a direction up to order {order}, {kind}, in gradients"
        found = report(
            options,
            what,
            f"directional_{kind}_{order}",
            problem.gradients() | candidates,
        )
        if order == 8:
            goals += in_gradients(found, f"{kind}: order 8 by jet", 5.5, "jet")
            if "jet, compiled" in candidates and "jax jet, jit" in candidates:
                against = replace(found, baseline="jax jet, jit").ratios["jet, compiled"]
                goals.append((f"{kind}: order 8 by compiled jet, in jax jets", 1.0, against))
    return goals


# ------------------------------------------------------------------ towers


def nested_tower(problem: Problem, order: int) -> list[tuple[Tensor, ...]]:
    at = leaves(problem.parameters)
    value, vectors = problem.nested_loss(at), []
    for k in range(1, order + 1):
        slopes = torch.autograd.grad(value, list(at.values()), create_graph=k < order)
        vectors.append(tuple(slope.detach() for slope in slopes))
        if k < order:
            value = dot(slopes, problem.direction.values())
    return vectors


def our_tower(problem: Problem, order: int) -> list[tuple[Tensor, ...]]:
    tower = derivative_tower(
        problem.model, F.cross_entropy, problem.inputs, problem.targets, order, problem.direction
    )
    return [tuple(vector.values()) for vector in tower]


def tower(options: argparse.Namespace, kind: str) -> list[Goal]:
    goals: list[Goal] = []
    problem = Problem.make(kind, options.device)
    wide = Problem.make(kind, options.device, torch.float64)
    for order in (2, 4, 6):
        candidates = {"derivative_tower": functools.partial(our_tower, problem, order)}
        if order <= REVERSE_ORDERS:
            check(f"towers of order {order}", our_tower(wide, order), nested_tower(wide, order))
            candidates["nested reverse"] = functools.partial(nested_tower, problem, order)
        what = f"all vectors up to order {order}, {kind}, in gradients"
        found = report(options, what, f"tower_{kind}_{order}", problem.gradients() | candidates)
        if order > 2:
            most = 9 if order == 4 else 20
            text = f"{kind}: all vectors up to order {order}"
            goals += in_gradients(found, text, most, "derivative_tower")
        if order == 6:
            peak = found.peak_bytes["derivative_tower"] / found.peak_bytes["gradient"]
            text = f"{kind}: peak memory at order 6, in gradients'"
            goals.append((text, 20, Ratio(peak, peak, peak)))
    return goals


# ------------------------------------------------------------------ Hessian-vector products


def double_backward(problem: Problem) -> tuple[Tensor, ...]:
    at = leaves(problem.parameters)
    slopes = torch.autograd.grad(problem.twice_loss(at), list(at.values()), create_graph=True)
    return torch.autograd.grad(slopes, list(at.values()), list(problem.direction.values()))


def jvp_of_grad(problem: Problem) -> Vector:
    at = (problem.parameters,)
    return torch.func.jvp(torch.func.grad(problem.twice_loss), at, (problem.direction,))[1]


def functional_hvp(problem: Problem) -> tuple[Tensor, ...]:
    parameters = problem.parameters

    def loss(*values: Tensor) -> Tensor:
        return problem.twice_loss(dict(zip(parameters, values, strict=True)))

    at, v = tuple(parameters.values()), tuple(problem.direction.values())
    return torch.autograd.functional.hvp(loss, at, v)[1]


def curvlinops_product(problem: Problem, operator: str) -> Thunk | None:
    curvlinops = peer("curvlinops")
    if curvlinops is None:
        return None
    model = problem.nested  # jvp of jacrev, of which it is built, is wrong in F.layer_norm
    try:
        product = getattr(curvlinops, operator)(
            model,
            nn.CrossEntropyLoss(),
            list(model.parameters()),
            [(problem.inputs, problem.targets)],
            check_deterministic=False,
        )
        v = list(problem.direction.values())
        product @ v
    except Exception as error:
        leave_out("curvlinops", error)
        return None
    return lambda: product @ v


def single_products(problem: Problem) -> dict[str, Thunk]:
    candidates: dict[str, Thunk | None] = {
        "hvp": lambda: hvp(problem.twice_loss, problem.parameters, problem.direction),
        "double backward": lambda: double_backward(problem),
        "torch.func.jvp of grad": lambda: jvp_of_grad(problem),
        "torch.autograd.functional.hvp": lambda: functional_hvp(problem),
        "curvlinops @ v": curvlinops_product(problem, "HessianLinearOperator"),
    }
    return {name: run for name, run in candidates.items() if run is not None}


def many_products(problem: Problem) -> dict[str, Thunk]:
    """Eight vectors at one point; what is built once for all is left out where a name says so."""
    parameters = problem.parameters
    generator = torch.Generator().manual_seed(1)

    def draw(v: Tensor) -> Tensor:
        return torch.randn(v.shape, generator=generator).to(v)

    columns = [{n: draw(v) for n, v in problem.direction.items()} for _ in range(VECTORS)]
    stacked = {n: torch.stack([column[n] for column in columns]) for n in parameters}
    product = linearize_hvp(problem.twice_loss, parameters)
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch.fx, about its own constants
        _, linear = torch.func.linearize(torch.func.grad(problem.twice_loss), parameters)
    print(f"torch.func.linearize took {time.perf_counter() - start:.2f} s to build", flush=True)

    def loop(product: Callable[[Vector], Vector]) -> Vector:
        results = [product(column) for column in columns]
        return {n: torch.stack([result[n] for result in results]) for n in parameters}

    return {
        "linearize_hvp, loop": lambda: loop(product),
        "linearize_hvp, loop, building included": lambda: loop(
            linearize_hvp(problem.twice_loss, parameters)
        ),
        "linearize_hvp, vmap": lambda: torch.vmap(product)(stacked),
        "torch.func.linearize, loop": lambda: loop(linear),
        "torch.func.linearize, vmap": lambda: torch.vmap(linear)(stacked),
        "hvp, loop": lambda: loop(lambda v: hvp(problem.twice_loss, parameters, v)),
    }


def products(options: argparse.Namespace, kind: str) -> list[Goal]:
    problem = Problem.make(kind, options.device)
    wide = Problem.make(kind, options.device, torch.float64)
    for make in (single_products, many_products):
        results = {name: run() for name, run in make(wide).items()}
        expected = next(iter(results.values()))
        for name, result in results.items():
            check(name, result, expected)
    baseline = problem.gradients()
    what = f"a Hessian-vector product, {kind}, in gradients"
    report(options, what, f"hvp_{kind}", baseline | single_products(problem))
    many = many_products(problem)
    what = f"{VECTORS} Hessian-vector products at one point, {kind}, in gradients"
    found = report(options, what, f"hvp_{kind}_{VECTORS}", baseline | many)
    for name in many:
        each = Ratio(*[r / VECTORS for r in found.ratios[name]])
        print(f"{name}: {each} gradients per vector")
    best = min(("linearize_hvp, loop", "linearize_hvp, vmap"), key=lambda name: found.medians[name])
    return in_gradients(found, f"{kind}: each of {VECTORS} products, {best}", 1.6, best, VECTORS)


# ------------------------------------------------------------------ Gauss-Newton products


def ggn_products(problem: Problem) -> dict[str, Thunk]:
    batch, v = (problem.inputs, problem.targets), problem.direction

    def build() -> Callable[[Vector], Vector]:
        return ggn_product(problem.model, F.cross_entropy, batch)

    def by_func() -> Vector:
        def outputs(parameters: Vector) -> Tensor:
            return torch.func.functional_call(problem.nested, parameters, (problem.inputs,))

        def slope(z: Tensor) -> Tensor:
            return torch.func.grad(F.cross_entropy)(z, problem.targets)

        z, pull, *_ = torch.func.vjp(outputs, problem.parameters)
        tangent = torch.func.jvp(outputs, (problem.parameters,), (v,))[1]
        return pull(torch.func.jvp(slope, (z,), (tangent,))[1])[0]

    product = build()
    candidates: dict[str, Thunk | None] = {
        "ggn_product": lambda: product(v),
        "ggn_product, building included": lambda: build()(v),
        "torch.func, jvp and vjp": by_func,
        "curvlinops @ v": curvlinops_product(problem, "GGNLinearOperator"),
    }
    return {name: run for name, run in candidates.items() if run is not None}


def gauss_newton(options: argparse.Namespace, kind: str) -> list[Goal]:
    results = ggn_products(Problem.make(kind, options.device, torch.float64))
    expected = results["torch.func, jvp and vjp"]()
    for name, run in results.items():
        check(name, run(), expected)
    problem = Problem.make(kind, options.device)
    candidates = problem.gradients() | ggn_products(problem)
    what = f"a Gauss-Newton product, {kind}, in gradients"
    found = report(options, what, f"ggn_{kind}", candidates)
    if "curvlinops @ v" not in candidates:
        return []
    shares = replace(found, baseline="curvlinops @ v").ratios
    names = ("ggn_product", "ggn_product, building included")
    return [(f"{kind}: {name}, in curvlinops' time", 0.5, shares[name]) for name in names]


# ------------------------------------------------------------------ solutions of ODEs


def lotka_volterra(t: Tensor, y: Tensor) -> Tensor:
    prey, predators = y.unbind(-1)
    return torch.stack([prey * (1.5 - predators), predators * (prey - 3)], -1)


def solution_by_jet(f: Callable[[Tensor, Tensor], Tensor], y0: Tensor, order: int) -> Tensor:
    """Each coefficient from a call of `jet` along the polynomial of those before."""
    zero, one = y0.new_zeros(()), y0.new_ones(())
    found = [y0]
    for k in range(order):

        def along(t: Tensor) -> Tensor:
            y = found[-1]
            for c in reversed(found[:-1]):
                y = c + t * y
            return f(t, y)

        found.append(jet(along, zero, one, k)[k] / math.factorial(k + 1))
    return torch.stack(found)


def solutions(options: argparse.Namespace) -> list[Goal]:
    goals: list[Goal] = []
    torch.manual_seed(0)
    net = mlp(2, 50, 2).to(options.device).requires_grad_(False)
    systems: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], Tensor]] = {
        "lotka_volterra": (lotka_volterra, torch.tensor([1.0, 1.2], device=options.device)),
        "mlp": (lambda t, y: net(y), torch.randn(64, 2).to(options.device)),
    }
    for (kind, (f, y0)), order in itertools.product(systems.items(), (8, 12, 16)):
        record, zero = RightHandSide(f, y0.new_zeros(()), y0), y0.new_zeros(())
        candidates: dict[str, Thunk] = {
            "jet in a loop": functools.partial(solution_by_jet, f, y0, order),
            "taylor_solution": functools.partial(taylor_solution, f, y0, order),
            "recorded before": functools.partial(record.coefficients, order, zero, y0),
        }
        if order in options.compile:
            graph = make_fx(lambda y: taylor_solution(f, y, order))(y0)  # noqa: B023 - called here
            candidates["compiled"] = functools.partial(torch.compile(graph), y0)
        expected = candidates["jet in a loop"]()
        for name, run in candidates.items():
            check(name, [torch.stack(list(run()))], [expected], rtol=1e-4)
        what = f"Taylor coefficients of a solution to order {order}, {kind}"
        found = report(options, what, f"solution_{kind}_{order}", candidates)
        shares = ((name, found.ratios[name]) for name in candidates if name != "jet in a loop")
        goals += [
            (f"{kind}: {name} to order {order}, in loops over jet", 0.05, share)
            for name, share in shares
        ]
    return goals


# ------------------------------------------------------------------ the Laplacian


def laplacians(device: str, dtype: torch.dtype) -> dict[str, Thunk]:
    torch.manual_seed(0)
    model = mlp(50, 256, 256, 256, 1).to(device, dtype).requires_grad_(False)
    batch = torch.randn(32, 50).to(device, dtype)

    def f(x: Tensor) -> Tensor:
        return model(x).squeeze(-1)

    def by_hessian(x: Tensor) -> Tensor:
        return torch.func.hessian(f)(x).diagonal().sum()

    def by_jvp(x: Tensor) -> Tensor:
        def along(v: Tensor) -> Tensor:
            def slope(x: Tensor) -> Tensor:
                return torch.func.jvp(f, (x,), (v,))[1]

            return torch.func.jvp(slope, (x,), (v,))[1]

        return torch.vmap(along)(torch.eye(50, dtype=dtype, device=device)).sum()

    candidates: dict[str, Thunk] = {
        "forward": lambda: f(batch),
        "laplacian": lambda: torch.vmap(lambda x: laplacian(f, x))(batch),
        "hessian, trace": lambda: torch.vmap(by_hessian)(batch),
        "nested jvp": lambda: torch.vmap(by_jvp)(batch),
    }
    if (taylor := peer("jet")) is not None:
        single = taylor.laplacian(f, (batch[0],))
        whole = taylor.jet(f, (batch,), collapsed=True)
        directions = torch.eye(50, dtype=dtype, device=device)[:, None].expand(50, 32, 50)
        candidates["torch-jet, collapsed"] = lambda: torch.vmap(single)(batch)
        candidates["torch-jet, collapsed, native batch"] = lambda: whole(
            (batch, directions, torch.zeros_like(batch))
        )[2]
    jax, folx = peer("jax"), peer("folx")
    if jax is not None and folx is not None and device == "cpu" and dtype == torch.float32:
        weights = jax_arrays(dict(model.named_parameters()))
        x = jax.numpy.asarray(batch.numpy())
        forward = folx.forward_laplacian(lambda x: jax_mlp(weights, x)[0], 0)
        whole_batch = jax.jit(jax.vmap(lambda x: forward(x).laplacian))
        candidates["folx, jit"] = lambda: jax.block_until_ready(whole_batch(x))
    return {name: torch.no_grad()(run) for name, run in candidates.items()}


def laplace(options: argparse.Namespace) -> list[Goal]:
    wide = laplacians(options.device, torch.float64)
    expected = wide["hessian, trace"]()
    for name in wide.keys() - {"forward"}:
        check(name, wide[name](), expected)
    candidates = laplacians(options.device, torch.float32)
    if "folx, jit" in candidates:
        check("folx", [candidates["folx, jit"]()], [expected], rtol=1e-3)
    found = report(
        options, "Laplacian, 50 variables, batch of 32, in forwards", "laplacian", candidates
    )
    return [("Laplacian of 50 variables, in forwards", 20, found.ratios["laplacian"])]


# ------------------------------------------------------------------ checks, reports


def flat(values: Any) -> Tensor:
    """All numbers of a tensor, an array, or any nesting of them."""
    if isinstance(values, Mapping):
        values = tuple(values.values())
    if isinstance(values, tuple | list):
        return torch.cat([flat(value) for value in values])
    if not isinstance(values, Tensor):  # of JAX
        values = torch.tensor(values.tolist())
    return values.detach().double().flatten().cpu()


def check(name: str, got: Any, expected: Any, rtol: float = 1e-6) -> None:
    """Each of several results by its own norm: they differ by orders of magnitude."""
    results, rights = (
        [flat(value) for value in (values.values() if isinstance(values, Mapping) else values)]
        for values in (got, expected)
    )
    for index, (mine, right) in enumerate(zip(results, rights, strict=True)):
        error = (mine - right).norm() / right.norm()
        if not error <= rtol:
            raise AssertionError(
                f"{name}: result {index} is off by {error:.1e}, more than {rtol:.0e}"
            )


class Flops(TorchDispatchMode):
    """FLOPs by PyTorch's formulas; its FlopCounterMode hooks modules, which torch.func forbids."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._overloadpacket.__name__.removesuffix("_")  # in place as out of place
        formula = flop_registry.get(getattr(torch.ops.aten, name, None))
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=result)
        return result


def flops(run: Thunk) -> int:
    with sdpa_kernel(SDPBackend.MATH), Flops() as counter:  # the fused one has no formula on CPU
        run()
    return counter.total


def report(
    options: argparse.Namespace, what: str, record: str, candidates: dict[str, Thunk]
) -> Comparison:
    with warnings.catch_warnings():
        # torch-jet and compiled graphs keep their last result, a few numbers, until the next call.
        warnings.filterwarnings("ignore", "peak_bytes: step freed", UserWarning)
        comparison = compare(candidates, rounds=max(5, options.rounds))
    print(f"\n{what}, on {options.device}\n{comparison}")
    unseen = ("jit", "compiled")  # by the counter of FLOPs, and JAX by that of memory
    base = flops(candidates[comparison.baseline])
    for name, run in candidates.items():
        if not any(word in name for word in unseen):
            peak = comparison.peak_bytes[name] / comparison.peak_bytes[comparison.baseline]
            counted = f"{flops(run) / base:.2f} of the FLOPs, " if base else ""
            print(f"{name}: {counted}{peak:.2f} of the peak")
    suffix = "" if options.device == "cpu" else f"_{options.device}"
    path = options.results / f"higher_order_{record}{suffix}.json"
    comparison.to_json(path)
    print(f"wrote {path}", flush=True)
    return comparison


def in_gradients(
    found: Comparison, text: str, most: float, name: str, parts: int = 1
) -> list[Goal]:
    """The goal against each of the gradients that were measured."""
    goals = []
    for unit in ("gradient", COMPOSITE):
        if unit in found.names:
            ratio = replace(found, baseline=unit).ratios[name]
            goals.append((f"{text}, in {unit}s", most, Ratio(*[r / parts for r in ratio])))
    return goals


def summary(goals: list[Goal]) -> None:
    print("\ngoals")
    width = max(len(text) for text, _, _ in goals)
    for text, most, ratio in goals:
        verdict = (
            "met" if ratio.high <= most else "missed" if ratio.low > most else "not told apart"
        )
        print(f"{text:{width}}  at most {most:<4g}  {ratio}  {verdict}")


PARTS: dict[str, Callable[[argparse.Namespace], list[Goal]]] = {
    "directional_mlp": lambda options: directional(options, "mlp"),
    "directional_transformer": lambda options: directional(options, "transformer"),
    "tower_mlp": lambda options: tower(options, "mlp"),
    "tower_transformer": lambda options: tower(options, "transformer"),
    "hvp_mlp": lambda options: products(options, "mlp"),
    "hvp_transformer": lambda options: products(options, "transformer"),
    "ggn_mlp": lambda options: gauss_newton(options, "mlp"),
    "ggn_transformer": lambda options: gauss_newton(options, "transformer"),
    "solution": solutions,
    "laplacian": laplace,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="threads within an operation, of JAX too",
    )
    parser.add_argument("--rounds", type=int, default=12, help="at least 5")
    parser.add_argument(
        "--parts", nargs="*", choices=list(PARTS), default=list(PARTS), help="which to run"
    )
    parser.add_argument(
        "--orders", type=int, nargs="*", default=list(ORDERS), help="of the directional parts"
    )
    parser.add_argument(
        "--compile",
        type=int,
        nargs="*",
        default=[8],
        help="the orders at which jet is compiled too, which takes a minute or more each",
    )
    parser.add_argument(
        "--results", type=Path, default=RECORDS, help="the directory for the records"
    )
    options = parser.parse_args()
    os.environ["NPROC"] = str(options.threads)  # read by XLA when JAX is imported
    torch.set_num_threads(options.threads)  # compiled code is made for the number that it finds
    goals: list[Goal] = []
    for number, part in enumerate(options.parts, 1):
        print(f"part {number} of {len(options.parts)}: {part}", flush=True)
        goals += PARTS[part](options)
    if goals:
        summary(goals)


if __name__ == "__main__":
    main()
