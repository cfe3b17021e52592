"""The chips that programs are planned and compiled for, and the names of slices of them.

Each `Chip` has the peak rates, memory, links and XLA options of one of its JAX devices. A chip that
is planned with but not here is compiled for ahead of time (`dsv3_jax/aot`).

Sources: TPU: the "System architecture" tables of docs.cloud.google.com/tpu/docs/{v5p,v6e,tpu7x}.
GPU: NVIDIA's data sheets (half of the figures with sparsity); the DeepSeek-V3 report, sec. 3.2.2.
"""

import dataclasses
import itertools
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """The figures of one JAX device: dense FLOP per second, bytes, and bytes per second.

    TPU chips are the nodes of a torus with `torus_axes` axes. GPUs have no torus: those of a host
    are connected by NVLink, hosts by a network.
    """

    name: str
    device_kind: str  # `device.device_kind` of its JAX devices
    devices_per_chip: int = 1
    bf16_flops: float
    fp8_flops: float  # equal to bf16_flops where FP8 is emulated
    hbm_bytes: float
    hbm_bandwidth: float
    torus_axes: int = 0
    ici_bandwidth: float = 0.0  # per link and direction; a chip has 2 links per torus axis
    min_ring_size: int = 0  # torus axes of at least this many chips have wrap-around links
    nvlink_bandwidth: float = 0.0  # per GPU and direction
    network_bandwidth: float = 0.0  # per GPU and direction
    dollars_per_hour: float | None = None  # per chip
    compiler_options: tuple[tuple[str, bool | int | str], ...] = ()  # XLA options

    def __post_init__(self):
        links = ("ici_bandwidth",) if self.torus_axes else ("nvlink_bandwidth", "network_bandwidth")
        for name in ("devices_per_chip", "bf16_flops", "hbm_bytes", "hbm_bandwidth", *links):
            if getattr(self, name) <= 0:
                raise ValueError(f"chip {self.name}: {name}={getattr(self, name)} must be positive")


# Without these options XLA lets compute wait for communication.
ASYNC_ALL_TO_ALL = (
    ("xla_tpu_enable_async_all_to_all", True),
    ("xla_tpu_force_async_all_to_all", True),
    ("xla_tpu_sparse_core_maximum_preloaded_async_calls", 0),
)
# SparseCores gather weights and scatter gradients; both take twice the time that the scheduler
# assumes, hence the multipliers.
SPARSE_CORE_COLLECTIVES = (
    ("xla_tpu_enable_sparse_core_collective_offload_all_gather", True),
    ("xla_tpu_enable_sparse_core_collective_offload_reduce_scatter", True),
    ("xla_tpu_use_tc_device_shape_on_sc", True),
    ("xla_sc_disable_megacore_partitioning", True),
    ("xla_tpu_enable_async_collective_fusion_fuse_all_gather", False),
    ("xla_tpu_sparse_core_all_gather_latency_multiplier", 2),
    ("xla_tpu_sparse_core_reduce_scatter_latency_multiplier", 2),
)
# Ragged matmuls become a kernel that skips rows of no group, not a dense matmul with a mask.
RAGGED_DOT = (("xla_tpu_enable_ragged_dot_kernel", True),)

V5P = Chip(
    name="v5p",
    device_kind="TPU v5",
    bf16_flops=459e12,
    fp8_flops=459e12,
    hbm_bytes=95 * GIB,  # the part of 96 GiB that programs can allocate
    hbm_bandwidth=2765e9,
    torus_axes=3,
    ici_bandwidth=100e9,  # 1200e9 a chip, both ways over 6 links; many plan with 90e9 (uncertain)
    min_ring_size=4,
    compiler_options=ASYNC_ALL_TO_ALL + SPARSE_CORE_COLLECTIVES,
)
V6E = Chip(
    name="v6e",
    device_kind="TPU v6 lite",
    bf16_flops=918e12,
    fp8_flops=918e12,
    hbm_bytes=32 * GIB,  # about 31.25 GiB of these can be allocated (uncertain)
    hbm_bandwidth=1638e9,
    torus_axes=2,
    ici_bandwidth=100e9,  # 800e9 a chip, both directions of 4 links; older pages say 896e9
    min_ring_size=16,
    compiler_options=ASYNC_ALL_TO_ALL + SPARSE_CORE_COLLECTIVES + RAGGED_DOT,
)
TPU7X = Chip(  # Ironwood: a chip is two JAX devices, which share its links
    name="tpu7x",
    device_kind="TPU7x",
    devices_per_chip=2,
    bf16_flops=2307e12 / 2,
    fp8_flops=4614e12 / 2,
    hbm_bytes=192 * GIB / 2,
    hbm_bandwidth=7380e9 / 2,
    torus_axes=3,
    ici_bandwidth=100e9,  # 1200e9 a chip, both directions of 6 links
    min_ring_size=4,
    compiler_options=ASYNC_ALL_TO_ALL
    + RAGGED_DOT
    + (("xla_tpu_enable_sparse_core_collective_offload_ragged_all_to_all", False),),
)
H100 = Chip(  # SXM
    name="h100",
    device_kind="NVIDIA H100 80GB HBM3",
    bf16_flops=989.5e12,
    fp8_flops=1979e12,
    hbm_bytes=80 * GIB,
    hbm_bandwidth=3350e9,
    nvlink_bandwidth=450e9,  # 900e9 in both directions
    network_bandwidth=50e9,  # one 400 Gb/s adapter per GPU, as in NVIDIA's DGX; clouds differ
)
H800 = dataclasses.replace(
    H100,
    name="h800",
    device_kind="NVIDIA H800",
    nvlink_bandwidth=160e9,  # report sec. 3.2.2; 400e9 in both directions by the data sheet
    network_bandwidth=50e9,  # InfiniBand, report sec. 3.2.2
    dollars_per_hour=2.0,  # report, table 1
)
CHIPS = {chip.name: chip for chip in (V5P, V6E, TPU7X, H100, H800)}

# Dense bfloat16 FLOP per second of a JAX device by its `device_kind`: of the chips above, and of
# those that nothing is planned for, by Google Cloud's pages on TPU v4 and v5e and NVIDIA's data
# sheets of A100, H200 SXM and HGX B200 (half of the figures with sparsity).
BF16_FLOPS = {chip.device_kind: chip.bf16_flops for chip in CHIPS.values()} | {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA H200": 989.5e12,
    "NVIDIA B200": 2250e12,
}


def chip_named(name: str) -> Chip:
    """Return the chip called `name`.

    Raises:
        KeyError: no such chip; the message lists the known names.
    """
    if name not in CHIPS:
        raise KeyError(f"unknown chip {name!r}; known: {', '.join(sorted(CHIPS))}")
    return CHIPS[name]


def compiler_options(device_kind: str) -> dict[str, bool | int | str]:
    """Return the XLA options for programs on `device_kind`; empty for CPUs and unknown kinds."""
    chips = (chip for chip in CHIPS.values() if chip.device_kind == device_kind)
    return dict(next((chip.compiler_options for chip in chips), ()))


def has_fp8_units(device_kind: str) -> bool:
    """Return whether devices of this kind multiply FP8 in hardware; others emulate it."""
    return any(c.device_kind == device_kind and c.fp8_flops > c.bf16_flops for c in CHIPS.values())


def parse_topology(topology: str) -> tuple[Chip, int, tuple[int, ...]]:
    """Return the chip, the number of JAX devices and the shape of a slice.

    Args:
        topology: "v5p:8x8x16" in chips, as libtpu writes it; for GPUs the hosts and the GPUs per
            host, "h100:32x8".

    Raises:
        KeyError: an unknown chip.
        ValueError: sizes that are malformed or whose number is not the chip's number of axes.
    """
    family, _, sizes = topology.partition(":")
    chip, dims = chip_named(family), chip_named(family).torus_axes or 2
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or sizes.count("x") + 1 != dims:
        example = {3: "8x8x16", 2: "16x16"}[dims] if chip.torus_axes else "32x8 (hosts x GPUs)"
        raise ValueError(f"topology {topology!r}: expected {dims} sizes, as in {family}:{example}")
    shape = tuple(int(size) for size in sizes.split("x"))
    return chip, math.prod(shape) * chip.devices_per_chip, shape


def slice_shape(chip: Chip, n_devices: int) -> tuple[int, ...]:
    """Return the shape of a slice of `n_devices`: near a cube or square, or hosts of 8 GPUs.

    Raises:
        ValueError: no slice has exactly so many devices.
    """
    unit = chip.devices_per_chip if chip.torus_axes else min(8, max(n_devices, 1))
    if n_devices < 1 or n_devices % unit:
        raise ValueError(f"{n_devices} devices of {chip.name}: they come in groups of {unit}")
    count = n_devices // unit
    if not chip.torus_axes:
        return count, unit
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    sides = itertools.combinations_with_replacement(divisors, chip.torus_axes)
    return min((box for box in sides if math.prod(box) == count), key=sum)
