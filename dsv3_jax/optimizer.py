"""The updates of a step: AdamW for parameters, a step of fixed size for the balance bias.

AdamW here has learning rate 1, and the training step multiplies its updates by the rate: the rate
depends on the tokens seen, which grow with the batch, while optax's own schedules count updates.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from dsv3_jax.config import OptimizerConfig
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.shapes import Array, Float32


def make_optimizer(config: OptimizerConfig, policy: Policy) -> optax.GradientTransformation:
    """Return clipping by global norm, then AdamW of learning rate 1 (report sec. 4.2).

    Moments are stored in the format of the policy. Vectors (norm scales) are not decayed.
    """
    adamw = optax.adamw(
        1.0,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mask=_is_decayed,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip), stored_as(adamw, policy.moments))


def _is_decayed(params: nnx.State):
    return jax.tree.map(
        lambda variable: len(variable.global_shape) > 1,
        params,
        is_leaf=lambda x: isinstance(x, nnx.Variable),
    )


def stored_as(
    inner: optax.GradientTransformation, dtype: jnp.dtype
) -> optax.GradientTransformation:
    """Return `inner` with the floating-point arrays of its state held in `dtype` between updates.

    The updates themselves are computed in float32.
    """

    def cast(state, dtype):
        return jax.tree.map(
            lambda x: x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
        )

    def init(params):
        return cast(inner.init(params), dtype)

    def update(grads, state, params=None):
        updates, state = inner.update(grads, cast(state, jnp.float32), params)
        return updates, cast(state, dtype)

    return optax.GradientTransformation(init, update)


def updated_bias(
    bias: Float32[Array, "L E"], load: Float32[Array, "L E"], speed: Float32[Array, ""]
) -> Float32[Array, "L E"]:
    """Return the balance bias after a step: `speed` more for underloaded experts, else less.

    Args:
        load: tokens per expert over the WHOLE global batch; an expert is underloaded below the
            mean of its layer.
        speed: gamma, from `schedules.bias_update_speed`.

    Source: report sec. 2.1.2, auxiliary-loss-free load balancing.
    """
    return bias + speed * jnp.sign(load.mean(-1, keepdims=True) - load)
