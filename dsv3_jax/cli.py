"""Options that several commands have in common."""

import argparse
from pathlib import Path

from dsv3_jax.config import WEIGHT_DTYPES
from sharding import GRAMMAR


def add_model_options(parser: argparse.ArgumentParser):
    """Add --weights, --dtype and --mesh: which weights, in which format, on which devices."""
    add = parser.add_argument
    add("--weights", type=Path, required=True, help="folder with the weights and tokenizer.json")
    add("--dtype", choices=WEIGHT_DTYPES, default="float32", help="default: %(default)s")
    add("--mesh", help=f"{GRAMMAR} (default: one device)")


def add_set_option(parser: argparse.ArgumentParser):
    """Add --set, a list of assignments for `config_cli.override`."""
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="SECTION.FIELD=VALUE",
        help="override a field of the config, e.g. train.batch=1024; may be repeated",
    )


def add_figure_option(parser: argparse.ArgumentParser):
    """Add --figure, a list of assignments to fields of a chip."""
    parser.add_argument(
        "--figure",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="override a figure of the chip: a field of Chip in dsv3_jax/hardware.py",
    )


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
