"""What the book's pages hold besides their text: the run record, and no dead files.

The theme's scripts and style sheets are not used (see templates/layout.html). After a build, files
that no page refers to are removed from the output.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import re
import shutil
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import book_math
import book_search
import torch
import torch_pages
from docutils import nodes
from myst_nb.sphinx_ import HideCodeCellNode, NbMetadataCollector
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import ExtensionError
from sphinx.ext.napoleon.docstring import GoogleDocstring
from sphinx.transforms.post_transforms import SphinxPostTransform

import autograd_lib

ROOT = Path(__file__).parents[2]
FOREIGN = re.compile(r"(torch|numpy|matplotlib|collections|typing)\b|[a-z]+$")


@cache
def versions() -> dict[str, str]:
    """Return the versions that a reader needs to repeat a run."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "numpy")}
    own = {"autograd_lib": autograd_lib.__version__}
    return {"Python": platform.python_version()} | packages | own


@cache
def device() -> str:
    """Name the device that a chapter's kernel finds here."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    capability = torch.backends.cpu.get_cpu_capability()
    return f"a CPU ({platform.machine()}, {capability}, {os.cpu_count()} cores)"


def run_record(executed: float | None) -> dict[str, Any]:
    """Say when and with what a page was run, or built where it holds no code.

    Args:
        executed: POSIX time at which the page's code was run; None for a page without code.
    """
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    moment = float(epoch) if epoch else executed or datetime.now(UTC).timestamp()
    return {
        "verb": "Built" if executed is None else "Run",
        "date": datetime.fromtimestamp(moment, UTC).date().isoformat(),
        "versions": versions(),
        "device": device(),
    }


# --- pages ----------------------------------------------------------------------------------------


def mend(body: str) -> str:
    """Repair what readers stumble over in the HTML of the packages used here."""
    # This label hides the text beside it ("Show the code") from a screen reader.
    body = body.replace(' aria-label="Toggle hidden content"', "")
    # An empty corner of a table heads nothing.
    body = body.replace('<th class="head"><p></p></th>', "<td></td>")

    def breakable(cell: re.Match[str]) -> str:
        # Long names in a narrow column break where their parts meet.
        def name(code: re.Match[str]) -> str:
            return re.sub(r"(?<=\w[._])(?=\w)", "<wbr>", code[0])

        return re.sub(r'(?<=<span class="pre">)[^<]{21,}', name, cell[0])

    body = re.sub(r"<(t[dh])\b.*?</\1>", breakable, body, flags=re.DOTALL)

    def as_lines(signature: re.Match[str]) -> str:
        # Sphinx sets a long signature as a list of definitions without anything defined.
        text = re.sub(r"<(/?)dl>", r"<\1span>", signature[0])
        return re.sub(r"<dd>", '<span class="sig-line">', text).replace("</dd>", "</span>")

    return re.sub(r'<dt class="sig .*?</dt>', as_lines, body, flags=re.DOTALL)


def fill_context(app: Sphinx, name: str, template: str, context: Any, doctree: Any) -> None:
    """Give the template what it shows beyond Sphinx's own context."""
    executed = (
        NbMetadataCollector.get_exec_data(app.env, name) if name in app.env.all_docs else None
    )
    context["run"] = run_record(executed["mtime"] if executed else None)
    body = context.get("body", "")
    context["has_math"] = 'class="katex' in body
    context["body"] = mend(body)
    if 'class="sd-' in body:
        message = f"{name}: sphinx-design's styles are not part of the site; use an admonition"
        raise ExtensionError(message)
    if name in app.env.all_docs and app.env.doc2path(name).endswith(".ipynb"):
        context["notebook"] = Path(name).name + ".ipynb"
    if app.config.html_theme_options.get("repository_url") and name in app.env.all_docs:
        context["published"] = published(app, name)
    found = app.env.__dict__["book_sections"].get(name)
    context["description"] = found[0][2][:160].rpartition(" ")[0] if found else ""

    def asset(file: str) -> str:
        """Link a file with a mark of its content, so that no browser keeps an old one."""
        source = ROOT / "book" / "_static" / file
        mark = hashlib.sha256(source.read_bytes()).hexdigest()[:8] if source.exists() else ""
        return context["pathto"](f"_static/{file}", 1) + (f"?v={mark}" if mark else "")

    context["asset"] = asset


def published(app: Sphinx, name: str) -> dict[str, str]:
    """Return where a page can be read, run and discussed once the book has an address."""
    options = app.config.html_theme_options
    url, branch = options["repository_url"].rstrip("/"), options.get("repository_branch", "main")
    file = Path(app.env.doc2path(name)).relative_to(app.srcdir).as_posix()
    links = {"Source": f"{url}/blob/{branch}/{file}", "Report a mistake": f"{url}/issues/new"}
    if file.endswith(".ipynb") and (found := re.match(r"https://github\.com/(.+)", url)):
        place = f"{found[1]}/blob/{branch}/{file}"
        links["Open in Colab"] = f"https://colab.research.google.com/github/{place}"
    return links


class NamePrompts(SphinxPostTransform):
    """Let the line that unfolds a part of a cell say what it shows."""

    default_priority = 200  # after myst-nb has folded the cells
    formats = ("html",)

    def run(self, **kwargs: Any) -> None:
        """Rename the prompts of the page at hand."""
        for cell in self.document.findall(nodes.container):
            # Of what it wraps myst-nb does not note the parent.
            for fold in [part for part in cell.children if isinstance(part, HideCodeCellNode)]:
                code = fold.astext()
                if "below-input" in fold["classes"]:
                    what = "answer"
                elif "tag_solution" in cell["classes"]:
                    what = "solution"
                elif re.search(r"^(import|from) autograd_lib", code, re.MULTILINE):
                    what = "imports"
                else:
                    continue
                fold["prompt_show"], fold["prompt_hide"] = f"Show the {what}", f"Hide the {what}"


def parse_property(self: GoogleDocstring) -> list[str]:
    """Read a property's docstring as any other: Napoleon takes "Words: more words" for a type."""
    self._what = ""
    self._parse()
    return []


def read_formulas(*event: Any) -> None:
    """Let docstrings write formulas as the chapters do, between dollar signs."""
    lines: list[str] = event[-1]
    text = "\n".join(lines)
    display = re.compile(r"^( *)\$\$([^$`]+)\$\$$", re.M)
    text = display.sub(lambda found: f"{found[1]}.. math:: {' '.join(found[2].split())}", text)
    formula = re.compile(r"(?<![\w$`])\$(?!\s)([^$`]+?)(?<!\s)\$(?![\w$])")
    text = formula.sub(lambda found: f":math:`{' '.join(found[1].split())}`", text)
    lines[:] = text.split("\n")


def readable_default(*event: Any) -> tuple[str, str] | None:
    """Write a default that a factory makes as dots: what a dataclass writes cannot be parsed."""
    signature, returns = event[-2:]
    return signature and (signature.replace("<factory>", "..."), returns)


def quoted_name(
    name: str, raw: str, text: str, line: int, inliner: Any, *_: Any, **__: Any
) -> tuple[list[nodes.Node], list[nodes.Node]]:
    """Set what a docstring puts in single backticks as code, linked where it names an object."""
    literal = nodes.literal(raw, text, classes=["xref", "py", "py-obj"])
    context = inliner.document.settings.env.ref_context
    link = addnodes.pending_xref(
        raw,
        literal,
        refdomain="py",
        reftype="obj",
        reftarget=text.removesuffix("()"),
        **{key: context.get(key) for key in ("py:module", "py:class")},
    )
    return [link], []


def resolve_foreign(app: Sphinx, env: BuildEnvironment, node: Any, content: Any) -> Any:
    """Link the PyTorch types of signatures; let other foreign names be text.

    A name of this library that does not resolve stays a warning.
    """
    target = node.get("reftarget", "")
    if node.get("refdomain") != "py":
        return None
    page = torch_pages.address(target) if node["reftype"] == "class" else None
    if page is not None:
        return nodes.reference("", "", content, internal=False, refuri=page)
    from_annotation = "refexplicit" not in node
    return content if from_annotation or FOREIGN.match(target) else None


# --- after the build ------------------------------------------------------------------------------


def finish(app: Sphinx, exception: Exception | None) -> None:
    """Write what spans all pages, then remove every file that none of them uses."""
    if exception or app._warncount:
        # Sphinx warns of a page only when it reads it: without this, building again after a
        # strict build has failed would succeed.
        (Path(app.doctreedir) / "environment.pickle").unlink(missing_ok=True)
    if exception or app.builder.format != "html":
        return
    out = Path(app.outdir)
    static = out / "_static"
    book_search.write_search_index(app, static)
    for name in app.env.all_docs:
        if app.env.doc2path(name).endswith(".ipynb"):
            shutil.copyfile(app.env.doc2path(name), out / f"{name}.ipynb")
    first, title = app.config.root_doc + ".html", app.config.html_title
    (out / "index.html").write_text(
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f'<meta http-equiv="refresh" content="0; url={first}"></head>'
        f'<body><main><h1><a href="{first}">{title}</a></h1></main></body></html>\n',
        encoding="utf-8",
    )
    kept = {out / f"{name}.html" for name in [*app.env.all_docs, "index", "search"]}
    for path in set(out.rglob("*.html")) - kept:  # of a chapter that has been removed or renamed
        path.unlink()
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(kept) if path.exists()}
    css, fonts = book_math.stylesheet(pages.values())
    shutil.rmtree(static / "katex", ignore_errors=True)
    (static / "katex" / "fonts").mkdir(parents=True)
    (static / "katex" / "katex.css").write_text(css, encoding="utf-8")
    shutil.copyfile(book_math.KATEX / "LICENSE", static / "katex" / "LICENSE")
    for font in fonts:
        shutil.copyfile(book_math.KATEX / "fonts" / font, static / "katex" / "fonts" / font)
    remove_unused(out, pages)


def remove_unused(out: Path, pages: dict[Path, str]) -> None:
    """Remove static files, pictures and downloads that no page or style sheet in use refers to."""
    used = set()
    for path, text in pages.items():
        for link in re.findall(r'(?:src|href)="([^"#?:]+)', text):
            used.add((path.parent / link).resolve())
    for sheet in [path for path in used if path.suffix == ".css" and path.exists()]:
        for link in re.findall(r"url\(([^):?#]+)\)", sheet.read_text(encoding="utf-8")):
            used.add((sheet.parent / link.strip("\"'")).resolve())
    for folder in ("_static", "_images", "_downloads", "_sphinx_design_static", "_sources"):
        for path in sorted((out / folder).rglob("*"), reverse=True):
            if path.is_dir():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.resolve() not in used and path.name != "LICENSE":
                path.unlink()


def setup(app: Sphinx) -> dict[str, Any]:
    """Connect the functions above to the build."""
    app.connect("html-page-context", fill_context, priority=900)
    app.connect("missing-reference", resolve_foreign)
    app.add_role("quoted", quoted_name)
    app.connect("autodoc-process-docstring", read_formulas, priority=400)  # before Napoleon
    app.connect("autodoc-process-signature", readable_default)
    app.connect("build-finished", finish, priority=900)
    app.add_post_transform(NamePrompts)
    GoogleDocstring._parse_attribute_docstring = parse_property
    return {"parallel_read_safe": True, "parallel_write_safe": True, "env_version": 3}
