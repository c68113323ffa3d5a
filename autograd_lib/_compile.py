"""Compiling a module in place, whatever its class."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


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
