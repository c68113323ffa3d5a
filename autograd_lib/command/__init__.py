"""The command line, `python -m autograd_lib`, and what it learns from."""

from autograd_lib.command.data import Task

__all__ = ["Task"]
