"""The optimizer against NumPy: the report's rates by tokens, one AdamW, the switches, the bias."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from configs import load_preset
from dsv3_jax.config import LossConfig, OptimizerConfig
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.optimizer import make_optimizer, stored_as, updated_bias
from dsv3_jax.schedules import BatchSizes, bias_update_speed, learning_rate, mtp_weight

BF16 = Policy(moments=jnp.dtype("bfloat16"))


def report_rate(update: int, tokens: float) -> float:
    """Learning rate of the `update`-th update (from 1) after so many tokens, report sec. 4.2."""
    if update <= 2000:
        return 2.2e-4 * update / 2000
    if tokens <= 10e12:
        return 2.2e-4
    if tokens <= 14.3e12:
        angle = np.pi * (tokens - 10e12) / 4.3e12
        return 2.2e-5 + (2.2e-4 - 2.2e-5) * (1 + np.cos(angle)) / 2
    return 2.2e-5 if tokens < 14.3e12 + 333e9 else 7.3e-6


def rates(config: OptimizerConfig, steps, tokens_per_step: int):
    def rate(step):
        return learning_rate(config, step, step.astype(jnp.float32) * tokens_per_step)

    return jax.jit(jax.vmap(rate))(jnp.asarray(steps))


def test_rates_of_the_preset():
    """Around every bend of the 671B run, and between them."""
    config = load_preset("dsv3_671b")
    per_step = config.train.batch * config.train.seq_len
    tokens = np.array(
        [5e12, 9.99e12, 10.01e12, 11e12, 12.15e12, 13.5e12, 14.29e12]
        + [14.31e12, 14.5e12, 14.632e12, 14.634e12, 14.79e12]
    )
    updates = np.array([1, 2, 1000, 1999, 2000, 2001, 3000, *np.round(tokens / per_step)], int)
    want = [report_rate(update, (update - 1) * per_step) for update in updates]
    got = rates(config.optimizer, updates - 1, per_step)
    # float32 holds 1e13 tokens to 1e6, where the cosine moves by 1e-6 of itself
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_rate_takes_named_values():
    """The middle of the cosine and the plateaus, without the twin."""
    got = rates(OptimizerConfig(), [9_000, 12_150, 14_400, 14_700, 99_000], 1_000_000_000)
    np.testing.assert_allclose(got, [2.2e-4, 1.21e-4, 2.2e-5, 7.3e-6, 7.3e-6], rtol=1e-5)


def test_preset_ends_at_its_last_token():
    config = load_preset("dsv3_671b")
    sequences = BatchSizes.of(config.train).sequences(config.train.steps)
    np.testing.assert_allclose(sequences * config.train.seq_len, 14.8e12, rtol=1e-5)


CONFIG = OptimizerConfig(peak_lr=0.01, warmup_steps=2, weight_decay=0.3, clip=1.5)


def variables(seed: int, scale: float) -> nnx.State:
    """A matrix, two stacked matrices, a norm scale, and the norm scales of two layers."""
    rng = np.random.default_rng(seed)
    sizes = {"matrix": (4, 3), "stacked": (3, 5), "norm": (7,), "norms": (6,)}
    stack = {"stacked": (2,), "norms": (2,)}
    return nnx.State(
        {
            name: nnx.Param(
                jnp.asarray(scale * rng.normal(size=(*stack.get(name, ()), *size)), jnp.float32),
                axes=("norm",) * len(size),
                global_shape=size,
            )
            for name, size in sizes.items()
        }
    )


def arrays(state) -> dict[str, np.ndarray]:
    return {name: np.asarray(x[...], np.float64) for name, x in state.items()}


def reference_adamw(params, gradients, config, decayed):
    """AdamW (arXiv 1711.05101, algorithm 2) after clipping by the norm of all gradients."""
    m, v = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    for t, grads in enumerate(gradients, 1):
        norm = np.sqrt(sum((g**2).sum() for g in grads.values()))
        rate = config.peak_lr * min(t / config.warmup_steps, 1.0)
        for name, g in grads.items():
            g = g * config.clip / max(norm, config.clip)
            m[name] = config.b1 * m[name] + (1 - config.b1) * g
            v[name] = config.b2 * v[name] + (1 - config.b2) * g**2
            mean, square = m[name] / (1 - config.b1**t), v[name] / (1 - config.b2**t)
            decay = config.weight_decay * params[name] if name in decayed else 0.0
            params[name] = params[name] - rate * (mean / (np.sqrt(square) + config.eps) + decay)
    return params


def run(params, gradients, policy):
    optimizer = make_optimizer(CONFIG, policy)

    @jax.jit
    def steps(params, gradients):
        state = optimizer.init(params)
        for grads in gradients:
            rate = learning_rate(CONFIG, optax.tree.get(state, "count"), jnp.float32(0.0))
            updates, state = optimizer.update(grads, state, params)
            updates = optax.tree.scale(rate, updates)
            params = optax.apply_updates(params, updates)
        return params, state

    return steps(params, gradients)


def test_adamw_matches_reference():
    """Three steps; the first gradient is over the clip norm, the others are under it."""
    params, gradients = variables(0, 1.0), [variables(k + 1, s) for k, s in enumerate([3, 0.1, 0])]
    norms = [np.sqrt(sum((g**2).sum() for g in arrays(x).values())) for x in gradients]
    assert norms[0] > CONFIG.clip > norms[1] > norms[2] == 0
    got, _ = run(params, gradients, Policy())
    wide = [arrays(x) for x in gradients]
    want = reference_adamw(arrays(params), wide, CONFIG, {"matrix", "stacked"})
    for name, value in arrays(got).items():
        np.testing.assert_allclose(value, want[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_norm_scales_are_not_decayed():
    """Without a gradient only decay moves a parameter."""
    params = variables(0, 1.0)
    got, _ = run(params, [variables(1, 0.0)], Policy())
    before, after = arrays(params), arrays(got)
    for name in ("norm", "norms"):
        np.testing.assert_array_equal(after[name], before[name])
    kept = 1 - CONFIG.peak_lr / CONFIG.warmup_steps * CONFIG.weight_decay
    for name in ("matrix", "stacked"):
        np.testing.assert_allclose(after[name], kept * before[name], rtol=1e-6)


def test_moments_are_stored_in_bfloat16():
    params, gradients = variables(0, 1.0), [variables(k + 1, 1.0) for k in range(2)]
    got, state = run(params, gradients, BF16)
    exact, wide = run(params, gradients, Policy())
    floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, jnp.floating)]
    assert len(floats) == 2 * len(arrays(params))  # both moments of each parameter
    assert {x.dtype for x in floats} == {jnp.dtype("bfloat16")}
    assert all(x.dtype == jnp.int32 for x in jax.tree.leaves(state) if x.ndim == 0)  # counts
    assert {x.dtype for x in jax.tree.leaves(got)} == {jnp.dtype("float32")}  # master weights
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(wide), strict=True):
        scale = np.abs(np.asarray(other, np.float32)).max()
        np.testing.assert_allclose(np.float32(one), np.float32(other), rtol=2e-2, atol=1e-2 * scale)
    for name, moved in arrays(got).items():
        move, exact_move = moved - arrays(params)[name], arrays(exact)[name] - arrays(params)[name]
        np.testing.assert_allclose(move, exact_move, atol=2e-2 * np.abs(exact_move).max())


def test_stored_as_rounds_between_updates_only():
    """The first update comes from moments that nobody has rounded yet."""
    params, gradients = variables(0, 1.0), [variables(1, 1.0)]
    got, _ = run(params, gradients, BF16)
    exact, _ = run(params, gradients, Policy())
    for name, value in arrays(got).items():
        np.testing.assert_allclose(value, arrays(exact)[name], rtol=1e-6, err_msg=name)


def test_stored_as_leaves_integers_and_structure():
    inner = make_optimizer(CONFIG, Policy())
    params = variables(0, 1.0)
    shapes = jax.eval_shape(inner.init, params)
    stored = jax.eval_shape(stored_as(inner, BF16.moments).init, params)
    assert jax.tree.structure(shapes) == jax.tree.structure(stored)
    for one, other in zip(jax.tree.leaves(shapes), jax.tree.leaves(stored), strict=True):
        wide = jnp.issubdtype(one.dtype, jnp.floating)
        assert other.dtype == (jnp.bfloat16 if wide else one.dtype) and other.shape == one.shape


@pytest.mark.parametrize(
    "tokens, weight, rate",
    [(0, 0.3, 1e-3), (9.99e12, 0.3, 1e-3), (10.01e12, 0.1, 1e-3), (14.29e12, 0.1, 1e-3)]
    + [(14.31e12, 0.1, 0.0), (14.8e12, 0.1, 0.0)],
)
def test_switches(tokens, weight, rate):
    config, tokens = LossConfig(), jnp.float32(tokens)
    np.testing.assert_allclose(mtp_weight(config, tokens), weight, rtol=1e-6)
    np.testing.assert_allclose(bias_update_speed(config, tokens), rate, rtol=1e-6)


def test_bias_moves_against_the_load():
    load = np.array([[5, 1, 3, 3], [0, 0, 8, 0], [2, 2, 2, 2]], np.float32)
    bias = np.random.default_rng(0).normal(size=load.shape).astype(np.float32)
    got = updated_bias(bias, load, jnp.float32(0.25))
    moves = np.zeros_like(bias)
    for layer in range(len(load)):
        mean = sum(load[layer]) / 4
        for expert in range(4):
            above = load[layer, expert] - mean
            moves[layer, expert] = -0.25 if above > 0 else 0.25 if above < 0 else 0.0
    np.testing.assert_allclose(got, bias + moves, rtol=1e-6)
    assert (moves[2] == 0).all() and (moves[1] == [0.25, 0.25, -0.25, 0.25]).all()


def test_stopped_bias_stays():
    load, bias = jnp.array([[5.0, 1.0]]), jnp.array([[0.5, -0.5]])
    stopped = bias_update_speed(LossConfig(), jnp.float32(14.5e12))
    np.testing.assert_array_equal(updated_bias(bias, load, stopped), bias)
