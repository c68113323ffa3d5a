"""Plain Markdown becomes what a page needs: callouts, numbered figures, links, citations.

A chapter is read in JupyterLab, VS Code, Colab and on GitHub too, and none of these knows a
directive or a role. So a chapter has none, and this module looks for what the text itself says:

- a quote that begins with `**Pitfall: …**` (or Note, Tip) is a callout;
- a paragraph `*Figure. …*` below a cell is the caption of what that cell shows;
- code that is a public name of the library or of PyTorch links to its reference;
- a link to `references.md#key` is a citation.
"""

from __future__ import annotations

import re
from typing import Any

import torch_pages
from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.transforms import SphinxTransform
from sphinx.transforms.post_transforms import SphinxPostTransform
from sphinx.util import logging
from sphinx.util.nodes import make_refnode

CALLOUTS = {"Pitfall": "warning", "Note": "note", "Tip": "tip"}
SOURCES = re.compile(r"(?:^|/)references\.html#")
CALL = re.compile(r"([A-Za-z_][\w.]*)(?:\(.*\))?$", re.DOTALL)  # a name, or a call of it

logger = logging.getLogger(__name__)


class Callouts(SphinxTransform):
    """Turn a quote that begins with a bold title into an admonition."""

    default_priority = 300

    def apply(self, **kwargs: Any) -> None:
        """Replace them in the page at hand."""
        for quote in list(self.document.findall(nodes.block_quote)):
            first = quote[0] if quote.children else None
            if not isinstance(first, nodes.paragraph):
                continue
            first.children = [node for node in first if node.astext()]  # MyST leaves empty texts
            kind = CALLOUTS.get(re.split(r"\W", first.astext(), maxsplit=1)[0])
            if kind is None or not isinstance(first[0], nodes.strong):
                continue
            title = nodes.title("", "", *first.pop(0).children)
            if isinstance(title[-1], nodes.Text):
                title[-1] = nodes.Text(title[-1].rstrip("."))
            if not first.children:
                quote.pop(0)
            elif isinstance(first[0], nodes.Text):
                first[0] = nodes.Text(first[0].lstrip())
            callout = nodes.admonition("", title, *quote.children, classes=["admonition", kind])
            callout.source, callout.line = quote.source, quote.line
            quote.replace_self(callout)


class Captions(SphinxTransform):
    """Turn a paragraph `*Figure. …*` into a figure, still without its picture, that is numbered."""

    default_priority = 300

    def apply(self, **kwargs: Any) -> None:
        """Replace them in the page at hand."""
        count = 0
        for paragraph in list(self.document.findall(nodes.paragraph)):
            words = paragraph[0] if len(paragraph) == 1 else None
            if not isinstance(words, nodes.emphasis) or not words.astext().startswith("Figure. "):
                continue
            cell = paragraph.previous_sibling()
            if _output(cell) is None:
                logger.warning("a caption, and no cell above it that shows anything", location=cell)
                continue
            count += 1
            words[0] = nodes.Text(str(words[0]).removeprefix("Figure. "))
            caption = nodes.caption("", "", *words.children)
            paragraph.replace_self(nodes.figure("", caption, ids=[f"figure-{count}"]))


def _output(cell: nodes.Node | None) -> nodes.Element | None:
    """Return what a cell shows."""
    if isinstance(cell, nodes.container) and cell.get("nb_element") == "cell_code":
        for part in cell.findall(nodes.container):
            if part.get("nb_element") == "cell_code_output":
                return part
    return None


class FigureOfCell(SphinxPostTransform):
    """Put what a cell shows into the figure whose caption stands below it."""

    default_priority = 205  # after myst-nb has folded cells, whose outputs must be their last part
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Fill the figures of the page at hand."""
        for figure in list(self.document.findall(nodes.figure)):
            output = _output(figure.previous_sibling())
            if output is not None:
                figure.parent.remove(figure)
                output.parent.replace(output, figure)
                figure.insert(0, output)


class Anchors(SphinxTransform):
    """Let links from other pages find the anchors that are written as HTML."""

    default_priority = 300

    def apply(self, **kwargs: Any) -> None:
        """Register those of the page at hand."""
        slugs = self.env.metadata[self.env.docname].setdefault("myst_slugs", {})
        for raw in self.document.findall(nodes.raw):
            if found := re.fullmatch(r'<a id="([\w-]+)">', raw.astext()):
                slugs[found[1]] = (raw.line, found[1], found[1])


class LinkNames(SphinxPostTransform):
    """Link code that is a public name to its reference."""

    default_priority = 8

    def run(self, **kwargs: Any) -> None:
        """Link those of the page at hand."""
        for literal in list(self.document.findall(nodes.literal)):
            found = CALL.match(literal.astext())
            if found is None or _within(literal, nodes.reference, nodes.title, pending_xref):
                continue
            link = self.own(found[1]) or self.foreign(found[1])
            if link is not None:
                literal.replace_self(link)
                link.append(literal)

    def own(self, name: str) -> nodes.Element | None:
        """Return a link to a name of this library, or None."""
        full = f"autograd_lib.{name.removeprefix('autograd_lib.')}"
        place = self.env.get_domain("py").objects.get(full)
        if place is None or place.docname == self.env.docname:
            return None
        builder = self.app.builder
        return make_refnode(builder, self.env.docname, place.docname, place.node_id, [], full)

    def foreign(self, name: str) -> nodes.Element | None:
        """Return a link to a name of PyTorch, or None."""
        address = torch_pages.address(name)
        return address and nodes.reference("", "", internal=False, refuri=address)


def _within(node: nodes.Node, *kinds: type) -> bool:
    while node is not None:
        if isinstance(node, kinds):
            return True
        node = node.parent
    return False


class Citations(SphinxPostTransform):
    """Mark links to the list of sources."""

    default_priority = 20  # when links are resolved

    def run(self, **kwargs: Any) -> None:
        """Mark those of the page at hand."""
        for link in self.document.findall(nodes.reference):
            if SOURCES.search(link.get("refuri", "")):
                link["classes"].append("citation")


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the transforms to the build."""
    for transform in (Callouts, Captions, Anchors):
        app.add_transform(transform)
    for transform in (FigureOfCell, LinkNames, Citations):
        app.add_post_transform(transform)
    return {"parallel_read_safe": True, "parallel_write_safe": True, "env_version": 2}
