"""One of two processes with two devices each that save, lose and restore together.

    python two_savers.py PORT NUMBER FOLDER

Fails unless what one process meets, a damaged step or a full disk, has the same end on both.
"""

import shutil
import sys
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dsv3_jax.checkpoint import CheckpointManager, SaveFailed

WEIGHTS = np.random.default_rng(0).normal(size=(64, 512)).astype(np.float32)


def main(port: str, number: int, folder: Path):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, number)
    mesh = jax.make_mesh((4,), ("rows",), axis_types=(AxisType.Auto,))
    rows = NamedSharding(mesh, P("rows"))
    state = {"weights": jax.make_array_from_callback(WEIGHTS.shape, rows, lambda i: WEIGHTS[i])}
    like = {"weights": jax.ShapeDtypeStruct(WEIGHTS.shape, np.float32, sharding=rows)}
    checkpoints = CheckpointManager(folder, keep=4)
    with jax.transfer_guard("disallow"):
        for step in (1, 2, 3, 4):
            checkpoints.save(step, state, {"step": step})
        checkpoints.wait()
        multihost_utils.sync_global_devices("saved")
        if number == 1:
            damage_three(folder)
        multihost_utils.sync_global_devices("damaged")
        resumed = checkpoints.resume(like)
        assert resumed.step == 1 and resumed.extra == {"step": 1}
        for shard in resumed.state["weights"].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), WEIGHTS[shard.index])
        refused(checkpoints, state, number)
        checkpoints.save(6, state, {"step": 6})
        checkpoints.close()


def damage_three(folder: Path):
    """What the record shows to process 0, what shows to both, and what to this process alone."""
    (folder / "2" / "state" / "_sharding").unlink()
    piece = WEIGHTS[32:48].tobytes()
    for step in ("3", "4"):
        (folder / step / "files.txt").unlink()
        ours = (folder / step / "state" / "ocdbt.process_1" / "d").iterdir()
        (path,) = (path for path in ours if piece in path.read_bytes())
        if step == "3":
            path.write_bytes(path.read_bytes().replace(piece, bytes([piece[0] ^ 1]) + piece[1:]))
        else:
            path.unlink()


def refused(checkpoints: CheckpointManager, state: dict, number: int):
    """The disk is full, but process 0 alone can see that; both must refuse the save."""
    usage = shutil.disk_usage
    if number == 0:
        shutil.disk_usage = lambda path: usage(path)._replace(free=1000)
    try:
        checkpoints.save(5, state, {"step": 5})
    except SaveFailed as error:
        assert error.missing_bytes == WEIGHTS.nbytes - 1000
    else:
        raise AssertionError("a save began on a full disk")
    finally:
        shutil.disk_usage = usage


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
