"""The reports of a run: metrics and events on disk, progress and text on a console."""

import json
import math
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import rich.console
import tensorboardX
from jax.typing import DTypeLike

from dsv3_jax.flops import training_flops_per_token
from dsv3_jax.hardware import BF16_FLOPS
from dsv3_jax.numerics.policy import Policy
from dsv3_jax.progress import TrainingProgress
from dsv3_jax.training.records import EventLog, read_rows, write_atomically
from dsv3_jax.training.setup import Setup


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
        rows = read_rows(self._path) if self._path.exists() else []
        write_atomically(self._path, "".join(_line(row) for row in rows if row["step"] <= step))
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


def _line(row: dict) -> str:
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in row.items()
    }
    return json.dumps(finite, allow_nan=False) + "\n"


class Reporter:
    """The console, events, metrics and progress of one process; process 0 alone prints.

    `folder` holds the reports: the workdir for process 0, a folder of its own for each other one.
    """

    def __init__(self, workdir: Path):
        process = jax.process_index()
        self.folder = workdir / "processes" / str(process) if process else workdir
        self.console = rich.console.Console(quiet=process > 0, highlight=False, soft_wrap=True)
        self._events = EventLog(self.folder)

    def note(self, event: str, text: str, step: int):
        """Print a line, and write it to events.jsonl."""
        self._events.add(event, text=text, step=step)
        self.console.print(text, markup=False)

    def start_steps(self, setup: Setup, first: int):
        """Open the metrics and the progress bar after step `first`; measure the devices' peak."""
        config = setup.config
        compute = Policy.of(config.precision).compute
        peak, label = device_peak(jax.local_devices()[0], compute)
        self._peak_flops = peak * setup.mesh.size
        self._flops_per_token = training_flops_per_token(config.model, config.train.seq_len)
        self.metrics = MetricsLog(self.folder, first)
        self.progress = TrainingProgress(config.train.steps, first, label, self.console)

    def report_step(self, row: dict[str, int | float], n_tokens: int, seconds: float):
        """Log the metrics of a step that trained on `n_tokens` tokens, and show its progress."""
        speed = n_tokens / seconds
        self.metrics.log(row | {"tokens_per_second": speed})
        self.progress.update(
            row["step"],
            loss=row["loss"],
            tokens_per_second=speed,
            utilization=speed * self._flops_per_token / self._peak_flops,
        )


def device_peak(device: jax.Device, dtype: DTypeLike) -> tuple[float, str]:
    """Return the matmul FLOP/s of `dtype` on `device`, and the name of a fraction of it.

    From the data sheet where it is known, else measured; CPU devices share their host's cores.
    """
    if device.device_kind in BF16_FLOPS and jnp.dtype(dtype) == jnp.bfloat16:
        return BF16_FLOPS[device.device_kind], "MFU"
    n_sharing = jax.local_device_count() if device.platform == "cpu" else 1
    return matmul_peak(dtype) / n_sharing, "of measured matmul peak"


def matmul_peak(dtype: DTypeLike, seconds: float = 0.5) -> float:
    """Return the measured FLOP/s of a large square matmul on one device; a CPU uses all cores.

    The size grows until one matmul takes an eighth of `seconds`; the fastest of several counts.
    """
    matmul = jax.jit(lambda x: jnp.einsum("DE,EF->DF", x, x))
    size, best = 256, 0.0
    while best < seconds / 8 and size < 16_384:
        size *= 2
        x = jnp.full((size, size), 1 / size, dtype)
        matmul(x).block_until_ready()  # compiles
        best = _duration(matmul, x)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        best = min(best, _duration(matmul, x))
    return 2 * size**3 / best


def _duration(fn, x: jax.Array) -> float:
    start = time.perf_counter()
    fn(x).block_until_ready()
    return time.perf_counter() - start
