"""A process that resumes and then saves without end, until it is killed."""

from multiprocessing.connection import Connection
from pathlib import Path

import jax
import numpy as np

from dsv3_jax.checkpoint import CheckpointManager


def state_of(step: int) -> dict[str, np.ndarray]:
    """A state of which every number depends on the step."""
    return {
        "weights": np.arange(1 << 18, dtype=np.float32).reshape(512, 512) * step,
        "moments": np.arange(1 << 16, dtype=np.float32) - step,
        "step": np.int32(step),
    }


def save_forever(folder: Path, reports: Connection):
    """Report where it resumes and whether that is exact; then each step, once it is on the disk."""
    checkpoints = CheckpointManager(folder, keep=3)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    resumed = checkpoints.resume(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state_of(0))
    )
    step = resumed.step if resumed else 0
    exact = resumed is None or (
        resumed.extra == {"step": step}
        and jax.tree.all(
            jax.tree.map(np.array_equal, jax.device_get(resumed.state), state_of(step))
        )
    )
    reports.send((step, exact))
    while True:
        step += 1
        checkpoints.save(step, jax.device_put(state_of(step), device), {"step": step})
        checkpoints.wait()
        reports.send(step)
