"""Checks of files that several packages share."""

import zlib
from pathlib import Path

CHUNK_BYTES = 1 << 20


def file_crc32(path: Path) -> int:
    """Return the CRC-32 of a file's bytes; it changes with every single flipped bit."""
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            crc = zlib.crc32(chunk, crc)
    return crc
