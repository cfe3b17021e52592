"""The schedules of the report (sec. 4.2): batch size, learning rate, MTP weight, bias speed.

All are functions of the tokens seen, not of steps, which differ in tokens while the batch grows.
"""

import dataclasses
import math
from itertools import accumulate

import jax.numpy as jnp

from dsv3_jax.config import Config, LossConfig, OptimizerConfig, TrainConfig
from dsv3_jax.shapes import Array, Float32, Int


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """The batch size of every step: `sizes[i]` sequences from step `starts[i]` on."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    seq_len: int

    @classmethod
    def of(cls, train: TrainConfig) -> "BatchSizes":
        """Return evenly spaced sizes from `first_batch` to `batch`.

        All sizes but the last see equally many tokens, up to the rounding to whole steps. Each
        lasts at least one step.
        """
        n, last = train.batch_sizes, train.batch
        first = train.first_batch or last
        if first >= last:
            return cls((0,), (last,), train.seq_len)
        sizes = tuple(first + (last - first) * i // (n - 1) for i in range(n))
        tokens_per_size = train.ramp_tokens / (n - 1)
        n_steps = (max(1, round(tokens_per_size / (size * train.seq_len))) for size in sizes[:-1])
        return cls((0, *accumulate(n_steps)), sizes, train.seq_len)

    def size(self, step: int) -> int:
        """Return the sequences of step number `step` (from 0)."""
        found = [size for start, size in zip(self.starts, self.sizes, strict=True) if start <= step]
        return found[-1]

    def sequences(self, step: int) -> int:
        """Return the sequences of all steps before step number `step`."""
        ends = (*self.starts[1:], max(step, self.starts[-1]))
        spans = zip(self.sizes, self.starts, ends, strict=True)
        return sum(size * min(max(step - start, 0), end - start) for size, start, end in spans)

    def step_at(self, tokens: float) -> int:
        """Return the first step before which at least `tokens` tokens have been seen."""
        wanted = tokens / self.seq_len
        begun = [start for start in self.starts if start == 0 or self.sequences(start) < wanted]
        return begun[-1] + math.ceil((wanted - self.sequences(begun[-1])) / self.size(begun[-1]))

    def tokens(self, step: Int[Array, ""]) -> Float32[Array, ""]:
        """Return the tokens seen before a step whose number is on the device."""
        ends = (*self.starts[1:], jnp.inf)
        spans = zip(self.sizes, self.starts, ends, strict=True)
        at = step.astype(jnp.float32)
        return sum(
            size * self.seq_len * jnp.clip(at - start, 0.0, end - start)
            for size, start, end in spans
        )


def with_batch(config: Config, batch: int) -> Config:
    """Return `config` with this batch size from the first step on."""
    train = dataclasses.replace(config.train, batch=batch, first_batch=None)
    return dataclasses.replace(config, train=train)


def learning_rate(
    config: OptimizerConfig, step: Int[Array, ""], tokens: Float32[Array, ""]
) -> Float32[Array, ""]:
    """Return the rate of update number `step` (from 0), before which `tokens` tokens were seen.

    Linear warm-up, constant, cosine decay, and two plateaus.
    """
    warmup = jnp.minimum((step.astype(jnp.float32) + 1.0) / max(config.warmup_steps, 1), 1.0)
    decayed = jnp.clip((tokens - config.constant_tokens) / config.decay_tokens, 0.0, 1.0)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * decayed))
    rate = config.decayed_lr + (config.peak_lr - config.decayed_lr) * cosine
    return warmup * jnp.where(tokens >= config.tail_tokens, config.tail_lr, rate)


def mtp_weight(config: LossConfig, tokens: Float32[Array, ""]) -> Float32[Array, ""]:
    """Return lambda, the weight of the MTP loss, after `tokens` tokens."""
    return jnp.where(tokens < config.mtp_late_tokens, config.mtp_weight, config.mtp_weight_late)


def bias_update_speed(config: LossConfig, tokens: Float32[Array, ""]) -> Float32[Array, ""]:
    """Return gamma, the change of the balance bias per step, after `tokens` tokens."""
    return jnp.where(tokens < config.bias_stop_tokens, config.bias_update_speed, 0.0)
