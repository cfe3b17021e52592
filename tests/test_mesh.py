"""The mesh grammar, its errors, and which configs fit on which mesh."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from configs import load_preset
from dsv3_jax.config import Config
from dsv3_jax.mesh_checks import check_mesh
from sharding.collectives import pmax_data, psum_data
from sharding.mesh import (
    AXES,
    BATCH,
    REPLICATED,
    MeshSpec,
    _torus_sizes,
    check_devices,
    contiguous_shard,
    fold_pp_into_dp,
    make_mesh,
    manual_region,
    mesh_spec,
    parse_mesh,
    process_batch_shard,
)

GOOD = {
    "dp4,ep8": MeshSpec(dp=4, ranks=8),
    "ep8,dp4": MeshSpec(dp=4, ranks=8),
    " dp4 , ep8 ": MeshSpec(dp=4, ranks=8),
    "ep2x4": MeshSpec(nodes=2, ranks=4),
    "ep4x1": MeshSpec(nodes=4, ranks=1),
    "dp1": MeshSpec(),
    "ep1": MeshSpec(),
    "pp2,dp3": MeshSpec(pp=2, dp=3),
    "ep2x4,pp16,dp128": MeshSpec(pp=16, dp=128, nodes=2, ranks=4),
}


@pytest.mark.parametrize("text, want", GOOD.items())
def test_parse(text, want):
    assert parse_mesh(text) == want
    assert parse_mesh(str(want)) == want


@pytest.mark.parametrize(
    "text, n_devices, dp",
    [("dp*", 8, 8), ("dp*,ep2x4", 24, 3), ("ep4,dp*,pp2", 8, 1), ("dp*,ep8", 1024, 128)],
)
def test_star_takes_what_is_left(text, n_devices, dp):
    spec = parse_mesh(text, n_devices)
    assert (spec.dp, spec.n_devices) == (dp, n_devices)


@pytest.mark.parametrize(
    "text, fragments",
    [
        ("", ["''", "dp4,ep8"]),
        ("dp", ["'dp'", "comma-separated"]),
        ("dp0", ["'dp0'"]),
        ("dp04", ["'dp04'"]),
        ("dp-2", ["'dp-2'"]),
        ("dp4;ep8", ["'dp4;ep8'"]),
        ("dp4,,ep8", ["''"]),
        ("dp2x4", ["'dp2x4'"]),
        ("ep2x", ["'ep2x'"]),
        ("ep2x2x2", ["'ep2x2x2'"]),
        ("ep*", ["'ep*'"]),
        ("tp4", ["'tp4'"]),
        ("DP4", ["'DP4'"]),
        ("dp4,ep2,dp2", ["dp twice"]),
        ("ep4,ep2x2", ["ep twice"]),
        ("dp4,dp*", ["dp twice"]),
        ("dp*", ["dp*", "number of devices"]),
    ],
)
def test_bad_grammar(text, fragments):
    with pytest.raises(ValueError) as error:
        parse_mesh(text)
    assert all(fragment in str(error.value) for fragment in [repr(text), *fragments])


def test_star_that_does_not_come_out_whole():
    with pytest.raises(ValueError, match=r"12 devices.* take 8.*not divide 12.*below.* is 6"):
        parse_mesh("dp*,ep2x4", 12)


@pytest.mark.parametrize(
    "text, n_devices, nearest",
    [
        ("dp4,ep8", 8, "dp1,ep8"),
        ("dp4,ep2x4", 16, "dp2,ep2x4"),
        ("pp2,dp4,ep2", 12, "pp2,dp3,ep2"),
        ("dp3,ep3", 8, "dp8"),
        ("ep8", 4, "dp4"),
    ],
)
def test_check_devices(text, n_devices, nearest):
    spec = parse_mesh(text)
    with pytest.raises(ValueError) as error:
        check_devices(spec, n_devices, "cpu")
    message = str(error.value)
    assert f"needs {spec.n_devices} devices, but there are {n_devices} (cpu)" in message
    assert message.endswith(f"--mesh={nearest}")
    check_devices(parse_mesh(nearest), n_devices, "cpu")


def test_sizes():
    spec = parse_mesh("pp2,dp3,ep5x7")
    assert (spec.ep, spec.n_data_shards, spec.n_devices) == (35, 105, 210)
    assert spec.sizes == {"pp": 2, "dp": 3, "node": 5, "rank": 7}
    assert spec.size("dp", "rank") == 21 and spec.size() == 1


def test_make_mesh_has_all_axes():
    mesh = make_mesh(parse_mesh("dp2,ep2x2"))
    assert dict(mesh.shape) == {"pp": 1, "dp": 2, "node": 2, "rank": 2}
    assert mesh.axis_names == AXES
    with pytest.raises(ValueError, match="needs 4 devices, but there are 8"):
        make_mesh(parse_mesh("ep4"))


class Chip(NamedTuple):
    """A device on a torus, as far as meshes look at it."""

    coords: tuple[int, int, int]
    core_on_chip: int = 0


@pytest.mark.parametrize(
    "line, sizes",
    [
        ([(0, 0, z) for z in range(5)], (5,)),
        ([(x, y, 0) for y in range(2) for x in range(3)], (2, 3)),  # x changes first
        ([(x, 1, z) for x in range(3) for z in range(2)], (3, 2)),
        ([(2, 1, 0)], (1,)),
        ([(x, 0, z) for x in range(2) for z in range(3)][:5], (5,)),  # no box
        ([(0, 0, 0), (1, 0, 0), (1, 1, 0), (0, 1, 0)], (4,)),  # round a ring of two axes
    ],
)
def test_rings_of_a_line(line, sizes):
    assert _torus_sizes([Chip(place) for place in line]) == sizes


def test_cores_of_a_chip_are_an_axis():
    line = [Chip((0, y, 0), core) for y in range(3) for core in range(2)]
    assert _torus_sizes(line) == (3, 2)


def test_cpus_have_no_rings():
    assert mesh_spec(make_mesh(parse_mesh("dp2,ep2x2"))) == parse_mesh("dp2,ep2x2")


def test_batch_order_and_sums_in_the_manual_region():
    """Shards of the batch lie over dp, node and rank, the last fastest; sums go over all three."""
    mesh = make_mesh(parse_mesh("dp2,ep2x2"))
    axes = [jax.lax.axis_index] * 3

    def fn(x):
        where = [index(axis) for index, axis in zip(axes, AXES[1:], strict=True)]
        return jnp.stack([4 * where[0] + 2 * where[1] + where[2]]), psum_data(x), pmax_data(x)

    run = manual_region(fn, mesh, in_specs=BATCH, out_specs=(BATCH, REPLICATED, REPLICATED))
    place, total, most = jax.jit(run)(jnp.arange(8.0))
    np.testing.assert_array_equal(place, np.arange(8))
    np.testing.assert_array_equal((total, most), [[28.0], [7.0]])


def test_gradients_in_the_manual_region_are_those_of_the_sum():
    """psum transposes to psum: every device's loss depends on every device's x."""
    mesh = make_mesh(parse_mesh("dp2,ep4"))

    def fn(x):
        return jax.grad(lambda x: (psum_data(x) ** 2).sum())(x)

    got = jax.jit(manual_region(fn, mesh, PartitionSpec(BATCH[0]), BATCH))(jnp.arange(8.0))
    np.testing.assert_array_equal(got, np.full(8, 8 * 2 * 28.0))


def changed(**sections) -> Config:
    """The tiny preset (batch 32, 16 experts in 8 groups, vocabulary 2048, width 128), changed."""
    config = load_preset("tiny")
    return dataclasses.replace(
        config, **{k: dataclasses.replace(getattr(config, k), **v) for k, v in sections.items()}
    )


@pytest.mark.parametrize("text", ["dp1", "dp4,ep8", "dp2,ep2x8", "ep16", "ep8x2", "dp32"])
def test_config_fits(text):
    check_mesh(load_preset("tiny"), parse_mesh(text))


def moe(**values):
    return {"model": {"moe": dataclasses.replace(load_preset("tiny").model.moe, **values)}}


@pytest.mark.parametrize(
    "sections, text, fragments",
    [
        ({}, "dp3,ep4", ["train.batch=32", "dp * ep=12", "=8", "24 instead of 32"]),
        ({}, "ep32", ["model.moe.n_experts=16", "ep=32", "ep=16", "32 instead of 16"]),
        (moe(n_experts=24), "ep16", ["model.moe.n_experts=24", "ep=16", "ep=12", "16 instead"]),
        ({"model": {"vocab_size": 2050}}, "ep4", ["model.vocab_size=2050", "ep=2", "2048 instead"]),
        ({"model": {"width": 132}}, "dp2,ep8", ["model.width=132", "ep=6", "128 instead of 132"]),
        (
            moe(n_groups=1, topk_groups=1),
            "ep2x4",
            ["model.moe.n_groups=1", "nodes=2", "nodes=1", "2 instead of 1"],
        ),
        ({"train": {"batch": 1}}, "dp2", ["train.batch=1", "dp * ep=2", "=1", "2 instead of 1"]),
    ],
)
def test_config_does_not_fit(sections, text, fragments):
    with pytest.raises(ValueError) as error:
        check_mesh(changed(**sections), parse_mesh(text))
    message = str(error.value)
    assert all(x in message for x in [f"mesh {parse_mesh(text)}", *fragments]), message


def test_groups_matter_on_several_nodes_only():
    check_mesh(changed(**moe(n_groups=1, topk_groups=1)), parse_mesh("ep8"))


def test_dense_model_needs_no_experts():
    dense = {"moe": None, "n_dense": 4, "mtp_depth": 0}
    check_mesh(changed(model=dense), parse_mesh("ep32"))


@pytest.mark.parametrize(
    "text, n_processes, process, wanted",
    [
        ("dp4,ep2", 1, 0, (0, 1)),
        ("dp4,ep2", 4, 2, (2, 4)),
        ("pp2,dp2,ep2", 2, 1, (0, 1)),  # a stage each: the same rows
        ("pp2,dp2,ep2", 4, 3, (1, 2)),
        ("pp4,ep2", 8, 5, (1, 2)),
    ],
)
def test_rows_of_a_process(text, n_processes, process, wanted):
    """By where its devices lie, in the order of the mesh."""
    spec = parse_mesh(text)
    per_process = spec.n_devices // n_processes
    mine = range(process * per_process, (process + 1) * per_process)
    assert (
        contiguous_shard({device % spec.n_data_shards for device in mine}, spec.n_data_shards)
        == wanted
    )


@pytest.mark.parametrize("held, n", [({0, 2}, 4), ({1, 2}, 4), ({0, 1, 2}, 4)])
def test_rows_that_are_no_equal_shard_are_refused(held, n):
    with pytest.raises(ValueError, match="not one of equal parts"):
        contiguous_shard(held, n)


@pytest.mark.parametrize("text", ["dp4,ep2", "pp2,dp2,ep2"])
def test_one_process_reads_all_rows(text):
    mesh = make_mesh(parse_mesh(text))
    assert process_batch_shard(mesh) == process_batch_shard(fold_pp_into_dp(mesh)) == (0, 1)
    assert list(fold_pp_into_dp(mesh).devices.flat) == list(mesh.devices.flat)
