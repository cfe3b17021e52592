"""Experts on ranks: equal to EPLB's published results; redundant experts keep their promises."""

import itertools
import json

import numpy as np
import pytest
from reference.expert_load import rank_load, with_homes
from reference.goldens import GOLDENS

from sharding.eplb import choose_redundant, rebalance_experts

EPLB = json.loads((GOLDENS / "F_eplb" / "eplb.json").read_text())

# layers, groups, experts a group, nodes, ranks a node, replicas more than experts
SHAPES = [
    (3, 4, 5, 2, 2, 8),
    (2, 3, 5, 2, 3, 9),  # groups do not divide over nodes: global
    (5, 6, 2, 3, 4, 0),  # one replica a rank: nothing to pack
    (2, 1, 7, 1, 5, 8),
]
# layers, nodes, ranks a node, experts a rank, redundant slots a rank
REDUNDANT = [(3, 2, 4, 5, 1), (2, 1, 8, 3, 2), (4, 3, 2, 6, 1), (2, 5, 4, 2, 3), (2, 2, 3, 16, 4)]


def sizes(case: dict) -> tuple:
    return tuple(case[name] for name in ("num_replicas", "num_groups", "num_nodes", "num_gpus"))


def skewed(*shape: int, seed: int = 0) -> np.ndarray:
    """Loads in every order, of which a few are far larger than most."""
    return np.random.default_rng(seed).lognormal(3.0, 1.2, shape)


def tied(*shape: int) -> np.ndarray:
    """Loads of which many are equal; equal shares of up to six replicas are whole numbers."""
    return 60.0 * np.random.default_rng(3).integers(1, 4, shape)


def zipf(n_layers: int, n_experts: int, seed: int = 0) -> np.ndarray:
    ranked = np.tile(1000 / np.arange(1.0, n_experts + 1), (n_layers, 1))
    return np.random.default_rng(seed).permuted(ranked, axis=1)


def redundant_of(load, shape) -> np.ndarray:
    _, n_nodes, n_ranks, _, n_redundant = shape
    return choose_redundant(load, n_nodes * n_ranks * n_redundant, n_nodes, n_nodes * n_ranks)


def before_and_after(load, shape) -> tuple[np.ndarray, np.ndarray]:
    """Load of each rank [L nodes ranks] without redundant experts and with them."""
    n_layers, n_nodes, n_ranks, _, _ = shape
    slots = with_homes(redundant_of(load, shape), load.shape[1], n_nodes * n_ranks)
    after = rank_load(load, slots, n_nodes * n_ranks)
    homes = load.reshape(n_layers, n_nodes, n_ranks, -1).sum(-1)
    return homes, after.reshape(homes.shape)


@pytest.mark.parametrize("name", EPLB)
def test_rebalance_equals_the_published_balancer(name):
    """All exact, but for the ranks' loads, which were summed in float32: 1e-4 of up to 1800."""
    case = EPLB[name]
    load = np.array(case["weight"])
    got = rebalance_experts(load, *sizes(case))
    np.testing.assert_array_equal(got.physical_to_logical, case["phy2log_stable_sort"])
    np.testing.assert_array_equal(got.logical_to_physical, case["log2phy_stable_sort"])
    np.testing.assert_array_equal(got.replica_count, case["logcnt"])
    ranks = rank_load(load, got.physical_to_logical, case["num_gpus"])
    np.testing.assert_allclose(ranks, case["gpu_load"], atol=1e-4, rtol=0)


def pack_slowly(weights: list, n_packs: int) -> list[list[int]]:
    room = len(weights) // n_packs
    if room == 1:
        return [[item] for item in range(n_packs)]
    packs = [[] for _ in range(n_packs)]
    for item in sorted(range(len(weights)), key=lambda item: -weights[item]):
        open_packs = [pack for pack in packs if len(pack) < room]
        min(open_packs, key=lambda pack: sum(weights[i] for i in pack)).append(item)
    return packs


def balance_slowly(load: list, n_replicas: int, n_groups: int, n_nodes: int, n_ranks: int) -> list:
    """The expert in each slot of one layer, in plain Python."""
    if n_groups % n_nodes:
        return balance_slowly(load, n_replicas, 1, 1, n_ranks)
    size = len(load) // n_groups
    groups = [list(range(first, first + size)) for first in range(0, len(load), size)]
    slots = []
    for pack in pack_slowly([sum(load[e] for e in group) for group in groups], n_nodes):
        replicas = [expert for group in pack for expert in groups[group]]
        experts = list(replicas)
        while len(replicas) < n_replicas // n_nodes:
            replicas.append(max(experts, key=lambda e: load[e] / replicas.count(e)))
        shares = [load[e] / replicas.count(e) for e in replicas]
        slots += [replicas[i] for rank in pack_slowly(shares, n_ranks // n_nodes) for i in rank]
    return slots


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", [skewed, tied])
def test_rebalance_equals_a_slow_twin(shape, kind):
    n_layers, n_groups, size, n_nodes, n_ranks, more = shape
    load = kind(n_layers, n_groups * size).astype(np.float32)
    args = (n_groups * size + more, n_groups, n_nodes, n_nodes * n_ranks)
    want = [balance_slowly(row.tolist(), *args) for row in load]
    np.testing.assert_array_equal(rebalance_experts(load, *args).physical_to_logical, want)


@pytest.mark.parametrize("name", EPLB)
def test_rebalance_is_consistent(name):
    case = EPLB[name]
    n_replicas, n_groups, n_nodes, n_ranks = sizes(case)
    load = skewed(5, len(case["weight"][0]), seed=1)
    got = rebalance_experts(load, *sizes(case))
    assert all(field.dtype == np.int32 for field in got)
    assert (
        got.replica_count >= 1
    ).all() and got.replica_count.max() == got.logical_to_physical.shape[2]
    np.testing.assert_array_equal(got.replica_count.sum(1), n_replicas)
    for layer, expert in np.ndindex(load.shape):
        count = got.replica_count[layer, expert]
        slots = got.logical_to_physical[layer, expert]
        assert (
            sorted(slots[:count])
            == np.flatnonzero(got.physical_to_logical[layer] == expert).tolist()
        )
        assert (slots[count:] == -1).all()
    if n_groups % n_nodes == 0:
        group = got.physical_to_logical.reshape(5, n_nodes, -1) // (load.shape[1] // n_groups)
        held = [len({*node}) for layer in group for node in layer.tolist()]
        assert set(held) == {n_groups // n_nodes}
    total = rank_load(load, got.physical_to_logical, n_ranks).sum(1)
    np.testing.assert_allclose(total, load.sum(1), rtol=1e-12)  # sums of float64


@pytest.mark.parametrize("shape", REDUNDANT)
@pytest.mark.parametrize("kind", [skewed, zipf])
def test_redundant_experts_stay_in_their_node_and_not_twice_on_a_rank(shape, kind):
    n_layers, n_nodes, n_ranks, n_home, n_redundant = shape
    n_experts = n_nodes * n_ranks * n_home
    load = kind(n_layers, n_experts)
    got = redundant_of(load, shape)
    assert got.shape == (n_layers, n_nodes * n_ranks * n_redundant) and got.dtype == np.int32
    node = np.arange(got.shape[1]) // (n_ranks * n_redundant)
    np.testing.assert_array_equal(got // (n_ranks * n_home), np.tile(node, (n_layers, 1)))
    slots = with_homes(got, n_experts, n_nodes * n_ranks)
    ranks = slots.reshape(n_layers, n_nodes, n_ranks, n_home + n_redundant)
    homes = np.arange(n_experts).reshape(n_nodes, n_ranks, n_home)
    for layer, node in np.ndindex(n_layers, n_nodes):
        held = ranks[layer, node]
        np.testing.assert_array_equal(held[:, :n_home], homes[node])
        idle = all({*row} == {*row[:n_home]} for row in held.tolist())
        assert idle or all(len({*row}) == len(row) for row in held.tolist())


@pytest.mark.parametrize("shape", REDUNDANT)
@pytest.mark.parametrize("seed", range(5))
def test_redundant_experts_make_no_node_busier(shape, seed):
    n_experts = np.prod(shape[1:4])
    even = 1 + 0.1 * skewed(shape[0], n_experts, seed=seed) / 20
    for load in (skewed(shape[0], n_experts, seed=seed), even, np.round(even)):
        before, after = before_and_after(load, shape)
        assert (after.max(-1) <= before.max(-1) * (1 + 1e-8)).all()  # the code's own slack
        np.testing.assert_allclose(after.sum(-1), before.sum(-1), rtol=1e-12)  # float64 sums


def test_redundant_experts_balance_zipf_loads():
    """The busiest of 8 ranks has 2.4 times the mean load, with one slot per rank 1.1 times."""
    shape = (20, 1, 8, 4, 1)
    load = zipf(20, 32)
    busiest = [x.max(-1).mean() / x.mean() for x in before_and_after(load, shape)]
    assert busiest[0] > 2.2 and busiest[1] < 1.15


def test_redundant_experts_are_idle_where_they_would_harm():
    """Of node 0's two ranks, one would get busier whatever they take; of node 1's, none."""
    load = np.array([[10.0, 10.0, 19.9, 0.1, 30.0, 2.0, 4.0, 4.0]])
    got = choose_redundant(load, 4, 2, 4)
    np.testing.assert_array_equal(got, [[0, 2, 6, 4]])
    ranks = rank_load(load, with_homes(got, 8, 4), 4)
    np.testing.assert_allclose(ranks, [[20.0, 20.0, 19.0, 21.0]], rtol=1e-15)  # few, short sums


def every_choice(load, homes, n_slots):
    """All choices without repeats, for one layer of one node, and the ranks' loads."""
    lacking = [sorted({*range(load.size)} - {*home}) for home in homes.tolist()]
    per_rank = [itertools.combinations(experts, n_slots) for experts in lacking]
    for slots in itertools.product(*per_rank):
        share = load / (1 + np.bincount(np.ravel(slots), minlength=load.size))
        yield slots, share[np.concatenate([homes, slots], axis=1)].sum(1)


def changes(slots, others) -> int:
    return sum(len({*a} - {*b}) for a, b in zip(slots, others, strict=True))


@pytest.mark.parametrize("n_ranks, n_home, n_slots", [(3, 2, 1), (3, 2, 2), (2, 4, 1), (4, 1, 2)])
def test_redundant_experts_are_near_the_best_of_all(n_ranks, n_home, n_slots):
    """The busiest rank is near the optimum (these bounds are of a greedy algorithm), and no change
    of a single slot evens the ranks out further: the squares' sum is the least but for rounding."""
    homes = np.arange(n_ranks * n_home).reshape(n_ranks, n_home)
    load = skewed(12, homes.size, seed=2)
    shape = (12, 1, n_ranks, n_home, n_slots)
    chosen = redundant_of(load, shape).reshape(12, n_ranks, n_slots).tolist()
    before, after = (x[:, 0] for x in before_and_after(load, shape))
    ratios = []
    for i, row in enumerate(load):
        choices = list(every_choice(row, homes, n_slots))
        best = min(before[i].max(), *(ranks.max() for _, ranks in choices))
        ratios.append(after[i].max() / best)
        near = [ranks for slots, ranks in choices if changes(slots, chosen[i]) == 1]
        least = min((ranks**2).sum() for ranks in near)
        idle = np.allclose(before[i], after[i])
        assert idle or (after[i] ** 2).sum() <= least * (1 + 1e-8)
    assert min(ratios) > 1 - 1e-12 and max(ratios) < 1.25 and np.mean(ratios) < 1.06, ratios


def test_ties_go_to_the_lowest_index():
    """Rank 0's experts are equally busy, 0 comes first; rank 1's are unused, 2 comes first."""
    np.testing.assert_array_equal(
        choose_redundant(np.array([[4.0, 4.0, 0.0, 0.0]]), 2, 1, 2), [[2, 0]]
    )


@pytest.mark.parametrize("kind", [np.zeros, np.ones, lambda shape: zipf(*shape)])
def test_same_loads_same_placement(kind):
    """Layers do not depend on each other, nor results on what was called before."""
    load = kind((3, 24))
    load.flags.writeable = False
    np.testing.assert_array_equal(
        choose_redundant(load, 16, 2, 8), choose_redundant(load[::-1], 16, 2, 8)[::-1]
    )
    first, second = rebalance_experts(load, 32, 4, 2, 8), rebalance_experts(load[::-1], 32, 4, 2, 8)
    for a, b in zip(first, second, strict=True):
        np.testing.assert_array_equal(a, b[::-1])


def test_more_slots_than_experts():
    """Two ranks of one expert, three redundant slots each: both experts on both, then repeats."""
    got = choose_redundant(np.array([[5.0, 1.0]]), 6, 1, 2).reshape(2, 3)
    assert 1 in got[0] and 0 in got[1]


def test_no_redundant_experts():
    load = skewed(3, 8)
    got = choose_redundant(load, 0, 2, 4)
    assert got.shape == (3, 0)
    ranks = rank_load(load, with_homes(got, 8, 4), 4)
    np.testing.assert_allclose(ranks, load.reshape(3, 4, 2).sum(-1), rtol=1e-15)  # the same sums


@pytest.mark.parametrize(
    "change, fragments",
    [
        ({"n_replicas": 8}, ["n_replicas=8", "n_experts=12"]),
        ({"n_replicas": 14}, ["n_replicas=14", "n_ranks=4"]),
        ({"n_groups": 5}, ["n_experts=12", "n_groups=5"]),
        ({"n_groups": 0}, ["n_experts=12", "n_groups=0"]),
        ({"n_groups": 3, "n_nodes": 3}, ["n_ranks=4", "n_nodes=3"]),
        ({"n_nodes": 0}, ["n_ranks=4", "n_nodes=0"]),
        ({"n_ranks": 0}, ["n_replicas=16", "n_ranks=0"]),
        ({"load": np.ones(12)}, ["load", "(12,)"]),
        ({"load": np.ones((2, 3, 4))}, ["load", "(2, 3, 4)"]),
        ({"load": np.array([[1.0, 2.0], [3.0, -4.0]])}, ["load[1, 1]=-4.0"]),
        ({"load": np.array([[1.0, np.nan]])}, ["load[0, 1]=nan"]),
        ({"load": np.array([[np.inf, 1.0]])}, ["load[0, 0]=inf"]),
    ],
)
def test_rebalance_rejects(change, fragments):
    args = {"load": np.ones((2, 12)), "n_replicas": 16, "n_groups": 2, "n_nodes": 2, "n_ranks": 4}
    rebalance_experts(**args)
    with pytest.raises(ValueError) as error:
        rebalance_experts(**args | change)
    assert all(fragment in str(error.value) for fragment in fragments), error.value


@pytest.mark.parametrize(
    "change, fragments",
    [
        ({"n_redundant": 6}, ["n_redundant=6", "n_ranks=4"]),
        ({"n_redundant": -4}, ["n_redundant=-4", "n_ranks=4"]),
        ({"n_ranks": 8}, ["n_experts=12", "n_ranks=8"]),
        ({"n_nodes": 3}, ["n_ranks=4", "n_nodes=3"]),
        ({"n_nodes": 0}, ["n_ranks=4", "n_nodes=0"]),
        ({"load": np.ones(12)}, ["load", "(12,)"]),
        ({"load": -np.ones((2, 12))}, ["load[0, 0]=-1.0"]),
        ({"load": np.full((2, 12), np.nan)}, ["load[0, 0]=nan"]),
    ],
)
def test_choose_redundant_rejects(change, fragments):
    args = {"load": np.ones((2, 12)), "n_redundant": 8, "n_nodes": 2, "n_ranks": 4}
    choose_redundant(**args)
    with pytest.raises(ValueError) as error:
        choose_redundant(**args | change)
    assert all(fragment in str(error.value) for fragment in fragments), error.value
