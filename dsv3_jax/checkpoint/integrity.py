"""Two records by which damage to a saved step is found: its manifest and its file record.

The manifest is saved together with the arrays. It holds a fingerprint of each array, which the
devices that hold the array compute, and a checksum of itself. Every restore, on any mesh, compares
the restored arrays with it. So no array is restored with another bit than it was saved with,
wherever the bit changed: on a disk, in a host's memory, or in the library that reads and reshards.
It needs no second reading of files, which makes it the only check that scales to large arrays, and
a committed step always has it.

The file record is written when a step is complete: name, size and CRC-32 of each of its files. It
covers the bytes that no restored array depends on, before anything is restored, and names the
damaged file. A restore alone sees little of them: of 450 single flipped bits in the nine kinds of
files of a step it noticed 175 (and restored the right arrays in spite of the others); the file
record shows all 450. Of files over 64 MiB, which hold arrays, it notes the size only, because
process 0 cannot read at scale what all other processes wrote. A save that was killed between its
commit and its file record has none, and is judged by the manifest alone.
"""

import collections
import json
import os
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import jax.numpy as jnp

from dsv3_jax.files import file_crc32
from dsv3_jax.shapes import Array, UInt32

FILE_RECORD = "files.txt"
MAX_CRC_BYTES = 64 << 20  # of larger files only the size is recorded


def new_manifest(arrays: dict[str, Array], fingerprints: dict[str, str], extra: dict) -> dict:
    """Return the manifest of a step, as JSON can hold it, with a checksum of itself.

    Args:
        arrays: all arrays of the step by path.
        fingerprints: of those that have elements.
        extra: what the caller saves beside the arrays; it must be JSON.
    """
    manifest = {
        "extra": json.loads(json.dumps(extra)),
        "shapes": {path: signature(array) for path, array in arrays.items()},
        "fingerprints": fingerprints,
    }
    return manifest | {"checksum": _checksum(manifest)}


def manifest_is_intact(manifest: dict) -> bool:
    """Return whether a manifest still matches the checksum written with it."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return manifest.get("checksum") == _checksum(rest)


def signature(array: Array | jax.ShapeDtypeStruct) -> str:
    """Return dtype and shape of an array in one word, such as "float32[61,7168]"."""
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _checksum(manifest: dict) -> str:
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"


def fingerprints(arrays: dict[str, Array]) -> dict[str, str]:
    """Return the `fingerprint` of each array in hexadecimal."""
    groups = collections.defaultdict(dict)  # one program runs on one set of devices
    for path, array in arrays.items():
        groups[frozenset(array.sharding.device_set)][path] = array
    totals = collections.ChainMap(*(jax.device_get(_totals(group)) for group in groups.values()))
    return {path: f"{int(totals[path]):08x}" for path in arrays}


@jax.jit
def _totals(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return {path: fingerprint(array) for path, array in arrays.items()}


def fingerprint(array: Array) -> UInt32[Array, ""]:
    """Return one 32-bit number that depends on an array's bits and not on its sharding.

    It is the sum modulo 2^32 of mix(word xor mix(index)) over all elements, with the element's bits
    as `word` and its position in the whole array as `index`. `mix` is a bijection, so a change
    within one element, such as a flipped bit, changes one term and therefore always the sum; mixing
    the index makes a term depend on its position, so that exchanged elements show. Integer sums
    commute, so devices may add in any order. Other damage passes with a chance of 2^-32.
    """
    bits = array.astype(jnp.uint8) if array.dtype == bool else array
    word = {1: jnp.uint8, 2: jnp.uint16}.get(bits.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(bits, word).astype(jnp.uint32)  # 64 bits: two words
    # No reshape to one dim: each device numbers the elements it holds, without communication.
    index = jnp.zeros(words.shape, jnp.uint32)
    for dim, size in enumerate(words.shape):
        position = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
        index = index * jnp.uint32(size) + position
    return _mix(words ^ _mix(index)).sum(dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """Map 32-bit words one to one and spread each bit over all (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def write_file_record(folder: Path, max_crc_bytes: int = MAX_CRC_BYTES):
    """Record name, size and CRC-32 of every file in the folder of a finished step, atomically."""
    found = sorted(folder.rglob("*"))
    files = [path for path in found if path.is_file() and path != folder / FILE_RECORD]

    def entry(path: Path) -> str:
        size = path.stat().st_size
        crc = "-" if size > max_crc_bytes else f"{file_crc32(path):08x}"
        return f"{crc} {size} {path.relative_to(folder)}"

    with ThreadPoolExecutor() as threads:
        text = "\n".join(threads.map(entry, files))
    temporary = folder / f"{FILE_RECORD}.tmp"
    with temporary.open("w") as file:
        file.write(f"{zlib.crc32(text.encode()):08x}\n{text}")
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(folder / FILE_RECORD)


def find_damage(folder: Path) -> str | None:
    """Return how the files in a step's folder differ from its file record; None if they do not.

    Files that the record does not know may have been added, by file systems too, and do not count.
    A folder without a record is not judged.
    """
    record = folder / FILE_RECORD
    if not record.exists():
        return None
    try:
        checksum, _, body = record.read_bytes().partition(b"\n")
    except OSError as error:
        return f"{FILE_RECORD} cannot be read: {error.strerror}"
    if checksum != b"%08x" % zlib.crc32(body):
        return f"{FILE_RECORD}, the record of its files, does not match its own checksum"

    def problem(entry: str) -> str | None:
        crc, size, name = entry.split(" ", 2)
        difference = _difference(folder / name, int(size), crc)
        return difference and f"{name} {difference}"

    with ThreadPoolExecutor() as threads:
        problems = [*filter(None, threads.map(problem, body.decode().splitlines()))]
    if not problems:
        return None
    more = f" (and {len(problems) - 1} more of its files)" if len(problems) > 1 else ""
    return problems[0] + more


def _difference(path: Path, size: int, crc: str) -> str | None:
    """Return how a file differs from its entry in the record; None if it does not."""
    try:
        if not path.exists():
            return "is missing"
        if not path.is_file():
            return "is no file any more"
        if (found := path.stat().st_size) != size:
            return f"has {found:,} bytes instead of {size:,}"
        if crc != "-" and f"{file_crc32(path):08x}" != crc:
            return "has bits that changed since it was saved"
        path.open("rb").close()
    except OSError as error:
        return f"cannot be read: {error.strerror}"
    return None
