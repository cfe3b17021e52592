"""Context parallelism: each sequence is split over several ranks, in consecutive slices.

Tokens of different slices meet in attention alone. There a rank exchanges its slice of all heads
for all slices of its share of the heads: one all-to-all before attention and one after it. So
attention has whole sequences, the plain causal mask and the same work on every rank; everything
else has shorter sequences. Source: DeepSpeed-Ulysses (arXiv 2309.14509).

`layout.context` consecutive ranks of a node form a group; their rows of the same index are the
slices of one sequence. If a group is a single rank, all functions return their argument.

Shapes: t tokens of a slice, T of the sequence; h heads of this rank, H of all; K any head dim.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, Shaped

from sharding.layout import Layout


def positions(n_tokens: int, layout: Layout) -> Int[Array, " t"]:
    """Return the positions in their sequence of the `n_tokens` tokens of this rank's slices."""
    own = jnp.arange(n_tokens)
    if layout.context == 1:
        return own
    return lax.axis_index("rank") % layout.context * n_tokens + own


def seq_to_heads(x: Shaped[Array, "B H t K"], layout: Layout) -> Shaped[Array, "B h T K"]:
    """Exchange own slices of all heads for whole sequences of own heads."""
    if layout.context == 1:
        return x
    return lax.all_to_all(x, "rank", 1, 2, tiled=True, axis_index_groups=_groups(layout))


def heads_to_seq(x: Shaped[Array, "B h T K"], layout: Layout) -> Shaped[Array, "B H t K"]:
    """Exchange whole sequences of own heads for own slices of all heads."""
    if layout.context == 1:
        return x
    return lax.all_to_all(x, "rank", 2, 1, tiled=True, axis_index_groups=_groups(layout))


def gather_sequence(x: Shaped[Array, "B t *rest"], layout: Layout) -> Shaped[Array, "B T *rest"]:
    """All-gather slices to whole sequences."""
    if layout.context == 1:
        return x
    return lax.all_gather(x, "rank", axis=1, tiled=True, axis_index_groups=_groups(layout))


def psum_sequence(x: Shaped[Array, "*any"], layout: Layout) -> Shaped[Array, "*any"]:
    """Sum over the slices of each sequence."""
    if layout.context == 1:
        return x
    return lax.psum(x, "rank", axis_index_groups=_groups(layout))


def _groups(layout: Layout) -> list[list[int]]:
    n = layout.context
    return [list(range(first, first + n)) for first in range(0, layout.mesh.ranks, n)]
