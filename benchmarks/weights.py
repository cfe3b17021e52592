"""Time and memory of loading a released checkpoint as a model, against the disk's own speed.

    python benchmarks/weights.py --dir /some/disk

Writes a synthetic checkpoint with the 671B model's matrices (fewer layers and experts; FP8 blocks
and scales, 6.5 GB in many shards), then in turn reads the files one after the other into a buffer
(the disk's own rate) and loads them as a bfloat16 model, each in a fresh process with the files
dropped from the page cache. `disk and memory` is a lower bound for any loader: it reads the files
and copies every byte twice into fresh memory, the size of the bfloat16 arrays, without arithmetic.
Peak memory is that of the process; its trace is drawn into a picture beside the checkpoint.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import track
from rich.table import Table

from configs import load_preset
from dsv3_jax.config import ModelConfig
from dsv3_jax.weights.hf_config import official_config
from dsv3_jax.weights.hf_names import BIAS, SCALE, fp8_names, official_shapes
from dsv3_jax.weights.safetensors import SafetensorsWriter

SHARD_BYTES = 400 * 10**6


def model_config() -> ModelConfig:
    """Return the 671B model with 3 layers of 61, 56 experts of 256 and a small vocabulary."""
    model = load_preset("dsv3_671b").model
    return dataclasses.replace(
        model,
        n_layers=3,
        n_dense=1,
        mtp_depth=0,
        vocab_size=16_384,
        moe=dataclasses.replace(model.moe, n_experts=56),
    )


def write_checkpoint(folder: Path):
    """Write random FP8 values (none is NaN) and scales near those of trained weights."""
    config, rng = model_config(), np.random.default_rng(0)
    shapes = official_shapes(config)
    fp8 = fp8_names(config)
    noise = rng.integers(0, 126, 2**26, dtype=np.uint8)  # sliced anew for each tensor
    with SafetensorsWriter(folder, SHARD_BYTES) as writer:
        for name, shape in track(shapes.items(), f"writing {folder}"):
            start = int(rng.integers(0, 2**20))
            values = np.resize(noise[start:], shape)
            if name in fp8:
                blocks = [-(-n // 128) for n in shape]
                writer.add(name, values.view(ml_dtypes.float8_e4m3fn))
                writer.add(name + SCALE, rng.uniform(1e-4, 2e-4, blocks).astype(np.float32))
            else:
                kind = np.float32 if name.endswith(BIAS) else ml_dtypes.bfloat16
                writer.add(name, (values / 126).astype(kind))
        text = json.dumps(official_config(config, "bfloat16", True), indent=2)
        writer.add_file("config.json", text)


def drop_from_cache(folder: Path):
    """Ask the system to drop the files from the page cache."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_sequentially(folder: Path) -> float:
    """Return the seconds to read all files in turn into one buffer."""
    buffer = bytearray(2**24)
    start = time.perf_counter()
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.perf_counter() - start


def read_into_memory(folder: Path):
    """Read the files in two threads and copy each byte twice to fresh memory; print the seconds."""
    start = time.perf_counter()
    chunk, chunks, size, files = 2**22, [], 0, []
    for path in sorted(folder.glob("*.safetensors")):
        n = path.stat().st_size
        files.append(open(path, "rb", buffering=0))  # noqa: SIM115 the process ends soon
        chunks += [
            (files[-1].fileno(), at, size + at, min(chunk, n - at)) for at in range(0, n, chunk)
        ]
        size += n
    arrays, buffers = np.zeros((2, size), np.uint8), threading.local()

    def work(item):
        number, offset, place, n = item
        if not hasattr(buffers, "own"):
            buffers.own = np.empty(chunk, np.uint8)
        os.preadv(number, [memoryview(buffers.own)[:n]], offset)
        arrays[:, place : place + n] = buffers.own[None, :n]

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(work, chunks))
    print(json.dumps({"seconds": time.perf_counter() - start}), flush=True)
    os._exit(0)  # without the seconds that giving the memory back takes


def load_once(folder: Path):
    """Load in this process, a fresh one, and print time and memory as JSON."""
    from dsv3_jax import load_pretrained

    trace, stop = [], threading.Event()
    page = os.sysconf("SC_PAGE_SIZE")

    def watch():
        while not stop.wait(0.05):
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            trace.append((time.perf_counter() - start, resident))

    start = time.perf_counter()
    watcher = threading.Thread(target=watch)
    watcher.start()
    model = load_pretrained(folder, dtype="bfloat16")
    seconds = time.perf_counter() - start
    stop.set()
    watcher.join()
    import jax
    from flax import nnx

    held = sum(x.nbytes for x in jax.tree.leaves(nnx.state(model)))
    print(json.dumps({"seconds": seconds, "held": held, "trace": trace}), flush=True)
    os._exit(0)


def in_a_fresh_process(what: str, folder: Path) -> dict:
    drop_from_cache(folder)
    command = [sys.executable, __file__, "--only", what, "--dir", str(folder.parent)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def plot_trace(trace: list, held: int, path: Path):
    import matplotlib.figure

    figure = matplotlib.figure.Figure(figsize=(7, 3.5), layout="constrained")
    axes = figure.subplots()
    seconds, resident = np.array(trace).T
    axes.plot(seconds, resident / 1e9, label="resident")
    axes.axhline(held / 1e9, color="0.5", linestyle=":", label="the model's arrays")
    axes.axhline((held + 2 * SHARD_BYTES) / 1e9, color="C3", linestyle="--", label="+ 2 shards")
    axes.set(xlabel="seconds", ylabel="GB", title="memory of the process while it loads")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dir", type=Path, default=Path("runs/benchmark"), help="a disk with 7 GB")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--only", choices=("load", "memory"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.dir / "weights"
    if arguments.only:
        load_once(folder) if arguments.only == "load" else read_into_memory(folder)
        return
    if not folder.exists():
        write_checkpoint(folder)
        os.sync()
    n_bytes = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    seconds: dict[str, list[float]] = {"disk alone": [], "disk and memory": [], "load": []}
    runs = []
    for _ in range(arguments.rounds):
        drop_from_cache(folder)
        seconds["disk alone"].append(read_sequentially(folder))
        seconds["disk and memory"].append(in_a_fresh_process("memory", folder)["seconds"])
        runs.append(in_a_fresh_process("load", folder))
        seconds["load"].append(runs[-1]["seconds"])
    table = Table(
        title=f"{n_bytes / 1e9:.2f} GB in {len(list(folder.glob('*.safetensors')))} shards"
    )
    for column in (
        "",
        "seconds",
        "GB/s of files",
        "share of the disk's rate",
        "of disk and memory",
    ):
        table.add_column(column, justify="right")
    disk, memory = (np.median(seconds[name]) for name in ("disk alone", "disk and memory"))
    for name, values in seconds.items():
        median = np.median(values)
        rate = f"{n_bytes / median / 1e9:.2f}"
        table.add_row(name, f"{median:.2f}", rate, f"{disk / median:.0%}", f"{memory / median:.0%}")
    Console().print(table)
    peak = max(resident for run in runs for _, resident in run["trace"])
    held, base = runs[-1]["held"], runs[-1]["trace"][0][1]
    plot_trace(runs[-1]["trace"], held, arguments.dir / "memory.png")
    print(
        f"arrays {held / 1e9:.2f} GB; the process began with {base / 1e9:.2f} GB and peaked at "
        f"{peak / 1e9:.2f} GB, {(peak - base - held) / 1e9:+.2f} GB over both "
        f"(2 shards are {2 * SHARD_BYTES / 1e9:.2f} GB); trace in {arguments.dir / 'memory.png'}"
    )


if __name__ == "__main__":
    from dsv3_jax.training.supervisor import use_huge_pages

    use_huge_pages()
    main()
