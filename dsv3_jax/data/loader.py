"""Shuffled batches of rows that any number of processes share and that resume exactly."""

import itertools
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import grain
import jax
import numpy as np
from jaxtyping import Int

from dsv3_jax.data.packing import PackedRows, Row
from dsv3_jax.schedules import BatchSizes

# Two batches are made in threads while the device works on one.
READ_AHEAD = grain.ReadOptions(num_threads=2, prefetch_buffer_size=2)


@runtime_checkable
class RandomAccess(Protocol):
    """Rows that can be read in any order; a list is one, and so is `PackedRows`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class RowBatch(NamedTuple):
    """The rows of a batch that this process takes.

    `rows` is a `Row`, or the NamedTuple or dict that the source gives, with arrays [b row].
    """

    rows: Any
    indices: Int[np.ndarray, " b"]  # of the rows in their source


class Loader:
    """Iterates over this process's slices of the global batches.

    A source is anything that gives rows: `Row`s, or any other NamedTuple or dict of arrays [row]
    (post-training adds advantages, say); every row has the same fields and lengths.

    - With random access, the rows of an epoch come once each, in an order of the epoch's own, for
      ever; grain shuffles, and reads ahead in threads.
    - An iterable gives its rows in its own order and ends the batches where it ends, without a
      batch that is not full. Every process reads all of it, and nothing is read ahead: rows may
      depend on the steps before. To resume it is iterated anew, up to the row that comes next.

    Batches of whatever sizes cut the order of rows one after the other. So what comes next depends
    only on the number of rows that have come, which is all that a checkpoint saves. Process p takes
    the p-th of `count` equal slices of each batch.
    """

    def __init__(
        self,
        source: RandomAccess | Iterable,
        sizes: BatchSizes,
        seed: int = 0,
        process: tuple[int, int] = (0, 1),
        shuffle: bool = True,
    ):
        """Begin with the first row.

        Args:
            sizes: rows of every global batch; its `seq_len` does not count.
            process: this process's index, and the number of processes.
            shuffle: has no effect on the order of an iterable.

        Raises:
            ValueError: the processes cannot share a batch equally.
        """
        for size in sizes.sizes:
            _rows_per_process(size, process)
        self._sizes, self._process = sizes, process
        if isinstance(source, RandomAccess):
            self._reader = _EpochReader(source, seed if shuffle else None)
        else:
            self._reader = _StreamReader(source)
        self.start(0, 0)

    def start(self, step: int, row: int):
        """Go on with the batch of step number `step`, which begins at row `row` of the order.

        Raises:
            ValueError: the source is an iterator that has passed this row.
        """
        self.step, self.row = step, row
        self._batches = self._reader.batches(self._sizes, self._process, step, row)

    def __iter__(self) -> Iterator[RowBatch]:
        return self

    def __next__(self) -> RowBatch:
        batch = next(self._batches)
        self.row += self._sizes.size(self.step)
        self.step += 1
        return batch


class _EpochReader:
    """Reads a source with random access epoch after epoch, shuffled if there is a seed."""

    def __init__(self, source: RandomAccess, seed: int | None):
        order = grain.MapDataset.range(len(source))
        self._source = source
        self._order = (order if seed is None else order.shuffle(seed)).repeat()

    def batches(
        self, sizes: BatchSizes, process: tuple[int, int], step: int, row: int
    ) -> Iterator[RowBatch]:
        rows_before = sizes.sequences(step)

        def batch(step: int) -> RowBatch:
            first = row + sizes.sequences(step) - rows_before
            own = _own_slice(sizes.size(step), process)
            indices = [self._order[first + position] for position in range(own.start, own.stop)]
            return _stack([self._source[index] for index in indices], indices)

        steps = grain.MapDataset.range(step, sys.maxsize)  # no run ends it
        return iter(steps.map(batch).to_iter_dataset(READ_AHEAD))


class _StreamReader:
    """Reads an iterable, and keeps count of the rows it has given."""

    def __init__(self, source: Iterable):
        self._source, self._rows, self._row = source, iter(source), 0

    def batches(
        self, sizes: BatchSizes, process: tuple[int, int], step: int, row: int
    ) -> Iterator[RowBatch]:
        if row < self._row:
            rows = iter(self._source)
            if rows is self._rows:
                raise ValueError(
                    f"the source of rows is an iterator, which has passed row {self._row} and "
                    f"cannot go back to row {row}; give an iterable that begins anew"
                )
            self._rows, self._row = rows, 0
        for _ in itertools.islice(self._rows, row - self._row):
            self._row += 1
        return self._batches(sizes, process, step)

    def _batches(
        self, sizes: BatchSizes, process: tuple[int, int], first_step: int
    ) -> Iterator[RowBatch]:
        for step in itertools.count(first_step):
            size, first_row = sizes.size(step), self._row
            rows = self._read(size)
            if len(rows) < size:
                return
            own = _own_slice(size, process)
            yield _stack(rows[own], range(first_row + own.start, first_row + own.stop))

    def _read(self, n: int) -> list:
        rows = list(itertools.islice(self._rows, n))
        self._row += len(rows)
        return rows


def eval_batches(
    rows: PackedRows, batch: int, n_batches: int, process: tuple[int, int] = (0, 1)
) -> list[Row]:
    """Read this process's slices of the first `n_batches` batches, or of as many as there are.

    Raises:
        ValueError: `rows` do not fill one batch, or the processes cannot share it equally.
    """
    loader = Loader(rows, BatchSizes((0,), (batch,), 1), process=process, shuffle=False)
    if len(rows) < batch:
        raise ValueError(
            f"the held-out text gives {len(rows)} rows, fewer than train.batch={batch}; set a "
            "larger data.held_out, a smaller train.batch or train.seq_len, or give more text"
        )
    n_batches = min(n_batches, len(rows) // batch)
    return [loaded.rows for loaded in itertools.islice(loader, n_batches)]


def _stack(rows: Sequence, indices: Sequence[int]) -> RowBatch:
    return RowBatch(jax.tree.map(lambda *arrays: np.stack(arrays), *rows), np.array(indices))


def _own_slice(batch: int, process: tuple[int, int]) -> slice:
    """Return the rows of a global batch that one process takes."""
    index, n_rows = process[0], _rows_per_process(batch, process)
    return slice(index * n_rows, (index + 1) * n_rows)


def _rows_per_process(batch: int, process: tuple[int, int]) -> int:
    index, count = process
    if not 0 <= index < count:
        raise ValueError(f"process index {index} must lie in 0..{count - 1} ({count} processes)")
    if batch < 1 or batch % count:
        raise ValueError(
            f"train.batch={batch} must be a positive multiple of the {count} processes"
        )
    return batch // count
