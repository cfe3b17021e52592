"""Redundant experts: tokens that choose among replicas of a busy expert, and the replicas' weights.

Every expert keeps its home slot. Each rank has additional slots, which hold replicas of experts of
its node; `sharding/eplb.py` chooses them from the load. The choice is an input of the program: it
changes between steps without a compilation, and no result depends on it. Physical experts are
numbered rank by rank: the rank's own experts, then its redundant slots.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Int, PyTree

from sharding.mesh import EXPERT_AXES, MeshSpec


def logical_to_physical(
    ids: Int[Array, "t K"], redundant: Int[Array, " R"], n_experts: int, mesh: MeshSpec
) -> Int[Array, "t K"]:
    """Return the physical experts that rows go to; rows use an expert's replicas in turn.

    Args:
        ids: logical experts; n_experts or more for none.
        redundant: the logical expert in each redundant slot, R / ep slots per rank. Replicas
            outside their expert's node are not used: a row may only go to the nodes of its experts.

    Returns:
        Ids in [0, n_experts + R); n_experts + R for none.
    """
    n_home, n_redundant = n_experts // mesh.ep, redundant.size // mesh.ep
    expert, slot = jnp.arange(n_experts), jnp.arange(redundant.size)
    rank = slot // n_redundant
    usable = rank // mesh.ranks == redundant // n_home // mesh.ranks
    same = (redundant[:, None] == redundant[None, :]) & usable[None, :]
    n_earlier = (same & (slot[None, :] < slot[:, None])).sum(1)
    replica = jnp.where(usable, 1 + n_earlier, redundant.size + 1)  # replica 0 is at home
    homes = expert + expert // n_home * n_redundant
    table = jnp.zeros((n_experts, redundant.size + 1), jnp.int32).at[:, 0].set(homes)
    physical = slot + (rank + 1) * n_home
    table = table.at[redundant, replica].set(physical, mode="drop")
    replica_count = jnp.ones(n_experts, jnp.int32).at[redundant].add(usable)
    known = jnp.minimum(ids, n_experts - 1)
    chosen = jnp.arange(ids.shape[0])[:, None] % replica_count[known]
    return jnp.where(ids < n_experts, table[known, chosen], n_experts + redundant.size)


def append_redundant_experts(
    experts: PyTree, redundant: Int[Array, " R"], mesh: MeshSpec
) -> PyTree:
    """Append the weights of redundant experts to this rank's own: [e ...] -> [e + R/ep ...].

    Their gradients return to the experts' homes. For a moment every rank holds R experts, mostly
    zeros.

    Args:
        experts: a pytree of arrays [e ...].
    """
    n_home = jax.tree.leaves(experts)[0].shape[0]
    is_mine = redundant // n_home == lax.axis_index(EXPERT_AXES)

    def append(x: jax.Array) -> jax.Array:
        if x.dtype.itemsize == 1:  # sums want a number format that all devices can add
            return append(x.view(jnp.uint8)).view(x.dtype)
        mask = is_mine.reshape(-1, *[1] * (x.ndim - 1))
        replicas = jnp.where(mask, x[redundant % n_home], 0)
        return jnp.concatenate([x, lax.psum_scatter(replicas, EXPERT_AXES, tiled=True)])

    return jax.tree.map(append, experts)
