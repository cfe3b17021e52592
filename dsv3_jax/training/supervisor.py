"""The processes of a run on this machine: how they start, and start again after a crash.

Exit codes of a run: 0 at its end; 2 where the same command would fail again (a bad config, a run
that diverged); 130 and 143 when Ctrl-C or SIGTERM ended it and it has saved; anything else is a
crash. Every start resumes from the newest checkpoint. Nothing here imports JAX, whose import would
be paid for twice.
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

from dsv3_jax.training.records import EventLog

FINAL = (0, 2, 130, 143)  # exit codes after which another start would change nothing
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0  # seconds between a crash and the next start
MAX_CRASHES = 5  # in a row without a new checkpoint


def use_huge_pages():
    """Restart this process with huge pages in malloc, unless the environment says otherwise.

    XLA:CPU allocates its temporaries anew each step, and page faults of small pages took a fifth of
    a step's CPU time. The C library reads the setting only when a process starts, so call this
    before heavy imports.
    """
    if sys.platform == "linux" and "GLIBC_TUNABLES" not in os.environ:
        os.environ["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
        os.execv(sys.executable, sys.orig_argv)


class ExitStatus(NamedTuple):
    """The exit code of a start of all processes, and its reason in words."""

    code: int
    reason: str


def supervise(command: list[str], n_processes: int, restart: bool, workdir: Path) -> int:
    """Run `command` in `n_processes` processes to its end; return the exit code.

    Args:
        command: a command that trains in one process; each of several gets --join besides.
        restart: start again after crashes, with waits that double while no checkpoint is added.
        workdir: of the run; its checkpoints tell whether a start got anywhere.
    """
    processes = Processes(command, n_processes, workdir if restart else None)
    crashes, wait = 0, FIRST_WAIT
    while True:
        saved = _newest_checkpoint(workdir)
        status = processes.run()
        if not restart or status.code in FINAL or processes.stopped:
            return status.code
        if _newest_checkpoint(workdir) > saved:
            crashes, wait = 0, FIRST_WAIT
        crashes += 1
        events = EventLog(workdir)
        if crashes == MAX_CRASHES:
            _say(f"giving up after {crashes} crashes without a new checkpoint: {status.reason}")
            events.add("gave up", text=status.reason)
            return status.code
        _say(f"crashed: {status.reason}; starting again in {wait:g} seconds ({crashes} in a row)")
        events.add("crashed", text=status.reason)
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)


class Processes:
    """The processes of a run; when one crashes, the others are killed."""

    def __init__(self, command: list[str], n: int, workdir: Path | None):
        """Prepare `n` processes that cache compiled programs in the `workdir`, if there is one."""
        self._command, self._n, self.stopped = command, n, False
        self._environment = dict(os.environ)
        if workdir is not None:
            self._environment.setdefault("JAX_COMPILATION_CACHE_DIR", str(workdir / "programs"))
        self._children: list[subprocess.Popen] = []
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._forward_signal)

    def run(self) -> ExitStatus:
        """Start all processes, and wait until all have ended."""
        port = _free_port()
        joins = [[f"--join=127.0.0.1:{port},{i},{self._n}"] for i in range(self._n)]
        self._children = [
            subprocess.Popen(
                [*self._command, *(join if self._n > 1 else [])],
                env=self._environment,
                stderr=subprocess.PIPE,
                start_new_session=True,  # else Ctrl-C would reach the child twice
            )
            for join in joins
        ]
        tails = [_StderrTail(child) for child in self._children]
        while all(child.poll() in (None, 0) for child in self._children):
            if all(child.poll() == 0 for child in self._children):
                return ExitStatus(0, "done")
            time.sleep(0.05)
        codes = [child.poll() for child in self._children]
        number = next(i for i, code in enumerate(codes) if code not in (None, 0))
        if codes[number] not in FINAL:
            for child in self._children:
                child.kill()  # they would wait for the one that is gone
        for child in self._children:
            child.wait()
        code = codes[number]
        cause = f"exit code {code}" if code > 0 else signal.Signals(-code).name
        name = f"process {number}" if self._n > 1 else "it"
        return ExitStatus(
            code if code > 0 else 128 - code, f"{name} ended with {cause}: {tails[number].last()}"
        )

    def _forward_signal(self, number, frame):
        self.stopped = True
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number if self._n == 1 else signal.SIGTERM)


class _StderrTail:
    """Copies a process's stderr to this one's, and keeps the last lines."""

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
        """Return the last line that is not empty."""
        self._thread.join(timeout=5.0)
        return next((line for line in reversed(self._lines) if line), "no message")


def _newest_checkpoint(workdir: Path) -> int:
    """Return the step of the newest checkpoint by the folder names; -1 if there is none."""
    names = [path.name for path in (workdir / "checkpoints").glob("*")]
    return max((int(name) for name in names if name.isdigit()), default=-1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _say(text: str):
    print(f"supervisor: {text}", file=sys.stderr, flush=True)
