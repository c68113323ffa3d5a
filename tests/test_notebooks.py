"""The discipline of the chapters: what nbval does not look at, checked here.

Each rule is a function from a notebook to the complaints it has. Every chapter is put to every
rule, and every rule to a chapter that was broken on purpose, so that no rule can go blunt.
"""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path

import matplotlib as mpl
import nbformat
import notebooks
import pytest
import torch
import yaml
from myst_parser.mdit_to_docutils.base import default_slugify
from nbformat import NotebookNode
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent
BOOK = ROOT / "book"

Rule = Callable[[NotebookNode], Iterator[str]]


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def tags(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def opening(cell: NotebookNode) -> str:
    return repr(cell.source[:50])


# How a chapter is stored.


def stored_executed(notebook: NotebookNode) -> Iterator[str]:
    """Without an execution count nbval does not compare the output of a cell."""
    for number, cell in enumerate(code_cells(notebook), 1):
        if cell.execution_count != number:
            yield f"cell {number} has execution count {cell.execution_count}: {opening(cell)}"


def stored_normalized(notebook: NotebookNode) -> Iterator[str]:
    """No pictures, no frames, no widget state, no stray metadata."""
    if notebook.metadata.get("kernelspec", {}).get("name") != "python3":
        yield "the kernel is not python3"
    for cell, stored in zip(notebook.cells, notebooks.normalize(notebook).cells, strict=True):
        if cell != stored:
            yield f"not as `make notebooks` stores it: {opening(cell)}"


def no_empty_cells(notebook: NotebookNode) -> Iterator[str]:
    for i, cell in enumerate(notebook.cells):
        if not cell.source.strip():
            yield f"cell {i} of all is empty"


def no_addresses(notebook: NotebookNode) -> Iterator[str]:
    """Outputs that hold an address or a path differ at every run or on every machine."""
    pattern = re.compile(
        r"0x[0-9a-f]{6,}|/(?:home|tmp|root|Users|usr|opt|work)/|site-packages|[A-Z]:\\"
    )
    for cell in code_cells(notebook):
        if found := pattern.search(str(cell.outputs)):
            yield f"output with {found.group()!r}: {opening(cell)}"


def outputs_are_compared(notebook: NotebookNode) -> Iterator[str]:
    cells = code_cells(notebook)
    ignored = [cell for cell in cells if "nbval-ignore-output" in tags(cell)]
    if len(ignored) > 0.05 * len(cells):
        yield f"{len(ignored)} of {len(cells)} cells are not compared; at most 5 % may be"
    for cell in cells:
        if unread := {"nbval-skip", "raises-exception", "skip-execution"} & set(tags(cell)):
            yield f"tagged {unread}: {opening(cell)}"
        if "%%" in cell.source[:2] or re.search(r"NBVAL_\w+", cell.source):
            yield f"magic that changes what is compared: {opening(cell)}"


# No claim hangs on a clock.

CLOCKS = {"perf_counter", "monotonic", "process_time", "thread_time", "time", "default_timer"}
CLOCKS |= {f"{clock}_ns" for clock in CLOCKS} | {"timeit", "repeat", "blocked_autorange"}
CLOCKS |= {"elapsed_time", "compare"}
TIMES = {"medians", "ratios", "noise", "noise_band", "verdict", "seconds", "time"}
TIMES |= {"predicted_time", "plain_time", "break_even", "cpu_time_total", "self_cpu_time_total"}
COUNTS = {"peak_bytes", "host_reads", "gradient_error", "settings", "steps", "names", "source"}
COUNTS |= {"in_tolerances"}
GROWS = {"append", "extend", "add", "insert", "update"}

Kinds = frozenset[str]  # of what an expression depends on: "clock", "record"
NONE: Kinds = frozenset()


def called(node: ast.AST) -> str:
    """The last name of what is called: `perf_counter` of `time.perf_counter()`."""
    function = node.func if isinstance(node, ast.Call) else None
    return getattr(function, "attr", getattr(function, "id", ""))


def root(node: ast.AST) -> str:
    """The variable at the left of `variable.attribute[index]`."""
    while isinstance(node, (ast.Attribute, ast.Subscript, ast.Starred, ast.Call)):
        node = node.func if isinstance(node, ast.Call) else node.value
    return getattr(node, "id", "")


class Clockwatch:
    """Follows times through the assignments of a notebook, and collects what is claimed of them.

    Attributes:
        names: What each variable depends on; a function, what its results depend on.
        found: The complaints about the cell that was read last.
    """

    def __init__(self) -> None:
        self.names: dict[str, Kinds] = {}
        self.functions: dict[str, Kinds] = {}
        self.found: list[str] = []

    def read(self, source: str, compared: bool) -> list[str]:
        self.found, self.compared = [], compared
        body = ast.parse(source).body
        self.run(body)
        if body and isinstance(body[-1], ast.Expr):
            self.shown(body[-1].value)
        return list(dict.fromkeys(self.found))

    def kinds(self, node: ast.AST) -> Kinds:
        """What the value of an expression depends on."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id, NONE)
        key = getattr(node, "attr", None)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            key = node.slice.value
        if key in COUNTS or called(node) in {"len", "peak_bytes"}:
            return NONE
        if key in TIMES:  # but of a comparison of samples that the cell makes up
            base = node.value  # type: ignore[attr-defined]
            made_up = isinstance(base, ast.Call) and getattr(base.func, "id", "") == "Comparison"
            return self.kinds(base) or (NONE if made_up else frozenset({"clock"}))
        if isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            before = self.names.copy()
            for generator in node.generators:
                self.bind(generator.target, self.kinds(generator.iter))
            found = self.union(ast.iter_child_nodes(node))
            self.names = before
            return found
        if isinstance(node, ast.Lambda):
            before = self.names.copy()
            self.forget(node.args)
            found, self.names = self.kinds(node.body), before
            return found
        own = self.functions.get(called(node), NONE)
        if called(node) in CLOCKS:
            own |= {"clock"}
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "record":
            own |= {"record"}
        return own | self.union(ast.iter_child_nodes(node))

    def union(self, nodes: Iterable[ast.AST]) -> Kinds:
        return NONE.union(*map(self.kinds, nodes))

    def bind(self, target: ast.AST, kinds: Kinds, value: ast.AST | None = None) -> None:
        if isinstance(target, (ast.Tuple, ast.List)):
            values = value.elts if isinstance(value, (ast.Tuple, ast.List)) else []
            together = len(values) == len(target.elts)
            for i, part in enumerate(target.elts):
                self.bind(part, self.kinds(values[i]) if together else kinds)
        elif isinstance(target, ast.Name):
            self.names[target.id] = kinds
        elif kinds:
            self.names[root(target)] = self.names.get(root(target), NONE) | kinds

    def forget(self, arguments: ast.arguments) -> None:
        for argument in ast.walk(arguments):
            if isinstance(argument, ast.arg):
                self.names[argument.arg] = NONE

    def run(self, statements: Iterable[ast.stmt]) -> None:
        for statement in statements:
            self.step(statement)

    def step(self, node: ast.stmt) -> None:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            self.define(node)
        elif isinstance(node, ast.Assign):
            kinds = self.kinds(node.value)
            for target in node.targets:
                self.bind(target, kinds, node.value)
        elif isinstance(node, (ast.AugAssign, ast.AnnAssign)):
            before = self.kinds(node.target) if isinstance(node, ast.AugAssign) else NONE
            self.bind(node.target, before | (self.kinds(node.value) if node.value else NONE))
        elif isinstance(node, ast.Assert):
            self.claim(node.test, node)
        elif isinstance(node, ast.Expr):
            self.call(node.value)
        elif isinstance(node, ast.With):
            for item in node.items:
                if item.optional_vars is not None:
                    self.bind(item.optional_vars, self.kinds(item.context_expr))
        elif isinstance(node, ast.If) and any(isinstance(n, ast.Raise) for n in ast.walk(node)):
            self.claim(node.test, node)
        for _ in range(2 if isinstance(node, (ast.For, ast.While)) else 1):  # the first turn may
            if isinstance(node, ast.For):  # make what the second one reads
                self.bind(node.target, self.kinds(node.iter))
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                for field in ("body", "orelse", "finalbody"):
                    self.run(getattr(node, field, []))
                for handler in getattr(node, "handlers", []):
                    self.run(handler.body)

    def define(self, node: ast.FunctionDef | ast.ClassDef) -> None:
        """What a function returns is taken to depend on everything that is read in it."""
        before = self.names.copy()
        if isinstance(node, ast.FunctionDef):
            self.forget(node.args)
        self.run(node.body)
        kinds = NONE
        for inner in self.within(node):
            if isinstance(inner, (ast.FunctionDef, ast.ClassDef)):
                kinds |= self.functions.get(inner.name, NONE)
            else:
                kinds |= self.kinds(inner)
        self.names = before
        self.functions[node.name] = kinds

    def within(self, node: ast.AST) -> Iterator[ast.FunctionDef | ast.ClassDef | ast.expr]:
        """The expressions of the statements in a definition, and the definitions in it."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)):
                yield child
            elif isinstance(child, ast.expr):
                if not isinstance(getattr(child, "ctx", None), ast.Store):
                    yield child
            elif not isinstance(child, ast.arguments):
                yield from self.within(child)

    def call(self, node: ast.AST) -> None:
        if called(node).startswith("assert_"):
            self.claim(node, node)
        elif called(node) in {"print", "display"}:
            self.shown(node)
        elif called(node) in GROWS and (kinds := self.kinds(node)):
            self.names[root(node)] = self.names.get(root(node), NONE) | kinds

    def claim(self, node: ast.AST, whole: ast.AST) -> None:
        if kinds := self.kinds(node):
            self.found.append(f"claims a time of a {'/'.join(sorted(kinds))}: {ast.unparse(whole)}")

    def shown(self, node: ast.AST) -> None:
        if self.compared and "clock" in self.kinds(node):
            self.found.append(f"a time in compared output: {ast.unparse(node)}")


def no_assertion_on_the_clock(notebook: NotebookNode) -> Iterator[str]:
    """A busy machine fails no cell: times are drawn from records, or shown in ignored output."""
    watch = Clockwatch()
    for cell in code_cells(notebook):
        for complaint in watch.read(cell.source, "nbval-ignore-output" not in tags(cell)):
            yield f"{complaint[:120]}: {opening(cell)}"


# What a reader sees.


FIGURE = re.compile(r"<Figure size|<!-- frames -->|<figure class=.dashboard")


def figures_have_alt_text(notebook: NotebookNode) -> Iterator[str]:
    """A person's words, twenty characters at least, no file name, on every picture."""

    def bad(alt: str) -> bool:
        return len(alt.strip()) < 20 or re.search(r"\.(?:png|svg|jpe?g)\b", alt) is not None

    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            for alt in re.findall(r"!\[(.*?)\]\(", cell.source):
                if bad(alt):
                    yield f"alt text {alt!r}: {opening(cell)}"
        elif "<Figure size" in str(cell.outputs) and bad(
            cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
        ):
            yield f"a figure without alt text: {opening(cell)}"


def figures_have_captions(notebook: NotebookNode) -> Iterator[str]:
    """Below each picture and each interactive figure stands a paragraph `*Figure. …*`."""
    for cell, following in pairwise(notebook.cells):
        if cell.cell_type == "code" and FIGURE.search(str(cell.outputs)):
            if not following.source.startswith("*Figure. "):
                yield f"a figure without a caption: {opening(cell)}"
        elif following.source.startswith("*Figure. "):
            yield f"a caption without a figure: {opening(following)}"


def opens_and_ends_as_a_chapter(notebook: NotebookNode) -> Iterator[str]:
    first, headings = notebook.cells[0], []
    for part in ("# ", "**You will be able to**", "**You need**", "**It takes**"):
        if part not in first.source:
            yield f"the first cell lacks {part!r}"
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            headings += re.findall(r"^## .*", cell.source, re.MULTILINE)
    if headings[-4:] != ["## Exercises", "## What to remember", "## Sources", "## Solutions"]:
        yield f"the last sections are {headings[-4:]}"
    sources = "".join(c.source for c in notebook.cells if "## Sources" in c.source)
    if "](references.md#" not in sources.partition("## Sources")[2]:
        yield "the sources cite nothing from references.md"


def short_cells(notebook: NotebookNode) -> Iterator[str]:
    """At most fifteen lines of code; the imports at the top may be more."""
    for cell in code_cells(notebook)[2:]:
        lines = [line for line in cell.source.splitlines() if line.strip()]
        if len(lines) > 15:
            yield f"{len(lines)} lines of code: {opening(cell)}"


# A chapter reads and runs anywhere.


def plain_markdown(notebook: NotebookNode) -> Iterator[str]:
    """No role, no directive, no target, no substitution: programs that are not Sphinx show them."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            source = re.sub(
                r"(`{3,}).*?\n(.*?)\1|(?<!\})`[^`\n]+`", "", cell.source, flags=re.DOTALL
            )
            for markup in MYST.findall(source) + re.findall(r"^`{3,}\{\S*", cell.source, re.M):
                yield f"only Sphinx reads {markup!r}: {opening(cell)}"
        elif "myst_nb" in cell.source or re.search(r"\bglue\(", cell.source):
            yield f"glue: {opening(cell)}"


MYST = re.compile(r"\{[\w:+-]+\}`[^`]*`|^:{3,}\{.*|^\([\w-]+\)=$|\{\{.*?\}\}|^%.*", re.MULTILINE)


def installs_and_imports_first(notebook: NotebookNode) -> Iterator[str]:
    """First the line that installs, then the folded imports, all of packages that it installs."""
    install, imports = code_cells(notebook)[:2]
    if install.source != notebooks.install_line(notebooks.repository()):
        yield "the first cell of code is not the line that installs"
    if "hide-input" not in tags(imports):
        yield "the imports are not folded"
    if not re.search(r"^(?:from|import) autograd_lib", imports.source, re.MULTILINE):
        yield "the second cell of code does not import autograd_lib"
    for cell in code_cells(notebook):
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            else:
                continue
            for package in {name.partition(".")[0] for name in names}:
                written = any(f'"{package}.py"' in c.source for c in code_cells(notebook))
                if (
                    not written
                    and package not in sys.stdlib_module_names | installed_for_chapters()
                ):
                    yield f"the line that installs does not install {package}"


@cache
def installed_for_chapters() -> frozenset[str]:
    """The packages that the extra `chapters` brings, by the names that one imports."""
    found = {"autograd_lib", "IPython", "ipykernel"}  # the latter are there where a notebook runs
    waiting, seen = ["autograd-by-experiment[chapters]"], set()
    while waiting:
        wanted = Requirement(waiting.pop())
        if str(wanted) in seen:
            continue
        seen.add(str(wanted))
        found |= {name for name, owners in IMPORTED.items() if wanted.name in owners}
        if wanted.name == "autograd-by-experiment":
            for line in importlib.metadata.requires(wanted.name) or []:
                needed = Requirement(line)
                for extra in {"", *wanted.extras}:
                    if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                        waiting.append(f"{needed.name}[{','.join(needed.extras)}]")
    return frozenset(found)


IMPORTED = importlib.metadata.packages_distributions()


def reads_no_file_beside_it(notebook: NotebookNode) -> Iterator[str]:
    """The style of the figures comes from the package; nothing is read that no cell wrote."""
    for cell in code_cells(notebook):
        for style in re.findall(r"style\.use\(([^)]*)\)", cell.source):
            if style != '"autograd_lib.report.book"':
                yield f"a style that is not in the package: {style}"
        if found := re.search(r"[\w./-]+\.mplstyle|\bsys\.path\.\w+\(\"|__file__", cell.source):
            yield f"{found.group()} beside the notebook: {opening(cell)}"


def links_lead_somewhere(notebook: NotebookNode) -> Iterator[str]:
    """Another chapter, a heading, or an anchor of references.md that exists."""
    for cell in notebook.cells:
        if cell.cell_type != "markdown":
            continue
        for link in re.findall(r"(?<!`)\]\(([^)\s]+)\)", cell.source):
            if link.startswith("https://"):
                continue
            file, _, anchor = link.partition("#")
            if file and not (BOOK / file).is_file():
                yield f"no file {file}: {opening(cell)}"
            elif anchor and anchor not in anchors_of(file, notebook):
                yield f"no anchor {anchor} in {file or 'this chapter'}: {opening(cell)}"


def anchors_of(file: str, notebook: NotebookNode) -> set[str]:
    if file.endswith(".md"):
        return set(re.findall(r'<a id="([\w-]+)">', (BOOK / file).read_text(encoding="utf-8")))
    cells = (read(BOOK / file) if file else notebook).cells
    text = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    return {default_slugify(re.sub("[`*]", "", t)) for t in re.findall(r"^#+ (.*)", text, re.M)}


def folds_are_answered(notebook: NotebookNode) -> Iterator[str]:
    """Answers are folded below a question, and the next sentence gives them."""
    text = [cell.source if cell.cell_type == "markdown" else None for cell in notebook.cells]
    for i, cell in enumerate(notebook.cells):
        if "hide-output" not in tags(cell):
            continue
        question = next(filter(None, reversed(text[:i])), "")
        below = next(filter(None, text[i + 1 :]), "")
        answer = re.sub(r"^\*Figure\. .*\*\s*", "", below)
        if "?" not in question:
            yield f"a folded answer without a question above it: {opening(cell)}"
        if not answer or answer.startswith(("#", ">", "|")):
            yield f"a folded answer that no sentence below gives: {opening(cell)}"
        elif re.match(r"[^.:!]*\?", answer):
            yield f"a folded answer followed by another question: {answer[:50]!r}"


CODE = re.compile(r"^(`{3,}|~{3,}).*?^\1|(?<!`)`[^`\n]+`(?!`)|\$\$.*?\$\$|\$[^$\n]+\$", re.S | re.M)
CITED = re.compile(r"\[[^\]]*\]\(references\.md#[^)]*\)")


def numbers_are_claims(notebook: NotebookNode) -> Iterator[str]:
    """A number in prose stands beside an assertion that holds it."""
    cells = notebook.cells
    for i, cell in enumerate(cells):
        if cell.cell_type != "markdown" or i == 0:
            continue
        prose = CITED.sub("", cell.source)
        prose = re.sub(r"^#+ .*|^\s*:?\w+: .*|\]\([^)]*\)", "", CODE.sub("", prose), flags=re.M)
        beside = [c for c in cells[max(0, i - 2) : i + 3] if c.cell_type == "code"]
        asserted = "\n".join(c.source for c in beside if "assert" in c.source)
        versions = re.compile(r"(?:PyTorch|torch|Python) \d+(?:\.\d+)*|95 % interval")
        for number, percent in re.findall(
            r"(?<![\w.])(\d[\d.,]*\d|\d)( %)?", versions.sub("", prose)
        ):
            forms = [number, f"{float(number) / 100:g}"] if percent else [number]
            if not any(re.search(rf"(?<![\d.]){re.escape(f)}(?!\d)", asserted) for f in forms):
                yield f"{number} is asserted by no cell beside: {opening(cell)}"


# Exercises: stub, check, solution.


def exercises(notebook: NotebookNode) -> list[tuple[NotebookNode, ...]]:
    """The cells (stub, check, solution) of each exercise."""
    found = {
        kind: [cell for cell in code_cells(notebook) if kind in tags(cell)]
        for kind in ("exercise", "check", "solution")
    }
    return list(zip(*found.values(), strict=True))


def three_exercises_with_hidden_solutions(notebook: NotebookNode) -> Iterator[str]:
    announced = sum(len(re.findall(r"^### Exercise", c.source, re.M)) for c in notebook.cells)
    complete = len(exercises(notebook))
    if complete < 3 or announced != complete:
        yield f"{announced} exercises are announced, {complete} have stub, check and solution"
    for _, _, solution in exercises(notebook):
        if "hide-cell" not in tags(solution):
            yield f"a solution in plain sight: {opening(solution)}"
    start = next((i for i, c in enumerate(notebook.cells) if c.source == "## Solutions"), None)
    for i, cell in enumerate(notebook.cells):
        if (start is not None and i > start) != is_solution(notebook.cells[i]):
            yield f"solutions stand in the last section and alone: {opening(cell)}"


def is_solution(cell: NotebookNode) -> bool:
    if cell.cell_type == "code":
        return "solution" in tags(cell)
    return cell.source.startswith("### Solution")


def checks_bite(notebook: NotebookNode) -> Iterator[str]:
    """A check fails on the stub and passes on the solution, from the imports alone."""
    imports = code_cells(notebook)[1].source
    for stub, check, solution in exercises(notebook):
        name = re.search(r"^def (\w+)", stub.source, re.M).group(1)
        scope: dict = {}
        with warnings.catch_warnings():  # of the packages that a chapter imports
            warnings.simplefilter("ignore")
            exec(imports, scope)
        exec(check.source, scope)
        exec(stub.source, scope)
        try:
            scope[f"check_{name}"](scope[name])
        except Exception:
            exec(solution.source, scope)
            if f"check_{name}({name})" not in solution.source:
                yield f"the solution of {name} does not run its check"
        else:
            yield f"the check of {name} accepts the stub"


RULES: list[Rule] = [
    stored_executed,
    stored_normalized,
    no_empty_cells,
    no_addresses,
    outputs_are_compared,
    no_assertion_on_the_clock,
    figures_have_alt_text,
    figures_have_captions,
    opens_and_ends_as_a_chapter,
    short_cells,
    plain_markdown,
    installs_and_imports_first,
    reads_no_file_beside_it,
    links_lead_somewhere,
    folds_are_answered,
    numbers_are_claims,
    three_exercises_with_hidden_solutions,
    checks_bite,
]


@pytest.fixture(autouse=True)
def _in_the_book(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(BOOK)  # where a chapter's kernel runs
    dtype = torch.get_default_dtype()
    with mpl.rc_context():  # the chapters set the style of their figures
        yield
    torch.set_default_dtype(dtype)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
@pytest.mark.parametrize("path", notebooks.chapters(), ids=lambda path: path.stem)
def test_chapter(path: Path, rule: Rule) -> None:
    assert list(rule(read(path))) == []


def test_every_chapter_is_in_the_contents() -> None:
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    files = [chapter["file"] for part in contents["parts"] for chapter in part["chapters"]]
    listed = {file for file in files if (ROOT / f"{file}.ipynb").exists()}
    assert listed == {f"book/{path.stem}" for path in notebooks.chapters()}


def test_the_start_page_says_how_long_each_chapter_takes() -> None:
    start = (BOOK / "index.md").read_text(encoding="utf-8")
    contents = yaml.safe_load((ROOT / "_toc.yml").read_text())
    numbered = sum(len(part["chapters"]) for part in contents["parts"] if part.get("numbered"))
    assert len(re.findall(r"\| \d+ \|$", start, re.M)) == numbered > 0
    assert notebooks.with_times(start) == start, "`make notebooks` writes the times"


# Each rule against a chapter broken on purpose.


def first_code(notebook: NotebookNode, wanted: Callable[[NotebookNode], bool]) -> NotebookNode:
    return next(cell for cell in code_cells(notebook) if wanted(cell))


def add_markdown(notebook: NotebookNode, text: str) -> None:
    notebook.cells.insert(3, nbformat.v4.new_markdown_cell(text))


def unexecuted(notebook: NotebookNode) -> None:
    code_cells(notebook)[3].execution_count = None


def stored_image(notebook: NotebookNode) -> None:
    drawn = first_code(notebook, lambda c: "<Figure size" in str(c.outputs))
    drawn.outputs[-1].data["image/png"] = "iVBORw0KGgo="


def stored_frames(notebook: NotebookNode) -> None:
    drawn = first_code(notebook, lambda c: "<!-- frames -->" in str(c.outputs))
    data = drawn.outputs[-1].data
    data["text/html"] = data["text/html"].replace("<!-- frames -->", "<!-- frames --><img>")


def other_kernel(notebook: NotebookNode) -> None:
    notebook.metadata.kernelspec.name = "my-venv"


def empty_cell(notebook: NotebookNode) -> None:
    notebook.cells.append(nbformat.v4.new_code_cell(" "))


def address(notebook: NotebookNode) -> None:
    printed = first_code(notebook, lambda c: c.outputs and "text" in c.outputs[0])
    printed.outputs[0].text = "<Linear object at 0x7f4655114f10>"


def path_in_output(notebook: NotebookNode) -> None:
    printed = first_code(notebook, lambda c: c.outputs and "text" in c.outputs[0])
    printed.outputs[0].text = "/home/reader/book/basics.py:3: UserWarning"


def many_ignored(notebook: NotebookNode) -> None:
    for cell in code_cells(notebook)[:5]:
        cell.metadata.tags = ["nbval-ignore-output"]


def exception_expected(notebook: NotebookNode) -> None:
    code_cells(notebook)[4].metadata.tags = ["raises-exception"]


def add_code(notebook: NotebookNode, text: str) -> None:
    notebook.cells.insert(3, nbformat.v4.new_code_cell(text))


def asserts_seconds(notebook: NotebookNode) -> None:
    add_code(notebook, "start = time.perf_counter()\nstep()\ntook = time.perf_counter() - start")
    add_code(notebook, "pass")  # in between
    notebook.cells.insert(6, nbformat.v4.new_code_cell("assert took < 1"))


def asserts_a_ratio(notebook: NotebookNode) -> None:
    add_code(
        notebook,
        "found = compare(steps)\nfaster = [found.ratios[n].median for n in steps]\n"
        "assert max(faster) < 0.8",
    )


def asserts_in_a_helper(notebook: NotebookNode) -> None:
    add_code(
        notebook,
        "def check(times):\n    for _ in range(3):\n        begun = perf_counter()\n"
        "        times.append(perf_counter() - begun)\n    assert max(times) < 1",
    )


def asserts_what_a_helper_timed(notebook: NotebookNode) -> None:
    add_code(
        notebook,
        "def timed(run):\n    start = time.monotonic_ns()\n    run()\n"
        "    return time.monotonic_ns() - start\n\n\n"
        "np.testing.assert_array_less(timed(step), 1e9)",
    )


def raises_on_a_record(notebook: NotebookNode) -> None:
    add_code(
        notebook,
        'ratio = Comparison.from_json(record("training")).ratios["a"]\n'
        "if ratio.high > 1:\n    raise AssertionError(ratio)",
    )


def prints_seconds(notebook: NotebookNode) -> None:
    add_code(notebook, "for trial in report.trials:\n    print(f'{trial.time:.3f} s')")


def alt_text_of_spaces(notebook: NotebookNode) -> None:
    drawn = first_code(notebook, lambda c: "mystnb" in c.metadata)
    drawn.metadata["mystnb"]["image"]["alt"] = " " * 30


def no_alt_text(notebook: NotebookNode) -> None:
    del first_code(notebook, lambda c: "mystnb" in c.metadata).metadata["mystnb"]["image"]


def file_name_as_alt_text(notebook: NotebookNode) -> None:
    drawn = first_code(notebook, lambda c: "mystnb" in c.metadata)
    drawn.metadata["mystnb"]["image"]["alt"] = "figures/the-gradient-flow.png"


def markdown_image(notebook: NotebookNode) -> None:
    add_markdown(notebook, "![](picture.png)")


def no_caption(notebook: NotebookNode) -> None:
    for cell in notebook.cells:
        cell.source = cell.source.replace("*Figure. ", "*")


def caption_in_the_air(notebook: NotebookNode) -> None:
    add_markdown(notebook, "*Figure. Nothing to be seen.*")


def no_library(notebook: NotebookNode) -> None:
    code_cells(notebook)[1].source = "import torch"


def no_line_that_installs(notebook: NotebookNode) -> None:
    code_cells(notebook)[0].source = "# pip install autograd_lib"


def imports_in_sight(notebook: NotebookNode) -> None:
    code_cells(notebook)[1].metadata.tags = []


def package_of_the_tests(notebook: NotebookNode) -> None:
    add_code(notebook, "import hypothesis")


def role(notebook: NotebookNode) -> None:
    add_markdown(notebook, "See {py:func}`~autograd_lib.compare`.")


def directive(notebook: NotebookNode) -> None:
    add_markdown(notebook, ":::{note}\nMind the gap.\n:::")


def fenced_directive(notebook: NotebookNode) -> None:
    add_markdown(notebook, "```{note}\nMind the gap.\n```")


def target(notebook: NotebookNode) -> None:
    add_markdown(notebook, "(a-target)=\n## A heading")


def substitution(notebook: NotebookNode) -> None:
    add_markdown(notebook, "Download {{ wheel }}.")


def glued_number(notebook: NotebookNode) -> None:
    add_code(notebook, "from myst_nb import glue")


def style_file(notebook: NotebookNode) -> None:
    add_code(notebook, 'plt.style.use("book.mplstyle")')


def module_beside_it(notebook: NotebookNode) -> None:
    add_code(notebook, 'sys.path.append("..")')


def lost_anchor(notebook: NotebookNode) -> None:
    add_markdown(notebook, "It is known ([Nobody 1900](references.md#nobody1900known)).")


def lost_chapter(notebook: NotebookNode) -> None:
    add_markdown(notebook, "See [another chapter](another.ipynb).")


def lost_heading(notebook: NotebookNode) -> None:
    add_markdown(notebook, "See [above](#no-such-heading).")


def fold(notebook: NotebookNode, question: str, answer: str) -> None:
    cells = [nbformat.v4.new_markdown_cell(text) for text in (question, answer)]
    folded = nbformat.v4.new_code_cell("print(1)", metadata={"tags": ["hide-output"]})
    notebook.cells[3:3] = [cells[0], folded, cells[1]]


def fold_without_question(notebook: NotebookNode) -> None:
    fold(notebook, "Now print it.", "It is one.")


def unanswered_fold(notebook: NotebookNode) -> None:
    fold(notebook, "What does it print?", "## The next section")


def fold_answered_by_a_question(notebook: NotebookNode) -> None:
    fold(notebook, "What does it print?", "And what if you print two?")


def solution_among_the_exercises(notebook: NotebookNode) -> None:
    notebook.cells.insert(-15, notebook.cells.pop())


def no_opening(notebook: NotebookNode) -> None:
    notebook.cells[0].source = "# A chapter"


def no_ending(notebook: NotebookNode) -> None:
    notebook.cells = [c for c in notebook.cells if "## Sources" not in c.source]


def long_cell(notebook: NotebookNode) -> None:
    code_cells(notebook)[2].source = "x = 1\n" * 21


def number_in_prose(notebook: NotebookNode) -> None:
    add_markdown(notebook, "This makes training 37 times as fast.")


def percentage_in_prose(notebook: NotebookNode) -> None:
    add_markdown(notebook, "It reaches 98.4 % of the digits.")


def solution_in_sight(notebook: NotebookNode) -> None:
    exercises(notebook)[0][2].metadata.tags = ["solution"]


def exercise_without_check(notebook: NotebookNode) -> None:
    add_markdown(notebook, "### Exercise 9: on your own")


def check_accepts_the_stub(notebook: NotebookNode) -> None:
    check = exercises(notebook)[0][1]
    check.source = re.sub(r":\n.*", ":\n    assert answer", check.source, flags=re.S)


def check_refuses_the_solution(notebook: NotebookNode) -> None:
    _, check, _ = exercises(notebook)[0]
    check.source += "\n    assert False"


@pytest.mark.parametrize(
    ("rule", "breakage"),
    [
        (stored_executed, unexecuted),
        (stored_normalized, stored_image),
        (stored_normalized, stored_frames),
        (stored_normalized, other_kernel),
        (no_empty_cells, empty_cell),
        (no_addresses, address),
        (no_addresses, path_in_output),
        (outputs_are_compared, many_ignored),
        (outputs_are_compared, exception_expected),
        (no_assertion_on_the_clock, asserts_seconds),
        (no_assertion_on_the_clock, asserts_a_ratio),
        (no_assertion_on_the_clock, asserts_in_a_helper),
        (no_assertion_on_the_clock, asserts_what_a_helper_timed),
        (no_assertion_on_the_clock, raises_on_a_record),
        (no_assertion_on_the_clock, prints_seconds),
        (figures_have_alt_text, no_alt_text),
        (figures_have_alt_text, alt_text_of_spaces),
        (figures_have_alt_text, file_name_as_alt_text),
        (figures_have_alt_text, markdown_image),
        (figures_have_captions, no_caption),
        (figures_have_captions, caption_in_the_air),
        (installs_and_imports_first, no_library),
        (installs_and_imports_first, no_line_that_installs),
        (installs_and_imports_first, imports_in_sight),
        (installs_and_imports_first, package_of_the_tests),
        (plain_markdown, role),
        (plain_markdown, directive),
        (plain_markdown, fenced_directive),
        (plain_markdown, target),
        (plain_markdown, substitution),
        (plain_markdown, glued_number),
        (reads_no_file_beside_it, style_file),
        (reads_no_file_beside_it, module_beside_it),
        (links_lead_somewhere, lost_anchor),
        (links_lead_somewhere, lost_chapter),
        (links_lead_somewhere, lost_heading),
        (folds_are_answered, fold_without_question),
        (folds_are_answered, unanswered_fold),
        (folds_are_answered, fold_answered_by_a_question),
        (opens_and_ends_as_a_chapter, no_opening),
        (opens_and_ends_as_a_chapter, no_ending),
        (short_cells, long_cell),
        (numbers_are_claims, number_in_prose),
        (numbers_are_claims, percentage_in_prose),
        (three_exercises_with_hidden_solutions, solution_in_sight),
        (three_exercises_with_hidden_solutions, exercise_without_check),
        (three_exercises_with_hidden_solutions, solution_among_the_exercises),
        (checks_bite, check_accepts_the_stub),
    ],
    ids=lambda value: value.__name__,
)
def test_rule_bites(rule: Rule, breakage: Callable[[NotebookNode], None]) -> None:
    notebook = read(BOOK / "basics.ipynb")
    breakage(notebook)
    assert list(rule(notebook))


def test_a_check_that_refuses_the_solution_is_noticed() -> None:
    notebook = read(BOOK / "basics.ipynb")
    check_refuses_the_solution(notebook)
    with pytest.raises(AssertionError):
        list(checks_bite(notebook))


def test_counts_may_be_asserted_and_records_shown() -> None:
    notebook = read(BOOK / "basics.ipynb")
    add_code(
        notebook,
        """result = compare(steps)
assert result.peak_bytes["a"] < result.peak_bytes["b"]
assert len(report.trials) > 5
stored = record("monitoring_light_mlp")
print(stored.source, stored["medians"])
assert stored["host_reads"]["GradientMonitor"] == 0
noise = rng.normal(size=(3, 2))
assert Comparison(("a", "b"), "a", noise, noise[:, 0], {}, {}).verdict("b") == "tie"
Comparison.from_json(stored).plot()
""",
    )
    ignored = nbformat.v4.new_code_cell("result", metadata={"tags": ["nbval-ignore-output"]})
    notebook.cells.insert(4, ignored)
    assert list(no_assertion_on_the_clock(notebook)) == []
