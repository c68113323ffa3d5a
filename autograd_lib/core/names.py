"""What an unknown name may have meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error on an unknown name: the known one that may have been meant.

    >>> nearest("epoch", ["epochs", "seed"]), nearest("x", ["epochs", "seed"])
    ("; did you mean 'epochs'?", '')
    """
    close = difflib.get_close_matches(name[:60].lower(), known, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
