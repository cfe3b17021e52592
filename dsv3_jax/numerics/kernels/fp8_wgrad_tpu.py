"""Products of block-scaled E4M3 matrices summed over rows, on TPUs, in Pallas: weight gradients.

Both factors have a scale for each channel and 128 rows: a piece of the sum costs its numbers two
products and an addition. Tiles are those of the buffer, so a group's first and last may hold rows
of its neighbours, whose codes become 0 there.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from dsv3_jax.numerics.kernels.fp8_tpu import (
    EDGE,
    LANES,
    SUBLANES,
    VMEM_BYTES,
    largest_divisor,
    pad,
    product,
    tile_schedule,
)
from dsv3_jax.numerics.quantize import QuantizedTensor
from dsv3_jax.shapes import Array, Float, Int

WIDE, STEP = 1024, 1024  # of a tile of the result, and of the sum in one step


def fp8_wgrad(
    x: QuantizedTensor,
    g: QuantizedTensor,
    dtype: jax.typing.DTypeLike = jnp.float32,
    interpret: bool = False,
) -> Float[Array, "D F"]:
    """x transposed times g, summed in float32 in pieces of 128 rows, each times its scales.

    T that is no multiple of 128 is padded, which copies the operands; any D and F are as good.

    Args:
        x: values [T D] in tiles of 128 x 1.
        g: values [T F] in such tiles.
        dtype: of the result.
        interpret: run the kernel's steps as XLA operations, on any platform.
    """
    sizes = jnp.full((1,), -(-x.values.shape[0] // EDGE) * EDGE, jnp.int32)  # zeros behind
    return grouped_fp8_wgrad(x, g, sizes, dtype, interpret)[0]


def grouped_fp8_wgrad(
    x: QuantizedTensor,
    g: QuantizedTensor,
    sizes: Int[Array, " e"],
    dtype: jax.typing.DTypeLike = jnp.float32,
    interpret: bool = False,
) -> Float[Array, "e D F"]:
    """Transposed rows of group i times its rows of `g`; 0 for no rows.

    Args:
        x: values [r D], sorted by group, in tiles of 128 x 1 of the buffer.
        g: values [r F] in such tiles.
        sizes: rows of each group; their sum is at most r.
        dtype: of the result.
        interpret: run the kernel's steps as XLA operations, on any platform.

    Raises:
        ValueError: factors of different numbers of rows.
    """
    n_rows, other = x.values.shape[0], g.values.shape[0]
    if n_rows != other:
        raise ValueError(f"{n_rows} rows of x don't meet {other} of g")
    x, g = (QuantizedTensor(pad(s.values, (EDGE, 1)), s.scale[:, None]) for s in (x, g))
    return _multiply(x, g, sizes, dtype, interpret)


def _multiply(x: QuantizedTensor, g: QuantizedTensor, sizes, dtype, interpret: bool):
    """Scales are [T/128 1 D] and [T/128 1 F]; T is padded."""
    (n_rows, width), columns = x.values.shape, g.values.shape[1]
    pieces = largest_divisor(n_rows // EDGE, STEP // EDGE)
    rows, wide, cols = pieces * EDGE, min(WIDE, width), min(WIDE, columns)
    visits, n_visits = tile_schedule(sizes, n_rows, rows, empty=1)
    return pl.pallas_call(
        _outer_kernel,
        out_shape=jax.ShapeDtypeStruct((sizes.size, width, columns), dtype),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(width, wide), pl.cdiv(columns, cols), n_visits),
            in_specs=[
                pl.BlockSpec((rows, wide), lambda i, j, v, _, tile, *__: (tile[v], i)),
                pl.BlockSpec((pieces, 1, wide), lambda i, j, v, _, tile, *__: (tile[v], 0, i)),
                pl.BlockSpec((rows, cols), lambda i, j, v, _, tile, *__: (tile[v], j)),
                pl.BlockSpec((pieces, 1, cols), lambda i, j, v, _, tile, *__: (tile[v], 0, j)),
            ],
            out_specs=pl.BlockSpec((None, wide, cols), lambda i, j, v, group, *_: (group[v], i, j)),
            scratch_shapes=[
                tpu.VMEM((wide, cols), jnp.float32),
                tpu.VMEM((wide, EDGE), jnp.float32),
            ],
        ),
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="grouped_fp8_wgrad",
    )(*visits, *x, *g)


def _outer_kernel(
    group_ref,
    tile_ref,
    start_ref,
    stop_ref,
    x_ref,
    x_scale_ref,
    g_ref,
    g_scale_ref,
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

    def add(piece, _):
        here = pl.ds(pl.multiple_of(piece * EDGE, EDGE), EDGE)
        row = piece * EDGE + lax.broadcasted_iota(jnp.int32, (EDGE, 1), 0)
        mine = (row >= start) & (row < stop)
        x, g = (jnp.where(mine, ref[here].astype(jnp.float32), 0) for ref in (x_ref, g_ref))
        _turn(x_scale_ref.at[piece], column_ref)
        codes = x.astype(x_ref.dtype), g.astype(g_ref.dtype)
        _add(sum_ref, *codes, column_ref, g_scale_ref.at[piece])

    @pl.when(start < stop)
    def _():  # tiles of 128 rows without any of the group's are left out, whatever their scales
        lower = lax.div(jnp.maximum(start, 0), EDGE)
        upper = lax.div(jnp.minimum(stop, rows) + EDGE - 1, EDGE)
        lax.fori_loop(lower, upper, add, None)

    @pl.when((v == after) | (group_ref[after] != group_ref[v]))
    def _():
        out_ref[...] = sum_ref[...].astype(out_ref.dtype)


def _turn(row_ref, column_ref):
    """A row of scales becomes a column, which fills the lanes."""
    for at in range(0, row_ref.shape[1], EDGE):
        row = row_ref[:, at : at + EDGE]
        column_ref[at : at + EDGE] = jnp.broadcast_to(row, (EDGE, row.shape[1])).T


def _add(sum_ref, x, g, column_ref, g_scale_ref):
    """A piece of the sum, in slices of so few numbers that they stay in registers."""
    for lane in range(0, sum_ref.shape[1], LANES):
        part = product(x, g[:, lane : lane + LANES], 0, 0)
        for at in range(0, sum_ref.shape[0], SUBLANES):
            rows = slice(at, at + SUBLANES)
            for here in range(0, part.shape[1], EDGE):
                term = part[rows, here : here + EDGE]
                cols = slice(lane + here, lane + here + term.shape[1])
                scale = column_ref[rows, : term.shape[1]] * g_scale_ref[:, cols]
                sum_ref[rows, cols] += term * scale
