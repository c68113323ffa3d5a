"""Functions with gradients of their own: what PyTorch lacks, or saves too much for."""

from autograd_lib.functions.activations import low_memory_gelu, low_memory_relu, low_memory_silu
from autograd_lib.functions.cross_entropy import linear_cross_entropy
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
from autograd_lib.functions.implicit import fixed_point
from autograd_lib.functions.losses import CustomLossFunction

__all__ = [
    "CustomAutogradFunction",
    "CustomLossFunction",
    "clip_gradient",
    "fixed_point",
    "linear_cross_entropy",
    "log1mexp",
    "low_memory_gelu",
    "low_memory_relu",
    "low_memory_silu",
    "reverse_gradient",
    "safe_norm",
    "safe_sqrt",
    "scale_gradient",
    "straight_through",
]
