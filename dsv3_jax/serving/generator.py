"""Continuations of a batch of prompts, token by token, on one device or a mesh."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import multihost_utils

from dsv3_jax.model.mla import Latents
from dsv3_jax.serving.decode import Cache, Fp8Latents, decode_step, prefill
from dsv3_jax.serving.model_view import ModelView
from dsv3_jax.serving.sampling import GREEDY, Sampling, sample
from dsv3_jax.shapes import Bool, Int
from sharding.mesh import BATCH, REPLICATED, named_sharding

CACHE_MULTIPLE = 128  # caches are padded to a multiple of this many tokens


class Step(NamedTuple):
    """One new token for every prompt."""

    tokens: Int[np.ndarray, " B"]
    done: Bool[np.ndarray, " B"]  # the row has ended: with this token, or before it


class Generator:
    """Continues prompts with the weights of a view, whatever they are at the time.

    The batch is padded to a multiple of the mesh's data shards.

    Args:
        fp8_cache: keep the latents in FP8.
        multiple: prompts are padded to a multiple of this many tokens: fewer programs are compiled
            for batches of many lengths.
    """

    def __init__(self, view: ModelView, fp8_cache: bool = False, multiple: int = 1):
        self.view, self._fp8_cache, self._multiple = view, fp8_cache, multiple
        self._programs: dict[tuple[Sampling, int], tuple[Callable, Callable]] = {}

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        sampling: Sampling = GREEDY,
        stop_ids: Sequence[int] = (),
        seed: int = 0,
    ) -> Iterator[Step]:
        """Yield new tokens as they come, until all rows have ended or have `max_new`.

        Args:
            prompts: token ids, at least one each; rows may differ in length.
            max_new: most new tokens.
            stop_ids: a row ends with any of these.
            seed: two calls with the same seed draw the same tokens for the same row, whatever the
                mesh and the other rows.
        """
        view = self.view
        check_request(prompts, max_new, view.config.vocab_size)
        tokens, start = _left_padded(prompts, view.layout.mesh.n_data_shards, self._multiple)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(len(start)))
        sharding = named_sharding(view.mesh, BATCH)
        tokens, start, keys = jax.device_put((tokens, start, jax.random.key_data(keys)), sharding)
        size = -(-(tokens.shape[1] + max_new) // CACHE_MULTIPLE) * CACHE_MULTIPLE
        if (sampling, size) not in self._programs:
            self._programs[sampling, size] = self._compile(sampling, size)
        first_token, next_token = self._programs[sampling, size]
        done = np.zeros(len(prompts), bool)
        token, cache = first_token(tokens, start, keys)
        for i in range(max_new):
            current = token
            if i + 1 < max_new:  # runs while the caller looks at the current one
                token, cache = next_token(token, cache, keys)
            ids = _to_host(current)[: len(prompts)]
            done = done | np.isin(ids, stop_ids)
            yield Step(ids, done)
            if done.all():
                return

    def _compile(self, sampling: Sampling, size: int) -> tuple[Callable, Callable]:
        """Return the programs for the first token, and for each further one.

        They map (prompts, start, keys) and (tokens, cache, keys) to (tokens, cache).
        """
        view, layout = self.view, self.view.layout

        def first_token(model, tokens, start, keys):
            logits, cache = prefill(model, tokens, start, size, layout, self._fp8_cache)
            return sample(logits, keys, cache.length - start, sampling), cache

        def next_token(model, tokens, cache, keys):
            logits, cache = decode_step(model, tokens[:, None], cache, layout)
            return sample(logits[:, 0], keys, cache.length - cache.start, sampling), cache

        latents = Fp8Latents(BATCH, BATCH) if self._fp8_cache else Latents(BATCH, BATCH)
        cache = Cache((latents,) * view.config.n_layers, BATCH, REPLICATED)
        return (
            view.program(first_token, (BATCH, BATCH, BATCH), (BATCH, cache)),
            view.program(next_token, (BATCH, cache, BATCH), (BATCH, cache), donate=(1,)),
        )


def _to_host(tokens: Int[jax.Array, " B"]) -> Int[np.ndarray, " B"]:
    """Return the tokens of all rows, those on devices of other processes too."""
    if tokens.is_fully_addressable:
        return np.asarray(tokens)
    return multihost_utils.process_allgather(tokens, tiled=True)


def check_request(prompts: Sequence[Sequence[int]], max_new: int, vocab_size: int):
    """Raise a ValueError that says what is wrong unless a model can continue these prompts."""
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("every prompt needs at least one token")
    if max_new < 1:
        raise ValueError(f"max_new={max_new} must be at least 1")
    highest = max(max(prompt) for prompt in prompts)
    lowest = min(min(prompt) for prompt in prompts)
    if lowest < 0 or highest >= vocab_size:
        raise ValueError(
            f"token id {highest if lowest >= 0 else lowest} is outside the vocabulary of "
            f"{vocab_size}: the tokenizer is not this model's"
        )


def _left_padded(
    prompts: Sequence[Sequence[int]], n_shards: int, multiple: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Return prompts that end together, and where each begins.

    The last prompt is repeated to fill the batch.
    """
    rows = [*prompts, *[prompts[-1]] * (-len(prompts) % n_shards)]
    width = -(-max(map(len, rows)) // multiple) * multiple
    tokens = np.zeros((len(rows), width), np.int32)
    for row, prompt in zip(tokens, rows, strict=True):
        row[width - len(prompt) :] = prompt
    return tokens, np.array([width - len(prompt) for prompt in rows], np.int32)
