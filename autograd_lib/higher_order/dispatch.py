"""The values that `jet` follows, and the table of rules in which each function looks them up."""

from __future__ import annotations

import contextlib
import math
import sys
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch._C import _functorch as _vmap
from torch._functorch import predispatch
from torch.autograd.function import Function
from torch.overrides import enable_reentrant_dispatch, resolve_name

from autograd_lib.higher_order.lookup import (  # noqa: F401
    LINEAR,
    RULES,
    VIEWS,
    arranged,
    composed,
    from_source,
    namesakes,
    no_rule,
    writes,
)
from autograd_lib.higher_order.series import pad

if TYPE_CHECKING:
    from autograd_lib.higher_order.algebra import Algebra


def rule_of(function: Any) -> Callable[..., Any] | None:
    """The rule of a function of PyTorch: of the table, its source, or that of `add` for `add_`."""
    if function not in RULES:
        name: str = getattr(function, "_opname", None) or getattr(function, "__name__", "")
        found = None
        if isinstance(function, torch._ops.OpOverload):
            # A function in Python may take its arguments otherwise than the operation.
            same = [each for each in namesakes(name) if each in RULES and _schema_like(each)]
            found = RULES[same[0]] if same else None
        found = found or from_source(function)
        within = isinstance(function, torch._ops.OpOverload)
        if found is None and writes(name) and (within or name[:-1] not in _TURNS):
            rules = map(rule_of, filter(callable, namesakes(name[:-1])))
            found = next((_writing(rule, name[:-1] in _TURNS) for rule in rules if rule), None)
        if found is not None:
            RULES[function] = found
    return RULES.get(function)


def _schema_like(function: Any) -> bool:
    return getattr(function, "__module__", None) != "torch.functional"


# In place these change the shape, which only PyTorch's own compositions may.
_TURNS = {"transpose", "t", "unsqueeze", "squeeze"}


def _writing(rule: Callable[..., Any], anew: bool) -> Callable[..., Any]:
    def writing(x: Any, *args: Any, **kwargs: Any) -> Tensor:
        value = rule(x, *args, **kwargs)
        if not anew:
            return write(x, value)
        x._hold(value)
        return x

    return writing


class Jet(Tensor):
    """A tensor that depends on the direction: the stack of its coefficients, shown as their first.

    `stack` has the shape `(n, *shape)`; coefficients beyond the n-th are zero. Those from `live` on
    are zero too; they are stored where a gradient with respect to them is needed. No stack is ever
    written to: what f modifies in place gets another one.
    """

    stack: Tensor
    algebra: Algebra
    live: int
    # Of a value that shares the memory of another: which, by what function, and its version then.
    base: Jet | None = None
    path: Callable[[Tensor], Tensor] | None = None  # None: it shares it perhaps
    seen = 0
    version = 0  # grows with each write
    stale = False  # it may have been written to by what shares its memory perhaps
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
        if self.base is not None:
            self.base.refresh()
            if self.base.version != self.seen and self.path is not None:
                self._hold(by_coefficient(self.path, self.base))
        if self.stale or (self.base is not None and self.base.version != self.seen):
            raise NotImplementedError(
                "jet: a value is read after another one, which may share its memory (by reshape, "
                "flatten or contiguous), was modified in place; use view, or clone before"
            )

    def _hold(self, value: Tensor) -> None:
        self.stack, self.live = lift(value)
        self.version += 1
        if self.base is not None:
            self.seen = self.base.version

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
        return _followed(func, rule, args, kwargs)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        # Other calls that bypass __torch_function__ are inside torch.func, and in compiled or
        # scripted functions.
        if not getattr(_LOCAL, "in_parts", False):
            raise no_rule(f"{func}, reached inside a transform or a compiled function,")
        rule = RULES.get(func) or rule_of(func)
        if rule is None:
            raise no_rule(str(func))
        _LOCAL.in_parts = False
        try:
            with enable_reentrant_dispatch(), torch._C._EnableTorchFunction():
                result = _followed(func, rule, args, kwargs or {})
                # What is made here may be written to, and is held by C++.
                return _constant(result, algebra_of(*args, *(kwargs or {}).values()))
        finally:
            _LOCAL.in_parts = True

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Jet({self.stack!r})"


_LOCAL = threading.local()


def _name(function: Any) -> str:
    return resolve_name(function) or getattr(function, "__name__", str(function))


def _in_parts(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let PyTorch compose a function without a rule of ATen operations, which have rules."""
    # Below torch.vmap its level would be gone.
    if torch._C._are_functorch_transforms_active() or not composed(getattr(func, "__name__", "")):
        raise no_rule(_name(func))
    algebra = algebra_of(*args, *kwargs.values())
    fused = torch._C._get_mkldnn_enabled()
    _LOCAL.in_parts = True
    torch._C._set_mkldnn_enabled(False)  # whose LSTM is one operation
    try:
        with torch._C.DisableTorchFunctionSubclass():
            return _anew(func(*_constant(args, algebra), **_constant(kwargs, algebra)))
    except NotImplementedError as error:
        raise no_rule(_name(func)) from error
    finally:
        _LOCAL.in_parts = False
        torch._C._set_mkldnn_enabled(fused)


def _constant(value: Any, algebra: Algebra) -> Any:
    """Let the floating-point constants among values be followed, too."""
    if isinstance(value, dict):
        return {key: _constant(part, algebra) for key, part in value.items()}
    if isinstance(value, tuple | list):
        return [_constant(part, algebra) for part in value]
    plain = isinstance(value, Tensor) and type(value) is not Jet
    if plain and (value.is_floating_point() or value.is_complex()):
        return Jet(value[None], algebra)
    return value


def _anew(result: Any) -> Any:
    """A result in wrappers of its own shape, which `transpose_` within does not change."""
    if type(result) is Jet:
        return Jet(result.stack, result.algebra, result.live)
    return type(result)(map(_anew, result)) if type(result) in (tuple, list) else result


def _followed(
    func: Any, rule: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The result of a rule, or of the function itself where what it computes is constant."""
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
        # What no_grad computes is constant.
        constants, options = primal(args), primal(kwargs)
        if type(args[0]) is not Jet or not (writes(func.__name__) or func is Tensor.__setitem__):
            return func(*constants, **options)
        value = constants[0].clone()
        func(value, *constants[1:], **options)
        change = (value - constants[0]).detach()  # and the derivatives of what it changes stay
        with torch.enable_grad():
            return write(args[0], args[0] + change)
    result = rule(*args, **kwargs)
    if func in VIEWS and type(args[0]) is Jet and not _copied(func, args):
        several = isinstance(result, tuple | list)
        for i, part in enumerate(result if several else [result]):
            if part is not args[0]:
                part.base, part.seen = args[0], args[0].version
                part.path = _path(func, i if several else None, args[1:], kwargs)
    elif type(result) is Jet and result.base is not None:
        own = RULES[func] is rule and all(result is not arg for arg in args)
        # of what the rule composed, as a view of which PyTorch does not return it
        return Jet(result.stack, algebra, result.live) if own else result
    return result


def _copied(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether an index is one that makes PyTorch copy."""
    if func is not Tensor.__getitem__:
        return False
    index = args[1] if isinstance(args[1], tuple) else (args[1],)
    plain = (int, slice, type(None), type(Ellipsis))
    return not all(
        (isinstance(i, plain) and not isinstance(i, bool)) or (isinstance(i, Tensor) and not i.ndim)
        for i in index
    )


def _path(func: Any, part: int | None, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if not VIEWS[func]:
        return None

    def path(base: Tensor) -> Tensor:
        result = func(base, *args, **kwargs)
        return result if part is None else result[part]

    return path


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
    base = x.base
    if base is not None and x.path is not None:
        write(base, together(_replaced(x.path), base, value))
    elif base is not None:
        x.base = None
        while base is not None:
            base.stale, base = True, base.base
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
    base = x._base if x._is_view() else None
    if base is not None and not base.is_contiguous():
        raise no_rule("a write into a view of a constant", in_place=True)
    size, stride, offset = x.size(), x.stride(), x.storage_offset()
    value = Jet(x.clone()[None], algebra)
    x.fill_(math.nan)  # which nothing should read any more
    try:
        torch.utils.swap_tensors(x, value)
    except RuntimeError as error:
        raise no_rule("a write into a constant that another view shares", in_place=True) from error
    if base is not None:
        if type(base) is not Jet:
            _adopt(base, algebra)
        x.base, x.seen = base, base.version
        x.path = lambda t: t.as_strided(size, stride, offset)
    else:
        algebra.adopted.append(x)


@contextlib.contextmanager
def following(algebra: Algebra) -> Iterator[None]:
    """Give constants that were written to their plain values back at the end."""
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
        for x in algebra.adopted:
            torch.utils.swap_tensors(x, primal(x).detach().clone())


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
            if value.base is not None or value.stale:
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


def by_coefficient(function: Callable[..., Any], x: Jet, *args: Any, **kwargs: Any) -> Any:
    """Apply a linear function to each coefficient."""
    return _mapped(x, len(x.stack), lambda add: function(add(x.stack), *args, **kwargs))


def together(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Apply a function that is linear in all its floating-point arguments together."""
    found = jets((*args, *kwargs.values()))
    size = max(len(x.stack) for x in found)
    like = max(found, key=lambda x: x.live)

    def padded(value: Any) -> Any:
        if isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex()):
            return _Stack(pad(lift(value)[0], size))
        return [padded(part) for part in value] if isinstance(value, tuple | list) else value

    def added(value: Any, add: Callable[[Tensor], Tensor]) -> Any:
        if isinstance(value, list):
            return [added(part, add) for part in value]
        return add(value.stack) if isinstance(value, _Stack) else value

    values = padded(args)
    options = {key: padded(value) for key, value in kwargs.items()}

    def call(add: Callable[[Tensor], Tensor]) -> Any:
        return function(*added(values, add), **{k: added(v, add) for k, v in options.items()})

    return _mapped(like, size, call)


class _Stack(NamedTuple):
    stack: Tensor


def _mapped(like: Jet, size: int, call: Callable[[Callable[[Tensor], Tensor]], Any]) -> Any:
    """`torch.vmap` without its checks of arguments, which take longer than most functions."""
    if not predispatch.DECOMPOSITIONS_LOADED:
        predispatch.lazy_load_decompositions()
    level = _vmap._vmap_increment_nesting(size, "error")
    try:
        result = call(lambda stack: _vmap._add_batch_dim(stack, 0, level))
        if isinstance(result, Tensor):
            return by_stack(_vmap._remove_batch_dim(result, level, size, 0), like)
        return tuple(by_stack(_vmap._remove_batch_dim(r, level, size, 0), like) for r in result)
    finally:
        _vmap._vmap_decrement_nesting()


def by_stack(stack: Tensor, like: Jet) -> Tensor:
    if not (stack.is_floating_point() or stack.is_complex()):
        return stack[0]  # converted to integers, where there are no derivatives
    return Jet(stack, like.algebra, like.live)
