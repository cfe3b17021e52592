"""Matmuls in FP8: all three GEMMs of a Linear, dense or of experts.

WHAT IS COMPUTED. A Linear y = x W has three matmuls, and all of them run in FP8 (report
sec. 3.3.1):

    fprop  y  = Q(x) Q(W)          x in tiles of 1x128, W in blocks of 128x128
    dgrad  dx = Q(dy) Q(W)^T       dy in tiles of 1x128
    wgrad  dW = Q_T(x)^T Q_T(dy)   x and dy in tiles of 128x1

Embedding, head, router, norms and attention do not use FP8; master weights, gradients of weights
and optimizer moments are not stored in it (`policy.py`).

WHY TILES AND BLOCKS. Q(x) holds x as E4M3 values and float32 scales; a scale takes the largest
magnitude among the numbers that share it to 448, the largest E4M3 value (`quantize.py`). E4M3
reaches from 448 down to 2^-9 only: with one scale per tensor, a few outlier channels would push
the rest of the numbers below it. A scale per token and 128 channels, and per 128x128 block of a
weight, confines an outlier to its tile. Scales must be constant along the numbers that are summed
before they are applied, so tiles lie along the summed dimension: channels in fprop and dgrad
(`TILE`), tokens in wgrad (`TILE_T`). A square block of W serves both fprop and, transposed, dgrad,
so W is quantized once per step, however many passes the step makes.

WHY E4M3 FOR GRADIENTS, TOO. With scales this local there is little range left to cover, so a third
bit of fraction is worth more than the wider exponent of E5M2 (report sec. 3.3.2). Gradients are
small, so their scales have a much lower floor (`AMAX_TINY`) than those of activations.

PROMOTION EVERY 128. The FP8 tensor cores of an H800 sum with about 14 bits. Every 128 numbers of
the summed dimension, where the scales change as well, the partial sum is multiplied by its scales
and added to an accumulator in float32 (report sec. 3.3.2). The kernels do so; the reference
multiplies dequantized operands in float32. They differ in rounding alone.

WHAT IS SAVED FOR THE BACKWARD. wgrad needs x again. By default x is saved as the FP8 tiles that
fprop multiplied, which take half the memory of bfloat16; the backward dequantizes them and
quantizes the result in tiles of 128x1. The report makes three exceptions (sec. 3.3.3), and a
`SavedInput` or a `SwiGLUInput` asks for them:

- The input of the Linear behind attention is saved with 6 bits of fraction (E5M6), because the
  backward of attention uses it as well and is sensitive to its precision.
- The scales of that input, and of the tokens that are sent to experts, are powers of two. Then
  the change from tiles of 1x128 to 128x1 changes exponents only and rounds no number anew, and
  tokens that arrive in FP8 are quantized to the same values again.
- Of a Linear behind SwiGLU, the input of SwiGLU is saved, in FP8, and the backward computes
  SwiGLU again from what was saved.

WHY A TAP. In JAX the gradient of a weight leaves the backward as the cotangent of the weight, and
a cotangent has the dtype of its primal: that of an E4M3 array would be E4M3. So an `Fp8Weight` has
a second array beside its E4M3 values, the `GradTap`: a float32 array of the weight's shape, which
no matmul reads and whose cotangent this file declares to be dW. `dsv3_jax/params.py` makes the
tap a function of the master weight, which so receives dW as its gradient, in float32. Two other
things leave through the tap: statistics of the rounding, if the tap has an array for them; and in
a pipeline stage, if the tap is made of `WgradOperands`, the two operands of wgrad instead of dW,
which is then computed later (`split_backward.py`).

KERNELS run on TPUs (compared with the reference in interpret mode; compiled for tpu7x, which
multiplies FP8, and for v5p, which emulates it) and, for fprop and dgrad, on GPUs (compared alike;
compiled for an H100). `kernels/__init__.py` picks them.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.numerics.kernels import pick
from dsv3_jax.numerics.kernels.swiglu_ref import swiglu
from dsv3_jax.numerics.quant_stats import count_rounding
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
from dsv3_jax.shapes import Array, Float, Float32, Int


@jax.tree_util.register_static
class Platform(str):
    """The platform of the devices that hold a weight, which picks the kernels of its matmuls.

    It travels with the weight because a layer knows no devices, and as structure of the pytree, not
    as a leaf, because kernels are picked while a program is traced.
    """


class GradTap(NamedTuple):
    """Inputs that no matmul reads; their gradients are what a weight's backward gives out."""

    weight: Array  # [... D F]; its gradient: dW
    stats: Array | None = None  # [... 3 4]; its gradient: `QuantStats` of x, of dy and of W


class WgradOperands(NamedTuple):
    """The operands of wgrad, x^T grad; with `sizes`, of each group of rows."""

    x: Array | QuantizedTensor  # [r D]
    grad: Array | QuantizedTensor  # [r F]
    sizes: Float32[Array, " e"] | None = None  # rows of each group, as float: integers have no grad


class Fp8Weight(NamedTuple):
    """A weight [... D F] ready for FP8 matmuls."""

    quantized: QuantizedTensor | None  # in blocks of 128 x 128; None in a gradient
    tap: GradTap | WgradOperands | None = None  # None in inference
    platform: Platform = Platform("cpu")

    @property
    def wants_stats(self) -> bool:
        return isinstance(self.tap, GradTap) and self.tap.stats is not None

    def dequantize(self, dtype: jax.typing.DTypeLike) -> jax.Array:
        """Return the weight as an array of numbers."""
        return dequantize(self.quantized, BLOCK, dtype)


@dataclasses.dataclass(frozen=True)
class SavedInput:
    """The format in which the input of a matmul is saved for its backward; explained above."""

    name: str | None = None  # under which a remat policy may save it
    power_of_two: bool = False  # scales are powers of two, if there is a backward
    e5m6: bool = False  # saved with 6 bits of fraction instead of in FP8


class SwiGLUInput(NamedTuple):
    """The input of SwiGLU in front of a matmul, and the weights of SwiGLU's output rows."""

    hidden: Float[Array, "r F2"] | QuantizedTensor
    gates: Float[Array, " r"] | None = None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def fp8_matmul(
    save: SavedInput,
    inputs: Float[Array, "r D"] | SwiGLUInput,
    w: Fp8Weight,
    sizes: Int[Array, " e"] | None = None,
) -> Float[Array, "r F"]:
    """Return x W; with `sizes`, rows of group i times `W[i]`, unspecified beyond the last group.

    Args:
        save: how x is saved for the backward.
        inputs: x; or, for x = gates * SwiGLU(hidden), these two.
        sizes: rows of each group; their sum is at most r.
    """
    return _forward(save, inputs, w, sizes)[0]


def _forward(save: SavedInput, inputs, w: Fp8Weight, sizes):
    if isinstance(inputs, SwiGLUInput):
        dtype = inputs.hidden.dtype
        tiles = pick(w.platform).swiglu_quantize(*inputs)
        saved = inputs._replace(hidden=_named(quantize(inputs.hidden, TILE), save.name))
    else:
        dtype = inputs.dtype
        tiles = quantize(inputs, TILE, save.power_of_two and w.tap is not None)
        if save.e5m6:
            # E5M6, but with the exponents of bfloat16: no number is out of range.
            saved = lax.reduce_precision(inputs, exponent_bits=8, mantissa_bits=6)
        else:
            saved = tiles = _named(tiles, save.name)
    stats = None
    if w.wants_stats:
        x = swiglu(*inputs) if isinstance(inputs, SwiGLUInput) else inputs
        stats = count_rounding(x, tiles, sizes)
    empty_tap = jax.tree.map(lambda _: None, w.tap)  # which tuple it is, without its arrays
    residuals = (saved, w._replace(tap=None), empty_tap, sizes, stats)
    return _scaled_matmul(tiles, w, sizes, dtype), residuals


def _backward(save: SavedInput, residuals, grad):
    """Return the gradients of `inputs` (dgrad) and of the weight's tap (wgrad)."""
    saved, w, empty_tap, sizes, stats = residuals
    if isinstance(saved, SwiGLUInput):
        hidden = dequantize(saved.hidden, TILE, grad.dtype)
        x, swiglu_vjp = jax.vjp(swiglu, hidden, saved.gates)
    else:
        x = saved if save.e5m6 else dequantize(saved, TILE)
    tiles = quantize(grad, TILE, floor=AMAX_TINY)
    d_inputs = _scaled_matmul(tiles, w, sizes, grad.dtype, transposed=True)
    if isinstance(saved, SwiGLUInput):
        d_inputs = SwiGLUInput(*swiglu_vjp(d_inputs))
    tap = wgrad_operands(x, grad, sizes, save.power_of_two)
    if isinstance(empty_tap, GradTap):
        if stats is not None:
            of_weight = count_rounding(1, w.quantized)
            stats = jnp.stack([stats, count_rounding(grad, tiles, sizes), of_weight])
        tap = GradTap(wgrad(tap, w.platform), stats)
    return d_inputs, w._replace(quantized=None, tap=tap), None


fp8_matmul.defvjp(_forward, _backward)


def _named(tiles: QuantizedTensor, name: str | None) -> QuantizedTensor:
    """Return the same tiles under a name by which a remat policy saves them.

    As bits: what it saves of a float format JAX rounds as if that had infinities, and E4M3 has
    numbers where those would be.
    """
    if name is None:
        return tiles
    bits = checkpoint_name(lax.bitcast_convert_type(tiles.values, jnp.uint8), name)
    values = lax.bitcast_convert_type(bits, tiles.values.dtype)
    return QuantizedTensor(values, checkpoint_name(tiles.scale, name))


def _scaled_matmul(x: QuantizedTensor, w: Fp8Weight, sizes, dtype, transposed: bool = False):
    """Return x W or x W^T of quantized operands, dense or by groups."""
    if w.quantized.values.dtype != E4M3:
        raise TypeError(
            f"the values of an FP8 weight are {E4M3.name}, not {w.quantized.values.dtype}"
        )
    kernels = pick(w.platform)
    if sizes is None:
        return kernels.scaled_matmul(x, w.quantized, dtype, transposed)
    return kernels.grouped_scaled_matmul(x, w.quantized, sizes, dtype, transposed)


def wgrad_operands(
    x: Float[Array, "r D"],
    grad: Float[Array, "r F"],
    sizes: Int[Array, " e"] | None,
    power_of_two: bool = False,
) -> WgradOperands:
    """Return the input and the gradient of a matmul's output, both in tiles of 128x1."""
    if sizes is not None:  # rows beyond the groups must not reach the scales
        in_group = (jnp.arange(x.shape[0]) < sizes.sum())[:, None]
        x, grad = jnp.where(in_group, x, 0), jnp.where(in_group, grad, 0)
        sizes = sizes.astype(jnp.float32)
    x, grad = quantize(x, TILE_T, power_of_two), quantize(grad, TILE_T, floor=AMAX_TINY)
    return WgradOperands(x, grad, sizes)


def wgrad(operands: WgradOperands, platform: str) -> Float32[Array, "..."]:
    """Return the gradient of an FP8 weight, [D F] or [e D F]."""
    x, grad, sizes = operands
    if sizes is None:
        return pick(platform).fp8_wgrad(x, grad)
    return pick(platform).grouped_fp8_wgrad(x, grad, sizes.astype(jnp.int32))
