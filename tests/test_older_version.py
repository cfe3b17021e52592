"""A run folder that version 5fba886 wrote, before fields and classes were renamed, is read as ever.

`goldens/G_older_run.tar.xz` is its config.json and its checkpoint of step 2 on mesh ep2: a state of
small sizes with EMA weights, in which element j of array i, both counted from 0, is i + j mod 7.
"""

import json
import pickle
import tarfile
from pathlib import Path

import jax
import numpy as np
import pytest
from reference.goldens import GOLDENS
from reference.tensor_files import assert_same

from dsv3_jax.checkpoint import CheckpointManager, CheckpointReader, DamagedCheckpoint
from dsv3_jax.config import Config
from dsv3_jax.config_cli import from_dict, with_new_names
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.optimizer import make_optimizer
from dsv3_jax.training.state import abstract_state, make_layout, to_saved
from dsv3_jax.weights.abstract_params import abstract_params
from dsv3_jax.weights.sources import open_weights
from sharding.layout import Layout
from sharding.mesh import make_mesh, parse_mesh


@pytest.fixture
def older_run(tmp_path) -> Path:
    with tarfile.open(GOLDENS / "G_older_run.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "run"


def values(signatures: dict[str, str]) -> dict[str, np.ndarray]:
    """The arrays of the checkpoint by the paths in its manifest, which are in the state's order."""
    arrays = {}
    for i, (path, signature) in enumerate(signatures.items()):
        dtype, _, sizes = signature[:-1].partition("[")
        shape = tuple(map(int, filter(None, sizes.split(","))))
        arrays[path] = (np.arange(np.prod(shape, dtype=int)) % 7 + i).reshape(shape).astype(dtype)
    return arrays


def test_a_run_resumes_on_another_mesh(older_run):
    saved = json.loads((older_run / "config.json").read_text())
    config, spec = from_dict(Config, with_new_names(saved)), parse_mesh("dp2,ep2")
    optimizer = make_optimizer(config.optimizer, Policy.of(config.precision))
    mesh = make_mesh(spec, jax.devices()[:4])
    abstract = abstract_state(config, optimizer, mesh, make_layout(config, spec))
    checkpoints = CheckpointManager(older_run / "checkpoints", keep=None)
    resumed = checkpoints.resume(to_saved(abstract, abstract.params))
    assert resumed.step == 2 and resumed.extra["row"] == 8
    expected = values(checkpoints.signatures())
    for array, value in zip(jax.tree.leaves(resumed.state), expected.values(), strict=True):
        assert_same(np.asarray(array), value)
    checkpoints.close()


@pytest.mark.parametrize("folder, kind", [("run", "params"), ("run@ema", "ema")])
def test_its_weights_are_read(older_run, folder, kind, monkeypatch):
    for name in ("load", "loads", "Unpickler"):  # nothing is unpickled
        monkeypatch.delattr(pickle, name)
    source = open_weights(older_run.parent / folder)
    mesh = make_mesh(parse_mesh("ep2"), jax.devices()[:2])
    expected = values(CheckpointReader(older_run / "checkpoints").signatures())
    arrays = source.load(abstract_params(source.config, Policy(), mesh, Layout()))
    for path, array in arrays.items():
        name = f"{'bias' if path.endswith('ffn.bias') else kind}.{path}.value"
        assert_same(np.asarray(array), expected[name])


def test_its_records_show_damage(older_run):
    folder = older_run / "checkpoints" / "2"
    reader = CheckpointReader(older_run / "checkpoints")
    reader.verify()
    (folder / "state" / "_sharding").write_bytes(b"{}")
    with pytest.raises(DamagedCheckpoint, match="state/_sharding has 2 bytes instead of"):
        reader.verify()
    (folder / "files.txt").unlink()
    manifest = json.loads((folder / "manifest" / "metadata").read_text())
    manifest["fingerprints"]["bias.moe.ffn.bias.value"] = "0" * 8
    (folder / "manifest" / "metadata").write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match="manifest does not match the checksum"):
        reader.signatures()
