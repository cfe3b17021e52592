"""The cost of an instruction of a scheduled program: FLOPs, and bytes moved in HBM.

Only matrix multiplications and convolutions have FLOPs, inside fusions too; all other arithmetic is
free beside the bytes it moves. A custom kernel's FLOPs come from a table, as the number that a
kernel declares may count padding.
"""

import math
import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from dsv3_jax.aot.hlo import Computation, Instruction, Module, Shape, leaves

FREE = frozenset(
    "parameter constant get-tuple-element tuple bitcast while conditional after-all partition-id "
    "replica-id opt-barrier add-dependency domain async-update async-done copy-done".split()
)
MARKERS = {  # custom calls that run no kernel
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "GatherScatterIndicesBitpacked",
    "AsyncCollectiveStart",
    "AsyncCollectiveDone",
    "Sharding",
    "ConcatBitcast",
}

KernelFlops = Callable[[Instruction, list[Shape], list[Shape]], float]  # call, operands, results
Kernels = Mapping[str, KernelFlops]  # by target, or the name given to `pallas_call`


def _cublas(call: Instruction, operands: list[Shape], results: list[Shape]) -> float:
    """Return the FLOPs of a call of cuBLAS."""
    contracted = re.search(r'lhs_contracting_dimensions":\[([^\]]*)\]', call.attributes)[1]
    return _dot_flops(results[0], operands[0], [int(dim) for dim in re.findall(r"\d+", contracted)])


KERNELS: Kernels = {f"__cublas${name}": _cublas for name in ("gemm", "lt$matmul", "lt$matmul$f8")}


class OpCost(NamedTuple):
    """The cost of one or more operations on one device."""

    flops: float = 0.0
    fp8_flops: float = 0.0  # the part of `flops` that multiplies two FP8 arrays
    hbm_bytes: float = 0.0

    def __add__(self, other: "OpCost") -> "OpCost":
        return OpCost(*(a + b for a, b in zip(self, other, strict=True)))

    def times(self, n: float) -> "OpCost":
        return OpCost(*(n * part for part in self))


def op_cost(
    module: Module,
    computation: Computation,
    instruction: Instruction,
    kernels: Kernels = KERNELS,
) -> OpCost:
    """Return the cost of running an instruction once, callees included; loops are not entered."""
    if instruction.opcode in ("call", "async-start", "custom-call") and instruction.called:
        parts = [
            op_cost(module, inner, part, kernels)
            for inner in module.inner(instruction)
            for part in inner.instructions
        ]
        return sum(parts, OpCost())
    return OpCost(
        *flops(module, computation, instruction, kernels),
        hbm_bytes(module, computation, instruction),
    )


def kernel_name(instruction: Instruction) -> str:
    """Return what a custom call runs: for Pallas kernels the name given to `pallas_call`."""
    target = instruction.attribute("custom_call_target") or ""
    if target != "tpu_custom_call":
        return target
    named = re.search(r"(?:\w+\()*(\w+)\)*/pallas_call", instruction.op_name)  # or jvp(it)
    return named[1] if named else re.sub(r"\.\d+$", "", instruction.name)


def flops(
    module: Module, computation: Computation, instruction: Instruction, kernels: Kernels
) -> tuple[float, float]:
    """Return the FLOPs of an instruction, and the part of them that multiplies FP8 arrays."""
    if instruction.opcode == "fusion":
        parts = [
            flops(module, inner, part, kernels)
            for inner in module.inner(instruction)
            for part in inner.instructions
            if part.opcode in ("fusion", "dot", "ragged-dot", "convolution", "custom-call")
        ]
        return sum(part[0] for part in parts), sum(part[1] for part in parts)
    operands, results = computation.operand_leaves(instruction), leaves(instruction.shape)
    if instruction.opcode in ("dot", "ragged-dot"):
        contracted = instruction.attribute("lhs_contracting_dims") or ""
        count = _dot_flops(results[0], operands[0], [int(d) for d in contracted.split(",") if d])
    elif instruction.opcode == "convolution":
        count = _convolution_flops(instruction, operands[0], operands[1], results[0])
    elif instruction.opcode == "custom-call" and kernel_name(instruction) in kernels:
        count = kernels[kernel_name(instruction)](instruction, operands, results)
    else:
        return 0.0, 0.0
    in_fp8 = all(shape.dtype.startswith("f8") for shape in operands[:2])
    return count, count * in_fp8


def _dot_flops(result: Shape, lhs: Shape, contracted: list[int]) -> float:
    return 2.0 * math.prod(result.dims) * math.prod(lhs.dims[dim] for dim in contracted)


def _convolution_flops(
    instruction: Instruction, left: Shape, kernel: Shape, result: Shape
) -> float:
    """Return 2 per pair of an element and a kernel weight that meet, without padding and holes.

    On TPUs every matmul is a convolution; a batch dim becomes a window over a dilated input.
    """
    lhs, rhs, out = re.split(r"_|->", instruction.attribute("dim_labels"))
    window = _window(instruction, len(re.sub(r"\D", "", out)))
    pairs = 1.0
    for i, (size, stride, before, dilate, rhs_dilate) in enumerate(window):
        n_in, n_out = left.dims[lhs.index(str(i))], result.dims[out.index(str(i))]
        at = np.arange(n_out)[:, None] * stride - before + np.arange(size)[None, :] * rhs_dilate
        pairs *= int(np.sum((at >= 0) & (at % dilate == 0) & (at // dilate < n_in)))
    groups = int(instruction.attribute("batch_group_count") or 1)
    rows = left.dims[lhs.index("b")] // groups
    return 2.0 * pairs * rows * kernel.dims[rhs.index("i")] * kernel.dims[rhs.index("o")]


def _window(instruction: Instruction, n_dims: int) -> list[tuple[int, ...]]:
    """Return size, stride, padding in front, and both dilations of every spatial dim."""
    text = instruction.attribute("window") or ""
    fields = dict(part.split("=") for part in text.split())

    def values(name: str, default: str) -> list[str]:
        return fields[name].split("x") if name in fields else [default] * n_dims

    names = [("size", "1"), ("stride", "1"), ("pad", "0_0"), ("lhs_dilate", "1")]
    columns = [values(name, default) for name, default in [*names, ("rhs_dilate", "1")]]
    return [tuple(int(v.split("_")[0]) for v in row) for row in zip(*columns, strict=True)]


def hbm_bytes(module: Module, computation: Computation, instruction: Instruction) -> float:
    """Return the bytes read and written in HBM.

    Arrays in VMEM are free. A slice counts the bytes it touches, an update in place the bytes it
    replaces. Each operand counts once, as if nothing was read twice.
    """
    opcode = instruction.opcode
    if opcode in FREE or kernel_name(instruction) in MARKERS:
        return 0.0
    if opcode == "fusion":
        return _fusion_bytes(module, computation, instruction)
    results = _stored(leaves(instruction.shape))
    shapes = [computation.shape(name) for name in instruction.operands]
    if opcode == "copy-start":  # its result repeats source and target
        return _stored(leaves(instruction.shape[:2]))
    if opcode in ("slice", "dynamic-slice"):
        return _smaller(results, shapes[0]) + results
    if opcode == "gather":
        return _smaller(results, shapes[0]) + _stored(leaves(shapes[1])) + results
    if opcode == "dynamic-update-slice":
        return _stored(leaves(shapes[1])) + _smaller(_total(shapes[1]), instruction.shape)
    if opcode == "scatter":
        n = len(shapes) // 2
        updates = sum(_total(shape) for shape in shapes[n + 1 :])
        touched = 2 * _smaller(updates, instruction.shape)
        return touched + sum(_stored(leaves(shape)) for shape in shapes[n:])
    distinct = dict.fromkeys(instruction.operands)
    read = sum(_stored(leaves(computation.shape(name))) for name in distinct)
    if opcode.endswith("-start"):  # an asynchronous collective: its result repeats the operands
        return 2 * read
    return read + results


def _stored(shapes: list[Shape]) -> float:
    return sum(shape.stored_bytes for shape in shapes if shape.in_hbm)


def _total(shape) -> float:
    return sum(leaf.stored_bytes for leaf in leaves(shape))


def _smaller(touched: float, shape) -> float:
    """Return the bytes of `shape` that are touched if it lies in HBM."""
    return min(touched, _stored(leaves(shape)))


def _fusion_bytes(module: Module, computation: Computation, fusion: Instruction) -> float:
    inner = module.inner(fusion)[0]
    moved = 0.0
    for number, name in enumerate(fusion.operands):
        whole = _stored(leaves(computation.shape(name)))
        if whole and number in inner.parameters:
            moved += min(whole, _read(module, inner, inner.parameters[number].name))
    outer = leaves(fusion.shape)
    written = _written(module, inner, inner.root)
    return moved + sum(
        min(shape.stored_bytes, part)
        for shape, part in zip(outer, written, strict=True)
        if shape.in_hbm
    )


def _read(module: Module, inner: Computation, name: str) -> float:
    """Return the bytes of a value in a fused computation that its users read."""
    total = 0.0
    for user in inner.users.get(name, ()):
        first = user.operands[0] == name
        if user.opcode == "bitcast":
            total += _read(module, inner, user.name)
        elif user.opcode == "fusion":
            callee = module.inner(user)[0]
            numbers = [n for n, operand in enumerate(user.operands) if operand == name]
            total += sum(_read(module, callee, callee.parameters[n].name) for n in numbers)
        elif user.opcode in ("slice", "dynamic-slice", "gather") and first:
            total += _total(user.shape)
        elif user.opcode in ("dynamic-update-slice", "scatter") and first:
            continue  # updated in place
        elif user.opcode != "tuple":
            return math.inf
    return total


def _written(module: Module, inner: Computation, value: Instruction) -> list[float]:
    """Return the bytes that each result of a fused computation writes."""
    if value.opcode == "tuple":
        names = value.operands
        return [part for name in names for part in _written(module, inner, inner.by_name[name])]
    if value.opcode == "bitcast":
        return _written(module, inner, inner.by_name[value.operands[0]])
    if value.opcode == "fusion":
        callee = module.inner(value)[0]
        return _written(module, callee, callee.root)
    if value.opcode == "dynamic-update-slice":
        return [_total(inner.shape(value.operands[1]))]
    if value.opcode == "scatter":
        n = len(value.operands) // 2
        return [2 * _total(inner.shape(name)) for name in value.operands[n + 1 :]]
    if value.opcode == "parameter":
        return [0.0] * len(leaves(value.shape))  # passed through
    return [leaf.stored_bytes for leaf in leaves(value.shape)]


def unknown_kernels(module: Module, kernels: Kernels = KERNELS) -> list[str]:
    """Return the names of custom kernels that the table gives no FLOPs for."""
    calls = {kernel_name(i) for i in module.instructions("custom-call") if not i.called}
    return sorted(calls - MARKERS - set(kernels))
