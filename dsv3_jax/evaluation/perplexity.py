"""Perplexity of held-out text, per token and per byte.

Bytes can be compared between tokenizers, tokens cannot: "bits per byte" is the size to which the
model could compress the text, over the size of its UTF-8.
"""

import dataclasses
import math
from collections.abc import Sequence

from dsv3_jax.data.chat import Prompts
from dsv3_jax.evaluation.scorer import Scorer, ScoreRequest
from dsv3_jax.progress import Bar, no_bar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """The negative log-probability of a set of documents, in total and per unit."""

    documents: int
    tokens: int
    bytes: int
    nats: float

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """The perplexity per token; infinite where a float cannot hold it."""
        return math.exp(self.nats_per_token) if self.nats_per_token < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        return self.nats / self.bytes / math.log(2)

    def as_dict(self) -> dict[str, float]:
        names = ("nats_per_token", "perplexity", "bits_per_byte")
        return dataclasses.asdict(self) | {name: getattr(self, name) for name in names}


def perplexity(
    scorer: Scorer, texts: Sequence[str], prompts: Prompts, bar: Bar = no_bar
) -> Perplexity:
    """Score each text on its own, after one `prefix_id`, every token of it once."""
    ids = prompts.tokenizer.encode_batch(texts)
    prefix = prefix_id(prompts)
    requests = [x for text in ids for x in windows(text, prefix, scorer.max_length)]
    with bar("held-out text", len(requests)) as advance:
        scores = scorer(requests, advance)
    return Perplexity(
        documents=len(texts),
        tokens=sum(map(len, ids)),
        bytes=sum(len(text.encode()) for text in texts),
        nats=-math.fsum(score.log_prob for score in scores),
    )


def windows(ids: Sequence[int], prefix: int, max_length: int) -> list[ScoreRequest]:
    """Cut `ids` into requests that score each once and read `max_length` tokens but for the first.

    The first window stands after `prefix`. The last one scores what is left, with as much context
    as there is room for.
    """
    text, requests = (prefix, *ids), []
    for begin in range(0, len(ids), max_length):
        end = min(begin + max_length, len(ids))
        context = text[max(0, end - max_length) : begin + 1]
        requests.append(ScoreRequest(context, text[begin + 1 : end + 1]))
    return requests


def prefix_id(prompts: Prompts) -> int:
    """Return the id before a text: bos or, where there is none, the end of another text."""
    bos = prompts.special_tokens.get("bos_token")
    bos_id = None if bos is None else prompts.tokenizer.backend.token_to_id(bos)
    if bos_id is not None:
        return bos_id
    return prompts.stop_ids[0] if prompts.stop_ids else prompts.tokenizer.eos_id
