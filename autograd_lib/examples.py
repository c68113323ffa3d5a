"""Demonstrations: every part of the library at work in a few lines, with results to look into.

Each prints what it shows and returns it. Models are small and the data are random. Every
demonstration starts from seed 0 and restores the caller's random states at its end.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call
from torch.utils.data import DataLoader, TensorDataset

from autograd_lib.benchmark import Comparison, compare
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
_Batch = tuple[Tensor, Tensor]
_Task = tuple[nn.Module, Tensor, Tensor, Callable[[Tensor, Tensor], Tensor]]


class AutogradExamples:
    """The basic demonstration: gradients read, a loss learned, a step watched, a model trained."""

    @staticmethod
    def demonstrate_autograd_system() -> Results:
        """Show each core part of the library on a problem with a known answer.

        Returns:
            A dict of dicts, one for each part:

            - `gradients`: a linear `model`, its `inputs` and `targets`, and what `AutogradUtils`
              says of the gradient of the mean squared error: `complete`, `norms`, `statistics`.
            - `loss`: `residuals`, `start` and `learned`, each `(alpha, beta)` of a
              `CustomLossFunction` that was fitted to them, and `values`, the loss before and after.
            - `monitor`: the `model`, the number of `hooks`, and `summary`, `history` and `issues`
              of a `GradientMonitor` over `losses`, one a step.
            - `function`: `input`, `weight`, `output` and `gradients` (of both, for the sum of the
              output) of `CustomAutogradFunction`, and `checked`: first and second derivatives
              agree with finite differences.
            - `training`: `losses` of the `system`, an `AutogradTrainingSystem`, over as many steps;
              `tower`, the derivatives of its loss up to the third; and for a `step` of that length
              down the gradient `predicted`, the loss by the Taylor polynomials of order 0 to 3,
              and `found`, the loss there.

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
            "monitor": _monitor(),
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
            [kind, _digits(found["factor"]), ", ".join(sorted({i.kind for i in found["issues"]}))]
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
        models = {
            "transformer": _train(_repeats, _of_tokens),
            "cnn": _train(_shapes, _of_rows),
            "rnn": _train(_echo, _of_steps),
        }
        rows = []
        for name, found in models.items():
            losses = [_digits(found["rows"][epoch]["loss"]) for epoch in (0, -1)]
            rows.append([name, *losses, str(found["complete"])])
        _show("Models, trained", ["", "first epoch", "last", "all gradients"], rows)
        return models


@contextmanager
def _reproducible() -> Iterator[None]:
    """Run on the CPU in float32 with gradients from seed 0, whatever the caller has set."""
    dtype = torch.get_default_dtype()
    with preserved_random_state(), torch.device("cpu"), torch.enable_grad():
        torch.manual_seed(0)
        torch.set_default_dtype(torch.float32)
        try:
            yield
        finally:
            torch.set_default_dtype(dtype)


def _show(title: str, header: Row, rows: Iterable[Row]) -> None:
    print(text_table(title, header, list(rows)), end="\n\n")


def _digits(value: float) -> str:
    return f"{value:.3g}"


# ---------------------------------------------------------------------------------- the basic ones


@_reproducible()
def _gradients() -> Results:
    model, inputs, targets = nn.Linear(10, 1), torch.randn(32, 10), torch.randn(32, 1)
    F.mse_loss(model(inputs), targets).backward()
    statistics = AutogradUtils.compute_gradient_statistics(model)
    complete = AutogradUtils.check_gradients_exist(model)
    print(f"Gradients: every parameter has one: {complete}\n{statistics}\n")
    return {
        "model": model,
        "inputs": inputs,
        "targets": targets,
        "complete": complete,
        "norms": AutogradUtils.get_gradient_norms(model),
        "statistics": statistics,
    }


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

    start, before = (loss_fn.alpha.item(), loss_fn.beta.item()), closure().item()
    optimizer.step(closure)
    learned, after = (loss_fn.alpha.item(), loss_fn.beta.item()), closure().item()
    rows = [
        ["start", *map(_digits, (*start, before))],
        ["learned", *map(_digits, (*learned, after))],
    ]
    _show("Loss: weights by maximum likelihood", ["", "alpha", "beta", "loss"], rows)
    return {"residuals": residuals, "start": start, "learned": learned, "values": (before, after)}


@_reproducible()
def _monitor() -> Results:
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 1))
    inputs = torch.randn(64, 8)
    targets = inputs.prod(dim=1, keepdim=True).sign()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    monitor = GradientMonitor(model, optimizer)
    hooks = monitor.register_hooks()
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    for hook in hooks:
        hook.remove()
    summary = monitor.get_gradient_summary()
    print(f"Monitor: by {len(hooks)} hooks, removed again\n{summary}\n")
    return {
        "model": model,
        "hooks": len(hooks),
        "losses": losses,
        "summary": summary,
        "history": monitor.history,
        "issues": monitor.issues,
    }


@_reproducible()
def _function() -> Results:
    input = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    output = CustomAutogradFunction.apply(input, weight)
    gradients = torch.autograd.grad(output.sum(), (input, weight))
    function = CustomAutogradFunction.apply
    checked = gradcheck(function, (input, weight)) and gradgradcheck(function, (input, weight))
    print(f"Function: first and second derivatives agree with finite differences: {checked}\n")
    return {
        "input": input.detach(),
        "weight": weight.detach(),
        "output": output.detach(),
        "gradients": gradients,
        "checked": checked,
    }


@_reproducible()
def _training() -> Results:
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 1))
    inputs = torch.linspace(-2, 2, 64)[:, None]
    targets = torch.sin(2 * inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    system = AutogradTrainingSystem(model, optimizer, F.mse_loss)
    losses = [system.train_step(inputs, targets).item() for _ in range(50)]
    tower = system.compute_higher_order_gradients(inputs, targets, order=3)
    step = 0.5
    terms = [value * (-step) ** k / math.factorial(k) for k, value in enumerate(tower.values)]
    predicted = torch.stack(terms).cumsum(0).tolist()
    there = {name: p - step * tower.direction[name] for name, p in model.named_parameters()}
    found = F.mse_loss(functional_call(model, there, (inputs,)), targets).item()
    rows = [[f"order {order}", _digits(value)] for order, value in enumerate(predicted)]
    title = f"Training: {len(losses)} steps from loss {_digits(losses[0])} to {_digits(losses[-1])}"
    title += f"\nThen {step} down the gradient, by Taylor polynomials"
    _show(title, ["", "loss"], [*rows, ["found", _digits(found)]])
    return {
        "system": system,
        "losses": losses,
        "tower": tower,
        "step": step,
        "predicted": predicted,
        "found": found,
    }


# ------------------------------------------------------------------------------ the advanced ones


class _Residual(nn.Sequential):
    """A branch added to its input, scaled so that the sum of `depth` branches has size 1."""

    def __init__(self, depth: int, *branch: nn.Module) -> None:
        super().__init__(*branch)
        self.scale = depth**-0.5

    def forward(self, input: Tensor) -> Tensor:
        return input + self.scale * super().forward(input)


def _layer(kind: str, depth: int, width: int) -> nn.Module:
    linear = nn.Linear(width, width)
    if kind == "vanishing":
        return nn.Sequential(linear, nn.Sigmoid())
    nn.init.kaiming_normal_(linear.weight)
    if kind == "residual":
        return _Residual(depth, linear, nn.ReLU())
    linear.weight.data *= 2
    return nn.Sequential(linear, nn.ReLU())


@_reproducible()
def _flow(kind: str, depth: int = 16, width: int = 32) -> Results:
    layers = [_layer(kind, depth, width) for _ in range(depth)]
    model = nn.Sequential(*layers, nn.Linear(width, 2))
    with GradientMonitor(model) as monitor:
        for _ in range(10):
            model.zero_grad()
            inputs = torch.randn(64, width)
            F.cross_entropy(model(inputs), (inputs[:, 0] > 0).long()).backward()
    history = monitor.history
    # A bias's gradient is that of the layer's output, summed over the batch. A weight's gradient
    # also contains the layer's input, which grows toward the output as the gradient shrinks.
    first, last = (history["names"].index(f"{layer}.0.bias") for layer in (0, depth - 1))
    ratio = np.median(history["norm"][:, first] / history["norm"][:, last]).item()
    factor = ratio ** (1 / (depth - 1))
    return {"history": history, "issues": monitor.issues, "factor": factor}


def _step(model: nn.Module, settings: Settings, inputs: Tensor, targets: Tensor) -> None:
    size = settings.micro_batch or len(inputs)
    for x, y in zip(inputs.split(size), targets.split(size), strict=True):
        _forward(model, settings, x, y).mul(len(x) / len(inputs)).backward()
    model.zero_grad()


def _forward(model: nn.Module, settings: Settings, x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=settings.precision == "bf16"):
        return F.mse_loss(model(x).float(), y)


@_reproducible()
def _performance(compile: bool) -> Results:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(32, 32), nn.GELU()) for _ in range(6)))
    batch = torch.randn(512, 32), torch.randn(512, 32)
    saved, comparison = _race(model, batch, compile)
    budget = comparison.peak_bytes["plain"] // 2
    plan = plan_checkpoints(model, partial(_forward, model, Settings(), *batch), budget)
    planned = plan.apply(copy.deepcopy(model))
    plan_peak = peak_bytes(partial(_step, planned, Settings(), *batch))
    print(f"{plan}\nmeasured {readable_bytes(plan_peak)}\n")
    tuning = autotune(model, batch, F.mse_loss, budget, tolerance=1e-4, compile=compile)
    count, best = len(tuning.trials), tuning.best
    print(f"The fastest of {count} candidates within {readable_bytes(budget)}: {best}\n")
    found = {"plan": plan, "plan_peak": plan_peak, "tuning": tuning}
    return {"saved": saved, "comparison": comparison, "budget": budget, **found}


def _race(model: nn.Sequential, batch: _Batch, compile: bool) -> tuple[dict[str, int], Comparison]:
    forms = {
        "plain": Settings(),
        "bf16": Settings("bf16"),
        "micro-batches": Settings(micro_batch=128),
        "recomputed": Settings(checkpoint={"": ["recompute"] * len(model)}),
    }
    if compile:
        forms["compiled"] = Settings(compile=True)
    steps, saved = {}, {}
    for name, settings in forms.items():
        copied = settings.apply(copy.deepcopy(model))
        steps[name] = partial(_step, copied, settings, *batch)
        steps[name]()  # the first call also allocates what later ones reuse
        size = settings.micro_batch or len(batch[0])
        with saved_tensors(copied) as kept:
            _forward(copied, settings, *(part[:size].clone() for part in batch))
        saved[name] = kept.total_bytes
    comparison = compare(steps, rounds=8)
    rows = []
    for name, ratio in comparison.ratios.items():
        sizes = (saved[name], comparison.peak_bytes[name])
        rows.append([name, *map(readable_bytes, sizes), str(ratio)])
    _show("One step, its time relative to plain", ["", "saved", "peak", "time"], rows)
    return saved, comparison


def _token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy from the third token on: the first three are random, the others repeat them."""
    return F.cross_entropy(logits[:, 2:].flatten(0, 1), targets[:, 2:].flatten())


def _repeats() -> _Task:
    tokens = torch.randint(16, (256, 3)).repeat(1, 4)
    model = CustomTransformerModel(vocab_size=16, d_model=32, num_layers=2, max_length=11)
    return model, tokens[:, :-1], tokens[:, 1:], _token_loss


def _shapes() -> _Task:
    plus = torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0]])
    cross = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 1.0]])
    # Four of each shape at each of the 6 x 6 places where it fits.
    images = 0.5 * torch.randn(6, 6, 2, 4, 1, 8, 8)
    for row, column in itertools.product(range(6), repeat=2):
        window = images[row, column, ..., row : row + 3, column : column + 3]
        window += 2 * torch.stack([plus, cross])[:, None, None]
    labels = torch.arange(2)[:, None].expand(6, 6, 2, 4)
    model = CustomCNNModel(input_channels=1, num_classes=2, channels=(8, 8, 16))
    return model, images.flatten(0, 3), labels.flatten(), F.cross_entropy


def _echo() -> _Task:
    inputs = torch.randn(256, 10, 1)
    targets = F.pad(inputs[:, :-2], (0, 0, 2, 0))
    return CustomRNNModel(input_size=1, hidden_size=32, output_size=1), inputs, targets, F.mse_loss


@_reproducible()
def _train(
    make: Callable[[], _Task], influence: Callable[[nn.Module, Tensor, Tensor], Tensor]
) -> Results:
    model, inputs, targets, loss_fn = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    system = AutogradTrainingSystem(model, optimizer, loss_fn)
    loader = DataLoader(TensorDataset(inputs, targets), batch_size=32, shuffle=True)
    rows = system.fit(loader, epochs=15)
    optimizer.zero_grad()
    loss_fn(model(inputs), targets).backward()
    return {
        "model": model,
        "rows": rows,
        "complete": AutogradUtils.check_gradients_exist(model),
        "influence": influence(model, inputs, targets),
    }


def _through_time(outputs: Tensor, inputs: Tensor) -> Tensor:
    """Mean norms of the gradient of each step of `outputs` with respect to each of `inputs`."""
    rows = [
        torch.autograd.grad(output.sum(), inputs, retain_graph=True)[0].norm(dim=-1).mean(0)
        for output in outputs.unbind(1)
    ]
    return torch.stack(rows)


def _of_tokens(model: nn.Module, tokens: Tensor, targets: Tensor) -> Tensor:
    embedded: list[Tensor] = []
    hook = model.get_submodule("embedding").register_forward_hook(
        lambda module, args, output: embedded.append(output)
    )
    logits = model(tokens).gather(2, targets[..., None])
    hook.remove()
    return _through_time(logits, embedded[0])


def _of_steps(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    inputs = inputs.clone().requires_grad_()
    return _through_time(model(inputs), inputs)


def _of_rows(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    images = images.clone().requires_grad_()
    logits = model(images)
    (gradient,) = torch.autograd.grad((logits[:, 0] - logits[:, 1]).sum(), images)
    # Images are ordered by the row of the shape.
    return gradient[:, 0].norm(dim=-1).view(6, -1, 8).mean(1)
