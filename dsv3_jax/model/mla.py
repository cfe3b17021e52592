"""Multi-head latent attention (report sec. 2.1.1).

Keys and values come from one low-rank latent c_kv; position enters through a separate rotary part,
one head of which all heads share:

    c_kv = norm(W_DKV h)    [k_nope; v] = W_UK/UV c_kv    k_rope = rope(W_KR h)
    c_q  = norm(W_DQ h)     [q_nope; q_rope] = W_UQ/QR c_q, rope on q_rope
    o = softmax((q_nope . k_nope + q_rope . k_rope) * scale) v        out = W_O o

Only c_kv and k_rope need to be remembered. Training expands them to keys and values of every head;
decoding moves W_UK to the query and W_UV behind the weighted sum instead (the absorbed form), so
that the cache is read as it lies: q_nope . (W_UK c_kv) = (W_UK^T q_nope) . c_kv.

Where a sequence lies over several ranks, h is a slice of it, and attention has whole sequences of a
share of the heads (`sharding/context_parallel.py`): t tokens of H heads become T tokens of h heads.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model import rope
from dsv3_jax.model.layers import Linear, RMSNorm
from dsv3_jax.numerics.attention import causal_attention
from dsv3_jax.numerics.fp8 import SavedInput
from dsv3_jax.numerics.matmul import dequantized
from dsv3_jax.shapes import Array, Bool, Float, Int
from sharding.context_parallel import gather_sequence, heads_to_seq, seq_to_heads
from sharding.layout import ONE_DEVICE, Layout

# In FP8, the input of the Linear behind attention (report sec. 3.3.3).
ATTENDED = SavedInput(power_of_two=True, e5m6=True)


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
        layout: Layout = ONE_DEVICE,
        doc_start: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attention of every token to the past; `doc_start` as in `causal_attention`."""
        q = self.queries(h, positions)
        q = Queries(seq_to_heads(q.nope, layout), seq_to_heads(q.rope, layout))
        pairs = self.keys_values(self.latents(h, positions), layout)
        doc_start = None if doc_start is None else gather_sequence(doc_start, layout)
        return self.expanded(q, *pairs, doc_start, layout)

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

    def keys_values(
        self, latents: Latents, layout: Layout = ONE_DEVICE
    ) -> tuple[Float[Array, "B h T K"], Float[Array, "B h T O"]]:
        """Keys and values of every head."""
        a = self.config
        kv = rearrange(self.kv_up(latents.c_kv), "b s (h k) -> b h s k", h=a.n_heads)
        k_nope, v = jnp.split(seq_to_heads(kv, layout), [a.nope_dim], axis=-1)
        k_rope = gather_sequence(latents.k_rope, layout)[:, None]
        k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:-1], a.rope_dim))
        return jnp.concatenate([k_nope, k_rope], axis=-1), v

    def expanded(
        self,
        q: Queries,
        keys: Float[Array, "B H S K"],
        values: Float[Array, "B H S O"],
        doc_start: Int[Array, "B S"] | None,
        layout: Layout,
    ) -> Float[Array, "B t D"]:
        """Attention of the last T of S tokens, with keys and values of every head.

        Args:
            doc_start: as in `causal_attention`.
        """
        how = (rope.softmax_scale(self.config), doc_start, layout.mesh.platform)
        o = causal_attention(jnp.concatenate(q, axis=-1), keys, values, *how)
        o = heads_to_seq(o, layout)
        return self.out(rearrange(o, "b h t o -> b t (h o)"), ATTENDED)

    def absorbed(
        self, q: Queries, latents: Latents, seen: Bool[Array, "B T S"]
    ) -> Float[Array, "B T D"]:
        """Attention against the latents themselves, for few new tokens and a long past.

        Args:
            seen: which remembered tokens each query sees.
        """
        a, wide = self.config, {"preferred_element_type": jnp.float32}
        up = dequantized(self.kv_up.kernel.get_value(), q.nope.dtype)
        up = rearrange(up, "c (h k) -> c h k", h=a.n_heads)
        w_uk, w_uv = jnp.split(up, [a.nope_dim], axis=-1)
        q_latent = jnp.einsum("BHTN,CHN->BHTC", q.nope, w_uk)
        scores = jnp.einsum("BSC,BHTC->BSHT", latents.c_kv, q_latent, **wide)
        scores = scores + jnp.einsum("BSR,BHTR->BSHT", latents.k_rope, q.rope, **wide)
        scores = rearrange(scores, "b s h t -> b h t s") * rope.softmax_scale(a)
        scores = jnp.where(seen[:, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(latents.c_kv.dtype)
        o_latent = jnp.einsum("BHTS,BSC->BHTC", weights, latents.c_kv)
        o = jnp.einsum("BHTC,CHO->BTHO", o_latent, w_uv)
        return self.out(rearrange(o, "b t h o -> b t (h o)"), ATTENDED)
