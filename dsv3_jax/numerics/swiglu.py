"""The gated activation of every feed-forward layer."""

import jax
import jax.numpy as jnp

from dsv3_jax.shapes import Array, Float


def swiglu(
    gate_up: Float[Array, "*B F2"], weights: Float[Array, "*B"] | None = None
) -> Float[Array, "*B F"]:
    """silu(gate) * up of the two halves of the last dim, times a weight for each row if given."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    y = jax.nn.silu(gate) * up
    return y if weights is None else y * weights[..., None].astype(y.dtype)
