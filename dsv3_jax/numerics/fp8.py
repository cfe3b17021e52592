"""Products in FP8 (report sec. 3.3.1 to 3.3.3): all three of a Linear, dense or of experts.

    Fprop  y  = Q(x) Q(W)        x in tiles 1x128, W in blocks 128x128
    Dgrad  dx = Q(dy) Q(W)^T     dy in tiles 1x128
    Wgrad  dW = Q'(x)^T Q'(dy)   both in tiles 128x1; x comes from what the forward kept of it

Products of codes are summed in float32, and scales applied, 128 of the inner dimension at a time.
What the backward needs is kept in FP8, with two exceptions that the report makes: the input of the
Linear behind attention has 6 bits of fraction, and of a gated layer the input of SwiGLU is kept, in
FP8, and its output computed again.

Here stands the reference, which runs wherever there is no kernel: codes times scales in float32,
then a float32 product, which differs in rounding alone. On TPUs the kernels of
`numerics/kernels/` run (checked in interpret mode; compiled for tpu7x, which multiplies FP8, and
for v5p, which emulates it), on GPUs one for Fprop and Dgrad (the same, compiled for an H100).
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.numerics.gmm import gmm, tgmm
from dsv3_jax.numerics.kernels import fp8_gpu, fp8_tpu
from dsv3_jax.numerics.kernels.fp8_wgrad_tpu import fp8_wgrad, grouped_fp8_wgrad
from dsv3_jax.numerics.kernels.swiglu_tpu import swiglu_quantize
from dsv3_jax.numerics.quantize import (
    AMAX_TINY,
    BLOCK,
    E4M3,
    TILE,
    TILE_T,
    QuantizedTensor,
    dequantize,
    quantize,
)
from dsv3_jax.numerics.swiglu import swiglu
from dsv3_jax.shapes import Array, Float, Float32, Int

KERNELS = {"tpu": fp8_tpu, "gpu": fp8_gpu, "cuda": fp8_gpu}  # of Fprop and Dgrad


@jax.tree_util.register_static
class Platform(str):
    """Of the devices: part of a pytree's structure, not of its leaves."""


class GradTap(NamedTuple):
    """Zeros beside an FP8 weight that no matmul reads: their gradients are what a backward returns.

    See `dsv3_jax/params.py` for why.
    """

    weight: Array  # [... D F]; its gradient is dW
    stats: Array | None = None  # [... 3 4]; its gradient: `QuantStats` of x, dy and the weight


class QuantStats(NamedTuple):
    """Counts, in float32, of how the numbers of an array were rounded to FP8."""

    all: Array
    underflow: Array  # not 0, but their code is
    saturated: Array  # of code +-448: the largest of each tile, at least
    not_finite: Array  # NaN or infinite, which makes a whole tile NaN


class Fp8Weight(NamedTuple):
    """A weight as products take it."""

    quantized: (
        QuantizedTensor | None
    )  # values [... D F], a scale a block of 128x128; None in gradients
    tap: GradTap | None = None
    platform: Platform = Platform("cpu")

    @property
    def wants_stats(self) -> bool:
        return self.tap is not None and self.tap.stats is not None

    def dequantize(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """The weight itself."""
        return dequantize(self.quantized, BLOCK, dtype)


@dataclasses.dataclass(frozen=True)
class SavedInput:
    """How the input of a product is rounded, and what its backward finds of it."""

    name: str | None = None  # for the remat policy
    power_of_two: bool = False  # scales, if there is a backward: turned tiles round no number anew
    e5m6: bool = False  # kept with 6 bits of fraction, for the Linear behind attention


class WgradOperands(NamedTuple):
    """The two of which a weight's gradient is the product: x^T grad, of each group."""

    x: Array | QuantizedTensor  # [r D]
    grad: Array | QuantizedTensor  # [r F]
    sizes: Float32[Array, " e"] | None = None  # rows of each group; a float may be a gradient


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fp8_matmul(
    save: SavedInput, x: Float[Array, "r D"], w: Fp8Weight, sizes: Int[Array, " e"] | None = None
) -> Float[Array, "r F"]:
    """x W; with `sizes`, rows of group i times `W[i]`, unspecified beyond the last group."""
    return forward(save, x, w, sizes, w.tap is not None)[0]


def _forward(save: SavedInput, x, w: Fp8Weight, sizes):
    return forward(save, x, w, sizes, w.tap is not None)


def forward(save: SavedInput, x, w: Fp8Weight, sizes, training: bool):
    """x W, and what its backward needs."""
    tiles = quantize(x, TILE, save.power_of_two and training)
    kept = lax.reduce_precision(x, 8, 6) if save.e5m6 else _named(tiles, save.name)
    tiles = tiles if save.e5m6 else kept
    counts = _counts(x, tiles, sizes) if w.wants_stats else None
    return _times(tiles, w, sizes, x.dtype), (kept, w._replace(tap=None), sizes, counts)


def _backward(save: SavedInput, saved, grad):
    w, sizes, counts = saved[1:]
    d_x, factors, tiles = backward(save, saved, grad)
    return d_x, _at_tap(w, factors, counts, grad, tiles, sizes), None


def backward(save: SavedInput, saved, grad):
    """Dgrad, the factors of Wgrad, and the tiles that the gradient became."""
    x, w, sizes, _ = saved
    x = x if save.e5m6 else dequantize(x, TILE)
    return _gradients(x, grad, w, sizes, save.power_of_two)


fp8_matmul.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fp8_swiglu_matmul(
    save: SavedInput,
    hidden: Float[Array, "r F2"],
    gates: Float[Array, " r"] | None,
    w: Fp8Weight,
    sizes: Int[Array, " e"] | None = None,
) -> Float[Array, "r D"]:
    """(gates * SwiGLU(hidden)) W, otherwise as `fp8_matmul`; `hidden` is what is kept."""
    return gated_forward(save, hidden, gates, w, sizes)[0]


def gated_forward(save: SavedInput, hidden, gates, w: Fp8Weight, sizes):
    kept = _named(quantize(hidden, TILE), save.name)
    on_tpu = w.platform == "tpu"
    tiles = (
        swiglu_quantize(hidden, gates, False) if on_tpu else quantize(swiglu(hidden, gates), TILE)
    )
    counts = _counts(swiglu(hidden, gates), tiles, sizes) if w.wants_stats else None
    saved = (kept, gates, w._replace(tap=None), sizes, counts)
    return _times(tiles, w, sizes, hidden.dtype), saved


def _gated_backward(save: SavedInput, saved, grad):
    w, sizes, counts = saved[2:]
    d_inputs, factors, tiles = gated_backward(saved, grad)
    return *d_inputs, _at_tap(w, factors, counts, grad, tiles, sizes), None


def gated_backward(saved, grad):
    """The gradients of `hidden` and `gates`, and what `backward` gives besides."""
    hidden, gates, w, sizes, _ = saved
    x, pull = jax.vjp(swiglu, dequantize(hidden, TILE, grad.dtype), gates)
    d_x, factors, tiles = _gradients(x, grad, w, sizes)
    return pull(d_x), factors, tiles


fp8_swiglu_matmul.defvjp(gated_forward, _gated_backward)


def _named(tiles: QuantizedTensor, name: str | None) -> QuantizedTensor:
    """Under a name by which a remat policy keeps them.

    As bits: what it keeps of a float format JAX rounds as if that had infinities, and E4M3 has
    numbers where those would be.
    """
    if name is None:
        return tiles
    bits = checkpoint_name(lax.bitcast_convert_type(tiles.values, jnp.uint8), name)
    values = lax.bitcast_convert_type(bits, tiles.values.dtype)
    return QuantizedTensor(values, checkpoint_name(tiles.scale, name))


def _times(x: QuantizedTensor, w: Fp8Weight, sizes, dtype, transposed: bool = False):
    if w.quantized.values.dtype != E4M3:
        raise TypeError(f"a weight in FP8 has {E4M3.name} codes, not {w.quantized.values.dtype}")
    kernels = KERNELS.get(w.platform)
    if kernels and sizes is None:
        return kernels.scaled_matmul(x, w.quantized, dtype, transposed)
    if kernels:
        return kernels.grouped_scaled_matmul(x, w.quantized, sizes, dtype, transposed)
    x, w, platform = dequantize(x, TILE), w.dequantize(jnp.float32), w.platform
    if sizes is not None:
        return gmm(x, w, sizes, platform, transposed).astype(dtype)
    return jnp.einsum("rF,DF->rD" if transposed else "rD,DF->rF", x, w).astype(dtype)


def _gradients(x, grad, w: Fp8Weight, sizes, power_of_two: bool = False):
    """Of the input (Dgrad), the factors of Wgrad, and the gradient in tiles."""
    tiles = quantize(grad, TILE, floor=AMAX_TINY)
    d_x = _times(tiles, w, sizes, grad.dtype, transposed=True)
    return d_x, _factors(x, grad, sizes, power_of_two), tiles


def _at_tap(w: Fp8Weight, factors: WgradOperands, counts, grad, tiles, sizes) -> Fp8Weight:
    """The gradient of a weight, and where that is counted how numbers became codes."""
    if counts is not None:
        counts = jnp.stack([counts, _counts(grad, tiles, sizes), _counts(1, w.quantized, None)])
    return w._replace(quantized=None, tap=GradTap(wgrad(factors, w.platform), counts))


def _counts(x, codes: QuantizedTensor, sizes) -> Float32[Array, " 4"]:
    """`QuantStats` of numbers and their codes; in groups, of the rows that are there."""
    values, rows = codes.values.astype(jnp.float32), codes.values.shape[-2]
    there = jnp.arange(rows) < (rows if sizes is None else sizes.sum())
    there = there.reshape(*[1] * (values.ndim - 2), -1, 1)
    marks = QuantStats(
        True, (x != 0) & (values == 0), jnp.abs(values) == 448, ~jnp.isfinite(values)
    )
    marks = (jnp.broadcast_to(mark & there, values.shape) for mark in marks)
    return jnp.stack([mark.sum(dtype=jnp.float32) for mark in marks])


def _factors(x, grad, sizes, power_of_two: bool) -> WgradOperands:
    """Both in tiles of 128x1."""
    if sizes is not None:  # what lies beyond the groups must not reach the scales
        there = (jnp.arange(x.shape[0]) < sizes.sum())[:, None]
        x, grad = (jnp.where(there, part, 0) for part in (x, grad))
        sizes = sizes.astype(jnp.float32)
    codes = quantize(x, TILE_T, power_of_two), quantize(grad, TILE_T, floor=AMAX_TINY)
    return WgradOperands(*codes, sizes)


def wgrad(factors: WgradOperands, platform: str) -> Float32[Array, "..."]:
    """Wgrad, [D F] or [e D F]."""
    x, grad, sizes = factors
    sizes = None if sizes is None else sizes.astype(jnp.int32)
    if platform == "tpu":
        return fp8_wgrad(x, grad) if sizes is None else grouped_fp8_wgrad(x, grad, sizes)
    x, grad = dequantize(x, TILE_T), dequantize(grad, TILE_T)
    if sizes is not None:
        return tgmm(x, grad, sizes, platform, jnp.float32)
    return jnp.einsum("rD,rF->DF", x, grad)
