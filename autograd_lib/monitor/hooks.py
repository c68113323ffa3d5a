"""Hooks on an optimizer, a scaler and parameters, which keep none of them alive."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from types import MethodType
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import Variable
from torch.optim import Optimizer

_T = TypeVar("_T")


class Handle(Protocol):
    """What removes a hook."""

    def remove(self) -> None:
        """Remove the hook."""


def weak(thing: _T | None) -> Callable[[], _T | None]:
    """A weak reference; to nothing if there is nothing."""
    return (lambda: None) if thing is None else weakref.ref(thing)


def calling(owner: object, method: str) -> Callable[..., None]:
    """A function that calls a method of `owner` as long as there is one."""
    ref = weakref.ref(owner)

    def hook(*args: Any) -> None:
        if (alive := ref()) is not None:
            getattr(alive, method)(*args)

    return hook


def hooked(parameter: nn.Parameter, hook: Callable[[Tensor], None]) -> Handle:
    """Register the hook, on a frozen parameter too: it may require a gradient later."""
    wanted = parameter.requires_grad
    handle = parameter.requires_grad_(True).register_post_accumulate_grad_hook(hook)
    parameter.requires_grad_(wanted)
    return handle


def remove_all(handles: Sequence[Handle]) -> None:
    """Remove every hook."""
    for handle in handles:
        handle.remove()


class ScalerHook:
    """Wraps `scaler.step` and tells the monitor which steps the scaler skipped."""

    def __init__(self, scaler: torch.amp.GradScaler, monitor: Any) -> None:
        ref = weakref.ref(monitor)
        around: Any = vars(scaler).get("step")

        def step(self: Any, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
            alive = None if hook._removed else ref()
            if alive is not None and not alive._has(optimizer):
                alive = None
            before = alive._taken if alive is not None else 0
            # Of a copied scaler `around` is still the original's.
            function = type(self).step if around is None else getattr(around, "__func__", None)
            call = around if function is None else MethodType(function, self)
            result = call(optimizer, *args, **kwargs)
            if alive is not None and alive._taken == before:
                alive.look(skipped=True)
            return result

        hook, self._removed = self, False
        vars(step)["hook"] = self
        self._scaler, self._around = weakref.ref(scaler), around
        # Bound, it is pickled and copied with the scaler as the method of that name.
        scaler.step = MethodType(step, scaler)  # type: ignore[method-assign]

    def remove(self) -> None:
        """Remove the hook, now or together with the one that wraps it."""
        self._removed = True
        scaler = self._scaler()
        while scaler is not None:
            hook = getattr(vars(scaler).get("step"), "hook", None)
            if not isinstance(hook, ScalerHook) or not hook._removed:
                return
            if hook._around is None:
                del scaler.step
            else:
                scaler.step = hook._around  # type: ignore[method-assign]


class EndOfBackward:
    """Calls back once at the end of each backward that reaches a parameter, the outermost one."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self._callback = callback
        self._backwards: set[int] = set()  # the graph tasks whose end is waited for
        self.reached: set[int] = set()  # ids of what a gradient has come to in the last one
        self._within: list[Handle] = []  # on nodes that ran a backward of their own

    def gradient_is_there(self, *reached: Any) -> None:
        """At the first gradient of a backward, ask for a call at its end."""
        task = torch._C._current_graph_task_id()
        if task not in self._backwards:
            self._backwards.add(task)
            self.reached = set()
            Variable._execution_engine.queue_callback(calling(self, "_end"))
        self.reached.update(map(id, reached))

    def _end(self) -> None:
        node = torch._C._current_autograd_node()
        if node is None:
            # Last of all: DistributedDataParallel finishes its reduction in such a call too.
            Variable._execution_engine.queue_callback(calling(self, "_outermost_end"))
        else:  # Nested backward, as in reentrant checkpointing: wait for the outer one.
            self._within.append(node.register_hook(calling(self, "gradient_is_there")))

    def _outermost_end(self) -> None:
        self._backwards.clear()
        remove_all(self._within)
        self._within = []
        self._callback()


def has_closure(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether `optimizer.step` was called with a closure, which computes the gradients within."""
    return any(map(callable, args[1:])) or kwargs.get("closure") is not None
