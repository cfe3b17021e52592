"""Continuations of many prompts up to a stop string, in batches of few shapes."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.progress import Advance
from dsv3_jax.serving.generator import Generator
from dsv3_jax.serving.sampling import GREEDY, Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """When a continuation ends."""

    max_new: int  # tokens
    until: tuple[str, ...] = ()  # texts that end it and don't belong to it
    stop_ids: tuple[int, ...] = ()


class Completion(NamedTuple):
    """What follows a prompt."""

    text: str  # without special tokens, up to the stop string
    ids: tuple[int, ...]  # all new tokens, those of the stop string too


def complete(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    ending: Ending,
    batch: int,
    sampling: Sampling = GREEDY,
    advance: Advance = lambda n: None,
) -> list[Completion]:
    """A continuation of every prompt.

    Args:
        batch: prompts that run at once; the last batch repeats one.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found: dict[int, Completion] = {}
    for first in range(0, len(order), batch):
        places = order[first : first + batch]
        rows = [prompts[i] for i in places]
        rows += [rows[-1]] * (batch - len(rows))
        steps = generator(rows, ending.max_new, sampling, ending.stop_ids, seed=first)
        new = _new_ids(steps, len(places), tokenizer, ending)
        for place, ids in zip(places, new, strict=True):
            found[place] = Completion(_text(tokenizer, ids, ending), tuple(ids))
        advance(len(places))
    return [found[i] for i in range(len(prompts))]


def _new_ids(steps, n_rows: int, tokenizer: Tokenizer, ending: Ending) -> list[list[int]]:
    """The new tokens of the first `n_rows` rows, until all of these have ended."""
    ids: list[list[int]] = [[] for _ in range(n_rows)]
    going = set(range(n_rows))
    for step in steps:
        for row in sorted(going):
            ids[row].append(int(step.tokens[row]))
            text = _decoded(tokenizer, ids[row])
            if step.done[row] or any(stop in text for stop in ending.until):
                going.discard(row)
        if not going:
            break
    return ids


def _text(tokenizer: Tokenizer, ids: list[int], ending: Ending) -> str:
    text = _decoded(tokenizer, ids[:-1] if ids[-1] in ending.stop_ids else ids)
    for stop in ending.until:
        text = text.partition(stop)[0]
    return text


def _decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.backend.decode(ids, skip_special_tokens=True)
