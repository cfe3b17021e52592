"""The real train step, compiled for real targets: properties of the 671B program.

Every commit compiles three of its layers at full width for 16 chips, up to the schedule; the slow
tests compile all of it for 1,024. They call the command, so that annotations are not checked at
every instruction.
"""

import functools
import json
import math
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from configs import load_preset
from sharding.expert_parallel import EXTRA_ROUNDS

pytest.importorskip("libtpu")
MODEL = load_preset("dsv3_671b").model
SMALL = ("model.n_dense=0", "model.n_layers=3", "model.mtp_depth=0", "model.moe.n_experts=16")


def report(name: str, mesh: str, topology: str, *arguments: str) -> tuple[dict, str]:
    """Return what the command reports, and the text of the scheduled program."""
    with tempfile.TemporaryDirectory() as folder:
        given = [f"--config={name}", f"--mesh={mesh}", f"--topology={topology}", *arguments]
        command = [sys.executable, "-m", "dsv3_jax.aot", *given, "--json", f"--dump={folder}"]
        run = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        found = json.loads(run.stdout)
        assert run.returncode == (not found["fits"])
        return found, Path(found["hlo"]).read_text()


@functools.cache
def layers_on_16() -> tuple[dict, str]:
    settings = [f"--set={assignment}" for assignment in ("train.batch=16", *SMALL)]
    return report("dsv3_671b", "dp4,ep4", "v5p:2x2x4", "--stop-at=schedule", *settings)


def test_all_to_alls_are_asynchronous():
    found, _ = layers_on_16()
    row = found["collectives"]["all-to-all"]
    # 3 layers: dispatch and combine of rows forward, again in the backward, and their gradients
    assert row["count"] == row["asynchronous"] >= 3 * 6
    assert found["layers"].keys() == {"forward", "backward"}
    assert all(layer["all_to_alls_beside_products"] for layer in found["layers"].values())


def test_gradients_are_scattered():
    """Only small arrays are summed on every device: norms, statistics, losses."""
    found, _ = layers_on_16()
    assert 0 < found["collectives"]["all-reduce"]["largest_bytes"] < 1e6
    assert found["collectives"]["reduce-scatter"]["largest_bytes"] > 1e8


def test_no_device_holds_a_whole_table():
    """Not the embedding, the head, a gradient of them, or the logits of all its tokens.

    Sizes that come from the vocabulary are multiples of 101, a factor of 129,280 alone.
    """
    _, text = layers_on_16()
    shapes = {tuple(map(int, dims.split(","))) for dims in re.findall(r"\w\[(\d[\d,]*)\]", text)}
    sizes = [math.prod(dims) for dims in shapes if any(size % 101 == 0 for size in dims)]
    share = MODEL.vocab_size * MODEL.width // 4
    assert share // 4 <= max(sizes) <= share


def test_the_exchange_is_dropless():
    """Extra rounds are in the program, forward and backward, and don't run under balance."""
    found, _ = layers_on_16()
    loops = found["assumed_trips"]
    rounds = [row for row in loops if EXTRA_ROUNDS in row["op_name"]]
    assert rounds == [row for row in loops if "expert_parallel.py" in row["source"]]
    assert {"transpose(" in row["op_name"] for row in rounds} == {True, False}
    assert not any(row["trips"] for row in rounds)


def test_figures_of_16():
    found, _ = layers_on_16()
    assert found["fits"] and not found["unknown_kernels"] and not found["complete"]
    assert len(found["buffers"]) == 10 and all(row["at_peak"] for row in found["buffers"])
    assert 0.25 < found["predicted_mfu"] < 0.75


@pytest.mark.slow
@pytest.mark.parametrize(
    "topology, gib, exposed, mfu",
    [
        ("v5p:8x8x16", 25, 0.35, 0.44),
        ("tpu7x:8x8x8", 45, 0.75, 0.14),  # its devices share links
    ],
)
def test_671b_on_1024_devices(topology, gib, exposed, mfu):
    more = ("--set=train.batch=1024", "--stop-at=schedule")
    found, _ = report("dsv3_671b", "dp16,ep64", topology, *more)
    assert found["fits"] and found["peak_bytes"] < gib * 2**30
    row = found["collectives"]["all-to-all"]
    assert row["count"] == row["asynchronous"]
    # A rank's rows of the head, over dp: 2,020 of them can't be scattered evenly on v5p.
    assert found["collectives"]["all-reduce"]["largest_bytes"] < 1.2e8
    assert found["exposed_share"] < exposed and found["predicted_mfu"] > mfu


@pytest.mark.slow
def test_671b_at_128k_on_1024_devices():
    """32 sequences over 32 ranks each; heads move in addition to rows for experts."""
    arguments = ("dp16,ep64", "v5p:8x8x16", "--set=train.batch=32", "--stop-at=schedule")
    found, _ = report("dsv3_671b_long", *arguments)
    assert found["fits"] and found["peak_bytes"] < 25 * 2**30 and not found["unknown_kernels"]
    row = found["collectives"]["all-to-all"]
    assert row["count"] == row["asynchronous"]
    moved = found["layers"]["forward"]["exchanged_bytes_per_token"]["rank"]
    experts, heads = 8 * 1.25 * 7168 * 3, 128 * (192 + 3 * 128) * 2
    assert moved == pytest.approx(experts + heads, rel=0.01)
    exposed = found["exposed_share"] * found["communication_seconds"]
    assert exposed < 0.12 * found["predicted_step_seconds"] and found["predicted_mfu"] > 0.46


@pytest.mark.slow
def test_bytes_between_nodes():
    """4 copies per token, in FP8 out and bfloat16 back, are 86 KB (report sec. 3.2.2, 3.3.3).

    Exponents, gates and ids come on top. Inside a node a token has 8 copies.
    """
    settings = [f"--set={assignment}" for assignment in ("train.batch=64", *SMALL[:3])]
    ragged = ("--set=parallel.transport=ragged", "--set=model.moe.n_experts=64")
    arguments = ("dp1,ep8x8", "v5p:8x8x1", "--stop-at=schedule", *settings, *ragged)
    found, _ = report("dsv3_671b", *arguments)
    moved = found["layers"]["forward"]["exchanged_bytes_per_token"]
    assert moved["node"] == pytest.approx(4 * 7168 * 3, rel=0.1)
    assert moved["rank"] == pytest.approx(8 * 7168 * 3, rel=0.1)
    row = found["collectives"]["ragged-all-to-all"]
    assert row["count"] == row["asynchronous"] > 0 and not found["unknown_kernels"]


@pytest.mark.slow
def test_a_batch_that_is_too_large():
    """24 sequences per chip: XLA runs out of memory, which is a result."""
    sizes = ("train.batch=96", "model.n_layers=3", "model.n_dense=1", "model.moe.n_experts=32")
    settings = [f"--set={assignment}" for assignment in sizes]
    found, _ = report("dsv3_671b", "dp2,ep2", "v5p:2x2x1", *settings)
    assert not found["fits"] and "RESOURCE_EXHAUSTED" in found["out_of_memory"]
    assert found["peak_bytes"] > found["limit_bytes"] and len(found["buffers"]) == 10
    assert any(line.startswith("--set train.batch=48") for line in found["what_helps"])


@pytest.mark.slow
def test_for_gpus():
    pytest.importorskip("jax_cuda13_plugin")
    found, _ = report("tiny", "dp2,ep4", "h100:1x8")
    assert found["fits"] and found["complete"] and found["flops"] > 0
    row = found["collectives"]["all-to-all"]
    assert row["count"] == row["asynchronous"] > 0


@functools.cache
def stages_on_16() -> tuple[dict, str]:
    """Return a report on 8 layers at full width in 4 stages, with micro-batches for DualPipe."""
    changes = ("train.batch=32", "model.n_layers=8", *(s for s in SMALL if "n_layers" not in s))
    settings = [f"--set={assignment}" for assignment in changes]
    return report("dsv3_671b", "pp4,ep4", "v5p:2x2x4", "--stop-at=schedule", *settings)


@pytest.mark.slow
def test_stages_hide_the_all_to_all_of_one_micro_batch_behind_the_other():
    """In a forward beside a backward less of the all-to-alls is exposed than in either alone."""
    found, _ = stages_on_16()
    layers = found["layers"]
    assert layers.keys() == {"forward beside backward", "forward", "backward"}
    fused = layers["forward beside backward"]
    assert fused["exposed_share"] < 0.3 < layers["forward"]["exposed_share"]
    alone = layers["forward"]["seconds"] + layers["backward"]["seconds"]
    assert fused["seconds"] < 0.93 * alone
    assert fused["compute_seconds"] == pytest.approx(
        sum(layers[way]["compute_seconds"] for way in ("forward", "backward")), rel=0.05
    )


@pytest.mark.slow
def test_stages_copy_no_buffer_of_all_micro_batches():
    """The residuals of 5 micro-batches are updated in place."""
    found, text = stages_on_16()
    kept = rf"bf16\[5,{max(found['pipeline']['stages'])},1,4096,7168\]"
    assert re.search(kept, text)
    assert not re.search(rf"= {kept}\S* copy\(", text)


@pytest.mark.slow
def test_time_of_a_step_in_stages():
    found, _ = stages_on_16()
    pipeline = found["pipeline"]
    assert pipeline["schedule"] == "dualpipe" and sum(pipeline["stages"]) == 8
    assert found["predicted_step_seconds"] == pipeline["step_seconds"]
    assert 0 < pipeline["waiting_share"] < 0.6
    trips, seconds = pipeline["trips_of_the_busiest_rank"], pipeline["seconds"]
    parts = {"F_BW", "F", "BW", "embed", "head_and_loss", "embed_backward"}
    assert trips.keys() == seconds.keys() == parts
    assert pipeline["step_seconds"] > trips["F_BW"] * seconds["F_BW"]
