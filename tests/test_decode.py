"""Prefill and decode steps equal the full forward everywhere, whatever the padding and the steps.

Tolerance: float32 1e-5 of the largest value.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import layers as reference
from reference.cases import (
    BATCH,
    CONFIG,
    LENGTH,
    YARN,
    assert_close,
    attend,
    attention_weights,
    build,
    decode_model,
    inputs,
    positions,
    with_attention,
)

from configs import load_preset
from dsv3_jax.model.deepseek import DeepSeekV3
from dsv3_jax.model.mla import MLA
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.serving.decode import Cache, DecodeModel, decode_step, prefill
from sharding.layout import Layout

N_ROWS, WIDTH, PREFIX = 3, 9, 4
SIZE = WIDTH  # of the cache: the last token takes the last place
STARTS = np.array([0, 3, 1], np.int32)


def fresh_model() -> DeepSeekV3:
    return build(lambda: DeepSeekV3(CONFIG, Policy(), rngs=nnx.Rngs(0)))[0]


@functools.cache
def served() -> DecodeModel:
    return decode_model(fresh_model())


@nnx.jit
def first(served, tokens, start):
    return prefill(served, tokens, start, SIZE, Layout())


@nnx.jit
def further(served, tokens, cache):
    return decode_step(served, tokens, cache, Layout())


full = nnx.jit(lambda model, tokens: model(tokens))


def some_tokens() -> np.ndarray:
    return np.random.default_rng(3).integers(0, CONFIG.vocab_size, (N_ROWS, WIDTH), np.int32)


def run(tokens, start, *steps: int) -> tuple[np.ndarray, Cache]:
    """Logits at places PREFIX - 1 and on, of `steps` tokens at a time, and the last cache."""
    logits, cache = first(served(), tokens[:, :PREFIX], start)
    out, at = [logits[:, None]], PREFIX
    for n in steps:
        logits, cache = further(served(), tokens[:, at : at + n], cache)
        out, at = [*out, logits], at + n
    return np.concatenate(out, axis=1), jax.tree.map(np.asarray, cache)


@functools.cache
def one_by_one() -> tuple[np.ndarray, Cache]:
    return run(some_tokens(), np.zeros(N_ROWS, np.int32), 1, 1, 1, 1, 1)


@functools.cache
def padded() -> tuple[np.ndarray, Cache]:
    return run(some_tokens(), STARTS, 1, 1, 1, 1, 1)


def test_equals_the_full_forward():
    want = full(fresh_model(), some_tokens())
    assert_close(one_by_one()[0], want[:, PREFIX - 1 :])


def test_several_tokens_at_once_equal_one_by_one():
    logits, cache = run(some_tokens(), np.zeros(N_ROWS, np.int32), 4, 1)
    assert_close(logits, one_by_one()[0])
    jax.tree.map(assert_close, cache, one_by_one()[1])


def test_places_past_the_end_are_not_read():
    logits, cache = first(served(), some_tokens()[:, :PREFIX], STARTS)
    dirty = [jax.tree.map(lambda x: x.at[:, PREFIX:].set(1e4), layer) for layer in cache.layers]
    token = some_tokens()[:, PREFIX : PREFIX + 1]
    want, _ = further(served(), token, cache)
    got, _ = further(served(), token, cache._replace(layers=tuple(dirty)))
    np.testing.assert_array_equal(got, want)


def test_left_padded_rows_equal_unpadded_ones():
    """The full forward of each row alone, moved to the left: there it needs no mask."""
    tokens = some_tokens()
    moved = np.stack([np.roll(row, -n) for row, n in zip(tokens, STARTS, strict=True)])
    want = np.asarray(full(fresh_model(), moved))
    for row, n in enumerate(STARTS):
        assert_close(padded()[0][row], want[row, PREFIX - 1 - n : WIDTH - n])
    assert np.abs(padded()[0][1] - one_by_one()[0][1]).max() > 0.1


def test_what_the_padding_holds_does_not_matter():
    """Bit for bit, in all that is read afterwards."""
    place = np.arange(WIDTH)[None, :]
    for fill in (0, 21):
        other = np.where(place < STARTS[:, None], fill, some_tokens()).astype(np.int32)
        logits, cache = run(other, STARTS, 1, 1, 1, 1, 1)
        np.testing.assert_array_equal(logits, padded()[0])
        for one, same in zip(cache.layers, padded()[1].layers, strict=True):
            for row, n in enumerate(STARTS):
                np.testing.assert_array_equal(one.c_kv[row, n:], same.c_kv[row, n:])
                np.testing.assert_array_equal(one.k_rope[row, n:], same.k_rope[row, n:])


def test_a_cache_says_how_far_it_is():
    _, before = first(served(), some_tokens()[:, :PREFIX], STARTS)
    after = padded()[1]
    assert before.length == PREFIX and after.length == WIDTH
    for cache in (before, after):
        np.testing.assert_array_equal(cache.start, STARTS)
        shapes = [(layer.c_kv.shape, layer.k_rope.shape) for layer in cache.layers]
        assert shapes == [((N_ROWS, SIZE, 10), (N_ROWS, SIZE, 6))] * CONFIG.n_layers
    for old, new in zip(jax.tree.leaves(before.layers), jax.tree.leaves(after.layers), strict=True):
        np.testing.assert_array_equal(new[:, :PREFIX], old[:, :PREFIX])
        assert (old[:, PREFIX:] == 0).all()


def test_cache_of_the_671b_model():
    """576 numbers per token per layer: 70,272 bytes per token in bfloat16 in its 61 layers."""
    whole = load_preset("dsv3_671b").model
    config = dataclasses.replace(whole, n_layers=5)  # the others are as the last two
    policy = Policy(compute=jnp.dtype("bfloat16"), master=jnp.dtype("bfloat16"))
    model = nnx.eval_shape(lambda: DecodeModel(config, policy, rngs=nnx.Rngs(0)))

    def run(model, tokens):
        return prefill(model, tokens, jnp.zeros(2, jnp.int32), 7, Layout())[1]

    layers = jax.eval_shape(run, model, np.zeros((2, 5), np.int32)).layers
    assert [sum(x.shape[-1] for x in layer) for layer in layers] == [576] * 5
    n_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(layers))
    assert n_bytes / (2 * 7) / 5 * whole.n_layers == 70_272


# The absorbed form of attention


@pytest.mark.parametrize(
    "config",
    [CONFIG, with_attention(q_rank=None), with_attention(yarn=YARN)],
    ids=["q_rank", "no q_rank", "yarn"],
)
def test_absorbed_equals_expanded_and_the_twin(config):
    module, values = build(lambda: MLA(config, rngs=nnx.Rngs(0)))
    causal = np.broadcast_to(np.tri(LENGTH, dtype=bool), (BATCH, LENGTH, LENGTH))

    @jax.jit
    def both(module, h, positions):
        q, latents = module.project_q(h, positions), module.compress_kv(h, positions)
        return module.absorbed(q, latents, causal), attend(module, h, positions)

    h = inputs()
    absorbed, expanded = both(module, h, positions())
    assert_close(absorbed, expanded)
    twin = functools.partial(
        reference.mla, w=attention_weights(values), a=config.attention, eps=config.norm_eps
    )
    want = np.stack([twin(h[b].astype(float), np.arange(LENGTH)) for b in range(BATCH)])
    assert_close(absorbed, want)
