"""The monitor on what people train: `transformers`, nets by hand, adapters, Accelerate."""

from __future__ import annotations

import contextlib
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from autograd_lib import GradientMonitor

pytest.importorskip("transformers")
from architectures import ARCHITECTURES
from handwritten import NETS

MODELS = ARCHITECTURES | NETS
# Its losses are sums, and the first attention of its decoder sees queries that are all zero: there
# the gradient of a whole module is 1e-13.
LIMITS: dict[str, dict[str, Any]] = {"detr": {"explode_above": 1e6, "vanish_below": 1e-20}}


def train(
    name: str, watched: bool, prepare: Any = lambda model, optimizer: (model, optimizer)
) -> tuple[list[Tensor], GradientMonitor, list[float], set[str]]:
    """Five steps, clipped: the parameters, the monitor, norms and absences as PyTorch has them."""
    model, batch = MODELS[name]()
    torch.manual_seed(0)
    is_sparse = any(getattr(module, "sparse", False) for module in model.modules())
    kind = torch.optim.SGD if is_sparse else torch.optim.AdamW  # which refuses sparse gradients
    optimizer = kind(model.parameters(), lr=1e-3)
    prepared, stepping = prepare(model, optimizer)
    monitor = GradientMonitor(model, stepping, **LIMITS.get(name, {}))
    norms: list[float] = []
    missing: set[str] = set()
    with monitor if watched else contextlib.nullcontext():
        for _ in range(5):
            prepared(**batch)["loss"].backward()
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            norms.append(nn.utils.get_total_norm([grad.to_dense() for grad in grads]).item())
            absent = {n for n, p in model.named_parameters() if p.requires_grad and p.grad is None}
            missing |= absent  # those that this loss, or a dropped layer, does not reach
            if watched:
                monitor.look()
            if is_sparse:  # as clip_grad_norm_ does, which refuses them too
                for grad in grads:
                    grad.mul_(min(1.0, 0.1 / norms[-1]))
            else:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            stepping.step()
            stepping.zero_grad()
    return [p.detach() for p in model.parameters()], monitor, norms, missing


@pytest.mark.parametrize("name", MODELS)
def test_a_healthy_model_has_no_issue_and_trains_as_before(name: str) -> None:
    parameters, monitor, norms, missing = train(name, watched=True)
    assert all(map(torch.equal, parameters, train(name, watched=False)[0]))
    history = monitor.history
    np.testing.assert_allclose(history["total_norm"], norms, rtol=1e-4)
    np.testing.assert_allclose(history["clipped_norm"], np.minimum(norms, 0.1), rtol=1e-3)
    assert {issue.kind for issue in monitor.issues} <= {"missing"}
    assert {issue.parameter for issue in monitor.issues} == missing


def test_accelerate_is_taken_apart() -> None:
    accelerate = pytest.importorskip("accelerate")
    prepare = lambda *both: accelerate.Accelerator(cpu=True).prepare(*both)  # noqa: E731
    parameters, monitor, norms, _ = train("gpt2", watched=True, prepare=prepare)
    assert all(map(torch.equal, parameters, train("gpt2", False, prepare)[0]))
    np.testing.assert_allclose(monitor.history["total_norm"], norms, rtol=1e-4)
    assert monitor.issues == []


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_of_peft() -> None:
    peft = pytest.importorskip("peft")
    model, batch = ARCHITECTURES["gpt2"]()
    torch.manual_seed(0)
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    with GradientMonitor(adapted, optimizer) as monitor:
        for _ in range(5):
            adapted(**batch).loss.backward()
            norm = nn.utils.get_total_norm([p.grad for p in trained.values()]).item()
            optimizer.step()
            optimizer.zero_grad()
    history = monitor.history
    assert history["names"] == [*trained]
    assert history["total_norm"][-1] == pytest.approx(norm, rel=1e-4)
    inner = ["lora_A" in name for name in history["names"]]
    assert (history["norm"][0, inner] == 0).all()  # as B begins with zero
    assert monitor.issues == []
