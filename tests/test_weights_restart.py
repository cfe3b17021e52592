"""Imports that were killed, refused or damaged, and exports that failed."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from reference.official_weights import FIELDS, our_arrays, random_tensors, raw, write
from reference.tensor_files import assert_same

from dsv3_jax import load_pretrained, save_pretrained
from dsv3_jax.params import named_arrays
from dsv3_jax.weights import save
from dsv3_jax.weights.__main__ import main
from dsv3_jax.weights.convert import export_weights, import_weights, verify
from dsv3_jax.weights.safetensors import Folder
from dsv3_jax.weights.sources import Official, open_weights

ROOT = Path(__file__).parent.parent
# Parts: embedding and head, dense layers 0 and 1, MoE layer 2.
FOUR_PARTS = FIELDS | {"first_k_dense_replace": 2, "num_nextn_predict_layers": 0}


@pytest.fixture
def official(tmp_path):
    """FP8, so that scales go along."""
    return write(tmp_path / "official", FOUR_PARTS, random_tensors(FOUR_PARTS, "F8_E4M3"), 3)


def assert_imported(folder: Path, official: Path):
    got = named_arrays(nnx.state(load_pretrained(folder, "bfloat16")))
    for path, value in our_arrays(official, "bfloat16").items():
        assert_same(np.asarray(got[path]), value)
    assert verify(folder, official) == (len(Official(official).folder), [])


def interrupted(monkeypatch, official: Path, folder: Path, part: int):
    """An import that fails when it comes to a part."""
    load, n_loaded = Official.load, []

    def failing(self, *arguments):
        n_loaded.append(arguments)
        if len(n_loaded) > part:
            raise KeyboardInterrupt
        return load(self, *arguments)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Official, "load", failing)
        import_weights(official, folder)


@pytest.mark.parametrize("part", [pytest.param(0, marks=pytest.mark.slow), 2])
def test_an_interrupted_import_goes_on_where_it_was(official, tmp_path, part, monkeypatch):
    folder, n_threads = tmp_path / "imported", threading.active_count()
    interrupted(monkeypatch, official, folder, part)
    end = time.monotonic() + 10
    while threading.active_count() > n_threads and time.monotonic() < end:
        time.sleep(0.01)  # a closed checkpoint's thread may be on its way out
    assert threading.active_count() <= n_threads
    with pytest.raises(ValueError, match="the import is not finished") as caught:
        open_weights(folder)
    again = f"run `python -m dsv3_jax.weights import {official} {folder}` again"
    assert f"{4 - part} of 4 parts are missing; {again}" in str(caught.value)

    names, whole = [], Folder.read

    def read(self, name, **ranges):
        names.append(name)
        return whole(self, name, **ranges)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "read", read)
        import_weights(official, folder)
    weights = [name for name in names if not name.endswith("_scale_inv")]
    parts = ["model.layers.0.", "model.layers.1.", "model.layers.2."]
    left = tuple(parts[1:] if part else ["model.", "lm_head."])
    everything = {name for name in raw(official) if not name.endswith("_scale_inv")}
    assert set(weights) == {name for name in everything if name.startswith(left)}
    import_weights(official, folder)  # nothing is left to do
    assert_imported(folder, official)


def test_another_import_is_not_mixed_in(official, tmp_path, monkeypatch):
    folder = tmp_path / "imported"
    interrupted(monkeypatch, official, folder, 1)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(ValueError, match=f"{folder} holds another import .its dtype differ"):
        import_weights(official, folder, "float32")
    fields = FOUR_PARTS | {"rope_theta": 50_000}
    write(tmp_path / "other", fields, random_tensors(fields, "F8_E4M3"), 3)
    with pytest.raises(ValueError, match=f"{folder} holds another import .its model differ"):
        import_weights(tmp_path / "other", folder)
    write(tmp_path / "shards", FOUR_PARTS, random_tensors(FOUR_PARTS, "F8_E4M3"), 2)
    with pytest.raises(ValueError, match=f"{folder} holds another import .its files differ"):
        import_weights(tmp_path / "shards", folder)
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    shutil.copytree(official, tmp_path / "moved")  # the same, elsewhere
    import_weights(tmp_path / "moved", folder)
    assert_imported(folder, official)


def test_folders_with_something_else_are_left_alone(official, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=f"{tmp_path}/mine is not empty and no import"):
        import_weights(official, tmp_path / "mine")
    with pytest.raises(FileExistsError, match=f"{tmp_path}/mine exists and is no empty folder"):
        export_weights(official, tmp_path / "mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    for dtype in ("fp8", "float16"):
        with pytest.raises(ValueError, match=f"dtype='{dtype}' must be one of float32, bfloat16"):
            import_weights(official, tmp_path / "new", dtype)
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_a_damaged_part_is_named_and_imported_again(official, tmp_path):
    folder = tmp_path / "imported"
    import_weights(official, folder)
    part = folder / "parts" / "3"
    largest = max((p for p in part.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    data = bytearray(largest.read_bytes())
    data[len(data) // 2] ^= 1
    largest.write_bytes(data)
    with pytest.raises(ValueError, match=f"checkpoint {part} is damaged"):
        load_pretrained(folder)
    shutil.rmtree(part)
    import_weights(official, folder)
    assert_imported(folder, official)
    shutil.rmtree(folder / "parts" / "1")
    with pytest.raises(ValueError, match="1 of 4 parts are missing"):
        load_pretrained(folder)
    with pytest.raises(ValueError, match="move the steps from 1 on away"):
        import_weights(official, folder)


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


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["inspect", "nowhere"], r"error: nowhere/config.json does not exist; a folder with"),
        (["import", "nowhere", "new"], "error: .*nowhere"),
        (["verify", "nowhere", "official"], "error: nowhere/config.json does not exist"),
        (["export", "nowhere", "new"], "error: nowhere/config.json does not exist"),
        (["export", "official", "official"], "error: .*official exists and is no empty folder"),
    ],
)
def test_errors_of_the_command_line(official, tmp_path, arguments, message, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["weights", *arguments])
    with pytest.raises(SystemExit, match=message):
        main()
    assert [path.name for path in tmp_path.iterdir()] == ["official"]


@pytest.mark.slow
def test_an_import_that_is_killed_again_and_again(tmp_path):
    """SIGKILL at the first, second, ... part that appears, then to the end, by another mesh."""
    fields = FIELDS | {"num_hidden_layers": 6}
    official = write(tmp_path / "official", fields, random_tensors(fields, "F8_E4M3"), 4)
    folder = tmp_path / "imported"
    command = [sys.executable, "-m", "dsv3_jax.weights", "import", official, folder]
    n_killed = 0
    for n in range(1, 8, 2):
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE)
        while process.poll() is None and not (folder / "parts" / str(n)).exists():
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        n_killed += process.wait() == -signal.SIGKILL
        if not (folder / "parts" / "7").exists():
            with pytest.raises(ValueError, match="is not finished"):
                open_weights(folder)
    assert n_killed >= 3
    subprocess.run([*command, "--mesh=ep2"], cwd=ROOT, check=True)
    assert_imported(folder, official)
    assert json.loads((folder / "config.json").read_text())["imported_from"] == str(official)


@pytest.mark.slow
def test_two_processes_share_the_work(tmp_path):
    """Each imports and loads what its two devices of ep4 hold, and reads no more than that."""
    official = write(tmp_path / "official", FIELDS, random_tensors(FIELDS, "F8_E4M3"), 3)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    script = ROOT / "tests" / "reference" / "two_processes.py"
    python = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    processes = [
        subprocess.Popen(
            [sys.executable, script, port, str(i), official, tmp_path / "new"],
            env=os.environ | python,
            stdout=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    printed = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    with Folder(official) as folder:
        for i, text in enumerate(printed):
            needed = sum(x.n_bytes * share_of(i, name) for name, x in folder.items())
            assert int(text.split()[-1]) == needed < 0.7 * folder.n_bytes
    assert_imported(tmp_path / "new", official)


def share_of(process: int, name: str) -> float:
    """How much of a tensor the devices of a process hold."""
    if "embed_tokens" in name or "head." in name and "norm" not in name:
        return 0.5 if name in ("model.embed_tokens.weight", "lm_head.weight") else 0.0
    if ".experts." in name:
        return float(int(name.split(".")[5]) // 2 == process)
    return 1.0
