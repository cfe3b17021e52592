"""Rows of a batch on the devices: filled up, cut into slices of sequences, and sharded."""

from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh

from dsv3_jax.config import Config
from sharding.mesh import (
    BATCH,
    make_global_array,
    mesh_spec,
    named_sharding,
    process_batch_shard,
    process_sequence_shard,
)

Rows = TypeVar("Rows")  # a NamedTuple or dict of arrays [b row], such as `data.packing.Row`


def device_batch(rows: Rows, config: Config, mesh: Mesh) -> Rows:
    """Put this process's rows onto its devices, as its part of the global batch.

    All arrays are treated alike. Where the rows do not fill the devices evenly, rows of zeros come
    behind them: their `loss_mask` is False, so that they hold no targets. With context parallelism
    neighbouring devices get the slices of the same rows.
    """
    context, extra = config.parallel.context, 1 + config.model.mtp_depth
    n_groups = mesh_spec(mesh).n_data_shards // context // process_batch_shard(mesh, context)[1]
    index, n_shards = process_sequence_shard(mesh, context)

    def put(x: np.ndarray) -> jax.Array:
        x = np.pad(x, ((0, -len(x) % n_groups), (0, 0)))
        own = np.split(context_slices(x, context, extra), n_shards)[index]
        return make_global_array(rearrange(own, "n (g b) w -> (g n b) w", g=n_groups), mesh, BATCH)

    return jax.tree.map(put, rows)


def context_slices(rows: np.ndarray, n: int, extra: int) -> np.ndarray:
    """Cut rows [b W] into `n` shorter ones each [n b w], which overlap by `extra` tokens."""
    length = (rows.shape[1] - extra) // n
    return np.stack([rows[:, i * length : (i + 1) * length + extra] for i in range(n)])


def abstract_batch(config: Config, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The shapes, dtypes and shardings of the fields of a training step's `losses.Batch`."""
    train, context = config.train, config.parallel.context
    shape = (train.batch * context, train.seq_len // context + 1 + config.model.mtp_depth)
    sharding = named_sharding(mesh, BATCH)
    dtypes = (jnp.int32, bool, jnp.int32) if config.data.mask_documents else (jnp.int32, bool)
    return tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for dtype in dtypes)
