"""Which parameters a monitor watches: those that a model, and an optimizer, have at the moment."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from autograd_lib.core.shards import is_distributed
from autograd_lib.monitor.hooks import weak

# Stands for a parameter that was watched once and no longer is: it never has a gradient.
_GONE = nn.Parameter(torch.empty(0), requires_grad=False)


class Watched:
    """The parameters of a model that an optimizer holds, or all of them, in the order of `names`.

    They are found anew at each step, through weak references to modules. A weak reference to a
    parameter would forbid `torch.utils.swap_tensors`, and with it `model.to()` of tensor
    subclasses, and a strong one would keep it alive.

    Attributes:
        names: Of the parameters; those that are no longer watched stand behind the others.
        owners: For each the qualified name of its module, None where the module has further
            parameters that are not watched.
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer | None) -> None:
        self._model, self._optimizer = weakref.ref(model), weak(optimizer)
        self.names: list[str] = []
        self.owners: list[str | None] = []
        self._ids: dict[str, int] = {}  # of what is watched; an id is compared, never looked up
        self._modules: list[weakref.ref[nn.Module]] = []
        self._state: Any = None
        self._find(model)

    def parameters(self) -> tuple[list[nn.Parameter], bool]:
        """What is watched now, nothing if the model is gone; and whether that is something else.

        Raises:
            ValueError: The optimizer holds parameters that the model has replaced, or none of it.
        """
        model = self._model()
        if model is None:
            return [], False
        found, state = self._scan()
        before = self._ids
        if state != self._state:
            found = self._find(model)
        return [*self._pick(found)][:-1], self._ids is not before

    def _scan(self) -> tuple[list[Any], Any]:
        """All parameters of the known modules and the optimizer, and what `_find` depends on.

        Ids do for that: the places of what is watched depend on nothing else.
        """
        children: list[Any] = []
        found: list[Any] = [_GONE]
        for ref in self._modules:
            if (module := ref()) is None:
                children.append(None)
            else:
                children.extend(module._modules.values())
                found.extend(module._parameters.values())
        optimizer, owned = self._optimizer(), len(found)
        for group in [] if optimizer is None else optimizer.param_groups:
            found.extend(group["params"])
        return found, ([*map(id, children)], [*map(id, found)], owned)

    def _find(self, model: nn.Module) -> list[Any]:
        """Find modules, names and places anew; nothing is changed by an error."""
        before, self._modules = self._modules, [*map(weakref.ref, model.modules())]
        found, state = self._scan()
        named = {name: id(parameter) for name, parameter in model.named_parameters()}
        wanted = {*(named.values() if self._optimizer() is None else state[1][state[2] :])}
        places = {number: place for place, number in enumerate(state[1])}
        try:
            named |= self._replaced(named, wanted, found, places)
        except ValueError:
            self._modules = before
            raise
        ids = {name: number for name, number in named.items() if number in wanted}
        if ids != self._ids:
            self._ids = ids
            self.names = [*ids, *(name for name in self.names if name not in ids)]
            self.owners = _owners(self.names, named)
        self._pick = itemgetter(*(places[ids.get(n, id(_GONE))] for n in self.names), 0)
        self._state = state
        return found

    def _replaced(
        self, named: dict[str, int], held: set[int], found: list[Any], places: dict[int, int]
    ) -> dict[str, int]:
        """The parameters that the model has replaced for a while, as `fully_shard` does."""
        replaced = {
            name: number
            for name, number in self._ids.items()
            if number in held and named.get(name, number) != number and named[name] not in held
        }
        lost = [name for name, i in replaced.items() if not is_distributed(found[places[i]])]
        if lost:
            raise ValueError(
                f"GradientMonitor: the model has replaced its parameters {lost}, and the "
                "optimizer still holds the old ones, so that it trains nothing; put the new ones "
                "into optimizer.param_groups, or make a new optimizer and a monitor of it"
            )
        if held.isdisjoint({**named, **replaced}.values()):
            raise ValueError(
                "GradientMonitor: expected an optimizer of parameters of the model, got one that "
                "holds none of them; make the optimizer of model.parameters(), and after what "
                "replaces them, or pass the model that it trains"
            )
        return replaced


def _owners(names: Iterable[str], everything: Iterable[str]) -> list[str | None]:
    partly = {name.rpartition(".")[0] for name in {*everything}.difference(names)}
    owners = (name.rpartition(".")[0] for name in names)
    return [None if owner in partly else owner for owner in owners]
