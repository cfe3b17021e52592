"""Example tensors, and what the safetensors package reads of a folder."""

import ml_dtypes
import numpy as np
import safetensors

from dsv3_jax.weights.safetensors import SafetensorsReader


def tensors():
    rng = np.random.default_rng(0)
    return {
        "embed": rng.normal(size=(6, 5)).astype(np.float32),
        "head": rng.normal(size=(7, 3)).astype(ml_dtypes.bfloat16),
        "expert": rng.normal(size=(4, 9)).astype(ml_dtypes.float8_e4m3fn),
        "norm": rng.normal(size=11).astype(ml_dtypes.bfloat16),
        "stack": rng.normal(size=(2, 3, 4)).astype(np.float32),
        "scalar": np.asarray(2.5, np.float32),
        "empty": np.zeros((0, 3), np.float32),
    }


def package_read(folder):
    """What the safetensors package itself finds: dtype, shape and bytes by name."""
    found = {}
    for file in folder.glob("*.safetensors"):
        for name, view in safetensors.deserialize(file.read_bytes()):
            found[name] = (view["dtype"], tuple(view["shape"]), bytes(view["data"]))
    return found


def count_bytes(monkeypatch) -> list[int]:
    """The sizes of what readers read from now on, one for each read."""
    sizes, read = [], SafetensorsReader.read

    def counting(self, name, rows=None, columns=None):
        values = read(self, name, rows, columns)
        sizes.append(values.nbytes)
        return values

    monkeypatch.setattr(SafetensorsReader, "read", counting)
    return sizes


def as_package(values):
    names = {"float32": "F32", "bfloat16": "BF16", "float8_e4m3fn": "F8_E4M3"}
    return {
        name: (names[value.dtype.name], value.shape, value.tobytes())
        for name, value in values.items()
    }


def assert_same(got, expected):
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert got.tobytes() == expected.tobytes()
