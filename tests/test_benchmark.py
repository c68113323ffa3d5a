"""Comparison of timings: the statistics by a clock whose truth is known, the rest by counting.

No test looks at a wall time. The fake clock replaces the one function that reads a real one.
"""

from __future__ import annotations

import gc
import io
import math
import random
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from cases import DEVICES

from autograd_lib import benchmark
from autograd_lib.benchmark import Comparison, Ratio, compare
from autograd_lib.report import progress as _progress


class Clock:
    """Says that each thunk takes the time in its attribute, times a factor that moves."""

    def __init__(self, factor: Callable[[int], float]) -> None:
        self.factor = factor
        self.log: list[tuple[object, int]] = []

    def __call__(self, thunk: Callable[[], object], number: int) -> float:
        self.log.append((thunk, number))
        thunk()
        return thunk.seconds * self.factor(len(self.log))  # type: ignore[attr-defined]


@pytest.fixture
def fake(monkeypatch):
    """Install a fake clock, and peaks of 1 MiB per second that a thunk takes."""

    def install(factor: Callable[[int], float] = lambda reading: 1.0) -> Clock:
        clock = Clock(factor)
        monkeypatch.setattr(benchmark, "seconds_per_call", clock)
        monkeypatch.setattr(benchmark, "peak_bytes", lambda step: int(2**20 * step.seconds))
        return clock

    return install


def takes(seconds: float) -> Callable[[], None]:
    def thunk() -> None:
        pass

    thunk.seconds = seconds  # type: ignore[attr-defined]
    return thunk


def made(samples: np.ndarray, repeat: np.ndarray, **changes) -> Comparison:
    """A comparison of candidates a, b, ... from given samples, with no measurement."""
    names = tuple("abcdefg"[: samples.shape[1]])
    environment = {"torch": "2", "python": "3", "device": "d", "cpu": "c", "threads": 1}
    environment["date"] = "2026-01-02T03:04:05+00:00"
    given = {"names": names, "baseline": "a", "peak_bytes": {}, "environment": environment}
    return Comparison(samples=samples, repeat=repeat, **given | changes)


def noisy(rng: np.random.Generator, truth: list[float], sigma=0.05, rounds=24) -> Comparison:
    """Samples with a heavy-tailed noise of their own each and a drift common to a round."""
    costs = np.array([*truth, truth[0]])
    noise = sigma * rng.standard_t(3, size=(rounds, len(costs)))
    drift = np.cumsum(0.1 * rng.standard_normal((rounds, 1)), axis=0)
    samples = costs * np.exp(noise + drift)
    return made(samples[:, :-1], samples[:, -1])


# Statistics


def test_known_ratio_is_recovered(fake):
    fake()
    result = compare({"one": takes(1.0), "two": takes(2.0), "half": takes(0.5)})
    assert result.medians == {"one": 1.0, "two": 2.0, "half": 0.5}
    assert result.ratios == {
        "one": Ratio(1, 1, 1),
        "two": Ratio(2, 2, 2),
        "half": Ratio(0.5, 0.5, 0.5),
    }
    assert [result.verdict(name) for name in result.names] == ["baseline", "slower", "faster"]
    assert result.peak_bytes == {"one": 2**20, "two": 2**21, "half": 2**19}
    assert result.noise == Ratio(1, 1, 1)


def test_ratio_is_to_the_named_baseline(fake):
    fake()
    result = compare({"one": takes(1.0), "two": takes(2.0)}, baseline="two")
    assert result.ratios["one"] == Ratio(0.5, 0.5, 0.5)
    assert (result.verdict("one"), result.verdict("two")) == ("faster", "baseline")


def test_common_drift_cancels(fake):
    # The machine slows to a seventh of its speed in the course of the comparison.
    clock = fake(lambda reading: math.exp(reading / 40))
    result = compare({"one": takes(1.0), "two": takes(2.0)}, rounds=24)
    assert clock.factor(len(clock.log)) > 6
    assert result.ratios["two"].median == pytest.approx(2.0, rel=0.02)
    assert result.noise.median == pytest.approx(1.0, rel=0.02)
    assert result.samples.max() / result.samples.min() > 6  # the samples themselves do drift


def test_one_disturbed_round_changes_nothing(fake):
    fake(lambda reading: 50.0 if 30 <= reading < 33 else 1.0)
    result = compare({"one": takes(1.0), "two": takes(2.0)})
    assert result.samples.max() >= 50
    assert result.medians == {"one": 1.0, "two": 2.0}
    assert result.ratios["two"].median == 2.0


def test_order_of_candidates_changes_nothing(fake):
    rng = np.random.default_rng(3)
    factors = np.exp(0.1 * rng.standard_normal(1000) + np.linspace(0, 1, 1000))
    thunks = {"a": takes(1.0), "b": takes(1.3), "c": takes(0.01), "d": takes(1e-5)}
    results = []
    for names in ["abcd", "dcba", "cadb"]:
        fake(lambda reading: factors[reading])
        results.append(compare({name: thunks[name] for name in names}, baseline="b"))
        assert results[-1].names == tuple(names)
    first, *others = results
    for other in others:
        assert other.medians == first.medians
        assert other.ratios == first.ratios
        assert other.noise == first.noise
        assert other.peak_bytes == first.peak_bytes
        np.testing.assert_array_equal(other.repeat, first.repeat)
        np.testing.assert_array_equal(other.samples[:, other.names.index("a")], first.samples[:, 0])


def test_noise_makes_a_tie():
    rng = np.random.default_rng(0)
    result = noisy(rng, [1.0, 1.01, 3.0, 0.3])
    low, high = result.noise_band
    assert low < 1.01 < high
    verdicts = [result.verdict(name) for name in result.names]
    assert verdicts == ["baseline", "tie", "slower", "faster"]


def test_noise_band_holds_one_even_if_the_aa_interval_does_not():
    ones = np.ones((24, 2))
    result = made(ones, np.full(24, 1.1))  # the second entry was always slower: that is noise too
    assert result.noise == Ratio(1.1, 1.1, 1.1)
    assert result.noise_band == pytest.approx((1 / 1.1, 1.1))
    assert result.verdict("b") == "tie"
    assert made(ones * [1, 0.95], np.full(24, 1.1)).verdict("b") == "tie"
    assert made(ones * [1, 0.90], np.full(24, 1.1)).verdict("b") == "faster"


def test_interval_covers_the_truth_in_95_percent_of_comparisons():
    rng = np.random.default_rng(1)
    ratios = [noisy(rng, [1.0, 1.7]).ratios["b"] for _ in range(400)]
    covered = np.mean([ratio.low <= 1.7 <= ratio.high for ratio in ratios])
    assert 0.90 <= covered <= 0.99
    assert np.median([ratio.median for ratio in ratios]) == pytest.approx(1.7, rel=0.005)


def test_equal_candidates_are_hardly_ever_told_apart():
    rng = np.random.default_rng(2)
    claims = Counter(noisy(rng, [1.0, 1.0]).verdict("b") for _ in range(400))
    assert claims["tie"] >= 390


def test_interval_narrows_with_rounds():
    rng = np.random.default_rng(4)

    def width(rounds: int) -> float:
        ratios = [noisy(rng, [1.0, 1.0], rounds=rounds).ratios["b"] for _ in range(50)]
        return float(np.mean([ratio.high - ratio.low for ratio in ratios]))

    assert width(16) / width(256) == pytest.approx(4.0, rel=0.2)  # 1 / sqrt(rounds)


# The order and the number of calls


@pytest.mark.parametrize("entries", [2, 3, 4, 5, 6, 7])
def test_schedule_is_balanced_for_position_and_predecessor(entries):
    period = entries if entries % 2 == 0 else 2 * entries
    orders = benchmark._schedule(entries, 2 * period)
    assert orders.shape == (2 * period, entries)
    for column in orders.T:
        assert set(Counter(column.tolist()).values()) == {2 * period // entries}
    pairs = Counter((a, b) for row in orders.tolist() for a, b in pairwise(row))
    assert len(pairs) == entries * (entries - 1)
    assert len(set(pairs.values())) == 1


def test_each_round_holds_each_candidate_once_and_the_baseline_twice(fake):
    clock = fake()
    one, two, three = takes(1.0), takes(2.0), takes(3.0)
    rounds = 7
    compare({"one": one, "two": two, "three": three}, rounds=rounds)
    measured = [thunk for thunk, _ in clock.log][-4 * rounds :]
    for start in range(0, len(measured), 4):
        assert Counter(measured[start : start + 4]) == {one: 2, two: 1, three: 1}


@pytest.mark.parametrize(("seconds", "number"), [(1.0, 1), (0.02, 1), (0.003, 4), (1e-7, 100_000)])
def test_inner_loop_fills_a_sample_and_stays(fake, seconds, number):
    clock = fake()
    compare({"a": takes(seconds)}, rounds=6)
    assert {calls for _, calls in clock.log[-12:]} == {number}


def test_timer_calls_as_often_as_asked():
    calls = []
    assert benchmark.seconds_per_call(lambda: calls.append(gc.isenabled()), 5) > 0
    assert calls == [False] * 5
    assert gc.isenabled()


@pytest.mark.parametrize(("number", "calls"), [(1, 1), (3, 4)])
def test_only_a_short_call_is_preceded_by_one_that_is_not_timed(number, calls):
    made_calls = []
    benchmark._sample(lambda: made_calls.append(1), number)
    assert len(made_calls) == calls


def test_warm_up_outlasts_slow_first_calls(fake):
    first = {1: 100.0, 2: 100.0, 3: 30.0}  # as if compiled, compiled again, recorded
    clock = fake(lambda reading: first.get(reading, 1.0))
    result = compare({"compiled": takes(1.0)}, rounds=5)
    assert result.samples.max() == 1.0
    assert len(clock.log) == 3 + 3 + 2 * 5  # slow ones, one fast and two that confirm it, rounds


def test_warm_up_is_bounded_and_says_so(fake):
    clock = fake(lambda reading: 0.9**reading)
    with pytest.warns(RuntimeWarning, match="'restless' still got faster after 50 warm-up samples"):
        compare({"restless": takes(1000.0)}, rounds=5)
    assert len(clock.log) == 50 + 2 * 5


# What is left behind


def test_results_are_dropped_before_the_next_call():
    class Result:
        pass

    last: list[weakref.ref[Result]] = []
    alive = []

    def thunk() -> Result:
        alive.append(sum(ref() is not None for ref in last))
        result = Result()
        last[:] = [weakref.ref(result)]
        return result

    compare({"a": thunk, "b": thunk}, rounds=5, memory=False)
    assert len(alive) > 20
    assert not any(alive)


def test_garbage_of_one_candidate_is_collected_before_the_next_is_timed(monkeypatch):
    monkeypatch.setattr(benchmark, "_warm_up", lambda thunk, name: 1)

    class Node:
        pass

    litter: list[weakref.ref[Node]] = []
    seen = []

    def cyclic() -> None:
        node = Node()
        node.itself = node  # type: ignore[attr-defined]
        litter.append(weakref.ref(node))

    def tidy() -> None:
        seen.append(sum(ref() is not None for ref in litter))

    compare({"cyclic": cyclic, "tidy": tidy}, rounds=8, memory=False)
    assert seen == [0] * 8
    assert len(litter) == 16


def test_comparison_keeps_no_candidate_alive(fake):
    fake()
    thunk = takes(1.0)
    held = weakref.ref(thunk)
    result = compare({"a": thunk})
    monkey = benchmark.seconds_per_call
    monkey.log.clear()  # type: ignore[attr-defined]
    del thunk
    gc.collect()
    assert held() is None
    assert result.medians == {"a": 1.0}


def test_global_random_state_is_untouched():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    result = compare({"a": lambda: None, "b": lambda: None}, rounds=5, memory=False)
    assert len(result.ratios) == 2
    assert result.noise.median > 0
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


@pytest.mark.parametrize("fatal", [1, 8, 12], ids=["warm-up", "round", "memory"])
def test_error_of_a_candidate_names_it(fake, monkeypatch, fatal):
    fake()
    monkeypatch.setattr(benchmark, "peak_bytes", lambda step: step() or 0)
    calls = Counter()

    def bad() -> None:
        calls["bad"] += 1
        if calls["bad"] == fatal:
            raise ArithmeticError("no luck")

    bad.seconds = 1.0  # type: ignore[attr-defined]
    with pytest.raises(ArithmeticError, match="no luck") as caught:
        compare({"good": takes(1.0), "bad": bad}, rounds=8)
    assert caught.value.__notes__ == ["compare: raised by candidate 'bad'; nothing was recorded"]
    assert calls["bad"] == fatal
    assert gc.isenabled()


def test_real_timer_turns_the_collector_on_again_after_an_error():
    with pytest.raises(ZeroDivisionError) as caught:
        compare({"bad": lambda: 1 / 0}, rounds=5)
    assert "candidate 'bad'" in caught.value.__notes__[0]
    assert gc.isenabled()


@pytest.mark.parametrize(
    ("candidates", "options", "error", "match"),
    [
        ([takes(1.0)], {}, TypeError, r"expected a mapping .* got \[<function"),
        ({"a": 3}, {}, TypeError, "expected candidate 'a' to be a function .* got int"),
        ({}, {}, TypeError, r"expected a mapping .* got \{\}"),
        ({"a": takes(1.0)}, {"baseline": "b"}, ValueError, r"baseline in \['a'\], got 'b'"),
        ({"a": takes(1.0)}, {"rounds": 4}, ValueError, "rounds >= 5, got 4"),
    ],
)
def test_bad_input_is_refused_before_anything_runs(fake, candidates, options, error, match):
    clock = fake()
    with pytest.raises(error, match=match):
        compare(candidates, **options)
    assert clock.log == []


# The record


@pytest.fixture
def result() -> Comparison:
    rng = np.random.default_rng(5)
    samples = np.array([2e-3, 1e-3, 2e-3]) * np.exp(0.01 * rng.standard_normal((24, 3)))
    again = 2e-3 * np.exp(0.01 * rng.standard_normal(24))
    names = ("eager", "<compiled>", "same")
    peaks = {"eager": 3 * 2**20, "<compiled>": 1536, "same": 12}
    return made(samples, again, names=names, baseline="eager", peak_bytes=peaks)


def test_json_round_trip(result, tmp_path):
    path = tmp_path / "result.json"
    result.to_json(path)
    result.to_json(str(path))  # replaces
    back = Comparison.from_json(path)
    assert [file.name for file in tmp_path.iterdir()] == ["result.json"]
    assert (back.names, back.baseline) == (result.names, result.baseline)
    np.testing.assert_array_equal(back.samples, result.samples)
    np.testing.assert_array_equal(back.repeat, result.repeat)
    assert back.peak_bytes == result.peak_bytes
    assert back.environment == result.environment
    assert back.ratios == result.ratios
    assert back.noise == result.noise
    assert repr(back) == repr(result)


def test_json_is_written_whole_or_not_at_all(result, tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    path.write_text("precious")
    write = Path.write_text

    def torn(self: Path, text: str, **options) -> None:
        write(self, text[:100], **options)
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(OSError, match="disk full"):
        result.to_json(path)
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ['{"format": "other", "version": 1}', "[1, 2]", "{}"])
def test_foreign_json_is_refused(tmp_path, text):
    path = tmp_path / "foreign.json"
    path.write_text(text)
    with pytest.raises(
        ValueError, match=r"from_json: expected .*autograd_lib\.Comparison.*foreign"
    ):
        Comparison.from_json(path)


def test_environment_names_versions_and_device(fake):
    fake()
    environment = compare({"a": takes(1.0)}).environment
    assert environment["torch"] == torch.__version__
    assert environment["python"] == ".".join(map(str, sys.version_info[:3]))
    assert environment["threads"] == torch.get_num_threads()
    assert environment["cpu"]
    if torch.cuda.is_available():
        assert environment["device"] == torch.cuda.get_device_name()
    else:
        assert environment["device"] == environment["cpu"]
    assert len(environment["date"]) == len("2026-01-01T00:00:00+00:00")


def test_table_tells_everything(result):
    title, header, eager, compiled, same, again = repr(result).splitlines()
    assert title == "24 rounds, 1 thread, torch 2, d, 2026-01-02"
    assert header.split()[0] == "candidate"
    assert eager.split()[0] == "eager"
    assert "baseline" in eager
    assert eager.endswith("3.0 MiB")
    assert compiled.startswith("<compiled>")
    assert str(result.ratios["<compiled>"]) in compiled
    assert "faster" in compiled
    assert compiled.endswith("1.5 KiB")
    assert "tie" in same
    assert same.endswith("12 B")
    assert again.startswith("eager again (A/A)")
    assert str(result.noise) in again


def test_table_without_memory_has_no_peak_column(fake):
    fake()
    table = repr(compare({"a": takes(1.0)}, memory=False))
    assert "peak" not in table
    assert "MiB" not in table


def test_html_is_escaped_and_complete(result):
    page = result._repr_html_()
    assert page.count("<tr>") == 5
    assert "&lt;compiled&gt;" in page
    assert "<compiled>" not in page


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(12.34, "12.3 s"), (0.5, "500 ms"), (1.5e-3, "1.50 ms"), (2e-5, "20.0 µs"), (3e-9, "3.00 ns")],
)
def test_times_have_a_unit(seconds, text):
    assert benchmark._seconds(seconds) == text


def test_ratio_prints_three_digits():
    assert str(Ratio(0.04567, 0.0123, 123.4)) == "0.0457 [0.0123, 123]"


def test_verdict_of_a_stranger(result):
    with pytest.raises(KeyError, match="nobody"):
        result.verdict("nobody")


def test_plot_draws_the_ratios_and_the_noise(result):
    plt = pytest.importorskip("matplotlib.pyplot")
    figure, ax = plt.subplots()
    try:
        assert result.plot(ax) is ax
        assert len(ax.containers) == 3
        for row, (name, drawn) in enumerate(zip(result.names, ax.containers, strict=True)):
            point, _, (bar,) = drawn
            ratio = result.ratios[name]
            assert point.get_xydata().tolist() == [[ratio.median, row]]
            ends = bar.get_segments()[0][:, 0]
            assert ends == pytest.approx([ratio.low, ratio.high])
            hollow = point.get_markerfacecolor() == "none"
            assert hollow == (name != "<compiled>")
        band = ax.patches[0].get_extents().transformed(ax.transData.inverted())
        assert (band.x0, band.x1) == pytest.approx(result.noise_band)
        assert [label.get_text() for label in ax.get_yticklabels()] == list(result.names)
        assert "time per call of eager" in ax.get_xlabel()
        assert ax.get_ylabel() == "candidate"
        assert ax.get_xscale() == "linear"
    finally:
        plt.close(figure)


def test_plot_of_far_apart_ratios_is_logarithmic():
    plt = pytest.importorskip("matplotlib.pyplot")
    ax = made(np.ones((8, 2)) * [1, 0.01], np.ones(8)).plot()
    assert ax.get_xscale() == "log"
    plt.close(ax.figure)


def test_plot_without_matplotlib_names_it(result, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install matplotlib$"):
        result.plot()


# Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_one_line_wiped_at_the_end(fake, monkeypatch):
    fake()
    monkeypatch.setattr(_progress, "_QUIET_SECONDS", -1.0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    compare({"a": takes(1.0)}, rounds=5)
    text = sys.stderr.getvalue()
    assert "\n" not in text
    for part in ["warming up a", "round 1 of 5", "round 5 of 5", "peak memory of a"]:
        assert f"\rcompare: {part}" in text
    *_, wiped, end = text.split("\r")
    assert wiped.strip() == ""
    assert len(wiped) == len("compare: peak memory of a")
    assert end == ""


def test_progress_is_wiped_after_an_error(fake, monkeypatch):
    fake()
    monkeypatch.setattr(_progress, "_QUIET_SECONDS", -1.0)
    monkeypatch.setattr(sys, "stderr", Terminal())
    with pytest.raises(AttributeError):
        compare({"a": lambda: None}, rounds=5)  # the fake clock finds no `seconds`
    assert sys.stderr.getvalue().endswith(" \r")


@pytest.mark.parametrize(("stream", "quiet"), [(io.StringIO, -1.0), (Terminal, 1e9)])
def test_no_progress_without_a_terminal_or_for_a_short_run(fake, monkeypatch, stream, quiet):
    fake()
    monkeypatch.setattr(_progress, "_QUIET_SECONDS", quiet)
    monkeypatch.setattr(sys, "stderr", stream())
    compare({"a": takes(1.0)}, rounds=5)
    assert sys.stderr.getvalue() == ""


# Everything real


@pytest.mark.parametrize("device", DEVICES)
def test_end_to_end(device, tmp_path):
    x = torch.ones(64, 64, device=device)
    thunks = {"matmul": lambda: x @ x, "sum": x.sum}
    result = compare(thunks, rounds=6, baseline="sum")
    assert result.names == ("matmul", "sum")
    assert result.samples.shape == (6, 2)
    assert result.repeat.shape == (6,)
    assert (result.samples > 0).all()
    assert result.ratios["sum"] == Ratio(1, 1, 1)
    assert result.ratios["matmul"].low <= result.ratios["matmul"].median
    assert result.peak_bytes["matmul"] >= 64 * 64 * 4  # the product itself
    result.to_json(tmp_path / "r.json")
    assert repr(Comparison.from_json(tmp_path / "r.json")) == repr(result)
