"""Formulas are typeset by KaTeX while the book is built, so that a page needs no script for them.

A formula that KaTeX rejects is a Sphinx warning that names file and line, and fails a strict build.
There are no macros: JupyterLab, where the same chapters are run, would not know them.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from docutils import nodes
from py_mini_racer import JSEvalException, MiniRacer
from sphinx.application import Sphinx
from sphinx.util import logging
from sphinx.util.math import get_node_equation_number

KATEX = Path(__file__).parent / "katex"
# Environments that stand at the top level in LaTeX and so must not be wrapped in another.
OUTER = re.compile(r"\\begin\{(equation|align|alignat|gather|multline|CD)\*?\}")

logger = logging.getLogger(__name__)


@cache
def _katex() -> MiniRacer:
    context = MiniRacer()
    context.eval("var window = {};" + (KATEX / "katex.min.js").read_text(encoding="utf-8"))
    return context


@lru_cache(maxsize=4096)
def render(tex: str, display: bool) -> str:
    """Typeset one formula as HTML with MathML beside it.

    Args:
        tex: the formula, without delimiters.
        display: on a line of its own, or within the text.

    Returns:
        A `span` element.

    Raises:
        ValueError: where KaTeX rejects the formula, with its message.
    """
    options = {"displayMode": display, "throwOnError": True, "strict": "error"}
    try:
        return _katex().call("katex.renderToString", tex, options | {"output": "htmlAndMathml"})
    except JSEvalException as error:
        first_line = str(error).splitlines()[0]
        raise ValueError(first_line.partition("KaTeX parse error: ")[2] or first_line) from error


def display_source(text: str) -> str:
    r"""Return what a math block stands for: one formula, or lines aligned as Sphinx aligns them.

    Sphinx numbers equations itself, so numbering environments lose their number here.

    >>> print(display_source(r"a &= b \\ c &= d"))
    \begin{split}a &= b \\ c &= d\end{split}
    >>> print(display_source(r"\begin{align}a\end{align}"))
    \begin{align*}a\end{align*}
    """
    if OUTER.search(text):
        return re.sub(r"\\(begin|end)\{(equation|align|alignat|gather)\}", r"\\\1{\2*}", text)
    parts = [
        rf"\begin{{split}}{part}\end{{split}}" if r"\\" in part else part
        for part in (piece.strip() for piece in text.split("\n\n"))
        if part
    ]
    if len(parts) == 1:
        return parts[0]
    return r"\begin{gathered}" + r"\\".join(parts) + r"\end{gathered}"


def _typeset(node: nodes.Element, tex: str, display: bool) -> str:
    try:
        return render(tex, display)
    except ValueError as error:
        logger.warning("formula rejected by KaTeX: %s: %s", tex, error, location=node)
        return f"<code>{html.escape(tex)}</code>"


def visit_math(translator: Any, node: nodes.math) -> None:
    """Write a formula within the text."""
    translator.body.append(translator.starttag(node, "span", "", CLASS="math notranslate"))
    translator.body.append(_typeset(node, node.astext(), display=False) + "</span>")
    raise nodes.SkipNode


def visit_displaymath(translator: Any, node: nodes.math_block) -> None:
    """Write a formula on a line of its own, with its number where it has one."""
    body = translator.body
    body.append(translator.starttag(node, "div", CLASS="math notranslate"))
    body.append(
        f'<div class="math-scroll">{_typeset(node, display_source(node.astext()), True)}</div>'
    )
    if node["number"]:
        body.append(f'<span class="eqno">({get_node_equation_number(translator, node)})')
        translator.add_permalink_ref(node, "Link to this equation")
        body.append("</span>")
    body.append("</div>\n")
    raise nodes.SkipNode


def stylesheet(pages: Iterable[str]) -> tuple[str, set[str]]:
    """Return KaTeX's style sheet without the fonts that no page uses, and the fonts that stay.

    Args:
        pages: the HTML of every page.
    """
    css = (KATEX / "katex.css").read_text(encoding="utf-8")
    used = {
        name
        for page in pages
        for group in re.findall(r'class="([^"]*)"', page)
        for name in group.split()
    }
    wanted = {("Main", "400", "normal")}
    for selector, family, rest in re.findall(r"([^{}]*)\{font-family:KaTeX_(\w+)([^}]*)\}", css):
        if any(set(re.findall(r"\.([\w-]+)", one)) <= used for one in selector.split(",")):
            bold, italic = "700" in rest, "italic" in rest
            wanted.add((family, "700" if bold else "400", "italic" if italic else "normal"))
    # \textbf and \textit change weight and slant of whatever family stands around them.
    if "textbf" in used:
        wanted |= {(family, "700", slant) for family, _, slant in wanted}
    if "textit" in used:
        wanted |= {(family, weight, "italic") for family, weight, _ in wanted}
    fonts = set()

    def keep(face: re.Match[str]) -> str:
        family, slant, weight, file = face.groups()
        if (family, weight, slant) not in wanted:
            return ""
        fonts.add(file)
        return face[0]

    face = (
        r'@font-face\{[^}]*font-family:"?KaTeX_(\w+)"?;font-style:(\w+);font-weight:(\d+);'
        r"src:url\(fonts/([^)]+)\)[^}]*\}"
    )
    return re.sub(face, keep, css), fonts


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the renderer under the name that `html_math_renderer` takes."""
    app.add_html_math_renderer("katex", (visit_math, None), (visit_displaymath, None))
    return {"parallel_read_safe": True, "parallel_write_safe": True}
