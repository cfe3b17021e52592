"""What a run makes of steps whose numbers went wrong: which were skipped, when to go back."""

import json
import math
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dsv3_jax.config import GuardConfig

WINDOW = 100  # losses that a spike is measured by
LEAST = 20  # of them before any is called a spike
FLOOR = 1e-3  # least standard deviation, as a share of the loss


class Bad(NamedTuple):
    """A step that was skipped."""

    step: int
    why: str
    batch: str  # what identifies its data


class TooManyBad(Exception):
    """So many steps in a row were skipped that the run has to go back."""


class Guard:
    """The bad steps in a row, and the checkpoint that the run last went back to."""

    def __init__(self, config: GuardConfig):
        self._config = config
        self.row: list[Bad] = []
        self._went_back: tuple[int, int] | None = None  # from the bad step, to the saved one

    def good(self):
        """A step went well."""
        self.row = []

    def bad(self, bad: Bad) -> bool:
        """A step was skipped; whether that makes too many in a row."""
        self.row = [*self.row, bad]
        return len(self.row) >= self._config.roll_back_after

    def way_back(self, saved: list[int]) -> int | None:
        """The saved step to go back to: from before the bad ones, an older one at each new try.

        A try counts as new while the run hasn't come past the step that it went back from.
        """
        first, last = self.row[0].step, self.row[-1].step
        before = [step for step in saved if step < first]
        if self._went_back is not None and first <= self._went_back[0]:
            before = [step for step in before if step < self._went_back[1]]
        if not before:
            return None
        self._went_back = (last, max(before))
        self.row = []
        return max(before)

    def saved(self) -> dict:
        """What a checkpoint keeps of it."""
        return {"row": [list(bad) for bad in self.row], "went_back": self._went_back}

    def restore(self, saved: dict):
        self.row = [Bad(*bad) for bad in saved["row"]]
        went_back = saved["went_back"]
        self._went_back = went_back and tuple(went_back)


class Spikes:
    """Tells losses that stand out above those before them."""

    def __init__(self, threshold: float):
        """`threshold` is in standard deviations of the last losses."""
        self._threshold, self._last = threshold, deque(maxlen=WINDOW)

    def stands_out(self, loss: float) -> float | None:
        """By how many standard deviations, if that is too many; the loss then counts no further."""
        if not math.isfinite(loss):
            return None
        if len(self._last) >= LEAST:
            mean = float(np.mean(self._last))
            above = (loss - mean) / max(float(np.std(self._last)), FLOOR * abs(mean))
            if above > self._threshold:
                return above
        self._last.append(loss)
        return None


class Events:
    """`events.jsonl`: what happened besides training, a row each, never taken back."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "events.jsonl"

    def add(self, event: str, **facts):
        """Write one row; it is in the file when this returns."""
        with self._path.open("a") as file:
            file.write(json.dumps({"event": event, "time": time.time(), **facts}) + "\n")
