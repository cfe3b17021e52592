"""A loss of one's own: a policy gradient by `make_step` on every kind of mesh, and by hand.

Float32: losses agree to 1e-5, updates to 1e-5 of the largest number of each tensor.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from reference.small_step import LENGTH, VOCAB, placed
from reference.stages import config_with, parameters

from dsv3_jax.losses import LossFn, next_token_log_probs, target_counts, target_mask
from dsv3_jax.model.deepseek import abstract_model
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.training.state import new_state, split_model
from dsv3_jax.training.step import Metrics, make_step

N_ROWS = 8


class Episodes(NamedTuple):
    """Prompts and completions; `loss_mask` marks completions, two documents share a row."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    doc_start: np.ndarray
    advantages: np.ndarray


def policy_gradient() -> LossFn:
    """REINFORCE: minus the mean over completion tokens of advantage * log pi(token)."""

    def prepare(batch, tokens_seen, layout):
        return target_counts(batch, 1, layout)[0]

    def from_hidden(model, hidden, batch, n_targets, layout, remat):
        log_probs = next_token_log_probs(model, hidden, batch, layout)
        mask = target_mask(batch, 0, hidden.shape[1], layout)
        loss = -(mask * batch.advantages[:, 1:] * log_probs).sum() / n_targets
        return loss, {"loss": loss, "log_prob": (mask * log_probs).sum() / n_targets}, None

    return LossFn(prepare, from_hidden)


def config():
    return config_with(5, N_ROWS, "pipeline.schedule=dualpipe", "losses.balance_weight=0.05")


def episodes() -> Episodes:
    rng = np.random.default_rng(0)
    shape = (N_ROWS, LENGTH + 1)
    cut = LENGTH // 2 - 1
    doc_start = np.where(np.arange(shape[1])[None, :] < cut, 0, cut)
    return Episodes(
        rng.integers(0, VOCAB, shape, np.int32),
        rng.uniform(size=shape) < np.linspace(0.2, 0.9, N_ROWS)[:, None],
        np.broadcast_to(doc_start, shape).astype(np.int32),
        rng.normal(size=shape).astype(np.float32),
    )


@functools.cache
def step_on(mesh: str) -> tuple[Metrics, nnx.State, nnx.State]:
    """Metrics of a step of gradient descent, the change of parameters, and the biases.

    The rate is so high that a change is a gradient, whatever rounding the parameter has.
    """
    optimizer, (params, bias) = optax.sgd(1e4), parameters(config())
    step = make_step(config(), optimizer, *placed(mesh, config()), policy_gradient())
    state, metrics = step(new_state(params, bias, optimizer), episodes())
    change = jax.tree.map(lambda new, old: np.asarray(new) - old, state.params, params)
    return jax.tree.map(np.asarray, metrics), change, jax.tree.map(np.asarray, state.bias)


def test_value():
    batch = episodes()
    graphdef, *_ = split_model(abstract_model(config().model, Policy.of(config().precision)))
    model = nnx.merge(graphdef, *jax.tree.map(jnp.asarray, parameters(config())))
    logits = np.asarray(model(batch.tokens[:, :-1], doc_start=batch.doc_start[:, :-1]), np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    log_probs = np.take_along_axis(log_probs, batch.tokens[:, 1:, None], 2)[..., 0]
    mask = batch.loss_mask[:, 1:] & (batch.doc_start[:, 1:] <= np.arange(LENGTH))
    losses = step_on("dp1")[0].losses
    want = -(mask * batch.advantages[:, 1:] * log_probs).sum() / mask.sum()
    np.testing.assert_allclose(losses.terms["loss"], want, rtol=1e-5)
    np.testing.assert_allclose(losses.terms["log_prob"], log_probs[mask].mean(), rtol=1e-5)
    total = want + 0.05 * losses.terms["balance_loss"]
    np.testing.assert_allclose(losses.total, total, rtol=1e-5)


@pytest.mark.parametrize("mesh", [pytest.param("dp2,ep2", marks=pytest.mark.slow), "pp2,ep2"])
def test_is_the_same_on_every_mesh(mesh):
    (want, wanted, want_bias), (got, change, bias) = step_on("dp1"), step_on(mesh)
    assert sorted(got.losses.terms) == ["balance_loss", "log_prob", "loss"]
    for one, other in zip(*map(jax.tree.leaves, (got.losses, want.losses)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5)
    np.testing.assert_array_equal(got.router.load, want.router.load)
    for (path, one), other in zip(
        jax.tree.leaves_with_path(change), jax.tree.leaves(wanted), strict=True
    ):
        error, size = np.abs(one - other).max(), np.abs(other).max()
        name = jax.tree_util.keystr(path)
        assert (size > 0) == ("mtp" not in name), name  # the loss runs no MTP
        assert error <= 1e-5 * size, f"{name}: off by {error}, largest {size}"
    jax.tree.map(np.testing.assert_array_equal, bias, want_bias)
