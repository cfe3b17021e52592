"""Named documents from a source: CPython's own text, a file, a folder, a glob or JSON lines."""

import dataclasses
import glob
import importlib
import itertools
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path

from dsv3_jax.errors import did_you_mean

# Folders of the standard library with tests, other people's packages or code-page tables.
NOT_INSTANT = {"test", "tests", "idle_test", "encodings", "site-packages", "dist-packages"}
TOPICS = "pydoc_data/topics.py"
MAX_EXAMPLES = 3


@dataclasses.dataclass
class Skipped:
    """The number of things of one kind that gave no text, and the first few of them."""

    kind: str
    count: int = 0
    examples: list[str] = dataclasses.field(default_factory=list)

    def add(self, example: str):
        self.count += 1
        if self.count <= MAX_EXAMPLES:
            self.examples.append(example)

    def __str__(self) -> str:
        more = ", ..." if self.count > MAX_EXAMPLES else ""
        return f"{self.count} {self.kind} ({', '.join(self.examples)}{more})"


def read_documents(source: str, text_field: str, bad_lines: str) -> Iterator[tuple[str, str]]:
    """Yield every (name, text) of `source`, in the order of the names.

    "instant" is the language reference in `pydoc_data.topics`, a document per topic, with the
    standard library's sources: about 10 MB under the PSF licence, already on the machine. A
    `.jsonl` file has a document per line. Every other file is a document. Skipped are files that
    are not UTF-8 or have NUL bytes, documents of white space and, if `bad_lines` is "skip", lines
    that are no document; a line that says what was skipped is printed. Hidden files and symbolic
    links are ignored.

    Raises:
        FileNotFoundError: `source` does not exist; the message gives the nearest name.
        ValueError: no text at all or, if `bad_lines` is "refuse", a line that is no document.
    """
    binary = Skipped("files that are not UTF-8 text")
    empty = Skipped("empty documents")
    broken = Skipped("bad lines")
    n_documents = 0
    for name, path in source_files(source):
        if source == "instant" and name == TOPICS:
            documents = _read_topics(name)
        elif path.suffix == ".jsonl":
            documents = _read_lines(name, path, text_field, broken if bad_lines == "skip" else None)
        else:
            documents = _read_file(name, path, binary)
        for document_name, text in documents:
            if text.strip():
                n_documents += 1
                yield document_name, text
            else:
                empty.add(document_name)
    skipped = "; ".join(str(kind) for kind in (binary, empty, broken) if kind.count)
    if not n_documents:
        raise ValueError(
            f"data.source={source!r} holds no text; left out: {skipped or 'nothing'}; "
            "name a text file, or a folder or glob of them (hidden files and links do not count)"
        )
    if skipped:
        print(f"data.source={source!r}: left out {skipped}")


def source_identity(source: str) -> list[tuple[str, int, int] | str]:
    """Return what changes when the text may have: each file's name, bytes and mtime in ns.

    Times are compared, never ordered, so a clock that jumps costs no more than tokenizing again.
    A change that keeps both a file's size and its time goes unnoticed.
    """
    stats = ((name, path.stat()) for name, path in source_files(source))
    return [sys.version if source == "instant" else "files"] + [
        (name, stat.st_size, stat.st_mtime_ns) for name, stat in stats
    ]


def source_files(source: str) -> list[tuple[str, Path]]:
    """Return the files of `source`, sorted, each with its name relative to the source's folder."""
    path = Path(source).resolve()
    if source == "instant":
        root = Path(sysconfig.get_path("stdlib")).resolve()
        found = (file for file in _walk(root, NOT_INSTANT) if _is_instant(file))
    elif path.is_file():
        return [(path.name, path)]
    elif path.is_dir():
        root, found = path, _walk(path, set())
    elif glob.has_magic(source) and (root := _folder_of_glob(path)).is_dir():
        found = root.glob(str(path.relative_to(root)))
    else:
        raise not_found_error(f"data.source={source!r}", path, ["instant"])
    regular = (file for file in found if file.resolve() == file and file.is_file())
    named = ((file.relative_to(root).as_posix(), file) for file in regular)
    return sorted(pair for pair in named if "/." not in f"/{pair[0]}")


def not_found_error(setting: str, path: Path, known: Iterable[str]) -> FileNotFoundError:
    """Return the error for a `setting` whose `path` does not exist, with the nearest name."""
    while not path.parent.is_dir():
        path = path.parent
    siblings = {child.name for child in path.parent.iterdir() if child.name[0] != "."}
    return FileNotFoundError(
        f"{setting} does not exist: no {path.name!r} in {path.parent}; "
        f"{did_you_mean(path.name, siblings.union(known))}"
    )


def _walk(root: Path, excluded: set[str]) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in excluded and name[0] != "."]
        yield from (Path(folder, name) for name in names)


def _folder_of_glob(pattern: Path) -> Path:
    """Return all of the pattern before its first wildcard."""
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), pattern.parts))


def _is_instant(file: Path) -> bool:
    built_here = file.name.startswith("_sysconfigdata") or file.parent.name.startswith("config-")
    return file.suffix == ".py" and not built_here


def _read_topics(name: str) -> Iterator[tuple[str, str]]:
    topics = importlib.import_module("pydoc_data.topics").topics
    return ((f"{name}:{topic}", topics[topic]) for topic in sorted(topics))


def _read_file(name: str, path: Path, binary: Skipped) -> Iterator[tuple[str, str]]:
    """Yield the file as one document, unless it is binary."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        text = "\0"
    if "\0" in text:  # zeros are valid UTF-8, but no text has them
        binary.add(name)
    else:
        yield name, text


def _read_lines(
    name: str, path: Path, text_field: str, broken: Skipped | None
) -> Iterator[tuple[str, str]]:
    """Yield a document per line; bad lines are added to `broken`, or an error if that is None."""
    with path.open("rb") as file:  # as bytes, so that only a line feed ends a line
        for number, line in enumerate(file, 1):
            try:
                content = line.decode("utf-8-sig").strip()
                text = _text_of_json(content, text_field) if content else None
            except ValueError as error:
                if broken is None:
                    raise ValueError(
                        f"{path}, line {number}: {error}; mend the line, or leave such lines out "
                        "with --set data.bad_lines=skip"
                    ) from error
                broken.add(f"{name}, line {number}: {error}")
                continue
            if text is not None:
                yield f"{name}:{number}", text


def _text_of_json(line: str, text_field: str) -> str:
    """Return the text in a JSON object, or raise a ValueError that says why there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"broken JSON ({error}); a line must be one object") from error
    if not isinstance(record, dict):
        raise ValueError(f"a {type(record).__name__}, but a line must be a JSON object")
    if text_field not in record:
        raise ValueError(
            f"no field data.text_field={text_field!r} among {', '.join(record)}; "
            f"{did_you_mean(text_field, record)}"
        )
    text = record[text_field]
    if not isinstance(text, str):
        kind = type(text).__name__
        raise ValueError(f"field {text_field!r} is a {kind}, but must be a string")
    text.encode()  # JSON may escape half a surrogate pair, which is no character: a ValueError
    return text
