"""How well a model predicts held-out text, counted per token and per byte.

Bytes can be compared between tokenizers, tokens cannot: "bits per byte" is the size to which the
model could compress the text, over the size of its UTF-8.
"""

import dataclasses
import math
from collections.abc import Sequence

from dsv3_jax.data.chat import Prompts
from dsv3_jax.evaluation.scorer import Pair, Scorer
from dsv3_jax.progress import Bar, no_bar


@dataclasses.dataclass(frozen=True, kw_only=True)
class Perplexity:
    """What a set of documents costs a model."""

    documents: int
    tokens: int
    bytes: int
    nats: float

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    @property
    def perplexity(self) -> float:
        """Of tokens; infinite where a float cannot hold it."""
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
    """The cost of each text on its own, after one `prefix_id`, every token of it once."""
    ids = prompts.tokenizer.encode_batch(texts)
    pairs = [pair for text in ids for pair in windows(text, prefix_id(prompts), scorer.max_length)]
    with bar("held-out text", len(pairs)) as advance:
        scores = scorer(pairs, advance)
    return Perplexity(
        documents=len(texts),
        tokens=sum(map(len, ids)),
        bytes=sum(len(text.encode()) for text in texts),
        nats=-math.fsum(score.log_probability for score in scores),
    )


def windows(ids: Sequence[int], prefix: int, max_length: int) -> list[Pair]:
    """Pairs that score each of `ids` once, with `max_length` tokens read in all but the first.

    The first window stands after `prefix`. The last one scores what is left, with as much context
    as there is room for.
    """
    text, pairs = (prefix, *ids), []
    for begin in range(0, len(ids), max_length):
        end = min(begin + max_length, len(ids))
        context = text[max(0, end - max_length) : begin + 1]
        pairs.append(Pair(context, text[begin + 1 : end + 1]))
    return pairs


def prefix_id(prompts: Prompts) -> int:
    """The id that a text begins after: bos or, where there is none, the end of the text before."""
    bos = prompts.special_tokens.get("bos_token")
    found = None if bos is None else prompts.tokenizer.backend.token_to_id(bos)
    if found is not None:
        return found
    return prompts.stop_ids[0] if prompts.stop_ids else prompts.tokenizer.eos_id
