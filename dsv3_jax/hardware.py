"""Chips: what one JAX device of each can do, and the names of slices of them.

Sources: TPU: the "System architecture" tables of docs.cloud.google.com/tpu/docs/{v5p,v6e,tpu7x}.
GPU: NVIDIA's data sheets (half of the figures with sparsity); the DeepSeek-V3 report, sec. 3.2.2.
"""

import dataclasses
import math
import re

GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """Figures of one JAX device; FLOP/s are dense, bandwidths bytes a second.

    TPUs lie on a torus of `torus_axes` axes. GPUs have none: they share a host by NVLink, and hosts
    a network.
    """

    name: str
    kind: str  # `device.device_kind` of its JAX devices
    devices_a_chip: int = 1
    bf16_peak: float
    fp8_peak: float  # the bf16 figure where FP8 is emulated
    hbm_bytes: float
    hbm_bandwidth: float
    torus_axes: int = 0
    ici_bandwidth: float = 0.0  # a link, one direction; a chip's devices share its 2 links an axis
    ring_size: int = 0  # an axis of at least this many chips closes to a ring
    nvlink_bandwidth: float = 0.0  # a GPU, one direction
    network_bandwidth: float = 0.0  # a GPU, one direction
    dollars_per_hour: float | None = None  # of a chip
    compiler_options: tuple[tuple[str, bool | int | str], ...] = ()  # for XLA

    def __post_init__(self):
        links = ("ici_bandwidth",) if self.torus_axes else ("nvlink_bandwidth", "network_bandwidth")
        for name in ("devices_a_chip", "bf16_peak", "hbm_bytes", "hbm_bandwidth", *links):
            if getattr(self, name) <= 0:
                raise ValueError(f"chip {self.name}: {name}={getattr(self, name)} must be positive")


# Options without which XLA lets compute wait for communication. All-to-alls run beside compute:
EXCHANGE = (
    ("xla_tpu_enable_async_all_to_all", True),
    ("xla_tpu_force_async_all_to_all", True),
    ("xla_tpu_sparse_core_maximum_preloaded_async_calls", 0),
)
# SparseCores gather weights and scatter gradients, which take twice what the scheduler assumes:
SPARSE_CORE = (
    ("xla_tpu_enable_sparse_core_collective_offload_all_gather", True),
    ("xla_tpu_enable_sparse_core_collective_offload_reduce_scatter", True),
    ("xla_tpu_use_tc_device_shape_on_sc", True),
    ("xla_sc_disable_megacore_partitioning", True),
    ("xla_tpu_enable_async_collective_fusion_fuse_all_gather", False),
    ("xla_tpu_sparse_core_all_gather_latency_multiplier", 2),
    ("xla_tpu_sparse_core_reduce_scatter_latency_multiplier", 2),
)
# Ragged products are a kernel that skips what is not there, not a dense product with a mask:
RAGGED_DOT = (("xla_tpu_enable_ragged_dot_kernel", True),)

V5P = Chip(
    name="v5p",
    kind="TPU v5",
    bf16_peak=459e12,
    fp8_peak=459e12,
    hbm_bytes=95 * GIB,  # what programs can allocate of 96
    hbm_bandwidth=2765e9,
    torus_axes=3,
    ici_bandwidth=100e9,  # 1200e9 a chip, both ways over 6 links; many plan with 90e9 (uncertain)
    ring_size=4,
    compiler_options=EXCHANGE + SPARSE_CORE,
)
V6E = Chip(
    name="v6e",
    kind="TPU v6 lite",
    bf16_peak=918e12,
    fp8_peak=918e12,
    hbm_bytes=32 * GIB,  # of this about 31.25 can be allocated (uncertain)
    hbm_bandwidth=1638e9,
    torus_axes=2,
    ici_bandwidth=100e9,  # 800e9 a chip, both directions of 4 links; older pages say 896e9
    ring_size=16,
    compiler_options=EXCHANGE + SPARSE_CORE + RAGGED_DOT,
)
TPU7X = Chip(  # Ironwood: a chip is two JAX devices; all but the links is half of the chip's figure
    name="tpu7x",
    kind="TPU7x",
    devices_a_chip=2,
    bf16_peak=2307e12 / 2,
    fp8_peak=4614e12 / 2,
    hbm_bytes=192 * GIB / 2,
    hbm_bandwidth=7380e9 / 2,
    torus_axes=3,
    ici_bandwidth=100e9,  # 1200e9 a chip, both directions of 6 links
    ring_size=4,
    compiler_options=EXCHANGE
    + RAGGED_DOT
    + (("xla_tpu_enable_sparse_core_collective_offload_ragged_all_to_all", False),),
)
H100 = Chip(  # SXM
    name="h100",
    kind="NVIDIA H100 80GB HBM3",
    bf16_peak=989.5e12,
    fp8_peak=1979e12,
    hbm_bytes=80 * GIB,
    hbm_bandwidth=3350e9,
    nvlink_bandwidth=450e9,  # 900e9 in both directions
    network_bandwidth=50e9,  # a 400 Gb/s adapter a GPU, as in NVIDIA's DGX; clouds differ
)
H800 = dataclasses.replace(
    H100,
    name="h800",
    kind="NVIDIA H800",
    nvlink_bandwidth=160e9,  # report sec. 3.2.2; 400e9 in both directions by the data sheet
    network_bandwidth=50e9,  # InfiniBand, report sec. 3.2.2
    dollars_per_hour=2.0,  # report, table 1
)
CHIPS = {chip.name: chip for chip in (V5P, V6E, TPU7X, H100, H800)}


def chip_named(name: str) -> Chip:
    """The chip of that name, or a KeyError that lists those there are."""
    if name not in CHIPS:
        raise KeyError(f"unknown chip {name!r}; known: {', '.join(sorted(CHIPS))}")
    return CHIPS[name]


def compiler_options(device_kind: str) -> dict[str, bool | int | str]:
    """XLA's options for programs on such devices; none for CPUs and kinds that are not known."""
    chips = (chip for chip in CHIPS.values() if chip.kind == device_kind)
    return dict(next((chip.compiler_options for chip in chips), ()))


def multiplies_fp8(device_kind: str) -> bool:
    """Whether such devices have units for products in FP8; elsewhere these are emulated."""
    return any(c.kind == device_kind and c.fp8_peak > c.bf16_peak for c in CHIPS.values())


def chip_of(topology: str) -> tuple[Chip, int, tuple[int, ...]]:
    """Chip, number of JAX devices and shape of a slice: "v5p:8x8x16" in chips, as libtpu writes it.

    GPUs are written as hosts by GPUs a host: "h100:32x8".
    """
    family, _, sizes = topology.partition(":")
    chip, dims = chip_named(family), chip_named(family).torus_axes or 2
    if not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", sizes) or sizes.count("x") + 1 != dims:
        example = {3: "8x8x16", 2: "16x16"}[dims] if chip.torus_axes else "32x8 (hosts x GPUs)"
        raise ValueError(f"topology {topology!r}: expected {dims} sizes, as in {family}:{example}")
    shape = tuple(int(size) for size in sizes.split("x"))
    return chip, math.prod(shape) * chip.devices_a_chip, shape
