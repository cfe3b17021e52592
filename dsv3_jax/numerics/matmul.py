"""Matmuls of activations with weights, whatever format the weights are in.

A weight is an array, or an `Fp8Weight` where the policy says so, and in a pipeline stage either of
them is `DeferredWgrad`: which of these is decided where weights are prepared, and no layer asks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.numerics.fp8 import Fp8Weight, SavedInput, SwiGLUInput, fp8_matmul
from dsv3_jax.numerics.gmm import grouped_matmul
from dsv3_jax.numerics.kernels.swiglu_ref import swiglu
from dsv3_jax.numerics.split_backward import DeferredWgrad, split_matmul
from dsv3_jax.shapes import Array, Float, Int

Weight = Array | Fp8Weight | DeferredWgrad
NOT_SAVED = SavedInput()  # a remat policy does not save the input


class Groups(NamedTuple):
    """The groups of rows that are sorted by expert."""

    sizes: Int[Array, " e"]  # rows of each expert
    platform: str = "cpu"  # of the devices


def matmul(
    x: Float[Array, "*B D"],
    w: Weight,
    save: SavedInput = NOT_SAVED,
    groups: Groups | None = None,
) -> Float[Array, "*B F"]:
    """Return x W in the dtype of x; with groups, x is [r D] and rows of group i meet `W[i]`.

    Args:
        w: [D F]; with groups [e D F], and rows beyond the last group are unspecified.
        save: how x is saved for the backward.
    """
    if isinstance(w, Fp8Weight | DeferredWgrad):
        y = _custom_matmul(save, x.reshape(-1, x.shape[-1]), w, groups)
        return y.reshape(*x.shape[:-1], -1)
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
    """Return (gates * SwiGLU(hidden)) W; as `matmul`, but `hidden` is saved, not SwiGLU's output.

    The gates multiply the output of SwiGLU, which is narrower than the result and, unlike it, at
    hand in the backward.
    """
    if isinstance(undeferred(w), Fp8Weight):
        inputs = SwiGLUInput(hidden.reshape(-1, hidden.shape[-1]), gates)
        return _custom_matmul(save, inputs, w, groups).reshape(*hidden.shape[:-1], -1)
    hidden = hidden if save.name is None else checkpoint_name(hidden, save.name)
    return matmul(swiglu(hidden, gates), w, NOT_SAVED, groups)


def _custom_matmul(save: SavedInput, inputs, w: Fp8Weight | DeferredWgrad, groups: Groups | None):
    """Return a matmul [r F] whose backward is our own: in FP8, or split in two."""
    sizes, platform = (None, "cpu") if groups is None else groups
    if isinstance(w, DeferredWgrad):
        return split_matmul(save, inputs, w, sizes, platform)
    return fp8_matmul(save, inputs, w, sizes)


def undeferred(w: Weight) -> Array | Fp8Weight:
    """Return the same weight with a gradient that is not deferred."""
    return w.weight if isinstance(w, DeferredWgrad) else w


def dequantized(w: Weight, dtype: jax.typing.DTypeLike) -> Array:
    """Return the weight as an array of numbers, for what is no FP8 matmul."""
    return w.dequantize(dtype) if isinstance(w, Fp8Weight) else w.astype(dtype)
