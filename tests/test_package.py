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
    # PyTorch itself logs a line where a CUDA build finds no driver but a folder of CUDA's.
    lines = [line for line in run.stderr.splitlines() if "No CUDA runtime is found" not in line]
    assert (run.returncode, lines) == (0, [])


def test_what_no_extra_brings_is_hidden(tmp_path: Path) -> None:
    """The test above can fail: a block that needs more than it names does."""
    run = run_with((None, "import torch, numpy, autograd_lib"), (None, "import yaml"), cwd=tmp_path)
    assert (run.returncode, "No module named 'yaml'" in run.stderr) == (1, True)
    run = run_with(("train", "import yaml, pydantic, sklearn, matplotlib"), cwd=tmp_path)
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
    for name in ("py.typed", "dashboard.html", "report/book.mplstyle", "configs/digits_cnn.yaml"):
        assert f"autograd_lib/{name}" in held
    assert any(name.startswith("autograd_lib/report/records/") for name in held)
    (entry_points,) = (text for name, text in held.items() if name.endswith("entry_points.txt"))
    assert b"autograd-lib = autograd_lib.__main__:main" in entry_points


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
