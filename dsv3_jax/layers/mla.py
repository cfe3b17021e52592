"""Multi-head latent attention (report sec. 2.1.1).

Keys and values come from one low-rank latent c_kv; position enters through a separate rotary part,
one head of which all heads share:

    c_kv = norm(W_DKV h)    [k_nope; v] = W_UK/UV c_kv    k_rope = rope(W_KR h)
    c_q  = norm(W_DQ h)     [q_nope; q_rope] = W_UQ/QR c_q, rope on q_rope
    o = softmax((q_nope . k_nope + q_rope . k_rope) * scale) v        out = W_O o

Only c_kv and k_rope need to be remembered. Training expands them to keys and values of every head;
decoding moves W_UK to the query and W_UV behind the weighted sum instead (the absorbed form), so
that the cache is read as it lies: q_nope . (W_UK c_kv) = (W_UK^T q_nope) . c_kv.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.layers import rope
from dsv3_jax.layers.linear import Linear
from dsv3_jax.layers.norm import RMSNorm
from dsv3_jax.shapes import Array, Bool, Float, Int

QUERY_CHUNK = 512  # query positions whose scores exist at a time


class Queries(NamedTuple):
    """Both parts of every head's query; the rotary one is rotated."""

    nope: Float[Array, "B H T N"]
    rope: Float[Array, "B H T R"]


class Latents(NamedTuple):
    """All that attention remembers of a token: normalised latent and rotated shared key."""

    c_kv: Float[Array, "B S C"]
    k_rope: Float[Array, "B S R"]


class MLA(nnx.Module):
    """Multi-head latent attention; with q_rank None, queries come straight from h."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        a = self.config = config.attention
        std, width = config.init_std, config.width
        key_dim, kv_dim = a.nope_dim + a.rope_dim, a.nope_dim + a.value_dim
        if a.q_rank is None:
            self.q_up = Linear(width, a.n_heads * key_dim, ("embed", "heads"), std, rngs=rngs)
        else:
            self.q_down = Linear(width, a.q_rank, ("embed", "latent"), std, rngs=rngs)
            self.q_norm = RMSNorm(a.q_rank, config.norm_eps)
            self.q_up = Linear(a.q_rank, a.n_heads * key_dim, ("latent", "heads"), std, rngs=rngs)
        self.kv_down = Linear(width, a.kv_rank + a.rope_dim, ("embed", "latent"), std, rngs=rngs)
        self.kv_norm = RMSNorm(a.kv_rank, config.norm_eps)
        self.kv_up = Linear(a.kv_rank, a.n_heads * kv_dim, ("latent", "heads"), std, rngs=rngs)
        self.out = Linear(a.n_heads * a.value_dim, width, ("heads", "embed"), std, rngs=rngs)

    def __call__(
        self,
        h: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        start: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attention of every token to the past; `start` as in `causal_attention`."""
        return self.expanded(self.queries(h, positions), self.latents(h, positions), start)

    def queries(self, h: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Queries:
        a = self.config
        latent = h
        if a.q_rank is not None:
            latent = self.q_norm(checkpoint_name(self.q_down(h), "q_latent"))
        q = rearrange(self.q_up(latent), "b t (h k) -> b h t k", h=a.n_heads)
        q_nope, q_rope = jnp.split(q, [a.nope_dim], axis=-1)
        return Queries(q_nope, rope.rotate(q_rope, *rope.rotations(a, positions)))

    def latents(self, h: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Latents:
        a = self.config
        c_kv, k_rope = jnp.split(checkpoint_name(self.kv_down(h), "kv_latent"), [a.kv_rank], -1)
        k_rope = rope.rotate(k_rope[:, None], *rope.rotations(a, positions))
        return Latents(self.kv_norm(c_kv), k_rope[:, 0])

    def expanded(
        self, q: Queries, latents: Latents, start: Int[Array, "B T"] | None
    ) -> Float[Array, "B T D"]:
        """Attention with keys and values of every head, for S = T tokens at once."""
        a = self.config
        kv = rearrange(self.kv_up(latents.c_kv), "b t (h k) -> b h t k", h=a.n_heads)
        k_nope, v = jnp.split(kv, [a.nope_dim], axis=-1)
        k_rope = jnp.broadcast_to(latents.k_rope[:, None], (*k_nope.shape[:-1], a.rope_dim))
        keys = jnp.concatenate([k_nope, k_rope], axis=-1)
        o = causal_attention(jnp.concatenate(q, axis=-1), keys, v, rope.softmax_scale(a), start)
        return self.out(rearrange(o, "b h t o -> b t (h o)"))

    def absorbed(
        self, q: Queries, latents: Latents, seen: Bool[Array, "B T S"]
    ) -> Float[Array, "B T D"]:
        """Attention against the latents themselves, for few new tokens and a long past.

        Args:
            seen: which remembered tokens each query sees.
        """
        a, wide = self.config, {"preferred_element_type": jnp.float32}
        up = rearrange(self.kv_up.kernel[...], "c (h k) -> c h k", h=a.n_heads).astype(q.nope.dtype)
        w_uk, w_uv = jnp.split(up, [a.nope_dim], axis=-1)
        q_latent = jnp.einsum("BHTN,CHN->BHTC", q.nope, w_uk)
        scores = jnp.einsum("BSC,BHTC->BSHT", latents.c_kv, q_latent, **wide)
        scores = scores + jnp.einsum("BSR,BHTR->BSHT", latents.k_rope, q.rope, **wide)
        scores = rearrange(scores, "b s h t -> b h t s") * rope.softmax_scale(a)
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(latents.c_kv.dtype)
        o_latent = jnp.einsum("BHTS,BSC->BHTC", weights, latents.c_kv)
        o = jnp.einsum("BHTC,CHO->BTHO", o_latent, w_uv)
        return self.out(rearrange(o, "b t h o -> b t (h o)"))


def causal_attention(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B H T K"],
    v: Float[Array, "B H T O"],
    scale: float,
    start: Int[Array, "B T"] | None = None,
) -> Float[Array, "B H T O"]:
    """softmax(q k^T * scale) v over the past, softmax in float32.

    Queries are taken `QUERY_CHUNK` at a time against the keys up to them, so that nearly half of
    the T x T products are left out.

    Args:
        start: the first place that each query sees, at most its own; None if that is 0. It leaves
            out padding on the left, and other documents of the same row.
    """
    length, step = q.shape[2], min(QUERY_CHUNK, q.shape[2])

    def chunk(i: int):
        rows, past = slice(i, i + step), slice(i + step)
        first = None if start is None else start[:, rows]
        return _attend(q[:, :, rows], k[:, :, past], v[:, :, past], first, i, scale)

    chunks = [chunk(i) for i in range(0, length, step)]
    return chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _attend(q, k, v, start, first: int, scale: float):
    """Attention of queries at places first, first + 1, ... to keys at places 0, 1, ...

    The backward needs sum over keys of p dp, which equals sum over value dims of o do and is
    cheaper so. Source: FlashAttention (arXiv 2205.14135), appendix B.2.
    """
    return _attend_forward(q, k, v, start, first, scale)[0]


def _attend_forward(q, k, v, start, first, scale):
    scores = jnp.einsum("BHTK,BHSK->BHTS", q, k, preferred_element_type=jnp.float32) * scale
    place = jnp.arange(k.shape[2])
    seen = (first + jnp.arange(q.shape[2])[:, None] >= place[None, :])[None, None]
    if start is not None:
        seen = seen & (place[None, None, None, :] >= start[:, None, :, None])
    scores = jnp.where(seen, scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    wide = jnp.einsum(
        "BHTS,BHSO->BHTO", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    o = checkpoint_name((wide / total).astype(v.dtype), "attention")
    return o, (q, k, v, weights / total, o)


def _attend_backward(first, scale, saved, d_o):
    q, k, v, p, o = saved
    wide = {"preferred_element_type": jnp.float32}
    overlap = (d_o.astype(jnp.float32) * o).sum(-1, keepdims=True)
    d_p = jnp.einsum("BHTO,BHSO->BHTS", d_o, v, **wide)
    d_scores = (p * (d_p - overlap) * scale).astype(q.dtype)
    d_q = jnp.einsum("BHTS,BHSK->BHTK", d_scores, k)
    d_k = jnp.einsum("BHTS,BHTK->BHSK", d_scores, q)
    return d_q, d_k, jnp.einsum("BHTS,BHTO->BHSO", p.astype(d_o.dtype), d_o), None


_attend.defvjp(_attend_forward, _attend_backward)
