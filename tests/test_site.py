"""The built site: read as files, and opened from disk in a real browser with all network blocked.

Build it first (`make book`). Without a build, or without a browser for the tests that need one,
the tests skip and say why; with REQUIRE_BROWSER=1 in the environment they fail instead.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import types
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import quote_plus, unquote, urlsplit

import book_site
import bs4
import notebooks
import pytest
from axe_playwright_python import sync_playwright as axe
from browser import chromium, give_up
from hatchling.builders.wheel import WheelBuilder

import autograd_lib

ROOT = Path(__file__).parents[1]
SITE = ROOT / "_build" / "html"
SCREENSHOTS = ROOT / "_build" / "screenshots"
PAGES = sorted(
    path.relative_to(SITE).as_posix() for path in SITE.rglob("*.html") if path.parent != SITE
) + (["search.html"] if (SITE / "search.html").exists() else [])
PAGE_BYTES = 1_000_000  # what one page may weigh besides the shared assets
SHARED_BYTES = 190_000  # style sheets, scripts and those fonts of formulas that are in use

pages = pytest.mark.parametrize("name", PAGES or [None], ids=lambda name: name or "no site")


@pytest.fixture(autouse=True)
def site() -> None:
    if not PAGES:
        give_up("no built site in _build/html: run `make book` first")


@cache
def soup(path: Path) -> Any:
    return bs4.BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


# --- files --------------------------------------------------------------------------------------


@cache
def anchors(path: Path) -> set[str]:
    return {element["id"] for element in soup(path).find_all(id=True)}


def local_links(name: str) -> Iterator[tuple[str, Path, str]]:
    """Yield each link of a page that stays on the site: as written, its file and its anchor."""
    page = SITE / name
    for element in soup(page).find_all(["a", "link", "img", "script", "source"]):
        link = element.get("href") or element.get("src")
        if not link or urlsplit(link).scheme:
            continue
        parts = urlsplit(link)
        target = page if not parts.path else page.parent / unquote(parts.path)
        yield link, target.resolve(), unquote(parts.fragment)


@pages
def test_every_link_leads_somewhere(name: str) -> None:
    dead = [
        link
        for link, target, anchor in local_links(name)
        if not target.is_file()
        or (anchor and target.suffix == ".html" and anchor not in anchors(target))
    ]
    assert not dead


def test_the_front_door_leads_to_the_start_page() -> None:
    refresh = soup(SITE / "index.html").find("meta", attrs={"http-equiv": "refresh"})
    assert (SITE / refresh["content"].partition("url=")[2]).is_file()


@pages
def test_no_address_of_another_host_is_loaded(name: str) -> None:
    loading = soup(SITE / name).select(
        "img[src], script[src], link[rel~=stylesheet], iframe, video"
    )
    addresses = [tag.get("src") or tag.get("href") or "" for tag in loading]
    assert not [address for address in addresses if re.match(r"(https?:)?//", address)]


@pages
def test_every_picture_says_what_one_sees(name: str) -> None:
    page = soup(SITE / name)
    alts = [image.get("alt", "") for image in page.select("main img")]
    for data in page.select('figure.frames script[type="application/json"]'):
        alts += json.loads(data.string)["alts"]
    poor = [
        alt
        for alt in alts
        if len(alt.strip()) < 20 or re.search(r"\.(png|svg|jpe?g)\b|[0-9a-f]{16}|_images", alt)
    ]
    assert not poor


@pages
def test_the_foot_names_what_the_page_was_run_with(name: str) -> None:
    foot = " ".join(soup(SITE / name).select_one("footer .run-info").get_text().split())
    for package in ("torch", "numpy"):
        assert f"{package} {importlib.metadata.version(package)}" in foot
    assert f"autograd_lib {autograd_lib.__version__}" in foot
    assert f"Python {platform.python_version()}" in foot
    assert re.search(r"\b20\d\d-\d\d-\d\d\b", foot)
    assert re.search(r"\bCPU\b|NVIDIA|AMD", foot)


def test_every_public_name_stands_in_the_reference() -> None:
    documented = {
        anchor for page in (SITE / "book" / "api").glob("*.html") for anchor in anchors(page)
    }
    assert {f"autograd_lib.{name}" for name in autograd_lib.__all__} <= documented


# --- what the build makes of plain Markdown -------------------------------------------------------


def chapters() -> list[str]:
    return [name for name in PAGES if (ROOT / name).with_suffix(".ipynb").exists()]


def test_chapters_and_their_figures_are_numbered() -> None:
    numbers = []
    for name in chapters():
        page = soup(SITE / name)
        if page.h1.find(class_="section-number") is None:  # the reference is not numbered
            continue
        chapter = page.h1.find(class_="section-number").get_text().rstrip(". ")
        numbers.append(int(chapter))
        shown = [caption.get_text() for caption in page.select("figcaption .caption-number")]
        assert shown == [f"Figure {chapter}.{i} " for i in range(1, len(shown) + 1)], name
        for figure in page.select("figure:has(> figcaption)"):
            assert figure.select("img, svg, .dashboard"), f"{name}: a caption without its picture"
    assert sorted(numbers) == list(range(1, len(numbers) + 1))


def test_quotes_become_callouts_and_links_to_sources_citations() -> None:
    for name in chapters():
        page = soup(SITE / name)
        assert not page.select("main blockquote"), name
        cited = page.select('main a[href*="references.html#"]')
        assert cited, name
        assert all("citation" in link["class"] for link in cited), name
    titles = [t.get_text() for t in soup(SITE / "book/basics.html").select(".admonition-title")]
    assert "Pitfall: the graph is gone" in titles


def test_code_that_is_a_public_name_links_to_its_reference() -> None:
    for name in chapters():
        for code in soup(SITE / name).select("main p code"):
            if code.get_text() in autograd_lib.__all__:
                assert code.find_parent("a"), f"{name}: {code.get_text()}"
    page = soup(SITE / "book" / "basics.html")
    links = {code.get_text(): code.find_parent("a") for code in page.select("main p code")}
    assert links["plot_graph"]["href"] == "api/memory.html#autograd_lib.plot_graph"
    assert links["torch.no_grad()"]["href"].endswith("generated/torch.no_grad.html")


def test_folds_say_what_they_show() -> None:
    prompts = set()
    for name in chapters():
        for fold in soup(SITE / name).select("details.hide"):
            prompts.add(prompt := fold.select_one("summary .collapsed").get_text())
            assert (prompt == "Show the answer") == ("below-input" in fold["class"])
    assert prompts == {f"Show the {what}" for what in ("answer", "code", "imports", "solution")}


def test_long_names_in_a_table_break_between_their_parts() -> None:
    long, short = (
        f'<code><span class="pre">{name}</span></code>'
        for name in (".module.register_forward_hook", "get_gradient_norms")
    )
    inside, outside = book_site.mend(f"<td>{long}{short}</td><p>{long}</p>").split("<p>")
    assert ">.module.<wbr>register_<wbr>forward_<wbr>hook<" in inside
    assert short in inside
    assert long in outside


def test_a_published_book_links_its_source() -> None:
    url = "https://github.com/someone/book"
    config = types.SimpleNamespace(html_theme_options={"repository_url": url + "/"})
    env = types.SimpleNamespace(doc2path=lambda name: ROOT / f"{name}.ipynb")
    app = types.SimpleNamespace(config=config, env=env, srcdir=ROOT)
    links = book_site.published(app, "book/basics")
    assert links == {
        "Source": f"{url}/blob/main/book/basics.ipynb",
        "Report a mistake": f"{url}/issues/new",
        "Open in Colab": "https://colab.research.google.com/github/someone/book/blob/main/"
        "book/basics.ipynb",
    }
    line = notebooks.install_line(url).splitlines()[-1]
    assert line == f'# %pip install "autograd-by-experiment[chapters] @ git+{url}"'
    assert not soup(SITE / "book" / "basics.html").select('a[href*="colab"]'), "no address is set"


def test_each_chapter_is_offered_as_a_notebook() -> None:
    assert chapters()
    for name in chapters():
        link = soup(SITE / name).select_one(".notebook-link a")["href"]
        offered = (SITE / name).parent / link
        assert offered.read_bytes() == (ROOT / name).with_suffix(".ipynb").read_bytes()


def test_the_start_page_offers_the_wheel(tmp_path: Path) -> None:
    page = soup(SITE / "book" / "index.html")
    (link,) = page.select('main a[href$=".whl"]')
    offered = SITE / "book" / link["href"]
    assert offered.name == f"autograd_by_experiment-{autograd_lib.__version__}-py3-none-any.whl"
    assert f"pip install ./{offered.name}" in page.get_text()
    # As it is built from what stands here now, byte for byte.
    built = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    assert offered.read_bytes() == Path(next(built)).read_bytes()
    assert list(SITE.rglob("*.whl")) == [offered.resolve()]


@pages
def test_a_page_is_light(name: str) -> None:
    own = {SITE / name} | {
        target
        for _, target, _ in local_links(name)
        if target.suffix in (".png", ".svg", ".jpg", ".js", ".css")
    }
    own = {path for path in own if "_static" not in path.parts or path.name == "search-index.js"}
    assert sum(path.stat().st_size for path in own) <= PAGE_BYTES


def test_the_shared_assets_are_light_and_all_in_use() -> None:
    shared = [path for path in (SITE / "_static").rglob("*") if path.is_file()]
    shared = [path for path in shared if path.name not in ("search-index.js", "LICENSE")]
    assert sum(path.stat().st_size for path in shared) <= SHARED_BYTES
    sheets = [path for path in shared if path.suffix == ".css"]
    used = {target for name in PAGES for _, target, _ in local_links(name)} | {
        (sheet.parent / url).resolve()
        for sheet in sheets
        for url in re.findall(r"url\(\"?([\w./-]+)\"?\)", sheet.read_text(encoding="utf-8"))
    }
    assert not {path.resolve() for path in shared} - used
    missing = {path for path in used if "_static" in path.parts and not path.is_file()}
    assert not missing


# --- in a browser -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def tab(browser: Any) -> Iterator[Any]:
    """A tab that may load files only; at the end nothing may have gone wrong in it."""
    context = browser.new_context(
        offline=True, reduced_motion="reduce", viewport={"width": 1280, "height": 900}
    )
    page = context.new_page()
    trouble: list[str] = []
    page.on("request", lambda r: trouble.append(f"left: {r.url}") if is_remote(r.url) else None)
    page.on("requestfailed", lambda r: trouble.append(f"failed: {r.url}") if lost(r) else None)
    page.on("pageerror", lambda error: trouble.append(f"error: {error}"))
    page.on("console", lambda m: trouble.append(f"{m.type}: {m.text}") if is_bad(m) else None)
    yield page
    context.close()
    assert not trouble


def is_remote(url: str) -> bool:
    return urlsplit(url).scheme not in ("file", "data", "blob")


def lost(request: Any) -> bool:
    return "ERR_ABORTED" not in str(request.failure)  # the tab has moved on to another page


def is_bad(message: Any) -> bool:
    return message.type in ("error", "warning")


def visit(tab: Any, name: str, unfold: bool = False) -> None:
    path, question, query = name.partition("?")
    tab.goto((SITE / path).as_uri() + question + query)
    if unfold:
        tab.evaluate("document.querySelectorAll('article details').forEach(d => (d.open = true))")


def set_theme(tab: Any, theme: str) -> None:
    tab.emulate_media(color_scheme=theme)
    tab.wait_for_function("theme => document.documentElement.dataset.theme === theme", arg=theme)


@pages
def test_a_page_loads_from_disk_without_network(name: str, tab: Any) -> None:
    visit(tab, name)
    assert tab.locator("h1").count() == 1
    assert tab.locator("input[type=search]:visible").count() == 1
    broken = tab.evaluate("[...document.images].filter(i => !i.naturalWidth).map(i => i.src)")
    assert not broken


def formulas_in_source(name: str) -> int:
    stem = ROOT / Path(name).with_suffix("")
    text = ""
    if stem.with_suffix(".md").exists():
        text = stem.with_suffix(".md").read_text(encoding="utf-8")
    elif stem.with_suffix(".ipynb").exists():
        cells = json.loads(stem.with_suffix(".ipynb").read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "markdown")
    text = re.sub(r"(`{1,3}).+?\1", "", text, flags=re.DOTALL)
    return len(re.findall(r"(?<![\\$])(\$\$?)(?!\s)[^$]+?\1", text))


@pages
def test_formulas_are_typeset(name: str, tab: Any) -> None:
    visit(tab, name)
    raw = tab.evaluate(r"""() => {
      const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
      while (walker.nextNode()) {
        const inside = walker.currentNode.parentElement.closest("code, pre, script, .katex");
        const text = walker.currentNode.data;
        if (!inside && /\$[^$\n]+\$|\\\(|\\\[|\\(begin|frac|nabla)\b/.test(text)) found.push(text);
      }
      return found;
    }""")
    assert not raw
    assert tab.locator(".katex-error").count() == 0
    shown = tab.locator(".katex").count()
    assert shown >= formulas_in_source(name)
    if shown:
        assert tab.locator(".katex math").count() == shown, "each has MathML for screen readers"
        assert tab.evaluate(
            "document.fonts.ready.then(() => document.fonts.check('1em KaTeX_Main'))"
        )


@pages
def test_each_control_changes_its_picture(name: str, tab: Any) -> None:
    visit(tab, name, unfold=True)
    for figure in tab.locator("figure.frames").all():
        picture = figure.locator("img")
        controls = figure.locator("input, select").all()
        assert controls
        for control in controls:
            assert control.get_attribute("data-lm-suppress-shortcuts") == "true", "JupyterLab"
            control.focus()
            seen = set()
            for key in ("Home", "End"):
                tab.keyboard.press(key)
                said = control.get_attribute("aria-valuetext") or control.input_value()
                seen.add((picture.get_attribute("src"), picture.get_attribute("alt"), said))
                assert picture.evaluate("image => image.decode().then(() => image.naturalWidth)")
            for part in zip(*seen, strict=True):
                assert len(set(part)) == 2, "picture, description and label all change"


@pages
def test_each_control_changes_its_dashboard(name: str, tab: Any) -> None:
    visit(tab, name, unfold=True)
    for figure in tab.locator("figure.dashboard").all():
        controls = figure.locator("input[type=range], select").all()
        assert controls
        for control in controls:
            assert control.get_attribute("data-lm-suppress-shortcuts") == "true", "JupyterLab"
            control.focus()
            seen = set()
            for key in ("Home", "End"):
                tab.keyboard.press(key)
                seen.add(figure.inner_html())
            assert len(seen) == 2, "curves, bars and descriptions change"


@pages
def test_axe_finds_no_violation(name: str, tab: Any) -> None:
    # With preload axe would fetch the style sheets, which a page opened from a file may not.
    options = {"preload": False, "resultTypes": ["violations"]}
    visit(tab, name + "?q=gradient" if name == "search.html" else name, unfold=True)
    for theme in ("light", "dark"):
        set_theme(tab, theme)
        violations = axe.Axe().run(tab, options=options).response["violations"]
        found = [(v["id"], len(v["nodes"]), v["nodes"][0]["html"][:200]) for v in violations]
        assert not found, theme


def test_what_is_wide_shows_on_which_side_it_goes_on(tab: Any) -> None:
    tab.set_viewport_size({"width": 390, "height": 800})
    visit(tab, "book/basics.html")
    wide = tab.locator(".cell_input pre[data-more='right']").first
    assert "inset" in wide.evaluate("pre => getComputedStyle(pre).boxShadow")
    pre = wide.element_handle()
    pre.evaluate("pre => (pre.scrollLeft = pre.scrollWidth)")
    tab.wait_for_timeout(100)
    assert pre.get_attribute("data-more") == "left"
    tab.set_viewport_size({"width": 3000, "height": 800})
    tab.wait_for_timeout(100)
    assert pre.get_attribute("data-more") in ("", "left")
    narrow = tab.locator(".cell_input pre[data-more='']").first
    assert narrow.evaluate("pre => getComputedStyle(pre).boxShadow") == "none"


@pages
def test_no_page_scrolls_sideways(name: str, tab: Any) -> None:
    visit(tab, name, unfold=True)
    for width in (360, 768, 1024, 1440):
        tab.set_viewport_size({"width": width, "height": 800})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, f"{width} px wide"


@pages
def test_screenshots(name: str, tab: Any) -> None:
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    visit(tab, name)
    for label, width in (("wide", 1280), ("narrow", 390)):
        tab.set_viewport_size({"width": width, "height": 900})
        for theme in ("light", "dark"):
            set_theme(tab, theme)
            file = f"{name.removesuffix('.html').replace('/', '-')}-{label}-{theme}.png"
            tab.screenshot(path=SCREENSHOTS / file, full_page=True)
            assert (SCREENSHOTS / file).stat().st_size > 1000


def test_searching_from_any_page_finds_a_place_that_exists(tab: Any) -> None:
    visit(tab, "book/index.html")
    tab.keyboard.press("/")
    tab.keyboard.type("gradient norms")
    tab.keyboard.press("Enter")
    tab.wait_for_url("**/search.html?q=gradient+norms")
    results = tab.locator("#search-results li a")
    assert results.count() > 0
    assert "get_gradient_norms" in results.all_inner_texts()[0]
    for link in results.evaluate_all("links => links.map(link => link.href)"):
        target = Path(unquote(urlsplit(link).path))
        assert not urlsplit(link).fragment or unquote(urlsplit(link).fragment) in anchors(target)
    results.first.click()
    assert tab.locator("h1").inner_text().startswith("Gradients")


SEARCHES = {
    "inplace operation": "basics.html#writing-over-what-backward-needs",
    "in-place operation": "basics.html#writing-over-what-backward-needs",
    "one of the variables needed for gradient computation has been modified by an inplace "
    "operation": "basics.html#writing-over-what-backward-needs",
    "retain_graph": "basics.html",
    "hook": "basics.html#hooks-in-one-look",
    "custom autograd function": "custom_functions.html",
    "hessian": "higher_order.html",
    "jet": "api/higher_order.html#autograd_lib.jet",
    "wandb": "monitoring.html",
    "tensorboard": "api/monitor.html#autograd_lib.GradientMonitor.to_tensorboard",
    "gradient clipping": "monitoring.html",
    "NaN": "debugging.html",
    "exploding gradients": "debugging.html#vanishing-or-exploding",
    "freeze layers": "training.html#a-frozen-backbone",
    "resume": "training.html",
    "hugging face": "training.html",
    "set_to_none": "training.html",
    "mixed precision": "checkpointing_amp.html",
    "checkpoint": "checkpointing_amp.html",
    "out of memory": "checkpointing_amp.html",
    "overfit": "training.html",
    "loss scale": "checkpointing_amp.html#the-loss-scale",
    "torch.compile": "benchmarking.html#eager-against-compiled",
    "FSDP": "distributed.html",
    "accumulate": "checkpointing_amp.html#accumulation",
    "gradient accumulation": "checkpointing_amp.html#accumulation",
}


@pytest.mark.parametrize("query", SEARCHES)
def test_the_best_page_is_found_first(query: str, tab: Any) -> None:
    visit(tab, f"search.html?q={quote_plus(query)}")
    first = tab.locator("#search-results li a").first.get_attribute("href")
    assert first.removeprefix("book/").startswith(SEARCHES[query])


def test_a_search_shows_words_and_no_markup() -> None:
    text = (SITE / "_static" / "search-index.js").read_text(encoding="utf-8")
    pages = json.loads(text.removeprefix("const searchIndex = ").removesuffix(";\n"))
    places = [place for _, _, sections in pages for place in sections]
    assert any("does not require grad" in printed for *_, printed in places)
    sources = (ROOT / "book" / "references.md").read_text(encoding="utf-8")
    keys = re.findall(r'<a id="(\w+)">', sources)
    for _, title, shown, _ in places:
        assert not re.search(r"\\[a-z]{2,}|\$", title)
        assert not [key for key in keys if re.search(rf"\b{key}\b", shown)]


def test_searching_for_nonsense_says_so(tab: Any) -> None:
    visit(tab, "search.html?q=xyzzyplugh")
    assert tab.locator("#search-status").inner_text() == "Nothing found for “xyzzyplugh”."
    assert tab.locator("#search-results li").count() == 0


def test_search_shows_a_query_as_text(tab: Any) -> None:
    visit(tab, "search.html?q=%3Cimg%20src%3Dx%20onerror%3Dalert(1)%3E%20(")
    assert tab.locator("main img").count() == 0


def test_the_theme_button_goes_round_and_is_remembered(tab: Any) -> None:
    visit(tab, "book/index.html")
    mode = "document.documentElement.dataset.mode + ' ' + document.documentElement.dataset.theme"
    seen = [tab.evaluate(mode)]
    for _ in range(3):
        tab.locator(".theme-switch-button").click()
        seen.append(tab.evaluate(mode))
    assert seen == ["auto light", "light light", "dark dark", "auto light"]
    tab.locator(".theme-switch-button").click(click_count=2)
    visit(tab, "book/api/index.html")
    assert tab.evaluate(mode) == "dark dark"


def test_the_menu_opens_on_a_phone_and_closes_by_key(tab: Any) -> None:
    tab.set_viewport_size({"width": 390, "height": 800})
    visit(tab, "book/index.html")
    button, entry = tab.locator(".primary-toggle"), tab.locator("#site-nav a").nth(1)
    assert not entry.is_visible()
    button.click()
    entry.wait_for(state="visible")
    assert button.get_attribute("aria-expanded") == "true"
    tab.keyboard.press("Escape")
    entry.wait_for(state="hidden")
    assert button.evaluate("button => button === document.activeElement")


def test_a_dark_page_prints_light_and_unfolded(tab: Any) -> None:
    visit(tab, "book/index.html")
    set_theme(tab, "dark")
    folded = "document.querySelectorAll('article details:not([open])').length"
    before = tab.evaluate(folded)
    assert before > 0
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate("document.documentElement.dataset.theme") == "light"
    assert tab.evaluate(folded) == 0
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.evaluate("document.documentElement.dataset.theme") == "dark"
    assert tab.evaluate(folded) == before
