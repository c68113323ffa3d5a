"""Formulas that are set while the book is built: what is drawn, and which fonts that needs."""

from __future__ import annotations

import doctest

import book_math
import pytest


def test_examples() -> None:
    result = doctest.testmod(book_math)
    assert result.attempted > 0
    assert result.failed == 0


def test_a_formula_is_typeset_or_rejected_by_name() -> None:
    html = book_math.render(r"\frac{1}{2}", display=False)
    assert "<mfrac>" in html
    assert 'class="katex-html"' in html
    with pytest.raises(ValueError, match=r"Undefined control sequence: \\foo"):
        book_math.render(r"\foo", display=True)


def test_only_fonts_in_use_are_served() -> None:
    plain = book_math.stylesheet([book_math.render("x", display=False)])
    assert plain[1] == {"KaTeX_Main-Regular.woff2", "KaTeX_Math-Italic.woff2"}
    assert plain[0].count("@font-face") == 2
    bold = book_math.stylesheet([book_math.render(r"\mathbf{x} \in \mathbb{R}", display=False)])
    assert bold[1] - plain[1] >= {"KaTeX_Main-Bold.woff2", "KaTeX_AMS-Regular.woff2"}
