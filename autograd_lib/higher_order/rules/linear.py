"""Functions that are linear and act on each coefficient alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet
from autograd_lib.higher_order.rules.registration import along, getter, linear, named, numberwise
from autograd_lib.higher_order.taylor import jet_rule

for _function in named(
    """
    diag diagonal diag_embed diff trace repeat_interleave roll rot90 fliplr flipud repeat
    movedim masked_select ravel hsplit vsplit dsplit tensor_split index_select
    take_along_dim unflatten unfold
    """,
    torch,
    Tensor,
):
    linear(_function)
for _function in named(
    """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    interpolate unfold fold
    """,
    F,
):
    linear(_function)
for _function in named(
    "fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn fftshift", torch.fft
):
    linear(_function)
for _function in named(
    """
    clone conj real imag neg negative positive tril triu resolve_conj resolve_neg conj_physical
    to float double half bfloat16 cpu cuda contiguous type_as __neg__ __pos__ adjoint view_as_real
    view_as_complex
    """,
    torch,
    Tensor,
):
    numberwise(_function)
for _name in ("mT", "mH", "real", "imag"):
    numberwise(getter(_name))
for _function in (F.pixel_shuffle, F.pixel_unshuffle):
    numberwise(_function)
for _function in (torch.transpose, torch.swapaxes, torch.swapdims):
    along(_function, "dim0", "dim1")
for _function in (torch.cumsum, torch.select, torch.narrow):
    along(_function, "dim")


def _dropout(function: Any) -> None:
    @jet_rule(function)
    def rule(input: Jet, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
        return input * function(torch.ones_like(input), p, training) if training else input


for _function in (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d):
    _dropout(_function)
