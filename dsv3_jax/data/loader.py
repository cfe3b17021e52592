"""Endless shuffled batches that any number of processes share and that resume exactly."""

import dataclasses
from collections.abc import Iterator

import grain
import numpy as np
from jaxtyping import Int32

from dsv3_jax.data.packing import PackedRows
from dsv3_jax.schedules import BatchSizes

Batch = dict[str, np.ndarray]

# Two batches are made in threads while the device works on one.
READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)
ENDLESS = 1 << 40  # steps


class Loader:
    """Process `index` of `count`'s share of every global batch, for ever.

    A batch is {"tokens": rows, "rows": their numbers in the text}. The rows of an epoch come once
    each, in an order of the epoch's own, which batches of whatever sizes cut into pieces. So what
    comes next depends on how many rows have come alone, which is all that is saved. Process p takes
    the p-th of `count` equal slices of each batch, and reads no other row.

    Args:
        sizes: rows of every global batch; its `seq_len` does not count.
        process: this process's index, and the number of processes.

    Raises:
        ValueError: the processes cannot share a batch equally.
    """

    def __init__(
        self,
        rows: PackedRows,
        sizes: BatchSizes,
        seed: int = 0,
        process: tuple[int, int] = (0, 1),
        shuffle: bool = True,
    ):
        for size in sizes.sizes:
            _share(size, process)
        order = grain.MapDataset.source(_Numbered(rows))
        if shuffle:
            order = order.shuffle(seed)
        self._order, self._sizes, self._process = order.repeat(), sizes, process
        self.start(0, 0)

    def start(self, step: int, row: int):
        """Go on with the batch of step number `step`, which begins at row `row` of the order."""
        self.step, self.row = step, row
        share = _Share(self._order, self._sizes, self._process, step, row)
        self._batches = iter(grain.MapDataset.source(share).to_iter_dataset(READ_AHEAD))

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = next(self._batches)
        self.row += self._sizes.size(self.step)
        self.step += 1
        return batch


@dataclasses.dataclass(frozen=True)
class _Numbered:
    """Rows with their numbers."""

    rows: PackedRows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Int32[np.ndarray, " row"], int]:
        return self.rows[index], index


@dataclasses.dataclass(frozen=True)
class _Share:
    """One process's share of step after step, from a step and a row of the order on."""

    order: grain.MapDataset
    sizes: BatchSizes
    process: tuple[int, int]
    step: int
    row: int

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Batch:
        step, (number, count) = self.step + index, self.process
        share = self.sizes.size(step) // count
        first = self.row + self.sizes.sequences(step) - self.sizes.sequences(self.step)
        places = range(first + number * share, first + (number + 1) * share)
        tokens, rows = zip(*(self.order[place] for place in places), strict=True)
        return {"tokens": np.stack(tokens), "rows": np.array(rows)}


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
