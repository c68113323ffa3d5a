"""Peak bytes, time and gradient error of what trades one for the other, side by side.

`gpt`: a GPT-like model (6 layers, width 256, sequence 256, batch 8): PyTorch's checkpoints (each
block, segments, selective), torch.compile with and without `activation_memory_budget`, bf16,
micro-batches, and plans at three budgets. `peers`: against each of these peers a plan that may use
what the peer uses. `cnn`: a chain of 13 unequal convolutions: plans against the square-root rule
and against checkpointing each block. `predictions`: the predicted against the measured peak of
every optimal plan of these models. `ilp`: plans against the selective checkpoints that the integer
program of `torch.distributed._tools` chooses, at equal bytes, on these models and on a chain of
unequal layers (it needs pulp and pwlf, see requirements.txt, and runs where these are). Writes
records to autograd_lib/report/records/.
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import itertools
import json
import logging
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from functools import partial
from io import StringIO
from typing import Any
from unittest import mock

import torch
import torch._functorch.config as functorch_config
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import (
    SAC_IGNORED_OPS,
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)
from torch.utils.flop_counter import FlopCounterMode

from autograd_lib import CheckpointPlan, compare, peak_bytes, plan_checkpoints
from autograd_lib.report import RECORDS, this_environment

MiB = 2**20
LAYERS, WIDTH, LENGTH, BATCH, VOCABULARY = 6, 256, 256, 8, 512

aten = torch.ops.aten
MATMULS = [aten.mm.default, aten.addmm.default, aten.bmm.default]
ATTENTION = [
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention.default,
    aten._scaled_dot_product_efficient_attention.default,
]

Step = Callable[[], object]
Run = Callable[[nn.ModuleList, Tensor], Tensor]  # how the blocks are run


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class GPT(nn.Module):
    """The blocks run as `run` says."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block(WIDTH, 8) for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.run: Run = one_by_one

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        return self.head(self.norm(self.run(self.blocks, x)))


def one_by_one(blocks: nn.ModuleList, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x)
    return x


def each(blocks: nn.ModuleList, x: Tensor, context_fn: Any = None) -> Tensor:
    options = {} if context_fn is None else {"context_fn": context_fn}
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False, **options)
    return x


def segments(blocks: nn.ModuleList, x: Tensor, count: int) -> Tensor:
    return checkpoint_sequential(list(blocks), count, x, use_reentrant=False)


def selective(operations: list[Any]) -> Run:
    return partial(each, context_fn=partial(create_selective_checkpoint_contexts, operations))


class Candidate:
    """One way to make a training step of the model."""

    def __init__(
        self,
        model: nn.Module,
        batch: tuple[Tensor, Tensor],
        *,
        bf16: bool = False,
        micro_batch: int | None = None,
        compiled: float | None = None,
    ) -> None:
        self.model, self.batch, self.bf16 = model, batch, bf16
        self.micro_batch = micro_batch or len(batch[0])
        self.loss_of = self.loss if compiled is None else self.compile(compiled)

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return F.cross_entropy(self.model(x).flatten(0, -2), y.flatten())

    def compile(self, budget: float) -> Callable[[Tensor, Tensor], Tensor]:
        """Compile with a code object of its own: what is compiled for one budget is found again
        for another, as the budget is not among the guards.
        """
        scope: dict[str, Any] = {"loss": self.loss}
        exec("def own(x, y):\n    return loss(x, y)", scope)
        compiled = torch.compile(scope["own"])
        with functorch_config.patch(activation_memory_budget=budget):
            compiled(*self.batch).backward()
        self.model.zero_grad()
        return compiled

    def whole_loss(self) -> Tensor:
        return self.loss_of(*self.batch)

    def backward(self) -> None:
        x, y = self.batch
        for part, target in zip(x.split(self.micro_batch), y.split(self.micro_batch), strict=True):
            (self.loss_of(part, target) * (len(part) / len(x))).backward()

    def step(self) -> None:
        self.backward()
        self.model.zero_grad()

    def planned(self, budget: int) -> Candidate:
        """Apply the plan of a budget."""
        return self.following(plan_checkpoints(self.model.blocks, self.whole_loss, budget))

    def following(self, plan: CheckpointPlan) -> Candidate:
        self.plan = plan
        plan.apply(self.model)
        return self


def gradient_error(candidate: Candidate, reference: list[Tensor]) -> float:
    """Relative L2 error over all parameters."""
    candidate.backward()
    found = [p.grad.double() for p in candidate.model.parameters()]
    candidate.model.zero_grad()
    difference = sum(float((a - b).square().sum()) for a, b in zip(found, reference, strict=True))
    return math.sqrt(difference / sum(float(b.square().sum()) for b in reference))


def exact_gradient(model: nn.Module, batch: tuple[Tensor, Tensor]) -> list[Tensor]:
    x, y = batch
    candidate = Candidate(
        copy.deepcopy(model).double(), (x.double() if x.is_floating_point() else x, y)
    )
    candidate.backward()
    return [p.grad for p in candidate.model.parameters()]


def gpt(options: argparse.Namespace) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    torch.manual_seed(0)
    tokens = torch.randint(VOCABULARY, (2, BATCH, LENGTH), device=options.device)
    return GPT().to(options.device), (tokens[0], tokens[1])


def cnn(options: argparse.Namespace) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Thirteen convolutions: the first ones large and cheap, the last ones small and costly."""
    torch.manual_seed(0)
    widths = [16, 16, 32, 32, 32, 64, 64, 64, 128, 128, 128, 256, 256]
    halved = {2, 5, 8, 11}
    blocks, channels = nn.Sequential(), 3
    for index, width in enumerate(widths):
        convolution = nn.Conv2d(channels, width, 3, 2 if index in halved else 1, 1, bias=False)
        blocks.append(nn.Sequential(convolution, nn.BatchNorm2d(width), nn.ReLU()))
        channels = width
    model = nn.Sequential()
    model.blocks = blocks
    model.head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))
    x = torch.randn(16, 3, 64, 64, device=options.device)
    return model.to(options.device), (x, torch.randint(10, (16,), device=options.device))


def chain(options: argparse.Namespace) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Twelve blocks of unequal width: what a block costs in bytes says nothing of its seconds."""
    torch.manual_seed(0)
    widths = [256, 512, 128, 384, 640, 256, 512, 192, 768, 256, 448, 320, 256]
    blocks = nn.Sequential()
    for inputs, outputs in itertools.pairwise(widths):
        layers = nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.GELU(), nn.Tanh()
        blocks.append(nn.Sequential(*layers))
    model = nn.Sequential()
    model.blocks, model.head = blocks, nn.Linear(widths[-1], 10)
    x = torch.randn(2048, widths[0], device=options.device)
    return model.to(options.device), (x, torch.randint(10, (2048,), device=options.device))


class Build:
    """Candidates of one model, each on a copy of its own."""

    def __init__(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
        self.model, self.batch = model, batch

    def __call__(self, run: Run | None = None, **options: Any) -> Candidate:
        model = copy.deepcopy(self.model)
        if run is not None:
            model.run = run
        return Candidate(model, self.batch, **options)

    def with_compiled_blocks(self) -> Candidate:
        candidate = self()
        for block in candidate.model.blocks:
            block.compile()
        candidate.step()
        return candidate


def run_gpt(options: argparse.Namespace) -> None:
    """Everything against the plain step."""
    build = Build(*gpt(options))
    plain = build()
    peak = peak_bytes(plain.step)
    candidates = {"plain": plain, **gpt_peers(build)}
    candidates["bf16"] = build(bf16=True)
    plan = plan_checkpoints(plain.model.blocks, plain.whole_loss, 2**62)  # measured once
    for share in (0.8, 0.5, 0.35):
        candidates[f"plan at {share} of plain"] = build().following(plan.within(int(share * peak)))
    candidates["micro-batches of 2"] = build(micro_batch=2)
    candidates["bf16, plan at 0.35 of plain"] = build(bf16=True).planned(int(0.35 * peak))
    report(options, "gpt", candidates, exact_gradient(build.model, build.batch))


def gpt_peers(build: Build) -> dict[str, Candidate]:
    return {
        "checkpoint each block": build(each),
        "checkpoint_sequential, 2 segments": build(partial(segments, count=2)),
        "checkpoint_sequential, 3 segments": build(partial(segments, count=3)),
        "selective, matmuls saved": build(selective(MATMULS)),
        "selective, matmuls and attention saved": build(selective([*MATMULS, *ATTENTION])),
        "compile": build(compiled=1.0),
        "compile, activation_memory_budget=0.5": build(compiled=0.5),
        "compile, activation_memory_budget=0.3": build(compiled=0.3),
    }


def run_peers(options: argparse.Namespace) -> None:
    """Each peer against a plan that may use as much, eager or with compiled blocks as the peer."""
    build = Build(*gpt(options))
    reference = exact_gradient(build.model, build.batch)
    for number, (name, peer) in enumerate(gpt_peers(build).items()):
        budget = peak_bytes(peer.step)
        ours = build.with_compiled_blocks() if name.startswith("compile") else build()
        try:
            ours.planned(budget)
        except ValueError as err:
            print(f"{name}: {err}", flush=True)
            continue
        report(options, f"peer_{number}", {name: peer, "plan": ours}, reference)


def run_cnn(options: argparse.Namespace) -> None:
    """The rules of thumb against plans with the same bytes."""
    build = Build(*cnn(options))
    peers = {
        "square root (checkpoint_sequential, 4 segments)": partial(segments, count=4),
        "checkpoint each block": each,
    }
    candidates = {"plain": build()}
    for name, run in peers.items():
        peer = build()
        patch_forward(peer.model.blocks, run)
        candidates[name] = peer
        candidates[f"plan for {name.split(' (')[0]}"] = build().planned(peak_bytes(peer.step))
    report(options, "cnn", candidates, exact_gradient(build.model, build.batch))


def patch_forward(blocks: nn.Sequential, run: Run) -> None:
    children = list(blocks)
    blocks.forward = lambda x: run(children, x)


def run_predictions(options: argparse.Namespace) -> None:
    """The predicted against the measured peak, for every plan of a curve."""
    rows = []
    for name, make, extra in (
        ("gpt", gpt, {}),
        ("gpt, bf16", gpt, {"bf16": True}),
        ("cnn", cnn, {}),
    ):
        candidate = Build(*make(options))(**extra)
        plan = plan_checkpoints(candidate.model.blocks, candidate.whole_loss, 2**62)
        found = []
        for budget, seconds in plan.curve:
            point = plan.within(budget)
            point.apply(candidate.model)
            measured = peak_bytes(candidate.step)
            found.append(point.predicted_bytes / measured)
            rows.append(
                {
                    "model": name,
                    "steps": str(point.steps),
                    "predicted_bytes": point.predicted_bytes,
                    "measured_bytes": measured,
                    "predicted_time_ratio": seconds / plan.plain_time,
                }
            )
        print(
            f"{name}: {len(found)} plans from {plan.curve[0][0] / MiB:.1f} to "
            f"{plan.curve[-1][0] / MiB:.1f} MiB, predicted / measured peak "
            f"{min(found):.4f} to {max(found):.4f}",
            flush=True,
        )
    write("memory_predictions", options, {"plans": rows})


def run_ilp(options: argparse.Namespace) -> None:
    """PyTorch's integer program, and a plan that may use as many bytes as what it chose uses."""
    if missing := [name for name in ("pulp", "pwlf") if importlib.util.find_spec(name) is None]:
        print(f"left out, as {' and '.join(missing)} are not installed", flush=True)
        return
    rows = []
    for make in (gpt, cnn, chain):
        build = Build(*make(options))
        reference, plain = exact_gradient(build.model, build.batch), peak_bytes(build().step)
        start = time.perf_counter()
        program = IntegerProgram(make, options, build)
        seconds = {"ilp": time.perf_counter() - start}
        candidate, start = build(), time.perf_counter()
        plan = plan_checkpoints(candidate.model.blocks, candidate.whole_loss, 2**62)
        seconds["plan"] = time.perf_counter() - start
        for share in (0.9, 0.8, 0.65, 0.5):
            chosen = program.within(int(share * plain))
            if chosen is None:
                print(f"{make.__name__} at {share}: the ILP finds nothing", flush=True)
                continue
            peer, predicted = chosen
            peak = peak_bytes(peer.step)
            try:
                ours = build().following(plan.within(peak))
            except ValueError as err:
                print(f"{make.__name__} at {share}: {err}", flush=True)
                continue
            pair = {"ilp": peer, "plan": ours}
            errors = {name: gradient_error(c, reference) for name, c in pair.items()}
            flops = {name: flops_of(c.step) for name, c in pair.items()}
            result = compare({name: c.step for name, c in pair.items()}, rounds=options.rounds)
            rows.append(
                {
                    "model": make.__name__,
                    "share": share,
                    "budget": int(share * plain),
                    "planning_seconds": seconds,
                    "predicted_bytes": {"ilp": predicted, "plan": ours.plan.predicted_bytes},
                    "peak_bytes": result.peak_bytes,
                    "flops": flops,
                    "gradient_error": errors,
                    "medians": result.medians,
                    "ratio": result.ratios["plan"]._asdict(),
                    "noise": result.noise._asdict(),
                    "verdict": result.verdict("plan"),
                }
            )
            print(
                f"{make.__name__} at {share} of plain ({share * plain / MiB:.1f} MiB): ILP "
                f"{result.peak_bytes['ilp'] / MiB:.1f} MiB, plan "
                f"{result.peak_bytes['plan'] / MiB:.1f} MiB; time of the plan "
                f"{result.ratios['plan']} of the ILP's ({result.verdict('plan')}), FLOPs "
                f"{flops['plan'] / flops['ilp']:.3f}",
                flush=True,
            )
        print(f"{make.__name__}: planned in {seconds} s", flush=True)
    write("memory_ilp", options, {"rounds": options.rounds, "plans": rows})


class IntegerProgram:
    """The statistics of one model that `torch.distributed._tools` takes, and what it makes of them.

    Operators are timed one by one on the device, which its own code does on CUDA only: on the CPU
    `torch.cuda`'s events are replaced by the clock.
    """

    def __init__(self, make: Callable[..., Any], options: argparse.Namespace, build: Build) -> None:
        # ruff: noqa: PLC0415 - what these import is not installed everywhere
        from torch.distributed._tools.ilp_utils import aggregate_stats, parse_module_info
        from torch.distributed._tools.mem_tracker import MemTracker
        from torch.distributed._tools.runtime_estimator import RuntimeEstimator
        from torch.distributed._tools.sac_estimator import SACEstimator

        self.build, self.estimator = build, SACEstimator()
        self.parameter_bytes = sum(p.nbytes for p in build.model.parameters())
        device, runtime, memory = build.batch[0].device, RuntimeEstimator(), MemTracker()
        stay = mock.patch.object(nn.Module, "to", lambda module, device: module)
        with cpu_events(device), redirect_stdout(StringIO()), FakeTensorMode():
            with torch.device(device), stay:  # a fake module is made where it is, and cannot move
                model, batch = make(options)
            candidate = Candidate(model, batch)
            memory.track_external(model)
            with memory:
                for _ in range(2):
                    memory.reset_mod_stats()
                    candidate.step()
            with runtime("operator-level-benchmark"):
                candidate.step()
            with self.estimator("operator-level-benchmark"):
                candidate.whole_loss()
            info = aggregate_stats(model, memory, runtime, self.estimator, device)
        self.graph = parse_module_info(info)
        root = self.graph.nodes[0]["fqn"]
        self.units = [f"{root}.blocks.{i}" for i in range(len(build.model.blocks))]
        for node in self.graph.nodes:
            if node["fqn"] not in self.units:  # whose lines may be NaN, and do not matter
                node["n_segments"] = 0

    def within(self, budget: int) -> tuple[Candidate, int] | None:
        """A candidate with the checkpoints chosen, and the peak that was predicted."""
        from torch.distributed._tools.sac_ilp import (
            get_optimal_checkpointing_policy_per_module,
            sac_milp,
        )

        logging.getLogger("torch.distributed._tools.sac_ilp").setLevel(logging.ERROR)
        total = (budget + self.parameter_bytes) / 2**30
        discarded, _, peak = sac_milp(self.graph, total, ac_units=self.units)
        if peak < 0:
            return None
        candidate = self.build()
        for name, share in discarded.items():
            stats = self.estimator.sac_mod_stats[name]
            # Where operators in place leave it no solution, all of the block is recomputed.
            kept = get_optimal_checkpointing_policy_per_module(stats, 1 - share)
            kept = kept or [0] * len(stats.func_names)
            block = candidate.model.get_submodule(name.partition(".")[2])
            policy = partial(in_order, stats.func_names, kept)
            block.forward = partial(
                checkpoint, block.forward, use_reentrant=False, context_fn=policy
            )
        return candidate, peak - self.parameter_bytes


def in_order(names: list[str], kept: list[int]) -> tuple[Any, Any]:
    """Contexts that keep the results of operators by their place in the forward."""
    seen = Counter[bool]()

    def policy(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if operator in SAC_IGNORED_OPS:
            return CheckpointPolicy.PREFER_RECOMPUTE
        place = seen[ctx.is_recompute]
        seen[ctx.is_recompute] += 1
        assert operator._overloadpacket.__name__ == names[place], (operator, names[place])
        return CheckpointPolicy.MUST_SAVE if kept[place] else CheckpointPolicy.PREFER_RECOMPUTE

    # BatchNorm counts its batches in place.
    return create_selective_checkpoint_contexts(policy, allow_cache_entry_mutation=True)


@contextmanager
def cpu_events(device: torch.device) -> Iterator[None]:
    """The clock in place of CUDA's events, unless there is CUDA."""

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.time = 0.0

        def record(self, stream: object) -> None:
            self.time = time.perf_counter()

        def elapsed_time(self, end: Any) -> float:
            return 1e3 * (end.time - self.time)

    if device.type == "cuda":
        yield
        return
    with (
        mock.patch.object(torch.cuda, "Event", Event),
        mock.patch.object(torch.cuda, "current_stream", return_value=None),
        mock.patch.object(torch.cuda, "synchronize", return_value=None),
    ):
        yield


def flops_of(step: Step) -> int:
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def report(
    options: argparse.Namespace,
    record: str,
    candidates: dict[str, Candidate],
    reference: list[Tensor],
) -> None:
    errors = {name: gradient_error(c, reference) for name, c in candidates.items()}
    steps = {name: c.step for name, c in candidates.items()}
    comparison = compare(steps, rounds=options.rounds)
    print(f"\n{record} on {options.device}\n{comparison}")
    base = comparison.peak_bytes[comparison.baseline]
    for name, candidate in candidates.items():
        peak = comparison.peak_bytes[name]
        text = f"{name}: {peak / MiB:.1f} MiB, {peak / base:.3f} of the first one's peak"
        text += f", gradient error {errors[name]:.1e}"
        if plan := getattr(candidate, "plan", None):
            text += f"; predicted {plan.predicted_bytes / peak:.4f} of its peak"
        print(text, flush=True)
    suffix = "" if options.device == "cpu" else f"_{options.device}"
    path = RECORDS / f"memory_{record}{suffix}.json"
    comparison.to_json(path)
    written = json.loads(path.read_text())
    written["gradient_error"] = errors
    path.write_text(json.dumps(written, indent=1) + "\n")
    print(f"wrote autograd_lib/report/records/{path.name}", flush=True)


def write(record: str, options: argparse.Namespace, content: dict[str, Any]) -> None:
    suffix = "" if options.device == "cpu" else f"_{options.device}"
    path = RECORDS / f"{record}{suffix}.json"
    path.write_text(json.dumps({"environment": this_environment(), **content}, indent=1) + "\n")
    print(f"wrote autograd_lib/report/records/{path.name}", flush=True)


PARTS = {
    "gpt": run_gpt,
    "peers": run_peers,
    "cnn": run_cnn,
    "predictions": run_predictions,
    "ilp": run_ilp,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="threads within an operation")
    parser.add_argument("--rounds", type=int, default=16, help="of each comparison, at least 5")
    parser.add_argument(
        "--parts", nargs="*", choices=PARTS, default=list(PARTS), help="which to run"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for number, part in enumerate(options.parts, 1):
        print(f"part {number} of {len(options.parts)}: {part}", flush=True)
        PARTS[part](options)


if __name__ == "__main__":
    main()
