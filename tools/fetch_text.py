"""Text and word lists from Debian's archive, for runs that need more than the instant corpus.

    python -m tools.fetch_text debian-docs    documentation and a dictionary, 97M characters
    python -m tools.fetch_text wordnet        WordNet's database files

Packages are downloaded by apt-get and unpacked into one folder, whole or not at all; nothing is
installed. What they hold stays under its own licences (named as it is written) and on this
machine.
"""

import argparse
import dataclasses
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
from typing import IO

from rich.console import Console

from dsv3_jax.config import DataConfig
from dsv3_jax.data.cache import build_once, is_intact
from dsv3_jax.errors import errors_as_messages

UPDATE = "apt-get update (as root) brings apt's lists up to date"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Package:
    """What is taken from a Debian package.

    Args:
        name: in Debian 12 (bookworm).
        family: pattern of names in other releases, with the version in parentheses.
        members: wildcard of its files; those that end in .gz or .dz are decompressed.
        entry: pattern between two documents of one file; without it, a file is a document.
    """

    name: str
    members: str
    licence: str
    family: str = "$^"
    entry: bytes | None = None


SOURCES = {
    "debian-docs": (
        Package(
            name="linux-doc-6.1",
            family=r"linux-doc-([\d.]+)",
            members="*.rst.gz",
            licence="GPL-2",
        ),
        Package(
            name="python3.11-doc",
            family=r"python(3\.\d+)-doc",
            members="*/_sources/*.rst.txt",
            licence="PSF",
        ),
        Package(name="perl-doc", members="*.pod", licence="GPL-1+ or Artistic"),
        Package(name="git-doc", members="*.txt", licence="GPL-2"),
        Package(name="anarchism", members="*.md.gz", licence="GPL-2"),
        Package(
            name="dict-gcide",
            members="*/gcide.dict.dz",
            licence="GPL-2+",
            entry=rb"\n\n(?=[^\s\[].*\\)",  # the line of a headword has its syllables in \...\
        ),
    ),
    "wordnet": (Package(name="wordnet-base", members="*/share/wordnet/*", licence="WordNet 3.0"),),
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
    needed = ("apt-get", "apt-cache", "dpkg-deb")
    if lacking := [program for program in needed if shutil.which(program) is None]:
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
                Console().status(f"downloading and unpacking {name}"),
                tempfile.TemporaryDirectory(dir=fresh.parent) as scratch,
                _download(name, Path(scratch)).open("rb") as archive,
            ):
                found = write(package, name, archive, fresh)
            print(f"{name} ({package.licence}): {found}")

    build_once(folder, build)
    print(f"{folder} is ready; what is in it stays under the licences in parentheses")


def name_in_release(package: Package) -> str:
    """The package's name in this release: its own, or the newest of its family."""
    known = set(_run("apt-cache", "pkgnames").split())
    if package.name in known:
        return package.name
    matches = [match for name in known if (match := re.fullmatch(package.family, name))]
    if not matches:
        raise ValueError(f"apt knows no package {package.name} on {_release()}; {UPDATE}")
    newest = max(matches, key=lambda match: [int(n) for n in re.findall(r"\d+", match[1])])[0]
    print(f"{_release()} has no {package.name}; taking {newest}, the newest of its kind")
    return newest


def members(file: IO[bytes], wildcard: str) -> Iterator[tuple[str, bytes]]:
    """Name and decompressed bytes of the regular files of a tar archive that match; no links."""
    with tarfile.open(fileobj=file) as archive:
        for member in archive:
            # Two names of one text would make it count twice, so links are left out.
            if member.isreg() and fnmatch.fnmatchcase(member.name, wildcard):
                content = archive.extractfile(member).read()
                if member.name.endswith((".gz", ".dz")):
                    content = gzip.decompress(content)
                yield member.name.removeprefix("./"), content


def _write_documents(package: Package, name: str, file: IO[bytes], folder: Path) -> str:
    """Write `name`.jsonl, {"name", "text"} a line; returns what it holds, in words."""
    count, size, left_out = 0, 0, 0
    with (folder / f"{name}.jsonl").open("w", encoding="utf-8") as lines:
        for member, content in members(file, package.members):
            parts = re.split(package.entry, content) if package.entry else [content]
            for number, part in enumerate(parts):
                try:
                    text = part.decode()
                except UnicodeDecodeError:
                    left_out += 1
                    continue
                place = f"{member}:{number}" if package.entry else member
                json.dump({"name": place, "text": text}, lines, ensure_ascii=False)
                lines.write("\n")
                count, size = count + 1, size + len(part)
    _check_found(count, package, name)
    others = f"; left out {left_out} that are not UTF-8" if left_out else ""
    return f"{count:,} documents, {size / 1e6:.1f} MB{others}"


def _write_files(package: Package, name: str, file: IO[bytes], folder: Path) -> str:
    """Write the files as they are, without their folders; returns what there is, in words."""
    sizes = [
        (folder / Path(member).name).write_bytes(content)
        for member, content in members(file, package.members)
    ]
    _check_found(len(sizes), package, name)
    return f"{len(sizes)} files, {sum(sizes) / 1e6:.1f} MB"


def _check_found(count: int, package: Package, name: str):
    if not count:
        raise ValueError(
            f"the package {name} of {_release()} has no files {package.members}, as it has in "
            "Debian 12; fetch there and copy the folder"
        )


def _download(name: str, scratch: Path) -> Path:
    """The tar archive of the files of a package."""
    _run("apt-get", "download", name, folder=scratch)
    (package,) = scratch.glob("*.deb")
    archive = scratch / "files.tar"
    with archive.open("wb") as output:
        _run("dpkg-deb", "--fsys-tarfile", package.name, folder=scratch, output=output)
    return archive


def _run(*command: str, folder: Path | None = None, output: IO[bytes] | None = None) -> str:
    """What the command prints, if not sent to `output`; an error with its last line if it fails."""
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


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.fetch_text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", choices=SOURCES)
    default = Path(DataConfig().cache_dir).parent / "data"
    parser.add_argument("--out", type=Path, help=f"folder to write (default: {default}/SOURCE)")
    arguments = parser.parse_args()
    arguments.out = arguments.out or default / arguments.source
    return arguments


def main():
    arguments = parse_arguments()
    with errors_as_messages():
        fetch(arguments.source, arguments.out)
    if arguments.source == "debian-docs":
        print(
            f"train on it with: python train.py --workdir=runs/{arguments.source} "
            f"--set data.source={arguments.out} --set model.vocab_size=4096"
        )


if __name__ == "__main__":
    main()
