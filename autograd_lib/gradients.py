"""Reading the gradients of a model: whether they exist, how large they are, how they are spread.

Every statistic of every parameter comes from a few passes over blocks of gradients, and on CUDA
from one host synchronization for the whole model. The gradients are cut into rows, rows of equal
length are piled into a block, and each statistic is one reduction along the rows; the partial
results are merged on the host in float64. So two hundred small tensors cost a handful of kernels,
and a large one is never copied whole.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

import numpy as np
import torch
from torch import Tensor, nn

from autograd_lib.report.tables import Row, Table

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor

__all__ = [
    "AutogradUtils",
    "GradientStatistics",
    "check_gradients_exist",
    "compute_gradient_statistics",
    "enable_gradients",
    "get_gradient_norms",
    "missing_gradients",
]

# Elements of a row, and of a block of rows that is reduced at once. On CPU a block stays in the
# cache, and a row is short enough for a running sum in float32 to keep its digits; elsewhere
# reductions are trees, and a block is large enough to hide the launch of its kernels.
_CPU_SIZES, _DEVICE_SIZES = (2**14, 2**19), (2**19, 2**24)
# What is known of each piece of the gradients, and of each gradient once its pieces are merged:
# arrays by field. `real` and `imag` are the parts of the mean, `spread` is the norm of x - mean.
_Table = dict[str, np.ndarray]
_STATISTICS = ("norm", "real", "imag", "spread", "min", "max", "abs_max", "zero", "nan", "inf")


# The columns of the table: for each statistic its header, and how it is written.
_SHOWN: dict[str, tuple[str, Callable[[Any], str]]] = {
    **{key: (key, "{:.3g}".format) for key in ("norm", "mean", "std", "min", "max", "abs_max")},
    **{key: (key, "{:.3g}".format) for key in ("cosine", "update_ratio")},
    "zero_fraction": ("zeros", lambda share: "" if math.isnan(share) else f"{share:.1%}"),
    **{f"{key}_count": (key, "{:,}".format) for key in ("nan", "inf")},
    "numel": ("numel", "{:,}".format),
}


class GradientStatistics(Table, Mapping[str, Any]):
    """Statistics of a model's gradients: a mapping that prints as a table.

    `["total_norm"]` is the L2 norm of all gradients together, a float. `["parameters"]` maps each
    parameter's name to a dict with

    - `norm`: the L2 norm, by modulus where the gradient is complex;
    - `mean`, `std`: mean and population standard deviation (divided by `numel`);
    - `min`, `max`: absent where the gradient is complex;
    - `abs_max`: the largest modulus;
    - `zero_fraction`: the share of elements that are exactly zero, in [0, 1];
    - `nan_count`, `inf_count`, `numel`: counts of elements.

    A NaN makes every statistic of its parameter NaN but the counts, as in PyTorch's reductions.

    The summary of a `GradientMonitor` has `["step"]` and `["issues"]` too, and of the last three
    kinds of statistics only `numel` unless it was asked to collect the others.
    """

    def __init__(
        self, total_norm: float, parameters: dict[str, dict[str, Any]], **more: Any
    ) -> None:
        self._data = {"total_norm": total_norm, "parameters": parameters, **more}

    def __getitem__(self, key: str) -> Any:
        return self._data[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._data)

    def __len__(self) -> int:
        return len(self._data)

    def _table(self) -> tuple[str, Row, list[Row]]:
        """Title, header and rows; a column for each statistic that some parameter has."""
        parameters = self["parameters"]
        step = f" at step {self['step']}" if self.get("step") else ""
        issues = [f"issue: {issue}" for issue in self.get("issues", [])]
        if not parameters:
            return "\n".join(["no gradients yet", *issues]), [], []
        shown = [key for key in _SHOWN if any(key in entry for entry in parameters.values())]
        rows: list[Row] = [
            [name, *(_SHOWN[key][1](entry[key]) if key in entry else "" for key in shown)]
            for name, entry in parameters.items()
        ]
        title = f"gradients of {len(rows)} parameters{step}, total norm {self['total_norm']:.4g}"
        return "\n".join([title, *issues]), ["parameter", *(_SHOWN[key][0] for key in shown)], rows


def enable_gradients(model: nn.Module, enable: bool = True) -> None:
    """Make every floating-point or complex parameter of `model` require a gradient, or none.

    Integer parameters, such as those of a quantized layer, cannot have a gradient and are left as
    they are. A `.grad` that a parameter already has stays.

    Args:
        model: the module whose parameters are switched, those of its submodules included.
        enable: True to require gradients, False to freeze.

    Raises:
        TypeError: if `model` is not a module or `enable` not a bool.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> enable_gradients(model, False)
        >>> [p.requires_grad for p in model.parameters()]
        [False, False]
    """
    _check_module("enable_gradients", model)
    if not isinstance(enable, bool):
        raise TypeError(f"enable_gradients: expected enable=True or False, got {enable!r}")
    for parameter in model.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_(enable)


def missing_gradients(model: nn.Module) -> list[str]:
    """Name the parameters that require a gradient and have none.

    After `backward()` these are the parameters that the loss does not depend on, or that lie
    behind a `detach()` or a `no_grad()` block.

    Args:
        model: the module to look at; a shared parameter goes by its first name.

    Raises:
        TypeError: if `model` is not a module.

    Example:
        >>> model = torch.nn.ModuleList([torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)])
        >>> model[0](torch.ones(1, 2)).sum().backward()
        >>> missing_gradients(model)
        ['1.weight', '1.bias']
    """
    _check_module("missing_gradients", model)
    return [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def check_gradients_exist(model: nn.Module) -> bool:
    """Tell whether every parameter of `model` that requires a gradient has one.

    `missing_gradients` names those that have none. True for a model without such parameters.

    Raises:
        TypeError: if `model` is not a module.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> check_gradients_exist(model)
        False
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> check_gradients_exist(model)
        True
    """
    _check_module("check_gradients_exist", model)
    return not missing_gradients(model)


def get_gradient_norms(model: nn.Module) -> dict[str, float]:
    """Return the L2 norm of each parameter's gradient, by the parameter's name.

    Parameters whose `.grad` is None are left out; a shared parameter is counted once, under its
    first name. Sparse gradients count as if densified, complex ones by modulus. Half-precision
    gradients are summed in float32, after a scaling that keeps any finite gradient's norm from
    overflow and underflow. For `DTensor` gradients (FSDP2, tensor parallelism) the norm is that of
    the whole tensor; the call is then a collective that every rank must make.

    Args:
        model: a module, usually after `backward()`.

    Returns:
        A dict from parameter name to norm, empty before the first `backward()`.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: if a gradient is on the meta device.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> (3 * model(torch.tensor([[3.0, 4.0]]))).sum().backward()
        >>> get_gradient_norms(model)
        {'weight': 15.0, 'bias': 3.0}
    """
    names, grads = _gradients("get_gradient_norms", model)
    table = _collect(grads, ["norm"], lambda rows: [_norm(rows)])
    return dict(zip(names, table["norm"].tolist(), strict=True))


def compute_gradient_statistics(model: nn.Module) -> GradientStatistics:
    """Summarize the gradient of every parameter of `model`.

    What `get_gradient_norms` says of shared, sparse, complex, half-precision and distributed
    gradients holds here too. The standard deviation never comes from a difference that cancels, so
    it keeps its digits where a gradient is large and nearly constant.

    Args:
        model: a module, usually after `backward()`.

    Returns:
        The statistics, a mapping that prints as a table. Before the first `backward()` its
        `total_norm` is 0.0 and its `parameters` are empty. Of an empty parameter the norm and the
        largest modulus are 0, its mean, deviation and extremes NaN.

    Raises:
        TypeError: if `model` is not a module.
        ValueError: if a gradient is on the meta device.

    Example:
        >>> model = torch.nn.Linear(3, 1)
        >>> model(torch.tensor([[3.0, 0.0, -4.0]])).sum().backward()
        >>> weight = compute_gradient_statistics(model)["parameters"]["weight"]
        >>> weight["norm"], weight["min"], weight["max"], weight["numel"]
        (5.0, -4.0, 3.0, 3)
    """
    names, grads = _gradients("compute_gradient_statistics", model)
    table = _collect(grads, _STATISTICS, _statistics_of_rows)
    columns = [
        dict(zip(table, row, strict=True)) for row in np.stack([*table.values()], 1).tolist()
    ]
    parameters = {}
    for name, grad, piece in zip(names, grads, columns, strict=True):
        numel = piece["numel"]
        entry = {key: piece[key] for key in ("norm", "min", "max", "abs_max")}
        entry["mean"] = complex(piece["real"], piece["imag"])
        entry["std"] = piece["spread"] / math.sqrt(numel) if numel else math.nan
        entry["zero_fraction"] = piece["zero"] / numel if numel else math.nan
        entry |= {f"{key}_count": int(piece[key]) for key in ("nan", "inf")}
        entry["numel"] = int(numel)
        if grad.is_complex():
            del entry["min"], entry["max"]
        else:
            entry["mean"] = piece["real"]
        parameters[name] = entry
    total = _root_sum_squares(np.zeros(len(grads), dtype=int), table["norm"], 1).item()
    return GradientStatistics(total, parameters)


class AutogradUtils:
    """The functions of this module under one name; each method is the function of that name."""

    enable_gradients = staticmethod(enable_gradients)
    get_gradient_norms = staticmethod(get_gradient_norms)
    compute_gradient_statistics = staticmethod(compute_gradient_statistics)
    check_gradients_exist = staticmethod(check_gradients_exist)


def _check_module(operation: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{operation}: expected a torch.nn.Module, got {type(model).__name__}; "
            "pass the model itself, not its parameters or its class"
        )


def _gradients(operation: str, model: nn.Module) -> tuple[list[str], list[Tensor]]:
    """Names and gradients of the parameters that have one."""
    _check_module(operation, model)
    named = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    for name, grad in named:
        if grad.is_meta:
            raise ValueError(
                f"{operation}: the gradient of {name!r} with shape {tuple(grad.shape)} is on the "
                "meta device, which holds no values; call model.to_empty(device=...), load the "
                "weights and run backward() again"
            )
    return [name for name, _ in named], [grad for _, grad in named]


@torch.no_grad()
def _collect(
    grads: Sequence[Tensor],
    fields: Sequence[str],
    reduce_rows: Callable[[Tensor], Sequence[Tensor]],
) -> _Table:
    """Reduce every gradient to one entry of each array of a float64 table."""
    local = [_local_values(grad) for grad in grads]
    reduced: dict[torch.device, list[Tensor]] = {}
    owners: dict[torch.device, list[int]] = {}
    lengths: dict[torch.device, list[int]] = {}
    for rows_of, rows in _blocks([values for values, _ in local]):
        reduced.setdefault(rows.device, []).append(torch.stack([*reduce_rows(rows)]))
        owners.setdefault(rows.device, []).extend(rows_of)
        lengths.setdefault(rows.device, []).extend([rows.shape[1]] * len(rows_of))
    # The only host synchronization, one for each device that holds gradients. Concatenation
    # promotes to float64 where some gradient has that dtype (on MPS none can).
    parts = [torch.cat(blocks, dim=1).cpu().double().numpy() for blocks in reduced.values()]
    # Zeros that a sparse gradient does not store make one more piece of it.
    zeros = np.array([count for _, count in local], dtype=float)
    values = np.concatenate([*parts, np.zeros((len(fields), len(grads)))], axis=1)
    pieces = dict(zip(fields, values, strict=True))
    pieces["numel"] = np.array([*itertools.chain(*lengths.values()), *zeros])
    if "zero" in pieces:
        pieces["zero"][len(pieces["zero"]) - len(grads) :] = zeros
    owner = np.array([*itertools.chain(*owners.values()), *range(len(grads))], dtype=int)
    return _gather(grads, _merge(owner, pieces, len(grads)))


def _is_distributed(grad: Tensor) -> TypeGuard[DTensor]:
    # Importing torch.distributed.tensor takes half as long as importing torch itself, and where
    # nobody has imported it no DTensor can exist.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(grad, module.DTensor)


def _local_values(grad: Tensor) -> tuple[Tensor, int]:
    """The elements that this process must read, and how many more are zero without being stored."""
    if _is_distributed(grad):
        from torch.distributed.tensor import Replicate  # noqa: PLC0415

        whole = [Replicate() if p.is_partial() else p for p in grad.placements]
        local = grad.redistribute(placements=whole).to_local()
        coordinate: Sequence[int] = grad.device_mesh.get_coordinate() or ()
        # Of equal copies along a replicated mesh dimension the first one counts.
        copy = any(i > 0 and p.is_replicate() for i, p in zip(coordinate, whole, strict=False))
        return (local.flatten()[:0] if copy else local), 0
    if grad.is_mkldnn:
        grad = grad.to_dense()
    if grad.layout is torch.strided:
        return grad, 0
    values = grad.coalesce().values() if grad.layout is torch.sparse_coo else grad.values()
    return values, grad.numel() - values.numel()


def _blocks(grads: Sequence[Tensor]) -> Iterator[tuple[list[int], Tensor]]:
    """Cut gradients into rows; yield blocks of equal rows with the index of each row's gradient."""
    piles: dict[tuple[torch.device, torch.dtype, torch.Size], list[tuple[int, Tensor]]] = {}
    for i, grad in enumerate(grads):
        row, block = _CPU_SIZES if _on_cpu(grad) else _DEVICE_SIZES
        rest = grad
        if grad.numel() > row:
            flat = grad.reshape(-1)
            whole = len(flat) // row * row
            rest = flat[whole:]
            for rows in flat[:whole].view(-1, row).split(block // row):
                yield [i] * len(rows), _widened(rows)
        if rest.numel():
            piles.setdefault((rest.device, rest.dtype, rest.shape), []).append((i, rest))
    for (_, _, shape), pile in piles.items():
        block = (_CPU_SIZES if _on_cpu(pile[0][1]) else _DEVICE_SIZES)[1]
        at_once = max(1, block // shape.numel())
        for start in range(0, len(pile), at_once):
            owner, parts = zip(*pile[start : start + at_once], strict=True)
            rows = torch.stack(parts).reshape(len(parts), -1)
            yield list(owner), _widened(rows)


def _widened(rows: Tensor) -> Tensor:
    """The rows in float32 at least; off the CPU in float64, which costs no time there."""
    if _on_cpu(rows) or rows.device.type == "mps":  # MPS has no float64
        return rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows.to(torch.promote_types(rows.dtype, torch.float64))


def _statistics_of_rows(rows: Tensor) -> list[Tensor]:
    """Reduce each row to the fields of `_STATISTICS`."""
    if rows.is_complex():
        low = high = abs_max = rows.abs().amax(1)
    else:
        low, high = rows.amin(1), rows.amax(1)  # together a tenth of torch.aminmax(dim=1) on CPU
        abs_max = torch.maximum(low.abs(), high.abs())
    if _on_cpu(rows) and ((abs_max > 1e30) & abs_max.isfinite()).any():
        rows = rows.to(torch.promote_types(rows.dtype, torch.float64))  # a sum could overflow
    norm = _norm(rows)
    mean = rows.sum(1) / rows.shape[1]
    spread = _spread(rows, norm, mean)
    real, imag = torch.view_as_real(mean + 0j).unbind(1)
    fields = [norm, real, imag, spread, low, high, abs_max, *_count(rows, abs_max)]
    widest = functools.reduce(torch.promote_types, (field.dtype for field in fields))
    return [field.to(widest) for field in fields]


def _spread(rows: Tensor, norm: Tensor, mean: Tensor) -> Tensor:
    """The L2 norm of each row less its mean."""
    if _on_cpu(rows):
        square, level = norm.double() ** 2, mean.abs().double() ** 2 * rows.shape[1]
        if (2 * level < square).all():  # else the difference would cancel
            return (square - level).sqrt()
    return _norm(rows - mean[:, None])


def _on_cpu(rows: Tensor) -> bool:
    """Tell whether a branch on values is free; elsewhere it is a host synchronization."""
    return rows.device.type == "cpu"


def _norm(rows: Tensor) -> Tensor:
    """The L2 norm of each row, finite wherever the dtype can hold it."""
    if _on_cpu(rows):
        norm = torch.linalg.vector_norm(rows, dim=1)
        if ((norm > 1e-15) & (norm < 1e15)).all():
            return norm
    abs_max = rows.abs().amax(1)
    # To a largest modulus in [1, 2), by a power of two: exact, and no square over- or underflows.
    scale = torch.ldexp(torch.ones_like(abs_max), torch.frexp(abs_max).exponent - 1)
    scale = torch.where(abs_max.isfinite(), scale, 1)
    norm = torch.linalg.vector_norm(rows / scale[:, None], dim=1)
    if rows.device.type == "mps":
        return norm * scale
    return norm.double() * scale.double()  # may be beyond float32


def _count(rows: Tensor, abs_max: Tensor) -> list[Tensor]:
    """Count the zeros, NaNs and infinities of each row."""
    if not _on_cpu(rows):
        return [flags.sum(1).to(abs_max) for flags in (rows == 0, rows.isnan(), rows.isinf())]
    # NumPy counts booleans at the speed of memory, torch on CPU twenty times slower.
    flags = [~rows.bool()]
    if not abs_max.isfinite().all():
        flags += [rows.isnan(), rows.isinf()]
    counts = [abs_max.new_tensor([*map(np.count_nonzero, flag.numpy())]) for flag in flags]
    return counts + [torch.zeros_like(abs_max)] * (3 - len(counts))


def _merge(owner: np.ndarray, pieces: _Table, n: int) -> _Table:
    """Merge the pieces that belong to one of `n` gradients, by `owner`."""
    kept = pieces["numel"] > 0
    owner, piece = owner[kept], {field: values[kept] for field, values in pieces.items()}

    def total(values: np.ndarray) -> np.ndarray:
        return np.bincount(owner, weights=values, minlength=n)

    def extreme(ufunc: np.ufunc, values: np.ndarray, start: float) -> np.ndarray:
        out = np.full(n, start)
        ufunc.at(out, owner, values)
        return out

    merged = {"numel": total(piece["numel"]), "norm": _root_sum_squares(owner, piece["norm"], n)}
    if len(piece) == len(merged):
        return merged
    with np.errstate(invalid="ignore"):  # inf - inf, 0 / 0: NaN is the answer
        numel = merged["numel"]
        mean = {part: total(piece[part] * piece["numel"]) / numel for part in ("real", "imag")}
        # Chan, Golub & LeVeque (1983): deviations within the pieces and between their means.
        shift = np.hypot(*(piece[part] - mean[part][owner] for part in ("real", "imag")))
        within = _root_sum_squares(owner, piece["spread"], n)
        between = _root_sum_squares(owner, shift * np.sqrt(piece["numel"]), n)
        return {
            **merged,
            **mean,
            "spread": np.hypot(within, between),
            "min": np.where(numel > 0, extreme(np.minimum, piece["min"], np.inf), np.nan),
            "max": np.where(numel > 0, extreme(np.maximum, piece["max"], -np.inf), np.nan),
            "abs_max": extreme(np.maximum, piece["abs_max"], 0.0),
            **{key: total(piece[key]) for key in ("zero", "nan", "inf")},
        }


def _root_sum_squares(owner: np.ndarray, values: np.ndarray, n: int) -> np.ndarray:
    """The square root of the sum of squares by owner; no square is formed that could overflow."""
    out = np.zeros(n)
    np.hypot.at(out, owner, values)
    out[owner[np.isnan(values)]] = np.nan  # hypot(inf, nan) is inf
    return out


def _gather(grads: Sequence[Tensor], table: _Table) -> _Table:
    """Merge what every process knows of the gradients that are distributed over it."""
    meshes: dict[DeviceMesh, list[int]] = {}
    for i, grad in enumerate(grads):
        if _is_distributed(grad) and grad.device_mesh.get_coordinate() is not None:
            meshes.setdefault(grad.device_mesh, []).append(i)
    for mesh, index in meshes.items():
        own = np.stack([values[index] for values in table.values()], axis=1)
        pieces = torch.from_numpy(own).to(mesh.device_type)
        for dim in range(mesh.ndim):
            gathered = [torch.empty_like(pieces) for _ in range(mesh.size(dim))]
            torch.distributed.all_gather(gathered, pieces, group=mesh.get_group(dim))
            pieces = torch.cat(gathered)
        owner = np.tile(np.arange(len(index)), len(pieces) // len(index))
        columns = dict(zip(table, pieces.cpu().numpy().T, strict=True))
        for field, values in _merge(owner, columns, len(index)).items():
            table[field][index] = values
    return table
