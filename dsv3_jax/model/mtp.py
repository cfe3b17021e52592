"""Multi-token prediction (report sec. 2.2, equations 21 to 23).

Module k predicts token i + k + 1 from position i:

    h'_i = M [norm(Emb(t_{i+k})); norm(h_i)]  (21)     h^k = block(h')  (22)
    P^k = softmax(W_head norm(h^k))           (23)

h of the first module is the main model's hidden state after its final norm, as in the released
weights; the final norm of every module likewise precedes the shared output head and the next
module. Embedding and head are the main model's. The loss, equations 24 and 25, is in `losses.py`.
"""

import jax.numpy as jnp
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.block import MoEBlock
from dsv3_jax.model.layers import Linear, RMSNorm
from dsv3_jax.model.moe import RouterStats
from dsv3_jax.shapes import Array, Float, Int
from sharding.layout import Layout


class MTP(nnx.Module):
    """One depth of the chain; `join` is M of equation 21."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        width, eps = config.width, config.norm_eps
        self.embedding_norm = RMSNorm(width, eps)
        self.hidden_norm = RMSNorm(width, eps)
        self.join = Linear(
            2 * width, width, ("embed", "embed"), config.init_std, fp8=False, rngs=rngs
        )
        self.block = MoEBlock(config, rngs=rngs)
        self.norm = RMSNorm(width, eps)

    def __call__(
        self,
        hidden: Float[Array, "B T D"],
        embedded: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        layout: Layout,
        doc_start: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats]:
        """Return the hidden states of depth k after their norm, and the router's statistics.

        Args:
            hidden: the same of depth k - 1.
            embedded: the embeddings of the tokens k positions on.
            doc_start: as in `causal_attention`.
        """
        pair = [self.embedding_norm(embedded), self.hidden_norm(hidden)]
        x = self.join(jnp.concatenate(pair, axis=-1))
        x, stats = self.block(x, positions, layout, doc_start)
        return self.norm(x), stats
