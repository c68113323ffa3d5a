"""The public face of the library: what it exports, what importing it loads, what it documents."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

import autograd_lib

ROOT = Path(__file__).resolve().parent.parent
MODULES = [module.name for module in pkgutil.iter_modules(autograd_lib.__path__)]
OPTIONAL = (
    *("matplotlib", "ipywidgets", "yaml", "pydantic", "scipy", "jax", "tensorflow", "sklearn"),
    *("pyarrow", "lightning", "pytorch_lightning", "transformers"),
)


def test_every_module_s_public_names_are_exported() -> None:
    # `report` is the book's: what its pages show beside prose.
    public = [name for name in MODULES if not name.startswith("_") and name != "report"]
    names = {n for m in public for n in importlib.import_module(f"autograd_lib.{m}").__all__}
    assert sorted(names) == autograd_lib.__all__


def test_no_public_name_is_a_module_s_name() -> None:
    """`from autograd_lib import compare` must never depend on what was imported before."""
    assert not set(autograd_lib.__all__) & set(MODULES)


def test_importing_loads_no_optional_package() -> None:
    loaded = f"import sys, autograd_lib; print(*[m for m in {OPTIONAL} if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True, check=True)
    assert run.stdout.split() == []


@pytest.mark.parametrize("name", autograd_lib.__all__)
def test_public_names_are_documented(name: str) -> None:
    """A sentence first; a function has an example, which the doctests run."""
    thing = getattr(autograd_lib, name)
    doc = inspect.getdoc(thing)
    assert doc
    assert doc.splitlines()[0].rstrip().endswith((".", ":"))
    if inspect.isfunction(thing):
        assert ">>>" in doc
        assert "Raises:" in doc
    if inspect.isclass(thing):
        for method, value in vars(thing).items():
            if not method.startswith("_") and inspect.isfunction(value):
                assert inspect.getdoc(value), f"{name}.{method}"


@pytest.mark.usefixtures("short_samples")
def test_the_readme_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert blocks
    scope: dict = {}  # a reader runs one after the other
    for block in blocks:
        exec(block, scope)


# May be imported by their siblings, from the ground up.
ORDER = [
    *(
        "report",
        "_tables",
        "_progress",
        "_rules",
        "gradients",
        "functions",
        "activations",
        "implicit",
        *("losses", "models"),
    ),
    *("_reductions", "_activations", "_history", "_hooks", "_noise", "_exports", "monitor"),
    *("_observe", "nonfinite", "_plots", "figures"),
    *("_series", "taylor", "taylor_rules", "taylor_layers", "higher_order", "cross_entropy"),
    *("memory", "benchmark", "widgets"),
    *("_compile", "_schedule", "_recompute", "_trace", "_probe", "_chain", "checkpointing"),
    *("_fields", "_yaml", "config", "_batches", "_trials", "_search", "tuning"),
    *("_setup", "_peers", "_saving", "_loops", "training", "callbacks", "examples"),
    *("_data", "_build", "_picture", "_doctor", "__main__"),
]


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    package = ROOT / "autograd_lib" / module
    files = [*package.rglob("*.py")] if package.is_dir() else [package.with_suffix(".py")]
    imported = {
        (node.module or "").split(".")[1]
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("autograd_lib.")
    }
    assert imported - {module} <= set(ORDER[: ORDER.index(module)])
