"""What the training system adds to a step: `train_step` against a bare loop of the same operations.

The bare loop is what one would write by hand around the same `NonFiniteGuard`, `GradientMonitor`,
autocast, `GradScaler`, clipping, fused AdamW and scheduler. Models: the CNN of configs/
digits_cnn.yaml with its batch of 64, a small Transformer over 32 x 64 characters, and an MLP so
small that Python is all its time; each in fp32 and bf16, and in fp16 on an accelerator (on the CPU
the MLP alone, for its fp16 is emulated). The batch lies ready.

Before anything is timed, both copies are checked to hold the same bits after the same steps. Writes
autograd_lib/report/records/training.json: for each case the ratio with its interval, that of the
baseline to itself, the seconds of a step, and all samples. Prints the goals.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from higher_order import Goal, summary
from torch import Tensor, nn

from autograd_lib import (
    AutogradTrainingSystem,
    Comparison,
    CustomCNNModel,
    CustomTransformerModel,
    GradientMonitor,
    NonFiniteGuard,
    compare,
    load_config,
)
from autograd_lib.report import RECORDS

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
CLIP_NORM = 1.0
CHECKED_STEPS = 3
BARE, OURS = "bare loop", "train_step"
GOALS = {"cnn": 1.02, "transformer": 1.02}  # the most that a step may take, in bare steps

Loss = Callable[[Tensor, Tensor], Tensor]
Problem = tuple[nn.Module, tuple[Tensor, Tensor], Loss]


def cnn(quick: bool) -> Problem:
    images, digits = torch.randn(64, 1, 8, 8), torch.randint(10, (64,))
    channels = (8, 8, 16) if quick else (32, 32, 64, 64)
    return CustomCNNModel(1, 10, channels=channels), (images, digits), nn.CrossEntropyLoss()


def mean_over_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def transformer(quick: bool) -> Problem:
    width, length = (32, 16) if quick else (128, 64)
    tokens = torch.randint(100, (32, length + 1))
    model = CustomTransformerModel(100, width, num_layers=2, max_length=length)
    return model, (tokens[:, :-1], tokens[:, 1:]), mean_over_tokens


def mlp(quick: bool) -> Problem:
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 10))
    return model, (torch.randn(16, 16), torch.randint(10, (16,))), nn.CrossEntropyLoss()


MODELS = {"cnn": cnn, "transformer": transformer, "mlp": mlp}


class Training:
    """A model with its batch, loss, optimizer and scheduler; the same numbers each time."""

    def __init__(self, kind: str, options: argparse.Namespace) -> None:
        torch.manual_seed(0)
        model, (inputs, targets), self.loss_fn = MODELS[kind](options.quick)
        self.model = model.to(options.device)
        self.inputs, self.targets = inputs.to(options.device), targets.to(options.device)
        # A step so small that both copies see much the same gradients, however often they step.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: 1.0)


def bare(training: Training, precision: str) -> Callable[[], object]:
    model, optimizer, loss_fn = training.model, training.optimizer, training.loss_fn
    inputs, targets, dtype = training.inputs, training.targets, DTYPES[precision]
    device = inputs.device.type
    scaler = torch.amp.GradScaler(device, enabled=precision == "fp16")
    guard = NonFiniteGuard(model, scaler=scaler)
    monitor = GradientMonitor(model, optimizer, scaler)
    monitor.register_hooks()
    parameters = list(model.parameters())

    def forward_backward() -> Tensor:
        if dtype is None:
            loss = loss_fn(model(inputs), targets)
        else:
            with torch.autocast(device, dtype):
                loss = loss_fn(model(inputs), targets)
        scaler.scale(loss).backward()
        return loss.detach()

    def step() -> GradientMonitor:
        optimizer.zero_grad()
        if (report := guard(forward_backward)) is not None:
            raise AssertionError(f"nothing to find in this step, got {report}")
        scale = scaler.get_scale()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, CLIP_NORM)
        scaler.step(optimizer)
        scaler.update()
        if scaler.get_scale() >= scale:
            training.scheduler.step()
        return monitor  # it lives as long as the step

    return step


def ours(training: Training, precision: str) -> Callable[[], object]:
    config = load_config(
        {
            "autograd_system": {"performance": {"precision": precision}},
            "training": {"clip_norm": CLIP_NORM},
        }
    )
    system = AutogradTrainingSystem(
        *(training.model, training.optimizer, training.loss_fn, config),
        scheduler=training.scheduler,
    )
    return lambda: system.train_step(training.inputs, training.targets)


def report(options: argparse.Namespace, kind: str, precision: str) -> tuple[Comparison, Goal]:
    trainings = {name: Training(kind, options) for name in (BARE, OURS)}
    steps = {BARE: bare(trainings[BARE], precision), OURS: ours(trainings[OURS], precision)}
    for step in steps.values():
        for _ in range(CHECKED_STEPS):
            step()
    pairs = zip(*(training.model.parameters() for training in trainings.values()), strict=True)
    if not all(torch.equal(*pair) for pair in pairs):
        raise AssertionError(f"{kind}, {precision}: {OURS} does not do what the bare loop does")
    comparison = compare(steps, rounds=options.rounds, memory=False)
    ratio, seconds = comparison.ratios[OURS], comparison.medians
    print(f"\na step of training, {kind}, {precision}, on {options.device}\n{comparison}")
    print(f"{OURS} adds {1e6 * (ratio.median - 1) * seconds[BARE]:.0f} us", flush=True)
    return comparison, (f"{kind}, {precision}", GOALS.get(kind, float("inf")), ratio)


def record(comparison: Comparison) -> dict[str, Any]:
    return {
        "ratio": comparison.ratios[OURS]._asdict(),
        "noise": comparison.noise._asdict(),
        "seconds": comparison.medians,
        "samples": {
            name: column.tolist()
            for name, column in zip(comparison.names, comparison.samples.T, strict=True)
        },
        "environment": comparison.environment,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="threads within an operation")
    parser.add_argument("--rounds", type=int, default=48, help="at least 5")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--precisions", nargs="*", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument(
        "--quick", action="store_true", help="small models and five rounds, which write no record"
    )
    parser.add_argument("--results", type=Path, default=RECORDS, help="where the record goes")
    options = parser.parse_args()
    if options.quick:
        options.rounds = 5
    torch.set_num_threads(options.threads)
    records: dict[str, Any] = {}
    goals: list[Goal] = []
    for kind in options.models:
        for precision in options.precisions:
            if precision == "fp16" and options.device == "cpu" and kind != "mlp":
                continue
            comparison, goal = report(options, kind, precision)
            records[f"{kind}, {precision}"] = record(comparison)
            goals += [goal] if kind in GOALS else []
    if not options.quick:
        suffix = "" if options.device == "cpu" else f"_{options.device}"
        path = options.results / f"training{suffix}.json"
        path.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {path}")
    if goals:
        summary(goals)


if __name__ == "__main__":
    main()
