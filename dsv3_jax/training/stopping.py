"""Signals that end a run: it finishes the step under way, saves, and exits."""

import signal

import jax
from jax.experimental import multihost_utils


class StopSignal:
    """A context in which Ctrl-C and SIGTERM ask the run to stop; a second one ends it at once.

    With several processes JAX's own service takes SIGTERM for all of them, and every process learns
    of it at the same step.
    """

    def __init__(self):
        self.number: int | None = None  # of the signal, once there was one
        self._handlers = {}

    def __enter__(self) -> "StopSignal":
        if jax.process_count() == 1:
            for number in (signal.SIGINT, signal.SIGTERM):
                self._handlers[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def received(self, step: int) -> bool:
        """Return whether the run stops before its next step; all processes agree."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.number = signal.SIGTERM
        return self.number is not None

    def _handle(self, number: int, frame):
        self.number = number
        signal.signal(number, self._handlers[number])
