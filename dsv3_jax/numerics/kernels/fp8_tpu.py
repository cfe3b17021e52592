"""Products of block-scaled E4M3 matrices on TPUs, in Pallas (report sec. 3.3.2).

The result is held transposed, [N M]: rows of `x` run along lanes. So the scales of a piece of the
sum are one row for 128 x 128 numbers of the result, multiplied with their block's scale once a
step, and read again and again without moving between lanes. A piece costs its numbers one product
and one addition in float32; the sum stays in VMEM and is turned round at the end.

Rows sorted by group meet their group's matrix: a row tile is visited once for each group it holds
rows of, and of what a visit computed, the group's rows are written. Dense products are one group.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from dsv3_jax.numerics.quantize import QuantizedTensor
from dsv3_jax.shapes import Array, Float, Int

EDGE = 128  # of a block, or the length of a tile, with one scale
ROWS, COLUMNS, STEP = 1024, 1024, 1536  # of a tile of the result, and of the sum in one step
TOGETHER = 2  # pieces that are added before the sum is read and written
LANES, SUBLANES = 256, 32  # of a product on tpu7x's MXU, of what is added to the sum at once
VMEM_BYTES = 48 * 2**20


class TileSchedule(NamedTuple):
    """Which rows of which tile meet which group, in turn; those too many have no rows."""

    group: Array  # [visits]
    tile: Array  # [visits]
    start: Array  # [visits] first row of the group
    stop: Array  # [visits]


def scaled_matmul(
    x: QuantizedTensor,
    w: QuantizedTensor,
    dtype: jax.typing.DTypeLike,
    transposed: bool = False,
    interpret: bool = False,
    depth: int = EDGE,
) -> Float[Array, "M N"]:
    """x times w, summed in float32 in pieces of 128, each times its scales.

    M and K that are no multiples of 128 are padded, which copies the operand; any N is as good.

    Args:
        x: values [M K] in tiles of 1 x 128.
        w: values [K N] in blocks of 128 x 128.
        dtype: of the result.
        transposed: w is [N K], and its transpose is meant.
        interpret: run the kernel's steps as XLA operations, on any platform.
        depth: length of a piece: 256, as deep as the MXU of tpu7x, where each two neighbours along
            K have the same scale; that of the first is used.

    Source: DeepSeek-V3 report (arXiv 2412.19437), sec. 3.3.2.
    """
    sizes = jnp.full((1,), x.values.shape[0], jnp.int32)
    w = QuantizedTensor(w.values[None], w.scale[None])
    return grouped_scaled_matmul(x, w, sizes, dtype, transposed, interpret, depth)


def grouped_scaled_matmul(
    x: QuantizedTensor,
    w: QuantizedTensor,
    sizes: Int[Array, " e"],
    dtype: jax.typing.DTypeLike,
    transposed: bool = False,
    interpret: bool = False,
    depth: int = EDGE,
) -> Float[Array, "r N"]:
    """Rows of group i times `w[i]`; beyond the last group the result is unspecified.

    Args:
        x: values [r K], sorted by group, in tiles of 1 x 128.
        w: values [e K N] in blocks of 128 x 128.
        sizes: rows of each group; their sum is at most r.
        dtype: of the result.
        transposed: w is [e N K], and the transposes are meant.
        interpret: run the kernel's steps as XLA operations, on any platform.
        depth: see `scaled_matmul`.

    Raises:
        ValueError: matrices of another width than the rows.
    """
    n_rows, width = x.values.shape
    summed = w.values.shape[2 if transposed else 1]
    if summed != width:
        raise ValueError(f"weights of width {summed} don't meet rows of width {width}")
    every = depth // EDGE
    block_scale = (w.scale.mT if transposed else w.scale)[:, ::every]
    rows = QuantizedTensor(
        pad(x.values, (EDGE, depth)), pad(x.scale[:, ::every], (EDGE, 1)).T[:, None]
    )
    matrices = pad(w.values, (1, depth) if transposed else (depth, 1))
    w = QuantizedTensor(matrices, _by_columns(block_scale))
    return _multiply(rows, w, sizes, dtype, transposed, interpret, depth)[:n_rows]


def _multiply(
    x: QuantizedTensor,
    w: QuantizedTensor,
    sizes,
    dtype,
    transposed: bool,
    interpret: bool,
    depth: int,
):
    """Scales are [K/depth 1 M] and [e columns K/depth n 128]; M and K are padded."""
    n_pieces, _, n_rows = x.scale.shape
    _, n_columns, _, n, _ = w.scale.shape
    columns = w.values.shape[1 if transposed else 2]
    rows, cols = min(_rows_of_a_tile(n_rows, sizes.size), n_rows), min(COLUMNS, columns)
    pieces = largest_divisor(n_pieces, STEP // depth)
    step = pieces * depth
    visits, n_visits = tile_schedule(sizes, n_rows, rows)

    def matrix(j, v, k, group, *_):
        return (group[v], j, k) if transposed else (group[v], k, j)

    return pl.pallas_call(
        functools.partial(_product_kernel, depth=depth, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((n_rows, columns), dtype),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(n_columns, n_visits, n_pieces // pieces),
            in_specs=[
                pl.BlockSpec((rows, step), lambda j, v, k, _, tile, *__: (tile[v], k)),
                pl.BlockSpec((pieces, 1, rows), lambda j, v, k, _, tile, *__: (k, 0, tile[v])),
                pl.BlockSpec((None, *((cols, step) if transposed else (step, cols))), matrix),
                pl.BlockSpec(
                    (None, None, pieces, n, EDGE),
                    lambda j, v, k, group, *_: (group[v], j, k, 0, 0),
                ),
            ],
            out_specs=pl.BlockSpec((rows, cols), lambda j, v, k, _, tile, *__: (tile[v], j)),
            scratch_shapes=[
                tpu.VMEM((cols, rows), jnp.float32),
                tpu.VMEM((pieces, n, rows), jnp.float32),
            ],
        ),
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="grouped_scaled_matmul",
    )(*visits, *x, *w)


def pad(x: Array, to: tuple[int, int] = (EDGE, EDGE)) -> Array:
    """The last two dims completed with zeros to multiples of `to`."""
    short = [(0, -n % multiple) for n, multiple in zip(x.shape[-2:], to, strict=True)]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + short)


def _rows_of_a_tile(n_rows: int, n_groups: int) -> int:
    """Few tiles shall hold rows of two groups: they are multiplied twice."""
    if n_groups == 1:
        return ROWS
    quarter = max(n_rows // (4 * n_groups), EDGE)
    return min(1 << quarter.bit_length() - 1, ROWS)


def largest_divisor(n: int, limit: int) -> int:
    """Of n, up to the limit."""
    return max(divisor for divisor in range(1, limit + 1) if n % divisor == 0)


def tile_schedule(
    sizes: Int[Array, " e"], n_rows: int, rows: int, empty: int = 0
) -> tuple[TileSchedule, Int[Array, ""]]:
    """Row tiles of group after group, and how many there are.

    Args:
        n_rows: of the buffer.
        rows: of a tile.
        empty: visits of a group without rows.
    """
    stop = jnp.cumsum(sizes.astype(jnp.int32))
    start = stop - sizes.astype(jnp.int32)
    n_tiles = pl.cdiv(n_rows, rows)
    first = jnp.minimum(start // rows, n_tiles - 1)
    count = jnp.where(sizes > 0, pl.cdiv(stop, rows) - first, empty)
    ends = jnp.cumsum(count)
    index = jnp.arange(n_tiles + sizes.size, dtype=jnp.int32)
    group = (ends[None, :] <= index[:, None]).sum(-1, dtype=jnp.int32)
    group = jnp.minimum(group, sizes.size - 1)
    tile = jnp.minimum(first[group] + index - (ends - count)[group], n_tiles - 1)
    return TileSchedule(group, tile, start[group], stop[group]), jnp.maximum(ends[-1], 1)


def _by_columns(scale):
    """[e k N/128] -> [e columns k n 128], each in 128 lanes, n for the columns of a tile."""
    n = min(COLUMNS // EDGE, scale.shape[-1])
    scale = pad(scale, (1, n))
    scale = rearrange(scale, "e k (j n) -> e j k n", n=n)
    return jnp.broadcast_to(scale[..., None], (*scale.shape, EDGE))


def _product_kernel(
    group_ref,
    tile_ref,
    start_ref,
    stop_ref,
    x_ref,
    scale_ref,
    w_ref,
    block_scale_ref,
    out_ref,
    sum_ref,
    scales_ref,
    *,
    depth,
    transposed,
):
    v, k = pl.program_id(1), pl.program_id(2)
    n_pieces, _, rows = scales_ref.shape

    @pl.when(k == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    for piece in range(n_pieces):
        for lane in range(0, rows, EDGE):
            lanes = slice(lane, lane + EDGE)
            scales_ref[piece, :, lanes] = block_scale_ref[piece] * scale_ref[piece, :, lanes]
    together = largest_divisor(n_pieces, TOGETHER)

    def add(i, _):
        for lane in range(0, rows, LANES):
            lanes = slice(lane, min(lane + LANES, rows))
            parts, scales = [], []
            for piece in range(together):
                piece += i * together
                ks = pl.ds(pl.multiple_of(piece * depth, depth), depth)
                w, dim = (w_ref[:, ks], 1) if transposed else (w_ref[ks], 0)
                parts.append(product(w, x_ref[lanes, ks], dim, 1))
                scales.append(scales_ref.at[piece, :, lanes])
            _add(sum_ref.at[:, lanes], parts, scales)
        return _

    lax.fori_loop(0, n_pieces // together, add, None)

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        row = tile_ref[v] * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        mine = (row >= start_ref[v]) & (row < stop_ref[v])
        out_ref[...] = jnp.where(mine, sum_ref[...].astype(out_ref.dtype).T, out_ref[...])


def product(a: Array, b: Array, a_dim: int, b_dim: int) -> Array:
    """Of codes, summed over those dims in float32."""
    dims = (((a_dim,), (b_dim,)), ((), ()))
    precision = lax.Precision.DEFAULT  # the codes as they are
    return lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def _add(sum_ref, parts, scales):
    """In slices of so few numbers that they stay in registers."""
    for at in range(0, sum_ref.shape[0], SUBLANES):
        here, block = slice(at, at + SUBLANES), slice(at // EDGE, at // EDGE + 1)
        terms = (part[here] * scale[block] for part, scale in zip(parts, scales, strict=True))
        sum_ref[here] += functools.reduce(jnp.add, terms)
