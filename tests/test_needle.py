"""Needles in haystacks: the texts, the scores, the grid of a perfect reader, and the command."""

import dataclasses
import functools
import json
import re
import sys

import matplotlib.image
import numpy as np
import pytest
from flax import nnx
from reference.cases import CONFIG, build

from dsv3_jax import save_pretrained
from dsv3_jax.data.chat import Prompts
from dsv3_jax.data.needles import NAMES, filler_lines, generate_documents
from dsv3_jax.data.tokenizer import Tokenizer, train_bpe
from dsv3_jax.evaluation import haystack, needle
from dsv3_jax.evaluation.scorer import Score, ScoreRequest
from dsv3_jax.model.deepseek import DeepSeekV3
from dsv3_jax.numerics.policy import Policy

LINES = [f"line {n} of a text" + " that nobody reads" * (n % 5) for n in range(300)]
FACT = re.compile(r"Remember (\w+) (\d+)\.\n")
ASKS = re.compile(r"Remember (\w+) (\d+)\Z")
LENGTHS, DEPTHS = (200, 300), (0.0, 0.5, 1.0)


@functools.cache
def tokenizer() -> Tokenizer:
    return train_bpe(generate_documents(LINES, 8, 0, size=4000, max_names=16, max_gap=3.0), 400)


def haystacks(n_others: int = 3, seed: int = 0, lines: list = LINES) -> haystack.Haystacks:
    return haystack.Haystacks(Prompts(tokenizer(), None, {}, False, ()), lines, n_others, seed)


def whole(pair: ScoreRequest) -> list[int]:
    return [*pair.context, *pair.continuation]


def text_of(length: int, depth: float, trial: int = 0, **options) -> str:
    return tokenizer().decode(whole(haystacks(**options).request(length, depth, trial)))


# Texts


@pytest.mark.parametrize("depth", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("length", [150, 400])
def test_a_text_has_its_length_and_one_needle(length, depth):
    pair = haystacks().request(length, depth, 0)
    assert len(whole(pair)) == length
    text = tokenizer().decode(whole(pair))
    name, value = ASKS.search(text).groups()
    assert tokenizer().decode(list(pair.continuation)) == f" {value}"
    facts = dict(FACT.findall(text))
    assert facts.pop(name) == value
    assert len(facts) == 3 and set(facts) < set(NAMES) and value not in facts.values()
    rest = FACT.sub("", text).split("\n")[1:-1]  # whole lines, without the cut one and the question
    assert rest and set(rest) <= set(LINES)


@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 0.9, 1.0])
def test_a_needle_lies_at_its_depth(depth):
    text = text_of(1000, depth, n_others=0)
    before, after = FACT.split(text)[0], FACT.split(text)[-1]
    n_before, n_after = (len(tokenizer().encode(x)) for x in (before, ASKS.sub("", after)))
    line = max(len(tokenizer().encode(f"{line}\n")) for line in LINES)
    assert abs(n_before - depth * (n_before + n_after)) <= line / 2
    assert (depth > 0 or not n_before) and (depth < 1 or not n_after)


def test_seed_depth_and_trial_decide_a_text():
    made = [text_of(300, 0.5), text_of(300, 0.5, 1), text_of(300, 0.4), text_of(300, 0.5, seed=1)]
    assert len(set(made)) == 4 and made[0] == text_of(300, 0.5)


def test_a_text_begins_with_bos_where_the_model_wants_it():
    prompts = Prompts(tokenizer(), None, {"bos_token": "<|endoftext|>"}, True, ())
    ids = whole(haystack.Haystacks(prompts, LINES, 3, 0).request(200, 0.0, 0))
    assert ids[0] == tokenizer().eos_id not in ids[1:] and len(ids) == 200


def test_a_text_without_room_for_the_facts():
    with pytest.raises(ValueError, match=r"--lengths: 20 tokens have no room .* --others=3 .* \d+"):
        haystacks().request(20, 0.5, 0)


# Readers


def reader(sight: int) -> haystack.ScoreFn:
    """Answers right if the needle lies in the last `sight` tokens, and otherwise has no idea."""

    def score(pair: ScoreRequest) -> Score:
        name = ASKS.search(tokenizer().decode(whole(pair)))[1]
        seen = dict(FACT.findall(tokenizer().decode(whole(pair)[-sight:])))
        answer = tokenizer().encode(f" {seen[name]}") if name in seen else []
        return Score(0.0, True) if list(pair.continuation) == answer else Score(-9.0, False)

    return lambda pairs, advance: [score(pair) for pair in pairs]


def grid(scores: haystack.ScoreFn) -> haystack.Grid:
    return haystack.measure("a reader", haystacks(), scores, LENGTHS, DEPTHS, trials=4)


def test_a_perfect_reader_finds_every_needle():
    got = grid(reader(sight=1000))
    assert np.shape(got.found) == (3, 2) and got.mean == 1.0
    assert not np.any(got.log_prob)


def test_a_blind_reader_finds_none():
    got = grid(reader(sight=1))
    assert got.mean == 0.0
    assert np.all(np.array(got.log_prob) == -9.0)


def test_a_short_sighted_reader_finds_what_is_near():
    """180 tokens reach down to the middle of 200 and of 300, but not to the top."""
    assert grid(reader(sight=180)).found == [[0.0, 0.0], [1.0, 1.0], [1.0, 1.0]]
    assert grid(reader(sight=60)).found == [[0.0, 0.0], [0.0, 0.0], [1.0, 1.0]]


# A model


SIZES = dataclasses.replace(
    CONFIG,
    vocab_size=400,
    width=24,
    n_layers=1,
    n_dense=0,
    mtp_depth=0,
    moe=dataclasses.replace(CONFIG.moe, n_experts=16, n_groups=8, topk_groups=3),
)


def fresh_model() -> DeepSeekV3:
    return build(lambda: DeepSeekV3(SIZES, Policy(), rngs=nnx.Rngs(0)))[0]


def plain_log_probability(pair: ScoreRequest) -> float:
    """Of the answer by the whole model, in float64."""
    tokens = np.array(whole(pair), np.int32)
    logits = np.asarray(fresh_model()(tokens[None, :-1])[0], np.float64)
    n = len(pair.continuation)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return log_probs[range(-n, 0), tokens[-n:]].sum()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random model with its tokenizer."""
    path = tmp_path_factory.mktemp("weights") / "model"
    save_pretrained(fresh_model(), path, "float32")
    tokenizer().save(path / "tokenizer.json")
    return path


def run(monkeypatch, folder, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["needle", f"--weights={folder}", *arguments])
    needle.main()


def test_command_writes_picture_and_numbers(folder, tmp_path, monkeypatch, capsys):
    (tmp_path / "hay.txt").write_text("\n".join(LINES))
    sizes = [
        "--lengths=120,150",
        "--depths=0,50,100",
        "--trials=2",
        f"--haystack={tmp_path}/hay.txt",
    ]
    run(monkeypatch, folder, *sizes, f"--out={tmp_path}/one.png")
    saved = json.loads((tmp_path / "one.json").read_text())
    assert saved["title"] == "model" and saved["lengths"] == [120, 150]
    assert saved["depths"] == [0.0, 0.5, 1.0] and np.shape(saved["found"]) == (3, 2)
    assert np.max(saved["log_prob"]) < 0.0
    same = haystacks(n_others=0, lines=filler_lines(str(tmp_path / "hay.txt")))
    answers = [plain_log_probability(same.request(120, 0.5, trial)) for trial in range(2)]
    assert saved["log_prob"][1][0] == pytest.approx(np.mean(answers), rel=1e-4)
    assert "120 tokens: found 0." in capsys.readouterr().out
    beside = [f"--beside={tmp_path}/one.json", "--title=again"]
    run(monkeypatch, folder, *sizes, *beside, "--lengths=120", f"--out={tmp_path}/two.png")
    again = json.loads((tmp_path / "two.json").read_text())
    assert again["title"] == "again" and again["lengths"] == [120]
    first = [row[:1] for row in saved["log_prob"]]
    np.testing.assert_allclose(again["log_prob"], first, rtol=1e-6)  # padded to another length
    one, two = (matplotlib.image.imread(tmp_path / f"{name}.png") for name in ("one", "two"))
    assert two.shape[1] > 1.3 * one.shape[1] and one.std() > 0.05


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--lengths=20"], "error: --lengths: 20 tokens have no room"),
        (["--lengths=120", "--haystack=absent"], "error: .*absent"),
        (["--lengths=120", "--beside=absent.json"], "error: .*absent.json"),
        (["--lengths=120", "--trials=0"], "error: --trials=0 must be at least 1"),
        (["--lengths=120", "--batch=0"], "error: --batch=0 must be at least 1"),
    ],
)
def test_errors(folder, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=message):
        run(monkeypatch, folder, *arguments)


def test_depths_are_percent(folder, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, folder, "--lengths=120", "--depths=0,101")
    assert "must lie in 0..100" in capsys.readouterr().err
