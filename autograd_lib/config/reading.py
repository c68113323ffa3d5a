"""Configurations read from YAML, validated, and printed as YAML, with docstrings as comments."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from autograd_lib.config.fields import RefusedError, dotted, kinds, shown
from autograd_lib.config.records import AutogradConfig
from autograd_lib.core.names import nearest
from autograd_lib.core.optional import optional

_Path = tuple[Any, ...]

_WIDTH = 99  # of a printed file
_PACKAGES = "pydantic ruamel.yaml"


def load_config(
    source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()
) -> AutogradConfig:
    """Read a configuration from a YAML file, or from a mapping of the same form.

    What is not given has its default, so that an empty file is all defaults. Values are of YAML
    1.2: 1e-3 is a number, `yes` a string. Nothing is converted: "3" is not 3, and true is not 1.
    Anchors, aliases and tags are refused.

    Args:
        source: Path of a YAML file, or what such a file would hold.
        overrides: Values that replace those of the source, each as "path.of.key=value" with a
            value in YAML. A section is replaced by a mapping as a whole; below `options` and
            `checkpoint` what follows is one key.

    Returns:
        The configuration.

    Raises:
        ValueError: The source or an override is not a configuration. There is a line for each
            problem, with the file or the override, the path of the key, what was expected and
            what came, or the known key nearest to an unknown one.
        OSError: The file cannot be read.
        TypeError: Source or overrides are of another type.
        ImportError: ruamel.yaml or pydantic is not installed. A mapping of right values needs
            neither.

    Example:
        >>> config = load_config({"training": {"epochs": 3}}, ["optimizer.lr=1e-2"])
        >>> config.training.epochs, config.optimizer.lr
        (3, 0.01)
        >>> load_config({"training": {"epoch": 3}})
        Traceback (most recent call last):
            ...
        ValueError: configuration: training.epoch: unknown key; did you mean 'epochs'?
    """
    if isinstance(overrides, str):
        raise TypeError(
            f"load_config: expected overrides to be a sequence of 'key=value', got {overrides!r}"
        )
    name, tree = "configuration", source
    if not isinstance(source, Mapping):
        name = str(source)
        try:
            tree = _parse(Path(source).read_text(encoding="utf-8-sig"))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    setters: list[tuple[_Path, str]] = []  # the path that each override sets, and its name
    for text in overrides:
        setter = f"override {shown(text)}"
        try:
            path, value = _override(text)
        except ValueError as error:
            raise ValueError(f"{setter}: {error}") from error
        tree = _replaced(tree, path, value)
        setters.append((path, setter))
    tree = _filled(AutogradConfig, tree)
    if isinstance(source, Mapping):
        try:
            return _built(AutogradConfig, tree)  # right values need no package
        except (TypeError, ValueError, AttributeError):
            pass  # pydantic names all that is wrong
    pydantic = optional("load_config", "pydantic", _PACKAGES)
    try:
        return pydantic.TypeAdapter(AutogradConfig).validate_python(tree)
    except pydantic.ValidationError as error:
        problems = []
        for found in error.errors(include_url=False):
            path, text = _explained(found)
            by = [setter for at, setter in setters if path[: len(at)] == at] or [name]
            problems.append(": ".join(filter(None, [by[-1], dotted(path), text])))
        raise ValueError("\n".join(problems)) from error


# reading


def _parse(text: str) -> Any:
    """Return what YAML text says, as Python objects."""
    ruamel = optional("load_config", "ruamel.yaml", _PACKAGES)
    try:
        # Refuse what makes a large object of a small file, and objects other than plain values.
        for event in ruamel.YAML(typ="safe", pure=True).parse(text):
            if getattr(event, "anchor", None) or getattr(event, "tag", None):
                raise ValueError(f"an anchor, alias or tag in line {event.start_mark.line + 1}")
        return ruamel.YAML(typ="safe", pure=True).load(text)
    except (ruamel.error.YAMLError, ValueError, OverflowError) as error:
        mark, problem = (getattr(error, f"problem{part}", None) for part in ("_mark", ""))
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        said = textwrap.shorten(str(problem or error), 200, placeholder=" ...")
        raise ValueError(f"not plain YAML: {said}{where}") from error


# overrides


def _override(text: str) -> tuple[_Path, Any]:
    """Return the path that an override sets, and the value."""
    name, equals, value = text.partition("=")
    if not equals:
        raise ValueError("expected 'key=value'")
    path: _Path = ()
    kind: Any = AutogradConfig
    parts = name.strip().split(".")
    while parts and isinstance(kind, type):
        path = (*path, parts.pop(0))
        kind = kinds(kind).get(path[-1])  # None is refused with all other unknown keys
    if parts and kind is not None:
        if Mapping not in kind.types:
            raise ValueError(f"{dotted(path)}: expected no key below, got {'.'.join(parts)!r}")
        path = (*path, ".".join(parts))
    try:
        return path, _parse(value)
    except ValueError as error:
        raise ValueError(f"{dotted(path)}: {error}") from error


def _replaced(tree: Any, path: _Path, value: Any) -> Any:
    """Return a copy of the tree with one value set, in which sections may be missing."""
    if not path:
        return value
    if tree is not None and not isinstance(tree, Mapping):
        return tree  # which is refused with a message of its own
    inner = (tree or {}).get(path[0])
    return {**(tree or {}), path[0]: _replaced(inner, path[1:], value)}


# validating


def _filled(kind: Any, tree: Any) -> Any:
    """Return a copy of the tree with {} for sections and mappings that are empty in YAML."""
    section = isinstance(kind, type)
    if tree is None and (section or (kind and Mapping in kind.types)):
        return {}
    if section and isinstance(tree, Mapping):
        return {key: _filled(kinds(kind).get(key), value) for key, value in tree.items()}
    return tree


def _built(kind: Any, tree: Any) -> Any:
    """Return the record that a tree of right values is."""
    if not isinstance(kind, type):
        return tree
    return kind(**{key: _built(kinds(kind).get(key), value) for key, value in tree.items()})


def _explained(found: Mapping[str, Any]) -> tuple[_Path, str]:
    """Say in our words what pydantic found, and where."""
    path: _Path = found["loc"]
    kind: Any = AutogradConfig
    for part in path:
        section, kind = kind, kinds(kind).get(part)
        if kind is None:
            return path, _unknown(section, part)
    error = found.get("ctx", {}).get("error")
    if error is not None and not isinstance(error, RefusedError):  # raised by `__post_init__`
        return path, re.sub(r"^\w+: ", "", str(error))
    if error is None:  # of a choice or a section
        sections = (
            f"a mapping with keys of {', '.join(kinds(kind))}" if isinstance(kind, type) else ""
        )
        error = RefusedError(sections or kind.text, found["input"])
    got = error.got
    text = json.dumps(got) if got is None or isinstance(got, bool) else shown(got)
    return (*path, *error.where), f"expected {_in_yaml(error.expected)}, got {text}"


def _unknown(section: type, key: Any) -> str:
    """Say what could be meant by a key that a section does not have."""
    known = kinds(section)
    return f"unknown key{nearest(str(key), known) or '; known here are ' + ', '.join(known)}"


def _in_yaml(text: str) -> str:
    """Return text with the constants of YAML for those of Python."""
    words = {"None": "null", "True": "true", "False": "false"}
    return re.sub(r"\b(None|True|False)\b", lambda match: words[match[0]], text)


# printing


def config_yaml(config: AutogradConfig, *, comments: bool = False) -> str:
    """Return the YAML that `load_config` reads as this configuration.

    With comments each key is explained by its record's docstring.
    """
    return "\n".join(_lines(config, comments=comments)) + "\n"


def _lines(record: Any, *, comments: bool, indent: str = "") -> Iterator[str]:
    record_class: Any = type(record)
    explained = _attributes(record_class)
    for i, (key, kind) in enumerate(kinds(record_class).items()):
        if comments:
            text = textwrap.fill(explained[key], _WIDTH - len(indent) - 2, break_on_hyphens=False)
            between = "\n" if i and not indent else ""
            yield between + textwrap.indent(text, f"{indent}# ")
        value = getattr(record, key)
        if isinstance(kind, type):
            yield f"{indent}{key}:"
            yield from _lines(value, comments=comments, indent=indent + "  ")
        else:
            yield f"{indent}{key}: {_inline(value)}"


def _attributes(record_class: type) -> dict[str, str]:
    """Return what a class's docstring says of each attribute, with the constants of YAML."""
    _, _, section = (inspect.getdoc(record_class) or "").partition("\nAttributes:\n")
    section = re.split(r"\n\n?(?=\S)", section)[0]
    entries = re.findall(r"^    (\w+): (.*(?:\n {5,}.*)*)", section, re.MULTILINE)
    return {name: _in_yaml(" ".join(text.replace("`", "").split())) for name, text in entries}


def _inline(value: Any) -> str:
    """Return a value on one line."""
    if isinstance(value, Mapping):
        pairs = [f"{_inline(key)}: {_inline(inner)}" for key, inner in value.items()]
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, tuple):
        return f"[{', '.join(map(_inline, value))}]"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{value}".replace("inf", ".inf").replace("nan", ".nan")
    quoted = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, str):
        return quoted
    if re.fullmatch(r"\w[\w./-]*", value, re.ASCII) and _parse(value) == value:
        return value  # neither a number nor null
    return "".join(c if c.isprintable() else f"\\U{ord(c):08x}" for c in quoted)
