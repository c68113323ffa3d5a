"""Forward and backward of one batch: what `fit` trains with is what `autotune` times."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from autograd_lib.core import batches
from autograd_lib.core.batches import Count, Piece
from autograd_lib.training.distributed import Peers, module_of, synchronized

_T = TypeVar("_T")

_DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, eq=False)
class ForwardBackward:
    """A model and its loss, run on micro-batches under a precision.

    Attributes:
        operation: What messages of errors begin with.
        model: Called with the inputs of a batch, as `core.batches` says.
        loss_fn: ``loss_fn(output, targets)`` is a mean; None for the loss that the model computes.
        precision: A field of `Settings`: autocast to it, unless it is "fp32".
        device: Where batches are moved.
        trusted: Whether the shares of micro-batches are taken as they are. Else an own loss of the
            model has to be the mean over its labels, by which `terms_of` weighs them.
    """

    operation: str
    model: nn.Module
    loss_fn: Callable[..., Tensor] | None
    precision: str
    device: torch.device
    trusted: bool = True

    def __call__(
        self,
        pieces: Sequence[Piece],
        scale: Callable[[Tensor], Tensor] | None = None,
        world: int = 1,
    ) -> Tensor:
        """Add the gradient of the mean over all pieces to `.grad`; return that mean, detached.

        Args:
            pieces: Micro-batches, whose shares add up to 1.
            scale: Applied to each loss before its backward: that of a `GradScaler`, for one.
            world: How many processes exchange the mean of their gradients, of which the sum is
                wanted.
        """
        mean: Any = 0.0
        divided = not self.trusted and (len(pieces) > 1 or world > 1)
        seen: list[tuple[Piece, Any]] = []
        for i, piece in enumerate(pieces):
            with synchronized(self.model, last=i == len(pieces) - 1):
                loss = self.forward(piece, divided)[1]  # the output is freed before backward
                if divided and self.loss_fn is None and piece.share:
                    seen.append((piece, batches.terms_in(loss)))
                if not loss.requires_grad:
                    raise ValueError(
                        f"{self.operation}: the loss depends on nothing that requires a gradient; "
                        "unfreeze what is to learn, as model.head.requires_grad_(True)"
                    )
                weighted = loss * (piece.share * world)
                (weighted if scale is None else scale(weighted)).backward()
            mean = mean + loss.detach() * piece.share
        batches.check_own(self.operation, module_of(self.model), seen)
        return mean

    def forward(self, piece: Piece, divided: bool = False) -> tuple[Any, Tensor]:
        """Output and mean loss of a micro-batch; a zero for the loss where its share is zero."""
        batch = move(piece.batch, self.device)
        dtype = _DTYPES[self.precision]
        autocast = torch.autocast(self.device.type, dtype, enabled=dtype is not None)
        with self._explaining(batch), autocast:
            output = batches.call(self.model, batch)
            if not piece.share:
                return output, batches.nothing(output)
            if self.loss_fn is None:
                return output, batches.own_loss(self.operation, output, batch)
            of_pytorch = type(self.loss_fn).__module__ == nn.modules.loss.__name__
            if isinstance(batch, dict) and of_pytorch:
                raise TypeError(
                    f"{self.operation}: a batch that is a mapping goes to loss_fn whole, and "
                    f"{self.loss_fn} takes tensors; write `lambda output, batch: loss_fn(output, "
                    "batch['labels'])`, or leave loss_fn out where the model computes its loss"
                )
            loss = self.loss_fn(output, batches.targets_of(batch))
        if not isinstance(loss, Tensor) or loss.dim():
            raise ValueError(
                f"{self.operation}: expected loss_fn to return a scalar, got "
                f"{batches.described(loss)}; return the mean over the samples, or over the terms "
                "that count(targets) counts"
            )
        if divided and loss is batches.loss_within(output):
            raise ValueError(
                f"{self.operation}: loss_fn returns the model's own loss, which micro-batches and "
                "processes divide by labels, not by samples; leave loss_fn out, or give count="
            )
        return output, loss

    @contextlib.contextmanager
    def _explaining(self, batch: Any) -> Iterator[None]:
        """Say of an error what may have caused it: numbers of another type than the model's."""
        try:
            yield
        except RuntimeError as error:
            came = _floating_types(tree_leaves(batch))
            own = _floating_types(self.model.parameters())
            if not came <= own:
                error.add_note(
                    f"{self.operation}: the batch is in {', '.join(sorted(came))}, the model in "
                    f"{', '.join(sorted(own))}; convert the data once, as x.float() (of NumPy "
                    'x.astype("float32")), or the model, as model.double()'
                )
            raise


def _floating_types(values: Iterable[Any]) -> set[str]:
    return {str(v.dtype) for v in values if isinstance(v, Tensor) and v.is_floating_point()}


def micro_batches(
    operation: str,
    batch: Any,
    size: int | None,
    count: Count | None,
    *,
    peers: Peers | None = None,
    counts: bool = True,
) -> list[Piece]:
    """Divide a batch; the share of each micro-batch is its part of the mean over the whole batch.

    With several processes that is the mean over the batches of all, and every process gets equally
    many micro-batches, as each forward may be a collective.

    Args:
        operation: What messages of errors begin with.
        batch: A mapping, or inputs and targets.
        size: Samples in a micro-batch; None for all.
        count: How many terms the mean of the loss has, given targets, or a batch that is a mapping;
            None for one a sample.
        peers: The processes of the step; None for this one alone.
        counts: Whether this process adds anything to the mean.
    """
    pieces = batches.split(operation, batch, size, count)
    if not counts:
        pieces = [piece._replace(share=0.0) for piece in pieces]
    if size is None and (peers is None or peers.world == 1) and pieces[0].share:
        return [pieces[0]._replace(share=1.0)]  # whatever it counts
    own = [sum(piece.share for piece in pieces), len(pieces)]
    gathered = [own] if peers is None else peers.gather(*own)
    total = sum(terms for terms, _ in gathered)
    batches.check_counted(operation, total, batch)
    if len(gathered) == 1:
        pieces = [piece for piece in pieces if piece.share]
    else:
        most = int(max(number for _, number in gathered))
        pieces += [pieces[-1]._replace(share=0.0)] * (most - len(pieces))
    return [piece._replace(share=piece.share / total) for piece in pieces]


def move(tree: _T, device: torch.device) -> _T:
    """A batch, with all that can be moved on a device: tensors, packed sequences, graphs."""

    def moved(leaf: Any) -> Any:
        return leaf.to(device, non_blocking=True) if hasattr(leaf, "to") else leaf

    # What moves itself is no container: the lengths of a packed sequence stay on the CPU.
    return tree_map(moved, tree, is_leaf=lambda leaf: hasattr(leaf, "to"))
