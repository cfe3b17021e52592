"""Where the time of a run went: every second of every start of it, by what it was spent on.

`ledger.jsonl` has a row a start: {"begin", "end" (seconds since 1970), "first", "last" (steps),
"seconds": {kind: seconds}}. The row of the start under way is written anew every few seconds, so a
killed one leaves nearly all of its time there. Between two rows nothing ran.
"""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from dsv3_jax.training.reporting import read, write_atomically

KINDS = ("step", "data", "compile", "evaluate", "save", "restore", "audit", "start", "end")
WRITE_EVERY = 5.0  # seconds


class Ledger:
    """Counts the time of this start of a run; what is in no `kind` counts as "start" or "step"."""

    def __init__(self, folder: Path, begin: float | None = None):
        """Begin a row, at the time `begin` of the clock (when the process began), or now."""
        self._path = folder / "ledger.jsonl"
        folder.mkdir(parents=True, exist_ok=True)
        self._rows = read(self._path) if self._path.exists() else []
        now = time.time()
        begin = now if begin is None else begin
        self._begin, self._clock = begin, time.monotonic() - max(now - begin, 0.0)
        self._seconds: Counter[str] = Counter()
        self._kind, self._written = "start", -WRITE_EVERY
        self._first = self._last = 0

    @contextlib.contextmanager
    def spent_on(self, kind: str) -> Iterator[None]:
        """What happens inside counts as that kind, and as no other."""
        before = self._turn_to(kind)
        try:
            yield
        finally:
            self._turn_to(before)

    def steps(self, first: int, last: int):
        """Note which steps this start has run: those after `first`, up to `last`."""
        self._first, self._last = first, last
        if time.monotonic() - self._written > WRITE_EVERY:
            self.write()

    def write(self):
        """Write the row."""
        self._turn_to(self._kind)
        self._written = time.monotonic()
        text = "".join(json.dumps(row) + "\n" for row in [*self._rows, self._row()])
        write_atomically(self._path, text)

    def _turn_to(self, kind: str) -> str:
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
    """Seconds of a run by kind, from the beginning of its first start to the end of its last."""

    seconds: dict[str, float]  # with "repeated" (steps that were lost) and "down"
    starts: int

    @property
    def share(self) -> float:
        """Of all the time, that of steps which count."""
        return self.seconds["step"] / max(sum(self.seconds.values()), 1e-9)

    def __str__(self) -> str:
        total = max(sum(self.seconds.values()), 1e-9)
        parts = sorted(self.seconds.items(), key=lambda item: -item[1])
        shown = ", ".join(f"{kind} {part / total:.1%}" for kind, part in parts if part > 0)
        return f"{self.starts} start{'s' * (self.starts > 1)}, {total:,.0f} seconds: {shown}"


def goodput(folder: Path) -> Goodput:
    """What the rows of a ledger add up to.

    A step that a later start ran again counts as "repeated", with the mean time of its start's
    steps. A clock that was set back between two starts makes no time between them.
    """
    rows = read(folder / "ledger.jsonl")
    total: Counter[str] = Counter(dict.fromkeys(KINDS, 0.0))
    for row, after in zip(rows, [*rows[1:], None], strict=True):
        total.update(row["seconds"])
        if after is None:
            continue
        done, lost = row["last"] - row["first"], row["last"] - max(after["first"], row["first"])
        again = row["seconds"].get("step", 0.0) * lost / done if lost > 0 else 0.0
        total.update({"step": -again, "repeated": again})
        total["down"] += max(after["begin"] - row["end"], 0.0)
    return Goodput(dict(total), len(rows))
