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
from reference.exchange import emulated_ragged, expert_sum, expert_sum_gradients, n_rounds
from reference.routings import D, E, K, O, T, adversarial, apply_matrices, integers, only, pick

from sharding.dispatch import (
    Hop,
    WireFormat,
    combine,
    dispatch,
    plan_rounds,
    round_capacity,
    round_indices,
)
from sharding.expert_parallel import DispatchConfig, expert_all_to_all, make_dispatch_config
from sharding.layout import Layout
from sharding.mesh import BATCH, EXPERT_AXES, make_mesh, manual_region, parse_mesh

EXPERTS = PartitionSpec(EXPERT_AXES)
N_RANDOM, N_ADVERSARIAL = 500, 100


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


@functools.cache
def program(mesh_text: str, copies: int, rows: int, ragged: bool):
    """(matrices, rows, weights, ids, cotangent) -> y, their gradients, copies computed, rounds."""
    spec = parse_mesh(mesh_text)
    mesh = make_mesh(spec, jax.devices()[: spec.n_devices])
    config = DispatchConfig(spec, E, copies, rows, spec.nodes, ragged)

    def shard(matrices, rows, weights, ids, cotangent):
        run = functools.partial(expert_all_to_all, apply_matrices, ids=ids, config=config)
        y, pull, stats = jax.vjp(lambda *x: run(*x), matrices, rows, weights, has_aux=True)
        d_matrices, d_rows, d_weights = pull(cotangent)
        d_matrices = jax.lax.psum(d_matrices, "dp")
        return y, d_matrices, d_rows, d_weights, stats.n_copies[None], stats.n_rounds[None]

    return jax.jit(
        manual_region(
            shard,
            mesh,
            in_specs=(EXPERTS, BATCH, BATCH, BATCH, BATCH),
            out_specs=(BATCH, EXPERTS, BATCH, BATCH, BATCH, BATCH),
        )
    ), spec


def check(mesh_text: str, copies: int, chosen: list[tuple], rows: int = 0, ragged: bool = False):
    """All four results exact; returns the most rounds that a device ran."""
    run, spec = program(mesh_text, copies, rows, ragged)
    most_rounds = 0
    for name, inputs, want in chosen:
        *got, computed, ran = map(np.asarray, run(*inputs))
        parts = zip(("y", "d_experts", "d_rows", "d_weights"), got, want, strict=True)
        for part, a, b in parts:
            np.testing.assert_array_equal(a, b, err_msg=f"{part} of {name!r}")
        ids = inputs[3]
        owner = ids.reshape(spec.dp, -1, K) * spec.ep // E
        load = np.stack([np.bincount(part.reshape(-1), minlength=spec.ep) for part in owner])
        np.testing.assert_array_equal(computed, load.reshape(-1), err_msg=name)
        expected = n_rounds(ids, spec.dp, spec.nodes, spec.ranks, E, copies, rows)
        np.testing.assert_array_equal(ran, np.repeat(expected, spec.ranks), err_msg=name)
        most_rounds = max(most_rounds, ran.max())
    return most_rounds


@pytest.mark.parametrize(
    "mesh, copies, rows, most_rounds",
    [
        ("ep1", 264, 0, 1),  # all in one round
        ("ep1", 40, 0, 7),
        ("ep4", 16, 0, 5),
        ("ep8", 5, 0, 7),
        ("dp2,ep4", 8, 0, 5),
        ("ep2x4", 8, 5, 9),  # rows take 3 rounds to the nodes, each its own inside
        ("ep4x2", 16, 7, 9),
        ("dp2,ep2x2", 33, 11, 2),  # all rows at once, their copies not
        ("dp2,ep2x2", 132, 22, 1),  # the most that can happen fits
    ],
)
def test_adversarial_routings(mesh, copies, rows, most_rounds):
    assert check(mesh, copies, cases()[N_RANDOM:], rows) == most_rounds


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, copies, rows", [("ep1", 264, 0), ("ep4", 16, 0), ("ep8", 5, 0), ("ep2x4", 12, 6)]
)
def test_random_routings(mesh, copies, rows):
    check(mesh, copies, cases()[:N_RANDOM], rows)


@pytest.mark.parametrize(
    "mesh, copies, rows",
    [("ep4", 16, 0), pytest.param("dp2,ep2x2", 20, 8, marks=pytest.mark.slow)],
)
def test_ragged_transport(mesh, copies, rows, monkeypatch):
    """The same rounds by `ragged_all_to_all`, which XLA's CPU backend lacks: it is emulated."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged)
    check(mesh, copies, cases()[N_RANDOM - 60 :], rows, ragged=True)


def test_groups_with_different_rounds():
    """One dp group balanced, the other crowded: each runs as many rounds as it needs."""
    rng = np.random.default_rng(1)
    quiet = np.arange(T // 2 * K, dtype=np.int32).reshape(-1, K) % E
    ids = np.concatenate([quiet, pick(rng, only(range(3)), T // 2)])
    matrices, rows = integers(rng, E, O, D), integers(rng, T, D)
    inputs = (matrices, rows, integers(rng, T, K), ids, integers(rng, T, O))
    want = (expert_sum(*inputs[:4]), *expert_sum_gradients(*inputs))
    assert n_rounds(ids, 2, 1, 4, E, 8, 0).tolist() == [2, 5]
    assert check("dp2,ep4", 8, [("uneven", inputs, want)]) == 5


@pytest.mark.parametrize("mesh, capacity", [("ep2x4", 8), ("ep8", 1)])
def test_one_token_a_device(mesh, capacity):
    rng = np.random.default_rng(2)
    matrices = integers(rng, E, O, D)
    for experts in (np.ones(E), only([4, 5, 22]), only([0, 1, 2])):
        ids = pick(rng, experts, 8)
        inputs = (matrices, integers(rng, 8, D), integers(rng, 8, K), ids, integers(rng, 8, O))
        want = (expert_sum(*inputs[:4]), *expert_sum_gradients(*inputs))
        check(mesh, capacity, [("one token", inputs, want)], rows=1)


def in_region(mesh_text: str, fn, n_out: int = 1):
    """`fn` of batch shards -> `n_out` batch shards, compiled."""
    spec = parse_mesh(mesh_text)
    mesh = make_mesh(spec, jax.devices()[: spec.n_devices])
    run = manual_region(
        fn, mesh, in_specs=BATCH, out_specs=(BATCH,) * n_out if n_out > 1 else BATCH
    )
    return jax.jit(run)


@pytest.mark.parametrize("mesh, capacity", [("ep1", 30), ("ep4", 8), ("ep2x4", 8)])
def test_dispatch_then_combine_is_k_times_the_row(mesh, capacity):
    """With experts that do nothing, whatever the routing and the number of rounds."""
    config = DispatchConfig(parse_mesh(mesh), E, capacity, 4, 2)

    def run(rows, ids):
        ones = jnp.ones(ids.shape)
        return expert_all_to_all(lambda params, rows, *_: rows, (), rows, ones, ids, config)[0]

    compiled = in_region(mesh, run)
    rows = integers(np.random.default_rng(3), T, D)
    for ids in adversarial(np.random.default_rng(4)).values():
        np.testing.assert_array_equal(compiled(rows, ids), K * rows)


@pytest.mark.parametrize("mesh", ["ep1", "dp2,ep4", "ep2x4"])
def test_some_choices_are_none(mesh):
    """An id past the last expert goes nowhere, and a row may have no expert at all."""
    rng = np.random.default_rng(7)
    config = DispatchConfig(parse_mesh(mesh), E, 8, 4, 2)

    def run(matrices, rows, weights, ids):
        matrices = jax.lax.dynamic_slice_in_dim(
            matrices, jax.lax.axis_index(EXPERT_AXES) * (E // config.mesh.ep), E // config.mesh.ep
        )
        return expert_all_to_all(apply_matrices, matrices, rows, weights, ids, config)[0]

    spec = config.mesh
    device_mesh = make_mesh(spec, jax.devices()[: spec.n_devices])
    specs = (PartitionSpec(), BATCH, BATCH, BATCH)
    compiled = jax.jit(manual_region(run, device_mesh, specs, BATCH))
    ids = np.where(rng.uniform(size=(T, K)) < 0.4, E, pick(rng, np.ones(E)))
    ids[:20] = E
    matrices, rows, weights = integers(rng, E, O, D), integers(rng, T, D), integers(rng, T, K)
    want = expert_sum(matrices, rows, weights, ids)
    np.testing.assert_array_equal(compiled(matrices, rows, weights, ids.astype(np.int32)), want)


HALVES = WireFormat(
    lambda x: {"whole": jnp.floor(x / 2).astype(jnp.int8), "odd": (x % 2 > 0)[:, :1]},
    lambda coded, dtype: (coded["whole"] * 2 + coded["odd"]).astype(dtype),
)


@pytest.mark.parametrize("mesh, capacity", [("ep1", 264), ("ep4", 16), ("ep2x4", 12)])
def test_wire_format(mesh, capacity):
    """Rows go out coded as a pytree of several formats; results come back as they are.

    The format says "all entries of a row are odd, or none": of other rows it makes the nearest, as
    FP8 rounds. Forward it is the rows that are rounded, backward the gradient of the result.
    """
    config = DispatchConfig(parse_mesh(mesh), E, capacity, 6, 2, wire_format=HALVES)
    device_mesh = make_mesh(config.mesh, jax.devices()[: config.mesh.n_devices])

    def shard(matrices, rows, weights, ids, cotangent):
        def run(*x):
            return expert_all_to_all(apply_matrices, *x, ids, config)

        y, pull, _ = jax.vjp(run, matrices, rows, weights, has_aux=True)
        return y, *pull(cotangent)

    specs = (EXPERTS, BATCH, BATCH, BATCH)
    compiled = jax.jit(manual_region(shard, device_mesh, (*specs, BATCH), (BATCH, *specs[:3])))
    for name, inputs, _ in cases()[N_RANDOM : N_RANDOM + 14]:
        matrices, rows, weights, ids, cotangent = inputs
        coded = [np.asarray(HALVES.decode(HALVES.encode(x), x.dtype)) for x in (rows, cotangent)]
        assert (coded[0] != rows).any()
        want = (
            expert_sum(matrices, coded[0], weights, ids),
            *expert_sum_gradients(matrices, coded[0], weights, ids, coded[1]),
        )
        for a, b in zip(compiled(*inputs), want, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


@pytest.mark.parametrize("n_groups", [1, 6])
@pytest.mark.parametrize("ragged", [False, True])
def test_one_hop(ragged, n_groups, monkeypatch):
    """What arrives in each round, in the order of its groups, and what comes back."""
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", emulated_ragged)
    mesh, capacity = "dp2,ep4", 8
    hop = Hop(("rank",), 4, n_groups, capacity, ragged)

    def run(rows, ids):
        plan = plan_rounds(ids, hop)
        rounds = [round_indices(plan, hop, i) for i in range(5)]
        received = [dispatch(rows, indices, hop) for indices in rounds]
        back = sum(combine(x, indices, hop) for x, indices in zip(received, rounds, strict=True))
        group_sizes = jnp.stack([indices.group_sizes for indices in rounds])
        return jnp.stack(received)[None], group_sizes[None], back

    compiled = in_region(mesh, run, 3)
    token = np.arange(1, T + 1, dtype=np.float32)[:, None]
    for name, ids in adversarial(np.random.default_rng(5)).items():
        ids = ids // (6 // n_groups)
        received, sizes, back = map(np.asarray, compiled(token, ids))
        np.testing.assert_array_equal(back, K * token, err_msg=name)
        for device in range(8):
            got = []
            for rows, counts in zip(received[device, ..., 0], sizes[device], strict=True):
                experts = np.repeat(np.arange(n_groups), counts) + device % 4 * n_groups
                got += zip(rows[: counts.sum()].astype(int), experts, strict=True)
            mine = ids.reshape(2, -1, K)[device // 4]
            where = np.argwhere(mine // n_groups == device % 4)
            first = device // 4 * (T // 2) + 1
            want = [(first + row, mine[row, k]) for row, k in where]
            assert sorted(got) == sorted(want), f"{name}: a token copy was lost or came twice"


def test_dispatch_config():
    """The 671B exchange on 8 nodes of 8: buffers of 1.25 times 4 rows and 8 copies per token."""
    spec = parse_mesh("ep8x8")
    config = make_dispatch_config(Layout(mesh=spec), 256, 2048, 8, 8, 4)
    assert (config.rows_per_round, config.copies_per_round, config.max_nodes) == (1280, 2560, 4)
    assert config.node_hop() == Hop(("node",), 8, 1, 1280, keep_source_order=True)
    assert config.within_node().rank_hop() == Hop(("rank",), 8, 4, 2560)
    flat = make_dispatch_config(Layout(mesh=parse_mesh("ep64")), 256, 2048, 8, 8, 4)
    assert flat.rank_hop() == Hop(("rank",), 64, 4, 320)
    few = make_dispatch_config(Layout(mesh=parse_mesh("ep2x4")), 16, 10, 3, 4, 4)
    assert (few.rows_per_round, few.max_nodes) == (10, 2), "no more rows or nodes than there are"
    scattered = make_dispatch_config(Layout(mesh=parse_mesh("ep4x2")), 24, 40, 3, 6, 2)
    assert scattered.max_nodes == 4, "6 groups do not divide over 4 nodes"


@pytest.mark.parametrize("factor", [1.0, 1.25, 2.0])
@pytest.mark.parametrize("n_copies", [1, 7, 24, 264, 32_768])
@pytest.mark.parametrize("ep", [1, 4, 64])
def test_capacity(n_copies, ep, factor):
    """All on one rank; else eights that hold the balanced load, and no more than there is."""
    size = round_capacity(n_copies, ep, factor)
    assert 1 <= size <= n_copies
    if ep == 1:
        assert size == n_copies
    elif size < n_copies:
        assert size % 8 == 0 and 0 <= size * ep - int(factor * n_copies) < 8 * ep
    assert round_capacity(4096 * 8, 64, 1.25) == 640


def test_one_compilation_for_all_routings():
    run, _ = program("ep4", 16, 0, False)
    for _, inputs, _ in cases()[N_RANDOM : N_RANDOM + 3]:
        run(*inputs)
    assert run._cache_size() == 1
