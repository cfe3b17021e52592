"""The load of every expert over a run, kept in a file beside its checkpoints."""

import os
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int

MAX_SNAPSHOTS = 500  # about as many evenly spaced steps of a run are kept


def max_violation(load: Float[np.ndarray, "... E"]) -> Float[np.ndarray, "..."]:
    """Return by how much the busiest expert exceeds the mean load: max / mean - 1.

    Source: Auxiliary-Loss-Free Load Balancing (arXiv 2408.15664), MaxVio.
    """
    return load.max(-1) / load.mean(-1) - 1.0


class LoadHistory:
    """The loads [L E] of evenly spaced steps; a resumed run continues its file."""

    def __init__(self, path: Path, first: int, last: int):
        """Open the history of a run of `last` steps, without the steps after `first`."""
        self._path, self._every = path, max(1, last // MAX_SNAPSHOTS)
        self._steps: list[int] = []
        self._loads: list[np.ndarray] = []
        if first and path.exists():
            with np.load(path) as saved:
                earlier = saved["steps"] <= first
                self._steps = saved["steps"][earlier].tolist()
                self._loads = list(saved["loads"][earlier])

    def rewind(self, step: int):
        """Remove all steps after this one, which will come again."""
        n_earlier = sum(earlier <= step for earlier in self._steps)
        del self._steps[n_earlier:], self._loads[n_earlier:]

    def add(self, step: int, load: Float[np.ndarray, "L E"]):
        """Add the load of a step, if it is one that is kept."""
        if step % self._every == 0:
            self._steps.append(step)
            self._loads.append(load)

    def arrays(self) -> tuple[Int[np.ndarray, " steps"], Float[np.ndarray, "steps L E"]]:
        """Return the steps and their loads."""
        return np.array(self._steps, np.int64), np.stack(self._loads)

    def save(self):
        """Write the file, whole or not at all."""
        if self._steps:
            temporary = self._path.with_suffix(".tmp.npz")
            steps, loads = self.arrays()
            np.savez_compressed(temporary, steps=steps, loads=loads)
            os.replace(temporary, self._path)
