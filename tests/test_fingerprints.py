import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.states import mesh_of, placed

from dsv3_jax.checkpoint.integrity import fingerprints


@pytest.mark.parametrize("sizes", [(4, 2), (2, 4), (1, 8), (1, 1)])
def test_fingerprint_does_not_depend_on_the_sharding(sizes):
    arrays = {str(i): x for i, x in enumerate(jax.tree.leaves(placed(mesh_of(*sizes)))) if x.size}
    alone = {name: jnp.asarray(np.asarray(x)) for name, x in arrays.items()}
    assert fingerprints(arrays) == fingerprints(alone)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e4m3fn", "int8", "int32"])
def test_fingerprint_shows_every_flipped_bit_and_exchange(dtype):
    values = np.arange(35).reshape(5, 7).astype(dtype)
    before = fingerprints({"x": jnp.asarray(values)})
    width = values.itemsize * 8
    for bit in range(0, 35 * width, 11):
        raw = bytearray(values.tobytes())
        raw[bit // 8] ^= 1 << bit % 8
        flipped = np.frombuffer(bytes(raw), values.dtype).reshape(5, 7)
        assert fingerprints({"x": jnp.asarray(flipped)}) != before
    assert fingerprints({"x": jnp.asarray(values[::-1])}) != before
    assert fingerprints({"x": jnp.asarray(np.roll(values, 1, axis=1))}) != before


def test_fingerprint_equals_its_formula_in_numpy():
    def mix(x):
        x = (x ^ (x >> np.uint32(16))) * np.uint32(0x85EBCA6B)
        x = (x ^ (x >> np.uint32(13))) * np.uint32(0xC2B2AE35)
        return x ^ (x >> np.uint32(16))

    values = np.random.default_rng(0).normal(size=(3, 5, 7)).astype(np.float32)
    words = values.view(np.uint32).ravel()
    total = mix(words ^ mix(np.arange(words.size, dtype=np.uint32))).sum(dtype=np.uint32)
    assert fingerprints({"x": jnp.asarray(values)}) == {"x": f"{total:08x}"}
