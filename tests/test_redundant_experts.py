"""Redundant experts: wherever replicas lie, no result changes and nothing is compiled anew."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from reference.compilations import compilations
from reference.exchange import expert_sum, expert_sum_gradients
from reference.expert_load import rank_load, with_homes
from reference.routings import D, E, K, O, T, adversarial, apply_matrices, integers
from reference.small_step import assert_same, batch_of, config_of, loss_of, parameters, placed

from configs import load_preset
from dsv3_jax.training.rebalance import ExpertRebalancer
from dsv3_jax.training.step import loss_and_gradients
from sharding.eplb import choose_redundant
from sharding.expert_parallel import DispatchConfig, expert_all_to_all
from sharding.mesh import BATCH, EXPERT_AXES, MeshSpec, make_mesh, manual_region, parse_mesh
from sharding.redundant_experts import append_redundant_experts, logical_to_physical

N_REDUNDANT = 8
EXPERTS = PartitionSpec(EXPERT_AXES)


def placements(rng) -> dict[str, np.ndarray]:
    """The expert in each redundant slot, one a rank."""
    skewed = (1.0 / np.arange(1, E + 1)[None, :]).astype(np.float32)
    return {
        "all the same": np.full(N_REDUNDANT, 5),
        "at home": np.arange(N_REDUNDANT) * 3,
        "anywhere": rng.integers(0, E, N_REDUNDANT),
        "by load, one node": choose_redundant(skewed, N_REDUNDANT, 1, 8)[0],
        "by load, two nodes": choose_redundant(skewed, N_REDUNDANT, 2, 8)[0],
    }


@functools.cache
def program(mesh_text: str):
    spec = parse_mesh(mesh_text)
    dispatch_config = DispatchConfig(spec, E + N_REDUNDANT, 16, 6, spec.nodes)

    def shard(matrices, rows, weights, ids, cotangent, redundant):
        physical_ids = logical_to_physical(ids, redundant, E, spec)

        def run(matrices, rows, weights):
            return expert_all_to_all(
                apply_matrices,
                append_redundant_experts(matrices, redundant, spec),
                rows,
                weights,
                physical_ids,
                dispatch_config,
            )

        y, pull, stats = jax.vjp(run, matrices, rows, weights, has_aux=True)
        d_matrices, *others = pull(cotangent)
        return y, jax.lax.psum(d_matrices, "dp"), *others, stats.n_copies[None]

    mesh = make_mesh(spec, jax.devices()[: spec.n_devices])
    specs = (EXPERTS, BATCH, BATCH, BATCH, BATCH, PartitionSpec())
    return jax.jit(manual_region(shard, mesh, specs, (BATCH, EXPERTS, BATCH, BATCH, BATCH)))


@pytest.mark.parametrize(
    "mesh",
    ["ep2x4", *(pytest.param(mesh, marks=pytest.mark.slow) for mesh in ("ep8", "dp2,ep4", "ep1"))],
)
def test_values_and_gradients_are_those_without(mesh):
    rng = np.random.default_rng(0)
    run = program(mesh)
    for place, redundant in placements(rng).items():
        for name, ids in list(adversarial(rng).items())[::3]:
            inputs = (integers(rng, E, O, D), integers(rng, T, D), integers(rng, T, K))
            cotangent = integers(rng, T, O)
            *got, n_copies = run(*inputs, ids, cotangent, redundant.astype(np.int32))
            wanted = (
                expert_sum(*inputs, ids),
                *expert_sum_gradients(*inputs, ids, cotangent),
            )
            assert n_copies.sum() == T * K
            for a, b in zip(got, wanted, strict=True):
                np.testing.assert_array_equal(a, b, err_msg=f"{place}, {name}")
    assert run._cache_size() == 1, "a placement is data"


def test_logical_to_physical():
    """Replicas take turns; those outside of the node are not used; no expert stays none."""
    mesh = MeshSpec(nodes=2, ranks=2)  # experts 0..7, two a rank: slots 0 1 x, 2 3 x, ...
    ids = jnp.array([[0, 7], [0, 8], [0, 3], [0, 5], [6, 0]])
    redundant = jnp.array([1, 0, 0, 5])  # of ranks 0, 1, 2 (another node than its home), 3
    got = logical_to_physical(ids, redundant, 8, mesh)
    np.testing.assert_array_equal(got, [[0, 10], [5, 12], [0, 4], [5, 11], [9, 0]])


def test_the_busiest_rank_has_less_to_do():
    load = (1.0 / np.arange(1, 65)[None, :] ** 1.1).astype(np.float32)
    chosen = choose_redundant(load, 8, 1, 8)
    before = rank_load(load, np.arange(64)[None, :], 8)
    after = rank_load(load, with_homes(chosen, 64, 8), 8)
    assert after.max() < 0.75 * before.max()


@functools.cache
def step_with(n_redundant: int):
    config = config_of()
    moe = dataclasses.replace(config.model.moe, n_redundant=n_redundant)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, moe=moe))
    return jax.jit(loss_and_gradients(config, *placed("dp2,ep2x2", config), loss_of(config)))


@pytest.mark.slow
def test_a_training_step_is_the_same_and_not_compiled_anew():
    params, bias = parameters()
    inputs = (params, bias, batch_of(0), np.float32(0))
    want = jax.tree.map(np.asarray, step_with(0)(*inputs, None))
    rng = np.random.default_rng(1)
    for i in range(3):
        redundant = rng.integers(0, 8, (3, 4)).astype(np.int32)
        with compilations() as count:
            got = jax.tree.map(np.asarray, step_with(4)(*inputs, redundant))
        assert bool(count) == (i == 0)
        assert_same(got, want)


def test_placements_follow_the_load():
    """Chosen every `rebalance_every` steps from the load since; a checkpoint goes on exactly."""
    config = load_preset("tiny")
    moe = dataclasses.replace(config.model.moe, n_redundant=8)
    parallel = dataclasses.replace(config.parallel, rebalance_every=2)
    model = dataclasses.replace(config.model, moe=moe)
    config = dataclasses.replace(config, model=model, parallel=parallel)
    mesh: Mesh = make_mesh(parse_mesh("ep8"))
    shape = (config.model.n_moe_layers, moe.n_experts)
    load = np.ones(shape, np.float32)
    load[:, 3] = 50.0
    run = ExpertRebalancer(config, mesh)
    first = np.asarray(run.slots)
    run.observe(1, load)
    np.testing.assert_array_equal(run.slots, first)
    resumed = ExpertRebalancer(config, mesh, run.to_dict())
    for one in (run, resumed):
        one.observe(2, load)
        slots = np.asarray(one.slots)
        assert ((slots == 3).sum(1) >= 3).all(), "the busy expert has most of the slots"
    np.testing.assert_array_equal(run.slots, resumed.slots)
    other = dataclasses.replace(moe, n_redundant=16)
    model = dataclasses.replace(config.model, moe=other)
    fewer = ExpertRebalancer(dataclasses.replace(config, model=model), mesh, run.to_dict())
    assert fewer.slots.shape == (shape[0], 16), "another number of slots begins afresh"
