"""The training step on a mesh equals the step on one device, in every loss, gradient and count.

Masks and routings of the batch differ from shard to shard.
"""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference.compilations import compilations
from reference.exchange import n_rounds
from reference.small_step import (
    BATCH_SIZE,
    LENGTH,
    N_EXPERTS,
    N_MOE,
    TOP_K,
    assert_same,
    batch_of,
    config_of,
    loss_of,
    parameters,
    placed,
)
from reference.step import updated_bias as reference_updated_bias

from dsv3_jax.config import ParallelConfig
from dsv3_jax.model.moe import RouterStats
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.optimizer import make_optimizer, updated_bias
from dsv3_jax.training.state import abstract_state, init_sharded_state
from dsv3_jax.training.step import loss_and_gradients, make_step, reduce_stats, update_bias
from sharding.expert_parallel import make_dispatch_config
from sharding.layout import Layout
from sharding.mesh import BATCH, REPLICATED, make_mesh, manual_region, parse_mesh

N_PAIRS = BATCH_SIZE * LENGTH * TOP_K


@functools.cache
def program(mesh_text: str, zero: int = 1, remat: str = "report", pieces: int = 1):
    config = config_of(zero, remat, pieces)
    return jax.jit(loss_and_gradients(config, *placed(mesh_text, config), loss_of(config)))


def favouring(*experts: int) -> nnx.State:
    """A balance bias that sends every token to these experts, in every layer."""
    row = np.where(np.isin(np.arange(N_EXPERTS), experts), 1e3, 0.0).astype(np.float32)
    return jax.tree.map(lambda x: np.broadcast_to(row[None, :], x.shape), parameters()[1])


ROUTINGS = {
    "learned": (),
    "one rank": (6, 7),  # a group: one rank's experts on 4 ranks, one node's on any number
    "two ranks": (0, 5),
}


@functools.cache
def run(routing: str, mesh_text: str, zero: int = 1, remat: str = "report", pieces: int = 1):
    """(losses, statistics, gradients) as NumPy arrays."""
    params, bias = parameters()
    if ROUTINGS[routing]:
        bias = favouring(*ROUTINGS[routing])
    fn = program(mesh_text, zero, remat, pieces)
    return jax.tree.map(np.asarray, fn(params, bias, batch_of(0), np.float32(0), None))


def rounds_of(experts, mesh: str, pieces: int) -> int:
    """Rounds when every token goes to these experts."""
    spec = parse_mesh(mesh)
    n_tokens = BATCH_SIZE * LENGTH // spec.n_data_shards // pieces
    layout = Layout(mesh=spec, capacity_factor=ParallelConfig().capacity_factor)
    config = make_dispatch_config(layout, N_EXPERTS, n_tokens, TOP_K, 4, 2)
    ids = np.tile(experts, (n_tokens * spec.n_data_shards, 1))
    capacities = (config.copies_per_round, config.rows_per_round)
    return n_rounds(ids, spec.dp, spec.nodes, spec.ranks, N_EXPERTS, *capacities).max()


def check(mesh, zero, remat="report", pieces=1):
    for routing, experts in ROUTINGS.items():
        got = run(routing, mesh, zero, remat, pieces)
        assert_same(got, run(routing, "dp1"))
        stats = got[1]
        assert stats.load.sum() == stats.n_received.sum() == N_MOE * N_PAIRS, routing
        if experts:
            np.testing.assert_array_equal(stats.load[:, list(experts)], N_PAIRS / TOP_K)
            rounds = rounds_of(experts, mesh, pieces)
            np.testing.assert_array_equal(stats.rounds, np.full(N_MOE, rounds))
            assert rounds > 1 or routing != "one rank" or parse_mesh(mesh).ep == 1


@pytest.mark.parametrize("pieces", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_equals_one_device(pieces):
    check("dp2,ep2x2", zero=3, pieces=pieces)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, zero",
    [
        ("dp8", 1),
        ("dp8", 3),
        ("ep8", 3),
        ("ep4", 1),
        ("ep2x2", 1),
        ("ep2x4", 1),
        ("dp2,ep4", 1),
        ("dp2,ep4", 3),
    ],
)
def test_equals_one_device_on_more_meshes(mesh, zero):
    check(mesh, zero)


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh, zero, remat, pieces",
    [
        ("dp2,ep4", 3, "full", 2),
        ("dp2,ep4", 3, "none", 1),
        ("ep2x4", 1, "none", 1),
        ("ep2x2", 1, "none", 2),
    ],
)
def test_remat_and_pieces_change_nothing(mesh, zero, remat, pieces):
    """ZeRO-3 with everything computed again equals ZeRO-1 with the report's selection."""
    check(mesh, zero, remat, pieces)
    assert_same(run("learned", mesh, zero, remat, pieces), run("learned", mesh, 1, "report"))


@pytest.mark.slow
def test_fp8_on_the_way_is_the_same_on_every_mesh():
    """Tokens are rounded once, wherever their experts are, and a second hop changes nothing."""
    params, bias = parameters()
    config = config_of()
    fp8 = dataclasses.replace(config.precision, dispatch="fp8")
    config = dataclasses.replace(config, precision=fp8)
    results = []
    for mesh in ("dp1", "dp2,ep2x2"):
        fn = jax.jit(loss_and_gradients(config, *placed(mesh, config), loss_of(config)))
        found = fn(params, bias, batch_of(0), np.float32(0), None)
        results.append(jax.tree.map(np.asarray, found))
    assert_same(results[1], results[0])
    wide = run("learned", "dp1")[0].total
    assert 0 < abs(results[0][0].total - wide) < 1e-2 * wide


def test_one_device_needs_one_round():
    stats = run("one rank", "dp1")[1]
    np.testing.assert_array_equal(stats.rounds, np.ones(N_MOE))


def test_every_parameter_has_a_gradient():
    """Also those of what only few tokens or no loss of the main model reach."""
    for path, grad in jax.tree.flatten_with_path(run("learned", "dp1")[2])[0]:
        assert np.isfinite(grad).all() and np.abs(grad).max() > 1e-7, jax.tree_util.keystr(path)


def steps(mesh_text: str, n: int):
    """Metrics of `n` steps and the last state; asserts what must hold from step to step."""
    config = config_of(zero=3 if mesh_text != "dp1" else 1)
    mesh, layout = placed(mesh_text, config)
    optimizer = make_optimizer(config.optimizer, Policy.of(config.precision))
    abstract = abstract_state(config, optimizer, mesh, layout)
    state = init_sharded_state(config, optimizer, abstract)
    step, out = make_step(config, optimizer, mesh, layout, loss_of(config)), []
    for i in range(n):
        with compilations() as count:
            state, metrics = step(state, batch_of(i))
        assert bool(count) == (i == 0), "the step is compiled once, at its first call"
        jax.tree.map(assert_placed_alike, state, abstract)
        out.append(jax.tree.map(np.asarray, metrics))
    return out, jax.tree.map(np.asarray, state)


def assert_placed_alike(got, want):
    assert got.sharding.is_equivalent_to(want.sharding, got.ndim), (got.sharding, want.sharding)


@pytest.mark.slow
def test_three_steps_are_the_same_on_a_mesh():
    want, last = steps("dp1", 3)
    got, state = steps("dp2,ep4", 3)
    for a, b in zip(got, want, strict=True):
        chex.assert_trees_all_close(a.losses, b.losses, rtol=1e-5, atol=0)
        np.testing.assert_allclose(a.grad_norm, b.grad_norm, rtol=1e-5)
        np.testing.assert_array_equal(a.router.load, b.router.load)
        np.testing.assert_array_equal(a.lr, b.lr)
    assert want[2].losses.terms["loss"] < want[0].losses.terms["loss"]
    assert int(state.step) == 3
    chex.assert_trees_all_equal(state.bias, last.bias)
    assert all(np.abs(x).max() > 0.02 for x in jax.tree.leaves(state.bias))


def test_updated_bias():
    rng = np.random.default_rng(0)
    bias = rng.normal(size=(3, 8)).astype(np.float32)
    load = rng.integers(0, 9, (3, 8)).astype(np.float32)
    load[1] = 5.0  # balanced: stays
    load[2, :4], load[2, 4:] = 0.0, 4.0
    load[2, 0], load[2, 7] = 2.0, 2.0  # exactly the mean: stay
    got = np.asarray(updated_bias(bias, load, jnp.float32(0.125)))
    np.testing.assert_allclose(got, reference_updated_bias(bias, load, 0.125), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(got[1], bias[1])
    np.testing.assert_array_equal(got[2, [0, 7]], bias[2, [0, 7]])


def test_update_bias_gives_each_layer_its_load():
    """MoE layers first, MTP last: the order in which training_loss joins their statistics."""
    rng = np.random.default_rng(1)
    bias = jax.tree.map(np.zeros_like, parameters()[1])
    assert [x.shape for x in jax.tree.leaves(bias)] == [(2, N_EXPERTS), (1, N_EXPERTS)]
    load = rng.integers(0, 9, (N_MOE, N_EXPERTS)).astype(np.float32)
    moved = update_bias(bias, jnp.asarray(load), jnp.float32(0.5))
    want = reference_updated_bias(np.zeros((N_MOE, N_EXPERTS)), load, 0.5)
    np.testing.assert_array_equal(moved["moe"]["ffn"]["bias"][...], want[:2])
    np.testing.assert_array_equal(moved["mtp"]["block"]["ffn"]["bias"][...], want[2:])


def test_bias_follows_the_load_of_the_whole_batch():
    """Shards with opposite imbalances: each alone would move the bias, together they must not."""
    rng = np.random.default_rng(2)
    tilt = rng.integers(1, 5, (N_MOE, N_EXPERTS))
    shards = np.stack([8 + tilt * sign for sign in (1, -1, -1, 1, -1, 1, 1, -1)])
    shards[:, 0, 0] += 1  # but for one expert, which is over the mean on all of them
    mesh = make_mesh(parse_mesh("dp2,ep4"))

    def shard(load, rounds):
        numbers = jnp.zeros(N_MOE)
        return reduce_stats(RouterStats(load[0], numbers, rounds[0], numbers, numbers))

    rounds = rng.integers(1, 6, (8, N_MOE)).astype(np.int32)
    total = jax.jit(manual_region(shard, mesh, BATCH, REPLICATED))(
        shards.astype(np.float32), rounds
    )
    np.testing.assert_array_equal(total.load, shards.sum(0))
    np.testing.assert_array_equal(total.rounds, rounds.max(0))
    bias = jax.tree.map(np.zeros_like, parameters()[1])
    moved = jnp.concatenate(jax.tree.leaves(update_bias(bias, total.load, jnp.float32(0.5))))
    want = np.zeros((N_MOE, N_EXPERTS))
    want[0] = 0.5  # the mean of this layer lies above all others now
    want[0, 0] = -0.5
    np.testing.assert_array_equal(moved, want)
