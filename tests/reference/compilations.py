"""What XLA compiles while a piece of code runs."""

import contextlib

import jax


@contextlib.contextmanager
def compilations():
    """A list with one entry for each program that XLA compiles in the block."""
    seen = []

    def listen(event, duration, **_):
        if event == "/jax/core/compile/backend_compile_duration":
            seen.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield seen
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
