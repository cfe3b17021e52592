"""What a compiled step says of a run: memory, communication, time, as one dict of plain values."""

import dataclasses
from pathlib import Path

from dsv3_jax.aot import hlo, memory, pipeline, work
from dsv3_jax.aot.collectives import mesh_axes
from dsv3_jax.aot.compile import Compilation, Target
from dsv3_jax.aot.kernels import kernels
from dsv3_jax.aot.links import rates
from dsv3_jax.aot.overlap import Machine, Schedule, Walk
from dsv3_jax.config import Config
from dsv3_jax.flops import training_flops_per_token
from dsv3_jax.pipeline_plan import pipeline_of
from sharding.mesh import MeshSpec

ROUNDS = "sharding/expert_parallel.py"  # its loops run once for each round after the first
HLO, STEP = "after_optimizations.txt", "jit_step"  # in the names of the compiler's texts
ALL_TO_ALLS = ("all-to-all", "ragged-all-to-all")


def walk_of(config: Config, target: Target, folder: Path, compilation: Compilation) -> Walk:
    """The scheduled program in `folder` on its target, ready to be walked.

    Loops whose trips the text doesn't tell run as often as `assumed_trips` says.
    """
    chip = target.chip
    module = hlo.parse(text_of(folder, HLO))
    known, unknown = hlo.trip_counts(module)
    machine = Machine(
        peak_flops=chip.bf16_flops,
        fp8_peak_flops=chip.fp8_flops,
        hbm_bandwidth=chip.hbm_bandwidth,
        link_rate=rates(chip, target.shape, compilation.places),
        ragged_fill=1.0 / config.parallel.capacity_factor,
    )
    trips = known | {loop.name: assumed_trips(loop) for loop in unknown}
    mesh, odds = target.mesh, {}
    if mesh.pp > 1:
        odds = pipeline.means(module, pipeline_of(config, mesh))
        trips |= {loop.name: odds[loop.name] for loop in unknown if loop.name in odds}
    return Walk(module, machine, trips, kernels(config.parallel.capacity_factor), odds)


def bodies_of(walk: Walk) -> dict[str, str]:
    """The loop bodies that run a layer, by what they do with it."""
    return pipeline.bodies(walk.module) or walk.layer_bodies()


def assumed_trips(loop: hlo.Loop) -> float:
    """Trips of a loop over data: if routing is balanced, no round follows the first.

    Any other is taken to run once.
    """
    return 0.0 if ROUNDS in loop.source else 1.0


def text_of(folder: Path, ending: str) -> str | None:
    """One of the texts that the compiler left about the step."""
    path = memory.dumped(folder, ending, near=STEP)
    return path.read_text() if path else None


def report(
    config: Config, target: Target, folder: Path, compilation: Compilation, walk: Walk
) -> dict:
    """Everything that is printed. Bytes, FLOPs and seconds are those of a device and a step."""
    train, module = config.train, walk.module
    schedule = walk.step()
    tokens = train.batch * train.seq_len
    useful = training_flops_per_token(config.model, train.seq_len) * tokens
    n_devices, seconds = target.mesh.n_devices, schedule.makespan
    staged = {}
    if target.mesh.pp > 1:
        staged = pipeline.figures(walk, pipeline_of(config, target.mesh))
        seconds = staged["step_seconds"]
    _, unknown = hlo.trip_counts(module)
    return {
        "config": config.name,
        "mesh": str(target.mesh),
        "topology": target.topology,
        "devices": n_devices,
        "tokens_per_step": tokens,
        "settings": dataclasses.asdict(config.parallel) | {"batch": train.batch},
        **memory_of(config, target, folder, compilation, module),
        "flops": schedule.work.flops,
        "hbm_bytes": schedule.work.hbm_bytes,
        "collectives": schedule.by_kind(),
        **overlap_of(schedule),
        "predicted_step_seconds": seconds,
        "predicted_mfu": useful / n_devices / target.chip.bf16_flops / seconds,
        "tokens_per_second_per_chip": tokens / seconds / n_devices * target.chip.devices_per_chip,
        "pipeline": staged,
        "layers": {
            way: layer(walk.computation(body), tokens / target.mesh.n_data_shards, target.mesh)
            for way, body in bodies_of(walk).items()
        },
        "assumed_trips": [loop._asdict() | {"trips": walk.trips[loop.name]} for loop in unknown],
        "unknown_kernels": work.unknown_kernels(module, walk.kernels),
        "compile_seconds": compilation.seconds,
        "compile_cpu_seconds": compilation.cpu_seconds,
        "compile_host_bytes": compilation.host_bytes,
        "complete": compilation.memory is not None,
        "chip": dataclasses.asdict(target.chip),
    }


def memory_of(
    config: Config, target: Target, folder: Path, compilation: Compilation, module: hlo.Module
) -> dict:
    """XLA's own figures, or of an unfinished program the sums of its allocations."""
    limit, told = target.chip.hbm_bytes, compilation.memory
    if told:
        figures = {"argument_bytes": told["argument"], "temp_bytes": told["temp"]}
        figures["peak_bytes"] = told["peak"]
    else:
        sums = memory.allocations(text_of(folder, "buffer-assignment.txt"))
        figures = {"argument_bytes": sums.arguments, "temp_bytes": sums.temporaries}
        figures["peak_bytes"] = sums.total
    texts = [text_of(folder, end) for end in ("live-range.txt", "memory-usage-report.txt")]
    fits = figures["peak_bytes"] <= limit and compilation.out_of_memory is None
    return figures | {
        "limit_bytes": limit,
        "fits": fits,
        "out_of_memory": compilation.out_of_memory,
        "what_helps": [] if fits else what_helps(config, target),
        "buffers": [buffer._asdict() for buffer in memory.largest_buffers(module, *texts)],
    }


def what_helps(config: Config, target: Target) -> list[str]:
    """Settings that take less memory, those that cost least first."""
    parallel, mesh = config.parallel, target.mesh
    larger = dataclasses.replace(mesh, dp=2 * mesh.dp)
    batch, one_each = config.train.batch, mesh.n_data_shards // parallel.context
    smaller = max(one_each, batch // 2 // one_each * one_each)
    wider = f"more devices for the same batch: --mesh={larger} on {larger.n_devices}"
    return [
        *[f"--set train.batch={smaller}: fewer sequences a device"] * (smaller < batch),
        *["--set parallel.zero=3: weights, moments and gradients divided"] * (parallel.zero == 1),
        *["--set parallel.remat=full: layers keep their inputs only"] * (parallel.remat != "full"),
        *[wider] * (batch % (2 * one_each) == 0),
        *["a larger ep: fewer experts a device"] * (config.model.moe is not None),
    ]


def overlap_of(schedule: Schedule) -> dict[str, float]:
    return {
        "compute_seconds": schedule.compute,
        "product_seconds": schedule.products,
        "communication_seconds": schedule.communication,
        "exposed_share": schedule.exposed_share,
        "covered_share": schedule.covered_share,
    }


def layer(schedule: Schedule, n_tokens: float, mesh: MeshSpec) -> dict:
    """The figures of one trip through the loop over layers, and how its all-to-alls fare."""
    rows = [row for kind, row in schedule.by_kind().items() if kind in ALL_TO_ALLS]
    count, beside = (sum(row[name] for row in rows) for name in ("count", "beside_products"))
    return {
        "seconds": schedule.makespan,
        **overlap_of(schedule),
        "flops": schedule.work.flops,
        "collectives": schedule.by_kind(),
        "all_to_alls": count,
        "all_to_alls_beside_products": beside,
        "exchanged_bytes_per_token": exchanged(schedule, n_tokens, mesh),
    }


def exchanged(schedule: Schedule, n_tokens: float, mesh: MeshSpec) -> dict[str, float]:
    """Bytes that all-to-alls move along mesh axes for a token, what stays on its device included.

    So they compare with figures on paper, which count copies of a token: "node" is between nodes.
    """
    found: dict[str, float] = {}
    for exchange in schedule.exchanges:
        kind, _, payload, members = exchange.collective
        if kind in ALL_TO_ALLS and len(members) > 1:
            axes = ",".join(mesh_axes(members, mesh.sizes))
            moved = exchange.times * payload / (1 - 1 / len(members)) / n_tokens
            found[axes] = found.get(axes, 0.0) + moved
    return dict(sorted(found.items()))
