"""The recipe of a run: its phases, from one change to the next, in tokens (report sec. 4.2)."""

from typing import NamedTuple

import jax.numpy as jnp

from dsv3_jax.config import Config
from dsv3_jax.schedules import BatchSizes, bias_update_speed, learning_rate, mtp_weight


class Phase(NamedTuple):
    """A range of tokens within which no schedule has a kink."""

    start: float  # in tokens
    stop: float
    batch: int  # sequences per step
    first_lr: float  # learning rates
    last_lr: float
    mtp_weight: float  # lambda
    bias_update_speed: float  # gamma


def phases(config: Config) -> list[Phase]:
    """Return the phases of the whole run."""
    optimizer, losses, sizes = config.optimizer, config.losses, BatchSizes.of(config.train)

    def tokens_before(step: int) -> float:
        return float(sizes.sequences(step) * config.train.seq_len)

    changes = {
        *map(tokens_before, sizes.starts),
        tokens_before(optimizer.warmup_steps),
        optimizer.constant_tokens,
        optimizer.constant_tokens + optimizer.decay_tokens,
        optimizer.tail_tokens,
        losses.mtp_late_tokens,
        losses.bias_stop_tokens,
        total := tokens_before(config.train.steps),
    }
    bounds = sorted(tokens for tokens in changes if tokens <= total)
    found = []
    for start, stop in zip(bounds[:-1], bounds[1:], strict=True):
        first = sizes.step_at(start)
        last = max(sizes.step_at(stop) - 1, first)
        steps = map(jnp.int32, (first, last))
        rates = (float(learning_rate(optimizer, step, sizes.tokens(step))) for step in steps)
        tokens = jnp.float32(start)
        now = (mtp_weight(losses, tokens), bias_update_speed(losses, tokens))
        found.append(Phase(start, stop, sizes.size(first), *rates, *map(float, now)))
    return found
