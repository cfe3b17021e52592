"""Saving the steps of a run, and resuming from the newest sound one.

Orbax writes in the background and commits a step by renaming its folder, so a killed or failed
save leaves the steps before it as they were. Once a step is committed, its file record joins it;
killed before that, the step is judged by the fingerprints of its arrays alone (see `integrity`).
"""

import itertools
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from dsv3_jax.checkpoint.integrity import fingerprints, new_manifest, write_file_record
from dsv3_jax.checkpoint.processes import broadcast_first, on_process_zero
from dsv3_jax.checkpoint.reader import (
    CheckpointReader,
    DamagedCheckpoint,
    handlers,
    named_leaves,
    without_empty,
)


class SaveFailed(OSError):
    """A step that did not reach the disk. Older steps stay, and a later save may succeed.

    `missing_bytes` is how much free space it lacked; None if the disk is not too full.
    """

    def __init__(self, message: str, missing_bytes: int | None):
        super().__init__(message)
        self.missing_bytes = missing_bytes


class Resumed(NamedTuple):
    """The step that a run resumes from."""

    step: int
    state: PyTree
    extra: dict


class _Saving(NamedTuple):
    """The save under way."""

    step: int
    n_bytes: int
    file_record: Future


class CheckpointManager(CheckpointReader):
    """The steps that a run saves in one folder, of which the newest `keep` stay (all if None).

    All multiples of `keep_every`, if given, stay as well. With several processes, process 0 alone
    renames and removes.
    """

    def __init__(self, directory: str | Path, keep: int | None, keep_every: int | None = None):
        super().__init__(directory)
        self._quarantine_folder = self.directory / "damaged"
        self._keep, self._keep_every = keep, keep_every
        self._saving: _Saving | None = None
        self._failure: SaveFailed | None = None
        self._recorder = ThreadPoolExecutor(1)
        self._manager = self._new_manager()

    def steps(self) -> list[int]:
        """Return the steps on disk, oldest first, once the save under way has finished."""
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
        on_process_zero(self._remove_unfinished)
        if n_bytes > self._free_bytes():
            raise self._save_failed(step, n_bytes, "the disk is too full")
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(stored),
            manifest=ocp.args.JsonSave(new_manifest(arrays, fingerprints(stored), extra)),
        )
        try:
            self._manager.save(step, args=items)
        except Exception as error:  # Orbax and its writers raise many types for a disk in trouble
            self._abandon()
            raise self._save_failed(step, n_bytes, _text(error)) from error
        self._saving = _Saving(step, n_bytes, self._recorder.submit(self._record_files, step))

    def resume(self, abstract_state: PyTree) -> Resumed | None:
        """Restore the newest sound step, bit for bit as it was saved; None if there is no step.

        Only the run that writes here may call it: it removes what killed saves left, and
        quarantines damaged steps in the folder `damaged`, with a printed line that says what is
        wrong with them. See `restore` for `abstract_state`.

        Raises:
            DamagedCheckpoint: no sound step is left of those that were here.
            ValueError: the newest sound step holds other arrays than `abstract_state`.
        """
        self._finish()
        on_process_zero(self._remove_unfinished)
        while (step := self.latest_step()) is not None:
            resumed, damage = None, None
            try:
                self.verify(step)
                resumed = Resumed(step, *self.restore(abstract_state, step))
            except DamagedCheckpoint as error:
                damage = error.reason
            if (damage := broadcast_first(damage)) is None:
                return resumed
            on_process_zero(lambda step=step, damage=damage: self._quarantine(step, damage))
            self._reopen()
        if names := on_process_zero(self._quarantined):
            raise DamagedCheckpoint(
                f"no sound checkpoint is left in {self.directory}: all were damaged and lie in "
                f"{self._quarantine_folder} ({names}). Put a sound copy of one into "
                f"{self.directory}; or, to train from the beginning, remove "
                f"{self._quarantine_folder} or use another --workdir",
                "no sound checkpoint is left",
            )
        return None

    def delete_after(self, step: int):
        """Delete the saved steps after this one, so that they can be saved anew."""
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
        """Let Orbax list the steps anew."""
        self._manager.close()
        self._manager = self._new_manager()

    def _record_files(self, step: int):
        """Write the file record once the step is committed; runs in a thread beside Orbax's."""
        self._manager.wait_until_finished()
        if jax.process_index() == 0:
            write_file_record(self._folder(step))

    def _finish(self):
        """Let the save under way finish, and keep its failure for `wait`."""
        if self._saving is None:
            return
        step, n_bytes, file_record = self._saving
        failure = None
        try:
            self._manager.wait_until_finished()
            file_record.result()
        except Exception as error:  # see `save`
            failure = error
        self._saving = None
        if text := broadcast_first(failure and _text(failure)):
            self._abandon()
            self._failure = self._save_failed(step, n_bytes, text)
            self._failure.__cause__ = failure

    def _abandon(self):
        """After a failed save: give its space back, and forget it."""
        on_process_zero(self._remove_unfinished)
        self._reopen()

    def _save_failed(self, step: int, n_bytes: int, cause: str) -> SaveFailed:
        free = self._free_bytes()
        missing = n_bytes - free if n_bytes > free else None
        missing_text = "" if missing is None else f", {_gigabytes(missing)} are missing"
        return SaveFailed(
            f"saving step {step} in {self.directory} failed: {cause}\n"
            f"It needs {_gigabytes(n_bytes)}, {_gigabytes(free)} are free there{missing_text}. "
            f"Intact: steps {self.steps()}. Check free space and permissions there; "
            "the next save needs nothing else.",
            missing,
        )

    def _free_bytes(self) -> int:
        """Return how many bytes may still be written, as process 0 sees it."""
        return int(on_process_zero(lambda: str(shutil.disk_usage(self.directory).free)))

    def _remove_unfinished(self):
        """Remove the folders of saves that were killed or failed.

        A failed save's other writers may still be adding files; the next save removes those.
        """
        for unfinished in ocp.path.step.all_temporary_paths(self.directory):
            shutil.rmtree(unfinished.get(), ignore_errors=True)

    def _quarantine(self, step: int, damage: str):
        """Move a damaged step to the folder `damaged`, and print what is wrong with it."""
        names = itertools.chain([str(step)], (f"{step}-{n}" for n in itertools.count(2)))
        candidates = (self._quarantine_folder / name for name in names)
        target = next(path for path in candidates if not path.exists())
        self._quarantine_folder.mkdir(exist_ok=True)
        folder = self._folder(step)
        folder.rename(target)
        print(f"checkpoint {folder} is damaged: {damage}; it was moved to {target}", flush=True)

    def _quarantined(self) -> str | None:
        """Return the names of the quarantined steps; None if there are none."""
        return ", ".join(sorted(path.name for path in self._quarantine_folder.glob("*"))) or None


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"


def _gigabytes(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.3f} GB"
