"""Custom Functions against what a user would write: bytes saved for backward, time, peak memory.

`activations`: those that save less, one step through a small residual network each. `surgery`: the
elementwise ones, one call each. `linear`: the model of a Function against F.linear. `implicit`: a
fixed point against its loop unrolled. `32k`, `50k` (classes): linear_cross_entropy against the pair
of calls F.linear and F.cross_entropy, against F.linear_cross_entropy with its default and with
chosen chunks, and against cut-cross-entropy where it is installed (benchmarks/requirements.txt).
Writes a record of each comparison to autograd_lib/report/records/.
"""

from __future__ import annotations

import argparse
import importlib
import math
import warnings
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import autograd_lib
from autograd_lib import compare, linear_cross_entropy, saved_tensors
from autograd_lib.report import RECORDS

# name -> (tokens, width, vocabulary, rounds for one round of the smaller size)
SIZES = {"32k": (2048, 256, 32000, 1.0), "50k": (4096, 256, 50257, 0.5)}

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def pair(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight), target)


def upstream(**options: int) -> Loss:
    """F.linear_cross_entropy in chunks."""
    chunks = nn.LinearCrossEntropyOptions(**options)
    return lambda x, weight, target: F.linear_cross_entropy(x, weight, target, options=chunks)


def heads() -> dict[str, Loss]:
    candidates: dict[str, Loss] = {"F.linear + F.cross_entropy": pair}
    if hasattr(F, "linear_cross_entropy"):
        candidates["F.linear_cross_entropy, default chunks"] = upstream()
        candidates["F.linear_cross_entropy, chunks of 256"] = upstream(batch_chunk_size=256)
    try:
        peer = importlib.import_module("cut_cross_entropy.torch_compile")
        candidates["cut-cross-entropy, torch_compile"] = peer.torch_compile_linear_cross_entropy
    except ImportError as err:
        print(f"cut-cross-entropy is left out: {err}", flush=True)
    return candidates | {"linear_cross_entropy": linear_cross_entropy}


def head(options: argparse.Namespace, size: str) -> None:
    """One training step of a head; the same gradients first."""
    tokens, width, vocabulary, share = SIZES[size]
    torch.manual_seed(0)
    x = torch.randn(tokens, width, device=options.device, requires_grad=True)
    model = nn.Linear(width, vocabulary, bias=False, device=options.device)
    target = torch.randint(vocabulary, (tokens,), device=options.device)
    parameters = (x, model.weight)
    candidates = heads()
    if share < 1:  # three times as long as all others, as the smaller size shows
        candidates.pop("F.linear_cross_entropy, default chunks", None)
    expected = torch.autograd.grad(pair(x, model.weight, target), parameters)
    steps, saved = {}, {}
    for name, loss_fn in candidates.items():
        loss, saved[name] = counted(model, lambda f=loss_fn: f(x, model.weight, target))
        for got, right in zip(torch.autograd.grad(loss, parameters), expected, strict=True):
            torch.testing.assert_close(got, right, rtol=1e-3, atol=1e-6)
        del loss

        def step(loss_fn: Loss = loss_fn) -> None:
            loss_fn(x, model.weight, target).backward()
            x.grad = model.weight.grad = None

        steps[name] = step
    del expected
    what = f"head of {tokens} tokens, width {width}, vocabulary {vocabulary}"
    report(options, what, f"functions_head_{size}", (steps, saved), share)


def chain(model: nn.ModuleList, activation: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    for layer in model:
        x = x + activation(layer(x))  # so that no linear layer saves the activation's output
    return x.sum()


def activations(options: argparse.Namespace) -> None:
    """A residual network: what the activation adds to the bytes saved, and what that costs."""
    torch.manual_seed(0)
    model = nn.ModuleList(nn.Linear(512, 512, device=options.device) for _ in range(4))
    x = torch.randn(1024, 512, device=options.device)
    for name, usual in {"relu": F.relu, "gelu": F.gelu, "silu": F.silu}.items():
        steps, saved = {}, {}
        ours = getattr(autograd_lib, f"low_memory_{name}")
        for label, activation in {f"F.{name}": usual, f"low_memory_{name}": ours}.items():

            def step(activation: Callable[[Tensor], Tensor] = activation) -> None:
                chain(model, activation, x).backward()
                model.zero_grad()

            steps[label] = step
            _, saved[label] = counted(model, lambda f=activation: chain(model, f, x))
        report(options, f"{name} in a residual network", f"functions_{name}", (steps, saved))


class Call(nn.Module):
    """A function as a module, so that its argument is left out of the bytes saved."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def where_log1mexp(x: Tensor) -> Tensor:
    small = x > -math.log(2)
    return torch.where(
        small,
        torch.log(-torch.expm1(torch.where(small, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(small, -1.0, x))),
    )


def where_sqrt(x: Tensor) -> Tensor:
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def where_norm(x: Tensor) -> Tensor:
    square = x.square().sum()
    return torch.where(square > 0, torch.where(square > 0, square, 1.0).sqrt(), 0.0)


def hooked_clip(x: Tensor) -> Tensor:
    y = x.view_as(x)
    y.register_hook(lambda grad: grad.clamp(-0.5, 0.5))
    return y


def surgery(options: argparse.Namespace) -> None:
    """One call on a million elements, against the composition that means the same."""
    torch.manual_seed(0)
    x = -torch.rand(1024, 1024, device=options.device)
    cases: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], Tensor]] = {
        "scale_gradient": (
            lambda x: x * 0.25 + (x * 0.75).detach(),
            lambda x: autograd_lib.scale_gradient(x, 0.25),
            x,
        ),
        "reverse_gradient": (lambda x: (2 * x).detach() - x, autograd_lib.reverse_gradient, x),
        "clip_gradient": (hooked_clip, lambda x: autograd_lib.clip_gradient(x, max_value=0.5), x),
        "straight_through": (
            lambda x: x + (x.round() - x).detach(),
            lambda x: autograd_lib.straight_through(x, torch.round),
            x,
        ),
        "log1mexp": (where_log1mexp, autograd_lib.log1mexp, x),
        "safe_sqrt": (where_sqrt, autograd_lib.safe_sqrt, -x),
        "safe_norm": (where_norm, autograd_lib.safe_norm, x),
    }
    for name, (usual, ours, values) in cases.items():
        leaf = values.clone().requires_grad_()
        steps, saved = {}, {}
        for label, function in {"composition": usual, name: ours}.items():
            module = Call(function)

            def step(module: Call = module, leaf: Tensor = leaf) -> Tensor:
                return torch.autograd.grad(module(leaf).sum(), leaf)[0]

            steps[label] = step
            _, saved[label] = counted(module, lambda m=module, x=leaf: m(x))
        torch.testing.assert_close(steps[name](), steps["composition"](), rtol=1e-3, atol=1e-5)
        report(options, f"{name} of {x.numel():,} elements", f"functions_{name}", (steps, saved))


def linear_layer(options: argparse.Namespace) -> None:
    """The model of a Function against F.linear, the weight trained and frozen."""
    torch.manual_seed(0)
    model = nn.Linear(512, 512, bias=False, device=options.device)
    x = torch.randn(1024, 512, device=options.device, requires_grad=True)
    for trained in (True, False):
        model.weight.requires_grad_(trained)
        wanted = [x, model.weight] if trained else [x]
        steps, saved = {}, {}
        for label, product in {
            "F.linear": F.linear,
            "CustomAutogradFunction": autograd_lib.CustomAutogradFunction.apply,
        }.items():

            def step(product: Callable = product, wanted: list[Tensor] = wanted) -> object:
                return torch.autograd.grad(product(x, model.weight).square().sum(), wanted)

            steps[label] = step
            _, saved[label] = counted(Call(product), lambda f=product: f(x, model.weight))
        name = "trained" if trained else "frozen"
        report(
            options, f"a linear layer, weight {name}", f"functions_linear_{name}", (steps, saved)
        )


def equilibrium(options: argparse.Namespace) -> None:
    """A fixed point by implicit differentiation against forty steps unrolled."""
    torch.manual_seed(0)
    weight = torch.randn(256, 256, device=options.device)
    weight = nn.Parameter(0.7 * weight / torch.linalg.matrix_norm(weight, 2))
    start = torch.zeros(128, 256, device=options.device)
    shift = torch.randn(128, 256, device=options.device)

    def layer(z: Tensor, weight: Tensor) -> Tensor:
        return torch.tanh(z @ weight + shift)

    def unrolled() -> Tensor:
        z = start
        for _ in range(40):
            z = layer(z, weight)
        return z

    solvers = {
        "40 steps unrolled": unrolled,
        "fixed_point": lambda: autograd_lib.fixed_point(layer, start, weight),
    }
    steps = {
        name: lambda f=f: torch.autograd.grad(f().square().sum(), weight)[0]
        for name, f in solvers.items()
    }
    saved = {name: counted(nn.Identity(), f)[1] for name, f in solvers.items()}
    torch.testing.assert_close(*[step() for step in steps.values()], rtol=1e-3, atol=1e-3)
    report(options, "a fixed point of 128 x 256", "functions_fixed_point", (steps, saved))


def counted(model: nn.Module, forward: Callable[[], Tensor]) -> tuple[Tensor, str]:
    """The loss, and what its forward saved for backward."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the blind spots are printed with the count
        with saved_tensors(model) as saved:
            loss = forward()
    notes = "".join(f"; {spot}" for spot in saved.blind_spots)
    return loss, f"{saved.total_bytes / 2**20:.2f} MiB{notes}"


def report(
    options: argparse.Namespace,
    what: str,
    record: str,
    measured: tuple[dict[str, Callable[[], object]], dict[str, str]],
    share: float = 1.0,
) -> None:
    steps, saved = measured
    rounds = max(5, round(share * options.rounds))
    comparison = compare(steps, rounds=rounds)
    print(f"\n{what} on {options.device}\n{comparison}")
    for name, count in saved.items():
        peak = comparison.peak_bytes[name] / comparison.peak_bytes[comparison.baseline]
        print(f"{name}: {peak:.3f} of the first one's peak; saved {count}")
    suffix = "" if options.device == "cpu" else f"_{options.device}"
    comparison.to_json(RECORDS / f"{record}{suffix}.json")
    print(f"wrote autograd_lib/report/records/{record}{suffix}.json", flush=True)


PARTS = {
    "activations": activations,
    "surgery": surgery,
    "linear": linear_layer,
    "implicit": equilibrium,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="threads within an operation")
    parser.add_argument("--rounds", type=int, default=12, help="of the smaller sizes, at least 5")
    parser.add_argument(
        "--parts",
        nargs="*",
        choices=[*PARTS, *SIZES],
        default=[*PARTS, *SIZES],
        help="which to run",
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for number, part in enumerate(options.parts, 1):
        print(f"part {number} of {len(options.parts)}: {part}", flush=True)
        if part in SIZES:
            head(options, part)
        else:
            PARTS[part](options)


if __name__ == "__main__":
    main()
