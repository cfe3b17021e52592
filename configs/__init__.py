"""Presets: each file has `get_config() -> Config`, and its docstring is the command to run."""

import importlib
from pathlib import Path

from dsv3_jax.config import Config
from dsv3_jax.errors import did_you_mean


def preset_names() -> list[str]:
    """Names that `--config` takes: the files in this folder."""
    return sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py"))


def load_preset(name: str) -> Config:
    """The `Config` of `configs/<name>.py`.

    Raises:
        KeyError: no such preset; the message gives the nearest one.
    """
    if name not in preset_names():
        raise KeyError(f"unknown config {name!r}: {did_you_mean(name, preset_names())}")
    return importlib.import_module(f"configs.{name}").get_config()
