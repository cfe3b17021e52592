"""SwiGLU straight into FP8 on TPUs, in Pallas: one pass from the hidden layer to E4M3 tiles."""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from dsv3_jax.numerics.kernels.fp8_tpu import VMEM_BYTES
from dsv3_jax.numerics.quantize import AMAX_FLOOR, BLOCK_SIZE, E4M3_MAX, QuantizedTensor
from dsv3_jax.shapes import Array, Float

ROWS, NUMBERS = 256, 2**21  # of the hidden layer, at most, in one grid step


def swiglu_quantize(
    hidden: Float[Array, "r F2"], gates: Float[Array, " r"] | None, *, interpret: bool = False
) -> QuantizedTensor:
    """Return silu(gate) * up * gates, computed in float32 and rounded as `quantize` does.

    A half that is no multiple of 128 wide is padded, which copies it.

    Args:
        hidden: gate and up, the halves of the last dim.
        gates: weight of each row; None for 1.
        interpret: run the kernel's steps as XLA operations, on any platform.

    Returns:
        Values [r F] in tiles of 1 x 128.

    Source: DeepSeek-V3 report (arXiv 2412.19437), sec. 3.3.2.
    """
    n_rows, width = hidden.shape[0], hidden.shape[1] // 2
    short = -width % BLOCK_SIZE
    if short:
        halves = jnp.split(hidden, 2, axis=1)
        hidden = jnp.concatenate([jnp.pad(x, ((0, 0), (0, short))) for x in halves], axis=1)
    gates = jnp.ones((n_rows, 1), jnp.float32) if gates is None else gates[:, None]
    padded, n_tiles = width + short, (width + short) // BLOCK_SIZE
    rows = min(n_rows, ROWS, max(NUMBERS // (2 * padded) // 32 * 32, 32))
    values, scale = pl.pallas_call(
        _kernel,
        out_shape=(
            jax.ShapeDtypeStruct((n_rows, padded), jnp.float8_e4m3fn),
            jax.ShapeDtypeStruct((n_rows, n_tiles), jnp.float32),
        ),
        grid=(pl.cdiv(n_rows, rows),),
        in_specs=[
            pl.BlockSpec((rows, n_tiles), lambda i: (0, 0)),
            pl.BlockSpec((rows, 2 * padded), lambda i: (i, 0)),
            pl.BlockSpec((rows, 1), lambda i: (i, 0)),
        ],
        out_specs=(
            pl.BlockSpec((rows, padded), lambda i: (i, 0)),
            pl.BlockSpec((rows, n_tiles), lambda i: (i, 0)),
        ),
        scratch_shapes=[tpu.VMEM((rows, padded), jnp.float32)],
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


def _kernel(largest_ref, hidden_ref, gates_ref, values_ref, scale_ref, y_ref):
    """Write the values and scales of some rows.

    XLA would not divide by a number or one column, but multiply with its inverse. So 448 comes as
    an array, and a scale is made to depend on what it divides.
    """
    padded = values_ref.shape[1]
    gates = gates_ref[...]
    for i, at in enumerate(range(0, padded, BLOCK_SIZE)):
        gate = hidden_ref[:, at : at + BLOCK_SIZE].astype(jnp.float32)
        up = hidden_ref[:, padded + at : padded + at + BLOCK_SIZE].astype(jnp.float32)
        y = jax.nn.silu(gate) * up * gates
        y_ref[:, at : at + BLOCK_SIZE] = y
        scale_ref[:, i : i + 1] = jnp.abs(y).max(-1, keepdims=True)
    # All tiles' scales at once: side by side they fill the lanes.
    scale_ref[...] = jnp.maximum(scale_ref[...], AMAX_FLOOR) / largest_ref[...]
    for i, at in enumerate(range(0, padded, BLOCK_SIZE)):
        y = y_ref[:, at : at + BLOCK_SIZE]
        scale = jnp.where(y == y, scale_ref[:, i : i + 1], jnp.nan)
        values_ref[:, at : at + BLOCK_SIZE] = (y / scale).astype(values_ref.dtype)
