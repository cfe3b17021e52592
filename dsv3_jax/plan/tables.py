"""The tables that the terminal shows of a plan."""

import rich.console
import rich.table

from dsv3_jax.cli import table
from dsv3_jax.hardware import GIB

COUNTS = {
    "main_parameters": "main parameters",
    "mtp_parameters": "MTP parameters",
    "released_parameters": "released parameters, MTP's copies included",
    "activated_parameters": "activated parameters",
    "activated_without_embedding": "activated without the embedding",
    "training_flops_per_token": "training FLOPs per token",
    "training_flops_per_step": "training FLOPs per step",
    "tokens_per_step": "tokens per step",
    "kv_bytes_per_token": "KV cache bytes per token, bfloat16",
}
ASSUMPTIONS = (
    "Predicted, not measured: compute at {efficiency:.0%} of the bf16 peak, {exposed:.0%} of the "
    "communication exposed, balanced routing, links at their full rate. Expect up to 1.5 times "
    "these seconds, and meshes within 10 % of each other to change places. Memory of weights, "
    "moments and stored gradients is exact, the rest is counted as if all alive at once. An expert "
    "group written in nodes, as ep8x8 for ep64, costs the same as long as the exchange has one "
    "level. Meshes with pp are not in here: python -m dsv3_jax.aot predicts them."
)


def show(plan: dict):
    """Print a plan of `report.make_plan`."""
    console = rich.console.Console(highlight=False)
    console.print(counts(plan))
    console.print(recipe(plan))
    if plan["meshes"]:
        if plan["batch"] != plan["asked_batch"]:
            console.print(
                f"No mesh works with train.batch={plan['asked_batch']}. What follows is for the "
                f"largest batch that one can hold: --set train.batch={plan['batch']}\n"
            )
        console.print(memory(plan))
        console.print(speed(plan))
    if plan["failed"]:
        rows = [[row["mesh"], row["reason"]] for row in plan["failed"]]
        title = f"What doesn't work with batch {plan['asked_batch']:,}"
        console.print(table(title, ["mesh", "why"], rows, n_text=2))
    console.print(bill(plan))
    console.print(ASSUMPTIONS.format(**plan["assumptions"]))


def counts(plan: dict) -> rich.table.Table:
    """Return the table of parameters and FLOPs, in full."""
    rows = [[label, f"{plan['counts'][name]:,.0f}"] for name, label in COUNTS.items()]
    giga = plan["counts"]["training_flops_per_token"] / 1e9
    rows.insert(6, [f"  in GFLOP, at length {plan['length']:,}", f"{giga:.4g}"])
    return table(plan["config"], ["", ""], rows)


def recipe(plan: dict) -> rich.table.Table:
    """Return the table of the recipe's phases."""
    rows = [
        [
            f"{phase['start'] / 1e9:,.1f}",
            f"{phase['stop'] / 1e9:,.1f}",
            f"{phase['batch']:,}",
            f"{phase['first_lr']:.2e}",
            f"{phase['last_lr']:.2e}",
            f"{phase['mtp_weight']:g}",
            f"{phase['bias_update_speed']:g}",
        ]
        for phase in plan["recipe"]
    ]
    columns = ["billion tokens from", "to", "batch", "learning rate from", "to", "MTP lambda"]
    return table("Recipe", [*columns, "bias gamma"], rows)


def memory(plan: dict) -> rich.table.Table:
    """Return the table of memory by part, in a unit with few digits."""
    rows, chip = plan["meshes"], plan["chip"]
    largest = max(row["memory_bytes"]["total"] for row in rows)
    unit, size = ("GiB", GIB) if largest > GIB else ("MiB", 2**20)
    shape = "x".join(str(side) for side in plan["shape"])
    title = (
        f"{unit} per device, of {chip['hbm_bytes'] / size:,.0f}: batch {plan['batch']:,}, ZeRO-"
        f"{plan['zero']}, remat {plan['remat']}, {plan['devices']:,} {chip['name']} ({shape})"
    )
    parts = list(rows[0]["memory_bytes"])
    cells = [[f"{row['memory_bytes'][part] / size:,.1f}" for part in parts] for row in rows]
    rows = [[row["mesh"], *numbers] for row, numbers in zip(rows, cells, strict=True)]
    return table(title, ["mesh", *parts], rows)


def speed(plan: dict) -> rich.table.Table:
    """Return the table of seconds by kind, and the rates that follow."""
    rows = plan["meshes"]
    unit, scale = ("seconds", 1) if rows[0]["seconds"]["step"] > 0.1 else ("milliseconds", 1e3)
    kinds = list(rows[0]["seconds"])
    cells = [[f"{scale * row['seconds'][kind]:,.2f}" for kind in kinds] for row in rows]
    rates = [[f"{row['tokens_per_second']:,.0f}", f"{row['mfu']:.1%}"] for row in rows]
    rows = [[row["mesh"], *a, *b] for row, a, b in zip(rows, cells, rates, strict=True)]
    return table(f"Predicted {unit}, fastest first", ["mesh", *kinds, "tokens/s", "MFU"], rows)


def bill(plan: dict) -> rich.table.Table:
    """Return the table of hours, days and dollars."""
    rows = [
        [line["what"], f"{line['chip_hours']:,.0f}", f"{line['days']:,.1f}"]
        + ["no price" if line["dollars"] is None else f"{line['dollars']:,.0f}"]
        for line in plan["bill"]
    ]
    return table("The bill", ["", "chip hours", "days", "dollars"], rows)
