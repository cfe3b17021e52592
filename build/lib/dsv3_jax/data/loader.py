"""Endless shuffled batches that any number of processes share and that resume exactly."""

from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Int32

from dsv3_jax.data.packing import PackedRows

Batch = dict[str, Int32[np.ndarray, "b row"]]

# Two batches are made in threads while the device works on one.
READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)


class Loader:
    """Process `index` of `count`'s share of every global batch, for ever: {"tokens": rows}.

    The rows of an epoch come once each, in an order of the epoch's own. The sequence of global
    batches does not depend on `count`: process p takes the p-th of `count` equal slices of each
    batch, and reads no other row.

    Args:
        batch: rows of a global batch.
        process: this process's index, and the number of processes.

    Raises:
        ValueError: the processes cannot share a batch equally.
    """

    def __init__(
        self,
        rows: PackedRows,
        batch: int = 32,
        seed: int = 0,
        process: tuple[int, int] = (0, 1),
        shuffle: bool = True,
    ):
        index, count = process
        share = _share(batch, process)
        order = grain.MapDataset.source(rows)
        if shuffle:
            order = order.shuffle(seed)
        # Slice p of global batch n is number n * count + p. An endless dataset has no remainder.
        shares = order.repeat().batch(share, drop_remainder=True)
        self._batches = iter(shares[index::count].to_iter_dataset(READ_AHEAD))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return {"tokens": next(self._batches)}

    def get_state(self) -> dict[str, int]:
        """Where the last yielded batch left off, as plain values."""
        return self._batches.get_state()

    def set_state(self, state: dict[str, int]) -> None:
        """Go on after the batch at which `state` was taken."""
        self._batches.set_state(state)


def eval_batches(
    rows: PackedRows, batch: int, n_batches: int, process: tuple[int, int] = (0, 1)
) -> list[Batch]:
    """This process's share of the first `n_batches` batches of `rows`, or of as many as there are.

    Raises:
        ValueError: `rows` do not fill one batch, or the processes cannot share it equally.
    """
    share = _share(batch, process)
    if len(rows) < batch:
        raise ValueError(
            f"the held-out text gives {len(rows)} rows, fewer than train.batch={batch}; set a "
            "larger data.held_out, a smaller train.batch or train.seq_len, or give more text"
        )
    starts = [
        number * batch + process[0] * share for number in range(min(n_batches, len(rows) // batch))
    ]
    return [{"tokens": np.stack([rows[start + i] for i in range(share)])} for start in starts]


def _share(batch: int, process: tuple[int, int]) -> int:
    """Rows of a batch that one process reads."""
    index, count = process
    if not 0 <= index < count:
        raise ValueError(f"process index {index} must lie in 0..{count - 1} ({count} processes)")
    if batch < 1 or batch % count:
        raise ValueError(
            f"train.batch={batch} must be a positive multiple of the {count} processes"
        )
    return batch // count
