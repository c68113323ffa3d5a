"""Records that check themselves: dataclasses whose annotations say what their fields may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

MAX_DEPTH = 40  # of lists and mappings within each other

_WORDS = {bool: "true or false", int: "an integer", float: "a number", str: "a string"}


@dataclass(frozen=True)
class Check:
    """What a value must be besides its type, as metadata of `typing.Annotated`.

    Attributes:
        test: Whether a value of the type is allowed.
        text: What follows the type in "expected an integer ...".
    """

    test: Callable[[Any], bool]
    text: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        """Make pydantic apply the check, which then names the path of the field."""
        from pydantic_core import core_schema  # noqa: PLC0415 - called by pydantic only

        return core_schema.no_info_after_validator_function(self._checked, handler(source))

    def _checked(self, value: Any) -> Any:
        if not self.test(value):
            raise ValueError(self.text)
        return value


def check_fields(record: Any) -> None:
    """Check the fields of a frozen dataclass by their annotations, and freeze its mappings.

    Args:
        record: The dataclass, in its `__post_init__`.

    Raises:
        TypeError: A field is of the wrong type.
        ValueError: A field has a value that its annotation does not allow.
    """
    name = type(record).__name__
    for key, hint in hints(type(record)).items():
        value = getattr(record, key)
        if not _fits(hint, value):
            mistyped = not _fits(hint, value, checked=False) and get_origin(hint) is not Literal
            raise (TypeError if mistyped else ValueError)(
                f"{name}: expected {key} to be {describe(hint, in_python=True)}, got {value!r}"
            )
        if isinstance(value, Mapping):
            object.__setattr__(record, key, _frozen(f"{name}: expected {key} to hold", value))
        elif type(value) is int and any(base is float for base, _ in _alternatives(hint)):
            object.__setattr__(record, key, float(value))


def hints(record_class: Any) -> dict[str, Any]:
    """Return the annotations of the fields of a dataclass, evaluated."""
    evaluated = get_type_hints(record_class, include_extras=True)
    return {field.name: evaluated[field.name] for field in fields(record_class)}


def describe(hint: Any, *, in_python: bool = False) -> str:
    """Say what an annotation allows, for "expected ...", in words of YAML or of Python."""
    return " or ".join(
        " ".join([_describe_type(base, in_python), *(check.text for check in checks)])
        for base, checks in _alternatives(hint)
    )


def _describe_type(base: Any, in_python: bool) -> str:
    if get_origin(base) is Literal:
        return " or ".join(map(repr, get_args(base)))
    if base is NoneType:
        return "None" if in_python else "null"
    if is_dataclass(base):
        name = getattr(base, "__name__", "")
        return f"a {name}" if in_python else f"a mapping with keys of {', '.join(hints(base))}"
    if base is bool and in_python:
        return "a bool"
    return _WORDS.get(base, "a mapping of names to values")


def _alternatives(hint: Any) -> list[tuple[Any, tuple[Check, ...]]]:
    """Return the types that an annotation allows, each with its checks."""
    if get_origin(hint) is Annotated:
        base, *checks = get_args(hint)
        return [(base, tuple(checks))]
    if get_origin(hint) in (Union, UnionType):
        return [one for part in get_args(hint) for one in _alternatives(part)]
    return [(hint, ())]


def _fits(hint: Any, value: Any, *, checked: bool = True) -> bool:
    return any(
        _is_a(base, value) and (not checked or all(check.test(value) for check in checks))
        for base, checks in _alternatives(hint)
    )


def _is_a(base: Any, value: Any) -> bool:
    if get_origin(base) is Literal:
        return isinstance(value, str) and value in get_args(base)
    if base is float:  # an integer is one too, unless it is too large
        return isinstance(value, float) or (_is_a(int, value) and abs(value) < 2**1023)
    if base is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, get_origin(base) or base)


def _frozen(expected: str, value: Any, depth: int = 0) -> Any:
    """Return a copy with tuples for lists, of what YAML can store."""
    nested = isinstance(value, (Mapping, list, tuple))
    if nested and depth > MAX_DEPTH:
        raise ValueError(f"{expected} at most {MAX_DEPTH} levels, got more")
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {str(key): _frozen(expected, inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(expected, inner, depth + 1) for inner in value)
    if value is None or isinstance(value, bool):
        return value
    for scalar in (str, int, float):
        if isinstance(value, scalar):
            return scalar(value)  # as such, where it is one of NumPy's
    got = f"{type(value).__name__} with other keys" if nested else repr(value)
    raise TypeError(
        f"{expected} strings, numbers, bools, None, and lists and mappings by name of these, "
        f"got {got}"
    )
