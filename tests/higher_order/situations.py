"""Situations for `jet`: other libraries' tests, layers, attention, tensor operations and losses.

Every one is a function of one float64 tensor, and a point.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from oracles import Points
from torch import Tensor, nn

POINTS = Points(1)
real, positive, apart = POINTS.real, POINTS.positive, POINTS.apart
Function = Callable[..., Tensor]


def definite(n: int) -> Tensor:
    """A symmetric matrix with eigenvalues apart."""
    return torch.diag(2 + 2 * torch.arange(n).double()) + 0.3 * real(n, n)


class Situation(NamedTuple):
    source: str
    function: Function
    point: Tensor


SITUATIONS: dict[str, Situation] = {}


def of(source: str, point: Tensor, **functions: Function) -> None:
    """Several functions at one point."""
    for name, function in functions.items():
        key = f"{source} {name.rstrip('_')}"
        assert key not in SITUATIONS, key
        SITUATIONS[key] = Situation(source, function, point)


def pair(function: Function) -> Function:
    return lambda x: function(*x.unbind())


# ------------------------------------------------------------------ jax's jet_test


class _Scale(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 2.0


_SCALE = _Scale()


def _square(x: Tensor) -> Tensor:
    return x * x


def _scripted() -> Any:
    return torch.jit.script(_square)


of(
    "jax",
    real(2, 3),
    exp=torch.exp,
    neg=torch.neg,
    expm1=torch.expm1,
    sin=torch.sin,
    cos=torch.cos,
    sinh=torch.sinh,
    cosh=torch.cosh,
    tanh=torch.tanh,
    logistic=torch.sigmoid,
    expit2=torch.special.expit,
    asinh=torch.asinh,
    erf=torch.erf,
    erfc=torch.erfc,
    stopgrad=lambda x: x + (x.detach() - x.detach()),
    fft=lambda x: torch.view_as_real(torch.fft.fft(x)),
    gather=lambda x: x[1:],
    cumsum=lambda x: torch.cumsum(x.flatten(), 0),
    cumprod=lambda x: torch.cumprod(x.flatten(), 0),
    dynamic_slice=lambda x: torch.narrow(torch.narrow(x, 0, 1, 1), 1, 2, 1),
    dynamic_update_slice=lambda x: torch.slice_scatter(
        x, torch.arange(3.0).double()[None], 0, 1, 2
    ),
    int_pow=lambda x: torch.stack([x**p for p in range(6)]),
    process_call=lambda x: _scripted()(x + 0),
    post_process_call=lambda x: torch.func.functional_call(_SCALE, {}, (x,)),
    inst_zero=lambda x: torch.full_like(x, 2.0) + 0 * x,
    add_any=lambda x: x * 0.5 + 0.5 + x,
    scatter_add=lambda x: torch.zeros(4, dtype=x.dtype).scatter_add(
        0, torch.tensor([0, 2, 2, 1, 0, 3]), x.flatten()
    ),
    conv=lambda x: F.conv2d(x.reshape(1, 1, 2, 3), 1 + x.reshape(1, 1, 2, 3)[..., :2]),
    real=lambda x: torch.complex(x, x.exp()).square().real,
    imag=lambda x: torch.complex(x, x.exp()).square().imag,
    conj=lambda x: torch.view_as_real(torch.complex(x, x.exp()).conj().resolve_conj()),
    select=lambda x: torch.where(torch.tensor([True, False, True]), x, x.sin()),
)
of(
    "jax",
    apart(2, 3),
    floor=lambda x: torch.floor(x) * x,
    ceil=lambda x: torch.ceil(x) * x,
    round=lambda x: torch.round(x) * x,
    sign=lambda x: torch.sign(x) * x,
    is_finite=lambda x: torch.isfinite(x) * x,
    le=lambda x: (x <= 1) * x,
    gt=lambda x: (x > 0) * x,
    lt=lambda x: (x < 1) * x,
    and_=lambda x: ((x > 0) & (x < 1)) * x,
    or_=lambda x: torch.logical_or(x > 0, x < -1) * x,
    xor=lambda x: ((x > 0) ^ (x < 1)) * x,
    not_=lambda x: ~(x > 0) * x,
    shift_left=lambda x: (x.long() << 1) * x,
    shift_right=lambda x: (x.long() >> 1) * x,
    eq=lambda x: (x == x.max()) * x,
    ne=lambda x: (x != x.max()) * x,
    ge=lambda x: (x >= 0) * x,
    reduce_max=lambda x: x.amax(1),
    reduce_min=lambda x: x.amin(1),
    all_max=torch.max,
    all_min=torch.min,
    abs=torch.abs,
    cummax=lambda x: torch.cummax(x, 0).values,
    cummin=lambda x: torch.cummin(x, 0).values,
    clamp=lambda x: torch.clamp(x, -1, 1),
)
of(
    "jax",
    positive(2, 3),
    log=torch.log,
    log1p=torch.log1p,
    sqrt=torch.sqrt,
    rsqrt=torch.rsqrt,
    acosh=lambda x: torch.acosh(1 + x),
    atanh=lambda x: torch.atanh(x / 2),
    erf_inv=lambda x: torch.erfinv(x / 2),
    lgamma=torch.lgamma,
    digamma=torch.digamma,
)
of(
    "jax",
    positive(2, 2, 3),
    div=pair(torch.div),
    rem=lambda x: torch.fmod(x[0] + 2, 3 * x[1] + 3),
    complex=lambda x: torch.view_as_real(torch.complex(x[0], x[1])),
    sub=pair(torch.sub),
    add=pair(torch.add),
    mul=pair(torch.mul),
    max=lambda x: torch.maximum(x[0], x[1] + 2),
    min=lambda x: torch.minimum(x[0], x[1] + 2),
    pow=pair(torch.pow),
    atan2=lambda x: torch.atan2(x[0] - 3, x[1]),
    dot=lambda x: x[0] @ x[1].T,
)


# ------------------------------------------------------------------ torch-jet's tests

_LEFT, _RIGHT, _BIAS = real(3, 4), real(4, 5), real(3, 5)
of(
    "torch-jet",
    real(4),
    sin_1d=torch.sin,
    cos_1d=torch.cos,
    tanh_1d=torch.tanh,
    sigmoid_1d=torch.sigmoid,
    pow_int_5=lambda x: x**5,
    pow_int_10=lambda x: x**10,
    add_JJ=lambda x: x + x.sin(),
    add_JJ_aliased=lambda x: x + x,
    add_JC=lambda x: x + 2.0,
    add_CJ=lambda x: 2.0 + x,
    sub_JJ=lambda x: x - x.sin(),
    sub_JC=lambda x: x - 2.0,
    sub_CJ=lambda x: torch.tensor(2.0).double() - x,
    rsub=lambda x: 2.0 - x,
    mul_JJ=lambda x: x * x.sin(),
    mul_JJ_aliased=lambda x: x * x,
    mul_JC=lambda x: x * 3.0,
    mul_CJ=lambda x: 3.0 * x,
    mm_CJ=lambda x: _LEFT @ x[:, None],
    addmm_mat2_jet=lambda x: torch.addmm(_BIAS, _LEFT, x[:, None] * _RIGHT),
    unsqueeze=lambda x: x.unsqueeze(0),
    scalar_Rn_to_R=lambda x: (torch.sin(x) * x).sum(0),
    sin_residual=lambda x: torch.sin(x) + x,
    constant_output=lambda x: torch.zeros(4).double() + 0 * x,
    deep_pytree=lambda x: torch.cat([x.sin() * x + x, (x.sin() * x).cos() * x, (x + x).tanh()]),
    multi_input=lambda x: torch.sin(x[:2]) * torch.cos(x[2:]),
)
of(
    "torch-jet",
    real(3, 4),
    sin_2d=torch.sin,
    cos_2d=torch.cos,
    tanh_2d=torch.tanh,
    sigmoid_2d=torch.sigmoid,
    mm_JJ=lambda x: x @ x.T,
    mm_JC=lambda x: x @ _RIGHT,
    addmm_mat1_mat2_jet=lambda x: torch.addmm(_BIAS[:, :3], x, x.T),
    addmm_mat1_jet=lambda x: torch.addmm(_BIAS, x, _RIGHT),
    sum_dim_0=lambda x: x.sum(0),
    view=lambda x: x.view(-1),
    squeeze=lambda x: x[None].squeeze(0),
    mlp_batched=nn.Sequential(
        nn.Linear(4, 3, bias=False), nn.Tanh(), nn.Linear(3, 1), nn.Tanh()
    ).double(),
)
of("torch-jet", positive(4), pow_float=lambda x: x**2.5)

# ------------------------------------------------------------------ layers

torch.manual_seed(0)


def layers(point: Tensor, **modules: nn.Module) -> None:
    for name, module in modules.items():
        module.double().eval()
        of("layers", point, **{name: lambda x, m=module: _tensor(m(x))})


def _tensor(result: Any) -> Tensor:
    return result if isinstance(result, Tensor) else _tensor(result[0])


class _Unpooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)


class Residual(nn.Module):
    """As in a ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), nn.BatchNorm2d(2)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.act(self.norm(self.conv(x)))
        y += x
        return self.act(y)


layers(
    real(2, 3, 4),
    Linear=nn.Linear(4, 3),
    Identity=nn.Identity(),
    Flatten=nn.Flatten(),
    Unflatten=nn.Unflatten(2, (2, 2)),
    LayerNorm=nn.LayerNorm(4),
    RMSNorm=nn.RMSNorm(4),
    GroupNorm=nn.GroupNorm(3, 3),
    InstanceNorm1d=nn.InstanceNorm1d(3),
    BatchNorm1d=nn.BatchNorm1d(3),
    Softmax=nn.Softmax(-1),
    LogSoftmax=nn.LogSoftmax(-1),
    Softmin=nn.Softmin(-1),
    Dropout=nn.Dropout(),
    AlphaDropout=nn.AlphaDropout(),
    Conv1d=nn.Conv1d(3, 2, 2),
    ConvTranspose1d=nn.ConvTranspose1d(3, 2, 2),
    CircularConv1d=nn.Conv1d(3, 2, 3, padding=1, padding_mode="circular"),
    AvgPool1d=nn.AvgPool1d(2),
    AdaptiveAvgPool1d=nn.AdaptiveAvgPool1d(2),
    ConstantPad1d=nn.ConstantPad1d(1, 0.5),
    ReflectionPad1d=nn.ReflectionPad1d(1),
    ReplicationPad1d=nn.ReplicationPad1d(1),
    GELU=nn.GELU(),
    SiLU=nn.SiLU(),
    Mish=nn.Mish(),
    Tanh=nn.Tanh(),
    Sigmoid=nn.Sigmoid(),
    Softplus=nn.Softplus(),
    LogSigmoid=nn.LogSigmoid(),
    Tanhshrink=nn.Tanhshrink(),
    GLU=nn.GLU(),
    LSTM=nn.LSTM(4, 3, batch_first=True),
    LSTM_two_layers=nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True),
    LSTM_projected=nn.LSTM(4, 3, proj_size=2),
    GRU=nn.GRU(4, 3, batch_first=True),
    RNN=nn.RNN(4, 3, batch_first=True),
    TransformerEncoderLayer=nn.TransformerEncoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True),
    TransformerEncoder=nn.TransformerEncoder(
        nn.TransformerEncoderLayer(4, 2, 8, 0.0, "gelu", batch_first=True), 2
    ),
    weight_norm=nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)),
    spectral_norm=nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)),
    orthogonal=nn.utils.parametrizations.orthogonal(nn.Linear(4, 3)),
    inplace_sequence=nn.Sequential(nn.Linear(4, 3), nn.Mish(inplace=True), nn.SiLU(inplace=True)),
    Upsample1d=nn.Upsample(scale_factor=2, mode="linear"),
)
layers(
    real(2, 4),
    LSTMCell=nn.LSTMCell(4, 3),
    GRUCell=nn.GRUCell(4, 3),
    RNNCell=nn.RNNCell(4, 3),
    Sequential=nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)),
    LayerNorm_no_affine=nn.LayerNorm(4, elementwise_affine=False),
)
layers(
    real(1, 2, 4, 4),
    Conv2d=nn.Conv2d(2, 2, 3, padding=1),
    ConvTranspose2d=nn.ConvTranspose2d(2, 2, 2, stride=2),
    BatchNorm2d=nn.BatchNorm2d(2),
    InstanceNorm2d=nn.InstanceNorm2d(2),
    LocalResponseNorm=nn.LocalResponseNorm(2),
    AvgPool2d=nn.AvgPool2d(2),
    AdaptiveAvgPool2d=nn.AdaptiveAvgPool2d(2),
    Upsample=nn.Upsample(scale_factor=2, mode="bilinear"),
    Upsample_bicubic=nn.Upsample(scale_factor=2, mode="bicubic"),
    UpsampleNearest=nn.UpsamplingNearest2d(scale_factor=2),
    PixelShuffle=nn.Sequential(nn.Conv2d(2, 4, 1), nn.PixelShuffle(2)),
    PixelUnshuffle=nn.PixelUnshuffle(2),
    ChannelShuffle=nn.ChannelShuffle(2),
    Unfold=nn.Unfold(2),
    Fold=nn.Sequential(nn.Unfold(2), nn.Fold((4, 4), 2)),
    ZeroPad2d=nn.ZeroPad2d(1),
    ReflectionPad2d=nn.ReflectionPad2d(1),
    Dropout2d=nn.Dropout2d(),
    Residual=Residual(),
    Bottleneck=nn.Sequential(Residual(), nn.Conv2d(2, 1, 1), nn.GELU(), nn.Flatten()),
    LPPool2d=nn.LPPool2d(2, 2),
)
layers(
    apart(1, 2, 4, 4),
    MaxPool2d=nn.MaxPool2d(2),
    AdaptiveMaxPool2d=nn.AdaptiveMaxPool2d(2),
    FractionalMaxPool2d=nn.FractionalMaxPool2d(
        2, output_size=2, _random_samples=real(1, 2, 2).abs()
    ),
    MaxUnpool2d=_Unpooled(),
)
layers(
    apart(2, 4),
    ReLU=nn.ReLU(),
    ReLU_inplace=nn.Sequential(nn.Identity(), nn.ReLU(inplace=True)),
    ReLU6=nn.ReLU6(),
    LeakyReLU=nn.LeakyReLU(0.1, inplace=True),
    RReLU=nn.RReLU(),
    PReLU=nn.PReLU(),
    ELU=nn.ELU(),
    CELU=nn.CELU(0.5, inplace=True),
    SELU=nn.SELU(),
    Hardtanh=nn.Hardtanh(inplace=True),
    Hardswish=nn.Hardswish(),
    Hardsigmoid=nn.Hardsigmoid(),
    Hardshrink=nn.Hardshrink(),
    Softshrink=nn.Softshrink(),
    Softsign=nn.Softsign(),
    Threshold=nn.Threshold(0.1, -1.0, inplace=True),
)
layers(positive(2, 3, 4), RNN_relu=nn.RNN(4, 3, nonlinearity="relu"))
layers(
    real(1, 1, 2, 3, 3),
    Conv3d=nn.Conv3d(1, 2, 2),
    AvgPool3d=nn.AvgPool3d(2),
    ConvTranspose3d=nn.ConvTranspose3d(1, 2, 2),
)
of(
    "layers",
    real(5, 3),
    Embedding=lambda w: F.embedding(torch.tensor([[0, 2], [2, 4]]), w),
    EmbeddingBag_mean=lambda w: F.embedding_bag(torch.tensor([[0, 2], [2, 4]]), w),
    EmbeddingBag_sum=lambda w: F.embedding_bag(
        torch.tensor([0, 2, 2, 4]), w, torch.tensor([0, 1, 1]), mode="sum"
    ),
    EmbeddingBag_weights=lambda w: F.embedding_bag(
        torch.tensor([[0, 2], [2, 4]]), w, mode="sum", per_sample_weights=w[:2, :2]
    ),
    EmbeddingBag_max=lambda w: F.embedding_bag(
        torch.tensor([[0, 2], [3, 4]]), w + 9 * torch.arange(5)[:, None], mode="max"
    ),
    Bilinear=lambda x: F.bilinear(x, x.sin(), torch.arange(18.0).double().reshape(2, 3, 3) / 9),
    message_passing=lambda x: x.new_zeros(5, 3).index_add_(
        0, torch.tensor([1, 0, 4, 4, 2]), (x[[0, 1, 2, 3, 3]] * x).tanh()
    ),
    mixture_of_experts=lambda x: torch._grouped_mm(
        (x @ _EXPERTS_IN).float(), (_EXPERTS * x[0, 0]).float(), offs=torch.tensor(_ENDS).int()
    ),
)

_EXPERTS_IN, _EXPERTS, _ENDS = real(3, 4), real(3, 4, 2), [2, 4, 5]


def experts(x: Tensor) -> Tensor:
    rows = (x @ _EXPERTS_IN).split([2, 2, 1])
    return torch.cat([row @ expert for row, expert in zip(rows, _EXPERTS * x[0, 0], strict=True)])


# The same by other means, for what has no float64.
ORACLES: dict[str, Function] = {"layers mixture_of_experts": experts}

# ------------------------------------------------------------------ attention

_VISIBLE = torch.ones(3, 3).tril().bool()
_NOTHING = _VISIBLE.clone().index_fill(0, torch.tensor([0]), False)
_MHA = nn.MultiheadAttention(4, 2, batch_first=True).double().eval()
_KV = real(1, 2, 3, 4)


def sdpa(**options: Any) -> Function:
    return lambda x: F.scaled_dot_product_attention(x, x.sin(), x.cos(), **options)


of(
    "attention",
    real(1, 2, 3, 4),
    plain=sdpa(),
    causal=sdpa(is_causal=True),
    boolean_mask=sdpa(attn_mask=_VISIBLE),
    float_mask=sdpa(attn_mask=real(3, 3)),
    scale=sdpa(scale=0.3),
    masked_row=sdpa(attn_mask=_NOTHING),
    masked_row_of_floats=sdpa(
        attn_mask=torch.zeros(3, 3).double().masked_fill(~_NOTHING, -math.inf)
    ),
    grouped=lambda x: F.scaled_dot_product_attention(x, x[:, :1], x[:, :1].sin(), enable_gqa=True),
    cross=lambda x: F.scaled_dot_product_attention(x, _KV, _KV),
    keywords=lambda x: F.scaled_dot_product_attention(query=x, key=x, value=x, is_causal=True),
    followed_mask=lambda x: F.scaled_dot_product_attention(_KV, _KV, _KV, attn_mask=x[..., :3]),
    eager=lambda x: (x @ x.mT).masked_fill(~_VISIBLE, -math.inf).softmax(-1) @ x,
    baddbmm=lambda x: torch.baddbmm(x[0, :, :, :3], x[0], x[0].mT, beta=0.5, alpha=0.3),
    baddbmm_keywords=lambda x: x[0, :, :, :3].baddbmm(
        batch1=x[0], batch2=x[0].mT, beta=0.5, alpha=2.0
    ),
    multihead=lambda x: _MHA(x[0], x[0], x[0], need_weights=False)[0],
    multihead_weights=lambda x: _MHA(x[0], x[0], x[0])[1],
    multihead_mask=lambda x: _MHA(x[0], x[0], x[0], attn_mask=~_VISIBLE, need_weights=False)[0],
    rotary=lambda x: x * 0.3 + torch.cat((-x[..., 2:], x[..., :2]), -1) * 0.7,
    rotary_in_place=lambda x: _rotated(x.clone()),
    alibi=lambda x: (x @ x.mT - torch.arange(3.0).double()).softmax(-1),
    soft_cap=lambda x: (torch.tanh(x @ x.mT / 5) * 5).softmax(-1),
)


def _rotated(x: Tensor) -> Tensor:
    x[..., :2] *= 0.5
    x[..., 2:] = x[..., :2] + x[..., 2:].sin()
    return x


# ------------------------------------------------------------------ tensor operations


def written(write: Callable[[Tensor], Any]) -> Function:
    """What an operation in place leaves in a tensor."""

    def f(x: Tensor) -> Tensor:
        y = x * 1
        write(y)
        return y

    return f


def filled(write: Callable[[Tensor, Tensor], Any]) -> Function:
    """What it leaves in a constant."""

    def f(x: Tensor) -> Tensor:
        buffer = torch.zeros(3, 4).double()
        write(buffer, x)
        return buffer * x

    return f


def _sliced(buffer: Tensor, x: Tensor) -> None:
    buffer[:, 1] = x[:, 0]
    buffer[1:] += x[1:]


_ROWS, _PLACES = torch.tensor([0, 2, 2]), torch.tensor([[0, 1, 2, 0], [2, 0, 1, 1], [1, 2, 0, 2]])
_SEEN = torch.tensor(
    [[True, False, True, True], [False, True, True, False], [True, True, False, False]]
)
of(
    "tensor",
    real(3, 4),
    index_add=lambda x: torch.zeros(3, 4).double().index_add(0, _ROWS, x, alpha=2),
    index_add_keywords=lambda x: x.index_add(dim=0, index=_ROWS, source=x.sin()),
    index_copy=lambda x: x.index_copy(0, _ROWS[:2], x[1:].sin()),
    index_fill=lambda x: x.index_fill(0, _ROWS[:2], 2.0),
    index_put=lambda x: torch.zeros(3, 4).double().index_put((_ROWS,), x, accumulate=True),
    index_put_mask=lambda x: x.index_put((_SEEN,), x.new_tensor(0.5)),
    scatter=lambda x: x.scatter(0, _PLACES, x.sin()),
    scatter_value=lambda x: x.scatter(1, _PLACES[:, :2], 2.0),
    scatter_add=lambda x: torch.zeros(3, 4).double().scatter_add(0, _PLACES, x),
    scatter_reduce_sum=lambda x: x.scatter_reduce(0, _PLACES, x.exp(), "sum"),
    scatter_reduce_mean=lambda x: x.scatter_reduce(0, _PLACES, x.exp(), "mean", include_self=False),
    scatter_reduce_amax=lambda x: x.scatter_reduce(0, _PLACES, x.exp() + 9 * _PLACES, "amax"),
    scatter_reduce_prod=lambda x: x.scatter_reduce(0, _PLACES, x.exp(), "prod"),
    index_reduce=lambda x: x.index_reduce(0, _ROWS, x.exp(), "mean"),
    slice_scatter=lambda x: torch.slice_scatter(x, x[:1].sin(), 0, 1, 2),
    select_scatter=lambda x: x.select_scatter(x[0].sin(), 0, 2),
    diagonal_scatter=lambda x: x[:, :3].diagonal_scatter(x[0, :3].sin()),
    masked_scatter=lambda x: x.masked_scatter(_SEEN, x.sin()),
    masked_fill=lambda x: x.masked_fill(_SEEN, 0.5),
    in_place_arithmetic=written(lambda y: y.add_(1).mul_(y).div_(3).sub_(y.sin()).neg_()),
    in_place_functions=written(lambda y: y.exp_().sqrt_().tanh_().clamp_(-3, 3).pow_(3)),
    in_place_operators=written(lambda y: y.__iadd__(2).__imul__(y)),
    in_place_index=written(lambda y: y.__setitem__((slice(None), 1), y[:, 0].sin())),
    in_place_mask=written(lambda y: y.__setitem__(_SEEN, y.flatten()[:7].sin())),
    in_place_row=written(lambda y: y[1].mul_(y[0])),
    in_place_view=written(lambda y: y.view(-1)[2:5].exp_()),
    in_place_transposed=written(lambda y: y.T[1:3].copy_(y.T[:2].sin())),
    in_place_scatter=written(lambda y: y.scatter_add_(0, _PLACES, y.exp())),
    in_place_fill=written(lambda y: y[0].zero_().add_(y[1])),
    in_place_masked_fill=written(lambda y: y.masked_fill_(_SEEN, -1.0)),
    in_place_addcmul=written(lambda y: y.addcmul_(y, y.sin(), value=0.5).lerp_(y.cos(), 0.3)),
    buffer_index=filled(_sliced),
    buffer_copy=filled(lambda buffer, x: buffer.copy_(x.sin())),
    buffer_index_add=filled(lambda buffer, x: buffer.index_add_(0, _ROWS, x.sin())),
    buffer_augmented=filled(lambda buffer, x: buffer.__iadd__(x.sin())),
    complex_parts=lambda x: torch.complex(x, x.sin()).exp().abs(),
    complex_angle=lambda x: torch.angle(torch.complex(2 + x, x.sin())),
    polar=lambda x: torch.view_as_real(torch.polar(x.exp(), x)),
    hypot=lambda x: torch.hypot(2 + x, x.sin()),
    sinc=lambda x: torch.sinc(x - x[0]),
    kron=lambda x: torch.kron(x, x.sin()),
    block_diag=lambda x: torch.block_diag(x, x.sin()),
    cross=lambda x: torch.linalg.cross(x[:, :3], x[:, 1:].sin()),
    multi_dot=lambda x: torch.linalg.multi_dot([x, x.T, x]),
    matrix_power=lambda x: torch.linalg.matrix_power(x[:, :3], 3),
    matrix_exp=lambda x: torch.linalg.matrix_exp(x[:, :3]),
    cdist=lambda x: torch.cdist(x, 2 + x.sin()),
    cdist_itself=lambda x: torch.cdist(x, x),
    cdist_manhattan=lambda x: torch.cdist(x, x + 5, p=1.0),
    pdist=F.pdist,
    cov=torch.cov,
    corrcoef=lambda x: torch.corrcoef(x + torch.eye(3, 4).double()),
    trapezoid=torch.trapezoid,
    cumulative_trapezoid=torch.cumulative_trapezoid,
    vander=lambda x: torch.vander(x[0]),
    meshgrid=lambda x: torch.cat(torch.meshgrid(x[0], x[1], indexing="ij")),
    cartesian_prod=lambda x: torch.cartesian_prod(x[0], x[1]),
    column_stack=lambda x: torch.column_stack([x, x.sin()]),
    dstack=lambda x: torch.dstack([x, x.sin()]),
    tensordot=lambda x: torch.tensordot(x, x.sin(), dims=([0, 1], [0, 1])),
    einsum_ellipsis=lambda x: torch.einsum("...i,...i->...", x, x.sin()),
    chain_matmul=lambda x: torch.chain_matmul(x, x.T, x.sin()),
    vdot=lambda x: torch.vdot(x[0], x[1].sin()),
    addbmm=lambda x: torch.addbmm(x, x[None, :, :3], x[None, :3].sin(), alpha=0.5),
    addr=lambda x: torch.addr(x, x[:, 0], x[0].sin(), beta=0.5),
    softmax_keywords=lambda x: torch.softmax(input=x, dim=1),
    sum_keywords=lambda x: torch.sum(input=x.exp(), dim=1, keepdim=True),
    std_mean=lambda x: torch.cat(torch.std_mean(x, dim=1)),
    norm_nuclear=lambda x: torch.linalg.norm(x, "nuc"),
    norm_spectral=lambda x: torch.linalg.matrix_norm(x, 2),
    normalize=lambda x: F.normalize(x, dim=1),
    renorm=lambda x: torch.renorm(x, 2, 0, 0.5),
    dist=lambda x: torch.dist(x, 2 + x.sin()),
    stft=lambda x: torch.view_as_real(
        torch.stft(x.flatten(), 4, 2, window=torch.hann_window(4).double(), return_complex=True)
    ),
    tan=torch.tan,
    exp2=torch.exp2,
    argmax=lambda x: torch.argmax(x) * x,
    xlogy=lambda x: torch.xlogy(x.exp(), x.exp()),
    polygamma=lambda x: torch.polygamma(2, 2 + x),
    logcumsumexp=lambda x: torch.logcumsumexp(x, 1),
    det=lambda x: torch.linalg.det(x[:, :3] + 3 * torch.eye(3).double()),
    i0=lambda x: torch.special.i0(x) + torch.special.i1(x),
    ndtr=torch.special.ndtr,
    log_ndtr=torch.special.log_ndtr,
    logaddexp2=lambda x: torch.logaddexp2(x, x.sin()),
    log_normal=lambda x: torch.distributions.Normal(x, x.exp()).log_prob(x.cos()),
    grid_sample=lambda x: F.grid_sample(_IMAGE * x[0, 0], x[:, :2].reshape(1, 1, 3, 2) / 40 + 0.2),
    affine_grid=lambda x: F.affine_grid(x[None, :2, :3], [1, 1, 2, 3]),
    unfold_windows=lambda x: x.unfold(1, 2, 1).exp(),
    split_sizes=lambda x: torch.cat([part * i for i, part in enumerate(x.split([1, 3], 1))], 1),
    sparse_product=lambda x: torch.sparse.mm(torch.eye(3).double().to_sparse(), x),
    nested_tensor=lambda x: torch.nested.nested_tensor([x, x]).to_padded_tensor(0.0),
    roll_flip=lambda x: x.roll(1, 0).flip(1).rot90(),
)
_IMAGE = real(1, 2, 4, 4)
of(
    "tensor",
    apart(3, 4),
    median=lambda x: torch.median(x, 1).values,
    median_all=torch.median,
    kthvalue=lambda x: torch.kthvalue(x, 2, 1).values,
    quantile=lambda x: torch.quantile(x, 0.3, dim=1),
    nanmean=lambda x: torch.nanmean(x, 1),
    topk=lambda x: x.topk(2, 1).values,
    msort=torch.msort,
    rounding=lambda x: torch.nan_to_num(x).rad2deg().deg2rad().frac() - x.trunc() * x,
    aminmax=lambda x: torch.cat(torch.aminmax(x, dim=1)),
    fmax=lambda x: torch.fmax(x[0], x[1]),
    copysign=lambda x: torch.copysign(x, x.flip(1)),
    searchsorted=lambda x: torch.searchsorted(torch.arange(-5.0, 5).double(), x) * x,
    bucketize=lambda x: torch.bucketize(x, torch.arange(-5.0, 5).double()) * x,
    unique=lambda x: torch.unique(x) * 1.0,
    histc=lambda x: torch.histc(x, 3),
    mode=lambda x: torch.mode(x, 1).values,
)
of(
    "tensor",
    definite(3),
    solve=lambda x: torch.linalg.solve(x, x.sin()),
    solve_triangular=lambda x: torch.linalg.solve_triangular(x, x.sin(), upper=False),
    cholesky=lambda x: torch.linalg.cholesky(x + x.T),
    solve_right=lambda x: torch.linalg.solve(x, x.sin(), left=False),
    solve_vector=lambda x: torch.linalg.solve(x, x[0]),
    solve_constant=lambda x: torch.linalg.solve(torch.eye(3).double() * 2, x),
    solve_batch=lambda x: torch.linalg.solve(torch.stack([x, x.T]), torch.stack([x, x])),
    inverse=torch.inverse,
    slogdet=lambda x: torch.linalg.slogdet(x).logabsdet,
    logdet=torch.logdet,
    cholesky_upper=lambda x: torch.linalg.cholesky(x @ x.T, upper=True),
    cholesky_solve=lambda x: torch.cholesky_solve(x.sin(), x.tril()),
    cholesky_inverse=lambda x: torch.cholesky_inverse(x.tril()),
    triangular_unit=lambda x: torch.linalg.solve_triangular(x, x, upper=True, unitriangular=True),
    lu_solve=lambda x: torch.linalg.lu_solve(*torch.linalg.lu_factor(x), x.sin()),
    eigvals=lambda x: torch.view_as_real(torch.linalg.eigvals(x).exp().sum()),
    eigh_vectors=lambda x: torch.linalg.eigh(x @ x.T).eigenvectors.square(),
    pinv=lambda x: torch.linalg.pinv(x[:, :2]),
    lstsq=lambda x: torch.linalg.lstsq(x[:, :2], x[:, 2:]).solution,
    tensorsolve=lambda x: torch.linalg.tensorsolve(x, x[:, 0]),
    tensorinv=lambda x: torch.linalg.tensorinv(x, ind=1),
    svd_vectors=lambda x: torch.linalg.svd(x, full_matrices=False)[2].square(),
    householder=lambda x: torch.linalg.householder_product(x, x[0]),
    scripted=lambda x: _scripted()(x.T),
    cond=lambda x: torch.cond(x[0, 0] > 0, torch.sin, torch.cos, (x,)),
)

# ------------------------------------------------------------------ losses

_LABELS, _SIGNS = torch.tensor([1, 0, 3]), torch.tensor([[1.0, -1, 1, -1]] * 3).double()
of(
    "losses",
    real(3, 4),
    mse=lambda x: F.mse_loss(x, x.sin() + 1),
    l1=lambda x: F.l1_loss(x, x + 5),
    smooth_l1=lambda x: F.smooth_l1_loss(x, 3 * _SIGNS),
    huber=lambda x: F.huber_loss(x, 3 * _SIGNS, delta=0.7),
    cross_entropy=lambda x: F.cross_entropy(x, _LABELS),
    cross_entropy_smoothed=lambda x: F.cross_entropy(x, _LABELS, label_smoothing=0.1),
    cross_entropy_weighted=lambda x: F.cross_entropy(x, _LABELS, weight=torch.arange(4.0).double()),
    cross_entropy_ignored=lambda x: F.cross_entropy(x, torch.tensor([1, -100, 3])),
    cross_entropy_probabilities=lambda x: F.cross_entropy(x, x.sin().softmax(-1)),
    linear_cross_entropy=lambda x: F.linear_cross_entropy(x, torch.eye(5, 4).double(), _LABELS),
    nll=lambda x: F.nll_loss(x.log_softmax(-1), _LABELS, reduction="sum"),
    bce=lambda x: F.binary_cross_entropy(torch.sigmoid(x), (_SIGNS + 1) / 2),
    bce_logits=lambda x: F.binary_cross_entropy_with_logits(x, (_SIGNS + 1) / 2),
    kl_div=lambda x: F.kl_div(x.log_softmax(-1), x.sin().softmax(-1), reduction="batchmean"),
    poisson_nll=lambda x: F.poisson_nll_loss(x, torch.ones(3, 4).double()),
    poisson_nll_full=lambda x: F.poisson_nll_loss(x, 3 * torch.ones(3, 4).double(), full=True),
    gaussian_nll=lambda x: F.gaussian_nll_loss(x, x.sin() + 1, x.exp()),
    cosine_embedding=lambda x: F.cosine_embedding_loss(x, x.sin() + 1, torch.tensor([1.0, -1, 1])),
    cosine_similarity=lambda x: F.cosine_similarity(x, x.sin() + 1),
    pairwise_distance=lambda x: F.pairwise_distance(x, x.sin() + 1),
    triplet=lambda x: F.triplet_margin_loss(x, x + 1, x.sin() - 2),
    triplet_distance=lambda x: F.triplet_margin_with_distance_loss(x, x + 1, x.sin() - 2),
    margin_ranking=lambda x: F.margin_ranking_loss(x, x.sin() + 2, _SIGNS),
    hinge_embedding=lambda x: F.hinge_embedding_loss(x.exp() + 2, _SIGNS),
    soft_margin=lambda x: F.soft_margin_loss(x, _SIGNS),
    multi_margin=lambda x: F.multi_margin_loss(x / 3, _LABELS),
    multilabel_margin=lambda x: F.multilabel_margin_loss(x / 9, torch.tensor([[3, 0, -1, 1]] * 3)),
    multilabel_soft_margin=lambda x: F.multilabel_soft_margin_loss(x, (_SIGNS + 1) / 2),
    ctc=lambda x: F.ctc_loss(
        x.log_softmax(-1)[:, None], torch.tensor([[1, 2]]), torch.tensor([3]), torch.tensor([2])
    ),
    dice=lambda x: 1 - 2 * (x.sigmoid() * _SIGNS).sum() / (x.sigmoid().sum() + 4),
    contrastive=lambda x: F.cross_entropy(F.normalize(x) @ F.normalize(x).T / 0.1, torch.arange(3)),
)
