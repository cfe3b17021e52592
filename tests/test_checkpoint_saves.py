import contextlib
import multiprocessing
import os
import random
import resource
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from reference.saver import save_forever
from reference.states import EXTRA, abstract, same_bits, saved

from dsv3_jax.checkpoint import CheckpointManager, SaveFailed
from dsv3_jax.checkpoint import manager as module

ROOT = Path(__file__).parent.parent
PATHS = f"{ROOT}:{ROOT / 'tests'}"
NOISE = 1 << 22  # bytes


@pytest.fixture
def noise() -> dict:
    return {"w": jax.random.bits(jax.random.key(0), (NOISE // 4,), jnp.uint32)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def files_up_to(n_bytes: int):
    """As a disk with so much left, which says that it has more: a quota, or other writers."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_killed_save_leaves_the_step_before(tmp_path):
    checkpoints, state = saved(tmp_path, [1, 2])
    checkpoints.close()
    for step in (3, 4):
        left = tmp_path / f"{step}.orbax-checkpoint-tmp"  # the name under which Orbax writes a step
        shutil.copytree(tmp_path / "2", left)
        shutil.rmtree(left / "manifest")
    reader = CheckpointManager(tmp_path, None)
    assert same_bits(reader.restore(abstract(state))[0], state)
    reader.close()
    assert left.exists()  # it may be that of a run that is still going on
    again = CheckpointManager(tmp_path, 2)
    resumed = again.resume(abstract(state))
    assert resumed.step == 2 and same_bits(resumed.state, state)
    assert names(tmp_path) == ["1", "2"]
    again.save(3, state, EXTRA)
    assert again.steps() == [2, 3]
    again.close()


def test_a_full_disk_is_noticed_before_anything_is_written(tmp_path, noise, monkeypatch):
    checkpoints = CheckpointManager(tmp_path, 1)
    small = {"w": jnp.arange(8.0)}
    checkpoints.save(1, small, EXTRA)
    checkpoints.wait()
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=NOISE - 2_000_000))
    with pytest.raises(SaveFailed) as caught:
        checkpoints.save(2, noise, EXTRA)
    assert caught.value.missing_bytes == 2_000_000
    assert (
        f"saving step 2 in {tmp_path} failed: the disk is too full\n"
        "It needs 0.004 GB, 0.002 GB are free there, 0.002 GB are missing. Intact: steps [1]."
    ) in str(caught.value)
    assert names(tmp_path) == ["1"]
    checkpoints.wait()  # there is nothing to wait for, and nothing is said twice
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=NOISE))
    checkpoints.save(2, noise, EXTRA)
    assert checkpoints.resume(abstract(noise)).step == 2
    checkpoints.close()


def test_a_failed_write_names_its_step_and_spares_the_others(tmp_path, noise):
    checkpoints = CheckpointManager(tmp_path, 1)
    small = {"w": jnp.arange(8.0)}
    checkpoints.save(1, small, EXTRA)
    checkpoints.wait()
    message = r"(?s)saving step {} in .* failed.*It needs 0.004 GB.*Intact: steps \[1\]"
    with files_up_to(1 << 20):
        checkpoints.save(2, noise, EXTRA)
        assert checkpoints.latest_step() == 1  # whoever asks is answered, and the failure kept
        assert names(tmp_path) == ["1"]
        with pytest.raises(SaveFailed, match=message.format(2)) as caught:
            checkpoints.wait()
        assert caught.value.missing_bytes is None and caught.value.__cause__ is not None
        checkpoints.wait()
        checkpoints.save(3, noise, EXTRA)
        with pytest.raises(SaveFailed, match=message.format(3)):
            checkpoints.save(4, noise, EXTRA)
    assert checkpoints.steps() == [1]
    assert same_bits(checkpoints.restore(abstract(small))[0], small)
    checkpoints.save(4, noise, EXTRA)
    assert checkpoints.steps() == [4]
    assert same_bits(checkpoints.restore(abstract(noise))[0], noise)
    checkpoints.close()


def test_the_last_failure_is_told_when_closing(tmp_path, noise):
    checkpoints = CheckpointManager(tmp_path, 1)
    with files_up_to(1 << 20):
        checkpoints.save(2, noise, EXTRA)
        with pytest.raises(SaveFailed, match="saving step 2"):
            checkpoints.close()
    assert names(tmp_path) == []


def test_a_step_whose_record_fails_is_told_and_stays(tmp_path, monkeypatch):
    def full(folder):
        raise OSError(28, "No space left on device", str(folder))

    checkpoints = CheckpointManager(tmp_path, 2)
    state = {"w": jnp.arange(8.0)}
    with monkeypatch.context() as patch:
        patch.setattr(module, "write_file_record", full)
        checkpoints.save(1, state, EXTRA)
        with pytest.raises(SaveFailed, match=r"(?s)No space left.*Intact: steps \[1\]"):
            checkpoints.wait()
    assert checkpoints.resume(abstract(state)).step == 1
    checkpoints.save(2, state, EXTRA)
    assert checkpoints.steps() == [1, 2]
    checkpoints.close()


@pytest.mark.slow
def test_kills_at_any_moment_lose_nothing(tmp_path, monkeypatch):
    """Thirty of them; each life of the saver resumes, says whether it is exact, and saves on."""
    monkeypatch.setenv("PYTHONPATH", PATHS)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reference.saver"])  # imports once, before any device is there
    random_moment, committed, n_cut = random.Random(0), 0, 0
    for _ in range(31):
        reports, theirs = context.Pipe(duplex=False)
        saver = context.Process(target=save_forever, args=(tmp_path, theirs))
        saver.start()
        theirs.close()
        step, exact = reports.recv()
        assert exact and step >= committed
        if step == 0:
            reports.recv()
        time.sleep(random_moment.uniform(0, 0.3))
        saver.kill()
        saver.join()
        committed = step
        with contextlib.suppress(EOFError):
            while True:
                committed = reports.recv()
        left = [name for name in names(tmp_path) if "tmp" in name]
        assert len(left) <= 1  # those of earlier kills are gone
        n_cut += len(left)
    assert committed > 5 and n_cut > 5  # the kills did hit saves, and it went on between them
    assert not (tmp_path / "damaged").exists()


@pytest.mark.slow
def test_two_processes_come_to_the_same_decisions(tmp_path):
    """See the script: what one of them finds or lacks, both act on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    script = ROOT / "tests" / "reference" / "two_savers.py"
    processes = [
        subprocess.Popen(
            [sys.executable, script, port, str(number), tmp_path],
            env=os.environ | {"PYTHONPATH": PATHS},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    first, second = (process.communicate(timeout=120)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0]
    assert "4 is damaged: cannot read its state" in first
    assert "3 is damaged: bits changed since it was saved, in weights;" in first
    assert "2 is damaged: state/_sharding is missing;" in first
    assert "damaged" not in second  # the first alone moves steps and says so
    assert names(tmp_path) == ["1", "6", "damaged"]
