"""How things are named: parameters in reports, and what an unknown name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from torch import nn


def readable(name: str) -> str:
    """A qualified name without what `torch.compile` puts into it.

    >>> readable("encoder._orig_mod.0.weight")
    'encoder.0.weight'
    """
    return ".".join(part for part in name.split(".") if part != "_orig_mod")


def parameters_by_name(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by the names that they have where `model` is not compiled."""
    return {readable(name): parameter for name, parameter in model.named_parameters()}


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error on an unknown name: the known one that may have been meant.

    >>> nearest("epoch", ["epochs", "seed"]), nearest("x", ["epochs", "seed"])
    ("; did you mean 'epochs'?", '')
    """
    close = difflib.get_close_matches(name[:60].lower(), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
