"""Checkpoints: written atomically, read without running code, checked before they are loaded."""

from __future__ import annotations

import zipfile
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from autograd_lib.core.files import replaced_atomically
from autograd_lib.core.shards import is_distributed

_FORMAT = "autograd_lib training state, version 2"
_PLAIN = (str, int, float, bool, bytes, type(None), torch.Size, torch.dtype)


def write(state: dict[str, Any], path: Path) -> None:
    """Write a state that `read` accepts; until that is done, what was at `path` stays."""
    _check_plain(state, "state")
    # Opened here: torch.save itself raises a RuntimeError for what is an OSError.
    with replaced_atomically(path) as new, new.open("wb") as file:
        torch.save({"format": _FORMAT, **state}, file)


def read(path: Path) -> dict[str, Any]:
    """Read what `write` wrote: tensors and plain values, no code."""
    with path.open("rb") as file:  # what cannot be opened is an OSError
        try:
            with zipfile.ZipFile(file) as archive:
                damaged = archive.testzip()  # torch.load does not look at the checksums
        # A flipped bit may ask for a password, an unknown compression, a place before the start.
        except Exception as err:
            raise ValueError(
                f"load: {path} is no checkpoint, or only a part of one ({err}); expected a file "
                "that save() wrote"
            ) from err
    if damaged is not None:
        raise ValueError(f"load: {path} is damaged, the checksum of {damaged!r} in it is wrong")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # whatever the files of others may provoke
        reason = str(err).strip().partition("\n")[0]
        raise ValueError(
            f"load: {path} is not a file that save() wrote; PyTorch says: {reason}"
        ) from err
    found = state.get("format") if isinstance(state, dict) else type(state).__name__
    if found != _FORMAT:
        raise ValueError(
            f"load: expected {path} to be a file that save() wrote ({_FORMAT!r}), got {found!r}; "
            "weights alone go into the model by model.load_state_dict(torch.load(path))"
        )
    return state


def _check_plain(value: Any, where: str) -> None:
    """Raise for what torch.load would refuse to read back."""
    if type(value) in (dict, OrderedDict, Counter):
        for key, inner in value.items():
            _check_plain(key, f"the keys of {where}")
            _check_plain(inner, f"{where}[{key!r}]")
    elif type(value) in (list, tuple):
        for i, inner in enumerate(value):
            _check_plain(inner, f"{where}[{i}]")
    elif not isinstance(value, Tensor) and type(value) not in _PLAIN:
        raise TypeError(
            f"save: expected tensors and plain numbers and text, got {type(value).__name__} in "
            f"{where}, which could not be loaded safely; make it a number, as with float(...)"
        )


# Sharded tensors


# Not written by `torch.distributed.checkpoint`: its `save` leaves a directory that each process
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


def _sharded_as(value: Any, reference: Tensor) -> Any:
    """Shard a full tensor as a reference of its shape is sharded; return anything else as it is."""
    if (
        not isinstance(value, Tensor)
        or not is_distributed(reference)
        or value.shape != reference.shape
    ):
        return value
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415

    device = reference.device_mesh.device_type
    return distribute_tensor(
        value.to(device), reference.device_mesh, reference.placements, src_data_rank=None
    )


# What may be loaded


def kinds_of(optimizer: Optimizer, scheduler: object) -> dict[str, str]:
    """The kinds that a checkpoint must agree with."""
    return {"optimizer": _kind(optimizer), "scheduler": _kind(scheduler)}


def _kind(thing: object) -> str:
    """The name of a class; of a scheduler made of schedulers their names too."""
    inner = ", ".join(map(_kind, getattr(thing, "_schedulers", ())))
    return type(thing).__name__ + (f"({inner})" if inner else "")


def check_module(what: str, module: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise if a state is that of another module; `load_state_dict` would load a part of it."""
    shapes = {name: tuple(t.shape) for name, t in _tensors(module.state_dict()).items()}
    found = {name: tuple(t.shape) for name, t in _tensors(state).items()}
    other = [name for name in (shapes | found) if shapes.get(name) != found.get(name)]
    if other:
        name = other[0]
        expected, got = shapes.get(name, "no such entry"), found.get(name, "none")
        raise ValueError(
            f"load: the checkpoint is of another {what}: expected {name!r} of shape {expected}, "
            f"got {got}, and {len(other) - 1} more; nothing was changed. Make the {what} that was "
            "saved"
        )


def _tensors(state: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def load_module(module: nn.Module, state: Mapping[str, Any]) -> None:
    now = module.state_dict()  # may have entries that are no tensors, an extra state
    module.load_state_dict({n: _sharded_as(value, now[n]) for n, value in state.items()})


def parameter_shapes(optimizer: Optimizer) -> list[list[list[int]]]:
    return [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]


def check_optimizer(optimizer: Optimizer, found: list[list[list[int]]]) -> None:
    """Raise for other groups or another order: the state goes by positions of parameters."""
    expected = parameter_shapes(optimizer)
    numbers = [[*map(len, groups)] for groups in (expected, found)]
    if numbers[0] != numbers[1]:
        raise ValueError(
            f"load: expected an optimizer with groups of {numbers[0]} parameters, got {numbers[1]} "
            "in the checkpoint; nothing was changed. Make the optimizer that was saved"
        )
    if expected != found:
        raise ValueError(
            f"load: expected an optimizer of parameters of shapes {expected}, got {found} in the "
            "checkpoint; nothing was changed. Give it the parameters in the order used when saving"
        )


def load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    sharded = {
        index: {key: _sharded_as(value, parameters[index]) for key, value in entry.items()}
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": sharded})
