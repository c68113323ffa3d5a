"""The times that the book's chapters draw, measured with the code that the chapters show.

`spread`, `adamw`, `profile`, `compile`, `channels`, `batch`, `recording`, `hooks`, `per_sample`: of
the chapter on benchmarking. `scaling`: an all-reduce and a step of one rank and of two
(distributed). `trials`: two searches of `autotune` (automatic_settings). `budget`: settings and
plans for half of the memory (demonstrations). `plans`: the checkpoint plans of a small
convolutional network under five budgets (checkpointing_amp), whose bytes and FLOPs the chapter
counts; only the choice among schedules that fit is made by time.

Everything is small, as on a page, so that a ratio says what the page explains and not more. Writes
autograd_lib/report/records/<chapter>_<what>.json: comparisons with their samples and the A/A run,
other times with every sample, all with device, versions and date.
"""

from __future__ import annotations

import argparse
import codecs
import contextlib
import copy
import importlib
import io
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, distributed, nn
from torch.func import functional_call, grad, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import profile, record_function
from torch.utils.checkpoint import checkpoint_sequential

from autograd_lib import (
    AdvancedAutogradExamples,
    Comparison,
    CustomTransformerModel,
    autotune,
    compare,
    peak_bytes,
    plan_checkpoints,
)
from autograd_lib.report import RECORDS, this_environment

MiB = 2**20
BATCH_SIZES = (1, 8, 64, 512, 1024, 1792)
TENSOR_SIZES = (1, 100, 3_000, 30_000)

Step = Callable[[], object]


def digits() -> tuple[Tensor, Tensor]:
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
    return nn.Sequential(*layers)


def narrow() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Linear(64, 64) for _ in range(40)))


def forward_backward(model: nn.Module, *batch: Tensor) -> Step:
    def step() -> None:
        outputs = model(batch[0])
        loss = outputs.sum() if len(batch) == 1 else F.cross_entropy(outputs, batch[1])
        loss.backward()
        model.zero_grad()

    return step


def seconds(run: Step, repeats: int) -> list[float]:
    """Of each of so many calls, after one that is not counted."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return times


def save(options: argparse.Namespace, name: str, found: Mapping[str, Any]) -> None:
    if options.quick:
        return
    record = {"environment": this_environment(), **found}
    path = options.results / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}", flush=True)


def race(
    options: argparse.Namespace, name: str, candidates: dict[str, Step], **choices: Any
) -> Comparison:
    choices = {"rounds": options.rounds, "threads": options.threads, "memory": False} | choices
    if options.quick:
        choices["rounds"] = 5
    comparison = compare(candidates, **choices)
    print(f"{name}\n{comparison}", flush=True)
    if not options.quick:
        comparison.to_json(options.results / f"{name}.json")
    return comparison


# ------------------------------------------------------------------ benchmarking


def spread(options: argparse.Namespace) -> None:
    step, times = forward_backward(classifier(), *(t[:256] for t in digits())), []
    for _ in range(300):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    save(options, "benchmarking_spread", {"seconds": times})


def adamw(options: argparse.Namespace) -> None:
    model = narrow()
    model(digits()[0][:8]).sum().backward()
    ways = {"one by one": {"foreach": False}, "foreach": {"foreach": True}}
    ways["fused"] = {"fused": True}
    steps: dict[str, Step] = {
        name: torch.optim.AdamW(model.parameters(), **way).step for name, way in ways.items()
    }
    race(options, "benchmarking_adamw", steps, memory=True)


def profiled(options: argparse.Namespace) -> None:
    model, (x, y) = classifier(), digits()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> Any:
        with profile() as found:
            for _ in range(20):
                with record_function("my forward"):
                    loss = F.cross_entropy(model(x[:256]), y[:256])
                with record_function("my backward"):
                    loss.backward()
                with record_function("my optimizer"):
                    optimizer.step()
        return found

    def part(event: Any) -> str | None:
        while event is not None and not event.key.startswith("my "):
            event = event.cpu_parent
        return event.key.removeprefix("my ") if event else None

    runs = []
    run()
    for _ in range(5 if options.quick else 15):
        times: dict[str, dict[str, float]] = {}
        for event in run().events():
            if event.key.startswith("aten::") and (where := part(event)):
                parts = times.setdefault(event.key.removeprefix("aten::"), {})
                parts[where] = parts.get(where, 0.0) + event.self_cpu_time_total / 20
        runs.append(times)
    save(options, "benchmarking_profile", {"microseconds": runs})


def compiled(options: argparse.Namespace) -> None:
    def curve(t: Tensor) -> Tensor:
        for _ in range(6):
            t = torch.sin(t) * 0.9 + torch.tanh(t) * 0.1
        return t.sum()

    def train(function: Callable[[Tensor], Tensor]) -> Step:
        return lambda: (function(data).backward(), setattr(data, "grad", None))

    torch.manual_seed(0)
    data = torch.randn(400_000, requires_grad=True)
    compiling = []
    for _ in range(1 if options.quick else 5):
        torch.compiler.reset()
        eager, fused = train(curve), train(torch.compile(curve))
        uncached = torch.compiler.config.patch(force_disable_caches=True)
        start = time.perf_counter()
        with uncached, warnings.catch_warnings(action="ignore"):
            fused()
        compiling.append(time.perf_counter() - start)
    race(options, "benchmarking_compile", {"eager": eager, "compiled": fused})
    if not options.quick:
        path = options.results / "benchmarking_compile.json"
        record = json.loads(path.read_text(encoding="utf-8")) | {"compile_seconds": compiling}
        path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def channels(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    picture = torch.randn(16, 16, 32, 32)
    first = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU())
    last = copy.deepcopy(first).to(memory_format=torch.channels_last)
    turned = picture.to(memory_format=torch.channels_last)
    torch.testing.assert_close(last(turned), first(picture), rtol=1e-4, atol=1e-5)
    steps = {
        "channels first": forward_backward(first, picture),
        "channels last": forward_backward(last, turned),
    }
    race(options, "benchmarking_channels", steps)


def batch(options: argparse.Namespace) -> None:
    model, (x, y), square = classifier(), digits(), torch.randn(512, 512)
    steps = {str(size): forward_backward(model, x[:size], y[:size]) for size in BATCH_SIZES}
    race(options, "benchmarking_batch", steps | {"product": lambda: square @ square})


def recording(options: argparse.Namespace) -> None:
    for size in TENSOR_SIZES:
        start = torch.ones(size, requires_grad=True)

        def run(start: Tensor = start) -> Tensor:
            result = start
            for _ in range(50):
                result = torch.sin(result)
            return result

        ways: dict[str, Step] = {
            "no_grad": torch.no_grad()(run),
            "inference_mode": torch.inference_mode()(run),
            "recorded": run,
        }
        race(options, f"benchmarking_recording_{size}", ways)


def hooks(options: argparse.Namespace) -> None:
    x, bare = digits()[0][:8], narrow()

    def for_each(parameters: list[Tensor], hook: Callable[..., None]) -> None:
        for parameter in parameters:
            parameter.register_hook(hook)

    def with_hooks(register: Callable[..., object]) -> Step:
        model, calls = narrow(), []
        register(list(model.parameters()), lambda *grads: calls.append(1))
        return forward_backward(model, x)

    def functional() -> Any:
        def total(weights: dict[str, Tensor]) -> Tensor:
            return functional_call(bare, weights, (x,)).sum()

        return grad(total)({name: p.detach() for name, p in bare.named_parameters()})

    steps: dict[str, Step] = {
        "forward only": lambda: bare(x),
        "no hook": with_hooks(lambda parameters, hook: None),
        "one for all": with_hooks(torch.autograd.graph.register_multi_grad_hook),
        "one for each": with_hooks(for_each),
        "torch.func.grad": functional,
    }
    race(options, "benchmarking_hooks", steps, baseline="no hook")


def per_sample(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    small = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    weights = {name: p.detach() for name, p in small.named_parameters()}
    few = [t[:64] for t in digits()]

    def loss(weights: dict[str, Tensor], sample: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(small, weights, (sample[None],)), target[None])

    def loop() -> Tensor:
        own, trained = list(small.parameters()), dict(small.named_parameters())
        samples = zip(*few, strict=True)
        grads = [torch.autograd.grad(loss(trained, *sample), own) for sample in samples]
        return torch.stack([torch.cat([g.flatten() for g in one]).norm() for one in grads])

    def vmapped() -> Tensor:
        grads = vmap(grad(loss), in_dims=(None, 0, 0))(weights, *few)
        return torch.cat([g.flatten(1) for g in grads.values()], 1).norm(dim=1)

    def by_norms() -> Tensor:
        entered, left, out = [], [], few[0]
        for module in small:
            if isinstance(module, nn.Linear):
                entered.append(out)
                out = module(out)
                left.append(out)
            else:
                out = module(out)
        deltas = torch.autograd.grad(F.cross_entropy(out, few[1], reduction="sum"), left)
        squares = [
            (1 + a.square().sum(1)) * d.square().sum(1)
            for a, d in zip(entered, deltas, strict=True)
        ]
        return torch.stack(squares).sum(0).sqrt().detach()

    for way in (vmapped, by_norms):
        torch.testing.assert_close(way(), loop(), rtol=1e-3, atol=1e-5)
    ways: dict[str, Step] = {way.__name__: way for way in (loop, vmapped, by_norms)}
    race(options, "benchmarking_per_sample", ways, memory=True)


# ------------------------------------------------------------------ distributed


def wide() -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(64, 512), nn.Tanh(), nn.Linear(512, 512), nn.Tanh(), nn.Linear(512, 10)
    return nn.Sequential(*layers)


def step_of_a_share(model: nn.Module, rank: int, ranks: int) -> Step:
    torch.manual_seed(0)
    xs, ys = torch.randn(2048, 64), torch.randint(10, (2048,))
    x, y = xs[rank::ranks], ys[rank::ranks]
    return lambda: F.cross_entropy(model(x), y).backward()


def one_of_two(rank: int, store: str, found: str, repeats: int, threads: int) -> None:
    torch.set_num_threads(threads)
    distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    small, large = torch.zeros(1), torch.zeros(2**20)
    model = DistributedDataParallel(wide())
    times = {
        "all_reduce of 4 bytes": seconds(lambda: distributed.all_reduce(small), repeats),
        "all_reduce of 4 MiB": seconds(lambda: distributed.all_reduce(large), repeats),
        "step of 2 ranks": seconds(step_of_a_share(model, rank, 2), repeats),
    }
    if rank == 0:
        Path(found).write_text(json.dumps(times), encoding="utf-8")
    distributed.destroy_process_group()


def scaling(options: argparse.Namespace) -> None:
    repeats = 5 if options.quick else 200
    with tempfile.TemporaryDirectory() as folder:
        found = f"{folder}/found.json"
        arguments = (f"{folder}/store", found, repeats, options.threads)
        torch.multiprocessing.spawn(one_of_two, arguments, nprocs=2)
        times = json.loads(Path(found).read_text(encoding="utf-8"))
    times["step of 1 rank"] = seconds(step_of_a_share(wide(), 0, 1), repeats)
    save(options, "distributed_scaling", {"seconds": times})
    for what, samples in times.items():
        print(f"{what:22} median {sorted(samples)[repeats // 2] * 1e3:.3f} ms", flush=True)


# ------------------------------------------------------------------ what searches and plans found


def trials(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    with contextlib.redirect_stdout(io.StringIO()):
        zen = importlib.import_module("this").s
    windows = torch.tensor(list(codecs.decode(zen, "rot13").encode())).unfold(0, 33, 26)[:32]
    reader = CustomTransformerModel(vocab_size=128, d_model=32, num_layers=4)

    def token_loss(logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())

    pair = windows[:, :-1].contiguous(), windows[:, 1:].contiguous()
    found = {}
    for name, limit in {"no budget": None, "2 MiB": 2 * MiB}.items():
        report = autotune(reader, pair, token_loss, memory_budget=limit, compile=False)
        print(f"{name}\n{report}", flush=True)
        found[name] = asdict(report)
    save(options, "automatic_settings_trials", found)


def budget(options: argparse.Namespace) -> None:
    found = AdvancedAutogradExamples.demonstrate_performance_optimization()
    plan = found["plan"]
    fields = ("budget", "predicted_bytes", "predicted_time", "plain_bytes", "plain_time")
    figures = {field: getattr(plan, field) for field in (*fields, "curve")}
    save(options, "demonstrations_budget", {"tuning": asdict(found["tuning"]), "plan": figures})


def blocks() -> Iterator[nn.Module]:
    for before, width, depth in ((1, 16, 4), (16, 32, 4), (32, 64, 3)):
        for number in range(depth):
            stride = 2 if number == 0 and before > 1 else 1
            conv = nn.Conv2d(width if number else before, width, 3, stride, padding=1, bias=False)
            yield nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())
    yield nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def plans(options: argparse.Namespace) -> None:
    torch.manual_seed(0)
    cnn = nn.Sequential(*blocks())
    pictures, classes = torch.randn(16, 1, 32, 32), torch.randint(10, (16,))

    def loss() -> Tensor:
        return F.cross_entropy(cnn(pictures), classes)

    def in_runs(count: int) -> Callable[[], None]:
        def step() -> None:
            outputs = checkpoint_sequential(cnn, count, pictures, use_reentrant=False)
            F.cross_entropy(outputs, classes).backward()
            cnn.zero_grad()

        return step

    limits = {str(count): 1.01 * peak_bytes(in_runs(count)) for count in (2, 3, 4, 6)}
    measured = plan_checkpoints(cnn, loss, budget=2**40)
    limits["least"] = measured.curve[0][0]
    found = {}
    for name, limit in limits.items():
        plan = measured.within(math.ceil(limit))
        found[name] = {"budget": plan.budget, "steps": plan.steps}
        print(f"{name}: {plan}", flush=True)
    save(options, "checkpointing_amp_plans", {"plans": found})


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "spread": spread,
    "adamw": adamw,
    "profile": profiled,
    "compile": compiled,
    "channels": channels,
    "batch": batch,
    "recording": recording,
    "hooks": hooks,
    "per_sample": per_sample,
    "scaling": scaling,
    "trials": trials,
    "budget": budget,
    "plans": plans,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1, help="threads within an operation")
    parser.add_argument("--rounds", type=int, default=48, help="of each comparison, at least 5")
    parser.add_argument(
        "--parts", nargs="*", choices=list(PARTS), default=list(PARTS), help="which to run"
    )
    parser.add_argument("--quick", action="store_true", help="few rounds, which write no record")
    parser.add_argument("--results", type=Path, default=RECORDS, help="where the records go")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for number, part in enumerate(options.parts, 1):
        print(f"part {number} of {len(options.parts)}: {part}", flush=True)
        PARTS[part](options)


if __name__ == "__main__":
    main()
