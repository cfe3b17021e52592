"""Import, verify, export: round trips to the last byte, and what is left after a failure."""

import dataclasses
import json
import os
import shutil
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from reference.goldens import GOLDENS, model_of
from reference.official_weights import FIELDS, dequantized, our_arrays, random_tensors, raw, write
from reference.tensor_files import assert_same

from configs import load_preset
from dsv3_jax import load_pretrained, save_pretrained
from dsv3_jax.checkpoint import CheckpointManager
from dsv3_jax.config import Config
from dsv3_jax.config_cli import to_dict
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.optimizer import make_optimizer
from dsv3_jax.params import named_arrays
from dsv3_jax.training.state import abstract_state, layout_of, state_from
from dsv3_jax.weights.__main__ import main
from dsv3_jax.weights.convert import export_weights, import_weights, verify
from dsv3_jax.weights.safetensors import Folder
from dsv3_jax.weights.sources import Official, open_weights, wanted_arrays
from sharding.layout import Layout
from sharding.mesh import make_mesh, parse_mesh

A6, B1, D1 = (GOLDENS / name for name in ("A6_sharded_bf16", "B1_fp8", "D1_mtp"))
SMALL = FIELDS | {"q_lora_rank": None, "n_shared_experts": 0}


def assert_same_files(folder: Path, other: Path, leave_out: tuple[str, ...] = ()):
    """The same tensors, of the same types and bytes, whatever files they are in."""
    got, want = raw(folder), raw(other)
    assert got.keys() == want.keys() - set(leave_out)
    for name, value in got.items():
        assert_same(value, want[name])


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["weights", *map(str, arguments)])
    main()


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    """A small folder with MTP and its copies, in float32."""
    folder = tmp_path_factory.mktemp("convert") / "official"
    return write(folder, SMALL, random_tensors(SMALL), n_files=2)


@pytest.fixture(scope="module")
def imported(official):
    mesh = make_mesh(parse_mesh("dp2,ep2"), jax.devices()[:4])
    import_weights(official, official.parent / "imported", "float32", mesh)
    return official.parent / "imported"


@pytest.fixture(scope="module")
def imported_fp8(tmp_path_factory):
    """The golden with ceil blocks, in bfloat16."""
    folder = tmp_path_factory.mktemp("convert") / "imported"
    import_weights(B1, folder)
    return folder


# --- round trips


def test_bfloat16_there_and_back(tmp_path):
    """The exported files hold the source's bytes, in other shards."""
    import_weights(A6, tmp_path / "imported")
    export_weights(tmp_path / "imported", tmp_path / "exported", shard_bytes=400_000)
    assert_same_files(tmp_path / "exported", A6)
    assert len(list((tmp_path / "exported").glob("model-*-of-00004.safetensors"))) == 4
    found = verify(tmp_path / "imported", tmp_path / "exported")
    assert found == (len(Official(A6).folder), [])


def test_fp8_there_and_back(tmp_path, imported_fp8):
    """Codes and scales of the golden, through bfloat16 and its own scales."""
    assert verify(imported_fp8, B1) == (len(Official(B1).folder), [])
    export_weights(imported_fp8, tmp_path / "exported", "fp8")
    assert_same_files(tmp_path / "exported", B1)
    fields = json.loads((tmp_path / "exported" / "config.json").read_text())
    assert fields["quantization_config"]["weight_block_size"] == [128, 128]
    for name, value in our_arrays(tmp_path / "exported").items():
        assert_same(value, np.asarray(named_arrays(nnx.state(model_of("B1_fp8")))[name]))


def test_fp8_scales_that_no_quantiser_would_choose(tmp_path):
    """Powers of two over blocks without a +-448, as V3.1 has them: only their folder knows them."""
    tensors = with_other_scales(raw(B1))
    write(tmp_path / "fp8", json.loads((B1 / "config.json").read_text()), tensors, n_files=3)
    model = load_pretrained(tmp_path / "fp8", "bfloat16")
    with Folder(tmp_path / "fp8") as scales:
        save_pretrained(model, tmp_path / "exported", "fp8", scales)
    assert_same_files(tmp_path / "exported", tmp_path / "fp8")


def with_other_scales(tensors: dict) -> dict:
    tensors = dict(tensors)
    for name in [name for name in tensors if name + "_scale_inv" in tensors]:
        clipped = np.clip(tensors[name].astype(np.float32), -208, 208)
        tensors[name] = clipped.astype(tensors[name].dtype)
        log = np.log2(tensors[name + "_scale_inv"]).round()
        tensors[name + "_scale_inv"] = (2.0**log).astype(np.float32)
    return tensors


def test_export_of_an_fp8_folder(tmp_path):
    """Its own scales are kept, and MTP's joint stays wide; in float32 nothing is rounded."""
    fields = SMALL | {"num_hidden_layers": 1}
    write(tmp_path / "fp8", fields, with_other_scales(random_tensors(fields, "F8_E4M3")))
    export_weights(tmp_path / "fp8", tmp_path / "exported", "fp8")
    assert_same_files(tmp_path / "exported", tmp_path / "fp8")
    export_weights(B1, tmp_path / "wide", "float32")
    got, want = raw(tmp_path / "wide"), dequantized(B1)
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert_same(got[name], value)


@pytest.mark.slow
def test_fp8_of_a_float32_model(tmp_path):
    """Without the scales: a torch quantiser's codes and scales come out of the weights alone."""
    save_pretrained(model_of("B1_fp8"), tmp_path / "exported", "fp8")
    assert_same_files(tmp_path / "exported", B1)


def test_export_rounds_once(tmp_path):
    export_weights(D1, tmp_path / "exported")
    got, want = raw(tmp_path / "exported"), raw(D1)
    assert got.keys() == want.keys()
    for name, value in want.items():
        stays = name.endswith("e_score_correction_bias")
        assert_same(got[name], value if stays else value.astype(ml_dtypes.bfloat16))


def test_export_adds_the_copies_in_mtp(tmp_path, official):
    tensors = raw(official)
    del tensors["model.layers.3.embed_tokens.weight"]
    del tensors["model.layers.3.shared_head.head.weight"]
    write(tmp_path / "without", SMALL, tensors)
    save_pretrained(load_pretrained(tmp_path / "without"), tmp_path / "with", "float32")
    assert_same_files(tmp_path / "with", official)


@pytest.mark.slow
def test_small_files_go_along(tmp_path, official, monkeypatch):
    """By the command line, from folder to import to folder."""
    shutil.copytree(official, tmp_path / "official")
    (tmp_path / "official" / "tokenizer.json").write_text('{"größe": 1}', encoding="utf-8")
    (tmp_path / "official" / "README.md").write_text("not ours to copy")
    run(monkeypatch, "import", tmp_path / "official", tmp_path / "imported", "--dtype=float32")
    run(monkeypatch, "export", tmp_path / "imported", tmp_path / "out", "--dtype=float32")
    files = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert (tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8") == '{"größe": 1}'
    assert_same_files(tmp_path / "out", official)


# --- verify


def changed(folder: Path, name: str) -> Path:
    """One byte of one tensor changes: the sign of its last number."""
    tensor = Folder(folder)[name]
    with open(tensor.file, "r+b") as file:
        file.seek(tensor.start + tensor.n_bytes - 1)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 0x80]))
    return folder


def test_verify_finds_any_changed_number(tmp_path, official, imported):
    """One of every kind of tensor; MTP's copies count, though they are not imported."""
    tensors, n_tensors = Official(official).folder, len(Official(official).folder)
    one_of_a_kind = {"".join(filter(str.isalpha, name)): name for name in tensors}
    names = {*one_of_a_kind.values(), "model.layers.0.self_attn.o_proj.weight"}
    copies = {"model.layers.3.embed_tokens.weight", "model.layers.3.shared_head.head.weight"}
    assert copies < names and len(names) == 25
    shutil.copytree(official, tmp_path / "official")
    for name in names:
        changed(tmp_path / "official", name)
    found = verify(imported, tmp_path / "official")
    assert found.n_tensors == n_tensors and sorted(found.different) == sorted(names)


def test_verify_finds_changed_codes_and_scales(tmp_path, imported_fp8):
    shutil.copytree(B1, tmp_path / "fp8")
    code, scaled = (f"model.layers.1.mlp.experts.{i}.down_proj.weight" for i in (5, 0))
    changed(tmp_path / "fp8", code)
    assert verify(imported_fp8, tmp_path / "fp8").different == [code]
    changed(tmp_path / "fp8", scaled + "_scale_inv")
    found = verify(imported_fp8, tmp_path / "fp8").different
    assert sorted(found) == sorted([code, scaled, scaled + "_scale_inv"])


def test_verify_by_the_command_line(tmp_path, official, imported, monkeypatch, capsys):
    run(monkeypatch, "verify", imported, official)
    n_tensors = len(Official(official).folder)
    assert f"all {n_tensors} tensors are equal, bit for bit" in capsys.readouterr().out
    shutil.copytree(official, tmp_path / "official")
    changed(tmp_path / "official", "lm_head.weight")
    with pytest.raises(SystemExit, match=f"1 of {n_tensors} tensors differ:\n  lm_head.weight"):
        run(monkeypatch, "verify", imported, tmp_path / "official")
    run(monkeypatch, "inspect", official)
    assert "official" in capsys.readouterr().out


def test_verify_finds_layers_that_were_left_out(official, imported, tmp_path):
    """A checkpoint of fewer layers than its source."""
    shutil.copytree(imported, tmp_path / "imported")
    note = json.loads((tmp_path / "imported" / "config.json").read_text())
    note["model"]["mtp_depth"] = 0
    (tmp_path / "imported" / "config.json").write_text(json.dumps(note))
    shutil.rmtree(tmp_path / "imported" / "parts" / "4")
    found = verify(tmp_path / "imported", official).different
    assert sorted(found) == sorted(n for n in raw(official) if n.startswith("model.layers.3."))


# --- starting from weights


def as_run(model) -> Config:
    config = load_preset("tiny")
    return dataclasses.replace(config, model=model)


def start(config: Config, folder: Path):
    """The state that a run on 4 devices starts with, and what it should look like."""
    spec = parse_mesh("dp2,ep2")
    mesh, layout = make_mesh(spec, jax.devices()[:4]), layout_of(config, spec)
    optimizer = make_optimizer(config.optimizer, Policy.of(config.precision))
    abstract = abstract_state(config, optimizer, mesh, layout)
    return state_from(open_weights(folder), optimizer, abstract), abstract


def check_start(started, official: Path):
    """Master weights and biases of the folder, new moments, all where the run keeps them."""
    state, abstract = started
    got, want = named_arrays(state.params) | named_arrays(state.bias), our_arrays(official)
    assert got.keys() == want.keys()
    for path, value in want.items():
        assert_same(np.asarray(got[path]), value)
    for x, like in zip(jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True):
        assert (x.shape, x.dtype, x.sharding) == (like.shape, like.dtype, like.sharding)
    assert state.step == 0 and not any(np.any(x) for x in jax.tree.leaves(state.optimizer))


@pytest.fixture(scope="module")
def workdir(official):
    """A run that was begun with the official weights, and saved at step 3."""
    folder, config = official.parent / "run", as_run(open_weights(official).config)
    started = start(config, official)
    check_start(started, official)
    checkpoints = CheckpointManager(folder / "checkpoints", keep=None)
    checkpoints.save(3, started[0], {})
    checkpoints.close()
    (folder / "config.json").write_text(json.dumps(to_dict(config)))
    return folder


@pytest.mark.parametrize("kind", ["imported", "workdir"])
def test_a_run_starts_with_the_weights_of_a_folder(kind, official, request):
    """Of our own kinds as of the official one, which the workdir here began with."""
    config = as_run(open_weights(official).config)
    check_start(start(config, request.getfixturevalue(kind)), official)


@pytest.mark.parametrize("kind", ["official", "imported", "workdir"])
def test_model_that_does_not_fit(kind, request):
    folder = request.getfixturevalue(kind)
    model = open_weights(folder).config
    wider = dataclasses.replace(model, dense_hidden=281)
    with pytest.raises(ValueError, match=rf"{folder}: .*dense.ffn.down.kernel is \(1, 280, 136\) "):
        start(as_run(wider), folder)
    deeper = dataclasses.replace(model, mtp_depth=2)
    with pytest.raises(ValueError, match=rf"{folder}: 1 layers of mtp.* there, 2 in the model"):
        start(as_run(deeper), folder)
    attention = dataclasses.replace(model.attention, q_rank=7)
    with pytest.raises(ValueError, match=r"q_down.kernel is absent there and \(1, 136, 7\) in"):
        start(as_run(dataclasses.replace(model, attention=attention)), folder)


@pytest.mark.parametrize("kind", ["official", "imported", "workdir"])
def test_a_model_without_mtp_leaves_it_out(kind, official, request):
    source = open_weights(request.getfixturevalue(kind))
    without = dataclasses.replace(source.config, mtp_depth=0)
    mesh = make_mesh(parse_mesh("dp1"), jax.devices()[:1])
    got = source.load(wanted_arrays(without, Policy(), mesh, Layout()))
    want = {path: x for path, x in our_arrays(official).items() if not path.startswith("mtp")}
    assert got.keys() == want.keys()
    for path, value in want.items():
        assert_same(np.asarray(got[path]), value)


def test_export_of_a_run(tmp_path, official, workdir):
    export_weights(workdir, tmp_path / "out", "float32")
    assert_same_files(tmp_path / "out", official)


@pytest.mark.slow
def test_logits_of_a_run_and_its_export(tmp_path, workdir):
    export_weights(workdir, tmp_path / "out", "float32")
    tokens = np.random.default_rng(0).integers(0, SMALL["vocab_size"], (2, 11)).astype(np.int32)
    logits = nnx.jit(lambda model, tokens: (model(tokens), model.mtp_logits(tokens)))
    got, want = (logits(load_pretrained(x), tokens) for x in (tmp_path / "out", workdir))
    jax.tree.map(np.testing.assert_array_equal, got, want)
