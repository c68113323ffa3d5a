"""Execute the chapters in place and bring them into the form in which they are stored.

Stored notebooks keep every text output, because these are the claims that `pytest --nbval` tests.
They drop what a diff cannot show and the build draws anew: pictures, the frames of interactive
figures, the state of widgets, timestamps.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

BOOK = Path(__file__).resolve().parent.parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}
FRAMES = re.compile(r"<!-- frames -->.*?<!-- /frames -->", re.DOTALL)


def chapters() -> list[Path]:
    return sorted(path for path in BOOK.glob("*.ipynb"))


def normalize(notebook: NotebookNode) -> NotebookNode:
    """Return a copy in the stored form; a notebook in that form comes back equal."""
    notebook = nbformat.from_dict(notebook)
    notebook.metadata = nbformat.from_dict(METADATA)
    count = 0
    for cell in notebook.cells:
        cell.source = cell.source.rstrip()
        kept = {key: cell.metadata[key] for key in ("tags", "mystnb") if key in cell.metadata}
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


if __name__ == "__main__":
    main()
