import collections
import gc
import json
import random
import re
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from reference.states import abstract, same_bits, saved

from dsv3_jax.checkpoint import CheckpointManager, CheckpointReader, DamagedCheckpoint
from dsv3_jax.checkpoint.integrity import FILE_RECORD, find_damage, write_file_record

# Orbax abandons the other reads of a step once one of them has failed.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:coroutine .* was never awaited:RuntimeWarning"),
]


@pytest.fixture(scope="module", autouse=True)
def collect_abandoned_reads():
    """Let them go while their warnings are off, not when the session ends."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def three_steps(tmp_path_factory) -> tuple[Path, dict]:
    """A folder with steps 3, 6 and 9, and the state that each of them holds."""
    folder = tmp_path_factory.mktemp("checkpoints")
    checkpoints, state = saved(folder, [3, 6, 9])
    checkpoints.close()
    return folder, state


@pytest.fixture
def copy(three_steps, tmp_path) -> tuple[Path, dict]:
    """The same, for one test to damage."""
    return shutil.copytree(three_steps[0], tmp_path / "checkpoints"), three_steps[1]


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def flipped(sound: bytes, rng: random.Random) -> bytes:
    """With one bit changed."""
    position, bit = rng.randrange(len(sound)), rng.randrange(8)
    return sound[:position] + bytes([sound[position] ^ 1 << bit]) + sound[position + 1 :]


def test_each_flipped_bit_in_each_kind_of_file_is_found_and_named(copy):
    folder, rng = copy[0] / "9", random.Random(0)
    kinds = collections.defaultdict(list)
    for path in files_of(folder):
        kinds["data" if path.parent.name == "d" else path.name].append(path)
    assert kinds.keys() == {
        "_CHECKPOINT_METADATA",
        "_METADATA",
        "_sharding",
        "commit_success.txt",
        "data",
        "manifest.ocdbt",
        "metadata",
        "process_0",
        FILE_RECORD,
    }
    assert find_damage(folder) is None
    for paths in kinds.values():
        for path in rng.choices(paths, k=50):
            sound = path.read_bytes()
            path.write_bytes(flipped(sound, rng))
            assert find_damage(folder).startswith(str(path.relative_to(folder)))
            path.write_bytes(sound)
    assert find_damage(folder) is None


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), r" has [\d,]+ bytes instead of "),
        (lambda path: path.write_bytes(b""), " has 0 bytes instead of "),
        (lambda path: path.write_bytes(path.read_bytes() + b"0"), r" has [\d,]+ bytes instead of "),
        (lambda path: path.unlink(), " is missing"),
        (lambda path: (path.unlink(), path.mkdir()), " is no file any more"),
    ],
    ids=["shorter", "empty", "longer", "missing", "folder"],
)
def test_each_file_that_is_not_whole_is_found_and_named(copy, change, expected):
    folder = copy[0] / "9"
    for path in files_of(folder):
        if path.name == FILE_RECORD:
            continue
        sound = path.read_bytes()
        change(path)
        assert re.match(re.escape(str(path.relative_to(folder))) + expected, find_damage(folder))
        if path.is_dir():
            path.rmdir()
        path.write_bytes(sound)
    assert find_damage(folder) is None


def test_record_that_is_not_whole_is_found(copy):
    record = copy[0] / "9" / FILE_RECORD
    sound = record.read_bytes()
    for cut in (b"", sound[:-1], sound[:20]):
        record.write_bytes(cut)
        assert find_damage(record.parent).startswith(FILE_RECORD)
    record.unlink()
    record.mkdir()
    assert find_damage(record.parent) == f"{FILE_RECORD} cannot be read: Is a directory"


def test_unreadable_files_are_named(copy, monkeypatch):
    folder, real = copy[0] / "9", Path.open

    def denied(path, *args, **kwargs):
        if path.name == "metadata":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", denied)
    assert find_damage(folder) == "manifest/metadata cannot be read: Permission denied"


def test_all_damaged_files_are_counted_and_additional_ones_ignored(copy):
    folder = copy[0] / "9"
    (folder / "state" / ".nfs0001").write_bytes(b"left by a file system")
    assert find_damage(folder) is None
    for name in ("_METADATA", "_sharding", "manifest.ocdbt"):
        (folder / "state" / name).unlink()
    assert find_damage(folder) == "state/_METADATA is missing (and 2 more of its files)"


def test_large_files_are_recorded_by_size_only(copy):
    """Their bits are for the fingerprints of the arrays; see the next test."""
    folder = copy[0] / "9"
    largest = max(files_of(folder), key=lambda path: path.stat().st_size)
    write_file_record(folder, max_crc_bytes=largest.stat().st_size - 1)
    sound = largest.read_bytes()
    largest.write_bytes(flipped(sound, random.Random(0)))
    assert find_damage(folder) is None
    largest.write_bytes(sound[:-1])
    assert find_damage(folder).startswith(str(largest.relative_to(folder)))


def test_no_flipped_bit_restores_other_values(tmp_path):
    checkpoints, state = saved(tmp_path, [1])
    target, expected = abstract(state), checkpoints.restore(abstract(state))
    files = sorted(path for path in (tmp_path / "1").rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    rng, by_fingerprint = random.Random(0), 0
    picks = rng.choices(files, weights=sizes, k=40) + rng.choices(files, k=20)
    for path in picks:
        sound = path.read_bytes()
        path.write_bytes(flipped(sound, rng))
        try:
            restored, extra = checkpoints.restore(target)
            assert same_bits(restored, expected[0]) and extra == expected[1], path
        except DamagedCheckpoint as error:
            by_fingerprint += "bits changed" in str(error)
        path.write_bytes(sound)
    assert by_fingerprint >= 10  # Orbax alone would have restored these silently
    checkpoints.close()


@pytest.mark.parametrize("kind", ["missing", "cut", "emptied"])
def test_lost_files_are_named_with_the_way_out(tmp_path, kind):
    checkpoints, state = saved(tmp_path, [3, 6])
    folder = tmp_path / "6"
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    if kind == "missing":
        largest.unlink()
    elif kind == "cut":
        largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    else:
        shutil.rmtree(folder / "state")
    with pytest.raises(DamagedCheckpoint, match=rf"{folder} is damaged") as caught:
        checkpoints.restore(abstract(state))
    assert f"Move {folder} out of {tmp_path}" in str(caught.value)
    assert "what is left are steps [3]" in str(caught.value)
    assert caught.value.__cause__ is not None
    shutil.move(folder, tmp_path / "elsewhere")
    assert checkpoints.latest_step() == 3
    assert same_bits(checkpoints.restore(abstract(state))[0], state)
    checkpoints.close()


def test_a_changed_position_in_the_manifest_is_caught(tmp_path):
    checkpoints, state = saved(tmp_path, [1])
    path = tmp_path / "1" / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    manifest["extra"]["tokens"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(DamagedCheckpoint, match="manifest does not match the checksum"):
        checkpoints.restore(abstract(state))
    checkpoints.close()


def test_damaged_steps_are_quarantined_for_the_newest_sound_one(copy, capsys):
    folder, state = copy
    (folder / "9" / "state" / "_sharding").unlink()
    metadata = folder / "6" / "_CHECKPOINT_METADATA"
    metadata.write_text(metadata.read_text().replace('_nsecs": 1', '_nsecs": {'))
    checkpoints = CheckpointManager(folder, 3)
    resumed = checkpoints.resume(abstract(state))
    assert resumed.step == 3 and resumed.extra["step"] == 3 and same_bits(resumed.state, state)
    assert capsys.readouterr().out.splitlines() == [
        f"checkpoint {folder / '9'} is damaged: state/_sharding is missing; it was moved to "
        f"{folder / 'damaged' / '9'}",
        f"checkpoint {folder / '6'} is damaged: _CHECKPOINT_METADATA has bits that changed since "
        f"it was saved; it was moved to {folder / 'damaged' / '6'}",
    ]
    for step in (6, 9):
        checkpoints.save(step, state, {"step": step})
    assert checkpoints.steps() == [3, 6, 9]
    (folder / "9" / "state" / "_sharding").unlink()
    assert checkpoints.resume(abstract(state)).step == 6
    assert sorted(path.name for path in (folder / "damaged").iterdir()) == ["6", "9", "9-2"]
    checkpoints.save(12, state, {})
    checkpoints.save(15, state, {})
    assert checkpoints.steps() == [6, 12, 15]  # a quarantined step counts no more
    checkpoints.close()


def test_arrays_decide_on_a_step_without_a_record(copy, capsys):
    """As a kill between commit and record leaves it."""
    folder, state = copy
    for step in (6, 9):
        (folder / str(step) / FILE_RECORD).unlink()
    kernel = jax.tree.leaves(state["params"])[1]
    piece = np.asarray(kernel.addressable_shards[3].data).tobytes()
    (path,) = (path for path in files_of(folder / "9") if piece in path.read_bytes())
    before, _, after = path.read_bytes().partition(piece)
    path.write_bytes(before + flipped(piece, random.Random(0)) + after)
    checkpoints = CheckpointManager(folder, 3)
    assert checkpoints.resume(abstract(state)).step == 6
    assert (
        "9 is damaged: bits changed since it was saved, in params.kernel.value;"
        in capsys.readouterr().out
    )
    checkpoints.close()


def test_a_run_never_starts_over_because_all_is_damaged(copy):
    folder, state = copy
    for step in (3, 6, 9):
        (folder / str(step) / "state" / "_METADATA").unlink()
    for _ in range(2):  # the second time, all lie aside already
        checkpoints = CheckpointManager(folder, 3)
        with pytest.raises(DamagedCheckpoint, match=r"no sound checkpoint .*\(3, 6, 9\).*remove"):
            checkpoints.resume(abstract(state))
        assert checkpoints.steps() == []
        checkpoints.close()
    shutil.rmtree(folder / "damaged")
    checkpoints = CheckpointManager(folder, 3)
    assert checkpoints.resume(abstract(state)) is None
    checkpoints.close()


def test_a_checkpoint_of_another_config_stays_where_it_is(copy):
    folder, state = copy
    checkpoints = CheckpointManager(folder, 3)
    with pytest.raises(ValueError, match="is of another config") as caught:
        checkpoints.resume(abstract(state | {"step": jnp.ones(2)}))
    assert not isinstance(caught.value, DamagedCheckpoint)
    assert checkpoints.steps() == [3, 6, 9] and not (folder / "damaged").exists()
    checkpoints.close()


@pytest.mark.parametrize("error", [jax.errors.JaxRuntimeError, MemoryError])
def test_a_step_that_does_not_fit_in_memory_is_not_damaged(copy, monkeypatch, error):
    def no_room(*args, **kwargs):
        raise error("RESOURCE_EXHAUSTED: out of memory")

    folder, state = copy
    checkpoints = CheckpointManager(folder, 3)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.PyTreeCheckpointHandler, "restore", no_room)
        with pytest.raises(error):
            checkpoints.resume(abstract(state))
    assert checkpoints.resume(abstract(state)).step == 9
    checkpoints.close()


def test_readers_leave_a_damaged_step_where_it_is(copy):
    folder, state = copy
    (folder / "9" / "manifest" / "metadata").unlink()
    checkpoints = CheckpointReader(folder)
    for read in (
        checkpoints.verify,
        lambda: checkpoints.restore(abstract(state)),
        lambda: checkpoints.restore_arrays({"step": abstract(state["step"])}),
    ):
        with pytest.raises(DamagedCheckpoint, match="manifest"):
            read()
    assert checkpoints.steps() == [3, 6, 9] and not (folder / "damaged").exists()
