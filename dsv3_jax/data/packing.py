"""Documents laid end to end, read back as rows that overlap by the tokens to be predicted.

A row carries what the loss must know about each token. Rows of packed text are made here; other
sources (conversations, rollouts) make their own, and the rest of the way to the loss is the same.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Integer

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.progress import bar

TEXTS_PER_CALL = 64
Encode = Callable[[str, int], list[int]]


class Row(NamedTuple):
    """One row of a batch, or (stacked) several: T inputs, and the 1 + D tokens behind them.

    D is the MTP depth. `doc_start` is the position in the row where each token's document begins;
    without it, tokens attend to all tokens before them.
    """

    tokens: Int32[np.ndarray, "*b W"]
    loss_mask: Bool[np.ndarray, "*b W"]  # tokens that count as targets
    doc_start: Int32[np.ndarray, "*b W"] | None = None


def tokenize(
    texts: Sequence[str], tokenizer: Tokenizer, split: str, encode: Encode | None = None
) -> Integer[np.ndarray, " T"]:
    """Return the ids of all `texts` in a row, each followed by the end-of-document id.

    Ids are uint16 where the vocabulary allows it, else uint32.

    Args:
        split: "train" or "held-out", for the progress bar.
        encode: (text, number of the text) -> ids, in place of the tokenizer's own.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    encoded = []
    with bar(f"tokenizing {split} text", len(texts)) as advance:
        for start in range(0, len(texts), TEXTS_PER_CALL):
            batch = texts[start : start + TEXTS_PER_CALL]
            if encode is None:
                ids_of_texts = tokenizer.encode_batch(batch)
            else:
                ids_of_texts = [encode(text, start + i) for i, text in enumerate(batch)]
            encoded += [np.array([*ids, tokenizer.eos_id], dtype) for ids in ids_of_texts]
            advance(len(batch))
    return np.concatenate(encoded)


@dataclasses.dataclass(frozen=True)
class PackedRows:
    """Rows of `seq_len` inputs and the `extra` tokens after them that targets need.

    Row i starts at token `i * seq_len`, so consecutive rows share `extra` tokens and each token is
    an input once. All tokens are targets.

    Args:
        extra: 1 for the next token plus 1 per multi-token-prediction depth.
        end_id: the token behind every document, if documents must not see each other.

    Raises:
        ValueError: the text is shorter than a row.
    """

    tokens: Integer[np.ndarray, " T"]
    seq_len: int
    extra: int
    end_id: int | None = None

    def __post_init__(self):
        if len(self.tokens) < self.seq_len + self.extra:
            raise ValueError(
                f"the text has {len(self.tokens)} tokens, fewer than the train.seq_len="
                f"{self.seq_len} + {self.extra} of one row; give more text or a smaller "
                "train.seq_len (or, if it is held-out text, a larger data.held_out)"
            )

    def __len__(self) -> int:
        return (len(self.tokens) - self.extra) // self.seq_len

    def __getitem__(self, index: int) -> Row:
        start = range(len(self))[index] * self.seq_len
        tokens = self.tokens[start : start + self.seq_len + self.extra].astype(np.int32)
        doc_start = None if self.end_id is None else document_starts(tokens, self.end_id)
        return Row(tokens, np.ones(tokens.shape, bool), doc_start)


def document_starts(tokens: Integer[np.ndarray, "*b W"], end_id: int) -> Int32[np.ndarray, "*b W"]:
    """Return the position where each token's document begins: behind the last end before it."""
    starts = np.where(tokens == end_id, np.arange(1, tokens.shape[-1] + 1, dtype=np.int32), 0)
    before = np.concatenate([np.zeros_like(starts[..., :1]), starts[..., :-1]], axis=-1)
    return np.maximum.accumulate(before, axis=-1, dtype=np.int32)


def unigram_entropy(tokens: Integer[np.ndarray, " T"]) -> float:
    """Return the entropy of the frequencies of `tokens`, in nats per token."""
    counts = np.bincount(tokens)
    frequencies = counts[counts > 0] / len(tokens)
    return float(-(frequencies * np.log(frequencies)).sum())
