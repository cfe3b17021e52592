"""Grouped matmul: rows sorted by expert, each group times its own expert's matrix.

On TPUs XLA's kernel for ragged products, on GPUs our Pallas kernel. Elsewhere, and as the
reference, a walk: group by group, each in blocks of `LARGEST` rows and one of the least of a few
sizes that holds what is left. So rows need no padding or alignment, a group's matrix is fetched
once and its gradient written once, and the work is that of the rows that exist (plus a sixth of
the last block, on average), not of the buffer that holds them.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from dsv3_jax.numerics.kernels.grouped_matmul_gpu import grouped_outer, grouped_product
from dsv3_jax.shapes import Array, Float, Int

LARGEST, SMALLEST = 512, 64  # rows of a block


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
        platform: of the devices. On "tpu" XLA's kernel runs (checked here on the CPU, where XLA
            expands it, and compiled for v5p and tpu7x), on "gpu" or "cuda" a Pallas kernel (checked
            in interpret mode and compiled for H100).
    """
    return _forward(rows, weights, sizes, platform)[0]


def _forward(rows, weights, sizes, platform):
    product, _ = _BACKENDS.get(platform, _WALK)
    return product(rows, weights, sizes), (rows, weights, sizes)


def _backward(platform, saved, grad):
    """Gradients of rows (dgrad) and, summed in float32, of weights (wgrad)."""
    rows, weights, sizes = saved
    _, gradients = _BACKENDS.get(platform, _WALK)
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


def _gpu_gradients(rows, weights, sizes, grad):
    d_rows = grouped_product(grad, weights, sizes, transposed=True)
    return d_rows, grouped_outer(rows, grad, sizes, weights.dtype)


def _walked_product(rows, weights, sizes):
    def group(out, w, first, stop):
        def block(out, start, mine):
            x = lax.dynamic_slice_in_dim(rows, start, mine.size)
            return _write(out, jnp.einsum("rD,DF->rF", x, w), start, mine)

        return _blocks(rows, sizes, first, stop, block, out), None

    out = jnp.zeros((rows.shape[0], weights.shape[2]), rows.dtype)
    return _groups(group, out, weights, sizes)[0]


def _walked_gradients(rows, weights, sizes, grad):
    """Both in one walk."""

    def group(d_rows, w, first, stop):
        def block(carry, start, mine):
            d_rows, d_w = carry
            parts = (lax.dynamic_slice_in_dim(part, start, mine.size) for part in (rows, grad))
            x, g = (jnp.where(mine, part, 0) for part in parts)
            d_rows = _write(d_rows, jnp.einsum("rF,DF->rD", g, w), start, mine)
            wide = {"preferred_element_type": jnp.float32}
            return d_rows, d_w + jnp.einsum("rD,rF->DF", x, g, **wide)

        zero = jnp.zeros(w.shape, jnp.float32)
        return _blocks(rows, sizes, first, stop, block, (d_rows, zero))

    return _groups(group, jnp.zeros_like(rows), weights, sizes)


def _groups(group: Callable, carry, weights, sizes):
    """Walk over the groups: (carry, matrix, first row, row after the last) -> (carry, gradient)."""
    ends = jnp.cumsum(sizes)

    def body(carry, item):
        w, size, stop = item
        return group(carry, w, stop - size, stop)

    return lax.scan(body, carry, (weights, sizes, ends))


def _blocks(rows, sizes, first, stop, block: Callable, carry):
    """Walk over one group: (carry, first row of the block, which rows are of the group) -> carry.

    The last block may begin early, or reach into the next groups: `mine` says so.
    """
    n_rows = rows.shape[0]
    block_sizes = _block_sizes(n_rows, sizes.size)
    full = (stop - first) // block_sizes[-1]
    rest = first + full * block_sizes[-1]
    turns = [(block_sizes[-1], first, full)]
    for below, n in itertools.pairwise([0, *block_sizes]):
        turns.append((n, rest, (stop - rest > below) & (stop - rest <= n)))
    for n, begin, count in turns:  # loops without a turn instead of branches, which would copy

        def body(i, carry, n=n, begin=begin):
            wanted = begin + i * n
            start = jnp.minimum(wanted, n_rows - n)
            row = start + jnp.arange(n)
            return block(carry, start, ((row >= wanted) & (row < stop))[:, None])

        carry = lax.fori_loop(0, jnp.int32(count), body, carry)
    return carry


def _block_sizes(n_rows: int, n_groups: int) -> list[int]:
    """Rows of blocks, in steps of 4/3 and 3/2, from those of a balanced group or fewer up."""
    balanced = 1 << (max(n_rows // n_groups, 8) - 1).bit_length()
    sizes = [min(balanced, SMALLEST, n_rows)]
    while 2 * sizes[-1] <= min(LARGEST, n_rows):
        sizes += [sizes[-1] * 3 // 2, sizes[-1] * 2]
    return sizes


def _write(out, y, start, mine):
    """Put the rows of `y` that belong to the block where they came from."""
    y = jnp.where(mine, y, lax.dynamic_slice_in_dim(out, start, mine.size))
    return lax.dynamic_update_slice_in_dim(out, y, start, 0)


_WALK = (_walked_product, _walked_gradients)
_BACKENDS = {
    "tpu": (_ragged_product, _ragged_gradients),
    "gpu": (grouped_product, _gpu_gradients),
    "cuda": (grouped_product, _gpu_gradients),
}
