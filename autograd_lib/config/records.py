"""Records that say how training runs; YAML stores them, the training system takes them.

The docstrings of the records are where options are explained; the full default file has them as
comments.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer

from autograd_lib.checkpointing.compiled import compile_module
from autograd_lib.checkpointing.recompute import apply_checkpoints
from autograd_lib.checkpointing.solver import NAMES, Step, length
from autograd_lib.config.fields import Kind, Record, RefusedError, stored

_Model = TypeVar("_Model", bound=nn.Module)


def _plan(checkpoint: Mapping[str, Step]) -> dict[str, Step]:
    """Return a checkpoint plan with tuples for lists, so that what YAML stored compares equal."""
    plan: dict[str, Step] = stored(checkpoint)
    for name, step in plan.items():
        _check_step(step, (name,))
    return plan


def _check_step(step: Step, where: tuple[str | int, ...]) -> None:
    if isinstance(step, tuple) and step:
        for i, inner in enumerate(step):
            _check_step(inner, (*where, i))
    elif step not in NAMES:
        expected = "'save', 'selective' or 'recompute', or a list of these"
        raise RefusedError(expected, step, where)


def _number(text: str, test: Callable[[float], bool]) -> Kind:
    return Kind(f"a number {text}", (int, float), test, float)


def _own_or(*choices: str) -> Kind:
    known = " or ".join(map(repr, choices))
    return Kind(
        f"{known}, or a function of yours as in the line `name: package.module:function`",
        (object,),
        lambda name: (
            name in choices or (isinstance(name, str) and _OWN.fullmatch(name) is not None)
        ),
    )


OPTIMIZERS = {  # by the names of configurations
    name.lower(): kind
    for name, kind in vars(torch.optim).items()
    if isinstance(kind, type) and issubclass(kind, Optimizer) and kind is not Optimizer
}
_OWN = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*(\.[^\W\d]\w*)*")
# What fields may hold, for `Record` and for pydantic.
_OPTIMIZER = Kind(
    f"a class of torch.optim ({', '.join(OPTIMIZERS)}), as in the line `name: adamw`",
    (object,),
    lambda name: isinstance(name, str) and name.lower() in OPTIMIZERS,
    str.lower,
)
_COUNT = Kind("an integer >= 1", (int,), lambda n: n >= 1)
_POSITIVE = _number("> 0", lambda x: 0 < x < math.inf)
_Flag = Annotated[bool, Kind("True or False", (bool,))]
_TextOrNone = Annotated[str | None, Kind("a string", (str,), read=stored).or_none()]
_Count = Annotated[int, _COUNT]
_CountOrNone = Annotated[int | None, _COUNT.or_none()]
_Natural = Annotated[int, Kind("an integer >= 0", (int,), lambda n: n >= 0)]
_Positive = Annotated[float, _POSITIVE]
_PositiveOrNone = Annotated[float | None, _POSITIVE.or_none()]
_NotNegative = Annotated[float, _number(">= 0", lambda x: 0 <= x < math.inf)]
_Share = Annotated[float, _number(">= 0 and < 1", lambda x: 0 <= x < 1)]
_Threshold = Annotated[float, _number(">= 0", lambda x: x >= 0)]  # an infinite one is never reached
_Seed = Annotated[int, Kind("an integer of 64 bits", (int,), lambda n: -(2**63) <= n < 2**64)]
_Text = Annotated[str, Kind("a string", (str,), read=stored)]
_Options = Annotated[
    Mapping[str, Any], Kind("a mapping of names to values", (Mapping,), read=stored)
]
_Plan = Annotated[
    Mapping[str, Step], Kind("a mapping of names of modules to steps", (Mapping,), read=_plan)
]


@dataclass(frozen=True)
class Settings(Record):
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
            sequence is a run of children under one checkpoint (see `plan_checkpoints`). A compiled
            block that draws random numbers is recomputed where "selective" stands.
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
    micro_batch: _CountOrNone = None
    checkpoint: _Plan = field(default_factory=dict, hash=False)
    memory_format: Literal["contiguous_format", "channels_last"] = "contiguous_format"
    compile: _Flag = False

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


@dataclass(frozen=True)
class MonitoringConfig(Record):
    """What of the gradients is watched during training, by a `GradientMonitor`.

    Attributes:
        enabled: Whether a monitor is attached: norms of every gradient, and what is amiss in them.
        save_gradient_history: Whether the history is written as gradients.csv beside the
            checkpoints, which needs training.directory.
        every: Steps, at least 1: look at the first step and at every so many after it.
        history: Steps, at least 1: how many of the last looked-at ones are remembered.
        explode_above: Norm of a gradient, above vanish_below: a larger one is reported.
        vanish_below: Norm of a gradient, at least 0: a smaller one is reported.
    """

    enabled: _Flag = True
    save_gradient_history: _Flag = True
    every: _Count = 1
    history: _Count = 1000
    explode_above: _Threshold = 1e3
    vanish_below: _Threshold = 1e-8


@dataclass(frozen=True)
class FeaturesConfig(Record):
    """What is used of autograd beyond the gradient of a loss.

    Attributes:
        higher_order_gradients: Whether compute_higher_order_gradients may be called; False makes
            it an error.
        custom_gradients: Whether models compute activations by custom Functions that save less
            for backward, where they have them.
        gradient_checkpointing: Whether each block of the model is run again in backward, so that
            what is inside it need not be saved. Leave performance.checkpoint empty then.
    """

    higher_order_gradients: _Flag = True
    custom_gradients: _Flag = False
    gradient_checkpointing: _Flag = False


@dataclass(frozen=True)
class SystemConfig(Record):
    """How gradients are computed, watched and used.

    Attributes:
        enable_gradients: Whether there is training; False leaves evaluation only, and makes a
            training step an error.
        gradient_monitoring: What of the gradients is watched during training.
        advanced_features: What is used of autograd beyond the gradient of a loss.
        performance: How a step runs; `autotune` finds the fastest settings.
    """

    enable_gradients: _Flag = True
    gradient_monitoring: MonitoringConfig = field(default_factory=MonitoringConfig)
    advanced_features: FeaturesConfig = field(default_factory=FeaturesConfig)
    performance: Settings = field(default_factory=Settings)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.advanced_features.gradient_checkpointing and self.performance.checkpoint:
            raise ValueError(
                "SystemConfig: expected advanced_features.gradient_checkpointing or "
                "performance.checkpoint, got both; choose one, the first for each block of the "
                "model, the second for a plan of your own"
            )


@dataclass(frozen=True)
class DataConfig(Record):
    """What is learned from.

    Attributes:
        name: "digits" are images of 8 x 8 pixels for the CNN, "rows" the same images as sequences
            of 8 rows for the RNN, "source" the characters of Python's standard library for the
            Transformer. All come with what is installed. Or package.module:function, which is
            called with the options and returns an `autograd_lib.Task`; the module may be a file in
            the current directory.
        batch_size: Samples of a step, at least 1, of all processes together.
        workers: Processes that load data, at least 0; 0 loads it in the training process.
        options: Arguments of the data set by their names.
    """

    name: Annotated[str, _own_or("digits", "rows", "source")] = "digits"
    batch_size: _Count = 64
    workers: _Natural = 0
    options: _Options = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class ModelConfig(Record):
    """What learns.

    Attributes:
        name: "cnn" is CustomCNNModel, "transformer" CustomTransformerModel, "rnn"
            CustomRNNModel. Or package.module:function, which is called with the sizes that the data
            decide and with the options, and returns a module.
        options: Arguments of the model by their names. The data decide the sizes of input and
            output.
    """

    name: Annotated[str, _own_or("cnn", "transformer", "rnn")] = "cnn"
    options: _Options = field(default_factory=dict, hash=False)


@dataclass(frozen=True)
class OptimizerConfig(Record):
    """How parameters follow the gradients.

    Attributes:
        name: A class of torch.optim, such as "adamw", "sgd" or "rmsprop", in small letters or not.
        lr: Learning rate, above 0; with a schedule the largest one.
        weight_decay: At least 0; "adamw" multiplies weights by 1 - lr * weight_decay at each step,
            "adam" and "sgd" add weight_decay * weight to the gradient. A class without it has none.
        options: Further arguments of the optimizer by their names, such as betas or momentum.
        schedule: What becomes of the learning rate after the warmup: "constant" keeps it, "linear"
            and "cosine" take it to 0 at the last step.
        warmup: Share of all steps, from 0 up to but not including 1, in which the learning rate
            grows from near 0; 0 for none.
    """

    name: Annotated[str, _OPTIMIZER] = "adamw"
    lr: _Positive = 1e-3
    weight_decay: _NotNegative = 0.01
    options: _Options = field(default_factory=dict, hash=False)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: _Share = 0.0


@dataclass(frozen=True)
class TrainingConfig(Record):
    """How long and where training runs, and what it leaves behind.

    Attributes:
        epochs: Passes over the training data, at least 0.
        seed: Integer of 64 bits from which weights, order of the data and dropout follow.
        device: "auto" takes an accelerator if there is one, otherwise the CPU; or a device of
            torch such as "cpu" or "cuda:0".
        clip_norm: Norm, above 0, to which larger gradients are scaled down, of all parameters
            together; None for no clipping.
        max_nonfinite: Steps in a row with a NaN or an Inf, which are skipped and reported, after
            which training stops; 0 does without the guard.
        directory: Where checkpoints and histories are written; None writes nothing.
        save_every: Steps between checkpoints; 0 writes one after each epoch.
    """

    epochs: _Natural = 10
    seed: _Seed = 0
    device: _Text = "auto"
    clip_norm: _PositiveOrNone = None
    max_nonfinite: _Natural = 3
    directory: _TextOrNone = None
    save_every: _Natural = 0


@dataclass(frozen=True)
class DistributedConfig(Record):
    """How processes share the work; of no effect in a run of one process.

    Attributes:
        strategy: "ddp" has the whole model in each process and averages gradients, "fsdp2" shards
            parameters, gradients and the optimizer's state too.
        find_unused_parameters: Whether "ddp" looks for parameters without a gradient at each step,
            which costs time; without it they make the next step fail.
    """

    strategy: Literal["ddp", "fsdp2"] = "ddp"
    find_unused_parameters: _Flag = False


@dataclass(frozen=True)
class AutogradConfig(Record):
    """All that a training run can be told, in sections; frozen, and compared by value.

    Sections are records too, and each has a default: `AutogradConfig()` trains. Values are checked
    when a record is made, wherever they come from; lists in options become tuples.

    Attributes:
        autograd_system: How gradients are computed, watched and used.
        data: What is learned from.
        model: What learns.
        optimizer: How parameters follow the gradients.
        training: How long and where training runs, and what it leaves behind.
        distributed: How processes share the work; of no effect in a run of one process.

    Raises:
        TypeError: A field is of the wrong type.
        ValueError: A field has a value out of its range.

    Example:
        >>> config = AutogradConfig()
        >>> config.optimizer.name, config.optimizer.lr
        ('adamw', 0.001)
        >>> AutogradConfig(data=DataConfig(batch_size=0))
        Traceback (most recent call last):
            ...
        ValueError: DataConfig: expected batch_size to be an integer >= 1, got 0
    """

    # Read by pydantic, and by it handed down to the sections, `Settings` among them.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    autograd_system: SystemConfig = field(default_factory=SystemConfig)
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    distributed: DistributedConfig = field(default_factory=DistributedConfig)
