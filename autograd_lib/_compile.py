"""Compiling a module in place, whatever its class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch._functorch import config as functorch_config

_KEPT = 0.7  # of what compiled code would keep for backward; the rest is cheap to compute again


def compile_module(module: nn.Module) -> None:
    """Do what `module.compile()` is for.

    That method leaves modules of `torch.nn` itself (`nn.Sequential`, `nn.TransformerEncoder`) as
    they are, without a word: Dynamo skips the frames of PyTorch's own files, and the method starts
    it in one of them. A function of any other file around the call makes the difference.
    """
    call = module._call_impl

    def run(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    module._compiled_call_impl = torch.compile(run)


class Thrifty:
    """A module compiled to keep less for backward: what `activation_memory_budget` is for.

    The option is read when code is compiled and is not among the guards, so that code of its own
    is needed; and an object, which finds its module again when the model is copied.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.compiled: Callable[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "compiled": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self.module._call_impl
        if torch.compiler.is_compiling():
            return call(*args, **kwargs)
        if self.compiled is None:

            def run_thriftily(*args: Any, **kwargs: Any) -> Any:
                return call(*args, **kwargs)

            self.compiled = torch.compile(run_thriftily)
        with functorch_config.patch(activation_memory_budget=_KEPT):
            return self.compiled(*args, **kwargs)
