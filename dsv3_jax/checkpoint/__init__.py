"""Checkpoints that lose nothing silently: damage is found, and a failed save spares the others."""

from dsv3_jax.checkpoint.manager import CheckpointManager, Resumed, SaveFailed
from dsv3_jax.checkpoint.reader import CheckpointReader, DamagedCheckpoint

__all__ = ["CheckpointManager", "CheckpointReader", "DamagedCheckpoint", "Resumed", "SaveFailed"]
