"""Safetensors folders against the safetensors package, and every kind of damage to them."""

import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import safetensors
import safetensors.numpy
from reference.tensor_files import assert_same, tensors

from dsv3_jax.weights.safetensors import SafetensorsReader, TensorEntry

INDEX = "model.safetensors.index.json"
ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def write_raw(file, header, data=b"", length=None):
    """A safetensors file by hand; `header` is an object or the text itself."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if length is None else length
    file.write_bytes(length.to_bytes(8, "little") + text + data)


def write_index(folder, weight_map):
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


@pytest.fixture
def folder(tmp_path):
    safetensors.numpy.save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path


# --- reading


def test_reads_what_the_package_wrote(folder):
    with SafetensorsReader(folder) as found:
        assert set(found) == set(tensors()) and len(found) == len(tensors())
        assert found.directory == folder
        assert found.n_bytes == sum(value.nbytes for value in tensors().values())
        for name, value in tensors().items():
            assert found[name].numpy_dtype == value.dtype and found[name].n_bytes == value.nbytes
            assert_same(found.read(name), value)


def test_agrees_with_safe_open(folder):
    with (
        SafetensorsReader(folder) as found,
        safetensors.safe_open(folder / "model.safetensors", "np") as file,
    ):
        for name in ("embed", "head", "norm", "stack"):
            assert found[name].shape == tuple(file.get_slice(name).get_shape())
            assert found[name].dtype == file.get_slice(name).get_dtype()
            assert_same(found.read(name), file.get_tensor(name))


def test_start_is_the_place_in_the_file(tmp_path):
    header = {"__metadata__": {"format": "pt"}, "w": ONE}
    write_raw(tmp_path / "a.safetensors", header, np.array([3, 4], np.float32).tobytes())
    start = 8 + len(json.dumps(header))
    with SafetensorsReader(tmp_path) as found:
        assert dict(found) == {"w": TensorEntry(tmp_path / "a.safetensors", "F32", (2,), start)}
        assert found.read("w").tolist() == [3, 4]


@pytest.mark.parametrize("name", ["embed", "head", "expert"])
def test_all_row_and_column_ranges(folder, name):
    value = tensors()[name]
    n_rows, n_columns = value.shape
    with SafetensorsReader(folder) as found:
        for rows in [None, (0, n_rows), (1, 3), (2, 2), (n_rows, n_rows)]:
            for columns in [None, (0, n_columns), (1, 2), (0, 2), (2, n_columns), (1, 1)]:
                expected = value[slice(*rows or (None,)), slice(*columns or (None,))]
                assert_same(found.read(name, rows, columns), expected)


def test_ranges_of_one_dim_are_rows_or_columns(folder):
    with SafetensorsReader(folder) as found:
        assert_same(found.read("norm", rows=(2, 7)), tensors()["norm"][2:7])
        assert_same(found.read("norm", columns=(3, 11)), tensors()["norm"][3:])
        assert_same(found.read("norm", rows=(0, 0)), tensors()["norm"][:0])


def test_columns_beyond_the_first_page(tmp_path):
    value = np.random.default_rng(1).normal(size=(37, 3001)).astype(np.float32)
    safetensors.numpy.save_file(
        {"first": value[:, :7].copy(), "w": value}, tmp_path / "a.safetensors"
    )
    with SafetensorsReader(tmp_path) as found:
        assert_same(found.read("w", columns=(1500, 1600)), value[:, 1500:1600])
        assert_same(found.read("w", rows=(20, 37), columns=(2999, 3001)), value[20:, 2999:])


@pytest.mark.parametrize(
    "name, rows, columns",
    [
        ("embed", (0, 7), None),
        ("embed", (-1, 2), None),
        ("embed", (3, 2), None),
        ("embed", None, (0, 6)),
        ("embed", (0, 6), (2, 1)),
        ("norm", (0, 12), None),
        ("norm", None, (5, 12)),
        ("scalar", (0, 1), None),
        ("stack", (0, 1), None),
    ],
)
def test_ranges_outside_are_refused(folder, name, rows, columns):
    with (
        SafetensorsReader(folder) as found,
        pytest.raises(IndexError, match=f"tensor {name} of shape"),
    ):
        found.read(name, rows, columns)


def test_unknown_names(folder):
    with SafetensorsReader(folder) as found:
        assert "bias" not in found and found.get("bias") is None
        with pytest.raises(KeyError, match="bias"):
            found.read("bias")


def test_short_reads_are_continued(folder, monkeypatch):
    whole = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, to, at: whole(fd, [to[0][:7]], at))
    with SafetensorsReader(folder) as found:
        for name, value in tensors().items():
            assert_same(found.read(name), value)


def test_many_threads_read_the_same_file(folder):
    expected = tensors()
    names = [name for name in ("embed", "head", "expert") for _ in range(100)]

    def read(name):
        assert_same(found.read(name), expected[name])
        assert_same(found.read(name, (1, 4), (1, 3)), expected[name][1:4, 1:3])

    with SafetensorsReader(folder) as found, ThreadPoolExecutor(8) as pool:
        list(pool.map(read, names))


def test_close_closes_the_files(folder):
    n_open = len(os.listdir("/proc/self/fd"))
    found = SafetensorsReader(folder)
    assert len(os.listdir("/proc/self/fd")) == n_open + 1
    found.close()
    assert len(os.listdir("/proc/self/fd")) == n_open
    with pytest.raises(ValueError, match="closed"):
        found.read("embed")


@pytest.mark.parametrize("columns", [None, (0, 2)])
def test_a_file_that_shrank_is_named(tmp_path, columns):
    file = tmp_path / "a.safetensors"
    safetensors.numpy.save_file({"w": np.zeros((3000, 4), np.float32)}, file)
    with SafetensorsReader(tmp_path) as found:
        os.truncate(file, 20000)
        with pytest.raises(ValueError, match=f"{file} ends at byte 20000"):
            found.read("w", columns=columns)


# --- damaged headers


@pytest.mark.parametrize(
    "header, data, found",
    [
        (b'{"w": ', b"", "no valid JSON"),
        (b"\xff{}", b"", "utf-8"),
        (b"[]", b"", "no object"),
        (b"[" * 100_000, b"", "no valid JSON"),
        (b'{"w": {"dtype": "F32"}, "w": {}}', b"", "w stands there twice"),
        (b'{"w": {"dtype": "F32", "dtype": "BF16"}}', b"", "dtype stands there twice"),
        ({"w": 3}, b"", "tensor w by 3"),
        ({"w": {"dtype": "F32", "shape": [2]}}, b"", "tensor w by"),
        ({"w": ONE | {"shape": [-2]}}, bytes(8), "tensor w by"),
        ({"w": ONE | {"shape": [2.0]}}, bytes(8), "tensor w by"),
        ({"w": ONE | {"data_offsets": [0, True]}}, bytes(8), "tensor w by"),
        ({"w": ONE | {"data_offsets": [-8, 0]}}, bytes(8), "tensor w by"),
        ({"w": ONE | {"data_offsets": [0, 8, 9]}}, bytes(8), "tensor w by"),
        ({"w": ONE | {"shape": [3]}}, bytes(8), r"tensor w 8 bytes.* takes 12"),
        ({"w": ONE | {"data_offsets": [8, 0]}}, bytes(8), "tensor w -8 bytes"),
        ({"v": ONE, "w": ONE | {"data_offsets": [4, 12]}}, bytes(12), "has w at .* an overlap"),
        ({"v": ONE, "w": ONE}, bytes(8), "has [vw] at .* an overlap"),
        ({"v": ONE, "w": ONE | {"data_offsets": [12, 20]}}, bytes(20), "has w at .* a gap"),
        ({"w": ONE | {"data_offsets": [4, 12]}}, bytes(12), "has w at .* a gap"),
        ({"w": ONE}, bytes(5), "truncated by 3 bytes"),
        ({"w": ONE}, bytes(9), "too long by 1 bytes"),
    ],
)
def test_damaged_files(tmp_path, header, data, found):
    file = tmp_path / "a.safetensors"
    write_raw(file, header, data)
    n_open = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ValueError, match=f"^{file} .*{found}.*; download the file again"):
        SafetensorsReader(tmp_path)
    assert len(os.listdir("/proc/self/fd")) == n_open


@pytest.mark.parametrize("length", [30, 2**40, 2**64 - 1])
def test_header_longer_than_the_file(tmp_path, length):
    write_raw(tmp_path / "a.safetensors", b"{}", length=length)
    with pytest.raises(ValueError, match=rf"a\.safetensors claims a header of {length} bytes"):
        SafetensorsReader(tmp_path)


def test_header_over_the_limit(tmp_path):
    file = tmp_path / "a.safetensors"
    write_raw(file, b"{}", length=100_000_001)
    os.truncate(file, 200_000_000)  # a hole: no disk is used
    with pytest.raises(ValueError, match="at most 100000000"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("n_bytes", [0, 7])
def test_file_without_a_header_length(tmp_path, n_bytes):
    (tmp_path / "a.safetensors").write_bytes(bytes(n_bytes))
    with pytest.raises(ValueError, match=rf"a\.safetensors has {n_bytes} bytes"):
        SafetensorsReader(tmp_path)


def test_unsupported_dtype(tmp_path):
    safetensors.numpy.save_file({"ids": np.zeros(3, np.int64)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors .*ids as I64.*F32, BF16, F8_E4M3"):
        SafetensorsReader(tmp_path)


# --- the files of a folder


def test_no_safetensors_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no .safetensors file in {tmp_path}; "):
        SafetensorsReader(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80")
    with pytest.raises(FileNotFoundError, match="pytorch_model.bin is a pickle"):
        SafetensorsReader(tmp_path)


def test_same_name_in_two_files(tmp_path):
    for name in ("a", "b"):
        write_raw(tmp_path / f"{name}.safetensors", {"w": ONE}, bytes(8))
    with pytest.raises(ValueError, match=r"tensor w is in both .*/a\.saf.* and .*/b\.saf"):
        SafetensorsReader(tmp_path)


def test_files_without_index(tmp_path):
    for name in ("a", "b"):
        write_raw(tmp_path / f"{name}.safetensors", {name: ONE}, bytes(8))
    with SafetensorsReader(tmp_path) as found:
        assert list(found) == ["a", "b"]


def test_index_decides_which_files_count(tmp_path):
    (tmp_path / "part").mkdir()
    write_raw(tmp_path / "a.safetensors", {"w": ONE}, bytes(8))
    write_raw(tmp_path / "part" / "b.safetensors", {"v": ONE}, bytes(8))
    write_raw(tmp_path / "consolidated.safetensors", {"w": ONE}, bytes(8))
    write_index(tmp_path, {"w": "a.safetensors", "v": "part/b.safetensors"})
    with SafetensorsReader(tmp_path) as found:
        assert found["w"].file == tmp_path / "a.safetensors"
        assert found["v"].file == tmp_path / "part" / "b.safetensors"
        assert len(found) == 2


@pytest.mark.parametrize(
    "file",
    ["/etc/a.safetensors", "../a.safetensors", "x/../../a.safetensors", "..\\a.safetensors"]
    + ["C:\\a.safetensors", "", "a.bin", 3],
)
def test_index_stays_in_its_folder(tmp_path, file):
    write_index(tmp_path, {"w": file})
    with pytest.raises(ValueError, match=f"{INDEX} puts tensor w in"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_damaged_index(tmp_path, text):
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=INDEX):
        SafetensorsReader(tmp_path)


def test_missing_shard(tmp_path):
    write_index(tmp_path, {"v": "b.safetensors", "w": "b.safetensors"})
    with pytest.raises(FileNotFoundError, match=r"b\.safetensors is missing, with 2 tensors .* v;"):
        SafetensorsReader(tmp_path)


@pytest.mark.parametrize(
    "indexed, found",
    [("w", r"a\.safetensors holds tensor v"), ("wvu", r"a\.safetensors lacks tensor u")],
)
def test_index_and_file_disagree(tmp_path, indexed, found):
    write_raw(
        tmp_path / "a.safetensors", {"w": ONE, "v": ONE | {"data_offsets": [8, 16]}}, bytes(16)
    )
    write_index(tmp_path, dict.fromkeys(indexed, "a.safetensors"))
    with pytest.raises(ValueError, match=found):
        SafetensorsReader(tmp_path)


def test_tensor_in_a_file_beside_the_indexed_one(tmp_path):
    for name in ("a", "b"):
        write_raw(tmp_path / f"{name}.safetensors", {"w": ONE}, bytes(8))
    write_index(tmp_path, {"w": "a.safetensors", "v": "b.safetensors"})
    with pytest.raises(ValueError, match=r"b\.safetensors (lacks|holds) tensor [vw]"):
        SafetensorsReader(tmp_path)
