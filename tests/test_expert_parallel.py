"""The expert exchange: exact for every routing, in any number of rounds, on every mesh.

Rows, weights, experts and cotangents are small integers, and everything is a sum of products of
them, so float32 is exact and results must be EQUAL to the NumPy twin's, values and gradients.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from reference.exchange import expert_sum, expert_sum_gradients, n_rounds, pair_counts

from sharding.expert_parallel import (
    Route,
    capacity_of,
    combine,
    dispatch,
    exchange,
    plan_rounds,
)
from sharding.mesh import BATCH, EXPERT_AXES, make_mesh, parse_mesh, region

T, K, E, D, O = 88, 3, 24, 5, 4  # noqa: E741 - the letters of shapes.py
EXPERTS = PartitionSpec(EXPERT_AXES)
GROUPS = PartitionSpec("dp")
N_RANDOM, N_ADVERSARIAL = 500, 100


def integers(rng, *sizes):
    return rng.integers(-3, 4, sizes).astype(np.float32)


def pick(rng, probability, n=T):
    """Ids [n K], distinct within a row, drawn with the given probability of each expert."""
    noise = rng.gumbel(size=(n, E)) + np.log(np.maximum(probability, 1e-30))
    return np.argsort(-noise, axis=-1)[:, :K].astype(np.int32)


def only(experts):
    return np.isin(np.arange(E), experts).astype(float)


def adversarial(rng) -> dict[str, np.ndarray]:
    """Ids [T K] of routings that break exchanges; random in what the name leaves open."""
    tokens = np.arange(T)
    one, rank, node = rng.integers(E), rng.integers(8), rng.integers(2)
    to_one = pick(rng, 1.0 - only([one]))
    to_one[:, rng.integers(K)] = one
    lonely = pick(rng, only(range(3)))
    lonely[rng.integers(T)] = [E - 1, 0, E // 2]
    same = np.tile(pick(rng, np.ones(E), 1), (T, 1))
    own_rank = tokens[:, None] // 11 * 3 + np.argsort(rng.uniform(size=(T, K)), axis=-1)
    zipf = (1.0 / np.arange(1, E + 1) ** 1.5)[rng.permutation(E)]
    half = np.where(tokens[:, None] < T // 2, own_rank % 3, pick(rng, np.ones(E)))
    return {
        "one expert": to_one,
        "the same K experts": same,
        "one rank": pick(rng, only(np.arange(3) + 3 * rank)),
        "one node": pick(rng, only(np.arange(12) + 12 * node)),
        "the last rank": pick(rng, only(np.arange(E - 3, E))),
        "one token elsewhere": lonely,
        "empty ranks": pick(rng, only(rng.permutation(E)[: E // 4])),
        "odd experts": pick(rng, only(np.arange(1, E, 2))),
        "every token at home": own_rank.astype(np.int32),
        "every token next door": ((own_rank + 3) % E).astype(np.int32),
        "round robin": (tokens[:, None] * K + np.arange(K)[None, :]).astype(np.int32) % E,
        "sorted tokens": np.sort(pick(rng, np.ones(E)), axis=0),
        "half of the devices crowd": half.astype(np.int32),
        "zipf": pick(rng, zipf),
    }


@functools.cache
def cases() -> list[tuple]:
    """(name, inputs, expected y and gradients) of all routings, from the twin."""
    rng = np.random.default_rng(0)
    routings = [("random", pick(rng, np.ones(E))) for _ in range(N_RANDOM)]
    while len(routings) < N_RANDOM + N_ADVERSARIAL:
        routings += adversarial(rng).items()
    out = []
    for name, ids in routings:
        matrices, rows = integers(rng, E, O, D), integers(rng, T, D)
        weights, cotangent = integers(rng, T, K), integers(rng, T, O)
        inputs = (matrices, rows, weights, ids, cotangent)
        want = (
            expert_sum(*inputs[:4]),
            *expert_sum_gradients(*inputs),
        )
        out.append((name, inputs, want))
    return out


def apply_matrices(matrices, rows, weights, sizes):
    """weight * M_expert row of rows grouped by expert; zero beyond the last group."""
    experts = jnp.searchsorted(jnp.cumsum(sizes), jnp.arange(rows.shape[0]), side="right")
    gates = jax.nn.one_hot(experts, matrices.shape[0]) * weights[:, None]
    return jnp.einsum("re,rD,eOD->rO", gates, rows, matrices)


@functools.cache
def program(mesh_text: str, capacity: int):
    """(matrices, rows, weights, ids, cotangent) -> y, their gradients, counts, rounds."""
    spec = parse_mesh(mesh_text)
    mesh = make_mesh(spec, jax.devices()[: spec.n_devices])
    route = Route(spec, E, capacity)

    def shard(matrices, rows, weights, ids, cotangent):
        run = functools.partial(exchange, apply_matrices, ids=ids, route=route)
        y, pull, plan = jax.vjp(lambda *x: run(*x), matrices, rows, weights, has_aux=True)
        d_matrices, d_rows, d_weights = pull(cotangent)
        d_matrices = jax.lax.psum(d_matrices, "dp")
        return y, d_matrices, d_rows, d_weights, plan.count[None], plan.n_rounds[None]

    return jax.jit(
        region(
            shard,
            mesh,
            in_specs=(EXPERTS, BATCH, BATCH, BATCH, BATCH),
            out_specs=(BATCH, EXPERTS, BATCH, BATCH, BATCH, GROUPS),
        )
    ), spec


def check(mesh_text: str, capacity: int, chosen: list[tuple]):
    run, spec = program(mesh_text, capacity)
    most_rounds = 0
    for name, inputs, want in chosen:
        *got, counts, rounds = map(np.asarray, run(*inputs))
        parts = zip(("y", "d_experts", "d_rows", "d_weights"), got, want, strict=True)
        for part, a, b in parts:
            np.testing.assert_array_equal(a, b, err_msg=f"{part} of {name!r}")
        ids = inputs[3]
        sizes = pair_counts(ids, spec.dp, spec.ep, E)
        np.testing.assert_array_equal(counts, sizes.reshape(counts.shape), err_msg=name)
        expected = n_rounds(ids, spec.dp, spec.ep, E, capacity)
        np.testing.assert_array_equal(rounds, expected, err_msg=name)
        sent = np.minimum(sizes, rounds[:, None, None] * capacity).sum()
        assert sent == ids.size, f"{name!r}: {ids.size} pairs routed, {sent} sent"
        most_rounds = max(most_rounds, rounds.max())
    return most_rounds


@pytest.mark.parametrize(
    "mesh, capacity, most_rounds",
    [
        ("ep1", 264, 1),  # all in one round
        ("ep1", 40, 7),
        ("ep4", 16, 5),
        ("ep8", 5, 7),
        ("ep2x4", 8, 5),
        ("dp2,ep4", 8, 5),
        ("dp2,ep2x2", 33, 1),  # the most that can happen fits
    ],
)
def test_adversarial_routings(mesh, capacity, most_rounds):
    assert check(mesh, capacity, cases()[N_RANDOM:]) == most_rounds


@pytest.mark.parametrize("mesh, capacity", [("ep1", 264), ("ep4", 16), ("ep2x4", 8), ("ep8", 5)])
def test_random_routings(mesh, capacity):
    check(mesh, capacity, cases()[:N_RANDOM])


def test_groups_with_different_rounds():
    """One dp group balanced, the other crowded: each runs as many rounds as it needs."""
    rng = np.random.default_rng(1)
    quiet = np.arange(T // 2 * K, dtype=np.int32).reshape(-1, K) % E
    ids = np.concatenate([quiet, pick(rng, only(range(3)), T // 2)])
    matrices, rows = integers(rng, E, O, D), integers(rng, T, D)
    inputs = (matrices, rows, integers(rng, T, K), ids, integers(rng, T, O))
    want = (expert_sum(*inputs[:4]), *expert_sum_gradients(*inputs))
    assert n_rounds(ids, 2, 4, E, 8).tolist() == [2, 5]
    assert check("dp2,ep4", 8, [("uneven", inputs, want)]) == 5


@pytest.mark.parametrize("mesh, capacity", [("ep2x4", 8), ("ep8", 1)])
def test_one_token_a_device(mesh, capacity):
    rng = np.random.default_rng(2)
    matrices = integers(rng, E, O, D)
    for experts in (np.ones(E), only([4, 5, 22]), only([0, 1, 2])):
        ids = pick(rng, experts, 8)
        inputs = (matrices, integers(rng, 8, D), integers(rng, 8, K), ids, integers(rng, 8, O))
        want = (expert_sum(*inputs[:4]), *expert_sum_gradients(*inputs))
        check(mesh, capacity, [("one token", inputs, want)])


def in_region(mesh_text: str, fn, n_out: int = 1):
    """`fn` of batch shards -> `n_out` batch shards, compiled."""
    spec = parse_mesh(mesh_text)
    mesh = make_mesh(spec, jax.devices()[: spec.n_devices])
    run = region(fn, mesh, in_specs=BATCH, out_specs=(BATCH,) * n_out if n_out > 1 else BATCH)
    return jax.jit(run)


@pytest.mark.parametrize("mesh, capacity", [("ep1", 30), ("ep4", 8), ("ep2x4", 8)])
def test_dispatch_then_combine_is_k_times_the_row(mesh, capacity):
    """With experts that do nothing, whatever the routing and the number of rounds."""
    route = Route(parse_mesh(mesh), E, capacity)

    def run(rows, ids):
        ones = jnp.ones(ids.shape)
        return exchange(lambda params, rows, *_: rows, (), rows, ones, ids, route)[0]

    compiled = in_region(mesh, run)
    rows = integers(np.random.default_rng(3), T, D)
    for ids in adversarial(np.random.default_rng(4)).values():
        np.testing.assert_array_equal(compiled(rows, ids), K * rows)


def test_values_and_scales_travel_together():
    """A pytree of rows in several formats: each place holds all parts of one and the same row."""
    mesh, capacity = "dp2,ep4", 8
    route = Route(parse_mesh(mesh), E, capacity)

    def run(rows, weights, ids):
        plan = plan_rounds(ids, route)
        rounds = [dispatch(rows, weights, plan, route, i) for i in range(5)]
        back = [combine(out["scale"], plan, route, i) for i, (out, *_) in enumerate(rounds)]
        received = jax.tree.map(lambda *parts: jnp.stack(parts)[None], *rounds)
        return *received, sum(back)

    rng = np.random.default_rng(5)
    token = np.arange(1, T + 1)
    rows = {
        "values": jnp.asarray(token[:, None] % 8 * np.ones((1, D)), jnp.float8_e4m3fn),
        "scale": (token[:, None] * np.array([[1.0, -2.0]])).astype(np.float32),
        "token": token.astype(np.int32),
    }
    weights = (100 * token[:, None] + np.arange(K)[None, :]).astype(np.float32)
    compiled = in_region(mesh, run, 4)
    for ids in adversarial(rng).values():
        received, gates, experts, back = jax.tree.map(np.asarray, compiled(rows, weights, ids))
        np.testing.assert_array_equal(back, K * rows["scale"])
        check_received(received, gates, experts, ids, capacity)


def check_received(received, gates, experts, ids, capacity):
    """Device by device: [8 devices, 5 rounds, places ...]."""
    token, ep = received["token"], 4
    n_local, empty = E // ep, experts == E // ep
    values = received["values"].astype(np.float32)
    np.testing.assert_array_equal(values, (token % 8)[..., None] * np.ones(D))
    np.testing.assert_array_equal(received["scale"], token[..., None] * np.array([1.0, -2.0]))
    chunks = experts.reshape(8, 5, ep, capacity)
    assert (np.diff(chunks, axis=-1) >= 0).all(), "not in the order of their experts"
    np.testing.assert_array_equal(gates[~empty] // 100, token[~empty])
    device = np.broadcast_to(np.arange(8)[:, None, None], experts.shape)
    wanted = device % ep * n_local + experts
    choice = (gates % 100).astype(int)
    np.testing.assert_array_equal(ids[token[~empty] - 1, choice[~empty]], wanted[~empty])
    pairs = token[~empty] * K + choice[~empty]
    assert np.unique(pairs).size == pairs.size == ids.size, "a pair was lost or came twice"


def dequantized(matrices, rows, weights, sizes):
    return apply_matrices(matrices, rows["values"] * rows["scale"], weights, sizes)


def test_gradients_of_a_pytree_of_rows():
    """Several rounds; d_scale of values * scale is the row's gradient times its values, summed."""
    spec, capacity = parse_mesh("ep4"), 8
    route = Route(spec, E, capacity)

    def shard(matrices, rows, weights, ids, cotangent):
        y, pull, _ = jax.vjp(
            lambda rows: exchange(dequantized, matrices, rows, weights, ids, route),
            rows,
            has_aux=True,
        )
        return y, pull(cotangent)[0]

    mesh = make_mesh(spec, jax.devices()[:4])
    run = jax.jit(region(shard, mesh, (EXPERTS, BATCH, BATCH, BATCH, BATCH), (BATCH, BATCH)))
    rng = np.random.default_rng(6)
    for name, (matrices, values, weights, ids, cotangent), _ in cases()[N_RANDOM : N_RANDOM + 14]:
        scale = 2.0 ** rng.integers(-1, 2, (T, 1)).astype(np.float32)
        y, got = run(matrices, {"values": values, "scale": scale}, weights, ids, cotangent)
        inputs = (matrices, values * scale, weights, ids)
        _, d_rows, _ = expert_sum_gradients(*inputs, cotangent)
        np.testing.assert_array_equal(y, expert_sum(*inputs), err_msg=name)
        np.testing.assert_array_equal(got["values"], d_rows * scale, err_msg=name)
        np.testing.assert_array_equal(got["scale"][:, 0], (d_rows * values).sum(1), err_msg=name)


@pytest.mark.parametrize("factor", [1.0, 1.25, 2.0])
@pytest.mark.parametrize("n_pairs", [1, 7, 24, 264, 32_768])
@pytest.mark.parametrize("ep", [1, 4, 64])
def test_capacity(n_pairs, ep, factor):
    """All on one rank; else eights that hold the balanced load, and no more than there is."""
    size = capacity_of(n_pairs, ep, factor)
    assert 1 <= size <= n_pairs
    if ep == 1:
        assert size == n_pairs
    elif size < n_pairs:
        assert size % 8 == 0 and 0 <= size * ep - int(factor * n_pairs) < 8 * ep
    assert capacity_of(4096 * 8, 64, 1.25) == 640


def test_one_compilation_for_all_routings():
    run, _ = program("ep4", 16)
    for _, inputs, _ in cases()[N_RANDOM : N_RANDOM + 3]:
        run(*inputs)
    assert run._cache_size() == 1
