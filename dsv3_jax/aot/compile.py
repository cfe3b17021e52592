"""Ahead-of-time compilation of the train step for devices that are not here.

libtpu and the CUDA plugin compile for a topology that is only described. The compiler runs in a
child process, which leaves its dump in a folder: so it can be stopped as soon as the program is
scheduled, and its crash or its memory use is a result like any other.
"""

import dataclasses
import importlib.util
import json
import multiprocessing
import os
import resource
import signal
import time
from pathlib import Path

import jax
from jax.experimental import topologies

from dsv3_jax.config import Config
from dsv3_jax.hardware import Chip, parse_topology
from dsv3_jax.interconnect import Position
from dsv3_jax.mesh_checks import check_mesh
from dsv3_jax.training.step import lower_step
from sharding.mesh import MeshSpec, check_devices, make_mesh, parse_mesh

ENVIRONMENT = {  # libtpu asks neither the network nor other processes for devices
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
}
RESULT, LOG = "result.json", "compiler.log"

# The properties that XLA asks of a GPU, as a GpuTargetConfigProto; an H800 has the same.
HOPPER = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84942979072 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  device_address_bits: 64 pcie_bandwidth: 34359738368 name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.28.0" device_interconnect_info { active_links: 18 }
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 28 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

Option = bool | int | float | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """The devices to compile for; `shape` is the torus in chips, or hosts by GPUs per host."""

    topology: str
    chip: Chip
    shape: tuple[int, ...]
    mesh: MeshSpec


def make_target(config: Config, mesh: str, topology: str) -> Target:
    """Return the target, checked against the config.

    Raises:
        KeyError: an unknown family of chips.
        ValueError: the mesh's size is not the topology's, or the config can't be divided over it.
        NotImplementedError: the compiler for the target is not installed.
    """
    chip, n_devices, shape = parse_topology(topology)
    spec = parse_mesh(mesh, n_devices)
    check_devices(spec, n_devices, topology)
    check_mesh(config, spec)
    extra, package = ("tpu", "libtpu") if chip.torus_axes else ("cuda", "jax_cuda13_plugin")
    if importlib.util.find_spec(package) is None:
        raise NotImplementedError(
            f"--topology={topology} needs the compiler in {package}, which is not installed: "
            f"pip install -c constraints.txt -e '.[{extra}]'"
        )
    return Target(topology=topology, chip=chip, shape=shape, mesh=spec)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Compilation:
    """The outcome of a compilation; the texts of the program lie in its folder."""

    positions: list[Position]  # of the mesh's devices on the slice
    memory: dict[str, int] | None  # XLA's figures in bytes; None without a complete program
    out_of_memory: str | None  # XLA's message
    seconds: float
    cpu_seconds: float
    host_bytes: int  # peak memory of the compiler on this machine


def compile_step(
    config: Config, target: Target, folder: Path, options: dict[str, Option], to_schedule: bool
) -> Compilation:
    """Compile the step that training runs, and leave the compiler's texts in `folder`.

    Args:
        options: XLA options besides those of the chip.
        to_schedule: stop when the program is scheduled and its buffers are assigned.

    Raises:
        ValueError: the compiler rejects the topology, an option or the program.
        ChildProcessError: the compiler died.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("*jit_step*"), *folder.glob(RESULT)]:
        if old.is_file():
            old.unlink()
    (folder / LOG).write_text("")
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_compile, args=(config, target, folder, options), daemon=True)
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    process.start()
    while process.is_alive():
        process.join(0.2)
        if to_schedule and _is_scheduled(folder):
            process.kill()
            process.join()
            break
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    found = _read_result(folder)
    if process.exitcode and not (to_schedule and _is_scheduled(folder)):
        raise ChildProcessError(_death(process.exitcode, seconds, after.ru_maxrss, folder))
    if "rejected" in found:
        raise ValueError(f"{target.topology}: {found['rejected']}")
    compilation = Compilation(
        positions=found["positions"],
        memory=found.get("memory"),
        out_of_memory=found.get("out_of_memory"),
        seconds=seconds,
        cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        host_bytes=after.ru_maxrss * 1024,
    )
    (folder / RESULT).write_text(json.dumps(dataclasses.asdict(compilation)))
    return compilation


def _is_scheduled(folder: Path) -> bool:
    """Return whether all texts about the schedule are there; XLA rewrites its options last."""
    reports = list(folder.glob("*jit_step*memory-usage-report.txt"))
    options = list(folder.glob("*jit_step*debug_options"))
    return bool(reports and options) and reports[0].stat().st_mtime <= options[0].stat().st_mtime


def _read_result(folder: Path) -> dict:
    path = folder / RESULT
    found = json.loads(path.read_text()) if path.exists() else {}
    return found | {"positions": [tuple(at) for at in found.get("positions", [])]}


def load_compilation(folder: Path) -> Compilation:
    """Return what `compile_step` returned when it left its texts in `folder`."""
    found = _read_result(folder)
    if not found["positions"] or "seconds" not in found:
        raise ValueError(f"--reuse: {folder} holds no finished compilation; leave --reuse out once")
    return Compilation(**found)


def _death(code: int, seconds: float, peak: int, folder: Path) -> str:
    """Return the message for a dead compiler; `code` is negative for signals, `peak` in KiB."""
    end = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}"
    hint = ": does this machine have too little memory?" if code == -signal.SIGKILL else ""
    log = (folder / LOG).read_text().strip().splitlines()[-5:]
    words = "\n".join(f"  {line}" for line in log)
    used = f"{seconds:.0f} s and {peak / 2**20:.1f} GiB of host memory"
    return (
        f"the compiler {end} after {used}{hint}\n"
        f"its last lines (all in {folder / LOG} with --dump):\n{words}"
    )


def _compile(config: Config, target: Target, folder: Path, options: dict[str, Option]):
    """Compile, in the child process; `RESULT` gets the positions, then memory or the error."""
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    found = {}

    def save(**entries):
        found.update(entries)
        (folder / RESULT).write_text(json.dumps(found))

    dump = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    try:
        mesh = make_mesh(target.mesh, devices_of(target))
        save(positions=[position_of(device, target) for device in mesh.devices.flat])
        program = lower_step(config, mesh).compile(compiler_options={**options, **dump})
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        full = "RESOURCE_EXHAUSTED" in str(error) and "hbm" in str(error).lower()
        save(**{"out_of_memory" if full else "rejected": str(error)})
        return
    analysis = program.memory_analysis()
    names = ("argument", "output", "alias", "temp")
    sizes = {name: getattr(analysis, f"{name}_size_in_bytes") for name in names}
    save(memory=sizes | {"peak": analysis.peak_memory_in_bytes})


def devices_of(target: Target) -> list:
    """Return the devices of the topology, for `make_mesh`."""
    if not target.chip.torus_axes:
        return gpu_devices(*target.shape)
    topology = topologies.get_topology_desc(platform="tpu", topology_name=target.topology)
    return topology.devices


def gpu_devices(n_hosts: int, per_host: int) -> list:
    """Return the described GPUs of so many hosts."""
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=HOPPER, topology=f"1x{n_hosts}x{per_host}"
    )
    return topology.devices


def position_of(device, target: Target) -> Position:
    """Return a chip's coordinates on the torus, or (host number,) of a GPU."""
    if target.chip.torus_axes:
        return tuple(device.coords)
    return (device.id // target.shape[-1],)
