"""FP8 against bfloat16: the loss, the error under outliers, and the time.

    python benchmarks/fp8.py train                three seeds, three formats: hours of 2 cores
    python benchmarks/fp8.py train --plot-only    the table and picture of earlier runs
    python benchmarks/fp8.py scaling              error of a matmul by the granularity of its scales
    python benchmarks/fp8.py cost                 quantization in the compiled step of 671B
    python benchmarks/fp8.py cycles               our kernel against XLA's matmuls, on tpu7x

`train` runs `train.py` on the instant corpus with the same text, order and seeds in FP8, bfloat16
and float32 (which shows the effect of chance), and compares held-out losses, smoothed over steps.
Runs lie in `--workdir`; the same command resumes them. `cost` compiles the step for TPUs
(dsv3_jax/aot) in both formats and adds up the operations that only quantize; quantization that the
compiler fused into other operations costs nothing there. `cycles` compiles matmuls for tpu7x: XLA
estimates the cycles of its own; the kernel's are its instruction bundles, one per cycle, times the
trips of its loops. Nothing runs, and waiting for memory is left out. `scaling` multiplies
activations with a few channels up to a million times as large as the others, in FP8 with one scale
per tensor and with one per tile and block as here, and compares with the exact product.
"""

import argparse
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.figure
import numpy as np
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from configs import load_preset
from dsv3_jax.aot.compile import ENVIRONMENT, compile_step, make_target
from dsv3_jax.aot.report import make_simulator
from dsv3_jax.aot.simulator import Simulator
from dsv3_jax.config_cli import override
from dsv3_jax.numerics.kernels import fp8_tpu
from dsv3_jax.numerics.quantize import BLOCK, TILE, QuantizedTensor, dequantize, quantize
from dsv3_jax.training.plots import smoothed
from sharding.mesh import parse_mesh

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = (  # 10 million parameters
    "model.width=256",
    "model.n_layers=4",
    "model.n_dense=1",
    "model.dense_hidden=512",
    "model.mtp_depth=0",
    "model.vocab_size=2048",
    "model.moe.n_experts=16",
    "model.moe.hidden=224",
    "model.moe.top_k=4",
    "model.moe.n_groups=4",
    "model.moe.topk_groups=2",
    "model.attention.n_heads=4",
    "model.attention.q_rank=96",
    "model.attention.kv_rank=64",
    "model.attention.nope_dim=32",
    "model.attention.rope_dim=16",
    "model.attention.value_dim=32",
    "train.batch=4",
    "train.seq_len=128",
    "train.eval_every=50",
    "train.eval_batches=16",
    "optimizer.constant_tokens=0.35e6",
    "optimizer.decay_tokens=0.4e6",
    "optimizer.peak_lr=1.5e-3",
    "optimizer.decayed_lr=1e-4",
    "optimizer.tail_lr=1e-4",
    "checkpoint.every=500",
)
FORMATS = ("bfloat16", "fp8", "float32")
STYLES = {"float32": ("-", "#999999"), "bfloat16": ("-", "#2563a8"), "fp8": ("--", "#d9822b")}
SMOOTHED = 0.2  # share of the run that a smoothed loss is a mean over


def run(workdir: Path, precision: str, seed: int, steps: int):
    """Train one run to `steps`."""
    settings = (*SETTINGS, f"precision={precision}", f"train.seed={seed}")
    command = [sys.executable, str(ROOT / "train.py"), "--config=tiny", "--mesh=dp1"]
    command += [f"--workdir={workdir / f'{precision}_{seed}'}", f"--steps={steps}"]
    for setting in settings:
        command += ["--set", setting]
    subprocess.run(command, check=True)


def held_out(workdir: Path, precision: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the steps of evaluations, and their held-out losses."""
    text = (workdir / f"{precision}_{seed}" / "metrics.jsonl").read_text()
    rows = [row for row in map(json.loads, text.splitlines()) if "eval_loss" in row]
    return np.array([row["step"] for row in rows]), np.array([row["eval_loss"] for row in rows])


def compare(workdir: Path, seeds: range, picture: Path):
    """Print a table of the losses and draw them."""
    table = Table(title="held-out loss, smoothed, at the end; differences from bfloat16")
    for column in ("seed", *FORMATS, "FP8", "float32"):
        table.add_column(column, justify="right")
    figure = matplotlib.figure.Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    found: dict[str, list[np.ndarray]] = {"fp8": [], "float32": []}
    for seed in seeds:
        losses = {name: held_out(workdir, name, seed) for name in FORMATS}
        steps = losses["bfloat16"][0]
        for name, (line, color) in STYLES.items():
            label = None if seed else name
            left.plot(steps, losses[name][1], line, color=color, alpha=0.8, label=label)
        smooth = {name: smoothed(loss, SMOOTHED) for name, (_, loss) in losses.items()}
        for name, differences in found.items():
            differences.append(smooth[name] / smooth["bfloat16"] - 1)
            line, color = STYLES[name]
            right.plot(steps, differences[-1], line, color=color, alpha=0.35, linewidth=1)
        ends = (f"{smooth[name][-1]:.4f}" for name in FORMATS)
        table.add_row(str(seed), *ends, *(f"{x[-1][-1]:+.2%}" for x in found.values()))
    for name, differences in found.items():
        mean = np.mean(differences, axis=0)
        line, color = STYLES[name]
        right.plot(steps, mean, line, color=color, linewidth=2.2, label=f"{name}, mean")
    for sign in (-1, 1):
        right.axhline(sign * 0.0025, color="#666666", linestyle=":", linewidth=1)
    left.set(title="Held-out loss", xlabel="step", ylabel="nats per token")
    right.set(title="Over bfloat16, smoothed; thin: one seed; dotted: 0.25 %", xlabel="step")
    right.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=150)
    Console().print(table)
    means = {name: np.mean([x[-1] for x in differences]) for name, differences in found.items()}
    between = np.mean([a[-1] - b[-1] for a, b in zip(*found.values(), strict=True)])
    print(
        f"mean of {len(seeds)} seeds: FP8 {means['fp8']:+.2%}, float32 {means['float32']:+.2%}, "
        f"FP8 over float32 {between:+.2%}; picture in {picture}"
    )


def cost(mesh: str, topology: str):
    """Print the simulated seconds of the 671B step in both formats, and those of quantization."""
    table = Table(title=f"dsv3_671b, {mesh} on {topology}, one sequence per device: one step")
    for column in ("precision", "step", "compute", "matmuls", "quantization", "share of step"):
        table.add_column(column, justify="right")
    for precision in ("bfloat16", "fp8"):
        batch = f"train.batch={parse_mesh(mesh).n_data_shards}"
        settings = (batch, f"precision={precision}", "precision.dispatch=fp8")
        config = override(load_preset("dsv3_671b"), *settings)
        target = make_target(config, mesh, topology)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            compilation = compile_step(config, target, folder, {}, to_schedule=True)
            simulator = make_simulator(config, target, folder, compilation)
        step = simulator.step()
        seconds = quantization_seconds(simulator, simulator.module.entry)
        figures = (step.makespan, step.compute, step.matmul_bound, seconds)
        share = f"{seconds / step.makespan:.1%}"
        table.add_row(precision, *(f"{x:.3f} s" for x in figures), share)
    Console().print(table)


def quantization_seconds(simulator: Simulator, name: str) -> float:
    """Return the seconds of operations that only quantize, in one run of a computation."""
    computation, seconds = simulator.module.computations[name], 0.0
    for event in simulator.computation(name).events:
        instruction = computation.by_name[event.name]
        if event.lane == "compute" and event.kind in ("memory", "matmul"):
            quantizes = "/quantize/" in instruction.op_name
            seconds += (event.end - event.start) * quantizes
    for loop in computation.instructions:
        if loop.opcode == "while":
            body = simulator.module.body(loop).name
            seconds += simulator.runs_of(loop) * quantization_seconds(simulator, body)
    return seconds


SHAPES = ((4096, 7168, 4096), (4096, 2048, 7168), (4096, 16384, 7168))  # M K N, as at 671B


def cycles():
    """Print the cycles of matmuls, each compiled in a process with its own folder for texts."""
    table = Table(title="thousand cycles on tpu7x (speed over bfloat16)")
    for column in ("M x K x N", "bfloat16", "plain FP8", "kernel, 128", "256 deep"):
        table.add_column(column, justify="right")
    for shape in SHAPES:
        found = {}
        for kind in ("bfloat16", "float8_e4m3fn", "128", "256"):
            with tempfile.TemporaryDirectory() as folder:
                command = [sys.executable, __file__, "one-matmul", kind, folder, *map(str, shape)]
                found[kind] = float(subprocess.check_output(command, text=True).split()[-1])
        base = found["bfloat16"]
        cells = (f"{n / 1e3:,.0f} ({base / n:.2f})" for n in found.values())
        table.add_row("x".join(map(str, shape)), *cells)
    Console().print(table)


def one_matmul(kind: str, folder: str, m: int, k: int, n: int):
    """Print the cycles of one matmul."""
    dumps = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
    os.environ.update(ENVIRONMENT | {"LIBTPU_INIT_ARGS": dumps if kind.isdigit() else ""})
    devices = topologies.get_topology_desc(platform="tpu", topology_name="tpu7x:2x2x1").devices
    here = jax.sharding.SingleDeviceSharding(devices[0])

    def given(*shape, dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    if not kind.isdigit():
        fn = functools.partial(jnp.matmul, preferred_element_type=jnp.bfloat16)
        arguments = given(m, k, dtype=jnp.dtype(kind)), given(k, n, dtype=jnp.dtype(kind))
        text = jax.jit(fn).lower(*arguments).compile().as_text()
        print(sum(map(float, re.findall(r'"estimated_cycles":"(\d+)"', text))))
        return
    depth, f8, f32 = int(kind), jnp.float8_e4m3fn, jnp.float32
    x = QuantizedTensor(given(m, k, dtype=f8), given(m, k // 128, dtype=f32))
    w = QuantizedTensor(given(k, n, dtype=f8), given(k // 128, n // 128, dtype=f32))
    fn = functools.partial(fp8_tpu.scaled_matmul, dtype=jnp.bfloat16, depth=depth)
    jax.jit(fn).lower(x, w).compile()
    texts = [path.read_text() for path in Path(folder).glob("*final_bundles.txt")]
    (text,) = [t for t in texts if "hlo: grouped_scaled_matmul" in t]
    k_blocks = fp8_tpu.largest_divisor(k // depth, fp8_tpu.STEP // depth)
    trips = k_blocks // fp8_tpu.largest_divisor(k_blocks, fp8_tpu.UNROLL)
    tiles, steps = -(-m // fp8_tpu.ROWS) * -(-n // fp8_tpu.COLUMNS), k // depth // k_blocks
    always, sometimes, inner = bundles(text)
    print(tiles * steps * (always + trips * inner) + tiles * sometimes)


def bundles(text: str) -> tuple[int, int, int]:
    """Return the bundles of the loop over tiles, of its branches, and of the loop inside."""
    always = sometimes = inner = 0
    branch = False
    for line in text.splitlines():
        if not (found := re.match(r"\s*0x[0-9a-f]+\s*(\w\w)?:\s*(>*) ", line)):
            continue
        branch &= found[1] != "PF"
        depth = len(found[2])
        inner += depth == 2
        always += depth == 1 and not branch
        sometimes += depth == 1 and branch
        branch |= depth == 1 and "sbr.rel" in line
    return always, sometimes, inner


def scaling():
    """Print the error of a matmul by the size of a few channels and the granularity of scales."""
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((512, 1024)), 0.02 * rng.standard_normal((1024, 512))
    table = Table(title="error of a matmul in FP8, relative to its size")
    for column in ("outliers", "a scale per tensor", "a scale per tile and block"):
        table.add_column(column, justify="right")
    for size in (1, 1000, 10_000, 100_000, 1_000_000):
        rows = x.copy()
        rows[:, ::341] *= size  # 4 channels, in 3 of 8 tiles
        errors = []
        for tile, block in (((512, 1024), (1024, 512)), (TILE, BLOCK)):
            left = np.float64(dequantize(quantize(jnp.asarray(rows), tile), tile))
            right = np.float64(dequantize(quantize(jnp.asarray(w), block), block))
            # The channels of outliers are exact enough either way: the others are compared.
            small = np.ones(1024, bool)
            small[::341] = False
            got, want = left[:, small] @ right[small], rows[:, small] @ w[small]
            errors.append(np.linalg.norm(got - want) / np.linalg.norm(want))
        table.add_row(f"{size:,} times", *(f"{error:.1%}" for error in errors))
    Console().print(table)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("train", "scaling", "cost", "cycles"))
    parser.add_argument("--workdir", type=Path, default=Path("runs/fp8"))
    parser.add_argument("--picture", type=Path, default=ROOT / "docs" / "fp8.png")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--plot-only", action="store_true", help="train nothing")
    parser.add_argument("--mesh", default="dp16,ep64", help="for cost (default: dp16,ep64)")
    parser.add_argument("--topology", default="tpu7x:8x8x8", help="for cost")
    if sys.argv[1:2] == ["one-matmul"]:
        kind, folder, *shape = sys.argv[2:]
        one_matmul(kind, folder, *map(int, shape))
        return
    arguments = parser.parse_args()
    if arguments.what == "cycles":
        cycles()
        return
    if arguments.what == "scaling":
        scaling()
        return
    if arguments.what == "cost":
        cost(arguments.mesh, arguments.topology)
        return
    seeds = range(arguments.seeds)
    for seed in seeds if not arguments.plot_only else ():
        for precision in FORMATS:
            run(arguments.workdir, precision, seed, arguments.steps)
    compare(arguments.workdir, seeds, arguments.picture)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    main()
