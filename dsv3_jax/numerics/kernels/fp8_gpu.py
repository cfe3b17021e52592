"""Products of FP8 codes on GPUs: a Pallas kernel, which Triton compiles.

As the grouped product (`grouped_matmul_gpu.py`), with codes and their scales in place of numbers: a
step of the sum is the 128 numbers that share a scale, so every step's product, which the tensor
cores sum, is scaled once and added in float32 (report sec. 3.3.2). A dense product is one group.

Checked in interpret mode, and compiled for an H100; it has not run on one. In the compiled program
codes become float16 on their way to the tensor cores, which is exact: Triton takes their FP8 units
only for products that are said to need fewer bits of the sum, and Pallas cannot say so. What is
gained over the reference is that no wide copy is made.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsv3_jax.numerics.kernels.gmm_gpu import BAND, load, row_tiles, store
from dsv3_jax.numerics.quantize import BLOCK, QuantizedTensor
from dsv3_jax.shapes import Array, Float, Int

EDGE = BLOCK[0]  # numbers that share a scale, along a row; a tile of the result is as wide


def scaled_matmul(
    x: QuantizedTensor,
    w: QuantizedTensor,
    dtype: jax.typing.DTypeLike,
    transposed: bool = False,
    interpret: bool = False,
) -> Float[Array, "r N"]:
    """x w, as `scaled_matmul` for TPUs."""
    sizes = jnp.full(1, x.values.shape[0], jnp.int32)
    one = jax.tree.map(lambda a: a[None], w)
    return grouped_scaled_matmul(x, one, sizes, dtype, transposed, interpret)


def grouped_scaled_matmul(
    x: QuantizedTensor,
    w: QuantizedTensor,
    sizes: Int[Array, " e"],
    dtype: jax.typing.DTypeLike,
    transposed: bool = False,
    interpret: bool = False,
) -> Float[Array, "r N"]:
    """Rows of group i times `w[i]`; beyond the last group the result is not written.

    Args:
        x: values [r K], sorted by group, in tiles of 1 x 128.
        w: values [e K N] in blocks of 128 x 128.
        sizes: rows of each group; their sum is at most r.
        dtype: of the result.
        transposed: w is [e N K], and the transposes are meant.
        interpret: run the kernel's steps as XLA operations, on any platform.

    Raises:
        ValueError: matrices of another width than the rows.
    """
    n_rows, width = x.values.shape
    summed, columns = w.values.shape[1:][::-1] if transposed else w.values.shape[1:]
    if summed != width:
        raise ValueError(f"weights of width {summed} don't meet rows of width {width}")
    tile = min(pl.next_power_of_2(max(n_rows // sizes.size, 16)), EDGE)
    tiles = row_tiles(sizes, n_rows, tile)
    return pl.pallas_call(
        functools.partial(_kernel, rows=tile, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((n_rows, columns), dtype),
        grid=(BAND, pl.cdiv(columns, EDGE), tiles.start.size // BAND),
        compiler_params=triton.CompilerParams(num_warps=4, num_stages=3),
        interpret=interpret,
        name="scaled_product",
    )(*tiles, x.values, x.scale, w.values, w.scale)


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
        at, column = k * EDGE, block * EDGE
        x = load(x_ref, (), (start, at), (rows, EDGE), (stop, width))
        if transposed:
            w = load(w_ref, (expert,), (column, at), (EDGE, EDGE), (n_columns, width))
            w_scale = w_scale_ref[expert, block, k]
        else:
            w = load(w_ref, (expert,), (at, column), (EDGE, EDGE), (width, n_columns))
            w_scale = w_scale_ref[expert, k, block]
        scale = load(x_scale_ref, (), (start, k), (rows, 1), (stop, x_scale_ref.shape[1]))
        return total + triton.dot(x, w, trans_b=transposed) * (scale * w_scale)

    @pl.when(start < stop)
    def _():
        total = jnp.zeros((rows, EDGE), jnp.float32)
        total = lax.fori_loop(0, pl.cdiv(width, EDGE), add, total)
        store(out_ref, (), (start, block * EDGE), total, (stop, n_columns))
