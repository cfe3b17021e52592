"""Grouped matmul in XLA operations: the reference, and what runs where there is no kernel.

A scan over groups takes the rows of each in blocks: of `MAX_BLOCK` rows while so many are left,
then one block of the smallest of a few sizes that holds the rest. So rows need no padding or
alignment, a group's matrix is fetched once and its gradient written once, and the work is that of
the rows that exist (plus a sixth of the last block, on average), not of the buffer that holds them.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.shapes import Array, Float, Int

MAX_BLOCK, MIN_BLOCK = 512, 64  # rows of a block


def gmm(
    rows: Float[Array, "r _"],
    weights: Float[Array, "e _ _"],
    sizes: Int[Array, " e"],
    transposed: bool = False,
) -> Float[Array, "r _"]:
    """Return rows of group i times `weights[i]`, or times its transpose."""
    einsum, columns = ("rD,FD->rF", 1) if transposed else ("rD,DF->rF", 2)

    def group(out, item):
        w, first, stop = item

        def block(out, start, in_group):
            x = lax.dynamic_slice_in_dim(rows, start, in_group.size)
            y = jnp.einsum(einsum, x, w)
            y = jnp.where(in_group, y, lax.dynamic_slice_in_dim(out, start, in_group.size))
            return lax.dynamic_update_slice_in_dim(out, y, start, 0)

        return _scan_blocks(rows, sizes, first, stop, block, out), None

    ends, out = jnp.cumsum(sizes), jnp.zeros((rows.shape[0], weights.shape[columns]), rows.dtype)
    return lax.scan(group, out, (weights, ends - sizes, ends))[0]


def tgmm(
    rows: Float[Array, "r D"],
    grad: Float[Array, "r F"],
    sizes: Int[Array, " e"],
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "e D F"]:
    """Return transposed rows of group i times its rows of `grad`, summed in float32."""

    def group(_, item):
        def block(total, start, in_group):
            blocks = (lax.dynamic_slice_in_dim(x, start, in_group.size) for x in (rows, grad))
            x, g = (jnp.where(in_group, block, 0) for block in blocks)
            return total + jnp.einsum("rD,rF->DF", x, g, preferred_element_type=jnp.float32)

        zero = jnp.zeros((rows.shape[1], grad.shape[1]), jnp.float32)
        return None, _scan_blocks(rows, sizes, *item, block, zero)

    ends = jnp.cumsum(sizes)
    return lax.scan(group, None, (ends - sizes, ends))[1].astype(dtype)


def _scan_blocks(rows, sizes, first, stop, block: Callable, carry):
    """Fold `block` over the rows [first, stop) of one group.

    Args:
        block: (carry, first row of the block, mask [block 1]) -> carry. The last block may begin
            before the rows that it is for, or reach into the next groups: the mask is True for
            rows of this group that no earlier block has taken.
    """
    n_rows = rows.shape[0]
    block_sizes = _block_sizes(n_rows, sizes.size)
    n_full = (stop - first) // block_sizes[-1]
    rest = first + n_full * block_sizes[-1]
    loops = [(block_sizes[-1], first, n_full)]  # rows of a block, first row, trip count
    for below, n in itertools.pairwise([0, *block_sizes]):
        loops.append((n, rest, (stop - rest > below) & (stop - rest <= n)))
    for n, begin, trip_count in loops:  # loops of no trip instead of branches, which would copy

        def body(i, carry, n=n, begin=begin):
            wanted = begin + i * n
            start = jnp.minimum(wanted, n_rows - n)
            row = start + jnp.arange(n)
            return block(carry, start, ((row >= wanted) & (row < stop))[:, None])

        carry = lax.fori_loop(0, jnp.int32(trip_count), body, carry)
    return carry


def _block_sizes(n_rows: int, n_groups: int) -> list[int]:
    """Return the rows of blocks: from a balanced group or fewer up, in steps of 4/3 and 3/2."""
    balanced = 1 << (max(n_rows // n_groups, 8) - 1).bit_length()
    sizes = [min(balanced, MIN_BLOCK, n_rows)]
    while 2 * sizes[-1] <= min(MAX_BLOCK, n_rows):
        sizes += [sizes[-1] * 3 // 2, sizes[-1] * 2]
    return sizes
