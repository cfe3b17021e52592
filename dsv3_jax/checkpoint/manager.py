"""Saving steps of a run, and resuming from the newest that is sound.

Orbax writes in the background and commits a step by renaming its folder, so a killed or failed
save leaves the steps before it as they were. Once a step is committed, a record of its files joins
it; killed before that, it is judged by the fingerprints of its arrays alone.
"""

import itertools
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from dsv3_jax.checkpoint.files import write_record
from dsv3_jax.checkpoint.integrity import fingerprints
from dsv3_jax.checkpoint.manifest import named_leaves, new_manifest, without_empty
from dsv3_jax.checkpoint.processes import on_the_first, shared
from dsv3_jax.checkpoint.reader import DamagedCheckpoint, SavedSteps, handlers


class SaveFailed(OSError):
    """A step that did not reach the disk. Older steps stay, and a later save may succeed.

    `missing` is how many bytes of free space it lacked; None if the space that is left is not why.
    """

    def __init__(self, message: str, missing: int | None):
        super().__init__(message)
        self.missing = missing


class Resumed(NamedTuple):
    """Where a run goes on."""

    step: int
    state: PyTree
    extra: dict


class _Saving(NamedTuple):
    """The save under way."""

    step: int
    n_bytes: int
    record: Future


class Checkpoints(SavedSteps):
    """The steps that a run saves in one folder, of which the newest `keep` stay (all if None).

    So do all multiples of `keep_every`, if given. With several processes, process 0 alone renames
    and removes.
    """

    def __init__(self, directory: str | Path, keep: int | None, keep_every: int | None = None):
        super().__init__(directory)
        self._aside = self.directory / "damaged"
        self._keep, self._keep_every = keep, keep_every
        self._saving: _Saving | None = None
        self._failure: SaveFailed | None = None
        self._recorder = ThreadPoolExecutor(1)
        self._manager = self._new_manager()

    def steps(self) -> list[int]:
        """Steps on disk, oldest first, once the save under way has finished."""
        self._finish()
        return super().steps()

    def save(self, step: int, state: PyTree, extra: dict):
        """Start writing `state`, a pytree of arrays, with `extra`, a dict that JSON can hold.

        Returns once the arrays are copied to the host, so they may be donated afterwards.

        Raises:
            ValueError: `step` is not newer than the saved ones.
            SaveFailed: the disk is too full for it, or it cannot start; or the save before it
                failed, unless `wait` said so already. Nothing is being written then.
        """
        self.wait()
        if (latest := self.latest_step()) is not None and step <= latest:
            raise ValueError(
                f"cannot save step {step} in {self.directory}: step {latest} is there already; "
                f"move the steps from {step} on away, or use another directory"
            )
        arrays = named_leaves(state)
        stored = without_empty(arrays)
        n_bytes = sum(array.nbytes for array in stored.values())
        on_the_first(self._remove_unfinished)
        if n_bytes > self._free():
            raise self._failed(step, n_bytes, "the disk is too full")
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(stored),
            manifest=ocp.args.JsonSave(new_manifest(arrays, fingerprints(stored), extra)),
        )
        try:
            self._manager.save(step, args=items)
        except Exception as error:  # Orbax and its writers raise many types for a disk in trouble
            self._abandon()
            raise self._failed(step, n_bytes, _text(error)) from error
        self._saving = _Saving(step, n_bytes, self._recorder.submit(self._record, step))

    def resume(self, abstract_state: PyTree) -> Resumed | None:
        """The newest step that is sound, bit for bit as it was saved; None if there is no step.

        Only the run that writes here may call it: it removes what killed saves left, and moves
        damaged steps to the folder `damaged`, with a line that says what is wrong with them. See
        `restore` for `abstract_state`.

        Raises:
            DamagedCheckpoint: no sound step is left of those that were here.
            ValueError: the newest sound step holds other arrays than `abstract_state`.
        """
        self._finish()
        on_the_first(self._remove_unfinished)
        while (step := self.latest_step()) is not None:
            found, what = None, None
            try:
                self.verify(step)
                found = Resumed(step, *self.restore(abstract_state, step))
            except DamagedCheckpoint as error:
                what = error.what
            if (what := shared(what)) is None:
                return found
            on_the_first(lambda step=step, what=what: self._set_aside(step, what))
            self._reopen()
        if names := on_the_first(self._names_aside):
            raise DamagedCheckpoint(
                f"no sound checkpoint is left in {self.directory}: all were damaged and lie in "
                f"{self._aside} ({names}). Put a sound copy of one into {self.directory}; or, to "
                f"train from the beginning, remove {self._aside} or use another --workdir",
                "no sound checkpoint is left",
            )
        return None

    def forget_after(self, step: int):
        """Delete the saved steps after this one, so that they can come again."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def wait(self):
        """Return when the save under way has finished.

        Raises:
            SaveFailed: it failed, on whichever process. Where one process alone cannot write, the
                others wait for Orbax's time limit, 20 minutes, before they learn of it.
        """
        self._finish()
        if (failure := self._failure) is not None:
            self._failure = None
            raise failure

    def close(self):
        """Finish the save under way and stop the threads; raises as `wait`."""
        try:
            self.wait()
        finally:
            self._recorder.shutdown()
            self._manager.close()

    def _new_manager(self) -> ocp.CheckpointManager:
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep,
            keep_period=self._keep_every,
            lightweight_initialize=True,  # else damaged metadata of one step would end the run
        )
        return ocp.CheckpointManager(self.directory, item_handlers=handlers(), options=options)

    def _reopen(self):
        """Let Orbax see anew which steps there are."""
        self._manager.close()
        self._manager = self._new_manager()

    def _record(self, step: int):
        """In a thread beside Orbax's: once the step is committed, note its files."""
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            write_record(self._folder(step))

    def _finish(self):
        """Let the save under way finish, and keep its failure for `wait`."""
        if self._saving is None:
            return
        step, n_bytes, record = self._saving
        failure = None
        try:
            self._manager.wait_until_finished()
            record.result()
        except Exception as error:  # see `save`
            failure = error
        self._saving = None
        if text := shared(failure and _text(failure)):
            self._abandon()
            self._failure = self._failed(step, n_bytes, text)
            self._failure.__cause__ = failure

    def _abandon(self):
        """After a failed save: give its space back, and forget it."""
        on_the_first(self._remove_unfinished)
        self._reopen()

    def _failed(self, step: int, n_bytes: int, why: str) -> SaveFailed:
        free = self._free()
        missing = n_bytes - free if n_bytes > free else None
        lacking = "" if missing is None else f", {_size(missing)} are missing"
        return SaveFailed(
            f"saving step {step} in {self.directory} failed: {why}\n"
            f"It needs {_size(n_bytes)}, {_size(free)} are free there{lacking}. "
            f"Intact: steps {self.steps()}. Check free space and permissions there; "
            "the next save needs nothing else.",
            missing,
        )

    def _free(self) -> int:
        """Bytes that may still be written, as process 0 sees it."""
        return int(on_the_first(lambda: str(shutil.disk_usage(self.directory).free)))

    def _remove_unfinished(self):
        """Remove the folders of saves that were killed or failed.

        A failed save's other writers may still be adding files; the next save removes those.
        """
        for unfinished in ocp.path.step.all_temporary_paths(self.directory):
            shutil.rmtree(unfinished.get(), ignore_errors=True)

    def _set_aside(self, step: int, what: str):
        names = itertools.chain([str(step)], (f"{step}-{n}" for n in itertools.count(2)))
        target = next(path for name in names if not (path := self._aside / name).exists())
        self._aside.mkdir(exist_ok=True)
        folder = self._folder(step)
        folder.rename(target)
        print(f"checkpoint {folder} is damaged: {what}; it was moved to {target}", flush=True)

    def _names_aside(self) -> str | None:
        return ", ".join(sorted(path.name for path in self._aside.glob("*"))) or None


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.3f} GB"
