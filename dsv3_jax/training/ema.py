"""The exponential moving average (EMA) of the weights, in host memory (report sec. 3.2.2).

The weights are copied on their device, and a thread fetches the copy and adds it to the average
while the next steps run. On the device this takes memory for one more copy of the stored weights
until the thread has fetched it.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dsv3_jax.config import EmaConfig


class HostEma:
    """ema <- ema + (1 - decay^every) (weights - ema) in float32; each host has its own shards."""

    def __init__(self, params: PyTree, config: EmaConfig):
        """Begin with a copy of `params`."""
        self._every, self._rate = config.every, np.float32(1.0 - config.decay**config.every)
        leaves, self._treedef = jax.tree.flatten(params)
        self._like = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves]
        self._ema = [
            {key: np.array(shard, np.float32) for key, shard in _shards(leaf).items()}
            for leaf in leaves
        ]
        self._copy = jax.jit(lambda leaves: [jnp.copy(leaf) for leaf in leaves])
        self._pool, self._pending = ThreadPoolExecutor(1, "ema"), Future()
        self._pending.set_result(None)

    def update(self, step: int, params: PyTree):
        """Start adding the weights after step `step`, if it is one of every `every`."""
        if step % self._every == 0:
            self._pending.result()
            copy = self._copy(jax.tree.leaves(params))
            self._pending = self._pool.submit(self._add, copy)

    def _add(self, leaves: list[jax.Array]):
        for ema, leaf in zip(self._ema, leaves, strict=True):
            for key, shard in _shards(leaf).items():
                ema[key] += self._rate * (np.asarray(shard, np.float32) - ema[key])

    def params(self) -> PyTree:
        """Return the average on the devices, sharded as the weights are."""
        self._pending.result()
        leaves = []
        for like, ema in zip(self._like, self._ema, strict=True):
            indices = like.sharding.addressable_devices_indices_map(like.shape)
            shards = [
                jax.device_put(ema[_key(index, like.shape)].astype(like.dtype), device)
                for device, index in indices.items()
            ]
            leaves.append(
                jax.make_array_from_single_device_arrays(like.shape, like.sharding, shards)
            )
        return jax.tree.unflatten(self._treedef, leaves)

    def close(self):
        """Stop the thread once it has added what there is."""
        self._pending.result()
        self._pool.shutdown()


def _shards(leaf: jax.Array) -> dict[tuple, jax.Array]:
    """Return this host's shards by their index in the array, each once."""
    return {_key(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
