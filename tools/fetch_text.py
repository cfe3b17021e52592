"""Text and word lists from Debian's archive, for runs that need more than the instant corpus.

    python -m tools.fetch_text debian-docs    documentation and a dictionary, 97M characters
    python -m tools.fetch_text wordnet        WordNet's database files

Packages are downloaded by apt-get and unpacked into one folder, completely or not at all; nothing
is installed. Their content stays under its own licences (named as it is written) and on this
machine.
"""

import argparse
import fnmatch
import gzip
import json
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from dsv3_jax.config import DataConfig
from dsv3_jax.data.cache import build_once, is_intact
from dsv3_jax.errors import errors_as_messages
from dsv3_jax.progress import spinner

PROGRAMS = ("apt-get", "apt-cache", "dpkg-deb")
UPDATE = "apt-get update (as root) brings apt's lists up to date"


class Package(NamedTuple):
    """The part of a Debian package that is taken."""

    name: str  # in Debian 12 (bookworm)
    members: str  # wildcard of its files; those that end in .gz or .dz are decompressed
    licence: str
    family: str = "$^"  # pattern of the name in other releases, with the version in parentheses
    entry: bytes | None = None  # pattern between the documents of a file; None: it is one document


SOURCES = {
    "debian-docs": (
        Package("linux-doc-6.1", "*.rst.gz", "GPL-2", family=r"linux-doc-([\d.]+)"),
        Package("python3.11-doc", "*/_sources/*.rst.txt", "PSF", family=r"python(3\.\d+)-doc"),
        Package("perl-doc", "*.pod", "GPL-1+ or Artistic"),
        Package("git-doc", "*.txt", "GPL-2"),
        Package("anarchism", "*.md.gz", "GPL-2"),
        # The line of a headword has its syllables in \...\
        Package("dict-gcide", "*/gcide.dict.dz", "GPL-2+", entry=rb"\n\n(?=[^\s\[].*\\)"),
    ),
    "wordnet": (Package("wordnet-base", "*/share/wordnet/*", "WordNet 3.0"),),
}


def fetch(source: str, folder: Path):
    """Fill `folder` with `source`: a .jsonl for each package of text, or WordNet's own files.

    Raises:
        FileNotFoundError: this system has no apt or dpkg.
        ValueError: `folder` holds something else, or apt does not know a package.
        OSError: a download or an archive is broken.
    """
    if is_intact(folder):
        print(f"{folder} is there already, whole")
        return
    if folder.exists():
        raise ValueError(
            f"{folder} exists, but its files are not those that this command writes; remove it, or "
            "name another folder with --out"
        )
    if lacking := [program for program in PROGRAMS if shutil.which(program) is None]:
        raise FileNotFoundError(
            f"no {', '.join(lacking)} here: {source} comes from Debian packages, which a Debian or "
            f"Ubuntu system (or container) fetches; copy the folder {folder} from one, or give "
            "other text with --set data.source=FOLDER"
        )

    def build(fresh: Path):
        write = _write_files if source == "wordnet" else _write_documents
        for package in SOURCES[source]:
            name = name_in_release(package)
            with (
                spinner(f"downloading and unpacking {name}"),
                tempfile.TemporaryDirectory(dir=fresh.parent) as scratch,
                _download(name, Path(scratch)).open("rb") as archive,
            ):
                summary = write(package, name, archive, fresh)
            if not summary:
                raise ValueError(
                    f"the package {name} of {_release()} has no files {package.members}, as it has "
                    "in Debian 12; fetch there and copy the folder"
                )
            print(f"{name} ({package.licence}): {summary}")

    build_once(folder, build)
    print(f"{folder} is ready; what is in it stays under the licences in parentheses")


def name_in_release(package: Package) -> str:
    """Return the package's name in this release: its own, or the newest of its family."""
    known = set(_run("apt-cache", "pkgnames").split())
    if package.name in known:
        return package.name
    matches = [match for name in known if (match := re.fullmatch(package.family, name))]
    if not matches:
        raise ValueError(f"apt knows no package {package.name} on {_release()}; {UPDATE}")
    newest = max(matches, key=lambda match: [int(n) for n in re.findall(r"\d+", match[1])])[0]
    print(f"{_release()} has no {package.name}; taking {newest}, the newest of its kind")
    return newest


def read_members(file: IO[bytes], wildcard: str) -> Iterator[tuple[str, bytes]]:
    """Yield name and decompressed content of the regular files of a tar archive that match."""
    with tarfile.open(fileobj=file) as archive:
        for member in archive:
            # Links are left out: two names of one text would make it count twice.
            if member.isreg() and fnmatch.fnmatchcase(member.name, wildcard):
                content = archive.extractfile(member).read()
                if member.name.endswith((".gz", ".dz")):
                    content = gzip.decompress(content)
                yield member.name.removeprefix("./"), content


def _write_documents(package: Package, name: str, file: IO[bytes], folder: Path) -> str:
    """Write `name`.jsonl, {"name", "text"} a line; return a summary, empty without documents."""
    n_documents, n_bytes, n_binary = 0, 0, 0
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as lines:
        for member, content in read_members(file, package.members):
            parts = re.split(package.entry, content) if package.entry else [content]
            for number, part in enumerate(parts):
                try:
                    text = part.decode()
                except UnicodeDecodeError:
                    n_binary += 1
                    continue
                document = {"name": f"{member}:{number}" if package.entry else member, "text": text}
                lines.write(json.dumps(document, ensure_ascii=False) + "\n")
                n_documents, n_bytes = n_documents + 1, n_bytes + len(part)
    left_out = f"; left out {n_binary} that are not UTF-8" if n_binary else ""
    return f"{n_documents:,} documents, {n_bytes / 1e6:.1f} MB{left_out}" if n_documents else ""


def _write_files(package: Package, name: str, file: IO[bytes], folder: Path) -> str:
    """Write the files as they are, without their folders; return a summary, empty without files."""
    sizes = [
        (folder / Path(member).name).write_bytes(content)
        for member, content in read_members(file, package.members)
    ]
    return f"{len(sizes)} files, {sum(sizes) / 1e6:.1f} MB" if sizes else ""


def _download(name: str, scratch: Path) -> Path:
    """Return the tar archive of the files of a package."""
    _run("apt-get", "download", name, folder=scratch)
    (package,) = scratch.glob("*.deb")
    archive = scratch / "files.tar"
    with archive.open("wb") as output:
        _run("dpkg-deb", "--fsys-tarfile", package.name, folder=scratch, output=output)
    return archive


def _run(*command: str, folder: Path | None = None, output: IO[bytes] | None = None) -> str:
    """Run a command and return what it prints; an OSError gives its last line if it fails."""
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=output or subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no message"]
        errors = [line for line in lines if line.startswith(("E:", "dpkg-deb: error"))]
        hint = f" ({UPDATE})" if command[0] == "apt-get" else ""
        raise OSError(f"{' '.join(command)} failed: {(errors or lines)[-1]}{hint}")
    return "" if output else done.stdout.decode()


def _release() -> str:
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', Path("/etc/os-release").read_text(), re.M)
    return found[1] if found else "this release"


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tools.fetch_text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", choices=SOURCES)
    default = Path(DataConfig().cache_dir).parent / "data"
    parser.add_argument("--out", type=Path, help=f"folder to write (default: {default}/SOURCE)")
    arguments = parser.parse_args()
    folder = arguments.out or default / arguments.source
    with errors_as_messages():
        fetch(arguments.source, folder)
    if arguments.source == "debian-docs":
        print(
            f"train on it with: python train.py --workdir=runs/{arguments.source} "
            f"--set data.source={folder} --set model.vocab_size=4096"
        )


if __name__ == "__main__":
    main()
