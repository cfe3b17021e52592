"""The load of every expert over a run, kept beside its checkpoints."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

SNAPSHOTS = 500  # about as many steps of a run are kept, evenly


class LoadHistory:
    """Loads [L E] of evenly spaced steps, in a file that a resumed run goes on with."""

    def __init__(self, path: Path, first: int, last: int):
        """Open the history of a run of `last` steps, without what came after step `first`."""
        self._path, self._every = path, max(1, last // SNAPSHOTS)
        self._steps: list[int] = []
        self._loads: list[np.ndarray] = []
        if first and path.exists():
            with np.load(path) as saved:
                kept = saved["steps"] <= first
                self._steps = saved["steps"][kept].tolist()
                self._loads = list(saved["loads"][kept])

    def rewind(self, step: int):
        """Forget all steps after this one, which will come again."""
        kept = sum(saved <= step for saved in self._steps)
        del self._steps[kept:], self._loads[kept:]

    def add(self, step: int, load: Float[np.ndarray, "L E"]):
        if step % self._every == 0:
            self._steps.append(step)
            self._loads.append(load)

    def arrays(self) -> tuple[Int[np.ndarray, " steps"], Float[np.ndarray, "steps L E"]]:
        return np.array(self._steps, np.int64), np.stack(self._loads)

    def save(self):
        """Write the file, whole or not at all."""
        if self._steps:
            temporary = self._path.with_suffix(".tmp.npz")
            steps, loads = self.arrays()
            np.savez_compressed(temporary, steps=steps, loads=loads)
            os.replace(temporary, self._path)
