"""Import, export and verify: weights between official folders and our checkpoints, part by part.

A part is one layer, so a host holds one layer at a time whatever the model's size, and an import
that was killed goes on with the part that it was at.
"""

import contextlib
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from jax.sharding import Mesh

from dsv3_jax.checkpoint import CheckpointManager
from dsv3_jax.config_cli import to_dict
from dsv3_jax.mesh_checks import check_model_mesh
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.numerics.quantize import BLOCK, QuantizedTensor, dequantize
from dsv3_jax.progress import byte_bar
from dsv3_jax.weights.hf_names import SCALE, copies_in_mtp, to_official
from dsv3_jax.weights.load import read_scale
from dsv3_jax.weights.pretrained import mesh_of
from dsv3_jax.weights.safetensors import Folder
from dsv3_jax.weights.save import (
    FORMATS,
    SHARD_BYTES,
    companions,
    wanted_on_the_host,
    write_official,
)
from dsv3_jax.weights.sources import (
    Official,
    open_weights,
    parts,
    wanted_arrays,
    wanted_part,
)
from sharding.layout import Layout
from sharding.mesh import mesh_spec

SCALES = "scales.safetensors"  # of an imported FP8 checkpoint, so that an export can keep them


def import_weights(
    source: str | Path, directory: str | Path, dtype: str = "bfloat16", mesh: Mesh | None = None
):
    """Read an official folder once into checkpoints that any mesh restores.

    The same call again goes on where a killed one stopped.

    Raises:
        ValueError: `directory` holds the import of another source or dtype; or see `open_weights`.
        FileExistsError: it holds something else.
        OSError: the disk is full; what is imported stays.
    """
    if dtype not in FORMATS[:2]:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(FORMATS[:2])}")
    official, directory = Official(Path(source)), Path(directory)
    mesh = mesh_of(mesh)
    check_model_mesh(official.config, mesh_spec(mesh))
    _begin(official, directory, dtype)
    policy = Policy(master=jnp.dtype(dtype))
    layout = Layout(mesh=mesh_spec(mesh), zero=3)
    wanted = wanted_arrays(official.config, policy, mesh, layout)
    with (
        contextlib.closing(CheckpointManager(directory / "parts", keep=None)) as checkpoints,
        byte_bar(f"importing {source}", official.n_bytes(wanted)) as advance,
    ):
        done = checkpoints.steps()
        for step, part in enumerate(parts(official.config)):
            asked = wanted_part(wanted, part)
            if step in done:
                advance(official.n_bytes(asked, part.layer))
                continue
            checkpoints.save(step, official.load(asked, part.layer, advance), {"part": [*part]})


def _begin(official: Official, directory: Path, dtype: str):
    """Note what is imported, with the small files beside the weights; refuse to mix two imports."""
    files = {tensor.file for tensor in official.folder.values()}
    note = {
        "imported_from": str(official.directory),
        "files": {file.name: file.stat().st_size for file in sorted(files)},
        "dtype": dtype,
        "model": to_dict(official.config),
    }
    path = directory / "config.json"
    if path.exists():
        found = json.loads(path.read_text())
        differ = [key for key in note if key != "imported_from" and found.get(key) != note[key]]
        if differ:
            raise ValueError(
                f"{directory} holds another import (its {', '.join(differ)} differ); name a new "
                "folder, or remove this one"
            )
    if jax.process_index() != 0:
        return
    named = [name for name in official.folder if name.endswith(SCALE)]
    scales = {name: read_scale(official.folder, name) for name in named}
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise FileExistsError(f"{directory} is not empty and no import; name a new folder")
        path.with_suffix(".tmp").write_text(json.dumps(note, indent=2) + "\n")
        path.with_suffix(".tmp").rename(path)  # with it the import has begun
    for companion in companions(official.directory):
        shutil.copy(companion, directory)
    if scales:
        safetensors.numpy.save_file(scales, directory / SCALES)
        (directory / SCALES).chmod(path.stat().st_mode)  # the package leaves it at 0600


def export_weights(
    source: str | Path,
    directory: str | Path,
    dtype: str = "bfloat16",
    scales: str | Path | None = None,
    shard_bytes: int = SHARD_BYTES,
):
    """Write the weights in any folder under the official names; see `save_pretrained`.

    FP8 weights and an import of them bring their scales along.
    """
    weights = open_weights(source)
    if isinstance(weights, Official) or (weights.directory / SCALES).is_file():
        scales = scales or weights.directory
    known = None if scales is None else Folder(scales)
    n_bytes = weights.n_bytes(wanted_on_the_host(weights))
    with byte_bar(f"exporting {source}", n_bytes) as advance:
        write_official(weights, directory, dtype, known, shard_bytes, advance)


class Comparison(NamedTuple):
    """What `verify` found."""

    n_tensors: int
    different: list[str]


def verify(checkpoint: str | Path, source: str | Path) -> Comparison:
    """Compare our checkpoint with the official folder it came from, tensor by tensor, bit by bit.

    Every official tensor, de-quantised where it is FP8 and rounded to the checkpoint's format, must
    be what the checkpoint holds. The copies of embedding and head in MTP layers count, too, and the
    scales that an import keeps.
    """
    ours, official = open_weights(checkpoint), Official(Path(source))
    wanted = wanted_on_the_host(ours)
    copies = {name: [] for name in copies_in_mtp(ours.config).values()}
    for copy, name in copies_in_mtp(ours.config).items():
        copies[name] += [copy] * (copy in official.folder)
    same: dict[str, bool] = {}
    with byte_bar(f"verifying {checkpoint}", ours.n_bytes(wanted)) as advance:
        for part in parts(ours.config):
            arrays = ours.load(wanted_part(wanted, part), part.layer, advance)
            for name, value in to_official(arrays, ours.config, part.layer).items():
                for there in [name, *copies.get(name, [])]:
                    same[there] = _same(official.folder, there, value)
    if (ours.directory / SCALES).is_file():
        with Folder(ours.directory) as scales:
            same |= {name: _same(official.folder, name, scales.read(name)) for name in scales}
    weights = (name for name in official.folder if not name.endswith(SCALE))
    same |= {name: False for name in weights if name not in same}
    return Comparison(len(same), [name for name in same if not same[name]])


def _same(folder: Folder, name: str, value: np.ndarray) -> bool:
    if name not in folder:
        return False
    found = folder.read(name)
    if folder[name].dtype == "F8_E4M3":
        found = np.asarray(_wide(found, folder.read(name + SCALE)))
    found = found.astype(value.dtype)
    return found.shape == value.shape and found.tobytes() == np.ascontiguousarray(value).tobytes()


@jax.jit
def _wide(values, scale):
    return dequantize(QuantizedTensor(values, scale), BLOCK)
