"""Tensors cut into rows of equal length, and what is known of the rows merged again."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

# The fields of a piece: how many elements it has; of the real and of the imaginary parts their
# mean and the L2 norm of x - mean; the extremes (of a complex piece minus and plus its largest
# modulus); and, where they are asked for, how many elements are zero, NaN and infinite.
FIELDS = ("numel", "real", "imag", "real_spread", "imag_spread", "min", "max", "zero", "nan", "inf")
PLAIN = 7  # fields without the counts
NOTHING = (0.0, 0.0, 0.0, 0.0, 0.0, math.inf, -math.inf, 0.0, 0.0, 0.0)  # changes nothing it joins

# Elements of a row, and of a block of rows that is reduced at once. On CPU a block stays in the
# cache; elsewhere it hides the launch of its kernels.
CPU_SIZES, DEVICE_SIZES = (2**14, 2**19), (2**16, 2**24)
_MOST_ROWS = 256  # of one tensor; of a larger one the rows are longer

BINS, LOWEST = 64, -48  # a histogram counts magnitudes in [2**i, 2**(i + 1)), from i = LOWEST on


def norms(fields: Tensor) -> Tensor:
    """The L2 norms that `fields` [fields, tensors] imply: squares of spread and mean add up."""
    numel, real, imag, real_spread, imag_spread, low, high = fields[:PLAIN]
    spread = torch.hypot(real_spread, imag_spread)
    norm = torch.hypot(spread, torch.hypot(real, imag) * numel.sqrt())
    infinite = torch.maximum(high, -low).isinf() & (numel > 0)  # then the spread is NaN
    return torch.where(infinite, math.inf, norm)


def _sizes(device: torch.device) -> tuple[int, int]:
    return CPU_SIZES if device.type == "cpu" else DEVICE_SIZES


def stored(tensor: Tensor) -> tuple[Tensor, int]:
    """The elements that `tensor` stores, and how many more are zero without being stored."""
    if tensor.layout is torch.strided:
        return tensor, 0
    if tensor.is_mkldnn:
        return tensor.to_dense(), 0
    sparse = tensor.layout is torch.sparse_coo
    values = tensor.coalesce().values() if sparse else tensor.values()
    return values, tensor.numel() - values.numel()


def divide(tensors: Sequence[Tensor | None]) -> tuple[list[int], list[list[int]]]:
    """Which tensors are cut into rows, and which are rows of one block: small ones of one shape."""
    alike: dict[tuple[torch.device, torch.dtype, torch.Size], list[int]] = {}
    for i, values in enumerate(tensors):
        if values is not None:
            alike.setdefault((values.device, values.dtype, values.shape), []).append(i)
    large: list[int] = []
    piles: list[list[int]] = []
    for (device, _, shape), index in alike.items():
        row, block = _sizes(device)
        numel = shape.numel()
        if numel > row:
            large += index
        elif numel:
            most = block // numel
            piles += [index[start : start + most] for start in range(0, len(index), most)]
    return large, piles


def places_of(owners: Sequence[int], count: int) -> Tensor:
    """The places of the pieces of each of `count` tensors, [count, most pieces of one].

    Where a tensor has fewer, the place is that of the piece without elements, behind all others.
    """
    places: list[list[int]] = [[] for _ in range(count)]
    for place, i in enumerate(owners):
        places[i].append(place)
    most = max([1, *map(len, places)])
    padded = itertools.chain(*(place + [len(owners)] * (most - len(place)) for place in places))
    return torch.tensor([*padded], dtype=torch.int64, device="cpu").reshape(count, most)


def join(pieces: Tensor, places: Tensor, merge: Callable[[Tensor], Tensor]) -> Tensor:
    """Merge the pieces [fields, pieces] of each tensor."""
    joined = pieces.index_select(1, places.reshape(-1))
    return merge(joined.unflatten(1, places.shape)) if places.shape[1] > 1 else joined


def cut(values: Tensor) -> Iterator[Tensor]:
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


def is_moderate(low: np.ndarray, high: np.ndarray, largest: np.ndarray) -> bool:
    """Tell whether no square over- or underflows; on the CPU the check takes hardly any time."""
    np.maximum(np.negative(low, out=largest), high, out=largest)
    if not np.maximum.reduce(largest) < 1e12:
        return False
    return np.minimum.reduce(largest) > 1e-12 or not ((largest < 1e-12) & (largest > 0)).any()


def power_of_two(largest: Tensor) -> Tensor:
    """The power of two at or below each positive number, kept where its reciprocal is normal."""
    bits, mask, bound = (
        (torch.int64, 0x7FF << 52, 2.0**1021)
        if largest.dtype is torch.float64
        else (torch.int32, 0xFF << 23, 2.0**125)
    )
    return (largest.view(bits) & mask).view(largest.dtype).clamp(1 / bound, bound)


def merge(pieces: Tensor) -> Tensor:
    """Merge pieces [fields, tensors, pieces] along the last dimension."""
    numel = pieces[0]
    total = numel.sum(-1)
    means = (pieces[1:3] * (numel / total.clamp(min=1)[:, None])).sum(-1)
    between = (pieces[1:3] - means[..., None]) * numel.sqrt()
    spreads = root_sum_squares(torch.cat([pieces[3:5], between], dim=-1))
    low, high = pieces[5].amin(-1), pieces[6].amax(-1)
    return torch.stack([total, *means, *spreads, low, high, *pieces[PLAIN:].sum(-1)])


def root_sum_squares(values: Tensor) -> Tensor:
    """The L2 norm along the last dimension; no square is formed that could over- or underflow."""
    if not values.shape[-1]:
        return values.sum(-1)
    unit = power_of_two(values.abs().amax(-1))
    return torch.linalg.vector_norm(values / unit[..., None], dim=-1) * unit


def count(rows: Tensor) -> Tensor:
    """How many elements of each row are zero, NaN and infinite, [3, rows]."""
    if rows.is_complex():
        flags = [rows == 0, rows.isnan(), rows.isinf()]
        return torch.stack([flag.sum(1) for flag in flags]).to(rows.real.dtype)
    # Comparisons that write floats, and sums of these, take an eighth of the time on CPU.
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    out = torch.empty_like(rows)
    counts = [torch.eq(rows, 0, out=out).sum(1), torch.ne(rows, rows, out=out).sum(1)]
    return torch.stack([*counts, torch.eq(rows.abs(), math.inf, out=out).sum(1)])


def count_on_host(rows: Tensor, finite: bool) -> Tensor:
    """The same on the CPU, by NumPy, which counts booleans at the speed of memory."""
    counts = np.zeros((3, len(rows)), dtype=np.int64)
    flags = [~rows.bool()] if finite else [~rows.bool(), rows.isnan(), rows.isinf()]
    for count, flag in zip(counts, flags, strict=False):
        count[:] = [*map(np.count_nonzero, flag.numpy())]
    return torch.from_numpy(counts)


def histogram(values: Tensor) -> Tensor:
    """How many magnitudes lie in each of the bins, [BINS]; the lowest bin counts zeros too."""
    values, zeros = stored(values)
    counts = torch.zeros(BINS, dtype=torch.int64, device=values.device)
    for part in values.reshape(-1).split(2**22):  # histc counts in the dtype of its input
        magnitude = part.abs()
        magnitude = magnitude.to(torch.promote_types(magnitude.dtype, torch.float32))
        # The logarithm of the magnitude itself is rounded, up to the next bin.
        power = power_of_two(magnitude).log2().clamp(LOWEST, LOWEST + BINS - 0.5)
        power = torch.where(magnitude.isnan(), math.nan, power)  # histc leaves it out
        counts += torch.histc(power, BINS, LOWEST, LOWEST + BINS).long()
    counts[0] += zeros
    return counts
