"""Products of activations with weights, whatever format the weights are in.

A weight is an array, or an `Fp8Weight` where the policy says so, and in a pipeline stage either of
them is `Deferred`: which it is is decided where weights are made ready for use, and no layer asks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.numerics.fp8 import Fp8Weight, SavedInput, fp8_matmul, fp8_swiglu_matmul
from dsv3_jax.numerics.gmm import grouped_matmul
from dsv3_jax.numerics.split_backward import Deferred, deferred_gated_product, deferred_product
from dsv3_jax.numerics.swiglu import swiglu
from dsv3_jax.shapes import Array, Float, Int

Weight = Array | Fp8Weight | Deferred
NOT_SAVED = SavedInput()


class Groups(NamedTuple):
    """Rows that are sorted by expert."""

    sizes: Int[Array, " e"]  # rows of each expert
    platform: str = "cpu"  # of the devices


def matmul(
    x: Float[Array, "*B D"], w: Weight, save: SavedInput = NOT_SAVED, groups: Groups | None = None
) -> Float[Array, "*B F"]:
    """x W in the format of x; with groups, x is [r D] and rows of group i meet `W[i]`.

    Args:
        w: [D F], or [e D F] with groups: then what lies beyond the last one is unspecified.
        save: what the backward finds of x.
    """
    rows, sizes = x.reshape(-1, x.shape[-1]), None if groups is None else groups.sizes
    if isinstance(w, Fp8Weight):
        return fp8_matmul(save, rows, w, sizes).reshape(*x.shape[:-1], -1)
    if isinstance(w, Deferred):
        platform = "cpu" if groups is None else groups.platform
        return deferred_product(save, rows, w, sizes, platform).reshape(*x.shape[:-1], -1)
    x = x if save.name is None else checkpoint_name(x, save.name)
    if groups is None:
        return jnp.einsum("...D,DF->...F", x, w.astype(x.dtype))
    return grouped_matmul(x, w.astype(x.dtype), *groups)


def swiglu_matmul(
    hidden: Float[Array, "*B F2"],
    w: Weight,
    save: SavedInput,
    gates: Float[Array, " r"] | None = None,
    groups: Groups | None = None,
) -> Float[Array, "*B D"]:
    """(gates * SwiGLU(hidden)) W; otherwise as `matmul`, but `hidden` is what is kept.

    The gate multiplies the hidden layer, which is narrower than the result and, unlike it, at hand
    in the backward.
    """
    rows, sizes = hidden.reshape(-1, hidden.shape[-1]), None if groups is None else groups.sizes
    if isinstance(w, Fp8Weight):
        return fp8_swiglu_matmul(save, rows, gates, w, sizes).reshape(*hidden.shape[:-1], -1)
    if isinstance(w, Deferred) and isinstance(w.weight, Fp8Weight):
        return deferred_gated_product(save, rows, gates, w, sizes).reshape(*hidden.shape[:-1], -1)
    hidden = hidden if save.name is None else checkpoint_name(hidden, save.name)
    return matmul(swiglu(hidden, gates), w, NOT_SAVED, groups)


def undeferred(w: Weight) -> Array | Fp8Weight:
    """The same weight with a gradient that is not deferred."""
    return w.weight if isinstance(w, Deferred) else w


def dequantized(w: Weight, dtype: jax.typing.DTypeLike) -> Array:
    """The weight itself, for what is no product of FP8."""
    return w.dequantize(dtype) if isinstance(w, Fp8Weight) else w.astype(dtype)
