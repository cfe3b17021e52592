"""Log-probabilities of given tokens, in batches of few shapes, on one device or a mesh.

Rows are sorted by length and padded to a power of two, so a model of 4,096 tokens needs at most 8
programs, however many lengths there are. The output head is read chunk by chunk, so that logits of
all positions and the whole vocabulary never exist at once.
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


class ScoreRequest(NamedTuple):
    """A context, and the continuation to be scored: token ids, at least one each."""

    context: tuple[int, ...]
    continuation: tuple[int, ...]


class Score(NamedTuple):
    """The score of a continuation."""

    log_prob: float  # nats
    is_greedy: bool  # each token is the likeliest one


class Scorer:
    """Scores requests with the weights of a `Generator`, which can go on generating.

    Args:
        max_length: most tokens that the model reads; contexts lose their beginning.
        batch: rows that run at once, rounded up to a multiple of the mesh's data shards.
        min_length: tokens that rows are padded to at least.
    """

    def __init__(self, generator: Generator, max_length: int, batch: int, min_length: int = 32):
        if max_length < 1 or batch < 1:
            raise ValueError(f"max_length={max_length} and batch={batch} must be positive")
        self.generator, self.max_length, self._min_length = generator, max_length, min_length
        layout, n_shards = generator.view.layout, generator.view.layout.mesh.n_data_shards
        self.batch = -(-batch // n_shards) * n_shards

        def run(model: DecodeModel, tokens, targets):
            hidden = hidden_states(model, tokens, layout)
            rows = rearrange(hidden, "b t d -> (b t) d")
            head = model.head[...].astype(rows.dtype)
            scores = token_scores(rows, head, targets.reshape(-1), layout.mesh)
            return tuple(score.reshape(targets.shape) for score in scores)

        self._run = generator.view.program(run, (BATCH, BATCH), (BATCH, BATCH))

    def __call__(
        self, requests: Sequence[ScoreRequest], advance: Advance = lambda n: None
    ) -> list[Score]:
        """Return the score of every request; equal requests run once.

        Raises:
            ValueError: an empty part, a continuation longer than the model reads, or an unknown id.
        """
        scores: dict[ScoreRequest, Score] = {}
        unique = sorted(
            dict.fromkeys(requests),
            key=lambda request: -len(request.context + request.continuation),
        )
        self._check(unique)
        for first in range(0, len(unique), self.batch):
            batch = unique[first : first + self.batch]
            scores.update(zip(batch, self._score_batch(batch), strict=True))
            advance(len(batch))
        advance(len(requests) - len(unique))
        return [scores[request] for request in requests]

    def _check(self, requests: list[ScoreRequest]):
        vocab_size = self.generator.view.config.vocab_size
        check_request([request.context for request in requests], 1, vocab_size)
        check_request([request.continuation for request in requests], 1, vocab_size)
        longest = max(len(request.continuation) for request in requests)
        if longest > self.max_length:
            raise ValueError(
                f"a continuation of {longest} tokens is longer than max_length={self.max_length}, "
                "which is all that the model reads"
            )

    def _score_batch(self, requests: list[ScoreRequest]) -> list[Score]:
        """Return the scores of one batch, which is padded to `self.batch` rows."""
        rows = [np.array(request.context + request.continuation) for request in requests]
        rows = [row[-(self.max_length + 1) :] for row in rows]
        width = padded_length(max(map(len, rows)) - 1, self._min_length, self.max_length)
        tokens = np.zeros((self.batch, width), np.int32)
        targets = np.zeros((self.batch, width), np.int32)
        for i, row in enumerate(rows):
            tokens[i, : len(row) - 1], targets[i, : len(row) - 1] = row[:-1], row[1:]
        sharding = named_sharding(self.generator.view.mesh, BATCH)
        log_probs, greedy = self._run(*(jax.device_put(x, sharding) for x in (tokens, targets)))
        log_probs, greedy = np.asarray(log_probs, np.float64), np.asarray(greedy)
        scores = []
        for i, (request, row) in enumerate(zip(requests, rows, strict=True)):
            scored = slice(len(row) - 1 - len(request.continuation), len(row) - 1)
            scores.append(Score(float(log_probs[i, scored].sum()), bool(greedy[i, scored].all())))
        return scores


def padded_length(n: int, minimum: int, maximum: int) -> int:
    """Return the power of two that holds `n` tokens, within `minimum` and `maximum`."""
    return min(max(minimum, 1 << (n - 1).bit_length()), maximum)


def token_scores(
    rows: Float[Array, "t D"], head: Float[Array, "v D"], labels: Int[Array, " t"], mesh: MeshSpec
) -> tuple[Float32[Array, " t"], Bool[Array, " t"]]:
    """Compute log softmax(rows head^T)[label], and whether the label is the likeliest token.

    Of several tokens that are the likeliest, the first one counts.

    Args:
        head: this rank's rows of the output head.
    """

    def step(carry, chunk, ids):
        peak, best, total, chosen = carry
        logits = jnp.einsum("tD,vD->tv", rows, chunk, preferred_element_type=jnp.float32)
        top, first = logits.max(-1), ids[logits.argmax(-1)]  # ids ascend
        best = jnp.where((top > peak) | ((top == peak) & (first < best)), first, best)
        new_peak = jnp.maximum(peak, top)
        total = total * jnp.exp(peak - new_peak) + jnp.exp(logits - new_peak[:, None]).sum(-1)
        is_label = ids[None, :] == labels[:, None]
        return (new_peak, best, total, chosen + jnp.where(is_label, logits, 0.0).sum(-1)), None

    zero = jnp.zeros(rows.shape[0], jnp.float32)
    carry = (zero - jnp.inf, jnp.zeros(rows.shape[0], jnp.int32), zero, zero)
    carry, _ = scan_vocab_chunks(
        step, carry, head, n_vocab_chunks(head.shape[0], mesh, VOCAB_CHUNK), mesh
    )
    peak, best, total, chosen = carry
    return chosen - peak - jnp.log(total), best == labels
