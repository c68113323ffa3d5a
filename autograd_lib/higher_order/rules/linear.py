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
    linear_elementwise,
    named,
)
from autograd_lib.higher_order.taylor import jet_rule

_ELEMENTWISE = """
    clone conj real imag neg negative positive resolve_conj resolve_neg conj_physical __neg__
    __pos__ view_as_real view_as_complex to float double half bfloat16 cpu cuda contiguous type_as
    adjoint tril triu
"""
_BY_COEFFICIENT = """
    transpose swapdims swapaxes t permute movedim flip fliplr flipud rot90 roll
    reshape flatten unflatten ravel unsqueeze squeeze expand broadcast_to repeat tile
    repeat_interleave unfold diag diagonal diag_embed trace
    select narrow unbind chunk hsplit vsplit dsplit tensor_split __getitem__ masked_select
    index_select take_along_dim gather diff cumsum sum mean
"""
_LAYERS = """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    interpolate unfold fold
"""
_FOURIER = "fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn fftshift"

linear_elementwise(*named(_ELEMENTWISE, torch, Tensor), F.pixel_shuffle, F.pixel_unshuffle)
linear_elementwise(*[getter(name) for name in ("mT", "mH", "real", "imag")])
linear(*named(_BY_COEFFICIENT, torch, Tensor), *named(_LAYERS, F), *named(_FOURIER, torch.fft))
linear(Tensor.split, getter("T"), getter("H"))


@family
def _dropout(function: Any) -> None:
    @jet_rule(function)
    def rule(input: Jet, p: float, training: bool) -> Tensor:
        return input * function(torch.ones_like(input), p, training) if training else input


_dropout(torch.dropout, torch.feature_dropout)
