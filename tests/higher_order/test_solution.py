"""Taylor coefficients of solutions against closed forms and nested forward differentiation."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacfwd, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from autograd_lib import taylor_solution
from autograd_lib.higher_order.solution import RightHandSide

Field = Callable[..., Tensor]


def wide(*values: Any) -> Tensor:
    return torch.tensor(values[0] if len(values) == 1 else values, dtype=torch.float64)


def nested(f: Field, y0: Tensor, order: int, t: float = 0.0) -> Tensor:
    """The derivatives of f along its own solution, each by one more forward differentiation."""

    def along(g: Field) -> Field:
        return lambda t, y: jvp(g, (t, y), (torch.ones_like(t), f(t, y)))[1]

    start, g, found = wide(t), f, [y0]
    for k in range(1, order + 1):
        found.append(g(start, y0) / math.factorial(k))
        g = along(g)
    return torch.stack(found)


def lotka_volterra(t: Tensor, y: Tensor, p: Tensor | None = None) -> Tensor:
    p = wide(1.5, 1.0, 1.0, 3.0) if p is None else p
    prey, predators = y.unbind(-1)
    return torch.stack([prey * (p[0] - p[1] * predators), predators * (p[2] * prey - p[3])], -1)


def network(act: Callable[[Tensor], Tensor], width: int = 5) -> nn.Module:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(2, width), nn.Linear(width, 2)

        def forward(self, t: Tensor, y: Tensor) -> Tensor:
            return self.last(act(self.first(y)))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net().double()


# The series in h of solutions that are known.
CLOSED: dict[str, tuple[Field, Tensor, list[float]]] = {
    "exp": (lambda t, y: y, wide(2.0), [2 / math.factorial(k) for k in range(13)]),
    "pole": (lambda t, y: y**2, wide(0.5), [0.5 ** (k + 1) for k in range(13)]),
    "tan": (
        lambda t, y: 1 + y * y,
        wide(0.0),
        [0, 1, 0, 1 / 3, 0, 2 / 15, 0, 17 / 315, 0, 62 / 2835, 0, 1382 / 155925],
    ),
    "root": (lambda t, y: 0.5 / y, wide(1.0), [1, 1 / 2, -1 / 8, 1 / 16, -5 / 128, 7 / 256]),
    "log": (lambda t, y: torch.exp(-y), wide(0.0), [0, 1, -1 / 2, 1 / 3, -1 / 4, 1 / 5, -1 / 6]),
    "logistic": (lambda t, y: y - y.square(), wide(0.5), [1 / 2, 1 / 4, 0, -1 / 48, 0, 1 / 480]),
    "power": (lambda t, y: 3 * y ** (2 / 3), wide(1.0), [1, 3, 3, 1, 0, 0, 0]),
    "gauss": (lambda t, y: -2 * t * y, wide(1.0), [1, 0, -1, 0, 1 / 2, 0, -1 / 6, 0, 1 / 24]),
    "sin": (lambda t, y: t.cos(), wide(0.0), [0, 1, 0, -1 / 6, 0, 1 / 120, 0, -1 / 5040]),
    "constant": (lambda t, y: wide(3.0), wide(1.0), [1, 3, 0, 0, 0]),
    "rest": (lambda t, y: torch.zeros_like(y), wide(1.0), [1, 0, 0]),
}


@pytest.mark.parametrize("name", CLOSED)
def test_known_solutions(name: str) -> None:
    f, y0, expected = CLOSED[name]
    got = taylor_solution(f, y0, len(expected) - 1)
    torch.testing.assert_close(got, wide(*expected), rtol=1e-13, atol=1e-14)


def test_a_harmonic_oscillator_of_any_shape() -> None:
    """One second-order equation for each of 2 x 3 frequencies, written as a system."""
    frequency = wide([[1.0, 2.0, 3.0], [0.5, 0.1, 4.0]])

    def f(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([y[1], -frequency.square() * y[0]])

    y0 = torch.stack([torch.ones_like(frequency), torch.zeros_like(frequency)])
    got = taylor_solution(f, y0, 10)
    assert got.shape == (11, 2, 2, 3)
    for k in range(11):
        sign = (1, 0, -1, 0)[k % 4]
        expected = sign * frequency**k / math.factorial(k)
        torch.testing.assert_close(got[k, 0], expected, rtol=1e-13, atol=1e-14)


def test_complex_values_turn() -> None:
    got = taylor_solution(lambda t, y: 2j * y, torch.tensor(1 + 0j, dtype=torch.complex128), 6)
    for k, coefficient in enumerate(got.tolist()):
        assert abs(coefficient - (2j) ** k / math.factorial(k)) < 1e-15


def test_the_solution_is_the_sum_of_powers() -> None:
    h = 0.1
    got = taylor_solution(lambda t, y: y * t.cos(), wide(1.0), 12, t=0.3)
    value = sum(c * h**k for k, c in enumerate(got.tolist()))
    assert abs(value - math.exp(math.sin(0.3 + h) - math.sin(0.3))) < 1e-14


SMOOTH: dict[str, Callable[[Tensor], Tensor]] = {
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "sigmoid": torch.sigmoid,
    "logsigmoid": F.logsigmoid,
    "sin_cos": lambda x: x.sin() * x.cos(),
    "erf": torch.erf,
    "erfcx": torch.special.erfcx,
    "atan": torch.atan,
    "logit": lambda x: torch.logit(torch.sigmoid(x) * 0.9),
    "cosh": torch.cosh,
    "lerp": lambda x: torch.addcmul(x, x, x, value=2).lerp(x, x),
    "log1p": lambda x: torch.log1p(x * x),
    "rational": lambda x: x / (1 + x * x),
    "reciprocal": lambda x: 1 / (2 + x.sin()),
    "sqrt": lambda x: (x * x + 0.1).sqrt(),
    "rsqrt": lambda x: (x * x + 0.1).rsqrt(),
    "cube": lambda x: x**3,
    "negative_power": lambda x: (x * x + 1) ** -2,
    "fraction": lambda x: (x * x + 1) ** 1.5,
    "exponent": lambda x: 2**x + (x * x + 1) ** x,
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "logsumexp": lambda x: torch.logsumexp(x, -1, keepdim=True) + x,
    "norm": lambda x: x.norm(dim=-1, keepdim=True) * x,
    "variance": lambda x: x.var(-1, keepdim=True) * x + x.std(-1, correction=0, keepdim=True),
    "product": lambda x: x.prod(-1, keepdim=True) * x,
    "extremum": lambda x: x.amax(-1, keepdim=True) * x - torch.maximum(x, -x).clamp(0.2, 0.4),
    "relu": lambda x: F.relu(x) * F.leaky_relu(x) + F.elu(x) - x.abs(),
    "matmul": lambda x: (x.mT @ x @ x.mT).mT,
    "places": lambda x: x.sort(1).values * x.median(1, keepdim=True).values + x.cummax(1).values,
    "largest": lambda x: x.max(1, keepdim=True).values * x + x.kthvalue(2, 1, True).values,
    "median": lambda x: x * x.median() + torch.remainder(x, 0.3) * x.min(),
    "hypot": lambda x: torch.hypot(x, 1 + x * x),
    "moments": lambda x: torch.var_mean(x, -1, True, True)[1] * x + torch.var_mean(x)[0],
    "vector": lambda x: torch.outer(x[0] @ x.mT, x[1]) + torch.dot(x[0], x[1]),
    "bmm": lambda x: torch.bmm(x[None], (x.mT @ x)[None])[0],
    "einsum": lambda x: torch.einsum("ij,kj->ik", x, x) @ x,
    "convolution": lambda x: F.conv1d(x[:, None], x[:2, None, :3], x[0, :2], padding=1).sum(1),
    "shapes": lambda x: torch.cat([x[:, 1:].flip(1), x[:, :1]], 1).roll(1, 0).cumsum(0),
    "padding": lambda x: F.pad(x[:, 1:], (1, 0), value=2.0).masked_fill(x > 0.3, 5.0),
    "where": lambda x: torch.where(x > 0, x * x, 1.0) + torch.where(x < 0, 2.0, x),
    "gather": lambda x: x.gather(1, x.argsort(1)) * x[:, [1, 0, 2, 3, 4]] + x.topk(5, 1).values,
    "fourier": lambda x: torch.fft.irfft(torch.fft.rfft(x) ** 2, n=5),
    "quotients": lambda x: torch.div(x, 2) - 3 / torch.rsub(x * x, -1) + torch.sub(x, x, alpha=3),
    "casts": lambda x: x.double() * (x > 0).double() + x.floor() * x,
}


@pytest.mark.parametrize("name", SMOOTH)
def test_operations_against_nested_forward_differentiation(name: str) -> None:
    net = network(SMOOTH[name])

    def f(t: Tensor, y: Tensor) -> Tensor:
        return net(t, y) * (1 + t * y)

    torch.manual_seed(1)
    y0 = torch.randn(3, 2, dtype=torch.float64)
    got = taylor_solution(f, y0, 4, t=0.2)
    torch.testing.assert_close(got, nested(f, y0, 4, 0.2), rtol=1e-10, atol=1e-10)


def test_a_layer_norm_against_its_own_formula() -> None:
    """PyTorch's own is wrong in nested forward mode."""
    norm = nn.LayerNorm(5).double()
    nn.init.normal_(norm.weight)

    def written(x: Tensor) -> Tensor:
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight + norm.bias

    torch.manual_seed(1)
    y0 = torch.randn(3, 2, dtype=torch.float64)
    got = taylor_solution(network(norm), y0, 4)
    torch.testing.assert_close(got, nested(network(written), y0, 4), rtol=1e-9, atol=1e-10)


def test_a_wide_network_and_lotka_volterra_at_high_order() -> None:
    """Against one Taylor pass along the polynomial of the solution, which must reproduce it."""
    torch.manual_seed(1)
    cases: list[tuple[Field, Tensor]] = [
        (lotka_volterra, wide(1.0, 1.2)),
        (network(torch.tanh, 50), torch.randn(4, 2).double()),
    ]
    for f, y0 in cases:
        order, h = 16, 0.02
        c = taylor_solution(f, y0, order).detach()
        now = sum(c[k] * h**k for k in range(order + 1))
        slope = sum(k * c[k] * h ** (k - 1) for k in range(1, order + 1))
        torch.testing.assert_close(slope, f(wide(h), now).detach(), rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(c[:5], nested(f, y0, 4).detach(), rtol=1e-11, atol=1e-12)


def test_float32_stays_float32() -> None:
    y0 = torch.randn(3, 2)
    net = network(torch.tanh, 50)
    got = taylor_solution(network(torch.tanh, 50).float(), y0, 6)
    assert got.dtype == torch.float32
    expected = taylor_solution(net, y0.double(), 6)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------ derivatives, transforms

PARAMETERS = wide(1.5, 1.0, 1.0, 3.0)
START = wide(1.0, 1.2)


def coefficients(y0: Tensor, p: Tensor, t: Tensor | float = 0.0) -> Tensor:
    return taylor_solution(lambda t, y, p: lotka_volterra(t, y, p) + t.sin() * y, y0, 5, p, t=t)


def test_gradients_reach_the_start_the_arguments_and_the_time() -> None:
    inputs = [x.clone().requires_grad_() for x in (START, PARAMETERS, wide(0.3))]
    assert torch.autograd.gradcheck(coefficients, inputs)
    assert torch.autograd.gradgradcheck(coefficients, inputs)


def test_gradients_reach_nested_arguments_and_what_f_closes_over() -> None:
    w, rate = torch.randn(2, 2).double().requires_grad_(), wide(0.7).requires_grad_()
    scale = (w * 2).exp()  # not a leaf

    def solve(w: Tensor, rate: Tensor, scale: Tensor) -> Tensor:
        def f(t: Tensor, y: Tensor, p: dict[str, Any]) -> Tensor:
            return torch.tanh(y @ p["w"]) * p["more"][0] * rate**2 + scale.sum().sqrt() / y

        return taylor_solution(f, START, 4, {"w": w, "more": [0.5, None]})

    assert torch.autograd.gradcheck(lambda w, rate: solve(w, rate, (w * 2).exp()), (w, rate))
    assert torch.autograd.grad(solve(w, rate, scale)[3].sum(), w)[0].ne(0).all()


def test_the_parameters_of_a_module() -> None:
    net = network(torch.tanh)
    names, values = zip(*net.named_parameters(), strict=True)

    def solve(*values: Tensor) -> Tensor:
        p = dict(zip(names, values, strict=True))
        return taylor_solution(lambda t, y: functional_call(net, p, (t, y)), START, 3)

    assert torch.autograd.gradcheck(solve, values)
    expected = torch.autograd.grad(solve(*values).sum(), values)
    taylor_solution(net, START, 3).sum().backward()
    for p, slope in zip(values, expected, strict=True):
        torch.testing.assert_close(p.grad, slope)


def test_vmap_and_other_transforms() -> None:
    torch.manual_seed(0)
    starts, rates = torch.rand(4, 2).double(), torch.rand(4, 4).double()
    pairs = zip(starts, rates, strict=True)
    expected = torch.stack([coefficients(y, p) for y, p in pairs])
    torch.testing.assert_close(vmap(coefficients)(starts, rates), expected)
    one_start = torch.stack([coefficients(START, p) for p in rates])
    torch.testing.assert_close(vmap(coefficients, (None, 0))(START, rates), one_start)
    both = vmap(vmap(coefficients, (None, 0)), (0, None))(starts, rates)
    torch.testing.assert_close(both[1, 2], coefficients(starts[1], rates[2]))
    jacobian = torch.autograd.functional.jacobian(lambda y: coefficients(y, PARAMETERS), START)
    torch.testing.assert_close(jacfwd(coefficients)(START, PARAMETERS), jacobian)
    torch.testing.assert_close(
        vmap(grad(lambda y: coefficients(y, PARAMETERS)[3].sum()))(starts)[0],
        grad(lambda y: coefficients(y, PARAMETERS)[3].sum())(starts[0]),
    )


def test_a_traced_solution_holds_at_other_values() -> None:
    def at_zero(y0: Tensor, p: Tensor) -> Tensor:
        return coefficients(y0, p)

    graph = make_fx(at_zero)(START, PARAMETERS)
    torch.testing.assert_close(
        graph(2 * START, PARAMETERS + 1), coefficients(2 * START, PARAMETERS + 1)
    )


def test_a_record_is_made_once_and_extended_many_times() -> None:
    calls = []
    w = wide(0.5).requires_grad_()

    def f(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        calls.append(t)
        return torch.where(y > 1, y * p, y * y) * (w * w).exp() * (1 + t) / p.square().sum()

    record = RightHandSide(f, wide(0.0), START, PARAMETERS[:2])
    assert len(record.closed_over) == 1
    assert record.closed_over[0] is w
    for y, p, t in [(START, PARAMETERS[:2], 0.0), (wide(3.0, 0.1), wide(-1.0, 2.0), 0.7)]:
        got = torch.stack(record.coefficients(4, wide(t), y, p))
        torch.testing.assert_close(got, nested(lambda t, y, p=p: f(t, y, p), y, 4, t))
        torch.autograd.grad(got.sum(), w)  # the graph is new each time
    calls.clear()
    taylor_solution(f, START, 12, PARAMETERS[:2])
    assert len(calls) == 1


def test_a_hamiltonian_whose_gradient_is_taken_inside() -> None:
    """By autograd and by torch.func; the gradient with respect to the weights is that of both."""
    net = network(torch.tanh)

    def energy(y: Tensor) -> Tensor:
        return net(wide(0.0), y).square().sum()

    def by_autograd(t: Tensor, y: Tensor) -> Tensor:
        with torch.enable_grad():
            y = y.detach().requires_grad_()
            (slope,) = torch.autograd.grad(energy(y), y, create_graph=True)
        return torch.stack([slope[1], -slope[0]])

    def by_func(t: Tensor, y: Tensor) -> Tensor:
        slope = grad(energy)(y)
        return torch.stack([slope[1], -slope[0]])

    expected = nested(by_func, START, 3)
    slopes = torch.autograd.grad(expected.sum(), list(net.parameters()))
    for f in (by_autograd, by_func):
        got = taylor_solution(f, START, 3)
        torch.testing.assert_close(got, expected)
        for a, b in zip(
            torch.autograd.grad(got.sum(), list(net.parameters())), slopes, strict=True
        ):
            torch.testing.assert_close(a, b)


def test_values_written_in_place() -> None:
    def f(t: Tensor, y: Tensor) -> Tensor:
        slope = torch.empty_like(y)
        slope[0] = y[1].clone().mul_(2).add_(1)
        slope[1] = 0.0
        slope[1:].sub_(y[:1])
        return slope

    def plain(t: Tensor, y: Tensor) -> Tensor:
        return torch.stack([2 * y[1] + 1, -y[0]])

    torch.testing.assert_close(taylor_solution(f, START, 5), taylor_solution(plain, START, 5))


def test_the_function_of_an_autograd_function() -> None:
    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * x

    got = taylor_solution(lambda t, y: Square.apply(y), wide(1.0), 5)
    torch.testing.assert_close(got, torch.ones(6).double())


def test_a_compiled_module_runs_uncompiled() -> None:
    """Its kernels would be unseen, and Dynamo would compile the recording of each operation."""
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    net = network(torch.tanh)
    expected = taylor_solution(net, START, 4)
    got = taylor_solution(torch.compile(net, backend=backend), START, 4)
    torch.testing.assert_close(got, expected, rtol=0, atol=0)
    assert not graphs


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


def operations(order: int, y0: Tensor = START) -> int:
    with Operations() as counter:
        taylor_solution(lotka_volterra, y0, order)
    return counter.count


def test_the_cost_grows_as_the_square_of_the_order() -> None:
    """Two products, one of k + 1 terms at order k each, and eleven operations besides."""
    counts = [operations(k, START.expand(2000, -1)) for k in range(4, 10)]
    steps = [after - before for before, after in itertools.pairwise(counts)]
    assert {after - before for before, after in itertools.pairwise(steps)} == {2}
    assert steps[0] <= 2 * 5 + 11


def test_small_tensors_take_as_many_calls_at_each_order() -> None:
    """Two products, each of two stacks, a product and a sum, and six operations besides."""
    counts = [operations(k) for k in range(4, 10)]
    steps = {after - before for before, after in itertools.pairwise(counts)}
    assert steps == {2 * 4 + 6}


@pytest.mark.parametrize("act", [torch.tanh, torch.sin, F.silu, lambda y: y * y, lambda y: y**3])
def test_small_and_large_tensors_have_the_same_coefficients(act: Any) -> None:
    net, y0 = network(act), torch.rand(400, 2, dtype=torch.float64)
    large = taylor_solution(net, y0, 9)
    torch.testing.assert_close(taylor_solution(net, y0[:3], 9), large[:, :3], rtol=1e-12, atol=0)


class Tagged(Tensor):
    """A subclass that changes nothing."""


UNSEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "Parameter": nn.Parameter,
    "Buffer": nn.Buffer,
    "data": lambda x: x.data,
    "copy": lambda x: copy.copy(nn.Parameter(x)),
    "deepcopy": lambda x: copy.deepcopy(nn.Parameter(x)),
    "as_subclass": lambda x: x.as_subclass(Tagged),
    "conj": lambda x: nn.Parameter(x.conj()),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_shares_the_memory_of_a_value_is_that_value(name: str) -> None:
    """PyTorch makes these past its dispatcher."""
    same = UNSEEN[name]
    y0 = START + 1j if name == "conj" else START

    def f(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        return (same(y) * y + same(y * p) * t).as_subclass(Tensor)

    def plain(t: Tensor, y: Tensor, p: Tensor) -> Tensor:
        once, product = (y.conj(), (y * p).conj()) if name == "conj" else (y, y * p)
        return once * y + product * t

    p = wide(0.5, -2.0).requires_grad_()
    got, expected = (taylor_solution(g, y0, 4, p) for g in (f, plain))
    torch.testing.assert_close(got, expected)
    assert type(got) is Tensor
    slopes = [torch.autograd.grad(c.abs().sum(), p)[0] for c in (got, expected)]
    torch.testing.assert_close(*slopes)
    got = taylor_solution(lambda t, y: same(p) * y, START, 1, t=1)  # not of a value
    torch.testing.assert_close(got[1], p * START)


def test_a_tensor_that_f_closes_over_is_not_the_argument_whose_memory_it_shares() -> None:
    start = START.clone()
    got = taylor_solution(lambda t, y, p: y * start - p * start, start, 3, start)
    torch.testing.assert_close(got, nested(lambda t, y: (y - START) * START, START, 3))
    flat = wide(1.0, 1.2, 0.5, 2.0)
    got = taylor_solution(lambda t, y: y * flat[2:], flat[:2], 3)
    torch.testing.assert_close(got, nested(lambda t, y: y * wide(0.5, 2.0), START, 3))


# ------------------------------------------------------------------ what is refused


READERS: dict[str, Callable[[Any], Any]] = {
    "repr": lambda y: float(repr(y)[8:10]),
    "local_scalar_dense": lambda y: float(y[0]),
    "deepcopy": copy.deepcopy,
    "(reduce_ex|untyped_storage)": copy.copy,
    "(dlpack|is_pinned)": torch.utils.dlpack.from_dlpack,
    "untyped_storage": lambda y: torch.tensor(y.untyped_storage()[0]),
    "tolist": lambda y: y.tolist()[0],
}


def test_values_that_leave_for_python_are_refused() -> None:
    cases: dict[str, Field] = {
        "local_scalar_dense": lambda t, y: y if y.sum() > 0 else -y,
        "tolist": lambda t, y: y * y.tolist()[0],
        "tensor": lambda t, y: torch.tensor([y[1], -y[0]]),
        "new_tensor": lambda t, y: y.new_tensor([y[1], -y[0]]),
        "numpy": lambda t, y: y * float(y.detach().numpy()[0]),
        "equal": lambda t, y: y if torch.equal(y, y) else -y,
    }
    for name, f in cases.items():
        with pytest.raises(NotImplementedError, match=rf"{name} converts .*use torch\.where"):
            taylor_solution(f, START, 2)
    with pytest.raises(NotImplementedError, match="local_scalar_dense converts"):
        taylor_solution(lambda t, y, p: y if p[0] > 0 else -y, START, 2, PARAMETERS)
    with pytest.raises(NotImplementedError, match="writes in place where PyTorch cannot"):
        taylor_solution(lambda t, y: nn.BatchNorm1d(2).double()(y.expand(3, 2))[0], START, 2)
    for name, read in READERS.items():
        with pytest.raises(NotImplementedError, match=rf"taylor_solution: {name} converts"):
            taylor_solution(lambda t, y, read=read: y * read(y), START, 2)
        if read not in (copy.copy, copy.deepcopy):  # of parameters they are followed
            with pytest.raises(NotImplementedError, match="converts"):
                taylor_solution(lambda t, y, read=read: y * read(nn.Parameter(2 * y)), START, 2)
    mask = torch.tensor([True, False])
    taylor_solution(lambda t, y: y * mask if mask.any() else y, START, 2)  # of no argument


def test_operations_without_a_rule_are_named() -> None:
    cases: dict[str, Field] = {
        "polygamma": lambda t, y: torch.lgamma(y),
        "igamma": lambda t, y: torch.special.gammainc(y, y),
        "scatter": lambda t, y: y.scatter(0, torch.tensor([0, 1]), y, reduce="multiply"),
        "bernoulli, which is random,": lambda t, y: F.dropout(y, 0.5),
        "rand, which is random,": lambda t, y: y + torch.rand(2),
    }
    for name, f in cases.items():
        with pytest.raises(NotImplementedError, match=f"taylor_solution: {name} has no rule"):
            taylor_solution(f, START, 2)


def test_bad_input_is_refused() -> None:
    def same(t: Tensor, y: Tensor) -> Tensor:
        return y

    for order in (-1, 1.0):
        with pytest.raises(ValueError, match="expected an order of 0 or more"):
            taylor_solution(same, START, order)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="taylor_solution: expected y0 to be a floating-point"):
        taylor_solution(same, torch.tensor(1), 2)
    with pytest.raises(TypeError, match="expected f to return one tensor, got tuple"):
        taylor_solution(lambda t, y: (y,), START, 2)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match=r"expected f to return \(2,\) torch.float64 like y0"):
        taylor_solution(lambda t, y: y[0], START, 2)
    with pytest.raises(ValueError, match=r"like y0, got \(2,\) torch.float32"):
        taylor_solution(lambda t, y: y.float(), START, 2)
    with pytest.raises(ValueError, match=r"f closes over a tensor that a transform .*through args"):
        vmap(lambda p: taylor_solution(lambda t, y: y * p, wide(1.0), 2))(START)
    with pytest.raises(ValueError, match="f closes over"):
        grad(lambda p: taylor_solution(lambda t, y: y * p, wide(1.0), 2).sum())(wide(1.0))


def test_the_first_orders() -> None:
    for order in range(3):
        got = taylor_solution(lambda t, y: y + t, wide(2.0), order, t=1)
        torch.testing.assert_close(got, wide(2.0, 3.0, 2.0)[: order + 1])
