"""Progress of what takes longer than a moment: one line on a terminal, wiped at the end."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

_QUIET_SECONDS = 2.0  # what is done before shows nothing
_PAUSE_SECONDS = 0.2  # between two texts that have to be made


@contextlib.contextmanager
def progress(operation: str) -> Iterator[Callable[[str | Callable[[], str]], None]]:
    """Give a function that shows one line on a terminal, which is wiped at the end.

    It takes the text, or what makes it: that is called at most five times a second.
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
