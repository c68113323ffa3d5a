"""What a monitor may be asked for, checked with errors that say what to write instead."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from numbers import Real

import numpy as np
import torch

from autograd_lib.core.statistics import ALWAYS, COUNTS
from autograd_lib.gradients import check_module


def check_integer(operation: str, name: str, value: object, least: int) -> None:
    """Check that an option is an integer of `least` or more."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < least:
        raise ValueError(
            f"{operation}: expected {name} to be an integer of {least} or more, got {value!r}"
        )


def check_options(
    model: object,
    optimizer: object,
    scaler: object,
    *,
    collect: Sequence[str],
    noise: bool,
    thresholds: tuple[float, float],
    **integers: int,
) -> None:
    """Check what a monitor watches and collects, how often, and what it takes for an issue."""
    check_module("GradientMonitor", model)
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(
            f"GradientMonitor: expected scaler to be a torch.amp.GradScaler, got "
            f"{type(scaler).__name__}"
        )
    for name, value in integers.items():
        least = 1 if name in {"history", "every"} else 0
        check_integer("GradientMonitor", name, value, least)
    known = (*ALWAYS, *COUNTS, "cosine")
    if isinstance(collect, str) or not isinstance(collect, Collection) or {*collect} - {*known}:
        remedy = f"; write collect=({collect!r},)" if isinstance(collect, str) else ""
        raise ValueError(
            f"GradientMonitor: expected collect among {known}, got {collect!r}{remedy}"
        )
    if optimizer is None and (integers["update_every"] or noise):
        option = "noise=True" if noise else "update_every"
        raise ValueError(
            f"GradientMonitor: {option} looks at the steps of an optimizer; pass optimizer="
        )
    explode_above, vanish_below = thresholds
    numbers = isinstance(vanish_below, Real) and isinstance(explode_above, Real)
    if not numbers or not 0 <= vanish_below < explode_above:
        raise ValueError(
            "GradientMonitor: expected numbers 0 <= vanish_below < explode_above, got "
            f"vanish_below={vanish_below!r}, explode_above={explode_above!r}"
        )
