"""The rules by which `jet` and `laplacian` follow PyTorch functions, one file for each family.

Importing this folder fills the table. Most rules take a line: a linear function acts on the whole
stack of coefficients, an elementary one has a value and a derivative, and a composed one is written
as for plain tensors.
"""

from autograd_lib.higher_order.rules import (  # noqa: F401
    activations,
    arithmetic,
    attention,
    composed,
    contractions,
    convolution,
    elementary,
    library,
    linear,
    losses,
    matrices,
    normalization,
    reductions,
    selection,
    shapes,
    softmax,
    values,
    writes,
)
