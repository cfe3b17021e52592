"""Causal attention of the last T tokens of a text to all S of it, softmax in float32.

On TPUs a fused kernel, elsewhere products of some queries at a time; both leave out what lies in
the future and keep of the scores only their log-sum-exp or weights.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from dsv3_jax.shapes import Array, Float, Int

QUERY_CHUNK = 512  # query positions whose scores exist at a time
SPANS = 8  # of a long text, each a loop over its chunks
KERNEL_BLOCK = 512  # most queries and keys in a block of the TPU kernel
KERNEL_LANES = 128  # the kernel takes whole multiples of this many tokens


def causal_attention(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B H S K"],
    v: Float[Array, "B H S O"],
    scale: float,
    doc_start: Int[Array, "B S"] | None = None,
    platform: str = "cpu",
) -> Float[Array, "B H T O"]:
    """softmax(q k^T * scale) v over the past; the queries are those of the last T of S places.

    Args:
        doc_start: position at which the document of each token begins, at most its own; None if 0.
            It leaves out padding on the left, and other documents of the same row.
        platform: of the devices; on "tpu" the fused kernel, if T and S are multiples of 128.
    """
    if platform == "tpu" and not (q.shape[2] % KERNEL_LANES or k.shape[2] % KERNEL_LANES):
        return fused_attention(q, k, v, scale, doc_start)
    return chunked_attention(q, k, v, scale, doc_start)


def fused_attention(q, k, v, scale: float, doc_start=None, interpret: bool = False):
    """`causal_attention` by JAX's splash attention kernel for TPUs.

    Compiled for v5p and tpu7x; its numbers are compared with `chunked_attention` in interpret mode.
    Source: FlashAttention (arXiv 2205.14135); MLA's keys of 192 and values of 128 dims fit.
    """
    n_heads, n_queries, n_keys = q.shape[1], q.shape[2], k.shape[2]
    mask = _CausalMask((n_queries, n_keys), offset=n_keys - n_queries)
    kernel = splash_attention_kernel.make_splash_mha(
        splash_attention_mask.MultiHeadMask([mask] * n_heads),
        head_shards=1,
        q_seq_shards=1,
        block_sizes=_block_sizes(n_queries, n_keys),
        residual_checkpoint_name="attention",
        interpret=interpret,
    )
    q = (q * scale).astype(q.dtype)
    if doc_start is None:
        return jax.vmap(kernel)(q, k, v)
    texts = splash_attention_kernel.SegmentIds(q=doc_start[:, n_keys - n_queries :], kv=doc_start)
    return jax.vmap(kernel)(q, k, v, texts)


class _CausalMask(splash_attention_mask.CausalMask):
    """The same mask, whose blocks off the diagonal are ready-made.

    The kernel asks for every block while it is traced: at 128K that takes minutes otherwise.
    """

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        queries, keys = block
        first, last = queries.start + self.offset, queries.stop - 1 + self.offset
        if first < keys.stop - 1 and keys.start <= last:
            return super().__getitem__(block)
        shape = (queries.stop - queries.start, keys.stop - keys.start)
        return _filled(shape, keys.start <= first)


@functools.cache
def _filled(shape: tuple[int, int], value: bool) -> np.ndarray:
    return np.full(shape, value)


def _block_sizes(n_queries: int, n_keys: int) -> splash_attention_kernel.BlockSizes:
    """The largest blocks up to `KERNEL_BLOCK` that divide, the same in all three kernels."""

    def block(n: int) -> int:
        return max(size for size in range(KERNEL_LANES, KERNEL_BLOCK + 1, 128) if n % size == 0)

    bq, bkv = block(n_queries), block(n_keys)
    return splash_attention_kernel.BlockSizes(
        block_q=bq,
        block_kv=bkv,
        block_q_dkv=bq,
        block_kv_dkv=bkv,
        block_q_dq=bq,
        block_kv_dq=bkv,
    )


def chunked_attention(q, k, v, scale: float, doc_start=None):
    """`causal_attention` with queries taken `QUERY_CHUNK` at a time.

    Few chunks see the keys up to them. Many go through `SPANS` loops, whose chunks see the keys up
    to the last of them and whose backward makes the weights again: no more of them ever exist.
    """
    first, length = k.shape[2] - q.shape[2], q.shape[2]
    step = min(QUERY_CHUNK, length)
    span = step * max(1, length // step // SPANS)
    ends = sorted({*range(0, length, span), length - length % step, length})
    parts = []
    for begin, end in zip(ends[:-1], ends[1:], strict=True):
        rows, past = slice(begin, end), slice(first + end)
        begins = None if doc_start is None else doc_start[:, first:][:, rows]
        keys_values = (k[:, :, past], v[:, :, past])
        parts.append(_loop(q[:, :, rows], *keys_values, begins, first + begin, step, scale))
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=2)


def _loop(q, k, v, doc_start, first: int, step: int, scale: float):
    """`_attend` with queries taken `step` at a time in a loop, if there are more."""
    if q.shape[2] <= step:
        return _attend(q, k, v, doc_start, first, scale)

    @jax.checkpoint
    def chunk(part):
        q, doc_start, first = part
        return _attend(q, k, v, doc_start, first, scale)

    n = q.shape[2] // step
    starts = None if doc_start is None else rearrange(doc_start, "b (n t) -> n b t", n=n)
    parts = (rearrange(q, "b h (n t) k -> n b h t k", n=n), starts, first + step * jnp.arange(n))
    o = rearrange(jax.lax.map(chunk, parts), "n b h t o -> b h (n t) o")
    return checkpoint_name(o, "attention")


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, doc_start, first: int | jax.Array, scale: float):
    """Attention of queries at places first, first + 1, ... to keys at places 0, 1, ...

    The backward needs sum over keys of p dp, which equals sum over value dims of o do and is
    cheaper so. Source: FlashAttention (arXiv 2205.14135), appendix B.2.
    """
    return _attend_forward(q, k, v, doc_start, first, scale)[0]


def _attend_forward(q, k, v, doc_start, first, scale):
    scores = jnp.einsum("BHTK,BHSK->BHTS", q, k, preferred_element_type=jnp.float32) * scale
    place = jnp.arange(k.shape[2])
    seen = (first + jnp.arange(q.shape[2])[:, None] >= place[None, :])[None, None]
    if doc_start is not None:
        seen = seen & (place[None, None, None, :] >= doc_start[:, None, :, None])
    scores = jnp.where(seen, scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    wide = jnp.einsum(
        "BHTS,BHSO->BHTO", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    o = checkpoint_name((wide / total).astype(v.dtype), "attention")
    return o, (q, k, v, weights / total, o)


def _attend_backward(scale, saved, d_o):
    q, k, v, p, o = saved
    wide = {"preferred_element_type": jnp.float32}
    overlap = (d_o.astype(jnp.float32) * o).sum(-1, keepdims=True)
    d_p = jnp.einsum("BHTO,BHSO->BHTS", d_o, v, **wide)
    d_scores = (p * (d_p - overlap) * scale).astype(q.dtype)
    d_q = jnp.einsum("BHTS,BHSK->BHTK", d_scores, k)
    d_k = jnp.einsum("BHTS,BHTK->BHSK", d_scores, q)
    return d_q, d_k, jnp.einsum("BHTS,BHTO->BHSO", p.astype(d_o.dtype), d_o), None, None


_attend.defvjp(_attend_forward, _attend_backward)
