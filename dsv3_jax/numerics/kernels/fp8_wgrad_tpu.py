"""Gradients of weights in FP8 on TPUs: x^T grad of block-scaled E4M3 matrices, in Pallas.

Both operands have a scale per channel and 128 rows: 128 rows of the sum cost an accumulator two
multiplications and an addition. Tiles of 128 rows are those of the buffer, not of a group, so the
first and last of a group may hold rows of its neighbours, whose values become 0 there.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from dsv3_jax.numerics.kernels.fp8_tpu import (
    LANES,
    SUBLANES,
    VMEM_BYTES,
    dot,
    largest_divisor,
    pad,
    tile_schedule,
)
from dsv3_jax.numerics.quantize import BLOCK_SIZE, QuantizedTensor
from dsv3_jax.shapes import Array, Float32, Int

WIDTH, STEP = 1024, 1024  # sides of a tile of the result, and rows of the sum in a grid step


def fp8_wgrad(
    x: QuantizedTensor, grad: QuantizedTensor, *, interpret: bool = False
) -> Float32[Array, "D F"]:
    """Return x^T grad, summed in float32 in blocks of 128 rows, each times its scales.

    r that is no multiple of 128 is padded, which copies the operands; any D and F are as good.

    Args:
        x: values [r D] in tiles of 128 x 1.
        grad: values [r F] in such tiles.
        interpret: run the kernel's steps as XLA operations, on any platform.
    """
    n_rows = -(-x.values.shape[0] // BLOCK_SIZE) * BLOCK_SIZE  # padded with zeros
    return grouped_fp8_wgrad(x, grad, jnp.full((1,), n_rows, jnp.int32), interpret=interpret)[0]


def grouped_fp8_wgrad(
    x: QuantizedTensor, grad: QuantizedTensor, sizes: Int[Array, " e"], *, interpret: bool = False
) -> Float32[Array, "e D F"]:
    """Return x^T grad of the rows of each group; 0 for a group without rows.

    Args:
        x: values [r D], sorted by group, in tiles of 128 x 1 of the buffer.
        grad: values [r F] in such tiles.
        sizes: rows of each group; their sum is at most r.
        interpret: run the kernel's steps as XLA operations, on any platform.

    Raises:
        ValueError: operands of different numbers of rows.
    """
    n_rows, other = x.values.shape[0], grad.values.shape[0]
    if n_rows != other:
        raise ValueError(f"{n_rows} rows of x don't meet {other} of grad")
    x, grad = (QuantizedTensor(pad(a.values, (BLOCK_SIZE, 1)), a.scale[:, None]) for a in (x, grad))
    return _grouped_wgrad(x, grad, sizes, interpret)


def _grouped_wgrad(x: QuantizedTensor, grad: QuantizedTensor, sizes, interpret: bool):
    """Call the kernel. Scales are [r/128 1 D] and [r/128 1 F]; r is padded."""
    (n_rows, width), columns = x.values.shape, grad.values.shape[1]
    blocks = largest_divisor(n_rows // BLOCK_SIZE, STEP // BLOCK_SIZE)
    rows, d, f = blocks * BLOCK_SIZE, min(WIDTH, width), min(WIDTH, columns)
    schedule, n_visits = tile_schedule(sizes, n_rows, rows, empty=1)
    return pl.pallas_call(
        _wgrad_kernel,
        out_shape=jax.ShapeDtypeStruct((sizes.size, width, columns), jnp.float32),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(schedule),
            grid=(pl.cdiv(width, d), pl.cdiv(columns, f), n_visits),
            in_specs=[
                pl.BlockSpec((rows, d), lambda i, j, v, _, tile, *__: (tile[v], i)),
                pl.BlockSpec((blocks, 1, d), lambda i, j, v, _, tile, *__: (tile[v], 0, i)),
                pl.BlockSpec((rows, f), lambda i, j, v, _, tile, *__: (tile[v], j)),
                pl.BlockSpec((blocks, 1, f), lambda i, j, v, _, tile, *__: (tile[v], 0, j)),
            ],
            out_specs=pl.BlockSpec((None, d, f), lambda i, j, v, group, *_: (group[v], i, j)),
            scratch_shapes=[
                tpu.VMEM((d, f), jnp.float32),
                tpu.VMEM((d, BLOCK_SIZE), jnp.float32),
            ],
        ),
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="grouped_fp8_wgrad",
    )(*schedule, *x, *grad)


def _wgrad_kernel(
    group_ref,
    tile_ref,
    start_ref,
    stop_ref,
    x_ref,
    x_scale_ref,
    grad_ref,
    grad_scale_ref,
    out_ref,
    sum_ref,
    column_ref,
):
    v, rows = pl.program_id(2), x_ref.shape[0]
    start, stop = (ref[v] - tile_ref[v] * rows for ref in (start_ref, stop_ref))
    before, after = jnp.maximum(v - 1, 0), jnp.minimum(v + 1, pl.num_programs(2) - 1)

    @pl.when((v == 0) | (group_ref[before] != group_ref[v]))
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    def add(block, _):
        block_rows = pl.ds(pl.multiple_of(block * BLOCK_SIZE, BLOCK_SIZE), BLOCK_SIZE)
        row = block * BLOCK_SIZE + lax.broadcasted_iota(jnp.int32, (BLOCK_SIZE, 1), 0)
        in_group = (row >= start) & (row < stop)
        x, grad = (
            jnp.where(in_group, ref[block_rows].astype(jnp.float32), 0).astype(ref.dtype)
            for ref in (x_ref, grad_ref)
        )
        _transpose_scales(x_scale_ref.at[block], column_ref)
        _accumulate(sum_ref, x, grad, column_ref, grad_scale_ref.at[block])

    @pl.when(start < stop)
    def _():  # blocks without any of the group's rows are left out, whatever their scales
        lower = lax.div(jnp.maximum(start, 0), BLOCK_SIZE)
        upper = lax.div(jnp.minimum(stop, rows) + BLOCK_SIZE - 1, BLOCK_SIZE)
        lax.fori_loop(lower, upper, add, None)

    @pl.when((v == after) | (group_ref[after] != group_ref[v]))
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _transpose_scales(row_ref, column_ref):
    """Write a row of scales as a column, which fills the lanes."""
    for at in range(0, row_ref.shape[1], BLOCK_SIZE):
        row = row_ref[:, at : at + BLOCK_SIZE]
        column_ref[at : at + BLOCK_SIZE] = jnp.broadcast_to(row, (BLOCK_SIZE, row.shape[1])).T


def _accumulate(sum_ref, x, grad, column_ref, grad_scale_ref):
    """Add 128 rows of the sum, to so few accumulators at a time that they stay in registers."""
    for lane in range(0, sum_ref.shape[1], LANES):
        product = dot(x, grad[:, lane : lane + LANES], 0, 0)
        for at in range(0, sum_ref.shape[0], SUBLANES):
            rows = slice(at, at + SUBLANES)
            for column in range(0, product.shape[1], BLOCK_SIZE):
                term = product[rows, column : column + BLOCK_SIZE]
                cols = slice(lane + column, lane + column + term.shape[1])
                scale = column_ref[rows, : term.shape[1]] * grad_scale_ref[:, cols]
                sum_ref[rows, cols] += term * scale
