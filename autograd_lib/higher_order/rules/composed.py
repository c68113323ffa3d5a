"""Functions that PyTorch composes of others: by its own source, or its own decomposition."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._decomp import decomposition_table

from autograd_lib.higher_order.dispatch import Jet, primal
from autograd_lib.higher_order.rules.registration import decomposed, family, in_python, named
from autograd_lib.higher_order.taylor import jet_rule

in_python(*named("__rdiv__ __rtruediv__ __rpow__ __rmatmul__ norm", Tensor))
jet_rule(torch.addbmm)(
    lambda x, a, b, *, beta=1, alpha=1: beta * x + alpha * torch.bmm(a, b).sum(0)
)
jet_rule(torch.vander)(
    lambda x, N=None, increasing=False: torch.stack(
        [x**n for n in range(len(x) if N is None else N)][:: 1 if increasing else -1], -1
    )
)
jet_rule(torch.dist)(lambda x, other, p=2: torch.linalg.vector_norm(x - other, p))
_DECOMPOSED = """
    mse_loss smooth_l1_loss huber_loss binary_cross_entropy binary_cross_entropy_with_logits
    soft_margin_loss multi_margin_loss affine_grid_generator
    grid_sampler_2d hardshrink softshrink threshold renorm nan_to_num frac addr channel_shuffle
    std_mean block_diag linalg_cross vdot deg2rad rad2deg copysign aminmax special_xlog1py
    mvlgamma
"""
decomposed(*_DECOMPOSED.split())


@family
def _recurrent(name: str) -> None:
    packet = getattr(torch.ops.aten, name)
    whole, packed = (decomposition_table[each] for each in (packet.input, packet.data))

    @jet_rule(getattr(torch, name))
    def rule(*args: Any) -> Any:  # packed sequences come with the sizes of their batches
        fused = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)  # its layer of cells has no rule
        try:
            return (packed if isinstance(args[3], list) else whole)(*args)
        finally:
            torch._C._set_mkldnn_enabled(fused)


_recurrent("lstm", "gru", "rnn_tanh", "rnn_relu")


@jet_rule(torch.complex)
def _complex(real: Tensor, imag: Tensor) -> Tensor:
    return torch.view_as_complex(torch.stack(torch.broadcast_tensors(real, imag), -1))


jet_rule(torch.polar)(lambda r, angle: torch.complex(r * angle.cos(), r * angle.sin()))


@jet_rule(torch.atan2, torch.arctan2)
def _atan2(y: Tensor, x: Tensor) -> Tensor:
    a, b = primal(x), primal(y)  # turned to the axis, where the arc tangent has no branch
    return torch.atan2(b, a) + torch.atan((y * a - x * b) / (x * a + y * b))


@jet_rule(torch.angle)
def _angle(x: Tensor) -> Tensor:
    return torch.atan2(x.imag, x.real) if x.is_complex() else torch.angle(primal(x))


@jet_rule(torch.hypot)
def _hypot(x: Tensor, y: Tensor) -> Tensor:
    scale = torch.hypot(primal(x), primal(y))
    scale = torch.where(scale == 0, 1.0, scale).detach()
    return scale * ((x / scale).square() + (y / scale).square()).sqrt()


@jet_rule(torch.sinc, torch.special.sinc)
def _sinc(x: Tensor) -> Tensor:
    x = x * math.pi
    near = primal(x).abs() < 1
    square: Tensor = torch.where(near, x, 0.0).square()
    series: Any = 1.0
    for n in range(13, 0, -1):
        series = 1 - square * series / (2 * n * (2 * n + 1))
    return torch.where(near, series, torch.sin(x) / torch.where(near, 1.0, x))


@jet_rule(*named("cdist", torch._VF))
def _cdist(x: Tensor, y: Tensor, p: float = 2.0, mode: Any = None) -> Tensor:
    return _length(x.unsqueeze(-2) - y.unsqueeze(-3), p)


@jet_rule(F.pdist)
def _pdist(x: Tensor, p: float = 2.0) -> Tensor:
    i, j = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return _length(x[i] - x[j], p)


def _length(x: Tensor, p: float) -> Tensor:
    """The norm over the last dimension; PyTorch gives a zero distance a derivative of zero."""
    zero = (primal(x) == 0).all(-1, keepdim=True)
    norm = torch.linalg.vector_norm(torch.where(zero, 1.0, x), p, -1)
    return torch.where(zero.squeeze(-1), 0.0, norm)


@jet_rule(torch.sparse.mm)
def _sparse_mm(a: Tensor, x: Tensor, reduce: str = "sum") -> Tensor:
    if reduce != "sum" or not isinstance(x, Jet):
        raise NotImplementedError("jet: torch.sparse.mm has a rule for a constant sparse matrix")
    return x.map(lambda c: torch.stack([torch.sparse.mm(a, column) for column in c]))


@jet_rule(torch._grouped_mm)
def _grouped_mm(
    a: Tensor, b: Tensor, offs: Tensor, bias: Any = None, out_dtype: Any = None
) -> Tensor:
    if a.ndim != 2 or b.ndim != 3 or bias is not None:
        raise NotImplementedError("jet: torch._grouped_mm has a rule for rows and experts only")
    ends = offs.tolist()
    rows = a[: ends[-1]].tensor_split(ends[:-1])
    product = torch.cat([row @ expert for row, expert in zip(rows, b.unbind(), strict=True)])
    return F.pad(product, (0, 0, 0, len(a) - len(product))).to(out_dtype or a.dtype)
