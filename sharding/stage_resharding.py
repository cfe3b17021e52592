"""Layers of a stack on their way to the ranks of a pipeline, and their gradients on the way back.

A stack [L ...] is stored with a dim of every array divided over the ranks ("pp"). A rank wants some
of the layers, whole: one all-to-all, in which each gets its part of the dim from all others. A
layer may go to several ranks, as in DualPipe; the gradients of all copies come back as one sum.
"""

import jax
import jax.numpy as jnp
import numpy as np

Layers = tuple[tuple[int, ...], ...]  # [ranks S]; L for a place without a layer


def to_ranks(x: jax.Array, dim: int | None, layers: Layers) -> jax.Array:
    """This rank's layers [S ...] of a stack [L ...].

    Args:
        dim: of `x`, that is divided over the ranks; None if every rank has all of it.
        layers: of every rank; a place without one gets any.
    """
    table = jnp.minimum(jnp.asarray(layers), x.shape[0] - 1)
    if dim is None:
        return x[table[jax.lax.axis_index("pp")]]
    parts = jax.lax.all_to_all(x[table], "pp", split_axis=0, concat_axis=dim + 1, tiled=True)
    return parts[0]


def of_rank(x: jax.Array, layers: Layers) -> jax.Array:
    """This rank's layers [S ...] of what every rank has of all layers [L ...]."""
    return to_ranks(x, None, layers)


def most_of_ranks(x: jax.Array, layers: Layers, n_layers: int) -> jax.Array:
    """The largest of this rank's numbers [S] for every layer [L], 0 for those of other ranks."""
    table = jnp.asarray(layers)[jax.lax.axis_index("pp")]
    return jnp.zeros(n_layers, x.dtype).at[table].max(x, mode="drop")


def from_ranks(grad: jax.Array, dim: int | None, layers: Layers, n_layers: int) -> jax.Array:
    """The transpose of `to_ranks`: of the stack [L ...]; all layers have as many copies.

    Where `dim` is None the sum over the ranks is left to the caller.
    """
    if dim is None:
        table = jnp.asarray(layers)[jax.lax.axis_index("pp")]
        return jnp.zeros((n_layers, *grad.shape[1:]), grad.dtype).at[table].add(grad, mode="drop")
    parts = jax.lax.all_to_all(grad[None], "pp", split_axis=dim + 1, concat_axis=0, tiled=True)
    flat = parts.reshape(-1, *parts.shape[2:])  # [ranks S ...] -> [ranks*S ...]
    places = [np.flatnonzero(np.ravel(layers) == layer) for layer in range(n_layers)]
    return sum(flat[np.array(copy)] for copy in zip(*places, strict=True))
