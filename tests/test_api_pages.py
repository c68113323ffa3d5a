"""The reference: what to call first, and on each page an example that runs as it stands."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import matplotlib.pyplot as plt
import pytest

import autograd_lib
from autograd_lib import benchmark

API = Path(__file__).parents[1] / "book" / "api"
PAGES = sorted(path.stem for path in API.glob("*.md") if path.stem != "index")


@pytest.mark.filterwarnings("ignore:::lightning")  # it warns of itself
@pytest.mark.parametrize("name", PAGES)
def test_a_page_opens_with_an_example(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opening = (API / f"{name}.md").read_text(encoding="utf-8").partition("```{eval-rst}")[0]
    (text,) = re.findall(r"```python\n(.*?)```", opening, re.DOTALL)
    assert 3 <= len(re.findall(r"^(?:>>>|\.\.\.) ", text, re.MULTILINE)) <= 8
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "_SAMPLE_SECONDS", 1e-4)
    example = doctest.DocTestParser().get_doctest(text, {}, name, None, 0)
    options = doctest.NORMALIZE_WHITESPACE | doctest.REPORT_NDIFF
    failed, attempted = doctest.DocTestRunner(optionflags=options).run(example)
    plt.close("all")
    assert failed == 0
    assert attempted > 1


def test_the_first_page_says_what_to_call() -> None:
    text = (API / "index.md").read_text(encoding="utf-8")
    table = text.partition("| you want to | call |\n")[2].partition("\n\n")[0]
    rows = [row.strip("| ").split(" | ") for row in table.splitlines()[1:]]
    named = [name for _, calls in rows for name in re.findall(r"`(\w+)`", calls)]
    assert named[0] == "missing_gradients"
    assert len(named) == len(set(named)) > len(rows) > 8
    assert set(named) <= set(autograd_lib.__all__)
