"""Reading saved steps: each array is bit for bit what was saved, or an error says what is not.

An Orbax restore fails where files are missing or shortened; a bit that flipped on the disk it does
not notice, and a run would train on. Hence each step carries a manifest: shape, dtype and
fingerprint of every array, the `extra` of whoever saved it, and a checksum of the manifest itself.
For the bits that no array holds there is a record of its files (see `files`).
"""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from dsv3_jax.checkpoint.files import damage
from dsv3_jax.checkpoint.integrity import fingerprints
from dsv3_jax.checkpoint.manifest import check_shapes, is_sound, named_leaves, without_empty
from dsv3_jax.checkpoint.processes import on_the_first, shared
from dsv3_jax.shapes import Array


class DamagedCheckpoint(ValueError):
    """Files of a saved step are missing, unreadable or changed since they were written: `what`."""

    def __init__(self, message: str, what: str):
        super().__init__(message)
        self.what = what


class SavedSteps:
    """The steps in one folder, for those who read them: nothing is changed there.

    Which step is newer, its number says, never a clock. With several processes, all call the same
    methods in the same order, on one shared folder, and all come to the same result.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).absolute()
        self._readers = handlers()

    def steps(self) -> list[int]:
        """Steps on disk, oldest first."""
        return sorted(ocp.path.step.checkpoint_steps(self.directory))

    def latest_step(self) -> int | None:
        """The newest of `steps()`, or None; with several processes, as process 0 sees it."""
        newest = max(self.steps(), default=None)
        told = on_the_first(lambda: None if newest is None else str(newest))
        return None if told is None else int(told)

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

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _known(self, step: int | None) -> int:
        """The step asked for, or the latest."""
        step = self.latest_step() if step is None else step
        if step not in (known := self.steps()):
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
        except (jax.errors.JaxRuntimeError, MemoryError):  # no room, which is no fault of the files
            raise
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
        rest = [other for other in self.steps() if other != step]
        folder = self._folder(step)
        return DamagedCheckpoint(
            f"checkpoint {folder} is damaged: {what}\n"
            f"Move {folder} out of {self.directory}, as a run does that resumes there; "
            f"what is left are steps {rest}.",
            what,
        )


def handlers() -> dict[str, ocp.CheckpointHandler]:
    """What writes and reads the items of a step, without waiting for other processes."""
    return {
        # Compression takes longer than writing, for a few percent of space.
        "state": ocp.PyTreeCheckpointHandler(use_compression=False),
        "manifest": ocp.JsonCheckpointHandler(),
    }
