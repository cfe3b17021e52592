"""The train step, compiled for devices that are not here.

libtpu and the CUDA plugin compile for a topology that is only described. The compiler works in a
process of its own, which leaves its dump in a folder: so it can be stopped once the program is
scheduled, and what it does to that process is a result.
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

from dsv3_jax.aot import gpu
from dsv3_jax.config import Config
from dsv3_jax.hardware import Chip, parse_topology
from dsv3_jax.mesh_checks import check_mesh
from dsv3_jax.training.step import lower_step
from sharding.mesh import MeshSpec, check_devices, make_mesh, parse_mesh

ENVIRONMENT = {  # libtpu asks no network and no other process what there is
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "CUDA_VISIBLE_DEVICES": "-1",
}
RESULT, LOG = "result.json", "compiler.log"

Option = bool | int | float | str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """Devices to compile for: `shape` is that of the torus in chips, or hosts by GPUs a host."""

    topology: str
    chip: Chip
    shape: tuple[int, ...]
    mesh: MeshSpec


def target_of(config: Config, mesh: str, topology: str) -> Target:
    """The target, checked against the config as far as that goes without its compiler.

    Raises:
        KeyError: an unknown family of chips.
        ValueError: a mesh that isn't as large as the topology or doesn't divide the config.
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
    """What came of it; the programs' texts lie in its folder."""

    places: list[tuple[int, ...]]  # of the mesh's devices: chips on the torus, numbers of hosts
    memory: dict[str, int] | None  # XLA's figures in bytes; None without a complete program
    out_of_memory: str | None  # XLA's text
    seconds: float
    cpu_seconds: float
    host_bytes: int  # of memory at most, here


def compile_step(
    config: Config, target: Target, folder: Path, options: dict[str, Option], to_schedule: bool
) -> Compilation:
    """Compile the step that training runs, and leave the compiler's texts in `folder`.

    Args:
        options: for XLA, besides those of the chip.
        to_schedule: stop when the program is scheduled and its buffers are assigned.

    Raises:
        ValueError: the compiler rejects the topology, an option or the program.
        ChildProcessError: it died.
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
        if to_schedule and _scheduled(folder):
            process.kill()
            process.join()
            break
    seconds, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    found = _told(folder)
    if process.exitcode and not (to_schedule and _scheduled(folder)):
        raise ChildProcessError(_last_words(process.exitcode, seconds, after.ru_maxrss, folder))
    if "rejected" in found:
        raise ValueError(f"{target.topology}: {found['rejected']}")
    compilation = Compilation(
        places=found["places"],
        memory=found.get("memory"),
        out_of_memory=found.get("out_of_memory"),
        seconds=seconds,
        cpu_seconds=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        host_bytes=after.ru_maxrss * 1024,
    )
    (folder / RESULT).write_text(json.dumps(dataclasses.asdict(compilation)))
    return compilation


def _scheduled(folder: Path) -> bool:
    """Whether all texts about the schedule lie there: XLA notes its options again behind them."""
    reports = list(folder.glob("*jit_step*memory-usage-report.txt"))
    notes = list(folder.glob("*jit_step*debug_options"))
    return bool(reports and notes) and reports[0].stat().st_mtime <= notes[0].stat().st_mtime


def _told(folder: Path) -> dict:
    path = folder / RESULT
    found = json.loads(path.read_text()) if path.exists() else {}
    return found | {"places": [tuple(place) for place in found.get("places", [])]}


def compiled_before(folder: Path) -> Compilation:
    """What `compile_step` returned when it left its texts in `folder`."""
    found = _told(folder)
    if "seconds" not in found:
        raise ValueError(f"--reuse: {folder} holds no finished compilation; leave --reuse out once")
    return Compilation(**found)


def _last_words(code: int, seconds: float, peak: int, folder: Path) -> str:
    """`code` as multiprocessing gives it, negative for signals; `peak` in KiB."""
    how = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}"
    why = ": does this machine have too little memory?" if code == -signal.SIGKILL else ""
    lines = (folder / LOG).read_text().strip().splitlines()[-5:]
    words = "\n".join(f"  {line}" for line in lines)
    return (
        f"the compiler {how} after {seconds:.0f} s and {peak / 2**20:.1f} GiB of host memory{why}\n"
        f"its last words (all in {folder / LOG} with --dump):\n{words}"
    )


def _compile(config: Config, target: Target, folder: Path, options: dict[str, Option]):
    """What the other process does: `RESULT` has the places, then memory or what was wrong."""
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(ENVIRONMENT)
    jax.config.update("jax_platforms", "cpu")
    found = {}

    def tell(**what):
        found.update(what)
        (folder / RESULT).write_text(json.dumps(found))

    dump = {"xla_dump_to": str(folder), "xla_dump_hlo_as_text": True}
    try:
        mesh = make_mesh(target.mesh, devices_of(target))
        tell(places=[place_of(device, target) for device in mesh.devices.flat])
        program = lower_step(config, mesh).compile(compiler_options={**options, **dump})
    except (ValueError, NotImplementedError, jax.errors.JaxRuntimeError) as error:
        full = "RESOURCE_EXHAUSTED" in str(error) and "hbm" in str(error).lower()
        tell(**{"out_of_memory" if full else "rejected": str(error)})
        return
    analysis = program.memory_analysis()
    names = ("argument", "output", "alias", "temp")
    sizes = {name: getattr(analysis, f"{name}_size_in_bytes") for name in names}
    tell(memory=sizes | {"peak": analysis.peak_memory_in_bytes})


def devices_of(target: Target) -> list:
    """The devices of the topology, for a mesh to be made of."""
    if target.chip.torus_axes:
        name = {"platform": "tpu", "topology_name": target.topology}
        return topologies.get_topology_desc(**name).devices
    return gpu.devices(*target.shape)


def place_of(device, target: Target) -> tuple[int, ...]:
    """Where a device lies: its chip's coordinates on the torus, or the number of its host."""
    if target.chip.torus_axes:
        return tuple(device.coords)
    return (device.id // target.shape[-1],)
