"""A parser of scheduled HLO text: computations, instructions in their order, shapes, loops.

XLA prints one instruction per line, in the order in which a device runs them:

    %name = f32[16,24]{1,0:T(8,128)S(1)} opcode(%operand, ...), attribute=..., metadata={...}

Braces behind a shape hold the layout: the order of dims, tiles `T`, the memory space `S` (none is
HBM, 1 is VMEM). The call of a kernel may span lines, so an instruction ends where its brackets
close.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

CALLS = ("calls", "body", "condition", "branch_computations", "called_computations")
CALLS += ("true_computation", "false_computation")
HEAD = re.compile(r"\s*(ROOT )?%?([\w.\-]+) = ")  # the start of an instruction


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of an array: dtype as HLO names it, dims, and the text of its layout."""

    dtype: str
    dims: tuple[int, ...]
    layout: str = ""

    @functools.cached_property
    def n_bytes(self) -> float:
        """The bytes of the elements, without padding."""
        return math.prod(self.dims) * _bits(self.dtype) / 8

    @functools.cached_property
    def stored_bytes(self) -> float:
        """The bytes in memory: minor dims are padded to tiles (bf16[8,112] takes 128 columns)."""
        order, _, tiles = self.layout.partition(":")
        tile = re.match(r"T\(([\d,]+)\)", tiles)
        if not tile or not order:
            return self.n_bytes
        dims = [self.dims[int(dim)] for dim in order.split(",")]  # minor first
        sizes = [int(size) for size in tile[1].split(",")][::-1]
        for i, size in enumerate(sizes[: len(dims)]):
            dims[i] = -(-dims[i] // size) * size
        return math.prod(dims) * _bits(self.dtype) / 8

    @property
    def in_hbm(self) -> bool:
        return not re.search(r"S\([1-9]", self.layout)

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.dims))}]"


Shapes = Shape | tuple  # a tuple of Shapes, nested as HLO nests them


@functools.cache
def _bits(dtype: str) -> int:
    width = re.match(r"[a-z]+(\d+)", dtype)
    return int(width[1]) if width else 8 if dtype == "pred" else 0  # token, opaque: no bytes


@functools.cache
def parse_shape(text: str) -> Shapes:
    """Parse a shape, e.g. "(f32[2,3]{1,0}, s32[])"."""
    levels: list[list] = [[]]
    for token in re.finditer(r"[()]|(\w+)\[([^\]]*)\](?:\{([^}]*)\})?", text):
        if token[0] == "(":
            levels.append([])
        elif token[0] == ")":
            closed = tuple(levels.pop())
            levels[-1].append(closed)
        else:
            dims = tuple(int(size.lstrip("<=")) for size in token[2].split(",") if size)
            levels[-1].append(Shape(token[1], dims, token[3] or ""))
    return levels[0][0]


def leaves(shape: Shapes) -> list[Shape]:
    """Return the arrays of a shape, tuples flattened."""
    return [shape] if isinstance(shape, Shape) else [a for part in shape for a in leaves(part)]


@dataclasses.dataclass(frozen=True)
class Instruction:
    """An instruction; `attributes` is the text behind the operands."""

    name: str
    opcode: str
    shape: Shapes
    operands: tuple[str, ...]
    literal: str  # the operands as written: a constant's value, a parameter's number
    attributes: str
    root: bool

    def attribute(self, name: str) -> str | None:
        """Return the text of an attribute without outer braces or quotes; None if absent."""
        found = _attribute(name).search(self.attributes)
        return next((part for part in found.groups() if part is not None), "") if found else None

    @property
    def op_name(self) -> str:
        """The path of the JAX operation, e.g. "jit(step)/while/body/dot_general"."""
        return (self.attribute("op_name") or "").replace("\\'", "'")

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs, without the scalar functions that reductions apply."""
        keys = (*CALLS, "to_apply") if self.opcode == "call" else CALLS
        texts = [text for key in keys if (text := self.attribute(key))]
        return tuple(n.strip().lstrip("%") for text in texts for n in text.split(","))


@functools.cache
def _attribute(name: str) -> re.Pattern:
    value = r'"((?:[^"\\]|\\.)*)"|\{([^{}]*)\}|([^,\s}]+)'
    return re.compile(rf"(?<![\w\"]){name}=(?:{value})")


@dataclasses.dataclass(frozen=True)
class Computation:
    """A computation: its instructions in the order of the schedule."""

    name: str
    instructions: tuple[Instruction, ...]

    @functools.cached_property
    def by_name(self) -> dict[str, Instruction]:
        return {instruction.name: instruction for instruction in self.instructions}

    @functools.cached_property
    def root(self) -> Instruction:
        return next((i for i in self.instructions if i.root), self.instructions[-1])

    @functools.cached_property
    def parameters(self) -> dict[int, Instruction]:
        return {int(i.literal): i for i in self.instructions if i.opcode == "parameter"}

    @functools.cached_property
    def users(self) -> dict[str, list[Instruction]]:
        users: dict[str, list[Instruction]] = {}
        for instruction in self.instructions:
            for operand in dict.fromkeys(instruction.operands):
                users.setdefault(operand, []).append(instruction)
        return users

    def shape(self, name: str) -> Shapes:
        return self.by_name[name].shape

    def operand_leaves(self, instruction: Instruction) -> list[Shape]:
        return [leaf for name in instruction.operands for leaf in leaves(self.shape(name))]


@dataclasses.dataclass(frozen=True)
class Module:
    """A compiled program: its computations, the first to run, and the sources of its operations."""

    computations: dict[str, Computation]
    entry: str
    n_partitions: int
    sources: dict[int, str]  # stack frame -> "file:line"

    def inner(self, instruction: Instruction) -> list[Computation]:
        return [self.computations[name] for name in instruction.called]

    def source(self, instruction: Instruction) -> str:
        """Return file:line of the innermost Python frame outside of libraries; "" if unknown."""
        frame = instruction.attribute("stack_frame_id")
        if frame:
            return self.sources.get(int(frame), "")
        file, line = instruction.attribute("source_file"), instruction.attribute("source_line")
        return f"{file}:{line}" if file else ""

    def body(self, loop: Instruction) -> Computation:
        """Return the computation that a while instruction repeats."""
        return self.computations[loop.attribute("body").lstrip("%")]

    def instructions(self, *opcodes: str) -> Iterator[Instruction]:
        """Yield the instructions with these opcodes in all computations."""
        for computation in self.computations.values():
            yield from (i for i in computation.instructions if i.opcode in opcodes)

    def find(self, name: str) -> Instruction | None:
        """Return the instruction called `name` in any computation."""
        found = (computation.by_name.get(name) for computation in self.computations.values())
        return next((instruction for instruction in found if instruction), None)


def parse(text: str) -> Module:
    """Parse the text of a dump's `*after_optimizations.txt`, or of `compiled.as_text()`."""
    text = re.sub(r"/\*index=\d+\*/", "", text)
    header = text.split("\n", 1)[0]
    computations, entry, name = {}, "", None
    for line in _statements(text):
        if name is None and (opening := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)):
            name, instructions = opening[2], []
            entry = name if opening[1] else entry
        elif name is not None and line.startswith("}"):
            computations[name] = Computation(name, tuple(instructions))
            name = None
        elif name is not None and line.strip():
            instructions.append(_instruction(line))
    partitions = re.search(r"num_partitions=(\d+)", header)
    return Module(computations, entry, int(partitions[1]) if partitions else 1, _sources(text))


def _statements(text: str) -> Iterator[str]:
    """Yield the lines of the text, with the lines of one instruction joined."""
    pending = ""
    for line in text.splitlines():
        if pending and (not _closed(pending) or (line[:1] == " " and not HEAD.match(line))):
            pending += f" {line}"
            continue
        if pending:
            yield pending
        pending = line if line[:1] == " " else ""
        if not pending:
            yield line
    if pending:
        yield pending


def _closed(line: str) -> bool:
    def even(part: str) -> bool:
        return part.count("{") == part.count("}") and part.count("(") == part.count(")")

    if even(line) and line.count('"') % 2 == 0:
        return True
    bare = re.sub(r'"(?:[^"\\]|\\.)*"', "", line)
    return even(bare) and '"' not in bare


def _closing(text: str, start: int) -> int:
    """Return the index at which the bracket that opens at `start` closes."""
    depth = 0
    for bracket in re.finditer(r"[()]", text[start:]):
        depth += 1 if bracket[0] == "(" else -1
        if not depth:
            return start + bracket.start()
    raise ValueError(f"brackets of an HLO line don't close: {text[:120]}")


def _instruction(line: str) -> Instruction:
    head = HEAD.match(line)
    if not head:
        raise ValueError(f"not an HLO instruction: {line.strip()[:120]}")
    start = head.end()
    end = _closing(line, start) + 1 if line[start] == "(" else line.index(" ", start)
    opening = line.index("(", end)
    closing = _closing(line, opening)
    opcode, literal = line[end:opening].strip(), line[opening + 1 : closing]
    named = re.findall(r"%([\w.\-]+)", literal)
    if not named and opcode not in ("parameter", "constant", "iota"):
        named = [part.split()[-1] for part in literal.split(",") if part.strip()]
    shape, attributes = parse_shape(line[start:end]), line[closing + 1 :]
    return Instruction(head[2], opcode, shape, tuple(named), literal, attributes, bool(head[1]))


def _sources(text: str) -> dict[int, str]:
    """Return "file:line" of each stack frame, from the tables that XLA prints first.

    Frames in installed libraries get the line that called the library. XLA prints with a frame the
    number of its caller plus one.
    """
    tables: dict[str, dict[int, str]] = {}
    for title in ("FileNames", "FileLocations", "StackFrames"):
        found = re.search(rf"^{title}\n((?:\d+ .*\n)*)", text, re.M)
        rows = [line.split(" ", 1) for line in found[1].splitlines()] if found else []
        tables[title] = {int(number): row for number, row in rows}
    locations = {}
    for number, row in tables["FileLocations"].items():
        file, line = re.search(r"file_name_id=(\d+).* line=(\d+)", row).groups()
        locations[number] = f"{tables['FileNames'][int(file)].strip(chr(34))}:{line}"
    sources: dict[int, str] = {}
    for number, row in tables["StackFrames"].items():
        location, parent = re.search(r"location_id=(\d+) parent_frame_id=(\d+)", row).groups()
        source, caller = locations[int(location)], sources.get(int(parent) - 1, "")
        sources[number] = caller if caller and "site-packages" in source else source
    return sources
