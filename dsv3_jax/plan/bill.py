"""The bill of a run: chip hours, days and dollars."""

import dataclasses
import json
from pathlib import Path

from dsv3_jax.hardware import H800, Chip, chip_named

# DeepSeek-V3 report, table 1 and sec. 1: H800 hours, tokens of pre-training, GPUs.
HOURS_PER_TRILLION, TRILLIONS, EXTENSION_HOURS, POST_HOURS = 180e3, 14.8, 119e3, 5e3
REPORT_GPUS = 2048


def report_bill() -> list[dict]:
    """Return the bill of the report's table 1: $5.576M for 2,788K hours of H800."""
    training = HOURS_PER_TRILLION * TRILLIONS
    items = {
        "report: a trillion tokens": HOURS_PER_TRILLION,
        f"report: pre-training, {TRILLIONS}T tokens": training,
        "report: context extension": EXTENSION_HOURS,
        "report: post-training": POST_HOURS,
        "report: total": training + EXTENSION_HOURS + POST_HOURS,
    }
    return [bill_line(item, hours, REPORT_GPUS, H800) for item, hours in items.items()]


def run_bill(
    tokens: float, steps: list[tuple[str, float, int]], n_devices: int, chip: Chip
) -> list[dict]:
    """Return the bill of `tokens` tokens at each of (item, seconds per step, tokens per step)."""
    n_chips = n_devices / chip.devices_per_chip
    amount = f"{tokens / 1e12:.4g}T" if tokens > 1e11 else f"{tokens:,.0f}"
    return [
        bill_line(
            f"{item}: {amount} tokens, {seconds:.3g} s per step",
            tokens / tokens_per_step * seconds * n_chips / 3600,
            n_chips,
            chip,
        )
        for item, seconds, tokens_per_step in steps
    ]


def aot_bill(tokens: float, path: Path, price: float | None) -> list[dict]:
    """Return the bill of `tokens` tokens at the step time, on the devices, of an AOT report.

    Raises:
        ValueError: the file is no report of `python -m dsv3_jax.aot --json`.
        OSError: the file can't be read.
    """
    try:
        report = json.loads(path.read_text())
        seconds = report["predicted_step_seconds"]
    except (json.JSONDecodeError, TypeError, KeyError) as error:
        message = f"--aot={path}: not a report of python -m dsv3_jax.aot --json"
        raise ValueError(message) from error
    item = f"{report['mesh']} on {report['topology']}, compiled"
    chip = dataclasses.replace(chip_named(report["chip"]["name"]), dollars_per_hour=price)
    return run_bill(tokens, [(item, seconds, report["tokens_per_step"])], report["devices"], chip)


def bill_line(item: str, hours: float, n_chips: float, chip: Chip) -> dict:
    """Return chip hours, days with `n_chips` chips, and dollars if the chip has a price."""
    dollars = None if chip.dollars_per_hour is None else hours * chip.dollars_per_hour
    return {"what": item, "chip_hours": hours, "days": hours / n_chips / 24, "dollars": dollars}
