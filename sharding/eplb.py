"""Which experts lie on which ranks when busy experts have replicas ("redundant experts").

`balanced` is for serving: any expert on any rank, found as the published balancer does (EPLB).
`extras` is for training: every expert keeps its home, and a few more slots a rank hold replicas.
A rank's slots stand side by side, as do a node's ranks; an expert's load (tokens, or any unit) is
shared equally among its replicas. L layers, E experts, R slots, X the most replicas of an expert.

Source: DeepSeek-V3 report (arXiv 2412.19437), sec. 3.4; EPLB (github.com/deepseek-ai/EPLB).
"""

from typing import NamedTuple

import numpy as np

SLACK = 1 + 1e-9  # costs closer than this are a tie, whatever the order of their sums


class ExpertPlacement(NamedTuple):
    """What lies where; slot s is on rank s // (R / n_ranks)."""

    expert_of: np.ndarray  # int32 [L R], the expert in each slot
    replicas_of: np.ndarray  # int32 [L E X], the slots of each expert, then -1
    count: np.ndarray  # int32 [L E], replicas of each expert


def rebalance_experts(
    load: np.ndarray, n_replicas: int, n_groups: int, n_nodes: int, n_ranks: int
) -> ExpertPlacement:
    """Replicas and places of all experts, as EPLB has them: in float32, but with stable sorts.

    Groups are packed onto nodes, experts replicated within each node, and replicas packed onto the
    node's ranks. If the nodes cannot have equally many groups, all ranks count as one node.

    Args:
        load: [L E].
        n_replicas: R, at least E.
        n_groups: groups of experts that the router knows; a group stays within a node.

    Raises:
        ValueError: sizes that do not divide, fewer replicas than experts, or a bad load.
    """
    n_layers, n_experts = _checked_shape(load)
    if n_replicas < n_experts:
        raise ValueError(f"n_replicas={n_replicas} is less than the n_experts={n_experts} of load")
    _check_multiple("n_replicas", n_replicas, "n_ranks", n_ranks)
    _check_multiple("n_experts", n_experts, "n_groups", n_groups)
    if n_nodes > 0 and n_groups % n_nodes:
        n_groups = n_nodes = 1
    _check_multiple("n_ranks", n_ranks, "n_nodes", n_nodes)
    expert_of, number = np.zeros((2, n_layers, n_replicas), np.int32)
    for i, row in enumerate(load.astype(np.float32)):
        expert_of[i], number[i] = _balanced_layer(row, n_replicas, n_groups, n_nodes, n_ranks)
    replicas_of = np.full((n_layers, n_experts, number.max(initial=0) + 1), -1, np.int32)
    replicas_of[np.arange(n_layers)[:, None], expert_of, number] = np.arange(n_replicas)[None, :]
    return ExpertPlacement(expert_of, replicas_of, (replicas_of >= 0).sum(-1, dtype=np.int32))


def choose_redundant(load: np.ndarray, n_extra: int, n_nodes: int, n_ranks: int) -> np.ndarray:
    """Loads [L E] -> the expert in each extra slot, int32 [L n_extra].

    Expert e is at home on rank e // (E / n_ranks), and its extras lie in that rank's node; slot s
    is on rank s // (n_extra / n_ranks). No rank holds an expert twice, unless it has more slots
    than its node has experts, or extras would make the node's busiest rank busier: all of that
    node's are then idle, repeating what is at home on their rank.

    Raises:
        ValueError: sizes that do not divide, or a bad load.
    """
    n_layers, n_experts = _checked_shape(load)
    _check_multiple("n_experts", n_experts, "n_ranks", n_ranks)
    _check_multiple("n_extra", n_extra, "n_ranks", n_ranks)
    _check_multiple("n_ranks", n_ranks, "n_nodes", n_nodes)
    nodes = load.astype(np.float64).reshape(n_layers, n_nodes, n_experts // n_nodes)
    out = np.zeros((n_layers, n_nodes, n_extra // n_nodes), np.int32)
    for place in np.ndindex(n_layers, n_nodes):
        out[place] = _node_extras(nodes[place], out.shape[2], n_ranks // n_nodes)
        out[place] += place[1] * nodes.shape[2]
    return out.reshape(n_layers, n_extra)


def with_homes(extra: np.ndarray, n_experts: int, n_ranks: int) -> np.ndarray:
    """`extras` -> the expert in every slot, int32 [L E+n_extra]: a rank's own, then its extras."""
    rows = extra.reshape(len(extra), n_ranks, extra.shape[1] // n_ranks)
    homes = np.arange(n_experts, dtype=np.int32).reshape(1, n_ranks, -1).repeat(len(extra), axis=0)
    return np.concatenate([homes, rows], axis=2).reshape(len(extra), -1)


def rank_load(load: np.ndarray, expert_of: np.ndarray, n_ranks: int) -> np.ndarray:
    """Loads [L E] -> of each rank [L n_ranks], for `Placement.expert_of` or `with_homes` [L R].

    Raises:
        ValueError: slots that the ranks cannot share equally, or an expert without a slot.
    """
    _check_multiple("slots", expert_of.shape[1], "n_ranks", n_ranks)
    count = (expert_of[:, :, None] == np.arange(load.shape[1])[None, None, :]).sum(1)
    if not count.all():
        layer, expert = np.argwhere(count == 0)[0]
        raise ValueError(f"expert {expert} has no slot in layer {layer}; with_homes adds the homes")
    slots = np.take_along_axis(load / count, expert_of.astype(np.int64), axis=1)
    return slots.reshape(len(load), n_ranks, -1).sum(-1)


def _checked_shape(load: np.ndarray) -> tuple[int, int]:
    if load.ndim != 2:
        raise ValueError(f"load has shape {load.shape}, expected [layers, experts]")
    bad = np.argwhere(~(np.isfinite(load) & (load >= 0)))
    if bad.size:
        at = tuple(bad[0].tolist())
        raise ValueError(f"load{list(at)}={load[at]} must be finite and not negative")
    return load.shape


def _check_multiple(name: str, size: int, of_name: str, of: int):
    if of < 1 or size < 0 or size % of:
        raise ValueError(f"{name}={size} must be a multiple of {of_name}={of}, which is at least 1")


def _balanced_layer(load, n_replicas: int, n_groups: int, n_nodes: int, n_ranks: int):
    """The expert in each slot of one layer, and how many replicas of it were made before: [2 R]."""
    groups = np.arange(load.size).reshape(n_groups, -1)
    parts = []
    for members in _pack(load[groups].sum(1), np.zeros(n_nodes)):
        experts = groups[members].reshape(-1)
        replicas = _replicate(load[experts], n_replicas // n_nodes)
        number = np.tril(replicas[:, None] == replicas[None, :], -1).sum(1)
        share = load[experts] / np.bincount(replicas).astype(load.dtype)
        slots = _pack(share[replicas], np.zeros(n_ranks // n_nodes)).reshape(-1)
        parts.append((experts[replicas[slots]], number[slots]))
    return np.concatenate(parts, axis=1)


def _replicate(load: np.ndarray, n_replicas: int) -> np.ndarray:
    """Expert of each replica: all experts once, then always that of most load per replica."""
    replicas, count = np.arange(n_replicas), np.ones_like(load)
    for i in range(load.size, n_replicas):
        replicas[i] = np.argmax(load / count)
        count[replicas[i]] += 1
    return replicas


def _pack(weight: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Items [packs n]: heaviest first to the lightest pack with room, which hold `total` before."""
    packs = np.arange(weight.size).reshape(total.size, weight.size // total.size)
    if packs.shape[1] == 1 and not total.any():  # nothing to even out: EPLB keeps the order
        return packs
    total, size = total.astype(weight.dtype), np.zeros(total.size, int)
    for item in np.argsort(-weight, kind="stable"):
        pack = np.argmin(np.where(size < packs.shape[1], total, np.inf))
        packs[pack, size[pack]] = item
        total[pack] += weight[item]
        size[pack] += 1
    return packs


def _node_extras(load: np.ndarray, n_extra: int, n_ranks: int) -> np.ndarray:
    """`extras` of one node and layer: loads [E] -> experts [n_extra], counted within the node."""
    homes = np.arange(load.size).reshape(n_ranks, -1)
    chosen = np.sort(_replicate(load, load.size + n_extra)[load.size :])
    share = load / (1 + np.bincount(chosen, minlength=load.size))
    slots = _improved(load, homes, chosen[_pack(share[chosen], share[homes].sum(1))])
    if _loads(load, _holdings(homes, slots)).max() > load[homes].sum(1).max() * SLACK:
        slots = homes[:, np.arange(slots.shape[1]) % homes.shape[1]]
    return slots.reshape(-1)


def _improved(load: np.ndarray, homes: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Experts in `slots` [ranks n], changed one at a time while that evens the ranks' loads out.

    A slot takes the expert, of those that its rank lacks, with the least sum of squared loads; the
    sum falls with every change, so this ends. Without it about twice the imbalance remains, since
    experts are replicated for their own load only, and ranks hold some twice.
    """
    holds, rank_ids = _holdings(homes, slots), np.eye(len(slots))
    while True:
        before = slots.copy()
        for rank, place in np.ndindex(slots.shape):
            holds[slots[rank, place], rank] -= 1
            count = holds.sum(1, keepdims=True)
            change = (holds + rank_ids[rank][None, :]) / (count + 1) - holds / count
            cost = ((_loads(load, holds)[None, :] + load[:, None] * change) ** 2).sum(1)
            cost[(holds[:, rank] > 0) & (holds[:, rank] == 0).any()] = np.inf
            good = cost <= cost.min() * SLACK
            if not good[slots[rank, place]]:
                slots[rank, place] = np.argmax(good)
            holds[slots[rank, place], rank] += 1
        if (slots == before).all():
            return slots


def _holdings(homes: np.ndarray, slots: np.ndarray) -> np.ndarray:
    """Replicas of each expert on each rank [E ranks], in `homes` [ranks e] or `slots` [ranks n]."""
    rows = np.concatenate([homes, slots], axis=1)
    return np.stack([np.bincount(row, minlength=homes.size) for row in rows], axis=1)


def _loads(load: np.ndarray, holds: np.ndarray) -> np.ndarray:
    """Load of each rank, for the replicas on each [E ranks]."""
    return (load[:, None] * holds / holds.sum(1, keepdims=True)).sum(0)
