"""What a batch is, how a model is called with it, and how it is cut into micro-batches.

A batch is a mapping of keyword arguments, or a pair ``(inputs, targets)`` whose inputs are a
tensor, a tuple of positional or a mapping of keyword arguments. The one way to use it:

- ``batch = read_batch(operation, batch)`` makes plain containers and tensors of what a loader
  gives, so that PyTorch's pytrees see all of it; a batch that was read stays as it is;
- ``pieces = micro_batches(operation, batch, size, count)`` of `training.step`, where ``count`` is
  the user's, or ``terms_of(loss_fn, model)``;
- ``ForwardBackward(operation, model, loss_fn, precision, device)(pieces)`` runs them, where
  ``loss_fn`` is None for the model's own loss. With ``trusted=False`` it raises where that loss is
  not the mean over what `terms_of` counts. `autotune` does not ask for this check, as it compares
  gradients with that of the whole batch anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

Batch = dict[str, Any] | tuple[Any, Any]
Count = Callable[[Any], float | Tensor]


class Piece(NamedTuple):
    """A micro-batch, how many terms its mean loss has, and the weight of that mean."""

    batch: Batch
    terms: float
    share: float


def read_batch(operation: str, batch: Any) -> Batch:
    """Plain dicts, tuples and tensors, from what a loader or a tokenizer gives."""
    if isinstance(batch, Mapping) and batch:
        return plain(batch)
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        of = f" of {len(batch)}" if isinstance(batch, (tuple, list, Mapping)) else ""
        raise ValueError(
            f"{operation}: expected a batch to be a mapping of the model's arguments or a pair "
            f"(inputs, targets), got {type(batch).__name__}{of}; set collate_fn of the loader, "
            "with several inputs in a tuple of their own and None for targets that there are not"
        )
    inputs, targets = map(plain, batch)
    if inputs is None or (isinstance(inputs, dict) and not inputs):
        raise ValueError(f"{operation}: expected inputs of the model in a batch, got {inputs}")
    if isinstance(inputs, dict) and targets is None:
        return inputs
    # The collate_fn of a loader makes a list of a tuple.
    return tuple(inputs) if isinstance(inputs, list) else inputs, targets


def plain(tree: Any) -> Any:
    """A tree of dicts, lists, tuples and tensors, of mappings and NumPy arrays."""

    # What pytrees do not know, as the dict of a tokenizer, is a leaf of theirs.
    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Mapping):
            return plain(dict(leaf))
        # Not by `from_numpy`, which warns of arrays that are read-only.
        return torch.tensor(leaf) if isinstance(leaf, np.ndarray) else leaf

    return tree_map(convert, tree)


def call(model: Callable[..., Any], batch: Batch) -> Any:
    """The output of a model for a batch."""
    inputs = batch if isinstance(batch, dict) else batch[0]
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


def targets_of(batch: Batch) -> Any:
    """What a loss, a count and a metric are given: of a mapping all of it."""
    return batch if isinstance(batch, dict) else batch[1]


def loss_within(output: Any) -> Any:
    """What a model's output has at the places where its own loss may be."""
    if isinstance(output, Mapping):
        return output.get("loss")
    first = output[0] if isinstance(output, tuple) and output else output
    return getattr(output, "loss", first)


def own_loss(operation: str, output: Any, batch: Batch) -> Tensor:
    """The loss that a model has computed itself for a batch, where there is no `loss_fn`."""
    unused, found = isinstance(batch, tuple) and batch[1] is not None, loss_within(output)
    if unused or not isinstance(found, Tensor) or found.dim():
        came = "a pair with targets, which the model is not given" if unused else described(output)
        raise ValueError(
            f"{operation}: without loss_fn, expected the model's output to have its loss, as "
            'output.loss, output["loss"], the first of a tuple or the output itself, a scalar '
            f"tensor, got {came}; give the model what its loss needs, as labels in a batch that is "
            "a mapping, or give loss_fn, as `lambda output, targets: output[1]`"
        )
    if isinstance(output, tuple) and not hasattr(output, "loss") and _is_apart(found, output[1:]):
        raise ValueError(
            f"{operation}: without loss_fn, expected one loss, got a tuple of scalars of which the "
            "first does not include the others, and they require a gradient; return the sum first, "
            "detach() what is only to be read, or give loss_fn, as `lambda output, targets: "
            "output[0] + output[1]`"
        )
    return found


def _is_apart(loss: Tensor, others: Sequence[Any]) -> bool:
    """Whether some of other outputs are scalars with a graph that is not within that of a loss."""
    scalars = [other for other in others if isinstance(other, Tensor) and not other.dim()]
    nodes = {s.grad_fn for s in scalars if s.grad_fn is not None}
    seen: set[Any] = set()
    left = [] if loss.grad_fn is None else [loss.grad_fn]
    while left and not nodes <= seen:
        left = list({n for node in left for n, _ in node.next_functions if n} - seen)
        seen.update(left)
    return not nodes <= seen


def described(value: Any) -> str:
    """What an error says came: a shape, or a type and what it holds."""
    if isinstance(value, Tensor):
        return f"shape {tuple(value.shape)}"
    within = f" of {', '.join(map(str, value))}" if isinstance(value, Mapping) else ""
    return f"{type(value).__name__}{within}"


def batch_size(operation: str, batch: Any) -> int:
    """Samples in a batch that can be divided: the first dimension of all its tensors."""
    shapes = _shapes(batch)
    if not _has_batch_dimension(shapes):
        raise ValueError(
            f"{operation}: to divide a batch, expected tensors whose first dimension is the batch, "
            f"got shapes {shapes}; {_undivided(operation)}put what has no batch dimension into "
            "model or loss_fn"
        )
    if not shapes[0][0]:
        raise ValueError(f"{operation}: the batch is empty, its tensors have shapes {shapes}")
    return shapes[0][0]


def _undivided(operation: str) -> str:
    """A remedy where the user has set micro_batch, as nobody does for `autotune`."""
    whole = "leave micro_batch out and let the loader make the batches small enough, or "
    return "" if operation == "autotune" else whole


def _shapes(tree: Any) -> list[tuple[int, ...]]:
    return [tuple(leaf.shape) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _has_batch_dimension(shapes: list[tuple[int, ...]]) -> bool:
    return all(shapes) and len({shape[0] for shape in shapes}) == 1


def samples_of(operation: str, batch: Batch) -> float:
    """Samples in a batch, by all its tensors or by its targets alone; NaN if neither tell.

    A batch of graphs has more nodes than targets, and CTC takes targets end to end.
    """
    for shapes in map(_shapes, (batch, targets_of(batch))):
        if _has_batch_dimension(shapes):
            return shapes[0][0] or batch_size(operation, batch)
    return math.nan


def split(operation: str, batch: Any, size: int | None, count: Count | None) -> list[Piece]:
    """Cut a batch into pieces of at most `size` samples, each with what it counts as its share.

    Without a size the batch stays whole, and need not have one batch dimension.
    """
    parts = [read_batch(operation, batch)]
    if size is not None and size < (whole := batch_size(operation, parts[0])):

        def is_listed(tree: Any) -> bool:  # an entry for each sample, which cuts would leave alone
            listed = isinstance(tree, list) and len(tree) == whole
            return listed and not all(isinstance(entry, Tensor) for entry in tree)

        if any(map(is_listed, tree_leaves(parts[0], is_leaf=is_listed))):
            raise ValueError(
                f"{operation}: to divide a batch of {whole} samples, expected tensors, got a list "
                f"with an entry for each sample; {_undivided(operation)}make a tensor of it"
            )
        cuts = [slice(start, start + size) for start in range(0, whole, size)]
        parts = [tree_map_only(Tensor, itemgetter(cut), parts[0]) for cut in cuts]
    counts = [samples_of(operation, p) if count is None else count(targets_of(p)) for p in parts]
    return [Piece(part, float(n), float(n)) for part, n in zip(parts, counts, strict=True)]


def check_counted(operation: str, total: float, batch: Any = None) -> None:
    """Raise if the mean over a batch is over nothing, or over nobody knows what."""
    if math.isnan(total):
        system = "" if operation == "autotune" else "the system "
        raise ValueError(
            f"{operation}: how much a batch weighs beside others is not known, as its targets have "
            "no batch dimension, or the model computes the loss and the batch has no labels; give "
            f"{system}count=, the terms of the mean in it, as `lambda targets: len(targets[1])`; a "
            "contrastive loss, as CLIP's, cannot be divided into micro-batches at all"
        )
    if not total > 0:
        shapes = _shapes(batch)
        if any(shape[:1] == (0,) for shape in shapes):
            raise ValueError(f"{operation}: the batch is empty, its tensors have shapes {shapes}")
        raise ValueError(
            f"{operation}: nothing in the batch counts: every label is -100 (ignored), or the "
            f"count that was given gives {total:g}; leave such batches out of the loader, or let "
            "count give how many terms the mean in loss_fn has, as `(targets != -100).sum()`"
        )


def terms_of(
    loss_fn: object, model: nn.Module | None = None, *, weighted: bool = True
) -> Count | None:
    """How many terms the mean of a loss has, for losses of PyTorch and the model's own (None).

    None for the number of samples.
    """
    if loss_fn is None:
        return partial(_labels, shifted=model is not None and _shifts(model))
    if loss_fn in (F.cross_entropy, F.nll_loss):
        loss_fn = nn.CrossEntropyLoss()  # of which these are the defaults
    if not isinstance(loss_fn, (nn.CrossEntropyLoss, nn.NLLLoss)):
        return None

    def count(targets: Any) -> float | Tensor:
        if not isinstance(targets, Tensor):
            return math.nan
        if targets.is_floating_point():  # probabilities of classes
            return targets.numel() / targets.shape[1]
        counted = targets != loss_fn.ignore_index
        if loss_fn.weight is None or not weighted:
            return torch.count_nonzero(counted)
        return loss_fn.weight.to(targets.device)[targets[counted]].sum()

    return count


# The model's own loss


def _labels(batch: Any, *, shifted: bool) -> float | Tensor:
    """How many labels the loss of a model is the mean over; NaN where the batch has none."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor):
        return math.nan
    if labels.is_floating_point():  # a mean over all elements
        return labels.numel()
    return torch.count_nonzero((labels[..., 1:] if shifted else labels) != -100)


def _shifts(model: nn.Module) -> bool:
    """Whether a model of `transformers` shifts its labels, so that each token predicts the next.

    Its `loss_type` names the loss; `transformers` takes None for the loss of a decoder.
    """
    for module in model.modules():
        if hasattr(module, "loss_type"):
            decodes = module.loss_type in (None, "ForCausalLM", "ForConditionalGeneration")
            return decodes and not getattr(module.config, "is_encoder_decoder", False)
    return False


_MEANS = ("NllLoss", "MseLoss", "SmoothL1Loss", "HuberLoss", "BinaryCrossEntropy")


def terms_in(loss: Tensor) -> Tensor | float | str:
    """How many terms a loss is the mean of, by its graph; a sentence where that does not tell."""
    node: Any = loss.grad_fn
    while (name := type(node).__name__) in ("_DDPSinkBackward", "ToCopyBackward0"):
        # They change nothing; the first takes all outputs of a model.
        node = node.next_functions[loss.output_nr if name[0] == "_" else 0][0]
    if name.startswith("Compiled"):
        return "it is compiled, so that nobody sees what it is the mean of"
    if not name.startswith(_MEANS) or node._saved_reduction != 1:
        return f"it ends in {name.removesuffix('Backward0')}, not in one mean over labels"
    return node._saved_total_weight if name.startswith("Nll") else node._saved_self.numel()


def check_own(operation: str, model: nn.Module, seen: Sequence[tuple[Piece, Any]]) -> None:
    """Raise unless each loss is a mean over the labels by which its micro-batch is weighted.

    What `terms_in` found is read here, after all work is queued: a device is waited for once.
    """
    for piece, found in seen:
        # The number is rounded to the type of the loss.
        rounding = torch.finfo(found.dtype).eps if isinstance(found, Tensor) else 0.0
        if isinstance(found, str):
            why = found
        elif not math.isclose(piece.terms, found, rel_tol=rounding):
            why = f"it is a mean over {float(found):g} terms, the batch has {piece.terms:g} labels"
        else:
            continue
        raise ValueError(
            f"{operation}: the own loss of {type(model).__name__} cannot be divided into "
            f"micro-batches or among processes: {why}; leave micro_batch out, give loss_fn, or "
            "give count=, if it is a mean over what that counts, as `lambda batch: "
            "len(batch['labels'])`"
        )


def nothing(output: Any) -> Tensor:
    """A zero that depends on an output: a process with nothing to add takes part all the same."""
    leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    # The model's own loss, a scalar, is NaN where it is a mean over nothing.
    leaves = [leaf for leaf in leaves if leaf.dim()] or leaves
    return sum((leaf.sum() * 0 for leaf in leaves), start=torch.zeros(()))
