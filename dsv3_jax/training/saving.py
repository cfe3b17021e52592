"""Checkpoints of a run: what they hold beside the state, and saves that fail but end nothing."""

from pathlib import Path
from typing import NamedTuple

from flax import nnx

from dsv3_jax.checkpoint import CheckpointManager, SaveFailed
from dsv3_jax.training.ema import HostEma
from dsv3_jax.training.reporting import Reporter
from dsv3_jax.training.setup import Setup
from dsv3_jax.training.state import TrainState, from_saved, to_saved
from dsv3_jax.training.workdir import check_text


class Restored(NamedTuple):
    """The content of a checkpoint."""

    step: int
    state: TrainState
    ema_params: nnx.State | None
    extra: dict  # plain values: "row" of the data, "redundancy", "guard"


class RunCheckpoints:
    """Saves a run in the background, and restores it."""

    def __init__(self, setup: Setup, workdir: Path, reporter: Reporter):
        self._setup, self._reporter = setup, reporter
        config = setup.config.checkpoint
        self._manager = CheckpointManager(workdir / "checkpoints", config.keep, config.keep_every)

    def restore(self) -> Restored | None:
        """Return the newest sound checkpoint; None if there is none.

        Raises:
            ValueError: it was saved by a run on other text.
        """
        config, abstract = self._setup.config, self._setup.abstract_state
        ema_params = abstract.params if config.ema.decay is not None else None
        resumed = self._manager.resume(to_saved(abstract, ema_params))
        if resumed is None:
            return None
        step, saved, extra = resumed
        check_text(config.data.source, extra["text"], self._setup.corpus.fingerprint)
        return Restored(step, from_saved(saved), saved.ema, extra)

    def save(self, step: int, state: TrainState, ema: HostEma | None, extra: dict):
        """Start a save; a failure of it, or of the one before, is reported and nothing more."""
        self._wait(step)
        try:
            self._start(step, state, ema, extra)
        except SaveFailed as error:
            self._reporter.note("not saved", str(error), step)

    def save_last(self, step: int, state: TrainState, ema: HostEma | None, extra: dict):
        """Save, unless that step is saved already, and wait for it.

        Raises:
            SaveFailed: this save failed.
        """
        self._wait(step)
        self._start(step, state, ema, extra)
        self._manager.wait()

    def steps(self) -> list[int]:
        """Return the saved steps, oldest first."""
        return self._manager.steps()

    def delete_after(self, step: int):
        """Delete the checkpoints of later steps, which will come again."""
        self._manager.delete_after(step)

    def close(self):
        """Finish the save under way."""
        self._manager.close()

    def _wait(self, step: int):
        """Let the save before finish, and report it if it failed."""
        try:
            self._manager.wait()
        except SaveFailed as error:
            self._reporter.note("not saved", str(error), step)

    def _start(self, step: int, state: TrainState, ema: HostEma | None, extra: dict):
        if step not in (0, self._manager.latest_step()):
            ema_params = None if ema is None else ema.params()
            text = {"text": self._setup.corpus.fingerprint}
            self._manager.save(step, to_saved(state, ema_params), extra | text)
