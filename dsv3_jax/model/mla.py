"""Multi-head latent attention (report sec. 2.1.1, equations 1 to 11).

Keys and values come from one low-rank latent c_kv; position enters through a separate rotary part,
one head of which all heads share:

    c_kv = norm(W_DKV h)  (1)   [k_nope; v] = W_UK/UV c_kv  (2, 5)   k_rope = rope(W_KR h)  (3)
    c_q  = norm(W_DQ h)   (6)   [q_nope; q_rope] = W_UQ/QR c_q, rope on q_rope           (7, 8)
    k = [k_nope; k_rope]  (4)   q = [q_nope; q_rope]                                        (9)
    o = softmax(q . k * scale) v  (10)                                    out = W_O o      (11)

Only c_kv and k_rope need to be cached. Training, prefill and scoring expand them to the keys and
values of every head (`MLA.__call__`). Decoding moves W_UK to the query and W_UV behind the weighted
sum instead (`MLA.absorbed`), so that the cache is read as it is stored:
q_nope . (W_UK c_kv) = (W_UK^T q_nope) . c_kv.

Where a sequence is split over several ranks, h is a slice of it, and attention has whole sequences
of a share of the heads (`sharding/context_parallel.py`): t tokens of H heads become T tokens of h
heads.
"""

from collections.abc import Iterator
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
ATTENTION_OUTPUT = SavedInput(power_of_two=True, e5m6=True)


class Queries(NamedTuple):
    """Both parts of the query of every head; the rotary part is rotated."""

    nope: Float[Array, "B H T N"]
    rope: Float[Array, "B H T R"]


class Latents(NamedTuple):
    """All that attention needs of a past token: normalised latent and rotated shared key."""

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
        latents: Latents,
        layout: Layout = ONE_DEVICE,
        doc_start: Int[Array, "B T"] | None = None,
        n_chunks: int = 1,
    ) -> Iterator[Float[Array, "B S D"]]:
        """Yield the attention of every token to its past, chunk by chunk of the sequence.

        A chunk has its own queries, against the keys up to its end. All chunks share keys and
        values, so no chunk waits for the attention of another. The chunks of a slice are not chunks
        of its sequence: where sequences are split over ranks, all chunks are computed at once.

        Args:
            latents: of the same tokens, from `compress_kv`; a cache may keep them.
            doc_start: as in `causal_attention`.
            n_chunks: a divisor of T.
        """
        keys, values = self.up_project_kv(latents, layout)
        if layout.context > 1:
            if doc_start is not None:
                doc_start = gather_sequence(doc_start, layout)
            whole = self.attend(self.project_q(h, positions), keys, values, layout, doc_start)
            yield from jnp.split(whole, n_chunks, axis=1)
            return
        length = h.shape[1] // n_chunks
        for begin in range(0, h.shape[1], length):
            chunk, past = slice(begin, begin + length), slice(begin + length)
            yield self.attend(
                self.project_q(h[:, chunk], positions[:, chunk]),
                keys[:, :, past],
                values[:, :, past],
                layout,
                None if doc_start is None else doc_start[:, past],
            )

    def compress_kv(self, h: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Latents:
        """Return the latent and the shared rotary key of each token (equations 1 and 3)."""
        a = self.config
        c_kv, k_rope = jnp.split(checkpoint_name(self.kv_down(h), "kv_latent"), [a.kv_rank], -1)
        k_rope = rope.rotate(k_rope[:, None], *rope.rotations(a, positions))
        return Latents(self.kv_norm(c_kv), k_rope[:, 0])

    def up_project_kv(
        self, latents: Latents, layout: Layout = ONE_DEVICE
    ) -> tuple[Float[Array, "B h T K"], Float[Array, "B h T O"]]:
        """Return the keys and values of every head (equations 2, 4 and 5)."""
        a = self.config
        kv = rearrange(self.kv_up(latents.c_kv), "b s (h k) -> b h s k", h=a.n_heads)
        k_nope, v = jnp.split(seq_to_heads(kv, layout), [a.nope_dim], axis=-1)
        k_rope = gather_sequence(latents.k_rope, layout)[:, None]
        k_rope = jnp.broadcast_to(k_rope, (*k_nope.shape[:-1], a.rope_dim))
        return jnp.concatenate([k_nope, k_rope], axis=-1), v

    def project_q(self, h: Float[Array, "B T D"], positions: Int[Array, "B T"]) -> Queries:
        """Return the queries of every head (equations 6 to 8)."""
        a = self.config
        latent = h
        if a.q_rank is not None:
            latent = self.q_norm(checkpoint_name(self.q_down(h), "q_latent"))
        q = rearrange(self.q_up(latent), "b t (h k) -> b h t k", h=a.n_heads)
        q_nope, q_rope = jnp.split(q, [a.nope_dim], axis=-1)
        return Queries(q_nope, rope.rotate(q_rope, *rope.rotations(a, positions)))

    def attend(
        self,
        q: Queries,
        keys: Float[Array, "B h S K"],
        values: Float[Array, "B h S O"],
        layout: Layout,
        doc_start: Int[Array, "B S"] | None,
    ) -> Float[Array, "B t D"]:
        """Return the attention of the last tokens of S to all S of them (equations 9 to 11)."""
        q = Queries(seq_to_heads(q.nope, layout), seq_to_heads(q.rope, layout))
        o = causal_attention(
            jnp.concatenate(q, axis=-1),
            keys,
            values,
            rope.softmax_scale(self.config),
            doc_start,
            layout.mesh.platform,
        )
        o = heads_to_seq(o, layout)
        return self.out(rearrange(o, "b h t o -> b t (h o)"), ATTENTION_OUTPUT)

    def absorbed(
        self, q: Queries, latents: Latents, mask: Bool[Array, "B T S"]
    ) -> Float[Array, "B T D"]:
        """Return attention against the latents themselves, for few new tokens and a long past.

        Args:
            mask: the cached tokens that each query attends to.
        """
        a = self.config
        up = dequantized(self.kv_up.kernel.get_value(), q.nope.dtype)
        w_uk, w_uv = jnp.split(rearrange(up, "c (h k) -> c h k", h=a.n_heads), [a.nope_dim], -1)
        q_latent = jnp.einsum("BHTN,CHN->BHTC", q.nope, w_uk)
        scores = _float32_einsum("BSC,BHTC->BSHT", latents.c_kv, q_latent)
        scores = scores + _float32_einsum("BSR,BHTR->BSHT", latents.k_rope, q.rope)
        scores = rearrange(scores, "b s h t -> b h t s") * rope.softmax_scale(a)
        scores = jnp.where(mask[:, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1).astype(latents.c_kv.dtype)
        o_latent = jnp.einsum("BHTS,BSC->BHTC", weights, latents.c_kv)
        o = jnp.einsum("BHTC,CHO->BTHO", o_latent, w_uv)
        return self.out(rearrange(o, "b t h o -> b t (h o)"), ATTENTION_OUTPUT)


def _float32_einsum(formula: str, *operands: Array) -> Array:
    return jnp.einsum(formula, *operands, preferred_element_type=jnp.float32)
