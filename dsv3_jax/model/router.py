"""Choice of experts: sigmoid affinity, balance bias, node-limited top-k (report sec. 2.1.2)."""

import jax
import jax.numpy as jnp
from einops import rearrange

from dsv3_jax.config import MoEConfig
from dsv3_jax.shapes import Array, Bool, Float32, Int


def route_tokens(
    scores: Float32[Array, "t E"], bias: Float32[Array, " E"], config: MoEConfig
) -> tuple[Float32[Array, "t K"], Int[Array, "t K"]]:
    """Pick `top_k` experts per token; the bias steers the choice but not the weights.

    Experts lie in `n_groups` groups. A group's score is the sum of its two best biased scores; the
    best `topk_groups` groups stay, and the best experts among theirs are chosen.

    Args:
        scores: sigmoid affinities.
        bias: balance bias of each expert.

    Returns:
        Gate weights (scores of the chosen, normalised if the config says so, times its scale), ids.

    Source: report sec. 2.1.2, equations 12 to 16.
    """
    biased = jax.lax.stop_gradient(scores) + bias[None, :]
    if config.n_groups > 1:
        biased = jnp.where(group_mask(biased, config), biased, -jnp.inf)
    _, ids = jax.lax.top_k(biased, config.top_k)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if config.normalize:
        weights = weights / (weights.sum(-1, keepdims=True) + 1e-20)
    return weights * config.scale, ids


def group_mask(biased: Float32[Array, "t E"], config: MoEConfig) -> Bool[Array, "t E"]:
    """Return a mask of the experts whose group stays (node-limited routing)."""
    groups = rearrange(biased, "t (g e) -> t g e", g=config.n_groups)
    scores = jax.lax.top_k(groups, min(2, groups.shape[-1]))[0].sum(-1)
    _, best_groups = jax.lax.top_k(scores, config.topk_groups)
    mask = (best_groups[:, :, None] == jnp.arange(config.n_groups)[None, None, :]).any(1)
    return jnp.repeat(mask, groups.shape[-1], axis=-1)


def expert_counts(ids: Int[Array, "*B K"], n_experts: int) -> Float32[Array, " E"]:
    """Return how many tokens chose each expert."""
    return jnp.zeros(n_experts, jnp.float32).at[ids.reshape(-1)].add(1.0)


def sequence_balance_loss(
    counts: Float32[Array, "B E"], affinity: Float32[Array, "B E"], top_k: int
) -> Float32[Array, ""]:
    """Return the sum over this shard's sequences of sum_i f_i P_i.

    f_i is expert i's share of the sequence's choices times E (1 when balanced); P_i the mean of its
    affinity, normalised over experts. Only P carries a gradient.

    Args:
        counts: how often each expert was chosen in a sequence.
        affinity: sum over a sequence of the normalised affinities.

    Source: report sec. 2.1.2, equations 17 to 20.
    """
    n_choices = counts.sum(-1, keepdims=True)
    f = counts * (counts.shape[-1] / n_choices)  # equation 18; P (equation 20) is the rest
    return (f * affinity * (top_k / n_choices)).sum()
