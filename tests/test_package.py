"""The public face of the library: what it exports, what importing it loads, what it documents."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from environments import PROJECT, run_with
from hatchling.builders.sdist import SdistBuilder
from hatchling.builders.wheel import WheelBuilder

import autograd_lib

ROOT = Path(__file__).resolve().parent.parent
MODULES = [module.name for module in pkgutil.iter_modules(autograd_lib.__path__)]
OPTIONAL = (
    *("matplotlib", "ipywidgets", "ruamel", "pydantic", "scipy", "jax", "tensorflow", "sklearn"),
    *("pyarrow", "lightning", "pytorch_lightning", "transformers"),
)


def test_every_module_s_public_names_are_exported() -> None:
    # `report` is the book's: what its pages show beside prose.
    public = [name for name in MODULES if not name.startswith("_") and name != "report"]
    modules = [importlib.import_module(f"autograd_lib.{name}") for name in public]
    names = {name for module in modules for name in getattr(module, "__all__", ())}
    sections = {name for name in names if re.fullmatch("[A-Z][a-z]+Config", name)}
    figures = {"Explorer", "GradientDashboard", "explore"}
    assert sorted(names - sections | figures | {"AutogradConfig"}) == autograd_lib.__all__


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


README = (ROOT / "README.md").read_text(encoding="utf-8")
# A paragraph that ends in the extra that the block below it needs.
BLOCKS = re.findall(r"\(needs (?:no extra|`\[(\w+)\]`)\):\n\n```(\w+)\n(.*?)```", README, re.S)


def test_each_block_of_the_readme_names_its_extra() -> None:
    assert README.count("```python") == sum(language == "python" for _, language, _ in BLOCKS) > 0
    commands = [body for _, language, body in BLOCKS if language == "bash"]
    assert README.count("\nautograd-lib ") == sum(body.count("autograd-lib ") for body in commands)
    assert {extra for extra, *_ in BLOCKS if extra} <= set(PROJECT["optional-dependencies"])


def test_the_readme_runs_with_the_extras_that_it_names(tmp_path: Path) -> None:
    """A reader runs one block after the other, and meets no warning."""
    blocks = [(extra or None, body) for extra, language, body in BLOCKS if language == "python"]
    # Races in which a sample is a call or two, as by the fixture `short_samples`.
    short = "from autograd_lib import benchmark; benchmark._SAMPLE_SECONDS = 1e-4"
    run = run_with((None, short), *blocks, cwd=tmp_path)
    assert (run.returncode, run.stderr) == (0, "")


def test_what_no_extra_brings_is_hidden(tmp_path: Path) -> None:
    """The test above can fail: a block that needs more than it names does."""
    run = run_with(
        (None, "import torch, numpy, autograd_lib"), (None, "import pydantic"), cwd=tmp_path
    )
    assert (run.returncode, "No module named 'pydantic'" in run.stderr) == (1, True)
    run = run_with(("train", "import ruamel.yaml, pydantic, sklearn, matplotlib"), cwd=tmp_path)
    assert run.returncode == 0, run.stderr


def test_the_readme_names_the_wheel_of_this_version() -> None:
    wheels = re.findall(r"[\w.-]+\.whl", README)
    assert set(wheels) == {f"autograd_by_experiment-{autograd_lib.__version__}-py3-none-any.whl"}


def build(builder: type, root: Path, folder: Path) -> Path:
    return Path(next(builder(str(root)).build(directory=str(folder), versions=["standard"])))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(WheelBuilder, ROOT, tmp_path_factory.mktemp("wheel"))


def test_the_wheel_holds_all_that_the_library_reads(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist()}
    files = [path for path in (ROOT / "autograd_lib").rglob("*") if path.is_file()]
    library = {path.relative_to(ROOT).as_posix() for path in files if path.suffix != ".pyc"}
    configs = {f"autograd_lib/configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    assert {name for name in held if ".dist-info/" not in name} == library | configs
    for name in (
        "py.typed",
        "report/dashboard.html",
        "report/explorer.js",
        "report/book.mplstyle",
        "configs/digits_cnn.yaml",
    ):
        assert f"autograd_lib/{name}" in held
    assert any(name.startswith("autograd_lib/report/records/") for name in held)
    (entry_points,) = (text for name, text in held.items() if name.endswith("entry_points.txt"))
    assert b"autograd-lib = autograd_lib.command.main:main" in entry_points


def test_the_description_stands_alone(wheel: Path) -> None:
    """On an index there are no files beside it."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        description = archive.read(name).decode().partition("\n\n")[2]
    assert "# Autograd by Experiment" in description
    assert "automatic settings" in description  # the words of a link stay
    assert not re.findall(r"\]\((?!https?:)", description)
    assert "Himmelblau" not in description  # the picture and its caption


def test_the_source_distribution_builds_the_same_wheel(wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(build(SdistBuilder, ROOT, tmp_path)) as archive:
        archive.extractall(tmp_path, filter="data")
    (root,) = (path for path in tmp_path.iterdir() if path.is_dir())
    assert build(WheelBuilder, root, tmp_path / "again").read_bytes() == wheel.read_bytes()


def test_no_message_names_a_distribution_of_ours() -> None:
    """The import's name belongs to another project on PyPI, and this one is not there."""
    for path in (ROOT / "autograd_lib").rglob("*.py"):
        assert not re.search(r"pip install \S*autograd", path.read_text(encoding="utf-8")), path


# Folders and files, from the ground up: each imports from those before it.
ORDER = [
    *("core", "report", "functions"),
    *("gradients", "memory", "models", "higher_order", "applications"),
    *("benchmark", "monitor", "nonfinite", "checkpointing"),
    *("config", "callbacks", "training", "tuning", "examples", "command", "__main__"),
]


def imported_modules(path: Path) -> set[str]:
    """The folders and files of the library that a file imports, by any form of import."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            found |= {f"{base}.{alias.name}" for alias in node.names}
    return {name.split(".")[1] for name in found if re.match(r"autograd_lib\.|\.", name)}


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_one_way(module: str) -> None:
    place = ROOT / "autograd_lib" / module
    files = [*place.rglob("*.py")] if place.is_dir() else [place.with_suffix(".py")]
    imported = set().union(*map(imported_modules, files))
    assert imported - {module} <= set(ORDER[: ORDER.index(module)]) - {"applications"}


@pytest.mark.parametrize(
    "line",
    [
        "import autograd_lib.training.loop",
        "import autograd_lib.training as t",
        "from autograd_lib.training import loop",
        "from autograd_lib import training",
        "from autograd_lib.training.loop import Stop",
        "from .training import loop",
    ],
)
def test_every_form_of_import_is_seen(line: str, tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(f"def f():\n    {line}\n")
    assert "training" in imported_modules(path)
