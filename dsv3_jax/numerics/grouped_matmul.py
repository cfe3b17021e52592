"""Grouped matmul: rows sorted by expert, each group times its own expert's matrix.

On TPUs XLA's kernel for ragged products. Elsewhere the row-block scan, which is the reference: it
walks over blocks of rows that start where their group starts, so rows need no padding or alignment,
and the work is that of the rows that exist (plus, on average, half a block an expert), not of the
buffer that holds them.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.shapes import Array, Float, Int

BLOCK = 256  # most rows in a block


class _Blocks(NamedTuple):
    """Which rows and expert each block covers; `count` of them are real."""

    expert: Array  # [blocks]
    start: Array  # [blocks] first row
    stop: Array  # [blocks] row after the last of its group
    count: Array  # []


def _block_size(n_rows: int, n_groups: int) -> int:
    """Rows of a block: those of a balanced group as a power of two, from 8 to `BLOCK`."""
    balanced = 1 << (max(n_rows // n_groups, 8) - 1).bit_length()
    return min(balanced, BLOCK, n_rows)


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    rows: Float[Array, "r D"],
    weights: Float[Array, "e D F"],
    sizes: Int[Array, " e"],
    platform: str = "cpu",
) -> Float[Array, "r F"]:
    """Rows of group i times `weights[i]`; beyond the last group the result is unspecified.

    Args:
        rows: sorted by group.
        weights: one matrix a group.
        sizes: rows of each group; their sum is at most r.
        platform: of the devices; on "tpu" XLA's kernel runs (checked here on the CPU, where XLA
            expands it, and compiled for v5p and tpu7x).
    """
    return _forward(rows, weights, sizes, platform)[0]


def _forward(rows, weights, sizes, platform):
    product = _ragged_product if platform == "tpu" else _scanned_product
    return product(rows, weights, sizes), (rows, weights, sizes)


def _backward(platform, saved, grad):
    """Gradients of rows (dgrad) and, summed in float32, of weights (wgrad)."""
    rows, weights, sizes = saved
    gradients = _ragged_gradients if platform == "tpu" else _scanned_gradients
    d_rows, d_weights = gradients(rows, weights, sizes, grad)
    return d_rows, d_weights.astype(weights.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def _ragged_product(rows, weights, sizes, summed: int = 1):
    """`summed` is the dim of a weight that the rows' last one meets."""
    dims = lax.RaggedDotDimensionNumbers(
        (((1,), (summed,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=(0,)
    )
    return lax.ragged_dot_general(rows, weights, sizes, dims, preferred_element_type=rows.dtype)


def _ragged_gradients(rows, weights, sizes, grad):
    """The kernel sums in float32, whatever it returns."""
    d_rows = _ragged_product(grad, weights, sizes, summed=2)
    dims = lax.RaggedDotDimensionNumbers(
        (((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=()
    )
    kind = weights.dtype
    return d_rows, lax.ragged_dot_general(rows, grad, sizes, dims, preferred_element_type=kind)


def _scanned_product(rows, weights, sizes):
    block = _block_size(rows.shape[0], sizes.size)
    blocks = _blocks(sizes, rows.shape[0], block)

    def body(i, out):
        x, start, mine = _block_rows(rows, blocks, i, block)
        w = lax.dynamic_index_in_dim(weights, blocks.expert[i], keepdims=False)
        return _write(out, jnp.einsum("rD,DF->rF", x, w), start, mine)

    out = jnp.zeros((rows.shape[0], weights.shape[2]), rows.dtype)
    return lax.fori_loop(0, blocks.count, body, out)


def _scanned_gradients(rows, weights, sizes, grad):
    """Both in one walk."""
    block = _block_size(rows.shape[0], sizes.size)
    blocks = _blocks(sizes, rows.shape[0], block)

    def body(i, carry):
        d_rows, d_weights = carry
        x, start, mine = _block_rows(rows, blocks, i, block)
        g, _, _ = _block_rows(grad, blocks, i, block)
        e = blocks.expert[i]
        w = lax.dynamic_index_in_dim(weights, e, keepdims=False)
        d_rows = _write(d_rows, jnp.einsum("rF,DF->rD", g, w), start, mine)
        d_w = jnp.einsum("rD,rF->DF", jnp.where(mine, x, 0), g, preferred_element_type=jnp.float32)
        total = lax.dynamic_index_in_dim(d_weights, e, keepdims=False) + d_w
        return d_rows, lax.dynamic_update_index_in_dim(d_weights, total, e, 0)

    start = jnp.zeros_like(rows), jnp.zeros(weights.shape, jnp.float32)
    return lax.fori_loop(0, blocks.count, body, start)


def _write(out, y, start, mine):
    """Put the rows of `y` that belong to the block where they came from."""
    old = lax.dynamic_slice_in_dim(out, start, y.shape[0])
    return lax.dynamic_update_slice_in_dim(out, jnp.where(mine, y, old), start, 0)
