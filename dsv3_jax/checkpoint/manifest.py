"""What a step says of itself: shapes, dtypes and fingerprints of its arrays, and an extra."""

import json
import zlib
from pathlib import Path

import jax
from jaxtyping import PyTree

from dsv3_jax.shapes import Array


def new_manifest(arrays: dict[str, Array], fingerprints: dict[str, str], extra: dict) -> dict:
    """The manifest of a step, as JSON can hold it, with a checksum of itself."""
    manifest = {
        "extra": json.loads(json.dumps(extra)),
        "shapes": {path: _signature(array) for path, array in arrays.items()},
        "fingerprints": fingerprints,
    }
    return manifest | {"checksum": _checksum(manifest)}


def is_sound(manifest: dict) -> bool:
    """Whether a manifest still matches the checksum written with it."""
    rest = {key: value for key, value in manifest.items() if key != "checksum"}
    return manifest.get("checksum") == _checksum(rest)


def check_shapes(folder: Path, saved: dict[str, str], wanted: dict):
    """Raise a ValueError unless the arrays saved in `folder` are those `wanted`, by path."""
    asked = {path: _signature(array) for path, array in wanted.items()}
    paths = [*asked, *(path for path in saved if path not in asked)]
    if different := [path for path in paths if asked.get(path) != saved.get(path)]:
        first = different[0]
        raise ValueError(
            f"checkpoint {folder} is of another config: array {first} is "
            f"{saved.get(first, 'absent')} there and {asked.get(first, 'absent')} in this run "
            f"({len(different)} of {len(paths)} arrays differ); "
            "run with the config that wrote it, or in another --workdir"
        )


def named_leaves(tree: PyTree) -> dict:
    """Leaves by path, such as "params.embed.weight", in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def without_empty(arrays: dict) -> dict:
    """Orbax refuses arrays without elements; their shape in the manifest says all."""
    return {path: array for path, array in arrays.items() if array.size}


def _signature(array: Array | jax.ShapeDtypeStruct) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _checksum(manifest: dict) -> str:
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"
