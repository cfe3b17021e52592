"""What a run reports while it trains: rows on disk, a progress display and the machine's peak."""

import datetime
import json
import math
import os
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import rich.console
import rich.progress
import tensorboardX
from jax.typing import DTypeLike

from dsv3_jax.hardware import BF16_FLOPS


class MetricsLog:
    """Appends rows to `metrics.jsonl` and `tensorboard/` in `workdir`, each step exactly once."""

    def __init__(self, workdir: str | Path, resume_step: int | None):
        """Open the log after `resume_step`, the step of the restored state; None starts afresh.

        Rows of later steps, which a killed run has left and this one will repeat, are removed.
        """
        self._path = Path(workdir) / "metrics.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        if resume_step is None:
            self._path.unlink(missing_ok=True)
        self._open(resume_step or 0)

    def _open(self, step: int):
        kept = read(self._path) if self._path.exists() else []
        write_atomically(self._path, "".join(_line(row) for row in kept if row["step"] <= step))
        self._file = self._path.open("a")
        self._board = tensorboardX.SummaryWriter(
            str(self._path.parent / "tensorboard"), purge_step=step + 1, flush_secs=10
        )

    def rewind(self, step: int):
        """Remove the rows of all steps after this one, which will come again."""
        self.close()
        self._open(step)

    def log(self, row: dict[str, int | float]):
        """Write one row, which has a "step"; it is in the file when this returns.

        Floats keep all their digits. JSON has no NaN and no infinity: they become null.
        """
        self._file.write(_line(row))
        self._file.flush()
        for name, value in row.items():
            if name != "step" and math.isfinite(value):
                self._board.add_scalar(name, value, row["step"])

    def close(self):
        self._file.close()
        self._board.close()


def read(path: str | Path) -> list[dict]:
    """The rows of a `metrics.jsonl`, without a last line that a killed run left unfinished.

    Raises:
        ValueError: a line before it is no JSON.
    """
    *lines, _ = Path(path).read_text().split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}, line {number} is no JSON ({error}): {line[:80]!r}; remove that line"
            ) from error
    return rows


def write_atomically(path: Path, text: str):
    """Replace a file's text so that a kill leaves either the old text or the new."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _line(row: dict) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


class Progress:
    """A bar with loss, speed and time left; without a terminal about 20 plain lines instead.

    Args:
        total: the last step of the run.
        start: the step resumed from.
        label: what the utilization is a share of, from `device_peak`.
    """

    def __init__(
        self, total: int, start: int, label: str, console: rich.console.Console | None = None
    ):
        self._total, self._start, self._label = total, start, label
        self._every = max(1, math.ceil((total - start) / 20))
        self._first: tuple[int, float] | None = None
        self._console = console or rich.console.Console()
        self._bar = rich.progress.Progress(
            rich.progress.BarColumn(bar_width=12),
            rich.progress.TextColumn("{task.description}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("compiling", total=total, completed=start)

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *exception):
        self._bar.stop()

    def update(self, step: int, *, loss: float, tokens_per_second: float, utilization: float):
        """Show the numbers of the finished `step`; `utilization` is a share of the peak, 0 to 1."""
        text = (
            f"step {step:,}/{self._total:,}  loss {loss:.4f}  {tokens_per_second:,.0f} tokens/s  "
            f"{self._time_left(step)} left  {utilization:.1%} {self._label}"
        )
        self._bar.update(self._task, completed=step, description=text)
        due = step % self._every == 0 or step in (self._start + 1, self._total)
        if due and not self._console.is_terminal:
            self.print(text)

    def print(self, line: str):
        """Print a line above the bar."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _time_left(self, step: int) -> str:
        """Hours, minutes and seconds, from the steps after the first, which compiles."""
        now = time.monotonic()
        self._first = self._first or (step, now)
        first, then = self._first
        if step == first:
            return "-:--:--"
        seconds = (now - then) / (step - first) * (self._total - step)
        return str(datetime.timedelta(seconds=round(seconds)))


def device_peak(device: jax.Device, dtype: DTypeLike) -> tuple[float, str]:
    """FLOP/s that products of `dtype` can reach on `device`, and what to call a share of it.

    From the data sheet where it is known, else measured; CPU devices share their host's cores.
    """
    if device.device_kind in BF16_FLOPS and jnp.dtype(dtype) == jnp.bfloat16:
        return BF16_FLOPS[device.device_kind], "MFU"
    sharers = jax.local_device_count() if device.platform == "cpu" else 1
    return matmul_peak(dtype) / sharers, "of measured matmul peak"


def matmul_peak(dtype: DTypeLike, seconds: float = 0.5) -> float:
    """Measured FLOP/s of a large square product on one device; on CPU it uses all cores.

    The product grows until one takes an eighth of `seconds`; the fastest of several counts.
    """
    product = jax.jit(lambda x: jnp.einsum("DE,EF->DF", x, x))
    size, best = 256, 0.0
    while best < seconds / 8 and size < 16_384:
        size *= 2
        x = jnp.full((size, size), 1 / size, dtype)
        product(x).block_until_ready()  # compiles
        best = _duration(product, x)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, _duration(product, x))
    return 2 * size**3 / best


def _duration(fn, x: jax.Array) -> float:
    start = time.perf_counter()
    fn(x).block_until_ready()
    return time.perf_counter() - start
