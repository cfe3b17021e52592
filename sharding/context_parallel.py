"""Context parallelism: a sequence lies over several ranks, in slices that follow each other.

Tokens of different slices meet in attention alone. There a rank gives its slice away and gets a
share of the heads instead, of all slices: an all-to-all before attention and one after it. So
attention has whole sequences, the plain causal mask and the same work on every rank; all else has
shorter rows. Source: DeepSpeed-Ulysses (arXiv 2309.14509).

A group is `layout.context` ranks side by side in a node; its rows of equal number are the slices of
one sequence. Where a group is a single rank, everything here leaves its argument as it is.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sharding.layout import Layout


def _groups(layout: Layout) -> list[list[int]]:
    n = layout.context
    return [list(range(first, first + n)) for first in range(0, layout.mesh.ranks, n)]


def positions(length: int, layout: Layout) -> jax.Array:
    """Places [t] in their sequences of the tokens of this rank's slices, `length` of them each."""
    own = jnp.arange(length)
    if layout.context == 1:
        return own
    return lax.axis_index("rank") % layout.context * length + own


def seq_to_heads(x: jax.Array, layout: Layout) -> jax.Array:
    """Own slices of all heads [B H t K] -> whole sequences of own heads [B h T K]."""
    if layout.context == 1:
        return x
    return lax.all_to_all(x, "rank", 1, 2, tiled=True, axis_index_groups=_groups(layout))


def heads_to_seq(x: jax.Array, layout: Layout) -> jax.Array:
    """The inverse of `to_heads`."""
    if layout.context == 1:
        return x
    return lax.all_to_all(x, "rank", 2, 1, tiled=True, axis_index_groups=_groups(layout))


def gather_sequence(x: jax.Array, layout: Layout) -> jax.Array:
    """Slices [B t ...] -> whole sequences [B T ...], on all ranks of a group."""
    if layout.context == 1:
        return x
    return lax.all_gather(x, "rank", axis=1, tiled=True, axis_index_groups=_groups(layout))


def psum_sequence(x: jax.Array, layout: Layout) -> jax.Array:
    """Sum over the slices of each sequence."""
    if layout.context == 1:
        return x
    return lax.psum(x, "rank", axis_index_groups=_groups(layout))
