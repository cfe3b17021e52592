"""The health of a run: skipped steps, roll-backs, loss spikes, replicas that differ, slow devices.

ZeRO keeps one copy of nearly all of the state, so between steps there is little to compare: norms,
balance bias, counters. But every device computes with weights that it gathers from all others. So
the audit compares both, replicas as they are stored and weights as they are gathered. A bit that
flips in the only copy of a shard reaches all devices alike and is not found here.
"""

import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Hashable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import PyTree, UInt32

from dsv3_jax.checkpoint.integrity import fingerprint
from dsv3_jax.config import GuardConfig
from dsv3_jax.params import is_variable, map_params
from dsv3_jax.shapes import Array
from sharding.layout import MODEL_PARALLEL_AXES, Layout
from sharding.mesh import ROW_PER_DEVICE, manual_region

SPIKE_WINDOW = 100  # losses that the next one is compared with
MIN_LOSSES = 20  # before any loss counts as a spike
MIN_DEVIATION = 1e-3  # least standard deviation of the losses, relative to their mean
SLOW = 1.5  # times the median time of a device
CPU_MATMULS, ACCELERATOR_MATMULS = (128, 4), (4096, 50)  # (size, count) that time a device


class SkippedStep(NamedTuple):
    """A step whose update was not made."""

    step: int
    why: str
    batch: str  # what identifies its data


class TooManySkipped(Exception):
    """`guard.roll_back_after` steps in a row were skipped, so the run must roll back."""


class SkipPolicy:
    """The steps skipped in a row, and the checkpoint to which the run rolls back for them."""

    def __init__(self, config: GuardConfig):
        self._config = config
        self.consecutive_skips: list[SkippedStep] = []
        self._rolled_back: tuple[int, int] | None = None  # from the last skipped step, to the saved

    def accept(self):
        """Record a step that was not skipped."""
        self.consecutive_skips = []

    def skip(self, skipped: SkippedStep) -> bool:
        """Record a skipped step; return whether it makes too many in a row."""
        self.consecutive_skips = [*self.consecutive_skips, skipped]
        return len(self.consecutive_skips) >= self._config.roll_back_after

    def roll_back_step(self, saved: list[int]) -> int | None:
        """Return the step to roll back to, of those that are saved; None if there is none.

        It is the newest one from before the skipped steps. When the run has not yet come past the
        step that it rolled back from last, it is an older one than last time.
        """
        first, last = self.consecutive_skips[0].step, self.consecutive_skips[-1].step
        before = [step for step in saved if step < first]
        if self._rolled_back is not None and first <= self._rolled_back[0]:
            before = [step for step in before if step < self._rolled_back[1]]
        if not before:
            return None
        self._rolled_back = (last, max(before))
        self.consecutive_skips = []
        return max(before)

    def to_dict(self) -> dict:
        """Return plain values for a checkpoint; the names are those on disk."""
        row = [list(skipped) for skipped in self.consecutive_skips]
        return {"row": row, "went_back": self._rolled_back}

    def restore(self, values: dict):
        """Continue from the `to_dict` of a checkpoint."""
        self.consecutive_skips = [SkippedStep(*skipped) for skipped in values["row"]]
        rolled_back = values["went_back"]
        self._rolled_back = rolled_back and tuple(rolled_back)


class SpikeDetector:
    """Finds losses far above those before them."""

    def __init__(self, threshold: float):
        """Set the threshold, in standard deviations of the last `SPIKE_WINDOW` losses."""
        self._threshold, self._losses = threshold, deque(maxlen=SPIKE_WINDOW)

    def deviations_above(self, loss: float) -> float | None:
        """Return how many standard deviations a spike is above the mean; None for other losses.

        Later losses are not compared with a spike.
        """
        if not math.isfinite(loss):
            return None
        if len(self._losses) >= MIN_LOSSES:
            mean = float(np.mean(self._losses))
            deviation = max(float(np.std(self._losses)), MIN_DEVIATION * abs(mean))
            above = (loss - mean) / deviation
            if above > self._threshold:
                return above
        self._losses.append(loss)
        return None


class ReplicaAudit:
    """Compares all replicas of a training state, and of the weights gathered from it."""

    def __init__(self, state: PyTree, params: nnx.State, mesh: Mesh, layout: Layout):
        """Compile the comparison for states like this one, of which `params` are a part."""
        self._devices = list(mesh.devices.flat)
        self._columns = []  # of each hash: a name, and which part of the array each device has
        for path, array in jax.tree.leaves_with_path(state):
            self._add_column(f"replicas of {_name(path)}", _stored_parts(array))
        for path, param in jax.tree.leaves_with_path(params, is_leaf=is_variable):
            self._add_column(f"gathered replicas of {_name(path)}", _gathered_parts(param, mesh))
        state_specs, param_specs = (
            jax.tree.map(lambda x: x.sharding.spec, tree) for tree in (state, params)
        )

        def shard(state, params) -> UInt32[Array, "device leaf"]:
            hashes = [fingerprint(x) for x in jax.tree.leaves(state)]
            gathered = map_params(lambda _, x, p: _gathered_fingerprint(x, p, layout), params)
            return jnp.stack(hashes + jax.tree.leaves(gathered))[None]

        region = manual_region(shard, mesh, (state_specs, param_specs), ROW_PER_DEVICE)
        self._hashes = jax.jit(region)

    def mismatches(self, state: PyTree, params: nnx.State) -> list[str]:
        """Return a line for every array whose replicas are not the same on all their devices."""
        found = multihost_utils.process_allgather(self._hashes(state, params), tiled=True)
        return [
            line
            for (name, parts), hashes in zip(self._columns, found.T, strict=True)
            for line in _mismatches(name, parts, hashes.tolist(), self._devices)
        ]

    def _add_column(self, name: str, parts: dict[jax.Device, Hashable]):
        self._columns.append((name, [parts[device] for device in self._devices]))


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _gathered_fingerprint(x: Array, param: nnx.Param, layout: Layout) -> UInt32[Array, ""]:
    """Return the fingerprint of a parameter as a device gathers it, one layer at a time."""

    def of_layer(shard: Array) -> UInt32[Array, ""]:
        return fingerprint(layout.gather_param(shard, param.axes, param.global_shape, shard.dtype))

    if x.ndim > len(param.axes):
        return jax.lax.map(of_layer, x).sum(dtype=jnp.uint32)
    return of_layer(x)


def _stored_parts(array: jax.Array) -> dict[jax.Device, Hashable]:
    """Return which part of an array each device stores."""
    indices = array.sharding.devices_indices_map(array.shape)
    return {device: str(index) for device, index in indices.items()}


def _gathered_parts(param: nnx.Variable, mesh: Mesh) -> dict[jax.Device, Hashable]:
    """Return which part of a parameter each device has once it is gathered."""
    is_split = any(axis in MODEL_PARALLEL_AXES for axis in param.axes)
    ranks = np.ndenumerate(mesh.devices)
    return {device: index[2:] if is_split else None for index, device in ranks}


def _mismatches(name: str, parts: list, hashes: list[int], devices: list) -> list[str]:
    """Return a line for each part whose replicas differ, with the devices of the minority."""
    replicas = defaultdict(list)
    for part, number, device in zip(parts, hashes, devices, strict=True):
        replicas[part].append((number, device))
    lines = []
    for held in replicas.values():
        counts = Counter(number for number, _ in held)
        if len(counts) > 1:
            majority = counts.most_common(1)[0][0]
            odd = [device for number, device in held if number != majority]
            if 2 * len(odd) >= len(held):  # none is a majority: any of them may be wrong
                odd = [device for _, device in held]
            lines.append(f"{name} differ: {', '.join(map(_label, odd))} of {len(held)} devices")
    return lines


def _label(device: jax.Device) -> str:
    return f"device {device.id} (process {device.process_index})"


def time_devices(mesh: Mesh) -> dict[jax.Device, float]:
    """Return the seconds that the same matmuls take on each device of the mesh, one at a time."""
    on_cpu = mesh.devices.flat[0].platform == "cpu"
    size, n = CPU_MATMULS if on_cpu else ACCELERATOR_MATMULS
    x = np.full((size, size), 1.0 / size, np.float32)
    matmuls = jax.jit(lambda x: jax.lax.fori_loop(0, n, lambda _, y: x @ y, x))
    seconds = np.zeros(mesh.size, np.float32)
    for i, device in enumerate(mesh.devices.flat):
        if device.process_index == jax.process_index():
            on_device = jax.device_put(x, device)
            matmuls(on_device).block_until_ready()  # compiles
            seconds[i] = min(_seconds(matmuls, on_device) for _ in range(10))
    rows = multihost_utils.process_allgather(seconds).reshape(-1, mesh.size)
    return dict(zip(mesh.devices.flat, rows.max(0).tolist(), strict=True))


def _seconds(fn: Callable, x: jax.Array) -> float:
    begin = time.perf_counter()
    fn(x).block_until_ready()
    return time.perf_counter() - begin


def slow_devices(seconds: dict[jax.Device, float]) -> list[str]:
    """Return a line for every device that takes more than `SLOW` times the median time."""
    median = float(np.median(list(seconds.values())))
    return [
        f"{_label(device)} is slow: {took / median:.1f} times the median for the same matmuls"
        for device, took in seconds.items()
        if took > SLOW * median
    ]
