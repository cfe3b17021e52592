"""The numbers of an evaluation as tables for the terminal."""

import rich.box
import rich.console
import rich.table


def show(report: dict):
    """Print what `__main__.evaluate` found."""
    console = rich.console.Console(highlight=False)
    if report["perplexity"]:
        console.print(texts(report["perplexity"]))
    if report["tasks"]:
        console.print(tasks(report["tasks"]))


def texts(sets: dict[str, dict]) -> rich.table.Table:
    header = ["held-out text", "documents", "tokens", "nats a token", "perplexity", "bits per byte"]
    table = _table(header, words=1)
    for name, found in sets.items():
        numbers = (f"{found[key]:.4f}" for key in ("nats_per_token", "perplexity", "bits_per_byte"))
        table.add_row(name, f"{found['documents']:,}", f"{found['tokens']:,}", *numbers)
    return table


def tasks(rows: list[dict]) -> rich.table.Table:
    table = _table(["task", "metric", "value", "± standard error", "chance", "questions"], words=2)
    for row in rows:
        stderr, chance = (
            "" if row[name] is None else f"{row[name]:.4f}" for name in ("stderr", "chance")
        )
        value, count = f"{row['value']:,.4f}", f"{row['questions']:,}"
        table.add_row(row["task"], row["metric"], value, stderr, chance, count)
    return table


def _table(header: list[str], words: int) -> rich.table.Table:
    """An empty table whose first `words` columns are words, the others numbers."""
    table = rich.table.Table(box=rich.box.SIMPLE, padding=0)
    for place, name in enumerate(header):
        table.add_column(name, justify="right" if place >= words else "left", overflow="fold")
    return table
