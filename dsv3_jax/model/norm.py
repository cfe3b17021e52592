"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx

from dsv3_jax.shapes import Array, Float


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32."""

    def __init__(self, width: int, eps: float):
        self.eps = eps
        self.scale = nnx.Param(
            jnp.ones(width, jnp.float32), names=("norm",), sizes=(width,), wide=True, fp8=False
        )

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        wide = x.astype(jnp.float32)
        inverse = jax.lax.rsqrt(jnp.square(wide).mean(-1, keepdims=True) + self.eps)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (wide * inverse * scale).astype(x.dtype)
