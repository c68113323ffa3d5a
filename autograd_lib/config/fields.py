"""Records that check themselves: what each field may hold, for Python and for pydantic alike."""

from __future__ import annotations

import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

_MAX_DEPTH = 40  # of lists and mappings within each other

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = 60
shown = _repr.repr  # a value in a message


class RefusedError(ValueError):
    """A value that its field may not hold.

    Attributes:
        expected: What it may hold, in words of Python.
        got: What came.
        where: Keys and indices from the field to the value, if it is inside a list or a mapping.
        mistyped: Whether the value is of the wrong type.
    """

    def __init__(
        self, expected: str, got: Any, where: tuple[Any, ...] = (), *, mistyped: bool = False
    ) -> None:
        self.expected, self.got, self.where, self.mistyped = expected, got, where, mistyped


@dataclass(frozen=True)
class Kind:
    """What a field may hold, as metadata of `typing.Annotated`.

    Attributes:
        text: What follows "expected", in words of Python.
        types: Types of the value; a bool is an int only if it is listed.
        test: Whether a value of these types, other than None, is allowed.
        read: Turns such a value into what the record holds; may raise `RefusedError`.
    """

    text: str
    types: tuple[type, ...]
    test: Callable[[Any], bool] = lambda value: True
    read: Callable[[Any], Any] = lambda value: value

    def __call__(self, value: Any) -> Any:
        """Return what the record holds for a value, or raise `RefusedError`."""
        typed = isinstance(value, self.types) and (type(value) is not bool or bool in self.types)
        if value is None and NoneType in self.types:
            return None
        if not typed or not self.test(value):
            raise RefusedError(self.text, value, mistyped=not typed)
        return self.read(value)

    def or_none(self) -> Kind:
        """Return the same kind that also allows None."""
        return replace(self, text=f"{self.text} or None", types=(*self.types, NoneType))

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Make pydantic check the field by this kind alone, without conversions of its own."""
        from pydantic_core import core_schema  # noqa: PLC0415 - called by pydantic only

        return core_schema.no_info_plain_validator_function(self)


class Record:
    """What frozen dataclasses that check their fields inherit from; their mappings are copies."""

    def __post_init__(self) -> None:
        record_class: Any = type(self)
        for key, kind in kinds(record_class).items():
            check = Kind(f"a {kind.__name__}", (kind,)) if isinstance(kind, type) else kind
            try:
                object.__setattr__(self, key, check(getattr(self, key)))
            except RefusedError as error:
                raise (TypeError if error.mistyped else ValueError)(
                    f"{record_class.__name__}: expected {dotted((key, *error.where))} to be "
                    f"{error.expected}, got {shown(error.got)}"
                ) from None


@cache
def kinds(record_class: Any) -> Mapping[str, Any]:
    """Return what each field of a dataclass may hold: a `Kind`, or the class of a section."""
    hints = get_type_hints(record_class, include_extras=True)
    return {field.name: _kind(hints[field.name]) for field in fields(record_class)}


def _kind(hint: Any) -> Any:
    if get_origin(hint) is Annotated:
        return hint.__metadata__[0]
    if get_origin(hint) is Literal:
        choices = get_args(hint)
        return Kind(" or ".join(map(repr, choices)), (object,), lambda value: value in choices)
    return hint


def stored(value: Any, where: tuple[Any, ...] = ()) -> Any:
    """Return a copy of a value that YAML can store, with tuples for lists.

    Args:
        value: Strings, numbers, bools, None, and lists and mappings by name of these.
        where: Keys and indices that lead to the value.

    Returns:
        The copy.

    Raises:
        RefusedError: The value holds something else, or is too deep.
    """
    if len(where) > _MAX_DEPTH:
        raise RefusedError(f"at most {_MAX_DEPTH} levels", value, where[:1])
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise RefusedError("a mapping with strings as keys", value, where, mistyped=True)
        return {stored(key, where): stored(inner, (*where, key)) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(stored(inner, (*where, i)) for i, inner in enumerate(value))
    if value is None or isinstance(value, bool):
        return value
    for scalar in (int, float, str):
        if isinstance(value, scalar):
            return scalar(value)  # a plain one where it is NumPy's
    expected = "a string, a number, True, False, None, a list or a mapping"
    raise RefusedError(expected, value, where, mistyped=True)


def dotted(path: tuple[Any, ...]) -> str:
    """Return a path of keys with dots between them; unusual keys are quoted."""
    return ".".join(
        str(part) if isinstance(part, int) or part.isidentifier() else shown(part) for part in path
    )
