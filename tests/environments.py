"""Processes that can import what an extra brings, and nothing else that is installed here."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from itertools import pairwise
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# In the place of Python's own finder: one before it could raise, but not say that there is none. A
# copy that a package brings in a folder of its own stays (setuptools has one of `packaging`).
_PROCESS = """\
import json, site, sys
from importlib.machinery import PathFinder

class Limited(PathFinder):
    hidden = ()

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if path is None and name in cls.hidden:
            path = [folder for folder in sys.path if folder not in site.getsitepackages()]
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Limited
scope = {"__name__": "__main__"}
for Limited.hidden, code in json.load(sys.stdin):
    exec(code, scope)
"""


def brought(extra: str | None) -> set[str]:
    """The distributions that an installation of the library with this extra has."""
    optional = PROJECT["optional-dependencies"]
    waiting = [*PROJECT["dependencies"], *(optional[extra] if extra else ())]
    found: set[str] = set()
    seen: set[str] = set()
    while waiting:
        text = waiting.pop()
        if text in seen:
            continue
        seen.add(text)
        requirement = Requirement(text)
        if canonicalize_name(requirement.name) == PROJECT["name"]:
            waiting += [inner for name in requirement.extras for inner in optional[name]]
            continue
        found.add(canonicalize_name(requirement.name))
        try:
            needed = [Requirement(inner) for inner in metadata.requires(requirement.name) or ()]
        except metadata.PackageNotFoundError:
            continue  # for another platform
        extras = ("", *requirement.extras)
        waiting += [
            f"{inner.name}[{','.join(inner.extras)}]" if inner.extras else inner.name
            for inner in needed
            if not inner.marker or any(inner.marker.evaluate({"extra": name}) for name in extras)
        ]
    return found


@cache
def hidden(extra: str | None) -> frozenset[str]:
    """The modules at the top that are installed here, and would not be with this extra."""
    there = brought(extra)
    return frozenset(
        module
        for module, names in metadata.packages_distributions().items()
        if module != "autograd_lib" and not there & {canonicalize_name(name) for name in names}
    )


def run_with(
    *parts: tuple[str | None, str], arguments: Sequence[str] = (), cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """Run pieces of code in one process, each where only what its extra brings can be imported.

    Args:
        parts: For each piece the extra, None for none, and the code.
        arguments: The process's `sys.argv[1:]`.
        cwd: The process's working directory.
    """
    for (before, _), (after, _) in pairwise(parts):
        # What was imported stays imported.
        assert hidden(after) <= hidden(before), f"[{after}] lacks what [{before}] has"
    return subprocess.run(
        [sys.executable, "-c", _PROCESS, *arguments],
        input=json.dumps([(sorted(hidden(extra)), code) for extra, code in parts]),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
