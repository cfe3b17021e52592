"""Exports to the last byte, runs that start with weights, and the command line."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
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
from dsv3_jax.training.state import abstract_state, load_state, make_layout
from dsv3_jax.weights import save
from dsv3_jax.weights.__main__ import main
from dsv3_jax.weights.abstract_params import abstract_params
from dsv3_jax.weights.safetensors import SafetensorsReader
from dsv3_jax.weights.save import export_weights
from dsv3_jax.weights.sources import open_weights
from sharding.layout import Layout
from sharding.mesh import make_mesh, parse_mesh

ROOT = Path(__file__).parent.parent
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


# --- exports


def test_bfloat16_there_and_back(tmp_path):
    """The exported files hold the source's bytes, in other shards."""
    export_weights(A6, tmp_path / "exported", shard_bytes=400_000)
    assert_same_files(tmp_path / "exported", A6)
    assert len(list((tmp_path / "exported").glob("model-*-of-00004.safetensors"))) == 4


def test_fp8_there_and_back(tmp_path):
    """FP8 values and scales of the golden, whose scales are kept."""
    export_weights(B1, tmp_path / "exported", "fp8")
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
    with SafetensorsReader(tmp_path / "fp8") as scales:
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


def test_small_files_go_along(tmp_path, official, monkeypatch):
    """By the command line, from folder to folder."""
    shutil.copytree(official, tmp_path / "official")
    (tmp_path / "official" / "tokenizer.json").write_text('{"größe": 1}', encoding="utf-8")
    (tmp_path / "official" / "README.md").write_text("not ours to copy")
    run(monkeypatch, "export", tmp_path / "official", tmp_path / "out", "--dtype=float32")
    files = {"config.json", "model.safetensors", "tokenizer.json"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == files
    assert (tmp_path / "out" / "tokenizer.json").read_text(encoding="utf-8") == '{"größe": 1}'
    assert_same_files(tmp_path / "out", official)


def test_nothing_is_left_of_an_export_that_failed(official, tmp_path, monkeypatch):
    model = load_pretrained(official)
    convert, n_converted = save.to_official, []

    def failing(*arguments):
        n_converted.append(arguments)
        if len(n_converted) == 3:
            raise OSError("no space left")
        return convert(*arguments)

    monkeypatch.setattr(save, "to_official", failing)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(OSError, match="no space left"):
        save_pretrained(model, tmp_path / "new", "float32")
    with pytest.raises(ValueError, match="dtype='int8' must be one of float32, bfloat16, fp8"):
        save_pretrained(model, tmp_path / "new", "int8")
    assert sorted(tmp_path.rglob("*")) == before


def test_folders_with_something_else_are_left_alone(official, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=f"{tmp_path}/mine exists and is no empty folder"):
        export_weights(official, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]


# --- the command line


def test_inspect_says_what_a_folder_holds(monkeypatch, capsys):
    run(monkeypatch, "inspect", B1)
    told = capsys.readouterr().out
    assert "official" in told and "F8_E4M3" in told


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["inspect", "nowhere"], r"error: nowhere/config.json does not exist; a folder with"),
        (
            ["inspect", "imported"],
            "error: imported was made by .*weights import.* /the/original: ev",
        ),
        (["export", "imported", "new"], "error: imported was made by .* earlier version"),
        (["import", "official", "new"], "error: `import` is gone: .*--set init_from=FOLDER"),
        (["verify", "new", "official", "--more"], "error: `verify` is gone: .*`inspect` checks"),
        (["export", "nowhere", "new"], "error: nowhere/config.json does not exist"),
        (["export", "official", "official"], "error: .*official exists and is no empty folder"),
    ],
)
def test_errors_of_the_command_line(official, tmp_path, arguments, message, monkeypatch):
    """Imports of older versions are answered with what to use, and their command as well."""
    shutil.copytree(official, tmp_path / "official")
    (tmp_path / "imported").mkdir()
    (tmp_path / "imported" / "config.json").write_text('{"imported_from": "/the/original"}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, *arguments)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["imported", "official"]


def test_help_needs_no_jax():
    """So that it comes at once."""
    code = "import sys; sys.argv[1:] = ['--help']; import dsv3_jax.weights.__main__ as m\n"
    code += "try: m.main()\nexcept SystemExit: print(sorted({'jax', 'orbax'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "usage" in done.stdout and done.stdout.endswith("[]\n"), done.stderr


# --- starting from weights


def as_run(model) -> Config:
    config = load_preset("tiny")
    return dataclasses.replace(config, model=model)


def start(config: Config, folder: Path, mesh: str = "dp2,ep2"):
    """The state that a run on 4 devices starts with, and what it should look like."""
    spec = parse_mesh(mesh)
    mesh, layout = make_mesh(spec, jax.devices()[:4]), make_layout(config, spec)
    optimizer = make_optimizer(config.optimizer, Policy.of(config.precision))
    abstract = abstract_state(config, optimizer, mesh, layout)
    return load_state(open_weights(folder), optimizer, abstract), abstract


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


def test_a_run_starts_with_the_weights_of_a_run(official, workdir):
    """As with those of the official folder, which the workdir here began with."""
    check_start(start(as_run(open_weights(official).config), workdir), official)


def test_a_run_starts_with_released_fp8_weights():
    """Straight from the folder, without a conversion of it."""
    check_start(start(as_run(open_weights(B1).config), B1, "dp4"), B1)


@pytest.mark.parametrize("kind", ["official", "workdir"])
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


@pytest.mark.parametrize("kind", ["official", "workdir"])
def test_a_model_without_mtp_leaves_it_out(kind, official, request):
    source = open_weights(request.getfixturevalue(kind))
    without = dataclasses.replace(source.config, mtp_depth=0)
    mesh = make_mesh(parse_mesh("dp1"), jax.devices()[:1])
    got = source.load(abstract_params(without, Policy(), mesh, Layout()))
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


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path):
    """Each loads what its two devices of ep4 hold, and reads no more than that."""
    official = write(tmp_path / "official", FIELDS, random_tensors(FIELDS, "F8_E4M3"), 3)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    script = ROOT / "tests" / "reference" / "two_processes.py"
    python = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, port, str(i), official],
            env=os.environ | python,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    with SafetensorsReader(official) as folder:
        for i, text in enumerate(printed):
            needed = sum(x.n_bytes * held_by(i, name) for name, x in folder.items())
            assert int(text.split()[-1]) == needed < 0.7 * folder.n_bytes


def held_by(process: int, name: str) -> float:
    """How much of a tensor the devices of a process hold."""
    if "embed_tokens" in name or "head." in name and "norm" not in name:
        return 0.5 if name in ("model.embed_tokens.weight", "lm_head.weight") else 0.0
    if ".experts." in name:
        return float(int(name.split(".")[5]) // 2 == process)
    return 1.0
