"""Grouped matmul on GPUs: two Pallas kernels, which Triton compiles.

A program of the grid owns one tile of the result and keeps its float32 sum in registers. A row tile
of the result lies in one group, so it needs one expert's matrix; it starts where a group starts or
a whole number of tiles behind, so rows need no padding, and what it would cover of the next group
is masked. How many row tiles there are depends on the sizes of the groups: the grid has as many as
there could be, and the surplus ones return at once. The work is that of the rows that exist.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from dsv3_jax.shapes import Array, Float, Int

BAND = 8  # row tiles that go through the columns together, and share their weights in the L2 cache


class _TileSizes(NamedTuple):
    """The sizes of a program's tile of the result and of a step of its sum; powers of two."""

    rows: int
    columns: int
    step: int
    warps: int
    stages: int  # steps that are loaded ahead


class _RowTiles(NamedTuple):
    """The expert of each row tile, and its rows from `start` on; none where `stop <= start`."""

    expert: Array  # [tiles]
    start: Array  # [tiles]
    stop: Array  # [tiles]


def gmm(
    rows: Float[Array, "r D"],
    weights: Float[Array, "e _ _"],
    sizes: Int[Array, " e"],
    transposed: bool = False,
    *,
    interpret: bool = False,
) -> Float[Array, "r _"]:
    """Return rows of group i times `weights[i]`; beyond the last group the result is not written.

    Args:
        rows: sorted by group.
        weights: [e D F], one matrix per group, of the rows' dtype.
        sizes: rows of each group; their sum is at most r.
        transposed: weights are [e F D], and their transposes are meant.
        interpret: run the kernel's steps as XLA operations, on any platform.

    Raises:
        ValueError: weights of another width than the rows.
    """
    (n_rows, width), n_groups = rows.shape, sizes.size
    summed, columns = weights.shape[1:][::-1] if transposed else weights.shape[1:]
    if summed != width:
        raise ValueError(f"weights of width {summed} don't meet rows of width {width}")
    tiles = _tiles(rows.dtype, n_rows // n_groups)
    schedule = row_tiles(sizes, n_rows, tiles.rows)
    return pl.pallas_call(
        functools.partial(_gmm_kernel, tiles=tiles, transposed=transposed),
        out_shape=jax.ShapeDtypeStruct((n_rows, columns), rows.dtype),
        grid=(BAND, pl.cdiv(columns, tiles.columns), schedule.start.size // BAND),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="gmm",
    )(*schedule, rows, weights)


def tgmm(
    rows: Float[Array, "r D"],
    grad: Float[Array, "r F"],
    sizes: Int[Array, " e"],
    dtype: jax.typing.DTypeLike = jnp.float32,
    *,
    interpret: bool = False,
) -> Float[Array, "e D F"]:
    """Return transposed rows of group i times its rows of `grad`, summed in float32; 0 for no rows.

    Args:
        rows: sorted by group.
        grad: as many rows, of the same dtype.
        sizes: rows of each group; their sum is at most r.
        dtype: of the result.
        interpret: run the kernel's steps as XLA operations, on any platform.
    """
    width, columns = rows.shape[1], grad.shape[1]
    tiles = _tiles(rows.dtype, width)
    stop = jnp.cumsum(sizes.astype(jnp.int32))
    return pl.pallas_call(
        functools.partial(_tgmm_kernel, tiles=tiles),
        out_shape=jax.ShapeDtypeStruct((sizes.size, width, columns), dtype),
        grid=(pl.cdiv(columns, tiles.columns), pl.cdiv(width, tiles.rows), sizes.size),
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        interpret=interpret,
        name="tgmm",
    )(stop - sizes.astype(jnp.int32), stop, rows, grad)


def _tiles(dtype: jnp.dtype, n_rows: int) -> _TileSizes:
    """Return the tile sizes for results of `n_rows` rows per group, as large as registers allow.

    Tiles are not much larger than the result.
    """
    rows = min(pl.next_power_of_2(max(n_rows, 16)), 128)
    if dtype.itemsize > 2:
        return _TileSizes(min(rows, 64), 64, 32, 4, 3)
    return _TileSizes(rows, 256, 64, 8, 3) if rows == 128 else _TileSizes(rows, 128, 64, 4, 4)


def row_tiles(sizes: Int[Array, " e"], n_rows: int, tile: int) -> _RowTiles:
    """Return the row tiles of all groups in turn, then surplus ones behind the last group."""
    sizes = sizes.astype(jnp.int32)
    n_tiles = -(-sizes // tile)
    group_stop, tile_stop = jnp.cumsum(sizes), jnp.cumsum(n_tiles)
    index = jnp.arange(pl.cdiv(n_rows // tile + sizes.size, BAND) * BAND, dtype=jnp.int32)
    # A search would be a loop, and each of its steps several launches.
    expert = (tile_stop[None, :] <= index[:, None]).sum(-1, dtype=jnp.int32)
    expert = jnp.minimum(expert, sizes.size - 1)
    start = (group_stop - sizes)[expert] + (index - (tile_stop - n_tiles)[expert]) * tile
    return _RowTiles(expert, start, group_stop[expert])


def _gmm_kernel(
    expert_ref, start_ref, stop_ref, rows_ref, weights_ref, out_ref, *, tiles, transposed
):
    i = pl.program_id(2) * BAND + pl.program_id(0)
    column = pl.program_id(1) * tiles.columns
    start, stop, expert = start_ref[i], stop_ref[i], expert_ref[i]
    width, n_columns = rows_ref.shape[1], out_ref.shape[1]

    def add(k, total):
        k = k * tiles.step
        x = load(rows_ref, (), (start, k), (tiles.rows, tiles.step), (stop, width))
        if transposed:
            shape, limits = (tiles.columns, tiles.step), (n_columns, width)
            w = load(weights_ref, (expert,), (column, k), shape, limits)
        else:
            shape, limits = (tiles.step, tiles.columns), (width, n_columns)
            w = load(weights_ref, (expert,), (k, column), shape, limits)
        return total + triton.dot(x, w, trans_b=transposed)

    @pl.when(start < stop)
    def _():
        total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        total = lax.fori_loop(0, pl.cdiv(width, tiles.step), add, total)
        store(out_ref, (), (start, column), total, (stop, n_columns))


def _tgmm_kernel(start_ref, stop_ref, rows_ref, grad_ref, out_ref, *, tiles):
    """Sum over rows of the group; both operands are 0 beyond."""
    expert = pl.program_id(2)
    row, column = pl.program_id(1) * tiles.rows, pl.program_id(0) * tiles.columns
    start, stop = start_ref[expert], stop_ref[expert]
    width, n_columns = out_ref.shape[1:]

    def add(k, total):
        k = start + k * tiles.step
        x = load(rows_ref, (), (k, row), (tiles.step, tiles.rows), (stop, width))
        g = load(grad_ref, (), (k, column), (tiles.step, tiles.columns), (stop, n_columns))
        return total + triton.dot(x, g, trans_a=True)

    total = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    total = lax.fori_loop(0, pl.cdiv(stop - start, tiles.step), add, total)
    store(out_ref, (expert,), (row, column), total, (width, n_columns))


def load(ref, matrix, starts, shape, limits):
    """Return the tile at `starts` of a matrix, 0 from `limits` on."""
    where = tuple(pl.ds(start, size) for start, size in zip(starts, shape, strict=True))
    mask = _mask(starts, shape, limits)
    other = None if mask is None else 0.0
    return triton.load(ref.at[(*matrix, *where)], mask=mask, other=other)


def store(ref, matrix, starts, value, limits):
    """Write the tile at `starts` of a matrix, as far as it lies before `limits`."""
    where = tuple(pl.ds(start, size) for start, size in zip(starts, value.shape, strict=True))
    mask = _mask(starts, value.shape, limits)
    triton.store(ref.at[(*matrix, *where)], value.astype(ref.dtype), mask=mask)


def _mask(starts, shape, limits):
    """Return the mask of elements before the limits; None where tiles fill the matrix."""
    mask = None
    for dim, (start, size, limit) in enumerate(zip(starts, shape, limits, strict=True)):
        if isinstance(limit, int) and limit % size == 0:
            continue
        inside = start + lax.broadcasted_iota(jnp.int32, shape, dim) < limit
        mask = inside if mask is None else mask & inside
    return mask
