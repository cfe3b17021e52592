"""Checkpoints that lose nothing silently: damage is found, and a failed save spares the others."""

from dsv3_jax.checkpoint.manager import Checkpoints, Resumed, SaveFailed
from dsv3_jax.checkpoint.reader import DamagedCheckpoint, SavedSteps

__all__ = ["Checkpoints", "DamagedCheckpoint", "Resumed", "SaveFailed", "SavedSteps"]
