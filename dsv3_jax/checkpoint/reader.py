"""Reading saved steps: each array is bit for bit what was saved, or an error says what is not.

An Orbax restore fails where files are missing or shortened; a bit that flipped on the disk it does
not notice, and a run would train on. `integrity` describes the records that show such damage.
"""

from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from dsv3_jax.checkpoint.integrity import (
    find_damage,
    fingerprints,
    manifest_is_intact,
    signature,
)
from dsv3_jax.checkpoint.processes import broadcast_first, on_process_zero
from dsv3_jax.shapes import Array


class DamagedCheckpoint(ValueError):
    """Files of a saved step are missing, unreadable or changed since they were written.

    `reason` is the damage in a few words, without the way out that the message adds.
    """

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class CheckpointReader:
    """The saved steps in one folder, for reading only: nothing is changed there.

    A step is newer than another by its number, never by a clock. With several processes, all call
    the same methods in the same order, on one shared folder, and all come to the same result.
    """

    def __init__(self, directory: str | Path):
        self.directory = Path(directory).absolute()
        self._readers = handlers()

    def steps(self) -> list[int]:
        """Return the steps on disk, oldest first."""
        return sorted(ocp.path.step.checkpoint_steps(self.directory))

    def latest_step(self) -> int | None:
        """Return the newest of `steps()`, or None; with several processes, as process 0 sees it."""
        newest = max(self.steps(), default=None)
        text = on_process_zero(lambda: None if newest is None else str(newest))
        return None if text is None else int(text)

    def verify(self, step: int | None = None):
        """Compare the files of a step (default: the latest) with its file record.

        Raises:
            FileNotFoundError: the step does not exist.
            DamagedCheckpoint: a file is missing, unreadable or changed. Whether the large files
                hold the arrays that were saved, `restore` finds out.
        """
        step = self._existing(step)
        if reason := on_process_zero(lambda: find_damage(self._folder(step))):
            raise self._damaged(step, reason)

    def restore(self, abstract_state: PyTree, step: int | None = None) -> tuple[PyTree, dict]:
        """Restore state and `extra` of `step` (default: the latest), bit for bit as saved.

        `abstract_state` is a pytree of `jax.ShapeDtypeStruct` with shardings, on any mesh.

        Raises:
            FileNotFoundError: the step does not exist.
            DamagedCheckpoint: its files are missing, unreadable or changed.
            ValueError: it holds other arrays than `abstract_state`.
        """
        step, manifest = self._open(step)
        abstract = named_leaves(abstract_state)
        _check_signatures(self._folder(step), manifest["shapes"], abstract)
        arrays = self._read_arrays(step, manifest, abstract)
        leaves = [arrays[path] for path in abstract]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), leaves), manifest["extra"]

    def restore_arrays(
        self, abstract: dict[str, jax.ShapeDtypeStruct], step: int | None = None
    ) -> dict[str, Array]:
        """Restore some arrays of a step, in the types they were saved in; else as `restore`.

        Args:
            abstract: path, such as "params.norm.scale.value", to a shape with a sharding; its
                dtype does not count.
        """
        step, manifest = self._open(step)
        saved = manifest["shapes"]
        abstract = {
            path: array.update(dtype=saved[path].partition("[")[0]) if path in saved else array
            for path, array in abstract.items()
        }
        _check_signatures(
            self._folder(step), {path: saved[path] for path in abstract if path in saved}, abstract
        )
        return self._read_arrays(step, manifest, abstract)

    def signatures(self, step: int | None = None) -> dict[str, str]:
        """Return dtype and shape by path, such as "float32[61,7168]", of each array of a step."""
        return self._open(step)[1]["shapes"]

    def _folder(self, step: int) -> Path:
        return self.directory / str(step)

    def _existing(self, step: int | None) -> int:
        """Return `step`, or the latest if it is None; raise unless it is on disk."""
        step = self.latest_step() if step is None else step
        if step not in (known := self.steps()):
            raise FileNotFoundError(f"no step {step} in {self.directory}; steps there: {known}")
        return step

    def _open(self, step: int | None) -> tuple[int, dict]:
        """Return the number and the manifest of `step`, or of the latest."""
        step = self._existing(step)
        manifest = self._read(step, "manifest", ocp.args.JsonRestore())
        if not manifest_is_intact(manifest):
            raise self._damaged(step, "its manifest does not match the checksum written with it")
        return step, manifest

    def _read_arrays(self, step: int, manifest: dict, abstract: dict) -> dict[str, Array]:
        """Read arrays of a step and compare each with its fingerprint."""
        stored = without_empty(abstract)
        restore_args = ocp.checkpoint_utils.construct_restore_args(stored)
        arrays = self._read(
            step,
            "state",
            ocp.args.PyTreeRestore(stored, restore_args=restore_args, partial_restore=True),
        )
        if lost := [path for path in stored if not isinstance(arrays.get(path), jax.Array)]:
            raise self._damaged(step, f"its state has no array {lost[0]}")
        found, expected = fingerprints(arrays), manifest["fingerprints"]
        if damaged := [path for path in found if found[path] != expected[path]]:
            more = f" and {len(damaged) - 1} more arrays" if len(damaged) > 1 else ""
            raise self._damaged(step, f"bits changed since it was saved, in {damaged[0]}{more}")
        for path in abstract.keys() - arrays.keys():
            empty = np.zeros(abstract[path].shape, abstract[path].dtype)
            arrays[path] = jax.device_put(empty, abstract[path].sharding)
        return arrays

    def _read(self, step: int, item: str, args: ocp.args.CheckpointArgs) -> dict:
        """Read one item of a step. If any process cannot read its part, all raise."""
        found, problem, cause = {}, None, None
        try:
            found = dict(self._readers[item].restore(self._folder(step) / item, args=args))
        except (jax.errors.JaxRuntimeError, MemoryError):  # no room, which is no fault of the files
            raise
        except Exception as error:  # Orbax and its readers raise many types for an unreadable file
            cause, root = error, error.__cause__ or error
            problem = f"cannot read its {item}: {str(root)[:200]}"
        if (problem := broadcast_first(problem)) is not None:
            raise self._damaged(step, problem) from cause
        return found

    def _damaged(self, step: int, reason: str) -> DamagedCheckpoint:
        rest = [other for other in self.steps() if other != step]
        folder = self._folder(step)
        return DamagedCheckpoint(
            f"checkpoint {folder} is damaged: {reason}\n"
            f"Move {folder} out of {self.directory}, as a run does that resumes there; "
            f"what is left are steps {rest}.",
            reason,
        )


def handlers() -> dict[str, ocp.CheckpointHandler]:
    """Return what writes and reads the items of a step, without waiting for other processes."""
    return {
        # Compression takes longer than writing, for a few percent of space.
        "state": ocp.PyTreeCheckpointHandler(use_compression=False),
        "manifest": ocp.JsonCheckpointHandler(),
    }


def named_leaves(tree: PyTree) -> dict:
    """Return leaves by path, such as "params.embed.weight", in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def without_empty(arrays: dict) -> dict:
    """Return the arrays with elements: Orbax refuses others, whose signature says all."""
    return {path: array for path, array in arrays.items() if array.size}


def _check_signatures(folder: Path, saved: dict[str, str], abstract: dict):
    """Raise a ValueError unless the arrays saved in `folder` are those of `abstract`, by path."""
    asked = {path: signature(array) for path, array in abstract.items()}
    paths = [*asked, *(path for path in saved if path not in asked)]
    if different := [path for path in paths if asked.get(path) != saved.get(path)]:
        first = different[0]
        raise ValueError(
            f"checkpoint {folder} is of another config: array {first} is "
            f"{saved.get(first, 'absent')} there and {asked.get(first, 'absent')} in this run "
            f"({len(different)} of {len(paths)} arrays differ); "
            "run with the config that wrote it, or in another --workdir"
        )
