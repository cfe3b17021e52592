"""The trip counts of the loops of a scheduled program.

XLA states some trip counts. Others follow from a condition `counter < limit` whose bounds are
constants; loops over data have none.
"""

import re
from typing import NamedTuple

from dsv3_jax.aot.hlo import Computation, Instruction, Module

# Operations that do not change the value of a scalar:
MOVES = ("copy", "bitcast", "convert", "reshape", "copy-done", "copy-start")


class Loop(NamedTuple):
    """A while loop whose trip count the text does not state, and what helps to guess it."""

    name: str
    body: str
    op_name: str
    source: str
    outer: str  # the computation that contains it


def trip_counts(module: Module) -> tuple[dict[str, float], list[Loop]]:
    """Return trip counts by loop name where the bounds are constants, and the other loops."""
    known: dict[str, float] = {}
    unknown = []
    loops = ((c, i) for c in module.computations.values() for i in c.instructions)
    for outer, loop in loops:
        if loop.opcode != "while":
            continue
        trips = _trip_count(module, outer, loop)
        if trips is not None:
            known[loop.name] = float(trips)
            continue
        body, source = module.body(loop).name, module.source(loop)
        unknown.append(Loop(loop.name, body, loop.op_name, source, outer.name))
    return known, unknown


def _trip_count(module: Module, outer: Computation, loop: Instruction) -> int | None:
    """Return the trips from `known_trip_count`, or from a condition `counter < limit`."""
    stated = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.attributes)
    if stated:
        return int(stated[1])
    condition = module.computations[loop.attribute("condition").lstrip("%")]
    body = module.body(loop)
    test, operands = condition.root, condition.root.operands
    if test.opcode == "fusion":
        test = module.inner(test)[0].root  # the comparison alone: its operands are the fusion's
    if test.opcode != "compare" or test.attribute("direction") not in ("LT", "LE"):
        return None
    counter = _element(condition, operands[0])
    limit = _constant(condition, operands[1])
    if limit is None:
        limit = _carried(outer, loop, body, _element(condition, operands[1]))
    if counter is None or limit is None:
        return None
    start, step = _initial(outer, loop, counter), _step(module, body, counter)
    if start is None or not step:
        return None
    return max(0, -(-(limit + (test.attribute("direction") == "LE") - start) // step))


def _origin(computation: Computation, name: str) -> Instruction:
    """Return the instruction whose value `name` is, behind copies and conversions."""
    instruction = computation.by_name[name]
    while instruction.opcode in MOVES and instruction.operands:
        instruction = computation.by_name[instruction.operands[0]]
    return instruction


def _constant(computation: Computation, name: str) -> int | None:
    """Return the value of an integer constant, else None."""
    found = _origin(computation, name)
    integer = found.opcode == "constant" and re.fullmatch(r"-?\d+", found.literal)
    return int(found.literal) if integer else None


def _element(computation: Computation, name: str) -> int | None:
    """Return the index of the loop variable that `name` is, else None."""
    found = _origin(computation, name)
    return int(found.attribute("index")) if found.opcode == "get-tuple-element" else None


def _initial(outer: Computation, loop: Instruction, index: int | None) -> int | None:
    """Return the constant with which a loop variable starts, else None."""
    start = _origin(outer, loop.operands[0])
    if index is None or start.opcode != "tuple":
        return None
    return _constant(outer, start.operands[index])


def _carried(
    outer: Computation, loop: Instruction, body: Computation, index: int | None
) -> int | None:
    """Return the constant that a loop carries unchanged as variable `index`, else None."""
    if index is None or body.root.opcode != "tuple":
        return None
    unchanged = _element(body, body.root.operands[index]) == index
    return _initial(outer, loop, index) if unchanged else None


def _step(module: Module, body: Computation, counter: int) -> int | None:
    """Return the increment of the counter; 1 where the body hides it in a larger fusion."""
    if body.root.opcode != "tuple":
        return 1
    added = _origin(body, body.root.operands[counter])
    inside = module.inner(added)[0].root if added.opcode == "fusion" else added
    if inside.opcode != "add" or len(added.operands) != 2:
        return 1
    return next((step for name in added.operands if (step := _constant(body, name))), 1)
