"""Execute the chapters in place and bring them into the form in which they are stored.

Stored notebooks keep every text output, because these are the claims that `pytest --nbval` tests.
They drop what a diff cannot show and the build draws anew: pictures, the frames of interactive
figures, the state of widgets, timestamps.

They get what a reader needs who meets the chapter alone: the line that installs what it imports,
how long it takes, and folds that JupyterLab, Colab and the page each know by another name.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import nbformat
import yaml
from nbclient import NotebookClient
from nbformat import NotebookNode

import autograd_lib

BOOK = Path(__file__).resolve().parent.parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
WORDS_A_MINUTE, LINES_A_MINUTE = 200, 7
# What the page folds, in the words of JupyterLab and Colab.
FOLDS: dict[str, dict[str, Any]] = {
    "hide-input": {"jupyter": {"source_hidden": True}, "cellView": "form"},
    "hide-output": {"jupyter": {"outputs_hidden": True}},
    "hide-cell": {"jupyter": {"source_hidden": True, "outputs_hidden": True}, "cellView": "form"},
}
NOT_READ = {"hide-input", "hide-cell", "exercise", "check", "solution"}
FRAMES = re.compile(r"<!-- frames -->.*?<!-- /frames -->", re.DOTALL)


def chapters() -> list[Path]:
    return sorted(path for path in BOOK.glob("*.ipynb"))


def install_line(repository: str = "") -> str:
    """Return the first cell of a chapter: how to install what the chapters import.

    Args:
        repository: Address of the published repository; without one, the wheel that the book's
            start page offers is installed.
    """
    if repository:
        what = f"autograd-by-experiment[chapters] @ git+{repository}"
        return f'# Remove the "# " and run this cell once:\n# %pip install "{what}"'
    wheel = f"autograd_by_experiment-{autograd_lib.__version__}-py3-none-any.whl"
    return (
        f"# Download {wheel} from the book's start page\n"
        '# into the folder of this notebook, remove the "# " below and run this cell once:\n'
        f'# %pip install "./{wheel}[chapters]"'
    )


def repository() -> str:
    """Return the address that the book is published from, if one is set."""
    config = yaml.safe_load((BOOK.parent / "_config.yml").read_text(encoding="utf-8"))
    return str(config.get("repository", {}).get("url", ""))


def minutes(notebook: NotebookNode) -> int:
    """Return how long a chapter takes to read, without what is folded and without exercises."""
    words = lines = 0
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            if re.match("#+ (Exercise|Solution)", cell.source):
                continue
            words += len(re.sub(r"\]\([^)]*\)|\*\*It takes\*\*.*", "", cell.source).split())
        elif not NOT_READ & set(cell.metadata.get("tags", [])):
            lines += len(re.findall(r"^ *[^#\s].*", cell.source, re.M))
    return round(words / WORDS_A_MINUTE + lines / LINES_A_MINUTE)


def with_times(table: str) -> str:
    """Return the start page with the time that each chapter takes, at the end of its row."""

    def timed(row: re.Match[str]) -> str:
        return f"{row[1]} {minutes(nbformat.read(BOOK / row[2], as_version=4))} |"

    return re.sub(r"^(\|.*\]\((\w+\.ipynb)\).*\|) \d+ \|$", timed, table, flags=re.M)


def normalize(notebook: NotebookNode) -> NotebookNode:
    """Return a copy in the stored form; a notebook in that form comes back equal."""
    notebook = nbformat.from_dict(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    takes = f"**It takes** about {minutes(notebook)} minutes to read, without the exercises."
    opening = notebook.cells[0]
    opening.source = re.sub(r"^\*\*It takes\*\* .*", takes, opening.source, flags=re.M)
    install = notebook.cells[1]
    if "%pip install" in install.source:
        install.source = install_line(repository())
    count = 0
    for cell in notebook.cells:
        cell.source = cell.source.rstrip()
        kept = {key: cell.metadata[key] for key in ("tags", "mystnb") if key in cell.metadata}
        for tag in kept.get("tags", []):
            kept |= FOLDS.get(tag, {})
        if cell.source == "## Solutions":  # JupyterLab folds the section
            kept["jp-MarkdownHeadingCollapsed"] = True
        cell.metadata = nbformat.from_dict(kept)
        if cell.cell_type == "code":
            count += 1
            if cell.execution_count is not None:
                cell.execution_count = count
            cell.outputs = _merged(_stored(output, count) for output in cell.outputs)
    return notebook


def _merged(outputs: Iterable[NotebookNode]) -> list[NotebookNode]:
    """Join what was printed in one piece by chance and in two by chance."""
    merged: list[NotebookNode] = []
    for output in outputs:
        last = merged[-1] if merged else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last.text += output.text
        else:
            merged.append(output)
    return merged


def _stored(output: NotebookNode, count: int) -> NotebookNode:
    output.pop("transient", None)
    if output.output_type == "execute_result":
        output.execution_count = count
    if "data" in output:
        output.metadata = nbformat.from_dict(
            {key: value for key, value in output.metadata.items() if not key.startswith("image/")}
        )
        output.data = nbformat.from_dict(
            {
                mime: FRAMES.sub("<!-- frames --><!-- /frames -->", data)
                if mime == "text/html"
                else data
                for mime, data in output.data.items()
                if not mime.startswith("image/") and "widget" not in mime
            }
        )
    return output


def execute(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    # In an empty folder, as the build does: a chapter reads nothing but what it wrote itself.
    with tempfile.TemporaryDirectory() as folder:
        client = NotebookClient(notebook, timeout=900, resources={"metadata": {"path": folder}})
        client.execute()
    nbformat.write(normalize(notebook), path)


def main() -> None:
    parser = argparse.ArgumentParser(description="\n\n".join(__doc__.split("\n\n")[:1]))
    parser.add_argument("notebooks", nargs="*", type=Path, help="by default all chapters")
    paths = parser.parse_args().notebooks or chapters()
    for i, path in enumerate(paths, 1):
        print(f"[{i}/{len(paths)}] {path.name}", flush=True)
        execute(path)
    start = BOOK / "index.md"
    start.write_text(with_times(start.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
