"""Documents of facts: the same for a seed, consistent, said again near and far."""

import json
import re
import sys

import numpy as np
import pytest

from dsv3_jax.data import needles
from dsv3_jax.data.text import read_documents

FACT = re.compile(r"Remember (\w+) (\d+)\.")
LINES = [f"line {n} of a text that nobody reads" for n in range(500)]
SIZE = 6000


OPTIONS = {"size": SIZE, "max_names": 16, "max_gap": 3.0}


def texts(n: int, seed: int = 0, **options) -> list[str]:
    return list(needles.generate_documents(LINES, n, seed, **OPTIONS | options))


def test_a_seed_decides_every_document():
    assert texts(3) == texts(5)[:3]
    assert len(set(texts(5)) | set(texts(5, seed=1))) == 10


def test_a_name_has_one_value_in_a_document_and_others_elsewhere():
    told = [set(FACT.findall(text)) for text in texts(40)]
    for pairs in told:
        assert len({name for name, _ in pairs}) == len(pairs)
    everywhere = set().union(*told)
    assert {name for name, _ in everywhere} == set(needles.NAMES)
    assert len(everywhere) > 3 * len(needles.NAMES)


def test_facts_are_said_again_near_and_far():
    distances = []
    for text in texts(40):
        last = {}
        for match in FACT.finditer(text):
            distances.append(match.start() - last.get(match[1], match.start()))
            last[match[1]] = match.start()
    decades = np.histogram([d for d in distances if d], [1, 60, 250, 1000, SIZE])[0]
    assert decades.min() > 100


def test_all_else_is_filler_in_order():
    for text in texts(10):
        rest = [line for line in text.split("\n") if not FACT.fullmatch(line)]
        numbers = [int(line.split()[1]) for line in rest]
        assert rest == [LINES[number] for number in numbers]
        assert all((b - a) % len(LINES) == 1 for a, b in zip(numbers, numbers[1:], strict=False))
        assert SIZE <= len(text) + 1 <= SIZE + max(map(len, LINES))


def test_names_and_filler_are_bounded():
    told = [FACT.findall(text) for text in texts(40, max_names=3)]
    assert {len(set(pairs)) for pairs in told} == {1, 2, 3}
    dense, loose = (texts(20, max_gap=gap) for gap in (0.0, 8.0))
    assert not any("line" in text for text in dense)
    per_fact = [text.count("reads") / len(FACT.findall(text)) for text in loose]
    assert min(per_fact) < 0.1 and 1.0 < max(per_fact) < 12.0


def test_filler_reads_like_sentences(tmp_path):
    (tmp_path / "a.txt").write_text(
        "\n  Five words stand in here.\n\nfour words are few\nx = {1: 2}\n"
    )
    assert needles.filler_lines(str(tmp_path)) == ["Five words stand in here."]


def test_plain_filler_needs_no_source():
    assert len(needles.filler_lines("plain")) == 6
    assert all(
        line.endswith(".") and len(line.split()) > 5 for line in needles.filler_lines("plain")
    )


def test_a_source_without_sentences(tmp_path):
    (tmp_path / "a.txt").write_text("1\n2\n")
    with pytest.raises(ValueError, match="no line of .* words"):
        needles.filler_lines(str(tmp_path))


def test_command_writes_documents_that_training_reads(tmp_path, monkeypatch, capsys):
    (tmp_path / "filler.txt").write_text("\n".join(LINES))
    out = tmp_path / "new" / "text"
    command = f"needles --out {out} --filler {tmp_path}/filler.txt --documents 3"
    command += f" --size {SIZE} --names 16 --between 3"
    monkeypatch.setattr(sys, "argv", command.split())
    needles.main()
    assert [text for _, text in read_documents(str(out), "text", "refuse")] == texts(3)
    assert "3 documents" in capsys.readouterr().out
    assert len([json.loads(line) for line in (out / "needles.jsonl").open()]) == 3


def test_command_names_a_missing_source(tmp_path, monkeypatch):
    command = f"needles --out {tmp_path} --filler {tmp_path}/absent"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit, match="error: .*absent"):
        needles.main()
