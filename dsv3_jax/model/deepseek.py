"""DeepSeek-V3: embedding, dense prefix, MoE blocks, final norm, head, MTP modules.

Every method runs unchanged on one device or on a share of the batch inside the manual region; the
`Layout` says which.
"""

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx

from dsv3_jax.config import ModelConfig
from dsv3_jax.layer_scan import scan, scan_prefetch, stack
from dsv3_jax.model.block import DenseBlock, MoEBlock
from dsv3_jax.model.layers import RMSNorm
from dsv3_jax.model.moe import BalanceBias, RouterStats
from dsv3_jax.model.mtp import MTP
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.params import make_param
from dsv3_jax.shapes import Array, Float, Float32, Int
from sharding import context_parallel, vocab_parallel
from sharding.layout import ONE_DEVICE, Layout

STACKS = ("dense", "moe", "mtp")  # attributes of the model whose arrays have a leading layer dim


class ModelBase(nnx.Module):
    """The parameters of the model, embedding and head; subclasses say how layers are held."""

    def __init__(self, config: ModelConfig, policy: Policy, *, rngs: nnx.Rngs):
        self.config, self.policy = config, policy
        n_moe, table = config.n_layers - config.n_dense, (config.vocab_size, config.width)
        self.embedding = make_param(
            rngs, table, ("vocab", "embed_shard"), config.init_std, keep_fp32=True
        )
        self.dense = self._make_layers(DenseBlock, config.n_dense, rngs)
        self.moe = self._make_layers(MoEBlock, n_moe, rngs)
        self.norm = RMSNorm(config.width, config.norm_eps)
        self.head = make_param(rngs, table, ("vocab_shard", "embed"), config.init_std)
        self.mtp = self._make_layers(MTP, config.mtp_depth, rngs)

    def _make_layers(self, layer: type[nnx.Module], n: int, rngs: nnx.Rngs):
        """Return `n` layers of a kind."""
        raise NotImplementedError

    def embed(self, tokens: Int[Array, "B T"], layout: Layout) -> Float[Array, "B T D"]:
        """Return the embeddings in the compute format."""
        flat = jnp.asarray(tokens).reshape(-1)  # [B*T]
        rows = vocab_parallel.embed(self.embedding[...], flat, layout.mesh, self.policy.compute)
        return rearrange(rows, "(b t) d -> b t d", b=tokens.shape[0])

    def logits(
        self, hidden: Float[Array, "B T D"], layout: Layout = ONE_DEVICE
    ) -> Float32[Array, "B T V"]:
        """Return the output head over the whole vocabulary; for few positions at a time."""
        rows = rearrange(hidden, "b t d -> (b t) d")
        logits = vocab_parallel.logits(rows, self.head[...].astype(hidden.dtype), layout.mesh)
        return rearrange(logits, "(b t) v -> b t v", b=hidden.shape[0])


class DeepSeekV3(ModelBase):
    """The whole model; `dense`, `moe` and `mtp` are stacked layers, None where there are none."""

    def _make_layers(self, layer: type[nnx.Module], n: int, rngs: nnx.Rngs) -> nnx.Module | None:
        return stack(lambda rngs: layer(self.config, rngs=rngs), n, rngs) if n else None

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        layout: Layout = ONE_DEVICE,
        doc_start: Int[Array, "B T"] | None = None,
    ) -> Float32[Array, "B T V"]:
        """Return the logits of the next token at every position.

        Args:
            doc_start: the first position of its row that each token sees, at most its own (left
                padding, packed documents); None if 0.
        """
        hidden, _ = self.hidden_states(tokens, layout, doc_start=doc_start)
        return self.logits(hidden, layout)

    def mtp_logits(
        self, tokens: Int[Array, "B T"], layout: Layout = ONE_DEVICE
    ) -> Float32[Array, "B S V"]:
        """Return the logits of the token after the next, at the first S = T - 1 positions."""
        hidden, _ = self.hidden_states(tokens, layout)
        hidden, _ = self.mtp_hidden_states(hidden[:, :-1], tokens[None, :, 1:], layout)
        return self.logits(hidden[0], layout)

    def hidden_states(
        self,
        tokens: Int[Array, "B T"],
        layout: Layout = ONE_DEVICE,
        remat: str = "none",
        doc_start: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], RouterStats | None]:
        """Return the hidden states after the final norm, and the MoE layers' statistics."""
        x = self.embed_and_dense(tokens, layout, remat, doc_start)
        positions = token_positions(tokens, layout)
        x, stats = self._run_layers(self.moe, x, positions, layout, remat, doc_start)
        return self.norm(x), stats

    def embed_and_dense(
        self,
        tokens: Int[Array, "B T"],
        layout: Layout,
        remat: str,
        doc_start: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """Return the input of the first MoE layer: embeddings through the dense layers."""
        x, positions = self.embed(tokens, layout), token_positions(tokens, layout)
        return self._run_layers(self.dense, x, positions, layout, remat, doc_start)[0]

    def _run_layers(
        self, blocks: nnx.Module | None, x, positions, layout: Layout, remat: str, doc_start
    ):
        """Return x after stacked blocks, and their statistics; without blocks x and None."""
        if blocks is None:
            return x, None
        compute = self.policy.compute

        def run_block(block, x, overlap_barrier=None):
            return block(x, positions, layout, doc_start, overlap_barrier)

        if layout.zero == 3:
            return scan_prefetch(run_block, blocks, x, layout=layout, compute=compute, remat=remat)
        return scan(run_block, blocks, x, None, layout=layout, compute=compute, remat=remat)

    def mtp_hidden_states(
        self,
        hidden: Float[Array, "B T D"],
        shifted_tokens: Int[Array, "M B T"],
        layout: Layout = ONE_DEVICE,
        remat: str = "none",
        doc_start: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "M B T D"], RouterStats]:
        """Return the hidden states that predict 2, 3, ... tokens ahead, and statistics, stacked.

        Args:
            hidden: from `hidden_states`.
            shifted_tokens: for each depth k = 1, 2, ... the tokens k positions on.
            doc_start: as for `hidden_states`.
        """
        positions = token_positions(shifted_tokens[0], layout)

        def run_module(module, hidden, tokens):
            embedded = self.embed(tokens, layout)
            hidden, stats = module(hidden, embedded, positions, layout, doc_start)
            return hidden, (hidden, stats)

        _, (hidden, stats) = scan(
            run_module,
            self.mtp,
            hidden,
            shifted_tokens,
            layout=layout,
            compute=self.policy.compute,
            remat=remat,
        )
        return hidden, stats


def token_positions(tokens: Int[Array, "B T"], layout: Layout = ONE_DEVICE) -> Int[Array, "B T"]:
    """Return 0, 1, 2, ... for every row; a slice of a sequence goes on from the one before."""
    return jnp.broadcast_to(
        context_parallel.positions(tokens.shape[1], layout)[None, :], tokens.shape
    )


def abstract_model(config: ModelConfig, policy: Policy) -> DeepSeekV3:
    """Return the model's shapes without arrays, which takes no memory at any size."""
    return nnx.eval_shape(lambda: DeepSeekV3(config, policy, rngs=nnx.Rngs(0)))


def count_parameters(config: ModelConfig) -> dict[str, int]:
    """Return the parameters of the main model, of the MTP modules, and of the released files.

    The balance biases count, as they are tensors of the released weights; those repeat embedding
    and head in every MTP module.
    """
    model = abstract_model(config, Policy())

    def size(tree) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(tree, (nnx.Param, BalanceBias))))

    table = config.vocab_size * config.width
    mtp = size(model.mtp) if config.mtp_depth else 0
    main = size(model) - mtp
    return {"main": main, "mtp": mtp, "released": main + mtp + 2 * table * config.mtp_depth}
