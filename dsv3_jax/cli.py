"""What the command lines share: options of the same meaning, and errors told in one line."""

import argparse
import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

from sharding.mesh import GRAMMAR

DTYPES = ("float32", "bfloat16", "fp8")
TOLD = (ValueError, KeyError, NotImplementedError, OSError, ModuleNotFoundError)


def add_model(parser: argparse.ArgumentParser):
    """--weights, --dtype and --mesh: which model, and how it lies in memory."""
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="folder with the weights and tokenizer.json")
    add("--dtype", choices=DTYPES, default="float32", help="default: %(default)s")
    add("--mesh", help=f"{GRAMMAR} (default: one device)")


def add_settings(parser: argparse.ArgumentParser):
    """--set, for `overrides.override`."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="override a field of the config, e.g. train.batch=1024; may be repeated",
    )


@contextlib.contextmanager
def errors_told() -> Iterator[None]:
    """Ends the program with the message alone where it is for the user; exit code 1."""
    try:
        yield
    except TOLD as error:
        sys.exit(f"error: {message(error)}")


def message(error: Exception) -> str:
    """The text of an error; `str` would put that of a KeyError in quotes."""
    return str(error.args[0] if isinstance(error, KeyError) else error)


def table(title: str, header: list[str], rows: list[list[str]], n_text: int = 1):
    """Return a `rich` table whose first `n_text` columns are text, the others numbers."""
    import rich.box  # only commands that print tables pay for the import
    import rich.table

    grid = rich.table.Table(
        title=title,
        title_justify="left",
        box=rich.box.SIMPLE,
        show_header=any(header),
        padding=0,
    )
    for number, name in enumerate(header):
        is_text = number < n_text
        grid.add_column(
            name,
            justify="left" if is_text else "right",
            no_wrap=name == "mesh" or not is_text,
            overflow="fold",
        )
    for row in rows:
        grid.add_row(*row)
    return grid
