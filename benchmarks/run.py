"""The cost of a run besides its steps: EMA weights, bfloat16 moments, audits, saving, data.

    python benchmarks/run.py --rounds 3 --mesh dp1

Trains the tiny preset for some steps with each setting in turn, each in its own process, and reads
the metrics and the goodput ledger of the runs. Printed are medians over the rounds: milliseconds
per step against the plain run, and the time for which the loop waited for saves and for data.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import rich.console
import rich.table

ROOT = Path(__file__).parent.parent
KINDS = {
    "plain": [],
    "ema.decay=0.999": ["ema.decay=0.999"],
    "ema.decay=0.999 ema.every=10": ["ema.decay=0.999", "ema.every=10"],
    "precision.moments=bfloat16": ["precision.moments=bfloat16"],
    "guard.audit_every=20": ["guard.audit_every=20"],
}


def measure(settings: list[str], mesh: str, steps: int, folder: Path) -> dict[str, float]:
    """Return milliseconds of one run: a step's median, waiting for data per step, one save."""
    always = [f"checkpoint.every={steps // 4}", "train.eval_every=100000", "train.eval_batches=1"]
    sets = [f"--set={setting}" for setting in [*always, *settings]]
    command = [sys.executable, str(ROOT / "train.py"), f"--mesh={mesh}", f"--steps={steps}"]
    subprocess.run([*command, f"--workdir={folder}", *sets], check=True, capture_output=True)
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    speeds = [row["tokens_per_second"] for row in rows if "loss" in row][5:]
    seconds = json.loads((folder / "ledger.jsonl").read_text())["seconds"]
    config = json.loads((folder / "config.json").read_text())["train"]
    tokens = config["batch"] * config["seq_len"]
    return {
        "step": 1e3 * tokens / statistics.median(speeds),
        "data": 1e3 * seconds["data"] / steps,
        "save": 1e3 * seconds["save"] / 5,  # the last one has to wait for the disk
    }


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="runs of each setting")
    parser.add_argument("--steps", type=int, default=60, help="steps of each run")
    parser.add_argument("--mesh", default="dp1", help="default: %(default)s")
    arguments = parser.parse_args()
    found: dict[str, list[dict]] = {name: [] for name in KINDS}
    for number in range(arguments.rounds):
        for name, settings in KINDS.items():
            with tempfile.TemporaryDirectory() as folder:
                run = measure(settings, arguments.mesh, arguments.steps, Path(folder))
                found[name].append(run)
            print(f"round {number + 1}: {name}", file=sys.stderr)
    columns = ["", "ms per step", "over plain", "data", "one save", "at one save per 100 steps"]
    table = rich.table.Table(*columns, title=f"the tiny preset on {arguments.mesh}")
    for name, runs in found.items():
        step, wait, save = (statistics.median(run[of] for run in runs) for of in runs[0])
        ratio = statistics.median(
            run["step"] / plain["step"] for run, plain in zip(runs, found["plain"], strict=True)
        )
        shares = (f"{wait / step:.2%}", f"{save:.0f} ms", f"{save / 100 / step:.2%} of a step")
        table.add_row(name, f"{step:.0f}", f"{ratio:.3f}", *shares)
    rich.console.Console(width=100).print(table)


if __name__ == "__main__":
    main()
