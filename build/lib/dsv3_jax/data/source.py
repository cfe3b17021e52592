"""Named documents from a source: CPython's own text, a file, a folder, a glob or JSON lines."""

import glob
import importlib
import itertools
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from dsv3_jax.overrides import nearest

# Folders of the standard library that are tests, other people's packages or code-page tables.
NOT_INSTANT = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
TOPICS = "pydoc_data/topics.py"


def documents(source: str, text_field: str) -> Iterator[tuple[str, str]]:
    """Every (name, text) of `source`, in the order of the names.

    "instant" is the language reference in `pydoc_data.topics`, a document a topic, with the
    standard library's sources: about 10 MB under the PSF licence, already on the machine. A
    `.jsonl` file gives a document a line. Other files are a document each; those that are not
    UTF-8 are skipped, and their number is printed. Hidden files and symbolic links are left out.

    Raises:
        FileNotFoundError: `source` does not exist; the message gives the nearest name.
        ValueError: no text at all, or a broken line of JSON.
    """
    found, skipped = 0, 0
    for name, path in files(source):
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            skipped += 1
            continue
        for document in _parse(name, path, text, text_field, topics=source == "instant"):
            found += 1
            yield document
    if skipped:
        print(f"data.source={source!r}: skipped {skipped} files that are not UTF-8 text")
    if not found:
        raise ValueError(
            f"data.source={source!r} holds no text ({skipped} files that are not UTF-8); "
            "name a text file, or a folder or glob of them (hidden files and links do not count)"
        )


def identity(source: str) -> list[tuple[str, int, int] | str]:
    """What changes when the text of `source` may have: each file's name, bytes and mtime in ns."""
    stats = ((name, path.stat()) for name, path in files(source))
    return [sys.version if source == "instant" else "files"] + [
        (name, stat.st_size, stat.st_mtime_ns) for name, stat in stats
    ]


def files(source: str) -> list[tuple[str, Path]]:
    """The files of `source`, sorted, each with its name relative to the source's folder."""
    path = Path(source).resolve()
    if source == "instant":
        root = Path(sysconfig.get_path("stdlib")).resolve()
        found = (file for file in _walk(root, NOT_INSTANT) if _is_instant(file))
    elif path.is_file():
        return [(path.name, path)]
    elif path.is_dir():
        root, found = path, _walk(path, set())
    elif glob.has_magic(source) and (root := _fixed_part(path)).is_dir():
        found = root.glob(str(path.relative_to(root)))
    else:
        raise missing(f"data.source={source!r}", path, ["instant"])
    kept = (file for file in found if file.resolve() == file and file.is_file())
    named = ((file.relative_to(root).as_posix(), file) for file in kept)
    return sorted(pair for pair in named if "/." not in f"/{pair[0]}")


def missing(setting: str, path: Path, known: Iterable[str]) -> FileNotFoundError:
    """The error for a `setting` whose `path` does not exist: what stands where it breaks off."""
    while not path.parent.is_dir():
        path = path.parent
    siblings = {child.name for child in path.parent.iterdir() if child.name[0] != "."}
    return FileNotFoundError(
        f"{setting} does not exist: no {path.name!r} in {path.parent}; "
        f"{nearest(path.name, siblings.union(known))}"
    )


def _walk(root: Path, left_out: set[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out and name[0] != "."]
        yield from (Path(folder, name) for name in names)


def _fixed_part(pattern: Path) -> Path:
    """The folder that a glob starts from: all before its first wildcard."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def _is_instant(file: Path) -> bool:
    built_here = file.name.startswith("_sysconfigdata") or file.parent.name.startswith("config-")
    return file.suffix == ".py" and not built_here


def _parse(
    name: str, path: Path, text: str, text_field: str, *, topics: bool
) -> Iterator[tuple[str, str]]:
    """The documents in one file's text; empty ones are left out."""
    if topics and name == TOPICS:
        entries = importlib.import_module("pydoc_data.topics").topics
        pairs = ((f"{name}:{topic}", entries[topic]) for topic in sorted(entries))
    elif path.suffix == ".jsonl":
        # Not splitlines(): JSON strings may hold U+2028 as it is.
        lines = enumerate(text.split("\n"), 1)
        pairs = (
            (f"{name}:{number}", _json_text(f"{path}, line {number}", line, text_field))
            for number, line in lines
            if line.strip()
        )
    else:
        pairs = iter([(name, text)])
    return (pair for pair in pairs if pair[1].strip())


def _json_text(place: str, line: str, text_field: str) -> str:
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{place}: broken JSON ({error}); write one object a line") from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: a {type(record).__name__}, but a line must be a JSON object")
    if text_field not in record:
        raise ValueError(
            f"{place}: no field data.text_field={text_field!r} among {', '.join(record)}; "
            f"{nearest(text_field, record)}"
        )
    if not isinstance(record[text_field], str):
        kind = type(record[text_field]).__name__
        raise ValueError(f"{place}: field {text_field!r} is a {kind}, but must be a string")
    return record[text_field]
