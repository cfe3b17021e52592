"""The seconds that collectives take on the torus of a TPU slice and between GPU hosts.

A collective's time follows from where the devices of its group lie. The planner lays out a mesh on
a slice itself (`lay_out`); ahead-of-time analysis reads the positions of a compiled mesh's devices
(`group_at`). Both are times of perfect routing without latency or other traffic.
"""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from dsv3_jax.hardware import Chip
from sharding.mesh import MeshSpec

Position = tuple[int, ...]  # a chip's coordinates on the torus, or (host number,)


class Line(NamedTuple):
    """The chips of a group along one axis of the torus: `n` of them, each `stride` from the next.

    `stride` groups of this form lie interleaved on the axis and share its links.
    """

    n: int
    stride: int
    axis_size: int


@dataclasses.dataclass(frozen=True)
class TorusGroup:
    """A group of devices on a TPU slice: a grid with a line along each axis."""

    chip: Chip
    lines: tuple[Line, ...]

    def all_to_all_seconds(self, n_bytes: float) -> float:
        """Return the seconds of an all-to-all in which each device sends `n_bytes` in all.

        On a ring of n chips the mean distance is n/4 hops, and a chip has 2 links: n/8 of what it
        sends crosses each link. On a line that is no ring, n/4 crosses the link in the middle. All
        axes work at once; devices of a chip share its links, as do interleaved groups.

        Args:
            n_bytes: includes the part that stays on the device.
        """
        crossing = [
            n * stride / self._directions(n * stride, size) / 4 for n, stride, size in self.lines
        ]
        busiest = n_bytes * max(crossing, default=0.0) * self.chip.devices_per_chip
        return busiest / self.chip.ici_bandwidth

    def all_gather_seconds(self, n_bytes: float) -> float:
        """Return the seconds in which each device receives `n_bytes`; a reduce-scatter's are equal.

        Rings run along every torus axis at once, in both directions.
        """
        rings = [self._directions(n * stride, size) / stride for n, stride, size in self.lines]
        rate = sum(rings) * self.chip.ici_bandwidth / self.chip.devices_per_chip
        return n_bytes / rate if rate else 0.0

    def permute_seconds(self, n_bytes: float) -> float:
        """Return the seconds to pass `n_bytes` on to a neighbour."""
        return n_bytes * self.chip.devices_per_chip / self.chip.ici_bandwidth

    def _directions(self, span: int, axis_size: int) -> int:
        """Return 2 if `span` chips of an axis close to a ring, else 1."""
        return 2 if span == axis_size >= self.chip.min_ring_size else 1


def torus_group(chip: Chip, lines: Iterable[Line]) -> TorusGroup:
    """Return the group with these lines; axes on which it has one chip are left out."""
    return TorusGroup(chip, tuple(line for line in lines if line.n > 1))


@dataclasses.dataclass(frozen=True)
class HostGroup:
    """A group of `n` GPUs, `n_local` of them in each host."""

    chip: Chip
    n: int
    n_local: int

    def all_to_all_seconds(self, n_bytes: float) -> float:
        """Return the seconds of an all-to-all in which each GPU sends `n_bytes` in all."""
        per_peer = n_bytes / self.n
        return self._slower(per_peer * (self.n_local - 1), per_peer * (self.n - self.n_local))

    def all_gather_seconds(self, n_bytes: float) -> float:
        """Return the seconds in which each GPU receives `n_bytes`.

        The network brings each byte to a host once, NVLink spreads it there.
        """
        return self._slower(
            n_bytes * (self.n_local > 1), n_bytes / self.n_local * (self.n > self.n_local)
        )

    def permute_seconds(self, n_bytes: float) -> float:
        """Return the seconds to pass `n_bytes` on to the next GPU; some are in another host."""
        return self._slower(n_bytes * (self.n_local > 1), n_bytes * (self.n > self.n_local))

    def _slower(self, nvlink_bytes: float, network_bytes: float) -> float:
        nvlink = nvlink_bytes / self.chip.nvlink_bandwidth
        return max(nvlink, network_bytes / self.chip.network_bandwidth)


Group = TorusGroup | HostGroup


@dataclasses.dataclass(frozen=True)
class TorusMesh:
    """A mesh on a slice of `shape` chips; each expert group is a box, the boxes fill the slice."""

    chip: Chip
    shape: tuple[int, ...]
    box: tuple[int, ...]

    def group(self, axes: tuple[str, ...]) -> TorusGroup:
        """Return the devices along these mesh axes: "rank" is a box, "dp" one device per box."""
        sides = list(zip(self.box, self.shape, strict=True))
        if "dp" not in axes:
            return torus_group(self.chip, [Line(n, 1, size) for n, size in sides])
        if "rank" in axes:
            return torus_group(self.chip, [Line(size, 1, size) for _, size in sides])
        return torus_group(self.chip, [Line(size // n, n, size) for n, size in sides])


@dataclasses.dataclass(frozen=True)
class HostMesh:
    """A mesh on GPU hosts; the ranks of an expert group fill hosts, one group after the other."""

    chip: Chip
    per_host: int
    mesh: MeshSpec

    def group(self, axes: tuple[str, ...]) -> HostGroup:
        """Return the GPUs along these mesh axes."""
        n, n_local = self.mesh.size(*axes), math.gcd(self.mesh.ep, self.per_host)
        if "dp" in axes:
            n_local = self.per_host if "rank" in axes else self.per_host // n_local
        return HostGroup(self.chip, n, min(n_local, n))


def lay_out(chip: Chip, shape: tuple[int, ...], mesh: MeshSpec) -> TorusMesh | HostMesh:
    """Return `mesh` on a slice; on a torus, in the boxes with the fastest all-to-all."""
    if not chip.torus_axes:
        return HostMesh(chip, shape[-1], mesh)
    n_chips = mesh.ep // math.gcd(mesh.ep, chip.devices_per_chip)
    sides = [[n for n in range(1, size + 1) if size % n == 0] for size in shape]
    boxes = [box for box in itertools.product(*sides) if math.prod(box) == n_chips]

    def seconds(torus: TorusMesh) -> tuple[float, float]:
        return torus.group(("rank",)).all_to_all_seconds(1.0), torus.group(
            ("dp",)
        ).all_gather_seconds(1.0)

    return min((TorusMesh(chip, shape, box) for box in boxes), key=seconds)


def group_at(chip: Chip, shape: tuple[int, ...], positions: list[Position]) -> Group:
    """Return the group of the devices at these positions of a slice."""
    if not chip.torus_axes:
        return HostGroup(chip, len(positions), max(Counter(positions).values()))
    lines = [_line([at[axis] for at in positions], size) for axis, size in enumerate(shape)]
    return torus_group(chip, lines)


def _line(coordinates: list[int], axis_size: int) -> Line:
    """Return the line of evenly spaced members at these coordinates of an axis."""
    distinct = sorted(set(coordinates))
    n = len(distinct)
    return Line(n, max(1, (distinct[-1] - distinct[0]) // max(1, n - 1)), axis_size)
