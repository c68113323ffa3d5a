"""Each rule of `jet` alone: its value against PyTorch, its derivatives against checked oracles.

A case is a function and its tensors. Its oracle is nested `torch.func.jvp` where that is right in
torch 2.13, and else a composition of elementary functions or a closed form. Every oracle is itself
held against a Chebyshev fit of PyTorch's own values along the direction.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import ORDER, REACH, SMALL_FIT, Points, assert_near, fitted, nested
from situations import SITUATIONS
from test_coverage import REFUSED
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.overrides import TorchFunctionMode, resolve_name

from autograd_lib import jet, laplacian
from autograd_lib.functions.activations import low_memory_gelu, low_memory_relu, low_memory_silu
from autograd_lib.functions.functions import (
    CustomAutogradFunction,
    clip_gradient,
    log1mexp,
    reverse_gradient,
    safe_norm,
    safe_sqrt,
    scale_gradient,
    straight_through,
)
from autograd_lib.higher_order import dispatch

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning"),
    pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning"),
    pytest.mark.filterwarnings("ignore:size_average and reduce args:UserWarning"),
]

Function = Callable[..., Tensor]
POINTS = Points(0)
real, positive, apart = POINTS.real, POINTS.positive, POINTS.apart


def whole(*shape: int, high: int) -> Tensor:
    return torch.randint(0, high, shape, generator=POINTS.generator)


def flat(*parts: Tensor) -> Tensor:
    """The results of a function with several, or with no fixed shape, as one."""
    return torch.cat([part.reshape(-1) for part in parts])


class Case(NamedTuple):
    function: Function
    tensors: tuple[Tensor, ...]
    oracle: Function | None  # the same function by other means; None: nested jvp of itself
    fixed: tuple[int, ...]  # places of tensors that are not differentiated
    rtol: float
    fitted: bool  # whether PyTorch's values are smooth enough along the direction for a fit
    halves: bool  # whether it runs in float32


CASES: dict[str, Case] = {}


def case(
    name: str,
    function: Function,
    *tensors: Tensor,
    oracle: Function | None = None,
    fixed: Sequence[int] = (),
    rtol: float = 1e-9,
    fitted: bool = True,
    halves: bool = True,
) -> None:
    assert name not in CASES, name
    CASES[name] = Case(function, tensors, oracle, tuple(fixed), rtol, fitted, halves)


def cases(prefix: str, functions: Sequence[Function], *tensors: Tensor, **options: Any) -> None:
    for i, function in enumerate(functions):
        case(f"{prefix}-{i}", function, *tensors, **options)


# ------------------------------------------------------------------ elementary functions


def spelled(name: str) -> Iterator[tuple[str, Function]]:
    """A function of one variable wherever PyTorch offers it."""
    for home in (torch, torch.special, F, Tensor):
        function = getattr(home, name, None)
        if function is not None and not name.startswith("__"):
            yield f"{home.__name__.split('.')[-1]}.{name}", function


# Other spellings of a function that has a case: they must have its very rule, and its arguments.
SPELLINGS: dict[str, tuple[Function, Function, tuple[Tensor, ...]]] = {}
# These have a rule of their own, or pass options on to it.
EACH = ("Tensor.neg", "Tensor.positive", "functional.relu", "functional.selu", "functional.celu")

for _names, _values in (
    (
        """
        exp expm1 exp2 tanh sigmoid/expit tan sin cos sinh cosh atan/arctan asin/arcsin acos/arccos
        asinh/arcsinh atanh/arctanh erf erfc erfcx erfinv logsigmoid square neg negative positive
        clone softsign silu mish
        """,
        0.8 * (1 - REACH) * real(2, 3),
    ),
    (
        """
        reciprocal sqrt rsqrt log log2 log10 log1p lgamma/gammaln digamma
        """,
        positive(2, 3),
    ),
    ("acosh/arccosh", positive(2, 3) + 1),
    ("logit", 0.3 + 0.1 * positive(2, 3)),
    ("abs/absolute relu relu6 selu celu elu leaky_relu hardtanh hardswish", apart(2, 4)),
):
    for _group in _names.split():
        (_tested, _function), *_others = [each for n in _group.split("/") for each in spelled(n)]
        case(_tested, _function, apart(2, 3) if _group == "softsign" else _values)
        for _spelling, _other in _others:
            if _spelling in EACH:
                case(_spelling, _other, _values)
            else:
                SPELLINGS[_spelling] = _other, _function, (_values,)

cases(
    "gelu",
    [F.gelu, lambda x: F.gelu(x, approximate="tanh"), lambda x: F.gelu(x, approximate="none")],
    3 * real(2, 3),
)
case("gelu-normal", F.gelu, real(4), oracle=lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2)
case(
    "gelu-tanh",
    lambda x: F.gelu(x, approximate="tanh"),
    real(4),
    oracle=lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x))) / 2,
)
case("softplus", F.softplus, 2 * real(4))
case("softplus-beta", lambda x: F.softplus(x, beta=3.0), 2 * real(4))
case(
    "softplus-threshold",
    lambda x: F.softplus(x, 2.0, 1.0),
    torch.tensor([-1.0, 0.1, 0.9, 2.0]).double(),
    oracle=lambda x: torch.where(2 * x > 1, x, torch.log(1 + torch.exp(2 * x)) / 2),
)
case("logit-eps", lambda x: torch.logit(x, eps=0.2), torch.tensor([-0.3, 0.5, 1.3]).double())
case("polygamma", lambda x: torch.polygamma(2, x), positive(3))
case("polygamma-special", lambda x: torch.special.polygamma(1, x), positive(3))
case("polygamma-method", lambda x: x.polygamma(1), positive(3))
for _dim in (-1, 0):
    case(
        f"glu-{_dim}",
        lambda x, d=_dim: F.glu(x, d),
        real(2, 4),
        # fused, it has no forward mode at order 2
        oracle=lambda x, d=_dim: x.chunk(2, d)[0] / (1 + (-x.chunk(2, d)[1]).exp()),
    )
case("glu-default", F.glu, real(6), oracle=lambda x: x[:3] * torch.sigmoid(x[3:]))
case("xlogy", torch.xlogy, real(2, 3), positive(3))
case("xlogy-special", torch.special.xlogy, real(2, 3), positive(3))
case("xlogy-scalar", lambda x: torch.xlogy(2.0, x), positive(3))
case("xlogy-scalar-right", lambda x: torch.xlogy(x, 2.0), positive(3))
case("logaddexp", torch.logaddexp, real(2, 3), real(3))

# ------------------------------------------------------------------ by pieces

case("leaky_relu-slope", lambda x: F.leaky_relu(x, 0.3), apart(2, 4))
case("leaky_relu-negative", lambda x: F.leaky_relu(x, negative_slope=-0.3), apart(2, 4))
case("elu-alpha", lambda x: F.elu(x, 0.7), apart(2, 4))
# the fused one rounds 1 / alpha to float32
case(
    "celu-alpha",
    lambda x: F.celu(x, alpha=0.7),
    apart(2, 4),
    oracle=lambda x: torch.where(x > 0, x, 0.7 * torch.expm1(x.clamp(max=0) / 0.7)),
)
case("relu-module", nn.ReLU(), apart(2, 4))
case("silu-module", nn.SiLU(), real(2, 4))
case("prelu", F.prelu, apart(2, 3, 2), positive(3))
case("prelu-one", F.prelu, apart(2, 3), positive(1))
case("prelu-torch", torch.prelu, apart(2, 3), positive(3))
case("prelu-vector", F.prelu, apart(4), positive(1))
case("hardtanh-limits", lambda x: F.hardtanh(x, -1.25, 0.75), apart(2, 4))
case("hardsigmoid", F.hardsigmoid, apart(2, 5), oracle=lambda x: torch.clamp((x + 3) / 6, 0, 1))
case("hardswish-wide", F.hardswish, apart(2, 5))
case("relu6-wide", F.relu6, apart(3, 6))
cases(
    "clamp",
    [
        lambda x: torch.clamp(x, -1.25, 0.75),
        lambda x: torch.clamp(x, min=-0.25),
        lambda x: torch.clamp(x, max=0.75),
        lambda x: x.clamp(max=0.75),
        lambda x: torch.clip(x, -1.25, 0.75),
        lambda x: torch.clamp_min(x, 0.75),
        lambda x: torch.clamp_max(x, 0.75),
        lambda x: x.clamp_min(0.75),
        lambda x: x.clip(min=-1.25, max=0.75),
    ],
    apart(2, 4),
)
case(
    "clamp-tensors",
    torch.clamp,
    torch.tensor([-2.0, 0.0, 2.0]).double(),
    torch.full((3,), -1.0).double(),
    torch.full((3,), 1.0).double(),
)
case("clamp_min-tensor", torch.clamp_min, *apart(2, 2, 3).unbind())
case("clamp_max-tensor", torch.clamp_max, *apart(2, 2, 3).unbind())
for _name in ("maximum", "minimum", "max", "min"):
    case(f"binary-{_name}", getattr(torch, _name), *apart(2, 2, 3).unbind())
    case(f"binary-{_name}-method", getattr(Tensor, _name), *apart(2, 2, 3).unbind())
for _name in ("max", "min"):
    _function, _all_of = getattr(torch, _name), getattr(torch, f"a{_name}")
    cases(
        _name,
        [
            _function,
            lambda x, f=_function: f(x, 1).values,
            lambda x, f=_function: f(x, dim=-2, keepdim=True)[0],
            lambda x, f=_function: f(x, 0, True).values,
            lambda x, name=_name: getattr(x, name)(dim=1)[0],
            lambda x, name=_name: getattr(x, name)(),
            _all_of,
            lambda x, f=_all_of: f(x, 1),
            lambda x, f=_all_of: f(x, (0, -1), keepdim=True),
            lambda x, f=_all_of: f(x, dim=-1, keepdim=True),
        ],
        apart(3, 4),
    )
cases(
    "sort",
    [
        lambda x: torch.sort(x)[0],
        lambda x: torch.sort(x, 0, descending=True).values,
        lambda x: x.sort(dim=0)[0],
        lambda x: torch.sort(x, stable=True, dim=-1).values,
        lambda x: torch.topk(x, 2).values,
        lambda x: torch.topk(x, 2, 0, largest=False)[0],
        lambda x: x.topk(3, dim=1)[0],
        lambda x: torch.topk(x, 1, dim=-2, largest=True, sorted=True).values,
        lambda x: torch.remainder(x, 1.5),
        lambda x: torch.fmod(x, 1.5),
        lambda x: x % 1.5,
        lambda x: torch.where(x > 0, x.exp(), x),
        lambda x: torch.where(x > 0, x, 0.5),
        lambda x: torch.where(x > 0, 0.5, x),
        lambda x: x.where(x > 0, x * x),
        lambda x: x.exp().where(x > 0, 0.25),
        lambda x: torch.masked_fill(x, x > 0, 0.25),
        lambda x: x.masked_fill(x > 0, -math.inf).exp(),
        lambda x: torch.softmax(x, 0).masked_fill(x > 0, 1),
        lambda x: x[x > 0],
        lambda x: torch.masked_select(x, x > 0),
        lambda x: x.masked_select(x < 0),
        lambda x: torch.take_along_dim(x, torch.argsort(x, 1), 1),
    ],
    apart(3, 4),
)
case("where", torch.where, whole(2, 3, high=2).bool(), real(2, 3), real(3))
case("where-broadcast", torch.where, whole(4, 1, 3, high=2).bool(), real(2, 1), real(3))
case("where-method", lambda c, x, y: x.where(c, y), whole(2, 3, high=2).bool(), real(2, 3), real(3))
case("masked_fill", torch.masked_fill, real(2, 3), whole(3, high=2).bool(), real())

# ------------------------------------------------------------------ arithmetic

_BROADCAST = [((2, 3), (2, 3)), ((2, 3), (3,)), ((3,), (2, 3)), ((2, 1), (1, 3)), ((), (2, 3))]
_BROADCAST += [((2, 3), ()), ((), ()), ((2, 1, 3), (4, 1))]
for _index, (_left, _right) in enumerate(_BROADCAST):
    for _name, _function in {
        "add": torch.add,
        "sub": torch.sub,
        "mul": torch.mul,
        "div": torch.div,
        "pow": torch.pow,
        "maximum": lambda x, y: torch.maximum(x, y - 3),
        "atan-of-ratio": lambda x, y: torch.atan(x / y) * y,
    }.items():
        case(f"{_name}-broadcast-{_index}", _function, positive(*_left), positive(*_right))
_PAIR = positive(2, 3), positive(3)
for _tested, *_others in (
    (Tensor.add, lambda x, y: x + y),
    (torch.subtract, Tensor.sub, Tensor.subtract, lambda x, y: x - y),
    (torch.multiply, Tensor.mul, Tensor.multiply, lambda x, y: x * y),
    (
        *(torch.divide, torch.true_divide, Tensor.div, Tensor.divide, Tensor.true_divide),
        *(lambda x, y: x / y, lambda x, y: x.__truediv__(y)),
    ),
    (Tensor.pow, lambda x, y: x**y),
):
    case(f"binary-{_tested.__name__}", _tested, *_PAIR, halves=False)
    for _index, _other in enumerate(_others):
        SPELLINGS[f"binary-{_tested.__name__}-{_index}"] = _other, _tested, _PAIR
cases(
    "binary",
    [
        lambda x, y: x.__matmul__(y) * x[:, 0],
        lambda x, y: x.__rmatmul__(y.new_ones(4, 2)),
        torch.rsub,
        lambda x, y: torch.rsub(x, y, alpha=3),
        lambda x, y: torch.add(x, y, alpha=2.5),
        lambda x, y: torch.sub(x, y, alpha=-2),
        lambda x, y: torch.add(x, other=y),
        lambda x, y: torch.mul(input=x, other=y),
        lambda x, y: torch.div(x, y, rounding_mode=None),
        lambda x, y: x.lerp(y, 0.3),
        lambda x, y: torch.lerp(x, y, weight=y),
        lambda x, y: x + torch.div(x, 9 * y, rounding_mode="floor"),
    ],
    *_PAIR,
    halves=False,
)
cases(
    "scalar",
    [
        lambda x: x + 2,
        lambda x: 2 + x,
        lambda x: x - 2.5,
        lambda x: 2.5 - x,
        lambda x: x * 3,
        lambda x: 3 * x,
        lambda x: x / 3,
        lambda x: 3 / x,
        lambda x: 3 / x / x,
        lambda x: x**2,
        lambda x: x**3,
        lambda x: x**7,
        lambda x: x**0,
        lambda x: x**1,
        lambda x: x**-1,
        lambda x: x**-3,
        lambda x: x**0.5,
        lambda x: x**2.5,
        lambda x: x**-1.5,
        lambda x: x**2.0,
        lambda x: 2**x,
        lambda x: 2.5**x,
        lambda x: torch.pow(2, x),
        lambda x: torch.pow(x, 3),
        lambda x: x.pow(0.3),
        lambda x: torch.add(x, 2, alpha=3),
        lambda x: torch.sub(x, 2, alpha=3),
        lambda x: torch.rsub(x, 2),
        lambda x: torch.rsub(x, 2, alpha=3),
        lambda x: torch.mul(x, 2),
        lambda x: torch.float_power(x, 2.5),
        lambda x: -x,
        lambda x: +x,
        lambda x: x * True,
        lambda x: x + False,
        lambda x: (x * 2 + 1) / (3 - x) ** 2,
    ],
    positive(2, 3),
    halves=False,
)
case("pow-integers", lambda x, n: x**n, positive(2, 3), whole(3, high=5))
case("rpow", lambda x, base: base**x, real(2, 3), positive(3))
case("addcmul", torch.addcmul, real(2, 3), real(3), real(2, 1))
case("addcmul-value", lambda x, a, b: x.addcmul(a, b, value=-2), real(2, 3), real(3), real(2, 1))
case("addcdiv", torch.addcdiv, real(2, 3), real(3), positive(2, 1))
case(
    "addcdiv-value", lambda x, a, b: x.addcdiv(a, b, value=-2), real(2, 3), real(3), positive(2, 1)
)
case("lerp", torch.lerp, real(2, 3), real(3), real(2, 1))

# ------------------------------------------------------------------ views and indices

cases(
    "view",
    [
        lambda x: x.view(4, 6),
        lambda x: x.view(-1),
        lambda x: x.view((6, -1)),
        lambda x: x.view(size=(6, 4)),
        lambda x: x.reshape(3, -1),
        lambda x: torch.reshape(x, (4, 6)),
        lambda x: x.view_as(x.new_zeros(6, 4)),
        lambda x: x.reshape_as(x.new_zeros(6, 4)),
        lambda x: x.permute(2, 0, 1),
        lambda x: x.permute((-1, 0, -2)),
        lambda x: torch.permute(x, (1, 2, 0)),
        lambda x: torch.permute(x, dims=(1, 2, 0)),
        lambda x: x.transpose(0, 2),
        lambda x: torch.transpose(x, -1, 1),
        lambda x: x.transpose(dim0=0, dim1=-1),
        lambda x: torch.swapaxes(x, 0, 1),
        lambda x: torch.swapaxes(x, axis0=0, axis1=2),
        lambda x: x.transpose(dim1=0, dim0=1),
        lambda x: torch.swapdims(x, 0, 2),
        lambda x: x.swapaxes(0, -1),
        lambda x: x.mT,
        lambda x: x.mH,
        lambda x: x.adjoint(),
        torch.adjoint,
        lambda x: x[0].T,
        lambda x: x[0].H,
        lambda x: x[0].t(),
        lambda x: torch.t(x[0, 0]),
        lambda x: x.unsqueeze(0),
        lambda x: torch.unsqueeze(x, -1),
        lambda x: x.unsqueeze(dim=1),
        lambda x: x.unsqueeze(1).squeeze(),
        lambda x: x.unsqueeze(1).squeeze(1),
        lambda x: x.unsqueeze(1).squeeze(0),
        lambda x: torch.squeeze(x.unsqueeze(1), (1, 2)),
        lambda x: x[:, :1, :1].squeeze(dim=-1),
        lambda x: x.flatten(),
        lambda x: x.flatten(1),
        lambda x: torch.flatten(x, 0, -2),
        lambda x: x.flatten(start_dim=-2),
        lambda x: x[0, 0, 0].flatten(),
        lambda x: torch.unflatten(x, 2, (2, 2)),
        lambda x: x.unflatten(-1, (2, -1)),
        lambda x: x.ravel(),
        torch.ravel,
        lambda x: x[:, :1].expand(2, 5, 4),
        lambda x: x[:, :1].expand(3, 2, -1, -1),
        lambda x: x[:, :1].expand((2, 5, 4)),
        lambda x: x[:, :1].expand_as(x),
        lambda x: torch.broadcast_to(x, (2, 2, 3, 4)),
        lambda x: x.broadcast_to(2, 2, 3, 4),
        lambda x: torch.movedim(x, 0, 2),
        lambda x: x.movedim((0, 1), (-1, -2)),
        lambda x: torch.moveaxis(x, 0, 1),
        lambda x: torch.diagonal(x, dim1=1, dim2=2),
        lambda x: x.diagonal(1, 0, 2),
        lambda x: torch.diag(x[0]),
        lambda x: torch.diag(x[0, 0], 1),
        torch.diagflat,
        lambda x: torch.diag_embed(x, 1),
        torch.diff,
        lambda x: torch.diff(x, 2, dim=1),
        lambda x: torch.trace(x[0]),
        lambda x: x.roll(1),
        lambda x: torch.roll(x, (1, 2), (0, -1)),
        lambda x: torch.rot90(x, 1, (0, 1)),
        torch.fliplr,
        torch.flipud,
        lambda x: torch.flip(x, (0, -1)),
        lambda x: x.flip(0),
        lambda x: x.flip(0, 2),
        lambda x: x.repeat(2, 1, 3),
        lambda x: x.repeat(2, 2, 1, 1),
        lambda x: torch.tile(x, (2, 1)),
        lambda x: x.tile(2),
        lambda x: torch.repeat_interleave(x, 2),
        lambda x: torch.repeat_interleave(x, 2, dim=1),
        lambda x: x.repeat_interleave(3, -1),
        torch.tril,
        lambda x: x.triu(1),
        lambda x: x.tril(diagonal=-1),
        lambda x: x.contiguous(),
        lambda x: x.transpose(0, 1).contiguous(),
        lambda x: x.unfold(2, 3, 1),
        lambda x: torch.cumsum(x, 1),
        lambda x: x.cumsum(dim=-1),
        lambda x: x.cumsum(0),
        lambda x: torch.select(x, 1, 2),
        lambda x: x.select(-1, -1),
        lambda x: torch.narrow(x, 2, 1, 2),
        lambda x: x.narrow(-2, 0, 2),
        lambda x: flat(*torch.unbind(x)),
        lambda x: flat(*x.unbind(-1)),
        lambda x: flat(*x.unbind(dim=1)),
        lambda x: flat(*torch.split(x, 2, 2)),
        lambda x: flat(*x.split((1, 2), dim=1)),
        lambda x: flat(*x.split(split_size=1)),
        lambda x: flat(*torch.functional.split(x, 3, -1)),
        lambda x: flat(*torch.chunk(x, 2)),
        lambda x: flat(*x.chunk(3, dim=-1)),
        lambda x: flat(*torch.hsplit(x, 3)),
        lambda x: flat(*torch.vsplit(x, 2)),
        lambda x: flat(*torch.dsplit(x, 2)),
        lambda x: flat(*torch.tensor_split(x, 3, dim=2)),
        lambda x: flat(*list(x)),
        lambda x: flat(*list(x[0])),
        lambda x: x[0],
        lambda x: x[-1, 1:],
        lambda x: x[..., 1],
        lambda x: x[:, None, ::2],
        lambda x: x[:, -1:, ..., None],
        lambda x: x[None],
        lambda x: x[[1, 0, 1]],
        lambda x: x[:, [0, 2], 1],
        lambda x: x[[0, 1], :, [1, 2]],
        lambda x: x[[0, 1], [1, 1], [3, 0]],
        lambda x: x[0, :, [1, 2]],
        lambda x: x[:, None, [0, 1, 1]],
        lambda x: x[torch.tensor([True, False], device=x.device)],
        lambda x: x[torch.tensor([[0, 1], [1, 1]], device=x.device)],
        lambda x: x[:, torch.tensor([0, 2], device=x.device)],
        lambda x: x[:, x[0, :, 0] > -2],
        lambda x: x[()],
        lambda x: torch.take(x, torch.tensor([0, 5, 5, -1], device=x.device)),
        lambda x: x.index_select(2, torch.tensor([0, 3, 3], device=x.device)),
        lambda x: torch.index_select(x, -2, torch.tensor([1], device=x.device)),
        lambda x: torch.gather(x, 2, torch.zeros_like(x[..., :2]).long() + 3),
        lambda x: x.gather(dim=-2, index=torch.ones_like(x).long()),
        lambda x: x.to(torch.float64),
        lambda x: x.to(x.device),
        lambda x: x.cpu().to(x.device),
        lambda x: x.double(),
        lambda x: x.type(torch.float64),
        lambda x: x.type_as(torch.zeros(1, dtype=torch.float64, device=x.device)),
        lambda x: x.resolve_conj().resolve_neg().conj_physical(),
        lambda x: torch.resolve_conj(torch.resolve_neg(torch.conj_physical(x))),
        lambda x: torch.atleast_1d(x[0, 0, 0]),
        torch.atleast_1d,
        lambda x: flat(*torch.broadcast_tensors(x, x[0, 0])),
        lambda x: F.pad(x, (1, 2)),
        lambda x: F.pad(x, (1, 0, 0, 2, 1, 1)),
        lambda x: F.pad(x, (1, -1)),
        lambda x: F.pad(x, (1, 2), value=3.0),
        lambda x: F.pad(x, (1, 2), "constant", 0.0),
        lambda x: F.pad(x, (1, 2), mode="reflect"),
        lambda x: F.pad(x, (1, 2), mode="replicate"),
        lambda x: F.pad(x, (1, 2), mode="circular"),
        lambda x: F.dropout(x, 0.5, False),
        lambda x: x.float(),
        lambda x: x.to(torch.float32),
        lambda x: x.half().double(),
        lambda x: x.bfloat16(),
    ],
    real(2, 3, 4),
    halves=False,
)
for _name in list(CASES)[-4:]:
    CASES[_name] = CASES[_name]._replace(oracle=lambda x: x * 1, rtol=1e-2, fitted=False)
cases(
    "join",
    [
        lambda x, y: torch.cat([x, y]),
        lambda x, y: torch.cat((x, y), dim=-1),
        lambda x, y: torch.cat([x, x.new_zeros(0), y], 1),
        lambda x, y: torch.concat([x, y]),
        lambda x, y: torch.concatenate([x, y, x], 1),
        lambda x, y: torch.stack([x, y]),
        lambda x, y: torch.stack((x, y), -1),
        lambda x, y: torch.stack([x, y, y], dim=1),
        lambda x, y: torch.hstack([x, y]),
        lambda x, y: torch.hstack([x[0], y[0]]),
        lambda x, y: torch.vstack([x, y]),
        lambda x, y: torch.vstack([x[0], y]),
        lambda x, y: torch.row_stack([x, y]),
    ],
    real(2, 3),
    real(2, 3),
)
case("embedding", lambda w, i: F.embedding(i, w), real(5, 3), whole(2, 4, high=5))
case(
    "embedding-padding",
    lambda w, i: F.embedding(i, w, padding_idx=2),
    real(5, 3),
    torch.tensor([2, 0, 2, 4]),
    oracle=lambda w, i: torch.where((i == 2)[:, None], w[i].detach(), w[i]),
    fitted=False,
)
case(
    "embedding-padding-negative",
    lambda w, i: F.embedding(i, w, padding_idx=-1),
    real(5, 3),
    torch.tensor([2, 0, 2, 4]),
    oracle=lambda w, i: torch.where((i == 4)[:, None], w[i].detach(), w[i]),
    fitted=False,
)

# ------------------------------------------------------------------ images and signals

for _n in (1, 2, 3):
    _image = real(2, 4, *[5] * _n)
    _conv, _transposed = getattr(F, f"conv{_n}d"), getattr(F, f"conv_transpose{_n}d")
    _weight = [3, 2, 2][:_n]
    case(f"conv{_n}d", _conv, _image, real(2, 4, *_weight), real(2))
    case(f"conv{_n}d-unbatched", _conv, _image[0], real(2, 4, *_weight))
    case(
        f"conv{_n}d-options",
        functools.partial(_conv, stride=2, padding=1, dilation=2, groups=2),
        _image,
        real(4, 2, *[2] * _n),
        real(4),
    )
    case(f"conv{_n}d-same", functools.partial(_conv, padding="same"), _image, real(2, 4, *_weight))
    case(
        f"conv{_n}d-same-dilated",
        functools.partial(_conv, padding="same", dilation=2),
        _image,
        real(2, 4, *_weight),
    )
    case(
        f"conv{_n}d-valid",
        functools.partial(_conv, padding="valid", stride=2),
        _image,
        real(2, 4, *_weight),
    )
    case(f"conv_transpose{_n}d", _transposed, _image, real(4, 2, *_weight), real(2))
    case(
        f"conv_transpose{_n}d-options",
        functools.partial(_transposed, stride=2, padding=1, output_padding=1, groups=2, dilation=2),
        _image,
        real(4, 2, *[2] * _n),
        real(4),
    )
    case(f"conv_transpose{_n}d-unbatched", _transposed, _image[0], real(4, 2, *_weight))
    _distinct = apart(1, 2, *[4] * _n)
    _max, _avg = getattr(F, f"max_pool{_n}d"), getattr(F, f"avg_pool{_n}d")
    case(f"max_pool{_n}d", lambda x, f=_max: f(x, 2), _distinct)
    case(
        f"max_pool{_n}d-options",
        lambda x, f=_max: f(x, 3, stride=2, padding=1, dilation=1, ceil_mode=True),
        _distinct,
    )
    case(f"max_pool{_n}d-unbatched", lambda x, f=_max: f(x, 2, 1), _distinct[0])
    case(
        f"max_pool{_n}d-indices",
        lambda x, f=_max: f(x, 2, return_indices=True)[0],
        _distinct,
    )
    case(f"avg_pool{_n}d", lambda x, f=_avg: f(x, 2), _image)
    case(
        f"avg_pool{_n}d-options",
        lambda x, f=_avg: f(x, 3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
        _image,
    )
    _adaptive = getattr(F, f"adaptive_avg_pool{_n}d")
    case(f"adaptive_avg_pool{_n}d", lambda x, f=_adaptive: f(x, 2), _image)
_image = real(2, 4, 4, 4)
cases(
    "image",
    [
        lambda x: F.interpolate(x, scale_factor=2),
        lambda x: F.interpolate(x, size=(3, 5), mode="bilinear", align_corners=True),
        lambda x: F.interpolate(x, scale_factor=2, mode="bicubic", align_corners=False),
        lambda x: F.unfold(x, 2),
        lambda x: F.unfold(x, (2, 3), dilation=1, padding=1, stride=2),
        lambda x: F.fold(F.unfold(x, 2), (4, 4), 2),
        lambda x: F.pixel_shuffle(x, 2),
        lambda x: F.pixel_unshuffle(x, 2),
        lambda x: F.dropout2d(x, 0.5, training=False),
    ],
    _image,
)
cases(
    "fft",
    [
        lambda x: torch.view_as_real(torch.fft.fft(x)),
        lambda x: torch.fft.ifft(x, dim=1).imag,
        lambda x: torch.view_as_real(torch.fft.rfft(x, norm="ortho")),
        lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2, n=6),
        lambda x: torch.view_as_real(torch.fft.fft2(x)),
        lambda x: torch.view_as_real(torch.fft.ifft2(x)),
        lambda x: torch.view_as_real(torch.fft.rfft2(x)),
        lambda x: torch.fft.irfft2(torch.fft.rfft2(x)),
        lambda x: torch.view_as_real(torch.fft.fftn(x)),
        lambda x: torch.view_as_real(torch.fft.ifftn(x)),
        torch.fft.fftshift,
    ],
    real(2, 3, 6),
)
cases(
    "complex",
    [
        lambda x: torch.view_as_complex(x) ** 2,
        lambda x: torch.view_as_complex(x).conj() * torch.view_as_complex(x),
        lambda x: (torch.view_as_complex(x) * 1j).exp(),
        lambda x: torch.conj(torch.view_as_complex(x).sin()),
        lambda x: torch.view_as_complex(x).exp().real,
        lambda x: torch.real(torch.view_as_complex(x).exp()),
        lambda x: torch.imag(torch.view_as_complex(x).exp()),
        lambda x: torch.view_as_complex(x).exp().imag,
        lambda x: torch.view_as_real(torch.view_as_complex(x).tanh()),
        lambda x: torch.view_as_complex(x).mH @ torch.view_as_complex(x),
        lambda x: torch.view_as_complex(x).H @ torch.view_as_complex(x).cosh(),
        lambda x: torch.adjoint(torch.view_as_complex(x)) * 2,
        lambda x: torch.einsum("ij,kj->ik", torch.view_as_complex(x), torch.view_as_complex(x)),
        lambda x: (torch.view_as_complex(x) + 2).log(),
        lambda x: (torch.view_as_complex(x) + 2).sqrt() / (torch.view_as_complex(x) + 3),
        lambda x: (torch.view_as_complex(x) + 2) ** 1.5,
        lambda x: (torch.view_as_complex(x) + 2).atan(),
    ],
    real(2, 3, 2),
)

# ------------------------------------------------------------------ contractions

_LEFT = {1: (3,), 2: (2, 3), 3: (4, 2, 3), 4: (5, 4, 2, 3)}
_RIGHT = {1: (3,), 2: (3, 2), 3: (4, 3, 2), 4: (5, 4, 3, 2)}
for _m, _n in itertools.product(_LEFT, _RIGHT):
    case(f"matmul-{_m}-{_n}", torch.matmul, real(*_LEFT[_m]), real(*_RIGHT[_n]))
case("matmul-operator", lambda x, y: x @ y, real(2, 3), real(3, 4))
case("matmul-method", Tensor.matmul, real(2, 3), real(3, 4))
case("matmul-broadcast", torch.matmul, real(5, 1, 2, 3), real(4, 3, 2))
case("matmul-broadcast-right", torch.matmul, real(1, 2, 3), real(4, 3, 2))
case("matmul-itself", lambda x: x @ x.mT @ x, real(2, 3))
# The right one has more coefficients than the left one.
case("matmul-curved", lambda x, y: torch.matmul(x, y.exp()), real(2, 3), real(3, 4))
case("matmul-curved-batch", lambda x, y: torch.matmul(x, y.exp()), real(2, 3), real(5, 3, 4))
case("matmul-curved-both", lambda x, y: torch.matmul(x.sin(), y.exp()), real(4, 2, 3), real(3, 4))
case("bmm", torch.bmm, real(4, 2, 3), real(4, 3, 2))
case("mm", torch.mm, real(2, 3), real(3, 4))
case("mv", torch.mv, real(2, 3), real(3))
case("dot", torch.dot, real(3), real(3))
case("inner", torch.inner, real(3), real(3))
case("inner-matrices", torch.inner, real(2, 3), real(4, 3))
case("outer", torch.outer, real(2), real(3))
case("ger", torch.ger, real(2), real(3))
case("linear", F.linear, real(5, 3), real(2, 3), real(2))
case("linear-no-bias", F.linear, real(4, 5, 3), real(2, 3))
case("linear-vector", F.linear, real(3), real(2, 3), real(2))
case("linear-one-output", F.linear, real(5, 3), real(3))
case("linear-batch", F.linear, real(4, 5, 3), real(2, 3), real(2))
case(
    "linear-curved", lambda x, w, b: F.linear(x.sin(), w.exp(), b), real(5, 3), real(2, 3), real(2)
)
case("addmm", torch.addmm, real(2, 4), real(2, 3), real(3, 4))
case(
    "addmm-factors",
    lambda x, a, b: torch.addmm(x, a, b, beta=0.5, alpha=-2),
    real(4),
    real(2, 3),
    real(3, 4),
)
case("baddbmm", torch.baddbmm, real(5, 2, 4), real(5, 2, 3), real(5, 3, 4))
case("addmv", torch.addmv, real(2), real(2, 3), real(3))
case("tensordot", torch.tensordot, real(2, 3, 4), real(3, 4, 5))
case("tensordot-one", lambda x, y: torch.tensordot(x, y, dims=1), real(2, 3), real(3, 4, 2))
case(
    "tensordot-lists",
    lambda x, y: torch.tensordot(x, y, dims=([2, 0], [0, 1])),
    real(2, 3, 4),
    real(4, 2, 5),
)
case("tensordot-outer", lambda x, y: torch.tensordot(x, y, dims=0), real(2), real(3))
case(
    "bilinear",
    F.bilinear,
    real(5, 2),
    real(5, 3),
    real(4, 2, 3),
    oracle=lambda x, y, w: torch.einsum("bi,oij,bj->bo", x, w, y),
)
case(
    "bilinear-bias",
    F.bilinear,
    real(2, 5, 2),
    real(2, 5, 3),
    real(4, 2, 3),
    real(4),
    oracle=lambda x, y, w, b: torch.einsum("cbi,oij,cbj->cbo", x, w, y) + b,
)
for _equation, *_shapes in (
    ("ij,jk->ik", (2, 3), (3, 4)),
    ("ij,jk", (2, 3), (3, 4)),
    ("ij,jk->ki", (2, 3), (3, 4)),
    ("ij, kj -> ik", (2, 3), (4, 3)),
    ("ba", (2, 3)),
    ("ij->ji", (2, 3)),
    ("ij->", (2, 3)),
    ("ij->i", (2, 3)),
    ("ii->i", (3, 3)),
    ("ii", (3, 3)),
    ("i,i", (3,), (3,)),
    ("i,j->ji", (2,), (3,)),
    ("ij,ij->ij", (2, 3), (2, 3)),
    ("ij,ij->", (2, 3), (2, 3)),
    ("iij,jk->ik", (2, 2, 3), (3, 4)),
    ("ij,kk->i", (2, 3), (2, 2)),
    ("ij,kl->il", (2, 3), (2, 4)),
    ("bi,oij,bj->bo", (5, 2), (4, 2, 3), (5, 3)),
    ("bhqd,bhkd->bhqk", (2, 2, 3, 4), (2, 2, 5, 4)),
    ("ab,bc,cd,da->ac", (2, 3), (3, 2), (2, 4), (4, 2)),
    ("ab,bc,cd", (2, 3), (3, 2), (2, 4)),
    ("i,i,i->i", (3,), (3,), (3,)),
    ("Ab,bC->CA", (2, 3), (3, 4)),
):
    case(
        f"einsum-{_equation}",
        lambda *operands, e=_equation: torch.einsum(e, *operands),
        *[real(*shape) for shape in _shapes],
    )
case("einsum-list", lambda x, y: torch.einsum("ij,jk->ik", [x, y]), real(2, 3), real(3, 4))
case("einsum-curved", lambda x, y: torch.einsum("ij,jk", x, y.exp()), real(2, 3), real(3, 4))

# ------------------------------------------------------------------ reductions

cases(
    "reduction",
    [
        torch.sum,
        lambda x: x.sum(1),
        lambda x: torch.sum(x, (0, -1), keepdim=True),
        lambda x: x.sum(dim=-2),
        lambda x: x.sum(0, True),
        lambda x: x.sum(dim=(), keepdim=False),
        lambda x: x.sum(dtype=torch.float64),
        lambda x: x[0, 0, 0].sum(),
        torch.mean,
        lambda x: x.mean(1),
        lambda x: torch.mean(x, (0, -1), keepdim=True),
        lambda x: x.mean(dim=-2, dtype=torch.float64),
        lambda x: x[0, 0, 0].mean(),
        torch.prod,
        lambda x: torch.prod(x, 1),
        lambda x: x.prod(dim=-1, keepdim=True),
        lambda x: x.prod(0),
        lambda x: x.prod(dtype=torch.float64),
        lambda x: torch.logsumexp(x, 1),
        lambda x: torch.logsumexp(x, (0, -1)),
        lambda x: torch.logsumexp(x, (-2, 0), keepdim=True),
        lambda x: x.logsumexp(dim=-1, keepdim=True),
        lambda x: torch.special.logsumexp(x, 0),
        lambda x: torch.softmax(x, 1),
        lambda x: x.softmax(-1),
        lambda x: x.softmax(dim=0),
        lambda x: F.softmax(x, dim=1),
        lambda x: F.softmax(x, -1, dtype=torch.float64),
        lambda x: torch.special.softmax(x, 0),
        lambda x: torch.log_softmax(x, 1),
        lambda x: x.log_softmax(-1),
        lambda x: F.log_softmax(x, dim=0),
        lambda x: F.log_softmax(x, dim=-2, dtype=torch.float64),
        lambda x: torch.special.log_softmax(x, 2),
        lambda x: F.softmin(x, dim=1),
        torch.linalg.vector_norm,
        lambda x: torch.linalg.vector_norm(x, dim=1),
        lambda x: torch.linalg.vector_norm(x, 2, (0, -1), True),
        lambda x: torch.linalg.vector_norm(x, 3, -1),
        lambda x: torch.linalg.vector_norm(x, 2.5, dim=0, keepdim=True),
        lambda x: torch.linalg.vector_norm(x, ord=2, dtype=torch.float64),
        torch.norm,
        lambda x: torch.norm(x, dim=1),
        lambda x: torch.norm(x, 3, -1, True),
        lambda x: x.norm(),
        lambda x: x.norm(2, dim=(0, 1)),
        lambda x: x.norm("fro"),
        torch.linalg.norm,
        lambda x: torch.linalg.norm(x, dim=1),
        lambda x: torch.linalg.norm(x[0], "fro"),
        lambda x: torch.linalg.norm(x[0, 0], 3),
        lambda x: torch.linalg.norm(x, 3, 1, True),
        F.normalize,
        lambda x: F.normalize(x, dim=-1),
        lambda x: F.normalize(x, 3.0, 0),
        lambda x: F.normalize(x, eps=10.0),
    ],
    positive(2, 3, 4),
    halves=False,
)
cases(
    "variance",
    [
        torch.var,
        lambda x: torch.var(x, 1),
        lambda x: x.var(dim=(0, -1), keepdim=True),
        lambda x: torch.var(x, 1, unbiased=False),
        lambda x: torch.var(x, False),
        lambda x: torch.var(x, dim=1, correction=2),
        lambda x: x.var(correction=0),
        torch.std,
        lambda x: x.std(1),
        lambda x: torch.std(x, dim=-1, correction=0, keepdim=True),
        lambda x: flat(*torch.var_mean(x)),
        lambda x: flat(*torch.var_mean(x, 1)),
        lambda x: flat(*torch.var_mean(x, dim=(0, 2), correction=0, keepdim=True)),
        lambda x: flat(*torch.var_mean(x, False)),
    ],
    positive(2, 3, 4) + torch.arange(24).reshape(2, 3, 4) % 5,
    halves=False,
)
cases(
    "norm",
    [
        lambda x: torch.linalg.vector_norm(x, 1),
        lambda x: torch.linalg.vector_norm(x, 1, -1),
        lambda x: torch.linalg.vector_norm(x, math.inf),
        lambda x: torch.linalg.vector_norm(x, math.inf, 1, True),
        lambda x: torch.norm(x, 1),
        lambda x: x.norm(math.inf, 0),
        lambda x: torch.linalg.norm(x, 1, 0),
        lambda x: torch.linalg.vector_norm(x, 0) * x,
        lambda x: torch.linalg.vector_norm(x, -math.inf, 0),
        lambda x: torch.linalg.vector_norm(x, 0.5, 1),
    ],
    apart(3, 4),
)
case("cosine_similarity", F.cosine_similarity, real(2, 3), real(2, 3))
case("cosine_similarity-dim", lambda x, y: F.cosine_similarity(x, y, dim=0), real(4, 3), real(4, 3))
case("cosine_similarity-broadcast", lambda x, y: F.cosine_similarity(x, y, -1), real(4, 3), real(3))

# ------------------------------------------------------------------ normalization


def standardized(x: Tensor, dims: Any, eps: float = 1e-5) -> Tensor:
    centered = x - x.sum(dims, True) / (x.numel() / x.sum(dims).numel())
    variance = (centered * centered).sum(dims, True) / (x.numel() / x.sum(dims).numel())
    return centered / (variance + eps).sqrt()


def by_channel(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    shape = (-1, *[1] * (x.ndim - 2))
    return x * w.reshape(shape) + b.reshape(shape)


case(
    "layer_norm",
    lambda x: F.layer_norm(x, (4,)),
    real(2, 3, 4),
    oracle=lambda x: standardized(x, (-1,)),
)
case(
    "layer_norm-affine",
    lambda x, w, b: F.layer_norm(x, (3, 4), w, b, 0.1),
    real(2, 3, 4),
    real(3, 4),
    real(3, 4),
    oracle=lambda x, w, b: standardized(x, (-2, -1), 0.1) * w + b,
)
case(
    "layer_norm-weight",
    lambda x, w: F.layer_norm(x, [4], weight=w),
    real(2, 4),
    real(4),
    oracle=lambda x, w: standardized(x, (-1,)) * w,
)
case(
    "rms_norm",
    lambda x: F.rms_norm(x, (4,)),
    real(2, 4),
    oracle=lambda x: x / ((x * x).sum(-1, True) / 4 + torch.finfo(x.dtype).eps).sqrt(),
)
case(
    "rms_norm-weight",
    lambda x, w: F.rms_norm(x, (3, 4), w, 0.1),
    real(2, 3, 4),
    real(3, 4),
    oracle=lambda x, w: x / ((x * x).sum((-1, -2), True) / 12 + 0.1).sqrt() * w,
)
case(
    "group_norm",
    lambda x, w, b: F.group_norm(x, 2, w, b, 0.01),
    real(2, 4, 3),
    real(4),
    real(4),
    oracle=lambda x, w, b: by_channel(
        standardized(x.reshape(2, 2, 6), (-1,), 0.01).reshape(x.shape), w, b
    ),
)
case(
    "group_norm-plain",
    lambda x: F.group_norm(x, 4),
    real(2, 4, 3, 2),
    oracle=lambda x: standardized(x, (-1, -2)),
)
case(
    "batch_norm",
    F.batch_norm,
    real(2, 3, 4),
    real(3),
    positive(3),
    real(3),
    real(3),
    fixed=(1, 2),
)
case(
    "batch_norm-plain",
    lambda x, m, s: F.batch_norm(x, m, s, eps=0.1),
    real(5, 3),
    real(3),
    positive(3),
    fixed=(1, 2),
)
case(
    "instance_norm",
    F.instance_norm,
    real(2, 3, 4),
    oracle=lambda x: standardized(x, (-1,)),
)
case(
    "instance_norm-affine",
    lambda x, w, b: F.instance_norm(x, weight=w, bias=b, eps=0.1),
    real(2, 3, 4, 2),
    real(3),
    real(3),
    oracle=lambda x, w, b: by_channel(standardized(x, (-1, -2), 0.1), w, b),
)

# ------------------------------------------------------------------ attention


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, scale: float = 0.5
) -> Tensor:
    scores = q @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask
    weights = (scores - scores.detach().amax(-1, keepdim=True)).exp()
    return weights / weights.sum(-1, True) @ v


def added(mask: Tensor, like: Tensor) -> Tensor:
    """Of a mask that is true where one may look."""
    return torch.zeros_like(like[..., :1]).expand(mask.shape).masked_fill(~mask, -math.inf)


_QKV = (real(2, 2, 3, 4), real(2, 2, 5, 4), real(2, 2, 5, 6))
_SQUARE = (real(2, 2, 3, 4), real(2, 2, 3, 4), real(2, 2, 3, 4))
_SEEN = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 0, 0], [0, 1, 0, 1, 1]]).bool()
_CAUSAL = torch.zeros(3, 3).double().masked_fill(torch.ones(3, 3).bool().triu(1), -math.inf)
_sdpa = F.scaled_dot_product_attention
case("attention", _sdpa, *_QKV, oracle=attention)
case(
    "attention-causal",
    lambda q, k, v: _sdpa(q, k, v, is_causal=True),
    *_SQUARE,
    oracle=lambda q, k, v: attention(q, k, v, _CAUSAL.to(q)),
)
case(
    "attention-mask",
    lambda q, k, v, m: _sdpa(q, k, v, attn_mask=m),
    *_QKV,
    _SEEN,
    oracle=lambda q, k, v, m: attention(
        q, k, v, torch.zeros(3, 5).to(q).masked_fill(~m, -math.inf)
    ),
)
case("attention-float-mask", _sdpa, *_QKV, real(3, 5), oracle=attention, fixed=(3,))
case("attention-followed-mask", _sdpa, *_QKV, real(2, 1, 3, 5), oracle=attention)
case(
    "attention-scale",
    lambda q, k, v: _sdpa(q, k, v, scale=0.3),
    *_QKV,
    oracle=lambda q, k, v: attention(q, k, v, scale=0.3),
)
case(
    "attention-gqa",
    lambda q, k, v: _sdpa(q, k, v, enable_gqa=True),
    real(2, 4, 3, 4),
    real(2, 2, 5, 4),
    real(2, 2, 5, 4),
    oracle=lambda q, k, v: attention(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)),
)
case("attention-one-head", _sdpa, real(3, 4), real(5, 4), real(5, 4), oracle=attention)

# ------------------------------------------------------------------ losses

_TARGET = (0.02 * real(2, 4), apart(2, 4))
_HUBER = (F.huber_loss, F.smooth_l1_loss)


def huber(x: Tensor, y: Tensor, delta: float = 1.0, reduction: str = "mean") -> Tensor:
    far = (x - y).abs()
    loss = torch.where(far > delta, delta * (far - delta / 2), far * far / 2)
    total = loss.sum() / (loss.numel() if reduction == "mean" else 1)
    return loss if reduction == "none" else total


for _name, _loss, _tensors in (
    ("mse_loss", F.mse_loss, (real(2, 3), real(2, 3))),
    ("l1_loss", F.l1_loss, tuple(apart(2, 2, 3).unbind())),
    ("huber_loss", F.huber_loss, (apart(2, 4), 0.02 * real(2, 4))),
    ("smooth_l1_loss", F.smooth_l1_loss, (apart(2, 4), 0.02 * real(2, 4))),
    ("binary_cross_entropy", F.binary_cross_entropy, (0.5 + real(2, 3) / 6, 0.5 + real(2, 3) / 6)),
    ("binary_cross_entropy_with_logits", F.binary_cross_entropy_with_logits, (real(4), real(4))),
    ("kl_div", F.kl_div, (real(2, 3), positive(2, 3))),
):
    for _reduction in ("mean", "sum", "none"):
        case(
            f"{_name}-{_reduction}",
            functools.partial(_loss, reduction=_reduction),
            *_tensors,
            # fused, they have no forward mode
            oracle=functools.partial(huber, reduction=_reduction) if _loss in _HUBER else None,
            fixed=(1,) if _loss in _HUBER else (),  # so that errors stay off the kinks
        )
case(
    "mse_loss-weight",
    lambda x, y, w: F.mse_loss(x, y, weight=w),
    real(2, 3),
    real(2, 3),
    positive(2, 3),
)
case(
    "mse_loss-weight-none",
    lambda x, y, w: F.mse_loss(x, y, reduction="none", weight=w),
    *(real(2, 3), real(2, 3), positive(2, 3)),
)
case(
    "huber_loss-weight",
    lambda x, y, w: F.huber_loss(x, y, weight=w),
    *(apart(2, 4), 0.02 * real(2, 4), positive(2, 4)),
    fixed=(1,),
    oracle=lambda x, y, w: (huber(x, y, reduction="none") * w).mean(),  # not by the weights
)
case("huber_loss-target", lambda y, x: F.huber_loss(x, y), *_TARGET, fixed=(1,), oracle=huber)
case(
    "smooth_l1_loss-target", lambda y, x: F.smooth_l1_loss(x, y), *_TARGET, fixed=(1,), oracle=huber
)
case(
    "huber_loss-delta",
    lambda x: F.huber_loss(x, torch.zeros_like(x), delta=0.5),
    apart(2, 4),
    oracle=lambda x: huber(x, torch.zeros_like(x), 0.5),
)
case(
    "smooth_l1_loss-beta",
    lambda x: F.smooth_l1_loss(x, torch.zeros_like(x), beta=0.5),
    apart(2, 4),
    oracle=lambda x: huber(x, torch.zeros_like(x), 0.5) / 0.5,
)
case(
    "smooth_l1_loss-zero", lambda x: F.smooth_l1_loss(x, torch.zeros_like(x), beta=0.0), apart(2, 4)
)
case(
    "bce-weight",
    lambda x, y, w: F.binary_cross_entropy(x, y, weight=w),
    *(0.5 + real(2, 3) / 6, 0.5 + real(2, 3) / 6, positive(3)),
    fixed=(1, 2),
)
case(
    "bce_with_logits-weights",
    lambda x, y, w, p: F.binary_cross_entropy_with_logits(x, y, weight=w, pos_weight=p),
    *(real(2, 3), real(2, 3), positive(3), positive(3)),
    oracle=lambda x, y, w, p: (
        (-w * (p * y * -(1 + (-x).exp()).log() - (1 - y) * (1 + x.exp()).log())).sum() / 6
    ),
)
case(
    "kl_div-batchmean",
    lambda x, y: F.kl_div(x, y, reduction="batchmean"),
    real(2, 3),
    positive(2, 3),
)
case("kl_div-log_target", lambda x, y: F.kl_div(x, y, log_target=True), real(2, 3), real(2, 3))

cases(
    "deprecated",
    [
        lambda x, y: F.mse_loss(x, y, reduce=False),
        lambda x, y: F.mse_loss(x, y, size_average=False),
    ],
    real(2, 3),
    real(2, 3),
)

_LABELS = torch.tensor([2, 0, 1, 2, 2])


def nll(
    logs: Tensor,
    labels: Tensor,
    weight: Tensor | None = None,
    ignore: int | None = None,
    reduction: str = "mean",
    smoothing: float = 0.0,
) -> Tensor:
    """With the labels as rows of zeros and ones."""
    weight = torch.ones_like(logs[0]) if weight is None else weight
    ones = F.one_hot(labels, logs.shape[-1]).to(weight.dtype)
    kept = torch.ones_like(ones[:, 0]) if ignore is None else (labels != ignore).to(ones)
    of_label = ones * weight * kept[:, None]
    spread = weight * kept[:, None] * (smoothing / logs.shape[-1])
    loss = -(logs * ((1 - smoothing) * of_label + spread)).sum(-1)
    if reduction == "none":
        return loss
    return loss.sum() / (1 if reduction == "sum" else of_label.sum())


def logs_of(x: Tensor) -> Tensor:
    return x - x.exp().sum(-1, True).log()


for _reduction in ("mean", "sum", "none"):
    for _ignore in (None, 2):
        for _weighted in (False, True):
            _options = {"ignore_index": -100 if _ignore is None else _ignore}
            _weights = (positive(3),) if _weighted else ()
            _tag = f"{_reduction}{'' if _ignore is None else '-ignore'}{'-weight' * _weighted}"

            def _unpacked(
                x: Tensor, y: Tensor, *w: Tensor, loss: Any, options: dict[str, Any]
            ) -> Tensor:
                return loss(x, y, w[0] if w else None, **options)

            case(
                f"nll_loss-{_tag}",
                functools.partial(
                    _unpacked, loss=F.nll_loss, options=_options | {"reduction": _reduction}
                ),
                *(real(5, 3), _LABELS, *_weights),
                fixed=(2,),
                oracle=functools.partial(
                    _unpacked, loss=nll, options={"ignore": _ignore, "reduction": _reduction}
                ),
            )
            for _smoothing in (0.0, 0.2):
                case(
                    f"cross_entropy-{_tag}{'-smooth' if _smoothing else ''}",
                    functools.partial(
                        _unpacked,
                        loss=F.cross_entropy,
                        options=_options | {"reduction": _reduction, "label_smoothing": _smoothing},
                    ),
                    *(real(5, 3), _LABELS, *_weights),
                    fixed=(2,),
                    oracle=functools.partial(
                        lambda x, y, *w, options: nll(
                            logs_of(x), y, w[0] if w else None, **options
                        ),
                        options={
                            "ignore": _ignore,
                            "reduction": _reduction,
                            "smoothing": _smoothing,
                        },
                    ),
                )
case("nll_loss-one", F.nll_loss, real(3), torch.tensor(1))
case("nll_loss-pixels", F.nll_loss, real(2, 3, 4), whole(2, 4, high=3))
case("cross_entropy-one", F.cross_entropy, real(3), torch.tensor(1))
case("cross_entropy-pixels", F.cross_entropy, real(2, 3, 2, 2), whole(2, 2, 2, high=3))
case(
    "cross_entropy-pixels-smooth",
    lambda x, y, w: F.cross_entropy(x, y, w, label_smoothing=0.1),
    real(2, 3, 4),
    whole(2, 4, high=3),
    positive(3),
    fixed=(2,),
)
for _reduction in ("mean", "sum", "none"):
    case(
        f"cross_entropy-probabilities-{_reduction}",
        lambda x, y, w, r=_reduction: F.cross_entropy(
            x, y, weight=w, reduction=r, label_smoothing=0.1
        ),
        *(real(2, 3, 4), positive(2, 3, 4), positive(3)),
        fixed=(2,),
    )

# ------------------------------------------------------------------ the library's own Functions

case(
    "library-linear",
    CustomAutogradFunction.apply,
    real(5, 3),
    real(2, 3),
    oracle=lambda x, w: x @ w.T,
)
case(
    "library-log1mexp", lambda x: log1mexp(-x), positive(3), oracle=lambda x: (1 - (-x).exp()).log()
)
case("library-safe_sqrt", safe_sqrt, positive(3), oracle=lambda x: x.sqrt())
case("library-safe_norm", safe_norm, real(2, 3), oracle=lambda x: (x * x).sum().sqrt())
case(
    "library-safe_norm-dim",
    lambda x: safe_norm(x, 0, True),
    real(2, 3),
    oracle=lambda x: (x * x).sum(0, True).sqrt(),
)
case(
    "library-straight_through",
    lambda x: straight_through(x, torch.round) * x,
    apart(4) / 3,
    oracle=lambda x: (x + (x.round() - x).detach()) * x,
    fitted=False,
)
case("library-relu", low_memory_relu, apart(4), oracle=F.relu)
case("library-gelu", low_memory_gelu, real(4), oracle=F.gelu)
case(
    "library-gelu-tanh",
    lambda x: low_memory_gelu(x, "tanh"),
    real(4),
    oracle=lambda x: F.gelu(x, approximate="tanh"),
)
case("library-silu", low_memory_silu, real(4), oracle=F.silu)


# ------------------------------------------------------------------ matrix equations


def det2(m: Tensor) -> Tensor:
    return m[0, 0] * m[1, 1] - m[0, 1] * m[1, 0]


def inv2(m: Tensor) -> Tensor:
    return torch.stack([m[1, 1], -m[0, 1], -m[1, 0], m[0, 0]]).reshape(2, 2) / det2(m)


def cholesky2(m: Tensor) -> Tensor:
    first = m[0, 0].sqrt()
    below = m[1, 0] / first
    return torch.stack([first, 0 * first, below, (m[1, 1] - below * below).sqrt()]).reshape(2, 2)


_SQUARE = torch.eye(2).double() * 2 + real(2, 2) / 2
case("linalg_det", torch.linalg.det, _SQUARE, oracle=det2)
case("logdet", torch.logdet, _SQUARE, oracle=lambda m: det2(m).log())
case(
    "slogdet",
    lambda m: flat(*torch.linalg.slogdet(-m)),
    _SQUARE,
    oracle=lambda m: flat(det2(m) / det2(m), det2(m).log()),
)
case("linalg_inv", torch.linalg.inv, _SQUARE, oracle=inv2)
case("linalg_cholesky", torch.linalg.cholesky, _SQUARE, oracle=cholesky2)
case("solve", torch.linalg.solve, _SQUARE, real(2, 3), oracle=lambda m, b: inv2(m) @ b)
case("solve-vector", torch.linalg.solve, _SQUARE, real(2), oracle=lambda m, b: inv2(m) @ b)
for _name, (_alias, _tested) in {
    "det": (torch.det, torch.linalg.det),
    "inverse": (torch.inverse, torch.linalg.inv),
}.items():
    SPELLINGS[_name] = _alias, _tested, (_SQUARE,)
case("slogdet-alias", lambda m: torch.slogdet(m)[1], _SQUARE, oracle=lambda m: det2(m).log())
case("einsum-ellipsis", lambda x, y: torch.einsum("...i,...ij", x, y), real(3, 2), real(3, 2, 4))
case(
    "baddbmm-names",
    lambda x, a, b: torch.baddbmm(input=x, batch1=a, batch2=b, beta=2),
    *(real(2, 3, 3), real(2, 3, 4), real(2, 4, 3)),
)
case("atan2", torch.atan2, real(2, 3), positive(2, 3))
SPELLINGS["arctan2"] = torch.arctan2, torch.atan2, (real(2, 3), positive(2, 3))
case(
    "sinc",
    torch.sinc,
    torch.tensor([0.0, 1e-3, 0.2, 0.31, 0.33, 2.0]).double(),
    oracle=lambda x: sum(
        (-1) ** n * (math.pi * x) ** (2 * n) / float(math.factorial(2 * n + 1)) for n in range(24)
    ),
)
SPELLINGS["special.sinc"] = torch.special.sinc, torch.sinc, (real(2, 3),)
case("fmin", torch.fmin, *apart(2, 2, 3).unbind())
case("nanmedian", lambda x: torch.nanmedian(x, 1).values, apart(3, 5))
case("bincount", lambda x: x * torch.bincount(x.long())[0], apart(4).abs())
cases(
    "pooling",
    [
        lambda x: F.adaptive_max_pool1d(x[0, 0, 0], 2),
        lambda x: F.adaptive_max_pool1d(x[0, 0, 0], 2, return_indices=True)[0],
        lambda x: F.adaptive_max_pool2d(x[0, 0], 2, return_indices=True)[0],
        lambda x: F.adaptive_max_pool3d(x, 2),
        lambda x: F.adaptive_max_pool3d(x, 2, return_indices=True)[0],
        lambda x: F.fractional_max_pool2d(
            x[0, :, 0], 2, 2, return_indices=True, _random_samples=_DRAWN[..., :2]
        )[0],
        lambda x: F.fractional_max_pool3d(x, 2, 2, _random_samples=_DRAWN),
        lambda x: F.fractional_max_pool3d(x, 2, 2, return_indices=True, _random_samples=_DRAWN)[0],
    ],
    apart(1, 1, 4, 4, 4),
    halves=False,
)
_DRAWN = torch.tensor([[[0.3, 0.6, 0.2]]]).double()


# ------------------------------------------------------------------ the oracles


class Prepared(NamedTuple):
    function: Function  # of the followed tensors alone
    oracle: Function
    x: dict[str, Tensor]
    v: dict[str, Tensor]

    def along(self, t: Any, function: Function | None = None) -> Tensor:
        return (function or self.function)({k: self.x[k] + t * self.v[k] for k in self.x})

    def derivatives(self, device: str, order: int = ORDER) -> list[Tensor]:
        return nested(functools.partial(self.along, function=self.oracle), order, device)


def floats(of: Case) -> list[int]:
    return [i for i, t in enumerate(of.tensors) if t.is_floating_point() and i not in of.fixed]


def subsets(of: Case) -> list[tuple[int, ...]]:
    """Which tensors are followed: all, or one and the others constant."""
    places = floats(of)
    return list(dict.fromkeys([tuple(places), *[(i,) for i in places]]))


def prepared(
    name: str, followed: tuple[int, ...], device: str, dtype: torch.dtype = torch.float64
) -> Prepared:
    of = CASES[name]
    draws = torch.Generator().manual_seed(len(name))
    tensors = [t.to(device, dtype if t.is_floating_point() else t.dtype) for t in of.tensors]

    def bound(function: Function) -> Function:
        def call(x: dict[str, Tensor]) -> Tensor:
            return function(*[x.get(str(i), t) for i, t in enumerate(tensors)])

        return call

    x = {str(i): tensors[i] for i in followed}
    v = {
        k: (2 * torch.rand(t.shape, generator=draws, dtype=torch.float64) - 1).to(device, dtype)
        for k, t in x.items()
    }
    return Prepared(bound(of.function), bound(of.oracle or of.function), x, v)


def as_real(y: Tensor) -> Tensor:
    return torch.stack([y.real, y.imag]) if y.is_complex() else y


@functools.cache
def expected_of(name: str, device: str) -> list[Tensor]:
    """Every tensor followed, by the oracle."""
    return prepared(name, subsets(CASES[name])[0], device).derivatives(device)


@pytest.mark.parametrize("name", [name for name, of in CASES.items() if of.fitted])
def test_the_oracle_agrees_with_a_fit_of_pytorchs_values(name: str) -> None:
    # of the values as PyTorch computes them, not of those of the oracle
    point = prepared(name, subsets(CASES[name])[0], "cpu")
    assert_near(expected_of(name, "cpu"), fitted(point.along, ORDER), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_rule(name: str, device: str) -> None:
    check_derivatives(name, device)
    check_lower_orders(name, device)
    if CASES[name].halves:
        check_float32(name, device)
    if CASES[name].rtol < 1e-6:  # not where it rounds to few digits
        check_laplacian(name, device)
        if CASES[name].fitted:
            check_gradients(name, device)


def check_derivatives(name: str, device: str) -> None:
    of = CASES[name]
    for followed in subsets(of):
        point = prepared(name, followed, device)
        derivatives = jet(point.function, point.x, point.v, ORDER)
        value = point.function(point.x)
        assert all(d.dtype == value.dtype and d.device == value.device for d in derivatives)
        assert not any(isinstance(d, dispatch.Jet) for d in derivatives)
        assert_near(derivatives[:1], [value], max(1e-14, 1e-5 * of.rtol))
        if followed == subsets(of)[0]:
            assert_near(derivatives, expected_of(name, device), of.rtol)
        elif of.fitted:
            expected = fitted(point.along, ORDER)
            assert_near(derivatives, expected, 1e-5, f"following {followed} alone")


def check_lower_orders(name: str, device: str) -> None:
    point = prepared(name, subsets(CASES[name])[0], device)
    derivatives = jet(point.function, point.x, point.v, ORDER)
    for order in range(ORDER):
        fewer = jet(point.function, point.x, point.v, order)
        assert_near(fewer, derivatives[: order + 1], 1e-12, f"of only {order}")


def check_float32(name: str, device: str) -> None:
    followed = subsets(CASES[name])[0]
    point, exact = (prepared(name, followed, device, d) for d in (torch.float32, torch.float64))
    derivatives = jet(point.function, point.x, point.v, 3)
    value = point.function(point.x)
    assert all(d.dtype == value.dtype for d in derivatives)
    assert_near(derivatives, jet(exact.function, exact.x, exact.v, 3), 2e-4, "in float32")


def check_laplacian(name: str, device: str) -> None:
    """In a plane of three directions, against the sum of the second derivatives along each."""
    point = prepared(name, subsets(CASES[name])[0], device)
    draws = torch.Generator().manual_seed(3)
    directions = [{k: drawn(t, draws) for k, t in point.x.items()} for _ in range(3)]

    def scalar(x: dict[str, Tensor]) -> Tensor:
        y = as_real(point.function(x))
        weights = torch.arange(1.0, 1.0 + y.numel(), dtype=torch.float64, device=device)
        return (y * weights.reshape(y.shape) / y.numel()).sum()

    def plane(s: Tensor) -> Tensor:
        return scalar(
            {k: t + sum(s[i] * d[k] for i, d in enumerate(directions)) for k, t in point.x.items()}
        )

    expected = sum(jet(scalar, point.x, d, 2)[2] for d in directions)
    got = laplacian(plane, torch.zeros(3, dtype=torch.float64, device=device))
    assert_near([got], [expected], 1e-9, "of the laplacian")


def drawn(like: Tensor, draws: torch.Generator) -> Tensor:
    return (2 * torch.rand(like.shape, generator=draws, dtype=torch.float64) - 1).to(like.device)


def check_gradients(name: str, device: str) -> None:
    """With respect to x, v and the constants, along one direction in all of these."""
    of, order = CASES[name], 2
    places = floats(of)
    for followed in subsets(of)[:3]:
        point, draws = prepared(name, followed, device), torch.Generator().manual_seed(1)
        leaves = [of.tensors[i].to(device) for i in places] + list(point.v.values())
        steps = [drawn(t, draws) for t in leaves]
        scalar = functools.partial(weighted_jet, of, followed, places, order)
        moving = [t.detach().clone().requires_grad_() for t in leaves]
        y, got = scalar(moving), torch.zeros((), dtype=torch.float64, device=device)
        if y.requires_grad:
            gradients = torch.autograd.grad(y, moving, materialize_grads=True)
            got = sum(((g * s).sum() for g, s in zip(gradients, steps, strict=True)), got)

        def phi(
            t: float, leaves: list[Tensor] = leaves, steps: list[Tensor] = steps, f: Any = scalar
        ) -> Tensor:
            return f([x + t * s for x, s in zip(leaves, steps, strict=True)])

        expected = fitted(phi, 1, SMALL_FIT)[1:]
        assert_near([got], expected, 1e-6, f"of the gradient following {followed}")


def weighted_jet(
    of: Case, followed: tuple[int, ...], places: list[int], order: int, leaves: list[Tensor]
) -> Tensor:
    """A weighted sum of all derivatives, of the tensors at `places` and then the directions."""
    tensors = [t.to(leaves[0].device) for t in of.tensors]
    for i, leaf in zip(places, leaves, strict=False):
        tensors[i] = leaf
    x = {str(i): tensors[i] for i in followed}
    v = dict(zip(x, leaves[len(places) :], strict=True))

    def function(x: dict[str, Tensor]) -> Tensor:
        return of.function(*[x.get(str(i), t) for i, t in enumerate(tensors)])

    draws = torch.Generator().manual_seed(2)
    return sum((y * drawn(y, draws)).sum() for y in map(as_real, jet(function, x, v, order)))


# ------------------------------------------------------------------ the table


class Recorder(TorchFunctionMode):
    """The functions that a case calls, and those that PyTorch's own source calls in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Any] = set()
        self.calls: list[tuple[Any, tuple[Any, ...], Any]] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        self.seen.add(func)
        self.calls.append((func, args, kwargs))
        rule = dispatch.rule_of(func)
        if rule is not None and rule.__module__.startswith("torch."):
            with self:
                return rule(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


_OF_METHODS = """
    size dim ndimension numel nelement element_size stride is_contiguous is_floating_point
    is_complex type __len__ tolist isnan isinf isfinite isposinf isneginf sign sgn signbit floor
    ceil round trunc fix argmax argmin argsort count_nonzero nonzero any all logical_not detach
    bool int long
"""
_OF_FUNCTIONS = """
    numel is_floating_point is_complex isnan isinf isfinite isposinf isneginf sign sgn signbit
    floor ceil round trunc fix argmax argmin argsort count_nonzero nonzero any all logical_not
    zeros_like ones_like detach
"""
_OF_ATTRIBUTES = """
    shape dtype device layout ndim is_cuda is_cpu is_meta is_sparse is_mkldnn is_nested
    is_quantized itemsize nbytes is_mps is_xla is_xpu data
"""
_OF_TWO = """
    eq ne lt le gt ge isclose allclose equal logical_and logical_or logical_xor heaviside
    is_same_size floor_divide
"""
_OF_OPERATORS = "__eq__ __ne__ __lt__ __le__ __gt__ __ge__ __floordiv__"

# What sees the value alone: the result is PyTorch's for the value, and follows nothing.
PLAIN: list[Function] = [
    *[lambda x, name=name: getattr(x, name)() for name in _OF_METHODS.split()],
    *[lambda x, name=name: getattr(torch, name)(x) for name in _OF_FUNCTIONS.split()],
    *[lambda x, name=name: getattr(x, name) for name in _OF_ATTRIBUTES.split()],
    *[
        lambda x, name=name: getattr(x, name)(x.flip((0,)))
        for name in (_OF_TWO + _OF_OPERATORS).split()
    ],
    *[lambda x, name=name: getattr(torch, name)(x, 0.5 * x) for name in _OF_TWO.split()],
    lambda x: torch.result_type(x, 0.5),
    torch.special.round,
    lambda x: x.size(1),
    lambda x: x == 0.25,
    lambda x: x.new_zeros(3),
    lambda x: x.new_ones(3),
    lambda x: x.new_full((2,), 7.0),
    lambda x: x.new_tensor([1.0, 2.0]),
    lambda x: x.new_empty(3).shape,
    lambda x: torch.empty_like(x).shape,
    lambda x: torch.full_like(x, 3.0),
    lambda x: torch.rand_like(x).shape,
    lambda x: torch.randn_like(x).shape,
    lambda x: torch.randint_like(x, 3).shape,
    lambda x: torch.bernoulli(x.sigmoid()).shape,
    lambda x: torch.can_cast(x.dtype, torch.float32),
    lambda x: torch.searchsorted(x.new_tensor([0.0, 1.0]), x),
    lambda x: torch.bucketize(x, x.new_tensor([0.0, 1.0])),
    lambda x: x[0, 0].item(),
    lambda x: bool(x[0, 0]),
    lambda x: float(x[0, 0]),
    lambda x: int(x[0, 0]),
    lambda x: list(range(12))[x.argmax()],
    lambda x: 0.25 in x,
    lambda x: x // 1.5,
    lambda x: torch.div(x, 1.5, rounding_mode="trunc"),
    lambda x: torch.sort(x).indices,
    lambda x: torch.topk(x, 2).indices,
    lambda x: torch.max(x, 1).indices,
    lambda x: x.min(0, keepdim=True).indices,
]
# Asked of a followed value these answer of the wrapper, or have a test of their own, or
# reach their rule under another name (x >= y is Tensor.ge).
HOME = "autograd_lib.higher_order.rules."
EXEMPT = """
    bernoulli_
    cuda get_device is_leaf requires_grad can_cast __index__ __contains__ __repr__ __format__
    register_hook multi_head_attention_forward dropout1d dropout2d dropout3d ndimension nelement
    __ge__ __gt__ __le__ __lt__ __ne__ __matmul__ __mod__ __rmatmul__ __truediv__
"""


def same(got: Any, expected: Any) -> bool:
    if isinstance(expected, Tensor):
        return not isinstance(got, dispatch.Jet) and torch.equal(got, expected)
    return got == expected


@pytest.mark.parametrize("index", range(len(PLAIN)))
def test_what_sees_the_value_alone(index: int) -> None:
    function, x = PLAIN[index], apart(3, 4)
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.append(function(x))
        return x * 2

    jet(f, x, x, 2)
    assert same(seen[0], function(x))


@pytest.mark.filterwarnings("ignore:Implicit dimension choice:UserWarning")
@pytest.mark.parametrize("function", [F.softmax, F.log_softmax, F.softmin])
@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4), (2, 3, 4, 5)])
def test_softmax_without_a_dimension(function: Function, shape: tuple[int, ...]) -> None:
    x = real(*shape)
    torch.testing.assert_close(jet(function, x, x, 1)[0], function(x))


@pytest.mark.parametrize("name", SPELLINGS)
def test_another_spelling_has_the_rule_of_a_case(name: str) -> None:
    """The very object, called alike, so that what holds of one holds of the other."""
    function, tested, tensors = SPELLINGS[name]
    assert any(of.function is tested for of in CASES.values())
    calls = []
    for each in (function, tested):
        with Recorder() as recorder:
            each(*tensors)
        ((called, arguments, options),) = recorder.calls
        assert all(a is b for a, b in zip(arguments, tensors, strict=True))
        assert not options
        calls.append(called)
    assert dispatch.RULES[calls[0]] is dispatch.RULES[calls[1]]
    assert torch.equal(function(*tensors), tested(*tensors))


@pytest.mark.filterwarnings("ignore")
def test_every_rule_has_a_case() -> None:
    """A function is covered where it, or its namesake with the same rule, is called by a case."""
    with Recorder() as recorder:
        for name, of in CASES.items():
            point = prepared(name, subsets(of)[0], "cpu")
            jet(point.function, point.x, point.v, 1)
        for function, _, tensors in SPELLINGS.values():
            function(*tensors)
        for function in PLAIN:
            jet(lambda x, f=function: (f(x), x)[1], apart(3, 4), apart(3, 4), 1)
        for name in SITUATIONS.keys() - REFUSED.keys():
            jet(SITUATIONS[name].function, x := SITUATIONS[name].point, torch.ones_like(x), 1)

    def key(function: Any) -> tuple[int, str]:
        leaf = function.__name__
        if leaf == "__get__":
            leaf = resolve_name(function).removesuffix(".__get__").rpartition(".")[2]
        return id(dispatch.RULES[function]), leaf

    # ATen operations of which PyTorch composes a function
    inner = {id(rule) for f, rule in dispatch.RULES.items() if isinstance(f, torch._ops.OpOverload)}
    covered = {key(function) for function in recorder.seen if function in dispatch.RULES}
    missing = {
        f"{leaf} ({dispatch.RULES[function].__qualname__})"
        for function in dispatch.RULES
        if not isinstance(function, str | torch._ops.OpOverloadPacket)  # these only within others
        and dispatch.RULES[function].__module__.startswith(
            HOME
        )  # no rule of a doctest or an exercise
        for rule, leaf in [key(function)]
        if (rule, leaf) not in covered and leaf not in EXEMPT.split() and rule not in inner
    }
    assert not missing, f"rules without a case: {sorted(missing)}"


# ------------------------------------------------------------------ kinks and ties

_TIES = torch.tensor([[-1.0, 0.0, 0.0, 1.0], [1.0, 1.0, 0.0, -0.0]]).double()
_KINKED: dict[str, Function] = {
    "relu": F.relu,
    "torch.relu": torch.relu,
    "abs": torch.abs,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.1),
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "relu6": lambda x: F.relu6(x * 6),
    "hardtanh": F.hardtanh,
    "hardswish": lambda x: F.hardswish(3 * x),
    "clamp": lambda x: x.clamp(0, 1),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_max": lambda x: x.clamp_max(0),
    "softplus": lambda x: F.softplus(x, threshold=1.0),
    "softsign": F.softsign,
    "maximum": lambda x: torch.maximum(x, x.flip((0,))),
    "minimum": lambda x: torch.minimum(x, x.flip((0,))),
    "max": torch.max,
    "min": torch.min,
    "amax": lambda x: x.amax(1),
    "amin": lambda x: x.amin((0, 1)),
    "max by dim": lambda x: x.max(1).values,
    "min by dim": lambda x: x.min(0).values,
    "sort": lambda x: torch.sort(x, stable=True).values * x,
    "topk": lambda x: torch.topk(x, 3).values,
    "max_pool1d": lambda x: F.max_pool1d(x, 2),
    "l1_loss": lambda x: F.l1_loss(x, torch.zeros_like(x)),
    "smooth_l1": lambda x: (x / x.clamp(1, 1)).abs() * 2,
    "where": lambda x: torch.where(x > 0, x, 2 * x),
    "norm": lambda x: torch.linalg.vector_norm(x, 1, 1),
    "norm inf": lambda x: torch.linalg.vector_norm(x, math.inf, 1),
    "max of itself": lambda x: torch.maximum(x, x),
    "sign": lambda x: torch.sign(x) * x,
    "round": lambda x: torch.round(x) + torch.floor(x) * x,
}


@pytest.mark.parametrize("name", _KINKED)
def test_at_kinks_the_first_derivative_is_pytorchs(name: str) -> None:
    f, v = _KINKED[name], torch.arange(1.0, 9.0).double().reshape(2, 4)
    expected = jvp(f, (_TIES,), (v,))
    assert_near(jet(f, _TIES, v, 3)[:2], expected, 1e-12)


def test_prelu_at_zero_has_the_slope_of_pytorchs_backward() -> None:
    """Its forward mode takes the other one."""
    x, weight = torch.zeros(1).double(), torch.full((1,), 0.1).double()
    (slope,) = torch.autograd.grad(F.prelu(leaf := x.clone().requires_grad_(), weight), leaf)
    assert_near(jet(lambda x: F.prelu(x, weight), x, torch.ones_like(x), 1)[1:], [slope], 1e-12)


# ------------------------------------------------------------------ no NaN where PyTorch has none

_ROW = torch.tensor([[1.0, -math.inf, 0.5], [0.0, 1.0, -math.inf]]).double()
_MASKED: dict[str, Function] = {
    "softmax": lambda x: (x + _ROW).softmax(-1),
    "log_softmax": lambda x: (x + _ROW).log_softmax(-1)[:, 0],
    "logsumexp": lambda x: (x + _ROW).logsumexp(-1),
    "logsumexp of several": lambda x: (x + _ROW).logsumexp((0, 1)),
    "cross_entropy": lambda x: F.cross_entropy(x + _ROW, torch.tensor([0, 1])),
    "masked_fill": lambda x: x.masked_fill(_ROW.isinf(), -math.inf).softmax(0),
    "where": lambda x: torch.where(x > 0, x, 1.0).sqrt() * torch.where(x > 0, 1.0, 0.0),
    "ignored": lambda x: F.cross_entropy(x + _ROW, torch.tensor([0, -100])),
    "ignored of another weight": lambda x: F.cross_entropy(
        x + _ROW, torch.tensor([-7, 1]), torch.ones(3).double(), ignore_index=-7
    ),
    "sqrt of a clamped": lambda x: (x * 0 - 1).clamp_min(0.25).sqrt() * x,
    "norm at zero": lambda x: safe_norm(x * 0),
    "root at zero": lambda x: safe_sqrt(x * 0),
    "xlogy at zero": lambda x: torch.xlogy(torch.zeros_like(x), x.abs()),
    "power at zero": lambda x: (x * 0) ** 3 + (x * 0) ** 1 + (x * 0) ** 0,
    "product at zero": lambda x: (x * 0).prod(1) + (x * torch.tensor([0.0, 1, 1])).prod(),
    "softplus": lambda x: F.softplus(1000 * x) + F.softplus(1e8 + x),
    "sigmoid": lambda x: torch.sigmoid(1000 * x) + torch.tanh(1000 * x) + F.silu(1000 * x),
    "gelu": lambda x: F.gelu(100 * x) + F.gelu(100 * x, approximate="tanh"),
    "logsigmoid": lambda x: F.logsigmoid(1000 * x),
    "bce": lambda x: F.binary_cross_entropy_with_logits(1000 * x, torch.ones_like(x)),
    "logits": lambda x: F.cross_entropy(1000 * x, torch.tensor([0, 1])),
    "elu": lambda x: F.elu(1000 * x.abs()) + F.celu(1e3 * x) + F.selu(1e3 * x),
    "attention": lambda x: F.scaled_dot_product_attention(
        x, x, x, attn_mask=torch.tensor([[True, False], [True, True]])
    ),
    "kl_div": lambda x: F.kl_div(x, torch.zeros_like(x), reduction="sum"),
}


@pytest.mark.parametrize("name", _MASKED)
def test_no_nan_where_pytorch_has_none(name: str) -> None:
    f = _MASKED[name]
    x = torch.tensor([[0.3, -0.2, 0.7], [0.4, 0.9, -0.5]]).double()
    v, leaf = torch.ones_like(x), x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(f(leaf).sum(), leaf)
    assert slope.isfinite().all()
    derivatives = jet(f, leaf, v, 3)
    assert all(d.isfinite().all() for d in derivatives), derivatives
    assert_near(derivatives[1:2], [_first(f, x, v)], 1e-9)
    (got,) = torch.autograd.grad(sum(d.sum() for d in derivatives), leaf)
    assert got.isfinite().all()


def _first(f: Function, x: Tensor, v: Tensor) -> Tensor:
    """By two reverse passes, as not all of these have a forward mode."""
    leaf = x.clone().requires_grad_()
    y = f(leaf)
    w = torch.ones_like(y).requires_grad_()
    (slope,) = torch.autograd.grad((y * w).sum(), leaf, create_graph=True)
    (result,) = torch.autograd.grad((slope * v).sum(), w, materialize_grads=True)
    return result


# ------------------------------------------------------------------ dtypes

_OPERANDS: dict[str, Any] = {
    "float64 number": torch.tensor(2.5, dtype=torch.float64),
    "float64 vector": torch.tensor([2.5, 1.5], dtype=torch.float64),
    "float32 number": torch.tensor(2.5),
    "float16 vector": torch.tensor([2.5, 1.5], dtype=torch.float16),
    "int64 number": torch.tensor(2),
    "int64 vector": torch.tensor([2, 3]),
    "bool vector": torch.tensor([True, False]),
    "complex number": torch.tensor(2.0 + 1j, dtype=torch.complex64),
    "int": 2,
    "float": 2.5,
    "bool": True,
}
_OPERATIONS: dict[str, Function] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - y,
    "rsub": lambda x, y: y - x,
    "radd": lambda x, y: y + x,
    "mul": lambda x, y: x * y,
    "rmul": lambda x, y: y * x,
    "div": lambda x, y: x / y,
    "rdiv": lambda x, y: y / x,
    "pow": lambda x, y: x**y,
    "rpow": lambda x, y: y**x,
    "where": lambda x, y: torch.where(x > 1.5, x, y),
    "maximum": torch.maximum,
    "lerp": lambda x, y: torch.lerp(x, x, y),
    "cat": lambda x, y: torch.cat([x.reshape(-1), y.reshape(-1)]),
    "stack": lambda x, y: torch.stack([x, y.expand_as(x)]),
}


@pytest.mark.parametrize("operand", _OPERANDS)
@pytest.mark.parametrize("operation", _OPERATIONS)
def test_results_have_the_dtype_of_pytorchs(operation: str, operand: str) -> None:
    f, y = _OPERATIONS[operation], _OPERANDS[operand]
    for x in (torch.tensor([1.25, 1.75]), torch.tensor(1.25), torch.tensor([1.25, 1.75]).half()):
        if x.dtype == torch.float16 and operand == "complex number":
            continue  # torch calls complex half experimental
        try:
            value = f(x, y)
        except (RuntimeError, TypeError, AttributeError):
            continue  # nor does PyTorch do it
        for order in (0, 2):
            derivatives = jet(lambda x: f(x, y), x, torch.ones_like(x), order)
            assert all(d.dtype == value.dtype for d in derivatives), value.dtype
            assert_near(derivatives[:1], [value], 2e-3)
        if isinstance(y, Tensor) and (y.is_floating_point() or y.is_complex()):
            followed = {"x": x, "y": y}
            v = {k: torch.ones_like(t) for k, t in followed.items()}
            for g in (lambda p: f(p["x"], p["y"]), lambda p, x=x: f(x, p["y"])):
                derivatives = jet(g, followed, v, 2)
                assert all(d.dtype == value.dtype for d in derivatives), value.dtype


# ------------------------------------------------------------------ random compositions

_SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "sin": torch.sin,
    "exp": lambda x: (x / 4).exp(),
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "square": lambda x: x.square() / 2,
    "cube": lambda x: (x / 2) ** 3,
    "root": lambda x: (x * x + 1).sqrt(),
    "reciprocal": lambda x: 1 / (x * x + 1.5),
    "log": lambda x: torch.log(x * x + 0.8),
    "atan": torch.atan,
    "softmax": lambda x: x.softmax(-1),
    "logsumexp": lambda x: x.logsumexp(0, keepdim=True) + x,
    "center": lambda x: x - x.mean(-1, keepdim=True),
    "gram": lambda x: x @ x.mT / 3,
    "flip": lambda x: x.flip((-1,)) * x,
    "sum": lambda x: x.cumsum(0) - x.sum(),
    "cat": lambda x: torch.cat([x, x.cos()], -1),
    "rows": lambda x: x[:1] * x - x[:, :1],
    "transpose": lambda x: x.mT.reshape(x.shape),
    "einsum": lambda x: torch.einsum("ij,ik->jk", x, x.sin()),
    "prod": lambda x: x.tanh().prod(0, keepdim=True) + x,
}


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    st.lists(st.sampled_from(sorted(_SMOOTH)), min_size=1, max_size=5),
    st.integers(1, 3),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_random_compositions(
    names: list[str], rows: int, columns: int, order: int, seed: int
) -> None:
    draws = torch.Generator().manual_seed(seed)
    x, v = torch.randn(2, rows, columns, generator=draws, dtype=torch.float64).unbind()

    def f(x: Tensor) -> Tensor:
        for name in names:
            x = _SMOOTH[name](x)
        return x

    expected = nested(lambda t: f(x + t * v), order, "cpu")
    assert_near(jet(f, x, v, order), expected, 1e-8)


# ------------------------------------------------------------------ attention in a module


@pytest.mark.parametrize("masked", ["", "bool", "float", "heads", "padding", "padding and float"])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("widths", ["one", "three"])
def test_multihead_attention(masked: str, batch_first: bool, widths: str) -> None:
    """Against the module's own way with weights, which is composed of elementary functions."""
    options = {"kdim": 3, "vdim": 5} if widths == "three" else {}
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4, 2, batch_first=batch_first, dtype=torch.float64, **options)
    for p in module.parameters():
        nn.init.uniform_(p, -1, 1)
    # two sequences of three
    q, k, v = real(2, 3, 4), real(2, 3, options.get("kdim", 4)), real(2, 3, options.get("vdim", 4))
    if not batch_first:
        q, k, v = (t.transpose(0, 1).contiguous() for t in (q, k, v))
    hidden = torch.tensor([[0, 1, 0], [0, 0, 1], [1, 0, 0]]).bool()
    padded = torch.tensor([[0, 0, 1], [0, 0, 0]]).bool()
    bias = real(3, 3)
    masks: dict[str, Any] = {
        "": {},
        "bool": {"attn_mask": hidden},
        "float": {"attn_mask": bias},
        "heads": {"attn_mask": real(4, 3, 3)},
        "padding": {"key_padding_mask": padded},
        "padding and float": {
            "attn_mask": bias,
            "key_padding_mask": torch.zeros(2, 3).double().masked_fill(padded, -math.inf),
        },
    }
    weights = {name: p.detach() for name, p in module.named_parameters()}

    def attend(p: dict[str, Tensor], need_weights: bool) -> Tensor:
        inputs = (p["q"], p["k"], p["v"])
        own = {name: p[name] for name in weights}
        options = {**masks[masked], "need_weights": need_weights}
        return functional_call(module, own, inputs, options)[0]

    for training in (True, False):
        module.train(training)
        x = {"q": q, "k": k, "v": v, **weights}
        direction = {name: real(*t.shape) for name, t in x.items()}

        def phi(t: Tensor, x: Any = x, direction: Any = direction) -> Tensor:
            return attend({name: x[name] + t * direction[name] for name in x}, True)

        got = jet(lambda p: attend(p, False), x, direction, 3)
        assert_near(got, nested(phi, 3, "cpu"), 1e-9)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("shape", [(3, 2, 4), (3, 4)])
def test_multihead_attention_returns_its_weights(shape: tuple[int, ...], average: bool) -> None:
    module, x, v = nn.MultiheadAttention(4, 2, dtype=torch.float64), real(*shape), real(*shape)
    for part in (0, 1):

        def attend(x: Tensor, part: int = part) -> Tensor:
            return module(x, x.sin(), x.cos(), average_attn_weights=average)[part]

        expected = nested(lambda t, f=attend: f(x + t * v), 3, "cpu")
        for got, want in zip(jet(attend, x, v, 3), expected, strict=True):
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_multihead_attention_of_one_sequence_and_causal() -> None:
    torch.manual_seed(0)
    module, x, v = nn.MultiheadAttention(4, 2, dtype=torch.float64), real(3, 4), real(3, 4)
    hidden = torch.ones(3, 3).bool().triu(1)

    def attend(x: Tensor, need_weights: bool) -> Tensor:
        return module(
            *(x, x.sin(), x), attn_mask=hidden, is_causal=True, need_weights=need_weights
        )[0]

    expected = nested(lambda t: attend(x + t * v, True), 3, "cpu")
    assert_near(jet(lambda x: attend(x, False), x, v, 3), expected, 1e-9)


@pytest.mark.parametrize("option", ["add_zero_attn", "add_bias_kv"])
def test_multihead_attention_with_another_key(option: str) -> None:
    torch.manual_seed(0)
    module = nn.MultiheadAttention(4, 2, dtype=torch.float64, **{option: True})
    x, v = real(3, 2, 4), real(3, 2, 4)
    expected = nested(lambda t: module(x + t * v, x, x)[0], 3, "cpu")
    assert_near(jet(lambda y: module(y, x, x)[0], x, v, 3), expected, 1e-9)


# ------------------------------------------------------------------ refused options


@pytest.mark.parametrize(
    ("f", "text"),
    [
        (lambda x: scale_gradient(x, 2.0), "scale_gradient"),
        (reverse_gradient, "reverse_gradient"),
        (lambda x: clip_gradient(x, max_norm=1.0), "clip_gradient"),
        (
            lambda x: F.batch_norm(x, torch.zeros(3), torch.ones(3), training=True),
            r"F.batch_norm has no rule in training mode.*model.eval\(\)",
        ),
        (
            lambda x: F.embedding(torch.tensor([0]), x, scale_grad_by_freq=True),
            "F.embedding has a rule without .*scale_grad_by_freq",
        ),
        (lambda x: torch.einsum("...i,...ij->...j", x, x), "torch.einsum"),
        (lambda x: torch.linalg.slogdet((x + torch.eye(3)) * (1 + 1j)), "linalg.slogdet"),
        (lambda x: x.scatter(0, x.long(), x, reduce="multiply"), "torch.scatter"),
        (lambda x: x.view(torch.int64), "dtype"),
    ],
)
def test_options_without_a_rule_are_named(f: Function, text: str) -> None:
    x = torch.ones(3, 3)
    with pytest.raises(NotImplementedError, match=f"jet: .*{text}"):
        jet(f, x, x, 2)


# ------------------------------------------------------------------ wrong upstream


def test_layer_norm_is_wrong_upstream_at_order_three_and_not_here() -> None:
    x, v = torch.randn(2, 6, generator=POINTS.generator, dtype=torch.float64).unbind()

    def reverse(f: Function, order: int) -> Tensor:
        t = torch.zeros((), dtype=torch.float64, requires_grad=True)
        y = f(x + t * v).pow(2).mul(torch.arange(6)).sum()
        for _ in range(order):
            (y,) = torch.autograd.grad(y, t, create_graph=True)
        return y.detach()

    def ours(x: Tensor) -> Tensor:
        return F.layer_norm(x, (6,)).pow(2).mul(torch.arange(6)).sum()

    right = [reverse(lambda x: standardized(x, (-1,)), k) for k in (1, 2, 3)]
    assert_near(jet(ours, x, v, 3)[1:], right, 1e-10)
    fused = [reverse(lambda x: F.layer_norm(x, (6,)), k) for k in (1, 2, 3)]
    assert_near(fused[:2], right[:2], 1e-9)
    assert not torch.allclose(fused[2], right[2], rtol=1e-3), (
        "nested reverse through F.layer_norm is right at order 3 now: correct what the docstrings, "
        "the chapter and these tests say of it, and let the oracles use it"
    )
