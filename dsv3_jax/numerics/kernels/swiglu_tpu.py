"""SwiGLU into E4M3 tiles of 1 x 128 on TPUs, in Pallas: one pass from hidden layer to codes."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from dsv3_jax.numerics.quantize import AMAX_FLOOR, E4M3_MAX, TILE, QuantizedTensor
from dsv3_jax.shapes import Array, Float

ROWS, NUMBERS = 256, 2**21  # of the hidden layer, at most, in one step
VMEM_BYTES = 48 * 2**20


def swiglu_quantize(
    hidden: Float[Array, "r F2"],
    gates: Float[Array, " r"] | None,
    power_of_two: bool,
    interpret: bool = False,
) -> QuantizedTensor:
    """The codes of silu(gate) * up * gates, computed in float32, as `quantize` finds them.

    A half that is no multiple of 128 wide is padded, which copies it.

    Args:
        hidden: gate and up, the halves of the last dim.
        gates: weight of each row; None for 1.
        power_of_two: of the scales.
        interpret: run the kernel's steps as XLA operations, on any platform.

    Returns:
        Values [r F] in tiles of 1 x 128.

    Source: DeepSeek-V3 report (arXiv 2412.19437), sec. 3.3.2.
    """
    n_rows, width = hidden.shape[0], hidden.shape[1] // 2
    short = -width % TILE[1]
    if short:
        halves = jnp.split(hidden, 2, axis=1)
        hidden = jnp.concatenate([jnp.pad(x, ((0, 0), (0, short))) for x in halves], axis=1)
    gates = jnp.ones((n_rows, 1), jnp.float32) if gates is None else gates[:, None]
    wide, n_tiles = width + short, (width + short) // TILE[1]
    rows = min(n_rows, ROWS, max(NUMBERS // (2 * wide) // 32 * 32, 32))
    values, scale = pl.pallas_call(
        functools.partial(_kernel, power_of_two=power_of_two),
        out_shape=(
            jax.ShapeDtypeStruct((n_rows, wide), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((n_rows, n_tiles), jnp.float32),
        ),
        grid=(pl.cdiv(n_rows, rows),),
        in_specs=[
            pl.BlockSpec((rows, n_tiles), lambda i: (0, 0)),
            pl.BlockSpec((rows, 2 * wide), lambda i: (i, 0)),
            pl.BlockSpec((rows, 1), lambda i: (i, 0)),
        ],
        out_specs=(
            pl.BlockSpec((rows, wide), lambda i: (i, 0)),
            pl.BlockSpec((rows, n_tiles), lambda i: (i, 0)),
        ),
        scratch_shapes=[tpu.VMEM((rows, wide), jnp.float32)],
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel",), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="swiglu_quantize",
    )(
        lax.optimization_barrier(jnp.full((rows, n_tiles), E4M3_MAX)),
        hidden,
        gates.astype(jnp.float32),
    )
    return QuantizedTensor(values[:, :width], scale)


def _kernel(largest_ref, hidden_ref, gates_ref, values_ref, scale_ref, y_ref, *, power_of_two):
    """XLA would not divide by a number or one column, but multiply with its inverse.

    So 448 comes as an array, and a scale is made to depend on what it divides.
    """
    wide, width = values_ref.shape[1], TILE[1]
    gates = gates_ref[...]
    for i, at in enumerate(range(0, wide, width)):
        gate = hidden_ref[:, at : at + width].astype(jnp.float32)
        up = hidden_ref[:, wide + at : wide + at + width].astype(jnp.float32)
        y = jax.nn.silu(gate) * up * gates
        y_ref[:, at : at + width] = y
        scale_ref[:, i : i + 1] = jnp.abs(y).max(-1, keepdims=True)
    # All tiles' scales at once: side by side they fill the lanes.
    amax = jnp.maximum(scale_ref[...], AMAX_FLOOR)
    scale_ref[...] = _power_of_two(amax) if power_of_two else amax / largest_ref[...]
    for i, at in enumerate(range(0, wide, width)):
        y = y_ref[:, at : at + width]
        scale = jnp.where(y == y, scale_ref[:, i : i + 1], jnp.nan)
        values_ref[:, at : at + width] = (y / scale).astype(values_ref.dtype)


def _power_of_two(amax):
    """The smallest power of two s with 448 s >= amax; see `blockscale`, which has the same."""
    part = amax / 256
    bits = lax.bitcast_convert_type(part, jnp.int32) + 0x1FFFFF
    power = lax.bitcast_convert_type(bits & ~0x7FFFFF, jnp.float32)
    return jnp.where(jnp.isfinite(part), power, part)
