"""DeepSeekMoE: shared experts for every token, routed experts for the tokens that choose them.

y = shared(h) + sum over chosen experts i of g_i FFN_i(h)        (report sec. 2.1.2)
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from dsv3_jax.config import ModelConfig
from dsv3_jax.model.layers import SwiGLU
from dsv3_jax.model.router import choose_experts, expert_counts, sequence_balance
from dsv3_jax.numerics.fp8 import SavedInput
from dsv3_jax.numerics.matmul import Groups, Weight, matmul, swiglu_matmul, undeferred
from dsv3_jax.params import make_param
from dsv3_jax.shapes import Array, Float, Float32, Int
from sharding.context_parallel import psum_sequence
from sharding.expert_parallel import expert_all_to_all, make_dispatch_config
from sharding.layout import Layout
from sharding.redundant_experts import append_redundant_experts, logical_to_physical


class BalanceBias(nnx.Variable):
    """Selection bias of each expert: no gradient, no weight decay, moved by the observed load."""


class Redundant(nnx.Variable):
    """The expert in each further slot; chosen between steps by the observed load."""


class RouterStats(NamedTuple):
    """What a MoE layer saw of this shard's tokens."""

    load: Array  # [E] pairs that chose each expert
    balance: Array  # [] sum over sequences of the balance loss
    rounds: Array  # [] rounds of the exchange
    sent: Array  # [] pairs that reached an expert here
    lost: Array  # [] tokens whose router logits are not finite: no expert gets them


class Routed(NamedTuple):
    """What a MoE layer saw of a piece of every sequence."""

    counts: Float32[Array, "B E"]  # pairs that chose each expert
    affinity: Float32[Array, "B E"]  # sum over tokens of their affinities, normalised over experts
    rounds: Int[Array, ""]
    sent: Int[Array, ""]
    lost: Int[Array, ""]


def router_stats(pieces: Sequence[Routed], top_k: int, layout: Layout) -> RouterStats:
    """The statistics of whole sequences from those of their pieces; of the rounds, the most.

    Of a sequence that lies over several ranks, each has an equal part of the balance loss.
    """
    counts, affinity, rounds, sent, lost = (list(parts) for parts in zip(*pieces, strict=True))
    sums = (psum_sequence(sum(parts), layout) for parts in (counts, affinity))
    balance = sequence_balance(*sums, top_k) / layout.context
    most = functools.reduce(jnp.maximum, rounds)
    return RouterStats(sum(counts).sum(0), balance, most, sum(sent), sum(lost))


class MoE(nnx.Module):
    """Routed and shared experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        m = self.config = config.moe
        std, width = config.init_std, config.width
        expert = ("expert", "embed", "mlp")
        self.router = make_param(
            rngs, (width, m.n_experts), ("embed", "router"), std, keep_fp32=True
        )
        self.bias = BalanceBias(jnp.zeros(m.n_experts, jnp.float32))
        down = ("expert", "mlp", "embed")
        self.gate_up = make_param(rngs, (m.n_experts, width, 2 * m.hidden), expert, std, fp8=True)
        self.down = make_param(rngs, (m.n_experts, m.hidden, width), down, std, fp8=True)
        if m.n_redundant:
            self.redundant = Redundant(jnp.zeros(m.n_redundant, jnp.int32))
        if m.n_shared:
            self.shared = SwiGLU(width, m.n_shared * m.hidden, std, rngs=rngs)

    def __call__(
        self, h: Float[Array, "B T D"], layout: Layout
    ) -> tuple[Float[Array, "B T D"], Routed]:
        m = self.config
        logits = self.router_logits(h)
        scores = jax.nn.sigmoid(logits)
        tokens = rearrange(h, "b t d -> (b t) d")
        flat = rearrange(scores, "b t e -> (b t) e")
        gates, ids = choose_experts(flat, self.bias[...], m)
        lost = ~jnp.isfinite(rearrange(logits, "b t e -> (b t) e")).all(-1)
        ids = jnp.where(lost[:, None], m.n_experts, ids)
        gates, ids = checkpoint_name(gates, "gates"), checkpoint_name(ids, "expert_ids")
        n_physical = m.n_experts + m.n_redundant
        dispatch_config = make_dispatch_config(
            layout, n_physical, tokens.shape[0], m.top_k, m.n_groups, m.topk_groups
        )
        experts = (self.gate_up.get_value(), self.down.get_value())
        physical_ids = ids
        if m.n_redundant:
            experts = append_redundant_experts(experts, self.redundant[...], layout.mesh)
            physical_ids = logical_to_physical(ids, self.redundant[...], m.n_experts, layout.mesh)
        run = functools.partial(apply_experts, layout.mesh.platform)
        further = tuple(
            map(undeferred, experts)
        )  # rounds, which are rare and summed where they run
        routed, dispatched = expert_all_to_all(
            run, experts, tokens, gates, physical_ids, dispatch_config, further
        )
        y = rearrange(routed, "(b t) d -> b t d", b=h.shape[0])
        if m.n_shared:
            y = y + self.shared(h)
        sequences = rearrange(ids, "(b t) k -> b t k", b=h.shape[0])
        return y, Routed(
            counts=jax.vmap(expert_counts, in_axes=(0, None))(sequences, m.n_experts),
            affinity=(scores / scores.sum(-1, keepdims=True)).sum(1),
            rounds=dispatched.n_rounds,
            sent=dispatched.n_copies,
            lost=lost.sum(),
        )

    def router_logits(self, h: Float[Array, "B T D"]) -> Float32[Array, "B T E"]:
        """h . e_i in float32, whatever the device's default precision of products is."""
        return jnp.einsum(
            "BTD,DE->BTE",
            h.astype(jnp.float32),
            self.router[...],
            precision=jax.lax.Precision.HIGHEST,
        )


def apply_experts(
    platform: str,
    params: tuple[Weight, Weight],
    rows: Float[Array, "r D"],
    gates: Float32[Array, " r"],
    sizes: Int[Array, " e"],
) -> Float[Array, "r D"]:
    """gate * FFN_expert(row) for rows grouped by expert; unspecified beyond the last group.

    Rows that came in FP8 have power-of-two scales, under which they are the same codes again.
    """
    gate_up, down = params
    groups = Groups(sizes, platform)
    hidden = matmul(rows, gate_up, SavedInput("dispatched", power_of_two=True), groups)
    return swiglu_matmul(hidden, down, SavedInput("expert_hidden"), gates, groups)
