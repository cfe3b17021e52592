"""Matmuls of block-scaled E4M3 matrices on GPUs: a Pallas kernel, which Triton compiles.

As the grouped matmul (`gmm_gpu.py`), with E4M3 values and their scales in place of numbers: a step
of the sum is the 128 values that share a scale, so each step's product, which the tensor cores sum,
is scaled once and added in float32 (report sec. 3.3.2). A dense matmul is one group.

Checked in interpret mode, and compiled for an H100; it has not run on one. In the compiled program
E4M3 values become float16 on their way to the tensor cores, which is exact: Triton takes their FP8
units only for matmuls that are said to need fewer bits of the sum, and Pallas cannot say so. What
is gained over the reference is that no copy in float32 is made.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsv3_jax.numerics.kernels.gmm_gpu import BAND, load, row_tiles, store, tgmm
from dsv3_jax.numerics.quantize import BLOCK_SIZE, TILE_T, QuantizedTensor, dequantize
from dsv3_jax.shapes import Array, Float, Float32, Int


def scaled_matmul(
    x: QuantizedTensor,
    w: QuantizedTensor,
    dtype: jax.typing.DTypeLike,
    transposed: bool = False,
    *,
    interpret: bool = False,
) -> Float[Array, "r F"]:
    """Return x w, or x w^T: x [r D] in tiles of 1 x 128, w in blocks of 128 x 128."""
    sizes = jnp.full(1, x.values.shape[0], jnp.int32)
    one_group = jax.tree.map(lambda a: a[None], w)
    return grouped_scaled_matmul(x, one_group, sizes, dtype, transposed, interpret=interpret)


def grouped_scaled_matmul(
    x: QuantizedTensor,
    w: QuantizedTensor,
    sizes: Int[Array, " e"],
    dtype: jax.typing.DTypeLike,
    transposed: bool = False,
    *,
    interpret: bool = False,
) -> Float[Array, "r F"]:
    """Return rows of group i times `w[i]`; beyond the last group the result is not written.

    Args:
        x: values [r D], sorted by group, in tiles of 1 x 128.
        w: values [e D F] in blocks of 128 x 128.
        sizes: rows of each group; their sum is at most r.
        dtype: of the result.
        transposed: w is [e F D], and the transposes are meant.
        interpret: run the kernel's steps as XLA operations, on any platform.

    Raises:
        ValueError: weights of another width than the rows.
    """
    n_rows, width = x.values.shape
    summed, columns = w.values.shape[1:][::-1] if transposed else w.values.shape[1:]
    if summed != width:
        raise ValueError(f"weights of width {summed} don't meet rows of width {width}")
    tile = min(pl.next_power_of_2(max(n_rows // sizes.size, 16)), BLOCK_SIZE)
    tiles = row_tiles(sizes, n_rows, tile)
    return pl.pallas_call(
        functools.partial(_kernel, rows=tile, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((n_rows, columns), dtype),
        grid=(BAND, pl.cdiv(columns, BLOCK_SIZE), tiles.start.size // BAND),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="grouped_scaled_matmul",
    )(*tiles, x.values, x.scale, w.values, w.scale)


def grouped_fp8_wgrad(
    x: QuantizedTensor, grad: QuantizedTensor, sizes: Int[Array, " e"]
) -> Float32[Array, "e D F"]:
    """Return x^T grad of the rows of each group: the grouped matmul of dequantized operands."""
    return tgmm(dequantize(x, TILE_T), dequantize(grad, TILE_T), sizes, jnp.float32)


def _kernel(
    expert_ref,
    start_ref,
    stop_ref,
    x_ref,
    x_scale_ref,
    w_ref,
    w_scale_ref,
    out_ref,
    *,
    rows,
    transposed,
):
    i = pl.program_id(2) * BAND + pl.program_id(0)
    block = pl.program_id(1)
    start, stop, expert = start_ref[i], stop_ref[i], expert_ref[i]
    width, n_columns = x_ref.shape[1], out_ref.shape[1]

    def add(k, total):
        at, column = k * BLOCK_SIZE, block * BLOCK_SIZE
        square = (BLOCK_SIZE, BLOCK_SIZE)
        x = load(x_ref, (), (start, at), (rows, BLOCK_SIZE), (stop, width))
        if transposed:
            w = load(w_ref, (expert,), (column, at), square, (n_columns, width))
            w_scale = w_scale_ref[expert, block, k]
        else:
            w = load(w_ref, (expert,), (at, column), square, (width, n_columns))
            w_scale = w_scale_ref[expert, k, block]
        scale = load(x_scale_ref, (), (start, k), (rows, 1), (stop, x_scale_ref.shape[1]))
        return total + triton.dot(x, w, trans_b=transposed) * (scale * w_scale)

    @pl.when(start < stop)
    def _():
        total = jnp.zeros((rows, BLOCK_SIZE), jnp.float32)
        total = lax.fori_loop(0, pl.cdiv(width, BLOCK_SIZE), add, total)
        store(out_ref, (), (start, block * BLOCK_SIZE), total, (stop, n_columns))
