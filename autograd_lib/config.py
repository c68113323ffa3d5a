"""Records that say how a training step runs; YAML stores them, the training system takes them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import torch
from torch import nn

from autograd_lib._compile import compile_module
from autograd_lib._recompute import apply_checkpoints
from autograd_lib._schedule import NAMES, Step, length

__all__ = ["Settings"]

_Model = TypeVar("_Model", bound=nn.Module)
_CHOICES = {
    "precision": ("fp32", "bf16", "fp16"),
    "memory_format": ("contiguous_format", "channels_last"),
}


@dataclass(frozen=True)
class Settings:
    """How a training step runs: what `autotune` searches through, compared by value.

    `dataclasses.asdict` gives what YAML and JSON can store, and `Settings(**stored)` is equal to
    what was stored. `str()` is short, for tables.

    Attributes:
        precision: "fp32" is the model as it is; "bf16" and "fp16" run the forward under
            `torch.autocast`, "fp16" with a `GradScaler` too. Read by the training step.
        micro_batch: Samples per backward, the gradients of which are accumulated; None for the
            whole batch at once. Read by the training step.
        checkpoint: Name of a module to "save", "selective" or "recompute", or to a sequence of
            these for the children of an `nn.Sequential` or `nn.ModuleList`, in which a nested
            sequence is a run of children under one checkpoint (see `plan_checkpoints`).
        memory_format: Layout of the parameters with four dimensions.
        compile: Whether `torch.compile` compiles the model, or each block where there is a
            checkpoint plan.

    Raises:
        TypeError: A field is of the wrong type.
        ValueError: A field has a value that is not listed here.

    Example:
        >>> settings = Settings("bf16", micro_batch=2, checkpoint={"": ["save", "recompute"]})
        >>> print(settings)
        bf16, micro-batch 2, 1 of 2 blocks recomputed
        >>> settings.checkpoint
        {'': ('save', 'recompute')}
    """

    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    micro_batch: int | None = None
    checkpoint: Mapping[str, Step] = field(default_factory=dict, hash=False)
    memory_format: Literal["contiguous_format", "channels_last"] = "contiguous_format"
    compile: bool = False

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if not isinstance(value, str) or value not in choices:
                raise ValueError(
                    f"Settings: expected {name} to be {' or '.join(map(repr, choices))}, "
                    f"got {value!r}"
                )
        if not isinstance(self.compile, bool):
            raise TypeError(f"Settings: expected compile to be a bool, got {self.compile!r}")
        _check_micro_batch(self.micro_batch)
        if not isinstance(self.checkpoint, Mapping):
            raise TypeError(
                "Settings: expected checkpoint to map names of modules to steps, got "
                f"{type(self.checkpoint).__name__}; for the model itself the name is ''"
            )
        # As tuples throughout, so that what comes back from YAML as lists compares equal.
        plan = {name: _frozen(name, step) for name, step in self.checkpoint.items()}
        object.__setattr__(self, "checkpoint", plan)

    def apply(self, model: _Model) -> _Model:
        """Set memory format, checkpoint plan and compilation of a model, in place.

        Precision and micro-batch are left to the training step. Of the memory format only
        parameters with four dimensions are touched: the inputs follow them at the first
        convolution. Names and order of parameters, and the `state_dict`, stay as they are.

        Args:
            model: The model, on the device where it is to run.

        Returns:
            The same model.

        Raises:
            ValueError: The plan names modules that the model does not have, or steps for another
                number of children.

        Example:
            >>> model = nn.Conv2d(3, 8, 5)
            >>> Settings(memory_format="channels_last").apply(model) is model
            True
            >>> model.weight.is_contiguous(memory_format=torch.channels_last)
            True
        """
        memory_format = getattr(torch, self.memory_format)
        for parameter in model.parameters():
            if parameter.dim() == 4:
                # Not `contiguous`, which leaves the strides of a 1 x 1 kernel alone; these decide.
                parameter.data = parameter.data.to(memory_format=memory_format)
        if self.checkpoint:
            apply_checkpoints(model, self.checkpoint, compile=self.compile)
        elif self.compile:
            compile_module(model)
        return model

    def __str__(self) -> str:
        parts: list[str] = [self.precision]
        if self.micro_batch is not None:
            parts.append(f"micro-batch {self.micro_batch}")
        if self.memory_format == "channels_last":
            parts.append("channels last")
        parts += _describe(self.checkpoint)
        return ", ".join(parts + ["compiled"] * self.compile)


def _check_micro_batch(value: Any) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"Settings: expected micro_batch to be an int or None, got {value!r}")
    if value < 1:
        raise ValueError(
            f"Settings: expected micro_batch >= 1, got {value}; None is the whole batch"
        )


def _frozen(name: Any, step: Any) -> Step:
    """Return a step with tuples for all sequences in it."""
    if not isinstance(name, str):
        raise TypeError(f"Settings: expected names of modules in checkpoint, got {name!r}")
    if isinstance(step, (list, tuple)) and step:
        return tuple(_frozen(name, inner) for inner in step)
    if step not in NAMES:
        raise ValueError(
            f"Settings: expected 'save', 'selective' or 'recompute', or a sequence of these, in "
            f"checkpoint[{name!r}], got {step!r}"
        )
    return step


def _describe(checkpoint: Mapping[str, Step]) -> list[str]:
    """Say how many blocks run again in backward; all those of a run do, whatever it holds."""
    steps = [
        step for plan in checkpoint.values() for step in ([plan] if isinstance(plan, str) else plan)
    ]
    blocks = sum(map(length, steps))
    again = sum(length(step) for step in steps if step not in ("save", "selective"))
    selective = steps.count("selective")
    counted = {"recomputed": again, "recomputed selectively": selective}
    return [f"{n} of {blocks} blocks {how}" for how, n in counted.items() if n]
