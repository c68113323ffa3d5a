"""Statistics of many tensors at once, reduced on their device without a host synchronization.

`gradients` reads: it may wait for a value and choose by it. What stands here runs within every
training step and must not wait. A tensor is cut into rows, rows of equal length are reduced
together, and what is known of the rows is merged (Chan, Golub & LeVeque 1983), in float64 where
the device has it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from autograd_lib.gradients import _is_distributed, _local_values

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

    # For each mesh the positions of its tensors, and the dimensions along which some are sharded.
    _Meshes = dict[DeviceMesh, tuple[list[int], list[int]]]

# What is known of a piece: how many elements it has; of the real and of the imaginary parts their
# mean and the L2 norm of x - mean; the extremes (of a complex piece minus and plus its largest
# modulus); and, where they are asked for, how many elements are zero, NaN and infinite.
FIELDS = ("numel", "real", "imag", "real_spread", "imag_spread", "min", "max", "zero", "nan", "inf")
_PLAIN = 7  # fields without the counts
_NOTHING = (0.0, 0.0, 0.0, 0.0, 0.0, math.inf, -math.inf, 0.0, 0.0, 0.0)  # changes nothing it joins

# Elements of a row, and of a block of rows that is reduced at once. On CPU a block stays in the
# cache; elsewhere it hides the launch of its kernels.
_CPU_SIZES, _DEVICE_SIZES = (2**14, 2**19), (2**16, 2**24)
_MOST_ROWS = 256  # of one tensor; of a larger one the rows are longer

BINS, LOWEST = 64, -48  # a histogram counts magnitudes in [2**i, 2**(i + 1)), from i = LOWEST on


class Reduction:
    """How to reduce a list of tensors, planned once for all lists that look the same.

    Of a `DTensor` each process reduces its shard, and one collective for each sharded dimension of
    the mesh joins what they found: every rank must then call, with a gradient or without.

    Args:
        tensors: a list such as will be reduced; None stands for a tensor that is not there, and
            has no elements in the result.
        likes: what each of `tensors` is laid out like, those included that are None.
    """

    # Within a training step everything is cold, the interpreter too. So what can be prepared is,
    # down to the views that results are written through: a small model pays for twenty kernels.

    def __init__(self, tensors: Sequence[Tensor | None], likes: Sequence[Tensor]) -> None:
        self.device = home(likes)
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self._meshes = _meshes(likes)
        self._piles: list[tuple[Callable[[Any], Sequence[Tensor]], _Block]] = []
        self._large: list[tuple[int, torch.Size, list[_Block]]] = []
        self._sparse: list[tuple[int, _Block, _Block]] = []
        alike: dict[tuple[torch.device, torch.dtype, torch.Size], list[int]] = {}
        local = self._local(tensors)
        for i, values in enumerate(local):
            if values is None or not values.numel():
                continue
            if values.layout is not torch.strided:
                self._sparse.append((i, _Block([i], values, (1,)), _Block([i], values, (1,))))
            elif values.numel() > _sizes(values.device)[0]:
                blocks = [_Block([i] * len(rows), rows, rows.shape[1:]) for rows in _rows(values)]
                self._large.append((i, values.shape, blocks))
            else:
                alike.setdefault((values.device, values.dtype, values.shape), []).append(i)
        for (device, _, shape), pile in alike.items():
            at_once = max(1, _sizes(device)[1] // shape.numel())
            for start in range(0, len(pile), at_once):
                index = pile[start : start + at_once]
                self._piles.append((_picker(index), _Block(index, local[index[0]], shape)))
        self._arrange(len(tensors))

    def _arrange(self, count: int) -> None:
        """Give the results of each block a place, and each tensor the places of its pieces."""
        blocks = [block for _, block in self._piles]
        blocks += itertools.chain(*(several for *_, several in self._large))
        blocks += itertools.chain(*(both for _, *both in self._sparse))
        kind = lambda block: (str(block.device), str(block.real))  # noqa: E731
        blocks.sort(key=kind)
        owners = [i for block in blocks for i in block.owners]
        lengths = [block.shape.numel() for block in blocks for _ in block.owners]
        pieces = torch.tensor(_NOTHING, dtype=self.dtype, device="cpu")[:, None]
        pieces = pieces.repeat(1, len(owners) + 1)  # the last one has no elements
        pieces[0, :-1] = torch.tensor(lengths, dtype=self.dtype, device="cpu")
        self._pieces = pieces.to(self.device)
        places: list[list[int]] = [[] for _ in range(count)]
        for place, i in enumerate(owners):
            places[i].append(place)
        most = max([1, *map(len, places)])
        padded = [place + [len(owners)] * (most - len(place)) for place in places]
        index = torch.tensor(padded, dtype=torch.int64, device="cpu").reshape(-1)
        self._places, self._most = index.to(self.device), most

        sizes: dict[torch.dtype, int] = {}
        for block in blocks:
            for dtype in block.dtypes if block.device.type == "cpu" else ():
                numel = len(block.owners) * block.shape.numel()
                sizes[dtype] = max(sizes.get(dtype, 0), numel)
        scratch = {
            dtype: torch.empty(size, dtype=dtype, device="cpu") for dtype, size in sizes.items()
        }
        self._pools: list[tuple[Tensor, Tensor]] = []  # results, and where in the pieces they go
        # The smallest and largest elements as the host sees them, and room for their magnitudes.
        self._extremes: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        start = 0
        for _, pool in itertools.groupby(blocks, kind):
            members = list(pool)
            stop = start + sum(len(block.owners) for block in members)
            like = members[0]
            # The fields but `numel`, and the unit in which means and spreads are.
            results = torch.zeros(len(FIELDS), stop - start, dtype=like.real, device=like.device)
            self._pools.append((results, self._pieces[1:, start:stop]))
            if like.device.type == "cpu":
                low, high = results[4:6].numpy()
                self._extremes.append((low, high, np.empty_like(low)))
            for block in members:
                rows = len(block.owners)
                block.bind(self._pieces[0, start : start + rows], results[:, :rows], scratch)
                start, results = start + rows, results[:, rows:]

    @torch.no_grad()
    def __call__(self, tensors: Sequence[Tensor | None], *, counts: bool = False) -> Tensor:
        """Return the fields of every tensor, [fields, tensors], without the counts by default.

        Raises:
            RuntimeError: if the tensors do not look like those of the plan.
        """
        local = self._local(tensors)
        scaled = len(self._extremes) < len(self._pools)
        self._reduce(local, counts, scaled)
        if not all(_moderate(*extremes) for extremes in self._extremes):
            scaled = True
            self._reduce(local, counts, scaled)
        fields = len(FIELDS) if counts else _PLAIN
        for results, pieces in self._pools:
            pieces[: fields - 1].copy_(results[: fields - 1], non_blocking=True)
            if scaled:  # only here, since a norm may be beyond float32
                pieces[:4].mul_(results[-1].to(self.device, self.dtype, non_blocking=True))
        joined = self._pieces[:fields].index_select(1, self._places)
        if self._most > 1:
            joined = merge(joined.unflatten(1, (-1, self._most)))
        for mesh, (index, dims) in self._meshes.items():
            own = joined[:, index]
            for dim in dims:
                own = merge(_gather(own, mesh, dim))
            joined[:, index] = own
        return joined

    def _reduce(self, local: Sequence[Any], counts: bool, scaled: bool) -> None:
        for pick, block in self._piles:
            block.reduce(block.pile(pick(local)), counts, scaled)
        for i, shape, blocks in self._large:
            if local[i].shape != shape or local[i].dtype is not blocks[0].dtypes[0]:
                raise RuntimeError(f"expected the shape {tuple(shape)}, got {local[i].shape}")
            for block, rows in zip(blocks, _rows(local[i]), strict=True):
                block.reduce(rows, counts, scaled)
        for i, stored, unstored in self._sparse:
            values, zeros = _local_values(local[i])
            stored.represent(values.reshape(1, -1), values.numel(), counts, scaled)
            unstored.represent(values.new_zeros(1, 1), zeros, counts, scaled)  # one for all

    @torch.no_grad()
    def histograms(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Count the magnitudes of each tensor by powers of two, [tensors, BINS] of int64."""
        counts = torch.zeros(len(tensors), BINS, dtype=torch.int64, device=self.device)
        for i, values in enumerate(self._local(tensors)):
            if values is not None:
                counts[i] = _histogram(values)
        for mesh, (index, dims) in self._meshes.items():
            own = counts[index]
            for dim in dims:
                own = _gather(own, mesh, dim).sum(-1)
            counts[index] = own
        return counts

    def _local(self, tensors: Sequence[Tensor | None]) -> Sequence[Any]:
        """What this process holds of each tensor."""
        if not self._meshes:
            return tensors
        return [None if tensor is None else _shard(tensor, self._meshes) for tensor in tensors]


class _Block:
    """Rows that are reduced at once: one row of elements of `shape` for each of `owners`."""

    def __init__(self, owners: list[int], like: Tensor, shape: Sequence[int]) -> None:
        self.owners, self.shape, self.device = owners, torch.Size(shape), like.device
        self.real = torch.promote_types(like.dtype, torch.float32).to_real()
        self.dtypes = like.dtype, self.real  # of what is copied into rows, and of the arithmetic

    def bind(self, numel: Tensor, results: Tensor, scratch: dict[torch.dtype, Tensor]) -> None:
        """Take the places of the results, and memory to work in.

        On CPU the memory is that of all blocks: fresh pages would cost more than the sums.
        """
        self._numel, self._results, self._counts = numel, results, results[6:-1]
        self._means = [mean[:, None] for mean in results[:2]]
        self._spreads = [*results[2:4]]
        self._low, self._high = results[4:6]
        self._unit = results[-1]
        self._pile = self._rows = self._space = None
        if self.device.type == "cpu":
            shape = (len(self.owners), *self.shape)
            numel = math.prod(shape)
            self._pile = scratch[self.dtypes[0]][:numel].view(shape)
            self._rows = self._pile.flatten(1)
            self._space = scratch[self.real][:numel].view(self._rows.shape)

    def pile(self, parts: Sequence[Tensor]) -> Tensor:
        """Copy tensors of equal shape into rows."""
        first = parts[0]
        if first.dtype is not self.dtypes[0] or first.shape != self.shape:  # `out` would be changed
            raise RuntimeError(f"expected {self.dtypes[0]} of {self.shape}, got {first.shape}")
        if self._rows is None:
            return torch.stack([*parts]).flatten(1)
        torch.stack(parts, out=self._pile)  # type: ignore[arg-type]
        return self._rows

    def represent(self, rows: Tensor, numel: int, counts: bool, scaled: bool) -> None:
        """Reduce rows of any length that stand for `numel` elements like theirs, or for none."""
        self._numel.fill_(numel)
        self._space = None
        if numel:
            self.reduce(rows, counts, scaled)
            self._counts *= numel / rows.shape[1]
        else:
            for result, nothing in zip(self._results, (*_NOTHING[1:], 1.0), strict=True):
                result.fill_(nothing)

    def reduce(self, rows: Tensor, counts: bool, scaled: bool) -> None:
        """Write what there is to know of `rows`, overwriting them if they come from `pile`.

        Unless `scaled`, no square of an element may over- or underflow.
        """
        if counts:
            self._counts.copy_(_count(rows))
        if rows.is_complex():
            rows = rows.to(torch.promote_types(rows.dtype, torch.complex64))
            torch.amax(rows.abs(), 1, out=self._high)
            torch.neg(self._high, out=self._low)
            parts = torch.view_as_real(rows).unbind(-1)
        else:
            if rows.dtype != self.real:
                rows = rows.to(self.real) if self._space is None else self._space.copy_(rows)
            torch.amin(rows, 1, out=self._low)  # torch.aminmax(dim=1) takes ten times as long
            torch.amax(rows, 1, out=self._high)
            parts = (rows,)
        space = torch.empty_like(parts[0]) if self._space is None else self._space
        if scaled:
            self._unit.copy_(_power_of_two(torch.maximum(self._high, -self._low)))
            inverse = self._unit.reciprocal()[:, None]
        for part, mean, spread in zip(parts, self._means, self._spreads, strict=False):
            if scaled:
                part = torch.mul(part, inverse, out=space)  # noqa: PLW2901
            torch.mean(part, 1, keepdim=True, out=mean)
            torch.linalg.vector_norm(torch.sub(part, mean, out=space), dim=1, out=spread)


def home(tensors: Sequence[Tensor]) -> torch.device:
    """The device on which results meet: that of the first tensor that is not on the CPU."""
    devices = [tensor.device for tensor in tensors if not tensor.is_meta]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def norms(fields: Tensor) -> Tensor:
    """The L2 norms that `fields` [fields, tensors] imply: squares of spread and mean add up."""
    numel, real, imag, real_spread, imag_spread, low, high = fields[:_PLAIN]
    spread = torch.hypot(real_spread, imag_spread)
    norm = torch.hypot(spread, torch.hypot(real, imag) * numel.sqrt())
    infinite = torch.maximum(high, -low).isinf() & (numel > 0)  # then the spread is NaN
    return torch.where(infinite, math.inf, norm)


def _sizes(device: torch.device) -> tuple[int, int]:
    return _CPU_SIZES if device.type == "cpu" else _DEVICE_SIZES


def _picker(index: Sequence[int]) -> Callable[[Any], Sequence[Tensor]]:
    """The function that takes the items at `index` out of a list."""
    return itemgetter(*index) if len(index) > 1 else lambda items: (items[index[0]],)


def _rows(values: Tensor) -> Iterator[Tensor]:
    """Cut a tensor into rows of one length, in blocks, and what is left over."""
    row, block = _sizes(values.device)
    numel = values.numel()
    if not values.is_contiguous():  # whatever its order in memory, read it in that order
        values = values.permute(sorted(range(values.ndim), key=values.stride, reverse=True))
    flat = values.reshape(-1)
    row = max(row, -(-numel // _MOST_ROWS))
    least = -(-numel // row)
    row = next((numel // n for n in range(least, 2 * least) if numel % n == 0), row)
    whole = numel // row * row
    yield from flat[:whole].view(-1, row).split(max(1, block // row))
    if whole < numel:
        yield flat[None, whole:]


def _moderate(low: np.ndarray, high: np.ndarray, largest: np.ndarray) -> bool:
    """Tell whether no square over- or underflows; to look costs nothing where the host computes."""
    np.maximum(np.negative(low, out=largest), high, out=largest)
    if not np.maximum.reduce(largest) < 1e12:
        return False
    return np.minimum.reduce(largest) > 1e-12 or not ((largest < 1e-12) & (largest > 0)).any()


def _power_of_two(largest: Tensor) -> Tensor:
    """The power of two at or below each positive number, kept where its reciprocal is normal."""
    bits, mask, bound = (
        (torch.int64, 0x7FF << 52, 2.0**1021)
        if largest.dtype is torch.float64
        else (torch.int32, 0xFF << 23, 2.0**125)
    )
    return (largest.view(bits) & mask).view(largest.dtype).clamp(1 / bound, bound)


def merge(pieces: Tensor) -> Tensor:
    """Join pieces [fields, tensors, pieces] along the last dimension."""
    numel = pieces[0]
    total = numel.sum(-1)
    means = (pieces[1:3] * (numel / total.clamp(min=1)[:, None])).sum(-1)
    shift = pieces[1:3] - means[..., None]
    spreads = (pieces[3:5].square() + numel * shift.square()).sum(-1).sqrt()
    low, high = pieces[5].amin(-1), pieces[6].amax(-1)
    return torch.stack([total, *means, *spreads, low, high, *pieces[_PLAIN:].sum(-1)])


def _count(rows: Tensor) -> Tensor:
    """How many elements of each row are zero, NaN and infinite, [3, rows]."""
    if rows.is_complex():
        flags = [rows == 0, rows.isnan(), rows.isinf()]
        return torch.stack([flag.sum(1) for flag in flags]).to(rows.real.dtype)
    # Comparisons that write floats, and sums of these, take an eighth of the time on CPU.
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    out = torch.empty_like(rows)
    counts = [torch.eq(rows, 0, out=out).sum(1), torch.ne(rows, rows, out=out).sum(1)]
    return torch.stack([*counts, torch.eq(rows.abs(), math.inf, out=out).sum(1)])


def _histogram(values: Tensor) -> Tensor:
    values, zeros = _local_values(values)
    counts = torch.zeros(BINS, dtype=torch.int64, device=values.device)
    for part in values.reshape(-1).split(2**22):  # histc counts in the dtype of its input
        magnitude = part.abs()
        magnitude = magnitude.to(torch.promote_types(magnitude.dtype, torch.float32))
        # The logarithm of the magnitude itself is rounded, up to the next bin.
        power = _power_of_two(magnitude).log2().clamp(LOWEST, LOWEST + BINS - 0.5)
        power = torch.where(magnitude.isnan(), math.nan, power)  # histc leaves it out
        counts += torch.histc(power, BINS, LOWEST, LOWEST + BINS).long()
    counts[0] += zeros
    return counts


def _meshes(likes: Sequence[Tensor]) -> _Meshes:
    meshes: _Meshes = {}
    for i, like in enumerate(likes):
        if _is_distributed(like) and like.device_mesh.get_coordinate() is not None:
            index, dims = meshes.setdefault(like.device_mesh, ([], []))
            index.append(i)
            sharded = [d for d, placement in enumerate(like.placements) if placement.is_shard()]
            dims += [dim for dim in sharded if dim not in dims]
    return meshes


def _shard(tensor: Tensor, meshes: _Meshes) -> Tensor:
    """What this process contributes to `tensor`: of equal copies only the first one counts."""
    if not _is_distributed(tensor):
        return tensor
    from torch.distributed.tensor import Replicate  # noqa: PLC0415

    if any(placement.is_partial() for placement in tensor.placements):
        whole = [Replicate() if p.is_partial() else p for p in tensor.placements]
        tensor = tensor.redistribute(placements=whole)
    local = tensor.to_local()
    _, dims = meshes.get(tensor.device_mesh, ([], []))
    coordinate = tensor.device_mesh.get_coordinate() or ()
    copy = any(coordinate[d] > 0 and tensor.placements[d].is_replicate() for d in dims)
    return local.flatten()[:0] if copy else local


def _gather(own: Tensor, mesh: DeviceMesh, dim: int) -> Tensor:
    """What each process along a dimension of the mesh has, in a new last dimension."""
    sent = own.to(mesh.device_type).contiguous()
    received = sent.new_empty(mesh.size(dim) * len(sent), *sent.shape[1:])  # gloo stacks none
    new = hasattr(torch.distributed, "all_gather_single")  # the other warns that it is deprecated
    name = "all_gather_single" if new else "all_gather_into_tensor"
    getattr(torch.distributed, name)(received, sent, group=mesh.get_group(dim))
    return received.view(-1, *sent.shape).movedim(0, -1).to(own.device)
