"""`autotune` against an exhaustive search of the same settings, on the book's three models.

The exhaustive search takes every precision, memory format, micro-batch (the whole batch to an
eighth), with a checkpoint plan where the budget calls for one, compiled and not, and times each of
those within budget and tolerance against the plain step, but for those that take three times as
long in a first look. What the two searches choose is then timed side by side. Writes
autograd_lib/report/records/tuning.json: per model and budget the two choices, the
ratio of their times, and what each search took. Before that it writes tuning_search.json: what a
search without compiling costs on a GPT of 6 layers of width 128, in plain steps per candidate.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autograd_lib import (
    Comparison,
    CustomCNNModel,
    CustomRNNModel,
    CustomTransformerModel,
    Settings,
    autotune,
    compare,
    peak_bytes,
    plan_checkpoints,
)
from autograd_lib.report import RECORDS, this_environment

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Plain steps for each candidate before races were bounded, on the CPU, by the share of the budget.
BEFORE = {1.0: 69.7, 0.4: 82.1}
HOPELESS = 3.0  # times the plain step: not timed any further
SCALE = {"fp16": 2.0**10}  # of the loss; gradients of these models then fit fp16

Problem = tuple[nn.Module, tuple[Tensor, Tensor], Callable[[Tensor, Tensor], Tensor]]


def transformer(quick: bool) -> Problem:
    width, length = (32, 16) if quick else (256, 128)
    tokens = torch.randint(0, 256, (8, length + 1))
    model = CustomTransformerModel(256, width, num_layers=4)
    return model, (tokens[:, :-1], tokens[:, 1:]), mean_over_tokens


def mean_over_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def cnn(quick: bool) -> Problem:
    channels, size = ((8, 8, 16), 8) if quick else ((32, 32, 64, 64, 128), 32)
    images = torch.randn(16, 3, size, size), torch.randint(0, 10, (16,))
    return CustomCNNModel(3, 10, channels=channels), images, F.cross_entropy


def rnn(quick: bool) -> Problem:
    width, length = (16, 8) if quick else (128, 64)
    series = torch.randn(32, length, 16), torch.randn(32, length, 4)
    return CustomRNNModel(16, width, 4), series, F.mse_loss


def step_of(problem: Problem, settings: Settings, keep: bool = False) -> Callable[[], None]:
    """One step of a copy of the model; `keep` leaves the gradient in `step.model`."""
    model, batch, loss_fn = problem
    model = settings.apply(copy.deepcopy(model))
    size = len(batch[0])
    pieces = list(zip(*(t.split(settings.micro_batch or size) for t in batch), strict=True))
    dtype, device = DTYPES[settings.precision], batch[0].device.type
    scale = SCALE.get(settings.precision, 1.0)

    def step() -> None:
        for x, y in pieces:
            with torch.autocast(device, dtype, enabled=dtype is not None):
                loss = loss_fn(model(x), y)
            (loss * (scale * len(x) / size)).backward()
        if not keep:
            model.zero_grad()

    step.model, step.scale = model, scale
    return step


def gradient(problem: Problem, settings: Settings) -> Tensor:
    step = step_of(problem, settings, keep=True)
    step()
    parameters = step.model.parameters()
    return (
        torch.cat([p.grad.double().flatten() for p in parameters if p.requires_grad]) / step.scale
    )


def exact_gradient(problem: Problem) -> Tensor:
    model, batch, loss_fn = problem
    batch = tuple(t.double() if t.is_floating_point() else t for t in batch)
    return gradient((copy.deepcopy(model).double(), batch, loss_fn), Settings())


def planned(problem: Problem, settings: Settings, budget: int) -> Settings | None:
    """The settings with the fastest plan that the budget allows."""
    model, (x, y), loss_fn = problem
    names = ("blocks", "layers")
    blocks = next((getattr(model, name) for name in names if hasattr(model, name)), None)
    if blocks is None:
        return None
    size = settings.micro_batch or len(x)
    dtype = DTYPES[settings.precision]

    def loss() -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled=dtype is not None):
            return loss_fn(model(x[:size]), y[:size])

    allowed = budget
    with suppress(ValueError):
        plan = plan_checkpoints(blocks, loss, 2**62, accumulate=size < len(x))
        for _ in range(3):
            plan = plan.within(allowed)
            found = replace(settings, checkpoint=plan.locate(model))
            excess = peak_bytes(step_of(problem, found)) - budget
            if excess <= 0:
                return found
            allowed -= excess
    return None


def exhaustive(problem: Problem, budget: int | None, options: argparse.Namespace) -> Settings:
    """The fastest of all, by its time relative to the plain step."""
    batch, exact = problem[1], exact_gradient(problem)
    images = batch[0].dim() == 4
    formats = ["contiguous_format", "channels_last"] if images else ["contiguous_format"]
    sizes = [None, *(len(batch[0]) // n for n in (2, 4, 8))]
    compilations = [False] if options.no_compile else [False, True]
    plain, ratios = step_of(problem, Settings()), {}
    for precision, memory_format, size in itertools.product(DTYPES, formats, sizes):
        settings = Settings(precision, size, memory_format=memory_format)
        try:
            error = (gradient(problem, settings) - exact).norm() / exact.norm()
            if not error <= options.tolerance:
                continue
            if (factor := look(step_of(problem, settings)) / look(plain)) > HOPELESS:
                print(f"  {factor:.1f} in a first look  {settings}", flush=True)
                continue
            if budget is not None and peak_bytes(step_of(problem, settings)) > budget:
                settings = planned(problem, settings, budget)
            for compiled in compilations if settings is not None else ():
                torch.compiler.reset()
                candidate = replace(settings, compile=compiled)
                step = step_of(problem, candidate)
                if budget is None or peak_bytes(step) <= budget:
                    pair = {"plain": plain, "candidate": step}
                    result = compare(pair, rounds=options.rounds, memory=False)
                    ratios[candidate] = result.ratios["candidate"].median
                    print(f"  {ratios[candidate]:.3f}  {candidate}", flush=True)
        except RuntimeError as error:  # fp16 has no kernel for some layers on the CPU
            print(f"  failed: {settings}: {str(error).splitlines()[0]:.80}", flush=True)
    return min(ratios, key=ratios.__getitem__)


def look(step: Callable[[], None]) -> float:
    """Seconds of the best of three steps, after one to warm up."""
    step()
    found = []
    for _ in range(3):
        start = time.perf_counter()
        step()
        found.append(time.perf_counter() - start)
    return min(found)


def judge(problem: Problem, found: dict[str, Settings], rounds: int) -> Comparison:
    torch.compiler.reset()
    steps = {name: step_of(problem, settings) for name, settings in found.items()}
    return compare(steps, baseline="exhaustive", rounds=rounds)


def cost_of_a_search(options: argparse.Namespace) -> None:
    """Plain steps for each candidate; the plain step is timed before and after the search."""
    torch.manual_seed(0)
    width, length = (32, 16) if options.quick else (128, 128)
    tokens = torch.randint(0, 256, (8, length + 1), device=options.device)
    model = CustomTransformerModel(256, width, num_layers=6).to(options.device)
    problem: Problem = (model, (tokens[:, :-1], tokens[:, 1:]), mean_over_tokens)
    plain, record = step_of(problem, Settings()), {}
    for share in options.shares:
        budget = None if share == 1 else int(share * peak_bytes(plain))
        before = look(plain)
        report = autotune(*problem, budget, options.tolerance, compile=False)
        step = (before + look(plain)) / 2
        steps = report.seconds / step / len(report.trials)
        print(
            f"search at {share:g} of the plain peak: {report.seconds:.1f} s, "
            f"{len(report.trials)} candidates, {steps:.1f} plain steps for each",
            flush=True,
        )
        record[f"{share:g} of the plain peak"] = {
            "plain_seconds": step,
            "seconds": report.seconds,
            "candidates": len(report.trials),
            "plain_steps_per_candidate": steps,
            "plain_steps_per_candidate_before": BEFORE.get(share),
        }
    if not options.quick:
        suffix = "" if options.device == "cpu" else f"_{options.device}"
        record["environment"] = this_environment()
        path = RECORDS / f"tuning_search{suffix}.json"
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"wrote autograd_lib/report/records/{path.name}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="threads within an operation")
    parser.add_argument("--rounds", type=int, default=24, help="of each comparison")
    parser.add_argument("--tolerance", type=float, default=2e-2, help="of the gradient")
    parser.add_argument(
        "--shares",
        nargs="*",
        type=float,
        default=[1.0, 0.4],
        help="budgets as shares of the plain peak; 1 is no budget",
    )
    parser.add_argument("--search-only", action="store_true", help="only what a search costs")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile")
    parser.add_argument(
        "--quick", action="store_true", help="small models, which show that it runs"
    )
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.no_compile = 5, True
    torch.set_num_threads(options.threads)
    cost_of_a_search(options)
    if options.search_only:
        return
    record = {}
    for make, share in itertools.product((transformer, cnn, rnn), options.shares):
        torch.manual_seed(0)
        model, batch, loss_fn = make(options.quick)
        batch = tuple(t.to(options.device) for t in batch)
        problem = (model.to(options.device), batch, loss_fn)
        budget = None if share == 1 else int(share * peak_bytes(step_of(problem, Settings())))
        name = f"{make.__name__} at {share:g} of the plain peak"
        print(f"\n{name} on {options.device}", flush=True)
        start = time.perf_counter()
        best = exhaustive(problem, budget, options)
        took = time.perf_counter() - start
        report = autotune(*problem, budget, options.tolerance, compile=not options.no_compile)
        result = judge(problem, {"exhaustive": best, "autotune": report.best}, options.rounds)
        ratio = result.ratios["autotune"]
        print(f"{report}\n{result}")
        print(f"exhaustive: {best} in {took:.0f} s; autotune: {report.seconds / took:.1%} of that")
        record[name] = {
            "budget": budget,
            "tolerance": options.tolerance,
            "exhaustive": asdict(best),
            "autotune": asdict(report.best),
            "ratio": ratio._asdict(),
            "noise": result.noise._asdict(),
            "peak_bytes": result.peak_bytes,
            "seconds": {"exhaustive": took, "autotune": report.seconds},
            "trials": [asdict(trial) for trial in report.trials],
            "environment": result.environment,
        }
        if not options.quick:  # after each, for the whole takes the better part of an hour
            suffix = "" if options.device == "cpu" else f"_{options.device}"
            path = RECORDS / f"tuning{suffix}.json"
            path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
            print(f"wrote autograd_lib/report/records/{path.name}", flush=True)


if __name__ == "__main__":
    main()
