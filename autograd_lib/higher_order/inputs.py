"""The points and directions of the operators, tensors or dicts of tensors, and their checks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from autograd_lib.higher_order.dispatch import Jet

Inputs = Tensor | Mapping[str, Tensor]
Scalar = Callable[..., Tensor]


def check_floating(operation: str, x: object, name: str = "x", real: bool = False) -> None:
    """Refuse what is neither a floating-point tensor nor a dict of them."""
    for t in x.values() if isinstance(x, Mapping) else [x]:
        if not isinstance(t, Tensor) or not (
            t.is_floating_point() or (t.is_complex() and not real)
        ):
            kind = "real floating-point" if real else "floating-point or complex"
            got = t.dtype if isinstance(t, Tensor) else type(t).__name__
            raise TypeError(
                f"{operation}: expected {name} to be a {kind} tensor, or a dict of them, "
                f"got {got}; convert it first, as in {name}.float()"
            )


def check_recording(operation: str) -> None:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{operation}: expected to be called outside of torch.inference_mode, which records no "
            "graph, got inside; use torch.no_grad, which does not matter here"
        )


def trainable(operation: str, model: nn.Module) -> dict[str, Tensor]:
    """The parameters of a model that require a gradient, by name and detached."""
    check_recording(operation)
    parameters = {k: p.detach() for k, p in model.named_parameters() if p.requires_grad}
    if not parameters:
        raise ValueError(f"{operation}: no parameter of the model requires a gradient")
    return parameters


def map_tensors(g: Callable[[Tensor], Any], x: Inputs) -> Any:
    return {k: g(t) for k, t in x.items()} if isinstance(x, Mapping) else g(x)


def tensors_of(x: Inputs) -> list[Tensor]:
    return list(x.values()) if isinstance(x, Mapping) else [x]


def dense(gradient: Tensor) -> Tensor:
    """The values of a gradient, which embeddings may make sparse."""
    return gradient.to_dense() if gradient.is_sparse else gradient


def structured_like(x: Inputs, values: Sequence[Any]) -> Any:
    """Return a dict of the values if `x` is a dict, and else the one value."""
    return dict(zip(x, values, strict=True)) if isinstance(x, Mapping) else values[0]


def check_scalar(operation: str, y: object) -> Tensor:
    tensor = check_tensor(operation, y)
    if tensor.ndim:
        raise ValueError(
            f"{operation}: expected f to return a scalar, got the shape {tuple(tensor.shape)}; "
            "reduce it, as in .sum()"
        )
    return tensor


def sum_dtype(t: Tensor) -> torch.dtype:
    return torch.promote_types(t.dtype, torch.float32)


def check_uncompiled(operation: str) -> None:
    """Refuse to run under torch.compile, which does not call the rules."""
    # Where tracing raises, Dynamo runs the code in Python, but with its callback still set, which
    # would compile the functions that are called.
    if torch.compiler.is_compiling() or torch._C._dynamo.eval_frame.get_eval_frame_callback():
        raise NotImplementedError(
            f"{operation}: expected to be called outside of torch.compile, which in PyTorch 2.13 "
            "would return wrong numbers; trace the function first: "
            "torch.compile(make_fx(function)(x)), with make_fx of "
            "torch.fx.experimental.proxy_tensor"
        )


def follow(
    operation: str, x: Inputs, v: Inputs, make: Callable[[Tensor, Tensor], Any] = lambda x, v: v
) -> Any:
    """Check `x` and `v`, and apply `make` to each tensor of `x` and that of `v`, in x's order."""
    if isinstance(x, Mapping) or isinstance(v, Mapping):
        if not (isinstance(x, Mapping) and isinstance(v, Mapping)) or x.keys() != v.keys():
            names = [sorted(side) if isinstance(side, Mapping) else "a tensor" for side in (x, v)]
            raise ValueError(
                f"{operation}: expected v to have exactly the names of x, got {names[1]} "
                f"for {names[0]}"
            )
        return {name: follow(f"{operation}, {name!r}", x[name], v[name], make) for name in x}
    for name, side in (("x", x), ("v", v)):
        check_floating(operation, side, name)
        if isinstance(side, Jet):
            raise NotImplementedError(
                f"{operation}: {name} is followed by another call already; calls cannot be nested: "
                "take a higher order, or torch.func.grad around jet"
            )
    if (x.shape, x.dtype, x.device) != (v.shape, v.dtype, v.device):
        raise ValueError(
            f"{operation}: expected v like x, {tuple(x.shape)} {x.dtype} on {x.device}, "
            f"got {tuple(v.shape)} {v.dtype} on {v.device}"
        )
    return make(x, v)


def check_tensor(operation: str, y: object) -> Tensor:
    if not isinstance(y, Tensor):
        raise TypeError(f"{operation}: expected f to return one tensor, got {type(y).__name__}")
    if type(y) is Jet:
        y.refresh()
    return y
