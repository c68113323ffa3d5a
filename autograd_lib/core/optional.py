"""Packages that the library uses where they are installed."""

from __future__ import annotations

import importlib
from typing import Any


def optional(operation: str, module: str, packages: str = "") -> Any:
    """Import a module that an operation needs, or say what to install for it.

    Args:
        operation: What needs it, for the error.
        module: Its full name.
        packages: What pip installs; by default the first part of the name.

    Returns:
        The module.

    Raises:
        ImportError: It is not there.

    >>> optional("sums", "math").fsum([1, 2])
    3.0
    >>> optional("sums", "no_such.module")
    Traceback (most recent call last):
        ...
    ImportError: sums needs no_such: pip install no_such
    """
    root = module.partition(".")[0]
    packages = packages or root
    try:
        importlib.import_module(root)  # else a part that is loaded already would do
        return importlib.import_module(module)
    except ImportError as error:
        wanted = packages.replace(" ", " and ")
        raise ImportError(f"{operation} needs {wanted}: pip install {packages}") from error
