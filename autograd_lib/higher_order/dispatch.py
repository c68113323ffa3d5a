"""The values that `jet` follows, and the table of rules in which each function looks them up."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._C import _functorch as _vmap
from torch._functorch import predispatch
from torch._functorch.pyfunctorch import (
    temporarily_clear_interpreter_stack,
    temporarily_restore_interpreter_stack,
)
from torch.autograd.function import Function
from torch.overrides import enable_reentrant_dispatch, resolve_name
from torch.utils._pytree import tree_flatten, tree_unflatten

from autograd_lib.higher_order.lookup import (
    RULES,
    VIEWS,
    arranged,
    composed,
    from_source,
    name_of,
    no_rule,
    writes,
)
from autograd_lib.higher_order.series import pad

if TYPE_CHECKING:
    from autograd_lib.higher_order.algebra import Algebra


def rule_of(function: Any) -> Callable[..., Any] | None:
    """The rule of a function of PyTorch: of the table, its source, or that of `add` for `add_`."""
    if function not in RULES:
        name = name_of(function)
        found = from_source(function) or RULES.get(name)
        if found is None and writes(name) and name[:-1] in RULES and name[:-1] not in VIEWS:
            plain = RULES[name[:-1]]
            found = lambda x, *args, **kwargs: write(x, plain(x, *args, **kwargs))  # noqa: E731
        if found is not None:
            RULES[function] = found
    return RULES.get(function)


class Jet(Tensor):
    """A tensor that depends on the direction: the stack of its coefficients, shown as their first.

    `stack` has the shape `(n, *shape)`; coefficients beyond the n-th are zero. Those from `live` on
    are zero too; they are stored where a gradient with respect to them is needed. No stack is ever
    written to: what f modifies in place gets another one.
    """

    stack: Tensor
    algebra: Algebra
    live: int
    version = 0  # grows with each write
    # Of a view: the value whose memory it shares (None: which was written to, perhaps), its version
    # then, whether it shares it surely, and by what function, which of its results, and arguments.
    origin: tuple[Any, ...] | None = None
    constants: tuple[Any, ...] = ()  # weak references to results of detach

    @staticmethod
    def __new__(cls, stack: Tensor, algebra: Algebra, live: int | None = None) -> Jet:
        n, *shape = stack.shape
        self = Tensor._make_wrapper_subclass(cls, shape, dtype=stack.dtype, device=stack.device)
        self.stack = stack
        self.algebra = algebra
        self.live = n if live is None or live > n else live
        return self

    # Read often, so without the detour through __torch_function__.
    shape = property(lambda self: self.stack.shape[1:])
    ndim = property(lambda self: self.stack.ndim - 1)
    dtype = property(lambda self: self.stack.dtype)
    device = property(lambda self: self.stack.device)
    # The autograd graph is that of the stack; tools that hook tensors read these.
    requires_grad = property(lambda self: self.stack.requires_grad)
    grad_fn = property(lambda self: self.stack.grad_fn)

    def dim(self) -> int:
        return self.stack.ndim - 1

    def size(self, dim: int | None = None) -> Any:
        return self.shape if dim is None else self.shape[dim]

    def map(self, f: Callable[[Tensor], Tensor]) -> Jet:
        """Apply a linear function to the stack; it must keep the first dimension."""
        return Jet(f(self.stack), self.algebra, self.live)

    def refresh(self) -> None:
        """Follow what was written to the value that this one is a view of."""
        if self.origin is None:
            return
        base, seen, always, *call = self.origin
        if base is not None:
            base.refresh()
            if base.version == seen:
                return
            if always:
                self._hold(by_coefficient(_path(*call), base))
                return
        raise NotImplementedError(
            "jet: a value is read after another one, which may share its memory (by reshape, "
            "flatten or contiguous), was modified in place; use view, or clone before"
        )

    def _hold(self, value: Tensor) -> None:
        self.stack, self.live = lift(value)
        self.version += 1
        if self.origin is not None:
            base, _, *rest = self.origin
            self.origin = (base, base.version, *rest)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        rule = RULES.get(func) or rule_of(func)
        kwargs = kwargs or {}
        if kwargs:
            args, kwargs = arranged(func, args, kwargs)
            if kwargs.pop("out", None) is not None:
                raise no_rule(_name(func), in_place=True)
        if rule is None:
            return _in_parts(func, args, kwargs)
        algebra = algebra_of(*args, *kwargs.values())
        if algebra.level != torch._C._functorch.maybe_current_level():
            raise NotImplementedError(
                f"jet: {_name(func)} met a value that jet follows inside a transform of "
                "torch.func, which would take it for a constant; put the transform around jet"
            )
        if algebra.forward_mode and not torch._C._is_fwd_grad_enabled():
            raise NotImplementedError(
                f"jet: the forward of the torch.autograd.Function {_running_function()} met a "
                "value that jet follows; give it a rule with @jet_rule, or remove the hook that "
                "calls it"
            )
        if algebra.recording and not torch.is_grad_enabled():
            return _without_grad(func, args, kwargs)
        result = rule(*args, **kwargs)
        always = VIEWS[func]
        if always is not None:
            _mark(result, args[0], always, func, args, kwargs)
        elif type(result) is Jet and result.origin is not None and RULES[func] is rule:
            # A view of what the rule composed is none to PyTorch.
            held = any(result is arg for arg in args)
            result = result if held else Jet(result.stack, algebra, result.live)
        return result

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Other calls that bypass __torch_function__ are inside torch.func, and in compiled or
        # scripted functions.
        levels = getattr(_LOCAL, "levels", None)
        if levels is None:
            raise no_rule(f"{func}, reached inside a transform or a compiled function,")
        if rule_of(func) is None:
            raise no_rule(str(func))
        _LOCAL.levels = None
        restored = (
            temporarily_restore_interpreter_stack(levels) if levels else contextlib.nullcontext()
        )
        try:
            with enable_reentrant_dispatch(), torch._C._EnableTorchFunction(), restored:
                result = cls.__torch_function__(func, types, args, kwargs)
                return _constant(result, algebra_of(*args))
        finally:
            _LOCAL.levels = levels

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Jet({self.stack!r})"


_LOCAL = threading.local()
_GETITEM = Tensor.__getitem__


def _name(function: Any) -> str:
    return resolve_name(function) or name_of(function)


def _in_parts(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let PyTorch compose a function without a rule of ATen operations, which have rules."""
    if not composed(name_of(func)):
        raise no_rule(_name(func))
    algebra = algebra_of(*args, *kwargs.values())
    args, kwargs = _constant(args, algebra), _constant(kwargs, algebra)
    try:
        # The levels of torch.vmap are those of the stacks, not of the values around them.
        with temporarily_clear_interpreter_stack() as levels:
            _LOCAL.levels = levels
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
    except NotImplementedError as error:
        raise no_rule(_name(func)) from error
    finally:
        _LOCAL.levels = None


def _constant(value: Any, algebra: Algebra) -> Any:
    """Let the floating-point constants among values be followed, as C++ may write to them."""
    if isinstance(value, dict):
        return {key: _constant(part, algebra) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_constant(part, algebra) for part in value]
    return Jet(value[None], algebra) if differentiable(value) and type(value) is not Jet else value


def differentiable(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _without_grad(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What no_grad computes is constant; written to a value, it leaves the derivatives."""
    constants, options = primal(args), primal(kwargs)
    if type(args[0]) is Jet and writes(func.__name__):
        value = constants[0].clone()
        func(value, *constants[1:], **options)
        with torch.enable_grad():
            return write(args[0], args[0] + (value - constants[0]))
    result = func(*constants, **options)
    return shared(args[0], result) if VIEWS[func] and isinstance(result, Tensor) else result


def shared(x: Any, constant: Tensor) -> Tensor:
    """Note that a constant shares the memory of a value."""
    if type(x) is Jet:
        alive = [each for each in x.constants if each() is not None]
        x.constants = (*alive, weakref.ref(constant))
    return constant


def _mark(
    result: Any, base: Any, always: bool, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Note where the results of a view come from."""
    if type(base) is not Jet or (func is _GETITEM and _copied(args[1])):
        return
    if type(result) is not Jet:
        for i, part in enumerate(result):
            part.origin = (base, base.version, always, func, i, args, kwargs)
    elif result is not base:
        result.origin = (base, base.version, always, func, None, args, kwargs)


def _copied(index: Any) -> bool:
    """Whether an index is one that makes PyTorch copy."""
    parts = index if isinstance(index, tuple) else (index,)
    return any(isinstance(i, list | range | bool) or getattr(i, "ndim", 0) for i in parts)


def _path(func: Any, part: int | None, args: Any, kwargs: Any) -> Callable[[Tensor], Tensor]:
    if part is None:
        return lambda base: func(base, *args[1:], **kwargs)
    return lambda base: func(base, *args[1:], **kwargs)[part]


def write(x: Tensor, value: Tensor) -> Tensor:
    """Put a value in the place of `x`, and of the parts of others that `x` is a view of."""
    if not torch.can_cast(value.dtype, x.dtype):
        raise RuntimeError(f"jet: result type {value.dtype} can't be cast to {x.dtype} in place")
    value = value.to(x.dtype).expand(x.shape)
    if type(x) is not Jet:
        _adopt(x, algebra_of(value))
    assert type(x) is Jet
    if any(constant() is not None for constant in x.constants):
        raise NotImplementedError(
            "jet: a value was modified in place after detach, whose result shares its memory; "
            "use detach().clone()"
        )
    if x.origin is not None:
        base, _, always, *call = x.origin
        if always:
            write(base, together(_replaced(_path(*call)), base, value))
        else:
            x.origin = None
            while base is not None:
                after = base.origin and base.origin[0]
                base.origin, base = (None, 0, False), after
    x._hold(value)
    return x


def _replaced(path: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    def replace(base: Tensor, value: Tensor) -> Tensor:
        base = base.clone(memory_format=torch.contiguous_format)
        path(base).copy_(value)
        return base

    return replace


def _adopt(x: Tensor, algebra: Algebra) -> None:
    """Let a constant that is written to be followed from then on, by the same object."""
    value = Jet(x.clone()[None], algebra)
    try:
        if x._is_view():
            raise RuntimeError
        x.fill_(math.nan)  # what shares its memory, and should not be read any more
        torch.utils.swap_tensors(x, value)
    except RuntimeError as error:
        raise no_rule("a write into a constant that a view shares", in_place=True) from error
    _LOCAL.adopted.append(x)


@contextlib.contextmanager
def following() -> Iterator[None]:
    """Run f: constants that it writes to have plain values again at the end."""
    outer, _LOCAL.adopted = getattr(_LOCAL, "adopted", None), []
    try:
        yield
    except RuntimeError as error:
        if "TorchScript interpreter" in str(error):
            raise no_rule("a function of torch.jit.script or torch.jit.trace within f") from error
        if type(error).__module__.startswith("torch._dynamo"):
            names = ("torch.cond", "while_loop", "associative_scan", "scan", "torch.map")
            name = next((name for name in names if name in str(error)), "torch.compile")
            raise no_rule(f"{name} within f") from error
        raise
    finally:
        for x in _LOCAL.adopted:
            torch.utils.swap_tensors(x, primal(x).detach().clone())
        _LOCAL.adopted = outer


def _running_function() -> str:
    """Return the name of the Function whose forward is running."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        cls = frame.f_locals.get("cls")
        if isinstance(cls, type) and issubclass(cls, Function):
            return cls.__name__
    return "that is running"


def jets(values: Any) -> list[Jet]:
    """Return the followed values among arguments, nested ones too."""
    found: list[Jet] = []
    for value in values.values() if isinstance(values, dict) else values:
        if type(value) is Jet:
            if value.origin is not None:
                value.refresh()
            found.append(value)
        elif isinstance(value, (tuple, list, dict)):
            found += jets(value)
    return found


def primal(values: Any) -> Any:
    """Return the arguments with every followed value replaced by its value at t = 0."""
    if isinstance(values, Jet):
        return values.stack[0]
    if isinstance(values, dict):
        return {key: primal(value) for key, value in values.items()}
    if isinstance(values, tuple | list):
        return [primal(value) for value in values] if jets(values) else values
    return values


def algebra_of(*values: Any) -> Algebra:
    """Return the algebra of the followed values among arguments, which they must share."""
    first, *others = jets(values)
    if others and any(other.algebra is not first.algebra for other in others):
        raise NotImplementedError(
            "jet: values of two calls of jet or laplacian met; they cannot be nested: take a "
            "higher order, or torch.func.grad around jet"
        )
    return first.algebra


def lift(x: Tensor, ndim: int | None = None) -> tuple[Tensor, int]:
    """Return the stack of a value or a constant, with `ndim` dimensions, and how many are live."""
    stack, live = (x.stack, x.live) if isinstance(x, Jet) else (x[None], 1)
    if ndim is not None and ndim > x.ndim:
        stack = stack.reshape(len(stack), *[1] * (ndim - x.ndim), *x.shape)
    return stack, live


def aligned(x: Tensor, y: Tensor, ndim: int = 0) -> tuple[tuple[Tensor, int], tuple[Tensor, int]]:
    """Lift two values to stacks of one dtype with as many dimensions as broadcasting needs."""
    ndim = max(ndim, x.ndim, y.ndim)
    (a, live_a), (b, live_b) = lift(x, ndim), lift(y, ndim)
    if a.dtype != b.dtype:
        dtype = torch.result_type(primal(x), primal(y))
        a, b = a.to(dtype), b.to(dtype)
    return (a, live_a), (b, live_b)


def by_coefficient(
    function: Callable[..., Any], x: Jet, *args: Any, along: Sequence[Tensor] = (), **kwargs: Any
) -> Any:
    """Apply a function linear in x, and in the stacks `along` with it, to each coefficient.

    This is `torch.vmap` without its checks of arguments, which take longer than most functions.
    """
    if not predispatch.DECOMPOSITIONS_LOADED:
        predispatch.lazy_load_decompositions()
    size = x.stack.shape[0]
    level = _vmap._vmap_increment_nesting(size, "error")
    try:
        others = [_vmap._add_batch_dim(stack, 0, level) for stack in along]
        result = function(_vmap._add_batch_dim(x.stack, 0, level), *others, *args, **kwargs)
        if isinstance(result, Tensor):
            return by_stack(_vmap._remove_batch_dim(result, level, size, 0), x)
        return tuple(by_stack(_vmap._remove_batch_dim(part, level, size, 0), x) for part in result)
    finally:
        _vmap._vmap_decrement_nesting()


def together(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Apply a function that is linear in all its floating-point arguments together."""
    found = jets((*args, *kwargs.values()))
    leaves, spec = tree_flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if differentiable(leaf)]
    size, live = max(len(x.stack) for x in found), max(x.live for x in found)
    first, *others = [pad(lift(leaves[i])[0], size) for i in places]

    def call(*coefficients: Tensor) -> Any:
        for i, coefficient in zip(places, coefficients, strict=True):
            leaves[i] = coefficient
        args, kwargs = tree_unflatten(leaves, spec)
        return function(*args, **kwargs)

    return by_coefficient(call, Jet(first, found[0].algebra, live), along=others)


def by_stack(stack: Tensor, like: Jet) -> Tensor:
    if not (stack.is_floating_point() or stack.is_complex()):
        return stack[0]  # converted to integers, where there are no derivatives
    return Jet(stack, like.algebra, like.live)
