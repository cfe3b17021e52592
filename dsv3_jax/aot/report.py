"""Analysis of a compiled step: memory, communication and predicted time, as one dict.

`analyze` compiles the step (or reads an earlier compilation), simulates the scheduled program and
returns everything that the command prints; its keys are the JSON object's. Bytes, FLOPs and seconds
are per device and step.
"""

import contextlib
import dataclasses
import tempfile
from pathlib import Path

import rich.console

from dsv3_jax.aot import hlo, loops, memory, op_cost, pipeline, timeline
from dsv3_jax.aot.collectives import link_rates, mesh_axes
from dsv3_jax.aot.compile import (
    Compilation,
    Option,
    Target,
    compile_step,
    load_compilation,
    make_target,
)
from dsv3_jax.aot.kernels import kernels
from dsv3_jax.aot.simulator import Event, Machine, Simulation, Simulator
from dsv3_jax.config import Config
from dsv3_jax.config_cli import override
from dsv3_jax.flops import training_flops_per_token
from dsv3_jax.pipeline_plan import make_pipeline
from sharding.expert_parallel import EXTRA_ROUNDS
from sharding.mesh import MeshSpec

HLO, STEP = "after_optimizations.txt", "jit_step"  # in the names of the compiler's texts
ALL_TO_ALLS = ("all-to-all", "ragged-all-to-all")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of an analysis.

    Attributes:
        to_schedule: stop the compiler when the program is scheduled.
        reuse: read the compilation in `dump` instead of compiling.
        dump: folder in which to keep the compiler's texts.
        plot: path of the PNG; by default aot.png, in `dump` if given.
        figures: overrides of the chip's figures, "name=value".
        options: XLA options besides those of the chip.
    """

    to_schedule: bool = False
    reuse: bool = False
    dump: Path | None = None
    plot: Path | None = None
    figures: tuple[str, ...] = ()
    options: dict[str, Option] = dataclasses.field(default_factory=dict)


def analyze(config: Config, mesh: str, topology: str, settings: Settings = Settings()) -> dict:
    """Return the report on a config's step on a mesh of a topology, and draw its layers.

    Raises:
        KeyError, ValueError, NotImplementedError: as `make_target`.
        ValueError: the compiler rejects the program, or there is no compilation to reuse.
        ChildProcessError: the compiler died.
    """
    target = make_target(config, mesh, topology)
    target = dataclasses.replace(target, chip=override(target.chip, *settings.figures))
    if settings.reuse and settings.dump is None:
        raise ValueError("--reuse reads what an earlier run left in --dump=DIR; give that too")
    with tempfile.TemporaryDirectory(prefix="aot-") as temporary:
        folder = settings.dump or Path(temporary)
        if settings.reuse:
            compilation = load_compilation(folder)
        else:
            with status_line(f"compiling {config.name} for {target.mesh} on {topology}"):
                compilation = compile_step(
                    config, target, folder, settings.options, settings.to_schedule
                )
        simulator = make_simulator(config, target, folder, compilation)
        report = make_report(config, target, folder, compilation, simulator)
        path = memory.find_dump(folder, HLO, near=STEP)
    plot = settings.plot or (settings.dump or Path()) / "aot.png"
    timeline.draw(titled_events(simulator, config, target), plot)
    return report | {"plot": str(plot), "hlo": str(path) if settings.dump else None}


def make_simulator(
    config: Config, target: Target, folder: Path, compilation: Compilation
) -> Simulator:
    """Return the simulator of the scheduled program in `folder` on its target."""
    chip = target.chip
    module = hlo.parse(text_of(folder, HLO))
    known, unknown = loops.trip_counts(module)
    machine = Machine(
        peak_flops=chip.bf16_flops,
        fp8_peak_flops=chip.fp8_flops,
        hbm_bandwidth=chip.hbm_bandwidth,
        link_rate=link_rates(chip, target.shape, compilation.positions),
        ragged_fill=1.0 / config.parallel.capacity_factor,
    )
    trips = known | {loop.name: assumed_trips(loop) for loop in unknown}
    frequency = {}
    if target.mesh.pp > 1:
        frequency = pipeline.mean_runs(module, make_pipeline(config, target.mesh))
        trips |= {loop.name: frequency[loop.name] for loop in unknown if loop.name in frequency}
    table = kernels(config.parallel.capacity_factor)
    return Simulator(module, machine, trips, table, frequency)


def assumed_trips(loop: loops.Loop) -> float:
    """Return the trips of a loop over data: 0 for extra rounds of the expert exchange, else 1.

    Balanced routing needs no round after the first.
    """
    return 0.0 if EXTRA_ROUNDS in loop.op_name else 1.0


def layer_bodies(simulator: Simulator) -> dict[str, str]:
    """Return the loop bodies that run a layer, by direction."""
    return pipeline.layer_bodies(simulator.module) or simulator.layer_bodies()


def titled_events(simulator: Simulator, config: Config, target: Target) -> dict[str, list[Event]]:
    """Return the events of a layer forward and backward, or of the step if no loop runs layers."""
    runs = {
        f"a layer {direction}": simulator.computation(body)
        for direction, body in layer_bodies(simulator).items()
    }
    where = f"{config.name} on {target.topology}, {target.mesh}"
    return {
        f"{where}: {title}, {run.makespan * 1e3:.3f} ms": run.events
        for title, run in (runs or {"a step": simulator.step()}).items()
    }


def text_of(folder: Path, ending: str) -> str | None:
    """Return one of the compiler's texts on the step, None if it is not there."""
    path = memory.find_dump(folder, ending, near=STEP)
    return path.read_text() if path else None


def make_report(
    config: Config, target: Target, folder: Path, compilation: Compilation, simulator: Simulator
) -> dict:
    """Return all that is printed but the paths of the files."""
    train, module = config.train, simulator.module
    step = simulator.step()
    tokens = train.batch * train.seq_len
    useful = training_flops_per_token(config.model, train.seq_len) * tokens
    n_devices, seconds = target.mesh.n_devices, step.makespan
    staged = {}
    if target.mesh.pp > 1:
        staged = pipeline.figures(simulator, make_pipeline(config, target.mesh))
        seconds = staged["step_seconds"]
    _, unknown = loops.trip_counts(module)
    return {
        "config": config.name,
        "mesh": str(target.mesh),
        "topology": target.topology,
        "devices": n_devices,
        "tokens_per_step": tokens,
        "settings": dataclasses.asdict(config.parallel) | {"batch": train.batch},
        **memory_report(config, target, folder, compilation, module),
        "flops": step.cost.flops,
        "hbm_bytes": step.cost.hbm_bytes,
        "collectives": step.by_kind(),
        **overlap_report(step),
        "predicted_step_seconds": seconds,
        "predicted_mfu": useful / n_devices / target.chip.bf16_flops / seconds,
        "tokens_per_second_per_chip": tokens / seconds / n_devices * target.chip.devices_per_chip,
        "pipeline": staged,
        "layers": {
            direction: layer_report(
                simulator.computation(body), tokens / target.mesh.n_data_shards, target.mesh
            )
            for direction, body in layer_bodies(simulator).items()
        },
        "assumed_trips": [
            loop._asdict() | {"trips": simulator.trips[loop.name]} for loop in unknown
        ],
        "unknown_kernels": op_cost.unknown_kernels(module, simulator.kernels),
        "compile_seconds": compilation.seconds,
        "compile_cpu_seconds": compilation.cpu_seconds,
        "compile_host_bytes": compilation.host_bytes,
        "complete": compilation.memory is not None,
        "chip": dataclasses.asdict(target.chip),
    }


def memory_report(
    config: Config, target: Target, folder: Path, compilation: Compilation, module: hlo.Module
) -> dict:
    """Return XLA's own figures, or of an unfinished program the sums of its allocations."""
    limit, complete = target.chip.hbm_bytes, compilation.memory
    if complete:
        sizes = {name: complete[name] for name in ("argument", "temp", "peak")}
    else:
        sums = memory.allocations(text_of(folder, "buffer-assignment.txt"))
        sizes = {"argument": sums.arguments, "temp": sums.temporaries, "peak": sums.total}
    fits = sizes["peak"] <= limit and compilation.out_of_memory is None
    texts = [text_of(folder, end) for end in ("live-range.txt", "memory-usage-report.txt")]
    return {
        **{f"{name}_bytes": size for name, size in sizes.items()},
        "limit_bytes": limit,
        "fits": fits,
        "out_of_memory": compilation.out_of_memory,
        "what_helps": [] if fits else what_helps(config, target),
        "buffers": [buffer._asdict() for buffer in memory.largest_buffers(module, *texts)],
    }


def what_helps(config: Config, target: Target) -> list[str]:
    """Return settings that take less memory, the cheapest first."""
    parallel, mesh = config.parallel, target.mesh
    larger = dataclasses.replace(mesh, dp=2 * mesh.dp)
    batch, one_each = config.train.batch, mesh.n_data_shards // parallel.context
    smaller = max(one_each, batch // 2 // one_each * one_each)
    advice = []
    if smaller < batch:
        advice.append(f"--set train.batch={smaller}: fewer sequences per device")
    if parallel.zero == 1:
        advice.append("--set parallel.zero=3: weights, moments and gradients divided")
    if parallel.remat != "full":
        advice.append("--set parallel.remat=full: layers keep their inputs only")
    if batch % (2 * one_each) == 0:
        advice.append(
            f"more devices for the same batch: --mesh={larger} on {larger.n_devices} devices"
        )
    if config.model.moe is not None:
        advice.append("a larger ep: fewer experts per device")
    return advice


def overlap_report(run: Simulation) -> dict[str, float]:
    return {
        "compute_seconds": run.compute,
        "product_seconds": run.matmul_bound,
        "communication_seconds": run.communication,
        "exposed_share": run.exposed_share,
        "covered_share": run.covered_share,
    }


def layer_report(run: Simulation, n_tokens: float, mesh: MeshSpec) -> dict:
    """Return the figures of one trip of the loop over layers, and of its all-to-alls."""
    rows = [row for kind, row in run.by_kind().items() if kind in ALL_TO_ALLS]
    count, hidden = (sum(row[name] for row in rows) for name in ("count", "beside_products"))
    return {
        "seconds": run.makespan,
        **overlap_report(run),
        "flops": run.cost.flops,
        "collectives": run.by_kind(),
        "all_to_alls": count,
        "all_to_alls_beside_products": hidden,
        "exchanged_bytes_per_token": exchanged_bytes(run, n_tokens, mesh),
    }


def exchanged_bytes(run: Simulation, n_tokens: float, mesh: MeshSpec) -> dict[str, float]:
    """Return the bytes per token that all-to-alls move along mesh axes ("node": between nodes).

    The part that stays on its device is included, as in the report's figures, which count copies of
    a token.
    """
    moved: dict[str, float] = {}
    for timed in run.collectives:
        kind, _, payload, members = timed.collective
        if kind in ALL_TO_ALLS and len(members) > 1:
            axes = ",".join(mesh_axes(members, mesh.sizes))
            n_bytes = timed.runs * payload / (1 - 1 / len(members)) / n_tokens
            moved[axes] = moved.get(axes, 0.0) + n_bytes
    return dict(sorted(moved.items()))


def status_line(text: str):
    """Return a context that shows a moving line on a terminal while its block runs."""
    console = rich.console.Console(stderr=True)
    return console.status(text) if console.is_terminal else contextlib.nullcontext()
