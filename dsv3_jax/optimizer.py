"""AdamW with the report's learning-rate shape (sec. 4.2) and moments in the policy's format."""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsv3_jax.config import LossConfig, OptimizerConfig
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.shapes import Array, Float32, Int


def learning_rate(
    config: OptimizerConfig, step: Int[Array, ""], tokens: Float32[Array, ""]
) -> Float32[Array, ""]:
    """Rate of update number `step` (from 0): linear warm-up, constant, cosine, two plateaus.

    Args:
        tokens: seen before it.
    """
    warm = jnp.minimum((step.astype(jnp.float32) + 1.0) / max(config.warmup_steps, 1), 1.0)
    done = jnp.clip((tokens - config.constant_tokens) / config.decay_tokens, 0.0, 1.0)
    fall = 0.5 * (1.0 + jnp.cos(jnp.pi * done))
    rate = config.decayed_lr + (config.peak_lr - config.decayed_lr) * fall
    return warm * jnp.where(tokens >= config.tail_tokens, config.tail_lr, rate)


def mtp_weight(config: LossConfig, tokens: Float32[Array, ""]) -> Float32[Array, ""]:
    """lambda of the MTP loss after so many tokens."""
    return jnp.where(tokens < config.mtp_late_tokens, config.mtp_weight, config.mtp_weight_late)


def bias_rate(config: LossConfig, tokens: Float32[Array, ""]) -> Float32[Array, ""]:
    """gamma of the balance bias after so many tokens."""
    return jnp.where(tokens < config.bias_stop_tokens, config.bias_update_speed, 0.0)


def moved_bias(
    bias: Float32[Array, "L E"], load: Float32[Array, "L E"], rate: Float32[Array, ""]
) -> Float32[Array, "L E"]:
    """The balance bias after a step: up where an expert had less than the mean load, else down.

    Args:
        load: tokens of each expert over the WHOLE global batch.

    Source: report sec. 2.1.2, auxiliary-loss-free load balancing.
    """
    return bias + rate * jnp.sign(load.mean(-1, keepdims=True) - load)


def make_optimizer(config: OptimizerConfig, policy: Policy) -> optax.GradientTransformation:
    """Clip by global norm, then AdamW; its updates are still to be multiplied by the rate.

    Vectors (norm scales) are not decayed.
    """
    adamw = optax.adamw(
        1.0,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_decayed,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), stored_as(adamw, policy.moments))


def _decayed(params: nnx.State):
    return jax.tree.map(
        lambda variable: len(variable.global_shape) > 1,
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def stored_as(
    inner: optax.GradientTransformation, dtype: jnp.dtype
) -> optax.GradientTransformation:
    """`inner` with the float arrays of its state held in `dtype` between updates."""

    def cast(state, to):
        return jax.tree.map(
            lambda x: x.astype(to) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
        )

    def init(params):
        return cast(inner.init(params), dtype)

    def update(grads, state, params=None):
        updates, state = inner.update(grads, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)
