"""Operations in place: what they do to a value, to its views and to constants."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from oracles import assert_near, nested
from torch import Tensor, nn

from autograd_lib import derivative_tower, jet, laplacian
from autograd_lib.higher_order.dispatch import Jet

DRAWS = torch.Generator().manual_seed(0)
X, V = (torch.randn(3, 4, generator=DRAWS, dtype=torch.float64) / 2 for _ in range(2))

# ------------------------------------------------------------------ random programs

VIEWS: list[Callable[[Tensor], Any]] = [
    lambda t: t.T if t.ndim == 2 else t[:1],
    lambda t: t[0],
    lambda t: t[..., 1:],
    lambda t: t[..., ::2],
    lambda t: t[:, None],
    lambda t: t[..., torch.tensor(0)],
    lambda t: t.unsqueeze(0),
    lambda t: t.transpose(0, -1),
    lambda t: t.unbind()[-1],
    lambda t: t.chunk(2)[0],
    lambda t: t.split(1)[-1],
    lambda t: t.narrow(-1, 0, 1),
    lambda t: t.diagonal() if t.ndim > 1 else t,
    lambda t: t.movedim(0, -1),
    lambda t: t.squeeze(),
    lambda t: t[1:2],
    lambda t: torch.ops.aten.slice.Tensor(t, 0, 1, 3),
]
COPIES: list[Callable[[Tensor], Any]] = [
    lambda t: t[[0]],
    lambda t: t[t > -9],
    lambda t: t.clone(),
    lambda t: t.exp(),
    lambda t: t**1,
    lambda t: t + 0,
    lambda t: t.prod(0, keepdim=True),
    lambda t: t[:1].prod(0),
]
WRITES: list[Callable[[Tensor, Tensor], Any]] = [
    lambda t, other: t.mul_(0.7),
    lambda t, other: t.sin_(),
    lambda t, other: t.add_(other.sum()),
    lambda t, other: t.copy_(other.mean()),
    lambda t, other: t.zero_(),
    lambda t, other: t.fill_(0.3),
    lambda t, other: t.__setitem__(0, other.sum().tanh()),
    lambda t, other: t.__setitem__(..., t.cos()),
    lambda t, other: t.masked_fill_(t > 0.2, 0.1),
    lambda t, other: t.__iadd__(t),
    lambda t, other: t.__setitem__(t > 0.4, 0.5),
    lambda t, other: t.clamp_(-3, 3).div_(other.sum().exp()),
]
PERHAPS: list[Callable[[Tensor], Any]] = [
    lambda t: t.reshape(-1),
    lambda t: t.flatten(),
    lambda t: t.contiguous(),
]


def program(seed: int, perhaps: bool) -> Callable[[Tensor], Tensor]:
    """A function that takes views, writes to them and reads all of them in the end."""
    draw = random.Random(seed)
    ways = VIEWS + COPIES + (PERHAPS * 4 if perhaps else [])
    steps: list[tuple[Any, int, int]] = []
    for i in range(9):
        write = draw.random() < 0.55
        steps.append((draw.choice(WRITES if write else ways), draw.randrange(i + 1), i))

    def f(x: Tensor) -> Tensor:
        values = [x * 1]
        for step, at, by in steps:
            t = values[at % len(values)]
            if step in WRITES:
                if t.ndim and t.numel():
                    step(t, values[by % len(values)])
            elif t.ndim > 1 and t.numel() > 1:
                values.append(step(t))
        return torch.cat([t.reshape(-1) for t in values])

    return f


@pytest.mark.parametrize("perhaps", [False, True])
@pytest.mark.parametrize("seed", range(120))
def test_random_programs(seed: int, perhaps: bool) -> None:
    """Against PyTorch's own views and writes, in nested forward mode."""
    f = program(seed, perhaps)
    got = followed(f)
    if got is None:
        assert perhaps
    else:
        assert_near(got, nested(lambda t: f(X + t * V), 3, "cpu"), 1e-7)


def followed(f: Callable[[Tensor], Tensor]) -> Any:
    try:
        return jet(f, X, V, 3)
    except NotImplementedError as error:
        if "may share its memory" in str(error):
            return None
        raise


def test_only_some_programs_are_refused() -> None:
    refused = [followed(program(seed, perhaps=True)) is None for seed in range(120)]
    assert 0 < sum(refused) < 70


# ------------------------------------------------------------------ what is left behind


def test_the_argument_is_as_it_was() -> None:
    x, v = X.clone(), V.clone()
    got = jet(lambda x: x.sin_().mul_(2), x, v, 2)
    assert torch.equal(x, X)
    assert torch.equal(v, V)
    assert_near(got, jet(lambda x: 2 * x.sin(), x, v, 2), 1e-13)


@pytest.mark.parametrize("raising", [False, True])
def test_a_constant_written_to_is_plain_again_afterwards(raising: bool) -> None:
    buffer = torch.zeros(3, 4, dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        buffer.copy_(x.sin())
        buffer[0] = x[1]
        assert type(buffer) is Jet
        return 1 / 0 if raising else buffer * x  # type: ignore[return-value]

    try:
        got = jet(f, X, V, 2)
    except ZeroDivisionError:
        assert raising
    else:
        want = lambda x: torch.cat([x[1:2], x[1:].sin()]) * x  # noqa: E731
        assert_near(got, nested(lambda t: want(X + t * V), 2, "cpu"), 1e-9)
    assert type(buffer) is Tensor
    assert torch.equal(buffer, torch.cat([X[1:2], X[1:].sin()]))


def test_a_buffer_of_a_module_in_a_tower_and_a_laplacian() -> None:
    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4).double()
            self.register_buffer("last", torch.zeros(3, 4, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            self.last[:] = self.linear(x)
            return self.last.tanh()

    module = Last()
    tower = derivative_tower(module, lambda y, _: y.sum(), X, None, 2)
    assert type(module.last) is Tensor
    assert not module.last.any()  # as it was
    plain = nn.Sequential(module.linear, nn.Tanh())
    assert_near(
        [tower.values], [derivative_tower(plain, lambda y, _: y.sum(), X, None, 2).values], 1e-12
    )
    point = X[0]
    buffer = torch.zeros(4, dtype=torch.float64)
    got = laplacian(lambda x: buffer.copy_(x.sin()).prod(), point)
    assert_near([got], [laplacian(lambda x: x.sin().prod(), point)], 1e-12)
    assert type(buffer) is Tensor


def test_vmap_and_gradients() -> None:
    weight = (X / 3).requires_grad_()

    def f(x: Tensor) -> Tensor:
        y = x * weight
        y[0] += x[1].sin()
        y.T[1:3].mul_(weight.T[:2])
        return F.silu(y, inplace=True)

    def functional(x: Tensor) -> Tensor:
        y = x * weight
        y = torch.cat([(y[0] + x[1].sin())[None], y[1:]])
        y = torch.cat([y[:, :1], y[:, 1:3] * weight[:, :2], y[:, 3:]], 1)
        return y * torch.sigmoid(y)

    many, along = torch.stack([X, X.cos()]), torch.stack([V, V.sin()])
    for run in (f, functional):
        got = torch.func.vmap(lambda x, v, run=run: torch.stack(jet(run, x, v, 3)))(many, along)
        slope = torch.autograd.grad(got.square().sum(), weight)[0]
        if run is f:
            first = got, slope
    assert_near(first, (got, slope), 1e-11)


# ------------------------------------------------------------------ refusals


def detached(x: Tensor) -> Tensor:
    y = x * 1
    constant = y.detach()
    y.mul_(2)
    return y * constant


def viewed_buffer(x: Tensor) -> Tensor:
    buffer = torch.zeros(3, 4, dtype=torch.float64)
    row = buffer[0]
    buffer.copy_(x)
    return row


def reshaped(x: Tensor) -> Tensor:
    y = x.T.sin()
    flat = y.reshape(-1)
    flat.mul_(2)
    return y + flat.sum()


def copied(x: Tensor) -> Tensor:
    y = x.T + torch.ones(4, 3, dtype=torch.float64)  # not contiguous, other than its stack
    y.contiguous().mul_(2)
    return y


@pytest.mark.parametrize(
    ("f", "text"),
    [
        (copied, "may share its memory"),
        (detached, "modified in place after detach"),
        (viewed_buffer, "a view shares"),
        (reshaped, "may share its memory"),
        (lambda x: torch.zeros(3, 4).double()[0].add_(x[0]), "a view shares"),
        (lambda x: torch.zeros(3, 4).double().requires_grad_().add_(x), "in place"),
    ],
)
def test_refused(f: Callable[[Tensor], Tensor], text: str) -> None:
    with pytest.raises(NotImplementedError, match=f"jet: .*{text}"):
        jet(f, X, V, 2)


def test_what_shares_the_memory_of_a_written_constant_is_not_read_as_before() -> None:
    def f(x: Tensor) -> Tensor:
        buffer = torch.zeros(3, 4, dtype=torch.float64)
        alias = buffer.detach()
        buffer.copy_(x)
        return alias + 0 * x

    assert jet(f, X, V, 1)[0].isnan().all()


def test_a_detached_value_that_is_gone_hinders_nothing() -> None:
    def f(x: Tensor) -> Tensor:
        y = x * 1
        assert y.detach().sum().isfinite()
        return y.mul_(y)  # of which forward mode has a wrong derivative in torch 2.13

    assert_near(jet(f, X, V, 3), [X * X, 2 * X * V, 2 * V * V, 0 * X], 1e-13)


def test_no_grad_changes_the_value_alone() -> None:
    def f(x: Tensor) -> Tensor:
        y = x.sin()
        with torch.no_grad():
            y.clamp_(min=0.1)
        return y * x

    s, low = X.sin(), X.sin().clamp(min=0.1)
    first = X.cos() * V * X + low * V
    second = -s * V * V * X + 2 * X.cos() * V * V
    assert_near(jet(f, X, V, 2), [low * X, first, second], 1e-12)
    leaf = X.clone().requires_grad_()
    (slope,) = torch.autograd.grad(jet(f, leaf, V, 1)[0].sum(), leaf)
    assert_near([slope], [low + X * X.cos()], 1e-12)


def test_random_numbers_in_place_are_those_of_pytorch() -> None:
    def f(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        return x * torch.cat([x.clone().bernoulli_(), x.clone().bernoulli_(0.1)], 1)[:, ::2]

    assert_near(jet(f, X, V, 1), [f(X), f(X) / X * V], 1e-12)


def test_types_and_shapes_stay() -> None:
    with pytest.raises(RuntimeError, match="can't be cast"):
        jet(lambda x: torch.zeros(3, 4).long().add_(x), X, V, 1)
    with pytest.raises(RuntimeError, match="expand"):
        jet(lambda x: (x[0] * 1).add_(x), X, V, 1)
    half = jet(lambda x: torch.zeros(3, 4).add_(x.sin()), X, V, 1)
    assert half[1].dtype == torch.float32
