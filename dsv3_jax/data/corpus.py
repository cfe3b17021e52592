"""The rows of tokens of a `DataConfig`: split, tokenized and packed once, then cached."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from dsv3_jax.config import DataConfig
from dsv3_jax.data.augment import encode_augmented
from dsv3_jax.data.cache import build_once, cache_key, content_hash
from dsv3_jax.data.packing import PackedRows, tokenize, unigram_entropy
from dsv3_jax.data.text import read_documents, source_identity
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer, train_bpe
from dsv3_jax.progress import spinner

BPE_SAMPLE = 4_000_000  # characters
MAX_PASSAGE = 1 << 16  # characters
MIN_PASSAGES = 32

Splits = Callable[[], tuple[list[str], list[str]]]  # () -> passages of train, of held-out text


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Train and held-out text as rows, and what made them.

    `unigram_entropy` is in nats per token of the held-out text: the least cross-entropy of a model
    that knows how often each token occurs there, and nothing else. `fingerprint` changes with any
    token of either split and with the tokenizer, not with file times, machines or row lengths.
    """

    train: PackedRows
    held_out: PackedRows
    tokenizer: Tokenizer
    unigram_entropy: float
    n_train_tokens: int
    fingerprint: str


def load_corpus(data: DataConfig, *, vocab_size: int, seq_len: int, extra: int) -> Corpus:
    """Load the corpus that `data` names, in rows of `seq_len + extra` tokens.

    The first call tokenizes, with the text in memory; later ones read `data.cache_dir`, until the
    files, the tokenizer or the settings that decide the tokens change.

    Raises:
        FileNotFoundError: no such source or tokenizer.
        ValueError: too little text, or a tokenizer with more than `vocab_size` ids.
    """
    settings = (data.text_field, data.bad_lines)
    origin = [source_identity(data.source), *settings, data.held_out]

    @functools.cache
    def splits() -> tuple[list[str], list[str]]:
        return split_held_out(read_documents(data.source, *settings), data.held_out)

    if data.tokenizer == "bpe":
        tokenizer = _load_trained_bpe(data, vocab_size, origin, splits)
    else:
        tokenizer = load_tokenizer(data.tokenizer)
    _check_tokenizer(tokenizer, data, vocab_size)
    folder = _tokenize_once(data, tokenizer, origin, splits)
    train, held_out = (
        np.load(folder / f"{split}.npy", mmap_mode="r") for split in ("train", "held_out")
    )
    end_id = tokenizer.eos_id if data.mask_documents else None
    return Corpus(
        train=PackedRows(train, seq_len, extra, end_id),
        held_out=PackedRows(held_out, seq_len, extra, end_id),
        tokenizer=tokenizer,
        unigram_entropy=unigram_entropy(held_out),
        n_train_tokens=len(train),
        fingerprint=f"{content_hash(folder)[:32]}-{tokenizer.fingerprint[:32]}",
    )


def split_held_out(
    documents: Iterable[tuple[str, str]], fraction: float
) -> tuple[list[str], list[str]]:
    """Split the text of (name, text) documents into train and held-out passages, both in order.

    Documents are cut at line ends into passages of at most 65,536 characters and at most 1/32 of
    the text, so that a single file has both splits as well. Held out are the passages whose names
    have the lowest hashes, until they make up `fraction` of the characters: the same passages on
    every machine.

    Raises:
        ValueError: no text is left to train on.
    """
    documents = list(documents)
    total = sum(len(text) for _, text in documents)
    size = min(MAX_PASSAGE, -(-total // MIN_PASSAGES))
    passages = {
        f"{name}#{number}": passage
        for name, text in documents
        for number, passage in enumerate(cut_at_lines(text, size))
    }
    held_out, n_held_out = set(), 0
    for name in sorted(passages, key=_hash):
        if n_held_out >= fraction * total:
            break
        held_out.add(name)
        n_held_out += len(passages[name])
    if len(held_out) == len(passages):
        raise ValueError(
            f"data.held_out={fraction} holds out all {len(passages)} passages of the text ({total} "
            "characters) and leaves none to train on; give more text or a smaller data.held_out"
        )
    train = [text for name, text in passages.items() if name not in held_out]
    return train, [text for name, text in passages.items() if name in held_out]


def cut_at_lines(text: str, size: int) -> Iterator[str]:
    """Cut `text` into passages of at most `size` characters, all but the last at a line's end."""
    start = 0
    while start < len(text):
        stop = start + size
        if stop < len(text):
            stop = text.rfind("\n", start, stop) + 1 or stop
        yield text[start:stop]
        start = stop


def _hash(name: str) -> bytes:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()


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


def _load_trained_bpe(data: DataConfig, vocab_size: int, origin: list, splits: Splits) -> Tokenizer:
    """Load the BPE of an even sample of the train text, which is trained once."""

    def build(folder: Path) -> None:
        texts = splits()[0]
        stride = -(-sum(map(len, texts)) // BPE_SAMPLE)
        with spinner(f"training a BPE of {vocab_size} tokens"):
            tokenizer = train_bpe(texts[::stride], vocab_size, fim=data.fim_rate > 0)
        tokenizer.backend.save(str(folder / "tokenizer.json"))

    marks = ["fim"] if data.fim_rate else []
    name = f"bpe-{cache_key(origin, vocab_size, *marks)}"
    folder = build_once(Path(data.cache_dir, name), build)
    return load_tokenizer(str(folder / "tokenizer.json"))


def _tokenize_once(data: DataConfig, tokenizer: Tokenizer, origin: list, splits: Splits) -> Path:
    """Return the folder of the flat tokens of both splits; only train text is augmented."""
    rates = {"fim_rate": data.fim_rate, "split_rate": data.split_rate}
    augmentations = [rates] if any(rates.values()) else []

    def encode(text: str, number: int) -> list[int]:
        return encode_augmented(text, tokenizer, number, data.fim_rate, data.split_rate)

    def build(folder: Path) -> None:
        train, held_out = splits()
        tokens = tokenize(train, tokenizer, "train", encode if augmentations else None)
        np.save(folder / "train.npy", tokens)
        np.save(folder / "held_out.npy", tokenize(held_out, tokenizer, "held-out"))

    name = f"tokens-{cache_key(origin, tokenizer.fingerprint, *augmentations)}"
    return build_once(Path(data.cache_dir, name), build)
