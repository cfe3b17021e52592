"""Grouped matmul with its gradient: rows sorted by expert, each group times its expert's matrix."""

import functools

import jax

from dsv3_jax.numerics.kernels import pick
from dsv3_jax.shapes import Array, Float, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def grouped_matmul(
    rows: Float[Array, "r D"],
    weights: Float[Array, "e D F"],
    sizes: Int[Array, " e"],
    platform: str = "cpu",
) -> Float[Array, "r F"]:
    """Return rows of group i times `weights[i]`; beyond the last group the result is unspecified.

    Args:
        rows: sorted by group.
        weights: one matrix per group.
        sizes: rows of each group; their sum is at most r.
        platform: of the devices, which picks the kernels.
    """
    return pick(platform).gmm(rows, weights, sizes)


def _forward(rows, weights, sizes, platform):
    return pick(platform).gmm(rows, weights, sizes), (rows, weights, sizes)


def _backward(platform, residuals, grad):
    """Return the gradients of rows (dgrad) and, summed in float32, of weights (wgrad)."""
    rows, weights, sizes = residuals
    kernels = pick(platform)
    d_rows = kernels.gmm(grad, weights, sizes, transposed=True)
    return d_rows, kernels.tgmm(rows, grad, sizes, weights.dtype), None


grouped_matmul.defvjp(_forward, _backward)
