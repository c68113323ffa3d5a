"""The monitor and the guard in other people's trainers."""

from autograd_lib.callbacks.lightning import lightning_callback
from autograd_lib.callbacks.transformers import transformers_callback

__all__ = ["lightning_callback", "transformers_callback"]
