"""DeepSeekMoE: shared experts for every token, routed experts for the tokens that choose them.

    y = shared(h) + sum over chosen experts i of g_i FFN_i(h)        (12)

Report sec. 2.1.2; the gates g (13 to 16) and the balance loss (17 to 20) are in `router.py`.
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
from dsv3_jax.model.router import expert_counts, route_tokens, sequence_balance_loss
from dsv3_jax.numerics.fp8 import SavedInput
from dsv3_jax.numerics.matmul import Groups, Weight, matmul, swiglu_matmul, undeferred
from dsv3_jax.params import make_param
from dsv3_jax.shapes import Array, Float, Float32, Int
from sharding.context_parallel import psum_sequence
from sharding.expert_parallel import expert_all_to_all, make_dispatch_config
from sharding.layout import Layout
from sharding.redundant_experts import append_redundant_experts, logical_to_physical


class BalanceBias(nnx.Variable):
    """The selection bias of each expert: no gradient, no weight decay, moved by the expert load."""


class RedundantExperts(nnx.Variable):
    """The expert in each redundant slot; chosen between steps by the expert load."""


class RouterStats(NamedTuple):
    """The statistics of a MoE layer over this shard's tokens."""

    load: Array  # [E] token copies that chose each expert
    balance: Array  # [] sum over sequences of the balance loss
    rounds: Array  # [] rounds of the all-to-all
    n_received: Array  # [] token copies that reached an expert on this device
    n_nonfinite: Array  # [] tokens whose router logits are not finite: no expert gets them


class RoutingSums(NamedTuple):
    """The sums over a chunk of every sequence that `RouterStats` are made of."""

    counts: Float32[Array, "B E"]  # token copies that chose each expert
    affinity: Float32[Array, "B E"]  # sum over tokens of their affinities, normalised over experts
    rounds: Int[Array, ""]
    n_received: Int[Array, ""]
    n_nonfinite: Int[Array, ""]


def router_stats(chunks: Sequence[RoutingSums], top_k: int, layout: Layout) -> RouterStats:
    """Return the statistics of whole sequences from the sums of their chunks.

    `rounds` is the most of any chunk. Where a sequence is split over several ranks, each has an
    equal part of its balance loss.
    """
    sums = RoutingSums(*(list(parts) for parts in zip(*chunks, strict=True)))
    counts, affinity = (psum_sequence(sum(x), layout) for x in (sums.counts, sums.affinity))
    balance = sequence_balance_loss(counts, affinity, top_k) / layout.context
    return RouterStats(
        load=sum(sums.counts).sum(0),
        balance=balance,
        rounds=functools.reduce(jnp.maximum, sums.rounds),
        n_received=sum(sums.n_received),
        n_nonfinite=sum(sums.n_nonfinite),
    )


class MoE(nnx.Module):
    """Routed and shared experts."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        m = self.config = config.moe
        std, width = config.init_std, config.width
        up, down = ("expert", "embed", "mlp"), ("expert", "mlp", "embed")
        self.router = make_param(
            rngs, (width, m.n_experts), ("embed", "router"), std, keep_fp32=True
        )
        self.bias = BalanceBias(jnp.zeros(m.n_experts, jnp.float32))
        self.gate_up = make_param(rngs, (m.n_experts, width, 2 * m.hidden), up, std, fp8=True)
        self.down = make_param(rngs, (m.n_experts, m.hidden, width), down, std, fp8=True)
        if m.n_redundant:
            self.redundant = RedundantExperts(jnp.zeros(m.n_redundant, jnp.int32))
        if m.n_shared:
            self.shared = SwiGLU(width, m.n_shared * m.hidden, std, rngs=rngs)

    def __call__(
        self, h: Float[Array, "B T D"], layout: Layout
    ) -> tuple[Float[Array, "B T D"], RoutingSums]:
        """Return y of equation 12 without the residual h, and what the router did."""
        m = self.config
        logits = self.router_logits(h)
        scores = jax.nn.sigmoid(logits)
        tokens = rearrange(h, "b t d -> (b t) d")
        gates, ids = route_tokens(rearrange(scores, "b t e -> (b t) e"), self.bias[...], m)
        nonfinite = ~jnp.isfinite(rearrange(logits, "b t e -> (b t) e")).all(-1)
        ids = jnp.where(nonfinite[:, None], m.n_experts, ids)  # no expert has this number
        gates, ids = checkpoint_name(gates, "gates"), checkpoint_name(ids, "expert_ids")
        dispatch_config = make_dispatch_config(
            layout, m.n_experts + m.n_redundant, len(tokens), m.top_k, m.n_groups, m.topk_groups
        )
        experts, physical_ids = (self.gate_up.get_value(), self.down.get_value()), ids
        if m.n_redundant:
            experts = append_redundant_experts(experts, self.redundant[...], layout.mesh)
            physical_ids = logical_to_physical(ids, self.redundant[...], m.n_experts, layout.mesh)
        # Extra rounds are rare, and their weight gradients are summed where they run.
        in_extra_rounds = tuple(map(undeferred, experts))
        run = functools.partial(apply_experts, layout.mesh.platform)
        y, stats = expert_all_to_all(
            run, experts, tokens, gates, physical_ids, dispatch_config, in_extra_rounds
        )
        y = rearrange(y, "(b t) d -> b t d", b=h.shape[0])
        if m.n_shared:
            y = y + self.shared(h)
        ids_by_sequence = rearrange(ids, "(b t) k -> b t k", b=h.shape[0])
        return y, RoutingSums(
            counts=jax.vmap(expert_counts, in_axes=(0, None))(ids_by_sequence, m.n_experts),
            affinity=(scores / scores.sum(-1, keepdims=True)).sum(1),
            rounds=stats.n_rounds,
            n_received=stats.n_copies,
            n_nonfinite=nonfinite.sum(),
        )

    def router_logits(self, h: Float[Array, "B T D"]) -> Float32[Array, "B T E"]:
        """Return h . e_i of equation 15 in float32, whatever the default matmul precision is."""
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
    """Return gate * FFN_expert(row) for rows sorted by expert; unspecified after the last group.

    Rows that came in FP8 have power-of-two scales, with which they quantise to the same values.
    """
    gate_up, down = params
    groups = Groups(sizes, platform)
    hidden = matmul(rows, gate_up, SavedInput("dispatched", power_of_two=True), groups)
    return swiglu_matmul(hidden, down, SavedInput("expert_hidden"), gates, groups)
