"""Expert-parallel load balancing (EPLB): replicas of busy experts, and the ranks they go to.

A *logical* expert is one that the router knows; a *physical* expert is a slot on a rank that holds
a replica of a logical expert. An expert's load (tokens, or any other unit) is divided equally among
its replicas. The physical experts of a rank are numbered consecutively, as are a node's ranks.

`rebalance_experts` is for serving. It moves all experts, by the two policies of the published
balancer. Hierarchical, if the router's groups divide evenly over the nodes: groups are packed onto
nodes, experts replicated within each node, and replicas packed onto the node's ranks; so a token's
groups stay on few nodes. Global otherwise: groups and nodes are ignored.

`choose_redundant` is for training. Every expert keeps its home rank, and each rank has a few slots
for redundant experts.

Shapes: L layers, E logical experts, P physical experts, R redundant experts, X the most replicas of
an expert.

Source: DeepSeek-V3 report (arXiv 2412.19437), sec. 3.4; EPLB (github.com/deepseek-ai/EPLB).
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Int, Num

TIE = 1 + 1e-9  # costs within this factor are equal, whatever the order of their sums


class ExpertPlacement(NamedTuple):
    """Which replica is where; physical expert p is on rank p // (P / n_ranks)."""

    physical_to_logical: Int[np.ndarray, "L P"]
    logical_to_physical: Int[np.ndarray, "L E X"]  # filled up with -1
    replica_count: Int[np.ndarray, "L E"]


def rebalance_experts(
    load: Num[np.ndarray, "..."], n_replicas: int, n_groups: int, n_nodes: int, n_ranks: int
) -> ExpertPlacement:
    """Replicate and place all experts, as EPLB does: in float32, but with stable sorts.

    Args:
        load: the load of each logical expert [L E].
        n_replicas: the number of physical experts P, at least E.
        n_groups: groups of experts that the router knows; a group stays within a node.

    Raises:
        ValueError: sizes that do not divide, fewer replicas than experts, or a bad load.
    """
    n_layers, n_experts = _checked_shape(load)
    if n_replicas < n_experts:
        raise ValueError(f"n_replicas={n_replicas} is less than the n_experts={n_experts} of load")
    _check_multiple("n_replicas", n_replicas, "n_ranks", n_ranks)
    _check_multiple("n_experts", n_experts, "n_groups", n_groups)
    if n_nodes > 0 and n_groups % n_nodes:  # the global policy
        n_groups = n_nodes = 1
    _check_multiple("n_ranks", n_ranks, "n_nodes", n_nodes)
    logical, replica = np.zeros((2, n_layers, n_replicas), np.int32)
    for i, layer in enumerate(load.astype(np.float32)):
        logical[i], replica[i] = _rebalance_layer(layer, n_replicas, n_groups, n_nodes, n_ranks)
    physical = np.full((n_layers, n_experts, replica.max(initial=0) + 1), -1, np.int32)
    physical[np.arange(n_layers)[:, None], logical, replica] = np.arange(n_replicas)[None, :]
    return ExpertPlacement(logical, physical, (physical >= 0).sum(-1, dtype=np.int32))


def choose_redundant(
    load: Num[np.ndarray, "..."], n_redundant: int, n_nodes: int, n_ranks: int
) -> Int[np.ndarray, "L R"]:
    """Choose the logical expert in each redundant slot.

    Expert e has its home on rank e // (E / n_ranks), and its replicas stay in that rank's node;
    redundant slot s is on rank s // (R / n_ranks). No rank holds an expert twice, with two
    exceptions: a rank with more slots than its node has experts, and a node whose busiest rank
    would become busier. All slots of such a node are idle: they repeat experts of their own rank.

    Args:
        load: the load of each logical expert [L E].
        n_redundant: the number of redundant slots R.

    Raises:
        ValueError: sizes that do not divide, or a bad load.
    """
    n_layers, n_experts = _checked_shape(load)
    _check_multiple("n_experts", n_experts, "n_ranks", n_ranks)
    _check_multiple("n_redundant", n_redundant, "n_ranks", n_ranks)
    _check_multiple("n_ranks", n_ranks, "n_nodes", n_nodes)
    nodes = load.astype(np.float64).reshape(n_layers, n_nodes, n_experts // n_nodes)
    out = np.zeros((n_layers, n_nodes, n_redundant // n_nodes), np.int32)
    for layer, node in np.ndindex(n_layers, n_nodes):
        chosen = _choose_in_node(nodes[layer, node], out.shape[2], n_ranks // n_nodes)
        out[layer, node] = chosen + node * nodes.shape[2]
    return out.reshape(n_layers, n_redundant)


def _checked_shape(load: np.ndarray) -> tuple[int, int]:
    if load.ndim != 2:
        raise ValueError(f"load has shape {load.shape}, expected [layers, experts]")
    bad = np.argwhere(~(np.isfinite(load) & (load >= 0)))
    if bad.size:
        index = tuple(bad[0].tolist())
        raise ValueError(f"load{list(index)}={load[index]} must be finite and not negative")
    return load.shape


def _check_multiple(name: str, size: int, of_name: str, of: int):
    if of < 1 or size < 0 or size % of:
        raise ValueError(f"{name}={size} must be a multiple of {of_name}={of}, which is at least 1")


def _rebalance_layer(load, n_replicas: int, n_groups: int, n_nodes: int, n_ranks: int):
    """Return for each physical expert of a layer [2 P]: its logical expert, and which replica."""
    groups = np.arange(load.size).reshape(n_groups, -1)
    nodes = []
    for node_groups in _balanced_packing(load[groups].sum(1), np.zeros(n_nodes)):
        experts = groups[node_groups].reshape(-1)
        replicas = _replicate(load[experts], n_replicas // n_nodes)
        number = np.tril(replicas[:, None] == replicas[None, :], -1).sum(1)
        load_per_replica = load[experts] / np.bincount(replicas).astype(load.dtype)
        ranks = _balanced_packing(load_per_replica[replicas], np.zeros(n_ranks // n_nodes))
        slots = ranks.reshape(-1)
        nodes.append((experts[replicas[slots]], number[slots]))
    return np.concatenate(nodes, axis=1)


def _replicate(load: np.ndarray, n_replicas: int) -> np.ndarray:
    """Return each replica's expert: all experts once, then always the one of most per replica."""
    replicas, count = np.arange(n_replicas), np.ones_like(load)
    for i in range(load.size, n_replicas):
        replicas[i] = np.argmax(load / count)
        count[replicas[i]] += 1
    return replicas


def _balanced_packing(weight: np.ndarray, initial: np.ndarray) -> np.ndarray:
    """Pack equally many items into each pack, the heaviest first, each into the lightest pack.

    Args:
        weight: of each item.
        initial: what each pack weighs before.

    Returns:
        The items of each pack [packs n].
    """
    packs = np.arange(weight.size).reshape(initial.size, weight.size // initial.size)
    if packs.shape[1] == 1 and not initial.any():  # nothing to balance: EPLB keeps the order
        return packs
    total, size = initial.astype(weight.dtype), np.zeros(initial.size, int)
    for item in np.argsort(-weight, kind="stable"):
        pack = np.argmin(np.where(size < packs.shape[1], total, np.inf))
        packs[pack, size[pack]] = item
        total[pack] += weight[item]
        size[pack] += 1
    return packs


def _choose_in_node(load: np.ndarray, n_redundant: int, n_ranks: int) -> np.ndarray:
    """Choose the redundant experts [R] of one node and layer, as indices within the node."""
    homes = np.arange(load.size).reshape(n_ranks, -1)
    redundant = np.sort(_replicate(load, load.size + n_redundant)[load.size :])
    load_per_replica = load / (1 + np.bincount(redundant, minlength=load.size))
    packs = _balanced_packing(load_per_replica[redundant], load_per_replica[homes].sum(1))
    slots = _improve_by_swaps(load, homes, redundant[packs])
    busiest = _rank_loads(load, _replicas_per_rank(homes, slots)).max()
    if busiest > load[homes].sum(1).max() * TIE:
        slots = homes[:, np.arange(slots.shape[1]) % homes.shape[1]]
    return slots.reshape(-1)


def _improve_by_swaps(load: np.ndarray, homes: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Change redundant experts `slots` [ranks n] one at a time while that balances the ranks.

    A slot takes the expert, among those that its rank lacks, with the least sum of squared loads of
    the ranks. The sum falls with every change, so this ends. Without it about twice the imbalance
    remains, since experts are replicated for their own load only, and ranks hold some twice.
    """
    count, rank_ids = _replicas_per_rank(homes, slots), np.eye(len(slots))
    while True:
        before = slots.copy()
        for rank, slot in np.ndindex(slots.shape):
            count[slots[rank, slot], rank] -= 1
            total = count.sum(1, keepdims=True)
            change = (count + rank_ids[rank][None, :]) / (total + 1) - count / total
            cost = ((_rank_loads(load, count)[None, :] + load[:, None] * change) ** 2).sum(1)
            cost[(count[:, rank] > 0) & (count[:, rank] == 0).any()] = np.inf
            best = cost <= cost.min() * TIE
            if not best[slots[rank, slot]]:
                slots[rank, slot] = np.argmax(best)
            count[slots[rank, slot], rank] += 1
        if (slots == before).all():
            return slots


def _replicas_per_rank(homes: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Count each expert's replicas on each rank [E ranks], at home and in redundant slots."""
    rows = np.concatenate([homes, slots], axis=1)
    return np.stack([np.bincount(row, minlength=homes.size) for row in rows], axis=1)


def _rank_loads(load: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Return the load of each rank, for the replicas of each expert on each rank [E ranks]."""
    return (load[:, None] * count / count.sum(1, keepdims=True)).sum(0)
