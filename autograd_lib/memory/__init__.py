"""What backward keeps, counted by storage, and the high-water mark of a step.

Two questions about memory have two different instruments. *Which tensors does the forward keep
for backward, and which module asked for them?* `saved_tensors` watches every tensor that autograd
saves. *How much does one whole step need at its worst moment?* `peak_bytes` follows the
allocations themselves, so it also sees gradients, temporaries and what checkpointing recomputes.
"""

from autograd_lib.memory.figures import plot_graph, plot_memory
from autograd_lib.memory.peak import peak_bytes
from autograd_lib.memory.saved import SavedTensors, saved_tensors

__all__ = ["SavedTensors", "peak_bytes", "plot_graph", "plot_memory", "saved_tensors"]
