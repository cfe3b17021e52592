"""Errors that are for the user: their text, nearest names, and commands that end with them."""

import contextlib
import difflib
import sys
from collections.abc import Iterable, Iterator

USER_ERRORS = (ValueError, KeyError, NotImplementedError, OSError, ModuleNotFoundError)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return "did you mean 'x'?" with the known name nearest to `name`, or all of them."""
    known = sorted(known)
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f"did you mean {matches[0]!r}?" if matches else f"known: {', '.join(known)}"


def error_text(error: Exception) -> str:
    """Return the message of an error; `str` would put that of a KeyError in quotes."""
    return str(error.args[0] if isinstance(error, KeyError) else error)


@contextlib.contextmanager
def errors_as_messages() -> Iterator[None]:
    """End the program with exit code 1 and one line, without a traceback, on `USER_ERRORS`."""
    try:
        yield
    except USER_ERRORS as error:
        sys.exit(f"error: {error_text(error)}")
