"""Plan a training run on paper: its counts, the meshes that work, their speed, the bill.

    python -m dsv3_jax.plan --config=dsv3_671b                          1,024 chips of v5p
    python -m dsv3_jax.plan --config=dsv3_671b --topology=tpu7x:8x8x8   a slice as libtpu names it
    python -m dsv3_jax.plan --config=dsv3_671b --chip=h800 --devices=2048 --set train.batch=2048
    python -m dsv3_jax.plan --config=dsv3_671b --figure=ici_bandwidth=9e10 --dollars-per-hour=4.2
    python -m dsv3_jax.plan --config=dsv3_671b --step-seconds=31.5      bill the step you measured
    python -m dsv3_jax.plan --config=dsv3_671b --tunnel=report.json     bill the tunnel's step

Nothing is run. Parameters and the memory of weights are exact; other memory and all times are
estimates, by the formulas in dsv3_jax/plan/memory.py, speed.py and links.py. All sequences of a
device run at once, so --set train.batch=N decides what fits. `python -m dsv3_jax.aot` compiles
the real program and knows better; its --json makes the report.json for --tunnel.
"""

import argparse
import dataclasses
import json
from pathlib import Path

from configs import load_preset, preset_names
from dsv3_jax.cli import add_set_option
from dsv3_jax.config import Config
from dsv3_jax.config_cli import override
from dsv3_jax.errors import errors_as_messages
from dsv3_jax.flops import activated_parameters, training_flops_per_token
from dsv3_jax.hardware import CHIPS, GIB, H800, Chip, chip_named, parse_topology, slice_shape
from dsv3_jax.mesh_checks import check_mesh
from dsv3_jax.model.deepseek import count_parameters
from dsv3_jax.plan.memory import memory
from dsv3_jax.plan.recipe import phases
from dsv3_jax.plan.speed import EFFICIENCY, EXPOSED, speed
from dsv3_jax.plan.tables import show
from dsv3_jax.schedules import BatchSizes, with_batch
from sharding.mesh import MeshSpec

# Report, table 1 and sec. 1: H800 hours, tokens of pre-training, GPUs.
HOURS_A_TRILLION, TRILLIONS, EXTENSION_HOURS, POST_HOURS = 180e3, 14.8, 119e3, 5e3
REPORT_GPUS = 2048


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dsv3_jax.plan",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--config", default="tiny", help=f"preset in configs/: {', '.join(preset_names())}")
    add("--chip", help=f"{', '.join(CHIPS)} (default: v5p)")
    add("--devices", type=int, help="JAX devices (default: a power of 2 that divides the batch)")
    add("--topology", help="in place of both: v5p:8x8x16, v6e:16x16, h100:32x8 (hosts x GPUs)")
    add(
        "--figure",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override a figure of the chip: a field of Chip in dsv3_jax/hardware.py",
    )
    add("--dollars-per-hour", help="price of a chip (known: the report's $2 for h800)")
    add("--tokens", type=float, help="tokens to pay for (default: all of the preset's run)")
    add("--step-seconds", type=float, help="also bill a step that you measured")
    add("--tunnel", type=Path, metavar="REPORT", help="also bill the step that the tunnel predicts")
    add_set_option(parser)
    add("--json", action="store_true", help="print everything as one JSON object")
    return parser.parse_args()


def slice_of(arguments: argparse.Namespace, rows: int) -> tuple[Chip, int, tuple[int, ...]]:
    """Chip with its overridden figures, number of devices, shape; `rows` are those of a batch."""
    if arguments.topology and (arguments.chip or arguments.devices is not None):
        raise ValueError("give --topology, or --chip and --devices")
    if arguments.topology:
        chip, n_devices, shape = parse_topology(arguments.topology)
    else:
        chip = chip_named(arguments.chip or "v5p")
        n_devices = arguments.devices
        if n_devices is None:
            n_devices = min(rows & -rows, 1024)  # the power of 2 in them
        shape = slice_shape(chip, n_devices)
    price = [f"dollars_per_hour={arguments.dollars_per_hour}"] * bool(arguments.dollars_per_hour)
    return override(chip, *arguments.figure, *price), n_devices, shape


def counts(config: Config) -> dict[str, float]:
    """Parameters, FLOPs and bytes, none of which depend on the mesh."""
    model, train, parameters = config.model, config.train, count_parameters(config.model)
    activated = activated_parameters(model)
    flops = training_flops_per_token(model, train.seq_len)
    latent = model.attention.kv_rank + model.attention.rope_dim
    return {
        "main_parameters": parameters["main"],
        "mtp_parameters": parameters["mtp"],
        "released_parameters": parameters["released"],
        "activated_parameters": activated,
        "activated_without_embedding": activated - model.vocab_size * model.width,
        "training_flops_per_token": flops,
        "training_flops_per_step": flops * train.batch * train.seq_len,
        "tokens_per_step": train.batch * train.seq_len,
        "kv_bytes_per_token": 2 * model.n_layers * latent,
    }


def meshes(n_devices: int) -> list[MeshSpec]:
    """All dp x ep of so many devices."""
    sizes = [ep for ep in range(1, n_devices + 1) if n_devices % ep == 0]
    return [MeshSpec(dp=n_devices // ep, ranks=ep) for ep in sizes]


def obstacle(config: Config, mesh: MeshSpec) -> str:
    """Why the program can't be divided over the mesh; empty if it can."""
    try:
        check_mesh(config, mesh)
    except ValueError as error:
        return str(error).removeprefix(f"mesh {mesh}: ")
    return ""


def node_forms(config: Config, mesh: MeshSpec) -> list[str]:
    """The same mesh with its expert groups in nodes."""
    forms = [MeshSpec(dp=mesh.dp, nodes=n, ranks=mesh.ep // n) for n in range(2, mesh.ep + 1)]
    return [str(form) for form in forms if form.ep == mesh.ep and not obstacle(config, form)]


def largest_batch(config: Config, mesh: MeshSpec, chip: Chip) -> int:
    """The largest batch, up to the config's, that the mesh divides and holds; 0 if none."""
    batch, step = 0, max(1, mesh.n_data_shards // config.parallel.context)
    while batch + step <= config.train.batch:
        longer = with_batch(config, batch + step)
        if obstacle(longer, mesh) or sum(memory(longer, mesh).values()) > chip.hbm_bytes:
            break
        batch += step
    return batch


def ranking(config: Config, chip: Chip, n_devices: int, shape: tuple[int, ...]) -> dict:
    """Meshes that work, fastest first; and the others, each with its reason."""
    ranked, failed = [], []
    for mesh in meshes(n_devices):
        reason = obstacle(config, mesh)
        parts = {} if reason else memory(config, mesh)
        total = sum(parts.values())
        if total > chip.hbm_bytes:
            batch = largest_batch(config, mesh, chip)
            reason = f"needs {total / GIB:.1f} of {chip.hbm_bytes / GIB:.1f} GiB; "
            reason += f"--set train.batch={batch} fits" if batch else "one sequence is too much"
        if reason:
            failed.append({"mesh": str(mesh), "reason": reason})
            continue
        *seconds, rate, mfu = fast = speed(config, mesh, chip, shape)
        ranked.append(
            {
                "mesh": str(mesh),
                "same_as": node_forms(config, mesh),
                "memory_bytes": parts | {"total": total},
                "seconds": dict(zip(fast._fields[:-2], seconds, strict=True)),
                "tokens_per_second": rate,
                "mfu": mfu,
            }
        )
    return {"meshes": sorted(ranked, key=lambda row: row["seconds"]["step"]), "failed": failed}


def ranking_that_fits(
    config: Config, chip: Chip, n_devices: int, shape: tuple[int, ...]
) -> tuple[int, dict]:
    """The ranking, and its batch: the config's, or where no mesh works the largest that one holds.

    What fails, fails with the config's batch.
    """
    found = ranking(config, chip, n_devices, shape)
    largest = 0
    if not found["meshes"]:
        largest = max(largest_batch(config, mesh, chip) for mesh in meshes(n_devices))
    if largest:
        fitting = ranking(with_batch(config, largest), chip, n_devices, shape)
        found = {"meshes": fitting["meshes"], "failed": found["failed"]}
    return largest or config.train.batch, found


def report_bill() -> list[dict]:
    """The report's table 1: $5.576M for 2,788K hours of H800."""
    training = HOURS_A_TRILLION * TRILLIONS
    items = {
        "report: a trillion tokens": HOURS_A_TRILLION,
        f"report: pre-training, {TRILLIONS}T tokens": training,
        "report: context extension": EXTENSION_HOURS,
        "report: post-training": POST_HOURS,
        "report: total": training + EXTENSION_HOURS + POST_HOURS,
    }
    return [bill_line(what, hours, REPORT_GPUS, H800) for what, hours in items.items()]


def run_bill(
    tokens: float, steps: list[tuple[str, float, int]], n_devices: int, chip: Chip
) -> list[dict]:
    """`tokens` tokens at each of (what, seconds a step, tokens a step)."""
    n_chips = n_devices / chip.devices_per_chip
    amount = f"{tokens / 1e12:.4g}T" if tokens > 1e11 else f"{tokens:,.0f}"
    return [
        bill_line(
            f"{what}: {amount} tokens, {seconds:.3g} s a step",
            tokens / tokens_a_step * seconds * n_chips / 3600,
            n_chips,
            chip,
        )
        for what, seconds, tokens_a_step in steps
    ]


def tunnel_bill(tokens: float, path: Path, price: float | None) -> list[dict]:
    """`tokens` tokens at the step time in a report of the tunnel, on its devices."""
    try:
        report = json.loads(path.read_text())
        seconds = report["predicted_step_seconds"]
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        message = f"--tunnel={path}: not a report of python -m dsv3_jax.aot --json"
        raise ValueError(message) from error
    what = f"{report['mesh']} on {report['topology']}, the tunnel"
    chip = dataclasses.replace(chip_named(report["chip"]["name"]), dollars_per_hour=price)
    steps = [(what, seconds, report["tokens_per_step"])]
    return run_bill(tokens, steps, report["devices"], chip)


def bill_line(what: str, hours: float, n_chips: float, chip: Chip) -> dict:
    """Hours of a chip; days if so many run at once; dollars if the chip has a price."""
    dollars = None if chip.dollars_per_hour is None else hours * chip.dollars_per_hour
    days = hours / n_chips / 24
    return {"what": what, "chip_hours": hours, "days": days, "dollars": dollars}


def make_plan(arguments: argparse.Namespace) -> dict:
    """Everything that is printed."""
    for name, value in {"tokens": arguments.tokens, "step-seconds": arguments.step_seconds}.items():
        if value is not None and not value > 0:
            raise ValueError(f"--{name}={value:g} must be positive")
    config = load_preset(arguments.config)
    train = config.train
    tokens = arguments.tokens or BatchSizes.of(train).sequences(train.steps) * train.seq_len
    config = override(config, *arguments.set)
    asked, length = config.train.batch, config.train.seq_len
    chip, n_devices, shape = slice_of(arguments, asked * config.parallel.context)
    batch, found = ranking_that_fits(config, chip, n_devices, shape)
    steps = [
        (f"{row['mesh']}, predicted", row["seconds"]["step"], batch * length)
        for row in found["meshes"][:1]
    ]
    if arguments.step_seconds:
        steps.append(("--step-seconds", arguments.step_seconds, asked * length))
    bill = report_bill() + run_bill(tokens, steps, n_devices, chip)
    if arguments.tunnel:
        bill += tunnel_bill(tokens, arguments.tunnel, chip.dollars_per_hour)
    return {
        "config": config.name,
        "length": length,
        "asked_batch": asked,
        "batch": batch,
        "zero": config.parallel.zero,
        "remat": config.parallel.remat,
        "counts": counts(config),
        "recipe": [phase._asdict() for phase in phases(config)],
        "chip": dataclasses.asdict(chip),
        "devices": n_devices,
        "shape": shape,
        **found,
        "bill": bill,
        "assumptions": {"efficiency": EFFICIENCY, "exposed": EXPOSED},
    }


def main():
    arguments = parse_arguments()
    with errors_as_messages():
        plan = make_plan(arguments)
    if arguments.json:
        print(json.dumps(plan))
    else:
        show(plan)


if __name__ == "__main__":
    main()
