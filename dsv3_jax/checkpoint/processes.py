"""One decision for all processes: what one of them finds, the others are told.

Every process of the run must make these calls, in the same order.
"""

from collections.abc import Callable

import jax
import numpy as np
from jax.experimental import multihost_utils

LONGEST = 1000  # bytes of a text that is told to others


def shared(text: str | None) -> str | None:
    """The text of the first process that has one, on all of them; None if none has."""
    if jax.process_count() == 1:
        return text
    row = np.zeros(LONGEST, np.uint8)
    ours = np.frombuffer((text or "").encode()[:LONGEST], np.uint8)
    row[: ours.size] = ours
    rows = multihost_utils.process_allgather(row)
    texts = (bytes(row).rstrip(b"\0").decode(errors="replace") for row in rows)
    return next(filter(None, texts), None)


def on_the_first(act: Callable[[], str | None]) -> str | None:
    """What `act` returns on process 0, told to all; if it fails there, all raise its OSError."""
    answer, failure = None, None
    if jax.process_index() == 0:
        try:
            answer = act()
        except OSError as error:
            failure = error
    if text := shared(failure and f"{type(failure).__name__}: {failure}"):
        raise OSError(text) from failure
    return shared(answer)
