"""Folders of safetensors files: read by byte range, and written whole or not at all.

A reader checks every header before anything is read. A writer's folder appears when all its files
are on the disk.
"""

import collections
import contextlib
import functools
import io
import json
import math
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import ml_dtypes
import numpy as np
import safetensors
import safetensors.numpy

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
SHARD_BYTES = 5 * 10**9  # of the files that are written, at most
DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}
Range = tuple[int, int]


class TensorEntry(NamedTuple):
    """Type, shape and position of one tensor; `start` is the offset of its first byte."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def numpy_dtype(self) -> np.dtype:
        return np.dtype(DTYPES[self.dtype])

    @property
    def n_bytes(self) -> int:
        return math.prod(self.shape) * self.numpy_dtype.itemsize


class SafetensorsReader(Mapping[str, TensorEntry]):
    """The tensors of a folder by name; threads may read at the same time."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self._tensors: dict[str, TensorEntry] = {}
        self._files: dict[Path, io.FileIO] = {}
        with contextlib.ExitStack() as opened:
            for path, indexed in _files_in(self.directory).items():
                self._files[path] = opened.enter_context(open(path, "rb", buffering=0))
                tensors = _read_header(path, self._files[path])
                for name in sorted(indexed ^ tensors.keys()) if indexed else []:
                    verb = "lacks" if name in indexed else "holds"
                    raise _damaged(path, f"{verb} tensor {name}, and {INDEX} says otherwise")
                for name in tensors.keys() & self._tensors.keys():
                    both = f"{self._tensors[name].file} and {path}"
                    raise ValueError(f"tensor {name} is in both {both}; move one of them away")
                self._tensors |= tensors
            self._opened = opened.pop_all()

    def __getitem__(self, name: str) -> TensorEntry:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def n_bytes(self) -> int:
        return sum(tensor.n_bytes for tensor in self.values())

    def read(
        self, name: str, rows: Range | None = None, columns: Range | None = None
    ) -> np.ndarray:
        """Read rows [first, end) of the first dim and columns [first, end) of the last; None: all.

        Raises:
            IndexError: a range lies outside the tensor, or it has not 1 or 2 dims.
            ValueError: the file was cut since its header was checked.
        """
        path, _, shape, start = tensor = self[name]
        n_rows, width = math.prod(shape[:1]), math.prod(shape[1:])  # as a matrix
        whole = rows is None and columns is None
        if len(shape) == 1 and rows is None:  # its only dim is the last one too
            rows, columns = columns, None
        (first, end), (left, right) = rows or (0, n_rows), columns or (0, width)
        inside = 0 <= first <= end <= n_rows and 0 <= left <= right <= width
        if not whole and not (inside and len(shape) in (1, 2)):
            raise IndexError(f"tensor {name} of shape {shape}: no rows {rows}, columns {columns}")
        file, size = self._files[path], tensor.numpy_dtype.itemsize
        start, stride = start + first * width * size, width * size
        if right - left == width:
            data = _read_bytes(file, start, (end - first) * stride)
        else:
            data = _read_columns(file, start, (end - first, stride), left * size, right * size)
        shape = shape if whole else (end - first, right - left)[: len(shape)]
        return data.view(tensor.numpy_dtype).reshape(shape)

    def close(self):
        self._opened.close()

    def __enter__(self) -> "SafetensorsReader":
        return self

    def __exit__(self, *failure: object):
        self.close()


def _files_in(directory: Path) -> dict[Path, set[str]]:
    """Return the safetensors files with the names that the index gives each (none: no index)."""
    index = directory / INDEX
    if not index.exists():
        if files := sorted(directory.glob("*.safetensors")):
            return {path: set() for path in files}
        pickles = sorted(p.name for p in directory.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
        reason = f"; {pickles[0]} is a pickle file: these are not read" if pickles else ""
        raise FileNotFoundError(f"no .safetensors file in {directory}{reason}; safetensors needed")
    names: dict[Path, set[str]] = {}
    weight_map = _strict_json_object(index, index.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(index, "has no weight_map from tensor to file")
    for name, file in weight_map.items():
        path = PureWindowsPath(str(file))  # knows both separators, and drives
        if path.suffix != ".safetensors" or path.anchor or ".." in path.parts:
            raise _damaged(index, f"puts tensor {name} in {file!r}, no safetensors file beside it")
        names.setdefault(directory / file, set()).add(name)
    for path in names:
        if not path.is_file():
            lost = f"{len(names[path])} tensors such as {min(names[path])}"
            raise FileNotFoundError(f"{path} is missing, with {lost}; download it")
    return names


def _read_header(path: Path, file: io.FileIO) -> dict[str, TensorEntry]:
    """Return the tensors of one file; raise unless its header and its size agree."""
    size = os.fstat(file.fileno()).st_size
    if size < 8:
        raise _damaged(path, f"has {size} bytes, and the length of the header alone takes 8")
    end = 8 + int.from_bytes(_read_bytes(file, 0, 8).tobytes(), "little")
    if end > size or end > 8 + MAX_HEADER_BYTES:
        limits = f"the file has {size}, a header at most {MAX_HEADER_BYTES}"
        raise _damaged(path, f"claims a header of {end - 8} bytes; {limits}")
    header = _strict_json_object(path, _read_bytes(file, 8, end - 8).tobytes())
    header.pop("__metadata__", None)
    tensors = {name: _tensor(path, name, entry, end) for name, entry in header.items()}
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].n_bytes)):
        if tensor.start != end:
            fault = "an overlap" if tensor.start < end else "a gap"
            raise _damaged(path, f"has {name} at byte {tensor.start} instead of {end}: {fault}")
        end += tensor.n_bytes
    if size != end:
        fault = "truncated" if size < end else "too long"
        raise _damaged(path, f"is {fault} by {abs(size - end)} bytes: it has {size}, not {end}")
    return tensors


def _tensor(path: Path, name: str, entry: object, data_start: int) -> TensorEntry:
    match entry:
        case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [first, end]} if all(
            type(n) is int and n >= 0 for n in (*shape, first, end)
        ):
            pass
        case _:
            raise _damaged(path, f"describes tensor {name} by {str(entry)[:100]}, no valid entry")
    if dtype not in DTYPES:
        known = f"only {', '.join(DTYPES)} can be read; convert the file"
        raise ValueError(f"{path} holds tensor {name} as {dtype}, and {known}")
    tensor = TensorEntry(path, dtype, tuple(shape), data_start + first)
    if end - first != tensor.n_bytes:
        needs = f"{dtype} of shape {shape} takes {tensor.n_bytes}"
        raise _damaged(path, f"gives tensor {name} {end - first} bytes, and {needs}")
    return tensor


def _strict_json_object(path: Path, text: bytes) -> dict:
    """Parse the JSON object in a file; a name that occurs twice is refused."""

    def without_repeats(pairs: list[tuple[str, object]]) -> dict:
        result = dict(pairs)
        if len(result) < len(pairs):
            repeated, _ = collections.Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"{repeated} stands there twice")
        return result

    try:
        value = json.loads(text.decode(), object_pairs_hook=without_repeats)
        if not isinstance(value, dict):
            raise ValueError(f"no object but {str(value)[:100]}")
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"holds no valid JSON object: {error}") from error
    return value


def _read_bytes(file: io.FileIO, start: int, n_bytes: int) -> np.ndarray:
    data = np.empty(n_bytes, np.uint8)
    done = 0
    while done < n_bytes:  # one call reads at most 2 GB, and may read less
        got = os.preadv(file.fileno(), [memoryview(data)[done:]], start + done)
        if not got:
            raise _damaged(file.name, f"ends at byte {start + done}: it shrank since it was opened")
        done += got
    return data


def _read_columns(
    file: io.FileIO, start: int, shape: tuple[int, int], left: int, right: int
) -> np.ndarray:
    """Read bytes [left, right) of each row of the matrix of bytes at `start`, and no others."""
    size, end = os.fstat(file.fileno()).st_size, start + math.prod(shape)
    if size < end:  # to touch a mapped page beyond the end would kill the process
        raise _damaged(file.name, f"ends at byte {size}: it shrank since it was opened")
    if shape[0] == 0 or left == right:
        return np.empty(0, np.uint8)
    offset = start - start % mmap.ALLOCATIONGRANULARITY
    pages = mmap.mmap(file.fileno(), end - offset, access=mmap.ACCESS_READ, offset=offset)
    pages.madvise(mmap.MADV_RANDOM)
    rows = np.frombuffer(pages, np.uint8, offset=start - offset).reshape(shape)
    return rows[:, left:right].copy().reshape(-1)


def _damaged(path: str | Path, damage: str) -> ValueError:
    return ValueError(f"{path} {damage}; download the file again")


class SafetensorsWriter:
    """A context manager that writes tensors into a new folder, in shards, with an index.

    The folder appears when the `with` block ends; after an exception there is none.
    """

    def __init__(self, directory: str | Path, shard_bytes: int = SHARD_BYTES):
        self.directory = path = Path(directory).resolve()
        self.shard_bytes = shard_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._shard_of: dict[str, int] = {}
        self._n_shards = self._n_bytes = 0
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} exists and is no empty folder; name a new one")

    def __enter__(self) -> "SafetensorsWriter":
        parent = self.directory.parent
        parent.mkdir(parents=True, exist_ok=True)
        self._hidden = tempfile.TemporaryDirectory(prefix=f".{self.directory.name}-", dir=parent)
        self._folder = Path(self._hidden.name) / "new"  # readable by others, unlike the hidden one
        self._folder.mkdir()
        return self

    def __exit__(self, *failure: object):
        with self._hidden:
            if failure[0] is None:
                self._finish()

    def add(self, name: str, value: np.ndarray):
        """Write `value`, which must stay as it is until the block ends, as tensor `name`."""
        if name in self._shard_of:
            raise ValueError(f"tensor {name} was added to {self.directory} before")
        if value.dtype not in map(np.dtype, DTYPES.values()):
            raise ValueError(f"tensor {name} is {value.dtype}; cast it to one of {list(DTYPES)}")
        n_pending = sum(other.nbytes for other in self._pending.values())
        if self._pending and n_pending + value.nbytes > self.shard_bytes:
            self._write_shard()
        self._pending[name] = np.asarray(value, order="C")
        self._shard_of[name] = self._n_shards

    def add_file(self, name: str, text: str):
        """Write a small text file, such as config.json, beside the shards."""
        if Path(name).name != name or (self._folder / name).exists():
            raise ValueError(f"{name!r} must be the plain name of a new file in {self.directory}")
        self._write(name, len(text), lambda file: file.write_text(text, encoding="utf-8"))

    def _write_shard(self):
        """Write the pending tensors as one file, whose name will count all shards."""
        tensors, self._pending = self._pending, {}
        n_bytes = sum(value.nbytes for value in tensors.values())
        save_fn = functools.partial(safetensors.numpy.save_file, tensors, metadata={"format": "pt"})
        self._write(f"{self._n_shards}.safetensors", n_bytes, save_fn)
        self._n_bytes += n_bytes
        self._n_shards += 1

    def _write(self, name: str, n_bytes: int, write_fn: Callable[[Path], object]):
        """Write a file and wait until it is on the disk; an error says how much space it needs."""
        file = self._folder / name
        try:
            write_fn(file)
            file.chmod(self._folder.stat().st_mode & 0o666)  # the package leaves it at 0600
            with open(file, "rb") as written:
                os.fsync(written.fileno())
        except (OSError, safetensors.SafetensorError) as error:
            free = shutil.disk_usage(self._folder).free
            raise OSError(
                f"writing {self.directory} failed: {error}; {name} needs {n_bytes} bytes, and "
                f"{free} are free there"
            ) from error

    def _finish(self):
        """Write what is left and the index, give files their final names, and show the folder."""
        self._write_shard()
        n = self._n_shards
        files = [f"model-{i:05}-of-{n:05}.safetensors" for i in range(1, n + 1)]
        files = files if n > 1 else ["model.safetensors"]
        for i, file in enumerate(files):
            (self._folder / f"{i}.safetensors").rename(self._folder / file)
        if n > 1:
            weight_map = {name: files[i] for name, i in self._shard_of.items()}
            index = {"metadata": {"total_size": self._n_bytes}, "weight_map": weight_map}
            self.add_file(INDEX, json.dumps(index, indent=2))
        self._folder.rename(self.directory)
