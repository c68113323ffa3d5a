"""Progress of what takes longer than a moment: one line on a terminal, wiped at the end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_QUIET_SECONDS = 2.0  # what is done before shows nothing


@contextlib.contextmanager
def progress(operation: str) -> Iterator[Callable[[str], None]]:
    """Give a function that shows one line on a terminal, which is wiped at the end."""
    start, shown = time.monotonic(), 0

    def show(text: str) -> None:
        nonlocal shown
        if sys.stderr.isatty() and time.monotonic() - start > _QUIET_SECONDS:
            line = f"{operation}: {text}"
            sys.stderr.write(f"\r{line.ljust(shown)}")
            sys.stderr.flush()
            shown = len(line)

    try:
        yield show
    finally:
        if shown:
            sys.stderr.write(f"\r{'':{shown}}\r")
            sys.stderr.flush()
