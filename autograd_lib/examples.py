"""Demonstrations: every part of the library at work in a few lines, with results to look into.

Each prints what it shows and returns it. Models are small and the data are random. Every
demonstration starts from seed 0 and restores the caller's random states at its end.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from autograd_lib.benchmark import compare
from autograd_lib.checkpointing.plan import plan_checkpoints
from autograd_lib.config.records import Settings
from autograd_lib.core.snapshot import preserved_random_state
from autograd_lib.functions.functions import CustomAutogradFunction
from autograd_lib.functions.losses import CustomLossFunction
from autograd_lib.gradients import AutogradUtils
from autograd_lib.memory import peak_bytes, saved_tensors
from autograd_lib.models import CustomCNNModel, CustomRNNModel, CustomTransformerModel
from autograd_lib.monitor.monitor import GradientMonitor
from autograd_lib.report.tables import Row, readable_bytes, text_table
from autograd_lib.training.system import AutogradTrainingSystem
from autograd_lib.tuning.tuner import autotune

__all__ = ["AdvancedAutogradExamples", "AutogradExamples"]

Results = dict[str, Any]


class AutogradExamples:
    """The basic demonstration: gradients read, a loss learned, a model trained and watched."""

    @staticmethod
    def demonstrate_autograd_system() -> Results:
        """Show each core part of the library on a problem with a known answer.

        Returns:
            A dict of dicts, one for each part:

            - `gradients`: a linear `model`, its `inputs` and `targets`, and what `AutogradUtils`
              says of the gradient of the mean squared error: `complete`, `norms`, `statistics`.
            - `loss`: `residuals`, `start` and `learned`, each `(alpha, beta)` of a
              `CustomLossFunction` that was fitted to them, and `values`, the loss before and after.
            - `function`: `input`, `weight`, `output` and `gradients` (of both, for the sum of the
              output) of `CustomAutogradFunction`, and `checked`: first and second derivatives
              agree with finite differences.
            - `training`: `losses` of the `system`, an `AutogradTrainingSystem`, over as many steps;
              `summary`, what its `GradientMonitor` says of the last one; `tower`, the derivatives
              of its loss up to the third; and for a `step` of that length down the gradient
              `predicted`, the loss by the Taylor polynomials of order 0 to 3, and `found`, the loss
              there.

        Raises:
            RuntimeError: If a derivative does not agree with finite differences.

        Example:
            >>> results = AutogradExamples.demonstrate_autograd_system()
            Gradients: ...
            >>> results["gradients"]["complete"], results["function"]["checked"]
            (True, True)
        """
        return {
            "gradients": _gradients(),
            "loss": _loss(),
            "function": _function(),
            "training": _training(),
        }


class AdvancedAutogradExamples:
    """The advanced demonstrations: gradient flow, performance, and the three models."""

    @staticmethod
    def run_all_advanced_examples(compile: bool = False) -> Results:
        """Run the demonstrations of this class, one after the other.

        Args:
            compile: Whether `demonstrate_performance_optimization` compiles, too.

        Returns:
            What they return, as `gradient_flow`, `performance` and `custom_models`.
        """
        examples = AdvancedAutogradExamples
        return {
            "gradient_flow": examples.demonstrate_gradient_flow_analysis(),
            "performance": examples.demonstrate_performance_optimization(compile),
            "custom_models": examples.demonstrate_autograd_with_custom_models(),
        }

    @staticmethod
    def demonstrate_gradient_flow_analysis() -> Results:
        """Follow the gradient through three networks of sixteen layers, over ten batches.

        The first has sigmoids, the second ReLUs and initial weights twice too large, the third
        ReLUs on residual branches.

        Returns:
            A dict for each, under `vanishing`, `exploding` and `residual`: `history` (for the
            `plot_` functions) and `issues` of the monitor, and `factor`: how much the norm of the
            gradient is multiplied by in each layer on its way from the last to the first.

        Example:
            >>> flow = AdvancedAutogradExamples.demonstrate_gradient_flow_analysis()
            Gradient flow, ...
            >>> flow["vanishing"]["factor"] < 0.5 < flow["residual"]["factor"] < 1.5
            True
        """
        flow = {kind: _flow(kind) for kind in ("vanishing", "exploding", "residual")}
        rows = [
            (kind, found["factor"], ", ".join(sorted({i.kind for i in found["issues"]})))
            for kind, found in flow.items()
        ]
        _show("Gradient flow, from the last layer to the first", ["", "a layer", "issues"], rows)
        return flow

    @staticmethod
    def demonstrate_performance_optimization(compile: bool = False) -> Results:
        """Compare memory and time of four forms of a training step, then search within a budget.

        Args:
            compile: Whether to time `torch.compile` as a fifth form and to let the search try it;
                it takes seconds to minutes and needs a C++ compiler.

        Returns:
            A dict:

            - `saved`: bytes saved for backward, by name of the form.
            - `comparison`: the `Comparison` of the forms, with time and peak of each.
            - `budget`: half of the peak of the plain step, in bytes.
            - `plan`: a `CheckpointPlan` for that budget, and `plan_peak`, the peak measured with
              the plan applied.
            - `tuning`: the `TuningReport` of a search with that budget and a tolerance of 1e-4.
        """
        return _performance(compile)

    @staticmethod
    def demonstrate_autograd_with_custom_models() -> Results:
        """Train the three models, then show which parts of the input each output depends on.

        The Transformer continues sequences that repeat after three tokens, the CNN tells a plus
        from a cross, three pixels wide, anywhere in a noisy image, the RNN echoes its input two
        steps late.

        Returns:
            A dict for each, under `transformer`, `cnn` and `rnn`:

            - `model`: the trained model.
            - `rows`: what `AutogradTrainingSystem.fit` returned.
            - `complete`: whether every parameter has a gradient.
            - `influence`: norms of the gradient of output i with respect to input j, the mean over
              the samples. For the RNN i and j are steps; for the Transformer positions (the logit
              of the right token, and the embedding); for the CNN, i is the row in which the shape
              begins (the difference of the logits), and j a row of pixels.
        """
        models = {"transformer": _transformer(), "cnn": _cnn(), "rnn": _rnn()}
        rows = [
            (name, *(found["rows"][epoch]["loss"] for epoch in (0, -1)), found["complete"])
            for name, found in models.items()
        ]
        _show("Models, trained", ["", "first epoch", "last", "all gradients"], rows)
        return models


@contextmanager
def _reproducible() -> Iterator[None]:
    """Run from seed 0, and restore the random states of the caller."""
    with preserved_random_state():
        torch.manual_seed(0)
        yield


def _show(title: str, header: Row, rows: Iterable[Sequence[object]]) -> None:
    cells = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    print(text_table(title, header, cells), end="\n\n")


# ---------------------------------------------------------------------------------- the basic ones


@_reproducible()
def _gradients() -> Results:
    model, inputs, targets = nn.Linear(10, 1), torch.randn(32, 10), torch.randn(32, 1)
    F.mse_loss(model(inputs), targets).backward()
    found: Results = {
        "complete": AutogradUtils.check_gradients_exist(model),
        "norms": AutogradUtils.get_gradient_norms(model),
        "statistics": AutogradUtils.compute_gradient_statistics(model),
    }
    print(f"Gradients: every parameter has one: {found['complete']}\n{found['statistics']}\n")
    return {"model": model, "inputs": inputs, "targets": targets, **found}


@_reproducible()
def _loss() -> Results:
    # Between a normal and a Laplace distribution, so that both weights are called for.
    laplace = torch.empty(1000).exponential_() - torch.empty(1000).exponential_()
    residuals = 0.5 * (torch.randn(1000) + laplace)
    loss_fn = CustomLossFunction(alpha=1.0, beta=0.1)
    optimizer = torch.optim.LBFGS(loss_fn.parameters(), max_iter=50, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss: Tensor = loss_fn(residuals, torch.zeros(1000))
        loss.backward()
        return loss

    rows: list[tuple[str, float, float, float]] = []
    for name in ("start", "learned"):
        rows.append((name, loss_fn.alpha.item(), loss_fn.beta.item(), closure().item()))
        optimizer.step(closure)
    _show("Loss: weights by maximum likelihood", ["", "alpha", "beta", "loss"], rows)
    weights = {name: (alpha, beta) for name, alpha, beta, _ in rows}
    return {"residuals": residuals, **weights, "values": (rows[0][-1], rows[1][-1])}


@_reproducible()
def _function() -> Results:
    input = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    function = CustomAutogradFunction.apply
    output = function(input, weight)
    gradients = torch.autograd.grad(output.sum(), (input, weight))
    checked = gradcheck(function, (input, weight)) and gradgradcheck(function, (input, weight))
    print(f"Function: first and second derivatives agree with finite differences: {checked}\n")
    tensors = {"input": input, "weight": weight, "output": output}
    return {**tensors, "gradients": gradients, "checked": checked}


@_reproducible()
def _training() -> Results:
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    inputs = torch.linspace(-2, 2, 64)[:, None]
    targets = torch.sin(2 * inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    system = AutogradTrainingSystem(model, optimizer, F.mse_loss)
    losses = [system.train_step(inputs, targets).item() for _ in range(50)]
    assert system.monitor is not None  # there is one by default
    summary = system.monitor.get_gradient_summary()
    print(f"Monitor: over {len(losses)} steps\n{summary}\n")
    tower = system.compute_higher_order_gradients(inputs, targets, order=3)
    step = 0.5
    terms = [value * (-step) ** k / math.factorial(k) for k, value in enumerate(tower.values)]
    predicted = torch.stack(terms).cumsum(0).tolist()
    there = {name: p - step * tower.direction[name] for name, p in model.named_parameters()}
    found = F.mse_loss(functional_call(model, there, (inputs,)), targets).item()
    title = (
        f"Training: {len(losses)} steps from loss {losses[0]:.3g} to {losses[-1]:.3g}\n"
        f"Then {step} down the gradient, by Taylor polynomials"
    )
    rows = [(f"order {order}", value) for order, value in enumerate(predicted)]
    _show(title, ["", "loss"], [*rows, ("found", found)])
    results = {"system": system, "losses": losses, "summary": summary, "tower": tower}
    return {**results, "step": step, "predicted": predicted, "found": found}


# ------------------------------------------------------------------------------ the advanced ones


class _Residual(nn.Sequential):
    """A branch added to its input, scaled so that the sum of 16 branches has size 1."""

    def forward(self, input: Tensor) -> Tensor:
        return input + super().forward(input) / 4


def _layer(kind: str, width: int) -> nn.Module:
    linear = nn.Linear(width, width)
    if kind == "vanishing":
        return nn.Sequential(linear, nn.Sigmoid())
    nn.init.kaiming_normal_(linear.weight)
    if kind == "residual":
        return _Residual(linear, nn.ReLU())
    linear.weight.data *= 2
    return nn.Sequential(linear, nn.ReLU())


@_reproducible()
def _flow(kind: str, width: int = 32) -> Results:
    model = nn.Sequential(*(_layer(kind, width) for _ in range(16)), nn.Linear(width, 2))
    with GradientMonitor(model) as monitor:
        for _ in range(10):
            model.zero_grad()
            inputs = torch.randn(64, width)
            F.cross_entropy(model(inputs), (inputs[:, 0] > 0).long()).backward()
    history = monitor.history
    # A bias's gradient is that of the layer's output, summed over the batch. A weight's gradient
    # also contains the layer's input, which grows toward the output as the gradient shrinks.
    first, last = (history["names"].index(f"{layer}.0.bias") for layer in (0, 15))
    ratio = np.median(history["norm"][:, first] / history["norm"][:, last]).item()
    return {"history": history, "issues": monitor.issues, "factor": ratio ** (1 / 15)}


def _step_of(
    model: nn.Module, settings: Settings, batch: tuple[Tensor, Tensor]
) -> tuple[Callable[[], object], int]:
    """A step of training without an optimizer, and the bytes that one forward saves for it."""
    size = settings.micro_batch or len(batch[0])

    def forward(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
            return F.mse_loss(model(x), y)

    def step() -> None:
        for x, y in zip(*(part.split(size) for part in batch), strict=True):
            forward(x, y).mul(len(x) / len(batch[0])).backward()
        model.zero_grad()

    step()  # the first call also allocates what later ones reuse
    with saved_tensors(model) as saved:
        forward(*(part[:size].clone() for part in batch))
    return step, saved.total_bytes


@_reproducible()
def _performance(compile: bool) -> Results:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(6)))
    batch = torch.randn(512, 32), torch.randn(512, 32)
    forms = {
        "plain": Settings(),
        "bf16": Settings("bf16"),
        "micro-batches": Settings(micro_batch=128),
        "recomputed": Settings(checkpoint={"": ["recompute"] * len(model)}),
        **({"compiled": Settings(compile=True)} if compile else {}),
    }
    made = {name: _step_of(s.apply(copy.deepcopy(model)), s, batch) for name, s in forms.items()}
    saved = {name: nbytes for name, (_, nbytes) in made.items()}
    comparison = compare({name: step for name, (step, _) in made.items()}, rounds=8)
    rows = [
        [name, *map(readable_bytes, (saved[name], comparison.peak_bytes[name])), ratio]
        for name, ratio in comparison.ratios.items()
    ]
    _show("One step, its time relative to plain", ["", "saved", "peak", "time"], rows)
    budget = comparison.peak_bytes["plain"] // 2
    plan = plan_checkpoints(model, lambda: F.mse_loss(model(batch[0]), batch[1]), budget)
    plan_peak = peak_bytes(_step_of(plan.apply(copy.deepcopy(model)), Settings(), batch)[0])
    print(f"{plan}\nmeasured {readable_bytes(plan_peak)}\n")
    tuning = autotune(model, batch, F.mse_loss, budget, tolerance=1e-4, compile=compile)
    count, best = len(tuning.trials), tuning.best
    print(f"The fastest of {count} candidates within {readable_bytes(budget)}: {best}\n")
    found = {"plan": plan, "plan_peak": plan_peak, "tuning": tuning}
    return {"saved": saved, "comparison": comparison, "budget": budget, **found}


def _token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy from the third token on: the first three are random, the others repeat them."""
    return F.cross_entropy(logits[:, 2:].flatten(0, 1), targets[:, 2:].flatten())


@_reproducible()
def _transformer() -> Results:
    tokens = torch.randint(16, (256, 3)).repeat(1, 4)
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    model = CustomTransformerModel(vocab_size=16, d_model=32, num_layers=2, max_length=11)
    found = _trained(model, inputs, targets, _token_loss)
    embedded: list[Tensor] = []
    hook = model.embedding.register_forward_hook(lambda *args: embedded.append(args[-1]))
    right = model(inputs).gather(2, targets[..., None])
    hook.remove()
    return {**found, "influence": _influence(right, embedded[0]).mean(1)}


@_reproducible()
def _cnn() -> Results:
    plus = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    cross = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    # Four of each shape at each of the 6 x 6 places where it fits.
    places = torch.eye(36).view(36, 1, 6, 6)
    shapes = F.conv_transpose2d(places, torch.stack([plus, cross])[None])
    images = 2 * shapes[:, :, None] + 0.5 * torch.randn(36, 2, 4, 8, 8)
    images = images.view(-1, 1, 8, 8)
    labels = torch.arange(2)[:, None].expand(6, 6, 2, 4).flatten()
    model = CustomCNNModel(input_channels=1, num_classes=2, channels=(8, 8, 16))
    found = _trained(model, images, labels, F.cross_entropy)
    rows = images.squeeze(1).requires_grad_()
    logits = model(rows[:, None])
    of_pixels = _influence(logits[:, :1] - logits[:, 1:], rows)[0]
    return {**found, "influence": of_pixels.view(6, -1, 8).mean(1)}  # by the row of the shape


@_reproducible()
def _rnn() -> Results:
    inputs = torch.randn(256, 10, 1)
    targets = F.pad(inputs[:, :-2], (0, 0, 2, 0))
    model = CustomRNNModel(input_size=1, hidden_size=32, output_size=1)
    found = _trained(model, inputs, targets, F.mse_loss)
    inputs.requires_grad_()
    return {**found, "influence": _influence(model(inputs), inputs).mean(1)}


def _trained(model: nn.Module, x: Tensor, y: Tensor, loss_fn: Callable[..., Tensor]) -> Results:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    system = AutogradTrainingSystem(model, optimizer, loss_fn)
    rows = system.fit(DataLoader(TensorDataset(x, y), batch_size=32, shuffle=True), epochs=15)
    optimizer.zero_grad()
    loss_fn(model(x), y).backward()
    return {"model": model, "rows": rows, "complete": AutogradUtils.check_gradients_exist(model)}


def _influence(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Norms of gradients [outputs, samples, inputs], of outputs [:, i] by inputs [:, j]."""
    rows = [
        torch.autograd.grad(output.sum(), inputs, retain_graph=True)[0].norm(dim=-1)
        for output in outputs.unbind(1)
    ]
    return torch.stack(rows)
