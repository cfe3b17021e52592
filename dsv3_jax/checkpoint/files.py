"""The record of a step's files, which shows damage that a restore need not meet.

Fingerprints see the arrays that are read, and nothing else of what lies in a step's folder. So a
finished step gets one more file with name, size and CRC-32 of each of its files; CRC-32 shows
every single flipped bit, and any other damage with all but a chance of 2^-32.
"""

import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

RECORD = "files.txt"
LARGE = 64 << 20  # bytes


def write_record(folder: Path, large: int = LARGE):
    """Note name, size and CRC-32 of every file in the folder of a finished step, atomically.

    Of files over `large` bytes, which hold arrays, the size only: at scale one process cannot read
    all that the others wrote, and the fingerprints of the arrays show what changes in them.
    """
    found = sorted(folder.rglob("*"))
    paths = [path for path in found if path.is_file() and path != folder / RECORD]

    def line(path: Path) -> str:
        size = path.stat().st_size
        return f"{'-' if size > large else _crc(path)} {size} {path.relative_to(folder)}"

    with ThreadPoolExecutor() as threads:
        text = "\n".join(threads.map(line, paths))
    temporary = folder / f"{RECORD}.tmp"
    with temporary.open("w") as file:
        file.write(f"{zlib.crc32(text.encode()):08x}\n{text}")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / RECORD)


def damage(folder: Path) -> str | None:
    """How the files in a step's folder differ from the record of them; None if they do not.

    Files that the record does not know may have been added, by file systems too, and do not count.
    A save that was killed just before it wrote the record left none; such files are not judged.
    """
    record = folder / RECORD
    if not record.exists():
        return None
    try:
        checksum, _, body = record.read_bytes().partition(b"\n")
    except OSError as error:
        return f"{RECORD} cannot be read: {error.strerror}"
    if checksum != b"%08x" % zlib.crc32(body):
        return f"{RECORD}, the record of its files, does not match its own checksum"

    def problem(line: str) -> str | None:
        crc, size, name = line.split(" ", 2)
        found = _difference(folder / name, int(size), crc)
        return found and f"{name} {found}"

    with ThreadPoolExecutor() as threads:
        found = [*filter(None, threads.map(problem, body.decode().splitlines()))]
    more = f" (and {len(found) - 1} more of its files)" if len(found) > 1 else ""
    return found[0] + more if found else None


def _difference(path: Path, size: int, crc: str) -> str | None:
    try:
        if not path.exists():
            return "is missing"
        if not path.is_file():
            return "is no file any more"
        if (now := path.stat().st_size) != size:
            return f"has {now:,} bytes instead of {size:,}"
        if crc != "-" and _crc(path) != crc:
            return "has bits that changed since it was saved"
        path.open("rb").close()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None


def _crc(path: Path) -> str:
    total = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            total = zlib.crc32(piece, total)
    return f"{total:08x}"
