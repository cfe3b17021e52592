"""The tunnel's report as tables for the terminal."""

import re
from pathlib import Path

import rich.box
import rich.console
import rich.table

from dsv3_jax.hardware import GIB

ASSUMPTIONS = (
    "Predicted, not measured: balanced routing, products at the chip's full peak, links at their "
    "full rate without latency, nothing else in their way. Against published step times on v5p "
    "this is about 1.4 times too fast; compare programs with it, not clocks."
)


def show(report: dict):
    """Print everything that `report.report` found."""
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


def table(title: str, header: list[str], rows: list[list[str]], words: int = 1) -> rich.table.Table:
    """A table whose first `words` columns are words, the others numbers."""
    grid = rich.table.Table(
        title=title,
        title_justify="left",
        box=rich.box.SIMPLE,
        show_header=any(header),
        padding=0,
    )
    for place, name in enumerate(header):
        fixed = name == "mesh" or place >= words
        grid.add_column(
            name, justify="right" if place >= words else "left", no_wrap=fixed, overflow="fold"
        )
    for row in rows:
        grid.add_row(*row)
    return grid


def size(n_bytes: float) -> str:
    """Bytes in a unit in which they have few digits."""
    unit, divisor = ("GiB", GIB) if n_bytes >= GIB else ("MiB", 2**20)
    return f"{n_bytes / divisor:,.2f} {unit}"


def clock(seconds: float) -> str:
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
    return table("Memory a device", ["", ""], rows)


def buffers(report: dict) -> rich.table.Table:
    at_peak = all(row["at_peak"] for row in report["buffers"])
    title = f"The largest buffers{' at the peak' if at_peak else ''}"
    rows = [
        [size(row["n_bytes"]), row["shape"], what(row), place(row["source"])]
        for row in report["buffers"]
    ]
    return table(title, ["size", "shape", "what", "where"], rows, words=4)


def what(buffer: dict) -> str:
    """A buffer's operation in short: a parameter's name, or direction and last part of the path."""
    head, _, path = buffer["what"].rpartition(": ")
    if not path.startswith(("jit(", "while/")):
        return buffer["what"].replace("state.", "", 1)
    way = "backward" if "transpose(" in path else "forward"
    return f"{f'{head}, ' if head else ''}{way}, {path.rsplit('/', 1)[-1]}"


def place(source: str) -> str:
    return re.sub(f"^{re.escape(str(Path.cwd()))}/", "", source)


def time(report: dict) -> rich.table.Table:
    rows = [
        ["FLOPs a device", f"{report['flops']:.4g}"],
        ["bytes moved in HBM", f"{report['hbm_bytes']:.4g}"],
        ["compute", clock(report["compute_seconds"])],
        ["  of it bound by products", clock(report["product_seconds"])],
        ["communication", clock(report["communication_seconds"])],
        ["  of it exposed", f"{report['exposed_share']:.1%}"],
        ["  of it covered", f"{report['covered_share']:.1%}"],
        ["step", clock(report["predicted_step_seconds"])],
        ["tokens a second and chip", f"{report['tokens_per_second_per_chip']:,.0f}"],
        ["MFU of the bfloat16 peak", f"{report['predicted_mfu']:.1%}"],
    ]
    return table("A step, predicted", ["", ""], rows)


def collectives(report: dict) -> rich.table.Table:
    rows = [
        [kind, f"{row['count']:,.0f}", f"{row['asynchronous']:,.0f}"]
        + [f"{row['beside_products']:,.0f}", size(row["bytes"])]
        + [clock(row["seconds"]), clock(row["exposed_seconds"])]
        for kind, row in report["collectives"].items()
    ]
    header = ["", "count", "async", "beside products", "sent", "time", "exposed"]
    return table("Communication a step and device", header, rows)


def layers(report: dict) -> rich.table.Table:
    rows = [
        [way, clock(row["seconds"]), clock(row["compute_seconds"])]
        + [clock(row["communication_seconds"]), f"{row['exposed_share']:.1%}"]
        + [f"{row['all_to_alls_beside_products']:,.0f} of {row['all_to_alls']:,.0f}"]
        + [by_axes(row["exchanged_bytes_per_token"])]
        for way, row in report["layers"].items()
    ]
    header = ["", "time", "compute", "communication", "exposed", "all-to-alls beside products"]
    return table("The longest layer", [*header, "exchanged a token"], rows)


def by_axes(moved: dict[str, float]) -> str:
    """Bytes along mesh axes, a line each."""
    return "\n".join(f"{axes} {n_bytes / 1e3:.1f} KB" for axes, n_bytes in moved.items())


def notes(report: dict) -> list[str]:
    """What was assumed, what is unknown, what it took."""
    lines = [ASSUMPTIONS]
    for trips in sorted({loop["trips"] for loop in report["assumed_trips"]}):
        loops = [loop for loop in report["assumed_trips"] if loop["trips"] == trips]
        places = ", ".join(sorted({place(loop["source"]) or loop["name"] for loop in loops}))
        lines.append(
            f"{len(loops)} loops over data are taken to run {trips:.0f} times, in {places}."
        )
    if report["unknown_kernels"]:
        names = ", ".join(report["unknown_kernels"])
        lines.append(f"Kernels whose FLOPs are not known and count as none: {names}.")
    how = "Compiled" if report["complete"] else "Compiled up to the schedule"
    lines.append(
        f"{how} in {report['compile_seconds']:.0f} s, {report['compile_cpu_seconds']:.0f} s of "
        f"CPU time and {size(report['compile_host_bytes'])} here."
    )
    files = {"hlo": "Scheduled HLO", "plot": "Timeline"}
    lines += [f"{label}: {report[name]}" for name, label in files.items() if report[name]]
    return lines
