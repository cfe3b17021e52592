import io
import json
import math
from unittest import mock

import jax
import matplotlib.image
import numpy as np
import pytest
import rich.console

from dsv3_jax.hardware import BF16_FLOPS
from dsv3_jax.progress import TrainingProgress
from dsv3_jax.training import reporting
from dsv3_jax.training.expert_load import max_violation
from dsv3_jax.training.plots import plot_expert_load, plot_loss, smoothed
from dsv3_jax.training.records import read_rows
from dsv3_jax.training.reporting import MetricsLog, device_peak, matmul_peak


def row(step: int, loss: float = 2.5) -> dict:
    return {"step": step, "tokens": step * 1024, "loss": loss, "grad_norm": 1.0}


def steps_in(path) -> list[int]:
    return [row["step"] for row in read_rows(path)]


def test_rows_come_back_bit_for_bit(tmp_path):
    losses = np.random.default_rng(0).uniform(size=9).astype(np.float32).astype(float)
    log = MetricsLog(tmp_path, None)
    for step, loss in enumerate(losses, start=1):
        log.log(row(step, float(loss)))
        assert len(read_rows(tmp_path / "metrics.jsonl")) == step  # without close
    log.close()
    assert read_rows(tmp_path / "metrics.jsonl") == [
        row(step, float(loss)) for step, loss in enumerate(losses, start=1)
    ]


def test_a_killed_and_resumed_run_has_each_step_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(tmp_path, None)
    for step in range(1, 8):
        log.log(row(step))
    log.log({"step": 5, "eval_loss": 3.0})
    with path.open("a") as file:
        file.write('{"step": 8, "tok')  # killed while it wrote
    resumed = MetricsLog(tmp_path, 5)
    assert steps_in(path) == [1, 2, 3, 4, 5, 5]
    resumed.log(row(6, loss=1.5))
    resumed.close()
    log.close()
    assert steps_in(path) == [1, 2, 3, 4, 5, 5, 6]
    assert read_rows(path)[-1]["loss"] == 1.5
    assert not path.with_suffix(".tmp").exists()


def test_a_run_from_the_start_removes_old_rows(tmp_path):
    for _ in range(2):
        log = MetricsLog(tmp_path, None)
        log.log({"step": 0, "eval_loss": 8.0})
        log.close()
    assert steps_in(tmp_path / "metrics.jsonl") == [0]


def test_values_json_lacks_become_null_and_the_run_goes_on(tmp_path):
    log = MetricsLog(tmp_path, None)
    log.log(row(1, math.nan) | {"grad_norm": math.inf})
    log.log(row(2))
    log.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    strict = json.loads(lines[0], parse_constant=pytest.fail)
    assert strict["loss"] is None and strict["grad_norm"] is None
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl, line 2 is no JSON"):
        read_rows(path)


def test_tensorboard_files_are_written(tmp_path):
    log = MetricsLog(tmp_path, None)
    log.log(row(1))
    log.close()
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert b"grad_norm" in events.read_bytes()


def shown(total: int, start: int, terminal: bool) -> str:
    file = io.StringIO()
    console = rich.console.Console(file=file, force_terminal=terminal, width=110)
    with TrainingProgress(total, start, "MFU", console) as progress:
        for step in range(start + 1, total + 1):
            progress.update(step, loss=2.0, tokens_per_second=54_321.0, utilization=0.39)
        progress.print("sample: [b]once upon a time[/b] " + "x" * 120)
    return file.getvalue()


@pytest.mark.parametrize("total, start, most", [(3, 0, 3), (1000, 0, 21), (1000, 930, 22)])
def test_without_a_terminal_few_plain_lines_appear(total, start, most):
    lines = shown(total, start, terminal=False).splitlines()
    assert 2 <= len(lines) - 1 <= most
    assert lines[0].startswith(f"step {start + 1:,}/{total:,}  loss 2.0000  54,321 tokens/s")
    assert lines[-2].startswith(f"step {total:,}/{total:,}")
    assert lines[-2].endswith("0:00:00 left  39.0% MFU")
    assert lines[-1] == "sample: [b]once upon a time[/b] " + "x" * 120


def test_on_a_terminal_a_bar_shows_the_last_numbers():
    text = shown(30, 0, terminal=True)
    assert "━" in text and "step 30/30" in text and "54,321 tokens/s" in text
    assert "sample: [b]once upon a time[/b]" in text


def test_measured_peak_is_plausible():
    peak = matmul_peak("float32", seconds=0.05)
    assert 1e9 < peak < 1e14


def test_peak_comes_from_the_data_sheet_or_a_measurement(monkeypatch):
    monkeypatch.setattr(reporting, "matmul_peak", lambda dtype: 8e9)
    gpu = mock.Mock(spec=jax.Device, device_kind="NVIDIA H100 80GB HBM3", platform="gpu")
    assert device_peak(gpu, "bfloat16") == (BF16_FLOPS["NVIDIA H100 80GB HBM3"], "MFU")
    assert device_peak(gpu, "float32") == (8e9, "of measured matmul peak")
    shared = 8e9 / jax.local_device_count()
    assert device_peak(jax.devices("cpu")[0], "bfloat16") == (shared, "of measured matmul peak")


def test_smoothing_keeps_a_line_and_skips_gaps():
    line = np.linspace(3.0, 1.0, 101)
    np.testing.assert_allclose(smoothed(line, share=0.1)[10:-10], line[10:-10], rtol=1e-12)
    holed = np.full(101, 2.0)
    holed[40] = np.nan
    np.testing.assert_allclose(smoothed(holed, share=0.1), 2.0, rtol=1e-12)
    assert np.isnan(smoothed(np.full(5, np.nan))).all()


def test_max_violation_is_zero_in_balance():
    load = np.array([[4.0, 4.0, 4.0], [12.0, 0.0, 0.0]])
    np.testing.assert_array_equal(max_violation(load), [0.0, 2.0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("n_steps", [0, 1, 50])
def test_loss_plot_is_a_picture_for_any_length(tmp_path, n_steps):
    rows = [{"step": 0, "eval_loss": 8.0}]
    for step in range(1, n_steps + 1):
        rows.append(row(step) | {"mtp_loss": None if step == 3 else 3.0})
    plot_loss(rows, tmp_path / "plots" / "loss.png", unigram_entropy=5.5)
    picture = matplotlib.image.imread(tmp_path / "plots" / "loss.png")
    assert picture.shape[1] > 1000 and picture.std() > 0.01


@pytest.mark.filterwarnings("error")
def test_expert_load_plot_is_a_picture(tmp_path):
    loads = np.random.default_rng(0).uniform(1.0, 9.0, size=(7, 3, 5))
    plot_expert_load(np.arange(1, len(loads) + 1), loads, tmp_path / "load.png")
    assert matplotlib.image.imread(tmp_path / "load.png").std() > 0.01
