"""Multi-head latent attention, training form (report sec. 2.1.1).

Keys and values come from one low-rank latent c_kv; position enters through a separate rotary part,
one head of which all heads share:

    c_kv = norm(W_DKV h)    [k_nope; v] = W_UK/UV c_kv    k_rope = rope(W_KR h)
    c_q  = norm(W_DQ h)     [q_nope; q_rope] = W_UQ/QR c_q, rope on q_rope
    o = softmax((q_nope . k_nope + q_rope . k_rope) * scale) v        out = W_O o
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.layers import rope
from dsv3_jax.layers.linear import Linear
from dsv3_jax.layers.norm import RMSNorm
from dsv3_jax.shapes import Array, Float, Int

QUERY_CHUNK = 512  # query positions whose scores exist at a time


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
        self, h: Float[Array, "B T D"], positions: Int[Array, "B T"]
    ) -> Float[Array, "B T D"]:
        a = self.config
        cos, sin = rope.rotations(a, positions)
        latent = h
        if a.q_rank is not None:
            latent = self.q_norm(checkpoint_name(self.q_down(h), "q_latent"))
        q = rearrange(self.q_up(latent), "b t (h k) -> b h t k", h=a.n_heads)
        q_nope, q_rope = jnp.split(q, [a.nope_dim], axis=-1)

        c_kv, k_rope = jnp.split(checkpoint_name(self.kv_down(h), "kv_latent"), [a.kv_rank], -1)
        kv = rearrange(self.kv_up(self.kv_norm(c_kv)), "b t (h k) -> b h t k", h=a.n_heads)
        k_nope, v = jnp.split(kv, [a.nope_dim], axis=-1)
        k_rope = rope.rotate(k_rope[:, None], cos, sin)
        k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:-1], a.rope_dim))

        q = jnp.concatenate([q_nope, rope.rotate(q_rope, cos, sin)], axis=-1)
        k = jnp.concatenate([k_nope, k_rope], axis=-1)
        o = causal_attention(q, k, v, rope.softmax_scale(a))
        return self.out(rearrange(o, "b h t o -> b t (h o)"))


def causal_attention(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B H T K"],
    v: Float[Array, "B H T O"],
    scale: float,
) -> Float[Array, "B H T O"]:
    """softmax(q k^T * scale) v over the past, softmax in float32.

    Queries are taken `QUERY_CHUNK` at a time against the keys up to them, so that nearly half of
    the T x T products are left out.
    """
    length, step = q.shape[2], min(QUERY_CHUNK, q.shape[2])
    chunks = [
        _attend(q[:, :, i : i + step], k[:, :, : i + step], v[:, :, : i + step], i, scale)
        for i in range(0, length, step)
    ]
    return chunks[0] if len(chunks) == 1 else jnp.concatenate(chunks, axis=2)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _attend(q, k, v, first: int, scale: float):
    """Attention of queries at positions first, first + 1, ... to keys at positions 0, 1, ...

    The backward needs sum over keys of p dp, which equals sum over value dims of o do and is
    cheaper so. Source: FlashAttention (arXiv 2205.14135), appendix B.2.
    """
    return _attend_forward(q, k, v, first, scale)[0]


def _attend_forward(q, k, v, first, scale):
    scores = jnp.einsum("BHTK,BHSK->BHTS", q, k, preferred_element_type=jnp.float32) * scale
    past = first + jnp.arange(q.shape[2])[:, None] >= jnp.arange(k.shape[2])[None, :]
    scores = jnp.where(past[None, None], scores, -jnp.inf)
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
    return d_q, d_k, jnp.einsum("BHTS,BHTO->BHSO", p.astype(d_o.dtype), d_o)


_attend.defvjp(_attend_forward, _attend_backward)
