"""Text from Debian packages: tiny ones made here, and an apt that hands them out."""

import gzip
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from dsv3_jax.data.cache import MANIFEST, is_intact
from dsv3_jax.data.text import read_documents
from tools.fetch_text import fetch, main

pytestmark = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="makes .deb files")

GCIDE = rb"""About

Zebra \Ze"bra\, n.
   An animal.

   Syn: ass.

Zeal \Zeal\ EACUTE

Zoo \Zoo\
""".replace(b"EACUTE", b"\xe9")
PACKAGES = {
    "linux-doc-6.9": {"doc/b.rst.gz": gzip.compress(b"older")},
    "linux-doc-6.12": {
        "doc/b.rst.gz": gzip.compress("naïve\n".encode()),
        "doc/a.rst.gz": gzip.compress(b"first"),
        "doc/a.html": b"<p>first",
    },
    "python3.11-doc": {"html/_sources/x.rst.txt": b"x = 1", "html/y.rst.txt": b"y = 1"},
    "perl-doc": {"share/perl.pod": b"=head1"},
    "git-doc": {"share/git.txt": b"git"},
    "anarchism": {"share/a.md.gz": gzip.compress(b"essay")},
    "dict-gcide": {"share/gcide.dict.dz": gzip.compress(GCIDE), "share/gcide.index": b"0"},
    "wordnet-base": {"share/wordnet/data.noun": b"00001740 03 n", "share/man/wn": b"manual"},
}

APT_GET = """#!/bin/sh
[ "$1" = download ] || exit 9
cp {archive}/$2.deb . && exit
echo "E: Unable to fetch $2" >&2
echo "W: some warning" >&2
exit 100
"""
APT_CACHE = "#!/bin/sh\n[ $1 = pkgnames ] && cat {archive}/names\n"


def program(path, text: str):
    path.write_text(text)
    path.chmod(0o755)


def make_package(archive, name: str):
    tree = archive / "tree" / name
    for member, content in PACKAGES[name].items():
        path = tree / "usr" / member
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (path.parent / "twin.txt").symlink_to(path.name)
    (tree / "DEBIAN").mkdir()
    (tree / "DEBIAN" / "control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.c>\nDescription: x\n"
    )
    command = ["dpkg-deb", "--build", "--root-owner-group", tree, archive / f"{name}.deb"]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    archive = tmp_path_factory.mktemp("packages")
    for name in PACKAGES:
        make_package(archive, name)
    return archive


@pytest.fixture
def archive(packages, tmp_path, monkeypatch):
    """An archive of its own for a test, whose packages apt finds."""
    archive = tmp_path / "archive"
    shutil.copytree(packages, archive, ignore=shutil.ignore_patterns("tree"))
    (archive / "names").write_text("\n".join(PACKAGES))
    programs = tmp_path / "bin"
    programs.mkdir()
    program(programs / "apt-get", APT_GET.format(archive=archive))
    program(programs / "apt-cache", APT_CACHE.format(archive=archive))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    return archive


def read(path) -> dict[str, str]:
    records = map(json.loads, path.read_text().splitlines())
    return {record["name"]: record["text"] for record in records}


def test_docs_are_a_file_a_package_and_a_document_a_line(archive, tmp_path, capsys):
    folder = tmp_path / "data" / "docs"
    fetch("debian-docs", folder)
    names = {"anarchism", "dict-gcide", "git-doc", "linux-doc-6.12", "perl-doc", "python3.11-doc"}
    assert {path.name for path in folder.iterdir()} == {MANIFEST, *(f"{n}.jsonl" for n in names)}
    linux = {"usr/doc/a.rst.gz": "first", "usr/doc/b.rst.gz": "naïve\n"}
    assert read(folder / "linux-doc-6.12.jsonl") == linux
    assert read(folder / "python3.11-doc.jsonl") == {"usr/html/_sources/x.rst.txt": "x = 1"}
    assert read(folder / "git-doc.jsonl") == {"usr/share/git.txt": "git"}
    assert list(read(folder / "dict-gcide.jsonl").values()) == [
        "About",
        'Zebra \\Ze"bra\\, n.\n   An animal.\n\n   Syn: ass.',
        "Zoo \\Zoo\\\n",
    ]
    said = capsys.readouterr().out
    assert "has no linux-doc-6.1; taking linux-doc-6.12, the newest of its kind" in said
    assert "dict-gcide (GPL-2+): 3 documents, 0.0 MB; left out 1 that are not UTF-8" in said
    assert [path.name for path in folder.parent.iterdir()] == ["docs"]


def test_wordnet_is_its_files_and_comes_once(archive, tmp_path, capsys):
    folder = tmp_path / "wordnet"
    fetch("wordnet", folder)
    assert (folder / "data.noun").read_bytes() == b"00001740 03 n"
    assert {path.name for path in folder.iterdir()} == {MANIFEST, "data.noun"}
    shutil.rmtree(archive)
    fetch("wordnet", folder)
    assert "is there already" in capsys.readouterr().out


def test_command_writes_what_train_reads_and_says_how(archive, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["fetch", "debian-docs"])
    main()
    assert "--set data.source=runs/data/debian-docs" in capsys.readouterr().out
    assert len(list(read_documents("runs/data/debian-docs", "text", "refuse"))) == 9
    Path("runs/data/debian-docs/git-doc.jsonl").unlink()
    with pytest.raises(SystemExit, match="error: runs/data/debian-docs exists, but"):
        main()


def test_a_folder_of_the_users_own_is_left_alone(archive, tmp_path):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "a.txt").write_text("mine")
    with pytest.raises(ValueError, match="mine exists, but .* --out"):
        fetch("wordnet", folder)
    assert (folder / "a.txt").read_text() == "mine"


def test_failed_download_says_why_and_leaves_nothing(archive, tmp_path):
    (archive / "git-doc.deb").unlink()
    folder = tmp_path / "data" / "docs"
    with pytest.raises(OSError, match=r"download git-doc failed: E: Unable to fetch .*update"):
        fetch("debian-docs", folder)
    assert list(folder.parent.iterdir()) == []


def test_damaged_package(archive, tmp_path):
    path = archive / "wordnet-base.deb"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(OSError, match="dpkg-deb --fsys-tarfile wordnet-base.deb failed: dpkg-deb"):
        fetch("wordnet", tmp_path / "wordnet")


def test_package_that_apt_does_not_know(archive, tmp_path):
    (archive / "names").write_text("linux-doc\nlinux-documentation-6.1\n")
    with pytest.raises(ValueError, match="no package linux-doc-6.1 on .*apt-get update .as root"):
        fetch("debian-docs", tmp_path / "docs")


def test_package_without_the_files(archive, tmp_path):
    shutil.copy(archive / "git-doc.deb", archive / "wordnet-base.deb")
    with pytest.raises(ValueError, match=r"wordnet-base .* has no files \*/share/wordnet/\*"):
        fetch("wordnet", tmp_path / "wordnet")
    assert not is_intact(tmp_path / "wordnet")


def test_system_without_apt(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="no apt-get, apt-cache, dpkg-deb here: wordnet"):
        fetch("wordnet", tmp_path / "wordnet")
