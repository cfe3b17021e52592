"""One decision for all processes: what one process finds is broadcast to the others.

Every process of the run must make these calls, in the same order.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

MAX_TEXT_BYTES = 1000  # of a text that is broadcast


def broadcast_first(text: str | None) -> str | None:
    """Return the text of the first process that has one, on all processes; None if none has."""
    if jax.process_count() == 1:
        return text
    row = np.zeros(MAX_TEXT_BYTES, np.uint8)
    ours = np.frombuffer((text or "").encode()[:MAX_TEXT_BYTES], np.uint8)
    row[: ours.size] = ours
    rows = multihost_utils.process_allgather(row)
    texts = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows)
    return next(filter(None, texts), None)


def on_process_zero(fn: Callable[[], str | None]) -> str | None:
    """Run `fn` on process 0 and return its result on all processes.

    Raises:
        OSError: `fn` failed with one; raised on all processes.
    """
    result, failure = None, None
    if jax.process_index() == 0:
        try:
            result = fn()
        except OSError as error:
            failure = error
    if text := broadcast_first(failure and f"{type(failure).__name__}: {failure}"):
        raise OSError(text) from failure
    return broadcast_first(result)
