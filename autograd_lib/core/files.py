"""Writing a file atomically."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced_atomically(path: Path) -> Iterator[Path]:
    """Give the name of a file to write; it replaces `path` when the block ends without an error.

    It is in the same directory, so that the replacement is one rename, and not made by `tempfile`,
    whose files only their owner may read. What a killed process leaves is overwritten.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    try:
        yield unfinished
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)
