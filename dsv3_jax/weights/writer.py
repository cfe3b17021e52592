"""A folder of safetensors files, written whole or not at all."""

import functools
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import safetensors
import safetensors.numpy

from dsv3_jax.weights.safetensors import DTYPES, INDEX


class Writer:
    """A context manager that writes tensors into a new folder, in shards, with an index.

    The folder appears when the block ends; after an exception there is none.
    """

    def __init__(self, directory: str | Path, shard_bytes: int = 5 * 10**9):
        self.directory = path = Path(directory).resolve()
        self.shard_bytes = shard_bytes
        self._pending: dict[str, np.ndarray] = {}
        self._shard_of: dict[str, int] = {}
        self._n_shards = self._n_bytes = 0
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise FileExistsError(f"{path} exists and is no empty folder; name a new one")

    def __enter__(self) -> "Writer":
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
        held = sum(other.nbytes for other in self._pending.values())
        if self._pending and held + value.nbytes > self.shard_bytes:
            self._write_shard()
        self._pending[name] = np.asarray(value, order="C")
        self._shard_of[name] = self._n_shards

    def add_file(self, name: str, text: str):
        """Write a small text file, such as config.json, beside the shards."""
        if Path(name).name != name or (self._folder / name).exists():
            raise ValueError(f"{name!r} must be the plain name of a new file in {self.directory}")
        self._write(name, len(text), lambda file: file.write_text(text, encoding="utf-8"))

    def _write_shard(self):
        tensors, self._pending = self._pending, {}
        n_bytes = sum(value.nbytes for value in tensors.values())
        save_fn = functools.partial(safetensors.numpy.save_file, tensors, metadata={"format": "pt"})
        self._write(f"{self._n_shards}.safetensors", n_bytes, save_fn)
        self._n_bytes += n_bytes
        self._n_shards += 1

    def _write(self, name: str, n_bytes: int, write_fn: Callable[[Path], object]):
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
