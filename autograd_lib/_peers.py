"""The processes of a run: what they tell each other, and how a model is spread over them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from autograd_lib.gradients import _is_distributed

_T = TypeVar("_T")


class Peers:
    """The processes of the default group; one alone where there is no group."""

    def __init__(self) -> None:
        there = distributed.is_available() and distributed.is_initialized()
        self.rank = distributed.get_rank() if there else 0
        self.world = distributed.get_world_size() if there else 1
        nccl = there and "nccl" in distributed.get_backend()
        self._device = torch.device("cuda" if nccl else "cpu")

    def gather(self, *values: float) -> list[list[float]]:
        """The numbers of each process, in the order of ranks."""
        if self.world == 1:
            return [list(values)]
        own = torch.tensor(values, dtype=torch.float64, device=self._device)
        found = [torch.empty_like(own) for _ in range(self.world)]
        distributed.all_gather(found, own)
        return torch.stack(found).tolist()

    def gather_objects(self, value: _T) -> list[_T]:
        """What each process has, in the order of ranks."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        distributed.all_gather_object(found, value)
        return found

    def sum(self, value: Tensor) -> Tensor:
        """The sum over all processes, without waiting for the device."""
        if self.world > 1:
            value = value.to(self._device, copy=True)
            distributed.all_reduce(value)
        return value

    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Do what DDP does, for parameters that are not in the model."""
        if self.world > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                distributed.all_reduce(parameter.grad)
                parameter.grad /= self.world

    def begin_alike(self, module: nn.Module) -> None:
        """Give every process the parameters and buffers of the first."""
        if self.world > 1:
            with torch.no_grad():
                for tensor in [*module.parameters(), *module.buffers()]:
                    distributed.broadcast(tensor.detach(), 0)

    def in_step(self, batches: Iterable[_T]) -> Iterator[tuple[_T, bool]]:
        """Batches, and whether they count: who has fewer gives its last again, until all are done.

        Every process must take part in what all do together.
        """
        iterator, batch = iter(batches), None
        while True:
            found = next(iterator, None)
            counts = found is not None
            batch = batch if found is None else found
            if not any(flag for (flag,) in self.gather(counts)):
                return
            if batch is None:
                raise ValueError(
                    f"fit: the loader of rank {self.rank} gives no batch, those of others do; "
                    "every process needs at least one"
                )
            yield batch, counts


def spread(
    model: nn.Module, optimizer: Optimizer, peers: Peers, *, strategy: str, unused: bool
) -> nn.Module:
    """Wrap a model for several processes, unless that has been done; return what is to be called.

    `fully_shard` replaces the parameters of a model; the optimizer is given the new ones.
    """
    parameters = list(model.parameters())
    wrapped = isinstance(model, DistributedDataParallel) or any(map(_is_distributed, parameters))
    if peers.world == 1 or wrapped:
        return model
    if strategy == "ddp":
        return DistributedDataParallel(model, find_unused_parameters=unused)
    if optimizer.state:
        raise ValueError(
            "AutogradTrainingSystem: the optimizer has state already, which fully_shard would "
            "leave behind; make the system before the first step, then load"
        )
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415, a sixth of the time of torch

    peers.begin_alike(model)
    names = {parameter: name for name, parameter in model.named_parameters()}
    for block in getattr(model, "blocks", ()):
        fully_shard(block)
    fully_shard(model)
    now = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [now[names[p]] if p in names else p for p in group["params"]]
    return model


def module_of(model: nn.Module) -> nn.Module:
    """The module inside a DDP wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


@contextlib.contextmanager
def synchronized(model: nn.Module, last: bool) -> Iterator[None]:
    """Let processes exchange gradients in the last backward of a step only."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if set_sync := getattr(model, "set_requires_gradient_sync", None):  # of `fully_shard`
        set_sync(last)
    yield
