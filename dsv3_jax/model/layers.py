"""The small layers that everything else is built of: RMSNorm, Linear, SwiGLU."""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.numerics.fp8 import SavedInput
from dsv3_jax.numerics.matmul import NOT_SAVED, matmul, swiglu_matmul
from dsv3_jax.params import make_param
from dsv3_jax.shapes import Array, Float


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(
            jnp.ones(width, jnp.float32),
            axes=("norm",),
            global_shape=(width,),
            keep_fp32=True,
            fp8=False,
        )

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32 * inverse * scale).astype(x.dtype)


class Linear(nnx.Module):
    """x W, without bias.

    Args:
        axes: logical names of the input and the output dimension.
        fp8: whether the policy may run the matmul in FP8.
    """

    def __init__(
        self,
        n_in: int,
        n_out: int,
        axes: tuple[str, str],
        std: float,
        fp8: bool = True,
        *,
        rngs: nnx.Rngs,
    ):
        self.kernel = make_param(rngs, (n_in, n_out), axes, std, fp8=fp8)

    def __call__(
        self, x: Float[Array, "*B D"], save: SavedInput = NOT_SAVED
    ) -> Float[Array, "*B F"]:
        """Return x W; `save` says what the backward finds of x."""
        return matmul(x, self.kernel.get_value(), save)


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x)); gate and up are the two halves of one matrix."""

    def __init__(self, width: int, hidden: int, std: float, *, rngs: nnx.Rngs):
        self.gate_up = Linear(width, 2 * hidden, ("embed", "mlp"), std, rngs=rngs)
        self.down = Linear(hidden, width, ("mlp", "embed"), std, rngs=rngs)

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        return swiglu_matmul(
            self.gate_up(x), self.down.kernel.get_value(), SavedInput("ffn_hidden")
        )
