"""Progress of a long operation: one line on a terminal, erased at the end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_QUIET_SECONDS = 2.0  # a shorter operation shows nothing
_PAUSE_SECONDS = 0.2  # between two calls of a function that makes the text


@contextlib.contextmanager
def progress(operation: str) -> Iterator[Callable[[str | Callable[[], str]], None]]:
    """Yield a function that shows one line of text on a terminal; the line is erased at the end.

    The function takes the text, or a function that returns it, called at most five times a second.
    """
    next_time, shown = time.monotonic() + _QUIET_SECONDS, 0

    def show(text: str | Callable[[], str]) -> None:
        nonlocal shown, next_time
        if sys.stderr.isatty() and time.monotonic() > next_time:
            if not isinstance(text, str):
                text, next_time = text(), time.monotonic() + _PAUSE_SECONDS
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
