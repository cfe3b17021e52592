"""Tokenizers: exact round trips, the end-of-document id, and what the errors say."""

import pickle
import random

import pytest
import tokenizers

from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

TEXT = ["the cat sat on the mat, and the dog sat on the cat\n" * 20, "naïve café\n" * 9]
ODD = [
    "",
    " leading and trailing \t\r\n\n",
    "\x00\x01\x7f\ufeff\u2028",
    "混合专家 🦜👩‍🔬 é",
    "def f(x):\n    return x**2",
    "".join(random.Random(0).choices([chr(i) for i in range(0x3000)], k=500)),
    bytes(range(256)).decode("latin-1"),
]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(iter(TEXT), 300)


@pytest.mark.parametrize("text", ODD)
def test_bpe_round_trip(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.encode_batch([text, "x"])[0] == ids
    assert all(0 < i < bpe.vocab_size for i in ids)


def test_bpe_training_is_repeatable_and_compresses(bpe):
    assert train_bpe(iter(TEXT), 300).fingerprint == bpe.fingerprint
    assert train_bpe(iter(TEXT), 270).fingerprint != bpe.fingerprint
    assert len(bpe.encode(TEXT[0])) < len(TEXT[0]) / 2
    assert bpe.vocab_size <= 300
    assert train_bpe(iter(TEXT), 270).vocab_size == 270
    assert bpe.eos_id == 0
    assert bpe.decode([0]) == "<|endoftext|>"


def test_bpe_of_little_text_has_fewer_ids():
    assert train_bpe(iter(["ab"]), 5000).vocab_size == 258


def test_bpe_without_room_for_bytes():
    with pytest.raises(ValueError, match="model.vocab_size=256 .* at least 257"):
        train_bpe(iter(TEXT), 256)


def test_saved_tokenizer_comes_back(bpe, tmp_path):
    bpe.backend.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(str(tmp_path / "tokenizer.json")).fingerprint == bpe.fingerprint
    assert pickle.loads(pickle.dumps(bpe)).encode("cat") == bpe.encode("cat")


def test_deepseek_tokenizer():
    tokenizer = load_tokenizer("deepseek")
    assert tokenizer.vocab_size == 128_815
    assert tokenizer.eos_id == 1
    assert tokenizer.decode([tokenizer.eos_id]) == "<｜end▁of▁sentence｜>"
    for text in ODD:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_missing_tokenizer_file(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="did you mean 'tokenizer.json'"):
        load_tokenizer(str(tmp_path / "tokeniser.json"))
    with pytest.raises(ValueError, match="is no tokenizer.json"):
        load_tokenizer(str(tmp_path / "tokenizer.json"))


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is no tokenizer.json .EOF"),
        (bytes(500), "is no tokenizer.json .expected value"),
        (b"[1]", "is no tokenizer.json"),
        (b'{"text": "other JSON"}', "is no tokenizer.json"),
        (b'{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a z"]}}', "out of vocabulary"),
        (b'{"model": {"type": "BPE", "vocab": {}, "merges": []}}', "has no tokens"),
    ],
)
def test_damaged_tokenizer_file(tmp_path, content, says):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"data.tokenizer='{path}': .*{says}"):
        load_tokenizer(str(path))


def test_cut_tokenizer_file(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    content = bpe.backend.to_str().encode()
    for length in range(1, len(content), len(content) // 50):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match="is no tokenizer.json"):
            load_tokenizer(str(path))


def test_folder_in_place_of_a_tokenizer(tmp_path):
    with pytest.raises(FileNotFoundError, match="is a folder; name a tokenizer.json in it"):
        load_tokenizer(str(tmp_path))


def test_settings_in_the_file_neither_cut_nor_fill(bpe, tmp_path):
    """A tokenizer.json keeps the truncation and padding that it was last used with."""
    backend = tokenizers.Tokenizer.from_str(bpe.backend.to_str())
    backend.enable_truncation(3)
    backend.enable_padding(length=7)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(str(tmp_path / "tokenizer.json"))
    assert loaded.encode_batch([TEXT[0], "x"]) == bpe.encode_batch([TEXT[0], "x"])


def test_tokenizer_without_an_end():
    bare = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    with pytest.raises(ValueError, match="no end-of-document token; add one of .*</s>"):
        _ = Tokenizer(bare).eos_id
