"""Stopping a loop between steps, and resuming it within an epoch."""

from __future__ import annotations

import contextlib
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

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
            for weight, value in zip(weights, before, strict=True):
                weight.data.copy_(value)


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


def _parts(loader: Any) -> list[Any]:
    """A loader, the `DataLoader` that it may have as an attribute, their data and samplers."""
    attributes = getattr(loader, "__dict__", {}).values()
    parts = [loader, *(value for value in attributes if isinstance(value, DataLoader))]
    for name in ("dataset", "batch_sampler", "sampler"):
        parts += [getattr(part, name, None) for part in parts]
    return parts


def generators_of(loader: Any) -> list[torch.Generator]:
    """The generators that a loader and its parts draw from, other than the global one."""
    found = [getattr(part, "generator", None) for part in _parts(loader)]
    return list(dict.fromkeys(g for g in found if isinstance(g, torch.Generator)))


def set_generators(loader: Any, states: Sequence[Tensor]) -> None:
    """Set the generators of a loader to states that were saved."""
    generators = generators_of(loader)
    if len(generators) != len(states):
        raise ValueError(
            f"fit: expected a loader with {len(states)} generators of its own, as in the "
            f"interrupted run, got {len(generators)}; give the loader used before the "
            "interruption"
        )
    for generator, state in zip(generators, states, strict=True):
        generator.set_state(state)


def begin_epoch(loader: Any, epoch: int, states: Sequence[Tensor] | None = None) -> dict[str, Any]:
    """Tell the sampler the epoch; return what the order of its batches depends on.

    Args:
        loader: Gives the batches.
        epoch: Its number, from 0.
        states: Of the loader's generators at the end of the last epoch, from a checkpoint.
    """
    if states is not None:
        try:
            set_generators(loader, states)
        except ValueError as error:  # between epochs, it may be another loader on purpose
            warnings.warn(str(error), stacklevel=5)
    for part in _parts(loader):
        if hasattr(part, "set_epoch"):  # a DistributedSampler would repeat its first order
            part.set_epoch(epoch)
    return {**random_state(), "loader": [g.get_state() for g in generators_of(loader)]}


def resume_epoch(
    loader: Any, epoch: int, position: int, start: dict[str, Any]
) -> tuple[Iterator[Any], Any, int]:
    """The batches of an epoch that began with the random state `start`, from `position` on.

    Those before it are drawn again, with the random state of that epoch, and dropped.

    Returns:
        The batches; the one before them, or None; and how many were dropped.
    """
    now = random_state()
    begin_epoch(loader, epoch)
    set_generators(loader, start["loader"])
    set_random_state(start)
    iterator = iter(loader)
    last, skipped = None, 0
    for last in islice(iterator, position):  # noqa: B007, it is what is returned
        skipped += 1
    set_random_state(now)
    return iterator, last, skipped
