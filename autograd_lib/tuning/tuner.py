"""The fastest settings of a training step, under a memory budget and a gradient error, measured."""

from __future__ import annotations

import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from autograd_lib.core.optimizers import innermost_optimizer
from autograd_lib.core.snapshot import preserved_random_state
from autograd_lib.report.progress import progress
from autograd_lib.training.distributed import optimized
from autograd_lib.tuning.candidates import Candidates
from autograd_lib.tuning.race import Race
from autograd_lib.tuning.search import search
from autograd_lib.tuning.trials import Trial, TuningReport
from autograd_lib.tuning.verify import together
from autograd_lib.tuning.workbench import Workbench

__all__ = ["Trial", "TuningReport", "autotune"]

_Blocks = nn.Sequential | nn.ModuleList | Sequence[nn.Module]


def autotune(
    model: nn.Module,
    batch: Any,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    memory_budget: float | str | None = None,
    tolerance: float = 5e-2,
    *,
    optimizer: Optimizer | Callable[..., Optimizer] | None = None,
    blocks: _Blocks | None = None,
    count: Callable[[Any], float | Tensor] | None = None,
    compile: bool = True,
) -> TuningReport:
    r"""Find the fastest settings of a training step within a memory budget and a gradient error.

    The step is forward and backward of one batch: in micro-batches or at once, under autocast or
    not, with a checkpoint plan or without, in one of two memory formats, compiled or not. With
    $\hat g$ the gradient in float64 over all parameters, and $g$ that of a candidate, the error is
    $\lVert g - \hat g \rVert / \lVert \hat g \rVert$, measured with the probability of dropout
    at 0; time and peak are those of the model as given. The order of the search:

    1. the float64 gradient, and whether it repeats; that of micro-batches is the same unless
       samples depend on one another (BatchNorm does that), which rules micro-batches out;
    2. gradient error of each precision and memory format, then the peak of each for the batch, a
       half, a quarter, an eighth (and less where nothing fits), which rule candidates out untimed;
    3. where a candidate over the budget would be faster than all that fit, a plan by
       `plan_checkpoints` brings it down, and its measured peak has to fit;
    4. what is left is timed by `compare`, a few rounds for all, more for those still in question;
    5. the best is compiled, from a cleared cache (`torch.compiler.reset`), and races once more.

    Of those that the A/A noise does not tell from the fastest, the one with the smallest peak is
    chosen. A candidate that fails, for want of memory or of a compiler or otherwise, is a trial
    with a verdict that says so. Plans and compiling aside, the search takes about 30 times as long
    as a plain step for each candidate; how long that is, how many candidates are left, and what is
    being tried is shown in a terminal, where the search takes more than two seconds.

    The model itself never runs: candidates are copies of it, a few at a time, and parameters,
    gradients, buffers, hooks and random states are as before at the end. Hooks on its modules run
    with the copies. A loss function with parameters of its own should be an `nn.Module`, to be
    copied too.

    Args:
        model: Its parameters in float32 or complex64, on the device and in the mode of training.
        batch: A mapping of the model's keyword arguments, or a pair of inputs (a tensor, a tuple
            of positional or a mapping of keyword arguments) and targets; the first dimension of
            each tensor is the batch.
        loss_fn: Called as `loss_fn(output, targets)`, of a batch that is a mapping as
            `loss_fn(output, batch)`; a mean over the samples, or over what `count` counts. None
            for the loss that the model itself computes.
        memory_budget: Bytes for the peak of one step above what stood before it; the step begins
            and ends with every `.grad` None, and parameter gradients are part of it. A text is a
            size such as "2GB" or "1.5 GiB", or a share such as "80%" of what the model's device has
            free. None for no limit.
        tolerance: Largest gradient error.
        optimizer: Its step and its state then belong to time and peak: an optimizer of the model's
            parameters, its class, or another function that makes one of a list of parameters.
        blocks: Which modules a plan is made for: an `nn.Sequential`, `nn.ModuleList` or list of
            modules within `model`, each taking the output of the one before. None for the
            container whose children save the most.
        count: How many terms the mean of the loss has, given the targets of a micro-batch, or a
            micro-batch that is a mapping: for a mean over tokens ``lambda t: (t != -100).sum()``.
            None for the labels that PyTorch's losses, or the model's own, are means over, and for
            one a sample otherwise.
        compile: Whether to try `torch.compile`, which takes from seconds to minutes.

    Returns:
        The report; `report.best.apply(model)` sets up the model.

    Raises:
        TypeError: An argument is of the wrong type, or a trained parameter is neither float32 nor
            complex64.
        ValueError: Nothing meets budget and tolerance (the least that was reached is named, and
            why each plan failed); the gradient is random, zero or not finite in float64; the batch
            or an option is malformed.
        RuntimeError: Whatever the model raises in float64 and in float32.

    Warns:
        UserWarning: As `plan_checkpoints` does, of a block that every plan saves.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1))
        >>> batch = torch.randn(16, 8), torch.randn(16, 1)
        >>> report = autotune(model, batch, nn.MSELoss(), tolerance=1e-5, compile=False)
        >>> report.best.precision  # the others have errors of 1e-3 and more
        'fp32'
        >>> report.best.apply(model) is model
        True
    """
    _check(model, blocks)
    start = time.perf_counter()
    budget = _bytes_of(memory_budget, next(model.parameters()).device)
    real = all(isinstance(n, Real) and not isinstance(n, bool) for n in (budget, tolerance))
    if not (real and tolerance > 0 and budget >= 1):
        raise ValueError(
            "autotune: expected memory_budget and tolerance to be numbers above 0, of bytes and of "
            "a relative error such as 0.05, or the budget a size such as '2GB' or, up to '100%', a "
            f"share such as '80%', got {memory_budget!r} and {tolerance!r}"
        )
    stepping = _optimizer_of(model, loss_fn, optimizer)
    with progress("autotune") as show, preserved_random_state(), torch.enable_grad():
        bench = Workbench(model, batch, loss_fn, count=count, blocks=blocks, optimizer=stepping)
        candidates = Candidates(bench, int(budget), tolerance, show)
        race = Race(candidates)
        best = search(candidates, race, compile)

    def rank(t: Trial) -> tuple[Any, ...]:
        return t.settings != best, t.time is None, t.time or 0, t.peak_bytes or 0

    trials, notes = tuple(sorted(candidates.trials.values(), key=rank)), tuple(candidates.notes)
    seconds, limit = time.perf_counter() - start, None if memory_budget is None else int(budget)
    return TuningReport(best, trials, race.noise, notes, seconds, limit, tolerance)


def _bytes_of(memory_budget: float | str | None, device: torch.device) -> float:
    """The budget in bytes, of a text that is a size or a share of what is free; NaN of another."""
    if not isinstance(memory_budget, str):
        return sys.maxsize if memory_budget is None else memory_budget
    text = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%|[KMGT]i?B)\s*", memory_budget)
    amount, unit = (float(text[1]), text[2]) if text else (math.nan, "B")
    if unit != "%":
        return amount * (1024 if "i" in unit else 1000) ** "BKMGT".index(unit[0])
    if amount > 100:
        return math.nan
    if device.type == "cpu":
        try:
            lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        except OSError as error:
            raise ValueError(
                f"autotune: expected memory_budget in bytes, got {memory_budget!r}, and this "
                "system has no /proc/meminfo to say what memory is free"
            ) from error
        free = 1024 * next(int(line.split()[1]) for line in lines if "MemAvailable" in line)
    else:
        module = torch.get_device_module(device)  # what it caches is free as well
        cached = module.memory_reserved(device) - module.memory_allocated(device)
        free = module.mem_get_info(device)[0] + cached
    return free * amount / 100


def _optimizer_of(model: nn.Module, loss_fn: object, optimizer: Any) -> Optimizer | None:
    """The optimizer, or one that is made of the trained parameters of model and loss."""
    if optimizer is None:
        return None
    trained = [p for p in together(model, loss_fn).parameters() if p.requires_grad]
    if callable(optimizer):
        optimizer = optimizer(trained)
    found = innermost_optimizer("autotune", optimizer)
    if set(trained).isdisjoint(optimized(found)):
        raise ValueError(
            f"autotune: expected an optimizer of the model's parameters, got one of others "
            f"({type(found).__name__}); make it of model.parameters(), or pass its class"
        )
    return found


def _check(model: object, blocks: Any) -> None:
    if not isinstance(model, nn.Module) or hasattr(model, "_orig_mod"):
        raise TypeError(
            f"autotune: expected a torch.nn.Module, got {type(model).__name__}; pass the model "
            "itself, before torch.compile"
        )
    if blocks is not None:
        named = [blocks] if isinstance(blocks, nn.Module) else blocks
        if not set(named) <= set(model.modules()):
            raise ValueError(
                f"autotune: expected blocks within the model, got {blocks!r:.80} with a module "
                "that is none of the model's; pass model.layers or the like"
            )
    trained = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
    single = torch.float32, torch.complex64
    if other := {name: dtype for name, dtype in trained.items() if dtype not in single}:
        raise TypeError(
            f"autotune: expected parameters in float32 or complex64, got {other}; pass "
            "model.float(), or complex ones by parameter.to(torch.complex64): precision is what is "
            "searched, and the optimizer keeps its parameters in single precision"
        )
    if not trained:
        raise ValueError(
            "autotune: no parameter of the model requires a gradient; enable_gradients(model)"
        )
