"""The vocabulary over the expert axes: embedding, logits, and the loss's scan along the head.

The embedding table is split by width and the head by vocabulary. A look-up then moves each token's
row once: t * D numbers per device, however unevenly tokens use the vocabulary. (With the table
split by vocabulary every rank would send a partial sum for every token, ep times as much.) For the
loss the head is gathered chunk by chunk, so that neither the head nor logits [tokens, V] are ever
whole on a device; that moves V * D numbers per pass. Gathering the tokens of all ranks to each
rank's share of the head would move ep * t * D numbers: at 671B with EP64 and one sequence of 4096
tokens per device, 1.9 instead of 0.9 billion.

Shapes: t tokens, D width and d this rank's share of it, V vocabulary and v this rank's share.
"""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int, PyTree

from sharding.collectives import all_gather, reduce_scatter
from sharding.mesh import EXPERT_AXES, MeshSpec


def embed(
    table: Float[Array, "V d"], ids: Int[Array, " t"], mesh: MeshSpec, dtype: jnp.dtype
) -> Float[Array, "t D"]:
    """Return the rows of the embedding table for token ids, from this rank's columns of it."""
    if mesh.ep == 1:
        return table[ids].astype(dtype)
    all_ids = lax.all_gather(ids, EXPERT_AXES, tiled=True)  # [ep*t]
    columns = table[all_ids].astype(dtype)
    return lax.all_to_all(columns, EXPERT_AXES, split_axis=0, concat_axis=1, tiled=True)


def logits(
    rows: Float[Array, "t D"], head: Float[Array, "v D"], mesh: MeshSpec
) -> Float32[Array, "t V"]:
    """Return the logits of a few rows, from this rank's share of the output head."""
    if mesh.ep == 1:
        return jnp.einsum("tD,VD->tV", rows, head, preferred_element_type=jnp.float32)
    all_rows = lax.all_gather(rows, EXPERT_AXES, tiled=True)  # [ep*t D]
    shard = jnp.einsum("tD,VD->tV", all_rows, head, preferred_element_type=jnp.float32)
    return lax.all_to_all(shard, EXPERT_AXES, split_axis=0, concat_axis=1, tiled=True)


def n_vocab_chunks(n_local: int, mesh: MeshSpec, max_rows: int) -> int:
    """Return the fewest equal chunks of a head of which none has over `max_rows` rows.

    Args:
        n_local: rows of the head per rank.
    """
    divisors = (n for n in range(1, n_local + 1) if n_local % n == 0)
    return next((n for n in divisors if n_local // n * mesh.ep <= max_rows), n_local)


def scan_vocab_chunks(
    fn: Callable, carry: PyTree, head: Float[Array, "v D"], n_chunks: int, mesh: MeshSpec
) -> tuple[PyTree, Float[Array, "v D"] | None]:
    """Scan `fn(carry, chunk [c D], ids [c]) -> (carry, out)` over all chunks of the head.

    Args:
        head: this rank's rows. Every chunk has c = V / n_chunks rows, equally many of each rank,
            and `ids` are their token ids.
        n_chunks: must divide V / ep.

    Returns:
        The last carry; and if `out` is an array [c D], its sum over the expert axes, as this rank's
        rows of the head; None if `out` is None.
    """
    n_local = head.shape[0]
    rows = n_local // n_chunks  # per chunk and rank
    first = jnp.arange(mesh.ep, dtype=jnp.int32)[:, None] * n_local

    def step(carry, item):
        index, chunk = item
        ids = first + index * rows + jnp.arange(rows, dtype=jnp.int32)[None, :]
        if mesh.ep > 1:
            chunk = all_gather(chunk, EXPERT_AXES, 0, mesh)
        carry, out = fn(carry, chunk, ids.reshape(-1))
        if out is not None and mesh.ep > 1:
            out = reduce_scatter(out, EXPERT_AXES, 0, mesh)
        return carry, out

    chunks = head.reshape(n_chunks, rows, head.shape[1])
    carry, out = lax.scan(step, carry, (jnp.arange(n_chunks, dtype=jnp.int32), chunks))
    return carry, None if out is None else out.reshape(n_local, -1)
