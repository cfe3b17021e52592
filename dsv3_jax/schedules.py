"""How many sequences a step takes: the batch grows by steps over the first tokens (sec. 4.2)."""

import dataclasses
import math
from itertools import accumulate

import jax.numpy as jnp

from dsv3_jax.config import Config, TrainConfig
from dsv3_jax.shapes import Array, Float32, Int


@dataclasses.dataclass(frozen=True)
class BatchSizes:
    """`sizes[i]` sequences a step from step `starts[i]` on; the last for ever."""

    starts: tuple[int, ...]
    sizes: tuple[int, ...]
    seq_len: int

    @classmethod
    def of(cls, train: TrainConfig) -> "BatchSizes":
        """Sizes in even steps from `first_batch` to `batch`; all but the last see as many tokens.

        A size stays for a whole number of steps, and at least one.
        """
        n, last = train.batch_sizes, train.batch
        first = train.first_batch or last
        if first >= last:
            return cls((0,), (last,), train.seq_len)
        sizes = tuple(first + (last - first) * i // (n - 1) for i in range(n))
        each = train.ramp_tokens / (n - 1)
        lengths = (max(1, round(each / (size * train.seq_len))) for size in sizes[:-1])
        return cls((0, *accumulate(lengths)), sizes, train.seq_len)

    def size(self, step: int) -> int:
        """Sequences of step number `step` (from 0)."""
        found = [size for start, size in zip(self.starts, self.sizes, strict=True) if start <= step]
        return found[-1]

    def sequences(self, step: int) -> int:
        """Sequences of all steps before step number `step`."""
        ends = (*self.starts[1:], max(step, self.starts[-1]))
        spans = zip(self.sizes, self.starts, ends, strict=True)
        return sum(size * min(max(step - start, 0), end - start) for size, start, end in spans)

    def step_at(self, tokens: float) -> int:
        """The first step before which at least so many tokens have been seen."""
        wanted = tokens / self.seq_len
        begun = [start for start in self.starts if start == 0 or self.sequences(start) < wanted]
        return begun[-1] + math.ceil((wanted - self.sequences(begun[-1])) / self.size(begun[-1]))

    def tokens(self, step: Int[Array, ""]) -> Float32[Array, ""]:
        """Tokens before a step that is known on the device only."""
        ends = (*self.starts[1:], jnp.inf)
        spans = zip(self.sizes, self.starts, ends, strict=True)
        at = step.astype(jnp.float32)
        return sum(
            size * self.seq_len * jnp.clip(at - start, 0.0, end - start)
            for size, start, end in spans
        )


def with_batch(config: Config, batch: int) -> Config:
    """The config with that batch from the beginning."""
    train = dataclasses.replace(config.train, batch=batch, first_batch=None)
    return dataclasses.replace(config, train=train)
