"""The processes of a run: their collectives, and how a model is parallelized over them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from autograd_lib.config.records import DistributedConfig
from autograd_lib.core.shards import is_distributed

_T = TypeVar("_T")
_END = object()  # of a loader, in place of a batch


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

    def broadcast(self, tensors: Iterable[Tensor]) -> None:
        """Give every process the values of the first."""
        if self.world > 1:
            for tensor in tensors:
                distributed.broadcast(tensor.detach(), 0)

    @contextlib.contextmanager
    def raise_on_all(self) -> Iterator[None]:
        """Raise an error of one process in all of them, so that none waits for it.

        The block must not contain a collective: the others would wait in it.
        """
        own: Exception | None = None
        try:
            yield
        except Exception as error:
            own = error
            raise
        finally:
            errors = self.gather_objects(own)
        for rank, other in enumerate(errors):
            if other is not None:
                other.add_note(f"(raised on rank {rank})")
                raise other

    def even_batches(
        self, batches: Iterable[_T], last: _T | None = None, name: str = "loader"
    ) -> Iterator[tuple[_T, bool]]:
        """Batches, and whether they count: equally many on every process.

        A process that runs out repeats its last batch, which does not count, as every process must
        take part in the collectives of a step.

        Args:
            batches: Of this process.
            last: The one before them.
            name: What messages call the loader.
        """
        iterator, batch = iter(batches), last
        while True:
            found: Any = None
            try:
                found = next(iterator, _END)
                if found is None:
                    raise ValueError(
                        f"the {name} gives None for a batch; expected a mapping or a pair (inputs, "
                        "targets): let its collate_fn or its generator skip what is empty"
                    )
            finally:  # before an error goes on, the others are told
                batch = batch if found is _END else found
                status = self.gather(found is not _END, batch is not None, found is None)
            counted, present, failures = (list(flags) for flags in zip(*status, strict=True))
            if any(failures):
                raise RuntimeError(
                    f"the {name} of rank {failures.index(True)} raised an error; the output of "
                    "that rank holds its traceback"
                )
            if not all(present):
                raise ValueError(
                    f"the {name} of rank {present.index(False)} gives no batch; expected one that "
                    "can be gone through in each epoch, as a list or a DataLoader, and at least "
                    "one batch for every process"
                )
            if not any(counted):
                return
            assert batch is not None
            yield batch, found is not _END


def parallelize(
    model: nn.Module, optimizer: Optimizer, peers: Peers, config: DistributedConfig
) -> nn.Module:
    """Wrap a model for several processes, unless it is wrapped already; return the wrapper.

    `fully_shard` replaces the parameters of a model; the optimizer is given the new ones.
    """
    parameters = list(model.parameters())
    wrapped = isinstance(model, DistributedDataParallel) or any(map(is_distributed, parameters))
    if peers.world == 1 or wrapped:
        return model
    if config.strategy == "ddp":
        unused = config.find_unused_parameters
        return DistributedDataParallel(model, find_unused_parameters=unused)
    if optimizer.state:
        raise ValueError(
            "AutogradTrainingSystem: the optimizer has state already, which fully_shard would "
            "leave behind; make the system before the first step, then load"
        )
    # Imported here: together they take a sixth of the time of importing torch.
    from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415
    from torch.distributed.fsdp import fully_shard  # noqa: PLC0415

    peers.broadcast([*parameters, *model.buffers()])
    # The mesh is on the model's device; by default it would be on an accelerator if there is one.
    mesh = init_device_mesh(parameters[0].device.type, (peers.world,))
    names = {parameter: name for name, parameter in model.named_parameters()}
    for block in getattr(model, "blocks", ()):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    now = dict(model.named_parameters())
    for group in optimizer.param_groups:
        group["params"] = [now[names[p]] if p in names else p for p in group["params"]]
    return model


def clip_gradients(parameters: Iterable[Tensor], limit: float) -> Tensor:
    """Clip to a norm over all gradients, sharded and sparse ones included; return what it was."""
    # PyTorch 2.13 takes no mixture of sharded and plain tensors; the parameters of a loss are
    # not sharded with the model. Of sparse gradients it has no norm and takes no factor: a tensor
    # stands for each whose gradient is what it stores, one value for each index.
    kinds: dict[bool, list[Tensor]] = {}
    for parameter in parameters:
        owner, grad = parameter, parameter.grad
        if grad is None:
            continue
        if grad.is_sparse:
            parameter.grad = grad.coalesce()
            owner = torch.empty_like(parameter.grad.values())
            owner.grad = parameter.grad.values()
        kinds.setdefault(is_distributed(owner), []).append(owner)
    grads = [[p.grad for p in kind if p.grad is not None] for kind in kinds.values()]
    norms = map(nn.utils.get_total_norm, grads or [[]])
    whole = [norm.full_tensor() if is_distributed(norm) else norm for norm in norms]
    total = whole[0] if len(whole) == 1 else torch.stack(whole).norm()
    for kind in kinds.values():
        nn.utils.clip_grads_with_norm_(kind, limit, total)
    return total


def optimized(optimizer: Optimizer) -> list[Tensor]:
    """The parameters of an optimizer."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


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
    if set_sync := getattr(type(model), "set_requires_gradient_sync", None):  # of `fully_shard`
        set_sync(model, last)
    yield
