"""The applications against their peers: time, saved bytes, and errors against what is known.

`ode`: Lotka-Volterra, forward and backward, at 1e-9, against torchdiffeq and torchdyn, and compiled
against an own dopri5 that is compiled the same way. `ode_network`: a network 2-50-2, forward and
backward, at 1e-7. `ode_samples`: 256 systems with steps of their own, forward, against torchode.
`ode_errors`: outputs between steps and events of an oscillator, in units of the tolerance.
`meta`: 25 sinusoid tasks adapted by 20 steps, and 4 with many points by 16 and 64 steps, against
TorchOpt and higher. `attacks`: PGD on digits at equal steps against torchattacks, and linear models
against their exact rates, with foolbox.
What is not installed is left out (benchmarks/requirements.txt). Writes records to
autograd_lib/report/records/.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from autograd_lib import (
    Comparison,
    Ratio,
    adapt,
    attack,
    compare,
    minimal_perturbation,
    solve_ode,
)
from autograd_lib.report import RECORDS
from autograd_lib.report.stored import this_environment

Thunk = Callable[[], Any]
Goal = tuple[str, float, float | Ratio | None]  # what, at most, found

DOPRI5, COMPILED = "torchdiffeq dopri5", "solve_ode, compiled"
RATES = torch.tensor([1.5, 1.0, 1.0, 3.0], dtype=torch.float64)


def peer(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as err:
        print(f"{name} is left out: {err}", flush=True)
        return None


def lotka_volterra(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
    prey, predators = y.unbind(-1)
    return torch.stack(
        [prey * (p[..., 0] - p[..., 1] * predators), predators * (p[..., 2] * prey - p[..., 3])], -1
    )


class Equation(nn.Module):
    """A right-hand side in the form in which the peers take their parameters."""

    def __init__(self, rates: Tensor = RATES) -> None:
        super().__init__()
        self.rates = nn.Parameter(rates.clone())

    def forward(self, t: Tensor, y: Tensor, *_: Any, **__: Any) -> Tensor:
        return lotka_volterra(t, y, self.rates)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(2, 50), nn.Tanh(), nn.Linear(50, 2))

    def forward(self, t: Tensor, y: Tensor, *_: Any, **__: Any) -> Tensor:
        return self.layers(y)


@contextmanager
def counted_bytes(module: nn.Module) -> Iterator[dict[int, int]]:
    """Count the distinct storages that the graph saves, without those of the parameters."""
    known = {p.untyped_storage().data_ptr() for p in module.parameters()}
    sizes: dict[int, int] = {}
    kept = []

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept.append(x)  # alive, so that no other takes its address
            sizes[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield sizes


def solvers(module: nn.Module, y0: Tensor, end: float, tol: float) -> dict[str, Thunk]:
    """What returns the state at the end by each solver, the first the baseline."""
    t = torch.tensor([0.0, end], dtype=y0.dtype)
    options: dict[str, Any] = {"rtol": tol, "atol": tol}
    found: dict[str, Thunk] = {}
    if torchdiffeq := peer("torchdiffeq"):
        found["torchdiffeq dopri5"] = lambda: torchdiffeq.odeint(
            module, y0, t, method="dopri5", **options
        )[-1]
        found["torchdiffeq dopri8"] = lambda: torchdiffeq.odeint(
            module, y0, t, method="dopri8", **options
        )[-1]
        found["torchdiffeq dopri5, adjoint"] = lambda: torchdiffeq.odeint_adjoint(
            module, y0, t, method="dopri5", **options
        )[-1]
    if torchdyn := peer("torchdyn.numerics"):
        found["torchdyn dopri5"] = lambda: torchdyn.odeint(
            module, y0, t, solver="dopri5", **options
        )[1][-1]
    for name, extra in (
        ("own dopri5", {"method": "dopri5"}),
        ("own dopri5, compiled", {"method": "dopri5", "compile": True}),
        ("solve_ode", {}),
        ("solve_ode, compiled", {"compile": True}),
    ):
        found[name] = lambda extra=extra: solve_ode(module, y0, t, **options, **extra).ys[-1]
    return found


def backward_of(module: nn.Module, run: Thunk) -> Callable[[], list[Tensor]]:
    return lambda: list(torch.autograd.grad(run().sum(), list(module.parameters())))


def report(
    options: argparse.Namespace, name: str, runs: dict[str, Thunk], notes: dict[str, Any]
) -> Comparison:
    comparison = compare(runs, rounds=options.rounds)
    print(f"\n{name}\n{comparison}")
    for run, note in notes.items():
        print(f"{run}: " + ", ".join(f"{what} {value:.3g}" for what, value in note.items()))
    path = options.results / f"applications_{name}.json"
    comparison.to_json(path)
    record = json.loads(path.read_text(encoding="utf-8")) | {"notes": notes}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", flush=True)
    return comparison


def gradients(
    options: argparse.Namespace, name: str, problem: tuple[nn.Module, Tensor, float, float]
) -> tuple[Comparison, dict[str, dict[str, float]]]:
    """Compare forward and backward, with the bytes saved and the error of the gradient."""
    module, y0, end, _ = problem
    parameters = list(module.parameters())
    tight = solve_ode(module, y0, [0.0, end], order=24, rtol=1e-14, atol=1e-15).ys[-1]
    exact = torch.autograd.grad(tight.sum(), parameters)
    scale = max(g.abs().max().item() for g in exact)
    runs, notes = solvers(*problem), {}
    for run in runs:
        runs[run]()  # compiled, where it is
        with counted_bytes(module) as sizes:
            end_state = runs[run]()
        found = torch.autograd.grad(end_state.sum(), parameters)
        off = max((a - b).abs().max().item() for a, b in zip(found, exact, strict=True))
        notes[run] = {"saved_bytes": sum(sizes.values()), "gradient_error": off / scale}
    both = {
        run: lambda solve=solve: torch.autograd.grad(solve().sum(), parameters)
        for run, solve in runs.items()
    }
    return report(options, name, both, notes), notes


def ratio(comparison: Comparison, name: str, baseline: str) -> Ratio | None:
    if {name, baseline} <= set(comparison.names):
        return replace(comparison, baseline=baseline).ratios[name]
    return None


def ode(options: argparse.Namespace) -> list[Goal]:
    y0 = torch.ones(2, dtype=torch.float64)
    found, notes = gradients(options, "ode", (Equation(), y0, 10.0, 1e-9))
    goals: list[Goal] = [
        ("solve_ode / torchdiffeq dopri5", 0.6, ratio(found, "solve_ode", DOPRI5)),
        ("solve_ode / torchdiffeq's adjoint", 0.3, ratio(found, "solve_ode", f"{DOPRI5}, adjoint")),
        ("solve_ode compiled / torchdiffeq dopri5", 0.1, ratio(found, COMPILED, DOPRI5)),
        ("the same / own dopri5 compiled", 0.6, ratio(found, COMPILED, "own dopri5, compiled")),
    ]
    if DOPRI5 in notes:
        saved = notes["solve_ode"]["saved_bytes"] / notes[DOPRI5]["saved_bytes"]
        goals.append(("bytes saved / torchdiffeq dopri5", 0.01, saved))
    return goals


def ode_network(options: argparse.Namespace) -> list[Goal]:
    torch.manual_seed(0)
    network = Network().double()
    y0 = torch.randn(64, 2, dtype=torch.float64)
    found, notes = gradients(options, "ode_network", (network, y0, 1.0, 1e-7))
    goals: list[Goal] = [
        ("network: solve_ode / torchdiffeq dopri5", 1.0, ratio(found, "solve_ode", DOPRI5))
    ]
    if DOPRI5 in notes:
        errors, saved = (
            notes["solve_ode"][what] / notes[DOPRI5][what]
            for what in ("gradient_error", "saved_bytes")
        )
        goals.append(("network: gradient error / torchdiffeq dopri5", 0.1, errors))
        goals.append(("network: bytes saved / torchdiffeq dopri5", 0.01, saved))
    return goals


def ode_samples(options: argparse.Namespace) -> list[Goal]:
    generator = torch.Generator().manual_seed(0)
    spread = 0.5 + torch.rand(256, 4, dtype=torch.float64, generator=generator)
    module, y0 = Equation(RATES * spread), torch.ones(256, 2, dtype=torch.float64)
    t = torch.tensor([0.0, 10.0], dtype=torch.float64)
    runs: dict[str, Thunk] = {}
    if torchode := peer("torchode"):
        term = torchode.ODETerm(module)
        controller = torchode.IntegralController(atol=1e-9, rtol=1e-9, term=term)
        solver = torchode.AutoDiffAdjoint(torchode.Dopri5(term=term), controller)
        problem = torchode.InitialValueProblem(y0=y0, t_eval=t.expand(256, 2))
        runs["torchode dopri5"] = lambda: solver.solve(problem).ys[:, -1]
    tolerances: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-9}
    if torchdiffeq := peer("torchdiffeq"):
        runs[DOPRI5] = lambda: torchdiffeq.odeint(module, y0, t, method="dopri5", **tolerances)[-1]
    for name, extra in (
        ("own dopri5", {"method": "dopri5"}),
        ("solve_ode", {}),
        (COMPILED, {"compile": True}),
    ):
        runs[name] = lambda extra=extra: solve_ode(
            module, y0, t, per_sample=True, **tolerances, **extra
        ).ys[-1]
    with torch.no_grad():
        exact = solve_ode(module, y0, t, per_sample=True, rtol=1e-13, atol=1e-13).ys[-1]
        notes = {name: {"error": (run() - exact).abs().max().item()} for name, run in runs.items()}
        found = report(options, "ode_samples", runs, notes)
    return [
        ("256 systems: solve_ode / torchode", 0.5, ratio(found, "solve_ode", "torchode dopri5"))
    ]


def ode_errors(options: argparse.Namespace) -> list[Goal]:
    """Outputs between steps and events of y'' = -y, in units of the tolerance."""
    module = lambda t, y: torch.stack([y[1], -y[0]])  # noqa: E731
    start = torch.tensor([1.0, 0.0], dtype=torch.float64)
    t = torch.linspace(0, 10, 101, dtype=torch.float64)
    torchdiffeq, record, goals = peer("torchdiffeq"), {}, []
    for tol in (1e-6, 1e-9, 1e-12):
        tolerances: dict[str, Any] = {"rtol": tol, "atol": tol}
        crossed = lambda t, y: y[0]  # noqa: E731
        errors = {}
        for method in ("taylor", "dopri5"):
            found = solve_ode(module, start, t, method=method, **tolerances)
            event = solve_ode(module, start, [0, 3], method=method, event=crossed, **tolerances)
            errors[f"solve_ode, {method}"] = (found.ys, event.event_time)
        for method in ("dopri5", "dopri8") if torchdiffeq else ():
            ys = torchdiffeq.odeint(module, start, t, method=method, **tolerances)
            when, _ = torchdiffeq.odeint_event(
                *(module, start, t[0]), event_fn=crossed, method=method, **tolerances
            )
            errors[f"torchdiffeq {method}"] = (ys, when)
        for name, (ys, when) in errors.items():
            output = (ys[:, 0] - t.cos()).abs().max().item() / tol
            event = abs(when.item() - math.pi / 2) / tol
            record[f"{name} at {tol:g}"] = {"output": output, "event": event}
            print(
                f"{name} at {tol:g}: outputs off by {output:.3g}, event by {event:.3g} tolerances"
            )
            if name == "solve_ode, taylor":
                goals += [(f"outputs at {tol:g}, in tolerances", 1, output)]
                goals += [(f"event at {tol:g}, in tolerances", 1, event)]
    path = options.results / "applications_ode_errors.json"
    record = {"environment": this_environment(), "in_tolerances": record}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", flush=True)
    return goals


def sinusoids(tasks: int, points: int) -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Any, Any]]:
    torch.manual_seed(0)
    layers = nn.Linear(1, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
    amplitude, phase = torch.rand(tasks, 1, 1) * 4.9 + 0.1, torch.rand(tasks, 1, 1) * math.pi
    x = torch.rand(2, tasks, points, 1) * 10 - 5
    y = amplitude * torch.sin(x - phase)
    return nn.Sequential(*layers), (x[0], y[0]), (x[1], y[1])


def adapted(problem: Any, steps: int, **options: Any) -> Thunk:
    model, support, (inputs, targets) = problem
    parameters = list(model.parameters())

    def run() -> Any:
        fast = adapt(model, F.mse_loss, support, steps, 0.01, tasks=True, **options)
        found = torch.vmap(lambda w, x: functional_call(model, w, (x,)))(fast, inputs)
        loss = (found - targets).square().mean((1, 2)).sum()
        return torch.autograd.grad(loss, parameters)

    return run


def adapted_by_peers(problem: Any, steps: int) -> dict[str, Thunk]:
    model, support, query = problem
    parameters = list(model.parameters())
    runs: dict[str, Thunk] = {}
    if torchopt := peer("torchopt"):

        def by_torchopt() -> Any:
            optimizer = torchopt.MetaSGD(model, lr=0.01)
            states = [torchopt.extract_state_dict(o, by="reference") for o in (model, optimizer)]
            total = torch.zeros(())
            for x, y, inputs, targets in zip(*support, *query, strict=True):
                for _ in range(steps):
                    optimizer.step(F.mse_loss(model(x), y))
                total = total + F.mse_loss(model(inputs), targets)
                for part, state in zip((model, optimizer), states, strict=True):
                    torchopt.recover_state_dict(part, state)
            return torch.autograd.grad(total, parameters)

        runs["TorchOpt"] = by_torchopt
    if higher := peer("higher"):

        def by_higher() -> Any:
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            sums = [torch.zeros_like(p) for p in parameters]
            for x, y, inputs, targets in zip(*support, *query, strict=True):
                loop = higher.innerloop_ctx(model, optimizer, copy_initial_weights=False)
                with loop as (fast, steps_of):
                    for _ in range(steps):
                        steps_of.step(F.mse_loss(fast(x), y))
                    loss = F.mse_loss(fast(inputs), targets)
                    found = torch.autograd.grad(loss, parameters)
                sums = [a + b for a, b in zip(sums, found, strict=True)]
            return sums

        runs["higher"] = by_higher
    return runs


def meta(options: argparse.Namespace) -> list[Goal]:
    goals: list[Goal] = []
    peaks: dict[int, float] = {}
    for tasks, points, steps in ((25, 10, 20), (4, 400, 16), (4, 400, 64)):
        problem = sinusoids(tasks, points)
        runs = adapted_by_peers(problem, steps) | {"adapt": adapted(problem, steps)}
        if points > 10:
            runs["adapt, sqrt"] = adapted(problem, steps, checkpoint="sqrt")
        expected, notes = runs["adapt"](), {}
        for name, run in runs.items():
            pairs = zip(run(), expected, strict=True)
            off = max((a - b).abs().max().item() / b.abs().max().item() for a, b in pairs)
            notes[name] = {"difference": off}
        found = report(options, f"meta_{tasks}_{steps}", runs, notes)
        if points == 10:
            text = "25 tasks, 20 steps: adapt / TorchOpt"
            goals.append((text, 0.25, ratio(found, "adapt", "TorchOpt")))
            continue
        peaks[steps] = found.peak_bytes["adapt, sqrt"]
        if steps == 64 and "TorchOpt" in found.names:
            share = peaks[64] / found.peak_bytes["TorchOpt"]
            goals.append(("64 steps: peak of sqrt / TorchOpt's", 0.1, share))
            goals.append(("the same in time", 2.0, ratio(found, "adapt, sqrt", "TorchOpt")))
    goals.append(("peak of sqrt at 64 steps / at 16", 1.3, peaks[64] / peaks[16]))
    return goals


def trained_on_digits() -> tuple[nn.Module, Tensor, Tensor]:
    data = importlib.import_module("sklearn.datasets").load_digits()
    x = torch.tensor(data.images / 16, dtype=torch.float32)[:, None]
    y = torch.tensor(data.target)
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * 64, 10))
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x[:1200]), y[:1200]).backward()
        optimizer.step()
    return model.eval(), x[1200:1712], y[1200:1712]


def attacks(options: argparse.Namespace) -> list[Goal]:
    goals: list[Goal] = []
    model, x, y = trained_on_digits()
    runs: dict[str, Thunk] = {}
    notes: dict[str, dict[str, float]] = {}
    torchattacks = peer("torchattacks")
    for eps in (0.02, 0.05, 0.1, 0.2):
        rates = {"attack": attack(model, x, y, eps, bounds=(0, 1)).success.float().mean().item()}
        if torchattacks:
            theirs = torchattacks.PGD(model, eps=eps, alpha=2.5 * eps / 20, steps=20)
            wrong = model(theirs(x, y)).argmax(1) != y
            rates["torchattacks PGD"] = wrong.float().mean().item()
            text = f"digits at {eps}: success of torchattacks / attack"
            goals.append((text, 1.0, rates["torchattacks PGD"] / rates["attack"]))
        notes[f"success at {eps}"] = rates
    if torchattacks:
        pgd = torchattacks.PGD(model, eps=0.1, alpha=0.0125, steps=20)
        runs["torchattacks PGD"] = lambda: pgd(x, y)
    runs["attack"] = lambda: attack(model, x, y, 0.1, bounds=(0, 1))
    found = report(options, "attacks", runs, notes)
    goals.append(
        ("digits: time / torchattacks PGD", 1.1, ratio(found, "attack", "torchattacks PGD"))
    )

    torch.manual_seed(0)
    linear, points = nn.Linear(20, 2), torch.rand(200, 20)
    weight = (linear.weight[0] - linear.weight[1]).detach()
    logits = linear(points).detach()
    labels, gap = logits.argmax(1), (logits[:, 0] - logits[:, 1]).abs()
    exact = gap / weight.abs().sum() < 0.05
    for scale in (1.0, 1e3, 1e6):
        scaled = nn.Sequential(linear, Times(scale))
        missed = (attack(scaled, points, labels, 0.05).success != exact).sum().item()
        goals.append((f"linear, logits times {scale:g}: wrong verdicts", 0.0, float(missed)))
        if torchattacks:
            theirs = torchattacks.PGD(scaled, eps=0.05, alpha=0.00625, steps=20)
            rate = (scaled(theirs(points, labels)).argmax(1) != labels).float().mean()
            print(f"torchattacks PGD at {scale:g}: {rate:.3f} of {exact.float().mean():.3f}")
        if foolbox := peer("foolbox"):
            judged = foolbox.PyTorchModel(scaled, bounds=(0, 1))
            *_, hit = foolbox.attacks.LinfPGD(steps=20)(judged, points, labels, epsilons=0.05)
            print(f"foolbox LinfPGD at {scale:g}: {hit.float().mean():.3f}")
    smallest = minimal_perturbation(linear, points, labels).distance / (gap / weight.norm())
    goals.append(("linear: smallest distance / exact, largest", 1.002, smallest.max().item()))
    return goals


class Times(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def summary(goals: list[Goal]) -> None:
    print("\ngoals")
    for text, most, found in goals:
        low, high = (found.low, found.high) if isinstance(found, Ratio) else (found, found)
        verdict = "not measured" if found is None else "met" if high <= most else "missed"
        if found is not None and low <= most < high:
            verdict = "not told apart"
        shown = f"{found:.3g}" if isinstance(found, float) else found
        print(f"{text:50}  at most {most:<5g} {shown}  {verdict}")


PARTS: dict[str, Callable[[argparse.Namespace], list[Goal]]] = {
    "ode": ode,
    "ode_network": ode_network,
    "ode_samples": ode_samples,
    "ode_errors": ode_errors,
    "meta": meta,
    "attacks": attacks,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="threads within an operation")
    parser.add_argument("--rounds", type=int, default=9, help="of each comparison, at least 5")
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, default=list(PARTS), help="which to run"
    )
    parser.add_argument("--results", type=Path, default=RECORDS, help="where records are written")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    goals: list[Goal] = []
    for number, part in enumerate(options.parts, 1):
        print(f"part {number} of {len(options.parts)}: {part}", flush=True)
        goals += PARTS[part](options)
    summary(goals)


if __name__ == "__main__":
    main()
