"""Which numbers are held in which format."""

import dataclasses

import jax.numpy as jnp

from dsv3_jax.config import PrecisionConfig
from dsv3_jax.numerics.quantize import FP8_DISPATCH
from sharding.dispatch import IDENTITY, WireFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """Number formats by role (report sec. 3.3.2, 3.3.3).

    `compute` is for activations and the weights that meet them; sums, norms, the router and the
    gradients of weights are float32 whatever it says. `wire` is for tokens on their way to experts.
    """

    compute: jnp.dtype = jnp.dtype("float32")
    master: jnp.dtype = jnp.dtype("float32")
    moments: jnp.dtype = jnp.dtype("float32")
    wire: WireFormat = IDENTITY
    fp8: bool = False  # products of all Linears in layers, and what their backwards keep

    @classmethod
    def of(cls, precision: PrecisionConfig) -> "Policy":
        return cls(
            compute=jnp.dtype(precision.compute),
            master=jnp.dtype(precision.master),
            moments=jnp.dtype(precision.moments),
            wire=FP8_DISPATCH if precision.dispatch == "fp8" else IDENTITY,
            fp8=precision.matmul == "fp8",
        )
