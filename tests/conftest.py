"""What all tests run under, and fixtures of several files."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from autograd_lib import benchmark

sys.path.append(str(Path(__file__).parents[1] / "book" / "_tools"))  # tests import them by name

# Else each of xdist's workers, and each process that it starts, has as many threads as there are
# cores, which then wait in turns.
if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    threads = max(1, torch.get_num_threads() // int(workers))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)

_here: tuple[object, int] = (None, 0)  # where what stands was last set aside


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Keep garbage collection cheap: set aside what stays, which is modules and the tests.

    `peak_bytes`, and each test that something is freed, collects garbage. Beside torch, its
    compiler and thousands of tests one collection takes a third of a second, and frees nothing of
    them. What a test itself makes is collected as ever.
    """
    global _here  # noqa: PLW0603
    file, modules = getattr(item, "path", None), len(sys.modules)
    if file != _here[0] or modules > _here[1] + 20:  # such as the compiler's, imported in a test
        gc.collect()
        gc.freeze()
        _here = file, modules


@pytest.fixture(scope="module")
def short_samples() -> Iterator[None]:
    """Races on the real clock in which a sample is a call or two, where no test looks at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "_SAMPLE_SECONDS", 1e-4)
        yield
