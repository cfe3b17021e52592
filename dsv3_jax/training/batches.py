"""Rows of text as batches on the devices: targets, documents, slices of sequences."""

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import Mesh
from jaxtyping import Int32

from dsv3_jax.config import Config
from dsv3_jax.data.packing import document_starts, slices
from dsv3_jax.losses import Batch
from sharding.mesh import (
    BATCH,
    make_global_array,
    mesh_spec,
    named_sharding,
    process_batch_shard,
    process_sequence_shard,
)


def batch_of(rows: Int32[np.ndarray, "b row"], config: Config, mesh: Mesh, end_id: int) -> Batch:
    """This process's rows on its devices, with those of others a batch.

    Where they cannot be shared out evenly, rows without targets come on top.

    Args:
        end_id: of the token behind every document.
    """
    context, extra = config.parallel.context, 1 + config.model.mtp_depth
    n_groups = mesh_spec(mesh).n_data_shards // context // process_batch_shard(mesh, context)[1]
    part, n_parts = process_sequence_shard(mesh, context)
    more = ((0, -len(rows) % n_groups), (0, 0))
    loss_mask, rows = np.pad(np.ones(rows.shape, bool), more), np.pad(rows, more)
    doc_start = document_starts(rows, end_id) if config.data.mask_documents else None

    def place(x: np.ndarray) -> jax.Array:
        own = np.split(slices(x, context, extra), n_parts)[part]
        own = rearrange(own, "n (g b) w -> (g n b) w", g=n_groups)
        return make_global_array(own, mesh, BATCH)

    return jax.tree.map(place, Batch(rows, loss_mask, doc_start))


def abstract_batch(config: Config, mesh: Mesh) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes, types and placement of the parts of a training step's `Batch`."""
    train, context = config.train, config.parallel.context
    shape = (train.batch * context, train.seq_len // context + 1 + config.model.mtp_depth)
    place = named_sharding(mesh, BATCH)
    dtypes = (jnp.int32, bool, jnp.int32) if config.data.mask_documents else (jnp.int32, bool)
    return tuple(jax.ShapeDtypeStruct(shape, dtype, sharding=place) for dtype in dtypes)
