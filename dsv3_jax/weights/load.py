"""Official tensors into the arrays of a mesh, with no stop on the way.

Each process reads the byte ranges that its own devices hold, in the order of the files. A few
threads each take a piece of a tensor through all of it, while it is in the processor's cache: read,
turn, de-quantise, and copy to its place in the destination, which then becomes the shard of a
device (on CPU without a further copy). Memory: the destination, and a few pieces.
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
from dsv3_jax.weights.hf_names import SCALE, is_turned, official_names, our_shapes
from dsv3_jax.weights.safetensors import Folder, Range

PIECE = 4 * 2**20  # bytes that one read takes
MOST_THREADS = 16

Bounds = tuple[Range, ...]  # of an array's dims: the region that a device holds


class Piece(NamedTuple):
    """A part of an official tensor, and where it goes."""

    name: str
    rows: Range  # to read, in whole blocks if the tensor is FP8
    columns: Range | None  # None: it has one dim
    skip: tuple[int, ...]  # from there on the part is wanted, in the orientation of our array
    shape: tuple[int, ...]  # of the part that is wanted, likewise
    path: str
    region: Bounds
    at: tuple[int, ...]  # place in the region


def load_arrays(
    folder: Folder,
    wanted: dict[str, jax.ShapeDtypeStruct],
    config: ModelConfig,
    first: int = 0,
    advance: Callable[[int], object] = lambda n_bytes: None,
) -> dict[str, jax.Array]:
    """Our parameters, by dotted path, where their shardings say.

    Args:
        wanted: shape, dtype and sharding by path; a stack may be shorter than the model's.
        first: the layer that stacks begin with.
        advance: called with the number of bytes that were read and placed.
    """
    regions = {
        (path, region): np.zeros([end - start for start, end in region], like.dtype)
        for path, like in wanted.items()
        for region in set(_regions(like).values())
    }
    pieces = sorted(
        _pieces(folder, wanted, config, first),
        key=lambda piece: (folder[piece.name].file, folder[piece.name].start, piece.rows),
    )

    def fill(piece: Piece) -> int:
        _fill(regions[piece.path, piece.region], folder, piece)
        return _n_bytes(folder, piece)

    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_THREADS)) as pool:
        for n_bytes in pool.map(fill, pieces):  # an error ends it: what has not begun is dropped
            advance(n_bytes)
    return {path: _assembled(like, path, regions) for path, like in wanted.items()}


def bytes_to_read(
    folder: Folder, wanted: dict[str, jax.ShapeDtypeStruct], config: ModelConfig, first: int = 0
) -> int:
    """What `load_arrays` reads in this process, without scales."""
    return sum(_n_bytes(folder, piece) for piece in _pieces(folder, wanted, config, first))


def _n_bytes(folder: Folder, piece: Piece) -> int:
    counts = [end - start for start, end in filter(None, (piece.rows, piece.columns))]
    return math.prod(counts) * folder[piece.name].numpy_dtype.itemsize


def _regions(like: jax.ShapeDtypeStruct) -> dict[jax.Device, Bounds]:
    """What each device of this process holds; replicas hold the same."""
    indices = like.sharding.addressable_devices_indices_map(like.shape)
    return {
        device: tuple(s.indices(size)[:2] for s, size in zip(index, like.shape, strict=True))
        for device, index in indices.items()
    }


def _pieces(
    folder: Folder, wanted: dict[str, jax.ShapeDtypeStruct], config: ModelConfig, first: int
) -> Iterator[Piece]:
    for path, like in wanted.items():
        names = official_names(path, config)  # [*stack parts]
        n_stack = names.ndim - 1
        part_width = like.shape[-1] // names.shape[-1]
        for region in set(_regions(like).values()):
            stack, inner = region[:n_stack], region[n_stack:]
            for index in itertools.product(*(range(*bounds) for bounds in stack)):
                place = tuple(i - start for i, (start, _) in zip(index, stack, strict=True))
                named = names[(index[0] + first, *index[1:])] if n_stack else names
                for part, name in enumerate(named):
                    lo, hi = (max(0, b - part * part_width) for b in inner[-1])
                    out = (min(lo, part_width), min(hi, part_width))
                    if out[0] < out[1]:
                        offset = part * part_width + out[0] - inner[-1][0]
                        bounds = (*inner[:-1], out)
                        yield from _split(folder, name, path, region, bounds, place, offset)


def _split(folder, name, path, region, bounds: Bounds, place, offset: int) -> Iterator[Piece]:
    """Pieces of at most `PIECE` bytes, of whole rows, for one tensor's part of a region.

    Args:
        bounds: what is wanted of the tensor, in the orientation of our array.
        place: index of the tensor in the region's stack.
        offset: where `bounds` begins in the region's last dim.
    """
    tensor, turned = folder[name], is_turned(path)
    rows = bounds[-1] if turned or len(bounds) == 1 else bounds[0]
    columns = None if len(bounds) == 1 else bounds[0] if turned else bounds[1]
    block = BLOCK if tensor.dtype == "F8_E4M3" else (1, 1)
    width = 1 if columns is None else columns[1] - columns[0]
    step = max(PIECE // (width * tensor.numpy_dtype.itemsize) // 128, 1) * 128
    read_columns = columns and _outward(columns, block[1], tensor.shape[1])
    edges = [rows[0], *range((rows[0] // step + 1) * step, rows[1], step), rows[1]]
    for start, end in itertools.pairwise(edges):
        read_rows = _outward((start, end), block[0], tensor.shape[0])
        down = start - rows[0]
        if columns is None:
            skip, shape, at = (start - read_rows[0],), (end - start,), (offset + down,)
        else:
            skip = (start - read_rows[0], columns[0] - read_columns[0])
            shape, at = (end - start, width), (down, offset)
            if turned:
                skip, shape, at = skip[::-1], shape[::-1], (0, offset + down)
        yield Piece(name, read_rows, read_columns, skip, shape, path, region, (*place, *at))


def _outward(bounds: Range, block: int, size: int) -> Range:
    """The whole blocks that hold `bounds`."""
    return bounds[0] // block * block, min(-(-bounds[1] // block) * block, size)


def _fill(destination: np.ndarray, folder: Folder, piece: Piece):
    """Copy a piece to its place, in our orientation and in the type of the destination."""
    tensor, host = folder[piece.name], jax.local_devices(backend="cpu")[0]
    values = folder.read(piece.name, rows=piece.rows, columns=piece.columns)
    scale = None
    if tensor.dtype == "F8_E4M3" and destination.dtype != E4M3:
        scale = _scale_of(folder, piece)
    if piece.columns is not None and is_turned(piece.path):
        values, scale = values.T, None if scale is None else scale.T
    values = jax.device_put(values, host)  # the fastest way to turn an array, too
    new = np.asarray(_converted(values, scale, piece.skip, piece.shape, destination.dtype))
    stack = piece.at[: destination.ndim - new.ndim]
    place = zip(piece.at[len(stack) :], new.shape, strict=True)
    word = np.dtype(f"u{new.itemsize}")  # NumPy copies numbers that it does not know one by one
    where = destination.view(word)[(*stack, *(slice(at, at + n) for at, n in place))]
    where[...] = new.view(word)


def _scale_of(folder: Folder, piece: Piece) -> Float32[np.ndarray, "_ _"]:
    rows, columns = (
        (start // block, -(-end // block))
        for (start, end), block in zip((piece.rows, piece.columns), BLOCK, strict=True)
    )
    return read_scale(folder, piece.name + SCALE, rows)[:, slice(*columns)]


def load_scales(
    folder: Folder, places: dict[str, jax.sharding.Sharding], config: ModelConfig
) -> dict[str, jax.Array]:
    """Scales [... D/128 F/128] of the parameters of these paths, which the files hold in FP8.

    Raises:
        ValueError: a file holds one in another format, or matrices that stand side by side here
            begin inside of a block.
    """
    scales = {}
    for path, place in places.items():
        names = official_names(path, config)
        width = our_shapes(config)[path][-1] // names.shape[-1]
        if names.shape[-1] > 1 and width % BLOCK[1]:
            raise ValueError(
                f"{path} is {names.shape[-1]} matrices of width {width}, no multiple of "
                f"{BLOCK[1]}: their blocks don't fit together; use dtype='bfloat16'"
            )
        for name in names.reshape(-1):
            if folder[name].dtype != "F8_E4M3":
                raise ValueError(
                    f"{folder[name].file}: tensor {name} is {folder[name].dtype}, not FP8; use "
                    "dtype='bfloat16'"
                )
        rows = np.vectorize(
            lambda name: read_scale(folder, name + SCALE).T, signature="()->(d,f)", otypes="f"
        )(names)
        whole = np.concatenate(np.moveaxis(rows, names.ndim - 1, 0), axis=-1)
        scales[path] = jax.make_array_from_callback(whole.shape, place, whole.__getitem__)
    return scales


def read_scale(folder: Folder, name: str, rows: Range | None = None) -> Float32[np.ndarray, "_ _"]:
    """Scales of FP8 blocks; a ValueError unless each is a number that a scale can be."""
    scale = folder.read(name, rows=rows)
    good = np.isfinite(scale) & (scale >= 0)
    if not good.all():
        raise ValueError(
            f"{folder[name].file}: tensor {name} holds the scale {scale[~good][0]}; scales must be "
            "finite and not negative: download the file again"
        )
    return scale


@functools.partial(jax.jit, static_argnums=(2, 3, 4))
def _converted(values, scale, skip: tuple[int, ...], shape: tuple[int, ...], dtype) -> jax.Array:
    """The wanted part of a piece in `dtype`, rounded once."""
    if scale is not None:
        values = dequantize(
            QuantizedTensor(values, scale), BLOCK
        )  # square, so the same when turned
    part = tuple(slice(start, start + n) for start, n in zip(skip, shape, strict=True))
    return values[part].astype(dtype)


def _assembled(like: jax.ShapeDtypeStruct, path: str, regions: dict) -> jax.Array:
    """The global array of which this process has filled its regions."""
    shards = [
        jax.device_put(regions[path, region], device) for device, region in _regions(like).items()
    ]
    return jax.make_array_from_single_device_arrays(like.shape, like.sharding, shards)
