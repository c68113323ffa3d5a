"""Functions that are linear and act on each coefficient alone."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.higher_order.dispatch import Jet
from autograd_lib.higher_order.lookup import VIEWS
from autograd_lib.higher_order.rules.registration import (
    family,
    getter,
    linear,
    linear_elementwise,
    linear_together,
    named,
)
from autograd_lib.higher_order.taylor import jet_rule

_ELEMENTWISE = """
    clone conj real imag neg negative positive resolve_conj resolve_neg conj_physical __neg__
    __pos__ view_as_real view_as_complex contiguous adjoint tril triu to float double half bfloat16
    cpu cuda type_as
"""
_VIEWS = """
    transpose swapdims swapaxes t permute movedim unflatten unsqueeze squeeze expand broadcast_to
    unfold diagonal select narrow unbind chunk hsplit vsplit dsplit tensor_split __getitem__
"""
_BY_COEFFICIENT = """
    flip fliplr flipud rot90 roll reshape flatten ravel repeat tile repeat_interleave diag
    diag_embed trace masked_select index_select take_along_dim gather diff cumsum sum mean nansum
"""
_LAYERS = """
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    interpolate unfold fold
"""
_FOURIER = """
    fft ifft rfft irfft fft2 ifft2 rfft2 irfft2 fftn ifftn fftshift
"""
_WRITES = """
    index_add index_copy index_put scatter_add slice_scatter diagonal_scatter
    masked_scatter
"""
_ATEN = """
    slice _unsafe_view _reshape_alias as_strided unsafe_chunk unsafe_split split_with_sizes
    unsafe_split_with_sizes split alias lift_fresh constant_pad_nd _fft_r2c _fft_c2r _fft_c2c
"""

_OTHER_VIEWS = """
    view view_as expand_as split adjoint view_as_real view_as_complex real imag
    slice alias as_strided split_with_sizes lift_fresh
"""
_PERHAPS_VIEWS = (
    "reshape reshape_as flatten ravel contiguous conj resolve_conj resolve_neg positive"
)

linear_elementwise(*named(_ELEMENTWISE, torch, Tensor), F.pixel_shuffle, F.pixel_unshuffle)
linear_elementwise(*[getter(name) for name in ("mT", "mH", "real", "imag")])
linear(*named(_VIEWS + _BY_COEFFICIENT, torch, Tensor), *named(_LAYERS, F))
linear(*named(_FOURIER, torch.fft), *named(_ATEN, torch.ops.aten))
linear(Tensor.split, getter("T"), getter("H"))
linear_together(*named(_WRITES, torch))
VIEWS.update(dict.fromkeys((_VIEWS + _OTHER_VIEWS).split(), True))
VIEWS.update(dict.fromkeys(_PERHAPS_VIEWS.split(), False))
VIEWS.update({getter(name): True for name in ("T", "H", "mT", "mH", "real", "imag")})


@family
def _dropout(function: Any) -> None:
    @jet_rule(function)
    def rule(input: Jet, p: float, training: bool) -> Tensor:
        return input * function(torch.ones_like(input), p, training) if training else input


_dropout(torch.dropout, torch.feature_dropout)
