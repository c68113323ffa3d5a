"""A name in a configuration: what it stands for, and how that is called with its options."""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Mapping
from operator import attrgetter
from typing import Any

from autograd_lib.core.names import nearest


def imported(section: str, name: str) -> Callable[..., Any]:
    """The function that ``package.module:function`` stands for; also of the current directory."""
    path, _, function = name.partition(":")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(
            0, here
        )  # where `python -m` looks, and a command that is installed does not
    try:
        module = importlib.import_module(path)
    except ModuleNotFoundError as error:
        if not f"{path}.".startswith(f"{error.name}."):
            raise  # it is there, and imports what is not
        raise ValueError(
            f"{section}.name: no module {path!r} in {here} or among what is installed; for a "
            f"function in {here}{os.sep}FILE.py write `name: FILE:function`"
        ) from error
    try:
        found = attrgetter(function)(module)
    except AttributeError as error:
        raise ValueError(
            f"{section}.name: {module.__file__} has no {function!r}{nearest(function, dir(module))}"
        ) from error
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
    signature, own = inspect.signature(function), ":" in name
    if not takes_any_name(signature):
        owner = name if own else function.__name__
        known = [parameter for parameter in signature.parameters if parameter not in given]
        check_options(section, owner, options, known)
    try:
        if own:
            signature.bind(**given, **options)
        else:
            return function(**given, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{section}.options: {error}") from error
    try:
        return function(**given, **options)
    except Exception as error:  # not a wrong request: its traceback is of use
        raise RuntimeError(f"{section}.name: {name} failed: {error}") from error


def takes_any_name(signature: inspect.Signature) -> bool:
    """Whether a function has `**options`."""
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def check_options(section: str, owner: str, names: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a name in the options of a section that their owner does not know."""
    known = list(known)
    for name in names:
        if name not in known:
            raise ValueError(
                f"{section}.options.{name}: the options of {owner} that nothing else sets are "
                f"{', '.join(known) or 'none'}{nearest(name, known)}"
            )
