"""Two augmentations of training text (report sec. 4.1); held-out text has none.

Fill in the middle (FIM): some documents are cut at two positions and laid out as prefix, suffix,
middle, so that the model learns to write the text between two others. Whole documents are changed,
before they are packed.

Token boundary bias: a token that merges punctuation with line breaks makes a prompt that ends
before its line break look unlike any training text. So some of these tokens are split in two. The
tokenizer of DeepSeek-V3 has such tokens; the BPE trained here has none.
"""

import functools
import re

import numpy as np

from dsv3_jax.data.tokenizer import Tokenizer

MERGED_TOKEN = re.compile(r"([^\w\s\ufffd]+)(\n+)")  # whole tokens: punctuation, then line breaks


def encode_augmented(
    text: str, tokenizer: Tokenizer, number: int, fim_rate: float, split_rate: float
) -> list[int]:
    """Return the ids of a document without its end; the same for the same number and text.

    Args:
        number: of the document; it seeds all that is drawn.
        fim_rate: fraction of the documents whose middle moves to the end.
        split_rate: fraction of the merged tokens that are split.
    """
    rng = np.random.default_rng([number, len(text)])
    parts = [(None, text)]
    if rng.random() < fim_rate:
        first, second = sorted(rng.integers(0, len(text) + 1, 2))
        begin, hole, end = tokenizer.fim_ids
        parts = [(begin, text[:first]), (hole, text[second:]), (end, text[first:second])]
    ids: list[int] = []
    for mark, part in parts:
        ids += [] if mark is None else [mark]
        ids += tokenizer.encode(part)
    return split_merged_tokens(ids, tokenizer, split_rate, rng) if split_rate else ids


def split_merged_tokens(
    ids: list[int], tokenizer: Tokenizer, rate: float, rng: np.random.Generator
) -> list[int]:
    """Split a fraction `rate` of the tokens that merge punctuation and line breaks in two."""
    splits = merged_token_splits(tokenizer)
    result: list[int] = []
    for token in ids:
        split = splits.get(token)
        result += split if split is not None and rng.random() < rate else [token]
    return result


@functools.lru_cache(maxsize=8)
def merged_token_splits(tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Return, for every token that merges punctuation and line breaks, the ids of both parts."""
    splits = {}
    for token in range(tokenizer.vocab_size):
        if match := MERGED_TOKEN.fullmatch(tokenizer.decode([token])):
            splits[token] = [*tokenizer.encode(match[1]), *tokenizer.encode(match[2])]
    return splits
