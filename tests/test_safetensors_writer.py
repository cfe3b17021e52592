"""Folders that `SafetensorsWriter` leaves: read by the safetensors package, whole or absent."""

import json
import os
import resource
import stat

import numpy as np
import pytest
import safetensors
from reference.tensor_files import as_package, assert_same, package_read, tensors

from dsv3_jax.weights import safetensors as module
from dsv3_jax.weights.safetensors import INDEX, SafetensorsReader, SafetensorsWriter


def write(directory, values, **options):
    with SafetensorsWriter(directory, **options) as writer:
        for name, value in values.items():
            writer.add(name, value)
        writer.add_file("config.json", '{"name": "größe"}')


def test_one_shard(tmp_path):
    target = tmp_path / "new"
    write(target, tensors())
    assert sorted(os.listdir(target)) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["new"]
    assert json.loads((target / "config.json").read_text(encoding="utf-8"))["name"] == "größe"
    assert package_read(target) == as_package(tensors())
    with safetensors.safe_open(target / "model.safetensors", "np") as file:
        assert file.metadata() == {"format": "pt"}
        assert_same(file.get_tensor("head"), tensors()["head"])


def test_shards_and_index(tmp_path):
    values = {f"w{i}": np.full((3, 5), i, np.float32) for i in range(7)}  # 60 bytes each
    values["large"] = np.ones((100, 3), np.float32)
    target = tmp_path / "new"
    write(target, values, shard_bytes=130)
    shards = [f"model-0000{i}-of-00005.safetensors" for i in range(1, 6)]
    assert sorted(os.listdir(target)) == sorted([*shards, "config.json", INDEX])
    index = json.loads((target / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(value.nbytes for value in values.values())}
    for shard in shards:
        with safetensors.safe_open(target / shard, "np") as file:
            named = {name for name, found in index["weight_map"].items() if found == shard}
            assert set(file.keys()) == named
            assert len(named) == 1 or sum(values[name].nbytes for name in named) <= 130
    assert package_read(target) == as_package(values)
    with SafetensorsReader(target) as found:
        for name, value in values.items():
            assert_same(found.read(name), value)


def test_strided_arrays(tmp_path):
    value = np.arange(24, dtype=np.float32).reshape(4, 6)
    write(tmp_path / "new", {"turned": value.T, "part": value[1::2, 1:3]})
    with SafetensorsReader(tmp_path / "new") as found:
        assert_same(found.read("turned"), value.T.copy())
        assert_same(found.read("part"), value[1::2, 1:3].copy())


def test_others_may_read_the_folder(tmp_path):
    before = os.umask(0o022)
    write(tmp_path / "new", tensors())
    os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert modes == {"config.json": 0o644, "model.safetensors": 0o644}
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o755


def test_shards_reach_the_disk_before_the_name(tmp_path, monkeypatch):
    flushed = []

    def fsync(fd):
        assert not (tmp_path / "new").exists()
        flushed.append(os.path.basename(os.readlink(f"/proc/self/fd/{fd}")))

    monkeypatch.setattr(os, "fsync", fsync)
    write(
        tmp_path / "new", {"v": np.ones(3, np.float32), "w": np.ones(3, np.float32)}, shard_bytes=1
    )
    assert len(set(flushed)) == 4 and {"config.json", INDEX} < set(flushed)


def test_nothing_appears_before_the_end_or_after_a_crash(tmp_path):
    target = tmp_path / "new"
    with (
        pytest.raises(RuntimeError, match="crash"),
        SafetensorsWriter(target, shard_bytes=1) as writer,
    ):
        writer.add("v", np.ones(3, np.float32))
        writer.add("w", np.ones(3, np.float32))
        assert not target.exists() and all(name.startswith(".") for name in os.listdir(tmp_path))
        raise RuntimeError("crash")
    assert os.listdir(tmp_path) == []


def test_crash_while_finishing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(module.json, "dumps", lambda *a, **k: 1 / 0)
    with (
        pytest.raises(ZeroDivisionError),
        SafetensorsWriter(tmp_path / "new", shard_bytes=1) as writer,
    ):
        writer.add("v", np.ones(3, np.float32))
        writer.add("w", np.ones(3, np.float32))
    assert os.listdir(tmp_path) == []


def test_disk_full(tmp_path):
    """A limit on file sizes fails inside the write call, as a full disk does."""
    target = tmp_path / "new"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    message = rf"writing {target} failed: .* needs 400000 bytes, and \d+ are free"
    try:
        with pytest.raises(OSError, match=message), SafetensorsWriter(target) as writer:
            writer.add("w", np.ones(100_000, np.float32))
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []


def test_existing_targets(tmp_path):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", tensors())
    assert package_read(tmp_path / "empty") == as_package(tensors())
    with pytest.raises(FileExistsError, match=f"{tmp_path / 'empty'} exists"):
        SafetensorsWriter(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match=f"{tmp_path / 'file'} exists"):
        SafetensorsWriter(tmp_path / "file")


def test_refused_additions(tmp_path):
    with SafetensorsWriter(tmp_path / "new", shard_bytes=1) as writer:
        for name in ("v", "w"):
            writer.add(name, np.ones(3, np.float32))
        for name in ("v", "w"):
            with pytest.raises(ValueError, match=f"tensor {name} was added"):
                writer.add(name, np.ones(3, np.float32))
        with pytest.raises(ValueError, match="tensor ids is int64"):
            writer.add("ids", np.ones(3, np.int64))
        writer.add_file("config.json", "{}")
        for name in ("config.json", "../config.json", "a/b", ".."):
            with pytest.raises(ValueError, match="plain name"):
                writer.add_file(name, "{}")
    assert set(package_read(tmp_path / "new")) == {"v", "w"}
