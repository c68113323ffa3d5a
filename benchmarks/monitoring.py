"""What watching the gradients costs: a whole training step with each tool against the plain step.

The models of gradients.py, trained by fused AdamW, read at every step. `light`: GradientMonitor
with its five statistics, NonFiniteGuard around forward and backward, loops over the parameters,
Lightning's norms. `heavy`: anomaly mode, transformers' DebugUnderflowOverflow, wandb.watch offline,
TensorBoard's histograms, Cockpit's economy set; fewer rounds, and apart, since some of them go on
working in the background.

Each candidate trains its own copy, for the hooks of some peers cannot be removed. Before anything
is timed, every copy is checked to hold the same bits as the plain one after the same steps. Peers
that are not installed (benchmarks/requirements.txt) or cannot run are left out and named.

Writes a record of each comparison to autograd_lib/report/records/, with three more entries:
"host_reads", how often one step makes the host wait for a value; "direct", the seconds inside the
tool over those of the rest of the step, for tools whose work stands in one place; "left_out".
Prints the goals.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import json
import math
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from gradients import encoder, loop_of_norms, mlp
from higher_order import Goal, summary
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from autograd_lib import Comparison, GradientMonitor, NonFiniteGuard, Ratio, compare
from autograd_lib.report import RECORDS

CHECKED_STEPS = 3
DIRECT_SECONDS = 0.1  # of steps for each sample of the direct cost
MODELS = {"mlp": mlp, "encoder": encoder}
# (model, candidate) -> the most that its step may take, in plain steps
GOALS = {
    ("mlp", "GradientMonitor"): 1.09,
    ("encoder", "GradientMonitor"): 1.008,
    ("mlp", "NonFiniteGuard"): 1.04,
    ("encoder", "NonFiniteGuard"): 1.003,
}

Thunk = Callable[[], object]


class Clock:
    """The seconds between its calls of start and stop; both can be an optimizer's hooks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def start(self, *_: object) -> None:
        self.seconds -= time.perf_counter()

    def stop(self, *_: object) -> None:
        self.seconds += time.perf_counter()


class Training:
    """A model with its batch, loss and optimizer; the same numbers each time it is made."""

    def __init__(self, kind: str, device: str) -> None:
        torch.manual_seed(0)
        model, batch = MODELS[kind]()
        self.model, self.batch = model.to(device), batch.to(device)
        self.target = torch.randn(batch.shape).to(device)
        self.loss_fn = nn.MSELoss()
        # A step so small that all copies see much the same gradients, however often each is called.
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)
        self.clock = Clock()

    def backward(self) -> None:
        self.loss_fn(self.model(self.batch), self.target).backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def reading(self, read: Callable[[nn.Module], object]) -> Thunk:
        """The step that reads its gradients between backward and update."""

        def step() -> None:
            self.backward()
            self.clock.start()
            read(self.model)
            self.clock.stop()
            self.update()

        return step


Builder = Callable[[Training, contextlib.ExitStack], Thunk]


# ------------------------------------------------------------------ the library and the loops


def plain(training: Training, _: contextlib.ExitStack) -> Thunk:
    def step() -> None:
        training.backward()
        training.update()

    return step


def monitored(training: Training, stack: contextlib.ExitStack) -> Thunk:
    training.optimizer.register_step_pre_hook(training.clock.start)
    stack.enter_context(GradientMonitor(training.model, optimizer=training.optimizer))
    training.optimizer.register_step_pre_hook(training.clock.stop)
    return plain(training, stack)


def guarded(training: Training, _: contextlib.ExitStack) -> Thunk:
    guard = NonFiniteGuard(training.model)

    def unguarded() -> None:
        training.clock.stop()
        training.backward()
        training.clock.start()

    def step() -> None:
        training.clock.start()
        found = guard(unguarded)
        training.clock.stop()
        if found is not None:
            raise AssertionError(f"NonFiniteGuard: nothing to find in this step, got {found}")
        training.update()

    return step


def loop_of_five_statistics(model: nn.Module) -> dict[str, list[float]]:
    return {
        name: [*map(Tensor.item, (g.norm(), g.mean(), g.std(correction=0), g.min(), g.max()))]
        for name, g in ((name, p.grad) for name, p in model.named_parameters())
    }


# ------------------------------------------------------------------ the peers


def lightning(training: Training, _: contextlib.ExitStack) -> Thunk:
    grad_norm = importlib.import_module("lightning.pytorch.utilities").grad_norm

    def read(model: nn.Module) -> dict[str, float]:
        return {name: float(norm) for name, norm in grad_norm(model, 2).items()}

    return training.reading(read)


def anomaly(training: Training, _: contextlib.ExitStack) -> Thunk:
    def step() -> None:
        with torch.autograd.set_detect_anomaly(True):  # detect_anomaly, less a warning every time
            training.backward()
        training.update()

    return step


def underflow(training: Training, stack: contextlib.ExitStack) -> Thunk:
    importlib.import_module("transformers.debug_utils").DebugUnderflowOverflow(training.model)
    return plain(training, stack)


def wandb_watch(training: Training, stack: contextlib.ExitStack) -> Thunk:
    wandb = importlib.import_module("wandb")
    where = stack.enter_context(tempfile.TemporaryDirectory())
    settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
    run = stack.enter_context(wandb.init(mode="offline", dir=where, settings=settings))
    run.watch(training.model, log="gradients", log_freq=1)

    def step() -> None:
        training.backward()
        training.update()
        run.log({})  # ends the step, with which the histograms of its hooks are written

    return step


def tensorboard(training: Training, stack: contextlib.ExitStack) -> Thunk:
    module = importlib.import_module("torch.utils.tensorboard")
    where = stack.enter_context(tempfile.TemporaryDirectory())
    writer = stack.enter_context(module.SummaryWriter(where))
    steps = itertools.count()

    def read(model: nn.Module) -> None:
        number = next(steps)
        for name, parameter in model.named_parameters():
            writer.add_histogram(name, parameter.grad, number)

    return training.reading(read)


def cockpit_economy(training: Training, _: contextlib.ExitStack) -> Thunk:
    cockpit = importlib.import_module("cockpit")
    economy = importlib.import_module("cockpit.utils.configuration").configuration("economy")
    extend = importlib.import_module("backpack").extend
    model, loss_fn = extend(training.model), extend(training.loss_fn)
    watch = cockpit.Cockpit(model.parameters(), quantities=economy)
    steps = itertools.count()

    def step() -> None:
        number = next(steps)
        outputs = model(training.batch)
        loss = loss_fn(outputs, training.target)
        info = {
            "batch_size": len(outputs),
            "individual_losses": (outputs - training.target).square().flatten(1).mean(1),
            "loss": loss,
            "optimizer": training.optimizer,
        }
        with watch(number, info=info):
            loss.backward(create_graph=watch.create_graph(number))
        training.update()

    return step


BASELINE = "plain step"
OURS: dict[str, Builder] = {
    BASELINE: plain,
    "GradientMonitor": monitored,
    "NonFiniteGuard": guarded,
    "loop, norms": lambda training, _: training.reading(loop_of_norms),
    "loop, five statistics": lambda training, _: training.reading(loop_of_five_statistics),
}
# name -> (builders, rounds for one round of the light ones)
PARTS: dict[str, tuple[dict[str, Builder], float]] = {
    "light": (OURS | {"Lightning grad_norm": lightning}, 1.0),
    "heavy": (
        {
            BASELINE: plain,
            "torch.autograd.detect_anomaly": anomaly,
            "DebugUnderflowOverflow": underflow,
            "wandb.watch": wandb_watch,
            "TensorBoard histograms": tensorboard,
            "Cockpit, economy": cockpit_economy,
        },
        0.25,
    ),
}


# ------------------------------------------------------------------ what is measured beside time


class HostReads(TorchDispatchMode):
    """Counts what would make the host wait for the device; `x.cpu().numpy()` is one wait."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.inside = 0, False
        self.on_host: list[Tensor] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:  # item, float, bool
            self.add(args[0])
        return func(*args, **(kwargs or {}))

    def add(self, tensor: Tensor) -> None:
        self.count += not (self.inside or any(tensor is copy for copy in self.on_host))

    def counting(self, name: str) -> contextlib.AbstractContextManager[object]:
        method = getattr(Tensor, name)

        def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.add(tensor)
            before, self.inside = self.inside, True  # tolist of a scalar calls item
            try:
                result = method(tensor, *args, **kwargs)
            finally:
                self.inside = before
            if isinstance(result, Tensor):
                self.on_host.append(result)
            return result

        return mock.patch.object(Tensor, name, counted)


def host_reads(step: Thunk) -> int:
    counter = HostReads()
    with contextlib.ExitStack() as stack:
        for name in ("tolist", "numpy", "cpu"):
            stack.enter_context(counter.counting(name))
        stack.enter_context(counter)
        step()
    return counter.count


def direct_costs(
    trainings: dict[str, Training], steps: dict[str, Thunk], comparison: Comparison
) -> dict[str, list[float]]:
    """Seconds inside the tool over those of the rest of the step, within real steps.

    The gradients are as warm as backward leaves them, and the noise of the step, of which the tool
    is a thousandth, is left out. What hooks cost outside of the tool's own call is not seen.
    """
    costs: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(max(5, len(comparison.samples) // 2)):
        for name, step in steps.items():
            clock = trainings[name].clock
            clock.seconds, start = 0.0, time.perf_counter()
            for _ in range(math.ceil(DIRECT_SECONDS / comparison.medians[name])):
                step()
            rest = time.perf_counter() - start - clock.seconds
            costs[name].append(clock.seconds / rest)
    return {name: values for name, values in costs.items() if any(values)}


def check(name: str, training: Training, expected: list[Tensor]) -> None:
    """Whoever watches must not change what is trained."""
    for (parameter, value), right in zip(training.model.named_parameters(), expected, strict=True):
        if not torch.equal(value, right):
            raise AssertionError(
                f"{name}: {parameter} differs from that of the plain step by "
                f"{(value - right).abs().max():.1e}"
            )


def prepare(
    options: argparse.Namespace, kind: str, part: str, stack: contextlib.ExitStack
) -> tuple[dict[str, Training], dict[str, Thunk], dict[str, str]]:
    """The candidates that can run, after a few steps, with why the others cannot."""
    trainings: dict[str, Training] = {}
    steps: dict[str, Thunk] = {}
    left_out: dict[str, str] = {}
    expected: list[Tensor] = []
    for name, build in PARTS[part][0].items():
        print(f"preparing {name}", flush=True)
        training = Training(kind, options.device)
        try:
            step = build(training, stack)
            torch.manual_seed(1)  # of dropout
            for _ in range(CHECKED_STEPS):
                step()
        except Exception as error:
            if name in OURS:
                raise
            left_out[name] = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"{name} is left out: {left_out[name]}", flush=True)
            continue
        expected = expected or [p.detach().clone() for p in training.model.parameters()]
        check(name, training, expected)
        trainings[name], steps[name] = training, step
    return trainings, steps, left_out


# ------------------------------------------------------------------ reports


def report(options: argparse.Namespace, kind: str, part: str) -> list[Goal]:
    rounds = max(5, round(PARTS[part][1] * options.rounds))
    with contextlib.ExitStack() as stack:
        trainings, steps, left_out = prepare(options, kind, part, stack)
        reads = {name: host_reads(step) for name, step in steps.items()}
        print(f"timing {len(steps)} candidates in {rounds} rounds", flush=True)
        comparison = compare(steps, rounds=rounds, memory=False)
        print(f"\na step of training, {kind}, on {options.device}\n{comparison}", flush=True)
        costs: dict[str, list[float]] = {}
        if options.device == "cpu":  # elsewhere a clock on the host sees the launches alone
            costs = direct_costs(trainings, steps, comparison)
    direct = {name: spread(values) for name, values in costs.items()}
    for name, count in reads.items():
        own = f", direct cost {direct[name]} of a step" if name in direct else ""
        print(f"{name}: {count} host reads a step{own}")
    suffix = "" if options.device == "cpu" else f"_{options.device}"
    path = options.results / f"monitoring_{part}_{kind}{suffix}.json"
    comparison.to_json(path)
    record = json.loads(path.read_text(encoding="utf-8")) | {
        "host_reads": reads,
        "direct": {name: cost._asdict() for name, cost in direct.items()},
        "direct_samples": costs,
        "left_out": left_out,
    }
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {path}\n", flush=True)
    return goals(kind, comparison, direct)


def spread(values: list[float]) -> Ratio:
    """The median with the range of 95 % of the rounds."""
    return Ratio(*np.quantile(values, [0.5, 0.025, 0.975]).tolist())


def goals(kind: str, comparison: Comparison, direct: dict[str, Ratio]) -> list[Goal]:
    found: list[Goal] = []
    for (model, name), most in GOALS.items():
        if model == kind and name in comparison.names:
            found.append((f"{kind}: {name}, whole step", most, comparison.ratios[name]))
            if name in direct:
                found.append((f"{kind}: {name}, its direct cost", most - 1, direct[name]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=1, help="threads within an operation")
    parser.add_argument("--rounds", type=int, default=28, help="of the light ones, at least 5")
    parser.add_argument("--models", nargs="*", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--parts", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument(
        "--results", type=Path, default=RECORDS, help="the directory for the records"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    # Of BackPACK's hooks on the first layer, whose input needs no gradient.
    warnings.filterwarnings("ignore", "Full backward hook is firing", UserWarning)
    met: list[Goal] = []
    runs = list(itertools.product(options.models, options.parts))
    for number, (kind, part) in enumerate(runs, 1):
        print(f"part {number} of {len(runs)}: {kind}, {part}", flush=True)
        met += report(options, kind, part)
    if met:
        summary(met)


if __name__ == "__main__":
    main()
