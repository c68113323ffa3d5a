"""Recorded operations, which are extended to the next Taylor coefficient of all their values.

A function runs once, and the operations that reach PyTorch's dispatcher are recorded. A linear
operation is called again on the next coefficient, a product is one convolution sum, an elementary
function follows from its derivative (`recurrences` holds these rules).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

Values = list[list[Tensor]]  # by slot the coefficients so far; of a constant one
Compute = Callable[[Values, int], Any]  # the coefficient of an order, or several
Step = tuple[Compute, int | list[int]]  # and the slot of the result, or several

# What reads a value past the dispatcher, and what makes a tensor of numbers.
_READERS = """
    tolist numpy __array__ __dlpack__ __repr__ __deepcopy__ __reduce_ex__ untyped_storage
"""
_TO_PYTHON = {getattr(Tensor, name) for name in _READERS.split()}
_FROM_LISTS = {torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor}


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


def _sample(x: Tensor) -> Tensor:
    """Return a tensor without the transforms of torch.func: of a batch its first element."""
    dims = []
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        dims.append(torch._C._functorch.maybe_get_bdim(x))
        x = torch._C._functorch.get_unwrapped(x)
    for dim in reversed(dims):
        x = x.select(dim, 0) if dim >= 0 else x
    return x.detach().clone()  # in memory of its own, see `_place`


def _place(x: Tensor) -> Any:
    """What two tensors have in common that are the same values in the same memory."""
    if x.layout != torch.strided:
        return None
    lazy = (x.dtype, x.is_conj(), x.is_neg())
    return torch._C._storage_id(x), x.storage_offset(), x.shape, x.stride(), lazy  # type: ignore[attr-defined]


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


class _Slot(int):
    """Stands for a recorded value among arguments."""


def _filled(template: list[Any], values: Values) -> list[Any]:
    """The arguments of an operation at the order that is computed, the last of each value."""
    return [
        values[x][-1] if type(x) is _Slot else _filled(x, values) if type(x) is list else x
        for x in template
    ]


class Recorder(TorchDispatchMode):
    """Records operations; those that depend on the first two values entered are followed.

    Attributes:
        program: what computes the results of each operation at order 0, and their slots.
        later: what does so at higher orders, of the operations that are followed.
        outside: the tensors that are neither entered nor results, by slot.
    """

    def __init__(self, rule_of: Callable[[Any], Any]) -> None:
        super().__init__()
        self.rule_of = rule_of
        self.program: list[Step] = []
        self.later: list[Step] = []
        self.outside: dict[int, Tensor] = {}
        self.kept: list[Tensor] = []  # alive, so that no other tensor takes the id
        self.slots: dict[int, int] = {}  # by the id of a tensor
        self.places: dict[Any, int] = {}  # of what is derived: nn.Parameter(x) is x
        self.placed = 0  # so many of those kept
        self.size = 0
        self.followed = {0, 1}
        self.derived: set[int] = set()  # what depends on arguments, and not on the outside alone
        self.known: dict[Any, Tensor] = {}  # results of elementary functions
        self.plain: set[Any] = set()  # operations of which a rule under way takes the value alone

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # which would cost calls at each operation, and nothing is compiled here

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

    def find(self, x: Tensor) -> int | None:
        """The slot of a tensor that was seen, itself or by what shares its memory unseen."""
        if id(x) not in self.slots:
            for seen in self.kept[self.placed :]:
                if self.slots[id(seen)] in self.derived:
                    self.places[_place(seen)] = self.slots[id(seen)]
            self.placed = len(self.kept)
            if _place(x) in self.places:
                self.enter(x, self.places[_place(x)])
        return self.slots.get(id(x))

    def slot(self, x: Tensor) -> int:
        found = self.slots.get(id(x))
        if found is None:
            found = self.find(x)
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
        if kwargs and tensors_in(kwargs):
            raise no_rule(name)
        if func in self.plain or self.followed.isdisjoint([self.slot(x) for x in inputs]):
            return self.record(func, args, kwargs)
        return self.rule_of(func)(self, func, args, kwargs)

    def composed(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        with self:
            return function(*args, **kwargs)

    def template(self, args: Any, of: Callable[[Tensor], Tensor]) -> list[Any]:
        return [
            _Slot(self.slot(of(x)))
            if isinstance(x, Tensor)
            else self.template(x, of)
            if isinstance(x, list | tuple)
            else x
            for x in args
        ]

    def call(
        self, func: Any, args: Any, kwargs: Any, of: Callable[[Tensor], Tensor] = lambda x: x
    ) -> Compute:
        """What calls an operation on the latest coefficients of what `of` makes of the tensors."""
        # PyTorch's own function of the name, which it calls faster than it does the operation.
        faster = getattr(torch._C._VariableFunctions, func._overloadpacket.__name__, func)
        template = self.template(args, of)
        return lambda values, n: faster(*_filled(template, values), **kwargs)

    def record(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Call and record an operation; its results are constants, unless they are extended."""
        result = func(*args, **kwargs)
        if result is args[0]:
            return result
        derived = not self.derived.isdisjoint([self.slot(x) for x in tensors_in(args)])
        if not isinstance(result, Tensor | tuple | list):
            if derived:
                raise _converted(func._overloadpacket.__name__.strip("_"))
            return result
        compute = self.call(func, args, kwargs)
        writes = [self.enter(x) for x in tensors_in([result])]
        self.derived.update(writes if derived else ())
        self.program.append((compute, writes[0] if isinstance(result, Tensor) else writes))
        return result

    def extend(self, result: Any, higher: Compute) -> Any:
        """Follow results by what computes their coefficients, if they are differentiable."""
        results = tensors_in([result])
        if all(differentiable(x) for x in results):
            writes = [self.slot(x) for x in results]
            self.followed.update(writes)
            self.later.append((higher, writes[0] if isinstance(result, Tensor) else writes))
        return result

    def linear(
        self, func: Any, args: Any, kwargs: Any, later: Any = None, keeps: bool = False
    ) -> Any:
        """An operation linear in what is followed; `later` makes what computes higher orders.

        With `keeps` it changes no higher order of its only followed argument.
        """
        result = self.record(func, args, kwargs)
        if result is args[0]:
            return result
        compute, _ = self.program[-1]
        x, *others = [x for x in tensors_in(args) if self.follows(x)]
        if keeps and not others and (x.shape, x.dtype) == (result.shape, result.dtype):
            kept = self.slot(x)
            return self.extend(result, lambda values, n: values[kept][-1])
        return self.extend(result, compute if later is None else later())

    def elementary(
        self, func: Any, args: Any, kwargs: Any, slope: Callable[[Tensor, Tensor], Tensor]
    ) -> Tensor:
        """A function of the first argument, whose derivative is `slope(argument, value)`."""
        key = (func, self.slot(args[0]), *args[1:], *kwargs.items())
        if key in self.known:
            alias = self.known[key].detach()  # autograd does not take one tensor as two results
            self.enter(alias, self.slot(self.known[key]))
            return alias

        def higher(values: Values, n: int) -> Tensor:
            """From `y' = d x'`, with d the derivative."""
            x, d = values[at], values[derivative]
            return sum_of_products(x[n:0:-1], d[:n], [j / n for j in range(n, 0, -1)])

        y: Tensor = self.extend(self.record(func, args, kwargs), higher)
        self.known[key] = y
        at, derivative = self.slot(args[0]), self.slot(self.composed(slope, args[0], y))
        return y


_SMALL = 1024  # elements, below which a call costs more than its arithmetic


def sum_of_products(a: list[Tensor], b: list[Tensor], weights: list[float] | None = None) -> Tensor:
    """The sum of `a[k] * b[k] * weights[k]`, of which the first weight is 1."""
    x, y = a[0], b[0]
    alike = (x.shape, x.dtype) == (y.shape, y.dtype) and x.numel() <= _SMALL
    if alike and len(a) > 2 and get_proxy_mode() is None:  # a compiler fuses the sum better
        products = torch.stack(a) * torch.stack(b)
        if weights is None:
            return products.sum(0)
        return torch.tensordot(torch.tensor(weights, dtype=x.dtype, device=x.device), products, 1)
    # In place where no transform of torch.func may give the product more dimensions.
    inside = torch._C._functorch.maybe_current_level() is not None
    add: Callable[..., Tensor] = torch.addcmul if inside else Tensor.addcmul_
    total = x * y
    for k in range(1, len(a)):
        total = add(total, a[k], b[k], value=1 if weights is None else weights[k])
    return total


class FunctionMode(TorchFunctionMode):
    """Refuses what the dispatcher does not see: conversions, and tensors of a transform."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = args[:1] if func in _TO_PYTHON else ()
        if func in _FROM_LISTS:
            read = tensors_in([x for x in args if isinstance(x, list | tuple)])
        if any(self.recorder.find(x) in self.recorder.derived for x in read):
            raise _converted(func.__name__.strip("_"))
        if torch._C._functorch.maybe_current_level() is None and any(
            torch._C._functorch.is_functorch_wrapped_tensor(x) for x in tensors_in(args)
        ):
            raise ValueError(
                "taylor_solution: f closes over a tensor that a transform of torch.func follows; "
                "pass it to f through args"
            )
        return func(*args, **(kwargs or {}))
