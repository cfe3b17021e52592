"""Log-probabilities of given tokens, in batches of few shapes, on one device or a mesh.

Rows are sorted by length and padded to a power of two, so a model of 4,096 tokens needs at most 8
programs, however many lengths there are. The head comes past in pieces, so that logits of all
places and the whole vocabulary never exist at once.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from dsv3_jax.losses import VOCAB_CHUNK
from dsv3_jax.progress import Advance
from dsv3_jax.serving.decode import DecodeModel, hidden_states
from dsv3_jax.serving.generator import Generator, check_request
from dsv3_jax.shapes import Array, Bool, Float, Float32, Int
from sharding.mesh import BATCH, MeshSpec, named_sharding
from sharding.vocab_parallel import n_vocab_chunks, scan_vocab_chunks


class Pair(NamedTuple):
    """What is given, and what is scored; both are token ids, at least one each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Score(NamedTuple):
    """Of a continuation."""

    log_probability: float  # nats
    greedy: bool  # each token is the likeliest one


class Scorer:
    """Scores pairs with the weights of a `Generator`, which can go on generating.

    Args:
        max_length: most tokens that the model reads; contexts lose their beginning.
        batch: rows that run at once, rounded up to the mesh's data shares.
        shortest: tokens that rows are padded to at least.
    """

    def __init__(self, generator: Generator, max_length: int, batch: int, shortest: int = 32):
        if max_length < 1 or batch < 1:
            raise ValueError(f"max_length={max_length} and batch={batch} must be positive")
        self.generator, self.max_length, self._shortest = generator, max_length, shortest
        layout, shares = generator.view.layout, generator.view.layout.mesh.n_data_shards
        self.batch = -(-batch // shares) * shares

        def run(model: DecodeModel, tokens, targets):
            hidden = hidden_states(model, tokens, layout)
            rows = rearrange(hidden, "b t d -> (b t) d")
            head = model.head[...].astype(rows.dtype)
            scores = token_scores(rows, head, targets.reshape(-1), layout.mesh)
            return tuple(score.reshape(targets.shape) for score in scores)

        self._run = generator.view.program(run, (BATCH, BATCH), (BATCH, BATCH))

    def __call__(self, pairs: Sequence[Pair], advance: Advance = lambda n: None) -> list[Score]:
        """The score of every pair; the same pair runs once.

        Raises:
            ValueError: an empty part, a continuation longer than the model reads, or an unknown id.
        """
        found: dict[Pair, Score] = {}
        once = sorted(dict.fromkeys(pairs), key=lambda pair: -len(pair.context + pair.continuation))
        self._check(once)
        for first in range(0, len(once), self.batch):
            batch = once[first : first + self.batch]
            found.update(zip(batch, self._scores(batch), strict=True))
            advance(len(batch))
        advance(len(pairs) - len(once))
        return [found[pair] for pair in pairs]

    def _check(self, pairs: list[Pair]):
        check_request([pair.context for pair in pairs], 1, self.generator.view.config.vocab_size)
        check_request(
            [pair.continuation for pair in pairs], 1, self.generator.view.config.vocab_size
        )
        longest = max(len(pair.continuation) for pair in pairs)
        if longest > self.max_length:
            raise ValueError(
                f"a continuation of {longest} tokens is longer than max_length={self.max_length}, "
                "which is all that the model reads"
            )

    def _scores(self, pairs: list[Pair]) -> list[Score]:
        """Scores of one batch."""
        rows = [np.array(pair.context + pair.continuation) for pair in pairs]
        rows = [row[-(self.max_length + 1) :] for row in rows]
        width = padded(max(map(len, rows)) - 1, self._shortest, self.max_length)
        tokens = np.zeros((self.batch, width), np.int32)
        targets = np.zeros((self.batch, width), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row) - 1], targets[i, : len(row) - 1] = row[:-1], row[1:]
        place = named_sharding(self.generator.view.mesh, BATCH)
        logs, greedy = self._run(*(jax.device_put(x, place) for x in (tokens, targets)))
        logs, greedy = np.asarray(logs, np.float64), np.asarray(greedy)
        scores = []
        for i, (pair, row) in enumerate(zip(pairs, rows, strict=True)):
            scored = slice(len(row) - 1 - len(pair.continuation), len(row) - 1)
            scores.append(Score(float(logs[i, scored].sum()), bool(greedy[i, scored].all())))
        return scores


def padded(n: int, least: int, most: int) -> int:
    """The power of two that holds `n` tokens, at least `least`, at most `most`."""
    return min(max(least, 1 << (n - 1).bit_length()), most)


def token_scores(
    rows: Float[Array, "t D"], head: Float[Array, "v D"], labels: Int[Array, " t"], mesh: MeshSpec
) -> tuple[Float32[Array, " t"], Bool[Array, " t"]]:
    """log softmax(rows head^T)[label], and whether the label is the likeliest, or the first such.

    Args:
        head: this rank's rows of the output head.
    """

    def step(carry, piece, ids):
        peak, best, total, chosen = carry
        logits = jnp.einsum("tD,pD->tp", rows, piece, preferred_element_type=jnp.float32)
        top, first = logits.max(-1), ids[logits.argmax(-1)]  # ids ascend
        best = jnp.where((top > peak) | ((top == peak) & (first < best)), first, best)
        higher = jnp.maximum(peak, top)
        total = total * jnp.exp(peak - higher) + jnp.exp(logits - higher[:, None]).sum(-1)
        mine = ids[None, :] == labels[:, None]
        return (higher, best, total, chosen + jnp.where(mine, logits, 0.0).sum(-1)), None

    zero = jnp.zeros(rows.shape[0], jnp.float32)
    carry = (zero - jnp.inf, jnp.zeros(rows.shape[0], jnp.int32), zero, zero)
    carry, _ = scan_vocab_chunks(
        step, carry, head, n_vocab_chunks(head.shape[0], mesh, VOCAB_CHUNK), mesh
    )
    peak, best, total, chosen = carry
    return chosen - peak - jnp.log(total), best == labels
