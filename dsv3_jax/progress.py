"""Progress of long work: bars with time left, on a terminal; elsewhere nothing, or a few lines."""

import contextlib
import datetime
import math
import sys
import time
from collections.abc import Callable, Iterator

import rich.console
import rich.progress

Advance = Callable[[int], object]  # takes the number of further items that are done
Bar = Callable[[str, int], contextlib.AbstractContextManager[Advance]]  # takes a title, the total
MIN_BAR_BYTES = 2**30  # less is moved without a bar
PLAIN_LINES = 20  # of a whole run, where there is no terminal


@contextlib.contextmanager
def no_bar(title: str, total: int) -> Iterator[Advance]:
    """Show nothing."""
    yield lambda n: None


@contextlib.contextmanager
def bar(title: str, total: int) -> Iterator[Advance]:
    """Show a bar with the count, time elapsed and time left."""
    columns = (rich.progress.MofNCompleteColumn(), rich.progress.TimeElapsedColumn())
    with _bar(title, total, *columns) as advance:
        yield advance


@contextlib.contextmanager
def byte_bar(title: str, n_bytes: int) -> Iterator[Advance]:
    """Show a bar with bytes, speed and time left; nothing below `MIN_BAR_BYTES`."""
    columns = (rich.progress.DownloadColumn(), rich.progress.TransferSpeedColumn())
    with _bar(title, n_bytes, *columns, hidden=n_bytes < MIN_BAR_BYTES) as advance:
        yield advance


@contextlib.contextmanager
def spinner(title: str) -> Iterator[None]:
    """Show that work of unknown length goes on."""
    console = rich.console.Console(file=sys.stderr)
    with console.status(title) if console.is_terminal else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def _bar(
    title: str, total: int, *columns: rich.progress.ProgressColumn, hidden: bool = False
) -> Iterator[Advance]:
    console = rich.console.Console(file=sys.stderr)
    progress = rich.progress.Progress(
        rich.progress.TextColumn("{task.description}", markup=False),
        rich.progress.BarColumn(bar_width=24),
        *columns,
        rich.progress.TimeRemainingColumn(),
        console=console,
        disable=hidden or not console.is_terminal,
    )
    with progress:
        task = progress.add_task(title, total=total)
        yield lambda n: progress.advance(task, n)


class TrainingProgress:
    """A bar with loss, speed and time left; without a terminal, about `PLAIN_LINES` plain lines."""

    def __init__(
        self, total: int, start: int, label: str, console: rich.console.Console | None = None
    ):
        """Prepare the bar of a run.

        Args:
            total: the last step of the run.
            start: the step that it resumes from.
            label: what the utilization is a fraction of, from `device_peak`.
        """
        self._total, self._start, self._label = total, start, label
        self._every = max(1, math.ceil((total - start) / PLAIN_LINES))
        self._first: tuple[int, float] | None = None  # the first step shown, and when
        self._console = console or rich.console.Console()
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=12),
            rich.progress.TextColumn("{task.description}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=total, completed=start)

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        return self

    def __exit__(self, *exception):
        self._bar.stop()

    def update(self, step: int, *, loss: float, tokens_per_second: float, utilization: float):
        """Show the numbers of the finished `step`; `utilization` is a fraction of the peak."""
        text = (
            f"step {step:,}/{self._total:,}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  "
            f"{self._time_left(step)} left  {utilization:.1%} {self._label}"
        )
        self._bar.update(self._task, completed=step, description=text)
        is_due = step % self._every == 0 or step in (self._start + 1, self._total)
        if is_due and not self._console.is_terminal:
            self.print(text)

    def print(self, line: str):
        """Print a line above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _time_left(self, step: int) -> str:
        """Return hours, minutes and seconds; the first step, which compiles, does not count."""
        now = time.monotonic()
        self._first = self._first or (step, now)
        first, then = self._first
        if step == first:
            return "-:--:--"
        seconds = (now - then) / (step - first) * (self._total - step)
        return str(datetime.timedelta(seconds=round(seconds)))
