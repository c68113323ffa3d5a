"""Weights adapted to a task as a function of what they were adapted from, for meta-learning."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import Function
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from autograd_lib.applications.again import pulled_back
from autograd_lib.core.batches import call, described, own_loss, read_batch, targets_of
from autograd_lib.core.snapshot import ModuleState, own_generators, torch_generators
from autograd_lib.functions.forward_mode import transforming
from autograd_lib.functions.functions import safe_sqrt
from autograd_lib.functions.implicit import fixed_point
from autograd_lib.higher_order.inputs import dense, trainable
from autograd_lib.higher_order.operators import linearize_hvp
from autograd_lib.memory.saved import graph_of

__all__ = ["adapt", "implicit_adapt"]

_Loss = Callable[[Any, Any], Tensor]
_Tensors = Sequence[Tensor]


_STATES = {"sgd": 0, "momentum": 1, "adam": 2}  # how many tensors an optimizer keeps per weight


def _updated(
    optimizer: str, t: int, lr: Any, g: Tensor, w: Tensor, *state: Tensor
) -> tuple[Tensor, ...]:
    """Return a weight and its state after step t of `torch.optim` with its defaults."""
    if optimizer == "momentum":
        state = (0.9 * state[0] + g,)
        g = state[0]
    elif optimizer == "adam":
        mean, square = state = torch.lerp(state[0], g, 0.1), 0.999 * state[1] + 0.001 * g * g
        # The derivative of sqrt is inf where a gradient has always been 0: inf * 0 is NaN.
        root = safe_sqrt(square) / math.sqrt(1 - 0.999**t)
        g = mean / (1 - 0.9**t) / (root + 1e-8)
    return w - lr * g, *state


def adapt(
    model: nn.Module,
    loss_fn: _Loss | None,
    support: Any,
    steps: int,
    lr: float | Tensor | Mapping[str, float | Tensor] = 0.01,
    optimizer: Literal["sgd", "momentum", "adam"] = "sgd",
    order: Literal[1, 2] = 2,
    checkpoint: int | Literal["sqrt"] = 0,
    tasks: bool = False,
) -> dict[str, Tensor]:
    r"""Return the weights after some steps of an optimizer, as a function of those before.

    $w_{k+1} = w_k - \alpha \nabla L(w_k)$ from $w_0$, the model's parameters, with $L$ the loss on
    the support set (Finn, Abbeel & Levine 2017, "Model-agnostic meta-learning for fast adaptation
    of deep networks"). `backward` through the result gives the derivatives by $w_0$, by $\alpha$,
    which may be one number per weight (Li et al. 2017, "Meta-SGD"), and by the support set. Pass
    the result to `torch.func.functional_call` for the loss on other data of the task.

    Args:
        model: a module; its parameters that require a gradient are adapted, shared ones once under
            their first name, the others stay fixed. The model is left as it was: each step begins
            with its buffers and changes copies.
        loss_fn: `loss_fn(outputs, targets)` is the loss, a scalar; None for the model's own loss.
            Of a batch that is a mapping it is given all: `loss_fn(outputs, batch)`.
        support: a batch, that is a pair (inputs, targets) or a mapping of the model's arguments.
        steps: how many, at least 0.
        lr: the step length: a number, a floating-point tensor without dimensions, or a dict with
            one for each adapted parameter, where a tensor may have the shape of the parameter.
        optimizer: "sgd", "momentum" (0.9) or "adam", as in `torch.optim` with its defaults. The
            derivative of Adam's square root counts as 0 where a gradient has always been 0.
        order: 2 for the derivative of the steps; 1 for that in which each gradient counts as a
            constant, so that no graph of it is kept (FOMAML) and none leads to the support set.
        checkpoint: n keeps the weights of each n-th step only, and backward takes the steps
            between again, with the same random numbers, n at a time; "sqrt" takes the square root
            of `steps` for n and of those again one at a time, so that memory hardly grows with
            `steps`; 0 keeps all. With `order=1` there is nothing to save.
        tasks: whether all tensors of `support` have a leading dimension of tasks, each of which
            gets its own weights. A task's random numbers are its own, too.

    Returns:
        The weights by name, with a leading dimension of tasks if `tasks`. Under `torch.no_grad`
        they have no graph.

    Raises:
        ValueError: if `support` is no batch, or its tensors have no common dimension of tasks; if
            the loss is not a scalar, or does not depend on the weights; if an option is unknown;
            if no parameter requires a gradient; if, with `checkpoint`, model or `loss_fn` use
            another tensor that requires one, which would silently get none.
        NotImplementedError: with `checkpoint` under `torch.func` or in forward mode.
        RuntimeError: under `torch.inference_mode`.

    Example:
        >>> model, rate = nn.Linear(1, 1, bias=False), torch.tensor(0.1, requires_grad=True)
        >>> support = torch.ones(1, 1), torch.zeros(1, 1)  # the loss is w ** 2
        >>> w = adapt(model, nn.MSELoss(), support, 3, rate)["weight"]  # (1 - 2 rate) ** 3 w0
        >>> start, slope = torch.autograd.grad(w.sum(), [model.weight, rate])
        >>> round(start.item(), 4), round((slope / model.weight).item(), 4)
        (0.512, -3.84)
    """
    _check_options(steps, optimizer, order, checkpoint)
    objective = _Objective("adapt", model, loss_fn, support, tasks)
    weights = [objective.stacked(p) for p in objective.fast.values()]
    carry = [*weights, *(torch.zeros_like(w) for _ in range(_STATES[optimizer]) for w in weights)]
    given, unpack = _packed((_rates(lr, objective.fast), objective.data))
    loop = _Loop(objective, optimizer, order, len(carry), unpack)
    graph = order == 2 and torch.is_grad_enabled()
    lengths = (math.isqrt(max(steps - 1, 0)) + 1, 1) if checkpoint == "sqrt" else (checkpoint,)
    if graph and checkpoint:
        carry = loop.segments([*carry, *given], 0, steps, *lengths)
    else:
        carry = loop.run([*carry, *given], 0, steps, graph)
    return dict(zip(objective.fast, carry, strict=False))


def _check_options(steps: Any, optimizer: Any, order: Any, checkpoint: Any) -> None:
    def is_count(n: Any) -> bool:
        return type(n) is int and n >= 0

    for name, value, fits, expected in (
        ("steps", steps, is_count(steps), "an integer of at least 0"),
        ("optimizer", optimizer, optimizer in _STATES, "'sgd', 'momentum' or 'adam'"),
        ("order", order, order in (1, 2), "2, or 1 to take each gradient for a constant"),
        ("checkpoint", checkpoint, checkpoint == "sqrt" or is_count(checkpoint), "'sqrt' or a "
         "number of steps, which backward takes again at a time, or 0"),
    ):  # fmt: skip
        if not fits:
            raise ValueError(f"adapt: expected {name} to be {expected}, got {value!r}")
    if checkpoint and transforming():
        raise NotImplementedError(
            "adapt: expected checkpoint=0 inside torch.func transforms and forward mode, which "
            f"keep what they need themselves, got {checkpoint!r}; take backward() or "
            "torch.autograd.grad outside of them"
        )


def _rates(lr: Any, fast: Mapping[str, Tensor]) -> list[Any]:
    """One step length for all weights, or one for each."""
    if isinstance(lr, Mapping) and lr.keys() != fast.keys():
        raise ValueError(
            "adapt: expected lr to have exactly the names of the parameters that require a "
            f"gradient, got {sorted(lr)} for {sorted(fast)}"
        )
    for name, rate in lr.items() if isinstance(lr, Mapping) else [("", lr)]:
        shapes = [(), *([tuple(fast[name].shape)] if name else [])]
        real = isinstance(rate, Tensor) and rate.is_floating_point()
        if not (tuple(rate.shape) in shapes if real else isinstance(rate, (int, float))):
            came = f"{rate.dtype} {described(rate)}" if isinstance(rate, Tensor) else repr(rate)
            raise ValueError(
                f"adapt: expected lr{name and f'[{name!r}]'} to be a number or a floating-point "
                f"tensor of shape {' or '.join(map(str, shapes))}, got {came}; convert it, or give "
                "a dict, by name, for step lengths that differ"
            )
    return [lr[name] for name in fast] if isinstance(lr, Mapping) else [lr]


class _Objective:
    """The loss of a support set as a function of the weights and of all else it depends on."""

    def __init__(
        self, operation: str, model: nn.Module, loss_fn: _Loss | None, support: Any, tasks: bool
    ) -> None:
        names, batch = trainable(operation, model), read_batch(operation, support)
        self.operation, self.model, self.loss_fn = operation, model, loss_fn
        self.fast = {k: p for k, p in model.named_parameters() if k in names}
        frozen: dict[str, Tensor] = {k: p for k, p in model.named_parameters() if k not in names}
        self.data = batch, frozen  # what `__call__` is given, besides the weights
        self.tasks = self._count(batch) if tasks else None
        # The model's own may change before backward takes steps again.
        self.buffers = {k: b.clone() for k, b in model.named_buffers()}
        self.scene = _Scene(model, next(iter(self.fast.values())).device.type)

    def _count(self, batch: Any) -> int:
        shapes = [tuple(t.shape) for t in tree_leaves(batch) if isinstance(t, Tensor)]
        if len({shape[:1] for shape in shapes}) != 1 or not shapes[0]:
            raise ValueError(
                f"{self.operation}: with tasks=True, expected tensors whose first dimension is the "
                f"tasks, got shapes {shapes}; stack those of all tasks, as by torch.stack"
            )
        return shapes[0][0]

    def stacked(self, t: Tensor) -> Tensor:
        return t.view_as(t) if self.tasks is None else t.expand(self.tasks, *t.shape)

    def __call__(self, weights: _Tensors, data: tuple[Any, dict[str, Tensor]]) -> Tensor:
        """Return the loss, or the sum of the losses of all tasks."""
        batch, frozen = data

        def loss(weights: _Tensors, buffers: dict[str, Tensor], batch: Any) -> Tensor:
            state = dict(zip(self.fast, weights, strict=True)) | frozen | buffers
            run = partial(functional_call, self.model, state)
            output = call(lambda *args, **options: run(args, options), batch)
            if self.loss_fn is None:
                return own_loss(self.operation, output, batch)
            value = self.loss_fn(output, targets_of(batch))
            if not isinstance(value, Tensor) or value.ndim:
                raise ValueError(
                    f"{self.operation}: expected loss_fn to return a scalar tensor, got "
                    f"{described(value)}; reduce it, as by .mean()"
                )
            return value

        buffers = {k: self.stacked(b).clone() for k, b in self.buffers.items()}
        if self.tasks is None:
            return loss(weights, buffers, batch)
        axes = tree_map(lambda leaf: 0 if isinstance(leaf, Tensor) else None, batch)
        losses = torch.vmap(loss, (0, 0, axes), randomness="different")
        return losses(list(weights), buffers, batch).sum()


class _Scene:
    """Random states, training modes and autocast as they are now, under which to run again."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.model, self.device = model, device
        own = [generator for module in model.modules() for generator in own_generators(module)]
        self.random = ModuleState((), generators=[*torch_generators(), *own])
        self.modes = [(module, module.training) for module in model.modules()]
        kind, enabled = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        # The cache would keep a copy of the weights of each step until autocast ends.
        self.autocast = partial(torch.autocast, device, kind, enabled, cache_enabled=False)

    def set(self) -> None:
        self.random.restore()
        for module, training in self.modes:
            module.training = training

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        now = _Scene(self.model, self.device)
        self.set()
        try:
            with self.autocast():
                yield
        finally:
            now.set()


def _packed(values: Any) -> tuple[list[Tensor], Callable[[_Tensors], Any]]:
    """Return the tensors in a tree, and a function that puts others in their places."""
    leaves, spec = tree_flatten(values)
    others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]

    def unpack(tensors: _Tensors) -> Any:
        left = iter(tensors)
        return tree_unflatten([next(left) if o is None else o[0] for o in others], spec)

    return [leaf for leaf in leaves if isinstance(leaf, Tensor)], unpack


@dataclass(frozen=True)
class _Loop:
    """Steps of an optimizer as a function of all tensors that they depend on."""

    objective: _Objective
    optimizer: str
    order: int
    carried: int  # how many tensors go from step to step
    unpack: Callable[[_Tensors], Any]

    def run(
        self, tensors: _Tensors, start: int, count: int, graph: bool, alone: bool = False
    ) -> list[Tensor]:
        """Take steps; `alone` raises where the loss depends on more than `tensors`."""
        carry, (rates, data) = list(tensors[: self.carried]), self.unpack(tensors[self.carried :])
        n = len(self.objective.fast)
        for step in range(start, start + count):
            columns = [carry[i : i + n] for i in range(0, self.carried, n)]
            slopes = self.gradients(columns[0], data, graph, alone and step == start)
            new = map(partial(_updated, self.optimizer, step + 1), cycle(rates), slopes, *columns)
            carry = [t for column in zip(*new, strict=True) for t in column]
        return carry

    def segments(self, tensors: _Tensors, start: int, count: int, *lengths: int) -> list[Tensor]:
        """Take steps, of which backward takes `lengths[0]` again at a time, and so on inwards."""
        if not lengths:
            return self.run(tensors, start, count, True)
        carry, given = tensors[: self.carried], tensors[self.carried :]
        for at in range(start, start + count, lengths[0]):
            part = at, min(lengths[0], start + count - at), *lengths[1:]
            carry = _Segment.apply(self, part, *carry, *given)
        return list(carry)

    def gradients(self, weights: _Tensors, data: Any, graph: bool, alone: bool) -> _Tensors:
        # The other attentions have no second derivative.
        attention = sdpa_kernel(SDPBackend.MATH) if self.order == 2 else contextlib.nullcontext()
        with torch.enable_grad(), attention, self.objective.scene.autocast():
            if transforming():
                slopes = torch.func.grad(self.objective)(list(weights), data)
                return slopes if self.order == 2 else [g.detach() for g in slopes]
            at = weights if graph else [w.detach().requires_grad_() for w in weights]
            loss = self.objective(at, data)
            if not loss.requires_grad:
                raise ValueError(
                    "adapt: expected a loss that depends on the parameters, got one without a "
                    "graph; compute it from the model's outputs, without detach() and no_grad"
                )
            if alone:
                _check_alone(loss, at)
            slopes = torch.autograd.grad(loss, at, create_graph=graph, materialize_grads=True)
            return [dense(g) for g in slopes]


def _check_alone(loss: Tensor, weights: _Tensors) -> None:
    for node in graph_of(loss):
        leaf = getattr(node, "variable", None)
        if leaf is not None and not any(leaf is w for w in weights):
            raise ValueError(
                "adapt: with checkpoint, expected the loss to depend on no tensor that requires a "
                "gradient besides the parameters and the support set, for it would silently get "
                f"none, got one of {described(leaf)}; put it into support, as one of its targets, "
                "or use checkpoint=0"
            )


class _Segment(Function):
    """Steps of a loop that keep nothing but their inputs: backward takes them again."""

    @staticmethod
    def forward(
        ctx: Any, loop: _Loop, steps: tuple[int, ...], *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        scene = loop.objective.scene
        ctx.loop, ctx.steps, ctx.scene = loop, steps, _Scene(scene.model, scene.device)
        start, count, *_ = steps
        return tuple(loop.run([t.detach() for t in tensors], start, count, False, start == 0))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        def run(*tensors: Tensor) -> list[Tensor]:
            with ctx.scene.again():
                return ctx.loop.segments(tensors, *ctx.steps)

        return None, None, *pulled_back(run, ctx.saved_tensors, grads)


def implicit_adapt(
    model: nn.Module,
    loss_fn: _Loss | None,
    support: Any,
    strength: float | Tensor,
    tol: float = 1e-6,
) -> dict[str, Tensor]:
    r"""Return the weights that minimize a loss near the parameters, as a function of those.

    $w^*(w_0) = \arg\min_w L(w) + \frac{\lambda}{2} \|w - w_0\|^2$ with $L$ the loss on the support
    set (Rajeswaran et al. 2019, "Meta-learning with implicit gradients"). The derivative is that
    of the minimum by the implicit function theorem, $(I + \nabla^2 L(w^*) / \lambda)^{-1}$ by
    $w_0$: it depends on no step that led there, and memory does not grow with their number. It
    stands on `fixed_point` of one step of gradient descent.

    Args:
        model: as for `adapt`. Where it is random, all of this call uses the same random numbers.
        loss_fn: as for `adapt`.
        support: as for `adapt`; it gets a derivative, too.
        strength: $\lambda$, a positive number or a tensor without dimensions, which gets a
            derivative. From the curvature of the loss downwards the problem gets hard, and below
            its negative curvature there is no minimum.
        tol: the length of the last step of gradient descent, relative to $1 + \|w\|$; in backward
            relative to the gradient's size.

    Returns:
        The weights by name.

    Raises:
        ValueError: as for `adapt`, and if `strength` is not positive.
        RuntimeError: if no minimum is found, or, in backward, no derivative.
        NotImplementedError: under `torch.func` or in forward mode.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> support = torch.ones(1, 1), torch.full((1, 1), 3.0)  # the loss is (w - 3) ** 2
        >>> w = implicit_adapt(model, nn.MSELoss(), support, 2.0)["weight"]  # (w0 + 3) / 2
        >>> w.sum().backward()
        >>> round((2 * w - model.weight).item(), 4), round(model.weight.grad.item(), 4)
        (3.0, 0.5)
    """
    if transforming():
        raise NotImplementedError(
            "implicit_adapt: expected to be called outside torch.func transforms and forward mode, "
            "which would differentiate the search itself; use backward() or torch.autograd.grad"
        )
    size = float(strength.detach() if isinstance(strength, Tensor) else strength)
    if not size > 0:
        raise ValueError(
            f"implicit_adapt: expected strength to be positive, got {size}; it is the weight of "
            "the squared distance from the parameters"
        )
    objective = _Objective("implicit_adapt", model, loss_fn, support, tasks=False)
    parameters = list(objective.fast.values())
    given, unpack = _packed((strength, objective.data))
    w0 = torch.cat([p.reshape(-1) for p in parameters])

    def split(w: Tensor) -> list[Tensor]:
        parts = zip(w.split([p.numel() for p in parameters]), parameters, strict=True)
        return [t.reshape(p.shape).to(p.dtype) for t, p in parts]

    def loss(w: Tensor, w0: Tensor, *tensors: Tensor) -> Tensor:
        strength, data = unpack(tensors)
        with sdpa_kernel(SDPBackend.MATH):
            return objective(split(w), data) + strength / 2 * (w - w0).square().sum()

    def step(w: Tensor, *tensors: Tensor) -> Tensor:
        with objective.scene.again():
            return w - torch.func.grad(loss)(w, *tensors) / curvature

    def value(w: Tensor) -> Tensor:
        with objective.scene.again():
            return loss(w, w0.detach(), *(t.detach() for t in given))

    objective(parameters, objective.data)  # draws random numbers, which all else repeats
    start = _minimized(value, w0.detach(), tol)
    curvature, lowest = _curvature(value, start), value(start)
    message = (
        f"implicit_adapt: expected a minimum near the parameters, found none with strength {size:g}"
        "; raise strength, or tol"
    )
    try:
        w = fixed_point(step, start, w0, *given, tol=tol, max_iter=1000)
    except RuntimeError as error:
        raise RuntimeError(message) from error
    if value(w.detach()) > lowest + tol * (1 + lowest.abs()):  # a maximum
        raise RuntimeError(message)
    return dict(zip(objective.fast, split(w), strict=True))


def _minimized(value: Callable[[Tensor], Tensor], w: Tensor, tol: float) -> Tensor:
    w = w.clone().requires_grad_()
    stops: dict[str, Any] = {"tolerance_grad": tol, "tolerance_change": tol / 100, "max_iter": 1000}
    optimizer = torch.optim.LBFGS([w], line_search_fn="strong_wolfe", **stops)

    @torch.enable_grad()
    def closure() -> Tensor:
        y = value(w)
        (w.grad,) = torch.autograd.grad(y, w, materialize_grads=True)
        return y

    optimizer.step(closure)
    return w.detach()


def _curvature(value: Callable[[Tensor], Tensor], w: Tensor) -> float:
    """The largest curvature in magnitude, nearly, by power iteration."""
    product, size = linearize_hvp(value, w), 1.0
    v = torch.randn(w.shape, generator=torch.Generator().manual_seed(0)).to(w)
    for _ in range(8):
        v = product(v / torch.linalg.vector_norm(v))
        size = torch.linalg.vector_norm(v).item()
    return size
