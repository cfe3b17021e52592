"""Starts the processes of a run on this machine, and starts them again when they crash.

Exit codes of a run: 0 at its end; 2 where the same command would fail again (a bad config, a run
that diverged); 130 and 143 when Ctrl-C or SIGTERM ended it and it has saved; anything else is a
crash. Every start goes on from the newest checkpoint.
"""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from pathlib import Path
from typing import NamedTuple

from dsv3_jax.training.health import Events

FINAL = (0, 2, 130, 143)  # exit codes after which a start would change nothing
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between a crash and the next start
MOST_CRASHES = 5  # in a row without a new checkpoint


class End(NamedTuple):
    """How a start of all processes ended."""

    code: int
    reason: str


def run(command: list[str], n_processes: int, supervise: bool, workdir: Path) -> int:
    """Run `command` in so many processes to its end; returns the exit code.

    Args:
        command: a line that trains, for one process; those of several get --join besides.
        supervise: start again after crashes, at first at once, then with longer and longer waits.
    """
    processes = Processes(command, n_processes, workdir if supervise else None)
    crashes, wait = 0, FIRST_WAIT
    while True:
        saved = _newest(workdir)
        end = processes.run()
        if not supervise or end.code in FINAL or processes.stopped:
            return end.code
        if _newest(workdir) > saved:
            crashes, wait = 0, FIRST_WAIT
        crashes += 1
        events = Events(workdir)
        if crashes == MOST_CRASHES:
            _say(f"giving up after {crashes} crashes without a new checkpoint: {end.reason}")
            events.add("gave up", text=end.reason)
            return end.code
        _say(f"crashed: {end.reason}; starting again in {wait:g} seconds ({crashes} in a row)")
        events.add("crashed", text=end.reason)
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)


class Processes:
    """The processes of a run, which live and die together."""

    def __init__(self, command: list[str], n: int, workdir: Path | None):
        """With a `workdir`, later starts find there what the first one compiled."""
        self._command, self._n, self.stopped = command, n, False
        self._environment = dict(os.environ)
        if workdir is not None:
            self._environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir / "programs"))
        self._children: list[subprocess.Popen] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._pass_on)

    def run(self) -> End:
        """Start all, and wait until all have ended; when one crashes the others are killed."""
        port = _free_port()
        joins = [[f"--join=127.0.0.1:{port},{i},{self._n}"] for i in range(self._n)]
        self._children = [
            subprocess.Popen(
                [*self._command, *(join if self._n > 1 else [])],
                env=self._environment,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C comes here alone, and is passed on once
            )
            for join in joins
        ]
        tails = [_Tail(child) for child in self._children]
        while all(child.poll() in (None, 0) for child in self._children):
            if all(child.poll() == 0 for child in self._children):
                return End(0, "done")
            time.sleep(0.05)
        codes = [child.poll() for child in self._children]
        number = next(i for i, code in enumerate(codes) if code not in (None, 0))
        if codes[number] not in FINAL:
            for child in self._children:
                child.kill()  # they would wait for the one that is gone
        for child in self._children:
            child.wait()
        code = codes[number]
        how = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        of = f"process {number} ended with {how}" if self._n > 1 else f"it ended with {how}"
        return End(code if code > 0 else 128 - code, f"{of}: {tails[number].last()}")

    def _pass_on(self, number, frame):
        self.stopped = True
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number if self._n == 1 else signal.SIGTERM)


class _Tail:
    """Passes on what a process writes to stderr, and keeps the last lines."""

    def __init__(self, child: subprocess.Popen):
        self._child, self._lines = child, deque(maxlen=20)
        self._thread = threading.Thread(target=self._copy, daemon=True)
        self._thread.start()

    def _copy(self):
        for line in self._child.stderr:
            sys.stderr.buffer.write(line)
            sys.stderr.flush()
            self._lines.append(line.decode(errors="replace").strip())

    def last(self) -> str:
        """The last line with something in it."""
        self._thread.join(timeout=5.0)
        return next((line for line in reversed(self._lines) if line), "no message")


def _newest(workdir: Path) -> int:
    """Step of the newest checkpoint, by the names alone; -1 if there is none."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=-1)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _say(text: str):
    print(f"supervisor: {text}", file=sys.stderr, flush=True)
