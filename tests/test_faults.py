"""What a run survives: bad batches, kills, processes that die; and what its ledger says of it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from reference.train_command import ROOT, command, rows_of

from dsv3_jax.training.goodput import goodput

HERE = Path(__file__).parent


def events_of(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "events.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_bad_batches_are_skipped_and_left_behind(tmp_path, programs):
    """Against runs whose loader leaves the same data out; a batch has 8 sequences.

    Two bad steps in a row are skipped; of three the run goes back to step 10, and behind the data
    of the step that was on its way when it noticed.
    """
    steps, patience = "train.steps=24", "guard.roll_back_after=3"
    wanted = {
        "two bad": {"bad": [88, 104], "settings": [steps, patience]},
        "two left out": {"jump": [12, 16], "settings": ["train.steps=22", patience]},
        "three bad": {"bad": [88, 112], "settings": [steps, patience]},
        "five left out": {"jump": [11, 40], "settings": [steps, patience]},
        "all bad": {"bad": [0, 9999], "settings": [steps, patience]},
        "slow data": {"wait": 0.25, "settings": ["train.steps=40"]},
    }
    run = [sys.executable, str(HERE / "reference/faulty_runs.py"), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{HERE}"}
    done = subprocess.run(
        [*run, json.dumps(wanted)], capture_output=True, text=True, env=environment, check=True
    )
    measured = json.loads(done.stdout.splitlines()[-1])

    rows, without = rows_of(tmp_path / "two bad"), rows_of(tmp_path / "two left out")
    assert [step for step, row in rows.items() if "skipped" in row] == [12, 13]
    for step, row in without.items():
        same = rows[step if step < 12 else step + 2]
        for name in ("loss", "mtp_loss", "grad_norm", "lr", "max_violation"):
            assert same[name] == row[name], (step, name)
    told = events_of(tmp_path / "two bad")
    assert [event["step"] for event in told] == [12, 13]
    assert "the gradient is not finite (norm nan); sequences 88 to 95 of" in told[0]["text"]

    rows, without = rows_of(tmp_path / "three bad"), rows_of(tmp_path / "five left out")
    assert rows == without and list(rows) == list(range(1, 25))
    told = [event["event"] for event in events_of(tmp_path / "three bad")]
    assert told == ["skipped", "skipped", "skipped", "rolled back"]

    assert "3 steps in a row, to step 3, were skipped" in measured["all bad"]["error"]
    assert "There is no earlier checkpoint to go back to (none)" in measured["all bad"]["error"]

    found, here = goodput(tmp_path / "slow data"), measured["slow data"]
    assert sum(found.seconds.values()) == pytest.approx(here["seconds"], rel=0.02)
    assert found.seconds["data"] - here["waited"] == pytest.approx(0.0, abs=0.02 * here["seconds"])


def newest_fingerprints(workdir: Path) -> dict[str, str]:
    newest = max((int(path.name), path) for path in (workdir / "checkpoints").glob("[0-9]*"))[1]
    return json.loads((newest / "manifest/metadata").read_text())["fingerprints"]


def wait_for_step(workdir: Path, step: int, process: subprocess.Popen):
    path = workdir / "metrics.jsonl"
    while not path.exists() or step not in rows_of(workdir):
        assert process.poll() is None, "the run ended before it was stopped"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, programs):
    """40 steps against 20 and SIGKILL, some and SIGTERM, and the rest; then a damaged checkpoint.

    Batches grow on the way, and the EMA weights go on as well. All rows are equal, and all bits of
    the last state.
    """
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    ramp = ("train.first_batch=4", "train.batch_sizes=2", "train.ramp_tokens=3840")  # 30 steps
    more = (*ramp, "ema.decay=0.9", "train.eval_every=20")
    done = subprocess.run(command(whole, 40, *more), check=True, capture_output=True, text=True)
    assert "nats below the unigram entropy" in done.stdout and "sample:" in done.stdout
    for name in ("plots/loss.png", "plots/expert_load.png", "config.json", "expert_load.npz"):
        assert (whole / name).stat().st_size > 0

    for number, until in ((signal.SIGKILL, 20), (signal.SIGTERM, 27)):
        process = subprocess.Popen(command(killed, 40, *more), stdout=subprocess.PIPE, text=True)
        wait_for_step(killed, until, process)
        os.kill(process.pid, number)
        out, _ = process.communicate(timeout=120)
    assert "stopped and saved at step" in out and process.returncode == 143
    newest = max(int(path.name) for path in (killed / "checkpoints").glob("[0-9]*"))
    data = max(
        (killed / f"checkpoints/{newest}").rglob("d/*"), key=lambda path: path.stat().st_size
    )
    flipped = bytearray(data.read_bytes())
    flipped[len(flipped) // 2] ^= 1
    data.write_bytes(flipped)
    again = subprocess.run(command(killed, 40, *more), check=True, capture_output=True, text=True)
    assert f"checkpoints/{newest} is damaged" in again.stdout
    assert f"resuming at step {newest - newest % 5 - 5 * (newest % 5 == 0)}" in again.stdout
    assert (killed / f"checkpoints/damaged/{newest}").is_dir()
    assert rows_of(killed) == rows_of(whole) and list(rows_of(whole)) == list(range(1, 41))
    assert all(row["dropped_tokens"] == 0 for row in rows_of(whole).values())
    assert newest_fingerprints(killed) == newest_fingerprints(whole)
    assert any(name.startswith("ema.") for name in newest_fingerprints(whole))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_one_of_two_processes_is_killed(tmp_path, programs):
    """The supervisor runs both again; SIGTERM stops both at one step; one process goes on alone.

    Losses are those of one process all along. Every expert is chosen: else the order of sums, which
    differs, now and then makes another choice, and a jump of it.
    """
    all_experts = ("model.moe.topk_groups=4", "model.moe.top_k=8")
    alone, both = tmp_path / "alone", tmp_path / "both"
    subprocess.run(command(alone, 40, *all_experts), check=True, capture_output=True)
    process = subprocess.Popen(
        [*command(both, 40, *all_experts), "--processes=2", "--supervise"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for_step(both, 7, process)
    first, second = children(process.pid)
    os.kill(second, signal.SIGKILL)
    killed = time.time()
    while len((both / "ledger.jsonl").read_text().splitlines()) < 2 or max(rows_of(both)) < 12:
        assert process.poll() is None and time.time() - killed < 120
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 143, err[-2000:]
    assert "supervisor: crashed: process 1 ended with SIGKILL" in err
    assert out.count("resuming at step") == 1  # process 0 speaks
    ledger = [json.loads(line) for line in (both / "ledger.jsonl").read_text().splitlines()]
    before = sum(ledger[1]["seconds"].get(kind, 0.0) for kind in ("start", "restore", "compile"))
    assert ledger[1]["begin"] + before - killed < 60
    assert goodput(both).starts == 2 and 1.0 < goodput(both).seconds["down"] < 60  # the back-off
    alone_now = command(both, 40, *all_experts)
    again = subprocess.run(alone_now, check=True, capture_output=True, text=True)
    assert f"resuming at step {ledger[1]['last']}" in again.stdout
    want, got = rows_of(alone), rows_of(both)
    assert list(got) == list(want) == list(range(1, 41))
    for step, row in got.items():
        for name, rtol in (("loss", 1e-5), ("grad_norm", 1e-3)):
            np.testing.assert_allclose(row[name], want[step][name], rtol=rtol)
    assert (both / "processes/1/metrics.jsonl").exists()
