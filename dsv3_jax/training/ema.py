"""The mean of the weights over the last steps, on the host (report sec. 3.2.2).

Every step's weights are copied on their device, and a thread brings the copy over and adds it to
the mean while the next steps run. On the device it takes room for one more copy of the stored
weights, for as long as the copy is under way.
"""

from concurrent.futures import Future, ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from dsv3_jax.config import EmaConfig


class HostEma:
    """mean <- mean + (1 - decay^every) (weights - mean), each host its own shards, in float32."""

    def __init__(self, params: PyTree, config: EmaConfig):
        """Begin with `params`, which are not kept."""
        self._every, self._rate = config.every, np.float32(1.0 - config.decay**config.every)
        leaves, self._treedef = jax.tree.flatten(params)
        self._like = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for x in leaves]
        self._means = [
            {key: np.array(shard, np.float32) for key, shard in _shards(leaf).items()}
            for leaf in leaves
        ]
        self._copy = jax.jit(lambda leaves: [jnp.copy(leaf) for leaf in leaves])
        self._pool, self._pending = ThreadPoolExecutor(1, "ema"), Future()
        self._pending.set_result(None)

    def update(self, step: int, params: PyTree):
        """Take in the weights after step `step`; returns before that is done."""
        if step % self._every == 0:
            self._pending.result()
            copy = self._copy(jax.tree.leaves(params))
            self._pending = self._pool.submit(self._take_in, copy)

    def _take_in(self, leaves: list[jax.Array]):
        for means, leaf in zip(self._means, leaves, strict=True):
            for key, shard in _shards(leaf).items():
                means[key] += self._rate * (np.asarray(shard, np.float32) - means[key])

    def params(self) -> PyTree:
        """The mean on the devices, placed as the weights are."""
        self._pending.result()
        leaves = []
        for like, means in zip(self._like, self._means, strict=True):
            places = like.sharding.addressable_devices_indices_map(like.shape)
            shards = [
                jax.device_put(means[_key(index, like.shape)].astype(like.dtype), device)
                for device, index in places.items()
            ]
            leaves.append(
                jax.make_array_from_single_device_arrays(like.shape, like.sharding, shards)
            )
        return jax.tree.unflatten(self._treedef, leaves)

    def close(self):
        """Stop the thread once it has taken in what there is."""
        self._pending.result()
        self._pool.shutdown()


def _shards(leaf: jax.Array) -> dict[tuple, jax.Array]:
    """This host's shards by their place, each once."""
    return {_key(shard.index, leaf.shape): shard.data for shard in leaf.addressable_shards}


def _key(index: tuple[slice, ...], shape: tuple[int, ...]) -> tuple:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))
