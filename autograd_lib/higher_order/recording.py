"""Recorded operations, which are extended to the next Taylor coefficient of all their values.

A function runs once, and the operations that reach PyTorch's dispatcher are recorded. A linear
operation is called again on the next coefficient, a product is one convolution sum, an elementary
function follows from its derivative (`recurrences` holds these rules).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

Values = list[list[Tensor]]  # by slot the coefficients so far; of a constant one
Compute = Callable[[Values, int], Any]  # the coefficient of an order, or several

_TO_PYTHON = {Tensor.tolist, Tensor.numpy, Tensor.__array__}
_FROM_LISTS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}
# The places of numbers that are added, and so have no part in higher orders.
_ADDENDS = {
    **dict.fromkeys(["add", "sub", "rsub"], (0, 1)),
    **dict.fromkeys(["masked_fill", "constant_pad_nd"], (2,)),
    "fill": (1,),
    "scatter": (3,),
    "where": (1, 2),
}


def tensors_in(values: Any) -> list[Tensor]:
    """The tensors among arguments, in lists and dicts too; faster than PyTorch's trees."""
    found: list[Tensor] = []
    for x in values.values() if isinstance(values, dict) else values:
        if isinstance(x, Tensor):
            found.append(x)
        elif isinstance(x, tuple | list | dict):
            found += tensors_in(x)
    return found


def differentiable(x: Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _like(x: Tensor, y: Tensor) -> bool:
    return x.shape == y.shape and x.dtype == y.dtype


def _sample(x: Tensor) -> Tensor:
    """Return a tensor without the transforms of torch.func: of a batch its first element."""
    dims = []
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        dims.append(torch._C._functorch.maybe_get_bdim(x))
        x = torch._C._functorch.get_unwrapped(x)
    for dim in reversed(dims):
        x = x.select(dim, 0) if dim >= 0 else x
    return x.detach()


class MutationError(NotImplementedError):
    """An operation in place, which must be recorded in its functional form."""


def no_rule(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"taylor_solution: {name} has no rule; rewrite it by other functions, or register the "
        "derivative of an elementary function with @jet_rule(function, derivative=True)"
    )


def _converted(name: str) -> NotImplementedError:
    return NotImplementedError(
        f"taylor_solution: {name} converts a value that depends on the arguments of f to Python, "
        "where it is lost to a record; use torch.where for a branch, torch.stack for a list"
    )


class _At(NamedTuple):
    """Stands for a recorded value among arguments."""

    slot: int
    use: str  # "order": its coefficient; "value": the first one; "addend": zero at higher orders

    def get(self, values: Values, n: int) -> Tensor:
        found = values[self.slot]
        if self.use == "addend" and n:
            return torch.zeros_like(found[0])
        return found[n if self.use == "order" else 0]


def _filled(template: list[Any], values: Values, n: int) -> list[Any]:
    """The arguments of an operation at order n."""
    return [
        x.get(values, n) if type(x) is _At else _filled(x, values, n) if type(x) is list else x
        for x in template
    ]


class Recorder(TorchDispatchMode):
    """Records operations; those that depend on the first two values entered are followed.

    Attributes:
        program: what appends the results of each operation at order 0 to the values.
        later: what does so at any order, of the operations that are followed.
        outside: the tensors that are neither entered nor results, by slot.
    """

    def __init__(self, rule_of: Callable[[Any], Any]) -> None:
        super().__init__()
        self.rule_of = rule_of
        self.program: list[Compute] = []
        self.later: list[Compute] = []
        self.outside: dict[int, Tensor] = {}
        self.kept: list[Tensor] = []  # alive, so that no other tensor takes the id
        self.slots: dict[int, int] = {}  # by the id of a tensor
        self.size = 0
        self.followed = {0, 1}
        self.derived: set[int] = set()  # what depends on arguments, and not on the outside alone
        self.known: dict[Any, Tensor] = {}  # results of elementary functions

    def enter_samples(self, values: Any) -> Any:
        """Enter the tensors among the arguments, as they look inside transforms of torch.func."""
        samples = tree_map(lambda x: _sample(x) if isinstance(x, Tensor) else x, values)
        self.derived.update(self.enter(x) for x in tensors_in(samples))
        return samples

    def enter(self, x: Tensor, slot: int | None = None) -> int:
        if slot is None:
            slot, self.size = self.size, self.size + 1
        self.kept.append(x)
        self.slots[id(x)] = slot
        return slot

    def slot(self, x: Tensor) -> int:
        found = self.slots.get(id(x))
        if found is None:
            found = self.enter(x)
            self.outside[found] = x
        return found

    def follows(self, x: Any) -> bool:
        return isinstance(x, Tensor) and self.slot(x) in self.followed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = func._overloadpacket.__name__, kwargs or {}
        if name in ("squeeze_", "unsqueeze_", "t_", "transpose_"):  # no memory is written to
            packet = getattr(torch.ops.aten, name[:-1])
            result = self.__torch_dispatch__(getattr(packet, func._overloadname), types, args)
            self.enter(func(*args), self.slot(result))
            return args[0]
        if func._schema.is_mutable:
            raise MutationError(
                f"taylor_solution: {name} writes in place where PyTorch cannot do without; rewrite "
                "it by functions that return new tensors"
            )
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise no_rule(f"{name}, which is random,")
        inputs = tensors_in(args)
        if func.namespace == "prim" or not inputs:  # prim: device, layout
            return func(*args, **kwargs)
        if tensors_in(kwargs):
            raise no_rule(name)
        if not any([self.follows(x) for x in inputs]):  # noqa: C419 - each gets a slot
            return self.constant(func, args, kwargs)
        return self.rule_of(func)(self, func, args, kwargs)

    def composed(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self:
            return function(*args, **kwargs)

    def template(self, args: Any, use: Callable[[Tensor], str]) -> list[Any]:
        return [
            _At(self.slot(x), use(x))
            if isinstance(x, Tensor)
            else self.template(x, use)
            if isinstance(x, list | tuple)
            else x
            for x in args
        ]

    def add(self, result: Any, compute: Compute, args: Any, followed: bool = True) -> Any:
        """Add an operation by its result at order 0 and what computes it at any order."""
        derived = any(self.slot(x) in self.derived for x in tensors_in(args))
        single = isinstance(result, Tensor)
        writes = [self.enter(x) for x in ((result,) if single else result)]

        def append(values: Values, n: int) -> None:
            found = compute(values, n)
            for slot, x in zip(writes, (found,) if single else found, strict=True):
                values[slot].append(x)

        self.program.append(append)
        self.derived.update(writes if derived else [])
        if followed:
            self.followed.update(writes)
            self.later.append(append)
        return result

    def constant(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operation on the values at order 0 alone."""
        result = func(*args, **kwargs)
        if not isinstance(result, Tensor | tuple | list):
            if any(self.slot(x) in self.derived for x in tensors_in(args)):
                raise _converted(func._overloadpacket.__name__.strip("_"))
            return result
        template = self.template(args, lambda x: "value")

        def compute(values: Values, n: int) -> Any:
            return func(*_filled(template, values, 0), **kwargs)

        return self.add(result, compute, args, followed=False)

    def linear(self, func: Any, args: Any, kwargs: Any, constants: str = "addend") -> Any:
        """An operation linear in what is followed, with constants as addends or as factors."""
        name, result = func._overloadpacket.__name__, func(*args, **kwargs)
        if "reduce" in kwargs:
            raise no_rule(name)
        if result is args[0]:
            return result
        if not all(differentiable(x) for x in tensors_in([result])):
            return self.constant(func, args, kwargs)

        def use(x: Tensor) -> str:
            return "order" if self.follows(x) else constants if differentiable(x) else "value"

        first = self.template(args, use)
        added = [i for i in _ADDENDS.get(name, ()) if i < len(args) and type(first[i]) is not _At]
        rest = [0 if i in added else x for i, x in enumerate(first)]
        # What a constant is added to keeps its higher orders, as does what is multiplied by 1.
        followed = [x for x in tensors_in(args) if self.follows(x)]
        number = args[-1] if not isinstance(args[-1], Tensor) else None
        plus = name == "add" or (name == "sub" and followed[0] is args[0])
        keeps = name == "alias" or (name == "mul" and number == 1) or (plus and not kwargs)
        same = keeps and len(followed) == 1 and _like(followed[0], result)
        kept = self.slot(followed[0])

        def compute(values: Values, n: int) -> Any:
            if n and same:
                return values[kept][n]
            return func(*_filled(rest if n else first, values, n), **kwargs)

        return self.add(result, compute, args)

    def elementary(
        self, func: Any, args: Any, kwargs: Any, slope: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """A function of the first argument, whose derivative is `slope(argument, value)`."""
        key = (func, self.slot(args[0]), *args[1:], *kwargs.items())
        if key in self.known:
            alias = self.known[key].detach()  # autograd does not take one tensor as two results
            self.enter(alias, self.slot(self.known[key]))
            return alias
        y: Tensor = func(*args, **kwargs)
        at, template = self.slot(args[0]), self.template(args, lambda x: "value")

        def compute(values: Values, n: int) -> Tensor:
            """From `y' = d x'`, with d the derivative."""
            if n == 0:
                return func(*_filled(template, values, 0), **kwargs)
            x, d = values[at], values[derivative]
            z = x[n] * d[0]
            for j in range(1, n):
                z = torch.addcmul(z, x[j], d[n - j], value=j / n)
            return z

        self.known[key] = self.add(y, compute, args)
        derivative = self.slot(self.composed(slope, args[0], y))
        return y


class FunctionMode(TorchFunctionMode):
    """Refuses what the dispatcher does not see: conversions, and tensors of a transform."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        lists = [x for x in args if isinstance(x, list | tuple)]
        read = args[:1] if func in _TO_PYTHON else tensors_in(lists) if func in _FROM_LISTS else ()
        if any(id(x) in self.recorder.slots for x in read):
            raise _converted(func.__name__)
        if torch._C._functorch.maybe_current_level() is None and any(
            torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors_in(args)
        ):
            raise ValueError(
                "taylor_solution: f closes over a tensor that a transform of torch.func follows; "
                "pass it to f through args"
            )
        return func(*args, **(kwargs or {}))
