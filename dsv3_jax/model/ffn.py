"""The gated feed-forward layer of dense blocks and shared experts."""

from flax import nnx

from dsv3_jax.numerics.fp8 import SavedInput
from dsv3_jax.numerics.matmul import swiglu_matmul
from dsv3_jax.params import Linear
from dsv3_jax.shapes import Array, Float


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)); gate and up are the two halves of one matrix."""

    def __init__(self, width: int, hidden: int, std: float, *, rngs: nnx.Rngs):
        self.gate_up = Linear(width, 2 * hidden, ("embed", "mlp"), std, rngs=rngs)
        self.down = Linear(hidden, width, ("mlp", "embed"), std, rngs=rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return swiglu_matmul(
            self.gate_up(x), self.down.kernel.get_value(), SavedInput("ffn_hidden")
        )
