"""What an optimizer is made of."""

from __future__ import annotations

from torch.optim import Optimizer


def innermost_optimizer(operation: str, optimizer: object) -> Optimizer:
    """The optimizer that steps: `optimizer` itself, or the one inside a wrapper.

    A wrapper holds one other optimizer, of the same parameters if it has any of its own. It may
    never call `Optimizer.__init__`, as Accelerate's and Opacus's, or never step itself, as those of
    sharpness-aware minimization: the hooks of the optimizer inside run all the same.

    Raises:
        TypeError: It neither is a `torch.optim.Optimizer` that was initialized nor holds one.

    Example:
        >>> import torch
        >>> class Lookahead(torch.optim.Optimizer):
        ...     def __init__(self, inner):
        ...         self.inner, self.param_groups = inner, inner.param_groups
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
        >>> innermost_optimizer("here", Lookahead(sgd)) is sgd
        True
    """
    seen = [optimizer]
    while inside := _inside(seen[-1]):
        if any(inside is other for other in seen):
            break
        seen.append(inside)
    found = seen[-1]
    if isinstance(found, Optimizer) and _is_initialized(found):
        return found
    wrapper = type(optimizer).__name__
    raise TypeError(
        f"{operation}: expected optimizer to be a torch.optim.Optimizer, got {wrapper}"
        + (", which never called Optimizer.__init__" if isinstance(optimizer, Optimizer) else "")
        + "; of a wrapper pass the optimizer inside"
    )


def _inside(optimizer: object) -> Optimizer | None:
    """The one optimizer that is an attribute, if it has the parameters of its owner."""
    attributes = getattr(optimizer, "__dict__", {}).values()
    found = {id(a): a for a in attributes if isinstance(a, Optimizer) and a is not optimizer}
    if len(found) != 1:
        return None
    (inside,) = found.values()
    # ZeroRedundancyOptimizer, for one, holds an optimizer of a part of its parameters.
    is_part = _is_initialized(optimizer) and _held(optimizer) != _held(inside)
    return None if is_part else inside


def _is_initialized(optimizer: object) -> bool:
    return "_optimizer_step_pre_hooks" in getattr(optimizer, "__dict__", {})


def _held(optimizer: object) -> set[int]:
    groups = getattr(optimizer, "param_groups", [])
    return {id(parameter) for group in groups for parameter in group["params"]}
