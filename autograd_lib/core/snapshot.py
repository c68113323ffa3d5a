"""What a step changes besides parameters, taken and restored: random states, buffers, gradients."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

# Whether what runs now is undone afterwards, so that nobody counts it as a step.
is_replay: ContextVar[bool] = ContextVar("is_replay", default=False)


class Generator(NamedTuple):
    """A generator of random numbers: what messages call it, and how its state is read and set."""

    name: str
    get_state: Callable[[], Any]
    set_state: Callable[[Any], Any]


# PyTorch's own generators are not among them: `torch.utils.checkpoint` restores those.
GLOBAL_GENERATORS = [
    Generator("Python's random module", random.getstate, random.setstate),
    Generator("NumPy's global generator", np.random.get_state, np.random.set_state),
]


def torch_generators(devices: Iterable[torch.device] | None = None) -> list[Generator]:
    """PyTorch's generators: the CPU's and those of `devices`, by default the current accelerator.

    Cheap enough to read in every training step: neither Python's state nor NumPy's.
    """
    if devices is None:
        current = torch.accelerator.current_accelerator(check_available=True)
        devices = [] if current is None else [current]
    found = [Generator("PyTorch's generator", torch.get_rng_state, torch.set_rng_state)]
    for device in devices:
        module = torch.get_device_module(device)
        where = {} if device.type == "mps" else {"device": device}
        states = partial(module.get_rng_state, **where), partial(module.set_rng_state, **where)
        found.append(Generator(f"PyTorch's generator on {device}", *states))
    return found


def own_generators(module: nn.Module) -> list[Generator]:
    """The generators that a module has as attributes."""
    found: list[Generator] = []
    for name, value in vars(module).items():
        label = f"the generator `{name}` of a {type(module).__name__}"
        if isinstance(value, torch.Generator | np.random.RandomState):
            found.append(Generator(label, value.get_state, value.set_state))
        elif isinstance(value, random.Random):
            found.append(Generator(label, value.getstate, value.setstate))
        elif isinstance(value, np.random.Generator):
            of_bits = value.bit_generator, "state"
            found.append(Generator(label, partial(getattr, *of_bits), partial(setattr, *of_bits)))
    return found


def random_state() -> dict[str, Any]:
    """The states of all global generators, as plain values that `torch.load` reads safely."""
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
    }


def set_random_state(state: Mapping[str, Any]) -> None:
    """Set the states that `random_state` returned; CUDA's only for the same number of devices."""
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))


def seed_all(seed: int) -> None:
    """Seed the global generators of PyTorch, Python and NumPy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


@contextlib.contextmanager
def preserved_random_state() -> Iterator[None]:
    """Restore the states of all global generators at the end of the block."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)


class ModuleState:
    """The buffers and generators of modules as they are now, and the values of other tensors.

    Args:
        modules: Each speaks for itself alone: ``model.modules()`` for all of a model.
        more: Tensors whose values are kept too, such as parameters and gradients.
        generators: Those to keep; by default the modules' own.
    """

    @torch.no_grad()
    def __init__(
        self,
        modules: Iterable[nn.Module],
        more: Iterable[Tensor] = (),
        generators: Iterable[Generator] | None = None,
    ) -> None:
        modules = list(modules)
        self._buffers = [(m._buffers, name, b) for m in modules for name, b in m._buffers.items()]
        tensors = [*(buffer for *_, buffer in self._buffers if buffer is not None), *more]
        lazy = nn.parameter.is_lazy
        self._values = [(tensor, tensor.detach().clone()) for tensor in tensors if not lazy(tensor)]
        if generators is None:
            generators = [generator for module in modules for generator in own_generators(module)]
        self._generators = [(g.set_state, g.get_state()) for g in generators]

    @torch.no_grad()
    def restore_buffers(self) -> None:
        """Set the values of buffers and of `more`; a buffer that was replaced comes back itself."""
        for table, name, buffer in self._buffers:
            table[name] = buffer
        for tensor, value in self._values:
            try:
                # Through .data, so that a graph from before does not count it as a change; that of
                # a sparse tensor is another one.
                (tensor.data if tensor.layout is torch.strided else tensor).copy_(value)
            except RuntimeError:
                if is_writable(tensor):
                    raise
                _write(tensor, value)

    def restore(self) -> None:
        """Set the values and the states of the generators."""
        self.restore_buffers()
        for set_state, state in self._generators:
            set_state(state)


def is_writable(tensor: Tensor) -> bool:
    """Whether PyTorch writes into `tensor` in place.

    It refuses where several elements share memory (`expand`), and tensors of `inference_mode`.
    """
    if nn.parameter.is_lazy(tensor) or tensor.layout is not torch.strided:
        return not tensor.is_inference()
    places = zip(tensor.stride(), tensor.shape, strict=True)
    shares = any(stride == 0 and size > 1 for stride, size in places)
    return not (shares or tensor.is_inference())


def _write(tensor: Tensor, value: Tensor) -> None:
    """Write into a tensor that is not writable, into shared memory once: it stays the same one."""
    with torch.inference_mode(tensor.is_inference()):
        for dim, stride in enumerate(tensor.stride()):
            if stride == 0 and tensor.shape[dim]:
                tensor, value = tensor.narrow(dim, 0, 1), value.narrow(dim, 0, 1)
        tensor.data.copy_(value)


@contextlib.contextmanager
def writable_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Let `load_state_dict` write into a copy of each buffer that it could not write into.

    The buffer gets what was written, or stays replaced where it cannot hold that.
    """
    tables = [module._buffers for module in modules]
    places = [(table, name, b) for table in tables for name, b in table.items() if b is not None]
    places = [place for place in places if not is_writable(place[2])]
    for table, name, buffer in places:
        table[name] = buffer.clone()
    try:
        yield
    finally:
        for table, name, buffer in places:
            value: Any = table[name]
            _write(buffer, value)
            if torch.equal(buffer, value):
                table[name] = buffer


@contextlib.contextmanager
def without_gradients(parameters: Sequence[Tensor]) -> Iterator[None]:
    """Run a block in which every `.grad` is None at first; set the present ones again after it."""
    gradients = [parameter.grad for parameter in parameters]
    try:
        drop_gradients(parameters)
        yield
    finally:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient


def drop_gradients(parameters: Iterable[Tensor]) -> None:
    """Set every `.grad` to None."""
    for parameter in parameters:
        parameter.grad = None
