"""Bars on stderr for work that takes long, on a terminal; else nothing."""

import contextlib
import sys
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

Advance = Callable[[int], object]  # is told how many more pieces of the work are done
Bar = Callable[[str, int], contextlib.AbstractContextManager[Advance]]  # of (what, total)
QUIET_BELOW = 2**30  # bytes that are moved without a bar


@contextlib.contextmanager
def no_bar(what: str, total: int) -> Iterator[Advance]:
    """Work that is not shown."""
    yield lambda n: None


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Advance]:
    """With count, time gone and time left."""
    columns = (rich.progress.MofNCompleteColumn(), rich.progress.TimeElapsedColumn())
    with _shown(what, total, *columns) as advance:
        yield advance


@contextlib.contextmanager
def byte_bar(what: str, n_bytes: int) -> Iterator[Advance]:
    """With bytes, speed and time left."""
    columns = (rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn())
    with _shown(what, n_bytes, *columns, quiet=n_bytes < QUIET_BELOW) as advance:
        yield advance


@contextlib.contextmanager
def spinner(what: str) -> Iterator[None]:
    """Show that work goes on whose length is unknown."""
    with rich.console.Console(stderr=True).status(what):
        yield


@contextlib.contextmanager
def _shown(
    what: str, total: int, *columns: rich.progress.ProgressColumn, quiet: bool = False
) -> Iterator[Advance]:
    console = rich.console.Console(file=sys.stderr)
    shown = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(bar_width=24),
        *columns,
        rich.progress.TimeRemainingColumn(),
        console=console,
        disable=quiet or not console.is_terminal,
    )
    with shown:
        task = shown.add_task(what, total=total)
        yield lambda n: shown.advance(task, n)
