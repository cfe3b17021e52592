"""Batches: every row once an epoch, the same for any number of processes, exact resume."""

import itertools
from typing import NamedTuple

import numpy as np
import pytest

from dsv3_jax.data.loader import Loader, eval_batches
from dsv3_jax.data.packing import PackedRows
from dsv3_jax.schedules import BatchSizes

ROWS = PackedRows(np.arange(1000, dtype=np.uint16), seq_len=13, extra=2)  # 76 rows
SMALL = PackedRows(np.arange(90, dtype=np.uint16), seq_len=8, extra=2)  # 11 rows


def loader_of(rows, batch: int = 4, **options) -> Loader:
    return Loader(rows, BatchSizes((0,), (batch,), 1), **options)


def take(loader: Loader, n: int) -> list[np.ndarray]:
    return [next(loader).rows.tokens for _ in range(n)]


def test_batches_have_the_rows_shape_and_type():
    (batch,) = take(loader_of(ROWS, batch=4), 1)
    assert batch.shape == (4, 15)
    assert batch.dtype == np.int32
    np.testing.assert_array_equal(batch - batch[:, :1], np.tile(np.arange(15), (4, 1)))


def test_every_row_once_an_epoch_and_epochs_differ():
    first = np.stack(take(loader_of(ROWS, batch=4, seed=1), 3 * 19))[..., 0].reshape(3, 76)
    for epoch in first:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(76) * 13)
    assert (first[0] != first[1]).any() and (first[1] != first[2]).any()


def test_seed_decides_the_order():
    a, b, c = (np.stack(take(loader_of(ROWS, batch=4, seed=seed), 5)) for seed in (3, 3, 4))
    np.testing.assert_array_equal(a, b)
    assert (a != c).any()


def test_without_shuffle_rows_come_in_order():
    got = np.concatenate(take(loader_of(SMALL, batch=4, shuffle=False), 5))[:, 0] // 8
    np.testing.assert_array_equal(got, np.arange(20) % 11)


def test_batches_of_one_row():
    got = np.concatenate(take(loader_of(SMALL, batch=1), 11))[:, 0] // 8
    np.testing.assert_array_equal(np.sort(got), np.arange(11))


def test_batch_may_exceed_an_epoch():
    (batch,) = take(loader_of(SMALL, batch=22), 1)
    np.testing.assert_array_equal(np.sort(batch[:, 0] // 8), np.repeat(np.arange(11), 2))


@pytest.mark.parametrize("count", [1, 2, 4])
def test_global_batches_do_not_depend_on_the_process_count(count):
    """Over several epochs whose length no batch divides."""
    whole = take(loader_of(SMALL, batch=4, seed=5), 12)
    shares = [take(loader_of(SMALL, batch=4, seed=5, process=(p, count)), 12) for p in range(count)]
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        np.testing.assert_array_equal(batch, np.concatenate(parts))


class Recorder(PackedRows):
    """Rows that note which of them were read."""

    def __getitem__(self, index):
        self.read.add(int(index))
        return super().__getitem__(index)


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("begin", [0, 3, 6])
def test_batches_that_grow_cut_the_same_order(count, begin):
    """Steps of 2, 4 and 6 rows from steps 0, 3 and 5 on; from any step, behind any data."""
    sizes = BatchSizes((0, 3, 5), (2, 4, 6), 1)
    order = np.concatenate(take(loader_of(SMALL, batch=1, seed=7), 60))
    cuts = [slice(0, 2), slice(2, 4), slice(4, 6), slice(6, 10), slice(10, 14)]
    cuts += [slice(14 + 6 * i, 20 + 6 * i) for i in range(4)]
    shares = []
    for process in range(count):
        loader = Loader(SMALL, sizes, seed=7, process=(process, count))
        loader.start(begin, cuts[begin].start)
        shares.append(take(loader, 9 - begin))
        assert (loader.step, loader.row) == (9, 38)
    for step, parts in enumerate(zip(*shares, strict=True), start=begin):
        np.testing.assert_array_equal(np.concatenate(parts), order[cuts[step]])


def test_batches_say_which_rows_they_are():
    loader = loader_of(SMALL, batch=5, seed=3)
    for batch in (next(loader) for _ in range(3)):
        np.testing.assert_array_equal(batch.indices, batch.rows.tokens[:, 0] // 8)


def test_a_process_reads_only_its_own_rows():
    rows = Recorder(ROWS.tokens, ROWS.seq_len, ROWS.extra)
    object.__setattr__(rows, "read", set())
    loader = loader_of(rows, batch=4, shuffle=False, process=(1, 2))
    take(loader, 10)
    assert all(index % 4 in (2, 3) for index in rows.read)


@pytest.mark.parametrize("done", [0, 1, 7, 23])
@pytest.mark.parametrize("process", [(0, 1), (1, 2)])
def test_exact_resume(done, process):
    """Position 23 lies in another epoch than the start; batches read ahead do not count."""
    unbroken = loader_of(SMALL, batch=4, seed=2, process=process)
    take(unbroken, done)
    place = (unbroken.step, unbroken.row)
    expected = take(unbroken, 9)
    fresh = loader_of(SMALL, batch=4, seed=2, process=process)
    fresh.start(*place)
    np.testing.assert_array_equal(take(fresh, 9), expected)
    unbroken.start(*place)
    np.testing.assert_array_equal(take(unbroken, 9), expected)


def test_state_of_one_process_count_resumes_another():
    pair = loader_of(SMALL, batch=4, process=(0, 2))
    take(pair, 5)
    alone = loader_of(SMALL, batch=4)
    alone.start(pair.step, pair.row)
    np.testing.assert_array_equal(next(alone).rows.tokens[:2], next(pair).rows.tokens)


def test_eval_batches_are_the_first_rows_in_order():
    batches = eval_batches(SMALL, batch=4, n_batches=8)
    assert len(batches) == 2
    got = np.concatenate([batch.tokens for batch in batches])
    np.testing.assert_array_equal(got[:, 0] // 8, np.arange(8))
    assert len(eval_batches(SMALL, batch=4, n_batches=1)) == 1
    halves = [eval_batches(SMALL, batch=4, n_batches=8, process=(p, 2)) for p in range(2)]
    for whole, *parts in zip(batches, *halves, strict=True):
        np.testing.assert_array_equal(whole.tokens, np.concatenate([part.tokens for part in parts]))


def test_bad_batches():
    with pytest.raises(ValueError, match="11 rows, fewer than train.batch=12"):
        eval_batches(SMALL, batch=12, n_batches=1)
    with pytest.raises(ValueError, match="train.batch=6 must be a positive multiple of the 4"):
        loader_of(SMALL, batch=6, process=(0, 4))
    with pytest.raises(ValueError, match="process index 2 must lie in 0..1"):
        loader_of(SMALL, batch=6, process=(2, 2))


# Sources with fields of their own, and without random access


class Weighted(NamedTuple):
    """A row as post-training makes it."""

    tokens: np.ndarray
    loss_mask: np.ndarray
    advantages: np.ndarray


def weighted_rows(n: int) -> list[Weighted]:
    rng = np.random.default_rng(0)
    return [
        Weighted(np.arange(i, i + 6, dtype=np.int32), rng.uniform(size=6) < 0.5, rng.normal(size=6))
        for i in range(n)
    ]


def test_rows_keep_their_type_and_all_fields():
    rows = weighted_rows(9)
    for batch in (next(loader_of(rows, batch=4, seed=1)) for _ in range(3)):
        assert type(batch.rows) is Weighted
        for name in Weighted._fields:
            want = np.stack([getattr(rows[index], name) for index in batch.indices])
            np.testing.assert_array_equal(getattr(batch.rows, name), want, strict=True)
    (batch,) = itertools.islice(loader_of([row._asdict() for row in rows], shuffle=False), 1)
    assert batch.rows.keys() == set(Weighted._fields)
    np.testing.assert_array_equal(batch.rows["advantages"][2], rows[2].advantages)


class Stream:
    """Rows that can only be iterated, each time from the first."""

    def __init__(self, n: int):
        self.n = n

    def __iter__(self):
        yield from weighted_rows(self.n)


@pytest.mark.parametrize("count", [1, 2])
def test_an_iterable_gives_its_rows_in_order_once(count):
    """Steps of 2, then of 4 rows; of the 15 rows the last one fills no batch."""
    sizes = BatchSizes((0, 3), (2, 4), 1)
    loaders = [Loader(Stream(15), sizes, process=(p, count)) for p in range(count)]
    batches = list(zip(*loaders, strict=True))
    tokens = [np.concatenate([part.rows.tokens for part in parts]) for parts in batches]
    assert [len(batch) for batch in tokens] == [2, 2, 2, 4, 4]
    np.testing.assert_array_equal(np.concatenate(tokens)[:, 0], np.arange(14))
    indices = np.concatenate([part.indices for parts in batches for part in parts])
    np.testing.assert_array_equal(indices, np.arange(14))
    assert {(loader.step, loader.row) for loader in loaders} == {(5, 14)}


@pytest.mark.parametrize("process", [(0, 1), (1, 2)])
def test_an_iterable_resumes_exactly(process):
    unbroken = loader_of(Stream(30), process=process)
    take(unbroken, 3)
    place = (unbroken.step, unbroken.row)
    expected = take(unbroken, 4)
    fresh = loader_of(Stream(30), process=process)
    for loader in (fresh, unbroken):  # on to the place, and back to it
        loader.start(*place)
        np.testing.assert_array_equal(take(loader, 4), expected)


def test_an_iterator_goes_on_but_not_back():
    loader = loader_of(iter(weighted_rows(30)))
    loader.start(2, 8)
    np.testing.assert_array_equal(take(loader, 1)[0][:, 0], np.arange(8, 12))
    with pytest.raises(ValueError, match="has passed row 12 and cannot go back to row 8"):
        loader.start(2, 8)


def test_an_iterable_is_not_read_ahead():
    read = []
    loader = loader_of(read.append(row) or row for row in weighted_rows(30))
    take(loader, 2)
    assert len(read) == 8
