"""Redundant experts: rows that may choose among replicas of a busy expert, and their weights.

Every expert keeps its home. Each rank has further slots, which hold replicas of any experts of its
node; `sharding/eplb.py` chooses which, from the load. The choice is data of the program, not
part of it: it changes between steps without a compilation, and no result depends on it.
"""

import jax
import jax.numpy as jnp
from jax import lax

from sharding.mesh import EXPERT_AXES, MeshSpec


def logical_to_physical(
    ids: jax.Array, extra: jax.Array, n_experts: int, mesh: MeshSpec
) -> jax.Array:
    """Expert ids [t K] -> the slots that their rows go to, replicas taken in turn.

    Args:
        ids: n_experts or more for none.
        extra: [R] the expert in each further slot, R / ep of them a rank. Those outside of their
            expert's node are not used: a row may only go to the nodes of its experts.

    Returns:
        [t K] slots in [0, n_experts + R), counted rank by rank; n_experts + R for none.
    """
    n_local, n_extra = n_experts // mesh.ep, extra.size // mesh.ep
    expert, place = jnp.arange(n_experts), jnp.arange(extra.size)
    rank = place // n_extra
    usable = rank // mesh.ranks == extra // n_local // mesh.ranks
    same = (extra[:, None] == extra[None, :]) & usable[None, :]
    earlier = (same & (place[None, :] < place[:, None])).sum(1)
    number = jnp.where(usable, 1 + earlier, extra.size + 1)
    homes = expert + expert // n_local * n_extra
    table = jnp.zeros((n_experts, extra.size + 1), jnp.int32).at[:, 0].set(homes)
    further = place + (rank + 1) * n_local
    table = table.at[extra, number].set(further, mode="drop")
    count = jnp.ones(n_experts, jnp.int32).at[extra].add(usable)
    known = jnp.minimum(ids, n_experts - 1)
    turn = jnp.arange(ids.shape[0])[:, None] % count[known]
    return jnp.where(ids < n_experts, table[known, turn], n_experts + extra.size)


def append_redundant_experts(experts, extra: jax.Array, mesh: MeshSpec):
    """This rank's experts [e ...] with the replicas in its slots behind them [e + R/ep ...].

    Their gradients return to their homes. For a moment every rank holds R experts, mostly zeros.
    """
    n_local = jax.tree.leaves(experts)[0].shape[0]
    me = lax.axis_index(EXPERT_AXES)
    mine = extra // n_local == me

    def one(x: jax.Array) -> jax.Array:
        if x.dtype.itemsize == 1:  # sums want a number format that all devices can add
            return one(x.view(jnp.uint8)).view(x.dtype)
        wanted = jnp.where(mine.reshape(-1, *[1] * (x.ndim - 1)), x[extra % n_local], 0)
        return jnp.concatenate([x, lax.psum_scatter(wanted, EXPERT_AXES, tiled=True)])

    return jax.tree.map(one, experts)
