"""One decoder block: attention and a feed-forward layer, each normalised first and added on."""

from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.layers.ffn import SwiGLU
from dsv3_jax.layers.mla import MLA
from dsv3_jax.layers.moe import MoE, RouterStats
from dsv3_jax.layers.norm import RMSNorm
from dsv3_jax.shapes import Array, Float, Int
from sharding.rules import Layout


class Block(nnx.Module):
    """What both kinds of block share; `feed` is their own."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, config.norm_eps)
        self.attention = MLA(config, rngs=rngs)
        self.ffn_norm = RMSNorm(config.width, config.norm_eps)

    def __call__(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        layout: Layout,
        start: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """x after both layers; `start` as in `causal_attention`."""
        return self.feed(self.attend(x, positions, start), layout)

    def attend(
        self,
        x: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        start: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """x after attention: the residual that the feed-forward layer adds to."""
        attended = self.attention(self.attention_norm(x), positions, start)
        return checkpoint_name(x + attended, "residual")

    def feed(
        self, x: Float[Array, "B T D"], layout: Layout
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """x after the feed-forward layer, and what that saw."""
        raise NotImplementedError


class DenseBlock(Block):
    """A block of the dense prefix."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.ffn = SwiGLU(config.width, config.dense_hidden, config.init_std, rngs=rngs)

    def feed(self, x: Float[Array, "B T D"], layout: Layout) -> tuple[Float[Array, "B T D"], None]:
        return x + self.ffn(self.ffn_norm(x)), None


class MoEBlock(Block):
    """A block with routed experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        super().__init__(config, rngs=rngs)
        self.ffn = MoE(config, rngs=rngs)

    def feed(
        self, x: Float[Array, "B T D"], layout: Layout
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        y, stats = self.ffn(self.ffn_norm(x), layout)
        return x + y, stats
