"""Checkpoints of a run: Orbax files plus one fingerprint per array, so that damage is never silent.

Orbax writes in the background and commits a step by renaming its folder, so a killed save leaves
the steps before it as they were. Missing or shortened files fail on restore; a bit that flipped on
the disk does not, and would train on. Hence each step carries a manifest: shape, dtype and
fingerprint of every array, the caller's `extra`, and a checksum of the manifest itself.
"""

import collections
import contextlib
import json
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jaxtyping import PyTree

from dsv3_jax.shapes import Array, UInt32


class DamagedCheckpoint(ValueError):
    """Files of a saved step are missing, unreadable or changed since they were written."""


class Checkpoints:
    """The saved steps in one folder, of which the newest `keep` stay (all if None).

    So do all multiples of `keep_every`, if given.
    """

    def __init__(self, directory: str | Path, keep: int | None, keep_every: int | None = None):
        self.directory = Path(directory).absolute()
        self._pending: int | None = None
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, keep_period=keep_every)
        self._manager = ocp.CheckpointManager(self.directory, options=options)

    def steps(self) -> list[int]:
        """Steps on disk, oldest first, once the save under way has finished."""
        self.wait()
        return self._finished_steps()

    def latest_step(self) -> int | None:
        """The newest of `steps()`, or None."""
        return max(self.steps(), default=None)

    def save(self, step: int, state: PyTree, extra: dict):
        """Start writing `state`, a pytree of arrays, with `extra`, a dict that JSON can hold.

        Returns once the arrays are copied to the host, so they may be donated afterwards.

        Raises:
            ValueError: `step` is not newer than the saved ones.
            OSError: this save cannot start, or the one before it failed.
        """
        if (latest := self.latest_step()) is not None and step <= latest:
            raise ValueError(
                f"cannot save step {step} in {self.directory}: step {latest} is there already; "
                f"move the steps from {step} on away, or use another directory"
            )
        arrays = _named_leaves(state)
        stored = _without_empty(arrays)
        manifest = {
            "extra": json.loads(json.dumps(extra)),
            "shapes": {path: _signature(array) for path, array in arrays.items()},
            "fingerprints": fingerprints(stored),
        }
        manifest["checksum"] = _checksum(manifest)
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(stored), manifest=ocp.args.JsonSave(manifest)
        )
        self._pending = step
        with self._naming_the_failed_save():
            self._manager.save(step, args=items)

    def restore(self, abstract_state: PyTree, step: int | None = None) -> tuple[PyTree, dict]:
        """The state and `extra` of `step` (default: the latest), bit for bit as they were saved.

        `abstract_state` is a pytree of `jax.ShapeDtypeStruct` with shardings, on any mesh.

        Raises:
            FileNotFoundError: the step does not exist.
            DamagedCheckpoint: its files are missing, unreadable or changed.
            ValueError: it holds other arrays than `abstract_state`.
        """
        step, manifest = self._open(step)
        wanted = _named_leaves(abstract_state)
        self._check_shapes(step, manifest["shapes"], wanted)
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
        self._check_shapes(step, {path: saved[path] for path in wanted if path in saved}, wanted)
        return self._read_arrays(step, manifest, wanted)

    def shapes(self, step: int | None = None) -> dict[str, str]:
        """What a step (default: the latest) holds: path to type, such as "float32[61,7168]"."""
        return self._open(step)[1]["shapes"]

    def extra(self, step: int | None = None) -> dict:
        """What was saved beside the arrays of a step."""
        return self._open(step)[1]["extra"]

    def forget_after(self, step: int):
        """Delete the saved steps after this one."""
        for later in self.steps():
            if later > step:
                self._manager.delete(later)

    def wait(self):
        """Return when the save under way has finished; OSError if it failed (a full disk)."""
        with self._naming_the_failed_save():
            self._manager.wait_until_finished()
        self._pending = None

    def close(self):
        """Finish the save under way and stop the threads."""
        with contextlib.closing(self._manager):
            self.wait()

    def _finished_steps(self) -> list[int]:
        self._manager.reload()
        return sorted(self._manager.all_steps())

    @contextlib.contextmanager
    def _naming_the_failed_save(self):
        try:
            yield
        except Exception as error:
            raise OSError(
                f"saving step {self._pending} in {self.directory} failed: {error}\n"
                f"Intact: steps {self._finished_steps()}. Check free space and permissions there; "
                "the same command then resumes from the newest of them."
            ) from error

    def _open(self, step: int | None) -> tuple[int, dict]:
        """The step asked for, or the latest, and its manifest."""
        known = self.steps()
        step = max(known, default=None) if step is None else step
        if step not in known:
            raise FileNotFoundError(f"no step {step} in {self.directory}; steps there: {known}")
        return step, self._read_manifest(step)

    def _read_arrays(self, step: int, manifest: dict, wanted: dict) -> dict[str, Array]:
        """The arrays `wanted` of the step, each checked against its fingerprint."""
        there = _without_empty(wanted)
        how = ocp.checkpoint_utils.construct_restore_args(there)
        arrays = self._read(
            step, "state", ocp.args.PyTreeRestore(there, restore_args=how, partial_restore=True)
        )
        found, expected = fingerprints(arrays), manifest["fingerprints"]
        if damaged := [path for path in found if found[path] != expected[path]]:
            raise self._damaged(step, f"bits changed since it was saved, in {', '.join(damaged)}")
        for path in wanted.keys() - arrays.keys():
            empty = np.zeros(wanted[path].shape, wanted[path].dtype)
            arrays[path] = jax.device_put(empty, wanted[path].sharding)
        return arrays

    def _read(self, step: int, item: str, how: ocp.args.CheckpointArgs) -> dict:
        try:
            return dict(self._manager.restore(step, args=ocp.args.Composite(**{item: how}))[item])
        except Exception as error:  # Orbax and its readers raise many types for an unreadable file
            root = error.__cause__ or error
            raise self._damaged(step, f"cannot read its {item}: {str(root)[:200]}") from error

    def _read_manifest(self, step: int) -> dict:
        manifest = self._read(step, "manifest", ocp.args.JsonRestore())
        if manifest.pop("checksum", None) != _checksum(manifest):
            raise self._damaged(step, "its manifest does not match the checksum written with it")
        return manifest

    def _damaged(self, step: int, what: str) -> DamagedCheckpoint:
        rest = [other for other in self._finished_steps() if other != step]
        then = f"resumes from step {max(rest)}" if rest else "starts from the beginning"
        folder = self.directory / str(step)
        return DamagedCheckpoint(
            f"checkpoint {folder} is damaged: {what}\n"
            f"Move {folder} out of {self.directory}; training then {then}."
        )

    def _check_shapes(self, step: int, saved: dict[str, str], wanted: dict):
        asked = {path: _signature(array) for path, array in wanted.items()}
        paths = [*asked, *(path for path in saved if path not in asked)]
        if different := [path for path in paths if asked.get(path) != saved.get(path)]:
            first = different[0]
            raise ValueError(
                f"checkpoint {self.directory / str(step)} is of another config: array {first} is "
                f"{saved.get(first, 'absent')} there and {asked.get(first, 'absent')} in this run "
                f"({len(different)} of {len(paths)} arrays differ); "
                "run with the config that wrote it, or in another --workdir"
            )


def fingerprints(arrays: dict[str, Array]) -> dict[str, str]:
    """One 32-bit number an array, in hex, that depends on its bits and not on its sharding.

    It is the sum modulo 2^32 of mix(word xor mix(index)) over all elements, with the element's bits
    as `word` and its place in the whole array as `index`. `mix` is a bijection, so a change within
    one element, such as a flipped bit, changes one term and therefore always the sum; mixing the
    index makes a term depend on its place, so that exchanged elements show. Integer sums commute,
    so devices may add in any order. Other damage passes with a chance of 2^-32.
    """
    groups = collections.defaultdict(dict)  # one program runs on one set of devices
    for path, array in arrays.items():
        groups[frozenset(array.sharding.device_set)][path] = array
    totals = collections.ChainMap(*(jax.device_get(_totals(group)) for group in groups.values()))
    return {path: f"{int(totals[path]):08x}" for path in arrays}


@jax.jit
def _totals(arrays: dict[str, Array]) -> dict[str, UInt32[Array, ""]]:
    return {path: fingerprint(array) for path, array in arrays.items()}


def fingerprint(array: Array) -> UInt32[Array, ""]:
    """The number that `fingerprints` writes in hex, of one array."""
    bits = array.astype(jnp.uint8) if array.dtype == bool else array
    word = {1: jnp.uint8, 2: jnp.uint16}.get(bits.dtype.itemsize, jnp.uint32)
    words = jax.lax.bitcast_convert_type(bits, word).astype(jnp.uint32)  # 64 bits: two words
    # No reshape to one dim: each device numbers the elements it holds, without communication.
    index = jnp.zeros(words.shape, jnp.uint32)
    for dim, size in enumerate(words.shape):
        place = jax.lax.broadcasted_iota(jnp.uint32, words.shape, dim)
        index = index * jnp.uint32(size) + place
    return _mix(words ^ _mix(index)).sum(dtype=jnp.uint32)


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
    """A bijection of 32-bit words that spreads each bit over all (the finalizer of MurmurHash3)."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _named_leaves(tree: PyTree) -> dict:
    """Leaves by path, such as "params.embed.weight", in the order of the tree."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _signature(array: Array | jax.ShapeDtypeStruct) -> str:
    return f"{array.dtype}[{','.join(map(str, array.shape))}]"


def _without_empty(arrays: dict) -> dict:
    """Orbax refuses arrays without elements; their shape in the manifest says all."""
    return {path: array for path, array in arrays.items() if array.size}


def _checksum(manifest: dict) -> str:
    return f"{zlib.crc32(json.dumps(manifest, sort_keys=True).encode()):08x}"
