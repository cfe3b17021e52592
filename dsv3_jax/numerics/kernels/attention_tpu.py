"""Causal attention on TPUs: JAX's splash attention kernel.

Compiled for v5p and tpu7x; compared with the reference in interpret mode. MLA's keys of 192 and
values of 128 dims fit. Source: FlashAttention (arXiv 2205.14135).
"""

import functools

import jax
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    splash_attention_kernel,
    splash_attention_mask,
)

from dsv3_jax.numerics.kernels import attention_ref
from dsv3_jax.shapes import Array, Float, Int

MAX_BLOCK = 512  # queries, and keys, of a block at most
LANES = 128  # T and S must be multiples of it


def attention(
    q: Float[Array, "B H T K"],
    k: Float[Array, "B H S K"],
    v: Float[Array, "B H S O"],
    scale: float,
    doc_start: Int[Array, "B S"] | None = None,
) -> Float[Array, "B H T O"]:
    """Return what `causal_attention` promises; the reference's unless T and S suit the kernel."""
    if q.shape[2] % LANES or k.shape[2] % LANES:
        return attention_ref.attention(q, k, v, scale, doc_start)
    return splash_attention(q, k, v, scale, doc_start)


def splash_attention(q, k, v, scale: float, doc_start=None, *, interpret: bool = False):
    """Return causal attention by the kernel, whose segments are documents: one per `doc_start`."""
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
    segments = splash_attention_kernel.SegmentIds(
        q=doc_start[:, n_keys - n_queries :], kv=doc_start
    )
    return jax.vmap(kernel)(q, k, v, segments)


class _CausalMask(splash_attention_mask.CausalMask):
    """The same mask, with blocks off the diagonal made once.

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
    """Return the largest blocks up to `MAX_BLOCK` that divide, the same in all three kernels."""

    def block(n: int) -> int:
        return max(size for size in range(LANES, MAX_BLOCK + 1, LANES) if n % size == 0)

    bq, bkv = block(n_queries), block(n_keys)
    return splash_attention_kernel.BlockSizes(
        block_q=bq,
        block_kv=bkv,
        block_q_dkv=bq,
        block_kv_dkv=bkv,
        block_q_dq=bq,
        block_kv_dq=bkv,
    )
