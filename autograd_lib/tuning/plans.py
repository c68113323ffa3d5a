"""Checkpoint plans for candidates that are over the budget."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

from autograd_lib.checkpointing.plan import CheckpointPlan, plan_checkpoints
from autograd_lib.config.records import Settings
from autograd_lib.report.tables import readable_bytes
from autograd_lib.tuning.candidates import Candidates

_PLANS = 4  # how many candidates a plan is tried for
_REVISIONS = 4


def planned(candidates: Candidates, over: list[Settings], limit: float | None) -> list[Settings]:
    """Bring candidates within the budget by plans, where that may take less than `limit` seconds.

    Without a limit nothing fits as it is.
    """
    order, trials = candidates.fast(over, math.inf), candidates.trials
    if limit is None:  # what matters first is that some plan fits at all
        order.sort(key=lambda s: trials[s].peak_bytes or 0)
    least, found = limit or math.inf, list[Settings]()
    for settings in order[:_PLANS]:
        ahead = (trials[settings].time or 0.0) < least
        if ahead and (fitting := _within_budget(candidates, settings, limit is None)):
            found += candidates.fast([fitting], math.inf)
            least = min(least, trials[fitting].time or math.inf)
    return found


def _within_budget(
    candidates: Candidates, settings: Settings, nothing_fits: bool
) -> Settings | None:
    """The settings with a plan whose measured peak is within the budget, if there is one.

    By as much as that peak is above the predicted one, the next plan is made for less. Where
    nothing fits, the last one is the plan of the least peak: an error can then name that peak.
    """
    if (plan := _plan(candidates, settings)) is None:
        return None
    model, last, budget = candidates.bench.copy_for(settings).model, None, candidates.budget
    for left in reversed(range(_REVISIONS)):
        least = plan.curve[0][0]
        if budget < least and not nothing_fits:
            need = readable_bytes(least)
            candidates.note(f"Plan for {settings} failed: none is predicted to need below {need}.")
            return None
        plan = plan.within(max(budget if left or not nothing_fits else 0, least))
        found = settings
        if any(step != "save" for step in plan.steps):  # else it is no other candidate
            found = replace(settings, checkpoint=plan.locate(model))
            if found != last and candidates.fits(found):
                return found
            last = found
        peak = candidates.trials[found].peak_bytes
        if peak is None:
            return None
        budget = min(budget - 1, candidates.budget - (peak - plan.predicted_bytes))
    return None


def _plan(candidates: Candidates, settings: Settings) -> CheckpointPlan | None:
    """A plan of the first modules that are a chain; None, with notes, if there are none."""
    candidates.announce(f"checkpoint plan for {settings}")
    bench, accumulate = candidates.bench, settings.micro_batch is not None
    chains, loss = bench.chains_for(settings), bench.loss(settings)
    none = "the model has no nn.Sequential or nn.ModuleList of two modules or more; pass blocks="
    if not chains:
        candidates.note(f"Plan for {settings} failed: {none}.")
    for name, blocks in chains.items():
        try:
            return plan_checkpoints(blocks, loss, sys.maxsize, accumulate=accumulate)
        except Exception as error:  # a container's children need not be a chain
            other = f"pass other blocks= than {name}"
            candidates.note(f"Plan for {settings} failed: {error}; {other}.")
    return None
