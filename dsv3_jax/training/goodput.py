"""Goodput: the fraction of a run's time that went into steps that count, and where the rest went.

`ledger.jsonl` has one row per start of the run: {"begin", "end" (seconds since 1970), "first",
"last" (steps), "seconds": {kind: seconds}}. The last row is rewritten every few seconds, so that a
killed start loses little of its time. Between two rows nothing ran.
"""

import contextlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dsv3_jax.training.records import read_rows, write_atomically

KINDS = ("step", "data", "compile", "evaluate", "save", "restore", "audit", "start", "end")
WRITE_EVERY = 5.0  # seconds


def process_start_time() -> float:
    """Return when this process began, in seconds since 1970; now, where the system hides it."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.time()
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])  # since boot
    age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return time.time() - age


class Ledger:
    """The time of this start of a run by kind; it begins in the kind "start"."""

    def __init__(self, folder: Path, begin: float | None = None):
        """Begin a row in `folder`.

        Args:
            begin: when the process began, in seconds since 1970; None for now.
        """
        self._path = folder / "ledger.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._rows = read_rows(self._path) if self._path.exists() else []
        now = time.time()
        begin = now if begin is None else begin
        self._begin, self._clock = begin, time.monotonic() - max(now - begin, 0.0)
        self._seconds: Counter[str] = Counter()
        self._kind, self._written = "start", -WRITE_EVERY
        self._first = self._last = 0

    @contextlib.contextmanager
    def timed(self, kind: str) -> Iterator[None]:
        """Count the time inside as `kind`, and as no other."""
        before = self._switch_to(kind)
        try:
            yield
        finally:
            self._switch_to(before)

    def record_steps(self, first: int, last: int):
        """Record that this start has run the steps after `first`, up to `last`."""
        self._first, self._last = first, last
        if time.monotonic() - self._written > WRITE_EVERY:
            self.write()

    def write(self):
        """Write the row."""
        self._switch_to(self._kind)
        self._written = time.monotonic()
        text = "".join(json.dumps(row) + "\n" for row in [*self._rows, self._row()])
        write_atomically(self._path, text)

    def _switch_to(self, kind: str) -> str:
        now = time.monotonic()
        self._seconds[self._kind] += now - self._clock
        before, self._kind, self._clock = self._kind, kind, now
        return before

    def _row(self) -> dict:
        return {
            "begin": self._begin,
            "end": self._begin + self._seconds.total(),
            "first": self._first,
            "last": self._last,
            "seconds": dict(self._seconds),
        }


class Goodput(NamedTuple):
    """Seconds of a run by kind, from the beginning of its first start to the end of its last.

    Kinds are those of `KINDS`, "repeated" (steps that a crash lost) and "down" (between starts).
    """

    seconds: dict[str, float]
    starts: int

    @property
    def fraction(self) -> float:
        """The time of steps that count over all time."""
        return self.seconds["step"] / max(sum(self.seconds.values()), 1e-9)

    def __str__(self) -> str:
        total = max(sum(self.seconds.values()), 1e-9)
        kinds = sorted(self.seconds.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{kind} {time / total:.1%}" for kind, time in kinds if time > 0)
        return f"{self.starts} start{'s' * (self.starts > 1)}, {total:,.0f} seconds: {shown}"


def goodput(folder: Path) -> Goodput:
    """Return the sum of the rows in a folder's ledger.

    A step that a later start ran again counts as "repeated", with the mean step time of its start.
    If the clock was set back between two starts, no time counts as "down" between them.
    """
    rows = read_rows(folder / "ledger.jsonl")
    total: Counter[str] = Counter(dict.fromkeys(KINDS, 0.0))
    for row in rows:
        total.update(row["seconds"])
    for row, after in itertools.pairwise(rows):
        done, lost = row["last"] - row["first"], row["last"] - max(after["first"], row["first"])
        repeated = row["seconds"].get("step", 0.0) * lost / done if lost > 0 else 0.0
        total.update({"step": -repeated, "repeated": repeated})
        total["down"] += max(after["begin"] - row["end"], 0.0)
    return Goodput(dict(total), len(rows))
