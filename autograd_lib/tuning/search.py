"""The search of `autotune`: in which order candidates are measured, and which are dropped when.

What is deterministic comes first: the gradient's error and the peak rule out candidates before
a race is run. What is left races, interleaved, in rounds that the clear losers do not see the end
of. Compiling, the most expensive thing to try, is tried last and on the best two.
"""

from __future__ import annotations

import itertools
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import itemgetter
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autograd_lib.benchmark import Ratio, compare
from autograd_lib.checkpointing.plan import CheckpointPlan, plan_checkpoints
from autograd_lib.config.records import Settings
from autograd_lib.report.tables import readable_bytes
from autograd_lib.tuning.trials import Trial, Workbench

_T = TypeVar("_T")

_PRECISIONS: tuple[Literal["fp32", "bf16", "fp16"], ...] = ("fp32", "bf16", "fp16")
_SIZES = 4  # the whole batch, a half, a quarter, an eighth; smaller ones only where nothing fits
_SLOW = 1.5  # times the fastest in a first look: more than noise makes of equals
_HOPELESS = 4.0  # the same where micro-batches are not even tried: fp16 on most CPUs
_LOOKS = 3
_ROUNDS = (5, 15, 45)  # of a race; the later ones for those that are still in question
_CLOSE = 1.03  # times of so little difference are a tie without more rounds
_PLANS = 4  # how many candidates over the budget a plan is tried for
_REVISIONS = 3
_SEPARABLE = 1e-6  # relative error in float64, where rounding alone makes 1e-15


class Search:
    """The trials so far, and the stages that add to them."""

    def __init__(
        self,
        bench: Workbench,
        budget: int,
        tolerance: float,
        blocks: str | list[str] | None,
        show: Callable[[str], None],
    ) -> None:
        self.bench, self.budget, self.tolerance = bench, budget, tolerance
        self.blocks, self.show = blocks, show
        self.trials: dict[Settings, Trial] = {}
        self.notes: list[str] = []
        self.noise = Ratio(1.0, 1.0, 1.0)
        self.break_even: dict[Settings, float] = {}
        self.raced: set[Settings] = set()
        self.starved = False  # whether the last attempt ran out of memory

    def run(self, compile: bool) -> Settings:
        sizes = self.sizes()
        usual, slow = self.correct(sizes)
        best: list[Settings] = []
        for combinations in (usual, slow):
            fits, over = self.affordable(combinations, sizes) if not best else ([], [])
            while not best and (contenders := self.promising(fits, over)):
                best = self.race(contenders)
                # Should all of them have failed in the race, the next best have their turn.
                fits, over = [s for s in fits if not self.has_failed(s)], []
        if not best and (contenders := self.smallest()):
            best = self.race(contenders)
        if not best:
            raise ValueError(self.impossible())
        return self.compiled(best) if compile else best[0]

    # One candidate

    def record(self, settings: Settings, **found: Any) -> None:
        self.trials[settings] = replace(self.trials.get(settings, Trial(settings)), **found)

    def attempt(self, settings: Settings, measure: Callable[[Settings], _T]) -> _T | None:
        """Measure, unless it fails: then say how in the verdict, and clear up."""
        self.show(f"candidate {len(self.trials | {settings: None})}: {settings}")
        self.starved = False
        try:
            return measure(settings)
        except Exception as error:
            # Whatever it is, the search goes on; memory that ran out leads to smaller steps.
            out = isinstance(error, (torch.OutOfMemoryError, MemoryError))
            self.starved = out or "can't allocate memory" in str(error)  # says the CPU's allocator
            lines = str(error).strip().splitlines() or [""]
            verdict = f"failed: {type(error).__name__}: {lines[0]:.60}".removesuffix(": ")
        # Leave `except` first, so that the traceback frees its tensors.
        self.record(settings, verdict=verdict)
        self.bench.forget()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()
        return None

    def has_failed(self, settings: Settings) -> bool:
        return self.trials[settings].verdict.startswith("failed")

    def is_accurate(self, settings: Settings) -> bool:
        error = self.attempt(settings, self.bench.error)
        if error is None:
            return False
        self.record(settings, gradient_error=error)
        if not error <= self.tolerance:  # NaN is not
            self.record(settings, verdict=f"error {error:.1e} over {self.tolerance:.1e}")
        return error <= self.tolerance

    def fits(self, settings: Settings) -> bool:
        peak = self.attempt(settings, self.bench.peak)
        if peak is None:
            return False
        self.record(settings, peak_bytes=peak)
        if peak > self.budget:
            excess = readable_bytes(peak - self.budget)
            self.record(settings, verdict=f"peak {excess} over budget")
        return peak <= self.budget

    def look(self, settings: Settings) -> float | None:
        seconds = self.attempt(settings, self.bench.seconds)
        self.record(settings, time=seconds)
        return seconds

    def looks(self, settings: list[Settings], times: float) -> dict[Settings, float]:
        """Seconds of one step; the best of three where it is more than `times` the least."""
        seconds: dict[Settings, float] = {}
        waiting = settings
        for _ in range(_LOOKS):  # turn by turn: what slows the machine lasts for several steps
            for s in waiting:
                if (took := self.look(s)) is None:
                    seconds.pop(s, None)
                else:
                    seconds[s] = min(took, seconds.get(s, math.inf))
                    self.record(s, time=seconds[s])
            least = min(seconds.values(), default=0.0)
            waiting = [s for s, took in seconds.items() if took > times * least]
        return seconds

    # Stages

    def sizes(self) -> list[int | None]:
        """Measure the reference; return the micro-batches that leave the gradient what it is."""
        self.show("gradient in float64")
        error = self.bench.measure_reference()
        if error is None:
            return [None]
        if not error <= _SEPARABLE:
            norms = [
                f"{name!r} is a {type(m).__name__}"
                for name, m in self.bench.model.named_modules()
                if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.training
            ]
            why = norms[0] if norms else "loss_fn is no mean over samples, or needs count"
            self.note(
                f"Micro-batches left out: the gradient of two halves differs by {error:.1e} "
                f"from that of the batch ({why})."
            )
            return [None]
        halves = [self.bench.size]
        while halves[-1] > 1:
            halves.append(-(-halves[-1] // 2))
        return [None, *halves[1:]]

    def correct(self, sizes: list[int | None]) -> tuple[list[Settings], list[Settings]]:
        """Precisions and formats within the tolerance; those that are hopelessly slow apart."""
        accurate = []
        for precision, memory_format in itertools.product(_PRECISIONS, _formats(self.bench)):
            for size in sizes:
                settings = Settings(precision, size, memory_format=memory_format)
                if self.is_accurate(settings):
                    accurate.append(settings)
                if not self.starved:
                    break
        seconds = self.looks(accurate, _HOPELESS)
        usual = self.not_slow(seconds, _HOPELESS)
        slow = [s for s in seconds if s not in usual]
        return _combinations(usual), _combinations(slow)

    def not_slow(self, seconds: dict[Settings, float], times: float) -> list[Settings]:
        """Those that take less than so many times what the fastest does."""
        least = min(seconds.values(), default=0.0)
        for settings, took in seconds.items():
            if took > times * least:
                verdict = f"slower: {took / least:.1f} times the fastest in a first look"
                self.record(settings, verdict=verdict)
        return [s for s, took in seconds.items() if took <= times * least]

    def affordable(
        self, combinations: list[Settings], sizes: list[int | None]
    ) -> tuple[list[Settings], list[Settings]]:
        """With micro-batches: those within the budget, and those over it."""
        fits: list[Settings] = []
        over: list[Settings] = []
        for number, size in enumerate(sizes):
            if number >= _SIZES and fits:
                break
            for combination in combinations:
                settings = replace(combination, micro_batch=size)
                if self.fits(settings):
                    fits.append(settings)
                elif self.trials[settings].peak_bytes is not None:
                    over.append(settings)
        return fits, over

    def promising(self, fits: list[Settings], over: list[Settings]) -> list[Settings]:
        """Those worth a race: fast in a first look, planned where they are over the budget."""
        seconds = self.looks(fits, _SLOW)
        found = self.not_slow(seconds, _SLOW)
        least = min(seconds.values(), default=math.inf)
        ahead = self.looks(over, 1.0)
        # Recomputing everything costs one more forward, a third of a step; the share of the peak
        # that has to go is a guess at how much of it is due.
        missing = {s: 1 - self.budget / (self.trials[s].peak_bytes or 1) for s in ahead}
        order = sorted(ahead, key=lambda s: ahead[s] * (1 + missing[s] / 3))
        if not fits:  # what matters first is that some plan fits at all
            order = list(dict.fromkeys([*sorted(ahead, key=missing.__getitem__)[:2], *order]))
        for settings in order[:_PLANS]:
            if ahead[settings] < least and (planned := self.planned(settings)) is not None:
                found.append(planned)
                least = min(least, self.look(planned) or math.inf)
        return [s for s in found if self.trials[s].gradient_error or self.is_accurate(s)]

    def planned(self, settings: Settings) -> Settings | None:
        """The settings with a checkpoint plan that brings them within the budget, if there is one.

        The measured peak has to fit: by as much as it is above the predicted one, the next plan is
        made for less.
        """
        plan, budget = self.plan(settings), self.budget
        if plan is None:
            return None
        for _ in range(_REVISIONS):
            try:
                plan = plan.within(budget)
            except ValueError as error:
                self.note(f"{settings}: {error}")
                return None
            peak = self.trials[settings].peak_bytes
            if any(step != "save" for step in plan.steps):  # else it is no other candidate
                planned = self.with_plan(settings, plan)
                if self.fits(planned):
                    return planned
                peak = self.trials[planned].peak_bytes
            if peak is None:
                return None
            budget = min(budget - 1, self.budget - (peak - plan.predicted_bytes))
        return None

    def with_plan(self, settings: Settings, plan: CheckpointPlan) -> Settings:
        return replace(settings, checkpoint=plan.locate(self.bench.copy_for(settings).model))

    def plan(self, settings: Settings) -> CheckpointPlan | None:
        """Plans for one micro-batch, for any budget; None, with a note, if there are none."""
        self.show(f"checkpoint plan for {settings}")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", UserWarning)
                plan = plan_checkpoints(
                    self.chain(settings),
                    self.bench.loss(settings),
                    sys.maxsize,
                    accumulate=settings.micro_batch is not None,
                )
        except Exception as error:  # a container's children need not be a chain
            self.note(f"{settings}: {error}")
            return None
        for warning in caught:
            self.note(str(warning.message))
        return plan

    def chain(self, settings: Settings) -> Any:
        """The modules to plan for, on the copy where these settings run."""
        model = self.bench.copy_for(settings).model
        if self.blocks is None:
            self.blocks = _widest_container(model, self.bench.saved_by_module())
        if isinstance(self.blocks, str):
            return model.get_submodule(self.blocks)
        return [model.get_submodule(name) for name in self.blocks]

    def smallest(self) -> list[Settings]:
        """Where nothing fits: the plan with the least peak, for what has the least without one."""
        over = {s: t.peak_bytes for s, t in self.trials.items() if t.verdict.startswith("peak")}
        unplanned = [s for s in over if not s.checkpoint]
        if not unplanned:
            return []
        settings = min(unplanned, key=lambda s: over[s] or 0)
        plan = self.plan(settings)
        if plan is None:
            return []
        planned = self.with_plan(settings, plan.within(min(nbytes for nbytes, _ in plan.curve)))
        return [planned] if self.fits(planned) and self.is_accurate(planned) else []

    def note(self, text: str) -> None:
        sentence = text.removesuffix(".") + "."
        if sentence not in self.notes:
            self.notes.append(sentence)

    def race(self, contenders: list[Settings]) -> list[Settings]:
        """Time the contenders, and fp32 as it is; return the best, and the runner-up if any."""
        base = Settings()
        entered = list(dict.fromkeys([*contenders, *([] if self.has_failed(base) else [base])]))
        self.bench.keep(entered)
        left, best, others = entered, base, list[Settings]()
        for rounds in _ROUNDS:
            ratios, band = self.timed(left, rounds)
            ratios = {s: ratio for s, ratio in ratios.items() if s in contenders}
            if not ratios:
                return []
            best, left = self.settle(ratios, band)
            others = others or [*ratios]
            if len(left) == 1 or (rounds > _ROUNDS[0] and _is_close(ratios, left)):
                break
        others = sorted((s for s in others if s != best), key=lambda s: self.trials[s].time or 0)
        return [best, *others[:1]]

    def timed(
        self, settings: list[Settings], rounds: int, reference: Settings | None = None
    ) -> tuple[dict[Settings, Ratio], float]:
        """Times relative to the reference (the fastest so far if None), and the noise of its own.

        Absolute times are tied to those of the first race: the machine may have slowed since.
        """
        while True:
            self.show(f"race of {len(settings)} candidates")
            if reference not in settings:
                reference = min(settings, key=lambda s: self.trials[s].time or 0)
            names = {s: f"{s} ({number})" for number, s in enumerate(settings)}
            failed: list[tuple[Settings, Exception]] = []
            thunks = {name: self.watched(s, failed) for s, name in names.items()}
            try:
                result = compare(thunks, baseline=names[reference], rounds=rounds, memory=False)
                break
            except Exception:
                if not failed:
                    raise
            settings = [s for s in settings if s != failed[0][0]]
            self.attempt(failed[0][0], partial(_fail, failed.pop()[1]))
            if not settings:
                return {}, 1.0
        ratios = {s: result.ratios[name] for s, name in names.items()}
        known = self.trials[reference].time if reference in self.raced else None
        known = result.medians[names[reference]] if known is None else known
        for s, ratio in ratios.items():
            self.record(s, time=known * ratio.median)
        self.raced.update(settings)
        self.noise = result.noise
        return ratios, result.noise_band[1]

    def watched(
        self, settings: Settings, failed: list[tuple[Settings, Exception]]
    ) -> Callable[[], None]:
        step = self.bench.step(settings)

        def run() -> None:
            try:
                step()
            except Exception as error:
                failed.append((settings, error))
                raise

        return run

    def settle(self, ratios: dict[Settings, Ratio], band: float) -> tuple[Settings, list[Settings]]:
        """Choose the smallest peak among those that noise does not tell from the fastest."""
        level = min(ratio.median for ratio in ratios.values())
        left = _undecided(ratios, band)
        # On a noisy machine that may be half the field; the choice is among the close ones.
        close = [s for s in left if ratios[s].median <= _CLOSE * level]
        best = min(close, key=lambda s: (self.trials[s].peak_bytes or 0, ratios[s].median))
        for s, ratio in ratios.items():
            if s == best:
                among = f": a tie of {len(close)}, at the smallest peak" if len(close) > 1 else ""
                self.record(s, verdict=f"best{among}")
            elif s in close:
                self.record(s, verdict="tie: as fast as the best, at no smaller peak")
            else:
                scaled = Ratio(*(value / level for value in ratio))
                doubt = ", within the noise" if s in left else ""
                self.record(s, verdict=f"slower: {scaled} times the fastest{doubt}")
        return best, left

    def compiled(self, eager: list[Settings]) -> Settings:
        """Compile the best and the runner-up; return what is best then."""
        before, finals, band = eager[0], {eager[0]: Ratio(1.0, 1.0, 1.0)}, 1.0
        for settings in eager:
            candidate = replace(settings, compile=True)
            self.bench.keep([before, candidate])
            torch.compiler.reset()  # or a graph made for another candidate might be used
            with warnings.catch_warnings():  # of Dynamo, of the inputs of the blocks it traces
                warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a")
                first = self.look(candidate)
                sound = first is not None and self.fits(candidate) and self.is_accurate(candidate)
            if first is None or not sound:
                continue
            for rounds in _ROUNDS[1:]:
                ratios, high = self.timed([before, candidate], rounds, before)
                if candidate not in ratios or _is_close(ratios, _undecided(ratios, high)):
                    break
            if candidate in ratios:
                finals[candidate], band = ratios[candidate], max(band, high)
                self.repaid(candidate, before, first)
        torch.compiler.reset()
        if len(finals) == 1:
            return before
        best, _ = self.settle(finals, band)
        for s, trial in self.trials.items():
            if best != before and trial.verdict.startswith("tie") and s not in finals:
                times = (trial.time or 0) / (self.trials[best].time or math.inf)
                self.record(s, verdict=f"slower: {times:.2f} times the best")
        return best

    def repaid(self, candidate: Settings, before: Settings, first: float) -> None:
        """Note after how many steps compiling has cost less time than it saved."""
        now, then = self.trials[candidate].time or 0.0, self.trials[before].time or 0.0
        cost = max(0.0, first - now)
        self.break_even[candidate] = cost / (then - now) if now < then else math.inf
        when = f"after {self.break_even[candidate]:.0f} steps" if now < then else "never"
        self.note(f"{candidate}: compiling took {cost:.1f} s, gained back {when}.")

    def impossible(self) -> str:
        """Say what is missing, and the least of it that can be had."""
        trials = self.trials.values()
        over = [(t.peak_bytes or 0, t) for t in trials if t.verdict.startswith("peak")]
        errors = [(t.gradient_error, t) for t in trials if t.gradient_error is not None]
        if over:
            peak, trial = min(over, key=itemgetter(0))
            return (
                f"autotune: nothing fits memory_budget={readable_bytes(self.budget)}; the least "
                f"attainable peak is {peak} bytes ({readable_bytes(peak)}), with "
                f"{trial.settings}; raise the budget or use a smaller batch"
            )
        if errors and not min(errors, key=itemgetter(0))[0] <= self.tolerance:
            error, trial = min(errors, key=itemgetter(0))
            return (
                f"autotune: no gradient is within tolerance={self.tolerance:.2g}; the least "
                f"attainable error is {error:.2g}, with {trial.settings}; raise the tolerance"
            )
        first = next(iter(self.trials.values()))
        return f"autotune: every candidate fails; {first.settings} {first.verdict}"


def _undecided(ratios: dict[Settings, Ratio], band: float) -> list[Settings]:
    """Those that the noise does not tell from the fastest."""
    level = min(ratio.median for ratio in ratios.values())
    return [s for s, ratio in ratios.items() if ratio.low <= level * band]


def _is_close(ratios: dict[Settings, Ratio], settings: list[Settings]) -> bool:
    """Whether it matters little which of them it is."""
    medians = [ratios[s].median for s in settings]
    return max(medians) <= _CLOSE * min(medians)


def _combinations(settings: list[Settings]) -> list[Settings]:
    return [replace(s, micro_batch=None) for s in settings]


def _fail(error: Exception, _: Settings) -> None:
    raise error


def _formats(bench: Workbench) -> list[Literal["contiguous_format", "channels_last"]]:
    """Memory formats worth a try: the other one matters to convolutions of images alone."""
    images = any(t.dim() == 4 for t in tree_leaves(bench.batch[0]) if isinstance(t, Tensor))
    kinds = (nn.Conv2d, nn.ConvTranspose2d)
    if images and any(isinstance(module, kinds) for module in bench.model.modules()):
        return ["contiguous_format", "channels_last"]
    return ["contiguous_format"]


def _widest_container(model: nn.Module, saved: dict[str, int]) -> str:
    """The container whose children save the most; where one holds another, the finer one."""
    sums = {
        name: sum(
            n for source, n in saved.items() if not name or f"{source}.".startswith(f"{name}.")
        )
        for name, module in model.named_modules()
        if isinstance(module, nn.Sequential | nn.ModuleList) and len(module) > 1
    }
    if not sums:
        raise ValueError(
            "no checkpoint plan, as the model has no nn.Sequential or nn.ModuleList of two modules "
            "or more; pass blocks"
        )
    wide = [name for name, n in sums.items() if n >= 0.9 * max(sums.values())]
    return max(wide, key=lambda name: len([*model.get_submodule(name).children()]))
