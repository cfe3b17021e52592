"""The planner: exact counts, memory against the state's real shards and a real layer.

Numbers of the reports are written out here; what is exact is compared exactly.
"""

import functools
import json
import math
import sys
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType

from configs import load_preset
from dsv3_jax import hardware
from dsv3_jax.config import Config
from dsv3_jax.config_cli import override
from dsv3_jax.interconnect import lay_out
from dsv3_jax.layer_scan import apply_remat
from dsv3_jax.model.deepseek import abstract_model, token_positions
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.optimizer import make_optimizer
from dsv3_jax.params import all_gather_params, param_specs, quantize_params
from dsv3_jax.plan import __main__ as command
from dsv3_jax.plan.bill import report_bill
from dsv3_jax.plan.memory import layer_bytes, memory
from dsv3_jax.plan.ranking import meshes, ranking
from dsv3_jax.plan.report import counts, make_plan
from dsv3_jax.plan.speed import context_bytes, exchange_bytes, flops_per_token, speed
from dsv3_jax.schedules import with_batch
from dsv3_jax.training.state import abstract_state, make_layout
from sharding.mesh import AXES, REPLICATED, MeshSpec, manual_region, parse_mesh

V5P = hardware.V5P
ONE_EACH = ("--config=dsv3_671b", "--set=train.batch=1024")  # a sequence on each of 1,024 devices


def preset(name: str, *assignments: str) -> Config:
    return override(load_preset(name), *assignments)


@functools.cache
def planned(*arguments: str) -> dict:
    with mock.patch.object(sys, "argv", ["plan", *arguments]):
        return make_plan(command.parse_arguments())


def test_counts_of_671b():
    found = counts(load_preset("dsv3_671b"))
    assert found["main_parameters"] == 671_026_419_200
    assert found["mtp_parameters"] == 11_610_068_224
    assert found["released_parameters"] == 684_489_845_504
    assert found["activated_parameters"] == 37_552_297_472
    assert round(found["activated_without_embedding"] / 1e9, 1) == 36.6
    assert round(found["training_flops_per_token"] / 1e9, 1) == 250.5
    assert found["kv_bytes_per_token"] == 70_272  # hardware paper, table 1


def test_the_reports_bill():
    """Report, table 1: thousands of hours and millions of dollars; 3.7 days per trillion tokens."""
    lines = {line["what"].removeprefix("report: "): line for line in report_bill()}
    hours = [round(line["chip_hours"] / 1e3) for line in lines.values()]
    assert hours == [180, 2664, 119, 5, 2788]
    dollars = [round(line["dollars"] / 1e6, 3) for line in lines.values()]
    assert dollars == [0.36, 5.328, 0.238, 0.01, 5.576]
    assert round(lines["a trillion tokens"]["days"], 1) == 3.7


def bytes_a_device(tree) -> int:
    """Return the sum over all arrays but scalars of the bytes of one shard."""
    leaves = [x for x in jax.tree.leaves(tree) if x.ndim]
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


@pytest.mark.parametrize(
    "name, mesh, zero",
    [("tiny", "dp4,ep8", 1), ("tiny", "dp2,ep2x4", 3), ("dsv3_16b", "dp3,ep16", 1)]
    + [("dsv3_671b", "dp16,ep64", 3), ("dsv3_671b", "dp1024", 1)],
)
def test_stored_memory_is_that_of_the_state(name, mesh, zero):
    config, spec = preset(name, f"parallel.zero={zero}"), parse_mesh(mesh)
    config = with_batch(config, spec.n_data_shards)
    optimizer = make_optimizer(config.optimizer, Policy.of(config.precision))
    devices = AbstractMesh(tuple(spec.sizes.values()), AXES, axis_types=(AxisType.Auto,) * 4)
    state = abstract_state(config, optimizer, devices, make_layout(config, spec))
    parts = memory(config, spec)
    assert parts["master"] == bytes_a_device(state.params)
    assert parts["moments"] == bytes_a_device(state.optimizer)
    assert parts["gradients"] > parts["master"]


def test_activation_memory_grows_with_batch_and_saved_arrays():
    mesh, small = parse_mesh("dp16,ep64"), preset("dsv3_671b", "train.batch=1024")
    large = with_batch(small, 2048)
    saved = {
        remat: memory(override(small, f"parallel.remat={remat}"), mesh)["saved"]
        for remat in ("full", "report", "none")
    }
    assert saved["full"] == 4096 * 7168 * 2 * 62  # the residual stream at 61 layers and MTP
    assert saved["full"] < saved["report"] < saved["none"]
    one, two = memory(small, mesh), memory(large, mesh)
    assert two["saved"] == 2 * one["saved"] and two["layer"] == 2 * one["layer"]
    assert two["master"] == one["master"]


def traced_bytes(config: Config, mesh: MeshSpec, moe: bool) -> int:
    """Return the bytes of what a real layer keeps for its backward under the config's remat."""
    layout, policy = make_layout(config, mesh), Policy.of(config.precision)
    model = abstract_model(config.model, policy)
    graphdef, params, rest = nnx.split(model.moe if moe else model.dense, nnx.Param, ...)
    residuals = []

    def shard(params, rest):
        if policy.fp8:
            params = quantize_params(params, layout)
        params, rest = jax.tree.map(lambda x: x[0], (params, rest))
        weights = all_gather_params(params, layout, policy.compute)

        def layer(weights, x):
            positions = token_positions(jnp.zeros(x.shape[:2], jnp.int32), layout)
            return nnx.merge(graphdef, weights, rest)(x, positions, layout)[0]

        x = jnp.zeros((1, config.train.seq_len, config.model.width), policy.compute)
        _, pull = jax.vjp(apply_remat(layer, config.parallel.remat), weights, x)
        known = {id(leaf) for leaf in jax.tree.leaves((weights, rest))}
        residuals.extend(leaf for leaf in jax.tree.leaves(pull) if id(leaf) not in known)
        return jnp.zeros(())

    sizes = tuple(mesh.sizes.values())
    devices = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    specs = (param_specs(params, layout), REPLICATED)
    jax.eval_shape(manual_region(shard, devices, specs, REPLICATED), params, rest)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in residuals)


@pytest.mark.parametrize("moe, precision", [(False, "bfloat16"), (True, "fp8")])
def test_saved_bytes_are_those_of_a_real_layer(moe, precision):
    """But for a few vectors, such as the frequencies of the rotary part."""
    mesh = parse_mesh("dp16,ep64")
    config = preset(
        "dsv3_671b", "train.batch=1024", f"precision={precision}", "parallel.remat=report"
    )
    counted = layer_bytes(config, mesh, "report", moe)
    assert traced_bytes(config, mesh, moe) == pytest.approx(counted, rel=1e-5)


def test_computed_flops():
    """Without MTP: the head's logits a second time, and with full remat the layers' forward."""
    config = preset("dsv3_671b", "model.mtp_depth=0")
    table = config.model.vocab_size * config.model.width
    useful, made = flops_per_token(config.model, 4096, "none")
    assert made == pytest.approx(useful + 2 * table, rel=1e-12)
    _, repeated = flops_per_token(config.model, 4096, "full")
    assert repeated - made == pytest.approx((useful - 6 * table) / 3, rel=1e-12)


def test_bytes_of_expert_all_to_alls():
    """8 rows of 7168 numbers per token and all-to-all, a quarter more for capacity; 59 layers."""
    rows, settings = 59 * 4096 * 8 * 1.25, ("train.batch=1024", "parallel.remat=report")
    wide = preset("dsv3_671b", *settings, "precision.dispatch=compute")
    narrow = preset("dsv3_671b", *settings)
    mesh = parse_mesh("dp16,ep64")
    assert exchange_bytes(wide, mesh) == rows * 4 * 7168 * 2
    assert exchange_bytes(narrow, mesh) == rows * (2 * (7168 + 56) + 2 * 7168 * 2)


def test_bytes_of_context_parallelism():
    """128 heads' queries of 192 numbers, keys, values, outputs of 128; 62 layers, 3 times."""
    long, mesh = preset("dsv3_671b_long", "train.batch=32"), parse_mesh("dp16,ep64")
    assert context_bytes(long, mesh) == 3 * 62 * 4096 * 128 * (192 + 3 * 128) * 2
    short = preset("dsv3_671b", "train.batch=1024")
    assert context_bytes(short, mesh) == 0
    chip, shape = V5P, (8, 8, 16)
    links = lay_out(chip, shape, mesh)
    more = speed(long, mesh, chip, shape).exchange - speed(short, mesh, chip, shape).exchange
    assert more == pytest.approx(
        links.group(("rank",)).all_to_all_seconds(context_bytes(long, mesh))
    )


def test_every_mesh_lies_on_its_slice():
    for name, n_devices in (("v5p", 1024), ("v6e", 96), ("tpu7x", 24), ("h100", 48)):
        chip = hardware.chip_named(name)
        shape = hardware.slice_shape(chip, n_devices)
        assert math.prod(shape) * (chip.devices_per_chip if chip.torus_axes else 1) == n_devices
        for mesh in meshes(n_devices):
            assert lay_out(chip, shape, mesh).group(("rank",)).all_to_all_seconds(1.0) >= 0
    assert hardware.slice_shape(V5P, 1024) == (8, 8, 16)
    with pytest.raises(ValueError, match="groups of 2"):
        hardware.slice_shape(hardware.TPU7X, 7)


def test_meshes_that_fail_say_why():
    found = planned(*ONE_EACH)
    failed = {row["mesh"]: row["reason"] for row in found["failed"]}
    assert set(failed) == {"dp1024", "dp512,ep2", "dp2,ep512", "dp1,ep1024"}
    assert failed["dp2,ep512"].startswith("model.moe.n_experts=256 cannot be divided over ep=512")
    assert "of 95.0 GiB; one sequence is too much" in failed["dp1024"]
    row = next(row for row in found["meshes"] if row["mesh"] == "dp16,ep64")
    assert row["same_as"] == ["dp16,ep2x32", "dp16,ep4x16", "dp16,ep8x8"]
    parts = dict(row["memory_bytes"])
    assert parts.pop("total") == sum(parts.values()) < V5P.hbm_bytes
    odd = ranking(preset("tiny", "train.batch=30"), V5P, 32, (2, 4, 4))
    assert not odd["meshes"] and all("train.batch=30" in row["reason"] for row in odd["failed"])


def test_the_largest_batch_that_fits():
    """The preset's batch is too large for one step; the plan says so and takes one that fits."""
    found = planned("--config=dsv3_671b")
    assert found["asked_batch"] == 15_360 > found["batch"] > 0
    advice = f"--set train.batch={found['batch']} fits"
    assert any(row["reason"].endswith(advice) for row in found["failed"])
    more = with_batch(load_preset("dsv3_671b"), found["batch"] + 1024)
    assert not ranking(more, V5P, 1024, (8, 8, 16))["meshes"]


def test_ranking_and_bandwidth():
    slow, fast = planned(*ONE_EACH)["meshes"], planned(*ONE_EACH, "--figure=ici_bandwidth=2e11")
    steps = [row["seconds"]["step"] for row in slow]
    assert steps == sorted(steps)
    faster = {row["mesh"]: row["seconds"]["step"] for row in fast["meshes"]}
    assert set(faster) == {row["mesh"] for row in slow}
    for row in slow:
        assert faster[row["mesh"]] < row["seconds"]["step"]


def test_speed_adds_up():
    config, mesh = preset("dsv3_671b", "train.batch=1024"), parse_mesh("dp16,ep64")
    s = speed(config, mesh, V5P, (8, 8, 16))
    assert s.compute < s.step < s.compute + s.exchange + s.weights + s.head + s.update
    assert s.tokens_per_second == pytest.approx(1024 * 4096 / s.step)
    assert s.mfu == pytest.approx(250.456e9 * s.tokens_per_second / (1024 * 459e12), rel=1e-5)


def test_a_given_step_time_is_billed():
    """10 steps of 36 s on 32 chips at $2 are 3.2 hours and $6.40."""
    given = ["--step-seconds=36", "--tokens=40960", "--dollars-per-hour=2"]
    line = planned(*given)["bill"][-1]
    assert line["chip_hours"] == pytest.approx(3.2)
    assert line["dollars"] == pytest.approx(6.4)
    assert line["days"] == pytest.approx(0.1 / 24)


def test_a_compiled_step_is_billed_on_its_own_devices(tmp_path):
    """10 steps of 36 s on 64 devices of tpu7x, 32 chips at $2."""
    report = {"mesh": "dp8,ep8", "topology": "tpu7x:4x4x2", "devices": 64, "tokens_per_step": 4096}
    report |= {"predicted_step_seconds": 36.0, "chip": {"name": "tpu7x"}}
    path = tmp_path / "report.json"
    path.write_text(json.dumps(report))
    line = planned(f"--aot={path}", "--tokens=40960", "--dollars-per-hour=2")["bill"][-1]
    assert line["what"].startswith("dp8,ep8 on tpu7x:4x4x2, compiled: 40,960 tokens")
    assert (line["chip_hours"], line["dollars"]) == pytest.approx((3.2, 6.4))


def test_default_devices():
    assert planned()["devices"] == 32
    assert planned("--config=dsv3_671b")["shape"] == (8, 8, 16)


def test_output(monkeypatch, capsys):
    arguments = ["plan", "--config=dsv3_671b", "--set", "train.batch=1024"]
    monkeypatch.setattr(sys, "argv", [*arguments, "--json"])
    command.main()
    found = json.loads(capsys.readouterr().out)
    assert found["counts"]["main_parameters"] == 671_026_419_200
    assert found["meshes"] and found["failed"] and found["bill"]
    monkeypatch.setattr(sys, "argv", arguments)
    command.main()
    text = capsys.readouterr().out
    for words in ("671,026,419,200", "250.5", "70,272", "2,788,000", "5,576,000", "dp16,ep64"):
        assert words in text


def test_chips():
    names = {"v5p": ("TPU v5", 459e12), "v6e": ("TPU v6 lite", 918e12)}
    names |= {"tpu7x": ("TPU7x", 1153.5e12)}
    for name, (kind, flops) in names.items():
        assert hardware.CHIPS[name].device_kind == kind
        assert hardware.BF16_FLOPS[kind] == flops
        assert hardware.compiler_options(kind)["xla_tpu_enable_async_all_to_all"] is True
    assert (
        hardware.compiler_options("cpu")
        == hardware.compiler_options(hardware.H100.device_kind)
        == {}
    )
    assert hardware.BF16_FLOPS[hardware.H100.device_kind] == 989.5e12
    assert hardware.parse_topology("v5p:8x8x16") == (V5P, 1024, (8, 8, 16))
    assert hardware.parse_topology("tpu7x:8x8x8") == (hardware.TPU7X, 1024, (8, 8, 8))
    assert hardware.parse_topology("h100:32x8") == (hardware.H100, 256, (32, 8))
    assert override(V5P, "ici_bandwidth=9e10").ici_bandwidth == 9e10


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--topology=v9:2x2"], "unknown chip 'v9'; known: h100, h800, tpu7x, v5p, v6e"),
        (["--topology=v5p:8x8"], "expected 3 sizes, as in v5p:8x8x16"),
        (["--topology=h100:8"], "hosts x GPUs"),
        (["--topology=v6e:4x4", "--devices=16"], "give --topology, or --chip and --devices"),
        (["--figure=ici_bandwith=9e10"], "did you mean 'ici_bandwidth'"),
        (["--figure=hbm_bytes=0"], "hbm_bytes=0.0 must be positive"),
        (["--devices=0"], "0 devices of v5p"),
        (["--step-seconds=0"], "--step-seconds=0 must be positive"),
        (["--set", "train.batsh=1"], "did you mean 'batch'"),
        (["--aot=pyproject.toml"], "not a report of python -m dsv3_jax.aot --json"),
        (["--aot=gone.json"], "gone.json"),
    ],
)
def test_errors(arguments, message, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["plan", *arguments])
    with pytest.raises(SystemExit, match="^error: ") as error:
        command.main()
    assert message in str(error.value)


def test_the_old_flag_answers_with_the_new_one(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan", "--tunnel=report.json"])
    with pytest.raises(SystemExit):
        command.main()
    assert "--tunnel is now --aot" in capsys.readouterr().err
