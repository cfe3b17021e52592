"""The run as users see it: first step, stages, redundancy, and errors of the command line."""

import json
import subprocess
import sys

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding
from reference.train_command import ROOT, command, rows_of

import train
from configs import load_preset
from dsv3_jax.config_cli import override
from dsv3_jax.data.tokenizer import train_bpe
from dsv3_jax.losses import Batch, next_token_loss
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.optimizer import make_optimizer
from dsv3_jax.training.state import abstract_state, init_sharded_state, make_layout
from dsv3_jax.training.step import make_step
from dsv3_jax.training.workdir import check_text, check_tokenizer, check_workdir
from sharding.mesh import BATCH, make_mesh, parse_mesh


def test_first_step_of_the_tiny_preset():
    """Loss and gradient norm of step 1, as first measured."""
    config = override(load_preset("tiny"), "parallel.unroll=1")  # a smaller program, the same sums
    spec = parse_mesh("dp2,ep2x2")
    mesh, layout = make_mesh(spec), make_layout(config, spec)
    optimizer = make_optimizer(config.optimizer, Policy.of(config.precision))
    abstract = abstract_state(config, optimizer, mesh, layout)
    state = init_sharded_state(config, optimizer, abstract)
    tokens = np.random.default_rng(0).integers(0, 2048, (32, 130)).astype(np.int32)
    batch = jax.device_put(Batch(tokens, np.ones(tokens.shape, bool)), NamedSharding(mesh, BATCH))
    loss_fn = next_token_loss(config.losses, config.model.mtp_depth)
    step = make_step(config, optimizer, mesh, layout, loss_fn)
    state, metrics = step(state, batch)
    np.testing.assert_allclose(metrics.losses.total, 9.946968, rtol=2e-6)
    np.testing.assert_allclose(metrics.grad_norm, 0.466126, rtol=2e-5)
    assert metrics.router.load.sum() == metrics.router.n_received.sum() == 4 * 32 * 128 * 4


def test_workdir_of_another_config(tmp_path):
    config = load_preset("tiny")
    check_workdir(config, tmp_path)
    check_workdir(override(config, "train.steps=7"), tmp_path)  # a longer run is the same run
    with pytest.raises(ValueError, match=r"optimizer\.clip: 1\.0 -> 2\.0\n.*another --workdir"):
        check_workdir(override(config, "optimizer.clip=2"), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["optimizer"]["clip"] == 1.0


def test_text_and_tokenizer_that_are_not_the_runs(tmp_path):
    check_text("here", "aa", "aa")
    with pytest.raises(ValueError, match="the text of data.source=here is not what this run"):
        check_text("here", "aa", "bb")
    lines = ["the cat sat on the mat", "a dog ran to the river"] * 50
    first, second = train_bpe(lines, 270), train_bpe(lines[::2], 270)
    check_tokenizer(None, first)
    check_tokenizer(tmp_path, first)  # nothing is there
    first.save(tmp_path / "tokenizer.json")
    check_tokenizer(tmp_path, first)
    with pytest.raises(ValueError, match="another tokenizer: of its 270 .* --set data.tokenizer="):
        check_tokenizer(tmp_path, second)


@pytest.mark.slow
def test_logits_that_are_not_finite_are_named(tmp_path):
    """A learning rate that blows up: the run ends with the steps and the layers, saving nothing."""
    more = ("optimizer.peak_lr=1e38", "optimizer.warmup_steps=1")
    patience = "guard.roll_back_after=2"
    done = subprocess.run(command(tmp_path, 9, *more, patience), capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: 2 steps in a row, to step 3, were skipped: the gradient is not")
    assert "no earlier checkpoint" in last and not list((tmp_path / "checkpoints").glob("[0-9]*"))


@pytest.mark.slow
def test_redundant_experts_change_no_result(tmp_path, programs):
    """Placed anew every 3 steps; the losses of a run without them, and resuming bit for bit."""
    extra = ("model.moe.n_redundant=4", "parallel.rebalance_every=3")
    for name, steps, more in (("none", 12, ()), ("some", 12, extra), ("two parts", 7, extra)):
        subprocess.run(command(tmp_path / name, steps, *more), check=True, capture_output=True)
    subprocess.run(command(tmp_path / "two parts", 12, *extra), check=True, capture_output=True)
    none, some, parts = (rows_of(tmp_path / name) for name in ("none", "some", "two parts"))
    assert parts == some and len(some) == 12
    for step, row in some.items():
        np.testing.assert_allclose(row["loss"], none[step]["loss"], rtol=2e-3)  # bfloat16
        assert row["dropped_tokens"] == 0


@pytest.mark.slow
def test_stages_train_alike(tmp_path, programs):
    """30 steps, and 5 more from that checkpoint on a mesh without stages."""
    stages, plain = "--mesh=pp2,ep2", "--mesh=dp2,ep2"
    layers = ("model.n_layers=4", "train.eval_every=10")
    for name, steps, mesh in (("plain", 35, plain), ("stages", 30, stages), ("stages", 35, plain)):
        run = [*command(tmp_path / name, steps, *layers), mesh]
        out = subprocess.run(run, check=True, capture_output=True, text=True).stdout
        assert (mesh == stages) == ("pipeline: dualpipe" in out)
    plain, rows = (rows_of(tmp_path / name) for name in ("plain", "stages"))
    assert rows.keys() == plain.keys() and len(rows) == 35
    for step, row in rows.items():
        for name in ("loss", "mtp_loss", "balance_loss", "grad_norm", "lr", "tokens"):
            np.testing.assert_allclose(row[name], plain[step][name], rtol=1e-4, err_msg=name)
        assert row["dropped_tokens"] == 0
    texts = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("plain", "stages"))
    rows = (map(json.loads, text.splitlines()) for text in texts)
    held_out = [{row["step"]: row["eval_loss"] for row in r if "eval_loss" in row} for r in rows]
    assert held_out[0].keys() == {10, 20, 30, 35}
    chex.assert_trees_all_close(held_out[1], held_out[0], rtol=1e-4)
    assert (tmp_path / "stages/plots/pipeline.png").read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "plain/plots/pipeline.png").exists()


ERRORS = [
    (["--join=here"], "write ADDRESS,NUMBER,COUNT"),
    (["--set", "train.batch_sizes=1"], "train.batch_sizes=1 must be at least 2"),
    (["--mesh=dp8", "--set", "train.first_batch=12"], "train.batch=27 sequences (on the way"),
    (["--set", "ema.decay=1"], "ema.decay=1.0 must lie between 0 and 1"),
    (["--set", "guard.skip_above=1"], "guard.skip_above=1.0 must exceed 1"),
    (["--config=tinny"], "did you mean 'tiny'"),
    (["--set", "optimizer.peek_lr=1"], "did you mean 'peak_lr'"),
    (["--mesh=dp4,xp8"], "'xp8' is not understood"),
    (["--mesh=dp3,ep8"], "train.batch=32 sequences cannot be divided over dp * ep=24"),
    (["--mesh=ep32"], "model.moe.n_experts=16 cannot be divided over ep=32"),
    (["--mesh=pp4,ep8", "--set", "pipeline.schedule=dualpipe"], "train.batch=64 works"),
    (["--set", "data.source=/no/such/text"], "/no/such/text"),
    (["--set", "parallel.transport=ragged"], "no ragged all-to-all for CPUs"),
    (["--mesh=ep8", "--set", "model.moe.n_redundant=6"], "model.moe.n_redundant=6 cannot be"),
    (["--mesh=ep16x1"], "model.moe.n_groups=8 cannot be divided over nodes=16"),
    (["--set", "parallel.capacity_factor=0.5"], "parallel.capacity_factor=0.5 must be at least 1"),
]


@pytest.mark.parametrize("arguments, message", ERRORS)
def test_command_line_errors(arguments, message, tmp_path, monkeypatch, capsys):
    """In this process, whose devices are there already."""
    monkeypatch.setattr(
        "sharding.mesh.start_devices",
        lambda text, n_processes: parse_mesh(text, 8 if "*" in text else None),
    )
    monkeypatch.setattr(sys, "argv", ["train.py", f"--workdir={tmp_path / 'run'}", *arguments])
    with pytest.raises(SystemExit, match="2"):
        train.main()
    said = capsys.readouterr().err
    assert said.startswith("error: ") and message in said and said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("arguments, message", [ERRORS[8], ERRORS[11]])
def test_errors_are_the_last_line(arguments, message, tmp_path):
    """Before it may stand that the run is on virtual devices."""
    run = [sys.executable, str(ROOT / "train.py"), f"--workdir={tmp_path / 'run'}", *arguments]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: ") and message in last
    assert "Traceback" not in done.stderr
