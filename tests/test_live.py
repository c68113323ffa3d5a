"""The built book with a kernel behind it, as `make live` serves it, in a real browser."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from axe_playwright_python import sync_playwright as axe
from browser import chromium, give_up
from playwright.sync_api import expect

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_build" / "html"
CHAPTERS = sorted(path.stem for path in (ROOT / "book").glob("*.ipynb"))
MINUTES = 60_000  # milliseconds


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """The address of a running server, which ends with its token."""
    if not (SITE / "book" / "index.html").exists():
        give_up("no built site in _build/html: run `make book` first")
    command = [sys.executable, "book/_tools/live.py", "--no-browser", "--port", "0"]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        lines = iter(server.stderr.readline, "")
        yield next(line.strip() for line in lines if "token=" in line)
        server.terminate()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def tab(browser: Any, address: str) -> Iterator[Any]:
    """A tab that has the token's cookie; at the end nothing may have come from elsewhere."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = context.new_page()
    trouble: list[str] = []
    page.on("request", lambda r: trouble.append(r.url) if is_foreign(r.url) else None)
    page.on("pageerror", lambda error: trouble.append(str(error)))
    page.goto(address)
    yield page
    context.close()
    assert not trouble


def is_foreign(url: str) -> bool:
    return urlsplit(url).hostname not in ("127.0.0.1", None)


def open_chapter(tab: Any, address: str, name: str) -> None:
    tab.goto(address.partition("/book/")[0] + f"/book/{name}.html")
    unfold(tab)


def unfold(tab: Any) -> None:
    tab.evaluate("document.querySelectorAll('article details').forEach(d => (d.open = true))")


def press(tab: Any, button: str, cell: int) -> None:
    bar = tab.locator(".live-bar").nth(cell)
    bar.get_by_role("button", name=button, exact=True).click()


def run(tab: Any, cell: int, code: str) -> Any:
    """Write code into a cell and run it from the keyboard; return the cell."""
    found = tab.locator(".cell", has=tab.locator(".live-bar")).nth(cell)
    source = found.locator(".cell_input pre")
    source.focus()
    tab.keyboard.press("Control+a")
    tab.keyboard.insert_text(code)
    tab.keyboard.press("Control+Enter")
    expect(found.locator(".live-state")).to_have_text(re.compile("done|failed"), timeout=MINUTES)
    return found


@pytest.mark.parametrize("name", CHAPTERS)
def test_all_cells_of_a_chapter_run_in_the_page(name: str, tab: Any, address: str) -> None:
    open_chapter(tab, address, name)
    tab.get_by_role("button", name="Run all", exact=True).click()
    finished = re.compile(r"cells are done|failed|is done")
    expect(tab.locator(".live-status")).to_have_text(finished, timeout=10 * MINUTES)
    assert tab.locator(".live-error").all_inner_texts() == []
    assert tab.locator(".live-done").count() == tab.locator(".live-bar").count() > 5
    broken = tab.evaluate("[...document.images].filter(i => !i.naturalWidth).length")
    assert broken == 0
    assert not axe.Axe().run(tab).response["violations"]


def test_an_edited_cell_shows_its_new_result_and_can_be_reset(tab: Any, address: str) -> None:
    open_chapter(tab, address, "basics")
    before = tab.locator(".cell_input pre").first.inner_text()
    cell = run(tab, 0, "print(6 * 7)")
    assert cell.locator(".cell_output").inner_text().strip() == "42"
    cell = run(tab, 0, "1 / 0")
    assert "ZeroDivisionError: division by zero" in cell.locator(".live-error").inner_text()
    press(tab, "Reset", 0)
    assert tab.locator(".cell_input pre").first.inner_text() == before
    assert cell.locator(".live-error").count() == 0


def test_a_new_line_begins_below_the_last_one(tab: Any, address: str) -> None:
    open_chapter(tab, address, "basics")
    source = tab.locator(".cell_input pre").first
    source.focus()
    tab.keyboard.press("Control+a")
    tab.keyboard.type("for i in range(2):\nprint(i)\nprint(-i)")
    assert source.inner_text() == "for i in range(2):\n    print(i)\n    print(-i)"
    tab.keyboard.press("Control+Enter")
    output = tab.locator(".cell_output").first
    expect(output).to_have_text(re.compile(r"^\s*0\s+0\s+1\s+-1\s*$"), timeout=MINUTES)


def test_the_cells_above_run_first(tab: Any, address: str) -> None:
    open_chapter(tab, address, "basics")
    run(tab, 2, "print(here)")
    run(tab, 0, "here = 'first'")
    run(tab, 1, "here = 'second'")
    press(tab, "Run all above", 2)
    expect(tab.locator(".live-status")).to_have_text("2 cells are done.", timeout=MINUTES)
    cell = run(tab, 2, "print(here)")
    assert cell.locator(".cell_output").inner_text().strip() == "second"


def test_folded_code_runs_and_a_folded_answer_unfolds(tab: Any, address: str) -> None:
    open_chapter(tab, address, "basics")
    tab.reload()
    imports = tab.locator(".cell", has=tab.locator("details.above-input")).first
    imports.get_by_role("button", name="Run", exact=True).click()
    expect(imports.locator(".live-state")).to_have_text("done", timeout=MINUTES)
    assert not imports.locator(".cell_input pre").is_visible()
    question = tab.locator(".cell", has=tab.locator("details.below-input")).first
    assert not question.locator(".cell_output").is_visible()
    assert question.locator("summary .collapsed").inner_text() == "Show the answer"
    question.get_by_role("button", name="Run", exact=True).click()
    expect(question.locator(".live-state")).to_have_text("done", timeout=MINUTES)
    assert question.locator(".cell_output").is_visible()


def test_what_a_cell_shows_is_renewed(tab: Any, address: str) -> None:
    """Widgets, displays that are updated, cleared outputs, progress bars, scripts."""
    open_chapter(tab, address, "basics")
    widget = (
        "import ipywidgets\n"
        "from IPython.display import HTML, clear_output, display\n"
        "shown = ipywidgets.Output()\n"
        "display(shown)\n"
        "data = {'text/plain': 'from a widget'}\n"
        "shown.outputs = ({'output_type': 'display_data', 'data': data, 'metadata': {}},)\n"
        "print('10 %\\r20 %')"
    )
    text = run(tab, 0, widget).locator(".cell_output").inner_text()
    assert text.split("\n")[0] == "from a widget"
    assert text.split()[-2:] == ["20", "%"]
    code = "handle = display(1, display_id=True); handle.update(2)"
    assert run(tab, 0, code).locator(".cell_output").inner_text().strip() == "2"
    code = "print(1); clear_output(wait=True); print(2)"
    assert run(tab, 0, code).locator(".cell_output").inner_text().strip() == "2"
    page = "<p>old</p><script>document.querySelector('.output p').textContent = 'new'</script>"
    assert run(tab, 0, f'HTML("{page}")').locator(".cell_output").inner_text().strip() == "new"


def test_nobody_without_the_token_gets_a_page_or_a_kernel(tab: Any, address: str) -> None:
    stranger = tab.context.browser.new_context()
    origin = address.partition("/book/")[0]
    assert stranger.request.get(f"{origin}/book/basics.html").url.startswith(f"{origin}/login")
    assert stranger.request.post(f"{origin}/api/kernels").status == 403
    stranger.close()


def test_a_page_that_is_closed_takes_its_kernel_with_it(tab: Any, address: str) -> None:
    origin, token = address.partition("/book/")[0], address.partition("token=")[2]

    def kernels() -> set[str]:
        answer = tab.request.get(f"{origin}/api/kernels?token={token}").json()
        return {kernel["id"] for kernel in answer}

    before = kernels()
    open_chapter(tab, address, "basics")
    run(tab, 0, "1")
    (own,) = kernels() - before
    open_chapter(tab, address, "index")
    for _ in range(100):
        if own not in kernels():
            return
        tab.wait_for_timeout(200)
    pytest.fail("the kernel still runs")
