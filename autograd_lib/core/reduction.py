"""Statistics of many tensors at once: the engine of `gradients` and of the monitor.

A tensor is cut into rows, rows of equal length are reduced together in a block, and the statistics
of the rows are merged (Chan, Golub & LeVeque 1983), in float64 where the device has it. So two
hundred small tensors cost a handful of kernels, and a large one is never copied.

A `Reduction` runs within every training step: it is planned once and never waits for the device.
`read_norms` and `read_fields` plan nothing; on the CPU they choose by values, and they measure the
norm rather than derive it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from autograd_lib.core.rows import (
    BINS,
    FIELDS,
    NOTHING,
    PLAIN,
    count,
    count_on_host,
    cut,
    divide,
    histogram,
    is_moderate,
    join,
    merge,
    places_of,
    power_of_two,
    root_sum_squares,
    stored,
)
from autograd_lib.core.shards import find_meshes, merge_processes, shard


class Reduction:
    """How to reduce a list of tensors, planned once for all lists that look the same.

    Of a `DTensor` each process reduces its shard, and one collective for each sharded dimension of
    the mesh joins what they found: every rank must then call, with a gradient or without.

    Args:
        tensors: An example of the lists that will be reduced. None stands for a tensor that is not
            there; in the result it has no elements.
        likes: A tensor with the layout of each of `tensors`, for those that are None too.
    """

    # In a small model the monitor's time is that of launching its kernels. So everything that can
    # be prepared is, down to the views through which results are written.

    def __init__(self, tensors: Sequence[Tensor | None], likes: Sequence[Tensor]) -> None:
        self.device = home(likes)
        self.dtype = torch.float32 if self.device.type == "mps" else torch.float64
        self._meshes = find_meshes(likes)
        self._piles: list[tuple[Callable[[Any], Sequence[Tensor]], _Block]] = []
        self._large: list[tuple[int, torch.Size, list[_Block]]] = []
        self._sparse: list[tuple[int, _Block, _Block]] = []
        local = self._local(tensors)
        dense = [None if x is None or x.layout is not torch.strided else x for x in local]
        large, piles = divide(dense)
        for i in large:
            blocks = [_Block([i] * len(rows), rows, rows.shape[1:]) for rows in cut(local[i])]
            self._large.append((i, local[i].shape, blocks))
        for index in piles:
            like = local[index[0]]
            self._piles.append((_picker(index), _Block(index, like, like.shape)))
        for i, values in enumerate(local):
            if values is not None and values.numel() and values.layout is not torch.strided:
                self._sparse.append((i, _Block([i], values, (1,)), _Block([i], values, (1,))))
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
        pieces = torch.tensor(NOTHING, dtype=self.dtype, device="cpu")[:, None]
        pieces = pieces.repeat(1, len(owners) + 1)  # the last one has no elements
        pieces[0, :-1] = torch.tensor(lengths, dtype=self.dtype, device="cpu")
        self._pieces = pieces.to(self.device)
        self._places = places_of(owners, count).to(self.device)

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
        if not all(is_moderate(*extremes) for extremes in self._extremes):
            scaled = True
            self._reduce(local, counts, scaled)
        fields = len(FIELDS) if counts else PLAIN
        for results, pieces in self._pools:
            pieces[: fields - 1].copy_(results[: fields - 1], non_blocking=True)
            if scaled:  # only here, since a norm may be beyond float32
                pieces[:4].mul_(results[-1].to(self.device, self.dtype, non_blocking=True))
        joined = join(self._pieces[:fields], self._places, merge)
        return merge_processes(joined, self._meshes, merge)

    def _reduce(self, local: Sequence[Any], counts: bool, scaled: bool) -> None:
        for pick, block in self._piles:
            block.reduce(block.pile(pick(local)), counts, scaled)
        for i, shape, blocks in self._large:
            if local[i].shape != shape or local[i].dtype is not blocks[0].dtypes[0]:
                raise RuntimeError(f"expected the shape {tuple(shape)}, got {local[i].shape}")
            for block, rows in zip(blocks, cut(local[i]), strict=True):
                block.reduce(rows, counts, scaled)
        for i, explicit, implicit in self._sparse:
            values, zeros = stored(local[i])
            explicit.represent(values.reshape(1, -1), values.numel(), counts, scaled)
            implicit.represent(values.new_zeros(1, 1), zeros, counts, scaled)  # one for all

    @torch.no_grad()
    def histograms(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """Count the magnitudes of each tensor by powers of two, [tensors, BINS] of int64."""
        counts = torch.zeros(len(tensors), BINS, dtype=torch.int64, device=self.device)
        for i, values in enumerate(self._local(tensors)):
            if values is not None:
                counts[i] = histogram(values)
        return merge_processes(counts.T, self._meshes, lambda pieces: pieces.sum(-1)).T

    def _local(self, tensors: Sequence[Tensor | None]) -> Sequence[Any]:
        """What this process holds of each tensor."""
        if not self._meshes:
            return tensors
        return [None if tensor is None else shard(tensor, self._meshes) for tensor in tensors]


class _Block:
    """Rows that are reduced at once: for each of `owners` one row, of elements of `shape`."""

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
        self.low, self.high = results[4:6]
        self._unit = results[-1]
        self._pile = self._rows = self._space = None
        if self.device.type == "cpu" and scratch:
            shape = (len(self.owners), *self.shape)
            numel = math.prod(shape)
            self._pile = scratch[self.dtypes[0]][:numel].view(shape)
            self._rows = self._pile.view(len(self.owners), -1)  # of a scalar, too
            self._space = scratch[self.real][:numel].view(self._rows.shape)

    def pile(self, parts: Sequence[Tensor]) -> Tensor:
        """Copy tensors of equal shape into rows."""
        first = parts[0]
        if first.dtype is not self.dtypes[0] or first.shape != self.shape:  # `out` would be changed
            raise RuntimeError(f"expected {self.dtypes[0]} of {self.shape}, got {first.shape}")
        if self._rows is None:
            return torch.stack([*parts]).reshape(len(self.owners), -1)
        torch.stack(parts, out=self._pile)  # type: ignore[arg-type]
        return self._rows

    def represent(self, rows: Tensor, numel: int, counts: bool, scaled: bool) -> None:
        """Reduce rows of any length, and count their elements as `numel` like them."""
        self._numel.fill_(numel)
        self._space = None
        if numel:
            self.reduce(rows, counts, scaled)
            self._counts *= numel / rows.shape[1]
        else:
            for result, nothing in zip(self._results, (*NOTHING[1:], 1.0), strict=True):
                result.fill_(nothing)

    def reduce(self, rows: Tensor, counts: bool, scaled: bool, norms: Tensor | None = None) -> None:
        """Write the statistics of `rows`; rows that come from `pile` are overwritten.

        Unless `scaled`, no square of an element may over- or underflow. If `norms` [2, rows] is
        given, it receives the norms of the real and of the imaginary parts.
        """
        if counts:
            self._counts.copy_(count(rows))
        if rows.is_complex():
            rows = rows.to(torch.promote_types(rows.dtype, torch.complex64))
            torch.amax(rows.abs(), 1, out=self.high)
            torch.neg(self.high, out=self.low)
            parts = torch.view_as_real(rows).unbind(-1)
        else:
            if rows.dtype != self.real:
                rows = rows.to(self.real) if self._space is None else self._space.copy_(rows)
            torch.amin(rows, 1, out=self.low)  # torch.aminmax(dim=1) takes ten times as long
            torch.amax(rows, 1, out=self.high)
            parts = (rows,)
        space = self._space
        if space is None and scaled:
            space = torch.empty_like(parts[0])
        if scaled:
            self._unit.copy_(power_of_two(torch.maximum(self.high, -self.low)))
            inverse = self._unit.reciprocal()[:, None]
        for i, (part, mean, spread) in enumerate(
            zip(parts, self._means, self._spreads, strict=False)
        ):
            if scaled:
                part = torch.mul(part, inverse, out=space)  # noqa: PLW2901
            torch.mean(part, 1, keepdim=True, out=mean)
            if norms is not None:
                torch.linalg.vector_norm(part, dim=1, out=norms[i])
                if self.device.type == "cpu" and _subtract(norms[i], mean, part.shape[1], spread):
                    continue
            torch.linalg.vector_norm(torch.sub(part, mean, out=space), dim=1, out=spread)


def _subtract(norm: Tensor, mean: Tensor, numel: int, spread: Tensor) -> bool:
    """Take the spread from the norm and the mean, unless the difference would cancel."""
    square, level = norm.double().square(), mean[:, 0].double().square() * numel
    if not (2 * level < square).all():
        return False
    spread.copy_((square - level).sqrt())
    return True


def read_norms(tensors: Sequence[Tensor]) -> np.ndarray:
    """The L2 norm of each tensor, measured in one pass; of `DTensor` a collective."""
    return _read(tensors, _norms_of_rows, 1)[0].numpy()


def read_fields(tensors: Sequence[Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """The L2 norm of each tensor, and its fields [fields, tensors]; of `DTensor` a collective."""
    read = _read(tensors, _fields_of_rows, 1 + len(FIELDS)).numpy()
    return read[0], read[1:]


@torch.no_grad()
def _read(tensors: Sequence[Tensor], kernel: Callable[[Tensor], Tensor], height: int) -> Tensor:
    """Reduce rows by `kernel` to their norm and, if `height` is not 1, their fields; merge them."""
    meshes = find_meshes(tensors)
    local = [stored(shard(tensor, meshes) if meshes else tensor) for tensor in tensors]
    found: dict[torch.device, list[Tensor]] = {}
    owners: dict[torch.device, list[int]] = {}
    for index, rows in _blocks([values for values, _ in local]):
        found.setdefault(rows.device, []).append(kernel(rows))
        owners.setdefault(rows.device, []).extend(index)
    # The only host synchronization, one for each device that holds gradients.
    pieces = [torch.cat(blocks, dim=1).cpu().double() for blocks in found.values()]
    # Zeros that a sparse tensor does not store make one more piece of it.
    sparse = [i for i, (_, zeros) in enumerate(local) if zeros]
    implicit = torch.zeros(height, len(sparse), dtype=torch.float64, device="cpu")
    for field in (FIELDS.index("numel"), FIELDS.index("zero")) if height > 1 else ():
        implicit[1 + field] = implicit.new_tensor([local[i][1] for i in sparse])
    nothing = implicit.new_tensor((0.0, *NOTHING)[:height])[:, None]
    places = places_of([*itertools.chain(*owners.values()), *sparse], len(tensors))
    joined = join(torch.cat([*pieces, implicit, nothing], dim=1), places, _merge_read)
    return merge_processes(joined, meshes, _merge_read)


def _merge_read(pieces: Tensor) -> Tensor:
    norm = root_sum_squares(pieces[:1])
    return norm if len(pieces) == 1 else torch.cat([norm, merge(pieces[1:])])


def _blocks(tensors: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Blocks of rows of one length, with the index of each row's tensor."""
    large, piles = divide(tensors)
    for i in large:
        for rows in cut(tensors[i]):
            yield [i] * len(rows), rows
    for index in piles:
        yield index, torch.stack([tensors[i] for i in index]).reshape(len(index), -1)


def _norms_of_rows(rows: Tensor) -> Tensor:
    """The L2 norm of each row, finite wherever float64 can hold it, [1, rows]."""
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    if rows.device.type == "cpu":  # elsewhere a branch on values is a host synchronization
        norm = torch.linalg.vector_norm(rows, dim=1)
        if ((norm > 1e-15) & (norm < 1e15)).all():
            return norm[None]
    unit = power_of_two(rows.abs().amax(1))
    norm = torch.linalg.vector_norm(rows / unit[:, None], dim=1)
    return (_widest(norm) * _widest(unit))[None]


def _fields_of_rows(rows: Tensor) -> Tensor:
    """The L2 norm and the fields of each row, [1 + fields, rows]."""
    block = _Block([0] * len(rows), rows, rows.shape[1:])
    # The norms of both parts, the fields but `numel`, the unit.
    found = torch.zeros(2 + len(FIELDS), len(rows), dtype=block.real, device=rows.device)
    norms, results = found[:2], found[2:]
    block.bind(found[1], results, {})
    scaled = rows.device.type != "cpu"
    block.reduce(rows, scaled, scaled, norms)
    if not scaled and not is_moderate(block.low.numpy(), block.high.numpy(), np.empty(len(rows))):
        scaled = True
        block.reduce(rows, False, scaled, norms)
    if rows.device.type == "cpu":
        results[6:-1] = count_on_host(rows, finite=not scaled)
    if rows.is_complex():
        torch.hypot(*norms, out=norms[0])
    found[1] = rows.shape[1]
    if scaled:  # a norm may be beyond float32
        found = _widest(found)
        found[0] *= found[-1]
        found[2:6] *= found[-1]
    return found[:-1]


def _widest(values: Tensor) -> Tensor:
    """The values in float64, which MPS does not have."""
    return values.to(torch.float32 if values.device.type == "mps" else torch.float64)


def home(tensors: Sequence[Tensor]) -> torch.device:
    """The device on which results meet: that of the first tensor that is not on the CPU."""
    devices = [tensor.device for tensor in tensors if not tensor.is_meta]
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))


def _picker(index: Sequence[int]) -> Callable[[Any], Sequence[Tensor]]:
    """The function that takes the items at `index` out of a list."""
    return itemgetter(*index) if len(index) > 1 else lambda items: (items[index[0]],)
