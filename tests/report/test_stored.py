"""The records that chapters draw: each is there whole, and says where it was measured."""

from __future__ import annotations

import matplotlib.pyplot as plt
import pytest

from autograd_lib import Comparison
from autograd_lib.report import RECORDS, record

NAMES = sorted(path.stem for path in RECORDS.glob("*.json"))


@pytest.mark.parametrize("name", NAMES)
def test_a_record_says_where_and_when_it_was_measured(name: str) -> None:
    found = record(name)
    assert {"torch", "device", "threads", "date"} <= set(found.environment)
    assert found.environment["device"] in found.source
    assert repr(found) == f"Record({name!r}: {found.source})"


@pytest.mark.parametrize("name", [n for n in NAMES if record(n).get("format")])
def test_a_record_of_a_comparison_is_one_again(name: str) -> None:
    found = Comparison.from_json(record(name))
    assert found.environment == record(name).environment
    for candidate in found.names:
        ratio = found.ratios[candidate]
        assert ratio.low <= ratio.median <= ratio.high


def test_an_unknown_record_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"record: .*'trainings'; did you mean 'training'"):
        record("trainings")


def test_the_style_of_the_figures_comes_from_the_package() -> None:
    with plt.style.context("autograd_lib.report.book"):
        assert plt.rcParams["axes.spines.top"] is False
