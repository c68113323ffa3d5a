"""Taylor mode: all derivatives along a direction in one pass, at a cost polynomial in the order.

A value that depends on $t$ is followed as a `Jet`, the stack of its Taylor coefficients in $t$
(`dispatch`). A PyTorch function that is called with one is looked up in a table of rules (`rules`);
one without a rule is composed by PyTorch of others that have rules, or raises. Two algebras of
coefficients share the rules (`algebra`): the powers of one direction up to an order, and, for the
Laplacian, the first derivatives along many directions with the sum of the second ones.

The rules work on whole stacks: a linear function costs one call for all coefficients. Every other
function is composed of products, contractions and elementary functions (`series`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import BuiltinFunctionType, FunctionType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import Function

from autograd_lib.higher_order.algebra import ELEMENTARY, Elementary, Taylor
from autograd_lib.higher_order.dispatch import Jet, following, lift, write
from autograd_lib.higher_order.inputs import Inputs, check_tensor, check_uncompiled, follow
from autograd_lib.higher_order.lookup import RULES, name_of
from autograd_lib.higher_order.series import derivative

__all__ = ["jet", "jet_rule"]


Rule = TypeVar("Rule", bound=Callable[..., Any])


def jet_rule(*functions: Callable[..., Any], derivative: bool = False) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule by which `jet` follows PyTorch functions.

    The rule is called in their place, with the same arguments but `out` and `inplace`, whenever one
    of these is a value that `jet` follows. It is PyTorch code over functions that have rules.

    Args:
        functions: functions of PyTorch, such as `torch.erfc` (the method `Tensor.erfc` of the same
            name goes with it), or subclasses of `torch.autograd.Function`.
        derivative: whether the rule returns the derivative of an elementwise function of one
            variable, which `jet` integrates, and not its value. It may call that function again.

    Returns:
        A decorator that leaves the rule as it is.

    Raises:
        TypeError: if one of `functions` cannot be called, or there is none.

    Example:
        >>> @jet_rule(torch.special.entr)
        ... def entropy(x):
        ...     return x * torch.log(1 / x)
        >>> jet(torch.special.entr, torch.tensor(1.0), torch.tensor(1.0), 2)
        (tensor(0.), tensor(-1.), tensor(-1.))
    """
    for function in functions or (None,):
        if not callable(function):
            raise TypeError(
                f"jet_rule: expected functions, as in @jet_rule(torch.erfc), got {function!r}"
            )

    def register(rule: Rule) -> Rule:
        for function in functions:
            whole = _integral(function, rule) if derivative else _in_place_option(function, rule)
            if isinstance(function, type) and issubclass(function, Function):
                _divert(function, whole)
                continue
            RULES[function] = whole
            name = name_of(function)
            first = isinstance(function, BuiltinFunctionType | torch._ops.OpOverloadPacket)
            if not name.startswith("__"):
                RULES[name] = whole if first else RULES.get(name, whole)
            if function is getattr(torch, name, None):  # and the same function elsewhere
                for home in (Tensor, torch.special):
                    if hasattr(home, name):
                        RULES[getattr(home, name)] = whole
        return rule

    return register


def _integral(function: Any, slope: Callable[[Tensor], Tensor]) -> Callable[[Jet], Jet]:
    elementary = Elementary(getattr(function, "apply", function), slope)
    ELEMENTARY[function] = elementary
    return lambda x: x.algebra.elementary(elementary, x)


def _in_place_option(function: Any, rule: Callable[..., Any]) -> Callable[..., Any]:
    """Take the option `inplace` of the function, which its rule does not have."""
    names = function.__code__.co_varnames if isinstance(function, FunctionType) else ()
    if "inplace" not in names:
        return rule
    place = names.index("inplace")

    @functools.wraps(rule)
    def whole(*args: Any, inplace: bool = False, **kwargs: Any) -> Any:
        if len(args) > place:
            inplace, args = args[place], args[:place]
        result = rule(*args, **kwargs)
        return write(args[0], result) if inplace else result

    return whole


def _divert(function: type[Function], rule: Callable[..., Any]) -> None:
    """Let `function.apply` take the rule where an argument is followed."""
    inherited = function.apply.__func__  # type: ignore[attr-defined]

    @functools.wraps(inherited)
    def diverted(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if cls is function and any(isinstance(arg, Jet) for arg in args):
            return rule(*args, **kwargs)
        return inherited(cls, *args, **kwargs)

    function.apply = classmethod(diverted)  # type: ignore[assignment, method-assign]


def jet(f: Callable[..., Tensor], x: Inputs, v: Inputs, order: int) -> tuple[Tensor, ...]:
    r"""Return $f(x)$ and its derivatives along $v$ up to an order, in one pass.

    $\big(f(x),\ Df(x)[v],\ \dots,\ D^{K} f(x)[v, \dots, v]\big)$ by Taylor mode (Griewank &
    Walther 2008, "Evaluating Derivatives", chapter 13): the coefficients of $f(x + tv)$ in $t$ are
    pushed through the operations of `f`, each by its own recurrence. The cost grows as $K$ through
    linear functions with constant weights and at most as $K^2$ through others; nesting
    `torch.func.jvp` or `grad` doubles it, at least, with each order. To compile it, trace it first
    by `make_fx` of `torch.fx.experimental.proxy_tensor`:
    `torch.compile(make_fx(lambda x, v: jet(f, x, v, order))(x, v))`.

    Args:
        f: a function of one tensor, or of one dict of tensors, that returns a tensor of any shape.
            Ordinary PyTorch code; modules through `torch.func.functional_call`. It may close over
            tensors, and write in place into values, their views and constants. What it computes
            under `torch.no_grad` or detaches is constant, as is the padding row of an embedding. A
            compiled module is passed uncompiled (`_orig_mod`).
        x: where to differentiate: a floating-point or complex tensor or a dict of them.
        v: the direction, like `x`.
        order: the highest derivative K, at least 0.

    Returns:
        K + 1 tensors, each like `f(x)`: derivatives, not Taylor coefficients. They are
        differentiable by `backward()` with respect to `x`, `v` and what `f` closes over, and
        `torch.func.vmap` may be taken over `x` and `v`.

    Raises:
        NotImplementedError: if `f` uses an operation that has no rule (`jet_rule` adds one), reads
            what an operation in place may have changed without its knowledge, or calls `jet` in
            turn; if `jet` is called under `torch.compile`.
        TypeError: if `x` or `v` is not floating point or complex, or `f` returns no tensor.
        ValueError: if `v` is not like `x`, or `order` is negative.

    Example:
        >>> x, v = torch.tensor(1.0), torch.tensor(2.0)
        >>> jet(lambda x: x**3, x, v, 4)  # (2d/dx)^k of x^3
        (tensor(1.), tensor(6.), tensor(24.), tensor(48.), tensor(0.))
    """
    check_uncompiled("jet")
    if not isinstance(order, int) or order < 0:
        raise ValueError(f"jet: expected an order of 0 or more, got {order!r}")
    algebra = Taylor(order + 1)
    inputs = follow("jet", x, v, lambda x, v: Jet(torch.stack([x, v][: order + 1]), algebra))
    with following():
        stack, _ = lift(check_tensor("jet", f(inputs)))
    missing = order + 1 - len(stack)
    zeros = stack.new_zeros(missing, *stack.shape[1:]).unbind() if missing else ()
    return (*[derivative(c, k) for k, c in enumerate(stack.unbind())], *zeros)
