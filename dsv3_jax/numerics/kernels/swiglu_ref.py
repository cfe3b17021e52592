"""SwiGLU, and SwiGLU straight into FP8: the reference."""

import jax
import jax.numpy as jnp

from dsv3_jax.numerics.quantize import TILE, QuantizedTensor, quantize
from dsv3_jax.shapes import Array, Float


def swiglu(
    gate_up: Float[Array, "*B F2"], weights: Float[Array, "*B"] | None = None
) -> Float[Array, "*B F"]:
    """Return silu(gate) * up of the two halves of the last dim, times a weight per row if given."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    y = jax.nn.silu(gate) * up
    return y if weights is None else y * weights[..., None].astype(y.dtype)


def swiglu_quantize(
    hidden: Float[Array, "r F2"], gates: Float[Array, " r"] | None
) -> QuantizedTensor:
    """Return `swiglu` of a hidden layer, as values [r F] in tiles of 1 x 128."""
    return quantize(swiglu(hidden, gates), TILE)
