"""What a model consists of, and the one number that a guard reads of all its gradients."""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.amp.grad_scaler import OptState
from torch.nn.parallel import DistributedDataParallel

from autograd_lib.core.rows import CPU_SIZES, divide
from autograd_lib.core.shards import find_meshes, is_distributed
from autograd_lib.core.snapshot import torch_generators
from autograd_lib.nonfinite.values import real_values

Reduce = Callable[[Tensor], Tensor]  # a tensor to one number: its sum or its norm

GRAD = operator.attrgetter("grad")
_PARAMETERS, _MODULES = operator.attrgetter("_parameters"), operator.attrgetter("_modules")
_VALUES = operator.methodcaller("values")


class Parts:
    """What a model consists of, and how its gradients are reduced.

    Walking a model costs as much as summing its gradients, so the guard does it where something
    has changed. Only modules are referred to, weakly: `torch.utils.swap_tensors`, and with it
    `model.to()`, refuses parameters that have weak references.
    """

    def __init__(self, model: nn.Module, scaler: GradScaler | None = None) -> None:
        self.model: Callable[[], Any] = weakref.ref(model)
        self.scaler = scaler
        self._buffered = [weakref.ref(module) for module in model.modules() if module._buffers]
        self._parents = [weakref.ref(module) for module in model.modules() if module._modules]
        self._owners = [weakref.ref(module) for module in model.modules() if module._parameters]
        self._look: Callable[[Any], Any] = type
        slots, self._known = self._scan()
        if len({*map(id, slots)}) < len(slots):  # some are shared, or absent
            self._look = id
            _, self._known = self._scan()
        places = {p: i for i, p in reversed([*enumerate(slots)]) if p is not None}
        places = dict(sorted(places.items(), key=operator.itemgetter(1)))  # shared ones once
        parameters = [*places]
        wrappers = [m for m in model.modules() if isinstance(m, DistributedDataParallel)]
        self.groups = [wrapper.process_group for wrapper in wrappers]
        # Processes that have the same gradients.
        self._copies = math.prod(map(torch.distributed.get_world_size, self.groups))
        for mesh in find_meshes(parameters):
            self.groups += [mesh.get_group(dim) for dim in range(mesh.ndim)]
        devices = {p.device for p in parameters if p.device.type not in ("cpu", "meta")}
        self.device = min(devices, key=str, default=torch.device("cpu"))
        self.generators = torch_generators(devices)

        # Small gradients of one shape are copied into one tensor: less work than a sum of each.
        # The memory for it is always the same one: no fresh pages.
        small = [p if type(p) is nn.Parameter and p.is_cpu else None for p in parameters]
        _, piles = divide(small)
        alike: dict[Any, list[int]] = {}
        for i in {*range(len(parameters))}.difference(*piles):
            alike.setdefault((parameters[i].device, parameters[i].dtype), []).append(i)
        self._order: list[int] = []  # places in the order of the piles
        self._piles: list[tuple[slice, Tensor | None]] = []
        rooms: dict[torch.dtype, Tensor] = {}
        for number, index in enumerate([*piles, *alike.values()]):
            first, start, room = parameters[index[0]], len(self._order), None
            if number < len(piles):
                shape = len(index), *first.shape
                memory = rooms.setdefault(first.dtype, first.new_empty(CPU_SIZES[1]))
                room = memory[: math.prod(shape)].view(shape)
            self._order += [places[parameters[i]] for i in index]
            self._piles.append((slice(start, start + len(index)), room))

    def parameters(self) -> list[nn.Parameter] | None:
        """The parameters, or None if the model has others than it had."""
        slots, known = self._scan()
        return [slots[i] for i in self._order] if known == self._known else None

    def _scan(self) -> tuple[list[Any], Any]:
        """What stands in the tables of parameters, and what tells that they have changed."""
        try:
            owners = map(_PARAMETERS, map(operator.call, self._owners))
            parents = map(_MODULES, map(operator.call, self._parents))
            slots = [*chain.from_iterable(map(_VALUES, owners))]
            children = [*map(id, chain.from_iterable(map(_VALUES, parents)))]
        except AttributeError:  # a module is gone
            return [], None
        return slots, (children, [*map(self._look, slots)])

    def modules(self) -> list[nn.Module]:
        """Those that have buffers."""
        return [module for reference in self._buffered if (module := reference()) is not None]

    @torch.no_grad()
    def total(self, grads: Sequence[Tensor | None], losses: Iterable[Tensor | float]) -> Tensor:
        """A number that is finite only if every element is: a sum carries NaN and Inf.

        It may overflow all the same.
        """
        numbers = self._reduce(grads, _sum) + self._losses(losses)
        total = torch.stack(numbers).sum() if numbers else torch.zeros((), device=self.device)
        for group in self.groups:
            torch.distributed.all_reduce(total, group=group)
        return total

    @torch.no_grad()
    def norm(self, grads: Sequence[Tensor | None], losses: Iterable[Tensor | float]) -> Tensor:
        """The norm of all gradients, unscaled and over all processes; NaN for a bad loss."""
        numbers = self._reduce(grads, norm_of) or [torch.zeros((), device=self.device)]
        norm = torch.linalg.vector_norm(torch.stack(numbers))
        states = () if self.scaler is None else self.scaler._per_optimizer_states.values()
        scale = None if self.scaler is None else self.scaler._scale
        if scale is not None and all(state["stage"] is not OptState.UNSCALED for state in states):
            norm = norm / scale.to(norm.device)
        norm = sum((0 * loss for loss in self._losses(losses)), norm)
        if self.groups:
            square = norm.square() / self._copies
            for group in self.groups:
                torch.distributed.all_reduce(square, group=group)
            norm = square.sqrt()
        return norm

    def _losses(self, losses: Iterable[Tensor | float]) -> list[Tensor]:
        sums = [_sum(loss) if isinstance(loss, Tensor) else torch.tensor(loss) for loss in losses]
        return [s.to(self.device, torch.float32) for s in sums]

    def _reduce(self, grads: Sequence[Tensor | None], reduce: Reduce) -> list[Tensor]:
        numbers: list[Tensor] = []
        for pile, room in self._piles:
            numbers += _reduced([grad for grad in grads[pile] if grad is not None], room, reduce)
        return [number.to(self.device, torch.float32) for number in numbers]


def _reduced(grads: list[Tensor], room: Tensor | None, reduce: Reduce) -> Iterable[Tensor]:
    """Numbers of which one is not finite if an element of `grads` is not."""
    try:
        if grads and room is not None and grads[0].shape == room.shape[1:]:
            return [reduce(torch.stack(grads, out=room[: len(grads)]))]
        if {*map(type, grads)} == {Tensor} and not grads[0].is_cpu:  # one kernel for many
            wide = torch.promote_types(grads[0].dtype, torch.float32)
            return torch._foreach_norm(grads, dtype=wide)
    except RuntimeError:
        pass  # a sparse gradient among dense ones, complex ones, what was lazy before
    return map(reduce, grads)


def _sum(tensor: Tensor) -> Tensor:
    if type(tensor) is Tensor and tensor.dtype in (torch.float32, torch.bfloat16):
        return tensor.sum()
    sums = [v.sum(dtype=torch.promote_types(v.dtype, torch.float32)) for v in real_values(tensor)]
    return torch.stack(sums).sum() if sums else torch.zeros((), device=tensor.device)


def norm_of(tensor: Tensor) -> Tensor:
    """The L2 norm of a gradient; of a `DTensor` the share of this process."""
    whole = tensor.coalesce() if tensor.layout is torch.sparse_coo else tensor
    values = [v.to(torch.promote_types(v.dtype, torch.float32)) for v in real_values(whole)]
    if not values:
        return torch.zeros((), device=tensor.device)
    norm = torch.linalg.vector_norm(torch.stack([*map(torch.linalg.vector_norm, values)]))
    if is_distributed(tensor):  # equal copies count once
        mesh, placements = tensor.device_mesh, enumerate(tensor.placements)
        copies = math.prod(mesh.size(dim) for dim, p in placements if p.is_replicate())
        norm = norm / math.sqrt(copies)
    return norm


def gather(groups: Sequence[Any], value: Any) -> list[Any]:
    """What every process of `groups` has, in the order of ranks."""
    values = [value]
    for group in groups:
        gathered: list[Any] = [None] * torch.distributed.get_world_size(group)
        torch.distributed.all_gather_object(gathered, values, group=group)
        values = [entry for entries in gathered for entry in entries]
    return values
