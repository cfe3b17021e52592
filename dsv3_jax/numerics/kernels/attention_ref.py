"""Causal attention in XLA operations: the reference, and what runs where there is no kernel.

Queries are taken `QUERY_CHUNK` at a time against the keys up to theirs, so that scores of T x S
never exist at once; the backward keeps the softmax's weights, or in long sequences nothing.
"""

import functools

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.shapes import Array, Float, Int

QUERY_CHUNK = 512  # queries whose scores exist at a time
SPANS = 8  # of a long sequence, each a loop over its chunks


def attention(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B H S K"],
    v: Float[Array, "B H S O"],
    scale: float,
    doc_start: Int[Array, "B S"] | None = None,
) -> Float[Array, "B H T O"]:
    """Return what `causal_attention` promises.

    Up to `SPANS` chunks, each takes the keys up to its last query. More go through `SPANS` loops,
    whose chunks all take the keys up to the last query of the span, and whose backward computes the
    weights again, so that those of one chunk exist at a time.
    """
    first, length = k.shape[2] - q.shape[2], q.shape[2]
    chunk, ends = query_spans(length)
    outputs = []
    for begin, end in zip([0, *ends[:-1]], ends, strict=True):
        rows, past = slice(begin, end), slice(first + end)
        starts = None if doc_start is None else doc_start[:, first:][:, rows]
        keys, values = k[:, :, past], v[:, :, past]
        outputs.append(
            _loop_over_chunks(q[:, :, rows], keys, values, starts, first + begin, chunk, scale)
        )
    return outputs[0] if len(outputs) == 1 else jnp.concatenate(outputs, axis=2)


def query_spans(length: int) -> tuple[int, list[int]]:
    """Return the queries per chunk, and where each span of queries with the same keys ends."""
    chunk = min(QUERY_CHUNK, length)
    span = chunk * max(1, length // chunk // SPANS)
    return chunk, sorted({*range(span, length, span), length - length % chunk, length})


def _loop_over_chunks(q, k, v, doc_start, first: int, chunk: int, scale: float):
    """Return `_attend` of queries taken `chunk` at a time, in a loop if there are more."""
    if q.shape[2] <= chunk:
        return _attend(q, k, v, doc_start, first, scale)

    @jax.checkpoint
    def one_chunk(inputs):
        q, doc_start, first = inputs
        return _attend(q, k, v, doc_start, first, scale)

    n = q.shape[2] // chunk
    starts = None if doc_start is None else rearrange(doc_start, "b (n t) -> n b t", n=n)
    queries = rearrange(q, "b h (n t) k -> n b h t k", n=n)
    o = jax.lax.map(one_chunk, (queries, starts, first + chunk * jnp.arange(n)))
    return checkpoint_name(rearrange(o, "n b h t o -> b h (n t) o"), "attention")


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(q, k, v, doc_start, first: int | jax.Array, scale: float):
    """Return attention of queries at positions first, first + 1, ... to keys at 0, 1, ...

    The backward needs the sum over keys of p dp, which equals the sum over value dims of o do and
    is cheaper so. Source: FlashAttention (arXiv 2205.14135), appendix B.2.
    """
    return _attend_forward(q, k, v, doc_start, first, scale)[0]


def _attend_forward(q, k, v, doc_start, first, scale):
    scores = jnp.einsum("BHTK,BHSK->BHTS", q, k, preferred_element_type=jnp.float32) * scale
    position = jnp.arange(k.shape[2])
    mask = (first + jnp.arange(q.shape[2])[:, None] >= position[None, :])[None, None]
    if doc_start is not None:
        mask = mask & (position[None, None, None, :] >= doc_start[:, None, :, None])
    scores = jnp.where(mask, scores, -jnp.inf)
    weights = jnp.exp(scores - scores.max(-1, keepdims=True))
    total = weights.sum(-1, keepdims=True)
    o = jnp.einsum(
        "BHTS,BHSO->BHTO", weights.astype(v.dtype), v, preferred_element_type=jnp.float32
    )
    o = checkpoint_name((o / total).astype(v.dtype), "attention")
    return o, (q, k, v, weights / total, o)


def _attend_backward(scale, residuals, d_o):
    q, k, v, p, o = residuals
    o_do = (d_o.astype(jnp.float32) * o).sum(-1, keepdims=True)
    d_p = jnp.einsum("BHTO,BHSO->BHTS", d_o, v, preferred_element_type=jnp.float32)
    d_scores = (p * (d_p - o_do) * scale).astype(q.dtype)
    d_q = jnp.einsum("BHTS,BHSK->BHTK", d_scores, k)
    d_k = jnp.einsum("BHTS,BHTK->BHSK", d_scores, q)
    return d_q, d_k, jnp.einsum("BHTS,BHTO->BHSO", p.astype(d_o.dtype), d_o), None, None


_attend.defvjp(_attend_forward, _attend_backward)
