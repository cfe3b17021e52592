"""Prefill and decode with the latent cache (report sec. 2.1.1): the model over a growing text.

The cache holds c_kv and k_rope of every token: 576 numbers per token per layer at 671B, which are
1,152 bytes in bfloat16, and 656 with c_kv in FP8 tiles of 128. The prefill runs the prompt with
expanded keys and values, as training does; every further token reads the cache in the absorbed
form. Rows of a batch are padded on the left, so that all of them grow at the same position.

Layers are not stacked here: an array per layer is read where it lies, and a cache that is donated
is written in place.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from dsv3_jax.model.block import Block
from dsv3_jax.model.deepseek import ModelBase, token_positions
from dsv3_jax.model.mla import Latents
from dsv3_jax.numerics.quantize import TILE, QuantizedTensor, dequantize, quantize
from dsv3_jax.shapes import Array, Float, Float32, Int
from sharding.layout import Layout


class DecodeModel(ModelBase):
    """The parameters of `DeepSeekV3` with a module per layer instead of stacks of layers.

    Parameter `moe.A` of the stacked model, at layer i, is `moe.i.A` here.
    """

    def _make_layers(self, layer: type[nnx.Module], n: int, rngs: nnx.Rngs) -> nnx.List:
        return nnx.List([layer(self.config, rngs=rngs) for _ in range(n)])

    @property
    def blocks(self) -> list[Block]:
        return [*self.dense, *self.moe]


class Fp8Latents(NamedTuple):
    """`Latents` with c_kv in FP8 tiles of 128; the rotary key, a ninth of the numbers, is not."""

    c_kv: QuantizedTensor  # values [B S C]
    k_rope: Float[Array, "B S R"]


class Cache(NamedTuple):
    """The latents of a batch of texts."""

    layers: tuple[Latents | Fp8Latents, ...]  # [B S ...] each, filled to `length`
    start: Int[Array, " B"]  # the position where the text of each row begins, after its padding
    length: Int[Array, ""]


def prefill(
    model: DecodeModel,
    tokens: Int[Array, "B T"],
    start: Int[Array, " B"],
    size: int,
    layout: Layout,
    fp8: bool = False,
) -> tuple[Float32[Array, "B V"], Cache]:
    """Return the logits after the last token of each row, and a cache with room for `size` tokens.

    Args:
        fp8: whether the cache holds c_kv in FP8; `decode_step` goes on with either.
    """
    positions = token_positions(tokens)
    doc_start = jnp.minimum(start[:, None], positions)  # padding sees itself: no empty softmax
    padding = ((0, 0), (0, size - tokens.shape[1]), (0, 0))
    layers = []
    x = model.embed(tokens, layout)
    for block in model.blocks:
        h = block.attention_norm(x)
        latents = block.attention.compress_kv(h, positions)
        layers.append(jax.tree.map(lambda x: jnp.pad(x, padding), _to_cache(latents, fp8)))
        (attended,) = block.attention(h, positions, latents, layout, doc_start)
        x, _ = block.ffn_sublayer(x + attended, layout)
    logits = model.logits(model.norm(x)[:, -1:], layout)[:, 0]
    return logits, Cache(tuple(layers), start, jnp.int32(tokens.shape[1]))


def decode_step(
    model: DecodeModel, tokens: Int[Array, "B T"], cache: Cache, layout: Layout
) -> tuple[Float32[Array, "B T V"], Cache]:
    """Return the logits after each of T further tokens, and the cache with their latents.

    The cache must have room for them: positions past its end would overwrite the last ones.
    """
    positions = cache.length + token_positions(tokens)
    cached = jnp.arange(cache.layers[0].k_rope.shape[1])[None, None, :]
    mask = (cached <= positions[:, :, None]) & (cached >= cache.start[:, None, None])
    layers = []
    x = model.embed(tokens, layout)
    for block, latents in zip(model.blocks, cache.layers, strict=True):
        h = block.attention_norm(x)
        new = _to_cache(block.attention.compress_kv(h, positions), isinstance(latents, Fp8Latents))
        latents = jax.tree.map(
            lambda old, new: lax.dynamic_update_slice_in_dim(old, new, cache.length, 1),
            latents,
            new,
        )
        latents = lax.optimization_barrier(latents)  # one update in place, read by all below
        layers.append(latents)
        q = block.attention.project_q(h, positions)
        attended = block.attention.absorbed(q, _from_cache(latents, h.dtype), mask)
        x, _ = block.ffn_sublayer(x + attended, layout)
    logits = model.logits(model.norm(x), layout)
    return logits, Cache(tuple(layers), cache.start, cache.length + tokens.shape[1])


def hidden_states(
    model: DecodeModel, tokens: Int[Array, "B T"], layout: Layout
) -> Float[Array, "B T D"]:
    """Return the hidden states after the final norm over whole texts, padded on the right."""
    positions = token_positions(tokens)
    x = model.embed(tokens, layout)
    for block in model.blocks:
        x, _ = block(x, positions, layout)
    return model.norm(x)


def mtp_logits(
    model: DecodeModel, tokens: Int[Array, "B T"], layout: Layout
) -> Float32[Array, "B S V"]:
    """Return the logits of the token after the next, at the first S = T - 1 positions."""
    hidden = hidden_states(model, tokens, layout)[:, :-1]
    shifted = tokens[:, 1:]
    embedded = model.embed(shifted, layout)
    hidden, _ = model.mtp[0](hidden, embedded, token_positions(shifted), layout)
    return model.logits(hidden, layout)


def _to_cache(latents: Latents, fp8: bool) -> Latents | Fp8Latents:
    return Fp8Latents(quantize(latents.c_kv, TILE), latents.k_rope) if fp8 else latents


def _from_cache(latents: Latents | Fp8Latents, dtype: jnp.dtype) -> Latents:
    if isinstance(latents, Latents):
        return latents
    return Latents(dequantize(latents.c_kv, TILE, dtype), latents.k_rope)
