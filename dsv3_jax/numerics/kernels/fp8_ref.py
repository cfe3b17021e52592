"""Matmuls of block-scaled E4M3 matrices: the reference.

Values times scales in float32, then a matmul in float32. The kernels multiply E4M3 values and
apply scales to partial sums, which differs in rounding alone.
"""

import jax
import jax.numpy as jnp

from dsv3_jax.numerics.kernels import gmm_ref
from dsv3_jax.numerics.quantize import BLOCK, TILE, TILE_T, QuantizedTensor, dequantize
from dsv3_jax.shapes import Array, Float, Float32, Int


def scaled_matmul(
    x: QuantizedTensor,
    w: QuantizedTensor,
    dtype: jax.typing.DTypeLike,
    transposed: bool = False,
) -> Float[Array, "r F"]:
    """Return x w, or x w^T: x [r D] in tiles of 1 x 128, w [D F] or [F D] in blocks of 128 x 128.

    Source: DeepSeek-V3 report (arXiv 2412.19437), sec. 3.3.2.
    """
    einsum = "rD,FD->rF" if transposed else "rD,DF->rF"
    return jnp.einsum(einsum, dequantize(x, TILE), dequantize(w, BLOCK)).astype(dtype)


def grouped_scaled_matmul(
    x: QuantizedTensor,
    w: QuantizedTensor,
    sizes: Int[Array, " e"],
    dtype: jax.typing.DTypeLike,
    transposed: bool = False,
) -> Float[Array, "r F"]:
    """Return rows of group i times `w[i]`, as `gmm` of the dequantized operands."""
    y = gmm_ref.gmm(dequantize(x, TILE), dequantize(w, BLOCK), sizes, transposed)
    return y.astype(dtype)


def fp8_wgrad(x: QuantizedTensor, grad: QuantizedTensor) -> Float32[Array, "D F"]:
    """Return x^T grad, of x [r D] and grad [r F] in tiles of 128 x 1."""
    return jnp.einsum("rD,rF->DF", dequantize(x, TILE_T), dequantize(grad, TILE_T))


def grouped_fp8_wgrad(
    x: QuantizedTensor, grad: QuantizedTensor, sizes: Int[Array, " e"]
) -> Float32[Array, "e D F"]:
    """Return x^T grad of the rows of each group, as `tgmm` of the dequantized operands."""
    return gmm_ref.tgmm(dequantize(x, TILE_T), dequantize(grad, TILE_T), sizes, jnp.float32)
