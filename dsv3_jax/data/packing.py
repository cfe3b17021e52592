"""Documents laid end to end, read back as rows that overlap by the tokens to be predicted.

A row carries what the loss must know about each token. Rows of packed text are made here; other
sources (conversations, rollouts) make their own, and the rest of the way to the loss is the same.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int32, Integer
from rich.console import Console
from rich.progress import track

from dsv3_jax.data.tokenizer import Tokenizer

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
    texts: Sequence[str], tokenizer: Tokenizer, side: str, encode: Encode | None = None
) -> Integer[np.ndarray, " T"]:
    """The ids of all `texts` in a row, each followed by the end-of-document id.

    `side` names the progress bar. Ids
    are uint16 where the vocabulary allows it, else uint32.

    Args:
        encode: (text, number of the text) -> ids, in place of the tokenizer's own.
    """
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32
    calls = range(0, len(texts), TEXTS_PER_CALL)
    starts = track(
        calls, f"tokenizing {side} text", transient=True, disable=not Console().is_terminal
    )

    def ids_of(start: int) -> list[list[int]]:
        some = texts[start : start + TEXTS_PER_CALL]
        if encode is None:
            return tokenizer.encode_batch(some)
        return [encode(text, start + number) for number, text in enumerate(some)]

    flat = [np.array([*ids, tokenizer.eos_id], dtype) for start in starts for ids in ids_of(start)]
    return np.concatenate(flat)


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
    """Entropy of the frequencies of `tokens`, in nats a token."""
    counts = np.bincount(tokens)
    shares = counts[counts > 0] / len(tokens)
    return float(-(shares * np.log(shares)).sum())
