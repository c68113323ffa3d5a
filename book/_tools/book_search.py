"""The search index: every section and documented object of the book, in one script.

Sphinx's own search loads its summaries by `fetch`, which a page opened from a file may not do.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

COMMANDS = re.compile(r"\\[a-zA-Z]+|\\.|[{}$^_&]")  # of LaTeX
NOT_SEARCHED = (
    nodes.section,
    nodes.title,
    nodes.comment,
    nodes.raw,
    nodes.image,
    addnodes.desc,
    addnodes.desc_signature,
)


def sections(document: nodes.document) -> Iterator[tuple[str, str, str, str]]:
    """Yield anchor, title, text and printed output of each section and documented object."""
    for part in document.findall(lambda node: isinstance(node, nodes.section | addnodes.desc)):
        if isinstance(part, nodes.section):
            anchor, title = part["ids"][0], _words(part[0])
        else:
            signature = part[0]
            anchor = (signature.get("ids") or [""])[0]
            title = signature.get("fullname") or signature.astext()
        text, printed = (
            " ".join(" ".join(found).split())
            for found in (_own_text(part), _own_text(part, outputs=True))
        )
        yield anchor, title, text, printed


def _own_text(part: nodes.Element, *, outputs: bool = False, inside: bool = False) -> Iterator[str]:
    """Yield the paragraphs and the code of a part, or what its code prints, without subsections."""
    for child in part.children:
        if isinstance(child, NOT_SEARCHED):
            continue
        within = inside or child.get("nb_element") == "cell_code_output"
        if not isinstance(child, nodes.TextElement):
            yield from _own_text(child, outputs=outputs, inside=within)
        elif within == outputs:
            yield _words(child)


def _words(element: nodes.Element) -> str:
    """Text as one reads it: formulas lose their commands."""
    found = []
    for node in element.findall(nodes.Text):
        parents = list(_parents(node, element))
        if any(isinstance(parent, nodes.raw) for parent in parents):
            continue
        is_formula = any(isinstance(parent, nodes.math | nodes.math_block) for parent in parents)
        found.append(COMMANDS.sub(" ", node) if is_formula else node)
    return "".join(found)


def _parents(node: nodes.Node, last: nodes.Element) -> Iterator[nodes.Element]:
    while node is not last:
        node = node.parent
        yield node


def collect_sections(app: Sphinx, document: nodes.document) -> None:
    """Keep a page's sections for the search index."""
    pages = app.env.__dict__.setdefault("book_sections", {})
    pages[app.env.docname] = list(sections(document))


def forget_sections(app: Sphinx, env: BuildEnvironment, docname: str) -> None:
    """Drop what is kept of a page that is read anew."""
    env.__dict__.setdefault("book_sections", {}).pop(docname, None)


def merge_sections(app: Sphinx, env: BuildEnvironment, names: Any, other: Any) -> None:
    """Take over what another process read."""
    env.__dict__.setdefault("book_sections", {}).update(other.__dict__.get("book_sections", {}))


def write_search_index(app: Sphinx, static: Path) -> None:
    """Write the index as a script: a page opened from a file may load no other form of data."""
    pages = [
        [name + ".html", app.env.titles[name].astext(), found]
        for name, found in sorted(app.env.__dict__["book_sections"].items())
    ]
    text = json.dumps(pages, ensure_ascii=False, separators=(",", ":"))
    (static / "search-index.js").write_text(f"const searchIndex = {text};\n", encoding="utf-8")


def add_search_page(app: Sphinx) -> Iterator[tuple[str, dict[str, Any], str]]:
    """Add the page of search results."""
    yield "search", {"title": "Search"}, "search.html"


def switch_off_sphinx_search(app: Sphinx) -> None:
    """Keep Sphinx from writing its own index and page."""
    app.builder.search = False


def setup(app: Sphinx) -> dict[str, Any]:
    """Take the place of Sphinx's search."""
    app.connect("builder-inited", switch_off_sphinx_search)
    app.connect("doctree-read", collect_sections)
    app.connect("env-purge-doc", forget_sections)
    app.connect("env-merge-info", merge_sections)
    app.connect("html-collect-pages", add_search_page)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "env_version": 2}
