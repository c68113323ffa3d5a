"""The search of `autotune`: in which order candidates are measured, and which are dropped when.

What is deterministic comes first: the gradient's error and the peak rule out candidates before
a race is run. Compiling, the most expensive thing to try, is tried last and on the winner.
"""

from __future__ import annotations

import itertools
from dataclasses import replace
from operator import itemgetter
from typing import Literal

from torch import nn

from autograd_lib.config.records import Settings
from autograd_lib.report.tables import readable_bytes
from autograd_lib.tuning.candidates import Candidates
from autograd_lib.tuning.plans import planned
from autograd_lib.tuning.race import Race
from autograd_lib.tuning.workbench import SEPARABLE

_PRECISIONS: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16", "fp16")
_SIZES = 4  # the whole batch, a half, a quarter, an eighth; smaller ones only where nothing fits
_SLOW = 1.5  # times the fastest in a first look: more than noise makes of equals
_HOPELESS = 4.0  # the same where micro-batches are not even tried: fp16 on most CPUs


def search(candidates: Candidates, race: Race, compile: bool) -> Settings:
    """Return the best settings.

    Raises:
        ValueError: Nothing meets budget and tolerance.
    """
    sizes, plain = _sizes(candidates), Settings()
    formats = len(_formats(candidates.bench.model))
    candidates.expected = len(_PRECISIONS) * formats * min(len(sizes), _SIZES) + compile
    candidates.fast([plain], 1.0)  # by which is told beforehand what the search takes
    accurate = _accurate(candidates, sizes)
    usual = candidates.fast(accurate, _HOPELESS)
    slow = [s for s in accurate if s not in usual]
    best: Settings | None = None
    # Again where all that raced failed in the race: the next best have their turn.
    while best is None and (
        contenders := _affordable(candidates, usual, sizes) or _affordable(candidates, slow, sizes)
    ):
        missing = plain not in contenders and not candidates.has_failed(plain)
        best = race.run(contenders, [plain] * missing)
    if best is None:
        raise ValueError(_impossible(candidates))
    return race.compiled(best) if compile else best


def _sizes(candidates: Candidates) -> list[int | None]:
    """Measure the reference; return the micro-batches that leave the gradient what it is."""
    candidates.show("gradient in float64, by which the others are judged")
    bench = candidates.bench
    error = bench.measure_reference()
    if bench.narrow:
        candidates.note(bench.narrow)
    if not error <= SEPARABLE[bench.exact]:
        why = "the loss is no mean over samples, or needs count"
        for name, m in bench.model.named_modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training:
                why = f"{name!r} is a {type(m).__name__}"
                break
        differ = f"what they give differs by {error:.1e} from what the whole batch gives ({why})"
        candidates.note(f"Micro-batches left out: {bench.indivisible or differ}.")
        return [None]
    sizes: list[int | None] = [None]
    size = bench.size
    while size > 1:
        size = -(-size // 2)
        sizes.append(size)
    return sizes


def _accurate(candidates: Candidates, sizes: list[int | None]) -> list[Settings]:
    """Precisions and memory formats within the tolerance, in smaller sizes if memory runs out."""
    found, formats = [], _formats(candidates.bench.model)
    for precision, memory_format in itertools.product(_PRECISIONS, formats):
        for size in sizes:
            candidates.starved = False
            settings = Settings(precision, size, memory_format=memory_format)
            if candidates.is_accurate(settings):
                found.append(settings)
            if not candidates.starved:
                break
    return found


def _affordable(
    candidates: Candidates, combinations: list[Settings], sizes: list[int | None]
) -> list[Settings]:
    """Candidates within budget and tolerance that are worth a race, with a plan where needed."""
    fits, over = list[Settings](), list[Settings]()
    for number, size in enumerate(sizes):
        if number >= _SIZES and fits:
            break
        tried = [replace(s, micro_batch=size) for s in combinations]
        tried = [s for s in tried if not candidates.has_failed(s)]
        fits += [s for s in tried if candidates.fits(s)]
        over += [s for s in tried if s not in fits and not candidates.has_failed(s)]
    found = candidates.fast(fits, _SLOW)
    found += planned(candidates, over, candidates.trials[found[0]].time if found else None)
    return [s for s in found if candidates.is_accurate(s)]


def _formats(model: nn.Module) -> list[Literal["contiguous_format", "channels_last"]]:
    """Memory formats worth a try: the other one matters to convolutions of images alone."""
    if any(isinstance(m, nn.Conv2d | nn.ConvTranspose2d) for m in model.modules()):
        return ["contiguous_format", "channels_last"]
    return ["contiguous_format"]


def _impossible(candidates: Candidates) -> str:
    """Say what is missing, and the least of it that can be had."""
    trials = candidates.trials.values()
    over = [(t.peak_bytes or 0, t.settings) for t in trials if t.verdict.startswith("peak")]
    errors = [(t.gradient_error, t.settings) for t in trials if t.gradient_error is not None]
    if over:
        peak, settings = min(over, key=itemgetter(0))
        return (
            f"autotune: nothing fits memory_budget={readable_bytes(candidates.budget)}; the least "
            f"attainable peak is {peak} bytes ({readable_bytes(peak)}), with {settings}; raise the "
            f"budget or use a smaller batch{_failures(candidates)}"
        )
    error, settings = min(errors, key=itemgetter(0), default=(0.0, Settings()))
    if not error <= candidates.tolerance:
        return (
            f"autotune: no gradient is within tolerance={candidates.tolerance:.2g}; the least "
            f"attainable error is {error:.2g}, with {settings}; raise the tolerance"
        )
    first = next(iter(trials))
    return (
        f"autotune: every candidate fails; {first.settings} {first.verdict}{_failures(candidates)}"
    )


def _failures(candidates: Candidates) -> str:
    """Why plans failed, one sentence each."""
    noted = [note for note in candidates.notes if note.startswith("Plan for ")]
    tried = [
        f"{trial.settings}: {trial.verdict}."
        for trial in candidates.trials.values()
        if trial.settings.checkpoint
    ]
    return "".join(f"\n{line}" for line in noted + tried)
