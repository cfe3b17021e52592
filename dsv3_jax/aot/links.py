"""Seconds that collectives take: on the torus of a TPU slice, on the two levels of GPU hosts.

Everything follows from how a group of devices lies there, which the planner chooses and the tunnel
reads off the devices of a real mesh. These are the times of perfect routing with nothing else on
its way.
"""

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterable
from typing import NamedTuple

from dsv3_jax.aot.collectives import Collective
from dsv3_jax.hardware import Chip
from sharding.mesh import MeshSpec

Place = tuple[int, ...]  # a chip's coordinates on the torus; the number of a host


class Line(NamedTuple):
    """How a group lies along an axis of the torus that it has several chips on."""

    n: int
    apart: int  # from one to the next: as many groups share the links between
    size: int  # of the axis


@dataclasses.dataclass(frozen=True)
class OnTorus:
    """A group of devices on a TPU slice: a grid with a line along each axis."""

    chip: Chip
    lines: tuple[Line, ...]

    def exchange(self, n_bytes: float) -> float:
        """Seconds of an all-to-all in which each device sends `n_bytes`, its own share included.

        On a ring of n chips the mean way is n/4 hops, and a chip has 2 links: n/8 of what it sends
        crosses each. Where the ring doesn't close, n/4 crosses the link in the middle. All axes
        work at once; the devices of a chip share its links, and groups `apart` the ways between.
        """
        crossing = [n * apart / self._ways(n * apart, size) / 4 for n, apart, size in self.lines]
        busiest = n_bytes * max(crossing, default=0.0) * self.chip.devices_per_chip
        return busiest / self.chip.ici_bandwidth

    def gather(self, n_bytes: float) -> float:
        """Seconds in which each device gets `n_bytes` by all-gather, or gives by reduce-scatter.

        Rings on every torus axis at once, both ways round.
        """
        rings = [self._ways(n * apart, size) / apart for n, apart, size in self.lines]
        rate = sum(rings) * self.chip.ici_bandwidth / self.chip.devices_per_chip
        return n_bytes / rate if rate else 0.0

    def hop(self, n_bytes: float) -> float:
        """Seconds to pass `n_bytes` on to a neighbour."""
        return n_bytes * self.chip.devices_per_chip / self.chip.ici_bandwidth

    def _ways(self, span: int, size: int) -> int:
        """Directions round: 2 if so many chips of an axis close to a ring, else 1."""
        return 2 if span == size >= self.chip.min_ring_size else 1


def on_torus(chip: Chip, lines: Iterable[Line]) -> OnTorus:
    return OnTorus(chip, tuple(line for line in lines if line.n > 1))


@dataclasses.dataclass(frozen=True)
class OnHosts:
    """A group of `n` GPUs, `local` of them in each host."""

    chip: Chip
    n: int
    local: int

    def exchange(self, n_bytes: float) -> float:
        """Seconds of an all-to-all of `n_bytes` a GPU: the slower of NVLink and network."""
        apart = n_bytes / self.n
        return self._slower(apart * (self.local - 1), apart * (self.n - self.local))

    def gather(self, n_bytes: float) -> float:
        """Seconds to get `n_bytes`: the network brings each to a host once, NVLink spreads it."""
        return self._slower(
            n_bytes * (self.local > 1), n_bytes / self.local * (self.n > self.local)
        )

    def hop(self, n_bytes: float) -> float:
        """Seconds to pass `n_bytes` on to the next GPU; some are in another host."""
        return self._slower(n_bytes * (self.local > 1), n_bytes * (self.n > self.local))

    def _slower(self, inside: float, outside: float) -> float:
        return max(inside / self.chip.nvlink_bandwidth, outside / self.chip.network_bandwidth)


Group = OnTorus | OnHosts


@dataclasses.dataclass(frozen=True)
class Torus:
    """A slice of `shape` chips; expert groups are boxes of it, one beside the other."""

    chip: Chip
    shape: tuple[int, ...]
    box: tuple[int, ...]

    def group(self, axes: tuple[str, ...]) -> OnTorus:
        """The devices along these mesh axes: "rank" is a box, "dp" one device of each box."""
        sides = list(zip(self.box, self.shape, strict=True))
        if "dp" not in axes:
            return on_torus(self.chip, [Line(n, 1, size) for n, size in sides])
        if "rank" in axes:
            return on_torus(self.chip, [Line(size, 1, size) for _, size in sides])
        return on_torus(self.chip, [Line(size // n, n, size) for n, size in sides])


@dataclasses.dataclass(frozen=True)
class Hosts:
    """GPU hosts; ranks of an expert group fill them, one group beside the other."""

    chip: Chip
    per_host: int
    mesh: MeshSpec

    def group(self, axes: tuple[str, ...]) -> OnHosts:
        """The GPUs along these mesh axes."""
        n, local = self.mesh.size(*axes), math.gcd(self.mesh.ep, self.per_host)
        if "dp" in axes:
            local = self.per_host if "rank" in axes else self.per_host // local
        return OnHosts(self.chip, n, min(local, n))


def links_of(chip: Chip, shape: tuple[int, ...], mesh: MeshSpec) -> Torus | Hosts:
    """How `mesh` lies on a slice; on a torus, in the boxes with the fastest all-to-all."""
    if not chip.torus_axes:
        return Hosts(chip, shape[-1], mesh)
    n_chips = mesh.ep // math.gcd(mesh.ep, chip.devices_per_chip)
    sides = [[n for n in range(1, size + 1) if size % n == 0] for size in shape]
    boxes = [box for box in itertools.product(*sides) if math.prod(box) == n_chips]
    tori = [Torus(chip, shape, box) for box in boxes]

    def seconds(torus: Torus) -> tuple[float, float]:
        return torus.group(("rank",)).exchange(1.0), torus.group(("dp",)).gather(1.0)

    return min(tori, key=seconds)


def group_at(chip: Chip, shape: tuple[int, ...], places: list[Place]) -> Group:
    """How devices in these places of a slice lie: chips on the torus, or numbers of hosts."""
    if not chip.torus_axes:
        return OnHosts(chip, len(places), max(Counter(places).values()))
    lines = [_line([place[axis] for place in places], size) for axis, size in enumerate(shape)]
    return on_torus(chip, lines)


def _line(at: list[int], size: int) -> Line:
    """Members, evenly spaced, at these coordinates of an axis."""
    distinct = sorted(set(at))
    n = len(distinct)
    return Line(n, max(1, (distinct[-1] - distinct[0]) // max(1, n - 1)), size)


def rates(chip: Chip, shape: tuple[int, ...], places: list[Place]) -> Callable[[Collective], float]:
    """The rate of an exchange: bytes of its payload a second, if nothing else is on its way.

    Args:
        places: of the mesh's devices, in the order in which the program counts them.
    """

    @functools.cache
    def group_of(members: tuple[int, ...]) -> Group:
        return group_at(chip, shape, [places[i] for i in members])

    def rate(exchange: Collective) -> float:
        group, n = group_of(exchange.members), len(exchange.members)
        if exchange.kind == "collective-permute":
            seconds = group.hop(1.0)
        elif exchange.kind in ("all-to-all", "ragged-all-to-all"):
            seconds = group.exchange(1.0 / (1 - 1 / n))  # its payload is without what stays
        else:
            seconds = group.gather(1.0)
        return 1.0 / seconds if seconds else math.inf

    return rate


def shape_of(chip: Chip, n_devices: int) -> tuple[int, ...]:
    """The shape of a slice of so many devices: near a cube or square, or full hosts of 8 GPUs."""
    group = chip.devices_per_chip if chip.torus_axes else min(8, max(n_devices, 1))
    if n_devices < 1 or n_devices % group:
        raise ValueError(f"{n_devices} devices of {chip.name}: they come in groups of {group}")
    count = n_devices // group
    if not chip.torus_axes:
        return count, group
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    sides = itertools.combinations_with_replacement(divisors, chip.torus_axes)
    return min((box for box in sides if math.prod(box) == count), key=sum)
