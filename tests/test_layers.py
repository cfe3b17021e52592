"""Every layer against its NumPy twin (tests/reference/layers.py), and what it must be besides.

Tolerances: float32 1e-5 of the largest value, bfloat16 2e-2 of it.
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
    ATTENTION,
    BATCH,
    CONFIG,
    LENGTH,
    MOE,
    YARN,
    assert_close,
    attend,
    attention_weights,
    build,
    in_bfloat16,
    inputs,
    moe_weights,
    positions,
    with_attention,
)

from dsv3_jax.config import YarnConfig
from dsv3_jax.model import mla, rope
from dsv3_jax.model.layers import RMSNorm, SwiGLU
from dsv3_jax.model.mla import MLA
from dsv3_jax.model.moe import MoE, router_stats
from dsv3_jax.model.router import expert_counts, route_tokens, sequence_balance_loss
from dsv3_jax.numerics.attention import causal_attention
from dsv3_jax.numerics.kernels import attention_ref
from sharding.layout import Layout

# Norm, feed-forward, rotary embedding


def test_rms_norm():
    module, values = build(lambda: RMSNorm(CONFIG.width, 1e-3))
    x = 0.1 * inputs()
    assert_close(jax.jit(module)(x), reference.rms_norm(x.astype(float), values["scale"], 1e-3))


def test_swiglu():
    module, values = build(lambda: SwiGLU(20, 11, 0.1, rngs=nnx.Rngs(0)))
    gate, up = np.split(values["gate_up.kernel"], 2, axis=-1)
    want = reference.swiglu(inputs().astype(float), gate, up, values["down.kernel"])
    assert_close(jax.jit(module)(inputs()), want)


@pytest.mark.parametrize(
    "dim, base, yarn",
    [
        (6, 100.0, None),
        (6, 100.0, YARN),
        (64, 10_000.0, None),
        (64, 10_000.0, YarnConfig(factor=40.0, original_length=4096)),
        (64, 10_000.0, YarnConfig(factor=8.0, original_length=8, beta_fast=32.0)),
    ],
)
def test_frequencies(dim, base, yarn):
    config = dataclasses.replace(ATTENTION, rope_dim=dim, rope_base=base, yarn=yarn)
    got = rope.frequencies(config)
    np.testing.assert_allclose(got, reference.rope_frequencies(dim, base, yarn), rtol=1e-6)


def test_yarn_keeps_fast_pairs_and_slows_slow_ones():
    yarn = YarnConfig(factor=40.0, original_length=4096)
    config = dataclasses.replace(ATTENTION, rope_dim=64, rope_base=10_000.0)
    plain = rope.frequencies(config)
    ratio = plain / rope.frequencies(dataclasses.replace(config, yarn=yarn))
    np.testing.assert_allclose(ratio[:10], 1.0, rtol=1e-6)
    np.testing.assert_allclose(ratio[-8:], 40.0, rtol=1e-6)
    assert (np.diff(ratio) >= -1e-4).all()  # of 40, in float32


def test_softmax_scale():
    """mscale(40) = 0.1 ln 40 + 1 = 1.36889, squared."""
    config = dataclasses.replace(ATTENTION, nope_dim=128, rope_dim=64)
    np.testing.assert_allclose(rope.softmax_scale(config), 192**-0.5, rtol=1e-12)
    longer = dataclasses.replace(config, yarn=YarnConfig(factor=40.0, original_length=4096))
    np.testing.assert_allclose(rope.softmax_scale(longer), 192**-0.5 * 1.87385, rtol=1e-5)


@jax.jit
def rotated(x, where):
    return rope.rotate(x, *rope.rotations(ATTENTION, where))


def test_rotate():
    x = np.random.default_rng(2).normal(size=(BATCH, 3, LENGTH, 6)).astype(np.float32)
    where = positions() + np.array([[0], [11]], np.int32)
    frequencies = reference.rope_frequencies(6, 100.0)
    want = np.empty(x.shape)
    for b, h in np.ndindex(BATCH, 3):
        want[b, h] = reference.rope(x[b, h].astype(float), where[b], frequencies)
    assert_close(rotated(x, where), want)


def test_rotated_products_depend_on_distance_only():
    q, k = np.random.default_rng(3).normal(size=(2, 1, 1, LENGTH, 6)).astype(np.float32)

    def products(first):
        turned = (rotated(x, positions(1, first))[0, 0] for x in (q, k))
        return np.einsum("tr,sr->ts", *turned)

    assert_close(products(23), products(0), 1e-5)
    assert np.abs(products(0) - np.einsum("tr,sr->ts", q[0, 0], k[0, 0])).max() > 0.1


# Attention


@pytest.mark.parametrize(
    "config",
    [CONFIG, with_attention(q_rank=None), with_attention(yarn=YARN)],
    ids=["q_rank", "no q_rank", "yarn"],
)
def test_mla(config):
    module, values = build(lambda: MLA(config, rngs=nnx.Rngs(0)))
    h = inputs()
    twin = functools.partial(
        reference.mla, w=attention_weights(values), a=config.attention, eps=config.norm_eps
    )
    want = np.stack([twin(h[b].astype(float), np.arange(LENGTH)) for b in range(BATCH)])
    assert_close(jax.jit(attend)(module, h, positions()), want)


def test_attention_depends_on_relative_positions_only():
    module, _ = build(lambda: MLA(CONFIG, rngs=nnx.Rngs(0)))
    run = functools.partial(jax.jit(attend), module)
    h = inputs(batch=1)
    near = run(h, positions(1))
    assert_close(run(h, positions(1, first=31)), near)
    assert np.abs(run(h, 3 * positions(1)) - near).max() > 1e-2  # positions do count


def test_k_rope_is_one_head_for_all(monkeypatch):
    """Keys in place of values: the rotary part is the same in every head, and is rope(W_KR h)."""
    monkeypatch.setattr(
        mla, "causal_attention", lambda q, k, v, *how: k[..., ATTENTION.nope_dim :][..., :5]
    )
    module, values = build(lambda: MLA(CONFIG, rngs=nnx.Rngs(0)))
    module.out.kernel.set_value(jnp.eye(15, 20))
    h = inputs()
    run = jax.jit(lambda h: attend(module, h, positions()))  # traced anew
    heads = run(h)[..., :15].reshape(BATCH, LENGTH, 3, 5)
    down, frequencies = values["kv_down.kernel"], reference.rope_frequencies(6, 100.0)
    assert down.shape == (20, 10 + 6)  # so many numbers a token does a cache hold
    for b, head in np.ndindex(BATCH, 3):
        want = reference.rope(h[b] @ down[:, 10:], np.arange(LENGTH), frequencies)[:, :5]
        assert_close(heads[b, :, head], want)


def test_attention_in_chunks(monkeypatch):
    """Values and gradients of queries taken a few at a time are those of all at once."""
    rng = np.random.default_rng(4)
    q, k = rng.normal(size=(2, BATCH, 3, LENGTH, 14)).astype(np.float32)
    v, grad = rng.normal(size=(2, BATCH, 3, LENGTH, 5)).astype(np.float32)

    def run(step):
        def fresh(q, k, v):  # a new function: jit does not see that the chunk has changed
            return causal_attention(q, k, v, 0.3)

        def both(q, k, v, grad):
            out, pull = jax.vjp(fresh, q, k, v)
            return out, *pull(grad)

        monkeypatch.setattr(attention_ref, "QUERY_CHUNK", step)
        return jax.jit(both)(q, k, v, grad)

    for one, other in zip(run(3), run(512), strict=True):
        assert_close(one, other)


# Router and experts

CASES = {
    "groups": MOE,
    "one group": dataclasses.replace(MOE, n_groups=1, topk_groups=1),
    "raw weights": dataclasses.replace(MOE, normalize=False, scale=1.5),
    "groups of one": dataclasses.replace(MOE, n_groups=15, topk_groups=6),
}
ROUTED_TOKENS = 40


def affinities() -> np.ndarray:
    logits = np.random.default_rng(5).normal(size=(ROUTED_TOKENS, MOE.n_experts))
    return (1 / (1 + np.exp(-logits))).astype(np.float32)


def some_bias() -> np.ndarray:
    return np.random.default_rng(6).normal(size=MOE.n_experts).astype(np.float32) * 0.3


@functools.partial(jax.jit, static_argnums=2)
def choose(scores, bias, config):
    return route_tokens(scores, bias, config)


@pytest.mark.parametrize("case", CASES)
def test_router(case):
    config, scores, bias = CASES[case], affinities(), some_bias()
    weights, ids = map(np.asarray, choose(scores, bias, config))
    for t in range(ROUTED_TOKENS):
        want = reference.route(scores[t].astype(float), bias.astype(float), config)
        assert sorted(ids[t]) == sorted(want)
        np.testing.assert_allclose(weights[t], [want[i] for i in ids[t]], rtol=1e-5)


def test_weights_sum_to_scale_within_the_groups_kept():
    weights, ids = map(np.asarray, choose(affinities(), some_bias(), MOE))
    np.testing.assert_allclose(weights.sum(-1), MOE.scale, rtol=1e-6)
    size = MOE.n_experts // MOE.n_groups
    assert max(len(set(row // size)) for row in ids) == MOE.topk_groups
    assert all(len(set(row)) == MOE.top_k for row in ids)
    free = np.asarray(choose(affinities(), some_bias(), CASES["one group"])[1])
    assert max(len(set(row // size)) for row in free) > MOE.topk_groups  # the limit does bind


def test_bias_steers_the_choice_but_not_the_weight():
    scores, bias = affinities(), some_bias()
    bias[4] += 10.0
    weights, ids = map(np.asarray, choose(scores, bias, MOE))
    assert (ids == 4).any(-1).all()
    picked = np.take_along_axis(scores, ids, -1)
    want = MOE.scale * picked / picked.sum(-1, keepdims=True)
    np.testing.assert_allclose(weights, want, rtol=1e-5)


def test_bias_takes_no_gradient_and_scores_do():
    def total(scores, bias):
        weights, _ = route_tokens(scores, bias, MOE)
        return jnp.square(weights).sum()

    d_scores, d_bias = jax.jit(jax.grad(total, argnums=(0, 1)))(affinities(), some_bias())
    assert (np.asarray(d_bias) == 0).all()
    _, ids = choose(affinities(), some_bias(), MOE)
    chosen = np.zeros(d_scores.shape, bool)
    np.put_along_axis(chosen, np.asarray(ids), True, axis=-1)
    assert (np.asarray(d_scores)[~chosen] == 0).all() and (np.asarray(d_scores)[chosen] != 0).any()


@pytest.fixture(scope="module")
def moe_layer():
    return build(lambda: MoE(CONFIG, rngs=nnx.Rngs(0)))


def test_moe(moe_layer):
    module, values = moe_layer
    h, w = inputs(), moe_weights(values)
    got, routed = jax.jit(lambda module, h: module(h, Layout()))(module, h)
    stats = router_stats([routed], MOE.top_k, Layout())
    assert_close(got, [reference.moe(rows.astype(float), w, MOE) for rows in h])
    load, balance = np.zeros(MOE.n_experts), 0.0
    for rows in h:
        scores = reference.affinities(rows.astype(float), w["router"])
        chosen = [reference.route(row, w["bias"], MOE) for row in scores]
        balance += reference.sequence_balance(scores, chosen, MOE.top_k)
        for experts in chosen:
            load[list(experts)] += 1
    np.testing.assert_array_equal(stats.load, load)
    np.testing.assert_allclose(stats.balance, balance, rtol=1e-5)
    assert int(stats.n_received) == BATCH * LENGTH * MOE.top_k and int(stats.rounds) == 1


def test_moe_without_shared_experts():
    config = dataclasses.replace(CONFIG, moe=dataclasses.replace(MOE, n_shared=0))
    module, values = build(lambda: MoE(config, rngs=nnx.Rngs(0)))
    h = inputs()
    shared = dict.fromkeys(("shared.gate_up.kernel", "shared.down.kernel"), np.zeros((20, 2)))
    want = [
        reference.moe(rows.astype(float), moe_weights(values | shared), config.moe) for rows in h
    ]
    assert_close(jax.jit(lambda module, h: module(h, Layout())[0])(module, h), want)


def test_tokens_without_finite_logits_are_not_routed(moe_layer):
    """Counted, given to no expert, and of no effect on other tokens."""
    module, _ = moe_layer
    run = jax.jit(lambda module, h: module(h, Layout()))
    h = inputs()
    whole, _ = run(module, h)
    h[0, 3, 1], h[1, 0, 2] = np.nan, np.inf
    y, routed = run(module, h)
    lost = np.zeros((BATCH, LENGTH), bool)
    lost[0, 3] = lost[1, 0] = True
    n_pairs = (BATCH * LENGTH - 2) * MOE.top_k
    assert int(routed.n_nonfinite) == 2
    assert int(routed.n_received) == int(routed.counts.sum()) == n_pairs
    np.testing.assert_allclose(y[~lost], whole[~lost], rtol=1e-6)


def test_sequence_balance():
    """Equal to the twin; 1 a sequence when all is balanced, up to E when one expert has it all."""
    rng = np.random.default_rng(7)
    scores = rng.uniform(0.1, 0.9, size=(BATCH, LENGTH, 6)).astype(np.float32)
    ids = np.argsort(rng.normal(size=scores.shape))[..., :3].astype(np.int32)

    @jax.jit
    def run(scores, ids):
        counts = jax.vmap(expert_counts, in_axes=(0, None))(ids, scores.shape[-1])
        affinity = (scores / scores.sum(-1, keepdims=True)).sum(1)
        return sequence_balance_loss(counts, affinity, ids.shape[-1])

    want = sum(reference.sequence_balance(scores[b].astype(float), ids[b], 3) for b in range(BATCH))
    np.testing.assert_allclose(run(scores, ids), want, rtol=1e-5)
    even = np.arange(6, dtype=np.int32).reshape(1, 2, 3)
    np.testing.assert_allclose(run(np.full((1, 2, 6), 0.5, np.float32), even), 1.0, rtol=1e-6)
    one = np.zeros((1, 2, 6), np.float32) + np.eye(6, dtype=np.float32)[4]
    np.testing.assert_allclose(run(one, np.full((1, 2, 1), 4, np.int32)), 6.0, rtol=1e-6)


# Number formats


@pytest.mark.parametrize(
    "make, run",
    [
        (lambda: MLA(CONFIG, rngs=nnx.Rngs(0)), lambda module, h: attend(module, h, positions())),
        (lambda: SwiGLU(20, 11, 0.1, rngs=nnx.Rngs(0)), lambda module, h: module(h)),
        (lambda: MoE(CONFIG, rngs=nnx.Rngs(0)), lambda module, h: module(h, Layout())[0]),
    ],
    ids=["mla", "swiglu", "moe"],
)
def test_layers_in_bfloat16(make, run):
    module, _ = build(make)
    h = jnp.asarray(inputs(), jnp.bfloat16)

    @nnx.jit
    def both(module, h):
        return run(in_bfloat16(module), h), run(module, h.astype(jnp.float32))

    narrow, wide = both(module, h)
    assert narrow.dtype == jnp.bfloat16 and wide.dtype == jnp.float32
    assert_close(narrow, wide, 2e-2)


def test_router_stays_float32(moe_layer):
    h = jnp.asarray(inputs(), jnp.bfloat16)
    logits = jax.jit(lambda module, h: module.router_logits(h))
    got, want = logits(in_bfloat16(moe_layer[0]), h), logits(moe_layer[0], np.float32(h))
    assert got.dtype == jnp.float32
    np.testing.assert_array_equal(got, want)


def test_norm_rounds_once():
    """From bfloat16 to bfloat16 by way of float32."""
    norm, values = build(lambda: RMSNorm(CONFIG.width, 1e-3))
    h = jnp.asarray(inputs(), jnp.bfloat16)
    got = jax.jit(norm)(h)
    assert got.dtype == jnp.bfloat16
    exact = reference.rms_norm(np.asarray(h, np.float64), values["scale"], 1e-3)
    rounding = np.abs(exact) * 2.0**-8  # half a unit in the last place of bfloat16
    assert (np.abs(np.asarray(got, np.float64) - exact) <= rounding * 1.001).all()
