"""Stopping a loop between steps, and resuming it within an epoch."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any, cast

import torch
from torch import nn
from torch.optim import Optimizer

from autograd_lib.core.snapshot import random_state, set_random_state
from autograd_lib.training.distributed import optimized

Stop = Callable[[], int]


@contextlib.contextmanager
def stop_requested() -> Iterator[Stop]:
    """Record Ctrl-C and SIGTERM instead of stopping; a second signal interrupts at once.

    Yields a function that returns the signal that was received, or 0. Outside of the main thread,
    where Python allows no handlers, it always returns 0.
    """
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: received[0] if received else 0
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def has_modes(optimizer: Optimizer) -> bool:
    """Whether weights differ between training and evaluation, as schedule-free optimizers' do."""
    return all(callable(getattr(optimizer, name, None)) for name in ("train", "eval"))


@contextlib.contextmanager
def averaged(optimizer: Optimizer) -> Iterator[None]:
    """Put an optimizer that has modes into evaluation mode; then the weights back as they were.

    Its own `train()` would give them back but for rounding, and training would depend on how often
    it is evaluated and saved.
    """
    if not has_modes(optimizer):
        yield
        return
    modal, weights = cast(Any, optimizer), optimized(optimizer)
    before = [weight.detach().clone() for weight in weights]
    modal.eval()
    try:
        yield
    finally:
        if not all(map(torch.equal, weights, before)):  # else it was in evaluation mode before
            modal.train()
            with torch.no_grad():
                for weight, value in zip(weights, before, strict=True):
                    weight.copy_(value)


@contextlib.contextmanager
def evaluating(module: nn.Module, optimizer: Optimizer) -> Iterator[None]:
    """Put model and optimizer into evaluation mode; then each module back into its own."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        with torch.no_grad(), averaged(optimizer):
            yield
    finally:
        for m, training in modes:
            m.training = training


def generators_of(loader: Any) -> list[torch.Generator]:
    """The generators that a loader or its samplers draw from, other than the global one."""
    batches = getattr(loader, "batch_sampler", None)
    owners = [loader, getattr(loader, "sampler", None), batches, getattr(batches, "sampler", None)]
    found = [getattr(owner, "generator", None) for owner in owners]
    return list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))


def begin_epoch(loader: Any, epoch: int) -> dict[str, Any]:
    """Tell the sampler the epoch; return what the order of its batches depends on."""
    samplers: list[Any] = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
    for sampler in samplers:
        if hasattr(sampler, "set_epoch"):  # a DistributedSampler would repeat its first order
            sampler.set_epoch(epoch)
    return {**random_state(), "loader": [g.get_state() for g in generators_of(loader)]}


def resume_epoch(
    loader: Any, epoch: int, position: int, start: dict[str, Any]
) -> tuple[Iterator[Any], Any, int]:
    """The batches of an epoch that began with the random state `start`, from `position` on.

    Those before it are drawn again, with the random state of that epoch, and dropped.

    Returns:
        The batches; the one before them, or None; and how many were dropped.
    """
    now, generators = random_state(), generators_of(loader)
    if len(generators) != len(start["loader"]):
        raise ValueError(
            f"fit: expected a loader with {len(start['loader'])} generators of its own, as in the "
            f"interrupted epoch, got {len(generators)}; give the loader used before the "
            "interruption"
        )
    begin_epoch(loader, epoch)
    set_random_state(start)
    for generator, state in zip(generators, start["loader"], strict=True):
        generator.set_state(state)
    iterator = iter(loader)
    last, skipped = None, 0
    for last in islice(iterator, position):  # noqa: B007, it is what is returned
        skipped += 1
    set_random_state(now)
    return iterator, last, skipped
