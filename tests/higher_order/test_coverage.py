"""What `jet` follows of the situations, and what it refuses by name.

The derivatives to order 4 are held against a Chebyshev fit of PyTorch's own values along a
direction, and, where that agrees with the fit (it does not where torch 2.13 is wrong or has none),
to more digits against nested `jvp`. What is refused is listed with its sentence, so that no
situation changes sides unseen.
"""

from __future__ import annotations

import collections
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import ORDER, SMALL_FIT, assert_near, fit_weights, fitted, nested
from situations import ORACLES, SITUATIONS
from torch import Tensor

from autograd_lib import jet, laplacian

FIT = fit_weights(ORDER, 20, 0.1)
REFUSED = {
    "jax process_call": "a function of torch.jit.script",
    "layers MaxUnpool2d": "max_unpool2d has no rule",
    "tensor scripted": "a function of torch.jit.script",
    "tensor cond": "torch.cond within f has no rule",
    "tensor scatter_reduce_prod": "scatter_reduce has no rule for reduce='prod'",
    "tensor index_reduce": "index_reduce has no rule",
    "tensor nested_tensor": "reached inside a transform or a compiled function, has no rule",
    "tensor unique": "torch.functional.unique has no rule",
    "tensor quantile": "torch.quantile has no rule",
    "tensor stft": "stft has no rule",
    "tensor i0": "torch.special.i0 has no rule",
    "tensor log_ndtr": "torch.special.log_ndtr has no rule",
    "tensor norm_nuclear": "torch.linalg.norm has no rule",
    "tensor norm_spectral": "torch.linalg.matrix_norm has no rule",
    "tensor matrix_exp": "torch.linalg.matrix_exp has no rule",
    "tensor eigvals": "torch.linalg.eigvals has no rule",
    "tensor eigh_vectors": "torch.linalg.eigh has no rule",
    "tensor svd_vectors": "torch.linalg.svd has no rule",
    "tensor pinv": "torch.linalg.pinv has no rule",
    "tensor lstsq": "torch.linalg.lstsq has no rule",
    "tensor lu_solve": "torch.linalg.lu_factor has no rule",
    "tensor tensorsolve": "torch.linalg.tensorsolve has no rule",
    "tensor tensorinv": "torch.linalg.tensorinv has no rule",
    "tensor householder": "torch.linalg.householder_product has no rule",
    "losses multilabel_margin": "multilabel_margin_loss has no rule",
    "losses ctc": "torch.ctc_loss has no rule",
}
# followed, of how many
BY_SOURCE = {
    "jax": (75, 76),
    "torch-jet": (39, 39),
    "layers": (100, 101),
    "attention": (21, 21),
    "tensor": (112, 134),
    "losses": (29, 31),
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


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(SITUATIONS.keys() - REFUSED.keys() - ORACLES.keys()))
def test_other_orders_the_other_ring_and_gradients(name: str) -> None:
    _, function, x = SITUATIONS[name]
    draws = torch.Generator().manual_seed(3)
    u, v, w = 2 * torch.rand(3, *x.shape, generator=draws, dtype=x.dtype) - 1
    derivatives = jet(function, x, v, 3)
    for order in range(3):
        assert_near(jet(function, x, v, order), derivatives[: order + 1], 1e-11)

    def plane(s: Tensor) -> Tensor:
        return function(x + s[0] * u + s[1] * v)

    expected = jet(function, x, u, 2)[2] + derivatives[2]
    assert_near([laplacian(plane, torch.zeros(2).double())], [expected], 1e-8, "of the laplacian")

    def weighted(x: Tensor) -> Tensor:
        parts = jet(function, x, v, 2)
        return sum(
            (part * torch.arange(1.0, 1 + part.numel()).reshape(part.shape)).sum() for part in parts
        )

    leaf = x.clone().requires_grad_()
    total = weighted(leaf)
    (slope,) = torch.autograd.grad(total, leaf) if total.requires_grad else (torch.zeros_like(x),)
    along = fitted(lambda t: weighted(x + t * w), 1, SMALL_FIT)[1]
    assert_near([(slope * w).sum()], [along], 1e-6, "of the gradient")


COMPOSED = """
    layers_LSTM layers_GRUCell tensor_kron tensor_multi_dot tensor_cov losses_cosine_embedding
    losses_triplet tensor_in_place_row tensor_scatter tensor_solve
"""


@pytest.mark.parametrize("name", COMPOSED.split())
def test_vmap_is_a_loop(name: str) -> None:
    """What PyTorch composes is followed below the levels of torch.vmap, too."""
    _, function, x = SITUATIONS[name.replace("_", " ", 1)]
    points = torch.stack([x, x + 0.01, x * 1.01])
    v = torch.ones_like(x)

    def derivatives(x: Tensor) -> Tensor:
        return torch.stack(jet(function, x, v, 3))

    assert_near(
        [torch.vmap(derivatives)(points)], [torch.stack([*map(derivatives, points)])], 1e-12
    )


def test_counts() -> None:
    followed = collections.Counter(
        of.source for name, of in SITUATIONS.items() if name not in REFUSED
    )
    total = collections.Counter(of.source for of in SITUATIONS.values())
    assert {source: (followed[source], n) for source, n in total.items()} == BY_SOURCE
    assert followed.total() >= total.total() * 282 / 302


def test_the_reference_says_what_is_followed() -> None:
    page = (Path(__file__).parents[2] / "book/api/higher_order.md").read_text(encoding="utf-8")
    rows = re.findall(r"\| (\d+) of (\d+) \|", page)
    assert [(int(followed), int(total)) for followed, total in rows] == [*BY_SOURCE.values()]
