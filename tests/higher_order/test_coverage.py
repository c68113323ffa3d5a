"""What `jet` follows of the situations, and what it refuses by name.

The derivatives to order 4 are held against a Chebyshev fit of PyTorch's own values along a
direction, and, where that agrees with the fit (it does not where torch 2.13 is wrong or has none),
to more digits against nested `jvp`. What is refused is listed with its sentence, so that no
situation changes sides unseen.
"""

from __future__ import annotations

import collections
from typing import Any

import pytest
import torch
from oracles import ORDER, assert_near, fit_weights, fitted, nested
from situations import ORACLES, SITUATIONS
from torch import Tensor

from autograd_lib import jet

FIT = fit_weights(ORDER, 20, 0.1)
REFUSED = {
    "jax process_call": "a function of torch.jit.script",
    "tensor scripted": "a function of torch.jit.script",
    "tensor cond": "torch.cond within f has no rule",
    "tensor scatter_reduce_prod": "scatter_reduce has no rule for reduce='prod'",
    "tensor nested_tensor": "reached inside a transform or a compiled function, has no rule",
    "tensor unique": "torch.functional.unique has no rule",
    "tensor lu_solve": "torch.linalg.lu_factor has no rule",
    "tensor tensorsolve": "torch.linalg.tensorsolve has no rule",
    "tensor tensorinv": "torch.linalg.tensorinv has no rule",
    "tensor householder": "torch.linalg.householder_product has no rule",
    "losses ctc": "torch.ctc_loss has no rule",
}
# followed, of how many
BY_SOURCE = {
    "jax": (103, 104),
    "torch-jet": (39, 39),
    "layers": (101, 101),
    "attention": (21, 21),
    "tensor": (116, 125),
    "losses": (30, 31),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SITUATIONS)
def test_situation(name: str) -> None:
    _, function, x = SITUATIONS[name]
    v = 2 * torch.rand(x.shape, generator=torch.Generator().manual_seed(2), dtype=x.dtype) - 1
    if name in REFUSED:
        with pytest.raises(NotImplementedError, match=f"jet: .*{REFUSED[name]}"):
            jet(function, x, v, ORDER)
        return

    oracle = ORACLES.get(name, function)
    rtol = 1e-8 if name not in ORACLES else 1e-4

    def along(t: Any) -> Tensor:
        return oracle(x + t * v)

    fit = fitted(along, ORDER, FIT)
    got = jet(function, x, v, ORDER)
    assert_near(got[:1], [along(0.0)], 1e-12 if rtol < 1e-6 else rtol)
    assert_near(got, fit, max(rtol, 1e-5), "against the fit")
    try:
        exact = nested(along, ORDER, "cpu")
        assert_near(exact, fit, 1e-5)
    except (RuntimeError, NotImplementedError, AssertionError):
        return
    assert_near(got, exact, rtol, "against nested jvp")


def test_counts() -> None:
    followed = collections.Counter(
        of.source for name, of in SITUATIONS.items() if name not in REFUSED
    )
    total = collections.Counter(of.source for of in SITUATIONS.values())
    assert {source: (followed[source], n) for source, n in total.items()} == BY_SOURCE
    assert followed.total() >= total.total() * 282 / 302
