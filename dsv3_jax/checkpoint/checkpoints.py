"""The saved steps of a run: Orbax files, and beside them all that shows damage.

Orbax writes in the background and commits a step by renaming its folder, so a killed save leaves
the steps before it as they were. Missing or shortened files fail on restore; a bit that flipped on
the disk does not, and would train on. Hence each step carries a manifest: shape, dtype and
fingerprint of every array, the caller's `extra`, and a checksum of the manifest itself. Once it is
committed, a record of its files joins it, for the bits that no array holds (see `files`).
"""

import itertools
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from dsv3_jax.checkpoint.agreement import on_the_first, shared
from dsv3_jax.checkpoint.files import damage, write_record
from dsv3_jax.checkpoint.fingerprints import fingerprints
from dsv3_jax.checkpoint.manifest import (
    check_shapes,
    is_sound,
    named_leaves,
    new_manifest,
    without_empty,
)
from dsv3_jax.shapes import Array


class DamagedCheckpoint(ValueError):
    """Files of a saved step are missing, unreadable or changed since they were written: `what`."""

    def __init__(self, message: str, what: str):
        super().__init__(message)
        self.what = what


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


class Checkpoints:
    """The saved steps in one folder, of which the newest `keep` stay (all if None).

    So do all multiples of `keep_every`, if given. Which step is newer, its number says, never a
    clock. With several processes, all call the same methods in the same order, on one shared
    folder; they all come to the same result, and process 0 alone renames and removes.
    """

    def __init__(self, directory: str | Path, keep: int | None, keep_every: int | None = None):
        self.directory = Path(directory).absolute()
        self._aside = self.directory / "damaged"
        self._keep, self._keep_every = keep, keep_every
        self._saving: _Saving | None = None
        self._failure: SaveFailed | None = None
        self._recorder = ThreadPoolExecutor(1)
        self._readers = _handlers()
        self._manager = self._new_manager()

    def steps(self) -> list[int]:
        """Steps on disk, oldest first, once the save under way has finished."""
        self._finish()
        return self._finished_steps()

    def latest_step(self) -> int | None:
        """The newest of `steps()`, or None."""
        return max(self.steps(), default=None)

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
        while (newest := on_the_first(self._newest)) is not None:
            step, found, what = int(newest), None, None
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

    def verify(self, step: int | None = None):
        """Compare the files of a step (default: the latest) with the record of them.

        Raises:
            FileNotFoundError: the step does not exist.
            DamagedCheckpoint: a file is missing, unreadable or changed. Whether the large files
                hold the arrays that were saved, `restore` finds out.
        """
        step = self._known(step)
        if what := on_the_first(lambda: damage(self._folder(step))):
            raise self._damaged(step, what)

    def restore(self, abstract_state: PyTree, step: int | None = None) -> tuple[PyTree, dict]:
        """The state and `extra` of `step` (default: the latest), bit for bit as they were saved.

        `abstract_state` is a pytree of `jax.ShapeDtypeStruct` with shardings, on any mesh.

        Raises:
            FileNotFoundError: the step does not exist.
            DamagedCheckpoint: its files are missing, unreadable or changed.
            ValueError: it holds other arrays than `abstract_state`.
        """
        step, manifest = self._open(step)
        wanted = named_leaves(abstract_state)
        check_shapes(self._folder(step), manifest["shapes"], wanted)
        arrays = self._read_arrays(step, manifest, wanted)
        leaves = [arrays[path] for path in wanted]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), manifest["extra"]

    def restore_some(self, wanted: dict, step: int | None = None) -> dict[str, Array]:
        """Some arrays of a step by path, in the types they were saved in; as `restore` otherwise.

        Args:
            wanted: path, such as "params.norm.scale.value", to `jax.ShapeDtypeStruct` with a
                sharding, whose dtype does not count.
        """
        step, manifest = self._open(step)
        saved = manifest["shapes"]
        wanted = {
            path: jax.ShapeDtypeStruct(
                array.shape, saved[path].partition("[")[0], sharding=array.sharding
            )
            if path in saved
            else array
            for path, array in wanted.items()
        }
        there = {path: saved[path] for path in wanted if path in saved}
        check_shapes(self._folder(step), there, wanted)
        return self._read_arrays(step, manifest, wanted)

    def shapes(self, step: int | None = None) -> dict[str, str]:
        """What a step (default: the latest) holds: path to type, such as "float32[61,7168]"."""
        return self._open(step)[1]["shapes"]

    def extra(self, step: int | None = None) -> dict:
        """What was saved beside the arrays of a step."""
        return self._open(step)[1]["extra"]

    def wait(self):
        """Return when the save under way has finished.

        Raises:
            SaveFailed: it failed.
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
        return ocp.CheckpointManager(self.directory, item_handlers=_handlers(), options=options)

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
            f"Intact: steps {self._finished_steps()}. Check free space and permissions there; "
            "the next save needs nothing else.",
            missing,
        )

    def _free(self) -> int:
        """Bytes that may still be written, as process 0 sees it."""
        return int(on_the_first(lambda: str(shutil.disk_usage(self.directory).free)))

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _finished_steps(self) -> list[int]:
        return sorted(ocp.path.step.checkpoint_steps(self.directory))

    def _newest(self) -> str | None:
        return max(map(str, self._finished_steps()), key=int, default=None)

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

    def _known(self, step: int | None) -> int:
        """The step asked for, or the latest."""
        known = self.steps()
        step = max(known, default=None) if step is None else step
        if step not in known:
            raise FileNotFoundError(f"no step {step} in {self.directory}; steps there: {known}")
        return step

    def _open(self, step: int | None) -> tuple[int, dict]:
        """The step asked for, or the latest, and its manifest."""
        step = self._known(step)
        return step, self._read_manifest(step)

    def _read_arrays(self, step: int, manifest: dict, wanted: dict) -> dict[str, Array]:
        """The arrays `wanted` of the step, each checked against its fingerprint."""
        there = without_empty(wanted)
        how = ocp.checkpoint_utils.construct_restore_args(there)
        arrays = self._read(
            step, "state", ocp.args.PyTreeRestore(there, restore_args=how, partial_restore=True)
        )
        if lost := [path for path in there if not isinstance(arrays.get(path), jax.Array)]:
            raise self._damaged(step, f"its state has no array {lost[0]}")
        found, expected = fingerprints(arrays), manifest["fingerprints"]
        if damaged := [path for path in found if found[path] != expected[path]]:
            more = f" and {len(damaged) - 1} more arrays" if len(damaged) > 1 else ""
            raise self._damaged(step, f"bits changed since it was saved, in {damaged[0]}{more}")
        for path in wanted.keys() - arrays.keys():
            empty = np.zeros(wanted[path].shape, wanted[path].dtype)
            arrays[path] = jax.device_put(empty, wanted[path].sharding)
        return arrays

    def _read(self, step: int, item: str, how: ocp.args.CheckpointArgs) -> dict:
        """One item of a step. If any process cannot read its part, all raise."""
        found, problem, cause = {}, None, None
        try:
            found = dict(self._readers[item].restore(self._folder(step) / item, args=how))
        except Exception as error:  # Orbax and its readers raise many types for an unreadable file
            cause, root = error, error.__cause__ or error
            problem = f"cannot read its {item}: {str(root)[:200]}"
        if (problem := shared(problem)) is not None:
            raise self._damaged(step, problem) from cause
        return found

    def _read_manifest(self, step: int) -> dict:
        manifest = self._read(step, "manifest", ocp.args.JsonRestore())
        if not is_sound(manifest):
            raise self._damaged(step, "its manifest does not match the checksum written with it")
        return manifest

    def _damaged(self, step: int, what: str) -> DamagedCheckpoint:
        rest = [other for other in self._finished_steps() if other != step]
        folder = self._folder(step)
        return DamagedCheckpoint(
            f"checkpoint {folder} is damaged: {what}\n"
            f"Move {folder} out of {self.directory}, as a run does that resumes there; "
            f"what is left are steps {rest}.",
            what,
        )


def _handlers() -> dict[str, ocp.CheckpointHandler]:
    """What writes and reads the items of a step, without waiting for other processes."""
    return {
        # Compression takes longer than writing, for a few percent of space.
        "state": ocp.PyTreeCheckpointHandler(use_compression=False),
        "manifest": ocp.JsonCheckpointHandler(),
    }


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:500]}"


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.3f} GB"
