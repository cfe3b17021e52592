"""The number formats of a run: which arrays are held, computed and sent in which dtype."""

import dataclasses

import jax.numpy as jnp

from dsv3_jax.config import PrecisionConfig
from dsv3_jax.numerics.quantize import FP8_DISPATCH
from sharding.dispatch import IDENTITY, WireFormat


@dataclasses.dataclass(frozen=True, kw_only=True)
class Policy:
    """The number formats by role (report sec. 3.3.1 to 3.3.3).

    `compute` is for activations and the weights that meet them; sums, norms, the router and the
    gradients of weights are float32 whatever it says. `wire_format` is that of tokens on their way
    to experts.
    """

    compute: jnp.dtype = jnp.dtype("float32")
    master: jnp.dtype = jnp.dtype("float32")
    moments: jnp.dtype = jnp.dtype("float32")
    wire_format: WireFormat = IDENTITY
    fp8: bool = False  # the matmuls of all Linears in layers, and what is saved for their backward

    @classmethod
    def of(cls, precision: PrecisionConfig) -> "Policy":
        """Return the policy that a config's names stand for."""
        return cls(
            compute=jnp.dtype(precision.compute),
            master=jnp.dtype(precision.master),
            moments=jnp.dtype(precision.moments),
            wire_format=FP8_DISPATCH if precision.dispatch == "fp8" else IDENTITY,
            fp8=precision.matmul == "fp8",
        )
