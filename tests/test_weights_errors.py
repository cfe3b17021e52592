"""Bad checkpoints: each is refused with its file and tensor, and no export of it is left."""

import os
import pickle

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from reference.official_weights import FIELDS, random_tensors, raw, write

from dsv3_jax import load_pretrained
from dsv3_jax.weights.pretrained import load_model
from dsv3_jax.weights.safetensors import SafetensorsReader
from dsv3_jax.weights.save import export_weights, write_official
from dsv3_jax.weights.sources import open_weights

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX, CONFIG = "model.safetensors.index.json", "config.json"
FIELDS = FIELDS | {"num_hidden_layers": 1, "first_k_dense_replace": 0}
FIELDS |= {"num_nextn_predict_layers": 0}
NORM = "model.layers.0.input_layernorm.weight"
OUT = "model.layers.0.self_attn.o_proj.weight"
DOWN = "model.layers.0.mlp.experts.2.down_proj.weight"
SCALE = DOWN + "_scale_inv"
TENSORS = random_tensors(FIELDS, "F8_E4M3")


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "bad", FIELDS, TENSORS, 2)


def with_tensors(changes: dict):
    """Damage: the folder is written anew with other tensors; None leaves one out."""

    def damage(folder):
        tensors = {name: x for name, x in (TENSORS | changes).items() if x is not None}
        write(folder, FIELDS, tensors, 2)

    return damage


def with_scale(number: float):
    scale = TENSORS[SCALE].copy()
    scale[1, 0] = number
    return with_tensors({SCALE: scale})


def with_text(file: str, old: str, new: str):
    """Damage: words of a file change."""

    def damage(folder):
        data = (folder / file).read_bytes()
        assert old.encode() in data
        (folder / file).write_bytes(data.replace(old.encode(), new.encode()))

    return damage


def with_length(length: int):
    """Damage: the first file claims a header of so many bytes."""

    def damage(folder):
        with open(folder / ONE, "r+b") as file:
            file.write(length.to_bytes(8, "little"))

    return damage


def with_size(change: int):
    """Damage: the first file is cut to a size, or by one."""

    def damage(folder):
        size = change if change > 0 else (folder / ONE).stat().st_size + change
        os.truncate(folder / ONE, size)

    return damage


def repeat_in_a_file(folder):
    first, second, *_ = (
        n for n, x in SafetensorsReader(folder).items() if x.file.name == ONE and "ex" in n
    )
    assert len(first) == len(second)
    with_text(ONE, first, second)(folder)


def repeat_in_another_file(folder):
    (folder / INDEX).unlink()  # which would say what file counts
    safetensors.numpy.save_file({NORM: TENSORS[NORM]}, folder / "more.safetensors")


def only_pickles(folder):
    for name in (ONE, TWO, INDEX):
        (folder / name).unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps({NORM: 1}))


NARROW = TENSORS[NORM].astype(ml_dtypes.float8_e4m3fn)
A_FILE = r"model-0000\d-of-00002.safetensors"
BAD = {
    "missing shard": (lambda f: (f / TWO).unlink(), rf"{TWO} is missing, with \d+ tensors such as"),
    "pickles": (only_pickles, "pytorch_model.bin is a pickle file: these are not read"),
    "no header": (with_size(4), f"{ONE} has 4 bytes"),
    "cut header": (with_size(300), f"{ONE} claims a header of .* the file has 300"),
    "cut data": (with_size(-5), f"{ONE} is truncated by 5 bytes"),
    "oversize header": (with_length(2**62), f"{ONE} claims a header of {2**62} bytes"),
    "undersize header": (with_length(40), f"{ONE} holds no valid JSON object"),
    "index elsewhere": (
        with_text(INDEX, f'"{NORM}": "', f'"{NORM}": "../'),
        rf"{INDEX} puts tensor {NORM} in '\.\./{A_FILE}', no safetensors file beside it",
    ),
    "index absolute": (
        with_text(INDEX, f'"{NORM}": "', f'"{NORM}": "/etc/'),
        f"{INDEX} puts tensor {NORM} in '/etc/{A_FILE}'",
    ),
    "index differs": (
        with_text(INDEX, NORM, NORM[:-1]),
        f"{A_FILE} (lacks|holds) tensor {NORM[:-1]}.*and {INDEX} says otherwise",
    ),
    "index no JSON": (with_text(INDEX, "{", "["), f"{INDEX} holds no valid JSON"),
    "name twice": (repeat_in_a_file, rf"{ONE} .*model.layers.0.mlp.experts.*stands there twice"),
    "tensor twice": (repeat_in_another_file, f"tensor {NORM} is in both .*{A_FILE}.*more.safet"),
    "missing tensor": (
        with_tensors({DOWN: None, SCALE: None}),
        rf"bad: tensor {DOWN} is missing \(1 of 29 are\)",
    ),
    "unknown tensor": (
        with_tensors({NORM + "s": TENSORS[NORM]}),
        rf"{A_FILE}: tensor {NORM}s is none of the model's .*; did you mean {NORM}\?",
    ),
    "expert too many": (
        with_tensors({DOWN.replace("2", "4"): TENSORS[DOWN].astype(np.float32)}),
        rf"{A_FILE}: tensor {DOWN.replace('2', '4')} is none of the model's",
    ),
    "layer too many": (
        with_tensors({NORM.replace("0", "1"): TENSORS[NORM]}),
        rf"{A_FILE}: tensor {NORM.replace('0', '1')} is none of the model's",
    ),
    "other length": (
        with_tensors({NORM: TENSORS[NORM][:-1]}),
        rf"{A_FILE}: tensor {NORM} has shape \(135,\), config.json asks for \(136,\)",
    ),
    "turned": (
        with_tensors({OUT: TENSORS[OUT].T.copy()}),
        rf"{A_FILE}: tensor {OUT} has shape \(42, 136\), config.json asks for \(136, 42\)",
    ),
    "other dtype": (
        with_tensors({NORM: TENSORS[NORM].astype(np.float16)}),
        f"{A_FILE} holds tensor {NORM} as F16, and only F32, BF16, F8_E4M3 can be read",
    ),
    "FP8 vector": (
        with_tensors({NORM: NARROW}),
        rf"{A_FILE}: tensor {NORM} of shape \(136,\) is FP8, which only matrices can be",
    ),
    "FP8 vector with scales": (
        with_tensors({NORM + "_scale_inv": np.ones(2, np.float32), NORM: NARROW}),
        rf"{A_FILE}: tensor {NORM}(_scale_inv)? (is none of the model's|of shape \(136,\) is FP8)",
    ),
    "no scales": (
        with_tensors({SCALE: None}),
        f"{A_FILE}: tensor {DOWN} is FP8, but its scales {SCALE} are missing",
    ),
    "scales of wide numbers": (
        with_tensors({DOWN: TENSORS[DOWN].astype(np.float32)}),
        f"{A_FILE}: tensor {SCALE} is none of the model's",
    ),
    "other blocks": (
        with_tensors({SCALE: TENSORS[SCALE].reshape(1, 2)}),
        rf"{A_FILE}: tensor {SCALE} is F32 \(1, 2\), expected F32 \(2, 1\): a scale for every "
        r"128x128 block of \(136, 44\)",
    ),
    "narrow scales": (
        with_tensors({SCALE: TENSORS[SCALE].astype(ml_dtypes.bfloat16)}),
        rf"{A_FILE}: tensor {SCALE} is BF16 \(2, 1\), expected F32 \(2, 1\)",
    ),
    "NaN scale": (with_scale(np.nan), f"{A_FILE}: tensor {SCALE} holds the scale nan"),
    "infinite scale": (with_scale(np.inf), f"{A_FILE}: tensor {SCALE} holds the scale inf"),
    "negative scale": (with_scale(-0.5), f"{A_FILE}: tensor {SCALE} holds the scale -0.5"),
    "config no JSON": (with_text(CONFIG, "{", ""), f"{CONFIG}"),
    "config a number": (lambda f: (f / CONFIG).write_text("3"), f"{CONFIG}.* must be a JSON obj"),
    "config incomplete": (
        with_text(CONFIG, '"kv_lora_rank": 132, ', ""),
        f"{CONFIG}: kv_lora_rank is missing",
    ),
    "config of another kind": (
        with_text(CONFIG, "{", '{"sliding_window": 5, '),
        f"{CONFIG}: field sliding_window=5 is not understood",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_checkpoints(folder, bad):
    damage, message = BAD[bad]
    damage(folder)
    for read in (load_pretrained, lambda folder: export_weights(folder, folder.parent / "new")):
        with pytest.raises((ValueError, KeyError, FileNotFoundError), match=message):
            read(folder)
    assert list(folder.parent.iterdir()) == [folder]


def test_the_sound_one_is_read(folder):
    """So that what is refused above is refused for its damage."""
    assert load_pretrained(folder).config.n_layers == 1
    assert len(raw(folder)) == len(TENSORS)


def test_a_file_that_shrinks_while_it_is_read(folder):
    source = open_weights(folder)
    os.truncate(source.tensors[NORM].file, source.tensors[NORM].start + 10)
    with pytest.raises(ValueError, match=rf"{A_FILE} ends at byte \d+: it shrank"):
        load_model(source, "float32", None)


def test_a_scale_that_turns_bad_ends_an_export(folder):
    """Found after the folder was opened: nothing is left of the export."""
    source = open_weights(folder)
    entry = source.tensors[SCALE]
    with open(entry.file, "r+b") as file:
        file.seek(entry.start)
        file.write(np.full(2, np.nan, np.float32).tobytes())
    with pytest.raises(ValueError, match=f"{A_FILE}: tensor {SCALE} holds the scale nan"):
        write_official(source, folder.parent / "new", "bfloat16")
    assert list(folder.parent.iterdir()) == [folder]


def test_nothing_is_unpickled(folder, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("a pickle was read")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    load_pretrained(folder)
