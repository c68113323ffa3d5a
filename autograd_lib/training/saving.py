"""Checkpoints: written atomically, read without running code, checked before they are loaded."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from autograd_lib.core.files import replaced_atomically
from autograd_lib.core.shards import is_distributed
from autograd_lib.core.snapshot import writable_buffers
from autograd_lib.training.distributed import optimized

_FORMAT = "autograd_lib training state, version 3"


def write(state: dict[str, Any], path: Path) -> None:
    """Write a state that `read` accepts; until that is done, what was at `path` stays."""
    with replaced_atomically(path) as new:
        # Opened here: torch.save itself raises a RuntimeError for what is an OSError.
        with new.open("wb") as file:
            torch.save({"format": _FORMAT, **state}, file)
        unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(new)
        if unsafe:
            raise TypeError(
                f"save: expected tensors and plain numbers and text, got {', '.join(unsafe)} in "
                "the state, which could not be loaded safely; make it a number, as with float(...)"
            )


def read(path: Path) -> dict[str, Any]:
    """Read what `write` wrote: tensors and plain values, no code."""
    with path.open("rb") as file:  # what cannot be opened is an OSError
        try:
            with zipfile.ZipFile(file) as archive:
                # torch.load checks no checksum, and for a directory it leaves memory uninitialized.
                folders = [info.filename for info in archive.infolist() if info.external_attr & 16]
                damaged = archive.testzip() or next(iter(folders), None)
            if damaged is not None:
                raise ValueError(f"its entry {damaged!r} is damaged")
            state = torch.load(path, map_location="cpu", weights_only=True)
            found = state.get("format") if isinstance(state, dict) else type(state).__name__
            if found != _FORMAT:
                raise ValueError(
                    f"expected {_FORMAT!r}, got {found!r}; weights alone go into the model by "
                    "model.load_state_dict(torch.load(path))"
                )
        except Exception as error:  # damaged files and files of others raise anything
            reason = str(error).strip().partition("\n")[0]
            raise ValueError(
                f"load: {path} is not a whole file that save() wrote: {reason}"
            ) from error
    return state


# Sharded tensors


# Not `torch.distributed.checkpoint`: its `save` leaves a directory that each process
# writes a part of and that is unpickled without `weights_only`. What its `state_dict` module
# gathers could go into one file, but `get_optimizer_state_dict` lets an optimizer without state
# step, which step hooks mistake for a real step, and fails on parameters that are not the model's,
# such as a loss's. `torch_save_to_dcp` of `torch.distributed.checkpoint.format_utils` converts the
# file to such a directory.


def full_tensors(tree: Any, keep: bool) -> Any:
    """Gather the sharded tensors of a tree, one by one; empty ones instead if not `keep`."""

    def gathered(tensor: Tensor) -> Tensor:
        if not is_distributed(tensor):
            return tensor
        full = tensor.full_tensor()
        return full.cpu() if keep else full.new_empty(0)

    return tree_map_only(Tensor, gathered, tree)


def _sharded_as(value: Any, reference: Any) -> Any:
    """Shard a full tensor as a reference of its shape is sharded; return anything else as it is."""
    if not (is_distributed(reference) and getattr(value, "shape", None) == reference.shape):
        return value
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415

    mesh = reference.device_mesh
    return distribute_tensor(
        value.to(mesh.device_type), mesh, reference.placements, src_data_rank=None
    )


def load_module(module: nn.Module, state: Mapping[str, Any]) -> None:
    now = module.state_dict()
    whole = {name: _sharded_as(value, now[name]) for name, value in state.items()}
    with writable_buffers(module.modules()):
        module.load_state_dict(whole)


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    parameters = optimized(optimizer)
    sharded = {
        index: {key: _sharded_as(value, parameters[index]) for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": sharded})


# What may be loaded


def signature(
    model: nn.Module, loss: nn.Module, optimizer: Optimizer, scheduler: object
) -> dict[str, Any]:
    """What a checkpoint must agree with, by name: kinds, and the shapes of all tensors."""
    found: dict[str, Any] = {"optimizer": _kind(optimizer), "scheduler": _kind(scheduler)}
    for what, module in (("model", model), ("loss", loss)):
        for name, value in module.state_dict().items():
            if isinstance(value, Tensor):
                found[f"{what} {name}"] = tuple(value.shape)
    for i, group in enumerate(optimizer.param_groups):  # whose state goes by positions
        for j, parameter in enumerate(group["params"]):
            found[f"parameter {j} in group {i} of the optimizer"] = tuple(parameter.shape)
    return found


def _kind(thing: object) -> str:
    """The name of a class; of a scheduler made of schedulers their names too."""
    inner = ", ".join(map(_kind, getattr(thing, "_schedulers", ())))
    return type(thing).__name__ + (f"({inner})" if inner else "")


def check_signature(expected: dict[str, Any], found: dict[str, Any]) -> None:
    """Raise if a checkpoint is of another system; PyTorch would load a part of it."""
    other = [name for name in expected | found if expected.get(name) != found.get(name)]
    if other:
        name, more = other[0], f", and {len(other) - 1} more" if other[1:] else ""
        raise ValueError(
            f"load: the checkpoint is of another system: expected {name} to be "
            f"{expected.get(name)}, got {found.get(name)}{more}; nothing was changed. "
            "Make the system as it was when it was saved"
        )
