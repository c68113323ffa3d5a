"""Reading the gradients of a model: whether they exist, how large they are, how they are spread."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from autograd_lib.core.names import parameters_by_name
from autograd_lib.core.reduction import read_fields, read_norms
from autograd_lib.core.rows import root_sum_squares
from autograd_lib.core.statistics import STATISTICS, derive, derive_counts, describe
from autograd_lib.report.tables import Row, Table

__all__ = [
    "AutogradUtils",
    "GradientStatistics",
    "check_gradients_exist",
    "compute_gradient_statistics",
    "enable_gradients",
    "get_gradient_norms",
    "missing_gradients",
]


class GradientStatistics(Table, dict[str, Any]):
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

    The summary of a `GradientMonitor` has `["step"]` and `["issues"]` too, and of the last two
    items only `numel`, unless it was asked to collect the others.
    """

    def _table(self) -> tuple[str, Row, list[Row]]:
        """Title, header and rows; a column for each statistic that some parameter has."""
        parameters = self["parameters"]
        step = f" at step {self['step']}" if self.get("step") else ""
        issues = [f"issue: {issue}" for issue in self.get("issues", [])]
        if not parameters:
            note = f"; {self['note']}" if "note" in self else ""
            return "\n".join([f"no gradients yet{note}", *issues]), [], []
        shown = [key for key in STATISTICS if any(key in entry for entry in parameters.values())]
        rows: list[Row] = [
            [
                name,
                *(STATISTICS[key].write(entry[key]) if key in entry else "" for key in shown),
                f"{entry['numel']:,}",
            ]
            for name, entry in parameters.items()
        ]
        header = ["parameter", *(STATISTICS[key].header for key in shown), "numel"]
        title = f"gradients of {len(rows)} parameters{step}, total norm {self['total_norm']:.4g}"
        return "\n".join([title, *issues]), header, rows


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
    check_module("enable_gradients", model)
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
    check_module("missing_gradients", model)
    named = parameters_by_name(model).items()
    return [name for name, p in named if p.requires_grad and p.grad is None]


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
    check_module("check_gradients_exist", model)
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
    return dict(zip(names, read_norms(grads).tolist(), strict=True))


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
    norms, fields = read_fields(grads)
    present = np.ones((1, len(grads)), dtype=bool)
    statistics = {**derive(fields[None], present), "norm": norms[None]}
    statistics |= derive_counts(fields[7:, None], fields[0])
    rows = zip(*(values[0].tolist() for values in statistics.values()), strict=True)
    numels = fields[0].astype(int).tolist()
    parameters = {
        name: describe(dict(zip(statistics, row, strict=True)), numel, grad.is_complex())
        for name, grad, numel, row in zip(names, grads, numels, rows, strict=True)
    }
    total = root_sum_squares(torch.from_numpy(norms)).item()
    return GradientStatistics(total_norm=total, parameters=parameters)


class AutogradUtils:
    """The functions of this module under one name; each method is the function of that name."""

    enable_gradients = staticmethod(enable_gradients)
    get_gradient_norms = staticmethod(get_gradient_norms)
    compute_gradient_statistics = staticmethod(compute_gradient_statistics)
    check_gradients_exist = staticmethod(check_gradients_exist)


def check_module(operation: str, model: object) -> None:
    """Raise an error that names `operation` unless `model` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"{operation}: expected a torch.nn.Module, got {type(model).__name__}; "
            "pass the model itself, not its parameters or its class"
        )


def check_not_meta(operation: str, names: Sequence[str], grads: Sequence[Tensor | None]) -> None:
    """Raise an error that names the first gradient on the meta device."""
    for name, grad in zip(names, grads, strict=True):
        if grad is not None and grad.is_meta:
            raise ValueError(
                f"{operation}: the gradient of {name!r} with shape {tuple(grad.shape)} is on the "
                "meta device, which holds no values; call model.to_empty(device=...) and load the "
                "weights before training"
            )


def _gradients(operation: str, model: nn.Module) -> tuple[list[str], list[Tensor]]:
    """Names and gradients of the parameters that have one."""
    check_module(operation, model)
    found = parameters_by_name(model).items()
    named = {name: p.grad for name, p in found if p.grad is not None}
    check_not_meta(operation, [*named], [*named.values()])
    return [*named], [*named.values()]
