"""The mesh: its grammar, its devices, and the one manual region that programs run in.

A mesh string such as "dp4,ep8" gives the sizes of three logical axes: `pp` pipeline stages, `dp`
data parallelism, `ep` expert parallelism. `ep2x4` is 2 nodes of 4 ranks. Device meshes always have
the four axes of `AXES`, most of them of size 1, so that programs never ask which axes exist.
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

from sharding import GRAMMAR

AXES = ("pp", "dp", "node", "rank")
DATA_AXES = ("dp", "node", "rank")  # the batch is split over these axes
EXPERT_AXES = ("node", "rank")  # the experts are split over these axes

BATCH = PartitionSpec(DATA_AXES)
REPLICATED = PartitionSpec()
ROW_PER_DEVICE = PartitionSpec(AXES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshSpec:
    """The sizes of the mesh axes and the kind of device; experts are split over `nodes * ranks`.

    On a torus of chips, `rings` gives for each mesh axis the sizes of the torus axes it runs along.
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
    def n_data_shards(self) -> int:
        """The number of shards that the batch is split into."""
        return self.dp * self.ep

    @property
    def n_devices(self) -> int:
        return self.pp * self.n_data_shards

    def size(self, *axes: str) -> int:
        """Return the product of the sizes of the named mesh axes."""
        return math.prod(self.sizes[axis] for axis in axes)

    def __str__(self) -> str:
        axes = [f"dp{self.dp}"]
        if self.pp > 1:
            axes.insert(0, f"pp{self.pp}")
        if self.nodes > 1:
            axes.append(f"ep{self.nodes}x{self.ranks}")
        elif self.ranks > 1:
            axes.append(f"ep{self.ranks}")
        return ",".join(axes)


def parse_mesh(text: str, n_devices: int | None = None) -> MeshSpec:
    """Return the mesh that `text` names; `dp*` takes the devices that the other axes leave.

    Args:
        text: for example "dp4,ep8"; axes that are missing have size 1.
        n_devices: the number of devices that `dp*` fills.

    Raises:
        ValueError: bad grammar, an axis named twice, or devices that the other axes do not divide.
    """
    sizes: dict[str, tuple[int, int] | None] = {}
    for axis in map(str.strip, text.split(",")):
        match = re.fullmatch(r"(pp|dp)([1-9]\d*)|(ep)([1-9]\d*)(?:x([1-9]\d*))?|(dp)\*", axis)
        if not match:
            raise ValueError(f"mesh {text!r}: {axis!r} is not understood; write {GRAMMAR}")
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
    """Check that the mesh has `n_devices` devices.

    Raises:
        ValueError: it has not; the error gives both numbers and the nearest mesh that fits.
    """
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


def start_devices(text: str, n_processes: int = 1) -> MeshSpec:
    """Return the mesh that `text` names; without an accelerator, make virtual CPU devices for it.

    Args:
        n_processes: processes that divide the devices among themselves.

    Raises:
        ValueError: bad grammar, or another number of devices than the mesh needs.
    """
    wanted = None if "*" in text else parse_mesh(text)
    if wanted is not None:  # before the first use of jax, which makes the devices
        if wanted.n_devices % n_processes:
            raise ValueError(
                f"mesh {wanted} has {wanted.n_devices} devices, which {n_processes} processes "
                f"cannot share; as many as divide {wanted.n_devices} can"
            )
        jax.config.update("jax_num_cpu_devices", wanted.n_devices // n_processes)
        if wanted.n_devices > 1:  # collectives that are queued can deadlock on the CPU
            jax.config.update("jax_cpu_enable_async_dispatch", False)
    n_devices, platform = len(jax.devices()), jax.default_backend()
    if platform == "cpu" and n_devices > 1 and jax.process_index() == 0:
        print(f"no accelerator here: running on {n_devices} virtual CPU devices", file=sys.stderr)
    mesh = wanted or parse_mesh(text, n_devices)
    check_devices(mesh, n_devices, platform)
    return mesh


def make_mesh(spec: MeshSpec, devices: list | None = None) -> Mesh:
    """Return the device mesh of `spec`; `devices` are all of the default backend unless given."""
    devices = jax.devices() if devices is None else devices
    check_devices(spec, len(devices), devices[0].platform)
    shape = tuple(spec.sizes.values())
    # On a torus two mesh axes may share a torus axis where nothing else is possible.
    placed = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Mesh(placed, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def fold_pp_into_dp(mesh: Mesh) -> Mesh:
    """Return a mesh of the same devices whose `dp` axis includes the pipeline stages, if any."""
    pp, dp, nodes, ranks = mesh.devices.shape
    devices = mesh.devices.reshape(1, pp * dp, nodes, ranks)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def mesh_spec(mesh: Mesh | AbstractMesh) -> MeshSpec:
    """Return the `MeshSpec` of a mesh from `make_mesh`; an abstract mesh counts as CPUs.

    Raises:
        ValueError: the mesh has other axes than `AXES`.
    """
    if mesh.axis_names != AXES:
        raise ValueError(f"the mesh has axes {mesh.axis_names}, expected {AXES}; use make_mesh")
    pp, dp, nodes, ranks = mesh.axis_sizes
    spec = MeshSpec(pp=pp, dp=dp, nodes=nodes, ranks=ranks)
    if isinstance(mesh, AbstractMesh):
        return spec
    return dataclasses.replace(
        spec, platform=mesh.devices.flat[0].platform, rings=_torus_rings(mesh.devices)
    )


def _torus_rings(devices: np.ndarray) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """Return `MeshSpec.rings` for TPUs, which lie on a torus; nothing for other devices."""
    if devices.flat[0].platform != "tpu":
        return ()
    lines = [np.moveaxis(devices, dim, -1).reshape(-1, n)[0] for dim, n in enumerate(devices.shape)]
    return tuple((axis, _torus_sizes(list(line))) for axis, line in zip(AXES, lines, strict=True))


def _torus_sizes(line: Sequence) -> tuple[int, ...]:
    """Return the sizes of the torus axes that a line of devices runs along, slowest first."""
    coordinates = np.array([(*device.coords, device.core_on_chip) for device in line])
    moving = [column for column in coordinates.T if len(set(column)) > 1]
    moving.sort(key=lambda column: -int(np.argmax(column != column[0])))  # by stride
    sizes = tuple(len(set(column)) for column in moving)
    if not sizes or math.prod(sizes) != len(line):
        return (len(line),)
    expected = np.unravel_index(np.arange(len(line)), sizes)
    matches = [len(set(zip(a, b, strict=True))) for a, b in zip(expected, moving, strict=True)]
    return sizes if tuple(matches) == sizes else (len(line),)


def manual_region(fn: Callable, mesh: Mesh | AbstractMesh, in_specs, out_specs) -> Callable:
    """Return a function that runs `fn` on the shards of every device: the only `shard_map`.

    Inside, every value counts as different on every device: gradients are those of the SUM of all
    devices' results, `psum` transposes to `psum`, and the gradient of a replicated input has to be
    summed over its replicas by the caller.
    """
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def named_sharding(mesh: Mesh | AbstractMesh, spec: PartitionSpec) -> NamedSharding:
    """Return the sharding of an array with that spec on the mesh."""
    return NamedSharding(mesh, spec)


def make_global_array(x: np.ndarray, mesh: Mesh, spec: PartitionSpec) -> jax.Array:
    """Put this process's part of an array onto its devices; return the global array."""
    with jax.transfer_guard("allow"):  # with several processes JAX takes it for an accident
        return jax.make_array_from_process_local_data(named_sharding(mesh, spec), x)


Shard = tuple[int, int]  # (index, number of equal shards)


def process_batch_shard(mesh: Mesh, context: int = 1) -> Shard:
    """Return which shard of a batch's sequences belongs to the devices of this process.

    Processes whose devices differ only in their pipeline stage have the same shard, and so have
    processes that hold different slices of the same sequences.

    Args:
        context: the number of devices that each sequence lies on.

    Raises:
        ValueError: the rows of its devices are not one of equal shards.
    """
    return _process_shards(mesh, context)[0]


def process_sequence_shard(mesh: Mesh, context: int) -> Shard:
    """Return which shard of each of its sequences belongs to the devices of this process."""
    return _process_shards(mesh, context)[1]


def _process_shards(mesh: Mesh, context: int) -> tuple[Shard, Shard]:
    n = mesh_spec(mesh).n_data_shards
    indices = NamedSharding(mesh, BATCH).addressable_devices_indices_map((n,)).values()
    held = {row for (rows,) in indices for row in range(*rows.indices(n))}
    return split_batch_and_sequence(*contiguous_shard(held, n), n // context)


def split_batch_and_sequence(index: int, n_shards: int, n_groups: int) -> tuple[Shard, Shard]:
    """Return the shard of the sequences, and of each of them, that one shard of a batch is.

    Args:
        n_groups: groups of devices that hold the slices of the same sequences.

    Raises:
        ValueError: a shard is not some whole groups, nor a group some whole shards.
    """
    if n_groups % n_shards == 0:
        return (index, n_shards), (0, 1)
    if n_shards % n_groups:
        raise ValueError(
            f"{n_shards} processes cannot share {n_groups} groups of devices with the slices of a "
            f"sequence; choose parallel.context so that one is a multiple of the other"
        )
    size = n_shards // n_groups
    return (index // size, n_groups), (index % size, size)


def contiguous_shard(held: set[int], n: int) -> Shard:
    """Return which of equal shards of the numbers 0 .. n - 1 the set `held` is.

    Raises:
        ValueError: it is none.
    """
    first, size = min(held), len(held)
    if held != set(range(first, first + size)) or n % size or first % size:
        raise ValueError(
            f"this process's devices hold the shards {sorted(held)} of {n} of a batch, which are "
            f"not one of equal parts; put the hosts of a mesh in another order"
        )
    return first // size, n // size
