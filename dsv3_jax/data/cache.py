"""Folders that are either whole or absent, so that a killed run leaves nothing half-written."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dsv3_jax.files import file_crc32

FORMAT = 2  # raise it when the meaning of a cached file changes
RECORD = ".record.json"  # hidden, so that it is no document of a folder of text


def key(*parts) -> str:
    """A short hash of `parts` (plain values) for the name of a folder."""
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:16]


def cached(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, which `build` has filled now or in an earlier run.

    `build` writes into a scratch folder that takes its name in one step. A folder whose files are
    not those of its record, by size and CRC, is built again, and a line says so.
    """
    if is_whole(folder):
        return folder
    if folder.exists():
        print(f"the cache {folder} is damaged; building it again")
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as scratch:
        fresh = Path(scratch, folder.name)
        fresh.mkdir()
        build(fresh)
        (fresh / RECORD).write_bytes(_record(fresh))
        try:
            os.replace(fresh, folder)
        except OSError:
            # Another process was faster; its folder serves as well if it is whole.
            if not is_whole(folder):
                raise
    return folder


def is_whole(folder: Path) -> bool:
    """Whether the files of `folder` are, bit for bit, those that `cached` left there."""
    record = folder / RECORD
    return record.is_file() and record.read_bytes() == _record(folder)


def fingerprint(folder: Path) -> str:
    """A hash of what a whole folder holds; the same on every machine, whenever it was built."""
    return hashlib.sha256((folder / RECORD).read_bytes()).hexdigest()


def _record(folder: Path) -> bytes:
    """Name, size and CRC of every file."""
    paths = sorted(path for path in folder.iterdir() if path.name != RECORD)
    return json.dumps(
        {path.name: [path.stat().st_size, file_crc32(path)] for path in paths}
    ).encode()
