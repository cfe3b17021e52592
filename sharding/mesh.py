"""The mesh: its grammar, its devices, and the one manual region that programs run in.

A mesh string such as "dp4,ep8" names sizes of three logical axes: `pp` pipeline stages, `dp` data
parallel, `ep` expert parallel. `ep2x4` is 2 nodes of 4 ranks. Device meshes always have the four
axes of `AXES`, most of them of size 1, so that programs never ask which ones exist.
"""

import dataclasses
import math
import re
import sys
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("pp", "dp", "node", "rank")
DATA_AXES = ("dp", "node", "rank")  # the batch is split over these
EXPERT_AXES = ("node", "rank")  # the experts over these
GRAMMAR = "comma-separated pp, dp and ep with a size, such as dp4,ep8 or dp*,ep2x4"


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """Sizes of the mesh axes, and what its devices are; the experts lie over `nodes * ranks`.

    On a torus of chips, `rings` has for each mesh axis the sizes of the torus axes that it takes.
    """

    pp: int = 1
    dp: int = 1
    nodes: int = 1
    ranks: int = 1
    platform: str = "cpu"
    rings: tuple[tuple[str, tuple[int, ...]], ...] = ()

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(AXES, (self.pp, self.dp, self.nodes, self.ranks), strict=True))

    @property
    def ep(self) -> int:
        return self.nodes * self.ranks

    @property
    def data(self) -> int:
        """Number of shares that the batch is split into."""
        return self.dp * self.ep

    @property
    def n_devices(self) -> int:
        return self.pp * self.data

    def size(self, *axes: str) -> int:
        """Product of the sizes of the named mesh axes."""
        return math.prod(self.sizes[axis] for axis in axes)

    def __str__(self) -> str:
        ep = f"ep{self.nodes}x{self.ranks}" if self.nodes > 1 else f"ep{self.ranks}"
        parts = [f"pp{self.pp}"] * (self.pp > 1) + [f"dp{self.dp}"] + [ep] * (self.ep > 1)
        return ",".join(parts)


def parse_mesh(text: str, n_devices: int | None = None) -> MeshSpec:
    """The mesh that `text` names; `dp*` takes the devices that the other axes leave.

    Args:
        text: e.g. "dp4,ep8"; axes that are missing have size 1.
        n_devices: what `dp*` is resolved against.

    Raises:
        ValueError: bad grammar, an axis named twice, or `dp*` that does not come out whole.
    """
    sizes: dict[str, tuple[int, int] | None] = {}
    for part in text.split(","):
        match = re.fullmatch(
            r"(pp|dp)([1-9]\d*)|(ep)([1-9]\d*)(?:x([1-9]\d*))?|(dp)\*", part.strip()
        )
        if not match:
            raise ValueError(f"mesh {text!r}: {part.strip()!r} is not understood; write {GRAMMAR}")
        name = match[1] or match[3] or match[6]
        if name in sizes:
            raise ValueError(f"mesh {text!r} names {name} twice")
        first = int(match[2] or match[4] or 0)
        sizes[name] = None if match[6] else (first, int(match[5])) if match[5] else (1, first)
    nodes, ranks = sizes.get("ep", (1, 1))
    pp = sizes.get("pp", (1, 1))[1]
    if "dp" in sizes and sizes["dp"] is None:
        dp = _remaining(text, pp * nodes * ranks, n_devices)
    else:
        dp = sizes.get("dp", (1, 1))[1]
    return MeshSpec(pp=pp, dp=dp, nodes=nodes, ranks=ranks)


def _remaining(text: str, used: int, n_devices: int | None) -> int:
    if n_devices is None:
        raise ValueError(f"mesh {text!r}: dp* needs a number of devices to share out")
    if n_devices % used:
        below = max(d for d in range(1, used + 1) if n_devices % d == 0)
        raise ValueError(
            f"mesh {text!r}: dp* of {n_devices} devices, but the other axes take {used}, which "
            f"does not divide {n_devices}; the nearest size below that does is {below}"
        )
    return n_devices // used


def check_devices(spec: MeshSpec, n_devices: int, platform: str):
    """Raise a ValueError with the numbers and the nearest mesh unless `spec` has `n_devices`."""
    if spec.n_devices == n_devices:
        return
    fixed = spec.pp * spec.ep
    nearest = (
        dataclasses.replace(spec, dp=max(1, n_devices // fixed))
        if n_devices % fixed == 0
        else MeshSpec(dp=n_devices)
    )
    raise ValueError(
        f"mesh {spec} needs {spec.n_devices} devices, but there are {n_devices} ({platform}); "
        f"the nearest mesh that fits is --mesh={nearest}"
    )


def start_devices(text: str, sharers: int = 1) -> MeshSpec:
    """The mesh that `text` names, with virtual CPU devices for it where there is no accelerator.

    Args:
        sharers: processes that share these devices out.
    """
    wanted = None if "*" in text else parse_mesh(text)
    if wanted is not None:  # before the first use of jax, which makes the devices
        if wanted.n_devices % sharers:
            raise ValueError(
                f"mesh {wanted} has {wanted.n_devices} devices, which {sharers} processes cannot "
                f"share; as many as divide {wanted.n_devices} can"
            )
        jax.config.update("jax_num_cpu_devices", wanted.n_devices // sharers)
        if wanted.n_devices > 1:  # of the CPU only: queued collectives can deadlock there
            jax.config.update("jax_cpu_enable_async_dispatch", False)
    speaks = jax.process_index() == 0
    if speaks and jax.default_backend() == "cpu" and len(jax.devices()) > 1:
        n_devices = len(jax.devices())
        print(f"no accelerator here: running on {n_devices} virtual CPU devices", file=sys.stderr)
    mesh = wanted or parse_mesh(text, len(jax.devices()))
    check_devices(mesh, len(jax.devices()), jax.default_backend())
    return mesh


def make_mesh(spec: MeshSpec, devices: list | None = None) -> Mesh:
    """The device mesh of `spec`, over all devices of the default backend unless given."""
    devices = jax.devices() if devices is None else devices
    check_devices(spec, len(devices), devices[0].platform)
    shape = tuple(spec.sizes.values())
    # On a torus two mesh axes may share one of its axes, where no other way is left.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def without_stages(mesh: Mesh) -> Mesh:
    """The same devices with the axis of pipeline stages as a part of `dp`."""
    pp, dp, nodes, ranks = mesh.devices.shape
    devices = mesh.devices.reshape(1, pp * dp, nodes, ranks)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec_of(mesh: Mesh | AbstractMesh) -> MeshSpec:
    """The sizes of a mesh that `make_mesh` made, and its devices; an abstract one has CPUs."""
    if mesh.axis_names != AXES:
        raise ValueError(f"the mesh has axes {mesh.axis_names}, expected {AXES}; use make_mesh")
    pp, dp, nodes, ranks = mesh.axis_sizes
    spec = MeshSpec(pp=pp, dp=dp, nodes=nodes, ranks=ranks)
    if isinstance(mesh, AbstractMesh):
        return spec
    return dataclasses.replace(
        spec, platform=mesh.devices.flat[0].platform, rings=_rings(mesh.devices)
    )


def _rings(devices: np.ndarray) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """`MeshSpec.rings` of TPUs, which lie on a torus; nothing for others."""
    if devices.flat[0].platform != "tpu":
        return ()
    lines = [np.moveaxis(devices, dim, -1).reshape(-1, n)[0] for dim, n in enumerate(devices.shape)]
    return tuple((axis, _torus_sizes(list(line))) for axis, line in zip(AXES, lines, strict=True))


def _torus_sizes(line: Sequence) -> tuple[int, ...]:
    """Sizes of the torus axes that a line of devices runs along, the one it changes last first."""
    places = np.array([(*device.coords, device.core_on_chip) for device in line])
    moving = [column for column in places.T if len(set(column)) > 1]
    moving.sort(key=lambda column: -int(np.argmax(column != column[0])))  # by stride
    sizes = tuple(len(set(column)) for column in moving)
    if not sizes or math.prod(sizes) != len(line):
        return (len(line),)
    steps = np.unravel_index(np.arange(len(line)), sizes)
    along = [len(set(zip(a, b, strict=True))) for a, b in zip(steps, moving, strict=True)]
    return sizes if tuple(along) == sizes else (len(line),)


def region(fn: Callable, mesh: Mesh | AbstractMesh, in_specs, out_specs) -> Callable:
    """`fn` of one device's shards, run on every device of the mesh: the single `shard_map`.

    Inside, every value counts as different on every device: gradients are those of the SUM of all
    devices' results, `psum` transposes to `psum`, and what is replicated is for the caller to sum.
    """
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def placement(mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> NamedSharding:
    """Where an array of that spec lies on the mesh."""
    return NamedSharding(mesh, spec)


BATCH = PartitionSpec(DATA_AXES)
REPLICATED = PartitionSpec()
A_ROW_A_DEVICE = PartitionSpec(AXES)


def on_devices(x: np.ndarray, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """This process's part of an array, put onto its devices on purpose, as a part of the whole."""
    with jax.transfer_guard("allow"):  # with several processes JAX takes it for an accident
        return jax.make_array_from_process_local_data(placement(mesh, spec), x)


def share_of_process(mesh: Mesh, context: int = 1) -> tuple[int, int]:
    """Which of how many equal parts of a batch the devices of this process hold.

    Processes whose devices differ in their pipeline stage alone hold the same part, and so do those
    that share its sequences.

    Args:
        context: over how many devices each sequence lies.

    Raises:
        ValueError: they hold rows that are not one of equal parts.
    """
    return _held(mesh, context)[0]


def slices_of_process(mesh: Mesh, context: int) -> tuple[int, int]:
    """Which of how many equal parts of its sequences the devices of this process hold."""
    return _held(mesh, context)[1]


def _held(mesh: Mesh, context: int) -> tuple[tuple[int, int], tuple[int, int]]:
    n = spec_of(mesh).data
    found = NamedSharding(mesh, BATCH).addressable_devices_indices_map((n,)).values()
    shares = {place for (rows,) in found for place in range(*rows.indices(n))}
    return parts_of_sequences(*part_of(shares, n), n // context)


def parts_of_sequences(part: int, n_parts: int, n_groups: int):
    """A part of a batch -> which of how many parts of its sequences, and which of these.

    Args:
        n_groups: of devices that share sequences.

    Raises:
        ValueError: neither is a part some whole groups nor a group some whole parts.
    """
    if n_groups % n_parts == 0:
        return (part, n_parts), (0, 1)
    if n_parts % n_groups:
        raise ValueError(
            f"{n_parts} processes cannot share {n_groups} groups of devices with the slices of a "
            f"sequence; choose parallel.context so that one is a multiple of the other"
        )
    size = n_parts // n_groups
    return (part // size, n_groups), (part % size, size)


def part_of(held: set[int], n: int) -> tuple[int, int]:
    """Which of how many equal parts of 0 .. n - 1 these numbers are, or a ValueError."""
    first, size = min(held), len(held)
    if held != set(range(first, first + size)) or n % size or first % size:
        raise ValueError(
            f"this process's devices hold the shares {sorted(held)} of {n} of a batch, which are "
            f"not one of equal parts; put the hosts of a mesh in another order"
        )
    return first // size, n // size


def data_sum(x):
    """Sum over all shares of the batch."""
    return jax.lax.psum(x, DATA_AXES)


def data_max(x):
    """Largest over all shares of the batch."""
    return jax.lax.pmax(x, DATA_AXES)


def whole_sum(x):
    """Sum over all devices."""
    return jax.lax.psum(x, AXES)


def whole_max(x):
    """Largest over all devices."""
    return jax.lax.pmax(x, AXES)
