"""Texts with a needle, and how often a model finds it, by length and depth (report figure 8)."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dsv3_jax.data.chat import Prompts
from dsv3_jax.data.needles import NAMES, VALUES, fact, fact_prefix
from dsv3_jax.evaluation.scorer import Score, ScoreRequest
from dsv3_jax.progress import bar

LINES_PER_CALL = 32  # of the tokenizer
ScoreFn = Callable[..., Sequence[Score]]  # (requests, advance): a `Scorer`


class Haystacks:
    """Makes texts of an exact number of tokens, each with a needle.

    Args:
        lines: the filler.
        n_others: facts of other names, anywhere in the text; without any, a model may find the
            needle by its looks alone.
    """

    def __init__(self, prompts: Prompts, lines: Sequence[str], n_others: int, seed: int):
        self.lines, self.n_others, self.seed = lines, n_others, seed
        self.encode = prompts.tokenizer.encode_batch
        self.begin = prompts.encode("")  # bos, where the model expects it

    def request(self, length: int, depth: float, trial: int) -> ScoreRequest:
        """Make a text up to the answer, and the answer, together of `length` tokens.

        Args:
            depth: fraction of the filler before the needle, up to the end of a line.

        Raises:
            ValueError: the length has no room for the facts.
        """
        rng = np.random.default_rng([self.seed, length, round(depth * 1e6), trial])
        name, *others = rng.permutation(NAMES)[: 1 + self.n_others]
        value, *values = rng.permutation(VALUES)[: 1 + len(others)]
        facts = [fact(*pair) + "\n" for pair in zip(others, values, strict=True)]
        texts = [fact(name, value) + "\n", fact_prefix(name), f" {value}", *facts]
        needle, question, answer, *facts = self.encode(texts)
        fixed = sum(map(len, [self.begin, needle, question, answer, *facts]))
        if length < fixed:
            raise ValueError(
                f"--lengths: {length} tokens have no room for needle, question and --others="
                f"{self.n_others} facts, which take {fixed}"
            )
        hay = self._hay(rng, length - fixed)
        for other in facts:
            hay.insert(rng.integers(len(hay) + 1), other)
        ends = np.cumsum([0, *map(len, hay)])
        hay.insert(int(np.abs(ends - depth * ends[-1]).argmin()), needle)
        return ScoreRequest((*self.begin, *sum(hay, []), *question), tuple(answer))

    def _hay(self, rng: np.random.Generator, n_tokens: int) -> list[list[int]]:
        """Return consecutive lines from anywhere as tokens; of the first only the end, to fit."""
        last, hay, missing = int(rng.integers(len(self.lines))), [], n_tokens
        while missing > 0:
            lines = [self.lines[(last - i) % len(self.lines)] + "\n" for i in range(LINES_PER_CALL)]
            last -= len(lines)
            for line in self.encode(lines):
                hay.append(line[-missing:])
                missing -= len(hay[-1])
                if not missing:
                    break
        return hay[::-1]


class Grid(NamedTuple):
    """The results at every depth (rows) and length (columns), means over the trials."""

    title: str
    lengths: list[int]  # tokens
    depths: list[float]  # fractions of the text
    found: list[list[float]]  # fractions of the trials
    log_prob: list[list[float]]

    @property
    def mean(self) -> float:
        return float(np.mean(self.found))


def measure(
    title: str,
    haystacks: Haystacks,
    score_fn: ScoreFn,
    lengths: Sequence[int],
    depths: Sequence[float],
    trials: int,
) -> Grid:
    """Score the needles at all lengths and depths."""
    columns = []
    with bar("tokens", sum(lengths) * len(depths) * trials) as advance:
        for length in lengths:
            cells = [(length, depth, trial) for depth in depths for trial in range(trials)]
            requests = [haystacks.request(*cell) for cell in cells]
            found = score_fn(requests, lambda n, length=length: advance(n * length))
            columns.append(np.reshape(found, (len(depths), trials, 2)).mean(1))
    log_prob, found = np.stack(columns, axis=1).transpose(2, 0, 1).tolist()
    return Grid(title, list(lengths), list(depths), found, log_prob)
