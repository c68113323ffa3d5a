"""A batch, cut into micro-batches whose mean losses weigh what they count."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

Count = Callable[[Any], float | Tensor]


class Piece(NamedTuple):
    """A micro-batch: arguments of the model, targets, and the weight of its mean loss."""

    inputs: tuple[Any, ...]
    targets: Any
    share: float


def pair(batch: Any) -> tuple[Any, Any]:
    """Inputs and targets, as a loader gives them; its collate_fn makes a list of a tuple."""
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        of = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise ValueError(
            f"fit: expected the loader to give (inputs, targets), got {type(batch).__name__}{of}; "
            "set collate_fn of the loader"
        )
    inputs, targets = batch
    return tuple(inputs) if isinstance(inputs, list) else inputs, targets


def batch_size(operation: str, batch: tuple[Any, Any]) -> int:
    """Samples in a batch, which are the first dimension of all its tensors."""
    shapes = [tuple(leaf.shape) for leaf in tree_leaves(batch) if isinstance(leaf, Tensor)]
    if not shapes or any(not shape for shape in shapes) or len({s[0] for s in shapes}) > 1:
        raise ValueError(
            f"{operation}: expected tensors of inputs and targets whose first dimension is the "
            f"batch, got shapes {shapes}; put what has no batch dimension into model or loss_fn"
        )
    if not shapes[0][0]:
        raise ValueError(f"{operation}: the batch is empty, its tensors have shapes {shapes}")
    return shapes[0][0]


def split(
    operation: str, batch: tuple[Any, Any], size: int | None, count: Count | None
) -> list[Piece]:
    """Cut a batch into pieces of at most `size` samples, each with what it counts as its share."""
    whole = batch_size(operation, batch)
    size = whole if size is None else size
    found = []
    for start in range(0, whole, size):
        part = slice(start, min(start + size, whole))
        inputs, targets = batch if size >= whole else tree_map_only(Tensor, itemgetter(part), batch)
        counted = part.stop - start if count is None else count(targets)
        inputs = inputs if isinstance(inputs, tuple) else (inputs,)
        found.append(Piece(inputs, targets, float(counted)))
    return found


def check_counted(operation: str, total: float) -> None:
    """Raise if a mean is over nothing."""
    if not total > 0:
        raise ValueError(
            f"{operation}: count gives {total:g} for the whole batch; expected how many terms the "
            "mean in loss_fn has, as `(targets != -100).sum()`"
        )


def terms_of(loss_fn: object, *, weighted: bool = True) -> Count | None:
    """How many terms the mean of a loss of PyTorch has; None for the number of samples."""
    if loss_fn in (F.cross_entropy, F.nll_loss):
        loss_fn = nn.CrossEntropyLoss()  # of which these are the defaults
    if not isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss)):
        return None

    def count(targets: Tensor) -> float | Tensor:
        if targets.is_floating_point():  # probabilities of classes
            return targets.numel() / targets.shape[1]
        counted = targets != loss_fn.ignore_index
        if loss_fn.weight is None or not weighted:
            return torch.count_nonzero(counted)
        return loss_fn.weight.to(targets.device)[targets[counted]].sum()

    return count


def nothing(output: Any) -> Tensor:
    """A zero that depends on an output: a process with nothing to add takes part all the same."""
    leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    return sum((leaf.sum() * 0 for leaf in leaves), start=torch.zeros(()))
