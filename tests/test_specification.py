"""Every block of the specification does what it says; `specification.md` holds the blocks.

The blocks share a namespace, as they do for someone who types them one after the other. What they
take as given is put there before; what they promise is looked at after.
"""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autograd_lib import AutogradTrainingSystem, load_config

BLOCKS = re.findall(
    r"^## (.*?)\n\n```(\w+)\n(.*?)^```",
    (Path(__file__).parent / "specification.md").read_text(encoding="utf-8"),
    re.DOTALL | re.MULTILINE,
)
PYTHON = {heading: code for heading, language, code in BLOCKS if language == "python"}
(YAML,) = (code for _, language, code in BLOCKS if language == "yaml")

# What a block takes as given and no block before it leaves behind, by heading.
GIVEN = {
    "Custom Loss Function": """
predictions = model(x)  # anew: the graph of those before was freed by their backward
targets = torch.randn(32, 1)  # one number for each of the 32 samples
""",
    "Gradient Monitoring": """
dataloader = list(torch.randn(3, 10))  # three batches of a sample each: the output is a scalar
""",
    "Custom Autograd Function": """
input_tensor = torch.randn(4, 3, requires_grad=True)  # four samples of three features
weight_tensor = torch.randn(2, 3, requires_grad=True)  # two features out, three in
""",
    "Higher-Order Gradients": """
optimizer = torch.optim.SGD([*model.parameters(), *loss_fn.parameters()], lr=0.1)  # loss_fn learns
input_data = torch.randn(16, 10)  # sixteen samples for the linear model of the first block
target_data = torch.randn(16, 1)  # and what it should say
""",
    "Transformer Models": """
input_ids = torch.randint(1000, (4, 9))  # four sequences of nine tokens
targets = torch.randint(1000, (4, 9))  # the token that comes next, at each position
def loss_function(output, targets):  # logits to cross-entropy, over all positions
    return torch.nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten())
""",
    "CNN Models": """
dataloader = [  # two batches of four small images in color, with their classes
    {"images": torch.randn(4, 3, 12, 12), "labels": torch.randint(10, (4,))} for _ in range(2)
]
loss_fn = torch.nn.CrossEntropyLoss()  # of logits and classes
class optimizer:  # of the model that the block itself makes, hence made when first called
    moved = []
    def step():
        before = cnn.head.weight.clone()
        torch.optim.SGD(cnn.parameters(), lr=0.1).step()
        optimizer.moved.append(not torch.equal(cnn.head.weight, before))
""",
    "RNN Models": """
sequences = list(torch.randn(2, 4, 7, 100))  # two batches of four sequences of seven steps
targets = torch.randn(4, 7, 128)  # a state for each step
loss_fn = torch.nn.MSELoss()  # mean over all of them
""",
    "NaN Gradients": """
name, param = "weight", torch.nn.Parameter(torch.zeros(2))  # as from model.named_parameters()
param.grad = torch.tensor([1.0, float("nan")])  # one element is no number
""",
    "Gradient Explosion": """
param.grad = torch.tensor([30.0, 40.0])  # of norm 50
""",
    "Gradient Vanishing": """
grad_norm = 5e-9  # the norm of a parameter's gradient
""",
}

Scope = dict[str, Any]
Check = Callable[[Scope, str], None]
CHECKS: dict[str, Check] = {}


def after(heading: str) -> Callable[[Check], Check]:
    """Register what is looked at after a block, given the namespace and what it printed."""

    def register(check: Check) -> Check:
        CHECKS[heading] = check
        return check

    return register


def no_hooks(model: nn.Module) -> bool:
    of_modules = [module._forward_hooks for module in model.modules()]
    of_parameters = [p._post_accumulate_grad_hooks or {} for p in model.parameters()]
    return not any([*of_modules, *of_parameters])


def all_gradients(model: nn.Module) -> bool:
    return all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@after("Import")
def _(scope: Scope, printed: str) -> None:
    names = {"AutogradUtils", "CustomLossFunction", "GradientMonitor", "CustomAutogradFunction"}
    assert names | {"AutogradTrainingSystem"} <= set(scope)


@after("Basic Autograd Usage")
def _(scope: Scope, printed: str) -> None:
    model, statistics = scope["model"], scope["grad_stats"]
    x, y = scope["x"], scope["y"]
    weight = 2 / 32 * (model(x) - y).T @ x
    torch.testing.assert_close(model.weight.grad, weight.detach())
    assert statistics["parameters"]["weight"]["norm"] == pytest.approx(weight.norm().item(), 1e-5)
    assert printed.startswith("Gradient statistics: gradients of 2 parameters")


@after("Custom Loss Function")
def _(scope: Scope, printed: str) -> None:
    residual = (scope["predictions"] - scope["targets"]).detach()
    expected = residual.square().mean() + 0.1 * residual.abs().mean()
    torch.testing.assert_close(scope["loss"].detach(), expected)
    assert all_gradients(scope["loss_fn"])
    assert all_gradients(scope["model"])


@after("Gradient Monitoring")
def _(scope: Scope, printed: str) -> None:
    assert printed.count("Gradient summary: gradients of 2 parameters") == 3
    assert [f"at step {step}," in printed for step in (1, 2, 3)] == [True] * 3
    norm = scope["model"].weight.grad.norm().item()
    assert scope["summary"]["parameters"]["weight"]["norm"] == pytest.approx(norm, 1e-5)
    assert scope["hooks"]
    assert no_hooks(scope["model"])


@after("Custom Autograd Function")
def _(scope: Scope, printed: str) -> None:
    x, w = scope["input_tensor"], scope["weight_tensor"]
    torch.testing.assert_close(scope["output"], torch.einsum("ni,oi->no", x, w))
    torch.testing.assert_close(x.grad, w.detach().sum(0).expand(4, 3))
    torch.testing.assert_close(w.grad, x.detach().sum(0).expand(2, 3))


@after("Higher-Order Gradients")
def _(scope: Scope, printed: str) -> None:
    tower, model = scope["gradients"], scope["model"]
    assert len(tower) == 3
    loss = scope["loss_fn"](model(scope["input_data"]), scope["target_data"])
    wanted = torch.autograd.grad(loss, list(model.parameters()))
    torch.testing.assert_close([tower[0]["weight"], tower[0]["bias"]], list(wanted))
    assert printed.startswith("Higher-order gradients: derivatives of the loss")
    assert isinstance(scope["training_system"], AutogradTrainingSystem)


@after("Transformer Models")
def _(scope: Scope, printed: str) -> None:
    assert scope["output"].shape == (4, 9, 1000)
    assert all(p.requires_grad for p in scope["transformer"].parameters())
    assert all_gradients(scope["transformer"])


@after("CNN Models")
def _(scope: Scope, printed: str) -> None:
    assert scope["predictions"].shape == (4, 10)
    assert all_gradients(scope["cnn"])
    assert scope["optimizer"].moved == [True, True]


@after("RNN Models")
def _(scope: Scope, printed: str) -> None:
    assert scope["output"].shape == (4, 7, 128)
    assert all_gradients(scope["rnn"])


@after("Basic Examples")
def _(scope: Scope, printed: str) -> None:
    for part in ("Gradients", "Loss", "Monitor", "Function", "Training"):
        assert re.search(f"^{part}: ", printed, re.MULTILINE)


@after("Gradient Flow Analysis")
def _(scope: Scope, printed: str) -> None:
    first = [line.split()[0] for line in printed.splitlines() if line]
    assert {"vanishing", "exploding", "residual"} <= set(first)


@after("Performance Optimization")
def _(scope: Scope, printed: str) -> None:
    assert "One step" in printed
    assert "Checkpoint plan" in printed
    assert "The fastest of" in printed
    assert "compiled" not in printed  # unless asked for


@after("Custom Model Integration")
def _(scope: Scope, printed: str) -> None:
    for name in ("transformer", "cnn", "rnn"):
        assert re.search(rf"^{name} .* True$", printed, re.MULTILINE)


@after("Advanced Examples")
def _(scope: Scope, printed: str) -> None:
    for heading in ("Gradient Flow Analysis", "Performance Optimization"):
        CHECKS[heading](scope, printed)
    CHECKS["Custom Model Integration"](scope, printed)


@after("NaN Gradients")
def _(scope: Scope, printed: str) -> None:
    assert printed == "NaN gradients detected in weight\n"


@after("Gradient Explosion")
def _(scope: Scope, printed: str) -> None:
    assert printed == "Large gradients detected: 50.0\n"


@after("Gradient Vanishing")
def _(scope: Scope, printed: str) -> None:
    assert printed == "Very small gradients detected: 5e-09\n"


@after("Debugging Tools")
def _(scope: Scope, printed: str) -> None:
    assert torch.is_anomaly_enabled()
    torch.autograd.set_detect_anomaly(False)
    assert (scope["stats"]["step"], scope["stats"]["total_norm"]) == (0, 0.0)  # before a step
    assert not no_hooks(scope["model"])
    for hook in scope["hooks"]:
        hook.remove()
    assert no_hooks(scope["model"])


@after("Unit Tests")
def _(scope: Scope, printed: str) -> None:
    scope["test_autograd_basic"]()
    scope["test_custom_loss_function"]()


@after("Integration Tests")
def _(scope: Scope, printed: str) -> None:
    scope["test_transformer_autograd"]()


@pytest.fixture
def _modes_kept() -> Iterator[None]:
    yield
    torch.autograd.set_detect_anomaly(False)  # on where a block that switches it on has failed


@pytest.mark.usefixtures("_modes_kept", "short_samples")
def test_python_blocks_run_in_order_and_keep_their_word() -> None:
    assert set(GIVEN) <= set(PYTHON) == set(CHECKS)
    torch.manual_seed(0)
    scope: Scope = {"__name__": "specification"}
    for heading, code in PYTHON.items():
        if heading in GIVEN:
            exec(compile(GIVEN[heading], f"given to {heading!r}", "exec"), scope)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, f"specification.md, {heading!r}", "exec"), scope)
        CHECKS[heading](scope, printed.getvalue())
    assert not torch.is_anomaly_enabled()


def test_yaml_block_is_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "specification.yaml").write_text(YAML)
    system = load_config(tmp_path / "specification.yaml").autograd_system
    assert system.enable_gradients is True
    assert system.gradient_monitoring.enabled is True
    assert system.gradient_monitoring.save_gradient_history is True
    features = system.advanced_features
    assert (features.higher_order_gradients, features.custom_gradients) == (True, True)
    assert features.gradient_checkpointing is False


def test_the_copy_is_complete() -> None:
    """Counted in the specification: twenty blocks of Python, one of YAML."""
    assert len(PYTHON) == 20
    text = (Path(__file__).parent / "specification.md").read_text(encoding="utf-8")
    assert text.count("\n```python\n") == 20
    assert text.count("\n```yaml\n") == 1
