"""train.py on a small model, as tests of the command line run it, and the rows it leaves."""

import email
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
SMALL = [
    "model.width=32",
    "model.vocab_size=512",
    "model.n_layers=2",
    "model.moe.n_experts=8",
    "model.moe.n_groups=4",
    "model.moe.topk_groups=2",
    "model.moe.top_k=2",
    "model.moe.hidden=16",
    "train.batch=8",
    "train.seq_len=32",
    "train.eval_every=1000",
    "train.sample_tokens=4",
    "checkpoint.every=5",
]


def settings(workdir: Path, *more: str) -> list[str]:
    """The small model, and a part of the standard library, which stays the same, as text."""
    source = Path(email.__file__).parent
    text = [f"data.source={source}", f"data.cache_dir={workdir.parent / 'cache'}"]
    return [*SMALL, *text, *more]


def command(workdir: Path, steps: int, *more: str) -> list[str]:
    """`steps` steps of it."""
    flags = [f"--set={setting}" for setting in settings(workdir, *more)]
    run = [sys.executable, str(ROOT / "train.py"), "--mesh=dp2,ep2"]
    return [*run, f"--workdir={workdir}", f"--steps={steps}", *flags]


def rows_of(workdir: Path) -> dict[int, dict]:
    """Training rows by step, without what depends on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    rows = (json.loads(line) for line in lines if line.endswith("}"))
    timed = "tokens_per_second"
    return {
        row["step"]: {name: value for name, value in row.items() if name != timed}
        for row in rows
        if "loss" in row
    }
