"""One of two processes with two devices each that loads its half of a folder.

    python two_processes.py PORT NUMBER OFFICIAL

Prints the bytes that it read of the official folder for a model on mesh ep4.
"""

import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx
from reference.official_weights import our_arrays
from reference.tensor_files import count_bytes

from dsv3_jax.params import named_arrays
from dsv3_jax.weights.pretrained import load_model
from dsv3_jax.weights.sources import open_weights
from sharding.mesh import make_mesh, parse_mesh


def main(port: str, number: str, official: Path):
    jax.config.update("jax_num_cpu_devices", 2)
    jax.distributed.initialize(f"localhost:{port}", 2, int(number))
    mesh = make_mesh(parse_mesh("ep4"))
    sizes = count_bytes(pytest.MonkeyPatch())
    arrays = named_arrays(nnx.state(load_model(open_weights(official), "bfloat16", mesh)))
    for path, value in our_arrays(official, "bfloat16").items():
        assert len(arrays[path].addressable_shards) == 2
        for shard in arrays[path].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), value[shard.index])
    print(sum(sizes))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
