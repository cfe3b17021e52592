"""The supervisor, with small scripts in place of runs: what it starts again, and when it stops."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dsv3_jax.training import supervisor

ROOT = Path(__file__).parent.parent
COUNT = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
number = len(list(folder.glob("start-*")))
(folder / f"start-{number}").touch()
"""


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(supervisor, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(supervisor, "LONGEST_WAIT", 0.02)
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)


def run(tmp_path, body: str, n: int = 1, supervise: bool = True) -> int:
    command = [sys.executable, "-c", COUNT + body, str(tmp_path)]
    return supervisor.supervise(command, n, supervise, tmp_path)


def starts(tmp_path) -> int:
    return len(list(tmp_path.glob("start-*")))


def events(tmp_path) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]


def test_crashes_are_started_again(tmp_path, capfd):
    body = "if number < 2: sys.exit('boom')"
    assert run(tmp_path, body) == 0 and starts(tmp_path) == 3
    assert [event["event"] for event in events(tmp_path)] == ["crashed", "crashed"]
    assert events(tmp_path)[0]["text"] == "it ended with exit code 1: boom"
    assert "supervisor: crashed: it ended with exit code 1: boom" in capfd.readouterr().err


@pytest.mark.parametrize("code", [2, 130, 143])
def test_what_would_fail_again_and_what_was_stopped_is_not(tmp_path, code):
    assert run(tmp_path, f"sys.exit({code})") == code and starts(tmp_path) == 1


def test_without_supervision_a_crash_is_the_end(tmp_path):
    assert run(tmp_path, "sys.exit(3)", supervise=False) == 3 and starts(tmp_path) == 1


def test_it_gives_up_with_the_reason(tmp_path, capfd):
    assert run(tmp_path, "sys.exit('no such disk')") == 1
    assert starts(tmp_path) == supervisor.MAX_CRASHES
    assert "giving up after 5 crashes without a new checkpoint" in capfd.readouterr().err
    assert events(tmp_path)[-1]["event"] == "gave up"
    assert "no such disk" in events(tmp_path)[-1]["text"]


def test_a_new_checkpoint_starts_the_count_anew(tmp_path):
    body = "(folder / 'checkpoints' / str(number // 4)).mkdir(parents=True, exist_ok=True)\n"
    assert run(tmp_path, body + "sys.exit(1 if number < 12 else 0)") == 0
    assert starts(tmp_path) == 13


def test_a_killed_process_takes_the_others_along(tmp_path):
    """Process 1 of three dies by SIGKILL at the first start; the others would wait for ever."""
    body = """
import os, signal
address, process, count = sys.argv[2].removeprefix("--join=").split(",")
assert count == "3"
first = not (folder / "killed").exists()
if first and process == "1":
    (folder / "killed").touch()
    os.kill(os.getpid(), signal.SIGKILL)
if first:
    time.sleep(600)
"""
    begin = time.monotonic()
    assert run(tmp_path, body, n=3) == 0
    assert time.monotonic() - begin < 30
    assert events(tmp_path)[0]["text"].startswith("process 1 ended with SIGKILL")


def test_signals_are_passed_on(tmp_path):
    """SIGTERM ends a run that saves on it, and the supervisor with its code."""
    script = """
import pathlib, signal, sys, time
def stop(number, frame): sys.exit(128 + number)
signal.signal(signal.SIGTERM, stop)
pathlib.Path(sys.argv[1], "ready").touch()
time.sleep(600)
"""
    parent = f"""
import sys
from pathlib import Path
from dsv3_jax.training.supervisor import supervise
folder = {str(tmp_path)!r}
sys.exit(supervise([sys.executable, "-c", {script!r}, folder], 1, True, Path(folder)))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", parent], env=environment)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143
