"""What the tensors of a step hold: whether a NaN or an Inf, and between which bounds."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from torch.utils._pytree import keystr, tree_flatten_with_path


class Operand(NamedTuple):
    """One tensor that an operation was given.

    Attributes:
        name: its name in the schema of the operation, such as "self".
        shape: its shape.
        dtype: its dtype.
        min: its least element, of a complex tensor the least modulus; NaN if there is a NaN in
            it, or no element at all.
        max: the greatest.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    min: float
    max: float

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Operand:
        """Describe a tensor as it is now; its bounds are read from the device."""
        if tensor.is_complex():
            parts = [part.norm(dim=-1) for part in real_values(tensor)]
        else:
            parts = real_values(tensor) if tensor.is_floating_point() else [tensor]
        low = high = math.nan
        with contextlib.suppress(RuntimeError):  # no elements, or a layout without bounds
            bounds = [(p.float() if p.itemsize == 1 else p).aminmax() for p in parts]
            low = float(torch.stack([low for low, _ in bounds]).amin())
            high = float(torch.stack([high for _, high in bounds]).amax())
        return cls(name, tuple(tensor.shape), tensor.dtype, low, high)


def real_values(tensor: Tensor) -> list[Tensor]:
    """The dense real tensors in which the floating-point values of `tensor` lie."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    if type(tensor) is not Tensor and is_traceable_wrapper_subclass(tensor):
        parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
        return [v for part in parts if isinstance(part, Tensor) for v in real_values(part)]
    if not (tensor.is_floating_point() or tensor.is_complex()) or tensor.is_meta:
        return []
    if nn.parameter.is_lazy(tensor):
        return []
    # Zeros that autograd does not write out have no memory, nor has what FSDP has freed: to read
    # it would be a segmentation fault.
    strided = tensor.layout is torch.strided
    if tensor._is_zerotensor() or (strided and not tensor.untyped_storage().nbytes()):
        return []
    values = tensor.detach()
    if values.is_mkldnn:
        values = values.to_dense()
    elif values.layout is torch.sparse_coo:
        values = values._values()
    elif values.is_nested or values.layout is not torch.strided:
        values = values.values()
    return [torch.view_as_real(values.resolve_conj()) if values.is_complex() else values]


def kinds(tensor: Tensor) -> list[str]:
    """What `tensor` holds of "nan" and "inf"."""
    suspects = []
    for part in real_values(tensor):
        values = part.float() if part.itemsize == 1 else part  # float8 has no reductions
        # A finite sum settles it at a tenth of the price of isfinite().all().
        wide = torch.promote_types(values.dtype, torch.float32)
        if not math.isfinite(values.sum(dtype=wide).item()):
            suspects.append(values)
    tests = {"nan": torch.isnan, "inf": torch.isinf}
    return [kind for kind, test in tests.items() if any(test(values).any() for values in suspects)]


def named_tensors(
    func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[tuple[str, Tensor, bool]]:
    """Every tensor among the arguments: its name, empty if only written, and whether written."""
    if isinstance(func, torch._ops.HigherOrderOperator):  # flex_attention: it has no schema
        for path, leaf in tree_flatten_with_path((args, dict(kwargs)))[0]:
            if isinstance(leaf, Tensor):
                yield f"args{keystr(path[1:])}", leaf, False
        return
    for i, argument in enumerate(func._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        written = argument.alias_info is not None and argument.alias_info.is_write
        name = "" if written and argument.kwarg_only else argument.name
        for path, leaf in tree_flatten_with_path(value)[0]:
            if isinstance(leaf, Tensor):
                yield name and name + keystr(path), leaf, written
