"""One decoder block: attention and a feed-forward layer, each normalised first and added on."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import RMSNorm, SwiGLU
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.moe import MoE, Routed, RouterStats, router_stats
from dsv3_jax.shapes import Array, Float, Int
from sharding.layout import Layout

# Put into the middle of a layer by `scan_ahead`: the identity, at which communication is tied.
Between = Callable[[jax.Array], jax.Array] | None


class Block(nnx.Module):
    """What both kinds of block share; `feed` is their own."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = MLA(config, rngs=rngs)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)

    def pieces(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        layout: Layout,
        doc_start: Int[Array, "B T"] | None,
        n: int,
        between: Between = None,
    ) -> list[tuple[Float[Array, "B S D"], Routed | None]]:
        """x after both layers, and what `feed` saw, for `n` pieces of the sequence (S = T / n).

        The exchange of one piece's rows can run beside the products of the next. `between` stands
        before the first exchange.
        """
        parts = []
        attended = self.attended(self.attention_norm(x), positions, layout, doc_start, n)
        for before, change in zip(jnp.split(x, n, axis=1), attended, strict=True):
            residual = checkpoint_name(before + change, "residual")
            if between is not None and not parts:
                residual = between(residual)
            parts.append(self.feed(residual, layout))
        return parts

    def attended(
        self,
        h: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        layout: Layout,
        doc_start: Int[Array, "B T"] | None,
        n: int,
    ) -> Iterator[Float[Array, "B S D"]]:
        """Attention of one piece of the sequence after the other.

        Each has its own queries, against the keys up to it, which all share; so no piece waits for
        the attention of another. Pieces of a slice are not pieces of its sequence: where sequences
        lie over several ranks, all have their attention at once.
        """
        if layout.context > 1:
            yield from jnp.split(self.attention(h, positions, layout, doc_start), n, axis=1)
            return
        keys, values = self.attention.keys_values(self.attention.latents(h, positions))
        length = h.shape[1] // n
        for begin in range(0, h.shape[1], length):
            rows, past = slice(begin, begin + length), slice(begin + length)
            yield self.attention.expanded(
                self.attention.queries(h[:, rows], positions[:, rows]),
                keys[:, :, past],
                values[:, :, past],
                None if doc_start is None else doc_start[:, past],
                layout,
            )

    def feed(
        self, x: Float[Array, "B T D"], layout: Layout
    ) -> tuple[Float[Array, "B T D"], Routed | None]:
        """x after the feed-forward layer, and what that saw."""
        raise NotImplementedError


class DenseBlock(Block):
    """A block of the dense prefix."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.ffn = SwiGLU(config.width, config.dense_hidden, config.init_std, rngs=rngs)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        layout: Layout,
        doc_start: Int[Array, "B T"] | None = None,
        between: Between = None,
    ) -> tuple[Float[Array, "B T D"], None]:
        """x after both layers; `doc_start` as in `causal_attention`."""
        return self.pieces(x, positions, layout, doc_start, 1, between)[0]

    def feed(self, x: Float[Array, "B T D"], layout: Layout) -> tuple[Float[Array, "B T D"], None]:
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
        between: Between = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """x after both layers, in `layout.overlap_chunks`; `doc_start` as in `causal_attention`."""
        pieces = self.pieces(x, positions, layout, doc_start, layout.overlap_chunks, between)
        parts, routed = zip(*pieces, strict=True)
        stats = router_stats(routed, self.ffn.config.top_k, layout)
        return jnp.concatenate(parts, axis=1), stats

    def feed(
        self, x: Float[Array, "B T D"], layout: Layout
    ) -> tuple[Float[Array, "B T D"], Routed]:
        y, routed = self.ffn(self.ffn_norm(x), layout)
        return x + y, routed
