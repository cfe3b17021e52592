"""Small text files of a run: rows of JSON, events, and text that is replaced atomically."""

import json
import os
import time
from pathlib import Path


def read_rows(path: str | Path) -> list[dict]:
    """Return the rows of a .jsonl file, without a last line that a killed run left unfinished.

    Raises:
        ValueError: a line before the last is no JSON.
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


class EventLog:
    """Appends to `events.jsonl` what happens besides training; a roll-back removes nothing."""

    def __init__(self, folder: Path):
        folder.mkdir(parents=True, exist_ok=True)
        self._path = folder / "events.jsonl"

    def add(self, event: str, **facts):
        """Write one row; it is in the file when this returns."""
        with self._path.open("a") as file:
            file.write(json.dumps({"event": event, "time": time.time(), **facts}) + "\n")
