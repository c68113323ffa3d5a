"""Statistics of the outputs of modules, step by step."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autograd_lib.core.reduction import Reduction, home
from autograd_lib.core.rows import merge


class Activations:
    """Collects statistics of the outputs of modules within a step."""

    def __init__(self, model: nn.Module, which: bool | Sequence[str]) -> None:
        modules = dict(model.named_modules())
        leaves = [name for name, module in modules.items() if not any(module.children())]
        self.names = leaves if which is True else list(which or ())
        if unknown := [name for name in self.names if name not in modules]:
            raise ValueError(
                f"GradientMonitor: activations names {unknown}, which are no modules of the model; "
                "take names from model.named_modules()"
            )
        self._found: list[Tensor | None] = [None] * len(self.names)
        self._unseen = [0] * len(self.names)  # calls without gradients
        self._plans: dict[tuple[Any, ...], Reduction] = {}

    def note(self, place: int, output: Any) -> None:
        """Reduce the output of the module at position `place` of `names`."""
        # Checkpointing calls modules again within backward, to compute what it did not keep. Its
        # reentrant form made the first call without gradients, as evaluation does.
        if torch._C._current_autograd_node() is not None:
            if not self._unseen[place]:
                return
            self._unseen[place] -= 1
        elif not torch.is_grad_enabled():
            self._unseen[place] += 1
            return
        outputs = [
            x for x in tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point()
        ]
        if not outputs:
            return
        values = outputs[0].detach()
        key = values.shape, values.stride(), values.dtype, values.device
        if key not in self._plans:
            self._plans[key] = Reduction([values], [values])
        fields = self._plans[key]([values], counts=True)
        before = self._found[place]
        self._found[place] = (
            fields if before is None else merge(torch.stack([before, fields], dim=-1))
        )

    def take(self) -> Tensor | None:
        """Statistics of all calls since the last time, [fields, modules]; None without calls."""
        found = [fields for fields in self._found if fields is not None]
        self._unseen = [0] * len(self.names)
        if not found:
            return None
        nothing = torch.full_like(found[0], torch.nan)
        device = home(found)
        columns = [(nothing if x is None else x).to(device) for x in self._found]
        self._found = [None] * len(self.names)
        return torch.cat(columns, dim=1)


class ActivationHook:
    """The forward hook of the module at a place of `names`; in a copy of the model it is inert."""

    def __init__(self, activations: Activations | None, place: int) -> None:
        self._activations = None if activations is None else weakref.ref(activations)
        self._place = place

    def __call__(self, module: nn.Module, _: Any, output: Any) -> None:
        """Note what the module put out."""
        if torch.compiler.is_compiling() or self._activations is None or not module.training:
            return
        if (activations := self._activations()) is not None:
            activations.note(self._place, output)

    def __reduce__(self) -> tuple[Any, ...]:
        return ActivationHook, (None, self._place)
