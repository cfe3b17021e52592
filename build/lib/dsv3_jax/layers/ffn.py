"""The gated feed-forward layer of dense blocks and shared experts."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.layers.linear import Linear
from dsv3_jax.shapes import Array, Float


def swiglu(gate_up: Float[Array, "*B F2"]) -> Float[Array, "*B F"]:
    """silu(gate) * up, of the two halves of the last dim."""
    gate, up = jnp.split(gate_up, 2, axis=-1)
    return jax.nn.silu(gate) * up


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)); gate and up are the two halves of one matrix."""

    def __init__(self, width: int, hidden: int, std: float, *, rngs: nnx.Rngs):
        self.gate_up = Linear(width, 2 * hidden, ("embed", "mlp"), std, rngs=rngs)
        self.down = Linear(hidden, width, ("mlp", "embed"), std, rngs=rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return self.down(swiglu(checkpoint_name(self.gate_up(x), "ffn_hidden")))
