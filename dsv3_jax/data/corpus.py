"""From a `DataConfig` to rows of tokens: split, tokenize and pack once, then read the cache."""

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console

from dsv3_jax.config import DataConfig
from dsv3_jax.data.augment import augmented
from dsv3_jax.data.cache import cached, fingerprint, key
from dsv3_jax.data.packing import PackedRows, tokenize, unigram_entropy
from dsv3_jax.data.split import split
from dsv3_jax.data.text import documents, identity
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe

BPE_SAMPLE = 4_000_000  # characters

Sides = Callable[[], tuple[list[str], list[str]]]


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Both sides of the text as rows, and what made them.

    `unigram_entropy` is in nats a token of the held-out text: the least cross-entropy of a model
    that knows how often each token occurs there, and nothing else. `fingerprint` changes with any
    token of either side and with the tokenizer, not with file times, machines or row lengths.
    """

    train: PackedRows
    held_out: PackedRows
    tokenizer: Tokenizer
    unigram_entropy: float
    n_train_tokens: int
    fingerprint: str


def load(data: DataConfig, *, vocab_size: int, seq_len: int, extra: int) -> Corpus:
    """The corpus that `data` names, in rows of `seq_len + extra` tokens.

    The first call tokenizes, with the text in memory; later ones read `data.cache_dir`, until the
    files, the tokenizer or the settings that decide the tokens change.

    Raises:
        FileNotFoundError: no such source or tokenizer.
        ValueError: too little text, or a tokenizer with more than `vocab_size` ids.
    """
    settings = (data.text_field, data.bad_lines)
    origin = [identity(data.source), *settings, data.held_out]
    sides = functools.cache(lambda: split(documents(data.source, *settings), data.held_out))
    if data.tokenizer == "bpe":
        tokenizer = _trained_tokenizer(data, vocab_size, origin, sides)
    else:
        tokenizer = load_tokenizer(data.tokenizer)
    _check_tokenizer(tokenizer, data, vocab_size)
    folder = _tokens(data, tokenizer, origin, sides)
    train, held_out = (
        np.load(folder / f"{side}.npy", mmap_mode="r") for side in ("train", "held_out")
    )
    end_id = tokenizer.eos_id if data.mask_documents else None
    return Corpus(
        train=PackedRows(train, seq_len, extra, end_id),
        held_out=PackedRows(held_out, seq_len, extra, end_id),
        tokenizer=tokenizer,
        unigram_entropy=unigram_entropy(held_out),
        n_train_tokens=len(train),
        fingerprint=f"{fingerprint(folder)[:32]}-{tokenizer.fingerprint[:32]}",
    )


def _check_tokenizer(tokenizer: Tokenizer, data: DataConfig, vocab_size: int):
    """Raise, before anything is read, if the model or the text needs another tokenizer."""
    if tokenizer.vocab_size > vocab_size:
        raise ValueError(
            f"data.tokenizer={data.tokenizer!r} has {tokenizer.vocab_size} ids, more than "
            f"model.vocab_size={vocab_size}; set model.vocab_size to at least "
            f"{tokenizer.vocab_size}, or data.tokenizer='bpe' to train one that fits"
        )
    _ = tokenizer.eos_id
    if data.fim_rate:
        _ = tokenizer.fim_ids


def _trained_tokenizer(data: DataConfig, vocab_size: int, origin: list, sides: Sides) -> Tokenizer:
    """A BPE of an even sample of the train text."""

    def build(folder: Path) -> None:
        texts = sides()[0]
        stride = -(-sum(map(len, texts)) // BPE_SAMPLE)
        with Console().status(f"training a BPE of {vocab_size} tokens"):
            tokenizer = train_bpe(texts[::stride], vocab_size, fim=data.fim_rate > 0)
        tokenizer.backend.save(str(folder / "tokenizer.json"))

    marks = ["fim"] if data.fim_rate else []
    folder = cached(Path(data.cache_dir, f"bpe-{key(origin, vocab_size, *marks)}"), build)
    return load_tokenizer(str(folder / "tokenizer.json"))


def _tokens(data: DataConfig, tokenizer: Tokenizer, origin: list, sides: Sides) -> Path:
    """The folder of the flat tokens of both sides; only train text is augmented."""
    rates = {"fim_rate": data.fim_rate, "split_rate": data.split_rate}
    changes = [rates] if any(rates.values()) else []

    def change(text: str, number: int) -> list[int]:
        return augmented(text, tokenizer, number, **rates)

    def build(folder: Path) -> None:
        train, held_out = sides()
        encode = change if changes else None
        np.save(folder / "train.npy", tokenize(train, tokenizer, "train", encode))
        np.save(folder / "held_out.npy", tokenize(held_out, tokenizer, "held_out"))

    name = f"tokens-{key(origin, tokenizer.fingerprint, *changes)}"
    return cached(Path(data.cache_dir, name), build)
