"""Grouped matmul: rows sorted by expert, each group times its own expert's matrix.

This is the row-block scan, the reference and the CPU path: it walks over blocks of rows that start
where their group starts, so rows need no padding or alignment, and the work is that of the rows
that exist (plus, on average, half a block an expert), not of the buffer that holds them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.shapes import Array, Float, Int

BLOCK = 128


class _Blocks(NamedTuple):
    """Which rows and expert each block covers; `count` of them are real."""

    expert: Array  # [blocks]
    start: Array  # [blocks] first row
    stop: Array  # [blocks] row after the last of its group
    count: Array  # []


def _blocks(sizes: Int[Array, " e"], n_rows: int, block: int) -> _Blocks:
    per_expert = -(-sizes // block)
    ends = jnp.cumsum(per_expert)
    group_stop = jnp.cumsum(sizes)
    index = jnp.arange(n_rows // block + sizes.size, dtype=jnp.int32)
    expert = jnp.searchsorted(ends, index, side="right").astype(jnp.int32)
    within = index - (ends - per_expert)[expert]
    start = (group_stop - sizes)[expert] + within * block
    return _Blocks(expert, start, group_stop[expert], ends[-1])


def _block_rows(x: Float[Array, "r D"], blocks: _Blocks, i, block: int):
    """Rows of block `i`, the row they start at, and which of them belong to it."""
    start = jnp.minimum(blocks.start[i], x.shape[0] - block)
    row = start + jnp.arange(block)
    mine = (row >= blocks.start[i]) & (row < blocks.stop[i])
    return lax.dynamic_slice_in_dim(x, start, block), start, mine[:, None]


@functools.partial(jax.jit, static_argnames="transpose")
def _matmul(rows, weights, sizes, transpose: bool):
    block = min(BLOCK, rows.shape[0])
    blocks = _blocks(sizes, rows.shape[0], block)
    width = weights.shape[1 if transpose else 2]

    def body(i, out):
        x, start, mine = _block_rows(rows, blocks, i, block)
        w = lax.dynamic_index_in_dim(weights, blocks.expert[i], keepdims=False)
        y = jnp.einsum("rF,DF->rD" if transpose else "rD,DF->rF", x, w)
        old = lax.dynamic_slice_in_dim(out, start, block)
        return lax.dynamic_update_slice_in_dim(out, jnp.where(mine, y, old), start, 0)

    return lax.fori_loop(0, blocks.count, body, jnp.zeros((rows.shape[0], width), rows.dtype))


@jax.jit
def _weight_gradient(rows, grad, weights, sizes):
    block = min(BLOCK, rows.shape[0])
    blocks = _blocks(sizes, rows.shape[0], block)

    def body(i, out):
        x, _, mine = _block_rows(rows, blocks, i, block)
        g, _, _ = _block_rows(grad, blocks, i, block)
        d = jnp.einsum("rD,rF->DF", jnp.where(mine, x, 0), g, preferred_element_type=out.dtype)
        e = blocks.expert[i]
        total = lax.dynamic_index_in_dim(out, e, keepdims=False) + d
        return lax.dynamic_update_index_in_dim(out, total, e, 0)

    total = lax.fori_loop(0, blocks.count, body, jnp.zeros(weights.shape, jnp.float32))
    return total.astype(weights.dtype)


@jax.custom_vjp
def grouped_matmul(
    rows: Float[Array, "r D"], weights: Float[Array, "e D F"], sizes: Int[Array, " e"]
) -> Float[Array, "r F"]:
    """Rows of group i times `weights[i]`; rows beyond the last group come out as zeros.

    Args:
        rows: sorted by group.
        weights: one matrix a group.
        sizes: rows of each group; their sum is at most r.
    """
    return _matmul(rows, weights, sizes, transpose=False)


def _forward(rows, weights, sizes):
    return grouped_matmul(rows, weights, sizes), (rows, weights, sizes)


def _backward(saved, grad):
    rows, weights, sizes = saved
    d_rows = _matmul(grad, weights, sizes, transpose=True)
    return d_rows, _weight_gradient(rows, grad, weights, sizes), None


grouped_matmul.defvjp(_forward, _backward)
