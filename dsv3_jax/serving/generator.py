"""Continuations of a batch of prompts, token by token, on one device or a mesh."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from dsv3_jax.model.deepseek import DeepSeekV3
from dsv3_jax.model.mla import Latents
from dsv3_jax.params import param_specs
from dsv3_jax.serving.decode import Cache, Fp8Latents, Served, extend, prefill
from dsv3_jax.serving.sampling import GREEDY, Sampling, choose_tokens
from dsv3_jax.shapes import Bool, Int
from sharding.layout import Layout
from sharding.mesh import BATCH, REPLICATED, manual_region, mesh_spec, named_sharding

ROOM = 128  # the cache is as long as prompt and new tokens need, in steps of this many


class Step(NamedTuple):
    """One new token for every prompt."""

    tokens: Int[np.ndarray, " B"]
    done: Bool[np.ndarray, " B"]  # the row has ended: with this token, or before it


class Generator:
    """Runs a model; takes it apart, so that the model cannot be used any more.

    On a mesh the model's parameters must lie as `load_pretrained` puts them; the batch is padded to
    a multiple of the mesh's data shares.
    """

    def __init__(
        self,
        model: DeepSeekV3,
        mesh: Mesh,
        capacity: float = 1.25,
        fp8_cache: bool = False,
        multiple: int = 1,
    ):
        """Take `model` apart.

        Args:
            capacity: rows that a device has room for in an exchange of tokens, over the even share.
            fp8_cache: remember tokens in FP8.
            multiple: prompts are padded to a multiple of this many tokens: fewer programs are
                compiled for batches of many lengths.
        """
        self.config, self._fp8_cache, self._multiple = model.config, fp8_cache, multiple
        self.mesh = mesh
        self.layout = Layout(mesh=mesh_spec(mesh), zero=0, capacity_factor=capacity)
        self._graphdef, state = nnx.split(Served(model))
        leaves, self._treedef = jax.tree.flatten(state)
        self._specs = jax.tree.leaves(param_specs(state, self.layout))
        self._leaves = leaves  # flat, because every call flattens what it is given

    def __call__(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        sampling: Sampling = GREEDY,
        stop_ids: Sequence[int] = (),
        seed: int = 0,
    ) -> Iterator[Step]:
        """New tokens as they come, until all rows have ended or have `max_new`.

        Args:
            prompts: token ids, at least one each; rows may differ in length.
            max_new: most new tokens.
            stop_ids: a row ends with any of these.
            seed: two calls with the same seed draw the same tokens for the same row, whatever the
                mesh and the other rows.
        """
        check_request(prompts, max_new, self.config.vocab_size)
        tokens, start = _left_padded(prompts, self.layout.mesh.n_data_shards, self._multiple)
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), np.arange(len(start)))
        put = functools.partial(jax.device_put, device=named_sharding(self.mesh, BATCH))
        tokens, start, keys = put(tokens), put(start), put(jax.random.key_data(keys))
        size = -(-(tokens.shape[1] + max_new) // ROOM) * ROOM
        first, further = self._programs(sampling, size)
        done = np.zeros(len(prompts), bool)
        token, cache = first(tokens, start, keys)
        for i in range(max_new):
            current = token
            if i + 1 < max_new:  # runs while the caller looks at the current one
                token, cache = further(token, cache, keys)
            ids = np.asarray(current)[: len(prompts)]
            done = done | np.isin(ids, stop_ids)
            yield Step(ids, done)
            if done.all():
                return

    def program(self, fn: Callable, inputs: tuple, outputs, donate: tuple = ()) -> Callable:
        """`fn(served, *arguments)` with this generator's weights, compiled for its mesh.

        Args:
            inputs, outputs: how arguments and results lie on the mesh.
            donate: which arguments the results may overwrite.
        """

        def shard(leaves, *arguments):
            return fn(nnx.merge(self._graphdef, self._treedef.unflatten(leaves)), *arguments)

        run = manual_region(shard, self.mesh, (self._specs, *inputs), outputs)
        compiled = jax.jit(run, donate_argnums=tuple(1 + place for place in donate))
        return functools.partial(compiled, self._leaves)

    @functools.cache  # noqa: B019 one generator lives as long as its process
    def _programs(self, sampling: Sampling, size: int):
        """(prompts, start, keys) and (tokens, cache, keys) -> (tokens, cache)."""
        layout = self.layout

        def first(served, tokens, start, keys):
            logits, cache = prefill(served, tokens, start, size, layout, self._fp8_cache)
            return choose_tokens(logits, keys, cache.length - start, sampling), cache

        def further(served, tokens, cache, keys):
            logits, cache = extend(served, tokens[:, None], cache, layout)
            place = cache.length - cache.start
            return choose_tokens(logits[:, 0], keys, place, sampling), cache

        kind = Fp8Latents if self._fp8_cache else Latents
        layers = (kind(BATCH, BATCH),) * self.config.n_layers
        caches = Cache(layers, BATCH, REPLICATED)
        out = (BATCH, caches)
        first = self.program(first, (BATCH, BATCH, BATCH), out)
        return first, self.program(further, (BATCH, caches, BATCH), out, donate=(1,))


def check_request(prompts: Sequence[Sequence[int]], max_new: int, vocab_size: int):
    """Raise a ValueError that says what is wrong unless a model can go on with these prompts."""
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
    prompts: Sequence[Sequence[int]], shares: int, multiple: int
) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, " B"]]:
    """Prompts that end together, and where each begins; the last is repeated to fill the batch."""
    rows = [*prompts, *[prompts[-1]] * (-len(prompts) % shares)]
    width = -(-max(map(len, rows)) // multiple) * multiple
    tokens = np.zeros((len(rows), width), np.int32)
    for row, prompt in zip(tokens, rows, strict=True):
        row[width - len(prompt) :] = prompt
    return tokens, np.array([width - len(prompt) for prompt in rows], np.int32)
