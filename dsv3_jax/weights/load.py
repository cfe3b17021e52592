"""Reading official tensors into the arrays of a mesh, by byte range.

Each process reads the byte ranges that its own devices hold, in the order of the files. A few
threads each take 4 MiB of a tensor through all steps, while it is in the processor's cache: read,
transpose, de-quantize, and copy into the destination, which then becomes the shard of a device (on
CPU without a further copy). Memory: the destination, and 4 MiB a few times over per thread.
"""

import functools
import itertools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import numpy as np

from dsv3_jax.config import ModelConfig
from dsv3_jax.numerics.quantize import BLOCK, E4M3, QuantizedTensor, dequantize
from dsv3_jax.shapes import Float32
from dsv3_jax.weights.abstract_params import AbstractParams, Params
from dsv3_jax.weights.hf_names import SCALE, is_transposed, official_names, param_shapes
from dsv3_jax.weights.safetensors import Range, SafetensorsReader

READ_BYTES = 4 * 2**20  # at most, per read
MAX_THREADS = 16

Region = tuple[Range, ...]  # of an array's dims: what one device holds


class TensorRead(NamedTuple):
    """One read of part of an official tensor, and where its values go."""

    name: str
    rows: Range  # to read, in whole blocks if the tensor is FP8
    columns: Range | None  # None: it has one dim
    skip: tuple[int, ...]  # leading elements that are read but not wanted, in our orientation
    shape: tuple[int, ...]  # of what is wanted, in our orientation
    path: str
    region: Region
    offset: tuple[int, ...]  # of what is wanted, in the region


def load_arrays(
    reader: SafetensorsReader,
    abstract: AbstractParams,
    config: ModelConfig,
    first_layer: int = 0,
    advance: Callable[[int], object] = lambda n_bytes: None,
) -> Params:
    """Return parameters, by dotted path, on the devices that their shardings say.

    Args:
        abstract: shape, dtype and sharding by path; a stack may be shorter than the model's.
        first_layer: the layer of the model that stacks begin with.
        advance: called with the number of bytes that were read and copied.
    """
    buffers = {
        (path, region): np.zeros([end - start for start, end in region], like.dtype)
        for path, like in abstract.items()
        for region in set(_regions(like).values())
    }
    reads = sorted(
        _plan_reads(reader, abstract, config, first_layer),
        key=lambda read: (reader[read.name].file, reader[read.name].start, read.rows),
    )

    def run(read: TensorRead) -> int:
        _copy_into(buffers[read.path, read.region], reader, read)
        return _n_bytes(reader, read)

    with ThreadPoolExecutor(min(os.cpu_count() or 1, MAX_THREADS)) as pool:
        for n_bytes in pool.map(run, reads):  # an error ends it: what has not begun is dropped
            advance(n_bytes)
    return {path: _assemble(like, path, buffers) for path, like in abstract.items()}


def bytes_to_read(
    reader: SafetensorsReader, abstract: AbstractParams, config: ModelConfig, first_layer: int = 0
) -> int:
    """Return how many bytes `load_arrays` reads in this process, without scales."""
    reads = _plan_reads(reader, abstract, config, first_layer)
    return sum(_n_bytes(reader, read) for read in reads)


def _n_bytes(reader: SafetensorsReader, read: TensorRead) -> int:
    counts = [end - start for start, end in filter(None, (read.rows, read.columns))]
    return math.prod(counts) * reader[read.name].numpy_dtype.itemsize


def _regions(like: jax.ShapeDtypeStruct) -> dict[jax.Device, Region]:
    """Return the region that each device of this process holds; replicas hold the same."""
    indices = like.sharding.addressable_devices_indices_map(like.shape)
    return {
        device: tuple(s.indices(size)[:2] for s, size in zip(index, like.shape, strict=True))
        for device, index in indices.items()
    }


def _plan_reads(
    reader: SafetensorsReader, abstract: AbstractParams, config: ModelConfig, first_layer: int
) -> Iterator[TensorRead]:
    """Yield the reads that fill every region of this process."""
    for path, like in abstract.items():
        names = official_names(path, config)  # [*stack tensors]
        n_stack = names.ndim - 1
        width = like.shape[-1] // names.shape[-1]  # of one tensor in our last dim
        for region in set(_regions(like).values()):
            stack, inner = region[:n_stack], region[n_stack:]
            for index in itertools.product(*(range(*bounds) for bounds in stack)):
                stack_offset = tuple(i - start for i, (start, _) in zip(index, stack, strict=True))
                tensors = names[(index[0] + first_layer, *index[1:])] if n_stack else names
                for number, name in enumerate(tensors):
                    start, end = (min(max(0, b - number * width), width) for b in inner[-1])
                    if start < end:
                        offset = number * width + start - inner[-1][0]
                        bounds = (*inner[:-1], (start, end))
                        yield from _split(reader, name, path, region, bounds, stack_offset, offset)


def _split(
    reader: SafetensorsReader,
    name: str,
    path: str,
    region: Region,
    bounds: Region,
    stack_offset: tuple[int, ...],
    offset: int,
) -> Iterator[TensorRead]:
    """Yield reads of at most `READ_BYTES`, of whole rows, for one tensor's share of a region.

    Args:
        bounds: what is wanted of the tensor, in our orientation.
        stack_offset: index of the tensor in the region's stack.
        offset: where `bounds` begins in the region's last dim.
    """
    tensor, transposed = reader[name], is_transposed(path)
    rows = bounds[-1] if transposed or len(bounds) == 1 else bounds[0]
    columns = None if len(bounds) == 1 else bounds[0] if transposed else bounds[1]
    block = BLOCK if tensor.dtype == "F8_E4M3" else (1, 1)
    width = 1 if columns is None else columns[1] - columns[0]
    step = max(READ_BYTES // (width * tensor.numpy_dtype.itemsize) // 128, 1) * 128
    read_columns = columns and _round_out(columns, block[1], tensor.shape[1])
    edges = [rows[0], *range((rows[0] // step + 1) * step, rows[1], step), rows[1]]
    for start, end in itertools.pairwise(edges):
        read_rows = _round_out((start, end), block[0], tensor.shape[0])
        down = start - rows[0]
        if columns is None:
            skip, shape, inner_offset = (start - read_rows[0],), (end - start,), (offset + down,)
        else:
            skip = (start - read_rows[0], columns[0] - read_columns[0])
            shape, inner_offset = (end - start, width), (down, offset)
            if transposed:
                skip, shape, inner_offset = skip[::-1], shape[::-1], (0, offset + down)
        offsets = (*stack_offset, *inner_offset)
        yield TensorRead(name, read_rows, read_columns, skip, shape, path, region, offsets)


def _round_out(bounds: Range, block: int, size: int) -> Range:
    """Return the range of whole blocks that holds `bounds`."""
    return bounds[0] // block * block, min(-(-bounds[1] // block) * block, size)


def _copy_into(buffer: np.ndarray, reader: SafetensorsReader, read: TensorRead):
    """Copy what one read wants into the buffer, in our orientation and in the buffer's type."""
    tensor, host = reader[read.name], jax.local_devices(backend="cpu")[0]
    values = reader.read(read.name, rows=read.rows, columns=read.columns)
    scale = None
    if tensor.dtype == "F8_E4M3" and buffer.dtype != E4M3:
        scale = _scale_of(reader, read)
    if read.columns is not None and is_transposed(read.path):
        values, scale = values.T, None if scale is None else scale.T
    values = jax.device_put(values, host)  # the fastest way to transpose an array, too
    new = np.asarray(_convert(values, scale, read.skip, read.shape, buffer.dtype))
    stack = read.offset[: buffer.ndim - new.ndim]
    inner = zip(read.offset[len(stack) :], new.shape, strict=True)
    word = np.dtype(f"u{new.itemsize}")  # NumPy copies numbers that it does not know one by one
    target = buffer.view(word)[(*stack, *(slice(start, start + n) for start, n in inner))]
    target[...] = new.view(word)


def _scale_of(reader: SafetensorsReader, read: TensorRead) -> Float32[np.ndarray, "_ _"]:
    rows, columns = (
        (start // block, -(-end // block))
        for (start, end), block in zip((read.rows, read.columns), BLOCK, strict=True)
    )
    return read_scale(reader, read.name + SCALE, rows)[:, slice(*columns)]


def load_scales(
    reader: SafetensorsReader, shardings: dict[str, jax.sharding.Sharding], config: ModelConfig
) -> Params:
    """Return scales [... D/128 F/128] of the parameters of these paths, which are FP8 in the files.

    Raises:
        ValueError: a file holds one in another format, or matrices that are concatenated here
            begin inside of a block.
    """
    scales = {}
    for path, sharding in shardings.items():
        names = official_names(path, config)
        width = param_shapes(config)[path][-1] // names.shape[-1]
        if names.shape[-1] > 1 and width % BLOCK[1]:
            raise ValueError(
                f"{path} is {names.shape[-1]} matrices of width {width}, no multiple of "
                f"{BLOCK[1]}: their blocks don't fit together; use dtype='bfloat16'"
            )
        for name in names.reshape(-1):
            if reader[name].dtype != "F8_E4M3":
                raise ValueError(
                    f"{reader[name].file}: tensor {name} is {reader[name].dtype}, not FP8; use "
                    "dtype='bfloat16'"
                )
        matrices = np.vectorize(
            lambda name: read_scale(reader, name + SCALE).T, signature="()->(d,f)", otypes="f"
        )(names)
        whole = np.concatenate(np.moveaxis(matrices, names.ndim - 1, 0), axis=-1)
        scales[path] = jax.make_array_from_callback(whole.shape, sharding, whole.__getitem__)
    return scales


def read_scale(
    reader: SafetensorsReader, name: str, rows: Range | None = None
) -> Float32[np.ndarray, "_ _"]:
    """Return scales of FP8 blocks; a ValueError unless each is a number that a scale can be."""
    scale = reader.read(name, rows=rows)
    valid = np.isfinite(scale) & (scale >= 0)
    if not valid.all():
        raise ValueError(
            f"{reader[name].file}: tensor {name} holds the scale {scale[~valid][0]}; scales must "
            "be finite and not negative: download the file again"
        )
    return scale


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _convert(values, scale, skip: tuple[int, ...], shape: tuple[int, ...], dtype) -> jax.Array:
    """Return what a read wants of its values in `dtype`, rounded once."""
    if scale is not None:  # blocks are square, so they are the same when transposed
        values = dequantize(QuantizedTensor(values, scale), BLOCK)
    wanted = tuple(slice(start, start + n) for start, n in zip(skip, shape, strict=True))
    return values[wanted].astype(dtype)


def _assemble(like: jax.ShapeDtypeStruct, path: str, buffers: dict) -> jax.Array:
    """Return the global array of which this process has filled its regions."""
    shards = [
        jax.device_put(buffers[path, region], device) for device, region in _regions(like).items()
    ]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, shards)
