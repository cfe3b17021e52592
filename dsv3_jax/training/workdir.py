"""Checks of a run's folder: its config, text and tokenizer are those that it was begun with."""

import json
from pathlib import Path

import jax

from dsv3_jax.config import Config
from dsv3_jax.config_cli import differences, to_dict
from dsv3_jax.data.tokenizer import Tokenizer, load_tokenizer
from dsv3_jax.training.records import write_atomically

# Fields that may change between two starts in a workdir: they don't change what is learned.
CHANGEABLE = (
    "train.steps",
    "train.eval",
    "train.sample",
    "checkpoint.",
    "parallel.",
    "pipeline.",
    "data.cache_dir",
    "data.bad_lines",
    "fp8_stats",
    "guard.",
    "model.moe.n_redundant",
)


def check_workdir(config: Config, workdir: Path):
    """Write config.json into the workdir; raise a ValueError if another config began it."""
    path = workdir / "config.json"
    if path.exists():
        changed = differences(config, json.loads(path.read_text()))
        fixed = [line for line in changed if not line.startswith(CHANGEABLE)]
        if fixed:
            raise ValueError(
                f"{workdir} was begun with another config:\n  "
                + "\n  ".join(fixed)
                + "\nuse that config again, or another --workdir"
            )
    if jax.process_index() == 0:
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(to_dict(config), indent=2) + "\n")


def check_text(source: str, saved: str, now: str):
    """Raise a ValueError if the text is not what the run was trained on so far.

    Args:
        saved: its fingerprint in the checkpoint.
        now: its fingerprint today.
    """
    if saved != now:
        raise ValueError(
            f"the text of data.source={source} is not what this run was trained on so far "
            f"(fingerprint {saved}, now {now}); bring the old text back, or begin another --workdir"
        )


def check_tokenizer(directory: Path | None, tokenizer: Tokenizer):
    """Raise a ValueError if weights were trained with other token ids than those of `tokenizer`.

    Args:
        directory: of the weights; without a tokenizer.json in it, nothing is checked.
    """
    path = None if directory is None else directory / "tokenizer.json"
    if path is None or not path.exists():
        return
    theirs, ours = (x.backend.get_vocab() for x in (load_tokenizer(str(path)), tokenizer))
    if theirs != ours:
        both = theirs.keys() & ours.keys()
        same = sum(theirs[token] == ours[token] for token in both)
        raise ValueError(
            f"init_from: the weights in {directory} were trained with another tokenizer: of its "
            f"{len(theirs):,} tokens {same:,} have the same id here. "
            f"Add --set data.tokenizer={path}"
        )
