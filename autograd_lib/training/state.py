"""The state of a training run, written at once and read with care."""

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
from autograd_lib.core.snapshot import random_state, seed_all, set_random_state

_FORMAT = "autograd_lib training state, version 1"
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


# Tensors that are spread over processes


# `torch.distributed.checkpoint` is not what writes them: its `save` leaves a directory that each
# process writes a part of and that is unpickled without `weights_only`. What its `state_dict`
# module gathers could go into one file, but `get_optimizer_state_dict` lets an optimizer without
# state step, which those who look at steps take for one, and fails on parameters that are not the
# model's, as those of a loss. Its tools know the file nevertheless: `torch_save_to_dcp` of
# `torch.distributed.checkpoint.format_utils` makes such a directory of it.


def whole(tree: Any, keep: bool) -> Any:
    """A tree whose tensors are put together where they are spread; for those who keep it."""

    def gathered(tensor: Tensor) -> Tensor:
        if not is_distributed(tensor):
            return tensor
        together = tensor.full_tensor()
        return together.cpu() if keep else together.new_empty(0)

    return tree_map_only(Tensor, gathered, tree)


def like(value: Tensor, reference: Tensor) -> Tensor:
    """Spread a whole tensor as a reference is spread."""
    if not is_distributed(reference) or value.shape != reference.shape:
        return value
    from torch.distributed.tensor import distribute_tensor  # noqa: PLC0415

    device = reference.device_mesh.device_type
    return distribute_tensor(
        value.to(device), reference.device_mesh, reference.placements, src_data_rank=None
    )


def _draw_apart(rank: int) -> None:
    """Leave the random numbers that another process goes on with, too."""
    seed_all(int(torch.randint(2**62, ())) + rank)


# The state of a training system

# Its attributes that are plain values.
_PROGRESS = (
    *("step", "epoch", "history", "_position", "_seen"),
    *("_best", "_waited", "_failed"),
)


def state_of(system: Any) -> dict[str, Any]:
    """All that training goes on from; complete in the first process, which is to write it."""
    loss, losses, first = system.loss_fn, system._losses, system.peers.rank == 0
    system.peers.make_alike(system.module.buffers())  # of which one set is kept
    return {
        "kinds": _kinds(system),
        "model": whole(system.module.state_dict(), first),
        "optimizer": whole(system.optimizer.state_dict(), first),
        "shapes": _shapes(system.optimizer),
        "loss": loss.state_dict() if isinstance(loss, nn.Module) else {},
        "scheduler": None if system.scheduler is None else system.scheduler.state_dict(),
        "scaler": system.scaler.state_dict(),
        "monitor": None if system.monitor is None else system.monitor.state_dict(),
        "random": system.peers.gather_objects({"now": random_state(), "begun": system._begun}),
        "losses": torch.stack(losses) if losses else torch.empty(0),
        "progress": {name: getattr(system, name) for name in _PROGRESS},
    }


def put_back(system: Any, state: Mapping[str, Any]) -> None:
    """Set the state of a training system; all that can be wrong is found before."""
    if state["kinds"] != (kinds := _kinds(system)):
        raise ValueError(
            f"load: expected a checkpoint of {kinds}, got {state['kinds']}; nothing was changed. "
            "Make the system as it was when it was saved"
        )
    loss = system.loss_fn
    modules = {
        "model": system.module,
        "loss": loss if isinstance(loss, nn.Module) else nn.Module(),
    }
    for what, module in modules.items():
        _check_module(what, module, state[what])
    _check_optimizer(system.optimizer, state["shapes"])
    if system.monitor is not None and state["monitor"] is not None:
        system.monitor.load_state_dict(state["monitor"])  # changes nothing if it is of others
    for what, module in modules.items():
        _load_module(module, state[what])
    _load_optimizer(system.optimizer, state["optimizer"])
    if system.scheduler is not None:
        system.scheduler.load_state_dict(state["scheduler"])
    if system.scaler.is_enabled() and state["scaler"]:
        system.scaler.load_state_dict(state["scaler"])
    for name in _PROGRESS:
        setattr(system, name, state["progress"][name])
    system._losses = list(state["losses"].to(system.device))
    states, rank = state["random"], system.peers.rank
    system._begun = states[rank % len(states)]["begun"]
    set_random_state(states[rank % len(states)]["now"])
    if rank >= len(states):
        _draw_apart(rank)


def _kinds(system: Any) -> dict[str, str]:
    named = {"optimizer": system.optimizer, "scheduler": system.scheduler}
    return {what: _kind(thing) for what, thing in named.items()}


def _kind(thing: object) -> str:
    """The name of a class; of a scheduler made of schedulers their names too."""
    inner = ", ".join(map(_kind, getattr(thing, "_schedulers", ())))
    return type(thing).__name__ + (f"({inner})" if inner else "")


def _check_module(what: str, module: nn.Module, state: Mapping[str, Any]) -> None:
    """Raise if a state is that of another module; `load_state_dict` finds out half-way."""
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


def _load_module(module: nn.Module, state: Mapping[str, Any]) -> None:
    now = module.state_dict()
    spread = {
        name: like(value, now[name]) if isinstance(value, Tensor) else value
        for name, value in state.items()
    }
    module.load_state_dict(spread)


def _shapes(optimizer: Optimizer) -> list[list[list[int]]]:
    return [[list(p.shape) for p in group["params"]] for group in optimizer.param_groups]


def _check_optimizer(optimizer: Optimizer, found: list[list[list[int]]]) -> None:
    """Raise for other groups or another order: the state goes by the places of parameters."""
    expected = _shapes(optimizer)
    numbers = [[*map(len, groups)] for groups in (expected, found)]
    if numbers[0] != numbers[1]:
        raise ValueError(
            f"load: expected an optimizer with groups of {numbers[0]} parameters, got {numbers[1]} "
            "in the checkpoint; nothing was changed. Make the optimizer that was saved"
        )
    if expected != found:
        raise ValueError(
            f"load: expected an optimizer of parameters of shapes {expected}, got {found} in the "
            "checkpoint; nothing was changed. Give it the parameters in the order of then"
        )


def _load_optimizer(optimizer: Optimizer, state: Mapping[str, Any]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    spread = {
        index: {
            key: like(value, parameters[index]) if isinstance(value, Tensor) else value
            for key, value in entry.items()
        }
        for index, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": spread})
