"""Replicas that differ are found and their device is named; so are devices that are slow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.small_step import config_of, parameters, placed

from dsv3_jax.params import param_specs
from dsv3_jax.training.health import ReplicaAudit, slow_devices, time_devices
from sharding.mesh import named_sharding


@pytest.fixture(scope="module")
def state():
    config = config_of()
    mesh, layout = placed("dp4,ep2", config)
    params, bias = parameters()
    places = jax.tree.map(
        lambda spec: named_sharding(mesh, spec), param_specs((params, bias), layout)
    )
    put = jax.tree.map(
        lambda place, part: jax.tree.map(lambda x: jax.device_put(x, place), part),
        places,
        (params, bias),
    )
    return put, ReplicaAudit(put, put[0], mesh, layout), mesh


def flipped(tree, name: str, device: int):
    """The tree with the lowest bit of one number changed in the copy that one device holds."""

    def change(path, leaf):
        if jax.tree_util.keystr(path, simple=True, separator=".") != name:
            return leaf
        shards = []
        for shard in leaf.addressable_shards:
            data = np.array(shard.data)
            if shard.device.id == device:
                data.view(np.uint32).reshape(-1)[-1] ^= 1
            shards.append(jax.device_put(data, shard.device))
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, shards)

    return jax.tree.map_with_path(change, tree)


def test_equal_replicas(state):
    put, audit, _ = state
    assert audit.mismatches(put, put[0]) == []


@pytest.mark.parametrize("device", [0, 3])
def test_a_flipped_bit_in_a_replica_is_found(state, device):
    put, audit, _ = state
    bad = flipped(put, "0.norm.scale.value", device)
    first, *rest = audit.mismatches(bad, bad[0])
    assert (
        first == f"replicas of 0.norm.scale.value differ: device {device} (process 0) of 8 devices"
    )
    assert len(rest) == 1 and rest[0].startswith("gathered replicas of norm.scale")


def test_two_replicas_that_differ_leave_it_open_which_is_wrong(state):
    """On a mesh of two devices; and an only copy goes on to all alike, as the docstring says."""
    config = config_of()
    mesh, layout = placed("dp2", config)
    params, bias = parameters()
    places = jax.tree.map(lambda spec: named_sharding(mesh, spec), param_specs(params, layout))
    put = jax.tree.map(
        lambda place, part: jax.tree.map(lambda x: jax.device_put(x, place), part), places, params
    )
    audit = ReplicaAudit(put, put, mesh, layout)
    bad = flipped(put, "norm.scale.value", 1)
    line = audit.mismatches(bad, bad)[0]
    assert line.endswith("differ: device 0 (process 0), device 1 (process 0) of 2 devices")
    only = flipped(put, "head.value", 1)
    assert audit.mismatches(only, only) == []


def test_slow_devices_are_named(state):
    seconds = time_devices(state[2])
    assert len(seconds) == 8 and all(took > 0 for took in seconds.values())
    devices = list(seconds)
    told = slow_devices(dict.fromkeys(devices, 1.0) | {devices[5]: 2.5, devices[6]: 1.4})
    assert told == [
        f"device {devices[5].id} (process 0) is slow: 2.5 times the median for the same matmuls"
    ]


def test_gathered_weights_count(state):
    """The hash of what is gathered is the same for all devices of a group, and not zero."""
    put, audit, _ = state
    hashes = np.asarray(audit._hashes(put, put[0]))
    assert hashes.shape[0] == 8 and hashes.dtype == jnp.uint32 and (hashes != 0).any(0).all()
