"""A plan as one dict: counts, recipe, ranking of the meshes, and bill; its keys are the JSON's."""

import argparse
import dataclasses

from configs import load_preset
from dsv3_jax.config import Config
from dsv3_jax.config_cli import override
from dsv3_jax.flops import activated_parameters, training_flops_per_token
from dsv3_jax.hardware import Chip, chip_named, parse_topology, slice_shape
from dsv3_jax.model.deepseek import count_parameters
from dsv3_jax.plan.bill import aot_bill, report_bill, run_bill
from dsv3_jax.plan.ranking import ranking_that_fits
from dsv3_jax.plan.recipe import phases
from dsv3_jax.plan.speed import EFFICIENCY, EXPOSED_SHARE
from dsv3_jax.schedules import BatchSizes


def make_plan(arguments: argparse.Namespace) -> dict:
    """Return everything that the command prints for its arguments."""
    check_positive("--tokens", arguments.tokens)
    check_positive("--step-seconds", arguments.step_seconds)
    preset = load_preset(arguments.config)
    tokens = arguments.tokens or BatchSizes.of(preset.train).sequences(preset.train.steps) * (
        preset.train.seq_len
    )
    config = override(preset, *arguments.set)
    requested, length = config.train.batch, config.train.seq_len
    chip, n_devices, shape = slice_of(arguments, requested * config.parallel.context)
    batch, found = ranking_that_fits(config, chip, n_devices, shape)
    steps = [
        (f"{row['mesh']}, predicted", row["seconds"]["step"], batch * length)
        for row in found["meshes"][:1]
    ]
    if arguments.step_seconds:
        steps.append(("--step-seconds", arguments.step_seconds, requested * length))
    bill = report_bill() + run_bill(tokens, steps, n_devices, chip)
    if arguments.aot:
        bill += aot_bill(tokens, arguments.aot, chip.dollars_per_hour)
    return {
        "config": config.name,
        "length": length,
        "asked_batch": requested,
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
        "assumptions": {"efficiency": EFFICIENCY, "exposed": EXPOSED_SHARE},
    }


def check_positive(flag: str, value: float | None):
    if value is not None and not value > 0:
        raise ValueError(f"{flag}={value:g} must be positive")


def slice_of(arguments: argparse.Namespace, n_slices: int) -> tuple[Chip, int, tuple[int, ...]]:
    """Return the chip with its overridden figures, the number of devices, and the slice's shape.

    Args:
        n_slices: of a batch: the sequences times the ranks that each lies on.
    """
    if arguments.topology and (arguments.chip or arguments.devices is not None):
        raise ValueError("give --topology, or --chip and --devices")
    if arguments.topology:
        chip, n_devices, shape = parse_topology(arguments.topology)
    else:
        chip = chip_named(arguments.chip or "v5p")
        n_devices = arguments.devices
        if n_devices is None:
            n_devices = min(n_slices & -n_slices, 1024)  # its largest factor that is a power of 2
        shape = slice_shape(chip, n_devices)
    figures = list(arguments.figure)
    if arguments.dollars_per_hour:
        figures.append(f"dollars_per_hour={arguments.dollars_per_hour}")
    return override(chip, *figures), n_devices, shape


def counts(config: Config) -> dict[str, float]:
    """Return parameters, FLOPs and bytes, none of which depend on the mesh."""
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
