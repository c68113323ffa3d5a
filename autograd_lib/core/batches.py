"""A batch, cut into micro-batches whose mean losses weigh what they count."""

from __future__ import annotations

import math
from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
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


def batch_size(operation: str, batch: Any) -> int:
    """Samples in a batch that can be divided: the first dimension of all its tensors."""
    shapes = _shapes(batch)
    if not _has_batch_dimension(shapes):
        raise ValueError(
            f"{operation}: to divide a batch, expected tensors of inputs and targets whose first "
            f"dimension is the batch, got shapes {shapes}; leave micro_batch out and let the "
            "loader make the batches small enough, or put what has no batch dimension into model "
            "or loss_fn"
        )
    if not shapes[0][0]:
        raise ValueError(f"{operation}: the batch is empty, its tensors have shapes {shapes}")
    return shapes[0][0]


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _has_batch_dimension(shapes: list[tuple[int, ...]]) -> bool:
    return all(shapes) and len({shape[0] for shape in shapes}) == 1


def _samples(operation: str, batch: tuple[Any, Any]) -> float:
    """Samples in a batch, by all its tensors or by its targets alone; NaN if neither tell.

    A batch of graphs has more nodes than targets, and CTC takes targets end to end.
    """
    for part in (batch, batch[1]):
        if _has_batch_dimension(_shapes(part)):
            return batch_size(operation, part)
    return math.nan


def split(
    operation: str, batch: tuple[Any, Any], size: int | None, count: Count | None
) -> list[Piece]:
    """Cut a batch into pieces of at most `size` samples, each with what it counts as its share.

    Without a size the batch stays whole, and need not have one batch dimension. NumPy arrays
    become tensors.
    """
    # Not by `from_numpy`, which warns of arrays that are read-only.
    batch = tree_map_only(np.ndarray, torch.tensor, batch)
    parts = [batch]
    if size is not None and size < (whole := batch_size(operation, batch)):
        cuts = [slice(start, start + size) for start in range(0, whole, size)]
        parts = [tree_map_only(Tensor, itemgetter(cut), batch) for cut in cuts]
    found = []
    for part in parts:
        share = _samples(operation, part) if count is None else count(part[1])
        inputs = part[0] if isinstance(part[0], tuple) else (part[0],)
        found.append(Piece(inputs, part[1], float(share)))
    return found


def check_counted(operation: str, total: float) -> None:
    """Raise if a mean is over nothing, or over nobody knows what."""
    if math.isnan(total):
        raise ValueError(
            f"{operation}: how much a batch weighs beside others is not known, as its targets have "
            "no batch dimension; give the system count=, how many terms the mean in loss_fn has, "
            "as `lambda targets: len(targets[1])`"
        )
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
