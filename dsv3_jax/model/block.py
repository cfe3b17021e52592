"""One decoder block: attention and a feed-forward sublayer, each normalised first and added on.

`Block.run_chunks` is what training, scoring and every MTP module run. Prefill and decode
(`serving/decode.py`) call the same two sublayers and keep the latents.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import RMSNorm, SwiGLU
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.moe import MoE, RouterStats, RoutingSums, router_stats
from dsv3_jax.shapes import Array, Float, Int
from sharding.layout import Layout

# An identity that `layer_scan` has placed in the middle of a layer: communication that is to run
# beside the second half of the layer is tied to it.
OverlapBarrier = Callable[[jax.Array], jax.Array] | None


class Block(nnx.Module):
    """The base of both kinds of block, which differ in the feed-forward sublayer."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = MLA(config, rngs=rngs)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)

    def run_chunks(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        layout: Layout,
        doc_start: Int[Array, "B T"] | None,
        overlap_barrier: OverlapBarrier,
        n_chunks: int,
    ) -> list[tuple[Float[Array, "B S D"], RoutingSums | None]]:
        """Return x after both sublayers, and the routing sums, of each chunk of the sequence.

        The all-to-all of one chunk's tokens can run beside the matmuls of the next chunk.

        Args:
            doc_start: as in `causal_attention`.
            overlap_barrier: stands before the first all-to-all.
        """
        h, x_chunks = self.attention_norm(x), jnp.split(x, n_chunks, axis=1)
        latents = self.attention.compress_kv(h, positions)
        attended = self.attention(h, positions, latents, layout, doc_start, n_chunks)
        outputs = []
        for x_chunk, attended_chunk in zip(x_chunks, attended, strict=True):
            residual = checkpoint_name(x_chunk + attended_chunk, "residual")
            if overlap_barrier is not None and not outputs:
                residual = overlap_barrier(residual)
            outputs.append(self.ffn_sublayer(residual, layout))
        return outputs

    def ffn_sublayer(
        self, x: Float[Array, "B T D"], layout: Layout
    ) -> tuple[Float[Array, "B T D"], RoutingSums | None]:
        """Return x after the feed-forward sublayer, and the routing sums of its experts."""
        raise NotImplementedError


class DenseBlock(Block):
    """A block of the first layers, whose feed-forward layer has no experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.ffn = SwiGLU(config.width, config.dense_hidden, config.init_std, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        layout: Layout,
        doc_start: Int[Array, "B T"] | None = None,
        overlap_barrier: OverlapBarrier = None,
    ) -> tuple[Float[Array, "B T D"], None]:
        """Return x after both sublayers; `doc_start` as in `causal_attention`."""
        ((x, _),) = self.run_chunks(x, positions, layout, doc_start, overlap_barrier, n_chunks=1)
        return x, None

    def ffn_sublayer(
        self, x: Float[Array, "B T D"], layout: Layout
    ) -> tuple[Float[Array, "B T D"], None]:
        return x + self.ffn(self.ffn_norm(x)), None


class MoEBlock(Block):
    """A block with routed experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.ffn = MoE(config, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        layout: Layout,
        doc_start: Int[Array, "B T"] | None = None,
        overlap_barrier: OverlapBarrier = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Return x after both sublayers, in `layout.overlap_chunks`, and the router's statistics.

        Args:
            doc_start: as in `causal_attention`.
        """
        n_chunks = layout.overlap_chunks
        outputs = self.run_chunks(x, positions, layout, doc_start, overlap_barrier, n_chunks)
        x_chunks, sums = zip(*outputs, strict=True)
        stats = router_stats(sums, self.ffn.config.top_k, layout)
        return jnp.concatenate(x_chunks, axis=1), stats

    def ffn_sublayer(
        self, x: Float[Array, "B T D"], layout: Layout
    ) -> tuple[Float[Array, "B T D"], RoutingSums]:
        y, sums = self.ffn(self.ffn_norm(x), layout)
        return x + y, sums
