"""The `torch.autograd.Function`s of this library."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autograd_lib.functions.activations import _CodedActivation, _LowMemoryReLU
from autograd_lib.functions.cross_entropy import _composed, _LinearCrossEntropy
from autograd_lib.functions.functions import (
    CustomAutogradFunction,
    _BentGradient,
    _Log1mExp,
    _log1mexp_slope,
    _SafeNorm,
    _SafeSqrt,
    _StraightThrough,
    safe_norm,
)
from autograd_lib.functions.losses import _Bound
from autograd_lib.higher_order.dispatch import Jet, primal
from autograd_lib.higher_order.taylor import jet_rule

jet_rule(CustomAutogradFunction)(F.linear)
jet_rule(_StraightThrough)(lambda x, f: x + (f(primal(x)) - primal(x)).detach())


@jet_rule(_BentGradient)
def _no_gradient_rule(*args: Any) -> Tensor:
    raise NotImplementedError(
        "jet: scale_gradient, reverse_gradient and clip_gradient have no rule: they change "
        "gradients in backward only, so that no derivative along a direction belongs to them"
    )


jet_rule(_Log1mExp, derivative=True)(_log1mexp_slope)


@jet_rule(_SafeSqrt)
def _safe_sqrt(x: Jet) -> Tensor:
    zero = primal(x) == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, x).sqrt())


@jet_rule(_SafeNorm)
def _safe_norm(x: Jet) -> Tensor:
    zero = safe_norm(primal(x), -1, keepdim=True) == 0
    return torch.where(zero, 0.0, torch.linalg.vector_norm(torch.where(zero, 1.0, x), 2, -1, True))


jet_rule(_LowMemoryReLU)(F.relu)
jet_rule(_CodedActivation)(lambda x, kind: (kind.forward(x),))
jet_rule(_Bound)(torch.clamp)
jet_rule(_LinearCrossEntropy)(_composed)
