"""From text to packed rows: what the tokens say, the cache, and what the errors say."""

import dataclasses
import math
import os
import pickle
import random
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tokenizers

from dsv3_jax.config import DataConfig
from dsv3_jax.data.cache import MANIFEST, build_once
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.data.packing import PackedRows, unigram_entropy
from dsv3_jax.data.tokenizer import load_tokenizer


@pytest.fixture
def data(tmp_path):
    """Forty documents of random words, about 30,000 characters."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(1, 7))) for _ in range(300)]
    (tmp_path / "text").mkdir()
    for i in range(40):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i}: " + " ".join(rng.choices(words, k=150)))
    cache = str(tmp_path / "cache")
    return DataConfig(source=str(tmp_path / "text"), held_out=0.1, cache_dir=cache)


def small(data, **changes):
    return load_corpus(data, **({"vocab_size": 400, "seq_len": 16, "extra": 2} | changes))


def test_tokens_are_the_documents_each_with_its_end(data):
    corpus = small(data)
    found = []
    for side in (corpus.train, corpus.held_out):
        text = corpus.tokenizer.decode(side.tokens.tolist())
        assert text.endswith("<|endoftext|>")
        found += text.split("<|endoftext|>")[:-1]
    names = [f"{i}.txt" for i in range(40)]
    written = [open(os.path.join(data.source, name)).read() for name in names]
    assert sorted(found) == sorted(written)
    assert corpus.n_train_tokens == len(corpus.train.tokens)
    assert corpus.train.tokens.dtype == np.uint16
    assert corpus.unigram_entropy == unigram_entropy(corpus.held_out.tokens)
    assert 0 < corpus.unigram_entropy < math.log(400)


def test_second_load_reads_the_cache(data, monkeypatch):
    first = small(data)
    monkeypatch.setattr("dsv3_jax.data.corpus.read_documents", None)
    again = small(data)
    np.testing.assert_array_equal(first.train.tokens, again.train.tokens)
    assert first.tokenizer.fingerprint == again.tokenizer.fingerprint


def test_changed_text_is_read_anew(data):
    before = small(data).n_train_tokens
    for i in range(40):
        with open(os.path.join(data.source, f"{i}.txt"), "a") as file:
            file.write(" and more")
    assert small(data).n_train_tokens > before


def flip(path, bit: int):
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


FILES = [
    "tokens-*/train.npy",
    "tokens-*/held_out.npy",
    "bpe-*/tokenizer.json",
    f"tokens-*/{MANIFEST}",
]


@pytest.mark.parametrize(
    ("name", "harm"),
    [(FILES[0], "truncate"), (FILES[1], "flip"), (FILES[2], "remove"), (FILES[3], "remove")],
)
def test_damaged_cache_is_built_again(data, tmp_path, capsys, name, harm):
    first = small(data)
    tokens = np.array(first.train.tokens)
    (path,) = (tmp_path / "cache").glob(name)
    if harm == "truncate":
        path.write_bytes(path.read_bytes()[:-5])
    elif harm == "remove":
        path.unlink()
    else:
        flip(path, 8 * path.stat().st_size - 20)
    capsys.readouterr()
    again = small(data)
    np.testing.assert_array_equal(again.train.tokens, tokens)
    assert again.fingerprint == first.fingerprint
    assert f"{path.parent} is damaged; building it again" in capsys.readouterr().out


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_found(data, tmp_path, capsys, name):
    """50 of each file: the folder is built again, here from a copy, and is what it was."""
    small(data)
    (path,) = (tmp_path / "cache").glob(name)
    spare = shutil.copytree(path.parent, tmp_path / "spare")
    (spare / MANIFEST).unlink()
    whole = path.read_bytes()
    capsys.readouterr()
    for bit in random.Random(0).sample(range(8 * len(whole)), 50):
        flip(path, bit)
        build_once(path.parent, lambda fresh: shutil.copytree(spare, fresh, dirs_exist_ok=True))
        assert path.read_bytes() == whole
    assert capsys.readouterr().out.count("is damaged; building it again") == 50


def test_clock_jumps_cost_one_build_and_change_nothing(data, monkeypatch):
    """A file's time far ahead, then far back: the text is read again, once each."""
    first, path = small(data), Path(data.source, "0.txt")
    for time in (2**33, 5):
        os.utime(path, (time, time))
        assert small(data).fingerprint == first.fingerprint
        with monkeypatch.context() as without:
            without.setattr("dsv3_jax.data.corpus.read_documents", None)
            assert small(data).fingerprint == first.fingerprint


def test_fingerprint_tells_texts_and_tokenizers_apart(data, tmp_path):
    corpora = [small(data), small(data, vocab_size=390)]
    corpora.append(small(dataclasses.replace(data, held_out=0.2)))
    corpora.append(small(dataclasses.replace(data, fim_rate=0.5)))
    path = Path(data.source, "0.txt")
    text, stat = path.read_text(), path.stat()
    path.write_text(text.replace("a", "b", 1))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    corpora.append(small(data))
    assert len({corpus.fingerprint for corpus in corpora}) == 5
    path.write_text(text)
    elsewhere = dataclasses.replace(data, cache_dir=str(tmp_path / "elsewhere"))
    assert small(elsewhere, seq_len=32).fingerprint == corpora[0].fingerprint


def test_bad_lines_are_refused_though_a_cache_without_them_is_there(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "some text of a document"}\n' * 50 + "{}\n")
    data = DataConfig(source=str(path), held_out=0.3, cache_dir=str(tmp_path / "cache"))
    assert small(dataclasses.replace(data, bad_lines="skip"), seq_len=4).n_train_tokens > 50
    with pytest.raises(ValueError, match="line 51: no field"):
        small(data, seq_len=4)
    with pytest.raises(ValueError, match="data.bad_lines='skp'"):
        dataclasses.replace(data, bad_lines="skp")


def test_tokenizer_without_an_end_is_refused_before_text_is_read(data, tmp_path, monkeypatch):
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    backend.save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr("dsv3_jax.data.corpus.read_documents", None)
    with pytest.raises(ValueError, match="no end-of-document token"):
        small(dataclasses.replace(data, tokenizer=str(tmp_path / "tokenizer.json")))


def test_failed_build_leaves_nothing(tmp_path):
    def half(folder):
        (folder / "a").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_once(tmp_path / "key", half)
    assert list(tmp_path.iterdir()) == []


def test_two_builders_of_one_folder(tmp_path):
    def slow(folder):
        build_once(tmp_path / "key", lambda other: (other / "a").write_text("same"))
        (folder / "a").write_text("same")

    assert (build_once(tmp_path / "key", slow) / "a").read_text() == "same"


def test_tokenizer_with_more_ids_than_the_model(data, tmp_path):
    small(data).tokenizer.backend.save(str(tmp_path / "tokenizer.json"))
    path = str(tmp_path / "tokenizer.json")
    named = DataConfig(source=data.source, tokenizer=path, cache_dir=data.cache_dir)
    assert small(named).tokenizer.fingerprint == load_tokenizer(path).fingerprint
    with pytest.raises(ValueError, match="400 ids, more than model.vocab_size=399"):
        small(named, vocab_size=399)


def test_large_vocabularies_are_stored_as_uint32(data):
    wide = DataConfig(source=data.source, tokenizer="deepseek", cache_dir=data.cache_dir)
    corpus = small(wide, vocab_size=129_280)
    assert corpus.train.tokens.dtype == np.uint32
    assert corpus.train.tokens[-1] == corpus.tokenizer.eos_id


def test_rows_overlap_by_extra_and_cover_every_input_once():
    rows = PackedRows(np.arange(50, dtype=np.uint16), seq_len=8, extra=3)
    assert len(rows) == 5
    assert [row.tokens.dtype for row in rows] == [np.int32] * 5
    np.testing.assert_array_equal(np.concatenate([row.tokens[:8] for row in rows]), np.arange(40))
    np.testing.assert_array_equal(rows[4].tokens, np.arange(32, 43))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(rows))[1].tokens, rows[1].tokens)
    with pytest.raises(IndexError):
        rows[5]
    assert len(PackedRows(np.arange(43), seq_len=8, extra=3)) == 5
    assert len(PackedRows(np.arange(42), seq_len=8, extra=3)) == 4


def test_rows_of_text_have_targets_everywhere_and_documents_where_they_are_masked():
    tokens = np.array([5, 0, 6, 7, 0, 8, 9, 6, 5], np.uint16)
    plain, masked = (PackedRows(tokens, 4, 2, end_id)[0] for end_id in (None, 0))
    for row in (plain, masked):
        assert row.loss_mask.dtype == bool and row.loss_mask.shape == (6,) and row.loss_mask.all()
    assert plain.doc_start is None
    np.testing.assert_array_equal(masked.doc_start, [0, 0, 2, 2, 2, 5])
    np.testing.assert_array_equal(PackedRows(tokens, 4, 2, 0)[0].tokens, tokens[:6])


def test_text_shorter_than_a_row(data):
    with pytest.raises(ValueError, match="10 tokens, fewer than the train.seq_len=8 . 3"):
        PackedRows(np.arange(10), seq_len=8, extra=3)
    with pytest.raises(ValueError, match="a larger data.held_out"):
        small(data, seq_len=100_000)


def test_unigram_entropy_matches_a_count_by_hand():
    tokens = np.random.default_rng(0).geometric(0.1, 1000).astype(np.uint16)
    shares = [count / 1000 for count in Counter(tokens.tolist()).values()]
    assert unigram_entropy(tokens) == pytest.approx(-sum(p * math.log(p) for p in shares))
    assert unigram_entropy(np.arange(64)) == pytest.approx(math.log(64))
