"""Block scaling: E4M3 codes that share one float32 scale a block (report sec. 3.3.2).

E4M3 reaches from 2^-9 to 448 with 3 bits of fraction; the scale takes a block's amax, its largest
magnitude, to 448. A NaN or an infinity turns its whole block into NaN: it is never hidden.
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
AMAX_FLOOR = 1e-4  # of the published activation kernel: a block of zeros has a scale, too
AMAX_TINY = E4M3_MAX * 2.0**-126  # below it, amax / 448 is no normal float32


class QuantizedTensor(NamedTuple):
    """Numbers as `values * scale`, the scale that of their block."""

    values: Array  # [... R D] float8_e4m3fn
    scale: Array  # [... ceil(R/rows) ceil(D/cols)] float32


@jax.named_scope("quantize")
def quantize(
    x: Float[Array, "*B R D"],
    block: tuple[int, int],
    power_of_two: bool = False,
    floor: float = AMAX_FLOOR,
) -> QuantizedTensor:
    """The nearest E4M3 codes under scale max(amax, floor) / 448, or the power of two from there up.

    An element is off by at most 1/17 of itself (half a step of 1/8), or 2^-10 of the scale if that
    is more; the largest error of a block is 1/28 of its amax (1/17 under a power of two).
    """
    amax = jnp.maximum(_amax(x, block), floor)
    scale = _power_of_two_scale(amax) if power_of_two else _exact_scale(amax)
    return QuantizedTensor(_codes(x, scale, block), scale)


@jax.named_scope("quantize")
def quantize_shard(
    x: Float[Array, "*B r d"], start: tuple, whole: tuple[int, int], largest: Callable
) -> QuantizedTensor:
    """This device's share of a weight in blocks of 128x128 -> its codes, and all blocks' scales.

    A block may lie on several devices, so the codes are those of the whole, however it is split.

    Args:
        start: row and column of the weight where the share begins.
        whole: rows and columns of the weight.
        largest: maximum over all devices that hold a share of the weight.
    """
    # Shares begin at multiples of `unit`, as blocks do: a unit lies in one share and in one block.
    (rows, cols), (r, d) = whole, x.shape[-2:]
    unit = (math.gcd(r, rows, BLOCK[0]), math.gcd(d, cols, BLOCK[1]))
    block = (BLOCK[0] // unit[0], BLOCK[1] // unit[1])  # in units
    at = (0,) * (x.ndim - 2) + (start[0] // unit[0], start[1] // unit[1])
    mine = _amax(x, unit)
    units = jnp.zeros((*x.shape[:-2], rows // unit[0], cols // unit[1]), jnp.float32)
    units = largest(lax.dynamic_update_slice(units, mine, at))
    scale = _exact_scale(jnp.maximum(_amax(units, block), AMAX_FLOOR))
    each = lax.dynamic_slice(broadcast_scale(scale, block, units.shape), at, mine.shape)
    return QuantizedTensor(_codes(x, each, unit), scale)


def dequantize(
    scaled: QuantizedTensor, block: tuple[int, int], dtype=jnp.float32
) -> Float[Array, "..."]:
    """Values times scales in float32, rounded once to `dtype`."""
    wide = scaled.values.astype(jnp.float32) * broadcast_scale(
        scaled.scale, block, scaled.values.shape
    )
    return wide.astype(dtype)


class DispatchedTiles(NamedTuple):
    """Rows whose tiles share a power of two, for the way between ranks."""

    values: Array  # [t D] float8_e4m3fn
    exponent: Array  # [t ceil(D/128)] uint8, biased by 127


def _encode(rows: Float[Array, "t D"]) -> DispatchedTiles:
    """Gradients travel, too, and are often smaller than the floor for activations."""
    values, scale = quantize(rows, TILE, power_of_two=True, floor=AMAX_TINY)
    bits = lax.bitcast_convert_type(scale, jnp.uint32)
    return DispatchedTiles(values, (bits >> 23).astype(jnp.uint8))


def _decode(tiles: DispatchedTiles, dtype) -> Float[Array, "t D"]:
    """Exact in bfloat16, too: a code has 4 bits and keeps them."""
    bits = tiles.exponent.astype(jnp.uint32) << 23
    scale = lax.bitcast_convert_type(bits, jnp.float32).astype(dtype)
    return tiles.values.astype(dtype) * broadcast_scale(scale, TILE, tiles.values.shape)


# Rows between ranks (report sec. 3.3.3). Powers of two, so that what was decoded encodes to the
# same numbers again: a row may take two hops.
FP8_DISPATCH = WireFormat(_encode, _decode)


def requantize(
    w: Float[Array, "*B R D"],
    block: tuple[int, int],
    known_scale: Float32[Array, "*B _ _"] | None = None,
) -> QuantizedTensor:
    """Codes from which `w` comes back exactly, in its own dtype, wherever such codes are found.

    Weights read from E4M3 codes get these codes and scales back: float32 ones if a code in the
    block was +-448, as quantization makes it, bfloat16 ones if their scale is known. Other blocks
    are rounded under amax / 448, without a floor: a block of zeros has scale 1, as in golden C3.

    Args:
        known_scale: the scales that `w` was read with, used in the blocks where they still fit.
    """
    amax = _amax(w, block)
    plain = jnp.where(amax < AMAX_TINY, 1.0, _exact_scale(amax))
    # amax is a rounded 448 * scale, so the scale it came from is at most one float32 away.
    candidates = [jnp.nextafter(plain, jnp.inf), jnp.nextafter(plain, 0.0), plain]
    if known_scale is not None:
        candidates.append(known_scale)
    scale = plain
    for candidate in candidates:  # the last that fits
        scale = jnp.where(_fits(w, candidate, block), candidate, scale)
    return QuantizedTensor(_codes(w, scale, block), scale)


def _fits(w, scale, block: tuple[int, int]):
    """Which blocks of `w` are codes times `scale`, in every element."""
    # The barriers keep XLA from dropping the two roundings that are in question.
    codes = lax.optimization_barrier(_codes(w, scale, block))
    back = lax.optimization_barrier(dequantize(QuantizedTensor(codes, scale), block, w.dtype))
    return _blocks(back == w, block, True).all(axis=(-3, -1))


def _codes(x, scale, block: tuple[int, int]):
    """The E4M3 numbers nearest to x / scale, ties to even; scales that belong to x keep to 448."""
    return (x.astype(jnp.float32) / broadcast_scale(scale, block, x.shape)).astype(E4M3)


def _amax(x, block: tuple[int, int]):
    """Largest magnitude of each block, NaN if it holds one.

    By the bits, whose order is that of magnitudes with NaN on top: maxima of floats may lose it.
    """
    bits = lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)
    return lax.bitcast_convert_type(_blocks(bits, block, 0).max(axis=(-3, -1)), jnp.float32)


def _blocks(x, block: tuple[int, int], fill):
    """[... R D] -> [... R/rows rows D/cols cols], the last blocks completed with `fill`."""
    rows, cols = block
    short = (-x.shape[-2] % rows, -x.shape[-1] % cols)
    x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, n) for n in short], constant_values=fill)
    return rearrange(x, "... (r a) (d b) -> ... r a d b", a=rows, b=cols)


def broadcast_scale(scale, block: tuple[int, int], shape: tuple[int, ...]):
    """Each element's scale for an array of `shape`: a broadcast, which XLA fuses with its use."""
    want = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
    if scale.shape != want:
        raise ValueError(
            f"scale has shape {scale.shape}; {shape} in blocks of {block} needs {want}"
        )
    each = jnp.repeat(jnp.repeat(scale, block[0], axis=-2), block[1], axis=-1)
    return each[..., : shape[-2], : shape[-1]]


def _exact_scale(amax):
    """amax / 448, rounded once.

    XLA would turn a constant into a product with 1/448. Numbers of few bits, as in bfloat16, often
    lie half-way between two codes, and there the last bit of the scale decides.
    """
    return amax / lax.optimization_barrier(jnp.full_like(amax, E4M3_MAX))


def _power_of_two_scale(amax):
    """The smallest power of two s with 448 s >= amax, from the bits of amax / 256.

    448 is 1.75 * 256, so s is the power of two in amax / 256, or twice that if the fraction there
    is above 1.75: then the sum carries into the exponent.
    """
    part = amax / 256
    bits = lax.bitcast_convert_type(part, jnp.uint32) + jnp.uint32(0x1FFFFF)
    power = lax.bitcast_convert_type(bits & jnp.uint32(0xFF800000), jnp.float32)
    return jnp.where(jnp.isfinite(part), power, part)
