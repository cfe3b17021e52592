"""Checkpoints that lose nothing silently: damage is found, and a failed save spares the others."""

from dsv3_jax.checkpoint.checkpoints import Checkpoints, DamagedCheckpoint, Resumed, SaveFailed

__all__ = ["Checkpoints", "DamagedCheckpoint", "Resumed", "SaveFailed"]
