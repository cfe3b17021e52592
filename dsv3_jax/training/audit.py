"""Whether devices are as they should be: copies that differ by silent corruption, and slow ones.

ZeRO keeps one copy of nearly all of the state, so there is little to compare between steps: norms,
balance bias, counters. What every device computes with, it gathers from all others. So both are
compared: copies as they are stored, and weights as they arrive. A bit that flips in the only copy
of a shard goes on to all alike and is not found here.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Hashable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import PyTree, UInt32

from dsv3_jax.checkpoint.integrity import fingerprint
from dsv3_jax.params import map_params
from dsv3_jax.shapes import Array
from sharding.layout import MODEL_PARALLEL_AXES, Layout
from sharding.mesh import ROW_PER_DEVICE, manual_region

SLOW = 1.5  # times the median
PRODUCTS = {"cpu": (128, 4)}  # size of the products that tell a device's pace, and how many
OF_ACCELERATORS = (4096, 50)


class Copies:
    """Compares all copies of a training state, and of the weights gathered from it."""

    def __init__(self, state: PyTree, params: nnx.State, mesh: Mesh, layout: Layout):
        """For states like this one, or its abstract form; the `params` are a part of it."""
        devices = list(mesh.devices.flat)
        named = [
            (f"copies of {_name(path)}", _places(x)) for path, x in jax.tree.leaves_with_path(state)
        ]
        named += [
            (f"what devices gathered of {_name(path)}", _parts(variable, mesh))
            for path, variable in jax.tree.leaves_with_path(params, is_leaf=_is_variable)
        ]
        self._columns = [(name, [places[device] for device in devices]) for name, places in named]
        self._devices = devices
        stored, weights = (jax.tree.map(lambda x: x.sharding.spec, x) for x in (state, params))

        def shard(state, params) -> UInt32[Array, "device leaf"]:
            hashes = [fingerprint(x) for x in jax.tree.leaves(state)]
            hashes += jax.tree.leaves(map_params(lambda _, x, p: _gathered(x, p, layout), params))
            return jnp.stack(hashes)[None]

        self._hashes = jax.jit(manual_region(shard, mesh, (stored, weights), ROW_PER_DEVICE))

    def differ(self, state: PyTree, params: nnx.State) -> list[str]:
        """A line for every array whose copies are not the same on all devices that have one."""
        found = multihost_utils.process_allgather(self._hashes(state, params), tiled=True)
        return [
            line
            for (name, places), hashes in zip(self._columns, found.T, strict=True)
            for line in _disagreement(name, places, hashes, self._devices)
        ]


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _is_variable(x) -> bool:
    return isinstance(x, nnx.Variable)


def _gathered(x: Array, parameter: nnx.Param, layout: Layout) -> UInt32[Array, ""]:
    """Fingerprint of a parameter as a device gathers it, a layer at a time."""

    def one(part: Array) -> UInt32[Array, ""]:
        return fingerprint(
            layout.gather_param(part, parameter.axes, parameter.global_shape, part.dtype)
        )

    stacked = x.ndim > len(parameter.axes)
    return jax.lax.map(one, x).sum(dtype=jnp.uint32) if stacked else one(x)


def _places(array: jax.Array) -> dict[jax.Device, Hashable]:
    """Which part of an array each device holds."""
    return {d: str(part) for d, part in array.sharding.devices_indices_map(array.shape).items()}


def _parts(parameter: nnx.Variable, mesh: Mesh) -> dict[jax.Device, Hashable]:
    """Which part of a parameter each device has once it is gathered."""
    kept = any(name in MODEL_PARALLEL_AXES for name in parameter.axes)
    ranks = np.ndenumerate(mesh.devices)
    return {device: place[2:] if kept else None for place, device in ranks}


def _disagreement(what: str, places: list, hashes: np.ndarray, devices: list) -> list[str]:
    """A line for each place whose holders have different hashes, which names the fewer."""
    holders = defaultdict(list)
    for place, number, device in zip(places, hashes.tolist(), devices, strict=True):
        holders[place].append((number, device))
    lines = []
    for held in holders.values():
        counts = Counter(number for number, _ in held)
        if len(counts) > 1:
            most = counts.most_common(1)[0][0]
            odd = [d for number, d in held if number != most]
            odd = odd if 2 * len(odd) < len(held) else [d for _, d in held]
            lines.append(f"{what} differ: {', '.join(map(_named, odd))} of {len(held)} devices")
    return lines


def _named(device: jax.Device) -> str:
    return f"device {device.id} (process {device.process_index})"


def paces(mesh: Mesh) -> dict[jax.Device, float]:
    """Seconds that the same products take on each device of the mesh, each timed by itself."""
    size, n = PRODUCTS.get(mesh.devices.flat[0].platform, OF_ACCELERATORS)
    x = np.full((size, size), 1.0 / size, np.float32)
    run = jax.jit(lambda x: jax.lax.fori_loop(0, n, lambda _, y: x @ y, x))
    mine = np.zeros(mesh.size, np.float32)
    for place, device in enumerate(mesh.devices.flat):
        if device.process_index == jax.process_index():
            there = jax.device_put(x, device)
            run(there).block_until_ready()  # compiles
            mine[place] = min(_seconds(run, there) for _ in range(10))
    rows = multihost_utils.process_allgather(mine).reshape(-1, mesh.size)
    return dict(zip(mesh.devices.flat, rows.max(0).tolist(), strict=True))


def _seconds(run, x: jax.Array) -> float:
    begin = time.perf_counter()
    run(x).block_until_ready()
    return time.perf_counter() - begin


def slow_devices(seconds: dict[jax.Device, float]) -> list[str]:
    """A line for every device that takes much longer than most."""
    usual = float(np.median(list(seconds.values())))
    return [
        f"{_named(device)} is slow: {took / usual:.1f} times the median for the same products"
        for device, took in seconds.items()
        if took > SLOW * usual
    ]
