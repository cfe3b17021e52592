"""Folders that are either whole or absent, so that a killed run leaves nothing half-written."""

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

FORMAT = 1  # raise it when the meaning of a cached file changes
SIZES = "sizes.json"


def key(*parts) -> str:
    """A short hash of `parts` (plain values) for the name of a folder."""
    return hashlib.sha256(json.dumps([FORMAT, *parts]).encode()).hexdigest()[:16]


def cached(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, which `build` has filled now or in an earlier run.

    `build` writes into a scratch folder that takes its name in one step. A folder whose files do
    not have the recorded sizes is built again, and a line says so.
    """
    if _is_whole(folder):
        return folder
    if folder.exists():
        print(f"the cache {folder} is damaged; building it again")
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="building-", dir=folder.parent) as scratch:
        fresh = Path(scratch, folder.name)
        fresh.mkdir()
        build(fresh)
        (fresh / SIZES).write_text(json.dumps(_sizes(fresh)))
        try:
            os.replace(fresh, folder)
        except OSError:
            # Another process was faster; its folder serves as well if it is whole.
            if not _is_whole(folder):
                raise
    return folder


def _is_whole(folder: Path) -> bool:
    try:
        return json.loads((folder / SIZES).read_text()) == _sizes(folder)
    except (FileNotFoundError, ValueError):
        return False


def _sizes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in folder.iterdir() if path.name != SIZES}
