"""Folders that are either complete or absent, so that a killed run leaves nothing half-written."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from dsv3_jax.files import file_crc32

FORMAT = 2  # raise it when the meaning of a cached file changes
MANIFEST = ".record.json"  # hidden, so that a folder of text does not take it for a document


def cache_key(*values) -> str:
    """Return a short hash of plain values, for the name of a folder."""
    return hashlib.sha256(json.dumps([FORMAT, *values]).encode()).hexdigest()[:16]


def build_once(folder: Path, build: Callable[[Path], None]) -> Path:
    """Return `folder` after `build` has filled it, now or in an earlier run.

    `build` writes into a scratch folder, which is then renamed in one step. A folder whose files
    differ from its manifest in size or CRC is built again, and a line says so.
    """
    if is_intact(folder):
        return folder
    if folder.exists():
        print(f"the cache {folder} is damaged; building it again")
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".building-", dir=folder.parent) as scratch:
        fresh = Path(scratch, folder.name)
        fresh.mkdir()
        build(fresh)
        (fresh / MANIFEST).write_bytes(_manifest(fresh))
        try:
            os.replace(fresh, folder)
        except OSError:
            # Another process was faster; its folder is as good if it is intact.
            if not is_intact(folder):
                raise
    return folder


def is_intact(folder: Path) -> bool:
    """Return whether the files of `folder` are, bit for bit, as `build_once` left them."""
    manifest = folder / MANIFEST
    return manifest.is_file() and manifest.read_bytes() == _manifest(folder)


def content_hash(folder: Path) -> str:
    """Return a hash of the content of an intact folder, the same on every machine."""
    return hashlib.sha256((folder / MANIFEST).read_bytes()).hexdigest()


def _manifest(folder: Path) -> bytes:
    """Return name, size and CRC of every file as JSON."""
    paths = sorted(path for path in folder.iterdir() if path.name != MANIFEST)
    sizes_and_sums = {path.name: [path.stat().st_size, file_crc32(path)] for path in paths}
    return json.dumps(sizes_and_sums).encode()
