"""The ledger of time: against a clock that the test moves, over several starts."""

import json

import pytest

from dsv3_jax.training.goodput import Ledger, goodput


class Clock:
    """Both clocks, moved by hand; the wall clock can be set."""

    def __init__(self):
        self.now, self.offset = 100.0, 1e9

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + self.offset


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr("dsv3_jax.training.goodput.time", clock)
    return clock


def one_start(clock, folder, first: int, last: int, seconds: float = 2.0):
    """5 s of starting, then steps with 1 s of waiting for data each, 3 s of saving at the end."""
    begin = clock.time()
    clock.now += 4.0
    kept = Ledger(folder, begin)
    clock.now += 1.0
    with kept.timed("step"):
        for step in range(first, last):
            with kept.timed("data"):
                clock.now += 1.0
            clock.now += seconds
            kept.record_steps(first, step + 1)
        with kept.timed("save"):
            clock.now += 3.0
    kept.write()


def test_kinds_exclude_each_other(clock, tmp_path):
    one_start(clock, tmp_path, 0, 10)
    found = goodput(tmp_path)
    assert found.starts == 1
    spent = {kind: part for kind, part in found.seconds.items() if part}
    assert spent == {"start": 5.0, "data": 10.0, "step": 20.0, "save": 3.0}
    assert found.fraction == pytest.approx(20 / 38)
    assert "step 52.6%" in str(found) and "1 start," in str(found)


def test_repeated_steps_and_the_time_between_starts(clock, tmp_path):
    """Killed after step 10, of which 6 were saved; 7 s later it goes on from there."""
    one_start(clock, tmp_path, 0, 10)
    clock.now += 7.0
    one_start(clock, tmp_path, 6, 12)
    found = goodput(tmp_path)
    assert found.starts == 2 and found.seconds["down"] == pytest.approx(7.0)
    assert found.seconds["repeated"] == pytest.approx(8.0)  # steps 7 to 10
    assert found.seconds["step"] == pytest.approx(24.0)  # 12 steps that count
    assert sum(found.seconds.values()) == pytest.approx(clock.now - 100.0)


def test_a_start_that_is_killed_leaves_what_it_wrote(clock, tmp_path):
    kept = Ledger(tmp_path, clock.time())
    with kept.timed("step"):
        for step in range(1, 5):
            clock.now += 6.0  # longer than the time between writes
            kept.record_steps(0, step)
    row = json.loads((tmp_path / "ledger.jsonl").read_text())
    assert row["last"] == 4 and row["seconds"]["step"] == pytest.approx(24.0)
    assert row["end"] - row["begin"] == pytest.approx(24.0)


def test_a_clock_that_jumps(clock, tmp_path):
    """The wall clock is set back an hour between two starts, and on by one during the second."""
    one_start(clock, tmp_path, 0, 10)
    clock.offset -= 3600.0
    begin = clock.time()
    kept = Ledger(tmp_path, begin)
    clock.offset += 3600.0
    with kept.timed("step"):
        clock.now += 2.0
        kept.record_steps(10, 11)
    kept.write()
    found = goodput(tmp_path)
    assert found.seconds["down"] == 0.0
    assert found.seconds["step"] == pytest.approx(22.0)
