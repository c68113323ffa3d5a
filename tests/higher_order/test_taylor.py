"""`jet` against closed forms, nested differentiation, counted products; what it refuses."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mpmath
import pytest
import torch
import torch.nn.functional as F
from cases import DEVICES, TiedLanguageModel, mlp
from torch import Tensor, nn
from torch.autograd import Function, forward_ad, functional, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from autograd_lib import derivative_tower, jet, jet_rule, laplacian
from autograd_lib.higher_order import dispatch

# Dynamo itself instantiates a Function that it traces, and looks at `.grad` between two graphs.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not:UserWarning"),
]

ONE = torch.tensor(1.0, dtype=torch.float64)
ZERO = torch.tensor(0.0, dtype=torch.float64)


def points(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=draws, dtype=torch.float64).to(dtype)


def nested(f: Callable[[Any], Tensor], x: Any, v: Any, order: int) -> list[Tensor]:
    results = [f(x)]
    for _ in range(order):
        f = lambda x, f=f: jvp(f, (x,), (v,))[1]  # noqa: E731
        results.append(f(x))
    return results


def assert_all_close(got: Any, expected: Any, **tolerance: float) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **({"rtol": 1e-9, "atol": 1e-9} | tolerance))


# ------------------------------------------------------------------------------ known answers


def bell(n: int) -> list[float]:
    """How many partitions a set of k has, by the recurrence over the block of the last element."""
    numbers = [1]
    for k in range(n):
        numbers.append(sum(math.comb(k, j) * numbers[j] for j in range(k + 1)))
    return [float(b) for b in numbers]


def hermite(n: int, x: float) -> list[float]:
    """Of exp(-x^2): (-1)^k H_k(x) exp(-x^2)."""
    return [float((-1) ** k * mpmath.hermite(k, x) * mpmath.exp(-(x**2))) for k in range(n + 1)]


def by_mpmath(f: Callable[[Any], Any], x: float) -> Callable[[int], list[float]]:
    def derivatives(n: int) -> list[float]:
        with mpmath.workdps(60):
            return [float(c * mpmath.factorial(k)) for k, c in enumerate(mpmath.taylor(f, x, n))]

    return derivatives


def log_gamma(n: int) -> list[float]:
    """At 3/2, by polygamma functions."""
    return [float(mpmath.loggamma(1.5)), *[float(mpmath.psi(k, 1.5)) for k in range(n)]]


# name -> (function, where, derivatives along 1, relative tolerance in float64)
KNOWN: dict[str, tuple[Callable[[Tensor], Tensor], float, Callable[[int], list[float]], float]] = {
    "exp": (torch.exp, 0.5, lambda n: [math.exp(0.5)] * (n + 1), 1e-14),
    "exp of 2x": (lambda x: (2 * x).exp(), 0, lambda n: [2.0**k for k in range(n + 1)], 1e-14),
    "geometric": (
        lambda x: 1 / (1 - x),
        0.5,
        lambda n: [math.factorial(k) * 2.0 ** (k + 1) for k in range(n + 1)],
        1e-13,
    ),
    "sin": (
        torch.sin,
        0.3,
        lambda n: [math.sin(0.3 + k * math.pi / 2) for k in range(n + 1)],
        1e-13,
    ),
    "cos": (
        torch.cos,
        0.3,
        lambda n: [math.cos(0.3 + k * math.pi / 2) for k in range(n + 1)],
        1e-13,
    ),
    "bell": (lambda x: (x.exp() - 1).exp(), 0, bell, 1e-13),
    "bell by expm1": (lambda x: x.expm1().exp(), 0, bell, 1e-13),
    "tangent": (torch.tan, 0, by_mpmath(mpmath.tan, 0), 1e-13),
    "tangent elsewhere": (torch.tan, 0.4, by_mpmath(mpmath.tan, 0.4), 1e-12),
    "hermite": (lambda x: torch.exp(-x.square()), 0.7, lambda n: hermite(n, 0.7), 1e-11),
    "log": (
        torch.log,
        2.0,
        lambda n: (
            [math.log(2)]
            + [(-1) ** (k - 1) * math.factorial(k - 1) / 2**k for k in range(1, n + 1)]
        ),
        1e-13,
    ),
    "sqrt": (torch.sqrt, 0.8, by_mpmath(mpmath.sqrt, 0.8), 1e-12),
    "tanh": (torch.tanh, 0.4, by_mpmath(mpmath.tanh, 0.4), 1e-9),
    "sigmoid": (torch.sigmoid, 0.4, by_mpmath(lambda x: 1 / (1 + mpmath.exp(-x)), 0.4), 1e-8),
    "atan": (torch.atan, 0.4, by_mpmath(mpmath.atan, 0.4), 1e-10),
    "erf": (torch.erf, 0.4, by_mpmath(mpmath.erf, 0.4), 1e-10),
    # PyTorch's trigamma itself is right to ten digits only
    "lgamma": (torch.lgamma, 1.5, log_gamma, 1e-9),
    "power": (lambda x: x**-2.5, 0.9, by_mpmath(lambda x: x ** mpmath.mpf(-2.5), 0.9), 1e-12),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", KNOWN)
def test_known_answers_to_order_twenty(name: str, device: str) -> None:
    f, x, derivatives, rtol = KNOWN[name]
    point = torch.tensor(x, dtype=torch.float64, device=device)
    got = torch.stack(jet(f, point, torch.ones_like(point), 20))
    expected = torch.tensor(derivatives(20), dtype=torch.float64, device=device)
    scale = expected.abs().cummax(0).values  # zeros lie between large numbers
    assert ((got - expected).abs() <= rtol * scale).all(), (got - expected) / scale


@pytest.mark.parametrize("name", KNOWN)
def test_known_answers_in_float32(name: str) -> None:
    f, x, derivatives, _ = KNOWN[name]
    point = torch.tensor(float(x))
    got = jet(f, point, torch.ones_like(point), 8)
    assert all(d.dtype == torch.float32 for d in got)
    expected = torch.tensor(derivatives(8))
    scale = expected.abs().cummax(0).values
    assert ((torch.stack(got) - expected).abs() <= 1e-4 * scale).all()


def test_polynomials_end_in_exact_zeros() -> None:
    x, v = points(3), points(3, seed=1)
    f = lambda x: 2 * x**5 - x**3 + 7  # noqa: E731
    got = jet(f, x, v, 20)
    expected = [
        f(x),
        (10 * x**4 - 3 * x**2) * v,
        (40 * x**3 - 6 * x) * v**2,
        (120 * x**2 - 6) * v**3,
        240 * x * v**4,
        240 * v**5,
    ]
    assert_all_close(got[:6], expected, rtol=1e-13, atol=1e-12)
    assert all((d == 0).all() for d in got[6:])


@pytest.mark.parametrize("n", range(8))
def test_integer_powers_at_zero_are_exact(n: int) -> None:
    for f in (lambda x: x**n, lambda x: x.pow(float(n)), lambda x: torch.pow(x, torch.tensor(n))):
        got = jet(f, ZERO, ONE, 10)
        expected = [0.0 if k != n else math.factorial(n) for k in range(11)]
        assert [d.item() for d in got] == expected


def test_products_of_series() -> None:
    """By Leibniz, from the derivatives of the factors."""
    x, v = points(4), points(4, seed=1)
    a, b = jet(torch.sin, x, v, 12), jet(torch.exp, x, v, 12)
    expected = [sum(math.comb(k, j) * a[j] * b[k - j] for j in range(k + 1)) for k in range(13)]
    assert_all_close(jet(lambda x: x.sin() * x.exp(), x, v, 12), expected, rtol=1e-10)


# ------------------------------------------------------------------------------ contract


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0,), (2, 0), (2, 3, 1)])
def test_every_output_has_the_shape_of_the_value(shape: tuple[int, ...]) -> None:
    x, v = points(*shape), points(*shape, seed=1)
    for f in (torch.exp, lambda x: x, lambda x: x * 0, lambda x: x.sum(), lambda x: x[None] * x):
        value = f(x)
        for order in (0, 1, 3):
            got = jet(f, x, v, order)
            assert len(got) == order + 1
            assert all(d.shape == value.shape and d.dtype == value.dtype for d in got)
            assert type(got) is tuple
            assert all(type(d) is Tensor for d in got)
            torch.testing.assert_close(got[0], value)


def test_order_zero_is_the_value_alone() -> None:
    x = points(3)
    (value,) = jet(torch.exp, x, x, 0)
    assert torch.equal(value, x.exp())


def test_a_constant_has_zero_derivatives() -> None:
    x, constant = points(3), points(2, 2)
    got = jet(lambda _: constant, x, x, 3)
    assert torch.equal(got[0], constant)
    assert all(torch.equal(d, torch.zeros(2, 2).double()) for d in got[1:])


def test_dicts() -> None:
    x = {"a": points(2, 3), "b": points(3, seed=1)}
    v = {"b": points(3, seed=2), "a": points(2, 3, seed=3)}  # whatever the order of the names
    f = lambda x: (x["a"] * x["b"].exp()).tanh().sum(0)  # noqa: E731
    assert_all_close(jet(f, x, v, 4), nested(f, x, {k: v[k] for k in x}, 4))


@pytest.mark.parametrize(
    ("v", "text"),
    [
        (torch.zeros(2), r"jet: expected v like x, \(3,\) torch.float32 on cpu, got \(2,\)"),
        (torch.zeros(3).double(), r"jet: expected v like x, .* got \(3,\) torch.float64 on cpu"),
        (torch.zeros(3, device="meta"), "jet: expected v like x, .* on meta"),
        ({"a": torch.zeros(3)}, r"jet: expected v to have exactly the names of x, got \['a'\]"),
    ],
)
def test_a_direction_unlike_x(v: Any, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        jet(torch.exp, torch.zeros(3), v, 2)


def test_a_direction_of_other_names_or_another_shape_in_a_dict() -> None:
    x = {"a": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"exactly the names of x, got \['b'\] for \['a'\]"):
        jet(lambda x: x["a"], x, {"b": torch.zeros(3)}, 2)
    with pytest.raises(ValueError, match=r"jet: .*got a tensor for \['a'\]"):
        jet(lambda x: x["a"], x, torch.zeros(3), 2)
    with pytest.raises(ValueError, match=r"jet, 'a': expected v like x, \(3,\)"):
        jet(lambda x: x["a"], x, {"a": torch.zeros(2)}, 2)


@pytest.mark.parametrize("x", [torch.arange(3), torch.ones(3).bool(), 1.0, [torch.ones(3)]])
def test_what_is_not_floating_point(x: Any) -> None:
    with pytest.raises(
        TypeError, match=r"jet: expected x to be a floating-point or complex tensor"
    ):
        jet(lambda x: x, x, x, 2)


@pytest.mark.parametrize("order", [-1, 1.5, "2", None])
def test_what_is_no_order(order: Any) -> None:
    with pytest.raises(ValueError, match="jet: expected an order of 0 or more, got"):
        jet(torch.exp, torch.ones(3), torch.ones(3), order)


@pytest.mark.parametrize("result", [None, 1.0, (torch.ones(3),), {"a": torch.ones(3)}])
def test_f_that_returns_no_tensor(result: Any) -> None:
    with pytest.raises(TypeError, match="jet: expected f to return one tensor, got"):
        jet(lambda x: result, torch.ones(3), torch.ones(3), 2)


# ------------------------------------------------------------------------------ refusals


def written(x: Tensor) -> Tensor:
    result = torch.empty(3)
    torch.exp(x, out=result)
    return result


def test_a_result_written_to_out_is_refused() -> None:
    x = torch.ones(3)
    with pytest.raises(NotImplementedError, match=r"jet: torch\.exp modifies .* in place"):
        jet(written, x, x, 2)


@pytest.mark.parametrize(
    ("f", "name"),
    [
        (lambda x: torch.igamma(x, x), "igamma"),
        (lambda x: F.ctc_loss(x, x, x, x), "ctc_loss"),
        (torch.linalg.lu_factor, "linalg.*lu_factor"),
        (lambda x: torch.linalg.householder_product(x, x[0]), "householder_product"),
        (torch.unique, "unique"),
        (lambda x: x.clone().exponential_(), "exponential_"),
        (lambda x: torch.special.zeta(x, x), "zeta"),
        (lambda x: x.clone().resize_(4), "resize_"),
        (lambda x: x.clone().unsqueeze_(0), "unsqueeze_"),
    ],
)
def test_an_operation_without_a_rule_is_named(f: Callable[[Tensor], Tensor], name: str) -> None:
    x = points(2, 2) + 3
    remedy = "has no rule.*(@jet_rule|returns a new tensor)"
    with pytest.raises(NotImplementedError, match=rf"jet: [\w.]*({name}).* {remedy}"):
        jet(f, x, x, 2)


class Cube(Function):
    """Without a rule."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x**3

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad_output


class OldCube(Function):
    """With the context in forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad_output


def backward_within(x: Tensor) -> Tensor:
    y = (x**2).sum()
    y.backward()
    return y


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "func.grad": grad(lambda z: (z**3).sum()),
    "func.grad of a closure": lambda x: grad(lambda z: (z * x**3).sum())(torch.ones(3)),
    "func.jvp": lambda x: jvp(torch.sin, (x,), (x,))[1],
    "func.jvp along it": lambda x: jvp(torch.sin, (torch.ones(3),), (x,))[1],
    "vmap": vmap(torch.sin),
    "vmap of a closure": lambda x: vmap(lambda z: z * x)(torch.ones(2, 3)),
    "func.hessian": hessian(lambda z: (z**3).sum()),
    "func.vjp of a closure": lambda x: vjp(lambda z: z * x, torch.ones(3))[1](torch.ones(3))[0],
    "func.jacrev of a closure": lambda x: jacrev(lambda z: z * x)(torch.ones(3)),
    "func.jacfwd of a closure": lambda x: jacfwd(lambda z: z * x)(torch.ones(3)),
    "func.hessian of a closure": lambda x: hessian(lambda z: (z**2 * x).sum())(torch.ones(3)),
    "functional.jacobian": lambda x: functional.jacobian(lambda z: z * x, torch.ones(3)),
    "functional.hessian": lambda x: functional.hessian(lambda z: (z**2 * x).sum(), torch.ones(3)),
    "functional.vjp": lambda x: functional.vjp(lambda z: (z**2 * x).sum(), torch.ones(3))[1],
    "functional.jvp": lambda x: functional.jvp(lambda z: z * x, torch.ones(3), torch.ones(3))[1],
    "deepcopy": copy.deepcopy,
    "pickle": lambda x: pickle.loads(pickle.dumps(x)),
    "Parameter": nn.Parameter,
    "autograd.grad": lambda x: torch.autograd.grad((x**2).sum(), x)[0],
    "backward": backward_within,
    "requires_grad_": lambda x: x.requires_grad_(),
    "numpy": lambda x: torch.from_numpy(x.numpy()),
    "Function": Cube.apply,
    "old Function": OldCube.apply,
    "jet": lambda x: jet(torch.sin, x, torch.ones(3), 1)[1],
    "jet of a closure": lambda x: jet(lambda z: z * x, torch.ones(3), torch.ones(3), 1)[1],
    "laplacian": lambda x: laplacian(lambda z: (z * x).sum(), torch.ones(3)),
    "to_sparse": lambda x: x.to_sparse().to_dense(),
    "dlpack": torch.from_dlpack,
    "dual": lambda x: forward_ad.make_dual(x, x),
    "view of another dtype": lambda x: x.view(torch.int32),
}


@pytest.mark.parametrize("record", [True, False], ids=["recording", "no_grad"])
@pytest.mark.parametrize("name", REFUSED)
def test_refused_and_never_silent(name: str, record: bool) -> None:
    for x in (torch.ones(3), torch.ones(3, requires_grad=True)):
        with (
            torch.set_grad_enabled(record),
            pytest.raises((NotImplementedError, RuntimeError, TypeError)),
        ):
            jet(REFUSED[name], x, torch.ones(3), 2)


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("record", [True, False], ids=["recording", "no_grad"])
def test_a_compiled_function_inside_f_is_right_or_raises(record: bool) -> None:
    x, v = points(3), points(3, seed=1)
    try:
        with torch.set_grad_enabled(record):
            got = jet(torch.compile(lambda z: z.sin(), backend="eager"), x, v, 3)
    except (NotImplementedError, RuntimeError):
        return
    finally:
        torch._dynamo.reset()
    assert_all_close(got, nested(torch.sin, x, v, 3))


LINEAR = nn.Linear(2, 1, dtype=torch.float64)
COMPILED = {
    "jet": lambda x: torch.stack(jet(lambda q: q.norm(), x[0], x[1], 2)),
    "laplacian": lambda x: laplacian(lambda q: q.tanh().sum(), x[0]),
    "laplacian, vmapped": torch.vmap(lambda q: laplacian(lambda q: q.norm(), q)),
    "derivative_tower": lambda x: derivative_tower(LINEAR, lambda y, _: y.sum(), x, None).values,
}


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
@pytest.mark.parametrize("fullgraph", [False, True])
@pytest.mark.parametrize("name", COMPILED)
def test_under_compile_it_refuses(name: str, fullgraph: bool) -> None:
    """Dynamo would compile f, and ignore what follows its values (pytorch#176679)."""
    torch._dynamo.reset()
    compiled = torch.compile(COMPILED[name], backend="eager", fullgraph=fullgraph)
    operation = name.partition(",")[0]
    with pytest.raises(Exception, match=f"{operation}: expected .*make_fx") as caught:
        compiled(points(2, 2))
    assert fullgraph or caught.type is NotImplementedError
    assert COMPILED[name](points(2, 2)).isfinite().all()  # outside, it goes on


@pytest.mark.parametrize("record", [True, False], ids=["recording", "no_grad"])
@pytest.mark.parametrize("function", [Cube, OldCube])
def test_a_function_without_a_rule_says_what_to_do(function: type[Function], record: bool) -> None:
    x = torch.ones(3)
    with (
        torch.set_grad_enabled(record),
        pytest.raises(NotImplementedError, match=r"jet: .*torch.autograd.Function.*@jet_rule"),
    ):
        jet(function.apply, x, x, 2)


@pytest.mark.parametrize("name", ["jet", "jet of a closure"])
def test_calls_cannot_be_nested(name: str) -> None:
    with pytest.raises(NotImplementedError, match="nested"):
        jet(REFUSED[name], torch.ones(3), torch.ones(3), 2)


def test_hooks_see_the_gradient_and_may_not_change_it() -> None:
    seen: list[Tensor] = []
    x, v = points(3), points(3, seed=1)

    def hooked(hook: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
        def f(x: Tensor) -> Tensor:
            y = x.sin()
            y.register_hook(hook)
            return y**2

        return f

    jet(hooked(seen.append), x.clone().requires_grad_(), v, 0)[0].sum().backward()
    torch.testing.assert_close(seen[0], 2 * x.sin())
    total = sum(jet(hooked(lambda grad: 2 * grad), x.clone().requires_grad_(), v, 2)).sum()
    with pytest.raises(NotImplementedError, match="jet: a hook that changes the gradient"):
        total.backward()


# ------------------------------------------------------------------------------ rules added


@pytest.fixture
def rules() -> Iterator[None]:
    kept = dict(dispatch.RULES)
    yield
    dispatch.RULES.clear()
    dispatch.RULES.update(kept)


@pytest.mark.usefixtures("rules")
def test_one_decorated_function_adds_a_rule() -> None:
    x = torch.tensor([[2.0, 0.5], [0.3, 1.0]]).double()

    @jet_rule(torch.cumprod)
    def cumprod(x: Tensor, dim: int) -> Tensor:
        rows = [x.select(dim, 0)]
        for i in range(1, x.shape[dim]):
            rows.append(rows[-1] * x.select(dim, i))
        return torch.stack(rows, dim)

    for f in (lambda x: torch.cumprod(x, 1), lambda x: x.cumprod(1)):
        assert_all_close(jet(f, x, x, 4), nested(f, x, x, 4))
    assert cumprod(x, 1).equal(x.cumprod(1))  # the decorator leaves it as it is


def test_an_added_rule_is_gone_again() -> None:
    assert dispatch.RULES[torch.cumprod].__module__.startswith("autograd_lib")


@pytest.mark.usefixtures("rules")
def test_a_rule_by_its_derivative() -> None:
    @jet_rule(torch.sinc, derivative=True)
    def slope(x: Tensor) -> Tensor:
        return (torch.cos(math.pi * x) - torch.sinc(x)) / x

    x, v = points(3) + 3, points(3, seed=1)
    written_out = lambda x: torch.sin(math.pi * x) / (math.pi * x)  # noqa: E731
    assert_all_close(jet(torch.sinc, x, v, 4), nested(written_out, x, v, 4), rtol=1e-8)
    leaf = x.clone().requires_grad_()
    (got,) = torch.autograd.grad(sum(d.sum() for d in jet(torch.sinc, leaf, v, 3)), leaf)
    total = lambda x: sum(d.sum() for d in nested(written_out, x, v, 3))  # noqa: E731
    torch.testing.assert_close(got, grad(total)(x), rtol=1e-8, atol=1e-8)


def ruled_cube(derivative: bool) -> type[Function]:
    class Ruled(Cube):
        pass

    if derivative:
        jet_rule(Ruled, derivative=True)(lambda x: 3 * x**2)
    else:
        jet_rule(Ruled)(lambda x: x**3)
    return Ruled


@pytest.mark.parametrize("derivative", [False, True])
def test_a_rule_for_a_function(derivative: bool) -> None:
    ruled, x, v = ruled_cube(derivative), points(3), points(3, seed=1)
    got = jet(lambda x: ruled.apply(x.sin()), x, v, 4)
    assert_all_close(got, nested(lambda x: x.sin() ** 3, x, v, 4))
    with torch.no_grad():
        assert_all_close(jet(lambda x: ruled.apply(x.sin()), x, v, 4), got)
    leaf = x.clone().requires_grad_()  # and it is the Function still, for what is not followed
    (gradient,) = torch.autograd.grad(ruled.apply(leaf).sum(), leaf)
    torch.testing.assert_close(gradient, 3 * x**2)
    with pytest.raises(NotImplementedError):
        jet(Cube.apply, x, v, 2)


def test_jet_rule_of_what_cannot_be_called() -> None:
    with pytest.raises(TypeError, match=r"jet_rule: expected functions, .* got 'exp'"):
        jet_rule("exp")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ constants


def under_no_grad(x: Tensor) -> Tensor:
    with torch.no_grad():
        c = x.sin()
    return c * x.exp()


CONSTANT: dict[str, Callable[[Tensor], Tensor]] = {
    "no_grad": under_no_grad,
    "detach": lambda x: x.sin().detach() * x.exp(),
    "data": lambda x: x.sin().data * x.exp(),
    "item": lambda x: x.sin()[0].item() * x.exp(),
    "tolist": lambda x: torch.tensor(x.sin().tolist(), dtype=x.dtype) * x.exp(),
    "float": lambda x: float(x.sin()[1]) * x.exp(),
}


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True:UserWarning")
@pytest.mark.parametrize("name", CONSTANT)
def test_what_is_constant(name: str) -> None:
    x, v = points(3), points(3, seed=1)
    f = CONSTANT[name]
    c = f(x) / x.exp()
    for leaf in (x, x.clone().requires_grad_()):
        got = [d.detach() for d in jet(f, leaf, v, 4)]
        assert_all_close(got, [c * x.exp() * v**k for k in range(5)])
    if name == "detach":
        assert_all_close(jet(f, x, v, 4), nested(f, x, v, 4))


@pytest.mark.parametrize(
    "convert",
    [
        lambda x: x.long(),
        lambda x: x.bool(),
        lambda x: x.to(torch.int64),
        lambda x: x.to(torch.bool),
        lambda x: x.to(dtype=torch.int32, copy=True),
        lambda x: x.type_as(torch.ones(1).long()),
        lambda x: x.type(torch.int64),
        lambda x: x.sum(dtype=torch.int64),
    ],
)
def test_integers_are_constant(convert: Callable[[Tensor], Tensor]) -> None:
    x, v = points(3) + 5, points(3, seed=1) * 3
    c = convert(x)
    got = jet(lambda x: convert(x) * x, x, v, 2)
    assert_all_close(got, [c * x, c * v, torch.zeros(3).double()])
    index = jet(lambda x: torch.arange(90)[convert(x).long()] * x, x, v, 1)
    assert_all_close(index[1:], [torch.arange(90)[c.long()] * v])


def test_branches_see_the_value() -> None:
    x, v = points(5), points(5, seed=1)
    f = lambda x: x.exp() if x.sum() > 100 else x.sin() if (x < 0).any() else x  # noqa: E731
    assert_all_close(jet(f, x, v, 3), nested(torch.sin, x, v, 3))
    assert repr(ONE) in str(jet(lambda x: (str(x), x)[1], ONE, ONE, 1)[0])


# ------------------------------------------------------------------------------ gradients


def network(x: Tensor, w: Tensor) -> Tensor:
    return torch.log_softmax(torch.tanh(x @ w) @ w.mT / x.square().sum(), -1) * x


@pytest.mark.parametrize("device", DEVICES)
def test_reverse_over_taylor(device: str) -> None:
    """With respect to x, v and what f closes over, of a nonlinear scalar of all orders."""
    x, v, w = (points(*s, seed=i).to(device) for i, s in enumerate([(2, 3), (2, 3), (3, 4)]))

    def scalar(outputs: Any) -> Tensor:
        return sum((d.sin() * (k + 1)).sum() for k, d in enumerate(outputs))

    def by_jet(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return scalar(jet(lambda x: network(x, w), x, v, 3))

    def by_nesting(x: Tensor, v: Tensor, w: Tensor) -> Tensor:
        return scalar(nested(lambda x: network(x, w), x, v, 3))

    expected = grad(by_nesting, (0, 1, 2))(x, v, w)
    leaves = [t.clone().requires_grad_() for t in (x, v, w)]
    assert_all_close(torch.autograd.grad(by_jet(*leaves), leaves), expected)
    assert_all_close(grad(by_jet, (0, 1, 2))(x, v, w), expected)
    for i in range(3):  # alone, the others without gradient
        alone = [x, v, w]
        alone[i] = leaves[i]
        assert_all_close(torch.autograd.grad(by_jet(*alone), leaves[i]), expected[i : i + 1])
    for leaf in leaves:
        leaf.grad = None
    by_jet(*leaves).backward()
    assert_all_close([leaf.grad for leaf in leaves], expected)


def composition(x: Tensor, w: Tensor) -> Tensor:
    y = F.conv1d(x.exp()[None], w[:, None]).relu() + x.sum().sqrt()
    return torch.einsum("ij,kj->ik", y[0], y[0].softmax(-1)) / (1 + x.mean() ** 2)


@pytest.mark.parametrize(
    "f",
    [composition, network, lambda x, w: (x @ w).logsumexp(-1).cos(), lambda x, w: x**2.5 * w.sum()],
    ids=["composition", "network", "logsumexp", "power"],
)
def test_gradcheck_and_gradgradcheck(f: Callable[[Tensor, Tensor], Tensor]) -> None:
    x, v = points(1, 4).abs() + 0.5, points(1, 4, seed=1)
    w = points(2, 2, seed=2) if f is composition else points(4, 2, seed=2)
    leaves = [t.requires_grad_() for t in (x, v, w)]

    def outputs(x: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return jet(lambda x: f(x, w), x, v, 2)

    assert gradcheck(outputs, leaves)
    assert gradgradcheck(outputs, leaves)


def test_third_derivatives_through_jet() -> None:
    x, v, w = (points(*s, seed=i) for i, s in enumerate([(2, 3), (2, 3), (3, 4)]))

    def third(way: Callable[..., Any]) -> Tensor:
        def f(s: Tensor) -> Tensor:
            return sum(d.sum() for d in way(lambda x: network(x, w), x + s * v, v, 2))

        return grad(grad(grad(f)))(ZERO)

    torch.testing.assert_close(third(jet), third(nested), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("device", DEVICES)
def test_vmap_over_x_and_v_is_a_loop(device: str) -> None:
    x, v, w = (points(*s, seed=i).to(device) for i, s in enumerate([(5, 2, 3), (5, 2, 3), (3, 4)]))

    def outputs(x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return jet(lambda x: network(x, w), x, v, 3)

    for dims in ((0, 0), (0, None), (None, 0)):
        inputs = [(t if d == 0 else t[0]) for t, d in zip((x, v), dims, strict=True)]
        got = vmap(outputs, dims)(*inputs)
        rows = [
            outputs(*[t[i] if d == 0 else t for t, d in zip(inputs, dims, strict=True)])
            for i in range(5)
        ]
        assert_all_close(got, [torch.stack(column) for column in zip(*rows, strict=True)])

    def scalar(x: Tensor, v: Tensor) -> Tensor:
        return sum(d.square().sum() for d in outputs(x, v))

    got = vmap(grad(scalar, (0, 1)))(x, v)
    rows = [grad(scalar, (0, 1))(x[i], v[i]) for i in range(5)]
    assert_all_close(got, [torch.stack(column) for column in zip(*rows, strict=True)])
    got = vmap(lambda w: jet(lambda x: network(x, w), x[0], v[0], 3))(torch.stack([w, w.cos()]))
    rows = [jet(lambda x, w=w: network(x, w), x[0], v[0], 3) for w in (w, w.cos())]
    assert_all_close(got, [torch.stack(column) for column in zip(*rows, strict=True)])


def test_forward_mode_over_jet_is_right_or_raises() -> None:
    x, v, u, w = (points(*s, seed=i) for i, s in enumerate([(2, 3)] * 3 + [(3, 4)]))
    expected = jvp(lambda x: tuple(nested(lambda x: network(x, w), x, v, 2)), (x,), (u,))[1]
    try:
        got = jvp(lambda x: jet(lambda x: network(x, w), x, v, 2), (x,), (u,))[1]
    except (NotImplementedError, RuntimeError):
        return
    assert_all_close(got, expected)


# ------------------------------------------------------------------------------ models


def parameters(model: nn.Module, seed: int = 7) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    x = {k: p.detach() for k, p in model.named_parameters()}
    return x, {k: points(*p.shape, seed=seed + i) for i, (k, p) in enumerate(x.items())}


def test_a_module_through_functional_call() -> None:
    model, inputs = mlp().double(), points(5, 8)
    x, v = parameters(model)
    f = lambda p: F.mse_loss(functional_call(model, p, (inputs,)), inputs.sin())  # noqa: E731
    assert_all_close(jet(f, x, v, 5), nested(f, x, v, 5), rtol=1e-8)


def test_checkpointing_inside_f() -> None:
    """Under a gradient: checkpoint runs its function a second time in backward."""
    x, v, w = (points(*s, seed=i) for i, s in enumerate([(2, 3), (2, 3), (3, 4)]))

    def total(x: Tensor, w: Tensor, recompute: bool) -> Tensor:
        def f(x: Tensor) -> Tensor:
            if recompute:
                return checkpoint(network, x, w, use_reentrant=False)
            return network(x, w)

        return sum(d.sin().sum() for d in jet(f, x, v, 3))

    leaves = [t.clone().requires_grad_() for t in (x, w)]
    got, expected = (torch.autograd.grad(total(*leaves, r), leaves) for r in (True, False))
    assert_all_close(got, expected, rtol=1e-12)
    torch.testing.assert_close(total(x, w, True), total(x, w, False))


def test_tied_parameters() -> None:
    model, tokens = TiedLanguageModel().double(), torch.tensor([[1, 2, 3], [3, 4, 10]])
    x, v = parameters(model)
    assert list(x) == ["embedding.weight"]

    def f(p: Mapping[str, Tensor]) -> Tensor:
        logits = functional_call(model, dict(p), (tokens,))
        return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())

    def written_out(p: Mapping[str, Tensor]) -> Tensor:
        w = p["embedding.weight"]
        logits = w[tokens.flatten()] @ w.mT
        return (logits.exp().sum(-1).log() - logits[range(6), tokens.flatten()]).mean()

    assert_all_close(jet(f, x, v, 4), nested(written_out, x, v, 4), rtol=1e-8)


def test_dropout_has_one_mask_for_all_orders() -> None:
    x = points(1000).abs() + 1
    for f in (
        F.dropout,
        nn.Dropout(0.5),
        lambda x: F.dropout1d(x.view(10, 50, 2)).flatten(),
        lambda x: F.dropout2d(x.view(10, 20, 5, 1)).flatten(),
        lambda x: F.dropout3d(x.view(10, 20, 5, 1, 1)).flatten(),
    ):
        torch.manual_seed(0)
        value, first, second = jet(lambda x, f=f: f(x.exp()), x, torch.ones_like(x), 2)
        kept = value != 0
        assert 200 < kept.sum() < 800
        torch.testing.assert_close(first, value)
        torch.testing.assert_close(second, value)
        torch.testing.assert_close(value[kept], 2 * x.exp()[kept])


def test_dropout_in_attention_has_one_mask_for_all_orders() -> None:
    q, v = points(30, 4), torch.eye(30).double()
    attend = F.scaled_dot_product_attention
    value, first = jet(lambda v: attend(q, q, v, dropout_p=0.5), v, v, 1)
    torch.testing.assert_close(first, value)  # linear in v, with one mask
    kept = value != 0
    assert 300 < kept.sum() < 600
    torch.testing.assert_close(value[kept], 2 * attend(q, q, v)[kept])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_reduced_precision_is_near(dtype: torch.dtype, device: str) -> None:
    x, v, w = (points(*s, seed=i) / 2 for i, s in enumerate([(4, 3), (4, 3), (3, 5)]))

    def f(x: Tensor, w: Tensor) -> Tensor:
        y = F.gelu(F.layer_norm(x @ w, (5,)))
        return F.silu(y).softmax(-1).logsumexp(-1) + y.tanh().exp().mean(-1)

    exact = jet(lambda x: f(x, w), x, v, 2)
    a, b, c = (t.to(device, dtype) for t in (x, v, w))
    got = jet(lambda x: f(x, c), a, b, 2)
    assert all(d.dtype == dtype for d in got)
    tolerance = 40 * torch.finfo(dtype).eps
    for a, b in zip(got, exact, strict=True):
        assert (a.cpu().double() - b).abs().max() <= tolerance * max(1, b.abs().max().item())


@pytest.mark.parametrize("device", DEVICES)
def test_complex(device: str) -> None:
    x, v = (
        torch.complex(points(3, 3, seed=i), points(3, 3, seed=i + 2)).to(device) for i in (0, 1)
    )
    close = {"rtol": 1e-11, "atol": 1e-11}
    assert_all_close(jet(torch.exp, x, v, 6), [x.exp() * v**k for k in range(7)], **close)
    shifted = [
        (torch.sin, torch.cos, lambda x: -x.sin(), lambda x: -x.cos())[k % 4](x) * v**k
        for k in range(7)
    ]
    assert_all_close(jet(torch.sin, x, v, 6), shifted, **close)
    product = [x @ x, x @ v + v @ x, 2 * v @ v, 0 * x]
    assert_all_close(jet(lambda x: x @ x, x, v, 3), product, **close)
    falling = [math.prod(2.5 - j for j in range(k)) * x ** (2.5 - k) * v**k for k in range(5)]
    assert_all_close(jet(lambda x: x**2.5, x, v, 4), falling, rtol=1e-10, atol=1e-9)
    powers = [x**3, 3 * x**2 * v, 6 * x * v**2, 6 * v**3, 0 * x]
    assert_all_close(jet(lambda x: x**3, x, v, 4), powers, **close)
    hyperbolic = [x.tanh(), (1 - x.tanh() ** 2) * v, -2 * x.tanh() * (1 - x.tanh() ** 2) * v**2]
    assert_all_close(jet(torch.tanh, x, v, 2), hyperbolic, rtol=1e-9, atol=1e-9)


# name -> (function, shape of x, shape of w)
COMPLEX: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], tuple[int, ...], tuple[int, ...]]] = {
    "product": (lambda x, w: x.exp() * w, (2, 2), (2, 2)),
    "division": (lambda x, w: x.sin() / (w + 3), (2, 2), (2,)),
    "matmul": (lambda x, w: (x @ w).sin(), (2, 2), (2, 2)),
    "matmul, the other way": (lambda x, w: (w @ x).sin(), (2, 2), (2, 2)),
    "matmul of batches": (lambda x, w: x @ w, (2, 2, 2), (2, 2, 2)),
    "matmul, broadcast": (lambda x, w: x @ w, (2, 1, 2, 2), (3, 2, 2)),
    "matmul, broadcast otherwise": (lambda x, w: w @ x, (3, 2, 2), (2, 1, 2, 2)),
    "matmul of series": (lambda x, w: x.exp() @ (x * w).sin(), (2, 2), (2, 2)),
    "matmul of series, broadcast": (
        lambda x, w: x.exp() @ (x.sum(0) * w[0, 0]).sin(),
        (2, 2, 2),
        (3, 1, 2, 2),
    ),
    "linear": (lambda x, w: F.linear(x.exp(), w, w.sum(-1)), (3, 2), (2, 2)),
    "einsum": (lambda x, w: torch.einsum("ij,kj->ik", x.exp(), w * x), (2, 2), (2, 2)),
    "power": (lambda x, w: (x + 2) ** 1.5 * w, (2,), (2,)),
}


@pytest.mark.parametrize("name", COMPLEX)
def test_gradients_of_complex_values(name: str) -> None:
    f, *shapes = COMPLEX[name]
    leaves = [
        (torch.complex(points(*shape, seed=i), points(*shape, seed=i + 3)) / 2).requires_grad_()
        for i, shape in enumerate((shapes[0], *shapes))
    ]
    x, v, w = (leaf.detach() for leaf in leaves)
    for order in (1, 3):
        assert gradcheck(
            lambda x, v, w, n=order: jet(lambda x: f(x, w), x, v, n), leaves, fast_mode=True
        )
        expected = nested(lambda t: f(x + t * v, w), ZERO, ONE, order)
        assert_all_close(jet(lambda x: f(x, w), x, v, order), expected, rtol=1e-8)


@pytest.mark.parametrize("f", [torch.abs, torch.sgn, torch.angle])
def test_functions_that_are_not_analytic_along_a_real_direction(f: Any) -> None:
    x, v = torch.complex(points(3), points(3, seed=1)) + 3, torch.complex(points(3), points(3))
    length = lambda t: ((x + t * v).real ** 2 + (x + t * v).imag ** 2).sqrt()  # noqa: E731
    by_hand: dict[Any, Callable[[Tensor], Tensor]] = {
        torch.abs: length,
        torch.sgn: lambda t: (x + t * v) / length(t),
        torch.angle: lambda t: torch.atan((x + t * v).imag / (x + t * v).real),
    }
    assert (x.real > 0).all()
    assert_all_close(jet(f, x, v, 4), nested(by_hand[f], ZERO, ONE, 4), rtol=1e-9)


# ------------------------------------------------------------------------------ traced


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")
def test_make_fx_and_compile() -> None:
    x, v, w = (points(*s, seed=i) for i, s in enumerate([(2, 3), (2, 3), (3, 4)]))

    def outputs(x: Tensor, v: Tensor) -> tuple[Tensor, ...]:
        return jet(lambda x: network(x, w), x, v, 4)

    graph = make_fx(outputs)(x, v)
    assert_all_close(graph(x, v), outputs(x, v), rtol=1e-12)
    assert_all_close(graph(v, x), outputs(v, x), rtol=1e-12)  # nothing of x is baked in
    small = make_fx(lambda x, v: jet(lambda x: (x @ w).tanh().sum(), x, v, 4))(x, v)
    try:
        assert_all_close(torch.compile(small)(v, x), small(v, x), rtol=1e-10)
    finally:
        torch._dynamo.reset()


# ------------------------------------------------------------------------------ counted cost


def flops(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("order", [0, 1, 2, 4, 8])
def test_constant_weights_cost_a_forward_for_each_order(order: int) -> None:
    model, x = mlp(), torch.randn(5, 8)
    forward = flops(lambda: model(x))
    with torch.no_grad():
        assert flops(lambda: jet(model, x, x, 0)) == forward
        # the first layer has two coefficients only, as its input has
        first, rest = forward // 3, forward * 2 // 3
        got = flops(lambda: jet(model, x, x, order))
    assert got == min(order + 1, 2) * first + (order + 1) * rest


@pytest.mark.parametrize("order", [1, 2, 4, 8])
def test_weights_along_the_direction_cost_two_products_for_each_order(order: int) -> None:
    model, inputs = mlp(), torch.randn(5, 8)
    x = {k: p.detach() for k, p in model.named_parameters()}
    v = {k: torch.randn_like(p) for k, p in x.items()}
    layer = flops(lambda: model(inputs)) // 3
    got = flops(lambda: jet(lambda p: functional_call(model, p, (inputs,)), x, v, order))
    # a constant input by two coefficients of weights, then a whole series by two
    assert got == 2 * layer + 2 * (2 * order + 1) * layer


def test_convolutions_and_attention_cost_a_forward_for_each_order() -> None:
    conv, x = nn.Conv2d(3, 4, 3), torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        forward = flops(lambda: conv(x))
        assert flops(lambda: jet(lambda x: conv(x.sin()), x, x, 6)) == 7 * forward
        e, w = torch.randn(4, 3), torch.randn(3, 5)
        product = flops(lambda: e @ w)
        assert (
            flops(lambda: jet(lambda e: torch.einsum("ij,jk", e.exp(), w), e, e, 6)) == 7 * product
        )
        # two series: half a square
        both = flops(lambda: jet(lambda e: e.exp() @ e.mT.exp(), e, e, 6))
        assert both == 28 * flops(lambda: e @ e.mT)


def test_constants_are_not_computed_with() -> None:
    a, b = torch.randn(4, 4), torch.randn(4, 4)
    product = flops(lambda: a @ b)
    with torch.no_grad():
        assert flops(lambda: jet(lambda x: x.detach() @ b + x, a, a, 8)) == product
        assert flops(lambda: jet(lambda x: x @ b, a, a, 8)) == 2 * product
        assert flops(lambda: jet(lambda x: x @ x @ b, a, a, 8)) == (4 + 3) * product


# ------------------------------------------------------------------------------ the laplacian ring

LAPLACIANS: dict[str, Callable[[Tensor], Tensor]] = {
    "product": lambda x: (x * x.flip(0) * x.roll(1)).sum(),
    "elementary": lambda x: (x.sin() * 2).exp().sum() + x.square().add(1).log().sum().tanh(),
    "logsumexp": lambda x: torch.logsumexp(x.sin() * 3, 0),
    "softmax": lambda x: (x.softmax(0) * x).sum() + x.log_softmax(0)[1],
    "masked": lambda x: torch.logsumexp(torch.where(x > 0, x.exp(), -math.inf), 0),
    "contraction": lambda x: (torch.outer(x, x.cos()) @ x).tanh().sum(),
    "linear": lambda x: x.sum(),
    "by pieces": lambda x: torch.where(x > 0, x**3, x.exp()).sum() + F.relu(x**3).sum(),
    "root": lambda x: (x.square().sum() + 1).sqrt() + (x.square() + 2).pow(-1.5).prod(),
    "quotient": lambda x: (x / (1 + x.square().sum())).prod() + (1 / (x + 9)).sum(),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", LAPLACIANS)
def test_laplacian_ring(name: str, device: str) -> None:
    f, x = LAPLACIANS[name], points(5).to(device)
    expected = hessian(f)(x).diagonal().sum()
    torch.testing.assert_close(laplacian(f, x), expected, rtol=1e-10, atol=1e-10)
    rows = torch.stack([x, x.cos(), x + 1])
    torch.testing.assert_close(
        vmap(lambda x: laplacian(f, x))(rows), torch.stack([laplacian(f, row) for row in rows])
    )
    if name != "masked":  # where both of its ways have a finite gradient
        got, slope = grad(lambda x: laplacian(f, x))(x), grad(lambda x: hessian(f)(x).trace())(x)
        torch.testing.assert_close(got, slope, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------ what readers met


@pytest.mark.parametrize(("dtype", "order"), [(torch.float32, 36), (torch.float64, 175)])
def test_a_factorial_beyond_the_dtype(dtype: torch.dtype, order: int) -> None:
    x, v = torch.tensor(0.5, dtype=dtype), torch.tensor(1.0, dtype=dtype)
    found = jet(torch.sin, x, v, order)[order].item()
    assert found == pytest.approx(math.sin(0.5 + order * math.pi / 2), rel=1e-2)  # a denormal's


def test_errors_name_what_met_the_value() -> None:
    x = torch.ones(2)
    with pytest.raises(NotImplementedError, match="put the gradient around jet"):
        jet(lambda x: torch.autograd.grad(x.sum(), x)[0], x, x, 1)
    with pytest.raises(TypeError, match="expected functions"):
        jet_rule()
    layer = nn.Linear(2, 1)
    layer.register_full_backward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="BackwardHookFunction"):
        jet(layer, x, x, 1)
