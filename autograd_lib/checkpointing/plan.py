"""Checkpoint plans: what to save and what to recompute, optimal under a budget of bytes.

`torch.utils.checkpoint` trades time for memory. `plan_checkpoints` decides where to use it: it
measures each block of a model and finds the fastest schedule whose peak fits the budget, which is
then applied with PyTorch's own checkpoints.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from autograd_lib.checkpointing.measure import measure
from autograd_lib.checkpointing.recompute import apply_checkpoints, runs_its_children
from autograd_lib.checkpointing.solver import Step, Steps, frontier, length, plain
from autograd_lib.checkpointing.visit import Blocks
from autograd_lib.report.progress import progress
from autograd_lib.report.tables import Row, Table, readable_bytes

__all__ = ["CheckpointPlan", "plan_checkpoints"]


@dataclass(frozen=True, repr=False, eq=False)
class CheckpointPlan(Table):
    """The fastest schedule of a chain of blocks under a budget; prints as a table.

    Bytes are the peak of forward and backward of one step that starts with every `.grad` None,
    parameter gradients included, above what stood before it. Seconds are those of that step.

    Attributes:
        steps: For each block "save", "selective" or "recompute"; a tuple of steps stands for a run
            of blocks under one checkpoint, which saves its input only: in backward the run is
            repeated by these steps.
        budget: The bytes that were allowed.
        predicted_bytes: Peak by this plan.
        predicted_time: Seconds by this plan.
        plain_bytes: Peak without checkpoints.
        plain_time: Seconds without checkpoints.
        curve: Both figures of every optimal plan, from the least bytes to the least time.
        refused: Why a block cannot be recomputed, by the index of the block.
    """

    steps: Steps
    budget: int
    predicted_bytes: int
    predicted_time: float
    plain_bytes: int
    plain_time: float
    curve: list[tuple[int, float]]
    refused: dict[int, str]
    _frontier: list[tuple[int, float, Steps]]
    _blocks: tuple[nn.Module, ...]

    def within(self, budget: int) -> CheckpointPlan:
        """Choose the plan for another budget, from the same measurement.

        Args:
            budget: Bytes, as for `plan_checkpoints`.

        Returns:
            The plan.

        Raises:
            ValueError: No schedule fits the budget; the least possible is named.
        """
        nbytes, seconds, steps = _fastest(self._frontier, budget)
        return replace(
            self, steps=steps, budget=budget, predicted_bytes=nbytes, predicted_time=seconds
        )

    def apply(self, model: nn.Module) -> nn.Module:
        """Make the blocks of `model` run by this plan.

        Each is checkpointed by `torch.utils.checkpoint` (``use_reentrant=False``). Gradients are
        bit-equal to those without a plan, dropout included (those of compiled selective blocks
        are equal within rounding). Buffers that a forward changes, such as BatchNorm's running
        statistics, change once per step. Names and order of parameters, buffers and modules stay
        the same; a plan replaces the one applied before. Hooks on submodules of a recomputed block
        run again with it.

        Args:
            model: Holds the blocks that were measured, or is a copy of the model that does.

        Returns:
            `model` itself.

        Raises:
            ValueError: Blocks like those that were measured are not in `model`, or not once.
        """
        apply_checkpoints(model, self.locate(model))
        return model

    def locate(self, model: nn.Module) -> dict[str, Step | Steps]:
        """Find the blocks in `model`.

        Args:
            model: As for `apply`.

        Returns:
            Qualified names with what is done to each: the value of `Settings.checkpoint`.

        Raises:
            ValueError: As for `apply`.
        """
        kinds = [type(block) for block in self._blocks]
        names = {module: name for name, module in model.named_modules()}
        containers = [m for m in names if isinstance(m, nn.Sequential | nn.ModuleList)]
        exact = [module for module in containers if tuple(module) == self._blocks]
        single = all(isinstance(step, str) for step in self.steps)
        if not exact and single and names.keys() >= set(self._blocks):
            return {names[b]: step for b, step in zip(self._blocks, self.steps, strict=True)}
        found = exact or [m for m in containers if [type(child) for child in m] == kinds]
        if len(found) != 1:
            raise ValueError(
                "CheckpointPlan.apply: expected a model that holds the blocks of the plan, or one "
                f"container of {len(kinds)} blocks like them, found {len(found)}; apply the "
                "plan to the model it was made for, or make one for this model"
            )
        return {names[found[0]]: self.steps}

    def _table(self) -> tuple[str, Row, list[Row]]:
        ratio = self.predicted_time / self.plain_time
        rows: list[Row] = [
            ("save everything", readable_bytes(self.plain_bytes), "1.00"),
            ("this plan", readable_bytes(self.predicted_bytes), f"{ratio:.2f}"),
        ]
        rows += [(f"  {line}", "", "") for line in self._lines(self.steps)]
        title = f"Checkpoint plan within {readable_bytes(self.budget)}"
        return title, ("schedule", "peak", "time / plain"), rows

    def _lines(self, steps: Steps, start: int = 0, indent: str = "") -> list[str]:
        lines = []
        for step in steps:
            end = start + length(step)
            if isinstance(step, str):
                lines.append(f"{indent}{_name(self._blocks, start)}: {step}")
            else:
                lines.append(f"{indent}{start} to {end - 1}: recompute together, then by")
                lines += self._lines(step, start, indent + "  ")
            start = end
        return lines


def _name(blocks: Blocks, index: int) -> str:
    return f"{index} {type(blocks[index]).__name__}"


def plan_checkpoints(
    blocks: Blocks,
    sample: Tensor | Callable[[], Tensor],
    budget: int,
    *,
    accumulate: bool = False,
) -> CheckpointPlan:
    r"""Find the fastest schedule of a chain of blocks whose peak fits a budget of bytes.

    Each kind of block is measured once, alone: seconds forward and backward, the bytes it saves,
    the high-water marks of its phases by the events of the allocator. Blocks are of one kind if
    their modules, shapes, arguments and the sizes of what they allocate are equal. From these costs
    a dynamic program finds every schedule for which no other needs less memory and less time; of
    those that fit the budget the fastest is the plan. A block is saved, recomputed, or recomputed
    except for its matrix products, convolutions and attention ("selective"; in a compiled block the
    compiler chooses what to recompute, by `activation_memory_budget`). A compiled block that draws
    random numbers in any mode is never selective, because PyTorch 2.13 would draw them anew in
    backward. If `blocks` is an `nn.Sequential`, a checkpoint may hold several blocks, and within it
    further checkpoints.

    For $n$ equal blocks this contains the binomial schedules, which need memory and repeat work
    in proportion to $\log n$ (Griewank and Walther, *ACM Trans. Math. Softw.* 26, 2000); for
    unequal ones it is the program of Beaumont et al. (*Optimal checkpointing for heterogeneous
    chains*, Inria RR-9302, 2019), with selective steps added and memory exact, not in slots.

    Blocks may take and return tensors in tuples, mappings and objects: one tensor goes from block
    to block; others may come from the head, go to later blocks or to the tail, or stay behind as
    attributes. Masks and tables that blocks keep are counted once, gradients of arguments that
    blocks share stand until the block or head that made these.

    The predicted peak leaves out gradients that go around the chain, and the partial gradients of
    a weight that several blocks share. It is exact otherwise.

    A checkpoint restores PyTorch's default generator of random numbers and no other. A block that
    draws from Python's or NumPy's generator, or from one of its own, would get wrong gradients
    silently. So each kind of block is run twice: one whose gradient differs, or that advances such
    a generator, is always saved, with a warning that names the reason.

    Args:
        blocks: Modules that run one after the other, once each, each taking a tensor that the one
            before returned: an `nn.Sequential`, or the list that the forward of a transformer
            loops over.
        sample: The input of the first block, for a step that is
            ``blocks(sample).sum().backward()``; or a function without arguments that runs the
            forward of the whole model and returns the loss, for a step that is that and
            ``.backward()``. What comes before and after the blocks is measured too, under the
            autocast that the function sets. It is called three times, and only the first time
            with the blocks.
        budget: Bytes, at the peak of one step, gradients of parameters included, above what stood
            before a step that starts with every `.grad` None.
        accumulate: Whether `sample` is one of several forwards and backwards whose gradients add
            up in one step: from the second on, the gradients of the first are there already.

    Returns:
        The plan. Parameters, gradients, buffers and random states are restored; nothing changes
        until `CheckpointPlan.apply`.

    Raises:
        TypeError: An argument is of another kind.
        ValueError: No schedule fits the budget (the least possible is named), the blocks are not a
            chain, or no plan can serve them: a block writes into an argument (a cache) or uses a
            graph that is not in its arguments, or the step runs a backward inside.

    Warns:
        UserWarning: A block cannot be recomputed, and why.

    Example:
        >>> import torch
        >>> from autograd_lib import peak_bytes
        >>> model = nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.GELU()) for _ in range(6)))
        >>> x = torch.randn(1024, 64)
        >>> plan = plan_checkpoints(model, x, budget=2_000_000)
        >>> plan.plain_bytes > 3_000_000, plan.predicted_bytes <= 2_000_000
        (True, True)
        >>> model = plan.apply(model)
        >>> peak = peak_bytes(lambda: (model(x).sum().backward(), model.zero_grad()))
        >>> round(peak / plan.predicted_bytes, 2)
        1.0
    """
    step = _step(blocks, sample, budget)
    with progress("plan_checkpoints") as show:
        chain, refused = measure(blocks, step, accumulate, show)
        show("solving")
        # A run under one checkpoint takes one tensor, not others that go from block to block.
        found = frontier(chain, runs_its_children(blocks) and not chain.shared)
    for index, why in refused.items():
        warnings.warn(
            f"plan_checkpoints: block {_name(blocks, index)} {why}; every plan saves it",
            UserWarning,
            stacklevel=2,
        )
    nbytes, seconds, steps = _fastest(found, budget)
    curve = [(peak, time) for peak, time, _ in found]
    return CheckpointPlan(
        steps, budget, nbytes, seconds, *plain(chain), curve, refused, found, tuple(blocks)
    )


def _fastest(found: list[tuple[int, float, Steps]], budget: int) -> tuple[int, float, Steps]:
    fitting = [point for point in found if point[0] <= budget]
    if not fitting:
        least = found[0][0]
        raise ValueError(
            f"plan_checkpoints: no schedule fits {readable_bytes(max(budget, 0))}; the least "
            f"possible is {least} bytes ({readable_bytes(least)}). Use a smaller batch, or divide "
            "the blocks into smaller ones"
        )
    return fitting[-1]


def _step(
    blocks: Blocks, sample: Tensor | Callable[[], Tensor], budget: int
) -> Callable[[], Tensor]:
    """Check the arguments; return the step to measure."""
    if not isinstance(blocks, nn.Sequential | nn.ModuleList | list | tuple) or not all(
        isinstance(block, nn.Module) for block in blocks
    ):
        raise TypeError(
            "plan_checkpoints: expected blocks as an nn.Sequential, an nn.ModuleList or a list of "
            f"modules, got {type(blocks).__name__}; for a whole model pass its list of blocks"
        )
    if not blocks:
        raise ValueError("plan_checkpoints: expected at least one block, got none")
    if not runs_its_children(blocks) and len(set(blocks)) < len(blocks):
        raise ValueError(
            "plan_checkpoints: a block is in the list twice, which cannot have two steps; put the "
            "blocks into an nn.Sequential, which runs them itself"
        )
    if not isinstance(budget, int) or isinstance(budget, bool):
        raise TypeError(
            f"plan_checkpoints: expected a budget in bytes, an int, got {budget!r}; a share of the "
            "plain peak is int(share * peak_bytes(step))"
        )
    if isinstance(sample, Tensor):
        chain = blocks if isinstance(blocks, nn.Sequential) else nn.Sequential(*blocks)
        return lambda: _sum(chain(sample))
    if not callable(sample):
        raise TypeError(
            "plan_checkpoints: expected sample to be the input of the first block, a tensor, or a "
            f"function that runs the model and returns the loss, got {type(sample).__name__}"
        )
    return sample


def _sum(y: Any) -> Tensor:
    if not isinstance(y, Tensor):
        raise ValueError(
            "plan_checkpoints: expected the last block to return a tensor where sample is one, got "
            f"{type(y).__name__}; pass a function that runs the model and returns the loss"
        )
    return y.sum()
