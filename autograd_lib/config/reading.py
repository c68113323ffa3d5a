"""Records read from YAML, validated, and printed as YAML, with the docstrings as comments."""

from __future__ import annotations

import difflib
import functools
import importlib
import inspect
import json
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import is_dataclass
from typing import Any, TypeVar, get_origin

from autograd_lib.config.fields import MAX_DEPTH, describe, hints

_Record = TypeVar("_Record")
_Path = tuple[str | int, ...]

_MAX_BYTES = 2**16  # of a file: PyYAML takes seconds for more
_MAX_LINES = 30  # of a message
_MAX_VALUES = 20_000  # of a file, where an alias counts as what it points to
_WIDTH = 99  # of a printed file
_SHOWN = 60  # characters of a value or a key in a message

# What a word without quotes is in YAML 1.2 (10.3.2, the core schema). PyYAML reads YAML 1.1, where
# 1e-3 is text, 1:30 is 90, 010 is 8 and `no` is false.
_TAG = "tag:yaml.org,2002:"
_SCALARS = {
    _TAG + "null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    _TAG + "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    _TAG + "int": re.compile(r"(?:[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    _TAG + "float": re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}


def load(
    record_class: type[_Record],
    source: str | os.PathLike[str] | Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> _Record:
    """Read a record from a YAML file or a mapping; `load_config` says how.

    Args:
        record_class: A dataclass of sections, with `__pydantic_config__ = {"extra": "forbid"}`.
        source: Path of the file, or what such a file would hold.
        overrides: "path.of.the.key=value" each.

    Returns:
        The record.

    Raises:
        ValueError: What was read is no such record; a line for each problem.
        OSError: The file cannot be read.
        TypeError: Source or overrides are of another type.
        ImportError: PyYAML or pydantic is not installed.
    """
    if not isinstance(source, (str, os.PathLike, Mapping)):
        raise TypeError(
            f"load_config: expected the path of a YAML file or a mapping, got {_show(source)}"
        )
    if isinstance(overrides, str) or not all(isinstance(one, str) for one in overrides):
        raise TypeError(
            f"load_config: expected overrides to be a sequence of 'key=value', got {overrides!r}"
        )
    if isinstance(source, Mapping):
        problems = _Problems("configuration")
        value: Any = source
    else:
        problems = _Problems(str(os.fspath(source)))
        value = _parse(_read_text(problems.source), (), problems, problems.source)
    tree = _plain({} if value is None else value, (), problems)
    if not isinstance(tree, dict):
        problems.add((), f"expected {describe(record_class)}, got {_show(tree)}")
        tree = {}
    for override in overrides:
        _override(record_class, tree, override, problems)
    record = _validated(record_class, tree, problems)
    problems.check()
    return record


class _Problems:
    """Lines that say what is wrong, each with where it came from."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.lines: list[str] = []
        self.paths: set[_Path] = set()
        self.overrides: list[tuple[_Path, str]] = []  # what they set, and their text

    def add(self, path: _Path, text: str, source: str | None = None) -> None:
        if source is None:
            setters = [text for at, text in self.overrides if path[: len(at)] == at]
            source = setters[-1] if setters else self.source
        self.paths.add(path)
        self.lines.append(": ".join([source, *([_dotted(path)] if path else []), text]))

    def check(self) -> None:
        lines = list(dict.fromkeys(self.lines))
        if len(lines) > _MAX_LINES:
            more = len(lines) - _MAX_LINES
            lines[_MAX_LINES:] = [f"{self.source}: and {more} more"]
        if lines:
            raise ValueError("\n".join(lines))


# reading


def _read_text(path: str) -> str:
    try:
        with open(path, "rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except IsADirectoryError as error:
        raise ValueError(f"{path}: expected a YAML file, got a directory") from error
    except ValueError as error:  # a NUL in the path
        raise ValueError(f"load_config: expected the path of a file, got {path!r}") from error
    if len(data) > _MAX_BYTES:
        raise ValueError(f"{path}: expected a YAML file of at most {_MAX_BYTES} bytes, got more")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path}: expected text in UTF-8, got byte 0x{data[error.start]:02x} at {error.start}"
        ) from error


def _parse(text: str, path: _Path, problems: _Problems, source: str) -> Any:
    """Return what YAML text says, as Python objects; None, and a problem, if it is not YAML."""
    yaml = _require("yaml")
    try:
        # Nodes, not values: among them duplicate keys are still seen, and an alias is not yet
        # copied to each of its places.
        node = yaml.compose(text, _dialect(yaml.SafeLoader))
        return None if node is None else _build(node, path, problems, iter(range(_MAX_VALUES)))
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        got = f"{error.problem or error.context} in line {mark.line + 1}, column {mark.column + 1}"
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        got = f"character U+{error.character:04X} in line {line}"
    except RecursionError:
        got = f"more than {MAX_DEPTH} levels"
    except (ValueError, OverflowError) as error:  # a huge number, of an escape for example
        got = str(error)
    problems.add(path, f"not YAML: {got}", source)
    return None


@functools.cache
def _dialect(base: Any) -> Any:
    """Return a loader or a dumper of PyYAML for which words mean what they do in YAML 1.2."""
    dialect: Any = type("Dialect", (base,), {"yaml_implicit_resolvers": {}})
    for tag, pattern in _SCALARS.items():
        dialect.add_implicit_resolver(tag, pattern, None)
    return dialect


def _build(node: Any, path: _Path, problems: _Problems, budget: Iterator[int]) -> Any:
    """Return the value of a node of YAML; keys are of any scalar type as yet."""
    if next(budget, None) is None:
        raise ValueError(f"more than {_MAX_VALUES} values; an alias counts as what it points to")
    if len(path) > MAX_DEPTH:
        raise ValueError(f"more than {MAX_DEPTH} levels, or an alias within what it points to")
    if node.id == "sequence" and node.tag == _TAG + "seq":
        return [_build(one, (*path, i), problems, budget) for i, one in enumerate(node.value)]
    if node.id == "mapping" and node.tag == _TAG + "map":
        return _build_mapping(node, path, problems, budget)
    if node.id == "scalar" and node.tag == _TAG + "str":
        return node.value
    pattern = _SCALARS.get(node.tag)
    if node.id != "scalar" or pattern is None or not pattern.match(node.value):
        line = node.start_mark.line + 1
        problems.add(path, f"expected YAML without tags, got {_short(node.tag)} in line {line}")
        return None
    return _scalar(node.tag.removeprefix(_TAG), node.value)


def _build_mapping(
    node: Any, path: _Path, problems: _Problems, budget: Iterator[int]
) -> dict[Any, Any]:
    values: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = _build(key_node, (*path, "key"), problems, budget)
        if isinstance(key, (list, dict)):
            problems.add(path, f"expected names as keys, got {_show(key)} in line {line}")
            continue
        if key in values:
            problems.add(path, f"duplicate key {_short(key)} in line {line}; leave one of the two")
        part = key if isinstance(key, str) else _show(key)
        values[key] = _build(value_node, (*path, part), problems, budget)
    return values


def _scalar(kind: str, text: str) -> bool | int | float | None:
    if kind == "null":
        return None
    if kind == "bool":
        return text.lower() == "true"
    if kind == "int":
        return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


def _plain(value: Any, path: _Path, problems: _Problems) -> Any:
    """Return a copy that JSON can hold; for what it cannot None, and a problem."""
    if isinstance(value, (Mapping, list, tuple)) and len(path) > MAX_DEPTH:
        expected = f"at most {MAX_DEPTH} levels"
    elif isinstance(value, Mapping):
        return _plain_mapping(value, path, problems)
    elif isinstance(value, (list, tuple)):
        return [_plain(inner, (*path, i), problems) for i, inner in enumerate(value)]
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        expected = "an integer of 64 bits"
    elif isinstance(value, str) and re.search("[\ud800-\udfff]", value):
        expected = "whole characters"
    elif value is None or isinstance(value, (str, int, float)):
        return value
    else:
        expected = "a string, a number, true, false, null, a list or a mapping"
    problems.add(path, f"expected {expected}, got {_show(value)}")
    return None


def _plain_mapping(value: Mapping[Any, Any], path: _Path, problems: _Problems) -> dict[str, Any]:
    plain = {}
    for key, inner in value.items():
        if not isinstance(key, str):
            problems.add(path, f"expected names as keys, got {_show(key)}; quote it")
        elif _plain(key, path, problems) is not None:
            plain[key] = _plain(inner, (*path, key), problems)
    return plain


def _override(record_class: type, tree: dict[str, Any], text: str, problems: _Problems) -> None:
    """Set one value of the tree, in which sections may be missing."""
    source = f"override {_short(text)}"
    name, equals, value = text.partition("=")
    if not equals:
        problems.add((), "expected 'key=value'", source)
        return
    hint: Any = record_class
    path: tuple[str, ...] = ()
    parts = name.strip().split(".")
    while parts:
        if path:
            inner = tree.get(path[-1])
            if inner is not None and not isinstance(inner, dict):
                problems.add(path, f"expected {describe(hint)}, got {_show(inner)}")
                return
            tree[path[-1]] = inner = inner or {}
            tree = inner
        if not is_dataclass(hint):
            path, parts = (*path, ".".join(parts)), []
        elif parts[0] in hints(hint):
            hint = hints(hint)[parts[0]]
            path, parts = (*path, parts[0]), parts[1:]
        else:
            problems.add((*path, parts[0]), _unknown(record_class, hint, parts[0]), source)
            return
        if parts and not (is_dataclass(hint) or _is_mapping(hint)):
            problems.add(path, f"expected no key below, got {_short('.'.join(parts))}", source)
            return
    problems.overrides.append((path, source))
    tree[path[-1]] = _plain(_parse(value, path, problems, source), path, problems)


# validating


def _validated(record_class: type, tree: dict[str, Any], problems: _Problems) -> Any:
    """Return the record that a tree is, or None, and problems."""
    pydantic = _require("pydantic")
    _drop_empty(record_class, tree)
    try:
        # From JSON, for only there does "strict" allow mappings for dataclasses.
        return _adapter(record_class).validate_json(json.dumps(tree), strict=True)
    except pydantic.ValidationError as error:
        for problem in error.errors(include_url=False):
            if problem["loc"] not in problems.paths:  # where None stands for what was refused
                problems.add(problem["loc"], _explained(record_class, problem))
    return None


@functools.cache
def _adapter(record_class: type) -> Any:
    return _require("pydantic").TypeAdapter(record_class)


def _drop_empty(record_class: Any, tree: dict[str, Any]) -> None:
    """Remove sections and mappings of which only the name is there, so that they have defaults."""
    for key, hint in hints(record_class).items():
        if is_dataclass(hint) and isinstance(tree.get(key), dict):
            _drop_empty(hint, tree[key])
        elif (is_dataclass(hint) or _is_mapping(hint)) and tree.get(key, {}) is None:
            del tree[key]


def _is_mapping(hint: Any) -> bool:
    return get_origin(hint) is Mapping


def _explained(record_class: type, problem: Mapping[str, Any]) -> str:
    """Say in our words what pydantic found."""
    hint: Any = record_class
    for part in problem["loc"]:
        section, hint = hint, hints(hint).get(part)
        if hint is None:
            return _unknown(record_class, section, str(part))
    if is_dataclass(hint) and problem["type"] == "value_error":  # raised by `__post_init__`
        return re.sub(r"^\w+: ", "", str(problem["ctx"]["error"]))
    return f"expected {describe(hint)}, got {_show(problem['input'])}"


def _unknown(record_class: type, section: Any, key: str) -> str:
    """Say what could be meant by a key that a section does not have."""
    homes = [_dotted(path) for path in _paths(record_class) if path[-1] == key]
    near = difflib.get_close_matches(key[:_SHOWN].lower(), hints(section), 1)
    if homes:
        return f"unknown key; it belongs to {' or '.join(homes)}"
    if near:
        return f"unknown key; did you mean {near[0]!r}?"
    return f"unknown key; known here are {', '.join(hints(section))}"


def _paths(record_class: Any, path: _Path = ()) -> Iterator[_Path]:
    """Yield the paths of all keys."""
    for key, hint in hints(record_class).items():
        yield (*path, key)
        if is_dataclass(hint):
            yield from _paths(hint, (*path, key))


def _dotted(path: _Path) -> str:
    return ".".join(
        str(part) if re.fullmatch(r"\w{1,60}", str(part), re.ASCII) else _short(part)
        for part in path
    )


def _show(value: Any) -> str:
    """Return a value as YAML has it, or what kind of value it is."""
    if isinstance(value, (Mapping, list, tuple)):
        return "a mapping" if isinstance(value, Mapping) else "a list"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, int) and abs(value) >= 2**200:
        return "a larger one"
    return _short(value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _require(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(
            "configurations need PyYAML and pydantic: pip install pydantic pyyaml"
        ) from error


# printing


def default_yaml(record_class: type) -> str:
    """Return the file of all defaults, each key under a comment from its class's docstring.

    Args:
        record_class: A dataclass of sections, all with defaults.

    Returns:
        YAML, which `load` reads as the record of all defaults.
    """
    intro = "# Every key with its default. A file needs only those that differ.\n\n"
    return intro + "\n".join(_lines(record_class(), comments=True)) + "\n"


def config_yaml(record: Any) -> str:
    """Return the YAML that `load` reads as this record.

    Args:
        record: A dataclass of sections.

    Returns:
        YAML without comments.
    """
    return "\n".join(_lines(record, comments=False)) + "\n"


def _lines(record: Any, *, comments: bool, indent: str = "") -> Iterator[str]:
    explained = _attributes(type(record)) if comments else {}
    for i, key in enumerate(hints(type(record))):
        value = getattr(record, key)
        if comments and not indent and i:
            yield ""
        if key in explained:
            prefix = f"{indent}# "
            yield from textwrap.wrap(
                explained[key],
                _WIDTH,
                initial_indent=prefix,
                subsequent_indent=prefix,
                break_on_hyphens=False,
            )
        if is_dataclass(value):
            yield f"{indent}{key}:"
            yield from _lines(value, comments=comments, indent=indent + "  ")
        else:
            yield f"{indent}{key}: {_inline(value)}"


def _attributes(record_class: type) -> dict[str, str]:
    """Return what a class's docstring says of each attribute, with the constants of YAML."""
    _, _, section = (inspect.getdoc(record_class) or "").partition("\nAttributes:\n")
    section = re.split(r"\n\n?(?=\S)", section)[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    words = {"None": "null", "True": "true", "False": "false", "`": ""}
    return {
        name: re.sub(
            r"\bNone\b|\bTrue\b|\bFalse\b|`", lambda m: words[m[0]], " ".join(text.split())
        )
        for name, text in entries
    }


def _inline(value: Any) -> str:
    """Return a value on one line."""
    # Within a list, where the line ends with the value; after a scalar alone "..." would follow.
    return _require("yaml").dump(
        [_with_lists(value)],
        Dumper=_dumper(),
        default_flow_style=True,
        width=float("inf"),
        sort_keys=False,
        allow_unicode=True,
    )[1:-2]


@functools.cache
def _dumper() -> Any:
    dumper = _dialect(_require("yaml").SafeDumper)
    dumper.add_representer(str, _represent_string)
    return dumper


def _represent_string(dumper: Any, text: str) -> Any:
    # Other styles would break the line at a newline in the text.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar(_TAG + "str", text, style=style)


def _with_lists(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _with_lists(inner) for key, inner in value.items()}
    return [_with_lists(inner) for inner in value] if isinstance(value, tuple) else value
