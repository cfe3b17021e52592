"""Statistics of quantization: how many numbers of an array a rounding to FP8 lost, and how."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from dsv3_jax.numerics.quantize import E4M3_MAX, QuantizedTensor
from dsv3_jax.shapes import Array, Float32, Int


class QuantStats(NamedTuple):
    """Counts of the numbers of an array, by what the rounding to FP8 made of them."""

    all: Array
    underflow: Array  # not 0, but rounded to 0
    saturated: Array  # rounded to +-448: at least the largest of each tile
    not_finite: Array  # NaN or infinite, which makes a whole tile NaN


def count_rounding(
    x: jax.Array | float, quantized: QuantizedTensor, sizes: Int[Array, " e"] | None = None
) -> Float32[Array, " 4"]:
    """Return the `QuantStats` of numbers `x` and what they were rounded to.

    Args:
        sizes: rows of each group; rows beyond the last group are not counted.
    """
    values, n_rows = quantized.values.astype(jnp.float32), quantized.values.shape[-2]
    in_use = jnp.arange(n_rows) < (n_rows if sizes is None else sizes.sum())
    in_use = in_use.reshape(*[1] * (values.ndim - 2), -1, 1)
    masks = QuantStats(
        all=True,
        underflow=(x != 0) & (values == 0),
        saturated=jnp.abs(values) == E4M3_MAX,
        not_finite=~jnp.isfinite(values),
    )
    masks = (jnp.broadcast_to(mask & in_use, values.shape) for mask in masks)
    return jnp.stack([mask.sum(dtype=jnp.float32) for mask in masks])
