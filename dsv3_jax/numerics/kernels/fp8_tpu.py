"""Matmuls of block-scaled E4M3 matrices on TPUs: a Pallas kernel (report sec. 3.3.2).

The accumulator is held transposed, [F r]: rows of `x` run along lanes. So the scales of a k-block
(128 of the summed dimension) are one row for 128 x 128 accumulators, multiplied with the weights'
scale once per grid step, and read again and again without moving between lanes. A k-block costs an
accumulator one multiplication and one addition in float32; the accumulators stay in VMEM and are
transposed at the end.

Rows sorted by group meet their group's matrix: a row tile is visited once for each group of which
it holds rows, and of what a visit computed, the group's rows are written. A dense matmul is one
group.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from dsv3_jax.numerics.quantize import BLOCK_SIZE, QuantizedTensor
from dsv3_jax.shapes import Array, Float, Int

ROWS, COLUMNS, STEP = 1024, 1024, 1536  # of a tile of the result, and of the sum in a grid step
UNROLL = 2  # k-blocks that are added before the accumulators are read and written
LANES, SUBLANES = 256, 32  # of a matmul on tpu7x's MXU, of accumulators in registers at a time
VMEM_BYTES = 48 * 2**20  # that a kernel may use


class TileSchedule(NamedTuple):
    """The group and the row tile of each visit, as in megablox; surplus visits have no rows."""

    group: Array  # [visits]
    tile: Array  # [visits]
    start: Array  # [visits] first row of the group
    stop: Array  # [visits]


def scaled_matmul(
    x: QuantizedTensor,
    w: QuantizedTensor,
    dtype: jax.typing.DTypeLike,
    transposed: bool = False,
    *,
    interpret: bool = False,
    depth: int = BLOCK_SIZE,
) -> Float[Array, "r F"]:
    """Return x w, summed in float32 in k-blocks of 128, each times its scales.

    r and D that are no multiples of 128 are padded, which copies the operand; any F is as good.

    Args:
        x: values [r D] in tiles of 1 x 128.
        w: values [D F] in blocks of 128 x 128.
        dtype: of the result.
        transposed: w is [F D], and its transpose is meant.
        interpret: run the kernel's steps as XLA operations, on any platform.
        depth: length of a k-block: 256, as deep as the MXU of tpu7x, where each two neighbours
            along D have the same scale; that of the first is used.

    Source: DeepSeek-V3 report (arXiv 2412.19437), sec. 3.3.2.
    """
    sizes = jnp.full((1,), x.values.shape[0], jnp.int32)
    w = jax.tree.map(lambda a: a[None], w)
    return grouped_scaled_matmul(x, w, sizes, dtype, transposed, interpret=interpret, depth=depth)


def grouped_scaled_matmul(
    x: QuantizedTensor,
    w: QuantizedTensor,
    sizes: Int[Array, " e"],
    dtype: jax.typing.DTypeLike,
    transposed: bool = False,
    *,
    interpret: bool = False,
    depth: int = BLOCK_SIZE,
) -> Float[Array, "r F"]:
    """Return rows of group i times `w[i]`; beyond the last group the result is unspecified.

    Args:
        x: values [r D], sorted by group, in tiles of 1 x 128.
        w: values [e D F] in blocks of 128 x 128.
        sizes: rows of each group; their sum is at most r.
        dtype: of the result.
        transposed: w is [e F D], and the transposes are meant.
        interpret: run the kernel's steps as XLA operations, on any platform.
        depth: see `scaled_matmul`.

    Raises:
        ValueError: weights of another width than the rows.
    """
    n_rows, width = x.values.shape
    summed = w.values.shape[2 if transposed else 1]
    if summed != width:
        raise ValueError(f"weights of width {summed} don't meet rows of width {width}")
    every = depth // BLOCK_SIZE
    block_scale = (w.scale.mT if transposed else w.scale)[:, ::every]
    x = QuantizedTensor(
        pad(x.values, (BLOCK_SIZE, depth)), pad(x.scale[:, ::every], (BLOCK_SIZE, 1)).T[:, None]
    )
    w = QuantizedTensor(
        pad(w.values, (1, depth) if transposed else (depth, 1)), _by_columns(block_scale)
    )
    return _grouped_matmul(x, w, sizes, dtype, transposed, interpret, depth)[:n_rows]


def _grouped_matmul(
    x: QuantizedTensor,
    w: QuantizedTensor,
    sizes: Int[Array, " e"],
    dtype: jax.typing.DTypeLike,
    transposed: bool,
    interpret: bool,
    depth: int,
):
    """Call the kernel. Scales are [D/depth 1 r] and [e columns D/depth n 128]; r, D are padded."""
    n_blocks, _, n_rows = x.scale.shape
    _, n_columns, _, n, _ = w.scale.shape
    columns = w.values.shape[1 if transposed else 2]
    rows, cols = min(_tile_rows(n_rows, sizes.size), n_rows), min(COLUMNS, columns)
    blocks = largest_divisor(n_blocks, STEP // depth)
    step = blocks * depth
    schedule, n_visits = tile_schedule(sizes, n_rows, rows)

    def matrix(j, v, k, group, *_):
        return (group[v], j, k) if transposed else (group[v], k, j)

    return pl.pallas_call(
        functools.partial(_matmul_kernel, depth=depth, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((n_rows, columns), dtype),
        grid_spec=tpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(schedule),
            grid=(n_columns, n_visits, n_blocks // blocks),
            in_specs=[
                pl.BlockSpec((rows, step), lambda j, v, k, _, tile, *__: (tile[v], k)),
                pl.BlockSpec((blocks, 1, rows), lambda j, v, k, _, tile, *__: (k, 0, tile[v])),
                pl.BlockSpec((None, *((cols, step) if transposed else (step, cols))), matrix),
                pl.BlockSpec(
                    (None, None, blocks, n, BLOCK_SIZE),
                    lambda j, v, k, group, *_: (group[v], j, k, 0, 0),
                ),
            ],
            out_specs=pl.BlockSpec((rows, cols), lambda j, v, k, _, tile, *__: (tile[v], j)),
            scratch_shapes=[
                tpu.VMEM((cols, rows), jnp.float32),
                tpu.VMEM((blocks, n, rows), jnp.float32),
            ],
        ),
        compiler_params=tpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM_BYTES
        ),
        interpret=interpret,
        name="grouped_scaled_matmul",
    )(*schedule, *x, *w)


def pad(x: Array, multiples: tuple[int, int] = (BLOCK_SIZE, BLOCK_SIZE)) -> Array:
    """Return x with its last two dims completed with zeros to these multiples."""
    short = [(0, -n % multiple) for n, multiple in zip(x.shape[-2:], multiples, strict=True)]
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + short)


def _tile_rows(n_rows: int, n_groups: int) -> int:
    """Return the rows of a tile: few tiles shall hold rows of two groups, which cost two visits."""
    if n_groups == 1:
        return ROWS
    quarter = max(n_rows // (4 * n_groups), BLOCK_SIZE)
    return min(1 << quarter.bit_length() - 1, ROWS)


def largest_divisor(n: int, limit: int) -> int:
    """Return the largest divisor of n up to the limit."""
    return max(divisor for divisor in range(1, limit + 1) if n % divisor == 0)


def tile_schedule(
    sizes: Int[Array, " e"], n_rows: int, rows: int, empty: int = 0
) -> tuple[TileSchedule, Int[Array, ""]]:
    """Return the visits to the row tiles of group after group, and how many visits there are.

    Args:
        n_rows: rows of the buffer.
        rows: rows of a tile.
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
    """Return scales [e k F/128] as [e columns k n 128]: each in 128 lanes, n per column tile."""
    n = min(COLUMNS // BLOCK_SIZE, scale.shape[-1])
    scale = pad(scale, (1, n))
    scale = rearrange(scale, "e k (j n) -> e j k n", n=n)
    return jnp.broadcast_to(scale[..., None], (*scale.shape, BLOCK_SIZE))


def _matmul_kernel(
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
    n_blocks, _, rows = scales_ref.shape

    @pl.when(k == 0)
    def _():
        sum_ref[...] = jnp.zeros_like(sum_ref)

    for block in range(n_blocks):
        for lane in range(0, rows, BLOCK_SIZE):
            lanes = slice(lane, lane + BLOCK_SIZE)
            scales_ref[block, :, lanes] = block_scale_ref[block] * scale_ref[block, :, lanes]
    unroll = largest_divisor(n_blocks, UNROLL)

    def add(i, _):
        for lane in range(0, rows, LANES):
            lanes = slice(lane, min(lane + LANES, rows))
            products, scales = [], []
            for block in range(unroll):
                block += i * unroll
                ks = pl.ds(pl.multiple_of(block * depth, depth), depth)
                w, dim = (w_ref[:, ks], 1) if transposed else (w_ref[ks], 0)
                products.append(dot(w, x_ref[lanes, ks], dim, 1))
                scales.append(scales_ref.at[block, :, lanes])
            _accumulate(sum_ref.at[:, lanes], products, scales)
        return _

    lax.fori_loop(0, n_blocks // unroll, add, None)

    @pl.when(k == pl.num_programs(2) - 1)
    def _():
        row = tile_ref[v] * rows + lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
        in_group = (row >= start_ref[v]) & (row < stop_ref[v])
        out_ref[...] = jnp.where(in_group, sum_ref[...].astype(out_ref.dtype).T, out_ref[...])


def dot(a: Array, b: Array, a_dim: int, b_dim: int) -> Array:
    """Return the matmul of E4M3 values, summed over these dims in float32."""
    dims = (((a_dim,), (b_dim,)), ((), ()))
    precision = lax.Precision.DEFAULT  # the E4M3 values as they are
    return lax.dot_general(a, b, dims, precision, preferred_element_type=jnp.float32)


def _accumulate(sum_ref, products, scales):
    """Add the scaled products to the accumulators, so few at a time that they stay in registers."""
    for at in range(0, sum_ref.shape[0], SUBLANES):
        rows, block = slice(at, at + SUBLANES), slice(at // BLOCK_SIZE, at // BLOCK_SIZE + 1)
        terms = (x[rows] * scale[block] for x, scale in zip(products, scales, strict=True))
        sum_ref[rows] += functools.reduce(jnp.add, terms)
