"""The monitor and the guard in other people's trainers."""

from autograd_lib.callbacks.frameworks import lightning_callback, transformers_callback

__all__ = ["lightning_callback", "transformers_callback"]
