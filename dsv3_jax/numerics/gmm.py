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

from dsv3_jax.numerics.kernels import gmm_gpu
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
    return gmm(rows, weights, sizes, platform)


def _forward(rows, weights, sizes, platform):
    return gmm(rows, weights, sizes, platform), (rows, weights, sizes)


def _backward(platform, saved, grad):
    """Gradients of rows (dgrad) and, summed in float32, of weights (wgrad)."""
    rows, weights, sizes = saved
    d_rows = gmm(grad, weights, sizes, platform, transposed=True)
    return d_rows, tgmm(rows, grad, sizes, platform, weights.dtype), None


grouped_matmul.defvjp(_forward, _backward)


def gmm(
    rows: Float[Array, "r _"],
    weights: Float[Array, "e _ _"],
    sizes: Int[Array, " e"],
    platform: str,
    transposed: bool = False,
) -> Float[Array, "r _"]:
    """`grouped_matmul`, or with the transposes of the weights, without a gradient."""
    if platform == "tpu":
        dims = lax.RaggedDotDimensionNumbers(
            (((1,), (2 if transposed else 1,)), ((), ())),
            lhs_ragged_dimensions=(0,),
            rhs_group_dimensions=(0,),
        )
        return lax.ragged_dot_general(rows, weights, sizes, dims, preferred_element_type=rows.dtype)
    if platform in ("gpu", "cuda"):
        return gmm_gpu.gmm(rows, weights, sizes, transposed)
    return _walked_product(rows, weights, sizes, transposed)


def tgmm(
    rows: Float[Array, "r D"],
    grad: Float[Array, "r F"],
    sizes: Int[Array, " e"],
    platform: str,
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "e D F"]:
    """Transposed rows of group i times its rows of `grad`, summed in float32."""
    if platform == "tpu":
        dims = lax.RaggedDotDimensionNumbers(
            (((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=()
        )  # the kernel sums in float32, whatever it returns
        return lax.ragged_dot_general(rows, grad, sizes, dims, preferred_element_type=dtype)
    if platform in ("gpu", "cuda"):
        return gmm_gpu.tgmm(rows, grad, sizes, dtype)
    return _walked_outer(rows, grad, sizes).astype(dtype)


def _walked_product(rows, weights, sizes, transposed: bool):
    meet, columns = ("rF,DF->rD", 1) if transposed else ("rD,DF->rF", 2)

    def group(out, item):
        w, first, stop = item

        def block(out, start, mine):
            x = lax.dynamic_slice_in_dim(rows, start, mine.size)
            y = jnp.einsum(meet, x, w)
            y = jnp.where(mine, y, lax.dynamic_slice_in_dim(out, start, mine.size))
            return lax.dynamic_update_slice_in_dim(out, y, start, 0)

        return _blocks(rows, sizes, first, stop, block, out), None

    ends, out = jnp.cumsum(sizes), jnp.zeros((rows.shape[0], weights.shape[columns]), rows.dtype)
    return lax.scan(group, out, (weights, ends - sizes, ends))[0]


def _walked_outer(rows, grad, sizes):
    def group(_, item):
        def block(total, start, mine):
            parts = (lax.dynamic_slice_in_dim(part, start, mine.size) for part in (rows, grad))
            x, g = (jnp.where(mine, part, 0) for part in parts)
            return total + jnp.einsum("rD,rF->DF", x, g, preferred_element_type=jnp.float32)

        zero = jnp.zeros((rows.shape[1], grad.shape[1]), jnp.float32)
        return None, _blocks(rows, sizes, *item, block, zero)

    ends = jnp.cumsum(sizes)
    return lax.scan(group, None, (ends - sizes, ends))[1]


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
