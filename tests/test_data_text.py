"""Documents and their split: order, names, what is left out, and what the errors say."""

import json
import re

import numpy as np
import pytest

from dsv3_jax.data.corpus import cut_at_lines, split_held_out
from dsv3_jax.data.text import read_documents, source_files, source_identity


def texts(path, bad_lines: str = "refuse") -> dict[str, str]:
    return dict(read_documents(str(path), "text", bad_lines))


def test_folder_is_sorted_and_leaves_out_hidden_linked_and_binary_files(tmp_path, capsys):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name in ("b.txt", "a.md", "sub/c.rst", ".git/config", "sub/.hidden.txt"):
        (tmp_path / name).write_text(f"text of {name}\n")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "twin.txt").symlink_to(tmp_path / "b.txt")
    names = [name for name, _ in read_documents(str(tmp_path), "text", "refuse")]
    assert names == ["a.md", "b.txt", "sub/c.rst"]
    says = "left out 1 files that are not UTF-8 text (model.bin); 1 empty documents (empty.txt)"
    assert says in capsys.readouterr().out


def test_glob_and_single_file(tmp_path):
    (tmp_path / "sub").mkdir()
    for name in ("a.txt", "sub/b.txt", "sub/c.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    assert texts(tmp_path / "**" / "*.txt") == {"a.txt": "a.txt", "sub/b.txt": "sub/b.txt"}
    assert texts(tmp_path / "sub" / "c.md") == {"c.md": "sub/c.md"}
    (tmp_path / "[odd].txt").write_text("a name that looks like a glob")
    assert list(texts(tmp_path / "[odd].txt")) == ["[odd].txt"]


def test_jsonl_gives_a_document_a_line(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": t}, ensure_ascii=False) for t in ("one", "two\u2028lines")]
    path.write_text(f"{lines[0]}\n\n{lines[1]}\n", encoding="utf-8")
    assert texts(path) == {"a.jsonl:1": "one", "a.jsonl:3": "two\u2028lines"}


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"texts": "x", "id": 1}', "line 2: no field .*'text'.*texts, id; did you mean 'texts'"),
        ('{"text": "x"', "line 2: broken JSON"),
        ("[1]", "line 2: a list"),
        ('{"text": 3}', "line 2: field 'text' is a int"),
        ('{"text": null}', "line 2: field 'text' is a NoneType"),
        (r'{"text": "half \ud83d"}', r"line 2: .*'\\ud83d' in position 5: surrogates not allowed"),
        pytest.param("[" * 100_000, "line 2: broken JSON .maximum recursion", id="deep"),
        pytest.param(f"[{'9' * 5000}]", "line 2: broken JSON .Exceeds the limit", id="number"),
        pytest.param("\0" * 100, "line 2: broken JSON", id="zeros"),
        ("\ufffe{}", "line 2: broken JSON"),
    ],
)
def test_bad_jsonl_names_file_and_line_or_is_skipped(tmp_path, capsys, line, says):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "fine"}\n' + line + '\n{"text": "last"}')
    with pytest.raises(ValueError, match=f"a.jsonl, {says}.*--set data.bad_lines=skip"):
        texts(path)
    assert texts(path, "skip") == {"a.jsonl:1": "fine", "a.jsonl:3": "last"}
    assert re.search(f"left out 1 bad lines .a.jsonl, {says}", capsys.readouterr().out)


def test_bytes_that_are_no_utf8_are_a_bad_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(ValueError, match="a.jsonl, line 2: 'utf-8' codec can't decode byte 0xe9"):
        texts(path)
    assert texts(path, "skip") == {"a.jsonl:1": "fine"}


def test_the_first_bad_lines_are_named_and_all_are_counted(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text("{}\n" * 5 + '{"text": "fine"}\n{"text": " "}\n')
    assert list(texts(tmp_path, "skip")) == ["a.jsonl:6"]
    said = capsys.readouterr().out
    assert "1 empty documents (a.jsonl:7); 5 bad lines (a.jsonl, line 1: no field" in said
    assert "line 3" in said and "line 4" not in said and ", ...)" in said
    (tmp_path / "a.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="holds no text; left out: 1 bad lines"):
        texts(tmp_path, "skip")


def test_bom_and_line_ends_of_windows(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "a\\r\\nb"}\r\n\r\n{"text": "c"}\r\n')
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r\n")
    (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf")
    assert texts(tmp_path) == {"a.jsonl:1": "a\r\nb", "a.jsonl:3": "c", "b.txt": "one\ntwo\n"}


def test_binary_files_that_are_valid_utf8(tmp_path, capsys):
    """Zeros are: an array saved by NumPy, or what a crash leaves of a file."""
    np.save(tmp_path / "ones.npy", np.ones(50, np.uint16))
    (tmp_path / "zeros.txt").write_bytes(bytes(1000))
    (tmp_path / "utf16.txt").write_text("text", encoding="utf-16")
    (tmp_path / "a.txt").write_text("text")
    assert texts(tmp_path) == {"a.txt": "text"}
    assert "left out 3 files that are not UTF-8 text (ones.npy," in capsys.readouterr().out


def test_enormous_lines_are_cut(tmp_path):
    text = "word " * 1_000_000
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}) + "\n" + '{"text": "b\\n"}')
    (tmp_path / "b.txt").write_text("x" * 1_000_000)
    found = texts(tmp_path)
    assert found["a.jsonl:1"] == text
    train, held_out = split_held_out(found.items(), 0.1)
    assert max(map(len, train + held_out)) <= 1 << 16
    assert sum(map(len, train + held_out)) == len(text) + 2 + 1_000_000


def test_missing_path_gives_the_nearest_name(tmp_path):
    (tmp_path / "corpus").mkdir()
    with pytest.raises(FileNotFoundError, match="did you mean 'corpus'"):
        texts(tmp_path / "corpsu" / "deeper" / "a.txt")
    with pytest.raises(FileNotFoundError, match="did you mean 'corpus'"):
        texts(tmp_path / "corpsu" / "*.txt")
    with pytest.raises(FileNotFoundError, match="did you mean 'instant'"):
        list(read_documents("instnat", "text", "refuse"))


def test_no_text_at_all(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="holds no text; left out: 1 files .* .model.bin."):
        texts(tmp_path)
    with pytest.raises(ValueError, match="holds no text"):
        texts(tmp_path / "*.txt")


def test_instant_is_sources_and_topics_without_tests():
    names = [name for name, _ in source_files("instant")]
    assert names == sorted(names)
    assert {"abc.py", "json/decoder.py", "pydoc_data/topics.py"} <= set(names)
    assert not any(part in ("test", "tests") for name in names for part in name.split("/"))
    found = dict(read_documents("instant", "text", "refuse"))
    assert "lambda" in found["pydoc_data/topics.py:lambda"]
    assert 5e6 < sum(map(len, found.values())) < 20e6


def test_identity_changes_with_a_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one")
    before = source_identity(str(tmp_path))
    assert before == source_identity(str(tmp_path))
    path.write_text("three")
    assert before != source_identity(str(tmp_path))


@pytest.mark.parametrize("size", [1, 7, 100, 10_000])
def test_cut_loses_nothing_and_ends_at_lines(size):
    text = "".join(f"line {i} {'x' * (i % 13)}\n" for i in range(200)) + "no end"
    parts = list(cut_at_lines(text, size))
    assert "".join(parts) == text
    assert max(map(len, parts)) <= size
    if size >= 100:
        assert all(part.endswith("\n") for part in parts[:-1])


def test_split_is_disjoint_whole_repeatable_and_of_the_fraction_asked_for():
    docs = [(f"{i}.txt", f"document {i}\n" * 20) for i in range(300)]
    train, held_out = split_held_out(docs, 0.1)
    assert (train, held_out) == split_held_out(docs, 0.1)
    assert not set(train) & set(held_out)
    assert sorted(train + held_out) == sorted(text for _, text in docs)
    fraction = sum(map(len, held_out)) / sum(len(text) for _, text in docs)
    assert 0.1 <= fraction < 0.11
    assert set(held_out) < set(split_held_out(docs, 0.3)[1])


def test_split_does_not_depend_on_the_interpreter():
    """Golden: hash() changes with PYTHONHASHSEED, this must not."""
    held_out = split_held_out([(f"{i}.txt", f"{i:03d}") for i in range(100)], 0.03)[1]
    assert held_out == ["036", "067", "073"]


def test_a_single_file_has_both_splits():
    text = "".join(f"line {i}\n" for i in range(5000))
    train, held_out = split_held_out([("a.txt", text)], 0.02)
    assert 0.02 <= sum(map(len, held_out)) / len(text) < 0.05
    assert sum(map(len, train + held_out)) == len(text)


def test_split_without_train_text():
    with pytest.raises(ValueError, match=r"data.held_out=0.5 .* 1 passages .*1 characters"):
        split_held_out([("a.txt", "x")], 0.5)
