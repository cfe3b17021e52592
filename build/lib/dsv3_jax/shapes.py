"""The letters of every array annotation and einsum in this package.

    B batch      T query pos     S key pos     D width        V vocabulary     L layers
    H heads      N no-rope dim   R rope dim    O value dim    C kv latent      Q query latent
    E experts    K top-k         G groups      F hidden       P stages         M micro-batches
    n tiles      r received rows
    lower case = this shard's share: b of B, e of E, t of the b*T tokens, v of V

Modules import the array types from here, so that the legend stands in one place.
"""

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt16, UInt32

Array = jax.Array | np.ndarray  # callers may hand in either

__all__ = ["Array", "Bool", "Float", "Float32", "Int", "UInt16", "UInt32"]
