"""A name in a configuration: what it stands for, and how that is called with its options."""

from __future__ import annotations

import inspect
import os
import pkgutil
import sys
import traceback
from collections.abc import Callable, Mapping
from typing import Any

from autograd_lib.core.names import nearest


def imported(section: str, name: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` stands for; also of the current directory."""
    path, _, function = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)  # as `python -m` does, and an installed command does not
    try:
        found = pkgutil.resolve_name(name)
    except Exception as error:
        if (module := sys.modules.get(path)) is not None:
            said = f"{module!r} has no {function!r}{nearest(function, dir(module))}"
        elif isinstance(error, ModuleNotFoundError) and f"{path}.".startswith(f"{error.name}."):
            said = (
                f"no module {path!r} in {here} or among what is installed; for a function in "
                f"{here}{os.sep}FILE.py write `name: FILE:function`"
            )
        else:
            said = f"importing {path} failed: {_described(error)}"
        raise ValueError(f"{section}.name: {said}") from error
    if not callable(found):
        raise TypeError(f"{section}.name: expected {name} to be a function, got {found!r}")
    return found


def called(
    section: str,
    name: str,
    function: Callable[..., Any],
    options: Mapping[str, Any],
    given: Mapping[str, Any],
) -> Any:
    """Call with the options of a section, and with what they may not set."""
    signature = inspect.signature(function)
    known = [parameter for parameter in signature.parameters if parameter not in given]
    for option in options if not takes_any_name(signature) else ():
        if option not in known:
            raise ValueError(
                f"{section}.options.{option}: the options of {name} that nothing else sets are "
                f"{', '.join(known) or 'none'}{nearest(option, known)}"
            )
    try:
        signature.bind(**given, **options)
    except TypeError as error:
        raise ValueError(f"{section}.options: {error}") from error
    try:
        return function(**given, **options)
    except Exception as error:
        kind = ImportError if isinstance(error, ImportError) else ValueError
        raise kind(f"{section}: {name} failed: {_described(error, 2)}") from error


def takes_any_name(signature: inspect.Signature) -> bool:
    """Whether a function has `**options`."""
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _described(error: Exception, frames: int | None = None) -> str:
    """Say what was raised and where, as the command shows no traceback.

    With 2 frames that is the line of the function which was called here, else the innermost one.
    """
    *_, place = traceback.extract_tb(error.__traceback__)[:frames]
    return f"{type(error).__name__}: {error} ({place.filename}, line {place.lineno})"
