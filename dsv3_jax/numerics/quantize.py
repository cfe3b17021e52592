"""Block scaling: E4M3 values that share one float32 scale per block (report sec. 3.3.2).

E4M3 reaches from 2^-9 to 448 with 3 bits of fraction; the scale takes a block's amax, its largest
magnitude, to 448. A NaN or an infinity turns its whole block into NaN: it is never hidden. A block
is any rectangle of the last two dimensions; the ones in use are `TILE`, `TILE_T` and `BLOCK`.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax

from dsv3_jax.shapes import Array, Float, Float32
from sharding.dispatch import WireFormat

E4M3, E4M3_MAX = jnp.dtype(jnp.float8_e4m3fn), 448.0
BLOCK_SIZE = 128  # numbers along a dimension that share a scale
TILE = (1, BLOCK_SIZE)  # activations: one scale per token and 128 channels
TILE_T = (BLOCK_SIZE, 1)  # operands of a sum over tokens: one scale per channel and 128 tokens
BLOCK = (BLOCK_SIZE, BLOCK_SIZE)  # weights
AMAX_FLOOR = 1e-4  # as in the published activation kernel: a block of zeros has a scale, too
AMAX_TINY = E4M3_MAX * 2.0**-126  # below it, amax / 448 is no normal float32


class QuantizedTensor(NamedTuple):
    """An array of numbers as `values * scale`, each with the scale of its block."""

    values: Array  # [... R D] float8_e4m3fn
    scale: Array  # [... ceil(R/rows) ceil(D/cols)] float32, of blocks of rows x cols


@jax.named_scope("quantize")
def quantize(
    x: Float[Array, "*B R D"],
    block: tuple[int, int],
    power_of_two: bool = False,
    floor: float = AMAX_FLOOR,
) -> QuantizedTensor:
    """Return the nearest E4M3 values under the scale max(amax, floor) / 448 of each block.

    An element is off by at most 1/17 of itself (half a step of 1/8), or 2^-10 of the scale if that
    is more; the largest error of a block is 1/28 of its amax (1/17 under a power of two).

    Args:
        block: rows and columns that share a scale.
        power_of_two: round scales up to powers of two.
        floor: least amax that a scale is made for.
    """
    amax = jnp.maximum(_amax(x, block), floor)
    scale = _power_of_two_scale(amax) if power_of_two else _exact_scale(amax)
    return QuantizedTensor(_round(x, scale, block), scale)


@jax.named_scope("quantize")
def quantize_shard(
    x: Float[Array, "*B r d"], offset: tuple, global_shape: tuple[int, int], pmax: Callable
) -> QuantizedTensor:
    """Return the values of this device's shard of a weight, and the scales of the whole weight.

    Blocks are 128x128. One may lie on several devices, and its scale is that of the whole weight,
    however that is split.

    Args:
        offset: row and column of the weight where the shard begins.
        global_shape: rows and columns of the weight.
        pmax: elementwise maximum over all devices that hold a shard of the weight.
    """
    # Shards and blocks begin at multiples of `unit`: a unit lies in one shard and in one block.
    (rows, cols), (r, d) = global_shape, x.shape[-2:]
    unit = (math.gcd(r, rows, BLOCK[0]), math.gcd(d, cols, BLOCK[1]))
    block = (BLOCK[0] // unit[0], BLOCK[1] // unit[1])  # in units
    first = (0,) * (x.ndim - 2) + (offset[0] // unit[0], offset[1] // unit[1])
    shard_amax = _amax(x, unit)
    amax = jnp.zeros((*x.shape[:-2], rows // unit[0], cols // unit[1]), jnp.float32)
    amax = pmax(lax.dynamic_update_slice(amax, shard_amax, first))
    scale = _exact_scale(jnp.maximum(_amax(amax, block), AMAX_FLOOR))
    unit_scale = broadcast_scale(scale, block, amax.shape)
    shard_scale = lax.dynamic_slice(unit_scale, first, shard_amax.shape)
    return QuantizedTensor(_round(x, shard_scale, unit), scale)


def dequantize(
    x: QuantizedTensor, block: tuple[int, int], dtype: jax.typing.DTypeLike = jnp.float32
) -> Float[Array, "..."]:
    """Return values times scales, multiplied in float32 and rounded once to `dtype`."""
    x32 = x.values.astype(jnp.float32) * broadcast_scale(x.scale, block, x.values.shape)
    return x32.astype(dtype)


class DispatchedTiles(NamedTuple):
    """Rows on their way between ranks: E4M3 values, and a power of two per tile."""

    values: Array  # [t D] float8_e4m3fn
    exponent: Array  # [t ceil(D/128)] uint8, biased by 127


def _encode(rows: Float[Array, "t D"]) -> DispatchedTiles:
    """Return rows in FP8. Gradients, too, which are often smaller than the floor of activations."""
    values, scale = quantize(rows, TILE, power_of_two=True, floor=AMAX_TINY)
    bits = lax.bitcast_convert_type(scale, jnp.uint32)
    return DispatchedTiles(values, (bits >> 23).astype(jnp.uint8))


def _decode(tiles: DispatchedTiles, dtype) -> Float[Array, "t D"]:
    """Return the rows again. Exact in bfloat16, too: an E4M3 value has 4 significant bits."""
    bits = tiles.exponent.astype(jnp.uint32) << 23
    scale = lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)
    return tiles.values.astype(dtype) * broadcast_scale(scale, TILE, tiles.values.shape)


# The format of tokens on their way to experts (report sec. 3.3.3). Scales are powers of two, so
# that decoded rows encode to the same numbers again: a row may take two hops.
FP8_DISPATCH = WireFormat(_encode, _decode)


def requantize(
    w: Float[Array, "*B R D"],
    block: tuple[int, int],
    known_scale: Float32[Array, "*B _ _"] | None = None,
) -> QuantizedTensor:
    """Return values and scales from which `w` comes back exactly, wherever such are found.

    Weights that were dequantized get the values and scales back that they came from: in float32
    if a value of the block was +-448, as `quantize` makes it; in bfloat16 if their scale is known.
    Other blocks are rounded under amax / 448, without a floor: zeros have scale 1, as in golden C3.

    Args:
        known_scale: scales that `w` was dequantized with, used in the blocks where they still fit.
    """
    amax = _amax(w, block)
    rounded = jnp.where(amax < AMAX_TINY, 1.0, _exact_scale(amax))
    # amax is a rounded 448 * scale, so the scale it came from is at most one float32 away.
    candidates = [jnp.nextafter(rounded, jnp.inf), jnp.nextafter(rounded, 0.0), rounded]
    if known_scale is not None:
        candidates.append(known_scale)
    scale = rounded
    for candidate in candidates:  # the last that fits
        scale = jnp.where(_fits(w, candidate, block), candidate, scale)
    return QuantizedTensor(_round(w, scale, block), scale)


def _fits(w, scale, block: tuple[int, int]):
    """Return which blocks of `w` equal E4M3 values times `scale` in every element."""
    # The barriers keep XLA from dropping the two roundings that are in question.
    values = lax.optimization_barrier(_round(w, scale, block))
    back = lax.optimization_barrier(dequantize(QuantizedTensor(values, scale), block, w.dtype))
    return _split_blocks(back == w, block, True).all(axis=(-3, -1))


def _round(x, scale, block: tuple[int, int]):
    """Return the E4M3 values nearest to x / scale, ties to even; scales of x's amax keep to 448."""
    return (x.astype(jnp.float32) / broadcast_scale(scale, block, x.shape)).astype(E4M3)


def _amax(x, block: tuple[int, int]):
    """Return the largest magnitude of each block, NaN if it holds one.

    Compares bits, whose order is that of magnitudes with NaN on top: a maximum of floats may lose
    the NaN.
    """
    bits = lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    return lax.bitcast_convert_type(_split_blocks(bits, block, 0).max(axis=(-3, -1)), jnp.float32)


def _split_blocks(x, block: tuple[int, int], fill):
    """Return x as [... R/rows rows D/cols cols], the last blocks completed with `fill`."""
    rows, cols = block
    short = (-x.shape[-2] % rows, -x.shape[-1] % cols)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, n) for n in short], constant_values=fill)
    return rearrange(x, "... (r a) (d b) -> ... r a d b", a=rows, b=cols)


def broadcast_scale(scale, block: tuple[int, int], shape: tuple[int, ...]):
    """Return the scale of each element of an array of `shape`; XLA fuses it with its use.

    Raises:
        ValueError: not one scale per block.
    """
    expected = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    if scale.shape != expected:
        raise ValueError(
            f"scale has shape {scale.shape}; {shape} in blocks of {block} needs {expected}"
        )
    scale = jnp.repeat(jnp.repeat(scale, block[0], axis=-2), block[1], axis=-1)
    return scale[..., : shape[-2], : shape[-1]]


def _exact_scale(amax):
    """Return amax / 448, rounded once.

    XLA would turn division by a constant into a product with 1/448. Numbers of few bits, as in
    bfloat16, often lie half-way between two E4M3 values, and there the last bit of the scale
    decides.
    """
    return amax / lax.optimization_barrier(jnp.full_like(amax, E4M3_MAX))


def _power_of_two_scale(amax):
    """Return the smallest power of two s with 448 s >= amax, from the bits of amax / 256.

    448 is 1.75 * 256, so s is the power of two in amax / 256, or twice that if the fraction there
    is above 1.75: then the sum carries into the exponent.
    """
    ratio = amax / 256
    bits = lax.bitcast_convert_type(ratio, jnp.uint32) + jnp.uint32(0x1FFFFF)
    power = lax.bitcast_convert_type(bits & jnp.uint32(0xFF800000), jnp.float32)
    return jnp.where(jnp.isfinite(ratio), power, ratio)
