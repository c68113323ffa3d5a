"""Tensors that are distributed over processes: the shard of this one, and results merged."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeGuard

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

    # For each mesh the positions of its tensors, and the dimensions along which some are sharded.
    Meshes = dict[DeviceMesh, tuple[list[int], list[int]]]


def is_distributed(tensor: object) -> TypeGuard[DTensor]:
    """Whether `tensor` is a `DTensor`."""
    # Importing torch.distributed.tensor takes half as long as importing torch itself, and where
    # nobody has imported it no DTensor can exist.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def find_meshes(tensors: Sequence[Tensor]) -> Meshes:
    """The meshes over which `tensors` are distributed."""
    meshes: Meshes = {}
    for i, tensor in enumerate(tensors):
        if is_distributed(tensor) and tensor.device_mesh.get_coordinate() is not None:
            index, dims = meshes.setdefault(tensor.device_mesh, ([], []))
            index.append(i)
            sharded = [d for d, placement in enumerate(tensor.placements) if placement.is_shard()]
            dims += [dim for dim in sharded if dim not in dims]
    return meshes


def shard(tensor: Tensor, meshes: Meshes) -> Tensor:
    """What this process contributes to `tensor`; of equal copies only the first contributes."""
    if not is_distributed(tensor):
        return tensor
    from torch.distributed.tensor import Replicate  # noqa: PLC0415

    if any(placement.is_partial() for placement in tensor.placements):
        summed = [Replicate() if p.is_partial() else p for p in tensor.placements]
        tensor = tensor.redistribute(placements=summed)
    local = tensor.to_local()
    _, dims = meshes.get(tensor.device_mesh, ([], []))
    coordinate = tensor.device_mesh.get_coordinate() or ()
    copy = any(coordinate[d] > 0 and tensor.placements[d].is_replicate() for d in dims)
    return local.flatten()[:0] if copy else local


def merge_processes(found: Tensor, meshes: Meshes, merge: Callable[[Tensor], Tensor]) -> Tensor:
    """Merge into `found` [fields, tensors] what the other processes found of the same tensors.

    Takes one collective for each sharded dimension of a mesh: every process must call.
    """
    for mesh, (index, dims) in meshes.items():
        own = found[:, index]
        for dim in dims:
            own = merge(_gather(own, mesh, dim))
        found[:, index] = own
    return found


def _gather(own: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """What each process along a dimension of the mesh has, in a new last dimension."""
    sent = own.to(mesh.device_type).contiguous()
    received = sent.new_empty(mesh.size(dim) * len(sent), *sent.shape[1:])  # gloo stacks none
    new = hasattr(torch.distributed, "all_gather_single")  # the other warns that it is deprecated
    name = "all_gather_single" if new else "all_gather_into_tensor"
    getattr(torch.distributed, name)(received, sent, group=mesh.get_group(dim))
    return received.view(-1, *sent.shape).movedim(0, -1).to(own.device)
