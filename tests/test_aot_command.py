"""The command on played-back compilations: its reports, its exit statuses, what it refuses."""

import importlib.util
import json
import sys
import time

import pytest
from reference import compilers
from reference.compilers import GIB

import train
from configs import load_preset
from dsv3_jax.aot import __main__ as command
from dsv3_jax.aot import compile as compiling
from dsv3_jax.aot.report import analyze
from dsv3_jax.config_cli import override

ARGUMENTS = ["--topology=v5p:2x2x1", "--mesh=dp*,ep2"]


@pytest.fixture
def aot(monkeypatch, capsys, tmp_path):
    """Return a run of the command with a played-back compiler: (exit status, standard output)."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    monkeypatch.chdir(tmp_path)

    def run(compiler, *arguments, module=command, name="_compile"):
        monkeypatch.setattr(compiling, name, compiler)
        monkeypatch.setattr(sys, "argv", ["aot", *arguments])
        with pytest.raises(SystemExit) as end:
            module.main()
        return end.value.code, capsys.readouterr().out

    return run


def test_every_figure_of_the_report(aot, tmp_path):
    """Every figure follows from the recorded program: 3 layers, one matmul, one all-to-all."""
    status, out = aot(compilers.completes, *ARGUMENTS, "--json", "--dump=texts")
    found = json.loads(out)
    assert status == 0 and found["fits"] and found["complete"]
    figures = {name: found[f"{name}_bytes"] / GIB for name in ("argument", "temp", "peak", "limit")}
    assert figures == {"argument": 2, "temp": 5, "peak": 6, "limit": 95}
    assert found["mesh"] == "dp2,ep2" and found["devices"] == 4
    assert found["flops"] == 3 * 2 * 512**3
    size = 512 * 512 * 4
    exchange, total = found["collectives"]["all-to-all"], found["collectives"]["all-reduce"]
    assert (exchange["count"], exchange["asynchronous"], exchange["bytes"]) == (3, 3, 3 * size / 2)
    assert (total["count"], total["asynchronous"], total["bytes"]) == (1, 0, size)
    # dp*,ep2 on 2x2 chips: pairs one link apart, which an all-to-all of halves fills by a half
    assert exchange["seconds"] == pytest.approx(3 * size / 2 / 100e9)
    assert found["exposed_share"] + found["covered_share"] == pytest.approx(1)
    exposed = found["exposed_share"] * found["communication_seconds"]
    seconds = found["predicted_step_seconds"]
    assert seconds == pytest.approx(found["compute_seconds"] + exposed)
    tokens = found["tokens_per_step"]
    assert found["tokens_per_second_per_chip"] == pytest.approx(tokens / seconds / 4)
    assert set(found["layers"]) == {"forward"}
    assert found["layers"]["forward"]["all_to_alls_beside_products"] == 1
    assert found["hlo"].endswith("after_optimizations.txt") and found["plot"] == "texts/aot.png"
    assert (tmp_path / found["plot"]).stat().st_size > 5000
    assert found["compile_seconds"] > 0 and found["compile_host_bytes"] > 10 * 2**20


def test_buffers_loops_and_sources(aot):
    _, out = aot(compilers.completes, *ARGUMENTS, "--json")
    found = json.loads(out)
    stack, weights = found["buffers"]
    assert stack["what"] == "loop variable: jit(step)/jvp()/while/body/dynamic_update_slice"
    assert stack["source"] == "/here/dsv3_jax/model/mla.py:7"  # not in einops, which it called
    assert weights["what"] == "state.params['w']" and weights["shape"] == "f32[512,512]"
    (rounds,) = found["assumed_trips"]
    assert rounds["trips"] == 0 and "extra_rounds" in rounds["op_name"]
    assert found["hlo"] is None and found["unknown_kernels"] == []


def test_stopping_at_the_schedule(aot):
    """Memory is then that of the buffer assignment, and the compiler is not waited for."""
    start = time.monotonic()
    status, out = aot(compilers.schedules, *ARGUMENTS, "--json", "--stop-at=schedule")
    found = json.loads(out)
    assert time.monotonic() - start < 60 and status == 0
    assert not found["complete"] and found["peak_bytes"] == 18 * GIB
    assert found["flops"] == 3 * 2 * 512**3


def test_out_of_memory_is_a_result(aot):
    status, out = aot(compilers.exhausts, *ARGUMENTS, "--json", "--set", "train.batch=8")
    found = json.loads(out)
    assert status == 1 and not found["fits"]
    assert found["out_of_memory"] == compilers.OUT_OF_MEMORY
    assert found["peak_bytes"] / GIB == pytest.approx(13 + 120.67, abs=0.01)
    assert len(found["buffers"]) == 2 and found["predicted_step_seconds"] > 0
    advice = "\n".join(found["what_helps"])
    for words in (
        "--set train.batch=4",
        "parallel.zero=3",
        "parallel.remat=full",
        "--mesh=dp4,ep2",
    ):
        assert words in advice
    status, out = aot(compilers.exhausts, *ARGUMENTS)
    assert status == 1 and "IT DOES NOT FIT" in out and "What helps" in out
    status, out = aot(
        compilers.schedules, *ARGUMENTS, "--stop-at=schedule", "--figure=hbm_bytes=1e9"
    )
    assert status == 1 and "IT DOES NOT FIT" in out


def test_the_compilers_death_is_an_error(aot):
    message, out = aot(compilers.dies, *ARGUMENTS)
    assert message.startswith("error: the compiler was ended by SIGKILL after")
    assert "too little memory?" in message and "the last lines" in message and not out


def test_tables_and_reuse(aot):
    status, out = aot(compilers.completes, *ARGUMENTS, "--dump=texts")
    for words in ("tiny on v5p:2x2x1, mesh dp2,ep2 (4 devices)", "all-to-all", "1 of 1", "MFU"):
        assert words in out
    again = [*ARGUMENTS, "--dump=texts", "--reuse", "--json"]
    _, slow = aot(compilers.dies, *again, "--figure=ici_bandwidth=1e9")
    _, fast = aot(compilers.dies, *again)
    seconds = [json.loads(out)["predicted_step_seconds"] for out in (slow, fast)]
    assert status == 0 and seconds[0] > seconds[1]


def test_compile_only_of_train(aot):
    arguments = ["--compile-only=v5p:2x2x1", "--mesh=dp2,ep2", "--set", "train.batch=8"]
    status, out = aot(compilers.completes, *arguments, module=train)
    assert status == 0 and "tiny on v5p:2x2x1, mesh dp2,ep2 (4 devices)" in out
    assert "batch 8" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--topology=v9:2x2"], "unknown chip 'v9'; known: h100, h800, tpu7x, v5p, v6e"),
        (["--topology=v5p:8x8"], "expected 3 sizes, as in v5p:8x8x16"),
        (
            ["--topology=v5p:2x2x2", "--mesh=dp4,ep4"],
            "mesh dp4,ep4 needs 16 devices, but there are 8 (v5p:2x2x2); "
            "the nearest mesh that fits is --mesh=dp2,ep4",
        ),
        (["--topology=v5p:2x2x1", "--set", "train.batch=3"], "train.batch=3 sequences"),
        (["--topology=v5p:2x2x1", "--option=foo"], "expected XLA_OPTION=VALUE"),
        (["--topology=v5p:2x2x1", "--figure=ici=1"], "'ici'"),
        (["--topology=v5p:2x2x1", "--reuse"], "--reuse reads what an earlier run left in --dump"),
        (["--topology=v5p:2x2x1", "--reuse", "--dump=gone"], "gone holds no finished compilation"),
        (["--topology=v5p:2x2x1", "--config=tinny"], "did you mean 'tiny'"),
    ],
)
def test_bad_arguments_are_errors(aot, arguments, message):
    error, out = aot(compilers.dies, *arguments)
    assert error.startswith("error: ") and message in error and not out


@pytest.mark.parametrize(("topology", "extra"), [("v5p:2x2x1", "tpu"), ("h100:1x4", "cuda")])
def test_a_missing_compiler_says_the_pip_line(monkeypatch, topology, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = override(load_preset("tiny"), "train.batch=4")
    with pytest.raises(
        NotImplementedError, match=rf"pip install -c constraints.txt -e '.\[{extra}\]'"
    ):
        analyze(config, "dp4", topology)


def test_values_of_options():
    given = {"a=true": True, "a=false": False, "a=3": 3, "a=0.5": 0.5, "a=b=c": "b=c"}
    assert {text: command.parse_option(text)[1] for text in given} == given


def test_a_topology_that_libtpu_rejects():
    """The real compiler in its process, and its message."""
    pytest.importorskip("libtpu")
    config = override(load_preset("tiny"), "train.batch=105")
    with pytest.raises(ValueError, match="v5p:3x5x7: .*not divisible by"):
        analyze(config, "dp105", "v5p:3x5x7")
