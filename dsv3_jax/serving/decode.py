"""Prefill and decode with the latent cache (report sec. 2.1.1): the model over a growing text.

The cache holds c_kv and k_rope of every token and layer: 576 numbers a token a layer at 671B, which
are 1,152 bytes in bfloat16, and 656 with c_kv in FP8 tiles of 128. The
prefill runs the prompt with expanded keys and values; every further token reads the cache in the
absorbed form. Rows of a batch are padded on the left, so that all of them grow at the same place.

Layers stand side by side here instead of stacked: one array a layer is read where it lies, and a
cache that is handed on is written in place.
"""

import gc
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dsv3_jax.model.block import Block
from dsv3_jax.model.deepseek import DeepSeekV3, positions_of
from dsv3_jax.model.mla import Latents
from dsv3_jax.numerics.quantize import TILE, QuantizedTensor, dequantize, quantize
from dsv3_jax.shapes import Array, Float, Float32, Int
from sharding.layout import Layout


class Fp8Latents(NamedTuple):
    """`Latents` with c_kv in tiles of 128; the rotary key, a ninth of the numbers, stays wide."""

    c_kv: QuantizedTensor  # values [B S C]
    k_rope: Float[Array, "B S R"]


class Cache(NamedTuple):
    """What is remembered of a batch of texts."""

    layers: tuple[Latents | Fp8Latents, ...]  # [B S ...] each, filled to `length`
    start: Int[Array, " B"]  # where each row's text begins, after its padding
    length: Int[Array, ""]


class Served(nnx.Module):
    """The main model without MTP: its layers one by one, and what stands around them."""

    def __init__(self, model: DeepSeekV3):
        """Take the model apart; its stacked layers are freed one parameter at a time."""
        gc.collect()  # nnx.map_state leaves cycles behind that hold the arrays of a new model
        self.layers = nnx.List(_unstacked(model.dense) + _unstacked(model.moe))
        model.dense = model.moe = model.mtp = None
        self.around = model


def _unstacked(stack: nnx.Module | None) -> list[Block]:
    if stack is None:
        return []
    graphdef = nnx.graphdef(stack)
    leaves, treedef = jax.tree.flatten(nnx.pop(stack, nnx.Variable))  # now nothing else holds them
    n = leaves[0].shape[0]
    parts = []
    while leaves:
        whole = leaves.pop(0)
        parts.append(tuple(whole[i] for i in range(n)))
    return [nnx.merge(graphdef, treedef.unflatten(layer)) for layer in zip(*parts, strict=True)]


def prefill(
    served: Served,
    tokens: Int[Array, "B T"],
    start: Int[Array, " B"],
    size: int,
    layout: Layout,
    fp8: bool = False,
) -> tuple[Float32[Array, "B V"], Cache]:
    """Logits after the last token of each row, and a cache with room for `size` tokens.

    Args:
        fp8: whether the cache holds c_kv in FP8; `extend` goes on as it finds it.
    """
    positions = positions_of(tokens)
    seen_from = jnp.minimum(start[:, None], positions)  # padding sees itself: no empty softmax
    room = ((0, 0), (0, size - tokens.shape[1]), (0, 0))
    layers: list[Latents | Fp8Latents] = []

    def attend(block, h):
        latents = block.attention.latents(h, positions)
        layers.append(jax.tree.map(lambda x: jnp.pad(x, room), _stored(latents, fp8)))
        pairs = block.attention.keys_values(latents)
        how = (seen_from, layout)
        return block.attention.expanded(block.attention.queries(h, positions), *pairs, *how)

    hidden = _through(served, tokens, layout, attend)
    logits = served.around.logits(hidden[:, -1:], layout)[:, 0]
    return logits, Cache(tuple(layers), start, jnp.int32(tokens.shape[1]))


def extend(
    served: Served, tokens: Int[Array, "B T"], cache: Cache, layout: Layout
) -> tuple[Float32[Array, "B T V"], Cache]:
    """Logits after each of some further tokens, and the cache with them.

    There must be room for them: places past the end would overwrite the last ones.
    """
    positions = cache.length + positions_of(tokens)
    place = jnp.arange(cache.layers[0].k_rope.shape[1])[None, None, :]
    seen = (place <= positions[:, :, None]) & (place >= cache.start[:, None, None])
    before, layers = iter(cache.layers), []

    def attend(block, h):
        old = next(before)
        new = _stored(block.attention.latents(h, positions), isinstance(old, Fp8Latents))
        grown = jax.tree.map(
            lambda old, x: lax.dynamic_update_slice_in_dim(old, x, cache.length, 1), old, new
        )
        grown = lax.optimization_barrier(grown)  # one update, read by all below, in place
        layers.append(grown)
        past = _read(grown, h.dtype)
        return block.attention.absorbed(block.attention.queries(h, positions), past, seen)

    hidden = _through(served, tokens, layout, attend)
    logits = served.around.logits(hidden, layout)
    return logits, Cache(tuple(layers), cache.start, cache.length + tokens.shape[1])


def read(served: Served, tokens: Int[Array, "B T"], layout: Layout) -> Float[Array, "B T D"]:
    """Hidden states after the final norm over whole texts, padded on the right; no cache."""
    positions = positions_of(tokens)

    def attend(block, h):
        return block.attention(h, positions, layout)

    return _through(served, tokens, layout, attend)


def _stored(latents: Latents, fp8: bool) -> Latents | Fp8Latents:
    return Fp8Latents(quantize(latents.c_kv, TILE), latents.k_rope) if fp8 else latents


def _read(latents: Latents | Fp8Latents, dtype: jnp.dtype) -> Latents:
    if isinstance(latents, Latents):
        return latents
    return Latents(dequantize(latents.c_kv, TILE, dtype), latents.k_rope)


def _through(
    served: Served, tokens: Int[Array, "B T"], layout: Layout, attend: Callable
) -> Float[Array, "B T D"]:
    """Hidden states after the final norm; `attend` is (block, normalised x) -> attention."""
    x = served.around.embed(tokens, layout)
    for block in served.layers:
        x, _ = block.feed(x + attend(block, block.attention_norm(x)), layout)
    return served.around.norm(x)
