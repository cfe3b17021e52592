"""The recipe of a run as a table: what changes when, counted in tokens (report sec. 4.2)."""

from typing import NamedTuple

import jax.numpy as jnp

from dsv3_jax.config import Config
from dsv3_jax.optimizer import bias_rate, learning_rate, mtp_weight


class Phase(NamedTuple):
    """A stretch of tokens in which one thing happens to the learning rate."""

    start: float  # tokens seen
    stop: float
    first_rate: float  # learning rates
    last_rate: float
    mtp_weight: float  # lambda
    bias_rate: float  # gamma


def phases(config: Config) -> list[Phase]:
    """Of the whole run, from one change to the next."""
    optimizer, losses = config.optimizer, config.losses
    step = config.train.batch * config.train.seq_len
    total = float(config.train.steps * step)
    changes = {
        0.0,
        float(optimizer.warmup_steps * step),
        optimizer.constant_tokens,
        optimizer.constant_tokens + optimizer.decay_tokens,
        optimizer.tail_tokens,
        losses.mtp_late_tokens,
        losses.bias_stop_tokens,
        total,
    }
    places = sorted(tokens for tokens in changes if tokens <= total)
    found = []
    for start, stop in zip(places[:-1], places[1:], strict=True):
        first = int(-(-start // step))
        last = max(int(stop // step) - 1, first)
        rates = (float(learning_rate(optimizer, at, step)) for at in (first, last))
        seen = jnp.float32(start)
        now = (float(mtp_weight(losses, seen)), float(bias_rate(losses, seen)))
        found.append(Phase(start, stop, *rates, *now))
    return found
