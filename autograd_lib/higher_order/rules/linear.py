"""Functions that are linear and act on each coefficient alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet
from autograd_lib.higher_order.rules.registration import (
    family,
    getter,
    linear,
    linear_along,
    linear_elementwise,
    named,
)
from autograd_lib.higher_order.taylor import jet_rule

_BY_COEFFICIENT = """
    diag diagonal diag_embed diff trace repeat_interleave roll rot90 fliplr flipud repeat
    movedim masked_select ravel hsplit vsplit dsplit tensor_split index_select
    take_along_dim unflatten unfold
"""
_POOLING = """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    interpolate unfold fold
"""
_FOURIER = "fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn fftshift"
_ELEMENTWISE = """
    clone conj real imag neg negative positive tril triu resolve_conj resolve_neg conj_physical
    to float double half bfloat16 cpu cuda contiguous type_as __neg__ __pos__ adjoint view_as_real
    view_as_complex
"""

linear(*named(_BY_COEFFICIENT, torch, Tensor), *named(_POOLING, F), *named(_FOURIER, torch.fft))
linear_elementwise(*named(_ELEMENTWISE, torch, Tensor), F.pixel_shuffle, F.pixel_unshuffle)
linear_elementwise(*[getter(name) for name in ("mT", "mH", "real", "imag")])
linear_along(torch.transpose, torch.swapdims, dim0=0, dim1=1)
linear_along(torch.swapaxes, axis0=0, axis1=1)
linear_along(torch.cumsum, torch.select, torch.narrow, torch.unbind, dim=0)


@family
def _dropout(function: Any) -> None:
    @jet_rule(function)
    def rule(input: Jet, p: float = 0.5, training: bool = True) -> Tensor:
        return input * function(torch.ones_like(input), p, training) if training else input


_dropout(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
