"""The tables that the terminal shows of an ahead-of-time report."""

import re
from pathlib import Path

import rich.console
import rich.table

from dsv3_jax.cli import table
from dsv3_jax.hardware import GIB

ASSUMPTIONS = (
    "Predicted, not measured: balanced routing, matmuls at the chip's full peak, links at their "
    "full rate without latency or other traffic. Against published step times on v5p this is about "
    "1.4 times too fast: compare programs with it, not clocks."
)


def show(report: dict):
    """Print a report of `report.analyze`."""
    console = rich.console.Console(highlight=False)
    console.print(headline(report), soft_wrap=True)
    console.print(memory(report))
    console.print(buffers(report))
    if not report["fits"]:
        console.print("What helps, cheapest first:")
        for line in report["what_helps"]:
            console.print(f"  {line}", soft_wrap=True)
        console.print()
    console.print(time(report))
    console.print(collectives(report))
    if report["layers"]:
        console.print(layers(report))
    for note in notes(report):
        console.print(note, soft_wrap=True)


def size(n_bytes: float) -> str:
    """Format bytes in a unit with few digits."""
    unit, divisor = ("GiB", GIB) if n_bytes >= GIB else ("MiB", 2**20)
    return f"{n_bytes / divisor:,.2f} {unit}"


def duration(seconds: float) -> str:
    """Format seconds, short ones in milliseconds."""
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1e3:.3f} ms"


def headline(report: dict) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in report["settings"].items())
    return (
        f"{report['config']} on {report['topology']}, mesh {report['mesh']} "
        f"({report['devices']:,} devices): {settings}\n"
    )


def memory(report: dict) -> rich.table.Table:
    names = {"argument": "arguments", "temp": "temporaries", "peak": "peak", "limit": "limit"}
    rows = [[label, size(report[f"{name}_bytes"])] for name, label in names.items()]
    rows.append(["it fits" if report["fits"] else "IT DOES NOT FIT", ""])
    return table("Memory per device", ["", ""], rows)


def buffers(report: dict) -> rich.table.Table:
    at_peak = all(row["at_peak"] for row in report["buffers"])
    title = f"The largest buffers{' at the peak' if at_peak else ''}"
    rows = [
        [size(row["n_bytes"]), row["shape"], operation(row), short_path(row["source"])]
        for row in report["buffers"]
    ]
    return table(title, ["size", "shape", "operation", "source"], rows, n_text=4)


def operation(buffer: dict) -> str:
    """Return a parameter's name, or the direction and the last part of an operation's path."""
    head, _, path = buffer["what"].rpartition(": ")
    if not path.startswith(("jit(", "while/")):
        return buffer["what"].replace("state.", "", 1)
    direction = "backward" if "transpose(" in path else "forward"
    return f"{f'{head}, ' if head else ''}{direction}, {path.rsplit('/', 1)[-1]}"


def short_path(source: str) -> str:
    """Return a source relative to the working directory."""
    return re.sub(f"^{re.escape(str(Path.cwd()))}/", "", source)


def time(report: dict) -> rich.table.Table:
    rows = [
        ["FLOPs per device", f"{report['flops']:.4g}"],
        ["bytes moved in HBM", f"{report['hbm_bytes']:.4g}"],
        ["compute", duration(report["compute_seconds"])],
        ["  of it bound by matmuls", duration(report["product_seconds"])],
        ["communication", duration(report["communication_seconds"])],
        ["  of it exposed", f"{report['exposed_share']:.1%}"],
        ["  of it covered", f"{report['covered_share']:.1%}"],
        ["step", duration(report["predicted_step_seconds"])],
        ["tokens per second and chip", f"{report['tokens_per_second_per_chip']:,.0f}"],
        ["MFU of the bfloat16 peak", f"{report['predicted_mfu']:.1%}"],
    ]
    return table("A step, predicted", ["", ""], rows)


def collectives(report: dict) -> rich.table.Table:
    rows = [
        [kind, f"{row['count']:,.0f}", f"{row['asynchronous']:,.0f}"]
        + [f"{row['beside_products']:,.0f}", size(row["bytes"])]
        + [duration(row["seconds"]), duration(row["exposed_seconds"])]
        for kind, row in report["collectives"].items()
    ]
    header = ["", "count", "async", "beside matmuls", "sent", "time", "exposed"]
    return table("Communication per step and device", header, rows)


def layers(report: dict) -> rich.table.Table:
    rows = [
        [direction, duration(row["seconds"]), duration(row["compute_seconds"])]
        + [duration(row["communication_seconds"]), f"{row['exposed_share']:.1%}"]
        + [f"{row['all_to_alls_beside_products']:,.0f} of {row['all_to_alls']:,.0f}"]
        + [by_axes(row["exchanged_bytes_per_token"])]
        for direction, row in report["layers"].items()
    ]
    header = ["", "time", "compute", "communication", "exposed", "all-to-alls beside matmuls"]
    return table("The longest layer", [*header, "exchanged per token"], rows)


def by_axes(moved: dict[str, float]) -> str:
    """Format bytes along mesh axes, one line per set of axes."""
    return "\n".join(f"{axes} {n_bytes / 1e3:.1f} KB" for axes, n_bytes in moved.items())


def notes(report: dict) -> list[str]:
    """Return lines on assumptions, unknown kernels, the cost of compiling, and files."""
    lines = [ASSUMPTIONS]
    for trips in sorted({loop["trips"] for loop in report["assumed_trips"]}):
        loops = [loop for loop in report["assumed_trips"] if loop["trips"] == trips]
        sources = ", ".join(sorted({short_path(loop["source"]) or loop["name"] for loop in loops}))
        lines.append(
            f"{len(loops)} loops over data are taken to run {trips:.0f} times, in {sources}."
        )
    if report["unknown_kernels"]:
        names = ", ".join(report["unknown_kernels"])
        lines.append(f"Kernels whose FLOPs are not known and count as none: {names}.")
    compiled = "Compiled" if report["complete"] else "Compiled up to the schedule"
    lines.append(
        f"{compiled} in {report['compile_seconds']:.0f} s, {report['compile_cpu_seconds']:.0f} s "
        f"of CPU time and {size(report['compile_host_bytes'])} here."
    )
    files = {"hlo": "Scheduled HLO", "plot": "Timeline"}
    lines += [f"{label}: {report[name]}" for name, label in files.items() if report[name]]
    return lines
