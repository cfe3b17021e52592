"""Continuations of many prompts up to a stop rule, in batches of few shapes."""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

from dsv3_jax.data.tokenizer import Tokenizer
from dsv3_jax.progress import Advance
from dsv3_jax.serving.generator import Generator
from dsv3_jax.serving.sampling import GREEDY, Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class StopRule:
    """The conditions of which the first one ends a continuation."""

    max_new: int  # tokens
    until: tuple[str, ...] = ()  # texts that end it and are no part of it
    stop_ids: tuple[int, ...] = ()


class Completion(NamedTuple):
    """The continuation of a prompt."""

    text: str  # without special tokens, up to the stop string
    ids: tuple[int, ...]  # all new tokens, those of the stop string too


def generate_completions(
    generator: Generator,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    stop_rule: StopRule,
    batch: int,
    sampling: Sampling = GREEDY,
    advance: Advance = lambda n: None,
) -> list[Completion]:
    """Return a continuation of every prompt.

    Args:
        batch: prompts that run at once; the last batch repeats one.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    found: dict[int, Completion] = {}
    for first in range(0, len(order), batch):
        indices = order[first : first + batch]
        rows = [prompts[i] for i in indices]
        rows += [rows[-1]] * (batch - len(rows))
        steps = generator(rows, stop_rule.max_new, sampling, stop_rule.stop_ids, seed=first)
        new = _new_ids(steps, len(indices), tokenizer, stop_rule)
        for index, ids in zip(indices, new, strict=True):
            found[index] = Completion(_text(tokenizer, ids, stop_rule), tuple(ids))
        advance(len(indices))
    return [found[i] for i in range(len(prompts))]


def _new_ids(steps, n_rows: int, tokenizer: Tokenizer, stop_rule: StopRule) -> list[list[int]]:
    """Collect the new tokens of the first `n_rows` rows, until all of these have ended."""
    ids: list[list[int]] = [[] for _ in range(n_rows)]
    running = set(range(n_rows))
    for step in steps:
        for row in sorted(running):
            ids[row].append(int(step.tokens[row]))
            text = _decoded(tokenizer, ids[row])
            if step.done[row] or any(stop in text for stop in stop_rule.until):
                running.discard(row)
        if not running:
            break
    return ids


def _text(tokenizer: Tokenizer, ids: list[int], stop_rule: StopRule) -> str:
    text = _decoded(tokenizer, ids[:-1] if ids[-1] in stop_rule.stop_ids else ids)
    for stop in stop_rule.until:
        text = text.partition(stop)[0]
    return text


def _decoded(tokenizer: Tokenizer, ids: list[int]) -> str:
    return tokenizer.backend.decode(ids, skip_special_tokens=True)
