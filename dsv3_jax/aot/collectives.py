"""The collectives of a scheduled program: payload, members, start and end of each.

XLA writes a collective in many ways: as a plain instruction; as `-start` and `-done`; wrapped into
`async-start`, `async-update` and `async-done` (SparseCore, all-to-all); as fusions that start,
continue or finish it beside other work; or as a fusion that runs it and slices the result.
"""

import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import numpy as np

from dsv3_jax.aot.hlo import Computation, Instruction, Module, leaves
from dsv3_jax.hardware import Chip
from dsv3_jax.interconnect import Group, Position, group_at

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
Phase = Literal["start", "done", "blocking", ""]


class Collective(NamedTuple):
    """A collective operation; `payload` is the bytes that a device sends to others."""

    kind: str
    op_name: str
    payload: float
    members: tuple[int, ...]  # of the first group; of a permutation, the first ring or chain


def mesh_axes(members: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """Return the mesh axes along which these devices differ; devices count in row-major order."""
    coordinates = np.stack(np.unravel_index(np.array(members), tuple(sizes.values())))
    differs = (coordinates != coordinates[:, :1]).any(axis=1)
    return tuple(name for name, differ in zip(sizes, differs, strict=True) if differ)


def phase(module: Module, instruction: Instruction) -> Phase:
    """Return whether an instruction starts, finishes or wholly runs a collective or async call.

    "" stands for other instructions and for steps between start and done: an `async-start` without
    operands only loads a program; the `async-update` that gets the operands launches it.
    """
    opcode = instruction.opcode
    if opcode in KINDS:
        return "blocking"
    if opcode == "async-start":
        return "start" if instruction.operands else ""
    if opcode == "async-update":
        return "start" if len(instruction.operands) > 1 else ""
    if opcode.endswith("-start"):
        return "start"
    if opcode.endswith("-done"):
        return "done"
    if opcode == "fusion":
        return _fusion_phase(module, instruction)
    return ""


def _fusion_phase(module: Module, fusion: Instruction) -> Phase:
    inside = [part for inner in module.inner(fusion) for part in inner.instructions]
    targets = {part.attribute("custom_call_target") for part in inside if part.opcode[:3] == "cus"}
    if "AsyncCollectiveStart" in targets:
        return "start"
    if "AsyncCollectiveDone" in targets:
        return "done"
    found = [part for part in inside if part.opcode in KINDS]
    between = any("async_collective_fusion_config" in part.attributes for part in found)
    return "blocking" if found and not between else ""


def launched_by(module: Module, computation: Computation, done: Instruction) -> str | None:
    """Return the instruction that started what `done` waits for; None if started elsewhere."""
    source = done
    while source.operands:
        source = computation.by_name[source.operands[0]]
        if phase(module, source) == "start":
            return source.name
    return None


def collective(
    module: Module, computation: Computation, instruction: Instruction
) -> Collective | None:
    """Return the collective that an instruction starts or runs; None for other work."""
    if instruction.opcode == "async-update":
        instruction = computation.by_name[instruction.operands[0]]  # it names the callee
    found = _find(module, computation, instruction)
    if not found:
        return None
    kind, first = found[0][0], found[0][2]
    members = _members(first, module.n_partitions)
    sent = 1 - 1 / len(members) if kind != "collective-permute" else len(members) > 1
    n_bytes = sum(size for _, size, _ in found) * (2 if kind == "all-reduce" else 1)
    return Collective(kind, instruction.op_name or first.op_name, n_bytes * sent, members)


def _find(
    module: Module, computation: Computation, instruction: Instruction
) -> list[tuple[str, float, Instruction]]:
    """Return kind, size in bytes and instruction of every collective in an instruction."""
    kind = instruction.opcode.removesuffix("-start")
    if kind in KINDS:
        return [(kind, _size(computation, instruction, kind), instruction)]
    found = []
    for inner in module.inner(instruction):
        for part in inner.instructions:
            found += _find(module, inner, part)
    if instruction.opcode == "fusion" and [kind for kind, *_ in found] == ["all-reduce"]:
        if sum(leaf.n_bytes for leaf in leaves(instruction.shape)) < found[0][1]:
            return [("reduce-scatter", *found[0][1:])]  # each device keeps its slice
    return found


def _size(computation: Computation, instruction: Instruction, kind: str) -> float:
    """Return the bytes of operand or result, the device's own part included: the larger of the two.

    A ragged all-to-all fills at most a part of its receive buffer, so there it is the smaller.
    """
    operands = [leaf.n_bytes for leaf in computation.operand_leaves(instruction)]
    results = [leaf.n_bytes for leaf in leaves(instruction.shape)]
    if kind == "ragged-all-to-all":
        return min(operands[0], results[0])
    if kind == "all-gather":
        n = len(instruction.operands)
        if instruction.opcode.endswith("-start"):  # (operands, results, ...)
            results = [leaf.n_bytes for leaf in leaves(instruction.shape[1])]
        return sum(results[:n])
    return sum(operands)


def _members(instruction: Instruction, n_partitions: int) -> tuple[int, ...]:
    if "source_target_pairs=" in instruction.attributes:
        return _ring(instruction)
    return first_group(instruction.attributes, n_partitions)


def _ring(permutation: Instruction) -> tuple[int, ...]:
    text = re.search(r"source_target_pairs=\{(.*?)\}\}", permutation.attributes)
    pairs = re.findall(r"(\d+),(\d+)", text[1]) if text else []
    targets = {int(source): int(target) for source, target in pairs}
    ring = [next(iter(targets))] if targets else [0]
    while (after := targets.get(ring[-1])) is not None and after not in ring:
        ring.append(after)
    return tuple(ring)


def first_group(attributes: str, n_partitions: int) -> tuple[int, ...]:
    """Return the first of the `replica_groups`, which XLA writes in three notations.

    `{{0,1},{2,3}}`, `[2,2]<=[4]T(0)` (an iota, reshaped and transposed) and
    `mesh['a'=2,'b'=2] {'b'}`, where `'b':(2)4` is a part of an axis: 4 positions under the first 2.
    """
    text = attributes.partition("replica_groups=")[2]
    if text.startswith("mesh["):
        return _mesh_group(text)
    if text.startswith("["):
        return tuple(int(i) for i in _iota(text)[0])
    listed = re.match(r"\{\{([\d,]+)\}", text)
    return tuple(int(i) for i in listed[1].split(",")) if listed else tuple(range(n_partitions))


def _iota(text: str) -> np.ndarray:
    shape, source, order = re.match(r"\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text).groups()
    return _reordered(source, order).reshape(_numbers(shape))


def _reordered(source: str, order: str | None) -> np.ndarray:
    sizes = _numbers(source)
    return np.arange(math.prod(sizes)).reshape(sizes).transpose(_numbers(order) if order else None)


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _mesh_group(text: str) -> tuple[int, ...]:
    mesh, ids, chosen = re.match(
        r"mesh\[(.*?)\](?:, device_ids=\((.*?)\))? \{(.*?)\}", text
    ).groups()
    sizes = {name: int(size) for name, size in re.findall(r"'?([\w.]+)'?=(\d+)", mesh)}
    if ids and ids.startswith("["):  # ([4,16]T(1,0) loses its last bracket to the match
        source, order = re.match(r"\[([\d,]+)\]T\(([\d,]+)", ids).groups()
        devices = _reordered(source, order).reshape(-1)
    else:
        devices = np.array(_numbers(ids)) if ids else np.arange(math.prod(sizes.values()))
    devices = devices.reshape(tuple(sizes.values()))
    offsets = np.zeros(1, int)
    for name, before, size in re.findall(r"'?([\w.]+)'?(?::\((\d+)\)(\d+))?", chosen):
        axis = list(sizes).index(name)
        stride = math.prod(list(sizes.values())[axis + 1 :])
        n = int(size) if size else sizes[name]
        stride *= sizes[name] // (int(before) * n) if size else 1
        offsets = (offsets[:, None] + np.arange(n)[None, :] * stride).reshape(-1)
    return tuple(int(i) for i in devices.reshape(-1)[offsets])


def link_rates(
    chip: Chip, shape: tuple[int, ...], positions: list[Position]
) -> Callable[[Collective], float]:
    """Return the function that gives a collective's rate in bytes of payload per second.

    Args:
        positions: of the mesh's devices on the slice, in the program's order of devices.
    """

    @functools.cache
    def group_of(members: tuple[int, ...]) -> Group:
        return group_at(chip, shape, [positions[i] for i in members])

    def rate(collective: Collective) -> float:
        group, n = group_of(collective.members), len(collective.members)
        if collective.kind == "collective-permute":
            seconds = group.permute_seconds(1.0)
        elif collective.kind in ("all-to-all", "ragged-all-to-all"):
            seconds = group.all_to_all_seconds(1.0 / (1 - 1 / n))  # its payload excludes what stays
        else:
            seconds = group.all_gather_seconds(1.0)
        return 1.0 / seconds if seconds else math.inf

    return rate
