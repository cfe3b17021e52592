"""Grouped matmul on TPUs: XLA's own kernel for ragged dots.

Checked on the CPU, where XLA expands it into dense ones, and compiled for v5p and tpu7x.
"""

import jax
from jax import lax

from dsv3_jax.shapes import Array, Float, Int


def gmm(
    rows: Float[Array, "r _"],
    weights: Float[Array, "e _ _"],
    sizes: Int[Array, " e"],
    transposed: bool = False,
) -> Float[Array, "r _"]:
    """Return rows of group i times `weights[i]`, or times its transpose."""
    dims = lax.RaggedDotDimensionNumbers(
        (((1,), (2 if transposed else 1,)), ((), ())),
        lhs_ragged_dimensions=(0,),
        rhs_group_dimensions=(0,),
    )
    return lax.ragged_dot_general(rows, weights, sizes, dims, preferred_element_type=rows.dtype)


def tgmm(
    rows: Float[Array, "r D"],
    grad: Float[Array, "r F"],
    sizes: Int[Array, " e"],
    dtype: jax.typing.DTypeLike,
) -> Float[Array, "e D F"]:
    """Return transposed rows of group i times its rows of `grad`.

    The kernel sums in float32, whatever it returns.
    """
    dims = lax.RaggedDotDimensionNumbers(
        (((0,), (0,)), ((), ())), lhs_ragged_dimensions=(0,), rhs_group_dimensions=()
    )
    return lax.ragged_dot_general(rows, grad, sizes, dims, preferred_element_type=dtype)
