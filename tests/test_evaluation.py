"""Scores, perplexity and continuations: equal to those that lm-eval recorded with transformers."""

import dataclasses
import functools
import math
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference.evaluation import CHECKPOINT, GOLDENS, RUNS, golden, prompts, scorer

from dsv3_jax.evaluation import __main__ as command
from dsv3_jax.evaluation import scorer as scorer_module
from dsv3_jax.evaluation.completions import StopRule, generate_completions
from dsv3_jax.evaluation.local_tasks import CATEGORIES, PER_CATEGORY, wordnet_questions
from dsv3_jax.evaluation.perplexity import perplexity, prefix_id, windows
from dsv3_jax.evaluation.scorer import Scorer, ScoreRequest, padded_length, token_scores
from sharding.mesh import MeshSpec

LOGLIK = 2e-3  # nats: what the goldens promise between two implementations
SAME = 1e-4  # nats: the same program in another order of sums


def pairs_of(run: str) -> list[ScoreRequest]:
    return [
        ScoreRequest(tuple(context), tuple(continuation))
        for question in golden(run)["mc"]
        for context, continuation in question["token_ids"]
    ]


@functools.cache
def scores(run: str):
    return scorer()(pairs_of(run))


@pytest.mark.parametrize("run", RUNS)
def test_choices(run):
    logliks = [x for question in golden(run)["mc"] for x in question["loglik"]]
    greedy = [x for question in golden(run)["mc"] for x in question["is_greedy"]]
    np.testing.assert_allclose([x.log_prob for x in scores(run)], logliks, atol=LOGLIK)
    assert [x.is_greedy for x in scores(run)] == greedy


@pytest.mark.parametrize("run", RUNS)
def test_what_is_special(run):
    """Greedy continuations, an empty context, blanks at its end, and one that is cut."""
    extra = golden(run)["extra_loglikelihood"]
    found = scorer()(
        [ScoreRequest(tuple(x["context_ids"]), tuple(x["continuation_ids"])) for x in extra]
    )
    logliks = [x.log_prob for x in found]
    np.testing.assert_allclose(logliks, [x["loglik"] for x in extra], atol=LOGLIK)
    assert [x.is_greedy for x in found] == [x["is_greedy"] for x in extra]
    assert any(x.is_greedy for x in found) and not all(x.is_greedy for x in found)
    assert max(len(x["context_ids"]) for x in extra) > scorer().max_length


@pytest.mark.parametrize("run", RUNS)
def test_windows(run):
    """Cut as lm-eval cuts them, and each with its log-probability."""
    wanted = golden(run)["windows"]
    prefix = prefix_id(prompts())
    cut = [w for text in golden(run)["ppl"] for w in windows(text["token_ids"], prefix, 160)]
    assert cut == [(tuple(w["context_ids"]), tuple(w["continuation_ids"])) for w in wanted]
    found = [x.log_prob for x in scorer()(cut)]
    np.testing.assert_allclose(found, [w["loglik"] for w in wanted], rtol=1e-4)


@pytest.mark.parametrize("n, most", [(0, 4), (1, 1), (4, 4), (5, 4), (11, 4), (7, 1)])
def test_windows_score_each_token_once_with_all_the_context_there_is_room_for(n, most):
    ids = list(range(1, n + 1))
    cut = windows(ids, 0, most)
    assert [i for pair in cut for i in pair.continuation] == ids
    for pair in cut:
        read = len(pair.context) + len(pair.continuation) - 1
        end = pair.continuation[-1]
        assert read == min(end, most) and (*pair.context, *pair.continuation)[-1] == end
        whole = (*pair.context, *pair.continuation)
        assert whole == tuple(range(whole[0], end + 1))


def test_perplexity():
    """The recorded texts, each after one bos."""
    recorded = golden("nobos")
    found = perplexity(scorer(), [text["text"] for text in recorded["ppl"]], prompts())
    assert found.documents == 5 and found.bytes == sum(x["bytes"] for x in recorded["ppl"])
    assert found.tokens == sum(x["token_count"] for x in recorded["ppl"])
    bits = recorded["aggregate"]["tiny_ppl"]["bits_per_byte"]
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-4)
    nats = -sum(x["loglik"] for x in recorded["ppl"])
    assert found.perplexity == pytest.approx(math.exp(nats / found.tokens), rel=1e-4)
    assert found.as_dict()["nats_per_token"] == pytest.approx(nats / found.tokens, rel=1e-4)


@pytest.mark.parametrize("run", RUNS)
def test_continuations(run):
    """Up to a stop string, which may be part of a longer token, or to 32 new tokens."""
    recorded = golden(run)["gen"]
    ids = [x["prompt_ids"][-(160 - 32) :] for x in recorded]
    stop_rule = StopRule(max_new=32, until=("\n\n", " the "), stop_ids=prompts().stop_ids)
    done = []
    found = generate_completions(
        scorer().generator,
        prompts().tokenizer,
        ids,
        stop_rule,
        scorer().batch,
        advance=done.append,
    )
    assert [list(x.ids) for x in found] == [x["new_ids"] for x in recorded]
    assert [x.text for x in found] == [x["text"] for x in recorded]
    assert sum(done) == len(recorded)


def test_a_stop_id_is_no_text():
    recorded = golden("nobos")["gen"][1]
    stop = recorded["new_ids"][3]
    stop_rule = StopRule(max_new=32, stop_ids=(stop,))
    (found,) = generate_completions(
        scorer().generator, prompts().tokenizer, [recorded["prompt_ids"]], stop_rule, scorer().batch
    )
    assert list(found.ids) == recorded["new_ids"][:4]
    assert found.text == prompts().tokenizer.decode(recorded["new_ids"][:3])


# Batches, meshes, sizes


def some() -> list[ScoreRequest]:
    return pairs_of("nobos")[:6]


def expected() -> list[float]:
    return [x.log_prob for x in scores("nobos")[:6]]


def test_one_at_a_time_and_less_padding():
    found = Scorer(scorer().generator, 160, 1)(some())
    np.testing.assert_allclose([x.log_prob for x in found], expected(), atol=SAME)


@pytest.mark.slow
def test_a_mesh_changes_nothing():
    """The batch of 2 is rounded up to 4 devices, and the last one is not full."""
    sharded = scorer("dp2,ep2", 2)
    found = sharded(some())
    assert sharded.batch == 4
    np.testing.assert_allclose([x.log_prob for x in found], expected(), atol=SAME)
    assert [x.is_greedy for x in found] == [x.is_greedy for x in scores("nobos")[:6]]


def test_the_same_pair_runs_once():
    done = []
    found = scorer()([*some(), *some()], done.append)
    assert found[:6] == found[6:] and done == [6, 6]


def test_padding():
    assert [padded_length(n, 32, 160) for n in (1, 32, 33, 128, 129, 160)] == [
        32,
        32,
        64,
        128,
        160,
        160,
    ]
    assert len({padded_length(n, 32, 4096) for n in range(1, 4097)}) == 8
    assert padded_length(1, 32, 8) == 8


@pytest.mark.parametrize("piece", [3, 12])
def test_token_scores(piece, monkeypatch):
    """Whole numbers, so that several tokens are the likeliest: then the first one is."""
    monkeypatch.setattr(scorer_module, "VOCAB_CHUNK", piece)
    rng = np.random.default_rng(0)
    rows, head = rng.integers(-2, 3, (40, 5)), rng.integers(-1, 2, (12, 5))
    logits = rows @ head.T
    labels = np.where(np.arange(40) % 2, logits.argmax(-1), rng.integers(0, 12, 40))
    tied = (logits == logits.max(-1, keepdims=True)).sum(-1) > 1
    assert tied.any() and (labels != logits.argmax(-1)).any()
    arrays = (jnp.asarray(rows, jnp.float32), jnp.asarray(head, jnp.float32))
    log, greedy = token_scores(*arrays, jnp.asarray(labels), MeshSpec())
    wanted = jax.nn.log_softmax(jnp.asarray(logits, jnp.float32), axis=-1)
    np.testing.assert_allclose(log, np.asarray(wanted)[np.arange(40), labels], atol=1e-5)
    np.testing.assert_array_equal(greedy, labels == logits.argmax(-1))


@pytest.mark.parametrize(
    "pair, message",
    [
        (ScoreRequest((), (1,)), "at least one token"),
        (ScoreRequest((1,), ()), "at least one token"),
        (
            ScoreRequest((1,), (2,) * 161),
            "a continuation of 161 tokens is longer than max_length=160",
        ),
        (ScoreRequest((1,), (768,)), "token id 768 is outside the vocabulary of 768"),
    ],
)
def test_bad_pairs(pair, message):
    with pytest.raises(ValueError, match=message):
        scorer()([ScoreRequest((1,), (2,)), pair])


@pytest.mark.parametrize("sizes", [(0, 1), (160, 0)])
def test_bad_sizes(sizes):
    with pytest.raises(ValueError, match="must be positive"):
        Scorer(scorer().generator, *sizes)


def test_prefix_without_bos():
    """Where the tokenizer has none, a text stands after the end of another."""
    bare = dataclasses.replace(prompts(), special_tokens={})
    assert prefix_id(prompts()) == 0 and prefix_id(bare) == bare.stop_ids[0] == 1


# The command, without lm-eval


def run(monkeypatch, *arguments: str):
    monkeypatch.setattr(sys, "argv", ["evaluation", f"--weights={CHECKPOINT}", *arguments])
    command.main()


@pytest.mark.slow
def test_tables(monkeypatch, capsys):
    """Not wider than a terminal of 80, with the recorded bits a byte of the first text."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(GOLDENS)
    run(monkeypatch, "--data=tasks/ppl.jsonl", "--text-field=page", "--limit=1", "--batch=1")
    printed = capsys.readouterr().out
    text = golden("nobos")["ppl"][0]
    assert f"{-text['loglik'] / text['bytes'] / math.log(2):.3f}" in printed
    assert "tasks/ppl.jsonl" in printed and f" {text['token_count']} " in printed
    assert max(map(len, printed.splitlines())) <= 80


def test_help_shows_how(monkeypatch, capsys):
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, "--help")
    out = capsys.readouterr().out
    assert exit.value.code == 0 and out.count("python -m dsv3_jax.evaluation --weights") >= 3


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--data=nowhere"], "does not exist"),
        (["--data=x", "--limit=0"], "--limit=0 must be at least 1"),
        (["--data=x", "--mesh=xp8"], "'xp8' is not understood"),
        (["--tasks=mmlu_dev"], "pip install 'dsv3_jax[eval]'"),
    ],
)
def test_errors_come_in_one_line_and_before_the_weights_are_read(monkeypatch, arguments, message):
    monkeypatch.setattr("dsv3_jax.evaluation.evaluate.load_model", None)
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # as if it were not installed
    ours = "dsv3_jax.evaluation.harness"
    for name in [name for name in sys.modules if name.startswith("lm_eval.") or name == ours]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit) as exit:
        run(monkeypatch, *arguments)
    assert exit.value.code.startswith("error: ") and message in exit.value.code
    assert "\n" not in exit.value.code


def test_nothing_to_do(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch)
    assert "give --data, --tasks or both" in capsys.readouterr().err


# WordNet's questions


def line(number: int, category: int, gloss: str) -> str:
    return f"{number:08} {category:02} n 01 word 0 000 | {gloss}  "


@pytest.fixture
def wordnet(tmp_path) -> Path:
    """A database with the licence in front, and definitions that name their category."""
    lines = ["  1 This software and database is provided ..."]
    for number in range(PER_CATEGORY + 2):
        for category in range(3, 29):
            gloss = f'one of {category}, number {number}; and more; "an example"; "another"'
            lines.append(line(number, category, gloss))
    (tmp_path / "data.noun").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_wordnet_questions(wordnet):
    questions = list(wordnet_questions(wordnet))
    assert [q["answer"] for q in questions] == [*range(26)] * PER_CATEGORY  # balanced at any limit
    assert len({q["prompt"] for q in questions}) == len(questions)
    for question in questions:
        assert question["choices"] == CATEGORIES and len(set(CATEGORIES)) == 26
        definition = rf"one of {question['answer'] + 3}, number \d+; and more"
        assert re.fullmatch(definition + "\nThis is a kind of", question["prompt"])
    assert CATEGORIES[5 - 3] == "animal" and CATEGORIES[28 - 3] == "time"


def test_wordnet_is_the_same_every_time(wordnet):
    first = list(wordnet_questions(wordnet))
    assert list(wordnet_questions(wordnet)) == first
    assert [q["prompt"] for q in first] != sorted(q["prompt"] for q in first)


def test_no_wordnet(tmp_path):
    with pytest.raises(FileNotFoundError, match="data.noun does not exist.*--wordnet"):
        list(wordnet_questions(tmp_path))
    (tmp_path / "data.noun").write_text(line(1, 3, "that which is") + "\n")
    with pytest.raises(ValueError, match="1 definitions of concept, fewer than 40"):
        list(wordnet_questions(tmp_path))
