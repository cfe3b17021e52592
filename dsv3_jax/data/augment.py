"""What training does to its text and evaluation does not: two augmentations of the report.

Fill in the middle (sec. 4.1): a share of the documents is cut at two places and laid out as prefix,
suffix, middle, so that the model learns to write what stands between two pieces. It happens to
whole documents, before they are packed.

Splitting (sec. 4.1): tokens that merge punctuation with line breaks make a prompt that ends before
its line break look unlike any training text. A share of them is split in two. The tokenizer of
DeepSeek-V3 has such tokens; the BPE trained here has none.
"""

import functools
import re

import numpy as np

from dsv3_jax.data.tokenizer import Tokenizer

MERGED = re.compile(r"([^\w\s\ufffd]+)(\n+)")  # whole tokens: punctuation, then line breaks


def augmented(
    text: str, tokenizer: Tokenizer, number: int, fim_rate: float, split_rate: float
) -> list[int]:
    """The ids of a document, without its end; the same for the same number and text.

    Args:
        number: of the document, which seeds all that is drawn.
        fim_rate: share of documents whose middle moves to the end.
        split_rate: share of merged tokens that are split.
    """
    rng = np.random.default_rng([number, len(text)])
    pieces = [(None, text)]
    if rng.random() < fim_rate:
        first, second = sorted(rng.integers(0, len(text) + 1, 2))
        begin, hole, end = tokenizer.fim_ids
        pieces = [(begin, text[:first]), (hole, text[second:]), (end, text[first:second])]
    ids: list[int] = []
    for mark, piece in pieces:
        ids += [] if mark is None else [mark]
        ids += tokenizer.encode(piece)
    return split_merged(ids, tokenizer, split_rate, rng) if split_rate else ids


def split_merged(
    ids: list[int], tokenizer: Tokenizer, rate: float, rng: np.random.Generator
) -> list[int]:
    """A share of the tokens that end in line breaks after punctuation, as two tokens each."""
    table = merged_tokens(tokenizer)
    found: list[int] = []
    for token in ids:
        split = table.get(token)
        found += split if split is not None and rng.random() < rate else [token]
    return found


@functools.lru_cache(maxsize=8)
def merged_tokens(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """The two parts, in ids, of every token that merges punctuation and line breaks."""
    found = {}
    for token in range(tokenizer.vocab_size):
        if match := MERGED.fullmatch(tokenizer.decode([token])):
            found[token] = [*tokenizer.encode(match[1]), *tokenizer.encode(match[2])]
    return found
