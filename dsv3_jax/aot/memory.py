"""The memory of a device at its peak, from the texts that XLA dumps beside the HLO.

`*-buffer-assignment.txt` lists the allocations, `*-live-range.txt` the values that live at the
peak. Where the latter is missing, `*-memory-usage-report.txt` has at least the largest buffers of
the heap; its "Total bytes" are no peak, as buffers may use the same bytes one after the other.
"""

import re
from pathlib import Path
from typing import NamedTuple

from dsv3_jax.aot.hlo import Computation, Instruction, Module, Shapes, leaves

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


class Buffer(NamedTuple):
    """A value that takes memory, and the operation of the program that makes it."""

    name: str
    n_bytes: float
    shape: str
    what: str  # JAX's path of the operation, or a parameter's name
    source: str  # file:line, "" if unknown
    at_peak: bool  # else known only to be large


class Allocations(NamedTuple):
    """Bytes of HBM per device, by purpose."""

    arguments: int
    outputs: int  # without those that are written over arguments
    temporaries: int
    constants: int

    @property
    def total(self) -> int:
        return sum(self)


def find_dump(folder: Path, ending: str, near: str = "") -> Path | None:
    """Return the largest file of a dump whose name has `near` and this ending, or None."""
    files = [path for path in folder.glob(f"*{ending}") if near in path.name]
    return max(files, key=lambda path: path.stat().st_size, default=None)


def allocations(buffer_assignment: str) -> Allocations:
    """Return the sums over the HBM allocations of a `*-buffer-assignment.txt`.

    Allocations in other memories have a color; thread-local allocations lie inside others.
    """
    sums = dict.fromkeys(Allocations._fields, 0)
    for size, rest in re.findall(r"^allocation \d+: size (\d+), (.*)$", buffer_assignment, re.M):
        if rest.startswith("color ") or "thread-local" in rest:
            continue
        kinds = [("parameter ", "arguments"), ("preallocated-temp", "temporaries")]
        kinds += [("constant", "constants"), ("maybe-live-out", "outputs")]
        kind = next((kind for word, kind in kinds if word in rest), "temporaries")
        sums[kind] += int(size)
    return Allocations(**sums)


def largest_buffers(
    module: Module, live_range: str | None, usage_report: str | None = None, n: int = 10
) -> list[Buffer]:
    """Return the `n` largest values at the peak, else the largest heap buffers, else nothing."""
    peak = re.search(r"Live ranges at \d+ \(peak\):\n((?: +\S+: \d+ bytes.*\n)+)", live_range or "")
    if peak:
        rows = re.findall(r"^ +(\S+?)\{([\d,]*)\}: (\d+) bytes", peak[1], re.M)
        rows = sorted(rows, key=lambda row: -int(row[2]))[:n]
        return [_buffer(module, name, index, int(size)) for name, index, size in rows]
    return _heap_buffers(usage_report or "", n)


def _heap_buffers(usage_report: str, n: int) -> list[Buffer]:
    """Return the rows of the report's first table, HBM's: size, offset and shapes."""
    table = usage_report.partition("cumulative_size;")[2].partition("cumulative_size;")[0]
    row = r"^ +[\d.]+\w+\( *\d+%\); +([\d.]+)(\w+); +(\d+); +\d+; (.*)$"
    found = [
        (float(size) * UNITS[unit], offset, shapes)
        for size, unit, offset, shapes in re.findall(row, table, re.M)
        if unit in UNITS
    ]
    found.sort(key=lambda row: -row[0])
    return [
        Buffer(f"heap+{offset}", size, shapes, "", "", at_peak=False)
        for size, offset, shapes in found[:n]
    ]


def _buffer(module: Module, name: str, index: str, size: int) -> Buffer:
    instruction = module.find(name)
    label = f"{name}{{{index}}}" if index else name
    if instruction is None:
        return Buffer(label, size, "?", "", "", at_peak=True)
    shape = instruction.shape
    for step in index.split(",") if index else ():
        shape = shape[int(step)]
    body = _loop_body(module, instruction)
    if body and index and body.root.opcode == "tuple":  # what each trip leaves there
        instruction = body.by_name[body.root.operands[int(index.split(",")[0])]]
    named = _named(module, instruction)
    what = named.op_name if named else instruction.opcode
    what = f"loop variable: {what}" if body else what
    source = module.source(named) if named else ""
    return Buffer(label, size, _shown(shape), what, source, at_peak=True)


def _loop_body(module: Module, instruction: Instruction) -> Computation | None:
    """Return the body if the instruction is a loop's variables: a loop, or its body's parameter."""
    if instruction.opcode == "while":
        return module.body(instruction)
    if instruction.opcode != "parameter" or instruction.op_name:
        return None
    bodies = (module.body(loop) for loop in module.instructions("while"))
    return next(
        (body for body in bodies if body.by_name.get(instruction.name) is instruction), None
    )


def _shown(shape: Shapes) -> str:
    return ", ".join(str(leaf) for leaf in leaves(shape))


def _named(module: Module, instruction: Instruction) -> Instruction | None:
    """Return the instruction, or one in, before or behind it, that has a JAX operation's name."""
    if instruction.op_name:
        return instruction
    for inner in module.inner(instruction):
        for part in (inner.root, *reversed(inner.instructions)):
            if part.op_name and part.opcode not in ("constant", "parameter", "broadcast"):
                return part
    home = next((c for c in module.computations.values() if instruction.name in c.by_name), None)
    if home is None or instruction.opcode == "parameter":
        return None
    near = [home.by_name[name] for name in instruction.operands]
    near += home.users.get(instruction.name, [])
    return next((other for other in near if other.op_name), None)
