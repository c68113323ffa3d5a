"""Which parameters a monitor watches: those that a model, and an optimizer, have at the moment."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from operator import itemgetter
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from autograd_lib.core.names import parameters_by_name
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
        self._seen: tuple[list[int], Any] = ([], None)
        self._find(model)

    def parameters(self, *, thorough: bool = False) -> tuple[list[nn.Parameter], bool]:
        """What is watched now, nothing if the model is gone; and whether that is something else.

        Args:
            thorough: Whether to look through the model too, for what it has replaced; without an
                optimizer that is done in any case.

        Raises:
            ValueError: The optimizer holds parameters that the model has replaced, or none of it.
        """
        model = self._model()
        if model is None:
            return [], False
        before, (ids, structure) = self._ids, self._seen
        optimizer = self._optimizer()
        found = self._candidates(optimizer)
        if [*map(id, found)] != ids or (
            (thorough or optimizer is None) and self._structure() != structure
        ):
            found = self._find(model)
        return [*self._pick(found)][:-1], self._ids is not before

    def _candidates(self, optimizer: Optimizer | None) -> list[Any]:
        """What the optimizer holds, or all parameters of the known modules."""
        found: list[Any] = [_GONE]
        if optimizer is None:
            for ref in self._modules:
                if (module := ref()) is not None:
                    found.extend(module._parameters.values())
        else:
            for group in optimizer.param_groups:
                found.extend(group["params"])
        return found

    def _structure(self) -> tuple[list[int], list[int]]:
        """The ids of the known modules' children and parameters: all that names depend on."""
        children: list[Any] = []
        parameters: list[Any] = []
        for ref in self._modules:
            module = ref()
            children.extend([None] if module is None else module._modules.values())
            parameters.extend([] if module is None else module._parameters.values())
        return [*map(id, children)], [*map(id, parameters)]

    def _find(self, model: nn.Module) -> list[Any]:
        """Find modules, names and places anew; nothing is changed by an error."""
        before, self._modules = self._modules, [*map(weakref.ref, model.modules())]
        found = self._candidates(self._optimizer())
        places = {id(parameter): place for place, parameter in enumerate(found)}
        named = {name: id(parameter) for name, parameter in parameters_by_name(model).items()}
        try:
            named |= self._replaced(named, found, places)
        except ValueError:
            self._modules = before
            raise
        ids = {name: number for name, number in named.items() if number in places}
        if ids != self._ids:
            self._ids = ids
            self.names = [*ids, *(name for name in self.names if name not in ids)]
            self.owners = _owners(self.names, named)
        self._pick = itemgetter(*(places[ids.get(n, id(_GONE))] for n in self.names), 0)
        self._seen = [*map(id, found)], self._structure()
        return found

    def _replaced(
        self, named: dict[str, int], found: list[Any], places: dict[int, int]
    ) -> dict[str, int]:
        """The parameters that the model has replaced for a while, as `fully_shard` does."""
        replaced = {
            name: number
            for name, number in self._ids.items()
            if number in places and named.get(name, number) != number and named[name] not in places
        }
        lost = [name for name, i in replaced.items() if not is_distributed(found[places[i]])]
        if lost:
            raise ValueError(
                f"GradientMonitor: the model has replaced its parameters {lost}, and the "
                "optimizer still holds the old ones, so that it trains nothing; put the new ones "
                "into optimizer.param_groups, or make a new optimizer and a monitor of it"
            )
        if places.keys().isdisjoint({**named, **replaced}.values()):
            raise ValueError(
                "GradientMonitor: expected an optimizer of parameters of the model, got one that "
                "holds none of them; make the optimizer of model.parameters(), after anything "
                "that replaces parameters, or pass the model that it trains"
            )
        return replaced


def _owners(names: Iterable[str], everything: Iterable[str]) -> list[str | None]:
    partly = {name.rpartition(".")[0] for name in {*everything}.difference(names)}
    owners = (name.rpartition(".")[0] for name in names)
    return [None if owner in partly else owner for owner in owners]
