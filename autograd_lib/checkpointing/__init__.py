"""Which blocks of a model to save and which to run again, within a budget of bytes."""

from autograd_lib.checkpointing.plan import CheckpointPlan, plan_checkpoints

__all__ = ["CheckpointPlan", "plan_checkpoints"]
