"""The vocabulary over the expert axes: embedding, logits, and the loss's walk along the head.

The embedding table is split by width and the head by vocabulary. A look-up then moves each token's
row once: t * D numbers a device, however uneven the tokens are. (With the table split by
vocabulary every rank would send a partial sum for every token, ep times as much.) For the loss
the head comes past the tokens in pieces, so that neither it nor [tokens, V] logits are ever whole
on a device; that moves V * D numbers a pass, where gathering the tokens of all ranks to each
rank's share of the head would move ep * t * D: at 671B with EP64 and one sequence of 4096 tokens a
device, 0.9 against 1.9 billion.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from sharding.collectives import all_gather, reduce_scatter
from sharding.mesh import EXPERT_AXES, MeshSpec


def embed(table: jax.Array, ids: jax.Array, mesh: MeshSpec, dtype: jnp.dtype) -> jax.Array:
    """Rows [t D] for token ids [t], from this rank's columns [V D/ep] of the table."""
    if mesh.ep == 1:
        return table[ids].astype(dtype)
    every = lax.all_gather(ids, EXPERT_AXES, tiled=True)  # [ep*t]
    columns = table[every].astype(dtype)
    return lax.all_to_all(columns, EXPERT_AXES, split_axis=0, concat_axis=1, tiled=True)


def logits(rows: jax.Array, head: jax.Array, mesh: MeshSpec) -> jax.Array:
    """Logits [t V] in float32 for a few rows [t D], from this rank's share [V/ep D] of the head."""
    if mesh.ep == 1:
        return jnp.einsum("tD,VD->tV", rows, head, preferred_element_type=jnp.float32)
    every = lax.all_gather(rows, EXPERT_AXES, tiled=True)  # [ep*t D]
    share = jnp.einsum("tD,VD->tV", every, head, preferred_element_type=jnp.float32)
    return lax.all_to_all(share, EXPERT_AXES, split_axis=0, concat_axis=1, tiled=True)


def n_vocab_chunks(n_local: int, mesh: MeshSpec, most: int) -> int:
    """The fewest equal pieces of a head of `n_local` rows a rank, none with over `most` rows."""
    whole = (n for n in range(1, n_local + 1) if n_local % n == 0)
    return next((n for n in whole if n_local // n * mesh.ep <= most), n_local)


def scan_vocab_chunks(fn: Callable, carry, head: jax.Array, pieces: int, mesh: MeshSpec):
    """`fn(carry, piece [p D], ids [p]) -> (carry, out)` over all pieces of the head, in turn.

    Args:
        head: this rank's rows [V/ep D]; every piece holds p = V / pieces rows, an equal part of
            each rank's, and `ids` says which tokens they belong to.
        pieces: must divide V / ep.

    Returns:
        The last carry, and if `out` is an array [p D], its sum over the expert axes, as this
        rank's rows [V/ep D]; None if it is None.
    """
    n_local = head.shape[0]
    rows = n_local // pieces
    first = jnp.arange(mesh.ep, dtype=jnp.int32)[:, None] * n_local

    def step(carry, item):
        index, piece = item
        ids = first + index * rows + jnp.arange(rows, dtype=jnp.int32)[None, :]
        if mesh.ep > 1:
            piece = all_gather(piece, EXPERT_AXES, 0, mesh)
        carry, out = fn(carry, piece, ids.reshape(-1))
        if out is not None and mesh.ep > 1:
            out = reduce_scatter(out, EXPERT_AXES, 0, mesh)
        return carry, out

    split = head.reshape(pieces, rows, head.shape[1])
    carry, out = lax.scan(step, carry, (jnp.arange(pieces, dtype=jnp.int32), split))
    return carry, None if out is None else out.reshape(n_local, -1)
