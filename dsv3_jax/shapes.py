"""The letters of every array annotation and einsum, here and in `sharding/`.

    B rows of a batch      T tokens of a row, or positions of queries      S positions of keys
    W tokens of a row with those that its last targets look ahead to       A depths of targets
    D width                F hidden width (F2 = 2 F, gate and up)          V vocabulary
    L layers               P pipeline stages                               M micro-batches
    H heads                N no-rope dim             R rotary dim          O value dim
    C KV latent            Q query latent            K = N + R, keys of attention
    E experts              K experts per token       G expert groups       n tiles, or a count
    r rows of a buffer, sorted by expert             p peers of an exchange, g their groups
    S layers of a rank's stage, where L are those of the model (sharding/layout.py)
    lower case = this device's shard: b of B, e of E, h of H, v of V, d of D, t of the B*T tokens

A letter has two meanings only where no annotation could need both. `_` is any size, `*B` and `...`
are any number of dimensions. Modules of this package import the array types from here, so that the
legend stands in one place; `sharding/` lies below it and imports them from jaxtyping.
"""

import jax
import numpy as np
from jaxtyping import Bool, Float, Float32, Int, UInt16, UInt32

Array = jax.Array | np.ndarray  # callers may hand in either

__all__ = ["Array", "Bool", "Float", "Float32", "Int", "UInt16", "UInt32"]
