"""The whole model: the MTP chain and its loss against the twin, causality, the bfloat16 policy."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from reference import layers as reference
from reference.cases import (
    ATTENTION,
    BATCH,
    BF16,
    CONFIG,
    LENGTH,
    MOE,
    assert_close,
    build,
    in_bfloat16,
    mtp_weights,
)

from dsv3_jax.config import LossConfig
from dsv3_jax.losses import Batch, next_token_loss, training_loss
from dsv3_jax.model.deepseek import DeepSeekV3
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.params import named_arrays
from sharding.layout import Layout

DEPTH = CONFIG.mtp_depth
N_TOKENS = LENGTH + DEPTH  # that the model reads; one more is a target only
MTP_WEIGHT = 0.3


@pytest.fixture(scope="module")
def whole():
    return build(lambda: DeepSeekV3(CONFIG, Policy(), rngs=nnx.Rngs(0)))


@pytest.fixture(scope="module")
def batch():
    """Row 0 is random, row j + 1 has another token j."""
    rng = np.random.default_rng(8)
    base = rng.integers(CONFIG.vocab_size, size=N_TOKENS + 1).astype(np.int32)
    tokens = np.tile(base, (N_TOKENS + 1, 1))
    for j in range(N_TOKENS):
        tokens[j + 1, j] = (base[j] + 5) % CONFIG.vocab_size
    return Batch(tokens, rng.uniform(size=tokens.shape) < 0.7)


@pytest.fixture(scope="module")
def results(whole, batch):
    """Hidden states of the trunk, those of every MTP depth, and the losses."""

    @nnx.jit
    def run(model, batch):
        hidden, _ = model.hidden_states(batch.tokens[:, :LENGTH])
        shifted_tokens = [batch.tokens[:, k : k + LENGTH] for k in range(1, DEPTH + 1)]
        ahead, _ = model.mtp_hidden_states(hidden, jnp.stack(shifted_tokens))
        loss_fn = next_token_loss(LossConfig(mtp_weight=MTP_WEIGHT), DEPTH)
        seen = jnp.float32(0)
        losses, _ = training_loss(model, batch, loss_fn, 0.01, seen, Layout(), "none")
        return hidden, ahead, losses

    return run(whole[0], batch)


@pytest.fixture(scope="module")
def chains(whole, batch, results):
    """The twin's MTP chain, from the trunk's hidden states: [depth, row, position, width]."""
    modules = [mtp_weights(whole[1], k) for k in range(DEPTH)]
    rows = [
        reference.mtp_chain(
            hidden, tokens[:N_TOKENS], whole[1]["embedding"], modules, ATTENTION, MOE, 1e-3
        )
        for hidden, tokens in zip(np.asarray(results[0], np.float64), batch.tokens, strict=True)
    ]
    return np.stack(rows, axis=1)


def test_mtp(results, chains):
    assert_close(results[1], chains)


def test_losses(whole, batch, results, chains):
    """Each depth predicts one token further on, over the tokens that its mask leaves."""
    hidden, _, losses = results

    def mean_loss(hidden, ahead):
        there = slice(ahead, ahead + LENGTH)
        rows = np.asarray(hidden, np.float64).reshape(-1, CONFIG.width)
        labels, mask = (x[:, there].reshape(-1) for x in batch[:2])
        return reference.cross_entropy(rows, whole[1]["head"], labels, mask)

    main, mtp = mean_loss(hidden, 1), (mean_loss(chains[0], 2) + mean_loss(chains[1], 3)) / 2
    np.testing.assert_allclose(losses.terms["loss"], main, rtol=1e-5)
    np.testing.assert_allclose(losses.terms["mtp_loss"], mtp, rtol=1e-5)
    total = main + MTP_WEIGHT * mtp + 0.01 * float(losses.terms["balance_loss"])
    np.testing.assert_allclose(losses.total, total, rtol=1e-5)
    n_moe = CONFIG.n_layers - CONFIG.n_dense + DEPTH
    assert 0.8 * n_moe < losses.terms["balance_loss"] < 2 * n_moe  # 1 a layer when balanced


@pytest.mark.parametrize("depth", range(DEPTH + 1))
def test_causality(results, depth):
    """Position i sees the tokens up to i + depth (0: the trunk): those, and no further ones."""
    hidden = np.asarray(results[1][depth - 1] if depth else results[0])
    change = np.abs(hidden - hidden[:1]).max(-1)  # [changed token + 1, position]
    for token in range(N_TOKENS):
        first = max(token - depth, 0)  # the first position that may change
        assert (change[token + 1, :first] <= 1e-5).all(), token
        if first < LENGTH:
            assert change[token + 1, first] > 1e-3, token


def test_bfloat16_policy_is_close_to_float32():
    """Every token chooses every expert here, so that no choice can turn over."""
    every = dataclasses.replace(MOE, n_groups=1, topk_groups=1, top_k=MOE.n_experts)
    config = dataclasses.replace(CONFIG, moe=every, mtp_depth=0)
    wide, _ = build(lambda: DeepSeekV3(config, Policy(), rngs=nnx.Rngs(0)))
    narrow, _ = build(lambda: DeepSeekV3(config, BF16, rngs=nnx.Rngs(0)))
    tokens = np.random.default_rng(10).integers(22, size=(BATCH, LENGTH)).astype(np.int32)

    @nnx.jit
    def run(model, tokens):
        hidden, _ = model.hidden_states(tokens)
        return hidden, model.logits(hidden)

    (hidden, logits), (want_hidden, want_logits) = run(narrow, tokens), run(wide, tokens)
    assert (hidden.dtype, want_hidden.dtype) == (jnp.bfloat16, jnp.float32)
    assert (logits.dtype, want_logits.dtype) == (jnp.float32, jnp.float32)
    assert_close(hidden, want_hidden, 2e-2)
    assert_close(logits, want_logits, 2e-2)


def test_what_bfloat16_leaves_wide(whole):
    """Router, biases, norm scales, and the embedding, whose rows are rounded when looked up."""
    in_use = nnx.eval_shape(in_bfloat16, whole[0])
    types = {path: x.dtype for path, x in named_arrays(nnx.state(in_use)).items()}
    wide = {path for path, dtype in types.items() if dtype == jnp.float32}
    kinds = ("router", "bias", "scale", "embedding")
    assert wide == {path for path in types if path.rsplit(".", 1)[-1] in kinds}
    assert {types[path] for path in types.keys() - wide} == {jnp.dtype("bfloat16")}
